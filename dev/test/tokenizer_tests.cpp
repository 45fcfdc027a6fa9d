// Tests of the tokenizers: GPT-2's byte-pair encoding, training one, and corpora in blocks.
//
//     tokenizer_tests [--list-test-cases] [--test-case=PATTERN]
//
// Where the code is fast, a slow and plain version stands here, which shares nothing with it. What needs GPT-2's vocabulary looks for it in
// ../shared/data/gpt2, or in $GPT2_VOCABULARY; a vocabulary of our own, trained here, serves everywhere else.
#define DOCTEST_CONFIG_IMPLEMENT_WITH_MAIN
#define DOCTEST_CONFIG_SUPER_FAST_ASSERTS  // fast to compile
#include <doctest/doctest.h>

#include <cstdlib>
#include <ctime>
#include <filesystem>
#include <fstream>
#include <map>
#include <random>

#include "dev/test/testing.h"
#include "gpt2/bpe_train.h"
#include "gpt2/corpus.h"
#include "gpt2/files.h"
#include "gpt2/tokenizer.h"

// ---------------------------------------------------------------------------------------------------------------------------------------------------------
// Tools

using Ids = std::vector<uint32_t>;
using Random = std::mt19937_64;

static size_t below(Random& random, size_t n) { return (size_t)(random() % n); }

static const TemporaryDirectory directory;

// Pieces that splitting treats apart, and bytes that are no characters.
static const std::vector<std::string> pieces = {"a",
                                                "b",
                                                "ab",
                                                "E",
                                                "s",
                                                "t",
                                                "re",
                                                "ll",
                                                "'",
                                                "'s",
                                                "'ve",
                                                "0",
                                                "7",
                                                " ",
                                                " ",
                                                "  ",
                                                "\n",
                                                "\t",
                                                "\r\n",
                                                "!",
                                                "--",
                                                ".",
                                                "\xc3\xa9",
                                                "\xce\xbb",
                                                "\xc2\xa0",
                                                "\xe3\x80\x80",
                                                "\xe4\xb8\xad",
                                                "\xc2\xbd",
                                                "\x1c",
                                                "\x7f",
                                                "\xe2\x80\x99",
                                                "\xcc\x81",
                                                "\xf0\x9f\x98\x80",
                                                "\xff",
                                                "\xe4\xb8",
                                                "\x80",
                                                "\xed\xa0\x80",
                                                "\xc0\xaf"};
static std::string random_text(Random& random, size_t most) {
    std::string s;
    for (size_t n = below(random, most + 1); n > 0; n--) s += pieces[below(random, pieces.size())];
    return s;
}
static std::string random_bytes(Random& random, size_t n) {
    std::string s(n, '\0');
    for (char& c : s) c = (char)random();
    return s;
}

static std::vector<std::string> words_of(std::string_view text, bool by_hand = true) {
    std::vector<std::string> words;
    WordSplitter(by_hand).split(text, [&](size_t begin, size_t end) { words.emplace_back(text.substr(begin, end - begin)); });
    return words;
}

// The merging that GPT-2's own program does, word for word: look for the pair that comes first in the list, merge it wherever it stands, and again.
static Ids plain_merge(const Bpe& bpe, const std::string& word) {
    std::map<std::pair<uint32_t, uint32_t>, size_t> ranks;
    for (size_t r = 0; r < bpe.merges.size(); r++) ranks[{bpe.merges[r].left, bpe.merges[r].right}] = r;
    Ids ids;
    for (char c : word) ids.push_back(bpe.byte_id[(uint8_t)c]);
    while (true) {
        size_t best = SIZE_MAX;
        for (size_t i = 0; i + 1 < ids.size(); i++)
            if (auto found = ranks.find({ids[i], ids[i + 1]}); found != ranks.end()) best = std::min(best, found->second);
        if (best == SIZE_MAX) return ids;
        Ids merged;
        for (size_t i = 0; i < ids.size(); i++) {
            bool pair = i + 1 < ids.size() && ids[i] == bpe.merges[best].left && ids[i + 1] == bpe.merges[best].right;
            merged.push_back(pair ? bpe.merges[best].id : ids[i]);
            i += pair;
        }
        ids = merged;
    }
}

