// The learning rate as a pure function of the step, so that a resumed run needs nothing but its step.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <string>

constexpr const char* schedule_names[] = {"cosine", "linear", "constant", "wsd"};

// Steps count from 1; step `steps` is the last. All schedules rise linearly over the first `warmup` steps, lr·step/warmup, and then
//     cosine    fall from lr to min_lr along half a cosine                                 (Loshchilov and Hutter 2017; GPT-3's)
//     linear    fall from lr to min_lr on a straight line
//     constant  stay at lr
//     wsd       stay at lr, and fall to min_lr on a straight line over the last fifth      (warm-up, stable, decay: Hu et al. 2024)
// Those that fall reach min_lr at the last step and stay there.
struct Schedule {
    std::string name = "cosine";
    double lr = 1e-3, min_lr = 1e-4;
    int64_t warmup = 0, steps = 1;
};

inline double learning_rate(const Schedule& s, int64_t step) {
    if (step < s.warmup) return s.lr * (double)step / (double)s.warmup;
    if (s.name == "constant") return s.lr;
    int64_t start = s.warmup;  // the last step at the full rate
    if (s.name == "wsd") start = std::max(start, s.steps - s.steps / 5);
    if (step <= start) return s.lr;
    double progress = s.steps > start ? std::min(1.0, (double)(step - start) / (double)(s.steps - start)) : 1;
    double remaining = s.name == "cosine" ? 0.5 * (1 + std::cos(M_PI * progress)) : 1 - progress;
    return s.min_lr + (s.lr - s.min_lr) * remaining;
}
