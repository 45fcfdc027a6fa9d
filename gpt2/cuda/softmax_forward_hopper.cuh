// The softmax core, forward, on Hopper GPUs: kernel 6 of softmax_forward.cuh, where the equations stand. It takes what kernel 5 takes but for dropout: bf16,
// d_qk <= 192, d_v <= 128, sizes and strides multiples of 8; ragged batches, windows, grouped queries, queries anywhere among the keys.
//
// As many blocks as multiprocessors, each with one warp that copies and two or three warpgroups that compute (FlashAttention-3's division of labour, Shah et
// al., arXiv 2407.08608). A block takes a work item, 64 queries a warpgroup of one head, after the other from a queue, the ones with most keys first. The
// copying warp is ahead of the others: while they finish an item, the queries and keys of the next arrive.
//
// Tiles of keys are counted from an item's end: its last query sees the last key, the first tile needs the causal mask and, but for windows, no other; the
// last tile may begin before key 0, never does one read behind the sequence's last key. Items are counted from the sequence's end, too: if its queries are no
// multiple of an item's, it is the first item, the one with the fewest keys, that has warpgroups with nothing to do.
//
// What bounds it: of an item of 64 queries and 128 keys at d 64 both products take 512 clocks of a multiprocessor's tensor cores, and its 8192 exponentials,
// 16 a clock, 512 clocks as well. So they must run at the same time, and everything else must fit between. Two things see to this:
//     - The warpgroups take turns: one multiplies (the scores of its next tile and the values of the one before), while the others make weights of scores.
//     - The largest score is not looked for. Any shift will do for exp(s − shift), as long as nothing overflows; so a row keeps the largest score of its first
//       tile, and only if some weight has grown beyond 10²⁰ (or the row had seen no key yet) is the largest of the new tile looked for, the sums and O rescaled
//       and the tile's weights made again. float32 and bf16 have room for 10³⁸, and relative accuracy is the same everywhere.
#pragma once

#include <algorithm>

#include "hopper.cuh"
#include "softmax.cuh"

#ifndef GPU_FLOAT32

namespace gpu {

namespace softmax_fwd {

// CONSUMERS warpgroups; rings of STAGES tiles of 128 keys and their values, and of Q_STAGES items' queries.
template <int DQK_, int DV_, int CONSUMERS_, int STAGES_, int Q_STAGES_>
struct Shape6 {
    static constexpr int DQK = DQK_, DV = DV_, CONSUMERS = CONSUMERS_, STAGES = STAGES_, Q_STAGES = Q_STAGES_;
    static constexpr int KEYS = 128, ROWS = 64 * CONSUMERS, THREADS = 128 * (CONSUMERS + 1);
    static constexpr int QK_PANELS = (DQK + 63) / 64, V_PANELS = DV / 64, Q_PANEL = 64 * 128, PANEL = KEYS * 128;  // bytes of a panel
    static constexpr int Q = QK_PANELS * Q_PANEL, K = QK_PANELS * PANEL, V = V_PANELS * PANEL;                     // of a tile; Q: a warpgroup's
    static constexpr int BYTES = 1024 + Q_STAGES * CONSUMERS * Q + STAGES * (K + V), BARRIERS = 4 * STAGES + 2 * Q_STAGES + 1;
    static constexpr int PRODUCER_REGISTERS = CONSUMERS == 2 ? 40 : 32, CONSUMER_REGISTERS = CONSUMERS == 2 ? 232 : 160;
    static_assert(PRODUCER_REGISTERS + CONSUMERS * CONSUMER_REGISTERS <= (CONSUMERS + 1) * (65536 / THREADS / 8 * 8), "more_registers() would wait for ever");
};

// Items, in the order in which they are taken: groups of so many pairs of sequence and head that their keys and values fit the L2 cache together; in a group,
// first the last items of all pairs, and so on. tiles: a sequence's items, of which shorter sequences need fewer; 0: a ragged batch, as find_ragged_tile()
// says.
struct Schedule {
    int items, tiles, group;
};
static __device__ int softmax_forward_queue[2];  // items taken beyond each block's first; blocks that are done. Zeros between launches, one at a time

struct Work {
    int head;        // -1: there is no more
    int n;           // row of q where the item begins,
    int skip;        // so many rows before the sequence's first
    int first;       // its position
    int begin, end;  // the keys that the item needs
};

// A place in a ring: its stage, and the parity of the phase in which the stage becomes full; the opposite parity is that of its becoming empty before.
template <int STAGES>
struct Ring {
    unsigned place = 0;
    __device__ int stage() const { return place % STAGES; }
    __device__ int parity() const { return place / STAGES; }
    __device__ void next() { place = place + 1 == 2 * STAGES ? 0 : place + 1; }
    __device__ Ring after() const {
        Ring ring = *this;
        ring.next();
        return ring;
    }
};

// What stands where in shared memory.
template <class Shape>
struct Layout6 {
    uint32_t panels, barriers;
    Work* works;  // (Q_STAGES)

