// Every layer and the whole model against the reference outputs of dev/reference (PyTorch, float64, autograd).
//
//     ./test_gpt2                     all cases
//     ./test_gpt2 infini mla_ragged   the cases whose name contains one of these
//     ./test_gpt2 --list              names of the cases
//
// A case compares the loss, the logits, every gradient tensor, the losses of ten AdamW steps, and (where the case has no dropout and no carried memory)
// the logits of decoding token by token. One row a tensor; a last line `N passed, N failed`; the exit status is 1 if anything failed.
// test_gpt2 is built against the CPU trainer, in float32 or, with -DREAL=double, float64; test_gpt2cu (-DTEST_GPU) is linked with the GPU's, and runs every
// case in float32 and in bf16. The tolerances: see `Check`.
#ifdef TEST_GPU
#include "attention.h"
#include "gpt2/trainer.h"
#else
#define GPT2_NO_MAIN
#include "train_gpt2.cpp"
#endif

#include <dirent.h>

#include <algorithm>
#include <nlohmann/json.hpp>

#include "gpt2/safetensors.h"

using nlohmann::json;

#ifdef TEST_GPU
const std::vector<std::string> dtypes = {"float32", "bf16"};
#else
const std::vector<std::string> dtypes = {"float32"};
#endif

struct Check {
    int passed = 0, failed = 0;
    bool bf16 = false;
    json bf16_distance;  // of a case: how far rounding to bf16 takes PyTorch's run from the reference, by tensor (dev/reference)
    std::string in;      // the case
    std::vector<std::string> failures;

    void row(const std::string& name, const char* figures, bool ok, const std::string& limit = "") {
        printf("  %-34s %s  %s%s\n", name.c_str(), figures, ok ? "ok" : "FAIL", ok ? "" : limit.c_str());
        if (!ok) failures.push_back(in + ": " + name);
        ok ? passed++ : failed++;
    }
    // |out − ref| <= tolerance, in bf16 1 % of ref (3 % for the worst of ten steps, whose differences add up); a NaN fails every comparison below, because each
    // asks for what must hold.
    void loss(const std::string& name, double out, double ref, double tolerance) {
        if (bf16) tolerance = (tolerance > 5e-5 ? 3e-2 : 1e-2) * std::fabs(ref);
        row(name, format("%-12.7f ref %-12.7f  |Δ| %.1e", out, ref, std::fabs(out - ref)).c_str(), std::fabs(out - ref) <= tolerance,
            format(", at most %.1e", tolerance));
    }
    // float32: ‖out − ref‖ <= 1e-4·‖ref‖ + 1e-6·`all`, and cosine >= 1 − 1e-6 where ‖ref‖ > `all`/1000. `all`: the norm of all gradients together; 0 for none.
    // bf16: ‖out − ref‖ <= r·‖ref‖ + 1e-4·`all`, r the larger of 2e-2 and 1.2 times PyTorch's distance in bf16 (`stored`: the tensor's name in the file).
    void tensor(const std::string& name, const std::string& stored, const std::vector<float>& out, const std::vector<float>& ref, double all) {
        double difference = 0, norm = 0, other = 0, product = 0;
        for (size_t i = 0; i < ref.size(); i++) {
            double a = out[i], b = ref[i];
            difference += (a - b) * (a - b);
            norm += b * b;
            other += a * a;
            product += a * b;
        }
        difference = std::sqrt(difference);
        norm = std::sqrt(norm);
        other = std::sqrt(other);
        bool significant = norm > all / 1000 && norm > 0;
        double cosine = significant ? product / (norm * other) : 1;
        double limit = 1e-4 * norm + 1e-6 * all;
        if (bf16) limit = std::max(2e-2, 1.2 * bf16_distance.value(stored, 0.0)) * norm + 1e-4 * all;
        bool close = difference <= limit && (bf16 || cosine >= 1 - 1e-6);
        row(name, format("‖ref‖ %-9.3g ‖Δ‖/‖ref‖ %-8.1e cosine 1-%-7.1e", norm, norm > 0 ? difference / norm : difference, 1 - cosine).c_str(),
            close && out.size() == ref.size(),
            format(", ‖Δ‖/‖ref‖ at most %.1e%s", norm > 0 ? limit / norm : limit, bf16 ? "" : ", cosine at least 1-1.0e-06"));
    }
};

static double norm_of(const std::vector<std::vector<float>>& tensors) {
    double sum = 0;
    for (const auto& t : tensors)
        for (float x : t) sum += (double)x * x;
    return std::sqrt(sum);
}

struct Case {
    SafeTensorsFile file;
    ModelConfig config;
    json run;
    int chunks;
    int64_t N;
    std::vector<Batch> batch;  // one a chunk

