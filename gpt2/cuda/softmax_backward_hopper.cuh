// The softmax core's backward pass by Hopper's own instructions: kernels 7 of softmax_backward.cuh, for bf16 without dropout and the sizes of heads in
// launch7(). Equations as there; barriers, panels and products in hopper.cuh.
//
//     softmax_backward_dq_kernel7     owns 128 queries:  S  = Q·Kᵀ   dP  = dO·Vᵀ                 dQ += dS·K     over tiles of keys
//     softmax_backward_dkv_kernel7    owns 128 keys:     Sᵀ = K·Qᵀ   dPᵀ = V·dOᵀ   dV += Pᵀ·dO   dK += dSᵀ·Q    over tiles of queries
//
// The first one also makes the statistics of the rows, lse·log₂e and D, which the second one reads.
//
// Two warpgroups compute, with 64 of the owned rows each; a third one copies. Everything between the products stays in registers: the scores come out as rows
// of a warp, and as such P and dS, rounded, go into the products behind. So one warpgroup makes exponentials while the other one multiplies, and nobody meets
// at a barrier but through the ring of tiles. Blocks stay, one a multiprocessor, and take one tile of owned rows after the other; the copying warpgroup runs
// ahead, to the next tile too.
//
// If the sums over the rows of [dq | dk | dv] are wanted, too, a warpgroup adds up its rows while they are float32 in registers, as it stores them, and leaves
// them as a partial row in the workspace; a last kernel adds these up, always in one order. A pass over the stored gradients takes a seventh of the
// time of all else at GPT-2's shape, this a 25th.
//
// Tiles that go beyond the end of their sequence are copied by ordinary loads, and zeros behind the end: what stands there belongs to others, or is NaN. So
// nothing but the lengths in cu_q and cu_k decides what is read, and batches of sequences of all lengths go this way.
#pragma once

#include "hopper.cuh"
#include "softmax_backward_common.cuh"

