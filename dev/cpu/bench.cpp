// Training steps of GPT-2 on this CPU, timed beside their own matrix products.
//
//     build/bench                          124M, every layer, B=4 T=64 and B=1 T=1024
//     build/bench lengths                  causal, infini, lightning at B=1, T = 1024, 4096, 16384 (a quarter of an hour on 2 cores)
//     build/bench PATTERN B T [STEPS]      one line
//     OMP_NUM_THREADS=n build/bench ...    with n threads
//
// A step is forward, backward, clipping and AdamW. `matmuls` is the time of the very same products of the linear layers (the calls of one step, recorded
// and repeated on the same memory; attention's own products are not among them), measured after each step in the same process. ratio = step / matmuls.
// All figures are medians of STEPS steps after one to warm up; the spread is the range. GFLOP/s counts the whole step: 3 forward passes' model_flops.
#define GPT2_NO_MAIN
#include "../../train_gpt2.cpp"

#include <sys/resource.h>

#include <chrono>
#include <cstdio>

static double seconds() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

static double median(std::vector<double> v) {
    std::sort(v.begin(), v.end());
    return v[v.size() / 2];
}

static void bench(const std::string& pattern, int B, int T, int steps) {
    const Preset& preset = presets[1];  // gpt2-124M
    ModelConfig c;
    c.layers = preset.layers;
    c.heads = preset.heads;
    c.channels = preset.channels;
    c.max_seq = std::max(T, preset.max_seq);
    c.set_vocab(preset.vocab_size);
    parse_attention(c, pattern, {}, "");
    TrainerOptions o;
    o.max_tokens = (int64_t)B * T;
    std::unique_ptr<Trainer> model = make_trainer(c, o);
    model->initialise(1);
    Batch batch;
    for (int i = 0; i < B * T; i++) {
        Philox r = philox(1, i, 0, 0, 0);
        batch.tokens.push_back(r.word[0] % c.vocab_size);
        batch.targets.push_back(r.word[1] % c.vocab_size);
    }
    for (int b = 0; b <= B; b++) batch.cu_seqlens.push_back(b * T);
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

int main(int argc, char** argv) {
    printf("GPT-2 124M, float32, %d threads; ms medians [min max]; memory in MiB: parameters, gradients + moments, activations\n", cpu::num_threads());
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
            usage_error("usage: bench [lengths | PATTERN B T [STEPS]]");
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
