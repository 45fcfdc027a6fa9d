// The softmax core for few queries over many keys that stand in pages: decoding. The twin of cpu::softmax_forward with states (attention.h).
//
//     s_ij = scale·q_i·k_j   for the keys j that query i sees      lse_i = ln Σ_j exp(s_ij)      o_i = Σ_j exp(s_ij − lse_i)·v_j
//
// Every key and value is read once and used for a few products: the time is that of the bytes, KV·(d_qk+d_v) numbers a key (d_c+d_rope where values are the
// first part of the keys, as MLA's are), and one head of one sequence is far too little work for a whole GPU. So the keys of all sequences are dealt out to as
// many blocks as the GPU runs at a time, and what belongs together is merged by the block that comes last: decode_schedule.cuh.
//
//     latent_decode_kernel     Hopper's instructions: bf16, MLA's usual sizes (decode_hopper.cuh)
//     softmax_decode_kernel4   any sizes and strides, products in float32
//     softmax_decode_kernel5   tensor cores: bf16, 4 rows (queries × heads) and more on one kv head, sizes multiples of 8, d_v <= 512
//
// Earlier versions and times: dev/cuda/decode.cu. Below, the copying of rows into pages and out of them.
//
// Pages hold what they hold: slots behind a sequence's last key are never read, page tables never beyond the last page needed.
#pragma once

#include <algorithm>
#include <climits>

#include "decode_hopper.cuh"
#include "decode_schedule.cuh"
#include "overlap.cuh"
#include "rope.cuh"
#include "tensor_cores.cuh"

