// The ladder of merging: attention over two sets of keys from what each of them gave (gpt2/cuda/merge.cuh).
//
//     m = max(lse1, lse2)      w = exp(lse − m)      o = (w1·o1 + w2·o2)/(w1 + w2)      lse = m + ln(w1 + w2)
//
// Bytes: o1, o2 and o, 3·NH·d numbers a token, beside which 4·3·NH for the lse are little. 8192 tokens, 16 heads of 128, bf16: 102 MB, 34 µs at 3.0 TB/s.
//
//   1 a thread a number.
//   2 a thread 16 bytes: an eighth of the exponentials, which every thread of a row makes for itself, and of the loads. Expected: the memory's limit.
//
// A control: one part's lse in the wrong base (log₂ e times what it should be) must be seen.
#include "../../gpt2/cuda/merge.cuh"
#include "../../gpt2/cuda/softmax.cuh"

#include "ladder.h"

using namespace gpu;

// o1, o2 (N,NH·d), lse1, lse2 (N,NH); some rows of each part, or of both, saw no key: their lse is −inf and their o NaN.
struct Parts {
    std::vector<float> o1, o2, lse1, lse2;
    Parts(int64_t N, int heads, int d, uint64_t seed) {
        o1 = random_numbers(N * heads * d, seed);
        o2 = random_numbers(N * heads * d, seed + 1);
        lse1 = random_numbers(N * heads, seed + 2, 3, 5);
        lse2 = random_numbers(N * heads, seed + 3, 3, 5);
        for (int64_t r = 0; r < N * heads; r++) {
            uint32_t dice = philox(seed, (uint32_t)r, 0, 0, 2).word[0] % 8;
            if (dice == 0 || dice == 2) lse1[r] = -INFINITY, std::fill_n(&o1[r * d], d, NAN);
            if (dice == 1 || dice == 2) lse2[r] = -INFINITY, std::fill_n(&o2[r * d], d, NAN);
        }
        int64_t all = N * heads / 2;  // a row whose first part has all the weight
        lse1[all] = 500;
        std::fill_n(&o1[all * d], d, 1.f);
    }
};
std::vector<float> transposed(const std::vector<float>& x, int64_t N, int heads) {
    std::vector<float> y(x.size());
    for (int64_t n = 0; n < N; n++)
        for (int h = 0; h < heads; h++) y[h * N + n] = x[n * heads + h];
    return y;
}

bool run_version(int version, cudaStream_t stream, floatX* o, float* lse, const floatX* o1, const float* lse1, const floatX* o2, const float* lse2, int64_t N,
                 int heads, int d) {
    if (version == 2) {
        if (d % Packed<floatX>::size) return false;
        softmax_merge(stream, o, lse, o1, lse1, o2, lse2, N, heads, d);
        return true;
    }
    softmax_merge_kernel<1>
        <<<(unsigned)ceil_div(N * heads * d, MERGE_PARTS_THREADS), MERGE_PARTS_THREADS, 0, stream>>>(o, lse, o1, lse1, o2, lse2, N, heads, d);
    LAUNCH_CHECK();
    return true;
}

// False: the control has not been seen.
bool check(Ladder& ladder, int64_t N, int heads, int d, uint64_t seed) {
    Parts parts(N, heads, d, seed);
    std::vector<float> o = parts.o1, lse = parts.lse1;
    cpu::softmax_merge(o.data(), lse.data(), parts.o2.data(), parts.lse2.data(), N * heads, d);
    DeviceArray<floatX> o1(parts.o1), o2(parts.o2), out(o.size());
    DeviceArray<float> lse1(transposed(parts.lse1, N, heads)), lse2(transposed(parts.lse2, N, heads)), lse_out(lse.size());
    auto run = [&](int version) { return run_version(version, ladder.stream, out, lse_out, o1, lse1, o2, lse2, N, heads, d); };
    std::string shape = format("%lld tokens, NH %d d %d", (long long)N, heads, d);
    ladder.check(shape, {output("o", out, o), output("lse", lse_out, transposed(lse, N, heads))}, run);

    std::vector<float> wrong = transposed(parts.lse2, N, heads);
    for (float& x : wrong) x *= LOG2E;
    lse2.copy_from(wrong);
    softmax_merge(ladder.stream, out, nullptr, o1, lse1, o2, lse2, N, heads, d);
    CUDA_CHECK(cudaDeviceSynchronize());
    std::vector<float> misled = out.to_host();
    double difference = 0, norm = 0;
    for (size_t i = 0; i < o.size(); i++) difference += std::pow((double)misled[i] - o[i], 2), norm += (double)o[i] * o[i];
    bool seen = std::sqrt(difference / norm) > 10 * TOLERANCE;
    if (!seen) printf("check merge control %s: a wrong base of the logarithm is not seen FAIL\n", shape.c_str());
    return seen;
}

void time(Ladder& ladder, int64_t N, int heads, int d) {
    Parts parts(N, heads, d, 5);
    DeviceArray<floatX> o1(parts.o1), o2(parts.o2), out(parts.o1.size());
    DeviceArray<float> lse1(parts.lse1), lse2(parts.lse2);
    double rows = (double)N * heads;
    ladder.time(format("N %lld, NH %d d %d", (long long)N, heads, d), {rows * d * 4, rows * (3.0 * d * sizeof(floatX) + 8)},
                [&](int version) { return run_version(version, ladder.stream, out, nullptr, o1, lse1, o2, lse2, N, heads, d); });
}

int main(int argc, char** argv) {
    Ladder ladder("merge", {"a thread a number", "16 bytes a thread (in use)"}, argc, argv);
    bool seen = true;
    seen = check(ladder, 1000, 3, 64, 1) && seen;
    seen = check(ladder, 77, 16, 128, 2) && seen;
    seen = check(ladder, 33, 1, 5, 3) && seen;
    seen = check(ladder, 513, 13, 24, 4) && seen;
    time(ladder, 2048, 12, 64);
    time(ladder, 8192, 16, 128);
    return ladder.finish() || !seen;
}
