// Infini-attention's memory on Hopper: bf16, 64 numbers a head. Equations and launchers: infini.cuh.
//
// What takes time is reading and writing rows, and of them each byte moves once here: bulk copies bring tiles of 64 tokens of one head (panels, hopper.cuh) and
// take results away; one warpgroup a block multiplies, several blocks a multiprocessor hide each other's waiting. Blocks of neighbouring heads are neighbours,
// so that whole rows of the tensors are on their way at a time. Three quarters of the products have an operand in registers: Φ of a tile, as it was loaded.
//
//     write             a block takes GROUP segments of one kv head, one behind another, and carries the sum over them in registers
//     retrieve          a block takes some tiles of one head
//     read backward     a block takes GROUP segments, from the last to the first: the gate, dq and the sum of the memory's gradient in one pass
//     write backward    a block takes some tiles
#pragma once

#include "hopper.cuh"
#include "infini_pass.cuh"
#include "overlap.cuh"

#ifndef GPU_FLOAT32
namespace gpu {

namespace infini_hopper {

typedef __nv_bfloat16 bf16;
constexpr int HS = 64, ROWS = 64, THREADS = 128, PANEL = ROWS * 128;  // bytes

__device__ inline int lane() { return threadIdx.x % 32; }
__device__ inline int warp_row() { return threadIdx.x / 32 * 16; }               // the first of the warp's 16 rows
__device__ inline int row_of(int i) { return warp_row() + lane() / 4 + 8 * i; }  // i = 0, 1: this thread's rows of a result
__device__ inline int column_of(int k, int j) { return 16 * k + j / 2 * 8 + lane() % 4 * 2; }

// Register j of the k-th operand A (16 columns) stands for the row row_of(j%2), the columns column_of(k, j) and the next: numbers 8k + 2j, 8k + 2j + 1 of C.
__device__ inline uint32_t chunk_at(uint32_t panel, int row, int chunk) { return panel + row * 128 + ((chunk ^ row % 8) << 4); }
// Panels begin at multiples of 1024, so that 16 columns further (2 chunks) are k·32 exclusively ored.
__device__ inline uint32_t block_at(uint32_t panel, int k) { return chunk_at(panel, warp_row() + lane() % 16, lane() / 16) ^ k << 5; }
// The same rows as columns of an operand B: 0, 1 for the first eight, 2, 3 for the others.
__device__ inline uint32_t rows_at(uint32_t panel, int k) { return chunk_at(panel, warp_row() + lane() / 16 * 8 + lane() % 8, lane() / 8 % 2) ^ k << 5; }
// The transpose: columns warp_row() ... of 16 rows from 16t on.
__device__ inline uint32_t transposed_block_at(uint32_t panel, int t) {
    return chunk_at(panel, lane() / 16 * 8 + lane() % 8, threadIdx.x / 32 * 2 + lane() / 8 % 2) + t * 2048;
}

// Φ of two numbers: the line in bf16, where it rounds but once; the exponential in float32. These kernels spend more instructions here than anywhere else.
__device__ inline uint32_t feature(uint32_t x) {
    constexpr float LOG2_E = 1.4426950408889634f;
    float2 f = unpack_bf16(x);
    uint32_t exponential = pack_bf16(exp2_fast(LOG2_E * f.x), exp2_fast(LOG2_E * f.y));
    __nv_bfloat162 pair = *(__nv_bfloat162*)&x, line = __hadd2(pair, __float2bfloat162_rn(1));
    uint32_t positive = __hgt2_mask(pair, __float2bfloat162_rn(0));  // not where x is NaN
    return (*(uint32_t*)&line & positive) | (exponential & ~positive);
}
__device__ inline float sum_of_row(float x) {  // over the 4 threads that share a row of a result
    x += __shfl_xor_sync(0xffffffff, x, 1);
    return x + __shfl_xor_sync(0xffffffff, x, 2);
}
__device__ inline void load_features(uint32_t (&f)[4][4], uint32_t panel) {
#pragma unroll
    for (int k = 0; k < 4; k++) {
        load_matrices(f[k], block_at(panel, k));
#pragma unroll
        for (int j = 0; j < 4; j++) f[k][j] = feature(f[k][j]);
    }
}
// Keeps the compiler from holding the 32 unpacked numbers in registers from one use to the next.
__device__ inline void forget_float32(uint32_t (&f)[4][4]) {
#pragma unroll
    for (int k = 0; k < 16; k++) asm volatile("" : "+r"(f[k / 4][k % 4]));
}
// 1/(Φ·z + ε) of this thread's rows
__device__ inline void inverse_denominators(float (&inverse)[2], const uint32_t (&f)[4][4], const float* z) {
    inverse[0] = inverse[1] = 0;
#pragma unroll
    for (int k = 0; k < 4; k++)
#pragma unroll
        for (int j = 0; j < 4; j++) {
            float2 x = unpack_bf16(f[k][j]), zc = *(const float2*)(z + column_of(k, j));
            inverse[j % 2] += x.x * zc.x + x.y * zc.y;
        }
#pragma unroll
    for (int i = 0; i < 2; i++) inverse[i] = 1 / (sum_of_row(inverse[i]) + INFINI_EPSILON);
}

// z and, rounded to a panel, M of a memory; zeros for null. Memories within a state stand on 8 bytes.
__device__ inline void load_memory(uint32_t panel, float* z, const float* memory) {
#pragma unroll 16  // all on their way at a time
    for (int e = threadIdx.x; e < HS * HS / 2; e += THREADS) {
        int r = e / 32, c = e % 32 * 2;
        float2 x = memory ? *(const float2*)(memory + HS + 2 * e) : make_float2(0, 0);
        uint32_t to = chunk_at(panel, r, c / 8) + c % 8 * 2;
        asm volatile("st.shared.u32 [%0], %1;" ::"r"(to), "r"(pack_bf16(x.x, x.y)) : "memory");
    }
    if (threadIdx.x < HS) z[threadIdx.x] = memory ? memory[threadIdx.x] : 0;
}
// A result (64,64) to device memory as float32.
__device__ inline void store_matrix(float* to, const float (&c)[32]) {
#pragma unroll
    for (int n = 0; n < 8; n++)
#pragma unroll
        for (int i = 0; i < 2; i++) *(float2*)(to + row_of(i) * HS + 8 * n + lane() % 4 * 2) = make_float2(c[4 * n + 2 * i], c[4 * n + 2 * i + 1]);
}

// c = a·B for B (depth, columns) or, TRANSPOSED = 0, Bᵀ in a panel
template <int TRANSPOSED>
__device__ inline void times(float (&c)[32], const uint32_t (&a)[4][4], uint32_t panel, bool accumulate = false) {
    uint64_t b = TRANSPOSED ? panel_operand_transposed(panel, PANEL) : panel_operand(panel);
#pragma unroll
    for (int k = 0; k < 4; k++) product<TRANSPOSED>(c, a[k], b + k * (TRANSPOSED ? 128 : 2), accumulate || k > 0);
}

// Rows n ... of a panel become zeros; rows below n go to device memory.
__device__ inline void clear_rows(char* panel, int n) {
    for (int e = n * 8 + threadIdx.x; e < ROWS * 8; e += THREADS) *(int4*)(panel + e * 16) = make_int4(0, 0, 0, 0);
}
__device__ inline void store_rows(bf16* to, int64_t stride, const char* panel, int n) {
    for (int e = threadIdx.x; e < n * 8; e += THREADS) {
        int r = e / 8, c = e % 8;
        *(int4*)(to + r * stride + c * 8) = *(const int4*)(panel + r * 128 + ((c ^ r % 8) << 4));
    }
}

// Two panels side by side in shared memory, times a factor. By a warpgroup.
__device__ __forceinline__ void scale_two_panels(char* panels, float factor) {
#pragma unroll
    for (int e = 0; e < 2 * ROWS * 8 / THREADS; e++) {
        Packed<bf16>* at = (Packed<bf16>*)((int4*)panels + e * THREADS + threadIdx.x);
        Packed<bf16> x = *at;
#pragma unroll
        for (int k = 0; k < 8; k++) x.set(k, factor * x[k]);
        *at = x;
    }
}

// A tile of n queries in a stage of panels q, dA, D, dq: dq, dM, dz, and in `sum` this thread's part of Σ dA⊙(R−D). By a warpgroup; meet() is its barrier,
// `rows` 64 numbers, other ones than for the tile before. On return q is overwritten, and each warp has stored its 16 rows of dq: others need a barrier.
template <class Meet>
__device__ __forceinline__ void query_tile(float (&dM)[32], float (&dz)[4], float& sum, char* stage, uint32_t M, const float* z, float* rows, float g,
                                           float keep, int n, Meet meet) {
    const uint32_t q_panel = shared_address(stage), dA_panel = q_panel + PANEL, D_panel = q_panel + 2 * PANEL, dq_panel = q_panel + 3 * PANEL;
    if (n < ROWS) {
        for (int panel = 0; panel < 3; panel++) clear_rows(stage + panel * PANEL, n);
        async_fence();
        meet();
    }
    uint32_t f[4][4];
    float c[32], inverse[2], dA_R[2] = {0, 0}, dA_D[2][4] = {}, dden[2], factor[2];
    products_begin();
#pragma unroll
    for (int k = 0; k < 4; k++) product(c, panel_operand(dA_panel) + 2 * k, panel_operand(M) + 2 * k, k > 0);  // dA·Mᵀ
    products_commit();
    load_features(f, q_panel);
    inverse_denominators(inverse, f, z);
#pragma unroll
    for (int k = 0; k < 4; k++) {
        uint32_t x[4], y[4];
        load_matrices(x, block_at(dA_panel, k));
        load_matrices(y, rows_at(D_panel, k));
        mma(dA_D[0], x, y[0], y[1]);
        mma(dA_D[1], x, y[2], y[3]);
    }
#pragma unroll
    for (int e = 0; e < 2; e++)  // the diagonal of dA·Dᵀ, 16 rows
        if (lane() / 4 == lane() % 4 * 2 + e) sum -= dA_D[0][e] + dA_D[1][2 + e];
    products_wait<0>();
    products_done(c);
    forget_float32(f);
#pragma unroll
    for (int k = 0; k < 4; k++)
#pragma unroll
        for (int j = 0; j < 4; j++) {  // dA·(Φ(q)M) = (dA·Mᵀ)·Φ(q)
            float2 a = unpack_bf16(f[k][j]);
            dA_R[j % 2] += a.x * c[8 * k + 2 * j] + a.y * c[8 * k + 2 * j + 1];
        }
#pragma unroll
    for (int e = 0; e < 2; e++) {
        float R = sum_of_row(dA_R[e]) * inverse[e];
        if (lane() % 4 == 0) {
            rows[row_of(e)] = -R;  // dden / (g/den)
            if (row_of(e) < n) sum += R;
        }
        dden[e] = -g * R * inverse[e];
        factor[e] = g * inverse[e];
    }
#pragma unroll
    for (int k = 0; k < 4; k++) {  // Φ·g/den takes the place of q
        uint32_t x[4];
#pragma unroll
        for (int j = 0; j < 4; j++) {
            float2 a = unpack_bf16(f[k][j]);
            x[j] = pack_bf16(a.x * factor[j % 2], a.y * factor[j % 2]);
        }
        store_matrices(block_at(q_panel, k), x);
    }
    async_fence();
    meet();
    products_begin();
#pragma unroll
    for (int k = 0; k < 4; k++)
        product<1, 1>(dM, panel_operand_transposed(q_panel, PANEL) + 128 * k, panel_operand_transposed(dA_panel, PANEL) + 128 * k, true);
    products_commit();
#pragma unroll
    for (int k = 0; k < 4; k++) {  // dz += (Φ·g/den)ᵀ·(dden·den/g), which is the first column of an operand B
        uint32_t x[4], w[2];
        load_matrices_transposed(x, transposed_block_at(q_panel, k));
#pragma unroll
        for (int e = 0; e < 2; e++) {
            float2 r = *(const float2*)(rows + 16 * k + 8 * e + lane() % 4 * 2);
            w[e] = lane() < 4 ? pack_bf16(r.x, r.y) : 0;
        }
        mma(dz, x, w[0], w[1]);
    }
#pragma unroll
    for (int k = 0; k < 4; k++) {
        uint32_t x[4];
        load_matrices(x, block_at(dq_panel, k));
#pragma unroll
        for (int j = 0; j < 4; j++) {
            float2 d = unpack_bf16(x[j]), a = unpack_bf16(f[k][j]), zc = *(const float2*)(z + column_of(k, j));
            d.x = keep * d.x + (factor[j % 2] * c[8 * k + 2 * j] + dden[j % 2] * zc.x) * min(1.f, a.x);
            d.y = keep * d.y + (factor[j % 2] * c[8 * k + 2 * j + 1] + dden[j % 2] * zc.y) * min(1.f, a.y);
            x[j] = pack_bf16(d.x, d.y);
        }
        store_matrices(block_at(dq_panel, k), x);
    }
    async_fence();
    products_wait<0>();
    products_done(dM);
}

// Rows of two heads, `second` apart, times a factor, in device memory.
__device__ inline void scale_rows(bf16* x, int64_t stride, int second, int n, float factor) {
#pragma unroll 8
    for (int e = threadIdx.x; e < n * 16; e += THREADS) {
        bf16* at = x + e / 16 * stride + (e % 16 < 8 ? 0 : second) + e % 8 * 8;
        Packed<bf16> y = load_packed(at);
#pragma unroll
        for (int i = 0; i < 8; i++) y.set(i, factor * y[i]);
        store_packed(at, y);
    }
}

// Shared memory of a block: memories as panels, stages of panels, some numbers.
template <int MEMORIES, int STAGES, int PANELS>
struct Shared {
    static constexpr int BYTES = 1024 + (MEMORIES + STAGES * PANELS) * PANEL + 1024 + MEMORIES * HS * 4 + 64;
    char* base;
    uint32_t address;
    __device__ Shared() {
        extern __shared__ char infini_hopper_shared[];
        uint32_t at = shared_address(infini_hopper_shared), up = (1024 - at % 1024) % 1024;
        base = infini_hopper_shared + up;
        address = at + up;
    }
    __device__ uint32_t memory(int i) const { return address + i * PANEL; }
    __device__ uint32_t stage(int i) const { return address + (MEMORIES + i % STAGES * PANELS) * PANEL; }
    __device__ char* pointer(uint32_t panel) const { return base + (panel - address); }
    __device__ float* z(int i) const { return (float*)(base + (MEMORIES + STAGES * PANELS) * PANEL) + i * HS; }
    __device__ float* sums() const { return z(MEMORIES); }  // 256
    __device__ uint32_t full(int i) const { return address + (MEMORIES + STAGES * PANELS) * PANEL + MEMORIES * HS * 4 + 1024 + i % STAGES * 8; }
    __device__ void begin() const {
        if (threadIdx.x != 0) return;
        for (int i = 0; i < STAGES; i++) barrier_init(full(i), 1);
        barrier_init_fence();
    }
};

constexpr int PIECE = 256;  // rows of a segment that a block takes, where it needs no sum over them

}  // namespace infini_hopper

// Linear: what full segments leave, counted from the group's or the sequence's first segment on. A block: a group and a kv head.
// keys: k|v.
constexpr int INFINI_WRITE_STAGES = 2;
__global__ void __launch_bounds__(infini_hopper::THREADS, 6) infini_write_kernel4(const __grid_constant__ CUtensorMap keys, InfiniPass p) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
    using namespace infini_hopper;
    constexpr int STAGES = INFINI_WRITE_STAGES;
    const Shared<0, STAGES, 2> shared;
    int kv = blockIdx.x % p.kv_heads, begin = blockIdx.x / p.kv_heads * p.group, end = min(begin + p.group, p.max_segments);
    let_next_kernel_start();
    shared.begin();
    __syncthreads();
    // The tiles of the group's full segments, counted through; thread 0 is ahead of the others.
    int segment = begin, t = 0, loaded = 0;
    auto load = [&] {
        while (segment < end && (p.segments[segment].write < 0 || t >= p.segments[segment].k_len)) segment++, t = 0;
        if (segment >= end) return;
        uint32_t stage = shared.stage(loaded), full = shared.full(loaded);
        int row = p.segments[segment].key_row + t;
        barrier_arrive_expect(full, 2 * PANEL);
        bulk_load(stage, &keys, full, kv * HS, row);
        bulk_load(stage + PANEL, &keys, full, (int)p.kv_channels() + kv * HS, row);
        t += ROWS;
        loaded++;
    };
    if (threadIdx.x == 0)
        for (int i = 0; i < STAGES; i++) load();

