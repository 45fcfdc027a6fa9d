// The ladder of decoding: softmax attention of few queries over many keys in pages (gpt2/cuda/decode.cuh).
//
//     s_ij = scale·q_i·k_j      o_i = Σ_j exp(s_ij − lse_i)·v_j      lse_i = ln Σ_j exp(s_ij)
//
// Work: 2·(d_qk+d_v) FLOPs for each query head and key; bytes: every key and value once, KV·(d_qk+d_v) numbers a token, or d_qk where values are the first
// part of the keys (MLA, absorbed). Queries and results are nothing beside them. On an H100, bf16, at 3.0 TB/s:
//
//     64 sequences of 4096 tokens, NH 12, d 64         805 MB   268 µs    a FLOP a byte
//     1 sequence of 32768 tokens, NH 12, d 64          101 MB    34 µs
//     64 × 4096, MLA absorbed, NH 12, d 288/256        151 MB    50 µs    3.4 GFLOP: 11 FLOPs a byte of each of 12 heads' products
//     64 × 4096, MLA absorbed, NH 16, d 576/512        302 MB   101 µs    9.1 GFLOP
//
//   1 naive: a block a query and head. A thread makes the scores of its own keys, number by number; then a thread a column of o walks over all keys.
//     Lanes read 32 different keys at once, two bytes from each, and one sequence keeps only NH multiprocessors busy.
//   2 keys split over blocks, merged by a second kernel; eight lanes read a key in 16-byte pieces, several keys on their way; the rows of one kv head share
//     what is read. Expected: near the memory's limit for one row a kv head, where a key costs some 50 instructions of 8 lanes; not so for many rows, whose
//     products (2·NH·(d_qk+d_v) for a latent) are then in the way: 12 heads of MLA need 120 µs of float32 arithmetic, 16 heads of 576/512 270 µs.
//   3 tensor cores: 16 rows of a kv head are one operand, keys and values come through shared memory, latents once for both. Expected: the memory's limit
//     again, since now a tile's products take a third of the time in which it arrives.
//
//   4 (CUDA cores) and 5 (tensor cores): the keys of all sequences are dealt out evenly over as many blocks as run at the same time, whatever the lengths, and
//     the blocks themselves merge (decode_schedule.cuh). Versions 2 and 3 cut every sequence as the longest one must be, and merging costs them a launch of
//     some 3 µs and two times 4·(d_v+1) bytes for each row and split. Expected: unequal lengths as fast as equal ones; half as many partial results. And
//   4 a warp never waits for another: each lane copies ahead into shared memory what it will read itself. Expected: 90 % of the limit, since 128 KB are on
//     their way to each multiprocessor where version 2 had what a few registers hold, and nothing at the changes from keys to values and from tile to tile.
//     In use for up to 3 rows a kv head, and for all that tensor cores cannot do
//   5 64 rows of a latent are a block's when there are so many: 128 heads are 2 passes over a tile of latents, side by side, not 8. Tiles of 64 keys for up to
//     16 rows, so that there are half as many barriers. Expected: 128 heads limited by the reads of shared memory, 1.4 KB for each key and 16 rows or some
//     300 TFLOP/s; otherwise a tenth more than version 3. In use where Hopper's kernel for latents (dev/cuda/mla_decode.cu) is not: grouped queries
#include "../../gpt2/cuda/decode.cuh"

#include "ladder.h"

using namespace gpu;

// ---- version 1 --------------------------------------------------------------------------------------------------------------------------------------------

