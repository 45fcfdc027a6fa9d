// A decode step of one sequence in one launch: linear layers and causal attention of a single token, layer behind layer.
//
// One token leaves no layer enough work to fill the time that starting a kernel takes: of GPT-2 124M a linear layer is 1.2 µs of reading, and a launch that
// overlaps with the one before costs 2.9. So a Chain takes down what is to be computed, a list of *stages*, and launches one kernel for all, a block a
// multiprocessor, which stays there and goes through the list:
//
//     linear     out (OC) = [residual +] [GELU] (u·Wᵀ + b)      u = x (C), or its LayerNorm, or the merged parts of an attention stage (matvec.cuh)
//     attention  a head of the token and a part of its keys to a block: o, m = max s, l = Σ exp(s − m) of each part; the next stage merges them as it reads
//
//   - Weights come ahead of their stage. Which ones a block will need, and in what order, is known beforehand: a warp of its own brings them by bulk copies
//     into a queue in shared memory, 8 to 12 slots of 16 KB, that knows no borders between stages. (Copies by the warps that compute, cp.async, hold these up
//     for microseconds as soon as memory is busy: they could neither see x nor let results go.) Of long stages it asks for two slots at a time, which is enough
//     for memory's rate: all else that is read waits behind what has been asked for.
//   - There are no barriers between blocks. Results go from stage to stage through a memory (the *exchange*) which is filled with EMPTY before, a pattern that
//     no result has: two bf16 (one float) whose bits are all ones, a NaN, where arithmetic makes another one. Who needs a number reads it until it is there. A
//     barrier would cost three ways to the second-level cache and back (the writes' acknowledgement, the arrival, the read behind it), this costs one. All
//     blocks ask for the same few lines: results are written to some copies, of which a block reads one.
//   - What does not come through the queue (keys and values, biases, gains) is asked for some stages beforehand, by another warp, into the second-level cache:
//     behind the weights in memory's queue it would take 4 µs.
//
// A number of a linear layer has matvec_kernel3's bits: the same products in the same order. What stands between two results is latency, some 250 instructions
// one behind another; what can be is done while x is not there.
//
// The exchange has two halves: a launch uses one and empties what the launch before has used of the other. All blocks must run at the same time, or some wait
// for ever: the launch is a cooperative one. Hopper and bf16 only, one row; everything else is launched as before (Chain::linear_few). A list of few stages is
// launched that way too. How it came about: dev/cuda/chain.cu.
#pragma once

#include <algorithm>
#include <cstring>
#include <vector>

#include "decode.cuh"
#include "hopper.cuh"
#include "matvec.cuh"

