// Softmax attention, forward. The equations and the versions in use: gpt2/cuda/softmax_forward.cuh. The reference: cpu::softmax_forward in attention.h.
//
//     ./attention_forward        all versions, checked and timed           ./attention_forward 5        version 5 alone
//
// What must be done for B sequences of T tokens, causal: 2·(d_qk+d_v) FLOPs for each of B·NH·T·(T+1)/2 pairs; q, k, v read and o written once. At B 64,
// NH 12, T 1024, d 64: 103 GFLOP, 0.15 ms at 690 TFLOP/s; 0.4 GB, 0.14 ms at 3.0 TB/s. mma.sync reaches some 60% of that FLOP rate on an H100 (the rest needs
// wgmma), and each of 0.4·10⁹ scores needs an exponential, of which a multiprocessor makes 16 a clock: 0.11 ms, beside the products at best.
// FlashAttention-2 in PyTorch takes 0.46 ms for it.
//
// 1. A thread for each query row. The scores are computed again and again (for d_v = 64 three times: for m and l, and for each 32 columns of o), because there
//    is nowhere to keep them, and the threads of a warp read q a whole row apart, 32 cache lines an instruction.
// 2. Tiles: 64 queries by 64 keys a block, both products from slabs in shared memory, 8×4 numbers a thread in registers, so that each number read from
//    memory is used 64 times. Expected: a third to a half of the float32 rate of 67 TFLOP/s, a hundred times version 1. In use for float32 and for odd sizes.
// 3. Tensor cores: mma.sync.m16n8k16 on bf16 with FlashAttention-2's division of labour: a warp owns 16 of the block's 64 rows and needs nothing of the other
//    warps; its scores stay in registers and become the left operand of P·V where they are. Tiles are loaded by ordinary instructions between two barriers,
//    row below row, so that the eight rows of an ldmatrix meet the same banks. Expected: five times version 2.
// 4. cp.async into two buffers, swizzled rows: the next tile of keys and values is on its way while this one is worked on, one barrier a tile instead of two,
//    no bank conflicts, and masks only in tiles that need them. Expected: twice version 3. Then shared memory is the limit: every 16 rows read all keys and
//    values, 16 bytes a score at d 64, which at 128 bytes a clock and multiprocessor is 0.25 ms for the shape above. (Version 5's code with MT = 1.)
// 5. 32 rows a warp, 128 a block: what ldmatrix fetches is used twice, so that the traffic of shared memory halves and the tensor cores are the limit.
//    Expected: 1.3 times version 4, 0.35 ms. In use where version 6 is not.
// 6. Hopper's way: one warp copies tiles in bulk (TMA), warpgroups multiply them by wgmma, the scores with both operands in shared memory, the weights as left
//    operand in registers. For 64 queries by 128 keys at d 64 the products take 512 clocks of a multiprocessor's tensor cores and the exponentials 512 clocks
//    of its special function units, where mma.sync alone takes 850; so the two must overlap: three warpgroups take turns at multiplying while the others make
//    weights of scores, and these no longer look for the largest score, which took a quarter of that time (why they need not:
//    gpt2/cuda/softmax_forward_hopper.cuh). Blocks stay and take work from a queue, so that an item's first tiles come while the one before is finished.
//    Expected: 60% of that bound at T 8192, 1.5 ms; half of it at T 1024, where each item of 192 queries meets only 4 tiles of keys, 0.28 ms. In use.
// 7. Two warpgroups instead of three where sequences are short and multiples of 128 long. At T 256 items of 192 queries leave a third of the rows idle, those
//    of 128 none; and an item's queries must have come when the one before is done, which now is soon: four items' queries in the ring instead of two.
//    Expected: 0.17 ms at B 256, T 256, of 0.21; nothing from T 512 on. In use.
#include "../../gpt2/cuda/softmax_forward.cuh"

#include "ladder.h"

using namespace gpu;

// ---- version 1 ---------------------------------------------------------------------------------------------------------------------------------------------