__global__ void softmax_decode_kernel1(SoftmaxAttention a, floatX* o, int64_t o_stride, float* lse) {
    extern __shared__ float score[];  // (max_k)
    __shared__ float maxima[32], sums[32];
    int s = blockIdx.x / a.max_q, i = blockIdx.x % a.max_q, h = blockIdx.y, g = a.kv_head(h);
    if (i >= a.q_len(s)) return;
    int64_t n = a.cu_q[s] + i;
    int position = a.position(s, i), lo = a.window > 0 ? max(0, position - a.window + 1) : 0, hi = min(position + 1, a.k_len(s));
    const floatX* q = a.q + n * a.q_stride + h * a.d_qk;
    float m = -INFINITY, l = 0;
    for (int j = lo + threadIdx.x; j < hi; j += blockDim.x) {
        const floatX* k = a.states[s].row(j) + a.k_offset + g * a.k_head;
        float sum = 0;
        for (int c = 0; c < a.d_qk; c++) sum += to_float(q[c]) * to_float(k[c]);
        score[j - lo] = sum * a.scale;
        m = fmaxf(m, sum * a.scale);
    }
    m = block_max(m, maxima);
    for (int j = lo + threadIdx.x; j < hi; j += blockDim.x) {
        score[j - lo] = expf(score[j - lo] - m);
        l += score[j - lo];
    }
    l = block_sum(l, sums);
    for (int c = threadIdx.x; c < a.d_v; c += blockDim.x) {
        float sum = 0;
        for (int j = lo; j < hi; j++) sum += score[j - lo] * to_float(a.states[s].row(j)[a.v_offset + g * a.v_head + c]);
        o[n * o_stride + h * a.d_v + c] = from_float<floatX>(l > 0 ? sum / l : 0);
    }
    if (threadIdx.x == 0 && lse) lse[h * a.q_rows + n] = l > 0 ? m + logf(l) : -INFINITY;
}

bool softmax_decode1(cudaStream_t stream, const SoftmaxAttention& a, floatX* o, int64_t o_stride, float* lse) {
    size_t shared = a.max_k * sizeof(float);
    if (shared + 1024 > device_properties().sharedMemPerBlockOptin) return false;
    allow_shared_memory(softmax_decode_kernel1, shared);
    softmax_decode_kernel1<<<dim3(a.num_seqs * a.max_q, a.heads), 256, shared, stream>>>(a, o, o_stride, lse);
    LAUNCH_CHECK();
    return true;
}

// ---- versions 2 and 3: the host cuts ----------------------------------------------------------------------------------------------------------------------
//
// Each block takes one chunk of the keys of a sequence for the queries and heads that share a kv head, and with its
//
//     m = max_j s_j      l = Σ_j exp(s_j − m)      it leaves   o = Σ_j exp(s_j − m)·v_j / l   and   lse = m + ln l
//
// in scratch memory as float32. A second kernel merges a row's chunks in their order: with m = max lse_c, w_c = exp(lse_c − m)
//
//     o = Σ_c w_c·o_c / Σ_c w_c      lse = m + ln Σ_c w_c
//
// The chunk follows from the longest sequence: shorter ones have fewer.

namespace by_host {

using namespace decode;

constexpr int THREADS = 128, WARPS = THREADS / 32;

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
            key[j] = state.row(j0 + j);
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
            const floatX* row = state.row(min(j0 + at, b.end - 1));
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

// Bytes of scratch memory that softmax_decode_as takes.
inline int64_t scratch_size(const SoftmaxAttention& a, int splits) {
    int64_t rows = (int64_t)a.num_seqs * std::min(a.max_q, launch_queries(a.heads, a.kv_heads)) * a.heads;
    int64_t cut = std::max<int64_t>(wanted_blocks(a.d_qk, a.d_v, latent(a), false) * 4, (int64_t)wanted_blocks(a.d_qk, a.d_v, latent(a), true) * ROWS3);
    return scratch_bytes({std::max(rows * std::max(splits, 1), cut) * round_up(a.d_v + 1, 4) * (int64_t)sizeof(float)});
}

}  // namespace by_host

// ---- cases ------------------------------------------------------------------------------------------------------------------------------------------------

struct Case {
    int heads, kv_heads, d_qk, d_v;
    bool latent;  // the value is the first part of the key
    int window, page_size;
    int gap;                        // numbers before each key and value in a row, before a page's first row, and behind a row of q: odd ones spoil alignment
    std::vector<int> q_len, k_len;  // of each sequence
    std::vector<int> q_at = {};     // where its queries stand; empty: they are the last keys' tokens
    float q_scale = 1;              // of the numbers in q
    int far_key = -1;               // a key of each sequence whose logits are −5e5
    int64_t spread = 1;             // pages of the pool for each one used
    int per_token() const { return latent ? gap + d_qk : gap + kv_heads * d_qk + gap + kv_heads * d_v; }
};

