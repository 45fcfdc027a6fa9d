// Rotary positions (Su et al., arXiv 2104.09864), adjacent pairs, as cpu::rope:
//
//     θ_i = 10000^(−2i/d)      (x_2i, x_2i+1) → (x_2i cos − x_2i+1 sin, x_2i sin + x_2i+1 cos)  at angle position·θ_i;      backward: the same with −angle
//
// No table is kept: cosines and sines are computed once for each token and pair, in shared memory, and serve all heads. Earlier versions and times:
// dev/cuda/rope.cu.
#pragma once

#include <algorithm>

#include "common.cuh"

namespace gpu {

// i·rope_exponent(d) = log2 θ_i.
inline double rope_exponent(int d) { return -2 * 13.287712379549449 / d; }

// cos and sin of position·θ_i. The angle is a double until it has been reduced to half turns within ±1: at position 100000 it is good to 1e-10, and cosine and
// sine are rounded to float32 as the CPU's table is. sincospi takes half turns, so that nothing has to be reduced again.
__device__ inline float2 rope_rotation(int position, double theta, int direction) {
    double turns = position * theta * 0.15915494309189535;  // 1/2π
    float s, c;
    sincospif((float)(2 * (turns - rint(turns))), &s, &c);
    return {c, direction * s};
}
__device__ inline float2 rope_rotation(int position, int i, double exponent, int direction) { return rope_rotation(position, exp2(i * exponent), direction); }

// One block a token, one pair a thread at a time. For vectors that are not whole multiples of 16 bytes.
constexpr int ROPE2_THREADS = 128;
__global__ void __launch_bounds__(ROPE2_THREADS) rope_kernel2(floatX* y, int64_t y_stride, const floatX* x, int64_t x_stride, int heads, int d,
                                                              int64_t head_stride, const int* position, int direction, double exponent) {
    extern __shared__ float2 rotation[];  // (d/2) cos, sin
    int64_t n = blockIdx.x;
    for (int i = threadIdx.x; i < d / 2; i += ROPE2_THREADS) rotation[i] = rope_rotation(position[n], i, exponent, direction);
    __syncthreads();
    for (int j = threadIdx.x; j < heads * (d / 2); j += ROPE2_THREADS) {
        int h = j / (d / 2), i = j % (d / 2);
        const floatX* from = x + n * x_stride + h * head_stride + 2 * i;
        floatX* to = y + n * y_stride + h * head_stride + 2 * i;
        float2 r = rotation[i];
        float a = to_float(from[0]), b = to_float(from[1]);
        to[0] = from_float<floatX>(a * r.x - b * r.y);
        to[1] = from_float<floatX>(a * r.y + b * r.x);
    }
}

// Some tokens a block, so that each thread has 4 packs of 16 bytes. They are loaded first and are on their way while the angles are computed.
constexpr int ROPE_THREADS = 256, ROPE_PACKS = 4;
__global__ void __launch_bounds__(ROPE_THREADS) rope_kernel3(floatX* y, int64_t y_stride, const floatX* x, int64_t x_stride, int64_t N, int heads, int d,
                                                             int64_t head_stride, const int* position, int direction, double exponent, int tokens_per_block) {
    constexpr int size = Packed<floatX>::size, step = ROPE_THREADS * ROPE_PACKS;
    extern __shared__ float4 rotations[];  // (tokens, d/4): cos, sin, cos, sin of two neighbouring pairs
    int64_t first = (int64_t)blockIdx.x * tokens_per_block;
    int tokens = (int)min((int64_t)tokens_per_block, N - first);
    int per_head = d / size, per_token = heads * per_head, packs = tokens * per_token;

    Packed<floatX> v[ROPE_PACKS];
    int64_t to[ROPE_PACKS];
    int rotation[ROPE_PACKS];
    auto load = [&](int p0) {
#pragma unroll
        for (int k = 0; k < ROPE_PACKS; k++) {
            int p = p0 + k * ROPE_THREADS;
            if (p >= packs) break;
            int token = p / per_token, rest = p - token * per_token, h = rest / per_head, i = rest - h * per_head;  // pack i of head h
            int64_t at = h * head_stride + i * size;
            v[k] = load_packed(x + (first + token) * x_stride + at);
            to[k] = (first + token) * y_stride + at;
            rotation[k] = token * (d / 4) + i * (size / 4);
        }
    };
    load(threadIdx.x);
    for (int j = threadIdx.x; j < tokens * (d / 2); j += ROPE_THREADS) {
        int token = j / (d / 2);
        ((float2*)rotations)[j] = rope_rotation(position[first + token], j - token * (d / 2), exponent, direction);
    }
    __syncthreads();
    for (int p0 = threadIdx.x; p0 < packs; p0 += step) {
        if (p0 >= step) load(p0);
#pragma unroll
        for (int k = 0; k < ROPE_PACKS; k++) {
            if (p0 + k * ROPE_THREADS >= packs) break;
#pragma unroll
            for (int i = 0; i < size; i += 4) {
                float4 r = rotations[rotation[k] + i / 4];
                float a0 = v[k][i], b0 = v[k][i + 1], a1 = v[k][i + 2], b1 = v[k][i + 3];
                v[k].set(i, a0 * r.x - b0 * r.y);
                v[k].set(i + 1, a0 * r.y + b0 * r.x);
                v[k].set(i + 2, a1 * r.z - b1 * r.w);
                v[k].set(i + 3, a1 * r.w + b1 * r.z);
            }
            store_packed(y + to[k], v[k]);
        }
    }
}

// Rotates `heads` vectors of d (even) numbers, head_stride apart, in each of N rows, from x into y (which may be x). position (N); direction −1 is the backward
// pass. What stands between the vectors is neither read nor written.
inline void rope(cudaStream_t stream, floatX* y, int64_t y_stride, const floatX* x, int64_t x_stride, int64_t N, int heads, int d, int64_t head_stride,
                 const int* position, int direction) {
    constexpr int size = Packed<floatX>::size;
    assert(d % 2 == 0);
    if (N == 0 || heads == 0 || d == 0) return;
    double exponent = rope_exponent(d);
    if ((y_stride | x_stride | head_stride | d) % size == 0 && aligned16(y) && aligned16(x)) {
        int per_token = heads * (d / size), tokens = std::max(1, ROPE_THREADS * ROPE_PACKS / per_token);
        rope_kernel3<<<(unsigned)ceil_div(N, tokens), ROPE_THREADS, (size_t)tokens * d * sizeof(float), stream>>>(
            y, y_stride, x, x_stride, N, heads, d, head_stride, position, direction, exponent, tokens);
    } else {
        rope_kernel2<<<(unsigned)N, ROPE2_THREADS, d * sizeof(float), stream>>>(y, y_stride, x, x_stride, heads, d, head_stride, position, direction, exponent);
    }
    LAUNCH_CHECK();
}

}  // namespace gpu
