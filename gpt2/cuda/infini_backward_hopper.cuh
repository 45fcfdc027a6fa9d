// Backward through Infini-attention's memory on Hopper, a sequence at a time: the gate, dq, dk, dv and the memories' gradients in one kernel. bf16, 64 numbers
// a head, as many kv heads as query heads. Equations and launchers: infini.cuh.
//
// A block (or a cluster of blocks) takes one head of one sequence and walks through its segments from the last to the first. What later segments have to say
// about a memory, dM and dz, stays in registers: no gradient of a memory ever goes to device memory, nothing is summed afterwards, and each row of q, k, v, D,
// dA, dq, dk, dv is read or written once. For segment i, which reads memory M and leaves M', with dM, dz = the gradients of M' when it begins:
//
//     dM' = dM, dz' = dz          rounded to bf16 as an operand of products
//     for tiles of queries        dq = keep·dq + (dn·Mᵀ + dden·zᵀ)⊙Φ'(q);   dM += Φ(q)ᵀdn, dz += Φ(q)ᵀdden;   dβ
//     for tiles of keys           dv = keep·dv + dU, dk = keep·dk + (U·dM'ᵀ + dz')⊙Φ'(k)
//                                 delta: dM += Φ(k)ᵀdn, dz += Φ(k)ᵀdden with dn = −dU/den: its affine maps are never formed
//
// A warpgroup computes, or two that take turns with the tiles; one more thread copies tiles of 64 rows (four panels: q, dA, D, dq or k, v, dk, dv) there and
// back. Few bytes should be on their way: heads that drift apart read memory in pieces of 128 bytes instead of whole rows, and the more each is ahead, the
// farther they drift. 96 blocks that only copy, two tiles being loaded: 360 µs, with three 407. So no more than two are, however many are worked on.
//
// The linear rule is bound by memory with one warpgroup, which has the next memory in registers while it is at the keys. Under the delta rule a tile of
// queries takes a lone warpgroup some 2,500 clocks, one of keys 3,200, most of them waiting: for products, for the special functions, for the other warps. Two
// warpgroups fill each other's gaps. Each has a part of dM, and where a segment ends, each adds up half of both parts.
//
// Where sequences are few (delta alone: infini_sequence_blocks()), the blocks of a cluster take turns with a segment's tiles too. A block copies its part of
// dM into the others' shared memory, goes on with the next segment's queries, and all parts are added up, in the same order by each block, before the first
// key. Where dM is shared in one way or the other, warps that would be idle bring a segment's description and memory while the one before is worked on.
#pragma once

#include "infini_hopper.cuh"

