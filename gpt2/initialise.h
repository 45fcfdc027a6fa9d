// Initial values of the parameters: normal numbers with addresses (seed, tensor, element), so that every device starts from the same.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "config.h"
#include "philox.h"

// Tensor t of the list, into p (its size). The rows of wte that pad the vocabulary are zero.
template <class T>
inline void initial_values(const ModelConfig& config, const std::vector<TensorSpec>& specs, size_t t, uint64_t seed, T* p) {
    const TensorSpec& s = specs[t];
    int64_t n = s.size(), used = s.name == "wte" ? (int64_t)config.vocab_size * config.channels : n;
#pragma omp parallel for
    for (int64_t i = 0; i < n; i += 4) {
        Philox r = philox(seed, (uint32_t)(i >> 2), (uint32_t)(i >> 34), (uint32_t)t, 0x494e4954 /* INIT */);
        double z[4];
        philox_normal(r.word[0], r.word[1], &z[0], &z[1]);
        philox_normal(r.word[2], r.word[3], &z[2], &z[3]);
        for (int64_t k = i; k < std::min(i + 4, n); k++) p[k] = (T)(k < used ? s.init_value + s.init_std * z[k - i] : 0);
    }
}
