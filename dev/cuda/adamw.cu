// AdamW over all parameters: m = β1·m + (1−β1)g, v = β2·v + (1−β2)g², p −= lr·(m̂/(√v̂+ε) + decay·p), g = 0; g is first scaled by
// clip/norm if the norm is larger.
//
// Four float32 arrays are read and written, and the bf16 copy of the parameters is written: 34 bytes a parameter. GPT-2 124M with its padded vocabulary has
// 124.5 million: 4.23 GB, 1.41 ms at the 3.0 TB/s of an H100. Some 45 instructions a parameter (square root and division as IEEE has them) are 0.2 ms of its
// issue slots.
//
//   1  a launch for each of the 148 tensors, a thread a number. Expected: the large tensors at the memory's rate less what 4-byte accesses cost; the 98
//      vectors of a few thousand numbers take a launch each, some 2 µs, and leave the machine idle
//   2  one launch: the tensors cut into pieces of at most 2^15 numbers, a block a piece; the table of pieces is made once. Expected: 0.3 ms less
//   3  16 bytes an access. Expected: the memory's rate. In use (gpt2/cuda/adamw.cuh)
//
// Times: after the first run all gradients are zero, as adamw leaves them.
#include "parameter_list.h"

using namespace gpu;

__global__ void adamw_kernel1(AdamWTensor t, const AdamWStep* step, const GlobalNorm* norm) {
    int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= t.size || !isfinite(norm->norm)) return;
    AdamWFactors factors(*step, t, norm->norm);
    factors.update(t.weight[i], t.gradient[i], t.moment1[i], t.moment2[i]);
    t.gradient[i] = 0;
    if (t.working) t.working[i] = from_float<floatX>(t.weight[i]);
}

__global__ void adamw_kernel2(const AdamWTensor* tensors, const AdamWPiece* pieces, const AdamWStep* step, const GlobalNorm* norm) {
    if (!isfinite(norm->norm)) return;
    AdamWPiece piece = pieces[blockIdx.x];
    AdamWTensor t = tensors[piece.tensor];
    AdamWFactors factors(*step, t, norm->norm);
    for (int64_t i = piece.begin + threadIdx.x; i < piece.begin + piece.count; i += blockDim.x) {
        factors.update(t.weight[i], t.gradient[i], t.moment1[i], t.moment2[i]);
        t.gradient[i] = 0;
        if (t.working) t.working[i] = from_float<floatX>(t.weight[i]);
    }
}

// Parameters on the device, and what the launches take.
struct Device {
    Layout layout;
    DeviceArray<floatX> working;
    DeviceArray<float> weight, gradient, moment1, moment2;
    std::vector<AdamWTensor> tensors;
    std::vector<AdamWPiece> pieces;
    DeviceArray<AdamWTensor> d_tensors;
    DeviceArray<AdamWPiece> d_pieces;

    Device(const Tensors& list, int64_t alignment)
        : layout(list, alignment),
          working(layout.size),
          weight(layout.size),
          gradient(layout.size),
          moment1(layout.size),
          moment2(layout.size),
          tensors(table(list)),
          pieces(adamw_pieces(tensors)),
          d_tensors(tensors),
          d_pieces(pieces) {}
    std::vector<AdamWTensor> table(const Tensors& list) {
        Tensors masters = layout.bind(list, weight.data), parameters = layout.bind(list, working.data);
        for (size_t i = 0; i < list.specs.size(); i++)
            if (list.specs[i].storage == Storage::FLOAT32 || sizeof(floatX) == sizeof(float)) parameters.data[i] = masters.data[i];
        return adamw_tensors(parameters, masters, layout.bind(list, gradient.data), layout.bind(list, moment1.data), layout.bind(list, moment2.data));
    }
    bool run(int version, cudaStream_t stream, const AdamWStep* step, const GlobalNorm* norm) {
        if (version == 1)
            for (const AdamWTensor& t : tensors) adamw_kernel1<<<(unsigned)ceil_div(t.size, 256), 256, 0, stream>>>(t, step, norm);
        if (version == 2) adamw_kernel2<<<(unsigned)pieces.size(), ADAMW_THREADS, 0, stream>>>(d_tensors, d_pieces, step, norm);
        if (version == 3) adamw(stream, d_tensors, d_pieces, (int)pieces.size(), step, norm);
        return true;
    }
};