static Ids encode(const Bpe& bpe, std::string_view text) {
    Ids ids;
    BpeEncoder(bpe, 6).encode(text, ids);
    return ids;
}
static std::string decode(const Bpe& bpe, const Ids& ids) {
    std::string text;
    for (uint32_t id : ids) text += bpe.tokens[id];
    return text;
}

// A vocabulary of our own, as two files.
struct Files {
    std::string json, merges;
};
static Files train(const std::string& text, size_t vocab_size) {
    WordCounts counts;
    counts.add_corpus(text);
    BpeTrainer trainer(counts);
    while (trainer.merges.size() + 257 < vocab_size && trainer.step()) {
    }
    Files f;
    trainer.write(f.json, f.merges);
    return f;
}
static Bpe parse(const Files& f) {
    Bpe bpe;
    std::string error;
    bool good = parse_bpe(f.json, f.merges, bpe, error);
    REQUIRE_MESSAGE(good, error);
    return bpe;
}
static std::string corpus() {
    Random random(1);
    std::string s;
    const char* words[] = {
        "the", "there", "then", "other", "mother", "aaaaaaa", "banana", "nana", "it's", "\xc3\xa9t\xc3\xa9", "12", "1234", "----", "\xe4\xb8\xad\xe6\x96\x87"};
    for (int i = 0; i < 3000; i++) s += (i % 7 ? " " : "\n  ") + std::string(words[std::min(below(random, 14), below(random, 14))]);
    for (int i = 0; i < 300; i++) s += random_text(random, 12);
    return s;
}
static const Bpe& own() {
    static const Bpe bpe = parse(train(corpus(), 500));
    return bpe;
}

// GPT-2's; null, and said so, where it is not.
static std::shared_ptr<const Bpe> gpt2() {
    const char* given = getenv("GPT2_VOCABULARY");
    std::string path = given ? given : "../shared/data/gpt2";
    if (std::filesystem::exists(path + "/vocab.bpe")) return load_bpe(path);
    printf("skipped: a test that needs GPT-2's encoder.json and vocab.bpe, which are not in %s\n", path.c_str());
    return nullptr;
}

// ---------------------------------------------------------------------------------------------------------------------------------------------------------
// Characters and words

TEST_CASE("characters: UTF-8, every first and second byte") {
    for (int a = 0; a < 256; a++)
        for (int b = 0; b < 256; b++)
            for (uint8_t last : {0x7f, 0x80, 0xbf, 0xc0}) {
                uint8_t s[4] = {(uint8_t)a, (uint8_t)b, last, last};
                bool second = b >= 0x80 && b < 0xc0, others = last >= 0x80 && last < 0xc0;
                uint32_t two = (uint32_t)(a & 31) << 6 | (b & 63), three = (uint32_t)(a & 15) << 12 | (b & 63) << 6,
                         four = (uint32_t)(a & 7) << 18 | (b & 63) << 12;
                size_t expected = 0;
                if (a < 0x80) expected = 1;
                if (a >= 0xc0 && a < 0xe0 && second && two >= 0x80) expected = 2;
                if (a >= 0xe0 && a < 0xf0 && second && others && three >= 0x800 && !(three >= 0xd800 && three < 0xe000)) expected = 3;
                if (a >= 0xf0 && a < 0xf8 && second && others && four >= 0x10000 && four < 0x110000) expected = 4;
                REQUIRE(utf8_length(s, s + 4) == expected);
                for (size_t n = 1; n < expected; n++) REQUIRE(utf8_length(s, s + n) == 0);
            }
    CHECK(valid_utf8("") == 0);
    CHECK(valid_utf8("0123456789\xc3\xa9") == 12);
    CHECK(valid_utf8("01234567\xc3") == 8);
    CHECK(valid_utf8("012345678901234\xff"
                     "5") == 15);
}

