// The attention seam and the four attention layers on the GPU: the twins of attention.h, function for function. What is launched here stands in gpt2/cuda;
// equations, shapes, what is saved and why stand in attention.h and are not repeated.
//
// Sections have the numbers that they have there; 2, the softmax core, stands in gpt2/cuda/softmax_forward.cuh, softmax_backward.cuh and decode.cuh.
// N tokens stand packed, one sequence behind another. Storage is floatX, memories and statistics float32 (gpt2/cuda/common.cuh).
#pragma once

#include "attention.h"
#include "gpt2/cuda/chain.cuh"
#include "gpt2/cuda/common.cuh"
#include "gpt2/cuda/decode.cuh"
#include "gpt2/cuda/infini.cuh"
#include "gpt2/cuda/infini_decode.cuh"
#include "gpt2/cuda/layernorm.cuh"
#include "gpt2/cuda/lightning.cuh"
#include "gpt2/cuda/matmul.cuh"
#include "gpt2/cuda/matvec.cuh"
#include "gpt2/cuda/merge.cuh"
#include "gpt2/cuda/mla.cuh"
#include "gpt2/cuda/residual.cuh"
#include "gpt2/cuda/rope.cuh"
#include "gpt2/cuda/softmax.cuh"
#include "gpt2/cuda/softmax_backward.cuh"
#include "gpt2/cuda/softmax_forward.cuh"

// --------------------------------------------------------------------------------------------------------------------------------------------------
// 1. The seam

namespace gpu {

// What goes with every call. Arrays are device memory unless their name says host.
struct AttentionContext {
    const AttentionConfig* config;
    cudaStream_t stream;
    int num_seqs;
    int64_t num_tokens;          // N
    int max_len;                 // tokens of the longest sequence
    const int* cu_seqlens;       // (num_seqs+1) offsets of the sequences; lengths of 0 are legal
    const int* cu_seqlens_host;  // the same
    const TokenPlace* place;     // (N) sequence and position of each token; positions count from 0 in each sequence (in extend: of the new tokens)
    const int* position;         // (N) its position with what extend's sequences hold already
    DropoutKey dropout;          // p = 0 in evaluation
    Scratch scratch;

    // backward: a bias gradient to which Σ_n dout has been added already, by the LayerNorm that has left dout; or null.
    const float* summed = nullptr;

    // extend: the state of each sequence, and the keys in it once the new tokens are there.
    const AttentionState* states = nullptr;  // (num_seqs)
    StatePages pages;                        // what the states of all sequences share
    int window = 0;                          // a sliding window beside the layer's own, tokens that a token sees with itself in layers that keep rows (0: none)
    const int64_t* lengths_host = nullptr;   // (num_seqs) rows in each state, before the new ones
    const int* cu_kv = nullptr;              // (num_seqs+1) offsets of old and new tokens together
    int64_t kv_tokens = 0;                   // cu_kv[num_seqs]
    int max_kv = 0;                          // the longest
    // extend of few tokens: x comes before its LayerNorm, whose parameters these are, and the linear layers are linear_few's (matvec.cuh). gain null: many
    // tokens, and x is normalised.
    NormParameters norm = {};
    // ... and where these go: what is added to the chain is computed when it is launched. input_forward() and linear_forward() launch, so that kernels of a
    // layer's own may follow; output_forward(), with which every layer ends, leaves that to whoever goes on.
    Chain* chain = nullptr;

    // forward, recurrent layers: the memory (AttentionState::fixed) each sequence starts from and where it leaves its own, (num_seqs) pointers, null: empty,
    // nowhere. Null arrays: no sequence has one. The host's copies hold the same pointers.
    const float* const* memory_from = nullptr;
    float* const* memory_to = nullptr;
    const float* const* memory_from_host = nullptr;
    float* const* memory_to_host = nullptr;

    int64_t tokens() const { return num_tokens; }
};

// The table of functions each attention layer provides, as cpu::Attention. Gradients are float32, everything else as its TensorSpec says.
struct Attention {
    const char* name;
    std::vector<TensorSpec> (*saved)(const AttentionConfig&, int64_t N, int lanes);
    // Bytes of scratch memory that forward and backward (training), or forward and extend (otherwise) take. max_len: tokens of the longest sequence. kv_tokens:
    // a bound on the keys that the new tokens meet: extend's cu_kv[num_seqs]; in training N, or with carried memories more than they can hold.
    int64_t (*scratch)(const AttentionConfig&, int64_t N, int64_t num_seqs, int max_len, int64_t kv_tokens, bool training);
    void (*forward)(const AttentionContext&, const Tensors& parameters, const Tensors& saved, const floatX* x, const floatX* residual, floatX* out);
    void (*backward)(const AttentionContext&, const Tensors& parameters, const Tensors& gradients, const Tensors& saved, const floatX* x, const floatX* dout,
                     floatX* dx);
    void (*extend)(const AttentionContext&, const Tensors& parameters, const floatX* x, const floatX* residual, floatX* out);
};

inline const Attention& attention(const std::string& name);

// out (N,OC) = [residual +] u·Wᵀ + b, u (N,IC).
inline void linear_forward(const AttentionContext& ctx, floatX* out, const floatX* u, const floatX* w, const floatX* b, int64_t IC, int64_t OC,
                           const floatX* residual = nullptr) {
    if (ctx.norm.gain) {
        ctx.chain->linear_few(out, u, nullptr, w, b, ctx.tokens(), IC, OC, false, residual);
        ctx.chain->launch();
    } else {
        linear_forward(ctx.stream, out, u, w, b, ctx.tokens(), IC, OC, residual);
    }
}
// The same of a layer's input x (N,C).
inline void input_forward(const AttentionContext& ctx, floatX* out, const floatX* x, const floatX* w, const floatX* b, int64_t OC) {
    if (ctx.norm.gain) {
        ctx.chain->linear_few(out, x, &ctx.norm, w, b, ctx.tokens(), ctx.config->channels, OC, false, nullptr);
        ctx.chain->launch();
    } else {
        linear_forward(ctx.stream, out, x, w, b, ctx.tokens(), ctx.config->channels, OC);
    }
}

// The end of every layer: out = residual + Z⊙(o·Woᵀ + bo), o (N,D), Wo (C,D), bo (C) or null; Z is the residual branch's dropout.
// Takes scratch for (N,C) floatX if there is dropout.
inline void output_forward(const AttentionContext& ctx, const floatX* o, int64_t D, const floatX* wo, const floatX* bo, const floatX* residual, floatX* out) {
    int64_t N = ctx.tokens(), C = ctx.config->channels;
    if (ctx.norm.gain) {
        ctx.chain->linear_few(out, o, nullptr, wo, bo, N, D, C, false, residual);
        return;
    }
    if (ctx.dropout.p == 0) {
        linear_forward(ctx.stream, out, o, wo, bo, N, D, C, residual);
        return;
    }
    Scratch scratch = ctx.scratch;
    floatX* branch = scratch.take<floatX>(N * C);
    linear_forward(ctx.stream, branch, o, wo, bo, N, D, C);
    dropout_add(ctx.stream, out, residual, branch, ctx.dropout, DROP_ATTENTION, ctx.place, N, C);
}

// do (N,D) = (Z⊙dout)·Wo;  dWo += (Z⊙dout)ᵀ·o;  dbo += Σ_n Z⊙dout, unless it is ctx.summed.
inline void output_backward(const AttentionContext& ctx, const floatX* o, int64_t D, const floatX* wo, const floatX* dout, floatX* d_o, float* dwo,
                            float* dbo) {
    int64_t N = ctx.tokens(), C = ctx.config->channels;
    Scratch scratch = ctx.scratch;
    if (ctx.dropout.p > 0) {
        floatX* dbranch = scratch.take<floatX>(N * C);
        dropout_add(ctx.stream, dbranch, nullptr, dout, ctx.dropout, DROP_ATTENTION, ctx.place, N, C);
        dout = dbranch;
    }
    linear_backward(ctx.stream, d_o, false, dwo, dbo == ctx.summed ? nullptr : dbo, dout, o, wo, N, D, C);
}

}  // namespace gpu

