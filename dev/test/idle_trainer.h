// A trainer without a model, for tests of what stands around one: they override what they want to see.
#pragma once

#include "gpt2/trainer.h"

struct IdleTrainer : Trainer {
    Tensors none;
    void initialise(uint64_t) override {}
    double forward(const Batch&, const Pass&, float*, float*) override { return 0; }
    void backward() override {}
    double update(const AdamW&) override { return 0; }
    void extend(const Batch&, const std::vector<int>&, float*) override {}
    int new_sequence() override { return 0; }
    int fork_sequence(int) override { return 0; }
    void free_sequence(int) override {}
    size_t state_bytes() override { return 0; }
    int64_t pages_left() override { return 0; }
    int64_t pages_wanted(int, int64_t) override { return 0; }
    const Tensors& parameters() override { return none; }
    void get(Section, int, float*) override {}
    void set(Section, int, const float*) override {}
    std::vector<float> get_memory() override { return {}; }
    void set_memory(const std::vector<float>&) override {}
    size_t parameter_bytes() override { return 0; }
    size_t gradient_bytes() override { return 0; }
    size_t activation_bytes() override { return 0; }
};
