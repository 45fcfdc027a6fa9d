// The forward pass of a linear layer: C (M,N) = A (M,K)·B (N,K)ᵀ + bias (N), all row-major, inputs and C floatX, sums float32.
//
// A call does 2·M·N·K FLOPs and must move M·K + N·K + M·N numbers. For GPT-2 124M at M = 65536 tokens, on an H100 (690 TFLOP/s, 3.0 TB/s), in bf16:
//     K,N = 768,2304   232 GFLOP  336 µs     406 MB  135 µs      768,768    77 GFLOP  112 µs   202 MB   67 µs
//           768,3072   309 GFLOP  448 µs     508 MB  169 µs      3072,768  309 GFLOP  448 µs   508 MB  169 µs
//     the head at M = 16384: 768,50304  1.27 TFLOP  1.83 ms     1.75 GB  580 µs
// The matrix units are the limit everywhere, if each number is fetched once: a multiply-add needs two numbers, and all that follows is about where from.
//
//   1  a thread an element of C: each multiply-add reads two numbers from global memory (the caches'). A few tenths of a TFLOP/s
//   2  tiles of 128 x 128 in shared memory: a number that was fetched is used 128 times, and 8 x 8 sums in a thread's registers make 64 multiply-adds of 16
//      reads from shared memory. Expected: half of the 60 TFLOP/s that the float32 units have. It is what cuBLASLt's refusals fall back on
//      (gpt2/cuda/matmul.cuh): any size, stride and transpose
//   3  tensor cores: mma.sync multiplies 16 x 16 by 16 x 8 in a warp, ldmatrix brings the operands from shared memory in the order it wants them.
//      Memory waits for the units and the units for memory, in turns. Expected: 200 TFLOP/s
//   4  cp.async: the copies of the next two steps of K run while this one is multiplied, and pass no registers; three stages of shared memory, whose 16-byte
//      pieces are permuted (swizzled) so that neither copies nor ldmatrix meet in a bank; tiles of 128 x 256. Expected: 400 TFLOP/s, what mma.sync can do on
//      an H100
//   5  wgmma (sm_90a): four warps multiply 64 x 16 by 16 x 256 with both operands read straight from shared memory, in the same permutation, and go on
//      without waiting. Nothing but sums is left in registers. Expected: 550 TFLOP/s; what is missing is the copy engine (TMA) that spares all threads the
//      addresses
//   6  one thread fills the ring, by the copy engine, and two groups of four warps take turns: while one has the matrix units the other adds the bias to its
//      tile of 128 x 192, rounds it and sends it to memory (gpt2/cuda/matmul_hopper.cuh; a block stays on its multiprocessor from tile to tile). 40 KB for 768
//      clocks of the matrix units must come from the second-level cache, 53 bytes a clock: too much for all 132. Expected: 550 TFLOP/s
//   7  two blocks, a cluster, fetch half of B each for both: 37 bytes a clock. Expected: what the power allows, 750 TFLOP/s (in use where its epilogue
//      beside the products pays)
//   8  what the trainer calls (matmul.cuh): cuBLASLt's first choice with the bias in its epilogue, or 7 where a rule says that it is faster
//   9  the same with --tune: the fastest, by timing, of 7 and cuBLASLt's 16 candidates; the trainer keeps these plans with the run
//  10  7 with what a layer does next to the numbers (matmul_fused_hopper.cuh): the residual added; GELU; GELU' and the sums of columns, or nothing, behind a
//      product by (K,N). A second matrix comes, and everything goes, through slots of shared memory by the copy engine. Expected: 450 µs with GELU at 65536 x
//      768 x 3072 and no more with GELU' and its sums, where cuBLASLt takes 550 to 600, and 140 for the sums; the residual for nothing
//
// 3 to 7 and 10 are for bf16 and want rows of whole 16 bytes: K a multiple of 8. The checks of 8 and 9 also go through everything else that matmul.cuh does.
#define GPT2_NO_MAIN
#include "../../train_gpt2.cpp"
#include "ladder.h"

#include "../../gpt2/cuda/matmul.cuh"

using namespace gpu;

constexpr int HOPPER = 7, HEURISTIC = 8, TUNED = 9;

// --------------------------------------------------------------------------------------------------------------------------------------------------
// Version 1

__global__ void matmul_kernel1(floatX* C, const floatX* A, const floatX* B, const floatX* bias, int64_t M, int64_t N, int64_t K) {
    int64_t at = (int64_t)blockIdx.x * blockDim.x + threadIdx.x, i = at / N, j = at % N;
    if (i >= M) return;
    float sum = 0;
    for (int64_t p = 0; p < K; p++) sum += to_float(A[i * K + p]) * to_float(B[j * K + p]);
    C[at] = from_float<floatX>(sum + to_float(bias[j]));
}

#ifndef GPU_FLOAT32

// --------------------------------------------------------------------------------------------------------------------------------------------------
// What versions 3 to 5 share

// Where block `block`'s tile of BM x BN starts. Blocks run in the order of their numbers, some hundred at a time: eight rows of tiles, from left to right,
// read few rows of A and few of B between them, which the second-level cache then holds.
template <int BM, int BN>
__device__ inline void tile_of_block(int64_t block, int64_t M, int64_t N, int64_t& i0, int64_t& j0) {
    int64_t rows = ceil_div(M, BM), columns = ceil_div(N, BN), first = block / (8 * columns) * 8, height = rows - first < 8 ? rows - first : 8;
    i0 = (first + block % (8 * columns) % height) * BM;
    j0 = block % (8 * columns) / height * BN;
}
template <int BM, int BN>
static unsigned tiles(int64_t M, int64_t N) {
    return (unsigned)(ceil_div(M, BM) * ceil_div(N, BN));
}

// Elements (i,j) and (i,j+1), j even.
__device__ inline void store_pair(floatX* C, const floatX* bias, int64_t M, int64_t N, int64_t i, int64_t j, float x, float y) {
    if (i >= M || j >= N) return;
    floatX* c = C + i * N + j;
    x += to_float(bias[j]);
    if (j + 1 < N) y += to_float(bias[j + 1]);
    if (N % 2 == 0) {
        *(__nv_bfloat162*)c = __floats2bfloat162_rn(x, y);
        return;
    }
    c[0] = from_float<floatX>(x);
    if (j + 1 < N) c[1] = from_float<floatX>(y);
}

// --------------------------------------------------------------------------------------------------------------------------------------------------
// Version 3: eight warps, 2 x 4, each 64 x 32 of a tile of 128 x 128; 32 steps of K at a time. Rows in shared memory are 80 bytes apart, so that the eight
// rows of a matrix of ldmatrix lie in different banks (20·r mod 32 = 0, 20, 8, 28, 16, 4, 24, 12).

