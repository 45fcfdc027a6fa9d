// The classifier's softmax and loss, fused with their gradient, in place: a row of logits becomes its gradient.
//
//     loss_n = lse(logits_n) − logits_n[target_n]        dlogits_n = scale·(softmax(logits_n) − onehot(target_n))        over the V real tokens of Vp columns
//
// Logits are by far the largest activation, so what counts is how often they pass through device memory: a row is read once, its maximum and its sum of
// exponentials are found in the same pass (online softmax: Milakov and Gimelshein, arXiv 1805.02867), it stays in shared memory meanwhile (GPT-2's row is 100
// KB of bf16, two rows fit in an H100's multiprocessor) and is written once. Earlier versions and times: dev/cuda/classifier.cu.
#pragma once

#include <algorithm>

#include "common.cuh"

namespace gpu {

// Σ 2^(x·log2 e − shift) over the numbers seen so far, shift = log2 e times the largest of them: a multiply-add and one instruction of the special function
// unit for each (its ftz form: 0 for what would be subnormal). The shift starts from a finite number and is rounded once, so that equal shifts cancel exactly
// and nothing becomes ∞ − ∞: logits of −∞ are legal.
struct OnlineSum {
    static constexpr float log2e = 1.442695041f;
    float shift = -1e30f, sum = 0;

