// GPT-2 on the CPU: the transformer with its forward and backward passes by hand, read from top to bottom.
//
//   1. layers      encoder, LayerNorm, GELU, classifier, AdamW (linear layers, RMSNorm and dropout, which attention uses too: gpt2/cpu/layers.h)
//   2. the model   parameters, gradients, activations; forward, backward, update; extend for generation
//   3. main        options, the training loop, evaluation and generation are shared with the CUDA trainer: gpt2/program.h
//
// Attention is behind the seam in attention.h: nothing here knows which layer it is.
// Shapes: N tokens (B·T of them in a dense batch), C channels, V vocabulary, Vp padded vocabulary, L layers. All matrices row-major, weights (out, in).
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <memory>
#include <vector>

#include "attention.h"
#include "gpt2/initialise.h"
#include "gpt2/program.h"
#include "gpt2/state.h"
#include "gpt2/trainer.h"

namespace cpu {

// --------------------------------------------------------------------------------------------------------------------------------------------------
// 1. Layers

// ---- encoder: x_n = wte[token_n] + wpe[position_n] ---------------------------------------------------------------------------------------------------
// out (N,C), wte (Vp,C), wpe (max_seq,C) or null.
inline void encoder_forward(real* out, const int* tokens, const int* position, const real* wte, const real* wpe, int64_t N, int64_t C) {
#pragma omp parallel for if (N * C > FEW_NUMBERS)
    for (int64_t n = 0; n < N; n++) {
        const real *token = wte + tokens[n] * C, *place = wpe ? wpe + position[n] * C : nullptr;
        for (int64_t c = 0; c < C; c++) out[n * C + c] = token[c] + (place ? place[c] : 0);
    }
}

// Rows of dout scatter into dwte and dwpe. Tokens repeat, so threads split the channels instead: no conflicts, and one order of summation.
inline void encoder_backward(real* dwte, real* dwpe, const real* dout, const int* tokens, const int* position, int64_t N, int64_t C) {
    constexpr int64_t block = 16;
#pragma omp parallel for
    for (int64_t c0 = 0; c0 < C; c0 += block)
        for (int64_t n = 0; n < N; n++)
            for (int64_t c = c0; c < std::min(c0 + block, C); c++) {
                dwte[tokens[n] * C + c] += dout[n * C + c];
                if (dwpe) dwpe[position[n] * C + c] += dout[n * C + c];
            }
}

// ---- LayerNorm: y = (x − mean)·rstd ⊙ w + b, rstd = 1/√(variance + 1e-5) -----------------------------------------------------------------------------
// y, x (N,C); mean, rstd (N); w, b (C).
inline void layernorm_forward(real* y, real* mean, real* rstd, const real* x, const real* w, const real* b, int64_t N, int64_t C) {
#pragma omp parallel for if (N * C > FEW_NUMBERS)
    for (int64_t n = 0; n < N; n++) {
        const real* row = x + n * C;
        real m = 0, v = 0;
#pragma omp simd reduction(+ : m)
        for (int64_t c = 0; c < C; c++) m += row[c];
        m /= C;
#pragma omp simd reduction(+ : v)
        for (int64_t c = 0; c < C; c++) v += (row[c] - m) * (row[c] - m);
        real r = 1 / std::sqrt(v / C + (real)1e-5);
        for (int64_t c = 0; c < C; c++) y[n * C + c] = (row[c] - m) * r * w[c] + b[c];
        mean[n] = m;
        rstd[n] = r;
    }
}

// With x̂ = (x − mean)·rstd and t = dy⊙w:  dx += rstd·(t − mean(t) − x̂·mean(t⊙x̂));  dw += Σ_n dy⊙x̂;  db += Σ_n dy.
// dx accumulates, because the residual stream around the norm has brought its gradient there already.
inline void layernorm_backward(real* dx, real* dw, real* db, const real* dy, const real* x, const real* mean, const real* rstd, const real* w, int64_t N,
                               int64_t C) {
#pragma omp parallel for  // pass 1: rows
    for (int64_t n = 0; n < N; n++) {
        const real *g = dy + n * C, *row = x + n * C;
        real m = mean[n], r = rstd[n], t = 0, tx = 0;
#pragma omp simd reduction(+ : t, tx)
        for (int64_t c = 0; c < C; c++) {
            t += g[c] * w[c];
            tx += g[c] * w[c] * (row[c] - m) * r;
        }
        t /= C;
        tx /= C;
        for (int64_t c = 0; c < C; c++) dx[n * C + c] += r * (g[c] * w[c] - t - (row[c] - m) * r * tx);
    }
    constexpr int64_t block = 64;
#pragma omp parallel for  // pass 2: columns, each summed by one thread in one order
    for (int64_t c0 = 0; c0 < C; c0 += block) {
        int64_t columns = std::min(block, C - c0);
        real sw[block] = {}, sb[block] = {};
        for (int64_t n = 0; n < N; n++)
            for (int64_t c = 0; c < columns; c++) {
                real g = dy[n * C + c0 + c];
                sw[c] += g * (x[n * C + c0 + c] - mean[n]) * rstd[n];
                sb[c] += g;
            }
        for (int64_t c = 0; c < columns; c++) {
            dw[c0 + c] += sw[c];
            db[c0 + c] += sb[c];
        }
    }
}

// ---- GELU, tanh form: y = x/2·(1 + tanh u), u = √(2/π)(x + 0.044715x³) ----------------------------------------------------------------------------------
// 1 + tanh u = 2 − 2/(e^{2u}+1) = 2σ(2u): one exponential, which the compiler vectorises. u is clamped where σ has long been 0 or 1.
inline real gelu_sigmoid(real x) {
    real u = (real)1.5957691216057308 * (x + (real)0.044715 * x * x * x);  // 2u
    u = std::max((real)-80, std::min((real)80, u));
    return 1 / (1 + vexp(-u));
}
inline void gelu_forward(real* y, const real* x, int64_t n) {
#pragma omp parallel for simd if (parallel : n > FEW_NUMBERS)
    for (int64_t i = 0; i < n; i++) y[i] = x[i] * gelu_sigmoid(x[i]);
}
// With σ as above: y = xσ, dx = dy·(σ + x·σ(1−σ)·2u'). dx may be dy.
inline void gelu_backward(real* dx, const real* dy, const real* x, int64_t n) {
#pragma omp parallel for simd
    for (int64_t i = 0; i < n; i++) {
        real s = gelu_sigmoid(x[i]), du = (real)1.5957691216057308 * (1 + (real)0.134145 * x[i] * x[i]);
        dx[i] = dy[i] * (s + x[i] * s * (1 - s) * du);
    }
}

// ---- classifier: logits = x·wteᵀ, loss_n = lse(logits_n) − logits_n[target_n], softmax over the V real tokens ---------------------------------------------
// One row of logits (V): returns its loss; with scale > 0 the row becomes its gradient scale·(softmax − onehot).
inline double classifier_row(real* logits, int V, int target, real scale) {
    real highest = largest(V, logits, logits[0]), sum = 0, correct = target >= 0 ? logits[target] : 0;
#pragma omp simd reduction(+ : sum)
    for (int v = 0; v < V; v++) {
        logits[v] = vexp(logits[v] - highest);
        sum += logits[v];
    }
    real factor = target >= 0 ? scale / sum : 0;
    for (int v = 0; v < V; v++) logits[v] *= factor;
    if (target < 0) return 0;
    logits[target] -= scale;
    return (double)std::log(sum) + highest - correct;
}

// ---- AdamW (Loshchilov and Hutter, arXiv 1711.05101): decay is applied to the weight, not to the gradient ------------------------------------------------
//     m = β1·m + (1−β1)g    v = β2·v + (1−β2)g²    p −= lr·(m̂/(√v̂+ε) + decay·p),  m̂ = m/(1−β1^t), v̂ = v/(1−β2^t)
// g is scaled (clipping), used and set to zero in the same pass over memory.
inline void adamw(real* p, real* g, real* m, real* v, int64_t n, double lr, const AdamW& h, double decay, double g_scale) {
    real b1 = (real)h.beta1, b2 = (real)h.beta2, scale = (real)g_scale, shrink = (real)(1 - lr * decay), eps = (real)h.eps;
    real step = (real)(lr / (1 - std::pow(h.beta1, (double)h.step))), v_scale = (real)(1 / (1 - std::pow(h.beta2, (double)h.step)));
#pragma omp simd
    for (int64_t i = 0; i < n; i++) {
        real x = g[i] * scale;
        m[i] = b1 * m[i] + (1 - b1) * x;
        v[i] = b2 * v[i] + (1 - b2) * x * x;
        p[i] = p[i] * shrink - step * m[i] / (std::sqrt(v[i] * v_scale) + eps);
        g[i] = 0;
    }
}

// --------------------------------------------------------------------------------------------------------------------------------------------------
// 2. The model

struct Gpt2 : Trainer {
    // Everything by name, in lists: parameters, their gradients and AdamW's moments share one list of specs.
    Tensors params, grads, moment1, moment2, acts, dacts;
    Arena params_memory, grads_memory, acts_memory;
    std::vector<Tensors> attn_params, attn_grads, attn_saved;  // each network layer's part of the lists
    std::vector<int> saved_layers;
    RealVector scratch;
    std::vector<real> memory, memory_before;  // memories: (layer, lane, per_sequence); `before` is what the last pass started from
    std::unique_ptr<StatePool<real>> pool;    // from the first sequence on
    TrainerOptions options;

