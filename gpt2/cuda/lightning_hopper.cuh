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
// Backward is one sweep from the last chunk to the first, because the states S are there already, as bf16 (which they are rounded to anyway as factors of a
// product): hs/64 numbers for each number of q. Forward leaves them if it is given a place; otherwise a sweep over k and v makes them.
//
// A block has a span and head, a warpgroup 64 columns of its outputs (two share a head larger than 64) and 64 rows of the state, in registers as float32 and in
// shared memory as bf16. Tiles come by bulk copies, in panels of 64 columns (hopper.cuh).
//   Forward has two stages of tiles; SiLU replaces the raw numbers, o takes q's place.
//   Backward has one: SiLU goes from each raw tile to one beside it, and SiLU' into the place of the raw numbers, where it waits for the gradient, which takes
//   its place in turn and is copied out; then the next chunk's tile comes. dQ is made first and dV last, so q, S and k of the next chunk are on their way
//   meanwhile. Three blocks of 4 warps a multiprocessor cover each other's waiting; at head sizes above 64 there is room for one of 8.
#pragma once

#include "hopper.cuh"
#include "lightning_tensor_cores.cuh"

#ifndef GPU_FLOAT32

namespace gpu {

namespace lightning_wgmma {

constexpr int CHUNK = 64, PANEL = CHUNK * 128;  // tokens; bytes of a panel of so many rows

template <int HS>
struct Shape {
    static constexpr int PANELS = HS / 64, THREADS = 128 * PANELS, BLOCKS = HS == 64 ? 3 : 1;
    static constexpr int TILE = PANELS * PANEL, STATE_PANEL = HS * 128, STATE = PANELS * STATE_PANEL;  // bytes
    static constexpr int BACKWARD_SHARED = 7 * TILE + 2 * STATE + 4 * 128 * (int)sizeof(float) + 16;   // of lightning_backward_kernel6
    static constexpr int FORWARD_SHARED = 6 * TILE + STATE + 2 * 128 * (int)sizeof(float) + 16;        // of lightning_forward_kernel5
    static constexpr int STATES_SHARED = 4 * TILE + STATE + 16;                                        // of lightning_states_kernel6
};

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
    using lightning_mma::store_shared;
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

// Calls f(row, piece of 8 columns among the tile's, address) for this thread's pieces of a tile of 64 rows.
template <int HS, class F>
__device__ inline void for_pieces(uint32_t tile, F f) {
    int piece = threadIdx.x % 8;
#pragma unroll
    for (int i = 0; i < HS / 64; i++)
#pragma unroll
        for (int r = 0; r < CHUNK; r += Shape<HS>::THREADS / 8) {
            int row = r + threadIdx.x / 8;
            f(row, 8 * i + piece, tile + i * PANEL + row * 128 + ((piece ^ row % 8) << 4));
        }
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
__device__ inline void factor_table(float* table, bool queries, float slope2, float scale) {
    for (int x = threadIdx.x; x < 256; x += blockDim.x) {
        int distance = x % 128 + x / 128 - 64;
        if (queries) distance = -distance;
        table[x] = distance >= 0 ? scale * lightning_mma::power(slope2, (float)distance) : 0;
    }
}
__device__ inline const float* first_factor(const float* table, int warp) {
    int x = 64 + lightning_mma::lane() % 4 * 2 - (16 * warp + lightning_mma::lane() / 4);
    return table + (x % 2 == 0 ? x : 128 + x - 1);
}

// o (64 tokens, columns 64·p ...) = (X·Yᵀ⊙factors)·Z + diag(f)·X·state, or X·stateᵀ. This thread's rows have f = above, and 8 rows further down below; its
// first number's factor is *factor, from where it goes as in factor_table().
template <int HS, bool TRANSPOSED>
__device__ __forceinline__ void outputs(float (&o)[32], int p, uint32_t X, uint32_t Y, uint32_t Z, uint32_t state, const float* factor, float above,
                                        float below) {
    constexpr int STATE_PANEL = Shape<HS>::STATE_PANEL;
    float c[32];
    products_begin();
#pragma unroll
    for (int d = 0; d < HS / 16; d++) product(c, panel_operand(X + d / 4 * PANEL) + 2 * (d % 4), panel_operand(Y + d / 4 * PANEL) + 2 * (d % 4), d > 0);
#pragma unroll
    for (int d = 0; d < HS / 16; d++) {
        uint64_t x = panel_operand(X + d / 4 * PANEL) + 2 * (d % 4);
        if constexpr (TRANSPOSED)
            product(o, x, panel_operand(state + d / 4 * STATE_PANEL + 64 * p * 128) + 2 * (d % 4), d > 0);
        else
            product<0, 1>(o, x, panel_operand_transposed(state + p * STATE_PANEL, STATE_PANEL) + 128 * d, d > 0);
    }
    products_commit();
    products_wait<0>();
    products_done(c);
    products_done(o);
    float2 f = *(const float2*)(factor - 8);  // eight rows further down the factors are those of eight columns before
    uint32_t a[4][4];
#pragma unroll
    for (int n = 0; n < 8; n++) {
        float2 up = *(const float2*)(factor + 8 * n);
        a[n / 2][n % 2 * 2] = pack_bf16(c[4 * n] * up.x, c[4 * n + 1] * up.y);
        a[n / 2][n % 2 * 2 + 1] = pack_bf16(c[4 * n + 2] * f.x, c[4 * n + 3] * f.y);
        f = up;
        o[4 * n] *= above, o[4 * n + 1] *= above;
        o[4 * n + 2] *= below, o[4 * n + 3] *= below;
    }
    products_begin();
#pragma unroll
    for (int d = 0; d < 4; d++) product<1>(o, a[d], panel_operand_transposed(Z + p * PANEL, PANEL) + 128 * d, true);
    products_commit();
    products_wait<0>();
    products_done(o);
}

}  // namespace lightning_wgmma

// Of u (hs, 3·heads, N), d_o (hs, heads, N), du (hs, 3·heads, N, 1) or o (hs, heads, N, 1), states (hs, hs, N/64·heads, 1), whose rows are those of S.
struct LightningMaps {
    CUtensorMap u, d_o, out, states;
};

// A sweep over k and v for S, or (`backwards`) over q and d_o for D: from nothing, for what each span adds to the state behind it (before it), which goes to
// the borders as float32; or, `chunks_out`, from where each span starts, leaving S before every chunk as bf16.
template <int HS>
__global__ void __launch_bounds__(lightning_wgmma::Shape<HS>::THREADS, HS == 64 ? 4 : 2)
    lightning_states_kernel6(const Lightning g, const __grid_constant__ LightningMaps maps, bool backwards, bool chunks_out) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
    using namespace lightning_wgmma;
    using lightning_mma::load_shared, lightning_mma::store_shared, lightning_mma::power;
    constexpr int PANELS = Shape<HS>::PANELS, TILE = Shape<HS>::TILE, STATE_PANEL = Shape<HS>::STATE_PANEL;
    extern __shared__ __align__(1024) unsigned char lightning_hopper_memory[];
    uint32_t tiles = shared_address(lightning_hopper_memory), out = tiles + 4 * TILE, full = out + Shape<HS>::STATE;  // two stages of two tiles
    int p = __shfl_sync(0xffffffff, threadIdx.x / 128, 0), warp = __shfl_sync(0xffffffff, threadIdx.x / 32 % 4, 0), h = blockIdx.x % g.heads;
    LightningSpan q;
    if (!g.find(g.block_slot(false), q) || q.n <= 0) return;
    if (!chunks_out && q.index == (backwards ? 0 : q.spans - 1)) return;
    float slope2 = (float)(g.slope(h) * 1.4426950408889634);
    int all = (q.n + CHUNK - 1) / CHUNK, chunks = chunks_out ? all : min(all, chunks_that_count(slope2));

