// The encoder: rows of two tables by token and by position, and the gradients of the tables.
//
//     forward    out_n = wte[token_n] + wpe[position_n]
//     backward   dwte[v] += Σ dout_n over the n with token_n = v       dwpe[p] += Σ dout_n over the n with position_n = p
//
// Shapes: out, dout (N,C), wte (Vp,C), wpe (max_seq,C). How these kernels came about: dev/cuda/encoder.cu.
//
// The backward pass scatters, and one token may be a tenth of the batch. Adding with atomics would sum in any order. Both tables want the rows of dout, in two
// orders; dout is larger than the L2 cache, a *slice* of its columns is not. So one kernel goes from slice to slice: first the positions' sums, then the
// tokens', which find the slice in the cache.
//
// Positions count up in each sequence, so the rows of one position are known: one in each sequence that is long enough. A block adds them up. Where all
// sequences have one length the kernel that makes dout has done that already (layernorm_backward, PositionSums), and the tokens are all that is left to do.
//
// For the tokens the row numbers are sorted by token, on the host while the GPU is busy with the steps before: then each table row's sum is a *run* of
// neighbours in the sorted list. Runs have all lengths; a block takes a *piece* of 128 entries whatever runs it cuts, each of its warps a share of 32. A run
// inside one piece is added to the table at once; of a run that pieces cut, each piece leaves its part, and the block that leaves the last one adds them all up
// in order.
//
//     sorted tokens    1 1 1 4 | 4 4 4 4 | 4 4 7 9 | 9 9 9 9        | between pieces (of 4 entries here)
//     goes to          table T | H       | H   t T | H              t: the table, T: tail of its piece, H: head of its piece
//     the last block   token 4: tail 0 + head 1 + head 2            token 9: tail 2 + head 3
#pragma once

#include <algorithm>
#include <numeric>
#include <type_traits>
#include <vector>

#include "common.cuh"
#include "numbers.cuh"
#include "tensor_cores.cuh"

