// Matrix products on the CPU.
//
//   matmul        the large ones: a CBLAS (OpenBLAS, MKL, BLIS, Accelerate), or without one (-DNO_CBLAS) matmul_builtin, which is also the reference
//   matmul_few    a few rows by a large matrix, decoding's products: no faster than memory, and with nothing copied no slower
//   tile_matmul   the small ones, from cache to cache, inside one thread: what attention is made of. A library's call costs as much as the product there
//
// All matrices are row-major. `real` is float; compiled with -DREAL=double the same source gives the float64 program for gradient checks.
#pragma once

#include <algorithm>
#include <cassert>
#include <cstdint>
#include <cstring>
#include <new>
#include <type_traits>
#include <utility>
#include <vector>
#ifndef NO_CBLAS
#ifdef __APPLE__
#include <Accelerate/Accelerate.h>
#else
#include <cblas.h>
#endif
#endif

#include "../threads.h"

#ifndef REAL
#define REAL float
#endif
typedef REAL real;

namespace cpu {

// A vector that starts on a cache line: a load of 64 bytes that straddles two lines costs two.
template <class T>
struct AlignedAllocator {
    typedef T value_type;
    AlignedAllocator() = default;
    template <class U>
    AlignedAllocator(const AlignedAllocator<U>&) {}
    T* allocate(size_t n) { return (T*)::operator new(n * sizeof(T), std::align_val_t(64)); }
    void deallocate(T* p, size_t) { ::operator delete(p, std::align_val_t(64)); }
    template <class U>
    bool operator==(const AlignedAllocator<U>&) const {
        return true;
    }
    template <class U>
    bool operator!=(const AlignedAllocator<U>&) const {
        return false;
    }
};
typedef std::vector<real, AlignedAllocator<real>> RealVector;

// --------------------------------------------------------------------------------------------------------------------------------------------------
// tile_matmul: C (m,n) = or += A (m,k) · B (k,n), in one thread.
// Element (i,p) of A is a[i*ai + p*ap], so a transposed A costs nothing; rows of B and C are contiguous, ldb and ldc apart.
// A block of MR x (NV vectors) of C stays in registers while p runs: MR*NV independent multiply-adds hide their latency, and each vector of B is used
// MR times for one load. The order of summation over p is the same for every element and every block shape.

#if defined(__AVX512F__)
constexpr int vector_bytes = 64, MR = 6, NV = 4;  // 24 of 32 registers hold C
#elif defined(__AVX__)
constexpr int vector_bytes = 32, MR = 6, NV = 2;  // 12 of 16
#else
constexpr int vector_bytes = 16, MR = 4, NV = 2;  // SSE2: 8 of 16; NEON has 32
#endif
constexpr int W = vector_bytes / sizeof(real);
typedef real vec __attribute__((vector_size(vector_bytes), aligned(sizeof(real)), may_alias));

template <int R, int V>
inline void tile_kernel(int k, const real* a, int64_t ai, int64_t ap, const real* b, int64_t ldb, real* c, int64_t ldc, bool accumulate) {
    vec sum[R][V];
    for (int i = 0; i < R; i++)
        for (int v = 0; v < V; v++) sum[i][v] = accumulate ? *(const vec*)(c + i * ldc + v * W) : vec{};
    for (int p = 0; p < k; p++) {
        vec row[V];
        for (int v = 0; v < V; v++) row[v] = *(const vec*)(b + p * ldb + v * W);
        for (int i = 0; i < R; i++) {
            real s = a[i * ai + p * ap];
            for (int v = 0; v < V; v++) sum[i][v] += s * row[v];
        }
    }
    for (int i = 0; i < R; i++)
        for (int v = 0; v < V; v++) *(vec*)(c + i * ldc + v * W) = sum[i][v];
}

template <int R, int V>
inline void tile_columns(int m, int k, const real* a, int64_t ai, int64_t ap, const real* b, int64_t ldb, real* c, int64_t ldc, bool accumulate) {
    int i = 0;
    for (; i + R <= m; i += R) tile_kernel<R, V>(k, a + i * ai, ai, ap, b, ldb, c + i * ldc, ldc, accumulate);
    for (; i + 2 <= m; i += 2) tile_kernel<2, V>(k, a + i * ai, ai, ap, b, ldb, c + i * ldc, ldc, accumulate);
    for (; i < m; i++) tile_kernel<1, V>(k, a + i * ai, ai, ap, b, ldb, c + i * ldc, ldc, accumulate);
}

inline void tile_matmul(int m, int n, int k, const real* a, int64_t ai, int64_t ap, const real* b, int64_t ldb, real* c, int64_t ldc, bool accumulate) {
    int j = 0;
    for (; j + NV * W <= n; j += NV * W) tile_columns<MR, NV>(m, k, a, ai, ap, b + j, ldb, c + j, ldc, accumulate);
    for (; NV > 2 && j + 2 * W <= n; j += 2 * W) tile_columns<8, 2>(m, k, a, ai, ap, b + j, ldb, c + j, ldc, accumulate);
    for (; j + W <= n; j += W) tile_columns<8, 1>(m, k, a, ai, ap, b + j, ldb, c + j, ldc, accumulate);
    for (int i = 0; i < m && j < n; i++)
        for (int jj = j; jj < n; jj++) {
            real sum = accumulate ? c[i * ldc + jj] : 0;
            for (int p = 0; p < k; p++) sum += a[i * ai + p * ap] * b[p * ldb + jj];
            c[i * ldc + jj] = sum;
        }
}

// One stage of transposing W rows of W numbers in registers: rows r and r+S exchange their off-diagonal blocks of S x S. After the stages S = 1, 2, ... W/2
// the block is transposed (Eklundh 1972).
#ifdef __clang__
#define TWO_VECTORS(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else  // GCC has the other name only since 12
typedef std::conditional_t<sizeof(real) == 4, int32_t, int64_t> Lane;
typedef Lane LaneVector __attribute__((vector_size(vector_bytes)));
#define TWO_VECTORS(a, b, ...) __builtin_shuffle(a, b, LaneVector{__VA_ARGS__})
#endif
template <int S, int... I>
inline void transpose_stage(vec* row, std::integer_sequence<int, I...>) {
    for (int r = 0; r < W; r++) {
        if (r & S) continue;
        vec a = row[r], b = row[r + S];
        row[r] = TWO_VECTORS(a, b, (I & S ? W + I - S : I)...);
        row[r + S] = TWO_VECTORS(a, b, (I & S ? W + I : I + S)...);
    }
    if constexpr (2 * S < W) transpose_stage<2 * S>(row, std::integer_sequence<int, I...>());
}

// to (columns, rows) = transpose of from (rows, columns): rows of keys or weights become the columns that tile_matmul wants.
inline void tile_transpose(int rows, int columns, const real* from, int64_t stride, real* to, int64_t to_stride) {
    int whole_rows = rows / W * W, whole_columns = columns / W * W;
    for (int r = 0; r < whole_rows; r += W)
        for (int c = 0; c < whole_columns; c += W) {
            vec block[W];
            for (int i = 0; i < W; i++) block[i] = *(const vec*)(from + (r + i) * stride + c);
            transpose_stage<1>(block, std::make_integer_sequence<int, W>());
            for (int i = 0; i < W; i++) *(vec*)(to + (c + i) * to_stride + r) = block[i];
        }
    for (int r = 0; r < rows; r++)
        for (int c = r < whole_rows ? whole_columns : 0; c < columns; c++) to[c * to_stride + r] = from[r * stride + c];
}

// The largest of x (n), start if there is none. In vectors by hand: with NaN to be honoured, compilers leave this loop scalar, and a softmax waits for it.
inline real largest(int n, const real* x, real start) {
    int i = 0;
    if (n >= W) {
        vec m = *(const vec*)x;
        for (i = W; i + W <= n; i += W) {
            vec v = *(const vec*)(x + i);
            m = v > m ? v : m;
        }
        for (int l = 0; l < W; l++) start = m[l] > start ? m[l] : start;
    }
    for (; i < n; i++) start = x[i] > start ? x[i] : start;
    return start;
}

inline real dot(int n, const real* a, const real* b) {
    real sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int i = 0; i < n; i++) sum += a[i] * b[i];
    return sum;
}

