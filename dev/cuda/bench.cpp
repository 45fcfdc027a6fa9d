// Training steps of GPT-2 on this GPU: time, rate, utilisation, memory.
//
//     build/cuda/bench                              124M with every layer (B=64 T=1024), causal 350M (B=32) and 1558M (B=16)
//     build/cuda/bench lengths                      124M, 131072 tokens a step in sequences of 1024 to 131072: every layer and a hybrid
//     build/cuda/bench PRESET PATTERN B T [STEPS]   one line
//     build/cuda/bench decode                       generation: one text (124M, 1558M), prompts, many texts at once with much behind them
//     build/cuda/bench decode PRESET PATTERN TEXTS BEHIND [STEPS]   one line of it
//     build/cuda/bench --tune ...                   with cuBLASLt's algorithms timed beforehand, as in training with --tune
//
// bf16, random tokens, the whole step: forward, backward, clipping, AdamW, started as the training loop starts them (results are read a step late). Times are
// medians over STEPS steps after five to warm up, and the 10th and 90th percentile. Positions are rotary where lengths are compared (learned ones would grow
// with the length), the layer's default elsewhere. MFU: 3 forward passes' model_flops (gpt2/config.h) over the time and the GPU's highest matrix rate.
// `recompute` is the lowest level at which the model fits the GPU. Memory is what this process's GPU has in use, everything included.
//
// decode: a step takes one token of each text, chooses the next ones (greedily) and brings them to the host. "read" is the time in which the GPU, copying 1
// GiB, would have read all weights and the texts' states once; the ratio to that is what is left to win. Rate and ratio are those of all steps together, and
// with Infini these are a whole segment: a step's time grows with the tokens pending, and at the segment's end the memory is written. Texts have their states
// in pages of their own.
// "prompts" are read in one batch; beside them the same tokens in a forward pass as evaluation makes it.
#include <cuda_runtime_api.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstring>
#include <numeric>

#include "../../attention.h"
#include "../../gpt2/trainer.h"
#include "../random_batch.h"

static double seconds() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

static ModelConfig model(const std::string& preset_name, const std::string& pattern, const std::string& positions, int T) {
    const Preset* preset = std::find_if(std::begin(presets), std::end(presets), [&](const Preset& p) { return preset_name == p.name; });
    if (preset == std::end(presets)) usage_error("there is no preset '%s': gpt2-124M, gpt2-350M, gpt2-774M, gpt2-1558M", preset_name.c_str());
    ModelConfig c;
    c.layers = preset->layers;
    c.heads = preset->heads;
    c.channels = preset->channels;
    c.max_seq = T;
    c.set_vocab(preset->vocab_size);
    parse_attention(c, pattern, {}, positions);
    return c;
}

static uint32_t token(uint64_t i) { return philox(1, (uint32_t)i, (uint32_t)(i >> 32), 0, 0).word[0]; }

// Sorted: the median, and the 10th and 90th percentile.
struct Times {
    std::vector<double> ms;
    double median() const { return ms[ms.size() / 2]; }
    double mean() const { return std::accumulate(ms.begin(), ms.end(), 0.0) / ms.size(); }
    std::string text(int digits) const { return format("%.*f [%.*f %.*f]", digits, median(), digits, ms[ms.size() / 10], digits, ms[ms.size() * 9 / 10]); }
};

static void bench(const std::string& preset_name, const std::string& pattern, const std::string& positions, int B, int T, int steps, bool tune) {
    ModelConfig c = model(preset_name, pattern, positions, T);
    TrainerOptions o;
    o.max_tokens = (int64_t)B * T;
    o.tune = tune;
    std::unique_ptr<Trainer> model;
    for (; !model; o.recompute++) try {  // as little as fits
            model = make_trainer(c, o);
            break;
        } catch (const Error&) {
            if (o.recompute == 2) throw;
        }
    model->initialise(1);
    Batch batch = random_batch(B, T, c.vocab_size);
    Pass pass;
    pass.training = true;

    std::vector<double> ms;
    int started = 0;
    double last = seconds();
    for (int finished = 0; finished < steps + 5; finished++) {
        while (started < std::min(finished + 1 + model->steps_ahead(), steps + 5)) {
            pass.step = started++;
            model->train(batch, pass);
            model->end_step({1e-4, 0.9, 0.95, 1e-8, 0.1, 1.0, started});
        }
        StepResult result = model->step_result();
        if (!(result.loss < 20)) data_error("loss %f in step %d: training went wrong", result.loss, finished + 1);
        double now = seconds();
        if (finished >= 5) ms.push_back(1e3 * (now - last));
        last = now;
    }
    std::sort(ms.begin(), ms.end());
    size_t free = 0, total = 0;
    cudaMemGetInfo(&free, &total);
    double median = ms[ms.size() / 2];
    printf("| %s | %s | %d | %d | %d | %.1f [%.1f %.1f] | %.0f | %.1f | %.1f |\n", preset_name.c_str(), pattern.c_str(), B, T, o.recompute, median,
           ms[ms.size() / 10], ms[ms.size() * 9 / 10], B * T / median * 1e3, 100 * 3 * model_flops(c, T) * B * T / (median * 1e-3) / model->peak_flops(),
           (total - free) * 1e-9);
    fflush(stdout);
}

