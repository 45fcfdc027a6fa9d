// GELU forward and backward, SiLU forward and backward:
//
//     GELU   u = √(2/π)(x + 0.044715x³)    y = x/2·(1 + tanh u)    dx = dy·(½(1 + tanh u) + x/2·(1 − tanh² u)·u')    u' = √(2/π)(1 + 0.134145x²)
//     SiLU   y = x·sigmoid(x)
//
// 65536×3072 numbers in bf16: forward reads and writes 805 MB, 268 µs at the 3.0 TB/s of an H100; backward moves 1.21 GB, 403 µs. Arithmetic is some 20 and 30
// instructions a number, 140 and 210 µs of the machine's issue slots: it hides behind memory if nothing is wasted.
//
//   1  a thread a number, tanhf: 2 bytes an access, and the library's tanh, some 20 instructions with a branch on |u|
//   2  16 bytes a thread. Expected: an eighth of the memory instructions; the tanh remains
//   3  1 + tanh u = 2·sigmoid(2u): one exponential and one reciprocal of the special function unit, no branch. In the backward pass also
//      1 − tanh² u = 4σ(1−σ), so that it needs no more than the forward pass has. Expected: the memory's rate. In use (gpt2/cuda/gelu.cuh)
//
// SiLU has versions 1 and 3, and rows with strides: one warp a row.
#define GPT2_NO_MAIN
#include "ladder.h"

#include "../../gpt2/cuda/gelu.cuh"
#include "../../train_gpt2.cpp"

using namespace gpu;

__device__ inline float gelu_tanh(float x) { return 0.5f * x * (1 + tanhf(0.7978845608028654f * (x + 0.044715f * x * x * x))); }
__device__ inline float gelu_tanh_gradient(float x) {
    float t = tanhf(0.7978845608028654f * (x + 0.044715f * x * x * x));
    return 0.5f * (1 + t) + 0.5f * x * (1 - t * t) * 0.7978845608028654f * (1 + 0.134145f * x * x);
}

__global__ void gelu_forward_kernel1(floatX* y, const floatX* x, int64_t n) {
    int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) y[i] = from_float<floatX>(gelu_tanh(to_float(x[i])));
}
__global__ void gelu_backward_kernel1(floatX* dx, const floatX* dy, const floatX* x, int64_t n) {
    int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) dx[i] = from_float<floatX>(to_float(dy[i]) * gelu_tanh_gradient(to_float(x[i])));
}

// n a multiple of a pack, everything aligned.
__global__ void gelu_forward_kernel2(floatX* y, const floatX* x, int64_t n) {
    int64_t i = ((int64_t)blockIdx.x * blockDim.x + threadIdx.x) * Packed<floatX>::size;
    if (i >= n) return;
    Packed<floatX> in = load_packed(x + i), out;
#pragma unroll
    for (int k = 0; k < Packed<floatX>::size; k++) out.set(k, gelu_tanh(in[k]));
    store_packed(y + i, out);
}
__global__ void gelu_backward_kernel2(floatX* dx, const floatX* dy, const floatX* x, int64_t n) {
    int64_t i = ((int64_t)blockIdx.x * blockDim.x + threadIdx.x) * Packed<floatX>::size;
    if (i >= n) return;
    Packed<floatX> in = load_packed(x + i), gradient = load_packed(dy + i);
#pragma unroll
    for (int k = 0; k < Packed<floatX>::size; k++) gradient.set(k, gradient[k] * gelu_tanh_gradient(in[k]));
    store_packed(dx + i, gradient);
}

__global__ void silu_forward_kernel1(floatX* y, int64_t y_stride, const floatX* x, int64_t x_stride, int64_t N, int64_t C) {
    int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x, n = i / C, c = i % C;
    if (n >= N) return;
    float u = to_float(x[n * x_stride + c]);
    y[n * y_stride + c] = from_float<floatX>(u / (1 + expf(-u)));
}
__global__ void silu_backward_kernel1(floatX* dx, int64_t dx_stride, const floatX* dy, int64_t dy_stride, const floatX* x, int64_t x_stride, int64_t N,
                                      int64_t C) {
    int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x, n = i / C, c = i % C;
    if (n >= N) return;
    float u = to_float(x[n * x_stride + c]), s = 1 / (1 + expf(-u));
    dx[n * dx_stride + c] = from_float<floatX>(to_float(dy[n * dy_stride + c]) * s * (1 + u * (1 - s)));
}

static bool forward(int version, cudaStream_t stream, floatX* y, const floatX* x, int64_t n) {
    constexpr int size = Packed<floatX>::size;
    if (version == 2 && !(n % size == 0 && aligned16(y) && aligned16(x))) return false;
    if (version == 1) gelu_forward_kernel1<<<(unsigned)ceil_div(n, 256), 256, 0, stream>>>(y, x, n);
    if (version == 2) gelu_forward_kernel2<<<(unsigned)ceil_div(n / size, 256), 256, 0, stream>>>(y, x, n);
    if (version == 3) gelu_forward(stream, y, x, n);
    return true;
}
static bool backward(int version, cudaStream_t stream, floatX* dx, const floatX* dy, const floatX* x, int64_t n) {
    constexpr int size = Packed<floatX>::size;
    if (version == 2 && !(n % size == 0 && aligned16(dx) && aligned16(dy) && aligned16(x))) return false;
    if (version == 1) gelu_backward_kernel1<<<(unsigned)ceil_div(n, 256), 256, 0, stream>>>(dx, dy, x, n);
    if (version == 2) gelu_backward_kernel2<<<(unsigned)ceil_div(n / size, 256), 256, 0, stream>>>(dx, dy, x, n);
    if (version == 3) gelu_backward(stream, dx, dy, x, n);
    return true;
}

