// The softmax core's arguments; its forward pass stands in softmax_forward.cuh, its backward pass in softmax_backward.cuh, decoding from pages in decode.cuh.
//
//     s_ij = scale·q_i·k_j   for the keys j that query i sees      p_ij = exp(s_ij − lse_i),  lse_i = ln Σ_j exp(s_ij)      o_i = Σ_j p_ij·v_j
//
// Queries stand at the end of the keys: query i of n_q is at position i + n_k − n_q and sees the keys j with position − window < j <= position.
// Grouped queries: query head h uses the kv head ⌊h·KV/NH⌋. A row that sees no key gets o = 0, lse = −inf. The same struct as cpu::SoftmaxAttention.
#pragma once

#include "common.cuh"

namespace gpu {

struct SoftmaxAttention {
    int heads, kv_heads, d_qk, d_v;
    float scale;
    int window = 0;  // 0: none
    int num_seqs;
    int max_q, max_k;        // no sequence has more queries, or keys (host bounds for the grid; the lengths themselves stand in cu_q, cu_k)
    int64_t q_rows;          // rows of q in all: cu_q[num_seqs], or more
    const int *cu_q, *cu_k;  // device: offsets of the sequences among the rows of q and of k, v; lengths of 0 are legal
    // Row n, head h: q[n·q_stride + h·d_qk], k[n·k_stride + g·k_head], v[n·v_stride + g·v_head]; g is the kv head.
    const floatX* q;
    int64_t q_stride;
    const floatX* k;
    int64_t k_stride, k_head;
    const floatX* v;
    int64_t v_stride, v_head;
    // decode.cuh only: keys and values in pages, key j of sequence s at states[s].row(j) + k_offset + g·k_head, its value at ... + v_offset + g·v_head.
    const AttentionState* states = nullptr;  // device
    int64_t k_offset = 0, v_offset = 0;
    StatePages pages;  // what all these states share, as the host knows it
    // Where each sequence's first query stands among the keys (device); null: the queries are the last. Forward and decode only.
    const int* q_at = nullptr;
    // Attention dropout: Philox counter (j>>2, i, b·NH+h, step·L+l), word j&3. By default b is the sequence, i and j are positions in it; a core sequence
    // that is a piece of a longer one (a segment) says of which (drop_seq) and where it starts (drop_pos). Device arrays.
    DropoutKey dropout;
    const int *drop_seq = nullptr, *drop_pos = nullptr;

    __device__ int q_len(int s) const { return cu_q[s + 1] - cu_q[s]; }
    __device__ int k_len(int s) const { return cu_k[s + 1] - cu_k[s]; }
    __device__ int position(int s, int i) const { return i + (q_at ? q_at[s] : k_len(s) - q_len(s)); }
    HOST_DEVICE int kv_head(int h) const { return (int)((int64_t)h * kv_heads / heads); }
};

// Gradients: dq, dk, dv have the layouts of q, k, v with strides of their own, and are overwritten; the heads of a group are summed into dk, dv.
struct SoftmaxGradients {
    const floatX *o, *d_o;  // of the forward pass; gradient of o. Row n, head h: o[n·o_stride + h·d_v]
    const float* lse;       // (NH, q_rows): lse[h·q_rows + n]
    int64_t o_stride, do_stride;
    floatX *dq, *dk, *dv;
    int64_t dq_stride, dk_stride, dk_head, dv_stride, dv_head;
    // += the sums over the rows of [dq | dk | dv], the gradient of a bias that was added to [q | k | v]; null: not asked for. If it is, these stand side by
    // side in rows, and cu_q[num_seqs] = q_rows.
    float* dbias = nullptr;
};

constexpr float LOG2E = 1.44269504f;  // exponentials are powers of 2, log₂e being part of the scale

// Dropout of one sequence and head, cpu::dropout_row: key j for the query at `position` has word (start+j) % 4 of the call with counter (start+j)/4.
struct Dropout {
    uint32_t who, counter, start;
    __device__ Dropout(const SoftmaxAttention& a, int s, int h) {
        who = (uint32_t)((a.dropout.pass->first_row + (a.drop_seq ? a.drop_seq[s] : s)) * a.heads + h);
        counter = a.dropout.counter();
        start = a.drop_pos ? a.drop_pos[s] : 0;
    }
    __device__ Philox words(const SoftmaxAttention& a, int position, int j) const {
        return philox(a.dropout.seed, (start + j) >> 2, start + position, who, counter);
    }
    __device__ bool keeps(const SoftmaxAttention& a, int position, int j) const {
        Philox random = words(a, position, j);
        uint32_t n = (start + j) % 4, word = n < 2 ? (n == 0 ? random.word[0] : random.word[1]) : (n == 2 ? random.word[2] : random.word[3]);
        return word >= a.dropout.threshold;
    }
};

}  // namespace gpu