    float sum[32], z[2] = {0, 0};  // z: the numbers row_of(i), each of 4 threads a part of it
#pragma unroll
    for (int i = 0; i < 32; i++) sum[i] = 0;
    int tile = 0;
    for (int i = begin; i < end; i++) {
        const InfiniSegment s = p.segments[i];
        if (s.start == 0 || i == begin) {  // a new sum
            const InfiniSequence& sequence = p.sequences[s.seq];
            const float* from = s.start == 0 && sequence.written ? sequence.block + INFINI_MEMORY + kv * p.memory_size() : nullptr;
#pragma unroll
            for (int n = 0; n < 8; n++)
#pragma unroll
                for (int h = 0; h < 2; h++) {
                    float2 x = from ? *(const float2*)(from + HS + row_of(h) * HS + 8 * n + lane() % 4 * 2) : make_float2(0, 0);
                    sum[4 * n + 2 * h] = x.x;
                    sum[4 * n + 2 * h + 1] = x.y;
                }
#pragma unroll
            for (int h = 0; h < 2; h++) z[h] = s.start > 0 || lane() % 4 > 0 ? 0 : from ? from[row_of(h)] : p.z_start;
        }
        if (s.write < 0) continue;
        for (int t0 = 0; t0 < s.k_len; t0 += ROWS, tile++) {
            uint32_t k = shared.stage(tile), v = k + PANEL;
            int n = s.k_len - t0;
            barrier_wait(shared.full(tile), tile / STAGES % 2);
            if (n < ROWS) {
                clear_rows(shared.pointer(v), n);
                async_fence();
                __syncthreads();
            }
            uint32_t a[4][4];  // Φ(k)ᵀ: features row_of(j%2), tokens column_of(k, j)
#pragma unroll
            for (int k4 = 0; k4 < 4; k4++) {
                load_matrices_transposed(a[k4], transposed_block_at(k, k4));
#pragma unroll
                for (int j = 0; j < 4; j++) {
                    a[k4][j] = feature(a[k4][j]);
                    float2 f = unpack_bf16(a[k4][j]);
                    if (n < ROWS) {
                        int token = column_of(k4, j);
                        if (token >= n) f.x = 0;
                        if (token + 1 >= n) f.y = 0;
                        a[k4][j] = pack_bf16(f.x, f.y);
                    }
                    z[j % 2] += f.x + f.y;
                }
            }
            products_begin();
            times<1>(sum, a, v, true);
            products_commit();
            products_wait<0>();
            products_done(sum);
            __syncthreads();
            if (threadIdx.x == 0) load();
        }
        float* to = p.memories + p.memory_at(s.write, kv);
        store_matrix(to + HS, sum);
#pragma unroll
        for (int h = 0; h < 2; h++) {
            float x = sum_of_row(z[h]);
            if (lane() % 4 == 0) to[row_of(h)] = x;
        }
    }
#endif
}

