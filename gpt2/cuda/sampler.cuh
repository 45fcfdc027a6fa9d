// From logits to tokens without a way through the host: the twin of sample_token (gpt2/sampler.h), for many draws at once.
//
//     w_i = exp((x_i − max x)/temperature)      kept: the top k of them, of these the top p, of these those of min_p·max w or more (ties rank by id)
//     token = the first of the kept ones, in the order of their ids, with Σ_{j<=i} w_j > uniform·Σ w            temperature 0: the first with x_i = max x
//
// Weights are whole multiples of 2⁻³⁶ and are counted in these as 64-bit integers: sums are exact in any order, and the tokens are those of the CPU. (The
// exponentials differ from the CPU's by 4e-14, which moves the bounds between tokens by some 1e-11 at most.)
//
// A row is read once, 2·V bytes (GPT-2's 101 KB: 2 µs for one multiprocessor; 256 of them 9 µs at 3.0 TB/s), and a second time, by what has come into the
// first-level cache, for the weights: 14 operations in double precision each, 6 µs a row where all are kept.
//
// What every step comes down to is to find the place where a running sum of a long row passes a target: find_crossing().
//
//     sampler_kernel2   any sizes and types: the least likely token kept is found bit by bit of its rank, with a pass over the row for each
//     sampler_kernel4   rows of whole 16 bytes; with top k or top p bf16 only, V < 65536. There are 65536 bf16 numbers, so that a histogram with a counter for
//                       each fits into shared memory, and the cuts are found in it: all tokens with the same logit have the same weight
//     greedy_kernel3    temperature 0
//
// How they came about: dev/cuda/sampler.cu.
#pragma once

#include <algorithm>
#include <cfloat>
#include <climits>
#include <cmath>

#include "../sampler.h"
#include "common.cuh"
#include "overlap.cuh"