namespace gpu {

// ---- forward -----------------------------------------------------------------------------------------------------------------------------------------------

// Thread j of a block has the vectors j, j + 256, ... of the block's, W numbers each; all that it reads is on its way together.
template <int W, int VECTORS>
__global__ void __launch_bounds__(256) encoder_forward_kernel4(floatX* __restrict__ out, const int* __restrict__ tokens, const int* __restrict__ position,
                                                               const floatX* __restrict__ wte, const floatX* __restrict__ wpe, unsigned total, unsigned row) {
    using Vector = std::conditional_t<W == 1, floatX, int4>;
    Vector x[VECTORS], y[VECTORS];
    int token[VECTORS], place[VECTORS];
    unsigned first = blockIdx.x * 256 * VECTORS + threadIdx.x;
#pragma unroll
    for (int k = 0; k < VECTORS; k++) {
        unsigned n = min(first + k * 256, total - 1) / row;
        token[k] = tokens[n];
        place[k] = wpe ? position[n] : 0;
    }
#pragma unroll
    for (int k = 0; k < VECTORS; k++) {
        unsigned i = min(first + k * 256, total - 1) % row;
        x[k] = ((const Vector*)wte)[(int64_t)token[k] * row + i];
        y[k] = wpe ? ((const Vector*)wpe)[(int64_t)place[k] * row + i] : Vector{};
    }
#pragma unroll
    for (int k = 0; k < VECTORS; k++) {
        Numbers<W> sum;
        for (int i = 0; i < W; i++) sum[i] = to_float(((const floatX*)&x[k])[i]) + to_float(((const floatX*)&y[k])[i]);
        if (first + k * 256 < total) store_numbers<W>(out + (int64_t)(first + k * 256) * W, sum);
    }
}

// out (N,C); tokens, position (N) on the device; wte (Vp,C), wpe (max_seq,C) or null. cpu::encoder_forward.
inline void encoder_forward(cudaStream_t stream, floatX* out, const int* tokens, const int* position, const floatX* wte, const floatX* wpe /*or null*/,
                            int64_t N, int64_t C) {
    constexpr int SIZE = Packed<floatX>::size, VECTORS = 2;
    int W = C % SIZE == 0 && aligned16(out) && aligned16(wte) && aligned16(wpe) ? SIZE : 1;
    int64_t total = N * C / W;
    if (total == 0) return;
    assert(total < (int64_t)1 << 31);
    auto kernel = W == 1 ? encoder_forward_kernel4<1, VECTORS> : encoder_forward_kernel4<SIZE, VECTORS>;
    kernel<<<(unsigned)ceil_div(total, 256 * VECTORS), 256, 0, stream>>>(out, tokens, position, wte, wpe, (unsigned)total, (unsigned)(C / W));
    LAUNCH_CHECK();
}

// ---- backward ----------------------------------------------------------------------------------------------------------------------------------------------

constexpr int ENCODER_PIECE = 128;  // entries of the sorted list that one block adds up
constexpr int ENCODER_WARPS = 4;    // a block

inline int encoder_width(int64_t C) { return C % 4 == 0 ? 4 : 1; }  // numbers of a row that one lane takes
inline int64_t encoder_slices(int64_t C) { return ceil_div(C, 32 * encoder_width(C)); }

// What encoder_backward has to know of a batch besides its tokens: made on the host, used on the device, one array of size(N, C) ints.
//
//     order (N)                  the rows by their token, rows of one token in their own order: the sorted list
//     first, last (pieces)       of the runs that stand at the beginning and at the end of each piece: the pieces in which they begin and end
//     tickets (slices,pieces)    how many parts of the run that begins in a piece and is cut at its end are there; zeros before and after a call
struct EncoderPlan {
    int pieces, *order, *first, *last, *tickets;
    EncoderPlan(int* plan, int64_t N) : pieces((int)ceil_div(N, ENCODER_PIECE)), order(plan), first(order + N), last(first + pieces), tickets(last + pieces) {}
    static int64_t size(int64_t N, int64_t C) { return N + (2 + encoder_slices(C)) * ceil_div(N, ENCODER_PIECE); }
};

// tokens (N) in [0,V): counted, then put into their places one by one.
inline std::vector<int> encoder_plan(const std::vector<int>& tokens, int64_t V, int64_t C) {
    int N = (int)tokens.size();
    std::vector<int> memory(EncoderPlan::size(N, C)), starts(V + 1);  // of the run of each token in the sorted list
    EncoderPlan plan(memory.data(), N);
    for (int v : tokens) starts[v + 1]++;
    std::partial_sum(starts.begin(), starts.end(), starts.begin());
    std::vector<int> next = starts;
    for (int n = 0; n < N; n++) plan.order[next[tokens[n]]++] = n;
    for (int q = 0; q < plan.pieces; q++) {
        int begin = q * ENCODER_PIECE, end = std::min(begin + ENCODER_PIECE, N);
        plan.first[q] = starts[tokens[plan.order[begin]]] / ENCODER_PIECE;
        plan.last[q] = (starts[tokens[plan.order[end - 1]] + 1] - 1) / ENCODER_PIECE;
    }
    return memory;
}

// W neighbouring numbers as they stand in memory; read in one access, past the L1 cache: nothing here is read twice by one multiprocessor.
template <int W, class T>
struct Columns {
    static constexpr int bytes = W * sizeof(T);
    using Vector = std::conditional_t<bytes == 2, unsigned short, std::conditional_t<bytes == 4, int, std::conditional_t<bytes == 8, int2, int4>>>;
    Vector bits;
    static_assert(sizeof(Vector) == bytes, "one access");
    __device__ void load(const T* p, bool there = true) {  // zeros if not there
        bits = Vector{};
        if (there) bits = __ldcg((const Vector*)p);
    }
    // From memory into shared memory, where this stands, without waiting; policy says how long the L2 cache should keep it.
    __device__ void load_async(const T* p, uint64_t policy) {
        if constexpr (bytes == 16)
            asm volatile("cp.async.cg.shared.global.L2::cache_hint [%0], [%1], 16, %2;\n" ::"r"(shared_address(&bits)), "l"(p), "l"(policy) : "memory");
        else if constexpr (bytes >= 4)
            asm volatile("cp.async.ca.shared.global.L2::cache_hint [%0], [%1], %2, %3;\n" ::"r"(shared_address(&bits)), "l"(p), "n"(bytes), "l"(policy)
                         : "memory");
        else
            load(p);
    }
    __device__ float operator[](int k) const { return to_float(((const T*)&bits)[k]); }
    __device__ float& number(int k) { return ((float*)&bits)[k]; }
};
template <int W, class X>
__device__ inline void add(Numbers<W>& sum, const X& x) {
    for (int k = 0; k < W; k++) sum[k] += x[k];
}
template <int W>
__device__ inline void store_streaming(float* p, const Numbers<W>& x) {
    if constexpr (W == 4)
        __stcs((float4*)p, make_float4(x[0], x[1], x[2], x[3]));
    else
        __stcs(p, x[0]);
}

// Block b of a slice: position b, if there is one, else piece b − positions. head, tail (pieces,C) are written only where a run is cut.
template <int W>
__global__ void __launch_bounds__(32 * ENCODER_WARPS, 8)
    encoder_backward_kernel5(float* __restrict__ dwte, float* __restrict__ dwpe, float* head, float* tail, const floatX* __restrict__ dout,
                             const int* __restrict__ tokens, EncoderPlan plan, const int* __restrict__ cu_seqlens, int num_seqs, int positions, int N, int C) {
    constexpr int WARPS = ENCODER_WARPS, PIECE = ENCODER_PIECE, SHARE = 32, STAGES = 4;
    static_assert(PIECE == WARPS * SHARE, "a lane has one entry");
    __shared__ Columns<W, floatX> rows[WARPS][STAGES][32];   // of dout, on their way
    __shared__ Columns<W, float> tables[WARPS][STAGES][32];  // of dwte; then sums that one warp leaves for another
    __shared__ int keys[PIECE + 2];                          // keys[i + 1] is entry i's; no two alike where there are no entries
    __shared__ bool complete[2];                             // this block left the last part of the run that is cut in front of, behind its piece
    int per_slice = positions + plan.pieces, slice = blockIdx.x / per_slice, b = blockIdx.x - slice * per_slice;
    int t = threadIdx.x, lane = t % 32, warp = t / 32, c = (slice * 32 + lane) * W;
    bool mine = c < C;
    if (!mine) c = C - W;  // read what there is, write nothing

    enum { HEAD, TAIL };
    auto leave = [&](int which, const Numbers<W>& x) {
        for (int k = 0; k < W; k++) tables[warp][which][lane].number(k) = x[k];
    };
    // The warps' sums together are added to the table.
    auto add_to = [&](float* to, const Numbers<W>& sum) {
        Columns<W, float> table;
        table.load(to, warp == 0);
        leave(HEAD, sum);
        __syncthreads();
        if (warp == 0 && mine) {
            Numbers<W> total;
            add(total, table);
            for (int w = 0; w < WARPS; w++) add(total, tables[w][HEAD][lane]);
            store_numbers<W>(to, total);
        }
        __syncthreads();
    };

    if (b < positions) {  // warp w takes the sequences w, w + WARPS, ...
        constexpr int BATCH = 8;
        Numbers<W> sum;
        for (int s0 = warp; s0 < num_seqs; s0 += WARPS * BATCH) {
            int row[BATCH];
#pragma unroll
            for (int j = 0; j < BATCH; j++) {
                int s = s0 + j * WARPS, begin = s < num_seqs ? cu_seqlens[s] : 0, end = s < num_seqs ? cu_seqlens[s + 1] : 0;
                row[j] = begin + b < end ? begin + b : -1;
            }
            Columns<W, floatX> x[BATCH];  // zeros for sequences that are too short
#pragma unroll
            for (int j = 0; j < BATCH; j++) x[j].load(dout + (int64_t)row[j] * C + c, row[j] >= 0);
#pragma unroll
            for (int j = 0; j < BATCH; j++) add(sum, x[j]);
        }
        add_to(dwpe + (int64_t)b * C + c, sum);
        return;
    }

    // A warp takes a share of the entries, a lane the row and key of one.
    int piece = b - positions, begin = piece * PIECE, i0 = warp * SHARE, count = max(0, min(SHARE, N - begin - i0));
    int first_piece = plan.first[piece], last_piece = plan.last[piece];
    auto key_of = [&](int entry) { return entry >= 0 && entry < N ? tokens[plan.order[entry]] : -1; };
    int front = key_of(begin + i0 - 1), behind = key_of(begin + i0 + SHARE);
    int row = lane < count ? plan.order[begin + i0 + lane] : 0, key = lane < count ? tokens[row] : -2 - i0 - lane;
    keys[1 + i0 + lane] = key;
    if (warp == 0) keys[0] = front;
    if (warp == WARPS - 1) keys[PIECE + 1] = behind;

    // Bit i: entry i is its run's last in this share. The first run may be cut in front, the last one behind.
    int next = __shfl_down_sync(0xffffffff, key, 1);
    if (lane == 31) next = behind;
    unsigned differs = __ballot_sync(0xffffffff, key != next), last = count ? 1u << (count - 1) : 0, ends = count ? (differs & (last - 1)) | last : 0;
    bool cut_in_front = count && front == __shfl_sync(0xffffffff, key, 0), cut_behind = count && !(differs & last);
    unsigned to_head = cut_in_front ? ends & -ends : 0, to_tail = cut_behind ? last & ~to_head : 0, to_table = ends & ~to_head & ~to_tail;

    // The rows one after the other, STAGES of them on their way; and with the last of a run the table's row. Neither is wanted again: they shall leave the
    // L2 cache before what the positions have read.
    uint64_t last_use;
    asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(last_use));
    auto fetch = [&](int i) {
        int64_t from = __shfl_sync(0xffffffff, row, i % 32), to = __shfl_sync(0xffffffff, key, i % 32);
        if (i < count) {
            rows[warp][i % STAGES][lane].load_async(dout + from * C + c, last_use);
            if (to_table >> i & 1) tables[warp][i % STAGES][lane].load_async(dwte + to * C + c, last_use);
        }
        asm volatile("cp.async.commit_group;\n");
    };
    Numbers<W> sum, head_sum, tail_sum;
    for (int i = 0; i < STAGES - 1; i++) fetch(i);
#pragma unroll 4
    for (int i = 0; i < count; i++) {
        fetch(i + STAGES - 1);
        asm volatile("cp.async.wait_group %0;\n" ::"n"(STAGES - 1) : "memory");
        add(sum, rows[warp][i % STAGES][lane]);
        if (!(ends >> i & 1)) continue;
        if (to_table >> i & 1) {
            add(sum, tables[warp][i % STAGES][lane]);
            int64_t to = __shfl_sync(0xffffffff, key, i);
            if (mine) store_streaming<W>(dwte + to * C + c, sum);
        } else if (to_head >> i & 1) {
            head_sum = sum;
        } else {
            tail_sum = sum;
        }
        sum = {};
    }
    leave(HEAD, head_sum);
    leave(TAIL, tail_sum);
    __syncthreads();