#ifndef GPU_FLOAT32
namespace gpu {

namespace infini_hopper {

constexpr int LOADERS = THREADS - 32;  // threads that bring memories where dM is shared
constexpr int LOADS = 2;               // tiles that are being loaded at a time

__device__ inline void store_pair(uint32_t address, float x, float y) {
    asm volatile("st.shared.u32 [%0], %1;" ::"r"(address), "r"(pack_bf16(x, y)) : "memory");
}
__device__ inline float4 sum_of(float4 a, float4 b) { return make_float4(a.x + b.x, a.y + b.y, a.z + b.z, a.w + b.w); }

// Shared memory of a block that takes a sequence: a memory, dM', stages of four panels. Where dM is shared: also the next segment's memory, and all blocks'
// parts of dM and dz.
template <int CLUSTER, int GROUPS, int STAGES>
struct SequenceShared {
    static constexpr bool TURNS = CLUSTER * GROUPS > 1;
    static constexpr int MEMORIES = TURNS ? 2 : 1, PART = (HS * HS + HS) * 4, AT_PARTS = (MEMORIES + 1 + STAGES * 4) * PANEL;
    static constexpr int AT_NUMBERS = AT_PARTS + (TURNS ? CLUSTER * PART : 0), NUMBERS = (MEMORIES + 1) * HS + 2 * GROUPS * ROWS + 4 * GROUPS;
    static constexpr int AT_STAGES = AT_NUMBERS + NUMBERS * 4, AT_BARRIERS = AT_STAGES + STAGES * 32;
    static constexpr int BYTES = 1024 + AT_BARRIERS + 48 + 2 * (int)sizeof(InfiniSegment);
    char* base;
    uint32_t address;
    __device__ SequenceShared() {
        extern __shared__ char infini_hopper_shared[];
        uint32_t at = shared_address(infini_hopper_shared), up = (1024 - at % 1024) % 1024;
        base = infini_hopper_shared + up;
        address = at + up;
    }
    __device__ uint32_t M(int i) const { return address + i % MEMORIES * PANEL; }
    __device__ uint32_t dM() const { return address + MEMORIES * PANEL; }
    __device__ uint32_t stage(int i) const { return address + (MEMORIES + 1 + i % STAGES * 4) * PANEL; }
    __device__ char* pointer(uint32_t panel) const { return base + (panel - address); }
    __device__ uint32_t part_address(int r) const { return address + AT_PARTS + r * PART; }
    __device__ float4* part(int r) const { return (float4*)(base + AT_PARTS + r * PART); }  // (8, THREADS) of dM as they stand in registers, then dz
    __device__ float* part_z(int r) const { return (float*)part(r) + HS * HS; }
    __device__ float* z(int i) const { return (float*)(base + AT_NUMBERS) + i % MEMORIES * HS; }
    __device__ float* dz() const { return (float*)(base + AT_NUMBERS) + MEMORIES * HS; }
    __device__ float* rows(int i) const { return dz() + HS + i % (2 * GROUPS) * ROWS; }
    __device__ float* warps() const { return dz() + HS + 2 * GROUPS * ROWS; }
    __device__ int4* tile(int i) const { return (int4*)(base + AT_STAGES + i % STAGES * 32); }
    __device__ uint32_t full(int i) const { return address + AT_STAGES + i % STAGES * 32 + 16; }
    __device__ uint32_t done(int i) const { return full(i) + 8; }
    __device__ uint32_t written() const { return address + AT_BARRIERS; }  // parts of dM
    __device__ uint32_t read() const { return written() + 8; }
    __device__ uint32_t memory_full(int i) const { return written() + 16 + i % 2 * 16; }
    __device__ InfiniSegment* segment(int i) const { return (InfiniSegment*)(base + AT_BARRIERS + 48) + i % 2; }
    __device__ uint32_t memory_free(int i) const { return memory_full(i) + 8; }
};

// From this block's shared memory to the same place in block `rank`, and the bytes to the barrier at the same place there.
__device__ inline void copy_to_block(uint32_t address, int bytes, uint32_t barrier, int rank) {
    HOPPER_ONLY(asm volatile("{\n"
                             ".reg .b32 to, remote;\n"
                             "mapa.shared::cluster.u32 to, %0, %3;\n"
                             "mapa.shared::cluster.u32 remote, %2, %3;\n"
                             "cp.async.bulk.shared::cluster.shared::cta.mbarrier::complete_tx::bytes [to], [%0], %1, [remote];\n"
                             "}" ::"r"(address),
                             "r"(bytes), "r"(barrier), "r"(rank)
                             : "memory");)
}

}  // namespace infini_hopper

// dq, dk, dv in dqkv (N, qkv_stride) = keep·(what is there) + the memory's part; partial (num_seqs, NH, CLUSTER) = Σ dA⊙(R−D). CLUSTER blocks a sequence and
// head, GROUPS warpgroups a block that compute: threads (THREADS, GROUPS + 1). At most AHEAD tiles at a time are being loaded or worked on.
// BLOCKS a multiprocessor.
template <bool DELTA, int CLUSTER, int GROUPS, int STAGES, int AHEAD, int BLOCKS>
__global__ void __launch_bounds__(infini_hopper::THREADS*(GROUPS + 1), BLOCKS)
    infini_backward_kernel5(const __grid_constant__ CUtensorMap qkv, const __grid_constant__ CUtensorMap D, const __grid_constant__ CUtensorMap dA,
                            const __grid_constant__ CUtensorMap to_dqkv, InfiniPass p, const float* beta, floatX* dqkv, float* partial) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
    using namespace infini_hopper;
    static_assert(STAGES % GROUPS == 0, "a ring's phases come round to the same warpgroup");
    static_assert(GROUPS <= 2, "each adds up half of both parts of dM");
    constexpr bool TURNS = CLUSTER * GROUPS > 1;
    constexpr int STEP = CLUSTER * ROWS, OWN = 8 / GROUPS;  // OWN: columns of dM, in groups of eight, that a warpgroup adds up
    const SequenceShared<CLUSTER, GROUPS, STAGES> shared;
    const int warpgroup = __shfl_sync(0xffffffff, threadIdx.y, 0);  // which the compiler knows to be the same for a warp
    const int rank = CLUSTER > 1 ? cluster_rank() : 0, h = blockIdx.x / CLUSTER % p.heads, sequence = blockIdx.x / CLUSTER / p.heads;
    const int q_column = h * HS, k_column = p.channels() + h * HS, v_column = 2 * p.channels() + h * HS;
    auto is_read = [&](const InfiniSegment& s) { return s.read != INFINI_EMPTY || p.gated_first; };  // else keep is 1, and dq is complete
    auto is_written = [&](const InfiniSegment& s) { return s.write >= 0 && !s.last; };               // and read in this pass
    let_next_kernel_start();
    if (threadIdx.x == 0 && threadIdx.y == 0) {
        for (int i = 0; i < STAGES; i++) barrier_init(shared.full(i), 1), barrier_init(shared.done(i), THREADS);
        barrier_init(shared.written(), 1);
        for (int i = 0; i < 2; i++) barrier_init(shared.memory_full(i), LOADERS), barrier_init(shared.memory_free(i), GROUPS * THREADS);
        barrier_init(shared.read(), CLUSTER * GROUPS * THREADS / 32);
        barrier_init_fence();
    }
    if (CLUSTER > 1)
        cluster_barrier();
    else
        __syncthreads();

