// Infini-attention's compressive memory: the twin of "the memory" in attention.h, section 4. (Local attention within segments is the softmax core's.)
//
//     Φ(x) = x+1 for x > 0, else eˣ      g = sigmoid(β)      den = Φ·z + ε
//     read      R = (Φ(q)M)/den      A = g·R + (1−g)·D
//     write     M' = M + Φ(k)ᵀU,  z' = z + Σ_t Φ(k_t)      linear: U = v      delta: U = v − V̂, V̂ = (Φ(k)M)/den
//
// A memory is z (hs), then M (hs,hs), float32, one for each kv head and full segment. It goes from segment to segment, but only hs·(hs+1) numbers of it do:
// what takes time, reading the tokens, is done for all segments at once. Linear: Φ(k)ᵀv of every segment, then a sum over the segments in their order.
// Delta is an affine map, whose matrix each segment computes for itself once z is known (z is a plain sum under both rules), then the maps in their order:
//
//     M' = M − P·M + Φ(k)ᵀv,   P = Φ(k)ᵀ·diag(1/den)·Φ(k)   (hs,hs), symmetric
//
// Backward, with dM', dz' for the memory behind a segment, dM, dz for the one before it, and dn, dden for the numerator and denominator of a read:
//
//     gate      dβ += g(1−g)·Σ dA⊙(R−D)      dD = (1−g)·dA      dn = g·dA/den      dden = −g·Σ_c dA⊙R / den
//     query     dΦ(q) = dn·Mᵀ + dden·zᵀ      own: dM_q = Φ(q)ᵀdn, dz_q = Φ(q)ᵀdden
//     memory    linear: dM = dM' + dM_q      dz = dz' + dz_q
//               delta:  dM = dM' − P·dM' + dM_q      dz = dz' + dz_q + Σ_t dden_t·Φ(k_t), dden = Σ_c dU⊙V̂ / den, dU = Φ(k)dM'
//     write     dv += dU      dΦ(k) = U·dM'ᵀ + 1·dz'ᵀ;  delta: + dn·Mᵀ + dden·zᵀ with dn = −dU/den      dx += dΦ(x)⊙Φ'(x), Φ' = min(1,Φ)
//
// Again all segments at once but for the sums dM, dz over hs·(hs+1) numbers, which go from the last segment to the first.
//
//   infini_pass.cuh           which segments there are, states in and out
//   infini_any_size.cuh       ..._kernel2: any sizes, float32 arithmetic: all there is for float32, and for what the others do not take
//   infini_tensor_cores.cuh   ..._kernel3: bf16 with head sizes up to 128 that are multiples of 8
//   here                      1. from segment to segment   2. launchers
//
// The numbers are those of the ladder, dev/cuda/infini_memory.cu. FLOPs a token: a read 2·hs·C, a write 2·hs·KV·hs, their backward passes twice as much.
// Memory: the tokens' rows once or twice; memories are hs+1 float32 rows for each S tokens and head, little as long as S is larger than the head size.
#pragma once

#include <algorithm>
#include <type_traits>

#include "infini_any_size.cuh"
#include "infini_tensor_cores.cuh"

