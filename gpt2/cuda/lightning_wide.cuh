// Lightning attention for Hopper, head sizes from 72 to 128: backward by blocks whose warpgroups have roles. Formulas, chunks and tiles are those of
// lightning_hopper.cuh.
//
// A block has a multiprocessor for itself, and a sequence (or span) and head, whose chunks it takes from the last to the first. What bounds the kernel in
// lightning_hopper.cuh at these sizes is shared memory: its tiles are read and written some 8,000 clocks a chunk, and nothing goes on beside. Here a warpgroup
// makes whole rows (64 tokens, 128 columns), and what can stay in its registers does. SiLU of v is an operand from registers only, SiLU' of k and v never
// leave them; Eᵀ is made once and handed over for dQ. Some 5,000 clocks, and less memory, so that two chunks' tiles fit. Barriers in brackets:
//
//     a warpgroup      a warp each starts the copies of q; k and S; v; dO                                    [full]
//     warpgroup 0      SiLU of q in its place and SiLU' beside it, a chunk ahead [queries]; D behind the chunk as bf16 [d_ready], then D before it
//     warpgroup 1      keys:     V = SiLU(v) to registers. Eᵀ = V·dOᵀ ⊙ Mᵀ, which takes v's place [e_ready]; dK = Eᵀ·Q + V·Dᵀ
//                                K = SiLU(k) to registers and in its place [keys]; Pᵀ = K·Qᵀ ⊙ Mᵀ; dV = Pᵀ·dO + K·D
//                                Both gradients are copied out from v's place, where nobody needs Eᵀ any more [e_taken].
//     warpgroup 2      queries:  dQ = E·K + dO·Sᵀ, which takes the place of SiLU'
//
// Only the states before chunks of even numbers are there. The queries of an odd chunk look at the even chunk before too, with its keys K' and values V':
//
//                dQ = E·K + E'·K' + λ⁶⁴·dO·Sᵀ      E'ᵀ = V'·dOᵀ ⊙ M'ᵀ      M'_ij = λ^{64+i−j}
//
// E'ᵀ is made by warpgroup 1 when it has V'. (Factors c are left out.)
#pragma once

#include "lightning_roles.cuh"

#ifndef GPU_FLOAT32

namespace gpu {

namespace lightning_wide {

using namespace lightning_wgmma;
using lightning_mma::lane, lightning_mma::power;

constexpr int HS = 128, TILE = 2 * PANEL, STATE_PANEL = HS * 128, STATE = 2 * STATE_PANEL, THREADS = 4 * 128;
// Places in shared memory: two stages, each with q, k, v, dO and SiLU' of q; S; D.
constexpr int STAGE = 5 * TILE, S_ = 2 * STAGE, D_ = S_ + STATE;
constexpr int FACTORS = 192;                                              // distances −64 to 127
constexpr int TABLES = D_ + STATE;                                        // factors, twice; weights of a chunk's tokens, from its first one on
constexpr int BARRIERS = TABLES + (2 * FACTORS + CHUNK) * sizeof(float);  // 13 pairs, for two stages each; 4
constexpr int SHARED = BARRIERS + 8 * (13 * 2 + 4);

// A warp's 16 rows of a tile as `a` operands of products over its columns, 16 a time; they are its rows of accumulators with 128 columns, too.
struct Rows {
    uint32_t first;
    __device__ explicit Rows(int warp) : first((16 * warp + lane() % 16) * 128 + ((lane() / 16 ^ lane() % 8) << 4)) {}
    __device__ uint32_t operator()(uint32_t tile, int d) const { return tile + d / 4 * PANEL + (first ^ d % 4 * 32); }
};

// A warp's 16 keys by 64 queries, given as `a` operands, into a panel whose rows are the queries.
__device__ __forceinline__ void store_transposed(uint32_t panel, const uint32_t (&a)[4][4], int warp) {
    const uint32_t to = panel + (lane() / 16 * 8 + lane() % 8) * 128 + (((2 * warp + lane() / 8 % 2) ^ (lane() % 8)) << 4);
#pragma unroll
    for (int d = 0; d < 4; d++) {
        HOPPER_ONLY(asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1,%2,%3,%4};" ::"r"(to + d * 16 * 128), "r"(a[d][0]), "r"(a[d][1]),
                                 "r"(a[d][2]), "r"(a[d][3])
                                 : "memory");)
    }
}