    explicit Case(const std::string& path) : file(path) {
        json c = json::parse(file.header.metadata.at("config"));
        run = json::parse(file.header.metadata.at("run"));
        config.set_vocab(c["vocab_size"]);
        config.max_seq = c["max_seq"];
        config.layers = c["layers"];
        config.heads = c["heads"];
        config.channels = c["channels"];
        std::string pattern;
        for (const std::string entry : c["attention"]) pattern += (pattern.empty() ? "" : ",") + entry;
        parse_attention(config, pattern, {}, c["positions"]);

        std::vector<int64_t> shape = file.find("tokens")->shape;
        chunks = (int)shape[0];
        N = shape[1];
        std::vector<int> tokens(chunks * N), targets(chunks * N), offsets(file.find("cu_seqlens")->shape[0]);
        file.copy("tokens", shape, tokens.data());
        file.copy("targets", shape, targets.data());
        file.copy("cu_seqlens", {(int64_t)offsets.size()}, offsets.data());
        for (int k = 0; k < chunks; k++) {
            Batch b;
            b.tokens.assign(tokens.begin() + k * N, tokens.begin() + (k + 1) * N);
            b.targets.assign(targets.begin() + k * N, targets.begin() + (k + 1) * N);
            b.cu_seqlens = offsets;
            for (int s = 0; s < b.num_seqs() && carry(); s++) {
                b.memory_from.push_back(k > 0 ? s : -1);
                b.memory_to.push_back(s);
            }
            batch.push_back(b);
        }
    }
    bool carry() const { return run["carry_memory"]; }

    TrainerOptions options() const {
        TrainerOptions o;
        o.max_tokens = N;
        o.lanes = carry() ? batch[0].num_seqs() : 0;
        return o;
    }
    std::vector<float> tensor(const std::string& name) const {
        const SafeTensor* t = file.find(name);
        if (!t) data_error("%s has no tensor %s", file.file->path.c_str(), name.c_str());
        int64_t n = 1;
        for (int64_t d : t->shape) n *= d;
        std::vector<float> x(n);
        file.copy(name, t->shape, x.data());
        return x;
    }
    Pass pass(int step) const {
        Pass p;
        p.training = true;
        p.grad_scale = 1.0 / chunks;
        p.dropout = run["dropout"];
        p.seed = run["seed"];
        p.step = (uint32_t)step;
        return p;
    }
};

// Loss, logits and gradients of the first step, then the losses of ten.
static void test_training(const Case& c, Trainer& model, Check& check) {
    const Tensors& list = model.parameters();
    int64_t V = c.config.vocab_size;
    std::vector<float> loss_ref = c.tensor("loss"), logits_ref = c.tensor("logits"), logits(c.chunks * c.N * V);
    std::vector<double> losses_ref(10), losses(10);
    c.file.copy("losses", {10}, losses_ref.data());
    for (int step = 0; step < 10; step++) {
        for (int k = 0; k < c.chunks; k++) {
            double loss = model.forward(c.batch[k], c.pass(step * c.chunks + k), nullptr, step == 0 ? &logits[k * c.N * V] : nullptr);
            model.backward();
            losses[step] += loss / c.chunks;
            if (step == 0) check.loss(c.chunks > 1 ? format("loss, chunk %d", k) : "loss", loss, loss_ref[k], 1e-5);
        }
        if (step == 0) {
            check.tensor("logits", "logits", logits, logits_ref, 0);
            std::vector<std::vector<float>> grads, refs;
            for (size_t i = 0; i < list.specs.size(); i++) {
                grads.emplace_back(list.specs[i].size());
                model.get(Section::GRADIENTS, (int)i, grads.back().data());
                refs.push_back(c.tensor("grad." + list.specs[i].name));
            }
            for (size_t i = 0; i < list.specs.size(); i++)
                check.tensor("d " + list.specs[i].name, "grad." + list.specs[i].name, grads[i], refs[i], norm_of(refs));
        }
        const json& r = c.run;
        model.update({r["lr"], r["beta1"], r["beta2"], r["eps"], r["weight_decay"], r["grad_clip"], step + 1});
    }
    double worst = 0;
    int at = 0;
    for (int step = 0; step < 10; step++) {
        double d = std::fabs(losses[step] - losses_ref[step]);
        if (!(d <= worst) && !std::isnan(worst)) worst = d, at = step;  // NaN stays
    }
    check.loss(format("10 AdamW steps, worst loss (%d)", at + 1), losses[at], losses_ref[at], 1e-4);
}

