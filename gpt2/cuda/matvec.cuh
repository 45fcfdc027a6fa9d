// The linear layers of few rows, which is what decoding computes: a token for each sequence. All that is around a product is in its one launch.
//
//     out (N,OC) = [residual +] [GELU] (u·Wᵀ + b)      u = x (N,C), or its LayerNorm x̂⊙gain + bias (layernorm.cuh)      W (OC,C), N <= FEW_ROWS
//
// A weight takes part in N multiply-adds only, so reading W is the work: the memory's rate is the limit, and what keeps from it is waiting. A layer of
// GPT-2 124M is read in some 1.2 µs, as long as a launch and a first read take one behind another. So
//   - a block asks for its weights, as many as its queue in shared memory holds, before anything else;
//   - and, launched so that it may begin before the kernel in front of it has ended (programmatic dependent launch), before that kernel's results are there.
//
// What a sum over C is made of, and in what order, depends on C (and on whether there is a norm) only: a row of x gets the same bits whatever rows stand
// beside it. How the kernels came about: dev/cuda/matvec.cu.
#pragma once

#include <algorithm>
#include <utility>

#include "common.cuh"
#include "gelu.cuh"
#include "layernorm.cuh"
#include "numbers.cuh"
#include "overlap.cuh"
#include "tensor_cores.cuh"

