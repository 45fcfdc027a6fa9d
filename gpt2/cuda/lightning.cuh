// Lightning attention's recurrence, forward, backward and token by token, and the gated norm behind it: the twins of what stands in attention.h, section 5.
//
//     q, k, v = SiLU(u), u = x·Wqkvᵀ (N,3C)      S_t = λ·S_{t−1} + k_tᵀv_t      o_t = c·q_t·S_t      λ = e^{−s}, a decay s >= 0 for each head
//
// Forward and backward are one function. A *sweep* goes over each sequence's tokens in one direction and computes from three rows a, b, d a token
//
//     S_t = λ·S_{t−1} + b_tᵀd_t      o_t = c·a_t·S_t = c·Σ_{j<=t} λ^{t−j}·(a_t·b_j)·d_j
//
//     forward    a = q,  b = k,  d = v       gives o
//     backward   a = do, b = v,  d = k       gives dq: its S is the transpose of forward's
//     and from the last token to the first
//                a = k,  b = q,  d = do      gives dv: its S is the gradient dS of forward's state
//                a = v,  b = do, d = q       gives dk: its S is the transpose of that dS, so that dv and dk can be made by one sweep (a pair)
//
// then du = dq⊙SiLU'(u_q) and so on. In chunks of n tokens, i and j counted from the chunk's first in the order of the sweep, S the state before it:
//
//     P_ij = λ^{i−j}·(a_i·b_j) for i >= j, else 0      O = c·(P·D + diag(λ^{i+1})·A·S)      S' = λⁿ·S + (diag(λ^{n−1−i})·B)ᵀD
//
// Exponents are differences of places, never negative. S is float32 from the first token to the last; as a factor of A·S it is rounded to bf16.
//
// Two schemes, as on the CPU. Sequential: a block takes a sequence and head from end to end, S in registers; each row is read once. Parallel: sequences
// are cut into *spans* of a few hundred tokens. What each span adds to the state (b and d are read), a scan over the spans, then all spans at once, each
// from its own state. That reads b and d twice, but fills the GPU when sequences and heads are few. Between spans states are float32 numbers in scratch
// memory, hs/512 of them for each number of o at the most. Backward computes them again; but the states before chunks, which Hopper's backward works from,
// forward can leave.
//
//   lightning_sweep_kernel1      token by token: any head size                                               (lightning_sweep.cuh)
//   lightning_sweep_kernel2      chunks, float32 arithmetic: head sizes up to some 250                       (lightning_sweep.cuh)
//   lightning_sweep_kernel3      chunks, tensor cores: bf16, head sizes up to 128 that are multiples of 8    (lightning_tensor_cores.cuh)
//   lightning_forward_kernel5    the same for Hopper; can leave the states before its chunks for backward    (lightning_hopper.cuh)
//   lightning_backward_kernel8   all gradients by one sweep, for Hopper, which needs these states            (lightning_hopper.cuh)
//   lightning_states_kernel6     for Hopper: the states before chunks, where forward has not left them   (lightning_hopper.cuh)
//   lightning_span_kernel8       for Hopper: what spans or tails add to the states between them          (lightning_hopper.cuh)
//   lightning_forward_kernel8, lightning_backward_kernel9   the same up to head size 64: warpgroups with roles      (lightning_roles.cuh)
//   lightning_backward_kernel10  the same above head size 64                                               (lightning_wide.cuh)
//
// The numbers are those of the ladders dev/cuda/lightning_forward.cu, lightning_backward.cu and lightning_gate.cu, which say what was tried and expected.
#pragma once

#include "lightning_gate.cuh"
#include "lightning_hopper.cuh"
#include "lightning_roles.cuh"
#include "lightning_sweep.cuh"
#include "lightning_tensor_cores.cuh"
#include "lightning_wide.cuh"