namespace gpu {

#ifndef GPU_FLOAT32

namespace chain {

constexpr int WARPS = 8, THREADS = 32 * WARPS;  // that compute
// And a warp that brings the weights, one that asks for other things beforehand, and two that do nothing but make a warpgroup of them: only a whole one can
// hand its registers over to those that compute, which without these spill some of what lives through all stages.
constexpr int ALL_THREADS = THREADS + 128;
constexpr int AHEAD = 4;  // so many stages beforehand
// The queue: a slot holds CHUNK channels, or what is left, of a tile's 8 rows, which lie so that two of them share no banks. A warp has SLABS slabs of a chunk,
// and AT_ONCE chunks in registers.
constexpr int CHUNK = 1024, SLABS = CHUNK / 32 / WARPS, AT_ONCE = 4;
constexpr int ROW_BYTES = 2 * CHUNK + 64, SLOT_BYTES = 8 * ROW_BYTES, MIN_SLOTS = 8, MAX_SLOTS = 12;
constexpr int TILES = 8;  // whose sums meet at the same time
constexpr int SUMS_BYTES = 2 * TILES * 2 * WARPS * 8 * sizeof(float);
constexpr int MAX_CHANNELS = 8192, X_PACKS = MAX_CHANNELS / 8 / THREADS;  // 16 bytes of x that a thread brings
constexpr int MAX_HEAD_SIZE = 256, MAX_SEGMENTS = 8;
constexpr int MAX_X_BYTES = 2 * MAX_CHANNELS;
static_assert(WARPS * (MAX_HEAD_SIZE + 2) * sizeof(float) <= MAX_X_BYTES, "what the warps of an attention stage have to merge");
constexpr int MAX_STAGES = CUDART_VERSION >= 12010 ? 128 : 24;  // kernel parameters: 32 KB since 12.1, else 4
// Of the exchange: its halves hold some copies each, or all blocks would ask for the same few lines of the cache at the same time.
constexpr int COPIES = 4;
constexpr int64_t COPY_BYTES = 2 << 20, HALF_BYTES = COPIES * COPY_BYTES;
constexpr uint32_t EMPTY = 0xffffffff, NOWHERE = 0xffffffff;

// Numbers that the launch finds in memory, or that one of its stages leaves in the exchange.
struct Source {
    const floatX* memory;
    uint32_t at;  // bytes from the start of a copy; NOWHERE: memory
};

struct Linear {
    Source x, residual;    // residual: neither memory nor exchange: none
    int parts, heads, hs;  // parts > 0: x is an attention stage's result
    uint32_t hs_inverse;   // see quotient()
    const floatX *w, *b;
    NormParameters norm;
    floatX* out;      // null: only the exchange needs it
    uint32_t out_at;  // in the exchange; NOWHERE: no other stage needs it
    int C, OC, tiles;
    int first;  // the block that has the first tile
    bool gelu;
    float whole, last, inverse;  // of the norm: what a segment of 256 channels, and the last one, weigh; 1/C
    int tile;                    // made by the kernel: this block's first; the next is as many further as there are blocks
};

struct CausalToken {
    Source qkv;         // rows [q | k | v]
    uint32_t parts_at;  // o (heads, parts, hs), then m, l (heads, parts, 2), float32
    int heads, kv_heads, hs, parts, window;
    float scale;
    uint32_t page_inverse;  // see quotient()
    double rotation;        // rope_exponent(); 0: q and k are not turned
    const int* position;    // of the token
    const AttentionState* states;
    // Made by the kernel, for the block's head and part: where its rows stand, and keys begin ... end−1, of which `own` may be the token's own.
    const floatX* rows;
    const int* table;
    floatX* own_row;  // null: another block writes it
    int64_t page_stride;
    int page_size, per_token, to_value;
    int head, kv, record, begin, end, own;
};

struct alignas(16) Stage {
    bool attention;
    union {
        Linear linear;
        CausalToken causal;
    };
};

// A stage's tiles of this block: what it copies into its queues.
struct alignas(16) Feed {
    const floatX* w;  // the first tile
    int tiles, C;
    int step;                   // numbers from one of its tiles to the next
    int outputs, step_outputs;  // rows of W from the first tile on; from one tile to the next
    int pad;
};

struct StageList {
    int count;
    uint32_t exchange_bytes;  // of each copy, that are used
    uint32_t x_bytes;         // one of two places for x, or for what the warps of an attention stage have to merge
    int slots, on_their_way;  // of the queue; as many are asked for at the same time
    Stage stage[MAX_STAGES];
};

struct Control {
    uint32_t half, used, finished;  // what the next launch uses; bytes of the other half's copies that are not empty; blocks of this launch that have finished
};

// ⌊n/d⌋ for n·d < 2³², given the inverse of d.
inline uint32_t inverse_of(int d) { return d == 1 ? 0 : (uint32_t)((1ull << 32) / d + 1); }
__device__ __forceinline__ int quotient(int n, uint32_t inverse) { return inverse == 0 ? n : (int)__umulhi((uint32_t)n, inverse); }

__device__ __forceinline__ uint4 read16(const void* p) {
    uint4 x;
    asm volatile("ld.relaxed.gpu.global.v4.b32 {%0,%1,%2,%3}, [%4];" : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w) : "l"(p) : "memory");
    return x;
}
__device__ __forceinline__ uint2 read8(const void* p) {
    uint2 x;
    asm volatile("ld.relaxed.gpu.global.v2.b32 {%0,%1}, [%2];" : "=r"(x.x), "=r"(x.y) : "l"(p) : "memory");
    return x;
}
__device__ __forceinline__ uint32_t read4(const void* p) {
    uint32_t x;
    asm volatile("ld.relaxed.gpu.global.b32 %0, [%1];" : "=r"(x) : "l"(p) : "memory");
    return x;
}
__device__ __forceinline__ void write4(char* p, uint32_t x) {  // into all copies; p: of the first
#pragma unroll
    for (int i = 0; i < COPIES; i++) asm volatile("st.relaxed.gpu.global.b32 [%0], %1;" ::"l"(p + i * COPY_BYTES), "r"(x) : "memory");
}
__device__ __forceinline__ const char* own_copy(const char* exchange) { return exchange + blockIdx.x % COPIES * COPY_BYTES; }
__device__ __forceinline__ bool missing(const uint4& x) { return x.x == EMPTY || x.y == EMPTY || x.z == EMPTY || x.w == EMPTY; }
__device__ __forceinline__ bool missing(const uint2& x) { return x.x == EMPTY || x.y == EMPTY; }

// Weights are read once in a step: they make room before anything else does.
__device__ __forceinline__ uint64_t read_once() {
    uint64_t policy;
    asm volatile("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
    return policy;
}
__device__ __forceinline__ void bulk_load(uint32_t to, const floatX* from, int bytes, uint32_t barrier, uint64_t policy) {
    HOPPER_ONLY(asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, [%3], %4;" ::"r"(to), "l"(from),
                             "r"(bytes), "r"(barrier), "l"(policy)
                             : "memory");)
}
__device__ __forceinline__ bool barrier_passed(uint32_t barrier, int parity) {
    uint32_t done = 0;
    HOPPER_ONLY(asm volatile("{\n"
                             ".reg .pred done;\n"
                             "mbarrier.test_wait.parity.shared::cta.b64 done, [%1], %2;\n"
                             "selp.b32 %0, 1, 0, done;\n"
                             "}"
                             : "=r"(done)
                             : "r"(barrier), "r"(parity)
                             : "memory");)
    return done;
}
__device__ __forceinline__ uint2 load_shared_words(uint32_t address) {
    uint2 x;
    asm volatile("ld.shared.v2.b32 {%0,%1}, [%2];" : "=r"(x.x), "=r"(x.y) : "r"(address) : "memory");
    return x;
}
__device__ __forceinline__ void store_shared_number(uint32_t address, float x) { asm volatile("st.shared.f32 [%0], %1;" ::"r"(address), "f"(x) : "memory"); }
// threadIdx.x, which the compiler is not to know: else it works out beforehand what follows from it, for all stages, and has no registers for all that.
__device__ __forceinline__ int thread_number() {
    int t;
    asm volatile("mov.u32 %0, %%tid.x;" : "=r"(t));
    return t;
}
__device__ __forceinline__ void meet() { named_barrier(2, THREADS); }  // the threads that compute

// ---- attention --------------------------------------------------------------------------------------------------------------------------------------------

// This block's head and part: of the keys lo ... length, the token's own among them.
__device__ inline void find_part(CausalToken& a) {
    const AttentionState& state = *a.states;
    int block = blockIdx.x, length = (int)state.length, lo = a.window > 0 ? max(0, length - a.window + 1) : 0, keys = length + 1 - lo;
    int each = ((keys + a.parts - 1) / a.parts + 3) / 4 * 4, part = block % a.parts;
    a.head = block / a.parts;
    a.kv = a.head / (a.heads / a.kv_heads);
    a.record = block;
    a.begin = lo + part * each;
    a.end = min(a.begin + each, length + 1);
    a.own = length;
    a.rows = state.rows + (int64_t)a.kv * a.hs;
    a.table = state.page_table;
    a.page_stride = state.page_stride;
    a.page_size = state.page_size;
    a.per_token = (int)state.per_token;
    a.to_value = a.per_token / 2;
    bool writes = a.head < a.heads && a.head % (a.heads / a.kv_heads) == 0 && length >= a.begin && length < a.end;
    a.own_row = writes ? state.row(length) + (int64_t)a.kv * a.hs : nullptr;
}
// Where key j stands, from a.rows on.
__device__ __forceinline__ int64_t key_offset(const CausalToken& a, int j) {
    int page = quotient(j, a.page_inverse);
    return __ldg(a.table + page) * a.page_stride + (j - page * a.page_size) * a.per_token;
}
// The layers of a model mostly have their rows at the same places of their parts of the pool: of a block's first keys they are worked out once.
struct KeyPlaces {
    static constexpr int KEYS = 256;
    const int* table;
    int64_t page_stride;
    int page_size, per_token, begin, end;
    int64_t offset[KEYS];
    __device__ bool are(const CausalToken& a) const {
        return table == a.table && page_stride == a.page_stride && page_size == a.page_size && per_token == a.per_token && begin == a.begin && end == a.end;
    }
};
__device__ __forceinline__ const floatX* key_at(const CausalToken& a, const KeyPlaces& places, int j) {
    return a.rows + (j - a.begin < KeyPlaces::KEYS ? places.offset[j - a.begin] : key_offset(a, j));
}

// The old keys and values of this block's part, into the second-level cache.
__device__ __forceinline__ void ask_for_keys(const CausalToken& a) {
    const int lane = threadIdx.x % 32;
    if ((int)blockIdx.x >= a.heads * a.parts) return;
    for (int j = a.begin + lane / 2; j < min(a.end, a.own); j += 16) {
        const floatX* row = a.rows + key_offset(a, j) + (lane % 2 ? a.to_value : 0);
        for (int c = 0; c < a.hs; c += 64) decode::prefetch(row + c);
    }
}

// Turns a lane's 8 columns.
__device__ __forceinline__ uint4 turned(const uint4& x, const float2* rotation) {
    uint32_t in[4] = {x.x, x.y, x.z, x.w}, out[4];
#pragma unroll
    for (int i = 0; i < 4; i++) {
        float2 v = unpack_bf16(in[i]), r = rotation[i];
        out[i] = pack_bf16(v.x * r.x - v.y * r.y, v.x * r.y + v.y * r.x);
    }
    return {out[0], out[1], out[2], out[3]};
}
__device__ __forceinline__ void unpack8(float (&v)[8], const uint4& x) {
    uint32_t in[4] = {x.x, x.y, x.z, x.w};
#pragma unroll
    for (int i = 0; i < 4; i++) {
        float2 p = unpack_bf16(in[i]);
        v[2 * i] = p.x;
        v[2 * i + 1] = p.y;
    }
}
__device__ __forceinline__ float rescale(float m, float top) { return m == -INFINITY ? 0 : exp2_fast(m - top); }

// The block's head and part. LANES lanes, a power of two, read a key, 8 columns each; they go on with their keys as if they were alone, and all meet at the
// end. rotation: (hs/2) cos, sin. partial: shared memory, (WARPS, hs + 2) floats.
template <int LANES>
__device__ __forceinline__ void attend(const CausalToken& a, const KeyPlaces& places, char* exchange, const float2* rotation, float* partial) {
    const int tid = thread_number();
    constexpr int SIDE = 32 / LANES, STEP = WARPS * SIDE, AT_ONCE = 4;  // keys of a warp; of a block; how many of these are on their way together
    const int lane = tid % 32, warp = tid / 32, column = lane % LANES * 8, side = lane / LANES;
    const int hs = a.hs, own = a.own, end = a.end, first = a.begin + warp * SIDE + side;
    const bool inside = column < hs, rotate = a.rotation != 0;

    uint4 k[AT_ONCE], v[AT_ONCE];
    auto load = [&](int from) {
#pragma unroll
        for (int u = 0; u < AT_ONCE; u++) {
            k[u] = v[u] = {0, 0, 0, 0};
            if (from + u * STEP >= min(end, own) || !inside) continue;
            const floatX* row = key_at(a, places, from + u * STEP) + column;
            k[u] = __ldcg((const uint4*)row);
            v[u] = __ldcg((const uint4*)(row + a.to_value));
        }
    };
    load(first);

    const bool wait = a.qkv.at != NOWHERE;
    const char* qkv = (wait ? own_copy(exchange) + a.qkv.at : (const char*)a.qkv.memory) + column * 2;
    const bool has_own = own >= a.begin && own < end;  // the token's own key and value: all lanes keep them, those whose turn it is use them
    uint4 q_packed = {0, 0, 0, 0}, k_own = {0, 0, 0, 0}, v_own = {0, 0, 0, 0};
    if (inside) {
        const char *q_at = qkv + a.head * hs * 2, *k_at = qkv + (a.heads + a.kv) * hs * 2, *v_at = k_at + a.kv_heads * hs * 2;
        do {
            q_packed = read16(q_at);
            if (has_own) {
                k_own = read16(k_at);
                v_own = read16(v_at);
            }
        } while (wait && (missing(q_packed) || missing(k_own) || missing(v_own)));
    }
    __syncwarp();
    if (rotate && inside) {
        q_packed = turned(q_packed, rotation + column / 2);
        k_own = turned(k_own, rotation + column / 2);
    }
    float q[8], o[8] = {}, m = -INFINITY, l = 0;
    unpack8(q, q_packed);
#pragma unroll
    for (int e = 0; e < 8; e++) q[e] *= a.scale * LOG2E;

#pragma unroll 1
    for (int from = first; from - warp * SIDE - side < end; from += AT_ONCE * STEP) {
        // m' = max(m, max s)   weight = 2^(s − m')   l' = l·2^(m − m') + Σ weight   o' = o·2^(m − m') + Σ weight·v
        float s[AT_ONCE], top = m;
#pragma unroll
        for (int u = 0; u < AT_ONCE; u++) {
            if (from + u * STEP == own) k[u] = k_own, v[u] = v_own;
            float key[8];
            unpack8(key, k[u]);
            s[u] = 0;
#pragma unroll
            for (int e = 0; e < 8; e++) s[u] += q[e] * key[e];
        }
#pragma unroll
        for (int offset = LANES / 2; offset > 0; offset /= 2)
#pragma unroll
            for (int u = 0; u < AT_ONCE; u++) s[u] += __shfl_xor_sync(0xffffffff, s[u], offset);
#pragma unroll
        for (int u = 0; u < AT_ONCE; u++) {
            s[u] = from + u * STEP < end ? s[u] : -INFINITY;
            top = fmaxf(top, s[u]);
        }
        float factor = rescale(m, top);
        m = top;
        l *= factor;
#pragma unroll
        for (int e = 0; e < 8; e++) o[e] *= factor;
#pragma unroll
        for (int u = 0; u < AT_ONCE; u++) {
            float weight = rescale(s[u], top), value[8];
            unpack8(value, v[u]);
            l += weight;
#pragma unroll
            for (int e = 0; e < 8; e++) o[e] += weight * value[e];
        }
        load(from + AT_ONCE * STEP);
    }

    // The lanes that have the same columns, then the warps.
#pragma unroll
    for (int offset = LANES; offset < 32; offset *= 2) {
        float other = __shfl_xor_sync(0xffffffff, m, offset), top = fmaxf(m, other), f = rescale(m, top), g = rescale(other, top);
        m = top;
        l = l * f + __shfl_xor_sync(0xffffffff, l, offset) * g;
#pragma unroll
        for (int e = 0; e < 8; e++) o[e] = o[e] * f + __shfl_xor_sync(0xffffffff, o[e], offset) * g;
    }
    float* mine = partial + warp * (hs + 2);
    if (side == 0 && inside)
#pragma unroll
        for (int e = 0; e < 8; e++) mine[column + e] = o[e];
    if (lane == 0) mine[hs] = m, mine[hs + 1] = l;
    meet();
    if ((int)tid < hs) {
        float top = -INFINITY, sum = 0, all = 0, each[WARPS];
#pragma unroll
        for (int w = 0; w < WARPS; w++) {
            each[w] = partial[w * (hs + 2) + hs];
            top = fmaxf(top, each[w]);
        }
#pragma unroll
        for (int w = 0; w < WARPS; w++) {
            float f = rescale(each[w], top);
            all += f * partial[w * (hs + 2) + hs + 1];
            sum += f * partial[w * (hs + 2) + tid];
        }
        char* to = exchange + a.parts_at;
        write4(to + (a.record * hs + tid) * 4, __float_as_uint(sum));
        if (tid < 2) write4(to + (a.heads * a.parts * hs + 2 * a.record + tid) * 4, __float_as_uint(tid == 0 ? top : all));
    }
    if (a.own_row && warp == WARPS - 1 && side == 0 && inside) {
        *(uint4*)(a.own_row + column) = k_own;
        *(uint4*)(a.own_row + a.to_value + column) = v_own;
    }
}

// 8 numbers of the result of an attention stage, from their column on: the parts merged, by two neighbouring lanes, each of which has every other part.
__device__ __forceinline__ uint4 merged_parts(const char* from, const Linear& m, int column, int second) {
    constexpr int AT_ONCE = 4;
    const int hs = m.hs, parts = m.parts, head = quotient(column, m.hs_inverse);
    const char* o_at = from + (head * parts * hs + column - head * hs) * 4;
    const char* ml_at = from + (m.heads * parts * hs + 2 * head * parts) * 4;
    float top = -INFINITY, l = 0, o[8] = {};
#pragma unroll 1
    for (int p0 = second; p0 < parts; p0 += 2 * AT_ONCE) {
        uint4 low[AT_ONCE] = {}, high[AT_ONCE] = {};
        uint2 ml[AT_ONCE] = {};
        auto read = [&](int i) {
            ml[i] = read8(ml_at + (p0 + 2 * i) * 8);
            low[i] = read16(o_at + (p0 + 2 * i) * hs * 4);
            high[i] = read16(o_at + (p0 + 2 * i) * hs * 4 + 16);
        };
#pragma unroll
        for (int i = 0; i < AT_ONCE; i++)
            if (p0 + 2 * i < parts) read(i);
#pragma unroll
        for (int i = 0; i < AT_ONCE; i++) {
            if (p0 + 2 * i >= parts) break;
            while (missing(ml[i]) || missing(low[i]) || missing(high[i])) read(i);
            float m = __uint_as_float(ml[i].x), other = __uint_as_float(ml[i].y), next = fmaxf(top, m);
            float f = rescale(top, next), g = rescale(m, next);
            top = next;
            l = l * f + other * g;
            uint32_t bits[8] = {low[i].x, low[i].y, low[i].z, low[i].w, high[i].x, high[i].y, high[i].z, high[i].w};
#pragma unroll
            for (int e = 0; e < 8; e++) o[e] = o[e] * f + __uint_as_float(bits[e]) * g;
        }
    }
    __syncwarp();
    float other = __shfl_xor_sync(0xffffffff, top, 1), next = fmaxf(top, other), f = rescale(top, next), g = rescale(other, next);
    l = l * f + __shfl_xor_sync(0xffffffff, l, 1) * g;
#pragma unroll
    for (int e = 0; e < 8; e++) o[e] = o[e] * f + __shfl_xor_sync(0xffffffff, o[e], 1) * g;
    float factor = __fdividef(1, l);  // l >= 1/2, say: the token sees itself
    return {pack_bf16(o[0] * factor, o[1] * factor), pack_bf16(o[2] * factor, o[3] * factor), pack_bf16(o[4] * factor, o[5] * factor),
            pack_bf16(o[6] * factor, o[7] * factor)};
}

// ---- the queue of weights ---------------------------------------------------------------------------------------------------------------------------------

// Slots in turn: CHUNK channels, or what is left, of the 8 rows of a tile. Barriers: that a slot is full, and, behind those, that it is empty.
struct Queue {
    uint32_t slots, barriers;  // shared memory
    int count, slot, phase;    // the slot that is next
    __device__ __forceinline__ uint32_t full(int i) const { return barriers + 8 * i; }
    __device__ __forceinline__ uint32_t empty(int i) const { return barriers + 8 * (MAX_SLOTS + i); }
    __device__ __forceinline__ void advance() {
        if (++slot == count) {
            slot = 0;
            phase ^= 1;
        }
    }
};

// By one warp: all that the block needs, as soon as there is room, on_their_way slots at a time.
__device__ __forceinline__ void bring_weights(Queue queue, const Feed* feeds, int count, int on_their_way) {
    const int lane = threadIdx.x % 32;
    const uint64_t policy = read_once();
    Queue older = queue;
    int asked = 0;
    for (int f = 0; f < count; f++) {
        const Feed feed = feeds[f];
        for (int t = 0; t < feed.tiles; t++) {
            const int rows = min(8, feed.outputs - t * feed.step_outputs);
            const floatX* from = feed.w + (int64_t)t * feed.step + (int64_t)lane * feed.C;
            for (int c = 0; c < feed.C; c += CHUNK, queue.advance()) {
                const int bytes = min(CHUNK, feed.C - c) * (int)sizeof(floatX);
                if (asked++ >= on_their_way) {
                    barrier_wait(older.full(older.slot), older.phase);
                    older.advance();
                }
                barrier_wait(queue.empty(queue.slot), queue.phase ^ 1);
                if (lane == 0) barrier_arrive_expect(queue.full(queue.slot), rows * bytes);
                __syncwarp();
                if (lane < rows) bulk_load(queue.slots + queue.slot * SLOT_BYTES + lane * ROW_BYTES, from + c, bytes, queue.full(queue.slot), policy);
            }
        }
    }
}

// A warp's slabs w, w + 8 ... of the next `count` chunks: waits for them and loads them; then their slots are free.
__device__ __forceinline__ void take_chunks(uint4 (&w)[AT_ONCE][SLABS], Queue& queue, int count) {
    const int tid = thread_number();
    const int lane = tid % 32;
    const uint32_t own = queue.slots + lane / 4 * ROW_BYTES + tid / 32 * 64 + lane % 4 * 16;
    uint32_t empty = 0;
#pragma unroll
    for (int i = 0; i < AT_ONCE; i++) {
        if (i >= count) break;
        barrier_wait(queue.full(queue.slot), queue.phase);
        const uint32_t at = own + queue.slot * SLOT_BYTES;
#pragma unroll
        for (int u = 0; u < SLABS; u++) w[i][u] = load_shared(at + u * WARPS * 64);
        if (lane == i) empty = queue.empty(queue.slot);
        queue.advance();
    }
    __syncwarp();
    if (empty) barrier_arrive(empty);
}
// Whether the last of them has come.
__device__ __forceinline__ bool chunks_are_there(const Queue& queue, int count) {
    int slot = queue.slot + count - 1;
    bool next = slot >= queue.count;
    return barrier_passed(queue.full(next ? slot - queue.count : slot), queue.phase ^ next);
}

// ---- linear layers ----------------------------------------------------------------------------------------------------------------------------------------

// x of a layer to shared memory, by the last warps: a lane has 8 channels, with a norm a warp a segment.
__device__ __forceinline__ void load_x(const Linear& m, const char* exchange, uint32_t x_at, float2* segment) {
    const int tid = thread_number();
    const int lane = tid % 32, chunk = THREADS - 32 - tid / 32 * 32 + lane, C = m.C, slabs = (C + 31) / 32;
    if (!m.parts && chunk >= slabs * 4 && (!m.norm.gain || chunk >= (C + 255) / 256 * 32)) return;
    const bool wait = m.x.at != NOWHERE;
    const char* x_from = (wait ? own_copy(exchange) + m.x.at : (const char*)m.x.memory) + chunk * 16;
    if (m.norm.gain) {
        const int segments = (C + 255) / 256;
        const bool in_segment = chunk * 8 < C;
        uint4 gain = load_parameters(m.norm.gain + chunk * 8, in_segment), shift = load_parameters(m.norm.bias + chunk * 8, in_segment), u = {0, 0, 0, 0};
        const float s_inverse = __frcp_rn((float)min(256, C - chunk / 32 * 256)), inverse = m.inverse;
        float weight[MAX_SEGMENTS];  // of segments that are not there: 0
#pragma unroll
        for (int k = 0; k < MAX_SEGMENTS; k++) {
            weight[k] = k < C / 256 ? m.whole : k == C / 256 ? m.last : 0;
            asm volatile("" : "+f"(weight[k]));  // worked out now, while x is not there
        }
        if (in_segment) do
                u = read16(x_from);
            while (wait && missing(u));
        __syncwarp();
        float mean = warp_sum(sum8(u, 0)) * s_inverse;
        float squares = warp_sum(in_segment ? sum8<true>(u, mean) : 0), variance = 0;
        if (lane == 0) segment[chunk / 32] = {mean, squares};
        named_barrier(4, segments * 32);
        mean = 0;
        auto combine = [&](auto most) {
            float2 part[decltype(most)::value];
#pragma unroll
            for (int k = 0; k < decltype(most)::value; k++) part[k] = segment[k];
#pragma unroll
            for (int k = 0; k < decltype(most)::value; k++) mean += weight[k] * part[k].x;
#pragma unroll
            for (int k = 0; k < decltype(most)::value; k++) variance += part[k].y * inverse + weight[k] * ((part[k].x - mean) * (part[k].x - mean));
        };
        segments <= MAX_SEGMENTS / 2 ? combine(std::integral_constant<int, MAX_SEGMENTS / 2>()) : combine(std::integral_constant<int, MAX_SEGMENTS>());
        float rstd = rsqrtf(variance + norm_epsilon<true>);
        if (chunk < slabs * 4)
            store_shared(x_at + chunk * 16, uint4{normalised(u.x, mean, rstd, gain.x, shift.x), normalised(u.y, mean, rstd, gain.y, shift.y),
                                                  normalised(u.z, mean, rstd, gain.z, shift.z), normalised(u.w, mean, rstd, gain.w, shift.w)});
    } else if (m.parts) {
#pragma unroll 1
        for (int c = tid / 2; c - lane / 2 < slabs * 4; c += THREADS / 2) {  // (whole warps; behind the end the last ones again)
            uint4 u = merged_parts(x_from - chunk * 16, m, min(c, slabs * 4 - 1) * 8, lane % 2);
            if (lane % 2 == 0 && c < slabs * 4) store_shared(x_at + c * 16, u);
        }
    } else {
        uint4 u[X_PACKS];
#pragma unroll
        for (int i = 0; i < X_PACKS; i++) {
            u[i] = {0, 0, 0, 0};
            if ((chunk + i * THREADS) * 8 < C) u[i] = read16(x_from + i * THREADS * 16);
        }
        for (bool again = wait; again;) {  // all that are missing together
            again = false;
#pragma unroll
            for (int i = 0; i < X_PACKS; i++) again |= missing(u[i]);
            if (again)
#pragma unroll
                for (int i = 0; i < X_PACKS; i++)
                    if (missing(u[i])) u[i] = read16(x_from + i * THREADS * 16);
        }
#pragma unroll
        for (int i = 0; i < X_PACKS; i++)
            if (chunk + i * THREADS < slabs * 4) store_shared(x_at + (chunk + i * THREADS) * 16, u[i]);
    }
}

// A stage.
__device__ __forceinline__ void linear_stage(const Linear& m, char* exchange, uint32_t x_at, float2* segment, uint32_t sums, Queue& queue) {
    const int tid = thread_number();
    const int lane = tid % 32, warp = tid / 32, row = lane / 4, pair = lane % 4;
    const int OC = m.OC, tiles = m.tiles, step = gridDim.x, slabs = m.C / 32, chunks = (m.C + CHUNK - 1) / CHUNK;
    const bool wide = chunks > 2;                                         // with two sums of each warp, which take its slabs by turns
    const int together = chunks == 1 ? AT_ONCE : wide ? 1 : AT_ONCE / 2;  // tiles
    int tile = m.tile;

    // What does not depend on the stage before: the first warp has outputs 2·pair ... of tile `row` of those that come next.
    const bool waits = m.residual.at != NOWHERE, with_gelu = m.gelu;
    const char* residual_from = waits ? own_copy(exchange) + m.residual.at : (const char*)m.residual.memory;
    char* result_to = m.out_at != NOWHERE ? exchange + m.out_at : nullptr;
    floatX* out = m.out;
    const floatX* bias = m.b;
    uint32_t b = 0, residual = 0;
    int o = OC;  // OC: none
    auto begin_outputs = [&] {
        o = min((tile + row * step) * 8 + pair * 2, OC);
        b = o < OC && bias ? load_parameter_pair(bias + o) : 0;
        residual = o < OC && residual_from ? read4(residual_from + (int64_t)o * 2) : 0;
    };
    if (warp == 0) begin_outputs();

    // The first weights too, if they are there: so their slots are filled again while x is waited for. (Not left as they were: the compiler would carry them
    // along, through all stages.)
    uint4 w[AT_ONCE][SLABS] = {};
    auto tiles_now = [&] {
        return 1 + (together > 1 && tile + step < tiles) + (together > 2 && tile + 2 * step < tiles) + (together > 3 && tile + 3 * step < tiles);
    };
    auto chunks_now = [&](int chunk) { return tiles_now() * min(chunks - chunk, AT_ONCE); };
    bool taken = chunks_are_there(queue, chunks_now(0));
    if (taken) take_chunks(w, queue, chunks_now(0));

    load_x(m, exchange, x_at, segment);
    meet();

    // A tile's 8 rows are the products' rows twice, with the first half of what a lane has of a slab and with the second; x's halves are two of their columns.
    // Of a product's sums those are wanted that belong together. As in matvec_kernel3, a half of a slab after another is added to a sum of its own.
    uint32_t to = sums, other = sums + TILES * 2 * WARPS * 32;
    const uint32_t x_own = x_at + warp * 64 + pair * 16 + row % 2 * 8;
    auto multiply = [&](const uint4(&w)[SLABS], int chunk, float(&even)[4], float(&odd)[4]) {
        uint2 x[SLABS];
#pragma unroll
        for (int u = 0; u < SLABS; u++) x[u] = load_shared_words(x_own + (chunk * SLABS + u) * WARPS * 64);  // behind the last slab: anything
#pragma unroll
        for (int u = 0; u < SLABS; u++)
            if ((chunk * SLABS + u) * WARPS + warp < slabs) mma(u % 2 ? odd : even, {w[u].x, w[u].z, w[u].y, w[u].w}, x[u].x, x[u].y);
    };
#pragma unroll 1
    while (tile < tiles) {
        int done = 0;
#pragma unroll 1
        while (done + together <= TILES && tile < tiles) {
            float sum[AT_ONCE][4] = {};
            const int count = tiles_now();
#pragma unroll 1
            for (int chunk = 0; chunk < chunks; chunk += AT_ONCE) {
                if (!taken) take_chunks(w, queue, chunks_now(chunk));
                taken = false;
                // What tiles that are not there add up to is not used.
                if (wide)
#pragma unroll
                    for (int i = 0; i < AT_ONCE; i++) multiply(w[i], chunk + i, sum[0], sum[1]);
                else if (together == AT_ONCE)
#pragma unroll
                    for (int i = 0; i < AT_ONCE; i++) multiply(w[i], 0, sum[i], sum[i]);
                else
#pragma unroll
                    for (int i = 0; i < AT_ONCE; i++) multiply(w[i], i % 2, sum[i / 2], sum[i / 2]);
            }
            const uint32_t own = to + (((wide ? 2 : 1) * done * WARPS + warp) * 8 + row) * 4;
            const int leaves = wide ? 2 : count;
#pragma unroll
            for (int i = 0; i < AT_ONCE; i++)
                if (i < leaves && pair == 0) store_shared_number(own + i * WARPS * 32, sum[i][0] + sum[i][3]);
            done += count;
            tile += count * step;
        }

        // The first warp adds up what all have. The others need not wait for it, unless they will leave more.
        if (warp > 0 && tile >= tiles) {
            named_barrier_arrive(1, THREADS);
            break;
        }
        named_barrier(1, THREADS);
        if (warp == 0) {
            if (row < done && o < OC) {
                auto total = [&](uint32_t at) {
                    float2 part[WARPS];
#pragma unroll
                    for (int w = 0; w < WARPS; w++) part[w] = load_shared_pair(at + w * 32 + pair * 8);
#pragma unroll
                    for (int d = 1; d < WARPS; d *= 2)
#pragma unroll
                        for (int w = 0; w < WARPS; w += 2 * d) part[w].x += part[w + d].x, part[w].y += part[w + d].y;
                    return part[0];
                };
                float2 y, v = unpack_bf16(b);
                if (wide) {
                    float2 first = total(to + 2 * row * WARPS * 32), second = total(to + (2 * row + 1) * WARPS * 32);
                    y = {first.x + second.x, first.y + second.y};
                } else {
                    y = total(to + row * WARPS * 32);
                }
                y.x += v.x, y.y += v.y;
                if (with_gelu) y.x = gelu(y.x), y.y = gelu(y.y);
                while (waits && residual == EMPTY) residual = read4(residual_from + (int64_t)o * 2);
                v = unpack_bf16(residual);
                y.x += v.x, y.y += v.y;
                uint32_t result = pack_bf16(y.x, y.y);
                if (result_to) write4(result_to + (int64_t)o * 2, result);
                if (out) *(uint32_t*)(out + o) = result;
            }
            __syncwarp();
            if (tile < tiles) begin_outputs();
        }
        uint32_t now = to;  // the next sums go to the other place: these may still be read
        to = other;
        other = now;
    }
}

// By one warp, some stages ahead of the others: what a stage will read of memory and does not come through the queue goes to the second-level cache.
__device__ __forceinline__ void ask_for(const Stage* stages, int count, const volatile int& now) {
    const int lane = threadIdx.x % 32;
    for (int s = 0; s < count; s++) {
        while (s > now + AHEAD) __nanosleep(100);
        if (stages[s].attention) {
            ask_for_keys(stages[s].causal);
            continue;
        }
        const Linear& m = stages[s].linear;
        for (int line = (int)(blockIdx.x + lane * gridDim.x) * 64; line < max(m.b ? m.OC : 0, m.norm.gain ? m.C : 0); line += 32 * gridDim.x * 64) {
            if (m.b && line < m.OC) decode::prefetch(m.b + line);
            if (m.norm.gain && line < m.C) {
                decode::prefetch(m.norm.gain + line);
                decode::prefetch(m.norm.bias + line);
            }
        }
    }
}

// ---- the kernel -------------------------------------------------------------------------------------------------------------------------------------------

inline int64_t shared_bytes(int count, uint32_t x_bytes) {
    return count * (int64_t)(sizeof(Stage) + sizeof(Feed)) + 2 * x_bytes + SUMS_BYTES + MAX_HEAD_SIZE / 2 * sizeof(float2) + 128;  // and the slots
}

// What of each linear stage is this block's. By one warp; returns how many feeds there are.
__device__ inline int deal_out(Stage* stages, Feed* feeds, int count) {
    int lane = threadIdx.x % 32, known = 0, blocks = gridDim.x;
    for (int s = lane; s - lane < count; s += 32) {
        int tiles = 0;
        bool linear = s < count && !stages[s].attention;
        Linear& m = stages[min(s, count - 1)].linear;
        if (linear) {
            m.tile = (int)blockIdx.x - m.first;
            if (m.tile < 0) m.tile += blocks;
            while (m.tile + tiles * blocks < m.tiles) tiles++;
        }
        unsigned have = __ballot_sync(0xffffffff, tiles > 0);
        if (tiles > 0)
            feeds[known + __popc(have & ((1u << lane) - 1))] = {
                m.w + (int64_t)m.tile * 8 * m.C, tiles, m.C, blocks * 8 * m.C, m.OC - m.tile * 8, blocks * 8, 0};
        known += __popc(have);
    }
    return known;
}

// ATTENTION_LANES: 8 or 32, of 8 columns each.
template <int ATTENTION_LANES>
__global__ void __launch_bounds__(ALL_THREADS, 1) chain_kernel(const __grid_constant__ StageList list, Control* control, char* exchange_memory) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
    extern __shared__ uint4 chain_memory[];
    __shared__ uint64_t barriers[2 * MAX_SLOTS];
    __shared__ uint32_t launch_half, launch_used;
    __shared__ int feeds_found, stage_now;
    __shared__ float2 segment[MAX_SEGMENTS];
    __shared__ KeyPlaces places;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, count = list.count;
    // Shared memory: the stages; the feeds; two places for x; the warps' sums; the rotation; the queue.
    Stage* stages = (Stage*)chain_memory;
    Feed* feeds = (Feed*)(stages + count);
    char* x_places = (char*)(feeds + count);
    char* sums = x_places + 2 * list.x_bytes;
    float2* rotation = (float2*)(sums + SUMS_BYTES);
    Queue queue = {(shared_address(rotation + MAX_HEAD_SIZE / 2) + 127) / 128 * 128, shared_address(barriers), list.slots, 0, 0};

