// Lightning attention's recurrence, forward, backward and token by token, and the gated norm behind it: the twins of what stands in attention.h, section 5.
//
//     q, k, v = SiLU(u), u = x·Wqkvᵀ (N,3C)      S_t = λ·S_{t−1} + k_tᵀv_t      o_t = c·q_t·S_t      λ = e^{−s}, a decay s >= 0 for each head
//
// Forward and backward are one function. A *sweep* goes over each sequence's tokens in one direction and computes from three rows a, b, d a token
//
//     S_t = λ·S_{t−1} + b_tᵀd_t      o_t = c·a_t·S_t = c·Σ_{j<=t} λ^{t−j}·(a_t·b_j)·d_j
//
//     forward    a = q,  b = k,  d = v       gives o
//     backward   a = do, b = v,  d = k       gives dq: its S is the transpose of forward's
//     and from the last token to the first
//                a = k,  b = q,  d = do      gives dv: its S is the gradient dS of forward's state
//                a = v,  b = do, d = q       gives dk: its S is the transpose of that dS, so that dv and dk can be made by one sweep (a pair)
//
// then du = dq⊙SiLU'(u_q) and so on. In chunks of n tokens, i and j counted from the chunk's first in the order of the sweep, S the state before it:
//
//     P_ij = λ^{i−j}·(a_i·b_j) for i >= j, else 0      O = c·(P·D + diag(λ^{i+1})·A·S)      S' = λⁿ·S + (diag(λ^{n−1−i})·B)ᵀD
//
// Exponents are differences of places, never negative. S is float32 from the first token to the last; as a factor of A·S it is rounded to bf16.
//
// Two schemes, as on the CPU. Sequential: a block takes a sequence and head from end to end, S in registers; each row is read once. Parallel: sequences
// are cut into *spans* of a few hundred tokens. What each span adds to the state (b and d are read), a scan over the spans, then all spans at once, each
// from its own state. That reads b and d twice, but fills the GPU when sequences and heads are few. Between spans states are float32 numbers in scratch
// memory, hs/512 of them for each number of o at the most. Backward computes them again: kept, they would be the largest thing that training keeps.
//
//   lightning_sweep_kernel1   token by token: any head size
//   lightning_sweep_kernel2   chunks, float32 arithmetic: head sizes up to some 250
//   lightning_sweep_kernel3   chunks, tensor cores: bf16, head sizes up to 128 that are multiples of 8
//
// The numbers are those of the ladders dev/cuda/lightning_forward.cu, lightning_backward.cu and lightning_gate.cu, which say what was tried and expected.
#pragma once

#include <algorithm>

#include "../../attention.h"
#include "common.cuh"
#include "gelu.cuh"
#include "layernorm.cuh"

namespace gpu {

// --------------------------------------------------------------------------------------------------------------------------------------------------
// 1. What kernels are told

// A piece of a sequence, in the order in which a sweep takes its tokens.
struct LightningSpan {
    int seq, begin, end;  // its sequence, which is the rows [begin, end)
    int index, spans;     // it is the index-th of the sequence's spans; an empty sequence has one
    int first, n;         // place of its first token, and how many it has
    // Place p of the span is the row row(reverse) ± p.
    __device__ int64_t row(bool reverse) const { return reverse ? end - 1 - first : begin + first; }
};

// One pass over N tokens. Handed to kernels by value; arrays are device memory.
struct Lightning {
    int num_seqs, heads, hs;
    int64_t tokens;         // N
    int max_len;            // of the longest sequence
    const int* cu_seqlens;  // (num_seqs+1)
    bool geometric;         // slopes: s_h = factor·2^{−8(h+1)/NH}; otherwise factor·8h/NH
    double factor;
    float scale;  // c

    // The state (NH,hs,hs) that each sequence starts from, and where it leaves its own: (num_seqs) pointers, null: zero, nowhere. Or both at once in the
    // decode states' blocks. A sequence may leave its state where it has started, but not where another one starts.
    const float* const* memory_from = nullptr;
    float* const* memory_to = nullptr;
    const AttentionState* states = nullptr;
    int min_len = 0;  // shorter sequences are left alone

    int span = 0;              // tokens; 0: each sequence is one span
    float* borders = nullptr;  // (N/span, NH,hs,hs): states between spans

    HOST_DEVICE int64_t channels() const { return (int64_t)heads * hs; }
    HOST_DEVICE int64_t head_state() const { return (int64_t)hs * hs; }
    // Spans are numbered so that a sequence's first one can be told from its first row; a few numbers between sequences stand for nothing.
    HOST_DEVICE int64_t slots() const { return span ? tokens / span + num_seqs : num_seqs; }

    __device__ double slope(int h) const { return geometric ? factor * exp2(-8.0 * (h + 1) / heads) : factor * 8 * h / heads; }

    // The span number `slot`; false: there is none, or nothing is to be done there.
    __device__ bool find(int64_t slot, LightningSpan& q) const {
        int low = 0, high = num_seqs - 1;
        if (!span) low = (int)slot;
        while (span && low < high) {  // the last sequence whose first span's number is not larger
            int middle = (low + high + 1) / 2;
            if (cu_seqlens[middle] / span + middle <= slot)
                low = middle;
            else
                high = middle - 1;
        }
        q.seq = low;
        q.begin = cu_seqlens[low];
        q.end = cu_seqlens[low + 1];
        int len = q.end - q.begin;
        q.index = span ? (int)(slot - (q.begin / span + low)) : 0;
        q.spans = span ? max(1, (len + span - 1) / span) : 1;
        q.first = q.index * span;
        q.n = span ? min(span, len - q.first) : len;
        return q.index < q.spans && len >= min_len;
    }
    // The state behind span i of sequence q.seq, which is not its last. Of len tokens at most (len−1)/span borders: no two sequences share one.
    __device__ float* border(const LightningSpan& q, int i, int h) const { return borders + ((q.begin / span + (int64_t)i) * heads + h) * head_state(); }

