// Infini-attention's memory, kernels for any sizes, in float32 arithmetic. Equations and launchers: infini.cuh.
//
// Tiles of ROWS tokens by hs stand in shared memory, where rows are `ld` apart, a multiple of 4, and what is behind hs or behind the last row is zero; a thread
// computes whole columns of a tile. The memory is read from the caches, where all blocks of a segment find it. ROWS is 16, or 1 for head sizes above 512.
#pragma once

#include "infini_pass.cuh"

namespace gpu {

namespace infini_rows {

constexpr int THREADS = 128, WARPS = THREADS / 32;

__device__ inline float feature(float x) { return x > 0 ? x + 1 : expf(x); }

// Rows of x, or Φ of them, `stride` apart; n of them are there.
template <int ROWS>
__device__ inline void load(float* tile, int ld, int hs, const floatX* x, int64_t stride, int n, bool features) {
    for (int e = threadIdx.x; e < ROWS * ld; e += THREADS) {
        int i = e / ld, c = e % ld;
        float value = 0;
        if (i < n && c < hs) {
            value = to_float(x[i * stride + c]);
            if (features) value = feature(value);
        }
        tile[e] = value;
    }
}

// den_i = tile_i·z + ε. A barrier must follow before den is read.
template <int ROWS>
__device__ inline void denominators(float* den, const float* tile, int ld, int hs, const float* z) {
    for (int i = threadIdx.x / 32; i < ROWS; i += WARPS) {
        float sum = 0;
        for (int c = threadIdx.x % 32; c < hs; c += 32) sum += tile[i * ld + c] * z[c];
        sum = warp_sum(sum);
        if (threadIdx.x % 32 == 0) den[i] = sum + INFINI_EPSILON;
    }
}

// out_i = Σ_k tile_ik·b_k, b_k = b[k·step]: a column of tile·M with step hs, of tile·Mᵀ with step 1.
template <int ROWS>
__device__ inline void times(float (&out)[ROWS], const float* tile, int ld, int hs, const float* b, int64_t step) {
#pragma unroll
    for (int i = 0; i < ROWS; i++) out[i] = 0;
    for (int k = 0; k < hs; k += 4) {
        float bk[4];
#pragma unroll
        for (int j = 0; j < 4; j++) bk[j] = k + j < hs ? b[(k + j) * step] : 0;
#pragma unroll
        for (int i = 0; i < ROWS; i++) {
            float4 a = *(const float4*)(tile + i * ld + k);
            out[i] += a.x * bk[0] + a.y * bk[1] + a.z * bk[2] + a.w * bk[3];
        }
    }
}

// out_i = the block's sum of partial[i]; shared (WARPS·ROWS). Ends with a barrier.
template <int ROWS>
__device__ inline void sum_rows(float* out, const float (&partial)[ROWS], float* shared) {
#pragma unroll
    for (int i = 0; i < ROWS; i++) {
        float sum = warp_sum(partial[i]);
        if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32 * ROWS + i] = sum;
    }
    __syncthreads();
    if (threadIdx.x < ROWS) {
        float sum = 0;
        for (int w = 0; w < WARPS; w++) sum += shared[w * ROWS + threadIdx.x];
        out[threadIdx.x] = sum;
    }
    __syncthreads();
}

// What a block works on: a segment and one of `heads` heads; blockIdx.y is one of the pieces of a segment.
struct Place {
    InfiniSegment segment;
    int head;
};
__device__ inline Place place(const InfiniPass& p, int heads) { return {p.segments[blockIdx.x / heads], (int)(blockIdx.x % heads)}; }

}  // namespace infini_rows

