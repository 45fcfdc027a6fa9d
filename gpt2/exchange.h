// A model in a file, whoever wrote it: this program, transformers (exchange_hf.h) or llm.c (exchange_llmc.h). What it is is told by its content. Its tensors
// are read one at a time, under the names and in the shapes of our parameter list; numbers pass through float32, which holds each of F32, BF16 and F16
// exactly, so that a model read and written in the same type is the same bit for bit.
#pragma once

#include <algorithm>
#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "checkpoint.h"
#include "config.h"
#include "error.h"
#include "files.h"
#include "safetensors.h"

struct ModelFile {
    std::string path, kind;  // as messages name them
    ModelConfig config;
    RunState state;       // a checkpoint's; of another program's model: step 0
    Tokenizer tokenizer;  // of another program's model that has none with it: `ids`
    std::string dtype;    // of all its tensors; F32 if they differ
    std::function<void(const TensorSpec&, float*)> read;
};

inline void load_weights(const ModelFile& m, Trainer& trainer) {
    std::vector<float> buffer;
    const std::vector<TensorSpec>& specs = trainer.parameters().specs;
    for (size_t i = 0; i < specs.size(); i++) {
        buffer.resize((size_t)specs[i].size());
        m.read(specs[i], buffer.data());
        trainer.set(Section::PARAMETERS, (int)i, buffer.data());
    }
}

// The type of all tensors that were seen: F32, BF16 or F16; F32, which holds the others, if they differ.
struct CommonType {
    std::string dtype;
    void see(const SafeTensor& t, const std::string& path) {
        if (t.dtype != "F32" && t.dtype != "BF16" && t.dtype != "F16")
            data_error("tensor %s of '%s' has dtype %s: F32, BF16 or F16 is needed; convert it", printable(t.name).c_str(), path.c_str(), t.dtype.c_str());
        dtype = dtype.empty() || dtype == t.dtype ? t.dtype : "F32";
    }
};

// ----------------------------------------------------------------------------
// Our own checkpoints

inline ModelFile open_checkpoint(const std::string& path) {
    std::string directory = find_checkpoint(path);
    SafeTensorsFile file(directory + "/model.safetensors");
    ModelFile m;
    m.path = directory;
    m.kind = "a checkpoint of attn.cpp";
    m.state = read_state(directory);
    m.config = model_from_json(m.state.model, directory + "/state.json");
    m.tokenizer = tokenizer_of(m.state, directory + "/state.json");
    if (m.config.vocab_size != m.tokenizer.vocab_size)
        data_error("'%s': the model's vocabulary of %d is not the tokenizer's; take another checkpoint", directory.c_str(), m.config.vocab_size);
    Tensors parameters = model_parameters(m.config);
    CommonType type;
    expect_tensors(file, parameters.specs.size());
    for (const TensorSpec& s : parameters.specs) {
        const SafeTensor& t = file.tensor(s.name, s.shape);
        if (s.storage == Storage::WORKING) type.see(t, file.file->path);  // the others are float32 in every model
    }
    m.dtype = type.dtype;
    m.read = [file](const TensorSpec& s, float* to) { file.copy(s.name, s.shape, to); };
    return m;
}

// ----------------------------------------------------------------------------
// GPT-2 as others know it

