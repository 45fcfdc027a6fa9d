// The ladder of decoding: softmax attention of few queries over many keys in pages (gpt2/cuda/decode.cuh).
//
//     s_ij = scale·q_i·k_j      o_i = Σ_j exp(s_ij − lse_i)·v_j      lse_i = ln Σ_j exp(s_ij)
//
// Work: 2·(d_qk+d_v) FLOPs for each query head and key; bytes: every key and value once, KV·(d_qk+d_v) numbers a token, or d_qk where values are the first
// part of the keys (MLA, absorbed). Queries and results are nothing beside them. On an H100, bf16, at 3.0 TB/s:
//
//     64 sequences of 4096 tokens, NH 12, d 64         805 MB   268 µs    a FLOP a byte
//     1 sequence of 32768 tokens, NH 12, d 64          101 MB    34 µs
//     64 × 4096, MLA absorbed, NH 12, d 288/256        151 MB    50 µs    3.4 GFLOP: 11 FLOPs a byte of each of 12 heads' products
//     64 × 4096, MLA absorbed, NH 16, d 576/512        302 MB   101 µs    9.1 GFLOP
//
//   1 naive: a block a query and head. A thread makes the scores of its own keys, number by number; then a thread a column of o walks over all keys.
//     Lanes read 32 different keys at once, two bytes from each, and one sequence keeps only NH multiprocessors busy.
//   2 keys split over blocks, merged by a second kernel; eight lanes read a key in 16-byte pieces, several keys on their way; the rows of one kv head share
//     what is read. Expected: near the memory's limit for one row a kv head, where a key costs some 50 instructions of 8 lanes; not so for many rows, whose
//     products (2·NH·(d_qk+d_v) for a latent) are then in the way: 12 heads of MLA need 120 µs of float32 arithmetic, 16 heads of 576/512 270 µs.
//   3 tensor cores: 16 rows of a kv head are one operand, keys and values come through shared memory, latents once for both. Expected: the memory's limit
//     again, since now a tile's products take a third of the time in which it arrives.
//
// Merging costs a launch of some 3 µs, and two times 4·(d_v+1) bytes for each row and split.
#include "../../gpt2/cuda/decode.cuh"

#include "ladder.h"

using namespace gpu;

// ---- version 1 --------------------------------------------------------------------------------------------------------------------------------------------

__global__ void softmax_decode_kernel1(SoftmaxAttention a, floatX* o, int64_t o_stride, float* lse) {
    extern __shared__ float score[];  // (max_k)
    __shared__ float maxima[32], sums[32];
    int s = blockIdx.x / a.max_q, i = blockIdx.x % a.max_q, h = blockIdx.y, g = a.kv_head(h);
    if (i >= a.q_len(s)) return;
    int64_t n = a.cu_q[s] + i;
    int position = a.position(s, i), lo = a.window > 0 ? max(0, position - a.window + 1) : 0, hi = min(position + 1, a.k_len(s));
    const floatX* q = a.q + n * a.q_stride + h * a.d_qk;
    float m = -INFINITY, l = 0;
    for (int j = lo + threadIdx.x; j < hi; j += blockDim.x) {
        const floatX* k = a.states[s].row(j) + a.k_offset + g * a.k_head;
        float sum = 0;
        for (int c = 0; c < a.d_qk; c++) sum += to_float(q[c]) * to_float(k[c]);
        score[j - lo] = sum * a.scale;
        m = fmaxf(m, sum * a.scale);
    }
    m = block_max(m, maxima);
    for (int j = lo + threadIdx.x; j < hi; j += blockDim.x) {
        score[j - lo] = expf(score[j - lo] - m);
        l += score[j - lo];
    }
    l = block_sum(l, sums);
    for (int c = threadIdx.x; c < a.d_v; c += blockDim.x) {
        float sum = 0;
        for (int j = lo; j < hi; j++) sum += score[j - lo] * to_float(a.states[s].row(j)[a.v_offset + g * a.v_head + c]);
        o[n * o_stride + h * a.d_v + c] = from_float<floatX>(l > 0 ? sum / l : 0);
    }
    if (threadIdx.x == 0 && lse) lse[h * a.q_rows + n] = l > 0 ? m + logf(l) : -INFINITY;
}

