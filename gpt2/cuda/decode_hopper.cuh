// Decoding with multi-head latent attention on Hopper GPUs: the softmax core of decode.cuh where all heads share one row a token, which is key as a whole, d_c
// numbers of latent and d_rope of position, and value in its first d_c. bf16, d_c = 128, 256 or 512, d_rope <= 64, any number of heads and queries.
//
// What bounds it: a key of 576 numbers is 1152 bytes and takes 2·(576+512) FLOPs for each row (a query with one of its heads). In the time in which a tile of
// 64 keys comes from memory (73.7 KB, 5700 clocks of a multiprocessor at 3.0 TB/s) the tensor cores can multiply it with 167 rows. So up to 64 rows are for
// free, as many as an operand of Hopper's products has: 16 heads take 2176 clocks of products for 64 rows, most of them padding, and wait for memory. 128 heads
// are two tiles of rows: 4352 clocks if nothing else counted. Both must meet the same latents at the same time: two neighbouring blocks walk through them side
// by side (Schedule::lanes), as a cluster where their keys are the same for sure; then each fetches half of every tile for both.
//
// A block has two warps that copy, one queries and one latents, and two warpgroups that compute. 64 × 512 numbers of O fill the registers of both: warpgroup g
// has the columns of half g. Scores are made once: the warpgroups take turns, of tile i the one with g = i%2, its owner. For each of its tiles a warpgroup does
//
//     O_g += P'·V'_g                        of the tile before, whose owner has left P' in shared memory
//     S = Q·Kᵀ                              the whole row of the latents, d_c + d_rope deep
//     P = 2^(scale·S − shift)               to shared memory, 32 keys and then the other 32,
//     O_g += P·V_g                          from registers, in the same two steps
//
// so that one multiplies while the other makes weights. Queries and two tiles fill the shared memory, and what is on its way from memory is what counts: half a
// tile (4 panels of 64 columns) is fetched anew as soon as the warpgroup that has these columns of O is done with it, the owner's half first; scores begin with
// the panel that comes first. P'·V' comes before Q·Kᵀ since it gives room, which is given back in the middle of Q·Kᵀ: at its end, when the last panel of this
// tile has come, would be 1300 clocks later. The other order keeps the tensor cores busier and the memory less, and is slower.
//
// As in softmax_forward_hopper.cuh a row's shift is not its largest score but that of its first tile, and only if a weight would be beyond 2⁶⁰ is there a new
// one. Shifts go from owner to owner with the weights, and with them the factor by which the other has to rescale O.
//
// Pages hold what they hold: scores of keys that a row does not see are replaced, value rows outside the sequence are cleared in shared memory (0·NaN is NaN),
// entries of the page table outside it are never followed. Earlier versions and times: dev/cuda/mla_decode.cu.
#pragma once

#include <algorithm>

#include "decode_schedule.cuh"
#include "hopper.cuh"
#include "overlap.cuh"

#ifndef GPU_FLOAT32

namespace gpu {

namespace decode {

// CTAS = 2: two blocks, a cluster, compute with the same latents, each fetching half of them for both.
template <int DC_, int CTAS_>
struct LatentShape {
    static constexpr int DC = DC_, CTAS = CTAS_, KEYS = 64, ROWS = 64, COMPUTING = 256, THREADS = COMPUTING + 128;
    static constexpr int LATENT_PANELS = DC / 64, HALF_PANELS = LATENT_PANELS / 2, PANELS = LATENT_PANELS + 1, PANEL = KEYS * 128;  // bytes
    static constexpr int TILE_BYTES = PANELS * PANEL, STAGES = DC <= 256 ? 4 : 2, Q_ROWS = 16;  // rows of q a copy, at most 4 of them
    static constexpr int ALL_PANELS = (STAGES + 1) * TILE_BYTES + PANEL;                        // bytes: q, the tiles, weights
    static_assert(DC % 128 == 0 && DC <= 512, "each half whole panels, and of at most 256 columns");
};

struct LatentItem {
    Item piece;    // seq = -1: there is no more
    int position;  // of the sequence's first query of this launch,
    int q_row;     // and its row of q
    int k_len;     // keys of the sequence
};

// Behind the panels in shared memory.
template <class Shape>
struct LatentShared {
    uint64_t full[Shape::STAGES][Shape::PANELS], empty[Shape::STAGES][2], weights[Shape::STAGES][2], q_full[Shape::PANELS], q_empty;
    LatentItem items[2];
    float factor[Shape::STAGES][64];  // what O and l are to be multiplied with before the stage's weights are used
    float shift[64];                  // of a row's scores, in powers of 2; NaN: it has seen no key
    float sums[2][2][64];             // [item % 2][warpgroup]
    LatentItem pieces[2];             // of lists that others have pieces of too: begun before, begun here
    WalkShared walk;
};
template <class Shape>
constexpr int latent_shared_bytes() {
    return Shape::ALL_PANELS + (int)sizeof(LatentShared<Shape>);
}

template <class Shape>
struct LatentLayout {
    uint32_t panels;
    float* numbers;  // the panels, when all is done
    LatentShared<Shape>& more;
    __device__ uint32_t q(int panel) const { return panels + panel * Shape::PANEL; }
    __device__ uint32_t k(int stage, int panel) const { return panels + Shape::TILE_BYTES * (1 + stage) + panel * Shape::PANEL; }
    // One is enough: who writes weights has multiplied with those of the tile before.
    __device__ uint32_t p() const { return k(Shape::STAGES, 0); }
    // For products' operands, which have no room for the bits that tell the blocks of a cluster apart.
    __device__ uint32_t local(uint32_t address) const { return address & 0x3ffff; }
    __device__ uint32_t full(int stage, int panel) const { return shared_address(&more.full[stage][panel]); }
    __device__ uint32_t empty(int stage, int half) const { return shared_address(&more.empty[stage][half]); }
    __device__ uint32_t weights(int stage, int part) const { return shared_address(&more.weights[stage][part]); }  // part: of 32 keys
    __device__ uint32_t q_full(int panel) const { return shared_address(&more.q_full[panel]); }
    __device__ uint32_t q_empty() const { return shared_address(&more.q_empty); }