    auto load = [&](int k) {  // the k-th chunk in the order of the sweep
        uint32_t to = tiles + k % 2 * 2 * TILE, barrier = full + k % 2 * 8;
        int row = q.begin + q.first + (backwards ? chunks - 1 - k : all - chunks + k) * CHUNK;
        barrier_arrive_expect(barrier, 2 * TILE);
#pragma unroll
        for (int i = 0; i < PANELS; i++) {
            bulk_load(to + i * PANEL, &maps.u, barrier, 64 * i, backwards ? h : g.heads + h, row);
            if (backwards)
                bulk_load(to + TILE + i * PANEL, &maps.d_o, barrier, 64 * i, h, row);
            else
                bulk_load(to + TILE + i * PANEL, &maps.u, barrier, 64 * i, 2 * g.heads + h, row);
        }
    };
    if (threadIdx.x == 0) {
        barrier_init(full, 1);
        barrier_init(full + 8, 1);
        barrier_init_fence();
        load(0);
        if (chunks > 1) load(1);
    }

    float s[PANELS * 32];
    const float* from = chunks_out ? g.start(q, h) : nullptr;
    for_state(s, p, warp, [&](int i, int j, float& x) { x = from && i < g.hs && j < g.hs ? from[i * g.hs + j] : 0; });
    Place place(warp);
    __syncthreads();

