// The forward matrix product of a linear layer on Hopper (bf16, compute capability 9.0a), with an epilogue that runs beside the products, not behind them.
//
//     C (M,N) = A (M,K)·B (N,K)ᵀ + bias (N)        row-major, sums float32
//
// and, if asked to, heads of C rotated by their rows' positions (rope.cuh) on the way: a thread has both numbers of a pair, before they are rounded. The
// rotations of a tile's rows are fetched into shared memory while it is multiplied.
//
// A block stays on its multiprocessor (one each) and computes tiles of 128 x BN of C, one behind another. Of its three warpgroups
//     one copies       one thread keeps a ring of stages full: 64 of K, 128 x 64 of A and BN x 64 of B a stage, by bulk tensor copies
//     two multiply     the tiles in turns: while one has the matrix units the other takes its sums, in registers, through the epilogue and to memory
//
// A stage is 64 of K, 40 KB, and is multiplied in 768 clocks: 53 bytes a clock from the second-level cache, more than that delivers to all multiprocessors at
// once. So two blocks make a cluster: they have tiles one below the other, which need the same B; each fetches half of it and the copy goes to both, 37 bytes
// a clock. The power limit then holds the clock below what the matrix units could run at.
//
// The order of every sum is fixed by the shapes: same call, same bits.
#pragma once

#include <algorithm>
#include <climits>

#include "hopper.cuh"
#include "overlap.cuh"

namespace gpu {

// The columns below `columns` of a matrix stand in heads of `head` numbers. In each head those from `offset` on, `size` of them, are rotated as adjacent pairs:
// pair i of a row at position p by rotations[p·size/2 + i], cos and sin. Widths are multiples of 8, `columns` of 64 unless it is
// all; head >= 64, size <= 32.
struct RotatedColumns {
    const float2* rotations = nullptr;  // null: nothing is rotated
    const int* position = nullptr;      // (M)
    int columns = 0, head = 0, offset = 0, size = 0;
};

#ifndef GPU_FLOAT32

struct HopperMatmul {
    int64_t M, N, K;
    const floatX* A;  // (M,K)
    int64_t lda;
    const floatX* B;  // (N,K)
    int64_t ldb;
    floatX* C;  // (M,N)
    int64_t ldc;
    const floatX* bias = nullptr;  // (N)
    RotatedColumns rotated = {};
};

// Four stages of 40 KB; 192 columns, since GPT-2's numbers of channels are multiples of 192 more often than of 256.
constexpr int HOPPER_BM = 128, HOPPER_BN = 192, HOPPER_BK = 64, HOPPER_STAGES = 4, PANEL_BYTES = 64 * 128;
constexpr int HOPPER_A_BYTES = HOPPER_BM * 128, HOPPER_STAGE_BYTES = HOPPER_A_BYTES + HOPPER_BN * 128;

// What stands where in shared memory: the ring; for each of eight warps that multiply OUT_BLOCKS blocks of 16 x 64 numbers of its tile, on their way to
// memory; of each warpgroup the rotations of its tile's rows, 16 pairs each, swizzled like panels, and its bias; barriers.
template <bool ROTATE>
struct HopperTile {
    static constexpr int OUT_BLOCKS = ROTATE ? 2 : 4, BLOCKS = HOPPER_BM / 64 * (HOPPER_BN / 64), BLOCK_BYTES = 16 * 128;
    static constexpr int OUT = HOPPER_STAGES * HOPPER_STAGE_BYTES, ROTATIONS = OUT + 8 * OUT_BLOCKS * BLOCK_BYTES;
    static constexpr int ROTATIONS_BYTES = ROTATE ? HOPPER_BM * 128 : 0, BIAS = ROTATIONS + 2 * ROTATIONS_BYTES;
    static constexpr int BARRIERS = BIAS + 2 * HOPPER_BN * 4, BYTES = BARRIERS + 2 * HOPPER_STAGES * 8;
    static_assert(BYTES <= 227 << 10);
};

// ---- copies and products, in turns --------------------------------------------------------------------------------------------------------------------------

struct HopperShape {
    int M, N, K;
    int rows, columns;  // in tiles; rows: of CLUSTER tiles one below the other
    int tiles;          // rows·columns
    static constexpr int GROUP = 16;
    // Sixteen rows from left to right, then the next sixteen: what runs at a time reads few rows of A and few of B, which the second-level cache then holds.
    __device__ void at(int tile, int& row, int& column) const {
        int first = tile / (GROUP * columns) * GROUP, height = min(rows - first, GROUP), i = tile % (GROUP * columns);
        row = first + i % height;
        column = i / height;
    }
};

// What a block's copying thread and its multiplying warpgroups share: which tiles are the block's, and the ring, which is where shared memory begins.
// TRANSPOSED_B: B is (K,N), and lies in a stage as panels of 64 columns; else it is (N,K).
template <int CLUSTER, bool TRANSPOSED_B>
struct HopperBlock {
    static constexpr int STAGES = HOPPER_STAGES, STAGE_BYTES = HOPPER_STAGE_BYTES, A_BYTES = HOPPER_A_BYTES, BM = HOPPER_BM, BN = HOPPER_BN, BK = HOPPER_BK;
    uint32_t shared, full, empty;  // full, empty: barriers of the stages, 2·STAGES in all
    int rank, first, stride, steps;