    __device__ void init_barriers() const {
#pragma unroll 1
        for (int stage = 0; stage < Shape::STAGES; stage++) {
            for (int p = 0; p < Shape::PANELS; p++) barrier_init(full(stage, p), 1);
            for (int half = 0; half < 2; half++) barrier_init(empty(stage, half), 4 * Shape::CTAS);  // warpgroup `half`'s warps
            for (int part = 0; part < 2; part++) barrier_init(weights(stage, part), 4);              // the owner's warps
        }
        for (int p = 0; p < Shape::PANELS; p++) barrier_init(q_full(p), 1);
        barrier_init(q_empty(), Shape::COMPUTING / 32);
        barrier_init_fence();
    }
};

// Tile n of all that a block works on: its place in the ring.
template <class Shape>
struct LatentTile {
    int stage, parity;  // parity of the phase in which it becomes full; the opposite one is that of its becoming empty before
    __device__ explicit LatentTile(int n) : stage(n % Shape::STAGES), parity(n / Shape::STAGES & 1) {}
};

__device__ __forceinline__ int first_tile(const Item& x) { return x.begin / 64; }
__device__ __forceinline__ int count_tiles(const Item& x) { return x.end > x.begin ? (x.end + 63) / 64 - first_tile(x) : 0; }

// Asks the cache for a box.
__device__ __forceinline__ void bulk_prefetch(const CUtensorMap* map, int c0, int c1) {
    HOPPER_ONLY(asm volatile("cp.async.bulk.prefetch.tensor.2d.L2.global.tile [%0, {%1,%2}];" ::"l"(map), "r"(c0), "r"(c1) : "memory");)
}

// cluster_barrier() in two halves, the first of which says nothing of what was written before (barrier_init_fence() has).
__device__ __forceinline__ void cluster_arrive() { HOPPER_ONLY(asm volatile("barrier.cluster.arrive.relaxed;" ::: "memory");) }
__device__ __forceinline__ void cluster_wait() { HOPPER_ONLY(asm volatile("barrier.cluster.wait.acquire;" ::: "memory");) }

// ---- the warps that copy ------------------------------------------------------------------------------------------------------------------------------

// One warp announces the items, with the first panel of their queries, and fetches these: asked for while the item before is worked on, they come from the
// cache when there is room. Without keys they are not needed.
template <class Shape>
__device__ __forceinline__ void copy_queries(const SoftmaxAttention& a, const Schedule& p, const CUtensorMap& q_map, Walk& walk,
                                             const LatentLayout<Shape>& at) {
    const int lane = threadIdx.x % 32;
    int k = 0;
    for (Item x; walk.next(x); k++) {
        LatentItem item = {x, a.position(x.seq, p.q0), a.cu_q[x.seq] + p.q0, a.k_len(x.seq)};
        const int row = item.q_row * a.heads + x.first_row, copies = count_tiles(x) > 0 ? (x.rows + Shape::Q_ROWS - 1) / Shape::Q_ROWS : 0;
        if (k == 0)
            wait_for_kernel_before();
        else
            for (int c = lane / 4; lane % 4 < copies && c < Shape::PANELS; c += 8) bulk_prefetch(&q_map, c * 64, row + lane % 4 * Shape::Q_ROWS);
        if (Shape::CTAS > 1 && k == 0) cluster_wait();
        barrier_wait(at.q_empty(), k & 1 ^ 1);
        if (lane == 0) at.more.items[k % 2] = item;
        __syncwarp();
        if (lane < Shape::PANELS) barrier_arrive_expect(at.q_full(lane), copies * Shape::Q_ROWS * 128);
#pragma unroll 1
        for (int c = lane / 4; lane % 4 < copies && c < Shape::PANELS; c += 8) {
            const int r = lane % 4 * Shape::Q_ROWS;
            bulk_load(at.q(c) + r * 128, &q_map, at.q_full(c), c * 64, row + r);
        }
        __syncwarp();
    }
    if (k == 0) wait_for_kernel_before();
    if (Shape::CTAS > 1 && k == 0) cluster_wait();
    barrier_wait(at.q_empty(), k & 1 ^ 1);
    if (lane != 0) return;
    at.more.items[k % 2].piece.seq = -1;
    barrier_arrive(at.q_full(0));
}

// The other the latents, as far ahead as there is room.
template <class Shape>
__device__ __forceinline__ void copy_latents(const SoftmaxAttention& a, const Schedule& p, const CUtensorMap& k_map, Walk& walk,
                                             const LatentLayout<Shape>& at) {
    const int lane = threadIdx.x % 32, page_size = a.pages.page_size, box = min(page_size, 64), boxes = 64 >> (31 - __clz(box));  // of a tile; powers of 2
    const int rank = Shape::CTAS > 1 ? cluster_rank() : 0;
    int done = 0;
    bool waited = false, met = Shape::CTAS == 1;
    for (Item x; walk.next(x);) {
        const int n = count_tiles(x);
        const int* table = a.states[x.seq].page_table;
        const int64_t old = a.states[x.seq].length;
        // Lane l fetches the boxes l and l+32. A box without any key that is needed is another's once more, in memory that is surely there.
        auto find = [&](int tile, int(&page)[2], int(&slot)[2]) {
#pragma unroll
            for (int i = 0; i < 2; i++) {
                const int b = lane + 32 * i;
                if (b >= boxes) continue;
                const int j = min(max((first_tile(x) + tile) * 64 + b * box, x.begin & -box), (x.end - 1) & -box), entry = p.by_page(j);
                page[i] = table[entry];
                slot[i] = j - entry * page_size;
            }
        };
        int page[2], slot[2];
        if (n > 0) find(0, page, slot);
        if (!met) cluster_wait();
        met = true;
        for (int tile = 0; tile < n; tile++, done++) {
            const LatentTile<Shape> to(done);
            if (!waited && (first_tile(x) + tile + 1) * 64 > old) {  // rows that the kernel before may have written
                wait_for_kernel_before();
                waited = true;
            }
            int next_page[2], next_slot[2];
            if (tile + 1 < n) find(tile + 1, next_page, next_slot);
            // Bytes may come before they are expected: the phase cannot end before that.
            auto fetch = [&](int panel, int by) {
                const uint32_t address = at.k(to.stage, panel), full = at.full(to.stage, panel);
                if (lane == 0) barrier_arrive_expect(full, Shape::PANEL);
                if (Shape::CTAS > 1 && rank != by) return;
#pragma unroll
                for (int i = 0; i < 2; i++) {
                    if (lane + 32 * i >= boxes) continue;
                    if (Shape::CTAS > 1)
                        bulk_load_multicast(address + (lane + 32 * i) * box * 128, &k_map, full, panel * 64, slot[i], page[i], 3);
                    else
                        bulk_load(address + (lane + 32 * i) * box * 128, &k_map, full, panel * 64, slot[i], page[i]);
                }
            };
            for (int h = 0; h < 2; h++) {
                const int half = h ^ (tile & 1), from = half * Shape::HALF_PANELS;
                barrier_wait(at.empty(to.stage, half), to.parity ^ 1);
                for (int panel = from; panel < from + Shape::HALF_PANELS; panel++) fetch(panel, half);
            }
            fetch(Shape::LATENT_PANELS, tile & 1);
#pragma unroll
            for (int i = 0; i < 2; i++) {
                page[i] = next_page[i];
                slot[i] = next_slot[i];
            }
        }
        __syncwarp();
    }
    if (!met) cluster_wait();
    // What the other block of the cluster sends here must come before this block ends: bulk copies have, its arrivals may not.
    for (int tile = max(0, done - Shape::STAGES); Shape::CTAS > 1 && tile < done; tile++) {
        const LatentTile<Shape> to(tile);
        for (int half = 0; half < 2; half++) barrier_wait(at.empty(to.stage, half), to.parity);
    }
}

// ---- a warpgroup that computes ------------------------------------------------------------------------------------------------------------------------

// A thread has two rows, `row` and the one 8 below (half = 0, 1), and of each the columns that hopper.cuh says: s[4·i + 2·half + e] is of column
// 8·i + 2·(lane%4) + e.
template <class Shape>
struct LatentConsumer {
    static constexpr int KEYS = Shape::KEYS, COLUMNS = Shape::DC / 2;
    const SoftmaxAttention& a;
    const Schedule& p;
    const LatentLayout<Shape>& at;
    const float scale;  // log₂e in it
    const int group, lane, row;
    bool valid[2];       // of the item's rows; the others are never looked at: they compute with whatever stands in shared memory
    int lo[2], hi[2];    // the row sees the keys lo <= j < hi
    int all_lo, all_hi;  // and all rows see these
    float s[KEYS / 2], acc[COLUMNS / 2], l[2], shift[2], factor[2];
    uint32_t weight[KEYS / 16][4];

