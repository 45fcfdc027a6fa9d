// Attention over two sets of keys that were attended to apart, each with an output and a log-sum-exp of its own: the twin of cpu::softmax_merge (attention.h).
//
//     m = max(lse1, lse2)      w = exp(lse − m)      o = (w1·o1 + w2·o2)/(w1 + w2)      lse = m + ln(w1 + w2)
//
// Logarithms are natural, as those of softmax_forward and softmax_decode are. A part that saw no key has lse = −inf, and its o may be anything, NaN too: it is
// not asked for. If neither saw any, o = 0 and lse = −inf.
//
// Memory: 3·NH·d numbers a token. MLA with 16 heads of 64, 2048 tokens: 13 MB, 4 µs on an H100.
#pragma once

#include "common.cuh"

namespace gpu {

constexpr int MERGE_PARTS_THREADS = 256;

// A thread has V numbers of a row.
template <int V>
__global__ void __launch_bounds__(MERGE_PARTS_THREADS)
    softmax_merge_kernel(floatX* o, float* lse, const floatX* o1, const float* lse1, const floatX* o2, const float* lse2, int64_t N, int heads, int d) {
    int pieces = d / V;
    int64_t i = (int64_t)blockIdx.x * MERGE_PARTS_THREADS + threadIdx.x, row = i / pieces, n = row / heads, at = row % heads * N + n;
    if (n >= N) return;
    bool some1 = lse1[at] != -INFINITY, some2 = lse2[at] != -INFINITY;
    float m = fmaxf(lse1[at], lse2[at]), w1 = some1 ? expf(lse1[at] - m) : 0, w2 = some2 ? expf(lse2[at] - m) : 0, sum = w1 + w2;
    if constexpr (V == 1) {
        float x1 = to_float(o1[i]), x2 = to_float(o2[i]);
        o[i] = from_float<floatX>((some1 ? w1 / sum * x1 : 0) + (some2 ? w2 / sum * x2 : 0));
    } else {
        Packed<floatX> x1 = load_packed(o1 + i * V), x2 = load_packed(o2 + i * V), x;
#pragma unroll
        for (int e = 0; e < V; e++) x.set(e, (some1 ? w1 / sum * x1[e] : 0) + (some2 ? w2 / sum * x2[e] : 0));
        store_packed(o + i * V, x);
    }
    if (lse && i % pieces == 0) lse[at] = some1 || some2 ? m + logf(sum) : -INFINITY;
}

// o, o1, o2 (N,NH·d), o may be o1 or o2; lse (or null), lse1, lse2 (NH,N), lse neither of the two.
inline void softmax_merge(cudaStream_t stream, floatX* o, float* lse, const floatX* o1, const float* lse1, const floatX* o2, const float* lse2, int64_t N,
                          int heads, int d) {
    constexpr int V = Packed<floatX>::size;
    if (N == 0) return;
    bool vectors = d % V == 0 && aligned16(o) && aligned16(o1) && aligned16(o2);
    auto kernel = vectors ? softmax_merge_kernel<V> : softmax_merge_kernel<1>;
    int64_t threads = N * heads * (vectors ? d / V : d);
    kernel<<<(unsigned)ceil_div(threads, MERGE_PARTS_THREADS), MERGE_PARTS_THREADS, 0, stream>>>(o, lse, o1, lse1, o2, lse2, N, heads, d);
    LAUNCH_CHECK();
}

// Of sequences with cu_kv[s+1]−cu_kv[s] tokens, cu_new[s+1]−cu_new[s] of them new: cu_past (num_seqs+1), offsets of the others; past (num_seqs), how many they
// are.
__global__ void past_tokens_kernel(int* cu_past, int* past, const int* cu_kv, const int* cu_new, int num_seqs) {
    int s = blockIdx.x * blockDim.x + threadIdx.x;
    if (s > num_seqs) return;
    cu_past[s] = cu_kv[s] - cu_new[s];
    if (s < num_seqs) past[s] = cu_kv[s + 1] - cu_new[s + 1] - cu_past[s];
}
inline void past_tokens(cudaStream_t stream, int* cu_past, int* past, const int* cu_kv, const int* cu_new, int num_seqs) {
    past_tokens_kernel<<<(unsigned)ceil_div(num_seqs + 1, 256), 256, 0, stream>>>(cu_past, past, cu_kv, cu_new, num_seqs);
    LAUNCH_CHECK();
}

}  // namespace gpu
