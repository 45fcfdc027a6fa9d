// The softmax core's backward pass: gradients of the queries, keys and values.
//
//     P = exp(scale·QKᵀ − lse)    dP = Z⊙(dO·Vᵀ)    dS = P⊙(dP − D),  D_i = Σ_c do_ic·o_ic
//     dV = (Z⊙P)ᵀdO               dK = scale·dSᵀQ                dQ = scale·dS·K
//
// FLOPs: 2·(3·d_qk + 2·d_v) for each visible pair of query and key and each head. Bytes: q, k, v, o, do read once, dq, dk, dv written once.
// GPT-2 124M, 64 sequences of 1024 tokens: 258 GFLOP and 806 MB, on an H100 0.37 ms at 690 TFLOP/s of matrix products and 0.27 ms at 3.0 TB/s. The products of
// all versions are 7 instead of 5 (gpt2/cuda/softmax_backward.cuh says why), 361 GFLOP and 0.52 ms; mma.sync, the tensor cores' instruction that every GPU
// from compute capability 8.0 on has, reaches about two thirds of an H100's matrix rate. So 1 ms would be very good for versions 3 to 6, and 2 ms is good.
//
// Versions 1 to 6 begin with softmax_backward_delta_kernel, which makes D and reads o and do once: 0.07 ms.
//
//  1  naive: a thread owns a row, of queries for dq or of keys for dk and dv, and walks over the rows of the other sort, its sums in an array. Every operand of
//     every product is a memory access: some TFLOP/s at best.
//  2  tiles: a block owns 64 rows and takes the others 64 at a time; operands are loaded into shared memory once for 64 rows that need them, and from there
//     into registers once for 4 or 8 numbers. Expected: a third of the float32 rate (67 TFLOP/s), ten times version 1. This is what float32 uses, and bf16
//     for sizes or strides that are no multiples of 8.
//  3  tensor cores: the same tiles as bf16, four warps of 16 rows. P and dS go from registers straight into the next product, since the warps make the
//     transposed tiles where keys own rows. Expected: five times version 2, held back by bank conflicts: rows of 128 bytes all begin in the same bank, so that
//     ldmatrix takes eight turns for what could be one.
//  4  swizzled: the 16-byte chunks of a row change places depending on the row's number, and ldmatrix never meets a bank twice. Expected: twice version 3.
//  5  pipelined: while a tile is worked on, the next one is on its way (cp.async) into a second buffer; a warp's own rows stay in registers as operands; masks
//     only where the diagonal, the window or an end runs through, and nothing at all is computed where nothing is visible. Expected: 1.5 times version 4.
//  6  32 rows a warp: each operand fetched from shared memory serves two products instead of one. Version 5 reads 128 bytes of shared memory, all that a
//     multiprocessor can in a cycle, for 2048 FLOPs, less than its tensor cores do in one; now these are the limit. Takes 255 registers a thread, two blocks a
//     multiprocessor. Expected: 1.3 times version 5. For larger heads there is no room for 32 rows. In use, but on a Hopper GPU.
//  7  Hopper (gpt2/cuda/softmax_backward_hopper.cuh): warpgroups multiply 64 rows at a time straight from shared memory, which one warpgroup fills by bulk
//     copies, and D is made on the way. For a pair of tiles of 128 queries and 128 keys of a head of 64 the 7 products take 3584 cycles of a multiprocessor,
//     the 2·128² exponentials 2048: 0.43 ms for the 27,648 pairs of GPT-2's shape if the tensor cores never wait. They do where a warpgroup waits for its
//     own scores and at both ends of a tile of owned rows. Expected: 60-70 % of that rate, 0.65-0.75 ms, half of version 6's time. In use.
#include "../../gpt2/cuda/softmax_backward.cuh"

#include "ladder.h"