TEST_CASE("characters: bytes are seen as GPT-2 shows them") {
    const ByteCharacters& c = byte_characters();
    CHECK(c.shown(" ") == "\xc4\xa0");
    CHECK(c.shown("\n") == "\xc4\x8a");
    CHECK(c.shown(std::string(1, '\0')) == "\xc4\x80");
    CHECK(c.shown("a~\xa1\xff") == "a~\xc2\xa1\xc3\xbf");
    CHECK(c.shown("\x7f\xa0\xad") == "\xc4\xa1\xc5\x82\xc5\x83");
    CHECK(c.order[0] == '!');
    CHECK(c.order[188] == 0);
    CHECK(c.order[255] == 0xad);
    std::string all, back;
    for (int b = 0; b < 256; b++) all += (char)b;
    CHECK(c.bytes(c.shown(all), back));
    CHECK(back == all);
    for (const char* none : {" ", "\xc5\x84", "\xc2\xad", "\xff", "\xe4\xb8\xad", "\xc2"}) CHECK(!c.bytes(none, back));
}

TEST_CASE("words: where they end") {
    auto shown = [](const std::string& text) {
        std::string s;
        for (const std::string& w : words_of(text)) s += (s.empty() ? "" : "|") + w;
        return s;
    };
    CHECK(shown("Hello world") == "Hello| world");
    CHECK(shown("it's we'll I'VE 'tis") == "it|'s| we|'ll| I|'|VE| '|tis");
    CHECK(shown("'sa'res''s 's") == "'s|a|'re|s|''|s| '|s");
    CHECK(shown("a  b   c\n\nd \n") == "a| | b|  | c|\n|\n|d| \n");
    CHECK(shown("x1y 22,3.5 ?!a") == "x|1|y| 22|,|3|.|5| ?!|a");
    CHECK(shown("\xc3\xa9t\xc3\xa9 \xc2\xbd\xe2\x85\xa7") == "\xc3\xa9t\xc3\xa9| \xc2\xbd\xe2\x85\xa7");
    CHECK(shown("a\xe3\x80\x80\xe3\x80\x80"
                "b") == "a|\xe3\x80\x80|\xe3\x80\x80|b");
    CHECK(shown("a\x1c"
                "b \xe1\xa0\x8e"
                "c") == "a|\x1c|b| \xe1\xa0\x8e|c");  // neither U+001C nor U+180E is white space
    CHECK(shown("a\xc2\x85"
                "b") == "a|\xc2\x85|b");
    CHECK(shown("ab\xff"
                "cd \xc3 \xe4\xb8") == "ab|\xff|cd| |\xc3| |\xe4|\xb8");  // what stands before a byte that is no character ends there
}

TEST_CASE("words: by hand as PCRE2 finds them") {
    std::vector<std::string> some = {"a", "s", "'", "re", "ll", "0", " ", "\n", "!", "\xc3\xa9", "\xe3\x80\x80", "\xff"};
    size_t texts = 1, checked = 0;
    for (int length = 1; length <= 4; length++) texts *= some.size();
    for (size_t t = 0; t < texts; t++) {
        std::string text;
        for (size_t rest = t, i = 0; i < 4; i++, rest /= some.size()) text += some[rest % some.size()];
        checked += words_of(text, true) == words_of(text, false);
    }
    CHECK(checked == texts);
    for (int a = 0; a < 128; a++)
        for (int b = 0; b < 128; b++) {
            std::string text = {'x', '\'', (char)a, (char)b};
            REQUIRE_MESSAGE(words_of(text, true) == words_of(text, false), text);
        }
    Random random(2);
    for (int i = 0; i < 5000; i++) {
        std::string text = i % 2 ? random_text(random, 40) : random_bytes(random, below(random, 60));
        REQUIRE(words_of(text, true) == words_of(text, false));
    }
}

// ---------------------------------------------------------------------------------------------------------------------------------------------------------
// Encoding

TEST_CASE("encoding: any bytes come back") {
    Random random(3);
    for (int i = 0; i < 4000; i++) {
        std::string text = i % 2 ? random_text(random, 60) : random_bytes(random, below(random, 200));
        Ids ids = encode(own(), text);
        REQUIRE(decode(own(), ids) == text);
        for (uint32_t id : ids) REQUIRE(id != own().end_of_text);
    }
    CHECK(encode(own(), "").empty());
    CHECK(decode(own(), encode(own(), "<|endoftext|>")) == "<|endoftext|>");
    // Bytes that are no characters are tokens of their own, and their neighbours do not see each other.
    CHECK(encode(own(), "the\xe4\xb8the").size() == 2 * encode(own(), "the").size() + 2);
}