bool softmax_decode1(cudaStream_t stream, const SoftmaxAttention& a, floatX* o, int64_t o_stride, float* lse) {
    size_t shared = a.max_k * sizeof(float);
    if (shared + 1024 > device_properties().sharedMemPerBlockOptin) return false;
    allow_shared_memory(softmax_decode_kernel1, shared);
    softmax_decode_kernel1<<<dim3(a.num_seqs * a.max_q, a.heads), 256, shared, stream>>>(a, o, o_stride, lse);
    LAUNCH_CHECK();
    return true;
}

// ---- cases ------------------------------------------------------------------------------------------------------------------------------------------------

struct Case {
    int heads, kv_heads, d_qk, d_v;
    bool latent;  // the value is the first part of the key
    int window, page_size;
    int gap;                        // numbers before each key and value in a row, before a page's first row, and behind a row of q: odd ones spoil alignment
    std::vector<int> q_len, k_len;  // of each sequence
    std::vector<int> q_at = {};     // where its queries stand; empty: they are the last keys' tokens
    int per_token() const { return latent ? gap + d_qk : gap + kv_heads * d_qk + gap + kv_heads * d_v; }
};

template <class Core>  // cpu::SoftmaxAttention or gpu::SoftmaxAttention
Core core_of(const Case& c, int q_stride) {
    Core a{};
    a.heads = c.heads;
    a.kv_heads = c.kv_heads;
    a.d_qk = c.d_qk;
    a.d_v = c.d_v;
    a.scale = 1 / std::sqrt((float)c.d_qk);
    a.window = c.window;
    a.num_seqs = (int)c.q_len.size();
    a.q_stride = q_stride;
    a.k_offset = c.gap;
    a.v_offset = c.latent ? c.gap : c.gap + c.kv_heads * c.d_qk + c.gap;
    a.k_head = c.latent ? 0 : c.d_qk;
    a.v_head = c.latent ? 0 : c.d_v;
    return a;
}

std::vector<int> offsets(const std::vector<int>& lengths) {
    std::vector<int> cu(1, 0);
    for (int n : lengths) cu.push_back(cu.back() + n);
    return cu;
}

SoftmaxAttention device_core(const Case& c, int q_stride, const int* cu_q, const int* cu_k, const floatX* q, const AttentionState* states) {
    SoftmaxAttention a = core_of<SoftmaxAttention>(c, q_stride);
    a.max_q = *std::max_element(c.q_len.begin(), c.q_len.end());
    a.max_k = *std::max_element(c.k_len.begin(), c.k_len.end());
    a.q_rows = offsets(c.q_len).back();
    a.cu_q = cu_q;
    a.cu_k = cu_k;
    a.q = q;
    a.states = states;
    return a;
}

bool run_version(int version, cudaStream_t stream, const SoftmaxAttention& a, floatX* o, float* lse, Scratch scratch, int splits) {
    int64_t o_stride = (int64_t)a.heads * a.d_v;
    if (version == 1) return splits == 0 && softmax_decode1(stream, a, o, o_stride, lse);
    if (version == 3 && !decode::tensor_cores_can(a)) return false;
    decode::softmax_decode_as(stream, a, o, o_stride, lse, scratch, version == 3, splits);
    return true;
}