    // Runs that are cut between warps: who has the beginning adds up the parts. What is cut by the piece's ends goes to head and tail.
    auto goes_on = [&](int w) { return keys[(w + 1) * SHARE] == keys[(w + 1) * SHARE + 1]; };          // into the next share
    auto through = [&](int w) { return goes_on(w) && keys[w * SHARE + 1] == keys[(w + 1) * SHARE]; };  // the whole share is of a run that goes on
    if (warp == 0 && cut_in_front) {
        sum = {};
        for (int w = 0; w < WARPS && (w == 0 || through(w - 1)); w++) add(sum, tables[w][HEAD][lane]);
        if (mine) store_numbers<W>(head + (int64_t)piece * C + c, sum);
    }
    if (to_tail) {
        sum = tail_sum;
        int w = warp + 1;  // the first share that the run does not reach
        for (; w < WARPS && (w == warp + 1 || through(w - 1)); w++) add(sum, tables[w][HEAD][lane]);
        bool leaves = w == WARPS && (warp == WARPS - 1 || through(WARPS - 1));
        float* to = leaves ? tail + (int64_t)piece * C + c : dwte + (int64_t)keys[(warp + 1) * SHARE] * C + c;
        Columns<W, float> table;
        table.load(to, !leaves);
        add(sum, table);
        if (mine) store_numbers<W>(to, sum);
    }