TEST_CASE("encoding: merges as the plain loop does, short words and long") {
    Random random(4);
    BpeEncoder again(own(), 4);  // sixteen words are remembered: most are forgotten, some not
    for (int i = 0; i < 3000; i++) {
        std::string word;
        size_t length = 1 + below(random, i % 10 == 0 ? 150 : 30), letters = 1 + below(random, 5);
        while (word.size() < length) word += "anbet"[below(random, letters)];
        Ids ids, expected = plain_merge(own(), word);
        again.encode(word, ids);
        REQUIRE_MESSAGE(ids == expected, word);
        ids.clear();
        again.encode(word, ids);
        REQUIRE_MESSAGE(ids == expected, word);
        ids = {7};  // encode() appends; and the text may end where the memory does
        std::vector<char> exact(word.begin(), word.end());
        again.encode({exact.data(), exact.size()}, ids);
        REQUIRE(ids.front() == 7);
        REQUIRE(Ids(ids.begin() + 1, ids.end()) == expected);
    }
    for (size_t n : {16, 17, 63, 64, 65, 66, 127}) CHECK(encode(own(), std::string(n, 'a')) == plain_merge(own(), std::string(n, 'a')));
}

TEST_CASE("encoding: GPT-2's vocabulary, as tiktoken does") {
    auto bpe = gpt2();
    if (!bpe) return;
    CHECK(bpe->tokens.size() == 50257);
    CHECK(bpe->merges.size() == 50000);
    CHECK(bpe->end_of_text == 50256);
    for (size_t r = 0; r < bpe->merges.size(); r++) REQUIRE(bpe->merges[r].id == 256 + r);
    for (int i = 0; i < 256; i++) REQUIRE(bpe->byte_id[byte_characters().order[i]] == (uint32_t)i);
    CHECK(encode(*bpe, "Hello world") == Ids{15496, 995});
    MappedFile sample("dev/test/data/gpt2_tokens.jsonl");
    BpeEncoder encoder(*bpe, 10);
    int strings = 0;
    each_line(sample, [&](std::string_view line, const std::string& where) {
        nlohmann::json j = nlohmann::json::parse(line);
        Ids ids;
        encoder.encode(j["text"].get<std::string>(), ids);
        REQUIRE_MESSAGE(ids == j["ids"].get<Ids>(), where);
        strings++;
    });
    CHECK(strings == 2500);
}

TEST_CASE("encoding: a megabyte of one word") {
    // Right, and not quadratic: that would take hours here. Seconds depend on the machine, and are no check (dev/LOG.md has them).
    auto vocabulary = gpt2();
    for (const Bpe* bpe : {&own(), vocabulary.get()}) {
        if (!bpe) continue;
        for (const char* piece : {"a", " ", "ab", "\xe3\x80\x80", "\xff"}) {
            std::string text;
            while (text.size() < 1 << 20) text += piece;
            CHECK(decode(*bpe, encode(*bpe, text)) == text);
        }
    }
}

// ---------------------------------------------------------------------------------------------------------------------------------------------------------
// The two files