    __device__ LatentConsumer(const SoftmaxAttention& a, const Schedule& p, const LatentLayout<Shape>& at, float scale)
        : a(a), p(p), at(at), scale(scale), group(threadIdx.x / 128), lane(threadIdx.x % 32), row(threadIdx.x % 128 / 32 * 16 + lane / 4) {}

    __device__ __forceinline__ void arrive(uint32_t barrier) const {
        __syncwarp();
        if (lane == 0) barrier_arrive(barrier);
    }

    __device__ __forceinline__ void meet() const { named_barrier(1, Shape::COMPUTING); }

    // Of this warpgroup's half of a tile.
    __device__ __forceinline__ void release(const LatentTile<Shape>& tile) const {
        if (Shape::CTAS == 1) {
            arrive(at.empty(tile.stage, group));
        } else {
            __syncwarp();
            if (lane < Shape::CTAS) barrier_arrive_at(at.empty(tile.stage, group), lane);
        }
    }

    // S (+)= Q·Kᵀ, panels FROM ... TO−1 of it, this warpgroup's half of the columns first: they came first.
    template <int FROM, int TO>
    __device__ __forceinline__ void multiply_qk(const LatentTile<Shape>& tile, bool first, int q_parity) {
        constexpr int step = Shape::PANEL / 16;
        const uint64_t q = panel_operand(at.local(at.q(0))), k = panel_operand(at.local(at.k(tile.stage, 0)));
#pragma unroll
        for (int c = FROM; c < TO; c++) {
            const int panel = c < Shape::HALF_PANELS ? c + group * Shape::HALF_PANELS : c < Shape::LATENT_PANELS ? c - group * Shape::HALF_PANELS : c;
            if (first) barrier_wait(at.q_full(panel), q_parity);
            barrier_wait(at.full(tile.stage, panel), tile.parity);
            products_begin();
#pragma unroll
            for (int i = 0; i < 4; i++) product(s, q + panel * step + 2 * i, k + panel * step + 2 * i, c + i > 0);
        }
        products_commit();
    }
    // O += P·V with weights in registers, of 32 keys.
    template <int PART>
    __device__ __forceinline__ void multiply_own(int stage) {
        const uint64_t v = panel_operand_transposed(at.local(at.k(stage, group * Shape::HALF_PANELS)), Shape::PANEL);
        products_begin();
#pragma unroll
        for (int c = 2 * PART; c < 2 * PART + 2; c++) product<1>(acc, weight[c], v + c * 128, true);
        products_commit();
    }
    // The same with those that the other warpgroup has left; the first 32 keys' are there.
    __device__ __forceinline__ void multiply_other(const LatentTile<Shape>& tile) {
        const uint64_t v = panel_operand_transposed(at.local(at.k(tile.stage, group * Shape::HALF_PANELS)), Shape::PANEL);
        const uint64_t w = panel_operand(at.local(at.p()));
        products_begin();
#pragma unroll
        for (int c = 0; c < KEYS / 16; c++) {
            if (c == KEYS / 32) {
                barrier_wait(at.weights(tile.stage, 1), tile.parity);
                products_begin();
            }
            product<0, 1>(acc, w + 2 * c, v + c * 128, true);
        }
        products_commit();
    }
    __device__ __forceinline__ void products_finish() {
        products_wait<0>();
        products_done(acc);
#pragma unroll
        for (int c = 0; c < KEYS / 16; c++)  // nobody writes weights before this line
#pragma unroll
            for (int i = 0; i < 4; i++) asm volatile("" : "+r"(weight[c][i])::"memory");
    }

