// Training steps of GPT-2 on this CPU, timed beside their own matrix products.
//
//     build/bench                          124M, every layer, B=4 T=64 and B=1 T=1024
//     build/bench lengths                  causal, infini, lightning at B=1, T = 1024, 4096, 16384 (a quarter of an hour on 2 cores)
//     build/bench decode                   generation, one text: milliseconds a token behind 128 and 896 others, beside reading the weights once
//     build/bench PATTERN B T [STEPS]      one line
//     OMP_NUM_THREADS=n build/bench ...    with n threads
//
// A step is forward, backward, clipping and AdamW. `matmuls` is the time of the very same products of the linear layers (the calls of one step, recorded
// and repeated on the same memory; attention's own products are not among them), measured after each step in the same process. ratio = step / matmuls.
// All figures are medians of STEPS steps after one to warm up; the spread is the range. GFLOP/s counts the whole step: 3 forward passes' model_flops.
#define GPT2_NO_MAIN
#include "../../train_gpt2.cpp"
#include "../random_batch.h"

#include <sys/resource.h>

#include <chrono>
#include <cstdio>

static double seconds() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

static double median(std::vector<double> v) {
    std::sort(v.begin(), v.end());
    return v[v.size() / 2];
}

static ModelConfig model_124M(const std::string& pattern, int T) {
    const Preset& preset = presets[1];
    ModelConfig c;
    c.layers = preset.layers;
    c.heads = preset.heads;
    c.channels = preset.channels;
    c.max_seq = std::max(T, preset.max_seq);
    c.set_vocab(preset.vocab_size);
    parse_attention(c, pattern, {}, "");
    return c;
}

static void bench(const std::string& pattern, int B, int T, int steps) {
    ModelConfig c = model_124M(pattern, T);
    TrainerOptions o;
    o.max_tokens = (int64_t)B * T;
    std::unique_ptr<Trainer> model = make_trainer(c, o);
    model->initialise(1);
    Batch batch = random_batch(B, T, c.vocab_size);
    Pass pass;
    pass.training = true;
    std::vector<cpu::MatmulCall> calls;
    std::vector<double> step_ms, matmul_ms;
    for (int step = 0; step <= steps; step++) {
        calls.clear();
        cpu::matmul_log = &calls;
        double start = seconds();
        double loss = model->forward(batch, pass);
        model->backward();
        model->update({1e-4, 0.9, 0.95, 1e-8, 0.1, 1.0, step + 1});
        double middle = seconds();
        cpu::matmul_log = nullptr;
        for (const cpu::MatmulCall& m : calls) cpu::matmul(m.ta, m.tb, m.M, m.N, m.K, m.alpha, m.A, m.lda, m.B, m.ldb, m.beta, m.C, m.ldc);
        double end = seconds();
        for (size_t i = 0; i < model->parameters().specs.size(); i++) {  // the repetition has added to the gradients
            std::vector<float> zero(model->parameters().specs[i].size());
            model->set(Section::GRADIENTS, (int)i, zero.data());
        }
        if (!std::isfinite(loss)) fprintf(stderr, "loss %f\n", loss);
        if (step == 0) continue;
        step_ms.push_back(1e3 * (middle - start));
        matmul_ms.push_back(1e3 * (end - middle));
    }
    double flops = 0, ms = median(step_ms);
    for (const cpu::MatmulCall& m : calls) flops += 2.0 * m.M * m.N * m.K;
    printf("%-28s %3d %6d  %8.0f [%6.0f %6.0f]  %7.0f  %7.1f  %8.0f [%6.0f %6.0f] %7.1f   %5.2f   %5.0f %5.0f %5.0f\n", pattern.c_str(), B, T, ms,
           *std::min_element(step_ms.begin(), step_ms.end()), *std::max_element(step_ms.begin(), step_ms.end()), B * T / ms * 1e3,
           3 * model_flops(c, T) * B * T / ms * 1e-6, median(matmul_ms), *std::min_element(matmul_ms.begin(), matmul_ms.end()),
           *std::max_element(matmul_ms.begin(), matmul_ms.end()), flops / median(matmul_ms) * 1e-6, ms / median(matmul_ms),
           model->parameter_bytes() / 1048576.0, model->gradient_bytes() / 1048576.0, model->activation_bytes() / 1048576.0);
    fflush(stdout);
}

