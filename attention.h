// The attention seam and the four attention layers on the CPU: the reference for everything else in this repository.
//
//   1. the seam       what a layer is given (AttentionContext, AttentionState) and the table of functions it provides (cpu::Attention)
//   2. softmax core   blocked softmax attention, forward and backward: causal, the local part of Infini, and MLA are all this function
//   3. causal         GPT-2's attention, grouped queries, sliding window, rotary positions
//   4. infini         Infini-attention: local attention in segments and a compressive memory
//   5. lightning      linear attention with decay
//   6. mla            multi-head latent attention
//   7. the registry   the list that `--attention` chooses from
//
// A layer is everything between the first LayerNorm's output x (N,C) and the residual stream: out = residual + attention(x). N tokens stand packed, one
// sequence behind another (cu_seqlens); a dense batch of B rows is the case of B equal sequences.
// Symbols: N tokens, C channels, NH query heads, KV key/value heads, hs = C/NH head size, L layers. `d` before a name is the loss's gradient.
//
// To add a fifth attention: a section of its own below, with a line in the registry; its twin in attention.cuh; its reference in dev/reference.
#pragma once

#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#include "gpt2/config.h"
#include "gpt2/cpu/layers.h"
#include "gpt2/cpu/matmul.h"

// --------------------------------------------------------------------------------------------------------------------------------------------------
// 1. The seam

namespace cpu {

// One sequence's decode state in one network layer: a block of constant size (`fixed`, all zeros for an empty sequence), and one row a token in pages.
struct AttentionState {
    int64_t length = 0;            // tokens in it, before those that extend() appends now; their rows have been allocated
    real* fixed = nullptr;         // AttentionStateSize::per_sequence numbers
    real* const* pages = nullptr;  // page p holds the rows of tokens p·page_size ...
    int page_size = 1;
    int64_t offset = 0;            // of this network layer within a page
    int64_t per_token = 0;         // AttentionStateSize::per_token: the length of a row
    real* row(int64_t j) const { return pages[j / page_size] + offset + j % page_size * per_token; }
};

// Scratch memory is taken from the front of one block. A copy of the struct gives back at the end of its scope what was taken from the copy.
struct Scratch {
    real* memory = nullptr;
    int64_t size = 0;
    real* take(int64_t n) {
        n = (n + 15) / 16 * 16;
        assert(n <= size);
        real* p = memory;
        memory += n;
        size -= n;
        return p;
    }
};
inline int64_t scratch_size(std::initializer_list<int64_t> takes) {  // what Scratch needs for these
    int64_t total = 0;
    for (int64_t n : takes) total += (n + 15) / 16 * 16;
    return total;
}

// What goes with every call.
struct AttentionContext {
    const AttentionConfig* config;
    int num_seqs;
    const int* cu_seqlens;    // (num_seqs+1) offsets of the sequences; lengths of 0 are legal
    const TokenPlace* place;  // (N) sequence and position of each token; positions count from 0 in each sequence (in extend: of the new tokens)
    DropoutKey dropout;       // p = 0 in evaluation
    Scratch scratch;

    // extend: the state of each sequence.
    const AttentionState* states = nullptr;
    // forward, recurrent layers: the memory (AttentionState::fixed) each sequence starts from and where it leaves its own. Null array or entry: empty, nowhere.
    const real* const* memory_from = nullptr;
    real* const* memory_to = nullptr;
    // backward, recurrent layers: the loss's gradient of what forward left in memory_to, and where to write that of memory_from. Null in training:
    // gradients stop at the border between two passes.
    const real* const* dmemory_to = nullptr;
    real* const* dmemory_from = nullptr;

