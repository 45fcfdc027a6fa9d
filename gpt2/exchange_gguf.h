// GGUF for llama.cpp, architecture gpt2, written only. A file is
//
//     "GGUF" | uint32 version 3 | uint64 tensors | uint64 keys | the keys with their values | the tensors' names, shapes, types and offsets | data
//
// where the data and each tensor in it begin at a multiple of 32 bytes. Shapes are written innermost first, so that (out, in) reads {in, out}.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "exchange.h"

constexpr uint32_t gguf_version = 3;
constexpr uint64_t gguf_alignment = 32;
enum GgufType : uint32_t { GGUF_UINT32 = 4, GGUF_INT32 = 5, GGUF_FLOAT32 = 6, GGUF_BOOL = 7, GGUF_STRING = 8, GGUF_ARRAY = 9 };
enum GgufToken : int32_t { GGUF_TOKEN_NORMAL = 1, GGUF_TOKEN_CONTROL = 3 };

inline uint32_t ggml_type(const std::string& dtype) { return dtype == "F32" ? 0 : dtype == "F16" ? 1 : 30 /* bf16 */; }
inline uint32_t gguf_file_type(const std::string& dtype) { return dtype == "F32" ? 0 : dtype == "F16" ? 1 : 32 /* mostly bf16 */; }

// The file before its data, as it grows.
struct GgufHeader {
    std::string bytes;
    uint64_t keys = 0;

    template <class T>
    void put(T value) {
        bytes.append((const char*)&value, sizeof value);
    }
    void put_string(const std::string& s) {
        put((uint64_t)s.size());
        bytes += s;
    }
    void key(const std::string& name, GgufType type) {
        put_string(name);
        put((uint32_t)type);
        keys++;
    }
    void add(const std::string& name, const std::string& s) {
        key(name, GGUF_STRING);
        put_string(s);
    }
    void add(const std::string& name, uint32_t n) {
        key(name, GGUF_UINT32);
        put(n);
    }
    void add(const std::string& name, float x) {
        key(name, GGUF_FLOAT32);
        put(x);
    }
    void add(const std::string& name, bool b) {
        key(name, GGUF_BOOL);
        put((uint8_t)b);
    }
    void array(const std::string& name, GgufType type, size_t n) {
        key(name, GGUF_ARRAY);
        put((uint32_t)type);
        put((uint64_t)n);
    }
    void add(const std::string& name, const std::vector<std::string>& list) {
        array(name, GGUF_STRING, list.size());
        for (const std::string& s : list) put_string(s);
    }
    void add(const std::string& name, const std::vector<int32_t>& list) {
        array(name, GGUF_INT32, list.size());
        for (int32_t n : list) put(n);
    }
    void pad() { bytes.resize((bytes.size() + gguf_alignment - 1) / gguf_alignment * gguf_alignment, '\0'); }
};

// ----------------------------------------------------------------------------
// The tokenizer

// What llama.cpp calls a gpt2 tokenizer: tokens and merges as GPT-2's files show them, a character a byte. Bytes are one without merges. Their models have seen
// every text begin with the end-of-text token; GPT-2's are used without.
inline void add_tokenizer(GgufHeader& h, const Tokenizer& t) {
    h.add("tokenizer.ggml.model", std::string(t.text ? "gpt2" : "no_vocab"));
    if (!t.text) return;
    const ByteCharacters& characters = byte_characters();
    std::vector<std::string> tokens, merges;
    for (int i = 0; i < t.vocab_size; i++) tokens.push_back(characters.shown(t.decode(i)));
    std::vector<int32_t> types(tokens.size(), GGUF_TOKEN_NORMAL);
    types[t.end_of_text] = GGUF_TOKEN_CONTROL;
    if (t.bpe)
        for (const Merge& m : t.bpe->merges) merges.push_back(tokens[m.left] + " " + tokens[m.right]);
    h.add("tokenizer.ggml.pre", std::string("gpt-2"));
    h.add("tokenizer.ggml.tokens", tokens);
    h.add("tokenizer.ggml.token_type", types);
    h.add("tokenizer.ggml.merges", merges);
    h.add("tokenizer.ggml.bos_token_id", (uint32_t)t.end_of_text);
    h.add("tokenizer.ggml.eos_token_id", (uint32_t)t.end_of_text);
    h.add("tokenizer.ggml.add_bos_token", !t.bpe);
}

