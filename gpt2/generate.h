// Writing texts: prompts go through extend() in pieces, ragged and many at once, then every text one token at a time. Texts end at different times, and others
// take their places (continuous batching); what a text reads does not depend on what is written beside it.
//
// First come, first served, also where memory is short: who came last goes back to wait. Its state's pages are freed, its tokens are kept; later it is read
// again from its beginning and goes on, with the same random numbers as if nothing had happened.
#pragma once

#include <algorithm>
#include <chrono>
#include <csignal>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "sampler.h"
#include "tokenizer.h"
#include "trainer.h"

// Why a text ended: it has as many tokens as asked for; the model ended it; it came to what it is to stop at; learned positions are used up; it does not fit
// into the memory for states even alone; somebody asked for it.
enum class Stop { TOKENS, END_OF_TEXT, TEXT, POSITIONS, MEMORY, INTERRUPTED };
constexpr const char* stop_names[] = {"tokens", "end of text", "stop", "positions", "memory", "interrupted"};

struct GenerateOptions {
    SamplerOptions sampler;
    uint64_t seed = 0;
    uint32_t sequence = 0;      // addresses the random numbers, with the seed and the token's position: a prompt's sample i has those of sequence + i
    int64_t tokens = 0;         // at most so many new ones
    int64_t max_chunk = 1;      // tokens the trainer takes at once
    int64_t max_sequences = 1;  // texts written at the same time, at most max_chunk
    int64_t window = 0;         // the trainer's
    std::string stop;           // a text ends before this; empty: nothing
    bool endless = false;       // behind an end of text the next one follows
    const volatile sig_atomic_t* interrupted = nullptr;  // set from a signal handler: all texts end
};

// A text that is written by turns with somebody else. The first `read` of its tokens are in the state of `sequence` (-1: none yet).
struct Conversation {
    std::vector<int> tokens;
    int64_t read = 0;
    int sequence = -1;
};

// Texts that go on from one prompt (end of text, then the prompt's tokens). They share its state, up to where they part.
struct Request {
    std::vector<int> prompt;
    int samples = 1;
    Conversation* conversation = nullptr;  // the prompt goes behind it, and so does the text, the only one; what it has read is not read again
};

struct GenerateStats {
    int64_t prefill_tokens = 0, decode_tokens = 0;  // read in prompts; read one by one
    double prefill_seconds = 0, decode_seconds = 0;
    size_t state_bytes = 0;  // of all texts together, at their most
    int64_t pages = 0;       // that there are; INT64_MAX: no layer has any
    int64_t put_back = 0;    // how often a text had to wait for pages
};