    __device__ __forceinline__ void rescale() {
        if (__all_sync(0xffffffff, factor[0] == 1 && factor[1] == 1)) return;
#pragma unroll
        for (int i = 0; i < COLUMNS / 2; i++) acc[i] *= factor[i / 2 % 2];
    }

    // The other's tile, when its weights are there: shifts, and O and l with them.
    __device__ __forceinline__ void follow(const LatentTile<Shape>& tile) {
        barrier_wait(at.weights(tile.stage, 0), tile.parity);
#pragma unroll
        for (int half = 0; half < 2; half++) {
            shift[half] = at.more.shift[row + 8 * half];
            factor[half] = at.more.factor[tile.stage][row + 8 * half];
            l[half] *= factor[half];
        }
        rescale();
        multiply_other(tile);
    }

    // Scores of keys that a row does not see become −inf; j0: the tile's first key.
    __device__ __forceinline__ void mask(int j0) {
        if (j0 >= all_lo && j0 + KEYS <= all_hi) return;
        const int first = j0 + lane % 4 * 2;
#pragma unroll
        for (int i = 0; i < KEYS / 2; i++) {
            int j = first + i / 4 * 8 + i % 2;
            if (j < lo[i / 2 % 2] || j >= hi[i / 2 % 2]) s[i] = -INFINITY;
        }
    }
    // A new shift, the row's largest score up to now, where there is none yet or a weight would be beyond 2⁶⁰.
    __device__ __forceinline__ void find_shift() {
        float top[2];  // of this thread's scores
#pragma unroll
        for (int half = 0; half < 2; half++) {
            float m[2] = {s[2 * half], s[2 * half + 1]};
#pragma unroll
            for (int i = 4; i < KEYS / 2; i += 4)
#pragma unroll
                for (int e = 0; e < 2; e++) m[e] = fmaxf(m[e], s[i + 2 * half + e]);
            top[half] = fmaxf(m[0], m[1]);
            factor[half] = 1;
        }
        // NaN is not < 60 either
        if (__all_sync(0xffffffff, (top[0] * scale - shift[0] < 60 || !valid[0]) && (top[1] * scale - shift[1] < 60 || !valid[1]))) return;
#pragma unroll
        for (int half = 0; half < 2; half++) {
            float m = fmaxf(top[half], __shfl_xor_sync(0xffffffff, top[half], 1));
            m = fmaxf(m, __shfl_xor_sync(0xffffffff, m, 2));
            m = fmaxf(m * scale, shift[half]);                                   // fmaxf ignores one NaN
            factor[half] = isnan(shift[half]) ? 1 : exp2_fast(shift[half] - m);  // O is 0 if the row has seen no key
            shift[half] = m == -INFINITY ? NAN : m;
            l[half] *= factor[half];
            if (lane % 4 == 0) at.more.shift[row + 8 * half] = shift[half];
        }
    }
    // weight = 2^(scale·s − shift) of 32 keys, for this warpgroup and the other. sum[2·half + e]: of the thread's own.
    template <int PART>
    __device__ __forceinline__ void weigh(int stage, float (&sum)[4]) {
        float base[2];
#pragma unroll
        for (int half = 0; half < 2; half++) base[half] = isnan(shift[half]) ? 0 : shift[half];  // of a row that has seen no key all scores are −inf
        const int r = threadIdx.x % 128 / 32 * 16 + lane % 16;
#pragma unroll
        for (int c = 2 * PART; c < 2 * PART + 2; c++) {
#pragma unroll
            for (int i = 0; i < 4; i++) {
                float x[2];
#pragma unroll
                for (int e = 0; e < 2; e++) {
                    x[e] = exp2_fast(s[8 * c + 2 * i + e] * scale - base[i % 2]);  // exactly 0 for −inf
                    sum[i % 2 * 2 + e] += x[e];
                }
                weight[c][i] = pack_bf16(x[0], x[1]);
            }
        }
#pragma unroll
        for (int c = 2 * PART; c < 2 * PART + 2; c++) store_matrices(at.p() + r * 128 + ((2 * c + lane / 16) ^ r % 8) * 16, weight[c]);
        async_fence();
        arrive(at.weights(stage, PART));
    }
    // The tile's value rows outside [begin, end) become zeros.
    __device__ __forceinline__ void clear_outside(int stage, int begin, int end) {
        if (begin <= 0 && end >= KEYS) return;
        named_barrier(2 + group, 128);  // all warps' scores are made
        for (int i = threadIdx.x % 128; i < KEYS * 8; i += 128)
            if (i / 8 < begin || i / 8 >= end)
                for (int panel = 0; panel < Shape::LATENT_PANELS; panel++)
                    asm volatile("st.shared.v4.b32 [%0], {%1,%1,%1,%1};" ::"r"(at.k(stage, panel) + i * 16), "r"(0) : "memory");
        async_fence();
        named_barrier(2 + group, 128);
    }

