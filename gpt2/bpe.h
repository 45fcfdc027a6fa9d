// GPT-2's byte-pair encoding, read from its two files: encoder.json (token -> id) and vocab.bpe (merges, the most frequent first).
//
// Text is split into words by a regular expression, and within each word the pair of neighbours that comes first in vocab.bpe is merged, wherever it stands,
// from left to right, until no pair of neighbours is in the list. Tokens never cross words, so that words are encoded apart, and remembered.
//
// Every string of bytes can be encoded, and decoding gives it back: bytes are tokens. Where text is not UTF-8, each byte that belongs to no character is a
// word of its own, and what stands between such bytes is split as a text of its own.
#pragma once

#define PCRE2_CODE_UNIT_WIDTH 8
#include <pcre2.h>

#include <algorithm>
#include <array>
#include <cassert>
#include <cstdint>
#include <cstring>
#include <memory>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

#include <nlohmann/json.hpp>

#include "error.h"
#include "files.h"

// What separates documents in a text file, and what the end-of-text token looks like when it is printed.
constexpr std::string_view document_separator = "<|endoftext|>";

// ---------------------------------------------------------------------------------------------------------------------------------------------------------
// Characters

// Bytes of the character at `p`; 0 if none begins there. Overlong forms, surrogates and what lies beyond U+10FFFF are no characters.
inline size_t utf8_length(const uint8_t* p, const uint8_t* end) {
    uint8_t c = *p;
    if (c < 0x80) return 1;
    if (c < 0xC2 || c > 0xF4) return 0;
    size_t n = c < 0xE0 ? 2 : c < 0xF0 ? 3 : 4;
    uint8_t low = c == 0xE0 ? 0xA0 : c == 0xF0 ? 0x90 : 0x80, high = c == 0xED ? 0x9F : c == 0xF4 ? 0x8F : 0xBF;
    if ((size_t)(end - p) < n || p[1] < low || p[1] > high) return 0;
    for (size_t i = 2; i < n; i++)
        if ((p[i] & 0xC0) != 0x80) return 0;
    return n;
}

// How many bytes from the start of `text` are whole characters.
inline size_t valid_utf8(std::string_view text) {
    const uint8_t *begin = (const uint8_t*)text.data(), *end = begin + text.size(), *p = begin;
    while (p < end) {
        while (end - p >= 8 && !(load<uint64_t>(p) & 0x8080808080808080)) p += 8;
        if (p == end) break;
        size_t n = utf8_length(p, end);
        if (n == 0) break;
        p += n;
    }
    return (size_t)(p - begin);
}

// The two files hold no bytes but characters: each byte has one that can be seen. Most of ASCII and Latin-1 stand for themselves, the others for the code
// points from 256 on; the ids of the 256 bytes follow the order: those that stand for themselves first.
struct ByteCharacters {
    std::array<uint16_t, 256> code_point = {};  // of a byte
    std::array<int16_t, 512> byte = {};         // of a code point, or -1
    std::array<uint8_t, 256> order = {};        // the bytes, as GPT-2 numbers them

    ByteCharacters() {
        byte.fill(-1);
        int next = 0, beyond = 256;
        auto stands_for_itself = [](int b) { return (b >= 33 && b <= 126) || (b >= 161 && b <= 172) || b >= 174; };
        for (bool itself : {true, false})
            for (int b = 0; b < 256; b++)
                if (stands_for_itself(b) == itself) {
                    code_point[b] = (uint16_t)(itself ? b : beyond++);
                    byte[code_point[b]] = (int16_t)b;
                    order[next++] = (uint8_t)b;
                }
    }
    std::string shown(std::string_view bytes) const {
        std::string s;
        for (char c : bytes) {
            int p = code_point[(uint8_t)c];
            if (p >= 0x80) s += (char)(0xC0 | p >> 6);
            s += (char)(p < 0x80 ? p : 0x80 | (p & 0x3F));
        }
        return s;
    }
    // False if `shown` has a character that stands for no byte.
    bool bytes(std::string_view shown, std::string& out) const {
        out.clear();
        const uint8_t *p = (const uint8_t*)shown.data(), *end = p + shown.size();
        for (size_t n; p < end; p += n) {
            n = utf8_length(p, end);
            int c = n == 1 ? *p : n == 2 ? (p[0] & 0x1F) << 6 | (p[1] & 0x3F) : 511;
            if (c >= 512 || byte[c] < 0) return false;
            out += (char)byte[c];
        }
        return true;
    }
};
inline const ByteCharacters& byte_characters() {
    static const ByteCharacters c;
    return c;
}

