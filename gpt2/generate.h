// Writing texts: prompts go through extend() in pieces, ragged and many at once, then every text one token at a time. Texts end at different times, and others
// take their places (continuous batching); what a text reads does not depend on what is written beside it.
#pragma once

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "sampler.h"
#include "tokenizer.h"
#include "trainer.h"

// Why a text ended: it has as many tokens as asked for; the model ended it; it came to what it is to stop at; learned positions are used up.
enum class Stop { TOKENS, END_OF_TEXT, TEXT, POSITIONS };

struct GenerateOptions {
    SamplerOptions sampler;
    uint64_t seed = 0;
    uint32_t sequence = 0;      // addresses the random numbers, with the seed and the token's position: a prompt's sample i has those of sequence + i
    int64_t tokens = 0;         // at most so many new ones
    int64_t max_chunk = 1;      // tokens the trainer takes at once
    int64_t max_sequences = 1;  // texts written at the same time, at most max_chunk
    std::string stop;           // a text ends before this; empty: nothing
};

// Texts that go on from one prompt (end of text, then the prompt's tokens). They share its state, up to where they part.
struct Request {
    std::vector<int> prompt;
    int samples = 1;
};

struct GenerateStats {
    int64_t prefill_tokens = 0, decode_tokens = 0;  // read in prompts; read one by one
    double prefill_seconds = 0, decode_seconds = 0;
    size_t state_bytes = 0;  // of all texts together, at their most
};

// How many tokens a sequence can have: learned positions end, rotary ones and none at all do not.
inline int64_t position_limit(const ModelConfig& c) { return c.positions == Positions::LEARNED ? c.max_seq : INT64_MAX; }

// Holds back the end of a text as long as it may be the beginning of what the text is to stop at.
struct StopFinder {
    std::string stop, held;
    // What can be written after `piece` has come. *found: `stop` has come, and nothing from its beginning on is written.
    std::string push(const std::string& piece, bool* found) {
        held += piece;
        size_t at = stop.empty() ? std::string::npos : held.find(stop);
        *found = at != std::string::npos;
        if (!*found)
            for (at = held.size() - std::min(held.size(), stop.empty() ? 0 : stop.size() - 1); at < held.size(); at++)
                if (stop.compare(0, held.size() - at, held, at, std::string::npos) == 0) break;
        std::string out = held.substr(0, at);
        held.erase(0, at);
        return out;
    }
};

class Generator {
 public:
    using Write = std::function<void(int text, const std::string& piece)>;  // pieces of valid UTF-8
    using End = std::function<void(int text, Stop why)>;

    Generator(Trainer& trainer, const Tokenizer& tokenizer, const GenerateOptions& options, Write write, End end)
        : trainer(trainer), tokenizer(tokenizer), o(options), write(std::move(write)), end(std::move(end)), V(trainer.config.vocab_size) {}

    // Texts are numbered from 0: all samples of the first request, then those of the second ...
    GenerateStats run(const std::vector<Request>& requests) {
        int64_t most = std::max<int64_t>(1, std::min(o.max_sequences, o.max_chunk));
        std::vector<Prompt> waiting;
        int number = 0;
        for (const Request& r : requests) {
            if ((int64_t)r.prompt.size() > position_limit(trainer.config))
                usage_error("the prompt has %zu tokens with the end of text before it, the model has %lld positions: shorten --prompt", r.prompt.size(),
                            (long long)position_limit(trainer.config));
            for (int first = 0; first < r.samples; first += (int)most) {
                int samples = (int)std::min<int64_t>(most, r.samples - first);
                waiting.push_back({&r.prompt, first, samples, number, -1, 0});
                number += samples;
            }
        }
        std::reverse(waiting.begin(), waiting.end());
        while (!waiting.empty() || !prompts.empty() || !texts.empty()) {
            int64_t places = most - (int64_t)texts.size();
            for (const Prompt& p : prompts) places -= p.samples;
            for (; !waiting.empty() && waiting.back().samples <= places; waiting.pop_back()) {
                places -= waiting.back().samples;
                prompts.push_back(waiting.back());
                prompts.back().sequence = trainer.new_sequence();
            }
            prefill();
            decode();
        }
        return stats;
    }

 private:
    struct Prompt {
        const std::vector<int>* tokens;
        int first, samples, number;  // the samples from `first` on; the number of their first text
        int sequence;
        size_t read;
    };
    struct Text {
        int number, sample, sequence;
        int64_t length, written = 0;  // tokens in its state; new ones
        int next = 0;                 // the token to be read next
        std::vector<int> own;         // tokens that it has, each once; for the penalty
        Utf8Printer characters;
        StopFinder finder;
    };
    Trainer& trainer;
    const Tokenizer& tokenizer;
    const GenerateOptions& o;
    Write write;
    End end;
    const int V;
    std::vector<Prompt> prompts;               // being read
    std::vector<std::unique_ptr<Text>> texts;  // being written
    std::vector<float> logits;
    GenerateStats stats;

