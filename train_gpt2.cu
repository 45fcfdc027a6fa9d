// GPT-2 on the GPU: the twin of train_gpt2.cpp, function for function, read from top to bottom.
//
//   1. layers      stand in gpt2/cuda, one header a family; here only what belongs to the model alone
//   2. the model   parameters, gradients, activations; forward, backward, update; extend for generation
//   3. main        options, the training loop, evaluation and generation are shared with the CPU trainer: gpt2/program.h
//
// Attention is behind the seam in attention.cuh: nothing here knows which layer it is.
// Storage is floatX, bf16 or (in the build with -DGPU_FLOAT32, which stands in the same program) float32; master weights, gradients of parameters, moments and
// statistics are float32. All work is queued on one stream, and the host only waits for a loss when it is asked for one: a step's inputs go down in one
// copy, its loss and norm come back in another, and passes of the same shape are replayed as a CUDA graph.
// Shapes: N tokens (B·T of them in a dense batch), C channels, V vocabulary, Vp padded vocabulary, L layers. All matrices row-major, weights (out, in).
#include <algorithm>
#include <climits>
#include <cmath>
#include <cstring>
#include <deque>
#include <limits>
#include <memory>
#include <vector>

#include "attention.cuh"
#include "gpt2/cuda/adamw.cuh"
#include "gpt2/cuda/classifier.cuh"
#include "gpt2/cuda/encoder.cuh"
#include "gpt2/cuda/gelu.cuh"
#include "gpt2/cuda/layernorm.cuh"
#include "gpt2/cuda/matvec.cuh"
#include "gpt2/cuda/memory.cuh"
#include "gpt2/cuda/sampler.cuh"
#include "gpt2/initialise.h"
#include "gpt2/program.h"
#include "gpt2/state.h"
#include "gpt2/trainer.h"

namespace gpu {

// --------------------------------------------------------------------------------------------------------------------------------------------------
// 1. Layers

// What a pass is given besides its tokens, and what it leaves; device memory.
struct PassParameters {
    PassCounters counters;
    float scale;        // of the gradient of each scored token's loss: grad_scale / number of them
    double mean_scale;  // 1 / number of scored tokens
    double grad_scale;  // 0 in evaluation
};
struct StepSums {
    double pass_loss;  // mean over the last pass, nats
    double step_loss;  // Σ over a step's passes of grad_scale · pass_loss
    GlobalNorm norm;   // of the gradients before clipping
};

// The sum of N losses, by one block in one order.
__global__ void mean_loss_kernel(StepSums* sums, const float* losses, int64_t N, const PassParameters* parameters) {
    __shared__ double shared[1024];
    double sum = 0;
    for (int64_t n = threadIdx.x; n < N; n += blockDim.x) sum += losses[n];
    shared[threadIdx.x] = sum;
    for (int half = blockDim.x / 2; half > 0; half /= 2) {
        __syncthreads();
        if ((int)threadIdx.x < half) shared[threadIdx.x] += shared[threadIdx.x + half];
    }
    if (threadIdx.x == 0) {
        sums->pass_loss = shared[0] * parameters->mean_scale;
        if (parameters->grad_scale != 0) sums->step_loss += sums->pass_loss * parameters->grad_scale;
    }
}

// to (rows,C) = the given rows of from (.,C).
__global__ void gather_rows_kernel(floatX* to, const floatX* from, const int* row, int64_t C) {
    for (int64_t c = threadIdx.x; c < C; c += blockDim.x) to[blockIdx.x * C + c] = from[row[blockIdx.x] * C + c];
}

// --------------------------------------------------------------------------------------------------------------------------------------------------
// 2. The model

struct Gpt2 : Trainer {
    // Everything by name, in lists: parameters, their float32 masters, gradients and AdamW's moments share one list of specs. Where the working type is
    // float32 a parameter is its own master.
    Tensors params, masters, grads, moment1, moment2, acts, dacts;
    DeviceArena params_memory, grads_memory, acts_memory;
    std::vector<Tensors> attn_params, attn_grads, attn_saved;  // each network layer's part of the lists
    DeviceBlock scratch, memory, memory_before;                // memories: (layer, lane, per_sequence) float32; `before` is what the last pass started from
    int64_t memory_numbers = 0, scratch_need = 0;
    std::unique_ptr<StatePool<floatX, float, DeviceMemory>> pool;  // from the first sequence on
    TrainerOptions options;
    cudaStream_t stream = nullptr;  // a plan has none: it is made on machines without a GPU too
    Chain chain;                    // layers of few tokens on their way to the GPU

    // What the last forward pass was given: backward goes on from it. Arrays are device memory unless a host's copy stands beside them.
    Batch batch;
    Pass pass;
    Upload upload, draws_upload, step_upload;  // of a pass; of random numbers that are wanted behind it; of an optimiser step
    const int *tokens, *targets, *cu_seqlens, *position;
    int* token_plan;  // encoder_plan of the batch's tokens; in training alone
    const TokenPlace* place;
    const PassParameters* parameters_of_pass;
    std::vector<std::vector<float*>> from_host, to_host;  // each network layer's lanes of this pass
    std::vector<float**> from, to;                        // the same, device
    int max_len = 0;

    // The optimiser, and the results of steps on their way back.
    DeviceBlock optimizer_tables;
    const AdamWTensor* optimizer_tensors;
    const AdamWPiece* optimizer_pieces;
    int num_pieces = 0;
    StepSums* sums;
    struct PendingResult {
        StepSums* host;
        cudaEvent_t ready;
    };
    std::deque<PendingResult> pending, spare;

    // The last training pass, if it can be replayed: what a graph depends on.
    struct GraphKey {
        std::vector<int> cu_seqlens;
        double dropout = -1;
        uint64_t seed = 0;
        const char *arrays = nullptr, *scratch = nullptr;
        bool operator==(const GraphKey& k) const {
            return cu_seqlens == k.cu_seqlens && dropout == k.dropout && seed == k.seed && arrays == k.arrays && scratch == k.scratch;
        }
    };
    GraphKey graph_key;
    cudaGraphExec_t graph = nullptr;