// --------------------------------------------------------------------------------------------------------------------------------------------------
// matmul: C (M,N) = alpha · op(A) (M,K) · op(B) (K,N) + beta · C, on all threads.

enum Transpose { NO, YES };

// A strip of C by one thread: for each K_BLOCK, up to 4 panels of op(B) of PANEL columns are packed side by side (64 KB each, second-level cache), and all
// rows of A pass over them, MR at a time (6 KB, first-level cache): A, which may have to come from further away, is read once for 4 panels.
// A transposed A is first turned around, some rows at once, by all threads: read in place, each step of p would touch another page.
inline void matmul_builtin(Transpose ta, Transpose tb, int64_t M, int64_t N, int64_t K, real alpha, const real* A, int64_t lda, const real* B, int64_t ldb,
                           real beta, real* C, int64_t ldc) {
    constexpr int64_t PANEL = NV * W, K_BLOCK = 256;
    static thread_local RealVector turned, packed;  // kept: fresh pages from the system cost as much as the product of a small matrix
    if (ta == YES) {
        int64_t slab = std::max<int64_t>(64, (1 << 22) / std::max<int64_t>(K, 1) / 64 * 64);
        if ((int64_t)turned.size() < std::min(M, slab) * K) turned.resize(std::min(M, slab) * K);
        real* rows = turned.data();
        for (int64_t i0 = 0; i0 < M; i0 += slab) {
            int64_t m = std::min(slab, M - i0);
#pragma omp parallel for collapse(2)
            for (int64_t i = 0; i < m; i += 64)
                for (int64_t p = 0; p < K; p += 64)
                    tile_transpose((int)std::min<int64_t>(64, K - p), (int)std::min<int64_t>(64, m - i), A + p * lda + i0 + i, lda, rows + i * K + p, K);
            matmul_builtin(NO, tb, m, N, K, alpha, rows, K, B, ldb, beta, C + i0 * ldc, ldc);
        }
        return;
    }
    // About three tasks a thread: narrower strips first, then, if there are still too few, C is cut along M too (each piece packs its strip of B again).
    int64_t panels = (N + PANEL - 1) / PANEL, tasks = 3 * num_threads(), width = std::max<int64_t>(1, std::min<int64_t>(4, panels / tasks)) * PANEL;
    int64_t strips = (N + width - 1) / width, pieces = std::max<int64_t>(1, std::min((tasks + strips - 1) / strips, M / (4 * MR)));
    int64_t m_block = ((M + pieces - 1) / pieces + MR - 1) / MR * MR;
    pieces = (M + m_block - 1) / m_block;
    int64_t room = num_threads() * K_BLOCK * 4 * PANEL;
    if ((int64_t)packed.size() < room) packed.resize(room);
    real* workspace = packed.data();  // of the calling thread; each thread of the team takes its part
#pragma omp parallel for collapse(2) schedule(dynamic)
    for (int64_t strip = 0; strip < strips; strip++)
        for (int64_t piece = 0; piece < pieces; piece++) {
            real* pack = workspace + thread_number() * K_BLOCK * 4 * PANEL;
            int64_t i0 = piece * m_block, m = std::min(m_block, M - i0), j0 = strip * width, n = std::min(width, N - j0);
            if (K == 0 || (beta != 1 && beta != 0))
                for (int64_t i = i0; i < i0 + m; i++)
                    for (int64_t j = j0; j < j0 + n; j++) C[i * ldc + j] = beta == 0 ? 0 : beta * C[i * ldc + j];
            for (int64_t p0 = 0; p0 < K; p0 += K_BLOCK) {
                int64_t k = std::min(K_BLOCK, K - p0);
                for (int64_t j = 0; j < n; j += PANEL) {
                    int64_t columns = std::min(PANEL, n - j);
                    real* to = pack + j * K_BLOCK;
                    if (tb == YES) {
                        tile_transpose((int)columns, (int)k, B + (j0 + j) * ldb + p0, ldb, to, columns);
                    } else {
                        for (int64_t p = 0; p < k; p++) memcpy(to + p * columns, B + (p0 + p) * ldb + j0 + j, columns * sizeof(real));
                    }
                    for (int64_t i = 0; alpha != 1 && i < k * columns; i++) to[i] *= alpha;
                }
                bool accumulate = !(beta == 0 && p0 == 0);  // beta 0 overwrites: what stood in C may have been NaN
                for (int64_t i = 0; i < m; i += MR)
                    for (int64_t j = 0; j < n; j += PANEL) {
                        int64_t columns = std::min(PANEL, n - j);
                        tile_matmul((int)std::min<int64_t>(MR, m - i), (int)columns, (int)k, A + (i0 + i) * lda + p0, lda, 1, pack + j * K_BLOCK, columns,
                                    C + (i0 + i) * ldc + j0 + j, ldc, accumulate);
                    }
            }
        }
}

