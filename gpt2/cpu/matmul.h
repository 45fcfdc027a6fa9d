// Matrix products on the CPU.
//
//   matmul        the large ones: a CBLAS (OpenBLAS, MKL, BLIS, Accelerate), or without one (-DNO_CBLAS) matmul_builtin, which is also the reference
//   tile_matmul   the small ones, from cache to cache, inside one thread: what attention is made of. A library's call costs as much as the product there
//
// All matrices are row-major. `real` is float; compiled with -DREAL=double the same source gives the float64 program for gradient checks.
#pragma once

#include <algorithm>
#include <cassert>
#include <cstdint>
#include <vector>
#ifdef _OPENMP
#include <omp.h>
#endif
#ifndef NO_CBLAS
#ifdef __APPLE__
#include <Accelerate/Accelerate.h>
#else
#include <cblas.h>
#endif
#endif

#ifndef REAL
#define REAL float
#endif
typedef REAL real;

namespace cpu {

inline int num_threads() {
#ifdef _OPENMP
    return omp_get_max_threads();
#else
    return 1;
#endif
}

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

template <int V>
inline void tile_columns(int m, int k, const real* a, int64_t ai, int64_t ap, const real* b, int64_t ldb, real* c, int64_t ldc, bool accumulate) {
    int i = 0;
    for (; i + MR <= m; i += MR) tile_kernel<MR, V>(k, a + i * ai, ai, ap, b, ldb, c + i * ldc, ldc, accumulate);
    for (; i + 2 <= m; i += 2) tile_kernel<2, V>(k, a + i * ai, ai, ap, b, ldb, c + i * ldc, ldc, accumulate);
    for (; i < m; i++) tile_kernel<1, V>(k, a + i * ai, ai, ap, b, ldb, c + i * ldc, ldc, accumulate);
}

inline void tile_matmul(int m, int n, int k, const real* a, int64_t ai, int64_t ap, const real* b, int64_t ldb, real* c, int64_t ldc, bool accumulate) {
    int j = 0;
    for (; j + NV * W <= n; j += NV * W) tile_columns<NV>(m, k, a, ai, ap, b + j, ldb, c + j, ldc, accumulate);
    for (; j + W <= n; j += W) tile_columns<1>(m, k, a, ai, ap, b + j, ldb, c + j, ldc, accumulate);
    for (int i = 0; i < m && j < n; i++)
        for (int jj = j; jj < n; jj++) {
            real sum = accumulate ? c[i * ldc + jj] : 0;
            for (int p = 0; p < k; p++) sum += a[i * ai + p * ap] * b[p * ldb + jj];
            c[i * ldc + jj] = sum;
        }
}

// to (columns, rows) = transpose of from (rows, columns): rows of keys become the columns that tile_matmul wants.
inline void tile_transpose(int rows, int columns, const real* from, int64_t stride, real* to, int64_t to_stride) {
    constexpr int block = 16;
    for (int c0 = 0; c0 < columns; c0 += block)
        for (int r = 0; r < rows; r++)
            for (int c = c0; c < std::min(c0 + block, columns); c++) to[c * to_stride + r] = from[r * stride + c];
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

// Blocks of B (K_BLOCK x N_BLOCK, transposed if need be) are packed into cache by the thread that uses them; alpha goes into the packed block.
inline void matmul_builtin(Transpose ta, Transpose tb, int64_t M, int64_t N, int64_t K, real alpha, const real* A, int64_t lda, const real* B, int64_t ldb,
                           real beta, real* C, int64_t ldc) {
    constexpr int64_t M_BLOCK = 192, N_BLOCK = NV * W, K_BLOCK = 384;
    int64_t ai = ta == NO ? lda : 1, ap = ta == NO ? 1 : lda;
    // Few wide strips when M is small (packing is shared by more rows), more blocks along M when N is.
    int64_t n_blocks = (N + N_BLOCK - 1) / N_BLOCK, m_block = n_blocks >= 4 * num_threads() ? M : M_BLOCK;
    int64_t m_blocks = m_block > 0 ? (M + m_block - 1) / m_block : 0;
#pragma omp parallel
    {
        std::vector<real> pack(K_BLOCK * N_BLOCK);
#pragma omp for collapse(2) schedule(dynamic)
        for (int64_t mb = 0; mb < m_blocks; mb++)
            for (int64_t nb = 0; nb < n_blocks; nb++) {
                int64_t i0 = mb * m_block, m = std::min(m_block, M - i0), j0 = nb * N_BLOCK, n = std::min(N_BLOCK, N - j0);
                for (int64_t i = i0; i < i0 + m; i++)  // beta 0 must overwrite NaN
                    for (int64_t j = j0; j < j0 + n; j++) C[i * ldc + j] = beta == 0 ? 0 : beta * C[i * ldc + j];
                for (int64_t p0 = 0; p0 < K; p0 += K_BLOCK) {
                    int64_t k = std::min(K_BLOCK, K - p0);
                    for (int64_t p = 0; p < k; p++)
                        for (int64_t j = 0; j < n; j++) pack[p * n + j] = alpha * (tb == NO ? B[(p0 + p) * ldb + j0 + j] : B[(j0 + j) * ldb + p0 + p]);
                    tile_matmul((int)m, (int)n, (int)k, A + i0 * ai + p0 * ap, ai, ap, pack.data(), n, C + i0 * ldc + j0, ldc, true);
                }
            }
    }
}

#ifndef NO_CBLAS
inline void cblas_gemm(CBLAS_TRANSPOSE ta, CBLAS_TRANSPOSE tb, int M, int N, int K, float alpha, const float* A, int lda, const float* B, int ldb, float beta,
                       float* C, int ldc) {
    cblas_sgemm(CblasRowMajor, ta, tb, M, N, K, alpha, A, lda, B, ldb, beta, C, ldc);
}
inline void cblas_gemm(CBLAS_TRANSPOSE ta, CBLAS_TRANSPOSE tb, int M, int N, int K, double alpha, const double* A, int lda, const double* B, int ldb, double beta,
                       double* C, int ldc) {
    cblas_dgemm(CblasRowMajor, ta, tb, M, N, K, alpha, A, lda, B, ldb, beta, C, ldc);
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
#ifdef NO_CBLAS
    matmul_builtin(ta, tb, M, N, K, alpha, A, lda, B, ldb, beta, C, ldc);
#else
    assert(std::max({M, N, K, lda, ldb, ldc}) < INT32_MAX);
    cblas_gemm(ta == NO ? CblasNoTrans : CblasTrans, tb == NO ? CblasNoTrans : CblasTrans, (int)M, (int)N, (int)K, alpha, A, (int)lda, B, (int)ldb, beta, C, (int)ldc);
#endif
}

}  // namespace cpu
