// The softmax core, backward: the twin of cpu::softmax_backward (attention.h).
//
//     P = exp(scale·QKᵀ − lse)    dP = Z⊙(dO·Vᵀ)    dS = P⊙(dP − D),  D_i = Σ_c do_ic·o_ic
//     dV = (Z⊙P)ᵀdO               dK = scale·dSᵀQ                dQ = scale·dS·K
//
// for the keys j that query i sees; Z is attention dropout's 0 or 1/(1−p). Nothing of size T² is stored: P is computed again, tile by tile, from the scores
// and the saved lse (Dao, FlashAttention-2, arXiv 2307.08691). Three things are made:
//
//     the statistics of a row     D, and lse·log₂e (exponentials are powers of 2): (NH, q_rows) pairs of float32 in scratch
//     dK and dV                   softmax_backward_dkv_kernelN: a block owns a tile of keys and walks over the queries that see them
//     dQ                          softmax_backward_dq_kernelN: a block owns a tile of queries and walks over the keys that they see
//
// S and dP are computed twice that way, 7 products instead of 5. But every sum has one owner and one order, so that the same call gives the same bits; the
// other way, adding to dQ from many blocks, needs atomics or a buffer of partial sums. The heads of a group are summed by the block that owns the keys.
// Z's factor 1/(1−p) is applied at the end: with a kept weight's 1 and D·(1−p) in place of Z and D, the results are dV, dK, dQ times 1−p.
//
//     kernels 2   any sizes and strides, float32 arithmetic: float32's only kernels, and bf16's for what the others do not take
//     kernels 6   tensor cores: bf16, d_qk <= 192, d_v <= 128, all sizes and strides multiples of 8
//     kernels 7   softmax_backward_hopper.cuh: the same on a Hopper GPU, for the usual sizes of heads and without dropout
//
// The numbers are those of the ladder, dev/cuda/attention_backward.cu, where the versions before them stand.
// FLOPs for each visible pair and head: 2·(3·d_qk + 2·d_v) needed, 2·(4·d_qk + 3·d_v) done. Memory: q, k, v, o, do twice each, dq, dk, dv once, while the rows
// of the heads at work fit the L2 cache.
#pragma once

#include "softmax_backward_common.cuh"
#include "softmax_backward_hopper.cuh"
#include "tensor_cores.cuh"

