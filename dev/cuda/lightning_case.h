// For the ladders of Lightning attention's recurrence: sequences, some of which start from a memory or leave one, on the CPU (the reference) and on the device.
#pragma once

#include <numeric>

#include "../../gpt2/cuda/lightning.cuh"
#include "ladder.h"

using namespace gpu;

struct LightningShape {
    const char* options;  // behind "lightning"
    int heads, hs;
    std::vector<int> lengths;
    bool memory = false;
    int layer = 3, layers = 12;

    int64_t tokens() const { return std::accumulate(lengths.begin(), lengths.end(), (int64_t)0); }
    int longest() const { return *std::max_element(lengths.begin(), lengths.end()); }
    int64_t channels() const { return (int64_t)heads * hs; }
    std::string name() const {
        std::string s = format("%s NH%d hs%d", *options ? options + 1 : "minimax", heads, hs);
        if (lengths.size() > 1 && longest() * (int64_t)lengths.size() == tokens()) return s + format(" B%zu T%d", lengths.size(), longest());
        for (size_t i = 0; i < lengths.size(); i++) s += format("%s%d", i ? "," : " T", lengths[i]);
        return s + (memory ? " memory" : "");
    }
    // FLOPs a token, chunks of 64: products over (half of) a chunk's other tokens, and products with the state.
    double flops(int pairs, int states) const { return (double)tokens() * channels() * 2 * (pairs * 65 / 2.0 + states * hs); }
};

inline AttentionConfig lightning_config(const LightningShape& s) {
    ModelConfig c;
    c.layers = s.layers;
    c.heads = s.heads;
    c.channels = (int)s.channels();
    parse_attention(c, std::string("lightning") + s.options, {}, "");
    return c.attention[s.layer];
}

inline std::vector<int> offsets(const std::vector<int>& lengths) {
    std::vector<int> cu(1, 0);
    for (int n : lengths) cu.push_back(cu.back() + n);
    return cu;
}

// Sequence s starts from memories block s, unless s%3 == 1, and leaves its own in block s+1 (the last one in block 0), unless s%4 == 2: not where it stood,
// but where another sequence starts.
inline int memory_from(int s) { return s % 3 == 1 ? -1 : s; }
inline int memory_to(int s, int num_seqs) { return s % 4 == 2 ? -1 : (s + 1) % num_seqs; }

struct LightningCase {
    LightningShape shape;
    AttentionConfig config;
    int64_t N, C, size;  // size: of a memory
    int S;
    std::vector<int> cu;
    std::vector<float> u, d_o, before;  // before: the memories
    std::vector<float> o, after, du;    // what is to come out

    DeviceArray<floatX> d_u, d_d_o;
    DeviceArray<int> d_cu;
    DeviceArray<float> memories, copies;
    DeviceArray<const float*> from, starts;
    DeviceArray<float*> to;
    DeviceArray<char> scratch_memory;
    DeviceArray<floatX> states;  // that forward leaves, before every chunk at most

    // Unless `timing`, with the reference results.
    explicit LightningCase(const LightningShape& s, bool timing = false)
        : shape(s),
          config(lightning_config(s)),
          N(s.tokens()),
          C(s.channels()),
          size(C * s.hs),
          S((int)s.lengths.size()),
          cu(offsets(s.lengths)),
          u(timing ? 0 : N * 3 * C),
          d_u(N * 3 * C),
          d_d_o(N * C),
          d_cu(cu),
          memories(S * size),
          copies(s.memory ? S * size : 0),
          from(s.memory ? S : 0),
          starts(s.memory ? S : 0),
          to(s.memory ? S : 0),
          scratch_memory(lightning_recurrence_scratch(config, N) + std::max<int64_t>(N / 64, 1) * C * s.hs * (int64_t)sizeof(floatX)),
          states(std::max<int64_t>(N / 64, 1) * C * s.hs) {
        if (timing) {  // a million random numbers again and again
            repeat(d_u, random_numbers(1 << 20, 1));
            repeat(d_d_o, random_numbers(1 << 20, 2));
            return;
        }
        u = random_numbers(N * 3 * C, 1);
        d_o = random_numbers(N * C, 2);
        before = random_numbers(S * size, 3, 0.5);
        d_u.copy_from(u);
        d_d_o.copy_from(d_o);
        if (s.memory) {
            std::vector<const float*> from_host;
            std::vector<float*> to_host;
            for (int k = 0; k < S; k++) {
                from_host.push_back(memory_from(k) < 0 ? nullptr : memories + memory_from(k) * size);
                to_host.push_back(memory_to(k, S) < 0 ? nullptr : memories + memory_to(k, S) * size);
            }
            from.copy_from(from_host);
            to.copy_from(to_host);
        }
        reference();
    }

    Scratch scratch() const { return {scratch_memory.data, scratch_memory.size}; }
    Lightning pass() const { return make_lightning(config, S, N, shape.longest(), d_cu); }