    __device__ uint32_t q(int slot, int warpgroup) const { return panels + (slot * Shape::CONSUMERS + warpgroup) * Shape::Q; }
    __device__ uint32_t k(int stage) const { return panels + Shape::Q_STAGES * Shape::CONSUMERS * Shape::Q + stage * Shape::K; }
    __device__ uint32_t v(int stage) const { return k(Shape::STAGES) + stage * Shape::V; }
    __device__ uint32_t k_full(int stage) const { return barriers + 8 * stage; }
    __device__ uint32_t k_empty(int stage) const { return barriers + 8 * (Shape::STAGES + stage); }
    __device__ uint32_t v_full(int stage) const { return barriers + 8 * (2 * Shape::STAGES + stage); }
    __device__ uint32_t v_empty(int stage) const { return barriers + 8 * (3 * Shape::STAGES + stage); }
    __device__ uint32_t q_full(int slot) const { return barriers + 8 * (4 * Shape::STAGES + slot); }
    __device__ uint32_t q_empty(int slot) const { return barriers + 8 * (4 * Shape::STAGES + Shape::Q_STAGES + slot); }
    __device__ uint32_t v_come() const { return barriers + 8 * (Shape::BARRIERS - 1); }  // for the copying warp alone, before v_full

    __device__ void init_barriers() const {
        for (int i = 0; i < Shape::BARRIERS; i++) {
            bool empty = i < 4 * Shape::STAGES ? i / Shape::STAGES % 2 : i >= 4 * Shape::STAGES + Shape::Q_STAGES && i < Shape::BARRIERS - 1;
            barrier_init(barriers + 8 * i, empty ? 4 * Shape::CONSUMERS : 1);  // every computing warp says when it is done
        }
        barrier_init_fence();
    }
};

// ---- the warp that copies -----------------------------------------------------------------------------------------------------------------------------

template <class Shape>
__device__ __forceinline__ void produce(const SoftmaxAttention& a, const CUtensorMap& q_map, const CUtensorMap& k_map, const CUtensorMap& v_map,
                                        const Schedule& schedule, const Layout6<Shape>& at) {
    constexpr int KEYS = Shape::KEYS, ROWS = Shape::ROWS;
    const bool leader = threadIdx.x % 32 == 0;
    Ring<Shape::STAGES> tile;
    Ring<Shape::Q_STAGES> slot;
    int come = 0;
    for (int x = blockIdx.x, after; x < schedule.items; x = after) {
        if (leader) after = gridDim.x + atomicAdd(&softmax_forward_queue[0], 1);
        after = __shfl_sync(0xffffffff, after, 0);
        int s, head, item;  // item: counted from the sequence's last
        if (schedule.tiles > 0) {
            int pairs = a.num_seqs * a.heads, in_group = schedule.group * schedule.tiles, from = x / in_group * schedule.group;
            int wide = min(schedule.group, pairs - from), pair = from + x % in_group % wide;
            s = pair / a.heads;
            head = pair % a.heads;
            item = x % in_group / wide;
            if (item * ROWS >= a.q_len(s)) continue;
        } else if (!find_ragged_tile(a, ROWS, x, &s, &head, &item)) {
            continue;
        }
        const int start = a.q_len(s) - (item + 1) * ROWS, row = a.cu_q[s] + start, key = a.cu_k[s], g = a.kv_head(head);
        Work w;
        w.head = head;
        w.n = row;
        w.skip = max(0, -start);
        w.first = a.position(s, start);
        w.begin = a.window > 0 ? max(0, w.first + w.skip - a.window + 1) : 0;
        w.end = min(w.first + ROWS, a.k_len(s));
        if (leader) {
            barrier_wait(at.q_empty(slot.stage()), slot.parity() ^ 1);
            at.works[slot.stage()] = w;
            barrier_arrive_expect(at.q_full(slot.stage()), Shape::CONSUMERS * Shape::Q);
            for (int c = 0; c < Shape::CONSUMERS; c++)
                for (int p = 0; p < Shape::QK_PANELS; p++)
                    bulk_load(at.q(slot.stage(), c) + p * Shape::Q_PANEL, &q_map, at.q_full(slot.stage()), p * 64, head, row + 64 * c);
        }
        for (int end = w.end; end > w.begin; end -= KEYS, tile.next()) {
            const int stage = tile.stage(), before = KEYS - end;  // so many rows of the tile are before key 0
            const uint32_t arrives = before > 0 ? at.v_come() : at.v_full(stage);
            if (leader) {
                barrier_wait(at.k_empty(stage), tile.parity() ^ 1);
                barrier_arrive_expect(at.k_full(stage), Shape::K);
                for (int p = 0; p < Shape::QK_PANELS; p++) bulk_load(at.k(stage) + p * Shape::PANEL, &k_map, at.k_full(stage), p * 64, g, key + end - KEYS);
                barrier_wait(at.v_empty(stage), tile.parity() ^ 1);
                barrier_arrive_expect(arrives, Shape::V);
                for (int p = 0; p < Shape::V_PANELS; p++) bulk_load(at.v(stage) + p * Shape::PANEL, &v_map, arrives, p * 64, g, key + end - KEYS);
            }
            if (before <= 0) continue;
            // These rows are another sequence's, or none's: their weights are 0, but 0 times NaN is NaN.
            __syncwarp();
            barrier_wait(arrives, come);
            come ^= 1;
            for (int i = threadIdx.x % 32; i < Shape::V_PANELS * before * 8; i += 32)
                asm volatile("st.shared.v4.b32 [%0], {%1,%1,%1,%1};" ::"r"(at.v(stage) + i / (before * 8) * Shape::PANEL + i % (before * 8) * 16), "r"(0)
                             : "memory");
            async_fence();
            __syncwarp();
            if (leader) barrier_arrive(at.v_full(stage));
        }
        slot.next();
        __syncwarp();
    }
    if (leader) {
        barrier_wait(at.q_empty(slot.stage()), slot.parity() ^ 1);
        at.works[slot.stage()].head = -1;
        barrier_arrive(at.q_full(slot.stage()));
        if (atomicAdd(&softmax_forward_queue[1], 1) == gridDim.x - 1) softmax_forward_queue[0] = softmax_forward_queue[1] = 0;  // the last one tidies up
    }
}

// ---- a warpgroup that computes ------------------------------------------------------------------------------------------------------------------------

// Lane q of each four has w[i], the q-th of four words in a row of column-tile i. It gets all four words of column-tile q.
__device__ __forceinline__ int4 transpose_quad(uint32_t (&w)[4]) {
    bool odd = threadIdx.x & 1, upper = threadIdx.x & 2;
    uint32_t x = __shfl_xor_sync(0xffffffff, odd ? w[0] : w[1], 1), y = __shfl_xor_sync(0xffffffff, odd ? w[2] : w[3], 1);
    if (odd)
        w[0] = x, w[2] = y;
    else
        w[1] = x, w[3] = y;
    x = __shfl_xor_sync(0xffffffff, upper ? w[0] : w[2], 2), y = __shfl_xor_sync(0xffffffff, upper ? w[1] : w[3], 2);
    return upper ? make_int4(x, y, w[2], w[3]) : make_int4(w[0], w[1], x, y);
}

// A thread has two rows, `row` and the one 8 below (half = 0, 1), and of each the columns that hopper.cuh says: s[4·i + 2·half + e] is of column
// 8·i + 2·(lane%4) + e.
template <class Shape>
struct Consumer6 {
    static constexpr int KEYS = Shape::KEYS, DV = Shape::DV;
    const SoftmaxAttention& a;
    const Layout6<Shape>& at;
    const float scale;  // log₂e in it
    const int group, lane, row;
    Ring<Shape::STAGES> tile;    // the tile at work: its weights are in p, and have yet to be multiplied with its values
    Ring<Shape::Q_STAGES> slot;  // of the item at work
    int first;                   // position of the warpgroup's first query
    float s[KEYS / 2], acc[DV / 2], l[2];
    float shift[2];  // of the scores, in powers of 2; NaN: the row has seen no key
    uint32_t p[KEYS / 16][4];

