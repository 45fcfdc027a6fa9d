// config.json and the index of transformers' GPT-2: the first byte says which.
#include <cstdlib>

#include "attention.h"
#include "gpt2/exchange_hf.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
    if (size == 0) return 0;
    ModelConfig config;
    int64_t end_of_text = 0;
    std::map<std::string, std::string> files;
    std::string error;
    bool index = data[0] == 'i',
         good = index ? parse_hf_index(data + 1, size - 1, files, error) : parse_hf_config(data + 1, size - 1, config, end_of_text, error);
    if (!good) {
        if (error.empty() || error.find('\n') != std::string::npos) abort();
        return 0;
    }
    for (const auto& [tensor, file] : files) {
        if (file.empty() || file.find('/') != std::string::npos || file[0] == '.') abort();
        if (is_mask_buffer(without_prefix(tensor)) && tensor.find(".attn.") == std::string::npos) abort();
    }
    if (!index && (config.channels % config.heads || (int)config.attention.size() != config.layers || end_of_text >= config.vocab_size || end_of_text < -1))
        abort();
    if (!index && !unlike_gpt2(config).empty()) abort();
    return 0;
}