// Numbers of this standard deviation, `shift` numbers away from an aligned address.
static void check_gelu(Ladder& ladder, int64_t n, int shift, double std) {
    std::vector<float> x = random_numbers(n, 1, std), dy = random_numbers(n, 2), y(n), dx(n);
    cpu::gelu_forward(y.data(), x.data(), n);
    cpu::gelu_backward(dx.data(), dy.data(), x.data(), n);
    auto shifted = [&](std::vector<float> v) {
        v.insert(v.begin(), shift, 3);
        return v;
    };
    std::vector<float> before = shifted(std::vector<float>(n, 0));
    DeviceArray<floatX> d_x(shifted(x)), d_dy(shifted(dy)), d_out(n + shift);
    std::string shape = format("n=%ld std=%g%s", (long)n, std, shift ? " not aligned" : "");
    ladder.check("forward " + shape, {accumulated("y", d_out, before, shifted(y))},
                 [&](int version) { return forward(version, ladder.stream, d_out + shift, d_x + shift, n); });
    ladder.check("backward " + shape, {accumulated("dx", d_out, before, shifted(dx))},
                 [&](int version) { return backward(version, ladder.stream, d_out + shift, d_dy + shift, d_x + shift, n); });
    ladder.check("backward in place " + shape, {accumulated("dx", d_out, shifted(dy), shifted(dx))},
                 [&](int version) { return backward(version, ladder.stream, d_out + shift, d_out + shift, d_x + shift, n); });
}

// Rows y_stride and x_stride apart; what stands between them stays.
static void check_silu(Ladder& ladder, int64_t N, int64_t C, int64_t y_stride, int64_t x_stride) {
    std::vector<float> x = random_numbers(N * x_stride, 3, 3), dy = random_numbers(N * y_stride, 4), y = dy, dx = dy;
    for (int64_t n = 0; n < N; n++) {
        cpu::silu_forward(&y[n * y_stride], &x[n * x_stride], x_stride, 1, (int)C);
        cpu::silu_backward(&dx[n * y_stride], &x[n * x_stride], x_stride, 1, (int)C);
    }
    DeviceArray<floatX> d_x(x), d_dy(dy), d_out(N * y_stride);
    std::string shape = format("SiLU N=%ld C=%ld strides %ld, %ld", (long)N, (long)C, (long)y_stride, (long)x_stride);
    ladder.check(shape, {accumulated("y", d_out, dy, y)}, [&](int version) {
        if (version == 1) silu_forward_kernel1<<<(unsigned)ceil_div(N * C, 256), 256, 0, ladder.stream>>>(d_out, y_stride, d_x, x_stride, N, C);
        if (version == 3) silu_forward(ladder.stream, d_out, y_stride, d_x, x_stride, N, C);
        return version != 2;
    });
    ladder.check(shape + " backward in place", {accumulated("dx", d_out, dy, dx)}, [&](int version) {
        if (version == 1)
            silu_backward_kernel1<<<(unsigned)ceil_div(N * C, 256), 256, 0, ladder.stream>>>(d_out, y_stride, d_out, y_stride, d_x, x_stride, N, C);
        if (version == 3) silu_backward(ladder.stream, d_out, y_stride, d_out, y_stride, d_x, x_stride, N, C);
        return version != 2;
    });
}

int main(int argc, char** argv) {
    Ladder ladder("gelu", {"a thread a number, tanhf", "16 bytes a thread", "sigmoid instead of tanh (in use)"}, argc, argv);
    for (int64_t n : {1, 7, 8, 1000, 4099, 256 * 3072})
        for (int shift : {0, 1}) check_gelu(ladder, n, shift, 2);
    check_gelu(ladder, 4099, 0, 1e5);  // exponentials overflow
    check_silu(ladder, 1, 1, 1, 1);
    check_silu(ladder, 13, 33, 33, 99);
    check_silu(ladder, 13, 35, 40, 48);
    check_silu(ladder, 100, 768, 2304, 768);

    int64_t N = 65536, C = 3072, n = N * C;
    std::vector<float> some = random_numbers(1 << 20, 5), x(n);
    for (int64_t i = 0; i < n; i++) x[i] = some[i % some.size()];
    DeviceArray<floatX> d_x(x), d_dy(x), d_out(n);
    double bytes = (double)n * sizeof(floatX);
    ladder.time("forward 65536×3072", {0, 2 * bytes}, [&](int version) { return forward(version, ladder.stream, d_out, d_x, n); });
    ladder.time("backward 65536×3072", {0, 3 * bytes}, [&](int version) { return backward(version, ladder.stream, d_out, d_dy, d_x, n); });
    ladder.time("SiLU 65536×2304", {0, 1.5 * bytes}, [&](int version) {
        if (version == 1) silu_forward_kernel1<<<(unsigned)ceil_div(N * 2304, 256), 256, 0, ladder.stream>>>(d_out, 2304, d_x, 2304, N, 2304);
        if (version == 3) silu_forward(ladder.stream, d_out, 2304, d_x, 2304, N, 2304);
        return version != 2;
    });
    return ladder.finish();
}