    __device__ Consumer6(const SoftmaxAttention& a, const Layout6<Shape>& at, float scale)
        : a(a), at(at), scale(scale), group(threadIdx.x / 128), lane(threadIdx.x % 32), row(threadIdx.x % 128 / 32 * 16 + lane / 4) {}

    __device__ __forceinline__ void arrive(uint32_t barrier) const {
        __syncwarp();  // all lanes have read
        if (lane == 0) barrier_arrive(barrier);
    }
    // All warpgroups have as many turns, one for each tile of an item, needed or not.
    __device__ __forceinline__ void my_turn() const { named_barrier(4 + group, 256); }
    __device__ __forceinline__ void next_turn() const { named_barrier_arrive(4 + (group + 1) % Shape::CONSUMERS, 256); }

    __device__ __forceinline__ void skip_tiles(int n) {
#pragma unroll 1
        for (; n > 0; n--, tile.next()) {
            my_turn();
            next_turn();
            barrier_wait(at.k_full(tile.stage()), tile.parity());
            arrive(at.k_empty(tile.stage()));
            barrier_wait(at.v_full(tile.stage()), tile.parity());
            arrive(at.v_empty(tile.stage()));
        }
    }

    __device__ __forceinline__ void multiply_qk(uint64_t q, int stage) {
        uint64_t k = panel_operand(at.k(stage));
        products_begin();
#pragma unroll
        for (int c = 0; c < Shape::DQK / 16; c++) product(s, q + c / 4 * (Shape::Q_PANEL / 16) + c % 4 * 2, k + c / 4 * (Shape::PANEL / 16) + c % 4 * 2, c > 0);
        products_commit();
    }
    __device__ __forceinline__ void multiply_pv(int stage) {
        uint64_t v = panel_operand_transposed(at.v(stage), Shape::PANEL);
        products_begin();
#pragma unroll
        for (int c = 0; c < KEYS / 16; c++) product<1>(acc, p[c], v + c * 128, true);
        products_commit();
    }
    __device__ __forceinline__ void products_read() {
        products_done(acc);
#pragma unroll
        for (int c = 0; c < KEYS / 16; c++)  // nobody writes p before this line
#pragma unroll
            for (int i = 0; i < 4; i++) asm volatile("" : "+r"(p[c][i])::"memory");
    }