namespace gpu {

using namespace softmax_bwd;

// ---- version 1 ------------------------------------------------------------------------------------------------------------------------------------------

constexpr int NAIVE_MAX_D = 256;

// P and dS of query i and key j of a sequence, both times 1−p: with dropout's factor taken out. z: whether dropout keeps the weight.
struct Weight {
    float p, ds;
    bool z;
};
__device__ inline Weight weight(const SoftmaxAttention& a, const SoftmaxGradients& g, const float2* stats, const Sequence& s, int seq, int h, int i, int j,
                                bool dropout) {
    const int kv = a.kv_head(h);
    const floatX *q = a.q + (s.q0 + i) * a.q_stride + h * (int64_t)a.d_qk, *k = a.k + (s.k0 + j) * a.k_stride + kv * a.k_head;
    const floatX *d_o = g.d_o + (s.q0 + i) * g.do_stride + h * (int64_t)a.d_v, *v = a.v + (s.k0 + j) * a.v_stride + kv * a.v_head;
    float score = 0, dp = 0;
    for (int c = 0; c < a.d_qk; c++) score += to_float(q[c]) * to_float(k[c]);
    for (int c = 0; c < a.d_v; c++) dp += to_float(d_o[c]) * to_float(v[c]);
    float2 row = stats[h * a.q_rows + s.q0 + i];
    bool z = !dropout || Dropout(a, seq, h).keeps(a, i + s.shift, j);
    float p = exp2f(score * a.scale * LOG2E - row.x);
    return {p, p * ((z ? dp : 0) - row.y), z};
}

__global__ void softmax_backward_dq_kernel1(SoftmaxAttention a, SoftmaxGradients g, const float2* stats, int tiles, bool dropout) {
    const Piece b(a.heads, tiles);
    const Sequence s(a, b.seq, false);
    const int i = b.tile * THREADS + threadIdx.x;
    if (i >= s.n_q) return;
    float dq[NAIVE_MAX_D];
    for (int c = 0; c < a.d_qk; c++) dq[c] = 0;
    const Range range = keys_of(a, s, i, i + 1);
    for (int j = range.begin; j < range.end; j++) {
        Weight w = weight(a, g, stats, s, b.seq, b.head, i, j, dropout);
        const floatX* k = a.k + (s.k0 + j) * a.k_stride + a.kv_head(b.head) * a.k_head;
        for (int c = 0; c < a.d_qk; c++) dq[c] += w.ds * to_float(k[c]);
    }
    const float factor = a.scale * (dropout ? a.dropout.scale : 1);
    for (int c = 0; c < a.d_qk; c++) g.dq[(s.q0 + i) * g.dq_stride + b.head * (int64_t)a.d_qk + c] = from_float<floatX>(dq[c] * factor);
}

__global__ void softmax_backward_dkv_kernel1(SoftmaxAttention a, SoftmaxGradients g, const float2* stats, int tiles, bool dropout) {
    const Piece b(a.kv_heads, tiles);
    const Sequence s(a, b.seq, false);
    const int j = b.tile * THREADS + threadIdx.x, group = a.heads / a.kv_heads;
    if (j >= s.n_k) return;
    float dk[NAIVE_MAX_D], dv[NAIVE_MAX_D];
    for (int c = 0; c < a.d_qk; c++) dk[c] = 0;
    for (int c = 0; c < a.d_v; c++) dv[c] = 0;
    const Range range = queries_of(a, s, j, j + 1);
    for (int h = b.head * group; h < (b.head + 1) * group; h++)
        for (int i = range.begin; i < range.end; i++) {
            Weight w = weight(a, g, stats, s, b.seq, h, i, j, dropout);
            const floatX *q = a.q + (s.q0 + i) * a.q_stride + h * (int64_t)a.d_qk, *d_o = g.d_o + (s.q0 + i) * g.do_stride + h * (int64_t)a.d_v;
            for (int c = 0; c < a.d_qk; c++) dk[c] += w.ds * to_float(q[c]);
            for (int c = 0; w.z && c < a.d_v; c++) dv[c] += w.p * to_float(d_o[c]);
        }
    const float factor = dropout ? a.dropout.scale : 1;
    for (int c = 0; c < a.d_qk; c++) g.dk[(s.k0 + j) * g.dk_stride + b.head * g.dk_head + c] = from_float<floatX>(dk[c] * a.scale * factor);
    for (int c = 0; c < a.d_v; c++) g.dv[(s.k0 + j) * g.dv_stride + b.head * g.dv_head + c] = from_float<floatX>(dv[c] * factor);
}

static bool launch1(cudaStream_t stream, const SoftmaxAttention& a, const SoftmaxGradients& g, const float2* stats) {
    const int k_tiles = (int)ceil_div(a.max_k, THREADS), q_tiles = (int)ceil_div(a.max_q, THREADS);
    if (std::max(a.d_qk, a.d_v) > NAIVE_MAX_D || (double)a.heads * a.q_rows * a.max_k > 3e8) return false;
    if (k_tiles > 0) softmax_backward_dkv_kernel1<<<grid_size(a.num_seqs, a.kv_heads, k_tiles), THREADS, 0, stream>>>(a, g, stats, k_tiles, a.dropout.p > 0);
    LAUNCH_CHECK();
    if (q_tiles > 0) softmax_backward_dq_kernel1<<<grid_size(a.num_seqs, a.heads, q_tiles), THREADS, 0, stream>>>(a, g, stats, q_tiles, a.dropout.p > 0);
    LAUNCH_CHECK();
    return true;
}

// ---- versions 3 and 4 -----------------------------------------------------------------------------------------------------------------------------------
#ifndef GPU_FLOAT32

// Rows one behind another.
template <int D>
struct Plain {
    __device__ static int at(int row, int chunk) { return row * (D / 8) + chunk; }
    __device__ static uint32_t step(uint32_t address, int c) { return address + 2 * c * 16; }
};

// 64 rows from `first` on, through registers; zeros for rows outside [0, end) and columns from d on.
template <template <int> class Layout, int D>
__device__ inline void load_rows(int4* to, const floatX* from, int64_t stride, int first, int end, int d) {
    for (int at = threadIdx.x; at < 64 * (D / 8); at += THREADS) {
        int row = at / (D / 8), chunk = at % (D / 8), j = first + row;
        to[Layout<D>::at(row, chunk)] = j < end && chunk * 8 < d ? *(const int4*)(from + j * stride + chunk * 8) : make_int4(0, 0, 0, 0);
    }
}

// A warp's 16 rows straight to global memory, two numbers at a time.
template <int D>
__device__ inline void store_pairs(floatX* to, int64_t stride, const float (&acc)[1][D / 8][4], float factor, int rows, int d) {
    int lane = threadIdx.x % 32;
#pragma unroll
    for (int half = 0; half < 2; half++)
#pragma unroll
        for (int c = 0; c < D / 8; c++) {
            int row = half * 8 + lane / 4, column = c * 8 + lane % 4 * 2;
            if (row < rows && column < d) *(uint32_t*)(to + row * stride + column) = pack_bf16(acc[0][c][half * 2] * factor, acc[0][c][half * 2 + 1] * factor);
        }
}

template <template <int> class Layout, int D>
__global__ void __launch_bounds__(THREADS, 2) softmax_backward_dkv_kernel3(SoftmaxAttention a, SoftmaxGradients g, const float2* stats, int tiles) {
    extern __shared__ __align__(128) int4 softmax_backward_shared[];
    constexpr int TILE = 64 * D / 8;
    int4 *k = softmax_backward_shared, *v = k + TILE, *q = v + TILE, *d_o = q + TILE;
    const uint32_t shared_k = (uint32_t)__cvta_generic_to_shared(k), shared_q = shared_k + 2 * TILE * 16, warp_rows = threadIdx.x / 32 * 16 * (D * 2);
    const Piece b(a.kv_heads, tiles);
    const Sequence s(a, b.seq, false);
    const int j0 = b.tile * 64, group = a.heads / a.kv_heads, lane = threadIdx.x % 32, first = j0 + threadIdx.x / 32 * 16;
    if (j0 >= s.n_k) return;
    const Range range = queries_of(a, s, j0, j0 + 64);
    float dk[1][D / 8][4] = {}, dv[1][D / 8][4] = {};
    load_rows<Layout, D>(k, a.k + s.k0 * a.k_stride + b.head * a.k_head, a.k_stride, j0, s.n_k, a.d_qk);
    load_rows<Layout, D>(v, a.v + s.k0 * a.v_stride + b.head * a.v_head, a.v_stride, j0, s.n_k, a.d_v);
    for (int h = b.head * group; h < (b.head + 1) * group; h++)
        for (int i0 = range.begin; i0 < range.end; i0 += 64) {
            __syncthreads();  // the tile before has been read
            load_rows<Layout, D>(q, a.q + s.q0 * a.q_stride + h * (int64_t)a.d_qk, a.q_stride, i0, s.n_q, a.d_qk);
            load_rows<Layout, D>(d_o, g.d_o + s.q0 * g.do_stride + h * (int64_t)a.d_v, g.do_stride, i0, s.n_q, a.d_v);
            __syncthreads();
            float p[1][8][4] = {}, dp[1][8][4] = {};
            uint32_t none[1][1][4] = {}, weights[4][1][4], ds[4][1][4];
            multiply<Layout, D>(p, none, shared_k + warp_rows, shared_q);
            multiply<Layout, D>(dp, none, shared_k + TILE * 16 + warp_rows, shared_q + TILE * 16);
#pragma unroll
            for (int nt = 0; nt < 8; nt++) {
#pragma unroll
                for (int e = 0; e < 4; e++) {
                    int j = first + e / 2 * 8 + lane / 4, i = i0 + nt * 8 + lane % 4 * 2 + e % 2;
                    bool seen = i < s.n_q && j < s.n_k && visible(i + s.shift, j, a.window);
                    float2 row = seen ? stats[h * a.q_rows + s.q0 + i] : make_float2(0, 0);
                    float weight = seen ? exp2f(p[0][nt][e] * a.scale * LOG2E - row.x) : 0;
                    p[0][nt][e] = weight;
                    dp[0][nt][e] = seen ? weight * (dp[0][nt][e] - row.y) : 0;
                }
                set_operand(weights, 0, nt, p[0][nt]);
                set_operand(ds, 0, nt, dp[0][nt]);
            }
            accumulate<Layout, D>(dv, weights, shared_q + TILE * 16);
            accumulate<Layout, D>(dk, ds, shared_q);
        }
    store_pairs<D>(g.dk + (s.k0 + first) * g.dk_stride + b.head * g.dk_head, g.dk_stride, dk, a.scale, s.n_k - first, a.d_qk);
    store_pairs<D>(g.dv + (s.k0 + first) * g.dv_stride + b.head * g.dv_head, g.dv_stride, dv, 1, s.n_k - first, a.d_v);
}

template <template <int> class Layout, int D>
__global__ void __launch_bounds__(THREADS, 2) softmax_backward_dq_kernel3(SoftmaxAttention a, SoftmaxGradients g, const float2* stats, int tiles) {
    extern __shared__ __align__(128) int4 softmax_backward_shared[];
    constexpr int TILE = 64 * D / 8;
    int4 *q = softmax_backward_shared, *d_o = q + TILE, *k = d_o + TILE, *v = k + TILE;
    const uint32_t shared_q = (uint32_t)__cvta_generic_to_shared(q), shared_k = shared_q + 2 * TILE * 16, warp_rows = threadIdx.x / 32 * 16 * (D * 2);
    const Piece b(a.heads, tiles);
    const Sequence s(a, b.seq, false);
    const int i0 = (tiles - 1 - b.tile) * 64, kv = a.kv_head(b.head), lane = threadIdx.x % 32, first = i0 + threadIdx.x / 32 * 16;
    if (i0 >= s.n_q) return;
    const Range range = keys_of(a, s, i0, i0 + 64);
    float dq[1][D / 8][4] = {};
    load_rows<Layout, D>(q, a.q + s.q0 * a.q_stride + b.head * (int64_t)a.d_qk, a.q_stride, i0, s.n_q, a.d_qk);
    load_rows<Layout, D>(d_o, g.d_o + s.q0 * g.do_stride + b.head * (int64_t)a.d_v, g.do_stride, i0, s.n_q, a.d_v);
    for (int j0 = range.begin; j0 < range.end; j0 += 64) {
        __syncthreads();  // the tile before has been read
        load_rows<Layout, D>(k, a.k + s.k0 * a.k_stride + kv * a.k_head, a.k_stride, j0, s.n_k, a.d_qk);
        load_rows<Layout, D>(v, a.v + s.k0 * a.v_stride + kv * a.v_head, a.v_stride, j0, s.n_k, a.d_v);
        __syncthreads();
        float p[1][8][4] = {}, dp[1][8][4] = {};
        uint32_t none[1][1][4] = {}, ds[4][1][4];
        multiply<Layout, D>(p, none, shared_q + warp_rows, shared_k);
        multiply<Layout, D>(dp, none, shared_q + TILE * 16 + warp_rows, shared_k + TILE * 16);
#pragma unroll
        for (int nt = 0; nt < 8; nt++) {
#pragma unroll
            for (int e = 0; e < 4; e++) {
                int i = first + e / 2 * 8 + lane / 4, j = j0 + nt * 8 + lane % 4 * 2 + e % 2;
                bool seen = i < s.n_q && j < s.n_k && visible(i + s.shift, j, a.window);
                float2 row = seen ? stats[b.head * a.q_rows + s.q0 + i] : make_float2(0, 0);
                dp[0][nt][e] = seen ? exp2f(p[0][nt][e] * a.scale * LOG2E - row.x) * (dp[0][nt][e] - row.y) : 0;
            }
            set_operand(ds, 0, nt, dp[0][nt]);
        }
        accumulate<Layout, D>(dq, ds, shared_k);
    }
    store_pairs<D>(g.dq + (s.q0 + first) * g.dq_stride + b.head * (int64_t)a.d_qk, g.dq_stride, dq, a.scale, s.n_q - first, a.d_qk);
}

template <template <int> class Layout, int D>
static void launch3(cudaStream_t stream, const SoftmaxAttention& a, const SoftmaxGradients& g, const float2* stats) {
    constexpr int bytes = 4 * 64 * D * 2;
    const int k_tiles = (int)ceil_div(a.max_k, 64), q_tiles = (int)ceil_div(a.max_q, 64);
    auto dkv = softmax_backward_dkv_kernel3<Layout, D>;
    auto dq = softmax_backward_dq_kernel3<Layout, D>;
    allow_shared_memory(dkv, bytes);
    allow_shared_memory(dq, bytes);
    if (k_tiles > 0) dkv<<<grid_size(a.num_seqs, a.kv_heads, k_tiles), THREADS, bytes, stream>>>(a, g, stats, k_tiles);
    LAUNCH_CHECK();
    if (q_tiles > 0) dq<<<grid_size(a.num_seqs, a.heads, q_tiles), THREADS, bytes, stream>>>(a, g, stats, q_tiles);
    LAUNCH_CHECK();
}

template <template <int> class Layout>
static bool launch3(cudaStream_t stream, const SoftmaxAttention& a, const SoftmaxGradients& g, const float2* stats) {
    if (!fits_tensor_cores(a, g) || a.dropout.p > 0 || std::max(a.d_qk, a.d_v) > 128) return false;
    if (std::max(a.d_qk, a.d_v) <= 64)
        launch3<Layout, 64>(stream, a, g, stats);
    else
        launch3<Layout, 128>(stream, a, g, stats);
    return true;
}

// ---- version 5 ------------------------------------------------------------------------------------------------------------------------------------------

static bool launch5(cudaStream_t stream, const SoftmaxAttention& a, const SoftmaxGradients& g, const float2* stats) {
    if (!fits_tensor_cores(a, g) || a.dropout.p > 0 || std::max(a.d_qk, a.d_v) > 64) return false;  // larger heads: version 6 is the same
    launch6<Shape<64, 64, 1, 64, 16, 3>, Shape<64, 64, 1, 64, 32, 3>, false>(stream, a, g, stats);
    return true;
}

#endif

// The gradients without the bias's.
static bool launch(int version, cudaStream_t stream, const SoftmaxAttention& attention, const SoftmaxGradients& g, Scratch scratch) {
    SoftmaxAttention a = attention;
    if (a.window >= a.max_k) a.window = 0;
    float2* stats = scratch.take<float2>(a.heads * a.q_rows);
    launch_delta(stream, a, g, stats);
    if (version == 1) return launch1(stream, a, g, stats);
    if (version == 2) return launch2(stream, a, g, stats), true;
#ifndef GPU_FLOAT32
    if (version == 3) return launch3<Plain>(stream, a, g, stats);
    if (version == 4) return launch3<Swizzled>(stream, a, g, stats);
    if (version == 5) return launch5(stream, a, g, stats);
    if (version == 6 && fits_tensor_cores(a, g)) return launch6(stream, a, g, stats), true;
#endif
    return false;
}

static bool backward(int version, cudaStream_t stream, const SoftmaxAttention& a, const SoftmaxGradients& g, Scratch scratch) {
    if (version == 7) return softmax_backward(stream, a, g, scratch), true;
    if (!launch(version, stream, a, g, scratch)) return false;
    launch_bias(stream, a, g);
    return true;
}

}  // namespace gpu

