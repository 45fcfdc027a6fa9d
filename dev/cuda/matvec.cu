// The linear layers of few rows (decoding): out (N,OC) = [residual +] [GELU] (u·Wᵀ + b), u = x (N,C) or its LayerNorm.
//
// W is read for the sake of N rows only: for N = 1 that is a multiply-add for 2 bytes, in bf16. An H100 reads 3.0 TB/s:
//     GPT-2 124M, each of 12 layers   768,2304  3.5 MB  1.2 µs    768,768  1.2 MB  0.4 µs    768,3072  4.7 MB  1.6 µs    3072,768  4.7 MB  1.6 µs
//     its head                        768,50304  77 MB   26 µs    a token: 247 MB in 49 launches, 82 µs
//     GPT-2 1558M, each of 48 layers  1600,4800  15 MB  5.1 µs    1600,1600  5.1 MB  1.7 µs   1600,6400  20 MB  6.8 µs   6400,1600  20 MB  6.8 µs
//     its head                        1600,50304 161 MB  54 µs    a token: 3.11 GB in 193 launches, 1.04 ms
// A launch behind another one, from the end of its predecessor to its own first read having arrived, takes longer than most of these.
//
//   1  a warp an output, number by number; the norm is computed by every block for itself. Few bytes are on their way at a time
//   2  the same in 16-byte reads (in use for sizes that 3 refuses, and float32). Expected: twice as fast for one row; for several rows the float32 units
//      (N·C·OC multiply-adds, and as many conversions) become the limit
//   3  tensor cores, so that 16 rows cost what one costs; a block a multiprocessor, whose warps share the channels of its outputs; the weights go through a
//   queue
//      of 72 KB or more, so that each byte is asked for in the first instructions of the kernel, or 72 KB ahead. Expected: a read's latency (0.8 µs) + the
//      bytes' time + 1 µs for the norm and the sum over the warps
//   4  3, launched so that it may begin while its predecessor runs (in use): the weights are on their way before the predecessor's results are there.
//      Nothing changes for a launch alone. Expected: in a chain a launch costs the time of its bytes, or 1.5 µs (see x, compute, be seen) if that is more
//   5  what was there before: layernorm_forward, cuBLASLt's first choice with bias (and residual), GELU: for comparison
//
// Behind the table of single launches: all linear layers of a token of a whole model, whose weights don't fit into the second-level cache, as one CUDA graph.
#define GPT2_NO_MAIN
#include "../../train_gpt2.cpp"
#include "steps.h"

#include "../../gpt2/cuda/layernorm.cuh"
#include "../../gpt2/cuda/matmul.cuh"
#include "../../gpt2/cuda/matvec.cuh"

using namespace gpu;

constexpr int OVERLAPPED = 4, LIBRARY = 5;

struct Temporary {  // version 5 writes these on its way
    floatX *norm, *fc;
    float *mean, *rstd;
};

static bool run(int version, cudaStream_t stream, const Matvec& m, const Temporary& t) {
    if (m.N > FEW_ROWS && version != LIBRARY) return false;
    constexpr int W = Packed<floatX>::size;
    switch (version) {
        case 1:
            launch_matvec2<1>(stream, m);
            return true;
        case 2:
            if (m.C % W != 0 || !aligned16(m.x) || !aligned16(m.w) || !aligned16(m.norm.gain) || !aligned16(m.norm.bias)) return false;
            launch_matvec2<W>(stream, m);
            return true;
        case 3:
#ifdef GPU_FLOAT32
            return false;
#else
            if (!takes_matvec3(m)) return false;
            matvec3(stream, m, false);
            return true;
#endif
        case OVERLAPPED:
            linear_few(stream, m.out, m.x, m.norm.gain ? &m.norm : nullptr, m.w, m.b, m.N, m.C, m.OC, m.gelu, m.residual, true);
            return true;
    }
    const floatX* x = m.x;
    if (m.norm.gain) layernorm_forward(stream, t.norm, t.mean, t.rstd, m.x, m.norm.gain, m.norm.bias, m.N, m.C), x = t.norm;
    if (m.gelu)
        linear_gelu_forward(stream, m.out, t.fc, x, m.w, m.b, m.N, m.C, m.OC);
    else
        linear_forward(stream, m.out, x, m.w, m.b, m.N, m.C, m.OC, m.residual);
    return true;
}

// --------------------------------------------------------------------------------------------------------------------------------------------------
// Checks