    // Scores of keys that a row does not see become −inf; j0: the tile's first key.
    __device__ __forceinline__ void mask(int j0) {
        const int i0 = first - j0 + row, column = lane % 4 * 2;  // i0: position, counted from the tile's first key
        if (j0 + KEYS - 1 > first)
#pragma unroll
            for (int i = 0; i < KEYS / 2; i++)
                if (i / 4 * 8 + i % 2 > i0 + i / 2 % 2 * 8 - column) s[i] = -INFINITY;
        if (j0 < 0 || (a.window > 0 && j0 <= first + 63 - a.window)) {
            const int begin[2] = {max(-j0, a.window > 0 ? i0 - a.window + 1 : -j0) - column, max(-j0, a.window > 0 ? i0 - a.window + 9 : -j0) - column};
#pragma unroll
            for (int i = 0; i < KEYS / 2; i++)
                if (i / 4 * 8 + i % 2 < begin[i / 2 % 2]) s[i] = -INFINITY;
        }
    }

    // p = exp2(scale·s − shift), and the sums of the thread's own.
    __device__ __forceinline__ void weights(float (&sum)[2]) {
        float part[4] = {};
#pragma unroll
        for (int c = 0; c < KEYS / 16; c++)
#pragma unroll
            for (int i = 0; i < 4; i++) {
                float x[2];
#pragma unroll
                for (int e = 0; e < 2; e++) {
                    x[e] = exp2_fast(s[8 * c + 2 * i + e] * scale - shift[i % 2]);  // exactly 0 for −inf
                    part[i % 2 * 2 + e] += x[e];
                }
                p[c][i] = pack_bf16(x[0], x[1]);
            }
        sum[0] = part[0] + part[1];
        sum[1] = part[2] + part[3];
    }