    // As the layer does it: what sequences start from is copied before anybody leaves anything.
    Lightning begin(cudaStream_t stream) const {
        Lightning g = pass();
        if (!shape.memory) return g;
        lightning_starts(stream, starts, copies, from, S, size, true);
        g.memory_from = starts;
        return g;
    }
    // every >= 0: leaves the states before every 2^every chunks.
    void forward(cudaStream_t stream, floatX* o_out, const LightningMethod& method, int every = -1) const {
        Lightning g = begin(stream);
        if (shape.memory) g.memory_to = to;
        if (every >= 0) g.every = every;
        lightning_recurrence_forward(stream, g, d_u, o_out, scratch(), method, every >= 0 ? states.data : nullptr);
    }
    // The states alone, for backward; memories stay as they are.
    void leave_states(cudaStream_t stream, floatX* o_out, const LightningMethod& method, int every = 1) const {
        Lightning g = begin(stream);
        g.every = every;
        lightning_recurrence_forward(stream, g, d_u, o_out, scratch(), method, states);
    }
    void backward(cudaStream_t stream, floatX* du_out, const LightningMethod& method, bool take_states = false) const {
        lightning_recurrence_backward(stream, begin(stream), d_u, d_d_o, du_out, scratch(), method, take_states ? states.data : nullptr);
    }
    void poison_scratch() const {
        CUDA_CHECK(cudaMemset(scratch_memory.data, 0xff, scratch_memory.size));
        CUDA_CHECK(cudaMemset(states.data, 0xff, states.size * sizeof(floatX)));
    }

    // dq, dk or dv of du (N,3C).
    std::vector<float> part_of(const DeviceArray<floatX>& du_out, int part) const {
        std::vector<floatX> x(N * C);
        const size_t row = C * sizeof(floatX);
        if (N > 0) CUDA_CHECK(cudaMemcpy2D(x.data(), row, du_out.data + part * C, 3 * row, row, N, cudaMemcpyDeviceToHost));
        std::vector<float> y(N * C);
        for (int64_t i = 0; i < N * C; i++) y[i] = host_float(x[i]);
        return y;
    }

    // A second look at a result (N,C): the largest error of a piece of it, a head's numbers of up to 16 tokens of a sequence. The norm of the whole does not
    // show what is wrong in a head that forgets fast, or only behind a border. Of pieces of a few tokens too much may cancel: they are left out.
    Output worst_piece(const Output& of) const {
        auto worst = [this, read = of.read, reference = of.reference] {
            const std::vector<float> out = read();
            double most = 0;
            for (int s = 0; s < S; s++)
                for (int first = cu[s]; first + 8 <= cu[s + 1]; first += 16)
                    for (int h = 0; h < shape.heads; h++) {
                        double difference = 0, norm = 0;
                        for (int n = first; n < std::min(first + 16, cu[s + 1]); n++)
                            for (int64_t i = n * C + h * shape.hs; i < n * C + (h + 1) * shape.hs; i++) {
                                difference += ((double)out[i] - reference[i]) * ((double)out[i] - reference[i]);
                                norm += (double)reference[i] * reference[i];
                            }
                        if (std::isnan(difference)) return std::vector<float>{NAN};
                        if (difference > 0) most = std::max(most, std::sqrt(difference / norm));
                    }
            return std::vector<float>{(float)(1 + most)};
        };
        return {of.name + ", worst piece", {1}, worst, [] {}, 2 * TOLERANCE, 0};
    }

    // Does a sweep take this kernel?
    bool takes(int kernel) const {
        floatX* p = d_u;
        LightningRows rows = {p, 3 * (int)C, true};
        return lightning_plan(pass(), {rows, rows, rows, {p, (int)C, p, 3 * (int)C}, false, false, {}, {}}, kernel).kernel == kernel;
    }

 private:
    static void repeat(DeviceArray<floatX>& x, const std::vector<float>& numbers) {
        DeviceArray<floatX> some(numbers);
        for (int64_t i = 0; i < x.size; i += some.size)
            CUDA_CHECK(cudaMemcpy(x + i, some.data, std::min(some.size, x.size - i) * sizeof(floatX), cudaMemcpyDeviceToDevice));
    }

    void reference() {
        cpu::AttentionContext ctx{};
        ctx.config = &config;
        ctx.num_seqs = S;
        ctx.cu_seqlens = cu.data();
        cpu::Lightning g = cpu::make_lightning(ctx);
        size_t chunks = g.chunks.size();
        std::vector<float> states(chunks * size), dstates(chunks * size);  // [i]: behind chunk i; dS before it
        o.resize(N * C);
        du.resize(N * 3 * C);
        after = before;
        for (int s = 0; s < S; s++) {
            int first = g.first[s], end = g.first[s + 1];
            float* start = shape.memory && memory_from(s) >= 0 ? before.data() + memory_from(s) * size : nullptr;
            float* finish = shape.memory && memory_to(s, S) >= 0 ? after.data() + memory_to(s, S) * size : nullptr;
            if (first == end) {
                cpu::pass_memory(finish, start, size);
                continue;
            }
            g.chunks[first].S = start;
            for (int i = first; i + 1 < end; i++) {
                g.chunks[i].S_next = g.chunks[i + 1].S = states.data() + i * size;
                g.chunks[i].dS_next = g.chunks[i + 1].dS = dstates.data() + i * size;
            }
            g.chunks[end - 1].S_next = finish;
        }
        cpu::lightning_recurrence_forward(g, u.data(), o.data());
        cpu::lightning_recurrence_backward(g, u.data(), d_o.data(), du.data());
    }
};