namespace gpu {

constexpr int FEW_ROWS = 16;

struct NormParameters {
    const floatX *gain, *bias;  // (C) of a LayerNorm
};

struct Matvec {
    floatX* out;             // (N,OC)
    const floatX* x;         // (N,C)
    NormParameters norm;     // gain null: none
    const floatX* w;         // (OC,C)
    const floatX* b;         // (OC) or null
    const floatX* residual;  // (N,OC) or null; may be out
    int N, C, OC;
    bool gelu;
};

// --------------------------------------------------------------------------------------------------------------------------------------------------
// 2. Any size: a warp an output, W numbers at a time

constexpr int MATVEC_ROWS = 8;  // rows of x that share a reading of the weights

template <int W>
__global__ void __launch_bounds__(256) matvec_kernel2(Matvec m) {
    __shared__ float mean[FEW_ROWS], rstd[FEW_ROWS];
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    int64_t o = (int64_t)blockIdx.x * 8 + warp;
    if (m.norm.gain) {
        for (int n = warp; n < m.N; n += 8) {
            const floatX* row = m.x + (int64_t)n * m.C;
            float sum = 0, squares = 0;
            for (int c = lane * W; c < m.C; c += 32 * W) {
                Numbers<W> x = load_numbers<W>(row + c);
                for (int k = 0; k < W; k++) sum += x[k];
            }
            float mu = warp_sum(sum) / m.C;
            for (int c = lane * W; c < m.C; c += 32 * W) {
                Numbers<W> x = load_numbers<W>(row + c);
                for (int k = 0; k < W; k++) squares += (x[k] - mu) * (x[k] - mu);
            }
            float r = rsqrtf(warp_sum(squares) / m.C + norm_epsilon<true>);
            if (lane == 0) mean[n] = mu, rstd[n] = r;
        }
        __syncthreads();
    }
    if (o >= m.OC) return;

    for (int n0 = 0; n0 < m.N; n0 += MATVEC_ROWS) {
        float sum[MATVEC_ROWS] = {};
        for (int c = lane * W; c < m.C; c += 32 * W) {
            Numbers<W> w = load_numbers<W>(m.w + o * m.C + c), gain, bias;
            if (m.norm.gain) gain = load_numbers<W>(m.norm.gain + c), bias = load_numbers<W>(m.norm.bias + c);
#pragma unroll
            for (int i = 0; i < MATVEC_ROWS; i++) {
                int n = n0 + i;
                if (n >= m.N) break;
                Numbers<W> x = load_numbers<W>(m.x + (int64_t)n * m.C + c);
                for (int k = 0; k < W; k++) {
                    float u = x[k];
                    if (m.norm.gain) u = to_float(from_float<floatX>((u - mean[n]) * rstd[n] * gain[k] + bias[k]));
                    sum[i] += w[k] * u;
                }
            }
        }
#pragma unroll
        for (int i = 0; i < MATVEC_ROWS; i++) {
            int n = n0 + i;
            if (n >= m.N) break;
            float y = warp_sum(sum[i]);
            if (lane != 0) continue;
            if (m.b) y += to_float(m.b[o]);
            if (m.gelu) y = gelu(y);
            if (m.residual) y += to_float(m.residual[n * (int64_t)m.OC + o]);
            m.out[n * (int64_t)m.OC + o] = from_float<floatX>(y);
        }
    }
}

template <int W>
inline void launch_matvec2(cudaStream_t stream, const Matvec& m) {
    matvec_kernel2<W><<<(unsigned)ceil_div(m.OC, 8), 256, 0, stream>>>(m);
    LAUNCH_CHECK();
}

// --------------------------------------------------------------------------------------------------------------------------------------------------
// 3. Tensor cores
//
// A block stays on its multiprocessor and computes some tiles of 8 outputs, a few at a time. mma.sync takes the rows of x as its 16 rows (8, the others zero,
// for TOKENS = 8) and a tile's rows of W as its columns. The sum over C may go through the channels in any order if both operands do: of a slab of 32 channels
// lane 4·i + j has the 8 from 8·j on, 16 bytes, of row i of W and of rows i and i + 8 of x, as they lie in memory, and two products take four of them each.
// The warps share the slabs in turns, not the rows; their sums meet in shared memory.
//
// Weights go through a queue in shared memory that leaves room for the next kernel's queue. Each lane copies what it will itself read, to a place of its own:
// no barriers, no bank conflicts.
//
// The norm is made of segments of 256 channels, a warp a segment of some rows: m_s, q_s = Σ (x − m_s)² of each, then m = Σ n_s·m_s / C,
// variance = Σ (q_s + n_s·(m_s − m)²) / C. Its result stands in shared memory in the order in which the products want it.

#ifndef GPU_FLOAT32

constexpr int MATVEC_GROUP = 3;           // slabs that are copied, waited for and multiplied together: what a warp has of 768 channels
constexpr int MATVEC_X_BYTES = 48 << 10;  // of x in shared memory, at most, where there is no norm
template <int R, int WARPS>
constexpr int matvec_depth = R* WARPS >= 24   ? 2
                             : R* WARPS >= 16 ? 3
                                              : 6;  // groups in the queue: 72 or 96 KB

__device__ __forceinline__ void copy_weights(uint32_t to, const floatX* from, bool valid) {  // 16 bytes; those behind them are asked for next
    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(valid ? 16 : 0) : "memory");
}
// Volatile: they stay before wait_for_kernel_before().
__device__ __forceinline__ uint4 load_parameters(const floatX* p, bool valid) {
    uint4 x;
    asm volatile(
        "{\n.reg .pred p;\nsetp.ne.b32 p, %5, 0;\n"
        "mov.b32 %0, 0;\nmov.b32 %1, 0;\nmov.b32 %2, 0;\nmov.b32 %3, 0;\n"
        "@p ld.global.nc.v4.b32 {%0,%1,%2,%3}, [%4];\n}"
        : "=&r"(x.x), "=&r"(x.y), "=&r"(x.z), "=&r"(x.w)
        : "l"(p), "r"((int)valid));
    return x;
}
__device__ __forceinline__ uint32_t load_parameter_pair(const floatX* p) {
    uint32_t x;
    asm volatile("ld.global.nc.b32 %0, [%1];" : "=r"(x) : "l"(p));
    return x;
}
// From the second-level cache, where the kernel before has left them.
__device__ __forceinline__ uint4 load_activations(const floatX* p, bool valid) {
    uint4 x;
    asm volatile(
        "{\n.reg .pred p;\nsetp.ne.b32 p, %5, 0;\n"
        "mov.b32 %0, 0;\nmov.b32 %1, 0;\nmov.b32 %2, 0;\nmov.b32 %3, 0;\n"
        "@p ld.global.cg.v4.b32 {%0,%1,%2,%3}, [%4];\n}"
        : "=&r"(x.x), "=&r"(x.y), "=&r"(x.z), "=&r"(x.w)
        : "l"(p), "r"((int)valid)
        : "memory");
    return x;
}
__device__ __forceinline__ uint32_t normalised(uint32_t x, float mean, float rstd, uint32_t gain, uint32_t bias) {
    float2 u = unpack_bf16(x), g = unpack_bf16(gain), b = unpack_bf16(bias);
    return pack_bf16((u.x - mean) * rstd * g.x + b.x, (u.y - mean) * rstd * g.y + b.y);
}
// An address that the compiler keeps, instead of working it out again at each use.
__device__ __forceinline__ uint32_t kept(uint32_t x) {
    asm volatile("" : "+r"(x));
    return x;
}
template <bool SQUARES = false>
__device__ __forceinline__ float sum8(const uint4& x, float mean) {  // of 8 numbers, or of their squared distances from the mean
    float2 v[4] = {unpack_bf16(x.x), unpack_bf16(x.y), unpack_bf16(x.z), unpack_bf16(x.w)};
    float pair[4];
    for (int k = 0; k < 4; k++) pair[k] = SQUARES ? (v[k].x - mean) * (v[k].x - mean) + (v[k].y - mean) * (v[k].y - mean) : v[k].x + v[k].y;
    return (pair[0] + pair[1]) + (pair[2] + pair[3]);
}

