// Multiple choice, by HellaSwag's rule: of the given continuations of a context a model chooses the one with the lowest mean loss over its tokens, of equal
// ones the first. Two kinds of files:
//
//     llm.c's evaluation format, in token ids: 256 int32 (20240522, version 1, examples, bytes of the longest); then for each example uint16: 65535, its bytes
//     from here to its end, its number, label, number of choices, tokens of the context, those tokens, and for each choice its tokens' number and they;
//     a line of JSON for each example: {"context": text, "choices": [text, text, ...], "label": number of the right one, from 0}. Context and choice are
//     put together as they stand, so a choice mostly begins with a space; each is encoded apart, as in llm.c.
//
// A context without tokens becomes the end of the text before. What is longer than the model's longest sequence loses the beginning of its context.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <nlohmann/json.hpp>
#include <string>
#include <string_view>
#include <vector>

#include "error.h"
#include "files.h"
#include "tokenizer.h"
#include "trainer.h"

struct MultipleChoice {
    std::vector<int> context;
    std::vector<std::vector<int>> choices;  // two at least, none empty
    int label = 0;
};

// ----------------------------------------------------------------------------
// Reading

constexpr int32_t choices_magic = 20240522;
constexpr size_t choices_header_bytes = 1024;

inline bool is_choices_binary(const uint8_t* bytes, size_t size) { return size >= 4 && load<int32_t>(bytes) == choices_magic; }

// What is left of an example, in uint16.
struct ChoiceWords {
    const uint8_t* data;
    size_t left;
    bool take(int& word) {
        if (left == 0) return false;
        word = load<uint16_t>(data);
        data += 2;
        left--;
        return true;
    }
    // A number, then so many tokens.
    bool take_list(std::vector<int>& tokens) {
        int n;
        if (!take(n) || (size_t)n > left) return false;
        tokens.resize((size_t)n);
        for (int& token : tokens) take(token);
        return true;
    }
};

inline bool parse_choice_words(ChoiceWords words, int number, MultipleChoice& out, std::string& error) {
    int index = 0, choices = 0;
    out = MultipleChoice();
    if (!words.take(index) || !words.take(out.label) || !words.take(choices) || !words.take_list(out.context))
        return refuse(error, "its context does not fit into it");
    if (index != number) return refuse(error, "it says that it is example " + std::to_string(index));
    if (choices < 2) return refuse(error, "it has " + std::to_string(choices) + " choices, two are the least");
    if (out.label >= choices) return refuse(error, "its label is " + std::to_string(out.label) + ", it has choices 0 to " + std::to_string(choices - 1));
    for (int c = 0; c < choices; c++) {
        std::vector<int> tokens;
        if (!words.take_list(tokens)) return refuse(error, "its choice " + std::to_string(c) + " does not fit into it");
        if (tokens.empty()) return refuse(error, "its choice " + std::to_string(c) + " has no tokens");
        out.choices.push_back(std::move(tokens));
    }
    if (words.left) return refuse(error, std::to_string(words.left) + " words are left behind its last choice");
    return true;
}

inline bool parse_choices(const uint8_t* bytes, size_t size, std::vector<MultipleChoice>& out, std::string& error) {
    out.clear();
    if (!is_choices_binary(bytes, size)) return refuse(error, "it does not start with the magic number of llm.c's evaluation format");
    if (size < choices_header_bytes) return refuse(error, "it has " + std::to_string(size) + " bytes, less than its header of 1024: it is cut short");
    int32_t version = load<int32_t>(bytes + 4), count = load<int32_t>(bytes + 8), longest = load<int32_t>(bytes + 12);
    if (version != 1) return refuse(error, "its version is " + std::to_string(version) + ", known is 1");
    if (count < 1 || count > 65536) return refuse(error, "its header claims " + std::to_string(count) + " examples, 1 to 65536 are possible");
    const uint8_t *at = bytes + choices_header_bytes, *end = bytes + size;
    for (int i = 0; i < count; i++) {
        std::string example = "example " + std::to_string(i) + ": ", why;
        size_t left = (size_t)(end - at), record = left < 4 ? 0 : load<uint16_t>(at + 2);
        if (left < 4) return refuse(error, example + "it is not there: the file is cut short");
        if (load<uint16_t>(at) != 65535) return refuse(error, example + "it does not start with 65535");
        if (record > left) return refuse(error, example + "it has " + std::to_string(record) + " bytes, " + std::to_string(left) + " are left");
        if (record < 4 || record % 2 || (int64_t)record > longest)
            return refuse(error, example + "it has " + std::to_string(record) + " bytes, an even number from 4 to the header's " + std::to_string(longest) +
                                     " is possible");
        out.emplace_back();
        if (!parse_choice_words({at + 4, record / 2 - 2}, i, out.back(), why)) return refuse(error, example + why);
        at += record;
    }
    if (at != end) return refuse(error, std::to_string(end - at) + " bytes are left behind its last example");
    return true;
}

inline bool parse_choice_line(std::string_view line, const Tokenizer& tokenizer, MultipleChoice& out, std::string& error) {
    out = MultipleChoice();
    nlohmann::json j = nlohmann::json::parse(line, nullptr, false);
    bool valid = j.is_object() && j.contains("context") && j["context"].is_string() && j.contains("choices") && j["choices"].is_array() &&
                 j["choices"].size() >= 2 && j.contains("label") && j["label"].is_number_unsigned() && j["label"].get<uint64_t>() < j["choices"].size();
    for (size_t c = 0; valid && c < j["choices"].size(); c++) valid = j["choices"][c].is_string() && !j["choices"][c].get_ref<const std::string&>().empty();
    if (!valid)
        return refuse(error, "it takes {\"context\": text, \"choices\": [text, text, ...], \"label\": number of the right one, from 0}, and no empty choice");
    out.context = tokenizer.encode(j["context"].get_ref<const std::string&>());
    for (const nlohmann::json& choice : j["choices"]) out.choices.push_back(tokenizer.encode(choice.get_ref<const std::string&>()));
    out.label = (int)j["label"].get<uint64_t>();
    return true;
}