__global__ void softmax_forward_kernel1(SoftmaxAttention a, floatX* o, int64_t o_stride, float* lse, int blocks_per_seq, bool dropout) {
    constexpr int COLUMNS = 32;
    int s = blockIdx.x / blocks_per_seq, i = blockIdx.x % blocks_per_seq * blockDim.x + threadIdx.x, h = blockIdx.y, g = a.kv_head(h), lo, hi;
    if (i >= a.q_len(s)) return;
    int position = a.position(s, i);
    softmax_fwd::visible_keys(position, a.window, 0, a.k_len(s), &lo, &hi);
    int64_t n = a.cu_q[s] + i;
    const floatX* q = a.q + n * a.q_stride + (int64_t)h * a.d_qk;
    auto score = [&](int j) {
        const floatX* k = a.k + (a.cu_k[s] + j) * a.k_stride + g * a.k_head;
        float sum = 0;
        for (int c = 0; c < a.d_qk; c++) sum += to_float(q[c]) * to_float(k[c]);
        return sum * a.scale;
    };

    float m = -INFINITY, l = 0;
    for (int j = lo; j < hi; j++) {
        float x = score(j), now = fmaxf(m, x);
        l = l * expf(m - now) + expf(x - now);
        m = now;
    }
    for (int c0 = 0; c0 < a.d_v; c0 += COLUMNS) {
        float acc[COLUMNS] = {};
        for (int j = lo; j < hi; j++) {
            float p = expf(score(j) - m) / l;
            if (dropout) {
                Dropout drop(a, s, h);
                Philox random = drop.words(a, position, j);
                p = random.word[(drop.start + j) % 4] >= a.dropout.threshold ? p * a.dropout.scale : 0;
            }
            const floatX* v = a.v + (a.cu_k[s] + j) * a.v_stride + g * a.v_head + c0;
#pragma unroll
            for (int c = 0; c < COLUMNS; c++)
                if (c0 + c < a.d_v) acc[c] += p * to_float(v[c]);
        }
#pragma unroll
        for (int c = 0; c < COLUMNS; c++)
            if (c0 + c < a.d_v) o[n * o_stride + (int64_t)h * a.d_v + c0 + c] = from_float<floatX>(acc[c]);
    }
    if (lse) lse[h * a.q_rows + n] = l == 0 ? -INFINITY : m + logf(l);
}

inline void forward1(cudaStream_t stream, const SoftmaxAttention& a, floatX* o, int64_t o_stride, float* lse) {
    int64_t blocks_per_seq = ceil_div(a.max_q, 128);
    dim3 grid(blocks_per_seq * a.num_seqs, a.heads);
    if (grid.x == 0) return;
    softmax_forward_kernel1<<<grid, 128, 0, stream>>>(a, o, o_stride, lse, (int)blocks_per_seq, a.dropout.p > 0);
    LAUNCH_CHECK();
}

// ---- version 3 ---------------------------------------------------------------------------------------------------------------------------------------------
#ifndef GPU_FLOAT32

// Rows one below the other, chunks in their order.
template <int D>
struct Plain {
    __device__ static int at(int row, int chunk) { return row * (D / 8) + chunk; }
    __device__ static uint32_t step(uint32_t address, int c) { return address + 32 * c; }
};

template <int D>
__device__ inline void load_plain(int4* to, const floatX* from, int64_t stride, int first, int end, int d) {
    for (int at = threadIdx.x; at < 64 * (D / 8); at += softmax_fwd::THREADS) {
        int j = first + at / (D / 8), c = at % (D / 8) * 8;
        to[at] = j >= 0 && j < end && c < d ? *(const int4*)(from + j * stride + c) : int4{};
    }
}

