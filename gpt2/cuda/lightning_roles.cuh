// Lightning attention for Hopper, head sizes up to 64: forward and backward by blocks whose warpgroups have roles. Formulas, chunks and tiles are those of
// lightning_hopper.cuh.
//
// A block has a multiprocessor for itself. In a ring of stages in shared memory a chunk's tiles are on their way, several chunks ahead, while earlier ones are
// worked on; who is ready goes on without waiting for the others. Barriers in brackets:
//
//     forward     a warp           starts the copies of q, k, v                                                  [full]
//                 warpgroup 0      S before the chunk as bf16 [ready], then S behind it
//                 1, 2             every second chunk each: SiLU of k, v [active]; o, from SiLU of q in registers
//                                  S's place is free [taken], the stage is [empty]
//     backward    a warpgroup      starts the copies of q, k, v, dO and, for every second chunk, S               [full]
//                 warpgroup 0      D behind the chunk as bf16 [ready], then D before it
//                 1, 2, 3          SiLU of v, k, q, and SiLU' in the place of the raw numbers, a chunk ahead [ready]; dV, dK, dQ
//                                  places of SiLU and D are free [used], S's is [state_used], the stage is [empty]
//
// So one sequence and head goes through a multiprocessor two to three times as fast as through a block of lightning_hopper.cuh, which does everything in turn,
// and no more of them have to be on their way than there are multiprocessors. That matters because of what must be read twice. Where sequences and heads are
// few, a sequence is cut, and the state where it is cut is a sum over the tokens before: over chunks_that_count(), wherever the cut is. Fewer cuts, fewer
// bytes. So each block has one *range* of spans of 128 tokens (Lightning::range), which may end in one sequence and go on in the next. Before that
// lightning_span_kernel8 sums up *tails*, eight chunks each, of those next to a border between two ranges; Σ λ^distance·tail is where a range starts.
//
// Memory likes to be read in longer pieces than the 128 bytes that a head has of a token: blocks of a cluster have neighbouring heads and copy in step (Pace).
#pragma once

#include "lightning_hopper.cuh"

#ifndef GPU_FLOAT32