    int64_t tokens() const { return cu_seqlens[num_seqs]; }
};

// The table of functions each attention layer provides. `parameters`, `gradients` and `saved` hold the layer's own tensors by their names.
struct Attention {
    const char* name;
    // What forward keeps for backward, for up to N tokens and `lanes` sequences that start from a carried memory.
    std::vector<TensorSpec> (*saved)(const AttentionConfig&, int64_t N, int lanes);
    // Numbers of scratch memory that forward and backward (training), or forward and extend (otherwise) take.
    int64_t (*scratch)(const AttentionConfig&, int64_t N, int64_t num_seqs, int64_t kv_tokens, bool training);
    // out = residual + attention(x), all (N,C); fills `saved`. `residual` may be `out`.
    void (*forward)(const AttentionContext&, const Tensors& parameters, const Tensors& saved, const real* x, const real* residual, real* out);
    // From dout (N,C), the gradient of out: dx (N,C), overwritten, through attention alone (the residual path is the identity); gradients += .
    void (*backward)(const AttentionContext&, const Tensors& parameters, const Tensors& gradients, const Tensors& saved, const real* x, const real* dout, real* dx);
    // out = residual + attention(x) for the q_len >= 0 new tokens of each sequence, whose past is in its state; the states are brought up to date.
    void (*extend)(const AttentionContext&, const Tensors& parameters, const real* x, const real* residual, real* out);
};

inline const Attention& attention(const std::string& name);

// The end of every layer: out = residual + Z⊙(o·Woᵀ + bo), o (N,D), Wo (C,D), bo (C) or null; Z is the residual branch's dropout.
inline void output_forward(const AttentionContext& ctx, const real* o, int64_t D, const real* wo, const real* bo, const real* residual, real* out) {
    int64_t N = ctx.tokens(), C = ctx.config->channels;
    if (ctx.dropout.p > 0) {
        Scratch scratch = ctx.scratch;
        real* branch = scratch.take(N * C);
        linear_forward(branch, o, wo, bo, N, D, C);
        dropout_add(out, residual, branch, ctx.dropout, DROP_ATTENTION, ctx.place, N, C);
        return;
    }
#pragma omp parallel for
    for (int64_t n = 0; n < N; n++)
        for (int64_t c = 0; c < C; c++) out[n * C + c] = residual[n * C + c] + (bo ? bo[c] : 0);
    matmul(NO, YES, N, C, D, 1, o, D, wo, D, 1, out, C);
}

// do (N,D) = (Z⊙dout)·Wo;  dWo += (Z⊙dout)ᵀ·o;  dbo += Σ_n Z⊙dout.
inline void output_backward(const AttentionContext& ctx, const real* o, int64_t D, const real* wo, const real* dout, real* d_o, real* dwo, real* dbo) {
    int64_t N = ctx.tokens(), C = ctx.config->channels;
    Scratch scratch = ctx.scratch;
    if (ctx.dropout.p > 0) {
        real* dbranch = scratch.take(N * C);
        dropout_add(dbranch, nullptr, dout, ctx.dropout, DROP_ATTENTION, ctx.place, N, C);
        dout = dbranch;
    }
    linear_backward(d_o, false, dwo, dbo, dout, o, wo, N, D, C);
}

// --------------------------------------------------------------------------------------------------------------------------------------------------
// 2. The softmax core
//
//     s_ij = scale·q_i·k_j   for the keys j that query i sees      p_ij = exp(s_ij − lse_i),  lse_i = ln Σ_j exp(s_ij)      o_i = Σ_j p_ij·v_j
//
// in tiles of QT queries by KT keys, so that nothing of size T² is ever stored (Dao, FlashAttention-2, arXiv 2307.08691). Forward keeps a running maximum m
// and sum l for each row and rescales what it has when the maximum grows; backward recomputes p from the saved lse.
// Queries stand at the end of the keys: query i of n_q is at position i + n_k − n_q and sees the keys j with position − window < j <= position.
// Grouped queries: query head h uses the kv head ⌊h·KV/NH⌋. A row that sees no key gets o = 0, lse = −inf.
// FLOPs: forward 2·(d_qk+d_v) for each pair (i,j) and head, backward 2·(3·d_qk+2·d_v). Memory: O(N).

constexpr int QT = 64, KT = 64;  // a 64x64 tile of float32 is 16 KB: scores, their gradient and the operands stay in the second-level cache
constexpr real MINUS_INFINITY = -std::numeric_limits<real>::infinity();

struct SoftmaxAttention {
    int heads, kv_heads, d_qk, d_v;
    real scale;
    int window = 0;  // 0: none
    int num_seqs;
    const int *cu_q, *cu_k;  // offsets of the sequences among the rows of q and of k, v
    // Row n, head h: q[n·q_stride + h·d_qk], k[n·k_stride + g·k_head], v[n·v_stride + g·v_head]; g is the kv head.
    const real* q;
    int64_t q_stride;
    const real* k;
    int64_t k_stride, k_head;
    const real* v;
    int64_t v_stride, v_head;
    // Or, if not null, keys and values in pages: key j of sequence s is states[s].row(j) + k_offset. Forward only.
    const AttentionState* states = nullptr;
    int64_t k_offset = 0, v_offset = 0;
    // Where each sequence's first query stands among the keys; null: the queries are the last. MLA's new tokens stand behind all keys of the prefix.
    const int* q_at = nullptr;  // forward only
    // Attention dropout: Philox counter (j>>2, i, b·NH+h, step·L+l). By default b is the sequence, i and j are positions in it; a core sequence that is
    // a piece of a longer one (a segment) says of which (drop_seq) and where it starts (drop_pos).
    DropoutKey dropout;
    const int *drop_seq = nullptr, *drop_pos = nullptr;

