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
// Symbols: N tokens, C channels, NH query heads, KV key/value heads, h a head, hs = C/NH head size, L layers of the network, l a layer (h, l from 0). `d` before
// a name is the loss's gradient.
//
// To add a fifth attention: a section of its own below and its two lines in the registry; its reference in dev/reference; its options in the variants of
// dev/test/layer_tests.cpp. Nothing else asks which layers there are.
#pragma once

#include <cmath>
#include <cstring>
#include <limits>
#include <optional>
#include <vector>

#include "gpt2/config.h"
#include "gpt2/cpu/layers.h"
#include "gpt2/cpu/matmul.h"

// --------------------------------------------------------------------------------------------------------------------------------------------------
// 1. The seam

namespace cpu {

// One sequence's decode state in one network layer: a block of constant size (`fixed`, all zeros for an empty sequence), and one row a token in pages of a
// pool that is one range of memory.
struct AttentionState {
    int64_t length = 0;               // rows in it, before those that extend() appends now, which have been allocated
    real* fixed = nullptr;            // AttentionStateSize::per_sequence numbers
    real* rows = nullptr;             // this network layer's rows in page 0 of the pool
    const int* page_table = nullptr;  // row j is in page page_table[j / page_size]; entries behind the last page needed may be anything
    int64_t page_stride = 0;          // numbers from a page of the pool to the next
    int page_size = 1;                // rows of a page
    int64_t per_token = 0;            // AttentionStateSize::per_token: the length of a row
    int64_t dropped = 0;              // tokens before these whose rows a sliding window has given back: row j is that of the token at position dropped + j
    int64_t past() const { return dropped + length; }
    real* row(int64_t j) const { return rows + page_table[j / page_size] * page_stride + j % page_size * per_token; }
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