__global__ void __launch_bounds__(256) matmul_kernel3(floatX* C, const floatX* A, const floatX* B, const floatX* bias, int64_t M, int64_t N, int64_t K) {
    constexpr int ROW = 40;
    __shared__ alignas(16) floatX a_tile[128 * ROW], b_tile[128 * ROW];
    int64_t i0, j0;
    tile_of_block<128, 128>(blockIdx.x, M, N, i0, j0);
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32, wi = warp / 4 * 64, wj = warp % 4 * 32;
    uint32_t a_shared = (uint32_t)__cvta_generic_to_shared(a_tile), b_shared = (uint32_t)__cvta_generic_to_shared(b_tile);

    float sum[4][4][4] = {};
    for (int64_t p0 = 0; p0 < K; p0 += 32) {
        for (int l = threadIdx.x; l < 128 * 4; l += 256) {  // 16 bytes: row l / 4, piece l % 4
            int row = l / 4, p = l % 4 * 8;
            int4 zero = {0, 0, 0, 0};
            *(int4*)(a_tile + row * ROW + p) = i0 + row < M && p0 + p < K ? *(const int4*)(A + (i0 + row) * K + p0 + p) : zero;
            *(int4*)(b_tile + row * ROW + p) = j0 + row < N && p0 + p < K ? *(const int4*)(B + (j0 + row) * K + p0 + p) : zero;
        }
        __syncthreads();
#pragma unroll
        for (int p = 0; p < 32; p += 16) {
            // a: rows 0-7, 8-15 of the first 8 of K, then of the second. b: first and second 8 of K of columns 0-7, then of columns 8-15.
            uint32_t a[4][4], b[2][4];
            for (int m = 0; m < 4; m++) load_matrices(a[m], a_shared + ((wi + m * 16 + lane % 16) * ROW + p + lane / 16 * 8) * 2);
            for (int n = 0; n < 2; n++) load_matrices(b[n], b_shared + ((wj + n * 16 + lane % 8 + lane / 16 * 8) * ROW + p + lane / 8 % 2 * 8) * 2);
#pragma unroll
            for (int m = 0; m < 4; m++)
#pragma unroll
                for (int n = 0; n < 4; n++) mma(sum[m][n], a[m], b[n / 2][n % 2 * 2], b[n / 2][n % 2 * 2 + 1]);
        }
        __syncthreads();
    }
#pragma unroll
    for (int m = 0; m < 4; m++)
#pragma unroll
        for (int n = 0; n < 4; n++)
#pragma unroll
            for (int half = 0; half < 2; half++)
                store_pair(C, bias, M, N, i0 + wi + m * 16 + lane / 4 + half * 8, j0 + wj + n * 8 + lane % 4 * 2, sum[m][n][half * 2], sum[m][n][half * 2 + 1]);
}

// --------------------------------------------------------------------------------------------------------------------------------------------------
// Version 4: eight warps, 2 x 4, each 64 x 64 of a tile of 128 x 256; 64 steps of K, 128 bytes of a row, at a time.
//
// Row r of a tile stands at 128·r; its 16-byte piece p stands at place p ^ (r % 8). Eight rows of the same piece, which is what ldmatrix reads, and the eight
// pieces of one row, which is what the copies write, both cover all 32 banks. It is also the permutation that wgmma calls 128-byte swizzle.

constexpr int BM = 128, BN = 256, BK = 64, STAGE_BYTES = (BM + BN) * BK * 2;

// ROWS x 64 from row `row` and column `p0` of x (rows,K); 256 threads: eight neighbours copy the 128 bytes of a row.
template <int ROWS>
__device__ inline void copy_tile(uint32_t to, const floatX* x, int64_t row, int64_t rows, int64_t p0, int64_t K) {
    int piece = threadIdx.x % 8;
    int64_t p = p0 + piece * 8;
#pragma unroll
    for (int r = threadIdx.x / 8, i = 0; i < ROWS / 32; r += 32, i++) {
        bool inside = row + r < rows && p < K;
        copy_async16(to + r * 128 + (piece ^ (r % 8)) * 16, inside ? x + (row + r) * K + p : x, inside);
    }
}
__device__ inline uint32_t swizzled(int row, int piece) { return row * 128 + (piece ^ (row % 8)) * 16; }

constexpr int STAGES4 = 3;

__global__ void __launch_bounds__(256, 1) matmul_kernel4(floatX* C, const floatX* A, const floatX* B, const floatX* bias, int64_t M, int64_t N, int64_t K) {
    extern __shared__ uint4 shared_memory[];
    uint32_t shared = (uint32_t)__cvta_generic_to_shared(shared_memory);
    int64_t i0, j0, steps = ceil_div(K, BK);
    tile_of_block<BM, BN>(blockIdx.x, M, N, i0, j0);
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32, wi = warp / 4 * 64, wj = warp % 4 * 64;
    auto copy_step = [&](int64_t step) {
        uint32_t stage = shared + step % STAGES4 * STAGE_BYTES;
        if (step < steps) {
            copy_tile<BM>(stage, A, i0, M, step * BK, K);
            copy_tile<BN>(stage + BM * BK * 2, B, j0, N, step * BK, K);
        }
        copy_async_commit();  // also an empty group, so that their number is known
    };

    float sum[4][8][4] = {};
    for (int64_t step = 0; step < STAGES4 - 1; step++) copy_step(step);
    for (int64_t step = 0; step < steps; step++) {
        copy_async_wait<STAGES4 - 2>();  // this thread's copies of this step have arrived;
        __syncthreads();                 // all threads' have, and all have done with the step before, whose stage is free now
        copy_step(step + STAGES4 - 1);
        uint32_t a_shared = shared + step % STAGES4 * STAGE_BYTES, b_shared = a_shared + BM * BK * 2;
#pragma unroll
        for (int p = 0; p < BK / 16; p++) {
            uint32_t a[4][4], b[4][4];
            for (int m = 0; m < 4; m++) load_matrices(a[m], a_shared + swizzled(wi + m * 16 + lane % 16, p * 2 + lane / 16));
            for (int n = 0; n < 4; n++) load_matrices(b[n], b_shared + swizzled(wj + n * 16 + lane % 8 + lane / 16 * 8, p * 2 + lane / 8 % 2));
#pragma unroll
            for (int m = 0; m < 4; m++)
#pragma unroll
                for (int n = 0; n < 8; n++) mma(sum[m][n], a[m], b[n / 2][n % 2 * 2], b[n / 2][n % 2 * 2 + 1]);
        }
    }
#pragma unroll
    for (int m = 0; m < 4; m++)
#pragma unroll
        for (int n = 0; n < 8; n++)
#pragma unroll
            for (int half = 0; half < 2; half++)
                store_pair(C, bias, M, N, i0 + wi + m * 16 + lane / 4 + half * 8, j0 + wj + n * 8 + lane % 4 * 2, sum[m][n][half * 2], sum[m][n][half * 2 + 1]);
}