// No dropout.
template <int DQK, int DV>
__global__ void __launch_bounds__(softmax_fwd::THREADS) softmax_forward_kernel3(SoftmaxAttention a, floatX* o, int64_t o_stride, float* lse) {
    extern __shared__ __align__(128) int4 softmax_forward_shared[];
    int4 *q = softmax_forward_shared, *k = q + 64 * DQK / 8, *v = k + 64 * DQK / 8;
    softmax_fwd::Block b;
    if (!softmax_fwd::find_block(a, 64, 64, false, &b)) return;
    int row = threadIdx.x / 32 * 16, first = b.first + row;  // of this warp
    load_plain<DQK>(q, b.q, a.q_stride, 0, b.n_q - b.start, a.d_qk);
    float acc[1][DV / 8][4] = {}, m[1][2] = {{-INFINITY, -INFINITY}}, l[1][2] = {};
    for (int j0 = b.begin; j0 < b.end; j0 += 64) {
        __syncthreads();  // the tile before has been read
        load_plain<DQK>(k, b.k, a.k_stride, j0, b.n_k, a.d_qk);
        load_plain<DV>(v, b.v, a.v_stride, j0, b.n_k, a.d_v);
        __syncthreads();
        float s[1][8][4] = {};
        softmax_fwd::multiply_qk<Plain, DQK>(s, (uint32_t)__cvta_generic_to_shared(q + row * (DQK / 8)), (uint32_t)__cvta_generic_to_shared(k));
        softmax_fwd::mask_scores(s, first - j0, a.window, -j0, b.n_k - j0);
        softmax_fwd::softmax_rows(s, m, l, acc, a.scale * LOG2E);
        softmax_fwd::multiply_pv<Plain, DV>(acc, s, (uint32_t)__cvta_generic_to_shared(v));
    }
    __syncthreads();  // Q has been written by all, in case that there were no keys
    softmax_fwd::finish_rows<DV>(a, b.head, a.cu_q[b.seq] + b.start + row, b.n_q - b.start - row, o, o_stride, lse, acc, m, l, 1, q + row * (DQK / 8));
}

template <int DQK, int DV>
inline void launch3(cudaStream_t stream, const SoftmaxAttention& a, floatX* o, int64_t o_stride, float* lse) {
    constexpr int bytes = 64 * (2 * DQK + DV) * 2;
    int blocks = softmax_fwd::grid_blocks(a, 64);
    if (blocks == 0) return;
    allow_shared_memory(softmax_forward_kernel3<DQK, DV>, bytes);
    softmax_forward_kernel3<DQK, DV><<<blocks, softmax_fwd::THREADS, bytes, stream>>>(a, o, o_stride, lse);
    LAUNCH_CHECK();
}

inline bool forward3(cudaStream_t stream, const SoftmaxAttention& a, floatX* o, int64_t o_stride, float* lse) {
    if (a.dropout.p > 0) return false;
    if (a.d_qk <= 64 && a.d_v <= 64)
        launch3<64, 64>(stream, a, o, o_stride, lse);
    else if (a.d_qk <= 128 && a.d_v <= 128)
        launch3<128, 128>(stream, a, o, o_stride, lse);
    else
        launch3<192, 128>(stream, a, o, o_stride, lse);
    return true;
}

#endif

// False: this version does not do it.
inline bool forward(int version, cudaStream_t stream, const SoftmaxAttention& a, floatX* o, int64_t o_stride, float* lse) {
    if (version == 1) return forward1(stream, a, o, o_stride, lse), true;
    if (version == 2) return softmax_fwd::forward2(stream, a, o, o_stride, lse), true;
#ifdef GPU_FLOAT32
    return false;
#else
    if (!softmax_fwd::takes_tensor_cores(a, o, o_stride)) return false;
    if (version == 3) return forward3(stream, a, o, o_stride, lse);
    if (version == 4) return softmax_fwd::forward5<1>(stream, a, o, o_stride, lse), true;
    if (version == 5) return softmax_fwd::forward5<2>(stream, a, o, o_stride, lse), true;
    if (!softmax_fwd::takes_hopper(a)) return false;
    if (version == 6) return softmax_fwd::forward6(stream, a, o, o_stride, lse, false), true;
    return softmax_forward(stream, a, o, o_stride, lse), true;
#endif
}

// ---- checks ------------------------------------------------------------------------------------------------------------------------------------------------

struct Case {
    std::string name;
    std::vector<int> q_len, k_len = q_len;
    int heads = 2, kv_heads = 2, d_qk = 64, d_v = 64, window = 0;
    double dropout = 0;
    std::vector<int> q_at = {}, drop_seq = {}, drop_pos = {};  // empty: null
    bool lse = true;
    int odd = 0;          // so many numbers more between the rows of q, k, v
    float sharpness = 1;  // the scale is so many times 1/√d_qk
};

constexpr int NAN_ROWS = 3;  // before, and behind, the sequences' rows in q, k, v and o; nobody may read or write them

