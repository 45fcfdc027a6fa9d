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
// SiLU, y = xσ(x), is checked here as well; it has no kernel of its own: others take it as they load.
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

// SiLU as its formula has it, and with what stands in gelu.cuh.
__global__ void silu_forward_kernel1(floatX* y, const floatX* x, int64_t n) {
    int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) y[i] = from_float<floatX>(to_float(x[i]) / (1 + expf(-to_float(x[i]))));
}
__global__ void silu_backward_kernel1(floatX* dx, const floatX* dy, const floatX* x, int64_t n) {
    int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= n) return;
    float u = to_float(x[i]), s = 1 / (1 + expf(-u));
    dx[i] = from_float<floatX>(to_float(dy[i]) * s * (1 + u * (1 - s)));
}
__global__ void silu_forward_kernel3(floatX* y, const floatX* x, int64_t n) {
    int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) y[i] = from_float<floatX>(silu(to_float(x[i])));
}
__global__ void silu_backward_kernel3(floatX* dx, const floatX* dy, const floatX* x, int64_t n) {
    int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) dx[i] = from_float<floatX>(to_float(dy[i]) * silu_gradient(to_float(x[i])));
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

static void check_silu(Ladder& ladder, int n, double std) {
    std::vector<float> x = random_numbers(n, 3, std), dy = random_numbers(n, 4), y(n), dx = dy;
    cpu::silu_forward(y.data(), x.data(), n, 1, n);
    cpu::silu_backward(dx.data(), x.data(), n, 1, n);
    DeviceArray<floatX> d_x(x), d_dy(dy), d_out(n);
    std::string shape = format("SiLU n=%d std=%g", n, std);
    unsigned blocks = (unsigned)ceil_div(n, 256);
    ladder.check(shape, {output("y", d_out, y)}, [&](int version) {
        if (version == 1) silu_forward_kernel1<<<blocks, 256, 0, ladder.stream>>>(d_out, d_x, n);
        if (version == 3) silu_forward_kernel3<<<blocks, 256, 0, ladder.stream>>>(d_out, d_x, n);
        return version != 2;
    });
    ladder.check(shape + " backward", {output("dx", d_out, dx)}, [&](int version) {
        if (version == 1) silu_backward_kernel1<<<blocks, 256, 0, ladder.stream>>>(d_out, d_dy, d_x, n);
        if (version == 3) silu_backward_kernel3<<<blocks, 256, 0, ladder.stream>>>(d_out, d_dy, d_x, n);
        return version != 2;
    });
}

int main(int argc, char** argv) {
    Ladder ladder("gelu", {"a thread a number, tanhf", "16 bytes a thread", "sigmoid instead of tanh (in use)"}, argc, argv);
    for (int64_t n : {1, 7, 8, 1000, 4099, 256 * 3072})
        for (int shift : {0, 1}) check_gelu(ladder, n, shift, 2);
    check_gelu(ladder, 4099, 0, 1e5);  // exponentials overflow
    check_silu(ladder, 4099, 3);
    check_silu(ladder, 1000, 1e4);  // exponentials overflow

    int64_t n = 65536 * 3072;
    std::vector<float> some = random_numbers(1 << 20, 5), x(n);
    for (int64_t i = 0; i < n; i++) x[i] = some[i % some.size()];
    DeviceArray<floatX> d_x(x), d_dy(x), d_out(n);
    double bytes = (double)n * sizeof(floatX);
    ladder.time("forward 65536×3072", {0, 2 * bytes}, [&](int version) { return forward(version, ladder.stream, d_out, d_x, n); });
    ladder.time("backward 65536×3072", {0, 3 * bytes}, [&](int version) { return backward(version, ladder.stream, d_out, d_dy, d_x, n); });
    return ladder.finish();
}
