// AdamW (Loshchilov and Hutter, arXiv 1711.05101) and the global norm of the gradients, each over all parameters in one launch.
//
//     norm = √Σg²      g ← g·min(1, clip/norm)
//     m = β1·m + (1−β1)g    v = β2·v + (1−β2)g²    p −= lr·(m̂/(√v̂+ε) + decay·p),  m̂ = m/(1−β1^t), v̂ = v/(1−β2^t)
//
// as cpu::adamw and cpu::Gpt2::update: gradients are set to zero in the same pass, and nothing at all changes if the norm is not finite. Weights, gradients and
// moments are float32; a tensor whose working type is bf16 gets its copy written too. All tensors are cut into pieces of at most 2^15 numbers, one block a
// piece; the table of pieces is made once. What changes from step to step stands in device memory, so that a captured graph can be replayed.
// Earlier versions and times: dev/cuda/adamw.cu, dev/cuda/global_norm.cu.
#pragma once

#include <algorithm>
#include <vector>

#include "../tensors.h"
#include "../trainer.h"
#include "common.cuh"

namespace gpu {

// One parameter tensor; pointers are device memory.
struct AdamWTensor {
    floatX* working;  // the copy the network computes with; null: `weight` itself is what it computes with
    float* weight;    // the master weight; of a Storage::FLOAT32 tensor, and with floatX = float, the parameter itself
    float *gradient, *moment1, *moment2;
    int64_t size;
    double lr_multiplier;
    bool decay;
};
struct AdamWPiece {
    int tensor, count;
    int64_t begin;
};
constexpr int ADAMW_PIECE = 1 << 15;

// The table for lists that share their specs. `masters` need have data only where the parameter is not float32 itself.
inline std::vector<AdamWTensor> adamw_tensors(const Tensors& parameters, const Tensors& masters, const Tensors& gradients, const Tensors& moment1,
                                              const Tensors& moment2) {
    std::vector<AdamWTensor> list;
    for (size_t i = 0; i < parameters.specs.size(); i++) {
        const TensorSpec& s = parameters.specs[i];
        bool own = s.storage == Storage::FLOAT32 || std::is_same_v<floatX, float>;
        list.push_back({own ? nullptr : (floatX*)parameters.data[i], (float*)(own ? parameters.data[i] : masters.data[i]), (float*)gradients.data[i],
                        (float*)moment1.data[i], (float*)moment2.data[i], s.size(), s.lr_multiplier, s.decay});
    }
    return list;
}
inline std::vector<AdamWPiece> adamw_pieces(const std::vector<AdamWTensor>& tensors) {
    std::vector<AdamWPiece> list;
    for (size_t t = 0; t < tensors.size(); t++)
        for (int64_t begin = 0; begin < tensors[t].size; begin += ADAMW_PIECE)
            list.push_back({(int)t, (int)std::min<int64_t>(ADAMW_PIECE, tensors[t].size - begin), begin});
    return list;
}

// One step's numbers.
struct AdamWStep {
    double lr, weight_decay, grad_clip;  // grad_clip 0: off
    double step_scale, v_scale;          // 1/(1−β1^t), 1/(1−β2^t)
    float beta1, beta2, eps;
};
inline AdamWStep adamw_step(const AdamW& h) {
    double step_scale = 1 / (1 - std::pow(h.beta1, (double)h.step)), v_scale = 1 / (1 - std::pow(h.beta2, (double)h.step));
    return {h.lr, h.weight_decay, h.grad_clip, step_scale, v_scale, (float)h.beta1, (float)h.beta2, (float)h.eps};
}

struct GlobalNorm {
    double squares, norm;  // Σg², √Σg²
};

// ---- global norm -----------------------------------------------------------------------------------------------------------------------------------------

constexpr int NORM_THREADS = 256, NORM_TOTAL_THREADS = 1024;

// partial[k] = Σg² over piece k.
__global__ void __launch_bounds__(NORM_THREADS) global_norm_kernel3(double* partial, const AdamWTensor* tensors, const AdamWPiece* pieces) {
    __shared__ float shared[32];
    AdamWPiece piece = pieces[blockIdx.x];
    const float* g = tensors[piece.tensor].gradient + piece.begin;
    int vectors = (uintptr_t)g % 16 == 0 ? piece.count / 4 : 0;
    float sum = 0;
#pragma unroll 4
    for (int i = threadIdx.x; i < vectors; i += NORM_THREADS) {
        Packed<float> x = load_packed(g + 4 * i);
        sum += x[0] * x[0] + x[1] * x[1] + (x[2] * x[2] + x[3] * x[3]);
    }
    for (int i = 4 * vectors + threadIdx.x; i < piece.count; i += NORM_THREADS) sum += g[i] * g[i];
    sum = block_sum(sum, shared);
    if (threadIdx.x == 0) partial[blockIdx.x] = sum;
}

// One block adds up the pieces.
__global__ void __launch_bounds__(NORM_TOTAL_THREADS) global_norm_total_kernel3(GlobalNorm* result, const double* partial, int n) {
    __shared__ double shared[NORM_TOTAL_THREADS];
    double sum = 0;
#pragma unroll 4
    for (int i = threadIdx.x; i < n; i += NORM_TOTAL_THREADS) sum += partial[i];
    shared[threadIdx.x] = sum;
    for (int half = NORM_TOTAL_THREADS / 2; half > 0; half /= 2) {
        __syncthreads();
        if (threadIdx.x < half) shared[threadIdx.x] += shared[threadIdx.x + half];
    }
    if (threadIdx.x == 0) *result = {shared[0], sqrt(shared[0])};
}

// The norm of all gradients. result, tensors, pieces: device memory.
inline void global_norm(cudaStream_t stream, GlobalNorm* result, const AdamWTensor* tensors, const AdamWPiece* pieces, int num_pieces) {
    double* partial = (double*)workspace();
    assert(num_pieces > 0 && num_pieces * (int64_t)sizeof(double) <= WORKSPACE_BYTES);
    global_norm_kernel3<<<num_pieces, NORM_THREADS, 0, stream>>>(partial, tensors, pieces);
    LAUNCH_CHECK();
    global_norm_total_kernel3<<<1, NORM_TOTAL_THREADS, 0, stream>>>(result, partial, num_pieces);
    LAUNCH_CHECK();
}

// ---- AdamW -------------------------------------------------------------------------------------------------------------------------------------------------

// What one step means for one tensor; the factors are rounded to float32 where the CPU rounds them.
struct AdamWFactors {
    float beta1, beta2, eps, g_scale, step, v_scale, shrink;
    __device__ AdamWFactors(const AdamWStep& s, const AdamWTensor& t, double norm) {
        double lr = s.lr * t.lr_multiplier;
        beta1 = s.beta1;
        beta2 = s.beta2;
        eps = s.eps;
        g_scale = s.grad_clip > 0 && norm > s.grad_clip ? (float)(s.grad_clip / norm) : 1;
        step = (float)(lr * s.step_scale);
        v_scale = (float)s.v_scale;
        shrink = t.decay ? (float)(1 - lr * s.weight_decay) : 1;
    }
    // The equations, for one number. m, v and p are updated.
    __device__ void update(float& p, float g, float& m, float& v) const {
        float x = g * g_scale;
        m = beta1 * m + (1 - beta1) * x;
        v = beta2 * v + (1 - beta2) * x * x;
        p = p * shrink - step * m / (sqrtf(v * v_scale) + eps);
    }
};

constexpr int ADAMW_THREADS = 256;

// One block a piece, four numbers a thread at a time: 16 bytes of each float32 array, 8 of the bf16 copy.
__global__ void __launch_bounds__(ADAMW_THREADS)
    adamw_kernel3(const AdamWTensor* tensors, const AdamWPiece* pieces, const AdamWStep* step, const GlobalNorm* norm) {
    struct alignas(4 * sizeof(floatX)) Four {
        floatX v[4];
    };
    if (!isfinite(norm->norm)) return;
    AdamWPiece piece = pieces[blockIdx.x];
    AdamWTensor t = tensors[piece.tensor];
    AdamWFactors factors(*step, t, norm->norm);
    float *weight = t.weight + piece.begin, *gradient = t.gradient + piece.begin, *moment1 = t.moment1 + piece.begin, *moment2 = t.moment2 + piece.begin;
    floatX* working = t.working ? t.working + piece.begin : nullptr;
    bool aligned = ((uintptr_t)weight | (uintptr_t)gradient | (uintptr_t)moment1 | (uintptr_t)moment2) % 16 == 0 && (uintptr_t)working % sizeof(Four) == 0;
    int vectors = aligned ? piece.count / 4 : 0;
#pragma unroll 1
    for (int j = threadIdx.x; j < vectors; j += ADAMW_THREADS) {
        int i = 4 * j;
        Packed<float> p = load_packed(weight + i), g = load_packed(gradient + i), m = load_packed(moment1 + i), v = load_packed(moment2 + i);
        Four copy;
#pragma unroll
        for (int k = 0; k < 4; k++) {
            factors.update(p.v[k], g.v[k], m.v[k], v.v[k]);
            g.v[k] = 0;
            copy.v[k] = from_float<floatX>(p.v[k]);
        }
        store_packed(weight + i, p);
        store_packed(gradient + i, g);
        store_packed(moment1 + i, m);
        store_packed(moment2 + i, v);
        if (working) *(Four*)(working + i) = copy;
    }
#pragma unroll 1
    for (int i = 4 * vectors + threadIdx.x; i < piece.count; i += ADAMW_THREADS) {
        factors.update(weight[i], gradient[i], moment1[i], moment2[i]);
        gradient[i] = 0;
        if (working) working[i] = from_float<floatX>(weight[i]);
    }
}

// Updates every tensor of the table and sets its gradient to zero, unless the norm is not finite. All pointers are device memory; norm from global_norm().
inline void adamw(cudaStream_t stream, const AdamWTensor* tensors, const AdamWPiece* pieces, int num_pieces, const AdamWStep* step, const GlobalNorm* norm) {
    adamw_kernel3<<<num_pieces, ADAMW_THREADS, 0, stream>>>(tensors, pieces, step, norm);
    LAUNCH_CHECK();
}

}  // namespace gpu