    // What the last forward pass was given: backward goes on from it.
    Batch batch;
    Pass pass;
    std::vector<TokenPlace> place;
    std::vector<int> position;

    Gpt2(const ModelConfig& c, const TrainerOptions& o) : options(o) {
        config = c;
        params_memory.plan_only = grads_memory.plan_only = acts_memory.plan_only = o.plan_only;
        params = model_parameters(c);
        params_memory.allocate(params, sizeof(real));
        if (o.training) {
            grads.specs = moment1.specs = moment2.specs = params.specs;
            grads_memory.allocate(grads, sizeof(real));
            grads_memory.allocate(moment1, sizeof(real));
            grads_memory.allocate(moment2, sizeof(real));
            for (Tensors* t : {&grads, &moment1, &moment2})
                for (size_t i = 0; i < t->data.size(); i++) memset(t->data[i], 0, t->specs[i].size() * sizeof(real));
        }
        saved_layers = find_saved_layers();
        allocate_activations();
        if (o.plan_only) return;
        for (int l = 0; l < c.layers; l++) {
            attn_params.push_back(params.part(format("h.%d.attn.", l)));
            attn_grads.push_back(grads.part(format("h.%d.attn.", l)));
            attn_saved.push_back(acts.part(format("h.%d.attn.", saved_layer(l))));
        }
        int64_t numbers = 0;
        for (const AttentionStateSize& s : state_sizes(c)) numbers += s.per_sequence * o.lanes;
        memory.assign(numbers, 0);
        memory_before.assign(numbers, 0);
    }

