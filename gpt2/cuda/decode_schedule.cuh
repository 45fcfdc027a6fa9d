// Who works on which keys when few queries meet many keys: decode.cuh, decode_hopper.cuh.
//
// What must be computed is a number of lists: one for each sequence, tile of rows (queries × heads of their group) and group of kv heads. A list is the tiles
// of keys that its rows see, tens of them or thousands; the sequences' lengths stand on the device alone, and change from step to step under a captured graph.
// So the grid is fixed, about as many blocks as the GPU runs at a time, and the tiles of all lists, numbered one list behind another, are dealt out evenly
// (stream-K; FlashInfer, arXiv 2501.01005): of U tiles block b of n takes
//
//     ⌊b·U/n⌋ ... ⌊(b+1)·U/n⌋−1        n = min(blocks, ⌊U/least⌋) or 1: no block gets less than `least` tiles, short contexts are not cut into crumbs
//
// whatever they belong to: the end of one list, some whole lists, the beginning of another. A whole list's result goes straight to where it is wanted. The
// pieces of any other leave what they have, not yet divided, as float32 in scratch memory,
//
//     m = max_j s_j·log₂e      l = Σ_j 2^(s_j·log₂e − m)      o = Σ_j 2^(s_j·log₂e − m)·v_j
//
// and when all have come they are merged, in the order of the keys:
//
//     M = max m      o = Σ 2^(m−M)·o / Σ 2^(m−M)·l      lse = (M + log₂ Σ 2^(m−M)·l)·ln 2
//
// A block has at most two such pieces: one of a list that began before it (slot 2·b), one of a list that begins in it and goes on behind it (slot 2·b+1). So
// the pieces of a list that begins in block f and ends in block e are the slots 2·f+1, 2·(f+1), 2·(f+2) ... 2·e; how many have come is counted in ticket f.
// Everything follows from the lengths: the same call gives the same bits.
//
// Where a list's rows are many, several blocks read the same keys. They should do so at the same time, so that memory is asked once and the cache thereafter:
// then the grid consists of `lanes` grids side by side, block x being block x / lanes of grid x % lanes; grid i has every lanes-th tile of rows, from the i-th.
//
// How a kernel uses it: see Walk, leave_piece and merge below.
#pragma once

#include <algorithm>
#include <climits>

#include "softmax.cuh"

namespace gpu {

namespace decode {

// Made by the host; an argument of the kernel.
struct Schedule {
    int q0, queries;          // this launch: queries q0 ... q0+queries−1 of each sequence
    int group;                // query heads that share a kv head
    int rows;                 // rows of a kv head in one item. Row r of a kv head: query q0 + r/group, its head r%group of the group
    int kv_heads, kv_groups;  // kv heads of an item; groups of them
    int tile, least;          // keys of a tile; tiles of a block at least
    int lanes;                // grids side by side
    int d_v, record;          // record: numbers of a slot
    bool share;               // all blocks of a list merge it together
    float* partial;           // (2·blocks, record)