// --------------------------------------------------------------------------------------------------------------------------------------------------
// Version 5: two groups of four warps, each 64 x 256 of the tile. The products of a step are started and left to run; what is waited for is the step before,
// since then its stage may be overwritten: one more stage than version 4 keeps two steps of copies under way.

constexpr int STAGES5 = 4;

__global__ void __launch_bounds__(256, 1) matmul_kernel5(floatX* C, const floatX* A, const floatX* B, const floatX* bias, int64_t M, int64_t N, int64_t K) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
    extern __shared__ uint4 shared_memory[];
    uint32_t shared = ((uint32_t)__cvta_generic_to_shared(shared_memory) + 1023) & ~1023u;  // the swizzle counts from multiples of 1024
    int64_t i0, j0, steps = ceil_div(K, BK);
    tile_of_block<BM, BN>(blockIdx.x, M, N, i0, j0);
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32, group = warp / 4;
    auto copy_step = [&](int64_t step) {
        uint32_t stage = shared + step % STAGES5 * STAGE_BYTES;
        if (step < steps) {
            copy_tile<BM>(stage, A, i0, M, step * BK, K);
            copy_tile<BN>(stage + BM * BK * 2, B, j0, N, step * BK, K);
        }
        copy_async_commit();
    };

    float sum[128] = {};
    for (int64_t step = 0; step < STAGES5 - 2; step++) copy_step(step);
    for (int64_t step = 0; step < steps; step++) {
        copy_async_wait<STAGES5 - 3>();
        async_fence();    // what this thread has copied can be seen by wgmma,
        __syncthreads();  // and what the others have; and all have done with the products of step − 2
        uint32_t stage = shared + step % STAGES5 * STAGE_BYTES;
        uint64_t a = panel_operand(stage + group * 64 * 128), b = panel_operand(stage + BM * BK * 2);
        products_begin();
#pragma unroll
        for (int p = 0; p < BK / 16; p++) product(sum, a + p * 2, b + p * 2, true);
        products_commit();
        copy_step(step + STAGES5 - 2);  // into the stage of step − 2
        products_wait<1>();
    }
    products_wait<0>();
    products_done(sum);
#pragma unroll
    for (int n = 0; n < 32; n++)
#pragma unroll
        for (int half = 0; half < 2; half++)
            store_pair(C, bias, M, N, i0 + warp * 16 + lane / 4 + half * 8, j0 + n * 8 + lane % 4 * 2, sum[n * 4 + half * 2], sum[n * 4 + half * 2 + 1]);
#endif
}
static bool has_wgmma() {  // and code for it is in this program: otherwise the kernel is empty
    cudaFuncAttributes attributes;
    CUDA_CHECK(cudaFuncGetAttributes(&attributes, matmul_kernel5));
    return device_properties().major == 9 && attributes.numRegs > 128;
}

#endif

// --------------------------------------------------------------------------------------------------------------------------------------------------
// Running them

static bool run(int version, cudaStream_t stream, floatX* C, const floatX* A, const floatX* B, const floatX* bias, int64_t M, int64_t N, int64_t K) {
    if (version == 1) {
        if (2.0 * M * N * K > 2e10) return false;
        matmul_kernel1<<<(unsigned)ceil_div(M * N, 256), 256, 0, stream>>>(C, A, B, bias, M, N, K);
    }
    if (version == 2) {
        MatmulCall<floatX> call = {NO, YES, M, N, K, 1, A, K, B, K, 0, C, N, {}, {}};
        call.epilogue.bias = bias;
        matmul_own(stream, call);
    }
#ifdef GPU_FLOAT32
    if (version >= 3 && version <= HOPPER) return false;
#else
    if (version >= 3 && version <= 5 && K % 8 != 0) return false;
    if (version == 3) matmul_kernel3<<<tiles<128, 128>(M, N), 256, 0, stream>>>(C, A, B, bias, M, N, K);
    if (version == 4) {
        allow_shared_memory(matmul_kernel4, STAGES4 * STAGE_BYTES);
        matmul_kernel4<<<tiles<BM, BN>(M, N), 256, STAGES4 * STAGE_BYTES, stream>>>(C, A, B, bias, M, N, K);
    }
    if (version == 5) {
        if (!has_wgmma()) return false;
        allow_shared_memory(matmul_kernel5, STAGES5 * STAGE_BYTES + 1024);
        matmul_kernel5<<<tiles<BM, BN>(M, N), 256, STAGES5 * STAGE_BYTES + 1024, stream>>>(C, A, B, bias, M, N, K);
    }
    if (version == 6 || version == HOPPER) {
        HopperMatmul m = {M, N, K, A, K, B, K, C, N, bias};
        if (!hopper_matmul_takes(m)) return false;
        version == HOPPER ? hopper_matmul(stream, m) : launch_hopper_matmul<1>(stream, m);
    }
#endif
    if (version == HEURISTIC || version == TUNED) linear_forward(stream, C, A, B, bias, M, K, N);
    LAUNCH_CHECK();
    return true;
}

// From here on `library` is 8 or 9: plans are made once a process, so that one of them is measured after the other, and the other versions with 8.
static bool in_turn(int version, int library) { return version == library || (version < HEURISTIC && library == HEURISTIC); }
static void forget_plans(int library) {
    load_matmul_plans(matmul_plans_header() + "\n");
    set_matmul_tuning(library == TUNED);
}

// --------------------------------------------------------------------------------------------------------------------------------------------------
// Checks

static void check_linear_forward(Ladder& ladder, int library) {
    int64_t shapes[][3] = {{1, 1, 1}, {7, 13, 20}, {1, 130, 8}, {129, 1, 16}, {33, 65, 24}, {130, 257, 72}, {300, 520, 200}, {64, 2304, 768}, {512, 768, 3072}};
    for (auto& shape : shapes) {
        int64_t M = shape[0], N = shape[1], K = shape[2];
        std::vector<float> A = random_numbers(M * K, 1), B = random_numbers(N * K, 2), bias = random_numbers(N, 3), C(M * N);
        cpu::linear_forward(C.data(), A.data(), B.data(), bias.data(), M, K, N);
        DeviceArray<floatX> a(A), b(B), d_bias(bias), c(M * N);
        ladder.check(format("M=%ld N=%ld K=%ld", (long)M, (long)N, (long)K), {output("C", c, C)},
                     [&](int version) { return in_turn(version, library) && run(version, ladder.stream, c, a, b, d_bias, M, N, K); });
    }
}