    int q_len(int s) const { return cu_q[s + 1] - cu_q[s]; }
    int k_len(int s) const { return cu_k[s + 1] - cu_k[s]; }
    int position(int s, int i) const { return i + (q_at ? q_at[s] : k_len(s) - q_len(s)); }
    int kv_head(int h) const { return (int)((int64_t)h * kv_heads / heads); }
    const real* key(int s, int64_t j, int g) const { return (states ? states[s].row(j) + k_offset : k + (cu_k[s] + j) * k_stride) + g * k_head; }
    const real* value(int s, int64_t j, int g) const { return (states ? states[s].row(j) + v_offset : v + (cu_k[s] + j) * v_stride) + g * v_head; }
};

struct Tile {
    int seq, start;
};

inline std::vector<Tile> make_tiles(int num_seqs, const int* cu, int size) {
    std::vector<Tile> tiles;
    for (int s = 0; s < num_seqs; s++)
        for (int t = 0; t < cu[s + 1] - cu[s]; t += size) tiles.push_back({s, t});
    return tiles;
}

// The keys [*lo, *hi) of a tile that starts at key j0 and has n of them, which the query at `position` sees; counted from j0.
inline void visible_keys(int position, int window, int j0, int n, int* lo, int* hi) {
    *hi = std::min(n, position + 1 - j0);
    *lo = window > 0 ? std::max(0, position - window + 1 - j0) : 0;
}

// z (n) = 0 for a dropped weight, 1/(1−p) for a kept one: query i, keys j0... of core sequence s, head h.
inline void dropout_row(const SoftmaxAttention& a, int s, int h, int i, int j0, int n, real* z) {
    uint32_t threshold = dropout_threshold(a.dropout.p);
    real scale = (real)(1 / (1 - a.dropout.p));
    int start = a.drop_pos ? a.drop_pos[s] : 0, position = start + a.position(s, i);
    uint32_t who = (uint32_t)((a.dropout.first_row + (a.drop_seq ? a.drop_seq[s] : s)) * a.heads + h);
    Philox r{};
    for (int j = 0; j < n; j++) {
        int at = start + j0 + j;
        if (j == 0 || at % 4 == 0) r = philox(a.dropout.seed, (uint32_t)at >> 2, position, who, a.dropout.counter);
        z[j] = r.word[at & 3] >= threshold ? scale : 0;
    }
}

// Few queries (decode): transposing a tile of keys costs more than the dot products with their rows.
inline bool few_queries(int q_len) { return q_len < 4; }

// One row of the running softmax over the scores s[lo..hi) of this tile: turns them into exp(s·scale − m), the others into 0. Returns the factor by which
// what was accumulated so far has to be multiplied. The exponent is never taken of a masked score, which may be anything.
inline real softmax_row(real* s, int n, int lo, int hi, real scale, real* m, real* l) {
    lo = std::min(std::max(lo, 0), n);
    hi = std::max(hi, lo);
    real highest = MINUS_INFINITY;
    for (int j = lo; j < hi; j++) highest = std::max(highest, s[j]);
    real before = *m, now = std::max(before, highest * scale), sum = 0;
    if (lo == hi || now == MINUS_INFINITY) {
        for (int j = 0; j < n; j++) s[j] = 0;
        return 1;
    }
    for (int j = 0; j < lo; j++) s[j] = 0;
#pragma omp simd reduction(+ : sum)
    for (int j = lo; j < hi; j++) {
        s[j] = vexp(s[j] * scale - now);
        sum += s[j];
    }
    for (int j = hi; j < n; j++) s[j] = 0;
    real rescale = before == MINUS_INFINITY ? 0 : vexp(before - now);
    *l = *l * rescale + sum;
    *m = now;
    return rescale;
}

inline int64_t softmax_forward_scratch(int64_t kv_tokens, int kv_heads, int d_qk) { return scratch_size({kv_tokens * kv_heads * d_qk}); }

// o (rows of q, NH·d_v, o_stride apart), lse (rows of q, NH) or null.
inline void softmax_forward(const SoftmaxAttention& a, real* o, int64_t o_stride, real* lse, Scratch scratch) {
    // Keys transposed, once for all query tiles: for each tile of n keys and each kv head a block (d_qk, n).
    real* kt = scratch.take((int64_t)a.cu_k[a.num_seqs] * a.kv_heads * a.d_qk);
    auto keys_transposed = [&](int s, int j0, int n, int g) { return kt + ((int64_t)(a.cu_k[s] + j0) * a.kv_heads + (int64_t)g * n) * a.d_qk; };
    std::vector<Tile> k_tiles = make_tiles(a.num_seqs, a.cu_k, KT), q_tiles = make_tiles(a.num_seqs, a.cu_q, QT);
#pragma omp parallel for collapse(2) schedule(static)
    for (size_t t = 0; t < k_tiles.size(); t++)
        for (int g = 0; g < a.kv_heads; g++) {
            int s = k_tiles[t].seq, j0 = k_tiles[t].start, n = std::min(KT, a.k_len(s) - j0);
            if (few_queries(a.q_len(s))) continue;
            real* block = keys_transposed(s, j0, n, g);
            if (!a.states) {
                tile_transpose(n, a.d_qk, a.key(s, j0, g), a.k_stride, block, n);
                continue;
            }
            for (int j = 0; j < n; j++) {
                const real* key = a.key(s, j0 + j, g);
                for (int c = 0; c < a.d_qk; c++) block[(int64_t)c * n + j] = key[c];
            }
        }

#pragma omp parallel
    {
        RealVector scores(QT * KT), sum((size_t)QT * a.d_v), values(a.states ? (size_t)KT * a.d_v : 0), z(KT);
#pragma omp for collapse(2) schedule(dynamic)
        for (size_t t = 0; t < q_tiles.size(); t++)
            for (int h = 0; h < a.heads; h++) {
                // Later tiles of a sequence have more keys: they go first, so that no thread is left with a long one.
                Tile tile = q_tiles[q_tiles.size() - 1 - t];
                int s = tile.seq, i0 = tile.start, rows = std::min(QT, a.q_len(s) - i0), g = a.kv_head(h);
                int first = a.position(s, i0), last = std::min(first + rows, a.k_len(s)) - 1;  // the first query's position, the last key seen
                const real* q = a.q + (a.cu_q[s] + i0) * a.q_stride + h * a.d_qk;
                real m[QT], l[QT];
                std::fill(m, m + QT, MINUS_INFINITY);
                std::fill(l, l + QT, (real)0);
                std::fill(sum.begin(), sum.end(), (real)0);
                int j_begin = a.window > 0 ? std::max(0, first - a.window + 1) / KT * KT : 0;
                for (int j0 = j_begin; j0 <= last; j0 += KT) {
                    int n = std::min(KT, a.k_len(s) - j0);
                    if (few_queries(a.q_len(s))) {
                        for (int j = 0; j < n; j++)
                            for (int i = 0; i < rows; i++) scores[i * n + j] = dot(a.d_qk, q + i * a.q_stride, a.key(s, j0 + j, g));
                    } else {
                        tile_matmul(rows, n, a.d_qk, q, a.q_stride, 1, keys_transposed(s, j0, n, g), n, scores.data(), n, false);
                    }
                    for (int i = 0; i < rows; i++) {
                        int lo, hi;
                        visible_keys(first + i, a.window, j0, n, &lo, &hi);
                        real* p = scores.data() + i * n;
                        real rescale = softmax_row(p, n, lo, hi, a.scale, &m[i], &l[i]);
                        if (rescale != 1)
                            for (int c = 0; c < a.d_v; c++) sum[i * a.d_v + c] *= rescale;
                        if (a.dropout.p > 0) {  // after the sum l: lse is that of the undropped softmax
                            dropout_row(a, s, h, i0 + i, j0, n, z.data());
                            for (int j = 0; j < n; j++) p[j] *= z[j];
                        }
                    }
                    const real* v = a.states ? values.data() : a.value(s, j0, g);
                    if (a.states)
                        for (int j = 0; j < n; j++) memcpy(&values[(size_t)j * a.d_v], a.value(s, j0 + j, g), a.d_v * sizeof(real));
                    tile_matmul(rows, a.d_v, n, scores.data(), n, 1, v, a.states ? a.d_v : a.v_stride, sum.data(), a.d_v, true);
                }
                for (int i = 0; i < rows; i++) {
                    int64_t n = a.cu_q[s] + i0 + i;
                    real inverse = l[i] > 0 ? 1 / l[i] : 0;
                    for (int c = 0; c < a.d_v; c++) o[n * o_stride + h * a.d_v + c] = sum[i * a.d_v + c] * inverse;
                    if (lse) lse[n * a.heads + h] = l[i] > 0 ? m[i] + std::log(l[i]) : MINUS_INFINITY;
                }
            }
    }
}

// Backward, for each tile of keys all queries that see it, with D_i = Σ_c do_ic·o_ic and dropout Z (o = (P⊙Z)v):
//
//     P = exp(scale·QKᵀ − lse)    dP = (dO·Vᵀ)⊙Z    dS = scale·P⊙(dP − D)    dV = (P⊙Z)ᵀdO    dK = dSᵀQ    dQ = Σ over tiles of dS·K
//
// dq, dk, dv have the layouts of q, k, v with strides of their own, and are overwritten; the heads of a group are summed into dk, dv.
// One thread takes a sequence and kv head from end to end, so that every sum has one order whatever the number of threads.
struct SoftmaxGradients {
    const real *o, *lse, *d_o;  // of the forward pass; gradient of o
    int64_t o_stride, do_stride;
    real *dq, *dk, *dv;
    int64_t dq_stride, dk_stride, dk_head, dv_stride, dv_head;
};

inline void softmax_backward(const SoftmaxAttention& a, const SoftmaxGradients& g) {
    assert(!a.states && !a.q_at);
#pragma omp parallel
    {
        RealVector P(QT * KT), dS(QT * KT), kt((size_t)a.d_qk * KT), vt((size_t)a.d_v * KT), dk((size_t)KT * a.d_qk), dv((size_t)KT * a.d_v), z(KT), D;
#pragma omp for collapse(2) schedule(dynamic)
        for (int s = 0; s < a.num_seqs; s++)
            for (int kv = 0; kv < a.kv_heads; kv++) {
                int n_q = a.q_len(s), n_k = a.k_len(s), shift = n_k - n_q, h0 = 0;
                while (a.kv_head(h0) < kv) h0++;
                int group = a.heads / a.kv_heads;
                int64_t q0 = a.cu_q[s], k0 = a.cu_k[s];
                D.resize((size_t)n_q * group);
                for (int i = 0; i < n_q; i++)
                    for (int h = h0; h < h0 + group; h++) {
                        D[i * group + h - h0] = dot(a.d_v, g.d_o + (q0 + i) * g.do_stride + h * a.d_v, g.o + (q0 + i) * g.o_stride + h * a.d_v);
                        std::fill_n(g.dq + (q0 + i) * g.dq_stride + h * a.d_qk, a.d_qk, (real)0);
                    }
                for (int j0 = 0; j0 < n_k; j0 += KT) {
                    int n = std::min(KT, n_k - j0);
                    const real* k = a.key(s, j0, kv);
                    tile_transpose(n, a.d_qk, k, a.k_stride, kt.data(), n);
                    tile_transpose(n, a.d_v, a.value(s, j0, kv), a.v_stride, vt.data(), n);
                    std::fill(dk.begin(), dk.end(), (real)0);
                    std::fill(dv.begin(), dv.end(), (real)0);
                    int i_begin = std::max(0, j0 - shift) / QT * QT;                                          // the first query that sees key j0
                    int i_end = a.window > 0 ? std::min(n_q, j0 + n - 1 + a.window - shift) : n_q;  // behind the last that sees any
                    for (int h = h0; h < h0 + group; h++)
                        for (int i0 = i_begin; i0 < i_end; i0 += QT) {
                            int rows = std::min(QT, n_q - i0);
                            const real *q = a.q + (q0 + i0) * a.q_stride + h * a.d_qk, *d_o = g.d_o + (q0 + i0) * g.do_stride + h * a.d_v;
                            tile_matmul(rows, n, a.d_qk, q, a.q_stride, 1, kt.data(), n, P.data(), n, false);
                            tile_matmul(rows, n, a.d_v, d_o, g.do_stride, 1, vt.data(), n, dS.data(), n, false);  // dP
                            for (int i = 0; i < rows; i++) {
                                int lo, hi;
                                visible_keys(i0 + i + shift, a.window, j0, n, &lo, &hi);
                                hi = std::max(hi, 0);
                                lo = std::min(lo, hi);
                                real *p = &P[i * n], *ds = &dS[i * n], lse = g.lse[(q0 + i0 + i) * a.heads + h], d = D[(i0 + i) * group + h - h0];
                                for (int j = 0; j < lo; j++) p[j] = ds[j] = 0;
                                for (int j = hi; j < n; j++) p[j] = ds[j] = 0;
                                if (a.dropout.p > 0) {
                                    dropout_row(a, s, h, i0 + i, j0, n, z.data());
                                    for (int j = lo; j < hi; j++) {
                                        real probability = vexp(a.scale * p[j] - lse);
                                        ds[j] = a.scale * probability * (ds[j] * z[j] - d);
                                        p[j] = probability * z[j];
                                    }
                                    continue;
                                }
#pragma omp simd
                                for (int j = lo; j < hi; j++) {
                                    p[j] = vexp(a.scale * p[j] - lse);
                                    ds[j] = a.scale * p[j] * (ds[j] - d);
                                }
                            }
                            tile_matmul(n, a.d_v, rows, P.data(), 1, n, d_o, g.do_stride, dv.data(), a.d_v, true);
                            tile_matmul(n, a.d_qk, rows, dS.data(), 1, n, q, a.q_stride, dk.data(), a.d_qk, true);
                            tile_matmul(rows, a.d_qk, n, dS.data(), n, 1, k, a.k_stride, g.dq + (q0 + i0) * g.dq_stride + h * a.d_qk, g.dq_stride, true);
                        }
                    for (int j = 0; j < n; j++) {
                        memcpy(g.dk + (k0 + j0 + j) * g.dk_stride + kv * g.dk_head, &dk[(size_t)j * a.d_qk], a.d_qk * sizeof(real));
                        memcpy(g.dv + (k0 + j0 + j) * g.dv_stride + kv * g.dv_head, &dv[(size_t)j * a.d_v], a.d_v * sizeof(real));
                    }
                }
            }
    }
}

}  // namespace cpu

