// Writing into Infini-attention's memory under the delta rule on Hopper, a sequence at a time: bf16, 64 numbers a head. Equations and launchers: infini.cuh.
//
// A block (or a cluster of blocks) takes one kv head of one sequence and walks through its full segments from the first to the last. What the segment before
// left, M and z, stays in shared memory, M rounded to bf16 as an operand of products, and in float32 in registers: k and v are read once, no affine map is
// formed, and nothing is summed afterwards. For a tile of 64 tokens of a segment:
//
//     V̂ = (Φ(k)M)/den, den = Φ(k)·z + ε       dM += Φ(k)ᵀv − Φ(k)ᵀV̂       dz += Σ Φ(k)
//
// and behind the segment M += dM, z += dz. (v and V̂ are multiplied one behind the other: their difference would have to be rounded.) One thread copies, GROUPS
// warpgroups multiply and take turns with the tiles, as do the blocks of a cluster where sequences are few. Each of these units has a part of dM. Where a
// segment ends, it hands 8/UNITS of its columns (in groups of eight) to each of the others, adds up what it gets for its own, always in the same order, and
// hands the new M, as bf16, to every block: two messages one way each, while the rows of the segment to come are on their way. Between blocks both are stores
// that count towards a barrier: a barrier that releases ordinary stores waits until they have all arrived.
#pragma once

#include "infini_backward_hopper.cuh"

