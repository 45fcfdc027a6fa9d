// Writing text: the prompt goes through extend() in pieces, then one token at a time.
#pragma once

#include <algorithm>
#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "sampler.h"
#include "tokenizer.h"
#include "trainer.h"

enum class Stop { TOKENS, END_OF_TEXT, POSITIONS };  // as many as asked for; the model ended its text; learned positions are used up

struct GenerateOptions {
    SamplerOptions sampler;
    uint64_t seed = 0;
    uint32_t sequence = 0;  // addresses the random numbers, with the seed and the token's position
    int64_t tokens = 0;     // at most so many new ones
    int64_t max_chunk = 1;  // tokens the trainer takes at once
};

// How many tokens a sequence can have: learned positions end, rotary ones and none at all do not.
inline int64_t position_limit(const ModelConfig& c) { return c.positions == Positions::LEARNED ? c.max_seq : INT64_MAX; }

// Continues `prompt` (end of text, then the prompt's tokens). `print` gets the new text in pieces of valid UTF-8.
inline Stop generate(Trainer& trainer, const Tokenizer& tokenizer, const std::vector<int>& prompt, const GenerateOptions& o,
                     const std::function<void(const std::string&)>& print) {
    int64_t limit = position_limit(trainer.config), length = 0;
    if ((int64_t)prompt.size() > limit)
        usage_error("the prompt has %zu tokens with the end of text before it, the model has %lld positions: shorten --prompt", prompt.size(),
                    (long long)limit);
    int sequence = trainer.new_sequence();
    std::vector<float> logits(trainer.config.vocab_size);
    auto extend = [&](const int* tokens, int64_t count) {
        Batch batch;
        batch.tokens.assign(tokens, tokens + count);
        batch.targets.assign(count, -1);
        batch.cu_seqlens = {0, (int)count};
        trainer.extend(batch, {sequence}, logits.data());
        length += count;
    };
    for (size_t done = 0; done < prompt.size(); done = (size_t)length) extend(&prompt[done], std::min<int64_t>(o.max_chunk, (int64_t)(prompt.size() - done)));

    Utf8Printer printer;
    Stop stop = Stop::TOKENS;
    for (int64_t i = 0; i < o.tokens; i++) {
        int token = sample_token(logits.data(), trainer.config.vocab_size, o.sampler, sampling_uniform(o.seed, o.sequence, (uint64_t)length));
        if (token == tokenizer.end_of_text) {
            stop = Stop::END_OF_TEXT;
            break;
        }
        print(printer.push(tokenizer.decode(token)));
        if (i + 1 == o.tokens) break;
        if (length == limit) {  // the token just written cannot be read any more
            stop = Stop::POSITIONS;
            break;
        }
        extend(&token, 1);
    }
    print(printer.finish());
    trainer.free_sequence(sequence);
    return stop;
}