// --------------------------------------------------------------------------------------------------------------------------------------------------
// 3. Causal attention (Radford et al., GPT-2, 2019; grouped queries: Ainslie et al., arXiv 2305.13245)
//
//     q, k, v = x·Wqkvᵀ + bqkv      s_ij = q_i·k_j/√hs for i−window < j <= i      out = residual + (softmax(s)·v)·Woᵀ + bo
//
// Wqkv ((NH+2·KV)·hs, C): rows of q, then k, then v, each head by head. With --positions rope q and k are rotated.
// Saves qkv (after the rotation), o and lse: N·(2C + 2·KV·hs + NH) numbers. State: k and v of every token, 2·KV·hs numbers.

constexpr int MAX_HEADS = 4096, MAX_WINDOW = 1 << 30;

inline const AttentionOption kv_heads_option = {"kv-heads", "key/value heads, a divisor of --heads (grouped queries); default: as many", AUTOMATIC, 1, MAX_HEADS};

inline void resolve_kv_heads(AttentionConfig& a) {
    if (a["kv-heads"] == AUTOMATIC) a.options["kv-heads"] = a.heads;
    if (a.heads % a["kv-heads"]) usage_error("%d kv-heads do not divide %d heads: change --kv-heads or --heads", a["kv-heads"], a.heads);
    if (a.positions == Positions::ROPE && a.head_size() % 2)
        usage_error("rotary positions need an even head size, %d channels by %d heads give %d: change --heads, or use --positions none", a.channels, a.heads, a.head_size());
}

