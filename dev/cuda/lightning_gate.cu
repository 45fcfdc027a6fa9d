// The ladders of Lightning attention's gated norm, forward and backward (gpt2/cuda/lightning_gate.cuh):
//
//     forward    y = o·r⊙gain, r = 1/√(mean(o²) + 1e-6)      z = y⊙σ, σ = sigmoid(gate)
//     backward   t = dz⊙σ⊙gain      d_o = r·t − o·(r³/C)·Σ_c t⊙o      dgate = dz⊙y⊙σ⊙(1−σ)      dgain += Σ_n dz⊙σ⊙o·r
//
// Bound by memory: forward reads two (N,C) and writes one, backward reads three and writes two. N=65536 C=768, bf16, 3.0 TB/s: 302 MB = 101 µs, and
// 503 MB = 168 µs.
//
//   1. As the formulas read: RMSNorm's kernel, then one that gates; backward one that takes the gate's gradient, then RMSNorm's. The row between the two goes
//      through memory: 5/3 of the bytes forward, 9/5 backward.
//   2. One kernel, a warp a row, which is read again for each use; backward a second one for the sums over columns. 3/3 and 8/5 of the bytes, as long as what
//      is read again is still in a cache.
//   3. The row stays in registers between its uses; backward also makes the columns' sums, in registers of the thread that owns a column. Expected: above 75 %
//      of the copy's bandwidth.
#include "../../gpt2/cuda/lightning_gate.cuh"
#include "ladder.h"

using namespace gpu;

__global__ void gate_forward_kernel1(floatX* z, const floatX* gate, int64_t n) {
    int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) z[i] = from_float<floatX>(to_float(z[i]) * sigmoid(to_float(gate[i])));
}

// dy = dz⊙σ, dgate
__global__ void gate_backward_kernel1(floatX* dy, floatX* dgate, const floatX* dz, const float* rstd, const floatX* o, const floatX* gate, const floatX* gain,
                                      int64_t N, int64_t C) {
    int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x, n = i / C, c = i % C;
    if (n >= N) return;
    float sigma = sigmoid(to_float(gate[i])), d = to_float(dz[i]) * sigma;
    dgate[i] = from_float<floatX>(d * to_float(o[i]) * rstd[n] * to_float(gain[c]) * (1 - sigma));
    dy[i] = from_float<floatX>(d);
}

static void forward(int version, cudaStream_t stream, floatX* z, float* rstd, const floatX* o, const floatX* gate, const floatX* gain, int64_t N, int64_t C) {
    if (version > 1) {
        lightning_gate_forward(stream, z, rstd, o, gate, gain, N, C, version);
        return;
    }
    rmsnorm_forward(stream, z, C, rstd, o, C, gain, N, C);
    gate_forward_kernel1<<<(unsigned)ceil_div(N * C, 256), 256, 0, stream>>>(z, gate, N * C);
    LAUNCH_CHECK();
}

static void backward(int version, cudaStream_t stream, floatX* d_o, floatX* dgate, float* dgain, const floatX* dz, const float* rstd, const floatX* o,
                     const floatX* gate, const floatX* gain, int64_t N, int64_t C) {
    if (version > 1) {
        lightning_gate_backward(stream, d_o, dgate, dgain, dz, rstd, o, gate, gain, N, C, version);
        return;
    }
    gate_backward_kernel1<<<(unsigned)ceil_div(N * C, 256), 256, 0, stream>>>(d_o, dgate, dz, rstd, o, gate, gain, N, C);
    LAUNCH_CHECK();
    rmsnorm_backward(stream, d_o, C, dgain, d_o, C, o, C, rstd, gain, N, C);
}

struct Shape {
    int64_t N, C;
    bool in_place = false;
    std::string name() const { return format("N=%lld C=%lld%s", (long long)N, (long long)C, in_place ? " in place" : ""); }
};

struct Case {
    std::vector<float> o, gate, gain, dz, dgain;          // dgain: what is there before
    std::vector<float> z, rstd, d_o, dgate, dgain_after;  // what is to come out
    explicit Case(const Shape& s)
        : o(random_numbers(s.N * s.C, 1, 2, 0.5)),
          gate(random_numbers(s.N * s.C, 2, 2)),
          gain(random_numbers(s.C, 3, 0.5, 1)),
          dz(random_numbers(s.N * s.C, 4)),
          dgain(random_numbers(s.C, 5)) {
        z.resize(s.N * s.C);
        rstd.resize(s.N);
        cpu::lightning_gate_forward(z.data(), rstd.data(), o.data(), gate.data(), gain.data(), s.N, s.C);
        d_o = dz;
        dgate = z;
        dgain_after = dgain;
        cpu::lightning_gate_backward(d_o.data(), dgate.data(), dgain_after.data(), rstd.data(), o.data(), gate.data(), gain.data(), s.N, s.C);
    }
};