namespace gpu {

namespace lightning_roles {

using namespace lightning_wgmma;
using lightning_mma::lane, lightning_mma::power;

constexpr int TILE = PANEL;  // 64 rows of 64 numbers: of a chunk, or a state

// A shared address without the number of the block in its cluster, which must not reach a descriptor.
__device__ __forceinline__ uint32_t operand(uint32_t address) { return address & 0x3ffff; }

// Places in shared memory.
struct Forward {
    static constexpr int STAGES = 7, STATES = 3, THREADS = 3 * 128 + 32;
    static constexpr int STAGE = 3 * TILE;                    // q, k, v
    static constexpr int STATE = STAGES * STAGE;              // S before a chunk
    static constexpr int OUT = STATE + STATES * TILE;         // o, of each of two warpgroups
    static constexpr int TABLES = OUT + 2 * TILE;             // factors, of each; weights
    static constexpr int BARRIERS = TABLES + 2 * 1024 + 256;  // full, active, empty (STAGES); ready, taken (STATES)
    static constexpr int SHARED = BARRIERS + 8 * (3 * STAGES + 2 * STATES + 1);
};
struct Backward {
    static constexpr int STAGES = 4, THREADS = 5 * 128;
    static constexpr int STAGE = 4 * TILE;                    // q, k, v, later SiLU', later the gradients; dO
    static constexpr int ACTIVE = STAGES * STAGE;             // two slots: SiLU of q, k, v; D
    static constexpr int STATE = ACTIVE + 2 * STAGE;          // S before every second chunk, two of them
    static constexpr int TABLES = STATE + 2 * TILE;           // factors, of each of three warpgroups; weights
    static constexpr int BARRIERS = TABLES + 3 * 1024 + 256;  // full, empty (STAGES); ready, used, state_used (2)
    static constexpr int SHARED = BARRIERS + 8 * (2 * STAGES + 3 * 2 + 1);
};

// A place in a ring of N, and the parity of the phase that its barriers are in.
template <int N>
struct Ring {
    int at = 0, parity = 0;
    __device__ void next() {
        if (++at == N) at = 0, parity ^= 1;
    }
};

// Calls f(span, head, chunks) for each of this block's spans: whole sequences, or what its range has of each sequence, as one long span; BACKWARDS from the
// range's end.
template <bool BACKWARDS, class F>
__device__ __forceinline__ void for_spans(const Lightning& g, F f) {
    const int slots = (int)g.slots();
    int at = g.range ? blockIdx.x / g.heads * g.range : blockIdx.x;  // a slot; without ranges its number times heads, and the head
    int end = g.range ? min(slots, at + g.range) : slots * g.heads;
    while (at < end) {
        const int slot = g.range == 0 ? at / g.heads : BACKWARDS ? end - 1 : at, h = (g.range ? blockIdx.x : at) % g.heads;
        LightningSpan q;
        const bool there = g.find(slot, q);
        int taken = g.range ? 1 : gridDim.x;
        if (there && g.range) {
            taken = min(end - at, BACKWARDS ? q.index + 1 : q.spans - q.index);
            if (BACKWARDS)
                q.first -= (taken - 1) * g.span;
            else
                q.index += taken - 1;
            q.n = min(taken * g.span, q.end - q.begin - q.first);
        }
        if (BACKWARDS && g.range)
            end -= taken;
        else
            at += taken;
        if (there) f(q, h, (q.n + CHUNK - 1) / CHUNK);
    }
}

// The state before a span, or, BACKWARDS, the gradient D behind it: the numbers of a thread of warpgroup 0. Where a range begins (ends) inside a sequence that
// is a sum over tails, the nearest first. The WARPGROUPS warpgroups from 0 on, which all call this, take them in turn. exchange: shared memory, 16 KB for each
// but the first, which is free.
template <bool BACKWARDS, int WARPGROUPS>
__device__ __forceinline__ void start_state(float (&s)[32], const Lightning& g, const LightningSpan& q, int h, int role, int warp, float slope2,
                                            float* exchange) {
    const int hs = g.hs;
    const float* from = BACKWARDS || role > 0 ? nullptr : g.start(q.seq, h);
    const float decay = power(slope2, (float)q.first);
    for_state(s, 0, warp, [&](int i, int j, float& x) { x = from && i < hs && j < hs ? decay * from[i * hs + j] : 0; });
    const int there = BACKWARDS ? q.end - q.begin - q.first - q.n : q.first;  // tokens on the border's other side
    if (g.range == 0 || there == 0) return;
    const int border = blockIdx.x / g.heads + BACKWARDS, of_range = g.tails(g.range_chunks());
    const int count = g.tails(min((there + CHUNK - 1) / CHUNK, chunks_that_count(slope2)));
    for (int d = role; d < count; d += WARPGROUPS) {
        const int away = d / of_range, a = d % of_range;
        const float *p = g.tail_sum(BACKWARDS ? border + away : border - away, a, h), w = power(slope2, 64.f * (float)(away * g.range_chunks() + a * g.tail));
        float2 x[16];
#pragma unroll
        for (int n = 0; n < 16; n++) {
            const int i = 16 * warp + lane() / 4 + n % 2 * 8, j = n / 2 * 8 + lane() % 4 * 2;
            x[n] = i < hs && j < hs ? *(const float2*)(p + i * hs + j) : make_float2(0, 0);
        }
#pragma unroll
        for (int n = 0; n < 16; n++) s[n / 2 * 4 + n % 2 * 2] += w * x[n].x, s[n / 2 * 4 + n % 2 * 2 + 1] += w * x[n].y;
    }
    exchange += threadIdx.x % 128;
    if (role > 0)
#pragma unroll
        for (int x = 0; x < 32; x++) exchange[(role - 1) * TILE / 2 + x * 128] = s[x];
    named_barrier(8, 128 * WARPGROUPS);
    if (role == 0)
#pragma unroll
        for (int r = 0; r < WARPGROUPS - 1; r++)
#pragma unroll
            for (int x = 0; x < 32; x++) s[x] += exchange[r * TILE / 2 + x * 128];
    named_barrier(8, 128 * WARPGROUPS);
}

// How many clusters have begun a step, modulo 2^16: the first one counts for all that are missing to 2^16. So a counter has gone round when all have begun,
// and nobody need set it back before the next launch.
constexpr int STEPS = 1024;
static __device__ unsigned lightning_steps_begun[STEPS];

// Blocks of a cluster have neighbouring heads of the same span. Their copies keep in step, so that what lies side by side in memory is fetched at one time.
//
// And memory does not serve all clusters alike: on a GPC that holds four they take longer than on one that holds three. Left alone they would end that much
// later, while memory is half idle. So nobody copies much beyond the beginning of a step before all have begun the one before; the answer to whether they have
// is on its way until the next chunk's turn. Only time depends on it, no result: who has asked in vain for long (a launch on another stream counts in the same
// places) waits no more.
struct Pace {
    uint32_t barrier;
    int blocks, step, steps;
    int parity = 0, begun = 0, left = 0, patience = 256;
    unsigned missing = 0;  // 0: all have begun the step before
    bool counts = steps > 0 && blockIdx.x % blocks == 0;