// A step with so large a learning rate and decay that an error in them shows in the weights.
static void check(Ladder& ladder, const char* name, const ModelConfig& config, int64_t alignment, double grad_clip, int64_t step, float gradient_size) {
    TrainerOptions options;
    options.max_tokens = 1;
    cpu::Gpt2 model(config, options);
    randomise(model, Section::PARAMETERS, 1, 0.7f);
    randomise(model, Section::GRADIENTS, 2, gradient_size);
    randomise(model, Section::MOMENT1, 3, 0.3f);
    randomise(model, Section::MOMENT2, 4, 0.2f);
    Device device(model.parameters(), alignment);
    constexpr Section sections[] = {Section::PARAMETERS, Section::GRADIENTS, Section::MOMENT1, Section::MOMENT2};
    std::vector<std::vector<float>> before, after;
    for (Section s : sections) before.push_back(device.layout.section(model, s));
    AdamW h{0.05, 0.9, 0.95, 1e-8, 0.5, grad_clip, step};
    double norm = model.update(h);
    for (Section s : sections) after.push_back(device.layout.section(model, s));

    std::vector<float> working(device.layout.size, 7), copies = working;  // the copy of a float32 tensor does not exist: its place stays as it is
    for (size_t i = 0; i < device.tensors.size(); i++)
        if (device.tensors[i].working && std::isfinite(norm))
            std::copy_n(&after[0][device.layout.begin[i]], device.tensors[i].size, &copies[device.layout.begin[i]]);
    DeviceArray<AdamWStep> d_step(std::vector<AdamWStep>{adamw_step(h)});
    DeviceArray<GlobalNorm> d_norm(std::vector<GlobalNorm>{{norm * norm, norm}});
    ladder.check(format("%s, clip %g of norm %.3g, step %ld%s", name, grad_clip, norm, (long)step, alignment > 1 ? "" : ", not aligned"),
                 {accumulated("weights", device.weight, before[0], after[0], 2e-6), accumulated("gradients", device.gradient, before[1], after[1], 0),
                  accumulated("m", device.moment1, before[2], after[2], 1e-6), accumulated("v", device.moment2, before[3], after[3], 1e-6),
                  accumulated("copies", device.working, working, copies)},
                 [&](int version) { return device.run(version, ladder.stream, d_step, d_norm); });
}

int main(int argc, char** argv) {
    Ladder ladder("adamw", {"a launch a tensor, a thread a number", "one launch for all tensors", "16 bytes a thread (in use)"}, argc, argv);
    ModelConfig odd = model_config(1, 3, 33, 77, 50, "causal"), all = model_config(4, 4, 64, 257, 64, "infini,lightning,mla,causal");
    for (int64_t alignment : {1, 64}) {
        check(ladder, "33 channels", odd, alignment, 0, 1, 1);
        check(ladder, "33 channels", odd, alignment, 5, 2, 0.5f);     // clipped
        check(ladder, "33 channels", odd, alignment, 1e6, 1000, 3);   // not clipped
        check(ladder, "all layers", all, alignment, 1, 7, 2);         // float32 tensors, learning rate multipliers
        check(ladder, "all layers", all, alignment, 1, 7, INFINITY);  // nothing changes
    }
    check(ladder, "768 channels", model_config(1, 12, 768, 300, 64, "causal"), 64, 1, 10, 1);

    Device device(model_parameters(gpt2_124M()), 64);
    std::vector<float> some = random_numbers(1 << 20, 5), squares = some;
    for (float& x : squares) x *= x;
    fill(device.weight, some);
    fill(device.gradient, some);
    fill(device.moment1, some);
    fill(device.moment2, squares);
    DeviceArray<AdamWStep> d_step(std::vector<AdamWStep>{adamw_step({3e-4, 0.9, 0.95, 1e-8, 0.1, 1, 1000})});
    DeviceArray<GlobalNorm> d_norm(std::vector<GlobalNorm>{{9, 3}});
    double bytes = 0;
    for (const AdamWTensor& t : device.tensors) bytes += t.size * (t.working ? 32.0 + sizeof(floatX) : 32.0);
    ladder.time("GPT-2 124M", {0, bytes}, [&](int version) { return device.run(version, ladder.stream, d_step, d_norm); });
    return ladder.finish();
}
