// Small layers that attention layers and the transformer block share: linear, RMSNorm, rotary positions, dropout of a residual branch.
// Rows are tokens: (N, C) means N tokens of C channels, N over all sequences of the batch.
#pragma once

#include <cmath>
#include <cstring>
#include <map>

#include "../philox.h"
#include "matmul.h"

namespace cpu {

// e^x in a form that every compiler vectorises (glibc's own vector version is out of reach without -ffinite-math-only): x = n·ln2 + r, |r| <= ln2/2,
// e^r by its Taylor polynomial of degree 7 (relative error 5e-9 before rounding), times 2^n put together from bits. The error is about |x|·6e-8, what
// rounding x itself to float32 costs. 0 below −87.3, infinite above 88.4, NaN stays NaN.
inline float vexp(float x) {
    float t = x < 89 ? x : 89;  // written so that NaN takes a legal way to an integer; r has it still
    t = (t > -88 ? t : -88) * 1.44269504f;
    int32_t n = (int32_t)(t < 0 ? t - 0.5f : t + 0.5f);
    float r = x - n * 0.693147181f;
    float p = 1 + r * (1 + r * (1 / 2.f + r * (1 / 6.f + r * (1 / 24.f + r * (1 / 120.f + r * (1 / 720.f + r * (1 / 5040.f)))))));
    uint32_t bits = (uint32_t)(n + 127) << 23;
    float power;
    memcpy(&power, &bits, sizeof power);
    return x < -87.3f ? 0 : p * power;
}
inline double vexp(double x) { return std::exp(x); }

// Where a row of the batch stands: in which sequence, and at which position of it.
struct TokenPlace {
    int seq, pos;
};

// A loop over no more numbers than these is done before other threads have heard of it: one thread takes it. Decoding is full of such loops.
constexpr int64_t FEW_NUMBERS = 4096;

// ---- linear: out = x·Wᵀ + b, W (OC, C) --------------------------------------------------------------------------------------------------------------
// out (N,OC), x (N,C), b (OC) or null.
inline void linear_forward(real* out, const real* x, const real* w, const real* b, int64_t N, int64_t C, int64_t OC) {
    if (b) {
#pragma omp parallel for if (N * OC > FEW_NUMBERS)
        for (int64_t n = 0; n < N; n++) memcpy(out + n * OC, b, OC * sizeof(real));
    }
    matmul(NO, YES, N, OC, C, 1, x, C, w, C, b ? 1 : 0, out, OC);
}

// db (OC) += column sums of dout (N,OC). Threads split the columns, so that each sum has one order.
inline void bias_backward(real* db, const real* dout, int64_t N, int64_t OC) {
    constexpr int64_t block = 64;
#pragma omp parallel for
    for (int64_t c0 = 0; c0 < OC; c0 += block) {
        int64_t n_columns = std::min(block, OC - c0);
        real sum[block] = {};
        for (int64_t n = 0; n < N; n++)
            for (int64_t c = 0; c < n_columns; c++) sum[c] += dout[n * OC + c0 + c];
        for (int64_t c = 0; c < n_columns; c++) db[c0 + c] += sum[c];
    }
}

// dx = (or +=) dout·W;  dW += doutᵀ·x;  db += Σ_n dout. dx and db may be null; rows of dout are dout_stride apart (0: OC).
inline void linear_backward(real* dx, bool accumulate_dx, real* dw, real* db, const real* dout, const real* x, const real* w, int64_t N, int64_t C, int64_t OC,
                            int64_t dout_stride = 0) {
    if (dout_stride == 0) dout_stride = OC;
    if (dx) matmul(NO, NO, N, C, OC, 1, dout, dout_stride, w, C, accumulate_dx ? 1 : 0, dx, C);
    matmul(YES, NO, OC, C, N, 1, dout, dout_stride, x, C, 1, dw, C);
    if (db) bias_backward(db, dout, N, OC);  // only for dense rows: the head has no bias
}

// ---- RMSNorm: y = u·r ⊙ gain, r = 1/√(mean(u²) + ε), ε = 1e-6 ----------------------------------------------------------------------------------------
// y (N,C) with rows y_stride apart, u (N,C) with rows u_stride apart, rstd (N).
inline void rmsnorm_forward(real* y, int64_t y_stride, real* rstd, const real* u, int64_t u_stride, const real* gain, int64_t N, int64_t C) {
#pragma omp parallel for if (N * C > FEW_NUMBERS)
    for (int64_t n = 0; n < N; n++) {
        const real* row = u + n * u_stride;
        real r = 1 / std::sqrt(dot((int)C, row, row) / C + (real)1e-6);
        for (int64_t c = 0; c < C; c++) y[n * y_stride + c] = row[c] * r * gain[c];
        if (rstd) rstd[n] = r;
    }
}

// t = dy⊙gain:  du = r·t − u·(r³/C)·Σ(t⊙u);  dgain += Σ_n dy⊙u·r. du may stand where dy stood.
inline void rmsnorm_backward(real* du, int64_t du_stride, real* dgain, const real* dy, int64_t dy_stride, const real* u, int64_t u_stride, const real* rstd,
                             const real* gain, int64_t N, int64_t C) {
#pragma omp parallel for  // first dgain, since du may overwrite dy
    for (int64_t c0 = 0; c0 < C; c0 += 64)
        for (int64_t n = 0; n < N; n++)
            for (int64_t c = c0; c < std::min(c0 + 64, C); c++) dgain[c] += dy[n * dy_stride + c] * u[n * u_stride + c] * rstd[n];
#pragma omp parallel for
    for (int64_t n = 0; n < N; n++) {
        const real *g = dy + n * dy_stride, *row = u + n * u_stride;
        real r = rstd[n], tu = 0;
        for (int64_t c = 0; c < C; c++) tu += g[c] * gain[c] * row[c];
        real s = r * r * r / C * tu;
        for (int64_t c = 0; c < C; c++) du[n * du_stride + c] = r * g[c] * gain[c] - row[c] * s;
    }
}

// ---- Rotary positions (Su et al., arXiv 2104.09864), adjacent pairs ------------------------------------------------------------------------------------
// θ_i = 10000^(−2i/d); (x_2i, x_2i+1) → (x_2i cos − x_2i+1 sin, x_2i sin + x_2i+1 cos) at angle position·θ_i.

// cos and sin of one position, (d/2, 2), computed in double.
inline void rope_angles(real* cs, int d, int position) {
    for (int i = 0; i < d; i += 2) {
        double angle = position * std::pow(10000.0, -(double)i / d);
        cs[i] = (real)std::cos(angle);
        cs[i + 1] = (real)std::sin(angle);
    }
}

// The same of every position below `positions`, (positions, d/2, 2): computed once and kept. Not to be called by several threads at once.
inline const real* rope_table(int d, int positions) {
    static std::map<int, std::vector<real>> tables;
    std::vector<real>& t = tables[d];
    int known = (int)(t.size() / d);
    if (known < positions) t.resize((size_t)positions * d);
    for (int p = known; p < positions; p++) rope_angles(&t[(size_t)p * d], d, p);
    return t.data();
}

// Rotates `heads` neighbouring vectors of d (even) numbers, from x into y (which may be x), by a position's row of the table. direction −1: backward pass.
inline void rope_row(real* y, const real* x, int heads, int d, const real* cs, int direction) {
    for (int h = 0; h < heads; h++)
        for (int i = 0; i < d; i += 2) {
            real c = cs[i], s = direction * cs[i + 1];
            real a = x[h * d + i], b = x[h * d + i + 1];
            y[h * d + i] = a * c - b * s;
            y[h * d + i + 1] = a * s + b * c;
        }
}

// The same for each of N rows. Of positions behind ROPE_KEPT no table is kept: a text without end, of which a window is seen, takes no more memory.
constexpr int ROPE_KEPT = 1 << 17;
inline void rope(real* y, int64_t y_stride, const real* x, int64_t x_stride, int64_t N, int heads, int d, const int* position, int direction) {
    int last = 0;
    for (int64_t n = 0; n < N; n++) last = std::max(last, position[n]);
    const real* table = rope_table(d, std::min(last + 1, ROPE_KEPT));
#pragma omp parallel for if (N * heads * d > FEW_NUMBERS)
    for (int64_t n = 0; n < N; n++) {
        std::vector<real> own;
        if (position[n] >= ROPE_KEPT) {
            own.resize(d);
            rope_angles(own.data(), d, position[n]);
        }
        rope_row(y + n * y_stride, x + n * x_stride, heads, d, own.empty() ? table + (int64_t)position[n] * d : own.data(), direction);
    }
}

// ---- Dropout of embeddings and of residual branches ------------------------------------------------------------------------------------------------------
// Philox with counter (channel>>2, position, 2³²−1−(3b+site), step·L+l): these counters count down from the top of the third word, attention's
// (b·NH+h) up from zero, so that the two never meet. Kept iff word ≥ p·2³², and then scaled by 1/(1−p).

struct DropoutKey {
    double p = 0;  // 0: no dropout
    uint64_t seed = 0;
    uint32_t counter = 0;  // step·L + l
    int64_t first_row = 0;
};
enum DropoutSite { DROP_EMBEDDING, DROP_ATTENTION, DROP_MLP };

inline uint32_t dropout_threshold(double p) { return (uint32_t)(p * 4294967296.0); }

// out = base + Z⊙x over (N,C); base may be null or out itself. The backward pass is the same function: dx = Z⊙dout.
inline void dropout_add(real* out, const real* base, const real* x, const DropoutKey& key, DropoutSite site, const TokenPlace* place, int64_t N, int64_t C) {
    uint32_t threshold = dropout_threshold(key.p);
    real scale = (real)(1 / (1 - key.p));
#pragma omp parallel for
    for (int64_t n = 0; n < N; n++) {
        uint32_t who = UINT32_MAX - (uint32_t)(3 * (key.first_row + place[n].seq) + site);
        for (int64_t c0 = 0; c0 < C; c0 += 4) {
            Philox r = philox(key.seed, (uint32_t)(c0 >> 2), place[n].pos, who, key.counter);
            for (int64_t c = c0; c < std::min(c0 + 4, C); c++) {
                real z = r.word[c & 3] >= threshold ? scale * x[n * C + c] : 0;
                out[n * C + c] = base ? base[n * C + c] + z : z;
            }
        }
    }
}

}  // namespace cpu