static void check_forward(Ladder& ladder, const Shape& s) {
    Case c(s);
    DeviceArray<floatX> o(c.o), gate(c.gate), gain(c.gain), z(s.N * s.C);
    DeviceArray<float> rstd(s.N);
    std::vector<Output> outputs = {s.in_place ? accumulated("z", z, c.o, c.z) : output("z", z, c.z), output("rstd", rstd, c.rstd, 2e-5)};
    ladder.check(s.name(), outputs, [&](int version) {
        forward(version, ladder.stream, z, rstd, s.in_place ? z : o, gate, gain, s.N, s.C);
        return true;
    });
}

static void check_backward(Ladder& ladder, const Shape& s) {
    Case c(s);
    DeviceArray<floatX> o(c.o), gate(c.gate), gain(c.gain), dz(c.dz), d_o(s.N * s.C), dgate(s.N * s.C);
    DeviceArray<float> rstd(c.rstd), dgain(s.C);
    // Of one or two channels nearly nothing is left of d_o: what remains is rounding.
    double rounding = s.C < 4 ? 1e-4 : 1e-6;
    std::vector<Output> outputs = {s.in_place ? accumulated("d_o", d_o, c.dz, c.d_o, TOLERANCE, rounding) : output("d_o", d_o, c.d_o, TOLERANCE, rounding),
                                   output("dgate", dgate, c.dgate), accumulated("dgain", dgain, c.dgain, c.dgain_after)};
    ladder.check(s.name(), outputs, [&](int version) {
        CUDA_CHECK(cudaMemsetAsync(workspace(), 0xff, WORKSPACE_BYTES, ladder.stream));
        backward(version, ladder.stream, d_o, dgate, dgain, s.in_place ? d_o : dz, rstd, o, gate, gain, s.N, s.C);
        return true;
    });
}

static std::vector<float> repeated_numbers(int64_t n, uint64_t seed) {  // a million random numbers again and again
    std::vector<float> some = random_numbers(std::min<int64_t>(n, 1 << 20), seed), x(n);
    for (int64_t i = 0; i < n; i++) x[i] = some[i % some.size()];
    return x;
}

static void time(Ladder& ladder, bool is_forward, const Shape& s) {
    int64_t n = s.N * s.C;
    DeviceArray<floatX> o(repeated_numbers(n, 1)), gate(repeated_numbers(n, 2)), dz(repeated_numbers(n, 3)), gain(random_numbers(s.C, 4)), z(n), dgate(n);
    DeviceArray<float> rstd(s.N), dgain(random_numbers(s.C, 5));
    forward(3, ladder.stream, z, rstd, o, gate, gain, s.N, s.C);
    ladder.time(s.name(), {(is_forward ? 8.0 : 16.0) * n, (is_forward ? 3.0 : 5.0) * n * sizeof(floatX)}, [&](int version) {
        if (is_forward)
            forward(version, ladder.stream, z, rstd, o, gate, gain, s.N, s.C);
        else
            backward(version, ladder.stream, z, dgate, dgain, dz, rstd, o, gate, gain, s.N, s.C);
        return true;
    });
}

int main(int argc, char** argv) {
    const std::vector<Shape> shapes = {{1, 1},      {5, 7},     {3, 8},    {33, 40},  {301, 257}, {129, 256}, {1029, 768},
                                       {130, 1600}, {40, 2048}, {9, 2056}, {5, 4096}, {3, 4104},  {6, 5001}};
    int failed = 0;
    for (bool is_forward : {true, false}) {
        Ladder ladder(is_forward ? "lightning_gate_forward" : "lightning_gate_backward",
                      {"norm and gate apart", "one kernel, a warp a row", "rows in registers"}, argc, argv);
        for (Shape s : shapes)
            for (bool in_place : {false, true}) {
                s.in_place = in_place;
                is_forward ? check_forward(ladder, s) : check_backward(ladder, s);
            }
        for (int64_t C : {768, 2048}) time(ladder, is_forward, {65536, C});
        failed |= ladder.finish();
    }
    return failed;
}