    // One call of extend(), for some tokens of each of several sequences.
    struct Call {
        Batch batch;
        std::vector<int> sequences;
        Call() { batch.cu_seqlens = {0}; }
        void add(int sequence, const int* tokens, int64_t n) {
            batch.tokens.insert(batch.tokens.end(), tokens, tokens + n);
            batch.cu_seqlens.push_back((int)batch.tokens.size());
            sequences.push_back(sequence);
        }
    };
    void extend(Call& call, int64_t& tokens, double& seconds) {
        call.batch.targets.assign(call.batch.tokens.size(), -1);
        logits.resize(call.sequences.size() * (size_t)V);
        auto start = std::chrono::steady_clock::now();
        trainer.extend(call.batch, call.sequences, logits.data());
        seconds += std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
        tokens += (int64_t)call.batch.tokens.size();
        stats.state_bytes = std::max(stats.state_bytes, trainer.state_bytes());
    }

    // The next piece of the prompts, in their order; behind a prompt's last token its texts begin.
    void prefill() {
        Call call;
        int64_t left = o.max_chunk;
        for (Prompt& p : prompts) {
            int64_t n = std::min<int64_t>(left, (int64_t)(p.tokens->size() - p.read));
            if (n == 0) break;
            call.add(p.sequence, p.tokens->data() + p.read, n);
            p.read += (size_t)n;
            left -= n;
        }
        if (call.sequences.empty()) return;
        extend(call, stats.prefill_tokens, stats.prefill_seconds);
        std::vector<Prompt> unfinished;
        for (size_t i = 0; i < prompts.size(); i++) {
            const Prompt& p = prompts[i];
            if (p.read < p.tokens->size()) {
                unfinished.push_back(p);
                continue;
            }
            std::vector<int> sequences = {p.sequence};
            for (int s = 1; s < p.samples; s++) sequences.push_back(trainer.fork_sequence(p.sequence));
            for (int s = 0; s < p.samples; s++) {
                auto text = std::make_unique<Text>();
                text->number = p.number + s;
                text->sample = p.first + s;
                text->sequence = sequences[s];
                text->length = (int64_t)p.tokens->size();
                text->finder.stop = o.stop;
                for (int token : *p.tokens) remember(*text, token);
                if (go_on(*text, &logits[i * (size_t)V])) texts.push_back(std::move(text));
            }
        }
        prompts = unfinished;
    }

    // One token of every text.
    void decode() {
        if (texts.empty()) return;
        Call call;
        for (auto& t : texts) {
            call.add(t->sequence, &t->next, 1);
            t->length++;
        }
        extend(call, stats.decode_tokens, stats.decode_seconds);
        std::vector<std::unique_ptr<Text>> unfinished;
        for (size_t i = 0; i < texts.size(); i++)
            if (go_on(*texts[i], &logits[i * (size_t)V])) unfinished.push_back(std::move(texts[i]));
        texts = std::move(unfinished);
    }

    void remember(Text& t, int token) {
        if (o.sampler.repetition_penalty == 1 || token == tokenizer.end_of_text) return;  // ending is never made less likely
        if (std::find(t.own.begin(), t.own.end(), token) == t.own.end()) t.own.push_back(token);
    }

    // Chooses the text's next token and writes it. False: the text has ended, and its place is free.
    bool go_on(Text& t, const float* row) {
        if (t.written == o.tokens) return finish(t, Stop::TOKENS);
        std::vector<float> own_row;  // other samples may read the same
        if (!t.own.empty()) {
            own_row.assign(row, row + V);
            penalise_repetitions(own_row.data(), t.own, o.sampler.repetition_penalty);
            row = own_row.data();
        }
        t.next = sample_token(row, V, o.sampler, sampling_uniform(o.seed, o.sequence + (uint32_t)t.sample, (uint64_t)t.length));
        if (t.next == tokenizer.end_of_text) return finish(t, Stop::END_OF_TEXT);
        remember(t, t.next);
        bool found;
        write(t.number, t.finder.push(t.characters.push(tokenizer.decode(t.next)), &found));
        if (found) return finish(t, Stop::TEXT);
        if (++t.written == o.tokens) return finish(t, Stop::TOKENS);
        if (t.length == position_limit(trainer.config)) return finish(t, Stop::POSITIONS);  // the token just written cannot be read any more
        return true;
    }
    bool finish(Text& t, Stop why) {
        bool found = why == Stop::TEXT;
        if (!found) {
            write(t.number, t.finder.push(t.characters.finish(), &found));
            if (!found) write(t.number, t.finder.held);
        }
        end(t.number, found ? Stop::TEXT : why);
        trainer.free_sequence(t.sequence);
        return false;
    }
};

// One text that goes on from `prompt`.
inline Stop generate(Trainer& trainer, const Tokenizer& tokenizer, const std::vector<int>& prompt, const GenerateOptions& o,
                     const std::function<void(const std::string&)>& print) {
    Stop stop = Stop::TOKENS;
    Generator generator(
        trainer, tokenizer, o, [&](int, const std::string& piece) { print(piece); }, [&](int, Stop why) { stop = why; });
    generator.run({{prompt, 1}});
    return stop;
}