// The sum of a vector's numbers, halves onto halves.
template <int S = W / 2, int... I>
inline real vector_sum(vec v, std::integer_sequence<int, I...> lanes) {
    v += TWO_VECTORS(v, v, (I ^ S)...);
    if constexpr (S > 1)
        return vector_sum<S / 2>(v, lanes);
    else
        return v[0];
}

// out (M,R): products of M rows of A with R rows of k numbers, which stand at rows[r] + offset and come from memory, each sum in V vectors. What is needed next
// is asked for meanwhile, `ahead` behind: the processor by itself stops at the end of a page.
template <int M, int R, int V>
inline void row_products(int64_t k, const real* A, int64_t lda, const real* const* rows, int64_t offset, int64_t ahead, real* out) {
    const real* row[R];
    for (int r = 0; r < R; r++) row[r] = rows[r] + offset;
    vec sum[M][R][V] = {};
    int64_t p = 0;
    for (; p + V * W <= k; p += V * W)
        for (int r = 0; r < R; r++)
            for (int v = 0; v < V; v++) {
                vec b = *(const vec*)(row[r] + p + v * W);
                __builtin_prefetch(row[r] + p + v * W + ahead);
                for (int i = 0; i < M; i++) sum[i][r][v] += b * *(const vec*)(A + i * lda + p + v * W);
            }
    for (; p < k; p += W) {
        auto rest = [&](const real* x) {
            vec v = {};
            memcpy(&v, x, std::min<int64_t>(W, k - p) * sizeof(real));
            return v;
        };
        for (int r = 0; r < R; r++)
            for (int i = 0; i < M; i++) sum[i][r][0] += rest(row[r] + p) * rest(A + i * lda + p);
    }
    for (int i = 0; i < M; i++)
        for (int r = 0; r < R; r++) {
            vec total = sum[i][r][0];
            for (int v = 1; v < V; v++) total += sum[i][r][v];
            out[i * R + r] = vector_sum(total, std::make_integer_sequence<int, W>());
        }
}