namespace gpu {
namespace softmax_bwd {
#ifndef GPU_FLOAT32

constexpr int OWN7 = 128, CONSUMERS7 = 256, THREADS7 = CONSUMERS7 + 128;

// The order in which a warpgroup does things to a tile. What is started (products) runs while the next thing is done; the registers decide what is possible.
//     PLAIN       scores of the next tile last; for keys: dV is started before dS is made
//     TOGETHER    keys: dV and dK are started together, so that P and dP need no room beside their rounded forms
//     ROUNDED     keys: dP comes after the exponentials, and dS is made of P as it goes into dV, rounded: least registers
//     PIPELINED   queries: scores of the next tile are started before dS is made, into registers of their own
enum class Order7 { PLAIN, TOGETHER, ROUNDED, PIPELINED };

// KEYS: which kernel. DQK, DV: sizes of a head. OTHERS: rows of a tile of the sort walked over. STAGES of these in the ring, and BUFFERS for the owned rows.
// KEEP: the owned rows are operands in registers, from where they need not be fetched for each product; their buffer is free at once.
template <bool KEYS_, int DQK_, int DV_, int OTHERS_, int STAGES_, int BUFFERS_, bool KEEP_, Order7 ORDER_ = Order7::PLAIN>
struct Shape7 {
    static constexpr bool KEYS = KEYS_, KEEP = KEEP_;
    static constexpr Order7 ORDER = ORDER_;
    static constexpr int DQK = DQK_, DV = DV_, OTHERS = OTHERS_, STAGES = STAGES_, BUFFERS = BUFFERS_;
    static constexpr int PANELS_QK = (DQK + 63) / 64, PANELS_V = (DV + 63) / 64;
    static constexpr int OWN_QK = PANELS_QK * OWN7 * 128, OWN_V = PANELS_V * OWN7 * 128, OWN = OWN_QK + OWN_V;  // bytes
    static constexpr int QK = PANELS_QK * OTHERS * 128, STAGE = QK + PANELS_V * OTHERS * 128;
    // Keys' kernel: lse·log₂e of the tile's queries, then D of these, with each tile. Queries' kernel: lse·log₂e of the owned queries.
    static constexpr int STATS = KEYS ? OTHERS * 8 : 0, OWN_STATS = KEYS ? 0 : OWN7 * 4;
    // Offsets in shared memory: owned rows, tiles, statistics, sums, work, the next tile, barriers.
    static constexpr int TILES = BUFFERS * OWN, TILE_STATS = TILES + STAGES * STAGE, OWNED_STATS = TILE_STATS + STAGES * STATS;
    // Sums over the rows of a warp, where that is done: two of 64 columns.
    static constexpr bool SUMS = DQK == 64 && DV == 64;
    static constexpr int WARP_SUMS = OWNED_STATS + BUFFERS * OWN_STATS;
    static constexpr int WORK = WARP_SUMS + (SUMS ? CONSUMERS7 / 32 * 512 : 0), NEXT = WORK + BUFFERS * 32, BARRIERS = NEXT + 16;
    static constexpr int BYTES = 1024 + BARRIERS + 16 * (STAGES + BUFFERS);
    static_assert(BYTES <= 227 << 10 && DQK % 32 == 0 && DV % 32 == 0, "");
    static_assert(STAGE >= OWN_V, "o, too, comes through the ring");
    static_assert(!KEYS || STAGES >= 3,
                  "a warpgroup holds a tile and may pass over one before it finds the next: with fewer stages the ring would stand still");
};

__device__ inline float load_shared(uint32_t address) {
    float x;
    asm volatile("ld.shared.f32 %0, [%1];" : "=f"(x) : "r"(address) : "memory");
    return x;
}

// Buffers that are filled and emptied in turn. `full` completes when all copying threads have arrived, `empty` when the computing warps have.
struct Ring7 {
    uint32_t barriers;  // full, empty of buffer 0, of buffer 1 ...
    int count, at = 0, round = 0;
    __device__ Ring7(uint32_t barriers, int count) : barriers(barriers), count(count) {}
    __device__ void init() const {
        for (int i = 0; i < count; i++) {
            barrier_init(barriers + 16 * i, 128);
            barrier_init(barriers + 16 * i + 8, CONSUMERS7 / 32);
        }
    }
    __device__ void next() {
        if (++at == count) at = 0, round ^= 1;
    }
    __device__ void wait_empty() const { barrier_wait(barriers + 16 * at + 8, round ^ 1); }
    __device__ uint32_t full() const { return barriers + 16 * at; }
    __device__ void wait_full() const { barrier_wait(full(), round); }
    __device__ void release(int i) const {  // by whole warps
        __syncwarp();
        if (threadIdx.x % 32 == 0) barrier_arrive(barriers + 16 * i + 8);
    }
};

// ---- pieces of work -------------------------------------------------------------------------------------------------------------------------------------

// A tile of owned rows, as the computing warps need to know it.
struct Work7 {
    int there;       // of the tile's 128 rows so many exist; 0: there are no more tiles
    int row, head;   // its first row among all rows; its head
    int begin, end;  // the rows of the other sort that matter to it, counted from the sequence's first
    int diagonal;    // keys' kernel: query i sees the keys r <= i − diagonal of the tile; queries' kernel: query r sees the keys j <= r + diagonal
    int number;      // of the tile among those of its head in all sequences, each of which has as many as the longest
};
__device__ inline void store_work(uint32_t address, const Work7& w) {
    asm volatile("st.shared.v4.b32 [%0], {%1,%2,%3,%4};" ::"r"(address), "r"(w.there), "r"(w.row), "r"(w.head), "r"(w.begin) : "memory");
    asm volatile("st.shared.v4.b32 [%0], {%1,%2,%3,%3};" ::"r"(address + 16), "r"(w.end), "r"(w.diagonal), "r"(w.number) : "memory");
}
__device__ inline Work7 load_work(uint32_t address) {
    Work7 w;
    asm volatile("ld.shared.v4.b32 {%0,%1,%2,%3}, [%4];" : "=r"(w.there), "=r"(w.row), "=r"(w.head), "=r"(w.begin) : "r"(address) : "memory");
    asm volatile("ld.shared.v2.b32 {%0,%1}, [%2];" : "=r"(w.end), "=r"(w.diagonal) : "r"(address + 16) : "memory");
    asm volatile("ld.shared.b32 %0, [%1];" : "=r"(w.number) : "r"(address + 24) : "memory");
    return w;
}

// work(sequence, head, tile, number) for the tiles that this block gets: the next one whenever it is done with one. Who computes a tile does not show in the
// results. Heads are taken in groups that have four tiles for each block, those of a group that have most to do first, so that all blocks end at about the same
// time; but of 16 heads at most, so that what a group reads stays in the L2 cache. `counter` starts from 0; `tiles`: of the longest sequence. By the copying
// threads.
template <bool KEYS, class Work>
__device__ __forceinline__ void for_each_tile(const SoftmaxAttention& a, int tiles, int* counter, uint32_t next_tile, Work work) {
    const int heads = KEYS ? a.kv_heads : a.heads, count = a.num_seqs * heads * tiles;
    const int group = min(max((int)gridDim.x * 4 / tiles, 1), 16);
    for (int x = blockIdx.x; x < count;) {
        int next = 0;
        if (threadIdx.x % 128 == 0) next = gridDim.x + atomicAdd(counter, 1);  // comes while this tile is copied
        const int first = x / (group * tiles) * group, in_group = min(group, a.num_seqs * heads - first), rank = x - first * tiles;
        const int seq = (first + rank % in_group) / heads, head = (first + rank % in_group) % heads;
        const int tile = KEYS ? rank / in_group : tiles - 1 - rank / in_group;
        const Sequence s(a, seq, false);
        if (tile * OWN7 < (KEYS ? s.n_k : s.n_q)) work(s, head, tile, seq * tiles + tile);
        if (threadIdx.x % 128 == 0) asm volatile("st.shared.b32 [%0], %1;" ::"r"(next_tile), "r"(next) : "memory");
        named_barrier(1, 128);
        asm volatile("ld.shared.b32 %0, [%1];" : "=r"(x) : "r"(next_tile) : "memory");
        named_barrier(1, 128);
    }
}

// ---- tiles to shared memory -----------------------------------------------------------------------------------------------------------------------------

// A matrix of tokens by heads, as copies see it.
struct Source7 {
    const CUtensorMap* map;
    const floatX* data;
    int64_t stride;
};

// ROWS rows from `row` on and D columns from `column` on into panels, of which `there` rows are the sequence's; by all 128 copying threads, which arrive at
// `barrier` afterwards. Returns the bytes that this thread is to expect there.
template <int D, int ROWS>
__device__ __forceinline__ int load_panels(uint32_t to, const Source7& from, uint32_t barrier, int row, int column, int there) {
    const int t = threadIdx.x % 128;
    constexpr int PANELS = (D + 63) / 64;
    if (there >= ROWS) {
        if (t != 0) return 0;
#pragma unroll
        for (int p = 0; p < PANELS; p++) bulk_load(to + p * (ROWS * 128), from.map, barrier, column + 64 * p, row);
        return PANELS * ROWS * 128;
    }
#pragma unroll 1
    for (int at = t; at < ROWS * (D / 8); at += 128) {
        int r = at / (D / 8), c = at % (D / 8);
        int4 x = r < there ? *(const int4*)(from.data + (row + r) * from.stride + column + c * 8) : make_int4(0, 0, 0, 0);
        uint32_t address = to + c / 8 * (ROWS * 128) + r * 128 + ((c ^ r) & 7) * 16;
        asm volatile("st.shared.v4.b32 [%0], {%1,%2,%3,%4};" ::"r"(address), "r"(x.x), "r"(x.y), "r"(x.z), "r"(x.w) : "memory");
    }
    async_fence();
    return 0;
}
__device__ inline void arrive_loaded(uint32_t barrier, int bytes) {
    if (threadIdx.x % 128 == 0)
        barrier_arrive_expect(barrier, bytes);
    else
        barrier_arrive(barrier);
}

// ---- products -------------------------------------------------------------------------------------------------------------------------------------------

// c = own·otherᵀ over D channels: 64 rows of a tile of 128, by OTHERS rows. Committed, not awaited.
template <int D, int C>
__device__ __forceinline__ void multiply_panels(float (&c)[C], uint32_t own, uint32_t other) {
    constexpr int OTHERS = 2 * C;
    products_begin();
#pragma unroll
    for (int k = 0; k < D / 16; k++)
        product(c, panel_operand(own + k / 4 * (OWN7 * 128)) + k % 4 * 2, panel_operand(other + k / 4 * (OTHERS * 128)) + k % 4 * 2, k > 0);
    products_commit();
}
// The same with the owned rows in registers.
template <int K, int C>
__device__ __forceinline__ void multiply_panels(float (&c)[C], const uint32_t (&own)[K][4], uint32_t other) {
    constexpr int OTHERS = 2 * C;
    products_begin();
#pragma unroll
    for (int k = 0; k < K; k++) product(c, own[k], panel_operand(other + k / 4 * (OTHERS * 128)) + k % 4 * 2, k > 0);
    products_commit();
}
// Owned rows as operands: those of the warp, of the warpgroup's from `own` on.
template <int K>
__device__ __forceinline__ void keep_panels(uint32_t (&kept)[K][4], uint32_t own) {
    const int row = threadIdx.x % 128 / 32 * 16 + threadIdx.x % 16, chunk = threadIdx.x % 32 / 16;
#pragma unroll
    for (int k = 0; k < K; k++) load_matrices(kept[k], own + k / 4 * (OWN7 * 128) + row * 128 + ((k % 4 * 2 + chunk) ^ row % 8) * 16);
}
// Σ_c x_c·y_c for this lane's two rows, of tiles of 128 rows.
template <int D>
__device__ __forceinline__ void dot_panels(float (&sum)[2], uint32_t x, uint32_t y) {
    const int row = threadIdx.x % 128 / 32 * 16 + threadIdx.x % 16, chunk = threadIdx.x % 32 / 16;
    sum[0] = sum[1] = 0;
#pragma unroll
    for (int k = 0; k < D / 16; k++) {
        const uint32_t at = k / 4 * (OWN7 * 128) + row * 128 + ((k % 4 * 2 + chunk) ^ row % 8) * 16;
        uint32_t a[4], b[4];
        load_matrices(a, x + at);
        load_matrices(b, y + at);
#pragma unroll
        for (int i = 0; i < 4; i++) {
            float2 u = unpack_bf16(a[i]), v = unpack_bf16(b[i]);
            sum[i % 2] += u.x * v.x + u.y * v.y;
        }
    }
#pragma unroll
    for (int half = 0; half < 2; half++)
        for (int offset = 1; offset < 4; offset *= 2) sum[half] += __shfl_xor_sync(0xffffffff, sum[half], offset);
}
// c += w·other, w being operands in registers. Committed, not awaited.
template <int K, int C>
__device__ __forceinline__ void accumulate_panels(float (&c)[C], const uint32_t (&w)[K][4], uint32_t other) {
    constexpr int OTHERS = 16 * K;
    products_begin();
#pragma unroll
    for (int k = 0; k < K; k++) product<1>(c, w[k], panel_operand_transposed(other, OTHERS * 128) + k * 128, true);
    products_commit();
}

// 64 rows of numbers in registers, rounded, as operands.
template <int K, int C>
__device__ __forceinline__ void set_operands(uint32_t (&w)[K][4], const float (&x)[C]) {
    static_assert(C == 8 * K, "");
#pragma unroll
    for (int i = 0; i < C; i += 2) w[i / 8][i % 8 / 2] = pack_bf16(x[i], x[i + 1]);
}

// acc·factor, rounded, to the rows of this warp, of which `there` exist; `to` is its first. A lane has two neighbouring numbers of each 8 columns; four lanes
// exchange theirs so that each has 8 neighbours, 16 bytes, of every fourth 8 columns. Two rows exchange then, so that whole lines of 128 bytes are stored.
template <int C>
__device__ __forceinline__ void store_fragments(floatX* to, int64_t stride, const float (&acc)[C], float factor, int there) {
    const int lane = threadIdx.x % 32, row = lane / 4;
    const bool odd = row % 2;
    auto chunk = [&](int c, int half) {  // of columns 8·(c + lane%4) ...
        uint32_t x[4];
#pragma unroll
        for (int i = 0; i < 4; i++) x[i] = pack_bf16(acc[4 * (c + i) + 2 * half] * factor, acc[4 * (c + i) + 2 * half + 1] * factor);
#pragma unroll
        for (int bit = 1; bit < 4; bit *= 2)
#pragma unroll
            for (int i = 0; i < 4; i++) {
                if (i & bit) continue;
                uint32_t got = __shfl_xor_sync(0xffffffff, lane & bit ? x[i] : x[i | bit], bit);
                x[i] = lane & bit ? got : x[i];
                x[i | bit] = lane & bit ? x[i | bit] : got;
            }
        return make_int4(x[0], x[1], x[2], x[3]);
    };
    auto exchanged = [&](int x) { return __shfl_xor_sync(0xffffffff, x, 4); };
#pragma unroll
    for (int half = 0; half < 2; half++)
#pragma unroll
        for (int c = 0; c < C / 4; c += 8) {
            int4 x = chunk(c, half);
            if (c + 8 <= C / 4) {
                int4 y = chunk(c + 4, half), got = odd ? x : y;
                got = make_int4(exchanged(got.x), exchanged(got.y), exchanged(got.z), exchanged(got.w));
                int4 even_row = odd ? got : x, odd_row = odd ? y : got;
                floatX* at = to + (half * 8 + row / 2 * 2) * stride + (c + (odd ? 4 : 0) + lane % 4) * 8;
                if (half * 8 + row / 2 * 2 < there) *(int4*)at = even_row;
                if (half * 8 + row / 2 * 2 + 1 < there) *(int4*)(at + stride) = odd_row;
            } else if (half * 8 + row < there) {
                *(int4*)(to + (half * 8 + row) * stride + (c + lane % 4) * 8) = x;
            }
        }
}

// Sums over the rows of a warpgroup: each warp leaves those over its 16 rows in shared memory, 64 columns; then a thread adds up a column. Rows that do not
// exist are zeros: their P is.
__device__ __forceinline__ void put_column_sums(uint32_t shared, const float (&acc)[32]) {
    const int t = threadIdx.x % 128, lane = t % 32;
    // Eight lanes have sums of the same 16 columns. Half of them take the first ones, the others the rest, and so on: lane l ends with columns 2l and 2l+1.
    float x[16];
#pragma unroll
    for (int i = 0; i < 16; i++) x[i] = acc[i / 2 * 4 + i % 2] + acc[i / 2 * 4 + 2 + i % 2];
#pragma unroll
    for (int step = 0; step < 3; step++) {
        const int half = 8 >> step;
        const bool upper = lane & 2 * half;
#pragma unroll
        for (int i = 0; i < 8; i++) {
            if (i >= half) continue;
            float got = __shfl_xor_sync(0xffffffff, upper ? x[i] : x[half + i], 2 * half);
            x[i] = (upper ? x[half + i] : x[i]) + got;
        }
    }
    asm volatile("st.shared.v2.f32 [%0], {%1,%2};" ::"r"(shared + t * 8), "f"(x[0]), "f"(x[1]) : "memory");
}
__device__ __forceinline__ float get_column_sum(uint32_t shared, int column) {
    float sum = 0;
#pragma unroll
    for (int warp = 0; warp < 4; warp++) sum += load_shared(shared + warp * 256 + column * 4);
    return sum;
}
static __global__ void softmax_backward_bias_kernel7(float* dbias, const float* partial, int rows, int columns) {
    add_partial_columns<8>({dbias}, partial, rows, columns, columns);
}

// ---- keys -----------------------------------------------------------------------------------------------------------------------------------------------

template <class Shape>
__global__ void __launch_bounds__(THREADS7, 1)
    softmax_backward_dkv_kernel7(const __grid_constant__ SoftmaxAttention a, const __grid_constant__ SoftmaxGradients g, float2* stats, int tiles, int* counter,
                                 float* partial, const __grid_constant__ CUtensorMap map_q, const __grid_constant__ CUtensorMap map_k,
                                 const __grid_constant__ CUtensorMap map_v, const __grid_constant__ CUtensorMap map_do) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
    constexpr int DQK = Shape::DQK, DV = Shape::DV, OTHERS = Shape::OTHERS;
    constexpr bool TOGETHER = Shape::ORDER == Order7::TOGETHER, ROUNDED = Shape::ORDER == Order7::ROUNDED;
    extern __shared__ __align__(1024) char softmax_backward_shared7[];
    const uint32_t base = (shared_address(softmax_backward_shared7) + 1023) & ~1023u;
    Ring7 others(base + Shape::BARRIERS, Shape::STAGES), own(others.barriers + 16 * Shape::STAGES, Shape::BUFFERS);
    if (threadIdx.x == 0) {
        others.init();
        own.init();
        barrier_init_fence();
    }
    __syncthreads();
    const int group = a.heads / a.kv_heads;