// ---------------------------------------------------------------------------------------------------------------------------------------------------------
// The vocabulary

struct Merge {
    uint32_t left, right, id;  // tokens; `id` is the one that the two become
};

struct Bpe {
    static constexpr size_t most_tokens = 1 << 24;

    std::vector<std::string> tokens;  // the bytes of each id
    std::vector<Merge> merges;        // by rank
    std::array<uint32_t, 256> byte_id = {};
    uint32_t end_of_text = 0;
    std::string encoder_json, vocab_bpe;  // the files as they were read: a checkpoint takes them along

    // What becomes of two neighbours: the place of their merge in `merges`, or UINT32_MAX if there is none, and the token they become.
    struct Merged {
        uint32_t rank = UINT32_MAX, id = 0;
    };
    Merged find(uint32_t left, uint32_t right) const {
        uint64_t key = (uint64_t)left << 32 | right, h = hash(key);
        if (!(filter[filter_word(h)] >> (h >> 58) & 1)) return {};
        size_t i = h >> 32 & (pairs.size() - 1);
        while (pairs[i].key != key && pairs[i].merged.rank != UINT32_MAX) i = (i + 1) & (pairs.size() - 1);
        return pairs[i].merged;
    }
    Merged find_bytes(uint8_t left, uint8_t right) const { return byte_pairs[left << 8 | right]; }

    // What find() needs, once `merges` is complete.
    void index_merges() {
        size_t size = 16;
        while (size < 2 * merges.size()) size *= 2;
        pairs.assign(size, Pair());
        filter.assign(size / 16, 0);
        byte_pairs.assign(1 << 16, Merged());
        for (size_t rank = 0; rank < merges.size(); rank++) {
            const Merge& m = merges[rank];
            Pair p = {(uint64_t)m.left << 32 | m.right, {(uint32_t)rank, m.id}};
            uint64_t h = hash(p.key);
            filter[filter_word(h)] |= (uint64_t)1 << (h >> 58);
            size_t i = h >> 32 & (size - 1);
            while (pairs[i].merged.rank != UINT32_MAX) i = (i + 1) & (size - 1);
            pairs[i] = p;
        }
        for (int l = 0; l < 256; l++)
            for (int r = 0; r < 256; r++) byte_pairs[l << 8 | r] = find(byte_id[l], byte_id[r]);
    }

    // FNV-1a over what the files say, however they are laid out: two vocabularies of the same checksum encode and decode alike.
    std::string checksum() const {
        uint64_t h = 0xcbf29ce484222325;
        auto add = [&](const void* data, size_t n) {
            for (size_t i = 0; i < n; i++) h = (h ^ ((const uint8_t*)data)[i]) * 0x100000001b3;
        };
        auto number = [&](uint32_t n) { add(&n, sizeof n); };
        number((uint32_t)tokens.size());
        number(end_of_text);
        for (const std::string& t : tokens) {
            number((uint32_t)t.size());
            add(t.data(), t.size());
        }
        for (const Merge& m : merges)
            for (uint32_t n : {m.left, m.right, m.id}) number(n);
        return format("%016llx", (unsigned long long)h);
    }

 private:
    struct Pair {
        uint64_t key = UINT64_MAX;  // left << 32 | right
        Merged merged;
    };
    std::vector<Pair> pairs;         // a hash table, a power of two in size
    std::vector<uint64_t> filter;    // a bit for each hash that a pair has: most look-ups find nothing, and this one stays in the processor's cache
    std::vector<Merged> byte_pairs;  // the same for two bytes, where every word begins

    static uint64_t hash(uint64_t key) { return key * 0x9e3779b97f4a7c15; }
    size_t filter_word(uint64_t h) const { return h >> 30 & (filter.size() - 1); }
};

// encoder.json, {"token": id}, as a stream of events: a document would keep the last of two equal keys without a word.
class EncoderReader : public nlohmann::json_sax<nlohmann::json> {
 public:
    EncoderReader(std::unordered_map<std::string, uint32_t>& ids, std::string& error) : ids(ids), error(error) {}

