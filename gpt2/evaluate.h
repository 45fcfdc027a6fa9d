// How good a model is: its loss on a text, and its recall, the share of questions about something said earlier that it answers exactly.
// Within a training run neither touches the memories that it carries: batches come without lanes.
#pragma once

#include <algorithm>
#include <cassert>
#include <cmath>
#include <cstdint>
#include <fstream>
#include <map>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "dataloader.h"
#include "error.h"
#include "sampler.h"
#include "tokenizer.h"
#include "trainer.h"

// ----------------------------------------------------------------------------
// Loss

struct LossOptions {
    int64_t seq = 1;                       // tokens a window
    int64_t rows = 1;                      // windows a batch
    int64_t max_windows = 0;               // from the start; 0: all
    bool doc_mask = false;                 // as in training
    int64_t stride = 0;                    // tokens from a window to the next one, at most seq; 0: seq, they stand side by side
    bool carry_memory = false;             // each window goes on from the memory that the one before has left, within a document; the trainer has a lane
    const Tokenizer* tokenizer = nullptr;  // knows the bytes of text behind the tokens
};

struct LossResult {
    double loss = NAN;   // nats a token
    int64_t tokens = 0;  // scored
    int64_t bytes = 0;   // of text that they stand for; 0 without a tokenizer that reads text
    double bits_per_byte() const { return loss * (double)tokens / (double)bytes / std::log(2.0); }
};

// Mean loss over windows, from the first token on, each predicting the token behind each of its own. Always the same ones. A token that two windows would
// predict is scored by the first: where they overlap, every token but the first window's has at least seq - stride others before it.
inline LossResult evaluate_loss(Trainer& trainer, const Dataset& data, const LossOptions& o) {
    int64_t targets = data.num_tokens - 1, stride = o.stride ? o.stride : o.seq, rows = o.carry_memory ? 1 : o.rows;
    assert(stride <= o.seq && (!o.carry_memory || stride == o.seq));
    if (targets < 1) data_error("%s has %lld tokens, too few to predict one: name more", data.name.c_str(), (long long)data.num_tokens);
    int64_t windows = 1 + (std::max(targets - o.seq, (int64_t)0) + stride - 1) / stride;
    if (o.max_windows) windows = std::min(windows, o.max_windows);
    LossResult result;
    double sum = 0;
    std::vector<int> row(o.seq + 1);
    Batch batch;
    for (int64_t first = 0; first < windows; first += rows) {
        batch = Batch();
        batch.cu_seqlens = {0};
        int64_t scored = 0;
        for (int64_t w = first; w < std::min(windows, first + rows); w++) {
            int64_t begin = w * stride, n = std::min(o.seq, targets - begin), known = w == 0 ? 0 : o.seq - stride;
            data.read(begin, n + 1, trainer.config.vocab_size, row.data());
            for (int64_t t = 0; t < n; t++) {
                if (t > 0 && (o.doc_mask || o.carry_memory) && row[t] == data.end_of_text) batch.cu_seqlens.push_back((int)batch.tokens.size());
                batch.tokens.push_back(row[t]);
                batch.targets.push_back(t < known ? -1 : row[t + 1]);
                if (t < known) continue;
                scored++;
                if (o.tokenizer && o.tokenizer->text && row[t + 1] != data.end_of_text) result.bytes += (int64_t)o.tokenizer->decode(row[t + 1]).size();
            }
            batch.cu_seqlens.push_back((int)batch.tokens.size());
        }
        if (o.carry_memory) {
            batch.memory_from.resize(batch.num_seqs(), -1);
            batch.memory_to.resize(batch.num_seqs(), -1);
            if (first > 0 && row[0] != data.end_of_text) batch.memory_from[0] = 0;
            batch.memory_to.back() = 0;
        }
        sum += trainer.forward(batch, Pass()) * (double)scored;
        result.tokens += scored;
    }
    result.loss = sum / (double)result.tokens;
    return result;
}

// ----------------------------------------------------------------------------
// Recall

struct Question {
    std::vector<int> tokens;  // end of text, prompt, and the answer but for its last token
    std::vector<int> answer;
    int64_t distance = 0;  // from the fact to the question, as the corpus counts it
    double guess = 0;      // chance of being right without having read
};

inline std::string questions_path(const std::string& text) {
    bool txt = text.size() > 4 && text.compare(text.size() - 4, 4, ".txt") == 0;
    return (txt ? text.substr(0, text.size() - 4) : text) + ".questions.jsonl";
}
inline bool is_questions_file(const std::string& path) { return path.size() > 6 && path.compare(path.size() - 6, 6, ".jsonl") == 0; }

inline Question parse_question(std::string_view line, const Tokenizer& tokenizer, const std::string& where) {
    nlohmann::json j = nlohmann::json::parse(line, nullptr, false);
    bool valid = j.is_object() && j.contains("prompt") && j["prompt"].is_string() && j.contains("answer") && j["answer"].is_string() &&
                 j.contains("distance") && j["distance"].is_number_integer() && j.contains("guess") && j["guess"].is_number();
    if (!valid || j["answer"].get<std::string>().empty() || j["distance"].get<double>() < 0 ||
        !(j["guess"].get<double>() >= 0 && j["guess"].get<double>() <= 1))
        data_error("%s is no question: it takes {\"prompt\": text, \"answer\": text, \"distance\": whole number, \"guess\": 0 to 1}", where.c_str());
    Question q;
    q.tokens = {tokenizer.end_of_text};
    q.answer = tokenizer.encode(j["answer"].get<std::string>());
    for (int token : tokenizer.encode(j["prompt"].get<std::string>())) q.tokens.push_back(token);
    q.tokens.insert(q.tokens.end(), q.answer.begin(), q.answer.end() - 1);
    q.distance = j["distance"].get<int64_t>();
    q.guess = j["guess"].get<double>();
    return q;
}

