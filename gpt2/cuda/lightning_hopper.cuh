// Lightning attention on Hopper's tensor cores and bulk copies: bf16, head sizes up to 128 that are multiples of 8. What it computes stands in lightning.cuh.
//
// Each sequence is cut into chunks of 64 tokens, counted from its first one. With i the place in a chunk of n, S the state before the chunk, D the gradient of
// the state behind it, M_ij = λ^{i−j} for i >= j, else 0:
//
//     forward    O = c·((Q·Kᵀ ⊙ M)·V + diag(λ^{i+1})·Q·S)      S' = λⁿ·S + (diag(λ^{n−1−i})·K)ᵀ·V
//     backward   Pᵀ = K·Qᵀ ⊙ Mᵀ      Eᵀ = V·dOᵀ ⊙ Mᵀ      E = dO·Vᵀ ⊙ M      (rather than transpose E)
//                dQ = c·(E·K + diag(λ^{i+1})·dO·Sᵀ)
//                dK = c·Eᵀ·Q + diag(λ^{n−1−i})·V·Dᵀ      dV = c·Pᵀ·dO + diag(λ^{n−1−i})·K·D
//                D' = λⁿ·D + (diag(c·λ^{i+1})·Q)ᵀ·dO
//
// Backward is one sweep from the last chunk to the first, because states S are there already, as bf16 (which they are rounded to anyway as factors of a
// product). Forward leaves them if it is given a place; otherwise a sweep over k and v makes them. Memory bounds both passes, and the state before a chunk is
// as large as its k: so only the one before every second chunk is left, hs/128 numbers for each number of q. What the queries of an odd chunk have of the past
// is made of the even chunk before, with its keys K', values V' and state S':
//                dQ = c·E·K + diag(c·λ^{i+1})·(dO·V'ᵀ·diag(λ^{63−j})·K' + λ⁶⁴·dO·S'ᵀ)
//
// A block has a span and head, a warpgroup 64 columns of its outputs (two share a head larger than 64) and 64 rows of the state, in registers as float32 and in
// shared memory as bf16. Tiles come by bulk copies, in panels of 64 columns (hopper.cuh).
//   Forward has two stages of tiles; SiLU replaces the raw numbers, o takes q's place.
//   Backward goes from each raw tile to SiLU in a tile beside it, and SiLU' in the place of the raw numbers, where it waits for the gradient, which takes its
//   place in turn and is copied out. Meanwhile the next chunk's tiles come into a second set of buffers, so that nobody waits for memory. An odd chunk is done
//   with its own k and v first; then those of the chunk before are made ready, and dQ is finished. Two blocks of 4 warps a multiprocessor; at head sizes above
//   64 there is room for one of 8, and for one buffer for v.
#pragma once

#include "hopper.cuh"
#include "lightning_tensor_cores.cuh"
#include "overlap.cuh"

#ifndef GPU_FLOAT32

