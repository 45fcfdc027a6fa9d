// The ladder of decoding with multi-head latent attention, absorbed (gpt2/cuda/decode.cuh, decode_hopper.cuh): all heads of a token share one row [c | kr] in
// pages, d_c + d_rope numbers, which is key as a whole and value in its first d_c.
//
//     s_ij = scale·q_i·[c_j | kr_j]      o_i = Σ_j exp(s_ij − lse_i)·c_j      lse_i = ln Σ_j exp(s_ij)
//
// Work: 2·(2·d_c + d_rope) FLOPs for each head and key; bytes: every row once, 2·(d_c+d_rope). At (512, 64) that is 2176 FLOPs a head and 1152 bytes, so on an
// H100 (3.0 TB/s, 690 TFLOP/s in a large product) 16 heads are bound by memory (5 % of the arithmetic) and 128 heads by neither alone:
//
//     16 heads,  256 sequences of 4096       1.21 GB   403 µs     36 GFLOP    53 µs
//     128 heads, 256 sequences of 4096       1.21 GB   403 µs    292 GFLOP   423 µs
//
//   1 CUDA cores: products in float32, which take 16 heads 0.55 ms, 128 heads 4.4 ms even at the full 67 TFLOP/s.
//   2 tensor cores by mma.sync: 16 rows a tile. Expected: 16 heads near the memory's limit; 128 heads at half of the products' rate at best, for every tile of
//     16 rows brings the latents to shared memory once more, and reads each from there for only 16 rows.
//   3 Hopper: bulk copies by warps of their own, products of 64 rows by two warpgroups that share O's columns and take turns in making weights; of 128 heads
//     two blocks read the same latents side by side, as a cluster in which each fetches half of them for both. Per tile of 64 keys and rows 2176 clocks of
//     products, 2200 of shared memory, 5700 of memory. Expected: 16 heads at 90 % of the copy rate, 128 heads at 85 % of the products' rate.
#include "../../gpt2/cuda/decode.cuh"
#include "../../gpt2/cuda/decode_hopper.cuh"

#include "ladder.h"

using namespace gpu;

struct Case {
    int heads, d_c, d_rope, page_size;
    std::vector<int> q_len, k_len;  // of each sequence
    int window = 0;
    float q_size = 1;            // standard deviation of q
    bool far_key = false;        // one key of each sequence has a score of about −5·10⁵ with its first query's first head
    int first_page = 0;          // no page before this is used
    std::vector<int> q_at = {};  // where the queries stand; empty: they are the last keys' tokens
    int width() const { return d_c + d_rope; }
};

template <class Core>  // cpu::SoftmaxAttention or gpu::SoftmaxAttention
Core core_of(const Case& c) {
    Core a{};
    a.heads = c.heads;
    a.kv_heads = 1;
    a.d_qk = c.width();
    a.d_v = c.d_c;
    a.scale = 1 / std::sqrt((float)c.width());
    a.window = c.window;
    a.num_seqs = (int)c.q_len.size();
    a.q_stride = c.heads * c.width();
    return a;
}

std::vector<int> offsets(const std::vector<int>& lengths) {
    std::vector<int> cu(1, 0);
    for (int n : lengths) cu.push_back(cu.back() + n);
    return cu;
}

SoftmaxAttention device_core(const Case& c, const int* cu_q, const int* cu_k, const floatX* q, const AttentionState* states, const StatePages& pages) {
    SoftmaxAttention a = core_of<SoftmaxAttention>(c);
    a.max_q = *std::max_element(c.q_len.begin(), c.q_len.end());
    a.max_k = *std::max_element(c.k_len.begin(), c.k_len.end());
    a.q_rows = offsets(c.q_len).back();
    a.cu_q = cu_q;
    a.cu_k = cu_k;
    a.q = q;
    a.states = states;
    a.pages = pages;
    return a;
}

// blocks > 0: the work is dealt out to so many at most. overlap: the kernel may begin before the one in front of it has ended.
bool run_version(int version, cudaStream_t stream, const SoftmaxAttention& a, floatX* o, float* lse, Scratch scratch, int blocks, bool overlap) {
    int64_t o_stride = (int64_t)a.heads * a.d_v;
    if (version <= 2) {
        if (version == 2 && !decode::tensor_cores_can(a)) return false;
        decode::softmax_decode_as(stream, a, {o, o_stride, lse}, scratch, version == 2, overlap, [&](decode::Launch& x) {
            if (blocks == 0) return;
            x.blocks = blocks;
            x.least = 1;
        });
        return true;
    }
#ifdef GPU_FLOAT32
    return false;
#else
    if (!decode::hopper_decode_can(a)) return false;
    decode::hopper_decode(stream, a, o, o_stride, lse, scratch, overlap, blocks);
    return true;
#endif
}

