// W neighbouring numbers of a row as float32: W = 1 for any row, or as many as 16 bytes hold where rows start on multiples of 16 bytes.
// A kernel written over W is its own scalar version.
#pragma once

#include "common.cuh"

namespace gpu {

template <int W>
struct Numbers {
    float v[W] = {};
    __device__ float& operator[](int k) { return v[k]; }
    __device__ float operator[](int k) const { return v[k]; }
};

template <int W, class T>
__device__ inline Numbers<W> load_numbers(const T* p) {
    Numbers<W> x;
    if constexpr (W == 1) {
        x[0] = to_float(*p);
    } else {
        constexpr int size = Packed<T>::size;
        static_assert(W % size == 0, "whole 16-byte accesses");
        for (int k0 = 0; k0 < W; k0 += size) {
            Packed<T> packed = load_packed(p + k0);
            for (int k = 0; k < size; k++) x[k0 + k] = packed[k];
        }
    }
    return x;
}

template <int W, class T>
__device__ inline void store_numbers(T* p, const Numbers<W>& x) {
    if constexpr (W == 1) {
        *p = from_float<T>(x[0]);
    } else {
        constexpr int size = Packed<T>::size;
        static_assert(W % size == 0, "whole 16-byte accesses");
        for (int k0 = 0; k0 < W; k0 += size) {
            Packed<T> packed;
            for (int k = 0; k < size; k++) packed.set(k, x[k0 + k]);
            store_packed(p + k0, packed);
        }
    }
}

}  // namespace gpu
