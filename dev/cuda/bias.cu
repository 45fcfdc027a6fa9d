// The bias gradient: db (OC) += Σ_n dout_n, dout (N,OC).
//
// A call reads dout once and does one addition a number: nothing but memory. N = 65536 in bf16: OC = 768 100 MB, 2304 302 MB, 3072 403 MB, which at the
// 3.0 TB/s of an H100 take 34, 101 and 134 µs. Inside dW's product, which reads dout anyway, it should cost nothing; but cuBLASLt's epilogue for it (BGRADB)
// costs 55, 158 and 174 µs, and the one behind GELU's gradient (DGELU_BGRAD) more than a millisecond.
//
//   1  a thread a column, down all rows. Neighbouring threads read neighbouring columns, so nothing that is read is wasted; but 768 columns are 768 threads
//      on a machine that wants 100 000, each waiting for one row after the other
//   2  the rows cut into pieces too: 512 blocks of 8 warps leave partial sums in the workspace, a second small kernel adds those up. No atomics: the pieces
//      depend on N and OC alone and are added in one order. Expected: close to the memory's rate, less what 64 bytes for each warp's load cost
//   3  16 bytes a load instead of 2: an eighth of the load instructions, 512 neighbouring bytes of a row for a warp, and 4 rows in flight. Expected: all of
//      the memory's rate
//   4  one launch: as many blocks as the GPU holds at once, which wait for each other and then add up the partial sums together; equal shares of the rows,
//      eight of them in flight. At 768 columns version 3 is 18 µs over the memory's time: two launches, a second stage whose threads add 170 numbers one after
//      the other, and blocks that end at different times. Expected: 6 µs over it, for launch and the grid's barrier. In use (gpt2/cuda/bias.cuh) where the
//      next one is not
//   5  at 768 columns reading alone takes 36.5 µs, of which 3.3 are the launch's, and the rest of version 4's 40: a partial row to memory, the grid's barrier,
//      the partial rows back, each a way to the L2 cache and back. Hopper's clusters of 16 blocks have their sums meet in shared memory, if all rows of some
//      columns belong to one: six clusters of 128 columns, 256 bytes of a row, which memory reads as well as whole rows. (128 bytes cost 2.5 µs, 96 bytes 11.)
//      With more columns than the clusters that run at a time have, version 4 is faster. Expected: 38 µs. In use up to 1024 columns or so
#include "ladder.h"

#include "../../gpt2/cuda/bias.cuh"

using namespace gpu;

