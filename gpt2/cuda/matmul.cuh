// Matrix products through cuBLASLt (STUB: declarations only, being written).
#pragma once

#include "common.cuh"

namespace gpu {

enum Transpose { NO, YES };

// What cuBLASLt does to the product before it is written.
struct MatmulEpilogue {
    const floatX* bias = nullptr;         // (N), added to every row
    const floatX* residual = nullptr;     // (M,N), rows ldc apart: C = residual + ...; beta must be 0
    floatX* gelu_input = nullptr;         // (M,N), rows ldc apart: C = GELU(y), y = product + bias, and y is written here
    const floatX* dgelu_input = nullptr;  // (M,N), rows ldc apart: C = product ⊙ GELU'(dgelu_input)
};
struct MatmulBatch {
    int count = 1;
    int64_t a = 0, b = 0, c = 0;  // strides between one product's matrices and the next one's
};

// C (M,N) = alpha·op(A)·op(B) + beta·C, row-major with rows lda, ldb, ldc apart as in cpu::matmul; Out is floatX or float.
template <class Out>
void matmul(cudaStream_t stream, Transpose ta, Transpose tb, int64_t M, int64_t N, int64_t K, float alpha, const floatX* A, int64_t lda, const floatX* B,
            int64_t ldb, float beta, Out* C, int64_t ldc, const MatmulEpilogue& epilogue = {}, const MatmulBatch& batch = {});

// out (N,OC) = x·Wᵀ + b; x (N,C), W (OC,C), b (OC) or null.
void linear_forward(cudaStream_t stream, floatX* out, const floatX* x, const floatX* w, const floatX* b, int64_t N, int64_t C, int64_t OC,
                    const floatX* residual = nullptr);
// dx (N,C) = (or +=) dout·W;  dW (OC,C) += doutᵀ·x;  db (OC) += Σ_n dout. dx, db may be null; rows of dout are dout_stride apart (0: OC).
void linear_backward(cudaStream_t stream, floatX* dx, bool accumulate_dx, float* dw, float* db, const floatX* dout, const floatX* x, const floatX* w,
                     int64_t N, int64_t C, int64_t OC, int64_t dout_stride = 0);

}  // namespace gpu