namespace gpu {

namespace decode {

// ---- what both kernels need -------------------------------------------------------------------------------------------------------------------------------

struct Result {
    floatX* o;  // row n, head h: o[n·o_stride + h·d_v]
    int64_t o_stride;
    float* lse;  // (NH, q_rows) or null
};

// Row r of kv head x.kv0 + kv.
struct Row {
    int query, head;  // query: counted in its sequence
    int lo, hi;       // of the item's keys it sees lo <= j < hi
    __device__ bool sees(int j) const { return j >= lo && j < hi; }
};
// Behind the item's last row: the last one again (whose q may be read), seeing nothing.
__device__ inline Row find_row(const SoftmaxAttention& a, const Schedule& p, const Item& x, int kv, int r) {
    int at = x.first_row + min(r, x.rows - 1);
    Row row;
    const int query = p.by_group(at);
    row.query = p.q0 + query;
    row.head = (x.kv0 + kv) * p.group + at - query * p.group;
    int position = a.position(x.seq, row.query);
    row.lo = max(x.begin, a.window > 0 ? position - a.window + 1 : 0);
    row.hi = r < x.rows ? min(x.end, position + 1) : 0;
    return row;
}

__device__ inline const floatX* q_row(const SoftmaxAttention& a, const Item& x, const Row& row) {
    return a.q + (a.cu_q[x.seq] + row.query) * a.q_stride + (int64_t)row.head * a.d_qk;
}
// Columns c ... c+N−1 of a row of the result, as far as there are so many; with c = 0 its lse too.
template <int N>
__device__ inline void write_result(const SoftmaxAttention& a, const Result& to, const Item& x, const Row& row, int c, const float (&o)[N], float lse) {
    int64_t n = a.cu_q[x.seq] + row.query;
    floatX* out = to.o + n * to.o_stride + (int64_t)row.head * a.d_v;
#pragma unroll
    for (int e = 0; e < N; e++)
        if (c + e < a.d_v) out[c + e] = from_float<floatX>(o[e]);
    if (c == 0 && to.lse) to.lse[row.head * a.q_rows + n] = lse;
}

// What a block still has to merge: the list that began before it, and the one that goes on behind it.
struct Pieces {
    Item item[2];
    bool has[2];
};
// All threads of the block.
__device__ inline void leave_piece(const Schedule& p, Pieces& pieces, const Item& x) {
    bool last = leave_piece(x, threadIdx.x, [] { __syncthreads(); });
    if (threadIdx.x == 0) {
        pieces.item[x.slot % 2] = x;
        pieces.has[x.slot % 2] = last || p.share;
    }
}
__device__ inline void merge_pieces(const SoftmaxAttention& a, const Schedule& p, const Result& to, const Pieces& pieces, float* shared) {
    __syncthreads();
#pragma unroll 1
    for (int i = 0; i < 2; i++) {
        if (!pieces.has[i]) continue;
        const Item& x = pieces.item[i];
        merge<1>(
            p, x, p.share, threadIdx.x, blockDim.x, shared, [] { __syncthreads(); },
            [&](int row, int column, const float(&o)[4], float m, float l) {
                const int kv = p.by_rows(row);
                write_result(a, to, x, find_row(a, p, x, kv, row - kv * p.rows), column, o, column == 0 && to.lse ? lse_of(m, l) : 0);
            });
    }
}

// Launched to overlap, a block may begin to read what the kernel before cannot have written: all but the rows of new tokens, and q. Whether the first n keys
// from the one with which the item's first tile begins are all old.
__device__ inline bool all_old(const AttentionState& state, const Item& x, int n) { return min(x.end, x.begin + n) <= state.length; }

// AttentionState::row for keys that have 32-bit numbers, in two steps: the table's entry, which is asked for some time before it is needed, and the place.
struct PagedRows {
    const floatX* rows;
    const int* table;
    int64_t page_stride;
    int page_size, shift, per_token;
    __device__ PagedRows(const AttentionState& s)
        : rows(s.rows), table(s.page_table), page_stride(s.page_stride), page_size(s.page_size), per_token((int)s.per_token) {
        shift = (page_size & (page_size - 1)) == 0 ? __ffs(page_size) - 1 : -1;
    }
    __device__ int page(int j) const { return table[shift >= 0 ? j >> shift : j / page_size]; }
    __device__ const floatX* row(int j, int page) const {
        int slot = shift >= 0 ? j & (page_size - 1) : j % page_size;
        return rows + page * page_stride + (int64_t)slot * per_token;
    }
};
__device__ inline bool on_16_bytes(const void* p) { return (uintptr_t)p % 16 == 0; }
// Whether 16 bytes at a time can be read from q and from the rows in pages.
__device__ inline bool in_vectors(const SoftmaxAttention& a, const PagedRows& rows) {
    int64_t all = a.d_qk | a.d_v | a.q_stride | a.k_offset | a.v_offset | a.k_head | a.v_head | rows.page_stride | rows.per_token;
    return all % Packed<floatX>::size == 0 && on_16_bytes(a.q) && on_16_bytes(rows.rows);
}

__device__ inline Packed<floatX> zeros() {
    int4 bits = {0, 0, 0, 0};
    return *(Packed<floatX>*)&bits;
}
// The first of `left` numbers at p, as many as 16 bytes hold; zeros behind them.
__device__ inline Packed<floatX> load_some(const floatX* p, int left) {
    Packed<floatX> x = zeros();
#pragma unroll
    for (int e = 0; e < Packed<floatX>::size; e++)
        if (e < left) x.v[e] = p[e];
    return x;
}
// 16 bytes to shared memory, which this thread alone reads: `left` numbers and zeros.
__device__ inline void copy_pack(int4* to, const floatX* from, int left, bool vectors) {
    if (vectors)
        copy_async16(shared_address(to), from, left > 0);
    else
        store_packed((floatX*)to, load_some(from, left));
}

constexpr float LN2 = 0.69314718f;
__device__ inline float rescale(float m, float top) { return m == -INFINITY ? 0 : exp2_fast(m - top); }

// ---- kernel 4: float32 arithmetic -------------------------------------------------------------------------------------------------------------------------
//
// Each warp has one kv head, and of each tile its own few keys. LANES neighbouring lanes read a key, 16 bytes each, several keys side by side, and go on with
// them as if they were alone: their own m, l and o, the sums of the products through shuffles. Where the lanes meet is the end of an item. So shared memory
// holds nothing that is shared: each thread copies there what it will read itself, some stages ahead (cp.async), and never waits for another. Bytes on their
// way to a multiprocessor: 16 warps × 2 stages × 4 KB, twice of what 3.0 TB/s need at a microsecond's latency.
//
// CHUNKS: 16-byte pieces of a lane (1 unless a key is longer than 32 lanes' 512 bytes). R: rows of a kv head, for which a key is read once.

template <int LANES, int CHUNKS, int R>
__global__ void softmax_decode_kernel4(SoftmaxAttention a, Schedule p, Result to);

template <int LANES, int CHUNKS, int R>
struct Shape4 {
    static constexpr int ROWS = R;
    static constexpr int V = Packed<floatX>::size, COLUMNS = LANES * V;           // a chunk's
    static constexpr int U = CHUNKS > 1 ? 1 : R == 4 ? 2 : 4, SIDE = 32 / LANES;  // keys of a lane in a stage; keys of a warp side by side
    static constexpr int KEYS = U * SIDE, STAGE = 2 * U * CHUNKS * 32;            // keys of a warp's stage; its packs
    static constexpr bool LARGE = R > 1 || CHUNKS > 1;                            // many registers: fewer warps, more stages
    static constexpr int WARPS = LARGE ? 4 : 8, BLOCKS = LARGE ? 3 : 2, STAGES = !LARGE ? 3 : U == 2 ? 7 : 4;
    static constexpr int shared_bytes(int warps) { return warps * STAGES * STAGE * 16; }
    static auto kernel() { return softmax_decode_kernel4<LANES, CHUNKS, R>; }
};

template <int LANES, int CHUNKS, int R>
__global__ void __launch_bounds__(32 * Shape4<LANES, CHUNKS, R>::WARPS, Shape4<LANES, CHUNKS, R>::BLOCKS)
    softmax_decode_kernel4(SoftmaxAttention a, Schedule p, Result to) {
    using Shape = Shape4<LANES, CHUNKS, R>;
    constexpr int V = Shape::V, U = Shape::U, KEYS = Shape::KEYS, STAGE = Shape::STAGE, STAGES = Shape::STAGES, SIDE = Shape::SIDE, COLUMNS = Shape::COLUMNS;
    extern __shared__ int4 decode_ring[];
    __shared__ WalkShared walk_shared;
    __shared__ Pieces pieces;
    ask_for_work(a);
    if (threadIdx.x < 2) pieces.has[threadIdx.x] = false;
    __syncthreads();
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, column = lane % LANES * V, side = lane / LANES;
    const int kv = warp % p.kv_heads, part = warp / p.kv_heads, parts = blockDim.x / 32 / p.kv_heads;
    int4* ring = decode_ring + warp * STAGES * STAGE + lane;

    let_next_kernel_start();
    Walk walk(a, p, walk_shared);
    bool waited = false;
    for (Item x; walk.next(x);) {
        PagedRows rows(a.states[x.seq]);
        const bool vectors = in_vectors(a, rows);
        rows.rows += a.k_offset + (x.kv0 + kv) * a.k_head + column;
        const int to_value = (int)(a.v_offset - a.k_offset + (x.kv0 + kv) * (a.v_head - a.k_head));  // from a key
        const int first = x.begin / p.tile * p.tile + part * KEYS + side, steps = x.begin < x.end ? (x.end - 1) / p.tile - x.begin / p.tile + 1 : 0;
        auto key = [&](int step, int u) { return first + step * p.tile + u * SIDE; };

        int page[U];  // of the keys to be copied next; −1: there is none
        auto look_up = [&](int step) {
#pragma unroll
            for (int u = 0; u < U; u++) {
                int j = key(step, u);
                page[u] = j >= x.begin && j < x.end ? rows.page(j) : -1;
            }
        };
        auto copy = [&](int step, int stage) {
            if (step < steps) {
                int4* at = ring + stage * STAGE;
#pragma unroll
                for (int u = 0; u < U; u++) {
                    const floatX* row = page[u] >= 0 ? rows.row(key(step, u), page[u]) : rows.rows;
#pragma unroll
                    for (int c = 0; c < CHUNKS; c++) {
                        copy_pack(at + (u * CHUNKS + c) * 32, row + c * COLUMNS, page[u] >= 0 ? a.d_qk - column - c * COLUMNS : 0, vectors);
                        copy_pack(at + ((U + u) * CHUNKS + c) * 32, row + to_value + c * COLUMNS, page[u] >= 0 ? a.d_v - column - c * COLUMNS : 0, vectors);
                    }
                }
                look_up(step + 1);
            }
            copy_async_commit();
        };
        look_up(0);
        bool early = !waited && all_old(a.states[x.seq], x, (STAGES - 1) * p.tile);
        if (!waited && !early) wait_for_kernel_before();
#pragma unroll 1
        for (int i = 0; i < STAGES - 1; i++) copy(i, i);
        if (early) wait_for_kernel_before();
        waited = true;

        float q[R][CHUNKS][V], o[R][CHUNKS][V] = {}, m[R], l[R] = {};
        int lo[R], hi[R];
#pragma unroll
        for (int r = 0; r < R; r++) {
            Row row = find_row(a, p, x, kv, r);
            lo[r] = row.lo;
            hi[r] = row.hi;
            m[r] = -INFINITY;
#pragma unroll
            for (int c = 0; c < CHUNKS; c++) {
                const floatX* from = q_row(a, x, row) + column + c * COLUMNS;
                int left = a.d_qk - column - c * COLUMNS;
                Packed<floatX> pack = !vectors ? load_some(from, left) : left > 0 ? load_packed(from) : zeros();
#pragma unroll
                for (int e = 0; e < V; e++) q[r][c][e] = pack[e] * (a.scale * LOG2E);
            }
        }

        int stage = 0;
        for (int i = 0; i < steps; i++) {
            copy(i + STAGES - 1, stage == 0 ? STAGES - 1 : stage - 1);
            copy_async_wait<STAGES - 1>();
            const int4* at = ring + stage * STAGE;
            stage = stage == STAGES - 1 ? 0 : stage + 1;

            // m' = max(m, max s)   weight = 2^(s − m')   l' = l·2^(m − m') + Σ weight   o' = o·2^(m − m') + Σ weight·v
            float s[R][U] = {};  // scale·log₂e·q·k: of this lane's columns, then of the key
#pragma unroll
            for (int u = 0; u < U; u++)
#pragma unroll
                for (int c = 0; c < CHUNKS; c++) {
                    Packed<floatX> k = load_packed((const floatX*)(at + (u * CHUNKS + c) * 32));
#pragma unroll
                    for (int e = 0; e < V; e++)
#pragma unroll
                        for (int r = 0; r < R; r++) s[r][u] += q[r][c][e] * k[e];
                }
#pragma unroll
            for (int offset = LANES / 2; offset > 0; offset /= 2)
#pragma unroll
                for (int u = 0; u < U; u++)
#pragma unroll
                    for (int r = 0; r < R; r++) s[r][u] += __shfl_xor_sync(0xffffffff, s[r][u], offset);
#pragma unroll
            for (int r = 0; r < R; r++) {
                float top = m[r];
#pragma unroll
                for (int u = 0; u < U; u++) {
                    int j = key(i, u);
                    s[r][u] = j >= lo[r] && j < hi[r] ? s[r][u] : -INFINITY;
                    top = fmaxf(top, s[r][u]);
                }
                float factor = rescale(m[r], top);
                m[r] = top;
                l[r] *= factor;
#pragma unroll
                for (int u = 0; u < U; u++) {
                    s[r][u] = rescale(s[r][u], top);
                    l[r] += s[r][u];
                }
#pragma unroll
                for (int c = 0; c < CHUNKS; c++)
#pragma unroll
                    for (int e = 0; e < V; e++) o[r][c][e] *= factor;
            }
#pragma unroll
            for (int u = 0; u < U; u++)
#pragma unroll
                for (int c = 0; c < CHUNKS; c++) {
                    Packed<floatX> v = load_packed((const floatX*)(at + ((U + u) * CHUNKS + c) * 32));
#pragma unroll
                    for (int e = 0; e < V; e++)
#pragma unroll
                        for (int r = 0; r < R; r++) o[r][c][e] += s[r][u] * v[e];
                }
        }
        copy_async_wait_all();
        __syncwarp();  // below, results go where other lanes have copied to

        // The lanes that have other keys and the same columns ...
#pragma unroll
        for (int offset = LANES; offset < 32; offset *= 2)
#pragma unroll
            for (int r = 0; r < R; r++) {
                float other = __shfl_xor_sync(0xffffffff, m[r], offset), top = fmaxf(m[r], other), f = rescale(m[r], top), g = rescale(other, top);
                m[r] = top;
                l[r] = f * l[r] + g * __shfl_xor_sync(0xffffffff, l[r], offset);
#pragma unroll
                for (int c = 0; c < CHUNKS; c++)
#pragma unroll
                    for (int e = 0; e < V; e++) o[r][c][e] = f * o[r][c][e] + g * __shfl_xor_sync(0xffffffff, o[r][c][e], offset);
            }
        // ... and then the warps that have. Each leaves, in its own ring, o of its columns, m, l.
        if (parts > 1) {
            float* ring_of_warp = (float*)(decode_ring + warp * STAGES * STAGE);
            constexpr int WIDTH = CHUNKS * COLUMNS + 4;
            if (part > 0 && side == 0) {
#pragma unroll
                for (int r = 0; r < R; r++) {
                    float* mine = ring_of_warp + r * WIDTH;
#pragma unroll
                    for (int c = 0; c < CHUNKS; c++)
#pragma unroll
                        for (int e = 0; e < V; e++) mine[c * COLUMNS + column + e] = o[r][c][e];
                    if (column == 0) {
                        mine[CHUNKS * COLUMNS] = m[r];
                        mine[CHUNKS * COLUMNS + 1] = l[r];
                    }
                }
            }
            __syncthreads();
            if (part == 0 && side == 0) {
#pragma unroll
                for (int r = 0; r < R; r++) {
                    auto its = [&](int other) { return (const float*)(decode_ring + (other * p.kv_heads + warp) * STAGES * STAGE) + r * WIDTH; };
                    float top = m[r];
                    for (int other = 1; other < parts; other++) top = fmaxf(top, its(other)[CHUNKS * COLUMNS]);
                    float f = rescale(m[r], top);
                    m[r] = top;
                    l[r] *= f;
#pragma unroll
                    for (int c = 0; c < CHUNKS; c++)
#pragma unroll
                        for (int e = 0; e < V; e++) o[r][c][e] *= f;
#pragma unroll 4
                    for (int other = 1; other < parts; other++) {
                        const float* x = its(other);
                        float g = rescale(x[CHUNKS * COLUMNS], top);
                        l[r] += g * x[CHUNKS * COLUMNS + 1];
#pragma unroll
                        for (int c = 0; c < CHUNKS; c++)
#pragma unroll
                            for (int e = 0; e < V; e++) o[r][c][e] += g * x[c * COLUMNS + column + e];
                    }
                }
            }
            __syncthreads();
        }

        if (part == 0 && side == 0) {
#pragma unroll
            for (int r = 0; r < R; r++) {
                if (r >= x.rows) break;
                float factor = l[r] > 0 ? 1 / l[r] : 0, lse = l[r] > 0 ? (m[r] + log2f(l[r])) * LN2 : -INFINITY;
                Row row = find_row(a, p, x, kv, r);
#pragma unroll
                for (int c = 0; c < CHUNKS; c++) {
                    int at = column + c * COLUMNS;
                    if (x.whole) {
#pragma unroll
                        for (int e = 0; e < V; e++) o[r][c][e] *= factor;
                        write_result(a, to, x, row, at, o[r][c], lse);
                    } else {
                        float* slot = p.slot_o(x.slot, kv * p.rows + r);
#pragma unroll
                        for (int e = 0; e < V; e += 4)
                            if (at + e < a.d_v) *(float4*)(slot + at + e) = {o[r][c][e], o[r][c][e + 1], o[r][c][e + 2], o[r][c][e + 3]};
                    }
                }
                if (!x.whole && column == 0) {
                    p.slot_m(x.slot)[kv * p.rows + r] = m[r];
                    p.slot_l(x.slot)[kv * p.rows + r] = l[r];
                }
            }
        }
        if (!x.whole) leave_piece(p, pieces, x);
    }
    if (!waited) wait_for_kernel_before();  // a kernel never ends before the one in front of it
    merge_pieces(a, p, to, pieces, (float*)decode_ring);
}

// ---- kernel 5: tensor cores -------------------------------------------------------------------------------------------------------------------------------
//
// 16·M rows of one kv head are the rows of 16×8×16 products, so that 16 of them cost what one does. Tiles of 64 or 32 keys (and values, if they are not the
// same numbers) are copied into shared memory, the next one or two while this one is worked on. S = QKᵀ is made in pieces of 16 rows and 8 or 16 keys, a piece
// a warp, and put down in shared memory; there a few threads a row turn it into weights; then each warp takes all of these as the left operand of PV, in which
// it makes every WARPS-th piece of 16 columns.

template <int M>
struct Shape5 {
    static constexpr int ROWS = 16 * M, KEYS = M == 1 ? 64 : 32, WARPS = 8, THREADS = 32 * WARPS, STAGES = M == 1 ? 2 : 3;
    static constexpr int LOADS = KEYS / (THREADS / 8);  // of a thread in a tile: eight copy a key
    static constexpr int PIECE = KEYS * M / WARPS;      // keys of a warp's piece of S
    static constexpr int PER_ROW = THREADS / ROWS;      // threads that share a row's weights,
    static constexpr int OWN = KEYS / PER_ROW;          // each for so many keys
    static constexpr int SCORES = KEYS + 8;             // from row to row of S, and of the weights: with 8 numbers of padding reads meet different banks
};

// Numbers from one row in shared memory to the next; q and keys are padded with zeros to whole steps of 32. An odd multiple of 16 bytes, so that the eight
// rows that a matrix load reads meet different banks.
HOST_DEVICE inline int key_stride5(int d_qk) { return (int)round_up(d_qk, 32) + 8; }
HOST_DEVICE inline int value_stride5(int d_v) { return (int)round_up(d_v, 16) + 8; }
template <int M>
inline int shared_bytes5(int d_qk, int d_v, bool latent) {
    using Shape = Shape5<M>;
    int numbers = (Shape::ROWS + Shape::STAGES * Shape::KEYS) * key_stride5(d_qk) + (latent ? 0 : Shape::STAGES * Shape::KEYS * value_stride5(d_v));
    return 2 * numbers + Shape::ROWS * (Shape::SCORES * 6 + 12);
}

#ifndef GPU_FLOAT32

// Eight lanes copy d numbers (a multiple of 8); zeros if not valid.
__device__ inline void copy_row(floatX* to, const floatX* from, int d, bool valid) {
    int lane = threadIdx.x % 8 * 8;
    if (on_16_bytes(from)) {
        for (int c = lane; c < d; c += 64) copy_async16(shared_address(to + c), from + c, valid);
    } else {
#pragma unroll 1
        for (int c = lane; c < d; c += 64) store_packed(to + c, valid ? load_some(from + c, 8) : zeros());
    }
}

// PIECES: pieces of 16 columns of o that a warp makes. Registers for as many blocks as shared memory has room for with the usual d_qk.
template <int M, int PIECES>
constexpr int BLOCKS5 = M > 1         ? (PIECES == 1 ? 2 : 1)
                        : PIECES == 1 ? 3
                                      : 2;
template <int M, int PIECES>
__global__ void __launch_bounds__(Shape5<M>::THREADS, BLOCKS5<M, PIECES>) softmax_decode_kernel5(SoftmaxAttention a, Schedule p, Result to, bool latent) {
    using Shape = Shape5<M>;
    constexpr int ROWS = Shape::ROWS, KEYS = Shape::KEYS, WARPS = Shape::WARPS, THREADS = Shape::THREADS, PIECE = Shape::PIECE, SCORES = Shape::SCORES;
    constexpr int PER_ROW = Shape::PER_ROW, OWN = Shape::OWN, STAGES = Shape::STAGES, LOADS = Shape::LOADS;
    extern __shared__ int4 decode_shared[];
    __shared__ WalkShared walk_shared;
    __shared__ Pieces pieces;
    ask_for_work(a);
    if (threadIdx.x < 2) pieces.has[threadIdx.x] = false;
    __syncthreads();
    const int k_row = key_stride5(a.d_qk), v_row = latent ? k_row : value_stride5(a.d_v), width = k_row - 8;
    floatX *q = (floatX*)decode_shared, *keys = q + ROWS * k_row, *behind = keys + STAGES * KEYS * k_row, *values = latent ? keys : behind;
    float* scores = (float*)(latent ? behind : values + STAGES * KEYS * v_row);
    floatX* weights = (floatX*)(scores + ROWS * SCORES);
    float *factors = (float*)(weights + ROWS * SCORES), *row_m = factors + ROWS, *row_l = row_m + ROWS;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, piece_row = warp % M * 16, piece_key = warp / M * PIECE;

    let_next_kernel_start();
    Walk walk(a, p, walk_shared);
    bool waited = false;
    for (Item x; walk.next(x);) {
        const PagedRows rows(a.states[x.seq]);
        const int64_t k_at = a.k_offset + x.kv0 * a.k_head, v_at = a.v_offset + x.kv0 * a.v_head;
        const int first = x.begin / KEYS * KEYS;
        int page[LOADS];  // of the keys to be copied next; −1: there is none
        auto look_up = [&](int j0) {
#pragma unroll
            for (int i = 0; i < LOADS; i++) {
                int j = j0 + i * (THREADS / 8) + threadIdx.x / 8;
                page[i] = j >= x.begin && j < x.end ? rows.page(j) : -1;
            }
        };
        auto load_tile = [&](int j0, int stage) {
            if (j0 < x.end) {
#pragma unroll
                for (int i = 0; i < LOADS; i++) {
                    int at = i * (THREADS / 8) + threadIdx.x / 8;
                    const floatX* row = page[i] >= 0 ? rows.row(j0 + at, page[i]) : rows.rows;
                    copy_row(keys + (stage * KEYS + at) * k_row, row + k_at, a.d_qk, page[i] >= 0);
                    if (!latent) copy_row(values + (stage * KEYS + at) * v_row, row + v_at, a.d_v, page[i] >= 0);
                }
                look_up(j0 + KEYS);
            }
            copy_async_commit();
        };
        look_up(first);
        bool early = !waited && all_old(a.states[x.seq], x, (STAGES - 1) * KEYS);
        if (!waited && !early) wait_for_kernel_before();
#pragma unroll 1
        for (int i = 0; i < STAGES - 1; i++) load_tile(first + i * KEYS, i);
        if (early) wait_for_kernel_before();
        waited = true;
        for (int r = threadIdx.x / 8; r < ROWS; r += THREADS / 8) {
            const floatX* from = q_row(a, x, find_row(a, p, x, 0, r));
            for (int c = threadIdx.x % 8 * 8; c < width; c += 64) store_packed(q + r * k_row + c, c < a.d_qk ? load_packed(from + c) : zeros());
        }
        for (int i = threadIdx.x; i < STAGES * KEYS * (width - a.d_qk); i += THREADS)  // the keys' padding
            keys[i / (width - a.d_qk) * k_row + a.d_qk + i % (width - a.d_qk)] = from_float<floatX>(0);

        int lo[2], hi[2];  // of this lane's rows of the warp's piece of S
#pragma unroll
        for (int i = 0; i < 2; i++) {
            Row row = find_row(a, p, x, 0, piece_row + lane / 4 + 8 * i);
            lo[i] = row.lo;
            hi[i] = row.hi;
        }
        float m = -INFINITY, l = 0, o[M][PIECES][2][4] = {};  // m, l: of row threadIdx.x/PER_ROW, l of this thread's keys

        int stage = 0;
        for (int j0 = first; j0 < x.end; j0 += KEYS, stage = stage == STAGES - 1 ? 0 : stage + 1) {
            copy_async_wait<STAGES - 2>();
            __syncthreads();  // this tile is there, and nobody needs the one before
            load_tile(j0 + (STAGES - 1) * KEYS, stage == 0 ? STAGES - 1 : stage - 1);

            // S = QKᵀ, 32 channels at a time; two sums, so that a product need not wait for the one before
            float even[PIECE / 8][4] = {}, odd[PIECE / 8][4] = {};
            const floatX* q_at = q + (piece_row + lane % 16) * k_row + lane / 16 * 8;
            const floatX* key_at = keys + (stage * KEYS + piece_key + lane % 8) * k_row + lane / 8 * 8;
#pragma unroll 2
            for (int c = 0; c < width; c += 32) {
                uint32_t k[4], y[4], z[4];
                load_matrices(y, shared_address(q_at + c));
                load_matrices(z, shared_address(q_at + c + 16));
#pragma unroll
                for (int n = 0; n < PIECE / 8; n++) {
                    load_matrices(k, shared_address(key_at + n * 8 * k_row + c));
                    mma(even[n], y, k[0], k[1]);
                    mma(odd[n], z, k[2], k[3]);
                }
            }
#pragma unroll
            for (int n = 0; n < PIECE / 8; n++)
#pragma unroll
                for (int i = 0; i < 2; i++) {
                    int at = piece_key + n * 8 + lane % 4 * 2, j = j0 + at;
                    float2 s;
                    s.x = j >= lo[i] && j < hi[i] ? (even[n][2 * i] + odd[n][2 * i]) * (a.scale * LOG2E) : -INFINITY;
                    s.y = j + 1 >= lo[i] && j + 1 < hi[i] ? (even[n][2 * i + 1] + odd[n][2 * i + 1]) * (a.scale * LOG2E) : -INFINITY;
                    *(float2*)(scores + (piece_row + lane / 4 + 8 * i) * SCORES + at) = s;
                }
            __syncthreads();

            // m' = max(m, max s)   weight = 2^(s − m')   l' = l·2^(m − m') + Σ weight
            {
                const int row = threadIdx.x / PER_ROW, at = threadIdx.x % PER_ROW * OWN;
                float s[OWN], top = m;
#pragma unroll
                for (int i = 0; i < OWN; i += 4) *(float4*)(s + i) = *(const float4*)(scores + row * SCORES + at + i);
#pragma unroll
                for (int i = 0; i < OWN; i++) top = fmaxf(top, s[i]);
#pragma unroll
                for (int offset = PER_ROW / 2; offset > 0; offset /= 2) top = fmaxf(top, __shfl_xor_sync(0xffffffff, top, offset));
                float factor = rescale(m, top);
                m = top;
                l *= factor;
#pragma unroll
                for (int i = 0; i < OWN; i++) {
                    s[i] = rescale(s[i], top);
                    l += s[i];
                }
#pragma unroll
                for (int i = 0; i < OWN; i += 4) *(uint2*)(weights + row * SCORES + at + i) = {pack_bf16(s[i], s[i + 1]), pack_bf16(s[i + 2], s[i + 3])};
                if (at == 0) factors[row] = factor;
            }
            __syncthreads();

            // O' = O·2^(m − m') + PV
            uint32_t w[M][KEYS / 16][4];
            float factor[M][2];
#pragma unroll
            for (int t = 0; t < M; t++) {
#pragma unroll
                for (int step = 0; step < KEYS / 16; step++)
                    load_matrices(w[t][step], shared_address(weights + (t * 16 + lane % 16) * SCORES + step * 16 + lane / 16 * 8));
                factor[t][0] = factors[t * 16 + lane / 4];
                factor[t][1] = factors[t * 16 + lane / 4 + 8];
            }
            const floatX* value_at = values + (stage * KEYS + lane % 16) * v_row + lane / 16 * 8;
#pragma unroll
            for (int i = 0; i < PIECES; i++) {
                int c = (warp + WARPS * i) * 16;
                if (c >= a.d_v) continue;
#pragma unroll
                for (int t = 0; t < M; t++)
#pragma unroll
                    for (int e = 0; e < 4; e++) {
                        o[t][i][0][e] *= factor[t][e / 2];
                        o[t][i][1][e] *= factor[t][e / 2];
                    }
#pragma unroll
                for (int step = 0; step < KEYS / 16; step++) {
                    uint32_t v[4];
                    load_matrices_transposed(v, shared_address(value_at + step * 16 * v_row + c));
#pragma unroll
                    for (int t = 0; t < M; t++) {
                        mma(o[t][i][0], w[t][step], v[0], v[1]);
                        mma(o[t][i][1], w[t][step], v[2], v[3]);
                    }
                }
            }
        }

#pragma unroll
        for (int offset = PER_ROW / 2; offset > 0; offset /= 2) l += __shfl_xor_sync(0xffffffff, l, offset);
        if (threadIdx.x % PER_ROW == 0) {
            row_m[threadIdx.x / PER_ROW] = m;
            row_l[threadIdx.x / PER_ROW] = l;
        }
        __syncthreads();
#pragma unroll
        for (int t = 0; t < M; t++)
#pragma unroll
            for (int i = 0; i < 2; i++) {
                int r = t * 16 + lane / 4 + 8 * i;
                if (r >= x.rows) continue;
                float row_sum = row_l[r], factor = row_sum > 0 ? 1 / row_sum : 0, lse = row_sum > 0 ? (row_m[r] + log2f(row_sum)) * LN2 : -INFINITY;
                Row row = find_row(a, p, x, 0, r);
                float* slot = p.slot_o(x.slot, r);
#pragma unroll
                for (int e = 0; e < 2 * PIECES; e++) {
                    int c = (warp + WARPS * (e / 2)) * 16 + e % 2 * 8 + lane % 4 * 2;
                    float pair[2] = {o[t][e / 2][e % 2][2 * i], o[t][e / 2][e % 2][2 * i + 1]};
                    if (c >= a.d_v) continue;
                    if (x.whole) {
                        pair[0] *= factor;
                        pair[1] *= factor;
                        write_result(a, to, x, row, c, pair, lse);
                    } else {
                        *(float2*)(slot + c) = {pair[0], pair[1]};
                    }
                }
                if (!x.whole && warp == 0 && lane % 4 == 0) {
                    p.slot_m(x.slot)[r] = row_m[r];
                    p.slot_l(x.slot)[r] = row_sum;
                }
            }
        if (!x.whole) leave_piece(p, pieces, x);
        __syncthreads();
    }
    if (!waited) wait_for_kernel_before();  // a kernel never ends before the one in front of it
    merge_pieces(a, p, to, pieces, (float*)decode_shared);
}

#endif

// ---- the host's side --------------------------------------------------------------------------------------------------------------------------------------

inline bool latent(const SoftmaxAttention& a) { return a.kv_heads == 1 && a.d_v <= a.d_qk && a.v_offset == a.k_offset; }

// What the kernels are launched with.
struct Launch {
    int rows, kv_heads;  // of an item
    int tile, least;     // keys of a tile, tiles of a block at least
    int lanes = 1;       // blocks side by side on the same keys
    int threads, shared;
    int blocks;  // that run at a time, at most
};

inline Schedule make_schedule(const SoftmaxAttention& a, const Launch& x, Scratch scratch, int* grid) {
    return make_schedule(a, 0, a.max_q, x.rows, x.kv_heads, x.tile, x.least, x.blocks, scratch, grid, x.lanes);
}

inline int largest_divisor(int n, int most) {
    while (n % most != 0) most--;
    return most;
}

// f(Shape4<LANES, CHUNKS, R>) with the one for these sizes. rows: of a kv head.
constexpr int MAX_CHUNKS4 = 5;
template <int LANES, class F>
inline void with_rows4(int rows, F f) {
    if (rows == 1)
        f(Shape4<LANES, 1, 1>());
    else if (rows == 2)
        f(Shape4<LANES, 1, 2>());
    else
        f(Shape4<LANES, 1, 4>());
}
template <class F>
inline void with_shape4(int d, int rows, F f) {
    int lanes = (int)ceil_div(d, Packed<floatX>::size);
    if (lanes > 32)
        f(Shape4<32, MAX_CHUNKS4, 1>());
    else if (lanes > 16)
        with_rows4<32>(rows, f);
    else if (lanes > 8)
        with_rows4<16>(rows, f);
    else
        with_rows4<8>(rows, f);
}
inline int longest_key4() { return MAX_CHUNKS4 * 32 * Packed<floatX>::size; }

template <class Kernel>
inline Launch with_blocks(Launch x, Kernel* kernel) {
    x.shared = std::max(x.shared, merge_numbers(x.threads) * (int)sizeof(float));
    if (x.shared > 47 << 10) x.shared = std::max(x.shared, (48 << 10) + 16);  // asked for, since what is not dynamic counts too
    x.blocks = (int)resident_blocks(kernel, x.threads, x.shared);
    return x;
}
template <class Shape>
inline Launch launch4(Shape, int kv_heads, int num_seqs) {
    Launch x{};
    x.rows = Shape::ROWS;
    // The heads of a token stand side by side. Of many sequences an item takes some heads; of one, a single one, since there every list is cut into many pieces
    // and the merging is the faster the more blocks share it.
    x.kv_heads = largest_divisor(kv_heads, std::min(kv_heads, num_seqs > 1 ? 4 : 1));
    int warps = Shape::WARPS / x.kv_heads * x.kv_heads;
    x.tile = Shape::KEYS * (warps / x.kv_heads);
    x.least = 1;
    x.threads = 32 * warps;
    x.shared = Shape::shared_bytes(warps);
    return with_blocks(x, Shape::kernel());
}
template <int M, class Kernel>
inline Launch launch5(Kernel* kernel, int d_qk, int d_v, bool latent) {
    using Shape = Shape5<M>;
    Launch x{};
    x.rows = Shape::ROWS;
    x.kv_heads = 1;
    x.tile = Shape::KEYS;
    x.least = M == 1 ? 1 : 2;
    x.threads = Shape::THREADS;
    x.shared = shared_bytes5<M>(d_qk, d_v, latent);
    return with_blocks(x, kernel);
}

#ifndef GPU_FLOAT32
// f(kernel, M), where M is 4 (many rows) or 1
template <class F>
inline void with_kernel5(int d_v, bool many, F f) {
    using One = std::integral_constant<int, 1>;
    using Four = std::integral_constant<int, 4>;
    if (!many)
        f(d_v <= 128 ? softmax_decode_kernel5<1, 1> : d_v <= 256 ? softmax_decode_kernel5<1, 2> : softmax_decode_kernel5<1, 4>, One());
    else
        f(d_v <= 128 ? softmax_decode_kernel5<4, 1> : d_v <= 256 ? softmax_decode_kernel5<4, 2> : softmax_decode_kernel5<4, 4>, Four());
}
#endif

template <int M>
inline bool fits5(int d_qk, int d_v, bool latent) {
    return shared_bytes5<M>(d_qk, d_v, latent) + 1024 <= (int)device_properties().sharedMemPerBlockOptin;
}
inline bool tensor_cores_can(int d_qk, int d_v, bool latent) {
    return sizeof(floatX) == 2 && d_qk % 8 == 0 && d_v % 8 == 0 && d_v <= 512 && fits5<1>(d_qk, d_v, latent);
}
inline bool tensor_cores_can(const SoftmaxAttention& a) { return tensor_cores_can(a.d_qk, a.d_v, latent(a)) && a.q_stride % 8 == 0 && aligned16(a.q); }

inline int rows_of(const SoftmaxAttention& a) { return a.max_q * (a.heads / a.kv_heads); }  // at most, of a kv head

// As softmax_decode, by one of the two kernels. change(Launch&): what shall not be as it is by default; for the ladder.
template <class Change>
inline void softmax_decode_as(cudaStream_t stream, const SoftmaxAttention& a, const Result& to, Scratch scratch, bool tensor_cores, bool overlap,
                              Change change) {
    assert(a.states && a.heads % a.kv_heads == 0 && a.dropout.p == 0);
    if (a.num_seqs == 0 || a.max_q == 0) return;
    int grid;
    if (!tensor_cores) {
        int d = std::max(a.d_qk, a.d_v);
        if (d > longest_key4()) data_error("decoding takes keys of up to %d numbers, not %d", longest_key4(), d);
        with_shape4(d, rows_of(a), [&](auto shape) {
            Launch x = launch4(shape, a.kv_heads, a.num_seqs);
            change(x);
            Schedule p = make_schedule(a, x, scratch, &grid);
            launch_overlapping(stream, overlap, 1, decltype(shape)::kernel(), grid, x.threads, x.shared, a, p, to);
        });
    } else {
#ifndef GPU_FLOAT32
        with_kernel5(a.d_v, rows_of(a) > 16 && fits5<4>(a.d_qk, a.d_v, latent(a)), [&](auto kernel, auto m) {
            Launch x = launch5<m>(kernel, a.d_qk, a.d_v, latent(a));
            if (rows_of(a) > x.rows) x.lanes = 2;
            change(x);
            Schedule p = make_schedule(a, x, scratch, &grid);
            launch_overlapping(stream, overlap, 1, kernel, grid, x.threads, x.shared, a, p, to, latent(a));
        });
#else
        assert(!"tensor cores multiply bf16");
#endif
    }
}

}  // namespace decode

// Bytes of scratch memory that softmax_decode takes at most for up to num_seqs sequences of up to max_q queries, however many keys they have.
inline int64_t softmax_decode_scratch([[maybe_unused]] int heads, int kv_heads, int d_qk, int d_v, int num_seqs, [[maybe_unused]] int max_q) {
    using namespace decode;
    [[maybe_unused]] bool latent = kv_heads == 1 && d_v <= d_qk;
    int64_t bytes = 0;
    auto bound = [&](const Launch& x) { bytes = std::max(bytes, schedule_scratch(x.blocks, x.rows * x.kv_heads, d_v)); };
    for (int rows : {1, 2, 4})
        with_shape4(std::max(d_qk, d_v), rows, [&](auto shape) {
            bound(launch4(shape, kv_heads, 1));
            bound(launch4(shape, kv_heads, num_seqs));
        });
#ifndef GPU_FLOAT32
    bytes = std::max(bytes, hopper_decode_scratch(heads, kv_heads, d_qk, d_v, max_q));
    if (tensor_cores_can(d_qk, d_v, latent)) {
        auto bound5 = [&](auto kernel, auto m) { bound(launch5<m>(kernel, d_qk, d_v, latent)); };
        with_kernel5(d_v, false, bound5);
        if (max_q * (heads / kv_heads) > 16 && fits5<4>(d_qk, d_v, latent)) with_kernel5(d_v, true, bound5);
    }
#endif
    return bytes;
}

// o (rows of q, NH·d_v, o_stride apart), lse (NH, q_rows): lse[h·q_rows + n], or null; keys and values in the pages of a.states. cpu::softmax_forward.
// No dropout: decoding has none. overlap: lengths, page tables and the rows of earlier tokens were there before the kernel in front began (matvec.cuh).
inline void softmax_decode(cudaStream_t stream, const SoftmaxAttention& a, floatX* o, int64_t o_stride, float* lse /*or null*/, Scratch scratch,
                           bool overlap = false) {
    using namespace decode;
#ifndef GPU_FLOAT32
    if (hopper_decode_can(a)) {
        hopper_decode(stream, a, o, o_stride, lse, scratch, overlap);
        return;
    }
#endif
    softmax_decode_as(stream, a, {o, o_stride, lse}, scratch, rows_of(a) >= 4 && tensor_cores_can(a), overlap, [](Launch&) {});
}

// ---- rows into pages and out of them ----------------------------------------------------------------------------------------------------------------------
// One warp a row; bytes: each row once in, once out.

constexpr int PAGE_THREADS = 256, PAGE_ROWS = PAGE_THREADS / 32;

__device__ inline void copy_row_by_warp(floatX* to, const floatX* from, int width) {
    constexpr int V = Packed<floatX>::size;
    int lane = threadIdx.x % 32, whole = decode::on_16_bytes(to) && decode::on_16_bytes(from) ? width / V * V : 0;
#pragma unroll 4
    for (int c = lane * V; c < whole; c += 32 * V) store_packed(to + c, load_packed(from + c));
    for (int c = whole + lane; c < width; c += 32) to[c] = from[c];
}

__global__ void __launch_bounds__(PAGE_THREADS)
    append_rows_kernel(const AttentionState* states, const TokenPlace* place, const floatX* x, int64_t x_stride, int width, int64_t N) {
    let_next_kernel_start();
    int64_t n = (int64_t)blockIdx.x * PAGE_ROWS + threadIdx.x / 32;
    floatX* row = n < N ? states[place[n].seq].row(states[place[n].seq].length + place[n].pos) : nullptr;
    wait_for_kernel_before();
    if (n < N) copy_row_by_warp(row, x + n * x_stride, width);
}

// x (N, x_stride apart): the first `width` numbers of each row go to where its token's row stands, behind what the state holds. overlap: as in softmax_decode.
inline void append_rows(cudaStream_t stream, const AttentionState* states, const TokenPlace* place, const floatX* x, int64_t x_stride, int width, int64_t N,
                        bool overlap = false) {
    if (N == 0) return;
    launch_overlapping(stream, overlap, 1, append_rows_kernel, (int)ceil_div(N, PAGE_ROWS), PAGE_THREADS, 0, states, place, x, x_stride, width, N);
}

// The same for rows [q | k | v] of causal attention, whose q is turned by its position where it stands, and k on the way into its page: rope() and
// append_rows() in one launch, since a launch costs as much as the rows of a few tokens. One block a token, 16 bytes a thread at a time; those of a thread's
// first APPEND_PACKS that come from x are on their way while the angles are computed.
constexpr int APPEND_THREADS = 256, APPEND_PACKS = 4;
__global__ void __launch_bounds__(APPEND_THREADS) rope_append_kernel(const AttentionState* states, const TokenPlace* place, floatX* qkv, int64_t stride,
                                                                     int heads, int kv_heads, int hs, const int* position, double exponent) {
    constexpr int V = Packed<floatX>::size;
    extern __shared__ float4 append_rotations[];  // (hs/4): cos, sin, cos, sin of two neighbouring pairs
    let_next_kernel_start();
    const int64_t n = blockIdx.x;
    const AttentionState& state = states[place[n].seq];
    floatX *x = qkv + n * stride, *row = state.row(state.length + place[n].pos);
    const int q_packs = heads * hs / V, turned = q_packs + kv_heads * hs / V, packs = turned + kv_heads * hs / V;
    const bool vectors = decode::on_16_bytes(row);
    const int at = position[n];
    double powers = exp2((int)threadIdx.x * exponent);
    wait_for_kernel_before();
    for (int first = threadIdx.x; first - (int)threadIdx.x < packs; first += APPEND_THREADS * APPEND_PACKS) {
        Packed<floatX> v[APPEND_PACKS];
#pragma unroll
        for (int k = 0; k < APPEND_PACKS; k++)
            if (first + k * APPEND_THREADS < packs) v[k] = load_packed(x + (first + k * APPEND_THREADS) * V);
        if (first == (int)threadIdx.x) {
            for (int i = threadIdx.x; i < hs / 2; i += APPEND_THREADS) {
                if (i >= APPEND_THREADS) powers = exp2(i * exponent);
                ((float2*)append_rotations)[i] = rope_rotation(at, powers, 1);
            }
            __syncthreads();
        }
#pragma unroll
        for (int k = 0; k < APPEND_PACKS; k++) {
            int p = first + k * APPEND_THREADS;
            if (p >= packs) break;
            if (p < turned) {
#pragma unroll
                for (int i = 0; i < V; i += 4) {
                    float4 r = append_rotations[p * V % hs / 4 + i / 4];
                    float a0 = v[k][i], b0 = v[k][i + 1], a1 = v[k][i + 2], b1 = v[k][i + 3];
                    v[k].set(i, a0 * r.x - b0 * r.y);
                    v[k].set(i + 1, a0 * r.y + b0 * r.x);
                    v[k].set(i + 2, a1 * r.z - b1 * r.w);
                    v[k].set(i + 3, a1 * r.w + b1 * r.z);
                }
            }
            if (p < q_packs) {
                store_packed(x + p * V, v[k]);
            } else if (vectors) {
                store_packed(row + (p - q_packs) * V, v[k]);
            } else {
                for (int e = 0; e < V; e++) row[(p - q_packs) * V + e] = v[k].v[e];
            }
        }
    }
}

// qkv (N, stride apart): rows [q (heads·hs) | k (kv_heads·hs) | v (kv_heads·hs)]. Afterwards q and k are rotated by position (N), q in place, and [k | v] stand
// where the tokens' rows are in the states; whether k is rotated in qkv too depends on the sizes. overlap: as in softmax_decode, and `position` was there, too.
inline void rope_append(cudaStream_t stream, const AttentionState* states, const TokenPlace* place, floatX* qkv, int64_t stride, int64_t N, int heads,
                        int kv_heads, int hs, const int* position, bool overlap = false) {
    if (N == 0) return;
    if ((stride | hs) % Packed<floatX>::size == 0 && aligned16(qkv)) {
        launch_overlapping(stream, overlap, 1, rope_append_kernel, (int)N, APPEND_THREADS, hs * (int)sizeof(float), states, place, qkv, stride, heads, kv_heads,
                           hs, position, rope_exponent(hs));
    } else {
        rope(stream, qkv, stride, qkv, stride, N, heads + kv_heads, hs, hs, position, 1);
        append_rows(stream, states, place, qkv + (int64_t)heads * hs, stride, 2 * kv_heads * hs, N);
    }
}

__global__ void __launch_bounds__(PAGE_THREADS) gather_rows_kernel(floatX* out, const AttentionState* states, const int* cu, int width, int tiles) {
    int s = blockIdx.x / tiles, j = blockIdx.x % tiles * PAGE_ROWS + threadIdx.x / 32;
    if (j >= cu[s + 1] - cu[s]) return;
    copy_row_by_warp(out + (int64_t)(cu[s] + j) * width, states[s].row(j), width);
}

// out (cu[num_seqs], width): the rows of the first cu[s+1]−cu[s] tokens of each sequence, of which none has more than `longest`.
inline void gather_rows(cudaStream_t stream, floatX* out, const AttentionState* states, const int* cu, int num_seqs, int longest, int width) {
    int tiles = (int)ceil_div(longest, PAGE_ROWS);
    if (num_seqs == 0 || tiles == 0) return;
    gather_rows_kernel<<<(unsigned)num_seqs * tiles, PAGE_THREADS, 0, stream>>>(out, states, cu, width, tiles);
    LAUNCH_CHECK();
}

}  // namespace gpu