// --------------------------------------------------------------------------------------------------------------------------------------------------
// 3. Causal attention
//
// Saves qkv (after the rotation), o and lse, (NH,N) here. Extending
//     by few tokens a sequence   attends to the pages where they are (decode.cuh);
//     sequences without a past   is the forward pass of training: the new tokens are all there is, their keys and values stand in qkv, and what goes to the
//                                pages is a copy beside it;
//     others by more tokens      gathers each sequence's rows first, and the core for packed rows does the rest. n new tokens behind P take 4·NH·hs·n·(P + n/2)
//                                FLOPs; gathering reads and writes 4·KV·hs·(P+n) numbers. On an H100 in bf16, with KV = NH, that is half of the FLOPs' time for
//                                n = 512, a sixth for n = 2048.

namespace gpu {

inline std::vector<TensorSpec> causal_saved(const AttentionConfig& a, int64_t N, int) {
    return {buffer_spec("qkv", {N, qkv_size(a)}), buffer_spec("o", {N, a.channels}), buffer_spec("lse", {a.heads, N}, Storage::FLOAT32)};
}

// Beyond so many new tokens in one sequence, keys and values are gathered. Few queries give the core for packed rows few blocks, each of which walks over all
// keys, where decoding cuts the keys; from 64 rows on (a query with one of its heads) decoding reads every key again. On an H100, one sequence, 8192 tokens
// behind, 12 heads of 64: from the pages 53 µs for 16 new tokens, 69 for 64, 237 for 512; gathered 113, 113, 149.
constexpr int MAX_DECODE_QUERIES = sizeof(floatX) == 2 ? 64 : 16;

// extend: do all sequences that have new tokens begin with them? Not asked of a decode step, whose launches must not depend on lengths.
inline bool without_past(const AttentionContext& ctx) {
    if (ctx.max_len <= 1) return false;
    for (int s = 0; s < ctx.num_seqs; s++)
        if (ctx.lengths_host[s] > 0 && ctx.cu_seqlens_host[s + 1] > ctx.cu_seqlens_host[s]) return false;
    return true;
}

inline int64_t causal_scratch(const AttentionConfig& a, int64_t N, int64_t num_seqs, int max_len, int64_t kv_tokens, bool training) {
    int64_t size = sizeof(floatX), C = a.channels, qkv = N * qkv_size(a) * size, row = causal_state(a).per_token, branch = scratch_bytes({N * C * size});
    int heads = a.heads, kv_heads = a["kv-heads"], hs = a.head_size();
    if (training) return scratch_bytes({N * C * size, qkv}) + std::max(branch, round_up(softmax_backward_scratch(heads, kv_heads, hs, hs, N, N), 256));
    int queries = std::min(max_len, MAX_DECODE_QUERIES);
    int64_t decode = softmax_decode_scratch(heads, kv_heads, hs, hs, (int)num_seqs, queries);
    int64_t gathered = max_len > MAX_DECODE_QUERIES ? scratch_bytes({kv_tokens * row * size}) : 0;
    return scratch_bytes({qkv, N * C * size}) + std::max({branch, decode, gathered});
}

// The softmax core's arguments for q, k, v packed in rows of qkv_size.
inline SoftmaxAttention causal_core(const AttentionContext& ctx, const floatX* qkv) {
    const AttentionConfig& a = *ctx.config;
    SoftmaxAttention core{};
    core.heads = a.heads;
    core.kv_heads = a["kv-heads"];
    core.d_qk = core.d_v = a.head_size();
    core.scale = 1 / std::sqrt((float)a.head_size());
    core.num_seqs = ctx.num_seqs;
    core.max_q = core.max_k = ctx.max_len;
    core.q_rows = ctx.tokens();
    core.cu_q = core.cu_k = ctx.cu_seqlens;
    core.q = qkv;
    core.k = qkv + a.channels;
    core.v = core.k + core.kv_heads * core.d_qk;
    core.q_stride = core.k_stride = core.v_stride = qkv_size(a);
    core.k_head = core.v_head = core.d_qk;
    core.dropout = ctx.dropout;
    return core;
}

// Rotates q and k, which stand side by side, in place.
inline void causal_rope(const AttentionContext& ctx, floatX* qkv, int direction) {
    const AttentionConfig& a = *ctx.config;
    int64_t row = qkv_size(a);
    rope(ctx.stream, qkv, row, qkv, row, ctx.tokens(), a.heads + a["kv-heads"], a.head_size(), a.head_size(), ctx.position, direction);
}

inline void causal_forward(const AttentionContext& ctx, const Tensors& parameters, const Tensors& saved, const floatX* x, const floatX* residual, floatX* out) {
    const AttentionConfig& a = *ctx.config;
    floatX *qkv = saved["qkv"], *o = saved["o"];
    linear_forward(ctx.stream, qkv, x, parameters["wqkv"], parameters["bqkv"], ctx.tokens(), a.channels, qkv_size(a));
    if (a.positions == Positions::ROPE) causal_rope(ctx, qkv, 1);
    SoftmaxAttention core = causal_core(ctx, qkv);
    core.window = a["window"];
    softmax_forward(ctx.stream, core, o, a.channels, saved["lse"]);
    output_forward(ctx, o, a.channels, parameters["wo"], parameters["bo"], residual, out);
}

inline void causal_backward(const AttentionContext& ctx, const Tensors& parameters, const Tensors& gradients, const Tensors& saved, const floatX* x,
                            const floatX* dout, floatX* dx) {
    const AttentionConfig& a = *ctx.config;
    int64_t N = ctx.tokens(), C = a.channels;
    AttentionContext rest = ctx;
    floatX *d_o = rest.scratch.take<floatX>(N * C), *dqkv = rest.scratch.take<floatX>(N * qkv_size(a));
    output_backward(rest, saved["o"], C, parameters["wo"], dout, d_o, gradients["wo"], gradients["bo"]);
    SoftmaxAttention core = causal_core(ctx, saved["qkv"]);
    core.window = a["window"];
    SoftmaxGradients g{};
    g.o = saved["o"];
    g.lse = saved["lse"];
    g.d_o = d_o;
    g.o_stride = g.do_stride = C;
    g.dq = dqkv;
    g.dk = dqkv + (core.k - core.q);
    g.dv = dqkv + (core.v - core.q);
    g.dq_stride = g.dk_stride = g.dv_stride = qkv_size(a);
    g.dk_head = g.dv_head = a.head_size();
    float* dbqkv = gradients["bqkv"];  // the sum of dqkv's rows: left by softmax_backward, unless they are rotated back behind it
    const bool rotated = a.positions == Positions::ROPE;
    if (!rotated) g.dbias = dbqkv;
    softmax_backward(ctx.stream, core, g, rest.scratch);
    if (rotated) causal_rope(ctx, dqkv, -1);
    linear_backward(ctx.stream, dx, false, gradients["wqkv"], rotated ? dbqkv : nullptr, dqkv, x, parameters["wqkv"], N, C, qkv_size(a));
}

inline void causal_extend(const AttentionContext& ctx, const Tensors& parameters, const floatX* x, const floatX* residual, floatX* out) {
    const AttentionConfig& a = *ctx.config;
    int64_t N = ctx.tokens(), C = a.channels, row = causal_state(a).per_token;
    AttentionContext rest = ctx;
    floatX *qkv = rest.scratch.take<floatX>(N * qkv_size(a)), *o = rest.scratch.take<floatX>(N * C);
    bool rotate = a.positions == Positions::ROPE, fresh = without_past(ctx), decode = !fresh && ctx.max_len <= MAX_DECODE_QUERIES;
    SoftmaxAttention core = causal_core(ctx, qkv);
    core.window = narrower_window(a["window"], ctx.window);
    if (decode) {
        core.cu_k = ctx.cu_kv;
        core.max_k = ctx.max_kv;
        core.states = ctx.states;
        core.pages = ctx.pages;
        core.v_offset = row / 2;
    }
    if (decode && ctx.norm.gain) {
        ctx.chain->linear_few(qkv, x, &ctx.norm, parameters["wqkv"], parameters["bqkv"], N, C, qkv_size(a), false, nullptr);
        if (ctx.chain->causal_token(core, ctx.position, rotate, o)) {
            output_forward(rest, o, C, parameters["wo"], parameters["bo"], residual, out);
            return;
        }
        ctx.chain->launch();
    } else {
        input_forward(ctx, qkv, x, parameters["wqkv"], parameters["bqkv"], qkv_size(a));
    }
    bool overlap = ctx.norm.gain != nullptr;  // all launches before are kernels, and states and places were there before the first
    if (rotate && decode) {
        rope_append(ctx.stream, ctx.states, ctx.place, qkv, qkv_size(a), N, a.heads, a["kv-heads"], a.head_size(), ctx.position, overlap);
    } else {
        if (rotate) causal_rope(ctx, qkv, 1);
        append_rows(ctx.stream, ctx.states, ctx.place, qkv + C, qkv_size(a), (int)row, N, overlap);
    }
    if (fresh) {
        softmax_forward(ctx.stream, core, o, C, nullptr);
    } else if (decode) {
        softmax_decode(ctx.stream, core, o, C, nullptr, rest.scratch, overlap);
    } else {
        Scratch scratch = rest.scratch;
        floatX* rows = scratch.take<floatX>(ctx.kv_tokens * row);
        gather_rows(ctx.stream, rows, ctx.states, ctx.cu_kv, ctx.num_seqs, ctx.max_kv, (int)row);
        core.cu_k = ctx.cu_kv;
        core.max_k = ctx.max_kv;
        core.k = rows;
        core.v = rows + row / 2;
        core.k_stride = core.v_stride = row;
        softmax_forward(ctx.stream, core, o, C, nullptr);
    }
    output_forward(rest, o, C, parameters["wo"], parameters["bo"], residual, out);
}

inline Attention causal_attention() { return {"causal", causal_saved, causal_scratch, causal_forward, causal_backward, causal_extend}; }

}  // namespace gpu

