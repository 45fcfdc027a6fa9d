// The sampler: from rows of logits to tokens. The draw goes along the tokens that temperature, top k, top p and min p leave, in the order of their ids.
//
// A row of GPT-2 is 50257 logits, 101 KB in bf16: one multiprocessor reads it in some 2 µs, all of them read 256 rows in 9 µs (25.7 MB at 3.0 TB/s). A weight
// takes 14 operations in double precision, of which an H100's multiprocessor does 64 a clock: 6.3 µs a row, 12 µs for 256 rows on 132 multiprocessors, which
// take two turns. Copying 256 rows to the host instead, as float32, takes 1 ms, and the draws as long there.
//
//   1  a thread a draw, as on the CPU but without a heap: the likeliest tokens are looked for one by one, each with a pass over the row
//   2  a block a draw. The least likely token kept is found bit by bit, with a pass over the row for each of 32 bits of the logit and 17 of the id (in use for
//      float32 and for sizes that 3 refuses). Expected: 50 passes of 2 µs for top k; with top p the weights of what is still in question besides
//   3  the row is read 16 bytes a thread, several of them in flight, once more from the first-level cache; the cuts are found in a histogram with a counter for
//      each bf16 number (in use where there are more draws than a quarter of the multiprocessors). Expected: 5 µs for the likeliest, 11 µs for a draw without
//      cuts, of which 6 are arithmetic; with cuts 10 µs more, for 128 KB of counters and up to three more searches, each of three barriers
//   4  3 with a cluster of up to 8 blocks a draw, each on a multiprocessor of its own; each counts its part of the row, then adds up all blocks' counters for
//      its part of the bins (in use, but for the likeliest). Expected: all that depends on V an eighth; two or three barriers of a cluster more a search,
//      0.4 µs each: 9 µs without cuts, 15 µs with
//
// The tokens must be those of the CPU, all of them, but where a bound between two tokens is within 1e-9 of the target.
#define GPT2_NO_MAIN
#include "../../train_gpt2.cpp"
#include "ladder.h"

#include "../../gpt2/cuda/sampler.cuh"

using namespace gpu;
using sampler::Kept;
using sampler::Sampling;
using sampler::Weight;

__global__ void sampler_kernel1(Sampling s) {
    const floatX* row = s.logits + s.row[blockIdx.x] * s.Vp;
    int* token = s.token + blockIdx.x;
    float largest = -INFINITY;
    for (int i = 0; i < s.V; i++) {
        float x = to_float(row[i]);
        if (!(fabsf(x) <= FLT_MAX)) {
            *token = -1;
            return;
        }
        if (x > largest) largest = x, *token = i;
    }
    if (s.greedy) return;
    Kept kept = sampler::all_within_reach(s, largest);

    // The `count` likeliest ones, or fewer if these have weights of `wanted` already.
    auto take = [&](int count, Weight wanted) {
        Weight sum = 0;
        Kept taken = {largest, INFINITY, -1};
        for (int n = 0; n < count && sum < wanted; n++) {
            float next = -INFINITY;
            int id = -1;
            for (int i = 0; i < s.V; i++) {
                float x = to_float(row[i]);
                if (kept(x, i) && !taken(x, i) && x > next) next = x, id = i;
            }
            if (id < 0) return;
            taken.least = next;
            taken.last_tie = id;
            sum += sampler::weight_of_logit(s, next, largest);
        }
        kept = taken;
    };
    auto total = [&] {
        Weight sum = 0;
        for (int i = 0; i < s.V; i++) sum += sampler::weight_if_kept(s, kept, to_float(row[i]), i);
        return sum;
    };
    Weight min_weight = s.min_weight;
    s.min_weight = 0;
    if (s.top_k < s.V) take(s.top_k, ULLONG_MAX);
    if (s.top_p < 1) take(s.V, sampler::top_p_weight(s, total()));
    s.min_weight = min_weight;

    Weight target = (Weight)(s.uniform[blockIdx.x] * (double)total()), sum = 0;
    for (int i = 0; i < s.V; i++) {
        Weight w = sampler::weight_if_kept(s, kept, to_float(row[i]), i);
        if (w > 0) *token = i;
        if ((sum += w) > target) return;
    }
}