// The same logits when the sequences are extended token by token, all in one packed batch, as when they are seen at once.
static void test_decode(const Case& c, Trainer& model, Check& check) {
    const Batch& whole = c.batch[0];
    int64_t V = c.config.vocab_size;
    int S = whole.num_seqs(), longest = 0;
    std::vector<int> sequences;
    for (int s = 0; s < S; s++) {
        sequences.push_back(model.new_sequence());
        longest = std::max(longest, whole.cu_seqlens[s + 1] - whole.cu_seqlens[s]);
    }
    std::vector<float> out(c.N * V, NAN), last(S * V);
    for (int t = 0; t < longest; t++) {
        Batch b;
        b.cu_seqlens = {0};
        for (int s = 0; s < S; s++) {
            if (whole.cu_seqlens[s] + t < whole.cu_seqlens[s + 1]) b.tokens.push_back(whole.tokens[whole.cu_seqlens[s] + t]);
            b.cu_seqlens.push_back((int)b.tokens.size());
        }
        model.extend(b, sequences, last.data());
        for (int s = 0; s < S; s++)
            if (b.cu_seqlens[s + 1] > b.cu_seqlens[s]) std::copy_n(&last[s * V], V, &out[(whole.cu_seqlens[s] + t) * V]);
    }
    for (int s : sequences) model.free_sequence(s);
    check.tensor("logits, decoded token by token", "logits", out, c.tensor("logits"), 0);
}

static void test_case(const std::string& path, const std::string& name, const std::string& dtype, Check& check) {
    Case c(path);
    printf("%s%s\n", name.c_str(), dtypes.size() > 1 ? (", " + dtype).c_str() : "");
    check.bf16 = dtype == "bf16";
    check.bf16_distance = json::parse(c.file.header.metadata.at("bf16"));
    TrainerOptions options = c.options();
    options.dtype = dtype;
    std::unique_ptr<Trainer> model = make_trainer(c.config, options);
    const Tensors& list = model->parameters();
    int stored = 0;
    for (const SafeTensor& t : c.file.header.tensors) stored += t.name.compare(0, 6, "param.") == 0;
    check.row("tensors of the model", format("%zu, in the file %d", list.specs.size(), stored).c_str(), stored == (int)list.specs.size());
    for (size_t i = 0; i < list.specs.size(); i++) {
        std::vector<float> p(list.specs[i].size());
        c.file.copy("param." + list.specs[i].name, list.specs[i].shape, p.data());
        model->set(Section::PARAMETERS, (int)i, p.data());
    }
    if (!c.carry() && c.run["dropout"] == 0.0) test_decode(c, *model, check);
    test_training(c, *model, check);
}

int main(int argc, char** argv) {
    const std::string directory = "dev/reference/outputs";
    std::vector<std::string> names;
    if (DIR* d = opendir(directory.c_str())) {
        while (dirent* e = readdir(d)) {
            std::string name = e->d_name;
            size_t dot = name.find(".safetensors");
            if (dot != std::string::npos) names.push_back(name.substr(0, dot));
        }
        closedir(d);
    }
    std::sort(names.begin(), names.end());
    if (argc > 1 && argv[1][0] == '-' && std::string(argv[1]) != "--list") {
        fprintf(stderr, "usage: %s [--list] [NAME...]: the cases whose name contains one of NAME, or all\n", argv[0]);
        return EXIT_USAGE;
    }
    if (names.empty()) {
        fprintf(stderr, "no reference outputs in %s: run this in the repository's root\n", directory.c_str());
        return EXIT_DATA;
    }
    Check check;
    int cases = 0;
    for (const std::string& name : names) {
        bool wanted = argc < 2;
        for (int i = 1; i < argc; i++) wanted = wanted || name.find(argv[i]) != std::string::npos;
        if (argc == 2 && std::string(argv[1]) == "--list") {
            printf("%s\n", name.c_str());
            continue;
        }
        if (!wanted) continue;
        cases++;
        check.in = name;
        for (const std::string& dtype : dtypes) try {
                test_case(directory + "/" + name + ".safetensors", name, dtype, check);
            } catch (const std::exception& e) {
                check.row(name, e.what(), false);
            }
    }
    if (argc == 2 && std::string(argv[1]) == "--list") return 0;
    if (cases == 0) {
        fprintf(stderr, "no case's name contains '%s': %s --list names them\n", argv[1], argv[0]);
        return EXIT_USAGE;
    }
#ifdef TEST_GPU
    const char* numbers = "float32 and bf16 on the GPU";
#else
    const char* numbers = sizeof(real) == 8 ? "float64" : "float32";
#endif
    check.in = "references";
    for (const AttentionDescription& d : attention_descriptions())
        if (argc < 2 && std::none_of(names.begin(), names.end(), [&](const std::string& name) { return name.rfind(std::string(d.name) + "_", 0) == 0; }))
            check.row(d.name, format("no case in %s: make references writes them", directory.c_str()).c_str(), false);
    for (const std::string& failure : check.failures) printf("failed: %s\n", failure.c_str());
    printf("%d cases, %s\n%d passed, %d failed\n", cases, numbers, check.passed, check.failed);
    return check.failed ? 1 : 0;
}