inline std::vector<int> offsets(const std::vector<int>& lengths) {
    std::vector<int> cu = {NAN_ROWS};
    for (int n : lengths) cu.push_back(cu.back() + n);
    return cu;
}

// Rows of `columns` random numbers, with NaN before, between and behind them.
inline std::vector<float> rows_among_nan(const std::vector<int>& cu, int64_t columns, int64_t stride, uint64_t seed) {
    std::vector<float> x((cu.back() + NAN_ROWS) * stride, NAN), numbers = random_numbers((cu.back() - NAN_ROWS) * columns, seed, 1.5);
    for (int64_t n = NAN_ROWS; n < cu.back(); n++) std::copy_n(&numbers[(n - NAN_ROWS) * columns], columns, &x[n * stride]);
    return x;
}

// What is compared of an array of `count` rows, each of `inner` numbers `stride` apart: the rows of the sequences; and behind them, that all else is still
// poison.
inline std::vector<float> rows_and_poison(const std::vector<float>& x, int first, int end, int64_t count, int64_t inner, int64_t stride) {
    std::vector<float> out;
    double touched = 0;
    for (int64_t n = 0; n < count; n++)
        for (int64_t c = 0; c < stride; c++) {
            if (n >= first && n < end && c < inner)
                out.push_back(x[n * stride + c]);
            else
                touched += !std::isnan(x[n * stride + c]);
        }
    out.push_back((float)touched * 1e9f);
    return out;
}

inline void check(Ladder& ladder, const Case& c) {
    std::vector<int> cu_q = offsets(c.q_len), cu_k = offsets(c.k_len);
    int num_seqs = (int)c.q_len.size(), first = NAN_ROWS, end = cu_q.back();
    int64_t q_columns = c.heads * c.d_qk, k_columns = c.kv_heads * c.d_qk, v_columns = c.kv_heads * c.d_v, q_rows = end + NAN_ROWS;
    // q, k, v packed in one row, as training has them, if there are as many queries as keys.
    bool packed = c.q_len == c.k_len;
    int64_t kv_at = packed ? q_columns : 0, k_stride = kv_at + k_columns + v_columns + c.odd, q_stride = packed ? k_stride : q_columns + c.odd;
    int64_t o_columns = c.heads * c.d_v, o_stride = o_columns + 8;
    std::vector<float> kv = rows_among_nan(cu_k, k_stride - c.odd, k_stride, 1), queries = rows_among_nan(cu_q, q_stride - c.odd, q_stride, packed ? 1 : 2);

    cpu::SoftmaxAttention r{};
    r.heads = c.heads, r.kv_heads = c.kv_heads, r.d_qk = c.d_qk, r.d_v = c.d_v;
    r.scale = c.sharpness / std::sqrt((float)c.d_qk);
    r.window = c.window;
    r.num_seqs = num_seqs;
    r.cu_q = cu_q.data(), r.cu_k = cu_k.data();
    r.q = queries.data(), r.k = kv.data() + kv_at, r.v = r.k + k_columns;
    r.q_stride = q_stride, r.k_stride = r.v_stride = k_stride;
    r.k_head = c.d_qk, r.v_head = c.d_v;
    r.q_at = c.q_at.empty() ? nullptr : c.q_at.data();
    constexpr int layer = 3, layers = 12, step = 1000;
    constexpr int64_t first_row = 40;
    r.dropout = {c.dropout, 0x123456789abcdefull, step * layers + layer, first_row};
    r.drop_seq = c.drop_seq.empty() ? nullptr : c.drop_seq.data();
    r.drop_pos = c.drop_pos.empty() ? nullptr : c.drop_pos.data();
    std::vector<float> o_expected((end - first) * o_columns), lse_rows((end - first) * c.heads), scratch(cu_k.back() * k_columns + 64);
    cpu::softmax_forward(r, o_expected.data() - first * o_columns, o_columns, lse_rows.data() - first * c.heads, {scratch.data(), (int64_t)scratch.size()});
    std::vector<float> lse_expected;  // (N,NH) on the CPU, (NH,N) here
    for (int h = 0; h < c.heads; h++)
        for (int n = 0; n < end - first; n++) lse_expected.push_back(lse_rows[n * c.heads + h]);
    o_expected.push_back(0);
    lse_expected.push_back(0);

    DeviceArray<floatX> q(queries), k(kv), o(q_rows * o_stride);
    DeviceArray<float> lse(c.heads * q_rows);
    DeviceArray<int> device_cu_q(cu_q), device_cu_k(cu_k), q_at(c.q_at), drop_seq(c.drop_seq), drop_pos(c.drop_pos);
    DeviceArray<PassCounters> pass(std::vector<PassCounters>{{step, first_row}});
    SoftmaxAttention a{};
    a.heads = c.heads, a.kv_heads = c.kv_heads, a.d_qk = c.d_qk, a.d_v = c.d_v;
    a.scale = r.scale;
    a.window = c.window;
    a.num_seqs = num_seqs;
    a.max_q = *std::max_element(c.q_len.begin(), c.q_len.end()), a.max_k = *std::max_element(c.k_len.begin(), c.k_len.end());
    a.q_rows = q_rows;
    a.cu_q = device_cu_q, a.cu_k = device_cu_k;
    a.k = packed ? q + kv_at : k, a.v = a.k + k_columns;
    a.q = q;
    a.q_stride = q_stride, a.k_stride = a.v_stride = k_stride;
    a.k_head = c.d_qk, a.v_head = c.d_v;
    if (r.q_at) a.q_at = q_at;
    if (c.dropout > 0) a.dropout = dropout_key(c.dropout, r.dropout.seed, layer, layers, pass);
    if (r.drop_seq) a.drop_seq = drop_seq;
    if (r.drop_pos) a.drop_pos = drop_pos;

    std::vector<Output> outputs = {output("o", o, o_expected)};
    outputs[0].read = [&] { return rows_and_poison(o.to_host(), first, end, q_rows, o_columns, o_stride); };
    if (c.lse) {
        outputs.push_back(output("lse", lse, lse_expected));
        outputs[1].read = [&] {
            // (NH, q_rows): as rows_and_poison wants it, a head is a row, and columns outside [first, end) are poison.
            std::vector<float> x = lse.to_host(), out;
            double touched = 0;
            for (int64_t i = 0; i < (int64_t)x.size(); i++) {
                if (i % q_rows >= first && i % q_rows < end)
                    out.push_back(x[i]);
                else
                    touched += !std::isnan(x[i]);
            }
            out.push_back((float)touched * 1e9f);
            return out;
        };
    }
    ladder.check(c.name, outputs, [&](int version) { return forward(version, ladder.stream, a, o, o_stride, c.lse ? lse.data : nullptr); });
}