    static std::vector<AttentionStateSize> state_sizes(const ModelConfig& c) {
        std::vector<AttentionStateSize> sizes;
        for (const AttentionConfig& a : c.attention) sizes.push_back(attention_description(a.name).state(a));
        return sizes;
    }

    // Backward needs every layer's activations; without it one layer's worth serves all layers whose attention saves the same.
    int saved_layer(int l) const { return saved_layers[l]; }
    std::vector<int> find_saved_layers() const {
        std::vector<int> list;
        for (int l = 0; l < config.layers; l++) {
            int k = options.training ? l : 0;
            while (k < l && attention_string(config.attention[k]) != attention_string(config.attention[l])) k++;
            list.push_back(k);
        }
        return list;
    }

    void allocate_activations() {
        int64_t N = options.max_tokens, C = config.channels;
        for (int l = 0; l < config.layers; l++) {
            if (saved_layer(l) != l) continue;
            const AttentionConfig& a = config.attention[l];
            std::string h = format("h.%d.", l);
            acts.add(h, {buffer_spec("x", {N, C}), buffer_spec("ln1", {N, C}), buffer_spec("ln1.mean", {N}), buffer_spec("ln1.rstd", {N})});
            acts.add(h + "attn.", attention(a.name).saved(a, N, options.lanes));
            acts.add(h, {buffer_spec("mid", {N, C}), buffer_spec("ln2", {N, C}), buffer_spec("ln2.mean", {N}), buffer_spec("ln2.rstd", {N}),
                         buffer_spec("fc", {N, 4 * C}), buffer_spec("gelu", {N, 4 * C})});
        }
        acts.add("", {buffer_spec("x", {N, C}), buffer_spec("lnf", {N, C}), buffer_spec("lnf.mean", {N}), buffer_spec("lnf.rstd", {N}),
                      buffer_spec("logits", {std::min(N, logits_rows()), config.padded_vocab_size})});
        acts_memory.allocate(acts, sizeof(real));
        if (!options.training) return;
        dacts.add("", {buffer_spec("x", {N, C}), buffer_spec("ln", {N, C}), buffer_spec("fc", {N, 4 * C}), buffer_spec("branch", {N, C})});
        acts_memory.allocate(dacts, sizeof(real));
    }