    __device__ __forceinline__ HopperBlock(const void* memory, int barriers, const HopperShape& shape) {
        shared = shared_address(memory);
        full = shared + barriers;
        empty = full + STAGES * 8;
        rank = CLUSTER > 1 ? cluster_rank() : 0;
        first = blockIdx.x / CLUSTER;
        stride = gridDim.x / CLUSTER;
        steps = (shape.K + BK - 1) / BK;
    }
    __device__ __forceinline__ void init_barriers() const {  // by one thread; then barrier_init_fence() and barrier()
        for (int s = 0; s < STAGES; s++) {
            barrier_init(full + s * 8, 1);
            barrier_init(empty + s * 8, 4 * CLUSTER);  // the warps that multiply it, in all blocks
        }
    }
    __device__ __forceinline__ void barrier() const {
        if constexpr (CLUSTER > 1)
            cluster_barrier();
        else
            __syncthreads();
    }
    // The first row and column of a tile.
    __device__ __forceinline__ void at(const HopperShape& shape, int tile, int& i0, int& j0) const {
        int row, column;
        shape.at(tile, row, column);
        i0 = (row * CLUSTER + rank) * BM;
        j0 = column * BN;
    }

    // By one thread: A and B of all tiles, stage by stage.
    __device__ __forceinline__ void copy(const CUtensorMap& a_map, const CUtensorMap& b_map, const HopperShape& shape) const {
        int stage = 0, parity = 1;
        for (int tile = first; tile < shape.tiles; tile += stride) {
            int i0, j0;
            at(shape, tile, i0, j0);
            for (int step = 0; step < steps; step++) {
                uint32_t a = shared + stage * STAGE_BYTES, b = a + A_BYTES, barrier = full + stage * 8;
                barrier_wait(empty + stage * 8, parity);
                barrier_arrive_expect(barrier, STAGE_BYTES);
                bulk_load(a, &a_map, barrier, step * BK, i0);
                // Each block of the cluster fetches its part of B: of its columns, or, transposed, of the depth of each panel.
                constexpr int MASK = (1 << CLUSTER) - 1, COLUMNS = BN / CLUSTER, DEPTH = BK / CLUSTER;
                if constexpr (TRANSPOSED_B) {
                    for (int p = 0; p < BN / 64; p++)
                        bulk_load_multicast(b + p * PANEL_BYTES + rank * DEPTH * 128, &b_map, barrier, j0 + p * 64, step * BK + rank * DEPTH, MASK);
                } else if constexpr (CLUSTER > 1) {
                    bulk_load_multicast(b + rank * COLUMNS * 128, &b_map, barrier, step * BK, j0 + rank * COLUMNS, MASK);
                } else {
                    bulk_load(b, &b_map, barrier, step * BK, j0);
                }
                if (++stage == STAGES) stage = 0, parity ^= 1;
            }
        }
    }