struct ProductCase {
    Transpose ta, tb;
    int64_t M, N, K;
    float alpha = 1, beta = 0;
    int64_t pad = 0;     // columns behind each row; they must not be touched in C
    int64_t offset = 0;  // elements from an aligned address
    bool bias = false, residual = false, in_place = false, gelu = false, dgelu = false;
    int count = 1;  // products; in A and C side by side in each row (as heads are), in B one below the other
};

constexpr double FLOAT32_TOLERANCE = sizeof(floatX) == 2 ? 1e-4 : TOLERANCE;  // of what is float32 in either build

template <class Out>
static void check_product(Ladder& ladder, int library, const ProductCase& t) {
    int64_t a_columns = t.ta == YES ? t.M : t.K, a_rows = t.ta == YES ? t.K : t.M, b_columns = t.tb == YES ? t.K : t.N, b_rows = t.tb == YES ? t.N : t.K;
    int64_t lda = t.count * a_columns + t.pad, ldb = b_columns + t.pad, ldc = t.count * t.N + t.pad, size = t.offset + t.M * ldc;
    std::vector<float> A = random_numbers(t.offset + a_rows * lda, 1), B = random_numbers(t.offset + t.count * b_rows * ldb, 2), bias = random_numbers(t.N, 3);
    std::vector<float> residual = random_numbers(size, 4), dgelu_input = random_numbers(size, 5), before = random_numbers(size, 6);
    std::vector<float> gelu_before = random_numbers(size, 7), gelu_input = gelu_before, C = before;
    for (int h = 0; h < t.count; h++) {
        int64_t start = t.offset + h * t.N;
        cpu::matmul((cpu::Transpose)t.ta, (cpu::Transpose)t.tb, t.M, t.N, t.K, t.alpha, A.data() + t.offset + h * a_columns, lda,
                    B.data() + t.offset + h * b_rows * ldb, ldb, t.beta, C.data() + start, ldc);
        for (int64_t i = 0; i < t.M; i++) {
            float* c = &C[start + i * ldc];
            for (int64_t j = 0; j < t.N && t.bias; j++) c[j] += bias[j];
            if (t.gelu) {
                std::copy_n(c, t.N, &gelu_input[start + i * ldc]);
                cpu::gelu_forward(c, &gelu_input[start + i * ldc], t.N);
            }
            if (t.dgelu) cpu::gelu_backward(c, c, &dgelu_input[start + i * ldc], t.N);
            for (int64_t j = 0; j < t.N && (t.residual || t.in_place); j++) c[j] += (t.in_place ? before : residual)[start + i * ldc + j];
            // What a product overwrites may have been anything.
            for (int64_t j = 0; j < t.N && t.beta == 0 && !t.in_place; j++) before[start + i * ldc + j] = gelu_before[start + i * ldc + j] = NAN;
        }
    }
    DeviceArray<floatX> a(A), b(B), d_bias(bias), d_residual(residual), d_dgelu(dgelu_input), d_gelu(size);
    DeviceArray<Out> c(size);
    MatmulEpilogue e;
    if (t.bias) e.bias = d_bias;
    if (t.residual) e.residual = d_residual + t.offset;
    if (t.in_place) e.residual = (const floatX*)(c + t.offset);
    if (t.gelu) e.gelu_input = d_gelu + t.offset;
    if (t.dgelu) e.dgelu_input = d_dgelu + t.offset;
    MatmulBatch batch = {t.count, a_columns, b_rows * ldb, t.N};
    std::vector<Output> outputs = {accumulated("C", c, before, C, std::is_same_v<Out, floatX> ? TOLERANCE : FLOAT32_TOLERANCE)};
    if (t.gelu) outputs.push_back(accumulated("y", d_gelu, gelu_before, gelu_input));
    std::string name = format("%c%c %ldx%ldx%ld α=%g β=%g", t.ta == YES ? 'T' : 'N', t.tb == YES ? 'T' : 'N', (long)t.M, (long)t.N, (long)t.K, t.alpha, t.beta);
    for (auto [there, word] : {std::pair(t.pad > 0, " padded"),
                               {t.offset > 0, " unaligned"},
                               {t.bias, " bias"},
                               {t.residual, " residual"},
                               {t.in_place, " in place"},
                               {t.gelu, " gelu"},
                               {t.dgelu, " dgelu"},
                               {t.count > 1, " batch"},
                               {!std::is_same_v<Out, floatX>, " float32"}})
        if (there) name += word;
    ladder.check(name, outputs, [&](int version) {
        if (version != library) return false;
        matmul<Out>(ladder.stream, t.ta, t.tb, t.M, t.N, t.K, t.alpha, a + t.offset, lda, b + t.offset, ldb, t.beta, c + t.offset, ldc, e, batch);
        return true;
    });
}

static void check_products(Ladder& ladder, int library) {
    for (Transpose ta : {NO, YES})
        for (Transpose tb : {NO, YES}) {
            check_product<floatX>(ladder, library, {ta, tb, 7, 13, 20});
            check_product<floatX>(ladder, library, {ta, tb, 200, 136, 264, 0.5f, 1});
            check_product<float>(ladder, library, {ta, tb, 64, 96, 128, 2, 0.25f});
            check_product<float>(ladder, library, {ta, tb, 33, 1, 17, 1, 1, 3, 1});
            check_product<floatX>(ladder, library, {ta, tb, 1, 64, 40, 1, 0, 5, 1});
            check_product<floatX>(ladder, library, {ta, tb, 96, 64, 32, 0.125f, 0, 8, 0, false, false, false, false, false, 3});
            check_product<floatX>(ladder, library, {ta, tb, 5, 9, 11, 1, 1, 0, 0, false, false, false, false, false, 3});
        }
    ProductCase nothing = {NO, YES, 5, 9, 0, 1, 0.5f}, zeros = {NO, NO, 5, 9, 0};
    check_product<floatX>(ladder, library, nothing);
    check_product<float>(ladder, library, zeros);
    check_product<float>(ladder, library, {NO, YES, 6, 16, 24, 1, 0, 0, 0, true, true});  // an epilogue on float32, which cuBLASLt refuses in bf16
    check_product<floatX>(ladder, library, {NO, YES, 6, 16, 24, 1, 0, 0, 0, true, true, false, true});
    check_product<floatX>(ladder, library, {NO, YES, 6, 16, 24, 1, 0, 0, 0, true, false, false, false, false, 3});
    int64_t shapes[][4] = {{7, 13, 20, 0}, {64, 2304, 768, 0}, {64, 256, 128, 8}, {16, 32, 64, 3}};
    for (auto& s : shapes)
        for (int64_t offset : {0, 1}) {
            ProductCase plain = {NO, YES, s[0], s[1], s[2], 1, 0, s[3], offset};
            plain.alpha = (float)(1 / std::sqrt((double)s[2]));  // GELU is to see numbers around 1
            auto with = [&](bool bias, bool residual, bool in_place, bool gelu, bool dgelu) {
                ProductCase t = plain;
                t.bias = bias, t.residual = residual, t.in_place = in_place, t.gelu = gelu, t.dgelu = dgelu;
                check_product<floatX>(ladder, library, t);
            };
            with(true, false, false, false, false);
            with(true, true, false, false, false);
            with(true, false, true, false, false);
            with(false, true, false, false, false);
            with(true, false, false, true, false);
            with(false, false, false, true, false);
            with(false, false, false, false, true);
        }
}