// A = g·R + (1−g)·D, (N,C); A may be D. q: columns of qkv. A block takes `piece` rows (a multiple of ROWS) of a segment.
constexpr int INFINI_RETRIEVE_STAGES = 2;
__global__ void __launch_bounds__(infini_hopper::THREADS, 5)
    infini_retrieve_kernel4(const __grid_constant__ CUtensorMap q, const __grid_constant__ CUtensorMap D, const __grid_constant__ CUtensorMap to_A,
                            InfiniPass p, const float* beta, floatX* A, int piece) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
    using namespace infini_hopper;
    constexpr int STAGES = INFINI_RETRIEVE_STAGES;
    const Shared<1, STAGES, 2> shared;
    int h = blockIdx.x % p.heads, pieces = (int)ceil_div(p.max_q(), piece), first = blockIdx.x / p.heads % pieces * piece;
    const float beta_h = beta[h];
    const InfiniSegment s = p.segments[blockIdx.x / p.heads / pieces];
    int rows = min(piece, s.q_len - first);
    if (rows <= 0) return;
    const float* memory = p.memory(s, p.kv_head(h));
    const float g = p.gate(s, beta_h);
    const int tiles = (rows + ROWS - 1) / ROWS;
    shared.begin();
    auto load = [&](int i) {
        uint32_t stage = shared.stage(i), full = shared.full(i);
        barrier_arrive_expect(full, (memory ? 2 : 1) * PANEL);
        if (memory) bulk_load(stage, &q, full, h * HS, s.row + first + i * ROWS);
        bulk_load(stage + PANEL, &D, full, h * HS, s.row + first + i * ROWS);
    };
    if (threadIdx.x == 0)
        for (int i = 0; i < STAGES && i < tiles; i++) load(i);
    if (memory) load_memory(shared.memory(0), shared.z(0), memory);
    async_fence();
    __syncthreads();
    for (int i = 0; i < tiles; i++) {
        uint32_t q_panel = shared.stage(i), d_panel = q_panel + PANEL;
        int n = rows - i * ROWS;
        barrier_wait(shared.full(i), i / STAGES % 2);
        float c[32], factor[2] = {0, 0};
        if (memory) {
            uint32_t f[4][4];
            load_features(f, q_panel);
            products_begin();
            times<1>(c, f, shared.memory(0));
            products_commit();
            inverse_denominators(factor, f, shared.z(0));
            products_wait<0>();
            products_done(c);
        } else {
#pragma unroll
            for (int e = 0; e < 32; e++) c[e] = 0;
        }
#pragma unroll
        for (int k = 0; k < 4; k++) {
            uint32_t x[4];
            load_matrices(x, block_at(d_panel, k));
#pragma unroll
            for (int j = 0; j < 4; j++) {
                float2 d = unpack_bf16(x[j]);
                float w = g * factor[j % 2];
                x[j] = pack_bf16(c[8 * k + 2 * j] * w + (1 - g) * d.x, c[8 * k + 2 * j + 1] * w + (1 - g) * d.y);
            }
            store_matrices(block_at(d_panel, k), x);
        }
        async_fence();
        __syncthreads();
        int row = s.row + first + i * ROWS;
        if (n < ROWS) {
            store_rows(A + (int64_t)row * p.channels() + h * HS, p.channels(), shared.pointer(d_panel), n);
        } else if (threadIdx.x == 0) {
            bulk_store(&to_A, d_panel, h * HS, row);
            bulk_store_commit();
            if (i + STAGES < tiles) {
                bulk_store_wait();
                load(i + STAGES);
            }
        }
    }
    if (threadIdx.x == 0) bulk_store_wait();