// Bytes of the decode state, for each token in it and for each sequence: rows of tokens are stored in the working type, memories always in float32.
struct StateBytes {
    int64_t token = 0, sequence = 0;
};
inline StateBytes decode_state_bytes(const ModelConfig& c, const std::string& dtype) {
    StateBytes bytes;
    for (const AttentionConfig& a : c.attention) {
        AttentionStateSize s = attention_description(a.name).state(a);
        bytes.token += s.per_token * (trainer_on_gpu() && dtype != "float32" ? 2 : 4);
        bytes.sequence += s.per_sequence * 4;
    }
    return bytes;
}

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
        : trainer(trainer), tokenizer(tokenizer), o(options), write(std::move(write)), end(std::move(end)) {}

    // Texts are numbered from 0: all samples of the first request, then those of the second ...
    GenerateStats run(const std::vector<Request>& requests) {
        int number = 0;
        for (const Request& r : requests) {
            int64_t limit = position_limit(trainer.config), size = (int64_t)r.prompt.size() + (r.conversation ? (int64_t)r.conversation->tokens.size() : 0);
            if (size > limit && !r.conversation)
                usage_error("the prompt has %lld tokens with the end of text before it, the model has %lld positions: shorten --prompt", (long long)size,
                            (long long)limit);
            if (size > limit) {
                end(number++, Stop::POSITIONS);
                continue;
            }
            const std::vector<int>* tokens = &r.prompt;
            if (r.conversation) {
                tokens = &r.conversation->tokens;
                r.conversation->tokens.insert(r.conversation->tokens.end(), r.prompt.begin(), r.prompt.end());
            }
            for (int first = 0; first < r.samples; first += (int)most()) {
                int samples = (int)std::min<int64_t>(most(), r.samples - first);
                waiting.push_back({tokens, first, samples, number, r.conversation, nullptr});
                if (r.conversation) waiting.back().sequence = r.conversation->sequence, waiting.back().read = r.conversation->read;
                number += samples;
            }
        }
        std::reverse(waiting.begin(), waiting.end());
        while (!waiting.empty() || !prompts.empty() || !texts.empty()) {
            if (o.interrupted && *o.interrupted) {
                end_all(Stop::INTERRUPTED);
                break;
            }
            admit();
            prefill();
            decode();
        }
        return stats;
    }

 private:
    struct Text {
        int number, sample, sequence;
        Conversation* conversation;
        std::vector<int> tokens;  // all that it has, prompt included; the last one may have to be read yet
        int64_t read;             // how many of them are in its state
        int64_t written = 0;      // new ones
        std::vector<int> own;     // tokens that it has, each once; for the penalty
        Utf8Printer characters;
        StopFinder finder;
    };
    // What is read before texts go on behind it: a prompt; or a text that was put back, with all its tokens.
    struct Prompt {
        const std::vector<int>* tokens;
        int first, samples, number;  // the samples from `first` on; the number of their first text
        Conversation* conversation;
        std::unique_ptr<Text> text;  // that was put back
        int sequence = -1;
        int64_t read = 0;
        int64_t rest() const { return (int64_t)tokens->size() - read; }
    };
    Trainer& trainer;
    const Tokenizer& tokenizer;
    const GenerateOptions& o;
    Write write;
    End end;
    // A text in any of these came before those in the list above it, and in each list they are in order; so the youngest is always at hand.
    std::vector<Prompt> waiting;               // the next one is the last
    std::vector<Prompt> prompts;               // being read
    std::vector<std::unique_ptr<Text>> texts;  // being written
    GenerateStats stats;

    int64_t most() const { return std::max<int64_t>(1, std::min(o.max_sequences, o.max_chunk)); }

    // Pages for what is still to be read of a prompt, and for its texts to begin, each on a copy of the last page. With a window, an estimate.
    int64_t pages_wanted(const Prompt& p) {
        int64_t rows = o.window > 0 ? std::min(p.rest(), o.window + o.max_chunk) : p.rest();
        return trainer.pages_wanted(p.sequence, rows + 1) + p.samples - 1;
    }
    // A prompt comes in if there are places for its texts, and pages for it beside those that the others will want; if it is alone, in any case.
    void admit() {
        int64_t places = most() - (int64_t)texts.size(), promised = (int64_t)texts.size();
        for (const Prompt& p : prompts) {
            places -= p.samples;
            promised += pages_wanted(p);
        }
        for (; !waiting.empty() && waiting.back().samples <= places; waiting.pop_back()) {
            Prompt& p = waiting.back();
            if (p.sequence < 0) p.sequence = trainer.new_sequence();
            bool alone = prompts.empty() && texts.empty();
            if (alone) stats.pages = std::max(stats.pages, trainer.pages_left());
            promised += pages_wanted(p);
            if (!alone && promised > trainer.pages_left()) break;
            places -= p.samples;
            prompts.push_back(std::move(p));
        }
    }

    void put_back(Prompt p) {
        trainer.free_sequence(p.sequence);
        if (p.read > 0) stats.put_back++;
        p.sequence = -1;
        p.read = 0;
        waiting.push_back(std::move(p));
    }
    void put_back(std::unique_ptr<Text> t) {
        Prompt p = {&t->tokens, t->sample, 1, t->number, t->conversation, nullptr, t->sequence, t->read};
        p.text = std::move(t);
        put_back(std::move(p));
    }

    // One call of extend_and_draw(): some tokens of each of several sequences, and what is drawn behind them.
    struct Call {
        Batch batch;
        std::vector<int> sequences;
        std::vector<Draw> draws;
        Call() { batch.cu_seqlens = {0}; }
        void add(int sequence, const int* tokens, int64_t n) {
            batch.tokens.insert(batch.tokens.end(), tokens, tokens + n);
            batch.cu_seqlens.push_back((int)batch.tokens.size());
            sequences.push_back(sequence);
        }
    };
    // The next token of text t, behind the sequence added last.
    void draw(Call& call, const Text& t) {
        double uniform = sampling_uniform(o.seed, o.sequence + (uint32_t)t.sample, (uint64_t)t.tokens.size());
        call.draws.push_back({(int)call.sequences.size() - 1, uniform, t.own.empty() ? nullptr : &t.own});
    }
    std::vector<int> extend(Call& call, int64_t& tokens, double& seconds) {
        call.batch.targets.assign(call.batch.tokens.size(), -1);
        auto start = std::chrono::steady_clock::now();
        std::vector<int> drawn = trainer.extend_and_draw(call.batch, call.sequences, o.sampler, call.draws);
        seconds += std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
        tokens += (int64_t)call.batch.tokens.size();
        stats.state_bytes = std::max(stats.state_bytes, trainer.state_bytes());
        return drawn;
    }

    // The next piece of the prompts, in their order; behind a prompt's last token its texts begin.
    void prefill() {
        if (prompts.empty()) return;
        Call call;
        std::vector<std::unique_ptr<Text>> begun;
        int64_t left = o.max_chunk, pages = trainer.pages_left();
        size_t complete = 0;
        for (Prompt& p : prompts) {
            int64_t n = std::min(left, p.rest());
            while (trainer.pages_wanted(p.sequence, n) > pages) n /= 2;
            if (n == 0) break;
            call.add(p.sequence, p.tokens->data() + p.read, n);
            pages -= trainer.pages_wanted(p.sequence, n);
            left -= n;
            p.read += n;
            if (p.rest() > 0) break;  // those behind it take no page before it has its own
            complete++;
            for (int s = 0; s < p.samples; s++) {
                begun.push_back(p.text ? std::move(p.text) : new_text(p, s));
                if (o.tokens > 0) draw(call, *begun.back());
            }
        }
        if (call.sequences.empty()) {
            if (texts.empty()) {  // even alone it does not fit
                finish(prompts.front(), Stop::MEMORY);
                prompts.erase(prompts.begin());
            }
            return;
        }
        std::vector<int> drawn = extend(call, stats.prefill_tokens, stats.prefill_seconds);
        size_t k = 0;
        for (size_t i = 0; i < complete; i++) {
            std::vector<int> sequences = {prompts[i].sequence};
            while ((int)sequences.size() < prompts[i].samples) sequences.push_back(trainer.fork_sequence(prompts[i].sequence));
            for (int sequence : sequences) {
                Text& t = *begun[k];
                t.sequence = sequence;
                t.read = (int64_t)t.tokens.size();
                if (o.tokens > 0 ? go_on(t, drawn[k]) : finish(t, Stop::TOKENS)) texts.push_back(std::move(begun[k]));
                k++;
            }
        }
        prompts.erase(prompts.begin(), prompts.begin() + complete);
    }
    std::unique_ptr<Text> new_text(const Prompt& p, int s) {
        auto text = std::make_unique<Text>();
        text->number = p.number + s;
        text->sample = p.first + s;
        text->conversation = p.conversation;
        text->tokens = *p.tokens;
        text->finder.stop = o.stop;
        for (int token : text->tokens) remember(*text, token);
        return text;
    }

    // One token of every text.
    void decode() {
        make_room();
        if (texts.empty()) return;
        Call call;
        for (auto& t : texts) {
            call.add(t->sequence, &t->tokens.back(), 1);
            t->read++;
            draw(call, *t);
        }
        std::vector<int> drawn = extend(call, stats.decode_tokens, stats.decode_seconds);
        std::vector<std::unique_ptr<Text>> unfinished;
        for (size_t i = 0; i < texts.size(); i++)
            if (go_on(*texts[i], drawn[i])) unfinished.push_back(std::move(texts[i]));
        texts = std::move(unfinished);
    }
    // Pages for the next token of every text: the youngest are put back until there are. The oldest goes on in any case; if it wants a page that is not there
    // even when it is alone, it ends.
    void make_room() {
        while (!texts.empty()) {
            int64_t wanted = 0;
            for (auto& t : texts) wanted += trainer.pages_wanted(t->sequence, 1);
            if (wanted <= trainer.pages_left()) return;
            if (!prompts.empty()) {
                put_back(std::move(prompts.back()));
                prompts.pop_back();
                continue;
            }
            if (texts.size() > 1)
                put_back(std::move(texts.back()));
            else
                finish(*texts[0], Stop::MEMORY);
            texts.pop_back();
        }
    }

    void remember(Text& t, int token) {
        if (o.sampler.repetition_penalty == 1 || token == tokenizer.end_of_text) return;  // ending is never made less likely
        if (std::find(t.own.begin(), t.own.end(), token) == t.own.end()) t.own.push_back(token);
    }

    // Writes the token drawn for the text. False: the text has ended, and its place is free.
    bool go_on(Text& t, int token) {
        t.tokens.push_back(token);
        if (token == tokenizer.end_of_text && !o.endless) return finish(t, Stop::END_OF_TEXT);
        remember(t, token);
        bool found;
        write(t.number, t.finder.push(t.characters.push(tokenizer.decode(token)), &found));
        if (found) return finish(t, Stop::TEXT);
        if (++t.written == o.tokens) return finish(t, Stop::TOKENS);
        if (t.read == position_limit(trainer.config)) return finish(t, Stop::POSITIONS);  // the token just written cannot be read any more
        return true;
    }
    bool finish(Text& t, Stop why) {
        bool found = why == Stop::TEXT;
        if (!found) {
            write(t.number, t.finder.push(t.characters.finish(), &found));
            if (!found) write(t.number, t.finder.held);
        }
        end(t.number, found ? Stop::TEXT : why);
        leave(t.conversation, t.sequence, t.read);
        if (t.conversation) t.conversation->tokens = std::move(t.tokens);
        return false;
    }
    // Before its texts could begin, or go on.
    void finish(Prompt& p, Stop why) {
        if (p.text) {
            p.text->sequence = p.sequence;
            p.text->read = p.read;
            finish(*p.text, why);
            return;
        }
        for (int s = 0; s < p.samples; s++) end(p.number + s, why);
        leave(p.conversation, p.sequence, p.read);
    }
    // A state is kept for a conversation's next turn, else it is freed.
    void leave(Conversation* c, int sequence, int64_t read) {
        if (c) {
            c->sequence = sequence;
            c->read = read;
        } else if (sequence >= 0) {
            trainer.free_sequence(sequence);
        }
    }
    void end_all(Stop why) {
        for (auto& t : texts) finish(*t, why);
        for (Prompt& p : prompts) finish(p, why);
        for (; !waiting.empty(); waiting.pop_back()) finish(waiting.back(), why);
        texts.clear();
        prompts.clear();
    }
};

// One text that goes on from `prompt`.
inline Stop generate(Trainer& trainer, const Tokenizer& tokenizer, const std::vector<int>& prompt, const GenerateOptions& o,
                     const std::function<void(const std::string&)>& print) {
    Stop stop = Stop::TOKENS;
    Generator generator(
        trainer, tokenizer, o, [&](int, const std::string& piece) { print(piece); }, [&](int, Stop why) { stop = why; });
    generator.run({{prompt}});
    return stop;
}