void check(Ladder& ladder, const Case& c, uint64_t seed) {
    int num_seqs = (int)c.q_len.size(), rows = offsets(c.q_len).back(), q_stride = c.heads * c.d_qk + c.gap, per_token = c.per_token();
    std::vector<int> cu_q = offsets(c.q_len), cu_k = offsets(c.k_len), pages_before(1, 0);
    for (int n : c.k_len) pages_before.push_back(pages_before.back() + (int)ceil_div(n, c.page_size));

    // Pages in an order of their own, poison wherever no row stands.
    int64_t page = round_up(c.gap + c.page_size * per_token, 8), pages = pages_before.back();
    std::vector<float> pool(pages * page, NAN), numbers = random_numbers((int64_t)cu_k.back() * per_token, seed);
    std::vector<int64_t> where(pages);
    for (int64_t p = 0; p < pages; p++) where[p] = p;
    for (int64_t p = pages - 1; p > 0; p--) std::swap(where[p], where[philox(seed, (uint32_t)p, 0, 0, 1).word[0] % (p + 1)]);
    DeviceArray<floatX> device_pool(pool.size());
    std::vector<int> tables;
    for (int s = 0; s < num_seqs; s++) {
        for (int j = 0; j < c.k_len[s]; j++)
            memcpy(&pool[where[pages_before[s] + j / c.page_size] * page + c.gap + j % c.page_size * per_token], &numbers[(int64_t)(cu_k[s] + j) * per_token],
                   per_token * sizeof(float));
        for (int p = pages_before[s]; p < pages_before[s + 1]; p++) tables.push_back((int)where[p]);
        tables.push_back(INT_MIN);  // an entry that nobody may follow
    }
    device_pool.copy_from(pool);
    DeviceArray<int> device_tables(tables);
    std::vector<cpu::AttentionState> host_states(num_seqs);
    std::vector<AttentionState> states(num_seqs);
    for (int s = 0; s < num_seqs; s++) {
        int first = pages_before[s] + s;
        host_states[s] = {c.k_len[s] - c.q_len[s], nullptr, pool.data() + c.gap, tables.data() + first, page, c.page_size, per_token};
        states[s] = {c.k_len[s] - c.q_len[s], nullptr, device_pool + c.gap, device_tables + first, page, c.page_size, per_token};
    }
    DeviceArray<AttentionState> device_states(states);

    std::vector<float> q = random_numbers((int64_t)rows * q_stride, seed + 1), o((int64_t)rows * c.heads * c.d_v), lse_of_rows(rows * c.heads),
                       lse(rows * c.heads);
    cpu::SoftmaxAttention reference = core_of<cpu::SoftmaxAttention>(c, q_stride);
    reference.cu_q = cu_q.data();
    reference.cu_k = cu_k.data();
    reference.q = q.data();
    reference.q_at = c.q_at.empty() ? nullptr : c.q_at.data();
    reference.states = host_states.data();
    std::vector<float> cpu_scratch(cpu::softmax_forward_scratch(cu_k.back(), c.kv_heads, c.d_qk) + 16);
    cpu::softmax_forward(reference, o.data(), c.heads * c.d_v, lse_of_rows.data(), {cpu_scratch.data(), (int64_t)cpu_scratch.size()});
    for (int n = 0; n < rows; n++)
        for (int h = 0; h < c.heads; h++) lse[h * rows + n] = lse_of_rows[n * c.heads + h];

    DeviceArray<int> device_cu_q(cu_q), device_cu_k(cu_k), device_q_at(c.q_at);
    DeviceArray<floatX> device_q(q), device_o(o.size());
    DeviceArray<float> device_lse(lse.size());
    SoftmaxAttention a = device_core(c, q_stride, device_cu_q, device_cu_k, device_q, device_states);
    if (!c.q_at.empty()) a.q_at = device_q_at;
    for (int splits : {0, 1, 3, 7}) {
        // What is asked for, or room for so many splits.
        int queries = std::min(a.max_q, decode::launch_queries(a.heads, a.kv_heads));
        int64_t bytes = splits == 0 ? softmax_decode_scratch(a.heads, a.kv_heads, a.d_qk, a.d_v, num_seqs, a.max_q)
                                    : scratch_bytes({(int64_t)num_seqs * splits * queries * a.heads * round_up(a.d_v + 1, 4) * 4});
        DeviceArray<char> scratch(bytes);
        std::string shape = format("%d sequences, up to %d queries, %d keys, NH %d KV %d d %d/%d%s window %d gap %d splits %d", num_seqs, a.max_q, a.max_k,
                                   c.heads, c.kv_heads, c.d_qk, c.d_v, c.latent ? " latent" : "", c.window, c.gap, splits);
        ladder.check(shape, {output("o", device_o, o), output("lse", device_lse, lse)}, [&](int version) {
            return run_version(version, ladder.stream, a, device_o, device_lse, {scratch, bytes}, splits);
        });
    }
}