    // The logits of a large batch are never whole in memory: the classifier works on this many rows at a time (256 MB of float32).
    int64_t logits_rows() const { return std::max<int64_t>(64, (1 << 26) / config.padded_vocab_size); }

    real* act(int l, const char* name) const { return acts[format("h.%d.%s", saved_layer(l), name).c_str()]; }
    real* param(int l, const char* name) const { return params[format("h.%d.%s", l, name).c_str()]; }
    real* grad(int l, const char* name) const { return grads[format("h.%d.%s", l, name).c_str()]; }
    real* wpe(const Tensors& t) const { return config.positions == Positions::LEARNED ? (real*)t["wpe"] : nullptr; }

    void initialise(uint64_t seed) override {
        for (size_t t = 0; t < params.specs.size(); t++) initial_values(config, params.specs, t, seed, (real*)params.data[t]);
    }

    // ---- forward ---------------------------------------------------------------------------------------------------------------------------------

    void set_places(const Batch& b) {
        place.resize(b.tokens.size());
        position.resize(b.tokens.size());
        for (int s = 0; s < b.num_seqs(); s++)
            for (int n = b.cu_seqlens[s]; n < b.cu_seqlens[s + 1]; n++) {
                place[n] = {s, n - b.cu_seqlens[s]};
                position[n] = place[n].pos;
            }
    }

    DropoutKey dropout_key(int layer) const {
        return {pass.training ? pass.dropout : 0, pass.seed, (uint32_t)(pass.step * config.layers + layer), batch.first_row};
    }

    // Pointers to the lanes' memories in one network layer, for each sequence of the batch.
    std::vector<real*> lane_memories(std::vector<real>& m, int layer, const std::vector<int>& lane) {
        std::vector<real*> pointers;
        if (lane.empty()) return pointers;
        int64_t offset = 0;
        for (int l = 0; l < layer; l++) offset += attention_description(config.attention[l].name).state(config.attention[l]).per_sequence * options.lanes;
        int64_t each = attention_description(config.attention[layer].name).state(config.attention[layer]).per_sequence;
        for (int k : lane) pointers.push_back(k < 0 || each == 0 ? nullptr : m.data() + offset + k * each);
        return pointers;
    }

    // The context of one network layer's attention; `from` and `to` must live as long as it.
    AttentionContext context(int layer, int64_t kv_tokens, bool training, std::vector<real*>& from, std::vector<real*>& to) {
        const AttentionConfig& a = config.attention[layer];
        int64_t need = attention(a.name).scratch(a, (int64_t)batch.tokens.size(), batch.num_seqs(), kv_tokens, training);
        if ((int64_t)scratch.size() < need + 16) scratch.assign(std::max<int64_t>(need + 16, 2 * scratch.size()), std::numeric_limits<real>::quiet_NaN());
        AttentionContext ctx{};
        ctx.config = &a;
        ctx.num_seqs = batch.num_seqs();
        ctx.cu_seqlens = batch.cu_seqlens.data();
        ctx.place = place.data();
        ctx.dropout = dropout_key(layer);
        ctx.scratch = {scratch.data(), (int64_t)scratch.size()};
        from = lane_memories(memory_before, layer, batch.memory_from);
        to = lane_memories(memory, layer, batch.memory_to);
        if (!from.empty()) ctx.memory_from = from.data();
        if (!to.empty()) ctx.memory_to = to.data();
        return ctx;
    }

