// Every input of dev/fuzz/corpus through its fuzz target, which ends the program where something is wrong. All targets in one program, compiled at once.
#define LLVMFuzzerTestOneInput fuzz_choices
#include "../fuzz/fuzz_choices.cpp"
#undef LLVMFuzzerTestOneInput
#define LLVMFuzzerTestOneInput fuzz_config
#include "../fuzz/fuzz_config.cpp"
#undef LLVMFuzzerTestOneInput
#define LLVMFuzzerTestOneInput fuzz_shard
#include "../fuzz/fuzz_shard.cpp"
#undef LLVMFuzzerTestOneInput
#define LLVMFuzzerTestOneInput fuzz_tokenizer
#include "../fuzz/fuzz_tokenizer.cpp"
#undef LLVMFuzzerTestOneInput
#define LLVMFuzzerTestOneInput fuzz_hf
#include "../fuzz/fuzz_hf.cpp"
#undef LLVMFuzzerTestOneInput
#define LLVMFuzzerTestOneInput fuzz_llmc
#include "../fuzz/fuzz_llmc.cpp"
#undef LLVMFuzzerTestOneInput
#define LLVMFuzzerTestOneInput fuzz_safetensors
#include "../fuzz/fuzz_safetensors.cpp"
#undef LLVMFuzzerTestOneInput

#include <cstdio>
#include <filesystem>
#include <fstream>
#include <iterator>

static const struct {
    const char* name;
    int (*run)(const uint8_t* data, size_t size);
} targets[] = {{"choices", fuzz_choices}, {"config", fuzz_config},          {"shard", fuzz_shard}, {"tokenizer", fuzz_tokenizer}, {"hf", fuzz_hf},
               {"llmc", fuzz_llmc},       {"safetensors", fuzz_safetensors}};

// A corpus without a target is one that was forgotten here.
int main() {
    int passed = 0, failed = 0;
    for (const auto& directory : std::filesystem::directory_iterator("dev/fuzz/corpus")) {
        int inputs = 0;
        for (const auto& target : targets) {
            if (directory.path().filename() != target.name) continue;
            for (const auto& entry : std::filesystem::directory_iterator(directory)) {
                std::ifstream file(entry.path(), std::ios::binary);
                std::vector<uint8_t> input{std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>()};
                printf("%s\n", entry.path().c_str());  // the last line, if it is the one
                fflush(stdout);
                target.run(input.data(), input.size());
                inputs++;
            }
        }
        if (inputs == 0) printf("FAIL  %s: no target, or no input\n", directory.path().c_str());
        inputs ? passed += inputs : failed++;
    }
    printf("%d passed, %d failed\n", passed, failed);
    return failed != 0;
}