// What the host works out.
struct MatvecShares {
    int tiles, longer;  // the first `longer` blocks have tiles + 1 of them, the others tiles;
    int batch;          // so many at a time
    int queue_groups;   // places of the queue
    int x_slabs;        // without a norm: so many slabs of x that a warp needs are in shared memory at once
    int segments;       // whole ones; what one and the last, shorter one weigh in the mean, 1/C
    float whole, last, inverse;
};

// TOKENS: 1, 8 or 16 rows of x. R: at most so many tiles at a time. SEGMENTS: 0: no norm; 4 or 8: C <= 256·SEGMENTS, WARPS = 8.
// Blocks wait for one another's latencies, so what stands behind wait_for_kernel_before() has been kept short: all that can be is computed before.
template <int TOKENS, int R, int WARPS, int SEGMENTS>
__global__ void __launch_bounds__(WARPS * 32, TOKENS <= 8 && WARPS == 16 ? 2 : 16 / WARPS) matvec_kernel3(Matvec m, MatvecShares shares) {
    constexpr int THREADS = WARPS * 32, HALVES = TOKENS > 8 ? 2 : 1;
    constexpr int DEPTH = matvec_depth<R, WARPS>, GROUP_BYTES = MATVEC_GROUP * R * THREADS * 16;
    constexpr int PAIRS = TOKENS * 4 * R, PAIRS_A_THREAD = (PAIRS + THREADS - 1) / THREADS;  // of neighbouring outputs
    constexpr int SUMS = WARPS * TOKENS * 8 * R;
    extern __shared__ uint4 shared_memory[];
    __shared__ float2 segment[SEGMENTS ? TOKENS : 1][SEGMENTS + 1];
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32, row = lane / 4, pair = lane % 4;
    int slabs = (m.C + 31) / 32, block = blockIdx.x, batch = shares.batch;
    int begin = block * shares.tiles + min(block, shares.longer), end = begin + shares.tiles + (block < shares.longer);
    // Shared memory: the warps' sums, 2 x (WARPS, TOKENS, 8·R) floats; the queue, (groups, MATVEC_GROUP, R, THREADS); x, (slabs, N, 4).
    uint32_t sums = kept(shared_address(shared_memory)), queue = sums + 2 * SUMS * 4 + threadIdx.x * 16;
    uint32_t queue_end = queue + shares.queue_groups * GROUP_BYTES, x_shared = queue_end - threadIdx.x * 16, x_row_bytes = WARPS * m.N * 64;
    let_next_kernel_start();

    // The queue's order: `batch` tiles after another; in these MATVEC_GROUP slabs after another: a group of copies.
    uint32_t put = queue, get = queue;
    int in_tile = warp < slabs ? begin : end, in_slab = warp;
    const floatX* from = m.w + (int64_t)(begin * 8 + row) * m.C + warp * 32 + pair * 8;
    auto copy_group = [&] {
        if (in_tile < end) {
            const floatX* p = from;
#pragma unroll
            for (int r = 0; r < R; r++) {
                bool there = r < batch && in_tile + r < end, inside = (in_tile + r) * 8 + row < m.OC;
#pragma unroll
                for (int u = 0; u < MATVEC_GROUP; u++)
                    if (there && in_slab + u * WARPS < slabs)
                        copy_weights(put + (u * R + r) * THREADS * 16, p + u * WARPS * 32, inside && (in_slab + u * WARPS) * 32 + pair * 8 < m.C);
                p += 8 * m.C;
            }
            put += GROUP_BYTES;
            if (put == queue_end) put = queue;
            in_slab += WARPS * MATVEC_GROUP;
            from += WARPS * MATVEC_GROUP * 32;
            if (in_slab >= slabs) {
                in_slab = warp;
                in_tile += batch;
                from = m.w + (int64_t)(in_tile * 8 + row) * m.C + warp * 32 + pair * 8;
            }
        }
        copy_async_commit();  // also an empty group, so that their number is known
    };

    // What does not depend on the kernel before.
#pragma unroll 1
    for (int i = 0; i < DEPTH; i++) copy_group();
    // The norm: this warp's segment, and this lane's channels of it.
    int s = warp % (SEGMENTS + !SEGMENTS), chunk = s * 32 + lane, s_size = min(256, m.C - s * 256);
    bool in_segment = chunk * 8 < m.C;
    float s_inverse = s_size > 0 ? __frcp_rn((float)s_size) : 0, weight[SEGMENTS + 1];
    uint4 gain = {}, shift = {};
    if constexpr (SEGMENTS > 0) {
        gain = load_parameters(m.norm.gain + chunk * 8, in_segment);
        shift = load_parameters(m.norm.bias + chunk * 8, in_segment);
#pragma unroll
        for (int k = 0; k < SEGMENTS; k++) {
            weight[k] = k < shares.segments ? shares.whole : k == shares.segments ? shares.last : 0;  // segments that are not there: zeros
            asm volatile("" : "+f"(weight[k]));
        }
    }
    // This thread's pairs of outputs of the batch from `tile` on: pair p of all is of row p / (4·R), outputs 2·(p % (4·R)) ...
    uint32_t b[PAIRS_A_THREAD] = {}, residual[PAIRS_A_THREAD] = {};
    auto for_pairs = [&](int tile, auto&& f) {
#pragma unroll
        for (int i = 0; i < PAIRS_A_THREAD; i++) {
            int p = threadIdx.x + i * THREADS, n = p / (4 * R), k = p % (4 * R) * 2, o = tile * 8 + k;
            if (n < m.N && k < min(batch, end - tile) * 8 && o < m.OC) f(i, n, k, o);
        }
    };
    auto load_bias = [&](int tile) {
        if (m.b) for_pairs(tile, [&](int i, int, int, int o) { b[i] = load_parameter_pair(m.b + o); });
    };
    auto load_residual = [&](int tile) {
        if (m.residual) for_pairs(tile, [&](int i, int n, int, int o) { residual[i] = __ldcg((const uint32_t*)(m.residual + (int64_t)n * m.OC + o)); });
    };
    load_bias(begin);

    wait_for_kernel_before();
    if constexpr (SEGMENTS > 0) {
        constexpr int STEP = WARPS / SEGMENTS, AT_ONCE = TOKENS == 1 ? 1 : 4;  // warps a segment; rows a warp reads at once
        uint32_t place = x_shared + (chunk / 4 * m.N * 4 + chunk % 4) * 16;    // of this lane's channels of row 0
        uint4 u[AT_ONCE];
        for (int n0 = warp / SEGMENTS; n0 < m.N; n0 += AT_ONCE * STEP) {
            float sum[AT_ONCE], mean[AT_ONCE];
#pragma unroll
            for (int i = 0; i < AT_ONCE; i++) u[i] = load_activations(m.x + (int64_t)(n0 + i * STEP) * m.C + chunk * 8, n0 + i * STEP < m.N && in_segment);
#pragma unroll
            for (int i = 0; i < AT_ONCE; i++) sum[i] = sum8(u[i], 0);
#pragma unroll
            for (int offset = 16; offset > 0; offset /= 2)
#pragma unroll
                for (int i = 0; i < AT_ONCE; i++) sum[i] += __shfl_xor_sync(0xffffffff, sum[i], offset);
#pragma unroll
            for (int i = 0; i < AT_ONCE; i++) {
                mean[i] = sum[i] * s_inverse;
                sum[i] = in_segment ? sum8<true>(u[i], mean[i]) : 0;
            }
#pragma unroll
            for (int offset = 16; offset > 0; offset /= 2)
#pragma unroll
                for (int i = 0; i < AT_ONCE; i++) sum[i] += __shfl_xor_sync(0xffffffff, sum[i], offset);
#pragma unroll
            for (int i = 0; i < AT_ONCE; i++) {
                int n = n0 + i * STEP;
                if (n >= m.N) break;
                if (lane == 0) segment[n][s] = {mean[i], sum[i]};
                if (TOKENS > 1 && chunk < slabs * 4) store_shared(place + n * 64, u[i]);
            }
        }
        load_residual(begin);
        __syncthreads();
        for (int n = warp / SEGMENTS; n < m.N && chunk < slabs * 4; n += STEP) {
            float mean = 0, variance = 0;
            float2 part[SEGMENTS];
#pragma unroll
            for (int k = 0; k < SEGMENTS; k++) {
                part[k] = segment[n][k];
                mean += weight[k] * part[k].x;
            }
#pragma unroll
            for (int k = 0; k < SEGMENTS; k++) variance += part[k].y * shares.inverse + weight[k] * ((part[k].x - mean) * (part[k].x - mean));
            float rstd = rsqrtf(variance + norm_epsilon<true>);
            if constexpr (TOKENS > 1) u[0] = load_shared(place + n * 64);
            store_shared(place + n * 64, uint4{normalised(u[0].x, mean, rstd, gain.x, shift.x), normalised(u[0].y, mean, rstd, gain.y, shift.y),
                                               normalised(u[0].z, mean, rstd, gain.z, shift.z), normalised(u[0].w, mean, rstd, gain.w, shift.w)});
        }
        __syncthreads();
    } else {
        load_residual(begin);
    }
    // Without a norm each lane reads what it will itself use: shares.x_slabs of its warp's slabs from `slab` on.
    auto load_x = [&](int slab) {
        constexpr int AT_ONCE = MATVEC_GROUP * 2 / HALVES;
        const floatX* x = m.x + (int64_t)row * m.C + pair * 8;
#pragma unroll 1
        for (int i0 = 0; i0 < shares.x_slabs && slab < slabs; i0 += AT_ONCE, slab += AT_ONCE * WARPS) {
            uint4 u[AT_ONCE][HALVES];
#pragma unroll
            for (int i = 0; i < AT_ONCE; i++)
#pragma unroll
                for (int h = 0; h < HALVES; h++) {
                    int c = (slab + i * WARPS) * 32;
                    u[i][h] = load_activations(x + (int64_t)h * 8 * m.C + c, h * 8 + row < m.N && c + pair * 8 < m.C);
                }
#pragma unroll
            for (int i = 0; i < AT_ONCE; i++)
#pragma unroll
                for (int h = 0; h < HALVES; h++)
                    if (i0 + i < shares.x_slabs && h * 8 + row < m.N)
                        store_shared(x_shared + (((i0 + i) * WARPS + warp) * m.N + h * 8) * 64 + lane * 16, u[i][h]);
        }
    };

    int x_end = shares.x_slabs * WARPS;
    uint32_t partial = sums;
    uint32_t own_sums = (warp * TOKENS + row) * 32 * R + pair * 8;
    for (int tile = begin; tile < end; tile += batch) {
        // Two sums, of the first and of the second product of each slab, since a product waits for the one before it.
        float sum[2][R][4] = {};
        int x_slab = SEGMENTS || (tile > begin && x_end >= slabs) ? warp : x_end;  // of those in shared memory
#pragma unroll 1
        for (int slab = warp; slab < slabs; slab += WARPS * MATVEC_GROUP, x_slab += WARPS * MATVEC_GROUP) {
            if (SEGMENTS == 0 && x_slab >= x_end) {
                load_x(slab);
                x_slab = warp;
            }
            copy_async_wait<DEPTH - 1>();
            uint4 w[MATVEC_GROUP][R], x[MATVEC_GROUP][2] = {};
            uint32_t x_at = x_shared + x_slab * m.N * 64 + lane * 16;
#pragma unroll
            for (int u = 0; u < MATVEC_GROUP; u++) {
#pragma unroll
                for (int h = 0; h < HALVES; h++)
                    if (h * 8 + row < m.N) x[u][h] = load_shared(x_at + u * x_row_bytes + h * 512);
#pragma unroll
                for (int r = 0; r < R; r++) w[u][r] = load_shared(get + (u * R + r) * THREADS * 16);
            }
            get += GROUP_BYTES;
            if (get == queue_end) get = queue;
#pragma unroll
            for (int u = 0; u < MATVEC_GROUP; u++) {
                if (slab + u * WARPS >= slabs) break;  // nothing has been copied there
#pragma unroll
                for (int r = 0; r < R; r++) {  // what tiles that are not there add up to is not used
                    mma(sum[0][r], {x[u][0].x, x[u][1].x, x[u][0].y, x[u][1].y}, w[u][r].x, w[u][r].y);
                    mma(sum[1][r], {x[u][0].z, x[u][1].z, x[u][0].w, x[u][1].w}, w[u][r].z, w[u][r].w);
                }
            }
            copy_group();
        }

#pragma unroll
        for (int h = 0; h < HALVES; h++)
#pragma unroll
            for (int r = 0; r < R; r++) {
                float2 y = {sum[0][r][2 * h] + sum[1][r][2 * h], sum[0][r][2 * h + 1] + sum[1][r][2 * h + 1]};
                if (TOKENS >= 8 || row < TOKENS) store_shared(partial + own_sums + h * 256 * R + r * 32, y);
            }
        __syncthreads();
        for_pairs(tile, [&](int i, int n, int k, int o) {
            float2 part[WARPS];
#pragma unroll
            for (int w = 0; w < WARPS; w++) part[w] = load_shared_pair(partial + (w * TOKENS + n) * 32 * R + k * 4);
#pragma unroll
            for (int d = 1; d < WARPS; d *= 2)
#pragma unroll
                for (int w = 0; w < WARPS; w += 2 * d) part[w].x += part[w + d].x, part[w].y += part[w + d].y;
            float2 v = unpack_bf16(b[i]), y = {part[0].x + v.x, part[0].y + v.y};
            if (m.gelu) y.x = gelu(y.x), y.y = gelu(y.y);
            v = unpack_bf16(residual[i]);
            y.x += v.x, y.y += v.y;
            *(uint32_t*)(m.out + (int64_t)n * m.OC + o) = pack_bf16(y.x, y.y);
        });
        partial = partial == sums ? sums + SUMS * 4 : sums;  // the next sums go to the other place: these may still be read
        if (tile + batch < end) load_bias(tile + batch), load_residual(tile + batch);
    }
}