// A = g·R + (1−g)·D, (N,C); A may be D. Shared memory: ROWS·ld.
template <int ROWS>
__global__ void __launch_bounds__(infini_rows::THREADS) infini_retrieve_kernel2(InfiniPass p, const float* beta, const floatX* D, floatX* A, int ld) {
    using namespace infini_rows;
    extern __shared__ __align__(16) float infini_tiles[];
    float* features = infini_tiles;
    __shared__ float den[ROWS];
    auto [s, h] = place(p, p.heads);
    int hs = p.hs, C = p.channels();
    const float* memory = p.memory(s, p.kv_head(h));
    float g = memory || p.gated_first ? infini_gate(beta[h]) : 0;
    for (int t = blockIdx.y * ROWS; t < s.q_len; t += gridDim.y * ROWS) {
        int rows = min(ROWS, s.q_len - t);
        int64_t row = s.row + t;
        if (memory) {
            load<ROWS>(features, ld, hs, p.qkv + row * p.qkv_stride() + h * hs, p.qkv_stride(), rows, true);
            __syncthreads();
            denominators<ROWS>(den, features, ld, hs, memory);
            __syncthreads();
        }
        for (int c = threadIdx.x; c < hs; c += THREADS) {
            float n[ROWS];
            if (memory) times<ROWS>(n, features, ld, hs, memory + hs + c, hs);
#pragma unroll
            for (int i = 0; i < ROWS; i++) {
                if (i >= rows) break;
                int64_t at = (row + i) * C + h * hs + c;
                A[at] = from_float<floatX>((1 - g) * to_float(D[at]) + (memory ? g * n[i] / den[i] : 0));
            }
        }
        __syncthreads();
    }
}

// dn (N,C) and dden (NH,N) where there is a gate, zeros where nothing was read; partial (max_segments, NH, pieces) is Σ dA⊙(R−D) of this block's rows.
template <int ROWS>
__global__ void __launch_bounds__(infini_rows::THREADS)
    infini_gate_backward_kernel2(InfiniPass p, const float* beta, const floatX* D, const floatX* dA, floatX* dn, float* dden, float* partial, int ld) {
    using namespace infini_rows;
    extern __shared__ __align__(16) float infini_tiles[];
    float* features = infini_tiles;
    __shared__ float den[ROWS], dA_R[ROWS], dA_D[ROWS], shared[WARPS * ROWS];
    auto [s, h] = place(p, p.heads);
    int hs = p.hs, C = p.channels();
    const float* memory = p.memory(s, p.kv_head(h));
    float g = infini_gate(beta[h]), sum = 0;
    bool gated = memory || p.gated_first;
    for (int t = blockIdx.y * ROWS; gated && t < s.q_len; t += gridDim.y * ROWS) {
        int rows = min(ROWS, s.q_len - t);
        int64_t row = s.row + t;
        if (memory) {
            load<ROWS>(features, ld, hs, p.qkv + row * p.qkv_stride() + h * hs, p.qkv_stride(), rows, true);
            __syncthreads();
            denominators<ROWS>(den, features, ld, hs, memory);
            __syncthreads();
        }
        float sum_R[ROWS] = {}, sum_D[ROWS] = {};
        for (int c = threadIdx.x; c < hs; c += THREADS) {
            float n[ROWS];
            if (memory) times<ROWS>(n, features, ld, hs, memory + hs + c, hs);
#pragma unroll
            for (int i = 0; i < ROWS; i++) {
                if (i >= rows) break;
                int64_t at = (row + i) * C + h * hs + c;
                float d = to_float(dA[at]);
                if (memory) sum_R[i] += d * n[i] / den[i];
                dn[at] = from_float<floatX>(memory ? g * d / den[i] : 0);
                sum_D[i] += d * to_float(D[at]);
            }
        }
        sum_rows<ROWS>(dA_R, sum_R, shared);
        sum_rows<ROWS>(dA_D, sum_D, shared);
        if (threadIdx.x < rows) dden[h * p.num_tokens + row + threadIdx.x] = memory ? -g * dA_R[threadIdx.x] / den[threadIdx.x] : 0;
        for (int i = 0; i < rows; i++) sum += dA_R[i] - dA_D[i];
        __syncthreads();
    }
    if (threadIdx.x == 0) partial[(int64_t)blockIdx.x * gridDim.y + blockIdx.y] = sum;
}

