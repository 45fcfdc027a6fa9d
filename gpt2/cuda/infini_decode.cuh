// Infini-attention for one new token of each text: all that stands between the layer's two projections in one launch (infini.cuh has the equations).
//
//     D = softmax(q·kᵀ/√hs)·v over the pending tokens and the new one      R = Φ(q)M / (Φ(q)·z + ε)      A = g·R + (1−g)·D
//     k, v are appended to the pending ones; if these are a segment now:  M' = M + Φ(k)ᵀU, z' = z + Σ_t Φ(k_t), linear: U = v, delta: U = v − V̂
//
// Bytes a kv head, float32: hs·(hs+1) numbers of memory and 2·hs of each pending token. GPT-2 124M with segments of 256: 200 KB and up to 1.57 MB a text and
// layer; 256 texts 51 MB and 0 to 402, 17 to 150 µs at 3.0 TB/s. The end of a segment reads k, v once more and writes the memory: as much again, one step in S.
//
// A block takes a kv head of a text, or, where texts are too few to fill the GPU, `parts` blocks do, a cluster: each has its part of the keys and of M's rows,
// and leaves m, l, o and Φ(q)M, Φ(q)·z in the shared memory of the first, which adds them up in their order. 4 columns of a key (a value, a row of M) to a
// lane, 16 or 32 lanes to a key; these go on with their keys as if they were alone and meet at the end. Every load is on its way before the first is used, and
// before the kernel in front, which computes q, k, v, has ended: they need only the state.
//
// Keys stand in the state as they were before the rotation. What turns is q: k_j turned by j and q by i give what k_j gives with q turned by i − j, and from
// one key of a lane to its next that is always the same angle.
//
// Which tokens are pending: position % S of them, since texts are extended from their beginning; something has been written from position S on. The two
// numbers in the state that say so for other passes are written here, but not read: the block that writes them need not wait for the others.
//
//     infini_step_kernel3   even head sizes up to 128. Earlier versions and times: dev/cuda/infini_decode.cu
#pragma once

#include "decode_schedule.cuh"
#include "infini_any_size.cuh"
#include "overlap.cuh"
#include "rope.cuh"
#include "softmax.cuh"
#include "tensor_cores.cuh"

namespace gpu {

namespace infini_decode {

using infini_rows::feature;

constexpr int WARPS = 4, THREADS = 32 * WARPS, MAX_PARTS = 8, MAX_HEAD_SIZE = 128;
constexpr int TOKENS = 32;  // of a tile, when a segment is written

// Beside InfiniPass, of which sizes, options, cu_seqlens and qkv are used.
struct Step {
    const AttentionState* states;  // (num_seqs)
    const int* position;           // (N), in the text
    const float* beta;             // (NH)
    floatX* A;                     // (N,C)
    int parts, log_parts;          // blocks of a cluster: a power of two
    decode::Divisor by_kv_heads, by_segment;
    bool rotate;
    double turns[MAX_HEAD_SIZE / 2];  // of each pair of q, from a token to the next (rope.cuh)
    float2 back[MAX_HEAD_SIZE / 2];   // cos and sin, from a key of a lane to its next
};

HOST_DEVICE inline int lanes(int hs) { return hs <= 64 ? 16 : 32; }  // of a key

// What a warp, or a block, knows of one query, in shared memory: m, l, Φ(q)·z; then o (hs), Φ(q)M (hs).
HOST_DEVICE inline int record_size(int hs) { return 4 + 2 * hs; }
// Shared memory, in numbers: the records of the warps; in the first block of a cluster those of all blocks; Φ(q) for each warp; the rows of M, each number
// where the thread that reads it has put it. All that is over when a segment is written.
struct Shared {
    int merged, features, rows, size;
    HOST_DEVICE Shared(int hs, int R, int parts) {
        const int groups = THREADS / lanes(hs), rows_each = (hs + parts - 1) / parts, tiles = 2 * TOKENS * hs + MAX_HEAD_SIZE;
        merged = WARPS * R * record_size(hs);
        features = merged + (parts > 1 ? parts * R * record_size(hs) : 0);
        rows = features + WARPS * R * hs;
        size = rows + (rows_each + groups - 1) / groups * 4 * THREADS;
        if (size < tiles) size = tiles;
    }
};

// Two neighbours of what the kernel before has written.
__device__ __forceinline__ float2 load_two(const float* p) { return __ldcg((const float2*)p); }
__device__ __forceinline__ float2 load_two(const __nv_bfloat16* p) { return unpack_bf16(__ldcg((const unsigned*)p)); }

__device__ __forceinline__ float2 rotation(double turns) {
    float2 r;
    sincospif((float)(2 * (turns - rint(turns))), &r.y, &r.x);
    return r;
}
__device__ __forceinline__ float2 turned(float2 x, float2 by) { return {x.x * by.x - x.y * by.y, x.x * by.y + x.y * by.x}; }
__device__ __forceinline__ void add(float2& sum, float factor, float2 x) {
    sum.x += factor * x.x;
    sum.y += factor * x.y;
}
__device__ __forceinline__ float rescale(float m, float top) { return m == -INFINITY ? 0 : exp2_fast(m - top); }

// *p in the first block of the cluster, p being this block's.
__device__ __forceinline__ void store_in_first(float* p, float x) {
    HOPPER_ONLY(asm volatile("{\n"
                             ".reg .b32 remote;\n"
                             "mapa.shared::cluster.u32 remote, %0, 0;\n"
                             "st.shared::cluster.f32 [remote], %1;\n"
                             "}" ::"r"(shared_address(p)),
                             "f"(x)
                             : "memory");)
    (void)p, (void)x;
}

// Where a block stands, and what its thread has of every row: the columns of two pairs. LANES: of a key; hs <= 4·LANES.
template <int LANES>
struct Place {
    static constexpr int GROUPS = THREADS / LANES;  // groups of LANES lanes
    int hs, segment, parts, log_parts;
    int part, s, kv, n;  // this block's part of kv head `kv` of text s; the text's new token
    bool active;         // there is one
    int position, pending;
    bool written, full;    // something is in the memory; the new token completes a segment
    int group, pair;       // the lane's columns are pairs number `pair` and pair + LANES
    float *state, *z, *M;  // the text's, the kv head's
    float* keys;           // key j at keys + j·row, its value to_value behind it
    int row, to_value;