    for (int i = threadIdx.x; i < count * (int)(sizeof(Stage) / 16); i += ALL_THREADS) ((uint4*)stages)[i] = ((const uint4*)list.stage)[i];
    if (threadIdx.x == 0) {
        launch_half = *(volatile uint32_t*)&control->half;
        launch_used = *(volatile uint32_t*)&control->used;
        for (int i = 0; i < list.slots; i++) {
            barrier_init(queue.full(i), 1);
            barrier_init(queue.empty(i), WARPS);
        }
        barrier_init_fence();
    }
    if (threadIdx.x < MAX_SEGMENTS) segment[threadIdx.x] = {0, 0};  // those that a row does not have stay so: all norms of a launch are of one width
    if (threadIdx.x == 0) places.table = nullptr, stage_now = 0;
    __syncthreads();
    if (warp == WARPS) {
        int known = deal_out(stages, feeds, count);
        if (lane == 0) feeds_found = known;
        __syncwarp();
    } else if (warp < WARPS) {
        for (int s = threadIdx.x; s < count; s += THREADS)
            if (stages[s].attention) find_part(stages[s].causal);
    }
    __syncthreads();
    if (warp >= WARPS) {
        fewer_registers<88>();
        if (warp == WARPS) bring_weights(queue, feeds, feeds_found, list.on_their_way);
        if (warp == WARPS + 1) ask_for(stages, count, stage_now);
        return;
    }
    more_registers<208>();