// What decoding cannot be faster than: all parameters read once, by all threads, as fast as this machine can: they go on to the next tensor without waiting
// for one another, and ask for lines well before they need them.
static double read_parameters(const Tensors& parameters) {
    constexpr int step = 4 * cpu::W, ahead = 1024;
    double start = seconds();
    real sum = 0;
#pragma omp parallel reduction(+ : sum)
    {
        cpu::vec s[4] = {};
        for (size_t i = 0; i < parameters.specs.size(); i++) {
            const real* x = (const real*)parameters.data[i];
            int64_t n = parameters.specs[i].size();
#pragma omp for schedule(static) nowait
            for (int64_t j = 0; j < n / step; j++)
                for (int v = 0; v < 4; v++) {
                    const real* at = x + j * step + v * cpu::W;
                    __builtin_prefetch(at + ahead);
                    s[v] += *(const cpu::vec*)at;
                }
        }
        for (int v = 0; v < 4; v++)
            for (int l = 0; l < cpu::W; l++) sum += s[v][l];
    }
    double end = seconds();
    if (sum == 1.5f) printf(" ");  // the compiler must not leave it out
    return end - start;
}

static void bench_decode(const std::string& pattern) {
    ModelConfig c = model_124M(pattern, 1024);
    TrainerOptions o;
    o.max_tokens = 128;
    o.training = false;
    std::unique_ptr<Trainer> model = make_trainer(c, o);
    model->initialise(1);
    double bytes = 0;
    for (const TensorSpec& t : model->parameters().specs) bytes += (double)t.size() * sizeof(real);
    int sequence = model->new_sequence(), length = 0;
    std::vector<float> logits(c.vocab_size);
    auto extend = [&](int n) {
        Batch batch;
        for (int i = 0; i < n; i++) batch.tokens.push_back(philox(1, length + i, 0, 0, 0).word[0] % c.vocab_size);
        batch.targets.assign(n, -1);
        batch.cu_seqlens = {0, n};
        double start = seconds();
        model->extend(batch, {sequence}, logits.data());
        length += n;
        return seconds() - start;
    };
    for (int context : {128, 896}) {
        double prefill = 0;
        int read = context - length;
        while (length < context) prefill += extend(128);
        std::vector<double> token_ms, read_ms;
        for (int i = 0; i < 32; i++) {
            token_ms.push_back(1e3 * extend(1));
            read_ms.push_back(1e3 * read_parameters(model->parameters()));
        }
        printf("%-28s %6d  %8.1f  %7.2f [%6.2f %6.2f]  %7.2f %6.1f   %5.2f   %8.2f\n", pattern.c_str(), context, read / prefill, median(token_ms),
               *std::min_element(token_ms.begin(), token_ms.end()), *std::max_element(token_ms.begin(), token_ms.end()), median(read_ms),
               bytes / median(read_ms) * 1e-6, median(token_ms) / median(read_ms), model->state_bytes() * 1e-6);
        fflush(stdout);
        while (length % 128 != 0) extend(1);
    }
}

int main(int argc, char** argv) {
    if (argc == 2 && std::string(argv[1]) == "decode") {
        printf("GPT-2 124M, float32, %d threads, one text; ms medians of 32 [min max]; weights: all read once\n", num_threads());
        printf("%-28s %6s  %8s  %7s %15s  %7s %6s   %5s   %s\n", "attention", "behind", "prefill/s", "ms", "a token", "weights", "GB/s", "ratio", "state MB");
        for (const AttentionDescription& d : attention_descriptions()) bench_decode(d.name);
        return 0;
    }
    printf("GPT-2 124M, float32, %d threads; ms medians [min max]; memory in MiB: parameters, gradients + moments, activations\n", num_threads());
    printf("%-28s %3s %6s  %8s %15s  %7s  %7s  %8s %15s %7s   %5s   %s\n", "attention", "B", "T", "step", "", "tok/s", "GFLOP/s", "matmuls", "", "GFLOP/s",
           "ratio", "param  grad   act");
    try {
        if (argc >= 4) {
            bench(argv[1], atoi(argv[2]), atoi(argv[3]), argc > 4 ? atoi(argv[4]) : 5);
        } else if (argc == 2 && std::string(argv[1]) == "lengths") {
            for (int T = 1024; T <= 16384; T *= 4)
                for (const char* pattern : {"causal", "infini:segment=256", "lightning"}) bench(pattern, 1, T, T > 4096 ? 1 : 3);
        } else if (argc == 1) {
            for (const AttentionDescription& d : attention_descriptions()) bench(d.name, 4, 64, 9);
            for (const AttentionDescription& d : attention_descriptions()) bench(d.name, 1, 1024, 5);
        } else {
            usage_error("usage: bench [lengths | decode | PATTERN B T [STEPS]]");
        }
    } catch (const Error& e) {
        fprintf(stderr, "%s\n", e.what());
        return e.exit_code;
    }
    rusage usage;
    getrusage(RUSAGE_SELF, &usage);
    printf("peak resident memory of this process: %.0f MiB\n", usage.ru_maxrss / 1024.0);
    return 0;
}