    bool start_object(size_t) override { return level++ == 0 || unexpected("an object"); }
    bool key(string_t& k) override {
        name = k;
        return ids.emplace(k, 0).second || refuse(error, "its token '" + printable(k) + "' is there twice");
    }
    bool number_unsigned(number_unsigned_t n) override {
        if (level != 1) return unexpected("a number");
        if (n >= Bpe::most_tokens) return refuse(error, "its token '" + printable(name) + "' has the id " + std::to_string(n) + ", beyond 2^24");
        ids[name] = (uint32_t)n;
        return true;
    }
    bool end_object() override { return true; }
    bool start_array(size_t) override { return unexpected("an array"); }
    bool end_array() override { return true; }
    bool string(string_t&) override { return unexpected("a string"); }
    bool null() override { return unexpected("null"); }
    bool boolean(bool) override { return unexpected("true or false"); }
    bool number_integer(number_integer_t) override { return unexpected("a negative number"); }
    bool number_float(number_float_t, const string_t&) override { return unexpected("a fraction"); }
    bool binary(binary_t&) override { return unexpected("bytes"); }
    bool parse_error(size_t position, const std::string&, const nlohmann::json::exception&) override {
        return !error.empty() ? false : refuse(error, "it is not JSON at byte " + std::to_string(position));
    }

 private:
    std::unordered_map<std::string, uint32_t>& ids;
    std::string &error, name;
    int level = 0;

    bool unexpected(const char* what) { return refuse(error, std::string("it holds ") + what + " where ids of tokens belong"); }
};

// The vocabulary that the two files describe; false, and why, if they do not.
//
// What is refused beyond what cannot be read: ids that are not 0 .. n-1, a vocabulary without all bytes or without <|endoftext|>, a merge of what is no token
// yet, and two merges that give the same token. So a merge makes no pair that comes before it in the list, and the order of merging is beyond doubt.
inline bool parse_bpe(std::string_view encoder_json, std::string_view vocab_bpe, Bpe& out, std::string& error) {
    out = Bpe();
    error.clear();
    auto refuse_json = [&](const std::string& why) { return refuse(error, "encoder.json: " + why); };
    std::unordered_map<std::string, uint32_t> ids;
    EncoderReader reader(ids, error);
    bool good = nlohmann::json::sax_parse(encoder_json.begin(), encoder_json.end(), &reader) && error.empty();
    if (!good) return refuse_json(error.empty() ? "it is not JSON" : error);

    const ByteCharacters& characters = byte_characters();
    out.tokens.resize(ids.size());
    std::vector<bool> taken(ids.size()), known(ids.size());  // the ids that tokens have; the tokens that bytes and merges make
    for (const auto& [shown, id] : ids) {
        if (id >= ids.size()) return refuse_json(format("the id %u of '%s' is not below the number of tokens, %zu", id, printable(shown).c_str(), ids.size()));
        if (taken[id]) return refuse_json(format("two tokens have the id %u", id));
        taken[id] = true;
        if (!characters.bytes(shown, out.tokens[id])) out.tokens[id] = shown;  // a special token may have characters of its own
    }
    for (int b = 0; b < 256; b++) {
        auto found = ids.find(characters.shown(std::string(1, (char)b)));
        if (found == ids.end()) return refuse_json(format("it has no token for the byte 0x%02x", b));
        out.byte_id[b] = found->second;
        known[found->second] = true;
    }
    auto end = ids.find(std::string(document_separator));
    if (end == ids.end()) return refuse_json("it has no " + std::string(document_separator));
    out.end_of_text = end->second;

    size_t number = 1;
    for (size_t begin = 0, line_end; begin < vocab_bpe.size(); begin = line_end + 1, number++) {
        line_end = std::min(vocab_bpe.find('\n', begin), vocab_bpe.size());
        std::string line(vocab_bpe.substr(begin, line_end - begin));
        if (number == 1 && line.compare(0, 8, "#version") == 0) continue;
        auto refuse_line = [&](const std::string& why) {
            return refuse(error, "vocab.bpe: line " + std::to_string(number) + ", '" + printable(line) + "': " + why);
        };
        size_t space = line.find(' ');
        if (space == std::string::npos || space == 0 || space + 1 == line.size() || line.find(' ', space + 1) != std::string::npos)
            return refuse_line("not two tokens with a space between them");
        std::string left = line.substr(0, space), right = line.substr(space + 1);
        auto l = ids.find(left), r = ids.find(right), both = ids.find(left + right);
        if (l == ids.end() || !known[l->second]) return refuse_line("'" + printable(left) + "' is neither a byte nor made by a line above");
        if (r == ids.end() || !known[r->second]) return refuse_line("'" + printable(right) + "' is neither a byte nor made by a line above");
        if (both == ids.end()) return refuse_line("encoder.json has no id for '" + printable(left + right) + "'");
        if (known[both->second]) return refuse_line("'" + printable(left + right) + "' is made by a line above");
        if (both->second == out.end_of_text) return refuse_line("text must not become the end of a text");
        known[both->second] = true;
        out.merges.push_back({l->second, r->second, both->second});
    }
    out.index_merges();
    out.encoder_json = encoder_json;
    out.vocab_bpe = vocab_bpe;
    return true;
}

