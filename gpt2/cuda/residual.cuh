// The residual stream: out = base + Z⊙x over (N,C), Z the residual branch's dropout; without dropout out = base + x.
//
//     Z_nc = 1/(1−p) if word c&3 of Philox(seed; c>>2, position, 2³²−1−(3b+site), step·L+l) >= p·2³², else 0       b: the sequence's number in the batch
//
// The counters are those of cpu::dropout_add (gpt2/cpu/layers.h): the same mask on the CPU, in the backward pass, and for any split of the batch. Nothing is
// saved. Earlier versions and times: dev/cuda/residual.cu.
#pragma once

#include "common.cuh"

namespace gpu {

enum DropoutSite { DROP_EMBEDDING, DROP_ATTENTION, DROP_MLP };

// The words of Philox that one row of the batch draws from.
struct DropoutRow {
    uint32_t position, who, counter;
    __device__ DropoutRow(const DropoutKey& key, DropoutSite site, TokenPlace place)
        : position(place.pos), who(UINT32_MAX - (uint32_t)(3 * (key.pass->first_row + place.seq) + site)), counter(key.counter()) {}
    __device__ Philox words(const DropoutKey& key, int c) const { return philox(key.seed, (uint32_t)c >> 2, position, who, counter); }  // of channels c .. c+3
};
__device__ inline float dropout(const DropoutKey& key, uint32_t word, float x) { return word >= key.threshold ? key.scale * x : 0; }

constexpr int RESIDUAL_THREADS = 256;

// One thread for four neighbouring channels, which share a call of Philox. For rows that do not start at multiples of 16 bytes.
__global__ void __launch_bounds__(RESIDUAL_THREADS)
    dropout_add_kernel2(floatX* out, const floatX* base, const floatX* x, DropoutKey key, DropoutSite site, const TokenPlace* place, int64_t N, int C) {
    int groups = (C + 3) / 4;
    int64_t i = (int64_t)blockIdx.x * RESIDUAL_THREADS + threadIdx.x, n = i / groups;
    if (n >= N) return;
    int c0 = (int)(i - n * groups) * 4;
    Philox words = DropoutRow(key, site, place[n]).words(key, c0);
#pragma unroll
    for (int w = 0; w < 4; w++) {
        if (c0 + w >= C) break;
        int64_t at = n * C + c0 + w;
        float z = dropout(key, words.word[w], to_float(x[at]));
        out[at] = from_float<floatX>(base ? to_float(base[at]) + z : z);
    }
}

// One warp a row: place and counters are read once, and a lane takes 16 bytes at a time. Philox runs while they are on their way.
__global__ void __launch_bounds__(RESIDUAL_THREADS)
    dropout_add_kernel3(floatX* out, const floatX* base, const floatX* x, DropoutKey key, DropoutSite site, const TokenPlace* place, int64_t N, int C) {
    constexpr int size = Packed<floatX>::size;
    int64_t n = (int64_t)blockIdx.x * (RESIDUAL_THREADS / 32) + threadIdx.x / 32;
    if (n >= N) return;
    DropoutRow row(key, site, place[n]);
    for (int c0 = threadIdx.x % 32 * size; c0 < C; c0 += 32 * size) {
        int64_t at = n * C + c0;
        Packed<floatX> branch = load_packed(x + at), stream, sum;
        if (base) stream = load_packed(base + at);
#pragma unroll
        for (int c = 0; c < size; c += 4) {
            Philox words = row.words(key, c0 + c);
#pragma unroll
            for (int w = 0; w < 4; w++) {
                float z = dropout(key, words.word[w], branch[c + w]);
                sum.set(c + w, base ? stream[c + w] + z : z);
            }
        }
        store_packed(out + at, sum);
    }
}

// out = base + x, n numbers, or a copy of x if base is null. Thread i has the i-th 16 bytes; those behind the last pack have one number each.
__global__ void __launch_bounds__(RESIDUAL_THREADS) residual_add_kernel3(floatX* out, const floatX* base, const floatX* x, int64_t packs, int64_t n) {
    constexpr int size = Packed<floatX>::size;
    int64_t i = (int64_t)blockIdx.x * RESIDUAL_THREADS + threadIdx.x;
    if (i < packs) {
        Packed<floatX> sum = load_packed(x + i * size);
        if (base) {
            Packed<floatX> stream = load_packed(base + i * size);
#pragma unroll
            for (int k = 0; k < size; k++) sum.set(k, stream[k] + sum[k]);
        }
        store_packed(out + i * size, sum);
        return;
    }
    i += packs * (size - 1);
    if (i < n) out[i] = from_float<floatX>((base ? to_float(base[i]) : 0) + to_float(x[i]));
}

// out = base + Z⊙x over (N,C), place (N); base may be null or out itself, out may be x. The backward pass is the same function: dx = Z⊙dout.
inline void dropout_add(cudaStream_t stream, floatX* out, const floatX* base, const floatX* x, const DropoutKey& key, DropoutSite site, const TokenPlace* place,
                        int64_t N, int64_t C) {
    constexpr int size = Packed<floatX>::size, threads = RESIDUAL_THREADS;
    if (N * C == 0) return;
    bool aligned = aligned16(out) && aligned16(base) && aligned16(x);
    if (key.p == 0) {
        int64_t packs = aligned ? N * C / size : 0, workers = N * C - packs * (size - 1);
        residual_add_kernel3<<<(unsigned)ceil_div(workers, threads), threads, 0, stream>>>(out, base, x, packs, N * C);
    } else if (aligned && C % size == 0) {
        dropout_add_kernel3<<<(unsigned)ceil_div(N, threads / 32), threads, 0, stream>>>(out, base, x, key, site, place, N, (int)C);
    } else {
        dropout_add_kernel2<<<(unsigned)ceil_div(N * ceil_div(C, 4), threads), threads, 0, stream>>>(out, base, x, key, site, place, N, (int)C);
    }
    LAUNCH_CHECK();
}

}  // namespace gpu