namespace gpu {

// --------------------------------------------------------------------------------------------------------------------------------------------------
// 1. From segment to segment: float32 whatever the storage type, few numbers, strictly in order

// z, M of every full segment, which hold what that segment adds, become what it leaves: a running sum over each sequence. A thread takes one number of the
// first `numbers` (hs: z alone) of each kv head's memory.
__global__ void infini_sum_kernel(InfiniPass p, int64_t numbers) {
    int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x, e = i % numbers, head = i / numbers;
    if (head >= (int64_t)p.num_seqs * p.kv_heads) return;
    int s = (int)(head / p.kv_heads), kv = (int)(head % p.kv_heads);
    const InfiniSequence q = p.sequences[s];
    int end = p.sequences[s + 1].first_memory;
    float sum = q.written ? q.block[INFINI_MEMORY + kv * p.memory_size() + e] : e < p.hs ? p.z_start : 0;
    int64_t step = p.memory_at(1, 0);
    float* at = p.memories + p.memory_at(q.first_memory, kv) + e;
    for (int w = q.first_memory; w < end; w += 4) {  // four loads on their way at a time
        float own[4];
#pragma unroll
        for (int j = 0; j < 4; j++) own[j] = w + j < end ? at[j * step] : 0;
#pragma unroll
        for (int j = 0; j < 4; j++) {
            sum += own[j];
            if (w + j < end) at[j * step] = sum;
        }
        at += 4 * step;
    }
}

// The memories of a sequence that are read in this pass: all but the last segment's, if that is full.
__device__ inline int infini_last_read(const InfiniPass& p, int s) {
    const InfiniSequence &q = p.sequences[s], &next = p.sequences[s + 1];
    int memories = next.first_memory - q.first_memory, segments = next.first_segment - q.first_segment;
    return next.first_memory - (segments > memories ? 1 : 2);
}

// The same for gradients, from the last segment to the first: dmemories (max_memories, KV, hs + hs·hs) hold what each memory's reader has to say.
__global__ void infini_sum_backward_kernel(InfiniPass p, float* dmemories, int64_t numbers) {
    int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x, e = i % numbers, head = i / numbers;
    if (head >= (int64_t)p.num_seqs * p.kv_heads) return;
    int s = (int)(head / p.kv_heads), kv = (int)(head % p.kv_heads), first = p.sequences[s].first_memory, last = infini_last_read(p, s);
    if (last < first) return;
    int64_t step = p.memory_at(1, 0);
    float *at = dmemories + p.memory_at(last, kv) + e, sum = 0;
    for (int w = last; w >= first; w -= 4) {
        float own[4];
#pragma unroll
        for (int j = 0; j < 4; j++) own[j] = w - j >= first ? at[-j * step] : 0;
#pragma unroll
        for (int j = 0; j < 4; j++) {
            sum += own[j];
            if (w - j >= first) at[-j * step] = sum;
        }
        at -= 4 * step;
    }
}

// Delta's affine maps in their order, to += from − P·from for matrices (hs,hs): forward from M to M' (which holds Φ(k)ᵀv), backward from dM' to dM (which
// holds dM_q). maps (max_memories, KV, hs, hs): P of the segment that writes a memory. Columns do not depend on each other: a block takes a sequence, a kv head
// and 32 columns from end to end; 32x8 threads, each 8 rows of 64 at a time.
constexpr int INFINI_MAP_COLUMNS = 32, INFINI_MAP_ROWS = 64, INFINI_MAP_DEPTH = 32;
template <bool BACKWARD>
__global__ void __launch_bounds__(256, 2) infini_map_kernel(InfiniPass p, const float* maps, float* memories) {
    __shared__ __align__(16) float P[INFINI_MAP_ROWS][INFINI_MAP_DEPTH];
    __shared__ float X[INFINI_MAP_DEPTH][INFINI_MAP_COLUMNS];
    int slices = (int)ceil_div(p.hs, INFINI_MAP_COLUMNS), hs = p.hs;
    int slice = blockIdx.x % slices, kv = blockIdx.x / slices % p.kv_heads, s = blockIdx.x / slices / p.kv_heads;
    int x = threadIdx.x % 32, y = threadIdx.x / 32, column = slice * INFINI_MAP_COLUMNS + x;
    const InfiniSequence q = p.sequences[s];
    int first = q.first_memory, end = p.sequences[s + 1].first_memory;
    int w = BACKWARD ? infini_last_read(p, s) : first, step = BACKWARD ? -1 : 1;
    for (; BACKWARD ? w > first : w < end; w += step) {
        const float* from;
        float* to;
        if (BACKWARD) {
            from = memories + p.memory_at(w, kv) + hs;
            to = memories + p.memory_at(w - 1, kv) + hs;
        } else {
            if (w == first && !q.written) continue;
            from = (w == first ? q.block + INFINI_MEMORY + kv * p.memory_size() : memories + p.memory_at(w - 1, kv)) + hs;
            to = memories + p.memory_at(w, kv) + hs;
        }
        const float* map = maps + ((int64_t)w * p.kv_heads + kv) * hs * hs;
        for (int r0 = 0; r0 < hs; r0 += INFINI_MAP_ROWS) {
            float sum[8] = {};
            for (int j0 = 0; j0 < hs; j0 += INFINI_MAP_DEPTH) {
#pragma unroll
                for (int i = 0; i < 8; i++) {
                    int r = r0 + y + 8 * i;
                    P[y + 8 * i][x] = r < hs && j0 + x < hs ? map[(int64_t)r * hs + j0 + x] : 0;
                }
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    int j = j0 + y + 8 * i;
                    X[y + 8 * i][x] = j < hs && column < hs ? from[(int64_t)j * hs + column] : 0;
                }
                __syncthreads();
#pragma unroll
                for (int j = 0; j < INFINI_MAP_DEPTH; j += 4) {
                    float x0 = X[j][x], x1 = X[j + 1][x], x2 = X[j + 2][x], x3 = X[j + 3][x];
#pragma unroll
                    for (int i = 0; i < 8; i++) {
                        float4 a = *(const float4*)&P[8 * y + i][j];
                        sum[i] += a.x * x0 + a.y * x1 + a.z * x2 + a.w * x3;
                    }
                }
                __syncthreads();
            }
#pragma unroll
            for (int i = 0; i < 8; i++) {
                int r = r0 + 8 * y + i;
                if (r < hs && column < hs) to[(int64_t)r * hs + column] += from[(int64_t)r * hs + column] - sum[i];
            }
        }
        __syncthreads();  // `to` is the next map's `from`
    }
}

