// Matrix products on Hopper (bf16, compute capability 9.0a) with more than a bias behind them: what the layers of a GPT-2 do next to a product's numbers while
// they are in registers.
//
//     RESIDUAL        C (M,N) = A (M,K)·B (N,K)ᵀ + bias (N) + R (M,N)
//     GELU            X (M,N) = A (M,K)·B (N,K)ᵀ + bias (N)                C = GELU(X): both are written; GELU sees X as it is written, rounded
//     GELU_BACKWARD   C (M,N) = A (M,K)·B (K,N) ⊙ GELU'(X)                 sums (N) += Σ_m C, the bias gradient of the layer that X comes from
//     NOTHING         C (M,N) = A (M,K)·B (K,N)                            a linear layer's dx
//
// all row-major, sums float32. With GPT-2 124M's 65536 x 768 x 3072, GELU is 309 GFLOP, 448 µs at the 690 TFLOP/s that the power allows, and 905 MB, 300 µs
// at 3.0 TB/s: both in 450 µs only if nothing waits for anything else.
//
// Copies and products are those of matmul_hopper.cuh: one warpgroup copies, two multiply tiles of 128 x 192 in turns. What a warpgroup does to its tile while
// the other multiplies is for one warp at a time on each quarter of the multiprocessor, so that every wait is felt. Ordinary loads and stores of device
// memory would stand in line behind one another, and each way through shared memory counts too, which the products' operands keep busy. So numbers stay where
// the products leave them, in registers, and the sums begin with the bias. R and X are brought by the copy engine, a tile ahead, into *slots* of 64 x 64
// numbers, a ring that both warpgroups go through; a warp reads its 16 rows of a slot as it has its sums, two neighbouring numbers a register, writes the
// result to the same place, and the copy engine takes it to memory. Without R and X, each warp has four blocks of 16 x 64 for what goes out.
//
// The order of every sum is fixed by the shapes: same call, same bits.
#pragma once

#include "gelu.cuh"
#include "matmul_hopper.cuh"

