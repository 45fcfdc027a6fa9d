// Infini-attention, bookkeeping: what cpu::InfiniPass (attention.h) is on the CPU. Which segments a pass over N tokens has, where their keys stand, and how
// states come in and go out.
//
// How many tokens a sequence has pending from the pass before is known to the device alone: it stands in the state that the sequence starts from. So the
// tables are built there, and the host only knows bounds: arrays have room for max_segments segments, those that are not used are empty, and every kernel
// finds out by itself that there is nothing to do. Where no sequence starts from a state, nothing is pending, a segment's keys are rows of qkv like its
// queries, and no key is copied. Otherwise all tokens of all segments are packed as rows k|v, pending ones converted from the state's float32.
#pragma once

#include <algorithm>

#include "../../attention.h"
#include "hopper.cuh"

namespace gpu {

constexpr float INFINI_EPSILON = 1e-6f;  // Φ can underflow

__device__ inline float infini_gate(float beta) { return 1 / (1 + expf(-beta)); }

// Which memory a segment reads: a number counts those written in this pass, in the order of their segments.
constexpr int INFINI_EMPTY = -1;    // nothing has been written yet
constexpr int INFINI_CARRIED = -2;  // that of the state which its sequence starts from

// A segment, as far as it stands in this pass.
struct InfiniSegment {
    int seq, start;      // its sequence, and its place there, counted from the first pending token
    int row, q_len;      // the rows of its new tokens in qkv
    int key_row, k_len;  // the rows of all its tokens, pending ones first, in keys
    int read, write;     // the memory that it reads, and the one that it leaves; write < 0: it is not full
    int last;            // no segment of the sequence follows: what it leaves is not read in this pass
};

struct InfiniSequence {
    int first_segment, first_memory, first_key;  // of this sequence; behind the last sequence stand the totals
    int pending;                                 // tokens from the pass before
    int written;                                 // 1: the state holds a memory
    float* block;                                // the state it starts from (cpu::infini_state); null: empty
};

// Handed to kernels by value. `carried` says that sequences may start from a state.
struct InfiniPass {
    int heads, kv_heads, hs, segment;
    bool delta, gated_first, carried;
    float z_start;
    int num_seqs, max_len;
    int64_t num_tokens;                        // N
    int max_segments, max_memories, max_keys;  // bounds
    bool tensor_cores, hopper;                 // sizes and addresses allow these kernels
    int group;                                 // segments that one block of Hopper's kernels sums over, one behind another
    int sequence_blocks;                       // blocks that share a head of a sequence in infini_backward_kernel5; 0: it is not used
    int write_blocks;                          // the same for infini_write_kernel5 and kv heads
    int ranges;                                // of all tokens, for infini_query_backward_kernel6 and its other half; 0: they are not used
    const int* cu_seqlens;                     // (num_seqs+1)
    const TokenPlace* place;                   // (N)
    const floatX* qkv;                         // (N, qkv_stride), not rotated
    const floatX* keys;                        // row n: k at keys + n·key_stride, v behind it, not rotated
    int64_t key_stride;
    float* memories;                 // (max_memories, KV, hs + hs·hs): what full segments leave, z before M
    InfiniSegment* segments;         // (max_segments)
    InfiniSequence* sequences;       // (num_seqs+1)
    int *cu_q, *cu_k, *seq, *start;  // the segments as sequences of the softmax core; (max_segments+1), same, (max_segments), same
    int *position, *key_position;    // (N), (max_keys) a token's place in its segment

    HOST_DEVICE int channels() const { return heads * hs; }
    HOST_DEVICE int heads_per_kv() const { return heads / kv_heads; }
    HOST_DEVICE int kv_head(int h) const { return h / heads_per_kv(); }
    HOST_DEVICE int64_t kv_channels() const { return (int64_t)kv_heads * hs; }
    HOST_DEVICE int64_t row_size() const { return 2 * kv_channels(); }
    HOST_DEVICE int64_t qkv_stride() const { return channels() + row_size(); }
    HOST_DEVICE int64_t memory_size() const { return (int64_t)hs * (hs + 1); }  // of one kv head
    HOST_DEVICE int64_t memory_at(int index, int kv) const { return ((int64_t)index * kv_heads + kv) * memory_size(); }
    HOST_DEVICE int64_t block_size() const { return INFINI_MEMORY + kv_heads * memory_size() + segment * row_size(); }
    HOST_DEVICE int max_q() const { return segment < max_len ? segment : max_len; }  // new tokens of a segment
    int max_k() const { return carried ? segment : max_q(); }
    int64_t max_key_rows() const { return carried ? max_keys : num_tokens; }