    if (warp_of_block() >= CONSUMERS7 / 32) {
        fewer_registers<24>();
        const int t = threadIdx.x % 128;
        const Source7 q{&map_q, a.q, a.q_stride}, k{&map_k, a.k, a.k_stride}, v{&map_v, a.v, a.v_stride}, d_o{&map_do, g.d_o, g.do_stride};
        for_each_tile<true>(a, tiles, counter, base + Shape::NEXT, [&](const Sequence& s, int head, int tile, int number) {
            const int j0 = tile * OWN7, there = min(s.n_k - j0, OWN7);
            const Range range = queries_of(a, s, j0, j0 + OWN7);
            own.wait_empty();
            int bytes = 0;
            if (range.begin < range.end) {
                const uint32_t to = base + own.at * Shape::OWN;
                bytes = load_panels<DQK, OWN7>(to, k, own.full(), s.k0 + j0, head * (int)a.k_head, there);
                bytes += load_panels<DV, OWN7>(to + Shape::OWN_QK, v, own.full(), s.k0 + j0, head * (int)a.v_head, there);
            }
            if (t == 0) store_work(base + Shape::WORK + own.at * 32, {there, s.k0 + j0, head, range.begin, range.end, j0 - s.shift, number});
            arrive_loaded(own.full(), bytes);
            own.next();
            for (int h = head * group; h < (head + 1) * group; h++)
                for (int i0 = range.begin; i0 < range.end; i0 += OTHERS) {
                    // Queries behind the end have P = 0.
                    float2 two = t < OTHERS && i0 + t < s.n_q ? stats[h * a.q_rows + s.q0 + i0 + t] : make_float2(INFINITY, 0);
                    others.wait_empty();
                    const uint32_t stage = base + Shape::TILES + others.at * Shape::STAGE;
                    const uint32_t to_stats = base + Shape::TILE_STATS + others.at * Shape::STATS;
                    int bytes = load_panels<DQK, OTHERS>(stage, q, others.full(), s.q0 + i0, h * DQK, s.n_q - i0);
                    bytes += load_panels<DV, OTHERS>(stage + Shape::QK, d_o, others.full(), s.q0 + i0, h * DV, s.n_q - i0);
                    if (t < OTHERS) {
                        asm volatile("st.shared.f32 [%0], %1;" ::"r"(to_stats + t * 4), "f"(two.x) : "memory");
                        asm volatile("st.shared.f32 [%0], %1;" ::"r"(to_stats + OTHERS * 4 + t * 4), "f"(two.y) : "memory");
                    }
                    arrive_loaded(others.full(), bytes);
                    others.next();
                }
        });
        own.wait_empty();
        if (t == 0) store_work(base + Shape::WORK + own.at * 32, {});
        arrive_loaded(own.full(), 0);
    } else {
        more_registers<240>();
        const int warp = warp_of_block(), lane = threadIdx.x % 32;
        const int rows = warp / 4 * 64, row = rows + warp % 4 * 16;  // where the warpgroup's rows begin, and the warp's
        const float scale = a.scale * LOG2E;
        const uint32_t tiles_at = base + Shape::TILES;
        while (true) {
            own.wait_full();
            Work7 w = load_work(base + Shape::WORK + own.at * 32);
            if (w.there == 0) break;
            float dk[DQK / 2] = {}, dv[DV / 2] = {};
            uint32_t kept_k[Shape::KEEP ? DQK / 16 : 1][4], kept_v[Shape::KEEP ? DV / 16 : 1][4];
            const uint32_t k = base + own.at * Shape::OWN + rows * 128, v = k + Shape::OWN_QK;
            if constexpr (Shape::KEEP) {
                keep_panels(kept_k, k);
                keep_panels(kept_v, v);
                own.release(own.at);
            }
            if (w.begin < w.end) {
                int left = group, i0 = w.begin;  // heads to do, and the tile's first query
                auto advance = [&] {
                    i0 += OTHERS;
                    if (i0 >= w.end) i0 = w.begin, left--;
                    others.next();
                };
                // Waits for the next tile in which a query sees any of the warpgroup's keys, false: there is none.
                auto find = [&] {
                    for (; left > 0; advance()) {
                        others.wait_full();
                        const int position = i0 - w.diagonal;
                        if (rows < w.there && position + OTHERS - 1 >= rows && (a.window == 0 || rows + 63 > position - a.window)) return true;
                        others.release(others.at);
                    }
                    return false;
                };
                auto multiply_k = [&](float(&c)[OTHERS / 2], uint32_t other) {
                    if constexpr (Shape::KEEP)
                        multiply_panels(c, kept_k, other);
                    else
                        multiply_panels<DQK>(c, k, other);
                };
                auto multiply_v = [&](float(&c)[OTHERS / 2], uint32_t other) {
                    if constexpr (Shape::KEEP)
                        multiply_panels(c, kept_v, other);
                    else
                        multiply_panels<DV>(c, v, other);
                };
                float p[OTHERS / 2], dp[OTHERS / 2];
                uint32_t weights[OTHERS / 16][4], ds[OTHERS / 16][4];
                auto stage = [&](int i) { return tiles_at + i * Shape::STAGE; };
                auto statistic = [&](int i, int which, int n) {  // of two queries of this lane
                    return load_shared_pair(base + Shape::TILE_STATS + i * Shape::STATS + which * (OTHERS * 4) + n * 32 + lane % 4 * 8);
                };
                // Pᵀ of the tile, from the scores.
                auto exponentials = [&](float(&p)[OTHERS / 2]) {
                    // The last of the block's keys that the tile's first query sees. Unless every query sees all keys: masks.
                    const int position = i0 - w.diagonal;
                    if (rows + 63 > position || (a.window > 0 && rows <= position + OTHERS - 1 - a.window)) {
#pragma unroll
                        for (int half = 0; half < 2; half++) {
                            // The columns [lo, hi) of this lane see the row's key.
                            int lo = row + half * 8 + lane / 4 - position - lane % 4 * 2, hi = a.window > 0 ? lo + a.window : INT_MAX;
#pragma unroll
                            for (int n = 0; n < OTHERS / 8; n++)
#pragma unroll
                                for (int e = 0; e < 2; e++) {
                                    float& x = p[4 * n + 2 * half + e];
                                    x = n * 8 + e >= lo && n * 8 + e < hi ? x : -INFINITY;
                                }
                        }
                    }
#pragma unroll
                    for (int n = 0; n < OTHERS / 8; n++) {
                        float2 lse = statistic(others.at, 0, n);
#pragma unroll
                        for (int e = 0; e < 4; e++) p[4 * n + e] = exp2_fast(p[4 * n + e] * scale - (e % 2 ? lse.y : lse.x));
                    }
                };
                // dSᵀ of tile i, from Pᵀ and dPᵀ.
                auto differentiate = [&](const float(&p)[OTHERS / 2], int i) {
#pragma unroll
                    for (int n = 0; n < OTHERS / 8; n++) {
                        float2 delta = statistic(i, 1, n);
#pragma unroll
                        for (int e = 0; e < 4; e++) {
                            uint32_t pair = weights[n / 2][n % 2 * 2 + e / 2];
                            float weight = ROUNDED ? __uint_as_float(e % 2 ? pair & 0xffff0000 : pair << 16) : p[4 * n + e];
                            dp[4 * n + e] = weight * (dp[4 * n + e] - (e % 2 ? delta.y : delta.x));
                        }
                    }
                    set_operands(ds, dp);
                };
                if (find()) {
                    multiply_k(p, stage(others.at));
                    while (true) {
                        const int now = others.at;
                        if constexpr (ROUNDED) {
                            products_wait<0>();
                        } else {
                            multiply_v(dp, stage(now) + Shape::QK);
                            products_wait<1>();
                        }
                        products_done(p);
                        exponentials(p);
                        bool more = false;
                        if constexpr (TOGETHER) {
                            // Standing here, it also keeps the compiler from waiting for dPᵀ before it makes the exponentials.
                            advance();
                            more = find();
                            products_wait<0>();
                            products_done(dp);
                            differentiate(p, now);
                            set_operands(weights, p);
                            accumulate_panels(dv, weights, stage(now) + Shape::QK);
                            accumulate_panels(dk, ds, stage(now));
                        } else {
                            set_operands(weights, p);
                            if constexpr (ROUNDED) multiply_v(dp, stage(now) + Shape::QK);
                            accumulate_panels(dv, weights, stage(now) + Shape::QK);
                            products_wait<1>();
                            products_done(dp);
                            differentiate(p, now);
                            accumulate_panels(dk, ds, stage(now));
                            advance();
                            more = find();
                        }
                        if (!more) {
                            products_wait<0>();
                            others.release(now);
                            break;
                        }
                        if constexpr (ROUNDED) products_wait<0>();
                        multiply_k(p, stage(others.at));
                        products_wait<1>();
                        others.release(now);
                    }
                }
                products_done(dk);
                products_done(dv);
            }
            if constexpr (!Shape::KEEP) {
                w = load_work(base + Shape::WORK + own.at * 32);  // rather than keep it
                own.release(own.at);
            }
            own.next();
            const int64_t first = w.row + row;
            store_fragments(g.dk + first * g.dk_stride + w.head * g.dk_head, g.dk_stride, dk, a.scale, w.there - row);
            store_fragments(g.dv + first * g.dv_stride + w.head * g.dv_head, g.dv_stride, dv, 1, w.there - row);
            if constexpr (Shape::SUMS) {
                if (partial) {
                    const int t = threadIdx.x % 128, column = t % 64;
                    const uint32_t sums = base + Shape::WARP_SUMS + warp / 4 * 2048;
                    float* to = partial + (2 * w.number + warp / 4) * bias_columns(a) + (a.heads + w.head) * DQK;
                    named_barrier(2 + warp / 4, 128);  // those of the tile before have been read
                    put_column_sums(sums, dk);
                    put_column_sums(sums + 1024, dv);
                    named_barrier(2 + warp / 4, 128);
                    if (t < 64)
                        to[column] = get_column_sum(sums, column) * a.scale;
                    else
                        to[a.kv_heads * DQK + column] = get_column_sum(sums + 1024, column);
                }
            }
        }
    }
#endif
}

// ---- queries --------------------------------------------------------------------------------------------------------------------------------------------

template <class Shape>
__global__ void __launch_bounds__(THREADS7, 1)
    softmax_backward_dq_kernel7(const __grid_constant__ SoftmaxAttention a, const __grid_constant__ SoftmaxGradients g, float2* stats, int tiles, int* counter,
                                float* partial, const __grid_constant__ CUtensorMap map_q, const __grid_constant__ CUtensorMap map_k,
                                const __grid_constant__ CUtensorMap map_v, const __grid_constant__ CUtensorMap map_do,
                                const __grid_constant__ CUtensorMap map_o) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
    constexpr int DQK = Shape::DQK, DV = Shape::DV, OTHERS = Shape::OTHERS;
    constexpr bool PIPELINED = Shape::ORDER == Order7::PIPELINED;
    extern __shared__ __align__(1024) char softmax_backward_shared7[];
    const uint32_t base = (shared_address(softmax_backward_shared7) + 1023) & ~1023u;
    Ring7 others(base + Shape::BARRIERS, Shape::STAGES), own(others.barriers + 16 * Shape::STAGES, Shape::BUFFERS);
    if (threadIdx.x == 0) {
        others.init();
        own.init();
        barrier_init_fence();
    }
    __syncthreads();