// From a directory: encoder.json and vocab.bpe, or the same two files under the names that transformers gives them, vocab.json and merges.txt.
inline std::shared_ptr<const Bpe> load_bpe(const std::string& directory) {
    bool renamed = access((directory + "/encoder.json").c_str(), F_OK) != 0 && access((directory + "/vocab.json").c_str(), F_OK) == 0;
    MappedFile json(directory + (renamed ? "/vocab.json" : "/encoder.json")), merges(directory + (renamed ? "/merges.txt" : "/vocab.bpe"));
    auto bpe = std::make_shared<Bpe>();
    std::string error;
    if (!parse_bpe({(const char*)json.data, json.size}, {(const char*)merges.data, merges.size}, *bpe, error))
        data_error("'%s' holds no vocabulary of GPT-2's kind: %s; fetch or train it again", directory.c_str(), error.c_str());
    return bpe;
}

// ---------------------------------------------------------------------------------------------------------------------------------------------------------
// Splitting into words

// GPT-2's expression. White space is written out: it is Unicode's property White_Space, and PCRE2's \s is something else.
#define WHITE_SPACE R"(\t-\r \x{85}\x{A0}\x{1680}\x{2000}-\x{200A}\x{2028}\x{2029}\x{202F}\x{205F}\x{3000})"
constexpr const char* word_expression =
    R"('s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^)" WHITE_SPACE R"(\p{L}\p{N}]+|[)" WHITE_SPACE R"(]+(?![^)" WHITE_SPACE R"(])|[)" WHITE_SPACE "]+";
#undef WHITE_SPACE

// Splits text into words, for one thread at a time. PCRE2 has the last word; words of ASCII characters alone, behind which another one stands or the end,
// are found by hand, which is several times as fast (with `by_hand` false they are not, for comparison).
class WordSplitter {
 public:
    explicit WordSplitter(bool by_hand = true) : by_hand(by_hand), match(pcre2_match_data_create(1, nullptr), pcre2_match_data_free) {
        if (!match) throw std::bad_alloc();
    }

    // Calls word(begin, end) for each word.
    template <class Word>
    void split(std::string_view text, Word word) const {
        for (size_t begin = 0; begin < text.size();) {
            size_t end = begin + valid_utf8(text.substr(begin));
            split_valid((const uint8_t*)text.data(), begin, end, word);
            if (end < text.size()) {
                word(end, end + 1);
                end++;
            }
            begin = end;
        }
    }

 private:
    enum Class : uint8_t { OTHER, LETTER, DIGIT, SPACE, BEYOND_ASCII };
    struct Classes {
        std::array<uint8_t, 256> of = {};
        Classes() {
            for (int c = 0; c < 256; c++)
                of[c] = c >= 0x80                              ? BEYOND_ASCII
                        : (c | 32) >= 'a' && (c | 32) <= 'z'   ? LETTER
                        : c >= '0' && c <= '9'                 ? DIGIT
                        : c == ' ' || (c >= '\t' && c <= '\r') ? SPACE
                                                               : OTHER;
        }
    };
    static const std::array<uint8_t, 256>& classes() {
        static const Classes c;
        return c.of;
    }
    static pcre2_code* expression() {
        struct Code {
            pcre2_code* code;
            Code() {
                int error;
                PCRE2_SIZE where;
                code = pcre2_compile((PCRE2_SPTR)word_expression, PCRE2_ZERO_TERMINATED, PCRE2_UTF | PCRE2_ANCHORED, &error, &where, nullptr);
                if (!code)
                    data_error("PCRE2 does not take the splitting expression (error %d at %zu): install PCRE2 10.30 or newer, with Unicode", error, where);
                pcre2_jit_compile(code, PCRE2_JIT_COMPLETE);  // where there is none, matching is slower
            }
            ~Code() { pcre2_code_free(code); }
        };
        static const Code c;
        return c.code;
    }