#ifndef GPU_FLOAT32
constexpr int FUSED = 10;

// Versions 6 and 7 where rows stand `pad` numbers apart, which must not be touched, and K is no multiple of 8.
static void check_hopper(Ladder& ladder, int64_t M, int64_t N, int64_t K, int64_t pad) {
    int64_t lda = round_up(K, 8) + pad, ldb = lda, ldc = N + pad;
    std::vector<float> A = random_numbers(M * lda, 1), B = random_numbers(N * ldb, 2, 1 / std::sqrt((double)K)), C = random_numbers(M * ldc, 3), before = C;
    cpu::matmul(cpu::NO, cpu::YES, M, N, K, 1, A.data(), lda, B.data(), ldb, 0, C.data(), ldc);
    for (int64_t i = 0; i < M; i++) std::fill_n(&before[i * ldc], N, NAN);
    DeviceArray<floatX> a(A), b(B), c(M * ldc);
    HopperMatmul m = {M, N, K, a, lda, b, ldb, c, ldc};
    ladder.check(format("M=%ld N=%ld K=%ld + %ld", (long)M, (long)N, (long)K, (long)pad), {accumulated("C", c, before, C)}, [&](int version) {
        if ((version != 6 && version != HOPPER) || !hopper_matmul_takes(m)) return false;
        version == HOPPER ? hopper_matmul(ladder.stream, m) : launch_hopper_matmul<1>(ladder.stream, m);
        return true;
    });
}
// Version 7 with columns rotated; what is no head's stays as it is.
static void check_rotated(Ladder& ladder, int64_t M, int64_t N, int64_t K, RotatedColumns rotated) {
    std::vector<float> A = random_numbers(M * K, 1), B = random_numbers(N * K, 2, 1 / std::sqrt((double)K)), bias = random_numbers(N, 3), C(M * N);
    std::vector<int> position;
    std::vector<float2> rotations;
    const int positions = 1500, pairs = rotated.size / 2;
    for (int p = 0; p < positions; p++)
        for (int i = 0; i < pairs; i++) {
            double angle = p * std::pow(10000.0, -(double)i / pairs);
            rotations.push_back({(float)std::cos(angle), (float)std::sin(angle)});
        }
    cpu::linear_forward(C.data(), A.data(), B.data(), bias.data(), M, K, N);
    for (int64_t i = 0; i < M; i++) {
        position.push_back((int)(i * 7919 % positions));
        for (int head = 0; head < rotated.columns; head += rotated.head)
            for (int p = 0; p < pairs; p++) {
                float2 r = rotations[position[i] * pairs + p];
                float *c = &C[i * N + head + rotated.offset + 2 * p], x = c[0], y = c[1];
                c[0] = x * r.x - y * r.y;
                c[1] = x * r.y + y * r.x;
            }
    }
    DeviceArray<floatX> a(A), b(B), bias_(bias), c(M * N);
    DeviceArray<int> device_position(position);
    DeviceArray<float2> device_rotations(rotations);
    rotated.position = device_position;
    rotated.rotations = device_rotations;
    ladder.check(format("M=%ld N=%ld K=%ld, below %d of each %d columns %d rotated from %d on", (long)M, (long)N, (long)K, rotated.columns, rotated.head,
                        rotated.size, rotated.offset),
                 {output("C", c, C)},
                 [&](int version) { return version == HOPPER && linear_rotated_forward(ladder.stream, c, a, b, bias_, M, K, N, rotated); });
}
// Version 10, rows `pad` numbers apart. Before GELU a number is rounded: of a few numbers alone, bf16 would not be near enough.
static void check_fused(Ladder& ladder, int64_t M, int64_t N, int64_t K, int64_t pad, bool with_bias) {
    int64_t lda = round_up(K, 8) + pad, ldc = N + pad;
    const double scale = 1 / std::sqrt((double)K);
    std::vector<float> A = random_numbers(M * lda, 1), W = random_numbers(N * lda, 2, scale), V = random_numbers(K * ldc, 3, scale),
                       bias = random_numbers(N, 4);
    std::vector<float> X = random_numbers(M * ldc, 5), x = X, Y = X, sum = X, product = X, dX = X, before = X, db0 = random_numbers(N, 6), db = db0;
    cpu::matmul(cpu::NO, cpu::YES, M, N, K, 1, A.data(), lda, W.data(), lda, 0, x.data(), ldc);
    cpu::matmul(cpu::NO, cpu::NO, M, N, K, 1, A.data(), lda, V.data(), ldc, 0, product.data(), ldc);
    for (int64_t i = 0; i < M; i++) {
        for (int64_t j = 0; j < N && with_bias; j++) x[i * ldc + j] += bias[j];
        cpu::gelu_forward(&Y[i * ldc], &x[i * ldc], N);
        cpu::gelu_backward(&dX[i * ldc], &product[i * ldc], &X[i * ldc], N);
        for (int64_t j = 0; j < N; j++) sum[i * ldc + j] += x[i * ldc + j], db[j] += dX[i * ldc + j], before[i * ldc + j] = NAN;
    }
    DeviceArray<floatX> a(A), w(W), v(V), b(bias), second(X), x_out(M * ldc), out(M * ldc);
    DeviceArray<float> sums(N);
    auto check = [&](const char* name, Fused what, const std::vector<Output>& outputs) {
        const bool transposed = what == Fused::NOTHING || what == Fused::GELU_BACKWARD;
        HopperFused m = {what, M, N, K, a, lda, transposed ? v.data : w.data, transposed ? ldc : lda, out, ldc, nullptr, second, nullptr};
        if (!transposed && with_bias) m.bias = b;
        if (what == Fused::GELU) m.second = x_out;
        if (what == Fused::NOTHING) m.second = nullptr;
        if (what == Fused::GELU_BACKWARD) m.sums = sums;
        ladder.check(format("M=%ld N=%ld K=%ld + %ld %s", (long)M, (long)N, (long)K, (long)pad, name), outputs,
                     [&](int version) { return version == FUSED && hopper_fused_takes(m) && (hopper_fused(ladder.stream, m), true); });
    };
    check("residual", Fused::RESIDUAL, {accumulated("y", out, before, sum)});
    check("GELU", Fused::GELU, {accumulated("x", x_out, before, x), accumulated("y", out, before, Y)});
    check("GELU'", Fused::GELU_BACKWARD, {accumulated("dx", out, before, dX), accumulated("db", sums, db0, db)});
    check("by (K,N)", Fused::NOTHING, {accumulated("dx", out, before, product)});
}
static void check_hopper(Ladder& ladder) {
    for (auto [M, N, K, pad] : {std::array<int64_t, 4>{129, 200, 40, 8}, {1000, 776, 264, 0}, {300, 72, 137, 16}, {4500, 3072, 64, 0}})
        check_fused(ladder, M, N, K, pad, N != 72);
    check_rotated(ladder, 1000, 1152, 768, {nullptr, nullptr, 1152, 96, 64, 32});
    check_rotated(ladder, 300, 768, 64, {nullptr, nullptr, 512, 64, 0, 32});
    check_rotated(ladder, 129, 1152, 40, {nullptr, nullptr, 576, 192, 168, 8});
    check_rotated(ladder, 200, 704, 72, {nullptr, nullptr, 704, 88, 64, 24});
    check_rotated(ladder, 1500, 720, 8, {nullptr, nullptr, 720, 80, 16, 24});  // a block of 64 columns rotates those of two heads
    for (auto [M, N, K, pad] : {std::array<int64_t, 4>{1, 8, 1, 0}, {129, 200, 40, 8}, {1000, 776, 264, 0}, {300, 72, 137, 16}, {4500, 3072, 64, 0}})
        check_hopper(ladder, M, N, K, pad);
}
#else
static void check_hopper(Ladder&) {}
#endif