namespace gpu {

#ifndef GPU_FLOAT32

enum class Fused { NOTHING, RESIDUAL, GELU, GELU_BACKWARD };

struct HopperFused {
    Fused what;
    int64_t M, N, K;
    const floatX* A;  // (M,K)
    int64_t lda;
    const floatX* B;  // (N,K), or (K,N)
    int64_t ldb;
    floatX* C;              // (M,N)
    int64_t ldc;            // of C, R and X
    const floatX* bias;     // (N), or null
    const floatX* second;   // R or X (GELU writes it); null where there is none
    float* sums = nullptr;  // (N), or null
};

struct FusedTile {
    static constexpr int UNITS = HOPPER_BM / 64 * (HOPPER_BN / 64), SLOTS = 8, SLOT_BYTES = PANEL_BYTES, BLOCK_BYTES = 16 * 128;  // UNITS: of 64 x 64, a tile
    static constexpr int SLOT = HOPPER_STAGES * HOPPER_STAGE_BYTES, NUMBERS = SLOT + SLOTS * SLOT_BYTES;
    static constexpr int BARRIERS = NUMBERS + 2 * 256 * 4;  // NUMBERS: of each warpgroup the bias of its tile, or four warps' sums of 64 columns
    static constexpr int BIAS_LD = HOPPER_BN / 4 + 4;  // the bias of columns 2·q and 2·q + 1 of each eight one behind another, for the lanes of lane%4 = q
    static constexpr int BYTES = BARRIERS + (2 * HOPPER_STAGES + 3 * SLOTS) * 8;
    static_assert(BYTES <= 227 << 10);
};

// x: of each lane the sums over its rows of 16 columns, 8·n + 2·(lane%4) + {0, 1}, n = 0..7. The eight lanes of one lane%4 share them out: a lane has those of
// n = column_group(lane) of the whole warp in x[0], x[1].
__device__ __forceinline__ void sum_over_rows(float (&x)[16], int lane) {
#pragma unroll
    for (int round = 0; round < 3; round++) {
        const int half = 8 >> round;
        const bool upper = lane & 2 * half;
#pragma unroll
        for (int k = 0; k < 8; k++) {
            if (k >= half) break;
            const float mine = upper ? x[k + half] : x[k], others = upper ? x[k] : x[k + half];
            x[k] = mine + __shfl_xor_sync(0xffffffff, others, 2 * half);
        }
    }
}
__device__ __forceinline__ int column_group(int lane) { return lane / 16 * 4 + lane / 8 % 2 * 2 + lane / 4 % 2; }

template <Fused WHAT, int CLUSTER>
__global__ void __launch_bounds__(384, 1)
    matmul_kernel10(const __grid_constant__ CUtensorMap a_map, const __grid_constant__ CUtensorMap b_map, const __grid_constant__ CUtensorMap c_map,
                    const __grid_constant__ CUtensorMap second_map, HopperShape shape, const floatX* bias, float* partial) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
    using Tile = FusedTile;
    constexpr int UNITS = Tile::UNITS, SLOTS = Tile::SLOTS;
    constexpr bool TRANSPOSED_B = WHAT == Fused::GELU_BACKWARD || WHAT == Fused::NOTHING, BIAS = !TRANSPOSED_B;
    constexpr bool READS = WHAT == Fused::RESIDUAL || WHAT == Fused::GELU_BACKWARD;
    extern __shared__ __align__(1024) char matmul_memory[];
    const HopperBlock<CLUSTER, TRANSPOSED_B> block(matmul_memory, Tile::BARRIERS, shape);
    // Of each slot a barrier `filled` for each warpgroup, so that a warpgroup meets all its phases, and one `free`.
    const uint32_t filled = block.empty + HOPPER_STAGES * 8, free = filled + 2 * SLOTS * 8;
    if (threadIdx.x == 0) {
        block.init_barriers();
        for (int s = 0; s < SLOTS; s++) {
            barrier_init(filled + s * 8, 1);
            barrier_init(filled + (SLOTS + s) * 8, 1);
            barrier_init(free + s * 8, 4);
        }
        barrier_init_fence();
    }
    block.barrier();