// ---- problems -------------------------------------------------------------------------------------------------------------------------------------------

struct Problem {
    int heads, kv_heads, d_qk, d_v;
    std::vector<int> q_lens, k_lens;
    int window = 0;
    double dropout = 0;
    bool pieces = false;  // the sequences are pieces of longer ones, for dropout
    int v_gap = 0;        // numbers between the values of neighbouring heads

    int num_seqs() const { return (int)q_lens.size(); }
    bool packed() const { return q_lens == k_lens && v_gap == 0; }  // q, k, v side by side in one row, as in training
    int64_t q_width() const { return (int64_t)heads * d_qk; }
    int64_t kv_width(int gap) const { return (int64_t)kv_heads * (d_qk + d_v + gap); }
    int64_t o_width() const { return (int64_t)heads * d_v; }
    static std::vector<int> offsets(const std::vector<int>& lens) {
        std::vector<int> cu{0};
        for (int n : lens) cu.push_back(cu.back() + n);
        return cu;
    }
    static int largest(const std::vector<int>& lens) { return *std::max_element(lens.begin(), lens.end()); }
    std::string name() const {
        std::string s = "B" + std::to_string(num_seqs()) + " H" + std::to_string(heads);
        if (kv_heads != heads) s += "/" + std::to_string(kv_heads);
        s += " T" + std::to_string(largest(q_lens));
        if (q_lens != k_lens) s += "/" + std::to_string(largest(k_lens));
        s += " D" + std::to_string(d_qk);
        if (d_v != d_qk) s += "/" + std::to_string(d_v);
        if (window) s += " window " + std::to_string(window);
        if (dropout > 0) s += pieces ? " dropout of pieces" : " dropout";
        return s;
    }

