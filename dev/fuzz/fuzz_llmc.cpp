// llm.c's models: what parse_llmc_model takes is all there, tensor behind tensor.
#include <cstdlib>

#include "attention.h"
#include "gpt2/exchange_llmc.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
    LlmcModel model;
    std::string error;
    if (!parse_llmc_model(data, size, model, error)) {
        if (error.empty() || error.find('\n') != std::string::npos) abort();
        return 0;
    }
    uint64_t width = (uint64_t)dtype_width(model.dtype), read = llmc_header_bytes;
    for (const TensorSpec& s : model_parameters(model.config).specs) {
        uint64_t n = (uint64_t)(s.name == "wte" ? model.rows * model.config.channels : s.size());
        std::vector<float> values(n);
        read_floats(model.dtype, data + model.offsets.at(s.name), n, values.data());
        read += n * width;
    }
    if (read != size) abort();
    return 0;
}
