// The MLP's products with GELU on Hopper (bf16, compute capability 9.0a).
//
//     forward    X (M,N) = A (M,K)·B (N,K)ᵀ + bias (N)      Y = GELU(X)             both are written; GELU sees X as it is written, rounded
//     backward   C (M,N) = A (M,K)·B (K,N) ⊙ GELU'(X)       sums (N) += Σ_m C       the bias gradient of the layer that X comes from
//
// all row-major, sums float32; backward the product is rounded before it is multiplied. With GPT-2 124M's 65536 x 768 x 3072 that is 309 GFLOP, 400 µs at
// what the power allows, and 905 MB, 300 µs at 3.0 TB/s.
//
// Copies and products are those of matmul_hopper.cuh: one warpgroup copies, two multiply tiles of 128 x 192 in turns. What a warpgroup does to its tile while
// the other multiplies is for one warp at a time on each quarter of the multiprocessor, so that every wait is felt. So it waits for panels, not for single
// numbers: 64 columns of the sums are rounded into a *slot* of shared memory and come back in rows, eight times 16 bytes a thread at once; then all
// exponentials have others to overlap with, and whole 128-byte lines are written. The bias is where the sums begin. The tile of X is brought into the
// second-level cache while it is multiplied.
//
// The order of every sum is fixed by the shapes: same call, same bits.
#pragma once

#include "gelu.cuh"
#include "matmul_hopper.cuh"

namespace gpu {

#ifndef GPU_FLOAT32

struct HopperGelu {
    int64_t M, N, K;
    const floatX* A;  // (M,K)
    int64_t lda;
    const floatX* B;  // (N,K); backward (K,N)
    int64_t ldb;
    int64_t ldc;            // of X and out
    const floatX* bias;     // (N), forward, or null
    floatX* X;              // (M,N): written forward, read backward
    floatX* out;            // Y or C
    float* sums = nullptr;  // (N), backward, or null
    bool backward;
};

template <bool BACKWARD>
struct GeluTile {
    static constexpr int BN = 192, STAGES = 4, PANELS = BN / 64, A_BYTES = HOPPER_BM * 128, STAGE_BYTES = A_BYTES + BN * 128;
    static constexpr int SLOT_BYTES = HOPPER_BM * 128, SLOTS = 2;  // of each warpgroup
    static constexpr int SLOT = STAGES * STAGE_BYTES, ROWS = SLOT + 2 * SLOTS * SLOT_BYTES;
    static constexpr int BARRIERS = ROWS + 2 * BN * 4;  // ROWS: of each warpgroup the bias of its tile
    static constexpr int BYTES = BARRIERS + 2 * STAGES * 8;
    static_assert(BYTES <= 227 << 10);
};

struct GeluOutput {
    const floatX* bias;
    floatX *x, *out;
    int64_t ld;
    float* partial;  // (rows of tiles, N): sums over their 128 rows
};

// gelu() and gelu_gradient() of gelu.cuh in fewer instructions: ex2 and rcp themselves, constants multiplied out. 1/(1 + ∞) = 0.
__device__ __forceinline__ float gelu_sigmoid_fast(float x, float x2) {
    float r, e = exp2_fast(x * fmaf(x2, -0.10294324f, -2.3022082f));  // −2u·log2(e)
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(1 + e));
    return r;
}
__device__ __forceinline__ float gelu_fast(float x) { return x * gelu_sigmoid_fast(x, x * x); }
__device__ __forceinline__ float gelu_gradient_fast(float x) {
    float x2 = x * x, s = gelu_sigmoid_fast(x, x2);
    return fmaf(fmaf(-s, s, s), x * fmaf(x2, 0.21406445f, 1.5957691f), s);
}
__device__ __forceinline__ uint4 gelu8(uint4 x) {
    uint32_t in[4] = {x.x, x.y, x.z, x.w}, out[4];
#pragma unroll
    for (int i = 0; i < 4; i++) {
        float2 v = unpack_bf16(in[i]);
        out[i] = pack_bf16(gelu_fast(v.x), gelu_fast(v.y));
    }
    return make_uint4(out[0], out[1], out[2], out[3]);
}
__device__ __forceinline__ uint4 gelu_gradient8(uint4 y, uint4 x, float (&sum)[8]) {
    uint32_t in[4] = {y.x, y.y, y.z, y.w}, at[4] = {x.x, x.y, x.z, x.w}, out[4];
#pragma unroll
    for (int i = 0; i < 4; i++) {
        float2 v = unpack_bf16(in[i]), u = unpack_bf16(at[i]);
        v.x *= gelu_gradient_fast(u.x);
        v.y *= gelu_gradient_fast(u.y);
        sum[2 * i] += v.x;
        sum[2 * i + 1] += v.y;
        out[i] = pack_bf16(v.x, v.y);
    }
    return make_uint4(out[0], out[1], out[2], out[3]);
}
// Here, and not where it is first used; without a branch.
__device__ __forceinline__ uint4 load_if(bool inside, const floatX* p) {
    uint4 x;
    asm volatile(
        "{\n.reg .pred p;\nsetp.ne.b32 p, %5, 0;\n"
        "mov.b32 %0, 0;\nmov.b32 %1, 0;\nmov.b32 %2, 0;\nmov.b32 %3, 0;\n"
        "@p ld.global.v4.b32 {%0,%1,%2,%3}, [%4];\n}"
        : "=&r"(x.x), "=&r"(x.y), "=&r"(x.z), "=&r"(x.w)
        : "l"(p), "r"((int)inside)
        : "memory");
    return x;
}
__device__ __forceinline__ void store_if(bool inside, floatX* p, uint4 x) {
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %5, 0;\n@p st.global.v4.b32 [%4], {%0,%1,%2,%3};\n}" ::"r"(x.x), "r"(x.y), "r"(x.z), "r"(x.w), "l"(p),
                 "r"((int)inside)
                 : "memory");
}
__device__ __forceinline__ void bulk_prefetch(const CUtensorMap* map, int c0, int c1) {  // into the second-level cache
    HOPPER_ONLY(asm volatile("cp.async.bulk.prefetch.tensor.2d.L2.global [%0, {%1,%2}];" ::"l"(map), "r"(c0), "r"(c1) : "memory");)
}