    // Where a sequence and head start and end; null: from zero, nowhere.
    __device__ const float* start(int seq, int h) const {
        const float* p = states ? states[seq].fixed : memory_from ? memory_from[seq] : nullptr;
        return p ? p + h * head_state() : nullptr;
    }
    __device__ float* finish(int seq, int h) const {
        float* p = states ? states[seq].fixed : memory_to ? memory_to[seq] : nullptr;
        return p ? p + h * head_state() : nullptr;
    }
    // Where a span starts and ends. The last of several leaves its state where it has started, because its sequence's first span may still have to read
    // what stands in the memory; lightning_finish_kernel carries it there.
    __device__ const float* start(const LightningSpan& q, int h) const { return q.index > 0 ? border(q, q.index - 1, h) : start(q.seq, h); }
    __device__ float* finish(const LightningSpan& q, int h) const {
        float* p = q.index == q.spans - 1 ? finish(q.seq, h) : nullptr;
        return p && q.spans > 1 ? border(q, q.spans - 2, h) : p;
    }
};

// Head h of row n: p[n·stride + h·hs ...], through SiLU if `silu`.
struct LightningRows {
    const floatX* p;
    int64_t stride;
    bool silu;
};
// Where a sweep writes, rows as above; multiplied by SiLU'(u) unless u is null.
struct LightningOutput {
    floatX* p;
    int64_t stride;
    const floatX* u;
    int64_t u_stride;
};
struct LightningSweep {
    LightningRows a, b, d;
    LightningOutput o;
    bool reverse;     // from the last token to the first
    bool transposed;  // memory_from holds the transpose of this sweep's states
    // A pair: at the same time the sweep of pair_a, d, b, whose states are the transposes. pair_a.p null: not.
    LightningRows pair_a;
    LightningOutput pair_o;
    LightningSweep second() const { return {pair_a, d, b, pair_o, reverse, !transposed, {}, {}}; }
};

inline Lightning make_lightning(const AttentionConfig& a, int num_seqs, int64_t tokens, int max_len, const int* cu_seqlens) {
    Lightning g{};
    g.num_seqs = num_seqs;
    g.heads = a.heads;
    g.hs = a.head_size();
    g.tokens = tokens;
    g.max_len = max_len;
    g.cu_seqlens = cu_seqlens;
    // lightning_slope() is one factor for all heads, times a function of h that kernels evaluate.
    g.geometric = a["decay"] == DECAY_MINIMAX;
    if (g.geometric) g.factor = lightning_slope(a, a.heads - 1) * 256;                         // 2^{−8} for the last head
    if (a["decay"] == DECAY_FLA && a.heads > 1) g.factor = lightning_slope(a, 1) / 8 * a.heads;  // 8/NH for head 1; head 0 never decays
    g.scale = (float)lightning_scale(a);
    return g;
}

// --------------------------------------------------------------------------------------------------------------------------------------------------
// 2. Token by token

// One block a sequence, head and `columns` columns of S, which do not need each other; a thread has one column, in shared memory: hs·columns + 2·hs floats.
__global__ void lightning_sweep_kernel1(Lightning g, LightningSweep w, int columns) {
    extern __shared__ int4 shared_memory[];
    float *S = (float*)shared_memory + threadIdx.x, *a = (float*)shared_memory + (int64_t)g.hs * columns, *b = a + g.hs;
    int h = blockIdx.x % g.heads, hs = g.hs, j = blockIdx.y * columns + threadIdx.x;
    bool mine = (int)threadIdx.x < columns && j < hs;
    LightningSpan q;
    if (!g.find(blockIdx.x / g.heads, q)) return;
    const float* from = g.start(q, h);
    float* to = g.finish(q, h);
    float lambda = (float)exp(-g.slope(h));

    if (mine)
        for (int64_t i = 0; i < hs; i++) S[i * columns] = !from ? 0 : w.transposed ? from[j * (int64_t)hs + i] : from[i * hs + j];
    for (int t = 0; t < q.n; t++) {
        int64_t n = q.row(w.reverse) + (w.reverse ? -t : t), head = (int64_t)h * hs;
        __syncthreads();
        for (int i = threadIdx.x; i < hs; i += blockDim.x) {
            float x = to_float(w.a.p[n * w.a.stride + head + i]), y = to_float(w.b.p[n * w.b.stride + head + i]);
            a[i] = w.a.silu ? silu(x) : x;
            b[i] = w.b.silu ? silu(y) : y;
        }
        __syncthreads();
        if (!mine) continue;
        float d = to_float(w.d.p[n * w.d.stride + head + j]), o = 0;
        if (w.d.silu) d = silu(d);
        for (int i = 0; i < hs; i++) {
            float x = lambda * S[i * columns] + b[i] * d;
            S[i * columns] = x;
            o += a[i] * x;
        }
        o *= g.scale;
        if (w.o.u) o *= silu_gradient(to_float(w.o.u[n * w.o.u_stride + head + j]));
        w.o.p[n * w.o.stride + head + j] = from_float<floatX>(o);
    }
    if (mine && to)
        for (int64_t i = 0; i < hs; i++) to[i * hs + j] = S[i * columns];
}

// --------------------------------------------------------------------------------------------------------------------------------------------------
// 3. In chunks, float32 arithmetic

constexpr int LIGHTNING_THREADS = 256;

// Tiles in shared memory; rows have an odd number of floats, so that a column's numbers lie in different banks.
struct LightningTiles2 {
    int chunk, columns, row, column_row;  // tokens, columns of S that a block has; floats from row to row of A and B, of D and S
    LightningTiles2(int hs, int chunk, int columns) : chunk(chunk), columns(columns), row(hs | 1), column_row(columns | 1) {}
    HOST_DEVICE int a() const { return 0; }                          // (chunk,hs)
    HOST_DEVICE int b() const { return chunk * row; }                // (chunk,hs)
    HOST_DEVICE int d() const { return b() + chunk * row; }          // (chunk,columns)
    HOST_DEVICE int p() const { return d() + chunk * column_row; }   // (chunk,chunk)
    HOST_DEVICE int decay() const { return p() + chunk * (chunk | 1); }  // (chunk+1): λ^i
    HOST_DEVICE int s() const { return decay() + chunk + 1; }        // (hs,columns)
    int64_t bytes(int hs) const { return (s() + (int64_t)hs * column_row) * (int64_t)sizeof(float); }
};

// c[i][j] += Σ_{k<K} x(m+16i, k)·y(k, n+16j), and with `weight` times weight[−k]; x(m,k) = x[m·xm + k·xk], y(k,n) = y[k·yk + n·yn]. What is behind row M or
// column N is computed from the last one, and not wanted.
__device__ inline void lightning_accumulate2(float (&c)[4][4], int m, int M, int n, int N, int K, const float* x, int xm, int xk, const float* y, int yk,
                                             int yn, const float* weight = nullptr) {
    const float *xs[4], *ys[4];
#pragma unroll
    for (int i = 0; i < 4; i++) {
        xs[i] = x + min(m + 16 * i, M - 1) * xm;
        ys[i] = y + min(n + 16 * i, N - 1) * yn;
    }
#pragma unroll 4
    for (int k = 0; k < K; k++) {
        float f = weight ? weight[-k] : 1, left[4], right[4];
#pragma unroll
        for (int i = 0; i < 4; i++) {
            left[i] = xs[i][k * xk] * f;
            right[i] = ys[i][k * yk];
        }
#pragma unroll
        for (int i = 0; i < 4; i++)
#pragma unroll
            for (int j = 0; j < 4; j++) c[i][j] += left[i] * right[j];
    }
}

// One block a span, head and t.columns columns of S and O. `own`: not the outputs, but what each span (except a sequence's last) adds to the state.
__global__ void __launch_bounds__(LIGHTNING_THREADS) lightning_sweep_kernel2(Lightning g, LightningSweep w, LightningTiles2 t, bool own) {
    extern __shared__ int4 shared_memory[];
    float* memory = (float*)shared_memory;
    float *A = memory + t.a(), *B = memory + t.b(), *D = memory + t.d(), *P = memory + t.p(), *decay = memory + t.decay(), *S = memory + t.s();
    int h = blockIdx.x % g.heads, hs = g.hs, j0 = blockIdx.y * t.columns, columns = min(t.columns, hs - j0), thread = threadIdx.x;
    int tm = thread / 16, tn = thread % 16, p_row = t.chunk | 1;  // this thread's rows tm, tm+16 ... and columns tn, tn+16 ... of 64 by 64
    LightningSpan q;
    if (!g.find(blockIdx.x / g.heads, q)) return;
    if (own && q.index == q.spans - 1) return;

    double slope = g.slope(h);
    const float* from = own ? nullptr : g.start(q, h);
    float* to = own ? g.border(q, q.index, h) : g.finish(q, h);
    bool transposed = w.transposed && q.index == 0;
    for (int i = thread; i <= t.chunk; i += LIGHTNING_THREADS) decay[i] = (float)exp(-slope * i);
    for (int e = thread; e < hs * columns; e += LIGHTNING_THREADS) {
        int i = e / columns, j = e % columns;
        S[i * t.column_row + j] = !from ? 0 : transposed ? from[(int64_t)(j0 + j) * hs + i] : from[(int64_t)i * hs + j0 + j];
    }

    int64_t first = q.row(w.reverse), step = w.reverse ? -1 : 1, head = (int64_t)h * hs;
    auto load = [&](float* tile, int tile_row, const LightningRows& x, int64_t row, int n, int c0, int width) {
        for (int e = thread; e < n * width; e += LIGHTNING_THREADS) {
            int i = e / width, c = e % width;
            float y = to_float(x.p[(row + step * i) * x.stride + head + c0 + c]);
            tile[i * tile_row + c] = x.silu ? silu(y) : y;
        }
    };
    for (int p = 0; p < q.n; p += t.chunk) {
        int n = min(t.chunk, q.n - p);
        int64_t row = first + step * p;
        if (!own) load(A, t.row, w.a, row, n, 0, hs);
        load(B, t.row, w.b, row, n, 0, hs);
        load(D, t.column_row, w.d, row, n, j0, columns);
        __syncthreads();
        if (!own) {
            float c[4][4] = {};
            lightning_accumulate2(c, tm, n, tn, n, hs, A, t.row, 1, B, 1, t.row);
#pragma unroll
            for (int i = 0; i < 4; i++)
#pragma unroll
                for (int j = 0; j < 4; j++) {
                    int y = tm + 16 * i, x = tn + 16 * j;
                    if (y < n && x < n) P[y * p_row + x] = x <= y ? c[i][j] * decay[y - x] : 0;
                    c[i][j] = 0;
                }
            __syncthreads();
            lightning_accumulate2(c, tm, n, tn, columns, hs, A, t.row, 1, S, t.column_row, 1);
#pragma unroll
            for (int i = 0; i < 4; i++)
#pragma unroll
                for (int j = 0; j < 4; j++) c[i][j] *= decay[min(tm + 16 * i, n - 1) + 1];
            lightning_accumulate2(c, tm, n, tn, columns, n, P, p_row, 1, D, t.column_row, 1);
#pragma unroll
            for (int i = 0; i < 4; i++)
#pragma unroll
                for (int j = 0; j < 4; j++) {
                    int y = tm + 16 * i, x = tn + 16 * j;
                    if (y >= n || x >= columns) continue;
                    int64_t r = row + step * y, at = head + j0 + x;
                    float o = g.scale * c[i][j];
                    if (w.o.u) o *= silu_gradient(to_float(w.o.u[r * w.o.u_stride + at]));
                    w.o.p[r * w.o.stride + at] = from_float<floatX>(o);
                }
            __syncthreads();  // all have read S
        }
        for (int m = tm; m - tm < hs; m += 64) {
            float c[4][4] = {};
            lightning_accumulate2(c, m, hs, tn, columns, n, B, 1, t.row, D, t.column_row, 1, decay + n - 1);
#pragma unroll
            for (int i = 0; i < 4; i++)
#pragma unroll
                for (int j = 0; j < 4; j++) {
                    int y = m + 16 * i, x = tn + 16 * j;
                    float& s = S[min(y, hs - 1) * t.column_row + min(x, columns - 1)];
                    if (y < hs && x < columns) s = decay[n] * s + c[i][j];
                }
        }
        __syncthreads();
    }
    if (!to) return;
    __syncthreads();  // if there was no token
    for (int e = thread; e < hs * columns; e += LIGHTNING_THREADS) {
        int i = e / columns, j = e % columns;
        to[(int64_t)i * hs + j0 + j] = S[i * t.column_row + j];
    }
}

// --------------------------------------------------------------------------------------------------------------------------------------------------
// 4. In chunks, tensor cores

#ifndef GPU_FLOAT32
namespace lightning_mma {

typedef __nv_bfloat16 bf16;
constexpr int CHUNK = 64;

enum Kind { STATES, SINGLE, PAIR };  // what spans add to the state; one sweep; a pair of them

// HS is the head size rounded up to 32, 64, 96 or 128; behind the head size everything is zero. Of a chunk's outputs four warps have 16 rows each; for the larger
// heads there are two groups of four, which share the columns. Of the state (HS,HS) the first HS/16 warps have 16 rows each, in registers.
template <int HS>
struct Shape {
    static constexpr int GROUPS = HS > 64 ? 2 : 1, WARPS = 4 * GROUPS, THREADS = 32 * WARPS;
    static constexpr int WIDTH = HS / GROUPS;  // columns of the output that a warp computes
    static constexpr int TILE = CHUNK * HS;    // numbers
};
// In shared memory: two stages of the tiles B, D, A, pair A, so that the next chunk is on its way while this one is worked on; then the state as bf16.
template <int KIND>
constexpr int TILES = KIND == STATES ? 2 : KIND == SINGLE ? 3 : 4;
template <int HS, int KIND>
constexpr int shared_bytes = 2 * (2 * TILES<KIND> * Shape<HS>::TILE + (KIND == STATES ? 0 : HS * HS));
// Blocks that should fit on a multiprocessor of an H100: what its shared memory has room for, except where their registers would not.
template <int HS, int KIND>
constexpr int BLOCKS = HS <= 64 ? (KIND == STATES ? 6 : KIND == SINGLE ? 4 : 3) : KIND == STATES ? 2 : HS == 96 && KIND == SINGLE ? 2 : 1;

// ---- instructions. A warp's 32 threads: row = lane/4, column = 2·(lane%4). A register holds two neighbours of a row, the left one in its lower half.
//   a (16x16): a[0] (row, column)   a[1] (row+8, column)   a[2] (row, column+8)   a[3] (row+8, column+8)
//   b (16x8):  b0 (rows column, column+1; column row)      b1 (rows column+8, column+9; column row)
//   c (16x8):  c[0], c[1] (row, column and column+1)       c[2], c[3] (row+8, the same)

__device__ inline int lane() { return threadIdx.x % 32; }
__device__ inline int lane_row() { return threadIdx.x % 32 / 4; }
__device__ inline int lane_column() { return threadIdx.x % 4 * 2; }

__device__ inline uint32_t shared_address(const void* p) { return (uint32_t)__cvta_generic_to_shared(p); }

// Four 8x8 matrices whose rows start at the addresses that lanes 0-7, 8-15, 16-23 and 24-31 give; each thread gets (row, column), (row, column+1) of them,
// or of their transposes.
__device__ inline void ldmatrix(uint32_t (&r)[4], const bf16* p) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared_address(p))
                 : "memory");
}
__device__ inline void ldmatrix_transposed(uint32_t (&r)[4], const bf16* p) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared_address(p))
                 : "memory");
}
__device__ inline void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
// 16 bytes to shared memory; zeros unless `there`. The address must be good in any case.
__device__ inline void copy_async16(void* to, const void* from, bool there) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from), "r"(there ? 16 : 0) : "memory");
}
// Until all that this thread has asked for is there.
__device__ inline void wait_for_copies() { asm volatile("cp.async.wait_all;" ::: "memory"); }

