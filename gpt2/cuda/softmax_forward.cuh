// The softmax core, forward: the twin of cpu::softmax_forward (attention.h) for packed rows; keys and values in pages are decode.cuh's.
//
//     s_ij = scale·q_i·k_j   for the keys j that query i sees      p_ij = exp(s_ij − lse_i),  lse_i = ln Σ_j exp(s_ij)      o_i = Σ_j z_ij·p_ij·v_j
//
// as FlashAttention-2 (Dao, arXiv 2307.08691) does it: a block owns a tile of queries and walks over the tiles of keys that they see; nothing of size T² is
// stored. Each row keeps its largest score so far m, the sum l and the weighted sum of values O, and with each tile of scores s = q·k
//
//     m' = max(m, max_j s_j)      p_j = exp(scale·(s_j − m'))      l' = l·exp(scale·(m − m')) + Σ_j p_j      O' = O·exp(scale·(m − m')) + Σ_j z_j·p_j·v_j
//
// from m = −inf, l = 0, O = 0; in the end o = O/l, lse = scale·m + ln l. Exponentials are powers of 2, log₂e being part of the scale. z is attention
// dropout's 0 or 1/(1−p), and l a sum before dropout. m, l, O and s are float32; in the bf16 kernel p is rounded to bf16 for the product with v.
//
//     softmax_forward_kernel2   any sizes and strides, float32 arithmetic: float32's only kernel, and bf16's for what the other does not take
//     softmax_forward_kernel5   tensor cores: bf16, d_qk <= 192, d_v <= 128, all sizes and strides multiples of 8
//     softmax_forward_kernel6   the same on Hopper GPUs, where there is no dropout: softmax_forward_hopper.cuh (with two warpgroups it is the ladder's 7)
//
// The numbers are those of the ladder, dev/cuda/attention_forward.cu, where the versions before them stand.
// FLOPs: 2·(d_qk+d_v) for each visible pair and head. Memory: q, k, v, o once each, while the keys and values of the heads at work fit the L2 cache.
#pragma once

#include <climits>

#include "softmax.cuh"
#include "tensor_cores.cuh"

