// A decode step of one sequence: all its linear layers and causal attention, a token, one behind another.
//
// A token needs each weight and each old key and value once: of GPT-2 124M 247 MB and, 512 tokens behind, 19 MB of keys and values: 88 µs at 3.0 TB/s; of 1558M
// 3.11 GB and 157 MB: 1.09 ms. The layers depend on one another: 60 steps (240) of which each is at most 1.6 µs (6.8) of reading.
//
//   1  launches that overlap (matvec.cuh; rope_append or append_rows, softmax_decode: decode.cuh): 2.9 µs a linear layer, 8.3 µs attention at 1k
//   2  one kernel, a block a multiprocessor, that goes through the list of layers (chain.cuh; in use): weights run through queues that know no borders between
//      layers, results go from block to block through memory whose being empty can be seen. What is left of a step's latency, in clocks of 1.75 GHz: a result
//      to the second-level cache 300, seen by who polls 400, statistics of the norm and the norm 350, products 150 to 350, the sum over the warps 200: 0.75 µs.
//      Expected of 124M: 60 steps in 45 µs, less than the 56 µs in which their weights are read: 88 µs and what the first weights and the start take, 100 in
//      all. Of 1558M: 1.15 ms
#define GPT2_NO_MAIN
#include "../../train_gpt2.cpp"
#include "steps.h"

#include "../../gpt2/cuda/chain.cuh"

using namespace gpu;

struct Case {
    int layers, channels, heads, kv_heads, vocabulary;
    int behind;  // tokens in the sequence; −1: no attention, its product takes the first C numbers of the rows that come from the one before
    bool rope = false;
    int window = 0, page_size = 16;
    int max_kv = 0;  // the bound that the host knows; 0: the next power of two
    int64_t qkv() const { return channels + 2ll * kv_channels(); }
    int64_t kv_channels() const { return (int64_t)kv_heads * hs(); }
    int hs() const { return channels / heads; }
    int64_t layer_weights() const { return channels * (qkv() + 9ll * channels); }
    std::string name() const {
        std::string s = format("%d layers of %d, %d outputs", layers, channels, vocabulary);
        if (behind < 0) return s + ", no attention";
        return s + format(", %d heads on %d, %d behind, pages of %d%s%s", heads, kv_heads, behind, page_size, rope ? ", rotated" : "",
                          window ? format(", window %d", window).c_str() : "");
    }
};

// n numbers: a few million random ones over and over.
static void fill(floatX* x, int64_t n, uint64_t seed, double std, double mean = 0) {
    std::vector<float> some = random_numbers(std::min<int64_t>(n, 1 << 20), seed, std, mean);
    DeviceArray<floatX> source(some);
    for (int64_t i = 0; i < n; i += source.size)
        CUDA_CHECK(cudaMemcpy(x + i, source.data, std::min(source.size, n - i) * sizeof(floatX), cudaMemcpyDeviceToDevice));
}

// A model, a sequence in pages that lie in no order, and a token's way through them.
struct Step {
    const Case& c;
    DeviceArray<floatX> weights, gain, shift, bias, start, x, mid, qkv, o, fc, logits, rows;
    int pages;
    int64_t page_stride;
    std::vector<int> page_order;
    DeviceArray<int> page_table, position, cu;
    DeviceArray<AttentionState> states;
    DeviceArray<TokenPlace> place;
    DeviceArray<char> scratch;