template <class Core>  // cpu::SoftmaxAttention or gpu::SoftmaxAttention
Core core_of(const Case& c, int q_stride) {
    Core a{};
    a.heads = c.heads;
    a.kv_heads = c.kv_heads;
    a.d_qk = c.d_qk;
    a.d_v = c.d_v;
    a.scale = 1 / std::sqrt((float)c.d_qk);
    a.window = c.window;
    a.num_seqs = (int)c.q_len.size();
    a.q_stride = q_stride;
    a.k_offset = c.gap;
    a.v_offset = c.latent ? c.gap : c.gap + c.kv_heads * c.d_qk + c.gap;
    a.k_head = c.latent ? 0 : c.d_qk;
    a.v_head = c.latent ? 0 : c.d_v;
    return a;
}

std::vector<int> offsets(const std::vector<int>& lengths) {
    std::vector<int> cu(1, 0);
    for (int n : lengths) cu.push_back(cu.back() + n);
    return cu;
}

SoftmaxAttention device_core(const Case& c, int q_stride, const int* cu_q, const int* cu_k, const floatX* q, const AttentionState* states,
                             const StatePages& pages) {
    SoftmaxAttention a = core_of<SoftmaxAttention>(c, q_stride);
    a.max_q = *std::max_element(c.q_len.begin(), c.q_len.end());
    a.max_k = *std::max_element(c.k_len.begin(), c.k_len.end());
    a.q_rows = offsets(c.q_len).back();
    a.cu_q = cu_q;
    a.cu_k = cu_k;
    a.q = q;
    a.states = states;
    a.pages = pages;
    return a;
}

// cut: 0 as the version likes it; else so many blocks for all (versions 4 and 5), or splits of each sequence (2 and 3). overlap: versions 4 and 5 may begin
// before the kernel in front of them has ended.
int64_t scratch_size(const SoftmaxAttention& a, int cut) {
    return std::max(by_host::scratch_size(a, cut), softmax_decode_scratch(a.heads, a.kv_heads, a.d_qk, a.d_v, a.num_seqs, a.max_q));
}
bool run_version(int version, cudaStream_t stream, const SoftmaxAttention& a, floatX* o, float* lse, Scratch scratch, int cut, bool overlap) {
    int64_t o_stride = (int64_t)a.heads * a.d_v;
    bool tensor_cores = version == 3 || version == 5;
    if (version == 1) return cut == 0 && softmax_decode1(stream, a, o, o_stride, lse);
    if (tensor_cores && !decode::tensor_cores_can(a)) return false;
    if (version <= 3) {
        by_host::softmax_decode_as(stream, a, o, o_stride, lse, scratch, tensor_cores, cut);
    } else {
        decode::softmax_decode_as(stream, a, {o, o_stride, lse}, scratch, tensor_cores, overlap, [&](decode::Launch& x) {
            if (cut == 0) return;
            x.blocks = cut;
            x.least = 1;
            if (cut % 2 == 0) {  // and one kv head to an item
                x.tile *= x.kv_heads;
                x.kv_heads = 1;
            }
        });
    }
    return true;
}

