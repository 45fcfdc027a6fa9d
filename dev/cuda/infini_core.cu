// Infini-attention's whole core (attention.cuh, section 4): what the layer does between its two projections. Forward: local softmax attention of the segments,
// the memory's write, retrieve and gate. Backward: from dA, the gradient of what the gate left, to dq, dk, dv and dβ. The parts have ladders of their own:
// attention_forward.cu, attention_backward.cu, infini_memory.cu; here they stand together, so that it shows what passes between them costs.
//
// GPT-2 124M with N = 65536 tokens: a row of q, k, v, D or A is 1536 bytes in bf16, so each of them takes 101 MB, 34 µs at the 3.0 TB/s of an H100; the
// memories are 6 MB with segments of 2048 tokens, 13 MB with 1024, 51 MB with 256. Local attention does 2·S·C
// FLOPs a token forward (two products over half of S² pairs), 2.5 times that backward.
//   forward   q, k, v in, D, A out, memories out and in: 0.17-0.20 ms. Products: 206 GFLOP at S = 2048, 0.30 ms at 690 TFLOP/s, 103 at 1024, 26 at 256, and 13
//             for the memory
//   backward  q, k, v, D, dA in, dq, dk, dv out, memories and their gradients: 0.28-0.33 ms. Products: 2.5 times local attention's, 0.75 ms at S = 2048, and 32
//             GFLOP for the memory
// As the parts stand, tokens are read again between them. Forward: k, v for the write, q and D for retrieve, 4 rows more, 0.14 ms. Backward: D, dA for the
// statistics of local attention, q, dA, dq in and dq out for what is read, k, v, dk, dv in and dk, dv out for what is written, 12 rows more, 0.40 ms.
//
//   1  the memory's kernels without Hopper's instructions. Expected: beside local attention 0.25-0.3 ms forward, 0.65 ms backward
//   2  the layer as it is in use. Expected: 0.2 ms and 0.45 ms
//
// "backward, A again": the layer keeps D, not A, which the gradient of the output projection's weight needs: it is computed once more before.
#include "ladder.h"

#include "../../attention.cuh"

using namespace gpu;

struct Layer {
    AttentionConfig config;
    std::vector<int> lengths, cu = {0};
    std::vector<gpu::TokenPlace> place;
    std::vector<int> position;
    int64_t N = 0;
    int max_len = 0;

    Layer(const std::string& options, const char* positions, int heads, int hs, const std::vector<int>& lengths) : lengths(lengths) {
        ModelConfig model;
        model.layers = 1;
        model.heads = heads;
        model.channels = heads * hs;
        parse_attention(model, options.c_str(), {}, positions);
        config = model.attention[0];
        for (int s = 0; s < (int)lengths.size(); s++) {
            for (int t = 0; t < lengths[s]; t++) place.push_back({s, t}), position.push_back(t);
            cu.push_back(cu.back() + lengths[s]);
            max_len = std::max(max_len, lengths[s]);
        }
        N = cu.back();
    }
};

// The layer's tensors on the device. No sequence starts from a state.
struct Device {
    const Layer& layer;
    int64_t C, stride;
    InfiniPass pass;
    DeviceArray<int> cu, position;
    DeviceArray<gpu::TokenPlace> place;
    DeviceArray<floatX> qkv, D, A, dA, other, dqkv;
    DeviceArray<float> beta, dbeta, lse, memories;
    DeviceArray<char> scratch;
    gpu::AttentionContext ctx{};