// C = alpha·A·Bᵀ + beta·C for M <= FEW_ROWS rows of A: B, from which each number is used but M times, takes longer to come from memory than the products do.
// Its rows are read where they stand, one behind another, and pass along all rows of A while they are in the first-level cache. Each number of C is one sum
// in one order, whatever M: a text that is decoded among few others has the bits that it has alone.
constexpr int FEW_ROWS = 8;

inline void matmul_few(int64_t M, int64_t N, int64_t K, real alpha, const real* A, int64_t lda, const real* B, int64_t ldb, real beta, real* C, int64_t ldc) {
    constexpr int64_t ahead = 2048 / sizeof(real);
#pragma omp parallel for schedule(dynamic, 16)  // not all threads get as much of the memory's rate
    for (int64_t j = 0; j < N; j++) {
        const real* row = B + j * ldb;
        for (int64_t i = 0, step; i < M; i += step) {
            step = i + 4 <= M ? 4 : 1;
            real product[4];
            (step == 4 ? row_products<4, 1, NV> : row_products<1, 1, NV>)(K, A + i * lda, lda, &row, 0, ahead, product);
            for (int64_t n = i; n < i + step; n++) C[n * ldc + j] = alpha * product[n - i] + (beta == 0 ? 0 : beta * C[n * ldc + j]);
        }
    }
}