namespace gpu {

namespace lightning_wgmma {

constexpr int CHUNK = 64, PANEL = CHUNK * 128;  // tokens; bytes of a panel of so many rows

template <int HS>
struct Shape {
    static constexpr int PANELS = HS / 64, THREADS = 128 * PANELS, BLOCKS = HS == 64 ? 3 : 1;
    static constexpr int TILE = PANELS * PANEL, STATE_PANEL = HS * 128, STATE = PANELS * STATE_PANEL;  // bytes
    // of lightning_forward_kernel5
    static constexpr int FORWARD_SHARED = 6 * TILE + STATE + 2 * 128 * (int)sizeof(float) + 16;
    // of lightning_backward_kernel8
    static constexpr int V_BUFFERS = HS == 64 ? 2 : 1, BACKWARD_BLOCKS = HS == 64 ? 2 : 1;
    static constexpr int BACKWARD_SHARED = (9 + V_BUFFERS) * TILE + 2 * STATE + 4 * 128 * (int)sizeof(float) + 16;
    // of lightning_span_kernel8
    static constexpr int GROUPS = HS == 64 ? 2 : 1, SPAN_THREADS = GROUPS * THREADS, SPAN_BLOCKS = HS == 64 ? 3 : 2;
    static constexpr int SPAN_SHARED = GROUPS * 4 * TILE + CHUNK * (int)sizeof(float) + GROUPS * 16;
    // of lightning_states_kernel6
    static constexpr int STATES_SHARED = 4 * TILE + STATE + 16;
};

// A bulk copy of what is read again later: it should stay in the L2 cache.
__device__ inline uint64_t keep_in_cache() {
    uint64_t policy = 0;
    HOPPER_ONLY(asm volatile("createpolicy.fractional.L2::evict_last.b64 %0, 1.0;" : "=l"(policy));)
    return policy;
}
__device__ inline void bulk_load(uint32_t to, const CUtensorMap* map, uint32_t barrier, int c0, int c1, int c2, uint64_t policy) {
    HOPPER_ONLY(
        asm volatile("cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1, {%3,%4,%5}], [%2], %6;" ::"r"(to),
                     "l"(map), "r"(barrier), "r"(c0), "r"(c1), "r"(c2), "l"(policy)
                     : "memory");)
}
// Towards the L2 cache.
__device__ inline void bulk_prefetch(const CUtensorMap* map, int c0, int c1, int c2) {
    HOPPER_ONLY(asm volatile("cp.async.bulk.prefetch.tensor.3d.L2.global.tile [%0, {%1,%2,%3}];" ::"l"(map), "r"(c0), "r"(c1), "r"(c2) : "memory");)
}
// Of the 128 threads that have panel p.
template <int HS>
__device__ inline void warpgroup_barrier(int p) {
    if constexpr (HS == 64)
        __syncthreads();
    else
        named_barrier(1 + p, 128);
}

// Where this thread's first numbers of a tile (64 rows of a panel) or state stand: row 16·warp + lane/4, two columns from 2·(lane%4) on; eight columns further
// chunk 1 instead of 0, eight rows further down 1024 bytes.
struct Place {
    uint32_t row, swizzle;
    __device__ explicit Place(int warp)
        : row((16 * warp + lightning_mma::lane() / 4) * 128 + lightning_mma::lane() % 4 * 4), swizzle(lightning_mma::lane() / 4) {}
    __device__ uint32_t operator()(int n) const { return row + ((n ^ swizzle) << 4); }
};

// x (64×64 of a state) as bf16.
template <int N>
__device__ inline void store_state(uint32_t to, int panel_bytes, const Place& place, const float (&x)[N]) {
#pragma unroll
    for (int n = 0; n < N / 4; n++)
#pragma unroll
        for (int e = 0; e < 2; e++) store_shared(to + n / 8 * panel_bytes + place(n % 8) + e * 1024, pack_bf16(x[4 * n + 2 * e], x[4 * n + 2 * e + 1]));
}

// f(row, column, number) for a thread's numbers of the state's rows 64·p ...
template <int N, class F>
__device__ inline void for_state(float (&x)[N], int p, int warp, F f) {
#pragma unroll
    for (int n = 0; n < N / 4; n++)
#pragma unroll
        for (int e = 0; e < 4; e++) f(64 * p + 16 * warp + lightning_mma::lane() / 4 + e / 2 * 8, 8 * n + lightning_mma::lane() % 4 * 2 + e % 2, x[4 * n + e]);
}

// Rows 16·warp ... of diag(f)·X, transposed, as `a` operands for products over the 64 tokens: from a panel of X, through f(two numbers, the left one's token).
template <class F>
__device__ inline void transposed_rows(uint32_t (&a)[4][4], uint32_t panel, int warp, F f) {
    int lane = lightning_mma::lane();
    uint32_t from = panel + (lane / 16 * 8 + lane % 8) * 128 + (((2 * warp + lane / 8 % 2) ^ (lane % 8)) << 4);
#pragma unroll
    for (int d = 0; d < 4; d++) {
        load_matrices_transposed(a[d], from + d * 16 * 128);
#pragma unroll
        for (int e = 0; e < 4; e++) a[d][e] = f(a[d][e], 16 * d + lane % 4 * 2 + e / 2 * 8);
    }
}

// Calls f(row, address, the 8 numbers there) for a thread's pieces of a tile of 64 rows, of which it is the thread-th of those that share them. All are loaded
// first: nothing tells the compiler that f's stores leave them alone.
template <int HS, class F>
__device__ inline void for_pieces(uint32_t tile, int thread, F f) {
    constexpr int ROWS = Shape<HS>::THREADS / 8, PIECES = CHUNK / ROWS;
    uint32_t at = tile + thread / 8 * 128 + ((thread % 8 ^ thread / 8 % 8) << 4);
    uint4 x[HS / 64][PIECES];
#pragma unroll
    for (int i = 0; i < HS / 64; i++)
#pragma unroll
        for (int r = 0; r < PIECES; r++) x[i][r] = load_shared(at + i * PANEL + r * ROWS * 128);
#pragma unroll
    for (int i = 0; i < HS / 64; i++)
#pragma unroll
        for (int r = 0; r < PIECES; r++) f(r * ROWS + thread / 8, at + i * PANEL + r * ROWS * 128, x[i][r]);
}

// SiLU of two numbers, and SiLU' of them.
__device__ inline uint32_t silus(uint32_t u, uint32_t& gradient) {
    float2 x = unpack_bf16(u), y, d;
    x.x *= 0.5f, x.y *= 0.5f;
    float2 t = make_float2(tanh_fast(x.x), tanh_fast(x.y));
    y.x = x.x + x.x * t.x, y.y = x.y + x.y * t.y;
    d.x = (0.5f + 0.5f * t.x) + y.x * (0.5f - 0.5f * t.x), d.y = (0.5f + 0.5f * t.y) + y.y * (0.5f - 0.5f * t.y);
    gradient = pack_bf16(d.x, d.y);
    return pack_bf16(y.x, y.y);
}

// Factors of products of 64 by 64 tokens, 256 floats: table[64 + column − row] = c·λ^distance, 0 where that is negative, and the same one place further, so
// that pairs are aligned for every thread. The distance is column − row (keys in rows), or row − column (`queries` in rows).
__device__ inline void factor_table(float* table, bool queries, float slope2, float scale, int thread, int threads) {
    for (int x = thread; x < 256; x += threads) {
        int distance = x % 128 + x / 128 - 64;
        if (queries) distance = -distance;
        table[x] = distance >= 0 ? scale * lightning_mma::power(slope2, (float)distance) : 0;
    }
}
__device__ inline const float* first_factor(const float* table, int warp) {
    int x = 64 + lightning_mma::lane() % 4 * 2 - (16 * warp + lightning_mma::lane() / 4);
    return table + (x % 2 == 0 ? x : 128 + x - 1);
}

// c = X·Yᵀ, all panels.
template <int HS>
__device__ __forceinline__ void pairs(float (&c)[32], uint32_t X, uint32_t Y) {
#pragma unroll
    for (int d = 0; d < HS / 16; d++) product(c, panel_operand(X + d / 4 * PANEL) + 2 * (d % 4), panel_operand(Y + d / 4 * PANEL) + 2 * (d % 4), d > 0);
}
// o = X·state, columns 64·p ..., or X·stateᵀ.
template <int HS, bool TRANSPOSED>
__device__ __forceinline__ void from_state(float (&o)[32], int p, uint32_t X, uint32_t state) {
    constexpr int STATE_PANEL = Shape<HS>::STATE_PANEL;
#pragma unroll
    for (int d = 0; d < HS / 16; d++) {
        uint64_t x = panel_operand(X + d / 4 * PANEL) + 2 * (d % 4);
        if constexpr (TRANSPOSED)
            product(o, x, panel_operand(state + d / 4 * STATE_PANEL + 64 * p * 128) + 2 * (d % 4), d > 0);
        else
            product<0, 1>(o, x, panel_operand_transposed(state + p * STATE_PANEL, STATE_PANEL) + 128 * d, d > 0);
    }
}
// c⊙factors as `a` operands; this thread's first number's factor is *factor, from where it goes as in factor_table().
__device__ __forceinline__ void weigh(uint32_t (&a)[4][4], const float (&c)[32], const float* factor) {
    float2 f = *(const float2*)(factor - 8);  // eight rows further down the factors are those of eight columns before
#pragma unroll
    for (int n = 0; n < 8; n++) {
        float2 up = *(const float2*)(factor + 8 * n);
        a[n / 2][n % 2 * 2] = pack_bf16(c[4 * n] * up.x, c[4 * n + 1] * up.y);
        a[n / 2][n % 2 * 2 + 1] = pack_bf16(c[4 * n + 2] * f.x, c[4 * n + 3] * f.y);
        f = up;
    }
}
// o = or += a·Z, columns 64·p ...
__device__ __forceinline__ void sum_values(float (&o)[32], const uint32_t (&a)[4][4], int p, uint32_t Z, bool accumulate) {
    products_begin();
#pragma unroll
    for (int d = 0; d < 4; d++) product<1>(o, a[d], panel_operand_transposed(Z + p * PANEL, PANEL) + 128 * d, accumulate || d > 0);
    products_commit();
    products_wait<0>();
    products_done(o);
}

// o (64 tokens, columns 64·p ...) = (X·Yᵀ⊙factors)·Z + diag(f)·X·state, or X·stateᵀ. This thread's rows have f = above, and 8 rows further down below.
template <int HS, bool TRANSPOSED>
__device__ __forceinline__ void outputs(float (&o)[32], int p, uint32_t X, uint32_t Y, uint32_t Z, uint32_t state, const float* factor, float above,
                                        float below) {
    float c[32];
    products_begin();
    pairs<HS>(c, X, Y);
    from_state<HS, TRANSPOSED>(o, p, X, state);
    products_commit();
    products_wait<0>();
    products_done(c);
    products_done(o);
    uint32_t a[4][4];
    weigh(a, c, factor);
#pragma unroll
    for (int i = 0; i < 32; i++) o[i] *= i % 4 < 2 ? above : below;
    sum_values(o, a, p, Z, true);
}
// The first term alone.
template <int HS>
__device__ __forceinline__ void outputs_within(float (&o)[32], int p, uint32_t X, uint32_t Y, uint32_t Z, const float* factor) {
    float c[32];
    products_begin();
    pairs<HS>(c, X, Y);
    products_commit();
    products_wait<0>();
    products_done(c);
    uint32_t a[4][4];
    weigh(a, c, factor);
    sum_values(o, a, p, Z, false);
}
// o += diag(f)·(X·Yᵀ·diag(λ^{63−j})·Z + λ⁶⁴·X·stateᵀ): what the chunk before, whose Y and Z these are, and the state before that one have to say.
template <int HS>
__device__ __forceinline__ void outputs_before(float (&o)[32], int p, uint32_t X, uint32_t Y, uint32_t Z, uint32_t state, float slope2, float above,
                                               float below) {
    float c[32];
    products_begin();
    pairs<HS>(c, X, Y);
    products_commit();
    products_wait<0>();
    products_done(c);
    uint32_t a[4][4];
#pragma unroll
    for (int n = 0; n < 8; n++) {
        float j = (float)(63 - 8 * n - lightning_mma::lane() % 4 * 2), left = lightning_mma::power(slope2, j), right = lightning_mma::power(slope2, j - 1);
        a[n / 2][n % 2 * 2] = pack_bf16(c[4 * n] * left, c[4 * n + 1] * right);
        a[n / 2][n % 2 * 2 + 1] = pack_bf16(c[4 * n + 2] * left, c[4 * n + 3] * right);
    }
    products_begin();
    from_state<HS, true>(c, p, X, state);
    products_commit();
    products_wait<0>();
    products_done(c);
    float decay = lightning_mma::power(slope2, CHUNK);
#pragma unroll
    for (int i = 0; i < 32; i++) c[i] *= decay;
    sum_values(c, a, p, Z, true);
#pragma unroll
    for (int i = 0; i < 32; i++) o[i] += (i % 4 < 2 ? above : below) * c[i];
}

}  // namespace lightning_wgmma

// Of u (hs, 3·heads, N), d_o (hs, heads, N), du (hs, 3·heads, N, 1) or o (hs, heads, N, 1), states (hs, hs, N/64·heads, 1), whose rows are those of S.
struct LightningMaps {
    CUtensorMap u, d_o, out, states;
};

// Which tails there are at borders between ranges (Lightning::tail). The a-th ones have the numbers from first[a] to first[a+1]−1: those heads that forget
// slowest have so many.
struct LightningTails {
    static constexpr int MOST = 256;
    int borders = 0, first[MOST + 1] = {};
};

// What each span adds to the state S behind it (sums over k and v), or, `backwards`, to the gradient D before it (over q and d_o): into the borders. It is a
// sum with weights λ^distance, of which only those chunks are read whose weights count. GROUPS groups of warpgroups take the chunks in turn.
// With g.range the same for each of the `tails` of the borders between ranges, the weights counted from the end that is nearer to the border.
template <int HS>
__global__ void __launch_bounds__(lightning_wgmma::Shape<HS>::SPAN_THREADS, lightning_wgmma::Shape<HS>::SPAN_BLOCKS)
    lightning_span_kernel8(const Lightning g, const __grid_constant__ LightningMaps maps, bool backwards, const __grid_constant__ LightningTails tails) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
    using namespace lightning_wgmma;
    using lightning_mma::power;
    constexpr int PANELS = Shape<HS>::PANELS, GROUPS = Shape<HS>::GROUPS, THREADS = Shape<HS>::THREADS, TILE = Shape<HS>::TILE;
    extern __shared__ __align__(1024) unsigned char lightning_hopper_memory[];
    const int group = __shfl_sync(0xffffffff, threadIdx.x / THREADS, 0), p = __shfl_sync(0xffffffff, threadIdx.x / 128 % PANELS, 0);
    const int warp = __shfl_sync(0xffffffff, threadIdx.x / 32 % 4, 0);
    const bool leader = threadIdx.x % THREADS == 0;
    const uint32_t tiles = shared_address(lightning_hopper_memory) + group * 4 * TILE;  // two stages of two tiles
    const uint32_t full = shared_address(lightning_hopper_memory) + GROUPS * 4 * TILE + CHUNK * (uint32_t)sizeof(float) + group * 16;
    float* weights = (float*)(lightning_hopper_memory + GROUPS * 4 * TILE);  // of a chunk's tokens, from its last one (first one) on
    let_next_kernel_start();
    int h = blockIdx.x % g.heads, border = 0, tail = 0, distance = 0;  // distance: chunks between a border and its tail
    LightningSpan q;
    if (g.range == 0) {
        if (!g.find(g.block_slot(false), q) || q.n <= 0 || q.index == (backwards ? 0 : q.spans - 1)) return;
    } else {
        while ((int)blockIdx.x >= tails.borders * tails.first[tail + 1]) tail++;
        const int i = blockIdx.x - tails.borders * tails.first[tail], heads = tails.first[tail + 1] - tails.first[tail];
        border = i / heads + 1, h = i % heads + (g.geometric ? g.heads - heads : 0), distance = tail * g.tail;
        if (!g.find((int64_t)border * g.range, q) || q.index == 0) return;  // both sides of the border must be of one sequence
    }
    const float slope2 = (float)(g.slope(h) * 1.4426950408889634);
    // The row in front of which the chunks end, or behind which they begin; how many tokens there are, and chunks of these that count.
    int edge = q.begin + q.first, tokens = q.n, chunks = chunks_that_count(slope2);
    if (g.range == 0) {
        if (!backwards) edge += q.n;
    } else {
        edge += (backwards ? CHUNK : -CHUNK) * distance;
        tokens = min(backwards ? q.end - q.begin - q.first : q.first, g.range_chunks() * CHUNK) - distance * CHUNK;
        chunks = min(chunks - distance, g.tail);
    }
    chunks = min(chunks, (tokens + CHUNK - 1) / CHUNK);
    if (chunks <= 0) return;