// The linear layer's functions against cpu::linear_forward, cpu::linear_backward and GELU.
static void check_linear(Ladder& ladder, int library, int64_t N, int64_t C, int64_t OC) {
    std::string shape = format("N=%ld C=%ld OC=%ld ", (long)N, (long)C, (long)OC);
    cudaStream_t stream = ladder.stream;
    auto check = [&](const char* name, const std::vector<Output>& outputs, const std::function<void()>& f) {
        ladder.check(shape + name, outputs, [&](int version) { return version == library && (f(), true); });
    };
    int64_t stride = OC + 8;
    std::vector<float> x = random_numbers(N * C, 1), w = random_numbers(OC * C, 2, 1 / std::sqrt((double)C)), b = random_numbers(OC, 3);
    std::vector<float> dout = random_numbers(N * OC, 4), wide = random_numbers(N * stride, 5), residual = random_numbers(N * OC, 6),
                       fc = random_numbers(N * C, 7);
    std::vector<float> dw0 = random_numbers(OC * C, 8), db0 = random_numbers(OC, 9), dx0 = random_numbers(N * C, 10);
    DeviceArray<floatX> d_x(x), d_w(w), d_b(b), d_dout(dout), d_wide(wide), d_residual(residual), d_fc(fc), out(N * OC), out2(N * OC), dx(N * C);
    DeviceArray<float> dw(OC * C), db(OC);

    std::vector<float> y(N * OC), g(N * OC);
    cpu::linear_forward(y.data(), x.data(), w.data(), b.data(), N, C, OC);
    cpu::gelu_forward(g.data(), y.data(), N * OC);
    check("linear_forward", {output("out", out, y)}, [&] { linear_forward(stream, out, d_x, d_w, d_b, N, C, OC); });
    check("linear_gelu_forward", {output("fc", out, y), output("gelu", out2, g)}, [&] { linear_gelu_forward(stream, out2, out, d_x, d_w, d_b, N, C, OC); });
    cpu::linear_forward(y.data(), x.data(), w.data(), nullptr, N, C, OC);
    for (int64_t i = 0; i < N * OC; i++) y[i] += residual[i];
    check("linear_forward residual", {output("out", out, y)}, [&] { linear_forward(stream, out, d_x, d_w, nullptr, N, C, OC, d_residual); });

    std::vector<float> dx_after(N * C), dw_after = dw0, db_after = db0;
    cpu::linear_backward(dx_after.data(), false, dw_after.data(), db_after.data(), dout.data(), x.data(), w.data(), N, C, OC);
    auto weights = [&] {
        return std::vector<Output>{accumulated("dw", dw, dw0, dw_after, FLOAT32_TOLERANCE), accumulated("db", db, db0, db_after, FLOAT32_TOLERANCE)};
    };
    std::vector<Output> outputs = weights();
    outputs.push_back(output("dx", dx, dx_after));
    check("linear_backward", outputs, [&] { linear_backward(stream, dx, false, dw, db, d_dout, d_x, d_w, N, C, OC); });

    std::vector<float> dfc = dx_after;  // as if x were GELU(fc)
    cpu::gelu_backward(dfc.data(), dfc.data(), fc.data(), N * C);
    outputs = weights();
    outputs.push_back(output("dfc", dx, dfc));
    check("linear_gelu_backward", outputs, [&] { linear_gelu_backward(stream, dx, dw, db, d_dout, d_x, d_fc, d_w, N, C, OC); });
    std::vector<float> dbfc0 = random_numbers(C, 11), dbfc_after = dbfc0;
    for (int64_t i = 0; i < N * C; i++) dbfc_after[i % C] += dfc[i];
    DeviceArray<float> dbfc(C);
    outputs.push_back(accumulated("dbfc", dbfc, dbfc0, dbfc_after));
    check("linear_gelu_backward with dbfc", outputs, [&] { linear_gelu_backward(stream, dx, dw, db, d_dout, d_x, d_fc, d_w, N, C, OC, dbfc); });

    dx_after = dx0, dw_after = dw0;
    cpu::linear_backward(dx_after.data(), true, dw_after.data(), nullptr, wide.data(), x.data(), w.data(), N, C, OC, stride);
    check("linear_backward dx +=, wide rows, no db", {accumulated("dx", dx, dx0, dx_after), accumulated("dw", dw, dw0, dw_after, FLOAT32_TOLERANCE)},
          [&] { linear_backward(stream, dx, true, dw, nullptr, d_wide, d_x, d_w, N, C, OC, stride); });
}