    char* exchange = exchange_memory + launch_half * HALF_BYTES;
    {  // empties the other half
        uint4 *other = (uint4*)(exchange_memory + (1 - launch_half) * HALF_BYTES), empty = {EMPTY, EMPTY, EMPTY, EMPTY};
        for (uint32_t i = blockIdx.x * THREADS + threadIdx.x; i < launch_used / 16; i += gridDim.x * THREADS)
#pragma unroll
            for (int copy = 0; copy < COPIES; copy++) other[copy * (COPY_BYTES / 16) + i] = empty;
    }
    // For an attention stage, what others before it have mostly had too.
    double rotation_now = 0;
    int rotation_size = 0;
    auto prepare = [&](const CausalToken& a) {
        const bool turn = a.rotation != 0 && (a.rotation != rotation_now || a.hs != rotation_size), look = !places.are(a);
        if (!turn && !look) return;
        meet();
        if (turn) {
            for (int i = threadIdx.x; i < a.hs / 2; i += THREADS) rotation[i] = rope_rotation(*a.position, i, a.rotation, 1);
            rotation_now = a.rotation;
            rotation_size = a.hs;
        }
        if (look) {
            for (int i = threadIdx.x; i < min(a.end - a.begin, (int)KeyPlaces::KEYS); i += THREADS)
                if (a.begin + i < a.own) places.offset[i] = key_offset(a, a.begin + i);
            if (threadIdx.x == 0) {
                places.table = a.table;
                places.page_stride = a.page_stride;
                places.page_size = a.page_size;
                places.per_token = a.per_token;
                places.begin = a.begin;
                places.end = a.end;
            }
        }
        meet();
    };
    auto takes_part = [&](const Stage& stage) { return stage.attention && (int)blockIdx.x < stage.causal.heads * stage.causal.parts; };
    for (int s = 0; s < count; s++)
        if (takes_part(stages[s])) {
            prepare(stages[s].causal);
            break;
        }
    int turn = 0;  // of the places for x
#pragma unroll 1
    for (int s = 0; s < count; s++) {
        if (threadIdx.x == 0) *(volatile int*)&stage_now = s;
        char* x_place = x_places + turn * list.x_bytes;
        if (stages[s].attention) {
            const CausalToken& a = stages[s].causal;
            if (!takes_part(stages[s])) continue;
            prepare(a);
            attend<ATTENTION_LANES>(a, places, exchange, rotation, (float*)x_place);
        } else {
            const Linear& m = stages[s].linear;
            if (m.tile >= m.tiles) continue;
            linear_stage(m, exchange, shared_address(x_place), segment, shared_address(sums), queue);
        }
        turn ^= 1;
    }
    meet();
    if (threadIdx.x == 0 && atomicInc(&control->finished, gridDim.x - 1) == gridDim.x - 1) {
        control->half = 1 - launch_half;
        control->used = list.exchange_bytes;
    }
#endif
}

}  // namespace chain