TEST_CASE("vocabulary: what is refused") {
    const Files good = train("abab abab abab", 260);
    CHECK(good.merges == "#version: 0.2\na b\nab ab\n\xc4\xa0 abab\n");
    auto refused = [&](Files f, std::vector<std::string> parts) {
        Bpe bpe;
        std::string error;
        CHECK(!parse_bpe(f.json, f.merges, bpe, error));
        for (const std::string& part : parts) CHECK_MESSAGE(error.find(part) != std::string::npos, "'" << part << "' is not in: " << error);
    };
    auto json = [&](const std::string& from, const std::string& to) {
        Files f = good;
        size_t at = f.json.find(from);
        REQUIRE(at != std::string::npos);
        f.json.replace(at, from.size(), to);
        return f;
    };
    auto merges = [&](const std::string& text) { return Files{good.json, text}; };
    parse(good);
    parse(merges("a b\nab ab"));  // without a version, without an end
    parse(merges(""));            // then its tokens are special, and no text yields them
    refused({"", good.merges}, {"encoder.json", "JSON"});
    refused({"{", good.merges}, {"encoder.json", "JSON"});
    refused({"[]", good.merges}, {"an array"});
    refused({"{}", good.merges}, {"byte 0x00"});
    refused(json("{", "{\"x\": {}, "), {"an object"});
    refused(json("\"a\": ", "\"a\": -"), {"negative"});
    refused(json("\"a\": 64", "\"a\": 64.5"), {"fraction"});
    refused(json("\"a\": 64", "\"a\": \"64\""), {"a string"});
    refused(json("\"a\": 64", "\"a\": 65"), {"the id 65"});
    refused(json("\"a\": 64", "\"a\": 260"), {"260"});
    refused(json("\"a\": 64", "\"a\": 4294967296"), {"4294967296", "2^24"});
    refused(json("\"a\": 64", "\"a\": 99999999999999999999"), {"fraction"});
    refused(json("\"a\": 64", "\"a\": 64, \"a\": 64"), {"'a'", "twice"});
    refused(json("\"a\": 64", "\"aaa\": 64"), {"byte 0x61"});
    refused(json("<|endoftext|>", "<|end|>"), {"<|endoftext|>"});
    refused({good.json + "x", good.merges}, {"JSON"});
    for (const char* line : {"a", "a ", " b", "a  b", "a b c", ""}) refused(merges(std::string("a b\n") + line + "\n"), {"line 2", "two tokens"});
    refused(merges("a b\nab q\n"), {"line 2", "abq"});
    refused(merges("a b\nabab a\n"), {"line 2", "'abab'", "neither a byte nor"});
    refused(merges("a b\na abab\n"), {"line 2", "'abab'", "neither a byte nor"});
    refused(merges("a b\na b\n"), {"line 2", "'ab'", "made by a line above"});
    refused(merges("a b\n#version: 0.2\n"), {"line 2"});
    refused({json("\"\\u0120abab\"", "\"xyz\"").json, good.merges}, {"no id"});
    Files spelt = train("", 257);  // merges that make the end of a text, one character at a time
    std::string end(document_separator);
    size_t at = spelt.json.rfind("\"" + end);
    spelt.json.resize(at);
    for (size_t n = 2; n <= end.size(); n++) {
        spelt.json += "\"" + end.substr(0, n) + "\": " + std::to_string(254 + n) + (n < end.size() ? ", " : "}");
        spelt.merges += end.substr(0, n - 1) + " " + end[n - 1] + "\n";
    }
    refused(spelt, {"line 13", "must not become"});
}

TEST_CASE("vocabulary: identity") {
    const Files files = train(corpus(), 300);
    const Bpe bpe = parse(files);
    std::string spaced = files.json;
    for (size_t i = 0; (i = spaced.find(", \"", i)) != std::string::npos; i += 3) spaced.replace(i, 2, ",\n");
    CHECK(parse({spaced, files.merges.substr(files.merges.find('\n') + 1)}).checksum() == bpe.checksum());  // laid out differently
    CHECK(parse(train(corpus(), 301)).checksum() != bpe.checksum());
    Files two = train("abab cdcd", 259), exchanged = two;  // a b, c d: in the other order
    CHECK(two.merges == "#version: 0.2\na b\nc d\n");
    exchanged.merges = "#version: 0.2\nc d\na b\n";
    CHECK(parse(exchanged).checksum() != parse(two).checksum());

    std::string path = directory / "vocabulary";
    std::filesystem::create_directory(path);
    write_file(path + "/encoder.json", files.json);
    check_error(EXIT_DATA, {"vocab.bpe"}, [&] { make_tokenizer(path); });
    write_file(path + "/vocab.bpe", "a\n");
    check_error(EXIT_DATA, {path, "line 1"}, [&] { make_tokenizer(path); });
    write_file(path + "/vocab.bpe", files.merges);
    Tokenizer t = make_tokenizer(path);
    CHECK(t.text);
    CHECK(t.vocab_size == 300);
    CHECK(t.end_of_text == 299);
    CHECK(t.decode(299) == "<|endoftext|>");
    CHECK(t.identity() == nlohmann::json({{"name", "bpe"}, {"vocab_size", 300}, {"end_of_text", 299}, {"checksum", bpe.checksum()}}));
    std::string text;
    for (int id : t.encode("the other <|endoftext|>")) text += t.decode(id);
    CHECK(text == "the other <|endoftext|>");
    check_error(EXIT_USAGE, {"'gone'", "bytes", "ids", "vocab.bpe"}, [] { make_tokenizer("gone"); });
}

