// Vocabularies and texts: encoder.json, a zero byte, vocab.bpe, a zero byte, a text. What parse_bpe takes encodes the text, and a small vocabulary of our own
// does, too: decoding gives the text back, no token is the end of a text, and PCRE2 alone splits it into the same words.
#include <cstdlib>
#include <cstring>

#include "gpt2/bpe_train.h"

static void require(bool condition) {
    if (!condition) abort();
}

static void round_trip(const Bpe& bpe, std::string_view text) {
    std::vector<uint32_t> ids;
    BpeEncoder(bpe, 4).encode(text, ids);
    std::string decoded;
    for (uint32_t id : ids) {
        require(id < bpe.tokens.size() && id != bpe.end_of_text);
        decoded += bpe.tokens[id];
    }
    require(decoded == text);
}

static Bpe small_vocabulary() {
    WordCounts counts;
    counts.add("the theme of the thesis: aaaa aaaaaaa  \xc3\xa9\xc3\xa9 the the \xff\xff");
    BpeTrainer trainer(counts);
    while (trainer.step()) {
    }
    std::string json, list, error;
    trainer.write(json, list);
    Bpe bpe;
    require(parse_bpe(json, list, bpe, error));
    return bpe;
}

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
    std::string_view input((const char*)data, size), parts[3];
    for (int i = 0; i < 3; i++) {
        size_t end = i < 2 ? std::min(input.find('\0'), input.size()) : input.size();
        parts[i] = input.substr(0, end);
        input.remove_prefix(std::min(end + 1, input.size()));
    }
    Bpe bpe;
    std::string error;
    if (parse_bpe(parts[0], parts[1], bpe, error)) {
        require(error.empty());
        for (const Merge& m : bpe.merges) require(bpe.tokens[m.id] == bpe.tokens[m.left] + bpe.tokens[m.right]);
        round_trip(bpe, parts[2]);
    } else {
        require(!error.empty());
    }
    static const Bpe small = small_vocabulary();
    round_trip(small, parts[2]);

    std::vector<size_t> words, expected;
    WordSplitter(true).split(parts[2], [&](size_t, size_t end) { words.push_back(end); });
    WordSplitter(false).split(parts[2], [&](size_t, size_t end) { expected.push_back(end); });
    require(words == expected);
    return 0;
}
