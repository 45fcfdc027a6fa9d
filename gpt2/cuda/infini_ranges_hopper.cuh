// Backward through Infini-attention's memory on Hopper where sequences are few: the linear rule, bf16, 64 numbers a head, as many kv heads as query heads.
// Equations and launchers: infini.cuh.
//
// Under the linear rule the gradient of a memory is a plain sum over the queries of all segments behind it, and only keys need it. So there are two kernels:
//
//     queries   dq = keep·dq + (dn·Mᵀ + dden·zᵀ)⊙Φ'(q);   parts of dM = Σ Φ(q)ᵀdn, dz = Σ Φ(q)ᵀdden, of Σ dA⊙(R−D)
//     keys      dM', dz' = sums of the parts;   dv = keep·dv + dU, dk = keep·dk + (U·dM'ᵀ + dz')⊙Φ'(k);   dβ
//
// Each divides the tiles (64 rows) of all segments of all sequences into ranges of equal work, wherever segments begin. A block takes a range of two
// neighbouring heads, which lie side by side in device memory, 256 bytes of a row: a computing warpgroup for each, and one thread that copies tiles there and
// back, of both heads by turns. It walks from the end of its range to the start. Queries: dM of the sequence stays in registers; it is left in device memory
// where a segment begins (dmemories: for the segment before), and at the start of the range (sums). The keys of a segment need the former, where the next
// segment begins, and the latter of all later ranges, to the end of the sequence. Nobody adds these up but the blocks that need them, in one order.
//
// What else a block loads stands in line behind its own tiles: 12 µs for a memory. So memories, and what the keys need of the next segment, are fetched a
// segment ahead, and the first memories before the first tiles. The keys' blocks begin as those of the queries end, and fetch tiles before they wait for the
// others.
#pragma once

#include "infini_backward_hopper.cuh"