template <bool BACKWARD, int CLUSTER>
__global__ void __launch_bounds__(384, 1) matmul_kernel10(const __grid_constant__ CUtensorMap a_map, const __grid_constant__ CUtensorMap b_map,
                                                          const __grid_constant__ CUtensorMap x_map, HopperShape shape, GeluOutput output) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
    using Tile = GeluTile<BACKWARD>;
    constexpr int BN = Tile::BN, STAGES = Tile::STAGES, PANELS = Tile::PANELS;
    extern __shared__ __align__(1024) char matmul_memory[];
    const uint32_t shared = shared_address(matmul_memory), full = shared + Tile::BARRIERS, empty = full + STAGES * 8;
    const int warpgroup = threadIdx.x / 128, lane = threadIdx.x % 32, rank = CLUSTER > 1 ? cluster_rank() : 0;
    const int steps = (shape.K + HOPPER_BK - 1) / HOPPER_BK, first = blockIdx.x / CLUSTER, stride = gridDim.x / CLUSTER;
    if (threadIdx.x == 0) {
        for (int s = 0; s < STAGES; s++) {
            barrier_init(full + s * 8, 1);
            barrier_init(empty + s * 8, 4 * CLUSTER);  // the warps that multiply it, in all blocks
        }
        barrier_init_fence();
    }
    if constexpr (CLUSTER > 1)
        cluster_barrier();
    else
        __syncthreads();

    if (warpgroup == 0) {
        // ---- copies
        fewer_registers<40>();
        if (threadIdx.x == 0) {
            int stage = 0, parity = 1;
            for (int tile = first; tile < shape.tiles; tile += stride) {
                int row, column;
                shape.at(tile, row, column);
                int i0 = (row * CLUSTER + rank) * HOPPER_BM, j0 = column * BN;
                for (int step = 0; step < steps; step++) {
                    uint32_t a = shared + stage * Tile::STAGE_BYTES, b = a + Tile::A_BYTES, barrier = full + stage * 8;
                    barrier_wait(empty + stage * 8, parity);
                    barrier_arrive_expect(barrier, Tile::STAGE_BYTES);
                    bulk_load(a, &a_map, barrier, step * HOPPER_BK, i0);
                    // Each block of the cluster fetches its part of B: of its columns, or backward of the depth of each panel.
                    constexpr int MASK = (1 << CLUSTER) - 1;
                    if constexpr (BACKWARD) {
                        for (int p = 0; p < PANELS; p++)
                            bulk_load_multicast(b + p * PANEL_BYTES + rank * (PANEL_BYTES / CLUSTER), &b_map, barrier, j0 + p * 64,
                                                step * HOPPER_BK + rank * (HOPPER_BK / CLUSTER), MASK);
                    } else {
                        bulk_load_multicast(b + rank * (BN / CLUSTER * 128), &b_map, barrier, step * HOPPER_BK, j0 + rank * (BN / CLUSTER), MASK);
                    }
                    if (BACKWARD && step < PANELS) bulk_prefetch(&x_map, j0 + step * 64, i0);
                    if (++stage == STAGES) stage = 0, parity ^= 1;
                }
            }
        }
    } else {
        // ---- products
        more_registers<232>();
        const int group = warpgroup - 1, warp = threadIdx.x / 32 % 4, thread = threadIdx.x % 128;
        // 16 x 16 of this warp in a panel are two times two 8×8 matrices: lane l has the address of row l%8 of matrix l/8.
        const uint32_t slots = shared + Tile::SLOT + group * Tile::SLOTS * Tile::SLOT_BYTES + warp * 16 * 128;
        const uint32_t out_lane = slots + lane % 16 * 128 + (lane / 16 ^ lane % 8) * 16;
        // It is read again, and written to memory, in rows: a lane has 16 bytes of row l/8 of four. Rows 4 further: in the swizzle, the chunk is another.
        const int chunk = lane % 8;
        const uint32_t in_lane[2] = {slots + lane / 8 * 128 + (chunk ^ lane / 8) * 16, slots + (lane / 8 + 4) * 128 + (chunk ^ (lane / 8 + 4)) * 16};
        float* rows = (float*)(matmul_memory + Tile::ROWS) + group * BN;
        auto release = [&](int s) {
            if (CLUSTER == 1 && lane == 0) barrier_arrive(empty + s * 8);
            if (CLUSTER > 1 && lane < CLUSTER) barrier_arrive_at(empty + s * 8, lane);
        };
        int done = group * steps;  // of the steps that went through the ring
        for (int tile = first + group * stride; tile < shape.tiles; tile += 2 * stride, done += 2 * steps) {
            int row, column;
            shape.at(tile, row, column);
            const int tile_row = row * CLUSTER + rank, j0 = column * BN;
            float sum[2][BN / 2];
            if constexpr (!BACKWARD) {
                named_barrier(3 + group, 128);  // all have done with the last tile's bias
                for (int j = thread; j < BN; j += 128) rows[j] = output.bias && j0 + j < shape.N ? to_float(output.bias[j0 + j]) : 0;
                named_barrier(3 + group, 128);
#pragma unroll
                for (int n = 0; n < BN / 8; n++) {
                    float2 x = *(const float2*)(rows + n * 8 + lane % 4 * 2);
#pragma unroll
                    for (int m = 0; m < 2; m++) sum[m][4 * n] = sum[m][4 * n + 2] = x.x, sum[m][4 * n + 1] = sum[m][4 * n + 3] = x.y;
                }
            }
            if constexpr (BACKWARD) {
#pragma unroll
                for (int k = 0; k < BN / 2; k++) sum[0][k] = sum[1][k] = 0;
            }
            // Whose turn it is: after the other one has seen its last stage.
            if (tile != first) named_barrier(1 + group, 256);
            int stage = done % STAGES, parity = done / STAGES % 2, last = 0;
            for (int step = 0; step < steps; step++) {
                uint32_t a = (shared + stage * Tile::STAGE_BYTES) & 0x3ffff, b = a + Tile::A_BYTES;  // without the number of the block in its cluster
                barrier_wait(full + stage * 8, parity);
                products_begin();
#pragma unroll
                for (int p = 0; p < HOPPER_BK / 16; p++) {
                    uint64_t operand_b = BACKWARD ? panel_operand_transposed(b, PANEL_BYTES) + p * 128 : panel_operand(b) + p * 2;
#pragma unroll
                    for (int m = 0; m < 2; m++) product<0, BACKWARD>(sum[m], panel_operand(a + m * PANEL_BYTES) + p * 2, operand_b, true);
                }
                products_commit();
                if (step > 0) {
                    products_wait<1>();
                    release(last);
                }
                last = stage;
                if (++stage == STAGES) stage = 0, parity ^= 1;
            }
            if (tile + stride < shape.tiles) named_barrier_arrive(2 - group, 256);
            products_wait<0>();
            release(last);
            products_done(sum[0]);
            products_done(sum[1]);

            // ---- epilogue. A panel goes into its slot as it comes out of the products, and comes back in rows, all of it at once: what has to be waited
            // for is waited for once a panel. Nobody but this warp touches these rows.
            int i0 = tile_row * HOPPER_BM + warp * 16 + lane / 8, j = j0 + chunk * 8;
            int64_t start = (int64_t)i0 * output.ld + j;
            auto anew = [&] {  // no address is kept from one panel to the next: the sums need the registers
                asm volatile("" : "+l"(start), "+r"(i0), "+r"(j));
            };
            auto at = [&](int p, int i) { return start + p * 64 + (i / 4 * 64 + i % 4 * 4) * output.ld; };
            auto inside = [&](int p, int i) { return j + p * 64 < shape.N && i0 + i / 4 * 64 + i % 4 * 4 < shape.M; };
            auto put = [&](int p) {
#pragma unroll
                for (int n = 0; n < 8; n += 2) {  // 16 columns: as many 8×8 matrices as one instruction stores
#pragma unroll
                    for (int m = 0; m < 2; m++) {
                        const float* y = &sum[m][p * 32 + n * 4];
                        const uint32_t pairs[4] = {pack_bf16(y[0], y[1]), pack_bf16(y[2], y[3]), pack_bf16(y[4], y[5]), pack_bf16(y[6], y[7])};
                        store_matrices((out_lane ^ n * 16) + p % 2 * Tile::SLOT_BYTES + m * PANEL_BYTES, pairs);
                    }
                }
            };
            [[maybe_unused]] uint4 x[1][8];
            [[maybe_unused]] float total[PANELS][8] = {};  // over this thread's rows of its eight columns of each panel
            auto fetch = [&](int p) {
                if constexpr (BACKWARD) {
                    anew();
#pragma unroll
                    for (int i = 0; i < 8; i++) x[0][i] = load_if(inside(p, i), output.x + at(p, i));
                }
            };
            put(0);
            fetch(0);
            put(1);
            __syncwarp();
#pragma unroll
            for (int p = 0; p < PANELS; p++) {
                uint4 y[8];
#pragma unroll
                for (int i = 0; i < 8; i++) y[i] = load_shared(in_lane[i % 2] + p % 2 * Tile::SLOT_BYTES + i / 4 * PANEL_BYTES + i / 2 % 2 * 1024);
                if (p == 0) {
                    __syncwarp();
                    put(2);
                    __syncwarp();
                }
                anew();
                if constexpr (BACKWARD) {
#pragma unroll
                    for (int i = 0; i < 8; i++) {
                        if (!inside(p, i)) y[i] = make_uint4(0, 0, 0, 0);  // what is outside adds nothing to the sums
                        y[i] = gelu_gradient8(y[i], x[0][i], total[p]);
                        store_if(inside(p, i), output.out + at(p, i), y[i]);
                    }
                    if (p + 1 < PANELS) fetch(p + 1);
                } else {
#pragma unroll
                    for (int i = 0; i < 8; i++) store_if(inside(p, i), output.x + at(p, i), y[i]);
#pragma unroll
                    for (int i = 0; i < 8; i++) {
                        y[i] = gelu8(y[i]);
                        store_if(inside(p, i), output.out + at(p, i), y[i]);
                    }
                }
            }
            if (BACKWARD && output.partial) {  // over the warp, then over the four through slot 1, where each has read its part
                __syncwarp();
                float* sums = (float*)(matmul_memory + (slots - shared) + Tile::SLOT_BYTES);
#pragma unroll
                for (int p = 0; p < PANELS; p++) {
#pragma unroll
                    for (int k = 0; k < 8; k++) {
                        total[p][k] += __shfl_xor_sync(0xffffffff, total[p][k], 8);
                        total[p][k] += __shfl_xor_sync(0xffffffff, total[p][k], 16);
                    }
                    if (lane < 8) {
                        *(float4*)(sums + p * 64 + chunk * 8) = make_float4(total[p][0], total[p][1], total[p][2], total[p][3]);
                        *(float4*)(sums + p * 64 + chunk * 8 + 4) = make_float4(total[p][4], total[p][5], total[p][6], total[p][7]);
                    }
                }
                named_barrier(3 + group, 128);
                sums -= warp * 512;
                for (int k = thread; k < BN; k += 128)
                    if (j0 + k < shape.N) output.partial[(int64_t)tile_row * shape.N + j0 + k] = (sums[k] + sums[512 + k]) + (sums[1024 + k] + sums[1536 + k]);
                named_barrier(3 + group, 128);
            }
        }
    }
    if constexpr (CLUSTER > 1) cluster_barrier();  // others' copies and arrivals may still be on their way to this block