    // The same with the largest score as the new shift, l and O being rescaled.
    __device__ __forceinline__ void new_shift() {
        bool nothing[2];
#pragma unroll
        for (int half = 0; half < 2; half++) {
            float m = s[2 * half];
#pragma unroll
            for (int i = 0; i < KEYS / 8; i++) m = fmaxf(m, fmaxf(s[4 * i + 2 * half], s[4 * i + 2 * half + 1]));
            m = fmaxf(m, __shfl_xor_sync(0xffffffff, m, 1));
            m = fmaxf(m, __shfl_xor_sync(0xffffffff, m, 2));
            m = fmaxf(m * scale, shift[half]);  // fmaxf ignores one NaN
            nothing[half] = m == -INFINITY;
            float rescale = isnan(shift[half]) ? 0 : exp2_fast(shift[half] - m);
            shift[half] = finite(m);
            l[half] *= rescale;
#pragma unroll
            for (int i = 0; i < DV / 4; i++) acc[i / 2 * 4 + 2 * half + i % 2] *= rescale;
        }
        float sum[2];
        weights(sum);
#pragma unroll
        for (int half = 0; half < 2; half++) {
            l[half] += sum[half];
            if (nothing[half]) shift[half] = NAN;
        }
    }
    __device__ __forceinline__ void softmax() {
        float sum[2];
        weights(sum);
        if (__all_sync(0xffffffff, sum[0] < 1e20f && sum[1] < 1e20f))  // false for NaN
            l[0] += sum[0], l[1] += sum[1];
        else
            new_shift();
    }

    __device__ __forceinline__ void clear() {
#pragma unroll
        for (int i = 0; i < DV / 2; i++) acc[i] = 0;
        l[0] = l[1] = 0;
        shift[0] = shift[1] = NAN;
    }

    // o = O/l and lse of the item, whose queries nobody needs any more.
    __device__ __forceinline__ void finish(floatX* o, int64_t o_stride, float* lse) {
        const Work& w = at.works[slot.stage()];
        const int head = w.head, n = w.n + 64 * group + row, skip = w.skip - 64 * group - row;
        arrive(at.q_empty(slot.stage()));
        floatX* out = o + n * o_stride + head * (int64_t)a.d_v + lane % 4 * 8;
#pragma unroll
        for (int half = 0; half < 2; half++) {
            float sum = l[half];
            sum += __shfl_xor_sync(0xffffffff, sum, 1);
            sum += __shfl_xor_sync(0xffffffff, sum, 2);
            if (lse && lane % 4 == 0 && 8 * half >= skip)
                lse[head * a.q_rows + n + 8 * half] = sum == 0 ? -INFINITY : (shift[half] + __log2f(sum)) * (1 / LOG2E);
            sum = sum == 0 ? 0 : __fdividef(1, sum);
#pragma unroll
            for (int c = 0; c < DV / 8; c += 4) {
                uint32_t x[4];
#pragma unroll
                for (int i = 0; i < 4; i++) x[i] = pack_bf16(acc[4 * (c + i) + 2 * half] * sum, acc[4 * (c + i) + 2 * half + 1] * sum);
                int4 chunk = transpose_quad(x);
                if (8 * half >= skip && (c + lane % 4) * 8 < a.d_v) *(int4*)(out + c * 8) = chunk;
            }
            out += 8 * o_stride;
        }
    }