int64_t scratch_bytes_of(const Case& c, int max_q) {
    int64_t bytes = softmax_decode_scratch(c.heads, 1, c.width(), c.d_c, (int)c.q_len.size(), max_q);
#ifndef GPU_FLOAT32
    bytes = std::max(bytes, decode::hopper_decode_scratch(c.heads, 1, c.width(), c.d_c, max_q));
#endif
    return bytes;
}

void check(Ladder& ladder, const char* name, const Case& c, uint64_t seed) {
    const int num_seqs = (int)c.q_len.size(), rows = offsets(c.q_len).back(), width = c.width(), q_stride = c.heads * width;
    std::vector<int> cu_q = offsets(c.q_len), cu_k = offsets(c.k_len), pages_before(1, 0);
    for (int n : c.k_len) pages_before.push_back(pages_before.back() + (int)ceil_div(n, c.page_size));
    std::vector<float> q = random_numbers((int64_t)rows * q_stride, seed + 1, c.q_size), numbers = random_numbers((int64_t)cu_k.back() * width, seed);
    if (c.far_key)
        for (int s = 0; s < num_seqs; s++)
            for (int i = 0; i < width; i++)
                numbers[(int64_t)(cu_k[s] + c.k_len[s] / 2) * width + i] =
                    round_to_working_type(-5e5f / std::sqrt((float)width) * q[(int64_t)cu_q[s] * q_stride + i]);

    // Pages in an order of their own, poison wherever no row stands.
    const int64_t page = c.page_size * width, pages = pages_before.back();
    std::vector<float> pool(pages * page, NAN);
    std::vector<int> where(pages);
    for (int64_t p = 0; p < pages; p++) where[p] = (int)p;
    for (int64_t p = pages - 1; p > 0; p--) std::swap(where[p], where[philox(seed, (uint32_t)p, 0, 0, 1).word[0] % (p + 1)]);
    std::vector<int> tables, device_ids;
    for (int s = 0; s < num_seqs; s++) {
        for (int j = 0; j < c.k_len[s]; j++)
            memcpy(&pool[where[pages_before[s] + j / c.page_size] * page + j % c.page_size * width], &numbers[(int64_t)(cu_k[s] + j) * width],
                   width * sizeof(float));
        for (int p = pages_before[s]; p < pages_before[s + 1]; p++) {
            tables.push_back(where[p]);
            device_ids.push_back(c.first_page + where[p]);
        }
        tables.push_back(INT_MIN);  // an entry that nobody may follow
        device_ids.push_back(INT_MIN);
    }
    floatX* all_pages;  // of which most are never touched if first_page is large
    CUDA_CHECK(cudaMalloc(&all_pages, std::max<int64_t>(1, (c.first_page + pages) * page) * sizeof(floatX)));
    {
        DeviceArray<floatX> used(pool);
        CUDA_CHECK(cudaMemcpy(all_pages + c.first_page * page, used, pool.size() * sizeof(floatX), cudaMemcpyDeviceToDevice));
    }
    DeviceArray<int> device_tables(device_ids);
    std::vector<cpu::AttentionState> host_states(num_seqs);
    std::vector<AttentionState> states(num_seqs);
    for (int s = 0; s < num_seqs; s++) {
        int first = pages_before[s] + s;
        host_states[s] = {c.k_len[s] - c.q_len[s], nullptr, pool.data(), tables.data() + first, page, c.page_size, width};
        states[s] = {c.k_len[s] - c.q_len[s], nullptr, all_pages, device_tables + first, page, c.page_size, width};
    }
    DeviceArray<AttentionState> device_states(states);

    std::vector<float> o((int64_t)rows * c.heads * c.d_c), lse_of_rows(rows * c.heads), lse(rows * c.heads);
    cpu::SoftmaxAttention reference = core_of<cpu::SoftmaxAttention>(c);
    reference.cu_q = cu_q.data();
    reference.cu_k = cu_k.data();
    reference.q = q.data();
    reference.q_at = c.q_at.empty() ? nullptr : c.q_at.data();
    reference.states = host_states.data();
    std::vector<float> cpu_scratch(cpu::softmax_forward_scratch(cu_k.back(), 1, width) + 16);
    cpu::softmax_forward(reference, o.data(), c.heads * c.d_c, lse_of_rows.data(), {cpu_scratch.data(), (int64_t)cpu_scratch.size()});
    for (int n = 0; n < rows; n++)
        for (int h = 0; h < c.heads; h++) lse[h * rows + n] = lse_of_rows[n * c.heads + h];

    DeviceArray<int> device_cu_q(cu_q), device_cu_k(cu_k), device_q_at(c.q_at);
    DeviceArray<floatX> device_q(q), device_o(o.size());
    DeviceArray<float> device_lse(lse.size());
    SoftmaxAttention a = device_core(c, device_cu_q, device_cu_k, device_q, device_states, {all_pages, c.first_page + pages, page, width, c.page_size});
    if (!c.q_at.empty()) a.q_at = device_q_at;
    for (int blocks : {0, 1, 3, 14}) {
        int64_t bytes = scratch_bytes_of(c, a.max_q);
        DeviceArray<char> scratch(bytes);
        std::string shape = format("%s: %d sequences, NH %d d %d+%d, pages of %d, %d blocks", name, num_seqs, c.heads, c.d_c, c.d_rope, c.page_size, blocks);
        ladder.check(shape, {output("o", device_o, o), output("lse", device_lse, lse)}, [&](int version) {
            return run_version(version, ladder.stream, a, device_o, device_lse, {scratch, bytes}, blocks, blocks == 3);
        });
    }
    CUDA_CHECK(cudaFree(all_pages));
}

