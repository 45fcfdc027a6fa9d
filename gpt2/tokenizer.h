// Text to tokens and back. Three tokenizers: `bytes`, where ids 0-255 are the bytes themselves and 256 is the end of a text; GPT-2's kind of byte-pair
// encoding, from a directory with its two files (bpe.h); and `ids`, GPT-2's numbers without its vocabulary, for shards that were tokenised elsewhere: its
// "text" is the numbers, separated by spaces.
#pragma once

#include <algorithm>
#include <cassert>
#include <cstdint>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include <nlohmann/json.hpp>

#include "bpe.h"
#include "error.h"
#include "files.h"

struct Tokenizer {
    std::string name;  // bytes, bpe or ids
    int vocab_size = 0;
    int end_of_text = 0;             // the token that every document starts with, as in llm.c's shards
    bool text = false;               // reads text; otherwise numbers
    std::shared_ptr<const Bpe> bpe;  // the vocabulary, if there is one

    // A prompt, say. Text never yields the end-of-text token, whatever it spells; numbers stand for themselves.
    std::vector<int> encode(std::string_view input) const {
        if (bpe) {
            std::vector<uint32_t> tokens;
            BpeEncoder(*bpe, 8).encode(input, tokens);
            return std::vector<int>(tokens.begin(), tokens.end());
        }
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

    // A whole text file; see CorpusEncoder.
    std::vector<uint32_t> encode_corpus(std::string_view corpus) const;

    std::string decode(int id) const {
        assert(id >= 0 && id < vocab_size);
        if (!text) return std::to_string(id) + " ";
        if (bpe) return bpe->tokens[id];
        return id == end_of_text ? std::string(document_separator) : std::string(1, (char)id);
    }

    // What a checkpoint remembers: a model is of no use with another tokenizer.
    nlohmann::json identity() const {
        nlohmann::json j = {{"name", name}, {"vocab_size", vocab_size}, {"end_of_text", end_of_text}};
        if (bpe) j["checksum"] = bpe->checksum();
        return j;
    }

 private:
    static bool is_space(char c) { return c == ' ' || (c >= '\t' && c <= '\r'); }
};

// The tokenizer `ids` of a vocabulary other than GPT-2's: `ids:V`, or `ids:V:E` where the end of a text is not its last token.
inline std::string ids_tokenizer_name(int64_t vocab_size, int64_t end_of_text) {
    if (end_of_text >= 0 && end_of_text < vocab_size - 1) return format("ids:%lld:%lld", (long long)vocab_size, (long long)end_of_text);
    return vocab_size == 50257 ? "ids" : format("ids:%lld", (long long)vocab_size);
}
inline bool parse_ids_tokenizer(const std::string& name, int& vocab_size, int& end_of_text) {
    int read = 0;
    if (sscanf(name.c_str(), "ids:%8d%n", &vocab_size, &read) < 1 || vocab_size < 1 || vocab_size > 1 << 24) return false;
    end_of_text = vocab_size - 1;
    if (name[read]) sscanf(name.c_str() + read, ":%8d", &end_of_text);
    return end_of_text >= 0 && name == ids_tokenizer_name(vocab_size, end_of_text);  // in one way only: a run is known by the name
}

inline Tokenizer make_tokenizer(std::shared_ptr<const Bpe> bpe) {
    Tokenizer t;
    t.name = "bpe";
    t.vocab_size = (int)bpe->tokens.size();
    t.end_of_text = (int)bpe->end_of_text;
    t.text = true;
    t.bpe = std::move(bpe);
    return t;
}

// What --tokenizer names: bytes, ids, or the directory of a vocabulary.
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
    } else if (parse_ids_tokenizer(name, t.vocab_size, t.end_of_text)) {
        return t;
    } else if (struct stat st; stat(name.c_str(), &st) == 0 && S_ISDIR(st.st_mode)) {
        return make_tokenizer(load_bpe(name));
    } else {
        usage_error("--tokenizer is '%s': choose one of bytes, ids, or a directory that holds encoder.json and vocab.bpe", printable(name).c_str());
    }
    return t;
}

// ---------------------------------------------------------------------------------------------------------------------------------------------------------
// Corpora

// A part of a corpus, encoded by itself.
struct EncodedPart {
    std::vector<uint32_t> tokens;
    bool begins_within = false;  // with text, which may belong to a document begun before: then tokens[0], an end-of-text token, is not to be
    bool ends_within = false;    // within a document
};

// Encodes corpora, for one thread at a time. Every document starts with the end-of-text token. Documents are separated by document_separator; one line feed
// behind it belongs to it, the one before it belongs to the document, which ends as any text file does. Empty documents, such as a separator at either end
// of the file would make, are left out.
class CorpusEncoder {
 public:
    // As many words are remembered as BpeEncoder says; few for few texts.
    explicit CorpusEncoder(const Tokenizer& tokenizer, int log2_words = 17) : tokenizer(tokenizer) {
        assert(tokenizer.text);
        if (tokenizer.bpe) encoder = std::make_unique<BpeEncoder>(*tokenizer.bpe, log2_words);
    }

    // Text and nothing else: separators are not looked for. Appends.
    void encode_text(std::string_view text, std::vector<uint32_t>& out) {
        if (encoder)
            encoder->encode(text, out);
        else
            out.insert(out.end(), (const uint8_t*)text.data(), (const uint8_t*)text.data() + text.size());
    }

    void encode(std::string_view text, EncodedPart& out) {
        out.tokens.clear();
        out.begins_within = out.ends_within = false;
        for (size_t begin = 0; begin < text.size();) {
            size_t end = std::min(text.find(document_separator, begin), text.size());
            if (end > begin) {
                out.begins_within |= begin == 0;
                out.ends_within = end == text.size();
                out.tokens.push_back((uint32_t)tokenizer.end_of_text);
                encode_text(text.substr(begin, end - begin), out.tokens);
            }
            begin = end + document_separator.size();
            if (begin < text.size() && text[begin] == '\n') begin++;
        }
    }

 private:
    const Tokenizer& tokenizer;
    std::unique_ptr<BpeEncoder> encoder;
};

inline std::vector<uint32_t> Tokenizer::encode_corpus(std::string_view corpus) const {
    EncodedPart all;
    all.tokens.reserve(corpus.size() / (bpe ? 3 : 1) + 1);
    CorpusEncoder(*this).encode(corpus, all);
    return std::move(all.tokens);
}

// ---------------------------------------------------------------------------------------------------------------------------------------------------------
// Printing

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
