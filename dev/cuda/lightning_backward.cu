// The ladder of Lightning attention's recurrence, backward (gpt2/cuda/lightning.cuh): du (N,3C) from do (N,C) and u (N,3C),
//
//     dq_t = c·Σ_{j<=t} λ^{t−j}·(do_t·v_j)·k_j      dk_t = c·Σ_{j>=t} λ^{j−t}·(v_t·do_j)·q_j      dv_t = c·Σ_{j>=t} λ^{j−t}·(k_t·q_j)·do_j
//
// and du = (dq, dk, dv)⊙SiLU'(u). Each of the three is the recurrence of the forward pass with its roles exchanged, dq from the first token to the last, dk and
// dv from the last to the first.
// To be read and written: 14 bytes a token and channel (bf16). FLOPs, with chunks of n = 64: five products over half of a chunk and five with a state (each of
// S, dS is made once and used in two or three places), 2·(5·n/2 + 5·hs) = 960 a token and channel at hs 64. At 3.0 TB/s and 690 TFLOP/s:
//     B64 T1024, hs 64, C 768     705 MB    235 µs    48 GFLOP = 70 µs
//     B8  T8192, B2 T32768        705 MB    235 µs
//     B1  T262144                 2.8 GB    940 µs
//     B8  T4096, hs 128, C 2048   940 MB    313 µs
//
//   1. Token by token: three sweeps of the forward ladder's version 1. Expected: three times its time.
//   2. Chunks, float32 arithmetic: three sweeps of its version 2.
//   3. Tensor cores: three sweeps of its version 3, each of which reads four rows a token and writes one: 30 bytes a token and channel.
//   4. dk and dv by one sweep. Both are made of the same q and do, and their states are transposes of each other: 22 bytes, and one product less.
//      Expected: a quarter faster than version 3.
//   5. Spans where sequences and heads do not fill the GPU: 30 bytes, but by all multiprocessors.
//
//   6. Hopper: dq, dk and dv by one sweep from behind. What dq needs of the past is only S before each chunk; a sweep over k and v leaves it as bf16, to which
//      products round it anyway. At hs 64, bytes a token and channel: 4 + 2 for the states, 8 + 2 + 6 for the sweep, 22 in all, as version 4; but SiLU of each
//      number once, 11 products of 64³ a chunk by wgmma, of operands in shared memory, instead of some 20 by mma.sync and ldmatrix. Version 4's second sweep
//      issues in 39 % of its cycles and keeps memory 54 % busy, with 12 warps a multiprocessor that wait for each other's results. Expected at B64: 120 µs for
//      the states and 330 µs for the sweep. Three blocks a multiprocessor at hs 64; one of 8 warps at hs 128, where the states are twice as large.
//   7. Forward leaves the states: 16 bytes at B64, 268 µs at the rate of copies; and 4 more where D between spans has to be made. Expected: 310 µs at B64, 390
//      at B8 and B2.
//
// The last version is the function that the layer calls; it chooses, between 4 and 5 what 6 does not take.
#include "lightning_case.h"

static LightningMethod method(int version, const AttentionConfig& a) {
    return {std::min(version, 3), version >= 5 ? (LightningScheme)a["scheme"] : SCHEME_SEQUENTIAL, version >= 4, version >= 6};
}
static bool possible(int version, const LightningCase& c) {
    return version <= 4 ? c.takes(std::min(version, 3)) : version != 6 || lightning_hopper(c.shape.hs);
}

static void check(Ladder& ladder, const LightningShape& shape) {
    LightningCase c(shape);
    DeviceArray<floatX> o(c.N * c.C), du(c.N * 3 * c.C);
    std::vector<Output> outputs;
    for (int part = 0; part < 3; part++) {
        auto columns = [&c, part](const std::vector<float>& x) {
            std::vector<float> y(c.N * c.C);
            for (int64_t n = 0; n < c.N; n++) std::copy_n(&x[(n * 3 + part) * c.C], c.C, &y[n * c.C]);
            return y;
        };
        Output out = output(part == 0 ? "dq" : part == 1 ? "dk" : "dv", du, columns(c.du));
        out.read = [&du, columns] { return columns(du.to_host()); };
        outputs.push_back(out);
    }
    if (shape.memory) outputs.push_back(accumulated("memory", c.memories, c.before, c.before));  // is only read
    ladder.check(shape.name(), outputs, [&](int version) {
        if (!possible(version, c)) return false;
        c.poison_scratch();
        if (version == 7) c.leave_states(ladder.stream, o, method(version, c.config));
        c.backward(ladder.stream, du, method(version, c.config), version == 7);
        return true;
    });
}

static void time(Ladder& ladder, const LightningShape& shape) {
    LightningCase c(shape, true);
    DeviceArray<floatX> o(c.N * c.C), du(c.N * 3 * c.C);
    c.leave_states(ladder.stream, o, method(7, c.config));
    ladder.time(shape.name(), {shape.flops(5, 5), 7.0 * c.N * c.C * sizeof(floatX)}, [&](int version) {
        if (!possible(version, c) || (version == 1 && shape.longest() > 16384)) return false;  // token by token: more than 100 ms
        c.backward(ladder.stream, du, method(version, c.config), version == 7);
        return true;
    });
}

int main(int argc, char** argv) {
    Ladder ladder("lightning_backward",
                  {"token by token, three sweeps", "chunks, float32 arithmetic", "tensor cores", "dk and dv by one sweep", "spans where sequences are few",
                   "wgmma, all by one sweep", "states left by forward (in use)"},
                  argc, argv);
    if (getenv("LADDER_SMALL")) {  // for compute-sanitizer's racecheck
        check(ladder, {"", 1, 64, {200, 70}, true});
        check(ladder, {"", 1, 128, {130, 64}, true});
        return ladder.finish();
    }
    const std::vector<int> ragged = {65, 0, 1, 129, 64, 63, 200, 0};
    for (const char* decay : {"", ":decay=fla", ":decay=none"})
        for (int hs : {64, 80, 96, 128, 20, 32}) check(ladder, {decay, 3, hs, ragged, true});
    for (const char* options : {":scheme=parallel", ":decay=fla:scheme=parallel", ":decay=none:scheme=parallel"})
        for (int hs : {64, 80, 128, 20}) check(ladder, {options, 2, hs, {1000, 0, 513, 512, 1537, 1}, true});
    check(ladder, {":scheme=sequential", 12, 64, {1024, 1024}});
    check(ladder, {":scheme=parallel", 12, 64, {1024, 1024}});
    check(ladder, {":decay=fla", 1, 8, {1}});
    check(ladder, {"", 1, 256, {100, 70}, true});
    check(ladder, {"", 1, 1000, {70}});

    time(ladder, {"", 12, 64, std::vector<int>(64, 1024)});
    time(ladder, {"", 12, 64, std::vector<int>(8, 8192)});
    time(ladder, {"", 12, 64, std::vector<int>(2, 32768)});
    time(ladder, {"", 12, 64, {262144}});
    time(ladder, {"", 16, 128, std::vector<int>(8, 4096)});
    return ladder.finish();
}