namespace gpu {

namespace sampler {

using Weight = unsigned long long;  // in units of 2⁻³⁶

constexpr int THREADS = 1024, WARPS = 32;
constexpr unsigned ALL = 0xffffffff;

// What the host has made of the options.
struct Sampling {
    const floatX* logits;
    int64_t Vp;
    int V;
    const int* row;         // (draws)
    const double* uniform;  // (draws)
    int* token;             // (draws)
    double per_unit;        // log2 e / temperature
    double reach;           // so far below the largest logit weights are 0
    Weight min_weight;
    int top_k;     // V: all
    double top_p;  // 1: all
    bool greedy;
};

// 2^((x − largest)·per_unit) in double, for x that is not far beyond reach. With y = n + r, |r| <= 1/2: 2^y = 2^n·p(r), p a polynomial (relative error 4e-14,
// p(0) = 1); adding 2¹⁶ rounds to multiples of 2⁻³⁶ and leaves the number of them in the low bits.
__device__ __forceinline__ Weight weight_of_logit(const Sampling& s, float x, float largest) {
    constexpr double round_to_int = 6755399441055744.0;  // 1.5·2⁵²
    double d = (double)x - (double)largest, shifted = fma(d, s.per_unit, round_to_int), r = fma(d, s.per_unit, -(shifted - round_to_int));
    double p = 1.0203121063391729e-07;
    p = fma(p, r, 1.3255224878668817e-06);
    p = fma(p, r, 1.525268684626772e-05);
    p = fma(p, r, 0.00015403455852453838);
    p = fma(p, r, 0.0013333558179043112);
    p = fma(p, r, 0.009618129159402558);
    p = fma(p, r, 0.055504108664760424);
    p = fma(p, r, 0.2402265069581299);
    p = fma(p, r, 0.6931471805599453);
    p = fma(p, r, 1.0);
    double power = __hiloint2double((1023 + __double2loint(shifted)) << 20, 0);
    return (Weight)(__double_as_longlong(fma(power, p, 65536.0)) - 0x40f0000000000000);
}

// The tokens that the cuts leave: those with larger logits than `least`, and those with it up to the id `last_tie`.
struct Kept {
    float largest, least;  // finite
    int last_tie;
    __device__ bool operator()(float x, int id) const { return x > least || (x == least && id <= last_tie); }
};
__device__ inline Kept all_within_reach(const Sampling& s, float largest) { return {largest, fmaxf((float)((double)largest - s.reach), -FLT_MAX), INT_MAX}; }
__device__ __forceinline__ Weight weight_if_kept(const Sampling& s, const Kept& kept, float x, int id) {
    Weight w = weight_of_logit(s, fmaxf(x, kept.least), kept.largest);  // of any number that is safe; no branch, so that several are under way at once
    return kept(x, id) && w >= s.min_weight ? w : 0;
}

// ---- sums over a block ------------------------------------------------------------------------------------------------------------------------------------

__device__ __forceinline__ Weight warp_total(Weight x) {
    for (int offset = 16; offset > 0; offset /= 2) x += __shfl_xor_sync(ALL, x, offset);
    return x;
}
__device__ __forceinline__ Weight warp_running_sum(Weight x) {  // over this lane and those before it
    for (int offset = 1; offset < 32; offset *= 2) {
        Weight y = __shfl_up_sync(ALL, x, offset);
        if (threadIdx.x % 32 >= offset) x += y;
    }
    return x;
}

// A draw is a block, or a cluster of blocks on as many multiprocessors (compute capability 9.0), which see each other's shared memory.
constexpr int MOST_BLOCKS = 8;
struct Team {
    int rank = 0, size = 1;
    __device__ Team() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
        rank = (int)__clusterRelativeBlockRank();
        size = (int)__clusterSizeInBlocks();
#endif
    }
    __device__ int draw() const { return blockIdx.x / size; }
    __device__ void sync() const {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
        if (size > 1) {
            __cluster_barrier_arrive();
            __cluster_barrier_wait();
            return;
        }
#endif
        __syncthreads();
    }
    template <class T>
    __device__ T* of(T* shared, int member) const {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
        if (size > 1) return (T*)__cluster_map_shared_rank(shared, member);
#endif
        return shared;
    }
};

struct Crossing {
    int index;      // the first element whose running sum, itself included, is above the target
    Weight before;  // the sum before it
    Weight own;     // what it adds
};

struct Memory {  // of a block, shared
    Weight totals[WARPS], parts[WARPS];
    Weight blocks[MOST_BLOCKS];  // what the blocks of the team tell one another
    Crossing crossing;
    double uniform;
    float floats[WARPS], largest[MOST_BLOCKS];
};

__device__ inline Weight block_total(Weight x, Memory& m) {
    x = warp_total(x);
    __syncthreads();  // the last use
    if (threadIdx.x % 32 == 0) m.parts[threadIdx.x / 32] = x;
    __syncthreads();
    return warp_total(m.parts[threadIdx.x % 32]);
}

// n elements stand in 32 ranges of per_range each for the first block of the team, then those of the second (the last ones may be short or empty); m.totals has
// the sums of this block's ranges, before or after a barrier. target(total of all) must be below the total. All threads of the team call this and get the
// result; weight_of(i) is asked by any thread of the block that has i.
template <class Target, class WeightOf>
__device__ __forceinline__ Crossing find_crossing(Memory& m, const Team& team, int n, int per_range, const Target& target_of, const WeightOf& weight_of) {
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    __syncthreads();
    Weight total = m.totals[lane], sum = warp_running_sum(total), before = sum - total, of_block = __shfl_sync(ALL, sum, 31), target;
    bool here = true;
    if (team.size > 1) {
        if (threadIdx.x < team.size) team.of(&m, threadIdx.x)->blocks[team.rank] = of_block;
        team.sync();
        Weight blocks = warp_running_sum(lane < team.size ? m.blocks[lane] : 0);
        target = target_of(__shfl_sync(ALL, blocks, 31));
        Weight until = __shfl_sync(ALL, blocks, team.rank);
        before += until - of_block;
        here = until - of_block <= target && target < until;
    } else {
        target = target_of(of_block);
    }
    if (here) {
        int range = __ffs(__ballot_sync(ALL, before + total > target)) - 1;
        before = __shfl_sync(ALL, before, range);
        // The range once more, by all threads.
        int64_t begin = ((int64_t)team.rank * WARPS + range) * per_range, each = ceil_div(per_range, THREADS), first = begin + threadIdx.x * each;
        int64_t end = min(first + each, min(begin + per_range, (int64_t)n));
        Weight own = 0;
#pragma unroll 1  // one or two elements: less code is faster
        for (int64_t i = first; i < end; i++) own += weight_of((int)i);
        sum = warp_running_sum(own);
        if (lane == 31) m.parts[warp] = sum;
        __syncthreads();
        Weight part = m.parts[lane], parts = warp_running_sum(part);
        before += __shfl_sync(ALL, parts - part, warp) + sum - own;
        if (before <= target && target < before + own) {
            int i = (int)first;
            Weight w = own;  // of the last one what is left
#pragma unroll 1
            for (; i + 1 < end; i++) {
                w = weight_of(i);
                if (before + w > target) break;
                before += w;
                w = own -= w;
            }
            for (int member = 0; member < team.size; member++) team.of(&m, member)->crossing = {i, before, w};
        }
    }
    team.sync();
    return m.crossing;
}

// The draw itself; m.totals: the weights of the kept tokens in ranges of ids.
__device__ inline void draw(const Sampling& s, Memory& m, const Team& team, const floatX* row, int per_range, const Kept& kept) {
    auto target = [&](Weight total) { return min((Weight)(m.uniform * (double)total), total - 1); };  // if uniform has been rounded to 1: the last
    auto weight_of = [&](int i) { return weight_if_kept(s, kept, to_float(row[i]), i); };
    int token = find_crossing(m, team, s.V, per_range, target, weight_of).index;
    if (threadIdx.x == 0 && team.rank == 0) s.token[team.draw()] = token;
}

// As much as the top p are to have, of a total.
__device__ inline Weight top_p_weight(const Sampling& s, Weight total) { return max((Weight)ceil(s.top_p * (double)total), (Weight)1); }

// --------------------------------------------------------------------------------------------------------------------------------------------------
// 2. Any size and type

__global__ void __launch_bounds__(THREADS) sampler_kernel2(Sampling s) {
    __shared__ Memory m;
    __shared__ int first_largest;
    let_next_kernel_start();
    if (threadIdx.x == 0) first_largest = INT_MAX;
    wait_for_kernel_before();
    const floatX* row = s.logits + s.row[blockIdx.x] * s.Vp;
    if (threadIdx.x == 0) m.uniform = s.uniform[blockIdx.x];
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32, per_range = (int)ceil_div(s.V, WARPS);
    auto for_own = [&](auto&& f) {  // the tokens of the warp's range
        int64_t end = min((int64_t)(warp + 1) * per_range, (int64_t)s.V);
        for (int64_t i = (int64_t)warp * per_range + lane; i < end; i += 32) f((int)i, to_float(row[i]));
    };

    float largest = -INFINITY;
    bool broken = false;
    for_own([&](int, float x) {
        largest = fmaxf(largest, x);
        broken |= !(fabsf(x) <= FLT_MAX);
    });
    broken = __syncthreads_or(broken);
    largest = block_max(largest, m.floats);
    if (broken) {
        if (threadIdx.x == 0) s.token[blockIdx.x] = -1;
        return;
    }
    if (s.greedy) {
        int first = INT_MAX;
        for_own([&](int i, float x) {
            if (x == largest) first = min(first, i);
        });
        if (first < INT_MAX) atomicMin(&first_largest, first);
        __syncthreads();
        if (threadIdx.x == 0) s.token[blockIdx.x] = first_largest;
        return;
    }

    Kept kept = all_within_reach(s, largest);
    if (s.top_k < s.V || s.top_p < 1) {
        // A token's rank as a number, the larger the likelier: the bits of its logit so that they sort, then those of its id, inverted.
        int id_bits = 32 - __clz(s.V);
        Weight last_id = ((Weight)1 << id_bits) - 1;
        auto rank = [&](int i, float x) {
            uint32_t bits = __float_as_uint(x);
            if (bits == 0x80000000) bits = 0;  // −0 is no less than 0
            bits ^= bits >> 31 ? 0xffffffff : 0x80000000;
            return (Weight)bits << id_bits | (last_id - i);
        };
        // The largest number such that the tokens of this rank or higher measure `wanted` or more.
        auto least_rank = [&](Weight wanted, auto&& measure) {
            Weight low = 0, upper = (Weight)1 << (32 + id_bits), above = 0;  // it is in [low, upper); the measure of those from upper on
            for (int bit = 31 + id_bits; bit >= 0; bit--) {
                Weight middle = low | (Weight)1 << bit, sum = 0;
                for_own([&](int i, float x) {
                    Weight r = rank(i, x);
                    if (r >= middle && r < upper) sum += measure(i, x);
                });
                sum = above + block_total(sum, m);
                if (sum >= wanted)
                    low = middle;
                else
                    above = sum, upper = middle;
            }
            return low;
        };
        auto cut_at = [&](Weight r) {
            uint32_t bits = (uint32_t)(r >> id_bits);
            float least = __uint_as_float(bits ^ (bits >> 31 ? 0x80000000 : 0xffffffff));
            if (least >= kept.least) kept.least = least, kept.last_tie = (int)(last_id - (r & last_id));
        };
        if (s.top_k < s.V) cut_at(least_rank((Weight)s.top_k, [](int, float) { return (Weight)1; }));
        if (s.top_p < 1) {
            auto weight = [&](int i, float x) { return kept(x, i) ? weight_of_logit(s, x, largest) : 0; };
            Weight sum = 0;
            for_own([&](int i, float x) { sum += weight(i, x); });
            sum = block_total(sum, m);
            cut_at(least_rank(top_p_weight(s, sum), weight));
        }
    }
    Weight sum = 0;
    for_own([&](int i, float x) {
        if (kept(x, i)) sum += weight_if_kept(s, kept, x, i);
    });
    sum = warp_total(sum);
    if (lane == 0) m.totals[warp] = sum;
    draw(s, m, Team(), row, per_range, kept);
}

// --------------------------------------------------------------------------------------------------------------------------------------------------
// 3, 4. Rows of whole 16 bytes

// The first of the largest logits. Two blocks a multiprocessor, and four reads of 16 bytes a thread are on their way at once.
__global__ void __launch_bounds__(THREADS, 2) greedy_kernel3(Sampling s) {
    constexpr int size = Packed<floatX>::size, BATCH = 4;
    __shared__ float shared[WARPS];
    __shared__ int first_pack;
    let_next_kernel_start();
    if (threadIdx.x == 0) first_pack = INT_MAX;
    wait_for_kernel_before();
    const floatX* row = s.logits + s.row[blockIdx.x] * s.Vp;
    int packs = (int)ceil_div(s.V, size), own_pack = 0;
    float own_largest = -INFINITY, zero = 0;  // 0·x is not a number if x is not finite
    for (int p0 = threadIdx.x; p0 < packs; p0 += BATCH * THREADS) {
        Packed<floatX> x[BATCH];
#pragma unroll  // behind the end: the last one once more, which changes nothing
        for (int b = 0; b < BATCH; b++) x[b] = load_packed(row + (int64_t)min(p0 + b * THREADS, packs - 1) * size);
#pragma unroll
        for (int b = 0; b < BATCH; b++) {
            int p = min(p0 + b * THREADS, packs - 1);
            float largest = -INFINITY;
#pragma unroll
            for (int k = 0; k < size; k++)
                if ((p + 1) * size <= s.V || p * size + k < s.V) {
                    largest = fmaxf(largest, x[b][k]);
                    zero = fmaf(x[b][k], 0.f, zero);
                }
            if (largest > own_largest) own_largest = largest, own_pack = p;
        }
    }
    bool broken = __syncthreads_or(!(zero == 0));
    float largest = block_max(own_largest, shared);
    if (broken) {
        if (threadIdx.x == 0) s.token[blockIdx.x] = -1;
        return;
    }
    if (own_largest == largest) atomicMin(&first_pack, own_pack);
    __syncthreads();
    if (threadIdx.x != 0) return;
    int token = first_pack * size;
    while (to_float(row[token]) != largest) token++;
    s.token[blockIdx.x] = token;
}

// A warp has a range of packs_a_lane packs for each lane, whose numbers go to f(id of the first, numbers). Behind V stands −∞, or the first number of the pack.
// BATCH reads are on their way at once.
template <int BATCH, bool INFINITE, class F>
__device__ __forceinline__ void for_own_packs(const Team& team, const floatX* row, int V, int packs_a_lane, const F& f) {
    constexpr int size = Packed<floatX>::size;
    int packs = (int)ceil_div(V, size), first = (team.rank * WARPS + threadIdx.x / 32) * packs_a_lane * 32 + threadIdx.x % 32;
    for (int i0 = 0; i0 < packs_a_lane; i0 += BATCH) {
        Packed<floatX> x[BATCH];
#pragma unroll
        for (int b = 0; b < BATCH; b++) x[b] = load_packed(row + (int64_t)min(first + (i0 + b) * 32, packs - 1) * size);
#pragma unroll
        for (int b = 0; b < BATCH; b++) {
            int p = first + (i0 + b) * 32;
            if (i0 + b >= packs_a_lane || p >= packs) break;
            float numbers[size];
#pragma unroll
            for (int k = 0; k < size; k++) numbers[k] = x[b][k];
            if ((p + 1) * size > V) {
#pragma unroll
                for (int k = 1; k < size; k++)
                    if (p * size + k >= V) numbers[k] = INFINITE ? -INFINITY : numbers[0];
            }
            f(p * size, numbers);
        }
    }
}

constexpr int COUNTED_V = 65535, BINS = 65536;  // counters are 16 bits

// The number of a bf16 number in falling order, and back.
__device__ __forceinline__ uint32_t bin_of(float x) {
    uint32_t bits = __float_as_uint(x) >> 16;
    if (bits == 0x8000) bits = 0;  // −0 is no less than 0
    return bits >> 15 ? bits : bits ^ 0x7fff;
}
__device__ __forceinline__ float logit_of_bin(uint32_t bin) { return __uint_as_float((bin >> 15 ? bin : bin ^ 0x7fff) << 16); }

// CUT, by top k or top p: bf16, V <= COUNTED_V. Each block of a team has its part of the row; of the bins, once they are counted, too.
template <bool CUT>
__global__ void __launch_bounds__(THREADS, 1) sampler_kernel4(Sampling s) {
    constexpr int size = Packed<floatX>::size;
    extern __shared__ uint4 shared_memory[];
    __shared__ Memory m;
    uint16_t* counts = (uint16_t*)shared_memory;  // (BINS)
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    Team team;
    let_next_kernel_start();
    if constexpr (CUT)
        for (int i = threadIdx.x; i < BINS / 8; i += THREADS) shared_memory[i] = {0, 0, 0, 0};
    team.sync();  // also: all blocks are there, and can be written to
    wait_for_kernel_before();
    const floatX* row = s.logits + s.row[team.draw()] * s.Vp;
    if (threadIdx.x == 0) m.uniform = s.uniform[team.draw()];
    int packs_a_lane = (int)ceil_div(s.V, THREADS * size * team.size), per_range = packs_a_lane * 32 * size;

    float largest = -INFINITY, zero = 0;  // 0·x is not a number if x is not finite
    for_own_packs<4, false>(team, row, s.V, packs_a_lane, [&](int id, const float(&x)[size]) {
#pragma unroll
        for (int k = 0; k < size; k++) {
            largest = fmaxf(largest, x[k]);
            zero = fmaf(x[k], 0.f, zero);
            if constexpr (CUT) {
                uint32_t bin = bin_of(x[k]);
                if (id + k < s.V) atomicAdd((uint32_t*)counts + bin / 2, bin % 2 ? 0x10000 : 1);
            }
        }
    });
    bool broken = __syncthreads_or(!(zero == 0));
    largest = block_max(largest, m.floats);
    if (broken) largest = INFINITY;
    if (team.size > 1) {
        if (threadIdx.x < team.size) team.of(&m, threadIdx.x)->largest[team.rank] = largest;
        team.sync();
        largest = warp_max(m.largest[lane % team.size]);
    }
    if (largest == INFINITY) {
        if (threadIdx.x == 0 && team.rank == 0) s.token[team.draw()] = -1;
        return;
    }

    Kept kept = all_within_reach(s, largest);
    // The sum over the own range of what f makes of each token; most packs have none that is kept.
    auto sum_tokens = [&](auto&& f) {
        Weight sum = 0;
        for_own_packs<1, true>(team, row, s.V, packs_a_lane, [&](int id, const float(&x)[size]) {
            float highest = x[0];
#pragma unroll
            for (int k = 1; k < size; k++) highest = fmaxf(highest, x[k]);
            if (highest < kept.least) return;
#pragma unroll
            for (int k = 0; k < size; k++) sum += f(id + k, x[k]);
        });
        sum = warp_total(sum);
        if (lane == 0) m.totals[warp] = sum;
    };
    if constexpr (CUT) {
        __shared__ Weight parts[BINS / 64];
        int bins = BINS / team.size, first_bin = team.rank * bins, turns = bins / (2 * THREADS), bins_a_range = bins / WARPS;
        if (team.size > 1) {  // the counts of all blocks
            for (int i = first_bin / 8 + threadIdx.x; i < (first_bin + bins) / 8; i += THREADS) {
                uint4 sum = {0, 0, 0, 0};
#pragma unroll 4
                for (int member = 0; member < team.size; member++) {
                    uint4 n = team.of(shared_memory, member)[i];
                    sum.x += n.x, sum.y += n.y, sum.z += n.z, sum.w += n.w;
                }
                shared_memory[i] = sum;
            }
            __syncthreads();
        }
        // The sums over ranges of bins in m.totals. The bins that count stand close to one another: so all threads look at 2048 neighbours at a time.
        auto sum_bins = [&](auto&& weight_of) {
#pragma unroll 1
            for (int turn = 0; turn < turns; turn++) {
                int bin = first_bin + (turn * THREADS + threadIdx.x) * 2;
                Weight sum = ((uint32_t*)counts)[bin / 2] ? weight_of(bin) + weight_of(bin + 1) : 0;
                if (__any_sync(ALL, sum != 0)) sum = warp_total(sum);
                if (lane == 0) parts[turn * WARPS + warp] = sum;
            }
            __syncthreads();
            Weight sum = warp_total(lane < turns ? parts[warp * turns + lane] : 0);
            if (lane == 0) m.totals[warp] = sum;
        };
        int least_bin = BINS, kept_of_it = 0;  // of the least likely logit kept
        bool tied = false;                     // there are more of it
        if (s.top_k < s.V) {
            auto count_of = [&](int bin) { return (Weight)counts[bin]; };
            sum_bins(count_of);
            auto last = [&](Weight) { return (Weight)s.top_k - 1; };
            Crossing c = find_crossing(m, team, BINS, bins_a_range, last, count_of);
            least_bin = c.index;
            kept_of_it = s.top_k - (int)c.before;
            tied = kept_of_it < c.own;
        }
        if (s.top_p < 1) {
            Weight wanted = 0;
            auto weight_of_bin = [&](int bin) {
                int n = bin < least_bin ? (int)counts[bin] : bin == least_bin ? kept_of_it : 0;
                float x = logit_of_bin(bin);
                return n > 0 && x >= kept.least ? n * weight_of_logit(s, x, largest) : 0;
            };
            sum_bins(weight_of_bin);
            auto last = [&](Weight total) { return (wanted = top_p_weight(s, total)) - 1; };
            Crossing c = find_crossing(m, team, BINS, bins_a_range, last, weight_of_bin);
            Weight of_one = weight_of_logit(s, logit_of_bin(c.index), largest), n = ceil_div((int64_t)(wanted - c.before), (int64_t)of_one);
            tied = n * of_one < c.own || (c.index == least_bin && tied);
            least_bin = c.index;
            kept_of_it = (int)n;
        }
        if (logit_of_bin(least_bin) >= kept.least) {
            kept.least = logit_of_bin(least_bin);
            if (tied) {  // the first of them, by id
                auto tie = [&](int, float x) { return (Weight)(x == kept.least); };
                sum_tokens(tie);
                auto last = [&](Weight) { return (Weight)kept_of_it - 1; };
                kept.last_tie = find_crossing(m, team, s.V, per_range, last, [&](int i) { return tie(i, to_float(row[i])); }).index;
            }
        }
    }
    sum_tokens([&](int id, float x) { return weight_if_kept(s, kept, x, id); });
    draw(s, m, team, row, per_range, kept);
}

// --------------------------------------------------------------------------------------------------------------------------------------------------
// The function

// A block a draw, or `team` blocks.
inline void launch(cudaStream_t stream, void (*kernel)(Sampling), size_t shared, const Sampling& s, int64_t draws, int team, bool overlap) {
    launch_overlapping(stream, overlap, team, kernel, draws * team, THREADS, shared, s);
}

inline Sampling sampling(int* token, const floatX* logits, int64_t Vp, int V, const int* row, const double* uniform, const SamplerOptions& o) {
    assert(V > 0 && V <= Vp && o.min_p <= 1);
    Sampling s = {};
    s.logits = logits, s.Vp = Vp, s.V = V;
    s.row = row, s.uniform = uniform, s.token = token;
    s.greedy = o.temperature == 0;
    s.per_unit = s.greedy ? 0 : std::min(1.4426950408889634 / o.temperature, 1e300);
    s.reach = -sampling_weight_zero * o.temperature;
    s.min_weight = (Weight)std::ceil(std::max(o.min_p, 0.0) / sampling_weight_unit);
    s.top_k = o.top_k > 0 && o.top_k < V ? (int)o.top_k : V;
    s.top_p = o.top_p;
    return s;
}

inline bool takes_packs(const Sampling& s) { return s.Vp % Packed<floatX>::size == 0 && aligned16(s.logits); }
inline void sampler4(cudaStream_t stream, const Sampling& s, int64_t draws, int team, bool overlap) {
    assert(takes_packs(s));
    if (s.greedy) return launch(stream, greedy_kernel3, 0, s, draws, 1, overlap);
    if (s.top_k == s.V && s.top_p >= 1) return launch(stream, sampler_kernel4<false>, 0, s, draws, team, overlap);
#ifndef GPU_FLOAT32
    constexpr size_t bytes = BINS * sizeof(uint16_t), others = 10 << 10;
    if (s.V <= COUNTED_V && bytes + others <= device_properties().sharedMemPerBlockOptin)
        return launch(stream, sampler_kernel4<true>, bytes, s, draws, team, overlap);
#endif
    launch(stream, sampler_kernel2, 0, s, draws, 1, overlap);
}
// Blocks a draw, for rows that are worth it. With clusters on more than half of the multiprocessors not all would find a place at once.
inline int team_size(const Sampling& s, int64_t draws) {
    int team = 1;
    while (overlap_code() && team < MOST_BLOCKS && 4 * team * draws <= device_properties().multiProcessorCount && team * 4096 < s.V) team *= 2;
    return team;
}

}  // namespace sampler

// token (draws): −1 where one of the V logits of its row is not finite. logits: rows of V numbers, Vp apart, of which draw d reads row[d]; uniform (draws), in
// [0,1). Of the options all but the penalty. All pointers are device memory. `overlap`: the launch before this one on the stream is a kernel (matvec.cuh).
inline void sample_tokens(cudaStream_t stream, int* token, const floatX* logits, int64_t Vp, int V, const int* row, const double* uniform, int64_t draws,
                          const SamplerOptions& options, bool overlap) {
    if (draws == 0) return;
    sampler::Sampling s = sampler::sampling(token, logits, Vp, V, row, uniform, options);
    if (sampler::takes_packs(s))
        sampler::sampler4(stream, s, draws, sampler::team_size(s, draws), overlap);
    else
        sampler::launch(stream, sampler::sampler_kernel2, 0, s, draws, 1, overlap);
}

}  // namespace gpu
