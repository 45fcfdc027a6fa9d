// Training steps of GPT-2 on this GPU: time, rate, utilisation, memory.
//
//     build/cuda/bench                              124M with every layer (B=64 T=1024), causal 350M (B=32) and 1558M (B=16)
//     build/cuda/bench lengths                      124M, 131072 tokens a step in sequences of 1024 to 131072: every layer and a hybrid
//     build/cuda/bench PRESET PATTERN B T [STEPS]   one line
//     build/cuda/bench --tune ...                   with cuBLASLt's algorithms timed beforehand, as in training with --tune
//
// bf16, random tokens, the whole step: forward, backward, clipping, AdamW, started as the training loop starts them (results are read a step late). Times are
// medians over STEPS steps after five to warm up, and the 10th and 90th percentile. Positions are rotary where lengths are compared (learned ones would grow
// with the length), the layer's default elsewhere. MFU: 3 forward passes' model_flops (gpt2/config.h) over the time and the GPU's highest matrix rate.
// `recompute` is the lowest level at which the model fits the GPU. Memory is what this process's GPU has in use, everything included.
#include <cuda_runtime_api.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstring>

#include "../../attention.h"
#include "../../gpt2/trainer.h"

static double seconds() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

static void bench(const std::string& preset_name, const std::string& pattern, const std::string& positions, int B, int T, int steps, bool tune) {
    const Preset* preset = std::find_if(std::begin(presets), std::end(presets), [&](const Preset& p) { return preset_name == p.name; });
    if (preset == std::end(presets)) usage_error("there is no preset '%s': gpt2-124M, gpt2-350M, gpt2-774M, gpt2-1558M", preset_name.c_str());
    ModelConfig c;
    c.layers = preset->layers;
    c.heads = preset->heads;
    c.channels = preset->channels;
    c.max_seq = T;
    c.set_vocab(preset->vocab_size);
    parse_attention(c, pattern, {}, positions);
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
    Batch batch;
    for (int i = 0; i < B * T; i++) {
        Philox r = philox(1, i, 0, 0, 0);
        batch.tokens.push_back(r.word[0] % c.vocab_size);
        batch.targets.push_back(r.word[1] % c.vocab_size);
    }
    for (int b = 0; b <= B; b++) batch.cu_seqlens.push_back(b * T);
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

int main(int argc, char** argv) {
    bool tune = argc > 1 && strcmp(argv[1], "--tune") == 0;
    if (tune) argc--, argv++;
    try {
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
            usage_error("usage: bench [--tune] [lengths | PRESET PATTERN B T [STEPS]]");
        }
    } catch (const Error& e) {
        fprintf(stderr, "%s\n", e.what());
        return e.exit_code;
    }
    return 0;
}
