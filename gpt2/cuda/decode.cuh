// The softmax core for few queries over many keys that stand in pages: decoding. The twin of cpu::softmax_forward with states (attention.h).
//
//     s_ij = scale·q_i·k_j   for the keys j that query i sees      lse_i = ln Σ_j exp(s_ij)      o_i = Σ_j exp(s_ij − lse_i)·v_j
//
// Every key and value is read once and used for a few products: the time is that of the bytes, KV·(d_qk+d_v) numbers a key (d_c+d_rope where values are the
// first part of the keys, as MLA's are), and one head of one sequence is far too little work for a whole GPU. So the keys are split (flash-decoding;
// FlashInfer, arXiv 2501.01005): each block takes one chunk of the keys of a sequence for the queries and heads that share a kv head, and with its
//
//     m = max_j s_j      l = Σ_j exp(s_j − m)      it leaves   o = Σ_j exp(s_j − m)·v_j / l   and   lse = m + ln l
//
// in scratch memory as float32. A second kernel merges a row's chunks in their order: with m = max lse_c, w_c = exp(lse_c − m)
//
//     o = Σ_c w_c·o_c / Σ_c w_c      lse = m + ln Σ_c w_c
//
// The cut follows from the shapes that the host knows alone, so that the same call gives the same bits; another cut gives the same numbers to rounding.
//
//     softmax_decode_kernel2   any sizes and strides, products in float32
//     softmax_decode_kernel3   tensor cores: bf16, more than 4 rows (queries × heads) on one kv head, sizes multiples of 8, d_v <= 512
//
// Earlier versions and times: dev/cuda/decode.cu. Below the two, the copying of rows into pages and out of them.
//
// Pages hold what they hold: slots behind a sequence's last key are never read, page tables never beyond the last page needed.
#pragma once

#include <algorithm>
#include <climits>

#include "softmax.cuh"
#include "tensor_cores.cuh"

namespace gpu {

namespace decode {

constexpr int THREADS = 128, WARPS = THREADS / 32;

// ---- how the work of a launch is cut ----------------------------------------------------------------------------------------------------------------------
// A row is a query with one of its heads. Rows of one kv head are numbered query by query, group = NH/KV heads of a query side by side.

struct Plan {
    int q0, queries;    // this launch: queries q0 ... q0+queries−1 of each sequence
    int rows, tiles;    // rows of a block; blocks for all rows of a kv head
    int chunk, splits;  // keys of a block; blocks for the most keys that a sequence's rows can see
    bool vectors;       // sizes, strides and q allow accesses of 16 bytes (rows in pages are asked on the device)
    bool latent;        // the value is the first d_v numbers of the key
    bool direct;        // a block sees all keys of its rows: results go straight to o and lse
    floatX* o;
    int64_t o_stride;
    float* lse;      // (NH, q_rows) or null
    float* partial;  // (num_seqs, splits, queries, NH, record): o (d_v), lse
    int record;