__global__ void bias_backward_kernel1(float* db, const floatX* dout, int64_t N, int64_t OC) {
    int64_t column = (int64_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (column >= OC) return;
    float sum = 0;
    for (int64_t n = 0; n < N; n++) sum += to_float(dout[n * OC + column]);
    db[column] += sum;
}

// Version 2 with W = 1, 3 with as many as 16 bytes hold.
//   1. a block takes 32·W columns and a piece of the rows. A warp reads a row's 32·W neighbours in one instruction, the 8 warps take every 8th row;
//      their sums are added in the order of the warps: partial (pieces, OC).
//   2. partial sums are added to db in the order of the pieces, 8 interleaved strands of them first.
template <int W>
__global__ void __launch_bounds__(256)
    bias_backward_kernel3(float* partial, const floatX* dout, int64_t N, int64_t OC, int64_t dout_stride, int64_t rows_per_piece) {
    __shared__ float shared[8][W][32];
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    int64_t first_column = (int64_t)blockIdx.x * 32 * W, column = first_column + lane * W, n0 = blockIdx.y * rows_per_piece;
    int64_t n1 = n0 + rows_per_piece < N ? n0 + rows_per_piece : N;
    Numbers<W> sum;
    if (column < OC) {
#pragma unroll 4  // rows in flight at a time
        for (int64_t n = n0 + warp; n < n1; n += 8) {
            Numbers<W> x = load_numbers<W>(dout + n * dout_stride + column);
            for (int i = 0; i < W; i++) sum[i] += x[i];
        }
    }
    for (int i = 0; i < W; i++) shared[warp][i][lane] = sum[i];
    __syncthreads();
    int c = threadIdx.x;  // of the block's columns
    if (c >= 32 * W || first_column + c >= OC) return;
    float total = 0;
    for (int w = 0; w < 8; w++) total += shared[w][c % W][c / W];
    partial[blockIdx.y * OC + first_column + c] = total;
}
__global__ void __launch_bounds__(256) bias_backward_sum_kernel3(float* db, const float* partial, int64_t pieces, int64_t OC) {
    __shared__ float shared[8][32];
    int lane = threadIdx.x % 32, strand = threadIdx.x / 32;
    int64_t column = (int64_t)blockIdx.x * 32 + lane;
    float sum = 0;
    if (column < OC) {
#pragma unroll 4
        for (int64_t piece = strand; piece < pieces; piece += 8) sum += partial[piece * OC + column];
    }
    shared[strand][lane] = sum;
    __syncthreads();
    if (strand > 0 || column >= OC) return;
    float total = 0;
    for (int s = 0; s < 8; s++) total += shared[s][lane];
    db[column] += total;
}
template <int W>
inline void bias_backward3(cudaStream_t stream, float* db, const floatX* dout, int64_t N, int64_t OC, int64_t dout_stride) {
    // About 512 blocks, four for each multiprocessor of an H100. Each warp has at least one row.
    int64_t tiles = ceil_div(OC, 32 * W), pieces = std::max<int64_t>(1, std::min(512 / tiles, ceil_div(N, 8)));
    int64_t rows_per_piece = round_up(ceil_div(N, pieces), 8);
    pieces = ceil_div(N, rows_per_piece);
    float* partial = Scratch{workspace(), WORKSPACE_BYTES}.take<float>(pieces * OC);
    bias_backward_kernel3<W><<<dim3((unsigned)tiles, (unsigned)pieces), 256, 0, stream>>>(partial, dout, N, OC, dout_stride, rows_per_piece);
    LAUNCH_CHECK();
    bias_backward_sum_kernel3<<<(unsigned)ceil_div(OC, 32), 256, 0, stream>>>(db, partial, pieces, OC);
    LAUNCH_CHECK();
}

static bool run(int version, cudaStream_t stream, float* db, const floatX* dout, int64_t N, int64_t OC) {
    constexpr int W = Packed<floatX>::size;
    switch (version) {
        case 1:
            bias_backward_kernel1<<<(unsigned)ceil_div(OC, 256), 256, 0, stream>>>(db, dout, N, OC);
            LAUNCH_CHECK();
            return true;
        case 2:
            bias_backward3<1>(stream, db, dout, N, OC, OC);
            return true;
        case 3:
            if (OC % W != 0) return false;
            bias_backward3<W>(stream, db, dout, N, OC, OC);
            return true;
        case 4:
            (OC % W == 0 ? bias_backward_launch<W> : bias_backward_launch<1>)(stream, db, dout, N, OC, OC);
            return true;
        default:
            if (OC % W != 0 || !bias_takes_clusters<W>(OC)) return false;
            bias_backward(stream, db, dout, N, OC);
            return true;
    }
}

int main(int argc, char** argv) {
    Ladder ladder("bias_backward", {"a thread a column", "two stages", "16-byte loads", "one launch (in use)", "clusters share out rows (in use)"}, argc, argv);
    int64_t shapes[][2] = {{1, 1}, {7, 13}, {1000, 33}, {9, 8}, {515, 264}, {64, 2304}, {4099, 768}, {3, 20000}, {300, 8192}, {77, 1601}};
    for (auto& shape : shapes) {
        int64_t N = shape[0], OC = shape[1];
        std::vector<float> dout = random_numbers(N * OC, 1), before = random_numbers(OC, 2), after = before;
        cpu::bias_backward(after.data(), dout.data(), N, OC);
        DeviceArray<floatX> d_dout(dout);
        DeviceArray<float> db(OC);
        ladder.check(format("N=%ld OC=%ld", (long)N, (long)OC), {accumulated("db", db, before, after, 2e-5)},
                     [&](int version) { return run(version, ladder.stream, db, d_dout, N, OC); });
    }
    // Columns out of wider rows, aligned and not.
    for (int64_t stride : {72, 67}) {
        int64_t N = 100, OC = 40;
        std::vector<float> dout = random_numbers(N * stride, 3), dense, before = random_numbers(OC, 4), after = before;
        for (int64_t n = 0; n < N; n++) dense.insert(dense.end(), &dout[n * stride], &dout[n * stride] + OC);
        cpu::bias_backward(after.data(), dense.data(), N, OC);
        DeviceArray<floatX> d_dout(dout);
        DeviceArray<float> db(OC);
        ladder.check(format("rows %ld apart", (long)stride), {accumulated("db", db, before, after, 2e-5)}, [&](int version) {
            constexpr int W = Packed<floatX>::size;
            if (version == 4) (stride % W == 0 ? bias_backward_launch<W> : bias_backward_launch<1>)(ladder.stream, db, d_dout, N, OC, stride);
            if (version == 5) bias_backward(ladder.stream, db, d_dout, N, OC, stride);
            return version >= 4;
        });
    }
    bool timing = argc < 2 || strcmp(argv[argc - 1], "--check") != 0;
    for (int64_t OC : {768, 2304, 3072}) {
        if (!timing) break;
        int64_t N = 65536;
        DeviceArray<floatX> dout(N * OC), some(random_numbers(1 << 20, 5));
        DeviceArray<float> db(random_numbers(OC, 6));
        for (int64_t i = 0; i < dout.size; i += some.size)
            CUDA_CHECK(cudaMemcpy(dout + i, some.data, std::min(some.size, dout.size - i) * sizeof(floatX), cudaMemcpyDeviceToDevice));
        ladder.time(format("N=%ld OC=%ld", (long)N, (long)OC), {(double)N * OC, (double)N * OC * sizeof(floatX)},
                    [&](int version) { return run(version, ladder.stream, db, dout, N, OC); });
    }
    return ladder.finish();
}
