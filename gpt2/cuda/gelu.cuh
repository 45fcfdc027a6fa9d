// GELU (Hendrycks and Gimpel, arXiv 1606.08415) in its tanh form, as GPT-2 has it, and SiLU.
//
//     GELU   u = √(2/π)(x + 0.044715x³)    y = x/2·(1 + tanh u) = xσ    σ = sigmoid(2u)    dx = dy·(σ + xσ(1−σ)·2u')    2u' = √(8/π)(1 + 0.134145x²)
//     SiLU   y = xσ,  σ = sigmoid(x)                                                       dx = dy·σ(1 + x(1−σ))
//
// The sigmoid is one exponential and one reciprocal of the special function unit, each good to about 1e-7: two a number, as many as tanh would take.
// SiLU has no kernel of its own: others take it as they load (lightning.cuh). Earlier versions and times: dev/cuda/gelu.cu.
#pragma once

#include "tensor_cores.cuh"

namespace gpu {

// An overflow of the exponential is harmless: 1/(1 + ∞) = 0.
__device__ inline float sigmoid(float x) { return __fdividef(1.f, 1.f + __expf(-x)); }
__device__ inline float silu(float x) { return x * sigmoid(x); }
__device__ inline float silu_gradient(float x) {
    float s = sigmoid(x);
    return s * (1 + x * (1 - s));
}
// σ of GELU, constants multiplied out.
__device__ inline float gelu_sigmoid(float x, float x2) {
    float s, e = exp2_fast(x * fmaf(x2, -0.10294324f, -2.3022082f));  // −2u·log2(e)
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(s) : "f"(1 + e));
    return s;
}
__device__ inline float gelu(float x) { return x * gelu_sigmoid(x, x * x); }
__device__ inline float gelu_gradient(float x) {
    float x2 = x * x, s = gelu_sigmoid(x, x2);
    return fmaf(fmaf(-s, s, s), x * fmaf(x2, 0.21406445f, 1.5957691f), s);
}

constexpr int GELU_THREADS = 256;

// n numbers. Thread i has the i-th 16 bytes; those behind the last pack have one number each.
__global__ void __launch_bounds__(GELU_THREADS) gelu_forward_kernel3(floatX* y, const floatX* x, int64_t packs, int64_t n) {
    constexpr int size = Packed<floatX>::size;
    int64_t i = (int64_t)blockIdx.x * GELU_THREADS + threadIdx.x;
    if (i < packs) {
        Packed<floatX> in = load_packed(x + i * size), out;
#pragma unroll
        for (int k = 0; k < size; k++) out.set(k, gelu(in[k]));
        store_packed(y + i * size, out);
        return;
    }
    i += packs * (size - 1);
    if (i < n) y[i] = from_float<floatX>(gelu(to_float(x[i])));
}
__global__ void __launch_bounds__(GELU_THREADS) gelu_backward_kernel3(floatX* dx, const floatX* dy, const floatX* x, int64_t packs, int64_t n) {
    constexpr int size = Packed<floatX>::size;
    int64_t i = (int64_t)blockIdx.x * GELU_THREADS + threadIdx.x;
    if (i < packs) {
        Packed<floatX> in = load_packed(x + i * size), gradient = load_packed(dy + i * size);
#pragma unroll
        for (int k = 0; k < size; k++) gradient.set(k, gradient[k] * gelu_gradient(in[k]));
        store_packed(dx + i * size, gradient);
        return;
    }
    i += packs * (size - 1);
    if (i < n) dx[i] = from_float<floatX>(to_float(dy[i]) * gelu_gradient(to_float(x[i])));
}

// y = GELU(x), n numbers; y may be x.
inline void gelu_forward(cudaStream_t stream, floatX* y, const floatX* x, int64_t n) {
    constexpr int size = Packed<floatX>::size;
    if (n == 0) return;
    int64_t packs = aligned16(y) && aligned16(x) ? n / size : 0, workers = n - packs * (size - 1);
    gelu_forward_kernel3<<<(unsigned)ceil_div(workers, GELU_THREADS), GELU_THREADS, 0, stream>>>(y, x, packs, n);
    LAUNCH_CHECK();
}
// dx = dy⊙GELU'(x), n numbers; dx may be dy.
inline void gelu_backward(cudaStream_t stream, floatX* dx, const floatX* dy, const floatX* x, int64_t n) {
    constexpr int size = Packed<floatX>::size;
    if (n == 0) return;
    int64_t packs = aligned16(dx) && aligned16(dy) && aligned16(x) ? n / size : 0, workers = n - packs * (size - 1);
    gelu_backward_kernel3<<<(unsigned)ceil_div(workers, GELU_THREADS), GELU_THREADS, 0, stream>>>(dx, dy, x, packs, n);
    LAUNCH_CHECK();
}

}  // namespace gpu