// B sequences of `length` tokens, one query each, pages of 64 tokens in an order of their own.
void time(Ladder& ladder, const char* name, int B, int length, int heads, int kv_heads, int d_qk, int d_v, bool latent) {
    Case c = {heads, kv_heads, d_qk, d_v, latent, 0, 64, 0, std::vector<int>(B, 1), std::vector<int>(B, length)};
    int64_t page = (int64_t)c.page_size * c.per_token(), table = ceil_div(length, c.page_size), pages = B * table, piece = 1 << 20;
    DeviceArray<floatX> pool(pages * page), random(random_numbers(piece, 3)), q(random_numbers((int64_t)B * heads * d_qk, 4)), o((int64_t)B * heads * d_v);
    for (int64_t i = 0; i < pool.size; i += piece)
        CUDA_CHECK(cudaMemcpy(pool + i, random, std::min(piece, pool.size - i) * sizeof(floatX), cudaMemcpyDeviceToDevice));
    std::vector<int> where(pages);
    for (int64_t p = 0; p < pages; p++) where[p] = (int)p;
    for (int64_t p = pages - 1; p > 0; p--) std::swap(where[p], where[philox(5, (uint32_t)p, 0, 0, 1).word[0] % (p + 1)]);
    DeviceArray<int> tables(where);
    std::vector<AttentionState> states(B);
    for (int s = 0; s < B; s++) states[s] = {length - 1, nullptr, pool, tables + s * table, page, c.page_size, c.per_token()};
    DeviceArray<AttentionState> device_states(states);
    DeviceArray<int> cu_q(offsets(c.q_len)), cu_k(offsets(c.k_len));
    SoftmaxAttention a = device_core(c, heads * d_qk, cu_q, cu_k, q, device_states);
    int64_t bytes = softmax_decode_scratch(heads, kv_heads, d_qk, d_v, B, 1);
    DeviceArray<char> scratch(bytes);
    double keys = (double)B * length;
    Work work = {2 * keys * heads * (d_qk + d_v), (keys * c.per_token() + (double)B * heads * (d_qk + d_v)) * sizeof(floatX)};
    ladder.time(format("%s: B %d, %d keys, NH %d d %d/%d", name, B, length, heads, d_qk, d_v), work, [&](int version) {
        return run_version(version, ladder.stream, a, o, nullptr, {scratch, bytes}, 0);
    });
}

int main(int argc, char** argv) {
    Ladder ladder("decode", {"naive: a block a query and head", "keys split over blocks, 16-byte loads, rows of a kv head together", "tensor cores"}, argc,
                  argv);
    //            NH KV d_qk d_v  latent win page gap   queries          keys
    check(ladder, {4, 4, 16, 16, false, 0, 4, 0, {1, 1, 0, 1}, {1, 6, 3, 34}}, 1);
    check(ladder, {2, 2, 64, 64, false, 0, 64, 0, {1, 1, 1, 1}, {700, 1300, 2, 64}}, 2);
    check(ladder, {6, 2, 24, 8, false, 7, 5, 8, {3, 0, 5, 1}, {40, 9, 5, 100}}, 3);
    check(ladder, {3, 1, 17, 9, false, 0, 3, 1, {1, 2, 1}, {1, 20, 600}}, 4);
    check(ladder, {3, 3, 64, 32, false, 100, 16, 3, {2, 1}, {700, 90}}, 5);  // sizes fit 16 bytes, rows do not stand on them
    check(ladder, {5, 1, 40, 32, true, 0, 7, 0, {2, 1, 0}, {50, 129, 10}}, 6);
    check(ladder, {16, 1, 72, 56, true, 0, 5, 1, {1, 3}, {33, 95}}, 7);
    check(ladder, {16, 1, 576, 512, true, 0, 64, 0, {1, 1}, {100, 333}}, 8);
    check(ladder, {8, 2, 128, 128, false, 0, 16, 0, {20, 1, 17}, {20, 700, 60}}, 9);  // more queries than one launch takes
    check(ladder, {8, 1, 256, 200, false, 33, 16, 0, {2, 1}, {70, 40}}, 10);
    check(ladder, {4, 2, 32, 32, false, 0, 8, 0, {3, 1, 6}, {0, 0, 2}}, 11);                   // rows that see nothing
    check(ladder, {8, 1, 32, 32, false, 10, 8, 0, {1, 2, 1}, {30, 70, 5}, {29, 71, 40}}, 12);  // queries behind the keys, beyond the window too
    check(ladder, {12, 12, 64, 64, false, 0, 64, 0, {1, 1, 1, 1}, {1000, 1024, 700, 1}}, 13);
    check(ladder, {12, 1, 288, 256, true, 0, 64, 0, {1, 1, 1, 1}, {1000, 1024, 700, 1}}, 14);
    time(ladder, "causal", 64, 4096, 12, 12, 64, 64, false);
    time(ladder, "causal", 1, 32768, 12, 12, 64, 64, false);
    time(ladder, "grouped queries", 64, 4096, 32, 8, 128, 128, false);
    time(ladder, "MLA absorbed", 64, 4096, 12, 1, 288, 256, true);
    time(ladder, "MLA absorbed", 64, 4096, 16, 1, 576, 512, true);
    time(ladder, "MLA absorbed", 1, 32768, 12, 1, 288, 256, true);
    return ladder.finish();
}