#ifndef GPU_FLOAT32
namespace gpu {

namespace infini_hopper {

// A barrier that blocks of a cluster share: what they have sent is seen behind it.
__device__ inline void cluster_wait(uint32_t barrier, int parity) {
    HOPPER_ONLY(asm volatile("{\n"
                             ".reg .pred done;\n"
                             "again:\n"
                             "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 done, [%0], %1;\n"
                             "@!done bra again;\n"
                             "}" ::"r"(barrier),
                             "r"(parity)
                             : "memory");)
}
// To the same place in block `rank` of the cluster; the bytes count towards the phase of the barrier that stands there: whoever waits for it sees them.
__device__ inline void cluster_store_async(uint32_t address, uint32_t barrier, int rank, uint4 x) {
    HOPPER_ONLY(asm volatile("{\n"
                             ".reg .b32 remote, there;\n"
                             "mapa.shared::cluster.u32 remote, %0, %2;\n"
                             "mapa.shared::cluster.u32 there, %1, %2;\n"
                             "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.b32 [remote], {%3, %4, %5, %6}, [there];\n"
                             "}" ::"r"(address),
                             "r"(barrier), "r"(rank), "r"(x.x), "r"(x.y), "r"(x.z), "r"(x.w)
                             : "memory");)
}
__device__ inline void cluster_store_async(uint32_t address, uint32_t barrier, int rank, float x) {
    HOPPER_ONLY(asm volatile("{\n"
                             ".reg .b32 remote, there;\n"
                             "mapa.shared::cluster.u32 remote, %0, %2;\n"
                             "mapa.shared::cluster.u32 there, %1, %2;\n"
                             "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.b32 [remote], %3, [there];\n"
                             "}" ::"r"(address),
                             "r"(barrier), "r"(rank), "r"(__float_as_uint(x))
                             : "memory");)
}

__device__ inline uint4 bits_of(float4 x) { return make_uint4(__float_as_uint(x.x), __float_as_uint(x.y), __float_as_uint(x.z), __float_as_uint(x.w)); }

// Shared memory of a block: M; two panels of V̂ for each warpgroup; stages of k and v; z; the other units' parts for this block's units, all units' parts of dz.
template <int CLUSTER, int GROUPS, int STAGES>
struct WriteShared {
    static_assert(STAGES % GROUPS == 0, "so many stages for each warpgroup");
    static constexpr int UNITS = CLUSTER * GROUPS, PART = 8 / UNITS * THREADS * 16;  // bytes of a part
    static constexpr int AT_STAGES = (1 + 2 * GROUPS) * PANEL, AT_PARTS = AT_STAGES + STAGES * 2 * PANEL;
    static constexpr int AT_Z = AT_PARTS + GROUPS * (UNITS - 1) * PART, AT_Z_PARTS = AT_Z + HS * 4;
    static constexpr int AT_BARRIERS = AT_Z_PARTS + UNITS * HS * 4, BYTES = 1024 + AT_BARRIERS + STAGES * 16 + 16;
    char* base;
    uint32_t address;
    __device__ WriteShared() {
        extern __shared__ char infini_hopper_shared[];
        uint32_t at = shared_address(infini_hopper_shared), up = (1024 - at % 1024) % 1024;
        base = infini_hopper_shared + up;
        address = at + up;
    }
    __device__ uint32_t M() const { return address; }
    __device__ uint32_t estimate(int group, int i) const { return address + (1 + 2 * group + i % 2) * PANEL; }
    // Each warpgroup has every GROUPS-th stage: its own tiles, counted by i, go through these.
    __device__ int place(int group, int i) const { return i % (STAGES / GROUPS) * GROUPS + group; }
    __device__ int round(int i) const { return i / (STAGES / GROUPS); }
    __device__ uint32_t stage(int place) const { return address + AT_STAGES + place * 2 * PANEL; }
    __device__ char* pointer(uint32_t at) const { return base + (at - address); }
    // Part i, for this block's unit `group`, of this thread: 8/UNITS float4, THREADS apart
    __device__ uint32_t part(int group, int i) const { return address + AT_PARTS + (group * (UNITS - 1) + i) * PART + threadIdx.x * 16; }
    __device__ float* z() const { return (float*)(base + AT_Z); }
    __device__ float* z_part(int unit) const { return (float*)(base + AT_Z_PARTS) + unit * HS; }
    __device__ uint32_t full(int place) const { return address + AT_BARRIERS + place * 16; }
    __device__ uint32_t empty(int place) const { return full(place) + 8; }
    __device__ uint32_t parts() const { return address + AT_BARRIERS + STAGES * 16; }
    __device__ uint32_t memory() const { return parts() + 8; }
};

}  // namespace infini_hopper

// p.memories: what each full segment leaves. CLUSTER blocks a sequence and kv head. Threads (THREADS, GROUPS + 1). BLOCKS a multiprocessor. keys: k|v.
template <int CLUSTER, int GROUPS, int STAGES, int BLOCKS>
__global__ void __launch_bounds__(infini_hopper::THREADS*(GROUPS + 1), BLOCKS) infini_write_kernel5(const __grid_constant__ CUtensorMap keys, InfiniPass p) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
    using namespace infini_hopper;
    static_assert(CLUSTER == 1 || CLUSTER == 4, "four neighbouring lanes hand on to four blocks");
    constexpr int UNITS = CLUSTER * GROUPS, OWN = 8 / UNITS;  // columns, in groups of eight, that a unit adds up
    typedef WriteShared<CLUSTER, GROUPS, STAGES> Memory;
    constexpr int PARTS_BYTES = GROUPS * (UNITS - 1) * Memory::PART + UNITS * HS * 4;
    const Memory shared;
    const int rank = CLUSTER > 1 ? cluster_rank() : 0, kv = blockIdx.x / CLUSTER % p.kv_heads, s = blockIdx.x / CLUSTER / p.kv_heads;
    const int group = __shfl_sync(0xffffffff, threadIdx.y, 0);  // which the compiler knows to be the same for a warp
    const InfiniSequence q = p.sequences[s];
    const int segments = p.sequences[s + 1].first_memory - q.first_memory;  // full ones
    const int tiles = (p.segment + ROWS - 1) / ROWS;                        // of a segment
    if (threadIdx.x == 0 && threadIdx.y == 0) {
        for (int i = 0; i < STAGES; i++) barrier_init(shared.full(i), 1), barrier_init(shared.empty(i), THREADS / 32);
        barrier_init(shared.parts(), CLUSTER > 1 ? 1 : UNITS * THREADS);
        barrier_init(shared.memory(), CLUSTER > 1 ? HS : UNITS * THREADS);
        barrier_init_fence();
    }
    // M, z before the first segment
    const float* start = q.written ? q.block + INFINI_MEMORY + kv * p.memory_size() : nullptr;
    if (group == 0) {
        load_memory(shared.M(), shared.z(), start);
        if (!start && threadIdx.x < HS) shared.z()[threadIdx.x] = p.z_start;
        async_fence();
    }
    if (CLUSTER > 1)
        cluster_barrier();
    else
        __syncthreads();