// dβ_h += g(1−g)·Σ partial, over the pieces of all segments: partial (max_segments, NH, pieces). One block a head.
__global__ void infini_beta_kernel(InfiniPass p, const float* beta, float* dbeta, const float* partial, int pieces) {
    __shared__ float shared[32];
    int h = blockIdx.x;
    float sum = 0;
    for (int64_t i = threadIdx.x; i < (int64_t)p.max_segments * pieces; i += blockDim.x) sum += partial[(i / pieces * p.heads + h) * pieces + i % pieces];
    sum = block_sum(sum, shared);
    float g = infini_gate(beta[h]);
    if (threadIdx.x == 0) dbeta[h] += g * (1 - g) * sum;
}

// --------------------------------------------------------------------------------------------------------------------------------------------------
// 2. Launchers. Blocks are made for max_segments segments; what is not there returns at once.

// f(std::integral_constant) of the tensor-core kernels' head size, or of the rows in a tile of the others, whose rows are ld apart.
template <class F>
inline void infini_with_head_size(int hs, F f) {
    if (hs <= 32)
        f(std::integral_constant<int, 32>());
    else if (hs <= 64)
        f(std::integral_constant<int, 64>());
    else if (hs <= 96)
        f(std::integral_constant<int, 96>());
    else
        f(std::integral_constant<int, 128>());
}
template <class F>
inline void infini_with_rows(int hs, F f) {
    int ld = (int)round_up(hs, 4);
    assert(ld <= 4096);
    if (ld <= 512)  // three tiles within 96 KB
        f(std::integral_constant<int, 16>(), ld);
    else
        f(std::integral_constant<int, 1>(), ld);
}

template <class... Parameters, class... Arguments>
inline void infini_launch(cudaStream_t stream, void (*kernel)(Parameters...), dim3 blocks, int threads, int shared_bytes, Arguments... arguments) {
    if (blocks.x == 0 || blocks.y == 0) return;
    allow_shared_memory(kernel, shared_bytes);
    kernel<<<blocks, threads, shared_bytes, stream>>>(arguments...);
    LAUNCH_CHECK();
}

// In how many pieces, one a block, the rows of a segment are cut.
inline int infini_pieces(const InfiniPass& p, bool tensor_cores) {
    return (int)std::min<int64_t>(64, std::max<int64_t>(1, ceil_div(p.max_q(), tensor_cores ? 256 : 16)));
}

inline void infini_sum(cudaStream_t stream, const InfiniPass& p, int64_t numbers) {
    infini_launch(stream, infini_sum_kernel, dim3((unsigned)ceil_div(p.num_seqs * p.kv_heads * numbers, 256)), 256, 0, p, numbers);
}
inline void infini_sum_backward(cudaStream_t stream, const InfiniPass& p, float* dmemories, int64_t numbers) {
    infini_launch(stream, infini_sum_backward_kernel, dim3((unsigned)ceil_div(p.num_seqs * p.kv_heads * numbers, 256)), 256, 0, p, dmemories, numbers);
}
template <bool BACKWARD>
inline void infini_apply_maps(cudaStream_t stream, const InfiniPass& p, const float* maps, float* memories) {
    infini_launch(stream, infini_map_kernel<BACKWARD>, dim3((unsigned)(p.num_seqs * p.kv_heads * ceil_div(p.hs, INFINI_MAP_COLUMNS))), 256, 0, p, maps,
                  memories);
}

// Delta's P of every full segment.
inline void infini_maps(cudaStream_t stream, const InfiniPass& p, float* maps) {
    dim3 blocks(p.max_segments * p.kv_heads, (unsigned)(ceil_div(p.hs, 64) * ceil_div(p.hs, 64)));
#ifndef GPU_FLOAT32
    if (p.tensor_cores) {
        infini_with_head_size(p.hs, [&](auto size) {
            constexpr int HS = decltype(size)::value;
            infini_launch(stream, infini_map_kernel3<HS>, dim3(blocks.x), infini_mma::SUM_THREADS<HS>, infini_mma::map_shared<HS>, p, maps);
        });
        return;
    }
#endif
    infini_launch(stream, infini_outer_kernel2<INFINI_MAP>, blocks, 256, 0, p, maps, (const floatX*)nullptr, (const float*)nullptr);
}