__device__ inline float exp2_fast(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
__device__ inline float reciprocal(float x) {
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
__device__ inline uint32_t pack(float left, float right) {
    __nv_bfloat162 x = __floats2bfloat162_rn(left, right);
    return *(uint32_t*)&x;
}
__device__ inline float2 unpack(uint32_t x) { return make_float2(__uint_as_float(x << 16), __uint_as_float(x & 0xffff0000)); }

// ---- SiLU of two numbers. The special function unit is what these kernels come close to filling: two sigmoids share one reciprocal.

// 1/(1+e^{−x}): r = 1/(a·b), 1/a = r·b, 1/b = r·a. Below −40, where the sigmoid is 0 to anyone, it stays at e^{−40}: a·b must not overflow.
__device__ inline float2 sigmoids(float2 x) {
    constexpr float log2e = 1.44269504f;
    float a = 1 + exp2_fast(log2e * fminf(-x.x, 40)), b = 1 + exp2_fast(log2e * fminf(-x.y, 40)), r = reciprocal(a * b);
    return make_float2(r * b, r * a);
}
__device__ inline uint32_t silus(uint32_t u) {
    float2 x = unpack(u), s = sigmoids(x);
    return pack(x.x * s.x, x.y * s.y);
}
// o⊙SiLU'(u)
__device__ inline uint32_t times_silu_gradients(uint32_t o, uint32_t u) {
    float2 y = unpack(o), x = unpack(u), s = sigmoids(x);
    return pack(y.x * s.x * (1 + x.x * (1 - s.x)), y.y * s.y * (1 + x.y * (1 - s.y)));
}

// ---- tiles: rows of HS/8 pieces of 8 numbers. A row's pieces are exchanged among each other, depending on the row, so that the same piece of 8 rows behind one
// another lies in 8 different groups of banks: those are what ldmatrix reads at a time.

template <int HS>
__device__ inline int place(int row, int piece) {
    return row * HS + (piece ^ (HS % 64 == 0 ? row & 7 : row >> 1 & 3)) * 8;
}
// The 16x16 block at (r, c) of a tile: by_rows with the matrices in the order (0,0), (8,0), (0,8), (8,8), by_columns in the order (0,0), (0,8), (8,0), (8,8).
// So a block is an `a` operand by_rows; the transpose of a block is one by_columns and transposed. Two neighbouring `b` operands (b0, b1, b0, b1) of
// B (depth, columns) are by_rows and transposed if the tile holds B, by_columns if it holds Bᵀ.
template <int HS>
__device__ inline const bf16* by_rows(const bf16* tile, int r, int c) {
    return tile + place<HS>(r + lane() % 16, c / 8 + lane() / 16);
}
template <int HS>
__device__ inline const bf16* by_columns(const bf16* tile, int r, int c) {
    return tile + place<HS>(r + lane() / 16 * 8 + lane() % 8, c / 8 + lane() / 8 % 2);
}

// Calls f(row, piece) for this thread's pieces of a chunk's tile: always the same.
template <int HS, class F>
__device__ inline void for_pieces(F f) {
#pragma unroll
    for (int e = 0; e < Shape<HS>::TILE / 8; e += Shape<HS>::THREADS) {
        int i = e + threadIdx.x;
        f(i / (HS / 8), i % (HS / 8));
    }
}
// n rows from `row` on, `step` apart, and zeros behind them. What a thread has copied here it turns into SiLU of it in silu_tile(), without a barrier between.
template <int HS>
__device__ inline void load_tile(bf16* tile, const LightningRows& x, int64_t row, int step, int n, int head, int hs) {
    for_pieces<HS>([&](int i, int piece) {
        bool there = i < n && piece * 8 < hs;
        copy_async16(tile + place<HS>(i, piece), there ? x.p + (row + step * i) * x.stride + head + piece * 8 : x.p, there);
    });
}
template <int HS>
__device__ inline void silu_tile(bf16* tile) {
    for_pieces<HS>([&](int i, int piece) {
        uint4* p = (uint4*)(tile + place<HS>(i, piece));
        uint4 x = *p;
        *p = make_uint4(silus(x.x), silus(x.y), silus(x.z), silus(x.w));
    });
}

// P as `a` operands, rows 16r.. of a chunk: P_ij = λ^{i−j}·(a_i·b_j) for i >= j, else 0; p[b] is its columns 16b.. , not defined for b > r. −slope2 = log2(λ).
template <int HS>
__device__ inline void scores(uint32_t (&p)[4][4], const bf16* A, const bf16* B, int r, float slope2) {
    float c[8][4] = {};
#pragma unroll
    for (int k = 0; k < HS / 16; k++) {
        uint32_t a[4];
        ldmatrix(a, by_rows<HS>(A, 16 * r, 16 * k));
#pragma unroll
        for (int b = 0; b < 4; b++) {
            if (b > r) continue;
            uint32_t y[4];
            ldmatrix(y, by_columns<HS>(B, 16 * b, 16 * k));
            mma(c[2 * b], a, y[0], y[1]);
            mma(c[2 * b + 1], a, y[2], y[3]);
        }
    }
#pragma unroll
    for (int b = 0; b < 4; b++) {
        if (b > r) continue;
#pragma unroll
        for (int e = 0; e < 8; e++) {
            int back = 16 * (r - b) + lane_row() + e / 2 % 2 * 8 - (lane_column() + e / 4 * 8 + e % 2);  // i − j
            float& x = c[2 * b + e / 4][e % 4];
            x = back >= 0 ? x * exp2_fast(-slope2 * (float)max(back, 0)) : 0;
        }
        p[b][0] = pack(c[2 * b][0], c[2 * b][1]);
        p[b][1] = pack(c[2 * b][2], c[2 * b][3]);
        p[b][2] = pack(c[2 * b + 1][0], c[2 * b + 1][1]);
        p[b][3] = pack(c[2 * b + 1][2], c[2 * b + 1][3]);
    }
}

// o (16,WIDTH) = diag(λ^{i+1})·A·S, or A·Sᵀ: rows 16r.. of the chunk, columns from `column` on.
template <int HS, bool TRANSPOSED>
__device__ inline void times_state(float (&o)[Shape<HS>::WIDTH / 8][4], const bf16* A, const bf16* state, int r, int column, float slope2) {
    constexpr int WIDTH = Shape<HS>::WIDTH;
#pragma unroll
    for (int n = 0; n < WIDTH / 8; n++) o[n][0] = o[n][1] = o[n][2] = o[n][3] = 0;
#pragma unroll
    for (int k = 0; k < HS / 16; k++) {
        uint32_t a[4];
        ldmatrix(a, by_rows<HS>(A, 16 * r, 16 * k));
#pragma unroll
        for (int n = 0; n < WIDTH / 16; n++) {
            uint32_t s[4];
            if (TRANSPOSED)
                ldmatrix(s, by_columns<HS>(state, column + 16 * n, 16 * k));
            else
                ldmatrix_transposed(s, by_rows<HS>(state, 16 * k, column + 16 * n));
            mma(o[2 * n], a, s[0], s[1]);
            mma(o[2 * n + 1], a, s[2], s[3]);
        }
    }
    float above = exp2_fast(-slope2 * (float)(16 * r + lane_row() + 1)), below = exp2_fast(-slope2 * (float)(16 * r + lane_row() + 9));
#pragma unroll
    for (int n = 0; n < WIDTH / 8; n++) {
        o[n][0] *= above, o[n][1] *= above;
        o[n][2] *= below, o[n][3] *= below;
    }
}

}  // namespace lightning_mma

template <int HS, int KIND>
__global__ void __launch_bounds__(lightning_mma::Shape<HS>::THREADS, (lightning_mma::BLOCKS<HS, KIND>))
    lightning_sweep_kernel3(const Lightning g, const LightningSweep w) {
    using namespace lightning_mma;
    constexpr int GROUPS = Shape<HS>::GROUPS, WARPS = Shape<HS>::WARPS, WIDTH = Shape<HS>::WIDTH, TILE = Shape<HS>::TILE, STAGE = TILES<KIND> * TILE;
    constexpr int PIECES = 16 * WIDTH / 8 / 32;  // a thread has of its warp's output
    extern __shared__ int4 shared_memory[];
    bf16 *tiles = (bf16*)shared_memory, *state = tiles + 2 * STAGE;
    int warp = threadIdx.x / 32, column = GROUPS == 1 ? 0 : warp / 4 * WIDTH, h = blockIdx.x % g.heads, hs = g.hs, head = h * hs;
    LightningSpan q;
    if (!g.find(blockIdx.x / g.heads, q)) return;
    if (KIND == STATES && q.index == q.spans - 1) return;

    double slope = g.slope(h);
    float slope2 = (float)(slope * 1.4426950408889634), full = (float)exp(-slope * CHUNK);
    int chunks = (q.n + CHUNK - 1) / CHUNK, step = w.reverse ? -1 : 1;
    int64_t first = q.row(w.reverse);
    auto load = [&](int chunk) {
        bf16* to = tiles + chunk % 2 * STAGE;
        int64_t row = first + (int64_t)step * CHUNK * chunk;
        int n = min(CHUNK, q.n - CHUNK * chunk);
        load_tile<HS>(to, w.b, row, step, n, head, hs);
        load_tile<HS>(to + TILE, w.d, row, step, n, head, hs);
        if constexpr (KIND != STATES) load_tile<HS>(to + 2 * TILE, w.a, row, step, n, head, hs);
        if constexpr (KIND == PAIR) load_tile<HS>(to + 3 * TILE, w.pair_a, row, step, n, head, hs);
    };
    if (chunks > 0) load(0);

    // The state, rows 16·warp.. . In s[0] the columns from `column` on, which are also those of this warp's outputs; with two groups in s[1] the others.
    bool has_state = WARPS * 16 == HS || warp < HS / 16;
    float s[GROUPS][WIDTH / 8][4];
    auto for_state = [&](auto f) {  // f(row, column, number) for this thread's numbers
#pragma unroll
        for (int y = 0; y < GROUPS; y++)
#pragma unroll
            for (int n = 0; n < WIDTH / 8; n++)
#pragma unroll
                for (int e = 0; e < 4; e++)
                    f(16 * warp + lane_row() + e / 2 * 8, (y == 0 ? column : WIDTH - column) + 8 * n + lane_column() + e % 2, s[y][n][e]);
    };
    const float* from = KIND == STATES ? nullptr : g.start(q, h);
    bool turned = w.transposed && q.index == 0;
    for_state([&](int i, int j, float& x) {
        x = 0;
        if (from && i < hs && j < hs) x = turned ? from[j * hs + i] : from[i * hs + j];
    });
    auto store_state = [&] {
        if (!has_state) return;
#pragma unroll
        for (int y = 0; y < GROUPS; y++)
#pragma unroll
            for (int n = 0; n < WIDTH / 8; n++)
#pragma unroll
                for (int e = 0; e < 4; e += 2) {
                    int i = 16 * warp + lane_row() + e / 2 * 8, j = (y == 0 ? column : WIDTH - column) + 8 * n;
                    *(uint32_t*)(state + place<HS>(i, j / 8) + lane_column()) = pack(s[y][n][e], s[y][n][e + 1]);
                }
    };
    if constexpr (KIND != STATES) store_state();

    for (int chunk = 0; chunk < chunks; chunk++) {
        bf16 *B = tiles + chunk % 2 * STAGE, *D = B + TILE, *A = D + TILE, *pair_A = A + TILE;
        int n = min(CHUNK, q.n - CHUNK * chunk);
        wait_for_copies();
        if (w.b.silu) silu_tile<HS>(B);
        if (w.d.silu) silu_tile<HS>(D);
        if constexpr (KIND != STATES)
            if (w.a.silu) silu_tile<HS>(A);
        if constexpr (KIND == PAIR)
            if (w.pair_a.silu) silu_tile<HS>(pair_A);
        __syncthreads();  // the tiles and the state are there, and nobody is left in the other stage
        if (chunk + 1 < chunks) load(chunk + 1);

        // Which 16 rows of the outputs a warp has changes from chunk to chunk (and from block to block), because the upper ones need less of P, and a warp stays
        // on one of the multiprocessor's four parts.
        int r = (warp + chunk + (blockIdx.x >> 2)) % 4;
        uint32_t p[4][4];
        float o[WIDTH / 8][4];
        if constexpr (KIND != STATES) {
            scores<HS>(p, A, B, r, slope2);
            times_state<HS, false>(o, A, state, r, column, slope2);
        }
        // O += P·D and S = λⁿ·S + (diag(λ^{n−1−i})·B)ᵀD share what they read of D.
        float decay = n == CHUNK ? full : exp2f(-slope2 * (float)n);
#pragma unroll
        for (int y = 0; y < GROUPS; y++)
#pragma unroll
            for (int k = 0; k < WIDTH / 8; k++)
#pragma unroll
                for (int e = 0; e < 4; e++) s[y][k][e] *= decay;
#pragma unroll
        for (int b = 0; b < 4; b++) {
            uint32_t x[4] = {};
            if (has_state) {
                ldmatrix_transposed(x, by_columns<HS>(B, 16 * b, 16 * warp));
                float f[4];
#pragma unroll
                for (int e = 0; e < 4; e++) {
                    int left = n - 1 - (16 * b + lane_column() + e / 2 * 8 + e % 2);  // tokens behind this one
                    f[e] = left >= 0 ? exp2_fast(-slope2 * (float)max(left, 0)) : 0;
                }
#pragma unroll
                for (int e = 0; e < 4; e++) {
                    float2 z = unpack(x[e]);
                    x[e] = pack(z.x * f[e / 2 * 2], z.y * f[e / 2 * 2 + 1]);
                }
            }
#pragma unroll
            for (int k = 0; k < WIDTH / 16; k++)
#pragma unroll
                for (int y = 0; y < GROUPS; y++) {
                    uint32_t d[4];
                    ldmatrix_transposed(d, by_rows<HS>(D, 16 * b, (y == 0 ? column : WIDTH - column) + 16 * k));
                    if constexpr (KIND != STATES) {
                        if (y == 0 && b <= r) {
                            mma(o[2 * k], p[b], d[0], d[1]);
                            mma(o[2 * k + 1], p[b], d[2], d[3]);
                        }
                    }
                    if (has_state) {
                        mma(s[y][2 * k], x, d[0], d[1]);
                        mma(s[y][2 * k + 1], x, d[2], d[3]);
                    }
                }
        }
        if constexpr (KIND == STATES) continue;

        // Results wait as bf16 until nobody needs the tiles A and the state any more; what the outputs are to be multiplied with is fetched meanwhile.
        int64_t row = first + (int64_t)step * (CHUNK * chunk + 16 * r);
        auto result = [&](uint32_t(&to)[WIDTH / 8][2]) {
#pragma unroll
            for (int k = 0; k < WIDTH / 8; k++) {
                to[k][0] = pack(g.scale * o[k][0], g.scale * o[k][1]);
                to[k][1] = pack(g.scale * o[k][2], g.scale * o[k][3]);
            }
        };
        auto for_output = [&](auto f) {  // f(number of the piece, its row among this warp's 16, its place in a row, whether it exists)
#pragma unroll
            for (int e = 0; e < PIECES; e++) {
                int piece = lane() + 32 * e, i = piece / (WIDTH / 8), c = column / 8 + piece % (WIDTH / 8);
                f(e, i, c, 16 * r + i < n && c * 8 < hs);
            }
        };
        auto fetch = [&](uint4(&u)[PIECES], const LightningOutput& out) {
            for_output([&](int e, int i, int c, bool there) {
                u[e] = make_uint4(0, 0, 0, 0);
                if (out.u && there) u[e] = *(const uint4*)(out.u + (row + step * i) * out.u_stride + head + c * 8);
            });
        };
        // Through this warp's part of a tile, from where rows go to global memory 16 bytes at a time.
        auto store = [&](const LightningOutput& out, const uint32_t(&from)[WIDTH / 8][2], const uint4(&u)[PIECES], bf16* tile) {
#pragma unroll
            for (int k = 0; k < WIDTH / 8; k++)
#pragma unroll
                for (int e = 0; e < 2; e++)
                    *(uint32_t*)(tile + place<HS>(16 * r + lane_row() + 8 * e, column / 8 + k) + lane_column()) = from[k][e];
            __syncwarp();
            for_output([&](int e, int i, int c, bool there) {
                uint4 x = *(const uint4*)(tile + place<HS>(16 * r + i, c));
                if (out.u)
                    x = make_uint4(times_silu_gradients(x.x, u[e].x), times_silu_gradients(x.y, u[e].y), times_silu_gradients(x.z, u[e].z),
                                   times_silu_gradients(x.w, u[e].w));
                if (there) *(uint4*)(out.p + (row + step * i) * out.stride + head + c * 8) = x;
            });
        };
        uint32_t out[WIDTH / 8][2];
        result(out);
        if constexpr (KIND == PAIR) {
            // The second sweep's P comes from pair_A and D, its states are the transposes, and its P is multiplied with B.
            scores<HS>(p, pair_A, D, r, slope2);
            times_state<HS, true>(o, pair_A, state, r, column, slope2);
#pragma unroll
            for (int b = 0; b < 4; b++) {
                if (b > r) continue;
#pragma unroll
                for (int k = 0; k < WIDTH / 16; k++) {
                    uint32_t y[4];
                    ldmatrix_transposed(y, by_rows<HS>(B, 16 * b, column + 16 * k));
                    mma(o[2 * k], p[b], y[0], y[1]);
                    mma(o[2 * k + 1], p[b], y[2], y[3]);
                }
            }
            uint32_t pair_out[WIDTH / 8][2];
            uint4 u[PIECES], pair_u[PIECES];
            result(pair_out);
            fetch(u, w.o);
            fetch(pair_u, w.pair_o);
            __syncthreads();
            store_state();
            store(w.o, out, u, A);
            store(w.pair_o, pair_out, pair_u, pair_A);
        } else {
            uint4 u[PIECES];
            fetch(u, w.o);
            __syncthreads();
            store_state();
            store(w.o, out, u, A);
        }
    }

    float* to = KIND == STATES ? g.border(q, q.index, h) : g.finish(q, h);
    if (!to || !has_state) return;
    for_state([&](int i, int j, float& x) {
        if (i < hs && j < hs) to[i * hs + j] = x;
    });
}
#endif

// --------------------------------------------------------------------------------------------------------------------------------------------------
// 5. States between spans, and at the ends

// borders hold what every span but a sequence's last adds, and become the states behind these spans: S_i = λ^span·S_{i−1} + own_i. A block has 256 numbers
// of the state of a sequence and head.
__global__ void lightning_scan_kernel(Lightning g, bool transposed) {
    int h = blockIdx.x % g.heads, hs = g.hs;
    int64_t e = (int64_t)blockIdx.y * blockDim.x + threadIdx.x, step = g.heads * g.head_state();
    LightningSpan q;
    q.seq = blockIdx.x / g.heads;
    q.begin = g.cu_seqlens[q.seq];
    int len = g.cu_seqlens[q.seq + 1] - q.begin, borders = (len - 1) / g.span;
    if (len < g.min_len || len == 0 || e >= g.head_state()) return;
    float factor = (float)exp(-g.slope(h) * g.span);
    const float* start = g.start(q.seq, h);
    float S = !start ? 0 : transposed ? start[e % hs * hs + e / hs] : start[e];
    float* at = g.border(q, 0, h) + e;
    for (int i = 0; i < borders; i += 8) {  // eight loads on their way at a time
        float own[8];
#pragma unroll
        for (int j = 0; j < 8; j++) own[j] = i + j < borders ? at[j * step] : 0;
#pragma unroll
        for (int j = 0; j < 8; j++) {
            if (i + j >= borders) break;
            S = factor * S + own[j];
            at[j * step] = S;
        }
        at += 8 * step;
    }
}

// Where sequences of several spans have left their states (Lightning::finish), from there to memory.
__global__ void lightning_finish_kernel(Lightning g) {
    int h = blockIdx.x % g.heads;
    int64_t e = (int64_t)blockIdx.y * blockDim.x + threadIdx.x;
    LightningSpan q;
    q.seq = blockIdx.x / g.heads;
    q.begin = g.cu_seqlens[q.seq];
    int len = g.cu_seqlens[q.seq + 1] - q.begin;
    float* to = g.finish(q.seq, h);
    if (len <= g.span || len < g.min_len || !to || e >= g.head_state()) return;
    to[e] = g.border(q, (len - 1) / g.span - 1, h)[e];
}

// starts[s]: null where memory_from[s] is, otherwise the next free one of `copies`, (carried memories, size) numbers; with `copy` memory_from[s] goes there.
// Blocks (s, piece) copy in pieces.
__global__ void lightning_starts_kernel(const float** starts, float* copies, const float* const* memory_from, int64_t size, bool copy) {
    int s = blockIdx.x, before = 0;
    for (int k = 0; k < s; k += blockDim.x) before += __syncthreads_count(k + (int)threadIdx.x < s && memory_from[k + threadIdx.x]);
    const float* from = memory_from[s];
    float* to = copies + before * size;
    if (blockIdx.y == 0 && threadIdx.x == 0) starts[s] = from ? to : nullptr;
    if (!from || !copy) return;
    for (int64_t i = (int64_t)blockIdx.y * blockDim.x + threadIdx.x; i < size; i += (int64_t)gridDim.y * blockDim.x) to[i] = from[i];
}

// --------------------------------------------------------------------------------------------------------------------------------------------------
// 6. Launching

constexpr int LIGHTNING_MIN_SPAN = 512, LIGHTNING_MAX_SPAN = 2048;

// Bytes of scratch memory that the recurrence over N tokens takes, forward or backward.
inline int64_t lightning_recurrence_scratch(const AttentionConfig& a, int64_t N) {
    return scratch_bytes({N / LIGHTNING_MIN_SPAN * a.channels * a.head_size() * (int64_t)sizeof(float)});
}

inline int64_t lightning_shared_limit() { return (int64_t)device_properties().sharedMemPerBlockOptin; }

#ifndef GPU_FLOAT32
inline bool lightning_aligned(const LightningRows& x) { return x.stride % 8 == 0 && aligned16(x.p); }
inline bool lightning_aligned(const LightningOutput& x) { return x.stride % 8 == 0 && aligned16(x.p) && x.u_stride % 8 == 0 && aligned16(x.u); }
// Calls f(std::integral_constant<int, HS>).
template <class F>
inline void lightning_with_padded_head_size(int hs, F f) {
    if (hs <= 32)
        f(std::integral_constant<int, 32>());
    else if (hs <= 64)
        f(std::integral_constant<int, 64>());
    else if (hs <= 96)
        f(std::integral_constant<int, 96>());
    else
        f(std::integral_constant<int, 128>());
}
#endif

// How a sweep is to be done: by which kernel, in which scheme, and whether pairs are taken at once. What is not possible is replaced by what is.
struct LightningMethod {
    int kernel = 3;
    LightningScheme scheme = SCHEME_AUTO;
    bool pairs = true;
};

// The kernel for a sweep, how its blocks look, and how many of them a multiprocessor holds.
struct LightningPlan {
    int kernel = 0, chunk = 0, columns = 0;
    int64_t shared = 0;
    int column_blocks(int hs) const { return (int)ceil_div(hs, columns); }
    int resident() const { return (int)std::clamp<int64_t>((int64_t)device_properties().sharedMemPerMultiprocessor / (shared + 1024), 1, 4); }
};

inline LightningPlan lightning_plan(const Lightning& g, const LightningSweep& w, int kernel) {
    LightningPlan plan;
    int hs = g.hs;
    int64_t limit = lightning_shared_limit();
#ifndef GPU_FLOAT32
    bool pair = w.pair_a.p != nullptr;
    if (kernel == 3 && hs % 8 == 0 && hs <= 128 && lightning_aligned(w.a) && lightning_aligned(w.b) && lightning_aligned(w.d) && lightning_aligned(w.o) &&
        (!pair || (lightning_aligned(w.pair_a) && lightning_aligned(w.pair_o)))) {
        lightning_with_padded_head_size(hs, [&](auto HS) {
            using namespace lightning_mma;
            plan.shared = pair ? shared_bytes<HS.value, PAIR> : shared_bytes<HS.value, SINGLE>;
        });
        plan.kernel = 3;
        plan.chunk = 64;
        plan.columns = hs;
        if (plan.shared <= limit) return plan;
    }
#else
    (void)w;
#endif
    plan.kernel = 2;
    plan.columns = std::min(hs, 64);
    for (plan.chunk = 64; kernel >= 2 && plan.chunk >= 16; plan.chunk /= 2) {
        plan.shared = LightningTiles2(hs, plan.chunk, plan.columns).bytes(hs);
        if (plan.shared <= limit) return plan;
    }
    plan.kernel = 1;
    plan.columns = (int)std::min<int64_t>({hs, 128, limit / (int64_t)sizeof(float) / hs - 2});
    if (plan.columns < 1) usage_error("a head size of %d is too large for this GPU: raise --heads", hs);
    plan.shared = ((int64_t)hs * plan.columns + 2 * hs) * (int64_t)sizeof(float);
    return plan;
}

// Tokens a span, 0: the sequential scheme. That one reads everything once, but has only a block for each sequence and head: it is chosen if these fill two
// thirds of the GPU, or if no sequence is long enough to be cut. Otherwise spans are so long that three times as many blocks as the GPU holds share the work.
inline int lightning_span(const Lightning& g, const LightningPlan& plan, LightningScheme scheme) {
    if (plan.kernel == 1 || scheme == SCHEME_SEQUENTIAL || g.max_len <= LIGHTNING_MIN_SPAN) return 0;
    int64_t work = g.tokens * g.heads * plan.column_blocks(g.hs), resident = (int64_t)device_properties().multiProcessorCount * plan.resident();
    if (scheme == SCHEME_AUTO && 3 * (work / g.max_len) >= 2 * resident) return 0;
    int64_t span = std::clamp<int64_t>(work / (3 * resident) / 64 * 64, LIGHTNING_MIN_SPAN, LIGHTNING_MAX_SPAN);
    return span >= g.max_len ? 0 : (int)span;
}

// One of the two passes over the spans (or the only one). own: what spans add, into the borders.
inline void lightning_launch(cudaStream_t stream, const Lightning& g, const LightningSweep& w, const LightningPlan& plan, bool own) {
    dim3 grid((unsigned)(g.slots() * g.heads), (unsigned)plan.column_blocks(g.hs));
    if (plan.kernel == 1) {
        allow_shared_memory(lightning_sweep_kernel1, plan.shared);
        lightning_sweep_kernel1<<<grid, (unsigned)round_up(plan.columns, 32), plan.shared, stream>>>(g, w, plan.columns);
    } else if (plan.kernel == 2) {
        allow_shared_memory(lightning_sweep_kernel2, plan.shared);
        lightning_sweep_kernel2<<<grid, LIGHTNING_THREADS, plan.shared, stream>>>(g, w, LightningTiles2(g.hs, plan.chunk, plan.columns), own);
    } else {
#ifndef GPU_FLOAT32
        lightning_with_padded_head_size(g.hs, [&](auto HS) {
            using namespace lightning_mma;
            constexpr int hs = HS.value;
            auto launch = [&](auto* kernel, int shared) {
                allow_shared_memory(kernel, shared);
                kernel<<<grid, Shape<hs>::THREADS, shared, stream>>>(g, w);
            };
            if (own)
                launch(lightning_sweep_kernel3<hs, STATES>, shared_bytes<hs, STATES>);
            else if (w.pair_a.p)
                launch(lightning_sweep_kernel3<hs, PAIR>, shared_bytes<hs, PAIR>);
            else
                launch(lightning_sweep_kernel3<hs, SINGLE>, shared_bytes<hs, SINGLE>);
        });
#endif
    }
    LAUNCH_CHECK();
}

inline void lightning_sweep(cudaStream_t stream, Lightning g, LightningSweep w, Scratch scratch, const LightningMethod& method) {
    if (g.num_seqs == 0) return;
    LightningPlan plan = lightning_plan(g, w, method.kernel);
    if (w.pair_a.p && (plan.kernel < 3 || !method.pairs)) {  // one behind the other
        LightningSweep second = w.second();
        w.pair_a.p = nullptr;
        lightning_sweep(stream, g, w, scratch, method);
        lightning_sweep(stream, g, second, scratch, method);
        return;
    }
    g.span = lightning_span(g, plan, method.scheme);
    if (g.span == 0) {
        lightning_launch(stream, g, w, plan, false);
        return;
    }
    g.borders = scratch.take<float>(g.tokens / g.span * g.heads * g.head_state());
    dim3 grid((unsigned)(g.num_seqs * g.heads), (unsigned)ceil_div(g.head_state(), 256));
    lightning_launch(stream, g, w, plan, true);
    lightning_scan_kernel<<<grid, 256, 0, stream>>>(g, w.transposed);
    LAUNCH_CHECK();
    lightning_launch(stream, g, w, plan, false);
    if (!g.memory_to && !g.states) return;
    lightning_finish_kernel<<<grid, 256, 0, stream>>>(g);
    LAUNCH_CHECK();
}

// o (N,C) from u (N,3C), and the states that g.memory_to or g.states point at. cpu::lightning_recurrence_forward.
inline void lightning_recurrence_forward(cudaStream_t stream, const Lightning& g, const floatX* u, floatX* o, Scratch scratch, const LightningMethod& method) {
    int64_t C = g.channels();
    LightningSweep w = {{u, 3 * C, true}, {u + C, 3 * C, true}, {u + 2 * C, 3 * C, true}, {o, C, nullptr, 0}, false, false, {}, {}};
    lightning_sweep(stream, g, w, scratch, method);
}

// du (N,3C) from d_o (N,C) and u (N,3C). Gradients stop at the states that sequences start from (g.memory_from). cpu::lightning_recurrence_backward.
inline void lightning_recurrence_backward(cudaStream_t stream, Lightning g, const floatX* u, const floatX* d_o, floatX* du, Scratch scratch,
                                          const LightningMethod& method) {
    int64_t C = g.channels();
    LightningRows q = {u, 3 * C, true}, k = {u + C, 3 * C, true}, v = {u + 2 * C, 3 * C, true}, gradient = {d_o, C, false};
    LightningOutput dq = {du, 3 * C, u, 3 * C}, dk = {du + C, 3 * C, u + C, 3 * C}, dv = {du + 2 * C, 3 * C, u + 2 * C, 3 * C};
    g.memory_to = nullptr;
    lightning_sweep(stream, g, {gradient, v, k, dq, false, true, {}, {}}, scratch, method);
    g.memory_from = nullptr;
    lightning_sweep(stream, g, {k, q, gradient, dv, true, false, v, dk}, scratch, method);
}

// memory_from (num_seqs; device) as a table of the same in `copies`, where with `copy` they are put; `starts` (num_seqs). Forward keeps what sequences start
// from, because another sequence may leave its state in the same place.
inline void lightning_starts(cudaStream_t stream, const float** starts, float* copies, const float* const* memory_from, int num_seqs, int64_t size, bool copy) {
    if (num_seqs == 0) return;
    lightning_starts_kernel<<<dim3(num_seqs, copy ? (unsigned)std::min<int64_t>(32, ceil_div(size, 1024)) : 1), 256, 0, stream>>>(starts, copies, memory_from,
                                                                                                                              size, copy);
    LAUNCH_CHECK();
}

// --------------------------------------------------------------------------------------------------------------------------------------------------
// 7. One more token

// S = λ·S + kᵀv, o = c·q·S for each sequence of one token: a block a sequence and head. S is read and written once, V columns (16 or 4 bytes) a thread, rows
// shared among the groups of threads that make a row.
constexpr int LIGHTNING_STEP_SUMS = 4 * LIGHTNING_THREADS;  // floats: a thread's columns

template <int V>
__device__ inline void lightning_step(float* S, const float* q, const float* k, const float* v, float lambda, int hs, float* sums, int* groups_out) {
    constexpr int AHEAD = 4;  // rows on their way
    int vectors = hs / V, width = min(vectors, LIGHTNING_THREADS), groups = LIGHTNING_THREADS / width, group = threadIdx.x / width;
    *groups_out = groups;
    if (group >= groups) return;
    for (int c = threadIdx.x % width * V; c < hs; c += width * V) {
        float o[V] = {};
        for (int i0 = group; i0 < hs; i0 += AHEAD * groups) {
            alignas(16) float x[AHEAD][V] = {};
#pragma unroll
            for (int a = 0; a < AHEAD; a++) {
                int i = i0 + a * groups;
                if (i >= hs) break;
                if constexpr (V == 4)
                    *(float4*)x[a] = *(const float4*)(S + (int64_t)i * hs + c);
                else
                    x[a][0] = S[(int64_t)i * hs + c];
            }
#pragma unroll
            for (int a = 0; a < AHEAD; a++) {
                int i = i0 + a * groups;
                if (i >= hs) break;
#pragma unroll
                for (int e = 0; e < V; e++) {
                    x[a][e] = lambda * x[a][e] + k[i] * v[c + e];
                    o[e] += q[i] * x[a][e];
                }
                if constexpr (V == 4)
                    *(float4*)(S + (int64_t)i * hs + c) = *(const float4*)x[a];
                else
                    S[(int64_t)i * hs + c] = x[a][0];
            }
        }
        for (int e = 0; e < V; e++) sums[group * hs + c + e] = o[e];
    }
}

__global__ void __launch_bounds__(LIGHTNING_THREADS) lightning_step_kernel(Lightning g, const floatX* u, floatX* o) {
    extern __shared__ int4 shared_memory[];
    int h = blockIdx.x % g.heads, s = blockIdx.x / g.heads, hs = g.hs, groups;
    int64_t n = g.cu_seqlens[s], C = g.channels(), at = n * 3 * C + (int64_t)h * hs;
    if (g.cu_seqlens[s + 1] - n != 1) return;
    float *q = (float*)shared_memory, *k = q + hs, *v = k + hs, *sums = v + hs;
    for (int i = threadIdx.x; i < hs; i += LIGHTNING_THREADS) {
        q[i] = silu(to_float(u[at + i]));
        k[i] = silu(to_float(u[at + C + i]));
        v[i] = silu(to_float(u[at + 2 * C + i]));
    }
    __syncthreads();
    float* S = g.states[s].fixed + h * g.head_state();
    float lambda = (float)exp(-g.slope(h));
    if (hs % 4 == 0 && (uintptr_t)S % 16 == 0)
        lightning_step<4>(S, q, k, v, lambda, hs, sums, &groups);
    else
        lightning_step<1>(S, q, k, v, lambda, hs, sums, &groups);
    __syncthreads();
    for (int j = threadIdx.x; j < hs; j += LIGHTNING_THREADS) {
        float sum = 0;
        for (int i = 0; i < groups; i++) sum += sums[i * hs + j];
        o[n * C + (int64_t)h * hs + j] = from_float<floatX>(g.scale * sum);
    }
}

// o (N,C) from u (N,3C) for the new tokens of each sequence, whose state g.states[s].fixed is brought up to date.
inline void lightning_recurrence_extend(cudaStream_t stream, Lightning g, const floatX* u, floatX* o, Scratch scratch, const LightningMethod& method) {
    if (g.num_seqs == 0) return;
    int64_t shared = (3 * g.hs + std::max(LIGHTNING_STEP_SUMS, g.hs)) * (int64_t)sizeof(float);
    allow_shared_memory(lightning_step_kernel, shared);
    lightning_step_kernel<<<(unsigned)(g.num_seqs * g.heads), LIGHTNING_THREADS, shared, stream>>>(g, u, o);
    LAUNCH_CHECK();
    g.min_len = 2;
    if (g.max_len > 1) lightning_recurrence_forward(stream, g, u, o, scratch, method);
}

// --------------------------------------------------------------------------------------------------------------------------------------------------
// 8. The gated norm
//
//     forward    y = o·r⊙gain, r = 1/√(mean(o²) + 1e-6)      z = y⊙σ, σ = sigmoid(gate)
//     backward   t = dz⊙σ⊙gain      d_o = r·t − o·(r³/C)·Σ_c t⊙o      dgate = dz⊙y⊙σ⊙(1−σ)      dgain += Σ_n dz⊙σ⊙o·r
//
// All (N,C), gain and dgain (C), r (N) float32. Bound by memory: forward reads two arrays and writes one, backward reads three and writes two.
//
//   kernels 2   a warp a row, which is read again for each use: any C; by 16-byte accesses (W numbers) where these are possible
//   kernels 3   rows of 16-byte vectors that stay in registers

template <int W>
__global__ void __launch_bounds__(256) lightning_gate_forward_kernel2(floatX* z, float* rstd, const floatX* o, const floatX* gate, const floatX* gain, int64_t N, int C) {
    int lane = threadIdx.x % 32;
    int64_t n = ((int64_t)blockIdx.x * blockDim.x + threadIdx.x) / 32;
    if (n >= N) return;
    float squares = 0;
    for (int c = lane * W; c < C; c += 32 * W) {
        Numbers<W> x = load_numbers<W>(o + n * C + c);
        for (int k = 0; k < W; k++) squares += x[k] * x[k];
    }
    float r = rsqrtf(warp_sum(squares) / C + norm_epsilon<false>);
    for (int c = lane * W; c < C; c += 32 * W) {
        Numbers<W> x = load_numbers<W>(o + n * C + c), y = load_numbers<W>(gate + n * C + c), weight = load_numbers<W>(gain + c);
        for (int k = 0; k < W; k++) x[k] *= r * weight[k] * sigmoid(y[k]);
        store_numbers<W>(z + n * C + c, x);
    }
    if (lane == 0 && rstd) rstd[n] = r;
}

// A warp a row of at most 32·VECTORS vectors.
template <int VECTORS>
__global__ void __launch_bounds__(256) lightning_gate_forward_kernel3(floatX* z, float* rstd, const floatX* o, const floatX* gate, const floatX* gain, int64_t N, int C) {
    constexpr int W = Packed<floatX>::size;
    int lane = threadIdx.x % 32;
    int64_t n = ((int64_t)blockIdx.x * blockDim.x + threadIdx.x) / 32;
    if (n >= N) return;
    Packed<floatX> x[VECTORS], y[VECTORS];
#pragma unroll
    for (int v = 0; v < VECTORS; v++) {
        int c = (v * 32 + lane) * W;
        x[v] = load_packed_if(c < C, o + n * C + c);
        y[v] = load_packed_if(c < C, gate + n * C + c);
    }
    float squares = 0;  // what is behind the row's end is zero
#pragma unroll
    for (int v = 0; v < VECTORS; v++)
        for (int k = 0; k < W; k++) squares += x[v][k] * x[v][k];
    float r = rsqrtf(warp_sum(squares) / C + norm_epsilon<false>);
#pragma unroll
    for (int v = 0; v < VECTORS; v++) {
        int c = (v * 32 + lane) * W;
        if (c >= C) continue;
        Packed<floatX> weight = load_packed(gain + c), out;
        for (int k = 0; k < W; k++) out.set(k, x[v][k] * r * weight[k] * sigmoid(y[v][k]));
        store_packed(z + n * C + c, out);
    }
    if (lane == 0 && rstd) rstd[n] = r;
}

// z (N,C), rstd (N) or null, from o, gate (N,C), gain (C). z may be o. cpu::lightning_gate_forward.
inline void lightning_gate_forward(cudaStream_t stream, floatX* z, float* rstd, const floatX* o, const floatX* gate, const floatX* gain, int64_t N, int64_t C,
                                   int version = 3) {
    constexpr int W = Packed<floatX>::size;
    if (N == 0) return;
    bool aligned = C % W == 0 && aligned16(z) && aligned16(o) && aligned16(gate) && aligned16(gain);
    int64_t vectors = ceil_div(C, 32 * W);
    auto kernel = !aligned                        ? lightning_gate_forward_kernel2<1>
                  : version < 3 || vectors > 8 ? lightning_gate_forward_kernel2<W>
                  : vectors > 4                ? lightning_gate_forward_kernel3<8>
                                               : lightning_gate_forward_kernel3<4>;
    kernel<<<(unsigned)ceil_div(N, 8), 256, 0, stream>>>(z, rstd, o, gate, gain, N, (int)C);
    LAUNCH_CHECK();
}

// What a number of the row contributes.
struct LightningGateGradient {
    float t, dgate, dgain;
    __device__ LightningGateGradient(float dz, float o, float gate, float gain, float r) {
        float sigma = sigmoid(gate), dy = dz * sigma, x = o * r;
        t = dy * gain;
        dgain = dy * x;
        dgate = t * x * (1 - sigma);
    }
};

// Rows: d_o may be dz.
template <int W>
__global__ void __launch_bounds__(256) lightning_gate_backward_kernel2(floatX* d_o, floatX* dgate, const floatX* dz, const float* rstd, const floatX* o, const floatX* gate, const floatX* gain,
                                                int64_t N, int C) {
    int lane = threadIdx.x % 32;
    int64_t n = ((int64_t)blockIdx.x * blockDim.x + threadIdx.x) / 32;
    if (n >= N) return;
    float r = rstd[n], sum = 0;
    for (int pass = 0; pass < 2; pass++) {
        for (int c = lane * W; c < C; c += 32 * W) {
            Numbers<W> g = load_numbers<W>(dz + n * C + c), x = load_numbers<W>(o + n * C + c), y = load_numbers<W>(gate + n * C + c);
            Numbers<W> weight = load_numbers<W>(gain + c);
            for (int k = 0; k < W; k++) {
                LightningGateGradient d(g[k], x[k], y[k], weight[k], r);
                if (pass == 0) sum += d.t * x[k];
                g[k] = r * d.t - x[k] * sum;
                y[k] = d.dgate;
            }
            if (pass == 0) continue;
            store_numbers<W>(d_o + n * C + c, g);
            store_numbers<W>(dgate + n * C + c, y);
        }
        if (pass == 0) sum = warp_sum(sum) * (r * r * r / C);
    }
}
// Columns: a thread takes W columns of one piece of `rows` rows; blockIdx.y is the piece and its partial row.
template <int W>
__global__ void __launch_bounds__(128) lightning_gain_kernel2(float* partial, const floatX* dz, const float* rstd, const floatX* o, const floatX* gate, int64_t N, int C, int64_t rows) {
    int c = (blockIdx.x * blockDim.x + threadIdx.x) * W;
    if (c >= C) return;
    int64_t begin = blockIdx.y * rows, end = min(begin + rows, N);
    Numbers<W> dgain;
    for (int64_t n = begin; n < end; n++) {
        Numbers<W> g = load_numbers<W>(dz + n * C + c), x = load_numbers<W>(o + n * C + c), y = load_numbers<W>(gate + n * C + c);
        for (int k = 0; k < W; k++) dgain[k] += LightningGateGradient(g[k], x[k], y[k], 1, rstd[n]).dgain;
    }
    store_numbers<W>(partial + (int64_t)blockIdx.y * C + c, dgain);
}

// Both in one pass, as in norm_backward_kernel4: a thread owns one vector of columns for all rows of its block, so that gain and its part of dgain stay in
// registers. blockDim.x threads (whole warps) make a row, blockDim.y such groups a block; each takes ROWS rows at a time and writes one partial row at the end.
constexpr int LIGHTNING_GATE_THREADS = 512, LIGHTNING_GATE_ROWS = 2;
__global__ void __launch_bounds__(LIGHTNING_GATE_THREADS)
    lightning_gate_backward_kernel3(floatX* d_o, floatX* dgate, float* partial, const floatX* dz, const float* rstd, const floatX* o, const floatX* gate,
                                    const floatX* gain, int64_t N, int C) {
    constexpr int W = Packed<floatX>::size, ROWS = LIGHTNING_GATE_ROWS;
    __shared__ float shared[2][LIGHTNING_GATE_THREADS / 32][ROWS];  // [round % 2][warp][row]: Σ t⊙o
    int lane = threadIdx.x % 32, warps = blockDim.x / 32, first_warp = threadIdx.y * warps, c = threadIdx.x * W;
    bool mine = c < C;
    int64_t group = (int64_t)blockIdx.x * blockDim.y + threadIdx.y, groups = (int64_t)gridDim.x * blockDim.y;
    Packed<floatX> weight = load_packed_if(mine, gain + c);
    Numbers<W> dgain;

    // All groups of a block make the same number of rounds, because of the barrier: the condition looks at the block's first group.
    int round = 0;
    for (int64_t chunk = group; (chunk - threadIdx.y) * ROWS < N; chunk += groups, round ^= 1) {
        Packed<floatX> g[ROWS], x[ROWS], y[ROWS];
        float r[ROWS], sum[ROWS] = {};
#pragma unroll
        for (int i = 0; i < ROWS; i++) {
            int64_t n = chunk * ROWS + i;
            bool there = mine && n < N;
            g[i] = load_packed_if(there, dz + n * C + c);
            x[i] = load_packed_if(there, o + n * C + c);
            y[i] = load_packed_if(there, gate + n * C + c);
            r[i] = n < N ? rstd[n] : 0;
        }
        float t[ROWS][W];
#pragma unroll
        for (int i = 0; i < ROWS; i++) {
            int64_t n = chunk * ROWS + i;
            Packed<floatX> out;
#pragma unroll
            for (int k = 0; k < W; k++) {
                LightningGateGradient d(g[i][k], x[i][k], y[i][k], weight[k], r[i]);
                t[i][k] = d.t;
                sum[i] += d.t * x[i][k];  // rows and columns that are not there are zeros and add nothing
                dgain[k] += d.dgain;
                out.set(k, d.dgate);
            }
            if (mine && n < N) store_packed(dgate + n * C + c, out);
            sum[i] = warp_sum(sum[i]);
        }
        if (warps > 1) {
            // Two buffers in turn: who writes one of them again has passed the barrier of the round between, so all have read it.
            if (lane == 0)
                for (int i = 0; i < ROWS; i++) shared[round][first_warp + threadIdx.x / 32][i] = sum[i];
            __syncthreads();
            for (int i = 0; i < ROWS; i++) {
                sum[i] = 0;
                for (int k = 0; k < warps; k++) sum[i] += shared[round][first_warp + k][i];
            }
        }
#pragma unroll
        for (int i = 0; i < ROWS; i++) {
            int64_t n = chunk * ROWS + i;
            if (!mine || n >= N) continue;
            float f = sum[i] * (r[i] * r[i] * r[i] / C);
            Packed<floatX> out;
#pragma unroll
            for (int k = 0; k < W; k++) out.set(k, r[i] * t[i][k] - x[i][k] * f);
            store_packed(d_o + n * C + c, out);
        }
    }
    if (mine) store_numbers<W>(partial + group * C + c, dgain);
}

// d_o, dgate (N,C), dgain (C) += ; from dz, o, gate (N,C), rstd (N) as the forward pass left it, gain (C). d_o may be dz. cpu::lightning_gate_backward.
inline void lightning_gate_backward(cudaStream_t stream, floatX* d_o, floatX* dgate, float* dgain, const floatX* dz, const float* rstd, const floatX* o,
                                    const floatX* gate, const floatX* gain, int64_t N, int64_t C, int version = 3) {
    constexpr int W = Packed<floatX>::size;
    if (N == 0) return;
    bool aligned = C % W == 0 && aligned16(d_o) && aligned16(dgate) && aligned16(dz) && aligned16(o) && aligned16(gate) && aligned16(gain);
    float* partial = (float*)workspace();
    int64_t most = norm_partial_rows<false>(C), partial_rows;  // that fit the workspace
    if (version >= 3 && aligned && C <= LIGHTNING_GATE_THREADS * W) {
        int threads = (int)round_up(C / W, 32), groups = std::max(1, 256 / threads), resident;
        CUDA_CHECK(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&resident, lightning_gate_backward_kernel3, threads * groups, 0));
        int64_t blocks =
            std::min<int64_t>({ceil_div(N, LIGHTNING_GATE_ROWS * groups), (int64_t)resident * device_properties().multiProcessorCount, most / groups});
        partial_rows = blocks * groups;
        lightning_gate_backward_kernel3<<<(unsigned)blocks, dim3(threads, groups), 0, stream>>>(d_o, dgate, partial, dz, rstd, o, gate, gain, N, (int)C);
        LAUNCH_CHECK();
    } else {
        // First the columns, since d_o may overwrite dz.
        int64_t rows = ceil_div(N, std::min<int64_t>({most, 512, ceil_div(N, 16)}));
        partial_rows = ceil_div(N, rows);
        auto columns = aligned ? lightning_gain_kernel2<W> : lightning_gain_kernel2<1>;
        auto kernel = aligned ? lightning_gate_backward_kernel2<W> : lightning_gate_backward_kernel2<1>;
        columns<<<dim3((unsigned)ceil_div(C, 128 * (aligned ? W : 1)), (unsigned)partial_rows), 128, 0, stream>>>(partial, dz, rstd, o, gate, N, (int)C, rows);
        LAUNCH_CHECK();
        kernel<<<(unsigned)ceil_div(N, 8), 256, 0, stream>>>(d_o, dgate, dz, rstd, o, gate, gain, N, (int)C);
        LAUNCH_CHECK();
    }
    norm_sum<false>(stream, dgain, nullptr, partial_rows, C);
}

}  // namespace gpu
