// Runs a fuzz target where there is no libFuzzer, with its options and its way of naming what it finds:
//
//     build/fuzz/choices dev/fuzz/corpus/choices                                 every file once
//     build/fuzz/choices -max_total_time=600 dev/fuzz/corpus/choices             and for ten minutes changes of them
//
// An input that ends the program is written to crash-... (behind -artifact_prefix=); `build/fuzz/choices crash-...` runs it again. Inputs that reach something
// new are kept, in memory, and changed again; the target is compiled with -fsanitize-coverage=trace-pc, which calls us at every branch.
#include <dirent.h>
#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <chrono>
#include <csignal>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <iterator>
#include <random>
#include <string>
#include <vector>

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size);

static bool known[1 << 16], fresh;  // branches that were reached; whether this input reached one that none before it did
extern "C" void __sanitizer_cov_trace_pc() {
    bool& branch = known[(uintptr_t)__builtin_return_address(0) & 0xffff];
    fresh = fresh || !branch;
    branch = true;
}
extern "C" __attribute__((weak)) void __sanitizer_set_death_callback(void (*)());

using Bytes = std::vector<uint8_t>;
static Bytes current;
static std::string artifact_prefix;
static uint64_t inputs = 0;

static void keep_current() {
    std::string name = artifact_prefix + "crash-" + std::to_string(getpid()) + "-" + std::to_string(inputs);
    int fd = open(name.c_str(), O_WRONLY | O_CREAT | O_TRUNC, 0666);
    if (fd < 0 || write(fd, current.data(), current.size()) != (ssize_t)current.size() || close(fd) != 0) return;
    fprintf(stderr, "the input is in %s\n", name.c_str());
}
static void on_signal(int s) {  // an assertion that failed, or more than 20 seconds for one input
    fprintf(stderr, "signal %d\n", s);
    keep_current();
    _exit(1);
}

static bool run(const Bytes& input) {
    current = input;
    inputs++;
    fresh = false;
    alarm(20);
    Bytes exact(input.begin(), input.end());  // no byte to spare behind it
    LLVMFuzzerTestOneInput(exact.data(), exact.size());
    alarm(0);
    return fresh;
}

static void read_inputs(const std::string& path, std::vector<Bytes>& list) {
    if (DIR* d = opendir(path.c_str())) {
        while (dirent* e = readdir(d))
            if (e->d_name[0] != '.') read_inputs(path + "/" + e->d_name, list);
        closedir(d);
        return;
    }
    std::ifstream file(path, std::ios::binary);
    if (!file) {
        fprintf(stderr, "error: cannot read '%s': name corpora, or inputs\n", path.c_str());
        exit(2);
    }
    list.emplace_back(std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>());
}

static Bytes changed(const std::vector<Bytes>& corpus, std::mt19937_64& random) {
    auto below = [&](size_t n) { return n ? (size_t)(random() % n) : 0; };
    const size_t longest = 1 << 16;
    Bytes b = corpus[below(corpus.size())];
    for (size_t times = 1 + below(4); times > 0; times--) {
        size_t at = below(b.size() + 1), left = b.size() - at, n = 1 + below(below(8) ? 8 : 300);
        const Bytes& other = corpus[below(corpus.size())];
        switch (below(7)) {
            case 0:  // a bit
                if (left) b[at] = (uint8_t)(b[at] ^ 1 << below(8));
                break;
            case 1:  // a byte
                if (left) b[at] = (uint8_t)random();
                break;
            case 2:  // a number that is an edge of something
                for (int64_t v = (int64_t[]){0, 1, -1, 127, 255, 32767, 65535, INT32_MAX, INT32_MIN, INT64_MAX, INT64_MIN, (int64_t)b.size()}[below(12)];
                     left > 0 && n > 0 && at < b.size(); v >>= 8, n--)
                    b[at++] = (uint8_t)v;
                break;
            case 3:  // less
                b.erase(b.begin() + (long)at, b.begin() + (long)(at + std::min(left, n)));
                break;
            case 4:  // the same again
                b.insert(b.end(), b.begin() + (long)at, b.begin() + (long)(at + std::min(left, n)));
                break;
            case 5:  // a piece of another
                if (size_t from = below(other.size()); !other.empty()) {
                    Bytes piece(other.begin() + (long)from, other.begin() + (long)(from + std::min(other.size() - from, n)));
                    b.insert(b.begin() + (long)at, piece.begin(), piece.end());
                }
                break;
            default:  // noise
                for (; n > 0; n--) b.insert(b.begin() + (long)at, (uint8_t)random());
        }
    }
    if (b.size() > longest) b.resize(longest);
    return b;
}

int main(int argc, char** argv) {
    std::vector<Bytes> corpus;
    double seconds = 0;
    uint64_t seed = (uint64_t)time(nullptr);
    for (int i = 1; i < argc; i++) {
        std::string a = argv[i];
        auto option = [&](const char* name) { return a.rfind(name, 0) == 0 ? a.c_str() + strlen(name) : nullptr; };
        if (const char* v = option("-max_total_time="))
            seconds = atof(v);
        else if (const char* v = option("-artifact_prefix="))
            artifact_prefix = v;
        else if (const char* v = option("-seed="))
            seed = strtoull(v, nullptr, 10);
        else if (a[0] != '-')
            read_inputs(a, corpus);
    }
    for (int s : {SIGABRT, SIGALRM}) signal(s, on_signal);
    if (__sanitizer_set_death_callback) __sanitizer_set_death_callback(keep_current);
    run({});
    for (const Bytes& b : corpus) run(b);
    printf("%zu inputs of the corpus\n", corpus.size());
    if (corpus.empty()) corpus.emplace_back();
    std::mt19937_64 random(seed);
    auto end = std::chrono::steady_clock::now() + std::chrono::duration<double>(seconds);
    while (std::chrono::steady_clock::now() < end) {
        Bytes b = changed(corpus, random);
        if (run(b)) corpus.push_back(std::move(b));
    }
    printf("%llu inputs, of which %zu are kept; seed %llu\n", (unsigned long long)inputs, corpus.size(), (unsigned long long)seed);
    return 0;
}
