// The global norm of the gradients: √Σg² over all parameters.
//
// Every gradient is read once: GPT-2 124M's 124.5 million are 498 MB of float32, 166 µs at the 3.0 TB/s of an H100. The order of summation is fixed: the same
// gradients give the same norm, and so the same step, on every run.
//
//   1  a launch and one block for each of the 148 tensors, then one thread adds up their sums. Expected: milliseconds, since the largest tensor (wte, 155 MB)
//      passes through one multiprocessor of 132
//   2  one launch: a block for each piece of at most 2^15 numbers, then one block adds up the pieces' sums in double. Expected: near the memory's rate;
//      4 bytes an access
//   3  16 bytes an access, four of them in flight. Expected: the memory's rate. In use (gpt2/cuda/adamw.cuh)
#include "parameter_list.h"

using namespace gpu;

__global__ void global_norm_kernel1(double* partial, const float* g, int64_t n) {
    __shared__ float shared[32];
    float sum = 0;
    for (int64_t i = threadIdx.x; i < n; i += blockDim.x) sum += g[i] * g[i];
    sum = block_sum(sum, shared);
    if (threadIdx.x == 0) *partial = sum;
}
__global__ void global_norm_total_kernel1(GlobalNorm* result, const double* partial, int n) {
    double sum = 0;
    for (int i = 0; i < n; i++) sum += partial[i];
    *result = {sum, sqrt(sum)};
}

__global__ void global_norm_kernel2(double* partial, const AdamWTensor* tensors, const AdamWPiece* pieces) {
    __shared__ float shared[32];
    AdamWPiece piece = pieces[blockIdx.x];
    const float* g = tensors[piece.tensor].gradient + piece.begin;
    float sum = 0;
    for (int i = threadIdx.x; i < piece.count; i += blockDim.x) sum += g[i] * g[i];
    sum = block_sum(sum, shared);
    if (threadIdx.x == 0) partial[blockIdx.x] = sum;
}

struct Device {
    Layout layout;
    DeviceArray<float> gradient;
    DeviceArray<GlobalNorm> result{1};
    std::vector<AdamWTensor> tensors;
    std::vector<AdamWPiece> pieces;
    DeviceArray<AdamWTensor> d_tensors;
    DeviceArray<AdamWPiece> d_pieces;

    Device(const Tensors& list, int64_t alignment)
        : layout(list, alignment),
          gradient(layout.size),
          tensors(table(layout.bind(list, gradient.data))),
          pieces(adamw_pieces(tensors)),
          d_tensors(tensors),
          d_pieces(pieces) {}
    static std::vector<AdamWTensor> table(const Tensors& gradients) {  // the norm asks for the gradients only
        return adamw_tensors(gradients, gradients, gradients, gradients, gradients);
    }
    bool run(int version, cudaStream_t stream) {
        double* partial = (double*)workspace();
        int n = (int)tensors.size();
        if (version == 1) {
            for (int t = 0; t < n; t++) global_norm_kernel1<<<1, 1024, 0, stream>>>(partial + t, tensors[t].gradient, tensors[t].size);
            global_norm_total_kernel1<<<1, 1, 0, stream>>>(result, partial, n);
        }
        if (version == 2) {
            global_norm_kernel2<<<(unsigned)pieces.size(), NORM_THREADS, 0, stream>>>(partial, d_tensors, d_pieces);
            global_norm_total_kernel3<<<1, NORM_TOTAL_THREADS, 0, stream>>>(result, partial, (int)pieces.size());
        }
        if (version == 3) global_norm(stream, result, d_tensors, d_pieces, (int)pieces.size());
        return true;
    }
    std::vector<float> read() const {
        GlobalNorm r;
        CUDA_CHECK(cudaMemcpy(&r, result, sizeof r, cudaMemcpyDeviceToHost));
        return {(float)r.norm, (float)std::sqrt(r.squares)};
    }
};

static void check(Ladder& ladder, const char* name, const ModelConfig& config, int64_t alignment, float gradient_size) {
    TrainerOptions options;
    options.max_tokens = 1;
    cpu::Gpt2 model(config, options);
    randomise(model, Section::GRADIENTS, 1, gradient_size);
    Device device(model.parameters(), alignment);
    std::vector<float> gradient = device.layout.section(model, Section::GRADIENTS);
    float norm = (float)model.update({1e-3, 0.9, 0.95, 1e-8, 0, 0, 1});
    Output result{"norm",
                  {norm, norm},
                  [&] { return device.read(); },
                  [&] {
                      device.gradient.copy_from(gradient);
                      CUDA_CHECK(cudaMemset(device.result, 0xff, sizeof(GlobalNorm)));
                  },
                  1e-5,
                  0};
    ladder.check(format("%s, norm %.3g%s", name, norm, alignment > 1 ? "" : ", not aligned"), {result},
                 [&](int version) { return device.run(version, ladder.stream); });
}

int main(int argc, char** argv) {
    Ladder ladder("global_norm", {"a block a tensor", "a block a piece of 2^15 numbers", "16 bytes a thread (in use)"}, argc, argv);
    ModelConfig odd = model_config(1, 3, 33, 77, 50, "causal"), all = model_config(4, 4, 64, 257, 64, "infini,lightning,mla,causal");
    for (int64_t alignment : {1, 64}) {
        check(ladder, "33 channels", odd, alignment, 1);
        check(ladder, "all layers", all, alignment, 1e-3f);
        check(ladder, "all layers", all, alignment, INFINITY);
    }
    check(ladder, "768 channels", model_config(1, 12, 768, 300, 64, "causal"), 64, 1);

    Device device(model_parameters(gpt2_124M()), 64);
    fill(device.gradient, random_numbers(1 << 20, 2));
    ladder.time("GPT-2 124M", {0, 4.0 * device.layout.size}, [&](int version) { return device.run(version, ladder.stream); });
    return ladder.finish();
}