    if (group == GROUPS) {
        fewer_registers<GROUPS == 2 ? 40 : 24>();
        if (threadIdx.x == 0 && segments > 0) {
            const int first = p.segments[q.first_segment].key_row;
            int tile[GROUPS] = {};
            for (int segment = 0; segment < segments; segment++)
                for (int t = rank * GROUPS; t < tiles; t += UNITS)
#pragma unroll
                    for (int g = 0; g < GROUPS; g++) {
                        if (t + g >= tiles) break;
                        const int row = first + segment * p.segment + (t + g) * ROWS, place = shared.place(g, tile[g]);
                        const uint32_t stage = shared.stage(place), full = shared.full(place);
                        barrier_wait(shared.empty(place), (shared.round(tile[g]++) + 1) % 2);
                        barrier_arrive_expect(full, 2 * PANEL);
                        bulk_load(stage, &keys, full, kv * HS, row);
                        bulk_load(stage + PANEL, &keys, full, (int)p.kv_channels() + kv * HS, row);
                    }
        }
        __syncwarp();
    } else {
        more_registers<GROUPS == 2 ? 232 : 136>();
        auto meet = [&] { named_barrier(1 + group, THREADS); };  // this warpgroup
        const int unit = rank * GROUPS + group;
        const uint32_t M = shared.M();
        float* z = shared.z();
        // dM is this unit's part; of a single unit M itself. own: the float32 M of this unit's columns.
        float dM[32], dz[4] = {0, 0, 0, 0}, own[UNITS > 1 ? 4 * OWN : 1];  // dz: the numbers row_of(i) in dz[2·i] of every fourth thread
#pragma unroll
        for (int n = 0; n < 8; n++)
#pragma unroll
            for (int i = 0; i < 2; i++) {
                float2 x = start && n / OWN == unit ? *(const float2*)(start + HS + row_of(i) * HS + 8 * n + lane() % 4 * 2) : make_float2(0, 0);
                if constexpr (UNITS > 1) {
                    if (n / OWN == unit) own[n % OWN * 4 + 2 * i] = x.x, own[n % OWN * 4 + 2 * i + 1] = x.y;
                    x = make_float2(0, 0);
                }
                dM[4 * n + 2 * i] = x.x;
                dM[4 * n + 2 * i + 1] = x.y;
            }
        if (CLUSTER > 1 && group == 0 && threadIdx.x == 0) barrier_arrive_expect(shared.parts(), PARTS_BYTES);
        int tile = 0;  // of this warpgroup
        for (int segment = 0; segment < segments; segment++) {
            uint32_t zs[4][2];  // z as columns 0 and 1 of an operand B: rounded, and what that leaves
#pragma unroll
            for (int k = 0; k < 4; k++)
#pragma unroll
                for (int i = 0; i < 2; i++) {
                    float2 x = *(const float2*)(z + 16 * k + 8 * i + lane() % 4 * 2);
                    uint32_t high = pack_bf16(x.x, x.y);
                    float2 h = unpack_bf16(high);
                    zs[k][i] = lane() < 4 ? high : lane() < 8 ? pack_bf16(x.x - h.x, x.y - h.y) : 0;
                }
            auto release = [&] {  // the tile before: its products are done
                const uint32_t empty = shared.empty(shared.place(group, tile - 1));
                __syncwarp();
                if (lane() == 0) barrier_arrive(empty);
            };
            for (int t = unit; t < tiles; t += UNITS, tile++) {
                const int place = shared.place(group, tile), n = p.segment - t * ROWS;
                const uint32_t k_panel = shared.stage(place), v_panel = k_panel + PANEL, estimate = shared.estimate(group, tile);
                barrier_wait(shared.full(place), shared.round(tile) % 2);
                if (n < ROWS) {  // rows of the next segment
                    clear_rows(shared.pointer(k_panel), n);
                    clear_rows(shared.pointer(v_panel), n);
                    meet();
                }
                uint32_t f[4][4];
                load_features(f, k_panel);
                float c[32], inverse[2];
                float den[4] = {0, 0, 0, 0};
#pragma unroll
                for (int k = 0; k < 4; k++) mma(den, f[k], zs[k][0], zs[k][1]);
                products_begin();
                times<1>(c, f, M);
                products_commit();
#pragma unroll
                for (int k = 0; k < 4; k++) store_matrices(block_at(k_panel, k), f[k]);  // Φ takes the place of k
#pragma unroll
                for (int i = 0; i < 2; i++) {
                    float x = __shfl_sync(0xffffffff, den[2 * i] + den[2 * i + 1], lane() & ~3);
                    inverse[i] = row_of(i) < n ? -1 / (x + INFINI_EPSILON) : 0;
                }
                products_wait<0>();
                products_done(dM);
                if (t > unit) release();
                products_done(c);
#pragma unroll
                for (int k = 0; k < 4; k++) {  // −V̂
                    uint32_t x[4];
#pragma unroll
                    for (int j = 0; j < 4; j++) x[j] = pack_bf16(inverse[j % 2] * c[8 * k + 2 * j], inverse[j % 2] * c[8 * k + 2 * j + 1]);
                    store_matrices(block_at(estimate, k), x);
                }
                async_fence();
                meet();
                uint32_t x[4][4];  // Φᵀ
#pragma unroll
                for (int k = 0; k < 4; k++) load_matrices_transposed(x[k], transposed_block_at(k_panel, k));
#pragma unroll
                for (int k = 0; k < 4; k++) {  // dz += Φᵀ·1: ones are the first column of an operand B
                    uint32_t one[2];
#pragma unroll
                    for (int i = 0; i < 2; i++) {
                        int token = 16 * k + 8 * i + lane() % 4 * 2;
                        one[i] = lane() >= 4 ? 0 : n >= ROWS ? 0x3f803f80 : (token < n ? 0x3f80 : 0) | (token + 1 < n ? 0x3f800000 : 0);
                    }
                    mma(dz, x[k], one[0], one[1]);
                }
                products_begin();
                times<1>(dM, x, v_panel, true);
                times<1>(dM, x, estimate, true);
                products_commit();
            }
            products_wait<0>();
            products_done(dM);
            if (unit < tiles) release();

            // The segment's end
            const bool more = segment + 1 < segments;
            float* to = p.memories + p.memory_at(q.first_memory + segment, kv);
            auto hand = [&](int n, float4 x) {  // columns 8n ... of M as bf16
                store_pair(chunk_at(M, row_of(0), n) + lane() % 4 * 4, x.x, x.y);
                store_pair(chunk_at(M, row_of(1), n) + lane() % 4 * 4, x.z, x.w);
            };
            auto keep = [&](int n, float4 x) {  // and as float32
                *(float2*)(to + HS + row_of(0) * HS + 8 * n + lane() % 4 * 2) = make_float2(x.x, x.y);
                *(float2*)(to + HS + row_of(1) * HS + 8 * n + lane() % 4 * 2) = make_float2(x.z, x.w);
            };
            auto spread = [&](auto send) {  // parts to the units that add them up
#pragma unroll
                for (int u = 0; u < UNITS; u++) {
#pragma unroll
                    for (int e = 0; e < OWN; e++) {
                        const int n = u * OWN + e;
                        float4 x = make_float4(dM[4 * n], dM[4 * n + 1], dM[4 * n + 2], dM[4 * n + 3]);
                        if (u == unit)
                            own[4 * e] += x.x, own[4 * e + 1] += x.y, own[4 * e + 2] += x.z, own[4 * e + 3] += x.w;
                        else
                            send(u, shared.part(u % GROUPS, unit - (unit > u)) + e * THREADS * 16, bits_of(x));
                    }
                }
            };
            if constexpr (UNITS == 1) {
                if (more) {
#pragma unroll
                    for (int n = 0; n < 8; n++) hand(n, make_float4(dM[4 * n], dM[4 * n + 1], dM[4 * n + 2], dM[4 * n + 3]));
                }
                if (lane() % 4 == 0) {
#pragma unroll
                    for (int i = 0; i < 2; i++) to[row_of(i)] = z[row_of(i)] += dz[2 * i];
                }
                async_fence();
                meet();
#pragma unroll
                for (int n = 0; n < 8; n++) keep(n, make_float4(dM[4 * n], dM[4 * n + 1], dM[4 * n + 2], dM[4 * n + 3]));
            } else if constexpr (CLUSTER > 1) {
                spread([&](int u, uint32_t part, uint4 x) { cluster_store_async(part, shared.parts(), u / GROUPS, x); });
#pragma unroll
                for (int i = 0; i < 2; i++) {  // lane j of four to block j
                    float x = __shfl_sync(0xffffffff, dz[2 * i], lane() & ~3);
                    cluster_store_async(shared_address(shared.z_part(unit) + row_of(i)), shared.parts(), lane() % 4, x);
                }
#pragma unroll
                for (int e = 0; e < 32; e++) dM[e] = 0;
                cluster_wait(shared.parts(), segment % 2);
                if (group == 0 && threadIdx.x < HS) {
                    float x = z[threadIdx.x];
#pragma unroll
                    for (int u = 0; u < UNITS; u++) x += shared.z_part(u)[threadIdx.x];
                    z[threadIdx.x] = x;
                    if (threadIdx.x == 0) {
                        barrier_arrive_expect(shared.parts(), PARTS_BYTES);
                        barrier_arrive_expect(shared.memory(), PANEL);
                    } else {
                        barrier_arrive(shared.memory());
                    }
                    if (rank == 0) to[threadIdx.x] = x;
                }
#pragma unroll
                for (int e = 0; e < OWN; e++) {
#pragma unroll
                    for (int i = 0; i < UNITS - 1; i++) {
                        uint4 x = load_shared(shared.part(group, i) + e * THREADS * 16);
                        own[4 * e] += __uint_as_float(x.x), own[4 * e + 1] += __uint_as_float(x.y);
                        own[4 * e + 2] += __uint_as_float(x.z), own[4 * e + 3] += __uint_as_float(x.w);
                    }
                    if (more) {  // four lanes have eight columns of two rows: lane j hands them to block j
                        const uint32_t low = pack_bf16(own[4 * e], own[4 * e + 1]), high = pack_bf16(own[4 * e + 2], own[4 * e + 3]);
                        uint32_t a[4], b[4];
#pragma unroll
                        for (int j = 0; j < 4; j++) {
                            a[j] = __shfl_sync(0xffffffff, low, (lane() & ~3) + j);
                            b[j] = __shfl_sync(0xffffffff, high, (lane() & ~3) + j);
                        }
                        cluster_store_async(chunk_at(M, row_of(0), unit * OWN + e), shared.memory(), lane() % 4, make_uint4(a[0], a[1], a[2], a[3]));
                        cluster_store_async(chunk_at(M, row_of(1), unit * OWN + e), shared.memory(), lane() % 4, make_uint4(b[0], b[1], b[2], b[3]));
                    }
                }
#pragma unroll
                for (int e = 0; e < OWN; e++) keep(unit * OWN + e, make_float4(own[4 * e], own[4 * e + 1], own[4 * e + 2], own[4 * e + 3]));
                if (more) cluster_wait(shared.memory(), segment % 2);
                async_fence();
            } else {
                spread([&](int u, uint32_t part, uint4 x) { store_shared(part, x); });
                if (lane() % 4 == 0) {
#pragma unroll
                    for (int i = 0; i < 2; i++) shared.z_part(unit)[row_of(i)] = dz[2 * i];
                }
                barrier_arrive(shared.parts());
#pragma unroll
                for (int e = 0; e < 32; e++) dM[e] = 0;
                barrier_wait(shared.parts(), segment % 2);
#pragma unroll
                for (int e = 0; e < OWN; e++)
#pragma unroll
                    for (int i = 0; i < UNITS - 1; i++) {
                        uint4 x = load_shared(shared.part(group, i) + e * THREADS * 16);
                        own[4 * e] += __uint_as_float(x.x), own[4 * e + 1] += __uint_as_float(x.y);
                        own[4 * e + 2] += __uint_as_float(x.z), own[4 * e + 3] += __uint_as_float(x.w);
                    }
                if (group == 0 && threadIdx.x < HS) {
                    float x = z[threadIdx.x];
#pragma unroll
                    for (int u = 0; u < UNITS; u++) x += shared.z_part(u)[threadIdx.x];
                    z[threadIdx.x] = x;
                    to[threadIdx.x] = x;
                }
#pragma unroll
                for (int e = 0; e < OWN; e++) {
                    float4 x = make_float4(own[4 * e], own[4 * e + 1], own[4 * e + 2], own[4 * e + 3]);
                    if (more) hand(unit * OWN + e, x);
                }
                async_fence();
                barrier_arrive(shared.memory());
#pragma unroll
                for (int e = 0; e < OWN; e++) keep(unit * OWN + e, make_float4(own[4 * e], own[4 * e + 1], own[4 * e + 2], own[4 * e + 3]));
                barrier_wait(shared.memory(), segment % 2);
                async_fence();
            }
#pragma unroll
            for (int e = 0; e < 4; e++) dz[e] = 0;
        }
    }
    if (CLUSTER > 1) cluster_barrier();  // nobody leaves while others write here
#endif
}

}  // namespace gpu
#endif