    __device__ __forceinline__ void run(floatX* o, int64_t o_stride, float* lse) {
        if (group == Shape::CONSUMERS - 1) next_turn();
        for (;; slot.next()) {
            barrier_wait(at.q_full(slot.stage()), slot.parity());
            const Work& w = at.works[slot.stage()];
            if (w.head < 0) break;
            // Tile t has the keys from end - (t+1)·KEYS on. This warpgroup needs those from t0 to t1.
            first = w.first + 64 * group;
            const int end = w.end, tiles = end > w.begin ? (end - w.begin + KEYS - 1) / KEYS : 0;
            const int t0 = w.skip - 64 * group < 64 ? min(max(0, end - first - 64) / KEYS, tiles) : tiles;
            const int t1 = max(t0, a.window > 0 ? min(tiles, (end - max(0, first - a.window + 1) + KEYS - 1) / KEYS) : tiles), rest = tiles - t1;
            clear();
            skip_tiles(t0);
            if (t0 < t1) {
                const uint64_t q = panel_operand(at.q(slot.stage(), group));
                int j0 = end - (t0 + 1) * KEYS;
                barrier_wait(at.k_full(tile.stage()), tile.parity());
                my_turn();
                multiply_qk(q, tile.stage());
                next_turn();
                products_wait<0>();
                products_done(s);
                arrive(at.k_empty(tile.stage()));
                mask(j0);
                new_shift();
                for (const int last = end - t1 * KEYS; j0 > last;) {
                    j0 -= KEYS;
                    const Ring<Shape::STAGES> next = tile.after();
                    barrier_wait(at.k_full(next.stage()), next.parity());
                    my_turn();
                    multiply_qk(q, next.stage());
                    barrier_wait(at.v_full(tile.stage()), tile.parity());
                    multiply_pv(tile.stage());
                    next_turn();
                    products_wait<0>();
                    products_done(s);
                    products_read();
                    arrive(at.k_empty(next.stage()));
                    arrive(at.v_empty(tile.stage()));
                    mask(j0);
                    softmax();
                    tile = next;
                }
                barrier_wait(at.v_full(tile.stage()), tile.parity());
                multiply_pv(tile.stage());
                products_wait<0>();
                products_read();
                arrive(at.v_empty(tile.stage()));
                tile.next();
            }
            skip_tiles(rest);
            finish(o, o_stride, lse);
        }
    }
};

template <class Shape>
__global__ void __launch_bounds__(Shape::THREADS, 1)
    softmax_forward_kernel6(const __grid_constant__ SoftmaxAttention a, const __grid_constant__ CUtensorMap q_map, const __grid_constant__ CUtensorMap k_map,
                            const __grid_constant__ CUtensorMap v_map, floatX* o, int64_t o_stride, float* lse, float scale, Schedule schedule) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
    extern __shared__ char softmax_forward_panels[];
    __shared__ uint64_t barriers[Shape::BARRIERS];
    __shared__ Work works[Shape::Q_STAGES];
    const Layout6<Shape> at = {(shared_address(softmax_forward_panels) + 1023) / 1024 * 1024, shared_address(barriers), works};
    if (threadIdx.x == 0) at.init_barriers();
    __syncthreads();
    if (threadIdx.x / 128 == Shape::CONSUMERS) {
        fewer_registers<Shape::PRODUCER_REGISTERS>();
        if (threadIdx.x % 128 < 32) produce(a, q_map, k_map, v_map, schedule, at);
    } else {
        more_registers<Shape::CONSUMER_REGISTERS>();
        Consumer6<Shape>(a, at, scale).run(o, o_stride, lse);
    }
#endif
}

template <class Shape>
inline void launch6(cudaStream_t stream, const SoftmaxAttention& a, floatX* o, int64_t o_stride, float* lse) {
    int items = grid_blocks(a, Shape::ROWS);
    if (items == 0) return;
    auto map = [](const floatX* data, int d, int heads, int64_t head, int64_t rows, int64_t stride, int box) {
        return tensor_map<3>(data, {d, heads, rows}, {heads > 1 ? head : stride, stride}, {64, 1, box});
    };
    // How many rows of k and v there are is not known here, nor asked: no tile reaches behind its sequence's end.
    CUtensorMap q = map(a.q, a.d_qk, a.heads, a.d_qk, a.q_rows, a.q_stride, 64);
    CUtensorMap k = map(a.k, a.d_qk, a.kv_heads, a.k_head, INT_MAX, a.k_stride, Shape::KEYS);
    CUtensorMap v = map(a.v, a.d_v, a.kv_heads, a.v_head, INT_MAX, a.v_stride, Shape::KEYS);
    const cudaDeviceProp& device = device_properties();
    int64_t pair_bytes = std::max<int64_t>(1, (int64_t)a.max_k * (a.d_qk + a.d_v) * (int64_t)sizeof(floatX) * a.kv_heads / a.heads);
    int64_t group = std::clamp<int64_t>(device.l2CacheSize / 2 / pair_bytes, 1, (int64_t)a.num_seqs * a.heads);
    Schedule schedule = {items, equal_tiles(a, Shape::ROWS), (int)group};
    allow_shared_memory(softmax_forward_kernel6<Shape>, Shape::BYTES);
    softmax_forward_kernel6<Shape>
        <<<std::min(items, device.multiProcessorCount), Shape::THREADS, Shape::BYTES, stream>>>(a, q, k, v, o, o_stride, lse, a.scale * LOG2E, schedule);
    LAUNCH_CHECK();
}

// Of what takes_tensor_cores(). Of shorter sequences too much of each item would be idle.
inline bool takes_hopper(const SoftmaxAttention& a) { return a.dropout.p == 0 && a.max_k > 96 && hopper_code(); }

// Where a sequence is only a few items long, it counts how well they fit it: two warpgroups if its queries fill their items and three would do no better.
inline bool two_warpgroups(const SoftmaxAttention& a) {
    return a.max_k <= 512 && a.max_q % 128 == 0 && 2 * ceil_div(a.max_q, 128) <= 3 * ceil_div(a.max_q, 192);
}

// Widths smaller than the kernel's are filled with zeros in shared memory.
inline void forward6(cudaStream_t stream, const SoftmaxAttention& a, floatX* o, int64_t o_stride, float* lse, bool choose = true) {
    const bool two = choose && two_warpgroups(a);
    if (a.d_qk <= 64 && a.d_v <= 64 && two)
        launch6<Shape6<64, 64, 2, 4, 4>>(stream, a, o, o_stride, lse);
    else if (a.d_qk <= 64 && a.d_v <= 64)
        launch6<Shape6<64, 64, 3, 4, 2>>(stream, a, o, o_stride, lse);
    else if (a.d_qk <= 96 && a.d_v <= 64 && two)
        launch6<Shape6<96, 64, 2, 2, 3>>(stream, a, o, o_stride, lse);
    else if (a.d_qk <= 96 && a.d_v <= 64)
        launch6<Shape6<96, 64, 3, 2, 2>>(stream, a, o, o_stride, lse);
    else if (a.d_qk <= 128)
        launch6<Shape6<128, 128, 2, 2, 2>>(stream, a, o, o_stride, lse);
    else
        launch6<Shape6<192, 128, 2, 2, 1>>(stream, a, o, o_stride, lse);
}

}  // namespace softmax_fwd

}  // namespace gpu

#endif