    if (warp_of_block() >= CONSUMERS7 / 32) {
        fewer_registers<24>();
        const int t = threadIdx.x % 128;
        const Source7 q{&map_q, a.q, a.q_stride}, k{&map_k, a.k, a.k_stride}, v{&map_v, a.v, a.v_stride}, d_o{&map_do, g.d_o, g.do_stride};
        const Source7 o{&map_o, g.o, g.o_stride};
        for_each_tile<false>(a, tiles, counter, base + Shape::NEXT, [&](const Sequence& s, int head, int tile, int number) {
            const int i0 = tile * OWN7, kv = a.kv_head(head), there = min(s.n_q - i0, OWN7);
            const Range range = keys_of(a, s, i0, i0 + OWN7);
            float lse = t < there ? g.lse[head * a.q_rows + s.q0 + i0 + t] : -INFINITY;
            own.wait_empty();
            const uint32_t to = base + own.at * Shape::OWN;
            int bytes = load_panels<DQK, OWN7>(to, q, own.full(), s.q0 + i0, head * DQK, there);
            bytes += load_panels<DV, OWN7>(to + Shape::OWN_QK, d_o, own.full(), s.q0 + i0, head * DV, there);
            // Rows that see no key have P = 0.
            lse = lse == -INFINITY ? INFINITY : lse * LOG2E;
            asm volatile("st.shared.f32 [%0], %1;" ::"r"(base + Shape::OWNED_STATS + own.at * Shape::OWN_STATS + t * 4), "f"(lse) : "memory");
            if (t == 0) store_work(base + Shape::WORK + own.at * 32, {there, s.q0 + i0, head, range.begin, range.end, i0 + s.shift, number});
            arrive_loaded(own.full(), bytes);
            own.next();
            others.wait_empty();
            arrive_loaded(others.full(), load_panels<DV, OWN7>(base + Shape::TILES + others.at * Shape::STAGE, o, others.full(), s.q0 + i0, head * DV, there));
            others.next();
            for (int j0 = range.begin; j0 < range.end; j0 += OTHERS) {
                others.wait_empty();
                const uint32_t stage = base + Shape::TILES + others.at * Shape::STAGE;
                int bytes = load_panels<DQK, OTHERS>(stage, k, others.full(), s.k0 + j0, kv * (int)a.k_head, s.n_k - j0);
                bytes += load_panels<DV, OTHERS>(stage + Shape::QK, v, others.full(), s.k0 + j0, kv * (int)a.v_head, s.n_k - j0);
                arrive_loaded(others.full(), bytes);
                others.next();
            }
        });
        own.wait_empty();
        if (t == 0) store_work(base + Shape::WORK + own.at * 32, {});
        arrive_loaded(own.full(), 0);
    } else {
        more_registers<240>();
        const int warp = warp_of_block(), lane = threadIdx.x % 32;
        const int rows = warp / 4 * 64, row = rows + warp % 4 * 16;  // where the warpgroup's rows begin, and the warp's
        const float scale = a.scale * LOG2E;
        const uint32_t tiles_at = base + Shape::TILES;
        while (true) {
            own.wait_full();
            Work7 w = load_work(base + Shape::WORK + own.at * 32);
            if (w.there == 0) break;
            float dq[DQK / 2] = {}, lse[2], delta[2];
            uint32_t kept_q[Shape::KEEP ? DQK / 16 : 1][4], kept_do[Shape::KEEP ? DV / 16 : 1][4];
            const uint32_t q = base + own.at * Shape::OWN + rows * 128, d_o = q + Shape::OWN_QK;
            others.wait_full();
            dot_panels<DV>(delta, d_o, tiles_at + others.at * Shape::STAGE + rows * 128);
            others.release(others.at);
            others.next();
#pragma unroll
            for (int half = 0; half < 2; half++) {
                const int r = row + half * 8 + lane / 4;
                lse[half] = load_shared(base + Shape::OWNED_STATS + own.at * Shape::OWN_STATS + r * 4);
                if (r < w.there && lane % 4 == 0) stats[w.head * a.q_rows + w.row + r] = make_float2(lse[half], delta[half]);
            }
            if constexpr (Shape::KEEP) {
                keep_panels(kept_q, q);
                keep_panels(kept_do, d_o);
                own.release(own.at);
            }
            if (w.begin < w.end) {
                int j0 = w.begin;
                auto advance = [&] {
                    j0 += OTHERS;
                    others.next();
                };
                // Waits for the next tile of which any of the warpgroup's queries sees a key, false: there is none.
                auto find = [&] {
                    for (; j0 < w.end; advance()) {
                        others.wait_full();
                        const int position = rows + w.diagonal;
                        if (rows < w.there && j0 <= position + 63 && (a.window == 0 || j0 + OTHERS - 1 > position - a.window)) return true;
                        others.release(others.at);
                    }
                    return false;
                };
                auto multiply_q = [&](float(&c)[OTHERS / 2], uint32_t other) {
                    if constexpr (Shape::KEEP)
                        multiply_panels(c, kept_q, other);
                    else
                        multiply_panels<DQK>(c, q, other);
                };
                auto multiply_do = [&](float(&c)[OTHERS / 2], uint32_t other) {
                    if constexpr (Shape::KEEP)
                        multiply_panels(c, kept_do, other);
                    else
                        multiply_panels<DV>(c, d_o, other);
                };
                float p[OTHERS / 2], dp[OTHERS / 2];
                uint32_t ds[OTHERS / 16][4];
                auto stage = [&](int i) { return tiles_at + i * Shape::STAGE; };
                // P of the tile, from the scores.
                auto exponentials = [&](float(&p)[OTHERS / 2]) {
                    // The last of the tile's keys that the block's first query sees. Unless every query sees all keys: masks.
                    const int position = w.diagonal - j0;
                    if (OTHERS - 1 > position + rows || (a.window > 0 && position + rows + 63 >= a.window)) {
#pragma unroll
                        for (int half = 0; half < 2; half++) {
                            // The columns [lo, hi) of this lane are seen. That ends with the sequence, too: its last query sees its last key.
                            int hi = position + row + half * 8 + lane / 4 + 1 - lane % 4 * 2, lo = a.window > 0 ? hi - a.window : INT_MIN;
#pragma unroll
                            for (int n = 0; n < OTHERS / 8; n++)
#pragma unroll
                                for (int e = 0; e < 2; e++) {
                                    float& x = p[4 * n + 2 * half + e];
                                    x = n * 8 + e >= lo && n * 8 + e < hi ? x : -INFINITY;
                                }
                        }
                    }
#pragma unroll
                    for (int x = 0; x < OTHERS / 2; x++) p[x] = exp2_fast(p[x] * scale - lse[x % 4 / 2]);
                };
                // dS of the tile, from P and dP.
                auto differentiate = [&](const float(&p)[OTHERS / 2]) {
#pragma unroll
                    for (int x = 0; x < OTHERS / 2; x++) dp[x] = p[x] * (dp[x] - delta[x % 4 / 2]);
                    set_operands(ds, dp);
                };
                const bool any = find();
                if (any && PIPELINED) {
                    float p2[OTHERS / 2];
                    int now = -1;
                    // Under way: S of this tile, dQ of the one before, dP of this one.
                    auto weigh = [&](float(&p)[OTHERS / 2]) {
                        products_wait<2>();
                        products_done(p);
                        exponentials(p);
                        products_done(p);
                        products_wait<1>();
                        if (now >= 0) others.release(now);
                        now = others.at;
                        advance();
                    };
                    auto gradients = [&](const float(&p)[OTHERS / 2]) {
                        products_done(dp);
                        differentiate(p);
                        accumulate_panels(dq, ds, stage(now));
                    };
                    products_done(p2);  // all that is to hold products must be what it is before the first one starts
                    products_done(dp);
                    products_done(dq);
                    multiply_q(p, stage(others.at));
                    products_commit();  // in place of dQ of a tile before
                    multiply_do(dp, stage(others.at) + Shape::QK);
                    while (true) {
                        weigh(p);
                        if (!find()) {
                            products_wait<0>();
                            gradients(p);
                            break;
                        }
                        multiply_q(p2, stage(others.at));
                        products_wait<1>();
                        gradients(p);
                        multiply_do(dp, stage(others.at) + Shape::QK);
                        weigh(p2);
                        if (!find()) {
                            products_wait<0>();
                            gradients(p2);
                            break;
                        }
                        multiply_q(p, stage(others.at));
                        products_wait<1>();
                        gradients(p2);
                        multiply_do(dp, stage(others.at) + Shape::QK);
                    }
                    products_wait<0>();
                    others.release(now);
                } else if (any) {
                    multiply_q(p, stage(others.at));
                    while (true) {
                        const int now = others.at;
                        multiply_do(dp, stage(now) + Shape::QK);
                        products_wait<1>();
                        products_done(p);
                        exponentials(p);
                        // Standing here, it also keeps the compiler from waiting for dP before it makes the exponentials.
                        advance();
                        const bool more = find();
                        products_wait<0>();
                        products_done(dp);
                        differentiate(p);
                        accumulate_panels(dq, ds, stage(now));
                        if (!more) {
                            products_wait<0>();
                            others.release(now);
                            break;
                        }
                        multiply_q(p, stage(others.at));
                        products_wait<1>();
                        others.release(now);
                    }
                }
                products_done(dq);
            }
            if constexpr (!Shape::KEEP) {
                w = load_work(base + Shape::WORK + own.at * 32);  // rather than keep it
                own.release(own.at);
            }
            own.next();
            store_fragments(g.dq + (int64_t)(w.row + row) * g.dq_stride + w.head * (int64_t)DQK, g.dq_stride, dq, a.scale, w.there - row);
            if constexpr (Shape::SUMS) {
                if (partial) {
                    const int t = threadIdx.x % 128;
                    const uint32_t sums = base + Shape::WARP_SUMS + warp / 4 * 2048;
                    named_barrier(2 + warp / 4, 128);  // those of the tile before have been read
                    put_column_sums(sums, dq);
                    named_barrier(2 + warp / 4, 128);
                    if (t < 64) partial[(2 * w.number + warp / 4) * bias_columns(a) + w.head * DQK + t] = get_column_sum(sums, t) * a.scale;
                }
            }
        }
    }
#endif
}

