// safetensors: what parse_safetensors takes, its tensors tile exactly, and written again it is taken again and says the same.
#include <cstdlib>
#include <cstring>

#include "gpt2/safetensors.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
    SafeTensorsHeader header, again;
    std::string error;
    if (!parse_safetensors(data, size, header, error)) {
        if (error.empty() || error.find('\n') != std::string::npos) abort();
        return 0;
    }
    uint64_t end = 0;
    uint32_t sum = 0;
    std::vector<TensorToWrite> tensors;
    for (const SafeTensor& t : header.tensors) {
        if (t.begin != end || t.end < t.begin) abort();
        end = t.end;
        for (uint64_t i = t.begin; i < t.end; i++) sum += data[header.data_start + i];  // all of it can be read
        tensors.push_back({t.name, t.dtype, t.shape, [] { return nullptr; }});
        std::vector<double> numbers;
        if (t.dtype[0] != 'F' && t.dtype != "BF16") continue;
        uint64_t n = (t.end - t.begin) / (uint64_t)dtype_width(t.dtype);
        numbers.resize(n);
        read_floats(t.dtype, data + header.data_start + t.begin, n, numbers.data());
    }
    if (header.data_start + end != size) abort();
    std::string written = safetensors_header(tensors, header.metadata);
    written.append((const char*)data + header.data_start, end);
    if (!parse_safetensors((const uint8_t*)written.data(), written.size(), again, error)) abort();
    if (again.tensors.size() != header.tensors.size() || again.metadata != header.metadata) abort();
    return sum == 1 && size == 0;
}