struct Case {
    int N, C, OC;
    bool norm, bias, gelu, residual;
    bool in_place = false;  // the residual is `out`
    int offset = 0;         // of all arrays from an aligned address
};

static void check(Ladder& ladder, const Case& c) {
    int64_t N = c.N, C = c.C, OC = c.OC;
    std::vector<float> x = random_numbers(N * C, 1, 1, 0.5), w = random_numbers(OC * C, 2, 1 / std::sqrt((double)C)), b = random_numbers(OC, 3);
    std::vector<float> gain = random_numbers(C, 4, 0.2, 1), shift = random_numbers(C, 5), residual = random_numbers(N * OC, 6);
    std::vector<float> u = x, y(N * OC), mean(N), rstd(N);
    if (c.norm) cpu::layernorm_forward(u.data(), mean.data(), rstd.data(), x.data(), gain.data(), shift.data(), N, C);
    cpu::linear_forward(y.data(), u.data(), w.data(), c.bias ? b.data() : nullptr, N, C, OC);
    if (c.gelu) cpu::gelu_forward(y.data(), y.data(), N * OC);
    for (int64_t i = 0; i < N * OC && c.residual; i++) y[i] += residual[i];

    auto shifted = [&](std::vector<float> v, int64_t back = 0) {
        v.insert(v.begin(), c.offset, 0.f);
        v.insert(v.end(), back, 0.f);
        return v;
    };
    DeviceArray<floatX> dx(shifted(x)), dw(shifted(w)), db(shifted(b)), dgain(shifted(gain)), dshift(shifted(shift)), dresidual(shifted(residual));
    DeviceArray<floatX> out(N * OC + c.offset), t_norm(N * C), t_fc(N * OC);
    DeviceArray<float> t_mean(N), t_rstd(N);
    Matvec m = {out + c.offset, dx + c.offset, {nullptr, nullptr}, dw + c.offset, c.bias ? db + c.offset : nullptr, nullptr, c.N, c.C, c.OC, c.gelu};
    if (c.norm) m.norm = {dgain + c.offset, dshift + c.offset};
    if (c.residual) m.residual = c.in_place ? m.out : dresidual + c.offset;
    auto read = [&] {
        std::vector<float> all = out.to_host();
        return std::vector<float>(all.begin() + c.offset, all.end());
    };
    auto prepare = [&] {
        if (c.in_place)
            out.copy_from(shifted(residual));
        else
            CUDA_CHECK(cudaMemset(out, 0xff, out.size * sizeof(floatX)));
    };
    std::string name = format("N=%d C=%d OC=%d%s%s%s%s%s%s", c.N, c.C, c.OC, c.norm ? " norm" : "", c.bias ? " bias" : "", c.gelu ? " GELU" : "",
                              c.residual ? " residual" : "", c.in_place ? " in place" : "", c.offset ? " unaligned" : "");
    ladder.check(name, {{"out", y, read, prepare, TOLERANCE, 1e-6}}, [&](int version) {
        if (c.gelu && c.residual && version == LIBRARY) return false;
        return run(version, ladder.stream, m, {t_norm, t_fc, t_mean, t_rstd});
    });

    // A row alone, and one in the middle of three: the same bits as beside all others.
    if (N < 4 || c.in_place) return;
    std::vector<float> together;
    ladder.check(name + " rows alone",
                 {{"difference", std::vector<float>(1, 0.f),
                   [&] {
                       std::vector<float> all = read();
                       bool same = memcmp(all.data(), together.data(), all.size() * sizeof(float)) == 0;
                       return std::vector<float>(1, same ? 0.f : 1.f);
                   },
                   prepare, 0, 0}},
                 [&](int version) {
                     if (version == LIBRARY || !run(version, ladder.stream, m, {})) return false;
                     CUDA_CHECK(cudaStreamSynchronize(ladder.stream));
                     together = read();
                     prepare();
                     for (int n = 0; n < N; n += n % 2 == 0 ? 1 : 3) {
                         Matvec row = m;
                         row.N = std::min<int>(n % 2 == 0 ? 1 : 3, N - n);
                         row.x += n * C;
                         row.out += n * OC;
                         if (row.residual) row.residual += n * OC;
                         if (n * OC % 8 != 0 || n * C % 8 != 0) return false;
                         run(version, ladder.stream, row, {});
                     }
                     return true;
                 });
}

// --------------------------------------------------------------------------------------------------------------------------------------------------
// Times