void check(Ladder& ladder, const Case& c, uint64_t seed) {
    int num_seqs = (int)c.q_len.size(), rows = offsets(c.q_len).back(), q_stride = c.heads * c.d_qk + c.gap, per_token = c.per_token();
    std::vector<int> cu_q = offsets(c.q_len), cu_k = offsets(c.k_len), pages_before(1, 0);
    for (int n : c.k_len) pages_before.push_back(pages_before.back() + (int)ceil_div(n, c.page_size));

    std::vector<float> numbers = random_numbers((int64_t)cu_k.back() * per_token, seed), q = random_numbers((int64_t)rows * q_stride, seed + 1);
    for (float& x : q) x = round_to_working_type(x * c.q_scale);
    if (c.far_key >= 0) {  // the first number of q is 1, of keys 0, but for the far one's
        for (int n = 0; n < rows; n++)
            for (int h = 0; h < c.heads; h++) q[(int64_t)n * q_stride + h * c.d_qk] = 1;
        for (int s = 0; s < num_seqs; s++)
            for (int j = 0; j < c.k_len[s]; j++)
                for (int g = 0; g < c.kv_heads; g++)
                    numbers[(int64_t)(cu_k[s] + j) * per_token + c.gap + g * c.d_qk] =
                        j == c.far_key ? round_to_working_type(-5e5f * std::sqrt((float)c.d_qk)) : 0;
    }

    // Pages in an order of their own, poison wherever no row stands. On the device there may be unused pages between them.
    int64_t page = round_up(c.gap + c.page_size * per_token, 8), pages = pages_before.back(), device_pages = std::max<int64_t>(1, pages * c.spread);
    std::vector<float> pool(pages * page, NAN);
    std::vector<int64_t> where(pages);
    for (int64_t p = 0; p < pages; p++) where[p] = p;
    for (int64_t p = pages - 1; p > 0; p--) std::swap(where[p], where[philox(seed, (uint32_t)p, 0, 0, 1).word[0] % (p + 1)]);
    std::vector<int> tables, device_table_entries;
    for (int s = 0; s < num_seqs; s++) {
        for (int j = 0; j < c.k_len[s]; j++)
            memcpy(&pool[where[pages_before[s] + j / c.page_size] * page + c.gap + j % c.page_size * per_token], &numbers[(int64_t)(cu_k[s] + j) * per_token],
                   per_token * sizeof(float));
        for (int p = pages_before[s]; p < pages_before[s + 1]; p++) tables.push_back((int)where[p]);
        tables.push_back(INT_MIN);  // an entry that nobody may follow
    }
    for (int entry : tables) device_table_entries.push_back(entry < 0 ? entry : (int)((entry + 1) * c.spread - 1));
    DeviceArray<floatX> device_pool(device_pages * page);
    if (c.spread == 1) {
        pool.resize(device_pages * page, NAN);
        device_pool.copy_from(pool);
    } else {
        for (int64_t p = 0; p < pages; p++) {
            DeviceArray<floatX> one(std::vector<float>(pool.begin() + p * page, pool.begin() + (p + 1) * page));
            CUDA_CHECK(cudaMemcpy(device_pool + ((p + 1) * c.spread - 1) * page, one, page * sizeof(floatX), cudaMemcpyDeviceToDevice));
        }
    }
    DeviceArray<int> device_tables(device_table_entries);
    std::vector<cpu::AttentionState> host_states(num_seqs);
    std::vector<AttentionState> states(num_seqs);
    for (int s = 0; s < num_seqs; s++) {
        int first = pages_before[s] + s;
        host_states[s] = {c.k_len[s] - c.q_len[s], nullptr, pool.data() + c.gap, tables.data() + first, page, c.page_size, per_token};
        states[s] = {c.k_len[s] - c.q_len[s], nullptr, device_pool + c.gap, device_tables + first, page, c.page_size, per_token};
    }
    DeviceArray<AttentionState> device_states(states);

    std::vector<float> o((int64_t)rows * c.heads * c.d_v), lse_of_rows(rows * c.heads), lse(rows * c.heads);
    cpu::SoftmaxAttention reference = core_of<cpu::SoftmaxAttention>(c, q_stride);
    reference.cu_q = cu_q.data();
    reference.cu_k = cu_k.data();
    reference.q = q.data();
    reference.q_at = c.q_at.empty() ? nullptr : c.q_at.data();
    reference.states = host_states.data();
    std::vector<float> cpu_scratch(cpu::softmax_forward_scratch(cu_k.back(), c.kv_heads, c.d_qk) + 16);
    cpu::softmax_forward(reference, o.data(), c.heads * c.d_v, lse_of_rows.data(), {cpu_scratch.data(), (int64_t)cpu_scratch.size()});
    for (int n = 0; n < rows; n++)
        for (int h = 0; h < c.heads; h++) lse[h * rows + n] = lse_of_rows[n * c.heads + h];

    DeviceArray<int> device_cu_q(cu_q), device_cu_k(cu_k), device_q_at(c.q_at);
    DeviceArray<floatX> device_q(q), device_o(o.size());
    DeviceArray<float> device_lse(lse.size());
    StatePages shared_pages = {device_pool + c.gap, device_pages, page, per_token, c.page_size};
    SoftmaxAttention a = device_core(c, q_stride, device_cu_q, device_cu_k, device_q, device_states, shared_pages);
    if (!c.q_at.empty()) a.q_at = device_q_at;
    for (int cut : {0, 1, 2, 7, 132}) {
        int64_t bytes = scratch_size(a, cut);
        DeviceArray<char> scratch(bytes);
        std::string shape = format("%d sequences, up to %d queries, %d keys, NH %d KV %d d %d/%d%s window %d page %d gap %d cut %d", num_seqs, a.max_q, a.max_k,
                                   c.heads, c.kv_heads, c.d_qk, c.d_v, c.latent ? " latent" : "", c.window, c.page_size, c.gap, cut);
        ladder.check(shape, {output("o", device_o, o), output("lse", device_lse, lse)}, [&](int version) {
            return run_version(version, ladder.stream, a, device_o, device_lse, {scratch, bytes}, cut, cut == 7);
        });
    }
}