namespace gpu {

namespace softmax_fwd {

constexpr int THREADS = 128;

// ---- which block does what, and which keys it needs -----------------------------------------------------------------------------------------------------

struct Block {
    int seq, head, start;  // start: the block's first query, counted in its sequence
    int n_q, n_k;          // of the sequence
    int first;             // position of the first query
    // Where the first tile of keys begins, and behind the last key that some query sees; nothing to see if begin >= end. Tiles begin at multiples of their
    // size, but under dropout where four neighbouring keys begin that share a Philox call: a segment may begin in the midst of four, and its first tile up to
    // 3 keys before it. Keys before 0 are masked like those behind n_k.
    int begin, end;
    const floatX *q, *k, *v;  // the block's head: of the first query of the block, of the sequence's first key
    int64_t k_stride, v_stride;
};

// The grid is one-dimensional, since only x has room for very many sequences. The tiles of one head of one sequence are neighbours, so that its keys are read
// from the L2 cache; the last tile, which has the most keys, comes first.
//     Sequences of about one length: each gets as many tiles as the longest.
//     Ragged batches (equal_tiles = 0): blocks go by slots of `heads` blocks. Sequence s owns the slots from ⌊cu_q[s]/rows⌋ + s to the next sequence's; these
//     are as many as its tiles or one more, and the whole grid has q_rows/rows + num_seqs of them.
HOST_DEVICE inline int equal_tiles(const SoftmaxAttention& a, int rows) {
    int64_t tiles = ceil_div(a.max_q, rows);
    return tiles * a.num_seqs <= a.q_rows / rows + a.num_seqs ? (int)tiles : 0;
}
inline int grid_blocks(const SoftmaxAttention& a, int rows) {
    if (a.num_seqs == 0 || a.max_q == 0) return 0;
    int64_t tiles = equal_tiles(a, rows), blocks = (tiles > 0 ? tiles * a.num_seqs : a.q_rows / rows + a.num_seqs) * a.heads;
    assert(blocks <= INT_MAX);
    return (int)blocks;
}

// Block x of a ragged batch: sequence, head, and the tile, counted from the sequence's last; whole warps call it. False: nothing to do.
__device__ inline bool find_ragged_tile(const SoftmaxAttention& a, int rows, int x, int* seq, int* head, int* tile) {
    // The last sequence whose slots begin at or before ours: the 32 lanes look at 32 of those in question, n from s on.
    int slot = x / a.heads, lane = threadIdx.x % 32, s = 0;
    for (int n = a.num_seqs; n > 1;) {
        int step = (n + 31) / 32, at = lane * step;
        bool begun = at < n && a.cu_q[s + at] / rows + s + at <= slot;
        int last = max(__popc(__ballot_sync(0xffffffff, begun)) - 1, 0);
        s += last * step;
        n = min(step, n - last * step);
    }
    int first = a.cu_q[s] / rows + s, tiles = a.cu_q[s + 1] / rows + s + 1 - first;
    x -= first * a.heads;
    *seq = s;
    *head = x / tiles;
    *tile = x % tiles;
    return x >= 0 && *head < a.heads && *tile * rows < a.q_len(s);  // not before the first sequence, nor behind the last
}

// `rows` queries and `keys` keys a tile.
__device__ inline bool find_block(const SoftmaxAttention& a, int rows, int keys, bool dropout, Block* b) {
    int tiles = equal_tiles(a, rows), tile;
    if (tiles > 0) {
        tile = blockIdx.x % tiles;
        b->seq = blockIdx.x / tiles / a.heads;
        b->head = blockIdx.x / tiles % a.heads;
        if (tile * rows >= a.q_len(b->seq)) return false;
    } else if (!find_ragged_tile(a, rows, blockIdx.x, &b->seq, &b->head, &tile)) {
        return false;
    }
    int s = b->seq, g = b->head * a.kv_heads / a.heads;
    b->start = ((a.q_len(s) - 1) / rows - tile) * rows;
    b->n_q = a.q_len(s);
    b->n_k = a.k_len(s);
    b->first = a.position(s, b->start);
    int shift = dropout && a.drop_pos ? a.drop_pos[s] % 4 : 0;
    b->begin = (a.window > 0 ? (max(0, b->first - a.window + 1) + shift) / keys * keys : 0) - shift;
    b->end = min(b->first + min(rows, b->n_q - b->start), b->n_k);
    b->q = a.q + (a.cu_q[s] + b->start) * a.q_stride + b->head * (int64_t)a.d_qk;
    b->k = a.k + a.cu_k[s] * a.k_stride + g * a.k_head;
    b->v = a.v + a.cu_k[s] * a.v_stride + g * a.v_head;
    b->k_stride = a.k_stride;
    b->v_stride = a.v_stride;
    return true;
}

// The keys [*lo, *hi) that the query at `position` sees, none if *lo >= *hi, where the sequence's keys are [begin, end). Any of them may be counted from.
__device__ inline void visible_keys(int position, int window, int begin, int end, int* lo, int* hi) {
    *lo = window > 0 ? max(begin, position - window + 1) : begin;
    *hi = min(end, position + 1);
}

// What is subtracted from scores: m, or of a row without a key so far (−inf) 0, since −inf − (−inf) would be NaN.
__device__ inline float finite(float m) { return m == -INFINITY ? 0 : m; }

__device__ inline float log_sum_exp(float m, float l, float scale) { return l == 0 ? -INFINITY : m * scale + logf(l); }

// ---- the kernel for everything: float32 arithmetic --------------------------------------------------------------------------------------------------------
//
// 64 queries by 64 keys in 128 threads: thread (ty,tx) of 8×16 has the queries ty, ty+8 ... and the keys tx, tx+16 ... for the scores, or four neighbouring
// columns of each 64 of O. Both products are made of slabs of 32 (channels of q and k; keys of v) in shared memory, 8×4 numbers a thread from 12 reads of
// 16 bytes for 4 steps of 32 products. Rows are padded by 4 floats, so that eight threads reading eight rows meet different banks.

constexpr int ROWS2 = 64, KEYS2 = 64, SLAB = 32;

struct Slabs {
    float q[ROWS2][SLAB + 4], k[KEYS2][SLAB + 4];
};

// Rows first ... of a matrix, those of them in [0, end), and columns c0 ... below d; zeros elsewhere.
template <int ROWS, int COLUMNS, int WIDTH>
__device__ inline void load_slab(float (&to)[ROWS][WIDTH], const floatX* from, int64_t stride, int first, int end, int c0, int d) {
    constexpr int HEIGHT = THREADS / COLUMNS;
    int row = threadIdx.x / COLUMNS, c = threadIdx.x % COLUMNS;
    from += (first + row) * stride + c0 + c;
#pragma unroll 8
    for (int r = 0; r < ROWS; r += HEIGHT) to[row + r][c] = (unsigned)(first + row + r) < (unsigned)end && c0 + c < d ? to_float(from[r * stride]) : 0;
}

// A block makes up to DV columns of O, from v0 = blockIdx.y·DV on.
template <int DV>
__global__ void __launch_bounds__(THREADS, 3) softmax_forward_kernel2(SoftmaxAttention a, floatX* o, int64_t o_stride, float* lse, bool dropout) {
    __shared__ union alignas(16) {
        Slabs qk;
        float v[SLAB][DV];
    } slab;
    __shared__ alignas(16) float p[ROWS2][KEYS2 + 4];
    __shared__ Block b;  // not in registers, which are scarce
    Block found;
    if (!find_block(a, ROWS2, KEYS2, dropout, &found)) return;
    if (threadIdx.x == 0) b = found;
    __syncthreads();
    int tx = threadIdx.x % 16, ty = threadIdx.x / 16, v0 = blockIdx.y * DV;
    float scale = a.scale * LOG2E, m[8], l[8], acc[8][DV / 16] = {};
#pragma unroll
    for (int r = 0; r < 8; r++) m[r] = -INFINITY, l[r] = 0;

    for (int j0 = b.begin; j0 < b.end; j0 += KEYS2) {
        float s[8][4] = {};
        for (int c0 = 0; c0 < a.d_qk; c0 += SLAB) {
            __syncthreads();  // the slab before has been read
            load_slab<ROWS2, SLAB>(slab.qk.q, b.q, a.q_stride, 0, b.n_q - b.start, c0, a.d_qk);
            load_slab<KEYS2, SLAB>(slab.qk.k, b.k, a.k_stride, j0, b.n_k, c0, a.d_qk);
            __syncthreads();
#pragma unroll 2
            for (int c = 0; c < SLAB; c += 4) {
                float4 kc[4];
#pragma unroll
                for (int u = 0; u < 4; u++) kc[u] = *(const float4*)&slab.qk.k[tx + 16 * u][c];
#pragma unroll
                for (int r = 0; r < 8; r++) {
                    float4 qc = *(const float4*)&slab.qk.q[ty + 8 * r][c];
#pragma unroll
                    for (int u = 0; u < 4; u++) s[r][u] += qc.x * kc[u].x + qc.y * kc[u].y + qc.z * kc[u].z + qc.w * kc[u].w;
                }
            }
        }

        // The running softmax; the 16 threads of a row are half a warp.
#pragma unroll
        for (int r = 0; r < 8; r++) {
            int lo, hi;
            visible_keys(b.first - j0 + ty + 8 * r, a.window, -j0, b.n_k - j0, &lo, &hi);  // counted from the tile's first
            float now = m[r], sum = 0;
#pragma unroll
            for (int u = 0; u < 4; u++) {
                int c = tx + 16 * u;
                s[r][u] = c >= lo && c < hi ? s[r][u] : -INFINITY;
                now = fmaxf(now, s[r][u]);
            }
            for (int offset = 8; offset > 0; offset /= 2) now = fmaxf(now, __shfl_xor_sync(0xffffffff, now, offset));
            float rescale = exp2f((m[r] - finite(now)) * scale);
#pragma unroll
            for (int u = 0; u < 4; u++) {
                float weight = s[r][u] == -INFINITY ? 0 : exp2f((s[r][u] - now) * scale);
                p[ty + 8 * r][tx + 16 * u] = weight;
                sum += weight;
            }
            m[r] = now;
            l[r] = l[r] * rescale + sum;  // of this thread's keys
#pragma unroll
            for (int c = 0; c < DV / 16; c++) acc[r][c] *= rescale;
        }
        if (dropout) {
            __syncthreads();
            Dropout drop(a, b.seq, b.head);
            for (int at = threadIdx.x; at < ROWS2 * KEYS2 / 4; at += THREADS) {
                int row = at / (KEYS2 / 4), c = at % (KEYS2 / 4) * 4;
                Philox random = drop.words(a, b.first + row, j0 + c);
                for (int w = 0; w < 4; w++)
                    if (random.word[w] < a.dropout.threshold) p[row][c + w] = 0;
            }
        }

        for (int k0 = 0; k0 < KEYS2; k0 += SLAB) {
            __syncthreads();  // p is complete; the slab before has been read
            load_slab<SLAB, DV>(slab.v, b.v, a.v_stride, j0 + k0, b.n_k, v0, a.d_v);
            __syncthreads();
#pragma unroll 1
            for (int j = 0; j < SLAB; j += 4) {
                float4 vj[4][DV / 64];
#pragma unroll
                for (int u = 0; u < 4; u++)
#pragma unroll
                    for (int c = 0; c < DV / 64; c++) vj[u][c] = *(const float4*)&slab.v[j + u][c * 64 + tx * 4];
#pragma unroll
                for (int r = 0; r < 8; r++) {
                    float4 pj = *(const float4*)&p[ty + 8 * r][k0 + j];
#pragma unroll
                    for (int c = 0; c < DV / 64; c++) {
                        float* out = &acc[r][c * 4];
                        out[0] += pj.x * vj[0][c].x + pj.y * vj[1][c].x + pj.z * vj[2][c].x + pj.w * vj[3][c].x;
                        out[1] += pj.x * vj[0][c].y + pj.y * vj[1][c].y + pj.z * vj[2][c].y + pj.w * vj[3][c].y;
                        out[2] += pj.x * vj[0][c].z + pj.y * vj[1][c].z + pj.z * vj[2][c].z + pj.w * vj[3][c].z;
                        out[3] += pj.x * vj[0][c].w + pj.y * vj[1][c].w + pj.z * vj[2][c].w + pj.w * vj[3][c].w;
                    }
                }
            }
        }
    }

#pragma unroll
    for (int r = 0; r < 8; r++) {
        for (int offset = 8; offset > 0; offset /= 2) l[r] += __shfl_xor_sync(0xffffffff, l[r], offset);
        int i = b.start + ty + 8 * r;
        if (i >= b.n_q) continue;
        int64_t n = a.cu_q[b.seq] + i;
        float factor = l[r] == 0 ? 0 : (dropout ? a.dropout.scale : 1) / l[r];
#pragma unroll
        for (int c = 0; c < DV / 16; c++) {
            int column = v0 + c / 4 * 64 + tx * 4 + c % 4;
            if (column < a.d_v) o[n * o_stride + b.head * (int64_t)a.d_v + column] = from_float<floatX>(acc[r][c] * factor);
        }
        if (lse && tx == 0 && v0 == 0) lse[b.head * a.q_rows + n] = log_sum_exp(m[r], l[r], a.scale);
    }
}

// ---- the kernel for tensor cores ----------------------------------------------------------------------------------------------------------------------------
#ifndef GPU_FLOAT32

// How a tile of rows of D numbers lies in shared memory, in chunks of 8 numbers (16 bytes). ldmatrix reads one chunk of each of eight neighbouring rows,
// cp.async writes eight neighbouring chunks: each time the eight must be different modulo 8, to meet all banks once. So a row's chunks change places with one
// another, by an exclusive or with the row's number: within groups of 8, or of 4 where a row is an odd number of times 4 chunks long and two rows go
// once around the banks. Tiles begin at multiples of 128 bytes; rows 8 apart are alike.
template <int D>
struct Swizzled {
    static constexpr int GROUP = D % 64 == 0 ? 8 : 4;
    __device__ static int at(int row, int chunk) { return row * (D / 8) + (chunk ^ (GROUP == 8 ? row & 7 : row >> 1 & 3)); }
    // `address` is that of chunk 0 or 1 of some row: the address of the chunk 2·c behind it.
    __device__ static uint32_t step(uint32_t address, int c) { return (address ^ 2 * c % GROUP * 16) + 2 * c / GROUP * (GROUP * 16); }
};

// ROWS rows from row `first` on; rows outside [0, end) and columns from d on become zeros. The block takes 8 chunks of 16 rows at a time (or 4 of 32): as many
// rows as swizzling repeats after, so that all addresses of a thread are constant distances from its first.
template <int D, int ROWS>
__device__ __forceinline__ void load_tile(uint32_t to, const floatX* from, int64_t stride, int first, int end, int d) {
    constexpr int WIDTH = Swizzled<D>::GROUP, HEIGHT = THREADS / WIDTH;
    int row = threadIdx.x / WIDTH, chunk = threadIdx.x % WIDTH;
    to += 16 * Swizzled<D>::at(row, chunk);
    from += (int64_t)(first + row) * stride + chunk * 8;
#pragma unroll
    for (int r = 0; r < ROWS; r += HEIGHT)
#pragma unroll
        for (int c = 0; c < D / 8; c += WIDTH)
            copy_async16(to + 16 * (r * (D / 8) + c), from + r * stride + c * 8, (unsigned)(first + row + r) < (unsigned)end && (chunk + c) * 8 < d);
}

// A warp has MT times 16 rows and NT times 8 keys. Addresses q, k, v are those of its first row, and of the tile's first key, in shared memory.
//
// s = q·kᵀ over D channels. Of k a lane fetches both halves of 16 channels for 16 keys: matrices (keys 0..7, channels 0..7), (0..7, 8..15), (8..15, 0..7) ...
template <template <int> class Layout, int D, int MT, int NT>
__device__ __forceinline__ void multiply_qk(float (&s)[MT][NT][4], uint32_t q, uint32_t k) {
    int lane = threadIdx.x % 32;
    q += 16 * Layout<D>::at(lane % 16, lane / 16);
    k += 16 * Layout<D>::at(lane % 8 + lane / 16 * 8, lane / 8 % 2);
#pragma unroll
    for (int c = 0; c < D / 16; c++) {
        uint32_t qc[MT][4];
#pragma unroll
        for (int mt = 0; mt < MT; mt++) load_matrices(qc[mt], Layout<D>::step(q, c) + 16 * Layout<D>::at(mt * 16, 0));
#pragma unroll
        for (int nt = 0; nt < NT; nt += 2) {
            uint32_t kc[4];
            load_matrices(kc, Layout<D>::step(k, c) + 16 * Layout<D>::at(nt * 8, 0));
#pragma unroll
            for (int mt = 0; mt < MT; mt++) {
                mma(s[mt][nt], qc[mt], kc[0], kc[1]);
                mma(s[mt][nt + 1], qc[mt], kc[2], kc[3]);
            }
        }
    }
}

// acc += p·v. Of v the matrices are (keys 0..7, columns 0..7), (8..15, 0..7), (0..7, 8..15) ... transposed on the way.
template <template <int> class Layout, int D, int MT, int NT>
__device__ __forceinline__ void multiply_pv(float (&acc)[MT][D / 8][4], const float (&p)[MT][NT][4], uint32_t v) {
    int lane = threadIdx.x % 32;
    v += 16 * Layout<D>::at(lane % 16, lane / 16);
#pragma unroll
    for (int nt = 0; nt < NT; nt += 2) {
        uint32_t pj[MT][4];
#pragma unroll
        for (int mt = 0; mt < MT; mt++) {
            pj[mt][0] = pack_bf16(p[mt][nt][0], p[mt][nt][1]);
            pj[mt][1] = pack_bf16(p[mt][nt][2], p[mt][nt][3]);
            pj[mt][2] = pack_bf16(p[mt][nt + 1][0], p[mt][nt + 1][1]);
            pj[mt][3] = pack_bf16(p[mt][nt + 1][2], p[mt][nt + 1][3]);
        }
#pragma unroll
        for (int c = 0; c < D / 8; c += 2) {
            uint32_t vj[4];
            load_matrices_transposed(vj, Layout<D>::step(v, c / 2) + 16 * Layout<D>::at(nt * 8, 0));
#pragma unroll
            for (int mt = 0; mt < MT; mt++) {
                mma(acc[mt][c], pj[mt], vj[0], vj[1]);
                mma(acc[mt][c + 1], pj[mt], vj[2], vj[3]);
            }
        }
    }
}

// Scores of keys that a row does not see become −inf. Everything is counted from the tile's first key: `position` (of the warp's first row), the sequence's
// keys [begin, end).
template <int MT, int NT>
__device__ __forceinline__ void mask_scores(float (&s)[MT][NT][4], int position, int window, int begin, int end) {
    int row = threadIdx.x % 32 / 4, column = threadIdx.x % 4 * 2;
#pragma unroll
    for (int mt = 0; mt < MT; mt++)
#pragma unroll
        for (int half = 0; half < 2; half++) {
            int lo, hi;
            visible_keys(position + mt * 16 + half * 8 + row, window, begin, end, &lo, &hi);
#pragma unroll
            for (int nt = 0; nt < NT; nt++)
#pragma unroll
                for (int e = 0; e < 2; e++) {
                    float& x = s[mt][nt][half * 2 + e];
                    x = nt * 8 + e >= lo - column && nt * 8 + e < hi - column ? x : -INFINITY;
                }
        }
}

// The running softmax: scores become weights, m and l (l: of this lane's keys) the new ones, and O is rescaled. In the later tiles of a long sequence no row's
// maximum may grow any more; then nothing needs rescaling.
template <int MT, int NT, int DT>
__device__ __forceinline__ void softmax_rows(float (&s)[MT][NT][4], float (&m)[MT][2], float (&l)[MT][2], float (&acc)[MT][DT][4], float scale) {
    float now[MT][2];
    bool grown = false;
#pragma unroll
    for (int mt = 0; mt < MT; mt++)
#pragma unroll
        for (int half = 0; half < 2; half++) {
            float x = m[mt][half];
#pragma unroll
            for (int nt = 0; nt < NT; nt++) x = fmaxf(x, fmaxf(s[mt][nt][half * 2], s[mt][nt][half * 2 + 1]));
            x = fmaxf(x, __shfl_xor_sync(0xffffffff, x, 1));
            now[mt][half] = fmaxf(x, __shfl_xor_sync(0xffffffff, x, 2));
            grown |= now[mt][half] > m[mt][half];
        }
    if (__any_sync(0xffffffff, grown)) {
#pragma unroll
        for (int mt = 0; mt < MT; mt++)
#pragma unroll
            for (int half = 0; half < 2; half++) {
                float rescale = exp2_fast((m[mt][half] - finite(now[mt][half])) * scale);
                m[mt][half] = now[mt][half];
                l[mt][half] *= rescale;
#pragma unroll
                for (int c = 0; c < DT; c++) acc[mt][c][half * 2] *= rescale, acc[mt][c][half * 2 + 1] *= rescale;
            }
    }
#pragma unroll
    for (int mt = 0; mt < MT; mt++)
#pragma unroll
        for (int half = 0; half < 2; half++) {
            float shift = finite(m[mt][half]) * scale;
#pragma unroll
            for (int nt = 0; nt < NT; nt++)
#pragma unroll
                for (int e = half * 2; e < half * 2 + 2; e++) {
                    s[mt][nt][e] = exp2_fast(s[mt][nt][e] * scale - shift);  // exactly 0 for −inf
                    l[mt][half] += s[mt][nt][e];
                }
        }
}

// Dropped weights become 0. A lane holds two of the four neighbours that share a Philox call, in two rows, and the lane beside it the other two: the even one
// makes the call for `row`, the odd one for row+8, for all keys of the tile one bit each (4·NT <= 32), and they exchange the bits.
template <int NT>
__device__ __forceinline__ void drop_weights(float (&p)[NT][4], const SoftmaxAttention& a, const Dropout& drop, int position, int j0) {
    int lane = threadIdx.x % 32, odd = lane % 2;
    uint32_t own = 0;
#pragma unroll 2
    for (int nt = 0; nt < NT; nt++) {
        Philox random = drop.words(a, position + lane / 4 + odd * 8, j0 + nt * 8 + lane % 4 / 2 * 4);
#pragma unroll
        for (int w = 0; w < 4; w++) own |= (uint32_t)(random.word[w] >= a.dropout.threshold) << (nt * 4 + w);
    }
    uint32_t other = __shfl_xor_sync(0xffffffff, own, 1);
    uint32_t keep[2] = {(odd ? other : own) >> (odd * 2), (odd ? own : other) >> (odd * 2)};
#pragma unroll
    for (int nt = 0; nt < NT; nt++)
#pragma unroll
        for (int e = 0; e < 4; e++) p[nt][e] = keep[e / 2] >> (nt * 4 + e % 2) & 1 ? p[nt][e] : 0;
}

// o = O·factor through `tile`, 16·MT rows of shared memory of the warp's own, so that 16 bytes are stored at a time; rows below `rows`, columns below d.
template <int D, int MT>
__device__ __forceinline__ void store_rows(floatX* o, int64_t stride, const float (&acc)[MT][D / 8][4], const float (&factor)[MT][2], int4* tile, int rows,
                                           int d) {
    int lane = threadIdx.x % 32;
    __syncwarp();
#pragma unroll
    for (int mt = 0; mt < MT; mt++)
#pragma unroll
        for (int half = 0; half < 2; half++)
#pragma unroll
            for (int c = 0; c < D / 8; c++) {
                uint32_t* chunk = (uint32_t*)&tile[Swizzled<D>::at(mt * 16 + half * 8 + lane / 4, c)];
                chunk[lane % 4] = pack_bf16(acc[mt][c][half * 2] * factor[mt][half], acc[mt][c][half * 2 + 1] * factor[mt][half]);
            }
    __syncwarp();
#pragma unroll 4
    for (int at = lane; at < 16 * MT * (D / 8); at += 32) {
        int row = at / (D / 8), c = at % (D / 8);
        if (row < rows && c * 8 < d) *(int4*)(o + row * stride + c * 8) = tile[Swizzled<D>::at(row, c)];
    }
}

// What a warp does at the end: sums over the four lanes of a row, then o and lse. `n`: its first row among the rows of q; `rows`: how many of its rows exist.
template <int D, int MT>
__device__ __forceinline__ void finish_rows(const SoftmaxAttention& a, int h, int64_t n, int rows, floatX* o, int64_t o_stride, float* lse,
                                            const float (&acc)[MT][D / 8][4], const float (&m)[MT][2], float (&l)[MT][2], float dropout_scale, int4* tile) {
    int lane = threadIdx.x % 32;
    float factor[MT][2];
#pragma unroll
    for (int mt = 0; mt < MT; mt++)
#pragma unroll
        for (int half = 0; half < 2; half++) {
            float& sum = l[mt][half];
            sum += __shfl_xor_sync(0xffffffff, sum, 1);
            sum += __shfl_xor_sync(0xffffffff, sum, 2);
            factor[mt][half] = sum == 0 ? 0 : dropout_scale / sum;
            int row = mt * 16 + half * 8 + lane / 4;
            if (lse && lane % 4 == 0 && row < rows) lse[h * a.q_rows + n + row] = log_sum_exp(m[mt][half], sum, a.scale);
        }
    store_rows<D, MT>(o + n * o_stride + h * (int64_t)a.d_v, o_stride, acc, factor, tile, rows, a.d_v);
}

// Four warps of MT·16 rows, d_qk <= DQK, d_v <= DV <= DQK. In shared memory stand the tile of Q and two buffers for a tile of K and one of V: while one tile of
// keys and values is worked on, the next one is on its way into the other buffer, so that one barrier a tile is enough.
template <int DQK, int DV, int KEYS, int MT, bool DROPOUT>
struct Shape5 {
    static constexpr int ROWS = 64 * MT, NT = KEYS / 8;
    static constexpr int Q_BYTES = ROWS * DQK * 2, K_BYTES = KEYS * DQK * 2, KV_BYTES = K_BYTES + KEYS * DV * 2;
    static constexpr int BYTES = Q_BYTES + 2 * KV_BYTES;  // and sizeof(Block), which the compiler lays beside it
    // Blocks that a multiprocessor is to hold: 4, 3 and 2 limit a thread to 128, 168 and 255 registers.
    static constexpr int BLOCKS = DV <= 64 && !DROPOUT ? (MT == 1 ? 4 : 3) : 2;
};

template <int DQK, int DV, int KEYS, int MT, bool DROPOUT>
__global__ void __launch_bounds__(THREADS, Shape5<DQK, DV, KEYS, MT, DROPOUT>::BLOCKS)
    softmax_forward_kernel5(SoftmaxAttention a, floatX* o, int64_t o_stride, float* lse, float scale) {
    using Shape = Shape5<DQK, DV, KEYS, MT, DROPOUT>;
    constexpr int ROWS = Shape::ROWS, NT = Shape::NT;
    extern __shared__ __align__(128) int4 softmax_forward_shared[];
    __shared__ Block b;  // not in registers, which are scarce
    Block found;
    if (!find_block(a, ROWS, KEYS, DROPOUT, &found)) return;
    if (threadIdx.x == 0) b = found;
    __syncthreads();
    const int row = threadIdx.x / 32 * (16 * MT);                 // the warp's first row in the tile
    const int first = b.first + row, last = first + 16 * MT - 1;  // positions of the warp's rows
    const uint32_t shared_q = shared_address(softmax_forward_shared), shared_kv = shared_q + Shape::Q_BYTES;
    auto load_keys = [&](int j0, uint32_t to) {
        load_tile<DQK, KEYS>(to, b.k, b.k_stride, j0, b.n_k, a.d_qk);
        load_tile<DV, KEYS>(to + Shape::K_BYTES, b.v, b.v_stride, j0, b.n_k, a.d_v);
    };

    float acc[MT][DV / 8][4] = {}, m[MT][2], l[MT][2] = {};
#pragma unroll
    for (int mt = 0; mt < MT; mt++) m[mt][0] = m[mt][1] = -INFINITY;
    int now = 0;  // so many bytes behind the beginning of the buffers stands this tile
    int j0 = b.begin;
    if (j0 < b.end) {
        load_tile<DQK, ROWS>(shared_q, b.q, a.q_stride, 0, b.n_q - b.start, a.d_qk);
        load_keys(j0, shared_kv);
    }
    for (; j0 < b.end; j0 += KEYS) {
        copy_async_wait_all();
        __syncthreads();  // this tile has come, and the one before has been read by all warps
        if (j0 + KEYS < b.end) load_keys(j0 + KEYS, shared_kv + Shape::KV_BYTES - now);
        // Unless no row of this warp sees any of these keys:
        if (b.start + row < b.n_q && j0 <= last && (a.window == 0 || j0 + KEYS - 1 > first - a.window)) {
            float s[MT][NT][4] = {};
            multiply_qk<Swizzled, DQK>(s, shared_q + row * (DQK * 2), shared_kv + now);
            // Unless every row sees all of them:
            if (j0 + KEYS - 1 > first || j0 < 0 || j0 + KEYS > b.n_k || (a.window > 0 && j0 <= last - a.window))
                mask_scores(s, first - j0, a.window, -j0, b.n_k - j0);
            softmax_rows(s, m, l, acc, scale);
            if constexpr (DROPOUT) {
                Dropout drop(a, b.seq, b.head);
#pragma unroll
                for (int mt = 0; mt < MT; mt++) drop_weights(s[mt], a, drop, first + mt * 16, j0);
            }
            multiply_pv<Swizzled, DV>(acc, s, shared_kv + now + Shape::K_BYTES);
        }
        now = Shape::KV_BYTES - now;
    }
    if (b.start + row < b.n_q)
        finish_rows<DV>(a, b.head, a.cu_q[b.seq] + b.start + row, b.n_q - b.start - row, o, o_stride, lse, acc, m, l, DROPOUT ? a.dropout.scale : 1,
                        softmax_forward_shared + row * (DQK / 8));
}

template <int DQK, int DV, int KEYS, int MT, bool DROPOUT>
inline void launch5(cudaStream_t stream, const SoftmaxAttention& a, floatX* o, int64_t o_stride, float* lse) {
    using Shape = Shape5<DQK, DV, KEYS, MT, DROPOUT>;
    int blocks = grid_blocks(a, Shape::ROWS);
    if (blocks == 0) return;
    allow_shared_memory(softmax_forward_kernel5<DQK, DV, KEYS, MT, DROPOUT>, Shape::BYTES + sizeof(Block));
    softmax_forward_kernel5<DQK, DV, KEYS, MT, DROPOUT><<<blocks, THREADS, Shape::BYTES, stream>>>(a, o, o_stride, lse, a.scale * LOG2E);
    LAUNCH_CHECK();
}

// Widths smaller than the kernel's are filled with zeros in shared memory.
template <int MT, bool DROPOUT>
inline void launch5_width(cudaStream_t stream, const SoftmaxAttention& a, floatX* o, int64_t o_stride, float* lse) {
    auto fits = [&](int d_qk, int d_v) { return a.d_qk <= d_qk && a.d_v <= d_v; };
    if (fits(32, 32))
        launch5<32, 32, 64, MT, DROPOUT>(stream, a, o, o_stride, lse);
    else if (fits(64, 64))
        launch5<64, 64, 64, MT, DROPOUT>(stream, a, o, o_stride, lse);
    else if (fits(96, 64))
        launch5<96, 64, 64, MT, DROPOUT>(stream, a, o, o_stride, lse);
    else if (fits(96, 96))
        launch5<96, 96, 64, MT, DROPOUT>(stream, a, o, o_stride, lse);
    else if (fits(128, 128))
        launch5<128, 128, 64, MT, DROPOUT>(stream, a, o, o_stride, lse);
    else
        launch5<192, 128, 32, MT, DROPOUT>(stream, a, o, o_stride, lse);  // 64 keys would leave room for one block a multiprocessor
}
template <int MT>
inline void forward5(cudaStream_t stream, const SoftmaxAttention& a, floatX* o, int64_t o_stride, float* lse) {
    if (a.dropout.p > 0)
        launch5_width<MT, true>(stream, a, o, o_stride, lse);
    else
        launch5_width<MT, false>(stream, a, o, o_stride, lse);
}

#endif

// Can kernel 5 do it?
inline bool takes_tensor_cores(const SoftmaxAttention& a, const floatX* o, int64_t o_stride) {
    int64_t sizes = a.d_qk | a.d_v | a.q_stride | a.k_stride | a.k_head | a.v_stride | a.v_head | o_stride;
    return sizeof(floatX) == 2 && a.d_qk <= 192 && a.d_v <= 128 && sizes % 8 == 0 && aligned16(a.q) && aligned16(a.k) && aligned16(a.v) && aligned16(o);
}

inline void forward2(cudaStream_t stream, const SoftmaxAttention& a, floatX* o, int64_t o_stride, float* lse) {
    int blocks = grid_blocks(a, ROWS2);
    if (blocks == 0) return;
    bool dropout = a.dropout.p > 0;
    if (a.d_v <= 64)
        softmax_forward_kernel2<64><<<blocks, THREADS, 0, stream>>>(a, o, o_stride, lse, dropout);
    else  // wider values in turns, each with scores of its own
        softmax_forward_kernel2<128><<<dim3(blocks, ceil_div(a.d_v, 128)), THREADS, 0, stream>>>(a, o, o_stride, lse, dropout);
    LAUNCH_CHECK();
}

}  // namespace softmax_fwd

}  // namespace gpu

#include "softmax_forward_hopper.cuh"

namespace gpu {

// o (rows of q; row n, head h: o[n·o_stride + h·d_v]); lse (NH, q_rows): lse[h·q_rows + n], natural logarithm, or null. Rows of q outside the sequences are
// left alone. `a` without states.
inline void softmax_forward(cudaStream_t stream, const SoftmaxAttention& a, floatX* o, int64_t o_stride, float* lse) {
    assert(!a.states);
#ifndef GPU_FLOAT32
    if (softmax_fwd::takes_tensor_cores(a, o, o_stride))
        return softmax_fwd::takes_hopper(a) ? softmax_fwd::forward6(stream, a, o, o_stride, lse) : softmax_fwd::forward5<2>(stream, a, o, o_stride, lse);
#endif
    softmax_fwd::forward2(stream, a, o, o_stride, lse);
}

}  // namespace gpu