// n numbers: a few million random ones over and over.
static void fill(floatX* x, int64_t n, uint64_t seed, double std, double mean = 0) {
    static std::map<std::pair<double, double>, std::vector<float>> numbers;
    std::vector<float>& some = numbers[{std, mean}];
    if (some.empty()) some = random_numbers(1 << 20, seed, std, mean);
    DeviceArray<floatX> source(some);
    for (int64_t i = 0; i < n; i += source.size)
        CUDA_CHECK(cudaMemcpy(x + i, source.data, std::min(source.size, n - i) * sizeof(floatX), cudaMemcpyDeviceToDevice));
}

static void time_one(Ladder& ladder, const Case& c) {
    int64_t N = c.N, C = c.C, OC = c.OC;
    DeviceArray<floatX> x(N * C), w(OC * C), b(OC), gain(C), shift(C), residual(N * OC), out(N * OC), t_norm(N * C), t_fc(N * OC);
    DeviceArray<float> t_mean(N), t_rstd(N);
    fill(x, N * C, 1, 1);
    fill(w, OC * C, 2, 0.02);
    fill(b, OC, 3, 0.02);
    fill(gain, C, 4, 0.1, 1);
    fill(shift, C, 5, 0.02);
    fill(residual, N * OC, 1, 1);
    Matvec m = {out, x, {nullptr, nullptr}, w, c.bias ? b.data : nullptr, c.residual ? residual.data : nullptr, c.N, c.C, c.OC, c.gelu};
    if (c.norm) m.norm = {gain.data, shift.data};
    Work work = {2.0 * N * C * OC, ((double)OC * C + N * C + N * OC * (c.residual ? 2 : 1)) * sizeof(floatX)};
    ladder.time(format("%dx%dx%d%s%s%s", c.N, c.C, c.OC, c.norm ? " norm" : "", c.gelu ? " GELU" : "", c.residual ? " residual" : ""), work, [&](int version) {
        return version != OVERLAPPED && run(version, ladder.stream, m, {t_norm, t_fc, t_mean, t_rstd});
    });
}

// A model's linear layers; attention is left out: its product takes the first C numbers of the rows that come from the one before.
struct Chain {
    int layers, C, OC;  // OC: of the head
    int N = 0;
    DeviceArray<floatX> weights, small;  // small: biases, gains
    DeviceArray<floatX> start, x, qkv, fc, logits, t_norm, t_fc;
    DeviceArray<float> t_mean, t_rstd;
    Chain(int layers, int C, int OC)
        : layers(layers),
          C(C),
          OC(OC),
          weights(12ll * layers * C * C + (int64_t)OC * C),
          small(4 * C),
          start(FEW_ROWS * C),
          x(FEW_ROWS * C),
          qkv(FEW_ROWS * 3 * C),
          fc(FEW_ROWS * 4 * C),
          logits((int64_t)FEW_ROWS * OC),
          t_norm(FEW_ROWS * C),
          t_fc(FEW_ROWS * 4 * C),
          t_mean(FEW_ROWS),
          t_rstd(FEW_ROWS) {
        fill(weights, weights.size, 2, 0.02);
        fill(small, 4 * C, 4, 0.1, 1);
        fill(start, start.size, 1, 1);
    }
    double bytes() const { return weights.size * sizeof(floatX); }
    bool launch(cudaStream_t stream, int version) {
        Temporary t = {t_norm, t_fc, t_mean, t_rstd};
        NormParameters norm = {small, small};
        CUDA_CHECK(cudaMemcpyAsync(x, start, (int64_t)N * C * sizeof(floatX), cudaMemcpyDeviceToDevice, stream));
        const floatX* w = weights;
        bool first = true;
        auto linear = [&](floatX* out, const floatX* in, bool normed, int IC, int OC, bool gelu, const floatX* residual) {
            Matvec m = {out, in, normed ? norm : NormParameters{nullptr, nullptr}, w, small, residual, N, IC, OC, gelu};
            w += (int64_t)IC * OC;
            // The first one stands behind a copy.
            bool done = run(first && version == OVERLAPPED ? 3 : version, stream, m, t);
            first = false;
            return done;
        };
        for (int l = 0; l < layers; l++) {
            bool ok = linear(qkv, x, true, C, 3 * C, false, nullptr);
            ok = ok && linear(x, qkv, false, C, C, false, x);
            ok = ok && linear(fc, x, true, C, 4 * C, true, nullptr);
            ok = ok && linear(x, fc, false, 4 * C, C, false, x);
            if (!ok) return false;
        }
        Matvec head = {logits, x, norm, w, nullptr, nullptr, N, C, OC, false};
        return run(version, stream, head, t);
    }
};

