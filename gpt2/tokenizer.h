// Text to tokens and back. Two tokenizers: `bytes`, where ids 0-255 are the bytes themselves and 256 is the end of a text; and `ids`, GPT-2's numbers
// without its vocabulary, for shards that were tokenised elsewhere: its "text" is the numbers, separated by spaces.
#pragma once

#include <algorithm>
#include <cassert>
#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include <nlohmann/json.hpp>

#include "error.h"
#include "files.h"

// What separates documents in a text file, and what the end-of-text token looks like when it is printed.
constexpr std::string_view document_separator = "<|endoftext|>";

struct Tokenizer {
    std::string name;
    int vocab_size = 0;
    int end_of_text = 0;  // the token that every document starts with, as in llm.c's shards
    bool text = false;    // reads text; otherwise numbers

    // A prompt, say. Text never yields the end-of-text token, whatever it spells; numbers stand for themselves.
    std::vector<int> encode(std::string_view input) const {
        if (text) return std::vector<int>((const uint8_t*)input.data(), (const uint8_t*)input.data() + input.size());
        std::vector<int> ids;
        for (size_t begin = 0, end; begin < input.size(); begin = end) {
            end = begin + 1;
            if (is_space(input[begin])) continue;
            while (end < input.size() && !is_space(input[end])) end++;
            std::string word(input.substr(begin, end - begin));
            bool number = word.size() <= 9 && word.find_first_not_of("0123456789") == std::string::npos;
            if (!number || std::stoi(word) >= vocab_size)
                usage_error("the tokenizer '%s' cannot read '%s': give numbers from 0 to %d, separated by spaces", name.c_str(), printable(word).c_str(),
                            vocab_size - 1);
            ids.push_back(std::stoi(word));
        }
        return ids;
    }

    // A whole text file. Every document starts with the end-of-text token. Documents are separated by document_separator; one line feed behind it belongs
    // to it, the one before it belongs to the document, which ends as any text file does. Empty documents, such as a separator at either end of the
    // file would make, are left out.
    std::vector<uint16_t> encode_corpus(std::string_view corpus) const {
        assert(text && vocab_size <= 65536);
        std::vector<uint16_t> tokens;
        tokens.reserve(corpus.size() + 1);
        for (size_t begin = 0; begin < corpus.size();) {
            size_t end = std::min(corpus.find(document_separator, begin), corpus.size());
            if (end > begin) tokens.push_back((uint16_t)end_of_text);
            tokens.insert(tokens.end(), (const uint8_t*)corpus.data() + begin, (const uint8_t*)corpus.data() + end);
            begin = end + document_separator.size();
            if (begin < corpus.size() && corpus[begin] == '\n') begin++;
        }
        return tokens;
    }

    std::string decode(int id) const {
        assert(id >= 0 && id < vocab_size);
        if (!text) return std::to_string(id) + " ";
        return id == end_of_text ? std::string(document_separator) : std::string(1, (char)id);
    }

    // What a checkpoint remembers: a model is of no use with another tokenizer.
    nlohmann::json identity() const { return {{"name", name}, {"vocab_size", vocab_size}, {"end_of_text", end_of_text}}; }

 private:
    static bool is_space(char c) { return c == ' ' || (c >= '\t' && c <= '\r'); }
};

inline Tokenizer make_tokenizer(const std::string& name) {
    Tokenizer t;
    t.name = name;
    if (name == "bytes") {
        t.vocab_size = 257;
        t.end_of_text = 256;
        t.text = true;
    } else if (name == "ids") {
        t.vocab_size = 50257;
        t.end_of_text = 50256;
    } else {
        usage_error("unknown tokenizer '%s': choose bytes or ids", name.c_str());
    }
    return t;
}

// Makes valid UTF-8 of bytes that come in pieces: a character is handed out once its last byte has come, and what cannot become one is replaced by
// U+FFFD, one for each maximal part of a character, as Unicode recommends (chapter 3.9).
struct Utf8Printer {
    std::string push(std::string_view bytes) {
        std::string out;
        for (char c : bytes) next((uint8_t)c, out);
        return out;
    }
    // At the end: a character that was begun stays incomplete.
    std::string finish() {
        std::string out;
        give_up(out);
        return out;
    }

 private:
    std::string pending;              // the first bytes of a character
    int missing = 0;                  // how many are still to come
    uint8_t low = 0x80, high = 0xBF;  // where the next one must lie: narrower for the second byte, against surrogates, overlong forms and > U+10FFFF

    void give_up(std::string& out) {
        if (missing) out += "\xEF\xBF\xBD";
        pending.clear();
        missing = 0;
    }
    void next(uint8_t c, std::string& out) {
        if (missing && c >= low && c <= high) {
            pending += (char)c;
            low = 0x80;
            high = 0xBF;
            if (--missing) return;
            out += pending;
            pending.clear();
            return;
        }
        give_up(out);
        low = c == 0xE0 ? 0xA0 : c == 0xF0 ? 0x90 : 0x80;
        high = c == 0xED ? 0x9F : c == 0xF4 ? 0x8F : 0xBF;
        if (c < 0x80)
            out += (char)c;
        else if (c >= 0xC2 && c <= 0xF4) {
            pending = (char)c;
            missing = c < 0xE0 ? 1 : c < 0xF0 ? 2 : 3;
        } else
            out += "\xEF\xBF\xBD";
    }
};