    // extend: the state of each sequence; a sliding window beside the layer's own, tokens that a token sees with itself in layers that keep rows (0: none).
    const AttentionState* states = nullptr;
    int window = 0;
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
    void (*backward)(const AttentionContext&, const Tensors& parameters, const Tensors& gradients, const Tensors& saved, const real* x, const real* dout,
                     real* dx);
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
#pragma omp parallel for if (N * C > FEW_NUMBERS)
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

// Few queries on the keys of a decode state: softmax_decode below.
inline bool few_queries(int q_len) { return q_len < 4; }

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
    // Keys and values of a decode state that are not in pages; with `rope`, rope_table(d_qk), key j is rotated to position j as it is read. Few queries only.
    bool kept = false;
    const real* rope = nullptr;
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
    bool decoded(int s) const { return (states || kept) && few_queries(q_len(s)); }
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

// One row of the running softmax over the scores s[lo..hi) of this tile: turns them into exp(s·scale − m), the others into 0. Returns the factor by which
// what was accumulated so far has to be multiplied. The exponent is never taken of a masked score, which may be anything.
inline real softmax_row(real* s, int n, int lo, int hi, real scale, real* m, real* l) {
    lo = std::min(std::max(lo, 0), n);
    hi = std::max(hi, lo);
    real before = *m, now = std::max(before, largest(hi - lo, s + lo, MINUS_INFINITY) * scale), sum = 0;
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

// How many of so many keys a thread takes at once in decoding: 16 to 32 parts keep as many threads busy, and what they leave is little beside the keys. Not
// a matter of how many threads there are: any number of them gives the same sums.
inline int decode_part(int keys) { return std::min(256, (keys + 511) / 512 * 16); }

// sum (d) += Σ_r p_r·v_r, where v_r stands at rows[r] + offset.
template <int R>
inline void add_rows(int d, const real* p, const real* const* rows, int64_t offset, real* sum) {
    real weight[R];
    const real* v[R];
    for (int r = 0; r < R; r++) weight[r] = p[r], v[r] = rows[r] + offset;
#pragma omp simd
    for (int c = 0; c < d; c++)
        for (int r = 0; r < R; r++) sum[c] += weight[r] * v[r][c];
}

// Decoding reads much and computes little: every key and value, which stand as rows of all heads, for a few products each. So the work is cut by keys and not
// by heads: a thread takes a part of a sequence's keys and walks over their rows once, for all heads; with its m, l and Σ_j exp(s_j − m)·v_j of each head and
// query, the parts of a sequence are put together in their order (flash-decoding), whatever thread had them.
inline void softmax_decode(const SoftmaxAttention& a, real* o, int64_t o_stride, real* lse) {
    struct Part {
        int seq, start, end;
        int64_t result;  // where its results stand: for each query and head m, l, sum (d_v)
    };
    static thread_local RealVector results;  // kept: fresh pages from the system cost as much as the keys
    std::vector<Part> parts;
    std::vector<int> first_part;
    const int64_t record = a.d_v + 2;
    int64_t numbers = 0;
    for (int s = 0; s < a.num_seqs; s++) {
        first_part.push_back((int)parts.size());
        if (!few_queries(a.q_len(s)) || a.q_len(s) == 0) continue;
        int first = a.position(s, 0), begin = a.window > 0 ? std::max(0, first - a.window + 1) / KT * KT : 0, end = std::min(first + a.q_len(s), a.k_len(s));
        for (int j = begin, size = decode_part(end - begin); j < end; j += size) {
            parts.push_back({s, j, std::min(j + size, end), numbers});
            numbers += a.q_len(s) * a.heads * record;
        }
    }
    first_part.push_back((int)parts.size());
    if ((int64_t)results.size() < numbers) results.resize(numbers);
    real* records = results.data();
    const int64_t key_row = a.kv_heads * a.k_head;
    // row_products fetches what it needs soon: four rows on.
    const int64_t ahead = 4 * (a.rope ? key_row : a.states ? a.states[0].per_token : a.k_stride);
    std::vector<int64_t> group;  // each head's kv head
    for (int h = 0; h < a.heads; h++) group.push_back(a.kv_head(h));
#pragma omp parallel
    {
        RealVector scores((size_t)a.heads * KT), rotated(a.rope ? KT * key_row : 0);
        std::vector<const real*> keys(KT), values(KT);
#pragma omp for schedule(dynamic)
        for (size_t t = 0; t < parts.size(); t++) {
            int s = parts[t].seq, rows = a.q_len(s), first = a.position(s, 0), end = parts[t].end;
            real* result = records + parts[t].result;
            for (int64_t r = 0; r < rows * a.heads; r++) {
                std::fill_n(result + r * record, record, (real)0);
                result[r * record] = MINUS_INFINITY;
            }
            for (int j0 = parts[t].start; j0 < end; j0 += KT) {
                int n = std::min(KT, end - j0), lo, hi;
                for (int j = 0; j < n; j++) keys[j] = a.key(s, j0 + j, 0), values[j] = a.value(s, j0 + j, 0);
                for (int j = 0; j < n && a.rope; j++) {
                    rope_row(&rotated[j * key_row], keys[j], a.kv_heads, a.d_qk, a.rope + (int64_t)(j0 + j) * a.d_qk, 1);
                    keys[j] = &rotated[j * key_row];
                }
                for (int i = 0; i < rows; i++) {
                    const real* q = a.q + (a.cu_q[s] + i) * a.q_stride;
                    real* own = result + (int64_t)i * a.heads * record;
                    visible_keys(first + i, a.window, j0, n, &lo, &hi);
                    for (int j = lo, step; j < hi; j += step) {
                        step = j + 4 <= hi ? 4 : 1;
                        for (int h = 0; h < a.heads; h++)
                            (step == 4 ? row_products<1, 4, 1> : row_products<1, 1, 1>)(a.d_qk, q + h * a.d_qk, 0, &keys[j], group[h] * a.k_head, ahead,
                                                                                        &scores[h * KT + j]);
                    }
                    for (int h = 0; h < a.heads; h++) {
                        real *m = own + h * record, rescale = softmax_row(&scores[h * KT], n, lo, hi, a.scale, m, m + 1);
                        if (rescale != 1)
                            for (int c = 0; c < a.d_v; c++) m[2 + c] *= rescale;
                    }
                    for (int j = lo, step; j < hi; j += step) {
                        step = j + 4 <= hi ? 4 : 1;
                        for (int h = 0; h < a.heads; h++)
                            (step == 4 ? add_rows<4> : add_rows<1>)(a.d_v, &scores[h * KT + j], &values[j], group[h] * a.v_head, own + h * record + 2);
                    }
                }
            }
        }
#pragma omp for collapse(2) schedule(static)
        for (int s = 0; s < a.num_seqs; s++)
            for (int h = 0; h < a.heads; h++)
                for (int i = 0; few_queries(a.q_len(s)) && i < a.q_len(s); i++) {
                    real m = MINUS_INFINITY, l = 0, *out = o + (a.cu_q[s] + i) * o_stride + h * a.d_v;
                    std::fill_n(out, a.d_v, (real)0);
                    for (int t = first_part[s]; t < first_part[s + 1]; t++) m = std::max(m, records[parts[t].result + (i * a.heads + h) * record]);
                    for (int t = first_part[s]; t < first_part[s + 1]; t++) {
                        const real* part = records + parts[t].result + (i * a.heads + h) * record;
                        if (part[0] == MINUS_INFINITY) continue;
                        real weight = vexp(part[0] - m);
                        l += weight * part[1];
                        for (int c = 0; c < a.d_v; c++) out[c] += weight * part[2 + c];
                    }
                    for (int c = 0; c < a.d_v; c++) out[c] = l > 0 ? out[c] / l : 0;
                    if (lse) lse[(a.cu_q[s] + i) * a.heads + h] = l > 0 ? m + std::log(l) : MINUS_INFINITY;
                }
    }
}

// o (rows of q, NH·d_v, o_stride apart), lse (rows of q, NH) or null.
inline void softmax_forward(const SoftmaxAttention& a, real* o, int64_t o_stride, real* lse, Scratch scratch) {
    int left = 0;
    for (int s = 0; s < a.num_seqs; s++) left += !a.decoded(s);
    if (left < a.num_seqs) softmax_decode(a, o, o_stride, lse);
    if (left == 0) return;
    // Keys transposed, once for all query tiles: for each tile of n keys and each kv head a block (d_qk, n).
    real* kt = scratch.take((int64_t)a.cu_k[a.num_seqs] * a.kv_heads * a.d_qk);
    auto keys_transposed = [&](int s, int j0, int n, int g) { return kt + ((int64_t)(a.cu_k[s] + j0) * a.kv_heads + (int64_t)g * n) * a.d_qk; };
    std::vector<Tile> k_tiles = make_tiles(a.num_seqs, a.cu_k, KT), q_tiles = make_tiles(a.num_seqs, a.cu_q, QT);
#pragma omp parallel for collapse(2) schedule(static)
    for (size_t t = 0; t < k_tiles.size(); t++)
        for (int g = 0; g < a.kv_heads; g++) {
            int s = k_tiles[t].seq, j0 = k_tiles[t].start, n = std::min(KT, a.k_len(s) - j0);
            if (a.decoded(s)) continue;
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
                if (a.decoded(s)) continue;
                int first = a.position(s, i0), last = std::min(first + rows, a.k_len(s)) - 1;  // the first query's position, the last key seen
                const real* q = a.q + (a.cu_q[s] + i0) * a.q_stride + h * a.d_qk;
                real m[QT], l[QT];
                std::fill(m, m + QT, MINUS_INFINITY);
                std::fill(l, l + QT, (real)0);
                std::fill(sum.begin(), sum.end(), (real)0);
                int j_begin = a.window > 0 ? std::max(0, first - a.window + 1) / KT * KT : 0;
                for (int j0 = j_begin; j0 <= last; j0 += KT) {
                    int n = std::min(KT, a.k_len(s) - j0);
                    tile_matmul(rows, n, a.d_qk, q, a.q_stride, 1, keys_transposed(s, j0, n, g), n, scores.data(), n, false);
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
                    int i_begin = std::max(0, j0 - shift) / QT * QT;                                // the first query that sees key j0
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

inline const AttentionOption kv_heads_option = {"kv-heads", "key/value heads, a divisor of --heads (grouped queries); default: as many", AUTOMATIC, 1,
                                                MAX_HEADS};

inline void resolve_kv_heads(AttentionConfig& a) {
    if (a["kv-heads"] == AUTOMATIC) a.options["kv-heads"] = a.heads;
    if (a.heads % a["kv-heads"]) usage_error("%d kv-heads do not divide %d heads: change --kv-heads or --heads", a["kv-heads"], a.heads);
    if (a.positions == Positions::ROPE && a.head_size() % 2)
        usage_error("rotary positions need an even head size, %d channels by %d heads give %d: change --heads, or use --positions none", a.channels, a.heads,
                    a.head_size());
}

inline int64_t qkv_size(const AttentionConfig& a) { return (int64_t)(a.heads + 2 * a["kv-heads"]) * a.head_size(); }

inline std::vector<TensorSpec> causal_parameters(const AttentionConfig& a) {
    return {matrix_spec("wqkv", qkv_size(a), a.channels, 0.02), vector_spec("bqkv", qkv_size(a), 0),
            matrix_spec("wo", a.channels, a.channels, a.residual_std()), vector_spec("bo", a.channels, 0)};
}

inline AttentionStateSize causal_state(const AttentionConfig& a) { return {2 * (int64_t)a["kv-heads"] * a.head_size(), 0}; }

// Of two windows, 0 being none.
inline int narrower_window(int a, int b) { return a == 0 || b == 0 ? a + b : std::min(a, b); }

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

// Rotates q and k, which stand side by side, in place. In extend a sequence's new tokens stand behind its past.
inline void causal_rope(const AttentionContext& ctx, real* qkv, int direction) {
    const AttentionConfig& a = *ctx.config;
    std::vector<int> position(ctx.tokens());
    for (int64_t n = 0; n < ctx.tokens(); n++) position[n] = ctx.place[n].pos + (ctx.states ? (int)ctx.states[ctx.place[n].seq].past() : 0);
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

inline void causal_backward(const AttentionContext& ctx, const Tensors& parameters, const Tensors& gradients, const Tensors& saved, const real* x,
                            const real* dout, real* dx) {
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
    core.window = narrower_window(a["window"], ctx.window);
    core.cu_k = cu_k.data();
    core.states = ctx.states;
    core.v_offset = row / 2;
    softmax_forward(core, o, C, nullptr, rest.scratch);
    output_forward(rest, o, C, parameters["wo"], parameters["bo"], residual, out);
}

inline Attention causal_attention() { return {"causal", causal_saved, causal_scratch, causal_forward, causal_backward, causal_extend}; }

}  // namespace cpu

// --------------------------------------------------------------------------------------------------------------------------------------------------
// 4. Infini-attention (Munkhdalai, Faruqui and Gopal, arXiv 2404.07143)
//
//     q, k, v = x·Wqkvᵀ + bqkv      Φ(x) = ELU(x) + 1 = x+1 for x > 0, else eˣ      g = sigmoid(β)      out = residual + A·Woᵀ + bo
//
// A sequence is cut into segments of S tokens; for each in turn, with the memory M, z of what was before it:
//
//     R = (Φ(q)M) / (Φ(q)·z + ε)                 read the memory, before this segment is written
//     D = softmax(q·kᵀ/√hs)·v                    causal, within the segment; rotary positions count from its start, and only D sees them
//     A = g·R + (1−g)·D                          first-segment=pass: A = D while nothing has been written
//     M' = M + Φ(k)ᵀU,  z' = z + Σ_t Φ(k_t)      when the segment is full; U = v, or memory-update=delta: U = v − V̂, V̂ = (Φ(k)M)/(Φ(k)·z + ε)
//
// Wqkv as in causal; M (hs,hs) and z (hs) per kv head, β (NH) per query head; M starts at 0, z at 1 or 0 (memory-init). ε = 1e-6: Φ can underflow.
// An unfinished segment is pending: the next tokens of the sequence continue it (its positions, its local keys, what it will write).
// Saves qkv (before the rotation), D and lse, N·(2C + 2·KV·hs + NH) numbers as causal does, and the memory after every full segment, (N/S)·KV·hs·(hs+1).
// R and A are computed again: a read is hs/C of the output projection's work. Beside the projections forward costs 4·C·(S+1)/2 + 2·hs·(NH+KV)·hs FLOPs a
// token whatever T is.
// State, constant: how many tokens are pending, whether anything was written, z and M, the pending tokens' k (before the rotation) and v.

constexpr int MAX_SEGMENT = 1 << 20;

inline int64_t infini_memory_size(const AttentionConfig& a) { return (int64_t)a["kv-heads"] * (a.head_size() + 1) * a.head_size(); }

// pending, written; for each kv head z (hs) and M (hs,hs); for each pending token k and v (2·KV·hs). All zeros: empty.
constexpr int INFINI_PENDING = 0, INFINI_WRITTEN = 1, INFINI_MEMORY = 2;
inline int64_t infini_row_size(const AttentionConfig& a) { return 2 * (int64_t)a["kv-heads"] * a.head_size(); }
inline AttentionStateSize infini_state(const AttentionConfig& a) { return {0, INFINI_MEMORY + infini_memory_size(a) + a["segment"] * infini_row_size(a)}; }

inline std::vector<TensorSpec> infini_parameters(const AttentionConfig& a) {
    TensorSpec beta = vector_spec("beta", a.heads, 0);
    beta.storage = Storage::FLOAT32;
    beta.lr_multiplier = a.number("gate-lr");
    std::vector<TensorSpec> list = causal_parameters(a);
    list.push_back(beta);
    return list;
}

inline double infini_flops(const AttentionConfig& a, double T) {
    double C = a.channels, S = a["segment"], full = std::floor(T / S) * S, tail = T - full, hs = a.head_size();
    double keys = (full * (S + 1) + tail * (tail + 1)) / 2 / T, reading = std::max(0.0, T - S) / T, writing = full / T;
    double write = 2 * a["kv-heads"] * hs * hs * (a["memory-update"] ? 2 : 1);
    return 2 * C * qkv_size(a) + 2 * C * C + 4 * C * keys + reading * 2 * C * hs + writing * write;
}

inline AttentionDescription infini_description() {
    return {"infini",
            "softmax attention within segments, and a memory of constant size of all segments before",
            {kv_heads_option,
             {"segment", "tokens a segment", 256, 1, MAX_SEGMENT},
             {"memory-update", "how a segment is written: all of it (linear), or what the memory does not say already (delta)", 0, 0, 0, {"linear", "delta"}},
             {"memory-init", "where the memory's normaliser starts", 0, 0, 0, {"one", "zero"}},
             {"first-segment", "while the memory is empty: local attention alone (pass), or gated with zeros (gated, the paper)", 0, 0, 0, {"pass", "gated"}},
             {"gate-lr", "learning rate of the gates, in units of the model's", 30, 0, 1e6, {}, /*fraction*/ true}},
            resolve_kv_heads,
            infini_parameters,
            infini_state,
            infini_flops,
            /*learned_positions*/ false,
            /*recurrent*/ true};
}

namespace cpu {

// `carry`: the state that a lane came with; forward() may overwrite the lane before backward() runs.
inline std::vector<TensorSpec> infini_saved(const AttentionConfig& a, int64_t N, int lanes) {
    return {buffer_spec("qkv", {N, qkv_size(a)}), buffer_spec("d", {N, a.channels}), buffer_spec("lse", {N, a.heads}, Storage::FLOAT32),
            buffer_spec("memory", {N / a["segment"] + lanes, infini_memory_size(a)}, Storage::FLOAT32),
            buffer_spec("carry", {lanes, infini_state(a).per_sequence}, Storage::FLOAT32)};
}

inline int64_t infini_scratch(const AttentionConfig& a, int64_t N, int64_t num_seqs, int64_t, bool training) {
    int64_t C = a.channels, KVhs = infini_row_size(a) / 2, rotated = scratch_size({N * (C + KVhs)}), branch = scratch_size({N * C});
    int64_t local = rotated + softmax_forward_scratch(N, a["kv-heads"], a.head_size()), memories = (N / a["segment"] + num_seqs) * infini_memory_size(a);
    int64_t forward = scratch_size({N * C}) + std::max(local, branch);
    int64_t extend = scratch_size({N * qkv_size(a), N * C, memories}) + std::max(local, branch);
    int64_t backward = scratch_size({N * C, N * C, N * a.heads, N * qkv_size(a)}) + std::max(rotated, branch);
    return std::max(forward, training ? backward : extend);
}

// A segment, as far as it stands in this pass.
struct InfiniSegment {
    int seq, start;      // its sequence, and its place there, counted from the first pending token
    int row, q_len;      // the rows of its new tokens
    int k_len;           // all its tokens: pending ones of the pass before, then the new ones
    const real* memory;  // (KV, hs + hs·hs) what it reads; null: nothing has been written
    real* write;         // where it leaves the memory; null: it is not full
    int pending() const { return k_len - q_len; }
};

// What both directions need to know of a pass over N tokens.
struct InfiniPass {
    const AttentionConfig* config;
    const real* qkv;                      // (N, qkv_size), not rotated
    std::vector<real*> block;             // the state each sequence starts from; null: empty. Its rows are completed by the new tokens of the first segment
    std::vector<InfiniSegment> segments;  // of all sequences in order
    std::vector<int> first;               // (num_seqs + 1) the first segment of each sequence
    std::vector<int> cu_q, seq, start;    // the segments as sequences of the softmax core; (N+1), (N), (N)
    int hs, kv_heads, group;

    int64_t memory_size() const { return (int64_t)hs * (hs + 1); }  // of one kv head
    int64_t row_size() const { return 2 * (int64_t)kv_heads * hs; }
    real z_start() const { return (*config)["memory-init"] == 0 ? 1 : 0; }
    bool delta() const { return (*config)["memory-update"] == 1; }
    bool gated(const InfiniSegment& s) const { return s.memory || (*config)["first-segment"] == 1; }
    real* rows(int s) const { return block[s] + INFINI_MEMORY + kv_heads * memory_size(); }
    // k of the segment's first token; one token's k and v stand side by side.
    const real* keys(const InfiniSegment& s) const { return s.pending() ? rows(s.seq) : qkv + s.row * qkv_size(*config) + config->channels; }
    int64_t key_stride(const InfiniSegment& s) const { return s.pending() ? row_size() : qkv_size(*config); }
};

// `memories`: room for the memories after full segments.
inline InfiniPass infini_pass(const AttentionContext& ctx, const real* qkv, std::vector<real*> block, real* memories) {
    const AttentionConfig& a = *ctx.config;
    InfiniPass p{};
    p.config = &a;
    p.qkv = qkv;
    p.block = std::move(block);
    p.hs = a.head_size();
    p.kv_heads = a["kv-heads"];
    p.group = a.heads / p.kv_heads;
    int S = a["segment"];
    for (int s = 0; s < ctx.num_seqs; s++) {
        p.first.push_back((int)p.segments.size());
        int n = ctx.cu_seqlens[s + 1] - ctx.cu_seqlens[s], pending = p.block[s] ? (int)p.block[s][INFINI_PENDING] : 0;
        const real* memory = p.block[s] && p.block[s][INFINI_WRITTEN] > 0 ? p.block[s] + INFINI_MEMORY : nullptr;
        for (int start = 0; n > 0 && start < pending + n; start += S) {
            int k_len = std::min(S, pending + n - start), begin = std::max(start, pending);
            InfiniSegment segment = {s, start, ctx.cu_seqlens[s] + begin - pending, start + k_len - begin, k_len, memory, nullptr};
            if (k_len == S) {
                memory = segment.write = memories;
                memories += p.kv_heads * p.memory_size();
            }
            p.segments.push_back(segment);
        }
    }
    p.first.push_back((int)p.segments.size());
    for (const InfiniSegment& s : p.segments) {
        p.cu_q.push_back(s.row);
        p.seq.push_back(s.seq);
        p.start.push_back(s.start);
        for (int i = 0; s.pending() && i < s.q_len; i++)
            memcpy(p.rows(s.seq) + (s.pending() + i) * p.row_size(), qkv + (s.row + i) * qkv_size(a) + a.channels, p.row_size() * sizeof(real));
    }
    p.cu_q.push_back((int)ctx.tokens());
    return p;
}

// The position of each new token within its segment.
inline std::vector<int> infini_positions(const InfiniPass& p) {
    std::vector<int> position;
    for (const InfiniSegment& s : p.segments)
        for (int i = 0; i < s.q_len; i++) position.push_back(s.pending() + i);
    return position;
}

// ---- local attention ---------------------------------------------------------------------------------------------------------------------------------
// Segments are handed to the softmax core as sequences: a run of those that begin in this pass, whose keys stand in qkv, or one that has pending tokens,
// whose keys stand in its sequence's block.

struct InfiniRun {
    int begin, end;  // segments
    SoftmaxAttention core;
    bool pending;
    int cu_k[2];      // with pending tokens: its keys' offsets,
    RealVector keys;  // and the keys after the rotation
};

// Calls f(InfiniRun&) for each run; `rotated` (N, C + KV·hs): scratch for q and k after the rotation.
template <class F>
inline void infini_runs(const AttentionContext& ctx, const InfiniPass& p, real* rotated, F f) {
    const AttentionConfig& a = *ctx.config;
    int64_t C = a.channels, KVhs = p.row_size() / 2;
    bool rotate = a.positions == Positions::ROPE;
    if (rotate) rope(rotated, C + KVhs, p.qkv, qkv_size(a), ctx.tokens(), a.heads + p.kv_heads, p.hs, infini_positions(p).data(), 1);
    int count = (int)p.segments.size();
    for (int begin = 0, end; begin < count; begin = end) {
        const InfiniSegment& s = p.segments[begin];
        for (end = begin + 1; !s.pending() && end < count && !p.segments[end].pending();) end++;
        InfiniRun run{begin, end, causal_core(ctx, p.qkv), s.pending() > 0, {0, s.k_len}, {}};
        SoftmaxAttention& core = run.core;
        core.num_seqs = end - begin;
        core.cu_q = core.cu_k = p.cu_q.data() + begin;
        core.drop_seq = p.seq.data() + begin;
        core.drop_pos = p.start.data() + begin;
        if (rotate) {
            core.q = rotated;
            core.k = rotated + C;
            core.q_stride = core.k_stride = C + KVhs;
        }
        if (s.pending()) {
            core.cu_k = run.cu_k;
            core.k = p.keys(s);
            core.v = p.keys(s) + KVhs;
            core.k_stride = core.v_stride = p.row_size();
            core.kept = ctx.states && few_queries(s.q_len);
            if (rotate && core.kept) {
                core.rope = rope_table(p.hs, s.k_len);
            } else if (rotate) {
                std::vector<int> position(s.k_len);
                for (int j = 0; j < s.k_len; j++) position[j] = j;
                run.keys.resize(s.k_len * KVhs);
                rope(run.keys.data(), KVhs, core.k, core.k_stride, s.k_len, p.kv_heads, p.hs, position.data(), 1);
                core.k = run.keys.data();
                core.k_stride = KVhs;
            }
        }
        f(run);
    }
}

// D (N,C), lse (N,NH) or null.
inline void infini_local_forward(const AttentionContext& ctx, const InfiniPass& p, real* D, real* lse) {
    int64_t C = ctx.config->channels, KVhs = p.row_size() / 2;
    Scratch scratch = ctx.scratch;
    real* rotated = scratch.take(ctx.tokens() * (C + KVhs));
    infini_runs(ctx, p, rotated, [&](const InfiniRun& run) {
        // A pending segment may have more keys than this pass has tokens, for which `scratch` was made.
        bool own = run.pending && !run.core.kept;
        RealVector transposed(own ? softmax_forward_scratch(run.cu_k[1], p.kv_heads, p.hs) : 0);
        softmax_forward(run.core, D, C, lse, own ? Scratch{transposed.data(), (int64_t)transposed.size()} : scratch);
    });
}

// From dD (N,C): dq, dk, dv in dqkv (N, qkv_size), overwritten. Pending tokens are constants: their dk, dv go nowhere.
inline void infini_local_backward(const AttentionContext& ctx, const InfiniPass& p, const real* D, const real* lse, const real* dD, real* dqkv) {
    const AttentionConfig& a = *ctx.config;
    int64_t C = a.channels, stride = qkv_size(a), row_size = p.row_size();
    Scratch scratch = ctx.scratch;
    real* rotated = scratch.take(ctx.tokens() * (C + row_size / 2));
    infini_runs(ctx, p, rotated, [&](const InfiniRun& run) {
        RealVector dkv(run.pending ? run.cu_k[1] * row_size : 0);
        SoftmaxGradients g{};
        g.o = D;
        g.lse = lse;
        g.d_o = dD;
        g.o_stride = g.do_stride = C;
        g.dq = dqkv;
        g.dk = run.pending ? dkv.data() : dqkv + C;
        g.dv = g.dk + row_size / 2;
        g.dq_stride = stride;
        g.dk_stride = g.dv_stride = run.pending ? row_size : stride;
        g.dk_head = g.dv_head = p.hs;
        softmax_backward(run.core, g);
        const InfiniSegment& s = p.segments[run.begin];
        for (int i = 0; run.pending && i < s.q_len; i++) memcpy(dqkv + (s.row + i) * stride + C, &dkv[(s.pending() + i) * row_size], row_size * sizeof(real));
    });
    if (a.positions == Positions::ROPE) rope(dqkv, stride, dqkv, stride, ctx.tokens(), a.heads + p.kv_heads, p.hs, infini_positions(p).data(), -1);
}

// ---- the memory ----------------------------------------------------------------------------------------------------------------------------------------
// Tiles of QT tokens by hs, in one thread. A memory is z (hs), then M (hs,hs).

// Φ(x) (rows,hs), for rows of x that are x_stride apart.
inline void infini_features(int rows, int hs, const real* x, int64_t x_stride, real* features) {
    for (int i = 0; i < rows; i++) {
        const real* from = x + i * x_stride;
        real* to = features + (int64_t)i * hs;
#pragma omp simd
        for (int c = 0; c < hs; c++) to[c] = from[c] > 0 ? from[c] + 1 : vexp(std::min(from[c], (real)0));
    }
}

// R (rows,hs) = (ΦM)/den, den (rows) = Φ·z + ε.
inline void infini_read(int rows, int hs, const real* features, const real* memory, real* R, real* den) {
    tile_matmul(rows, hs, hs, features, hs, 1, memory + hs, hs, R, hs, false);
    for (int i = 0; i < rows; i++) {
        den[i] = dot(hs, features + (int64_t)i * hs, memory) + (real)1e-6;
        real inverse = 1 / den[i];
        for (int c = 0; c < hs; c++) R[(int64_t)i * hs + c] *= inverse;
    }
}

inline void subtract_rows(int rows, int hs, const real* x, int64_t x_stride, const real* y, real* out) {  // out = x − y, (rows,hs)
    for (int i = 0; i < rows; i++)
        for (int c = 0; c < hs; c++) out[(int64_t)i * hs + c] = x[i * x_stride + c] - y[(int64_t)i * hs + c];
}

inline void add_column_sums(int rows, int hs, const real* x, real* sum) {
    for (int i = 0; i < rows; i++)
        for (int c = 0; c < hs; c++) sum[c] += x[(int64_t)i * hs + c];
}

inline RealVector infini_gates(const real* beta, int heads) {
    RealVector g(heads);
    for (int h = 0; h < heads; h++) g[h] = 1 / (1 + std::exp(-beta[h]));
    return g;
}

// The memories after all full segments: M' = M + Φ(k)ᵀU, z' = z + Σ_t Φ(k_t). One thread takes a sequence and kv head from end to end.
inline void infini_write(const InfiniPass& p) {
    int hs = p.hs, num_seqs = (int)p.first.size() - 1;
    int64_t size = p.memory_size(), KVhs = p.row_size() / 2;
    if (std::none_of(p.segments.begin(), p.segments.end(), [](const InfiniSegment& s) { return s.write; })) return;
#pragma omp parallel
    {
        RealVector features((size_t)QT * hs), U((size_t)QT * hs), den(QT);
#pragma omp for collapse(2) schedule(dynamic)
        for (int seq = 0; seq < num_seqs; seq++)
            for (int kv = 0; kv < p.kv_heads; kv++)
                for (int i = p.first[seq]; i < p.first[seq + 1] && p.segments[i].write; i++) {
                    const InfiniSegment& s = p.segments[i];
                    const real* before = s.memory ? s.memory + kv * size : nullptr;
                    real *z = s.write + kv * size, *M = z + hs;
                    if (before)
                        memcpy(z, before, size * sizeof(real));
                    else
                        std::fill_n(z, hs, p.z_start()), std::fill_n(M, (int64_t)hs * hs, (real)0);
                    for (int t = 0; t < s.k_len; t += QT) {
                        int rows = std::min(QT, s.k_len - t);
                        int64_t stride = p.key_stride(s);
                        const real *k = p.keys(s) + t * stride + kv * hs, *v = k + KVhs;
                        infini_features(rows, hs, k, stride, features.data());
                        if (p.delta() && before) {
                            infini_read(rows, hs, features.data(), before, U.data(), den.data());  // V̂
                            subtract_rows(rows, hs, v, stride, U.data(), U.data());
                            v = U.data();
                            stride = hs;
                        }
                        tile_matmul(hs, hs, rows, features.data(), 1, hs, v, stride, M, hs, true);
                        add_column_sums(rows, hs, features.data(), z);
                    }
                }
    }
}

// A = g·R + (1−g)·D, (N,C); A may be D.
inline void infini_retrieve(const InfiniPass& p, const real* beta, const real* D, real* A) {
    const AttentionConfig& a = *p.config;
    int hs = p.hs, C = a.channels;
    RealVector gates = infini_gates(beta, a.heads);
    std::vector<Tile> tiles = make_tiles((int)p.segments.size(), p.cu_q.data(), QT);
#pragma omp parallel
    {
        RealVector features((size_t)QT * hs), R((size_t)QT * hs), den(QT);
#pragma omp for collapse(2) schedule(static)
        for (size_t t = 0; t < tiles.size(); t++)
            for (int h = 0; h < a.heads; h++) {
                const InfiniSegment& s = p.segments[tiles[t].seq];
                int rows = std::min(QT, s.q_len - tiles[t].start);
                int64_t row = s.row + tiles[t].start;
                real g = p.gated(s) ? gates[h] : 0;
                if (s.memory) {
                    infini_features(rows, hs, p.qkv + row * qkv_size(a) + h * hs, qkv_size(a), features.data());
                    infini_read(rows, hs, features.data(), s.memory + h / p.group * p.memory_size(), R.data(), den.data());
                }
                for (int i = 0; i < rows; i++)
                    for (int c = 0; c < hs; c++) {
                        int64_t at = (row + i) * C + h * hs + c;
                        A[at] = (1 - g) * D[at] + (s.memory ? g * R[(size_t)i * hs + c] : 0);
                    }
            }
    }
}

// Backward of A = g·R + (1−g)·D and of R = n/den, n = Φ(q)M, den = Φ(q)·z + ε:
//
//     dβ += g(1−g)·Σ dA⊙(R−D)      dD = (1−g)·dA      dR = g·dA      dn = dR/den      dden = −Σ_c dR⊙R / den
//
// dD takes the place of dA (N,C); dn (N,C) and dden (N,NH) are filled where something was read. An empty memory reads R = 0 and has no other gradient.
inline void infini_gate_backward(const InfiniPass& p, const real* beta, real* dbeta, const real* D, real* dA, real* dn, real* dden) {
    const AttentionConfig& a = *p.config;
    int hs = p.hs, C = a.channels;
    RealVector gates = infini_gates(beta, a.heads);
    std::vector<Tile> tiles = make_tiles((int)p.segments.size(), p.cu_q.data(), QT);
    RealVector partial(tiles.size() * a.heads);  // sums are added tile after tile, whatever the number of threads
#pragma omp parallel
    {
        RealVector features((size_t)QT * hs), R((size_t)QT * hs), den(QT);
#pragma omp for collapse(2) schedule(static)
        for (size_t t = 0; t < tiles.size(); t++)
            for (int h = 0; h < a.heads; h++) {
                const InfiniSegment& s = p.segments[tiles[t].seq];
                if (!p.gated(s)) continue;
                int rows = std::min(QT, s.q_len - tiles[t].start);
                int64_t row = s.row + tiles[t].start;
                real g = gates[h], sum = 0;
                if (s.memory) {
                    infini_features(rows, hs, p.qkv + row * qkv_size(a) + h * hs, qkv_size(a), features.data());
                    infini_read(rows, hs, features.data(), s.memory + h / p.group * p.memory_size(), R.data(), den.data());
                }
                for (int i = 0; i < rows; i++) {
                    int64_t at = (row + i) * C + h * hs;
                    real *dAi = dA + at, *r = &R[(size_t)i * hs], gA_R = 0;
                    if (s.memory) {
                        gA_R = dot(hs, dAi, r);
                        for (int c = 0; c < hs; c++) dn[at + c] = g * dAi[c] / den[i];
                        dden[(row + i) * a.heads + h] = -g * gA_R / den[i];
                    }
                    sum += gA_R - dot(hs, dAi, D + at);
                    for (int c = 0; c < hs; c++) dAi[c] *= 1 - g;
                }
                partial[t * a.heads + h] = g * (1 - g) * sum;
            }
    }
    for (size_t t = 0; t < tiles.size(); t++)
        for (int h = 0; h < a.heads; h++) dbeta[h] += partial[t * a.heads + h];
}

// dx (rows,hs), dx_stride apart, += dΦ⊙Φ'(x), Φ'(x) = min(1, Φ(x)).
inline void infini_features_backward(int rows, int hs, const real* features, const real* dfeatures, real* dx, int64_t dx_stride) {
    for (int i = 0; i < rows; i++)
        for (int c = 0; c < hs; c++) {
            int64_t at = (int64_t)i * hs + c;
            dx[i * dx_stride + c] += dfeatures[at] * std::min((real)1, features[at]);
        }
}

// dΦ (rows,hs) += dden·zᵀ
inline void add_outer(int rows, int hs, const real* dden, int64_t dden_stride, const real* z, real* dfeatures) {
    for (int i = 0; i < rows; i++)
        for (int c = 0; c < hs; c++) dfeatures[(int64_t)i * hs + c] += dden[i * dden_stride] * z[c];
}

// dΦ(q) = dn·Mᵀ + dden·zᵀ,  dq += dΦ(q)⊙Φ'(q)
inline void infini_query_backward(const InfiniPass& p, const real* dn, const real* dden, real* dqkv) {
    const AttentionConfig& a = *p.config;
    int hs = p.hs, C = a.channels;
    int64_t stride = qkv_size(a);
#pragma omp parallel
    {
        RealVector features((size_t)QT * hs), dfeatures((size_t)QT * hs), transposed((size_t)hs * hs);
#pragma omp for collapse(2) schedule(static)
        for (size_t i = 0; i < p.segments.size(); i++)
            for (int h = 0; h < a.heads; h++) {
                const InfiniSegment& s = p.segments[i];
                if (!s.memory) continue;
                const real *z = s.memory + h / p.group * p.memory_size(), *M = z + hs;
                tile_transpose(hs, hs, M, hs, transposed.data(), hs);
                for (int t = 0; t < s.q_len; t += QT) {
                    int rows = std::min(QT, s.q_len - t);
                    int64_t row = s.row + t;
                    infini_features(rows, hs, p.qkv + row * stride + h * hs, stride, features.data());
                    tile_matmul(rows, hs, hs, dn + row * C + h * hs, C, 1, transposed.data(), hs, dfeatures.data(), hs, false);
                    add_outer(rows, hs, dden + row * a.heads + h, a.heads, z, dfeatures.data());
                    infini_features_backward(rows, hs, features.data(), dfeatures.data(), dqkv + row * stride + h * hs, stride);
                }
            }
    }
}

// One kv head on its way backward through a sequence: the gradient of the memory, and tiles.
struct InfiniMemoryGradient {
    RealVector d, after, transposed, before_transposed, features, dfeatures, dU, U, V, dn, den, dden;
    explicit InfiniMemoryGradient(int64_t hs)
        : d(hs * (hs + 1)),
          after(hs * (hs + 1)),
          transposed(hs * hs),
          before_transposed(hs * hs),
          features(QT * hs),
          dfeatures(QT * hs),
          dU(QT * hs),
          U(QT * hs),
          V(QT * hs),
          dn(QT * hs),
          den(QT),
          dden(QT) {}
};

// From dM', dz' after full segment s: dk += , dv += ; and with delta dM += , dz += , which hold dM', dz' (the identity path) already.
//
//     dU = Φ(k)dM'      dv += dU      dΦ(k) = U·dM'ᵀ + 1·dz'ᵀ
//     delta: n = Φ(k)M, den = Φ(k)·z + ε, V̂ = n/den, U = v − V̂:  dn = −dU/den      dden = Σ_c dU⊙V̂ / den
//            dΦ(k) += dn·Mᵀ + dden·zᵀ      dM += Φ(k)ᵀdn      dz += Φ(k)ᵀdden
inline void infini_write_backward(const InfiniPass& p, const InfiniSegment& s, int kv, InfiniMemoryGradient& w, real* dqkv) {
    int hs = p.hs, KVhs = p.kv_heads * hs, C = p.config->channels;
    int64_t stride = qkv_size(*p.config);
    const real* before = p.delta() && s.memory ? s.memory + kv * p.memory_size() : nullptr;
    real *dz = w.d.data(), *dM = dz + hs, *features = w.features.data(), *dfeatures = w.dfeatures.data(), *dU = w.dU.data();
    w.after = w.d;
    tile_transpose(hs, hs, dM, hs, w.transposed.data(), hs);
    if (before) tile_transpose(hs, hs, before + hs, hs, w.before_transposed.data(), hs);
    for (int t = 0; t < s.q_len; t += QT) {
        int rows = std::min(QT, s.q_len - t);
        int64_t row = s.row + t, U_stride = stride;
        const real *k = p.qkv + row * stride + C + kv * hs, *U = k + KVhs;
        real *dk = dqkv + row * stride + C + kv * hs, *dv = dk + KVhs;
        infini_features(rows, hs, k, stride, features);
        tile_matmul(rows, hs, hs, features, hs, 1, w.after.data() + hs, hs, dU, hs, false);
        if (before) {
            infini_read(rows, hs, features, before, w.V.data(), w.den.data());
            subtract_rows(rows, hs, U, stride, w.V.data(), w.U.data());
            U = w.U.data();
            U_stride = hs;
        }
        for (int i = 0; i < rows; i++)
            for (int c = 0; c < hs; c++) dv[i * stride + c] += dU[i * hs + c];
        for (int i = 0; i < rows; i++) memcpy(dfeatures + i * hs, w.after.data(), hs * sizeof(real));  // 1·dz'ᵀ
        tile_matmul(rows, hs, hs, U, U_stride, 1, w.transposed.data(), hs, dfeatures, hs, true);
        if (before) {
            for (int i = 0; i < rows; i++) {
                for (int c = 0; c < hs; c++) w.dn[i * hs + c] = -dU[i * hs + c] / w.den[i];
                w.dden[i] = dot(hs, dU + i * hs, &w.V[i * hs]) / w.den[i];
            }
            tile_matmul(rows, hs, hs, w.dn.data(), hs, 1, w.before_transposed.data(), hs, dfeatures, hs, true);
            add_outer(rows, hs, w.dden.data(), 1, before, dfeatures);
            tile_matmul(hs, hs, rows, features, 1, hs, w.dn.data(), hs, dM, hs, true);
            tile_matmul(1, hs, rows, w.dden.data(), 0, 1, features, hs, dz, hs, true);
        }
        infini_features_backward(rows, hs, features, dfeatures, dk, stride);
    }
}

// The memory from the last segment to the first, dM = dz = 0 behind the last: what a segment has written, then what it has read, dM += Φ(q)ᵀdn,
// dz += Φ(q)ᵀdden. What the first reads is constant. One thread takes a sequence and kv head from end to end, so that every sum has one order.
inline void infini_memory_backward(const InfiniPass& p, const real* dn, const real* dden, real* dqkv) {
    const AttentionConfig& a = *p.config;
    int hs = p.hs, C = a.channels, num_seqs = (int)p.first.size() - 1;
#pragma omp parallel
    {
        InfiniMemoryGradient w(hs);
#pragma omp for collapse(2) schedule(dynamic)
        for (int seq = 0; seq < num_seqs; seq++)
            for (int kv = 0; kv < p.kv_heads; kv++) {
                std::fill(w.d.begin(), w.d.end(), (real)0);
                real *dz = w.d.data(), *dM = dz + hs;
                for (int i = p.first[seq + 1] - 1; i >= p.first[seq]; i--) {
                    const InfiniSegment& s = p.segments[i];
                    if (i < p.first[seq + 1] - 1) infini_write_backward(p, s, kv, w, dqkv);
                    if (i == p.first[seq]) break;
                    for (int h = kv * p.group; h < (kv + 1) * p.group; h++)
                        for (int t = 0; t < s.q_len; t += QT) {
                            int rows = std::min(QT, s.q_len - t);
                            int64_t row = s.row + t;
                            infini_features(rows, hs, p.qkv + row * qkv_size(a) + h * hs, qkv_size(a), w.features.data());
                            tile_matmul(hs, hs, rows, w.features.data(), 1, hs, dn + row * C + h * hs, C, dM, hs, true);
                            tile_matmul(1, hs, rows, dden + row * a.heads + h, 0, a.heads, w.features.data(), hs, dz, hs, true);
                        }
                }
            }
    }
}

// ---- the layer -------------------------------------------------------------------------------------------------------------------------------------------

// Leaves the state of sequence s behind this pass in `to`, which may be the block that it started from.
inline void infini_leave(const AttentionContext& ctx, const InfiniPass& p, int s, real* to) {
    int64_t memory_size = p.kv_heads * p.memory_size(), row_size = p.row_size();
    int n = ctx.cu_seqlens[s + 1] - ctx.cu_seqlens[s], old = p.block[s] ? (int)p.block[s][INFINI_PENDING] : 0, pending = (old + n) % (*p.config)["segment"];
    const real* memory = p.block[s] && p.block[s][INFINI_WRITTEN] > 0 ? p.block[s] + INFINI_MEMORY : nullptr;
    for (int i = p.first[s]; i < p.first[s + 1]; i++)
        if (p.segments[i].write) memory = p.segments[i].write;
    if (!memory && to != p.block[s])
        std::fill_n(to + INFINI_MEMORY, memory_size, (real)0);
    else if (memory && memory != to + INFINI_MEMORY)
        memcpy(to + INFINI_MEMORY, memory, memory_size * sizeof(real));
    real* rows = to + INFINI_MEMORY + memory_size;
    int kept = std::max(0, pending - n);  // nothing was completed: these were pending before
    if (kept > 0 && to != p.block[s]) memcpy(rows, p.rows(s), kept * row_size * sizeof(real));
    for (int i = kept; i < pending; i++)
        memcpy(rows + i * row_size, p.qkv + (ctx.cu_seqlens[s + 1] - pending + i) * qkv_size(*p.config) + p.config->channels, row_size * sizeof(real));
    to[INFINI_PENDING] = (real)pending;
    to[INFINI_WRITTEN] = memory ? 1 : 0;
}

// The states that sequences start from in forward(): those of lanes are copied to saved["carry"] when forward() begins, and found there by backward(),
// null for the others.
inline std::vector<real*> infini_carried(const AttentionContext& ctx, const Tensors& saved, bool copy) {
    std::vector<real*> block(ctx.num_seqs);
    real* carry = saved["carry"];
    int64_t size = infini_state(*ctx.config).per_sequence, lane = 0;
    for (int s = 0; s < ctx.num_seqs && ctx.memory_from; s++) {
        if (!ctx.memory_from[s]) continue;
        assert(lane < saved.specs[saved.find("carry")].shape[0]);
        block[s] = carry + lane++ * size;
        if (copy) memcpy(block[s], ctx.memory_from[s], size * sizeof(real));
    }
    return block;
}

inline void infini_forward(const AttentionContext& ctx, const Tensors& parameters, const Tensors& saved, const real* x, const real* residual, real* out) {
    const AttentionConfig& a = *ctx.config;
    int64_t N = ctx.tokens(), C = a.channels;
    AttentionContext rest = ctx;
    real *qkv = saved["qkv"], *A = rest.scratch.take(N * C);
    linear_forward(qkv, x, parameters["wqkv"], parameters["bqkv"], N, C, qkv_size(a));
    InfiniPass p = infini_pass(ctx, qkv, infini_carried(ctx, saved, true), saved["memory"]);
    infini_local_forward(rest, p, saved["d"], saved["lse"]);
    infini_write(p);
    infini_retrieve(p, parameters["beta"], saved["d"], A);
    for (int s = 0; s < ctx.num_seqs && ctx.memory_to; s++)
        if (ctx.memory_to[s]) infini_leave(ctx, p, s, ctx.memory_to[s]);
    output_forward(rest, A, C, parameters["wo"], parameters["bo"], residual, out);
}

// Gradients stop at the border between two passes: the memory and the pending tokens that a sequence came with are constants.
inline void infini_backward(const AttentionContext& ctx, const Tensors& parameters, const Tensors& gradients, const Tensors& saved, const real* x,
                            const real* dout, real* dx) {
    const AttentionConfig& a = *ctx.config;
    int64_t N = ctx.tokens(), C = a.channels;
    AttentionContext rest = ctx;
    real *A = rest.scratch.take(N * C), *dA = rest.scratch.take(N * C), *dden = rest.scratch.take(N * a.heads), *dqkv = rest.scratch.take(N * qkv_size(a));
    InfiniPass p = infini_pass(ctx, saved["qkv"], infini_carried(ctx, saved, false), saved["memory"]);
    infini_retrieve(p, parameters["beta"], saved["d"], A);
    output_backward(rest, A, C, parameters["wo"], dout, dA, gradients["wo"], gradients["bo"]);
    real *dD = dA, *dn = A;  // which are needed no more
    infini_gate_backward(p, parameters["beta"], gradients["beta"], saved["d"], dA, dn, dden);
    infini_local_backward(rest, p, saved["d"], saved["lse"], dD, dqkv);
    infini_query_backward(p, dn, dden, dqkv);
    infini_memory_backward(p, dn, dden, dqkv);
    linear_backward(dx, false, gradients["wqkv"], gradients["bqkv"], dqkv, x, parameters["wqkv"], N, C, qkv_size(a));
}

inline void infini_extend(const AttentionContext& ctx, const Tensors& parameters, const real* x, const real* residual, real* out) {
    const AttentionConfig& a = *ctx.config;
    int64_t N = ctx.tokens(), C = a.channels;
    AttentionContext rest = ctx;
    real *qkv = rest.scratch.take(N * qkv_size(a)), *A = rest.scratch.take(N * C);
    real* memories = rest.scratch.take((N / a["segment"] + ctx.num_seqs) * infini_memory_size(a));
    linear_forward(qkv, x, parameters["wqkv"], parameters["bqkv"], N, C, qkv_size(a));
    std::vector<real*> block;
    for (int s = 0; s < ctx.num_seqs; s++) block.push_back(ctx.states[s].fixed);
    InfiniPass p = infini_pass(ctx, qkv, block, memories);
    infini_local_forward(rest, p, A, nullptr);
    infini_write(p);
    infini_retrieve(p, parameters["beta"], A, A);
    for (int s = 0; s < ctx.num_seqs; s++) infini_leave(ctx, p, s, ctx.states[s].fixed);
    output_forward(rest, A, C, parameters["wo"], parameters["bo"], residual, out);
}

inline Attention infini_attention() { return {"infini", infini_saved, infini_scratch, infini_forward, infini_backward, infini_extend}; }

}  // namespace cpu

// --------------------------------------------------------------------------------------------------------------------------------------------------
// 5. Lightning attention (Qin et al., Lightning Attention-2, arXiv 2401.04658; the layer is that of MiniMax-01, arXiv 2501.08313)
//
//     q, k, v = SiLU(x·Wqkvᵀ)      S_t = e^{−s}·S_{t−1} + k_tᵀv_t      o_t = c·q_t·S_t      out = residual + (RMSNorm(o; gain)⊙sigmoid(x·Wgᵀ))·Woᵀ
//
// Linear attention with a decay s >= 0 a head: no softmax, no denominator, and instead of a growing cache one matrix S (hs,hs) a head. RMSNorm goes over
// all heads together; no biases, no rotary positions. In chunks of n tokens, with S the state before the chunk and M_ij = e^{−s(i−j)} for i >= j, else 0:
//
//     P = (QKᵀ)⊙M      O = c·(PV + diag(e^{−s(i+1)})·Q·S)      S' = e^{−sn}·S + (diag(e^{−s(n−1−i)})·K)ᵀV
//
// The exponents are differences of places, never negative, so that no factor exceeds 1 however fast a head decays. Two schemes share these steps and give
// the same bits: `sequential`, one thread takes a sequence and head from chunk to chunk; `parallel`, first what every chunk adds to the state, then
// a scan over the chunks, then all outputs. `auto` takes the first, which computes k and v once, where it keeps all threads busy.
// --decay: minimax  s = 2^{−8(h+1)/NH}·(1 − l/(L−1+1e-5) + 1e-5), c = 1;   fla  s = (8h/NH)·(1 − l/L), c = 1/√hs;   none  s = 0, c = 1.
//
// Wqkv (3C,C): rows of q, then k, then v, each head by head; gain (C); Wg, Wo (C,C).
// Saves x·Wqkvᵀ and x·Wgᵀ before their nonlinearities, o before the norm, its 1/rms, and S at the chunks' borders (recomputing those would need as much
// scratch): N·(5C + 1 + C·hs/LIGHTNING_CHUNK) numbers, and S for each carried memory. State: S, C·hs numbers whatever the length.
// FLOPs: a token, forward, 10·C² in the projections and 4·C·(chunk/2 + hs): linear in T.

constexpr int LIGHTNING_CHUNK = 64;

enum LightningDecay { DECAY_MINIMAX, DECAY_FLA, DECAY_NONE };
enum LightningScheme { SCHEME_AUTO, SCHEME_SEQUENTIAL, SCHEME_PARALLEL };

inline double lightning_slope(const AttentionConfig& a, int h) {
    double l = a.layer, L = a.layers, NH = a.heads;
    if (a["decay"] == DECAY_MINIMAX) return std::exp2(-8 * (h + 1) / NH) * (1 - l / (L - 1 + 1e-5) + 1e-5);
    if (a["decay"] == DECAY_FLA) return 8 * h / NH * (1 - l / L);
    return 0;
}

inline double lightning_scale(const AttentionConfig& a) { return a["decay"] == DECAY_FLA ? 1 / std::sqrt((double)a.head_size()) : 1; }

inline std::vector<TensorSpec> lightning_parameters(const AttentionConfig& a) {
    int64_t C = a.channels;
    return {matrix_spec("wqkv", 3 * C, C, 0.02), vector_spec("gain", C, 1), matrix_spec("wg", C, C, 0.02), matrix_spec("wo", C, C, a.residual_std())};
}

inline void lightning_resolve(AttentionConfig&) {}  // every configuration is possible

inline AttentionStateSize lightning_state(const AttentionConfig& a) { return {0, (int64_t)a.channels * a.head_size()}; }

inline double lightning_flops(const AttentionConfig& a, double T) {
    double C = a.channels, chunk = std::min(T, (double)LIGHTNING_CHUNK);
    return 10 * C * C + 4 * C * (visible_mean(chunk, 0) + a.head_size());
}

inline AttentionDescription lightning_description() {
    return {"lightning",
            "linear attention with decay, a state of constant size (MiniMax-01)",
            {{"decay", "how fast each head forgets: minimax, fla (head 0 never), none", DECAY_MINIMAX, 0, 2, {"minimax", "fla", "none"}},
             {"scheme",
              "which work is done in parallel, with the same result: auto, sequential (heads), parallel (chunks)",
              SCHEME_AUTO,
              0,
              2,
              {"auto", "sequential", "parallel"}}},
            lightning_resolve,
            lightning_parameters,
            lightning_state,
            lightning_flops,
            /*learned_positions*/ false,
            /*recurrent*/ true};
}

namespace cpu {

// ---- The recurrence: q, k, v from u = x·Wqkvᵀ (N,3C) and back, o (N,C) -----------------------------------------------------------------------------------

// y = u·σ(u), σ(u) = 1/(1 + e^{−u}):  y (n,d) contiguous, u (n,d) with rows u_stride apart.
inline void silu_forward(real* y, const real* u, int64_t u_stride, int n, int d) {
    for (int i = 0; i < n; i++)
#pragma omp simd
        for (int c = 0; c < d; c++) y[i * d + c] = u[i * u_stride + c] / (1 + vexp(-u[i * u_stride + c]));
}

// du = dy⊙σ⊙(1 + u⊙(1−σ)), in place: `du` holds dy (n,d). Rows of both are `stride` apart.
inline void silu_backward(real* du, const real* u, int64_t stride, int n, int d) {
    for (int i = 0; i < n; i++)
#pragma omp simd
        for (int c = 0; c < d; c++) {
            real x = u[i * stride + c], sigma = 1 / (1 + vexp(-x));
            du[i * stride + c] *= sigma * (1 + x * (1 - sigma));
        }
}

// A chunk and the states at its two borders, all heads of them (NH,hs,hs). Null: zero where it is read, nowhere where it is written.
struct LightningChunk {
    int64_t row;                    // its first token among the N
    int n;                          // tokens in it
    real* S = nullptr;              // before it
    real* S_next = nullptr;         // behind it
    const real* dS_next = nullptr;  // their gradients
    real* dS = nullptr;
};

struct Lightning {
    int num_seqs, heads, hs;
    int64_t C;
    real scale;                          // c
    RealVector decays;                   // (NH, LIGHTNING_CHUNK+1): e^{−s·d}
    std::vector<LightningChunk> chunks;  // of all sequences
    std::vector<int> first;              // (num_seqs+1): a sequence's chunks among them
    bool sequential;

    const real* decay(int h) const { return &decays[(size_t)h * (LIGHTNING_CHUNK + 1)]; }
    int64_t state_size() const { return C * hs; }
    int64_t head_state(int h) const { return (int64_t)h * hs * hs; }
};

// One head's part of a state, which may be null.
template <class T>
T* at_head(const Lightning& g, T* state, int h) {
    return state ? state + g.head_state(h) : nullptr;
}

inline Lightning make_lightning(const AttentionContext& ctx) {
    const AttentionConfig& a = *ctx.config;
    Lightning g{};
    g.num_seqs = ctx.num_seqs;
    g.heads = a.heads;
    g.hs = a.head_size();
    g.C = a.channels;
    g.scale = (real)lightning_scale(a);
    int64_t longest = 0;
    for (int s = 0; s < ctx.num_seqs; s++) {
        int begin = ctx.cu_seqlens[s], end = ctx.cu_seqlens[s + 1];
        longest = std::max<int64_t>(longest, end - begin);
        g.first.push_back((int)g.chunks.size());
        for (int row = begin; row < end; row += LIGHTNING_CHUNK) {
            LightningChunk chunk{};
            chunk.row = row;
            chunk.n = std::min(LIGHTNING_CHUNK, end - row);
            g.chunks.push_back(chunk);
        }
    }
    g.first.push_back((int)g.chunks.size());
    g.decays.resize((size_t)a.heads * (LIGHTNING_CHUNK + 1));
    for (int h = 0; h < a.heads; h++) {
        double slope = lightning_slope(a, h);
        for (int d = 0; d <= std::min<int64_t>(LIGHTNING_CHUNK, longest); d++) g.decays[h * (LIGHTNING_CHUNK + 1) + d] = (real)std::exp(-slope * d);
    }
    // The parallel scheme computes an eighth to a quarter more; the sequential one ends when the last thread does.
    int64_t threads = num_threads(), items = (int64_t)ctx.num_seqs * a.heads, rounds = (items + threads - 1) / threads;
    g.sequential = a["scheme"] == SCHEME_AUTO ? 4 * rounds * longest * threads <= 5 * ctx.tokens() * a.heads : a["scheme"] == SCHEME_SEQUENTIAL;
    return g;
}

// One thread's working memory.
struct LightningTiles {
    RealVector q, k, v, d_o, P, dP, transposed, scaled, own;
    explicit LightningTiles(int hs) {
        size_t rows = (size_t)LIGHTNING_CHUNK * hs, square = (size_t)LIGHTNING_CHUNK * LIGHTNING_CHUNK, state = (size_t)hs * hs;
        for (RealVector* tile : {&q, &k, &v, &d_o, &scaled}) tile->resize(rows);
        for (RealVector* tile : {&P, &dP}) tile->resize(square);
        own.resize(state);
        transposed.resize(std::max(rows, state));
    }
};

enum LightningPart { PART_Q, PART_K, PART_V };

// q, k or v of a chunk and head, (n,hs).
inline void lightning_load(const Lightning& g, const LightningChunk& chunk, int h, const real* u, LightningPart part, RealVector& tile) {
    silu_forward(tile.data(), u + chunk.row * 3 * g.C + part * g.C + h * g.hs, 3 * g.C, chunk.n, g.hs);
}

// to (n,d) = diag(f)·from, f_i = scale·decay[first + step·i].
inline void scale_rows(real* to, const real* from, int n, int d, real scale, const real* decay, int first, int step) {
    for (int i = 0; i < n; i++) {
        real f = scale * decay[first + step * i];
        for (int c = 0; c < d; c++) to[i * d + c] = f * from[i * d + c];
    }
}

// P (n,n) = c·(A·Bᵀ)⊙M; A, B (n,hs).
inline void lightning_scores(const Lightning& g, int n, int h, const RealVector& A, const RealVector& B, LightningTiles& t, RealVector& P) {
    const real* decay = g.decay(h);
    tile_transpose(n, g.hs, B.data(), g.hs, t.transposed.data(), n);
    tile_matmul(n, n, g.hs, A.data(), g.hs, 1, t.transposed.data(), n, P.data(), n, false);
    for (int i = 0; i < n; i++) {
        for (int j = 0; j <= i; j++) P[i * n + j] *= g.scale * decay[i - j];
        for (int j = i + 1; j < n; j++) P[i * n + j] = 0;
    }
}

// O = c·(PV + diag(e^{−s(i+1)})·Q·S)
inline void lightning_chunk_forward(const Lightning& g, const LightningChunk& chunk, int h, LightningTiles& t, real* o) {
    int n = chunk.n, hs = g.hs;
    real* o_rows = o + chunk.row * g.C + h * hs;
    lightning_scores(g, n, h, t.q, t.k, t, t.P);
    tile_matmul(n, hs, n, t.P.data(), n, 1, t.v.data(), hs, o_rows, g.C, false);
    if (!chunk.S) return;
    scale_rows(t.scaled.data(), t.q.data(), n, hs, g.scale, g.decay(h), 1, 1);
    tile_matmul(n, hs, hs, t.scaled.data(), hs, 1, chunk.S + g.head_state(h), hs, o_rows, g.C, true);
}

// What the chunk adds to the state: own (hs,hs) = (diag(e^{−s(n−1−i)})·K)ᵀV
inline void lightning_own_forward(const Lightning& g, const LightningChunk& chunk, int h, LightningTiles& t, real* own) {
    scale_rows(t.scaled.data(), t.k.data(), chunk.n, g.hs, 1, g.decay(h), chunk.n - 1, -1);
    tile_matmul(g.hs, g.hs, chunk.n, t.scaled.data(), 1, g.hs, t.v.data(), g.hs, own, g.hs, false);
}

// dP = c·(dO·Vᵀ)⊙M                          dQ = dP·K + c·diag(e^{−s(i+1)})·dO·Sᵀ
// dK = dPᵀ·Q + diag(e^{−s(n−1−i)})·V·dS'ᵀ      dV = Pᵀ·dO + diag(e^{−s(n−1−i)})·K·dS'        (P holds c here), and through SiLU into du (N,3C).
inline void lightning_chunk_backward(const Lightning& g, const LightningChunk& chunk, int h, LightningTiles& t, const real* u, real* du) {
    int n = chunk.n, hs = g.hs;
    int64_t stride = 3 * g.C, at = chunk.row * stride + h * hs;
    real *dq = du + at, *dk = dq + g.C, *dv = dk + g.C;
    lightning_scores(g, n, h, t.q, t.k, t, t.P);
    lightning_scores(g, n, h, t.d_o, t.v, t, t.dP);
    tile_matmul(n, hs, n, t.dP.data(), n, 1, t.k.data(), hs, dq, stride, false);
    tile_matmul(n, hs, n, t.dP.data(), 1, n, t.q.data(), hs, dk, stride, false);
    tile_matmul(n, hs, n, t.P.data(), 1, n, t.d_o.data(), hs, dv, stride, false);
    if (chunk.S) {
        tile_transpose(hs, hs, chunk.S + g.head_state(h), hs, t.transposed.data(), hs);
        scale_rows(t.scaled.data(), t.d_o.data(), n, hs, g.scale, g.decay(h), 1, 1);
        tile_matmul(n, hs, hs, t.scaled.data(), hs, 1, t.transposed.data(), hs, dq, stride, true);
    }
    if (chunk.dS_next) {
        const real* dS = chunk.dS_next + g.head_state(h);
        tile_transpose(hs, hs, dS, hs, t.transposed.data(), hs);
        scale_rows(t.scaled.data(), t.v.data(), n, hs, 1, g.decay(h), n - 1, -1);
        tile_matmul(n, hs, hs, t.scaled.data(), hs, 1, t.transposed.data(), hs, dk, stride, true);
        scale_rows(t.scaled.data(), t.k.data(), n, hs, 1, g.decay(h), n - 1, -1);
        tile_matmul(n, hs, hs, t.scaled.data(), hs, 1, dS, hs, dv, stride, true);
    }
    silu_backward(dq, u + at, stride, n, hs);
    silu_backward(dk, u + at + g.C, stride, n, hs);
    silu_backward(dv, u + at + 2 * g.C, stride, n, hs);
}

// What the chunk adds to the gradient of the state before it: own (hs,hs) = c·(diag(e^{−s(i+1)})·Q)ᵀdO
inline void lightning_own_backward(const Lightning& g, const LightningChunk& chunk, int h, LightningTiles& t, real* own) {
    scale_rows(t.scaled.data(), t.q.data(), chunk.n, g.hs, g.scale, g.decay(h), 1, 1);
    tile_matmul(g.hs, g.hs, chunk.n, t.scaled.data(), 1, g.hs, t.d_o.data(), g.hs, own, g.hs, false);
}

// to = e^{−sn}·from + own, all (hs,hs): S from one border to the next, and dS the other way. `to` may be `from` or `own`; `from` null is zero.
inline void lightning_advance(const Lightning& g, const LightningChunk& chunk, int h, real* to, const real* from, const real* own) {
    real f = g.decay(h)[chunk.n];
    for (int64_t c = 0; c < (int64_t)g.hs * g.hs; c++) to[c] = from ? f * from[c] + own[c] : own[c];
}

inline void lightning_load_backward(const Lightning& g, const LightningChunk& chunk, int h, const real* d_o, LightningTiles& t) {
    for (int i = 0; i < chunk.n; i++) memcpy(&t.d_o[(size_t)i * g.hs], d_o + (chunk.row + i) * g.C + h * g.hs, g.hs * sizeof(real));
}

// One sequence and head from its first chunk to its last.
inline void lightning_sequence_forward(const Lightning& g, int s, int h, LightningTiles& t, const real* u, real* o) {
    for (int i = g.first[s]; i < g.first[s + 1]; i++) {
        const LightningChunk& chunk = g.chunks[i];
        lightning_load(g, chunk, h, u, PART_Q, t.q);
        lightning_load(g, chunk, h, u, PART_K, t.k);
        lightning_load(g, chunk, h, u, PART_V, t.v);
        lightning_chunk_forward(g, chunk, h, t, o);
        if (!chunk.S_next) continue;
        lightning_own_forward(g, chunk, h, t, t.own.data());
        lightning_advance(g, chunk, h, at_head(g, chunk.S_next, h), at_head(g, chunk.S, h), t.own.data());
    }
}

// o (N,C) and the states that the chunks point at, from u (N,3C).
inline void lightning_recurrence_forward(const Lightning& g, const real* u, real* o) {
    int num_chunks = (int)g.chunks.size();
#pragma omp parallel
    {
        LightningTiles t(g.hs);
        if (g.sequential) {
#pragma omp for collapse(2) schedule(dynamic)
            for (int s = 0; s < g.num_seqs; s++)
                for (int h = 0; h < g.heads; h++) lightning_sequence_forward(g, s, h, t, u, o);
        } else {
#pragma omp for collapse(2) schedule(dynamic)  // what each chunk adds
            for (int i = 0; i < num_chunks; i++)
                for (int h = 0; h < g.heads; h++) {
                    if (!g.chunks[i].S_next) continue;
                    lightning_load(g, g.chunks[i], h, u, PART_K, t.k);
                    lightning_load(g, g.chunks[i], h, u, PART_V, t.v);
                    lightning_own_forward(g, g.chunks[i], h, t, at_head(g, g.chunks[i].S_next, h));
                }
#pragma omp for collapse(2) schedule(static)  // the scan
            for (int s = 0; s < g.num_seqs; s++)
                for (int h = 0; h < g.heads; h++)
                    for (int i = g.first[s]; i < g.first[s + 1]; i++) {
                        real* S_next = at_head(g, g.chunks[i].S_next, h);
                        if (S_next) lightning_advance(g, g.chunks[i], h, S_next, at_head(g, g.chunks[i].S, h), S_next);
                    }
#pragma omp for collapse(2) schedule(dynamic)  // the outputs
            for (int i = 0; i < num_chunks; i++)
                for (int h = 0; h < g.heads; h++) {
                    lightning_load(g, g.chunks[i], h, u, PART_Q, t.q);
                    lightning_load(g, g.chunks[i], h, u, PART_K, t.k);
                    lightning_load(g, g.chunks[i], h, u, PART_V, t.v);
                    lightning_chunk_forward(g, g.chunks[i], h, t, o);
                }
        }
    }
}

// One sequence and head from its last chunk to its first.
inline void lightning_sequence_backward(const Lightning& g, int s, int h, LightningTiles& t, const real* u, const real* d_o, real* du) {
    for (int i = g.first[s + 1] - 1; i >= g.first[s]; i--) {
        const LightningChunk& chunk = g.chunks[i];
        lightning_load(g, chunk, h, u, PART_Q, t.q);
        lightning_load(g, chunk, h, u, PART_K, t.k);
        lightning_load(g, chunk, h, u, PART_V, t.v);
        lightning_load_backward(g, chunk, h, d_o, t);
        lightning_chunk_backward(g, chunk, h, t, u, du);
        if (!chunk.dS) continue;
        lightning_own_backward(g, chunk, h, t, t.own.data());
        lightning_advance(g, chunk, h, at_head(g, chunk.dS, h), at_head(g, chunk.dS_next, h), t.own.data());
    }
}

// du (N,3C) and the states' gradients that the chunks point at, from d_o (N,C).
inline void lightning_recurrence_backward(const Lightning& g, const real* u, const real* d_o, real* du) {
    int num_chunks = (int)g.chunks.size();
#pragma omp parallel
    {
        LightningTiles t(g.hs);
        if (g.sequential) {
#pragma omp for collapse(2) schedule(dynamic)
            for (int s = 0; s < g.num_seqs; s++)
                for (int h = 0; h < g.heads; h++) lightning_sequence_backward(g, s, h, t, u, d_o, du);
        } else {
#pragma omp for collapse(2) schedule(dynamic)  // what each chunk adds
            for (int i = 0; i < num_chunks; i++)
                for (int h = 0; h < g.heads; h++) {
                    if (!g.chunks[i].dS) continue;
                    lightning_load(g, g.chunks[i], h, u, PART_Q, t.q);
                    lightning_load_backward(g, g.chunks[i], h, d_o, t);
                    lightning_own_backward(g, g.chunks[i], h, t, at_head(g, g.chunks[i].dS, h));
                }
#pragma omp for collapse(2) schedule(static)  // the scan
            for (int s = 0; s < g.num_seqs; s++)
                for (int h = 0; h < g.heads; h++)
                    for (int i = g.first[s + 1] - 1; i >= g.first[s]; i--) {
                        real* dS = at_head(g, g.chunks[i].dS, h);
                        if (dS) lightning_advance(g, g.chunks[i], h, dS, at_head(g, g.chunks[i].dS_next, h), dS);
                    }
#pragma omp for collapse(2) schedule(dynamic)  // the gradients
            for (int i = 0; i < num_chunks; i++)
                for (int h = 0; h < g.heads; h++) {
                    lightning_load(g, g.chunks[i], h, u, PART_Q, t.q);
                    lightning_load(g, g.chunks[i], h, u, PART_K, t.k);
                    lightning_load(g, g.chunks[i], h, u, PART_V, t.v);
                    lightning_load_backward(g, g.chunks[i], h, d_o, t);
                    lightning_chunk_backward(g, g.chunks[i], h, t, u, du);
                }
        }
    }
}

// ---- Borders: where the states between chunks stand ----------------------------------------------------------------------------------------------------
// A sequence of m chunks has m−1 inner borders; over all sequences they number at most N/LIGHTNING_CHUNK. Behind them stand the carried memories that
// sequences start from: forward copies them, since another sequence may leave its memory in the same place.

inline int64_t lightning_borders(int64_t N) { return N / LIGHTNING_CHUNK; }

template <class T>
T* memory_of(T* const* memories, int s) {
    return memories ? memories[s] : nullptr;
}

// Points the chunks at S before and behind them, in saved["states"].
inline void lightning_point_forward(const AttentionContext& ctx, Lightning& g, const Tensors& saved) {
    real* states = saved["states"];
    int64_t size = g.state_size(), inner = 0, carried = 0;
    for (int s = 0; s < g.num_seqs; s++) inner += std::max(0, g.first[s + 1] - g.first[s] - 1);
    real *border = states, *start = states + inner * size;
    for (int s = 0; s < g.num_seqs; s++) {
        if (g.first[s] == g.first[s + 1]) continue;
        if (memory_of(ctx.memory_from, s)) g.chunks[g.first[s]].S = start + carried++ * size;
        for (int i = g.first[s]; i + 1 < g.first[s + 1]; i++, border += size) g.chunks[i].S_next = border, g.chunks[i + 1].S = border;
        g.chunks[g.first[s + 1] - 1].S_next = memory_of(ctx.memory_to, s);
    }
    assert(inner + carried <= saved.specs[saved.find("states")].shape[0]);
}

// The same for their gradients; `dstates` (borders, state_size).
inline void lightning_point_backward(const AttentionContext& ctx, Lightning& g, real* dstates) {
    real* border = dstates;
    for (int s = 0; s < g.num_seqs; s++) {
        if (g.first[s] == g.first[s + 1]) continue;
        g.chunks[g.first[s]].dS = memory_of(ctx.dmemory_from, s);
        for (int i = g.first[s]; i + 1 < g.first[s + 1]; i++, border += g.state_size()) g.chunks[i].dS_next = border, g.chunks[i + 1].dS = border;
        g.chunks[g.first[s + 1] - 1].dS_next = memory_of(ctx.dmemory_to, s);
    }
}

// Across an empty sequence memory and gradient pass unchanged.
inline void pass_memory(real* to, const real* from, int64_t size) {
    for (int64_t c = 0; c < size && to; c++) to[c] = from ? from[c] : 0;
}

// ---- The layer ------------------------------------------------------------------------------------------------------------------------------------------

// z = y⊙σ(gate), y = RMSNorm(o; gain); all (N,C). rstd (N) or null. z may be o.
inline void lightning_gate_forward(real* z, real* rstd, const real* o, const real* gate, const real* gain, int64_t N, int64_t C) {
    rmsnorm_forward(z, C, rstd, o, C, gain, N, C);
#pragma omp parallel for if (N * C > FEW_NUMBERS)
    for (int64_t n = 0; n < N; n++)
#pragma omp simd
        for (int64_t c = n * C; c < (n + 1) * C; c++) z[c] /= 1 + vexp(-gate[c]);
}

// dgate = dz⊙y⊙σ⊙(1−σ) = dz⊙z⊙(1−σ);  dy = dz⊙σ, and through the norm d_o, dgain +=. `dz` becomes d_o, `z` becomes dgate.
inline void lightning_gate_backward(real* dz, real* z, real* dgain, const real* rstd, const real* o, const real* gate, const real* gain, int64_t N, int64_t C) {
#pragma omp parallel for
    for (int64_t n = 0; n < N; n++)
#pragma omp simd
        for (int64_t c = n * C; c < (n + 1) * C; c++) {
            real sigma = 1 / (1 + vexp(-gate[c]));
            z[c] = dz[c] * z[c] * (1 - sigma);
            dz[c] *= sigma;
        }
    rmsnorm_backward(dz, C, dgain, dz, C, o, C, rstd, gain, N, C);
}

inline std::vector<TensorSpec> lightning_saved(const AttentionConfig& a, int64_t N, int lanes) {
    int64_t C = a.channels;
    return {buffer_spec("qkv", {N, 3 * C}), buffer_spec("o", {N, C}), buffer_spec("rstd", {N}, Storage::FLOAT32), buffer_spec("gate", {N, C}),
            buffer_spec("states", {lightning_borders(N) + lanes, C * a.head_size()}, Storage::FLOAT32)};
}

inline int64_t lightning_scratch(const AttentionConfig& a, int64_t N, int64_t, int64_t, bool training) {
    int64_t C = a.channels, branch = scratch_size({N * C});
    int64_t forward = scratch_size({N * C}) + branch, extend = scratch_size({N * 3 * C, N * C, N * C}) + branch;
    int64_t backward = scratch_size({N * C, N * C}) + std::max(branch, scratch_size({N * 3 * C, lightning_borders(N) * C * a.head_size()}));
    return std::max(forward, training ? backward : extend);
}

inline void lightning_forward(const AttentionContext& ctx, const Tensors& parameters, const Tensors& saved, const real* x, const real* residual, real* out) {
    int64_t N = ctx.tokens(), C = ctx.config->channels;
    AttentionContext rest = ctx;
    real *u = saved["qkv"], *gate = saved["gate"], *o = saved["o"], *z = rest.scratch.take(N * C);
    linear_forward(u, x, parameters["wqkv"], nullptr, N, C, 3 * C);
    linear_forward(gate, x, parameters["wg"], nullptr, N, C, C);
    Lightning g = make_lightning(ctx);
    lightning_point_forward(ctx, g, saved);
    for (int s = 0; s < ctx.num_seqs; s++) {
        const real* memory = memory_of(ctx.memory_from, s);
        if (g.first[s] == g.first[s + 1])
            pass_memory(memory_of(ctx.memory_to, s), memory, g.state_size());
        else
            pass_memory(g.chunks[g.first[s]].S, memory, g.state_size());
    }
    lightning_recurrence_forward(g, u, o);
    lightning_gate_forward(z, saved["rstd"], o, gate, parameters["gain"], N, C);
    output_forward(rest, z, C, parameters["wo"], nullptr, residual, out);
}

// ctx.memory_from tells which sequences started from a memory, as in forward; what it points at is not read again.
inline void lightning_backward(const AttentionContext& ctx, const Tensors& parameters, const Tensors& gradients, const Tensors& saved, const real* x,
                               const real* dout, real* dx) {
    int64_t N = ctx.tokens(), C = ctx.config->channels;
    AttentionContext rest = ctx;
    const real *u = saved["qkv"], *gate = saved["gate"], *o = saved["o"], *gain = parameters["gain"];
    real *z = rest.scratch.take(N * C), *d_o = rest.scratch.take(N * C);
    lightning_gate_forward(z, nullptr, o, gate, gain, N, C);
    output_backward(rest, z, C, parameters["wo"], dout, d_o, gradients["wo"], nullptr);
    lightning_gate_backward(d_o, z, gradients["gain"], saved["rstd"], o, gate, gain, N, C);
    const real* dgate = z;

    real *du = rest.scratch.take(N * 3 * C), *dstates = rest.scratch.take(lightning_borders(N) * C * ctx.config->head_size());
    Lightning g = make_lightning(ctx);
    lightning_point_forward(ctx, g, saved);
    lightning_point_backward(ctx, g, dstates);
    for (int s = 0; s < ctx.num_seqs; s++)
        if (g.first[s] == g.first[s + 1]) pass_memory(memory_of(ctx.dmemory_from, s), memory_of(ctx.dmemory_to, s), g.state_size());
    lightning_recurrence_backward(g, u, d_o, du);
    linear_backward(dx, false, gradients["wqkv"], nullptr, du, x, parameters["wqkv"], N, C, 3 * C);
    linear_backward(dx, true, gradients["wg"], nullptr, dgate, x, parameters["wg"], N, C, C);
}

// One token: the recurrence as it stands at the top of this section. u (3C), o (C) of the token; S (NH,hs,hs) is brought up to date.
inline void lightning_step(const Lightning& g, int h, const real* u, real* S, real* o) {
    int hs = g.hs;
    RealVector qkv(3 * hs);
    for (int part : {PART_Q, PART_K, PART_V}) silu_forward(&qkv[part * hs], u + part * g.C + h * hs, 0, 1, hs);
    real f = g.decay(h)[1], *o_head = o + h * hs;
    std::fill_n(o_head, hs, (real)0);
    for (int i = 0; i < hs; i++) {
        real *row = S + g.head_state(h) + (int64_t)i * hs, q = g.scale * qkv[i], k = qkv[hs + i];
        for (int j = 0; j < hs; j++) {
            row[j] = f * row[j] + k * qkv[2 * hs + j];
            o_head[j] += q * row[j];
        }
    }
}

inline void lightning_extend(const AttentionContext& ctx, const Tensors& parameters, const real* x, const real* residual, real* out) {
    int64_t N = ctx.tokens(), C = ctx.config->channels;
    AttentionContext rest = ctx;
    real *u = rest.scratch.take(N * 3 * C), *gate = rest.scratch.take(N * C), *o = rest.scratch.take(N * C);
    linear_forward(u, x, parameters["wqkv"], nullptr, N, C, 3 * C);
    linear_forward(gate, x, parameters["wg"], nullptr, N, C, C);
    Lightning g = make_lightning(ctx);
    for (int s = 0; s < ctx.num_seqs; s++)
        for (int i = g.first[s]; i < g.first[s + 1]; i++) g.chunks[i].S = g.chunks[i].S_next = ctx.states[s].fixed;
    bool steps = std::all_of(g.chunks.begin(), g.chunks.end(), [](const LightningChunk& chunk) { return chunk.n == 1; });
#pragma omp parallel
    {
        std::optional<LightningTiles> t;
        if (!steps) t.emplace(g.hs);
#pragma omp for collapse(2) schedule(dynamic)
        for (int s = 0; s < ctx.num_seqs; s++)
            for (int h = 0; h < g.heads; h++) {
                int64_t row = ctx.cu_seqlens[s];
                if (ctx.cu_seqlens[s + 1] - row == 1)
                    lightning_step(g, h, u + row * 3 * C, ctx.states[s].fixed, o + row * C);
                else if (t)  // without tiles: no token at all
                    lightning_sequence_forward(g, s, h, *t, u, o);
            }
    }
    lightning_gate_forward(o, nullptr, o, gate, parameters["gain"], N, C);
    output_forward(rest, o, C, parameters["wo"], nullptr, residual, out);
}

inline Attention lightning_attention() { return {"lightning", lightning_saved, lightning_scratch, lightning_forward, lightning_backward, lightning_extend}; }

}  // namespace cpu

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
        : C(a.channels),
          NH(a.heads),
          r_q(a["q-lora-rank"]),
          d_c(a["kv-lora-rank"]),
          d_nope(a["qk-nope-dim"]),
          d_rope(a["qk-rope-dim"]),
          d_v(a["v-dim"]),
          d_qk(d_nope + d_rope),
          d_kv(d_nope + d_v),
          q((int64_t)NH * d_qk),
          kv((int64_t)NH * d_kv),
          u(d_c + d_rope),
          o((int64_t)NH * d_v) {}
};

inline void mla_resolve(AttentionConfig& a) {
    int hs = a.head_size();
    auto initial = [&](const char* option, int value) {
        if (a[option] == AUTOMATIC) a.options[option] = value;
    };
    initial("qk-nope-dim", hs);
    initial("qk-rope-dim", (hs + 3) / 4 * 2);  // hs/2, made even
    initial("v-dim", hs);
    initial("kv-lora-rank", ((a.channels + 2) / 3 + 7) / 8 * 8);  // C/3, made a multiple of 8
    if (a["qk-rope-dim"] % 2)
        usage_error("rotary positions turn pairs of numbers, qk-rope-dim is %d: give an even --qk-rope-dim, or 0 for none", a["qk-rope-dim"]);
    if (a["qk-nope-dim"] + a["qk-rope-dim"] == 0)
        usage_error("qk-nope-dim 0 and qk-rope-dim 0 leave queries and keys empty: raise --qk-nope-dim or --qk-rope-dim");
}

inline std::vector<TensorSpec> mla_parameters(const AttentionConfig& a) {
    MlaShape d(a);
    std::vector<TensorSpec> list;
    if (d.r_q)
        list = {matrix_spec("wdq", d.r_q, d.C, 0.02), vector_spec("gq", d.r_q, 1), matrix_spec("wuq", d.q, d.r_q, 0.02)};
    else
        list = {matrix_spec("wq", d.q, d.C, 0.02)};
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
    return {
        "mla",
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

// MERGED is never the cheapest: to beat ABSORBED it needs n+1 > 2X, and then UNABSORBED beats it. It is kept for those who measure otherwise, and tested.
inline MlaForm mla_form(const AttentionConfig& a, double n, double P) { return mla_absorb_pays(a, n, P) ? MlaForm::ABSORBED : MlaForm::UNABSORBED; }

namespace cpu {

inline std::vector<TensorSpec> mla_saved(const AttentionConfig& a, int64_t N, int) {
    MlaShape d(a);
    std::vector<TensorSpec> list = {buffer_spec("u", {N, d.u}), buffer_spec("rstd", {N}, Storage::FLOAT32), buffer_spec("q", {N, d.q}),
                                    buffer_spec("o", {N, d.o}), buffer_spec("lse", {N, d.NH}, Storage::FLOAT32)};
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
        position[n] = ctx.place[n].pos + (ctx.states ? (int)ctx.states[ctx.place[n].seq].past() : 0);
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
inline void mla_query_backward(const MlaShape& d, const Tensors& parameters, const Tensors& gradients, const Tensors& saved, const real* x, const real* dq,
                               real* dx, int64_t N, Scratch scratch) {
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
    core.window = ctx.window;
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

inline void mla_backward(const AttentionContext& ctx, const Tensors& parameters, const Tensors& gradients, const Tensors& saved, const real* x,
                         const real* dout, real* dx) {
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
inline void mla_unabsorbed(const AttentionContext& ctx, const MlaShape& d, const real* wukv, const real* q, const int* cu_k, real* o, real* lse,
                           Scratch scratch) {
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
inline void mla_absorbed(const AttentionContext& ctx, const MlaShape& d, const real* wukv, const real* q, const int* cu_k, real* o, real* lse,
                         Scratch scratch) {
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
        RealVector transposed;
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
                transposed.resize((size_t)d.d_c * d.d_v);
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

// --------------------------------------------------------------------------------------------------------------------------------------------------
// 7. The registry

inline const std::vector<AttentionDescription>& attention_descriptions() {
    static const std::vector<AttentionDescription> list = {causal_description(), infini_description(), lightning_description(), mla_description()};
    return list;
}

namespace cpu {
inline const Attention& attention(const std::string& name) {
    static const std::vector<Attention> list = {causal_attention(), infini_attention(), lightning_attention(), mla_attention()};
    for (const Attention& a : list)
        if (name == a.name) return a;
    usage_error("attention '%s' has no CPU implementation", name.c_str());  // unreachable while the two lists agree
}
}  // namespace cpu