#endif
}

// Backward of A = g·R + (1−g)·D and of the reading: in dqkv dq = keep·dq + (dn·Mᵀ + dden·zᵀ)⊙Φ'(q); partial (max_segments, NH) = Σ dA⊙(R−D); dmemories[read]
// += over the segments from the group's or the sequence's last (linear), or the segment's own part (delta). A block: a group and a kv head. q: columns of qkv.
constexpr int INFINI_BACKWARD_STAGES = 2;
__global__ void __launch_bounds__(infini_hopper::THREADS, 3)
    infini_read_backward_kernel4(const __grid_constant__ CUtensorMap q, const __grid_constant__ CUtensorMap D, const __grid_constant__ CUtensorMap dA,
                                 const __grid_constant__ CUtensorMap dq, InfiniPass p, const float* beta, floatX* dqkv, float* dmemories, float* partial) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
    using namespace infini_hopper;
    constexpr int STAGES = INFINI_BACKWARD_STAGES;
    const Shared<1, STAGES, 4> shared;
    const uint32_t M = shared.memory(0);
    float* z = shared.z(0);
    int kv = blockIdx.x % p.kv_heads, begin = blockIdx.x / p.kv_heads * p.group, end = min(begin + p.group, p.max_segments);
    shared.begin();
    __syncthreads();

    // The tiles in their order: segments from the last to the first, the heads of the group, rows.
    struct Tile {
        int segment, head, t;
    };
    auto gated = [&](const InfiniSegment& s) { return s.q_len > 0 && (s.read != INFINI_EMPTY || p.gated_first); };
    Tile next = {end - 1, 0, 0};
    auto load = [&](int i) {
        while (next.segment >= begin && !gated(p.segments[next.segment])) next.segment--;
        if (next.segment < begin) return;
        const InfiniSegment& s = p.segments[next.segment];
        uint32_t stage = shared.stage(i), full = shared.full(i);
        int column = (kv * p.heads_per_kv() + next.head) * HS, row = s.row + next.t;
        barrier_arrive_expect(full, 4 * PANEL);
        bulk_load(stage, &q, full, column, row);
        bulk_load(stage + PANEL, &dA, full, column, row);
        bulk_load(stage + 2 * PANEL, &D, full, column, row);
        bulk_store_wait();  // of the dq that was there
        bulk_load(stage + 3 * PANEL, &dq, full, column, row);
        next.t += ROWS;
        if (next.t >= s.q_len) next.t = 0, next.head++;
        if (next.head == p.heads_per_kv()) next.head = 0, next.segment--;
    };
    if (threadIdx.x == 0) {
#pragma unroll 1
        for (int i = 0; i < STAGES; i++) load(i);
    }

    float dM[32], dz[4];  // dz: the numbers row_of(i) in dz[2·i] of every fourth thread
    int tile = 0;
    for (int i = end - 1; i >= begin; i--) {
        const InfiniSegment s = p.segments[i];
        if (i == end - 1 || s.last || p.delta) {
#pragma unroll
            for (int e = 0; e < 32; e++) dM[e] = 0;
#pragma unroll
            for (int e = 0; e < 4; e++) dz[e] = 0;
        }
        if (!gated(s)) {
            if (threadIdx.x < p.heads_per_kv()) partial[(int64_t)i * p.heads + kv * p.heads_per_kv() + threadIdx.x] = 0;
            continue;
        }
        load_memory(M, z, p.memory(s, kv));
        async_fence();
        __syncthreads();
        for (int head = kv * p.heads_per_kv(); head < (kv + 1) * p.heads_per_kv(); head++) {
            const float g = p.gate(s, beta[head]), keep = p.keep(g);
            float sum = 0;
            for (int t = 0; t < s.q_len; t += ROWS, tile++) {
                const uint32_t dq_panel = shared.stage(tile) + 3 * PANEL;
                const int n = s.q_len - t;
                barrier_wait(shared.full(tile), tile / STAGES % 2);
                query_tile(dM, dz, sum, shared.pointer(shared.stage(tile)), M, z, shared.sums() + tile % 2 * ROWS, g, keep, n, [] { __syncthreads(); });
                __syncthreads();
                if (n < ROWS) {
                    store_rows(dqkv + (s.row + t) * p.qkv_stride() + head * HS, p.qkv_stride(), shared.pointer(dq_panel), n);
                    __syncthreads();
                } else if (threadIdx.x == 0) {
                    bulk_store(&dq, dq_panel, head * HS, s.row + t);
                    bulk_store_commit();
                }
                if (threadIdx.x == 0) load(tile + STAGES);
            }
            sum = warp_sum(sum);
            float* sums = shared.sums() + 2 * ROWS;
            if (lane() == 0) sums[threadIdx.x / 32] = sum;
            __syncthreads();
            if (threadIdx.x == 0) partial[(int64_t)i * p.heads + head] = sums[0] + sums[1] + sums[2] + sums[3];
            __syncthreads();
        }
        if (s.read < 0) continue;
        float* to = dmemories + p.memory_at(s.read, kv);
        store_matrix(to + HS, dM);
#pragma unroll
        for (int e = 0; e < 2; e++)
            if (lane() % 4 == 0) to[row_of(e)] = dz[2 * e];
    }