// ---- generation -------------------------------------------------------------------------------------------------------------------------------------------

// Bytes a second of reading, as copying 1 GiB reads and writes them.
static double copy_rate() {
    constexpr size_t bytes = 1 << 30;
    static double rate = 0;
    if (rate > 0) return rate;
    void *a = nullptr, *b = nullptr;
    if (cudaMalloc(&a, bytes) != cudaSuccess || cudaMalloc(&b, bytes) != cudaSuccess) data_error("no 2 GiB of GPU memory to measure its speed with");
    std::vector<double> s;
    for (int i = 0; i < 12; i++) {
        cudaDeviceSynchronize();
        double start = seconds();
        for (int k = 0; k < 4; k++) cudaMemcpy(b, a, bytes, cudaMemcpyDeviceToDevice);
        cudaDeviceSynchronize();
        s.push_back((seconds() - start) / 4);
    }
    std::sort(s.begin(), s.end());
    cudaFree(a);
    cudaFree(b);
    return rate = 2.0 * bytes / s[s.size() / 2];
}

static double weight_bytes(Trainer& m) {
    double bytes = 0;
    for (const TensorSpec& t : m.parameters().specs)
        if (t.name != "wpe") bytes += (double)t.size() * (t.storage == Storage::FLOAT32 ? 4 : 2);
    return bytes;
}

// One token a text and step, `behind` tokens behind each. Fewer texts if the GPU's memory has no room for so many.
static void bench_decode(const std::string& preset, const std::string& pattern, const std::string& positions, int texts, int behind, int steps, bool tune) {
    constexpr int CHUNK = 8192;
    ModelConfig c = model(preset, pattern, positions, std::max(behind + steps + 16, 1024));
    TrainerOptions o;
    o.max_tokens = std::max(std::min(behind, CHUNK), texts);
    o.training = false;
    o.tune = tune;
    std::unique_ptr<Trainer> m = make_trainer(c, o);
    m->initialise(1);
    std::vector<int> sequences = {m->new_sequence()};
    for (int done = 0; done < behind;) {
        Batch batch;
        int n = std::min(CHUNK, behind - done);
        for (int i = 0; i < n; i++) batch.tokens.push_back(token(done + i) % c.vocab_size);
        batch.targets.assign(n, -1);
        batch.cu_seqlens = {0, n};
        m->extend(batch, sequences, nullptr);
        done += n;
    }
    int64_t pages = m->pages_wanted(sequences[0], steps + 8) + behind / o.page_size + 1;
    while ((int)sequences.size() < texts && m->pages_left() > 2 * pages) sequences.push_back(m->copy_sequence(sequences[0]));
    texts = (int)sequences.size();
    SamplerOptions greedy;
    greedy.temperature = 0;
    Batch batch;
    std::vector<Draw> draws;
    for (int s = 0; s <= texts; s++) batch.cu_seqlens.push_back(s);
    for (int s = 0; s < texts; s++) {
        batch.tokens.push_back(token(s) % c.vocab_size);
        draws.push_back({s, 0.5});
    }
    batch.targets.assign(texts, -1);
    Times t;
    for (int i = 0; i < steps + 5; i++) {
        double start = seconds();
        std::vector<int> next = m->extend_and_draw(batch, sequences, greedy, draws);
        if (i >= 5) t.ms.push_back(1e3 * (seconds() - start));
        batch.tokens = next;
    }
    std::sort(t.ms.begin(), t.ms.end());
    double state = (double)m->state_bytes(), read = (weight_bytes(*m) + state) / copy_rate() * 1e3;
    printf("| %s | %s | %d | %d | %s | %.0f | %.1f | %.3f | %.2f |\n", preset.c_str(), pattern.c_str(), texts, behind, t.text(3).c_str(),
           texts / t.mean() * 1e3, state * 1e-6, read, t.mean() / read);
    fflush(stdout);
}

