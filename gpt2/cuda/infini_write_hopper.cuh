// Writing into Infini-attention's memory under the delta rule on Hopper, a sequence at a time: bf16, 64 numbers a head. Equations and launchers: infini.cuh.
//
// A block (or a cluster of blocks) takes one kv head of one sequence and walks through its full segments from the first to the last: k and v are read once.
// What a segment does to M is an affine map, which is gathered in registers, in float32, tile by tile of 64 tokens. With z and M as they are before the
// segment:
//
//     den = Φ(k)·z + ε      G = Φ(k)/den      U += Φ(k)ᵀv      P += Φ(k)ᵀG      dz += Σ Φ(k)
//     behind the segment    M += U − P·M      z += dz
//
// So a tile waits for nothing but z, which is known when the Φ(k) before it are; M, which also waits for products, is not wanted before the next segment's end.
// GROUPS warpgroups take turns with the tiles, as do the blocks of a cluster where sequences are few; Φ of a warpgroup's next tile is computed while products
// of the present one run. Each of these units has a part of dz, U and P, hence of dM = U − P·M. In each segment it
//
//     adds up z of all units' dz; takes its tiles; behind the last of them sends its part of dz to all; waits for M, and sends its part of dM, each 8/UNITS
//     columns (in groups of eight) to the unit they belong to; during the next segment's second tile adds up what it got for its own columns, always in the
//     same order, keeps M there in float32, and sends it rounded to bf16, as an operand of products, to every block.
//
// Hence no message is waited for while it is on its way. Between blocks messages are stores that count towards a barrier: a barrier that releases ordinary
// stores waits until they have all arrived. P is multiplied by M as a sum of two bf16; G is rounded to bf16 as an estimate V̂ = GM would have to be.
#pragma once

#include "infini_hopper.cuh"

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
__device__ inline void cluster_store_async(uint32_t address, uint32_t barrier, int rank, uint32_t x) {
    HOPPER_ONLY(asm volatile("{\n"
                             ".reg .b32 remote, there;\n"
                             "mapa.shared::cluster.u32 remote, %0, %2;\n"
                             "mapa.shared::cluster.u32 there, %1, %2;\n"
                             "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.b32 [remote], %3, [there];\n"
                             "}" ::"r"(address),
                             "r"(barrier), "r"(rank), "r"(x)
                             : "memory");)
}

__device__ inline bool elected() {  // one thread of a warp
    int yes = 0;
    HOPPER_ONLY(asm volatile("{\n.reg .pred p;\nelect.sync _|p, 0xffffffff;\nselp.b32 %0, 1, 0, p;\n}" : "=r"(yes));)
    return yes;
}
__device__ inline uint4 bits_of(float4 x) { return make_uint4(__float_as_uint(x.x), __float_as_uint(x.y), __float_as_uint(x.z), __float_as_uint(x.w)); }