// dq = keep·dq + (dn·Mᵀ + dden·zᵀ)⊙Φ'(q), in dqkv (N, qkv_stride).
template <int ROWS>
__global__ void __launch_bounds__(infini_rows::THREADS)
    infini_query_backward_kernel2(InfiniPass p, const float* beta, const floatX* dn, const float* dden, floatX* dqkv, int ld) {
    using namespace infini_rows;
    extern __shared__ __align__(16) float infini_tiles[];
    float* numerators = infini_tiles;
    auto [s, h] = place(p, p.heads);
    int hs = p.hs, C = p.channels();
    const float* memory = p.memory(s, p.kv_head(h));
    const float keep = p.keep(p.gate(s, beta[h]));
    for (int t = blockIdx.y * ROWS; (memory || keep != 1) && t < s.q_len; t += gridDim.y * ROWS) {
        int rows = min(ROWS, s.q_len - t);
        int64_t row = s.row + t;
        load<ROWS>(numerators, ld, hs, dn + row * C + h * hs, C, rows, false);
        __syncthreads();
        for (int r = threadIdx.x; r < hs; r += THREADS) {
            float dfeature[ROWS];
            if (memory) times<ROWS>(dfeature, numerators, ld, hs, memory + hs + (int64_t)r * hs, 1);
#pragma unroll
            for (int i = 0; i < ROWS; i++) {
                if (i >= rows) break;
                int64_t at = (row + i) * p.qkv_stride() + h * hs + r;
                float d = memory ? (dfeature[i] + dden[h * p.num_tokens + row + i] * memory[r]) * min(1.f, feature(to_float(p.qkv[at]))) : 0;
                dqkv[at] = from_float<floatX>(keep * to_float(dqkv[at]) + d);
            }
        }
        __syncthreads();
    }
}

// Sums over the tokens of a segment, aᵀ·x (hs,hs), in tiles of 64x64 a block and 4x4 a thread:
//     INFINI_WRITE   a = Φ(k), x = v, and Σ a          → `out` = memories[write]: what the segment adds to M and z
//     INFINI_MAP     a = Φ(k), x = Φ(k)/den            → `out` = maps[write]: delta's P
//     INFINI_READ    a = Φ(q), x = dn, and Σ dden·a    → `out` = dmemories[read]: dM_q, dz_q, over the query heads of a kv head
enum InfiniSum { INFINI_WRITE, INFINI_MAP, INFINI_READ };