// `team`: version 4's blocks a draw; 0: it chooses, and does not begin before its time.
static bool run(int version, cudaStream_t stream, const Sampling& s, int64_t draws, int team = 0) {
    switch (version) {
        case 1:
            if (s.V > 1000 && !s.greedy && (s.top_k < s.V || s.top_p < 1)) return false;
            sampler_kernel1<<<(unsigned)draws, 1, 0, stream>>>(s);
            return true;
        case 2:
            sampler::launch(stream, sampler::sampler_kernel2, 0, s, draws, 1, false);
            return true;
        default:
            if (!sampler::takes_packs(s) || (version == 4 && s.greedy)) return false;
            sampler::sampler4(stream, s, draws, version == 3 ? 1 : team ? team : sampler::team_size(s, draws), team > 0);
            return true;
    }
}

// ---- against the CPU ---------------------------------------------------------------------------------------------------------------------------------------

// Rows of all kinds, behind V what must not matter.
static std::vector<float> logits_of_all_kinds(int V, int64_t Vp, std::vector<const char*>* kinds) {
    *kinds = {"trained", "flat", "peaked", "equal", "many ties", "extremes", "rising", "falling", "nan first", "nan last", "infinite", "−infinite"};
    std::vector<float> x = random_numbers((int64_t)kinds->size() * Vp, V, 1);
    for (size_t r = 0; r < kinds->size(); r++) {
        float* row = &x[r * Vp];
        for (int i = 0; i < V; i++) {
            float z = row[i], of_kind[] = {z * 2.5f,
                                           z * 0.01f,
                                           z * 3 + (i % 5003 == 77 ? 20 : 0),
                                           -2.5,
                                           i % 11 == 3 ? -0.f : std::rint(z),  // of both zeros
                                           1e4f - i % 3 * i % 5 * 2000,
                                           i * 4.f / V,
                                           i * -20.f / V - 3};
            row[i] = round_to_working_type(of_kind[r < 8 ? r : 0]);
        }
        for (int64_t i = V; i < Vp; i++) row[i] = r % 2 ? NAN : 1e5;
        if (r == 8) row[0] = NAN;
        if (r == 9) row[V - 1] = NAN;
        if (r == 10) row[V / 2] = INFINITY;
        if (r == 11) row[V / 3] = -INFINITY;
    }
    return x;
}

// Whether another token may come of weights that differ in the last digits: the target, or what top p asks for, is within 1e-9 of where a token begins.
static bool on_a_bound(const float* row, int V, const SamplerOptions& o, double uniform) {
    int token = sample_token(row, V, o, uniform);
    for (double step : {-1e-9, 1e-9}) {
        SamplerOptions p = o;
        p.top_p += step;
        if (sample_token(row, V, o, std::min(std::max(uniform + step, 0.0), 1 - 0x1p-53)) != token) return true;
        if (o.top_p < 1 && sample_token(row, V, p, uniform) != token) return true;
    }
    return false;
}

static int asked = 0, skipped = 0, runs = 0;