// Scratch for infini_write() and for infini_memory_backward(): delta's P, (max_memories, KV, hs, hs).
inline int64_t infini_maps_size(const InfiniPass& p) { return p.delta ? (int64_t)p.max_memories * p.kv_heads * p.hs * p.hs : 0; }
inline int64_t infini_write_scratch(const InfiniPass& p) { return scratch_bytes({infini_maps_size(p) * (int64_t)sizeof(float)}); }

// p.memories: what each full segment leaves.
inline void infini_write(cudaStream_t stream, const InfiniPass& p, Scratch scratch) {
    if (p.max_memories == 0) return;
    dim3 blocks(p.max_segments * p.kv_heads, (unsigned)(ceil_div(p.hs, 64) * ceil_div(p.hs, 64)));
    float* maps = scratch.take<float>(infini_maps_size(p));
    bool done = false;
#ifndef GPU_FLOAT32
    if (p.tensor_cores) {
        infini_with_head_size(p.hs, [&](auto size) {
            constexpr int HS = decltype(size)::value;
            infini_launch(stream, infini_write_kernel3<HS>, dim3(blocks.x), infini_mma::SUM_THREADS<HS>, infini_mma::write_shared<HS>, p);
        });
        done = true;
    }
#endif
    if (!done) infini_launch(stream, infini_outer_kernel2<INFINI_WRITE>, blocks, 256, 0, p, p.memories, (const floatX*)nullptr, (const float*)nullptr);
    infini_sum(stream, p, p.delta ? p.hs : p.memory_size());
    if (!p.delta) return;
    infini_maps(stream, p, maps);
    infini_apply_maps<false>(stream, p, maps, p.memories);
}

// A = g·R + (1−g)·D, (N,C); A may be D. beta (NH).
inline void infini_retrieve(cudaStream_t stream, const InfiniPass& p, const float* beta, const floatX* D, floatX* A) {
#ifndef GPU_FLOAT32
    if (p.tensor_cores && aligned16(D) && aligned16(A)) {
        infini_with_head_size(p.hs, [&](auto size) {
            constexpr int HS = decltype(size)::value;
            infini_launch(stream, infini_retrieve_kernel3<HS>, dim3(p.max_segments * p.heads, infini_pieces(p, true)), infini_mma::ROW_THREADS,
                          infini_mma::retrieve_shared<HS>, p, beta, D, A);
        });
        return;
    }
#endif
    infini_with_rows(p.hs, [&](auto rows, int ld) {
        constexpr int ROWS = decltype(rows)::value;
        infini_launch(stream, infini_retrieve_kernel2<ROWS>, dim3(p.max_segments * p.heads, infini_pieces(p, false)), infini_rows::THREADS, ROWS * ld * 4, p,
                      beta, D, A, ld);
    });
}

// Backward of A = g·R + (1−g)·D: dβ (NH) +=; dD takes the place of dA (N,C); dn (N,C) and dden (NH,N) are filled where something was read.
inline int64_t infini_gate_backward_scratch(const InfiniPass& p) {
    return scratch_bytes({(int64_t)p.max_segments * p.heads * infini_pieces(p, false) * (int64_t)sizeof(float)});
}
inline void infini_gate_backward(cudaStream_t stream, const InfiniPass& p, const float* beta, float* dbeta, const floatX* D, floatX* dA, floatX* dn,
                                 float* dden, Scratch scratch) {
    bool tensor_cores = p.tensor_cores && aligned16(D) && aligned16(dA) && aligned16(dn);
    int pieces = infini_pieces(p, tensor_cores);
    float* partial = scratch.take<float>((int64_t)p.max_segments * p.heads * pieces);
    dim3 blocks(p.max_segments * p.heads, pieces);
#ifndef GPU_FLOAT32
    if (tensor_cores)
        infini_with_head_size(p.hs, [&](auto size) {
            constexpr int HS = decltype(size)::value;
            infini_launch(stream, infini_gate_backward_kernel3<HS>, blocks, infini_mma::ROW_THREADS, infini_mma::gate_backward_shared<HS>, p, beta, D, dA, dn,
                          dden, partial);
        });
#endif
    if (!tensor_cores)
        infini_with_rows(p.hs, [&](auto rows, int ld) {
            constexpr int ROWS = decltype(rows)::value;
            infini_launch(stream, infini_gate_backward_kernel2<ROWS>, blocks, infini_rows::THREADS, ROWS * ld * 4, p, beta, D, dA, dn, dden, partial, ld);
        });
    infini_launch(stream, infini_beta_kernel, dim3(p.heads), 256, 0, p, beta, dbeta, (const float*)partial, pieces);
}