    // What the CPU's and the GPU's structs have in common; q and kv are the rows of either, kv null if packed.
    template <class Attention, class T>
    Attention attention(const T* q, const T* kv, const int* cu_q, const int* cu_k) const {
        Attention a{};
        a.heads = heads, a.kv_heads = kv_heads, a.d_qk = d_qk, a.d_v = d_v;
        a.scale = 1 / std::sqrt((float)d_qk);
        a.window = window;
        a.num_seqs = num_seqs();
        a.cu_q = cu_q, a.cu_k = cu_k;
        a.q = q;
        a.k = packed() ? q + q_width() : kv;
        a.v = a.k + kv_heads * d_qk + v_gap;
        a.q_stride = packed() ? q_width() + kv_width(0) : q_width();
        a.k_stride = a.v_stride = packed() ? a.q_stride : kv_width(v_gap);
        a.k_head = d_qk, a.v_head = d_v + v_gap;
        return a;
    }
    template <class Gradients, class T>
    void gradients(Gradients& g, T* dq, T* dkv) const {
        g.o_stride = g.do_stride = o_width();
        g.dq = dq;
        g.dk = packed() ? dq + q_width() : dkv;
        g.dv = g.dk + kv_heads * d_qk;
        g.dq_stride = packed() ? q_width() + kv_width(0) : q_width();
        g.dk_stride = g.dv_stride = packed() ? g.dq_stride : kv_width(0);
        g.dk_head = d_qk, g.dv_head = d_v;
    }
    int64_t q_numbers(int64_t q_rows) const { return q_rows * (packed() ? q_width() + kv_width(0) : q_width()); }
    int64_t kv_numbers(int64_t k_rows, int gap) const { return packed() ? 0 : k_rows * kv_width(gap); }
};

