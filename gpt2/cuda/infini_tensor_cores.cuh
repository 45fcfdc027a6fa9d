// Infini-attention's memory on tensor cores: bf16 operands, float32 sums. Equations and launchers: infini.cuh.
//
// HS is the head size rounded up to 32, 64, 96 or 128; what is behind the head size in a tile is zero, where it matters. Memories are rounded to bf16 as
// operands; z and denominators stay float32. There are two kinds of kernels:
//
//   over rows     each row of the result needs one token alone and the memory, which stands in shared memory: 4 warps, each takes 16 rows at a time, which only
//                 it touches, while its next 16 are on their way
//   over tokens   the result is a sum aᵀ·x (hs,hs) over the tokens of a segment: HS/16 warps, each takes 16 rows of the result and all tokens
#pragma once

#include "infini_pass.cuh"

#ifndef GPU_FLOAT32
namespace gpu {

namespace infini_mma {

typedef __nv_bfloat16 bf16;

// Rows of a tile in shared memory stand HS+8 numbers apart: the 8 rows of 16 bytes that ldmatrix reads at a time then lie in different banks.
template <int HS>
constexpr int STRIDE = HS + 8;
template <int HS>
constexpr int tile_bytes(int rows) {
    return rows * STRIDE<HS> * (int)sizeof(bf16);
}

__device__ inline int lane() { return threadIdx.x % 32; }
__device__ inline int lane_row() { return threadIdx.x % 32 / 4; }
__device__ inline int lane_column() { return threadIdx.x % 4 * 2; }

// The addresses of the 16x16 block at (r, c) of a tile: by_rows with the matrices in the order (0,0), (8,0), (0,8), (8,8), by_columns in the order (0,0),
// (0,8), (8,0), (8,8). So a block is an `a` operand by_rows; the transpose of a block is one by_columns and transposed. Two neighbouring `b` operands (b0, b1,
// b0, b1) of B (depth, columns) are by_rows and transposed if the tile holds B, by_columns if it holds Bᵀ.
template <int HS>
__device__ inline uint32_t by_rows(const bf16* tile, int r, int c) {
    return shared_address(tile + (r + lane() % 16) * STRIDE<HS> + c + lane() / 16 * 8);
}
template <int HS>
__device__ inline uint32_t by_columns(const bf16* tile, int r, int c) {
    return shared_address(tile + (r + lane() / 16 * 8 + lane() % 8) * STRIDE<HS> + c + lane() / 8 % 2 * 8);
}

__device__ inline uint32_t* pair(bf16* tile, int at) { return (uint32_t*)(tile + at); }  // `at` is even

// ---- tiles

__device__ inline float feature(float x) { return x > 0 ? x + 1 : __expf(x); }
__device__ inline uint32_t feature(uint32_t x) {
    float2 f = unpack_bf16(x);
    return pack_bf16(feature(f.x), feature(f.y));
}
__device__ inline float sum_of_row(float x) {  // over the 4 threads that share a row of c
    x += __shfl_xor_sync(0xffffffff, x, 1);
    return x + __shfl_xor_sync(0xffffffff, x, 2);
}

// `threads` threads, this one being number `thread` of them, copy n rows of hs numbers into the first n of ROWS rows of a tile and zeros into the rest.
template <int HS, int ROWS>
__device__ inline void load_rows(bf16* tile, const bf16* from, int64_t stride, int n, int hs, int thread, int threads) {
#pragma unroll 4
    for (int e = thread; e < ROWS * (HS / 8); e += threads) {
        int i = e / (HS / 8), c = e % (HS / 8) * 8;
        bool there = i < n && c < hs;
        copy_async16(shared_address(tile + i * STRIDE<HS> + c), there ? from + i * stride + c : from, there);
    }
}
// n rows of 16 back to global memory, by one warp.
template <int HS>
__device__ inline void store_rows(bf16* to, int64_t stride, const bf16* tile, int n, int hs) {
#pragma unroll
    for (int e = lane(); e < 16 * (HS / 8); e += 32) {
        int i = e / (HS / 8), c = e % (HS / 8) * 8;
        if (i < n && c < hs) *(int4*)(to + i * stride + c) = *(const int4*)(tile + i * STRIDE<HS> + c);
    }
}
// z (HS) and M (HS,HS) from a memory in global memory, zeros behind hs, or if it is null. Memories within a state stand on 8 bytes.
template <int HS>
__device__ inline void load_memory(bf16* M, float* z, const float* memory, int hs) {
#pragma unroll 8
    for (int e = threadIdx.x; e < HS * (HS / 2); e += blockDim.x) {
        int r = e / (HS / 2), c = e % (HS / 2) * 2;
        float2 x = {0, 0};
        if (memory && r < hs && c < hs) x = *(const float2*)(memory + hs + r * hs + c);
        *pair(M, r * STRIDE<HS> + c) = pack_bf16(x.x, x.y);
    }
    for (int c = threadIdx.x; c < HS; c += blockDim.x) z[c] = memory && c < hs ? memory[c] : 0;
}

// Φ of 16 rows as `a` operands.
template <int HS>
__device__ inline void load_features(uint32_t (&a)[HS / 16][4], const bf16* tile) {
#pragma unroll
    for (int k = 0; k < HS / 16; k++) {
        load_matrices(a[k], by_rows<HS>(tile, 0, 16 * k));
#pragma unroll
        for (int j = 0; j < 4; j++) a[k][j] = feature(a[k][j]);
    }
}
// 1/(Φ·z + ε) of rows `row` and row+8
template <int HS>
__device__ inline void inverse_denominators(float (&inverse)[2], const uint32_t (&features)[HS / 16][4], const float* z) {
    inverse[0] = inverse[1] = 0;
#pragma unroll
    for (int k = 0; k < HS / 16; k++)
#pragma unroll
        for (int j = 0; j < 4; j++) {
            float2 f = unpack_bf16(features[k][j]), zc = *(const float2*)(z + 16 * k + j / 2 * 8 + lane_column());
            inverse[j % 2] += f.x * zc.x + f.y * zc.y;
        }
#pragma unroll
    for (int i = 0; i < 2; i++) inverse[i] = 1 / (sum_of_row(inverse[i]) + INFINI_EPSILON);
}
template <int HS>
__device__ inline void set_zero(float (&c)[HS / 8][4]) {
#pragma unroll
    for (int j = 0; j < HS / 8; j++)
#pragma unroll
        for (int i = 0; i < 4; i++) c[j][i] = 0;
}
// c (16,HS) += a (16,HS)·B, tile B (HS,HS)
template <int HS>
__device__ inline void times(float (&c)[HS / 8][4], const uint32_t (&a)[HS / 16][4], const bf16* B) {
#pragma unroll
    for (int k = 0; k < HS / 16; k++)
#pragma unroll
        for (int n = 0; n < HS / 16; n++) {
            uint32_t b[4];
            load_matrices_transposed(b, by_rows<HS>(B, 16 * k, 16 * n));
            mma(c[2 * n], a[k], b[0], b[1]);
            mma(c[2 * n + 1], a[k], b[2], b[3]);
        }
}
// c (16,HS) += a·Bᵀ, a being rows r ... r+15 of a tile
template <int HS>
__device__ inline void times_transposed(float (&c)[HS / 8][4], const bf16* tile, int r, const bf16* B) {
#pragma unroll 2
    for (int k = 0; k < HS / 16; k++) {
        uint32_t a[4];
        load_matrices(a, by_rows<HS>(tile, r, 16 * k));
#pragma unroll
        for (int n = 0; n < HS / 16; n++) {
            uint32_t b[4];
            load_matrices(b, by_columns<HS>(B, 16 * n, 16 * k));
            mma(c[2 * n], a, b[0], b[1]);
            mma(c[2 * n + 1], a, b[2], b[3]);
        }
    }
}
// c (16,HS) += aᵀ·x, a (16 tokens, 16 features) being already in registers, x the tile's 16 tokens from t on
template <int HS>
__device__ inline void add_outer(float (&c)[HS / 8][4], const uint32_t (&a)[4], const bf16* x, int t) {
#pragma unroll
    for (int n = 0; n < HS / 16; n++) {
        uint32_t b[4];
        load_matrices_transposed(b, by_rows<HS>(x, t, 16 * n));
        mma(c[2 * n], a, b[0], b[1]);
        mma(c[2 * n + 1], a, b[2], b[3]);
    }
}
// A warp's 16 rows of a (hs,hs) matrix in global memory, from row r0 on.
template <int HS>
__device__ inline void store_matrix(float* to, const float (&c)[HS / 8][4], int r0, int hs) {
#pragma unroll
    for (int n = 0; n < HS / 8; n++)
#pragma unroll
        for (int i = 0; i < 2; i++) {
            int r = r0 + lane_row() + 8 * i, column = 8 * n + lane_column();
            if (r < hs && column < hs) *(float2*)(to + (int64_t)r * hs + column) = {c[n][2 * i], c[n][2 * i + 1]};
        }
}

constexpr int ROW_WARPS = 4, ROW_THREADS = 32 * ROW_WARPS, BLOCK_ROWS = 16 * ROW_WARPS;  // kernels over rows
template <int HS>
constexpr int SUM_THREADS = HS / 16 * 32;  // kernels over tokens

// Shared memory, bytes. Two stages are in flight where there is room for them.
template <int HS>
constexpr int retrieve_shared = tile_bytes<HS>(HS) + HS * 4 + ROW_WARPS * 2 * 2 * tile_bytes<HS>(16);
template <int HS>
constexpr int gate_backward_shared = tile_bytes<HS>(HS) + HS * 4 + ROW_WARPS * 2 * 3 * tile_bytes<HS>(16);
template <int HS>
constexpr int QUERY_STAGES = HS <= 64 ? 2 : 1;
template <int HS>
constexpr int query_backward_shared = tile_bytes<HS>(HS) + HS * 4 + QUERY_STAGES<HS>*(3 * tile_bytes<HS>(HS) + HS * 4);
constexpr int WRITE_TOKENS = 64;
template <int HS>
constexpr int write_shared = 2 * 2 * tile_bytes<HS>(WRITE_TOKENS);
template <int HS>
constexpr int map_shared = 2 * tile_bytes<HS>(HS) + 2 * HS * 4;
template <int HS>
constexpr int normalizer_backward_shared = 4 * tile_bytes<HS>(HS) + HS * 4 + HS / 16 * HS * 4;
template <int HS>
constexpr int WRITE_BACKWARD_STAGES = HS <= 64 ? 2 : 1;
template <int HS, bool DELTA>
constexpr int write_backward_shared = (DELTA ? 2 : 1) * (tile_bytes<HS>(HS) + HS * 4) + ROW_WARPS* WRITE_BACKWARD_STAGES<HS> * 4 * tile_bytes<HS>(16);

}  // namespace infini_mma

// A = g·R + (1−g)·D, (N,C); A may be D.
template <int HS>
__global__ void __launch_bounds__(infini_mma::ROW_THREADS, HS <= 64 ? 4 : 1)
    infini_retrieve_kernel3(InfiniPass p, const float* beta, const floatX* D, floatX* A) {
    using namespace infini_mma;
    extern __shared__ int4 infini_shared[];
    bf16* M = (bf16*)infini_shared;
    float* z = (float*)(M + HS * STRIDE<HS>);
    bf16* tiles = (bf16*)(z + HS) + threadIdx.x / 32 * (2 * 2 * 16 * STRIDE<HS>);
    int h = blockIdx.x % p.heads, hs = p.hs, C = p.channels();
    const InfiniSegment s = p.segments[blockIdx.x / p.heads];
    if ((int)blockIdx.y * BLOCK_ROWS >= s.q_len) return;
    const float* memory = p.memory(s, p.kv_head(h));
    float g = memory || p.gated_first ? infini_gate(beta[h]) : 0;

    int first = blockIdx.y * BLOCK_ROWS + threadIdx.x / 32 * 16, step = gridDim.y * BLOCK_ROWS;
    auto load = [&](int t, int stage) {
        int64_t row = s.row + t;
        bf16* to = tiles + stage * (2 * 16 * STRIDE<HS>);
        if (t < s.q_len) {
            if (memory) load_rows<HS, 16>(to, p.qkv + row * p.qkv_stride() + h * hs, p.qkv_stride(), s.q_len - t, hs, lane(), 32);
            load_rows<HS, 16>(to + 16 * STRIDE<HS>, D + row * C + h * hs, C, s.q_len - t, hs, lane(), 32);
        }
        copy_async_commit();
    };
    load(first, 0);
    if (memory) load_memory<HS>(M, z, memory, hs);
    __syncthreads();
    for (int t = first, stage = 0; t < s.q_len; t += step, stage ^= 1) {
        load(t + step, stage ^ 1);
        copy_async_wait<1>();
        __syncwarp();
        bf16 *q = tiles + stage * (2 * 16 * STRIDE<HS>), *d = q + 16 * STRIDE<HS>;
        float n[HS / 8][4] = {}, factor[2] = {0, 0};
        if (memory) {
            uint32_t features[HS / 16][4];
            load_features<HS>(features, q);
            inverse_denominators<HS>(factor, features, z);
            times<HS>(n, features, M);
        }
#pragma unroll
        for (int i = 0; i < 2; i++) factor[i] *= g;
#pragma unroll
        for (int j = 0; j < HS / 8; j++)
#pragma unroll
            for (int i = 0; i < 2; i++) {
                uint32_t* at = pair(d, (lane_row() + 8 * i) * STRIDE<HS> + 8 * j + lane_column());
                float2 x = unpack_bf16(*at);
                *at = pack_bf16(n[j][2 * i] * factor[i] + (1 - g) * x.x, n[j][2 * i + 1] * factor[i] + (1 - g) * x.y);
            }
        __syncwarp();
        store_rows<HS>(A + (int64_t)(s.row + t) * C + h * hs, C, d, s.q_len - t, hs);
        __syncwarp();
    }
}

// As infini_gate_backward_kernel2.
template <int HS>
__global__ void __launch_bounds__(infini_mma::ROW_THREADS, HS <= 64 ? 3 : 1)
    infini_gate_backward_kernel3(InfiniPass p, const float* beta, const floatX* D, const floatX* dA, floatX* dn, float* dden, float* partial) {
    using namespace infini_mma;
    extern __shared__ int4 infini_shared[];
    __shared__ float warp_sums[ROW_WARPS];
    bf16* M = (bf16*)infini_shared;
    float* z = (float*)(M + HS * STRIDE<HS>);
    bf16* tiles = (bf16*)(z + HS) + threadIdx.x / 32 * (2 * 3 * 16 * STRIDE<HS>);
    int h = blockIdx.x % p.heads, hs = p.hs, C = p.channels();
    const InfiniSegment s = p.segments[blockIdx.x / p.heads];
    const float* memory = p.memory(s, p.kv_head(h));
    partial += (int64_t)blockIdx.x * gridDim.y + blockIdx.y;
    if ((int)blockIdx.y * BLOCK_ROWS >= s.q_len || !(memory || p.gated_first)) {
        if (threadIdx.x == 0) *partial = 0;
        return;
    }
    float g = infini_gate(beta[h]), sum = 0;

    int first = blockIdx.y * BLOCK_ROWS + threadIdx.x / 32 * 16, step = gridDim.y * BLOCK_ROWS;
    auto load = [&](int t, int stage) {
        int64_t row = s.row + t;
        bf16* to = tiles + stage * (3 * 16 * STRIDE<HS>);
        if (t < s.q_len) {
            if (memory) load_rows<HS, 16>(to, p.qkv + row * p.qkv_stride() + h * hs, p.qkv_stride(), s.q_len - t, hs, lane(), 32);
            load_rows<HS, 16>(to + 16 * STRIDE<HS>, D + row * C + h * hs, C, s.q_len - t, hs, lane(), 32);
            load_rows<HS, 16>(to + 2 * 16 * STRIDE<HS>, dA + row * C + h * hs, C, s.q_len - t, hs, lane(), 32);
        }
        copy_async_commit();
    };
    load(first, 0);
    if (memory) load_memory<HS>(M, z, memory, hs);
    __syncthreads();
    for (int t = first, stage = 0; t < s.q_len; t += step, stage ^= 1) {
        load(t + step, stage ^ 1);
        copy_async_wait<1>();
        __syncwarp();
        bf16 *q = tiles + stage * (3 * 16 * STRIDE<HS>), *d = q + 16 * STRIDE<HS>, *da = d + 16 * STRIDE<HS>;
        int64_t row = s.row + t;
        float n[HS / 8][4] = {}, inverse[2] = {0, 0}, dA_n[2] = {0, 0}, dA_D[2] = {0, 0};
        if (memory) {
            uint32_t features[HS / 16][4];
            load_features<HS>(features, q);
            inverse_denominators<HS>(inverse, features, z);
            times<HS>(n, features, M);
        }
#pragma unroll
        for (int j = 0; j < HS / 8; j++)
#pragma unroll
            for (int i = 0; i < 2; i++) {
                int at = (lane_row() + 8 * i) * STRIDE<HS> + 8 * j + lane_column();
                float2 x = unpack_bf16(*pair(da, at)), y = unpack_bf16(*pair(d, at));
                dA_n[i] += x.x * n[j][2 * i] + x.y * n[j][2 * i + 1];
                dA_D[i] += x.x * y.x + x.y * y.y;
                float f = g * inverse[i];
                *pair(d, at) = pack_bf16(f * x.x, f * x.y);  // dn
            }
#pragma unroll
        for (int i = 0; i < 2; i++) {
            float dA_R = sum_of_row(dA_n[i]) * inverse[i];
            dA_D[i] = sum_of_row(dA_D[i]);
            int r = lane_row() + 8 * i;
            if (lane() % 4 == 0 && t + r < s.q_len) {
                sum += dA_R - dA_D[i];
                dden[h * p.num_tokens + row + r] = -g * dA_R * inverse[i];
            }
        }
        __syncwarp();
        store_rows<HS>(dn + row * C + h * hs, C, d, s.q_len - t, hs);
        __syncwarp();
    }
    sum = warp_sum(sum);
    if (lane() == 0) warp_sums[threadIdx.x / 32] = sum;
    __syncthreads();
    if (threadIdx.x == 0) *partial = warp_sums[0] + warp_sums[1] + warp_sums[2] + warp_sums[3];
}

// dq = keep·dq + (dn·Mᵀ + dden·zᵀ)⊙Φ'(q), in dqkv (N, qkv_stride), and dmemories[read] = Φ(q)ᵀ[dden | dn] over the rows of a segment and the query heads of a
// kv head. One block a segment and kv head; tiles of HS rows, 16 of which belong to each warp until the sum over the tile's rows.
template <int HS>
__global__ void __launch_bounds__(infini_mma::SUM_THREADS<HS>, HS <= 64   ? 3
                                                               : HS <= 96 ? 2
                                                                          : 1)
    infini_query_backward_kernel3(InfiniPass p, const float* beta, const floatX* dn, const float* dden, floatX* dqkv, float* dmemories) {
    using namespace infini_mma;
    constexpr int STAGES = QUERY_STAGES<HS>, TILE = HS * STRIDE<HS>;
    extern __shared__ int4 infini_shared[];
    bf16 *M = (bf16*)infini_shared, *tiles = M + TILE;                // q, dn, dq for each stage
    float *z = (float*)(tiles + STAGES * 3 * TILE), *ddens = z + HS;  // (STAGES, HS)
    int kv = blockIdx.x % p.kv_heads, hs = p.hs, C = p.channels(), w0 = threadIdx.x / 32 * 16;
    const InfiniSegment s = p.segments[blockIdx.x / p.kv_heads];
    const float* memory = p.memory(s, kv);
    if (!memory && !p.gated_first) return;

    int row_tiles = (int)ceil_div(s.q_len, HS), count = row_tiles * p.heads_per_kv();
    struct Rows {
        int head, n;  // how many of the warp's 16 rows are there; may be 0 or less
        int64_t row;
    };
    auto rows = [&](int i) -> Rows {
        int t = i % row_tiles * HS + w0;
        return {kv * p.heads_per_kv() + i / row_tiles, s.q_len - t, (int64_t)s.row + t};
    };
    auto load = [&](int i) {
        if (i < count) {
            Rows r = rows(i);
            if (r.n <= 0) r.row = s.row;  // nothing is read
            bf16* to = tiles + i % STAGES * 3 * TILE + w0 * STRIDE<HS>;
            load_rows<HS, 16>(to, p.qkv + r.row * p.qkv_stride() + r.head * hs, p.qkv_stride(), r.n, hs, lane(), 32);
            load_rows<HS, 16>(to + TILE, dn + r.row * C + r.head * hs, C, r.n, hs, lane(), 32);
            load_rows<HS, 16>(to + 2 * TILE, dqkv + r.row * p.qkv_stride() + r.head * hs, p.qkv_stride(), r.n, hs, lane(), 32);
            bool there = lane() < r.n;
            if (lane() < 16)
                copy_async4(shared_address(ddens + i % STAGES * HS + w0 + lane()), dden + r.head * p.num_tokens + r.row + (there ? lane() : 0), there);
        }
        copy_async_commit();
    };
    if (STAGES == 2) load(0);
    load_memory<HS>(M, z, memory, hs);
    __syncthreads();

    float dM[HS / 8][4] = {}, dz[2] = {0, 0};  // rows w0 ... of the sum
    for (int i = 0; i < count; i++) {
        load(i + STAGES - 1);
        copy_async_wait<STAGES - 1>();
        __syncwarp();
        bf16 *q = tiles + i % STAGES * 3 * TILE, *numerators = q + TILE, *dq = q + 2 * TILE + w0 * STRIDE<HS>;
        const Rows r = rows(i);
        const float keep = p.keep(p.gate(s, beta[r.head]));
        const float* dd = ddens + i % STAGES * HS;
        {
            float dfeatures[HS / 8][4] = {};
            times_transposed<HS>(dfeatures, numerators, w0, M);
#pragma unroll
            for (int j = 0; j < HS / 8; j++)
#pragma unroll
                for (int k = 0; k < 2; k++) {
                    int row = w0 + lane_row() + 8 * k, c = 8 * j + lane_column();
                    uint32_t *at = pair(q, row * STRIDE<HS> + c), *to = pair(dq, (row - w0) * STRIDE<HS> + c);
                    float2 x = unpack_bf16(*at), f = {feature(x.x), feature(x.y)}, d = unpack_bf16(*to);
                    *at = pack_bf16(f.x, f.y);
                    d.x = keep * d.x + (dfeatures[j][2 * k] + dd[row] * z[c]) * min(1.f, f.x);
                    d.y = keep * d.y + (dfeatures[j][2 * k + 1] + dd[row] * z[c + 1]) * min(1.f, f.y);
                    *to = pack_bf16(d.x, d.y);
                }
        }
        __syncwarp();
        store_rows<HS>(dqkv + r.row * p.qkv_stride() + r.head * hs, p.qkv_stride(), dq, r.n, hs);
        __syncthreads();
        if (s.read >= 0) {
#pragma unroll
            for (int k = 0; k < HS / 16; k++) {
                uint32_t a[4];
                load_matrices_transposed(a, by_columns<HS>(q, 16 * k, w0));  // features w0 ... of tokens 16k ...
#pragma unroll
                for (int j = 0; j < 4; j++) {
                    float2 f = unpack_bf16(a[j]), d = *(const float2*)(dd + 16 * k + j / 2 * 8 + lane_column());
                    dz[j % 2] += f.x * d.x + f.y * d.y;
                }
                add_outer<HS>(dM, a, numerators, 16 * k);
            }
        }
        __syncthreads();
    }
    if (s.read < 0) return;
    float* to = dmemories + p.memory_at(s.read, kv);
    store_matrix<HS>(to + hs, dM, w0, hs);
#pragma unroll
    for (int i = 0; i < 2; i++) {
        float sum = sum_of_row(dz[i]);
        int r = w0 + lane_row() + 8 * i;
        if (lane() % 4 == 0 && r < hs) to[r] = sum;
    }
}

// What a full segment adds to z and M, into memories[write]: Σ_t Φ(k_t) and Φ(k)ᵀv. One block a segment and kv head.
template <int HS>
__global__ void __launch_bounds__(infini_mma::SUM_THREADS<HS>, HS <= 64 ? 4 : 1) infini_write_kernel3(InfiniPass p) {
    using namespace infini_mma;
    constexpr int TILE = WRITE_TOKENS * STRIDE<HS>;
    extern __shared__ int4 infini_shared[];
    bf16* tiles = (bf16*)infini_shared;  // k, v for each of two stages
    int kv = blockIdx.x % p.kv_heads, hs = p.hs, w0 = threadIdx.x / 32 * 16;
    const InfiniSegment s = p.segments[blockIdx.x / p.kv_heads];
    if (s.write < 0) return;
    const bf16* keys = p.keys + s.key_row * p.key_stride + kv * hs;
    auto load = [&](int t) {
        if (t < s.k_len) {
            bf16* to = tiles + t / WRITE_TOKENS % 2 * 2 * TILE;
            const bf16* k = keys + t * p.key_stride;
            load_rows<HS, WRITE_TOKENS>(to, k, p.key_stride, s.k_len - t, hs, threadIdx.x, SUM_THREADS<HS>);
            load_rows<HS, WRITE_TOKENS>(to + TILE, k + p.kv_channels(), p.key_stride, s.k_len - t, hs, threadIdx.x, SUM_THREADS<HS>);
        }
        copy_async_commit();
    };
    load(0);
    float own[HS / 8][4] = {}, z[2] = {0, 0};
    for (int t = 0; t < s.k_len; t += WRITE_TOKENS) {
        load(t + WRITE_TOKENS);
        copy_async_wait<1>();
        __syncthreads();
        const bf16 *k_tile = tiles + t / WRITE_TOKENS % 2 * 2 * TILE, *v_tile = k_tile + TILE;
#pragma unroll
        for (int k = 0; k < WRITE_TOKENS / 16; k++) {
            uint32_t a[4];
            load_matrices_transposed(a, by_columns<HS>(k_tile, 16 * k, w0));  // features w0 ... of tokens 16k ...
#pragma unroll
            for (int j = 0; j < 4; j++) {
                a[j] = feature(a[j]);
                float2 f = unpack_bf16(a[j]);
                int token = t + 16 * k + j / 2 * 8 + lane_column();
                z[j % 2] += (token < s.k_len ? f.x : 0) + (token + 1 < s.k_len ? f.y : 0);
            }
            add_outer<HS>(own, a, v_tile, 16 * k);  // behind the last token v is zero
        }
        __syncthreads();
    }
    float* to = p.memories + p.memory_at(s.write, kv);
    store_matrix<HS>(to + hs, own, w0, hs);
#pragma unroll
    for (int i = 0; i < 2; i++) {
        float sum = sum_of_row(z[i]);
        int r = w0 + lane_row() + 8 * i;
        if (lane() % 4 == 0 && r < hs) to[r] = sum;
    }
}

// delta: P = Φ(k)ᵀ·diag(1/den)·Φ(k) of a full segment that finds a memory, into maps[write] (KV, hs, hs). One block a segment and kv head, tiles of HS tokens.
template <int HS>
__global__ void __launch_bounds__(infini_mma::SUM_THREADS<HS>, HS <= 64 ? 4 : 1) infini_map_kernel3(InfiniPass p, float* maps) {
    using namespace infini_mma;
    constexpr int TILE = HS * STRIDE<HS>;
    extern __shared__ int4 infini_shared[];
    bf16* tiles = (bf16*)infini_shared;  // k for each of two stages
    float *z = (float*)(tiles + 2 * TILE), *inverse = z + HS;
    int kv = blockIdx.x % p.kv_heads, hs = p.hs, w0 = threadIdx.x / 32 * 16;
    const InfiniSegment s = p.segments[blockIdx.x / p.kv_heads];
    const float* memory = p.memory(s, kv);
    if (s.write < 0 || !memory) return;
    const bf16* keys = p.keys + s.key_row * p.key_stride + kv * hs;
    auto load = [&](int t) {
        if (t < s.k_len) load_rows<HS, HS>(tiles + t / HS % 2 * TILE, keys + t * p.key_stride, p.key_stride, s.k_len - t, hs, threadIdx.x, SUM_THREADS<HS>);
        copy_async_commit();
    };
    load(0);
    for (int c = threadIdx.x; c < HS; c += SUM_THREADS<HS>) z[c] = c < hs ? memory[c] : 0;
    float map[HS / 8][4] = {};
    for (int t = 0; t < s.k_len; t += HS) {
        load(t + HS);
        copy_async_wait<1>();
        __syncthreads();
        bf16* tile = tiles + t / HS % 2 * TILE;
        float den[2] = {0, 0};  // Φ takes the place of k, 16 tokens a warp
#pragma unroll
        for (int j = 0; j < HS / 8; j++)
#pragma unroll
            for (int i = 0; i < 2; i++) {
                int c = 8 * j + lane_column();
                uint32_t* at = pair(tile, (w0 + lane_row() + 8 * i) * STRIDE<HS> + c);
                *at = feature(*at);
                float2 f = unpack_bf16(*at);
                den[i] += f.x * z[c] + f.y * z[c + 1];
            }
#pragma unroll
        for (int i = 0; i < 2; i++) {
            int token = w0 + lane_row() + 8 * i;
            float sum = sum_of_row(den[i]) + INFINI_EPSILON;
            if (lane() % 4 == 0) inverse[token] = t + token < s.k_len ? 1 / sum : 0;
        }
        __syncthreads();
#pragma unroll
        for (int k = 0; k < HS / 16; k++) {
            uint32_t a[4];
            load_matrices_transposed(a, by_columns<HS>(tile, 16 * k, w0));
#pragma unroll
            for (int j = 0; j < 4; j++) {
                float2 f = unpack_bf16(a[j]), d = *(const float2*)(inverse + 16 * k + j / 2 * 8 + lane_column());
                a[j] = pack_bf16(f.x * d.x, f.y * d.y);
            }
            add_outer<HS>(map, a, tile, 16 * k);
        }
        __syncthreads();
    }
    store_matrix<HS>(maps + ((int64_t)s.write * p.kv_heads + kv) * hs * hs, map, w0, hs);
}

// As infini_normalizer_backward_kernel2. One block a segment and kv head, tiles of HS tokens, 16 a warp.
template <int HS>
__global__ void __launch_bounds__(infini_mma::SUM_THREADS<HS>, HS <= 64 ? 3 : 1) infini_normalizer_backward_kernel3(InfiniPass p, float* dmemories) {
    using namespace infini_mma;
    constexpr int TILE = HS * STRIDE<HS>, WARPS = HS / 16;
    extern __shared__ int4 infini_shared[];
    bf16 *M = (bf16*)infini_shared, *dM = M + TILE;
    float *z = (float*)(dM + TILE), *sums = z + HS;  // (WARPS, HS)
    int kv = blockIdx.x % p.kv_heads, hs = p.hs, w0 = threadIdx.x / 32 * 16;
    bf16* tiles = (bf16*)(sums + WARPS * HS) + w0 * STRIDE<HS>;  // the warp's 16 rows of two stages
    const InfiniSegment s = p.segments[blockIdx.x / p.kv_heads];
    if (s.read < 0 || s.write < 0 || s.last) return;
    const bf16* keys = p.qkv + s.row * p.qkv_stride() + p.channels() + kv * hs;
    auto load = [&](int t, int stage) {
        if (t < s.q_len) load_rows<HS, 16>(tiles + stage * TILE, keys + t * p.qkv_stride(), p.qkv_stride(), s.q_len - t, hs, lane(), 32);
        copy_async_commit();
    };
    load(w0, 0);
    load_memory<HS>(dM, z, dmemories + p.memory_at(s.write, kv), hs);
    __syncthreads();  // z was dz
    load_memory<HS>(M, z, p.memory(s, kv), hs);
    __syncthreads();
    float dz[HS / 16][4] = {};  // columns 16k + column + 0, 1, 8, 9, this thread's rows
    for (int t = w0, stage = 0; t < s.q_len; t += HS, stage ^= 1) {
        load(t + HS, stage ^ 1);
        copy_async_wait<1>();
        __syncwarp();
        uint32_t features[HS / 16][4];
        float inverse[2], dden[2] = {0, 0};
        load_features<HS>(features, tiles + stage * TILE);
        inverse_denominators<HS>(inverse, features, z);
#pragma unroll 1
        for (int n = 0; n < HS / 16; n++) {  // 16 columns of dU and of V̂·den
            float dU[2][4] = {}, V[2][4] = {};
#pragma unroll
            for (int k = 0; k < HS / 16; k++) {
                uint32_t b[4];
                load_matrices_transposed(b, by_rows<HS>(dM, 16 * k, 16 * n));
                mma(dU[0], features[k], b[0], b[1]);
                mma(dU[1], features[k], b[2], b[3]);
                load_matrices_transposed(b, by_rows<HS>(M, 16 * k, 16 * n));
                mma(V[0], features[k], b[0], b[1]);
                mma(V[1], features[k], b[2], b[3]);
            }
#pragma unroll
            for (int j = 0; j < 2; j++)
#pragma unroll
                for (int i = 0; i < 4; i++) dden[i / 2] += dU[j][i] * V[j][i];
        }
#pragma unroll
        for (int i = 0; i < 2; i++) {
            dden[i] = sum_of_row(dden[i]) * inverse[i] * inverse[i];
            if (t + lane_row() + 8 * i >= s.q_len) dden[i] = 0;
        }
#pragma unroll
        for (int k = 0; k < HS / 16; k++)
#pragma unroll
            for (int j = 0; j < 4; j++) {
                float2 f = unpack_bf16(features[k][j]);
                dz[k][j / 2 * 2] += f.x * dden[j % 2];
                dz[k][j / 2 * 2 + 1] += f.y * dden[j % 2];
            }
        __syncwarp();
    }
#pragma unroll
    for (int k = 0; k < HS / 16; k++)
#pragma unroll
        for (int j = 0; j < 4; j++) {
            float sum = dz[k][j];
            for (int offset = 4; offset < 32; offset *= 2) sum += __shfl_xor_sync(0xffffffff, sum, offset);
            if (lane() < 4) sums[threadIdx.x / 32 * HS + 16 * k + j / 2 * 8 + lane_column() + j % 2] = sum;
        }
    __syncthreads();
    for (int c = threadIdx.x; c < hs; c += SUM_THREADS<HS>) {
        float sum = 0;
#pragma unroll
        for (int w = 0; w < WARPS; w++) sum += sums[w * HS + c];
        dmemories[p.memory_at(s.read, kv) + c] += sum;
    }
}

// dk, dv = keep·(dk, dv) + what full segments have written, in dqkv (N, qkv_stride).
template <int HS, bool DELTA>
__global__ void __launch_bounds__(infini_mma::ROW_THREADS, HS <= 64 ? 2 : 1)
    infini_write_backward_kernel3(InfiniPass p, const float* beta, const float* dmemories, floatX* dqkv) {
    using namespace infini_mma;
    constexpr int STAGES = WRITE_BACKWARD_STAGES<HS>, TILE = 16 * STRIDE<HS>;
    extern __shared__ int4 infini_shared[];
    bf16 *dM = (bf16*)infini_shared, *M = dM + HS * STRIDE<HS>;  // M, z: delta alone
    float *dz = (float*)(M + (DELTA ? HS * STRIDE<HS> : 0)), *z = dz + HS;
    bf16* tiles = (bf16*)(z + (DELTA ? HS : 0)) + threadIdx.x / 32 * (STAGES * 4 * TILE);  // k, v, dk, dv for each stage
    int kv = blockIdx.x % p.kv_heads, hs = p.hs;
    const InfiniSegment s = p.segments[blockIdx.x / p.kv_heads];
    const bool written = s.write >= 0 && !s.last;
    const float keep = p.keep(p.gate(s, beta[kv]));
    if ((!written && keep == 1) || (int)blockIdx.y * BLOCK_ROWS >= s.q_len) return;
    const float* before = DELTA && written ? p.memory(s, kv) : nullptr;

    int first = blockIdx.y * BLOCK_ROWS + threadIdx.x / 32 * 16, step = gridDim.y * BLOCK_ROWS;
    int64_t stride = p.qkv_stride(), to_v = p.kv_channels();
    auto load = [&](int t, int stage) {
        if (t < s.q_len) {
            int64_t at = (s.row + t) * stride + p.channels() + kv * hs;
            bf16* to = tiles + stage * 4 * TILE;
            load_rows<HS, 16>(to, p.qkv + at, stride, s.q_len - t, hs, lane(), 32);
            load_rows<HS, 16>(to + TILE, p.qkv + at + to_v, stride, s.q_len - t, hs, lane(), 32);
            load_rows<HS, 16>(to + 2 * TILE, dqkv + at, stride, s.q_len - t, hs, lane(), 32);
            load_rows<HS, 16>(to + 3 * TILE, dqkv + at + to_v, stride, s.q_len - t, hs, lane(), 32);
        }
        copy_async_commit();
    };
    if (STAGES == 2) load(first, 0);
    load_memory<HS>(dM, dz, written ? dmemories + p.memory_at(s.write, kv) : nullptr, hs);
    if (before) load_memory<HS>(M, z, before, hs);
    __syncthreads();
    for (int t = first, stage = 0; t < s.q_len; t += step, stage = (stage + 1) % STAGES) {
        if (STAGES == 2)
            load(t + step, stage ^ 1);
        else
            load(t, 0);
        copy_async_wait<STAGES - 1>();
        __syncwarp();
        bf16 *k = tiles + stage * 4 * TILE, *v = k + TILE, *dk = v + TILE, *dv = dk + TILE;
        uint32_t features[HS / 16][4];
        load_features<HS>(features, k);
        float d[HS / 8][4] = {}, dden[2] = {0, 0};
        times<HS>(d, features, dM);  // dU
#pragma unroll
        for (int j = 0; j < HS / 8; j++)
#pragma unroll
            for (int i = 0; i < 2; i++) {
                uint32_t* at = pair(dv, (lane_row() + 8 * i) * STRIDE<HS> + 8 * j + lane_column());
                float2 x = unpack_bf16(*at);
                *at = pack_bf16(keep * x.x + d[j][2 * i], keep * x.y + d[j][2 * i + 1]);
            }
        if (before) {
            float inverse[2];
            inverse_denominators<HS>(inverse, features, z);
#pragma unroll
            for (int n = 0; n < HS / 16; n++) {  // 16 columns of V̂: U takes the place of v
                float V[2][4] = {};
#pragma unroll
                for (int m = 0; m < HS / 16; m++) {
                    uint32_t b[4];
                    load_matrices_transposed(b, by_rows<HS>(M, 16 * m, 16 * n));
                    mma(V[0], features[m], b[0], b[1]);
                    mma(V[1], features[m], b[2], b[3]);
                }
#pragma unroll
                for (int j = 0; j < 2; j++)
#pragma unroll
                    for (int i = 0; i < 2; i++) {
                        uint32_t* at = pair(v, (lane_row() + 8 * i) * STRIDE<HS> + 16 * n + 8 * j + lane_column());
                        float2 x = unpack_bf16(*at);
                        float V0 = V[j][2 * i] * inverse[i], V1 = V[j][2 * i + 1] * inverse[i];
                        dden[i] += d[2 * n + j][2 * i] * V0 + d[2 * n + j][2 * i + 1] * V1;
                        *at = pack_bf16(x.x - V0, x.y - V1);
                    }
            }
#pragma unroll
            for (int i = 0; i < 2; i++) dden[i] = sum_of_row(dden[i]) * inverse[i];
            __syncwarp();  // all lanes have read k
#pragma unroll
            for (int j = 0; j < HS / 8; j++)  // dn takes the place of k
#pragma unroll
                for (int i = 0; i < 2; i++)
                    *pair(k, (lane_row() + 8 * i) * STRIDE<HS> + 8 * j + lane_column()) = pack_bf16(-inverse[i] * d[j][2 * i], -inverse[i] * d[j][2 * i + 1]);
            __syncwarp();
            set_zero<HS>(d);
            times_transposed<HS>(d, k, 0, M);
        } else {
            set_zero<HS>(d);
        }
        times_transposed<HS>(d, v, 0, dM);  // dΦ(k)
#pragma unroll
        for (int j = 0; j < HS / 8; j++)
#pragma unroll
            for (int i = 0; i < 2; i++) {
                int c = 8 * j + lane_column();
                uint32_t* at = pair(dk, (lane_row() + 8 * i) * STRIDE<HS> + c);
                float2 x = unpack_bf16(*at), f = unpack_bf16(features[j / 2][j % 2 * 2 + i]);
                float d0 = d[j][2 * i] + dz[c], d1 = d[j][2 * i + 1] + dz[c + 1];
                if (before) d0 += dden[i] * z[c], d1 += dden[i] * z[c + 1];
                *at = pack_bf16(keep * x.x + d0 * min(1.f, f.x), keep * x.y + d1 * min(1.f, f.y));
            }
        __syncwarp();
        int64_t at = (s.row + t) * stride + p.channels() + kv * hs;
        store_rows<HS>(dqkv + at, stride, dk, s.q_len - t, hs);
        store_rows<HS>(dqkv + at + to_v, stride, dv, s.q_len - t, hs);
        __syncwarp();
    }
}

}  // namespace gpu
#endif