static void check(Ladder& ladder, int V, int64_t Vp) {
    std::vector<const char*> kinds;
    std::vector<float> logits = logits_of_all_kinds(V, Vp, &kinds);
    DeviceArray<floatX> d_logits(logits);
    std::vector<SamplerOptions> options;
    for (double temperature : {0.0, 0.7, 1.0, 2.0}) options.push_back({temperature});
    for (int64_t k : {1, 5, 50, V - 1, V}) options.push_back({1, k});
    for (double p : {1e-9, 0.1, 0.9, 0.999}) options.push_back({0.7, 0, p});
    options.insert(options.end(),
                   {{1, 0, 1, 0.05}, {1, 0, 1, 1}, {2, 50, 0.9}, {0.7, 40, 0.5, 0.05}, {1, 0, 0.95, 0.01}, {1e-5, 0, 0.9}, {100, 300, 0.999, 0.9}});
    for (const SamplerOptions& o : options) {
        std::vector<int> row;
        std::vector<double> uniform;
        for (size_t r = 0; r < kinds.size(); r++)
            for (int i = 0; i < 6; i++) {
                row.push_back((int)((r * 5 + i) % kinds.size()));
                uniform.push_back(i == 0 ? 0 : i == 1 ? 0.5 : i == 2 ? 1 - 0x1p-53 : sampling_uniform(V, (uint32_t)r, i));
            }
        int draws = (int)row.size();
        std::vector<float> expected(draws);
#pragma omp parallel for schedule(dynamic)
        for (int d = 0; d < draws; d++) {
            try {
                expected[d] = (float)sample_token(&logits[row[d] * Vp], V, o, uniform[d]);
            } catch (const Error&) {
                expected[d] = -1;
            }
        }
        DeviceArray<int> d_row(row), d_token(draws);
        DeviceArray<double> d_uniform(uniform);
        auto read = [&] {
            std::vector<float> token = d_token.to_host();
            int shown = 0;
            for (int d = 0; d < draws; d++) {
                asked++;
                if (token[d] == expected[d]) continue;
                if (expected[d] >= 0 && token[d] >= 0 && on_a_bound(&logits[row[d] * Vp], V, o, uniform[d])) {
                    skipped++;
                    token[d] = expected[d];
                } else if (shown++ < 3) {
                    printf("%s, uniform %.17g: token %g, not %g\n", kinds[row[d]], uniform[d], token[d], expected[d]);
                }
            }
            return token;
        };
        Output tokens = {"tokens", expected, read, [&] { CUDA_CHECK(cudaMemset(d_token, 0x7f, draws * sizeof(int))); }, 0, 0};
        Sampling s = sampler::sampling(d_token, d_logits, Vp, V, d_row, d_uniform, o);
        ladder.check(format("V=%d Vp=%ld temperature=%g top k=%ld top p=%g min p=%g", V, (long)Vp, o.temperature, (long)o.top_k, o.top_p, o.min_p), {tokens},
                     [&](int version) { return run(version, ladder.stream, s, draws, 2 << (runs++ % 3)); });
    }
}

int main(int argc, char** argv) {
    Ladder ladder("sampler",
                  {"a thread a draw", "a block a draw, the cuts bit by bit", "16 bytes a thread, the cuts from a histogram (in use)",
                   "a cluster of blocks a draw (in use)"},
                  argc, argv);
    check(ladder, 1, 8);
    check(ladder, 257, 320);
    check(ladder, 257, 257);
    check(ladder, 1000, 1000);
    check(ladder, 50257, 50304);
    check(ladder, 65535, 65536);
    check(ladder, 65537, 65600);
    printf("%d tokens, of which %d are not the CPU's but on a bound\n", asked, skipped);

    constexpr int V = 50257;
    constexpr int64_t Vp = 50304;
    for (int draws : {1, 16, 256}) {
        std::vector<float> logits = random_numbers(draws * Vp, 3, 2.5);
        std::vector<int> row(draws);
        std::vector<double> uniform(draws);
        for (int d = 0; d < draws; d++) row[d] = d, uniform[d] = sampling_uniform(1, d, 0);
        DeviceArray<floatX> d_logits(logits);
        DeviceArray<int> d_row(row), d_token(draws);
        DeviceArray<double> d_uniform(uniform);
        struct {
            const char* name;
            SamplerOptions options;
        } const cases[] = {{"greedy", {0}}, {"no cuts", {1}}, {"top k 50, top p 0.9", {0.8, 50, 0.9}}, {"top p 0.9", {0.8, 0, 0.9}}};
        for (auto& c : cases) {
            Sampling s = sampler::sampling(d_token, d_logits, Vp, V, d_row, d_uniform, c.options);
            ladder.time(format("%d×%d, %s", draws, V, c.name), {0, (double)draws * V * sizeof(floatX)},
                        [&](int version) { return run(version, ladder.stream, s, draws); });
        }
    }
    return skipped * 100 < asked ? ladder.finish() : 1;
}