static Problem uniform(int B, int heads, int T, int d_qk, int d_v) { return {heads, heads, d_qk, d_v, std::vector<int>(B, T), std::vector<int>(B, T)}; }

// Rows of `width` numbers, `stride` apart, from `offset` on.
static std::vector<float> columns(const std::vector<float>& x, int64_t rows, int64_t stride, int64_t offset, int64_t width) {
    std::vector<float> y(rows * width);
    for (int64_t n = 0; n < rows; n++) std::copy_n(x.begin() + n * stride + offset, width, y.begin() + n * width);
    return y;
}

// `absolute`: for gradients that are exactly zero, and on either side a difference of two rounded sums.
static void check(Ladder& ladder, const Problem& p, double absolute = 1e-6) {
    constexpr uint64_t SEED = 5;
    constexpr uint32_t STEP = 7, LAYER = 2, LAYERS = 3;
    constexpr int64_t FIRST_ROW = 40;
    const std::vector<int> cu_q = Problem::offsets(p.q_lens), cu_k = Problem::offsets(p.k_lens);
    const int64_t q_rows = cu_q.back(), k_rows = cu_k.back();
    std::vector<int> drop_seq, drop_pos;
    for (int s = 0; s < p.num_seqs(); s++) drop_seq.push_back(s / 2), drop_pos.push_back(s * 37 % 101);

    // The CPU's forward and backward pass. It gets o as the GPU does: rounded.
    std::vector<float> q = random_numbers(p.q_numbers(q_rows), 1), kv = random_numbers(p.kv_numbers(k_rows, p.v_gap), 2),
                       d_o = random_numbers(q_rows * p.o_width(), 3);
    std::vector<float> o(q_rows * p.o_width()), lse(q_rows * p.heads), dq(p.q_numbers(q_rows)), dkv(p.kv_numbers(k_rows, 0));
    cpu::SoftmaxAttention host = p.attention<cpu::SoftmaxAttention, float>(q.data(), kv.data(), cu_q.data(), cu_k.data());
    host.dropout = {p.dropout, SEED, STEP * LAYERS + LAYER, FIRST_ROW};
    if (p.pieces) host.drop_seq = drop_seq.data(), host.drop_pos = drop_pos.data();
    std::vector<float> transposed(cpu::softmax_forward_scratch(k_rows, p.kv_heads, p.d_qk));
    cpu::softmax_forward(host, o.data(), p.o_width(), lse.data(), cpu::Scratch{transposed.data(), (int64_t)transposed.size()});
    for (float& x : o) x = round_to_working_type(x);
    cpu::SoftmaxGradients host_g{};
    host_g.o = o.data(), host_g.lse = lse.data(), host_g.d_o = d_o.data();
    p.gradients(host_g, dq.data(), dkv.data());
    cpu::softmax_backward(host, host_g);

    std::vector<float> lse_by_heads(lse.size());
    for (int64_t n = 0; n < q_rows; n++)
        for (int h = 0; h < p.heads; h++) lse_by_heads[h * q_rows + n] = lse[n * p.heads + h];
    using gpu::floatX;
    DeviceArray<floatX> gpu_q(q), gpu_kv(kv), gpu_do(d_o), gpu_o(o), gpu_dq(dq.size()), gpu_dkv(dkv.size());
    DeviceArray<float> gpu_lse(lse_by_heads);
    DeviceArray<int> gpu_cu_q(cu_q), gpu_cu_k(cu_k), gpu_seq(drop_seq), gpu_pos(drop_pos);
    DeviceArray<gpu::PassCounters> counters(1);
    gpu::PassCounters now{STEP, FIRST_ROW};
    CUDA_CHECK(cudaMemcpy(counters.data, &now, sizeof now, cudaMemcpyHostToDevice));
    gpu::SoftmaxAttention a = p.attention<gpu::SoftmaxAttention, floatX>(gpu_q, gpu_kv, gpu_cu_q, gpu_cu_k);
    a.max_q = Problem::largest(p.q_lens), a.max_k = Problem::largest(p.k_lens), a.q_rows = q_rows;
    a.dropout = gpu::dropout_key(p.dropout, SEED, LAYER, LAYERS, counters);
    if (p.pieces) a.drop_seq = gpu_seq, a.drop_pos = gpu_pos;
    gpu::SoftmaxGradients g{};
    g.o = gpu_o, g.d_o = gpu_do, g.lse = gpu_lse;
    p.gradients(g, gpu_dq.data, gpu_dkv.data);
    DeviceArray<char> scratch(gpu::softmax_backward_scratch(p.heads, p.kv_heads, p.d_qk, p.d_v, q_rows, k_rows));

    const int64_t k_width = (int64_t)p.kv_heads * p.d_qk, v_width = (int64_t)p.kv_heads * p.d_v;
    auto part = [&](const char* name, DeviceArray<floatX>& device, const std::vector<float>& reference, int64_t rows, int64_t stride, int64_t offset,
                    int64_t width) {
        Output x = output(name, device, columns(reference, rows, stride, offset, width), TOLERANCE, absolute);
        x.read = [&device, rows, stride, offset, width] { return columns(device.to_host(), rows, stride, offset, width); };
        return x;
    };
    const int64_t kv_offset = p.packed() ? p.q_width() : 0;
    DeviceArray<floatX>& keys = p.packed() ? gpu_dq : gpu_dkv;
    const std::vector<float>& keys_reference = p.packed() ? dq : dkv;
    std::vector<Output> outputs{part("dq", gpu_dq, dq, q_rows, g.dq_stride, 0, p.q_width()),
                                part("dk", keys, keys_reference, k_rows, g.dk_stride, kv_offset, k_width),
                                part("dv", keys, keys_reference, k_rows, g.dv_stride, kv_offset + k_width, v_width)};
    // The bias's gradient, if q, k, v are what a training step has. That of the keys is zero but for rounding, since the rows of dS add up to zero: what may be
    // wrong is measured by what a sum of so many numbers of any sign would be.
    DeviceArray<float> dbias(p.packed() ? g.dq_stride : 0);
    const std::vector<float> initial = random_numbers(dbias.size, 4);
    auto sums = [&](const char* name, int64_t offset, int64_t width) {
        std::vector<float> reference(initial.begin() + offset, initial.begin() + offset + width);
        double squares = 0;
        for (int64_t n = 0; n < q_rows; n++)
            for (int64_t c = 0; c < width; c++) {
                float x = dq[n * g.dq_stride + offset + c];
                reference[c] += x;
                squares += (double)x * x;
            }
        Output x = accumulated(name, dbias, initial, reference, 2e-6, TOLERANCE * std::sqrt(squares / width) + absolute * q_rows);
        x.read = [&dbias, offset, width] { return columns(dbias.to_host(), 1, dbias.size, offset, width); };
        outputs.push_back(x);
    };
    if (p.packed()) {
        g.dbias = dbias;
        sums("sums of dq", 0, kv_offset);
        sums("sums of dk", kv_offset, k_width);
        sums("sums of dv", kv_offset + k_width, v_width);
    }
    ladder.check(p.name(), outputs, [&](int version) { return gpu::backward(version, ladder.stream, a, g, gpu::Scratch{scratch, scratch.size}); });
}

