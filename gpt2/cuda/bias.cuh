// Sums over the rows of a matrix: the bias gradient, and what other kernels sum by columns on their way (layernorm.cuh).
//
//     db (OC) += Σ_n dout_n        dout (N,OC)
//
// A column's rows are too many for one block, and atomics would add in any order. So each block adds up some of the rows and leaves a *partial row* in the
// workspace; when all blocks have (the grid waits for itself: a cooperative launch, as many blocks as the GPU holds at once), they share out the columns and
// add the partial rows up, always in one order. Earlier versions and times: dev/cuda/bias.cu.
#pragma once

#include <cooperative_groups.h>

#include <algorithm>
#include <type_traits>

#include "common.cuh"
#include "numbers.cuh"

namespace gpu {

// Where the sums of the partial rows' first C columns are added, those of the next C, and of the C after these; null: nowhere.
struct ColumnSums {
    float *first, *second = nullptr, *third = nullptr;
};

// partial (rows, columns) is added to `sums`; columns = C times how many there are. A block takes WIDTH neighbouring columns at a time (32 bytes is the least
// that memory moves); its threads stand in rows of WIDTH.
template <int WIDTH>
__device__ inline void add_partial_columns(const ColumnSums& sums, const float* partial, int rows, int columns, int C) {
    __shared__ float shared[32][WIDTH];
    int threads = blockDim.x * blockDim.y, thread = threadIdx.y * blockDim.x + threadIdx.x, lane = thread % 32, warps = threads / 32;
    for (int first = blockIdx.x * WIDTH; first < columns; first += gridDim.x * WIDTH) {
        int column = first + thread % WIDTH, which = column / C;
        float* to = which == 0 ? sums.first : which == 1 ? sums.second : sums.third;
        bool adds = thread < WIDTH && column < columns && to;
        float sum = 0, before = adds ? to[column - which * C] : 0;
        if (column < columns) {
#pragma unroll 8
            for (int row = thread / WIDTH; row < rows; row += threads / WIDTH) sum += __ldcg(partial + (int64_t)row * columns + column);
        }
        // 32/WIDTH lanes of each warp hold the same column.
#pragma unroll
        for (int offset = WIDTH; offset < 32; offset *= 2) sum += __shfl_xor_sync(0xffffffff, sum, offset);
        if (lane < WIDTH) shared[thread / 32][lane] = sum;
        __syncthreads();
        if (adds) {
            sum = 0;
#pragma unroll 8
            for (int warp = 0; warp < warps; warp++) sum += shared[warp][thread];
            to[column - which * C] = before + sum;
        }
        __syncthreads();
    }
}
// Called by all threads of a grid of whole warps, at its end.
__device__ inline void add_partial_rows(const ColumnSums& sums, const float* partial, int rows, int columns, int C) {
    cooperative_groups::this_grid().sync();
    if (columns > 8 * gridDim.x)
        add_partial_columns<32>(sums, partial, rows, columns, C);
    else
        add_partial_columns<8>(sums, partial, rows, columns, C);
}

// The launch of resident blocks together.
template <class... Parameters, class... Arguments>
inline void launch_together(void (*kernel)(Parameters...), int64_t blocks, dim3 threads, size_t shared_bytes, cudaStream_t stream, Arguments... arguments) {
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3((unsigned)blocks);
    config.blockDim = threads;
    config.dynamicSmemBytes = shared_bytes;
    config.stream = stream;
    cudaLaunchAttribute together = {};
    together.id = cudaLaunchAttributeCooperative;
    together.val.cooperative = 1;
    config.attrs = &together;
    config.numAttrs = 1;
    CUDA_CHECK(cudaLaunchKernelEx(&config, kernel, (Parameters)arguments...));
}

// Thread j of a block has the vector j % vectors of a row, W columns, and is one of blockDim.x/vectors strands; all strands of all pieces take rows in turn,
// from the last row back (what the kernel before wrote last is still in the L2 cache), LOADS of them at once. Where a block is too small for a row, rows are
// cut into tiles of `vectors`. Work is (piece, tile). One block fills a multiprocessor.
constexpr int BIAS_THREADS = 768;
template <int W>
__global__ void __launch_bounds__(BIAS_THREADS, 1)
    bias_backward_kernel4(float* db, float* partial, const floatX* dout, int64_t N, int64_t OC, int64_t dout_stride, int vectors, int tiles, int pieces) {
    constexpr int LOADS = 8;
    using Vector = std::conditional_t<W == 1, floatX, int4>;
    __shared__ float shared[BIAS_THREADS * W];  // [strand][number in the vector][vector]
    int vector = threadIdx.x % vectors, strand = threadIdx.x / vectors, strands = blockDim.x / vectors;
    int64_t step = (int64_t)pieces * strands;
    for (int64_t work = blockIdx.x; work < (int64_t)tiles * pieces; work += gridDim.x) {
        int64_t first_column = work % tiles * vectors * W, column = first_column + vector * W, piece = work / tiles;
        Numbers<W> sum;
        if (column < OC && strand < strands) {
            int64_t n = N - 1 - (piece * strands + strand);
            const floatX* at = dout + n * dout_stride + column;
            for (; n >= 0; n -= LOADS * step) {
                Vector x[LOADS];
#pragma unroll
                for (int i = 0; i < LOADS; i++, at -= step * dout_stride) x[i] = n >= i * step ? *(const Vector*)at : Vector{};  // zeros where no row is left
#pragma unroll
                for (int i = 0; i < LOADS; i++)
#pragma unroll
                    for (int k = 0; k < W; k++) sum[k] += to_float(((const floatX*)&x[i])[k]);
            }
        }
        if (strand < strands)
            for (int k = 0; k < W; k++) shared[(strand * W + k) * vectors + vector] = sum[k];
        __syncthreads();
        for (int j = threadIdx.x; j < vectors * W; j += blockDim.x) {
            if (first_column + j >= OC) continue;
            float total = 0;
#pragma unroll 8
            for (int s = 0; s < strands; s++) total += shared[(s * W + j % W) * vectors + j / W];
            partial[piece * OC + first_column + j] = total;
        }
        __syncthreads();
    }
    add_partial_rows({db}, partial, pieces, (int)OC, (int)OC);
}

template <int W>
inline void bias_backward_launch(cudaStream_t stream, float* db, const floatX* dout, int64_t N, int64_t OC, int64_t dout_stride) {
    int64_t row = OC / W, tiles = ceil_div(row, BIAS_THREADS), vectors = ceil_div(row, tiles), strands = BIAS_THREADS / vectors;
    int threads = (int)round_up(vectors * strands, 32);
    int64_t resident = resident_blocks(bias_backward_kernel4<W>, threads, 0), pieces = std::max<int64_t>(1, std::min(resident / tiles, ceil_div(N, strands)));
    float* partial = Scratch{workspace(), WORKSPACE_BYTES}.take<float>(pieces * OC);
    launch_together(bias_backward_kernel4<W>, std::min(resident, tiles * pieces), threads, 0, stream, db, partial, dout, N, OC, dout_stride, vectors, tiles,
                    pieces);
}
// db (OC) += Σ_n dout_n; rows of dout (N,OC) are dout_stride apart (0: OC). cpu::bias_backward.
inline void bias_backward(cudaStream_t stream, float* db, const floatX* dout, int64_t N, int64_t OC, int64_t dout_stride = 0) {
    constexpr int W = Packed<floatX>::size;
    if (N == 0 || OC == 0) return;
    if (dout_stride == 0) dout_stride = OC;
    bool vectors = OC % W == 0 && dout_stride % W == 0 && aligned16(dout);
    (vectors ? bias_backward_launch<W> : bias_backward_launch<1>)(stream, db, dout, N, OC, dout_stride);
}

}  // namespace gpu