inline int64_t qkv_size(const AttentionConfig& a) { return (int64_t)(a.heads + 2 * a["kv-heads"]) * a.head_size(); }

inline std::vector<TensorSpec> causal_parameters(const AttentionConfig& a) {
    return {matrix_spec("wqkv", qkv_size(a), a.channels, 0.02), vector_spec("bqkv", qkv_size(a), 0), matrix_spec("wo", a.channels, a.channels, a.residual_std()),
            vector_spec("bo", a.channels, 0)};
}

inline AttentionStateSize causal_state(const AttentionConfig& a) { return {2 * (int64_t)a["kv-heads"] * a.head_size(), 0}; }

// Mean number of keys that a query sees, at length T with this window.
inline double visible_mean(double T, double window) {
    if (window <= 0 || window >= T) return (T + 1) / 2;
    return (window * (window + 1) / 2 + (T - window) * window) / T;
}

inline double causal_flops(const AttentionConfig& a, double T) {
    double C = a.channels;
    return 2 * C * qkv_size(a) + 2 * C * C + 4 * C * visible_mean(T, a["window"]);
}

inline AttentionDescription causal_description() {
    return {"causal",
            "softmax attention over all tokens before (GPT-2)",
            {kv_heads_option, {"window", "sliding window: how many tokens a query sees, itself included; 0: all", 0, 0, MAX_WINDOW}},
            resolve_kv_heads,
            causal_parameters,
            causal_state,
            causal_flops,
            /*learned_positions*/ true,
            /*recurrent*/ false};
}