// Numbers that repeat, since making so many random ones takes long.
static void fill(DeviceArray<gpu::floatX>& x, const DeviceArray<gpu::floatX>& random) {
    for (int64_t i = 0; i < x.size; i += random.size)
        CUDA_CHECK(cudaMemcpy(x.data + i, random.data, std::min(random.size, x.size - i) * sizeof(gpu::floatX), cudaMemcpyDeviceToDevice));
}

static void time(Ladder& ladder, const Problem& p, bool bias = false) {
    const std::vector<int> cu_q = Problem::offsets(p.q_lens), cu_k = Problem::offsets(p.k_lens);
    const int64_t q_rows = cu_q.back(), k_rows = cu_k.back();
    using gpu::floatX;
    DeviceArray<floatX> random(random_numbers(1 << 20, 1)), q(p.q_numbers(q_rows)), kv(p.kv_numbers(k_rows, p.v_gap)), d_o(q_rows * p.o_width()), o(d_o.size);
    DeviceArray<floatX> dq(q.size), dkv(p.kv_numbers(k_rows, 0));
    for (DeviceArray<floatX>* x : {&q, &kv, &d_o, &o}) fill(*x, random);
    DeviceArray<float> lse(std::vector<float>(q_rows * p.heads, std::log((float)Problem::largest(p.k_lens))));  // about right
    DeviceArray<int> gpu_cu_q(cu_q), gpu_cu_k(cu_k);
    gpu::SoftmaxAttention a = p.attention<gpu::SoftmaxAttention, floatX>(q, kv, gpu_cu_q, gpu_cu_k);
    a.max_q = Problem::largest(p.q_lens), a.max_k = Problem::largest(p.k_lens), a.q_rows = q_rows;
    gpu::SoftmaxGradients g{};
    g.o = o, g.d_o = d_o, g.lse = lse;
    p.gradients(g, dq.data, dkv.data);
    DeviceArray<char> scratch(gpu::softmax_backward_scratch(p.heads, p.kv_heads, p.d_qk, p.d_v, q_rows, k_rows));
    DeviceArray<float> dbias(std::vector<float>(g.dq_stride));
    if (bias) g.dbias = dbias;
    double pairs = 0;
    for (int n : p.q_lens) pairs += 0.5 * n * (n + 1.0);  // n_q = n_k, no window
    Work work{2.0 * pairs * p.heads * (3 * p.d_qk + 2 * p.d_v),
              (2.0 * (q_rows * p.q_width() + k_rows * p.kv_width(0)) + 2.0 * q_rows * p.o_width()) * sizeof(floatX)};
    ladder.time(p.name() + (bias ? " with bias" : ""), work, [&](int version) {
        return gpu::backward(version, ladder.stream, a, g, gpu::Scratch{scratch, scratch.size});
    });
}