namespace gpu {

namespace softmax_bwd {

// ---- the kernels for everything: float32 arithmetic -----------------------------------------------------------------------------------------------------
//
// 64 queries by 64 keys in 128 threads. Thread (ty,tx) of 8×16 has the owned rows ty, ty+8 ... and, for the scores, the walked-over rows tx, tx+16 ..., or four
// neighbouring columns of a gradient. Both sorts of product are made of slabs of 32 (channels; walked-over rows) in shared memory: 8×4 numbers a thread from
// 12 reads of 16 bytes for 4 steps of 32 products. Rows are padded by 4 floats, so that eight threads reading eight rows meet different banks.
// A block makes 64 columns of the gradients, from 64·blockIdx.y on, and computes the scores for these anew.

constexpr int TILE2 = 64, SLAB2 = 32;

struct alignas(16) Shared2 {
    union {
        struct {
            float own[TILE2][SLAB2 + 4], other[TILE2][SLAB2 + 4];
        };
        float x[SLAB2][64];
    };
    float w[TILE2][TILE2 + 4];  // P or dS: owned rows by walked-over rows
};

// Rows first ... of a matrix, those of them below `end`, and columns c0 ... below d; zeros elsewhere.
template <int ROWS, int COLUMNS, int WIDTH>
__device__ inline void load_slab(float (&to)[ROWS][WIDTH], const floatX* from, int64_t stride, int first, int end, int c0, int d) {
#pragma unroll 8
    for (int at = threadIdx.x; at < ROWS * COLUMNS; at += THREADS) {
        int row = at / COLUMNS, c = at % COLUMNS;
        to[row][c] = first + row < end && c0 + c < d ? to_float(from[(first + row) * stride + c0 + c]) : 0;
    }
}

struct Rows {  // of one sequence and head: rows [0, end) of d numbers
    const floatX* data;
    int64_t stride;
    int end, d;
};

// s = X[i0 ...]·Y[j0 ...]ᵀ
__device__ inline void multiply_slabs(float (&s)[8][4], Shared2& shared, const Rows& x, int i0, const Rows& y, int j0) {
    int tx = threadIdx.x % 16, ty = threadIdx.x / 16;
#pragma unroll
    for (int r = 0; r < 8; r++)
#pragma unroll
        for (int u = 0; u < 4; u++) s[r][u] = 0;
    for (int c0 = 0; c0 < x.d; c0 += SLAB2) {
        __syncthreads();  // what was there before has been read
        load_slab<TILE2, SLAB2>(shared.own, x.data, x.stride, i0, x.end, c0, x.d);
        load_slab<TILE2, SLAB2>(shared.other, y.data, y.stride, j0, y.end, c0, y.d);
        __syncthreads();
#pragma unroll 2
        for (int c = 0; c < SLAB2; c += 4) {
            float4 yc[4];
#pragma unroll
            for (int u = 0; u < 4; u++) yc[u] = *(const float4*)&shared.other[tx + 16 * u][c];
#pragma unroll
            for (int r = 0; r < 8; r++) {
                float4 xc = *(const float4*)&shared.own[ty + 8 * r][c];
#pragma unroll
                for (int u = 0; u < 4; u++) s[r][u] += xc.x * yc[u].x + xc.y * yc[u].y + xc.z * yc[u].z + xc.w * yc[u].w;
            }
        }
    }
}

// acc += w·Y[j0 ...], columns c0 + 4·tx ...; w as it stands in shared memory, written by all threads just before.
__device__ inline void accumulate_slabs(float (&acc)[8][4], Shared2& shared, const Rows& y, int j0, int c0) {
    int tx = threadIdx.x % 16, ty = threadIdx.x / 16;
    for (int k0 = 0; k0 < TILE2; k0 += SLAB2) {
        __syncthreads();  // w has been written, and the slab before has been read
        load_slab<SLAB2, 64>(shared.x, y.data, y.stride, j0 + k0, y.end, c0, y.d);
        __syncthreads();
#pragma unroll 2
        for (int k = 0; k < SLAB2; k += 4) {
            float4 yk[4];
#pragma unroll
            for (int u = 0; u < 4; u++) yk[u] = *(const float4*)&shared.x[k + u][tx * 4];
#pragma unroll
            for (int r = 0; r < 8; r++) {
                float4 w = *(const float4*)&shared.w[ty + 8 * r][k0 + k];
                acc[r][0] += w.x * yk[0].x + w.y * yk[1].x + w.z * yk[2].x + w.w * yk[3].x;
                acc[r][1] += w.x * yk[0].y + w.y * yk[1].y + w.z * yk[2].y + w.w * yk[3].y;
                acc[r][2] += w.x * yk[0].z + w.y * yk[1].z + w.z * yk[2].z + w.w * yk[3].z;
                acc[r][3] += w.x * yk[0].w + w.y * yk[1].w + w.z * yk[2].w + w.w * yk[3].w;
            }
        }
    }
}

// w = what(r, u) for each number of this thread.
template <class What>
__device__ inline void set_weights(Shared2& shared, What what) {
    int tx = threadIdx.x % 16, ty = threadIdx.x / 16;
#pragma unroll
    for (int r = 0; r < 8; r++)
#pragma unroll
        for (int u = 0; u < 4; u++) shared.w[ty + 8 * r][tx + 16 * u] = what(r, u);
}

// Columns c0 + 4·tx ... of the rows first ... below `end`.
__device__ inline void store_slabs(const float (&acc)[8][4], float factor, floatX* to, int64_t stride, int first, int end, int c0, int d) {
    int tx = threadIdx.x % 16, ty = threadIdx.x / 16;
#pragma unroll
    for (int r = 0; r < 8; r++)
#pragma unroll
        for (int u = 0; u < 4; u++) {
            int row = first + ty + 8 * r, c = c0 + tx * 4 + u;
            if (row < end && c < d) to[row * stride + c] = from_float<floatX>(acc[r][u] * factor);
        }
}

__global__ void __launch_bounds__(THREADS, 2)
    softmax_backward_dkv_kernel2(SoftmaxAttention a, SoftmaxGradients g, const float2* stats, int tiles, bool dropout) {
    __shared__ Shared2 shared;
    const Piece b(a.kv_heads, tiles);
    const Sequence s(a, b.seq, false);
    const int j0 = b.tile * TILE2, c0 = blockIdx.y * 64, tx = threadIdx.x % 16, ty = threadIdx.x / 16, group = a.heads / a.kv_heads;
    if (j0 >= s.n_k) return;
    const Range range = queries_of(a, s, j0, j0 + TILE2);
    const Rows k{a.k + s.k0 * a.k_stride + b.head * a.k_head, a.k_stride, s.n_k, a.d_qk};
    const Rows v{a.v + s.k0 * a.v_stride + b.head * a.v_head, a.v_stride, s.n_k, a.d_v};
    const float scale = a.scale * LOG2E;
    float dk[8][4] = {}, dv[8][4] = {}, p[8][4], dp[8][4];

    for (int h = b.head * group; h < (b.head + 1) * group; h++) {
        const Rows q{a.q + s.q0 * a.q_stride + h * (int64_t)a.d_qk, a.q_stride, s.n_q, a.d_qk};
        const Rows d_o{g.d_o + s.q0 * g.do_stride + h * (int64_t)a.d_v, g.do_stride, s.n_q, a.d_v};
        for (int i0 = range.begin; i0 < range.end; i0 += TILE2) {
            uint32_t keep = 0xffffffff;  // bit 4·r+u
            if (dropout) {
                Dropout drop(a, b.seq, h);
                keep = 0;
#pragma unroll 1
                for (int n = 0; n < 32; n++) keep |= (uint32_t)drop.keeps(a, i0 + s.shift + tx + n % 4 * 16, j0 + ty + n / 4 * 8) << n;
            }
            float2 row[4];  // the statistics of this thread's queries
#pragma unroll
            for (int u = 0; u < 4; u++) {
                int i = i0 + tx + 16 * u;
                row[u] = i < s.n_q ? stats[h * a.q_rows + s.q0 + i] : make_float2(0, 0);
            }
            multiply_slabs(p, shared, k, j0, q, i0);
            set_weights(shared, [&](int r, int u) {
                int j = j0 + ty + 8 * r, i = i0 + tx + 16 * u;
                p[r][u] = i < s.n_q && j < s.n_k && visible(i + s.shift, j, a.window) ? exp2f(p[r][u] * scale - row[u].x) : 0;
                return keep >> (4 * r + u) & 1 ? p[r][u] : 0;
            });
            if (c0 < a.d_v) accumulate_slabs(dv, shared, d_o, i0, c0);
            if (c0 >= a.d_qk) continue;
            multiply_slabs(dp, shared, v, j0, d_o, i0);
            set_weights(shared, [&](int r, int u) { return p[r][u] == 0 ? 0 : p[r][u] * ((keep >> (4 * r + u) & 1 ? dp[r][u] : 0) - row[u].y); });
            accumulate_slabs(dk, shared, q, i0, c0);
        }
    }
    const float factor = dropout ? a.dropout.scale : 1;
    store_slabs(dk, a.scale * factor, g.dk + s.k0 * g.dk_stride + b.head * g.dk_head, g.dk_stride, j0, s.n_k, c0, a.d_qk);
    store_slabs(dv, factor, g.dv + s.k0 * g.dv_stride + b.head * g.dv_head, g.dv_stride, j0, s.n_k, c0, a.d_v);
}

__global__ void __launch_bounds__(THREADS, 2)
    softmax_backward_dq_kernel2(SoftmaxAttention a, SoftmaxGradients g, const float2* stats, int tiles, bool dropout) {
    __shared__ Shared2 shared;
    const Piece b(a.heads, tiles);
    const Sequence s(a, b.seq, false);
    const int i0 = (tiles - 1 - b.tile) * TILE2, c0 = blockIdx.y * 64, tx = threadIdx.x % 16, ty = threadIdx.x / 16, kv = a.kv_head(b.head);
    if (i0 >= s.n_q) return;
    const Range range = keys_of(a, s, i0, i0 + TILE2);
    const Rows q{a.q + s.q0 * a.q_stride + b.head * (int64_t)a.d_qk, a.q_stride, s.n_q, a.d_qk};
    const Rows d_o{g.d_o + s.q0 * g.do_stride + b.head * (int64_t)a.d_v, g.do_stride, s.n_q, a.d_v};
    const Rows k{a.k + s.k0 * a.k_stride + kv * a.k_head, a.k_stride, s.n_k, a.d_qk};
    const Rows v{a.v + s.k0 * a.v_stride + kv * a.v_head, a.v_stride, s.n_k, a.d_v};
    const float scale = a.scale * LOG2E;
    float dq[8][4] = {}, p[8][4], dp[8][4];

    for (int j0 = range.begin; j0 < range.end; j0 += TILE2) {
        uint32_t keep = 0xffffffff;  // bit 4·r+u
        if (dropout) {
            Dropout drop(a, b.seq, b.head);
            keep = 0;
#pragma unroll 1
            for (int n = 0; n < 32; n++) keep |= (uint32_t)drop.keeps(a, i0 + s.shift + ty + n / 4 * 8, j0 + tx + n % 4 * 16) << n;
        }
        multiply_slabs(p, shared, q, i0, k, j0);
        multiply_slabs(dp, shared, d_o, i0, v, j0);
        set_weights(shared, [&](int r, int u) {
            int i = i0 + ty + 8 * r, j = j0 + tx + 16 * u;
            if (!(i < s.n_q && j < s.n_k && visible(i + s.shift, j, a.window))) return 0.0f;
            float2 row = stats[b.head * a.q_rows + s.q0 + i];
            return exp2f(p[r][u] * scale - row.x) * ((keep >> (4 * r + u) & 1 ? dp[r][u] : 0) - row.y);
        });
        accumulate_slabs(dq, shared, k, j0, c0);
    }
    const float factor = a.scale * (dropout ? a.dropout.scale : 1);
    store_slabs(dq, factor, g.dq + s.q0 * g.dq_stride + b.head * (int64_t)a.d_qk, g.dq_stride, i0, s.n_q, c0, a.d_qk);
}

inline void launch2(cudaStream_t stream, const SoftmaxAttention& a, const SoftmaxGradients& g, const float2* stats) {
    const bool dropout = a.dropout.p > 0;
    const int k_tiles = (int)ceil_div(a.max_k, TILE2), q_tiles = (int)ceil_div(a.max_q, TILE2);
    dim3 dkv(grid_size(a.num_seqs, a.kv_heads, k_tiles), (unsigned)ceil_div(std::max(a.d_qk, a.d_v), 64));
    dim3 dq(grid_size(a.num_seqs, a.heads, q_tiles), (unsigned)ceil_div(a.d_qk, 64));
    if (dkv.x > 0) {
        softmax_backward_dkv_kernel2<<<dkv, THREADS, 0, stream>>>(a, g, stats, k_tiles, dropout);
        LAUNCH_CHECK();
    }
    if (dq.x > 0) {
        softmax_backward_dq_kernel2<<<dq, THREADS, 0, stream>>>(a, g, stats, q_tiles, dropout);
        LAUNCH_CHECK();
    }
}

// ---- the kernels for tensor cores -----------------------------------------------------------------------------------------------------------------------
#ifndef GPU_FLOAT32

// With mma.sync's layouts (tensor_cores.cuh) a C, rounded, is an A. That decides the layout of both kernels: a warp computes P and dS with the rows it owns as
// rows and the rows it walks over as columns (the keys' kernel computes Pᵀ and dSᵀ), and these go from registers straight into the products that sum over the
// columns.

// How a tile of rows of D numbers lies in shared memory, in chunks of 8 numbers (16 bytes): the place of a chunk. ldmatrix reads one chunk of each of eight
// neighbouring rows, cp.async writes eight neighbouring chunks: each time the eight places must differ modulo 8, to meet all banks once. So the chunks of a
// row change places, by an exclusive or with the row's number: within groups of 8, or of 4 where a row is an odd number of times 4 chunks long and two
// rows go once around the banks. Tiles begin at multiples of 128 bytes, and rows 8 apart are alike.
template <int D>
struct Swizzled {
    static constexpr int GROUP = D % 64 == 0 ? 8 : 4;
    __device__ static int at(int row, int chunk) { return row * (D / 8) + (chunk ^ (GROUP == 8 ? row & 7 : row >> 1 & 3)); }
    // `address` is that of chunk 0 or 1 of some row: the address of the chunk 2·c behind it.
    __device__ static uint32_t step(uint32_t address, int c) { return (address ^ 2 * c % GROUP * 16) + 2 * c / GROUP * (GROUP * 16); }
};

// A tile of ROWS rows from `first` on; rows outside [0, end) and columns from d on become zeros. The block takes 8 (or 4) chunks of 16 (or 32) rows at a
// time: as many rows as swizzling repeats after, so that all addresses of a thread differ by constants.
template <int D, int ROWS>
__device__ __forceinline__ void load_tile(uint32_t to, const floatX* from, int64_t stride, int first, int end, int d) {
    constexpr int WIDTH = D % 64 == 0 ? 8 : 4, HEIGHT = THREADS / WIDTH;
    static_assert(ROWS % HEIGHT == 0 && D % (8 * WIDTH) == 0, "whole rounds");
    int thread = threadIdx.x;
    asm volatile("" : "+r"(thread));  // all that follows from it is to be computed for each tile again: the registers are needed for other things meanwhile
    int row = thread / WIDTH, chunk = thread % WIDTH;
    to += 16 * Swizzled<D>::at(row, chunk);
    from += (int64_t)(first + row) * stride + chunk * 8;
#pragma unroll
    for (int r = 0; r < ROWS; r += HEIGHT) {
        int j = first + row + r;
#pragma unroll
        for (int c = 0; c < D / 8; c += WIDTH) copy_async16(to + 16 * (r * (D / 8) + c), from + c * 8, j >= 0 && j < end && (chunk + c) * 8 < d);
        from += HEIGHT * stride;
    }
}

// Below, a warp owns MT times 16 rows and works on NT times 8 of the rows it walks over. `own` and `other` are the addresses of the first of either in shared
// memory, multiples of 16 rows (8 for `other`) from the start of their tiles.

// The warp's own rows as A operands for the whole walk.
template <template <int> class Layout, int D, int MT>
__device__ __forceinline__ void keep_rows(uint32_t (&kept)[D / 16][MT][4], uint32_t own) {
    int lane = threadIdx.x % 32;
    own += 16 * Layout<D>::at(lane % 16, lane / 16);
#pragma unroll
    for (int c = 0; c < D / 16; c++)
#pragma unroll
        for (int mt = 0; mt < MT; mt++) load_matrices(kept[c][mt], Layout<D>::step(own, c) + 16 * Layout<D>::at(mt * 16, 0));
}

// s += own·otherᵀ over D channels. Of `other` a lane fetches both halves of 16 channels of 16 rows: matrices (rows 0..7, channels 0..7), (0..7, 8..15),
// (8..15, 0..7) ... Its own rows are in `kept`, or else (DEPTH = 1, any numbers) come from shared memory.
template <template <int> class Layout, int D, int MT, int NT, int DEPTH>
__device__ __forceinline__ void multiply(float (&s)[MT][NT][4], const uint32_t (&kept)[DEPTH][MT][4], uint32_t own, uint32_t other) {
    int lane = threadIdx.x % 32;
    own += 16 * Layout<D>::at(lane % 16, lane / 16);
    other += 16 * Layout<D>::at(lane % 8 + lane / 16 * 8, lane / 8 % 2);
#pragma unroll
    for (int c = 0; c < D / 16; c++) {
        uint32_t a[MT][4];
#pragma unroll
        for (int mt = 0; mt < MT; mt++) {
            if constexpr (DEPTH == D / 16) {
#pragma unroll
                for (int i = 0; i < 4; i++) a[mt][i] = kept[c][mt][i];
            } else {
                load_matrices(a[mt], Layout<D>::step(own, c) + 16 * Layout<D>::at(mt * 16, 0));
            }
        }
#pragma unroll
        for (int nt = 0; nt < NT; nt += 2) {
            uint32_t b[4];
            load_matrices(b, Layout<D>::step(other, c) + 16 * Layout<D>::at(nt * 8, 0));
#pragma unroll
            for (int mt = 0; mt < MT; mt++) {
                mma(s[mt][nt], a[mt], b[0], b[1]);
                mma(s[mt][nt + 1], a[mt], b[2], b[3]);
            }
        }
    }
}

// acc += w·other, w being A operands. Of `other` the matrices are (rows 0..7, columns 0..7), (8..15, 0..7), (0..7, 8..15) ... transposed on the way.
template <template <int> class Layout, int D, int MT, int KT>
__device__ __forceinline__ void accumulate(float (&acc)[MT][D / 8][4], const uint32_t (&w)[KT][MT][4], uint32_t other) {
    int lane = threadIdx.x % 32;
    other += 16 * Layout<D>::at(lane % 16, lane / 16);
#pragma unroll
    for (int kt = 0; kt < KT; kt++)
#pragma unroll
        for (int c = 0; c < D / 8; c += 2) {
            uint32_t b[4];
            load_matrices_transposed(b, Layout<D>::step(other, c / 2) + 16 * Layout<D>::at(kt * 16, 0));
#pragma unroll
            for (int mt = 0; mt < MT; mt++) {
                mma(acc[mt][c], w[kt][mt], b[0], b[1]);
                mma(acc[mt][c + 1], w[kt][mt], b[2], b[3]);
            }
        }
}

// The four numbers of product (mt, nt) as their part of an A operand.
template <int KT, int MT>
__device__ __forceinline__ void set_operand(uint32_t (&w)[KT][MT][4], int mt, int nt, const float (&x)[4]) {
    w[nt / 2][mt][nt % 2 * 2] = pack_bf16(x[0], x[1]);
    w[nt / 2][mt][nt % 2 * 2 + 1] = pack_bf16(x[2], x[3]);
}

// acc·factor to global memory, through `tile`, 16·MT rows of shared memory of the warp's own, so that 16 bytes are stored at a time: those of the warp's
// rows that are in [begin, end), counted from its first, and columns below d.
template <int D, int MT>
__device__ __forceinline__ void store_rows(floatX* to, int64_t stride, const float (&acc)[MT][D / 8][4], float factor, int4* tile, int begin, int end, int d) {
    int lane = threadIdx.x % 32;
    __syncwarp();
#pragma unroll
    for (int mt = 0; mt < MT; mt++)
#pragma unroll
        for (int half = 0; half < 2; half++)
#pragma unroll
            for (int c = 0; c < D / 8; c++) {
                uint32_t* chunk = (uint32_t*)&tile[Swizzled<D>::at(mt * 16 + half * 8 + lane / 4, c)];
                chunk[lane % 4] = pack_bf16(acc[mt][c][half * 2] * factor, acc[mt][c][half * 2 + 1] * factor);
            }
    __syncwarp();
#pragma unroll 4
    for (int at = lane; at < 16 * MT * (D / 8); at += 32) {
        int row = at / (D / 8), c = at % (D / 8);
        if (row >= begin && row < end && c * 8 < d) *(int4*)(to + row * stride + c * 8) = tile[Swizzled<D>::at(row, c)];
    }
}

// Blocks of four warps. A block owns ROWS rows, MT·16 a warp: keys and their values, or queries and their gradients do. It walks over tiles of OTHERS rows of
// the other sort; while one is worked on, the next is on its way into the other of two buffers, so that one barrier a tile is enough. Each warp works on CHUNK
// rows of such a tile at a time, and skips chunks without anything visible.
// BLOCKS: how many a multiprocessor is to hold, which limits the registers of a thread to 255 (2) or 168 (3).
// KEEP_QK, KEEP_V: its own rows stay in registers as operands, where there is room; else they come from shared memory again for each chunk.
template <int DQK_, int DV_, int MT_, int OTHERS_, int CHUNK_, int BLOCKS_, bool KEEP_QK_ = true, bool KEEP_V_ = true>
struct Shape {
    static constexpr int DQK = DQK_, DV = DV_, MT = MT_, OTHERS = OTHERS_, CHUNK = CHUNK_, BLOCKS = BLOCKS_;
    static constexpr bool KEEP_QK = KEEP_QK_, KEEP_V = KEEP_V_;
    static constexpr int ROWS = 64 * MT, NT = CHUNK / 8;
    // Shared memory: the block's rows, then two stages of the others' rows and (keys' kernel) their statistics.
    static constexpr int OWN_QK = ROWS * DQK * 2, OWN_V = ROWS * DV * 2, QK = OTHERS * DQK * 2, V = OTHERS * DV * 2, STAGE = QK + V + OTHERS * 8;
    static constexpr int BYTES = OWN_QK + OWN_V + 2 * STAGE;
    static_assert(MT * NT <= 8, "dropout's bits of a chunk fit a word");
};

// ---- keys -----------------------------------------------------------------------------------------------------------------------------------------------

// Scores of queries that don't see a key become −inf. Rows are the warp's keys from `key` on, columns queries from i on.
template <int MT, int NT>
__device__ __forceinline__ void mask_queries(float (&s)[MT][NT][4], const SoftmaxAttention& a, const Sequence& q, int key, int i) {
    int row = threadIdx.x % 32 / 4, column = threadIdx.x % 4 * 2;
#pragma unroll
    for (int mt = 0; mt < MT; mt++)
#pragma unroll
        for (int half = 0; half < 2; half++) {
            int j = key + mt * 16 + half * 8 + row;
            // The columns [lo, hi) of this lane see key j.
            int lo = j - q.shift - i - column, hi = (a.window > 0 ? min(q.n_q, j + a.window - q.shift) : q.n_q) - i - column;
            if (j < 0 || j >= q.n_k) hi = INT_MIN;
#pragma unroll
            for (int nt = 0; nt < NT; nt++)
#pragma unroll
                for (int e = 0; e < 2; e++) {
                    float& x = s[mt][nt][half * 2 + e];
                    x = nt * 8 + e >= lo && nt * 8 + e < hi ? x : -INFINITY;
                }
        }
}

// keep[e], bit 4·(mt·NT + nt): whether weight e of product (mt, nt) is kept. Of the 16 numbers that four lanes with neighbouring keys hold of one product, each
// lane makes one Philox call, which is for four keys: lane `sub` of the four for those that are number `sub` in every lane; then they exchange the bits.
template <int MT, int NT>
__device__ __forceinline__ void kept_queries(uint32_t (&keep)[4], const SoftmaxAttention& a, const Dropout& drop, int position, int key) {
    int lane = threadIdx.x % 32, sub = lane / 4 % 4;
    uint32_t own = 0;
#pragma unroll
    for (int mt = 0; mt < MT; mt++)
#pragma unroll 2
        for (int nt = 0; nt < NT; nt++) {
            Philox random = drop.words(a, position + nt * 8 + lane % 4 * 2 + sub % 2, key + mt * 16 + sub / 2 * 8 + lane / 16 * 4);
#pragma unroll
            for (int w = 0; w < 4; w++) own |= (uint32_t)(random.word[w] >= a.dropout.threshold) << (4 * (mt * NT + nt) + w);
        }
#pragma unroll
    for (int e = 0; e < 4; e++) keep[e] = __shfl_sync(0xffffffff, own, (lane & ~12) | e * 4) >> sub;
}

template <class Shape, bool DROPOUT>
__global__ void __launch_bounds__(THREADS, Shape::BLOCKS) softmax_backward_dkv_kernel6(SoftmaxAttention a, SoftmaxGradients g, const float2* stats, int tiles) {
    constexpr int DQK = Shape::DQK, DV = Shape::DV, MT = Shape::MT, NT = Shape::NT, CHUNK = Shape::CHUNK, OTHERS = Shape::OTHERS;
    extern __shared__ __align__(128) int4 softmax_backward_shared[];
    const Piece b(a.kv_heads, tiles);
    const Sequence s(a, b.seq, DROPOUT);
    const int j0 = b.tile * Shape::ROWS - s.lead;
    if (j0 >= s.n_k) return;
    const Range range = queries_of(a, s, j0, j0 + Shape::ROWS);
    const int group = a.heads / a.kv_heads, h_end = (b.head + 1) * group;
    const int row = warp_of_block() * (16 * MT), first = j0 + row, last = first + 16 * MT - 1;  // the warp's first row in the tile; its keys
    const uint32_t shared_k = (uint32_t)__cvta_generic_to_shared(softmax_backward_shared), shared_v = shared_k + Shape::OWN_QK;
    const uint32_t own_k = shared_k + row * (DQK * 2), own_v = shared_v + row * (DV * 2), stages = shared_v + Shape::OWN_V;
    auto load_queries = [&](int stage, int h, int i) {
        uint32_t to = stages + stage * Shape::STAGE;
        load_tile<DQK, OTHERS>(to, a.q + s.q0 * a.q_stride + h * (int64_t)a.d_qk, a.q_stride, i, s.n_q, a.d_qk);
        load_tile<DV, OTHERS>(to + Shape::QK, g.d_o + s.q0 * g.do_stride + h * (int64_t)a.d_v, g.do_stride, i, s.n_q, a.d_v);
        int t = threadIdx.x;
        if (t < OTHERS) copy_async8(to + Shape::QK + Shape::V + t * 8, stats + h * a.q_rows + s.q0 + i + t, i + t < s.n_q);
        copy_async_commit();
    };

    auto advance = [&](int& h, int& i) {  // to the next tile: all of one head, then the next head of the group
        i += OTHERS;
        if (i >= range.end) i = range.begin, h++;
    };

    // Dropout's generator needs the registers of the keys.
    constexpr bool KEEP_K = Shape::KEEP_QK && !DROPOUT, KEEP_V = Shape::KEEP_V;
    float dk[MT][DQK / 8][4] = {}, dv[MT][DV / 8][4] = {};
    uint32_t k[KEEP_K ? DQK / 16 : 1][MT][4], v[KEEP_V ? DV / 16 : 1][MT][4];
    int h = b.head * group, i0 = range.begin, stage = 0;
    if (range.begin >= range.end) h = h_end;  // no query sees these keys
    if (h < h_end) {
        load_tile<DQK, Shape::ROWS>(shared_k, a.k + s.k0 * a.k_stride + b.head * a.k_head, a.k_stride, j0, s.n_k, a.d_qk);
        load_tile<DV, Shape::ROWS>(shared_v, a.v + s.k0 * a.v_stride + b.head * a.v_head, a.v_stride, j0, s.n_k, a.d_v);
        copy_async_commit();
        load_queries(0, h, i0);
        copy_async_wait<1>();
        __syncthreads();
        if constexpr (KEEP_K) keep_rows<Swizzled, DQK>(k, own_k);
        if constexpr (KEEP_V) keep_rows<Swizzled, DV>(v, own_v);
    }
    while (h < h_end) {
        copy_async_wait<0>();
        __syncthreads();  // this tile has come, and the one before has been read by all warps
        int h_next = h, i_next = i0;
        advance(h_next, i_next);
        if (h_next < h_end) load_queries(stage ^ 1, h_next, i_next);
        const uint32_t shared_q = stages + stage * Shape::STAGE, shared_do = shared_q + Shape::QK;
        const float4* shared_stats = (const float4*)((const char*)softmax_backward_shared + (shared_do + Shape::V - shared_k));  // of two queries each

#pragma unroll 1
        for (int c = 0; c < OTHERS; c += CHUNK) {
            // Position of the chunk's first query. Does no query here see any of the warp's keys?
            const int i = i0 + c, position = i + s.shift;
            if (first >= s.n_k || i >= range.end || position + CHUNK - 1 < first || (a.window > 0 && last <= position - a.window)) continue;
            const uint32_t q = shared_q + c * (DQK * 2), d_o = shared_do + c * (DV * 2);
            const float4* row_stats = shared_stats + c / 2 + threadIdx.x % 4;
            // Pᵀ = exp(K·Qᵀ − lse) and dPᵀ = V·dOᵀ − D.
            float p[MT][NT][4] = {}, dp[MT][NT][4];
#pragma unroll
            for (int nt = 0; nt < NT; nt++) {
                float4 two = row_stats[nt * 4];
#pragma unroll
                for (int mt = 0; mt < MT; mt++) dp[mt][nt][0] = dp[mt][nt][2] = -two.y, dp[mt][nt][1] = dp[mt][nt][3] = -two.w;
            }
            multiply<Swizzled, DQK>(p, k, own_k, q);
            multiply<Swizzled, DV>(dp, v, own_v, d_o);
            // Unless every query sees all keys: masks.
            if (last > position || first < 0 || last >= s.n_k || i + CHUNK > s.n_q || (a.window > 0 && first <= position + CHUNK - 1 - a.window))
                mask_queries(p, a, s, first, i);
            uint32_t keep[4] = {};
            if constexpr (DROPOUT) kept_queries<MT, NT>(keep, a, Dropout(a, b.seq, h), position, first);
            uint32_t weights[NT / 2][MT][4], ds[NT / 2][MT][4];
            const float scale = a.scale * LOG2E;
#pragma unroll
            for (int nt = 0; nt < NT; nt++) {
                float4 two = row_stats[nt * 4];
#pragma unroll
                for (int mt = 0; mt < MT; mt++) {
#pragma unroll
                    for (int e = 0; e < 4; e++) {
                        float& x = p[mt][nt][e];
                        float& dx = dp[mt][nt][e];
                        x = exp2_fast(x * scale - (e % 2 ? two.z : two.x));  // exactly 0 for −inf
                        if constexpr (DROPOUT) {
                            bool kept = keep[e] >> (4 * (mt * NT + nt)) & 1;
                            dx = x * (kept ? dx : e % 2 ? -two.w : -two.y);
                            x = kept ? x : 0;
                        } else {
                            dx *= x;
                        }
                    }
                    set_operand(weights, mt, nt, p[mt][nt]);
                    set_operand(ds, mt, nt, dp[mt][nt]);
                }
            }
            accumulate<Swizzled, DV>(dv, weights, d_o);
            accumulate<Swizzled, DQK>(dk, ds, q);
        }
        asm volatile("" : "+r"(i0));  // rather compute it again than keep it
        advance(h, i0);
        stage ^= 1;
    }
    const int begin = max(0, -first), end = s.n_k - first;
    const float factor = DROPOUT ? a.dropout.scale : 1;
    int4 *tile_k = softmax_backward_shared + row * (DQK / 8), *tile_v = softmax_backward_shared + Shape::OWN_QK / 16 + row * (DV / 8);
    store_rows<DQK>(g.dk + (s.k0 + first) * g.dk_stride + b.head * g.dk_head, g.dk_stride, dk, a.scale * factor, tile_k, begin, end, a.d_qk);
    store_rows<DV>(g.dv + (s.k0 + first) * g.dv_stride + b.head * g.dv_head, g.dv_stride, dv, factor, tile_v, begin, end, a.d_v);
}

// ---- queries --------------------------------------------------------------------------------------------------------------------------------------------

// Scores of keys that a query does not see become −inf. Rows are the warp's queries, of which the first is at `position`, columns keys from j on.
template <int MT, int NT>
__device__ __forceinline__ void mask_keys(float (&s)[MT][NT][4], const SoftmaxAttention& a, const Sequence& q, int position, int j) {
    int row = threadIdx.x % 32 / 4, column = threadIdx.x % 4 * 2;
#pragma unroll
    for (int mt = 0; mt < MT; mt++)
#pragma unroll
        for (int half = 0; half < 2; half++) {
            int at = position + mt * 16 + half * 8 + row;
            // The columns [lo, hi) of this lane are seen.
            int lo = (a.window > 0 ? max(0, at - a.window + 1) : 0) - j - column, hi = min(q.n_k, at + 1) - j - column;
#pragma unroll
            for (int nt = 0; nt < NT; nt++)
#pragma unroll
                for (int e = 0; e < 2; e++) {
                    float& x = s[mt][nt][half * 2 + e];
                    x = nt * 8 + e >= lo && nt * 8 + e < hi ? x : -INFINITY;
                }
        }
}

// keep[mt][half], bit 4·nt + e: whether weight 2·half + e of product (mt, nt) is kept. A lane holds two of the four neighbours that share a Philox call, in two
// rows, and the lane beside it the other two: the even one makes the call for `row`, the odd one for row+8, and they exchange the bits.
template <int MT, int NT>
__device__ __forceinline__ void kept_keys(uint32_t (&keep)[MT][2], const SoftmaxAttention& a, const Dropout& drop, int position, int j) {
    int lane = threadIdx.x % 32, odd = lane % 2;
#pragma unroll
    for (int mt = 0; mt < MT; mt++) {
        uint32_t own = 0;
#pragma unroll 2
        for (int nt = 0; nt < NT; nt++) {
            Philox random = drop.words(a, position + mt * 16 + odd * 8 + lane / 4, j + nt * 8 + lane % 4 / 2 * 4);
#pragma unroll
            for (int w = 0; w < 4; w++) own |= (uint32_t)(random.word[w] >= a.dropout.threshold) << (4 * nt + w);
        }
        uint32_t other = __shfl_xor_sync(0xffffffff, own, 1);
        keep[mt][0] = (odd ? other : own) >> (odd * 2);
        keep[mt][1] = (odd ? own : other) >> (odd * 2);
    }
}

template <class Shape, bool DROPOUT>
__global__ void __launch_bounds__(THREADS, Shape::BLOCKS) softmax_backward_dq_kernel6(SoftmaxAttention a, SoftmaxGradients g, const float2* stats, int tiles) {
    constexpr int DQK = Shape::DQK, DV = Shape::DV, MT = Shape::MT, NT = Shape::NT, CHUNK = Shape::CHUNK, OTHERS = Shape::OTHERS;
    extern __shared__ __align__(128) int4 softmax_backward_shared[];
    const Piece b(a.heads, tiles);
    const Sequence s(a, b.seq, DROPOUT);
    const int i0 = (tiles - 1 - b.tile) * Shape::ROWS;  // the last tile, which sees the most keys, first
    if (i0 >= s.n_q) return;
    const Range range = keys_of(a, s, i0, i0 + Shape::ROWS);
    const int kv = a.kv_head(b.head), row = warp_of_block() * (16 * MT), i = i0 + row;  // the warp's first query
    // Positions of its queries; if it has none, none of them sees anything.
    const int first = i + s.shift, last = i < s.n_q ? min(i + 16 * MT, s.n_q) - 1 + s.shift : INT_MIN;
    const uint32_t shared_q = (uint32_t)__cvta_generic_to_shared(softmax_backward_shared), shared_do = shared_q + Shape::OWN_QK;
    const uint32_t own_q = shared_q + row * (DQK * 2), own_do = shared_do + row * (DV * 2), stages = shared_do + Shape::OWN_V;
    auto load_keys = [&](int stage, int j) {
        uint32_t to = stages + stage * Shape::STAGE;
        load_tile<DQK, OTHERS>(to, a.k + s.k0 * a.k_stride + kv * a.k_head, a.k_stride, j, s.n_k, a.d_qk);
        load_tile<DV, OTHERS>(to + Shape::QK, a.v + s.k0 * a.v_stride + kv * a.v_head, a.v_stride, j, s.n_k, a.d_v);
        copy_async_commit();
    };

    float dq[MT][DQK / 8][4] = {}, lse[MT][2], delta[MT][2];
    uint32_t q[Shape::KEEP_QK ? DQK / 16 : 1][MT][4], d_o[Shape::KEEP_V ? DV / 16 : 1][MT][4];
    // Four keys that share a Philox call stay together.
    int j0 = (range.begin + s.lead) / 4 * 4 - s.lead, stage = 0;
    if (j0 < range.end) {
        load_tile<DQK, Shape::ROWS>(shared_q, a.q + s.q0 * a.q_stride + b.head * (int64_t)a.d_qk, a.q_stride, i0, s.n_q, a.d_qk);
        load_tile<DV, Shape::ROWS>(shared_do, g.d_o + s.q0 * g.do_stride + b.head * (int64_t)a.d_v, g.do_stride, i0, s.n_q, a.d_v);
        copy_async_commit();
        load_keys(0, j0);
#pragma unroll
        for (int mt = 0; mt < MT; mt++)
#pragma unroll
            for (int half = 0; half < 2; half++) {
                int r = i + mt * 16 + half * 8 + threadIdx.x % 32 / 4;
                float2 two = r < s.n_q ? stats[b.head * a.q_rows + s.q0 + r] : make_float2(INFINITY, 0);
                lse[mt][half] = two.x;
                delta[mt][half] = two.y;
            }
        copy_async_wait<1>();
        __syncthreads();
        if constexpr (Shape::KEEP_QK) keep_rows<Swizzled, DQK>(q, own_q);
        if constexpr (Shape::KEEP_V) keep_rows<Swizzled, DV>(d_o, own_do);
    }
    for (; j0 < range.end; j0 += OTHERS, stage ^= 1) {
        copy_async_wait<0>();
        __syncthreads();  // this tile has come, and the one before has been read by all warps
        if (j0 + OTHERS < range.end) load_keys(stage ^ 1, j0 + OTHERS);
        const uint32_t shared_k = stages + stage * Shape::STAGE, shared_v = shared_k + Shape::QK;

#pragma unroll 1
        for (int c = 0; c < OTHERS; c += CHUNK) {
            // Does no query of the warp see any of these keys?
            const int j = j0 + c;
            if (j > last || (a.window > 0 && j + CHUNK - 1 <= first - a.window)) continue;
            const uint32_t k = shared_k + c * (DQK * 2), v = shared_v + c * (DV * 2);
            // P = exp(Q·Kᵀ − lse) and dP = dO·Vᵀ − D.
            float p[MT][NT][4] = {}, dp[MT][NT][4];
#pragma unroll
            for (int mt = 0; mt < MT; mt++)
#pragma unroll
                for (int nt = 0; nt < NT; nt++)
#pragma unroll
                    for (int e = 0; e < 4; e++) dp[mt][nt][e] = -delta[mt][e / 2];
            multiply<Swizzled, DQK>(p, q, own_q, k);
            multiply<Swizzled, DV>(dp, d_o, own_do, v);
            // Unless every query sees all keys: masks.
            if (j + CHUNK - 1 > first || j < 0 || j + CHUNK > s.n_k || (a.window > 0 && j <= last - a.window)) mask_keys(p, a, s, first, j);
            uint32_t keep[MT][2] = {}, ds[NT / 2][MT][4];
            if constexpr (DROPOUT) kept_keys<MT, NT>(keep, a, Dropout(a, b.seq, b.head), first, j);
            const float scale = a.scale * LOG2E;
#pragma unroll
            for (int nt = 0; nt < NT; nt++)
#pragma unroll
                for (int mt = 0; mt < MT; mt++) {
#pragma unroll
                    for (int e = 0; e < 4; e++) {
                        float& dx = dp[mt][nt][e];
                        if constexpr (DROPOUT) dx = keep[mt][e / 2] >> (4 * nt + e % 2) & 1 ? dx : -delta[mt][e / 2];
                        dx *= exp2_fast(p[mt][nt][e] * scale - lse[mt][e / 2]);  // times exactly 0 for −inf
                    }
                    set_operand(ds, mt, nt, dp[mt][nt]);
                }
            accumulate<Swizzled, DQK>(dq, ds, k);
        }
    }
    const float factor = a.scale * (DROPOUT ? a.dropout.scale : 1);
    store_rows<DQK>(g.dq + (s.q0 + i) * g.dq_stride + b.head * (int64_t)a.d_qk, g.dq_stride, dq, factor, softmax_backward_shared + row * (DQK / 8), 0,
                    s.n_q - i, a.d_qk);
}

// ---- launching ------------------------------------------------------------------------------------------------------------------------------------------

template <class DkvShape, class DqShape, bool DROPOUT>
inline void launch6(cudaStream_t stream, const SoftmaxAttention& a, const SoftmaxGradients& g, const float2* stats) {
    static_assert(DkvShape::DQK == DqShape::DQK && DkvShape::DV == DqShape::DV, "one pair of sizes");
    const int k_tiles = (int)ceil_div(a.max_k > 0 && DROPOUT && a.drop_pos ? (int64_t)a.max_k + 3 : a.max_k, DkvShape::ROWS);
    const int q_tiles = (int)ceil_div(a.max_q, DqShape::ROWS);
    const unsigned dkv = grid_size(a.num_seqs, a.kv_heads, k_tiles), dq = grid_size(a.num_seqs, a.heads, q_tiles);
    if (dkv > 0) {
        auto kernel = softmax_backward_dkv_kernel6<DkvShape, DROPOUT>;
        allow_shared_memory(kernel, DkvShape::BYTES);
        kernel<<<dkv, THREADS, DkvShape::BYTES, stream>>>(a, g, stats, k_tiles);
        LAUNCH_CHECK();
    }
    if (dq > 0) {
        auto kernel = softmax_backward_dq_kernel6<DqShape, DROPOUT>;
        allow_shared_memory(kernel, DqShape::BYTES);
        kernel<<<dq, THREADS, DqShape::BYTES, stream>>>(a, g, stats, q_tiles);
        LAUNCH_CHECK();
    }
}
template <class DkvShape, class DqShape>
inline void launch6(cudaStream_t stream, const SoftmaxAttention& a, const SoftmaxGradients& g, const float2* stats) {
    if (a.dropout.p > 0)
        launch6<DkvShape, DqShape, true>(stream, a, g, stats);
    else
        launch6<DkvShape, DqShape, false>(stream, a, g, stats);
}

inline bool fits_tensor_cores(const SoftmaxAttention& a, const SoftmaxGradients& g) {
    bool fits = a.d_qk <= 192 && a.d_v <= 128;
    for (int64_t n : {(int64_t)a.d_qk, (int64_t)a.d_v, a.q_stride, a.k_stride, a.k_head, a.v_stride, a.v_head, g.do_stride, g.dq_stride, g.dk_stride, g.dk_head,
                      g.dv_stride, g.dv_head})
        fits = fits && n % 8 == 0;
    for (const floatX* p : {a.q, a.k, a.v, g.d_o, (const floatX*)g.dq, (const floatX*)g.dk, (const floatX*)g.dv}) fits = fits && aligned16(p);
    return fits;
}

inline void launch6(cudaStream_t stream, const SoftmaxAttention& a, const SoftmaxGradients& g, const float2* stats) {
    // The smallest pair of sizes that holds d_qk, d_v.
    //                                     d_qk d_v  MT others chunk blocks
    if (a.d_qk <= 32 && a.d_v <= 32)
        launch6<Shape<32, 32, 2, 64, 16, 2>, Shape<32, 32, 2, 64, 32, 3>>(stream, a, g, stats);
    else if (a.d_qk <= 64 && a.d_v <= 64)
        launch6<Shape<64, 64, 2, 64, 16, 2>, Shape<64, 64, 2, 64, 32, 2>>(stream, a, g, stats);
    else if (a.d_qk <= 96 && a.d_v <= 64)
        launch6<Shape<96, 64, 1, 64, 16, 3>, Shape<96, 64, 2, 64, 16, 2>>(stream, a, g, stats);
    else if (a.d_qk <= 96 && a.d_v <= 96)
        launch6<Shape<96, 96, 1, 64, 32, 2>, Shape<96, 96, 1, 64, 32, 3>>(stream, a, g, stats);
    else if (a.d_qk <= 128 && a.d_v <= 128)
        launch6<Shape<128, 128, 1, 64, 16, 2>, Shape<128, 128, 1, 64, 32, 2>>(stream, a, g, stats);
    else
        launch6<Shape<192, 128, 1, 32, 16, 2, false, true>, Shape<192, 128, 1, 32, 16, 2>>(stream, a, g, stats);
}

#endif

}  // namespace softmax_bwd

// Scratch in bytes: two numbers for each query and head, and two counters.
inline int64_t softmax_backward_scratch(int heads, int kv_heads, int d_qk, int d_v, int64_t q_rows, int64_t k_rows) {
    (void)kv_heads, (void)d_qk, (void)d_v, (void)k_rows;
    return scratch_bytes({heads * q_rows * (int64_t)sizeof(float2), 2 * sizeof(int)});
}

// dq, dk, dv of every row of every sequence, zeros where nothing is seen, and dbias. Source: attention.h, cpu::softmax_backward.
inline void softmax_backward(cudaStream_t stream, const SoftmaxAttention& attention, const SoftmaxGradients& g, Scratch scratch) {
    using namespace softmax_bwd;
    SoftmaxAttention a = attention;
    assert(!a.states && !a.q_at && a.heads % a.kv_heads == 0 && a.scale > 0);
    if (a.window >= a.max_k) a.window = 0;
    float2* stats = scratch.take<float2>(a.heads * a.q_rows);
    assert(!g.dbias || (g.dk - g.dq == (int64_t)a.heads * a.d_qk && g.dv - g.dk == (int64_t)a.kv_heads * a.d_qk && g.dk_stride == g.dq_stride));
#ifndef GPU_FLOAT32
    const bool tensor_cores = fits_tensor_cores(a, g);
    if (tensor_cores && launch7(stream, a, g, stats, scratch.take<int>(2))) return;
    launch_delta(stream, a, g, stats);
    if (tensor_cores)
        launch6(stream, a, g, stats);
    else
        launch2(stream, a, g, stats);
#else
    launch_delta(stream, a, g, stats);
    launch2(stream, a, g, stats);
#endif
    launch_bias(stream, a, g);
}

}  // namespace gpu
