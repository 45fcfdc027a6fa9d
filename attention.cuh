// The attention seam and the four attention layers on the GPU: the twins of attention.h, function for function. What is launched here stands in gpt2/cuda;
// equations, shapes, what is saved and why stand in attention.h and are not repeated.
//
// N tokens stand packed, one sequence behind another. Storage is floatX, memories and statistics float32 (gpt2/cuda/common.cuh).
#pragma once

#include "attention.h"
#include "gpt2/cuda/common.cuh"
#include "gpt2/cuda/matmul.cuh"
#include "gpt2/cuda/residual.cuh"
#include "gpt2/cuda/softmax.cuh"

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

    // extend: the state of each sequence, and the keys in it once the new tokens are there.
    const AttentionState* states = nullptr;  // (num_seqs)
    const int64_t* lengths_host = nullptr;   // (num_seqs) tokens in each state, before the new ones
    const int* cu_kv = nullptr;              // (num_seqs+1) offsets of old and new tokens together
    int64_t kv_tokens = 0;                   // cu_kv[num_seqs]
    int max_kv = 0;                          // the longest

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
    // Bytes of scratch memory that forward and backward (training), or forward and extend (otherwise) take.
    int64_t (*scratch)(const AttentionConfig&, int64_t N, int64_t num_seqs, int64_t kv_tokens, bool training);
    void (*forward)(const AttentionContext&, const Tensors& parameters, const Tensors& saved, const floatX* x, const floatX* residual, floatX* out);
    void (*backward)(const AttentionContext&, const Tensors& parameters, const Tensors& gradients, const Tensors& saved, const floatX* x, const floatX* dout,
                     floatX* dx);
    void (*extend)(const AttentionContext&, const Tensors& parameters, const floatX* x, const floatX* residual, floatX* out);
};

inline const Attention& attention(const std::string& name);

// The end of every layer: out = residual + Z⊙(o·Woᵀ + bo), o (N,D), Wo (C,D), bo (C) or null; Z is the residual branch's dropout.
// Takes scratch for (N,C) floatX if there is dropout.
inline void output_forward(const AttentionContext& ctx, const floatX* o, int64_t D, const floatX* wo, const floatX* bo, const floatX* residual, floatX* out) {
    int64_t N = ctx.tokens(), C = ctx.config->channels;
    if (ctx.dropout.p == 0) {
        linear_forward(ctx.stream, out, o, wo, bo, N, D, C, residual);
        return;
    }
    Scratch scratch = ctx.scratch;
    floatX* branch = scratch.take<floatX>(N * C);
    linear_forward(ctx.stream, branch, o, wo, bo, N, D, C);
    dropout_add(ctx.stream, out, residual, branch, ctx.dropout, DROP_ATTENTION, ctx.place, N, C);
}

// do (N,D) = (Z⊙dout)·Wo;  dWo += (Z⊙dout)ᵀ·o;  dbo += Σ_n Z⊙dout.
inline void output_backward(const AttentionContext& ctx, const floatX* o, int64_t D, const floatX* wo, const floatX* dout, floatX* d_o, float* dwo,
                            float* dbo) {
    int64_t N = ctx.tokens(), C = ctx.config->channels;
    Scratch scratch = ctx.scratch;
    if (ctx.dropout.p > 0) {
        floatX* dbranch = scratch.take<floatX>(N * C);
        dropout_add(ctx.stream, dbranch, nullptr, dout, ctx.dropout, DROP_ATTENTION, ctx.place, N, C);
        dout = dbranch;
    }
    linear_backward(ctx.stream, d_o, false, dwo, dbo, dout, o, wo, N, D, C);
}

}  // namespace gpu