// --------------------------------------------------------------------------------------------------------------------------------------------------
// 4. Infini-attention
//
// Saves what the CPU saves, lse as (NH,N). Only the device knows how many tokens a sequence has pending from the pass before (infini_pass.cuh), so a pass
// that starts from states packs the keys of all segments in scratch memory, pending ones first; any other reads them where they are, in qkv. Extending by one
// token a text is a kernel of its own, which leaves everything where it is (infini_decode.cuh).

namespace gpu {

inline std::vector<TensorSpec> infini_saved(const AttentionConfig& a, int64_t N, int lanes) {
    return {buffer_spec("qkv", {N, qkv_size(a)}), buffer_spec("d", {N, a.channels}), buffer_spec("lse", {a.heads, N}, Storage::FLOAT32),
            buffer_spec("memory", {N / a["segment"] + lanes, infini_memory_size(a)}, Storage::FLOAT32),
            buffer_spec("carry", {lanes, infini_state(a).per_sequence}, Storage::FLOAT32)};
}

// What infini_core takes: q and k after the rotation.
inline int64_t infini_core_scratch(const AttentionConfig& a, const InfiniPass& p) {
    if (a.positions != Positions::ROPE) return 0;
    int64_t size = sizeof(floatX), q = p.num_tokens * p.channels() * size;
    return p.carried ? scratch_bytes({q, p.max_keys * p.kv_channels() * size}) : scratch_bytes({q + p.num_tokens * p.kv_channels() * size});
}

// Scratch for infini_core_backward(): dden, dmemories; then what each of its parts takes.
inline int64_t infini_core_backward_scratch(const AttentionConfig& a, const InfiniPass& p) {
    int64_t N = p.num_tokens, size = sizeof(floatX);
    int64_t local = infini_core_scratch(a, p) + (p.carried ? scratch_bytes({p.max_keys * p.row_size() * size}) : 0) +
                    softmax_backward_scratch(p.heads, p.kv_heads, p.hs, p.hs, N, p.max_keys);
    return scratch_bytes({N * p.heads * (int64_t)sizeof(float), p.max_memories * infini_memory_size(a) * (int64_t)sizeof(float)}) +
           std::max({local, infini_read_backward_scratch(p), infini_write_scratch(p)});
}

// kv_tokens: at least N + lanes·(segment−1) if forward and backward are to start from that many carried memories; N if they never do.
inline int64_t infini_scratch(const AttentionConfig& a, int64_t N, int64_t num_seqs, int, int64_t kv_tokens, bool training) {
    bool carried = !training || kv_tokens > N || a["segment"] == 1;  // segments of one token never leave any pending
    InfiniPass p = infini_shape(a, N, num_seqs, N, carried ? num_seqs : 0, kv_tokens);
    int64_t size = sizeof(floatX), C = a.channels, branch = scratch_bytes({N * C * size}), tables = infini_tables_bytes(p);
    int64_t memories = p.max_memories * infini_memory_size(a) * (int64_t)sizeof(float), write = infini_write_scratch(p), core = infini_core_scratch(a, p);
    int64_t forward = scratch_bytes({N * C * size}) + tables + std::max({core, write, branch});
    if (!training) return forward + scratch_bytes({N * qkv_size(a) * size, memories});
    return std::max(forward,
                    scratch_bytes({N * C * size, N * C * size, N * qkv_size(a) * size}) + tables + std::max(infini_core_backward_scratch(a, p), branch));
}

// ---- local attention: segments are sequences of the softmax core ----------------------------------------------------------------------------------

// The core's arguments. q and k after the rotation, if there is one, are taken from `scratch`.
inline SoftmaxAttention infini_core(const AttentionContext& ctx, const InfiniPass& p, Scratch& scratch) {
    int64_t N = ctx.tokens(), C = p.channels(), KVhs = p.kv_channels();
    SoftmaxAttention core = causal_core(ctx, p.qkv);
    core.num_seqs = p.max_segments;
    core.max_q = p.max_q();
    core.max_k = p.max_k();
    core.cu_q = p.cu_q;
    core.cu_k = p.cu_k;
    core.drop_seq = p.seq;
    core.drop_pos = p.start;
    core.k = p.keys;
    core.v = p.keys + KVhs;
    core.k_stride = core.v_stride = p.key_stride;
    if (ctx.config->positions != Positions::ROPE) return core;
    if (p.carried) {
        floatX *q = scratch.take<floatX>(N * C), *k = scratch.take<floatX>(p.max_keys * KVhs);
        rope(ctx.stream, q, C, p.qkv, p.qkv_stride(), N, p.heads, p.hs, p.hs, p.position, 1);
        rope(ctx.stream, k, KVhs, p.keys, p.key_stride, p.max_keys, p.kv_heads, p.hs, p.hs, p.key_position, 1);
        core.q = q;
        core.q_stride = C;
        core.k = k;
        core.k_stride = KVhs;
    } else {
        floatX* rotated = scratch.take<floatX>(N * (C + KVhs));
        rope(ctx.stream, rotated, C + KVhs, p.qkv, p.qkv_stride(), N, p.heads + p.kv_heads, p.hs, p.hs, p.position, 1);
        core.q = rotated;
        core.k = rotated + C;
        core.q_stride = core.k_stride = C + KVhs;
    }
    return core;
}

// D (N,C), lse (NH,N) or null.
inline void infini_local_forward(const AttentionContext& ctx, const InfiniPass& p, floatX* D, float* lse) {
    if (ctx.tokens() == 0) return;
    Scratch scratch = ctx.scratch;
    softmax_forward(ctx.stream, infini_core(ctx, p, scratch), D, p.channels(), lse);
}

// From dD (N,C): dq, dk, dv in dqkv (N, qkv_size), overwritten. Pending tokens are constants: their dk, dv go nowhere.
inline void infini_local_backward(const AttentionContext& ctx, const InfiniPass& p, const floatX* D, const float* lse, const floatX* dD, floatX* dqkv) {
    if (ctx.tokens() == 0) return;
    Scratch scratch = ctx.scratch;
    SoftmaxAttention core = infini_core(ctx, p, scratch);
    floatX* dkeys = p.carried ? scratch.take<floatX>(p.max_keys * p.row_size()) : dqkv + p.channels();
    SoftmaxGradients g{};
    g.o = D;
    g.lse = lse;
    g.d_o = dD;
    g.o_stride = g.do_stride = p.channels();
    g.dq = dqkv;
    g.dk = dkeys;
    g.dv = dkeys + p.kv_channels();
    g.dq_stride = p.qkv_stride();
    g.dk_stride = g.dv_stride = p.carried ? p.row_size() : p.qkv_stride();
    g.dk_head = g.dv_head = p.hs;
    softmax_backward(ctx.stream, core, g, scratch);
    if (p.carried) infini_key_gradients(ctx.stream, p, dkeys, dqkv);
    if (ctx.config->positions == Positions::ROPE)
        rope(ctx.stream, dqkv, p.qkv_stride(), dqkv, p.qkv_stride(), ctx.tokens(), p.heads + p.kv_heads, p.hs, p.hs, p.position, -1);
}

// ---- both together --------------------------------------------------------------------------------------------------------------------------------

// D (N,C), lse (NH,N) or null: local attention. A (N,C), which may be D: all of it.
inline void infini_core_forward(const AttentionContext& ctx, const InfiniPass& p, const float* beta, floatX* D, float* lse, floatX* A) {
    infini_local_forward(ctx, p, D, lse);
    infini_write(ctx.stream, p, ctx.scratch);
    infini_retrieve(ctx.stream, p, beta, D, A);
}

// From dA (N,C): dβ (NH) +=, dq, dk, dv in dqkv (N, qkv_size), overwritten. other (N,C): scratch.
inline void infini_core_backward(const AttentionContext& ctx, const InfiniPass& p, const float* beta, float* dbeta, const floatX* D, const float* lse,
                                 const floatX* dA, floatX* other, floatX* dqkv) {
    AttentionContext rest = ctx;
    float *dden = rest.scratch.take<float>(p.num_tokens * p.heads), *dmemories = rest.scratch.take<float>(p.max_memories * infini_memory_size(*ctx.config));
    const floatX* dD = infini_local_gradient(ctx.stream, p, beta, dA, other);
    infini_local_backward(rest, p, D, lse, dD, dqkv);
    floatX* dn = other;  // dD is needed no more
    infini_gradients(ctx.stream, p, beta, dbeta, D, dA, dn, dden, dqkv, dmemories, rest.scratch);
}

// ---- the layer ------------------------------------------------------------------------------------------------------------------------------------

// A pass of forward() or backward(). The states of lanes are copied to saved["carry"] when forward() begins, since it may overwrite them, and found there by
// backward().
inline InfiniPass infini_pass(const AttentionContext& ctx, const Tensors& saved, bool forward, Scratch& scratch) {
    int64_t S = (*ctx.config)["segment"], lanes = 0;
    for (int s = 0; s < ctx.num_seqs && ctx.memory_from; s++) lanes += ctx.memory_from_host[s] != nullptr;
    assert(lanes <= saved.specs[saved.find("carry")].shape[0]);
    InfiniPass p = infini_shape(*ctx.config, ctx.tokens(), ctx.num_seqs, ctx.max_len, lanes, ctx.tokens() + lanes * (S - 1));
    InfiniSource source{};
    if (lanes > 0) source = {nullptr, ctx.memory_from, saved["carry"], forward};
    infini_begin(ctx.stream, p, ctx.cu_seqlens, ctx.place, source, saved["qkv"], saved["memory"], scratch);
    return p;
}

inline void infini_forward(const AttentionContext& ctx, const Tensors& parameters, const Tensors& saved, const floatX* x, const floatX* residual, floatX* out) {
    const AttentionConfig& a = *ctx.config;
    int64_t N = ctx.tokens(), C = a.channels;
    AttentionContext rest = ctx;
    floatX* A = rest.scratch.take<floatX>(N * C);
    linear_forward(ctx.stream, saved["qkv"], x, parameters["wqkv"], parameters["bqkv"], N, C, qkv_size(a));
    InfiniPass p = infini_pass(ctx, saved, true, rest.scratch);
    infini_core_forward(rest, p, parameters["beta"], saved["d"], saved["lse"], A);
    if (ctx.memory_to) infini_leave(ctx.stream, p, nullptr, ctx.memory_to);
    output_forward(rest, A, C, parameters["wo"], parameters["bo"], residual, out);
}

// Gradients stop at the border between two passes: the memory and the pending tokens that a sequence came with are constants.
inline void infini_backward(const AttentionContext& ctx, const Tensors& parameters, const Tensors& gradients, const Tensors& saved, const floatX* x,
                            const floatX* dout, floatX* dx) {
    const AttentionConfig& a = *ctx.config;
    int64_t N = ctx.tokens(), C = a.channels;
    AttentionContext rest = ctx;
    floatX *A = rest.scratch.take<floatX>(N * C), *dA = rest.scratch.take<floatX>(N * C);
    floatX* dqkv = rest.scratch.take<floatX>(N * qkv_size(a));
    InfiniPass p = infini_pass(ctx, saved, false, rest.scratch);
    infini_retrieve(ctx.stream, p, parameters["beta"], saved["d"], A);
    output_backward(rest, A, C, parameters["wo"], dout, dA, gradients["wo"], gradients["bo"]);
    infini_core_backward(rest, p, parameters["beta"], gradients["beta"], saved["d"], saved["lse"], dA, A, dqkv);
    linear_backward(ctx.stream, dx, false, gradients["wqkv"], gradients["bqkv"], dqkv, x, parameters["wqkv"], N, C, qkv_size(a));
}

inline void infini_extend(const AttentionContext& ctx, const Tensors& parameters, const floatX* x, const floatX* residual, floatX* out) {
    const AttentionConfig& a = *ctx.config;
    int64_t N = ctx.tokens(), C = a.channels;
    AttentionContext rest = ctx;
    InfiniPass p = infini_shape(a, N, ctx.num_seqs, ctx.max_len, ctx.num_seqs, ctx.kv_tokens);
    floatX *qkv = rest.scratch.take<floatX>(N * qkv_size(a)), *A = rest.scratch.take<floatX>(N * C);
    float* memories = rest.scratch.take<float>(p.max_memories * infini_memory_size(a));
    input_forward(ctx, qkv, x, parameters["wqkv"], parameters["bqkv"], qkv_size(a));
    if (infini_takes_step(p)) {
        bool overlap = ctx.norm.gain != nullptr;  // all launches before are kernels, and states and positions were there before the first
        infini_step(ctx.stream, p, ctx.cu_seqlens, ctx.position, ctx.states, qkv, parameters["beta"], A, a.positions == Positions::ROPE, overlap);
        output_forward(rest, A, C, parameters["wo"], parameters["bo"], residual, out);
        return;
    }
    InfiniSource source{};
    source.states = ctx.states;
    infini_begin(ctx.stream, p, ctx.cu_seqlens, ctx.place, source, qkv, memories, rest.scratch);
    infini_core_forward(rest, p, parameters["beta"], A, nullptr, A);
    infini_leave(ctx.stream, p, ctx.states, nullptr);
    output_forward(rest, A, C, parameters["wo"], parameters["bo"], residual, out);
}

inline Attention infini_attention() { return {"infini", infini_saved, infini_scratch, infini_forward, infini_backward, infini_extend}; }

}  // namespace gpu