namespace gpu {

// --------------------------------------------------------------------------------------------------------------------------------------------------
// 1. States between spans, and at the ends

// borders hold what every span but a sequence's last adds, and become the states behind these spans: S_i = λ^span·S_{i−1} + own_i. A thread has V numbers of
// the state of a sequence and head. `backwards`: every span but a sequence's first adds to the state before it, D_i = λ^span·D_{i+1} + own_i.
template <int V>
__global__ void lightning_scan_kernel(Lightning g, bool transposed, bool backwards) {
    int h = blockIdx.x % g.heads, hs = g.hs;
    int64_t e = ((int64_t)blockIdx.y * blockDim.x + threadIdx.x) * V, step = g.heads * g.head_state();
    __shared__ float block_factor;
    if (threadIdx.x == 0) block_factor = (float)exp(-g.slope(h) * g.span);
    LightningSpan q;
    q.seq = blockIdx.x / g.heads;
    q.begin = g.cu_seqlens[q.seq];
    int len = g.cu_seqlens[q.seq + 1] - q.begin, borders = (len - 1) / g.span;
    if (len < g.min_len || len == 0) return;
    __syncthreads();
    if (e >= g.head_state()) return;
    const float factor = block_factor, *start = g.start(q.seq, h);
    float S[V];
#pragma unroll
    for (int v = 0; v < V; v++) S[v] = !start ? 0 : transposed ? start[(e + v) % hs * hs + (e + v) / hs] : start[e + v];
    float* at = g.border(q, backwards ? borders - 1 : 0, h) + e;
    if (backwards) step = -step;
    constexpr int AHEAD = 8;  // loads on their way at a time
    for (int i = 0; i < borders; i += AHEAD) {
        alignas(16) float own[AHEAD][V];
#pragma unroll
        for (int j = 0; j < AHEAD; j++) {
            if (i + j >= borders) break;
            if constexpr (V == 4)
                *(float4*)own[j] = *(const float4*)(at + j * step);
            else
                own[j][0] = at[j * step];
        }
#pragma unroll
        for (int j = 0; j < AHEAD; j++) {
            if (i + j >= borders) break;
#pragma unroll
            for (int v = 0; v < V; v++) own[j][v] = S[v] = factor * S[v] + own[j][v];
            if constexpr (V == 4)
                *(float4*)(at + j * step) = *(const float4*)own[j];
            else
                at[j * step] = own[j][0];
        }
        at += AHEAD * step;
    }
}
inline void lightning_scan(cudaStream_t stream, const Lightning& g, bool transposed, bool backwards) {
    unsigned heads = (unsigned)(g.num_seqs * g.heads);
    if (g.head_state() % 4 == 0)
        lightning_scan_kernel<4><<<dim3(heads, (unsigned)ceil_div(g.head_state(), 256)), 64, 0, stream>>>(g, transposed, backwards);
    else
        lightning_scan_kernel<1><<<dim3(heads, (unsigned)ceil_div(g.head_state(), 64)), 64, 0, stream>>>(g, transposed, backwards);
    LAUNCH_CHECK();
}

// Where sequences of several spans have left their states (Lightning::finish), from there to memory.
__global__ void lightning_finish_kernel(Lightning g) {
    int h = blockIdx.x % g.heads;
    int64_t e = (int64_t)blockIdx.y * blockDim.x + threadIdx.x;
    LightningSpan q;
    q.seq = blockIdx.x / g.heads;
    q.begin = g.cu_seqlens[q.seq];
    int len = g.cu_seqlens[q.seq + 1] - q.begin;
    const float* from = nullptr;
    if (g.range) {  // where the range that ends the sequence has left its state, unless it has the sequence's first tokens too
        const int first = q.begin / g.span + q.seq, last = first + (len - 1) / g.span;
        if (len > 0 && last / g.range > first / g.range) from = g.tail_sum(last / g.range, 0, h);
    } else if (len > g.span)
        from = g.border(q, (len - 1) / g.span - 1, h);
    float* to = g.finish(q.seq, h);
    if (len < g.min_len || !from || !to || e >= g.head_state()) return;
    to[e] = from[e];
}

// starts[s]: null where memory_from[s] is, otherwise the next free one of `copies`, (carried memories, size) numbers; with `copy` memory_from[s] goes there.
// Blocks (s, piece) copy in pieces.
__global__ void lightning_starts_kernel(const float** starts, float* copies, const float* const* memory_from, int64_t size, bool copy) {
    int s = blockIdx.x, before = 0;
    for (int k = 0; k < s; k += blockDim.x) before += __syncthreads_count(k + (int)threadIdx.x < s && memory_from[k + threadIdx.x]);
    const float* from = memory_from[s];
    float* to = copies + before * size;
    if (blockIdx.y == 0 && threadIdx.x == 0) starts[s] = from ? to : nullptr;
    if (!from || !copy) return;
    for (int64_t i = (int64_t)blockIdx.y * blockDim.x + threadIdx.x; i < size; i += (int64_t)gridDim.y * blockDim.x) to[i] = from[i];
}

// --------------------------------------------------------------------------------------------------------------------------------------------------
// 2. Launching

constexpr int LIGHTNING_MIN_SPAN = 512, LIGHTNING_MAX_SPAN = 2048;
constexpr int LIGHTNING_RANGE_SPAN = 128, LIGHTNING_TAIL = 8;  // of ranges: tokens a span, chunks a tail at least

// Whether Hopper's kernels are used.
inline bool lightning_hopper(int hs) {
#ifdef GPU_FLOAT32
    (void)hs;
    return false;
#else
    return hs % 8 == 0 && hs <= 128 && hopper_code();
#endif
}
// Numbers (floatX) of the states before every second chunk, which forward leaves for Hopper's backward if it is given a place: hs/128 for each number of o.
inline int64_t lightning_states(const AttentionConfig& a, int64_t N) {
    return lightning_hopper(a.head_size()) ? std::max<int64_t>(N / 128, 1) * a.channels * a.head_size() : 0;
}

// Bytes of scratch memory that the recurrence over N tokens takes, forward or backward; `states_left`: backward is given what forward has left.
inline int64_t lightning_recurrence_scratch(const AttentionConfig& a, int64_t N, bool states_left = false) {
    int64_t borders = N / LIGHTNING_MIN_SPAN * a.channels * a.head_size() * (int64_t)sizeof(float);
    return scratch_bytes({borders, states_left ? 0 : lightning_states(a, N) * (int64_t)sizeof(floatX)});
}

inline int64_t lightning_shared_limit() { return (int64_t)device_properties().sharedMemPerBlockOptin; }

#ifndef GPU_FLOAT32
inline bool lightning_aligned(const LightningRows& x) { return x.stride % 8 == 0 && aligned16(x.p); }
inline bool lightning_aligned(const LightningOutput& x) { return x.stride % 8 == 0 && aligned16(x.p) && x.u_stride % 8 == 0 && aligned16(x.u); }
// Calls f(std::integral_constant<int, HS>).
template <class F>
inline void lightning_with_padded_head_size(int hs, F f) {
    if (hs <= 32)
        f(std::integral_constant<int, 32>());
    else if (hs <= 64)
        f(std::integral_constant<int, 64>());
    else if (hs <= 96)
        f(std::integral_constant<int, 96>());
    else
        f(std::integral_constant<int, 128>());
}
#endif

// How a sweep is to be done: by which kernel, in which scheme, and whether pairs are taken at once. What is not possible is replaced by what is.
struct LightningMethod {
    int kernel = 3;  // the portable one
    LightningScheme scheme = SCHEME_AUTO;
    bool pairs = true;
    bool hopper = true;  // Hopper's instead, where it can be used
    bool roles = true;   // of these the ones whose warpgroups have roles, where they can be used
};

// The kernel for a sweep, how its blocks look, and how many of them a multiprocessor holds.
struct LightningPlan {
    int kernel = 0, chunk = 0, columns = 0;
    int64_t shared = 0;
    int most_blocks = 4;  // that a multiprocessor's registers have room for
    int waves = 3;        // so many times what the GPU holds should share the work
    int column_blocks(int hs) const { return (int)ceil_div(hs, columns); }
    int64_t resident() const { return std::clamp<int64_t>((int64_t)device_properties().sharedMemPerMultiprocessor / (shared + 1024), 1, most_blocks); }
};

inline LightningPlan lightning_plan(const Lightning& g, const LightningSweep& w, int kernel) {
    LightningPlan plan;
    int hs = g.hs;
    int64_t limit = lightning_shared_limit();
#ifndef GPU_FLOAT32
    bool pair = w.pair_a.p != nullptr;
    if (kernel == 3 && hs % 8 == 0 && hs <= 128 && lightning_aligned(w.a) && lightning_aligned(w.b) && lightning_aligned(w.d) && lightning_aligned(w.o) &&
        (!pair || (lightning_aligned(w.pair_a) && lightning_aligned(w.pair_o)))) {
        lightning_with_padded_head_size(hs, [&](auto HS) {
            using namespace lightning_mma;
            plan.shared = pair ? shared_bytes<HS.value, PAIR> : shared_bytes<HS.value, SINGLE>;
            plan.most_blocks = pair ? BLOCKS<HS.value, PAIR> : BLOCKS<HS.value, SINGLE>;
        });
        plan.kernel = 3;
        plan.chunk = 64;
        plan.columns = hs;
        if (plan.shared <= limit) return plan;
    }
#else
    (void)w;
#endif
    plan.kernel = 2;
    plan.most_blocks = 4;
    plan.columns = std::min(hs, 64);
    for (plan.chunk = 64; kernel >= 2 && plan.chunk >= 16; plan.chunk /= 2) {
        plan.shared = LightningTiles2(hs, plan.chunk, plan.columns).bytes(hs);
        if (plan.shared <= limit) return plan;
    }
    plan.kernel = 1;
    plan.columns = (int)std::min<int64_t>({hs, 128, limit / (int64_t)sizeof(float) / hs - 2});
    if (plan.columns < 1) usage_error("a head size of %d is too large for this GPU: raise --heads", hs);
    plan.shared = ((int64_t)hs * plan.columns + 2 * hs) * (int64_t)sizeof(float);
    return plan;
}

// Tokens a span, 0: the sequential scheme. That one reads everything once, but has only a block for each sequence and head: it is chosen if these fill two
// thirds of the GPU, or if no sequence is long enough to be cut. Otherwise spans are so long that plan.waves times as many blocks as the GPU holds, and no
// more, share the work.
inline int lightning_span(const Lightning& g, const LightningPlan& plan, LightningScheme scheme) {
    if (plan.kernel == 1 || scheme == SCHEME_SEQUENTIAL || g.max_len <= LIGHTNING_MIN_SPAN) return 0;
    int64_t work = g.tokens * g.heads * plan.column_blocks(g.hs), resident = device_properties().multiProcessorCount * plan.resident();
    if (scheme == SCHEME_AUTO && 3 * (work / g.max_len) >= 2 * resident) return 0;
    int64_t span = std::clamp<int64_t>(round_up(ceil_div(work, plan.waves * resident), 128), LIGHTNING_MIN_SPAN, LIGHTNING_MAX_SPAN);
    return span >= g.max_len ? 0 : (int)span;
}

// The same for Hopper's kernels, whose blocks take nearly the same time each: as many tokens as make the last wave of blocks as full as possible.
inline int lightning_even_span(const Lightning& g, const LightningPlan& plan) {
    constexpr int64_t STEP = 128, START = 128;  // to begin and end a span takes as long as that many tokens
    int64_t resident = device_properties().multiProcessorCount * plan.resident(), best = 0, least = INT64_MAX;
    for (int64_t span = LIGHTNING_MIN_SPAN; span <= LIGHTNING_MAX_SPAN; span += STEP) {
        int64_t blocks = std::min(g.num_seqs * ceil_div(g.max_len, span), g.tokens / span + g.num_seqs) * g.heads;
        int64_t time = ceil_div(blocks, resident) * (span + START);
        if (time <= least) least = time, best = span;
    }
    return best >= g.max_len ? 0 : (int)best;
}

// For the kernels whose blocks have a multiprocessor for themselves (lightning_roles.cuh): how many spans of LIGHTNING_RANGE_SPAN a block takes; 0: whole
// sequences. Times are in tokens of a head, at the rate at which memory serves a multiprocessor. bytes: that forward or backward moves for each number.
inline int lightning_range(const Lightning& g, LightningScheme scheme, double bytes) {
    if (scheme == SCHEME_SEQUENTIAL || g.max_len <= LIGHTNING_MIN_SPAN) return 0;
    const double rate = bytes < 12 ? 1.15 : 1.05;  // of a block that does not wait for memory
    const double fixed = 9600 / bytes;             // to have ranges at all: 27 µs, as measured
    const double processors = device_properties().multiProcessorCount, all = (double)g.tokens * g.heads, items = (double)g.num_seqs * g.heads;
    const int64_t slots = g.tokens / LIGHTNING_RANGE_SPAN + g.num_seqs, most = std::min(slots, g.tokens / LIGHTNING_MIN_SPAN + 1);  // tails have room
    double least = std::max(all / processors, std::max<double>(g.max_len, ceil(items / processors) * all / items) / rate);
    int64_t best = 0;
    for (int64_t ranges = 2; ranges <= most && (ranges == 2 || ranges * g.heads <= processors); ranges++) {
        const int64_t range = ceil_div(slots, ranges);
        double counting = 0;  // tokens before a border, of all heads
        for (int h = 0; h < g.heads; h++)
            counting += std::min<double>((double)range * LIGHTNING_RANGE_SPAN, 64.0 * chunks_that_count((float)(g.slope(h) * 1.4426950408889634)));
        const double time = std::max(all / processors, ceil(ranges * g.heads / processors) * range * LIGHTNING_RANGE_SPAN / rate) + fixed +
                            (ranges - 1) * counting * 4 / bytes / processors;
        if (time < least || (best == 0 && scheme == SCHEME_PARALLEL)) least = time, best = range;
    }
    return (int)best;
}

// One of the two passes over the spans (or the only one). own: what spans add, into the borders.
inline void lightning_launch(cudaStream_t stream, const Lightning& g, const LightningSweep& w, const LightningPlan& plan, bool own) {
    dim3 grid((unsigned)(g.slots() * g.heads), (unsigned)plan.column_blocks(g.hs));
    if (plan.kernel == 1) {
        allow_shared_memory(lightning_sweep_kernel1, plan.shared);
        lightning_sweep_kernel1<<<grid, (unsigned)round_up(plan.columns, 32), plan.shared, stream>>>(g, w, plan.columns);
    } else if (plan.kernel == 2) {
        allow_shared_memory(lightning_sweep_kernel2, plan.shared);
        lightning_sweep_kernel2<<<grid, LIGHTNING_THREADS, plan.shared, stream>>>(g, w, LightningTiles2(g.hs, plan.chunk, plan.columns), own);
    } else {
#ifndef GPU_FLOAT32
        lightning_with_padded_head_size(g.hs, [&](auto HS) {
            using namespace lightning_mma;
            constexpr int hs = HS.value;
            auto launch = [&](auto* kernel, int shared) {
                allow_shared_memory(kernel, shared);
                kernel<<<grid, Shape<hs>::THREADS, shared, stream>>>(g, w);
            };
            if (own)
                launch(lightning_sweep_kernel3<hs, STATES>, shared_bytes<hs, STATES>);
            else if (w.pair_a.p)
                launch(lightning_sweep_kernel3<hs, PAIR>, shared_bytes<hs, PAIR>);
            else
                launch(lightning_sweep_kernel3<hs, SINGLE>, shared_bytes<hs, SINGLE>);
        });
#endif
    }
    LAUNCH_CHECK();
}

inline void lightning_sweep(cudaStream_t stream, Lightning g, LightningSweep w, Scratch scratch, const LightningMethod& method) {
    if (g.num_seqs == 0) return;
    LightningPlan plan = lightning_plan(g, w, method.kernel);
    if (w.pair_a.p && (plan.kernel < 3 || !method.pairs)) {  // one behind the other
        LightningSweep second = w.second();
        w.pair_a.p = nullptr;
        lightning_sweep(stream, g, w, scratch, method);
        lightning_sweep(stream, g, second, scratch, method);
        return;
    }
    g.span = lightning_span(g, plan, method.scheme);
    if (g.span == 0) {
        lightning_launch(stream, g, w, plan, false);
        return;
    }
    g.borders = scratch.take<float>(g.tokens / g.span * g.heads * g.head_state());
    dim3 grid((unsigned)(g.num_seqs * g.heads), (unsigned)ceil_div(g.head_state(), 256));
    lightning_launch(stream, g, w, plan, true);
    lightning_scan(stream, g, w.transposed, false);
    lightning_launch(stream, g, w, plan, false);
    if (!g.memory_to && !g.states) return;
    lightning_finish_kernel<<<grid, 256, 0, stream>>>(g);
    LAUNCH_CHECK();
}

#ifndef GPU_FLOAT32
// How many blocks of so many threads and bytes of shared memory the GPU holds at a time, in clusters.
template <class... Parameters>
inline int lightning_clusters(void (*kernel)(Parameters...), int cluster, int threads, int shared) {
    static std::map<std::tuple<const void*, int, int, int>, int> known;
    int& blocks = known[{(const void*)kernel, cluster, threads, shared}];
    if (blocks == 0) {
        cudaLaunchAttribute attribute = {};
        cudaLaunchConfig_t config = {};
        attribute.id = cudaLaunchAttributeClusterDimension;
        attribute.val.clusterDim.x = (unsigned)cluster, attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
        config.gridDim = dim3((unsigned)cluster);
        config.blockDim = dim3((unsigned)threads);
        config.dynamicSmemBytes = shared;
        config.attrs = &attribute;
        config.numAttrs = 1;
        allow_shared_memory(kernel, shared);
        CUDA_CHECK(cudaOccupancyMaxActiveClusters(&blocks, kernel, &config));
        blocks *= cluster;
    }
    return blocks;
}

// Hopper's kernels and what they need, for one pass.
struct LightningHopper {
    cudaStream_t stream;
    Lightning g, d;  // of the sweeps from the first chunk to the last, and of those back
    Lightning r;     // of the kernels whose warpgroups have roles, which are used if `roles`
    LightningMaps maps;
    bool roles, wide;  // wide: roles in the backward pass above head size 64