namespace cpu {

inline std::vector<TensorSpec> causal_saved(const AttentionConfig& a, int64_t N, int) {
    return {buffer_spec("qkv", {N, qkv_size(a)}), buffer_spec("o", {N, a.channels}), buffer_spec("lse", {N, a.heads}, Storage::FLOAT32)};
}

inline int64_t causal_scratch(const AttentionConfig& a, int64_t N, int64_t, int64_t kv_tokens, bool training) {
    int64_t C = a.channels, keys = softmax_forward_scratch(training ? N : kv_tokens, a["kv-heads"], a.head_size()), branch = scratch_size({N * C});
    int64_t forward = std::max(keys, branch), extend = scratch_size({N * qkv_size(a), N * C}) + std::max(keys, branch);
    int64_t backward = scratch_size({N * C, N * qkv_size(a)}) + branch;
    return std::max(forward, training ? backward : extend);
}

// The softmax core's arguments for q, k, v packed in rows of qkv_size.
inline SoftmaxAttention causal_core(const AttentionContext& ctx, const real* qkv) {
    const AttentionConfig& a = *ctx.config;
    SoftmaxAttention core{};
    core.heads = a.heads;
    core.kv_heads = a["kv-heads"];
    core.d_qk = core.d_v = a.head_size();
    core.scale = 1 / std::sqrt((real)a.head_size());
    core.num_seqs = ctx.num_seqs;
    core.cu_q = core.cu_k = ctx.cu_seqlens;
    core.q = qkv;
    core.k = qkv + a.channels;
    core.v = core.k + core.kv_heads * core.d_qk;
    core.q_stride = core.k_stride = core.v_stride = qkv_size(a);
    core.k_head = core.v_head = core.d_qk;
    core.dropout = ctx.dropout;
    return core;
}

// Rotates q and k, which stand side by side, in place; `shift` (a sequence) is added to the positions.
inline void causal_rope(const AttentionContext& ctx, real* qkv, int direction) {
    const AttentionConfig& a = *ctx.config;
    std::vector<int> position(ctx.tokens());
    for (int64_t n = 0; n < ctx.tokens(); n++) position[n] = ctx.place[n].pos + (ctx.states ? (int)ctx.states[ctx.place[n].seq].length : 0);
    rope(qkv, qkv_size(a), qkv, qkv_size(a), ctx.tokens(), a.heads + a["kv-heads"], a.head_size(), position.data(), direction);
}

inline void causal_forward(const AttentionContext& ctx, const Tensors& parameters, const Tensors& saved, const real* x, const real* residual, real* out) {
    const AttentionConfig& a = *ctx.config;
    real *qkv = saved["qkv"], *o = saved["o"];
    linear_forward(qkv, x, parameters["wqkv"], parameters["bqkv"], ctx.tokens(), a.channels, qkv_size(a));
    if (a.positions == Positions::ROPE) causal_rope(ctx, qkv, 1);
    SoftmaxAttention core = causal_core(ctx, qkv);
    core.window = a["window"];
    softmax_forward(core, o, a.channels, saved["lse"], ctx.scratch);
    output_forward(ctx, o, a.channels, parameters["wo"], parameters["bo"], residual, out);
}

inline void causal_backward(const AttentionContext& ctx, const Tensors& parameters, const Tensors& gradients, const Tensors& saved, const real* x, const real* dout,
                            real* dx) {
    const AttentionConfig& a = *ctx.config;
    int64_t N = ctx.tokens(), C = a.channels;
    AttentionContext rest = ctx;
    real *d_o = rest.scratch.take(N * C), *dqkv = rest.scratch.take(N * qkv_size(a));
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
    softmax_backward(core, g);
    if (a.positions == Positions::ROPE) causal_rope(ctx, dqkv, -1);
    linear_backward(dx, false, gradients["wqkv"], gradients["bqkv"], dqkv, x, parameters["wqkv"], N, C, qkv_size(a));
}

inline void causal_extend(const AttentionContext& ctx, const Tensors& parameters, const real* x, const real* residual, real* out) {
    const AttentionConfig& a = *ctx.config;
    int64_t N = ctx.tokens(), C = a.channels, row = causal_state(a).per_token;
    AttentionContext rest = ctx;
    real *qkv = rest.scratch.take(N * qkv_size(a)), *o = rest.scratch.take(N * C);
    linear_forward(qkv, x, parameters["wqkv"], parameters["bqkv"], N, C, qkv_size(a));
    if (a.positions == Positions::ROPE) causal_rope(ctx, qkv, 1);
    for (int64_t n = 0; n < N; n++) {
        const AttentionState& state = ctx.states[ctx.place[n].seq];
        memcpy(state.row(state.length + ctx.place[n].pos), qkv + n * qkv_size(a) + C, row * sizeof(real));
    }
    std::vector<int> cu_k(1, 0);
    for (int s = 0; s < ctx.num_seqs; s++) cu_k.push_back(cu_k[s] + (int)ctx.states[s].length + ctx.cu_seqlens[s + 1] - ctx.cu_seqlens[s]);
    SoftmaxAttention core = causal_core(ctx, qkv);
    core.window = a["window"];
    core.cu_k = cu_k.data();
    core.states = ctx.states;
    core.v_offset = row / 2;
    softmax_forward(core, o, C, nullptr, rest.scratch);
    output_forward(rest, o, C, parameters["wo"], parameters["bo"], residual, out);
}

inline Attention causal_attention() { return {"causal", causal_saved, causal_scratch, causal_forward, causal_backward, causal_extend}; }

}  // namespace cpu

// --------------------------------------------------------------------------------------------------------------------------------------------------
// 7. The registry

inline const std::vector<AttentionDescription>& attention_descriptions() {
    static const std::vector<AttentionDescription> list = {causal_description()};
    return list;
}

namespace cpu {
inline const Attention& attention(const std::string& name) {
    static const std::vector<Attention> list = {causal_attention()};
    for (const Attention& a : list)
        if (name == a.name) return a;
    usage_error("attention '%s' has no CPU implementation", name.c_str());  // unreachable while the two lists agree
}
}  // namespace cpu