// Shared memory of a block: M; two panels of G for each warpgroup; stages of k and v; all units' parts of dM for this block's units; z for each warpgroup; all
// units' parts of dz, of this segment and the next.
template <int CLUSTER, int GROUPS, int STAGES>
struct WriteShared {
    static_assert(STAGES % GROUPS == 0, "so many stages for each warpgroup");
    static constexpr int UNITS = CLUSTER * GROUPS, PART = 8 / UNITS * THREADS * 16;  // bytes of a part
    static constexpr int AT_STAGES = (1 + 2 * GROUPS) * PANEL, AT_PARTS = AT_STAGES + STAGES * 2 * PANEL;
    static constexpr int AT_Z = AT_PARTS + (UNITS > 1 ? GROUPS * UNITS * PART : 0), AT_Z_PARTS = AT_Z + GROUPS * HS * 4;
    static constexpr int AT_BARRIERS = AT_Z_PARTS + 2 * UNITS * HS * 4, BYTES = 1024 + AT_BARRIERS + STAGES * 8 + 32;
    char* base;
    uint32_t address;
    __device__ WriteShared() {
        extern __shared__ char infini_hopper_shared[];
        uint32_t at = shared_address(infini_hopper_shared), up = (1024 - at % 1024) % 1024;
        base = infini_hopper_shared + up;
        address = at + up;
    }
    __device__ uint32_t M() const { return address; }
    __device__ uint32_t G(int group, int i) const { return address + (1 + 2 * group + i % 2) * PANEL; }
    // Tile i of a warpgroup: its stage and barrier, and the parity of that barrier's phase
    static constexpr int TURNS = STAGES / GROUPS;
    __device__ int place(int group, int i) const { return group * TURNS + i % TURNS; }
    __device__ int parity(int i) const { return i / TURNS % 2; }
    __device__ uint32_t stage(int place) const { return address + AT_STAGES + place * 2 * PANEL; }
    __device__ char* pointer(uint32_t at) const { return base + (at - address); }
    // Unit i's part, for this block's unit `group`, of this thread: 8/UNITS float4, THREADS apart
    __device__ uint32_t part(int group, int i) const { return address + AT_PARTS + (group * UNITS + i) * PART + threadIdx.x * 16; }
    __device__ float* z(int group) const { return (float*)(base + AT_Z) + group * HS; }
    __device__ float* z_part(int segment, int unit) const { return (float*)(base + AT_Z_PARTS) + (segment % 2 * UNITS + unit) * HS; }
    __device__ uint32_t full(int place) const { return address + AT_BARRIERS + place * 8; }
    // Of what is sent: dz of this segment and the next, dM, M
    __device__ uint32_t z_parts(int segment) const { return address + AT_BARRIERS + STAGES * 8 + segment % 2 * 8; }
    __device__ uint32_t parts() const { return address + AT_BARRIERS + STAGES * 8 + 16; }
    __device__ uint32_t memory() const { return parts() + 8; }
};

}  // namespace infini_hopper

// p.memories: what each full segment leaves. CLUSTER blocks a sequence and kv head. Threads (THREADS, GROUPS). BLOCKS a multiprocessor. keys: k|v.
template <int CLUSTER, int GROUPS, int STAGES, int BLOCKS>
__global__ void __launch_bounds__(infini_hopper::THREADS* GROUPS, BLOCKS) infini_write_kernel5(const __grid_constant__ CUtensorMap keys, InfiniPass p) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
    using namespace infini_hopper;
    static_assert(CLUSTER == 1 || CLUSTER == 4, "four neighbouring lanes hand on to four blocks");
    constexpr int UNITS = CLUSTER * GROUPS, OWN = 8 / UNITS;  // columns, in groups of eight, that a unit adds up
    typedef WriteShared<CLUSTER, GROUPS, STAGES> Memory;
    constexpr int PARTS_BYTES = GROUPS * UNITS * Memory::PART, Z_PARTS_BYTES = UNITS * HS * 4;
    const Memory shared;
    auto same = [](int x) { return __shfl_sync(0xffffffff, x, 0); };  // which the compiler then knows to be the same for a warp
    const int rank = CLUSTER > 1 ? same(cluster_rank()) : 0, kv = blockIdx.x / CLUSTER % p.kv_heads, s = blockIdx.x / CLUSTER / p.kv_heads;
    const int group = GROUPS > 1 ? same(threadIdx.y) : 0, warp = same(threadIdx.x / 32), unit = rank * GROUPS + group;
    const InfiniSequence q = p.sequences[s];
    const int segments = p.sequences[s + 1].first_memory - q.first_memory;  // full ones
    const int tiles = max((p.segment + ROWS - 1) / ROWS, UNITS);            // of a segment: one for each unit at least, if an empty one
    if (threadIdx.x == 0 && threadIdx.y == 0) {
        for (int i = 0; i < STAGES; i++) barrier_init(shared.full(i), 1);
        for (uint32_t barrier : {shared.z_parts(0), shared.z_parts(1), shared.parts(), shared.memory()})
            barrier_init(barrier, CLUSTER > 1 ? 1 : UNITS * THREADS);
        barrier_init_fence();
    }
    __syncthreads();

    // Tiles of this unit: the next one to be loaded begins at row row_coming, and is tile t_coming of a segment behind which segments_coming − 1 follow
    int tiles_coming = 0, segments_coming = segments, t_coming = unit, row_coming = q.first_key + unit * ROWS;
    auto load = [&] {
        if (segments_coming == 0) return;
        const int place = shared.place(group, tiles_coming++);
        if (warp == 0 && elected()) {
            const uint32_t stage = shared.stage(place), full = shared.full(place);
            barrier_arrive_expect(full, 2 * PANEL);
            bulk_load(stage, &keys, full, kv * HS, row_coming);
            bulk_load(stage + PANEL, &keys, full, (int)p.kv_channels() + kv * HS, row_coming);
        }
        t_coming += UNITS;
        row_coming += UNITS * ROWS;
        if (t_coming >= tiles) {
            row_coming += p.segment - (t_coming - unit) * ROWS;
            t_coming = unit;
            segments_coming--;
        }
    };
    for (int i = 0; i < Memory::TURNS; i++) load();

    // M, z before the first segment
    const float* start = q.written ? q.block + INFINI_MEMORY + kv * p.memory_size() : nullptr;
    const uint32_t M = shared.M();
    float* z = shared.z(group);
    if (group == 0) {
        load_memory(M, z, start);
        async_fence();
    }
    if (threadIdx.x < HS) z[threadIdx.x] = start ? start[threadIdx.x] : p.z_start;
    // This unit's parts; of a single unit U is M + U. own: the float32 M of this unit's columns. dz: the numbers row_of(i), of each half of a tile's tokens, in
    // dz[...][2·i] of every fourth thread.
    float U[32], P[32], dz[2][4] = {}, own[UNITS > 1 ? 4 * OWN : 1];