    // x (N,C) += Z⊙MLP(LN2(x)), MLP(u) = GELU(u·Wfcᵀ + bfc)·Wprojᵀ + bproj; from `mid` into `out`.
    void mlp_forward(int l, const real* mid, real* out) {
        int64_t N = (int64_t)batch.tokens.size(), C = config.channels;
        real *ln2 = act(l, "ln2"), *fc = act(l, "fc"), *gelu = act(l, "gelu");
        layernorm_forward(ln2, act(l, "ln2.mean"), act(l, "ln2.rstd"), mid, param(l, "ln2.w"), param(l, "ln2.b"), N, C);
        linear_forward(fc, ln2, param(l, "mlp.wfc"), param(l, "mlp.bfc"), N, C, 4 * C);
        gelu_forward(gelu, fc, N * 4 * C);
        linear_forward(out, gelu, param(l, "mlp.wproj"), param(l, "mlp.bproj"), N, 4 * C, C);
        residual_add(out, mid, dropout_key(l), DROP_MLP);
    }

    // branch (N,C) = base + Z⊙branch.
    void residual_add(real* branch, const real* base, const DropoutKey& key, DropoutSite site) {
        int64_t N = (int64_t)batch.tokens.size(), C = config.channels;
        if (key.p > 0) {
            dropout_add(branch, base, branch, key, site, place.data(), N, C);
            return;
        }
#pragma omp parallel for simd if (parallel : N * C > FEW_NUMBERS)
        for (int64_t i = 0; i < N * C; i++) branch[i] += base[i];
    }

    double forward(const Batch& b, const Pass& p, float* losses, float* logits) override {
        int64_t N = (int64_t)b.tokens.size(), C = config.channels;
        assert(N <= options.max_tokens && (!p.training || options.training));
        batch = b;
        pass = p;
        set_places(b);
        if (!b.memory_from.empty()) std::swap(memory, memory_before);
        std::vector<real*> from, to;

        real* x = act(0, "x");
        encoder_forward(x, b.tokens.data(), position.data(), params["wte"], wpe(params), N, C);
        if (dropout_key(0).p > 0) dropout_add(x, nullptr, x, dropout_key(0), DROP_EMBEDDING, place.data(), N, C);
        for (int l = 0; l < config.layers; l++) {
            real *ln1 = act(l, "ln1"), *mid = act(l, "mid"), *next = l + 1 < config.layers ? act(l + 1, "x") : (real*)acts["x"];
            layernorm_forward(ln1, act(l, "ln1.mean"), act(l, "ln1.rstd"), x, param(l, "ln1.w"), param(l, "ln1.b"), N, C);
            attention(config.attention[l].name).forward(context(l, N, options.training, from, to), attn_params[l], attn_saved[l], ln1, x, mid);
            mlp_forward(l, mid, next);
            x = next;
        }
        layernorm_forward(acts["lnf"], acts["lnf.mean"], acts["lnf.rstd"], x, params["lnf.w"], params["lnf.b"], N, C);
        return classifier(losses, logits);
    }