// dq += (dn·Mᵀ + dden·zᵀ)⊙Φ'(q), in dqkv (N, qkv_stride), and what each segment that reads a memory of this pass has to say about it: dmemories
// (max_memories, KV, hs + hs·hs).
inline void infini_query_backward(cudaStream_t stream, const InfiniPass& p, const floatX* dn, const float* dden, floatX* dqkv, float* dmemories) {
#ifndef GPU_FLOAT32
    if (p.tensor_cores && aligned16(dn) && aligned16(dqkv)) {
        infini_with_head_size(p.hs, [&](auto size) {
            constexpr int HS = decltype(size)::value;
            infini_launch(stream, infini_query_backward_kernel3<HS>, dim3(p.max_segments * p.kv_heads), infini_mma::SUM_THREADS<HS>,
                          infini_mma::query_backward_shared<HS>, p, dn, dden, dqkv, dmemories);
        });
        return;
    }
#endif
    infini_with_rows(p.hs, [&](auto rows, int ld) {
        constexpr int ROWS = decltype(rows)::value;
        infini_launch(stream, infini_query_backward_kernel2<ROWS>, dim3(p.max_segments * p.heads, infini_pieces(p, false)), infini_rows::THREADS, ROWS * ld * 4,
                      p, dn, dden, dqkv, ld);
    });
    infini_launch(stream, infini_outer_kernel2<INFINI_READ>, dim3(p.max_segments * p.kv_heads, (unsigned)(ceil_div(p.hs, 64) * ceil_div(p.hs, 64))), 256, 0, p,
                  dmemories, dn, dden);
}

// The memories from the last segment to the first, and what was written into them: dmemories from infini_query_backward become the gradients of
// p.memories, dk and dv += in dqkv (N, qkv_stride). The state that a sequence started from is constant.
inline void infini_memory_backward(cudaStream_t stream, const InfiniPass& p, floatX* dqkv, float* dmemories, Scratch scratch) {
    if (p.max_memories == 0) return;
    bool tensor_cores = p.tensor_cores && aligned16(dqkv);
    if (p.delta) {
        float* maps = scratch.take<float>(infini_maps_size(p));
        infini_maps(stream, p, maps);
        infini_apply_maps<true>(stream, p, maps, dmemories);
#ifndef GPU_FLOAT32
        if (tensor_cores)
            infini_with_head_size(p.hs, [&](auto size) {
                constexpr int HS = decltype(size)::value;
                infini_launch(stream, infini_normalizer_backward_kernel3<HS>, dim3(p.max_segments * p.kv_heads), infini_mma::SUM_THREADS<HS>,
                              infini_mma::normalizer_backward_shared<HS>, p, dmemories);
            });
#endif
        if (!tensor_cores)
            infini_with_rows(p.hs, [&](auto rows, int ld) {
                constexpr int ROWS = decltype(rows)::value;
                infini_launch(stream, infini_normalizer_backward_kernel2<ROWS>, dim3(p.max_segments * p.kv_heads), infini_rows::THREADS, (ROWS + 1) * ld * 4, p,
                              dmemories, ld);
            });
    }
    infini_sum_backward(stream, p, dmemories, p.delta ? p.hs : p.memory_size());
#ifndef GPU_FLOAT32
    if (tensor_cores) {
        infini_with_head_size(p.hs, [&](auto size) {
            constexpr int HS = decltype(size)::value;
            dim3 blocks(p.max_segments * p.kv_heads, infini_pieces(p, true));
            if (p.delta)
                infini_launch(stream, infini_write_backward_kernel3<HS, true>, blocks, infini_mma::ROW_THREADS, infini_mma::write_backward_shared<HS, true>, p,
                              (const float*)dmemories, dqkv);
            else
                infini_launch(stream, infini_write_backward_kernel3<HS, false>, blocks, infini_mma::ROW_THREADS, infini_mma::write_backward_shared<HS, false>,
                              p, (const float*)dmemories, dqkv);
        });
        return;
    }
#endif
    infini_with_rows(p.hs, [&](auto rows, int ld) {
        constexpr int ROWS = decltype(rows)::value;
        infini_launch(stream, infini_write_backward_kernel2<ROWS>, dim3(p.max_segments * p.kv_heads, infini_pieces(p, false)), infini_rows::THREADS,
                      3 * ROWS * ld * 4, p, (const float*)dmemories, dqkv, ld);
    });
}

}  // namespace gpu