    // By a warpgroup: sum = or += (ADD) the products of a tile, `done` steps after the ring's first. The warpgroups take turns: `waits` for the other one's
    // last stage (the block's first tile need not), `hands_on` its own (the last tile need not).
    template <bool ADD, int M, int C>
    __device__ __forceinline__ void multiply(float (&sum)[M][C], int done, int group, bool waits, bool hands_on) const {
        const int lane = threadIdx.x % 32;
        auto release = [&](int s) {
            if (CLUSTER == 1 && lane == 0) barrier_arrive(empty + s * 8);
            if (CLUSTER > 1 && lane < CLUSTER) barrier_arrive_at(empty + s * 8, lane);
        };
        if (waits) named_barrier(1 + group, 256);
        int stage = done % STAGES, parity = done / STAGES % 2, last = 0;
        for (int step = 0; step < steps; step++) {
            uint32_t a = (shared + stage * STAGE_BYTES) & 0x3ffff, b = a + A_BYTES;  // without the number of the block in its cluster
            barrier_wait(full + stage * 8, parity);
            products_begin();
#pragma unroll
            for (int p = 0; p < BK / 16; p++) {
                uint64_t operand_b = TRANSPOSED_B ? panel_operand_transposed(b, PANEL_BYTES) + p * 128 : panel_operand(b) + p * 2;
#pragma unroll
                for (int m = 0; m < M; m++) product<0, TRANSPOSED_B>(sum[m], panel_operand(a + m * PANEL_BYTES) + p * 2, operand_b, ADD || step > 0 || p > 0);
            }
            products_commit();
            if (step > 0) {
                products_wait<1>();
                release(last);
            }
            last = stage;
            if (++stage == STAGES) stage = 0, parity ^= 1;
        }
        if (hands_on) named_barrier_arrive(2 - group, 256);
        products_wait<0>();
        release(last);
#pragma unroll
        for (int m = 0; m < M; m++) products_done(sum[m]);
    }
};

// ---- the kernel -------------------------------------------------------------------------------------------------------------------------------------------

__device__ __forceinline__ void rotate_pair(float& x, float& y, float2 r) {
    float a = x, b = y;
    x = a * r.x - b * r.y;
    y = a * r.y + b * r.x;
}

template <int CLUSTER, bool ROTATE>
__global__ void __launch_bounds__(384, 1)
    matmul_kernel7(const __grid_constant__ CUtensorMap a_map, const __grid_constant__ CUtensorMap b_map, const __grid_constant__ CUtensorMap c_map,
                   HopperShape shape, const floatX* bias, RotatedColumns rotated) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
    using Tile = HopperTile<ROTATE>;
    constexpr int BN = HOPPER_BN, OUT_BLOCKS = Tile::OUT_BLOCKS;
    extern __shared__ __align__(1024) char matmul_memory[];
    const HopperBlock<CLUSTER, false> block(matmul_memory, Tile::BARRIERS, shape);
    if (threadIdx.x == 0) {
        block.init_barriers();
        barrier_init_fence();
    }
    block.barrier();