    template <class Word>
    void split_valid(const uint8_t* s, size_t begin, size_t end, Word& word) const {
        const uint8_t* classes = WordSplitter::classes().data();
        for (size_t p = begin; p < end;) {
            size_t q = by_hand ? ascii_word(s, p, end, classes) : p;
            if (q == p) q = match_word(s, begin, p, end);
            word(p, q);
            p = q;
        }
    }

    // Where the word that begins at `p` ends; `p` itself if that takes PCRE2.
    static size_t ascii_word(const uint8_t* s, size_t p, size_t end, const uint8_t* classes) {
        if (s[p] == '\'' && end - p >= 2) {
            uint8_t a = s[p + 1], b = end - p >= 3 ? s[p + 2] : 0;
            if (a == 's' || a == 't' || a == 'm' || a == 'd') return p + 2;
            if ((b == 'e' && (a == 'r' || a == 'v')) || (b == 'l' && a == 'l')) return p + 3;
        }
        size_t q = p + (s[p] == ' ');
        uint8_t c = q < end ? classes[s[q]] : (uint8_t)SPACE;
        if (c != SPACE) {  // letters, digits or others, perhaps behind a space
            if (c == BEYOND_ASCII) return p;
            do q++;
            while (q < end && classes[s[q]] == c);
            return q < end && classes[s[q]] == BEYOND_ASCII ? p : q;
        }
        q = p + 1;
        while (q < end && classes[s[q]] == SPACE) q++;
        if (q == end) return q;
        if (classes[s[q]] == BEYOND_ASCII) return p;
        return q == p + 1 ? q : q - 1;  // of several spaces the last one is left to what follows
    }

    size_t match_word(const uint8_t* s, size_t begin, size_t p, size_t end) const {
        int n = pcre2_match(expression(), s + begin, end - begin, p - begin, PCRE2_NO_UTF_CHECK, match.get(), nullptr);
        size_t q = n > 0 ? begin + pcre2_get_ovector_pointer(match.get())[1] : p;
        if (q <= p) data_error("PCRE2 cannot split a text (error %d): leave out a part of it", n);
        return q;
    }

    bool by_hand;
    std::unique_ptr<pcre2_match_data, void (*)(pcre2_match_data*)> match;
};

// ---------------------------------------------------------------------------------------------------------------------------------------------------------
// Encoding

// Encodes text, for one thread at a time.
class BpeEncoder {
 public:
    // Remembers up to 2^log2_words short words.
    BpeEncoder(const Bpe& bpe, int log2_words) : bpe(bpe), remembered((size_t)1 << log2_words), shift(64 - log2_words) {}

    // Appends the tokens of `text`, which never hold the end of a text, whatever it spells.
    void encode(std::string_view text, std::vector<uint32_t>& out) {
        size_t used = out.size();
        const uint8_t* s = (const uint8_t*)text.data();
        splitter.split(text, [&](size_t begin, size_t end) {
            size_t n = end - begin;
            if (used + n + most_remembered > out.size()) out.resize(used + n + 256);  // little by little: texts may be many and short
            used += n > longest_remembered ? merge_word(s + begin, n, &out[used]) : encode_word(s + begin, n, text.size() - begin, &out[used]);
        });
        out.resize(used);
    }

 private:
    static constexpr size_t longest_remembered = 16, most_remembered = 11;
    struct alignas(64) Entry {  // a line of the processor's cache
        uint64_t key[2];
        uint16_t length = 0, count = 0;
        uint32_t ids[most_remembered];
    };
    // The first n of 16 bytes.
    struct Masks {
        uint64_t of[longest_remembered + 1][2];
        Masks() {
            for (size_t n = 0; n <= longest_remembered; n++)
                for (size_t half = 0; half < 2; half++) {
                    size_t bytes = std::min<size_t>(8, n - std::min(n, 8 * half));
                    of[n][half] = bytes == 8 ? UINT64_MAX : ((uint64_t)1 << 8 * bytes) - 1;
                }
        }
    };

    const Bpe& bpe;
    WordSplitter splitter;
    std::vector<Entry> remembered;  // by a hash of the word; the next word of the same hash takes the place
    int shift;
    Masks masks;
    std::vector<uint32_t> left, right;  // for long words
    std::vector<uint64_t> queue;

