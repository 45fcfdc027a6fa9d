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
#include "tensor_cores.cuh"

namespace gpu {

namespace decode {

// n / by for 0 <= n < 2³¹ in three instructions. A block of a short kernel runs most of its instructions once, and waits for each to come from the cache, some
// 5 clocks: a division, some 20 of them, takes 100.
struct Divisor {
    int by, shift;
    uint32_t factor;
    __device__ int operator()(int n) const { return (int)((uint64_t)(uint32_t)n * factor >> shift); }
};
inline Divisor divisor(int by) {
    int bits = 0;
    while ((int64_t)1 << bits < by) bits++;
    return {by, 31 + bits, (uint32_t)(((uint64_t)1 << (31 + bits)) / by + 1)};
}

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
    Divisor by_group, by_rows, by_kv_groups, by_tile, by_least, by_lanes, by_quads, by_page;  // by_quads: by columns()/4; by_page: by page_size if it is known

    // A slot: o (kv_heads·rows, ⌈d_v/4⌉·4), m (kv_heads·rows), l (kv_heads·rows). `row` counts through the kv heads: kv·rows + r.
    HOST_DEVICE int item_rows() const { return kv_heads * rows; }
    __device__ int lane() const { return blockIdx.x - by_lanes(blockIdx.x) * lanes; }
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
    const int q_len = a.q_len(s), k_len = a.k_len(s), first = p.q0 + (a.q_at ? a.q_at[s] : k_len - q_len), queries = max(0, min(p.queries, q_len - p.q0));
    w.rows = queries * p.group;
    w.row_tiles = p.by_lanes(p.by_rows(w.rows + p.rows - 1) + p.lanes - 1 - p.lane());
    w.begin = a.window > 0 ? max(0, first - a.window + 1) : 0;
    w.end = max(w.begin, min(first + queries, k_len));
    w.first_tile = p.by_tile(w.begin);
    w.tiles = max(1, p.by_tile(w.end + p.tile - 1) - w.first_tile);
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

// What a walk begins with; before all else in a kernel.
__device__ inline void ask_for_work(const SoftmaxAttention& a) {
    const int at = threadIdx.x * 128;
    if (at < (a.num_seqs + 1) * (int)sizeof(int)) {
        prefetch((const char*)a.cu_k + at);
        prefetch((const char*)a.cu_q + at);
    }
    if (at < a.num_seqs * (int64_t)sizeof(AttentionState)) prefetch((const char*)a.states + at);
    if (threadIdx.x == 0) prefetch(&decode_tickets[blockIdx.x]);
}

struct WalkShared {
    int sums[32], seq, before;
    SequenceWork work;
};

// A block's items, one behind another:
//     ask_for_work(a);  __shared__ WalkShared shared;  Walk walk(a, p, shared);      all threads of the block, which is one-dimensional and of whole warps
//     for (Item x; walk.next(x);) ...                              any threads that like to: no barrier is in it. All get the same
struct Walk {
    const SoftmaxAttention& a;
    const Schedule& p;
    int total, blocks, quotient, remainder;  // tiles in all, and blocks that have some; the one divided by the other
    int at, end;                             // tiles left to this block
    int seq, before;                         // where `at` stands, and the tiles of the sequences before
    SequenceWork work;

    // Tiles are counted by all threads, each for some neighbouring sequences. What is read behind them is asked for meanwhile.
    __device__ Walk(const SoftmaxAttention& a, const Schedule& p, WalkShared& shared) : a(a), p(p) {
        if (a.num_seqs == 1) {
            seq = before = 0;
            work = sequence_work(a, p, 0);
            share_out(work.units(p));
            return;
        }
        int each = 1;
        while (each * (int)blockDim.x < a.num_seqs) each++;
        const int first = min((int)threadIdx.x * each, a.num_seqs), last = min(first + each, a.num_seqs);
        int tiles = 0;
        SequenceWork w;
#pragma unroll 1
        for (int pass = 0; pass < 2; pass++) {
            // First counted, then, when it is known where this block begins, looked for that place.
#pragma unroll 1
            for (int s = first; s < last; s++) {
                if (pass == 0 || each > 1) w = sequence_work(a, p, s);
                const int n = w.units(p);
                if (pass == 0) {
                    if (w.begin < w.end) prefetch(a.states[s].page_table + (a.window > 0 ? w.begin / a.states[s].page_size : 0));
                } else if (tiles <= at && at < tiles + n) {  // one thread's
                    shared.seq = s;
                    shared.before = tiles;
                    shared.work = w;
                }
                tiles += n;
            }
            if (pass == 0) {
                const int mine = tiles, lane = threadIdx.x % 32, warp = threadIdx.x / 32;
#pragma unroll
                for (int step = 1; step < 32; step *= 2) {
                    int other = __shfl_up_sync(0xffffffff, tiles, step);
                    if (lane >= step) tiles += other;
                }
                if (lane == 31) shared.sums[warp] = tiles;
                __syncthreads();
                const int of_warp = lane < (int)blockDim.x / 32 ? shared.sums[lane] : 0;
                tiles += __reduce_add_sync(0xffffffff, lane < warp ? of_warp : 0) - mine;
                share_out(__reduce_add_sync(0xffffffff, of_warp));
            }
        }
        __syncthreads();
        if (at < end) {
            seq = shared.seq;
            before = shared.before;
            work = shared.work;
        }
    }