    __device__ Place(const InfiniPass& p, const Step& step) : hs(p.hs), segment(p.segment), parts(step.parts), log_parts(step.log_parts) {
        const int item = blockIdx.x >> step.log_parts;
        part = blockIdx.x & (parts - 1);
        s = step.by_kv_heads(item);
        kv = item - s * p.kv_heads;
        n = p.cu_seqlens[s];
        active = p.cu_seqlens[s + 1] > n;
        if (!active) return;
        state = step.states[s].fixed;
        position = step.position[n];
        pending = position - step.by_segment(position) * segment;
        written = position >= segment;
        full = pending == segment - 1;
        group = threadIdx.x / LANES;
        pair = threadIdx.x % LANES;
        z = state + INFINI_MEMORY + kv * p.memory_size();
        M = z + hs;
        keys = state + INFINI_MEMORY + p.kv_heads * p.memory_size() + kv * hs;
        row = (int)p.row_size();
        to_value = (int)p.kv_channels();
    }
    __device__ int row_begin() const { return min(part * rows_each(), hs); }  // this part's rows of M
    __device__ int row_end() const { return min((part + 1) * rows_each(), hs); }
    __device__ int rows_each() const { return (hs + parts - 1) >> log_parts; }
    __device__ int column(int x) const { return 2 * (pair + x * LANES); }
    __device__ bool has(int x) const { return column(x) < hs; }
    __device__ float2 two(const float* at, int x, bool there) const { return there && has(x) ? __ldcg((const float2*)(at + column(x))) : float2{0, 0}; }
    __device__ float* key(int j) const { return keys + (int64_t)j * row; }
    __device__ void meet() const { parts > 1 ? cluster_barrier() : __syncthreads(); }  // the blocks of a kv head
};

struct Sum {
    float m, l, den, o, read;
};
// Of `count` records, R apart, at column c.
template <int R>
__device__ __forceinline__ Sum merge(const float* records, int count, int hs, int c) {
    const int step = R * record_size(hs);
    Sum sum = {-INFINITY, 0, 0, 0, 0};
    for (int i = 0; i < count; i++) sum.m = fmaxf(sum.m, records[i * step]);
#pragma unroll 2
    for (int i = 0; i < count; i++) {
        const float* x = records + i * step;
        float factor = rescale(x[0], sum.m);
        sum.l += factor * x[1];
        sum.o += factor * x[4 + c];
        sum.den += x[2];
        sum.read += x[4 + hs + c];
    }
    return sum;
}

// The segment, all of whose keys and values are there, becomes part of the memory. All threads of the cluster; M has been read.
template <int LANES>
__device__ __noinline__ void write_segment(const InfiniPass& p, const Step& step, float* shared) {
    const Place<LANES> b(p, step);
    constexpr int GROUPS = Place<LANES>::GROUPS;
    const int hs = b.hs, S = b.segment, tid = threadIdx.x;
    float *const phi_tile = shared, *const values = shared + TOKENS * hs;  // (TOKENS, hs)
    auto bring = [&](int t0, int last, bool with_values) {                 // tokens t0 ... last−1, as many as a tile has
        __syncthreads();
        auto each = [&](auto f) {
#pragma unroll 2
            for (int t = b.group; t < TOKENS; t += GROUPS)
#pragma unroll
                for (int x = 0; x < 2; x++)
                    if (b.has(x)) f(t * hs + b.column(x), t0 + t, b.column(x));
        };
        each([&](int at, int token, int c) {
            const float* from = b.key(min(token, S - 1)) + c;
            copy_async8(shared_address(phi_tile + at), from, token < last);
            if (with_values) copy_async8(shared_address(values + at), from + b.to_value, token < last);
        });
        copy_async_wait_all();
        each([&](int at, int, int) {
            float2& key = *(float2*)(phi_tile + at);
            key = {feature(key.x), feature(key.y)};
        });
        __syncthreads();
    };
    if (p.delta && b.written) {
        // U = v − Φ(k)M/(Φ(k)·z + ε), which takes the place of the value: nobody will ask for that. Each block has some tokens.
        constexpr int K = TOKENS / GROUPS;
        const int each = (S + b.parts - 1) >> b.log_parts, last = min((b.part + 1) * each, S);
#pragma unroll 1
        for (int t0 = b.part * each; t0 < last; t0 += TOKENS) {
            bring(t0, last, false);
            float2 read[K][2] = {};
            float den[K] = {};
#pragma unroll 2
            for (int i = 0; i < hs; i++) {
                float z_i = b.z[i];
                float2 m[2];
#pragma unroll
                for (int x = 0; x < 2; x++) m[x] = b.has(x) ? *(const float2*)(b.M + i * hs + b.column(x)) : float2{0, 0};
#pragma unroll
                for (int a = 0; a < K; a++) {
                    float phi = phi_tile[(b.group + a * GROUPS) * hs + i];
                    den[a] += phi * z_i;
                    add(read[a][0], phi, m[0]);
                    add(read[a][1], phi, m[1]);
                }
            }
#pragma unroll
            for (int a = 0; a < K; a++) {
                const int t = t0 + b.group + a * GROUPS;
                const float inverse = 1 / (den[a] + INFINI_EPSILON);
                float* at = b.key(min(t, S - 1)) + b.to_value;
#pragma unroll
                for (int x = 0; x < 2; x++) {
                    if (t >= last || !b.has(x)) continue;
                    float2 u = b.two(at, x, true);
                    add(u, -inverse, read[a][x]);
                    *(float2*)(at + b.column(x)) = u;
                }
            }
        }
        b.meet();  // U is there, and M has been read
    }
    // Each block has its rows of M', over all tokens. Numbers of rows and columns that are not there come from other places of the tiles, and go nowhere.
    constexpr int K = 8;
#pragma unroll 1
    for (int i0 = b.row_begin(); i0 < b.row_end(); i0 += K * GROUPS) {
        const int rows_here = min(K * GROUPS, b.row_end() - i0);
        float2 sum[K][2] = {};
        float z_sum = 0;  // of row i0 + tid
#pragma unroll 1
        for (int t0 = 0; t0 < S; t0 += TOKENS) {
            bring(t0, S, true);
            const int tokens = min(TOKENS, S - t0);
            const float *phi = phi_tile + i0 + b.group, *u_row = values + 2 * b.pair;
#pragma unroll 2
            for (int t = 0; t < tokens; t++, phi += hs, u_row += hs) {
                float2 u[2] = {*(const float2*)u_row, *(const float2*)(u_row + 2 * LANES)};
#pragma unroll
                for (int a = 0; a < K; a++) {
                    add(sum[a][0], phi[a * GROUPS], u[0]);
                    add(sum[a][1], phi[a * GROUPS], u[1]);
                }
            }
            if (tid < rows_here)
#pragma unroll 4
                for (int t = 0; t < tokens; t++) z_sum += phi_tile[t * hs + i0 + tid];
        }
        if (tid < rows_here) b.z[i0 + tid] = (b.written ? b.z[i0 + tid] : p.z_start) + z_sum;
#pragma unroll
        for (int a = 0; a < K; a++) {
            int i = i0 + b.group + a * GROUPS;
            if (i >= b.row_end()) continue;
#pragma unroll
            for (int x = 0; x < 2; x++) {
                if (!b.has(x)) continue;
                add(sum[a][x], 1, b.two(b.M + i * hs, x, b.written));
                *(float2*)(b.M + i * hs + b.column(x)) = sum[a][x];
            }
        }
    }
}

// R: query heads of a kv head that are computed at a time; 1: it has no more.
template <int LANES, int R>
__global__ void __launch_bounds__(THREADS, LANES == 16 && R == 1 && sizeof(floatX) == 2 ? 5 : 4)
    infini_step_kernel3(const __grid_constant__ InfiniPass p, const __grid_constant__ Step step) {
    constexpr int GROUPS = THREADS / LANES, U = R == 1 ? 4 : 2;  // groups of LANES lanes; keys of a group that are on their way together
    constexpr int EXACT = 16;                                    // so often q is turned step by step before it is turned anew
    extern __shared__ __align__(16) float infini_shared[];
    __shared__ float gates[R];
    let_next_kernel_start();
    const Place<LANES> b(p, step);
    if (!b.active) return;
    const int hs = b.hs, parts = b.parts, part = b.part, heads = R == 1 ? 1 : p.heads_per_kv(), tid = threadIdx.x, warp = tid / 32, lane = tid % 32;
    const int group = b.group, pending = b.pending, to_value = b.to_value;
    const bool written = b.written, rotate = step.rotate;
    const floatX* const token = p.qkv + b.n * p.qkv_stride();
    const Shared shared(hs, R, parts);
    float *const merged = infini_shared + shared.merged, *const features = infini_shared + shared.features + warp * R * hs;
    float2* const rows = (float2*)(infini_shared + shared.rows) + tid;
    auto column = [&](int x) { return b.column(x); };
    auto has = [&](int x) { return b.has(x); };

    // This part's pending tokens.
    const int keys_each = (pending + parts - 1) >> b.log_parts, begin = min(part * keys_each, pending), end = min(begin + keys_each, pending);
    const int side = lane / LANES, first = begin + group - side;  // the group's first key is side keys behind its warp's
    float2 k[U][2], v[U][2];
    auto load_keys = [&](int from, int offset, float2(&to)[U][2]) {
#pragma unroll
        for (int u = 0; u < U; u++) {
            const int j = from + side + u * GROUPS;
            const float* at = b.key(j < end ? j : 0) + offset + 2 * b.pair;
#pragma unroll
            for (int x = 0; x < 2; x++) to[u][x] = j < end && has(x) ? __ldcg((const float2*)(at + 2 * x * LANES)) : float2{0, 0};
        }
    };
    // M's rows, of a group every GROUPS-th, go to where the lane will read them; z is wanted once.
    if (written)
        for (int i = b.row_begin() + group, at = 0; i < b.row_end(); i += GROUPS, at += 2 * THREADS)
#pragma unroll
            for (int x = 0; x < 2; x++)
                if (has(x)) copy_async8(shared_address(rows + at + x * THREADS), b.M + i * hs + column(x), true);
    float2 z_own[2];
#pragma unroll
    for (int x = 0; x < 2; x++) z_own[x] = b.two(b.z, x, written && part == 0 && group == 0);
    load_keys(first, 0, k);
    load_keys(first, to_value, v);
    auto angle = [&](int distance, int x) { return has(x) ? rotation(distance * step.turns[b.pair + x * LANES]) : float2{1, 0}; };
    float2 turn[2] = {}, first_turn[2] = {};
    if (rotate && first < end) {
#pragma unroll
        for (int x = 0; x < 2; x++) {
            turn[x] = has(x) ? step.back[b.pair + x * LANES] : float2{1, 0};
            first_turn[x] = angle(pending - first - side, x);
        }
    }
    if (parts > 1) cluster_barrier();  // the first block has begun: its shared memory can be written to
    wait_for_kernel_before();
    if (b.kv == 0 && part == 0 && tid == 0) {
        b.state[INFINI_PENDING] = (float)(b.full ? 0 : pending + 1);
        b.state[INFINI_WRITTEN] = written || b.full ? 1 : 0;
    }

#pragma unroll 1
    for (int r0 = 0; r0 < heads; r0 += R) {
        if (r0 > 0) {
            b.meet();  // the records have been read
            load_keys(first, 0, k);
            load_keys(first, to_value, v);
        }
        const floatX* q_at[R];
        float2 q[R][2], own_k[2] = {}, own_v[2] = {};
        const bool owner = part == parts - 1 && warp == 0;  // has the new token's own key
#pragma unroll
        for (int r = 0; r < R; r++) {
            q_at[r] = token + (b.kv * heads + min(r0 + r, heads - 1)) * hs;
#pragma unroll
            for (int x = 0; x < 2; x++) q[r][x] = has(x) ? load_two(q_at[r] + column(x)) : float2{0, 0};
        }
        if (owner) {
#pragma unroll
            for (int x = 0; x < 2; x++) {
                if (!has(x)) continue;
                const floatX* at = token + p.channels() + b.kv * hs + column(x);
                own_k[x] = load_two(at);
                own_v[x] = load_two(at + to_value);
            }
        }
        if (tid < R) gates[tid] = written || p.gated_first ? infini_gate(step.beta[b.kv * heads + min(r0 + tid, heads - 1)]) : 0;

        // Φ(q)M and Φ(q)·z
        float* const record = infini_shared + warp * R * record_size(hs);
        copy_async_wait_all();
#pragma unroll
        for (int r = 0; r < R; r++) {
            float2 phi[2], read[2] = {};
            float den = 0;
#pragma unroll
            for (int x = 0; x < 2; x++) {
                phi[x] = {feature(q[r][x].x), feature(q[r][x].y)};
                den += phi[x].x * z_own[x].x + phi[x].y * z_own[x].y;
                if (lane < LANES && has(x)) *(float2*)(features + r * hs + column(x)) = phi[x];
            }
            __syncwarp();
            if (written)
#pragma unroll 4
                for (int i = b.row_begin() + group, at = 0; i < b.row_end(); i += GROUPS, at += 2 * THREADS) {
                    float weight = features[r * hs + i];
                    add(read[0], weight, rows[at]);
                    add(read[1], weight, rows[at + THREADS]);
                }
#pragma unroll
            for (int offset = LANES; offset < 32; offset *= 2)
#pragma unroll
                for (int x = 0; x < 2; x++) {
                    read[x].x += __shfl_xor_sync(0xffffffff, read[x].x, offset);
                    read[x].y += __shfl_xor_sync(0xffffffff, read[x].y, offset);
                }
            if (part == 0 && warp == 0)
#pragma unroll
                for (int offset = 16; offset > 0; offset /= 2) den += __shfl_xor_sync(0xffffffff, den, offset);
            float* to = record + r * record_size(hs);
            if (lane == 0) to[2] = den;
            if (lane < LANES)
#pragma unroll
                for (int x = 0; x < 2; x++)
                    if (has(x)) *(float2*)(to + 4 + hs + column(x)) = read[x];
        }

        // Local attention. The new token's own key is as far from q as none: neither has to be turned.
        float m[R], l[R] = {};
        float2 o[R][2] = {};
        const float scale = LOG2E * rsqrtf((float)hs);
#pragma unroll
        for (int r = 0; r < R; r++) {
            m[r] = -INFINITY;
#pragma unroll
            for (int x = 0; x < 2; x++) q[r][x] = {scale * q[r][x].x, scale * q[r][x].y};
        }
        if (owner) {
#pragma unroll
            for (int r = 0; r < R; r++) {
                float sum = q[r][0].x * own_k[0].x + q[r][0].y * own_k[0].y + q[r][1].x * own_k[1].x + q[r][1].y * own_k[1].y;
#pragma unroll
                for (int offset = LANES / 2; offset > 0; offset /= 2) sum += __shfl_xor_sync(0xffffffff, sum, offset);
                if (lane >= LANES) continue;
                m[r] = sum;
                l[r] = 1;
                o[r][0] = own_v[0];
                o[r][1] = own_v[1];
            }
            if (r0 == 0 && lane < LANES) {
#pragma unroll
                for (int x = 0; x < 2; x++) {
                    if (!has(x)) continue;
                    *(float2*)(b.key(pending) + column(x)) = own_k[x];
                    *(float2*)(b.key(pending) + to_value + column(x)) = own_v[x];
                }
            }
        }
        if (rotate)
#pragma unroll
            for (int r = 0; r < R; r++)
#pragma unroll
                for (int x = 0; x < 2; x++) q[r][x] = turned(q[r][x], first_turn[x]);
#pragma unroll 1
        for (int j0 = first; j0 < end; j0 += U * GROUPS) {
            // m' = max(m, max s)   weight = 2^(s − m')   l' = l·2^(m − m') + Σ weight   o' = o·2^(m − m') + Σ weight·v
            float weight[R][U];
#pragma unroll
            for (int u = 0; u < U; u++) {
#pragma unroll
                for (int r = 0; r < R; r++) {
                    weight[r][u] = q[r][0].x * k[u][0].x + q[r][0].y * k[u][0].y + q[r][1].x * k[u][1].x + q[r][1].y * k[u][1].y;
                    if (rotate)
#pragma unroll
                        for (int x = 0; x < 2; x++) q[r][x] = turned(q[r][x], turn[x]);
                }
            }
            load_keys(j0 + U * GROUPS, 0, k);
            if (rotate && (j0 - first) / (U * GROUPS) % EXACT == EXACT - 1) {
                int distance = pending - (j0 + U * GROUPS) - side;
#pragma unroll
                for (int x = 0; x < 2; x++) {
                    float2 by = angle(distance, x);
#pragma unroll
                    for (int r = 0; r < R; r++) {
                        float2 raw = has(x) ? load_two(q_at[r] + column(x)) : float2{0, 0};
                        q[r][x] = turned({scale * raw.x, scale * raw.y}, by);
                    }
                }
            }
#pragma unroll
            for (int offset = LANES / 2; offset > 0; offset /= 2)
#pragma unroll
                for (int u = 0; u < U; u++)
#pragma unroll
                    for (int r = 0; r < R; r++) weight[r][u] += __shfl_xor_sync(0xffffffff, weight[r][u], offset);
#pragma unroll
            for (int r = 0; r < R; r++) {
                float top = m[r];
#pragma unroll
                for (int u = 0; u < U; u++) {
                    weight[r][u] = j0 + side + u * GROUPS < end ? weight[r][u] : -INFINITY;
                    top = fmaxf(top, weight[r][u]);
                }
                float factor = rescale(m[r], top);
                m[r] = top;
                l[r] *= factor;
#pragma unroll
                for (int x = 0; x < 2; x++) o[r][x] = {factor * o[r][x].x, factor * o[r][x].y};
#pragma unroll
                for (int u = 0; u < U; u++) {
                    float w = rescale(weight[r][u], top);
                    l[r] += w;
                    add(o[r][0], w, v[u][0]);
                    add(o[r][1], w, v[u][1]);
                }
            }
            load_keys(j0 + U * GROUPS, to_value, v);
        }

        // The warp's groups, then its block's warps, then the blocks.
#pragma unroll
        for (int r = 0; r < R; r++) {
#pragma unroll
            for (int offset = LANES; offset < 32; offset *= 2) {
                float other = __shfl_xor_sync(0xffffffff, m[r], offset), top = fmaxf(m[r], other), factor = rescale(m[r], top);
                m[r] = top;
                l[r] *= factor;
                l[r] += __shfl_xor_sync(0xffffffff, l[r], offset);
#pragma unroll
                for (int x = 0; x < 2; x++) {
                    o[r][x] = {factor * o[r][x].x, factor * o[r][x].y};
                    o[r][x].x += __shfl_xor_sync(0xffffffff, o[r][x].x, offset);
                    o[r][x].y += __shfl_xor_sync(0xffffffff, o[r][x].y, offset);
                }
            }
            float* to = record + r * record_size(hs);
            if (lane == 0) {
                to[0] = m[r];
                to[1] = l[r];
            }
            if (lane < LANES)
#pragma unroll
                for (int x = 0; x < 2; x++)
                    if (has(x)) *(float2*)(to + 4 + column(x)) = o[r][x];
        }
        __syncthreads();
        auto finish = [&](const Sum& sum, int r, int c) {
            if (r0 + r >= heads) return;
            float g = gates[r], A = (1 - g) * sum.o / sum.l + (written ? g * sum.read / (sum.den + INFINI_EPSILON) : 0);
            step.A[(int64_t)b.n * p.channels() + (b.kv * heads + r0 + r) * hs + c] = from_float<floatX>(A);
        };
        for (int e = tid; e < R * hs; e += THREADS) {
            int r = R == 1 ? 0 : e / hs, c = e - r * hs;
            Sum sum = merge<R>(infini_shared + r * record_size(hs), WARPS, hs, c);
            if (parts == 1) {
                finish(sum, r, c);
                continue;
            }
            float* to = merged + (part * R + r) * record_size(hs);
            store_in_first(to + 4 + c, sum.o);
            store_in_first(to + 4 + hs + c, sum.read);
            if (c > 0) continue;
            store_in_first(to, sum.m);
            store_in_first(to + 1, sum.l);
            store_in_first(to + 2, sum.den);
        }
        if (parts == 1) continue;
        cluster_barrier();
        for (int e = tid; part == 0 && e < R * hs; e += THREADS) {
            int r = R == 1 ? 0 : e / hs, c = e - r * hs;
            finish(merge<R>(merged + r * record_size(hs), parts, hs, c), r, c);
        }
    }

    if (!b.full) return;
    b.meet();  // the last token's k and v are there, and M has been read
    write_segment<LANES>(p, step, infini_shared);
}

}  // namespace infini_decode

// How many blocks share a kv head: as long as all run at the same time, four on a multiprocessor, and each has some keys of a segment.
inline int infini_step_parts(const InfiniPass& p) {
    if (!hopper_code()) return 1;
    int parts = 1;
    while (parts < infini_decode::MAX_PARTS && 2 * (int64_t)parts * p.num_seqs * p.kv_heads <= 4 * device_properties().multiProcessorCount &&
           32 * parts <= p.segment)
        parts *= 2;
    return parts;
}

inline bool infini_takes_step(const InfiniPass& p) { return p.max_len <= 1 && p.hs % 2 == 0 && p.hs <= infini_decode::MAX_HEAD_SIZE; }

inline infini_decode::Step infini_step_arguments(const InfiniPass& p, const int* position, const AttentionState* states, const float* beta, floatX* A,
                                                 bool rotate, int parts) {
    infini_decode::Step step = {states, position, beta, A, parts, 0, decode::divisor(p.kv_heads), decode::divisor(p.segment), rotate, {}, {}};
    while (1 << step.log_parts < parts) step.log_parts++;
    const int keys = infini_decode::THREADS / infini_decode::lanes(p.hs);  // that a block's lanes take side by side
    for (int i = 0; i < p.hs / 2; i++) {
        double angle = std::exp2(i * rope_exponent(p.hs));
        step.turns[i] = angle / (2 * M_PI);
        step.back[i] = {(float)std::cos(keys * angle), (float)-std::sin(keys * angle)};
    }
    return step;
}

// A (N,C) of one token of each text, or none; their states are brought up to date. p: infini_shape()'s. rotate: by positions in the segment. `overlap`: the
// launch before this one on the stream is a kernel, and neither it nor any before it, back to one that did not overlap, has written states or positions.
inline void infini_step(cudaStream_t stream, InfiniPass p, const int* cu_seqlens, const int* position, const AttentionState* states, const floatX* qkv,
                        const float* beta, floatX* A, bool rotate, bool overlap, int parts = 0) {
    using namespace infini_decode;
    assert(infini_takes_step(p));
    if (p.num_seqs == 0 || p.num_tokens == 0) return;
    p.cu_seqlens = cu_seqlens;
    p.qkv = qkv;
    Step step = infini_step_arguments(p, position, states, beta, A, rotate, parts > 0 ? parts : infini_step_parts(p));
    int rows = p.one_gate() ? 1 : 2;
    auto kernel = lanes(p.hs) == 16 ? (rows == 1 ? infini_step_kernel3<16, 1> : infini_step_kernel3<16, 2>)
                                    : (rows == 1 ? infini_step_kernel3<32, 1> : infini_step_kernel3<32, 2>);
    launch_overlapping(stream, overlap, step.parts, kernel, (int64_t)step.parts * p.num_seqs * p.kv_heads, THREADS,
                       Shared(p.hs, rows, step.parts).size * sizeof(float), p, step);
}

}  // namespace gpu