    Gpt2(const ModelConfig& c, const TrainerOptions& o) : options(o) {
        config = c;
        params_memory.plan_only = grads_memory.plan_only = acts_memory.plan_only = o.plan_only;
        params = model_parameters(c);
        masters.specs = params.specs;
        params_memory.allocate(params);
        params_memory.allocate(masters, true, has_master);
        if (o.training) {
            grads.specs = moment1.specs = moment2.specs = params.specs;
            for (Tensors* t : {&grads, &moment1, &moment2}) grads_memory.allocate(*t, true);
        }
        allocate_activations();
        for (const AttentionStateSize& s : state_sizes(c)) memory_numbers += s.per_sequence * o.lanes;
        for (const AttentionConfig& a : c.attention) {
            int64_t num_seqs = ceil_div(o.max_tokens, c.max_seq);  // more of them are met as they come
            scratch_need = std::max(scratch_need,
                                    attention(a.name).scratch(a, o.max_tokens, num_seqs, c.max_seq, training_kv_tokens(o.max_tokens, o.lanes > 0), o.training));
        }
        if (o.plan_only) return;
        chain.stream = stream = main_stream();
        scratch_need = std::max(scratch_need, encoder_backward_scratch(o.max_tokens, c.channels));
        for (size_t i = 0; i < params.specs.size(); i++)
            if (!masters.data[i]) masters.data[i] = params.data[i];
        for (int l = 0; l < c.layers; l++) {
            attn_params.push_back(params.part(format("h.%d.attn.", l)));
            attn_grads.push_back(grads.part(format("h.%d.attn.", l)));
            attn_saved.push_back(acts.part(format("h.%d.attn.", holder(l, "attn"))));
        }
        scratch.reserve(scratch_need);
        for (DeviceBlock* m : {&memory, &memory_before}) {
            m->reserve(memory_numbers * sizeof(float));
            CUDA_CHECK(cudaMemsetAsync(m->memory, 0, m->size, stream));
        }
        sums = (StepSums*)acts_memory.block(sizeof(StepSums));
        if (o.training) {
            for (Tensors* t : {&grads, &moment1, &moment2})
                for (size_t i = 0; i < t->data.size(); i++) CUDA_CHECK(cudaMemsetAsync(t->data[i], 0, t->specs[i].size() * sizeof(float), stream));
            make_optimizer_tables();
        }
        set_matmul_tuning(o.tune);
        wait_for_device();
    }
    ~Gpt2() override {
        if (stream) cudaStreamSynchronize(stream);
        if (graph) cudaGraphExecDestroy(graph);
        if (drawn) cudaFreeHost(drawn);
        for (DecodeGraph& g : decode_graphs)
            if (g.graph) cudaGraphExecDestroy(g.graph);
        for (std::deque<PendingResult>* list : {&pending, &spare})
            for (PendingResult& r : *list) {
                cudaFreeHost(r.host);
                cudaEventDestroy(r.ready);
            }
    }

    static bool has_master(const TensorSpec& s) { return sizeof(floatX) < sizeof(float) && s.storage == Storage::WORKING; }

    static std::vector<AttentionStateSize> state_sizes(const ModelConfig& c) {
        std::vector<AttentionStateSize> sizes;
        for (const AttentionConfig& a : c.attention) sizes.push_back(attention_description(a.name).state(a));
        return sizes;
    }

    // ---- activations --------------------------------------------------------------------------------------------------------------------------------

    // From which --recompute level on a layer's activation is computed again in backward instead of being kept: norms and GELU from 1, all but the block's
    // input from 2. What level 2 computes again has the same bits; so has level 1, except GELU in bf16, which it takes of the rounded input.
    static int recompute_level(const std::string& name) { return name == "ln1" || name == "ln2" || name == "gelu" ? 1 : name == "x" ? 3 : 2; }

    // The layer whose tensor layer l uses: its own if backward needs it, else one that serves all layers whose attention saves the same.
    int holder(int l, const std::string& name) const {
        if (options.training && options.recompute < recompute_level(name)) return l;
        for (int k = 0; k < l; k++)
            if (attention_string(config.attention[k]) == attention_string(config.attention[l])) return k;
        return l;
    }

    void allocate_activations() {
        int64_t N = options.max_tokens, C = config.channels;
        auto statistic_spec = [&](const char* name) { return buffer_spec(name, {N}, Storage::FLOAT32); };
        for (int l = 0; l < config.layers; l++) {
            std::string h = format("h.%d.", l);
            for (const TensorSpec& s : {buffer_spec("x", {N, C}), buffer_spec("ln1", {N, C}), statistic_spec("ln1.mean"), statistic_spec("ln1.rstd"),
                                        buffer_spec("mid", {N, C}), buffer_spec("ln2", {N, C}), statistic_spec("ln2.mean"), statistic_spec("ln2.rstd"),
                                        buffer_spec("fc", {N, 4 * C}), buffer_spec("gelu", {N, 4 * C})})
                if (holder(l, s.name) == l) acts.add(h, {s});
            if (holder(l, "attn") == l) acts.add(h + "attn.", attention(config.attention[l].name).saved(config.attention[l], N, options.lanes));
        }
        acts.add("", {buffer_spec("x", {N, C}), buffer_spec("lnf", {N, C}), statistic_spec("lnf.mean"), statistic_spec("lnf.rstd"), statistic_spec("losses"),
                      buffer_spec("logits", {logits_rows(N), config.padded_vocab_size})});
        acts_memory.allocate(acts);
        if (!options.training) return;
        dacts.add("", {buffer_spec("x", {N, C}), buffer_spec("ln", {N, C}), buffer_spec("fc", {N, 4 * C}), buffer_spec("branch", {N, C})});
        acts_memory.allocate(dacts);
    }

    // The logits of a large batch are never whole in memory: the classifier works on this many rows at a time, in equal parts of at most 1.7 GB of bf16.
    int64_t logits_rows(int64_t N) const {
        int64_t most = std::max<int64_t>(128, ((int64_t)840 << 20) / config.padded_vocab_size), parts = std::max<int64_t>(1, ceil_div(N, most));
        return std::min(N, round_up(ceil_div(N, parts), 128));
    }

    AnyPointer act(int l, const char* name) const { return acts[format("h.%d.%s", holder(l, name), name).c_str()]; }
    floatX* param(int l, const char* name) const { return params[format("h.%d.%s", l, name).c_str()]; }
    float* grad(int l, const char* name) const { return grads[format("h.%d.%s", l, name).c_str()]; }
    template <class T>
    T* wpe(const Tensors& t) const {
        return config.positions == Positions::LEARNED ? (T*)t["wpe"] : nullptr;
    }

    void initialise(uint64_t seed) override {
        std::vector<float> values;
        for (size_t t = 0; t < params.specs.size(); t++) {
            values.resize(params.specs[t].size());
            initial_values(config, params.specs, t, seed, values.data());
            set(Section::PARAMETERS, (int)t, values.data());
        }
    }

    // ---- forward ---------------------------------------------------------------------------------------------------------------------------------

    DropoutKey dropout_of(int layer) const {
        return gpu::dropout_key(pass.training ? pass.dropout : 0, pass.seed, layer, config.layers, &parameters_of_pass->counters);
    }

