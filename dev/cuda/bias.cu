// The bias gradient: db (OC) += Σ_n dout_n, dout (N,OC).
//
// A call reads dout once and does one addition a number: nothing but memory. N = 65536 in bf16: OC = 768 100 MB, 2304 302 MB, 3072 403 MB, which at the
// 3.0 TB/s of an H100 take 34, 101 and 134 µs. (Inside dW's product, which reads dout anyway, it would cost nothing: linear_backward in matmul.cu times that.)
//
//   1  a thread a column, down all rows. Neighbouring threads read neighbouring columns, so nothing that is read is wasted; but 768 columns are 768 threads
//      on a machine that wants 100 000, each waiting for one row after the other
//   2  the rows cut into pieces too: 512 blocks of 8 warps leave partial sums in the workspace, a second small kernel adds those up. No atomics: the pieces
//      depend on N and OC alone and are added in one order. Expected: close to the memory's rate, less what 64 bytes for each warp's load cost
//   3  16 bytes a load instead of 2: an eighth of the load instructions, 512 neighbouring bytes of a row for a warp, and 4 rows in flight. Expected: all of
//      the memory's rate. In use (gpt2/cuda/matmul.cuh); rows that are not multiples of 16 bytes take version 2, which is the same template
#include "ladder.h"

#include "../../gpt2/cuda/matmul.cuh"

using namespace gpu;

__global__ void bias_backward_kernel1(float* db, const floatX* dout, int64_t N, int64_t OC) {
    int64_t column = (int64_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (column >= OC) return;
    float sum = 0;
    for (int64_t n = 0; n < N; n++) sum += to_float(dout[n * OC + column]);
    db[column] += sum;
}

static bool run(int version, cudaStream_t stream, float* db, const floatX* dout, int64_t N, int64_t OC) {
    switch (version) {
        case 1:
            bias_backward_kernel1<<<(unsigned)ceil_div(OC, 256), 256, 0, stream>>>(db, dout, N, OC);
            LAUNCH_CHECK();
            return true;
        case 2:
            bias_backward_launch<1>(stream, db, dout, N, OC, OC);
            return true;
        default:
            bias_backward(stream, db, dout, N, OC);
            return true;
    }
}

int main(int argc, char** argv) {
    Ladder ladder("bias_backward", {"a thread a column", "two stages", "16-byte loads (in use)"}, argc, argv);
    int64_t shapes[][2] = {{1, 1}, {7, 13}, {1000, 33}, {9, 8}, {515, 264}, {64, 2304}, {4099, 768}, {3, 20000}};
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
            if (version == 3) bias_backward(ladder.stream, db, d_dout, N, OC, stride);
            return version == 3;
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