#endif
}

// sums (N) += the rows of partial (rows,N), in one order.
constexpr int GELU_SUMS_STRANDS = 32;
static __global__ void __launch_bounds__(1024) add_tile_sums_kernel(float* sums, const float* partial, int rows, int N) {
    __shared__ float shared[GELU_SUMS_STRANDS][33];
    const int lane = threadIdx.x % 32, strand = threadIdx.x / 32, column = blockIdx.x * 32 + lane;
    float sum = 0;
    if (column < N) {
#pragma unroll 8
        for (int row = strand; row < rows; row += GELU_SUMS_STRANDS) sum += partial[(int64_t)row * N + column];
    }
    shared[strand][lane] = sum;
    __syncthreads();
    if (strand > 0 || column >= N) return;
    sum = 0;
#pragma unroll
    for (int s = 0; s < GELU_SUMS_STRANDS; s++) sum += shared[s][lane];
    sums[column] += sum;
}

template <bool BACKWARD>
inline void launch_hopper_gelu(cudaStream_t stream, const HopperGelu& m) {
    using Tile = GeluTile<BACKWARD>;
    constexpr int CLUSTER = 2;
    auto matrix = [](const floatX* x, int64_t rows, int64_t columns, int64_t ld, int box_rows) {
        return tensor_map<2>(x, {columns, rows}, {ld}, {64, box_rows});
    };
    CUtensorMap a_map = matrix(m.A, m.M, m.K, m.lda, HOPPER_BM), x_map = matrix(m.X, m.M, m.N, m.ldc, HOPPER_BM);
    CUtensorMap b_map = BACKWARD ? matrix(m.B, m.K, m.N, m.ldb, HOPPER_BK / CLUSTER) : matrix(m.B, m.N, m.K, m.ldb, Tile::BN / CLUSTER);
    const int rows = (int)ceil_div(m.M, HOPPER_BM * CLUSTER), columns = (int)ceil_div(m.N, Tile::BN), partial_rows = (int)ceil_div(m.M, HOPPER_BM);
    HopperShape shape = {(int)m.M, (int)m.N, (int)m.K, rows, columns, rows * columns};
    float* partial = m.sums ? Scratch{workspace(), WORKSPACE_BYTES}.take<float>((int64_t)rows * CLUSTER * m.N) : nullptr;
    GeluOutput output = {m.bias, m.X, m.out, m.ldc, partial};

    auto* kernel = matmul_kernel10<BACKWARD, CLUSTER>;
    static const bool allowed = [&] { return allow_shared_memory(kernel, Tile::BYTES), true; }();
    (void)allowed;
    cudaLaunchAttribute cluster = {};
    cluster.id = cudaLaunchAttributeClusterDimension;
    cluster.val.clusterDim = {CLUSTER, 1, 1};
    cudaLaunchConfig_t config = {};
    config.gridDim = CLUSTER * std::min(shape.tiles, device_properties().multiProcessorCount / CLUSTER);
    config.blockDim = 384;
    config.dynamicSmemBytes = Tile::BYTES;
    config.stream = stream;
    config.attrs = &cluster;
    config.numAttrs = 1;
    CUDA_CHECK(cudaLaunchKernelEx(&config, kernel, a_map, b_map, x_map, shape, output));
    if (!m.sums) return;
    add_tile_sums_kernel<<<(unsigned)ceil_div(m.N, 32), 32 * GELU_SUMS_STRANDS, 0, stream>>>(m.sums, partial, partial_rows, (int)m.N);
    LAUNCH_CHECK();
}

// Whether hopper_gelu() can do this: rows start on multiples of 16 bytes and end there; the partial sums fit into the workspace.
inline bool hopper_gelu_takes(const HopperGelu& m) {
    auto rows16 = [](const floatX* x, int64_t ld) { return aligned16(x) && ld % 8 == 0; };
    auto fits = [](int64_t n) { return n > 0 && n < 1 << 30; };
    return hopper_code() && fits(m.M) && fits(m.N) && fits(m.K) && m.N % 8 == 0 && rows16(m.A, m.lda) && rows16(m.B, m.ldb) && rows16(m.X, m.ldc) &&
           rows16(m.out, m.ldc) && fits(ceil_div(m.M, HOPPER_BM) * ceil_div(m.N, 192)) &&
           (!m.sums || round_up(m.M, 2 * HOPPER_BM) / HOPPER_BM * m.N * (int64_t)sizeof(float) <= WORKSPACE_BYTES);
}
inline void hopper_gelu(cudaStream_t stream, const HopperGelu& m) { m.backward ? launch_hopper_gelu<true>(stream, m) : launch_hopper_gelu<false>(stream, m); }

#endif

}  // namespace gpu