// --------------------------------------------------------------------------------------------------------------------------------------------------
// The host's side

namespace chain {

// The exchange's two halves and what stands between launches; one for all, since all launches are on one stream.
struct Exchange {
    char* halves;
    Control* control;
};
inline const Exchange& exchange() {
    static const Exchange e = [] {
        char* p;
        CUDA_CHECK(cudaMalloc(&p, 2 * HALF_BYTES + sizeof(Control)));
        CUDA_CHECK(cudaMemset(p, 0xff, 2 * HALF_BYTES));
        CUDA_CHECK(cudaMemset(p + 2 * HALF_BYTES, 0, sizeof(Control)));
        CUDA_CHECK(cudaDeviceSynchronize());
        return Exchange{p, (Control*)(p + 2 * HALF_BYTES)};
    }();
    return e;
}

using Kernel = void (*)(StageList, Control*, char*);
inline Kernel kernel_for(int head_size) { return head_size <= 64 ? chain_kernel<8> : chain_kernel<32>; }

// Dynamic shared memory of a block; some is left for what is static.
inline int64_t most_shared_bytes() { return (int64_t)device_properties().sharedMemPerBlockOptin - 4096; }
inline bool usable() {
    static const bool yes = [] {
        int blocks = 0;
        int64_t shared = most_shared_bytes();
        if (!hopper_code() || !device_properties().cooperativeLaunch || shared < shared_bytes(8, MAX_X_BYTES) + MIN_SLOTS * SLOT_BYTES) return false;
        for (int head_size : {64, 256}) {
            Kernel kernel = kernel_for(head_size);
            allow_shared_memory(kernel, shared);
            CUDA_CHECK(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kernel, ALL_THREADS, shared));
            if (blocks == 0) return false;
        }
        return exchange().halves != nullptr;
    }();
    return yes;
}

}  // namespace chain