// c (64×64) = A·Yᵀ, o (64×128) = A·state or A·stateᵀ, o += a·Z; A and a in registers.
__device__ __forceinline__ void pairs(float (&c)[32], const uint32_t (&A)[8][4], uint32_t Y) {
#pragma unroll
    for (int d = 0; d < 8; d++) product(c, A[d], panel_operand(Y + d / 4 * PANEL) + 2 * (d % 4), d > 0);
}
template <bool TRANSPOSED>
__device__ __forceinline__ void from_state(float (&o)[64], const uint32_t (&A)[8][4], uint32_t state) {
#pragma unroll
    for (int d = 0; d < 8; d++)
        if constexpr (TRANSPOSED)
            product(o, A[d], panel_operand(state + d / 4 * STATE_PANEL) + 2 * (d % 4), d > 0);
        else
            product<1>(o, A[d], panel_operand_transposed(state, STATE_PANEL) + 128 * d, d > 0);
}
__device__ __forceinline__ void sum_values(float (&o)[64], const uint32_t (&a)[4][4], uint32_t Z) {
    products_begin();
#pragma unroll
    for (int d = 0; d < 4; d++) product<1>(o, a[d], panel_operand_transposed(Z, PANEL) + 128 * d, true);
    products_commit();
    products_wait<0>();
    products_done(o);
}

// Rows of which this thread's have the factors above and, 8 rows further down, below.
__device__ __forceinline__ void scale_rows(float (&o)[64], float above, float below) {
#pragma unroll
    for (int i = 0; i < 64; i++) o[i] *= i % 4 < 2 ? above : below;
}
// o⊙x, for the 16 columns from 16·d on.
__device__ __forceinline__ void gradient(uint32_t (&y)[4], const float (&o)[64], int d, const uint32_t (&x)[4]) {
#pragma unroll
    for (int e = 0; e < 4; e++) {
        const float2 f = unpack_bf16(x[e]);
        const int i = 8 * d + e / 2 * 4 + e % 2 * 2;
        y[e] = pack_bf16(o[i] * f.x, o[i + 1] * f.y);
    }
}

}  // namespace lightning_wide