#endif
}

// dk, dv = keep·(dk, dv) + what full segments have written, in dqkv. k, v: columns of qkv.
template <bool DELTA>
__global__ void __launch_bounds__(infini_hopper::THREADS, DELTA ? 2 : 3)
    infini_write_backward_kernel4(const __grid_constant__ CUtensorMap qkv, const __grid_constant__ CUtensorMap to_dqkv, InfiniPass p, const float* beta,
                                  const float* dmemories, floatX* dqkv) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
    using namespace infini_hopper;
    constexpr int STAGES = INFINI_BACKWARD_STAGES;
    const Shared<DELTA ? 2 : 1, STAGES, 4> shared;
    const uint32_t dM = shared.memory(0), M = shared.memory(DELTA ? 1 : 0);
    float *dz = shared.z(0), *z = shared.z(DELTA ? 1 : 0);
    int kv = blockIdx.x % p.kv_heads, pieces = (int)ceil_div(p.max_q(), PIECE), first = blockIdx.x / p.kv_heads % pieces * PIECE;
    const InfiniSegment s = p.segments[blockIdx.x / p.kv_heads / pieces];
    const int rows = min(PIECE, s.q_len - first), tiles = (rows + ROWS - 1) / ROWS;
    const float keep = p.keep(p.gate(s, beta[kv]));
    const int column = p.channels() + kv * HS, to_v = (int)p.kv_channels();
    if (rows <= 0) return;
    if (s.write < 0 || s.last) {  // nothing that was read in this pass
        if (keep != 1) scale_rows(dqkv + (s.row + first) * p.qkv_stride() + column, p.qkv_stride(), to_v, rows, keep);
        return;
    }
    shared.begin();
    auto load = [&](int i) {
        uint32_t stage = shared.stage(i), full = shared.full(i);
        int row = s.row + first + i * ROWS;
        barrier_arrive_expect(full, 4 * PANEL);
        bulk_load(stage + 2 * PANEL, &qkv, full, column, row);
        bulk_load(stage + 3 * PANEL, &qkv, full, column + to_v, row);
        bulk_load(stage, &to_dqkv, full, column, row);
        bulk_load(stage + PANEL, &to_dqkv, full, column + to_v, row);
    };
    if (threadIdx.x == 0)
        for (int i = 0; i < STAGES && i < tiles; i++) load(i);
    load_memory(dM, dz, dmemories + p.memory_at(s.write, kv));
    if (DELTA) load_memory(M, z, p.memory(s, kv));  // null: V̂ is 0
    async_fence();
    __syncthreads();
    for (int i = 0; i < tiles; i++) {
        const uint32_t dk = shared.stage(i), dv = dk + PANEL, k_panel = dk + 2 * PANEL, v_panel = dk + 3 * PANEL;
        const int n = rows - i * ROWS, row = s.row + first + i * ROWS;
        barrier_wait(shared.full(i), i / STAGES % 2);
        uint32_t f[4][4], u[4][4];
        float dU[32], c[32], inverse[2], dden[2] = {0, 0};
        load_features(f, k_panel);
        products_begin();
        times<1>(dU, f, dM);
        if constexpr (DELTA) times<1>(c, f, M);
        products_commit();
#pragma unroll
        for (int k = 0; k < 4; k++) load_matrices(u[k], block_at(v_panel, k));
        if constexpr (DELTA) inverse_denominators(inverse, f, z);
        products_wait<0>();
        products_done(dU);
        if constexpr (DELTA) {
            products_done(c);
#pragma unroll
            for (int k = 0; k < 4; k++)
#pragma unroll
                for (int j = 0; j < 4; j++) {  // U = v − V̂
                    float2 v = unpack_bf16(u[k][j]);
                    int e = 8 * k + 2 * j;
                    float V0 = c[e] * inverse[j % 2], V1 = c[e + 1] * inverse[j % 2];
                    dden[j % 2] += dU[e] * V0 + dU[e + 1] * V1;
                    u[k][j] = pack_bf16(v.x - V0, v.y - V1);
                }
#pragma unroll
            for (int e = 0; e < 2; e++) dden[e] = sum_of_row(dden[e]) * inverse[e];
        }
        products_begin();
        times<0>(c, u, dM);  // dΦ(k)
        products_commit();
#pragma unroll
        for (int k = 0; k < 4; k++) {
            uint32_t x[4];
            load_matrices(x, block_at(dv, k));
#pragma unroll
            for (int j = 0; j < 4; j++) {
                float2 d = unpack_bf16(x[j]);
                x[j] = pack_bf16(keep * d.x + dU[8 * k + 2 * j], keep * d.y + dU[8 * k + 2 * j + 1]);
            }
            store_matrices(block_at(dv, k), x);
        }
        products_wait<0>();
        products_done(c);
        if constexpr (DELTA) {
#pragma unroll
            for (int k = 0; k < 4; k++)
#pragma unroll
                for (int j = 0; j < 4; j++) u[k][j] = pack_bf16(-inverse[j % 2] * dU[8 * k + 2 * j], -inverse[j % 2] * dU[8 * k + 2 * j + 1]);  // dn
            products_begin();
            times<0>(c, u, M, true);
            products_commit();
            products_wait<0>();
            products_done(c);
        }
#pragma unroll
        for (int k = 0; k < 4; k++) {
            uint32_t x[4];
            load_matrices(x, block_at(dk, k));
#pragma unroll
            for (int j = 0; j < 4; j++) {
                float2 d = unpack_bf16(x[j]), a = unpack_bf16(f[k][j]), dzc = *(const float2*)(dz + column_of(k, j));
                float d0 = c[8 * k + 2 * j] + dzc.x, d1 = c[8 * k + 2 * j + 1] + dzc.y;
                if constexpr (DELTA) {
                    float2 zc = *(const float2*)(z + column_of(k, j));
                    d0 += dden[j % 2] * zc.x;
                    d1 += dden[j % 2] * zc.y;
                }
                x[j] = pack_bf16(keep * d.x + d0 * min(1.f, a.x), keep * d.y + d1 * min(1.f, a.y));
            }
            store_matrices(block_at(dk, k), x);
        }
        async_fence();
        __syncthreads();
        if (n < ROWS) {
            int64_t at = row * p.qkv_stride() + column;
            store_rows(dqkv + at, p.qkv_stride(), shared.pointer(dk), n);
            store_rows(dqkv + at + to_v, p.qkv_stride(), shared.pointer(dv), n);
        } else if (threadIdx.x == 0) {
            bulk_store(&to_dqkv, dk, column, row);
            bulk_store(&to_dqkv, dv, column + to_v, row);
            bulk_store_commit();
            if (i + STAGES < tiles) {
                bulk_store_wait();
                load(i + STAGES);
            }
        }
    }
    if (threadIdx.x == 0) bulk_store_wait();
#endif
}

}  // namespace gpu
#endif