    // Pointers to the lanes' memories in each network layer, for each sequence of the batch; nothing where no memory is carried.
    std::vector<std::vector<float*>> lane_memories(const DeviceBlock& block, const std::vector<int>& lane) const {
        std::vector<std::vector<float*>> pointers(config.layers);
        if (lane.empty()) return pointers;
        float* layer_memory = (float*)block.memory;
        std::vector<AttentionStateSize> sizes = state_sizes(config);
        for (int l = 0; l < config.layers; l++) {
            for (int k : lane) pointers[l].push_back(k < 0 || sizes[l].per_sequence == 0 ? nullptr : layer_memory + k * sizes[l].per_sequence);
            layer_memory += sizes[l].per_sequence * options.lanes;
        }
        return pointers;
    }

    // Packs a batch for the device. `past`: how many tokens each sequence has already, or null. `more`: so many bytes will be put behind it.
    void pack_pass(const Batch& b, const Pass& p, const int64_t* past, int64_t more) {
        int64_t N = (int64_t)b.tokens.size(), count = 0;
        int S = b.num_seqs();
        assert(N <= options.max_tokens && (!p.training || options.training));
        batch = b;
        pass = p;
        if (!b.memory_from.empty()) std::swap(memory.memory, memory_before.memory);
        from_host = lane_memories(memory_before, b.memory_from);
        to_host = lane_memories(memory, b.memory_to);

        std::vector<TokenPlace> places(N);
        std::vector<int> positions(N);
        max_len = 0;
        for (int s = 0; s < S; s++) {
            max_len = std::max(max_len, b.cu_seqlens[s + 1] - b.cu_seqlens[s]);
            for (int n = b.cu_seqlens[s]; n < b.cu_seqlens[s + 1]; n++) {
                places[n] = {s, n - b.cu_seqlens[s]};
                positions[n] = places[n].pos + (past ? (int)past[s] : 0);
            }
        }
        for (int t : b.targets) count += t >= 0;
        PassParameters q = {};
        q.counters = {p.step, b.first_row};
        q.scale = count ? (float)(p.grad_scale / (double)count) : 0;
        q.mean_scale = count ? 1 / (double)count : std::numeric_limits<double>::quiet_NaN();
        q.grad_scale = p.training ? p.grad_scale : 0;

        std::vector<int> plan;
        if (p.training) plan = encoder_plan(b.tokens, config.padded_vocab_size, config.channels);
        int64_t plan_bytes = (int64_t)(plan.size() * sizeof(int)), pointers = 2 * (int64_t)sizeof(float*) * config.layers;
        upload.begin(32 * N + plan_bytes + (S + 1) * (8 + pointers) + 64 * (config.layers + 16) + more);
        parameters_of_pass = upload.put(&q, 1);
        tokens = upload.put(b.tokens);
        targets = upload.put(b.targets);
        cu_seqlens = upload.put(b.cu_seqlens);
        token_plan = upload.put(plan);
        place = upload.put(places);
        position = upload.put(positions);
        from.clear();
        to.clear();
        for (int l = 0; l < config.layers; l++) {
            from.push_back(upload.put(from_host[l]));
            to.push_back(upload.put(to_host[l]));
        }
    }
    void begin_pass(const Batch& b, const Pass& p) {
        pack_pass(b, p, nullptr, 0);
        upload.send();
    }

    // A bound on the tokens of a training pass with those that carried memories hold.
    static int64_t training_kv_tokens(int64_t N, bool carried) { return carried ? INT64_MAX / 2 : N; }

    // The context of one network layer's attention.
    AttentionContext context(int layer, int64_t kv_tokens, bool training) {
        const AttentionConfig& a = config.attention[layer];
        scratch.reserve(attention(a.name).scratch(a, (int64_t)batch.tokens.size(), batch.num_seqs(), max_len, kv_tokens, training));
        AttentionContext ctx{};
        ctx.config = &a;
        ctx.stream = stream;
        ctx.num_seqs = batch.num_seqs();
        ctx.num_tokens = (int64_t)batch.tokens.size();
        ctx.max_len = max_len;
        ctx.cu_seqlens = cu_seqlens;
        ctx.cu_seqlens_host = batch.cu_seqlens.data();
        ctx.place = place;
        ctx.position = position;
        ctx.dropout = dropout_of(layer);
        ctx.scratch = {scratch.memory, scratch.size};
        if (!batch.memory_from.empty()) ctx.memory_from = from[layer], ctx.memory_from_host = from_host[layer].data();
        if (!batch.memory_to.empty()) ctx.memory_to = to[layer], ctx.memory_to_host = to_host[layer].data();
        return ctx;
    }

    AttentionContext context(int layer) {
        return context(layer, training_kv_tokens((int64_t)batch.tokens.size(), !batch.memory_from.empty()), options.training);
    }

    // out = mid + Z⊙MLP(LN2(mid)), MLP(u) = GELU(u·Wfcᵀ + bfc)·Wprojᵀ + bproj. `out` null: only what backward needs of it.
    void mlp_forward(int l, const floatX* mid, floatX* out) {
        NvtxRange range("mlp forward");
        int64_t N = (int64_t)batch.tokens.size(), C = config.channels;
        floatX *ln2 = act(l, "ln2"), *fc = act(l, "fc"), *gelu = act(l, "gelu");
        layernorm_forward(stream, ln2, act(l, "ln2.mean"), act(l, "ln2.rstd"), mid, param(l, "ln2.w"), param(l, "ln2.b"), N, C);
        linear_gelu_forward(stream, gelu, fc, ln2, param(l, "mlp.wfc"), param(l, "mlp.bfc"), N, C, 4 * C);
        if (!out) return;
        DropoutKey dropout = dropout_of(l);
        linear_forward(stream, out, gelu, param(l, "mlp.wproj"), param(l, "mlp.bproj"), N, 4 * C, C, dropout.p > 0 ? nullptr : mid);
        if (dropout.p > 0) dropout_add(stream, out, mid, out, dropout, DROP_MLP, place, N, C);
    }

    void attention_forward(int l, const floatX* x, const AttentionContext& ctx, floatX* mid) {
        NvtxRange range("attention forward");
        int64_t N = (int64_t)batch.tokens.size(), C = config.channels;
        floatX* ln1 = act(l, "ln1");
        layernorm_forward(stream, ln1, act(l, "ln1.mean"), act(l, "ln1.rstd"), x, param(l, "ln1.w"), param(l, "ln1.b"), N, C);
        attention(config.attention[l].name).forward(ctx, attn_params[l], attn_saved[l], ln1, x, mid);
    }

    floatX* block_output(int l) const { return l + 1 < config.layers ? act(l + 1, "x") : acts["x"]; }

    void forward_pass(float* logits_out = nullptr) {
        NvtxRange range("forward");
        int64_t N = (int64_t)batch.tokens.size(), C = config.channels;
        floatX* x = act(0, "x");
        encoder_forward(stream, x, tokens, position, params["wte"], wpe<floatX>(params), N, C);
        DropoutKey dropout = dropout_of(0);
        if (dropout.p > 0) dropout_add(stream, x, nullptr, x, dropout, DROP_EMBEDDING, place, N, C);
        for (int l = 0; l < config.layers; l++) {
            floatX *mid = act(l, "mid"), *next = block_output(l);
            attention_forward(l, x, context(l), mid);
            mlp_forward(l, mid, next);
            x = next;
        }
        layernorm_forward(stream, acts["lnf"], acts["lnf.mean"], acts["lnf.rstd"], x, params["lnf.w"], params["lnf.b"], N, C);
        classifier_pass(logits_out);
    }

