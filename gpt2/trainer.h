// What a trainer (train_gpt2.cpp on the CPU, train_gpt2.cu on the GPU) offers to the training loop, to evaluation and to generation, all of which stand
// once, in gpt2/. Calls are a few per step, so a virtual table costs nothing.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "config.h"
#include "sampler.h"
#include "tensors.h"

// Sequences packed one behind another: sequence s is rows cu_seqlens[s] .. cu_seqlens[s+1]-1. A dense batch of B rows is offsets 0, T, 2T, ...
struct Batch {
    std::vector<int> tokens;      // ids below vocab_size
    std::vector<int> targets;     // the next tokens; -1: not scored
    std::vector<int> cu_seqlens;  // num_seqs + 1 offsets, not decreasing, from 0 to tokens.size(); lengths at most max_seq
    int64_t first_row = 0;        // global number of the first sequence, for dropout's counters
    // With carried memory: sequence s starts from the memory that stands in lane memory_from[s] (-1: empty), and leaves its own in lane
    // memory_to[s] (-1: nowhere). Empty vectors: no carried memory. Only recurrent layers have one; the others start afresh.
    std::vector<int> memory_from, memory_to;
    int num_seqs() const { return (int)cu_seqlens.size() - 1; }
};

// Refuses what would write where other sequences' tokens stand. extend() takes nothing else.
inline void check_extend(const Batch& b, const std::vector<int>& sequences, int64_t max_tokens, int vocab_size) {
    size_t n = b.tokens.size();
    bool ordered = !b.cu_seqlens.empty() && b.cu_seqlens[0] == 0 && b.cu_seqlens.back() == (int64_t)n;
    for (size_t s = 1; s < b.cu_seqlens.size(); s++) ordered = ordered && b.cu_seqlens[s - 1] <= b.cu_seqlens[s];
    if (!ordered) data_error("the offsets of a batch decrease, or do not go from 0 to its %zu tokens: count the tokens of each sequence again", n);
    if (sequences.size() != b.cu_seqlens.size() - 1)
        data_error("%zu sequences are given tokens for %zu: give each its own", sequences.size(), b.cu_seqlens.size() - 1);
    if ((int64_t)n > max_tokens) data_error("%zu tokens are more than the %lld that the trainer takes at once: give them in pieces", n, (long long)max_tokens);
    for (int t : b.tokens)
        if (t < 0 || t >= vocab_size) data_error("token %d is outside the vocabulary of %d: take the model's own tokenizer", t, vocab_size);
}

// How one forward pass is meant.
struct Pass {
    bool training = false;  // keep what backward needs, apply dropout; backward() may follow
    double grad_scale = 1;  // times the gradient of the mean loss: 1/accumulation steps
    double dropout = 0;
    uint64_t seed = 0;  // dropout's key
    uint32_t step = 0;  // counts forward passes in training, for dropout's counters
};

struct AdamW {
    double lr, beta1, beta2, eps, weight_decay;
    double grad_clip;  // of the global norm; 0 = off
    int64_t step;      // from 1: bias correction
};

// A token to be drawn from the logits of a sequence.
struct Draw {
    int sequence;                                 // which of those that extend() is given
    double uniform;                               // in [0, 1)
    const std::vector<int>* penalised = nullptr;  // repetitions, each once, or null: none
};

enum class Section { PARAMETERS, GRADIENTS, MOMENT1, MOMENT2 };  // all have the shapes of the parameter list

// What a training step came to.
struct StepResult {
    double loss, grad_norm;  // mean over its micro-batches, nats; before clipping
};

struct TrainerOptions {
    int64_t max_tokens = 0;  // tokens of the largest batch
    bool training = true;    // room for gradients, moments and saved activations
    int lanes = 0;           // carried memories
    std::string dtype;       // GPU: bf16 or float32; empty: bf16
    int recompute = 0;       // GPU: 0 keeps all activations, 1 computes norms and GELU again in backward, 2 whole blocks
    bool tune = false;       // GPU: time several algorithms for each matrix product and keep the fastest
    // Decode states: tokens a page; pages at most (0: as many as the memory takes that is free when the first sequence begins); a sliding window, tokens that a
    // token sees with itself, beside the layers' own (0: none), behind which pages are given back.
    int page_size = 64;
    int64_t pages = 0;
    int64_t window = 0;
    bool plan_only = false;  // allocate nothing: only config, parameters() without data and the three ..._bytes() may be asked (`info` of a large model)
};

struct Trainer {
    ModelConfig config;