#pragma unroll
    for (int n = 0; n < 8; n++)
#pragma unroll
        for (int i = 0; i < 2; i++) {
            float2 x = start && n / OWN == unit ? *(const float2*)(start + HS + row_of(i) * HS + 8 * n + lane() % 4 * 2) : make_float2(0, 0);
            if constexpr (UNITS > 1) {
                if (n / OWN == unit) own[n % OWN * 4 + 2 * i] = x.x, own[n % OWN * 4 + 2 * i + 1] = x.y;
                x = make_float2(0, 0);
            }
            U[4 * n + 2 * i] = x.x;
            U[4 * n + 2 * i + 1] = x.y;
            P[4 * n + 2 * i] = P[4 * n + 2 * i + 1] = 0;
        }
    if (CLUSTER > 1)
        cluster_barrier();
    else
        __syncthreads();

    // What units tell one another. Between blocks these are stores that count towards a barrier there, which one thread has to tell how much will come; within
    // a block ordinary ones, behind which every thread arrives.
    auto send = [&](uint32_t to, uint32_t barrier, int block, auto x) {
        if constexpr (CLUSTER > 1)
            cluster_store_async(to, barrier, block, x);
        else
            store_shared(to, x);
    };
    auto sent = [&](uint32_t barrier) {
        if (CLUSTER == 1) barrier_arrive(barrier);
    };
    auto expect = [&](uint32_t barrier, int bytes) {
        if (CLUSTER > 1 && group == 0 && threadIdx.x == 0) barrier_arrive_expect(barrier, bytes);
    };
    auto receive = [&](uint32_t barrier, int phase) {
        if (CLUSTER > 1)
            cluster_wait(barrier, phase % 2);
        else
            barrier_wait(barrier, phase % 2);
    };
    for (int i = 0; i < 2; i++) expect(shared.z_parts(i), Z_PARTS_BYTES);
    expect(shared.parts(), PARTS_BYTES);

    auto meet = [&] { named_barrier(1 + group, THREADS); };  // this warpgroup
    auto memory_of = [&](int segment) { return p.memories + p.memory_at(q.first_memory + segment, kv); };
    auto keep = [&](int segment, int n, float4 x) {  // columns 8n ... of M behind a segment
        float* to = memory_of(segment) + HS + 8 * n + lane() % 4 * 2;
        *(float2*)(to + row_of(0) * HS) = make_float2(x.x, x.y);
        *(float2*)(to + row_of(1) * HS) = make_float2(x.z, x.w);
    };
    auto hand = [&](int n, float4 x) {  // as bf16, to every block
        const uint32_t above = pack_bf16(x.x, x.y), below = pack_bf16(x.z, x.w);
        if constexpr (CLUSTER == 1) {
            store_shared(chunk_at(M, row_of(0), n) + lane() % 4 * 4, above);
            store_shared(chunk_at(M, row_of(1), n) + lane() % 4 * 4, below);
        } else {  // four lanes have eight columns of two rows: lane j hands them to block j
            uint32_t a[4], b[4];
#pragma unroll
            for (int j = 0; j < 4; j++) {
                a[j] = __shfl_sync(0xffffffff, above, (lane() & ~3) + j);
                b[j] = __shfl_sync(0xffffffff, below, (lane() & ~3) + j);
            }
            send(chunk_at(M, row_of(0), n), shared.memory(), lane() % 4, make_uint4(a[0], a[1], a[2], a[3]));
            send(chunk_at(M, row_of(1), n), shared.memory(), lane() % 4, make_uint4(b[0], b[1], b[2], b[3]));
        }
    };
    auto send_z = [&](int segment) {  // lane j of four to block j
#pragma unroll
        for (int i = 0; i < 2; i++) {
            const float x = __shfl_sync(0xffffffff, dz[0][2 * i] + dz[1][2 * i], lane() & ~3);
            const uint32_t to = shared_address(shared.z_part(segment, unit) + row_of(i));
            if (lane() % 4 < CLUSTER) send(to, shared.z_parts(segment), lane() % 4, __float_as_uint(x));
        }
        sent(shared.z_parts(segment));
#pragma unroll
        for (int e = 0; e < 8; e++) dz[e / 4][e % 4] = 0;
    };
    // z behind a segment, when all units have sent their parts
    auto add_up_z = [&](int segment) {
        receive(shared.z_parts(segment), segment / 2);
        expect(shared.z_parts(segment), Z_PARTS_BYTES);
        if (threadIdx.x < HS) {
            float x = z[threadIdx.x];
#pragma unroll
            for (int u = 0; u < UNITS; u++) x += shared.z_part(segment, u)[threadIdx.x];
            z[threadIdx.x] = x;
            if (unit == 0) memory_of(segment)[threadIdx.x] = x;
        }
        meet();
    };
    // M behind a segment, of this unit's columns, when all units have sent their parts
    auto add_up = [&](int segment) {
        receive(shared.parts(), segment);
        expect(shared.parts(), PARTS_BYTES);
        expect(shared.memory(), PANEL);
#pragma unroll
        for (int e = 0; e < OWN; e++) {
#pragma unroll
            for (int u = 0; u < UNITS; u++) {
                uint4 x = load_shared(shared.part(group, u) + e * THREADS * 16);
                own[4 * e] += __uint_as_float(x.x), own[4 * e + 1] += __uint_as_float(x.y);
                own[4 * e + 2] += __uint_as_float(x.z), own[4 * e + 3] += __uint_as_float(x.w);
            }
            if (segment + 1 < segments) hand(unit * OWN + e, make_float4(own[4 * e], own[4 * e + 1], own[4 * e + 2], own[4 * e + 3]));
        }
        if (CLUSTER == 1) async_fence();
        sent(shared.memory());
#pragma unroll
        for (int e = 0; e < OWN; e++) keep(segment, unit * OWN + e, make_float4(own[4 * e], own[4 * e + 1], own[4 * e + 2], own[4 * e + 3]));
    };

    // A tile's Φ, as operands A, also in the place of k. Tokens behind the segment's end count as zeros, so do their v. (Behind the last tile comes something
    // that is not used.)
    const int unit_tiles = (tiles - unit + UNITS - 1) / UNITS * segments;
    uint32_t f[4][4];
    auto features = [&](int tile, int t) {
        const int there = min(tile, unit_tiles - 1), n = max(p.segment - t * ROWS, 0);
        const uint32_t k_panel = shared.stage(shared.place(group, tile));
        barrier_wait(shared.full(shared.place(group, there)), shared.parity(there));
        load_features(f, k_panel);
        if (n < ROWS) {
#pragma unroll
            for (int k = 0; k < 16; k++)
                if (row_of(k % 2) >= n) f[k / 4][k % 4] = 0;
            clear_rows(shared.pointer(k_panel + PANEL), n);
        }
#pragma unroll
        for (int k = 0; k < 4; k++) store_matrices(block_at(k_panel, k), f[k]);
    };

    // Parts are added up behind the second tile, or the only one: by then they have come, and there is time for M to arrive before the segment's end.
    const int second = unit + UNITS < tiles ? unit + UNITS : unit;
    const uint32_t ones = lane() < 4 ? 0x3f803f80 : 0;  // the first column of an operand B
    int tile = 0;
    if (segments > 0) features(0, unit);
    for (int segment = 0; segment < segments; segment++) {
        const float minus = start || segment > 0 ? -1 : 0;  // before the first segment there may be nothing: V̂ is zero, and z may be
        if (segment > 0) add_up_z(segment - 1);
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
        for (int t = unit; t < tiles; t += UNITS, tile++) {
            const uint32_t k_panel = shared.stage(shared.place(group, tile)), v_panel = k_panel + PANEL, G = shared.G(group, tile);
            float den[2][4] = {};
#pragma unroll
            for (int k = 0; k < 4; k++) mma(den[k / 2], f[k], zs[k][0], zs[k][1]);
            __nv_bfloat162 high[2], low[2];  // −1/den of two rows, in two parts
#pragma unroll
            for (int i = 0; i < 2; i++) {
                float x = __shfl_sync(0xffffffff, den[0][2 * i] + den[0][2 * i + 1] + (den[1][2 * i] + den[1][2 * i + 1]), lane() & ~3);
                float y = __fdividef(minus, x + INFINI_EPSILON);
                high[i] = __float2bfloat162_rn(y);
                low[i] = __float2bfloat162_rn(y - __low2float(high[i]));
            }
#pragma unroll
            for (int k = 0; k < 4; k++) {  // −G, rounded once
                uint32_t x[4];
#pragma unroll
                for (int j = 0; j < 4; j++) {
                    const __nv_bfloat162 y = *(__nv_bfloat162*)&f[k][j], g = __hfma2(y, high[j % 2], __hmul2(y, low[j % 2]));
                    x[j] = *(const uint32_t*)&g;
                }
                store_matrices(block_at(G, k), x);
            }
            async_fence();
            meet();
            uint32_t x[4][4];  // Φᵀ
#pragma unroll
            for (int k = 0; k < 4; k++) load_matrices_transposed(x[k], transposed_block_at(k_panel, k));
#pragma unroll
            for (int k = 0; k < 4; k++) mma(dz[k / 2], x[k], ones, ones);  // dz += Φᵀ·1
            products_begin();
            times<1>(U, x, v_panel, UNITS == 1 || t > unit);
            times<1>(P, x, G, t > unit);
            products_commit();
            if (t + UNITS >= tiles) send_z(segment);
            if (tile > 0) load();  // where the tile before was
            features(tile + 1, t + UNITS < tiles ? t + UNITS : unit);
            if constexpr (UNITS > 1)
                if (t == second && segment > 0) add_up(segment - 1);
            products_wait<0>();
            products_done(U);
            products_done(P);
        }

        // The segment's end
        uint32_t a[4][4];  // −P, rounded, and then what that leaves
#pragma unroll
        for (int e = 0; e < 16; e++) {
            const float2 x = make_float2(P[2 * e], P[2 * e + 1]);
            a[e / 4][e % 4] = pack_bf16(x.x, x.y);
            const float2 rounded = unpack_bf16(a[e / 4][e % 4]);
            P[2 * e] = x.x - rounded.x, P[2 * e + 1] = x.y - rounded.y;
        }
        if (UNITS > 1 && segment > 0) receive(shared.memory(), segment - 1);
        async_fence();
        products_begin();
        times<1>(U, a, M, true);
        uint32_t b[4][4];
#pragma unroll
        for (int e = 0; e < 16; e++) b[e / 4][e % 4] = pack_bf16(P[2 * e], P[2 * e + 1]);
        products_begin();
        times<1>(U, b, M, true);
        products_commit();
        products_wait<0>();
        products_done(U);
        if (UNITS == 1) meet();  // M has been read
#pragma unroll
        for (int n = 0; n < 8; n++) {
            const float4 x = make_float4(U[4 * n], U[4 * n + 1], U[4 * n + 2], U[4 * n + 3]);
            if constexpr (UNITS == 1) {
                hand(n, x);
                keep(segment, n, x);
            } else {
                const int u = n / OWN;  // whose columns these are
                send(shared.part(u % GROUPS, unit) + n % OWN * THREADS * 16, shared.parts(), u / GROUPS, bits_of(x));
            }
        }
        if (UNITS == 1)
            async_fence();
        else
            sent(shared.parts());
    }
    if (segments > 0) {
        add_up_z(segments - 1);
        if constexpr (UNITS > 1) add_up(segments - 1);
    }
    if (CLUSTER > 1) cluster_barrier();  // nobody leaves while others write here
#endif
}

}  // namespace gpu
#endif
