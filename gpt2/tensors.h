// One list of tensors. A parameter is described once, and everything iterates that list: allocation, initialisation, AdamW, checkpoints, tests and the
// table that `info` prints. Activations are lists of the same kind. Tensors are found by name, never by index.
#pragma once

#include <cassert>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <new>
#include <string>
#include <vector>

enum class Storage { WORKING, FLOAT32 };  // the working type (float; bf16 on a GPU) or always float32 (statistics, memories, gates)

struct TensorSpec {
    std::string name;
    std::vector<int64_t> shape;
    Storage storage = Storage::WORKING;
    bool decay = false;     // AdamW's weight decay: matrices only
    double init_value = 0;  // every element starts at init_value + init_std * normal
    double init_std = 0;
    double lr_multiplier = 1;  // times the schedule's learning rate

    int64_t size() const {
        int64_t n = 1;
        for (int64_t d : shape) n *= d;
        return n;
    }
};

inline TensorSpec matrix_spec(const std::string& name, int64_t rows, int64_t columns, double std) {
    TensorSpec s;
    s.name = name;
    s.shape = {rows, columns};
    s.decay = true;
    s.init_std = std;
    return s;
}
inline TensorSpec vector_spec(const std::string& name, int64_t size, double value) {
    TensorSpec s;
    s.name = name;
    s.shape = {size};
    s.init_value = value;
    return s;
}
// Something saved or scratch: no initial value.
inline TensorSpec buffer_spec(const std::string& name, std::vector<int64_t> shape, Storage storage = Storage::WORKING) {
    TensorSpec s;
    s.name = name;
    s.shape = std::move(shape);
    s.storage = storage;
    return s;
}

// A pointer whose type is said where it is used: `const real* w = parameters["wqkv"];`
struct AnyPointer {
    void* p;
    template <class T>
    operator T*() const {
        return (T*)p;
    }
};

// A list of tensors and, once an Arena has bound them, where their data stands.
struct Tensors {
    std::vector<TensorSpec> specs;
    std::vector<void*> data;

    int find(const char* name) const {
        for (size_t i = 0; i < specs.size(); i++)
            if (specs[i].name == name) return (int)i;
        return -1;
    }
    AnyPointer operator[](const char* name) const {
        int i = find(name);
        if (i < 0) {
            fprintf(stderr, "no tensor is named '%s'\n", name);
            abort();
        }
        return {data[i]};
    }
    // Those whose name starts with `prefix`, under the rest of their name: part("h.3.attn.")["wqkv"].
    Tensors part(const std::string& prefix) const {
        Tensors t;
        for (size_t i = 0; i < specs.size(); i++) {
            if (specs[i].name.compare(0, prefix.size(), prefix) != 0) continue;
            t.specs.push_back(specs[i]);
            t.specs.back().name.erase(0, prefix.size());
            if (!data.empty()) t.data.push_back(data[i]);
        }
        return t;
    }
    void add(const std::string& prefix, std::vector<TensorSpec> more) {
        for (TensorSpec& s : more) {
            s.name = prefix + s.name;
            specs.push_back(std::move(s));
        }
    }
    int64_t size() const {
        int64_t n = 0;
        for (const TensorSpec& s : specs) n += s.size();
        return n;
    }
};

// Host memory for a list of tensors whose elements have `element` bytes: one block, each tensor on a 64-byte boundary.
// Compiled with -DARENA_DEBUG each tensor is allocated apart and filled with NaN, so that sanitizers see overruns between neighbours, and tests see
// what was never written; otherwise the block starts as zeros.
struct Arena {
    std::vector<void*> blocks;
    size_t bytes = 0;
    bool plan_only = false;  // count the bytes, allocate nothing

    Arena() = default;
    Arena(const Arena&) = delete;
    Arena& operator=(const Arena&) = delete;
    ~Arena() { release(); }

    void release() {
        for (void* b : blocks) free(b);
        blocks.clear();
        bytes = 0;
    }
    static size_t padded(size_t n) { return (n + 63) / 64 * 64; }

    void* block(size_t n) {
        void* p = nullptr;
        if (posix_memalign(&p, 64, n ? padded(n) : 64) != 0) throw std::bad_alloc();
        blocks.push_back(p);
        bytes += padded(n);
        return p;
    }
    void allocate(Tensors& t, size_t element) {
        t.data.clear();
        if (plan_only) {
            for (const TensorSpec& s : t.specs) bytes += padded(s.size() * element);
            return;
        }
#ifdef ARENA_DEBUG
        for (const TensorSpec& s : t.specs) {
            void* p = nullptr;  // exactly as long as the tensor: the sanitizer guards its end
            size_t n = s.size() * element;
            if (posix_memalign(&p, 64, n ? n : 1) != 0) throw std::bad_alloc();
            blocks.push_back(p);
            bytes += n;
            memset(p, 0xff, n);  // NaN in every floating-point format
            t.data.push_back(p);
        }
#else
        size_t total = 0;
        for (const TensorSpec& s : t.specs) total += padded(s.size() * element);
        char* p = (char*)block(total);
        memset(p, 0, total);
        for (const TensorSpec& s : t.specs) {
            t.data.push_back(p);
            p += padded(s.size() * element);
        }
#endif
    }
};
