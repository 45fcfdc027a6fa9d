// Philox 4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011): a counter-based generator.
// Four random words are a pure function of a 64-bit key and a 128-bit counter, so that every random decision of the program (initial values,
// dropout, shuffling, sampling) has an address instead of a place in a stream: the same on the CPU and on the GPU, for any number of threads and any
// order of evaluation. Known answer: key 0, counter 0 gives 6627e8d5 e169c58d bc57ac4c 9b00dbd8.
#pragma once

#include <cmath>
#include <cstdint>

#ifdef __CUDACC__
#define HOST_DEVICE __host__ __device__
#else
#define HOST_DEVICE
#endif

struct Philox {
    uint32_t word[4];
};

HOST_DEVICE inline Philox philox(uint64_t key, uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3) {
    uint32_t k0 = (uint32_t)key, k1 = (uint32_t)(key >> 32);
    for (int round = 0; round < 10; round++) {
        uint64_t p0 = (uint64_t)0xD2511F53u * c0, p1 = (uint64_t)0xCD9E8D57u * c2;
        uint32_t n0 = (uint32_t)(p1 >> 32) ^ c1 ^ k0, n2 = (uint32_t)(p0 >> 32) ^ c3 ^ k1;
        c1 = (uint32_t)p1;
        c3 = (uint32_t)p0;
        c0 = n0;
        c2 = n2;
        k0 += 0x9E3779B9u;
        k1 += 0xBB67AE85u;
    }
    return {{c0, c1, c2, c3}};
}

// Uniform in [0, 1), 32 bits.
HOST_DEVICE inline double philox_uniform(uint32_t word) { return word * (1.0 / 4294967296.0); }

// Two standard normal numbers from two words (Box and Muller 1958).
inline void philox_normal(uint32_t a, uint32_t b, double* x, double* y) {
    double r = std::sqrt(-2.0 * std::log((a + 1.0) * (1.0 / 4294967296.0))), t = 6.283185307179586 * philox_uniform(b);
    *x = r * std::cos(t);
    *y = r * std::sin(t);
}
