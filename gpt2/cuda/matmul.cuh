// Matrix products and the linear layer: cuBLASLt, with kernels of our own for what it refuses and, on Hopper, for what it does more slowly
// (matmul_hopper.cuh, matmul_fused_hopper.cuh).
//
//     C (M,N) = alpha·op(A) (M,K) · op(B) (K,N) + beta·C        row-major; inputs floatX, sums float32, C floatX or float32
//
// 1. epilogues   what happens to a product before it is written: bias, residual, GELU forward and backward
// 2. our own     matmul_kernel2 for any size and stride, epilogue_kernel behind a product
// 3. plans       how a product of one shape is computed is decided once, at its first call, and can be stored with a run
// 4. cuBLASLt    descriptors, candidates, tuning
// 5. matmul, linear_forward, linear_backward and their GELU forms
//
// cuBLASLt counts in columns. The memory of a row-major matrix, read in columns, is its transpose, so it is asked for Cᵀ = op(B)ᵀ·op(A)ᵀ: B comes first,
// "rows of D" in its documentation are our columns, and a bias for each row of D is our bias (N).
//
// float32 builds compute in float32 (CUBLAS_COMPUTE_32F never rounds inputs to TF32; only the ..._FAST_... types do).
//
// Same call, same bits: a plan is fixed for the process, and algorithms are admitted only if they sum along K in one piece, or in pieces that are left in
// float32 in the workspace and added up by a second step. The other ways of splitting K add in C's own type: they round to bf16 between the pieces.
#pragma once

#include <cublasLt.h>

#include <algorithm>
#include <array>
#include <map>
#include <sstream>
#include <string>
#include <type_traits>
#include <vector>

#include "bias.cuh"
#include "common.cuh"
#include "gelu.cuh"
#include "matmul_fused_hopper.cuh"
#include "matmul_hopper.cuh"
#include "numbers.cuh"

#define CUBLAS_CHECK(call) ::gpu::cublas_check((call), #call, __FILE__, __LINE__)

namespace gpu {

inline void cublas_check(cublasStatus_t status, const char* what, const char* file, int line) {
    if (status == CUBLAS_STATUS_SUCCESS) return;
    data_error("cuBLASLt: %s (%s, %s:%d)", cublasLtGetStatusString(status), what, file, line);
}

enum Transpose { NO, YES };

// --------------------------------------------------------------------------------------------------------------------------------------------------
// 1. Epilogues

// What is done to y = alpha·product + beta·C before it is written: the bias is added, GELU or its derivative applied, the residual added. Arrays of (M,N) have
// rows ldc apart, and are not C itself unless it says so.
struct MatmulEpilogue {
    const floatX* bias = nullptr;         // (N), added to every row
    const floatX* residual = nullptr;     // (M,N), may be C: C = residual + ...; beta must be 0
    floatX* gelu_input = nullptr;         // (M,N): C = GELU(y), and y is written here; beta must be 0
    const floatX* dgelu_input = nullptr;  // (M,N): C = y ⊙ GELU'(dgelu_input); beta must be 0
    float* column_sums = nullptr;         // (N), with dgelu_input: += the sums of C's columns
};
struct MatmulBatch {
    int count = 1;
    int64_t a = 0, b = 0, c = 0;  // strides between one product's matrices and the next one's; all share the bias
};

template <class Out>
struct MatmulCall {
    Transpose ta, tb;
    int64_t M, N, K;
    float alpha;
    const floatX* A;
    int64_t lda;
    const floatX* B;
    int64_t ldb;
    float beta;
    Out* C;
    int64_t ldc;
    MatmulEpilogue epilogue;
    MatmulBatch batch;