    // Both write up to n tokens, and encode_word up to most_remembered where there are fewer, and return their number. `readable`: bytes of text from `s` on.
    size_t encode_word(const uint8_t* s, size_t n, size_t readable, uint32_t* out) {
        uint64_t key[2] = {0, 0};
        if (readable >= sizeof key) {
            memcpy(key, s, sizeof key);
            for (int half = 0; half < 2; half++) key[half] &= masks.of[n][half];
        } else {
            memcpy(key, s, n);
        }
        uint64_t h = (key[0] * 0x9e3779b97f4a7c15 ^ (key[1] + n) * 0xd1342543de82ef95) * 0x94d049bb133111eb;
        Entry& e = remembered[(h ^ h >> 32) * 0x9e3779b97f4a7c15 >> shift];
        if (e.length == n && e.key[0] == key[0] && e.key[1] == key[1]) {
            memcpy(out, e.ids, 4 * sizeof *out);
            for (size_t i = 4; i < e.count; i++) out[i] = e.ids[i];
            return e.count;
        }
        size_t count = merge_word(s, n, out);
        if (count <= most_remembered) {
            e.key[0] = key[0];
            e.key[1] = key[1];
            e.length = (uint16_t)n;
            e.count = (uint16_t)count;
            memcpy(e.ids, out, count * sizeof *out);
        }
        return count;
    }

    size_t merge_word(const uint8_t* s, size_t n, uint32_t* ids) {
        constexpr size_t few = 64;
        if (n > few) return merge_long_word(s, n, ids);
        Bpe::Merged merged[few];  // what becomes of each token with the next one
        ids[0] = bpe.byte_id[s[0]];
        for (size_t i = 1; i < n; i++) {
            ids[i] = bpe.byte_id[s[i]];
            merged[i - 1] = bpe.find_bytes(s[i - 1], s[i]);
        }
        while (n > 1) {
            size_t best = 0;
            for (size_t i = 1; i + 1 < n; i++)
                if (merged[i].rank < merged[best].rank) best = i;
            if (merged[best].rank == UINT32_MAX) break;
            ids[best] = merged[best].id;
            n--;
            for (size_t i = best + 1; i < n; i++) {
                ids[i] = ids[i + 1];
                merged[i - 1] = merged[i];
            }
            if (best > 0) merged[best - 1] = bpe.find(ids[best - 1], ids[best]);
            if (best + 1 < n) merged[best] = bpe.find(ids[best], ids[best + 1]);
        }
        return n;
    }

    // The same with a queue of pairs, by rank and then by place: n log n. Pairs that are not there any more stay in the queue, and are passed over.
    // A token is kept where it begins; `left` and `right` say where its neighbours begin.
    size_t merge_long_word(const uint8_t* s, size_t n, uint32_t* ids) {
        if (n >= UINT32_MAX) data_error("a text has a word of %zu bytes: break it up, 4 GB is the limit", n);
        constexpr uint32_t gone = UINT32_MAX;
        uint32_t end = (uint32_t)n;
        left.resize(n);
        right.resize(n);
        for (uint32_t i = 0; i < end; i++) {
            ids[i] = bpe.byte_id[s[i]];
            left[i] = i - 1;
            right[i] = i + 1;
        }
        auto rank_at = [&](uint32_t i) { return right[i] < end ? bpe.find(ids[i], ids[right[i]]).rank : UINT32_MAX; };
        auto later = [](uint64_t a, uint64_t b) { return a > b; };
        queue.clear();
        for (uint32_t i = 0; i + 1 < end; i++)
            if (uint32_t rank = rank_at(i); rank != UINT32_MAX) queue.push_back((uint64_t)rank << 32 | i);
        std::make_heap(queue.begin(), queue.end(), later);
        auto push = [&](uint32_t i) {
            uint32_t rank = rank_at(i);
            if (rank == UINT32_MAX) return;
            queue.push_back((uint64_t)rank << 32 | i);
            std::push_heap(queue.begin(), queue.end(), later);
        };
        while (!queue.empty()) {
            std::pop_heap(queue.begin(), queue.end(), later);
            uint32_t i = (uint32_t)queue.back(), rank = (uint32_t)(queue.back() >> 32);
            queue.pop_back();
            if (ids[i] == gone || rank_at(i) != rank) continue;
            uint32_t j = right[i];
            ids[i] = bpe.merges[rank].id;
            ids[j] = gone;
            right[i] = right[j];
            if (right[i] < end) left[right[i]] = i;
            if (i > 0) push(left[i]);
            push(i);
        }
        return (size_t)(std::remove(ids, ids + n, gone) - ids);
    }
};