    // g in A = g·R + (1−g)·D
    __device__ float gate(const InfiniSegment& s, float beta) const { return s.read != INFINI_EMPTY || gated_first ? infini_gate(beta) : 0; }
    // What the gradients of local attention are still to be multiplied by (infini_local_gradient()).
    HOST_DEVICE bool one_gate() const { return heads == kv_heads; }
    __device__ float keep(float g) const { return one_gate() ? 1 - g : 1; }
    // z of what the segment reads, M behind it; null: nothing has been written.
    __device__ const float* memory(const InfiniSegment& s, int kv) const {
        if (s.read >= 0) return memories + memory_at(s.read, kv);
        if (s.read == INFINI_CARRIED) return sequences[s.seq].block + INFINI_MEMORY + kv * memory_size();
        return nullptr;
    }
};

// Sizes and bounds. `carried`: how many sequences may start from a state (0: none does); kv_tokens: a bound on pending and new tokens together.
inline InfiniPass infini_shape(const AttentionConfig& a, int64_t N, int64_t num_seqs, int64_t max_len, int64_t carried, int64_t kv_tokens) {
    InfiniPass p{};
    p.heads = a.heads;
    p.kv_heads = a["kv-heads"];
    p.hs = a.head_size();
    p.segment = a["segment"];
    p.delta = a["memory-update"] == 1;
    p.gated_first = a["first-segment"] == 1;
    p.z_start = a["memory-init"] == 0 ? 1 : 0;
    p.carried = carried > 0;
    p.num_seqs = (int)num_seqs;
    p.num_tokens = N;
    p.max_len = (int)max_len;
    // A sequence of n new and up to S−1 pending tokens has at most n/S + 2 segments, one of n new tokens alone at most n/S + 1.
    int64_t S = p.segment, pending = carried > 0 ? S - 1 : 0, segments = std::min(N / S + num_seqs + carried, num_seqs * ceil_div(max_len + pending, S));
    int64_t keys = std::min(N + carried * pending, std::max(N, kv_tokens));
    assert(segments * a.heads < INT32_MAX && keys < INT32_MAX && N < INT32_MAX);
    p.max_segments = (int)segments;
    p.max_memories = (int)(N / S + carried);
    p.max_keys = (int)keys;
    return p;
}

// Bytes that infini_begin() takes.
inline int64_t infini_tables_bytes(const InfiniPass& p) {
    int64_t n = p.max_segments, integer = sizeof(int);
    int64_t bytes = scratch_bytes({n * (int64_t)sizeof(InfiniSegment), (p.num_seqs + 1) * (int64_t)sizeof(InfiniSequence), (n + 1) * integer, n * integer,
                                   n * integer, p.num_tokens * integer});
    if (p.carried) bytes += scratch_bytes({(n + 1) * integer, p.max_keys * integer, p.max_keys * p.row_size() * (int64_t)sizeof(floatX)});
    return bytes;
}

// ---- tables --------------------------------------------------------------------------------------------------------------------------------------------

// Where sequences' states come from, device arrays: those that are being decoded (states), or lanes (memory_from, null entries: none), which are kept in
// `carry`, one block behind another: copied there by the forward pass, found there by the backward pass. All null: every sequence starts empty.
struct InfiniSource {
    const AttentionState* states = nullptr;
    const float* const* memory_from = nullptr;
    float* carry = nullptr;
    bool copy = false;
};

__device__ inline int infini_sum_before(int x, int* total) {  // over the lanes of a warp
    int lane = threadIdx.x % 32, sum = x;
    for (int offset = 1; offset < 32; offset *= 2) {
        int other = __shfl_up_sync(0xffffffff, sum, offset);
        if (lane >= offset) sum += other;
    }
    int before = *total + sum - x;
    *total += __shfl_sync(0xffffffff, sum, 31);
    return before;
}

// The sequences, by one warp.
__global__ void infini_sequences_kernel(InfiniPass p, InfiniSource source) {
    int lane = threadIdx.x, segments = 0, memories = 0, keys = 0, lanes = 0, S = p.segment;
    for (int s0 = 0; s0 < p.num_seqs; s0 += 32) {
        int s = s0 + lane;
        bool there = s < p.num_seqs;
        const float* from = there && source.memory_from ? source.memory_from[s] : nullptr;
        int place = infini_sum_before(from ? 1 : 0, &lanes);
        float* block = !there ? nullptr : source.states ? source.states[s].fixed : from ? source.carry + place * p.block_size() : nullptr;
        const float* header = source.copy ? from : block;
        int pending = header ? (int)header[INFINI_PENDING] : 0, written = header && header[INFINI_WRITTEN] > 0;
        int n = there ? p.cu_seqlens[s + 1] - p.cu_seqlens[s] : 0, total = n > 0 ? pending + n : 0;
        int first_segment = infini_sum_before((int)ceil_div(total, S), &segments), first_memory = infini_sum_before(total / S, &memories);
        int first_key = infini_sum_before(total, &keys);
        if (there) p.sequences[s] = {first_segment, first_memory, first_key, pending, written, block};
    }
    if (lane == 0) p.sequences[p.num_seqs] = {segments, memories, keys, 0, 0, nullptr};
}

// The last sequence s with sequences[s].*first <= i: among several that begin at i the one that is not empty.
__device__ inline int infini_find_sequence(const InfiniPass& p, int InfiniSequence::*first, int i) {
    int low = 0, high = p.num_seqs;
    while (high - low > 1) {
        int middle = (low + high) / 2;
        (p.sequences[middle].*first <= i ? low : high) = middle;
    }
    return low;
}

// The segments, and each token's place in its segment; one thread each.
__global__ void infini_segments_kernel(InfiniPass p) {
    int i = blockIdx.x * blockDim.x + threadIdx.x, S = p.segment;
    if (i < p.num_tokens) p.position[i] = (p.sequences[p.place[i].seq].pending + p.place[i].pos) % S;
    if (i > p.max_segments) return;
    const InfiniSequence& totals = p.sequences[p.num_seqs];
    InfiniSegment segment = {0, 0, p.cu_seqlens[p.num_seqs], 0, totals.first_key, 0, INFINI_EMPTY, -1, 1};
    if (i < totals.first_segment) {
        int s = infini_find_sequence(p, &InfiniSequence::first_segment, i);
        const InfiniSequence q = p.sequences[s];
        int j = i - q.first_segment, start = j * S, n = p.cu_seqlens[s + 1] - p.cu_seqlens[s], total = q.pending + n;
        int begin = max(start, q.pending), k_len = min(S, total - start);
        segment.seq = s;
        segment.start = start;
        segment.row = p.cu_seqlens[s] + begin - q.pending;
        segment.q_len = start + k_len - begin;
        segment.key_row = p.carried ? q.first_key + start : segment.row;
        segment.k_len = k_len;
        segment.read = j > 0 ? q.first_memory + j - 1 : q.written ? INFINI_CARRIED : INFINI_EMPTY;
        segment.write = k_len == S ? q.first_memory + j : -1;
        segment.last = start + k_len == total;
    }
    p.cu_q[i] = segment.row;
    if (p.carried) p.cu_k[i] = segment.key_row;
    if (i == p.max_segments) return;
    p.segments[i] = segment;
    p.seq[i] = segment.seq;
    p.start[i] = segment.start;
}

// ---- states -----------------------------------------------------------------------------------------------------------------------------------------------
// INFINI_COPY_BLOCKS blocks a sequence.

constexpr int INFINI_COPY_BLOCKS = 32, INFINI_COPY_THREADS = 256;

// The lanes' states into saved["carry"], as far as they are filled.
__global__ void infini_carry_kernel(InfiniPass p, const float* const* memory_from) {
    int s = blockIdx.x / INFINI_COPY_BLOCKS;
    const InfiniSequence q = p.sequences[s];
    if (!q.block) return;
    int64_t n = INFINI_MEMORY + p.kv_heads * p.memory_size() + q.pending * p.row_size(), step = INFINI_COPY_BLOCKS * blockDim.x;
    for (int64_t i = blockIdx.x % INFINI_COPY_BLOCKS * blockDim.x + threadIdx.x; i < n; i += step) q.block[i] = memory_from[s][i];
}

// k|v of all tokens of all segments, one block a row.
__global__ void infini_keys_kernel(InfiniPass p, floatX* keys) {
    int row = blockIdx.x;
    bool there = row < p.sequences[p.num_seqs].first_key;
    int s = infini_find_sequence(p, &InfiniSequence::first_key, row);
    const InfiniSequence q = p.sequences[s];
    int j = row - q.first_key;  // the token, counted from the first pending one
    if (threadIdx.x == 0) p.key_position[row] = there ? j % p.segment : 0;
    if (!there) return;
    int64_t n = p.row_size();
    floatX* to = keys + row * n;
    if (j < q.pending) {
        const float* from = q.block + INFINI_MEMORY + p.kv_heads * p.memory_size() + j * n;
        for (int i = threadIdx.x; i < n; i += blockDim.x) to[i] = from_float<floatX>(from[i]);
    } else {
        const floatX* from = p.qkv + (p.cu_seqlens[s] + j - q.pending) * p.qkv_stride() + p.channels();
        for (int i = threadIdx.x; i < n; i += blockDim.x) to[i] = from[i];
    }
}

// The way back for gradients: dk|dv of the new tokens from the packed rows (max_keys, 2·KV·hs) to dqkv (N, qkv_stride); one block a token. Those of pending
// tokens stay behind.
__global__ void infini_key_gradients_kernel(InfiniPass p, const floatX* dkeys, floatX* dqkv) {
    int64_t n = blockIdx.x;
    const InfiniSequence q = p.sequences[p.place[n].seq];
    const floatX* from = dkeys + (int64_t)(q.first_key + q.pending + p.place[n].pos) * p.row_size();
    floatX* to = dqkv + n * p.qkv_stride() + p.channels();
    for (int i = threadIdx.x; i < p.row_size(); i += blockDim.x) to[i] = from[i];
}

// The state of each sequence behind this pass, into states[s].fixed or memory_to[s] (null: nowhere), which may be the block that it started from: nothing is
// read there that this writes.
__global__ void infini_leave_kernel(InfiniPass p, const AttentionState* states, float* const* memory_to) {
    int s = blockIdx.x / INFINI_COPY_BLOCKS;
    float* to = states ? states[s].fixed : memory_to[s];
    if (!to) return;
    const InfiniSequence q = p.sequences[s];
    int end = p.cu_seqlens[s + 1], n = end - p.cu_seqlens[s], pending = (q.pending + n) % p.segment;
    int last = p.sequences[s + 1].first_memory - 1;
    int64_t memory_size = p.kv_heads * p.memory_size(), row_size = p.row_size(), step = INFINI_COPY_BLOCKS * blockDim.x;
    int64_t begin = blockIdx.x % INFINI_COPY_BLOCKS * blockDim.x + threadIdx.x;
    const float* memory = last >= q.first_memory ? p.memories + p.memory_at(last, 0) : q.written ? q.block + INFINI_MEMORY : nullptr;
    if (memory != to + INFINI_MEMORY)
        for (int64_t i = begin; i < memory_size; i += step) to[INFINI_MEMORY + i] = memory ? memory[i] : 0;
    float* rows = to + INFINI_MEMORY + memory_size;
    int64_t kept = max(0, pending - n) * row_size;  // no segment was completed: these were pending before
    if (kept > 0 && to != q.block)
        for (int64_t i = begin; i < kept; i += step) rows[i] = q.block[INFINI_MEMORY + memory_size + i];
    for (int64_t i = kept + begin; i < pending * row_size; i += step)
        rows[i] = to_float(p.qkv[(end - pending + i / row_size) * p.qkv_stride() + p.channels() + i % row_size]);
    if (begin == 0) {
        to[INFINI_PENDING] = (float)pending;
        to[INFINI_WRITTEN] = memory ? 1 : 0;
    }
}

// ---- launchers ----------------------------------------------------------------------------------------------------------------------------------------------

// The tensor-core kernels take bf16, head sizes up to 128 that are multiples of 8, and want so much shared memory; they hold at most 141 KB with 128, 98 KB
// with 96 numbers a head.
inline bool infini_tensor_cores(const InfiniPass& p) {
#ifdef GPU_FLOAT32
    (void)p;
    return false;
#else
    return p.hs % 8 == 0 && p.hs <= 128 && aligned16(p.qkv) && (int)device_properties().sharedMemPerBlockOptin >= (p.hs > 96 ? 144 << 10 : 99 << 10);
#endif
}

// Hopper's kernels: 64 numbers a head.
inline bool infini_takes_hopper(const InfiniPass& p) {
#ifdef GPU_FLOAT32
    (void)p;
    return false;
#else
    return hopper_code() && p.hs == 64 && aligned16(p.qkv);
#endif
}

// Linear: where there are sequences enough to keep the GPU busy, a block takes all segments of one.
inline int infini_group(const InfiniPass& p) {
    int64_t segments = std::max<int64_t>(1, ceil_div(p.max_len, p.segment));
    return !p.delta && p.max_segments * p.kv_heads >= segments * 5 * device_properties().multiProcessorCount ? (int)segments : 1;
}

// Backward in one kernel takes heads of sequences from end to end: it wants about one for each multiprocessor, none much longer than the others. With the delta
// rule, where the other way is longer, four blocks may share one.
inline int infini_sequence_blocks(const InfiniPass& p) {
    constexpr int SHARED = 4, ROWS = 64;
    if (!p.hopper || !p.one_gate() || p.max_len == 0) return 0;
    int64_t sequences = p.num_tokens * p.heads / p.max_len, enough = device_properties().multiProcessorCount * 2 / 3;
    if (sequences >= enough) return 1;
    return p.delta && sequences * SHARED >= enough && p.segment >= SHARED * ROWS ? SHARED : 0;
}

// Backward of the linear rule where that does not do: two heads and a range a block.
inline int infini_ranges(const InfiniPass& p) {
    constexpr int HEADS = 2, SHORTEST = 64;  // a block has to change memories with every segment
    if (!p.hopper || p.delta || !p.one_gate() || p.heads % HEADS > 0 || p.max_len == 0 || p.sequence_blocks > 0 || p.segment < SHORTEST) return 0;
    return std::max(1, device_properties().multiProcessorCount / (p.heads / HEADS));
}

// Write in one kernel: under the delta rule always, its segments wait for one another anyway; four blocks share a sequence where there are few.
inline int infini_write_blocks(const InfiniPass& p) {
    constexpr int SHARED = 4, ROWS = 64;
    if (!p.hopper || !p.delta || p.max_len == 0) return 0;
    int64_t sequences = p.num_tokens * p.kv_heads / p.max_len;
    return sequences >= device_properties().multiProcessorCount * 2 / 3 || p.segment < SHARED * ROWS ? 1 : SHARED;
}

// Builds the tables of a pass over qkv (N, qkv_stride) whose full segments leave their memories in `memories`, and packs its keys if p.carried.
// The arrays are taken from `scratch` and live as long as they stay taken. Sources: lengths and places of the batch on the device.
inline void infini_begin(cudaStream_t stream, InfiniPass& p, const int* cu_seqlens, const TokenPlace* place, const InfiniSource& source, const floatX* qkv,
                         float* memories, Scratch& scratch) {
    p.cu_seqlens = cu_seqlens;
    p.place = place;
    p.qkv = qkv;
    p.memories = memories;
    p.segments = scratch.take<InfiniSegment>(p.max_segments);
    p.sequences = scratch.take<InfiniSequence>(p.num_seqs + 1);
    p.cu_q = p.cu_k = scratch.take<int>(p.max_segments + 1);
    p.seq = scratch.take<int>(p.max_segments);
    p.start = scratch.take<int>(p.max_segments);
    p.position = scratch.take<int>(p.num_tokens);
    p.keys = qkv + p.channels();
    p.key_stride = p.qkv_stride();
    floatX* keys = nullptr;
    if (p.carried) {
        p.cu_k = scratch.take<int>(p.max_segments + 1);
        p.key_position = scratch.take<int>(p.max_keys);
        p.keys = keys = scratch.take<floatX>(p.max_keys * p.row_size());
        p.key_stride = p.row_size();
    }
    p.tensor_cores = infini_tensor_cores(p);
    p.hopper = infini_takes_hopper(p);
    p.group = infini_group(p);
    p.sequence_blocks = infini_sequence_blocks(p);
    p.write_blocks = infini_write_blocks(p);
    p.ranges = infini_ranges(p);
    infini_sequences_kernel<<<1, 32, 0, stream>>>(p, source);
    LAUNCH_CHECK();
    infini_segments_kernel<<<(unsigned)ceil_div(std::max<int64_t>(p.max_segments + 1, p.num_tokens), 256), 256, 0, stream>>>(p);
    LAUNCH_CHECK();
    if (source.copy && p.num_seqs > 0) {
        infini_carry_kernel<<<p.num_seqs * INFINI_COPY_BLOCKS, INFINI_COPY_THREADS, 0, stream>>>(p, source.memory_from);
        LAUNCH_CHECK();
    }
    if (keys && p.max_keys > 0) {
        infini_keys_kernel<<<p.max_keys, 128, 0, stream>>>(p, keys);
        LAUNCH_CHECK();
    }
}

inline void infini_key_gradients(cudaStream_t stream, const InfiniPass& p, const floatX* dkeys, floatX* dqkv) {
    if (p.num_tokens == 0) return;
    infini_key_gradients_kernel<<<(unsigned)p.num_tokens, 128, 0, stream>>>(p, dkeys, dqkv);
    LAUNCH_CHECK();
}

inline void infini_leave(cudaStream_t stream, const InfiniPass& p, const AttentionState* states, float* const* memory_to) {
    if (p.num_seqs == 0) return;
    infini_leave_kernel<<<p.num_seqs * INFINI_COPY_BLOCKS, INFINI_COPY_THREADS, 0, stream>>>(p, states, memory_to);
    LAUNCH_CHECK();
}

}  // namespace gpu