    const uint64_t policy = keep_in_cache();
    auto load = [&](int k) {
        uint32_t stage = k / GROUPS % 2, to = tiles + stage * 2 * TILE, barrier = full + stage * 8;
        int row = backwards ? edge + k * CHUNK : edge - (k + 1) * CHUNK;  // the k-th in the order of their weights
        barrier_arrive_expect(barrier, 2 * TILE);
#pragma unroll
        for (int i = 0; i < PANELS; i++) {
            bulk_load(to + i * PANEL, &maps.u, barrier, 64 * i, backwards ? h : g.heads + h, row, policy);
            bulk_load(to + TILE + i * PANEL, backwards ? &maps.d_o : &maps.u, barrier, 64 * i, backwards ? h : 2 * g.heads + h, row, policy);
        }
    };
    if (leader) {
        barrier_init(full, 1);
        barrier_init(full + 8, 1);
        barrier_init_fence();
        for (int k = group; k < min(chunks, group + 2 * GROUPS); k += GROUPS) load(k);
    }
    if (threadIdx.x < CHUNK) weights[threadIdx.x] = backwards ? g.scale * power(slope2, threadIdx.x + 1.f) : power(slope2, 63.f - threadIdx.x);
    float s[PANELS * 32] = {};
    __syncthreads();

