// Lightning attention: what a sweep is told, and the sweeps that take any head size. What a sweep computes stands in lightning.cuh.
#pragma once

#include <algorithm>

#include "../../attention.h"
#include "common.cuh"
#include "gelu.cuh"

namespace gpu {

// --------------------------------------------------------------------------------------------------------------------------------------------------
// 1. What kernels are told

// A piece of a sequence, in the order in which a sweep takes its tokens.
struct LightningSpan {
    int seq, begin, end;  // its sequence, which is the rows [begin, end)
    int index, spans;     // it is the index-th of the sequence's spans; an empty sequence has one
    int first, n;         // place of its first token, and how many it has
    // Place p of the span is the row row(reverse) ± p.
    __device__ int row(bool reverse) const { return reverse ? end - 1 - first : begin + first; }
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
    int range = 0;             // spans that a block of lightning_roles.cuh takes
    int tail = 0;              // then borders hold, for a border between ranges, sums over so many of the chunks before (behind) it, in turn: tails
    int step = 0, steps = 0;   // the chunks a block takes, in so many steps of so many: no block runs far ahead of the others (Pace). 0: each on its own
    int every = 1;             // forward leaves for backward the states before every 2^every chunks of 64 tokens, of which spans are multiples

    HOST_DEVICE int64_t channels() const { return (int64_t)heads * hs; }
    HOST_DEVICE int64_t head_state() const { return (int64_t)hs * hs; }
    // Spans are numbered so that a sequence's first one can be told from its first row; a few numbers between sequences stand for nothing.
    HOST_DEVICE int64_t slots() const { return span ? tokens / span + num_seqs : num_seqs; }

    HOST_DEVICE double slope(int h) const { return geometric ? factor * exp2(-8.0 * (h + 1) / heads) : factor * 8 * h / heads; }

    // The span of a block. In the second pass over the spans `last_first`: what the first has read last is still in the L2 cache.
    __device__ int64_t block_slot(bool last_first) const { return span && last_first ? slots() - 1 - blockIdx.x / heads : blockIdx.x / heads; }

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

    // Border b stands between ranges b−1 and b. How many tails the next `chunks` chunks on one side of it are in; no tail is in two ranges.
    HOST_DEVICE int range_chunks() const { return range * (span / 64); }
    HOST_DEVICE int tails(int chunks) const {
        return chunks / range_chunks() * ((range_chunks() + tail - 1) / tail) + (chunks % range_chunks() + tail - 1) / tail;
    }
    // A border's a-th one in the nearest range, in (borders, tails(range_chunks()), NH,hs,hs).
    __device__ float* tail_sum(int b, int a, int h) const { return borders + (((int64_t)(b - 1) * tails(range_chunks()) + a) * heads + h) * head_state(); }

    // Whether S before a span's chunk is among the states that forward leaves: not the state that the sequence starts from.
    __device__ bool leaves(const LightningSpan& q, int chunk) const { return chunk % (1 << every) == 0 && q.first + chunk > 0; }
    // Which of them it is, in (N/(64·2^every), NH,hs,hs). Of len tokens at most (len−1)/(64·2^every) states: no two sequences share one.
    __device__ int state(const LightningSpan& q, int chunk, int h) const {
        return ((q.begin >> (6 + every)) + (((q.first >> 6) + chunk) >> every) - 1) * heads + h;
    }

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

// Of a sum with weights λ^distance these many chunks of 64 tokens count; in the others λ^distance < 2^−16. What is left out of a state is 2^−16 of the state
// that many tokens before. As a factor of products a state is rounded to bf16, by up to 2^−9 of each number: 128 times as much, unless it has shrunk meanwhile.
HOST_DEVICE inline int chunks_that_count(float slope2) { return (int)fminf(16 / slope2, 1e9f) / 64 + 1; }  // slope2 = −log2(λ)

// Head h of row n: p[n·stride + h·hs ...], through SiLU if `silu`.
struct LightningRows {
    const floatX* p;
    int stride;
    bool silu;
};
// Where a sweep writes, rows as above; multiplied by SiLU'(u) unless u is null.
struct LightningOutput {
    floatX* p;
    int stride;
    const floatX* u;
    int u_stride;
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
    if (g.geometric) g.factor = lightning_slope(a, a.heads - 1) * 256;                           // 2^{−8} for the last head
    if (a["decay"] == DECAY_FLA && a.heads > 1) g.factor = lightning_slope(a, 1) / 8 * a.heads;  // 8/NH for head 1; head 0 never decays
    g.scale = (float)lightning_scale(a);
    return g;
}

// --------------------------------------------------------------------------------------------------------------------------------------------------
// 2. Token by token

// One block a sequence, head and `columns` columns of S, which do not need each other; a thread has one column, in shared memory: hs·columns + 2·hs floats.
__global__ void lightning_sweep_kernel1(Lightning g, LightningSweep w, int columns) {
    extern __shared__ int4 lightning_shared_memory[];
    float *S = (float*)lightning_shared_memory + threadIdx.x, *a = (float*)lightning_shared_memory + (int64_t)g.hs * columns, *b = a + g.hs;
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
    HOST_DEVICE int a() const { return 0; }                              // (chunk,hs)
    HOST_DEVICE int b() const { return chunk * row; }                    // (chunk,hs)
    HOST_DEVICE int d() const { return b() + chunk * row; }              // (chunk,columns)
    HOST_DEVICE int p() const { return d() + chunk * column_row; }       // (chunk,chunk)
    HOST_DEVICE int decay() const { return p() + chunk * (chunk | 1); }  // (chunk+1): λ^i
    HOST_DEVICE int s() const { return decay() + chunk + 1; }            // (hs,columns)
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
    extern __shared__ int4 lightning_shared_memory[];
    float* memory = (float*)lightning_shared_memory;
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

}  // namespace gpu
