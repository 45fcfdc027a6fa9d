#pragma once

#include "attention.h"

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
// R and A are computed again: a read is hs/(2·C) of a projection's work. Forward costs 4·C·(S+1)/2 + 2·hs·(NH+KV)·hs FLOPs a token whatever T is.
// State, constant: how many tokens are pending, whether anything was written, z and M, the pending tokens' k (before the rotation) and v.

constexpr int MAX_SEGMENT = 1 << 20;

inline int64_t infini_memory_size(const AttentionConfig& a) { return (int64_t)a["kv-heads"] * (a.head_size() + 1) * a.head_size(); }

// pending, written; for each kv head z (hs) and M (hs,hs); for each pending token k and v (2·KV·hs). All zeros: empty.
constexpr int INFINI_PENDING = 0, INFINI_WRITTEN = 1, INFINI_MEMORY = 2;
inline int64_t infini_row_size(const AttentionConfig& a) { return 2 * (int64_t)a["kv-heads"] * a.head_size(); }
inline AttentionStateSize infini_state(const AttentionConfig& a) {
    return {0, INFINI_MEMORY + infini_memory_size(a) + a["segment"] * infini_row_size(a)};
}

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
    int cu_k[2];             // with pending tokens: its keys' offsets,
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
            if (rotate) {
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
        RealVector transposed(run.pending ? softmax_forward_scratch(run.cu_k[1], p.kv_heads, p.hs) : 0);
        softmax_forward(run.core, D, C, lse, run.pending ? Scratch{transposed.data(), (int64_t)transposed.size()} : scratch);
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
        for (int i = 0; run.pending && i < s.q_len; i++)
            memcpy(dqkv + (s.row + i) * stride + C, &dkv[(s.pending() + i) * row_size], row_size * sizeof(real));
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
                    if (before) memcpy(z, before, size * sizeof(real));
                    else std::fill_n(z, hs, p.z_start()), std::fill_n(M, (int64_t)hs * hs, (real)0);
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
    explicit InfiniMemoryGradient(int hs)
        : d(hs * (hs + 1)), after(hs * (hs + 1)), transposed(hs * hs), before_transposed(hs * hs), features(QT * hs), dfeatures(QT * hs), dU(QT * hs), U(QT * hs),
          V(QT * hs), dn(QT * hs), den(QT), dden(QT) {}
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
    if (!memory) std::fill_n(to + INFINI_MEMORY, memory_size, (real)0);
    else if (memory != to + INFINI_MEMORY) memcpy(to + INFINI_MEMORY, memory, memory_size * sizeof(real));
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
inline void infini_backward(const AttentionContext& ctx, const Tensors& parameters, const Tensors& gradients, const Tensors& saved, const real* x, const real* dout,
                            real* dx) {
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
