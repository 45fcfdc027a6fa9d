// What the kernels of the softmax core's backward pass (softmax_backward.cuh) share: which rows belong together, who sees whom, the statistics of the rows.
#pragma once

#include <algorithm>
#include <climits>

#include "bias.cuh"
#include "softmax.cuh"

namespace gpu {

namespace softmax_bwd {

constexpr int THREADS = 128;

// Columns of [dq | dk | dv], and the sums over its rows, by a pass of their own.
HOST_DEVICE inline int64_t bias_columns(const SoftmaxAttention& a) { return (int64_t)a.heads * a.d_qk + (int64_t)a.kv_heads * (a.d_qk + a.d_v); }
inline void launch_bias(cudaStream_t stream, const SoftmaxAttention& a, const SoftmaxGradients& g) {
    if (g.dbias) bias_backward(stream, g.dbias, g.dq, a.q_rows, bias_columns(a), g.dq_stride);
}

// ---- which block does what ------------------------------------------------------------------------------------------------------------------------------

// The grid is one-dimensional, since only x has room for very many sequences: the tiles of one head of one sequence are neighbours, so that what they all
// read comes from the L2 cache. Every sequence gets as many tiles as the longest; those it does not need return at once.
struct Piece {
    int seq, head, tile;
    __device__ Piece(int heads, int tiles) {
        int x = blockIdx.x;
        seq = x / tiles / heads;
        head = x / tiles % heads;
        tile = x % tiles;
    }
};

// Blocks of a grid: `tiles` of each head and sequence.
inline unsigned grid_size(int num_seqs, int heads, int tiles) {
    int64_t blocks = (int64_t)num_seqs * heads * tiles;
    assert(blocks <= INT_MAX);
    return (unsigned)blocks;
}

__device__ inline int warp_of_block() { return __shfl_sync(0xffffffff, threadIdx.x / 32, 0); }  // tells the compiler that all lanes have the same

struct Sequence {
    int n_q, n_k, shift;  // query i is at position i + shift
    int q0, k0;           // the sequence's first rows
    // Under dropout tiles of keys begin where four neighbouring keys begin that share a Philox call; a segment may begin in the midst of four. The tiles then
    // begin so many keys before key 0; those keys are masked like keys behind n_k.
    int lead;
    __device__ Sequence(const SoftmaxAttention& a, int s, bool dropout) {
        n_q = a.q_len(s);
        n_k = a.k_len(s);
        shift = n_k - n_q;
        q0 = a.cu_q[s];
        k0 = a.cu_k[s];
        lead = dropout && a.drop_pos ? a.drop_pos[s] % 4 : 0;
    }
};

// The queries [begin, end) that see any of the keys [j0, j1), and the keys that any of the queries [i0, i1) sees. The launcher has set a window that does
// not limit anything to 0, so that the sums below don't overflow.
struct Range {
    int begin, end;
};
__device__ inline Range queries_of(const SoftmaxAttention& a, const Sequence& s, int j0, int j1) {
    j1 = min(j1, s.n_k);
    return {max(0, max(j0, 0) - s.shift), a.window > 0 ? min(s.n_q, j1 - 1 + a.window - s.shift) : s.n_q};
}
__device__ inline Range keys_of(const SoftmaxAttention& a, const Sequence& s, int i0, int i1) {
    i1 = min(i1, s.n_q);
    return {a.window > 0 ? max(0, i0 + s.shift - a.window + 1) : 0, min(s.n_k, i1 + s.shift)};
}
__device__ inline bool visible(int position, int j, int window) { return j <= position && (window == 0 || j > position - window); }

// ---- the statistics of the rows -------------------------------------------------------------------------------------------------------------------------

// stats (NH, q_rows) = {lse·log₂e, D·(1−p)}. A row that sees no key gets +inf for its lse, which makes all its P zero. Eight lanes make one sum, W numbers
// each at a time; a block has 32 rows of one head, and the heads of these rows are neighbours.
constexpr int DELTA_THREADS = 256, DELTA_ROWS = DELTA_THREADS / 8;

template <int W>
__global__ void softmax_backward_delta_kernel(SoftmaxAttention a, SoftmaxGradients g, float2* stats, float one_minus_p) {
    int h = blockIdx.x % a.heads, lane = threadIdx.x % 8;
    int64_t n = blockIdx.x / a.heads * (int64_t)DELTA_ROWS + threadIdx.x / 8;
    bool there = n >= a.cu_q[0] && n < a.cu_q[a.num_seqs];
    float sum = 0;
    if (there) {
        const floatX *o = g.o + n * g.o_stride + h * (int64_t)a.d_v, *d_o = g.d_o + n * g.do_stride + h * (int64_t)a.d_v;
        for (int c = lane * W; c < a.d_v; c += 8 * W) {
            if constexpr (W == 1) {
                sum += to_float(o[c]) * to_float(d_o[c]);
            } else {
                Packed<floatX> x = load_packed(o + c), y = load_packed(d_o + c);
#pragma unroll
                for (int i = 0; i < W; i++) sum += x[i] * y[i];
            }
        }
    }
    for (int offset = 4; offset > 0; offset /= 2) sum += __shfl_xor_sync(0xffffffff, sum, offset);
    if (!there || lane != 0) return;
    float lse = g.lse[h * a.q_rows + n];
    stats[h * a.q_rows + n] = make_float2(lse == -INFINITY ? INFINITY : lse * LOG2E, sum * one_minus_p);
}

inline void launch_delta(cudaStream_t stream, const SoftmaxAttention& a, const SoftmaxGradients& g, float2* stats) {
    constexpr int W = Packed<floatX>::size;
    int64_t blocks = ceil_div(a.q_rows, DELTA_ROWS) * a.heads;
    if (blocks == 0) return;
    assert(blocks <= INT_MAX);
    bool vectors = aligned16(g.o) && aligned16(g.d_o) && g.o_stride % W == 0 && g.do_stride % W == 0 && a.d_v % W == 0;
    auto kernel = vectors ? softmax_backward_delta_kernel<W> : softmax_backward_delta_kernel<1>;
    kernel<<<(unsigned)blocks, DELTA_THREADS, 0, stream>>>(a, g, stats, a.dropout.p > 0 ? 1 / a.dropout.scale : 1);
    LAUNCH_CHECK();
}

}  // namespace softmax_bwd
}  // namespace gpu