inline std::vector<int> many_short_sequences() {
    std::vector<int> lengths;
    for (int s = 0; s < 3000; s++) lengths.push_back(s * 7 % 4);
    lengths[1234] = 300;
    return lengths;
}

inline void check_all(Ladder& ladder) {
    for (int T : {1, 63, 64, 65, 200, 256, 384, 1024}) check(ladder, {"T " + std::to_string(T), {T}});
    std::vector<int> ragged = {5, 0, 130, 64, 1, 0, 257, 0}, more = {0, 31, 33, 129, 256};
    check(ladder, {"ragged", ragged});
    check(ladder, {"3000 sequences", many_short_sequences()});
    check(ladder, {"B 2, NH 12, T 1024", {1024, 1024}, {1024, 1024}, 12, 12});
    check(ladder, {"NH 12, KV 4", more, more, 12, 4});
    struct {
        int d_qk, d_v;
    } widths[] = {{24, 24}, {32, 32}, {40, 40}, {80, 80}, {96, 96}, {128, 128}, {96, 64}, {192, 128}, {72, 8}, {20, 20}, {33, 70}, {1, 1}, {288, 256}};
    for (auto d : widths) {
        std::string name = "d " + std::to_string(d.d_qk) + "/" + std::to_string(d.d_v);
        check(ladder, {name, more, more, 2, 2, d.d_qk, d.d_v});
        check(ladder, {name + " tail queries, window 70", {1, 40}, {100, 190}, 2, 1, d.d_qk, d.d_v, 70});
    }
    // Kernel 6's tiles have 128 and 192 queries, counted from the end, and 128 keys.
    for (auto d : {widths[0], widths[5], widths[6], widths[7]}) {
        std::string name = "d " + std::to_string(d.d_qk) + "/" + std::to_string(d.d_v);
        check(ladder, {name + " edges", {1, 63, 127, 128, 129, 191, 192, 193, 385}, {1, 63, 127, 128, 129, 191, 192, 193, 385}, 2, 1, d.d_qk, d.d_v});
        check(ladder, {name + " two warpgroups", {128, 384, 1, 200}, {128, 500, 300, 200}, 4, 2, d.d_qk, d.d_v});
        check(ladder, {name + " two warpgroups, window 150", {128, 384, 1}, {128, 500, 300}, 2, 2, d.d_qk, d.d_v, 150});
        check(ladder, {name + " T 1000", {1000}, {1000}, 2, 2, d.d_qk, d.d_v});
        check(ladder, {name + " tail queries", {1, 64, 100, 200}, {129, 500, 228, 513}, 4, 2, d.d_qk, d.d_v});
        check(ladder, {name + " window 129", {500, 130}, {500, 400}, 2, 2, d.d_qk, d.d_v, 129});
        check(ladder, {name + " sharp", {600, 70}, {600, 700}, 2, 2, d.d_qk, d.d_v, 0, 0, {}, {}, {}, true, 0, 30});
    }
    check(ladder, {"B 2, T 1024, sharp", {1024, 1024}, {1024, 1024}, 2, 2, 64, 64, 0, 0, {}, {}, {}, true, 0, 10});
    check(ladder, {"odd strides", more, more, 2, 2, 64, 64, 0, 0, {}, {}, {}, true, 3});
    check(ladder, {"tail queries", {1, 5, 64, 70, 0, 3}, {100, 69, 200, 333, 50, 0}});
    check(ladder, {"more queries than keys", {10, 200, 64}, {3, 70, 64}});
    check(ladder, {"q_at", {10, 70, 130}, {100, 200, 50}, 2, 1, 64, 64, 0, 0, {100, 30, 0}});
    check(ladder, {"q_at, window", {10, 70, 130, 5}, {100, 200, 50, 64}, 2, 1, 64, 64, 40, 0, {100, 30, 0, 200}});
    for (int window : {1, 17, 100, 1000}) check(ladder, {"window " + std::to_string(window), {300, 64}, {300, 64}, 2, 2, 64, 64, window});
    check(ladder, {"without lse", more, more, 2, 2, 64, 64, 0, 0, {}, {}, {}, false});
    check(ladder, {"dropout 0.1", ragged, ragged, 4, 2, 64, 64, 0, 0.1});
    check(ladder, {"dropout 0.1, d 80", more, more, 2, 2, 80, 80, 0, 0.1});
    check(ladder, {"dropout 0.5, d 20, window", more, more, 2, 2, 20, 20, 50, 0.5});
    check(ladder, {"dropout 0.1, d 32", more, more, 2, 2, 32, 32, 0, 0.1});
    check(ladder, {"dropout 0.1, d 96/64", more, more, 2, 2, 96, 64, 0, 0.1});
    check(ladder, {"dropout 0.1, d 128", more, more, 2, 2, 128, 128, 0, 0.1});
    check(ladder, {"dropout 0.1, d 192/128", more, more, 2, 2, 192, 128, 0, 0.1});
    check(ladder, {"dropout 0.3, segments", {50, 50, 50, 17, 130}, {50, 50, 50, 17, 130}, 2, 2, 64, 64, 0, 0.3, {}, {0, 0, 0, 0, 1}, {0, 50, 100, 150, 7}});
    check(ladder, {"dropout 0.3, segments, window, tail queries", {50, 70, 1}, {97, 213, 60}, 2, 1, 192, 128, 60, 0.3, {}, {4, 5, 6}, {1, 2, 3}});
}