    Device(const Layer& layer, cudaStream_t stream)
        : layer(layer),
          C(layer.config.channels),
          stride(qkv_size(layer.config)),
          pass(infini_shape(layer.config, layer.N, (int64_t)layer.lengths.size(), layer.max_len, 0, layer.N)),
          cu(layer.cu),
          position(layer.position),
          place((int64_t)layer.place.size()),
          qkv(layer.N * stride),
          D(layer.N * C),
          A(layer.N * C),
          dA(layer.N * C),
          other(layer.N * C),
          dqkv(layer.N * stride),
          beta(random_numbers(layer.config.heads, 2)),
          dbeta(layer.config.heads),
          lse(layer.N * layer.config.heads),
          memories(pass.max_memories * infini_memory_size(layer.config)),
          scratch(gpu::infini_scratch(layer.config, layer.N, (int64_t)layer.lengths.size(), layer.max_len, layer.N, true)) {
        CUDA_CHECK(cudaMemcpy(place, layer.place.data(), layer.place.size() * sizeof(gpu::TokenPlace), cudaMemcpyHostToDevice));
        ctx.config = &layer.config;
        ctx.stream = stream;
        ctx.num_seqs = (int)layer.lengths.size();
        ctx.num_tokens = layer.N;
        ctx.max_len = layer.max_len;
        ctx.cu_seqlens = cu;
        ctx.cu_seqlens_host = layer.cu.data();
        ctx.place = place;
        ctx.position = position;
        ctx.scratch = {scratch.data, scratch.size};
    }
    // The tables that the layer makes before either direction.
    void begin() { infini_begin(ctx.stream, pass, cu, place, {}, qkv, memories, ctx.scratch); }

    bool with(int version, InfiniPass* p) const {
        *p = pass;
        if (version == 1) p->hopper = false, p->sequence_blocks = p->write_blocks = p->ranges = 0;
        return version == 1 || pass.hopper;
    }
    bool forward(int version) {
        InfiniPass p;
        if (!with(version, &p)) return false;
        infini_core_forward(ctx, p, beta, D, lse, A);
        return true;
    }
    bool backward(int version, bool again) {
        InfiniPass p;
        if (!with(version, &p)) return false;
        if (again) infini_retrieve(ctx.stream, p, beta, D, A);
        infini_core_backward(ctx, p, beta, dbeta, D, lse, dA, other, dqkv);
        return true;
    }
};

static std::vector<float> columns(const std::vector<float>& x, int64_t stride, int64_t begin, int64_t end) {
    std::vector<float> y;
    for (int64_t row = 0; row < (int64_t)x.size(); row += stride) y.insert(y.end(), x.begin() + row + begin, x.begin() + row + end);
    return y;
}

static void check(Ladder& ladder, const char* options, const char* positions, int heads, int hs, const std::vector<int>& lengths) {
    Layer layer(options, positions, heads, hs, lengths);
    const AttentionConfig& a = layer.config;
    int64_t N = layer.N, C = a.channels, stride = qkv_size(a), KVhs = infini_row_size(a) / 2;
    std::string shape = format("%s %s NH=%d hs=%d", options, positions, heads, hs);
    for (size_t s = 0; s < lengths.size(); s++) shape += format("%s%d", s ? "," : " T=", lengths[s]);

    // The CPU's layer between its projections.
    std::vector<cpu::TokenPlace> place;
    for (const gpu::TokenPlace& p : layer.place) place.push_back({p.seq, p.pos});
    std::vector<float> qkv = random_numbers(N * stride, 1), beta = random_numbers(heads, 2), dA = random_numbers(N * C, 4);
    std::vector<float> memories((N / a["segment"] + lengths.size()) * infini_memory_size(a)), D(N * C), lse(N * heads), A(N * C),
        dD = dA, dn(N * C), dden(N * heads), dbeta(heads), dqkv(N * stride), scratch(cpu::infini_scratch(a, N, (int64_t)lengths.size(), N, true));
    cpu::AttentionContext ctx{};
    ctx.config = &a;
    ctx.num_seqs = (int)lengths.size();
    ctx.cu_seqlens = layer.cu.data();
    ctx.place = place.data();
    ctx.scratch = {scratch.data(), (int64_t)scratch.size()};
    cpu::InfiniPass pass = cpu::infini_pass(ctx, qkv.data(), std::vector<float*>(lengths.size()), memories.data());
    cpu::infini_local_forward(ctx, pass, D.data(), lse.data());
    cpu::infini_write(pass);
    cpu::infini_retrieve(pass, beta.data(), D.data(), A.data());
    cpu::infini_gate_backward(pass, beta.data(), dbeta.data(), D.data(), dD.data(), dn.data(), dden.data());
    cpu::infini_local_backward(ctx, pass, D.data(), lse.data(), dD.data(), dqkv.data());
    cpu::infini_query_backward(pass, dn.data(), dden.data(), dqkv.data());
    cpu::infini_memory_backward(pass, dn.data(), dden.data(), dqkv.data());

    Device device(layer, ladder.stream);
    device.qkv.copy_from(qkv);
    device.beta.copy_from(beta);
    device.dA.copy_from(dA);
    device.begin();
    std::vector<Output> outputs = {output("D", device.D, D), output("A", device.A, A)};
    ladder.check("forward " + shape, outputs, [&](int v) {
        CUDA_CHECK(cudaMemsetAsync(device.memories, 0xff, device.memories.size * sizeof(float), ladder.stream));
        return device.forward(v);
    });
    outputs = {accumulated("dbeta", device.dbeta, std::vector<float>(heads), dbeta)};
    const char* names[] = {"dq", "dk", "dv"};
    int64_t parts[] = {0, C, C + KVhs, stride};
    for (int k = 0; k < 3; k++)
        outputs.push_back({names[k], columns(dqkv, stride, parts[k], parts[k + 1]),
                           [&, k] { return columns(device.dqkv.to_host(), stride, parts[k], parts[k + 1]); },
                           [&] { CUDA_CHECK(cudaMemset(device.dqkv, 0xff, device.dqkv.size * sizeof(floatX))); }, TOLERANCE, 1e-6});
    ladder.check("backward " + shape, outputs, [&](int v) { return device.forward(v) && device.backward(v, true); });
}