// ----------------------------------------------------------------------------
// Writing

inline std::string gguf_name(const std::string& ours) {
    int layer;
    const Gpt2Name& n = gpt2_name(ours, layer);
    return (layer < 0 ? "" : format("blk.%d.", layer)) + n.gguf;
}

inline std::string gguf_header(const ModelFile& m, const std::vector<TensorToWrite>& tensors, const std::string& dtype) {
    const ModelConfig& c = m.config;
    GgufHeader h;
    h.add("general.architecture", std::string("gpt2"));
    h.add("general.alignment", (uint32_t)gguf_alignment);
    h.add("general.file_type", gguf_file_type(dtype));
    h.add("gpt2.vocab_size", (uint32_t)c.vocab_size);
    h.add("gpt2.context_length", (uint32_t)c.max_seq);
    h.add("gpt2.embedding_length", (uint32_t)c.channels);
    h.add("gpt2.feed_forward_length", (uint32_t)(4 * c.channels));
    h.add("gpt2.block_count", (uint32_t)c.layers);
    h.add("gpt2.attention.head_count", (uint32_t)c.heads);
    h.add("gpt2.attention.layer_norm_epsilon", 1e-5f);
    add_tokenizer(h, m.tokenizer);
    GgufHeader start;
    start.bytes = "GGUF";
    start.put(gguf_version);
    start.put((uint64_t)tensors.size());
    start.put(h.keys);
    start.bytes += h.bytes;
    uint64_t offset = 0;
    for (const TensorToWrite& t : tensors) {
        uint64_t bytes = 0;
        tensor_bytes(t.dtype, t.shape, bytes);
        start.put_string(t.name);
        start.put((uint32_t)t.shape.size());
        for (size_t d = t.shape.size(); d-- > 0;) start.put((uint64_t)t.shape[d]);
        start.put(ggml_type(t.dtype));
        start.put(offset);
        offset = (offset + bytes + gguf_alignment - 1) / gguf_alignment * gguf_alignment;
    }
    start.pad();
    return start.bytes;
}

// Vectors are float32 whatever the matrices are. The embedding is written a second time as the output: not every llama.cpp takes it for both by itself.
inline void write_gguf(const ModelFile& m, const std::string& out, const std::string& dtype) {
    need_gpt2(m, "llama.cpp's gpt2");
    if (!m.tokenizer.text)
        fprintf(stderr, "the file gets no tokenizer, since the model's tokens are numbers: give --tokenizer DIR, with encoder.json and vocab.bpe, for one\n");
    TensorExport from(m, dtype);
    std::vector<TensorToWrite> tensors;
    Tensors parameters = model_parameters(m.config);
    for (const TensorSpec& s : parameters.specs)
        tensors.push_back(from.tensor(s, gguf_name(s.name), s.name == "wte" ? m.config.vocab_size : -1, false, s.shape.size() == 1 ? "F32" : nullptr));
    tensors.push_back(from.tensor(parameters.specs[parameters.find("wte")], "output.weight", m.config.vocab_size));
    std::string header = gguf_header(m, tensors, dtype);
    AtomicFile file(out);
    file.write(header.data(), header.size());
    for (const TensorToWrite& t : tensors) {
        static const char zeros[gguf_alignment] = {};
        uint64_t bytes = 0;
        tensor_bytes(t.dtype, t.shape, bytes);
        file.write(t.data(), bytes);
        file.write(zeros, (gguf_alignment - bytes % gguf_alignment) % gguf_alignment);
    }
    file.commit();
}