// ---- times -------------------------------------------------------------------------------------------------------------------------------------------------

// Random numbers, the same million over and over: only their place in memory matters here.
inline void fill(DeviceArray<floatX>& x) {
    std::vector<float> numbers = random_numbers(std::min<int64_t>(x.size, 1 << 20), 1);
    DeviceArray<floatX> some(numbers);
    for (int64_t at = 0; at < x.size; at += some.size)
        CUDA_CHECK(cudaMemcpy(x.data + at, some.data, std::min(some.size, x.size - at) * sizeof(floatX), cudaMemcpyDeviceToDevice));
}

// B sequences of T tokens. d_qk = d_v: q, k, v packed in rows of 3·C. Otherwise as MLA has them: q, k in rows of NH·d_qk, v in rows of [k_nope | v] a head.
inline void time_shape(Ladder& ladder, const std::string& name, int B, int T, int heads, int d_qk, int d_v, double dropout = 0) {
    bool packed = d_qk == d_v;
    int64_t N = (int64_t)B * T, C = heads * d_v, d_nope = packed ? 0 : d_v;
    std::vector<int> cu;
    for (int s = 0; s <= B; s++) cu.push_back(s * T);
    DeviceArray<int> device_cu(cu);
    DeviceArray<PassCounters> pass(std::vector<PassCounters>{{1, 0}});
    DeviceArray<floatX> q(N * heads * d_qk * (packed ? 3 : 1)), k(packed ? 0 : N * heads * d_qk), v(packed ? 0 : N * heads * (d_nope + d_v)), o(N * C);
    DeviceArray<float> lse(heads * N);
    for (DeviceArray<floatX>* x : {&q, &k, &v}) fill(*x);
    SoftmaxAttention a{};
    a.heads = a.kv_heads = heads, a.d_qk = d_qk, a.d_v = d_v;
    a.scale = 1 / std::sqrt((float)d_qk);
    a.num_seqs = B, a.max_q = a.max_k = T, a.q_rows = N;
    a.cu_q = a.cu_k = device_cu;
    a.q = q, a.k = packed ? q + C : k, a.v = packed ? q + 2 * C : v + d_nope;
    a.q_stride = a.k_stride = packed ? 3 * C : heads * d_qk, a.v_stride = packed ? 3 * C : heads * (d_nope + d_v);
    a.k_head = d_qk, a.v_head = d_nope + d_v;
    if (dropout > 0) a.dropout = dropout_key(dropout, 1, 0, 12, pass);
    double pairs = (double)B * heads * T * (T + 1.0) / 2;
    Work work = {2.0 * (d_qk + d_v) * pairs, (double)N * heads * (2 * (d_qk + d_v) * sizeof(floatX) + sizeof(float))};
    ladder.time(name, work, [&](int version) { return (version > 1 || work.flops < 1e10) && forward(version, ladder.stream, a, o, C, lse); });
}