    virtual ~Trainer() = default;
    virtual void initialise(uint64_t seed) = 0;  // every parameter to its initial value

    // Mean loss over the targets (nats), NaN if there are none. `losses` (a number a token, 0 where not scored) and `logits` (tokens x vocab_size,
    // unpadded) are filled if not null.
    virtual double forward(const Batch& batch, const Pass& pass, float* losses = nullptr, float* logits = nullptr) = 0;
    virtual void backward() = 0;                // after a training forward: adds grad_scale * gradient to the gradients
    virtual double update(const AdamW& h) = 0;  // returns the norm before clipping, and sets the gradients to zero; changes nothing unless it is finite

    // Training without waiting for results: a step is one train() a micro-batch, then end_step(). step_result() waits for the oldest step not yet asked
    // for. A trainer that works beside the host (a GPU) wants steps_ahead() more steps to be started before that.
    virtual void train(const Batch& batch, const Pass& pass) {
        step_loss += forward(batch, pass) * pass.grad_scale;
        backward();
    }
    virtual void end_step(const AdamW& h) {
        results.push_back({step_loss, update(h)});
        step_loss = 0;
    }
    virtual StepResult step_result() {
        StepResult r = results.front();
        results.erase(results.begin());
        return r;
    }
    virtual int steps_ahead() const { return 0; }

    // Appends new tokens to sequences that are being decoded: `batch.cu_seqlens` packs q_len >= 0 tokens for each of `sequences`; writes the
    // logits of each sequence's last new token, (num_seqs, vocab_size).
    virtual void extend(const Batch& batch, const std::vector<int>& sequences, float* last_logits) = 0;
    // As extend(), and a token for each of `draws` from the logits, which nobody computes if there are none.
    virtual std::vector<int> extend_and_draw(const Batch& batch, const std::vector<int>& sequences, const SamplerOptions& o, const std::vector<Draw>& draws) {
        const size_t V = config.vocab_size;
        logits.resize(sequences.size() * V);
        extend(batch, sequences, draws.empty() ? nullptr : logits.data());
        std::vector<int> tokens;
        std::vector<float> own_row;  // other draws may read the same
        for (const Draw& d : draws) {
            const float* row = &logits[d.sequence * V];
            if (d.penalised && !d.penalised->empty()) {
                own_row.assign(row, row + V);
                penalise_repetitions(own_row.data(), *d.penalised, o.repetition_penalty);
                row = own_row.data();
            }
            tokens.push_back(sample_token(row, (int)V, o, d.uniform));
        }
        return tokens;
    }
    virtual int new_sequence() = 0;                                // an empty one; its number is valid until free_sequence
    virtual int fork_sequence(int s) = 0;                          // another with the same past, in the same pages until they part
    virtual int copy_sequence(int s) { return fork_sequence(s); }  // another with the same past, in pages of its own where there are any (benchmarks)
    virtual void free_sequence(int s) = 0;
    virtual size_t state_bytes() = 0;  // what all living sequences hold
    // Pages of states that can still be taken (INT64_MAX: no layer has any), and how many `tokens` more of sequence s would take: extend() wants them left.
    virtual int64_t pages_left() = 0;
    virtual int64_t pages_wanted(int s, int64_t tokens) = 0;

    // The parameter list, and copies of its tensors in float32 (i: index in the list).
    virtual const Tensors& parameters() = 0;
    virtual void get(Section section, int i, float* to) = 0;
    virtual void set(Section section, int i, const float* from) = 0;
    // The carried memories of all lanes as one block of float32, for checkpoints; nothing without lanes.
    virtual std::vector<float> get_memory() = 0;
    virtual void set_memory(const std::vector<float>& memory) = 0;

    virtual size_t parameter_bytes() = 0;
    virtual size_t gradient_bytes() = 0;  // with the optimiser's moments
    virtual size_t activation_bytes() = 0;
    virtual double peak_flops() { return 0; }  // a second, of the device's matrix units at their highest clock; 0: unknown

    // Which algorithms the matrix products use, as text: another trainer that is given it computes the same bits. Empty: there is nothing to choose.
    virtual std::string matmul_plans() { return ""; }
    virtual void set_matmul_plans(const std::string&) {}

 private:
    double step_loss = 0;
    std::vector<float> logits;
    std::vector<StepResult> results;
};

// Defined by each trainer. make_trainer throws Error if the model cannot be had.
bool trainer_on_gpu();
std::unique_ptr<Trainer> make_trainer(const ModelConfig& config, const TrainerOptions& options);