    __device__ void begin_step() { atomicAdd(lightning_steps_begun + begun++, blockIdx.x == 0 ? 65537 - gridDim.x / blocks : 1); }
    __device__ void ask() { missing = *(volatile const unsigned*)(lightning_steps_begun + begun - 2) & 0xffff; }
    // Before a chunk's copies are started, and when they are.
    __device__ void wait() {
        for (int asked = 0; missing && patience; asked++) {
            ask();
            if (asked == patience) patience = 0;
        }
        if (blocks == 1) return;
        for (int r = 0; r < blocks; r++) barrier_arrive_at(barrier, r);
        barrier_wait(barrier, parity);
        parity ^= 1;
    }
    __device__ void started() {
        if (!counts || left-- > 0 || begun == steps) return;
        left = step - 1;
        begin_step();
        if (begun > 1) ask();
    }
    // No chunk is left.
    __device__ void finish() {
        while (counts && begun < steps) begin_step();
    }
};
__device__ inline int cluster_size() {
    int n = 1;
    HOPPER_ONLY(asm volatile("mov.u32 %0, %%cluster_nctaid.x;" : "=r"(n));)
    return n;
}

// How a kernel of this file begins: who a thread is, and, seen by the whole cluster, the barriers that `init(blocks of a cluster)` makes.
struct Who {
    int role, warp, blocks;  // warpgroup, warp of that, blocks of a cluster
    bool leader;             // of a warpgroup
};
template <class F>
__device__ __forceinline__ Who begin(F init) {
    const int thread = threadIdx.x;
    const Who who = {__shfl_sync(0xffffffff, thread / 128, 0), __shfl_sync(0xffffffff, thread / 32 % 4, 0), cluster_size(), thread % 128 == 0};
    if (threadIdx.x == 0) {
        init(who.blocks);
        barrier_init_fence();
    }
    if (who.blocks > 1) cluster_barrier();
    __syncthreads();
    return who;
}

// A warpgroup's factors for products of 64 by 64 tokens (lightning_wgmma::factor_table), when a head begins.
__device__ __forceinline__ void new_table(float* table, int role, bool queries, float slope2, float scale) {
    named_barrier(1 + role, 128);  // nobody reads the last head's any more
    factor_table(table, queries, slope2, scale, threadIdx.x % 128, 128);
    named_barrier(1 + role, 128);
}

// s = decay·s + (diag(weights)·X)ᵀ·Y: a state from one end of a chunk to the other.
__device__ __forceinline__ void next_state(float (&s)[32], uint32_t X, uint32_t Y, const float* weights, float decay, int warp) {
    uint32_t a[4][4];
    transposed_rows(a, X, warp, [&](uint32_t x, int token) {
        const float2 y = unpack_bf16(x), w = *(const float2*)(weights + token);
        return pack_bf16(y.x * w.x, y.y * w.y);
    });
#pragma unroll
    for (int x = 0; x < 32; x++) s[x] *= decay;
    products_begin();
#pragma unroll
    for (int d = 0; d < 4; d++) product<1>(s, a[d], panel_operand_transposed(operand(Y), PANEL) + 128 * d, true);
    products_commit();
    products_wait<0>();
    products_done(s);
}

// The first n rows of a tile, of hs numbers each, by a warpgroup: a bulk copy would write them all.
__device__ __forceinline__ void store_rows(floatX* to, int64_t stride, uint32_t tile, int n, int hs) {
    for (int piece = threadIdx.x % 8, r = threadIdx.x % 128 / 8; r < n; r += 16)
        if (8 * piece < hs) *(uint4*)(to + r * stride + 8 * piece) = load_shared(tile + r * 128 + ((piece ^ r % 8) << 4));
}

}  // namespace lightning_roles

// o of this block's spans, from first chunks to last; with `leave_states` S before every second chunk too. With g.range g.borders: tails.
__global__ void __launch_bounds__(lightning_roles::Forward::THREADS, 1)
    lightning_forward_kernel8(const Lightning g, floatX* o_out, const __grid_constant__ LightningMaps maps, bool leave_states) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
    using namespace lightning_roles;
    using Shape = Forward;
    constexpr int STAGES = Shape::STAGES, STATES = Shape::STATES;
    extern __shared__ __align__(1024) unsigned char lightning_hopper_memory[];
    const uint32_t memory = shared_address(lightning_hopper_memory), full = memory + Shape::BARRIERS, active = full + 8 * STAGES, empty = active + 8 * STAGES,
                   ready = empty + 8 * STAGES, taken = ready + 8 * STATES;
    const Who who = begin([&](int blocks) {
        for (int s = 0; s < STAGES; s++) {
            barrier_init(full + 8 * s, 1);
            barrier_init(active + 8 * s, 1);
            barrier_init(empty + 8 * s, 8);  // warps that make S and o
        }
        for (int s = 0; s < STATES; s++) {
            barrier_init(ready + 8 * s, 1);
            barrier_init(taken + 8 * s, 4);  // warps that make o
        }
        barrier_init(taken + 8 * STATES, blocks);
    });
    const int role = who.role, warp = who.warp;
    const bool leader = who.leader;

