#pragma once
#include "attention.h"

// --------------------------------------------------------------------------------------------------------------------------------------------------
// 6. Multi-head latent attention, MLA (DeepSeek-V2, arXiv 2405.04434; DeepSeek-V3, arXiv 2412.19437; merging by log-sum-exp: FlashInfer, arXiv 2501.01005)
//
//     cq = RMS(x·Wdqᵀ; gq)   q = cq·Wuqᵀ   (without a query latent q = x·Wqᵀ)     rows per head [qn | qr], qr rotated
//     u  = x·Wdkvᵀ           c = RMS(u[:d_c]; gkv)      kr = rotated u[d_c:], one for all heads
//     kv = c·Wukvᵀ                                                                rows per head [kn | v]
//     s_ij = (qn_i·kn_j + qr_i·kr_j)/√d_qk for j <= i      out = residual + (softmax(s)·v)·Woᵀ
//
// Widths: qn, kn d_nope; qr, kr d_rope; d_qk = d_nope+d_rope; v d_v; cq r_q; c d_c. Wdq (r_q,C), Wuq (NH·d_qk,r_q), Wdkv (d_c+d_rope,C),
// Wukv (NH·(d_nope+d_v),d_c), Wo (C,NH·d_v). No biases. The rope part is MLA's own, whatever --positions says.
// Saves u (c before its norm, kr after its rotation), q (after its rotation), the query latent before its norm, both 1/rms, o and lse:
// N·(d_c + d_rope + r_q + NH·(d_qk+d_v+1) + 2) numbers; backward computes cq, c, kn and v again. State: [c | kr], d_c+d_rope numbers a token.
//
// c is all that attention needs to keep, because the per-head matrices can move to the other side of it (absorption), Wuk_h and Wuv_h being rows of Wukv:
//
//     qn·kn_j = (qn·Wuk_h)·c_j = q̃·c_j      Σ_j p_j·v_j = (Σ_j p_j·c_j)·Wuv_hᵀ = õ·Wuv_hᵀ
//
// which is attention of NH heads over one key [c | kr] and one value c. It spares the expansion of the cache and costs longer dot products.

constexpr int MAX_MLA_DIM = 1 << 16;

// The widths above, and those of whole rows: q (NH·d_qk), kv (NH·(d_nope+d_v)), u and a row of the state (d_c+d_rope), o (NH·d_v).
struct MlaShape {
    int C, NH, r_q, d_c, d_nope, d_rope, d_v, d_qk, d_kv;
    int64_t q, kv, u, o;
    explicit MlaShape(const AttentionConfig& a)
        : C(a.channels), NH(a.heads), r_q(a["q-lora-rank"]), d_c(a["kv-lora-rank"]), d_nope(a["qk-nope-dim"]), d_rope(a["qk-rope-dim"]), d_v(a["v-dim"]),
          d_qk(d_nope + d_rope), d_kv(d_nope + d_v), q((int64_t)NH * d_qk), kv((int64_t)NH * d_kv), u(d_c + d_rope), o((int64_t)NH * d_v) {}
};

inline void mla_resolve(AttentionConfig& a) {
    int hs = a.head_size();
    auto initial = [&](const char* option, int value) {
        if (a[option] == AUTOMATIC) a.options[option] = value;
    };
    initial("qk-nope-dim", hs);
    initial("qk-rope-dim", (hs + 3) / 4 * 2);                       // hs/2, made even
    initial("v-dim", hs);
    initial("kv-lora-rank", ((a.channels + 2) / 3 + 7) / 8 * 8);    // C/3, made a multiple of 8
    if (a["qk-rope-dim"] % 2) usage_error("rotary positions turn pairs of numbers, qk-rope-dim is %d: give an even --qk-rope-dim, or 0 for none", a["qk-rope-dim"]);
    if (a["qk-nope-dim"] + a["qk-rope-dim"] == 0) usage_error("qk-nope-dim 0 and qk-rope-dim 0 leave queries and keys empty: raise --qk-nope-dim or --qk-rope-dim");
}