    __device__ __forceinline__ void find_rows(const LatentItem& item) {
        const Item& x = item.piece;
#pragma unroll
        for (int half = 0; half < 2; half++) {
            valid[half] = row + 8 * half < x.rows;
            int position = item.position + p.by_group(x.first_row + min(row + 8 * half, x.rows - 1));
            hi[half] = min(position + 1, item.k_len);
            lo[half] = a.window > 0 ? max(0, position - a.window + 1) : 0;
        }
        all_hi = min(item.position + p.by_group(x.first_row) + 1, item.k_len);
        all_lo = a.window > 0 ? max(0, item.position + p.by_group(x.first_row + x.rows - 1) - a.window + 1) : 0;
    }

    __device__ __forceinline__ floatX* o_of(const LatentItem& item, int r, floatX* o, int64_t o_stride) const {
        const int at_row = item.piece.first_row + r, query = p.by_group(at_row);
        return o + (item.q_row + query) * o_stride + (int64_t)(at_row - query * p.group) * a.d_v;
    }
    __device__ __forceinline__ void write_lse(const LatentItem& item, int r, float* to, float lse) const {
        const int at_row = item.piece.first_row + r, query = p.by_group(at_row);
        to[(at_row - query * p.group) * a.q_rows + item.q_row + query] = lse;
    }