// ---- launching ------------------------------------------------------------------------------------------------------------------------------------------

// Rows of a matrix of `heads` heads of d numbers, `head` apart. All rows that are copied this way exist: their number need not be known exactly.
inline CUtensorMap rows_map(const floatX* data, int64_t stride, int heads, int64_t head, int d, int64_t rows, int box) {
    return tensor_map<2>(data, {(heads - 1) * head + d, std::min<int64_t>(std::max<int64_t>(rows, 1), INT_MAX)}, {stride}, {64, box});
}

// The keys' kernel, or the queries', which comes first: it makes the statistics. `partial`: rows for sums, or null.
template <class Shape>
inline void launch7(cudaStream_t stream, const SoftmaxAttention& a, const SoftmaxGradients& g, float2* stats, int* counter, float* partial) {
    constexpr bool KEYS = Shape::KEYS;
    constexpr int q_box = KEYS ? Shape::OTHERS : OWN7, k_box = KEYS ? OWN7 : Shape::OTHERS;
    const int tiles = (int)ceil_div(KEYS ? a.max_k : a.max_q, OWN7);
    const unsigned blocks = std::min(grid_size(a.num_seqs, KEYS ? a.kv_heads : a.heads, tiles), (unsigned)device_properties().multiProcessorCount);
    if (blocks == 0) return;
    const int64_t q_rows = (int64_t)a.num_seqs * a.max_q, k_rows = (int64_t)a.num_seqs * a.max_k;
    const CUtensorMap map_q = rows_map(a.q, a.q_stride, a.heads, a.d_qk, a.d_qk, q_rows, q_box);
    const CUtensorMap map_k = rows_map(a.k, a.k_stride, a.kv_heads, a.k_head, a.d_qk, k_rows, k_box);
    const CUtensorMap map_v = rows_map(a.v, a.v_stride, a.kv_heads, a.v_head, a.d_v, k_rows, k_box);
    const CUtensorMap map_do = rows_map(g.d_o, g.do_stride, a.heads, a.d_v, a.d_v, q_rows, q_box);
    if constexpr (KEYS) {
        auto kernel = softmax_backward_dkv_kernel7<Shape>;
        allow_shared_memory(kernel, Shape::BYTES);
        kernel<<<blocks, THREADS7, Shape::BYTES, stream>>>(a, g, stats, tiles, counter, partial, map_q, map_k, map_v, map_do);
    } else {
        auto kernel = softmax_backward_dq_kernel7<Shape>;
        allow_shared_memory(kernel, Shape::BYTES);
        kernel<<<blocks, THREADS7, Shape::BYTES, stream>>>(a, g, stats, tiles, counter, partial, map_q, map_k, map_v, map_do,
                                                           rows_map(g.o, g.o_stride, a.heads, a.d_v, a.d_v, q_rows, q_box));
    }
    LAUNCH_CHECK();
}