inline std::vector<MultipleChoice> read_choices(const std::string& path, const Tokenizer& tokenizer) {
    MappedFile file(path);
    std::vector<MultipleChoice> examples;
    std::string error;
    if (is_choices_binary(file.data, file.size)) {
        if (!parse_choices(file.data, file.size, examples, error))
            data_error("'%s' cannot be used as a multiple-choice test: %s; make or fetch it again", path.c_str(), error.c_str());
    } else {
        each_line(file, [&](std::string_view line, const std::string& where) {
            if (!tokenizer.text)
                data_error("'%s' asks in words, and the model reads token ids without a tokenizer: give llm.c's evaluation format", path.c_str());
            examples.emplace_back();
            if (!parse_choice_line(line, tokenizer, examples.back(), error)) data_error("%s is no multiple choice: %s", where.c_str(), error.c_str());
        });
    }
    if (examples.empty()) data_error("'%s' holds no multiple choices: name another file", path.c_str());
    for (size_t i = 0; i < examples.size(); i++) {
        auto check = [&](const std::vector<int>& tokens) {
            for (int token : tokens)
                if (token >= tokenizer.vocab_size)
                    data_error("token %d in example %zu of '%s' is outside the model's vocabulary of %d: take the file for its tokenizer", token, i,
                               path.c_str(), tokenizer.vocab_size);
        };
        check(examples[i].context);
        for (const std::vector<int>& choice : examples[i].choices) check(choice);
    }
    return examples;
}

// ----------------------------------------------------------------------------
// Choosing

struct Choices {
    std::vector<int> chosen;  // of each example
    int64_t shortened = 0;    // examples that lost the beginning of their context
};

// Every choice behind its context is a sequence; as many as fit into max_tokens go into one batch.
inline Choices choose(Trainer& trainer, const std::vector<MultipleChoice>& examples, int end_of_text, int64_t max_tokens) {
    const int64_t longest = trainer.config.max_seq;
    max_tokens = std::max(max_tokens, longest);
    Choices result;
    result.chosen.assign(examples.size(), 0);
    std::vector<double> best(examples.size(), INFINITY);
    struct Asked {
        size_t example;
        int choice, tokens;
    };
    std::vector<Asked> asked;
    Batch batch;
    batch.cu_seqlens = {0};
    auto answer = [&] {
        if (asked.empty()) return;
        std::vector<float> losses(batch.tokens.size());
        trainer.forward(batch, Pass(), losses.data());
        for (size_t s = 0; s < asked.size(); s++) {
            const Asked& a = asked[s];
            double sum = 0;
            for (int i = batch.cu_seqlens[s + 1] - a.tokens; i < batch.cu_seqlens[s + 1]; i++) sum += losses[i];
            if (!std::isfinite(sum)) data_error("the loss of example %zu is not finite: the model's training diverged; take an earlier checkpoint", a.example);
            if (!(sum / a.tokens < best[a.example])) continue;
            best[a.example] = sum / a.tokens;
            result.chosen[a.example] = a.choice;
        }
        asked.clear();
        batch = Batch();
        batch.cu_seqlens = {0};
    };
    for (size_t e = 0; e < examples.size(); e++) {
        std::vector<int> context = examples[e].context;
        if (context.empty()) context = {end_of_text};
        int64_t most = 0;
        for (const std::vector<int>& choice : examples[e].choices) most = std::max(most, (int64_t)choice.size());
        if (most > longest)
            data_error("a choice of example %zu has %lld tokens, and the model's longest sequence %lld: leave the example out, or take another model", e,
                       (long long)most, (long long)longest);
        // Nothing is predicted from a choice's last token, and all choices get the same context.
        if ((int64_t)context.size() + most - 1 > longest) {
            context.erase(context.begin(), context.end() - (longest + 1 - most));
            result.shortened++;
        }
        for (size_t c = 0; c < examples[e].choices.size(); c++) {
            const std::vector<int>& choice = examples[e].choices[c];
            if ((int64_t)(batch.tokens.size() + context.size() + choice.size() - 1) > max_tokens) answer();
            batch.tokens.insert(batch.tokens.end(), context.begin(), context.end());
            batch.tokens.insert(batch.tokens.end(), choice.begin(), choice.end() - 1);
            batch.targets.resize(batch.targets.size() + context.size() - 1, -1);
            batch.targets.insert(batch.targets.end(), choice.begin(), choice.end());
            batch.cu_seqlens.push_back((int)batch.tokens.size());
            asked.push_back({e, (int)c, (int)choice.size()});
        }
    }
    answer();
    return result;
}

inline void print_choices(const std::vector<MultipleChoice>& examples, const Choices& result) {
    int64_t right = 0;
    double guess = 0;
    for (size_t i = 0; i < examples.size(); i++) {
        right += result.chosen[i] == examples[i].label;
        guess += 1.0 / (double)examples[i].choices.size();
    }
    double n = (double)examples.size();
    printf("multiple choice %.2f%% | %lld right of %zu | guessing %.2f%%", 100 * (double)right / n, (long long)right, examples.size(), 100 * guess / n);
    if (result.shortened) printf(" | %lld contexts shortened to the model's longest sequence", (long long)result.shortened);
    printf("\n");
}