    // A slot: o (kv_heads·rows, ⌈d_v/4⌉·4), m (kv_heads·rows), l (kv_heads·rows). `row` counts through the kv heads: kv·rows + r.
    HOST_DEVICE int item_rows() const { return kv_heads * rows; }
    HOST_DEVICE int columns() const { return (d_v + 3) / 4 * 4; }
    HOST_DEVICE float* slot_o(int slot, int row) const { return partial + (int64_t)slot * record + row * columns(); }
    HOST_DEVICE float* slot_m(int slot) const { return partial + (int64_t)slot * record + item_rows() * columns(); }
    HOST_DEVICE float* slot_l(int slot) const { return slot_m(slot) + item_rows(); }
};

// What there is to do for one sequence.
struct SequenceWork {
    int rows, row_tiles;    // rows of each kv head; tiles of them that are this block's lane's
    int begin, end;         // the keys that some row sees
    int first_tile, tiles;  // in tiles: multiples of `tile` are borders. One if there is no key, since results must be written
    __device__ int lists(const Schedule& p) const { return p.kv_groups * row_tiles; }
    __device__ int units(const Schedule& p) const { return lists(p) * tiles; }
};

__device__ inline SequenceWork sequence_work(const SoftmaxAttention& a, const Schedule& p, int s) {
    SequenceWork w;
    int first = a.position(s, p.q0), queries = max(0, min(p.queries, a.q_len(s) - p.q0));
    w.rows = queries * p.group;
    w.row_tiles = ((w.rows + p.rows - 1) / p.rows - (int)blockIdx.x % p.lanes + p.lanes - 1) / p.lanes;
    w.begin = a.window > 0 ? max(0, first - a.window + 1) : 0;
    w.end = max(w.begin, min(first + queries, a.k_len(s)));
    w.first_tile = w.begin / p.tile;
    w.tiles = max(1, (w.end + p.tile - 1) / p.tile - w.first_tile);
    return w;
}

// A piece of a list.
struct Item {
    int seq;
    int kv0;              // its first kv head, of Schedule::kv_heads
    int first_row, rows;  // rows first_row ... first_row+rows−1 of each of these kv heads
    int begin, end;       // keys; none at all if the rows see none
    bool whole;           // the whole list
    int slot;             // else: where the result goes,
    int from, pieces;     // the list's first block, and how many blocks have a piece of it
};

constexpr int MAX_BLOCKS = 4096;  // of a launch
// Of the list that begins in block b: how many pieces have come, and then, how many blocks have seen that. Zero between launches. Launches of one stream only.
static __device__ int decode_tickets[MAX_BLOCKS];

__device__ inline void prefetch(const void* p) { asm volatile("prefetch.global.L2 [%0];" ::"l"(p)); }

struct WalkShared {
    int sums[32], seq, before, total;
};

// A block's items, one behind another:
//     __shared__ WalkShared shared;  Walk walk(a, p, shared);      all threads of the block, which is one-dimensional and of whole warps
//     for (Item x; walk.next(x);) ...                              any threads that like to: no barrier is in it. All get the same
struct Walk {
    const SoftmaxAttention& a;
    const Schedule& p;
    int total, blocks;  // tiles in all, and blocks that have some
    int at, end;        // tiles left to this block
    int seq, before;    // where `at` stands, and the tiles of the sequences before
    SequenceWork work;

    // Tiles are counted by all threads, each for some neighbouring sequences. What is read behind them is asked for meanwhile.
    __device__ Walk(const SoftmaxAttention& a, const Schedule& p, WalkShared& shared) : a(a), p(p) {
        if ((int64_t)threadIdx.x * 128 < a.num_seqs * (int64_t)sizeof(AttentionState)) prefetch((const char*)a.states + threadIdx.x * 128);
        if (threadIdx.x == 0) prefetch(&decode_tickets[blockIdx.x]);
        if (a.num_seqs == 1) {
            seq = before = 0;
            work = sequence_work(a, p, 0);
            share_out(work.units(p));
            return;
        }
        int lane = threadIdx.x % 32, warp = threadIdx.x / 32, each = (a.num_seqs + (int)blockDim.x - 1) / (int)blockDim.x;
        int first = min((int)threadIdx.x * each, a.num_seqs), last = min(first + each, a.num_seqs), mine = 0;
        for (int s = first; s < last; s++) mine += sequence_work(a, p, s).units(p);
        int sum = mine;  // of the warp's lanes up to this
#pragma unroll
        for (int step = 1; step < 32; step *= 2) {
            int other = __shfl_up_sync(0xffffffff, sum, step);
            if (lane >= step) sum += other;
        }
        if (lane == 31) shared.sums[warp] = sum;
        __syncthreads();
        int all = 0;
        for (int w = 0; w < (int)blockDim.x / 32; w++) {
            if (w == warp) sum += all;
            all += shared.sums[w];
        }
        share_out(all);
        int tiles_before = sum - mine;
        if (at < end && tiles_before <= at && at < sum) {  // one thread's
            int s = first;
            for (int n; at >= tiles_before + (n = sequence_work(a, p, s).units(p)); s++) tiles_before += n;
            shared.seq = s;
            shared.before = tiles_before;
        }
        __syncthreads();
        if (at < end) {
            seq = shared.seq;
            before = shared.before;
            work = sequence_work(a, p, seq);
        }
    }

    __device__ void share_out(int all) {
        total = all;
        blocks = min((int)gridDim.x / p.lanes, max(1, all / p.least));
        int block = blockIdx.x / p.lanes;
        bool has = block < blocks && all > 0;
        at = has ? (int)((int64_t)block * total / blocks) : 0;
        end = has ? (int)((int64_t)(block + 1) * total / blocks) : 0;
    }
    // The largest b with ⌊b·U/n⌋ <= unit.
    __device__ int block_of(int unit) const { return (int)((((int64_t)unit + 1) * blocks - 1) / total); }