// ---------------------------------------------------------------------------------------------------------------------------------------------------------
// Training

// Counts all pairs again for every merge, in words of strings.
static std::string plain_training(const std::string& text, size_t vocab_size) {
    std::map<std::string, int64_t> counts;
    for (const std::string& w : words_of(text)) counts[w]++;
    std::vector<std::string> tokens;
    for (uint8_t b : byte_characters().order) tokens.push_back(std::string(1, (char)b));
    std::map<std::string, size_t> ids;
    for (size_t i = 0; i < tokens.size(); i++) ids[tokens[i]] = i;
    std::vector<std::pair<std::vector<size_t>, int64_t>> words;
    for (const auto& [word, count] : counts) {
        words.push_back({{}, count});
        for (char c : word) words.back().first.push_back(ids[std::string(1, c)]);
    }
    std::string merges = "#version: 0.2\n";
    while (tokens.size() + 1 < vocab_size) {
        std::map<std::pair<size_t, size_t>, int64_t> pairs;
        for (const auto& [word, count] : words)
            for (size_t i = 0; i + 1 < word.size(); i++) pairs[{word[i], word[i + 1]}] += count;
        std::pair<size_t, size_t> best;
        int64_t most = 1;
        for (const auto& [pair, count] : pairs)
            if (count > most) {
                most = count;
                best = pair;
            }
        if (most < 2) break;
        for (auto& [word, count] : words)
            for (size_t i = 0; i + 1 < word.size(); i++)
                if (word[i] == best.first && word[i + 1] == best.second) {
                    word[i] = tokens.size();
                    word.erase(word.begin() + (long)i + 1);
                }
        merges += byte_characters().shown(tokens[best.first]) + " " + byte_characters().shown(tokens[best.second]) + "\n";
        tokens.push_back(tokens[best.first] + tokens[best.second]);
    }
    return merges;
}

TEST_CASE("training: as counting everything again for each merge does") {
    Random random(5);
    for (int i = 0; i < 60; i++) {
        std::string text;
        size_t letters = 1 + below(random, 4);
        for (size_t n = below(random, 400); n > 0; n--) text += below(random, 8) ? std::string(1, "abc "[below(random, letters)]) : random_text(random, 2);
        Files f = train(text, 300);
        REQUIRE_MESSAGE(f.merges == plain_training(text, 300), text);
        Bpe bpe = parse(f);
        REQUIRE(bpe.end_of_text + 1 == bpe.tokens.size());
        // What was merged in training is merged in encoding: every token of the vocabulary is its own encoding.
        for (const Merge& m : bpe.merges) REQUIRE(plain_merge(bpe, bpe.tokens[m.id]) == Ids{m.id});
    }
    CHECK(train(corpus(), 400).merges == plain_training(corpus(), 400));
    CHECK(train("", 300).merges == "#version: 0.2\n");
    CHECK(train("abcdefg", 300).merges == "#version: 0.2\n");
}

TEST_CASE("training: separators are no text, and the order of words plays no part") {
    CHECK(train("abab<|endoftext|>\nabab", 300).merges == train("abab!abab", 300).merges);
    WordCounts a, b;
    a.add("one two three two");
    b.add(" two three");
    b.add("one");
    b.add(" two");
    a.take(b);
    CHECK(a.words.at(" two") == 4);
    CHECK(a.words.at("one") == 2);
    CHECK(b.words.empty());
    WordCounts documents;
    documents.add_corpus("a<|endoftext|>\nb<|endoftext|>a\n");
    CHECK(documents.words == std::unordered_map<std::string, int64_t>{{"a", 2}, {"b", 1}, {"\n", 1}});
}

// ---------------------------------------------------------------------------------------------------------------------------------------------------------
// Corpora in blocks