    // Mean loss. In training also the gradients of the head, since each chunk of logits is at hand only here: d lnf into dacts "ln", and dwte.
    double classifier(float* losses, float* logits_out) {
        int64_t N = (int64_t)batch.tokens.size(), C = config.channels, V = config.vocab_size, Vp = config.padded_vocab_size, chunk = logits_rows();
        real *lnf = acts["lnf"], *wte = params["wte"], *logits = acts["logits"];
        int64_t count = 0;
        for (int t : batch.targets) count += t >= 0;
        real scale = pass.training && count ? (real)(pass.grad_scale / count) : 0;
        std::vector<double> loss(N);
        for (int64_t n0 = 0; n0 < N; n0 += chunk) {
            int64_t rows = std::min(chunk, N - n0);
            matmul(NO, YES, rows, V, C, 1, lnf + n0 * C, C, wte, C, 0, logits, Vp);
            if (logits_out)
                for (int64_t n = 0; n < rows; n++)
                    for (int64_t v = 0; v < V; v++) logits_out[(n0 + n) * V + v] = (float)logits[n * Vp + v];
#pragma omp parallel for
            for (int64_t n = 0; n < rows; n++) loss[n0 + n] = classifier_row(logits + n * Vp, (int)V, batch.targets[n0 + n], scale);
            if (pass.training) linear_backward((real*)dacts["ln"] + n0 * C, false, grads["wte"], nullptr, logits, lnf + n0 * C, wte, rows, C, V, Vp);
        }
        double sum = 0;
        for (int64_t n = 0; n < N; n++) {
            sum += loss[n];
            if (losses) losses[n] = (float)loss[n];
        }
        return count ? sum / count : std::numeric_limits<double>::quiet_NaN();
    }

    // ---- backward --------------------------------------------------------------------------------------------------------------------------------

    // dx (N,C), the gradient of the block's output, becomes that of `mid`, its middle.
    void mlp_backward(int l, real* dx) {
        int64_t N = (int64_t)batch.tokens.size(), C = config.channels;
        real *dln = dacts["ln"], *dfc = dacts["fc"], *dbranch = dx;
        if (dropout_key(l).p > 0) {
            dbranch = dacts["branch"];
            dropout_add(dbranch, nullptr, dx, dropout_key(l), DROP_MLP, place.data(), N, C);
        }
        linear_backward(dfc, false, grad(l, "mlp.wproj"), grad(l, "mlp.bproj"), dbranch, act(l, "gelu"), param(l, "mlp.wproj"), N, 4 * C, C);
        gelu_backward(dfc, dfc, act(l, "fc"), N * 4 * C);
        linear_backward(dln, false, grad(l, "mlp.wfc"), grad(l, "mlp.bfc"), dfc, act(l, "ln2"), param(l, "mlp.wfc"), N, C, 4 * C);
        layernorm_backward(dx, grad(l, "ln2.w"), grad(l, "ln2.b"), dln, act(l, "mid"), act(l, "ln2.mean"), act(l, "ln2.rstd"), param(l, "ln2.w"), N, C);
    }

    void backward() override {
        assert(pass.training);
        int64_t N = (int64_t)batch.tokens.size(), C = config.channels;
        std::vector<real*> from, to;
        real *dx = dacts["x"], *dln = dacts["ln"];
        memset(dx, 0, N * C * sizeof(real));
        layernorm_backward(dx, grads["lnf.w"], grads["lnf.b"], dln, acts["x"], acts["lnf.mean"], acts["lnf.rstd"], params["lnf.w"], N, C);
        for (int l = config.layers - 1; l >= 0; l--) {
            mlp_backward(l, dx);
            attention(config.attention[l].name).backward(context(l, N, true, from, to), attn_params[l], attn_grads[l], attn_saved[l], act(l, "ln1"), dx, dln);
            layernorm_backward(dx, grad(l, "ln1.w"), grad(l, "ln1.b"), dln, act(l, "x"), act(l, "ln1.mean"), act(l, "ln1.rstd"), param(l, "ln1.w"), N, C);
        }
        if (dropout_key(0).p > 0) dropout_add(dx, nullptr, dx, dropout_key(0), DROP_EMBEDDING, place.data(), N, C);
        encoder_backward(grads["wte"], wpe(grads), dx, batch.tokens.data(), position.data(), N, C);
    }

    // ---- update ----------------------------------------------------------------------------------------------------------------------------------