    for (int k = group; k < chunks; k += GROUPS) {
        const uint32_t stage = k / GROUPS % 2, x = tiles + stage * 2 * TILE, y = x + TILE;
        const int n = backwards ? min(CHUNK, tokens - CHUNK * k) : CHUNK;
        barrier_wait(full + stage * 8, k / GROUPS / 2 & 1);
        if (!backwards || n < CHUNK) {
            for_pieces<HS>(y, threadIdx.x % THREADS, [&](int row, uint32_t at, uint4 z) {
                if (!backwards) z = lightning_mma::silus(z);
                store_shared(at, row < n ? z : make_uint4(0, 0, 0, 0));
            });
            async_fence();
        }
        const float from_here = power(slope2, (float)(CHUNK * k));
        uint32_t a[4][4];
        transposed_rows(a, x + p * PANEL, warp, [&](uint32_t z, int i) {
            const float2 v = unpack_bf16(lightning_mma::silus(z)), w = *(const float2*)(weights + i);
            return pack_bf16(i < n ? v.x * (w.x * from_here) : 0, i + 1 < n ? v.y * (w.y * from_here) : 0);
        });
        named_barrier(1 + group, THREADS);
        products_begin();
#pragma unroll
        for (int d = 0; d < 4; d++) product<1>(s, a[d], panel_operand_transposed(y, PANEL) + 128 * d, true);
        products_commit();
        products_wait<0>();
        products_done(s);
        named_barrier(1 + group, THREADS);  // nobody needs the tiles any more
        if (leader && k + 2 * GROUPS < chunks) load(k + 2 * GROUPS);
        __syncwarp();
    }
    if constexpr (GROUPS == 2) {
        __syncthreads();
        float* others = (float*)lightning_hopper_memory + threadIdx.x % THREADS;
        if (group == 1)
#pragma unroll
            for (int i = 0; i < PANELS * 32; i++) others[i * THREADS] = s[i];
        __syncthreads();
        if (group == 1) return;
#pragma unroll
        for (int i = 0; i < PANELS * 32; i++) s[i] += others[i * THREADS];
    }
    float* to = g.range ? g.tail_sum(border, tail, h) : g.border(q, backwards ? q.index - 1 : q.index, h);
    for_state(s, p, warp, [&](int i, int j, float& x) {
        if (i < g.hs && j < g.hs) to[i * g.hs + j] = x;
    });
#endif
}