template <int TOKENS, int R, int WARPS, int SEGMENTS>
inline void launch_matvec3(cudaStream_t stream, const Matvec& m, bool overlap) {
    auto kernel = matvec_kernel3<TOKENS, R, WARPS, SEGMENTS>;
    int tiles = (int)ceil_div(m.OC, 8), blocks = std::min(tiles, device_properties().multiProcessorCount), slabs = (int)ceil_div(m.C, 32);
    int most = (int)ceil_div(tiles, blocks), batches = (int)ceil_div(most, R), slabs_a_warp = (int)ceil_div(slabs, WARPS);
    int groups = (int)ceil_div(slabs_a_warp, MATVEC_GROUP), x_groups = MATVEC_X_BYTES / (MATVEC_GROUP * WARPS * m.N * 64);
    MatvecShares shares = {};
    shares.tiles = tiles / blocks;
    shares.longer = tiles % blocks;
    shares.batch = (int)ceil_div(most, batches);
    shares.queue_groups = std::min(matvec_depth<R, WARPS>, groups * batches);
    shares.x_slabs = MATVEC_GROUP * (SEGMENTS ? groups : std::min(groups, x_groups));
    shares.segments = m.C / 256;
    shares.whole = 256.f / m.C;
    shares.last = (float)(m.C % 256) / m.C;
    shares.inverse = 1.f / m.C;
    size_t shared = 2 * WARPS * TOKENS * 8 * R * sizeof(float) + shares.queue_groups * MATVEC_GROUP * R * WARPS * 512 + shares.x_slabs * WARPS * m.N * 64 +
                    TOKENS * 64 + 512;
    launch_overlapping(stream, overlap, 1, kernel, blocks, WARPS * 32, shared, m, shares);
}
template <int TOKENS, int R>
inline void launch_matvec3(cudaStream_t stream, const Matvec& m, bool overlap) {
    bool one = m.OC <= 8 * device_properties().multiProcessorCount;  // tile a block
    if (m.norm.gain)
        m.C <= 1024 ? launch_matvec3<TOKENS, R, 8, 4>(stream, m, overlap) : launch_matvec3<TOKENS, R, 8, 8>(stream, m, overlap);
    else if (m.C <= 2048)
        one ? launch_matvec3<TOKENS, 1, 8, 0>(stream, m, overlap) : launch_matvec3<TOKENS, 2, 8, 0>(stream, m, overlap);
    else
        one ? launch_matvec3<TOKENS, 1, 16, 0>(stream, m, overlap) : launch_matvec3<TOKENS, 2, 16, 0>(stream, m, overlap);
}
inline bool takes_matvec3(const Matvec& m) {
    auto aligned4 = [](const void* p) { return (uintptr_t)p % 4 == 0; };
    return m.C % 8 == 0 && m.OC % 2 == 0 && (!m.norm.gain || m.C <= 2048) && aligned16(m.x) && aligned16(m.w) && aligned16(m.norm.gain) &&
           aligned16(m.norm.bias) && aligned4(m.out) && aligned4(m.b) && aligned4(m.residual);
}
inline void matvec3(cudaStream_t stream, const Matvec& m, bool overlap) {
    if (m.N == 1)
        launch_matvec3<1, 3>(stream, m, overlap);
    else if (m.N <= 8)
        launch_matvec3<8, 3>(stream, m, overlap);
    else
        launch_matvec3<16, 3>(stream, m, overlap);
}