// --------------------------------------------------------------------------------------------------------------------------------------------------
// 5. Lightning attention
//
// Saves u = x·Wqkvᵀ, x·Wgᵀ, o and 1/rms, N·(5C + 1) numbers, and S for each carried memory. The states before chunks, which the CPU saves, are saved where
// Hopper's kernels leave them (N/64·C·hs numbers more, lightning_hopper.cuh), and computed again by all others.

namespace gpu {

inline std::vector<TensorSpec> lightning_saved(const AttentionConfig& a, int64_t N, int lanes) {
    int64_t C = a.channels;
    return {buffer_spec("qkv", {N, 3 * C}),
            buffer_spec("o", {N, C}),
            buffer_spec("rstd", {N}, Storage::FLOAT32),
            buffer_spec("gate", {N, C}),
            buffer_spec("states", {lanes, C * a.head_size()}, Storage::FLOAT32),
            buffer_spec("chunks", {lightning_states(a, N)})};
}

inline int64_t lightning_scratch(const AttentionConfig& a, int64_t N, int64_t num_seqs, int, int64_t, bool training) {
    int64_t row = N * a.channels * sizeof(floatX), recurrence = lightning_recurrence_scratch(a, N, training),
            starts = scratch_bytes({num_seqs * (int64_t)sizeof(float*)});
    int64_t forward = scratch_bytes({row}) + std::max(scratch_bytes({row}), starts + recurrence);
    if (!training) return std::max(forward, scratch_bytes({3 * row, row, row}) + std::max(scratch_bytes({row}), recurrence));
    return std::max(forward, scratch_bytes({row, row}) + std::max(scratch_bytes({row}), scratch_bytes({3 * row}) + starts + recurrence));
}

// The recurrence's arguments. Where memories are carried, `starts` (num_seqs), taken from `scratch`, points at their copies in saved["states"], which
// forward makes (`copy`) and backward finds there.
inline Lightning lightning_pass(const AttentionContext& ctx, const Tensors& saved, bool copy, Scratch& scratch) {
    Lightning g = make_lightning(*ctx.config, ctx.num_seqs, ctx.tokens(), ctx.max_len, ctx.cu_seqlens);
    if (!ctx.memory_from) return g;
    const float** starts = scratch.take<const float*>(ctx.num_seqs);
    lightning_starts(ctx.stream, starts, saved["states"], ctx.memory_from, ctx.num_seqs, g.heads * g.head_state(), copy);
    g.memory_from = starts;
    return g;
}

inline LightningMethod lightning_method(const AttentionConfig& a) {
    LightningMethod method;
    method.scheme = (LightningScheme)a["scheme"];
    return method;
}

inline void lightning_forward(const AttentionContext& ctx, const Tensors& parameters, const Tensors& saved, const floatX* x, const floatX* residual,
                              floatX* out) {
    int64_t N = ctx.tokens(), C = ctx.config->channels;
    AttentionContext rest = ctx;
    floatX *u = saved["qkv"], *gate = saved["gate"], *o = saved["o"], *z = rest.scratch.take<floatX>(N * C);
    linear_forward(ctx.stream, u, x, parameters["wqkv"], nullptr, N, C, 3 * C);
    linear_forward(ctx.stream, gate, x, parameters["wg"], nullptr, N, C, C);
    Scratch scratch = rest.scratch;
    Lightning g = lightning_pass(ctx, saved, true, scratch);
    g.memory_to = ctx.memory_to;
    lightning_recurrence_forward(ctx.stream, g, u, o, scratch, lightning_method(*ctx.config), saved["chunks"]);
    lightning_gate_forward(ctx.stream, z, saved["rstd"], o, gate, parameters["gain"], N, C);
    output_forward(rest, z, C, parameters["wo"], nullptr, residual, out);
}

// Gradients stop at the border between two passes: the memory that a sequence came with is a constant.
inline void lightning_backward(const AttentionContext& ctx, const Tensors& parameters, const Tensors& gradients, const Tensors& saved, const floatX* x,
                               const floatX* dout, floatX* dx) {
    int64_t N = ctx.tokens(), C = ctx.config->channels;
    AttentionContext rest = ctx;
    const floatX *u = saved["qkv"], *gate = saved["gate"], *o = saved["o"], *gain = parameters["gain"];
    floatX *z = rest.scratch.take<floatX>(N * C), *d_o = rest.scratch.take<floatX>(N * C);
    lightning_gate_forward(ctx.stream, z, nullptr, o, gate, gain, N, C);
    output_backward(rest, z, C, parameters["wo"], dout, d_o, gradients["wo"], nullptr);
    floatX* dgate = z;  // which is needed no more
    lightning_gate_backward(ctx.stream, d_o, dgate, gradients["gain"], d_o, saved["rstd"], o, gate, gain, N, C);

    floatX* du = rest.scratch.take<floatX>(N * 3 * C);
    Lightning g = lightning_pass(ctx, saved, false, rest.scratch);
    lightning_recurrence_backward(ctx.stream, g, u, d_o, du, rest.scratch, lightning_method(*ctx.config), saved["chunks"]);
    linear_backward(ctx.stream, dx, false, gradients["wqkv"], nullptr, du, x, parameters["wqkv"], N, C, 3 * C);
    linear_backward(ctx.stream, dx, true, gradients["wg"], nullptr, dgate, x, parameters["wg"], N, C, C);
}

inline void lightning_extend(const AttentionContext& ctx, const Tensors& parameters, const floatX* x, const floatX* residual, floatX* out) {
    int64_t N = ctx.tokens(), C = ctx.config->channels;
    AttentionContext rest = ctx;
    floatX *u = rest.scratch.take<floatX>(N * 3 * C), *gate = rest.scratch.take<floatX>(N * C), *o = rest.scratch.take<floatX>(N * C);
    input_forward(ctx, u, x, parameters["wqkv"], nullptr, 3 * C);
    input_forward(ctx, gate, x, parameters["wg"], nullptr, C);
    Lightning g = make_lightning(*ctx.config, ctx.num_seqs, N, ctx.max_len, ctx.cu_seqlens);
    g.states = ctx.states;
    lightning_recurrence_extend(ctx.stream, g, u, o, rest.scratch, lightning_method(*ctx.config));
    lightning_gate_forward(ctx.stream, o, nullptr, o, gate, parameters["gain"], N, C);
    output_forward(rest, o, C, parameters["wo"], nullptr, residual, out);
}

inline Attention lightning_attention() { return {"lightning", lightning_saved, lightning_scratch, lightning_forward, lightning_backward, lightning_extend}; }

}  // namespace gpu

