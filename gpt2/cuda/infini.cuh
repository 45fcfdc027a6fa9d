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
// Again all segments at once but for the sums dM, dz over hs·(hs+1) numbers, which go from the last segment to the first. Local attention's gradients are
// linear in dD = (1−g)·dA, and g is one number for a head and segment: so local attention is handed dA itself where each query head has its own kv head, and
// what comes back is multiplied by keep = 1−g where the memory's part is added to it: dD is never stored. (Where heads share keys, their dk, dv are sums: dD is
// made first, and keep is 1.)
//
//   infini_pass.cuh           which segments there are, states in and out
//   infini_any_size.cuh       ..._kernel2: any sizes, float32 arithmetic: all there is for float32, and for what the others do not take
//   infini_tensor_cores.cuh   ..._kernel3: bf16 with head sizes up to 128 that are multiples of 8
//   infini_hopper.cuh         ..._kernel4: bf16 with head size 64, on GPUs of compute capability 9.0
//   infini_backward_hopper.cuh   ..._kernel5: the same, backward in one kernel
//   infini_ranges_hopper.cuh  ..._kernel6: the same, linear, backward where sequences are few
//   infini_write_hopper.cuh   ..._kernel5: the same, delta's write in one kernel
//   infini_decode.cuh         one new token a text, local attention included, in one launch
//   here                      1. from segment to segment   2. launchers
//
// The numbers are those of the ladder, dev/cuda/infini_memory.cu. FLOPs a token: a read 2·hs·C, a write 2·hs·KV·hs, their backward passes twice as much.
// Memory: the tokens' rows once or twice; memories are hs+1 float32 rows for each S tokens and head, little as long as S is larger than the head size.
#pragma once

#include <algorithm>
#include <type_traits>

#include "infini_any_size.cuh"
#include "infini_backward_hopper.cuh"
#include "infini_hopper.cuh"
#include "infini_ranges_hopper.cuh"
#include "infini_tensor_cores.cuh"
#include "infini_write_hopper.cuh"