// False: these kernels do not take it. Pointers and strides suit tensor cores. `counters`: two.
inline bool launch7(cudaStream_t stream, const SoftmaxAttention& a, const SoftmaxGradients& g, float2* stats, int* counters) {
    auto launch = [&](auto dq, auto dkv) {
        // Partial rows of sums: two of each tile.
        const int64_t rows = 2 * a.num_seqs * ceil_div(a.max_q, OWN7), columns = bias_columns(a), bytes = rows * columns * (int64_t)sizeof(float);
        float* partial = nullptr;
        if (g.dbias && decltype(dq)::SUMS && a.max_q == a.max_k && bytes <= WORKSPACE_BYTES) partial = (float*)workspace();
        CUDA_CHECK(cudaMemsetAsync(counters, 0, 2 * sizeof(int), stream));
        if (partial && a.num_seqs * (int64_t)a.max_q != a.q_rows) CUDA_CHECK(cudaMemsetAsync(partial, 0, bytes, stream));  // shorter sequences lack tiles
        launch7<decltype(dq)>(stream, a, g, stats, counters, partial);
        launch7<decltype(dkv)>(stream, a, g, stats, counters + 1, partial);
        if (!partial) return launch_bias(stream, a, g);
        softmax_backward_bias_kernel7<<<(unsigned)ceil_div(columns, 8), 512, 0, stream>>>(g.dbias, partial, (int)rows, (int)columns);
        LAUNCH_CHECK();
    };
    if (!hopper_code() || a.dropout.p > 0 || a.max_q == 0 || a.max_k == 0 || !aligned16(g.o) || g.o_stride % 8 != 0) return false;
    //                  d_qk d_v others stages buffers kept
    if (a.d_qk == 64 && a.d_v == 64)
        launch(Shape7<false, 64, 64, 128, 3, 1, true>{}, Shape7<true, 64, 64, 128, 3, 2, false, Order7::TOGETHER>{});
    else if (a.d_qk == 96 && a.d_v == 64)
        launch(Shape7<false, 96, 64, 64, 4, 1, true>{}, Shape7<true, 96, 64, 64, 4, 1, true>{});
    else if (a.d_qk == 128 && a.d_v == 128)
        launch(Shape7<false, 128, 128, 64, 3, 2, false, Order7::PIPELINED>{}, Shape7<true, 128, 128, 64, 3, 2, false>{});
    else if (a.d_qk == 192 && a.d_v == 128)
        launch(Shape7<false, 192, 128, 64, 3, 1, false>{}, Shape7<true, 192, 128, 64, 3, 1, false, Order7::ROUNDED>{});
    else
        return false;
    return true;
}

#endif
}  // namespace softmax_bwd
}  // namespace gpu