    const int warpgroup = threadIdx.x / 128, lane = threadIdx.x % 32;
    if (warpgroup == 0) {
        // ---- copies
        fewer_registers<40>();
        if (threadIdx.x == 0) block.copy(a_map, b_map, shape);
    } else {
        // ---- products
        more_registers<232>();
        int group = warpgroup - 1, warp = threadIdx.x / 32 - 4;  // warp: of eight
        // A block of this warp in shared memory is two times two 8×8 matrices a 16 columns: lane l has the address of row l%8 of matrix l/8.
        uint32_t out = block.shared + Tile::OUT + warp * OUT_BLOCKS * Tile::BLOCK_BYTES, out_lane = lane % 16 * 128 + (lane / 16 ^ lane % 8) * 16;
        float* tile_bias = (float*)(matmul_memory + Tile::BIAS) + group * BN;
        int done = group * block.steps;  // of the steps that went through the ring
        for (int tile = block.first + group * block.stride; tile < shape.tiles; tile += 2 * block.stride, done += 2 * block.steps) {
            int tile_row, j0;
            block.at(shape, tile, tile_row, j0);
            const int i0 = tile_row + warp % 4 * 16;  // this warp's
            int columns_left = shape.N - j0;
            if (lane == 0) bulk_store_wait();
            named_barrier(3 + group, 128);  // all have done with the last tile's bias
            for (int j = threadIdx.x % 128; j < BN; j += 128) tile_bias[j] = bias && j < columns_left ? to_float(bias[j0 + j]) : 0;
            [[maybe_unused]] const uint32_t rotations = block.shared + Tile::ROTATIONS + group * Tile::ROTATIONS_BYTES;
            if constexpr (ROTATE) {  // they come during the products; eight threads a row, two pairs each
                const int i = threadIdx.x % 128 / 8, chunk = threadIdx.x % 8, first_row = tile_row + i;
                const uint32_t to = rotations + i * 128 + (chunk ^ i % 8) * 16;
#pragma unroll
                for (int k = 0; k < HOPPER_BM / 16; k++)
                    if (first_row + 16 * k < shape.M && 4 * chunk < rotated.size) {
                        const int64_t at = rotated.position[first_row + 16 * k] * (int64_t)(rotated.size / 2) + 2 * chunk;
                        copy_async16(to + k * 16 * 128, rotated.rotations + at, true);
                    }
            }
            named_barrier(3 + group, 128);
            float sum[2][BN / 2];
            block.template multiply<false>(sum, done, group, tile != block.first, tile + block.stride < shape.tiles);

            // ---- epilogue
            if constexpr (ROTATE) {
                copy_async_wait_all();
                named_barrier(3 + group, 128);
            }
#pragma unroll
            for (int part = 0; part < Tile::BLOCKS; part++) {  // two 64 rows apart, then the next panel
                int slot = part % OUT_BLOCKS * Tile::BLOCK_BYTES;
                [[maybe_unused]] int place = 0;  // in a head, of the part's first column, counted from the first to be rotated
                uint32_t to = out + out_lane;
                if constexpr (ROTATE) {
                    place = j0 + part / 2 * 64 < rotated.columns ? (j0 + part / 2 * 64) % rotated.head - rotated.offset : INT_MIN / 2;
                    asm volatile("" : "+r"(place), "+r"(to));  // nothing is kept in registers from one part to the next: the sums need them
                }
                if (part >= OUT_BLOCKS && lane == 0) bulk_store_wait<OUT_BLOCKS - 1>();
                if (part >= OUT_BLOCKS) __syncwarp();  // before that, the wait and the barriers before the products do
#pragma unroll
                for (int n = 0; n < 8; n += 2) {  // 16 columns: as many 8×8 matrices as one instruction stores
                    float y[8];
#pragma unroll
                    for (int i = 0; i < 8; i++) y[i] = sum[part % 2][part / 2 * 32 + n * 4 + i];
#pragma unroll
                    for (int i = 0; i < 8; i += 4) {
                        float2 x = *(const float2*)(tile_bias + part / 2 * 64 + (n + i / 4) * 8 + lane % 4 * 2);
                        y[i] += x.x, y[i + 1] += x.y, y[i + 2] += x.x, y[i + 3] += x.y;
                        if constexpr (ROTATE) {
                            int c = place + (n + i / 4) * 8;
                            if (c + rotated.offset >= rotated.head) c -= rotated.head;
                            if (c < 0 || c >= rotated.size) continue;
                            // This thread's pair of two rows, 8 apart.
                            const uint32_t row_at = rotations + (part % 2 * 64 + warp % 4 * 16 + lane / 4) * 128;
                            const uint32_t from = row_at + ((c / 4 + lane % 4 / 2) ^ lane / 4) * 16 + lane % 2 * 8;
                            rotate_pair(y[i], y[i + 1], load_shared_pair(from));
                            rotate_pair(y[i + 2], y[i + 3], load_shared_pair(from + 8 * 128));
                        }
                    }
                    const uint32_t pairs[4] = {pack_bf16(y[0], y[1]), pack_bf16(y[2], y[3]), pack_bf16(y[4], y[5]), pack_bf16(y[6], y[7])};
                    store_matrices((to ^ n * 16) + slot, pairs);
                }
                async_fence();
                __syncwarp();
                if (lane == 0) {
                    bulk_store(&c_map, out + slot, j0 + part / 2 * 64, i0 + part % 2 * 64);
                    bulk_store_commit();
                }
            }
        }
        bulk_store_wait();
    }
    if constexpr (CLUSTER > 1) cluster_barrier();  // others' copies and arrivals may still be on their way to this block
#endif
}