#endif

// Stages are added, and launched together: by launch(), or before one for which there is no room. Nothing that they compute may be read by other kernels,
// nor anything that they read be written, before launch(). What is added reads what was added before, by the addresses of the results.
class Chain {
 public:
    cudaStream_t stream = nullptr;

    explicit Chain(cudaStream_t stream = nullptr) : stream(stream) {}
    Chain(const Chain&) = delete;

#ifdef GPU_FLOAT32
    bool linear(const Matvec&) { return false; }
    bool causal_token(const SoftmaxAttention&, const int*, bool, const floatX*) { return false; }
    void launch() {}

#else
    // False: not added, since it is not for the chain.
    bool linear(const Matvec& m) {
        if (m.N != 1 || !takes_matvec3(m) || m.C % 32 != 0 || m.C > chain::MAX_CHANNELS || !chain::usable()) return false;
        make_room(1, m.OC * sizeof(floatX));
        if (m.norm.gain && norm_channels != m.C) {
            if (norm_channels) launch();  // the kernel's norms have one width
            norm_channels = m.C;
        }
        chain::Stage& stage = list.stage[list.count];
        stage.attention = false;
        chain::Linear& s = stage.linear;
        s = {};
        if (!results.empty() && results.back().parts > 0) {
            assert(m.x == results.back().memory && m.C == results.back().numbers && !m.norm.gain);
            s.x = {nullptr, results.back().at};
            s.parts = results.back().parts;
            s.hs = results.back().hs;
            s.heads = m.C / s.hs;
            s.hs_inverse = chain::inverse_of(s.hs);
            results.pop_back();
        } else {
            s.x = source(m.x);
        }
        s.residual = source(m.residual);
        s.w = m.w;
        s.b = m.b;
        s.norm = m.norm;
        s.out = m.out;
        s.out_at = take(m.OC * sizeof(floatX));
        s.C = m.C;
        s.OC = m.OC;
        s.tiles = (int)ceil_div(m.OC, 8);
        s.gelu = m.gelu;
        s.whole = 256.f / m.C;
        s.last = (float)(m.C % 256) / m.C;
        s.inverse = 1.f / m.C;
        // Where the stage before has stopped giving one more tile to some, this one goes on.
        s.first = next_block;
        next_block = (next_block + s.tiles) % device_properties().multiProcessorCount;
        need_x(round_up(m.C, 32) * sizeof(floatX));
        results.push_back({m.out, m.OC, list.count, s.out_at, 0, 0, false});
        linears.push_back(m);
        list.count++;
        return true;
    }