    for (int k = 0; k < chunks; k++) {
        uint32_t x = tiles + k % 2 * 2 * TILE, y = x + TILE;
        int chunk = backwards ? chunks - 1 - k : all - chunks + k, n = min(CHUNK, q.n - CHUNK * chunk);
        bool leave = chunks_out && q.first + chunk > 0;
        if (leave) {
            if (threadIdx.x == 0) bulk_store_wait();
            __syncthreads();
            store_state(out + 64 * p * 128, STATE_PANEL, place, s);
        }
        barrier_wait(full + k % 2 * 8, k / 2 & 1);
        if (!backwards || n < CHUNK)
            for_pieces<HS>(y, [&](int row, int, uint32_t at) {
                uint4 z = load_shared(at);
                if (!backwards) z = lightning_mma::silus(z);
                store_shared(at, row < n ? z : make_uint4(0, 0, 0, 0));
            });
        async_fence();
        __syncthreads();
        if (leave && threadIdx.x == 0) {
#pragma unroll
            for (int i = 0; i < PANELS * PANELS; i++)
                bulk_store(&maps.states, out + i / PANELS * STATE_PANEL + i % PANELS * PANEL, i / PANELS * 64, i % PANELS * 64, (int)q.state(chunk, g.heads, h),
                           0);
            bulk_store_commit();
        }
        uint32_t a[4][4];
        transposed_rows(a, x + p * PANEL, warp, [&](uint32_t z, int i) {
            float2 y = unpack_bf16(lightning_mma::silus(z));
            float left = backwards ? g.scale * power(slope2, (float)(i + 1)) : power(slope2, (float)max(n - 1 - i, 0));
            float right = backwards ? g.scale * power(slope2, (float)(i + 2)) : power(slope2, (float)max(n - 2 - i, 0));
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
    if (chunks_out) {
        if (threadIdx.x == 0) bulk_store_wait();
        return;
    }
    float* to = g.border(q, backwards ? q.index - 1 : q.index, h);
    for_state(s, p, warp, [&](int i, int j, float& x) {
        if (i < g.hs && j < g.hs) to[i * g.hs + j] = x;
    });
#endif
}

// o of a span, from its first chunk to the last; with `leave_states` S before chunks too.
template <int HS>
__global__ void __launch_bounds__(lightning_wgmma::Shape<HS>::THREADS, lightning_wgmma::Shape<HS>::BLOCKS)
    lightning_forward_kernel5(const Lightning g, floatX* o_out, const __grid_constant__ LightningMaps maps, bool leave_states) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
    using namespace lightning_wgmma;
    using lightning_mma::load_shared, lightning_mma::store_shared, lightning_mma::power;
    constexpr int PANELS = Shape<HS>::PANELS, TILE = Shape<HS>::TILE, STATE_PANEL = Shape<HS>::STATE_PANEL;
    extern __shared__ __align__(1024) unsigned char lightning_hopper_memory[];
    uint32_t tiles = shared_address(lightning_hopper_memory), S = tiles + 6 * TILE;  // two stages of q, k, v
    float* factors = (float*)(lightning_hopper_memory + 6 * TILE + Shape<HS>::STATE);
    uint32_t full = S + Shape<HS>::STATE + 256 * (uint32_t)sizeof(float);
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
    factor_table(factors, true, slope2, g.scale);
    const float* from = g.start(q, h);
    for_state(s, p, warp, [&](int i, int j, float& x) { x = from && i < g.hs && j < g.hs ? from[i * g.hs + j] : 0; });
    Place place(warp);
    store_state(S + 64 * p * 128, STATE_PANEL, place, s);
    int row = 16 * warp + lightning_mma::lane() / 4;
    const float* factor = first_factor(factors, warp);
    __syncthreads();

    for (int k = 0; k < chunks; k++) {
        uint32_t Q = tiles + k % 2 * 3 * TILE, K = Q + TILE, V = K + TILE;
        int n = min(CHUNK, q.n - CHUNK * k);
        barrier_wait(full + k % 2 * 8, k / 2 & 1);
#pragma unroll
        for (int t = 0; t < 3; t++)
            for_pieces<HS>(Q + t * TILE, [&](int row, int, uint32_t at) {
                uint4 x = lightning_mma::silus(load_shared(at));
                store_shared(at, row < n ? x : make_uint4(0, 0, 0, 0));
            });
        async_fence();
        if (threadIdx.x % 128 == 0) bulk_store_wait();  // o of the chunk before has left the other stage
        __syncthreads();
        if (threadIdx.x == 0) {
            if (k + 1 < chunks) load(k + 1);
            if (leave_states && q.first + k > 0) {
#pragma unroll
                for (int i = 0; i < PANELS * PANELS; i++)
                    bulk_store(&maps.states, S + i / PANELS * STATE_PANEL + i % PANELS * PANEL, i / PANELS * 64, i % PANELS * 64, (int)q.state(k, g.heads, h),
                               0);
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
__global__ void __launch_bounds__(lightning_wgmma::Shape<HS>::THREADS, lightning_wgmma::Shape<HS>::BLOCKS)
    lightning_backward_kernel6(const Lightning g, floatX* du, const __grid_constant__ LightningMaps maps) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
    using namespace lightning_wgmma;
    using lightning_mma::load_shared, lightning_mma::store_shared, lightning_mma::power;
    constexpr int PANELS = Shape<HS>::PANELS, TILE = Shape<HS>::TILE, STATE_PANEL = Shape<HS>::STATE_PANEL;
    extern __shared__ __align__(1024) unsigned char lightning_hopper_memory[];
    // u: the raw q, k, v, later SiLU', later the gradients. Q, K, V: SiLU of them.
    uint32_t u = shared_address(lightning_hopper_memory), dO = u + 3 * TILE, Q = dO + TILE, K = Q + TILE, V = K + TILE, S = V + TILE, D = S + Shape<HS>::STATE;
    float* factors = (float*)(lightning_hopper_memory + 7 * TILE + 2 * Shape<HS>::STATE);  // two tables
    uint32_t early = D + Shape<HS>::STATE + 512 * (uint32_t)sizeof(float), late = early + 8;
    int p = __shfl_sync(0xffffffff, threadIdx.x / 128, 0), warp = __shfl_sync(0xffffffff, threadIdx.x / 32 % 4, 0), h = blockIdx.x % g.heads;
    bool leader = threadIdx.x % 128 == 0;
    LightningSpan q;
    if (!g.find(g.block_slot(true), q) || q.n <= 0) return;
    int chunks = (q.n + CHUNK - 1) / CHUNK, first = q.begin + q.first;

    // Copies are started by each warpgroup's leader, of panel p: q, k and, as rows 64·p ..., what the warpgroup needs of S complete `early`, v and d_o `late`.
    auto load_u = [&](int t, int chunk, uint32_t barrier) {
        bulk_load(u + t * TILE + p * PANEL, &maps.u, barrier, 64 * p, t * g.heads + h, first + chunk * CHUNK);
    };
    auto load_q_and_state = [&](int chunk) {
        bool state = q.first + chunk > 0;
        barrier_arrive_expect(early, 2 * PANEL + (state ? PANELS * PANEL : 0));
        load_u(0, chunk, early);
        if (state) {
#pragma unroll
            for (int i = 0; i < PANELS; i++)
                bulk_load(S + i * STATE_PANEL + p * PANEL, &maps.states, early, 64 * i, 64 * p, (int)q.state(chunk, g.heads, h), 0);
        }
    };
    auto load_d_o = [&](int chunk) {
        barrier_arrive_expect(late, 2 * PANEL);
        bulk_load(dO + p * PANEL, &maps.d_o, late, 64 * p, h, first + chunk * CHUNK);
    };
    auto load_all = [&](int chunk) {
        load_q_and_state(chunk);
        load_u(1, chunk, early);
        load_d_o(chunk);
        load_u(2, chunk, late);
    };
    auto prefetch = [&](int chunk) {  // to the L2 cache; blocks that share a multiprocessor do better without
#pragma unroll
        for (int t = 0; t < 3; t++) bulk_prefetch(&maps.u, 64 * p, t * g.heads + h, first + chunk * CHUNK);
        bulk_prefetch(&maps.d_o, 64 * p, h, first + chunk * CHUNK);
    };
    auto store = [&](int t, int chunk) {
        bulk_store(&maps.out, u + t * TILE + p * PANEL, 64 * p, t * g.heads + h, first + chunk * CHUNK, 0);
        bulk_store_commit();
    };
    if (threadIdx.x == 0) {
        barrier_init(early, PANELS);
        barrier_init(late, PANELS);
        barrier_init_fence();
    }
    __syncthreads();
    if (leader) load_all(chunks - 1);

    float slope2 = (float)(g.slope(h) * 1.4426950408889634), s[PANELS * 32];  // D: rows 64·p ...
    factor_table(factors, false, slope2, g.scale);
    factor_table(factors + 256, true, slope2, g.scale);
    const float* from = q.index < q.spans - 1 ? g.border(q, q.index, h) : nullptr;
    for_state(s, p, warp, [&](int i, int j, float& x) { x = from && i < g.hs && j < g.hs ? from[i * g.hs + j] : 0; });
    Place place(warp);
    store_state(D + 64 * p * 128, STATE_PANEL, place, s);
    int row = 16 * warp + lightning_mma::lane() / 4;  // and 8 more: this thread's tokens of the outputs
    const float *by_keys = first_factor(factors, warp), *by_queries = first_factor(factors + 256, warp);

    // o⊙SiLU' to SiLU's place.
    auto finish = [&](const float(&o)[32], uint32_t tile) {
#pragma unroll
        for (int n = 0; n < 8; n++)
#pragma unroll
            for (int e = 0; e < 2; e++) {
                uint32_t at = tile + p * PANEL + place(n) + e * 1024, x;
                asm volatile("ld.shared.u32 %0, [%1];" : "=r"(x) : "r"(at) : "memory");
                float2 d = unpack_bf16(x);
                store_shared(at, pack_bf16(o[4 * n + 2 * e] * d.x, o[4 * n + 2 * e + 1] * d.y));
            }
        async_fence();
    };
    auto activate = [&](int t, int n) {
        for_pieces<HS>(u + t * TILE, [&](int row, int, uint32_t at) {
            uint4 x = load_shared(at), y;
            y.x = silus(x.x, x.x), y.y = silus(x.y, x.y), y.z = silus(x.z, x.z), y.w = silus(x.w, x.w);
            store_shared(at, x);
            store_shared(at + 4 * TILE, row < n ? y : make_uint4(0, 0, 0, 0));
        });
    };

    for (int k = 0; k < chunks; k++) {
        int chunk = chunks - 1 - k, n = min(CHUNK, q.n - CHUNK * chunk);
        bool whole = n == CHUNK, more = chunk > 0;
        if (chunk == 0 && q.index == 0) {  // the state that the sequence starts from
            const float* start = g.start(q.seq, h);
            for (int e = threadIdx.x; e < HS * HS / 2; e += Shape<HS>::THREADS) {
                int i = e / (HS / 2), j = e % (HS / 2) * 2;
                uint32_t x = 0;
                if (start && i < g.hs && j < g.hs) x = pack_bf16(start[i * g.hs + j], start[i * g.hs + j + 1]);
                store_shared(S + j / 64 * STATE_PANEL + i * 128 + ((j % 64 / 8 ^ i % 8) << 4) + j % 8 * 2, x);
            }
        }
        barrier_wait(early, k & 1);
        if (HS == 128 && leader && more) prefetch(chunk - 1);
        activate(0, n);
        activate(1, n);
        barrier_wait(late, k & 1);
        activate(2, n);
        if (!whole)
            for_pieces<HS>(dO, [&](int row, int, uint32_t at) {
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
        float decay = exp2f(-slope2 * (float)n);
#pragma unroll
        for (int i = 0; i < PANELS * 32; i++) s[i] *= decay;
        products_begin();
#pragma unroll
        for (int d = 0; d < 4; d++) product<1>(s, a[d], panel_operand_transposed(dO, PANEL) + 128 * d, true);
        products_commit();

        float o[32];
        outputs<HS, true>(o, p, dO, V, K, S, by_queries, g.scale * power(slope2, (float)(row + 1)), g.scale * power(slope2, (float)(row + 9)));
        products_done(s);
        finish(o, u);
        warpgroup_barrier<HS>(p);
        if (leader && whole) store(0, chunk);
        __syncwarp();

        float above = power(slope2, (float)max(n - 1 - row, 0)), below = power(slope2, (float)max(n - 9 - row, 0));
        outputs<HS, true>(o, p, V, dO, Q, D, by_keys, above, below);
        finish(o, u + TILE);
        warpgroup_barrier<HS>(p);
        if (leader && whole) {
            bulk_store_wait();  // q's place is free
            if (more) load_q_and_state(chunk - 1);
            store(1, chunk);
        }
        __syncwarp();

        outputs<HS, false>(o, p, K, Q, dO, D, by_keys, above, below);
        if (leader && whole && more) {
            bulk_store_wait();
            load_u(1, chunk - 1, early);
        }
        __syncwarp();
        finish(o, u + 2 * TILE);
        __syncthreads();  // nobody needs the tiles and states any more
        if (whole) {
            if (leader) {
                store(2, chunk);
                if (more) {
                    load_d_o(chunk - 1);
                    bulk_store_wait();
                    load_u(2, chunk - 1, late);
                }
            }
        } else {
            int64_t C = g.channels();
            for (int t = 0; t < 3; t++)
                for_pieces<HS>(u + t * TILE, [&](int row, int piece, uint32_t at) {
                    if (row < n && piece * 8 < g.hs)
                        *(uint4*)(du + (int64_t)(first + chunk * CHUNK + row) * 3 * C + t * C + h * g.hs + piece * 8) = load_shared(at);
                });
            async_fence();
            __syncthreads();
            if (leader && more) load_all(chunk - 1);
        }
        store_state(D + 64 * p * 128, STATE_PANEL, place, s);
    }
    if (leader) bulk_store_wait();
#endif
}

}  // namespace gpu

#endif