    // Who leaves the last part of a run adds them all up: warp w the parts w, w + WARPS, ... A ticket that has been counted to the end is 0 again.
    count = min(PIECE, N - begin);
    int cut = keys[0] == keys[1];  // bit 0: in front, bit 1: behind, unless it is the same run, which has left a head
    if (keys[count] == keys[count + 1] && !(cut && keys[1] == keys[count])) cut |= 2;
    if (cut == 0) return;
    int last_of_first = cut & 1 ? plan.last[first_piece] : 0;
    __threadfence();
    __syncthreads();
    if (t < 2 && (cut >> t & 1)) {
        int from = t == 0 ? first_piece : piece;
        unsigned others = (t == 0 ? last_of_first : last_piece) - from;
        complete[t] = atomicInc((unsigned*)plan.tickets + slice * plan.pieces + from, others) == others;
        __threadfence();
    }
    __syncthreads();
    for (int k = 0; k < 2; k++) {
        if (!(cut >> k & 1) || !complete[k]) continue;
        int from = k == 0 ? first_piece : piece, to = k == 0 ? last_of_first : last_piece;
        sum = {};
#pragma unroll 8
        for (int q = from + warp; q <= to; q += WARPS) {
            Columns<W, float> part;
            part.load((q == from ? tail : head) + (int64_t)q * C + c);
            add(sum, part);
        }
        add_to(dwte + (int64_t)keys[k == 0 ? 1 : count] * C + c, sum);
    }
}