// One table for everybody: our name, transformers' (and whether it stores the transpose, (in, out)), llama.cpp's. Within a layer and without, the order is
// that of llm.c's files.
struct Gpt2Name {
    const char *ours, *hf;
    bool transposed;
    const char* gguf;
};
constexpr Gpt2Name gpt2_outer_names[] = {
    {"wte", "wte.weight", false, "token_embd.weight"},
    {"wpe", "wpe.weight", false, "position_embd.weight"},
    {"lnf.w", "ln_f.weight", false, "output_norm.weight"},
    {"lnf.b", "ln_f.bias", false, "output_norm.bias"},
};
constexpr Gpt2Name gpt2_layer_names[] = {
    {"ln1.w", "ln_1.weight", false, "attn_norm.weight"},
    {"ln1.b", "ln_1.bias", false, "attn_norm.bias"},
    {"attn.wqkv", "attn.c_attn.weight", true, "attn_qkv.weight"},
    {"attn.bqkv", "attn.c_attn.bias", false, "attn_qkv.bias"},
    {"attn.wo", "attn.c_proj.weight", true, "attn_output.weight"},
    {"attn.bo", "attn.c_proj.bias", false, "attn_output.bias"},
    {"ln2.w", "ln_2.weight", false, "ffn_norm.weight"},
    {"ln2.b", "ln_2.bias", false, "ffn_norm.bias"},
    {"mlp.wfc", "mlp.c_fc.weight", true, "ffn_up.weight"},
    {"mlp.bfc", "mlp.c_fc.bias", false, "ffn_up.bias"},
    {"mlp.wproj", "mlp.c_proj.weight", true, "ffn_down.weight"},
    {"mlp.bproj", "mlp.c_proj.bias", false, "ffn_down.bias"},
};

// `h.3.attn.wqkv`: the entry of the table, and the layer (-1: none).
inline const Gpt2Name& gpt2_name(const std::string& ours, int& layer) {
    layer = -1;
    for (const Gpt2Name& n : gpt2_outer_names)
        if (ours == n.ours) return n;
    size_t dot = ours.find('.', 2);
    layer = atoi(ours.c_str() + 2);
    for (const Gpt2Name& n : gpt2_layer_names)
        if (ours.compare(dot + 1, std::string::npos, n.ours) == 0) return n;
    assert(false);
    abort();
}

// A model of GPT-2's shape that has no checkpoint of ours. False if there is none of these numbers.
inline bool gpt2_model(int64_t vocab, int64_t max_seq, int64_t layers, int64_t heads, int64_t channels, ModelConfig& c, std::string& error) {
    struct {
        const char* what;
        int64_t value, max;
    } limits[] = {{"tokens in the vocabulary", vocab, 1 << 24},
                  {"positions", max_seq, 1 << 24},
                  {"layers", layers, 1000},
                  {"heads", heads, 1024},
                  {"channels", channels, 65536}};
    for (const auto& l : limits)
        if (l.value < 1 || l.value > l.max)
            return refuse(error, "it has " + std::to_string(l.value) + " " + l.what + ", possible are 1 to " + std::to_string(l.max));
    if (channels % heads) return refuse(error, std::to_string(heads) + " heads do not divide its " + std::to_string(channels) + " channels");
    c = ModelConfig();
    c.set_vocab((int)vocab);
    c.max_seq = (int)max_seq;
    c.layers = (int)layers;
    c.heads = (int)heads;
    c.channels = (int)channels;
    parse_attention(c, "causal", {}, "learned");
    return true;
}

// What distinguishes a model from GPT-2, in words; empty: nothing does.
inline std::string unlike_gpt2(const ModelConfig& c) {
    if (c.positions != Positions::LEARNED) return format("its positions are '%s', GPT-2's are learned", positions_names[(int)c.positions]);
    ModelConfig plain = c;
    parse_attention(plain, "causal", {}, "learned");
    for (int l = 0; l < c.layers; l++) {
        const AttentionConfig& a = c.attention[l];
        if (a.name != "causal") return format("layer %d is %s attention, GPT-2's is causal", l, a.name.c_str());
        for (const auto& [option, value] : a.options)
            if (value != plain.attention[l].number(option.c_str()))
                return format("layer %d has %s=%g, GPT-2 has %g", l, option.c_str(), value, plain.attention[l].number(option.c_str()));
    }
    return "";
}
inline void need_gpt2(const ModelFile& m, const char* to) {
    std::string why = unlike_gpt2(m.config);
    if (!why.empty())
        data_error("'%s' cannot become a model of %s: %s; convert a model of causal layers with learned positions", m.path.c_str(), to, why.c_str());
}