#ifndef NO_CBLAS
inline void cblas_gemm(CBLAS_TRANSPOSE ta, CBLAS_TRANSPOSE tb, int M, int N, int K, float alpha, const float* A, int lda, const float* B, int ldb, float beta,
                       float* C, int ldc) {
    cblas_sgemm(CblasRowMajor, ta, tb, M, N, K, alpha, A, lda, B, ldb, beta, C, ldc);
}
inline void cblas_gemm(CBLAS_TRANSPOSE ta, CBLAS_TRANSPOSE tb, int M, int N, int K, double alpha, const double* A, int lda, const double* B, int ldb,
                       double beta, double* C, int ldc) {
    cblas_dgemm(CblasRowMajor, ta, tb, M, N, K, alpha, A, lda, B, ldb, beta, C, ldc);
}
// OpenBLAS picks its kernels when it starts. On a processor newer than itself, or told so by OPENBLAS_CORETYPE, it may take those of an older generation
// than this program was compiled for: the built-in product is then the faster one (dev/LOG.md has the figures).
inline bool cblas_is_outdated() {
#if defined(OPENBLAS_VERSION) && defined(__AVX2__)
    static const bool outdated = [] {
#ifdef __AVX512F__
        const char* good[] = {"SkylakeX", "Cooperlake", "SapphireRapids"};
#else
        const char* good[] = {"Haswell", "Zen", "Excavator", "SkylakeX", "Cooperlake", "SapphireRapids"};
#endif
        for (const char* core : good)
            if (!strcmp(openblas_get_corename(), core)) return false;
        return true;
    }();
    return outdated;
#else
    return false;
#endif
}
#endif

// Benchmarks put a list here, and find in it the products of a step, to time them alone.
struct MatmulCall {
    Transpose ta, tb;
    int64_t M, N, K;
    real alpha;
    const real* A;
    int64_t lda;
    const real* B;
    int64_t ldb;
    real beta;
    real* C;
    int64_t ldc;
};
inline std::vector<MatmulCall>* matmul_log = nullptr;

inline void matmul(Transpose ta, Transpose tb, int64_t M, int64_t N, int64_t K, real alpha, const real* A, int64_t lda, const real* B, int64_t ldb, real beta,
                   real* C, int64_t ldc) {
    if (M == 0 || N == 0) return;
    if (matmul_log) matmul_log->push_back({ta, tb, M, N, K, alpha, A, lda, B, ldb, beta, C, ldc});
    if (ta == NO && tb == YES && M <= FEW_ROWS) {
        matmul_few(M, N, K, alpha, A, lda, B, ldb, beta, C, ldc);
        return;
    }
#ifdef NO_CBLAS
    matmul_builtin(ta, tb, M, N, K, alpha, A, lda, B, ldb, beta, C, ldc);
#else
    if (cblas_is_outdated()) {
        matmul_builtin(ta, tb, M, N, K, alpha, A, lda, B, ldb, beta, C, ldc);
        return;
    }
    assert(std::max({M, N, K, lda, ldb, ldc}) < INT32_MAX);
    cblas_gemm(ta == NO ? CblasNoTrans : CblasTrans, tb == NO ? CblasNoTrans : CblasTrans, (int)M, (int)N, (int)K, alpha, A, (int)lda, B, (int)ldb, beta, C,
               (int)ldc);
#endif
}

}  // namespace cpu
