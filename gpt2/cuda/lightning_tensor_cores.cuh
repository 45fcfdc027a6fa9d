// Lightning attention's sweeps on tensor cores: bf16 operands, float32 sums, head sizes up to 128 that are multiples of 8. What a sweep
// computes, and the formulas of a chunk, stand in lightning.cuh.
#pragma once

#include "lightning_sweep.cuh"
#include "tensor_cores.cuh"

#ifndef GPU_FLOAT32

namespace gpu {

namespace lightning_mma {

constexpr int CHUNK = 64;  // tokens

enum Kind { STATES, SINGLE, PAIR };  // what spans add to the state; one sweep; a pair of them

// HS is the head size rounded up to 32, 64, 96 or 128; behind the head size everything is zero. Of a chunk's outputs four warps have 16 rows each; for the
// larger heads there are two groups of four warps, which share the columns. Of the state (HS,HS) the first HS/16 warps have 16 rows each, in registers.
template <int HS>
struct Shape {
    static constexpr int GROUPS = HS > 64 ? 2 : 1, WARPS = 4 * GROUPS, THREADS = 32 * WARPS;
    static constexpr int WIDTH = HS / GROUPS;    // columns of the outputs that a warp has
    static constexpr int TILE = CHUNK * HS * 2;  // bytes
};
// In shared memory: two stages of the tiles B, D, A, pair A, so that the next chunk is on its way while this one is worked on; then the state as bf16.
template <int KIND>
constexpr int TILES = KIND == STATES   ? 2
                      : KIND == SINGLE ? 3
                                       : 4;
template <int HS, int KIND>
constexpr int shared_bytes = 2 * TILES<KIND>* Shape<HS>::TILE + (KIND == STATES ? 0 : HS * HS * 2);
// Blocks that should fit on a multiprocessor of an H100: what its shared memory has room for, except where their registers would not.
template <int HS, int KIND>
constexpr int BLOCKS = HS <= 64                     ? (KIND == STATES ? 5 : 3)
                       : HS == 96 && KIND == STATES ? 2
                                                    : 1;

// ---- Fragments of products are those of tensor_cores.cuh: row = lane/4, column = 2·(lane%4).

__device__ inline int lane() { return threadIdx.x % 32; }
__device__ inline int lane_row() { return threadIdx.x % 32 / 4; }
__device__ inline int lane_column() { return threadIdx.x % 4 * 2; }

// To the L2 cache.
__device__ inline void prefetch(const void* p) { asm volatile("prefetch.global.L2 [%0];" ::"l"(p)); }
// λ^d for d >= 0, −slope2 = log2(λ). d comes as a float, because converting integers would cost as much as the exponential.
__device__ inline float power(float slope2, float d) { return exp2_fast(-slope2 * d); }

// ---- SiLU of two numbers, x·σ(x) with σ(x) = (1 + tanh(x/2))/2: one operation of the special function unit instead of two, and half of the instructions. The
// unit's tanh is good to 2^−11, so SiLU to |x|/4096, where bf16 rounds x to |x|/512.

__device__ inline uint32_t silus(uint32_t u) {
    float2 x = unpack_bf16(u);
    x.x *= 0.5f, x.y *= 0.5f;
    return pack_bf16(x.x + x.x * tanh_fast(x.x), x.y + x.y * tanh_fast(x.y));
}
__device__ inline uint4 silus(uint4 u) { return make_uint4(silus(u.x), silus(u.y), silus(u.z), silus(u.w)); }
// o⊙SiLU'(u), SiLU'(x) = σ + x·σ·(1−σ)
__device__ inline float times_silu_gradient(float o, float x) {
    float s = 0.5f + 0.5f * tanh_fast(0.5f * x), y = x * s;
    return o * (s + (y - y * s));
}
__device__ inline uint32_t times_silu_gradients(uint32_t o, uint32_t u) {
    float2 y = unpack_bf16(o), x = unpack_bf16(u);
    return pack_bf16(times_silu_gradient(y.x, x.x), times_silu_gradient(y.y, x.y));
}
__device__ inline uint4 times_silu_gradients(uint4 o, uint4 u) {
    return make_uint4(times_silu_gradients(o.x, u.x), times_silu_gradients(o.y, u.y), times_silu_gradients(o.z, u.z), times_silu_gradients(o.w, u.w));
}

// ---- tiles: rows of HS/8 pieces of 8 numbers, at addresses that are multiples of 256. A row's pieces are exchanged among each other, depending on the row, so
// that the same piece of 8 rows behind one another lies in 8 different groups of banks: those are what ldmatrix reads at a time. Piece p stands where piece
// p ^ (row%8) would (in rows of 4·odd pieces p ^ (row/2%4)), so that from one piece to another an address changes by an exclusive or.

template <int HS>
__device__ inline uint32_t row_of(uint32_t tile, int row) {  // the address of its piece 0
    return tile + row * HS * 2 + (HS % 64 == 0 ? row & 7 : row >> 1 & 3) * 16;
}
// The address of piece first+more of the row whose piece 0 stands at `address`; first and more have no bit in common if rows have 8 pieces or 16.
template <int HS>
__device__ inline uint32_t piece_of(uint32_t address, uint32_t first, uint32_t more = 0) {
    if constexpr (HS % 64 == 0) return address ^ (first * 16) ^ (more * 16);
    uint32_t piece = first + more;
    return (address ^ (piece % 4 * 16)) + piece / 4 * 64;
}
// For this lane and ldmatrix: the 16x16 block at the start of a tile, by_rows with the matrices in the order (0,0), (8,0), (0,8), (8,8), by_columns in the
// order (0,0), (0,8), (8,0), (8,8). So a block is an `a` operand by_rows; the transpose of a block is one by_columns and transposed. Two neighbouring `b`
// operands (b0, b1, b0, b1) of B (depth, columns) are by_rows and transposed if the tile holds B, by_columns if it holds Bᵀ.
template <int HS>
__device__ inline uint32_t by_rows(uint32_t tile) {
    return piece_of<HS>(row_of<HS>(tile, lane() % 16), lane() / 16);
}
template <int HS>
__device__ inline uint32_t by_columns(uint32_t tile) {
    return piece_of<HS>(row_of<HS>(tile, lane() / 16 * 8 + lane() % 8), lane() / 8 % 2);
}
// From there to the block 16·r rows further down, columns first + 16·c (first a multiple of the warps' columns).
template <int HS>
__device__ inline uint32_t block(uint32_t address, int r, int c, int first = 0) {
    return piece_of<HS>(address, first / 8, 2 * c) + r * 16 * HS * 2;
}

// Calls f(row, piece, address) for this thread's pieces of a chunk's tile, always the same: `part` neighbours of a row at a time by as many threads.
template <int HS, class F>
__device__ inline void for_pieces(uint32_t tile, F f) {
    constexpr int part = HS % 64 == 0 ? 8 : 4, rows = Shape<HS>::THREADS / part;
    int row = threadIdx.x / part, piece = threadIdx.x % part;
    uint32_t address = piece_of<HS>(row_of<HS>(tile, row), piece);
#pragma unroll
    for (int i = 0; i < CHUNK; i += rows)
#pragma unroll
        for (int p = 0; p < HS / 8; p += part) f(row + i, piece + p, address + i * HS * 2 + p * 16);
}
// n rows from `row` on, `step` apart, with zeros before them. What a thread has copied here it turns into SiLU of it in silu_tile(), without a barrier between.
template <int HS>
__device__ inline void load_tile(uint32_t tile, const LightningRows& x, int row, int step, int n, int head, int hs) {
    for_pieces<HS>(tile, [&](int i, int piece, uint32_t address) {
        int place = i - (CHUNK - n);
        const floatX* from = x.p + (int64_t)(row + step * max(place, 0)) * x.stride + head + piece * 8;
        copy_async16(address, from, place >= 0 && piece * 8 < hs);
    });
}
template <int HS>
__device__ inline void silu_tile(uint32_t tile) {
    for_pieces<HS>(tile, [&](int, int, uint32_t address) { store_shared(address, silus(load_shared(address))); });
}

// P as `a` operands, rows 16r.. of a chunk: P_ij = λ^{i−j}·(a_i·b_j) for i >= j, else 0; p[b] is its columns 16b.. , not defined for b > r.
template <int HS>
__device__ inline void scores(uint32_t (&p)[4][4], uint32_t A, uint32_t B, int r, float slope2, float lambda16) {
    float c[8][4] = {};
    A = by_rows<HS>(A) + r * 16 * HS * 2, B = by_columns<HS>(B);
#pragma unroll
    for (int k = 0; k < HS / 16; k++) {
        uint32_t a[4];
        load_matrices(a, block<HS>(A, 0, k));
#pragma unroll
        for (int b = 0; b < 4; b++) {
            if (b > r) continue;
            uint32_t y[4];
            load_matrices(y, block<HS>(B, b, k));
            mma(c[2 * b], a, y[0], y[1]);
            mma(c[2 * b + 1], a, y[2], y[3]);
        }
    }
    // λ^{i−j} of this thread's numbers in a block on the diagonal; one block further from it with each multiplication by λ^16.
    float d0 = (float)(lane_row() - lane_column()), factor[8];
#pragma unroll
    for (int e = 0; e < 8; e++) factor[e] = power(slope2, d0 + (float)(16 + e / 2 % 2 * 8 - e / 4 * 8 - e % 2));
#pragma unroll
    for (int b = 3; b >= 0; b--) {
        if (b > r) continue;
#pragma unroll
        for (int e = 0; e < 8; e++) {
            float &x = c[2 * b + e / 4][e % 4], d = d0 + (float)(e / 2 % 2 * 8 - e / 4 * 8 - e % 2);
            if (b == r) {
                float f = power(slope2, fmaxf(d, 0));
                x = d >= 0 ? x * f : 0;
            } else {
                x *= factor[e];
                factor[e] *= lambda16;
            }
        }
#pragma unroll
        for (int e = 0; e < 4; e++) p[b][e] = pack_bf16(c[2 * b + e / 2][e % 2 * 2], c[2 * b + e / 2][e % 2 * 2 + 1]);
    }
}

// o (16,WIDTH) = diag(λ^{i+1})·A·S, or A·Sᵀ: rows 16r.. of the chunk, whose first token is row `pad`, columns from `column` on.
template <int HS, bool TRANSPOSED>
__device__ inline void times_state(float (&o)[Shape<HS>::WIDTH / 8][4], uint32_t A, uint32_t state, int r, int column, int pad, float slope2) {
    constexpr int WIDTH = Shape<HS>::WIDTH;
#pragma unroll
    for (int n = 0; n < WIDTH / 8; n++) o[n][0] = o[n][1] = o[n][2] = o[n][3] = 0;
    A = by_rows<HS>(A) + r * 16 * HS * 2;
    state = TRANSPOSED ? by_columns<HS>(state) + column * HS * 2 : by_rows<HS>(state);
#pragma unroll
    for (int k = 0; k < HS / 16; k++) {
        uint32_t a[4];
        load_matrices(a, block<HS>(A, 0, k));
#pragma unroll
        for (int n = 0; n < WIDTH / 16; n++) {
            uint32_t s[4];
            if (TRANSPOSED)
                load_matrices(s, block<HS>(state, n, k));
            else
                load_matrices_transposed(s, block<HS>(state, k, n, column));
            mma(o[2 * n], a, s[0], s[1]);
            mma(o[2 * n + 1], a, s[2], s[3]);
        }
    }
    float first = (float)(16 * r + lane_row() + 1 - pad), above = power(slope2, fmaxf(first, 0)), below = power(slope2, fmaxf(first + 8, 0));
#pragma unroll
    for (int n = 0; n < WIDTH / 8; n++) {
        o[n][0] *= above, o[n][1] *= above;
        o[n][2] *= below, o[n][3] *= below;
    }
}

}  // namespace lightning_mma

template <int HS, int KIND>
__global__ void __launch_bounds__(lightning_mma::Shape<HS>::THREADS, (lightning_mma::BLOCKS<HS, KIND>))
    lightning_sweep_kernel3(const Lightning g, const LightningSweep w) {
    using namespace lightning_mma;
    constexpr int GROUPS = Shape<HS>::GROUPS, WARPS = Shape<HS>::WARPS, WIDTH = Shape<HS>::WIDTH, TILE = Shape<HS>::TILE;
    constexpr int STAGE = TILES<KIND> * TILE;
    extern __shared__ __align__(256) unsigned char lightning_memory[];
    uint32_t tiles = shared_address(lightning_memory), state = tiles + 2 * STAGE;
    // All threads of a warp know that they agree in it.
    int warp = __shfl_sync(0xffffffff, threadIdx.x / 32, 0), column = GROUPS == 1 ? 0 : warp / 4 * WIDTH, h = blockIdx.x % g.heads, hs = g.hs, head = h * hs;
    LightningSpan q;
    if (!g.find(g.block_slot(KIND != STATES), q)) return;
    if (KIND == STATES && q.index == q.spans - 1) return;

    float slope2 = (float)(g.slope(h) * 1.4426950408889634);
    int step = w.reverse ? -1 : 1, first = q.row(w.reverse);
    auto load = [&](int chunk) {
        uint32_t to = tiles + chunk % 2 * STAGE;
        int row = first + step * CHUNK * chunk;
        int n = min(CHUNK, q.n - CHUNK * chunk);
        load_tile<HS>(to, w.b, row, step, n, head, hs);
        load_tile<HS>(to + TILE, w.d, row, step, n, head, hs);
        if constexpr (KIND != STATES) load_tile<HS>(to + 2 * TILE, w.a, row, step, n, head, hs);
        if constexpr (KIND == PAIR) load_tile<HS>(to + 3 * TILE, w.pair_a, row, step, n, head, hs);
    };
    int start_chunk = 0;  // what spans add is the sum of a few chunks where the decay is fast
    if constexpr (KIND == STATES) start_chunk = max(0, q.n / CHUNK - chunks_that_count(slope2));
    if (q.n > 0) load(start_chunk);

    float lambda16 = power(slope2, 16), factor[4][4];  // λ^{63−i} for this thread's columns of diag(λ^{63−i})·B
#pragma unroll
    for (int e = 0; e < 4; e++) factor[3][e] = power(slope2, (float)(15 - lane_column() - (e / 2 * 8 + e % 2)));
#pragma unroll
    for (int b = 2; b >= 0; b--)
#pragma unroll
        for (int e = 0; e < 4; e++) factor[b][e] = factor[b + 1][e] * lambda16;

    // The state, rows 16·warp.. . In s[0] the columns from `column` on, which are also those of this warp's outputs; with two groups in s[1] the others.
    bool has_state = WARPS * 16 == HS || warp < HS / 16;
    int columns[2] = {column, WIDTH - column};
    float s[GROUPS][WIDTH / 8][4];
    auto for_state = [&](auto f) {  // f(row, column, number) for this thread's numbers
#pragma unroll
        for (int y = 0; y < GROUPS; y++)
#pragma unroll
            for (int n = 0; n < WIDTH / 8; n++)
#pragma unroll
                for (int e = 0; e < 4; e++) f(16 * warp + lane_row() + e / 2 * 8, columns[y] + 8 * n + lane_column() + e % 2, s[y][n][e]);
    };
    const float* from = KIND == STATES ? nullptr : g.start(q, h);
    bool turned = w.transposed && q.index == 0;
    for_state([&](int i, int j, float& x) {
        x = 0;
        if (from && i < hs && j < hs) x = turned ? from[j * hs + i] : from[i * hs + j];
    });
    auto store_state = [&] {
        if (!has_state) return;
        uint32_t row = row_of<HS>(state, 16 * warp + lane_row()) + 2 * lane_column();
#pragma unroll
        for (int y = 0; y < GROUPS; y++)
#pragma unroll
            for (int n = 0; n < WIDTH / 8; n++)
#pragma unroll
                for (int e = 0; e < 2; e++) store_shared(piece_of<HS>(row, columns[y] / 8, n) + e * 8 * HS * 2, pack_bf16(s[y][n][2 * e], s[y][n][2 * e + 1]));
    };
    if constexpr (KIND != STATES) store_state();

    for (int chunk = start_chunk; CHUNK * chunk < q.n; chunk++) {
        uint32_t B = tiles + chunk % 2 * STAGE, D = B + TILE, A = D + TILE, pair_A = A + TILE;
        // A sequence's last chunk may have less than 64 tokens. They are the tile's last ones, so that its end is that of the chunk.
        int n = min(CHUNK, q.n - CHUNK * chunk), pad = CHUNK - n;
        copy_async_wait_all();
        if (w.b.silu) silu_tile<HS>(B);
        if (w.d.silu) silu_tile<HS>(D);
        if constexpr (KIND != STATES)
            if (w.a.silu) silu_tile<HS>(A);
        if constexpr (KIND == PAIR)
            if (w.pair_a.silu) silu_tile<HS>(pair_A);
        __syncthreads();  // the tiles and the state are there, and nobody is left in the other stage
        if (CHUNK * (chunk + 1) < q.n) load(chunk + 1);

        // Which 16 rows of the outputs a warp has changes from chunk to chunk (and from block to block), because the upper ones need less of P, and a warp
        // stays on one of the multiprocessor's four parts.
        int r = (warp + chunk + (blockIdx.x >> 2)) % 4, row = first + step * (CHUNK * chunk + 16 * r - pad);
        auto for_output = [&](auto f) {  // f(row among this warp's 16, piece) for this thread's pieces of its warp's outputs, where they exist
            constexpr int part = WIDTH == 48 ? 2 : WIDTH / 8;
            int row = lane() / part, piece = column / 8 + lane() % part;
#pragma unroll
            for (int i = 0; i < 16; i += 32 / part)
#pragma unroll
                for (int p = 0; p < WIDTH / 8; p += part)
                    if (16 * r + row + i >= pad && (piece + p) * 8 < hs) f(row + i, piece + p);
        };
        if constexpr (KIND == SINGLE)  // a pair's outputs are multiplied with what has just been read for A
            if (w.o.u) for_output([&](int i, int piece) { prefetch(w.o.u + (int64_t)(row + step * i) * w.o.u_stride + head + piece * 8); });
        uint32_t p[4][4];
        float o[WIDTH / 8][4];
        if constexpr (KIND != STATES) {
            scores<HS>(p, A, B, r, slope2, lambda16);
            times_state<HS, false>(o, A, state, r, column, pad, slope2);
        }
        // O += P·D and S = λⁿ·S + (diag(λ^{n−1−i})·B)ᵀD share what they read of D.
        float decay = exp2f(-slope2 * (float)n);
        uint32_t b_rows = by_columns<HS>(B), d_rows = by_rows<HS>(D);
#pragma unroll
        for (int y = 0; y < GROUPS; y++)
#pragma unroll
            for (int k = 0; k < WIDTH / 8; k++)
#pragma unroll
                for (int e = 0; e < 4; e++) s[y][k][e] *= decay;
#pragma unroll
        for (int b = 0; b < 4; b++) {
            uint32_t x[4] = {};
            if (has_state) {
                load_matrices_transposed(x, block<HS>(b_rows, b, 0, 16 * warp));
#pragma unroll
                for (int e = 0; e < 4; e++) {
                    float2 z = unpack_bf16(x[e]);
                    x[e] = pack_bf16(z.x * factor[b][e / 2 * 2], z.y * factor[b][e / 2 * 2 + 1]);
                }
            }
#pragma unroll
            for (int k = 0; k < WIDTH / 16; k++)
#pragma unroll
                for (int y = 0; y < GROUPS; y++) {
                    uint32_t d[4];
                    load_matrices_transposed(d, block<HS>(d_rows, b, k, columns[y]));
                    if constexpr (KIND != STATES) {
                        if (y == 0 && b <= r) {
                            mma(o[2 * k], p[b], d[0], d[1]);
                            mma(o[2 * k + 1], p[b], d[2], d[3]);
                        }
                    }
                    if (has_state) {
                        mma(s[y][2 * k], x, d[0], d[1]);
                        mma(s[y][2 * k + 1], x, d[2], d[3]);
                    }
                }
        }
        if constexpr (KIND == STATES) continue;

        // Results wait as bf16 until nobody needs the tiles A and the state any more.
        auto result = [&](uint32_t(&to)[WIDTH / 8][2]) {
#pragma unroll
            for (int k = 0; k < WIDTH / 8; k++)
#pragma unroll
                for (int e = 0; e < 2; e++) to[k][e] = pack_bf16(g.scale * o[k][2 * e], g.scale * o[k][2 * e + 1]);
        };
        // Through this warp's part of a tile, from where rows go to global memory 16 bytes at a time.
        auto store = [&](const LightningOutput& out, const uint32_t(&from)[WIDTH / 8][2], uint32_t tile) {
            uint32_t to = row_of<HS>(tile, 16 * r + lane_row()) + 2 * lane_column();
#pragma unroll
            for (int k = 0; k < WIDTH / 8; k++)
#pragma unroll
                for (int e = 0; e < 2; e++) store_shared(piece_of<HS>(to, column / 8, k) + e * 8 * HS * 2, from[k][e]);
            __syncwarp();
            for_output([&](int i, int piece) {
                int64_t n = row + step * i, at = head + piece * 8;
                uint4 x = load_shared(piece_of<HS>(row_of<HS>(tile, 16 * r + i), piece));
                if (out.u) x = times_silu_gradients(x, *(const uint4*)(out.u + n * out.u_stride + at));
                *(uint4*)(out.p + n * out.stride + at) = x;
            });
        };
        uint32_t out[WIDTH / 8][2];
        result(out);
        if constexpr (KIND == PAIR) {
            // The second sweep's P comes from pair_A and D, its states are the transposes, and its P is multiplied with B.
            scores<HS>(p, pair_A, D, r, slope2, lambda16);
            times_state<HS, true>(o, pair_A, state, r, column, pad, slope2);
            uint32_t b_columns = by_rows<HS>(B);
#pragma unroll
            for (int b = 0; b < 4; b++) {
                if (b > r) continue;
#pragma unroll
                for (int k = 0; k < WIDTH / 16; k++) {
                    uint32_t y[4];
                    load_matrices_transposed(y, block<HS>(b_columns, b, k, column));
                    mma(o[2 * k], p[b], y[0], y[1]);
                    mma(o[2 * k + 1], p[b], y[2], y[3]);
                }
            }
            uint32_t pair_out[WIDTH / 8][2];
            result(pair_out);
            __syncthreads();
            store_state();
            store(w.o, out, A);
            store(w.pair_o, pair_out, pair_A);
        } else {
            __syncthreads();
            store_state();
            store(w.o, out, A);
        }
    }

    // Once more, so that all this need not be kept in registers meanwhile.
    g.find(g.block_slot(KIND != STATES), q);
    float* to = KIND == STATES ? g.border(q, q.index, blockIdx.x % g.heads) : g.finish(q, blockIdx.x % g.heads);
    if (!to || !has_state) return;
    for_state([&](int i, int j, float& x) {
        if (i < hs && j < hs) to[i * hs + j] = x;
    });
}

}  // namespace gpu

#endif