    explicit Step(const Case& c)
        : c(c),
          weights(c.layers * c.layer_weights() + (int64_t)c.vocabulary * c.channels),
          gain(c.channels),
          shift(c.channels),
          bias(std::max<int64_t>(4 * c.channels, c.qkv())),
          start(c.channels),
          x(c.channels),
          mid(c.channels),
          qkv(c.qkv()),
          o(c.channels),
          fc(4 * c.channels),
          logits(c.vocabulary),
          rows(std::max(c.behind / c.page_size + 3, 1) * (int64_t)c.page_size * c.layers * 2 * c.kv_channels()),
          pages(std::max(c.behind / c.page_size + 3, 1)),
          page_stride((int64_t)c.page_size * c.layers * 2 * c.kv_channels()),
          page_table(pages),
          position(1),
          cu(4),
          states(c.layers),
          place(1),
          scratch(64 << 20) {
        double std = 1 / std::sqrt((double)c.channels);
        fill(weights, weights.size, 1, std);
        fill(gain, gain.size, 2, 0.2, 1);
        fill(shift, shift.size, 3, 0.5);
        fill(bias, bias.size, 4, 0.5);
        fill(start, start.size, 5, 1);
        fill(rows, rows.size, 6, 2);  // some of a thousand keys count much, so that the logits show what became of them
        for (int i = 0; i < pages; i++) page_order.push_back((int)((i * 7919ll + 3) % pages));
        if (pages % 7919 == 0) data_error("choose another number of pages");
        CUDA_CHECK(cudaMemcpy(page_table, page_order.data(), pages * sizeof(int), cudaMemcpyHostToDevice));
        if (c.behind < 0) return;
        std::vector<AttentionState> s;
        for (int l = 0; l < c.layers; l++)
            s.push_back({c.behind, nullptr, rows + l * c.page_size * 2 * c.kv_channels(), page_table, page_stride, c.page_size, 2 * c.kv_channels()});
        CUDA_CHECK(cudaMemcpy(states, s.data(), s.size() * sizeof(AttentionState), cudaMemcpyHostToDevice));
        TokenPlace first = {0, 0};
        int offsets[4] = {0, 1, 0, c.behind + 1};  // of queries, of keys
        CUDA_CHECK(cudaMemcpy(place, &first, sizeof first, cudaMemcpyHostToDevice));
        CUDA_CHECK(cudaMemcpy(cu, offsets, sizeof offsets, cudaMemcpyHostToDevice));
        CUDA_CHECK(cudaMemcpy(position, &c.behind, sizeof(int), cudaMemcpyHostToDevice));
    }

    double bytes() const {
        double keys = c.behind < 0 ? 0 : c.window ? std::min(c.window, c.behind) : c.behind;
        return (weights.size + c.layers * keys * 2 * c.kv_channels()) * sizeof(floatX);
    }
    SoftmaxAttention core(int l) const {
        SoftmaxAttention a{};
        a.heads = c.heads;
        a.kv_heads = c.kv_heads;
        a.d_qk = a.d_v = c.hs();
        a.scale = 1 / std::sqrt((float)c.hs());
        a.window = c.window;
        a.num_seqs = a.max_q = 1;
        a.q_rows = 1;
        a.cu_q = cu;
        a.cu_k = cu + 2;
        a.q = qkv;
        a.q_stride = c.qkv();
        a.k_head = a.v_head = c.hs();
        a.v_offset = c.kv_channels();
        a.states = states + l;
        a.max_k = c.max_kv;
        for (int n = 256; a.max_k <= c.behind; n *= 2) a.max_k = n;
        a.pages = {rows + l * c.page_size * 2 * c.kv_channels(), pages, page_stride, 2 * c.kv_channels(), c.page_size};
        return a;
    }

    bool run(int version, cudaStream_t stream) {
        CUDA_CHECK(cudaMemcpyAsync(x, start, c.channels * sizeof(floatX), cudaMemcpyDeviceToDevice, stream));
        NormParameters norm = {gain, shift};
        Chain chain(stream);
        const floatX* w = weights;
        bool first = true, done = true;  // the first one stands behind a copy
        auto linear = [&](floatX* out, const floatX* in, bool normed, int64_t IC, int64_t OC, bool gelu, const floatX* residual) {
            if (version == 1)
                linear_few(stream, out, in, normed ? &norm : nullptr, w, bias, 1, IC, OC, gelu, residual, !first);
            else
                done = done && chain.linear({out, in, normed ? norm : NormParameters{nullptr, nullptr}, w, bias, residual, 1, (int)IC, (int)OC, gelu});
            w += IC * OC;
            first = false;
        };
        for (int l = 0; l < c.layers; l++) {
            linear(qkv, x, true, c.channels, c.qkv(), false, nullptr);
            if (c.behind >= 0 && version == 1) {
                if (c.rope)
                    rope_append(stream, states + l, place, qkv, c.qkv(), 1, c.heads, c.kv_heads, c.hs(), position, true);
                else
                    append_rows(stream, states + l, place, qkv + c.channels, c.qkv(), (int)(2 * c.kv_channels()), 1, true);
                softmax_decode(stream, core(l), o, c.channels, nullptr, {scratch, scratch.size}, true);
            } else if (c.behind >= 0) {
                done = done && chain.causal_token(core(l), position, c.rope, o);
            }
            linear(mid, c.behind < 0 ? qkv : o, false, c.channels, c.channels, false, x);
            linear(fc, mid, true, c.channels, 4 * c.channels, true, nullptr);
            linear(x, fc, false, 4 * c.channels, c.channels, false, mid);
        }
        Matvec head = {logits, x, norm, w, nullptr, nullptr, 1, c.channels, c.vocabulary, false};
        if (version == 1) {
            linear_few(stream, logits, x, &norm, w, nullptr, 1, c.channels, c.vocabulary, false, nullptr, true);
        } else {
            done = done && chain.linear(head);
            if (done) chain.launch();
        }
        return done;
    }