    if (warpgroup == GROUPS) {
        fewer_registers<GROUPS == 2 ? 56 : BLOCKS == 2 ? 48 : 96>();
        if (threadIdx.x == 0) {
            const int begin = p.sequences[sequence].first_segment, end = p.sequences[sequence + 1].first_segment;
            int tile = 0;
            auto store = [&](int i) {
                const int4 t = *shared.tile(i);
                const uint32_t panel = shared.stage(i) + 2 * PANEL;
                barrier_wait(shared.done(i), i / STAGES % 2);
                if (t.y >= ROWS) {  // else its rows are stored already
                    if (t.z >= 0) bulk_store(&to_dqkv, panel, t.z, t.x);
                    bulk_store(&to_dqkv, panel + PANEL, t.w, t.x);
                }
                bulk_store_commit();
            };
            for (int i = end - 1; i >= begin; i--) {
                const InfiniSegment s = p.segments[i];
                for (int keys = 0; keys < 2; keys++) {
                    const bool all = !keys || is_written(s);  // four panels; or dk, dv alone, which only have to be multiplied by keep
                    if (!is_read(s) && !(keys && all)) continue;
                    for (int t = rank * ROWS; t < s.q_len; t += STEP, tile++) {
                        if (tile >= AHEAD) store(tile - AHEAD);
                        if (LOADS < AHEAD && tile >= LOADS) barrier_wait(shared.full(tile - LOADS), (tile - LOADS) / STAGES % 2);
                        const int row = s.row + t;
                        const uint32_t stage = shared.stage(tile), full = shared.full(tile);
                        barrier_arrive_expect(full, (all ? 4 : 2) * PANEL);
                        if (all) {
                            bulk_load(stage, &qkv, full, keys ? k_column : q_column, row);
                            bulk_load(stage + PANEL, keys ? &qkv : &dA, full, keys ? v_column : q_column, row);
                        }
                        bulk_store_wait<STAGES - AHEAD>();  // of what stood there before
                        bulk_load(stage + 2 * PANEL, keys ? &to_dqkv : &D, full, keys ? k_column : q_column, row);
                        bulk_load(stage + 3 * PANEL, &to_dqkv, full, keys ? v_column : q_column, row);
                        // For store(): the first row, how many, the first columns of the last two panels.
                        *shared.tile(tile) = make_int4(row, s.q_len - t, keys ? k_column : -1, keys ? v_column : q_column);
                    }
                }
            }
            for (int i = max(tile - AHEAD, 0); i < tile; i++) store(i);
            bulk_store_wait();
        } else if (TURNS && threadIdx.x >= 32) {
            const int begin = p.sequences[sequence].first_segment, end = p.sequences[sequence + 1].first_segment;
            const int thread = threadIdx.x - 32;
            for (int i = end - 1, use = 0; i >= begin; i--, use++) {
                const InfiniSegment s = p.segments[i];
                const float* memory = p.memory(s, h);
                if (use >= 2) barrier_wait(shared.memory_free(use), (use / 2 - 1) % 2);
#pragma unroll 4
                for (int at = thread; at < HS * HS / 2; at += LOADERS) {
                    const float2 x = memory ? *(const float2*)(memory + HS + 2 * at) : make_float2(0, 0);
                    const int c = at % 32 * 2;
                    store_pair(chunk_at(shared.M(use), at / 32, c / 8) + c % 8 * 2, x.x, x.y);
                }
                if (thread < HS) shared.z(use)[thread] = memory ? memory[thread] : 0;
                if (thread == 0) *shared.segment(use) = s;
                async_fence();
                barrier_arrive(shared.memory_full(use));
            }
        }
        __syncwarp();
    } else {
        more_registers<GROUPS == 2 ? 224 : BLOCKS == 2 ? 208 : 240>();
        const int group = GROUPS > 1 ? warpgroup : 0;
        const int begin = p.sequences[sequence].first_segment, end = p.sequences[sequence + 1].first_segment;
        const float beta_h = beta[h];
        auto meet = [&] { named_barrier(1 + group, THREADS); };                // this warpgroup
        auto meet_all = [&] { named_barrier(1 + GROUPS, GROUPS * THREADS); };  // all that compute
        const uint32_t dM_panel = shared.dM();
        float dM[32], dz[4], sum = 0;  // dz: the numbers row_of(i) in dz[2·i] of every fourth thread
#pragma unroll
        for (int e = 0; e < 32; e++) dM[e] = 0;
#pragma unroll
        for (int e = 0; e < 4; e++) dz[e] = 0;
        auto set_dM = [&](int n, float4 x) {
            store_pair(chunk_at(dM_panel, row_of(0), n) + lane() % 4 * 4, x.x, x.y);
            store_pair(chunk_at(dM_panel, row_of(1), n) + lane() % 4 * 4, x.z, x.w);
        };
        float2 coming[16];  // M of the segment to come
        float coming_z = 0;
        auto fetch = [&](const InfiniSegment& s) {
            const float* memory = p.memory(s, h);
#pragma unroll
            for (int e = 0; e < 16; e++) coming[e] = memory ? *(const float2*)(memory + HS + 2 * (threadIdx.x + e * THREADS)) : make_float2(0, 0);
            if (threadIdx.x < HS) coming_z = memory ? memory[threadIdx.x] : 0;
        };
        if (!DELTA && !TURNS && end > begin) fetch(p.segments[end - 1]);
        int tile = 0, parts = 0, use = 0;
        for (int i = end - 1; i >= begin; i--, use++) {
            if (TURNS) barrier_wait(shared.memory_full(use), use / 2 % 2);
            const InfiniSegment s = TURNS ? *shared.segment(use) : p.segments[i];
            const uint32_t M = shared.M(use);
            const float* z = shared.z(use);
            const bool reads = is_read(s), writes = is_written(s);
            const float g = p.gate(s, beta_h), keep = 1 - g;

            // M, z; dM', dz' or this block's part of them
            if (!TURNS) {
                if (DELTA) fetch(s);                               // there are no registers for it before
                meet();                                            // those of the segment behind have been used
                const int row = threadIdx.x / 32, c = lane() * 2;  // number e is 4·e rows below
                const uint32_t to_M[2] = {chunk_at(M, row, c / 8) + c % 8 * 2, chunk_at(M, row + 4, c / 8) + c % 8 * 2};
#pragma unroll
                for (int e = 0; e < 16; e++) store_pair(to_M[e % 2] + e / 2 * 1024, coming[e].x, coming[e].y);
                if (threadIdx.x < HS) shared.z(use)[threadIdx.x] = coming_z;
            }
            auto own_dM = [&](int n) { return make_float4(dM[4 * n], dM[4 * n + 1], dM[4 * n + 2], dM[4 * n + 3]); };
            if (writes && TURNS) {
                if (parts > 0) barrier_wait(shared.read(), (parts - 1) % 2);
                float4* part = shared.part(rank) + threadIdx.x;
                if (GROUPS > 1) {  // what the other warpgroup adds up
#pragma unroll
                    for (int n = 0; n < 8; n++)
                        if (n / OWN != group) part[n * THREADS] = own_dM(n);
                    if (group > 0 && lane() % 4 == 0) {
#pragma unroll
                        for (int e = 0; e < 2; e++) shared.part_z(rank)[row_of(e)] = dz[2 * e];
                    }
                    meet_all();
                }
#pragma unroll
                for (int n = 0; n < 8; n++)
                    if (n / OWN == group) {
                        float4 x = own_dM(n);
                        if (GROUPS > 1) x = sum_of(x, part[n * THREADS]);
                        if (CLUSTER > 1)
                            part[n * THREADS] = x;
                        else
                            set_dM(n, x);
                    }
                if (group == 0 && lane() % 4 == 0) {
#pragma unroll
                    for (int e = 0; e < 2; e++) {
                        float x = dz[2 * e];
                        if (GROUPS > 1) x += shared.part_z(rank)[row_of(e)];
                        (CLUSTER > 1 ? shared.part_z(rank) : shared.dz())[row_of(e)] = x;
                    }
                }
                async_fence();
                meet_all();
                if (CLUSTER > 1 && threadIdx.x == 0 && group == 0) {
                    barrier_arrive_expect(shared.written(), (CLUSTER - 1) * shared.PART);
                    for (int r = 1; r < CLUSTER; r++) copy_to_block(shared.part_address(rank), shared.PART, shared.written(), (rank + r) % CLUSTER);
                }
            } else if (!TURNS) {
                if (writes) {
#pragma unroll
                    for (int e = 0; e < 2; e++)
                        if (lane() % 4 == 0) shared.dz()[row_of(e)] = dz[2 * e];
#pragma unroll
                    for (int n = 0; n < 8; n++) set_dM(n, own_dM(n));
                }
                async_fence();
                meet();
            }

            // dq, dM, dz, dβ
            for (int t = rank * ROWS; t < s.q_len && reads; t += STEP, tile++) {
                if (tile % GROUPS != group) continue;
                const uint32_t stage = shared.stage(tile);
                const int n = s.q_len - t;
                barrier_wait(shared.full(tile), tile / STAGES % 2);
                query_tile(dM, dz, sum, shared.pointer(stage), M, z, shared.rows(tile), g, keep, n, meet);
                if (n < ROWS) {
                    meet();
                    store_rows(dqkv + (s.row + t) * p.qkv_stride() + q_column, p.qkv_stride(), shared.pointer(stage + 3 * PANEL), n);
                }
                barrier_arrive(shared.done(tile));
            }

            // The sum of all blocks' parts
            if (CLUSTER > 1 && writes) {
                barrier_wait(shared.written(), parts % 2);
                float4 x[OWN];
                const int first = group * OWN;
#pragma unroll
                for (int n = 0; n < OWN; n++) x[n] = shared.part(0)[(first + n) * THREADS + threadIdx.x];
#pragma unroll
                for (int r = 1; r < CLUSTER; r++)
#pragma unroll
                    for (int n = 0; n < OWN; n++) x[n] = sum_of(x[n], shared.part(r)[(first + n) * THREADS + threadIdx.x]);
#pragma unroll
                for (int n = 0; n < OWN; n++) set_dM(first + n, x[n]);
                if (threadIdx.x < HS && group == 0) {
                    float x = shared.part_z(0)[threadIdx.x];
                    for (int r = 1; r < CLUSTER; r++) x += shared.part_z(r)[threadIdx.x];
                    shared.dz()[threadIdx.x] = x;
                }
                __syncwarp();
                if (lane() < CLUSTER) barrier_arrive_at(shared.read(), lane());
                parts++;
                async_fence();
                meet_all();
            }

            if (!DELTA && !TURNS && i > begin) fetch(p.segments[i - 1]);

            // dk, dv, with the delta rule dM and dz too
            for (int t = rank * ROWS; t < s.q_len && (writes || reads); t += STEP, tile++) {
                if (tile % GROUPS != group) continue;
                const uint32_t k_panel = shared.stage(tile), v_panel = k_panel + PANEL, dk = k_panel + 2 * PANEL, dv = k_panel + 3 * PANEL;
                const int n = s.q_len - t;
                barrier_wait(shared.full(tile), tile / STAGES % 2);
                if (writes) {
                    uint32_t f[4][4], u[4][4];
                    float dU[32], c[32], inverse[2], dden[2] = {0, 0};
                    load_features(f, k_panel);
                    products_begin();
                    times<1>(dU, f, dM_panel);
                    if constexpr (DELTA) times<1>(c, f, M);
                    products_commit();
#pragma unroll
                    for (int k = 0; k < 4; k++) load_matrices(u[k], block_at(v_panel, k));
                    if constexpr (DELTA) inverse_denominators(inverse, f, z);
                    products_wait<0>();
                    products_done(dU);
                    if constexpr (DELTA) {
                        products_done(c);
#pragma unroll
                        for (int k = 0; k < 4; k++)
#pragma unroll
                            for (int j = 0; j < 4; j++) {  // U = v − V̂
                                float2 v = unpack_bf16(u[k][j]);
                                int e = 8 * k + 2 * j;
                                float V0 = c[e] * inverse[j % 2], V1 = c[e + 1] * inverse[j % 2];
                                dden[j % 2] += dU[e] * V0 + dU[e + 1] * V1;
                                u[k][j] = pack_bf16(v.x - V0, v.y - V1);
                            }
                    }
                    products_begin();
                    times<0>(c, u, dM_panel);  // dΦ(k)
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
                    if constexpr (DELTA) {  // −Φ/den takes the place of k, dU that of v; dden·den
                        float* r = shared.rows(tile);
#pragma unroll
                        for (int e = 0; e < 2; e++) {
                            dden[e] = sum_of_row(dden[e]);
                            if (lane() % 4 == 0) r[row_of(e)] = row_of(e) < n ? -dden[e] : 0;
                            dden[e] *= inverse[e];
                        }
#pragma unroll
                        for (int k = 0; k < 4; k++) {
                            uint32_t x[4], y[4];
#pragma unroll
                            for (int j = 0; j < 4; j++) {
                                bool there = row_of(j % 2) < n;
                                float2 a = unpack_bf16(f[k][j]);
                                x[j] = there ? pack_bf16(-inverse[j % 2] * a.x, -inverse[j % 2] * a.y) : 0;
                                y[j] = there ? pack_bf16(dU[8 * k + 2 * j], dU[8 * k + 2 * j + 1]) : 0;
                            }
                            store_matrices(block_at(k_panel, k), x);
                            store_matrices(block_at(v_panel, k), y);
                        }
                    }
                    products_wait<0>();
                    products_done(c);
                    if constexpr (DELTA) {
#pragma unroll
                        for (int k = 0; k < 4; k++)
#pragma unroll
                            for (int j = 0; j < 4; j++)
                                u[k][j] = pack_bf16(-inverse[j % 2] * dU[8 * k + 2 * j], -inverse[j % 2] * dU[8 * k + 2 * j + 1]);  // dn
                        async_fence();
                        meet();
                        products_begin();
                        times<0>(c, u, M, true);
#pragma unroll
                        for (int k = 0; k < 4; k++)
                            product<1, 1>(dM, panel_operand_transposed(k_panel, PANEL) + 128 * k, panel_operand_transposed(v_panel, PANEL) + 128 * k, true);
                        products_commit();
#pragma unroll
                        for (int k = 0; k < 4; k++) {
                            uint32_t x[4], w[2];
                            load_matrices_transposed(x, transposed_block_at(k_panel, k));
#pragma unroll
                            for (int e = 0; e < 2; e++) {
                                float2 r = *(const float2*)(shared.rows(tile) + 16 * k + 8 * e + lane() % 4 * 2);
                                w[e] = lane() < 4 ? pack_bf16(r.x, r.y) : 0;
                            }
                            mma(dz, x, w[0], w[1]);
                        }
                        products_wait<0>();
                        products_done(c);
                        products_done(dM);
                    }
#pragma unroll
                    for (int k = 0; k < 4; k++) {
                        uint32_t x[4];
                        load_matrices(x, block_at(dk, k));
#pragma unroll
                        for (int j = 0; j < 4; j++) {
                            float2 d = unpack_bf16(x[j]), a = unpack_bf16(f[k][j]), dzc = *(const float2*)(shared.dz() + column_of(k, j));
                            float d0 = c[8 * k + 2 * j] + dzc.x, d1 = c[8 * k + 2 * j + 1] + dzc.y;
                            if constexpr (DELTA) {
                                float2 zc = *(const float2*)(z + column_of(k, j));
                                d0 += dden[j % 2] * zc.x;
                                d1 += dden[j % 2] * zc.y;
                            }
                            x[j] = pack_bf16(keep * d.x + d0 * min(1.f, a.x), keep * d.y + d1 * min(1.f, a.y));
                        }
                        store_matrices(block_at(dk, k), x);
                    }
                } else {
                    scale_two_panels(shared.pointer(dk), keep);
                }
                async_fence();
                if (n < ROWS) {
                    meet();
                    bf16* to = dqkv + (s.row + t) * p.qkv_stride();
                    store_rows(to + k_column, p.qkv_stride(), shared.pointer(dk), n);
                    store_rows(to + v_column, p.qkv_stride(), shared.pointer(dv), n);
                }
                barrier_arrive(shared.done(tile));
            }
            if (TURNS) barrier_arrive(shared.memory_free(use));
        }
        sum = warp_sum(sum);
        if (lane() == 0) shared.warps()[group * 4 + threadIdx.x / 32] = sum;
        meet_all();
        if (threadIdx.x == 0 && group == 0) {
            for (int w = 1; w < 4 * GROUPS; w++) sum += shared.warps()[w];
            partial[blockIdx.x] = sum;
        }
    }
    if (CLUSTER > 1) cluster_barrier();  // nobody leaves while others read here
#endif
}

}  // namespace gpu
#endif