    Ring<STAGES> stage;
    Ring<STATES> state;
    if (role == 3) {
        Pace pace = {taken + 8 * STATES, who.blocks, g.step, g.steps};
        if (leader) {
            for_spans<false>(g, [&](const LightningSpan& q, int h, int chunks) {
                for (int k = 0; k < chunks; k++, stage.next()) {
                    const uint32_t barrier = full + 8 * stage.at;
                    barrier_wait(empty + 8 * stage.at, stage.parity ^ 1);
                    pace.wait();
                    barrier_arrive_expect(barrier, 3 * TILE);
#pragma unroll
                    for (int t = 0; t < 3; t++)
                        bulk_load(memory + stage.at * Shape::STAGE + t * TILE, &maps.u, barrier, 0, t * g.heads + h, q.begin + q.first + k * CHUNK);
                    pace.started();
                }
            });
            pace.finish();
        }
    } else if (role == 0) {
        if (g.range) wait_for_kernel_before();  // for tails. All that is written waits for S, too
        const Place place(warp);
        float* weights = (float*)(lightning_hopper_memory + Shape::TABLES) + 2 * 256;  // of a chunk's tokens, from its last one on
        for_spans<false>(g, [&](const LightningSpan& q, int h, int chunks) {
            const float slope2 = (float)(g.slope(h) * 1.4426950408889634);
            float s[32];
            start_state<false, 3>(s, g, q, h, 0, warp, slope2, (float*)(lightning_hopper_memory + Shape::STATE));
            for (int k = 0; k < chunks; k++, stage.next(), state.next()) {
                const uint32_t K = memory + stage.at * Shape::STAGE + TILE, V = K + TILE, S = memory + Shape::STATE + state.at * TILE;
                const int n = min(CHUNK, q.n - CHUNK * k);
                if (k == 0 || n < CHUNK) {
                    named_barrier(1, 128);
                    if (threadIdx.x < CHUNK) weights[threadIdx.x] = power(slope2, (float)max(n - 1 - (int)threadIdx.x, 0));
                }
                barrier_wait(taken + 8 * state.at, state.parity ^ 1);
                store_state(S, TILE, place, s);
                async_fence();
                if (leader) bulk_store_wait();  // all of S that has been left: the next chunk's may take its place
                named_barrier(1, 128);
                if (leader) {
                    barrier_arrive(ready + 8 * state.at);
                    if (leave_states && g.leaves(q, k)) {
                        bulk_store(&maps.states, S, 0, 0, g.state(q, k, h), 0);
                        bulk_store_commit();
                    }
                }
                __syncwarp();
                barrier_wait(active + 8 * stage.at, stage.parity);
                next_state(s, K, V, weights, power(slope2, (float)n), warp);
                if (lane() == 0) barrier_arrive(empty + 8 * stage.at);
                __syncwarp();
            }
            // A sequence that has begun in another range may still have to be read there: lightning_finish_kernel carries its state to where it belongs.
            float* to = q.index == q.spans - 1 ? g.finish(q.seq, h) : nullptr;
            if (to && q.first > 0) to = g.tail_sum(blockIdx.x / g.heads, 0, h);
            if (to)
                for_state(s, 0, warp, [&](int i, int j, float& x) {
                    if (i < g.hs && j < g.hs) to[i * g.hs + j] = x;
                });
        });
        if (leader) bulk_store_wait();
    } else {
        const uint32_t out = memory + Shape::OUT + (role - 1) * TILE;
        float* table = (float*)(lightning_hopper_memory + Shape::TABLES) + (role - 1) * 256;
        bool mine = role == 1;  // the chunks are taken in turn
        if (g.range) wait_for_kernel_before();
        for_spans<false>(g, [&](const LightningSpan& q, int h, int chunks) {
            const float slope2 = (float)(g.slope(h) * 1.4426950408889634);
            new_table(table, role, true, slope2, g.scale);
            {
                float s[32];  // of no use here
                start_state<false, 3>(s, g, q, h, role, warp, slope2, (float*)(lightning_hopper_memory + Shape::STATE));
            }
            for (int k = 0; k < chunks; k++, stage.next(), state.next(), mine = !mine) {
                if (!mine) continue;
                int warp = who.warp;
                asm volatile("" : "+r"(warp));  // what follows from it is made for each chunk again, rather than kept in registers
                const Place place(warp);
                const int row = 16 * warp + lane() / 4;
                const float* factor = first_factor(table, warp);
                const float above = g.scale * power(slope2, (float)(row + 1)), below = g.scale * power(slope2, (float)(row + 9));
                const uint32_t Q = memory + stage.at * Shape::STAGE, K = Q + TILE, V = K + TILE, S = memory + Shape::STATE + state.at * TILE;
                const int n = min(CHUNK, q.n - CHUNK * k), first = q.begin + q.first + k * CHUNK;
                barrier_wait(full + 8 * stage.at, stage.parity);
#pragma unroll
                for (int t = 1; t < 3; t++)
                    for_pieces<64>(Q + t * TILE, threadIdx.x % 128, [&](int row, uint32_t at, uint4 x) {
                        x = lightning_mma::silus(x);
                        store_shared(at, row < n ? x : make_uint4(0, 0, 0, 0));
                    });
                async_fence();
                named_barrier(1 + role, 128);
                if (leader) barrier_arrive(active + 8 * stage.at);
                __syncwarp();
                uint32_t a[4][4];
#pragma unroll
                for (int d = 0; d < 4; d++) {
                    load_matrices(a[d], Q + (16 * warp + lane() % 16) * 128 + (((2 * d + lane() / 16) ^ lane() % 8) << 4));
#pragma unroll
                    for (int e = 0; e < 4; e++) a[d][e] = lightning_mma::silus(a[d][e]);
                }
                barrier_wait(ready + 8 * state.at, state.parity);
                float c[32], o[32];
                products_begin();
#pragma unroll
                for (int d = 0; d < 4; d++) product(c, a[d], panel_operand(operand(K)) + 2 * d, d > 0);
#pragma unroll
                for (int d = 0; d < 4; d++) product<1>(o, a[d], panel_operand_transposed(operand(S), PANEL) + 128 * d, d > 0);
                products_commit();
                products_wait<0>();
                products_done(c);
                products_done(o);
                if (lane() == 0) barrier_arrive(taken + 8 * state.at);
                __syncwarp();
                weigh(a, c, factor);
#pragma unroll
                for (int i = 0; i < 32; i++) o[i] *= i % 4 < 2 ? above : below;
                sum_values(o, a, 0, operand(V), true);
                if (lane() == 0) barrier_arrive(empty + 8 * stage.at);
                if (leader) bulk_store_wait();  // this warpgroup's last o has left
                named_barrier(1 + role, 128);
#pragma unroll
                for (int m = 0; m < 8; m++)
#pragma unroll
                    for (int e = 0; e < 2; e++) store_shared(out + place(m) + e * 1024, pack_bf16(o[4 * m + 2 * e], o[4 * m + 2 * e + 1]));
                async_fence();
                named_barrier(1 + role, 128);
                if (n == CHUNK) {
                    if (leader) {
                        bulk_store(&maps.out, out, 0, h, first, 0);
                        bulk_store_commit();
                    }
                } else {
                    store_rows(o_out + (int64_t)first * g.channels() + h * g.hs, g.channels(), out, n, g.hs);
                }
                __syncwarp();
            }
        });
        if (leader) bulk_store_wait();
    }
    if (who.blocks > 1) cluster_barrier();  // nobody arrives here any more
#endif
}