// B sequences of `length` tokens, one query each, pages of 64 tokens in an order of their own, all in `pool`. layers > 1: as many calls one behind another,
// each on memory of its own, as in a step of generation; the time is that of all.
void time(Ladder& ladder, DeviceArray<floatX>& pool, int B, int length, int heads, int d_c, int d_rope, int layers = 1) {
    Case c = {heads, d_c, d_rope, 64, std::vector<int>(B, 1), std::vector<int>(B, length)};
    const int64_t page = (int64_t)c.page_size * c.width(), table = ceil_div(length, c.page_size), pages = B * table;
    if (layers * pages * page > pool.size) return;
    std::vector<int> where(pages);
    for (int64_t p = 0; p < pages; p++) where[p] = (int)p;
    for (int64_t p = pages - 1; p > 0; p--) std::swap(where[p], where[philox(5, (uint32_t)p, 0, 0, 1).word[0] % (p + 1)]);
    DeviceArray<int> tables(where), cu_q(offsets(c.q_len)), cu_k(offsets(c.k_len));
    std::vector<AttentionState> states;
    for (int l = 0; l < layers; l++)
        for (int s = 0; s < B; s++) states.push_back({length - 1, nullptr, pool + l * pages * page, tables + s * table, page, c.page_size, c.width()});
    DeviceArray<AttentionState> device_states(states);
    DeviceArray<floatX> q(random_numbers((int64_t)B * heads * c.width(), 4)), o((int64_t)B * heads * d_c);
    SoftmaxAttention a = device_core(c, cu_q, cu_k, q, device_states, {pool, pages, page, c.width(), c.page_size});
    int64_t bytes = scratch_bytes_of(c, 1);
    DeviceArray<char> scratch(bytes);
    double keys = (double)layers * B * length;
    Work work = {2 * keys * heads * (c.width() + d_c), (keys * c.width() + (double)layers * B * heads * (c.width() + d_c)) * sizeof(floatX)};
    std::string shape = format("NH %d d %d+%d, B %d, %d keys", heads, d_c, d_rope, B, length);
    if (layers > 1) shape += format(", %d layers", layers);
    ladder.time(shape, work, [&](int version) {
        if (work.flops > (version == 1 ? 1e12 : version == 2 ? 4e12 : 1e15)) return false;
        bool runs = true;
        for (int l = 0; l < layers; l++) {
            a.states = device_states + l * B;
            a.pages.rows = pool + l * pages * page;
            runs = run_version(version, ladder.stream, a, o, nullptr, {scratch, bytes}, 0, layers > 1) && runs;
        }
        return runs;
    });
}