    // The row of the token in each layer.
    int64_t row(int l) const { return page_order[c.behind / c.page_size] * page_stride + (l * c.page_size + c.behind % c.page_size) * 2 * c.kv_channels(); }
    std::vector<float> new_rows() const {
        std::vector<float> all = rows.to_host(), some;
        for (int l = 0; l < c.layers && c.behind >= 0; l++) some.insert(some.end(), &all[row(l)], &all[row(l)] + 2 * c.kv_channels());
        return some;
    }

    // The CPU's: logits, and the new rows.
    void reference(std::vector<float>* logits_out, std::vector<float>* rows_out) const {
        std::vector<float> W = weights.to_host(), g = gain.to_host(), h = shift.to_host(), b = bias.to_host(), u = start.to_host(), all = rows.to_host();
        int64_t C = c.channels, KVhs = c.kv_channels(), hs = c.hs();
        std::vector<float> v(C), z(c.qkv()), f(4 * C), y(C), m(1), r(1);
        const float* w = W.data();
        auto linear = [&](std::vector<float>& out, const std::vector<float>& in, int64_t IC, int64_t OC, bool biased = true) {
            cpu::linear_forward(out.data(), in.data(), w, biased ? b.data() : nullptr, 1, IC, OC);
            w += IC * OC;
        };
        for (int l = 0; l < c.layers; l++) {
            cpu::layernorm_forward(v.data(), m.data(), r.data(), u.data(), g.data(), h.data(), 1, C);
            linear(z, v, C, c.qkv());
            if (c.behind < 0) {
                y.assign(z.begin(), z.begin() + C);
            } else {
                for (int64_t i = 0; c.rope && i < C + KVhs; i += 2) {
                    double angle = c.behind * std::pow(10000.0, -(double)(i % hs) / hs), a = z[i], d = z[i + 1];
                    z[i] = (float)(a * std::cos(angle) - d * std::sin(angle));
                    z[i + 1] = (float)(a * std::sin(angle) + d * std::cos(angle));
                }
                for (int64_t i = 0; i < 2 * KVhs; i++) rows_out->push_back(z[C + i]);
                int lo = c.window ? std::max(0, c.behind - c.window + 1) : 0;
                for (int head = 0; head < c.heads; head++) {
                    int64_t kv = head / (c.heads / c.kv_heads) * hs;
                    std::vector<double> o(hs), s;
                    double top = -1e30, sum = 0;
                    auto key = [&](int j) {
                        return j == c.behind ? &z[C + kv]
                                             : &all[page_order[j / c.page_size] * page_stride + (l * c.page_size + j % c.page_size) * 2 * KVhs + kv];
                    };
                    for (int j = lo; j <= c.behind; j++) {
                        double dot = 0;
                        for (int64_t i = 0; i < hs; i++) dot += (double)z[head * hs + i] * key(j)[i];
                        s.push_back(dot / std::sqrt((double)hs));
                        top = std::max(top, s.back());
                    }
                    for (int j = lo; j <= c.behind; j++) {
                        double p = std::exp(s[j - lo] - top);
                        sum += p;
                        for (int64_t i = 0; i < hs; i++) o[i] += p * key(j)[KVhs + i];
                    }
                    for (int64_t i = 0; i < hs; i++) y[head * hs + i] = (float)(o[i] / sum);
                }
            }
            std::vector<float> branch(C);
            linear(branch, y, C, C);
            for (int64_t i = 0; i < C; i++) u[i] += branch[i];
            cpu::layernorm_forward(v.data(), m.data(), r.data(), u.data(), g.data(), h.data(), 1, C);
            linear(f, v, C, 4 * C);
            cpu::gelu_forward(f.data(), f.data(), 4 * C);
            linear(branch, f, 4 * C, C);
            for (int64_t i = 0; i < C; i++) u[i] += branch[i];
        }
        cpu::layernorm_forward(v.data(), m.data(), r.data(), u.data(), g.data(), h.data(), 1, C);
        logits_out->resize(c.vocabulary);
        linear(*logits_out, v, C, c.vocabulary, false);
    }
};

