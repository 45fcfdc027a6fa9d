// What a model would be: its tensors, what a token costs, and what memory it takes. Nothing is allocated.
#pragma once

#include <cstdio>
#include <memory>
#include <string>

#include "config.h"
#include "options.h"
#include "tokenizer.h"
#include "trainer.h"

// 1234567 -> 1,234,567
inline std::string with_commas(int64_t n) {
    std::string s = std::to_string(n);
    for (int i = (int)s.size() - 3; i > 0; i -= 3) s.insert(i, ",");
    return s;
}
inline std::string bytes_text(double bytes) {
    const char* units[] = {"bytes", "KB", "MB", "GB", "TB"};
    int unit = 0;
    for (; bytes >= 1000 && unit < 4; unit++) bytes /= 1000;
    return format(unit ? "%.2f %s" : "%.0f %s", bytes, units[unit]);
}

inline void print_tensors(const Tensors& parameters) {
    printf("%-24s %16s %14s %6s %14s %8s\n", "tensor", "shape", "parameters", "decay", "initial", "lr x");
    for (const TensorSpec& s : parameters.specs) {
        std::string shape, initial = s.init_std ? format("normal %.4g", s.init_std) : format("%g", s.init_value);
        for (int64_t d : s.shape) shape += (shape.empty() ? "" : " x ") + std::to_string(d);
        printf("%-24s %16s %14s %6s %14s %8g\n", s.name.c_str(), shape.c_str(), with_commas(s.size()).c_str(), s.decay ? "yes" : "no", initial.c_str(),
               s.lr_multiplier);
    }
}

inline int print_info(Options o) {
    resolve_options(o);
    int vocab_size = o.tokenizer.empty() ? find_preset(o.preset).vocab_size : make_tokenizer(o.tokenizer).vocab_size;
    ModelConfig c = model_config(o, vocab_size);
    TrainerOptions t;
    t.max_tokens = o.batch * o.seq;
    t.plan_only = true;
    t.dtype = o.dtype;
    t.recompute = (int)o.recompute;
    std::unique_ptr<Trainer> trainer = make_trainer(c, t);
    print_tensors(trainer->parameters());

    printf("\nlayers:\n");
    AttentionStateSize state = {0, 0};
    for (const AttentionConfig& a : c.attention) {
        AttentionStateSize s = attention_description(a.name).state(a);
        state.per_token += s.per_token;
        state.per_sequence += s.per_sequence;
        printf("  %d: %s\n", a.layer, attention_string(a).c_str());
    }
    int64_t padding = (int64_t)(c.padded_vocab_size - c.vocab_size) * c.channels, total = trainer->parameters().size();
    double forward = model_flops(c, (double)o.seq);
    printf("\n%-34s %s\n", "positions", positions_names[(int)c.positions]);
    printf("%-34s %s, of which %s pad the vocabulary from %d to %d\n", "parameters", with_commas(total).c_str(), with_commas(padding).c_str(), c.vocab_size,
           c.padded_vocab_size);
    printf("%-34s %.4g forward, %.4g training (forward and backward), at %lld tokens a sequence\n", "FLOPs a token", forward, 3 * forward, (long long)o.seq);
    printf("%-34s %s\n", "memory of the parameters", bytes_text((double)trainer->parameter_bytes()).c_str());
    printf("%-34s %s\n", "of gradients and moments", bytes_text((double)trainer->gradient_bytes()).c_str());
    printf("%-34s %s, training on %lld x %lld tokens\n", "of activations", bytes_text((double)trainer->activation_bytes()).c_str(), (long long)o.batch,
           (long long)o.seq);
    // Rows of tokens are stored in the working type, memories always in float32.
    double token = (trainer_on_gpu() && o.dtype == "bf16" ? 2.0 : 4.0) * (double)state.per_token, sequence = 4.0 * (double)state.per_sequence;
    printf("%-34s %s a token, and %s a sequence\n", "decode state", bytes_text(token).c_str(), bytes_text(sequence).c_str());
    printf("%-34s %s\n", "", format("%s for a sequence of %d tokens", bytes_text(token * c.max_seq + sequence).c_str(), c.max_seq).c_str());
    return 0;
}