static void time_chain(Ladder& ladder, const char* name, Chain& chain, std::vector<int> rows) {
    cudaStream_t stream = ladder.stream;
    static double copy_bytes_a_us = 0;
    if (copy_bytes_a_us == 0) {
        copy_bytes_a_us = copy_rate(stream);
        printf("\nAll linear layers of a token as one CUDA graph; weights at the rate of a copy, %.0f GB/s, in the same run.\n\n", copy_bytes_a_us / 1e3);
        printf("| model | rows | version | µs | µs of the bytes | ratio |\n| --- | --- | --- | --- | --- | --- |\n");
    }
    for (int N : rows) {
        chain.N = N;
        std::vector<float> serial;  // version 3's
        for (int version = 2; version <= LIBRARY; version++) {
            if (!ladder.wanted(version) || (version == 2 && N > 2)) continue;
            if (!chain.launch(stream, version)) continue;
            CUDA_CHECK(cudaStreamSynchronize(stream));
            CUDA_CHECK(cudaMemset(chain.logits, 0xff, chain.logits.size * sizeof(floatX)));
            double us = step_us(stream, [&] { chain.launch(stream, version); });
            double bytes_us = chain.bytes() / copy_bytes_a_us;
            printf("| %s | %d | %d | %.1f | %.1f | %.2f |\n", name, N, version, us, bytes_us, us / bytes_us);
            fflush(stdout);
            if (version != 3 && version != OVERLAPPED) continue;
            std::vector<float> logits = chain.logits.to_host();
            logits.resize((int64_t)N * chain.OC);
            if (version == 3) serial = logits;
            if (version == OVERLAPPED && !serial.empty())  // a launch that reads too early would show here
                ladder.check(format("chain %s N=%d", name, N), {{"logits", serial, [&] { return logits; }, [] {}, 0, 0}},
                             [](int v) { return v == OVERLAPPED; });
        }
    }
}

int main(int argc, char** argv) {
    Ladder ladder(
        "matvec",
        {"a warp an output", "16-byte reads (in use where 3 refuses)", "tensor cores, all weights on their way at once, norm, GELU and residual inside",
         "3, begun before its predecessor ends (in use)", "layernorm_forward and cuBLASLt"},
        argc, argv);
    for (const Case& c : std::initializer_list<Case>{{1, 1, 1, false, true, false, false},
                                                     {3, 70, 33, true, true, true, false},
                                                     {2, 72, 33, true, true, false, true},
                                                     {5, 8, 2, false, false, false, true},
                                                     {8, 40, 34, true, true, true, true},
                                                     {16, 1032, 70, true, false, false, false},
                                                     {15, 70, 33, true, true, false, true},
                                                     {5, 768, 48, true, true, true, false, false, 1},
                                                     {1, 768, 2304, true, true, false, false},
                                                     {1, 768, 768, false, true, false, true, true},
                                                     {2, 768, 3072, true, true, true, false},
                                                     {5, 3072, 768, false, true, false, true},
                                                     {5, 3072, 768, false, true, false, true, true},
                                                     {8, 1600, 4800, true, true, false, false},
                                                     {16, 1600, 1608, true, true, true, true},
                                                     {16, 6400, 1600, false, true, false, true},
                                                     {13, 6408, 264, false, true, false, true},
                                                     {16, 1280, 520, true, true, true, false},
                                                     {16, 768, 768, true, true, true, true},
                                                     {11, 4096, 72, false, true, true, true},
                                                     {7, 2056, 40, true, true, false, false},
                                                     {1, 768, 50304, true, false, false, false}})
        check(ladder, c);

    if (argc < 2 || strcmp(argv[argc - 1], "--check") != 0) {
        for (int N : {1, 8, 16})
            for (const Case& c : std::initializer_list<Case>{{N, 768, 2304, true, true, false, false},
                                                             {N, 768, 768, false, true, false, true},
                                                             {N, 768, 3072, true, true, true, false},
                                                             {N, 3072, 768, false, true, false, true},
                                                             {N, 768, 50304, true, false, false, false}})
                time_one(ladder, c);
        {
            Chain chain(12, 768, 50304);
            time_chain(ladder, "124M", chain, {1, 2, 8, 16});
        }
        Chain chain(48, 1600, 50304);
        time_chain(ladder, "1558M", chain, {1, 8, 16});
    }
    return ladder.finish();
}
