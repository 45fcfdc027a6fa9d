// The classifier: loss_n = lse(logits_n) − logits_n[target_n], and the row of logits becomes its gradient scale·(softmax − onehot).
//
// The logits are read once and written once: 16384 rows of 50304 columns in bf16 move 3.30 GB, 1.10 ms at the 3.0 TB/s of an H100. Two exponentials a logit
// (one for the sum, one for the gradient) are 1.65 billion, 0.46 ms of the special function units; with 15 instructions a logit in all, 0.43 ms of issue slots.
//
//   1  a block a row, three passes: maximum, sum of exponentials, gradient. Three reads, of which the second and third find the row in the L2 cache if it is
//      still there (132·4 rows of 100 KB at a time are 53 MB, more than the cache has)
//   2  online softmax: the sum is scaled whenever the maximum rises, so that one pass finds both. Expected: two reads instead of three. In use for rows
//      that are not whole multiples of 16 bytes
//   3  16 bytes an access, five of them in flight, one rescaling for eight logits, 2^x in one instruction. Expected: not held up by instructions any more;
//      the second read comes from the L2 cache in part
//   4  the row stays in shared memory (100 KB: two rows a multiprocessor), so that it is read once. Expected: the memory's rate. In use
//      (gpt2/cuda/classifier.cuh)
#define GPT2_NO_MAIN
#include "ladder.h"

#include "../../gpt2/cuda/classifier.cuh"
#include "../../train_gpt2.cpp"

using namespace gpu;

__global__ void classifier_kernel1(floatX* logits, int64_t Vp, float* losses, const int* targets, int V, const float* scale, bool write_gradient) {
    __shared__ float shared[64];
    int64_t n = blockIdx.x;
    floatX* row = logits + n * Vp;
    int target = targets[n];
    float highest = -INFINITY, sum = 0, correct = target >= 0 ? to_float(row[target]) : 0;
    for (int c = threadIdx.x; c < V; c += blockDim.x) highest = fmaxf(highest, to_float(row[c]));
    highest = block_max(highest, shared);
    for (int c = threadIdx.x; c < V; c += blockDim.x) sum += expf(to_float(row[c]) - highest);
    sum = block_sum(sum, shared + 32);
    if (threadIdx.x == 0) losses[n] = target >= 0 ? logf(sum) + highest - correct : 0;
    if (!write_gradient) return;
    for (int c = threadIdx.x; c < Vp; c += blockDim.x) {
        float p = target >= 0 && c < V ? expf(to_float(row[c]) - highest) / sum : 0;
        row[c] = from_float<floatX>(*scale * (p - (c == target)));
    }
}

static bool run(int version, cudaStream_t stream, floatX* logits, int64_t Vp, float* losses, const int* targets, int64_t rows, int V, const float* scale,
                bool write_gradient) {
    switch (version) {
        case 1:
            classifier_kernel1<<<(unsigned)rows, 512, 0, stream>>>(logits, Vp, losses, targets, V, scale, write_gradient);
            return true;
        case 2:
            classifier_kernel2<<<(unsigned)rows, CLASSIFIER2_THREADS, 0, stream>>>(logits, Vp, losses, targets, V, scale, write_gradient);
            return true;
        case 3:
            if (Vp % Packed<floatX>::size != 0) return false;
            classifier_kernel4<false><<<(unsigned)rows, CLASSIFIER_THREADS, 0, stream>>>(logits, Vp, losses, targets, V, scale, write_gradient);
            return true;
        default:
            classifier(stream, logits, Vp, losses, targets, rows, V, scale, write_gradient);
            return true;
    }
}