// All gradients of a span, from its last chunk to the first. g.borders: D behind the spans; g.start(): S before a sequence's first chunk.
__global__ void __launch_bounds__(lightning_wide::THREADS, 1)
    lightning_backward_kernel10(const Lightning g, floatX* du, const __grid_constant__ LightningMaps maps) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
    using namespace lightning_wide;
    extern __shared__ __align__(1024) unsigned char lightning_hopper_memory[];
    uint32_t memory = shared_address(lightning_hopper_memory);
    float* const table = (float*)(lightning_hopper_memory + TABLES);
    // The i-th chunk that is taken: its places, and their barriers. Parts of a stage: q, k, v, dO, SiLU' of q.
    auto tile = [&](int part, int i) { return memory + i % 2 * STAGE + part * TILE; };
    auto barrier = [&](int pair, int i) { return memory + BARRIERS + (2 * pair + i % 2) * 8; };
    auto full = [&](int part, int i) { return barrier(part, i); };
    auto empty = [&](int part, int i) { return barrier(4 + part, i); };
    auto queries = [&](int i) { return barrier(9, i); };
    auto keys = [&](int i) { return barrier(10, i); };
    auto e_ready = [&](int i) { return barrier(11, i); };
    auto e_taken = [&](int i) { return barrier(12, i); };
    const uint32_t d_ready = memory + BARRIERS + 13 * 16, d_used = d_ready + 8, s_full = d_ready + 16, s_empty = d_ready + 24;
    auto parity = [](int i) { return i / 2 & 1; };  // of the phase that completes for the i-th chunk
    const int role = __shfl_sync(0xffffffff, threadIdx.x / 128, 0), warp = __shfl_sync(0xffffffff, threadIdx.x / 32 % 4, 0), h = blockIdx.x % g.heads;
    const bool leader = threadIdx.x % 128 == 0;
    LightningSpan q;
    if (!g.find(g.block_slot(true), q) || q.n <= 0) return;
    const int chunks = (q.n + CHUNK - 1) / CHUNK, first = q.begin + q.first;
    auto tokens = [&](int chunk) { return min(CHUNK, q.n - CHUNK * chunk); };
    auto arrive = [&](uint32_t barrier) {  // a warp
        __syncwarp();
        if (lane() == 0) barrier_arrive(barrier);
        __syncwarp();
    };
    const float slope2 = (float)(g.slope(h) * 1.4426950408889634);
    if (threadIdx.x == 0) {
        for (int i = 0; i < 2; i++) {
            for (int part = 0; part < 4; part++) barrier_init(full(part, i), 1);
            barrier_init(empty(0, i), 2 * 4);  // warps of 0 and 1
            barrier_init(empty(1, i), 4);      // of 2
            barrier_init(empty(2, i), 1);      // the leader of 1, when dV has left
            barrier_init(empty(3, i), 3 * 4);
            barrier_init(empty(4, i), 1);  // the leader of 2, when dQ has left
            barrier_init(queries(i), 4);
            barrier_init(keys(i), 4);
            barrier_init(e_ready(i), 4);
            barrier_init(e_taken(i), 4);
        }
        barrier_init(d_ready, 4);
        barrier_init(d_used, 4);
        barrier_init(s_full, 1);
        barrier_init(s_empty, 4);
        barrier_init_fence();
    }
    // As lightning_wgmma::factor_table(), by keys.
    for (int x = threadIdx.x; x < 2 * FACTORS; x += THREADS) {
        const int distance = x % FACTORS + x / FACTORS - 64;
        table[x] = distance >= 0 ? g.scale * power(slope2, (float)distance) : 0;
    }
    float* const weights = table + 2 * FACTORS;
    if (threadIdx.x < CHUNK) weights[threadIdx.x] = g.scale * power(slope2, threadIdx.x + 1.f);
    __syncthreads();

    // A whole gradient from its place to device memory, by a warpgroup.
    auto store = [&](uint32_t from, int t, int chunk) {
        const int n = tokens(chunk);
        async_fence();
        named_barrier(1 + role, 128);
        if (n == CHUNK) {
            if (leader) {
#pragma unroll
                for (int p = 0; p < 2; p++) bulk_store(&maps.out, from + p * PANEL, 64 * p, t * g.heads + h, first + chunk * CHUNK, 0);
                bulk_store_commit();
            }
            __syncwarp();
        } else {
            for (int p = 0; p < 2; p++)
                lightning_roles::store_rows(du + ((int64_t)(first + chunk * CHUNK) * 3 + t) * g.channels() + h * g.hs + 64 * p, 3 * g.channels(),
                                            from + p * PANEL, n, g.hs - 64 * p);
            async_fence();
            named_barrier(1 + role, 128);
        }
    };

    if (role == 3) {
        fewer_registers<24>();
        if (lane() != 0) return;
        int states = 0;
        for (int i = 0; i < chunks; i++) {
            const int chunk = chunks - 1 - i, row = first + chunk * CHUNK;
            barrier_wait(empty(warp, i), parity(i) ^ 1);
            barrier_arrive_expect(full(warp, i), TILE);
#pragma unroll
            for (int p = 0; p < 2; p++) {
                if (warp < 3)
                    bulk_load(tile(warp, i) + p * PANEL, &maps.u, full(warp, i), 64 * p, warp * g.heads + h, row);
                else
                    bulk_load(tile(3, i) + p * PANEL, &maps.d_o, full(3, i), 64 * p, h, row);
            }
            const int even = chunk & ~1;  // the state before this one comes with the first of its two chunks
            if (warp == 1 && (chunk % 2 || i == 0) && g.leaves(q, even)) {
                barrier_wait(s_empty, (states & 1) ^ 1);
                barrier_arrive_expect(s_full, STATE);
#pragma unroll
                for (int x = 0; x < 4; x++)
                    bulk_load(memory + S_ + x / 2 * STATE_PANEL + x % 2 * PANEL, &maps.states, s_full, x / 2 * 64, x % 2 * 64, g.state(q, even, h), 0);
                states++;
            }
        }
    } else if (role == 0) {
        more_registers<176>();
        auto activate = [&](int i) {
            const int n = tokens(chunks - 1 - i);
            barrier_wait(full(0, i), parity(i));
            barrier_wait(empty(4, i), parity(i) ^ 1);
#pragma unroll 1
            for (int p = 0; p < 2; p++) {
                const uint32_t from = tile(0, i) + p * PANEL, beside = tile(4, i) - tile(0, i);
                for_pieces<64>(from, threadIdx.x, [&](int row, uint32_t at, uint4 x) {
                    uint4 y;
                    y.x = silus(x.x, x.x), y.y = silus(x.y, x.y), y.z = silus(x.z, x.z), y.w = silus(x.w, x.w);
                    store_shared(at, row < n ? y : make_uint4(0, 0, 0, 0));
                    store_shared(at + beside, x);
                });
            }
            if (n < CHUNK) {
                barrier_wait(full(3, i), parity(i));
                for (int p = 0; p < 2; p++)
                    for_pieces<64>(tile(3, i) + p * PANEL, threadIdx.x, [&](int row, uint32_t at, uint4) {
                        if (row >= n) store_shared(at, make_uint4(0, 0, 0, 0));
                    });
            }
            async_fence();
            arrive(queries(i));
        };
        float s[2][64];  // D: rows 0 ..., 64 ...
        const float* from = q.index < q.spans - 1 ? g.border(q, q.index, h) : nullptr;
#pragma unroll
        for (int p = 0; p < 2; p++) for_state(s[p], p, warp, [&](int i, int j, float& x) { x = from && i < g.hs && j < g.hs ? from[i * g.hs + j] : 0; });
        activate(0);
        for (int i = 0; i < chunks; i++) {
            asm volatile("" : "+r"(memory));
            const int chunk = chunks - 1 - i;
            const uint32_t Q = tile(0, i), dO = tile(3, i);
            const Place place(warp);
            barrier_wait(d_used, i & 1 ^ 1);
            store_state(memory + D_, STATE_PANEL, place, s[0]);
            store_state(memory + D_ + 64 * 128, STATE_PANEL, place, s[1]);
            async_fence();
            arrive(d_ready);
            if (chunk == 0) break;
            barrier_wait(queries(i), parity(i));
            barrier_wait(full(3, i), parity(i));
            const float decay = power(slope2, (float)tokens(chunk));
#pragma unroll
            for (int p = 0; p < 2; p++) {
                uint32_t a[4][4];
                transposed_rows(a, Q + p * PANEL, warp, [&](uint32_t z, int token) {
                    const float2 y = unpack_bf16(z), w = *(const float2*)(weights + token);
                    return pack_bf16(y.x * w.x, y.y * w.y);
                });
#pragma unroll
                for (int x = 0; x < 64; x++) s[p][x] *= decay;
                products_begin();
#pragma unroll
                for (int d = 0; d < 4; d++) product<1>(s[p], a[d], panel_operand_transposed(dO, PANEL) + 128 * d, true);
                products_commit();
                products_wait<0>();
                products_done(s[p]);
            }
            arrive(empty(0, i));
            arrive(empty(3, i));
            activate(i + 1);
        }
    } else if (role == 1) {
        more_registers<184>();
        const int row = 16 * warp + lane() / 4;  // and 8 more: this thread's tokens
        const int first_distance = 64 + lane() % 4 * 2 - row;
        const float* const factor = table + (first_distance % 2 == 0 ? first_distance : FACTORS + first_distance - 1);  // as lightning_wgmma::first_factor()
        for (int i = 0; i < chunks; i++) {
            asm volatile("" : "+r"(memory));  // what follows from it is made for each chunk again, rather than kept in registers
            const int chunk = chunks - 1 - i, n = tokens(chunk);
            const uint32_t Q = tile(0, i), K = tile(1, i), V = tile(2, i), dO = tile(3, i);
            const float above = power(slope2, (float)max(n - 1 - row, 0)), below = power(slope2, (float)max(n - 9 - row, 0));
            const Rows rows(warp);
            // SiLU, and SiLU' in the place of the numbers; SiLU of rows from n on: zeros.
            auto active = [&](uint32_t (&y)[4], uint32_t (&x)[4]) {
#pragma unroll
                for (int e = 0; e < 4; e++) {
                    y[e] = silus(x[e], x[e]);
                    if (row + e % 2 * 8 >= n) y[e] = 0;
                }
            };
            uint32_t A[8][4], v_slope[8][4], e[4][4];  // SiLU of v, later of k; SiLU' of v; Eᵀ, later Pᵀ
            float o[64], (&c)[32] = *(float (*)[32])o;  // c is no more needed where o begins
            barrier_wait(full(2, i), parity(i));
#pragma unroll
            for (int d = 0; d < 8; d++) {
                // 0, but nobody knows before the last but one are done: or else all numbers would be in registers at a time.
                const uint32_t nothing = d < 2 ? 0 : v_slope[d - 2][3] & (uint32_t)n >> 16;
                load_matrices(v_slope[d], rows(V, d) + nothing);
                active(A[d], v_slope[d]);
            }
            if (leader && i > 0) {
                bulk_store_wait();
                barrier_arrive(empty(2, i - 1));
            }
            named_barrier(2, 128);  // nobody of this warpgroup needs v any more
            barrier_wait(queries(i), parity(i));
            barrier_wait(full(3, i), parity(i));

            // dK
            if (chunk % 2 == 0 && i > 0) {  // what the chunk behind wants to know
                products_begin();
                pairs(c, A, tile(3, i - 1));
                products_commit();
                products_wait<0>();
                products_done(c);
                arrive(empty(3, i - 1));
                weigh(e, c, factor + 64);
                store_transposed(V + PANEL, e, warp);
            }
            products_begin();
            pairs(c, A, dO);
            products_commit();
            products_wait<0>();
            products_done(c);
            weigh(e, c, factor);
            barrier_wait(d_ready, i & 1);
            products_begin();
            from_state<true>(o, A, memory + D_);
            products_commit();
            store_transposed(V, e, warp);
            arrive(e_ready(i));
            products_wait<0>();
            products_done(o);
            scale_rows(o, above, below);
            sum_values(o, e, Q);

            barrier_wait(full(1, i), parity(i));
            barrier_wait(e_taken(i), parity(i));
#pragma unroll
            for (int d = 0; d < 8; d++) {
                uint32_t x[4], y[4];
                load_matrices(x, rows(K, d));
                active(A[d], x);
                gradient(y, o, d, x);
                store_matrices(rows(K, d), A[d]);
                store_matrices(rows(V, d), y);
            }
            async_fence();
            arrive(keys(i));
            store(V, 1, chunk);

            // dV
            products_begin();
            pairs(c, A, Q);
            products_commit();
            products_wait<0>();
            products_done(c);
            arrive(empty(0, i));
            weigh(e, c, factor);
            products_begin();
            from_state<false>(o, A, memory + D_);
            products_commit();
            products_wait<0>();
            products_done(o);
            arrive(d_used);
            scale_rows(o, above, below);
            sum_values(o, e, dO);
            if (chunk % 2 == 0) arrive(empty(3, i));
            if (leader) bulk_store_wait();  // dK has left
            named_barrier(2, 128);
#pragma unroll
            for (int d = 0; d < 8; d++) {
                uint32_t y[4];
                gradient(y, o, d, v_slope[d]);
                store_matrices(rows(V, d), y);
            }
            store(V, 2, chunk);
        }
        if (leader) bulk_store_wait();
    } else if (role == 2) {
        more_registers<128>();
        const int row = 16 * warp + lane() / 4;  // and 8 more: this thread's tokens
        int states = 0;
        float o[64];
        auto finish = [&](int i) {
            const Rows rows(warp);
            const uint32_t to = tile(4, i);
#pragma unroll
            for (int d = 0; d < 8; d++) {
                uint32_t x[4], y[4];
                load_matrices(x, rows(to, d));
                gradient(y, o, d, x);
                store_matrices(rows(to, d), y);
            }
            store(to, 0, chunks - 1 - i);
            if (leader) {
                bulk_store_wait();
                barrier_arrive(empty(4, i));
            }
            __syncwarp();
        };
        for (int i = 0; i < chunks; i++) {
            asm volatile("" : "+r"(memory));
            const int chunk = chunks - 1 - i;
            const bool odd = chunk % 2, before = !odd && i > 0;  // before: o has begun with an odd chunk, whose queries look at these keys too
            const uint32_t K = tile(1, i), E = tile(2, i), dO = tile(3, i), S = memory + S_;
            const Rows rows(warp);
            uint32_t e[4][4];
            auto take = [&](bool both) {
                uint32_t x[4][4];
                barrier_wait(e_ready(i), parity(i));
#pragma unroll
                for (int d = 0; d < 4; d++) load_matrices(e[d], rows(E, d));
                if (both) {
#pragma unroll
                    for (int d = 0; d < 4; d++) load_matrices(x[d], rows(E + PANEL, d));
                }
                arrive(e_taken(i));
                barrier_wait(keys(i), parity(i));
                if (both) sum_values(o, x, K);
            };
            if (before) {
                take(true);
                finish(i - 1);
            }
            if (odd || i == 0) {
                if (g.leaves(q, chunk & ~1)) {
                    barrier_wait(s_full, states++ & 1);
                } else {  // the state that the sequence starts from
                    const float* start = g.start(q.seq, h);
                    named_barrier(3, 128);
                    for (int x = threadIdx.x % 128; x < HS * HS / 2; x += 128) {
                        const int r = x / (HS / 2), c = x % (HS / 2) * 2;
                        const bool there = start && r < g.hs && c < g.hs;
                        store_shared(S + c / 64 * STATE_PANEL + r * 128 + ((c % 64 / 8 ^ r % 8) << 4) + c % 8 * 2,
                                     there ? pack_bf16(start[r * g.hs + c], start[r * g.hs + c + 1]) : 0);
                    }
                    async_fence();
                    named_barrier(3, 128);
                }
            }
            barrier_wait(queries(i), parity(i));
            barrier_wait(full(3, i), parity(i));
            products_begin();
#pragma unroll
            for (int d = 0; d < 8; d++)
                product(o, panel_operand(dO + d / 4 * PANEL) + 2 * (d % 4), panel_operand(S + d / 4 * STATE_PANEL) + 2 * (d % 4), d > 0);
            products_commit();
            products_wait<0>();
            products_done(o);
            arrive(empty(3, i));
            if (!odd) arrive(s_empty);
            const float tokens_behind = (float)(row + (odd ? CHUNK : 0));
            scale_rows(o, g.scale * power(slope2, tokens_behind + 1), g.scale * power(slope2, tokens_behind + 9));
            if (!before) take(false);
            sum_values(o, e, K);
            arrive(empty(1, i));
            if (!odd) finish(i);
        }
    }
#endif
}

}  // namespace gpu

#endif