    // Of two lanes `step` apart, a and b the two rows of a 2×2 matrix: its transpose.
    template <class T>
    __device__ __forceinline__ void exchange(T& a, T& b, int step) const {
        const bool upper = lane & step;
        T other = __shfl_xor_sync(0xffffffff, upper ? a : b, step);
        if (upper)
            a = other;
        else
            b = other;
    }

    // The item's result: of a whole list to where it belongs, of a piece to its slot.
    __device__ __forceinline__ void finish(const LatentItem& item, int k, floatX* o, int64_t o_stride, float* lse) {
        const Item& x = item.piece;
        float(*sums)[64] = at.more.sums[k % 2];
#pragma unroll
        for (int half = 0; half < 2; half++) {
            l[half] += __shfl_xor_sync(0xffffffff, l[half], 1);
            l[half] += __shfl_xor_sync(0xffffffff, l[half], 2);
            if (lane % 4 == 0) sums[group][row + 8 * half] = l[half];
        }
        meet();
        // The four lanes of a row exchange what they have, so that each writes 16 bytes.
        const int quarter = lane % 4;
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const int r = row + 8 * half;
            const float sum = sums[0][r] + sums[1][r];
            if (!__any_sync(0xffffffff, valid[half])) continue;
            if (x.whole) {
                const float factor = sum > 0 ? __fdividef(1, sum) : 0;
                floatX* out = o_of(item, r, o, o_stride) + group * COLUMNS + quarter * 8;
#pragma unroll
                for (int i = 0; i < COLUMNS / 8; i += 4) {
                    uint32_t y[4];  // of the columns 8·(i + j) + 2·quarter; then 8·(i + quarter) + 2·j
#pragma unroll
                    for (int j = 0; j < 4; j++) y[j] = pack_bf16(acc[4 * (i + j) + 2 * half] * factor, acc[4 * (i + j) + 2 * half + 1] * factor);
#pragma unroll
                    for (int j = 0; j < 2; j++) exchange(y[j], y[j + 2], 2);
#pragma unroll
                    for (int j = 0; j < 4; j += 2) exchange(y[j], y[j + 1], 1);
                    if (valid[half]) *(uint4*)(out + 8 * i) = {y[0], y[1], y[2], y[3]};
                }
                if (lse && valid[half] && group == 0 && quarter == 0) write_lse(item, r, lse, lse_of(shift[half], sum));
            } else {
                if (!valid[half]) continue;
                float* out = p.slot_o(x.slot, r) + group * COLUMNS + quarter * 2;
#pragma unroll
                for (int i = 0; i < COLUMNS / 8; i++) *(float2*)(out + 8 * i) = {acc[4 * i + 2 * half], acc[4 * i + 2 * half + 1]};
                if (group == 0 && quarter == 0) {
                    p.slot_m(x.slot)[r] = shift[half];
                    p.slot_l(x.slot)[r] = sum;
                }
            }
        }
        if (x.whole) return;
        leave_piece(x, threadIdx.x, [this] { meet(); });
        if (threadIdx.x == 0) at.more.pieces[x.slot % 2] = item;
    }

    __device__ __forceinline__ void merge_pieces(const LatentItem& item, floatX* o, int64_t o_stride, float* lse) {
        auto write = [&](int r, int c, const float(&y)[4], float m, float sum) {
            *(uint2*)(o_of(item, r, o, o_stride) + c) = {pack_bf16(y[0], y[1]), pack_bf16(y[2], y[3])};
            if (c == 0 && lse) write_lse(item, r, lse, lse_of(m, sum));
        };
        merge<4>(
            p, item.piece, true, threadIdx.x, Shape::COMPUTING, at.numbers, [this] { meet(); }, write);
    }