// rope_append() must leave what rope() and append_rows() leave, bit for bit.
void check_append(int heads, int kv_heads, int hs, int page_size, int gap) {
    const int num_seqs = 3, N = 7, row = 2 * kv_heads * hs, stride = (heads + 2 * kv_heads) * hs + gap;
    const int length[num_seqs] = {0, 9, 30};
    std::vector<TokenPlace> place = {{0, 0}, {1, 0}, {1, 1}, {2, 0}, {2, 1}, {2, 2}, {2, 3}};
    std::vector<int> position, tables;
    for (TokenPlace t : place) position.push_back(length[t.seq] + t.pos + 1000);
    int64_t pages = 3 * 40, page = (int64_t)page_size * row + gap;
    for (int p = 0; p < pages; p++) tables.push_back((int)(p * 7 % pages));
    DeviceArray<floatX> pools[2] = {DeviceArray<floatX>(pages * page), DeviceArray<floatX>(pages * page)}, x(random_numbers((int64_t)N * stride, 50)),
                        same_x(random_numbers((int64_t)N * stride, 50));
    DeviceArray<int> device_tables(tables), device_position(position);
    DeviceArray<TokenPlace> device_place(place);
    for (int way = 0; way < 2; way++) {
        std::vector<AttentionState> states;
        for (int s = 0; s < num_seqs; s++) states.push_back({length[s], nullptr, pools[way], device_tables + 40 * s, page, page_size, row});
        DeviceArray<AttentionState> device_states(states);
        if (way == 0) {
            rope(0, x, stride, x, stride, N, heads + kv_heads, hs, hs, device_position, 1);
            append_rows(0, device_states, device_place, x + (int64_t)heads * hs, stride, row, N);
        } else {
            rope_append(0, device_states, device_place, same_x, stride, N, heads, kv_heads, hs, device_position);
        }
        CUDA_CHECK(cudaDeviceSynchronize());
    }
    auto q_of = [&](const DeviceArray<floatX>& from) {
        std::vector<float> all = from.to_host(), q;
        for (int n = 0; n < N; n++) q.insert(q.end(), all.begin() + (int64_t)n * stride, all.begin() + (int64_t)n * stride + heads * hs);
        return q;
    };
    std::vector<float> a = pools[0].to_host(), b = pools[1].to_host(), qa = q_of(x), qb = q_of(same_x);
    if (memcmp(a.data(), b.data(), a.size() * sizeof(float)) != 0 || memcmp(qa.data(), qb.data(), qa.size() * sizeof(float)) != 0)
        data_error("check rope_append NH %d KV %d hs %d pages of %d gap %d: FAIL", heads, kv_heads, hs, page_size, gap);
}