// --------------------------------------------------------------------------------------------------------------------------------------------------
// 6. Multi-head latent attention, MLA
//
// Saves what the CPU's saves, lse as (NH,N). What stands between the products is fused into three kernels (mla.cuh).

namespace gpu {

inline std::vector<TensorSpec> mla_saved(const AttentionConfig& a, int64_t N, int) {
    MlaShape d(a);
    std::vector<TensorSpec> list = {buffer_spec("u", {N, d.u}), buffer_spec("rstd", {N}, Storage::FLOAT32), buffer_spec("q", {N, d.q}),
                                    buffer_spec("o", {N, d.o}), buffer_spec("lse", {d.NH, N}, Storage::FLOAT32)};
    if (d.r_q) list.insert(list.end(), {buffer_spec("uq", {N, d.r_q}), buffer_spec("rstd_q", {N}, Storage::FLOAT32)});
    return list;
}

// Multiply-adds over NH: of an expanded token (its kn and v from c; to absorb a query takes as many), and of a pair of query and key in the two forms. Those in
// the latents are counted by the time that they take on an H100, beside the un-absorbed core's: as long on Hopper's kernel (decode_hopper.cuh: 400 to 540
// TFLOP/s for chunks of 64 to 512 tokens), three times as long on the portable one; in float32, without matrix units, both read more than they multiply.
struct MlaCosts {
    double expand, pair, latent_pair;
    explicit MlaCosts(const MlaShape& d) : expand((double)d.d_c * d.d_kv), pair(d.d_qk + d.d_v) {
        double slower = sizeof(floatX) == 4 ? 8 : 3;
#ifndef GPU_FLOAT32
        if (decode::hopper_decode_dims(1, (int)d.u, d.d_c)) slower = 1;
#endif
        latent_pair = slower * (2 * d.d_c + d.d_rope);
    }
};

// The most keys that extend expands for N new tokens, at most max_len a sequence, when kv_tokens are in the states: with X = expand/(latent_pair − pair),
// mla_form lets prefixes of P tokens in all be expanded only if P·X <= max_len·P + N·(max_len+1)/2.
inline int64_t mla_expanded_tokens(const MlaShape& d, int64_t N, int max_len, int64_t kv_tokens) {
    MlaCosts c(d);
    double X = c.latent_pair > c.pair ? c.expand / (c.latent_pair - c.pair) : INFINITY;
    return max_len < X ? (int64_t)std::min((double)kv_tokens, N + 0.5 * N * (max_len + 1) / (X - max_len) + 1) : kv_tokens;
}

inline int64_t mla_scratch(const AttentionConfig& a, int64_t N, int64_t num_seqs, int max_len, int64_t kv_tokens, bool training) {
    MlaShape d(a);
    auto numbers = [](std::initializer_list<int64_t> takes) {
        int64_t total = 0;
        for (int64_t n : takes) total += scratch_bytes({n * (int64_t)sizeof(floatX)});
        return total;
    };
    auto rotations = [&](int64_t positions) { return scratch_bytes({positions * d.d_rope * (int64_t)sizeof(float)}); };
    int64_t branch = numbers({N * d.C}), forward = std::max(branch, numbers({N * d.r_q, N * d.d_c, N * d.kv, N * d.q}) + rotations(max_len));
    if (training) {
        int64_t core = round_up(softmax_backward_scratch(d.NH, d.NH, d.d_qk, d.d_v, N, N), 256), query = numbers({N * d.r_q, N * d.r_q});
        int64_t attention = numbers({N * d.d_c, N * d.kv, N * d.q, N * d.q, N * d.q, N * d.kv, N * d.u}) + std::max(core, query);
        return std::max(forward, numbers({N * d.o}) + std::max(branch, attention));
    }
    // extend: q, u, o; then what each form takes
    int64_t K = mla_expanded_tokens(d, N, max_len, kv_tokens), query = numbers({N * d.r_q, N * d.r_q}) + rotations(max_len),
            fresh = numbers({N * d.kv, N * d.q});
    int64_t latent = numbers({N * d.NH * d.d_c}) + softmax_decode_scratch(d.NH, 1, (int)d.u, d.d_c, (int)num_seqs, max_len), lse = d.NH * N * 4;
    int64_t merged = numbers({N * d.NH * d.u, N * d.o}) + scratch_bytes({lse, lse, (num_seqs + 1) * 4, num_seqs * 4}) + std::max(fresh, latent);
    return std::max(forward, numbers({N * d.q, N * d.u, N * d.o}) + std::max({branch, query, numbers({K * d.u, K * d.kv, K * d.q}), merged}));
}

// The query latent: uq (N,r_q) before its norm, rstd_q (N) or null, cq (N,r_q).
inline void mla_query_latent(const AttentionContext& ctx, const MlaShape& d, const Tensors& parameters, const floatX* x, floatX* uq, float* rstd_q,
                             floatX* cq) {
    input_forward(ctx, uq, x, parameters["wdq"], nullptr, d.r_q);
    rmsnorm_forward(ctx.stream, cq, d.r_q, rstd_q, uq, d.r_q, parameters["gq"], ctx.tokens(), d.r_q);
}

// q (N,NH·d_qk), before its rotation. With a query latent that too.
inline void mla_query_forward(const AttentionContext& ctx, const MlaShape& d, const Tensors& parameters, const floatX* x, floatX* uq, float* rstd_q, floatX* cq,
                              floatX* q) {
    if (d.r_q == 0) {
        input_forward(ctx, q, x, parameters["wq"], nullptr, d.q);
        return;
    }
    mla_query_latent(ctx, d, parameters, x, uq, rstd_q, cq);
    linear_forward(ctx, q, cq, parameters["wuq"], nullptr, d.r_q, d.q);
}

// q rotated, and the latents. Where q's product can rotate on the way, it comes second, and the latents' kernel writes the rotations that it reads; else that
// kernel rotates q in place. `latents` says all but its queries; takes scratch for the rotations of `positions` positions.
inline void mla_rotated_query_forward(const AttentionContext& ctx, const MlaShape& d, const Tensors& parameters, const floatX* x, floatX* uq, float* rstd_q,
                                      floatX* cq, floatX* q, MlaLatents& latents, int positions, Scratch& scratch) {
    int64_t N = ctx.tokens(), IC = d.r_q ? d.r_q : d.C;
    const floatX *input = d.r_q ? cq : x, *w = parameters[d.r_q ? "wuq" : "wq"];
    RotatedColumns rotated = {nullptr, ctx.position, (int)d.q, d.d_qk, d.d_nope, d.d_rope};
    if (ctx.norm.gain || !linear_rotated_forward(ctx.stream, q, input, w, nullptr, N, IC, d.q, rotated, /*launch*/ false)) {
        latents.q = q;
        latents.q_to = q + d.d_nope;
        latents.q_stride = d.q;
        latents.q_head = d.d_qk;
        mla_query_forward(ctx, d, parameters, x, uq, rstd_q, cq, q);
        mla_latents(ctx.stream, d, latents, N);
        return;
    }
    latents.positions = positions;
    rotated.rotations = latents.rotations = scratch.take<float2>((int64_t)positions * d.d_rope / 2);
    mla_latents(ctx.stream, d, latents, N);
    if (d.r_q) mla_query_latent(ctx, d, parameters, x, uq, rstd_q, cq);
    linear_rotated_forward(ctx.stream, q, input, w, nullptr, N, IC, d.q, rotated);
}

// From dq, rotated back: dx (N,C), overwritten, and the gradients of the query's parameters.
inline void mla_query_backward(cudaStream_t stream, const MlaShape& d, const Tensors& parameters, const Tensors& gradients, const Tensors& saved,
                               const floatX* x, const floatX* dq, floatX* dx, int64_t N, Scratch scratch) {
    if (d.r_q == 0) {
        linear_backward(stream, dx, false, gradients["wq"], nullptr, dq, x, parameters["wq"], N, d.C, d.q);
        return;
    }
    const floatX *uq = saved["uq"], *gq = parameters["gq"];
    const float* rstd_q = saved["rstd_q"];
    floatX *cq = scratch.take<floatX>(N * d.r_q), *duq = scratch.take<floatX>(N * d.r_q);
    rmsnorm_forward(stream, cq, d.r_q, nullptr, uq, d.r_q, gq, N, d.r_q);
    linear_backward(stream, duq, false, gradients["wuq"], nullptr, dq, cq, parameters["wuq"], N, d.r_q, d.q);  // dcq
    rmsnorm_backward(stream, duq, d.r_q, gradients["gq"], duq, d.r_q, uq, d.r_q, rstd_q, gq, N, d.r_q);
    linear_backward(stream, dx, false, gradients["wdq"], nullptr, duq, x, parameters["wdq"], N, d.C, d.r_q);
}

// kv = c·Wukvᵀ (N,NH·(d_nope+d_v)), rows [kn | v], and keys (N,NH·d_qk), rows [kn | kr]. Rows of c are c_stride apart, those of kr d_c+d_rope.
inline void mla_keys_forward(cudaStream_t stream, const MlaShape& d, const floatX* wukv, const floatX* c, int64_t c_stride, const floatX* kr, floatX* kv,
                             floatX* keys, int64_t N) {
    matmul<floatX>(stream, NO, YES, N, d.kv, d.d_c, 1, c, c_stride, wukv, d.d_c, 0, kv, d.kv);
    mla_assemble(stream, d, keys, kv, kr, d.u, N);
}

// The softmax core's arguments in the un-absorbed form.
inline SoftmaxAttention mla_core(const AttentionContext& ctx, const MlaShape& d, const floatX* q, const floatX* keys, const floatX* kv) {
    SoftmaxAttention core{};
    core.heads = core.kv_heads = d.NH;
    core.d_qk = d.d_qk;
    core.d_v = d.d_v;
    core.window = ctx.window;
    core.scale = 1 / std::sqrt((float)d.d_qk);
    core.num_seqs = ctx.num_seqs;
    core.max_q = core.max_k = ctx.max_len;
    core.q_rows = ctx.tokens();
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

inline void mla_forward(const AttentionContext& ctx, const Tensors& parameters, const Tensors& saved, const floatX* x, const floatX* residual, floatX* out) {
    MlaShape d(*ctx.config);
    int64_t N = ctx.tokens();
    floatX *u = saved["u"], *q = saved["q"], *o = saved["o"], *uq = nullptr;
    float* rstd_q = nullptr;
    if (d.r_q) {
        uq = saved["uq"];
        rstd_q = saved["rstd_q"];
    }
    Scratch scratch = ctx.scratch;
    floatX *cq = scratch.take<floatX>(N * d.r_q), *c = scratch.take<floatX>(N * d.d_c), *kv = scratch.take<floatX>(N * d.kv),
           *keys = scratch.take<floatX>(N * d.q);
    input_forward(ctx, u, x, parameters["wdkv"], nullptr, d.u);
    MlaLatents latents{};
    latents.u = u;
    latents.gain = parameters["gkv"];
    latents.position = ctx.position;
    latents.c = c;
    latents.c_stride = d.d_c;
    latents.kr = u + d.d_c;
    latents.kr_stride = d.u;
    latents.rstd = saved["rstd"];
    mla_rotated_query_forward(ctx, d, parameters, x, uq, rstd_q, cq, q, latents, ctx.max_len, scratch);
    mla_keys_forward(ctx.stream, d, parameters["wukv"], c, d.d_c, u + d.d_c, kv, keys, N);
    softmax_forward(ctx.stream, mla_core(ctx, d, q, keys, kv), o, d.o, saved["lse"]);
    output_forward(ctx, o, d.o, parameters["wo"], nullptr, residual, out);
}

inline void mla_backward(const AttentionContext& ctx, const Tensors& parameters, const Tensors& gradients, const Tensors& saved, const floatX* x,
                         const floatX* dout, floatX* dx) {
    MlaShape d(*ctx.config);
    int64_t N = ctx.tokens();
    cudaStream_t stream = ctx.stream;
    const floatX *u = saved["u"], *q = saved["q"], *gkv = parameters["gkv"], *wukv = parameters["wukv"];
    float* dwukv = gradients["wukv"];
    AttentionContext rest = ctx;
    Scratch& scratch = rest.scratch;
    floatX* d_o = scratch.take<floatX>(N * d.o);
    output_backward(rest, saved["o"], d.o, parameters["wo"], dout, d_o, gradients["wo"], nullptr);

    floatX *c = scratch.take<floatX>(N * d.d_c), *kv = scratch.take<floatX>(N * d.kv), *keys = scratch.take<floatX>(N * d.q);
    floatX *dq = scratch.take<floatX>(N * d.q), *dkeys = scratch.take<floatX>(N * d.q), *dkv = scratch.take<floatX>(N * d.kv),
           *du = scratch.take<floatX>(N * d.u);
    rmsnorm_forward(stream, c, d.d_c, nullptr, u, d.u, gkv, N, d.d_c);
    mla_keys_forward(stream, d, wukv, c, d.d_c, u + d.d_c, kv, keys, N);
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
    softmax_backward(stream, mla_core(ctx, d, q, keys, kv), g, scratch);

    // dc = [dkn | dv]·Wukv      dWukv += [dkn | dv]ᵀ·c
    mla_split(stream, d, dkeys, dkv, du, dq, ctx.position, N);
    matmul<floatX>(stream, NO, NO, N, d.d_c, d.kv, 1, dkv, d.kv, wukv, d.d_c, 0, du, d.u);
    matmul<float>(stream, YES, NO, d.kv, d.d_c, N, 1, dkv, d.kv, c, d.d_c, 1, dwukv, d.d_c);
    rmsnorm_backward(stream, du, d.u, gradients["gkv"], du, d.u, u, d.u, saved["rstd"], gkv, N, d.d_c);
    mla_query_backward(stream, d, parameters, gradients, saved, x, dq, dx, N, scratch);
    linear_backward(stream, dx, true, gradients["wdkv"], nullptr, du, x, parameters["wdkv"], N, d.C, d.u);
}

// ---- extend -------------------------------------------------------------------------------------------------------------------------------------------

// All sequences of a call go one way, the one that takes least time in all. With n new tokens on a prefix of P in each sequence, in the units of MlaCosts:
//
//     UNABSORBED   Σ (P+n)·expand + core(n·P + n·(n+1)/2)
//     MERGED       Σ   2n ·expand + Σ n·P·latent_pair + core(n·(n+1)/2)
//     ABSORBED     Σ    n ·expand + Σ (n·P + n·(n+1)/2)·latent_pair
//
// where core(pairs) is Σ pairs·pair for many queries. But the un-absorbed core gives a multiprocessor 128 queries of a head or more, and one that has fewer is
// busy as long; if there are not enough for all multiprocessors, the others wait. So n counts as a multiple of 128, times multiprocessors/(NH·Σ ⌈n/128⌉) if
// that is above 1. (The absorbed one cuts the keys, too.)
//
// Without that, and a latent_pair of 2·d_c+d_rope, a single sequence goes as mla_form(a, n, P) of attention.h says, and MERGED is never the cheapest. In a
// batch it can be: where some sequences have few tokens on long prefixes, others many on none.
//
// On an H100, 8192 tokens behind, µs for n = 64, 128, 256, 512, 2048 new ones:
//     12 heads, d 64+32/64, d_c 256      UNABSORBED 149 162 182 195  218      MERGED 125 155 206 273      ABSORBED  88 116 158 237
//     16 heads, d 128+64/128, d_c 512    UNABSORBED 236 254 256 269  506      MERGED 163 205 289 447      ABSORBED 135 177 258 417
inline MlaForm mla_form(const AttentionContext& ctx) {
    if (ctx.max_len <= 1) return MlaForm::ABSORBED;  // whatever the lengths, so that a decode step can be replayed as a graph
    MlaShape d(*ctx.config);
    MlaCosts c(d);
    double prefix = 0, tokens = 0, old_pairs = 0, new_pairs = 0, tiles = 0, old_tiled = 0, new_tiled = 0;
    for (int s = 0; s < ctx.num_seqs; s++) {
        double n = ctx.cu_seqlens_host[s + 1] - ctx.cu_seqlens_host[s], P = (double)ctx.lengths_host[s], tiled = std::ceil(n / 128);
        prefix += P;  // n = 0: the un-absorbed form expands P still
        tokens += n;
        old_pairs += n * P;
        new_pairs += n * (n + 1) / 2;
        tiles += tiled;
        old_tiled += 128 * tiled * P;
        new_tiled += 128 * tiled * (n + 1) / 2;
    }
    if (old_pairs == 0) return MlaForm::UNABSORBED;
    double core_pair = c.pair * std::max(1.0, device_properties().multiProcessorCount / (d.NH * tiles));
    double unabsorbed = (prefix + tokens) * c.expand + (old_tiled + new_tiled) * core_pair;
    double merged = 2 * tokens * c.expand + old_pairs * c.latent_pair + new_tiled * core_pair;
    double absorbed = tokens * c.expand + (old_pairs + new_pairs) * c.latent_pair;
    if (unabsorbed < std::min(merged, absorbed)) return MlaForm::UNABSORBED;
    return merged < absorbed ? MlaForm::MERGED : MlaForm::ABSORBED;
}

// o (N,NH·d_v), lse (NH,N) or null: keys and values are expanded from the rows [c | kr] of K tokens, cu_k[s+1]−cu_k[s] of sequence s, at most max_k.
inline void mla_unabsorbed(const AttentionContext& ctx, const MlaShape& d, const floatX* wukv, const floatX* q, const floatX* rows, int64_t K, const int* cu_k,
                           int max_k, floatX* o, float* lse, Scratch scratch) {
    floatX *kv = scratch.take<floatX>(K * d.kv), *keys = scratch.take<floatX>(K * d.q);
    mla_keys_forward(ctx.stream, d, wukv, rows, d.u, rows + d.d_c, kv, keys, K);
    SoftmaxAttention core = mla_core(ctx, d, q, keys, kv);
    core.cu_k = cu_k;
    core.max_k = max_k;
    softmax_forward(ctx.stream, core, o, d.o, lse);
}

// The same with the rows themselves, in the pages, as keys and c as values of all heads, for the first cu_k[s+1]−cu_k[s] tokens of each sequence.
// q_absorbed (N,NH,d_c+d_rope): per head [q̃ | qr], of which qr is there. Wuk and Wuv are read where they stand in wukv: there is no copy that a change of the
// weights could leave behind.
inline void mla_absorbed(const AttentionContext& ctx, const MlaShape& d, const floatX* wukv, const floatX* q, floatX* q_absorbed, const int* cu_k, int max_k,
                         const int* q_at, floatX* o, float* lse, Scratch scratch) {
    int64_t N = ctx.tokens(), q_stride = d.NH * d.u, o_stride = (int64_t)d.NH * d.d_c, per_head = (int64_t)d.d_kv * d.d_c;
    floatX* o_absorbed = scratch.take<floatX>(N * o_stride);
    // q̃_h = qn_h·Wuk_h; without qn it is zeros, as a product over nothing
    matmul<floatX>(ctx.stream, NO, NO, N, d.d_c, d.d_nope, 1, q, d.q, wukv, d.d_c, 0, q_absorbed, q_stride, {}, {d.NH, d.d_qk, per_head, d.u});

    SoftmaxAttention core = mla_core(ctx, d, q_absorbed, nullptr, nullptr);
    core.kv_heads = 1;
    core.d_qk = (int)d.u;  // the scale stays 1/√(d_nope+d_rope)
    core.d_v = d.d_c;
    core.q_stride = q_stride;
    core.k_head = core.v_head = 0;
    core.cu_k = cu_k;
    core.max_k = max_k;
    core.q_at = q_at;
    core.pages = ctx.pages;
    core.states = ctx.states;
    softmax_decode(ctx.stream, core, o_absorbed, o_stride, lse, scratch);

    // o_h = õ_h·Wuv_hᵀ
    matmul<floatX>(ctx.stream, NO, YES, N, d.d_v, d.d_c, 1, o_absorbed, o_stride, wukv + (int64_t)d.d_nope * d.d_c, d.d_c, 0, o, d.o, {},
                   {d.NH, d.d_c, per_head, d.d_v});
}

// o (N,NH·d_v): absorbed on what the sequences held before, un-absorbed on the new tokens, whose rows are u (N,d_c+d_rope).
inline void mla_merged(const AttentionContext& ctx, const MlaShape& d, const floatX* wukv, const floatX* q, const floatX* u, floatX* q_absorbed, floatX* o,
                       Scratch scratch) {
    int64_t N = ctx.tokens(), longest = *std::max_element(ctx.lengths_host, ctx.lengths_host + ctx.num_seqs), size = sizeof(floatX);
    floatX* o_past = scratch.take<floatX>(N * d.o);
    float *lse = scratch.take<float>(d.NH * N), *lse_past = scratch.take<float>(d.NH * N);
    int *cu_past = scratch.take<int>(ctx.num_seqs + 1), *past = scratch.take<int>(ctx.num_seqs);
    past_tokens(ctx.stream, cu_past, past, ctx.cu_kv, ctx.cu_seqlens, ctx.num_seqs);
    if (d.d_rope > 0)
        CUDA_CHECK(
            cudaMemcpy2DAsync(q_absorbed + d.d_c, d.u * size, q + d.d_nope, d.d_qk * size, d.d_rope * size, N * d.NH, cudaMemcpyDeviceToDevice, ctx.stream));
    mla_unabsorbed(ctx, d, wukv, q, u, N, ctx.cu_seqlens, ctx.max_len, o, lse, scratch);
    mla_absorbed(ctx, d, wukv, q, q_absorbed, cu_past, (int)longest, past, o_past, lse_past, scratch);
    softmax_merge(ctx.stream, o, nullptr, o, lse, o_past, lse_past, N, d.NH, d.d_v);
}

// extend in the form asked for. Scratch: mla_scratch() knows of mla_form's choice only.
inline void mla_extend_as(const AttentionContext& ctx, const Tensors& parameters, const floatX* x, const floatX* residual, floatX* out, MlaForm form) {
    MlaShape d(*ctx.config);
    int64_t N = ctx.tokens();
    const floatX* wukv = parameters["wukv"];
    AttentionContext rest = ctx;
    floatX *q = rest.scratch.take<floatX>(N * d.q), *u = rest.scratch.take<floatX>(N * d.u), *o = rest.scratch.take<floatX>(N * d.o);
    Scratch scratch = rest.scratch, latent = scratch;
    floatX *uq = latent.take<floatX>(N * d.r_q), *cq = latent.take<floatX>(N * d.r_q);
    // Where the new tokens are expanded by themselves, their rows [c | kr] are wanted here, in the place of u, before they go to the pages.
    bool absorbed = form == MlaForm::ABSORBED, fresh = form == MlaForm::UNABSORBED && without_past(ctx), apart = form == MlaForm::MERGED || fresh;
    if (!fresh) mla_query_forward(ctx, d, parameters, x, uq, nullptr, cq, q);
    input_forward(ctx, u, x, parameters["wdkv"], nullptr, d.u);
    floatX* q_absorbed = form == MlaForm::UNABSORBED ? nullptr : scratch.take<floatX>(N * d.NH * d.u);
    MlaLatents latents{};
    latents.u = u;
    latents.gain = parameters["gkv"];
    latents.position = ctx.position;
    if (apart) {
        latents.c = u;
        latents.kr = u + d.d_c;
        latents.c_stride = latents.kr_stride = d.u;
    } else {
        latents.states = ctx.states;
        latents.place = ctx.place;
    }
    if (fresh) {
        mla_rotated_query_forward(ctx, d, parameters, x, uq, nullptr, cq, q, latents, ctx.max_len, latent);
    } else {
        latents.q = q;
        latents.q_to = absorbed ? q_absorbed + d.d_c : q + d.d_nope;
        latents.q_stride = absorbed ? d.NH * d.u : d.q;
        latents.q_head = absorbed ? d.u : d.d_qk;
        mla_latents(ctx.stream, d, latents, N);
    }
    if (apart) append_rows(ctx.stream, ctx.states, ctx.place, u, d.u, (int)d.u, N);

    if (form == MlaForm::MERGED) {
        mla_merged(ctx, d, wukv, q, u, q_absorbed, o, scratch);
    } else if (absorbed) {
        mla_absorbed(ctx, d, wukv, q, q_absorbed, ctx.cu_kv, ctx.max_kv, nullptr, o, nullptr, scratch);
    } else if (fresh) {
        mla_unabsorbed(ctx, d, wukv, q, u, N, ctx.cu_seqlens, ctx.max_len, o, nullptr, scratch);
    } else {
        floatX* rows = scratch.take<floatX>(ctx.kv_tokens * d.u);
        gather_rows(ctx.stream, rows, ctx.states, ctx.cu_kv, ctx.num_seqs, ctx.max_kv, (int)d.u);
        mla_unabsorbed(ctx, d, wukv, q, rows, ctx.kv_tokens, ctx.cu_kv, ctx.max_kv, o, nullptr, scratch);
    }
    output_forward(rest, o, d.o, parameters["wo"], nullptr, residual, out);
}

inline void mla_extend(const AttentionContext& ctx, const Tensors& parameters, const floatX* x, const floatX* residual, floatX* out) {
    mla_extend_as(ctx, parameters, x, residual, out, mla_form(ctx));
}

inline Attention mla_attention() { return {"mla", mla_saved, mla_scratch, mla_forward, mla_backward, mla_extend}; }

}  // namespace gpu

// --------------------------------------------------------------------------------------------------------------------------------------------------
// 7. The registry

namespace gpu {
inline const Attention& attention(const std::string& name) {
    static const std::vector<Attention> list = {causal_attention(), infini_attention(), lightning_attention(), mla_attention()};
    for (const Attention& a : list)
        if (name == a.name) return a;
    usage_error("attention '%s' has no GPU implementation: take ./train_gpt2", name.c_str());  // unreachable while the two lists agree
}
}  // namespace gpu