// S before every second chunk, for backward, where forward has not left it: a sweep over k and v.
template <int HS>
__global__ void __launch_bounds__(lightning_wgmma::Shape<HS>::THREADS, HS == 64 ? 4 : 2)
    lightning_states_kernel6(const Lightning g, const __grid_constant__ LightningMaps maps) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
    using namespace lightning_wgmma;
    using lightning_mma::power;
    constexpr int PANELS = Shape<HS>::PANELS, TILE = Shape<HS>::TILE, STATE_PANEL = Shape<HS>::STATE_PANEL;
    extern __shared__ __align__(1024) unsigned char lightning_hopper_memory[];
    uint32_t tiles = shared_address(lightning_hopper_memory), out = tiles + 4 * TILE, full = out + Shape<HS>::STATE;  // two stages of two tiles
    int p = __shfl_sync(0xffffffff, threadIdx.x / 128, 0), warp = __shfl_sync(0xffffffff, threadIdx.x / 32 % 4, 0), h = blockIdx.x % g.heads;
    LightningSpan q;
    if (!g.find(g.block_slot(false), q) || q.n <= 0) return;
    float slope2 = (float)(g.slope(h) * 1.4426950408889634);
    int chunks = (q.n + CHUNK - 1) / CHUNK;

    auto load = [&](int k) {
        uint32_t to = tiles + k % 2 * 2 * TILE, barrier = full + k % 2 * 8;
        barrier_arrive_expect(barrier, 2 * TILE);
#pragma unroll
        for (int t = 0; t < 2; t++)
#pragma unroll
            for (int i = 0; i < PANELS; i++)
                bulk_load(to + t * TILE + i * PANEL, &maps.u, barrier, 64 * i, (t + 1) * g.heads + h, q.begin + q.first + k * CHUNK);
    };
    if (threadIdx.x == 0) {
        barrier_init(full, 1);
        barrier_init(full + 8, 1);
        barrier_init_fence();
        load(0);
        if (chunks > 1) load(1);
    }

    float s[PANELS * 32];
    const float* from = g.start(q, h);
    for_state(s, p, warp, [&](int i, int j, float& x) { x = from && i < g.hs && j < g.hs ? from[i * g.hs + j] : 0; });
    Place place(warp);
    __syncthreads();

    for (int k = 0; k < chunks; k++) {
        uint32_t x = tiles + k % 2 * 2 * TILE, y = x + TILE;
        int n = min(CHUNK, q.n - CHUNK * k);
        bool leave = g.leaves(q, k);
        if (leave) {
            if (threadIdx.x == 0) bulk_store_wait();
            __syncthreads();
            store_state(out + 64 * p * 128, STATE_PANEL, place, s);
        }
        barrier_wait(full + k % 2 * 8, k / 2 & 1);
        for_pieces<HS>(y, threadIdx.x, [&](int row, uint32_t at, uint4 z) {
            z = lightning_mma::silus(z);
            store_shared(at, row < n ? z : make_uint4(0, 0, 0, 0));
        });
        async_fence();
        __syncthreads();
        if (leave && threadIdx.x == 0) {
#pragma unroll
            for (int i = 0; i < PANELS * PANELS; i++)
                bulk_store(&maps.states, out + i / PANELS * STATE_PANEL + i % PANELS * PANEL, i / PANELS * 64, i % PANELS * 64, g.state(q, k, h), 0);
            bulk_store_commit();
        }
        uint32_t a[4][4];
        transposed_rows(a, x + p * PANEL, warp, [&](uint32_t z, int i) {
            float2 y = unpack_bf16(lightning_mma::silus(z));
            float left = power(slope2, (float)max(n - 1 - i, 0)), right = power(slope2, (float)max(n - 2 - i, 0));
            return pack_bf16(i < n ? y.x * left : 0, i + 1 < n ? y.y * right : 0);
        });
        float decay = exp2f(-slope2 * (float)n);
#pragma unroll
        for (int i = 0; i < PANELS * 32; i++) s[i] *= decay;
        products_begin();
#pragma unroll
        for (int d = 0; d < 4; d++) product<1>(s, a[d], panel_operand_transposed(y, PANEL) + 128 * d, true);
        products_commit();
        products_wait<0>();
        products_done(s);
        __syncthreads();  // nobody needs the tiles any more
        if (threadIdx.x == 0 && k + 2 < chunks) load(k + 2);
    }
    if (threadIdx.x == 0) bulk_store_wait();
#endif
}