int main(int argc, char** argv) {
    Ladder ladder("attention_backward",
                  {"a thread a row", "tiles in shared memory and registers (in use)", "tensor cores", "swizzled shared memory",
                   "pipelined, own rows in registers, masks only where needed", "32 rows a warp (in use)", "Hopper: warpgroups, bulk copies (in use)"},
                  argc, argv);

    for (int T : {63, 64, 65, 200}) check(ladder, uniform(2, 3, T, 64, 64));
    check(ladder, uniform(3, 2, 1, 64, 64), 1e-4);  // p = 1: dq and dk are zero
    check(ladder, uniform(1, 12, 1024, 64, 64));
    for (int d : {16, 32, 80, 96, 128, 20, 5, 136}) check(ladder, uniform(2, 2, 200, d, d));  // the last three: kernel 2
    for (int T : {1, 130, 333}) {
        check(ladder, uniform(2, 2, T, 96, 64), T == 1 ? 1e-4 : 1e-6);
        Problem mla = uniform(2, 2, T, 192, 128);
        mla.v_gap = 128;
        check(ladder, mla, T == 1 ? 1e-4 : 1e-6);
    }
    const std::vector<int> ragged{0, 5, 130, 0, 64, 300, 1, 0}, few_queries{1, 5, 64, 100, 0, 70, 80}, many_keys{1, 300, 64, 163, 20, 200, 30};
    check(ladder, {3, 3, 64, 64, ragged, ragged});
    check(ladder, {2, 2, 128, 128, ragged, ragged});
    check(ladder, {3, 3, 64, 64, few_queries, many_keys});  // the last: queries that see no key
    check(ladder, {2, 1, 128, 128, few_queries, many_keys});
    for (int window : {1, 17, 100, 1000}) check(ladder, {2, 2, 64, 64, {300, 40}, {300, 40}, window}, window == 1 ? 1e-4 : 1e-6);
    check(ladder, {2, 2, 64, 64, few_queries, many_keys, 30});
    check(ladder, {2, 2, 192, 128, few_queries, many_keys, 30});
    check(ladder, {12, 4, 64, 64, {150, 33}, {150, 33}});
    check(ladder, {4, 1, 20, 12, {150, 33}, {150, 33}, 50});
    // Around the tiles of 64 and 128 rows; 128 keys and 128 queries are a block's.
    const std::vector<std::pair<int, int>> sizes{{64, 64}, {128, 128}, {96, 64}, {192, 128}};
    for (auto [d_qk, d_v] : sizes) {
        for (int T : {127, 128, 129, 257}) check(ladder, uniform(2, 2, T, d_qk, d_v));
        check(ladder, uniform(1, 1, 1000, d_qk, d_v));
        check(ladder, {4, 2, d_qk, d_v, ragged, ragged});
        check(ladder, {2, 1, d_qk, d_v, few_queries, many_keys});
        check(ladder, {2, 2, d_qk, d_v, {1, 300, 129, 64}, {700, 500, 130, 64}, 90});
        check(ladder, {2, 2, d_qk, d_v, {500}, {500}, 65});
        check(ladder, {4, 1, d_qk, d_v, {400, 7}, {400, 7}, 65});
        check(ladder, {4, 1, d_qk, d_v, {100, 300}, {350, 300}, 200});
    }
    for (int d : {64, 32, 96, 128, 20}) {
        check(ladder, {4, 2, d, d, {200, 31}, {200, 31}, 0, 0.1});
        check(ladder, {4, 2, d, d, few_queries, many_keys, 50, 0.1, true});
    }
    check(ladder, {2, 2, 96, 64, few_queries, many_keys, 0, 0.1, true});
    check(ladder, {2, 2, 192, 128, few_queries, many_keys, 0, 0.1, true});
    check(ladder, {2, 2, 64, 64, {1, 300, 64}, {1, 300, 64}, 0, 0.1, true});

    time(ladder, uniform(64, 12, 1024, 64, 64));
    time(ladder, uniform(64, 12, 1024, 64, 64), true);
    time(ladder, uniform(8, 12, 8192, 64, 64));
    time(ladder, uniform(2, 12, 32768, 64, 64));
    time(ladder, uniform(8, 16, 4096, 128, 128));
    time(ladder, uniform(64, 12, 1024, 96, 64));
    time(ladder, uniform(4, 16, 8192, 192, 128));
    time(ladder, uniform(256, 12, 256, 64, 64));
    return ladder.finish();
}