template <InfiniSum WHAT>
__global__ void __launch_bounds__(256) infini_outer_kernel2(InfiniPass p, float* out, const floatX* dn, const float* dden) {
    constexpr int TILE = 64, TOKENS = 16;
    __shared__ __align__(16) float a[TOKENS][TILE], x[TOKENS][TILE];
    __shared__ float weight[TOKENS];
    const InfiniSegment s = p.segments[blockIdx.x / p.kv_heads];
    int kv = blockIdx.x % p.kv_heads, hs = p.hs, tiles = (int)ceil_div(hs, TILE);
    int r0 = blockIdx.y / tiles * TILE, c0 = blockIdx.y % tiles * TILE, tx = threadIdx.x % 16, ty = threadIdx.x / 16;
    const float* memory = p.memory(s, kv);
    if (WHAT == INFINI_READ ? s.read < 0 : s.write < 0 || (WHAT == INFINI_MAP && !memory)) return;
    float sum[4][4] = {}, column_sum = 0;
    int tokens = WHAT == INFINI_READ ? s.q_len : s.k_len;
    for (int g = 0; g < (WHAT == INFINI_READ ? p.heads_per_kv() : 1); g++) {
        int h = kv * p.heads_per_kv() + g;
        int64_t a_stride = WHAT == INFINI_READ ? p.qkv_stride() : p.key_stride, x_stride = WHAT == INFINI_READ ? p.channels() : p.key_stride;
        const floatX* from_a = WHAT == INFINI_READ ? p.qkv + s.row * p.qkv_stride() + h * hs : p.keys + s.key_row * p.key_stride + kv * hs;
        const floatX* from_x = WHAT == INFINI_READ ? dn + (int64_t)s.row * p.channels() + h * hs : WHAT == INFINI_WRITE ? from_a + p.kv_channels() : from_a;
        for (int t0 = 0; t0 < tokens; t0 += TOKENS) {
            for (int e = threadIdx.x; e < TOKENS * TILE; e += 256) {
                int i = e / TILE, c = e % TILE;
                bool there = t0 + i < tokens;
                a[i][c] = there && r0 + c < hs ? infini_rows::feature(to_float(from_a[(t0 + i) * a_stride + r0 + c])) : 0;
                float value = there && c0 + c < hs ? to_float(from_x[(t0 + i) * x_stride + c0 + c]) : 0;
                x[i][c] = WHAT == INFINI_MAP && there && c0 + c < hs ? infini_rows::feature(value) : value;
            }
            if (WHAT == INFINI_MAP) {  // 1/den, a warp a token
                for (int i = threadIdx.x / 32; i < TOKENS; i += 8) {
                    float den = 0;
                    for (int c = threadIdx.x % 32; c < hs && t0 + i < tokens; c += 32)
                        den += infini_rows::feature(to_float(from_a[(t0 + i) * a_stride + c])) * memory[c];
                    den = warp_sum(den);
                    if (threadIdx.x % 32 == 0) weight[i] = 1 / (den + INFINI_EPSILON);
                }
            } else if (threadIdx.x < TOKENS) {
                int t = t0 + threadIdx.x;
                weight[threadIdx.x] = WHAT == INFINI_WRITE ? 1 : t < tokens ? dden[h * p.num_tokens + s.row + t] : 0;
            }
            __syncthreads();
#pragma unroll
            for (int i = 0; i < TOKENS; i++) {
                float4 ai = *(const float4*)&a[i][4 * ty], xi = *(const float4*)&x[i][4 * tx];
                float w = WHAT == INFINI_MAP ? weight[i] : 1;
                float left[4] = {ai.x, ai.y, ai.z, ai.w}, right[4] = {xi.x * w, xi.y * w, xi.z * w, xi.w * w};
#pragma unroll
                for (int j = 0; j < 4; j++)
#pragma unroll
                    for (int k = 0; k < 4; k++) sum[j][k] += left[j] * right[k];
            }
            if (WHAT != INFINI_MAP && c0 == 0 && threadIdx.x < TILE)
                for (int i = 0; i < TOKENS; i++) column_sum += a[i][threadIdx.x] * weight[i];
            __syncthreads();
        }
    }
    float* to = WHAT == INFINI_MAP ? out + ((int64_t)s.write * p.kv_heads + kv) * hs * hs : out + p.memory_at(WHAT == INFINI_READ ? s.read : s.write, kv) + hs;
    for (int j = 0; j < 4; j++)
        for (int k = 0; k < 4; k++) {
            int r = r0 + 4 * ty + j, c = c0 + 4 * tx + k;
            if (r < hs && c < hs) to[(int64_t)r * hs + c] = sum[j][k];
        }
    if (WHAT != INFINI_MAP && c0 == 0 && threadIdx.x < TILE && r0 + (int)threadIdx.x < hs) to[r0 + (int)threadIdx.x - hs] = column_sum;
}

// delta: the gradient of z through the denominators of a write, dmemories[read].z += Σ_t dden_t·Φ(k_t), dden = Σ_c dU⊙V̂ / den. One block a segment and kv
// head. Shared memory: ROWS·ld, then hs.
template <int ROWS>
__global__ void __launch_bounds__(infini_rows::THREADS, 4) infini_normalizer_backward_kernel2(InfiniPass p, float* dmemories, int ld) {
    using namespace infini_rows;
    extern __shared__ __align__(16) float infini_tiles[];
    float* features = infini_tiles;
    __shared__ float den[ROWS], dden[ROWS], shared[WARPS * ROWS];
    float* dz = features + ROWS * ld;  // each thread's own columns
    auto [s, kv] = place(p, p.kv_heads);
    if (s.read < 0 || s.write < 0 || s.last) return;
    int hs = p.hs;
    const float *z = p.memory(s, kv), *M = z + hs, *dM = dmemories + p.memory_at(s.write, kv) + hs;
    for (int c = threadIdx.x; c < hs; c += THREADS) dz[c] = 0;
    for (int t = 0; t < s.q_len; t += ROWS) {
        int rows = min(ROWS, s.q_len - t);
        load<ROWS>(features, ld, hs, p.qkv + (s.row + t) * p.qkv_stride() + p.channels() + kv * hs, p.qkv_stride(), rows, true);
        __syncthreads();
        denominators<ROWS>(den, features, ld, hs, z);
        float partial[ROWS] = {};
        for (int c = threadIdx.x; c < hs; c += THREADS) {
            float dU[ROWS], V[ROWS];
            times<ROWS>(dU, features, ld, hs, dM + c, hs);
            times<ROWS>(V, features, ld, hs, M + c, hs);
#pragma unroll
            for (int i = 0; i < ROWS; i++) partial[i] += dU[i] * V[i];
        }
        sum_rows<ROWS>(dden, partial, shared);
        for (int c = threadIdx.x; c < hs; c += THREADS)
            for (int i = 0; i < rows; i++) dz[c] += features[i * ld + c] * dden[i] / (den[i] * den[i]);
        __syncthreads();
    }
    float* to = dmemories + p.memory_at(s.read, kv);
    for (int c = threadIdx.x; c < hs; c += THREADS) to[c] += dz[c];
}