#ifndef GPU_FLOAT32
namespace gpu {

// What the queries leave for the keys, beside dmemories.
struct InfiniParts {
    float* sums;     // (ranges, NH, hs + hs·hs) dz, dM of the range's first sequence, summed over the range
    float* dbeta;    // (ranges, NH) Σ dA⊙(R−D)
    int* beginning;  // (max_memories) the range in which the segment that reads a memory begins
    int* end;        // (num_seqs) the range in which a sequence ends
};

namespace infini_hopper {

constexpr int RANGE_HEADS = 2;

__device__ inline int tiles_of(const InfiniSegment& s) { return (s.q_len + ROWS - 1) / ROWS; }

// Tiles lo ... hi−1 of the list of all segments' tiles, in which each stands `weight` times (0: nothing is to be done), on the way from the last to the first:
// the segment to come, and where in the list its tiles end. A tile belongs to the range that it begins in.
struct Range {
    int lo, hi, segment, end;
    // The next segment with tiles in the range: the first of them, and the one behind the last. False: there is none.
    template <class Weight>
    __device__ bool next(const InfiniPass& p, Weight weight, InfiniSegment* s, int2* tiles) {
        while (end > lo) {
            *s = p.segments[segment--];
            const int n = tiles_of(*s), w = weight(*s);
            end -= n * w;
            if (w == 0) continue;
            *tiles = make_int2(max(0, (lo - end + w - 1) / w), min(n, (hi - end + w - 1) / w));
            if (tiles->x < tiles->y) return true;
        }
        return false;
    }
};
// Range i. By whole warps.
template <class Weight>
__device__ inline Range find_range(const InfiniPass& p, int i, Weight weight) {
    const int lane = threadIdx.x % 32;
    auto count = [&](int segment) {
        if (segment >= p.max_segments) return 0;
        const InfiniSegment& s = p.segments[segment];
        return tiles_of(s) * weight(s);
    };
    int total = 0, sum = 0;
    for (int segment = 0; segment < p.max_segments; segment += 32) infini_sum_before(count(segment + lane), &total);
    Range range = {(int)((int64_t)total * i / p.ranges), (int)((int64_t)total * (i + 1) / p.ranges), -1, 0};
    for (int segment = 0; segment < p.max_segments && sum < range.hi; segment += 32) {
        const int own = count(segment + lane), before = infini_sum_before(own, &sum);
        const unsigned here = __ballot_sync(0xffffffff, own > 0 && before < range.hi);
        if (here == 0) continue;
        const int last = 31 - __clz(here);
        range.segment = segment + last;
        range.end = __shfl_sync(0xffffffff, before + own, last);
    }
    return range;
}

// Shared memory of a block: for each head a memory or its gradient as a panel; stages of four panels, which the heads have by turns.
template <int STAGES>
struct RangeShared {
    static_assert(STAGES % RANGE_HEADS == 0, "a stage belongs to one head");
    static constexpr int AT_NUMBERS = (RANGE_HEADS + STAGES * 4) * PANEL, NUMBERS = HS + 2 * ROWS + 4;  // for each head
    static constexpr int AT_STAGES = AT_NUMBERS + RANGE_HEADS * NUMBERS * 4, BYTES = 1024 + AT_STAGES + STAGES * 32;
    char* base;
    uint32_t address;
    __device__ RangeShared() {
        extern __shared__ char infini_hopper_shared[];
        uint32_t at = shared_address(infini_hopper_shared), up = (1024 - at % 1024) % 1024;
        base = infini_hopper_shared + up;
        address = at + up;
    }
    __device__ uint32_t memory(int head) const { return address + head * PANEL; }
    __device__ uint32_t stage(int i) const { return address + (RANGE_HEADS + i % STAGES * 4) * PANEL; }
    __device__ char* pointer(uint32_t panel) const { return base + (panel - address); }
    __device__ float* z(int head) const { return (float*)(base + AT_NUMBERS) + head * NUMBERS; }
    __device__ float* rows(int head, int i) const { return z(head) + HS + i % 2 * ROWS; }
    __device__ float* warps(int head) const { return z(head) + HS + 2 * ROWS; }
    __device__ int2* tile(int i) const { return (int2*)(base + AT_STAGES + i % STAGES * 32); }
    __device__ uint32_t full(int i) const { return address + AT_STAGES + i % STAGES * 32 + 16; }
    __device__ uint32_t done(int i) const { return full(i) + 8; }
    __device__ void begin() const {
        if (threadIdx.x == 0 && threadIdx.y == 0) {
            for (int i = 0; i < STAGES; i++) barrier_init(full(i), 1), barrier_init(done(i), THREADS);
            barrier_init_fence();
        }
        __syncthreads();
    }
};

// By one thread: tiles of a range come, AHEAD at a time, and results go. load(segment, head, row, stage, barrier); store(head, row, stage).
template <int STAGES, int AHEAD, class Weight, class Load, class Store>
__device__ inline void copy_range(const RangeShared<STAGES>& shared, const InfiniPass& p, Range range, Weight weight, Load load, Store store) {
    int tile = 0;
    auto take = [&](int i) {
        const int2 t = *shared.tile(i);  // its first row, how many
        barrier_wait(shared.done(i), i / STAGES % 2);
        if (t.y >= ROWS) store(i % RANGE_HEADS, t.x, shared.stage(i));  // else its rows are stored already
        bulk_store_commit();
    };
    InfiniSegment s;
    int2 tiles;
    while (range.next(p, weight, &s, &tiles))
        for (int t = tiles.y - 1; t >= tiles.x; t--)
            for (int head = 0; head < RANGE_HEADS; head++, tile++) {
                if (tile >= AHEAD) take(tile - AHEAD);
                load(s, head, s.row + t * ROWS, shared.stage(tile), shared.full(tile));
                *shared.tile(tile) = make_int2(s.row + t * ROWS, s.q_len - t * ROWS);
            }
    for (int i = max(tile - AHEAD, 0); i < tile; i++) take(i);
    bulk_store_wait();
}

}  // namespace infini_hopper

// dq in dqkv (N, qkv_stride) = keep·(what is there) + the memory's part; dmemories[read], parts: above. Blocks: a range, two heads. Threads (THREADS, 3).
template <int STAGES, int AHEAD>
__global__ void __launch_bounds__(3 * infini_hopper::THREADS, 1)
    infini_query_backward_kernel6(const __grid_constant__ CUtensorMap qkv, const __grid_constant__ CUtensorMap D, const __grid_constant__ CUtensorMap dA,
                                  const __grid_constant__ CUtensorMap to_dqkv, InfiniPass p, const float* beta, floatX* dqkv, float* dmemories,
                                  InfiniParts parts) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
    using namespace infini_hopper;
    const RangeShared<STAGES> shared;
    const int pairs = p.heads / RANGE_HEADS, first_head = blockIdx.x % pairs * RANGE_HEADS, range_index = blockIdx.x / pairs;
    const int group = __shfl_sync(0xffffffff, threadIdx.y, 0);  // which the compiler knows to be the same for a warp
    auto weight = [&](const InfiniSegment& s) { return s.read != INFINI_EMPTY || p.gated_first ? 1 : 0; };  // else keep is 1, and dq is complete
    let_next_kernel_start();
    shared.begin();
    Range range = find_range(p, range_index, weight);