    __device__ void share_out(int all) {
        total = all;
        blocks = min(p.by_lanes(gridDim.x), max(1, p.by_least(all)));
        quotient = (unsigned)total / (unsigned)blocks;
        remainder = total - quotient * blocks;
        const int block = p.by_lanes(blockIdx.x);
        const bool has = block < blocks && all > 0;
        at = has ? cut(block) : 0;
        end = has ? cut(block + 1) : 0;
    }
    // ⌊b·U/n⌋
    __device__ int cut(int b) const { return b * quotient + (unsigned)(b * remainder) / (unsigned)blocks; }
    // The largest b with ⌊b·U/n⌋ <= unit.
    __device__ int block_of(int unit) const { return (int)((((int64_t)unit + 1) * blocks - 1) / total); }

    __device__ bool next(Item& x) {
        if (at >= end) return false;
        for (int n; at >= before + (n = work.units(p));) {
            before += n;
            work = sequence_work(a, p, ++seq);
        }
        int list = 0, t0 = at - before;
        if (t0 >= work.tiles) {
            list = t0 / work.tiles;
            t0 -= list * work.tiles;
        }
        const int t1 = min(work.tiles, t0 + end - at), row_tile = p.by_kv_groups(list), block = p.by_lanes(blockIdx.x);
        x.seq = seq;
        x.kv0 = (list - row_tile * p.kv_groups) * p.kv_heads;
        x.first_row = (row_tile * p.lanes + p.lane()) * p.rows;
        x.rows = min(p.rows, work.rows - x.first_row);
        x.begin = max(work.begin, (work.first_tile + t0) * p.tile);
        x.end = max(x.begin, min(work.end, (work.first_tile + t1) * p.tile));
        x.whole = t0 == 0 && t1 == work.tiles;
        x.slot = 2 * (int)blockIdx.x + (t0 == 0);
        int from = block, to = block;
        if (t0 > 0) from = block_of(at - t0);
        if (t1 < work.tiles) to = block_of(at - t0 + work.tiles - 1);
        x.from = from * p.lanes + p.lane();
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
    sync();  // then one speaks for all
    if (thread != 0) return false;
    int before;
    asm volatile("atom.acq_rel.gpu.global.add.s32 %0, [%1], 1;" : "=r"(before) : "l"(&decode_tickets[x.from]) : "memory");
    return before == x.pieces - 1;
}

// Some pieces of one row's columns 4·i ... 4·i+3.
struct Merged {
    float m = -INFINITY, l = 0;
    float4 o = {0, 0, 0, 0};
    // Those of N more. The largest m first: then nothing waits for the one before. Of a piece that saw no key (l = 0) m and o may be anything.
    template <int N>
    __device__ void add(const float (&other_m)[N], const float (&other_l)[N], const float4 (&x)[N]) {
        float top = m;
#pragma unroll
        for (int i = 0; i < N; i++)
            if (other_l[i] > 0) top = fmaxf(top, other_m[i]);
        if (top == -INFINITY) return;
        float f = exp2_fast(m - top);
        m = top;
        l *= f;
        o = {f * o.x, f * o.y, f * o.z, f * o.w};
#pragma unroll
        for (int i = 0; i < N; i++) {
            if (!(other_l[i] > 0)) continue;
            float w = exp2_fast(other_m[i] - top);
            l += w * other_l[i];
            o.x += w * x[i].x;
            o.y += w * x[i].y;
            o.z += w * x[i].z;
            o.w += w * x[i].w;
        }
    }
};

// Numbers of shared memory that merge takes.
HOST_DEVICE inline int merge_numbers(int threads) { return 8 * threads; }

// Part of merge(), which says what is what. QUADS groups of 4 columns and PIECES pieces of each are on their way together.
template <int QUADS, int PIECES, class Sync, class Write>
__device__ __forceinline__ void merge_quads(const Schedule& p, const Item& x, int first, int last, int width, int parts, int part, int thread, float* shared,
                                            Sync sync, Write write) {
#pragma unroll 1
    for (int q0 = first; q0 < last; q0 += width * QUADS) {
        const int own = q0 + thread - part * width;
        const bool has = part < parts && own < last;
        Merged sum[QUADS];
        int row[QUADS];
#pragma unroll
        for (int j = 0; j < QUADS; j++) row[j] = p.by_quads(min(own + j * width, last - 1));
#pragma unroll 1
        for (int k0 = part; has && k0 < x.pieces; k0 += PIECES * parts) {
            float m[QUADS][PIECES], l[QUADS][PIECES];
            float4 o[QUADS][PIECES];
#pragma unroll
            for (int i = 0; i < PIECES; i++) {
                const int k = min(k0 + i * parts, x.pieces - 1), slot = k == 0 ? 2 * x.from + 1 : 2 * (x.from + k * p.lanes);
                const float *slot_o = p.slot_o(slot, 0), *slot_m = p.slot_m(slot);
#pragma unroll
                for (int j = 0; j < QUADS; j++) {
                    m[j][i] = __ldcg(slot_m + row[j]);
                    l[j][i] = __ldcg(slot_m + p.item_rows() + row[j]);
                    o[j][i] = __ldcg((const float4*)slot_o + min(own + j * width, last - 1));
                    if (k0 + i * parts >= x.pieces) l[j][i] = 0;
                }
            }
#pragma unroll
            for (int j = 0; j < QUADS; j++) sum[j].add(m[j], l[j], o[j]);
        }
        if (QUADS == 1 && parts > 1) {
            float4* sums = (float4*)shared;
            sums[2 * thread] = sum[0].o;
            sums[2 * thread + 1] = {sum[0].m, sum[0].l, 0, 0};
            sync();
#pragma unroll 1
            for (int i = 1; has && part == 0 && i < parts; i += 4) {
                float m[4], l[4];
                float4 o[4];
#pragma unroll
                for (int j = 0; j < 4; j++) {
                    const int at = 2 * (min(i + j, parts - 1) * width + thread);
                    o[j] = sums[at];
                    m[j] = sums[at + 1].x;
                    l[j] = i + j < parts ? sums[at + 1].y : 0;
                }
                sum[0].add(m, l, o);
            }
        }
#pragma unroll
        for (int j = 0; j < QUADS; j++) {
            const int quad = own + j * width;
            if (!has || part != 0 || quad >= last || row[j] - p.by_rows(row[j]) * p.rows >= x.rows) continue;
            const float l = sum[j].l, factor = l > 0 ? __fdividef(1, l) : 0;
            const float o[4] = {sum[j].o.x * factor, sum[j].o.y * factor, sum[j].o.z * factor, sum[j].o.w * factor};
            write(row[j], (quad - row[j] * p.by_quads.by) * 4, o, sum[j].m, l);
        }
    }
}
// From a row's m and l.
__device__ inline float lse_of(float m, float l) { return l > 0 ? (m + log2f(l)) * 0.69314718f : -INFINITY; }

// Merges the pieces of x's list, all of it (share false; they must all be there) or this block's share (whose pieces it waits for), and gives the ticket back:
// write(row, column, o[4], m, l) for rows numbered as in Schedule::slot_o and columns that are multiples of 4. For the same team behind its last item. shared:
// merge_numbers() of them, aligned to 16 bytes, free to be used.
template <int QUADS, class Sync, class Write>
__device__ inline void merge(const Schedule& p, const Item& x, bool share, int thread, int threads, float* shared, Sync sync, Write write) {
    // All rows, kv head by kv head, in groups of 4 columns. Of few groups the pieces are shared out too: thread (group, part) adds every parts-th.
    const int quads = (p.kv_heads == 1 ? x.rows : p.item_rows()) * p.by_quads.by;
    int first = 0, last = quads, width = threads, parts = 1, part = 0;
    if (share) {
        const int mine = p.by_lanes((int)blockIdx.x - x.from);
        first = (unsigned)(mine * quads) / (unsigned)x.pieces;
        last = (unsigned)((mine + 1) * quads) / (unsigned)x.pieces;
    }
    if (last - first < threads) {
        width = max(1, last - first);
        parts = threads / width;
        part = thread / width;
    }
    int *ticket = &decode_tickets[x.from], have = 0;
    while (share && thread == 0 && have < x.pieces) asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(have) : "l"(ticket) : "memory");
    sync();
    if (share && thread == 0) have = atomicAdd(ticket, 1);  // asked for here, needed at the end
    if (QUADS > 1 && last - first > threads && x.pieces == 2)
        merge_quads<QUADS, 2>(p, x, first, last, width, parts, part, thread, shared, sync, write);
    else
        merge_quads<1, 4>(p, x, first, last, width, parts, part, thread, shared, sync, write);
    if (thread == 0 && (!share || have == 2 * x.pieces - 1)) *ticket = 0;  // all have come, and all that had to have seen it
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
    p.by_group = divisor(p.group);
    p.by_rows = divisor(rows);
    p.by_kv_groups = divisor(p.kv_groups);
    p.by_tile = divisor(tile);
    p.by_least = divisor(least);
    p.by_lanes = divisor(lanes);
    p.by_quads = divisor(p.columns() / 4);
    p.by_page = divisor(std::max(1, a.pages.page_size));
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