// o of a span, from its first chunk to the last; with `leave_states` S before chunks too.
template <int HS>
__global__ void __launch_bounds__(lightning_wgmma::Shape<HS>::THREADS, lightning_wgmma::Shape<HS>::BLOCKS)
    lightning_forward_kernel5(const Lightning g, floatX* o_out, const __grid_constant__ LightningMaps maps, bool leave_states) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
    using namespace lightning_wgmma;
    using lightning_mma::power;
    constexpr int PANELS = Shape<HS>::PANELS, TILE = Shape<HS>::TILE, STATE_PANEL = Shape<HS>::STATE_PANEL;
    extern __shared__ __align__(1024) unsigned char lightning_hopper_memory[];
    uint32_t tiles = shared_address(lightning_hopper_memory);  // two stages of q, k, v; S
    float* factors = (float*)(lightning_hopper_memory + 6 * TILE + Shape<HS>::STATE);
    const uint32_t full = tiles + 6 * TILE + Shape<HS>::STATE + 256 * (uint32_t)sizeof(float);
    int p = __shfl_sync(0xffffffff, threadIdx.x / 128, 0), warp = __shfl_sync(0xffffffff, threadIdx.x / 32 % 4, 0), h = blockIdx.x % g.heads;
    LightningSpan q;
    if (!g.find(g.block_slot(true), q)) return;
    int chunks = (q.n + CHUNK - 1) / CHUNK, first = q.begin + q.first;

    auto load = [&](int k) {
        uint32_t barrier = full + k % 2 * 8;
        barrier_arrive_expect(barrier, 3 * TILE);
#pragma unroll
        for (int t = 0; t < 3; t++)
#pragma unroll
            for (int i = 0; i < PANELS; i++)
                bulk_load(tiles + (k % 2 * 3 + t) * TILE + i * PANEL, &maps.u, barrier, 64 * i, t * g.heads + h, first + k * CHUNK);
    };
    if (threadIdx.x == 0) {
        barrier_init(full, 1);
        barrier_init(full + 8, 1);
        barrier_init_fence();
        if (chunks > 0) load(0);
    }
    float slope2 = (float)(g.slope(h) * 1.4426950408889634), s[PANELS * 32];  // S: rows 64·p ...
    factor_table(factors, true, slope2, g.scale, threadIdx.x, blockDim.x);
    const float* from = g.start(q, h);
    for_state(s, p, warp, [&](int i, int j, float& x) { x = from && i < g.hs && j < g.hs ? from[i * g.hs + j] : 0; });
    Place place(warp);
    store_state(tiles + 6 * TILE + 64 * p * 128, STATE_PANEL, place, s);
    int row = 16 * warp + lightning_mma::lane() / 4;
    const float* factor = first_factor(factors, warp);
    __syncthreads();

    for (int k = 0; k < chunks; k++) {
        asm volatile("" : "+r"(tiles), "+f"(slope2));  // what follows from them is made for each chunk again, rather than kept in registers
        const uint32_t Q = tiles + k % 2 * 3 * TILE, K = Q + TILE, V = K + TILE, S = tiles + 6 * TILE;
        int n = min(CHUNK, q.n - CHUNK * k);
        barrier_wait(full + k % 2 * 8, k / 2 & 1);
#pragma unroll
        for (int t = 0; t < 3; t++)
            for_pieces<HS>(Q + t * TILE, threadIdx.x, [&](int row, uint32_t at, uint4 x) {
                x = lightning_mma::silus(x);
                store_shared(at, row < n ? x : make_uint4(0, 0, 0, 0));
            });
        async_fence();
        if (threadIdx.x % 128 == 0) bulk_store_wait();  // o of the chunk before has left the other stage
        __syncthreads();
        if (threadIdx.x == 0) {
            if (k + 1 < chunks) load(k + 1);
            if (leave_states && g.leaves(q, k)) {
#pragma unroll
                for (int i = 0; i < PANELS * PANELS; i++)
                    bulk_store(&maps.states, S + i / PANELS * STATE_PANEL + i % PANELS * PANEL, i / PANELS * 64, i % PANELS * 64, g.state(q, k, h), 0);
                bulk_store_commit();
            }
        }
        __syncwarp();

        uint32_t a[4][4];
        transposed_rows(a, K + p * PANEL, warp, [&](uint32_t z, int i) {
            float2 y = unpack_bf16(z);
            return pack_bf16(y.x * power(slope2, (float)max(n - 1 - i, 0)), y.y * power(slope2, (float)max(n - 2 - i, 0)));
        });
        float decay = exp2f(-slope2 * (float)n);
#pragma unroll
        for (int i = 0; i < PANELS * 32; i++) s[i] *= decay;
        products_begin();
#pragma unroll
        for (int d = 0; d < 4; d++) product<1>(s, a[d], panel_operand_transposed(V, PANEL) + 128 * d, true);
        products_commit();
        float o[32];
        outputs<HS, false>(o, p, Q, K, V, S, factor, g.scale * power(slope2, (float)(row + 1)), g.scale * power(slope2, (float)(row + 9)));
        products_done(s);

        if (threadIdx.x == 0) bulk_store_wait();  // S has been left
        __syncthreads();                          // nobody needs the tiles and S any more
#pragma unroll
        for (int m = 0; m < 8; m++)
#pragma unroll
            for (int e = 0; e < 2; e++) store_shared(Q + p * PANEL + place(m) + e * 1024, pack_bf16(o[4 * m + 2 * e], o[4 * m + 2 * e + 1]));
        store_state(S + 64 * p * 128, STATE_PANEL, place, s);
        async_fence();
        warpgroup_barrier<HS>(p);
        if (n == CHUNK) {
            if (threadIdx.x % 128 == 0) {
                bulk_store(&maps.out, Q + p * PANEL, 64 * p, h, first + k * CHUNK, 0);
                bulk_store_commit();
            }
        } else {
            for (int piece = threadIdx.x % 8, i = threadIdx.x % 128 / 8; i < n; i += 16)
                if (64 * p + 8 * piece < g.hs)
                    *(uint4*)(o_out + (int64_t)(first + k * CHUNK + i) * g.channels() + h * g.hs + 64 * p + 8 * piece) =
                        load_shared(Q + p * PANEL + i * 128 + ((piece ^ i % 8) << 4));
        }
    }
    float* to = g.finish(q, h);
    if (to)
        for_state(s, p, warp, [&](int i, int j, float& x) {
            if (i < g.hs && j < g.hs) to[i * g.hs + j] = x;
        });
    if (threadIdx.x % 128 == 0) bulk_store_wait();