inline std::vector<TensorSpec> mla_parameters(const AttentionConfig& a) {
    MlaShape d(a);
    std::vector<TensorSpec> list;
    if (d.r_q) list = {matrix_spec("wdq", d.r_q, d.C, 0.02), vector_spec("gq", d.r_q, 1), matrix_spec("wuq", d.q, d.r_q, 0.02)};
    else list = {matrix_spec("wq", d.q, d.C, 0.02)};
    list.insert(list.end(), {matrix_spec("wdkv", d.u, d.C, 0.02), vector_spec("gkv", d.d_c, 1), matrix_spec("wukv", d.kv, d.d_c, 0.02),
                             matrix_spec("wo", d.C, d.o, a.residual_std())});
    return list;
}

inline AttentionStateSize mla_state(const AttentionConfig& a) { return {MlaShape(a).u, 0}; }

inline double mla_flops(const AttentionConfig& a, double T) {
    MlaShape d(a);
    double query = d.r_q ? 2.0 * d.C * d.r_q + 2.0 * d.r_q * d.q : 2.0 * d.C * d.q;
    return query + 2.0 * d.C * d.u + 2.0 * d.d_c * d.kv + 2.0 * (d.q + d.o) * visible_mean(T, 0) + 2.0 * d.C * d.o;
}

inline AttentionDescription mla_description() {
    return {"mla",
            "multi-head latent attention: keys and values from one small latent a token (DeepSeek-V2)",
            {{"q-lora-rank", "width of the query latent; 0: none, queries straight from x", 0, 0, MAX_MLA_DIM},
             {"kv-lora-rank", "width of the latent that keys and values are made from; default: a third of --channels", AUTOMATIC, 1, MAX_MLA_DIM},
             {"qk-nope-dim", "part of each query and key without position; default: channels/heads", AUTOMATIC, 0, MAX_MLA_DIM},
             {"qk-rope-dim", "part with rotary position, even, the key's shared by all heads; 0: none; default: half of channels/heads", AUTOMATIC, 0, MAX_MLA_DIM},
             {"v-dim", "values of each head; default: channels/heads", AUTOMATIC, 1, MAX_MLA_DIM}},
            mla_resolve,
            mla_parameters,
            mla_state,
            mla_flops,
            /*learned_positions*/ false,
            /*recurrent*/ false};
}

// How extend attends from n new tokens to the P before them and to themselves:
enum class MlaForm {
    UNABSORBED,  // keys and values of all P+n tokens are expanded from the cache
    MERGED,      // absorbed on the P tokens of the prefix, expanded keys and values for the n new ones, merged
    ABSORBED,    // all in the latents
};

// Multiply-adds of the three, over NH·(2·d_c − d_nope − d_v), without what they have in common; X = d_c·(d_nope+d_v)/(2·d_c − d_nope − d_v):
//
//     UNABSORBED (P+n)·X      MERGED n·(P+X) + n·X      ABSORBED n·(P+X) + n·(n+1)/2
//
// so that absorption pays iff n + n(n+1)/2P < X. If 2·d_c <= d_nope+d_v it always does.
inline double mla_crossover(const MlaShape& d) {
    double longer = 2.0 * d.d_c - d.d_kv;
    return longer > 0 ? (double)d.d_c * d.d_kv / longer : std::numeric_limits<double>::infinity();
}

inline bool mla_absorb_pays(const AttentionConfig& a, double n, double P) { return P > 0 && n + n * (n + 1) / (2 * P) < mla_crossover(MlaShape(a)); }

inline MlaForm mla_form(const AttentionConfig& a, double n, double P) { return mla_absorb_pays(a, n, P) ? MlaForm::ABSORBED : MlaForm::UNABSORBED; }