    bool has_epilogue() const { return epilogue.bias || epilogue.residual || epilogue.gelu_input || epilogue.dgelu_input; }
};

// y: W neighbouring elements of a row from column j on, which stand at `at` in C and in the epilogue's matrices.
// cuBLASLt's GELU is the tanh form too.
template <int W>
__device__ inline void apply_epilogue(const MatmulEpilogue& e, Numbers<W>& y, int64_t at, int64_t j) {
    if (e.bias) {
        Numbers<W> bias = load_numbers<W>(e.bias + j);
        for (int k = 0; k < W; k++) y[k] += bias[k];
    }
    if (e.gelu_input) {
        store_numbers<W>(e.gelu_input + at, y);
        for (int k = 0; k < W; k++) y[k] = gelu(y[k]);
    }
    if (e.dgelu_input) {
        Numbers<W> x = load_numbers<W>(e.dgelu_input + at);
        for (int k = 0; k < W; k++) y[k] *= gelu_gradient(x[k]);
    }
    if (e.residual) {
        Numbers<W> residual = load_numbers<W>(e.residual + at);
        for (int k = 0; k < W; k++) y[k] += residual[k];
    }
}

// --------------------------------------------------------------------------------------------------------------------------------------------------
// 2. Our own kernels

// A block computes a tile of 128 x 128 of C, 16 steps of K at a time: both operands' pieces go into shared memory as float32, turned so that K comes first;
// each of 256 threads holds 8 x 8 sums and reads 16 numbers for 64 multiply-adds. Its rows are 4·y.. and 64 + 4·y.., its columns 4·x.. and 64 + 4·x..:
// then the 16-byte reads of a warp touch every bank once. Any size, stride and transpose: element (i,p) of op(A) is A[i·ai + p·ap].
template <class Out>
__global__ void __launch_bounds__(256) matmul_kernel2(MatmulCall<Out> m) {
    constexpr int TILE = 128, DEPTH = 16;
    __shared__ alignas(16) float a_tile[DEPTH][TILE + 4], b_tile[DEPTH][TILE + 4];  // + 4: threads that write along K write to different banks
    int64_t rows = ceil_div(m.M, TILE), columns = ceil_div(m.N, TILE), tile = blockIdx.x, batch = tile / columns / rows;
    int64_t i0 = tile / columns % rows * TILE, j0 = tile % columns * TILE;
    const floatX *A = m.A + batch * m.batch.a, *B = m.B + batch * m.batch.b;
    int64_t ai = m.ta == YES ? 1 : m.lda, ap = m.ta == YES ? m.lda : 1, bj = m.tb == YES ? m.ldb : 1, bp = m.tb == YES ? 1 : m.ldb;
    int x = threadIdx.x % 16, y = threadIdx.x / 16;

    float sum[8][8] = {};
    for (int64_t p0 = 0; p0 < m.K; p0 += DEPTH) {
        // Neighbouring threads read along the operand's rows.
        for (int l = threadIdx.x; l < TILE * DEPTH; l += 256) {
            int i = m.ta == YES ? l % TILE : l / DEPTH, p = m.ta == YES ? l / TILE : l % DEPTH;
            a_tile[p][i] = i0 + i < m.M && p0 + p < m.K ? to_float(A[(i0 + i) * ai + (p0 + p) * ap]) : 0;
        }
        for (int l = threadIdx.x; l < TILE * DEPTH; l += 256) {
            int j = m.tb == YES ? l / DEPTH : l % TILE, p = m.tb == YES ? l % DEPTH : l / TILE;
            b_tile[p][j] = j0 + j < m.N && p0 + p < m.K ? to_float(B[(j0 + j) * bj + (p0 + p) * bp]) : 0;
        }
        __syncthreads();
        for (int p = 0; p < DEPTH; p++) {
            float4 a[2] = {*(float4*)&a_tile[p][4 * y], *(float4*)&a_tile[p][64 + 4 * y]};
            float4 b[2] = {*(float4*)&b_tile[p][4 * x], *(float4*)&b_tile[p][64 + 4 * x]};
            float ra[8] = {a[0].x, a[0].y, a[0].z, a[0].w, a[1].x, a[1].y, a[1].z, a[1].w};
            float rb[8] = {b[0].x, b[0].y, b[0].z, b[0].w, b[1].x, b[1].y, b[1].z, b[1].w};
#pragma unroll
            for (int r = 0; r < 8; r++)
#pragma unroll
                for (int c = 0; c < 8; c++) sum[r][c] += ra[r] * rb[c];
        }
        __syncthreads();
    }

#pragma unroll
    for (int r = 0; r < 8; r++)
#pragma unroll
        for (int c = 0; c < 8; c++) {
            int64_t i = i0 + 4 * y + r % 4 + r / 4 * 64, j = j0 + 4 * x + c % 4 + c / 4 * 64, at = batch * m.batch.c + i * m.ldc + j;
            if (i >= m.M || j >= m.N) continue;
            Numbers<1> v;
            v[0] = m.alpha * sum[r][c];
            if (m.beta != 0) v[0] += m.beta * to_float(m.C[at]);  // beta 0: what stands in C may be NaN
            apply_epilogue(m.epilogue, v, at, j);
            m.C[at] = from_float<Out>(v[0]);
        }
}
template <class Out>
inline void matmul_own(cudaStream_t stream, const MatmulCall<Out>& call) {
    int64_t tiles = call.batch.count * ceil_div(call.M, 128) * ceil_div(call.N, 128);
    assert(tiles <= INT32_MAX);
    matmul_kernel2<Out><<<(unsigned)tiles, 256, 0, stream>>>(call);
    LAUNCH_CHECK();
}

// The epilogue alone, over a product that stands in C already. One block a row.
template <class Out, int W>
__global__ void epilogue_kernel(MatmulCall<Out> m) {
    int64_t row = blockIdx.x, start = m.batch.count == 1 ? row * m.ldc : row / m.M * m.batch.c + row % m.M * m.ldc;
    for (int64_t j = (int64_t)threadIdx.x * W; j < m.N; j += (int64_t)blockDim.x * W) {
        Numbers<W> y = load_numbers<W>(m.C + start + j);
        apply_epilogue(m.epilogue, y, start + j, j);
        store_numbers<W>(m.C + start + j, y);
    }
}
template <class Out>
inline void apply_epilogue(cudaStream_t stream, const MatmulCall<Out>& call) {
    const MatmulEpilogue& e = call.epilogue;
    int64_t rows = call.batch.count * call.M;
    assert(rows <= INT32_MAX);
    auto threads = [&](int w) { return (unsigned)std::min<int64_t>(256, round_up(ceil_div(call.N, w), 32)); };
    if constexpr (std::is_same_v<Out, floatX>) {
        constexpr int W = Packed<floatX>::size;
        bool aligned = call.N % W == 0 && call.ldc % W == 0 && (call.batch.count == 1 || call.batch.c % W == 0) && aligned16(call.C) && aligned16(e.bias) &&
                       aligned16(e.residual) && aligned16(e.gelu_input) && aligned16(e.dgelu_input);
        if (aligned) {
            epilogue_kernel<Out, W><<<(unsigned)rows, threads(W), 0, stream>>>(call);
            LAUNCH_CHECK();
            return;
        }
    }
    epilogue_kernel<Out, 1><<<(unsigned)rows, threads(1), 0, stream>>>(call);
    LAUNCH_CHECK();
}

// --------------------------------------------------------------------------------------------------------------------------------------------------
// 3. Plans

// All that cuBLASLt's choice may depend on (matmul_key() has the list), so that two calls with the same key are computed in the same way.
using MatmulKey = std::array<int64_t, 21>;
enum { KEY_EPILOGUE = 10, KEY_ALIGN_A = 12, KEY_ALIGN_B, KEY_ALIGN_C, KEY_ALIGN_MATRIX, KEY_ALIGN_BIAS };

struct MatmulPlan {
    // HOPPER: our own for Hopper. SEPARATE: the product by itself, which has a plan of its own, then the epilogue's kernels
    enum How { UNDECIDED, CUBLASLT, SEPARATE, OWN, HOPPER };
    How how = UNDECIDED;
    cublasLtMatmulAlgo_t algorithm = {};  // a plain value, valid for this version of cuBLASLt
    bool described = false;               // what follows is filled in at the first call
    cublasLtMatmulDescOpaque_t operation = {};
    cublasLtMatrixLayoutOpaque_t a = {}, b = {}, c = {};
};

inline std::map<MatmulKey, MatmulPlan>& matmul_plan_map() {
    static std::map<MatmulKey, MatmulPlan> plans;
    return plans;
}
inline bool& matmul_tuning() {
    static bool tuning = false;
    return tuning;
}

// While it is on, plans are made by timing the candidates instead of taking cuBLASLt's word for it. That takes a second or so for all products of a model;
// it allocates and waits, which nothing else here does. Plans that have been made stay as they are.
inline void set_matmul_tuning(bool on) { matmul_tuning() = on; }

// Plans hold for one version of cuBLASLt, one kind of GPU and one working type.
inline std::string matmul_plans_header() {
    const cudaDeviceProp& device = device_properties();
    return format("matmul plans: cuBLASLt %zu, %s with %d multiprocessors, %s%s", cublasLtGetVersion(), device.name, device.multiProcessorCount, dtype_name,
                  sizeof(floatX) == 2 && hopper_code() ? ", wgmma" : "");
}

// All plans of this process as text, for load_matmul_plans in a later one: with a run's plans its products have the same bits again, as long as it is the same
// build of this program (a plan says which kernel, not how that was written).
inline std::string matmul_plans() {
    std::string text = matmul_plans_header() + "\n";
    for (const auto& [key, plan] : matmul_plan_map()) {
        for (int64_t k : key) text += format("%lld ", (long long)k);
        text += plan.how == MatmulPlan::CUBLASLT   ? "cublaslt"
                : plan.how == MatmulPlan::SEPARATE ? "separate"
                : plan.how == MatmulPlan::HOPPER   ? "hopper"
                                                   : "own";
        if (plan.how == MatmulPlan::CUBLASLT)
            for (uint64_t word : plan.algorithm.data) text += format(" %016llx", (unsigned long long)word);
        text += "\n";
    }
    return text;
}

// These plans instead of those there are; data_error if they are for another machine, or damaged.
inline void load_matmul_plans(const std::string& text) {
    std::istringstream lines(text);
    std::string line, header = matmul_plans_header();
    std::getline(lines, line);
    if (line != header)
        data_error("'%.160s' do not fit here, where they would be '%s': delete them to have new ones (results may then differ in their last bits)",
                   line.c_str(), header.c_str());
    std::map<MatmulKey, MatmulPlan> plans;
    for (int number = 2; std::getline(lines, line); number++) {
        std::istringstream words(line);
        MatmulKey key;
        MatmulPlan plan;
        std::string how, rest;
        for (int64_t& k : key) words >> k;
        words >> how;
        plan.how = how == "cublaslt"   ? MatmulPlan::CUBLASLT
                   : how == "separate" ? MatmulPlan::SEPARATE
                   : how == "own"      ? MatmulPlan::OWN
                   : how == "hopper"   ? MatmulPlan::HOPPER
                                       : MatmulPlan::UNDECIDED;
        if (plan.how == MatmulPlan::CUBLASLT)
            for (uint64_t& word : plan.algorithm.data) words >> std::hex >> word;
        bool sound = !words.fail() && plan.how != MatmulPlan::UNDECIDED && !(words >> rest);
        if (!sound || !plans.emplace(key, plan).second) data_error("line %d of the matmul plans is damaged: delete them to have new ones", number);
    }
    matmul_plan_map() = std::move(plans);
}

// The alignment, at most 16 bytes, of an array's rows: of its address and of each stride (in elements).
template <class T>
inline int64_t matmul_alignment(const T* p, std::initializer_list<int64_t> strides) {
    int64_t bits = (int64_t)(uintptr_t)p | 16;
    for (int64_t s : strides) bits |= s * (int64_t)sizeof(T);
    return bits & -bits;
}

// cuBLASLt's name for the call's epilogue, 0 if it has none. Its bias has C's type, its GELU input rows of a multiple of 8 elements. How exactly it computes
// GELU it does not say: good enough for bf16, but float32 takes our own.
template <class Out>
inline int cublaslt_epilogue(const MatmulCall<Out>& call) {
    const MatmulEpilogue& e = call.epilogue;
    if (!call.has_epilogue()) return CUBLASLT_EPILOGUE_DEFAULT;
    if (!std::is_same_v<Out, floatX> || call.batch.count > 1) return 0;
    if (e.gelu_input || e.dgelu_input) {
        if (sizeof(floatX) == 4 || e.residual || call.ldc % 8 != 0 || (e.bias && e.dgelu_input)) return 0;
        return e.dgelu_input ? CUBLASLT_EPILOGUE_DGELU : e.bias ? CUBLASLT_EPILOGUE_GELU_AUX_BIAS : CUBLASLT_EPILOGUE_GELU_AUX;
    }
    return e.bias ? CUBLASLT_EPILOGUE_BIAS : CUBLASLT_EPILOGUE_DEFAULT;  // the residual is cuBLASLt's C, ours is its D
}

template <class Out>
inline MatmulKey matmul_key(const MatmulCall<Out>& call) {
    const MatmulEpilogue& e = call.epilogue;
    MatmulBatch batch = call.batch.count == 1 ? MatmulBatch{} : call.batch;
    const floatX* matrix = e.residual ? e.residual : e.gelu_input ? e.gelu_input : e.dgelu_input;
    return {call.ta,
            call.tb,
            call.M,
            call.N,
            call.K,
            call.lda,
            call.ldb,
            call.ldc,
            (int64_t)sizeof(Out),
            call.beta != 0,
            cublaslt_epilogue(call),  // 0: none it has
            (e.residual != nullptr) + 2 * (e.column_sums != nullptr),
            matmul_alignment(call.A, {call.lda, batch.a}),
            matmul_alignment(call.B, {call.ldb, batch.b}),
            matmul_alignment(call.C, {call.ldc, batch.c}),
            matmul_alignment(matrix, {call.ldc, batch.c}),
            matmul_alignment(e.bias, {}),
            batch.count,
            batch.a,
            batch.b,
            batch.c};
}

// --------------------------------------------------------------------------------------------------------------------------------------------------
// 4. cuBLASLt

constexpr size_t CUBLASLT_WORKSPACE = 32 << 20;  // of workspace(); what NVIDIA recommends for Hopper

inline cublasLtHandle_t cublaslt() {
    static const cublasLtHandle_t handle = [] {
        cublasLtHandle_t h;
        CUBLAS_CHECK(cublasLtCreate(&h));
        return h;
    }();
    return handle;
}

template <class T>
inline void set_attribute(cublasLtMatmulDesc_t operation, cublasLtMatmulDescAttributes_t attribute, const T& value) {
    CUBLAS_CHECK(cublasLtMatmulDescSetAttribute(operation, attribute, &value, sizeof value));
}

// The epilogue's arrays: they are part of the description, not arguments.
template <class Out>
inline void set_epilogue_pointers(const MatmulCall<Out>& call, MatmulPlan& plan) {
    const MatmulEpilogue& e = call.epilogue;
    const floatX* aux = e.gelu_input ? e.gelu_input : e.dgelu_input;
    if (aux) set_attribute(&plan.operation, CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_POINTER, aux);
    if (e.bias) set_attribute(&plan.operation, CUBLASLT_MATMUL_DESC_BIAS_POINTER, e.bias);
}

template <class Out>
inline void matmul_describe(const MatmulCall<Out>& call, MatmulPlan& plan) {
    const cudaDataType_t in = sizeof(floatX) == 2 ? CUDA_R_16BF : CUDA_R_32F, out = sizeof(Out) == 2 ? CUDA_R_16BF : CUDA_R_32F;
    const MatmulEpilogue& e = call.epilogue;
    auto layout = [&](cublasLtMatrixLayoutOpaque_t& l, cudaDataType_t type, int64_t rows, int64_t columns, int64_t ld, int64_t stride) {
        CUBLAS_CHECK(cublasLtMatrixLayoutInit(&l, type, rows, columns, ld));
        if (call.batch.count == 1) return;
        int32_t count = call.batch.count;
        CUBLAS_CHECK(cublasLtMatrixLayoutSetAttribute(&l, CUBLASLT_MATRIX_LAYOUT_BATCH_COUNT, &count, sizeof count));
        CUBLAS_CHECK(cublasLtMatrixLayoutSetAttribute(&l, CUBLASLT_MATRIX_LAYOUT_STRIDED_BATCH_OFFSET, &stride, sizeof stride));
    };
    // Counted in columns: rows are what is contiguous.
    layout(plan.a, in, call.ta == YES ? call.M : call.K, call.ta == YES ? call.K : call.M, call.lda, call.batch.a);
    layout(plan.b, in, call.tb == YES ? call.K : call.N, call.tb == YES ? call.N : call.K, call.ldb, call.batch.b);
    layout(plan.c, out, call.N, call.M, call.ldc, call.batch.c);
    CUBLAS_CHECK(cublasLtMatmulDescInit(&plan.operation, CUBLAS_COMPUTE_32F, CUDA_R_32F));
    set_attribute(&plan.operation, CUBLASLT_MATMUL_DESC_TRANSA, call.tb == YES ? CUBLAS_OP_T : CUBLAS_OP_N);  // B comes first
    set_attribute(&plan.operation, CUBLASLT_MATMUL_DESC_TRANSB, call.ta == YES ? CUBLAS_OP_T : CUBLAS_OP_N);
    set_attribute(&plan.operation, CUBLASLT_MATMUL_DESC_EPILOGUE, (uint32_t)cublaslt_epilogue(call));
    if (e.gelu_input || e.dgelu_input) set_attribute(&plan.operation, CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_LD, call.ldc);
    plan.described = true;
}

// cuBLASLt's proposals, the one it thinks fastest first.
template <class Out>
inline std::vector<cublasLtMatmulAlgo_t> matmul_candidates(const MatmulCall<Out>& call, const MatmulKey& key, MatmulPlan& plan) {
    constexpr uint32_t exact_reductions = CUBLASLT_REDUCTION_SCHEME_NONE | CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE;
    cublasLtMatmulPreferenceOpaque_t preference;
    CUBLAS_CHECK(cublasLtMatmulPreferenceInit(&preference));
    auto set = [&](cublasLtMatmulPreferenceAttributes_t attribute, auto value) {
        CUBLAS_CHECK(cublasLtMatmulPreferenceSetAttribute(&preference, attribute, &value, sizeof value));
    };
    set(CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, (uint64_t)CUBLASLT_WORKSPACE);
    set(CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK, exact_reductions);
    set(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, (uint32_t)key[KEY_ALIGN_B]);  // B comes first
    set(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES, (uint32_t)key[KEY_ALIGN_A]);
    set(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, (uint32_t)(call.epilogue.residual ? key[KEY_ALIGN_MATRIX] : key[KEY_ALIGN_C]));
    set(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES, (uint32_t)key[KEY_ALIGN_C]);
    // It does not follow the epilogue's pointers, but reads off them how they are aligned: as the key says, and no better.
    MatmulCall<Out> aligned = call;
    if (call.epilogue.gelu_input) aligned.epilogue.gelu_input = (floatX*)(uintptr_t)key[KEY_ALIGN_MATRIX];
    if (call.epilogue.dgelu_input) aligned.epilogue.dgelu_input = (const floatX*)(uintptr_t)key[KEY_ALIGN_MATRIX];
    if (call.epilogue.bias) aligned.epilogue.bias = (const floatX*)(uintptr_t)key[KEY_ALIGN_BIAS];
    set_epilogue_pointers(aligned, plan);

    std::array<cublasLtMatmulHeuristicResult_t, 16> results;
    int found = 0;
    cublasStatus_t status = cublasLtMatmulAlgoGetHeuristic(cublaslt(), &plan.operation, &plan.b, &plan.a, &plan.c, &plan.c, &preference, (int)results.size(),
                                                           results.data(), &found);
    if (status != CUBLAS_STATUS_SUCCESS) found = 0;
    std::vector<cublasLtMatmulAlgo_t> list;
    for (int i = 0; i < found; i++) {
        uint32_t reduction = 0;
        size_t written;
        status = cublasLtMatmulAlgoConfigGetAttribute(&results[i].algo, CUBLASLT_ALGO_CONFIG_REDUCTION_SCHEME, &reduction, sizeof reduction, &written);
        bool exact = status == CUBLAS_STATUS_SUCCESS && (reduction & ~exact_reductions) == 0;
        if (results[i].state == CUBLAS_STATUS_SUCCESS && results[i].workspaceSize <= CUBLASLT_WORKSPACE && exact) list.push_back(results[i].algo);
    }
    return list;
}

template <class Out>
inline cublasStatus_t launch_cublaslt(cudaStream_t stream, const MatmulCall<Out>& call, MatmulPlan& plan, const cublasLtMatmulAlgo_t& algorithm) {
    const MatmulEpilogue& e = call.epilogue;
    set_epilogue_pointers(call, plan);
    const void* c = e.residual ? (const void*)e.residual : call.C;
    float beta = e.residual ? 1 : call.beta;
    cublasStatus_t status = cublasLtMatmul(cublaslt(), &plan.operation, &call.alpha, call.B, &plan.b, call.A, &plan.a, &beta, c, &plan.c, call.C, &plan.c,
                                           &algorithm, workspace(), CUBLASLT_WORKSPACE, stream);
    if (status != CUBLAS_STATUS_SUCCESS) (void)cudaGetLastError();  // may hold the same complaint
    return status;
}

template <class Out>
void matmul(cudaStream_t stream, Transpose ta, Transpose tb, int64_t M, int64_t N, int64_t K, float alpha, const floatX* A, int64_t lda, const floatX* B,
            int64_t ldb, float beta, Out* C, int64_t ldc, const MatmulEpilogue& epilogue = {}, const MatmulBatch& batch = {});

// The sums of C's columns, in a pass of their own.
template <class Out>
inline void matmul_column_sums(cudaStream_t stream, const MatmulCall<Out>& c) {
    if constexpr (std::is_same_v<Out, floatX>)
        if (c.epilogue.column_sums) bias_backward(stream, c.epilogue.column_sums, c.C, c.M, c.N, c.ldc);
}
// The product, then its epilogue.
template <class Out>
inline void matmul_separate(cudaStream_t stream, const MatmulCall<Out>& c) {
    matmul<Out>(stream, c.ta, c.tb, c.M, c.N, c.K, c.alpha, c.A, c.lda, c.B, c.ldb, c.beta, c.C, c.ldc, {}, c.batch);
    apply_epilogue(stream, c);
}

// Milliseconds of five runs after a first one; infinite if run() fails.
template <class Run>
inline float matmul_milliseconds(cudaStream_t stream, Run run) {
    if (!run()) return INFINITY;
    cudaEvent_t begin, end;
    float ms = 0;
    CUDA_CHECK(cudaEventCreate(&begin));
    CUDA_CHECK(cudaEventCreate(&end));
    CUDA_CHECK(cudaEventRecord(begin, stream));
    for (int i = 0; i < 5; i++) run();
    CUDA_CHECK(cudaEventRecord(end, stream));
    CUDA_CHECK(cudaEventSynchronize(end));
    CUDA_CHECK(cudaEventElapsedTime(&ms, begin, end));
    CUDA_CHECK(cudaEventDestroy(begin));
    CUDA_CHECK(cudaEventDestroy(end));
    return ms;
}

// Our own kernels for Hopper, where they can do the call: false, and nothing has been done, where it can't. All but alpha is in the key.
template <class Out>
inline bool matmul_hopper(cudaStream_t stream, const MatmulCall<Out>& c) {
#ifndef GPU_FLOAT32
    if constexpr (std::is_same_v<Out, floatX>) {
        const MatmulEpilogue& e = c.epilogue;
        if (c.ta != NO || c.alpha != 1 || c.beta != 0 || c.batch.count > 1) return false;
        auto fused = [&](Fused what, const floatX* second, float* sums) {
            HopperFused m = {what, c.M, c.N, c.K, c.A, c.lda, c.B, c.ldb, c.C, c.ldc, e.bias, second, sums};
            return hopper_fused_takes(m) && (hopper_fused(stream, m), true);
        };
        if (c.tb == NO) {
            if (e.bias || e.residual || e.gelu_input) return false;
            return e.dgelu_input ? fused(Fused::GELU_BACKWARD, e.dgelu_input, e.column_sums) : fused(Fused::NOTHING, nullptr, nullptr);
        }
        if (e.dgelu_input || (e.gelu_input && e.residual)) return false;
        if (e.gelu_input) return fused(Fused::GELU, e.gelu_input, nullptr);
        if (e.residual) return fused(Fused::RESIDUAL, e.residual, nullptr);
        HopperMatmul m = {c.M, c.N, c.K, c.A, c.lda, c.B, c.ldb, c.C, c.ldc, e.bias};
        if (!hopper_matmul_takes(m)) return false;
        hopper_matmul(stream, m);
        return true;
    }
#endif
    (void)stream, (void)c;
    return false;
}
// Where they were faster than cuBLASLt's first choice, at GPT-2's sizes: tiles of 128 x 192 enough to go round, which C fills to nine tenths (as a whole where
// there is nothing behind the product), and sums that are not too long.
template <class Out>
inline bool matmul_hopper_first(const MatmulCall<Out>& c) {
    const MatmulEpilogue& e = c.epilogue;
    const int64_t rows = ceil_div(c.M, 128), columns = ceil_div(c.N, 192);
    if (rows * columns < 4 * device_properties().multiProcessorCount || 10 * c.N < 9 * 192 * columns) return false;
    if (e.gelu_input || e.dgelu_input) return c.K <= 2048;
    if (c.tb == NO) return c.K <= 4096 && c.N == 192 * columns;
    return e.residual ? c.K <= 8192 : c.K <= 2048 && c.N >= 2 * c.K;
}

// Times the candidates, and the separate way where there is an epilogue: fused is not always faster. The call's own buffers are used, since products of
// real numbers take longer than products of zeros. Where C is overwritten, running it again changes nothing. Where it is added to (beta), the runs add
// to memory allocated for this; if there is none, false: nothing has been decided.
template <class Out>
inline bool matmul_tune(cudaStream_t stream, const MatmulCall<Out>& call, MatmulPlan& plan, const std::vector<cublasLtMatmulAlgo_t>& list) {
    MatmulCall<Out> timed = call;
    int64_t c_size = call.beta == 0 ? 0 : (call.batch.count - 1) * call.batch.c + (call.M - 1) * call.ldc + call.N;
    if (c_size > 0) {
        if (cudaMalloc((void**)&timed.C, c_size * sizeof(Out)) != cudaSuccess) {
            (void)cudaGetLastError();
            return false;
        }
        CUDA_CHECK(cudaMemsetAsync(timed.C, 0, c_size * sizeof(Out), stream));
    }
    if (call.epilogue.column_sums) timed.epilogue.column_sums = (float*)((char*)workspace() + WORKSPACE_BYTES) - call.N;  // of no use to anybody
    float best = INFINITY;
    for (const cublasLtMatmulAlgo_t& algorithm : list) {
        float ms = matmul_milliseconds(stream, [&] {
            bool ran = launch_cublaslt(stream, timed, plan, algorithm) == CUBLAS_STATUS_SUCCESS;
            if (ran) matmul_column_sums(stream, timed);
            return ran;
        });
        if (!(ms < best)) continue;
        best = ms;
        plan.how = MatmulPlan::CUBLASLT;
        plan.algorithm = algorithm;
    }
    if (call.has_epilogue()) {
        float ms = matmul_milliseconds(stream, [&] { return matmul_separate(stream, timed), matmul_column_sums(stream, timed), true; });
        if (ms < best) plan.how = MatmulPlan::SEPARATE, best = ms;
    }
    if (matmul_milliseconds(stream, [&] { return matmul_hopper(stream, timed); }) < best) plan.how = MatmulPlan::HOPPER;
    if (c_size > 0) CUDA_CHECK(cudaFree(timed.C));
    return plan.how != MatmulPlan::UNDECIDED;
}

// The first call of a plan. True: the call has been done on the way.
template <class Out>
inline bool matmul_decide(cudaStream_t stream, const MatmulCall<Out>& call, const MatmulKey& key, MatmulPlan& plan) {
    if (key[KEY_EPILOGUE] != 0) {
        matmul_describe(call, plan);
        std::vector<cublasLtMatmulAlgo_t> list = matmul_candidates(call, key, plan);
        if (matmul_tuning()) {
            cudaStreamCaptureStatus capture;
            CUDA_CHECK(cudaStreamIsCapturing(stream, &capture));
            if (capture == cudaStreamCaptureStatusNone && matmul_tune(stream, call, plan, list)) return false;
        }
        if (matmul_hopper_first(call) && matmul_hopper(stream, call)) {
            plan.how = MatmulPlan::HOPPER;
            return true;
        }
        // A proposal may still be refused when it is launched.
        for (const cublasLtMatmulAlgo_t& algorithm : list) {
            if (launch_cublaslt(stream, call, plan, algorithm) != CUBLAS_STATUS_SUCCESS) continue;
            plan.how = MatmulPlan::CUBLASLT;
            plan.algorithm = algorithm;
            matmul_column_sums(stream, call);
            return true;
        }
    }
    plan.how = call.has_epilogue() ? MatmulPlan::SEPARATE : MatmulPlan::OWN;
    return false;
}

// --------------------------------------------------------------------------------------------------------------------------------------------------
// 5. The functions

// C (M,N) = alpha·op(A)·op(B) + beta·C, row-major with rows lda, ldb, ldc apart as in cpu::matmul; Out is floatX or float. Any size, stride and alignment.
// `batch`: several products, whose outputs do not overlap.
template <class Out>
void matmul(cudaStream_t stream, Transpose ta, Transpose tb, int64_t M, int64_t N, int64_t K, float alpha, const floatX* A, int64_t lda, const floatX* B,
            int64_t ldb, float beta, Out* C, int64_t ldc, const MatmulEpilogue& epilogue, const MatmulBatch& batch) {
    if (M == 0 || N == 0 || batch.count == 0) return;
    MatmulCall<Out> call = {ta, tb, M, N, K, alpha, A, lda, B, ldb, beta, C, ldc, epilogue, batch};
    MatmulEpilogue& e = call.epilogue;
    assert(beta == 0 || !(e.residual || e.gelu_input || e.dgelu_input));
    assert(!(e.gelu_input && e.dgelu_input) && (const void*)e.gelu_input != C && (const void*)e.dgelu_input != C);
    assert((const void*)e.residual != C || !(e.gelu_input || e.dgelu_input));
    assert(!e.column_sums || (e.dgelu_input && batch.count == 1));
    if (K == 0) {  // C = beta·C, and the epilogue
        matmul_own(stream, call);
        matmul_column_sums(stream, call);
        return;
    }
    if ((const void*)e.residual == C) {
        e.residual = nullptr;
        call.beta = 1;
    }
    MatmulKey key = matmul_key(call);
    MatmulPlan& plan = matmul_plan_map()[key];
    if (plan.how == MatmulPlan::UNDECIDED && matmul_decide(stream, call, key, plan)) return;
    switch (plan.how) {
        case MatmulPlan::CUBLASLT:
            if (!plan.described) {  // it has been loaded
                matmul_describe(call, plan);
                set_epilogue_pointers(call, plan);
                cublasLtMatmulHeuristicResult_t result;
                CUBLAS_CHECK(cublasLtMatmulAlgoCheck(cublaslt(), &plan.operation, &plan.b, &plan.a, &plan.c, &plan.c, &plan.algorithm, &result));
                if (result.workspaceSize > CUBLASLT_WORKSPACE) data_error("the matmul plans are damaged: delete them to have new ones");
            }
            CUBLAS_CHECK(launch_cublaslt(stream, call, plan, plan.algorithm));
            break;
        case MatmulPlan::SEPARATE:
            matmul_separate(stream, call);
            break;
        case MatmulPlan::HOPPER:
            if (matmul_hopper(stream, call)) return;
            matmul_own(stream, call);  // another alpha
            break;
        default:
            matmul_own(stream, call);
    }
    matmul_column_sums(stream, call);
}

// out (N,OC) = x·Wᵀ + b (+ residual); x (N,C), W (OC,C), b (OC) or null, residual (N,OC) or null, which may be out.
inline void linear_forward(cudaStream_t stream, floatX* out, const floatX* x, const floatX* w, const floatX* b, int64_t N, int64_t C, int64_t OC,
                           const floatX* residual = nullptr) {
    MatmulEpilogue epilogue;
    epilogue.bias = b;
    epilogue.residual = residual;
    matmul<floatX>(stream, NO, YES, N, OC, C, 1, x, C, w, C, 0, out, OC, epilogue);
}

// out (N,OC) = x·Wᵀ + b with some columns rotated (matmul_hopper.cuh). It never goes to cuBLASLt, which cannot rotate; our kernel is as fast. False, and
// nothing has been done, where there is no such kernel for it; launch = false: only asks.
inline bool linear_rotated_forward(cudaStream_t stream, floatX* out, const floatX* x, const floatX* w, const floatX* b, int64_t N, int64_t C, int64_t OC,
                                   const RotatedColumns& rotated, bool launch = true) {
#ifndef GPU_FLOAT32
    HopperMatmul m = {N, OC, C, x, C, w, C, out, OC, b, rotated};
    if ((rotated.head | rotated.offset | rotated.size) % 8 != 0 || (rotated.columns % 64 != 0 && rotated.columns != OC)) return false;
    if (rotated.head < 64 || rotated.size == 0 || rotated.size > 32 || N < 128 || !hopper_matmul_takes(m)) return false;
    if (launch) hopper_matmul(stream, m);
    return true;
#else
    (void)stream, (void)out, (void)x, (void)w, (void)b, (void)N, (void)C, (void)OC, (void)rotated, (void)launch;
    return false;
#endif
}

// fc (N,OC) = x·Wᵀ + b, gelu_out (N,OC) = GELU(fc): both are written, the backward pass needs fc.
inline void linear_gelu_forward(cudaStream_t stream, floatX* gelu_out, floatX* fc, const floatX* x, const floatX* w, const floatX* b, int64_t N, int64_t C,
                                int64_t OC) {
    MatmulEpilogue epilogue;
    epilogue.bias = b;
    epilogue.gelu_input = fc;
    matmul<floatX>(stream, NO, YES, N, OC, C, 1, x, C, w, C, 0, gelu_out, OC, epilogue);
}

// dW (OC,C) += doutᵀ·x;  db (OC) += Σ_n dout, null: none. Rows of dout (N,OC) are dout_stride apart.
// cuBLASLt offers db as an epilogue of the product, which reads dout anyway (BGRADB); but that takes longer than a pass of its own over dout does.
inline void weight_backward(cudaStream_t stream, float* dw, float* db, const floatX* dout, const floatX* x, int64_t N, int64_t C, int64_t OC,
                            int64_t dout_stride) {
    if (N == 0) return;
    matmul<float>(stream, YES, NO, OC, C, N, 1, dout, dout_stride, x, C, 1, dw, C);
    if (db) bias_backward(stream, db, dout, N, OC, dout_stride);
}

// dx (N,C) = (or +=) dout·W;  dW (OC,C) += doutᵀ·x;  db (OC) += Σ_n dout. dx, db may be null; rows of dout are dout_stride apart (0: OC).
inline void linear_backward(cudaStream_t stream, floatX* dx, bool accumulate_dx, float* dw, float* db, const floatX* dout, const floatX* x, const floatX* w,
                            int64_t N, int64_t C, int64_t OC, int64_t dout_stride = 0) {
    if (dout_stride == 0) dout_stride = OC;
    if (dx) matmul<floatX>(stream, NO, NO, N, C, OC, 1, dout, dout_stride, w, C, accumulate_dx ? 1 : 0, dx, C);
    weight_backward(stream, dw, db, dout, x, N, C, OC, dout_stride);
}

// The backward pass of y = GELU(fc)·Wᵀ + b with respect to fc: dfc (N,C) = (dout·W) ⊙ GELU'(fc);  dW (OC,C) += doutᵀ·gelu;  db (OC) += Σ_n dout or null.
// dbfc (C) += Σ_n dfc, the bias gradient of the layer before, or null. dout (N,OC); gelu, fc (N,C) of the forward pass.
inline void linear_gelu_backward(cudaStream_t stream, floatX* dfc, float* dw, float* db, const floatX* dout, const floatX* gelu, const floatX* fc,
                                 const floatX* w, int64_t N, int64_t C, int64_t OC, float* dbfc = nullptr) {
    MatmulEpilogue epilogue;
    epilogue.dgelu_input = fc;
    epilogue.column_sums = dbfc;
    matmul<floatX>(stream, NO, NO, N, C, OC, 1, dout, OC, w, C, 0, dfc, C, epilogue);
    weight_backward(stream, dw, db, dout, gelu, N, C, OC, OC);
}

}  // namespace gpu