#endif

// --------------------------------------------------------------------------------------------------------------------------------------------------
// The function

// Any sizes, N <= FEW_ROWS. out may be residual, but not x. `overlap`: the launch before this one on the stream is a kernel, and neither it nor any kernel
// that it overlaps itself has written the parameters (a chain begins with a kernel that is launched without it, behind the last change of a parameter).
inline void linear_few(cudaStream_t stream, floatX* out, const floatX* x, const NormParameters* norm, const floatX* w, const floatX* b, int64_t N, int64_t C,
                       int64_t OC, bool gelu, const floatX* residual, bool overlap) {
    if (N == 0 || OC == 0) return;
    assert(N <= FEW_ROWS && C <= 1 << 24 && OC <= 1 << 24);
    Matvec m = {out, x, norm ? *norm : NormParameters{nullptr, nullptr}, w, b, residual, (int)N, (int)C, (int)OC, gelu};
#ifndef GPU_FLOAT32
    if (takes_matvec3(m)) {
        matvec3(stream, m, overlap);
        return;
    }
#endif
    (void)overlap;
    constexpr int W = Packed<floatX>::size;
    bool packed = C % W == 0 && aligned16(x) && aligned16(w) && aligned16(m.norm.gain) && aligned16(m.norm.bias);
    packed ? launch_matvec2<W>(stream, m) : launch_matvec2<1>(stream, m);
}

}  // namespace gpu
