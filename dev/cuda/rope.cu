// Rotary positions: (x_2i, x_2i+1) → (x_2i cos − x_2i+1 sin, x_2i sin + x_2i+1 cos) at angle position·10000^(−2i/d), for `heads` vectors of d numbers a token.
//
// Everything is read and written once: N = 65536, 24 heads (queries and keys of GPT-2 124M), d = 64 in bf16: 403 MB, 134 µs at the 3.0 TB/s of an H100. An
// angle takes some 30 double-precision instructions: once a token and pair that is 2.1 million angles, 5 µs of the machine; once a head as well, 100 µs.
// A table of cosines and sines, as the CPU has it, would be float32 numbers half as large as one head, read for every token.
//
//   1  a thread a pair: power, cosine and sine in double precision as the formula has them. Expected: hundreds of instructions a pair, milliseconds
//   2  a block a token: the angles once, in shared memory, for all heads; reduced in double, cosine and sine in float32. Expected: ten times as fast; but
//      2 bytes an access, and while a block computes angles it loads nothing. In use for vectors that are not whole multiples of 16 bytes
//   3  16 bytes an access, and as many tokens a block as give each thread four of them, loaded before the angles are computed. Expected: the memory's rate.
//      In use (gpt2/cuda/rope.cuh)
//
// Timed are the calls that layers make: causal attention turns queries and keys in place, where they stand in rows [q | k | v]; Infini-attention, which needs
// them unturned for its memory as well, out of these rows into others. MLA's rope parts are turned by its own kernels (dev/cuda/mla.cu).
#include "ladder.h"

#include "../../gpt2/cuda/rope.cuh"

using namespace gpu;

__global__ void rope_kernel1(floatX* y, int64_t y_stride, const floatX* x, int64_t x_stride, int64_t N, int heads, int d, int64_t head_stride,
                             const int* position, int direction) {
    int64_t j = (int64_t)blockIdx.x * blockDim.x + threadIdx.x, n = j / (heads * (d / 2));
    if (n >= N) return;
    int h = (int)(j / (d / 2) % heads), i = (int)(j % (d / 2));
    double angle = position[n] * pow(10000.0, -2.0 * i / d);
    float c = (float)cos(angle), s = direction * (float)sin(angle);
    int64_t at = h * head_stride + 2 * i;
    float a = to_float(x[n * x_stride + at]), b = to_float(x[n * x_stride + at + 1]);
    y[n * y_stride + at] = from_float<floatX>(a * c - b * s);
    y[n * y_stride + at + 1] = from_float<floatX>(a * s + b * c);
}

static bool run(int version, cudaStream_t stream, floatX* y, int64_t y_stride, const floatX* x, int64_t x_stride, int64_t N, int heads, int d,
                int64_t head_stride, const int* position, int direction) {
    switch (version) {
        case 1:
            rope_kernel1<<<(unsigned)ceil_div(N * heads * (d / 2), 256), 256, 0, stream>>>(y, y_stride, x, x_stride, N, heads, d, head_stride, position,
                                                                                           direction);
            break;
        case 2:
            rope_kernel2<<<(unsigned)N, ROPE2_THREADS, d * sizeof(float), stream>>>(y, y_stride, x, x_stride, heads, d, head_stride, position, direction,
                                                                                    rope_exponent(d));
            break;
        default:
            rope(stream, y, y_stride, x, x_stride, N, heads, d, head_stride, position, direction);
    }
    return true;
}

// The heads start `offset` numbers into the rows.
static void check(Ladder& ladder, int64_t N, int heads, int d, int64_t head_stride, int offset, int64_t x_stride, int64_t y_stride, int max_position) {
    std::vector<float> x = random_numbers(N * x_stride, 1), before = random_numbers(N * y_stride, 2);
    std::vector<int> position;
    for (int64_t n = 0; n < N; n++) position.push_back(n % 3 ? (int)(n * 7919 % (max_position + 1)) : max_position - (int)(n % (max_position + 1)));
    DeviceArray<floatX> d_x(x), d_turned(x), d_y(N * y_stride);
    DeviceArray<int> d_position(position);
    for (int direction : {1, -1}) {
        std::vector<float> y = before, turned = x;
        for (int h = 0; h < heads; h++) {
            int64_t at = offset + h * head_stride;
            cpu::rope(&y[at], y_stride, &x[at], x_stride, N, 1, d, position.data(), direction);
            cpu::rope(&turned[at], x_stride, &turned[at], x_stride, N, 1, d, position.data(), direction);
        }
        std::string shape = format("N=%ld heads=%d d=%d, %ld apart, from %d, rows %ld→%ld, direction %d", (long)N, heads, d, (long)head_stride, offset,
                                   (long)x_stride, (long)y_stride, direction);
        ladder.check(shape, {accumulated("y", d_y, before, y)}, [&](int version) {
            return run(version, ladder.stream, d_y + offset, y_stride, d_x + offset, x_stride, N, heads, d, head_stride, d_position, direction);
        });
        ladder.check(shape + " in place", {accumulated("x", d_turned, x, turned)}, [&](int version) {
            return run(version, ladder.stream, d_turned + offset, x_stride, d_turned + offset, x_stride, N, heads, d, head_stride, d_position, direction);
        });
    }
}

int main(int argc, char** argv) {
    Ladder ladder("rope", {"a thread a pair, all in double", "a block a token: angles once", "16 bytes a thread, loads before angles (in use)"}, argc, argv);
    check(ladder, 1, 1, 2, 2, 0, 2, 2, 5);
    check(ladder, 33, 3, 6, 7, 1, 25, 31, 300);
    check(ladder, 70, 5, 16, 16, 0, 80, 96, 1000);
    check(ladder, 257, 1, 32, 32, 256, 288, 288, 50000);       // MLA's shared key, in rows [c | kr]
    check(ladder, 100, 12, 32, 96, 64, 1152, 1152, 2000);      // the rope part of MLA's queries
    check(ladder, 301, 24, 64, 64, 0, 2304, 2304, 100000);     // queries and keys of GPT-2 124M, in rows [q | k | v]
    check(ladder, 3, 40, 256, 256, 0, 40 * 256, 40 * 256, 9);  // more than four packs a thread

    int64_t N = 65536, stride = 2304;
    std::vector<float> some = random_numbers(1 << 20, 3), x(N * stride);
    for (int64_t i = 0; i < N * stride; i++) x[i] = some[i % some.size()];
    std::vector<int> position;
    for (int n = 0; n < N; n++) position.push_back(n % 1024);
    DeviceArray<floatX> d_x(x);
    DeviceArray<int> d_position(position);
    DeviceArray<floatX> d_y(N * 24 * 64);
    Work work = {0, 2.0 * N * 24 * 64 * sizeof(floatX)};
    ladder.time("N=65536 heads=24 d=64", work,
                [&](int version) { return run(version, ladder.stream, d_x, stride, d_x, stride, N, 24, 64, 64, d_position, 1); });
    ladder.time("N=65536 heads=24 d=64, into rows of 1536", work,
                [&](int version) { return run(version, ladder.stream, d_y, 24 * 64, d_x, stride, N, 24, 64, 64, d_position, 1); });
    return ladder.finish();
}
