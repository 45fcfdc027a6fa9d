// The gated norm behind Lightning attention's recurrence (attention.h, section 5).
//
//     forward    y = o·r⊙gain, r = 1/√(mean(o²) + 1e-6)      z = y⊙σ, σ = sigmoid(gate)
//     backward   t = dz⊙σ⊙gain      d_o = r·t − o·(r³/C)·Σ_c t⊙o      dgate = dz⊙y⊙σ⊙(1−σ)      dgain += Σ_n dz⊙σ⊙o·r
//
// All (N,C), gain and dgain (C), r (N) float32. Bound by memory: forward reads two arrays and writes one, backward reads three and writes two.
//
//   kernels 2   a warp a row, which is read again for each use: any C; by 16-byte accesses (W numbers) where these are possible
//   kernels 3   rows of 16-byte vectors that stay in registers
#pragma once

#include <algorithm>

#include "common.cuh"
#include "gelu.cuh"
#include "layernorm.cuh"
#include "numbers.cuh"

namespace gpu {

template <int W>
__global__ void __launch_bounds__(256)
    lightning_gate_forward_kernel2(floatX* z, float* rstd, const floatX* o, const floatX* gate, const floatX* gain, int64_t N, int C) {
    int lane = threadIdx.x % 32;
    int64_t n = ((int64_t)blockIdx.x * blockDim.x + threadIdx.x) / 32;
    if (n >= N) return;
    float squares = 0;
    for (int c = lane * W; c < C; c += 32 * W) {
        Numbers<W> x = load_numbers<W>(o + n * C + c);
        for (int k = 0; k < W; k++) squares += x[k] * x[k];
    }
    float r = rsqrtf(warp_sum(squares) / C + norm_epsilon<false>);
    for (int c = lane * W; c < C; c += 32 * W) {
        Numbers<W> x = load_numbers<W>(o + n * C + c), y = load_numbers<W>(gate + n * C + c), weight = load_numbers<W>(gain + c);
        for (int k = 0; k < W; k++) x[k] *= r * weight[k] * sigmoid(y[k]);
        store_numbers<W>(z + n * C + c, x);
    }
    if (lane == 0 && rstd) rstd[n] = r;
}

// A warp a row of at most 32·VECTORS vectors.
template <int VECTORS>
__global__ void __launch_bounds__(256)
    lightning_gate_forward_kernel3(floatX* z, float* rstd, const floatX* o, const floatX* gate, const floatX* gain, int64_t N, int C) {
    constexpr int W = Packed<floatX>::size;
    int lane = threadIdx.x % 32;
    int64_t n = ((int64_t)blockIdx.x * blockDim.x + threadIdx.x) / 32;
    if (n >= N) return;
    Packed<floatX> x[VECTORS], y[VECTORS];
#pragma unroll
    for (int v = 0; v < VECTORS; v++) {
        int c = (v * 32 + lane) * W;
        x[v] = load_packed_if(c < C, o + n * C + c);
        y[v] = load_packed_if(c < C, gate + n * C + c);
    }
    float squares = 0;  // what is behind the row's end is zero
#pragma unroll
    for (int v = 0; v < VECTORS; v++)
        for (int k = 0; k < W; k++) squares += x[v][k] * x[v][k];
    float r = rsqrtf(warp_sum(squares) / C + norm_epsilon<false>);
#pragma unroll
    for (int v = 0; v < VECTORS; v++) {
        int c = (v * 32 + lane) * W;
        if (c >= C) continue;
        Packed<floatX> weight = load_packed(gain + c), out;
        for (int k = 0; k < W; k++) out.set(k, x[v][k] * r * weight[k] * sigmoid(y[v][k]));
        store_packed(z + n * C + c, out);
    }
    if (lane == 0 && rstd) rstd[n] = r;
}

// z (N,C), rstd (N) or null, from o, gate (N,C), gain (C). z may be o. cpu::lightning_gate_forward.
inline void lightning_gate_forward(cudaStream_t stream, floatX* z, float* rstd, const floatX* o, const floatX* gate, const floatX* gain, int64_t N, int64_t C,
                                   int version = 3) {
    constexpr int W = Packed<floatX>::size;
    if (N == 0) return;
    bool aligned = C % W == 0 && aligned16(z) && aligned16(o) && aligned16(gate) && aligned16(gain);
    int64_t vectors = ceil_div(C, 32 * W);
    auto kernel = !aligned                     ? lightning_gate_forward_kernel2<1>
                  : version < 3 || vectors > 8 ? lightning_gate_forward_kernel2<W>
                  : vectors > 4                ? lightning_gate_forward_kernel3<8>
                                               : lightning_gate_forward_kernel3<4>;
    kernel<<<(unsigned)ceil_div(N, 8), 256, 0, stream>>>(z, rstd, o, gate, gain, N, (int)C);
    LAUNCH_CHECK();
}

// What a number of the row contributes.
struct LightningGateGradient {
    float t, dgate, dgain;
    __device__ LightningGateGradient(float dz, float o, float gate, float gain, float r) {
        float sigma = sigmoid(gate), dy = dz * sigma, x = o * r;
        t = dy * gain;
        dgain = dy * x;
        dgate = t * x * (1 - sigma);
    }
};

// Rows: d_o may be dz.
template <int W>
__global__ void __launch_bounds__(256) lightning_gate_backward_kernel2(floatX* d_o, floatX* dgate, const floatX* dz, const float* rstd, const floatX* o,
                                                                       const floatX* gate, const floatX* gain, int64_t N, int C) {
    int lane = threadIdx.x % 32;
    int64_t n = ((int64_t)blockIdx.x * blockDim.x + threadIdx.x) / 32;
    if (n >= N) return;
    float r = rstd[n], sum = 0;
    for (int pass = 0; pass < 2; pass++) {
        for (int c = lane * W; c < C; c += 32 * W) {
            Numbers<W> g = load_numbers<W>(dz + n * C + c), x = load_numbers<W>(o + n * C + c), y = load_numbers<W>(gate + n * C + c);
            Numbers<W> weight = load_numbers<W>(gain + c);
            for (int k = 0; k < W; k++) {
                LightningGateGradient d(g[k], x[k], y[k], weight[k], r);
                if (pass == 0) sum += d.t * x[k];
                g[k] = r * d.t - x[k] * sum;
                y[k] = d.dgate;
            }
            if (pass == 0) continue;
            store_numbers<W>(d_o + n * C + c, g);
            store_numbers<W>(dgate + n * C + c, y);
        }
        if (pass == 0) sum = warp_sum(sum) * (r * r * r / C);
    }
}
// Columns: a thread takes W columns of one piece of `rows` rows; blockIdx.y is the piece and its partial row.
template <int W>
__global__ void __launch_bounds__(128)
    lightning_gain_kernel2(float* partial, const floatX* dz, const float* rstd, const floatX* o, const floatX* gate, int64_t N, int C, int64_t rows) {
    int c = (blockIdx.x * blockDim.x + threadIdx.x) * W;
    if (c >= C) return;
    int64_t begin = blockIdx.y * rows, end = min(begin + rows, N);
    Numbers<W> dgain;
    for (int64_t n = begin; n < end; n++) {
        Numbers<W> g = load_numbers<W>(dz + n * C + c), x = load_numbers<W>(o + n * C + c), y = load_numbers<W>(gate + n * C + c);
        for (int k = 0; k < W; k++) dgain[k] += LightningGateGradient(g[k], x[k], y[k], 1, rstd[n]).dgain;
    }
    store_numbers<W>(partial + (int64_t)blockIdx.y * C + c, dgain);
}

// Both in one pass: a thread owns one vector of columns for all rows of its block, so that gain and its part of dgain stay in
// registers. blockDim.x threads (whole warps) make a row, blockDim.y such groups a block; each takes ROWS rows at a time and writes one partial row at the end.
constexpr int LIGHTNING_GATE_THREADS = 512, LIGHTNING_GATE_ROWS = 2;
__global__ void __launch_bounds__(LIGHTNING_GATE_THREADS)
    lightning_gate_backward_kernel3(floatX* d_o, floatX* dgate, float* partial, const floatX* dz, const float* rstd, const floatX* o, const floatX* gate,
                                    const floatX* gain, int64_t N, int C) {
    constexpr int W = Packed<floatX>::size, ROWS = LIGHTNING_GATE_ROWS;
    __shared__ float shared[2][LIGHTNING_GATE_THREADS / 32][ROWS];  // [round % 2][warp][row]: Σ t⊙o
    int lane = threadIdx.x % 32, warps = blockDim.x / 32, first_warp = threadIdx.y * warps, c = threadIdx.x * W;
    bool mine = c < C;
    int64_t group = (int64_t)blockIdx.x * blockDim.y + threadIdx.y, groups = (int64_t)gridDim.x * blockDim.y;
    Packed<floatX> weight = load_packed_if(mine, gain + c);
    Numbers<W> dgain;

    // All groups of a block make the same number of rounds, because of the barrier: the condition looks at the block's first group.
    int round = 0;
    for (int64_t chunk = group; (chunk - threadIdx.y) * ROWS < N; chunk += groups, round ^= 1) {
        Packed<floatX> g[ROWS], x[ROWS], y[ROWS];
        float r[ROWS], sum[ROWS] = {};
#pragma unroll
        for (int i = 0; i < ROWS; i++) {
            int64_t n = chunk * ROWS + i;
            bool there = mine && n < N;
            g[i] = load_packed_if(there, dz + n * C + c);
            x[i] = load_packed_if(there, o + n * C + c);
            y[i] = load_packed_if(there, gate + n * C + c);
            r[i] = n < N ? rstd[n] : 0;
        }
        float t[ROWS][W];
#pragma unroll
        for (int i = 0; i < ROWS; i++) {
            int64_t n = chunk * ROWS + i;
            Packed<floatX> out;
#pragma unroll
            for (int k = 0; k < W; k++) {
                LightningGateGradient d(g[i][k], x[i][k], y[i][k], weight[k], r[i]);
                t[i][k] = d.t;
                sum[i] += d.t * x[i][k];  // rows and columns that are not there are zeros and add nothing
                dgain[k] += d.dgain;
                out.set(k, d.dgate);
            }
            if (mine && n < N) store_packed(dgate + n * C + c, out);
            sum[i] = warp_sum(sum[i]);
        }
        if (warps > 1) {
            // Two buffers in turn: who writes one of them again has passed the barrier of the round between, so all have read it.
            if (lane == 0)
                for (int i = 0; i < ROWS; i++) shared[round][first_warp + threadIdx.x / 32][i] = sum[i];
            __syncthreads();
            for (int i = 0; i < ROWS; i++) {
                sum[i] = 0;
                for (int k = 0; k < warps; k++) sum[i] += shared[round][first_warp + k][i];
            }
        }
#pragma unroll
        for (int i = 0; i < ROWS; i++) {
            int64_t n = chunk * ROWS + i;
            if (!mine || n >= N) continue;
            float f = sum[i] * (r[i] * r[i] * r[i] / C);
            Packed<floatX> out;
#pragma unroll
            for (int k = 0; k < W; k++) out.set(k, r[i] * t[i][k] - x[i][k] * f);
            store_packed(d_o + n * C + c, out);
        }
    }
    if (mine) store_numbers<W>(partial + group * C + c, dgain);
}

// d_o, dgate (N,C), dgain (C) += ; from dz, o, gate (N,C), rstd (N) as the forward pass left it, gain (C). d_o may be dz. cpu::lightning_gate_backward.
inline void lightning_gate_backward(cudaStream_t stream, floatX* d_o, floatX* dgate, float* dgain, const floatX* dz, const float* rstd, const floatX* o,
                                    const floatX* gate, const floatX* gain, int64_t N, int64_t C, int version = 3) {
    constexpr int W = Packed<floatX>::size;
    if (N == 0) return;
    bool aligned = C % W == 0 && aligned16(d_o) && aligned16(dgate) && aligned16(dz) && aligned16(o) && aligned16(gate) && aligned16(gain);
    float* partial = (float*)workspace();
    int64_t most = norm_partial_rows<false>(C), partial_rows;  // that fit the workspace
    if (version >= 3 && aligned && C <= LIGHTNING_GATE_THREADS * W) {
        int threads = (int)round_up(C / W, 32), groups = std::max(1, 256 / threads), resident;
        CUDA_CHECK(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&resident, lightning_gate_backward_kernel3, threads * groups, 0));
        int64_t blocks =
            std::min<int64_t>({ceil_div(N, LIGHTNING_GATE_ROWS * groups), (int64_t)resident * device_properties().multiProcessorCount, most / groups});
        partial_rows = blocks * groups;
        lightning_gate_backward_kernel3<<<(unsigned)blocks, dim3(threads, groups), 0, stream>>>(d_o, dgate, partial, dz, rstd, o, gate, gain, N, (int)C);
        LAUNCH_CHECK();
    } else {
        // First the columns, since d_o may overwrite dz.
        int64_t rows = ceil_div(N, std::min<int64_t>({most, 512, ceil_div(N, 16)}));
        partial_rows = ceil_div(N, rows);
        auto columns = aligned ? lightning_gain_kernel2<W> : lightning_gain_kernel2<1>;
        auto kernel = aligned ? lightning_gate_backward_kernel2<W> : lightning_gate_backward_kernel2<1>;
        columns<<<dim3((unsigned)ceil_div(C, 128 * (aligned ? W : 1)), (unsigned)partial_rows), 128, 0, stream>>>(partial, dz, rstd, o, gate, N, (int)C, rows);
        LAUNCH_CHECK();
        kernel<<<(unsigned)ceil_div(N, 8), 256, 0, stream>>>(d_o, dgate, dz, rstd, o, gate, gain, N, (int)C);
        LAUNCH_CHECK();
    }
    norm_sum<false>(stream, dgain, nullptr, partial_rows, C);
}

}  // namespace gpu