    // Attention of the one query of one sequence whose row [q | k | v] stands at a.q; k and v go to their page on the way. rotate: q and k are turned by
    // *position. The next stage takes its result, `o`.
    bool causal_token(const SoftmaxAttention& a, const int* position, bool rotate, const floatX* o) {
        int hs = a.d_qk, blocks = device_properties().multiProcessorCount;
        const StatePages& pages = a.pages;
        int64_t row = (a.heads + 2 * a.kv_heads) * (int64_t)hs;
        bool fit = a.num_seqs == 1 && a.max_q == 1 && a.q_rows == 1 && a.heads % a.kv_heads == 0 && a.d_v == hs && hs % 8 == 0 && hs <= chain::MAX_HEAD_SIZE &&
                   a.q_stride == row && pages.rows && pages.page_stride % 8 == 0 && pages.per_token == 2ll * a.kv_heads * hs && aligned16(pages.rows) &&
                   aligned16(a.q) && a.heads * hs % 32 == 0 && a.heads * (int64_t)hs <= chain::MAX_CHANNELS && a.heads <= blocks &&
                   (int64_t)pages.page_size * a.max_k < 1ll << 32;
        if (!fit || !chain::usable()) return false;
        int keys = a.window > 0 ? std::min(a.window, a.max_k) : a.max_k;
        int parts = std::max(1, std::min((int)ceil_div(keys, KEYS_OF_A_PART), blocks / a.heads));
        if (ceil_div(keys, parts) > MOST_KEYS_OF_A_PART) return false;
        int64_t bytes = (int64_t)a.heads * parts * (hs + 2) * sizeof(float);
        if (bytes > chain::COPY_BYTES / 2) return false;
        make_room(2, bytes + chain::MAX_CHANNELS * 4 * sizeof(floatX));
        chain::Stage& stage = list.stage[list.count];
        stage.attention = true;
        chain::CausalToken& s = stage.causal;
        s = {};
        s.qkv = source(a.q);
        s.parts_at = take(bytes);
        s.heads = a.heads;
        s.kv_heads = a.kv_heads;
        s.hs = hs;
        s.parts = parts;
        s.window = a.window;
        s.scale = a.scale;
        s.page_inverse = chain::inverse_of(pages.page_size);
        s.rotation = rotate ? rope_exponent(hs) : 0;
        s.position = position;
        s.states = a.states;
        need_x(chain::WARPS * (hs + 2) * sizeof(float));
        results.push_back({o, a.heads * (int64_t)hs, list.count, s.parts_at, parts, hs, true});
        list.count++;
        return true;
    }