// Prompts of `length` tokens, `texts` of them in one batch, from empty states.
static void bench_prefill(const std::string& preset, const std::string& pattern, const std::string& positions, int texts, int length, bool tune) {
    ModelConfig c = model(preset, pattern, positions, length);
    TrainerOptions o;
    o.max_tokens = (int64_t)texts * length;
    o.training = false;
    o.tune = tune;
    std::unique_ptr<Trainer> m = make_trainer(c, o);
    m->initialise(1);
    Batch batch;
    for (int i = 0; i < texts * length; i++) batch.tokens.push_back(token(i) % c.vocab_size);
    batch.targets.assign(batch.tokens.size(), -1);
    for (int s = 0; s <= texts; s++) batch.cu_seqlens.push_back(s * length);
    Times extend, forward;
    for (int i = 0; i < 8; i++) {
        std::vector<int> sequences;
        for (int s = 0; s < texts; s++) sequences.push_back(m->new_sequence());
        std::vector<Draw> draws = {{0, 0.5}};
        SamplerOptions greedy;
        greedy.temperature = 0;
        double start = seconds();
        m->extend_and_draw(batch, sequences, greedy, draws);
        if (i >= 3) extend.ms.push_back(1e3 * (seconds() - start));
        for (int s : sequences) m->free_sequence(s);
        start = seconds();
        m->forward(batch, Pass());
        if (i >= 3) forward.ms.push_back(1e3 * (seconds() - start));
    }
    std::sort(extend.ms.begin(), extend.ms.end());
    std::sort(forward.ms.begin(), forward.ms.end());
    double tokens = (double)texts * length;
    printf("| %s | %s | %d | %d | %s | %.0f | %s |\n", preset.c_str(), pattern.c_str(), texts, length, extend.text(2).c_str(), tokens / extend.median() * 1e3,
           forward.text(2).c_str());
    fflush(stdout);
}

static void bench_generation(bool tune) {
    printf("copying 1 GiB: %.0f GB/s\n\n", copy_rate() * 1e-9);
    const char* header =
        "| model | attention | texts | tokens behind | ms a step [10 % 90 %] | tokens/s | states MB | read ms | ratio |\n"
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |\n";
    fputs(header, stdout);
    bench_decode("gpt2-124M", "causal", "", 1, 512, 400, tune);
    bench_decode("gpt2-1558M", "causal", "", 1, 512, 200, tune);
    for (const char* pattern : {"causal", "infini", "lightning", "mla"})
        for (int behind = 1024; behind <= 65536; behind *= 4) bench_decode("gpt2-124M", pattern, "rope", 1, behind, 256, tune);
    printf("\n");
    fputs(header, stdout);
    for (const char* pattern : {"causal", "infini", "lightning", "mla"})
        for (int behind = 1024; behind <= 65536; behind *= 4)
            bench_decode("gpt2-124M", pattern, "rope", 256, behind, strcmp(pattern, "infini") ? 20 : 256, tune);
    printf("\n| model | attention | prompts | tokens each | ms [10 %% 90 %%] | tokens/s | forward pass ms |\n| --- | --- | --- | --- | --- | --- | --- |\n");
    for (const char* pattern : {"causal", "infini", "lightning", "mla"})
        for (int length : {1024, 8192}) bench_prefill("gpt2-124M", pattern, "rope", 16384 / length, length, tune);
}

int main(int argc, char** argv) {
    bool tune = argc > 1 && strcmp(argv[1], "--tune") == 0;
    if (tune) argc--, argv++;
    try {
        if (argc == 2 && strcmp(argv[1], "decode") == 0) {
            bench_generation(tune);
            return 0;
        }
        if ((argc == 6 || argc == 7) && strcmp(argv[1], "decode") == 0) {
            bench_decode(argv[2], argv[3], "", atoi(argv[4]), atoi(argv[5]), argc > 6 ? atoi(argv[6]) : 50, tune);
            return 0;
        }
        printf(
            "| model | attention | B | T | recompute | ms a step [10 %% 90 %%] | tokens/s | MFU %% | memory GB |\n| --- | --- | --- | --- | --- | --- | --- | "
            "--- | --- |\n");
        if (argc == 1) {
            for (const AttentionDescription& d : attention_descriptions()) bench("gpt2-124M", d.name, "", 64, 1024, 40, tune);
            bench("gpt2-350M", "causal", "", 32, 1024, 30, tune);
            bench("gpt2-1558M", "causal", "", 16, 1024, 20, tune);
        } else if (argc == 2 && strcmp(argv[1], "lengths") == 0) {
            for (const char* pattern : {"causal", "infini:segment=256", "lightning", "mla", "lightning*3,causal"})
                for (int T = 1024; T <= 131072; T *= 2) bench("gpt2-124M", pattern, "rope", 131072 / T, T, T > 32768 ? 3 : 5, tune);
        } else if (argc == 5 || argc == 6) {
            bench(argv[1], argv[2], "", atoi(argv[3]), atoi(argv[4]), argc > 5 ? atoi(argv[5]) : 40, tune);
        } else {
            usage_error("usage: bench [--tune] [lengths | decode [PRESET PATTERN TEXTS BEHIND [STEPS]] | PRESET PATTERN B T [STEPS]]");
        }
    } catch (const Error& e) {
        fprintf(stderr, "%s\n", e.what());
        return e.exit_code;
    }
    return 0;
}