    // The parameters cut into pieces of at most 2^16 numbers: what one thread sums or updates at a time. Partial sums are added up in the order of the list.
    struct Piece {
        int tensor;
        int64_t begin, count;
    };
    std::vector<Piece> pieces() const {
        std::vector<Piece> list;
        for (size_t t = 0; t < params.specs.size(); t++)
            for (int64_t i = 0, n = params.specs[t].size(); i < n; i += 1 << 16) list.push_back({(int)t, i, std::min<int64_t>(1 << 16, n - i)});
        return list;
    }

    double update(const AdamW& h) override {
        std::vector<Piece> list = pieces();
        std::vector<double> squares(list.size());
#pragma omp parallel for
        for (size_t k = 0; k < list.size(); k++) {
            const real* g = (real*)grads.data[list[k].tensor] + list[k].begin;
            squares[k] = dot((int)list[k].count, g, g);
        }
        double sum = 0;
        for (double s : squares) sum += s;
        double norm = std::sqrt(sum), scale = h.grad_clip > 0 && norm > h.grad_clip ? h.grad_clip / norm : 1;
        if (!std::isfinite(norm)) return norm;
#pragma omp parallel for
        for (size_t k = 0; k < list.size(); k++) {
            int t = list[k].tensor;
            const TensorSpec& s = params.specs[t];
            int64_t i = list[k].begin;
            adamw((real*)params.data[t] + i, (real*)grads.data[t] + i, (real*)moment1.data[t] + i, (real*)moment2.data[t] + i, list[k].count,
                  h.lr * s.lr_multiplier, h, s.decay ? h.weight_decay : 0, scale);
        }
        return norm;
    }

    // ---- extend: new tokens for sequences that are being decoded -----------------------------------------------------------------------------------

    void extend(const Batch& b, const std::vector<int>& sequences, float* last_logits) override {
        int64_t N = (int64_t)b.tokens.size(), C = config.channels, V = config.vocab_size, kv_tokens = 0;
        int S = b.num_seqs();
        check_extend(b, sequences, options.max_tokens, config.vocab_size);
        batch = b;
        batch.memory_from.clear();
        batch.memory_to.clear();
        pass = Pass();
        set_places(b);
        for (int s = 0; s < S; s++) {
            int64_t past = pool->sequences[sequences[s]].past(), q_len = b.cu_seqlens[s + 1] - b.cu_seqlens[s];
            if (config.positions == Positions::LEARNED && past + q_len > config.max_seq)
                usage_error("a sequence of %lld tokens is longer than the model's %d learned positions: use a shorter prompt or fewer tokens",
                            (long long)(past + q_len), config.max_seq);
            pool->reserve(sequences[s], q_len);
            kv_tokens += pool->sequences[sequences[s]].length + q_len;
        }
        for (int64_t n = 0; n < N; n++) position[n] = place[n].pos + (int)pool->sequences[sequences[place[n].seq]].past();

        std::vector<real*> from, to;
        real* x = act(0, "x");
        encoder_forward(x, b.tokens.data(), position.data(), params["wte"], wpe(params), N, C);
        for (int l = 0; l < config.layers; l++) {
            std::vector<AttentionState> states(S);
            for (int s = 0; s < S; s++) {
                const auto& q = pool->sequences[sequences[s]];
                states[s].length = q.length;
                states[s].fixed = q.fixed.get() + pool->fixed_offset[l];
                states[s].rows = pool->page(0) + pool->page_offset[l];
                states[s].page_table = q.pages.data();
                states[s].page_stride = pool->page_numbers;
                states[s].page_size = pool->page_size;
                states[s].per_token = pool->per_token[l];
                states[s].dropped = q.dropped;
            }
            AttentionContext ctx = context(l, kv_tokens, false, from, to);
            ctx.states = states.data();
            ctx.window = (int)options.window;
            real *ln1 = act(l, "ln1"), *mid = act(l, "mid"), *next = l + 1 < config.layers ? act(l + 1, "x") : (real*)acts["x"];
            layernorm_forward(ln1, act(l, "ln1.mean"), act(l, "ln1.rstd"), x, param(l, "ln1.w"), param(l, "ln1.b"), N, C);
            attention(config.attention[l].name).extend(ctx, attn_params[l], ln1, x, mid);
            mlp_forward(l, mid, next);
            x = next;
        }
        real *lnf = acts["lnf"], *logits = acts["logits"];
        layernorm_forward(lnf, acts["lnf.mean"], acts["lnf.rstd"], x, params["lnf.w"], params["lnf.b"], N, C);
        std::vector<int> ends;  // the sequences that have new tokens; the last one of each moves to the front of lnf
        for (int s = 0; s < S; s++) {
            int q_len = b.cu_seqlens[s + 1] - b.cu_seqlens[s];
            pool->sequences[sequences[s]].length += q_len;
            if (options.window > 0) pool->slide(sequences[s], options.window);
            if (q_len == 0) continue;
            memmove(lnf + ends.size() * C, lnf + (b.cu_seqlens[s + 1] - 1) * C, C * sizeof(real));
            ends.push_back(s);
        }
        for (size_t i = 0, rows; i < ends.size() && last_logits; i += rows) {
            rows = std::min(ends.size() - i, (size_t)logits_rows());
            matmul(NO, YES, rows, V, C, 1, lnf + i * C, C, params["wte"], C, 0, logits, V);
            for (size_t r = 0; r < rows; r++) std::copy_n(logits + r * V, V, last_logits + ends[i + r] * V);
        }
    }
    auto& states() {
        if (!pool) {
            int64_t page = StatePool<real>::page_bytes(state_sizes(config), options.page_size);
            int64_t memory = (int64_t)sysconf(_SC_PHYS_PAGES) * sysconf(_SC_PAGE_SIZE) / 2;
            pool = std::make_unique<StatePool<real>>(state_sizes(config), options.page_size, options.pages > 0 || page == 0 ? options.pages : memory / page);
        }
        return *pool;
    }
    int new_sequence() override { return states().create(); }
    int fork_sequence(int s) override { return pool->fork(s); }
    int copy_sequence(int s) override { return pool->copy(s); }
    void free_sequence(int s) override { pool->release(s); }
    size_t state_bytes() override { return pool ? pool->bytes() : 0; }
    int64_t pages_left() override { return states().pages_left(); }
    int64_t pages_wanted(int s, int64_t tokens) override { return pool->pages_wanted(s, tokens); }