    __device__ __forceinline__ void run(floatX* o, int64_t o_stride, float* lse) {
        int done = 0;
        bool pieces[2] = {false, false};
        for (int k = 0;; k++) {
            barrier_wait(at.q_full(0), k & 1);
            const LatentItem& item = at.more.items[k % 2];
            const Item& x = item.piece;
            if (x.seq < 0) break;
            const int n = count_tiles(x), first_key = first_tile(x) * KEYS;
            find_rows(item);
#pragma unroll
            for (int i = 0; i < COLUMNS / 2; i++) acc[i] = 0;
            l[0] = l[1] = 0;
            shift[0] = shift[1] = NAN;
            if (group >= n) arrive(at.q_empty());
            for (int i = group; i < n; i += 2) {
                const LatentTile<Shape> tile(done + i), before(done + i - 1);
                const int j0 = first_key + i * KEYS;
                if (i > 0) follow(before);
                multiply_qk<0, Shape::HALF_PANELS>(tile, i == group, k & 1);
                if (i > 0) {
                    products_wait<1>();
                    products_done(acc);
                    release(before);
                }
                multiply_qk<Shape::HALF_PANELS, Shape::PANELS>(tile, i == group, k & 1);
                products_wait<0>();
                products_done(s);
                if (i + 2 >= n) arrive(at.q_empty());
                mask(j0);
                find_shift();
                if (lane % 4 == 0)
#pragma unroll
                    for (int half = 0; half < 2; half++) at.more.factor[tile.stage][row + 8 * half] = factor[half];
                clear_outside(tile.stage, x.begin - j0, x.end - j0);
                float sum[4] = {};
                weigh<0>(tile.stage, sum);
                rescale();
                multiply_own<0>(tile.stage);
                weigh<1>(tile.stage, sum);
                multiply_own<1>(tile.stage);
                l[0] += sum[0] + sum[1];
                l[1] += sum[2] + sum[3];
                products_finish();
                release(tile);
            }
            if (n > 0 && (n - 1) % 2 != group) {
                const LatentTile<Shape> tile(done + n - 1);
                follow(tile);
                products_finish();
                release(tile);
            }
            done += n;
            finish(item, k, o, o_stride, lse);
            if (!x.whole) (x.slot % 2 ? pieces[1] : pieces[0]) = true;
        }
        meet();
#pragma unroll 1
        for (int i = 0; i < 2; i++)
            if (i == 0 ? pieces[0] : pieces[1]) merge_pieces(at.more.pieces[i], o, o_stride, lse);
    }
};

template <class Shape>
__global__ void __launch_bounds__(Shape::THREADS, 1)
    latent_decode_kernel(const __grid_constant__ SoftmaxAttention a, const __grid_constant__ Schedule p, const __grid_constant__ CUtensorMap q_map,
                         const __grid_constant__ CUtensorMap k_map, floatX* o, int64_t o_stride, float* lse, float scale) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
    extern __shared__ __align__(1024) char latent_panels[];
    const LatentLayout<Shape> at = {shared_address(latent_panels), (float*)latent_panels, *(LatentShared<Shape>*)(latent_panels + Shape::ALL_PANELS)};
    let_next_kernel_start();
    ask_for_work(a);
    if (threadIdx.x == Shape::THREADS - 1) at.init_barriers();
    if (Shape::CTAS > 1) cluster_arrive();
    if (threadIdx.x >= Shape::COMPUTING) {
        asm volatile("prefetch.tensormap [%0];" ::"l"(&q_map) : "memory");
        asm volatile("prefetch.tensormap [%0];" ::"l"(&k_map) : "memory");
    }
    Walk walk(a, p, at.more.walk);
    const int warp = (int)threadIdx.x / 32 - Shape::COMPUTING / 32;  // of those that copy
    if (Shape::CTAS == 1)
        __syncthreads();
    else if (warp != 0 && warp != 1)  // these two when they need it
        cluster_wait();
    if (warp >= 0) {
        fewer_registers<56>();
        if (warp == 0) copy_latents(a, p, k_map, walk, at);
        if (warp == 1) copy_queries(a, p, q_map, walk, at);
    } else {
        more_registers<224>();
        LatentConsumer<Shape>(a, p, at, scale).run(o, o_stride, lse);
    }
#endif
}

// ---- the host's side --------------------------------------------------------------------------------------------------------------------------------------

constexpr int LATENT_ROWS = 64, LATENT_LEAST = 4;  // tiles of a block at least