// All gradients of this block's spans, from last chunks to first. With g.range g.borders: tails. g.start(): S before a sequence's first chunk.
__global__ void __launch_bounds__(lightning_roles::Backward::THREADS, 1)
    lightning_backward_kernel9(const Lightning g, floatX* du, const __grid_constant__ LightningMaps maps) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
    using namespace lightning_roles;
    using Shape = Backward;
    constexpr int STAGES = Shape::STAGES;
    extern __shared__ __align__(1024) unsigned char lightning_hopper_memory[];
    uint32_t memory = shared_address(lightning_hopper_memory);
    // Of the i-th chunk that this block takes: its places, and their barriers.
    auto stage = [&](unsigned i) { return memory + i % STAGES * Shape::STAGE; };
    auto active = [&](unsigned i) { return memory + Shape::ACTIVE + i % 2 * Shape::STAGE; };
    auto full = [&](unsigned i) { return memory + Shape::BARRIERS + i % STAGES * 8; };
    auto empty = [&](unsigned i) { return full(i) + STAGES * 8; };
    auto ready = [&](unsigned i) { return memory + Shape::BARRIERS + (2 * STAGES + i % 2) * 8; };
    auto used = [&](unsigned i) { return ready(i) + 2 * 8; };
    // Of the i-th that has an even number: S before it.
    auto state = [&](unsigned i) { return memory + Shape::STATE + i % 2 * TILE; };
    auto state_used = [&](unsigned i) { return ready(i) + 4 * 8; };
    const Who who = begin([&](int blocks) {
        for (int s = 0; s < STAGES; s++) {
            barrier_init(full(s), 1);
            barrier_init(empty(s), 4 + 3);  // warps that make D; leaders of the others, when their gradient has left
        }
        for (int s = 0; s < 2; s++) {
            barrier_init(ready(s), 4);       // leaders of all warpgroups
            barrier_init(used(s), 16);       // warps that make D and gradients
            barrier_init(state_used(s), 4);  // that make dQ
        }
        barrier_init(ready(0) + 6 * 8, blocks);
    });
    const int role = who.role, warp = who.warp;
    const bool leader = who.leader;

    unsigned i = 0, even = 0;  // chunks so far, and those with even numbers
    if (role == 4) {
        fewer_registers<40>();
        Pace pace = {ready(0) + 6 * 8, who.blocks, g.step, g.steps};
        if (leader) {
            for_spans<true>(g, [&](const LightningSpan& q, int h, int chunks) {
                for (int chunk = chunks - 1; chunk >= 0; chunk--, i++) {
                    const uint32_t barrier = full(i), to = stage(i);
                    const bool left = g.leaves(q, chunk);
                    const int row = q.begin + q.first + chunk * CHUNK;
                    barrier_wait(empty(i), ~(i / STAGES) & 1);
                    if (chunk % 2 == 0) barrier_wait(state_used(even), ~(even / 2) & 1);
                    pace.wait();
                    barrier_arrive_expect(barrier, (left ? 5 : 4) * TILE);
#pragma unroll
                    for (int t = 0; t < 3; t++) bulk_load(to + t * TILE, &maps.u, barrier, 0, t * g.heads + h, row);
                    bulk_load(to + 3 * TILE, &maps.d_o, barrier, 0, h, row);
                    if (left) bulk_load(state(even), &maps.states, barrier, 0, 0, g.state(q, chunk, h), 0);
                    if (chunk % 2 == 0) even++;
                    pace.started();
                }
            });
            pace.finish();
        }
    } else if (role == 0) {
        fewer_registers<80>();
        if (g.range) wait_for_kernel_before();  // for tails. All that is written waits for D, too
        const Place place(warp);
        float* weights = (float*)(lightning_hopper_memory + Shape::TABLES) + 3 * 256;  // of a chunk's tokens, from its first one on
        for_spans<true>(g, [&](const LightningSpan& q, int h, int chunks) {
            const float slope2 = (float)(g.slope(h) * 1.4426950408889634);
            float s[32];
            start_state<true, 4>(s, g, q, h, 0, warp, slope2, (float*)(lightning_hopper_memory + Shape::ACTIVE));
            named_barrier(1, 128);
            if (threadIdx.x < CHUNK) weights[threadIdx.x] = g.scale * power(slope2, threadIdx.x + 1.f);
            named_barrier(1, 128);
            for (int chunk = chunks - 1; chunk >= 0; chunk--, i++) {
                asm volatile("" : "+r"(memory));
                const uint32_t raw = stage(i), dO = raw + 3 * TILE, Q = active(i);
                const int n = min(CHUNK, q.n - CHUNK * chunk);
                barrier_wait(used(i), ~(i / 2) & 1);
                store_state(Q + 3 * TILE, TILE, place, s);
                async_fence();
                named_barrier(1, 128);
                if (leader) barrier_arrive(ready(i));
                __syncwarp();
                barrier_wait(full(i), i / STAGES & 1);
                barrier_wait(ready(i), i / 2 & 1);
                next_state(s, Q, dO, weights, power(slope2, (float)n), warp);
                if (lane() == 0) barrier_arrive(used(i)), barrier_arrive(empty(i));
                __syncwarp();
            }
        });
    } else {
        more_registers<120>();
        float* table = (float*)(lightning_hopper_memory + Shape::TABLES) + (role - 1) * 256;
        auto release = [&] {  // the stage from which this warpgroup's last gradient has been copied out
            if (leader && i > 0) {
                bulk_store_wait();
                barrier_arrive(empty(i - 1));
            }
            __syncwarp();
        };
        auto arrive = [&](uint32_t barrier) {
            if (lane() == 0) barrier_arrive(barrier);
            __syncwarp();
        };
        if (g.range) wait_for_kernel_before();
        // Each of these warpgroups makes SiLU and SiLU' of what its gradient is of, a chunk ahead.
        const int part = 3 - role;
        auto activate = [&](unsigned i, int n) {
            barrier_wait(full(i), i / STAGES & 1);
            barrier_wait(used(i), ~(i / 2) & 1);
            const uint32_t raw = stage(i) + part * TILE, to = active(i) + part * TILE - raw;
            for_pieces<64>(raw, threadIdx.x % 128, [&](int row, uint32_t at, uint4 x) {
                uint4 y;
                y.x = silus(x.x, x.x), y.y = silus(x.y, x.y), y.z = silus(x.z, x.z), y.w = silus(x.w, x.w);
                store_shared(at, x);
                store_shared(at + to, row < n ? y : make_uint4(0, 0, 0, 0));
            });
            if (role == 3 && n < CHUNK)
                for_pieces<64>(stage(i) + 3 * TILE, threadIdx.x % 128, [&](int row, uint32_t at, uint4) {
                    if (row >= n) store_shared(at, make_uint4(0, 0, 0, 0));
                });
            async_fence();
            named_barrier(1 + role, 128);
            if (leader) barrier_arrive(ready(i));
            __syncwarp();
        };
        // o⊙SiLU' takes SiLU's place in a stage, and goes to device memory.
        auto finish = [&](const float(&o)[32], const Place& place, uint32_t tile, int t, int h, int row0, int n) {
            uint32_t x[8][2];  // loaded before anything is stored: nothing tells the compiler that these are other places
#pragma unroll
            for (int m = 0; m < 8; m++)
#pragma unroll
                for (int e = 0; e < 2; e++) asm volatile("ld.shared.u32 %0, [%1];" : "=r"(x[m][e]) : "r"(tile + place(m) + e * 1024) : "memory");
#pragma unroll
            for (int m = 0; m < 8; m++)
#pragma unroll
                for (int e = 0; e < 2; e++) {
                    float2 d = unpack_bf16(x[m][e]);
                    store_shared(tile + place(m) + e * 1024, pack_bf16(o[4 * m + 2 * e] * d.x, o[4 * m + 2 * e + 1] * d.y));
                }
            async_fence();
            named_barrier(1 + role, 128);
            if (n == CHUNK) {
                if (leader) {
                    bulk_store(&maps.out, tile, 0, t * g.heads + h, row0, 0);
                    bulk_store_commit();
                }
                __syncwarp();
            } else {
                store_rows(du + ((int64_t)row0 * 3 + t) * g.channels() + h * g.hs, 3 * g.channels(), tile, n, g.hs);
                async_fence();
                named_barrier(1 + role, 128);
            }
        };

        for_spans<true>(g, [&](const LightningSpan& q, int h, int chunks) {
            const float slope2 = (float)(g.slope(h) * 1.4426950408889634);
            new_table(table, role, role == 3, slope2, g.scale);
            {
                float s[32];  // of no use here
                start_state<true, 4>(s, g, q, h, role, warp, slope2, (float*)(lightning_hopper_memory + Shape::ACTIVE));
            }
            // What a sequence starts from, as the state before its first chunk.
            auto first_state = [&](uint32_t S) {
                const float* start = g.start(q.seq, h);
                named_barrier(1 + role, 128);  // nobody needs what was there
                for (int e = threadIdx.x % 128; e < 64 * 32; e += 128) {
                    int r = e / 32, c = e % 32 * 2;
                    uint32_t x = start && r < g.hs && c < g.hs ? pack_bf16(start[r * g.hs + c], start[r * g.hs + c + 1]) : 0;
                    store_shared(S + r * 128 + ((c / 8 ^ r % 8) << 4) + c % 8 * 2, x);
                }
                async_fence();
                named_barrier(1 + role, 128);
            };
            if (chunks > 0) activate(i, q.n - CHUNK * (chunks - 1));
            for (int chunk = chunks - 1; chunk >= 0; chunk--, i++) {
                int w = warp;
                asm volatile("" : "+r"(memory), "+r"(w));  // what follows from them is made for each chunk again, rather than kept in registers
                const Place place(w);
                const int row = 16 * w + lane() / 4;  // and 8 more: this thread's tokens
                const float* factor = first_factor(table, w);
                const uint32_t dO = stage(i) + 3 * TILE, Q = active(i), K = Q + TILE, V = K + TILE, D = V + TILE;
                const int n = min(CHUNK, q.n - CHUNK * chunk), row0 = q.begin + q.first + chunk * CHUNK;
                release();
                if (chunk > 0) activate(i + 1, CHUNK);
                barrier_wait(ready(i), i / 2 & 1);
                float o[32];
                if (role == 3) {
                    const float above = g.scale * power(slope2, (float)(row + 1)), below = g.scale * power(slope2, (float)(row + 9));
                    const uint32_t S = state(even);
                    if (chunk % 2 == 0) {
                        if (chunk == 0 && chunks == 1 && q.first == 0) first_state(S);
                        outputs<64, true>(o, 0, operand(dO), operand(V), operand(K), operand(S), factor, above, below);
                        arrive(used(i));
                        arrive(state_used(even));
                        even++;
                    } else {
                        outputs_within<64>(o, 0, operand(dO), operand(V), operand(K), factor);
                        arrive(used(i));
                        // Then what the queries have of the chunk before, and of S before that one.
                        barrier_wait(ready(i + 1), (i + 1) / 2 & 1);
                        if (chunk == 1 && q.first == 0) first_state(S);
                        outputs_before<64>(o, 0, operand(dO), operand(active(i + 1)) + 2 * TILE, operand(active(i + 1)) + TILE, operand(S), slope2, above,
                                           below);
                    }
                    finish(o, place, stage(i), 0, h, row0, n);
                } else {
                    const float above = power(slope2, (float)max(n - 1 - row, 0)), below = power(slope2, (float)max(n - 9 - row, 0));
                    if (role == 1)
                        outputs<64, false>(o, 0, operand(K), operand(Q), operand(dO), operand(D), factor, above, below);
                    else
                        outputs<64, true>(o, 0, operand(V), operand(dO), operand(Q), operand(D), factor, above, below);
                    arrive(used(i));
                    finish(o, place, stage(i) + part * TILE, part, h, row0, n);
                }
            }
        });
        if (leader) bulk_store_wait();
    }
    if (who.blocks > 1) cluster_barrier();  // nobody arrives here any more
#endif
}

}  // namespace gpu

#endif