int main(int argc, char** argv) {
    Ladder ladder("mla_decode", {"CUDA cores", "mma.sync", "Hopper: bulk copies, products by warpgroups"}, argc, argv);
    //                                                      NH  d_c d_r page queries           keys
    check(ladder, "one tile", {16, 512, 64, 64, {1}, {64}}, 1);
    check(ladder, "lengths", {16, 512, 64, 64, {1, 1, 1, 1, 1, 1}, {1, 63, 64, 65, 1000, 700}}, 2);
    check(ladder, "lengths", {128, 512, 64, 64, {1, 1, 0, 1, 1}, {65, 0, 30, 1000, 63}}, 3);
    check(ladder, "lengths", {12, 256, 32, 64, {1, 1, 1, 1, 1, 0, 1}, {0, 1, 63, 64, 65, 0, 1000}}, 4);
    check(ladder, "pages of 16", {16, 512, 64, 16, {1, 1, 1, 1}, {15, 16, 129, 1000}}, 5);
    check(ladder, "pages of 1", {13, 512, 64, 1, {1, 1, 1}, {1, 65, 300}}, 6);
    check(ladder, "pages of 1", {12, 256, 32, 1, {1, 2, 1}, {1, 65, 300}}, 7);
    check(ladder, "pages of 128", {3, 256, 64, 128, {1, 1}, {500, 128}}, 8);
    check(ladder, "no rope", {1, 256, 0, 64, {1, 3}, {500, 70}}, 9);
    check(ladder, "no rope", {12, 512, 0, 16, {1, 1}, {500, 70}}, 10);
    check(ladder, "small", {5, 128, 16, 32, {1, 4, 17}, {300, 4, 17}}, 11);
    check(ladder, "queries", {16, 512, 64, 64, {17, 2, 5, 1, 16}, {17, 64, 300, 3, 1000}}, 12);
    check(ladder, "queries", {128, 512, 64, 64, {3, 1, 2}, {200, 65, 2}}, 13);
    check(ladder, "rows that see nothing", {12, 256, 32, 16, {3, 1, 6}, {0, 0, 2}}, 14);
    check(ladder, "window", {12, 256, 32, 16, {3, 1, 6}, {100, 500, 130}, 33}, 15);
    check(ladder, "window", {128, 512, 64, 64, {2, 1}, {300, 900}, 100}, 16);
    check(ladder, "queries elsewhere", {8, 256, 32, 8, {1, 2, 1}, {30, 70, 5}, 10, 1, false, 0, {29, 71, 40}}, 17);
    check(ladder, "logits times 100", {16, 512, 64, 64, {1, 2}, {1000, 300}, 0, 100}, 18);
    check(ladder, "logits times 100", {128, 512, 64, 64, {1}, {700}, 0, 100}, 19);
    check(ladder, "one key far away", {1, 512, 64, 64, {1, 1}, {1000, 3}, 0, 1, true}, 20);
    check(ladder, "one key far away", {16, 256, 32, 64, {1, 1}, {1000, 3}, 0, 1, true}, 21);
    check(ladder, "beyond 2^31 numbers", {16, 512, 64, 64, {1, 1}, {1000, 300}, 0, 1, false, 69000}, 22);
    // All numbers of heads at all sizes.
    for (int heads : {1, 3, 12, 13, 16, 128})
        for (int d_c : {128, 256, 512})
            for (int d_rope : {0, 32, 64})
                check(ladder, "heads", {heads, d_c, d_rope, d_rope == 32 ? 16 : 64, {1, 1, 2, 1}, {1, 130, 65, 0}}, 100 + heads + d_c + d_rope);
    if (getenv("MLA_CHECK_ONLY")) return ladder.finish();
    {
        constexpr int64_t piece = 1 << 20;
        DeviceArray<floatX> pool((int64_t)768 * 32768 * 576), random(random_numbers(piece, 3));
        for (int64_t i = 0; i < pool.size; i += piece)
            CUDA_CHECK(cudaMemcpyAsync(pool + i, random, std::min(piece, pool.size - i) * sizeof(floatX), cudaMemcpyDeviceToDevice, ladder.stream));
        for (int heads : {16, 128})
            for (int B : {64, 256, 768})
                for (int length : {1024, 4096, 32768}) time(ladder, pool, B, length, heads, 512, 64);
        for (int heads : {16, 128}) time(ladder, pool, 64, 1024, heads, 512, 64, 12);
        time(ladder, pool, 64, 4096, 12, 256, 32);
        time(ladder, pool, 256, 4096, 12, 256, 32);
        time(ladder, pool, 1, 32768, 16, 512, 64);
    }
    return ladder.finish();
}