static Ids encode_in_blocks(const Tokenizer& tokenizer, const std::string& path, BlockOptions o) {
    o.words = tokenizer.bpe != nullptr;
    TextBlocks text(path, o);
    Ids all;
    CorpusEncoder encoder(tokenizer, 4);
    bool within = false;
    while (true) {
        std::vector<EncodedPart> parts;
        for (std::string_view block : text.next()) {
            parts.emplace_back();
            if (o.documents)
                encoder.encode(block, parts.back());
            else
                encoder.encode_text(block, parts.back().tokens);
        }
        if (parts.empty()) return all;
        for (const EncodedPart& p : parts) {
            all.insert(all.end(), p.tokens.begin() + (o.documents && within && p.begins_within), p.tokens.end());
            within = p.ends_within;
        }
    }
}

TEST_CASE("blocks: wherever a text is cut, the tokens are the same") {
    Random random(6);
    Tokenizer bpe = make_tokenizer(std::make_shared<const Bpe>(own())), bytes = make_tokenizer("bytes");
    std::vector<std::string> kinds[] = {pieces,
                                        {"\xe4\xb8\xad", "\xe6\x96\x87", "\xe3\x80\x82", "a", "'", "s"},  // no white space
                                        {" ", "\n", "\xe3\x80\x80", "  ", "a"},                           // much of it
                                        {"a", "b", "the", "\xff"},                                        // hardly any boundary
                                        {"<|endoftext|>", "<|endoftext|>\n", "<|endo", "ftext|>", "\n", " ", "a'", "s", "\xc3\xa9"}};
    for (int i = 0; i < 1500; i++) {
        const auto& kind = kinds[below(random, 5)];
        std::string text;
        for (size_t n = below(random, 120); n > 0; n--) text += below(random, 30) ? kind[below(random, kind.size())] : std::string("<|endoftext|>\n");
        std::ofstream(directory / "text", std::ios::binary) << text;
        BlockOptions o;
        o.block = 1 + below(random, 50);
        o.round = 1 + below(random, 150);
        for (const Tokenizer* t : {&bpe, &bytes}) {
            o.documents = true;
            EncodedPart all;
            CorpusEncoder(*t, 4).encode(text, all);
            REQUIRE_MESSAGE(encode_in_blocks(*t, directory / "text", o) == all.tokens, text);
            o.documents = false;
            Ids whole;
            CorpusEncoder(*t, 4).encode_text(text, whole);
            REQUIRE_MESSAGE(encode_in_blocks(*t, directory / "text", o) == whole, text);
        }
    }
}

TEST_CASE("blocks: a text without end takes little memory") {
    std::string text;
    while (text.size() < 200000) text += "\xe4\xb8\xad\xe6\x96\x87\xe3\x80\x82";  // words of two characters, no white space
    write_file(directory / "text", text);
    BlockOptions o;
    o.block = 500;
    o.round = 4000;
    TextBlocks blocks(directory / "text", o);
    size_t bytes = 0, largest = 0;
    while (true) {
        auto& list = blocks.next();
        if (list.empty()) break;
        for (std::string_view b : list) {
            largest = std::max(largest, b.size());
            bytes += b.size();
        }
    }
    CHECK(bytes == text.size());
    CHECK(blocks.bytes_read == text.size());
    CHECK(blocks.size == text.size());
    CHECK(largest <= o.round);
    check_error(EXIT_DATA, {"gone"}, [] { TextBlocks("gone", BlockOptions()); });
    check_error(EXIT_DATA, {directory.path}, [] { TextBlocks(directory.path, BlockOptions()).next(); });
}

TEST_CASE("corpora: documents") {
    Tokenizer t = make_tokenizer(std::make_shared<const Bpe>(own()));
    auto shown = [&](const std::string& text) {
        std::string s;
        for (uint32_t id : t.encode_corpus(text)) s += (int)id == t.end_of_text ? "#" : t.decode((int)id);
        return s;
    };
    CHECK(shown("") == "");
    CHECK(shown("one\n<|endoftext|>\n\ntwo\n") == "#one\n#\ntwo\n");
    CHECK(shown("<|endoftext|><|endoftext|>\none<|endoftext|>") == "#one");
    CHECK(shown("a<|endoftext|b") == "#a<|endoftext|b");
}

TEST_CASE("corpora: many short documents") {
    Tokenizer t = make_tokenizer(std::make_shared<const Bpe>(own()));
    std::string text;
    for (int i = 0; i < 200000; i++) text += "the<|endoftext|>\n";
    CHECK(t.encode_corpus(text).size() == 200000 * (1 + encode(own(), "the").size()));
}