namespace cpu {

inline std::vector<TensorSpec> mla_saved(const AttentionConfig& a, int64_t N, int) {
    MlaShape d(a);
    std::vector<TensorSpec> list = {buffer_spec("u", {N, d.u}), buffer_spec("rstd", {N}, Storage::FLOAT32), buffer_spec("q", {N, d.q}), buffer_spec("o", {N, d.o}),
                                    buffer_spec("lse", {N, d.NH}, Storage::FLOAT32)};
    if (d.r_q) list.insert(list.end(), {buffer_spec("uq", {N, d.r_q}), buffer_spec("rstd_q", {N}, Storage::FLOAT32)});
    return list;
}

// The most keys that extend expands for N new tokens when `kv_tokens` are in the caches: absorption leaves only prefixes of P <= n(n+1)/2(X−n) to expansion.
inline int64_t mla_expanded_tokens(const MlaShape& d, int64_t N, int64_t kv_tokens) {
    double X = mla_crossover(d);
    return N < X ? (int64_t)std::min((double)kv_tokens, N + 0.5 * N * (N + 1) / (X - N) + 1) : kv_tokens;
}

inline int64_t mla_scratch(const AttentionConfig& a, int64_t N, int64_t, int64_t kv_tokens, bool training) {
    MlaShape d(a);
    int64_t branch = scratch_size({N * d.C}), heads = (int64_t)d.NH;
    int64_t forward = std::max(branch, scratch_size({N * d.r_q, N * d.d_c, N * d.kv, N * d.q}) + softmax_forward_scratch(N, d.NH, d.d_qk));
    if (training) {
        int64_t attention = scratch_size({N * d.d_c, N * d.kv, N * d.q, N * d.q, N * d.q, N * d.kv, N * d.u, N * d.r_q, N * d.r_q});
        return std::max(forward, scratch_size({N * d.o}) + std::max(branch, attention));
    }
    int64_t K = mla_expanded_tokens(d, N, kv_tokens), query = scratch_size({N * d.r_q, N * d.r_q});
    int64_t unabsorbed = scratch_size({K * d.u, K * d.kv, K * d.q}) + softmax_forward_scratch(K, d.NH, d.d_qk);
    int64_t absorbed = scratch_size({N * d.o, N * heads, N * heads * d.u, N * heads * d.d_c}) + softmax_forward_scratch(kv_tokens, 1, (int)d.u);
    return std::max(forward, scratch_size({N * d.q, N * d.u, N * d.o, N * heads}) + std::max({branch, query, unabsorbed, absorbed}));
}

// Rotates the rope part of every query, q (N,NH·d_qk), and of the rows of kr, u_stride apart, in place. direction −1 is the backward pass.
inline void mla_rope(const AttentionContext& ctx, const MlaShape& d, real* q, real* kr, int direction) {
    if (d.d_rope == 0) return;
    int64_t N = ctx.tokens();
    std::vector<int> position(N), position_of_head(N * d.NH);
    for (int64_t n = 0; n < N; n++) {
        position[n] = ctx.place[n].pos + (ctx.states ? (int)ctx.states[ctx.place[n].seq].length : 0);
        std::fill_n(&position_of_head[n * d.NH], d.NH, position[n]);
    }
    rope(q + d.d_nope, d.d_qk, q + d.d_nope, d.d_qk, N * d.NH, 1, d.d_rope, position_of_head.data(), direction);
    rope(kr, d.u, kr, d.u, N, 1, d.d_rope, position.data(), direction);
}

// q (N,NH·d_qk), before its rotation. With a query latent: uq (N,r_q) before the norm, rstd_q (N), cq (N,r_q).
inline void mla_query_forward(const MlaShape& d, const Tensors& parameters, const real* x, real* uq, real* rstd_q, real* cq, real* q, int64_t N) {
    if (d.r_q == 0) {
        linear_forward(q, x, parameters["wq"], nullptr, N, d.C, d.q);
        return;
    }
    linear_forward(uq, x, parameters["wdq"], nullptr, N, d.C, d.r_q);
    rmsnorm_forward(cq, d.r_q, rstd_q, uq, d.r_q, parameters["gq"], N, d.r_q);
    linear_forward(q, cq, parameters["wuq"], nullptr, N, d.r_q, d.q);
}

// From dq, rotated back: dx (N,C), overwritten, and the gradients of the query's parameters.
inline void mla_query_backward(const MlaShape& d, const Tensors& parameters, const Tensors& gradients, const Tensors& saved, const real* x, const real* dq, real* dx,
                               int64_t N, Scratch scratch) {
    if (d.r_q == 0) {
        linear_backward(dx, false, gradients["wq"], nullptr, dq, x, parameters["wq"], N, d.C, d.q);
        return;
    }
    const real *uq = saved["uq"], *rstd_q = saved["rstd_q"], *gq = parameters["gq"];
    real *cq = scratch.take(N * d.r_q), *duq = scratch.take(N * d.r_q);
    rmsnorm_forward(cq, d.r_q, nullptr, uq, d.r_q, gq, N, d.r_q);
    linear_backward(duq, false, gradients["wuq"], nullptr, dq, cq, parameters["wuq"], N, d.r_q, d.q);  // dcq
    rmsnorm_backward(duq, d.r_q, gradients["gq"], duq, d.r_q, uq, d.r_q, rstd_q, gq, N, d.r_q);
    linear_backward(dx, false, gradients["wdq"], nullptr, duq, x, parameters["wdq"], N, d.C, d.r_q);
}

// kv = c·Wukvᵀ (N,NH·(d_nope+d_v)), rows [kn | v], and keys (N,NH·d_qk), rows [kn | kr]. Rows of c are c_stride apart, those of kr d_c+d_rope.
inline void mla_keys_forward(const MlaShape& d, const real* wukv, const real* c, int64_t c_stride, const real* kr, real* kv, real* keys, int64_t N) {
    matmul(NO, YES, N, d.kv, d.d_c, 1, c, c_stride, wukv, d.d_c, 0, kv, d.kv);
#pragma omp parallel for
    for (int64_t n = 0; n < N; n++)
        for (int h = 0; h < d.NH; h++) {
            real* key = keys + n * d.q + h * d.d_qk;
            memcpy(key, kv + n * d.kv + h * d.d_kv, d.d_nope * sizeof(real));
            memcpy(key + d.d_nope, kr + n * d.u, d.d_rope * sizeof(real));
        }
}

// From dkeys (N,NH·d_qk) and dkv (N,NH·(d_nope+d_v)), whose v parts are known: the kn parts of dkv, du = [dc | dkr] (N,d_c+d_rope), dWukv.
//
//     dkn = dkeys[:d_nope]      dkr = Σ_heads dkeys[d_nope:]      dc = dkv·Wukv      dWukv += dkvᵀ·c
inline void mla_keys_backward(const MlaShape& d, const real* wukv, const real* c, const real* dkeys, real* dkv, real* du, real* dwukv, int64_t N) {
#pragma omp parallel for
    for (int64_t n = 0; n < N; n++) {
        real* dkr = du + n * d.u + d.d_c;
        std::fill_n(dkr, d.d_rope, (real)0);
        for (int h = 0; h < d.NH; h++) {
            const real* dkey = dkeys + n * d.q + h * d.d_qk;
            memcpy(dkv + n * d.kv + h * d.d_kv, dkey, d.d_nope * sizeof(real));
            for (int i = 0; i < d.d_rope; i++) dkr[i] += dkey[d.d_nope + i];
        }
    }
    matmul(NO, NO, N, d.d_c, d.kv, 1, dkv, d.kv, wukv, d.d_c, 0, du, d.u);
    matmul(YES, NO, d.kv, d.d_c, N, 1, dkv, d.kv, c, d.d_c, 1, dwukv, d.d_c);
}

// The softmax core's arguments in the un-absorbed form.
inline SoftmaxAttention mla_core(const AttentionContext& ctx, const MlaShape& d, const real* q, const real* keys, const real* kv) {
    SoftmaxAttention core{};
    core.heads = core.kv_heads = d.NH;
    core.d_qk = d.d_qk;
    core.d_v = d.d_v;
    core.scale = 1 / std::sqrt((real)d.d_qk);
    core.num_seqs = ctx.num_seqs;
    core.cu_q = core.cu_k = ctx.cu_seqlens;
    core.q = q;
    core.k = keys;
    core.v = kv + d.d_nope;
    core.q_stride = core.k_stride = d.q;
    core.v_stride = d.kv;
    core.k_head = d.d_qk;
    core.v_head = d.d_kv;
    core.dropout = ctx.dropout;
    return core;
}

inline void mla_forward(const AttentionContext& ctx, const Tensors& parameters, const Tensors& saved, const real* x, const real* residual, real* out) {
    MlaShape d(*ctx.config);
    int64_t N = ctx.tokens();
    real *u = saved["u"], *q = saved["q"], *o = saved["o"];
    Scratch scratch = ctx.scratch;
    real *cq = scratch.take(N * d.r_q), *c = scratch.take(N * d.d_c), *kv = scratch.take(N * d.kv), *keys = scratch.take(N * d.q);
    real *uq = d.r_q ? saved["uq"] : cq, *rstd_q = d.r_q ? saved["rstd_q"] : cq;
    mla_query_forward(d, parameters, x, uq, rstd_q, cq, q, N);
    linear_forward(u, x, parameters["wdkv"], nullptr, N, d.C, d.u);
    mla_rope(ctx, d, q, u + d.d_c, 1);
    rmsnorm_forward(c, d.d_c, saved["rstd"], u, d.u, parameters["gkv"], N, d.d_c);
    mla_keys_forward(d, parameters["wukv"], c, d.d_c, u + d.d_c, kv, keys, N);
    softmax_forward(mla_core(ctx, d, q, keys, kv), o, d.o, saved["lse"], scratch);
    output_forward(ctx, o, d.o, parameters["wo"], nullptr, residual, out);
}

inline void mla_backward(const AttentionContext& ctx, const Tensors& parameters, const Tensors& gradients, const Tensors& saved, const real* x, const real* dout,
                         real* dx) {
    MlaShape d(*ctx.config);
    int64_t N = ctx.tokens();
    const real *u = saved["u"], *q = saved["q"], *gkv = parameters["gkv"];
    AttentionContext rest = ctx;
    Scratch& scratch = rest.scratch;
    real* d_o = scratch.take(N * d.o);
    output_backward(rest, saved["o"], d.o, parameters["wo"], dout, d_o, gradients["wo"], nullptr);

    real *c = scratch.take(N * d.d_c), *kv = scratch.take(N * d.kv), *keys = scratch.take(N * d.q);
    real *dq = scratch.take(N * d.q), *dkeys = scratch.take(N * d.q), *dkv = scratch.take(N * d.kv), *du = scratch.take(N * d.u);
    rmsnorm_forward(c, d.d_c, nullptr, u, d.u, gkv, N, d.d_c);
    mla_keys_forward(d, parameters["wukv"], c, d.d_c, u + d.d_c, kv, keys, N);
    SoftmaxGradients g{};
    g.o = saved["o"];
    g.lse = saved["lse"];
    g.d_o = d_o;
    g.o_stride = g.do_stride = d.o;
    g.dq = dq;
    g.dk = dkeys;
    g.dv = dkv + d.d_nope;
    g.dq_stride = g.dk_stride = d.q;
    g.dv_stride = d.kv;
    g.dk_head = d.d_qk;
    g.dv_head = d.d_kv;
    softmax_backward(mla_core(ctx, d, q, keys, kv), g);
    mla_keys_backward(d, parameters["wukv"], c, dkeys, dkv, du, gradients["wukv"], N);
    mla_rope(ctx, d, dq, du + d.d_c, -1);
    rmsnorm_backward(du, d.u, gradients["gkv"], du, d.u, u, d.u, saved["rstd"], gkv, N, d.d_c);
    mla_query_backward(d, parameters, gradients, saved, x, dq, dx, N, scratch);
    linear_backward(dx, true, gradients["wdkv"], nullptr, du, x, parameters["wdkv"], N, d.C, d.u);
}

// ---- extend: some keys are expanded, others attended to as latents, and what both saw is merged ------------------------------------------------------

// Softmax over two sets of keys from each set's output o (rows,d) and log-sum-exp (rows): with m = max(lse1,lse2), w = exp(lse − m)
//
//     o = (w1·o1 + w2·o2)/(w1 + w2)      lse = m + ln(w1 + w2)
//
// in place of the first. Where a lse is −inf (no keys) its o may be anything; where both are, o = 0.
inline void softmax_merge(real* o1, real* lse1, const real* o2, const real* lse2, int64_t rows, int d) {
#pragma omp parallel for
    for (int64_t r = 0; r < rows; r++) {
        bool none1 = lse1[r] == MINUS_INFINITY, none2 = lse2[r] == MINUS_INFINITY;
        real m = std::max(lse1[r], lse2[r]), w1 = none1 ? 0 : std::exp(lse1[r] - m), w2 = none2 ? 0 : std::exp(lse2[r] - m), sum = w1 + w2;
        for (int c = 0; c < d; c++) o1[r * d + c] = (none1 ? 0 : w1 / sum * o1[r * d + c]) + (none2 ? 0 : w2 / sum * o2[r * d + c]);
        lse1[r] = none1 && none2 ? MINUS_INFINITY : m + std::log(sum);
    }
}

// o (N,NH·d_v), lse (N,NH) over the last cu_k[s+1]−cu_k[s] tokens of each sequence, un-absorbed: their keys and values are expanded from the cache.
inline void mla_unabsorbed(const AttentionContext& ctx, const MlaShape& d, const real* wukv, const real* q, const int* cu_k, real* o, real* lse, Scratch scratch) {
    int64_t K = cu_k[ctx.num_seqs];
    real *latents = scratch.take(K * d.u), *kv = scratch.take(K * d.kv), *keys = scratch.take(K * d.q);
    for (int s = 0; s < ctx.num_seqs; s++) {
        int64_t n = cu_k[s + 1] - cu_k[s], first = ctx.states[s].length + ctx.cu_seqlens[s + 1] - ctx.cu_seqlens[s] - n;
        for (int64_t j = 0; j < n; j++) memcpy(latents + (cu_k[s] + j) * d.u, ctx.states[s].row(first + j), d.u * sizeof(real));
    }
    mla_keys_forward(d, wukv, latents, d.u, latents + d.d_c, kv, keys, K);
    SoftmaxAttention core = mla_core(ctx, d, q, keys, kv);
    core.cu_k = cu_k;
    softmax_forward(core, o, d.o, lse, scratch);
}

// o, lse over the first cu_k[s+1]−cu_k[s] tokens of each sequence, absorbed; o is not written in a sequence where they are none.
inline void mla_absorbed(const AttentionContext& ctx, const MlaShape& d, const real* wukv, const real* q, const int* cu_k, real* o, real* lse, Scratch scratch) {
    int64_t N = ctx.tokens(), q_stride = d.NH * d.u, o_stride = (int64_t)d.NH * d.d_c;
    real *q_absorbed = scratch.take(N * q_stride), *o_absorbed = scratch.take(N * o_stride);
    std::vector<int> q_at;
    for (int s = 0; s < ctx.num_seqs; s++) q_at.push_back((int)ctx.states[s].length);
    // For each head (whose matrix stays in cache) and sequence, q̃ = [qn·Wuk_h | qr].
#pragma omp parallel for collapse(2) schedule(static)
    for (int h = 0; h < d.NH; h++)
        for (int s = 0; s < ctx.num_seqs; s++) {
            int64_t n0 = ctx.cu_seqlens[s], rows = cu_k[s + 1] > cu_k[s] ? ctx.cu_seqlens[s + 1] - n0 : 0;
            const real *wuk = wukv + (int64_t)h * d.d_kv * d.d_c, *from = q + n0 * d.q + h * d.d_qk;
            real* to = q_absorbed + n0 * q_stride + h * d.u;
            tile_matmul((int)rows, d.d_c, d.d_nope, from, d.q, 1, wuk, d.d_c, to, q_stride, false);
            for (int64_t i = 0; i < rows; i++) memcpy(to + i * q_stride + d.d_c, from + i * d.q + d.d_nope, d.d_rope * sizeof(real));
        }

    SoftmaxAttention core = mla_core(ctx, d, q_absorbed, nullptr, nullptr);
    core.kv_heads = 1;
    core.d_qk = (int)d.u;  // the scale stays 1/√(d_nope+d_rope)
    core.d_v = d.d_c;
    core.q_stride = q_stride;
    core.cu_k = cu_k;
    core.q_at = q_at.data();
    core.states = ctx.states;
    softmax_forward(core, o_absorbed, o_stride, lse, scratch);

    // o = õ·Wuv_hᵀ
#pragma omp parallel
    {
        std::vector<real> transposed((size_t)d.d_c * d.d_v);
#pragma omp for collapse(2) schedule(static)
        for (int h = 0; h < d.NH; h++)
            for (int s = 0; s < ctx.num_seqs; s++) {
                int64_t n0 = ctx.cu_seqlens[s], rows = cu_k[s + 1] > cu_k[s] ? ctx.cu_seqlens[s + 1] - n0 : 0;
                const real *wuv = wukv + ((int64_t)h * d.d_kv + d.d_nope) * d.d_c, *from = o_absorbed + n0 * o_stride + h * d.d_c;
                real* to = o + n0 * d.o + h * d.d_v;
                if (few_queries((int)rows)) {
                    for (int c = 0; c < d.d_v; c++)
                        for (int64_t i = 0; i < rows; i++) to[i * d.o + c] = dot(d.d_c, from + i * o_stride, wuv + (int64_t)c * d.d_c);
                    continue;
                }
                tile_transpose(d.d_v, d.d_c, wuv, d.d_c, transposed.data(), d.d_v);
                tile_matmul((int)rows, d.d_v, d.d_c, from, o_stride, 1, transposed.data(), d.d_v, to, d.o, false);
            }
    }
}

// extend, each sequence in the form that `choose` (configuration, n, P) says. Scratch: mla_scratch() knows of mla_form's choice only.
inline void mla_extend_as(const AttentionContext& ctx, const Tensors& parameters, const real* x, const real* residual, real* out,
                          MlaForm (*choose)(const AttentionConfig&, double n, double P)) {
    MlaShape d(*ctx.config);
    int64_t N = ctx.tokens();
    AttentionContext rest = ctx;
    Scratch& scratch = rest.scratch;
    real *q = scratch.take(N * d.q), *u = scratch.take(N * d.u), *o = scratch.take(N * d.o), *lse = scratch.take(N * d.NH);
    {
        Scratch latent = scratch;
        real *uq = latent.take(N * d.r_q), *cq = latent.take(N * d.r_q);
        mla_query_forward(d, parameters, x, uq, nullptr, cq, q, N);
    }
    linear_forward(u, x, parameters["wdkv"], nullptr, N, d.C, d.u);
    mla_rope(ctx, d, q, u + d.d_c, 1);
    rmsnorm_forward(u, d.u, nullptr, u, d.u, parameters["gkv"], N, d.d_c);  // u is now [c | kr], a row of the state
    for (int64_t n = 0; n < N; n++) {
        const AttentionState& state = ctx.states[ctx.place[n].seq];
        memcpy(state.row(state.length + ctx.place[n].pos), u + n * d.u, d.u * sizeof(real));
    }

    std::vector<int> cu_expanded(1, 0), cu_latent(1, 0);  // how many of the last tokens are expanded, of the first attended to as latents
    for (int s = 0; s < ctx.num_seqs; s++) {
        int n = ctx.cu_seqlens[s + 1] - ctx.cu_seqlens[s], P = (int)ctx.states[s].length;
        MlaForm form = choose(*ctx.config, n, P);
        int latent = form == MlaForm::ABSORBED ? P + n : form == MlaForm::MERGED ? P : 0;
        cu_latent.push_back(cu_latent[s] + (n > 0 ? latent : 0));
        cu_expanded.push_back(cu_expanded[s] + (n > 0 ? P + n - latent : 0));
    }
    bool absorbed = cu_latent.back() > 0, unabsorbed = cu_expanded.back() > 0;
    if (unabsorbed) mla_unabsorbed(ctx, d, parameters["wukv"], q, cu_expanded.data(), o, lse, scratch);
    if (absorbed && !unabsorbed) mla_absorbed(ctx, d, parameters["wukv"], q, cu_latent.data(), o, lse, scratch);
    if (absorbed && unabsorbed) {
        Scratch part = scratch;
        real *o2 = part.take(N * d.o), *lse2 = part.take(N * d.NH);
        mla_absorbed(ctx, d, parameters["wukv"], q, cu_latent.data(), o2, lse2, part);
        softmax_merge(o, lse, o2, lse2, N * d.NH, d.d_v);
    }
    output_forward(rest, o, d.o, parameters["wo"], nullptr, residual, out);
}

inline void mla_extend(const AttentionContext& ctx, const Tensors& parameters, const real* x, const real* residual, real* out) {
    mla_extend_as(ctx, parameters, x, residual, out, mla_form);
}

inline Attention mla_attention() { return {"mla", mla_saved, mla_scratch, mla_forward, mla_backward, mla_extend}; }

}  // namespace cpu