    void launch() {
        if (list.count == 0) return;
        assert(!list.stage[list.count - 1].attention);
        if (list.count < FEW_STAGES && linears.size() == (size_t)list.count) {
            for (const Matvec& m : linears) {
                NormParameters norm = m.norm;
                gpu::linear_few(stream, m.out, m.x, norm.gain ? &norm : nullptr, m.w, m.b, m.N, m.C, m.OC, m.gelu, m.residual, true);
            }
            clear();
            return;
        }
        // Memory that a later stage writes too is left to it.
        for (Result& r : results) {
            if (r.parts) continue;
            chain::Linear& s = list.stage[r.stage].linear;
            if (!r.read) s.out_at = chain::NOWHERE;
            for (const Result& later : results)
                if (later.stage > r.stage && later.memory < r.memory + r.numbers && r.memory < later.memory + later.numbers) s.out = nullptr;
        }
        int64_t rest = chain::shared_bytes(list.count, list.x_bytes);
        list.slots = (int)std::min<int64_t>(chain::MAX_SLOTS, (chain::most_shared_bytes() - rest) / chain::SLOT_BYTES);
        int64_t shared = rest + list.slots * chain::SLOT_BYTES;
        // Short stages need their weights early; long ones keep memory busy with little.
        int64_t chunks = 0;
        for (const Matvec& m : linears) chunks += ceil_div(ceil_div(m.OC, 8), device_properties().multiProcessorCount) * ceil_div(m.C, chain::CHUNK);
        list.on_their_way = chunks > 4ll * list.count ? 2 : 1 << 30;
        cudaLaunchAttribute attribute = {};
        attribute.id = cudaLaunchAttributeCooperative;
        attribute.val.cooperative = 1;
        cudaLaunchConfig_t config = {};
        config.gridDim = dim3((unsigned)device_properties().multiProcessorCount);
        config.blockDim = dim3(chain::ALL_THREADS);
        config.dynamicSmemBytes = (size_t)shared;
        config.stream = stream;
        config.attrs = &attribute;
        config.numAttrs = 1;
        int head_size = 0;
        for (int i = 0; i < list.count; i++)
            if (list.stage[i].attention) head_size = std::max(head_size, list.stage[i].causal.hs);
        chain::Kernel kernel = chain::kernel_for(head_size);
        allow_shared_memory(kernel, shared);
        const chain::Exchange& e = chain::exchange();
        CUDA_CHECK(cudaLaunchKernelEx(&config, kernel, list, e.control, e.halves));
        clear();
    }

 private:
    static constexpr int FEW_STAGES = 8;  // that launches which overlap do as fast
    static constexpr int KEYS_OF_A_PART = 128, MOST_KEYS_OF_A_PART = 2048;
    struct Result {
        const floatX* memory;
        int64_t numbers;
        int stage;
        uint32_t at;
        int parts, hs;  // of an attention stage
        bool read;
    };
    chain::StageList list = {};
    std::vector<Result> results;
    std::vector<Matvec> linears;
    int next_block = 0, norm_channels = 0;

    void clear() {
        list.count = 0;
        list.exchange_bytes = list.x_bytes = 0;
        results.clear();
        linears.clear();
        next_block = norm_channels = 0;
    }
    chain::Source source(const floatX* p) {
        for (size_t i = results.size(); p && i-- > 0;) {
            Result& r = results[i];
            if (r.parts == 0 && p >= r.memory && p < r.memory + r.numbers) {
                r.read = true;
                return {nullptr, r.at + (uint32_t)((p - r.memory) * sizeof(floatX))};
            }
        }
        return {p, chain::NOWHERE};
    }
    void make_room(int stages, int64_t bytes) {
        bool pending = list.count > 0 && list.stage[list.count - 1].attention;  // its result is taken by what comes now; there is room, see there
        bool full = list.count + stages > chain::MAX_STAGES || list.exchange_bytes + bytes + 256 * stages > chain::COPY_BYTES ||
                    chain::shared_bytes(list.count + stages, chain::MAX_X_BYTES) + chain::MIN_SLOTS * chain::SLOT_BYTES > chain::most_shared_bytes();
        if (full && !pending) launch();
        assert(bytes <= chain::COPY_BYTES);
    }
    uint32_t take(int64_t bytes) {
        uint32_t at = list.exchange_bytes;
        list.exchange_bytes += (uint32_t)round_up(bytes, 128);
        return at;
    }
    void need_x(int64_t bytes) { list.x_bytes = std::max(list.x_bytes, (uint32_t)round_up(bytes, 16)); }
#endif

 public:
    // As linear_few() of matvec.cuh: added, or, what is not for the chain, launched behind what has been added.
    void linear_few(floatX* out, const floatX* x, const NormParameters* norm, const floatX* w, const floatX* b, int64_t N, int64_t C, int64_t OC, bool gelu,
                    const floatX* residual) {
        if (N == 1 && linear({out, x, norm ? *norm : NormParameters{nullptr, nullptr}, w, b, residual, 1, (int)C, (int)OC, gelu})) return;
        launch();
        gpu::linear_few(stream, out, x, norm, w, b, N, C, OC, gelu, residual, true);
    }
};

}  // namespace gpu