inline bool hopper_decode_dims(int kv_heads, int d_qk, int d_v) {
    return hopper_code() && kv_heads == 1 && (d_v == 128 || d_v == 256 || d_v == 512) && d_qk >= d_v && d_qk - d_v <= 64 && d_qk % 8 == 0;
}
// Latents in pages that stand in one range of memory, of 64·n tokens or 64/n.
inline bool hopper_decode_can(const SoftmaxAttention& a) {
    const StatePages& pages = a.pages;
    return hopper_decode_dims(a.kv_heads, a.d_qk, a.d_v) && a.v_offset == a.k_offset && a.q_stride == (int64_t)a.heads * a.d_qk && aligned16(a.q) &&
           pages.rows && aligned16(pages.rows) && (pages.page_size % 64 == 0 || 64 % pages.page_size == 0) &&
           (a.k_offset | pages.per_token | pages.page_stride) % 8 == 0 && a.q_rows * a.heads <= INT_MAX;
}
inline int64_t hopper_decode_scratch(int heads, int kv_heads, int d_qk, int d_v, int max_q) {
    if (!hopper_decode_dims(kv_heads, d_qk, d_v)) return 0;
    return schedule_scratch(std::max(2, device_properties().multiProcessorCount), (int)std::min<int64_t>(LATENT_ROWS, (int64_t)heads * max_q), d_v);
}

template <class Shape>
inline void launch_latent(cudaStream_t stream, const SoftmaxAttention& a, floatX* o, int64_t o_stride, float* lse, Scratch scratch, bool overlap, int blocks) {
    assert(aligned16(o) && o_stride % 8 == 0);
    constexpr int shared = latent_shared_bytes<Shape>();
    static_assert(shared <= 227 << 10, "of a block of this GPU");
    if (blocks == 0) blocks = device_properties().multiProcessorCount;  // one each: blocks wait for each other's pieces, all must run at the same time

    // A piece of a list costs the time of some tiles. If the lists have the same length, with fewer blocks there may be no pieces, or one a block instead of
    // two.
    const int rows = (int)std::min<int64_t>(Shape::ROWS, (int64_t)a.max_q * a.heads), lanes = (int64_t)a.max_q * a.heads > Shape::ROWS ? 2 : 1;
    const int64_t groups = std::max(1, blocks / lanes), lists = a.num_seqs * ceil_div(ceil_div((int64_t)a.max_q * a.heads, rows), lanes);
    const int64_t fewer = lists > groups ? ceil_div(lists, ceil_div(lists, groups)) : groups / lists * lists;
    const int64_t keys = a.window > 0 ? std::min<int64_t>(a.max_k, (int64_t)a.window + a.max_q) : a.max_k, tiles = lists * ceil_div(keys, Shape::KEYS);
    if (tiles / fewer - tiles / groups <= 8 + rows / 4) blocks = (int)fewer * lanes;
    int grid;
    Schedule p = make_schedule(a, 0, a.max_q, rows, 1, Shape::KEYS, LATENT_LEAST, blocks, scratch, &grid, lanes);

    const StatePages& pages = a.pages;
    CUtensorMap q = tensor_map<2>(a.q, {a.d_qk, a.q_rows * a.heads}, {a.d_qk}, {64, Shape::Q_ROWS});
    CUtensorMap k = tensor_map<3>(pages.rows + a.k_offset, {a.d_qk, pages.page_size, pages.pages}, {pages.per_token, pages.page_stride},
                                  {64, std::min(pages.page_size, 64), 1});
    launch_overlapping(stream, overlap, Shape::CTAS, latent_decode_kernel<Shape>, grid, Shape::THREADS, shared, a, p, q, k, o, o_stride, lse, a.scale * LOG2E);
}

// softmax_decode (decode.cuh) where hopper_decode_can(). `blocks` > 0: the work is dealt out to so many at most.
inline void hopper_decode(cudaStream_t stream, const SoftmaxAttention& a, floatX* o, int64_t o_stride, float* lse, Scratch scratch, bool overlap = false,
                          int blocks = 0) {
    if (a.num_seqs == 0 || a.max_q == 0) return;
    // A cluster's blocks, each with every other tile of rows, must have the same keys.
    bool pairs = a.heads % (2 * LATENT_ROWS) == 0 || (a.max_q == 1 && a.heads > LATENT_ROWS && a.heads < 2 * LATENT_ROWS);
    auto launch = a.d_v == 512   ? pairs ? launch_latent<LatentShape<512, 2>> : launch_latent<LatentShape<512, 1>>
                    : a.d_v == 256 ? pairs ? launch_latent<LatentShape<256, 2>> : launch_latent<LatentShape<256, 1>>
                                   : launch_latent<LatentShape<128, 1>>;
    launch(stream, a, o, o_stride, lse, scratch, overlap, blocks);
}

}  // namespace decode

}  // namespace gpu

#endif