static void check(Ladder& ladder, int64_t rows, int V, int64_t Vp, double std) {
    std::vector<float> numbers = random_numbers(rows * Vp, 1, std), losses(rows);
    std::vector<int> targets;
    for (int64_t n = 0; n < rows; n++) {
        targets.push_back(n % 5 == 3 ? -1 : n == 0 ? V - 1 : (int)(n * 7919 % V));
        if (n % 2 && V > 1) numbers[n * Vp + (targets[n] + 1) % V] = -INFINITY;
    }
    constexpr float scale = 1000;  // large enough for the gradients of single tokens to count in the comparison
    DeviceArray<floatX> d_logits(rows * Vp);
    DeviceArray<float> d_losses(rows), d_scale(std::vector<float>{scale});
    DeviceArray<int> d_targets(targets);
    for (bool write_gradient : {false, true}) {
        std::vector<float> logits = numbers, result;
        for (int64_t n = 0; n < rows; n++)  // what stands in the padding columns must not matter
            for (int64_t c = V; c < Vp; c++) logits[n * Vp + c] = write_gradient ? NAN : 1000;
        result = logits;
        for (int64_t n = 0; n < rows; n++) {
            std::vector<float> row(&logits[n * Vp], &logits[n * Vp] + V);
            losses[n] = (float)cpu::classifier_row(row.data(), V, targets[n], scale);
            if (!write_gradient) continue;
            std::fill_n(&result[n * Vp], Vp, 0.f);
            std::copy(row.begin(), row.end(), &result[n * Vp]);
        }
        std::vector<Output> outputs = {accumulated("logits", d_logits, logits, result), output("losses", d_losses, losses, 2e-5)};
        if (write_gradient) {  // the gradient at the target is much larger than all others: these once more, without it
            auto without_targets = [targets, Vp](std::vector<float> x) {
                for (size_t n = 0; n < targets.size(); n++)
                    if (targets[n] >= 0) x[n * Vp + targets[n]] = 0;
                return x;
            };
            outputs.push_back(
                {"other tokens", without_targets(result), [&, without_targets] { return without_targets(d_logits.to_host()); }, [] {}, TOLERANCE, 1e-6});
        }
        ladder.check(format("rows=%ld V=%d Vp=%ld std=%g%s", (long)rows, V, (long)Vp, std, write_gradient ? "" : ", losses only"), outputs,
                     [&](int version) { return run(version, ladder.stream, d_logits, Vp, d_losses, d_targets, rows, V, d_scale, write_gradient); });
    }
}

int main(int argc, char** argv) {
    Ladder ladder("classifier", {"three passes", "online softmax: two reads", "16 bytes a thread", "the row in shared memory: one read (in use)"}, argc, argv);
    check(ladder, 5, 1, 8, 1);
    check(ladder, 7, 10, 13, 1);
    check(ladder, 9, 257, 384, 1);
    check(ladder, 9, 257, 384, 30);
    check(ladder, 6, 4099, 4104, 2);
    check(ladder, 12, 50257, 50304, 1);
    check(ladder, 4, 50257, 50257, 1);
    check(ladder, 3, 200000, 200064, 1);  // no room for such a row in shared memory

    int64_t rows = 16384, Vp = 50304;
    std::vector<float> some = random_numbers(rows * 64, 2);
    DeviceArray<floatX> d_some(some), d_logits(rows * Vp);
    for (int64_t i = 0; i < d_logits.size; i += d_some.size)
        CUDA_CHECK(cudaMemcpy(d_logits + i, d_some, std::min(d_some.size, d_logits.size - i) * sizeof(floatX), cudaMemcpyDeviceToDevice));
    std::vector<int> targets;
    for (int64_t n = 0; n < rows; n++) targets.push_back((int)(n * 7919 % 50257));
    DeviceArray<int> d_targets(targets);
    DeviceArray<float> d_losses(rows), d_scale(std::vector<float>{1});
    double bytes = (double)rows * Vp * sizeof(floatX);
    ladder.time("16384×50257", {0, 2 * bytes},
                [&](int version) { return run(version, ladder.stream, d_logits, Vp, d_losses, d_targets, rows, 50257, d_scale, true); });
    ladder.time("16384×50257, losses only", {0, bytes},
                [&](int version) { return run(version, ladder.stream, d_logits, Vp, d_losses, d_targets, rows, 50257, d_scale, false); });
    return ladder.finish();
}
