// llm.c's model file: 256 int32 (magic, version, longest sequence, V, layers, heads, channels, padded V), then GPT-2's tensors, each of all layers before the
// next. Version 3 is float32, version 5 bf16 throughout, norms included. Weights are (out, in) as ours.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "exchange.h"

constexpr int32_t llmc_magic = 20240326, llmc_float32 = 3, llmc_bf16 = 5;
constexpr uint64_t llmc_header_bytes = 1024;

struct LlmcModel {
    ModelConfig config;
    std::string dtype;
    int64_t rows = 0;                         // of its embedding: V and padding
    std::map<std::string, uint64_t> offsets;  // our name -> the tensor's first byte in the file
};

// The tensors in the order of the file, by our names.
template <class F>
void for_llmc_tensors(const ModelConfig& c, F f) {
    f(gpt2_outer_names[0].ours);
    f(gpt2_outer_names[1].ours);
    for (const Gpt2Name& n : gpt2_layer_names)
        for (int l = 0; l < c.layers; l++) f(format("h.%d.", l) + n.ours);
    f(gpt2_outer_names[2].ours);
    f(gpt2_outer_names[3].ours);
}

inline bool is_llmc_model(const uint8_t* bytes, size_t size) { return size >= 4 && load<int32_t>(bytes) == llmc_magic; }

inline bool parse_llmc_model(const uint8_t* bytes, size_t size, LlmcModel& out, std::string& error) {
    out = LlmcModel();
    if (!is_llmc_model(bytes, size)) return refuse(error, "it does not start with the magic number of llm.c's models");
    if (size < llmc_header_bytes) return refuse(error, "it has " + std::to_string(size) + " bytes, less than its header of 1024: it is cut short");
    int32_t h[8];
    memcpy(h, bytes, sizeof h);
    if (h[1] != llmc_float32 && h[1] != llmc_bf16) return refuse(error, "its version is " + std::to_string(h[1]) + ", known are 3 (float32) and 5 (bf16)");
    out.dtype = h[1] == llmc_float32 ? "F32" : "BF16";
    // Before lists are made whose length it says.
    uint64_t width = (uint64_t)dtype_width(out.dtype), channels = (uint64_t)std::max(h[6], 1), layer = (12 * channels + 13) * channels * width;
    if (h[4] > 0 && (uint64_t)h[4] > size / layer) return refuse(error, "its header claims " + std::to_string(h[4]) + " layers: it is cut short");
    if (!gpt2_model(h[3], h[2], h[4], h[5], h[6], out.config, error)) return false;
    if (h[7] < h[3] || h[7] > 1 << 25)
        return refuse(error, "its vocabulary of " + std::to_string(h[3]) + " is padded to " + std::to_string(h[7]) + " rows: that cannot be");
    out.rows = h[7];
    std::map<std::string, uint64_t> numbers;
    for (const TensorSpec& s : model_parameters(out.config).specs) numbers[s.name] = (uint64_t)s.size();
    numbers["wte"] = (uint64_t)out.rows * channels;
    uint64_t position = llmc_header_bytes;
    bool fits = true;
    for_llmc_tensors(out.config, [&](const std::string& name) {
        uint64_t bytes, n = numbers.at(name);
        out.offsets[name] = position;
        fits = fits && checked_mul(n, width, bytes) && checked_add(position, bytes, position);
    });
    if (!fits || position != size)
        return refuse(error, "its header claims a model of " + (fits ? std::to_string(position) : "too many") + " bytes; it has " + std::to_string(size) +
                                 (position > size ? ": it is cut short" : ""));
    return true;
}

inline ModelFile open_llmc(const std::string& path) {
    auto file = std::make_shared<MappedFile>(path);
    LlmcModel parsed;
    std::string error;
    if (!parse_llmc_model(file->data, file->size, parsed, error)) data_error("'%s' cannot be used: %s; name another file", path.c_str(), error.c_str());
    ModelFile m;
    m.path = path;
    m.kind = "a model of llm.c";
    m.config = parsed.config;
    m.dtype = parsed.dtype;
    set_imported_state(m, make_tokenizer(ids_tokenizer_name(m.config.vocab_size, -1)));
    m.read = [file, parsed](const TensorSpec& s, float* to) {
        int64_t n = s.size();
        if (s.name == "wte") {  // its padding may be another
            std::fill(to, to + n, 0.0f);
            n = (int64_t)parsed.config.vocab_size * parsed.config.channels;
        }
        read_floats(parsed.dtype, file->data + parsed.offsets.at(s.name), (uint64_t)n, to);
    };
    return m;
}

inline void write_llmc(const ModelFile& m, const std::string& out, const std::string& dtype) {
    need_gpt2(m, "llm.c");
    if (dtype == "F16") usage_error("llm.c has no float16 models: choose --dtype float32 or bf16");
    const ModelConfig& c = m.config;
    std::vector<int32_t> header(llmc_header_bytes / 4);
    const int32_t words[8] = {llmc_magic,         dtype == "F32" ? llmc_float32 : llmc_bf16, c.max_seq, c.vocab_size, c.layers, c.heads, c.channels,
                              c.padded_vocab_size};
    std::copy(words, words + 8, header.begin());
    Tensors parameters = model_parameters(c);
    TensorExport from(m, dtype);
    AtomicFile file(out);
    file.write(header.data(), llmc_header_bytes);
    for_llmc_tensors(c, [&](const std::string& name) {
        const TensorSpec& s = parameters.specs[parameters.find(name.c_str())];
        file.write(from.tensor(s, name).data(), (uint64_t)(s.size() * dtype_width(dtype)));
    });
    file.commit();
}