// As many clusters as there is room for, if there are so many tiles; each takes one tile after another.
template <int CLUSTER, class Kernel, class... Arguments>
inline void launch_hopper_blocks(cudaStream_t stream, Kernel* kernel, int shared_bytes, const HopperShape& shape, const Arguments&... arguments) {
    const int clusters = std::min(shape.tiles, device_properties().multiProcessorCount / CLUSTER);
    launch_overlapping(stream, false, CLUSTER, kernel, CLUSTER * clusters, 384, shared_bytes, arguments...);
}

template <int CLUSTER, bool ROTATE = false>
inline void launch_hopper_matmul(cudaStream_t stream, const HopperMatmul& m) {
    using Tile = HopperTile<ROTATE>;
    auto matrix = [](const floatX* x, int64_t rows, int64_t columns, int64_t ld, int box_rows) {
        return tensor_map<2>(x, {columns, rows}, {ld}, {64, box_rows});
    };
    CUtensorMap a_map = matrix(m.A, m.M, m.K, m.lda, HOPPER_BM), c_map = matrix(m.C, m.M, m.N, m.ldc, 16);
    CUtensorMap b_map = matrix(m.B, m.N, m.K, m.ldb, HOPPER_BN / CLUSTER);
    int rows = (int)ceil_div(m.M, HOPPER_BM * CLUSTER), columns = (int)ceil_div(m.N, HOPPER_BN);
    HopperShape shape = {(int)m.M, (int)m.N, (int)m.K, rows, columns, rows * columns};

    launch_hopper_blocks<CLUSTER>(stream, matmul_kernel7<CLUSTER, ROTATE>, Tile::BYTES, shape, a_map, b_map, c_map, shape, m.bias, m.rotated);
}

// Whether hopper_matmul() can do this: rows start on multiples of 16 bytes, and those of C end there (the copy engine does not stop within 16 bytes).
inline bool hopper_matmul_takes(const HopperMatmul& m) {
    auto rows16 = [](const floatX* x, int64_t ld) { return aligned16(x) && ld % 8 == 0; };
    auto fits = [](int64_t n) { return n > 0 && n < 1 << 30; };
    return hopper_code() && fits(m.M) && fits(m.N) && fits(m.K) && m.N % 8 == 0 && rows16(m.A, m.lda) && rows16(m.B, m.ldb) && rows16(m.C, m.ldc) &&
           fits(ceil_div(m.M, HOPPER_BM) * ceil_div(m.N, HOPPER_BN));
}
inline void hopper_matmul(cudaStream_t stream, const HopperMatmul& m) {
    m.rotated.rotations ? launch_hopper_matmul<2, true>(stream, m) : launch_hopper_matmul<2>(stream, m);
}

#endif

}  // namespace gpu