    const int warpgroup = threadIdx.x / 128, lane = threadIdx.x % 32;
    if (warpgroup == 0) {
        // ---- copies: one thread for A and B, one for R or X
        fewer_registers<40>();
        if (threadIdx.x == 0) block.copy(a_map, b_map, shape);
        if (READS && threadIdx.x == 32) {
            int slot = 0, parity = 1, group = 0;
            for (int tile = block.first; tile < shape.tiles; tile += block.stride, group ^= 1) {
                int i0, j0;
                block.at(shape, tile, i0, j0);
                for (int unit = 0; unit < UNITS; unit++) {
                    const uint32_t barrier = filled + (group * SLOTS + slot) * 8;
                    barrier_wait(free + slot * 8, parity);
                    barrier_arrive_expect(barrier, Tile::SLOT_BYTES);
                    bulk_load(block.shared + Tile::SLOT + slot * Tile::SLOT_BYTES, &second_map, barrier, j0 + unit / 2 * 64, i0 + unit % 2 * 64);
                    if (++slot == SLOTS) slot = 0, parity ^= 1;
                }
            }
        }
    } else {
        // ---- products
        more_registers<232>();
        const int group = warpgroup - 1, warp = threadIdx.x / 32 % 4, thread = threadIdx.x % 128;
        // 16 x 16 of this warp in a block are two times two 8×8 matrices: lane l has the address of row l%8 of matrix l/8.
        const uint32_t in_block = lane % 16 * 128 + (lane / 16 ^ lane % 8) * 16;
        const uint32_t blocks = block.shared + Tile::SLOT + (READS ? warp : (group * 4 + warp) * 4) * Tile::BLOCK_BYTES;
        float* numbers = (float*)(matmul_memory + Tile::NUMBERS) + group * 256;
        int done = group * block.steps, units = group * UNITS, parities = 0;  // of the steps and units that went through the rings; of `filled`, a bit a slot
        [[maybe_unused]] float fetched[2];  // this thread's part of the next tile's bias: in time, while the last tile goes to memory
        auto fetch_bias = [&](int tile) {
            int tile_row, j0;
            block.at(shape, min(tile, shape.tiles - 1), tile_row, j0);  // behind the last there is none
#pragma unroll
            for (int i = 0; i < 2; i++) {
                const int j = thread + 128 * i;
                fetched[i] = bias && tile < shape.tiles && j < HOPPER_BN && j0 + j < shape.N ? to_float(bias[j0 + j]) : 0;
            }
        };
        if constexpr (BIAS) fetch_bias(block.first + group * block.stride);
        for (int tile = block.first + group * block.stride; tile < shape.tiles; tile += 2 * block.stride, done += 2 * block.steps, units += 2 * UNITS) {
            int tile_row, j0;
            block.at(shape, tile, tile_row, j0);
            if (!READS && lane == 0) bulk_store_wait();
            __syncwarp();
            // The sums begin with the bias; or with zeros that are written: left to the first product, the compiler spilt registers.
            float sum[2][HOPPER_BN / 2];
            if constexpr (BIAS) {
                named_barrier(3 + group, 128);  // all have read the last tile's bias
#pragma unroll
                for (int i = 0; i < 2; i++) {
                    const int j = thread + 128 * i;
                    if (j < HOPPER_BN) numbers[j % 8 / 2 * Tile::BIAS_LD + j / 8 * 2 + j % 2] = fetched[i];
                }
                named_barrier(3 + group, 128);
#pragma unroll
                for (int n = 0; n < HOPPER_BN / 8; n += 2) {
                    const float4 b = *(const float4*)(numbers + lane % 4 * Tile::BIAS_LD + n * 2);
#pragma unroll
                    for (int m = 0; m < 2; m++) {
                        sum[m][4 * n] = sum[m][4 * n + 2] = b.x, sum[m][4 * n + 1] = sum[m][4 * n + 3] = b.y;
                        sum[m][4 * n + 4] = sum[m][4 * n + 6] = b.z, sum[m][4 * n + 5] = sum[m][4 * n + 7] = b.w;
                    }
                }
            } else {
#pragma unroll
                for (int k = 0; k < HOPPER_BN / 2; k++) sum[0][k] = sum[1][k] = 0;
            }
            block.template multiply<true>(sum, done, group, tile != block.first, tile + block.stride < shape.tiles);
            if constexpr (BIAS) fetch_bias(tile + 2 * block.stride);

            // ---- epilogue
            [[maybe_unused]] float total[16];  // over this thread's rows of a panel
#pragma unroll
            for (int unit = 0; unit < UNITS; unit++) {
                const int p = unit / 2, m = unit % 2;                                // panel of 64 columns, 64 rows
                constexpr int EACH = WHAT == Fused::GELU ? 2 : 1, AHEAD = 4 / EACH;  // blocks a unit; units that are on their way at a time
                const int slot = READS ? (units + unit) % SLOTS : unit % AHEAD;
                const uint32_t out = blocks + slot * (READS ? Tile::SLOT_BYTES : EACH * Tile::BLOCK_BYTES);
                uint32_t at = out + in_block;
                asm volatile("" : "+r"(at));  // no address is kept from one unit to the next: the sums need the registers
                if constexpr (READS) {
                    barrier_wait(filled + (group * SLOTS + slot) * 8, parities >> slot & 1);
                    parities ^= 1 << slot;
                } else if (unit >= AHEAD) {
                    if (lane == 0) bulk_store_wait<AHEAD - 1>();
                    __syncwarp();
                }
                if (WHAT == Fused::GELU_BACKWARD && m == 0) {
#pragma unroll
                    for (int k = 0; k < 16; k++) total[k] = 0;
                }
#pragma unroll
                for (int n = 0; n < 8; n += 2) {  // 16 columns: as many 8×8 matrices as one instruction loads and stores
                    // Pairs of neighbouring columns: 8·n of rows lane/4 and lane/4 + 8, then 8·(n+1) of the same rows.
                    [[maybe_unused]] uint32_t x[4];
                    uint32_t y[4];
                    if constexpr (READS) load_matrices(x, at ^ n * 16);
#pragma unroll
                    for (int i = 0; i < 4; i++) {
                        const float* s = &sum[m][p * 32 + n * 4 + 2 * i];
                        float2 v = make_float2(s[0], s[1]);
                        if constexpr (READS) {
                            const float2 second = unpack_bf16(x[i]);
                            if constexpr (WHAT == Fused::RESIDUAL) {
                                v.x += second.x, v.y += second.y;
                            } else {
                                v.x *= gelu_gradient(second.x), v.y *= gelu_gradient(second.y);
                                total[(n + i / 2) * 2] += v.x, total[(n + i / 2) * 2 + 1] += v.y;
                            }
                        }
                        y[i] = pack_bf16(v.x, v.y);
                    }
                    store_matrices(at ^ n * 16, y);
                    if constexpr (WHAT == Fused::GELU) {
#pragma unroll
                        for (int i = 0; i < 4; i++) {
                            const float2 v = unpack_bf16(y[i]);
                            y[i] = pack_bf16(gelu(v.x), gelu(v.y));
                        }
                        store_matrices((at ^ n * 16) + Tile::BLOCK_BYTES, y);
                    }
                }
                async_fence();
                __syncwarp();
                if (lane == 0) {
                    const int column = j0 + p * 64, row = tile_row + m * 64 + warp * 16;
                    if constexpr (WHAT == Fused::GELU) bulk_store(&second_map, out, column, row);
                    bulk_store(&c_map, out + (EACH - 1) * Tile::BLOCK_BYTES, column, row);
                    bulk_store_commit();
                    constexpr int LATER = 3;  // a slot is handed back when the copy engine has read it, three units behind
                    if (READS && unit >= LATER) {
                        bulk_store_wait<LATER>();
                        barrier_arrive(free + (units + unit - LATER) % SLOTS * 8);
                    }
                    if (READS && unit == UNITS - 1) {
                        bulk_store_wait();
                        for (int u = UNITS - LATER; u < UNITS; u++) barrier_arrive(free + (units + u) % SLOTS * 8);
                    }
                }
                if (WHAT == Fused::GELU_BACKWARD && m == 1 && partial) {  // over the warp, then over the four
                    sum_over_rows(total, lane);
                    named_barrier(3 + group, 128);  // all have read the last panel's
                    *(float2*)(numbers + warp * 64 + column_group(lane) * 8 + lane % 4 * 2) = make_float2(total[0], total[1]);
                    named_barrier(3 + group, 128);
                    const int j = j0 + p * 64 + thread;
                    if (thread < 64 && j < shape.N)
                        partial[(int64_t)(tile_row / HOPPER_BM) * shape.N + j] =
                            (numbers[thread] + numbers[64 + thread]) + (numbers[128 + thread] + numbers[192 + thread]);
                }
            }
        }
        if (lane == 0) bulk_store_wait();
    }
    if constexpr (CLUSTER > 1) cluster_barrier();  // others' copies and arrivals may still be on their way to this block
#endif
}