    // Losses. In training also the gradients of the head, since each chunk of logits is at hand only here: d lnf into dacts "ln", and dwte.
    void classifier_pass(float* logits_out) {
        NvtxRange range("classifier");
        int64_t N = (int64_t)batch.tokens.size(), C = config.channels, V = config.vocab_size, Vp = config.padded_vocab_size, chunk = logits_rows(N);
        floatX *lnf = acts["lnf"], *wte = params["wte"], *logits = acts["logits"];
        float* losses = acts["losses"];
        for (int64_t n0 = 0; n0 < N; n0 += chunk) {
            int64_t rows = std::min(chunk, N - n0);
            linear_forward(stream, logits, lnf + n0 * C, wte, nullptr, rows, C, Vp);
            if (logits_out) read_rows(logits_out + n0 * V, logits, rows, V, Vp);
            classifier(stream, logits, Vp, losses + n0, targets + n0, rows, (int)V, &parameters_of_pass->scale, pass.training);
            if (pass.training) linear_backward(stream, (floatX*)dacts["ln"] + n0 * C, false, grads["wte"], nullptr, logits, lnf + n0 * C, wte, rows, C, Vp);
        }
        mean_loss_kernel<<<1, 1024, 0, stream>>>(sums, losses, N, parameters_of_pass);
        LAUNCH_CHECK();
    }

    // The first V numbers of each row to the host.
    void read_rows(float* to_rows, const floatX* device, int64_t rows, int64_t V, int64_t stride) {
        std::vector<floatX> copy(rows * V);
        CUDA_CHECK(
            cudaMemcpy2DAsync(copy.data(), V * sizeof(floatX), device, stride * sizeof(floatX), V * sizeof(floatX), rows, cudaMemcpyDeviceToHost, stream));
        wait_for_device();
        for (int64_t i = 0; i < rows * V; i++) to_rows[i] = host_float(copy[i]);
    }
    static float host_float(float x) { return x; }
    static float host_float(__nv_bfloat16 x) { return __bfloat162float(x); }

    double forward(const Batch& b, const Pass& p, float* losses, float* logits) override {
        begin_pass(b, p);
        forward_pass(logits);
        StepSums result;
        CUDA_CHECK(cudaMemcpyAsync(&result, sums, sizeof result, cudaMemcpyDeviceToHost, stream));
        if (losses) CUDA_CHECK(cudaMemcpyAsync(losses, acts["losses"], b.tokens.size() * sizeof(float), cudaMemcpyDeviceToHost, stream));
        wait_for_device();
        return result.pass_loss;
    }

    // ---- backward --------------------------------------------------------------------------------------------------------------------------------

    // What forward did not keep, once more.
    void recompute_block(int l) {
        int64_t N = (int64_t)batch.tokens.size(), C = config.channels;
        if (options.recompute >= 2) {
            AttentionContext ctx = context(l);
            ctx.memory_to = nullptr;  // which forward has written
            ctx.memory_to_host = nullptr;
            attention_forward(l, act(l, "x"), ctx, act(l, "mid"));
            mlp_forward(l, act(l, "mid"), nullptr);
        } else if (options.recompute == 1) {
            layernorm_forward(stream, act(l, "ln1"), act(l, "ln1.mean"), act(l, "ln1.rstd"), act(l, "x"), param(l, "ln1.w"), param(l, "ln1.b"), N, C);
            layernorm_forward(stream, act(l, "ln2"), act(l, "ln2.mean"), act(l, "ln2.rstd"), act(l, "mid"), param(l, "ln2.w"), param(l, "ln2.b"), N, C);
            gelu_forward(stream, act(l, "gelu"), act(l, "fc"), N * 4 * C);
        }
    }

    // Without dropout dx is the gradient of the output projections of MLP and attention as it stands, and the LayerNorms whose backward pass leaves it sum its
    // columns on the way: the projections' bias gradients. These are they; null: there is dropout (the projection's own backward pass sums), or no bias.
    float* mlp_summed(int l) const { return dropout_of(l).p > 0 ? nullptr : grad(l, "mlp.bproj"); }
    float* attention_summed(int l) const { return dropout_of(l).p > 0 || attn_grads[l].find("bo") < 0 ? nullptr : (float*)attn_grads[l]["bo"]; }
    // Likewise the first LayerNorm sums dx by position, the gradient of wpe, if all sequences are as long as the longest. Else encoder_backward does.
    PositionSums positions_summed() const {
        bool equal = (int64_t)batch.num_seqs() * max_len == (int64_t)batch.tokens.size();
        bool sums = wpe<float>(grads) && equal && dropout_of(0).p == 0 && layernorm_sums_positions(max_len, config.channels);
        return sums ? PositionSums{wpe<float>(grads), max_len} : PositionSums{};
    }

    // dx (N,C), the gradient of the block's output, becomes that of `mid`, its middle.
    void mlp_backward(int l, floatX* dx) {
        NvtxRange range("mlp backward");
        int64_t N = (int64_t)batch.tokens.size(), C = config.channels;
        floatX *dln = dacts["ln"], *dfc = dacts["fc"], *dbranch = dx;
        DropoutKey dropout = dropout_of(l);
        if (dropout.p > 0) {
            dbranch = dacts["branch"];
            dropout_add(stream, dbranch, nullptr, dx, dropout, DROP_MLP, place, N, C);
        }
        float* dbproj = mlp_summed(l) ? nullptr : grad(l, "mlp.bproj");
        linear_gelu_backward(stream, dfc, grad(l, "mlp.wproj"), dbproj, dbranch, act(l, "gelu"), act(l, "fc"), param(l, "mlp.wproj"), N, 4 * C, C,
                             grad(l, "mlp.bfc"));
        linear_backward(stream, dln, false, grad(l, "mlp.wfc"), nullptr, dfc, act(l, "ln2"), param(l, "mlp.wfc"), N, C, 4 * C);
        layernorm_backward(stream, dx, true, grad(l, "ln2.w"), grad(l, "ln2.b"), dln, act(l, "mid"), act(l, "ln2.mean"), act(l, "ln2.rstd"), param(l, "ln2.w"),
                           N, C, attention_summed(l));
    }

