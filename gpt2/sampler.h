// From logits to a token: repetitions penalised (Keskar et al. 2019, arXiv 1909.05858), temperature, the top k, the nucleus (top p, Holtzman et al. 2020,
// arXiv 1904.09751), min p (Nguyen et al. 2024, arXiv 2407.01082), then one draw.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <vector>

#include "error.h"
#include "philox.h"

struct SamplerOptions {
    double temperature = 1;  // 0: greedy
    int64_t top_k = 0;       // only the k likeliest tokens; 0: all
    double top_p = 1;        // only the fewest tokens whose probabilities sum to p or more; 1: all
    double min_p = 0;        // only tokens at least p times as probable as the likeliest; 0: all
    double repetition_penalty = 1;
    bool operator==(const SamplerOptions& o) const {
        return temperature == o.temperature && top_k == o.top_k && top_p == o.top_p && min_p == o.min_p && repetition_penalty == o.repetition_penalty;
    }
};

// Makes the tokens that a text has already less likely: positive logits are divided by the penalty, negative ones multiplied. `tokens`: each once.
inline void penalise_repetitions(float* logits, const std::vector<int>& tokens, double penalty) {
    for (int t : tokens) logits[t] = (float)(logits[t] > 0 ? logits[t] / penalty : logits[t] * penalty);
}

// The random number that picks the token at `position` of sequence number `sequence`: an address, not a place in a stream, so that a sequence
// reads the same whatever is generated beside it.
inline double sampling_uniform(uint64_t seed, uint32_t sequence, uint64_t position) {
    constexpr uint32_t purpose = 0x73616d70;  // keeps these counters away from those of the other users of the same seed
    Philox r = philox(seed, (uint32_t)position, (uint32_t)(position >> 32), sequence, purpose);
    return (r.word[0] * 4294967296.0 + r.word[1]) * (1.0 / 18446744073709551616.0);
}

// Ties go to the lower id.
inline int greedy_token(const float* logits, int vocab_size) { return (int)(std::max_element(logits, logits + vocab_size) - logits); }

// exp(z) for z <= 0, rounded to a multiple of 2⁻³⁶: sums of up to 2¹⁷ of them are exact, so that no order of summation, no number of threads and no GPU
// (gpt2/cuda/sampler.cuh) draws another token. What is less than 7e-12 times as probable as the likeliest token is never drawn.
constexpr double sampling_weight_unit = 1.0 / ((int64_t)1 << 36), sampling_weight_zero = -26;  // exp(−26) < 2⁻³⁷
inline double sampling_weight(double z) {
    return z < sampling_weight_zero ? 0 : (double)(int64_t)(std::exp(z) / sampling_weight_unit + 0.5) * sampling_weight_unit;
}

// A number that is the larger the likelier the token is; of equal logits (−0 and 0 are) the lower id comes first.
inline uint64_t sampling_rank(float logit, int id) {
    uint32_t bits;
    memcpy(&bits, &logit, sizeof bits);
    if (bits == 0x80000000) bits = 0;
    bits ^= bits >> 31 ? 0xffffffff : 0x80000000;
    return (uint64_t)bits << 32 | (0xffffffff - (uint32_t)id);
}

// `uniform` is in [0, 1); of the options all but the penalty. The draw goes along the tokens that the cuts leave in the order of their ids. The result is a
// function of the arguments alone.
inline int sample_token(const float* logits, int vocab_size, const SamplerOptions& o, double uniform) {
    bool finite = true;
    for (int i = 0; i < vocab_size; i++) finite &= std::isfinite(logits[i]) != 0;
    if (!finite) data_error("the model's logits are not finite: its training diverged; take an earlier checkpoint");
    int token = greedy_token(logits, vocab_size);
    if (o.temperature == 0) return token;
    double largest = logits[token];
    auto weight = [&](int i) { return sampling_weight((logits[i] - largest) / o.temperature); };

    bool cut_k = o.top_k > 0 && o.top_k < vocab_size, cut_p = o.top_p < 1;
    uint64_t least = 0;  // the rank of the least likely token kept
    if (cut_k || cut_p) {
        std::vector<uint64_t> ranks(vocab_size);
        for (int i = 0; i < vocab_size; i++) ranks[i] = sampling_rank(logits[i], i);
        if (cut_k) {
            std::partial_sort(ranks.begin(), ranks.begin() + o.top_k, ranks.end(), std::greater<>());
            ranks.resize(o.top_k);
            least = ranks.back();
        }
        if (cut_p) {  // the likeliest come off a heap one by one
            auto weight_of_rank = [&](uint64_t rank) { return weight((int)(0xffffffff - (uint32_t)rank)); };
            double sum = 0, kept = 0;
            for (uint64_t rank : ranks) sum += weight_of_rank(rank);
            std::make_heap(ranks.begin(), ranks.end());
            do {
                std::pop_heap(ranks.begin(), ranks.end());
                least = ranks.back();
                ranks.pop_back();
                kept += weight_of_rank(least);
            } while (kept < o.top_p * sum);
        }
    }
    std::vector<double> weights(vocab_size);
    double sum = 0;
    for (int i = 0; i < vocab_size; i++) {
        if (least > 0 && sampling_rank(logits[i], i) < least) continue;
        double w = weight(i);
        if (w >= o.min_p) sum += weights[i] = w;
    }
    double target = uniform * sum, cumulative = 0;
    for (int i = 0; i < vocab_size && cumulative <= target; i++)
        if (weights[i] > 0) cumulative += weights[token = i];
    return token;  // if uniform has been rounded to 1: the last that can be drawn
}