// sums (N) += the rows of partial (rows,N), in one order.
constexpr int TILE_SUMS_STRANDS = 32;
static __global__ void __launch_bounds__(32 * TILE_SUMS_STRANDS) add_tile_sums_kernel(float* sums, const float* partial, int rows, int N) {
    __shared__ float shared[TILE_SUMS_STRANDS][33];
    const int lane = threadIdx.x % 32, strand = threadIdx.x / 32, column = blockIdx.x * 32 + lane;
    float sum = 0;
    if (column < N) {
#pragma unroll 8
        for (int row = strand; row < rows; row += TILE_SUMS_STRANDS) sum += partial[(int64_t)row * N + column];
    }
    shared[strand][lane] = sum;
    __syncthreads();
    if (strand > 0 || column >= N) return;
    sum = 0;
#pragma unroll
    for (int s = 0; s < TILE_SUMS_STRANDS; s++) sum += shared[s][lane];
    sums[column] += sum;
}

template <Fused WHAT>
inline void launch_hopper_fused(cudaStream_t stream, const HopperFused& m) {
    constexpr int CLUSTER = 2;
    constexpr bool TRANSPOSED_B = WHAT == Fused::GELU_BACKWARD || WHAT == Fused::NOTHING;
    auto matrix = [](const floatX* x, int64_t rows, int64_t columns, int64_t ld, int box_rows) {
        return tensor_map<2>(x, {columns, rows}, {ld}, {64, box_rows});
    };
    CUtensorMap a_map = matrix(m.A, m.M, m.K, m.lda, HOPPER_BM), c_map = matrix(m.C, m.M, m.N, m.ldc, 16);
    CUtensorMap b_map = TRANSPOSED_B ? matrix(m.B, m.K, m.N, m.ldb, HOPPER_BK / CLUSTER) : matrix(m.B, m.N, m.K, m.ldb, HOPPER_BN / CLUSTER);
    CUtensorMap second_map = m.second ? matrix(m.second, m.M, m.N, m.ldc, WHAT == Fused::GELU ? 16 : 64) : c_map;
    const int rows = (int)ceil_div(m.M, HOPPER_BM * CLUSTER), columns = (int)ceil_div(m.N, HOPPER_BN);
    HopperShape shape = {(int)m.M, (int)m.N, (int)m.K, rows, columns, rows * columns};
    float* partial = m.sums ? Scratch{workspace(), WORKSPACE_BYTES}.take<float>((int64_t)rows * CLUSTER * m.N) : nullptr;

    launch_hopper_blocks<CLUSTER>(stream, matmul_kernel10<WHAT, CLUSTER>, FusedTile::BYTES, shape, a_map, b_map, c_map, second_map, shape, m.bias, partial);
    if (!m.sums) return;
    add_tile_sums_kernel<<<(unsigned)ceil_div(m.N, 32), 32 * TILE_SUMS_STRANDS, 0, stream>>>(m.sums, partial, (int)ceil_div(m.M, HOPPER_BM), (int)m.N);
    LAUNCH_CHECK();
}

// Whether hopper_fused() can do this: rows start on multiples of 16 bytes, and those that are written end there; the partial sums fit into the workspace.
inline bool hopper_fused_takes(const HopperFused& m) {
    HopperMatmul product = {m.M, m.N, m.K, m.A, m.lda, m.B, m.ldb, m.C, m.ldc};
    return hopper_matmul_takes(product) && aligned16(m.second) &&
           (!m.sums || round_up(m.M, 2 * HOPPER_BM) / HOPPER_BM * m.N * (int64_t)sizeof(float) <= WORKSPACE_BYTES);
}
inline void hopper_fused(cudaStream_t stream, const HopperFused& m) {
    switch (m.what) {
        case Fused::NOTHING:
            return launch_hopper_fused<Fused::NOTHING>(stream, m);
        case Fused::RESIDUAL:
            return launch_hopper_fused<Fused::RESIDUAL>(stream, m);
        case Fused::GELU:
            return launch_hopper_fused<Fused::GELU>(stream, m);
        case Fused::GELU_BACKWARD:
            return launch_hopper_fused<Fused::GELU_BACKWARD>(stream, m);
    }
}

#endif

}  // namespace gpu