    void backward() override {
        NvtxRange range("backward");
        assert(pass.training);
        int64_t N = (int64_t)batch.tokens.size(), C = config.channels;
        floatX *dx = dacts["x"], *dln = dacts["ln"];
        PositionSums positions = positions_summed();
        layernorm_backward(stream, dx, false, grads["lnf.w"], grads["lnf.b"], dln, acts["x"], acts["lnf.mean"], acts["lnf.rstd"], params["lnf.w"], N, C,
                           mlp_summed(config.layers - 1));
        for (int l = config.layers - 1; l >= 0; l--) {
            recompute_block(l);
            mlp_backward(l, dx);
            NvtxRange layer_range("attention backward");
            AttentionContext ctx = context(l);
            ctx.summed = attention_summed(l);
            attention(config.attention[l].name).backward(ctx, attn_params[l], attn_grads[l], attn_saved[l], act(l, "ln1"), dx, dln);
            layernorm_backward(stream, dx, true, grad(l, "ln1.w"), grad(l, "ln1.b"), dln, act(l, "x"), act(l, "ln1.mean"), act(l, "ln1.rstd"),
                               param(l, "ln1.w"), N, C, l > 0 ? mlp_summed(l - 1) : nullptr, l > 0 ? PositionSums{} : positions);
        }
        DropoutKey dropout = dropout_of(0);
        if (dropout.p > 0) dropout_add(stream, dx, nullptr, dx, dropout, DROP_EMBEDDING, place, N, C);
        scratch.reserve(encoder_backward_scratch(N, C));
        encoder_backward(stream, grads["wte"], positions.sums ? nullptr : wpe<float>(grads), dx, tokens, token_plan, cu_seqlens, batch.num_seqs(), max_len, N,
                         C, {scratch.memory, scratch.size});
    }

    // ---- update ----------------------------------------------------------------------------------------------------------------------------------