    __device__ bool next(Item& x) {
        if (at >= end) return false;
        for (int n; at >= before + (n = work.units(p));) {
            before += n;
            work = sequence_work(a, p, ++seq);
        }
        int list = (at - before) / work.tiles, t0 = (at - before) % work.tiles, t1 = min(work.tiles, t0 + end - at);
        x.seq = seq;
        x.kv0 = list % p.kv_groups * p.kv_heads;
        x.first_row = (list / p.kv_groups * p.lanes + (int)blockIdx.x % p.lanes) * p.rows;
        x.rows = min(p.rows, work.rows - x.first_row);
        x.begin = max(work.begin, (work.first_tile + t0) * p.tile);
        x.end = max(x.begin, min(work.end, (work.first_tile + t1) * p.tile));
        x.whole = t0 == 0 && t1 == work.tiles;
        x.slot = 2 * (int)blockIdx.x + (t0 == 0);
        int from = x.whole ? 0 : block_of(at - t0), to = x.whole ? 0 : block_of(at - t0 + work.tiles - 1);
        x.from = from * p.lanes + blockIdx.x % p.lanes;
        x.pieces = to - from + 1;
        at += t1 - t0;
        return true;
    }
};

// ---- the pieces of a list meet ----------------------------------------------------------------------------------------------------------------------------
//
// Where there is little to merge, the block whose piece comes last does it. Where there is much (Schedule::share), all that have left pieces do: when a block
// has no other work left it waits for the others and merges its share. Since tiles are dealt out evenly nobody waits long; but all blocks of a launch must run
// at the same time, or a waiting one could keep one from starting that it waits for: no grid is larger than that (resident_blocks).

// Called by a team of threads (a whole block, or the part of it that computes) when they have written what they have of an item into its slot, all of them.
// sync() is their barrier. Thread 0 learns whether theirs was the last piece.
template <class Sync>
__device__ inline bool leave_piece(const Item& x, int thread, Sync sync) {
    __threadfence();
    sync();
    return thread == 0 && atomicAdd(&decode_tickets[x.from], 1) == x.pieces - 1;
}

// Some pieces of one row's columns 4·i ... 4·i+3.
struct Merged {
    float m = -INFINITY, l = 0;
    float4 o = {0, 0, 0, 0};
    __device__ void add(float other_m, float other_l, float4 x) {
        if (!(other_l > 0)) return;  // saw no key; x may be anything then
        float top = fmaxf(m, other_m), f = exp2f(m - top), w = exp2f(other_m - top);
        m = top;
        l = f * l + w * other_l;
        o.x = f * o.x + w * x.x;
        o.y = f * o.y + w * x.y;
        o.z = f * o.z + w * x.z;
        o.w = f * o.w + w * x.w;
    }
};

// Numbers of shared memory that merge takes.
HOST_DEVICE inline int merge_numbers(int threads) { return 8 * threads; }

// Merges the pieces of x's list, all of it (share false; they must all be there) or this block's share (whose pieces it waits for), and gives the ticket back:
// write(row, column, o[4], lse) for rows numbered as in Schedule::slot_o and columns that are multiples of 4; lse is asked for with column 0. For the same team
// behind its last item. shared: merge_numbers() of them, aligned to 16 bytes, free to be used.
template <class Sync, class Write>
__device__ inline void merge(const Schedule& p, const Item& x, bool share, int thread, int threads, float* shared, Sync sync, Write write) {
    if (thread == 0) {
        int* ticket = &decode_tickets[x.from];
        if (share) {
            while (*(volatile int*)ticket < x.pieces) {
            }
        }
        __threadfence();
        if (!share || atomicAdd(ticket, 1) == 2 * x.pieces - 1) *ticket = 0;  // all have come, and all that had to have seen it
    }
    sync();

    // The rows that there are, kv head by kv head, in groups of 4 columns. Of few groups the pieces are shared out too: thread (group, part) adds every
    // parts-th.
    const int per_row = p.columns() / 4, quads = p.kv_heads * x.rows * per_row, mine = ((int)blockIdx.x - x.from) / p.lanes;
    const int first = share ? (int)((int64_t)mine * quads / x.pieces) : 0, last = share ? (int)((int64_t)(mine + 1) * quads / x.pieces) : quads;
    const int width = max(1, min(last - first, threads)), parts = threads / width, part = thread / width;
    for (int q0 = first; q0 < last; q0 += width) {
        const int quad = q0 + thread % width, row = quad / per_row, column = quad % per_row * 4, at = row / x.rows * p.rows + row % x.rows;
        const bool has = quad < last && part < parts;
        Merged sum;
        for (int k0 = part; has && k0 < x.pieces; k0 += 4 * parts) {
            float m[4], l[4];
            float4 o[4];
#pragma unroll
            for (int i = 0; i < 4; i++) {  // all on their way together
                int k = min(k0 + i * parts, x.pieces - 1), slot = k == 0 ? 2 * x.from + 1 : 2 * (x.from + k * p.lanes);
                m[i] = __ldcg(p.slot_m(slot) + at);
                l[i] = k0 + i * parts < x.pieces ? __ldcg(p.slot_l(slot) + at) : 0;
                o[i] = __ldcg((const float4*)(p.slot_o(slot, at) + column));
            }
#pragma unroll
            for (int i = 0; i < 4; i++) sum.add(m[i], l[i], o[i]);
        }
        if (parts > 1) {
            float4* sums = (float4*)shared;
            sums[2 * thread] = sum.o;
            sums[2 * thread + 1] = {sum.m, sum.l, 0, 0};
            sync();
            if (has && part == 0)
                for (int i = 1; i < parts; i++) {
                    float4 other = sums[2 * (i * width + thread) + 1];
                    sum.add(other.x, other.y, sums[2 * (i * width + thread)]);
                }
        }
        if (has && part == 0) {
            float factor = sum.l > 0 ? 1 / sum.l : 0, o[4] = {sum.o.x * factor, sum.o.y * factor, sum.o.z * factor, sum.o.w * factor};
            write(at, column, o, sum.l > 0 ? (sum.m + log2f(sum.l)) * 0.69314718f : -INFINITY);
        }
    }
    sync();
}

// ---- the host's side --------------------------------------------------------------------------------------------------------------------------------------

inline int schedule_record(int item_rows, int d_v) { return (int)round_up(item_rows * (round_up(d_v, 4) + 2), 32); }

// Bytes that make_schedule() takes from scratch memory for so many blocks.
inline int64_t schedule_scratch(int blocks, int item_rows, int d_v) {
    return scratch_bytes({2 * (int64_t)blocks * schedule_record(item_rows, d_v) * (int64_t)sizeof(float)});
}

// Queries q0 ... q0+queries−1 of each sequence, `rows` rows of each of `kv_heads` (a divisor of a.kv_heads) kv heads to an item, on at most `blocks` blocks;
// *grid: how many to launch, fewer if there cannot be work for all.
inline Schedule make_schedule(const SoftmaxAttention& a, int q0, int queries, int rows, int kv_heads, int tile, int least, int blocks, Scratch scratch,
                              int* grid, int lanes = 1) {
    assert(a.kv_heads % kv_heads == 0);
    Schedule p{};
    p.q0 = q0;
    p.queries = queries;
    p.group = a.heads / a.kv_heads;
    p.rows = rows;
    p.kv_heads = kv_heads;
    p.kv_groups = a.kv_heads / kv_heads;
    p.tile = tile;
    p.least = least;
    p.lanes = lanes;
    p.d_v = a.d_v;
    p.record = schedule_record(kv_heads * rows, a.d_v);
    int64_t keys = a.window > 0 ? std::min<int64_t>(a.max_k, (int64_t)a.window + queries - 1) : a.max_k;
    int64_t units = a.num_seqs * p.kv_groups * ceil_div(ceil_div((int64_t)queries * p.group, rows), lanes) * (ceil_div(keys, tile) + 1);  // of a lane
    assert(units <= INT_MAX);
    *grid = lanes * (int)std::min<int64_t>({(int64_t)std::max(1, blocks / lanes), MAX_BLOCKS / lanes, std::max<int64_t>(1, units / least)});
    p.partial = scratch.take<float>(2 * (int64_t)*grid * p.record);
    // A block reads some 64 bytes in a clock: so many must not be left to one.
    int64_t lists = std::max<int64_t>(1, units / (ceil_div(keys, tile) + 1)), pieces = ceil_div(*grid / lanes, lists) + 1;
    p.share = pieces * p.record * (int64_t)sizeof(float) > 32 << 10;
    return p;
}

}  // namespace decode

}  // namespace gpu