int main(int argc, char** argv) {
    Ladder ladder("attention_forward",
                  {"a thread a query row", "tiles in shared memory, float32 arithmetic (in use)", "tensor cores", "cp.async into two buffers, swizzled rows",
                   "32 rows a warp (in use)", "wgmma, bulk copies, a warp that only copies (in use)", "two warpgroups for short sequences (in use)"},
                  argc, argv);
    check_all(ladder);
    time_shape(ladder, "B 4, NH 12, T 1024, d 64", 4, 1024, 12, 64, 64);
    time_shape(ladder, "B 64, NH 12, T 1024, d 64", 64, 1024, 12, 64, 64);
    time_shape(ladder, "the same, dropout 0.1", 64, 1024, 12, 64, 64, 0.1);
    time_shape(ladder, "B 8, NH 12, T 8192, d 64", 8, 8192, 12, 64, 64);
    time_shape(ladder, "B 2, NH 12, T 32768, d 64", 2, 32768, 12, 64, 64);
    time_shape(ladder, "B 128, NH 12, T 512, d 64", 128, 512, 12, 64, 64);
    time_shape(ladder, "B 256, NH 12, T 256, d 64", 256, 256, 12, 64, 64);
    time_shape(ladder, "B 512, NH 12, T 128, d 64", 512, 128, 12, 64, 64);
    time_shape(ladder, "B 8, NH 16, T 4096, d 128", 8, 4096, 16, 128, 128);
    time_shape(ladder, "B 64, NH 12, T 1024, d 96/64", 64, 1024, 12, 96, 64);
    time_shape(ladder, "B 4, NH 16, T 8192, d 192/128", 4, 8192, 16, 192, 128);
    return ladder.finish();
}