// Sequences of one query each, pages in an order of their own. layers > 1: as many calls one behind another, each on memory of its own, as in a step of
// generation; the time is that of all.
void time(Ladder& ladder, const char* name, const std::vector<int>& lengths, int heads, int kv_heads, int d_qk, int d_v, bool latent, int page_size = 64,
          int layers = 1) {
    int B = (int)lengths.size(), longest = *std::max_element(lengths.begin(), lengths.end());
    Case c = {heads, kv_heads, d_qk, d_v, latent, 0, page_size, 0, std::vector<int>(B, 1), lengths};
    std::vector<int> first(1, 0);
    for (int n : lengths) first.push_back(first.back() + (int)ceil_div(n, page_size));
    int64_t page = (int64_t)c.page_size * c.per_token(), pages = first.back(), piece = 1 << 20;
    DeviceArray<floatX> pool(layers * pages * page), random(random_numbers(piece, 3)), q(random_numbers((int64_t)B * heads * d_qk, 4)),
        o((int64_t)B * heads * d_v);
    for (int64_t i = 0; i < pool.size; i += piece)
        CUDA_CHECK(cudaMemcpy(pool + i, random, std::min(piece, pool.size - i) * sizeof(floatX), cudaMemcpyDeviceToDevice));
    std::vector<int> where(pages);
    for (int64_t p = 0; p < pages; p++) where[p] = (int)p;
    for (int64_t p = pages - 1; p > 0; p--) std::swap(where[p], where[philox(5, (uint32_t)p, 0, 0, 1).word[0] % (p + 1)]);
    DeviceArray<int> tables(where);
    std::vector<AttentionState> states;
    for (int l = 0; l < layers; l++)
        for (int s = 0; s < B; s++) states.push_back({lengths[s] - 1, nullptr, pool + l * pages * page, tables + first[s], page, c.page_size, c.per_token()});
    DeviceArray<AttentionState> device_states(states);
    DeviceArray<int> cu_q(offsets(c.q_len)), cu_k(offsets(c.k_len));
    SoftmaxAttention a = device_core(c, heads * d_qk, cu_q, cu_k, q, device_states, {pool, pages, page, c.per_token(), c.page_size});
    int64_t bytes = scratch_size(a, 0);
    DeviceArray<char> scratch(bytes);
    double keys = 0;
    for (int n : lengths) keys += (double)layers * n;
    Work work = {2 * keys * heads * (d_qk + d_v), (keys * c.per_token() + (double)layers * B * heads * (d_qk + d_v)) * sizeof(floatX)};
    std::string shape = format("%s: B %d, %d keys, NH %d d %d/%d", name, B, longest, heads, d_qk, d_v);
    if (kv_heads != heads && !latent) shape += format(" KV %d", kv_heads);
    if (layers > 1) shape += format(", %d layers", layers);
    if (page_size != 64) shape += format(", pages of %d", page_size);
    ladder.time(shape, work, [&](int version) {
        if ((version == 1 && keys * heads > 1e7) || (version == 4 && heads > 8 * kv_heads)) return false;
        bool runs = true;
        for (int l = 0; l < layers; l++) {
            a.states = device_states + l * B;
            a.pages.rows = pool + l * pages * page;
            runs = run_version(version, ladder.stream, a, o, nullptr, {scratch, bytes}, 0, layers > 1) && runs;
        }
        return runs;
    });
}

std::vector<int> same(int B, int length) { return std::vector<int>(B, length); }
// B lengths from 128 to 16384, as many between 128 and 256 as between 8192 and 16384, in an order that is none.
std::vector<int> unequal(int B) {
    std::vector<int> lengths;
    for (int s = 0; s < B; s++) lengths.push_back((int)(128 * std::exp2(7.0 * (s * 37 % B) / (B - 1))));
    return lengths;
}