static void check(Ladder& ladder, const Case& c) {
    Step step(c);
    std::vector<float> logits, rows, first;
    step.reference(&logits, &rows);
    auto poison = [&] {
        CUDA_CHECK(cudaMemset(step.logits, 0xff, step.logits.size * sizeof(floatX)));
        for (int l = 0; l < c.layers && c.behind >= 0; l++) CUDA_CHECK(cudaMemset(step.rows + step.row(l), 0xff, 2 * c.kv_channels() * sizeof(floatX)));
    };
    std::vector<Output> outputs = {{"logits", logits, [&] { return step.logits.to_host(); }, poison, 3e-2, 1e-6}};
    if (c.behind >= 0) outputs.push_back({"rows", rows, [&] { return step.new_rows(); }, [] {}, 3e-2, 1e-6});
    ladder.check(c.name(), outputs, [&](int version) { return step.run(version, ladder.stream); });
    if (c.behind >= 0) return;
    ladder.check(c.name() + ", bits of 1",
                 {{"difference", std::vector<float>(1, 0.f),
                   [&] {
                       std::vector<float> now = step.logits.to_host();
                       return std::vector<float>(1, memcmp(now.data(), first.data(), now.size() * sizeof(float)) == 0 ? 0.f : 1.f);
                   },
                   poison, 0, 0}},
                 [&](int version) {
                     if (version == 1) return false;
                     if (!step.run(1, ladder.stream)) return false;
                     CUDA_CHECK(cudaStreamSynchronize(ladder.stream));
                     first = step.logits.to_host();
                     poison();
                     return step.run(version, ladder.stream);
                 });
}

// A step as a CUDA graph.
static void time_step(Ladder& ladder, const char* name, const Case& c) {
    static double copy_bytes_a_us = 0;
    cudaStream_t stream = ladder.stream;
    if (copy_bytes_a_us == 0) {
        copy_bytes_a_us = copy_rate(stream);
        printf("\nA step as one CUDA graph; weights and states at the rate of a copy, %.0f GB/s, in the same run.\n\n", copy_bytes_a_us / 1e3);
        printf("| model | version | µs | µs of the bytes | ratio |\n| --- | --- | --- | --- | --- |\n");
    }
    Step step(c);
    for (int version = 1; version <= 2; version++) {
        if (!ladder.wanted(version) || !step.run(version, stream)) continue;
        CUDA_CHECK(cudaStreamSynchronize(stream));
        double us = step_us(stream, [&] { step.run(version, stream); }), bytes_us = step.bytes() / copy_bytes_a_us;
        printf("| %s%s | %d | %.1f | %.1f | %.2f |\n", name, c.behind < 0 ? ", no attention" : format(", %d behind", c.behind).c_str(), version, us, bytes_us,
               us / bytes_us);
        fflush(stdout);
    }
}

int main(int argc, char** argv) {
    Ladder ladder("chain", {"launches that overlap", "one kernel; results pass from block to block (in use)"}, argc, argv);
    for (const Case& c : std::initializer_list<Case>{{1, 64, 1, 1, 16, -1},
                                                     {2, 72, 1, 1, 50, -1},
                                                     {3, 768, 12, 12, 1000, -1},
                                                     {2, 1600, 25, 25, 5000, -1},
                                                     {2, 64, 1, 1, 16, 0},
                                                     {3, 768, 12, 12, 1000, 0},
                                                     {3, 768, 12, 12, 1000, 1, false, 0, 1},
                                                     {3, 768, 12, 12, 1000, 63, true, 0, 64},
                                                     {3, 768, 12, 12, 1000, 64, false, 0, 3},
                                                     {3, 768, 12, 12, 1000, 65, true},
                                                     {3, 768, 12, 12, 1000, 1000, false},
                                                     {3, 768, 12, 12, 1000, 1000, true, 100, 7},
                                                     {2, 768, 12, 4, 1000, 300, true, 0, 16, 4096},
                                                     {2, 512, 2, 1, 1000, 700, true},
                                                     {2, 96, 4, 2, 98, 77, true, 8},
                                                     {2, 320, 4, 4, 98, 777, true},
                                                     {1, 1600, 25, 25, 1000, 600, false},
                                                     {30, 128, 2, 2, 64, 10, true},
                                                     {1, 768, 24, 24, 1000, 2000, true},  // more keys to a block than KeyPlaces holds
                                                     {1, 256, 4, 4, 50304, 70, true}})    // sums of more than TILES tiles
        check(ladder, c);
    if (argc < 2 || strcmp(argv[argc - 1], "--check") != 0) {
        time_step(ladder, "124M", {12, 768, 12, 12, 50304, -1});
        for (int behind : {512, 1000, 4000}) time_step(ladder, "124M", {12, 768, 12, 12, 50304, behind});
        time_step(ladder, "124M, rotated", {12, 768, 12, 12, 50304, 1000, true});
        time_step(ladder, "1558M", {48, 1600, 25, 25, 50304, -1});
        time_step(ladder, "1558M", {48, 1600, 25, 25, 50304, 512});
    }
    return ladder.finish();
}