inline std::vector<Question> read_questions(const std::string& path, const Tokenizer& tokenizer) {
    std::vector<Question> questions;
    each_line(MappedFile(path), [&](std::string_view line, const std::string& where) { questions.push_back(parse_question(line, tokenizer, where)); });
    if (questions.empty()) data_error("'%s' holds no questions: name another file", path.c_str());
    return questions;
}

// Per question: 1 right, 0 wrong, -1 not asked, since it is longer than the model's longest sequence.
// An answer is right if greedy decoding from the prompt would write it. One forward pass over prompt and answer tells: greedy decoding agrees with the
// answer up to its first wrong token, so every token is right if and only if each is the likeliest behind the true ones before it.
inline std::vector<int> answer_questions(Trainer& trainer, const std::vector<Question>& questions, int64_t max_tokens) {
    int V = trainer.config.vocab_size;
    int64_t longest = std::min<int64_t>(trainer.config.max_seq, max_tokens);
    max_tokens = std::max(longest, std::min<int64_t>(max_tokens, ((int64_t)1 << 26) / V));  // at most 256 MB of logits
    std::vector<int> right(questions.size(), -1);
    std::vector<float> logits;
    for (size_t next = 0; next < questions.size();) {
        Batch batch;
        batch.cu_seqlens = {0};
        std::vector<size_t> asked;
        for (; next < questions.size(); next++) {
            const Question& q = questions[next];
            if ((int64_t)q.tokens.size() > longest) continue;
            if ((int64_t)(batch.tokens.size() + q.tokens.size()) > max_tokens) break;
            batch.tokens.insert(batch.tokens.end(), q.tokens.begin(), q.tokens.end());
            batch.cu_seqlens.push_back((int)batch.tokens.size());
            asked.push_back(next);
        }
        if (asked.empty()) continue;
        batch.targets.assign(batch.tokens.size(), -1);
        logits.resize(batch.tokens.size() * (size_t)V);
        trainer.forward(batch, Pass(), nullptr, logits.data());
        for (size_t s = 0; s < asked.size(); s++) {
            const std::vector<int>& answer = questions[asked[s]].answer;
            const float* row = logits.data() + (batch.cu_seqlens[s + 1] - answer.size()) * (size_t)V;
            right[asked[s]] = 1;
            for (size_t i = 0; i < answer.size(); i++, row += V) right[asked[s]] &= greedy_token(row, V) == answer[i];
        }
    }
    return right;
}

// A sum over questions: all of them, or those of one range of distances.
struct RecallScore {
    int64_t asked = 0, right = 0, skipped = 0;
    double guess = 0;  // expected right answers by guessing
    void add(const Question& q, int outcome) {
        if (outcome < 0) {
            skipped++;
            return;
        }
        asked++;
        right += outcome;
        guess += q.guess;
    }
    double exact() const { return (double)right / (double)asked; }  // NaN if none was asked
    double guessing() const { return guess / (double)asked; }
};

inline RecallScore total_recall(const std::vector<Question>& questions, const std::vector<int>& outcomes) {
    RecallScore total;
    for (size_t i = 0; i < questions.size(); i++) total.add(questions[i], outcomes[i]);
    return total;
}

// At most n of them, evenly spread.
inline std::vector<Question> question_sample(const std::vector<Question>& questions, size_t n) {
    if (questions.size() <= n) return questions;
    std::vector<Question> sample;
    for (size_t i = 0; i < n; i++) sample.push_back(questions[i * questions.size() / n]);
    return sample;
}

// By distance, in powers of two.
inline void print_recall(const std::vector<Question>& questions, const std::vector<int>& outcomes) {
    std::map<int64_t, RecallScore> buckets;
    for (size_t i = 0; i < questions.size(); i++) {
        int64_t low = 1;
        while (low * 2 <= questions[i].distance) low *= 2;
        buckets[questions[i].distance < 1 ? 0 : low].add(questions[i], outcomes[i]);
    }
    printf("%14s %10s %8s %8s\n", "distance", "questions", "exact", "guess");
    auto print_row = [](const std::string& name, const RecallScore& s) {
        if (s.asked) printf("%14s %10lld %7.1f%% %7.1f%%\n", name.c_str(), (long long)s.asked, 100 * s.exact(), 100 * s.guessing());
    };
    for (const auto& [low, score] : buckets) print_row(low ? format("%lld-%lld", (long long)low, (long long)(2 * low - 1)) : "0", score);
    RecallScore total = total_recall(questions, outcomes);
    print_row("all", total);
    if (total.skipped) printf("%lld questions are longer than the model's longest sequence and were not asked\n", (long long)total.skipped);
}
