// ./train_gpt2 convert: a model from one program's files to another's. What the input is, its content says; weights only, each number as it is unless another
// type is asked for.
#pragma once

#include <string>

#include "exchange.h"
#include "exchange_gguf.h"
#include "exchange_hf.h"
#include "exchange_llmc.h"

// The model at `path`: a run or checkpoint of ours, a directory of transformers, or a file of llm.c.
inline ModelFile open_model(const std::string& path) {
    struct stat st;
    if (stat(path.c_str(), &st) == 0 && !S_ISDIR(st.st_mode)) {
        MappedFile file(path);
        if (is_llmc_model(file.data, file.size)) return open_llmc(path);
        if (file.size >= 4 && memcmp(file.data, "GGUF", 4) == 0) data_error("'%s' is GGUF, which is only written: name the model it was made of", path.c_str());
        data_error("'%s' is no model of llm.c: name one, or the directory of a checkpoint or of a model of transformers", path.c_str());
    }
    return is_hf(path) ? open_hf(path) : open_checkpoint(path);
}

struct Conversion {
    std::string from, to, out;
    std::string dtype;      // float32, bf16, float16; empty: as they are
    std::string tokenizer;  // as make_tokenizer() takes it; empty: the model's own
};

inline void convert(const Conversion& o) {
    if (o.from.empty()) usage_error("no model: give --checkpoint PATH, a checkpoint, a directory of transformers or a .bin of llm.c");
    if (o.to.empty()) usage_error("to what? give --to attn, hf, hf-attention, llmc or gguf");
    std::string out = o.out;
    while (out.size() > 1 && out.back() == '/') out.pop_back();
    if (out.empty()) usage_error("no output: give --out PATH, %s to write", o.to == "llmc" || o.to == "gguf" ? "a file" : "a directory");
    ModelFile m = open_model(o.from);
    if (!o.tokenizer.empty()) choose_tokenizer(m, o.tokenizer);
    if (exists(out)) data_error("'%s' is there already: move it away, or choose another --out", out.c_str());
    std::string dtype = o.dtype == "float32" ? "F32" : o.dtype == "bf16" ? "BF16" : o.dtype == "float16" ? "F16" : m.dtype;
    fprintf(stderr, "%s: %s, %d layers, %d heads, %d channels, vocabulary %d, in %s\n", m.path.c_str(), m.kind.c_str(), m.config.layers, m.config.heads,
            m.config.channels, m.config.vocab_size, torch_dtype(m.dtype));
    if (o.to == "hf")
        write_hf(m, out, dtype);
    else if (o.to == "hf-attention")
        write_hf_attention(m, out, dtype);
    else if (o.to == "llmc")
        write_llmc(m, out, dtype);
    else if (o.to == "gguf")
        write_gguf(m, out, dtype);
    else
        write_own(m, out, dtype);
    fprintf(stderr, "%s: written, in %s\n", out.c_str(), torch_dtype(dtype));
}
