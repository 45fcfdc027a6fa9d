// From logits to a token: repetitions penalised (Keskar et al. 2019, arXiv 1909.05858), temperature, the top k, the nucleus (top p, Holtzman et al. 2020,
// arXiv 1904.09751), min p (Nguyen et al. 2024, arXiv 2407.01082), then one draw.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <numeric>
#include <vector>

#include "error.h"
#include "philox.h"

struct SamplerOptions {
    double temperature = 1;  // 0: greedy
    int64_t top_k = 0;       // only the k likeliest tokens; 0: all
    double top_p = 1;        // only the fewest tokens whose probabilities sum to p or more; 1: all
    double min_p = 0;        // only tokens at least p times as probable as the likeliest; 0: all
    double repetition_penalty = 1;
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

// `uniform` is in [0, 1); of the options all but the penalty. Equal logits rank by id, so that the result is a function of the arguments alone.
inline int sample_token(const float* logits, int vocab_size, const SamplerOptions& o, double uniform) {
    for (int i = 0; i < vocab_size; i++)
        if (!std::isfinite(logits[i])) data_error("the model's logits are not finite: its training diverged; take an earlier checkpoint");
    if (o.temperature == 0) return greedy_token(logits, vocab_size);

    std::vector<int> ids(vocab_size);
    std::iota(ids.begin(), ids.end(), 0);
    bool cut_k = o.top_k > 0 && o.top_k < vocab_size, cut_p = o.top_p<1, cut_min = o.min_p> 0;
    if (cut_k || cut_p || cut_min) {  // the likeliest first
        auto likelier = [&](int a, int b) { return logits[a] != logits[b] ? logits[a] > logits[b] : a < b; };
        size_t kept = cut_k ? (size_t)o.top_k : ids.size();
        std::partial_sort(ids.begin(), ids.begin() + kept, ids.end(), likelier);
        ids.resize(kept);
    }
    float largest = *std::max_element(logits, logits + vocab_size);
    std::vector<double> cumulative(ids.size());
    double sum = 0;
    for (size_t i = 0; i < ids.size(); i++) cumulative[i] = sum += std::exp(((double)logits[ids[i]] - largest) / o.temperature);
    size_t kept = ids.size();
    if (cut_p) {
        kept = std::lower_bound(cumulative.begin(), cumulative.end(), o.top_p * sum) - cumulative.begin() + 1;
        kept = std::min(kept, ids.size());
    }
    // The likeliest has weight 1.
    while (cut_min && kept > 1 && std::exp(((double)logits[ids[kept - 1]] - largest) / o.temperature) < o.min_p) kept--;
    double target = uniform * cumulative[kept - 1];
    size_t i = std::upper_bound(cumulative.begin(), cumulative.begin() + kept, target) - cumulative.begin();
    return ids[std::min(i, kept - 1)];
}