// The MLP's products with GELU, large enough for 10 by the rule: whoever makes them, the columns are summed once.
static void check_mlp(Ladder& ladder, int library) {
    const int64_t N = 4500, C = 64, OC = 3072;
    std::vector<float> x = random_numbers(N * C, 1), w = random_numbers(OC * C, 2, 1 / std::sqrt((double)C)), b = random_numbers(OC, 3), fc(N * OC),
                       gelu(N * OC);
    cpu::linear_forward(fc.data(), x.data(), w.data(), b.data(), N, C, OC);
    for (float& number : fc) number = round_to_working_type(number);
    cpu::gelu_forward(gelu.data(), fc.data(), N * OC);
    DeviceArray<floatX> d_x(x), d_w(w), d_b(b), d_fc(fc), d_gelu(gelu), out(N * OC), out2(N * OC);
    ladder.check("MLP, forward", {output("fc", out, fc), output("gelu", out2, gelu)}, [&](int version) {
        if (version == library) linear_gelu_forward(ladder.stream, out2, out, d_x, d_w, d_b, N, C, OC);
        return version == library;
    });
    // Behind it x is the gradient, and w the weights from OC to C.
    std::vector<float> dfc(N * OC), dw0 = random_numbers(OC * C, 4), dw = dw0, db0 = random_numbers(C, 5), db = db0, dbfc0 = random_numbers(OC, 6),
                                    dbfc = dbfc0;
    cpu::linear_backward(dfc.data(), false, dw.data(), db.data(), x.data(), gelu.data(), w.data(), N, OC, C);
    cpu::gelu_backward(dfc.data(), dfc.data(), fc.data(), N * OC);
    for (int64_t i = 0; i < N * OC; i++) dbfc[i % OC] += dfc[i];
    DeviceArray<float> d_dw(OC * C), d_db(C), d_dbfc(OC);
    ladder.check("MLP, backward",
                 {output("dfc", out, dfc), accumulated("dw", d_dw, dw0, dw), accumulated("db", d_db, db0, db), accumulated("dbfc", d_dbfc, dbfc0, dbfc)},
                 [&](int version) {
                     if (version == library) linear_gelu_backward(ladder.stream, out, d_dw, d_db, d_x, d_gelu, d_fc, d_w, N, OC, C, d_dbfc);
                     return version == library;
                 });
}

// Nothing where there is nothing; and plans: read back they give the same bits, damaged or another machine's they are refused.
static void check_plans(Ladder& ladder, int library) {
    int64_t N = 96, C = 256, OC = 320;
    DeviceArray<floatX> x(random_numbers(N * C, 1)), w(random_numbers(OC * C, 2)), b(random_numbers(OC, 3)), out(N * OC), gelu_out(N * OC);
    DeviceArray<float> dw(random_numbers(OC * C, 4)), db(random_numbers(OC, 5));
    std::vector<float> dw0 = dw.to_host(), first, again;
    auto bits = [&] {
        dw.copy_from(dw0);
        linear_gelu_forward(ladder.stream, gelu_out, out, x, w, b, N, C, OC);
        linear_backward(ladder.stream, nullptr, false, dw, db, gelu_out, x, w, N, C, OC);
        CUDA_CHECK(cudaStreamSynchronize(ladder.stream));
        std::vector<float> all = dw.to_host();
        for (float f : gelu_out.to_host()) all.push_back(f);
        return all;
    };
    auto refused = [&](const std::string& text) {
        try {
            load_matmul_plans(text);
        } catch (const Error& e) {
            return e.exit_code == EXIT_DATA;
        }
        return false;
    };
    std::vector<float> results(5, 0.f);
    ladder.check("plans", {{"read back", std::vector<float>(5, 1.f), [&] { return results; }, [] {}, 0, 0}}, [&](int version) {
        if (version != library) return false;
        first = bits();
        std::string text = matmul_plans(), header = matmul_plans_header();
        load_matmul_plans(text);
        again = bits();
        results[0] = memcmp(first.data(), again.data(), first.size() * sizeof(float)) == 0;
        results[1] = matmul_plans() == text;
        results[2] = refused("another " + text) && refused("");
        results[3] = refused(header + "\n1 2 3 cublaslt\n") && refused(text + "x\n") && refused(text + text.substr(header.size() + 1));
        std::vector<float> before = dw.to_host();
        linear_forward(ladder.stream, out, x, w, b, 0, C, OC);
        linear_backward(ladder.stream, out, false, dw, db, x, x, w, 0, C, OC);
        results[4] = memcmp(before.data(), dw.to_host().data(), before.size() * sizeof(float)) == 0;
        return true;
    });
    // How all that was checked has been computed (keys: matmul_key() in matmul.cuh). "own" and "separate" are what cuBLASLt refuses, or did slower.
    std::istringstream lines(matmul_plans());
    std::map<std::string, int> count;
    for (std::string line; std::getline(lines, line);)
        for (std::string how : {" cublaslt", " separate", " own", " hopper"})
            if (line.find(how) != std::string::npos) {
                count[how]++;
                if (how != " cublaslt") printf("check plan %s\n", line.c_str());
            }
    printf("check plans of version %d: %d cublaslt, %d separate, %d own, %d hopper\n", library, count[" cublaslt"], count[" separate"], count[" own"],
           count[" hopper"]);
}

// --------------------------------------------------------------------------------------------------------------------------------------------------
// Times

// n numbers: a few million random ones over and over. Zeros would draw less current, and be faster.
static void fill(floatX* x, int64_t n, uint64_t seed, double std) {
    DeviceArray<floatX> some(random_numbers(std::min<int64_t>(n, 1 << 21), seed, std));
    for (int64_t i = 0; i < n; i += some.size) CUDA_CHECK(cudaMemcpy(x + i, some.data, std::min(some.size, n - i) * sizeof(floatX), cudaMemcpyDeviceToDevice));
}