    // Forward and backward without waiting. Of passes of one shape the first runs as it is (which makes all plans and allocations), the second is captured
    // as a graph, and from then on the graph is replayed. Ragged batches and carried memories differ from pass to pass and are launched kernel by kernel.
    void train(const Batch& b, const Pass& p) override {
        begin_pass(b, p);
        GraphKey key = {b.cu_seqlens, p.dropout, p.seed, upload.place(), scratch.memory};
        bool again = b.memory_from.empty() && key == graph_key;
        if (again && !graph) {
            cudaGraph_t captured;
            CUDA_CHECK(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
            forward_pass();
            backward();
            CUDA_CHECK(cudaStreamEndCapture(stream, &captured));
            CUDA_CHECK(cudaGraphInstantiate(&graph, captured, 0));
            CUDA_CHECK(cudaGraphDestroy(captured));
        }
        if (again) {
            CUDA_CHECK(cudaGraphLaunch(graph, stream));
            return;
        }
        if (graph) CUDA_CHECK(cudaGraphExecDestroy(graph));
        graph = nullptr;
        forward_pass();
        backward();
        key.scratch = scratch.memory;  // which may have grown
        graph_key = key;
    }

    void make_optimizer_tables() {
        std::vector<AdamWTensor> tensors = adamw_tensors(params, masters, grads, moment1, moment2);
        std::vector<AdamWPiece> pieces = adamw_pieces(tensors);
        int64_t bytes = round_up(tensors.size() * sizeof(AdamWTensor), 256);
        num_pieces = (int)pieces.size();
        optimizer_tables.reserve(bytes + num_pieces * sizeof(AdamWPiece));
        optimizer_tensors = (const AdamWTensor*)optimizer_tables.memory;
        optimizer_pieces = (const AdamWPiece*)(optimizer_tables.memory + bytes);
        CUDA_CHECK(cudaMemcpyAsync(optimizer_tables.memory, tensors.data(), tensors.size() * sizeof(AdamWTensor), cudaMemcpyHostToDevice, stream));
        CUDA_CHECK(cudaMemcpyAsync(optimizer_tables.memory + bytes, pieces.data(), pieces.size() * sizeof(AdamWPiece), cudaMemcpyHostToDevice, stream));
        wait_for_device();
    }

    void end_step(const AdamW& h) override {
        NvtxRange range("update");
        AdamWStep numbers = adamw_step(h);
        step_upload.begin(sizeof numbers);
        const AdamWStep* step = step_upload.put(&numbers, 1);
        step_upload.send();
        global_norm(stream, &sums->norm, optimizer_tensors, optimizer_pieces, num_pieces);
        adamw(stream, optimizer_tensors, optimizer_pieces, num_pieces, step, &sums->norm);
        if (spare.empty()) {
            PendingResult fresh;
            CUDA_CHECK(cudaMallocHost(&fresh.host, sizeof(StepSums)));
            CUDA_CHECK(cudaEventCreateWithFlags(&fresh.ready, cudaEventDisableTiming));
            spare.push_back(fresh);
        }
        PendingResult r = spare.front();
        spare.pop_front();
        CUDA_CHECK(cudaMemcpyAsync(r.host, sums, sizeof(StepSums), cudaMemcpyDeviceToHost, stream));
        CUDA_CHECK(cudaMemsetAsync(sums, 0, sizeof(StepSums), stream));
        CUDA_CHECK(cudaEventRecord(r.ready, stream));
        pending.push_back(r);
    }
    StepResult step_result() override {
        PendingResult r = pending.front();
        pending.pop_front();
        CUDA_CHECK(cudaEventSynchronize(r.ready));
        spare.push_back(r);
        return {r.host->step_loss, r.host->norm.norm};
    }
    int steps_ahead() const override { return 1; }
    double update(const AdamW& h) override {
        end_step(h);
        return step_result().grad_norm;
    }

    // ---- extend: new tokens for sequences that are being decoded -----------------------------------------------------------------------------------

    // What extend is given besides the batch. Device memory unless a name says host.
    struct Extension {
        std::vector<int64_t> lengths_host;          // rows in each state, before the new ones
        std::vector<const AttentionState*> states;  // of each network layer
        const int *cu_kv, *last_rows;               // (num_seqs+1) offsets of old and new tokens together; the last new token of each sequence that has any
        std::vector<int> answered_host;             // those sequences
        int64_t kv_tokens;
        int max_kv;
        bool decode;                 // one token of each sequence, and their logits are whole in memory: a step that can be replayed
        int draws;                   // tokens that such a step draws,
        const int* drawn_row;        // each from these logits
        const double* drawn_uniform;
    } extension;

    // Takes new tokens for `sequences` to the device, in one copy, and makes room for them in the states.
    void begin_extend(const Batch& b, const std::vector<int>& sequences, const std::vector<Draw>& draws) {
        int S = b.num_seqs();
        check_extend(b, sequences, options.max_tokens, config.vocab_size);
        Extension e;
        std::vector<int64_t> pasts;
        std::vector<int> cu_kv(1, 0), last_rows, page_table;
        std::vector<int64_t> first_page;
        e.max_kv = 0;
        e.decode = S <= logits_rows(options.max_tokens);
        for (int s = 0; s < S; s++) {
            const auto& q = pool->sequences[sequences[s]];
            int64_t length = q.length, past = q.past(), q_len = b.cu_seqlens[s + 1] - b.cu_seqlens[s];
            if (config.positions == Positions::LEARNED && past + q_len > config.max_seq)
                usage_error("a sequence of %lld tokens is longer than the model's %d learned positions: use a shorter prompt or fewer tokens",
                            (long long)(past + q_len), config.max_seq);
            pool->reserve(sequences[s], q_len);
            e.lengths_host.push_back(length);
            pasts.push_back(past);
            cu_kv.push_back(cu_kv[s] + (int)(length + q_len));
            e.max_kv = std::max(e.max_kv, (int)(length + q_len));
            e.decode = e.decode && q_len == 1;
            first_page.push_back((int64_t)page_table.size());
            page_table.insert(page_table.end(), q.pages.begin(), q.pages.end());
            if (q_len > 0) last_rows.push_back(b.cu_seqlens[s + 1] - 1), e.answered_host.push_back(s);
        }
        e.kv_tokens = cu_kv[S];
        assert(b.memory_from.empty() && b.memory_to.empty());  // states take their place
        e.draws = e.decode ? (int)draws.size() : 0;
        std::vector<int> drawn_row;
        std::vector<double> drawn_uniform;
        for (int d = 0; d < e.draws; d++) {
            drawn_row.push_back(draws[d].sequence);
            drawn_uniform.push_back(draws[d].uniform);
        }

        // What has the same place for the same number of sequences and draws, then the page tables.
        int64_t states_bytes = config.layers * round_up(S * sizeof(AttentionState), 16), tables_bytes = (int64_t)(page_table.size() * sizeof(int));
        pack_pass(b, Pass(), pasts.data(), 12 * e.draws + 8 * (S + 1) + 5 * 16 + states_bytes + tables_bytes);
        e.drawn_uniform = upload.put(drawn_uniform);
        e.drawn_row = upload.put(drawn_row);
        e.cu_kv = upload.put(cu_kv);
        last_rows.resize(S + 1);
        e.last_rows = upload.put(last_rows);
        const int* pages = (const int*)(upload.end() + states_bytes);
        for (int l = 0; l < config.layers; l++) {
            std::vector<AttentionState> states;
            for (int s = 0; s < S; s++)
                states.push_back({e.lengths_host[s], pool->sequences[sequences[s]].fixed.get() + pool->fixed_offset[l], pool->page(0) + pool->page_offset[l],
                                  pages + first_page[s], pool->page_numbers, pool->page_size, pool->per_token[l]});
            e.states.push_back(upload.put(states));
        }
        const int* put = upload.put(page_table);
        assert(put == pages);
        (void)put;
        upload.send();
        extension = e;
    }

    // Reading the weights is all the work, and what is launched is fused for it (matvec.cuh).
    bool few_tokens() const { return (int64_t)batch.tokens.size() <= FEW_ROWS; }

    // One block of the network for few tokens: x (N,C) becomes out.
    void few_tokens_block(int l, AttentionContext ctx, const floatX* x, floatX* out) {
        int64_t N = (int64_t)batch.tokens.size(), C = config.channels;
        floatX *mid = act(l, "mid"), *gelu = act(l, "gelu");
        ctx.norm = {param(l, "ln1.w"), param(l, "ln1.b")};
        ctx.chain = &chain;
        NormParameters norm2 = {param(l, "ln2.w"), param(l, "ln2.b")};
        attention(config.attention[l].name).extend(ctx, attn_params[l], x, x, mid);
        chain.linear_few(gelu, mid, &norm2, param(l, "mlp.wfc"), param(l, "mlp.bfc"), N, C, 4 * C, true, nullptr);
        chain.linear_few(out, gelu, nullptr, param(l, "mlp.wproj"), param(l, "mlp.bproj"), N, 4 * C, C, false, mid);
    }

    // The new tokens through all layers, to the rows of acts["x"].
    void extend_pass() {
        int64_t N = (int64_t)batch.tokens.size(), C = config.channels;
        floatX* x = act(0, "x");
        encoder_forward(stream, x, tokens, position, params["wte"], wpe<floatX>(params), N, C);
        for (int l = 0; l < config.layers; l++) {
            AttentionContext ctx = context(l, extension.kv_tokens, false);
            ctx.states = extension.states[l];
            ctx.pages = {pool->page(0) + pool->page_offset[l], pool->capacity, pool->page_numbers, pool->per_token[l], pool->page_size};
            ctx.window = (int)options.window;
            ctx.lengths_host = extension.lengths_host.data();
            ctx.cu_kv = extension.cu_kv;
            ctx.kv_tokens = extension.kv_tokens;
            ctx.max_kv = extension.max_kv;
            floatX* next = block_output(l);
            if (few_tokens()) {
                few_tokens_block(l, ctx, x, next);
            } else {
                floatX *ln1 = act(l, "ln1"), *mid = act(l, "mid");
                layernorm_forward(stream, ln1, act(l, "ln1.mean"), act(l, "ln1.rstd"), x, param(l, "ln1.w"), param(l, "ln1.b"), N, C);
                attention(config.attention[l].name).extend(ctx, attn_params[l], ln1, x, mid);
                mlp_forward(l, mid, next);
            }
            x = next;
        }
    }
    // acts["logits"] of the last new tokens of the answered sequences from `first` on, `rows` of them.
    void head(int64_t first, int64_t rows) {
        int64_t N = (int64_t)batch.tokens.size(), C = config.channels, Vp = config.padded_vocab_size;
        const floatX *x = acts["x"], *wte = params["wte"];
        if (rows < N) {
            chain.launch();
            gather_rows_kernel<<<(unsigned)rows, 256, 0, stream>>>(act(0, "ln1"), x, extension.last_rows + first, C);
            LAUNCH_CHECK();
            x = act(0, "ln1");
        }
        if (few_tokens()) {
            NormParameters norm = {params["lnf.w"], params["lnf.b"]};
            chain.linear_few(acts["logits"], x, &norm, wte, nullptr, rows, C, Vp, false, nullptr);
            chain.launch();
            return;
        }
        layernorm_forward(stream, acts["lnf"], acts["lnf.mean"], acts["lnf.rstd"], x, params["lnf.w"], params["lnf.b"], rows, C);
        linear_forward(stream, acts["logits"], acts["lnf"], wte, nullptr, rows, C, Vp);
    }

    // Steps of decoding that can be replayed: all that a graph of kernels depends on. The first step of a kind runs as it is (which makes all plans and
    // allocations), the second is captured, further ones are replayed.
    struct DecodeGraph {
        int sequences, max_kv, draws;
        SamplerOptions sampler;
        const int* drawn;
        const char *arrays, *scratch;
        cudaGraphExec_t graph;
        bool is(const DecodeGraph& g) const {
            return sequences == g.sequences && max_kv == g.max_kv && draws == g.draws && sampler == g.sampler && drawn == g.drawn && arrays == g.arrays &&
                   scratch == g.scratch;
        }
    };
    static constexpr size_t MAX_DECODE_GRAPHS = 64;
    std::deque<DecodeGraph> decode_graphs;
    static constexpr int UNDRAWN = INT_MIN;
    int* drawn = nullptr;  // tokens on their way to the host
    size_t drawn_size = 0;

    // The whole step, logits of all sequences included, and tokens from them.
    void decode_step(const SamplerOptions& sampler) {
        int S = batch.num_seqs();
        auto pass = [&] {
            extend_pass();
            head(0, S);
            sample_tokens(stream, drawn, acts["logits"], config.padded_vocab_size, config.vocab_size, extension.drawn_row, extension.drawn_uniform,
                          extension.draws, sampler, true);
        };
        // A bound that seldom changes; the lengths themselves are the device's.
        for (int bound = 256;; bound = bound > INT_MAX / 2 ? INT_MAX : 2 * bound)
            if (bound >= extension.max_kv) {
                extension.max_kv = bound;
                break;
            }
        extension.kv_tokens = (int64_t)S * extension.max_kv;
        DecodeGraph now = {S, extension.max_kv, extension.draws, sampler, drawn, upload.place(), scratch.memory, nullptr};
        auto known = std::find_if(decode_graphs.begin(), decode_graphs.end(), [&](const DecodeGraph& g) { return g.is(now); });
        if (known == decode_graphs.end()) {
            pass();
            now.scratch = scratch.memory;  // which may have grown
            decode_graphs.push_back(now);
            if (decode_graphs.size() <= MAX_DECODE_GRAPHS) return;
            if (decode_graphs.front().graph) CUDA_CHECK(cudaGraphExecDestroy(decode_graphs.front().graph));
            decode_graphs.pop_front();
            return;
        }
        if (!known->graph) {
            cudaGraph_t captured;
            CUDA_CHECK(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
            pass();
            CUDA_CHECK(cudaStreamEndCapture(stream, &captured));
            CUDA_CHECK(cudaGraphInstantiate(&known->graph, captured, 0));
            CUDA_CHECK(cudaGraphDestroy(captured));
        }
        CUDA_CHECK(cudaGraphLaunch(known->graph, stream));
    }

    // Calls use(first, rows) when acts["logits"] holds those of so many answered sequences. Of a step of decoding `draws` are in extension.draws, and on their
    // way to `drawn`.
    template <class Use>
    void extend_and(const Batch& b, const std::vector<int>& sequences, bool logits, const SamplerOptions& o, const std::vector<Draw>& draws, Use use) {
        begin_extend(b, sequences, draws);
        int64_t rows = (int64_t)extension.answered_host.size(), chunk = logits_rows(options.max_tokens);
        extension.decode ? decode_step(o) : extend_pass();
        chain.launch();
        for (int s = 0; s < b.num_seqs(); s++) {
            pool->sequences[sequences[s]].length += b.cu_seqlens[s + 1] - b.cu_seqlens[s];
            if (options.window > 0) pool->slide(sequences[s], options.window);
        }
        for (int64_t first = 0; logits && first < rows; first += chunk) {
            int64_t n = std::min(chunk, rows - first);
            if (!extension.decode) head(first, n);
            use(first, n);
        }
    }

    void extend(const Batch& b, const std::vector<int>& sequences, float* last_logits) override {
        int64_t V = config.vocab_size, Vp = config.padded_vocab_size;
        std::vector<float> values;
        extend_and(b, sequences, last_logits != nullptr, {}, {}, [&](int64_t first, int64_t rows) {
            values.resize(rows * V);
            read_rows(values.data(), acts["logits"], rows, V, Vp);
            for (int64_t r = 0; r < rows; r++) std::copy_n(&values[r * V], V, last_logits + extension.answered_host[first + r] * V);
        });
    }

    // Draws where the logits are. The tokens come back through memory of the host that the device writes to.
    std::vector<int> extend_and_draw(const Batch& b, const std::vector<int>& sequences, const SamplerOptions& o, const std::vector<Draw>& draws) override {
        for (const Draw& d : draws)
            if (d.penalised && !d.penalised->empty()) return Trainer::extend_and_draw(b, sequences, o, draws);
        if (drawn_size < draws.size()) {
            wait_for_device();
            if (drawn) CUDA_CHECK(cudaFreeHost(drawn));
            drawn_size = 2 * draws.size();
            CUDA_CHECK(cudaMallocHost(&drawn, drawn_size * sizeof(int)));
        }
        std::fill_n(drawn, draws.size(), UNDRAWN);
        std::vector<int> tokens_drawn(draws.size());
        extend_and(b, sequences, !draws.empty(), o, draws, [&](int64_t first, int64_t rows) {
            std::vector<int> row, which;
            std::vector<double> uniform;
            for (size_t d = 0; d < draws.size(); d++) {
                const std::vector<int>& answered = extension.answered_host;
                int64_t at = std::lower_bound(answered.begin(), answered.end(), draws[d].sequence) - answered.begin() - first;
                if (at < 0 || at >= rows) continue;
                row.push_back((int)at);
                uniform.push_back(draws[d].uniform);
                which.push_back((int)d);
            }
            if (!extension.decode) {
                draws_upload.begin((int64_t)row.size() * 12 + 32);
                const double* uniform_device = draws_upload.put(uniform);
                const int* row_device = draws_upload.put(row);
                draws_upload.send();
                sample_tokens(stream, drawn, acts["logits"], config.padded_vocab_size, config.vocab_size, row_device, uniform_device, (int64_t)row.size(), o,
                              false);
                wait_for_device();
            }
            for (size_t d = 0; d < which.size(); d++) {
                int token = extension.decode ? wait_for_token((int)d) : drawn[d];
                if (token < 0) data_error("the model's logits are not finite: its training diverged; take an earlier checkpoint");
                tokens_drawn[which[d]] = token;
            }
        });
        return tokens_drawn;
    }
    // Looks at the host's memory until the token is there: that is some microseconds sooner than to be told that the stream has ended.
    int wait_for_token(int d) {
        volatile const int* token = drawn + d;
        for (int64_t looks = 1; *token == UNDRAWN; looks++)
            if (looks % 1024 == 0) {
                cudaError_t status = cudaStreamQuery(stream);
                if (status == cudaErrorNotReady) continue;
                CUDA_CHECK(status);
                break;
            }
        return *token;
    }
    auto& states() {
        if (!pool) {
            size_t page = decltype(pool)::element_type::page_bytes(state_sizes(config), options.page_size), free_bytes, total;
            CUDA_CHECK(cudaMemGetInfo(&free_bytes, &total));
            int64_t fit = page == 0 ? 0 : (int64_t)(free_bytes / 10 * 9 / page);
            pool = std::make_unique<StatePool<floatX, float, DeviceMemory>>(state_sizes(config), options.page_size, options.pages > 0 ? options.pages : fit);
        }
        return *pool;
    }
    int new_sequence() override { return states().create(); }
    int fork_sequence(int s) override { return pool->fork(s); }
    int copy_sequence(int s) override { return pool->copy(s); }
    void free_sequence(int s) override { pool->release(s); }
    size_t state_bytes() override { return pool ? pool->bytes() : 0; }
    int64_t pages_left() override { return states().pages_left(); }
    int64_t pages_wanted(int s, int64_t n) override { return pool->pages_wanted(s, n); }

    // ---- exchange with the host ---------------------------------------------------------------------------------------------------------------------

    const Tensors& parameters() override { return params; }
    const Tensors& section(Section s) const {
        return s == Section::PARAMETERS ? masters : s == Section::GRADIENTS ? grads : s == Section::MOMENT1 ? moment1 : moment2;
    }
    void get(Section s, int i, float* to_host_memory) override {
        CUDA_CHECK(cudaMemcpyAsync(to_host_memory, section(s).data[i], params.specs[i].size() * sizeof(float), cudaMemcpyDeviceToHost, stream));
        wait_for_device();
    }
    void set(Section s, int i, const float* values) override {
        int64_t n = params.specs[i].size();
        CUDA_CHECK(cudaMemcpyAsync(section(s).data[i], values, n * sizeof(float), cudaMemcpyHostToDevice, stream));
        if (s == Section::PARAMETERS && has_master(params.specs[i])) {
            std::vector<floatX> rounded(n);
            for (int64_t k = 0; k < n; k++) round_to(rounded[k], values[k]);
            CUDA_CHECK(cudaMemcpyAsync(params.data[i], rounded.data(), n * sizeof(floatX), cudaMemcpyHostToDevice, stream));
            wait_for_device();
        }
        wait_for_device();
    }
    static void round_to(float& y, float x) { y = x; }
    static void round_to(__nv_bfloat16& y, float x) { y = __float2bfloat16_rn(x); }
    std::vector<float> get_memory() override {
        std::vector<float> m(memory_numbers);
        CUDA_CHECK(cudaMemcpyAsync(m.data(), memory.memory, m.size() * sizeof(float), cudaMemcpyDeviceToHost, stream));
        wait_for_device();
        return m;
    }
    void set_memory(const std::vector<float>& m) override {
        assert((int64_t)m.size() == memory_numbers);
        CUDA_CHECK(cudaMemcpyAsync(memory.memory, m.data(), m.size() * sizeof(float), cudaMemcpyHostToDevice, stream));
        wait_for_device();
    }
    size_t parameter_bytes() override { return params_memory.bytes; }
    size_t gradient_bytes() override { return grads_memory.bytes; }
    size_t activation_bytes() override { return acts_memory.bytes + scratch_need + 2 * memory_numbers * sizeof(float) + WORKSPACE_BYTES; }

    // Multiply-adds of the matrix units: per multiprocessor and cycle, dense bf16 with float32 sums, by compute capability.
    double peak_flops() override {
        int devices = 0;
        if (sizeof(floatX) > 2 || cudaGetDeviceCount(&devices) != cudaSuccess || devices == 0) return 0;
        const cudaDeviceProp& p = device_properties();
        int cc = 10 * p.major + p.minor, kilohertz = 0;
        double each = cc == 80 ? 1024 : cc == 90 ? 2048 : cc == 86 || cc == 89 ? 256 : cc == 100 ? 4096 : 0;
        CUDA_CHECK(cudaDeviceGetAttribute(&kilohertz, cudaDevAttrClockRate, 0));
        return 2 * each * p.multiProcessorCount * kilohertz * 1e3;
    }
    std::string matmul_plans() override { return gpu::matmul_plans(); }
    void set_matmul_plans(const std::string& text) override { load_matmul_plans(text); }
};

inline size_t bytes_needed(const ModelConfig& config, TrainerOptions options) {
    options.plan_only = true;
    Gpt2 plan(config, options);
    return plan.parameter_bytes() + plan.gradient_bytes() + plan.activation_bytes();
}

// Refuses a model that does not fit, saying by how much, and what would.
inline void check_memory(const ModelConfig& config, const TrainerOptions& options) {
    size_t need = bytes_needed(config, options), available, total;
    CUDA_CHECK(cudaMemGetInfo(&available, &total));
    if (need <= available) return;
    std::string remedies;
    TrainerOptions other = options;
    for (other.recompute = options.recompute + 1; other.recompute <= 2 && options.training; other.recompute++)
        if (bytes_needed(config, other) <= available) {
            remedies = format("--recompute %d (%.1f GB)", other.recompute, bytes_needed(config, other) / 1e9);
            break;
        }
    other = options;
    for (int part = 2; part <= 1024 && options.max_tokens / part > 0; part *= 2) {
        other.max_tokens = options.max_tokens / part;
        if (bytes_needed(config, other) > available) continue;
        remedies += format("%s1/%d of --batch (%.1f GB)", remedies.empty() ? "" : ", or ", part, bytes_needed(config, other) / 1e9);
        break;
    }
    data_error("this needs %.1f GB of GPU memory, %.1f GB too much: %s has %.1f of its %.1f GB free; %s%s", need / 1e9, (need - available) / 1e9,
               device_properties().name, available / 1e9, total / 1e9,
               remedies.empty() ? "use a smaller model or --seq" : "what would fit: ", remedies.c_str());
}

inline std::unique_ptr<Trainer> make(const ModelConfig& config, const TrainerOptions& options) {
    if (!options.plan_only) check_memory(config, options);
    return std::make_unique<Gpt2>(config, options);
}

}  // namespace gpu

#ifdef GPU_FLOAT32
std::unique_ptr<Trainer> make_float32_trainer(const ModelConfig& config, const TrainerOptions& options) { return gpu::make(config, options); }
#else
std::unique_ptr<Trainer> make_float32_trainer(const ModelConfig& config, const TrainerOptions& options);  // in the other build of this file

bool trainer_on_gpu() { return true; }

std::unique_ptr<Trainer> make_trainer(const ModelConfig& config, const TrainerOptions& options) {
    int devices = 0;
    if (!options.plan_only && (cudaGetDeviceCount(&devices) != cudaSuccess || devices == 0))
        data_error("no CUDA GPU is to be seen here: use ./train_gpt2, the CPU trainer, or see what nvidia-smi says");
    return options.dtype == "float32" ? make_float32_trainer(config, options) : gpu::make(config, options);
}

// --------------------------------------------------------------------------------------------------------------------------------------------------
// 3. main

// Weak: test programs that are linked with the trainer bring their own.
__attribute__((weak)) int main(int argc, char** argv) { return run_program(argc, argv); }
#endif