namespace gpu {

// --------------------------------------------------------------------------------------------------------------------------------------------------
// 1. From segment to segment: float32 whatever the storage type, few numbers, strictly in order

// z, M of every full segment, which hold what that segment adds, become what it leaves: a running sum over each sequence. A thread takes V neighbours of the
// first `numbers` (hs: z alone) of each kv head's memory. group > 0: they are running sums already within groups of so many segments, where a sequence begins
// from its beginning. It may begin before the kernel that writes the memories has ended: that one was launched when all before it was done.
template <int V>
__global__ void __launch_bounds__(256) infini_sum_kernel(InfiniPass p, int64_t numbers, int group) {
    constexpr int LOADS = 8;  // on their way at a time
    struct alignas(V * sizeof(float)) Neighbours {
        float v[V];
    };
    int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x, e = i % (numbers / V) * V, head = i / (numbers / V);
    if (head >= (int64_t)p.num_seqs * p.kv_heads) return;
    int s = (int)(head / p.kv_heads), kv = (int)(head % p.kv_heads);
    const InfiniSequence q = p.sequences[s];
    int end = p.sequences[s + 1].first_memory;
    float sum[V], before[V];
#pragma unroll
    for (int k = 0; k < V; k++)
        before[k] = sum[k] = group > 0 ? 0 : q.written ? q.block[INFINI_MEMORY + kv * p.memory_size() + e + k] : e + k < p.hs ? p.z_start : 0;
    int64_t step = p.memory_at(1, 0);
    float* at = p.memories + p.memory_at(q.first_memory, kv) + e;
    wait_for_kernel_before();
    for (int w = q.first_memory; w < end; w += LOADS) {
        Neighbours own[LOADS];
#pragma unroll
        for (int j = 0; j < LOADS; j++)
            if (w + j < end) own[j] = *(const Neighbours*)(at + j * step);
#pragma unroll
        for (int j = 0; j < LOADS; j++) {
            if (w + j >= end) break;
            bool new_group = group == 0 || (q.first_segment + w + j - q.first_memory) % group == 0;
#pragma unroll
            for (int k = 0; k < V; k++) {
                if (new_group) before[k] = sum[k];
                own[j].v[k] = sum[k] = before[k] + own[j].v[k];
            }
            *(Neighbours*)(at + j * step) = own[j];
        }
        at += LOADS * step;
    }
}

// The memories of a sequence that are read in this pass: all but the last segment's, if that is full.
__device__ inline int infini_last_read(const InfiniPass& p, int s) {
    const InfiniSequence &q = p.sequences[s], &next = p.sequences[s + 1];
    int memories = next.first_memory - q.first_memory, segments = next.first_segment - q.first_segment;
    return next.first_memory - (segments > memories ? 1 : 2);
}

// The same for gradients, from the last segment to the first: dmemories (max_memories, KV, hs + hs·hs) hold what each memory's reader has to say, or sums of
// it over the readers to the end of the sequence or the group.
__global__ void infini_sum_backward_kernel(InfiniPass p, float* dmemories, int64_t numbers, int group) {
    int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x, e = i % numbers, head = i / numbers;
    if (head >= (int64_t)p.num_seqs * p.kv_heads) return;
    int s = (int)(head / p.kv_heads), kv = (int)(head % p.kv_heads), first = p.sequences[s].first_memory, last = infini_last_read(p, s);
    if (last < first) return;
    int64_t step = p.memory_at(1, 0);
    float *at = dmemories + p.memory_at(last, kv) + e, sum = 0, after = 0;
    int reader = p.sequences[s].first_segment + 1 - first;  // of memory w: w + reader
    for (int w = last; w >= first; w -= 4) {
        float own[4];
#pragma unroll
        for (int j = 0; j < 4; j++) own[j] = w - j >= first ? at[-j * step] : 0;
#pragma unroll
        for (int j = 0; j < 4; j++) {
            if ((w - j + reader) % group == group - 1) after = sum;
            sum = after + own[j];
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

// The same for hs = 64, backward alone (infini_write_kernel5 keeps them inside). Only X, the columns that go from map to map, has to wait for the map before:
// it stays in shared memory, and the maps to come and what stands at `to` are on their way meanwhile. A block takes 16 columns; 16x8 threads, each 8 rows.
constexpr int INFINI_MAP_STAGES = 3, INFINI_MAP_SHARED = (INFINI_MAP_STAGES * 64 * 64 + 64 * 16) * (int)sizeof(float);
__global__ void __launch_bounds__(128) infini_map_kernel4(InfiniPass p, const float* maps, float* memories) {
    extern __shared__ __align__(16) float infini_map_shared[];
    float* X = infini_map_shared + INFINI_MAP_STAGES * 64 * 64;  // (64, 16)
    int slice = blockIdx.x % 4, kv = blockIdx.x / 4 % p.kv_heads, s = blockIdx.x / 4 / p.kv_heads, x = threadIdx.x % 16, r0 = threadIdx.x / 16 * 8;
    const int last = infini_last_read(p, s), maps_to_do = last - p.sequences[s].first_memory;
    if (maps_to_do <= 0) return;
    const float* start = memories + p.memory_at(last, kv);
    const int64_t own_at = 64 + r0 * 64 + slice * 16 + x;  // of the first of this thread's 8 numbers in a memory
    auto to = [&](int i) { return memories + p.memory_at(last - i - 1, kv) + own_at; };
    auto load = [&](int i) {
        if (i < maps_to_do) {
            const float* map = maps + ((int64_t)(last - i) * p.kv_heads + kv) * 64 * 64;
            uint32_t stage = shared_address(infini_map_shared + i % INFINI_MAP_STAGES * 64 * 64);
#pragma unroll
            for (int e = 4 * threadIdx.x; e < 64 * 64; e += 4 * 128) copy_async16(stage + e * 4, map + e, true);
        }
        copy_async_commit();
    };
    load(0);
    load(1);
    float now[8], next[8];
#pragma unroll
    for (int r = 0; r < 8; r++) {
        X[(r0 + r) * 16 + x] = start[own_at + r * 64];
        next[r] = to(0)[r * 64];
    }
    for (int i = 0; i < maps_to_do; i++) {
        load(i + 2);
        copy_async_wait<2>();
        __syncthreads();
        float sum[8] = {};
#pragma unroll
        for (int r = 0; r < 8; r++) {
            now[r] = next[r];
            if (i + 1 < maps_to_do) next[r] = to(i + 1)[r * 64];
        }
        const float* P = infini_map_shared + i % INFINI_MAP_STAGES * 64 * 64 + r0 * 64;
#pragma unroll 4
        for (int j = 0; j < 64; j += 4) {
            float x0 = X[j * 16 + x], x1 = X[(j + 1) * 16 + x], x2 = X[(j + 2) * 16 + x], x3 = X[(j + 3) * 16 + x];
#pragma unroll
            for (int r = 0; r < 8; r++) {
                float4 a = *(const float4*)(P + r * 64 + j);
                sum[r] += a.x * x0 + a.y * x1 + a.z * x2 + a.w * x3;
            }
        }
        __syncthreads();  // X has been read
#pragma unroll
        for (int r = 0; r < 8; r++) {
            float* own = X + (r0 + r) * 16 + x;
            *own += now[r] - sum[r];
            to(i)[r * 64] = *own;
        }
    }
}

// dβ_h += g(1−g)·Σ partial, over the pieces of all segments or sequences: partial (n, NH, pieces). One block a head.
__global__ void infini_beta_kernel(InfiniPass p, const float* beta, float* dbeta, const float* partial, int n, int pieces) {
    __shared__ float shared[32];
    int h = blockIdx.x;
    float sum = 0;
    wait_for_kernel_before();
    for (int64_t i = threadIdx.x; i < (int64_t)n * pieces; i += blockDim.x) sum += partial[(i / pieces * p.heads + h) * pieces + i % pieces];
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

// Whether each group of segments that one block has summed over is certainly a whole number of sequences.
inline bool infini_whole_groups(const InfiniPass& p) {
    return p.num_seqs * (int64_t)p.max_len == p.num_tokens && !p.carried && p.group * p.segment == p.max_len;
}
inline void infini_sum(cudaStream_t stream, const InfiniPass& p) {
    if (p.hopper && infini_whole_groups(p)) return;
    int64_t numbers = p.delta ? p.hs : p.memory_size(), V = numbers % 2 == 0 ? 2 : 1, blocks = ceil_div(p.num_seqs * p.kv_heads * numbers / V, 256);
    if (blocks == 0) return;
    launch_overlapping(stream, p.hopper, 1, V == 2 ? infini_sum_kernel<2> : infini_sum_kernel<1>, blocks, 256, 0, p, numbers, p.hopper ? p.group : 0);
    LAUNCH_CHECK();
}
inline void infini_sum_backward(cudaStream_t stream, const InfiniPass& p, bool hopper, float* dmemories) {
    if (hopper && infini_whole_groups(p)) return;
    int64_t numbers = p.delta ? p.hs : p.memory_size();
    infini_launch(stream, infini_sum_backward_kernel, dim3((unsigned)ceil_div(p.num_seqs * p.kv_heads * numbers, 256)), 256, 0, p, dmemories, numbers,
                  hopper ? p.group : 1);
}
template <bool BACKWARD>
inline void infini_apply_maps(cudaStream_t stream, const InfiniPass& p, const float* maps, float* memories) {
    if (BACKWARD && p.hopper) {
        infini_launch(stream, infini_map_kernel4, dim3((unsigned)(p.num_seqs * p.kv_heads * 4)), 128, INFINI_MAP_SHARED, p, maps, memories);
        return;
    }
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

#ifndef GPU_FLOAT32
// Tiles of 64 rows by one head of rows in device memory.
inline CUtensorMap infini_rows_map(const floatX* rows, int64_t n, int64_t columns, int64_t stride) {
    return tensor_map<2>(rows, {columns, n}, {stride}, {infini_hopper::HS, infini_hopper::ROWS});
}
// Of all that stand in rows as qkv's, or as A's.
inline CUtensorMap infini_qkv_map(const InfiniPass& p, const floatX* rows) { return infini_rows_map(rows, p.num_tokens, p.qkv_stride(), p.qkv_stride()); }
inline CUtensorMap infini_channels_map(const InfiniPass& p, const floatX* rows) { return infini_rows_map(rows, p.num_tokens, p.channels(), p.channels()); }

// Delta's write in one kernel
template <int CLUSTER, int GROUPS, int STAGES, int BLOCKS>
inline void infini_sequence_write(cudaStream_t stream, const InfiniPass& p) {
    launch_overlapping(stream, false, CLUSTER, infini_write_kernel5<CLUSTER, GROUPS, STAGES, BLOCKS>, (int64_t)p.num_seqs * p.kv_heads * CLUSTER,
                       dim3(infini_hopper::THREADS, GROUPS), infini_hopper::WriteShared<CLUSTER, GROUPS, STAGES>::BYTES,
                       infini_rows_map(p.keys, p.max_key_rows(), p.row_size(), p.key_stride), p);
    LAUNCH_CHECK();
}
#endif

// p.memories: what each full segment leaves.
inline void infini_write(cudaStream_t stream, const InfiniPass& p, Scratch scratch) {
    if (p.max_memories == 0) return;
    dim3 blocks(p.max_segments * p.kv_heads, (unsigned)(ceil_div(p.hs, 64) * ceil_div(p.hs, 64)));
    float* maps = scratch.take<float>(infini_maps_size(p));
    bool done = false;
#ifndef GPU_FLOAT32
    if (p.write_blocks > 0) {
        bool one_each = (int64_t)p.num_seqs * p.kv_heads <= device_properties().multiProcessorCount;
        auto run = one_each ? infini_sequence_write<1, 2, 8, 1> : infini_sequence_write<1, 1, 3, 3>;
        if (p.write_blocks > 1) run = infini_sequence_write<4, 2, 8, 1>;
        run(stream, p);
        return;
    }
    if (p.hopper) {
        assert(!p.delta);
        infini_launch(stream, infini_write_kernel4, dim3((unsigned)(ceil_div(p.max_segments, p.group) * p.kv_heads)), infini_hopper::THREADS,
                      infini_hopper::Shared<0, INFINI_WRITE_STAGES, 2>::BYTES, infini_rows_map(p.keys, p.max_key_rows(), p.row_size(), p.key_stride), p);
        done = true;
    } else if (p.tensor_cores) {
        infini_with_head_size(p.hs, [&](auto size) {
            constexpr int HS = decltype(size)::value;
            infini_launch(stream, infini_write_kernel3<HS>, dim3(blocks.x), infini_mma::SUM_THREADS<HS>, infini_mma::write_shared<HS>, p);
        });
        done = true;
    }
#endif
    if (!done) infini_launch(stream, infini_outer_kernel2<INFINI_WRITE>, blocks, 256, 0, p, p.memories, (const floatX*)nullptr, (const float*)nullptr);
    infini_sum(stream, p);
    if (!p.delta) return;
    infini_maps(stream, p, maps);
    infini_apply_maps<false>(stream, p, maps, p.memories);
}

#ifndef GPU_FLOAT32
// How many rows of a segment one block of infini_retrieve_kernel4 takes. A block begins by bringing the memory into shared memory, which takes as long as some
// two tiles, so it should have many; but the blocks that the GPU holds at a time, `resident` of them, leave it in waves, of which the last should be full.
inline int infini_retrieve_piece(const InfiniPass& p, int64_t resident) {
    constexpr int BEGIN = 2;  // tiles
    int64_t tiles = std::max<int64_t>(1, ceil_div(p.max_q(), infini_hopper::ROWS)), best = INT64_MAX, best_piece = 1;
    for (int64_t pieces = 1; pieces <= tiles; pieces++) {
        int64_t piece = ceil_div(tiles, pieces), waves = ceil_div(p.max_segments * pieces * p.heads, resident), time = waves * (piece + BEGIN);
        if (time < best) best = time, best_piece = piece;
    }
    return (int)best_piece * infini_hopper::ROWS;
}
#endif

// A = g·R + (1−g)·D, (N,C); A may be D. beta (NH).
inline void infini_retrieve(cudaStream_t stream, const InfiniPass& p, const float* beta, const floatX* D, floatX* A) {
#ifndef GPU_FLOAT32
    if (p.hopper && aligned16(D) && aligned16(A) && p.max_segments > 0) {
        constexpr int SHARED = infini_hopper::Shared<1, INFINI_RETRIEVE_STAGES, 2>::BYTES;
        int piece = infini_retrieve_piece(p, resident_blocks(infini_retrieve_kernel4, infini_hopper::THREADS, SHARED));
        dim3 blocks((unsigned)(p.max_segments * ceil_div(p.max_q(), piece) * p.heads));
        infini_launch(stream, infini_retrieve_kernel4, blocks, infini_hopper::THREADS, SHARED, infini_qkv_map(p, p.qkv), infini_channels_map(p, D),
                      infini_channels_map(p, A), p, beta, A, piece);
        return;
    }
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

// What the backward pass of local attention is to be given: dA itself, or, where query heads share a kv head, dD = (1−g)·dA, which is stored in dD (N,C).
template <int W>
__global__ void infini_local_gradient_kernel(InfiniPass p, const float* beta, const floatX* dA, floatX* dD) {
    const InfiniSegment s = p.segments[blockIdx.x];
    int per_row = p.channels() / W;
    for (int64_t e = (int64_t)blockIdx.y * blockDim.x + threadIdx.x; e < (int64_t)s.q_len * per_row; e += (int64_t)gridDim.y * blockDim.x) {
        int c = (int)(e % per_row) * W;
        int64_t at = (s.row + e / per_row) * p.channels() + c;
        float keep = 1 - p.gate(s, beta[c / p.hs]);
        if constexpr (W == 1) {
            dD[at] = from_float<floatX>(keep * to_float(dA[at]));
        } else {
            Packed<floatX> x = load_packed(dA + at);
#pragma unroll
            for (int i = 0; i < W; i++) x.set(i, keep * x[i]);
            store_packed(dD + at, x);
        }
    }
}
inline const floatX* infini_local_gradient(cudaStream_t stream, const InfiniPass& p, const float* beta, const floatX* dA, floatX* dD) {
    if (p.one_gate()) return dA;
    constexpr int W = Packed<floatX>::size;
    dim3 blocks(p.max_segments, infini_pieces(p, false));
    infini_launch(stream, p.hs % W == 0 && aligned16(dA) && aligned16(dD) ? infini_local_gradient_kernel<W> : infini_local_gradient_kernel<1>, blocks, 256, 0,
                  p, beta, dA, dD);
    return dD;
}

// Behind the backward pass of local attention, backward of A = g·R + (1−g)·D and of the reading: dβ (NH) +=; dq = keep·dq + the memory's part, in dqkv
// (N, qkv_stride); what each segment that reads a memory of this pass has to say about it: dmemories (max_memories, KV, hs + hs·hs). dn (N,C) and dden (NH,N)
// are scratch.
inline int64_t infini_read_backward_scratch(const InfiniPass& p) {
    return scratch_bytes({(int64_t)p.max_segments * p.heads * infini_pieces(p, false) * (int64_t)sizeof(float)});
}
inline void infini_read_backward(cudaStream_t stream, const InfiniPass& p, const float* beta, float* dbeta, const floatX* D, const floatX* dA, floatX* dn,
                                 float* dden, floatX* dqkv, float* dmemories, Scratch scratch) {
    if (p.max_segments == 0) return;
    bool tensor_cores = p.tensor_cores && aligned16(D) && aligned16(dA) && aligned16(dn) && aligned16(dqkv);
    int pieces = p.hopper ? 1 : infini_pieces(p, tensor_cores);
    float* partial = scratch.take<float>((int64_t)p.max_segments * p.heads * pieces);
    dim3 blocks(p.max_segments * p.heads, pieces);
    bool done = false;
#ifndef GPU_FLOAT32
    if (p.hopper) {
        assert(aligned16(D) && aligned16(dA) && aligned16(dqkv));
        infini_launch(stream, infini_read_backward_kernel4, dim3((unsigned)(ceil_div(p.max_segments, p.group) * p.kv_heads)), infini_hopper::THREADS,
                      infini_hopper::Shared<1, INFINI_BACKWARD_STAGES, 4>::BYTES, infini_qkv_map(p, p.qkv), infini_channels_map(p, D),
                      infini_channels_map(p, dA), infini_qkv_map(p, dqkv), p, beta, dqkv, dmemories, partial);
        done = true;
    } else if (tensor_cores) {
        infini_with_head_size(p.hs, [&](auto size) {
            constexpr int HS = decltype(size)::value;
            infini_launch(stream, infini_gate_backward_kernel3<HS>, blocks, infini_mma::ROW_THREADS, infini_mma::gate_backward_shared<HS>, p, beta, D, dA, dn,
                          dden, partial);
            infini_launch(stream, infini_query_backward_kernel3<HS>, dim3(p.max_segments * p.kv_heads), infini_mma::SUM_THREADS<HS>,
                          infini_mma::query_backward_shared<HS>, p, beta, (const floatX*)dn, (const float*)dden, dqkv, dmemories);
        });
        done = true;
    }
#endif
    if (!done) {
        infini_with_rows(p.hs, [&](auto rows, int ld) {
            constexpr int ROWS = decltype(rows)::value;
            infini_launch(stream, infini_gate_backward_kernel2<ROWS>, blocks, infini_rows::THREADS, ROWS * ld * 4, p, beta, D, dA, dn, dden, partial, ld);
            infini_launch(stream, infini_query_backward_kernel2<ROWS>, blocks, infini_rows::THREADS, ROWS * ld * 4, p, beta, (const floatX*)dn,
                          (const float*)dden, dqkv, ld);
        });
        infini_launch(stream, infini_outer_kernel2<INFINI_READ>, dim3(p.max_segments * p.kv_heads, (unsigned)(ceil_div(p.hs, 64) * ceil_div(p.hs, 64))), 256, 0,
                      p, dmemories, (const floatX*)dn, (const float*)dden);
    }
    infini_launch(stream, infini_beta_kernel, dim3(p.heads), 256, 0, p, beta, dbeta, (const float*)partial, p.max_segments, pieces);
}

// The memories from the last segment to the first, and what was written into them: dmemories from infini_read_backward become the gradients of p.memories;
// dk, dv = keep·(dk, dv) + the memory's part, in dqkv (N, qkv_stride). The state that a sequence started from is constant.
inline void infini_memory_backward(cudaStream_t stream, const InfiniPass& p, const float* beta, floatX* dqkv, float* dmemories, Scratch scratch) {
    if (p.max_segments == 0) return;
    bool tensor_cores = p.tensor_cores && aligned16(dqkv);
    if (p.delta && p.max_memories > 0) {
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
    if (p.max_memories > 0) infini_sum_backward(stream, p, p.hopper, dmemories);
#ifndef GPU_FLOAT32
    if (p.hopper) {
        assert(aligned16(dqkv));
        dim3 blocks((unsigned)(p.max_segments * ceil_div(p.max_q(), infini_hopper::PIECE) * p.kv_heads));
        infini_launch(stream, p.delta ? infini_write_backward_kernel4<true> : infini_write_backward_kernel4<false>, blocks, infini_hopper::THREADS,
                      p.delta ? infini_hopper::Shared<2, INFINI_BACKWARD_STAGES, 4>::BYTES : infini_hopper::Shared<1, INFINI_BACKWARD_STAGES, 4>::BYTES,
                      infini_qkv_map(p, p.qkv), infini_qkv_map(p, dqkv), p, beta, (const float*)dmemories, dqkv);
        return;
    }
    if (tensor_cores) {
        infini_with_head_size(p.hs, [&](auto size) {
            constexpr int HS = decltype(size)::value;
            dim3 blocks(p.max_segments * p.kv_heads, infini_pieces(p, true));
            infini_launch(stream, p.delta ? infini_write_backward_kernel3<HS, true> : infini_write_backward_kernel3<HS, false>, blocks, infini_mma::ROW_THREADS,
                          p.delta ? infini_mma::write_backward_shared<HS, true> : infini_mma::write_backward_shared<HS, false>, p, beta,
                          (const float*)dmemories, dqkv);
        });
        return;
    }
#endif
    infini_with_rows(p.hs, [&](auto rows, int ld) {
        constexpr int ROWS = decltype(rows)::value;
        infini_launch(stream, infini_write_backward_kernel2<ROWS>, dim3(p.max_segments * p.kv_heads, infini_pieces(p, false)), infini_rows::THREADS,
                      3 * ROWS * ld * 4, p, beta, (const float*)dmemories, dqkv, ld);
    });
}

#ifndef GPU_FLOAT32
// Both at once. partial (num_seqs, NH, sequence_blocks): each block's part of dβ.
template <bool DELTA, int CLUSTER, int GROUPS, int STAGES, int AHEAD, int BLOCKS>
inline void infini_sequence_backward(cudaStream_t stream, const InfiniPass& p, const float* beta, const floatX* D, const floatX* dA, floatX* dqkv,
                                     float* partial) {
    launch_overlapping(stream, false, CLUSTER, infini_backward_kernel5<DELTA, CLUSTER, GROUPS, STAGES, AHEAD, BLOCKS>, (int64_t)p.num_seqs * p.heads * CLUSTER,
                       dim3(infini_hopper::THREADS, GROUPS + 1), infini_hopper::SequenceShared<CLUSTER, GROUPS, STAGES>::BYTES, infini_qkv_map(p, p.qkv),
                       infini_channels_map(p, D), infini_channels_map(p, dA), infini_qkv_map(p, dqkv), p, beta, dqkv, partial);
    LAUNCH_CHECK();
}

// The same where sequences are few, queries and keys one behind the other.
inline void infini_range_backward(cudaStream_t stream, const InfiniPass& p, const float* beta, float* dbeta, const floatX* D, const floatX* dA, floatX* dqkv,
                                  float* dmemories) {
    constexpr int STAGES = 6, AHEAD = 4, SHARED = infini_hopper::RangeShared<STAGES>::BYTES;
    Scratch rest = {workspace(), WORKSPACE_BYTES};
    InfiniParts parts = {rest.take<float>(p.memory_at(p.ranges, 0)), rest.take<float>((int64_t)p.ranges * p.heads), rest.take<int>(p.max_memories),
                         rest.take<int>(p.num_seqs)};
    assert(p.heads % infini_hopper::RANGE_HEADS == 0);
    const int64_t blocks = (int64_t)p.ranges * (p.heads / infini_hopper::RANGE_HEADS);
    const dim3 threads(infini_hopper::THREADS, infini_hopper::RANGE_HEADS + 1);
    // The first does not overlap what is before it: the second fetches k, v, dk, dv without waiting, and relies on that.
    launch_overlapping(stream, false, 1, infini_query_backward_kernel6<STAGES, AHEAD>, blocks, threads, SHARED, infini_qkv_map(p, p.qkv),
                       infini_channels_map(p, D), infini_channels_map(p, dA), infini_qkv_map(p, dqkv), p, beta, dqkv, dmemories, parts);
    LAUNCH_CHECK();
    launch_overlapping(stream, true, 1, infini_key_backward_kernel6<STAGES, AHEAD>, blocks, threads, SHARED, infini_qkv_map(p, p.qkv), infini_qkv_map(p, dqkv),
                       p, beta, dbeta, dqkv, (const float*)dmemories, parts);
    LAUNCH_CHECK();
}
#endif

// infini_read_backward() and infini_memory_backward(), with the same arguments.
inline void infini_gradients(cudaStream_t stream, const InfiniPass& p, const float* beta, float* dbeta, const floatX* D, const floatX* dA, floatX* dn,
                             float* dden, floatX* dqkv, float* dmemories, Scratch scratch) {
#ifndef GPU_FLOAT32
    if (p.ranges > 0) {
        assert(aligned16(D) && aligned16(dA) && aligned16(dqkv));
        infini_range_backward(stream, p, beta, dbeta, D, dA, dqkv, dmemories);
        return;
    }
    if (p.sequence_blocks > 0) {
        assert(aligned16(D) && aligned16(dA) && aligned16(dqkv));
        Scratch rest = scratch;
        float* partial = rest.take<float>((int64_t)p.num_seqs * p.heads * p.sequence_blocks);
        bool one_each = (int64_t)p.num_seqs * p.heads <= device_properties().multiProcessorCount;
        auto both = [&](auto delta) {
            constexpr bool DELTA = decltype(delta)::value;
            auto run = infini_sequence_backward<DELTA, 1, 1, 2, 2, 2>;
            if (one_each) run = DELTA ? infini_sequence_backward<true, 1, 2, 4, 4, 1> : infini_sequence_backward<false, 1, 1, 4, 3, 1>;
            if (p.sequence_blocks > 1) run = infini_sequence_backward<true, 4, 2, 4, 3, 1>;
            run(stream, p, beta, D, dA, dqkv, partial);
        };
        p.delta ? both(std::true_type()) : both(std::false_type());
        launch_overlapping(stream, true, 1, infini_beta_kernel, p.heads, 256, 0, p, beta, dbeta, (const float*)partial, p.num_seqs, p.sequence_blocks);
        LAUNCH_CHECK();
        return;
    }
#endif
    infini_read_backward(stream, p, beta, dbeta, D, dA, dn, dden, dqkv, dmemories, scratch);
    infini_memory_backward(stream, p, beta, dqkv, dmemories, scratch);
}

}  // namespace gpu