// Bytes of scratch memory that encoder_backward takes.
inline int64_t encoder_backward_scratch(int64_t N, int64_t C) {
    int64_t parts = ceil_div(N, ENCODER_PIECE) * C * (int64_t)sizeof(float);
    return scratch_bytes({parts, parts});
}

// dwte (V,C) += rows of dout (N,C) by token, dwpe (max_seq,C; or null) += rows of dout by position. tokens (N), and on the device what encoder_plan made of
// them; positions count from 0 in each of the num_seqs sequences, whose longest has max_len tokens: cu_seqlens (num_seqs+1). cpu::encoder_backward.
inline void encoder_backward(cudaStream_t stream, float* dwte, float* dwpe /*or null*/, const floatX* dout, const int* tokens, int* plan, const int* cu_seqlens,
                             int num_seqs, int max_len, int64_t N, int64_t C, Scratch scratch) {
    if (N == 0) return;
    EncoderPlan p(plan, N);
    float *head = scratch.take<float>(p.pieces * C), *tail = scratch.take<float>(p.pieces * C);
    int positions = dwpe ? max_len : 0;
    assert(encoder_width(C) == 1 || (aligned16(dwte) && aligned16(dwpe) && aligned16(dout)));
    auto kernel = encoder_width(C) == 4 ? encoder_backward_kernel5<4> : encoder_backward_kernel5<1>;
    kernel<<<(unsigned)(encoder_slices(C) * (positions + p.pieces)), 32 * ENCODER_WARPS, 0, stream>>>(dwte, dwpe, head, tail, dout, tokens, p, cu_seqlens,
                                                                                                      num_seqs, positions, (int)N, (int)C);
    LAUNCH_CHECK();
}

}  // namespace gpu