    if (group == RANGE_HEADS) {
        fewer_registers<40>();
        if (threadIdx.x < 32) named_barrier(RANGE_HEADS + 1, RANGE_HEADS * THREADS + 32);  // first memories: they would wait behind all these tiles
        if (threadIdx.x == 0)
            copy_range<STAGES, AHEAD>(
                shared, p, range, weight,
                [&](const InfiniSegment&, int head, int row, uint32_t stage, uint32_t full) {
                    const int column = (first_head + head) * HS;
                    barrier_arrive_expect(full, 4 * PANEL);
                    bulk_load(stage, &qkv, full, column, row);
                    bulk_load(stage + PANEL, &dA, full, column, row);
                    bulk_load(stage + 2 * PANEL, &D, full, column, row);
                    bulk_store_wait<STAGES - AHEAD>();  // of the dq that was there
                    bulk_load(stage + 3 * PANEL, &to_dqkv, full, column, row);
                },
                [&](int head, int row, uint32_t stage) { bulk_store(&to_dqkv, stage + 3 * PANEL, (first_head + head) * HS, row); });
        __syncwarp();
    } else {
        more_registers<232>();
        auto meet = [&] { named_barrier(1 + group, THREADS); };  // this warpgroup
        const int h = first_head + group;
        const float beta_h = beta[h];
        const uint32_t M = shared.memory(group);
        float* z = shared.z(group);
        float dM[32], dz[4], sum = 0;  // dz: the numbers row_of(i) in dz[2·i] of every fourth thread
#pragma unroll
        for (int e = 0; e < 32; e++) dM[e] = 0;
#pragma unroll
        for (int e = 0; e < 4; e++) dz[e] = 0;
        auto leave = [&](float* to) {
            store_matrix(to + HS, dM);
#pragma unroll
            for (int e = 0; e < 2; e++)
                if (lane() % 4 == 0) to[row_of(e)] = dz[2 * e];
        };
        float2 coming[16];  // M of the segment to come
        float coming_z = 0;
        InfiniSegment next;
        int2 next_tiles;
        auto fetch = [&] {
            const float* memory = p.memory(next, h);
#pragma unroll
            for (int e = 0; e < 16; e++) coming[e] = memory ? *(const float2*)(memory + HS + 2 * (threadIdx.x + e * THREADS)) : make_float2(0, 0);
            if (threadIdx.x < HS) coming_z = memory ? memory[threadIdx.x] : 0;
        };
        bool more = range.next(p, weight, &next, &next_tiles);
        if (more) fetch();
        named_barrier_arrive(RANGE_HEADS + 1, RANGE_HEADS * THREADS + 32);
        for (int tile = group; more;) {
            const InfiniSegment s = next;
            const int2 tiles = next_tiles;
            if (s.last) {
#pragma unroll
                for (int e = 0; e < 32; e++) dM[e] = 0;
#pragma unroll
                for (int e = 0; e < 4; e++) dz[e] = 0;
                if (h == 0 && threadIdx.x == 0 && tiles.y == tiles_of(s)) parts.end[s.seq] = range_index;
            }
            const float g = p.gate(s, beta_h), keep = 1 - g;
            meet();                                                 // the memory before has been used
            const int row = threadIdx.x / 32, column = lane() * 2;  // number e is 4·e rows below
            const uint32_t to_M[2] = {chunk_at(M, row, column / 8) + column % 8 * 2, chunk_at(M, row + 4, column / 8) + column % 8 * 2};
#pragma unroll
            for (int e = 0; e < 16; e++) store_pair(to_M[e % 2] + e / 2 * 1024, coming[e].x, coming[e].y);
            if (threadIdx.x < HS) z[threadIdx.x] = coming_z;
            async_fence();
            meet();
            more = range.next(p, weight, &next, &next_tiles);
            if (more) fetch();
            for (int t = tiles.y - 1; t >= tiles.x; t--, tile += RANGE_HEADS) {
                const int n = s.q_len - t * ROWS;
                barrier_wait(shared.full(tile), tile / STAGES % 2);
                query_tile(dM, dz, sum, shared.pointer(shared.stage(tile)), M, z, shared.rows(group, tile / RANGE_HEADS), g, keep, n, meet);
                if (n < ROWS) {
                    meet();
                    store_rows(dqkv + (s.row + t * ROWS) * p.qkv_stride() + h * HS, p.qkv_stride(), shared.pointer(shared.stage(tile) + 3 * PANEL), n);
                }
                barrier_arrive(shared.done(tile));
            }
            if (tiles.x == 0 && s.read >= 0) {
                leave(dmemories + p.memory_at(s.read, h));
                if (h == 0 && threadIdx.x == 0) parts.beginning[s.read] = range_index;
            }
        }
        leave(parts.sums + p.memory_at(range_index, h));
        sum = warp_sum(sum);
        if (lane() == 0) shared.warps(group)[threadIdx.x / 32] = sum;
        meet();
        const float* warps = shared.warps(group);
        if (threadIdx.x == 0) parts.dbeta[range_index * p.heads + h] = warps[0] + warps[1] + warps[2] + warps[3];
    }
#endif
}