    // u (N,3C); `states` (lightning_states() numbers): S before chunks, or null; d_o (N,C) and du (N,3C), or in the forward pass null and o (N,C).
    LightningHopper(cudaStream_t stream, const Lightning& pass, const floatX* u, const floatX* states, const floatX* d_o, const floatX* out,
                    const LightningMethod& method)
        : stream(stream),
          g(pass),
          d(pass),
          r(pass),
          roles(method.roles && pass.hs <= 64 && pass.every == 1),
          wide(method.roles && pass.hs > 64 && pass.every == 1) {
        int64_t C = g.channels(), hs = g.hs, N = g.tokens, count = std::max<int64_t>(N >> (6 + g.every), 1) * g.heads, parts = d_o ? 3 : 1;
        maps.u = tensor_map<3>(u, {hs, 3 * g.heads, N}, {hs, 3 * C}, {64, 1, 64});
        maps.d_o = d_o ? tensor_map<3>(d_o, {hs, g.heads, N}, {hs, C}, {64, 1, 64}) : maps.u;
        maps.out = tensor_map<4>(out, {hs, parts * g.heads, N, 1}, {hs, parts * C, parts * C * N}, {64, 1, 64, 1});
        maps.states = states ? tensor_map<4>(states, {hs, hs, count, 1}, {hs, hs * hs, hs * hs * count}, {64, 64, 1, 1}) : maps.u;
        LightningPlan plan;
        plan.kernel = 3;
        plan.columns = (int)hs;
        with_size([&](auto HS) {
            using Shape = lightning_wgmma::Shape<HS.value>;
            plan.shared = d_o ? Shape::BACKWARD_SHARED : Shape::FORWARD_SHARED;
            plan.most_blocks = d_o ? Shape::BACKWARD_BLOCKS : Shape::BLOCKS;
        });
        g.span = d.span = lightning_span(g, plan, method.scheme) > 0 ? lightning_even_span(g, plan) : 0;
        d.memory_from = nullptr;
        r.range = lightning_range(r, method.scheme, d_o ? 15 : 9);
        if (r.range) {
            r.span = LIGHTNING_RANGE_SPAN;
            // As many tails as there is room for (lightning_recurrence_scratch).
            const int64_t borders = std::max<int64_t>(ceil_div(r.slots(), r.range) - 1, 1), room = r.tokens / LIGHTNING_MIN_SPAN / borders;
            r.tail = (int)std::max<int64_t>(LIGHTNING_TAIL, ceil_div(r.range_chunks(), std::min<int64_t>(room, LightningTails::MOST)));
        }
    }
    static bool takes(const Lightning& g, const floatX* u, const floatX* d_o, const floatX* out) {
        return lightning_hopper(g.hs) && g.num_seqs > 0 && g.tokens > 0 && aligned16(u) && aligned16(d_o) && aligned16(out);
    }
    template <class F>
    void with_size(F f) const {
        if (g.hs <= 64)
            f(std::integral_constant<int, 64>());
        else
            f(std::integral_constant<int, 128>());
    }
    template <class... Arguments>
    void launch(void (*kernel)(Arguments...), int threads, int shared, std::common_type_t<Arguments>... arguments) const {
        allow_shared_memory(kernel, shared);
        kernel<<<(unsigned)(g.slots() * g.heads), threads, shared, stream>>>(arguments...);
        LAUNCH_CHECK();
    }
    dim3 by_states() const { return dim3((unsigned)(g.num_seqs * g.heads), (unsigned)ceil_div(g.head_state(), 256)); }
    // The states between spans.
    void borders(bool backwards, Scratch& scratch) {
        if (g.span == 0) return;
        Lightning& x = backwards ? d : g;
        x.borders = scratch.take<float>(g.tokens / g.span * g.heads * g.head_state());
        with_size([&](auto HS) {
            using Shape = lightning_wgmma::Shape<HS.value>;
            launch(lightning_span_kernel8<HS.value>, Shape::SPAN_THREADS, Shape::SPAN_SHARED, x, maps, backwards, LightningTails());
        });
        lightning_scan(stream, x, false, backwards);
    }
    // The states before chunks, where forward has not left them.
    void states(Scratch scratch) {
        borders(false, scratch);
        with_size([&](auto HS) {
            using Shape = lightning_wgmma::Shape<HS.value>;
            launch(lightning_states_kernel6<HS.value>, Shape::THREADS, Shape::STATES_SHARED, g, maps);
        });
    }
    // For the kernels whose warpgroups have roles: the tails at the borders between ranges, then the kernel itself.
    template <class... Parameters, class... Arguments>
    void launch_roles(bool backwards, Scratch& scratch, void (*kernel)(Parameters...), int threads, int shared, const Arguments&... arguments) {
        const int processors = device_properties().multiProcessorCount, ranges = r.range ? (int)ceil_div(r.slots(), r.range) : 0;
        if (ranges > 0) r.borders = scratch.take<float>(r.tokens / LIGHTNING_MIN_SPAN * r.heads * r.head_state());
        if (ranges > 1) {
            using Shape = lightning_wgmma::Shape<64>;
            LightningTails tails;
            tails.borders = ranges - 1;
            int levels = 0;
            for (int h = 0; h < r.heads; h++) {  // not fewer than the device, whose exp2 may differ in its last bit
                const int count = r.tails(std::min(chunks_that_count((float)(r.slope(h) * 1.442694)), r.range_chunks()));
                for (int a = 0; a < count; a++) tails.first[a + 1]++;
                levels = std::max(levels, count);
            }
            for (int a = 0; a < levels; a++) tails.first[a + 1] += tails.first[a];
            allow_shared_memory(lightning_span_kernel8<64>, Shape::SPAN_SHARED);
            lightning_span_kernel8<64>
                <<<(unsigned)(tails.borders * tails.first[levels]), Shape::SPAN_THREADS, Shape::SPAN_SHARED, stream>>>(r, maps, backwards, tails);
            LAUNCH_CHECK();
        }
        int64_t blocks = ranges ? (int64_t)ranges * r.heads : std::min<int64_t>((int64_t)r.num_seqs * r.heads, processors);
        // Neighbouring heads side by side: as many as leave room for all blocks at a time.
        auto together = [&](int cluster) { return r.heads % cluster == 0 && lightning_clusters(kernel, cluster, threads, shared) >= blocks; };
        const int cluster = together(4) ? 4 : r.heads % 2 == 0 ? 2 : 1;
        // Steps of two chunks; longer ones if there are more than can be counted.
        const int64_t chunks = ranges ? r.range_chunks() : ceil_div((int64_t)r.num_seqs * r.heads, blocks) * ceil_div((int64_t)r.max_len, 64);
        if (chunks >= 32 && together(cluster)) {
            r.step = (int)std::max<int64_t>(2, ceil_div(chunks, lightning_roles::STEPS));
            r.steps = (int)ceil_div(chunks, r.step);
        }
        launch_overlapping(stream, ranges > 1, cluster, kernel, blocks / cluster * cluster, threads, shared, r, arguments...);
        LAUNCH_CHECK();
    }
    void forward(floatX* o, bool leave_states, Scratch scratch) {
        if (roles) {
            using Shape = lightning_roles::Forward;
            launch_roles(false, scratch, lightning_forward_kernel8, Shape::THREADS, Shape::SHARED, o, maps, leave_states);
        } else {
            borders(false, scratch);
            with_size([&](auto HS) {
                using Shape = lightning_wgmma::Shape<HS.value>;
                launch(lightning_forward_kernel5<HS.value>, Shape::THREADS, Shape::FORWARD_SHARED, g, o, maps, leave_states);
            });
        }
        const Lightning& done = roles ? r : g;
        if (done.span == 0 || (!g.memory_to && !g.states)) return;
        lightning_finish_kernel<<<by_states(), 256, 0, stream>>>(done);
        LAUNCH_CHECK();
    }
    void backward(floatX* du, Scratch scratch) {
        if (roles) {
            using Shape = lightning_roles::Backward;
            launch_roles(true, scratch, lightning_backward_kernel9, Shape::THREADS, Shape::SHARED, du, maps);
            return;
        }
        borders(true, scratch);
        Lightning pass = d;
        pass.memory_from = g.memory_from;
        if (wide) {
            launch(lightning_backward_kernel10, lightning_wide::THREADS, lightning_wide::SHARED, pass, du, maps);
            return;
        }
        with_size([&](auto HS) {
            using Shape = lightning_wgmma::Shape<HS.value>;
            launch(lightning_backward_kernel8<HS.value>, Shape::THREADS, Shape::BACKWARD_SHARED, pass, du, maps);
        });
    }
};
#endif

// o (N,C) from u (N,3C), and the states that g.memory_to or g.states point at. `states` (lightning_states() numbers; null: not wanted): those before chunks,
// for backward. cpu::lightning_recurrence_forward.
inline void lightning_recurrence_forward(cudaStream_t stream, const Lightning& g, const floatX* u, floatX* o, Scratch scratch, const LightningMethod& method,
                                         floatX* states = nullptr) {
    int C = (int)g.channels();
    LightningSweep w = {{u, 3 * C, true}, {u + C, 3 * C, true}, {u + 2 * C, 3 * C, true}, {o, C, nullptr, 0}, false, false, {}, {}};
#ifndef GPU_FLOAT32
    if (method.hopper && LightningHopper::takes(g, u, u, o)) {
        LightningHopper(stream, g, u, states, nullptr, o, method).forward(o, states, scratch);
        return;
    }
    if (states && LightningHopper::takes(g, u, u, u)) LightningHopper(stream, g, u, states, nullptr, u, method).states(scratch);
#else
    (void)states;
#endif
    lightning_sweep(stream, g, w, scratch, method);
}

// du (N,3C) from d_o (N,C) and u (N,3C). Gradients stop at the states that sequences start from (g.memory_from). `states`: as forward has left them; null: they
// are computed again. cpu::lightning_recurrence_backward.
inline void lightning_recurrence_backward(cudaStream_t stream, Lightning g, const floatX* u, const floatX* d_o, floatX* du, Scratch scratch,
                                          const LightningMethod& method, const floatX* states = nullptr) {
    int C = (int)g.channels();
    LightningRows q = {u, 3 * C, true}, k = {u + C, 3 * C, true}, v = {u + 2 * C, 3 * C, true}, gradient = {d_o, C, false};
    LightningOutput dq = {du, 3 * C, u, 3 * C}, dk = {du + C, 3 * C, u + C, 3 * C}, dv = {du + 2 * C, 3 * C, u + 2 * C, 3 * C};
    g.memory_to = nullptr;
#ifndef GPU_FLOAT32
    if (method.hopper && LightningHopper::takes(g, u, d_o, du)) {
        bool missing = !states;
        if (missing) states = scratch.take<floatX>(std::max<int64_t>(g.tokens >> (6 + g.every), 1) * g.channels() * g.hs);
        LightningHopper hopper(stream, g, u, states, d_o, du, method);
        if (missing) hopper.states(scratch);
        hopper.backward(du, scratch);
        return;
    }
#else
    (void)states;
#endif
    lightning_sweep(stream, g, {gradient, v, k, dq, false, true, {}, {}}, scratch, method);
    g.memory_from = nullptr;
    lightning_sweep(stream, g, {k, q, gradient, dv, true, false, v, dk}, scratch, method);
}

// memory_from (num_seqs; device) as a table of the same in `copies`, where with `copy` they are put; `starts` (num_seqs). Forward keeps what sequences start
// from, because another sequence may leave its state in the same place.
inline void lightning_starts(cudaStream_t stream, const float** starts, float* copies, const float* const* memory_from, int num_seqs, int64_t size, bool copy) {
    if (num_seqs == 0) return;
    lightning_starts_kernel<<<dim3(num_seqs, copy ? (unsigned)std::min<int64_t>(32, ceil_div(size, 1024)) : 1), 256, 0, stream>>>(starts, copies, memory_from,
                                                                                                                                  size, copy);
    LAUNCH_CHECK();
}

// --------------------------------------------------------------------------------------------------------------------------------------------------
// 3. One more token

// S = λ·S + kᵀv, o = c·q·S for each sequence of one token: a block a sequence and head. S is read and written once, V columns (16 or 4 bytes) a thread, rows
// shared among the groups of threads that make a row.
constexpr int LIGHTNING_STEP_SUMS = 4 * LIGHTNING_THREADS;  // floats: a thread's columns

template <int V>
__device__ inline void lightning_step(float* S, const float* q, const float* k, const float* v, float lambda, int hs, float* sums, int* groups_out) {
    constexpr int AHEAD = 4;  // rows on their way
    int vectors = hs / V, width = min(vectors, LIGHTNING_THREADS), groups = LIGHTNING_THREADS / width, group = threadIdx.x / width;
    *groups_out = groups;
    if (group >= groups) return;
    for (int c = threadIdx.x % width * V; c < hs; c += width * V) {
        float o[V] = {};
        for (int i0 = group; i0 < hs; i0 += AHEAD * groups) {
            alignas(16) float x[AHEAD][V] = {};
#pragma unroll
            for (int a = 0; a < AHEAD; a++) {
                int i = i0 + a * groups;
                if (i >= hs) break;
                if constexpr (V == 4)
                    *(float4*)x[a] = *(const float4*)(S + (int64_t)i * hs + c);
                else
                    x[a][0] = S[(int64_t)i * hs + c];
            }
#pragma unroll
            for (int a = 0; a < AHEAD; a++) {
                int i = i0 + a * groups;
                if (i >= hs) break;
#pragma unroll
                for (int e = 0; e < V; e++) {
                    x[a][e] = lambda * x[a][e] + k[i] * v[c + e];
                    o[e] += q[i] * x[a][e];
                }
                if constexpr (V == 4)
                    *(float4*)(S + (int64_t)i * hs + c) = *(const float4*)x[a];
                else
                    S[(int64_t)i * hs + c] = x[a][0];
            }
        }
        for (int e = 0; e < V; e++) sums[group * hs + c + e] = o[e];
    }
}

__global__ void __launch_bounds__(LIGHTNING_THREADS) lightning_step_kernel(Lightning g, const floatX* u, floatX* o) {
    extern __shared__ int4 lightning_shared_memory[];
    int h = blockIdx.x % g.heads, s = blockIdx.x / g.heads, hs = g.hs, groups;
    int64_t n = g.cu_seqlens[s], C = g.channels(), at = n * 3 * C + (int64_t)h * hs;
    if (g.cu_seqlens[s + 1] - n != 1) return;
    float *q = (float*)lightning_shared_memory, *k = q + hs, *v = k + hs, *sums = v + hs;
    for (int i = threadIdx.x; i < hs; i += LIGHTNING_THREADS) {
        q[i] = silu(to_float(u[at + i]));
        k[i] = silu(to_float(u[at + C + i]));
        v[i] = silu(to_float(u[at + 2 * C + i]));
    }
    __syncthreads();
    float* S = g.states[s].fixed + h * g.head_state();
    float lambda = (float)exp(-g.slope(h));
    if (hs % 4 == 0 && (uintptr_t)S % 16 == 0)
        lightning_step<4>(S, q, k, v, lambda, hs, sums, &groups);
    else
        lightning_step<1>(S, q, k, v, lambda, hs, sums, &groups);
    __syncthreads();
    for (int j = threadIdx.x; j < hs; j += LIGHTNING_THREADS) {
        float sum = 0;
        for (int i = 0; i < groups; i++) sum += sums[i * hs + j];
        o[n * C + (int64_t)h * hs + j] = from_float<floatX>(g.scale * sum);
    }
}

// o (N,C) from u (N,3C) for the new tokens of each sequence, whose state g.states[s].fixed is brought up to date.
inline void lightning_recurrence_extend(cudaStream_t stream, Lightning g, const floatX* u, floatX* o, Scratch scratch, const LightningMethod& method) {
    if (g.num_seqs == 0) return;
    int64_t shared = (3 * g.hs + std::max(LIGHTNING_STEP_SUMS, g.hs)) * (int64_t)sizeof(float);
    allow_shared_memory(lightning_step_kernel, shared);
    lightning_step_kernel<<<(unsigned)(g.num_seqs * g.heads), LIGHTNING_THREADS, shared, stream>>>(g, u, o);
    LAUNCH_CHECK();
    g.min_len = 2;
    if (g.max_len > 1) lightning_recurrence_forward(stream, g, u, o, scratch, method);
}

}  // namespace gpu
