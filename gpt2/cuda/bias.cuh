// Sums over the rows of a matrix: the bias gradient, and what other kernels sum by columns on their way (layernorm.cuh).
//
//     db (OC) += Σ_n dout_n        dout (N,OC)
//
// A column's rows are too many for one block, and atomics would add in any order. So each block adds up some of the rows and leaves a *partial row* in the
// workspace; when all blocks have (the grid waits for itself: a cooperative launch, as many blocks as the GPU holds at once), they share out the columns and
// add the partial rows up, always in one order. Where columns are few, that end is a tenth of the time: then, on Hopper, the blocks of a cluster share out the
// rows of its columns, and their sums meet in shared memory. Earlier versions and times: dev/cuda/bias.cu.
#pragma once

#include <cooperative_groups.h>

#include <algorithm>
#include <type_traits>

#include "common.cuh"
#include "hopper.cuh"
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
    constexpr int LOADS = 4;  // on their way at a time
    const int strands = threads / WIDTH;
    for (int first = blockIdx.x * WIDTH; first < columns; first += gridDim.x * WIDTH) {
        int column = first + thread % WIDTH, which = column / C;
        float* to = which == 0 ? sums.first : which == 1 ? sums.second : sums.third;
        bool adds = thread < WIDTH && column < columns && to;
        float sum = 0, before = adds ? to[column - which * C] : 0;
        if (column < columns) {
            for (int row = thread / WIDTH; row < rows; row += LOADS * strands) {
                float x[LOADS];
#pragma unroll
                for (int i = 0; i < LOADS; i++) x[i] = row + i * strands < rows ? __ldcg(partial + (int64_t)(row + i * strands) * columns + column) : 0;
#pragma unroll
                for (int i = 0; i < LOADS; i++) sum += x[i];
            }
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

// The sum of rows n, n − step, ... down to row 0 of W columns, `at` being row n's: from the last row back, since what the kernel before wrote last is still in
// the L2 cache; LOADS of them on their way at once.
template <int W>
__device__ inline Numbers<W> sum_of_rows(const floatX* at, int64_t n, int64_t step, int64_t stride) {
    constexpr int LOADS = 8;
    using Vector = std::conditional_t<W == 1, floatX, int4>;
    Numbers<W> sum;
    for (; n >= 0; n -= LOADS * step) {
        Vector x[LOADS];
#pragma unroll
        for (int i = 0; i < LOADS; i++, at -= step * stride) x[i] = n >= i * step ? *(const Vector*)at : Vector{};  // zeros where no row is left
#pragma unroll
        for (int i = 0; i < LOADS; i++)
#pragma unroll
            for (int k = 0; k < W; k++) sum[k] += to_float(((const floatX*)&x[i])[k]);
    }
    return sum;
}

// Thread j of a block has the vector j % vectors of a row, W columns, and is one of blockDim.x/vectors strands; all strands of all pieces take rows in turn.
// Where a block is too small for a row, rows are cut into tiles of `vectors`. Work is (piece, tile). One block fills a multiprocessor.
constexpr int BIAS_THREADS = 768;
template <int W>
__global__ void __launch_bounds__(BIAS_THREADS, 1)
    bias_backward_kernel4(float* db, float* partial, const floatX* dout, int64_t N, int64_t OC, int64_t dout_stride, int vectors, int tiles, int pieces) {
    __shared__ float shared[BIAS_THREADS * W];  // [strand][number in the vector][vector]
    int vector = threadIdx.x % vectors, strand = threadIdx.x / vectors, strands = blockDim.x / vectors;
    int64_t step = (int64_t)pieces * strands;
    for (int64_t work = blockIdx.x; work < (int64_t)tiles * pieces; work += gridDim.x) {
        int64_t first_column = work % tiles * vectors * W, column = first_column + vector * W, piece = work / tiles;
        Numbers<W> sum;
        if (column < OC && strand < strands) {
            int64_t n = N - 1 - (piece * strands + strand);
            sum = sum_of_rows<W>(dout + n * dout_stride + column, n, step, dout_stride);
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

// The blocks of a cluster have a tile of 16 vectors of columns and share out the rows, as strands of 16 threads do in each block. The first block adds up.
constexpr int BIAS_CLUSTER = 16, BIAS_VECTORS = 16;
template <int W>
__global__ void __launch_bounds__(BIAS_THREADS, 1) bias_backward_kernel5(float* db, const floatX* dout, int64_t N, int64_t OC, int64_t dout_stride) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
    constexpr int STRANDS = BIAS_THREADS / BIAS_VECTORS, COLUMNS = BIAS_VECTORS * W, GROUPS = BIAS_THREADS / COLUMNS;
    __shared__ float shared[STRANDS][W][BIAS_VECTORS], groups[GROUPS][COLUMNS], parts[BIAS_CLUSTER][COLUMNS];
    int rank = cluster_rank(), vector = threadIdx.x % BIAS_VECTORS, strand = threadIdx.x / BIAS_VECTORS;
    int64_t first_column = (int64_t)(blockIdx.x / BIAS_CLUSTER) * COLUMNS, column = first_column + vector * W;
    asm volatile("barrier.cluster.arrive.relaxed;");  // this block is there: it has shared memory
    Numbers<W> sum;
    if (column < OC) {
        int64_t n = N - 1 - (rank * STRANDS + strand);
        sum = sum_of_rows<W>(dout + n * dout_stride + column, n, BIAS_CLUSTER * STRANDS, dout_stride);
    }
    for (int k = 0; k < W; k++) shared[strand][k][vector] = sum[k];

    // The strands in GROUPS, these, and what the blocks have.
    int j = threadIdx.x % COLUMNS, group = threadIdx.x / COLUMNS;
    bool adds = rank == 0 && group == 0 && first_column + j < OC;
    float before = adds ? db[first_column + j] : 0, total = 0;
    __syncthreads();
#pragma unroll
    for (int s = group; s < STRANDS; s += GROUPS) total += shared[s][j % W][j / W];
    groups[group][j] = total;
    __syncthreads();
    asm volatile("barrier.cluster.wait;" ::: "memory");
    if (group == 0) {
        total = 0;
#pragma unroll
        for (int g = 0; g < GROUPS; g++) total += groups[g][j];
        asm volatile(
            "{\n"
            ".reg .b32 first_block;\n"
            "mapa.shared::cluster.u32 first_block, %0, 0;\n"
            "st.shared::cluster.f32 [first_block], %1;\n"
            "}" ::"r"(shared_address(&parts[rank][j])),
            "f"(total)
            : "memory");
    }
    cluster_barrier();
    if (!adds) return;
    total = 0;
#pragma unroll
    for (int r = 0; r < BIAS_CLUSTER; r++) total += parts[r][j];
    db[first_column + j] = before + total;
#endif
}

// The launch of kernel 5 over `tiles`.
struct BiasClusters {
    cudaLaunchConfig_t config = {};
    cudaLaunchAttribute cluster = {};
    BiasClusters(cudaStream_t stream, int64_t tiles) {
        config.gridDim = dim3((unsigned)(tiles * BIAS_CLUSTER));
        config.blockDim = dim3(BIAS_THREADS);
        config.stream = stream;
        cluster.id = cudaLaunchAttributeClusterDimension;
        cluster.val.clusterDim.x = BIAS_CLUSTER;
        cluster.val.clusterDim.y = cluster.val.clusterDim.z = 1;
        config.attrs = &cluster;
        config.numAttrs = 1;
    }
    BiasClusters(const BiasClusters&) = delete;
};
// How many clusters the GPU holds at once: one in each group of multiprocessors that has 16. Clusters of more than 8 have to be asked for.
template <int W>
inline int64_t bias_clusters() {
    static const int clusters = [] {
        if (!hopper_code()) return 0;
        int n = 0;
        CUDA_CHECK(cudaFuncSetAttribute(bias_backward_kernel5<W>, cudaFuncAttributeNonPortableClusterSizeAllowed, 1));
        BiasClusters launch(nullptr, 1);
        CUDA_CHECK(cudaOccupancyMaxActiveClusters(&n, bias_backward_kernel5<W>, &launch.config));
        return n;
    }();
    return clusters;
}
// Whether all tiles of OC columns are in work at once: otherwise a last wave would leave most of the GPU idle.
template <int W>
inline bool bias_takes_clusters(int64_t OC) {
    return ceil_div(OC / W, BIAS_VECTORS) <= bias_clusters<W>();
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
    if (vectors && bias_takes_clusters<W>(OC)) {
        BiasClusters launch(stream, ceil_div(OC / W, BIAS_VECTORS));
        CUDA_CHECK(cudaLaunchKernelEx(&launch.config, bias_backward_kernel5<W>, db, dout, N, OC, dout_stride));
    } else {
        (vectors ? bias_backward_launch<W> : bias_backward_launch<1>)(stream, db, dout, N, OC, dout_stride);
    }
}

}  // namespace gpu