static void time_shapes(Ladder& ladder, int library) {
    int64_t shapes[][3] = {{4096, 768, 768}, {65536, 768, 2304}, {65536, 768, 768}, {65536, 768, 3072}, {65536, 3072, 768}, {16384, 768, 50304}};
    for (auto& shape : shapes) {
        int64_t M = shape[0], K = shape[1], N = shape[2];
        DeviceArray<floatX> A(M * K), B(N * K), bias(N), C(M * N);
        fill(A, M * K, 1, 1);
        fill(B, N * K, 2, 1 / std::sqrt((double)K));
        fill(bias, N, 3, 1);
        Work work = {2.0 * M * N * K, ((double)M * K + (double)N * K + (double)M * N) * sizeof(floatX)};
        ladder.time(format("%ldx%ldx%ld", (long)M, (long)K, (long)N), work,
                    [&](int version) { return in_turn(version, library) && run(version, ladder.stream, C, A, B, bias, M, N, K); });
    }
#ifndef GPU_FLOAT32
    if (library == HEURISTIC) {  // MLA's queries, with and without their rotation
        int64_t M = 65536, K = 768, N = 1152;
        DeviceArray<floatX> A(M * K), B(N * K), bias(N), C(M * N);
        fill(A, M * K, 1, 1);
        fill(B, N * K, 2, 1 / std::sqrt((double)K));
        fill(bias, N, 3, 1);
        std::vector<int> position;
        for (int64_t i = 0; i < M; i++) position.push_back((int)(i % 1024));
        DeviceArray<int> device_position(position);
        DeviceArray<float2> rotations(1024 * 16);
        CUDA_CHECK(cudaMemset(rotations, 0, rotations.size * sizeof(float2)));
        RotatedColumns rotated = {rotations, device_position, (int)N, 96, 64, 32};
        Work work = {2.0 * M * N * K, ((double)M * K + (double)N * K + (double)M * N) * sizeof(floatX)};
        ladder.time("65536x768x1152", work, [&](int version) { return in_turn(version, library) && run(version, ladder.stream, C, A, B, bias, M, N, K); });
        ladder.time("the same, the last 32 of each 96 columns rotated", work,
                    [&](int version) { return version == HOPPER && linear_rotated_forward(ladder.stream, C, A, B, bias, M, K, N, rotated); });
    }
#endif
    // The rest of what a GPT-2 layer does with its products.
    int64_t N = 65536, C = 768, OC = 3072;
    DeviceArray<floatX> x(N * C), w(OC * C), b(OC), fc(N * OC), gelu(N * OC), dx(N * C), residual(N * C);
    DeviceArray<float> dw(OC * C), db(OC);
    fill(x, N * C, 1, 1);
    fill(w, OC * C, 2, 1 / std::sqrt((double)C));
    fill(b, OC, 3, 1);
    fill(fc, N * OC, 4, 1);
    fill(gelu, N * OC, 5, 1);
    fill(residual, N * C, 6, 1);
    CUDA_CHECK(cudaMemset(dw, 0, OC * C * sizeof(float)));
    CUDA_CHECK(cudaMemset(db, 0, OC * sizeof(float)));
    double flops = 2.0 * N * C * OC, small = (double)N * C * sizeof(floatX), large = (double)N * OC * sizeof(floatX), weight = (double)OC * C * sizeof(floatX);
    cudaStream_t stream = ladder.stream;
    auto time = [&](const char* name, const Work& work, const std::function<void()>& f) {
        ladder.time(name, work, [&](int version) { return version == library && (f(), true); });
    };
#ifndef GPU_FLOAT32
    DeviceArray<float> sums(OC);
    CUDA_CHECK(cudaMemset(sums, 0, OC * sizeof(float)));
    auto alone = [&](const char* name, const Work& work, const HopperFused& m) {
        if (library != HEURISTIC) return;
        ladder.time(name, work, [&](int version) { return version == FUSED && hopper_fused_takes(m) && (hopper_fused(stream, m), true); });
    };
    alone("fc, GELU, alone", {flops, small + weight + 2 * large}, {Fused::GELU, N, OC, C, x, C, w, C, gelu, OC, b, fc});
    alone("proj, residual, alone", {flops, large + weight + 2 * small}, {Fused::RESIDUAL, N, C, OC, gelu, OC, w, OC, dx, C, b, residual});
    alone("proj, dX and GELU' and db of fc, alone", {flops, small + weight + 2 * large},
          {Fused::GELU_BACKWARD, N, OC, C, x, C, w, OC, gelu, OC, nullptr, fc, sums});
    alone("fc, dX, alone", {flops, small + weight + large}, {Fused::NOTHING, N, C, OC, gelu, OC, w, C, dx, C, nullptr, nullptr});
#endif
    time("fc, GELU", {flops, small + weight + 2 * large}, [&] { linear_gelu_forward(stream, gelu, fc, x, w, b, N, C, OC); });
    time("proj, residual", {flops, large + weight + 2 * small}, [&] { linear_forward(stream, dx, gelu, w, b, N, OC, C, residual); });
    time("fc backward", {2 * flops, 2 * large + 2 * small + 3 * weight}, [&] { linear_backward(stream, dx, false, dw, db, gelu, x, w, N, C, OC); });
    time("fc backward, no db", {2 * flops, 2 * large + 2 * small + 3 * weight}, [&] { linear_backward(stream, dx, false, dw, nullptr, gelu, x, w, N, C, OC); });
    DeviceArray<float> dbfc(OC);
    CUDA_CHECK(cudaMemset(dbfc, 0, OC * sizeof(float)));
    Work both = {2 * flops, 3 * large + 2 * small + 3 * weight};
    time("proj, GELU backward", both, [&] { linear_gelu_backward(stream, fc, dw, db, x, gelu, gelu, w, N, OC, C); });
    time("proj, GELU backward, db of fc", both, [&] { linear_gelu_backward(stream, fc, dw, db, x, gelu, gelu, w, N, OC, C, dbfc); });
}

int main(int argc, char** argv) {
    Ladder ladder("matmul",
                  {"a thread an element", "128x128 tiles in shared memory", "tensor cores: mma.sync, ldmatrix", "cp.async, three stages, swizzle", "wgmma",
                   "copy engine, groups in turns", "clusters (in use)", "cuBLASLt, or 7 by a rule (in use)",
                   "cuBLASLt or 7, the faster by timing (in use with --tune)", "with more behind it (in use)"},
                  argc, argv);
    bool timing = argc < 2 || strcmp(argv[argc - 1], "--check") != 0;
    check_hopper(ladder);
    for (int library : {HEURISTIC, TUNED}) {
        forget_plans(library);
        check_linear_forward(ladder, library);
        check_products(ladder, library);
        for (auto [N, C, OC] : {std::array<int64_t, 3>{7, 20, 13}, {1, 64, 8}, {64, 768, 2304}, {200, 128, 136}}) check_linear(ladder, library, N, C, OC);
        check_mlp(ladder, library);
        if (ladder.wanted(library)) check_plans(ladder, library);
    }
    for (int library : {HEURISTIC, TUNED}) {
        forget_plans(library);
        if (timing) time_shapes(ladder, library);
    }
    return ladder.finish();
}