#endif
}

// All gradients of a span, from its last chunk to the first. g.borders: D behind the spans; g.start(): S before a sequence's first chunk.
template <int HS>
__global__ void __launch_bounds__(lightning_wgmma::Shape<HS>::THREADS, lightning_wgmma::Shape<HS>::BACKWARD_BLOCKS)
    lightning_backward_kernel8(const Lightning g, floatX* du, const __grid_constant__ LightningMaps maps) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
    using namespace lightning_wgmma;
    using lightning_mma::power;
    constexpr int PANELS = Shape<HS>::PANELS, TILE = Shape<HS>::TILE, STATE = Shape<HS>::STATE, STATE_PANEL = Shape<HS>::STATE_PANEL;
    constexpr int V_BUFFERS = Shape<HS>::V_BUFFERS, ACTIVE = (6 + V_BUFFERS) * TILE, S_ = ACTIVE + 3 * TILE, D_ = S_ + STATE, TABLES = D_ + STATE;
    extern __shared__ __align__(1024) unsigned char lightning_hopper_memory[];
    // The raw q, k, v, later SiLU', later the gradients, and d_o: a chunk's stand beside the next one's. Then SiLU of q, k, v; S; D.
    uint32_t memory = shared_address(lightning_hopper_memory);
    auto buffer = [&](int t, int chunk) { return memory + (t < 2 ? 2 * t + chunk % 2 : 6 + chunk % V_BUFFERS) * TILE; };  // t: q, k, v
    auto d_o_buffer = [&](int chunk) { return memory + (4 + chunk % 2) * TILE; };
    auto active = [&](int t) { return memory + ACTIVE + t * TILE; };
    float* factors = (float*)(lightning_hopper_memory + TABLES);  // two tables
    const uint32_t keys = memory + TABLES + 512 * (uint32_t)sizeof(float), queries = keys + 8;
    int p = __shfl_sync(0xffffffff, threadIdx.x / 128, 0), warp = __shfl_sync(0xffffffff, threadIdx.x / 32 % 4, 0), h = blockIdx.x % g.heads;
    bool leader = threadIdx.x % 128 == 0;
    LightningSpan q;
    if (!g.find(g.block_slot(true), q) || q.n <= 0) return;
    int chunks = (q.n + CHUNK - 1) / CHUNK, first = q.begin + q.first;

    // Copies are started by each warpgroup's leader, of panel p. k, v and, as rows 64·p ..., what the warpgroup needs of S complete `keys`, q and d_o
    // `queries`.
    auto load_u = [&](int t, int chunk, uint32_t barrier) {
        bulk_load(buffer(t, chunk) + p * PANEL, &maps.u, barrier, 64 * p, t * g.heads + h, first + chunk * CHUNK);
    };
    auto load = [&](int chunk, bool v_too) {
        const bool state = g.leaves(q, chunk);
        barrier_arrive_expect(keys, 2 * PANEL + (state ? PANELS * PANEL : 0));
        load_u(1, chunk, keys);
        if (v_too) load_u(2, chunk, keys);
        if (state) {
#pragma unroll
            for (int i = 0; i < PANELS; i++) bulk_load(memory + S_ + i * STATE_PANEL + p * PANEL, &maps.states, keys, 64 * i, 64 * p, g.state(q, chunk, h), 0);
        }
        barrier_arrive_expect(queries, 2 * PANEL);
        load_u(0, chunk, queries);
        bulk_load(d_o_buffer(chunk) + p * PANEL, &maps.d_o, queries, 64 * p, h, first + chunk * CHUNK);
        if (!v_too) bulk_prefetch(&maps.u, 64 * p, 2 * g.heads + h, first + chunk * CHUNK);
    };
    if (threadIdx.x == 0) {
        barrier_init(keys, PANELS);
        barrier_init(queries, PANELS);
        barrier_init_fence();
    }
    __syncthreads();
    if (leader) load(chunks - 1, true);

    float slope2 = (float)(g.slope(h) * 1.4426950408889634), s[PANELS * 32];  // D: rows 64·p ...
    factor_table(factors, false, slope2, g.scale, threadIdx.x, blockDim.x);
    factor_table(factors + 256, true, slope2, g.scale, threadIdx.x, blockDim.x);
    const float* from = q.index < q.spans - 1 ? g.border(q, q.index, h) : nullptr;
    for_state(s, p, warp, [&](int i, int j, float& x) { x = from && i < g.hs && j < g.hs ? from[i * g.hs + j] : 0; });
    Place place(warp);
    store_state(memory + D_ + 64 * p * 128, STATE_PANEL, place, s);
    int row = 16 * warp + lightning_mma::lane() / 4;  // and 8 more: this thread's tokens of the outputs
    const float *by_keys = first_factor(factors, warp), *by_queries = first_factor(factors + 256, warp);

    // o⊙SiLU' takes SiLU's place, and goes to device memory.
    auto finish = [&](const float(&o)[32], int t, int chunk, int n) {
        const uint32_t panel = buffer(t, chunk) + p * PANEL;
        uint32_t x[8][2];  // loaded before anything is stored: nothing tells the compiler that these are other places
#pragma unroll
        for (int i = 0; i < 8; i++)
#pragma unroll
            for (int e = 0; e < 2; e++) asm volatile("ld.shared.u32 %0, [%1];" : "=r"(x[i][e]) : "r"(panel + place(i) + e * 1024) : "memory");
#pragma unroll
        for (int i = 0; i < 8; i++)
#pragma unroll
            for (int e = 0; e < 2; e++) {
                float2 d = unpack_bf16(x[i][e]);
                store_shared(panel + place(i) + e * 1024, pack_bf16(o[4 * i + 2 * e] * d.x, o[4 * i + 2 * e + 1] * d.y));
            }
        async_fence();
        warpgroup_barrier<HS>(p);
        if (n == CHUNK) {
            if (leader) {
                bulk_store(&maps.out, panel, 64 * p, t * g.heads + h, first + chunk * CHUNK, 0);
                bulk_store_commit();
            }
            __syncwarp();
        } else {
            for (int piece = threadIdx.x % 8, i = threadIdx.x % 128 / 8; i < n; i += 16)
                if (64 * p + 8 * piece < g.hs)
                    *(uint4*)(du + (int64_t)(first + chunk * CHUNK + i) * 3 * g.channels() + t * g.channels() + h * g.hs + 64 * p + 8 * piece) =
                        load_shared(panel + i * 128 + ((piece ^ i % 8) << 4));
            async_fence();
            warpgroup_barrier<HS>(p);
        }
    };
    auto activate = [&](int t, int chunk, int n) {
        const uint32_t raw = buffer(t, chunk), to = active(t) - raw;
        for_pieces<HS>(raw, threadIdx.x, [&](int row, uint32_t at, uint4 x) {
            uint4 y;
            y.x = silus(x.x, x.x), y.y = silus(x.y, x.y), y.z = silus(x.z, x.z), y.w = silus(x.w, x.w);
            store_shared(at, x);
            store_shared(at + to, row < n ? y : make_uint4(0, 0, 0, 0));
        });
    };
    // k, v and S of a chunk.
    auto activate_keys = [&](int chunk, int n) {
        if (chunk == 0 && q.index == 0) {  // the state that the sequence starts from
            const float* start = g.start(q.seq, h);
            for (int e = threadIdx.x; e < HS * HS / 2; e += Shape<HS>::THREADS) {
                int i = e / (HS / 2), j = e % (HS / 2) * 2;
                uint32_t x = 0;
                if (start && i < g.hs && j < g.hs) x = pack_bf16(start[i * g.hs + j], start[i * g.hs + j + 1]);
                store_shared(memory + S_ + j / 64 * STATE_PANEL + i * 128 + ((j % 64 / 8 ^ i % 8) << 4) + j % 8 * 2, x);
            }
        }
        barrier_wait(keys, chunks - 1 - chunk & 1);
        activate(1, chunk, n);
        activate(2, chunk, n);
    };

    for (int chunk = chunks - 1; chunk >= 0; chunk--) {
        asm volatile("" : "+r"(memory), "+f"(slope2));  // what follows from them is made for each chunk again, rather than kept in registers
        const uint32_t dO = d_o_buffer(chunk), Q = active(0), K = active(1), V = active(2), S = memory + S_, D = memory + D_;
        const int n = min(CHUNK, q.n - CHUNK * chunk);
        const bool odd = chunk % 2, more = chunk > 0;
        if (odd || chunk == chunks - 1) activate_keys(chunk, n);
        barrier_wait(queries, chunks - 1 - chunk & 1);
        activate(0, chunk, n);
        if (n < CHUNK)
            for_pieces<HS>(dO, threadIdx.x, [&](int row, uint32_t at, uint4) {
                if (row >= n) store_shared(at, make_uint4(0, 0, 0, 0));
            });
        async_fence();
        __syncthreads();

        // D first; its old value is still in shared memory, where the products below read it.
        uint32_t a[4][4];
        transposed_rows(a, Q + p * PANEL, warp, [&](uint32_t z, int i) {
            float2 y = unpack_bf16(z);
            return pack_bf16(y.x * g.scale * power(slope2, (float)(i + 1)), y.y * g.scale * power(slope2, (float)(i + 2)));
        });
        float decay = power(slope2, (float)n);
#pragma unroll
        for (int i = 0; i < PANELS * 32; i++) s[i] *= decay;
        products_begin();
#pragma unroll
        for (int d = 0; d < 4; d++) product<1>(s, a[d], panel_operand_transposed(dO, PANEL) + 128 * d, true);
        products_commit();

        float o[32];
        if (!odd) {
            outputs<HS, true>(o, p, dO, V, K, S, by_queries, g.scale * power(slope2, (float)(row + 1)), g.scale * power(slope2, (float)(row + 9)));
            finish(o, 0, chunk, n);
        }
        float above = power(slope2, (float)max(n - 1 - row, 0)), below = power(slope2, (float)max(n - 9 - row, 0));
        outputs<HS, false>(o, p, K, Q, dO, D, by_keys, above, below);
        products_done(s);
        if (leader && more) {
            bulk_store_wait();  // the buffers of the chunk behind are free
            load(chunk - 1, V_BUFFERS == 2);
        }
        __syncwarp();
        finish(o, 2, chunk, n);
        outputs<HS, true>(o, p, V, dO, Q, D, by_keys, above, below);
        if (V_BUFFERS == 1 && leader && more) {
            bulk_store_wait();
            load_u(2, chunk - 1, keys);
        }
        __syncwarp();
        finish(o, 1, chunk, n);
        if (odd) outputs_within<HS>(o, p, dO, V, K, by_queries);
        __syncthreads();  // nobody needs SiLU of q, k, v, nor D any more
        store_state(D + 64 * p * 128, STATE_PANEL, place, s);
        if (!odd) continue;

        // Then what the queries have of the chunk before, and of S before that one.
        activate_keys(chunk - 1, CHUNK);
        async_fence();
        __syncthreads();
        outputs_before<HS>(o, p, dO, V, K, S, slope2, g.scale * power(slope2, (float)(row + 1)), g.scale * power(slope2, (float)(row + 9)));
        finish(o, 0, chunk, n);
    }
    if (leader) bulk_store_wait();
#endif
}

}  // namespace gpu

#endif