    __device__ static float exp2(float x) {
        float y;
        asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
        return y;
    }
    __device__ float exp(float x) const { return exp2(fmaf(x, log2e, -shift)); }  // e^(x − the largest)
    __device__ void raise(float to) {
        sum *= exp2(shift - to);
        shift = to;
    }
    template <int n>
    __device__ void add(const float (&x)[n]) {
        float largest = x[0];
#pragma unroll
        for (int k = 1; k < n; k++) largest = fmaxf(largest, x[k]);
        raise(fmaxf(shift, __fmul_rn(largest, log2e)));
#pragma unroll
        for (int k = 0; k < n; k++) sum += exp(x[k]);
    }
    // Over all threads of the block; each gets the result. `shared`: 64 floats.
    __device__ void over_block(float* shared) {
        raise(block_max(shift, shared));
        sum = block_sum(sum, shared + 32);
    }
    __device__ float loss(float correct) const { return (float)((double)logf(sum) + shift * 0.6931471805599453 - correct); }
};

// One block a row, one number a thread at a time, and the row is read twice. For rows that are not whole multiples of 16 bytes.
constexpr int CLASSIFIER2_THREADS = 512;
__global__ void __launch_bounds__(CLASSIFIER2_THREADS)
    classifier_kernel2(floatX* logits, int64_t Vp, float* losses, const int* targets, int V, const float* scale, bool write_gradient) {
    __shared__ float shared[64];
    int64_t n = blockIdx.x;
    floatX* row = logits + n * Vp;
    int target = targets[n];
    OnlineSum softmax;
    if (target >= 0) {
        float correct = to_float(row[target]);
        for (int c = threadIdx.x; c < V; c += CLASSIFIER2_THREADS) softmax.add({to_float(row[c])});
        softmax.over_block(shared);
        if (threadIdx.x == 0) losses[n] = softmax.loss(correct);
    } else if (threadIdx.x == 0) {
        losses[n] = 0;
    }
    if (!write_gradient) return;
    float factor = target >= 0 ? *scale / softmax.sum : 0;
    for (int c = threadIdx.x; c < Vp; c += CLASSIFIER2_THREADS) {
        float gradient = target >= 0 && c < V ? factor * softmax.exp(to_float(row[c])) : 0;
        row[c] = from_float<floatX>(c == target ? gradient - *scale : gradient);
    }
}

// The p-th pack of a row. Padding columns count as −∞, whatever stands there: nothing in the sum, gradient 0.
__device__ inline void real_numbers(float (&numbers)[Packed<floatX>::size], const Packed<floatX>& x, int p, int V) {
    constexpr int size = Packed<floatX>::size;
#pragma unroll
    for (int k = 0; k < size; k++) numbers[k] = x[k];
    if ((p + 1) * size <= V) return;
#pragma unroll
    for (int k = 0; k < size; k++)
        if (p * size + k >= V) numbers[k] = -INFINITY;
}

// One block a row, 16 bytes a thread at a time, CLASSIFIER_BATCH of them in flight: 640 threads take GPT-2's row in two batches, and two blocks stand on one
// multiprocessor, so that one's loads hide behind the other's arithmetic. With ROW_IN_SHARED each thread finds its packs again in shared memory; otherwise it
// reads them a second time, mostly from the L2 cache.
constexpr int CLASSIFIER_THREADS = 640, CLASSIFIER_BATCH = 5;
template <bool ROW_IN_SHARED>
__global__ void __launch_bounds__(CLASSIFIER_THREADS, 2)
    classifier_kernel4(floatX* logits, int64_t Vp, float* losses, const int* targets, int V, const float* scale, bool write_gradient) {
    constexpr int size = Packed<floatX>::size;
    extern __shared__ int4 row_in_shared[];
    __shared__ float shared[64];
    floatX *row = logits + blockIdx.x * Vp, *kept = ROW_IN_SHARED ? (floatX*)row_in_shared : row;
    int target = targets[blockIdx.x], packs = (int)(Vp / size), threads = blockDim.x;

    if (target < 0) {
        if (threadIdx.x == 0) losses[blockIdx.x] = 0;
        Packed<floatX> zeros;
        for (int k = 0; k < size; k++) zeros.set(k, 0);
        if (write_gradient)
            for (int p = threadIdx.x; p < packs; p += threads) store_packed(row + p * size, zeros);
        return;
    }
    float correct = to_float(row[target]);  // the barriers below stand between this and the first write

    OnlineSum softmax;
    for (int p0 = threadIdx.x; p0 < packs; p0 += CLASSIFIER_BATCH * threads) {
        Packed<floatX> x[CLASSIFIER_BATCH];
#pragma unroll  // behind the end: the last pack, not used
        for (int b = 0; b < CLASSIFIER_BATCH; b++) x[b] = load_packed(row + min(p0 + b * threads, packs - 1) * size);
#pragma unroll
        for (int b = 0; b < CLASSIFIER_BATCH; b++) {
            int p = p0 + b * threads;
            if (p >= packs) break;
            if (ROW_IN_SHARED) store_packed(kept + p * size, x[b]);
            float numbers[size];
            real_numbers(numbers, x[b], p, V);
            softmax.add(numbers);
        }
    }
    softmax.over_block(shared);
    if (threadIdx.x == 0) losses[blockIdx.x] = softmax.loss(correct);
    if (!write_gradient) return;

    float factor = *scale / softmax.sum;
    for (int p = threadIdx.x; p < packs; p += threads) {
        Packed<floatX> x = load_packed(kept + p * size);  // this thread's own: no barrier needed
        float numbers[size];
        real_numbers(numbers, x, p, V);
#pragma unroll
        for (int k = 0; k < size; k++) x.set(k, factor * softmax.exp(numbers[k]));
        store_packed(row + p * size, x);
    }
    __syncthreads();
    if (threadIdx.x == 0) row[target] = from_float<floatX>(factor * softmax.exp(correct) - *scale);
}

// logits (rows,V) with rows Vp >= V apart, losses (rows), targets (rows), below V, −1: not scored (loss 0, gradient 0); scale: device memory. With
// write_gradient the row becomes its gradient and the padding columns V.. become 0, so that products over Vp columns are right; otherwise logits stay.
inline void classifier(cudaStream_t stream, floatX* logits, int64_t Vp, float* losses, const int* targets, int64_t rows, int V, const float* scale,
                       bool write_gradient) {
    constexpr int size = Packed<floatX>::size;
    if (rows == 0) return;
    if (Vp % size != 0 || !aligned16(logits)) {
        classifier_kernel2<<<(unsigned)rows, CLASSIFIER2_THREADS, 0, stream>>>(logits, Vp, losses, targets, V, scale, write_gradient);
        LAUNCH_CHECK();
        return;
    }
    int threads = (int)std::min<int64_t>(CLASSIFIER_THREADS, round_up(Vp / size, 32));
    size_t row_bytes = Vp * sizeof(floatX);
    if (write_gradient && row_bytes + 1024 <= device_properties().sharedMemPerBlockOptin) {
        allow_shared_memory(classifier_kernel4<true>, row_bytes);
        classifier_kernel4<true><<<(unsigned)rows, threads, row_bytes, stream>>>(logits, Vp, losses, targets, V, scale, true);
    } else {
        classifier_kernel4<false><<<(unsigned)rows, threads, 0, stream>>>(logits, Vp, losses, targets, V, scale, write_gradient);
    }
    LAUNCH_CHECK();
}

}  // namespace gpu