// dk, dv in dqkv (N, qkv_stride) = keep·(what is there) + the memory's part; dβ. Blocks and threads as before.
template <int STAGES, int AHEAD>
__global__ void __launch_bounds__(3 * infini_hopper::THREADS, 1)
    infini_key_backward_kernel6(const __grid_constant__ CUtensorMap qkv, const __grid_constant__ CUtensorMap to_dqkv, InfiniPass p, const float* beta,
                                float* dbeta, floatX* dqkv, const float* dmemories, InfiniParts parts) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
    using namespace infini_hopper;
    const RangeShared<STAGES> shared;
    const int pairs = p.heads / RANGE_HEADS, first_head = blockIdx.x % pairs * RANGE_HEADS, range_index = blockIdx.x / pairs;
    const int group = __shfl_sync(0xffffffff, threadIdx.y, 0);                          // which the compiler knows to be the same for a warp
    auto is_written = [&](const InfiniSegment& s) { return s.write >= 0 && !s.last; };  // and read in this pass
    // Panels, there and back, in twos; where nothing is written dk, dv alone move, to be multiplied by keep, if that isn't 1.
    auto weight = [&](const InfiniSegment& s) { return is_written(s) ? 3 : s.read != INFINI_EMPTY || p.gated_first ? 2 : 0; };
    let_next_kernel_start();
    shared.begin();
    Range range = find_range(p, range_index, weight);

    if (group == RANGE_HEADS) {
        fewer_registers<40>();
        if (threadIdx.x == 0) {  // needs no wait: the queries' kernel, which began when all before it was done, leaves k, v, dk, dv alone
            const int to_k = p.channels(), to_v = 2 * p.channels();
            copy_range<STAGES, AHEAD>(
                shared, p, range, weight,
                [&](const InfiniSegment& s, int head, int row, uint32_t stage, uint32_t full) {
                    const int column = (first_head + head) * HS;
                    barrier_arrive_expect(full, (is_written(s) ? 4 : 2) * PANEL);
                    if (is_written(s)) {
                        bulk_load(stage, &qkv, full, to_k + column, row);
                        bulk_load(stage + PANEL, &qkv, full, to_v + column, row);
                    }
                    bulk_store_wait<STAGES - AHEAD>();  // of the dk, dv that were there
                    bulk_load(stage + 2 * PANEL, &to_dqkv, full, to_k + column, row);
                    bulk_load(stage + 3 * PANEL, &to_dqkv, full, to_v + column, row);
                },
                [&](int head, int row, uint32_t stage) {
                    const int column = (first_head + head) * HS;
                    bulk_store(&to_dqkv, stage + 2 * PANEL, to_k + column, row);
                    bulk_store(&to_dqkv, stage + 3 * PANEL, to_v + column, row);
                });
        }
        __syncwarp();
    } else {
        more_registers<232>();
        auto meet = [&] { named_barrier(1 + group, THREADS); };  // this warpgroup
        const int h = first_head + group;
        const float beta_h = beta[h];
        const uint32_t dM = shared.memory(group);
        float* dz = shared.z(group);
        wait_for_kernel_before();
        if (range_index == 0 && threadIdx.x < 32) {
            float sum = 0, g = infini_gate(beta_h);
            for (int i = threadIdx.x; i < p.ranges; i += 32) sum += parts.dbeta[i * p.heads + h];
            sum = warp_sum(sum);
            if (threadIdx.x == 0) dbeta[h] += g * (1 - g) * sum;
        }
        // dM' of the segment to come: the sum of the ranges from `from` to the end of the sequence, and what its next segment's beginning has left.
        float4 sum[8] = {}, coming[8];
        float sum_z = 0, coming_z = 0;
        int from = 0, seq = -1;
        InfiniSegment next{};
        int2 next_tiles;
        auto fetch = [&] {
            if (next.seq != seq) {
                seq = next.seq;
                from = parts.end[seq] + 1;
                sum_z = 0;
#pragma unroll
                for (int e = 0; e < 8; e++) sum[e] = make_float4(0, 0, 0, 0);
            }
            const float* part = dmemories + p.memory_at(next.write, h);
#pragma unroll
            for (int e = 0; e < 8; e++) coming[e] = ((const float4*)(part + HS))[threadIdx.x + e * THREADS];
            if (threadIdx.x < HS) coming_z = part[threadIdx.x];
            const int last = parts.beginning[next.write] + 1;
#pragma unroll 3
            for (; from > last; from--) {
                part = parts.sums + p.memory_at(from - 1, h);
                if (threadIdx.x < HS) sum_z += part[threadIdx.x];
#pragma unroll
                for (int e = 0; e < 8; e++) sum[e] = sum_of(sum[e], ((const float4*)(part + HS))[threadIdx.x + e * THREADS]);
            }
        };
        InfiniSegment s{};
        int2 tiles = {0, 0};  // of no segment yet
        bool writes = false;
        for (int tile = group;;) {
            const float keep = 1 - p.gate(s, beta_h);
            if (writes) {  // dM', dz'
                meet();    // those before have been used
                if (threadIdx.x < HS) dz[threadIdx.x] = sum_z + coming_z;
#pragma unroll
                for (int e = 0; e < 8; e++) {
                    const float4 x = sum_of(sum[e], coming[e]);
                    const int at = threadIdx.x + e * THREADS, c = at % 16 * 4;
                    const uint32_t to = chunk_at(dM, at / 16, c / 8) + c % 8 * 2;
                    store_pair(to, x.x, x.y);
                    store_pair(to + 4, x.z, x.w);
                }
                async_fence();
                meet();
            }
            const bool more = range.next(p, weight, &next, &next_tiles);
            if (more && is_written(next)) fetch();
            for (int t = tiles.y - 1; t >= tiles.x; t--, tile += RANGE_HEADS) {
                const uint32_t k_panel = shared.stage(tile), v_panel = k_panel + PANEL, dk = k_panel + 2 * PANEL, dv = k_panel + 3 * PANEL;
                const int n = s.q_len - t * ROWS;
                barrier_wait(shared.full(tile), tile / STAGES % 2);
                if (writes) {
                    uint32_t f[4][4], u[4][4];
                    float dU[32], c[32];
                    load_features(f, k_panel);
                    products_begin();
                    times<1>(dU, f, dM);
                    products_commit();
#pragma unroll
                    for (int k = 0; k < 4; k++) load_matrices(u[k], block_at(v_panel, k));
                    products_wait<0>();
                    products_done(dU);
                    products_begin();
                    times<0>(c, u, dM);  // dΦ(k)
                    products_commit();
#pragma unroll
                    for (int k = 0; k < 4; k++) {
                        uint32_t x[4];
                        load_matrices(x, block_at(dv, k));
#pragma unroll
                        for (int j = 0; j < 4; j++) {
                            float2 d = unpack_bf16(x[j]);
                            x[j] = pack_bf16(keep * d.x + dU[8 * k + 2 * j], keep * d.y + dU[8 * k + 2 * j + 1]);
                        }
                        store_matrices(block_at(dv, k), x);
                    }
                    products_wait<0>();
                    products_done(c);
#pragma unroll
                    for (int k = 0; k < 4; k++) {
                        uint32_t x[4];
                        load_matrices(x, block_at(dk, k));
#pragma unroll
                        for (int j = 0; j < 4; j++) {
                            float2 d = unpack_bf16(x[j]), a = unpack_bf16(f[k][j]), dzc = *(const float2*)(dz + column_of(k, j));
                            x[j] =
                                pack_bf16(keep * d.x + (c[8 * k + 2 * j] + dzc.x) * min(1.f, a.x), keep * d.y + (c[8 * k + 2 * j + 1] + dzc.y) * min(1.f, a.y));
                        }
                        store_matrices(block_at(dk, k), x);
                    }
                } else {
                    scale_two_panels(shared.pointer(dk), keep);
                }
                async_fence();
                if (n < ROWS) {
                    meet();
                    bf16* to = dqkv + (s.row + t * ROWS) * p.qkv_stride() + h * HS;
                    store_rows(to + p.channels(), p.qkv_stride(), shared.pointer(dk), n);
                    store_rows(to + 2 * p.channels(), p.qkv_stride(), shared.pointer(dv), n);
                }
                barrier_arrive(shared.done(tile));
            }
            if (!more) break;
            s = next;
            tiles = next_tiles;
            writes = is_written(s);
        }
    }
#endif
}

}  // namespace gpu
#endif