static void time(Ladder& ladder, const char* update, int B, int T, int S) {
    constexpr int heads = 12, hs = 64;
    std::string options = format("infini:segment=%d:memory-update=%s:first-segment=gated", S, update);
    std::string shape = format("%s B=%d NH=%d T=%d hs=%d S=%d", update, B, heads, T, hs, S);
    Layer layer(options, "none", heads, hs, std::vector<int>(B, T));
    Device device(layer, ladder.stream);
    int64_t N = layer.N, C = heads * hs;
    auto fill = [](DeviceArray<floatX>& array, uint64_t seed, double std) {  // a million random numbers again and again
        DeviceArray<floatX> numbers(random_numbers(1 << 20, seed, std));
        for (int64_t i = 0; i < array.size; i += numbers.size)
            CUDA_CHECK(cudaMemcpy(array + i, numbers, std::min(numbers.size, array.size - i) * sizeof(floatX), cudaMemcpyDeviceToDevice));
    };
    fill(device.qkv, 1, 1);
    fill(device.dA, 4, 1);
    device.dbeta.copy_from(std::vector<float>(heads));
    device.begin();
    double row = (double)N * C * sizeof(floatX), memories = (double)B * (T / S) * infini_memory_size(layer.config) * 4;
    double local = 2.0 * N * S * C, product = 2.0 * N * C * hs;
    ladder.time("forward " + shape, {local + product * (device.pass.delta ? 3 : 2), 5 * row + 2 * memories}, [&](int v) { return device.forward(v); });
    ladder.time("backward " + shape, {2.5 * local + product * (device.pass.delta ? 9 : 5), 8 * row + 3 * memories},
                [&](int v) { return device.backward(v, false); });
    ladder.time("backward, A again " + shape, {2.5 * local + product * (device.pass.delta ? 9 : 5), 8 * row + 3 * memories},
                [&](int v) { return device.backward(v, true); });
}

int main(int argc, char** argv) {
    Ladder ladder("infini_core", {"the memory without Hopper's instructions", "as the layer does it (in use)"}, argc, argv);
    check(ladder, "infini:segment=64", "none", 2, 64, {200, 0, 1, 64, 130});
    check(ladder, "infini:segment=64:first-segment=gated", "none", 3, 64, {64, 256, 63});
    check(ladder, "infini:segment=7:memory-update=delta", "rope", 2, 64, {5, 0, 23});
    check(ladder, "infini:segment=100:kv-heads=2:first-segment=gated", "rope", 4, 64, {350, 100});
    check(ladder, "infini:segment=64:memory-init=zero:memory-update=delta", "none", 2, 64, {256, 256});
    check(ladder, "infini:segment=16:kv-heads=1", "none", 3, 20, {40, 7, 0, 33});
    check(ladder, "infini:segment=256:first-segment=gated", "none", 12, 64, {512, 512, 512});
    for (const char* update : {"linear", "delta"}) {
        time(ladder, update, 2, 32768, 2048);
        time(ladder, update, 8, 8192, 1024);
        time(ladder, update, 64, 1024, 256);
    }
    return ladder.finish();
}