int main(int argc, char** argv) {
    Ladder ladder("decode",
                  {"naive: a block a query and head", "keys split over blocks, 16-byte loads, rows of a kv head together", "tensor cores",
                   "all keys dealt out evenly; a warp a head, its bytes on their way well ahead", "tensor cores, dealt out; up to 64 rows a block"},
                  argc, argv);
    //            NH KV d_qk d_v  latent win page gap   queries          keys
    check(ladder, {4, 4, 16, 16, false, 0, 4, 0, {1, 1, 0, 1}, {1, 6, 3, 34}}, 1);
    check(ladder, {2, 2, 64, 64, false, 0, 64, 0, {1, 1, 1, 1}, {700, 1300, 2, 64}}, 2);
    check(ladder, {6, 2, 24, 8, false, 7, 5, 8, {3, 0, 5, 1}, {40, 9, 5, 100}}, 3);
    check(ladder, {3, 1, 17, 9, false, 0, 3, 1, {1, 2, 1}, {1, 20, 600}}, 4);
    check(ladder, {3, 3, 64, 32, false, 100, 16, 3, {2, 1}, {700, 90}}, 5);  // sizes fit 16 bytes, rows do not stand on them
    check(ladder, {5, 1, 40, 32, true, 0, 7, 0, {2, 1, 0}, {50, 129, 10}}, 6);
    check(ladder, {16, 1, 72, 56, true, 0, 5, 1, {1, 3}, {33, 95}}, 7);
    check(ladder, {16, 1, 576, 512, true, 0, 64, 0, {1, 1}, {100, 333}}, 8);
    check(ladder, {8, 2, 128, 128, false, 0, 16, 0, {20, 1, 17}, {20, 700, 60}}, 9);  // many queries
    check(ladder, {8, 1, 256, 200, false, 33, 16, 0, {2, 1}, {70, 40}}, 10);
    check(ladder, {4, 2, 32, 32, false, 0, 8, 0, {3, 1, 6}, {0, 0, 2}}, 11);                   // rows that see nothing
    check(ladder, {8, 1, 32, 32, false, 10, 8, 0, {1, 2, 1}, {30, 70, 5}, {29, 71, 40}}, 12);  // queries behind the keys, beyond the window too
    check(ladder, {12, 12, 64, 64, false, 0, 64, 0, {1, 1, 1, 1}, {1000, 1024, 700, 1}}, 13);
    check(ladder, {12, 1, 288, 256, true, 0, 64, 0, {1, 1, 1, 1}, {1000, 1024, 700, 1}}, 14);
    check(ladder, {2, 1, 300, 280, false, 0, 16, 0, {1, 2}, {77, 200}}, 15);  // keys longer than 512 bytes
    // Lengths about those of tiles and pages; queries 1 to 17; pages of 1, 16, 64.
    for (int page : {1, 16, 64}) {
        check(ladder, {4, 2, 64, 64, false, 0, page, 0, {1, 1, 1, 1, 1, 1}, {0, 1, 63, 64, 65, 1000}}, 20 + page);
        check(ladder, {6, 1, 96, 64, true, 0, page, 0, {1, 1, 1, 1, 1, 1}, {0, 1, 63, 64, 65, 1000}}, 120 + page);
        check(ladder, {3, 3, 80, 48, false, 50, page, 0, {1, 2, 3, 4, 5, 6, 7, 8, 9}, {0, 1, 63, 64, 65, 1000, 66, 8, 129}}, 220 + page);
        check(ladder, {4, 1, 64, 64, true, 0, page, 0, {10, 11, 12, 13, 14, 15, 16, 17}, {0, 1, 63, 64, 65, 1000, 16, 17}}, 320 + page);
    }
    check(ladder, {40, 1, 96, 64, true, 0, 16, 0, {1, 2, 1}, {300, 20, 64}}, 30);  // 40 and 80 rows
    check(ladder, {128, 1, 576, 512, true, 0, 64, 0, {1, 1}, {100, 40}}, 31);
    check(ladder, {12, 12, 64, 64, false, 0, 64, 0, {1}, {3000}}, 32);  // one sequence, many pieces
    check(ladder, {13, 13, 64, 64, false, 0, 64, 0, {1, 1}, {500, 100}}, 33);
    check(ladder, {10, 5, 128, 128, false, 0, 16, 0, {1, 1, 1}, {500, 100, 1000}}, 34);  // five heads, two rows each
    for (int heads : {1, 3, 12, 13, 16, 128}) {
        std::vector<int> queries = {1, 1, 2, 1}, keys = {1, 130, 65, 0};
        check(ladder, {heads, heads, 64, 64, false, 0, 64, 0, queries, keys}, 400 + heads);
        check(ladder, {heads, heads, 96, 64, false, 0, 16, 0, queries, keys}, 410 + heads);
        check(ladder, {heads, 1, 128, 128, false, 0, 16, 0, queries, keys}, 420 + heads);
        for (int d_c : {256, 512})
            for (int d_rope : {0, 32, 64}) check(ladder, {heads, 1, d_c + d_rope, d_c, true, 0, 64, 0, queries, keys}, 430 + heads + d_c + d_rope);
    }
    for (bool latent : {false, true}) {
        Case hot = {6, latent ? 1 : 3, 64, 64, latent, 0, 16, 0, {1, 2, 1}, {1, 200, 500}}, far = hot;
        hot.q_scale = 100;
        check(ladder, hot, 35);
        far.far_key = 150;
        check(ladder, far, 36);
        far.far_key = 0;  // of the first sequence the only one
        check(ladder, far, 37);
    }
    {
        Case large = {4, 2, 64, 64, false, 0, 16, 0, {1, 1}, {500, 40}};
        int64_t numbers_of_a_page = (int64_t)large.page_size * large.per_token(), pages = 35;
        large.spread = ceil_div((int64_t)2300000000, numbers_of_a_page * pages);
        size_t free, all;
        CUDA_CHECK(cudaMemGetInfo(&free, &all));
        if ((int64_t)free > 2 * large.spread * pages * numbers_of_a_page * (int64_t)sizeof(floatX)) check(ladder, large, 38);  // offsets beyond 2³¹
    }
    {
        std::vector<int> queries, keys;
        for (int s = 0; s < 300; s++) {
            queries.push_back(s % 7 == 3 ? 0 : 1);
            keys.push_back(s * 13 % 70);
        }
        check(ladder, {4, 4, 32, 32, false, 0, 16, 0, queries, keys}, 39);
        check(ladder, {8, 1, 48, 32, true, 0, 16, 0, queries, keys}, 40);
    }
    check_append(12, 12, 64, 16, 0);
    check_append(25, 5, 64, 1, 0);
    check_append(4, 2, 128, 7, 8);
    check_append(4, 2, 64, 7, 3);  // not on 16 bytes
    check_append(3, 1, 6, 4, 0);
    time(ladder, "causal", same(64, 4096), 12, 12, 64, 64, false);
    time(ladder, "causal", same(1, 1024), 12, 12, 64, 64, false);
    time(ladder, "causal", same(1, 32768), 12, 12, 64, 64, false);
    time(ladder, "causal", same(1, 32768), 12, 12, 64, 64, false, 64, 12);
    time(ladder, "causal", same(256, 1024), 12, 12, 64, 64, false);
    time(ladder, "causal", same(16, 65536), 12, 12, 64, 64, false);
    time(ladder, "causal, unequal", unequal(64), 12, 12, 64, 64, false);
    time(ladder, "causal", same(64, 4096), 12, 12, 64, 64, false, 1);
    time(ladder, "causal", same(64, 4096), 12, 12, 64, 64, false, 16);
    time(ladder, "grouped queries", same(64, 4096), 32, 8, 128, 128, false);
    time(ladder, "MLA absorbed", same(64, 4096), 12, 1, 288, 256, true);
    time(ladder, "MLA absorbed", same(64, 4096), 16, 1, 576, 512, true);
    time(ladder, "MLA absorbed", same(64, 4096), 128, 1, 576, 512, true);
    time(ladder, "MLA absorbed", same(1, 32768), 12, 1, 288, 256, true);
    return ladder.finish();
}