// dk, dv = keep·(dk, dv) + what full segments have written, in dqkv (N, qkv_stride). Shared memory: 3·ROWS·ld.
template <int ROWS>
__global__ void __launch_bounds__(infini_rows::THREADS)
    infini_write_backward_kernel2(InfiniPass p, const float* beta, const float* dmemories, floatX* dqkv, int ld) {
    using namespace infini_rows;
    extern __shared__ __align__(16) float infini_tiles[];
    float* features = infini_tiles;
    __shared__ float den[ROWS], dden[ROWS], shared[WARPS * ROWS];
    float *U = features + ROWS * ld, *dn = U + ROWS * ld;
    auto [s, kv] = place(p, p.kv_heads);
    int hs = p.hs;
    int64_t stride = p.qkv_stride();
    const bool written = s.write >= 0 && !s.last;
    const float keep = p.keep(p.gate(s, beta[kv]));
    if (!written && keep == 1) return;
    const float *before = p.delta && written ? p.memory(s, kv) : nullptr, *dz = written ? dmemories + p.memory_at(s.write, kv) : nullptr, *dM = dz + hs;
    for (int t = blockIdx.y * ROWS; t < s.q_len; t += gridDim.y * ROWS) {
        int rows = min(ROWS, s.q_len - t);
        int64_t k_at = (s.row + t) * stride + p.channels() + kv * hs, v_at = k_at + p.kv_channels();
        load<ROWS>(features, ld, hs, p.qkv + k_at, stride, rows, true);
        load<ROWS>(U, ld, hs, p.qkv + v_at, stride, rows, false);
        __syncthreads();
        if (before) {
            for (int e = threadIdx.x; e < ROWS * ld; e += THREADS) dn[e] = 0;
            denominators<ROWS>(den, features, ld, hs, before);
            __syncthreads();
        }
        float partial[ROWS] = {};
        for (int c = threadIdx.x; c < hs; c += THREADS) {
            float dU[ROWS], V[ROWS];
            if (written) times<ROWS>(dU, features, ld, hs, dM + c, hs);
            if (before) times<ROWS>(V, features, ld, hs, before + hs + c, hs);
#pragma unroll
            for (int i = 0; i < ROWS; i++) {
                if (i >= rows) break;
                int64_t at = v_at + i * stride + c;
                dqkv[at] = from_float<floatX>(keep * to_float(dqkv[at]) + (written ? dU[i] : 0));
                if (before) {
                    U[i * ld + c] -= V[i] / den[i];
                    dn[i * ld + c] = -dU[i] / den[i];
                    partial[i] += dU[i] * V[i] / den[i];
                }
            }
        }
        if (before) sum_rows<ROWS>(dden, partial, shared);  // with a barrier
        for (int r = threadIdx.x; r < hs; r += THREADS) {
            float dfeature[ROWS], more[ROWS];
            if (written) times<ROWS>(dfeature, U, ld, hs, dM + (int64_t)r * hs, 1);
            if (before) times<ROWS>(more, dn, ld, hs, before + hs + (int64_t)r * hs, 1);
#pragma unroll
            for (int i = 0; i < ROWS; i++) {
                if (i >= rows) break;
                float d = written ? dfeature[i] + dz[r] : 0;
                if (before) d += more[i] + dden[i] / den[i] * before[r];
                int64_t at = k_at + i * stride + r;
                dqkv[at] = from_float<floatX>(keep * to_float(dqkv[at]) + d * min(1.f, features[i * ld + r]));
            }
        }
        __syncthreads();
    }
}

}  // namespace gpu
