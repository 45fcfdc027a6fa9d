// What a model would be: its tensors, what a token costs, and what memory it takes. Nothing is allocated.
#pragma once

#include <cstdio>
#include <memory>
#include <string>

#include "config.h"
#include "generate.h"
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

inline std::string state_bytes_text(const StateBytes& s) {
    return bytes_text((double)s.token) + " a token, and " + bytes_text((double)s.sequence) + " a sequence";
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
    for (const AttentionConfig& a : c.attention) printf("  %d: %s\n", a.layer, attention_string(a).c_str());
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
    StateBytes state = decode_state_bytes(c, o.dtype);
    printf("%-34s %s\n", "decode state", state_bytes_text(state).c_str());
    printf("%-34s %s for a sequence of %d tokens\n", "", bytes_text((double)state.token * c.max_seq + (double)state.sequence).c_str(), c.max_seq);
    return 0;
}