    // ---- exchange with the host, which for this trainer is the same place ---------------------------------------------------------------------------

    const Tensors& parameters() override { return params; }
    const Tensors& section(Section s) const {
        return s == Section::PARAMETERS ? params : s == Section::GRADIENTS ? grads : s == Section::MOMENT1 ? moment1 : moment2;
    }
    void get(Section s, int i, float* to) override {
        const real* from = (real*)section(s).data[i];
        std::copy(from, from + params.specs[i].size(), to);
    }
    void set(Section s, int i, const float* from) override { std::copy(from, from + params.specs[i].size(), (real*)section(s).data[i]); }
    std::vector<float> get_memory() override { return std::vector<float>(memory.begin(), memory.end()); }
    void set_memory(const std::vector<float>& m) override {
        assert(m.size() == memory.size());
        std::copy(m.begin(), m.end(), memory.begin());
    }
    size_t parameter_bytes() override { return params_memory.bytes; }
    size_t gradient_bytes() override { return grads_memory.bytes; }
    size_t activation_bytes() override {
        int64_t need = 0;
        for (const AttentionConfig& a : config.attention)
            need = std::max(need, attention(a.name).scratch(a, options.max_tokens, 1, options.max_tokens, options.training));
        return acts_memory.bytes + need * sizeof(real);
    }
};

}  // namespace cpu

bool trainer_on_gpu() { return false; }
std::unique_ptr<Trainer> make_trainer(const ModelConfig& config, const TrainerOptions& options) { return std::make_unique<cpu::Gpt2>(config, options); }

#ifndef GPT2_NO_MAIN

// --------------------------------------------------------------------------------------------------------------------------------------------------
// 3. main

int main(int argc, char** argv) { return run_program(argc, argv); }
#endif