// The state of a model that no run of ours has left: nothing was trained.
inline void set_imported_state(ModelFile& m, const Tokenizer& tokenizer) {
    m.tokenizer = tokenizer;
    m.state = RunState();
    m.state.seq = m.config.max_seq;
    m.state.model = model_json(m.config);
    m.state.set_tokenizer(tokenizer);
}

// The tokenizer that was asked for, if it can be the model's: the one it has, or for a model whose tokens are known by their numbers one that knows as many.
inline void choose_tokenizer(ModelFile& m, const std::string& name) {
    Tokenizer t = make_tokenizer(name);
    if (t.vocab_size != m.config.vocab_size)
        usage_error("--tokenizer %s has %d tokens, '%s' has %d: give the model's own", name.c_str(), t.vocab_size, m.path.c_str(), m.config.vocab_size);
    if (m.tokenizer.text && t.identity() != m.tokenizer.identity())
        usage_error("--tokenizer %s contradicts '%s', which has %s: leave it out", name.c_str(), m.path.c_str(), m.tokenizer.name.c_str());
    m.tokenizer = t;
    m.state.set_tokenizer(t);
}

// ----------------------------------------------------------------------------
// Writing

// Makes the tensors of a model as a file wants them, one at a time.
class TensorExport {
    const ModelFile& model;
    std::string dtype;
    std::vector<float> values, turned;
    std::vector<uint16_t> narrow;

    const void* narrowed(const TensorSpec& spec, const std::vector<float>& from, size_t n, const std::string& type) {
        if (type == "F32") return from.data();
        narrow.resize(n);
        for (size_t i = 0; i < n; i++) {
            narrow[i] = type == "BF16" ? float_to_bf16(from[i]) : float_to_half(from[i]);
            if (type == "F16" && (narrow[i] & 0x7fff) == 0x7c00 && std::isfinite(from[i]))
                data_error("tensor %s of '%s' holds %g, beyond float16: choose --dtype bf16 or float32", spec.name.c_str(), model.path.c_str(), from[i]);
        }
        return narrow.data();
    }

 public:
    TensorExport(const ModelFile& model, const std::string& dtype) : model(model), dtype(dtype) {}

    // All of it, its first `rows` rows (-1: all), in the model's type unless another is named; or its transpose; or its rows in another order: row i of the
    // result is row order(i).
    TensorToWrite tensor(const TensorSpec& spec, const std::string& name, int64_t rows = -1, bool transposed = false, const char* type = nullptr,
                         std::function<int64_t(int64_t)> order = nullptr) {
        std::vector<int64_t> shape = spec.shape;
        if (rows >= 0) shape[0] = rows;
        if (transposed) std::swap(shape[0], shape[1]);
        std::string stored = type ? type : dtype;
        return {name, stored, shape, [this, spec, shape, stored, transposed, order]() -> const void* {
                    size_t n = 1;
                    for (int64_t d : shape) n *= (size_t)d;
                    values.resize((size_t)spec.size());
                    model.read(spec, values.data());
                    if (!transposed && !order) return narrowed(spec, values, n, stored);
                    turned.resize(n);
                    int64_t R = shape[0], C = shape.size() > 1 ? shape[1] : 1;
                    for (int64_t r = 0; r < R; r++)
                        for (int64_t c = 0; c < C; c++) turned[r * C + c] = transposed ? values[c * R + r] : values[order(r) * C + c];
                    return narrowed(spec, turned, n, stored);
                }};
    }
};

// Writes a checkpoint of ours that can be evaluated, generated from and trained on (--init-from): no optimiser's state belongs to it.
inline void write_own(const ModelFile& m, const std::string& out, const std::string& dtype) {
    TensorExport from(m, dtype);
    std::vector<TensorToWrite> tensors;
    for (const TensorSpec& s : model_parameters(m.config).specs)
        tensors.push_back(from.tensor(s, s.name, -1, false, s.storage == Storage::FLOAT32 ? "F32" : nullptr));
    NewDirectory directory(out);
    write_safetensors(directory.file("model.safetensors"), tensors, {{"format", "attn.cpp"}});
    write_state(directory, m.state);
    directory.commit();
}