    __device__ float* part(const SoftmaxAttention& a, int s, int split, int query, int h) const {
        return partial + ((((int64_t)s * splits + split) * queries + query - q0) * a.heads + h) * record;
    }
};

// The keys [*begin, *end) of sequence s that some query of this launch sees, and how many queries it has there.
__device__ inline void visible_keys(const SoftmaxAttention& a, const Plan& p, int s, int* queries, int* begin, int* end) {
    int first = a.position(s, p.q0);
    *queries = max(0, min(p.queries, a.q_len(s) - p.q0));
    *begin = a.window > 0 ? max(0, first - a.window + 1) : 0;
    *end = max(*begin, min(first + *queries, a.k_len(s)));
}

struct Block {
    int seq, kv, split;
    int first, rows;  // its first row; rows of this sequence and kv head in all
    int begin, end;   // its keys
};
// False: nothing to do. Blocks that read the same keys are neighbours, then come those that read the same tokens: kv heads of one token stand side by side.
__device__ inline bool find_block(const SoftmaxAttention& a, const Plan& p, Block* b) {
    int x = blockIdx.x, queries, begin, end;
    b->first = x % p.tiles * p.rows;
    x /= p.tiles;
    b->kv = x % a.kv_heads;
    x /= a.kv_heads;
    b->split = x % p.splits;
    b->seq = x / p.splits;
    visible_keys(a, p, b->seq, &queries, &begin, &end);
    b->rows = queries * (a.heads / a.kv_heads);
    b->begin = begin + b->split * p.chunk;
    b->end = max(b->begin, min(b->begin + p.chunk, end));
    return b->first < b->rows && (b->begin < b->end || p.direct);
}

struct Row {
    int query, head;  // query: counted in its sequence
    int lo, hi;       // it sees the keys lo <= j < hi
    __device__ bool sees(int j) const { return j >= lo && j < hi; }
};
// Row r of the block's rows. Behind the last one: the last one again (whose q may be read), seeing nothing.
__device__ inline Row find_row(const SoftmaxAttention& a, const Plan& p, const Block& b, int r) {
    int at = min(b.first + r, b.rows - 1), group = a.heads / a.kv_heads;
    Row row;
    row.query = p.q0 + at / group;
    row.head = b.kv * group + at % group;
    int position = a.position(b.seq, row.query);
    row.lo = a.window > 0 ? max(0, position - a.window + 1) : 0;
    row.hi = b.first + r < b.rows ? min(position + 1, a.k_len(b.seq)) : 0;
    return row;
}

__device__ inline const floatX* q_row(const SoftmaxAttention& a, const Block& b, const Row& row) {
    return a.q + (a.cu_q[b.seq] + row.query) * a.q_stride + (int64_t)row.head * a.d_qk;
}
__device__ inline floatX* o_row(const SoftmaxAttention& a, const Plan& p, int s, int query, int h) {
    return p.o + (a.cu_q[s] + query) * p.o_stride + (int64_t)h * a.d_v;
}
__device__ inline void write_lse(const SoftmaxAttention& a, const Plan& p, int s, int query, int h, float lse) {
    if (p.lse) p.lse[h * a.q_rows + a.cu_q[s] + query] = lse;
}

// AttentionState::row for a key that has a 32-bit number.
__device__ inline floatX* page_row(const AttentionState& state, int j) {
    return state.rows + state.page_table[j / state.page_size] * state.page_stride + j % state.page_size * state.per_token;
}
__device__ inline bool on_16_bytes(const void* p) { return (uintptr_t)p % 16 == 0; }

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

// ---- kernel 2: float32 arithmetic, any sizes --------------------------------------------------------------------------------------------------------------
//
// A chunk is walked through in tiles of 512 keys, whose addresses are looked up once. Eight neighbouring lanes read a key, 16 bytes each, so that a warp
// has four keys in every load instruction and several such loads on their way; the same for values. Scores go to shared memory, and one warp a row turns them
// into weights. From tile to tile o is kept, not yet divided by l, in the row's place in scratch memory, rescaled when m has grown.

constexpr int TILE = 512, LANES = 8, GROUPS = THREADS / LANES;

// Numbers at ... at+left−1 of the rows of keys j, j+GROUPS, ...; zeros for keys from n on.
template <bool VECTORS, int U>
__device__ inline void load_keys(Packed<floatX> (&x)[U], const floatX* const* row, int j, int n, int64_t at, int left) {
#pragma unroll
    for (int u = 0; u < U; u++) {
        x[u] = zeros();
        if (j + u * GROUPS < n) {
            const floatX* p = row[j + u * GROUPS] + at;
            __builtin_assume(__isGlobal(p));  // an address that comes out of shared memory could be of any kind, for all the compiler knows
            x[u] = VECTORS ? load_packed(p) : load_some(p, left);
        }
    }
}

// weight[r][j] = scale·q_r·k_j for the keys j of a tile; `row` says where they stand. Not masked.
template <bool VECTORS, int R, int U>
__device__ inline void tile_scores(const SoftmaxAttention& a, const floatX* const (&q)[R], const floatX* const* row, int64_t at, int n, float (*weight)[TILE]) {
    constexpr int V = Packed<floatX>::size;
    int lane = threadIdx.x % LANES, group = threadIdx.x / LANES;
    for (int j = group; j - group < n; j += GROUPS * U) {
        float s[R][U] = {};
        for (int c = lane * V; c < a.d_qk; c += LANES * V) {
            Packed<floatX> k[U];
            load_keys<VECTORS>(k, row, j, n, at + c, a.d_qk - c);
#pragma unroll
            for (int r = 0; r < R; r++) {
                Packed<floatX> x = VECTORS ? load_packed(q[r] + c) : load_some(q[r] + c, a.d_qk - c);
#pragma unroll
                for (int u = 0; u < U; u++)
#pragma unroll
                    for (int e = 0; e < V; e++) s[r][u] += x[e] * k[u][e];
            }
        }
#pragma unroll
        for (int r = 0; r < R; r++)
#pragma unroll
            for (int u = 0; u < U; u++) {
                float x = s[r][u];
                for (int offset = LANES / 2; offset > 0; offset /= 2) x += __shfl_xor_sync(0xffffffff, x, offset);
                if (lane == 0 && j + u * GROUPS < n) weight[r][j + u * GROUPS] = x * a.scale;
            }
    }
}

// o[r] = Σ_j weight[r][j]·v_j over this group's keys of a tile, for V columns that stand `at` in the row of a key; `left` of them are there.
template <bool VECTORS, int R, int U>
__device__ inline void tile_values(const floatX* const* row, int64_t at, int left, int n, const float (*weight)[TILE], float (&o)[R][Packed<floatX>::size]) {
    for (int j = threadIdx.x / LANES; j < n; j += GROUPS * U) {
        Packed<floatX> v[U];
        load_keys<VECTORS>(v, row, j, n, at, left);
#pragma unroll
        for (int u = 0; u < U; u++)
#pragma unroll
            for (int r = 0; r < R; r++) {
                float w = j + u * GROUPS < n ? weight[r][j + u * GROUPS] : 0;
#pragma unroll
                for (int e = 0; e < Packed<floatX>::size; e++) o[r][e] += w * v[u][e];
            }
    }
}

// With registers for 6 blocks, rather than as few as the compiler can do with, all loads of a step are issued before the first is used.
constexpr int BLOCKS2 = 6;
template <int R>
__global__ void __launch_bounds__(THREADS, R == 1 ? BLOCKS2 : 4) softmax_decode_kernel2(SoftmaxAttention a, Plan p) {
    constexpr int V = Packed<floatX>::size, COLUMNS = LANES * V, U = 4;
    __shared__ const floatX* key[TILE];
    __shared__ float weight[R][TILE], sums[WARPS][R][COLUMNS], m[R], l[R], rescale[R];
    Block b;
    if (!find_block(a, p, &b)) return;
    AttentionState state = a.states[b.seq];
    int64_t k_at = a.k_offset + b.kv * a.k_head, v_at = a.v_offset + b.kv * a.v_head;
    int lane = threadIdx.x % LANES, warp = threadIdx.x / 32;
    const floatX* q[R];
#pragma unroll
    for (int r = 0; r < R; r++) q[r] = q_row(a, b, find_row(a, p, b, r));
    if (threadIdx.x < R) {
        m[threadIdx.x] = -INFINITY;
        l[threadIdx.x] = 0;
    }

    for (int j0 = b.begin; j0 == b.begin || j0 < b.end; j0 += TILE) {
        int n = min(TILE, b.end - j0);
        bool last = j0 + n == b.end, aligned = p.vectors;
        for (int j = threadIdx.x; j < n; j += THREADS) {
            key[j] = page_row(state, j0 + j);
            aligned = aligned && on_16_bytes(key[j]);
        }
        bool vectors = __syncthreads_and(aligned);

        if (vectors)
            tile_scores<true, R, U>(a, q, key, k_at, n, weight);
        else
            tile_scores<false, R, 1>(a, q, key, k_at, n, weight);
        __syncthreads();

        // m' = max(m, max_j s_j)   weight_j = exp(s_j − m')   l' = l·exp(m − m') + Σ_j weight_j, over the keys that the row sees
        for (int r = warp; r < R; r += WARPS) {
            Row x = find_row(a, p, b, r);
            float before = m[r], now = before, sum = 0;
            for (int j = threadIdx.x % 32; j < n; j += 32)
                if (x.sees(j0 + j)) now = fmaxf(now, weight[r][j]);
            now = warp_max(now);
            for (int j = threadIdx.x % 32; j < n; j += 32) {
                float w = x.sees(j0 + j) ? expf(weight[r][j] - now) : 0;
                weight[r][j] = w;
                sum += w;
            }
            sum = warp_sum(sum);
            if (threadIdx.x % 32 == 0) {
                rescale[r] = before == -INFINITY ? 0 : expf(before - now);
                m[r] = now;
                l[r] = l[r] * rescale[r] + sum;
            }
        }
        __syncthreads();

        // o' = o·exp(m − m') + Σ_j weight_j·v_j, some columns at a time
        for (int c0 = 0; c0 < a.d_v; c0 += COLUMNS) {
            int c = c0 + lane * V;
            float o[R][V] = {};
            if (c < a.d_v && vectors)
                tile_values<true, R, U>(key, v_at + c, a.d_v - c, n, weight, o);
            else if (c < a.d_v)
                tile_values<false, R, 1>(key, v_at + c, a.d_v - c, n, weight, o);
#pragma unroll
            for (int r = 0; r < R; r++)
#pragma unroll
                for (int e = 0; e < V; e++) {
                    float x = o[r][e];  // the warp's four groups have the same columns
                    x += __shfl_xor_sync(0xffffffff, x, LANES);
                    x += __shfl_xor_sync(0xffffffff, x, 2 * LANES);
                    if (threadIdx.x % 32 < LANES) sums[warp][r][lane * V + e] = x;
                }
            __syncthreads();
            for (int i = threadIdx.x; i < R * COLUMNS; i += THREADS) {
                int r = i / COLUMNS, column = c0 + i % COLUMNS;
                if (column >= a.d_v || b.first + r >= b.rows) continue;
                Row x = find_row(a, p, b, r);
                float sum = 0, lse = l[r] > 0 ? m[r] + logf(l[r]) : -INFINITY;
                for (int w = 0; w < WARPS; w++) sum += sums[w][r][i % COLUMNS];
                if (p.direct) {  // there is one tile
                    o_row(a, p, b.seq, x.query, x.head)[column] = from_float<floatX>(l[r] > 0 ? sum / l[r] : 0);
                    if (column == 0) write_lse(a, p, b.seq, x.query, x.head, lse);
                } else {
                    float* part = p.part(a, b.seq, b.split, x.query, x.head);
                    if (j0 > b.begin) sum += part[column] * rescale[r];
                    part[column] = !last ? sum : l[r] > 0 ? sum / l[r] : 0;
                    if (last && column == 0) part[a.d_v] = lse;
                }
            }
            __syncthreads();
        }
    }
}

// ---- kernel 3: tensor cores -------------------------------------------------------------------------------------------------------------------------------
//
// 16 rows of one kv head are the rows of a 16×8×16 product, so that all of them cost what one does. Tiles of 32 keys (and values, if they are not the same
// numbers) are copied into shared memory, the next one while this one is worked on. Of S = QKᵀ each warp makes the columns of 8 keys; scores meet in shared
// memory, and every warp takes all of them from there as the left operand of PV, in which it makes every fourth piece of 16 columns. m and l are the same
// in all warps.

constexpr int ROWS3 = 16, KEYS3 = 32, SCORES3 = KEYS3 + 8;  // 8 numbers of padding: the reads of half a warp meet different banks

// Numbers from one row in shared memory to the next; q and keys are padded with zeros to whole steps of 32. An odd multiple of 16 bytes, so that the eight
// rows that a matrix load reads meet different banks.
HOST_DEVICE inline int key_stride3(int d_qk) { return (int)round_up(d_qk, 32) + 8; }
HOST_DEVICE inline int value_stride3(int d_v) { return (int)round_up(d_v, 16) + 8; }
inline int64_t shared_bytes3(int d_qk, int d_v, bool latent) {
    int64_t numbers = (ROWS3 + 2 * KEYS3) * key_stride3(d_qk) + (latent ? 0 : 2 * KEYS3 * value_stride3(d_v));
    return 2 * numbers + (int64_t)sizeof(float) * ROWS3 * SCORES3;
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
template <int PIECES>
constexpr int BLOCKS3 = PIECES == 1   ? 6
                        : PIECES == 2 ? 5
                        : PIECES == 4 ? 4
                                      : 2;
template <int PIECES>
__global__ void __launch_bounds__(THREADS, BLOCKS3<PIECES>) softmax_decode_kernel3(SoftmaxAttention a, Plan p) {
    extern __shared__ int4 decode_shared[];
    Block b;
    if (!find_block(a, p, &b)) return;
    const int k_row = key_stride3(a.d_qk), v_row = p.latent ? k_row : value_stride3(a.d_v), width = k_row - 8;
    floatX *q = (floatX*)decode_shared, *keys = q + ROWS3 * k_row, *end = keys + 2 * KEYS3 * k_row, *values = p.latent ? keys : end;
    float* scores = (float*)(p.latent ? end : values + 2 * KEYS3 * v_row);
    AttentionState state = a.states[b.seq];
    int64_t k_at = a.k_offset + b.kv * a.k_head, v_at = a.v_offset + b.kv * a.v_head;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;

    auto load_tile = [&](int j0, int stage) {
#pragma unroll
        for (int i = 0; i < KEYS3; i += THREADS / 8) {
            int at = i + threadIdx.x / 8;
            const floatX* row = page_row(state, min(j0 + at, b.end - 1));
            copy_row(keys + (stage * KEYS3 + at) * k_row, row + k_at, a.d_qk, j0 + at < b.end);
            if (!p.latent) copy_row(values + (stage * KEYS3 + at) * v_row, row + v_at, a.d_v, j0 + at < b.end);
        }
    };
    if (b.begin < b.end) load_tile(b.begin, 0);
    for (int r = threadIdx.x / 8; r < ROWS3; r += THREADS / 8) {
        const floatX* from = q_row(a, b, find_row(a, p, b, r));
        for (int c = threadIdx.x % 8 * 8; c < width; c += 64) store_packed(q + r * k_row + c, c < a.d_qk ? load_packed(from + c) : zeros());
    }
    for (int i = threadIdx.x; i < 2 * KEYS3 * (width - a.d_qk); i += THREADS)  // the keys' padding
        keys[i / (width - a.d_qk) * k_row + a.d_qk + i % (width - a.d_qk)] = from_float<floatX>(0);

    // This lane's two rows, lane/4 and lane/4 + 8.
    Row row[2];
    float m[2] = {-INFINITY, -INFINITY}, l[2] = {0, 0}, o[PIECES][2][4] = {};
#pragma unroll
    for (int i = 0; i < 2; i++) row[i] = find_row(a, p, b, lane / 4 + 8 * i);

    int stage = 0;
    for (int j0 = b.begin; j0 < b.end; j0 += KEYS3, stage ^= 1) {
        copy_async_wait_all();
        __syncthreads();  // this tile is there, and nobody needs the one before or its scores
        if (j0 + KEYS3 < b.end) load_tile(j0 + KEYS3, stage ^ 1);

        // S = QKᵀ for 8 keys, 32 channels at a time; two sums, so that a product need not wait for the one before
        float even[4] = {}, odd[4] = {};
        const floatX *q_at = q + lane % 16 * k_row + lane / 16 * 8, *key_at = keys + (stage * KEYS3 + warp * 8 + lane % 8) * k_row + lane / 8 * 8;
#pragma unroll 2
        for (int c = 0; c < width; c += 32) {
            uint32_t k[4], x[4], y[4];
            load_matrices(k, shared_address(key_at + c));
            load_matrices(x, shared_address(q_at + c));
            load_matrices(y, shared_address(q_at + c + 16));
            mma(even, x, k[0], k[1]);
            mma(odd, y, k[2], k[3]);
        }
#pragma unroll
        for (int i = 0; i < 2; i++) {
            int at = warp * 8 + lane % 4 * 2;
            float2 s;
            s.x = row[i].sees(j0 + at) ? (even[2 * i] + odd[2 * i]) * a.scale : -INFINITY;
            s.y = row[i].sees(j0 + at + 1) ? (even[2 * i + 1] + odd[2 * i + 1]) * a.scale : -INFINITY;
            *(float2*)(scores + (lane / 4 + 8 * i) * SCORES3 + at) = s;
        }
        __syncthreads();

        // Weights as the left operand: block 8·g of the keys is column half g%2 of step g/2.
        uint32_t weights[KEYS3 / 16][4];
        float factor[2];
#pragma unroll
        for (int i = 0; i < 2; i++) {
            float2 s[KEYS3 / 8];
            float now = m[i];
#pragma unroll
            for (int g = 0; g < KEYS3 / 8; g++) {
                s[g] = *(const float2*)(scores + (lane / 4 + 8 * i) * SCORES3 + g * 8 + lane % 4 * 2);
                now = fmaxf(now, fmaxf(s[g].x, s[g].y));
            }
            now = fmaxf(now, __shfl_xor_sync(0xffffffff, now, 1));
            now = fmaxf(now, __shfl_xor_sync(0xffffffff, now, 2));
            factor[i] = m[i] == -INFINITY ? 0 : __expf(m[i] - now);
            m[i] = now;
            l[i] *= factor[i];
#pragma unroll
            for (int g = 0; g < KEYS3 / 8; g++) {
                s[g].x = s[g].x == -INFINITY ? 0 : __expf(s[g].x - now);
                s[g].y = s[g].y == -INFINITY ? 0 : __expf(s[g].y - now);
                l[i] += s[g].x + s[g].y;
                weights[g / 2][g % 2 * 2 + i] = pack_bf16(s[g].x, s[g].y);
            }
        }

        // O' = O·exp(m − m') + PV
        const floatX* value_at = values + (stage * KEYS3 + lane % 16) * v_row + lane / 16 * 8;
#pragma unroll
        for (int i = 0; i < PIECES; i++) {
            int c = (warp + WARPS * i) * 16;
            if (c >= a.d_v) continue;
#pragma unroll
            for (int e = 0; e < 4; e++) {
                o[i][0][e] *= factor[e / 2];
                o[i][1][e] *= factor[e / 2];
            }
#pragma unroll
            for (int step = 0; step < KEYS3 / 16; step++) {
                uint32_t v[4];
                load_matrices_transposed(v, shared_address(value_at + step * 16 * v_row + c));
                mma(o[i][0], weights[step], v[0], v[1]);
                mma(o[i][1], weights[step], v[2], v[3]);
            }
        }
    }

#pragma unroll
    for (int i = 0; i < 2; i++) {
        float sum = l[i];  // each of the row's four lanes has its own keys
        sum += __shfl_xor_sync(0xffffffff, sum, 1);
        sum += __shfl_xor_sync(0xffffffff, sum, 2);
        if (b.first + lane / 4 + 8 * i >= b.rows) continue;
        float factor = sum > 0 ? 1 / sum : 0, lse = sum > 0 ? m[i] + logf(sum) : -INFINITY;
        floatX* out = o_row(a, p, b.seq, row[i].query, row[i].head);
        float* part = p.direct ? nullptr : p.part(a, b.seq, b.split, row[i].query, row[i].head);
#pragma unroll
        for (int e = 0; e < 4 * PIECES; e++) {
            int c = (warp + WARPS * (e / 4)) * 16 + e / 2 % 2 * 8 + lane % 4 * 2 + e % 2;
            float x = sum > 0 ? o[e / 4][e / 2 % 2][2 * i + e % 2] * factor : 0;
            if (c >= a.d_v) continue;
            if (p.direct)
                out[c] = from_float<floatX>(x);
            else
                part[c] = x;
        }
        if (warp == 0 && lane % 4 == 0) {
            if (p.direct)
                write_lse(a, p, b.seq, row[i].query, row[i].head, lse);
            else
                part[a.d_v] = lse;
        }
    }
}

inline void launch3(cudaStream_t stream, const SoftmaxAttention& a, const Plan& p, int blocks) {
    auto kernel = a.d_v <= 64    ? softmax_decode_kernel3<1>
                  : a.d_v <= 128 ? softmax_decode_kernel3<2>
                  : a.d_v <= 256 ? softmax_decode_kernel3<4>
                                 : softmax_decode_kernel3<8>;
    int64_t shared = shared_bytes3(a.d_qk, a.d_v, p.latent);
    allow_shared_memory(kernel, shared);
    kernel<<<blocks, THREADS, shared, stream>>>(a, p);
}
#else
inline void launch3(cudaStream_t, const SoftmaxAttention&, const Plan&, int) { assert(!"tensor cores multiply bf16"); }
#endif

// ---- the merge --------------------------------------------------------------------------------------------------------------------------------------------
// One block a row: four neighbouring columns a thread, and as many chunks side by side as the block has room for.

constexpr int MERGE_THREADS = 256;
__global__ void __launch_bounds__(MERGE_THREADS) softmax_decode_merge_kernel(SoftmaxAttention a, Plan p) {
    extern __shared__ float decode_weight[];  // (splits)
    __shared__ float maxima[32], totals[32];
    __shared__ float4 sums[MERGE_THREADS];
    int h = blockIdx.x % a.heads, query = p.q0 + blockIdx.x / a.heads % p.queries, s = blockIdx.x / a.heads / p.queries, queries, begin, end;
    visible_keys(a, p, s, &queries, &begin, &end);
    if (query >= p.q0 + queries) return;
    int count = (int)ceil_div(end - begin, p.chunk);
    const float* first = p.part(a, s, 0, query, h);
    int64_t step = (int64_t)p.queries * a.heads * p.record;  // from chunk to chunk

    float m = -INFINITY, total = 0;
    for (int k = threadIdx.x; k < count; k += MERGE_THREADS) {
        decode_weight[k] = first[k * step + a.d_v];
        m = fmaxf(m, decode_weight[k]);
    }
    m = block_max(m, maxima);
    for (int k = threadIdx.x; k < count; k += MERGE_THREADS) {
        float w = decode_weight[k] == -INFINITY ? 0 : expf(decode_weight[k] - m);
        decode_weight[k] = w;
        total += w;
    }
    total = block_sum(total, totals);

    floatX* out = o_row(a, p, s, query, h);
    int quads = (a.d_v + 3) / 4, lanes = min(quads, MERGE_THREADS), groups = MERGE_THREADS / lanes, lane = threadIdx.x % lanes, group = threadIdx.x / lanes;
    for (int quad = lane; quad - lane < quads; quad += lanes) {
        float4 sum = {0, 0, 0, 0};
        if (group < groups && quad < quads) {
#pragma unroll 8
            for (int k = group; k < count; k += groups) {
                float w = decode_weight[k];
                float4 x = *(const float4*)(first + k * step + 4 * quad);
                if (w == 0) continue;
                sum.x += w * x.x;
                sum.y += w * x.y;
                sum.z += w * x.z;
                sum.w += w * x.w;
            }
        }
        sums[threadIdx.x] = sum;
        __syncthreads();
        if (group == 0 && quad < quads) {
            float x[4] = {0, 0, 0, 0};
            for (int g = 0; g < groups; g++) {
                float4 y = sums[g * lanes + lane];
                x[0] += y.x;
                x[1] += y.y;
                x[2] += y.z;
                x[3] += y.w;
            }
            for (int e = 0; e < 4; e++)
                if (4 * quad + e < a.d_v) out[4 * quad + e] = from_float<floatX>(total > 0 ? x[e] / total : 0);
        }
        __syncthreads();
    }
    if (threadIdx.x == 0) write_lse(a, p, s, query, h, total > 0 ? m + logf(total) : -INFINITY);
}

// ---- the host's side --------------------------------------------------------------------------------------------------------------------------------------

constexpr int LAUNCH_ROWS = 64;  // of a kv head in one launch, so that partial results stay few beside the keys: further queries are further launches
inline int launch_queries(int heads, int kv_heads) { return std::max(1, LAUNCH_ROWS * kv_heads / heads); }

inline bool latent(const SoftmaxAttention& a) { return a.kv_heads == 1 && a.d_v <= a.d_qk && a.v_offset == a.k_offset; }

inline bool tensor_cores_can(int d_qk, int d_v, bool latent) {
    return sizeof(floatX) == 2 && d_qk % 8 == 0 && d_v % 8 == 0 && d_v <= 512 &&
           shared_bytes3(d_qk, d_v, latent) <= (int64_t)device_properties().sharedMemPerBlockOptin;
}
inline bool tensor_cores_can(const SoftmaxAttention& a) { return tensor_cores_can(a.d_qk, a.d_v, latent(a)) && a.q_stride % 8 == 0 && aligned16(a.q); }

// How many blocks a launch should have. Kernel 2: as many as run at the same time. Kernel 3: twice as many, for few large blocks share a multiprocessor and
// half a wave at the end would cost more.
inline int wanted_blocks(int d_qk, int d_v, bool latent, bool tensor_cores) {
    const cudaDeviceProp& device = device_properties();
    if (!tensor_cores) return BLOCKS2 * device.multiProcessorCount;
    int64_t fit = (int64_t)device.sharedMemPerMultiprocessor / (shared_bytes3(d_qk, d_v, latent) + 1024);
    return 2 * (int)std::min<int64_t>(8, std::max<int64_t>(1, fit)) * device.multiProcessorCount;
}

// `splits` > 0 asks for so many (fewer if there are not keys enough for them).
inline Plan make_plan(const SoftmaxAttention& a, bool tensor_cores, int q0, int splits) {
    constexpr int size = Packed<floatX>::size;
    Plan p{};
    p.q0 = q0;
    p.queries = std::min(launch_queries(a.heads, a.kv_heads), a.max_q - q0);
    int rows = p.queries * (a.heads / a.kv_heads), keys = a.window > 0 ? (int)std::min<int64_t>(a.max_k, (int64_t)a.window + p.queries - 1) : a.max_k;
    p.rows = tensor_cores ? ROWS3 : rows > 1 ? 4 : 1;
    p.tiles = (int)ceil_div(rows, p.rows);
    p.latent = latent(a);
    int64_t pieces = (int64_t)a.num_seqs * a.kv_heads * p.tiles;
    int64_t wanted = splits > 0 ? splits : std::max<int64_t>(1, wanted_blocks(a.d_qk, a.d_v, p.latent, tensor_cores) / pieces);
    int shortest = splits > 0 ? KEYS3 : tensor_cores ? 128 : 64;
    p.chunk = (int)std::max<int64_t>(shortest, round_up(ceil_div(keys, wanted), KEYS3));
    p.splits = (int)std::max<int64_t>(1, ceil_div(keys, p.chunk));
    assert(pieces * p.splits <= INT_MAX);
    p.vectors = (a.d_qk | a.d_v | a.q_stride | a.k_offset | a.v_offset | a.k_head | a.v_head) % size == 0 && aligned16(a.q);
    p.direct = p.splits == 1 && (tensor_cores || p.chunk <= TILE);
    p.record = (int)round_up(a.d_v + 1, 4);
    return p;
}

// As softmax_decode, by the kernel and in so many splits as asked for.
inline void softmax_decode_as(cudaStream_t stream, const SoftmaxAttention& a, floatX* o, int64_t o_stride, float* lse, Scratch scratch, bool tensor_cores,
                              int splits) {
    assert(a.states && a.heads % a.kv_heads == 0 && a.dropout.p == 0);
    if (a.num_seqs == 0) return;
    for (int q0 = 0; q0 < a.max_q; q0 += launch_queries(a.heads, a.kv_heads)) {
        Plan p = make_plan(a, tensor_cores, q0, splits);
        p.o = o;
        p.o_stride = o_stride;
        p.lse = lse;
        Scratch rest = scratch;
        if (!p.direct) p.partial = rest.take<float>((int64_t)a.num_seqs * p.splits * p.queries * a.heads * p.record);
        int blocks = a.num_seqs * p.splits * a.kv_heads * p.tiles;
        if (tensor_cores)
            launch3(stream, a, p, blocks);
        else if (p.rows == 1)
            softmax_decode_kernel2<1><<<blocks, THREADS, 0, stream>>>(a, p);
        else
            softmax_decode_kernel2<4><<<blocks, THREADS, 0, stream>>>(a, p);
        LAUNCH_CHECK();
        if (p.direct) continue;
        size_t shared = p.splits * sizeof(float);
        allow_shared_memory(softmax_decode_merge_kernel, shared);
        softmax_decode_merge_kernel<<<a.num_seqs * p.queries * a.heads, MERGE_THREADS, shared, stream>>>(a, p);
        LAUNCH_CHECK();
    }
}

}  // namespace decode

// Bytes of scratch memory that softmax_decode takes at most for up to num_seqs sequences of up to max_q queries, however many keys they have.
inline int64_t softmax_decode_scratch(int heads, int kv_heads, int d_qk, int d_v, int num_seqs, int max_q) {
    int64_t rows = (int64_t)num_seqs * std::min(max_q, decode::launch_queries(heads, kv_heads)) * heads;
    bool latent = kv_heads == 1 && d_v <= d_qk;
    rows = std::max<int64_t>(rows, (int64_t)decode::wanted_blocks(d_qk, d_v, latent, false) * 4);
    if (decode::tensor_cores_can(d_qk, d_v, latent)) rows = std::max<int64_t>(rows, (int64_t)decode::wanted_blocks(d_qk, d_v, latent, true) * decode::ROWS3);
    return scratch_bytes({rows * round_up(d_v + 1, 4) * (int64_t)sizeof(float)});
}

// o (rows of q, NH·d_v, o_stride apart), lse (NH, q_rows): lse[h·q_rows + n], or null; keys and values in the pages of a.states. cpu::softmax_forward.
// No dropout: decoding has none.
inline void softmax_decode(cudaStream_t stream, const SoftmaxAttention& a, floatX* o, int64_t o_stride, float* lse /*or null*/, Scratch scratch) {
    int rows = std::min(a.max_q, decode::launch_queries(a.heads, a.kv_heads)) * (a.heads / a.kv_heads);
    decode::softmax_decode_as(stream, a, o, o_stride, lse, scratch, rows > 4 && decode::tensor_cores_can(a), 0);
}

// ---- rows into pages and out of them
// ------------------------------------------------------------------------------------------------------------------------- One warp a row; bytes: each row
// once in, once out.

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
    int64_t n = (int64_t)blockIdx.x * PAGE_ROWS + threadIdx.x / 32;
    if (n >= N) return;
    const AttentionState& state = states[place[n].seq];
    copy_row_by_warp(state.row(state.length + place[n].pos), x + n * x_stride, width);
}

// x (N, x_stride apart): the first `width` numbers of each row go to where its token's row stands, behind what the state holds.
inline void append_rows(cudaStream_t stream, const AttentionState* states, const TokenPlace* place, const floatX* x, int64_t x_stride, int width, int64_t N) {
    if (N == 0) return;
    append_rows_kernel<<<(unsigned)ceil_div(N, PAGE_ROWS), PAGE_THREADS, 0, stream>>>(states, place, x, x_stride, width, N);
    LAUNCH_CHECK();
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
