// A byte-pair vocabulary of one's own: words are counted (a corpus' threads apart), and the most frequent pair of neighbours becomes a token, again and again.
//
// Among pairs of the same frequency the one with the smaller left token comes first, then the one with the smaller right token; ids are as GPT-2 numbers
// them: bytes, merges, <|endoftext|>. So the result depends on the words and their counts alone. A pair is counted wherever two tokens stand side by side,
// in "aaa" twice, and merged from left to right. Pairs that occur but once are not merged.
#pragma once

#include <algorithm>
#include <cassert>
#include <cstdint>
#include <queue>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

#include <nlohmann/json.hpp>

#include "bpe.h"
#include "error.h"

// The different words of texts, and how often each occurs. For one thread at a time.
class WordCounts {
 public:
    std::unordered_map<std::string, int64_t> words;

    // A part of a corpus; what separates documents is no text.
    void add_corpus(std::string_view text) {
        for (size_t begin = 0; begin < text.size();) {
            size_t end = std::min(text.find(document_separator, begin), text.size());
            add(text.substr(begin, end - begin));
            begin = end + document_separator.size();
            if (begin < text.size() && text[begin] == '\n') begin++;
        }
    }
    void add(std::string_view text) {
        splitter.split(text, [&](size_t begin, size_t end) { words[std::string(text.substr(begin, end - begin))]++; });
    }
    void take(WordCounts& other) {
        for (auto& [word, count] : other.words) words[word] += count;
        other.words.clear();
    }

 private:
    WordSplitter splitter;
};

class BpeTrainer {
 public:
    std::vector<Merge> merges;
    std::vector<std::string> tokens;  // bytes and merges

    explicit BpeTrainer(const WordCounts& counts) {
        const ByteCharacters& characters = byte_characters();
        std::array<uint32_t, 256> id;
        for (int i = 0; i < 256; i++) {
            tokens.push_back(std::string(1, (char)characters.order[i]));
            id[characters.order[i]] = (uint32_t)i;
        }
        size_t total = 0;
        for (const auto& [word, count] : counts.words) total += word.size() > 1 ? word.size() : 0;
        if (total >= none) data_error("the texts have too many different words, %zu bytes of them: give less text, 4 GB is the limit", total);
        for (std::vector<uint32_t>* v : {&token, &left, &right, &word_of}) v->reserve(total);
        for (const auto& [word, count] : counts.words) {
            if (word.size() < 2) continue;
            uint32_t first = (uint32_t)token.size(), last = first + (uint32_t)word.size() - 1;
            for (uint32_t i = first; i <= last; i++) {
                token.push_back(id[(uint8_t)word[i - first]]);
                left.push_back(i > first ? i - 1 : none);
                right.push_back(i < last ? i + 1 : none);
                word_of.push_back((uint32_t)word_count.size());
            }
            word_count.push_back(count);
            for (uint32_t i = first; i < last; i++) add(i);
        }
        queue_new();
    }

    // Makes one more token; false if no pair is left that occurs twice.
    bool step() {
        while (!queue.empty() && queue.top().count != pairs[queue.top().key].count) {  // it has become rarer: back to where it belongs now
            Candidate c = queue.top();
            queue.pop();
            c.count = pairs[c.key].count;
            if (c.count > 1) queue.push(c);
        }
        if (queue.empty()) return false;
        uint64_t key = queue.top().key;
        queue.pop();
        uint32_t a = (uint32_t)(key >> 32), b = (uint32_t)key, made = (uint32_t)tokens.size();
        std::vector<uint32_t> places = std::move(pairs[key].places);
        std::sort(places.begin(), places.end());
        for (uint32_t i : places) {
            uint32_t j = right[i];
            if (token[i] != a || j == none || token[j] != b) continue;  // merged into something else since, or in the list twice
            uint32_t before = left[i], behind = right[j];
            if (before != none) remove(before);
            if (behind != none) remove(j);
            token[i] = made;
            token[j] = none;
            right[i] = behind;
            if (behind != none) left[behind] = i;
            if (before != none) add(before);
            if (behind != none) add(i);
        }
        pairs.erase(key);
        merges.push_back({a, b, made});
        tokens.push_back(tokens[a] + tokens[b]);
        queue_new();
        return true;
    }

    // What encoder.json and vocab.bpe say.
    void write(std::string& encoder_json, std::string& vocab_bpe) const {
        const ByteCharacters& characters = byte_characters();
        encoder_json = "{";
        vocab_bpe = "#version: 0.2\n";
        size_t id = 0;
        auto add_token = [&](const std::string& shown) {
            encoder_json += (id ? ", " : "") + nlohmann::json(shown).dump(-1, ' ', true) + ": " + std::to_string(id);
            id++;
        };
        for (const std::string& t : tokens) add_token(characters.shown(t));
        add_token(std::string(document_separator));
        encoder_json += "}";
        for (const Merge& m : merges) vocab_bpe += characters.shown(tokens[m.left]) + " " + characters.shown(tokens[m.right]) + "\n";
    }

 private:
    static constexpr uint32_t none = UINT32_MAX;

    // All different words, one behind another. A token stands where it begins, and knows where its neighbours in the word begin.
    std::vector<uint32_t> token, left, right, word_of;
    std::vector<int64_t> word_count;

    struct PairPlaces {
        int64_t count = 0;
        std::vector<uint32_t> places;  // where the pair stands, or stood
    };
    std::unordered_map<uint64_t, PairPlaces> pairs;  // by left << 32 | right
    struct Candidate {
        int64_t count;
        uint64_t key;
        bool operator<(const Candidate& o) const { return count != o.count ? count < o.count : key > o.key; }
    };
    std::priority_queue<Candidate> queue;  // each pair that occurs twice, with a count that is too high if occurrences have gone since
    std::vector<uint64_t> fresh;           // pairs that are not in the queue yet

    uint64_t key_at(uint32_t i) const { return (uint64_t)token[i] << 32 | token[right[i]]; }
    void add(uint32_t i) {
        uint64_t key = key_at(i);
        PairPlaces& p = pairs[key];
        if (p.places.empty()) fresh.push_back(key);
        p.count += word_count[word_of[i]];
        p.places.push_back(i);
    }
    void remove(uint32_t i) {
        uint64_t key = key_at(i);
        pairs[key].count -= word_count[word_of[i]];
    }
    void queue_new() {
        for (uint64_t key : fresh)
            if (int64_t count = pairs[key].count; count > 1) queue.push({count, key});
        fresh.clear();
    }
};
