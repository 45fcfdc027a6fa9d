// Tests of what stands between files and a model: shards of any size, windows and carried memory of the loss, multiple choice.
// The model is one whose losses depend on every token that a sequence has had, and on nothing else: a window that is one token off is seen.
#define DOCTEST_CONFIG_IMPLEMENT_WITH_MAIN
#define DOCTEST_CONFIG_SUPER_FAST_ASSERTS  // fast to compile
#include <doctest/doctest.h>

#include <cmath>
#include <cstring>

#include "attention.h"
#include "dev/test/idle_trainer.h"
#include "dev/test/testing.h"
#include "gpt2/choices.h"
#include "gpt2/dataloader.h"
#include "gpt2/evaluate.h"
#include "gpt2/shards.h"

bool trainer_on_gpu() { return false; }

static const TemporaryDirectory directory;

// ----------------------------------------------------------------------------
// Shards

static std::string llmc_shard(int32_t magic, int32_t version, int32_t count, const std::string& tokens) {
    std::vector<int32_t> header(256);
    header[0] = magic;
    header[1] = version;
    header[2] = count;
    return bytes_of(header) + tokens;
}

TEST_CASE("written shards are llm.c's, byte for byte") {
    std::vector<uint32_t> tokens;
    for (uint32_t i = 0; i < 200001; i++) tokens.push_back(i * 40503u % 50257);
    std::string narrow = directory / "narrow.bin", wide = directory / "wide.bin";
    for (size_t piece : {(size_t)1000, tokens.size()}) {
        ShardWriter a(narrow, 2), b(wide, 4);
        for (size_t i = 0; i < tokens.size(); i += piece) {
            a.write(&tokens[i], std::min(piece, tokens.size() - i));
            b.write(&tokens[i], std::min(piece, tokens.size() - i));
        }
        CHECK(a.tokens() == (int64_t)tokens.size());
        a.close();
        b.close();
        CHECK(contents(narrow) == llmc_shard(20240520, 1, 200001, bytes_of(std::vector<uint16_t>(tokens.begin(), tokens.end()))));
        CHECK(contents(wide) == llmc_shard(20240801, 7, 200001, bytes_of(tokens)));
    }
    for (const std::string& path : {narrow, wide}) {
        Shard s = open_shard(std::make_shared<MappedFile>(path));
        bool same = s.count == (int64_t)tokens.size();
        for (int64_t i = 0; same && i < s.count; i++) same = s[i] == tokens[i];
        CHECK(same);
    }
}

TEST_CASE("a shard is there whole or not at all") {
    std::string path = directory / "half.bin";
    uint32_t tokens[] = {1, 2, 65536};
    auto nothing_new = [&] { return !std::filesystem::exists(path + ".tmp") && (!std::filesystem::exists(path) || contents(path) == "before"); };
    for (bool before : {false, true}) {
        if (before) std::ofstream(path) << "before";
        { ShardWriter(path, 2).write(tokens, 2); }
        CHECK(nothing_new());
        check_error(EXIT_DATA, {"token 65536", "16 bits", "half.bin"}, [&] { ShardWriter(path, 2).write(tokens, 3); });
        check_error(EXIT_DATA, {"no tokens", "half.bin"}, [&] { ShardWriter(path, 4).close(); });
        CHECK(nothing_new());
    }
    {
        ShardWriter writer(path, 2);
        writer.write(tokens, 2);
        std::string unfinished = contents(path + ".tmp");
        CHECK(!is_shard((const uint8_t*)unfinished.data(), unfinished.size()));
        writer.close();
    }
    CHECK(contents(path).size() == 1024 + 4);
    check_error(EXIT_DATA, {"/gone/x.bin", "cannot create"}, [&] { ShardWriter(directory / "gone/x.bin", 2); });
}

TEST_CASE("headers of any number of tokens") {
    ShardHeader h;
    std::string error;
    for (int width : {2, 4})
        for (int64_t count :
             {(int64_t)1, ((int64_t)1 << 31) - 1, (int64_t)1 << 31, ((int64_t)1 << 32) - 1, (int64_t)1 << 32, ((int64_t)1 << 32) + 5, (int64_t)1 << 50}) {
            std::vector<int32_t> header = shard_header(width, count);
            const uint8_t* bytes = (const uint8_t*)header.data();
            uint64_t size = 1024 + (uint64_t)count * width;
            CHECK(parse_shard(bytes, size, h, error));
            CHECK(h.count == count);
            CHECK(h.width == width);
            for (int64_t wrong : {(int64_t)-width, (int64_t)-1, (int64_t)1, (int64_t)width, (int64_t)width << 32})
                CHECK(!parse_shard(bytes, size + wrong, h, error));
            // llm.c takes word 2 for the number: it must find a contradiction where that is not enough.
            if (count > INT32_MAX) CHECK(1024 + (int64_t)header[2] * width != (int64_t)size);
        }
    std::vector<int32_t> header = shard_header(4, 1);
    for (uint64_t count : {UINT64_MAX, (uint64_t)1 << 63, (uint64_t)1 << 62, UINT64_MAX / 4 - 100}) {
        memcpy(&header[2], &count, 8);
        for (uint64_t size : {(uint64_t)1024, 1024 + count * 4, UINT64_MAX}) CHECK(!parse_shard((const uint8_t*)header.data(), size, h, error));
    }
}

// A file of `count` tokens that takes hardly any room: zeros, and `last` at its end.
static std::string sparse_shard(const std::string& name, int width, int64_t count, const std::vector<uint32_t>& last) {
    std::string path = directory / name;
    std::ofstream f(path, std::ios::binary);
    f << bytes_of(shard_header(width, count));
    f.seekp(1024 + (count - (int64_t)last.size()) * width);
    f << (width == 4 ? bytes_of(last) : bytes_of(std::vector<uint16_t>(last.begin(), last.end())));
    return path;
}
static int64_t memory_in_use() {
    int64_t pages = 0;
    std::ifstream("/proc/self/statm") >> pages >> pages;
    return pages * 4096;
}

TEST_CASE("shards beyond 2 GiB and datasets beyond 2^32 tokens: opened, read and shuffled without reading them") {
    const int64_t big = ((int64_t)1 << 32) + 1000, wide = ((int64_t)1 << 31) + 77;
    sparse_shard("big_a.bin", 2, big, {11, 12, 13, 14, 15});
    sparse_shard("big_b.bin", 4, wide, {100000, 131071, 7, 4000000000u});
    Tokenizer ids = make_tokenizer("ids");
    int64_t before = memory_in_use();
    Dataset d = open_dataset(directory / "big_[ab].bin", ids);
    REQUIRE(d.num_tokens == big + wide);
    CHECK(d[big - 5] == 11);
    CHECK(d[big] == 0);
    CHECK(d[big + wide - 4] == 100000);
    std::vector<int> row(7);
    d.read(big + wide - 4, 3, 131072, row.data());
    CHECK(row[0] == 100000);
    CHECK(row[1] == 131071);
    d.read(big - 5, 7, 131072, row.data());
    CHECK(row == std::vector<int>{11, 12, 13, 14, 15, 0, 0});
    check_error(EXIT_DATA, {"token 4000000000", "position 2147483724", "big_b.bin", "131072", "--tokenizer"},
                [&] { d.read(big + wide - 4, 4, 131072, row.data()); });

    LoaderOptions o;
    o.B = 64;
    o.T = 1;  // more windows than 2^32
    o.shuffle = true;
    o.vocab_size = 131072;
    o.end_of_text = -1;
    Dataset whole = d.slice(0, d.num_tokens - 1, "without the last token");
    DataLoader loader(whole, o);
    CHECK(loader.batches_per_epoch() == (big - 1 + wide - 2) / 64);
    Batch batch;
    for (int64_t n : {(int64_t)0, loader.batches_per_epoch() - 1, 3 * loader.batches_per_epoch() + 5}) loader.fill(n, batch);
    o.shuffle = false;
    DataLoader(whole, o).fill(loader.batches_per_epoch() - 1, batch);
    o.carry_memory = true;
    DataLoader(whole, o).fill(loader.batches_per_epoch() / 2, batch);
    Dataset train, val;
    split_dataset(d, train, val);
    CHECK(train.num_tokens + val.num_tokens == d.num_tokens);
    CHECK(val[val.num_tokens - 2] == 7);
    CHECK(memory_in_use() - before < 64 << 20);

    // Numbers beyond 2^32 are permuted, too, and reach everywhere.
    int64_t windows = big - 1 + wide - 2, high = 0;
    for (int64_t i = 0; i < 1000; i++) high += permute(windows - 1 - i, windows, 1, 0) > (int64_t)1 << 32;
    CHECK(std::fabs((double)high / 1000 - (double)(windows - ((int64_t)1 << 32)) / (double)windows) < 0.06);
    for (const char* name : {"big_a.bin", "big_b.bin"}) std::filesystem::remove(directory / name);
}

TEST_CASE("the bigram model does not read a terabyte") {
    std::string path = sparse_shard("bytes.bin", 2, (int64_t)1 << 33, {1});
    Dataset d = open_dataset(path, make_tokenizer("bytes"));
    CHECK(bigram_loss(d, d.slice(0, 1000, "beginning"), 257) < 1e-4);
    std::filesystem::remove(path);
}

TEST_CASE("lines of a file") {
    std::string path = directory / "lines";
    std::ofstream(path) << "one\n\n\nfour\r\nlast";
    std::vector<std::string> seen;
    each_line(MappedFile(path), [&](std::string_view line, const std::string& where) { seen.push_back(where + ": " + std::string(line)); });
    CHECK(seen == std::vector<std::string>{"line 1 of '" + path + "': one", "line 4 of '" + path + "': four\r", "line 5 of '" + path + "': last"});
}

// ----------------------------------------------------------------------------
// A model

static uint64_t after(uint64_t state, int token) {
    state = (state ^ (uint64_t)(token + 1)) * 0x9E3779B97F4A7C15u;
    return state ^ state >> 29;
}
static double loss_of(uint64_t state, int target) { return (double)(after(state, target) >> 40) * 0x1p-24 * 9; }

struct HashTrainer : IdleTrainer {
    uint64_t lane = 0;
    int64_t largest = 0, passes = 0;
    explicit HashTrainer(int max_seq = 64, int vocab_size = 257) {
        config.set_vocab(vocab_size);
        config.max_seq = max_seq;
    }
    double forward(const Batch& b, const Pass& pass, float* losses, float*) override {
        CHECK((!pass.training && b.cu_seqlens.back() == (int)b.tokens.size() && b.targets.size() == b.tokens.size()));
        largest = std::max(largest, (int64_t)b.tokens.size());
        passes++;
        double sum = 0;
        int64_t scored = 0;
        for (int s = 0; s < b.num_seqs(); s++) {
            CHECK(b.cu_seqlens[s + 1] - b.cu_seqlens[s] <= config.max_seq);
            CHECK(b.cu_seqlens[s + 1] > b.cu_seqlens[s]);
            uint64_t state = !b.memory_from.empty() && b.memory_from[s] == 0 ? lane : 0;
            for (int i = b.cu_seqlens[s]; i < b.cu_seqlens[s + 1]; i++) {
                state = after(state, b.tokens[i]);
                double loss = b.targets[i] < 0 ? 0 : loss_of(state, b.targets[i]);
                if (losses) losses[i] = (float)loss;
                sum += loss;
                scored += b.targets[i] >= 0;
            }
            if (!b.memory_to.empty() && b.memory_to[s] == 0) lane = state;
        }
        return sum / (double)scored;
    }
};

// ----------------------------------------------------------------------------
// Loss

static std::string words(int n) {
    std::string text;
    for (int i = 0; i < n; i++) text += i % 37 == 36 ? "\n<|endoftext|>\n" : format("w%d ", i * 7919 % 1000);
    return text;
}

TEST_CASE("a sliding window is a loop over the tokens, each with what its window has before it") {
    Tokenizer bytes = make_tokenizer("bytes");
    std::string text = words(200);
    for (int64_t length : {2, 63, 64, 65, 66, 200, 777}) {
        Dataset all = text_dataset("test", text, bytes), data = all.slice(0, length, "test");
        for (int64_t stride : {0, 1, 7, 32, 63, 64})
            for (int64_t rows : {1, 3, 100})
                for (bool mask : {false, true}) {
                    HashTrainer trainer;
                    const int64_t seq = 64, step = stride ? stride : seq;
                    double sum = 0;
                    int64_t text_bytes = 0;
                    for (int64_t i = 1; i < length; i++) {
                        // the first window that predicts token i begins at a multiple of the stride
                        int64_t begin = i <= seq ? 0 : (i - seq + step - 1) / step * step;
                        uint64_t state = 0;
                        for (int64_t j = begin; j < i; j++) state = after(mask && j > begin && data[j] == 256 ? 0 : state, (int)data[j]);
                        sum += loss_of(state, (int)data[i]);
                        text_bytes += data[i] != 256;
                    }
                    LossOptions o;
                    o.seq = seq;
                    o.rows = rows;
                    o.doc_mask = mask;
                    o.stride = stride;
                    o.tokenizer = &bytes;
                    LossResult r = evaluate_loss(trainer, data, o);
                    CHECK(r.tokens == length - 1);
                    CHECK(r.bytes == text_bytes);
                    CHECK(std::fabs(r.loss - sum / (double)(length - 1)) <= 1e-9);
                    CHECK(std::fabs(r.bits_per_byte() - sum / std::log(2.0) / (double)text_bytes) <= 1e-9);
                    CHECK(trainer.largest <= seq * rows);
                }
    }
}

TEST_CASE("with carried memory a document is one sequence, however it is cut") {
    Tokenizer bytes = make_tokenizer("bytes");
    Dataset data = text_dataset("test", words(200), bytes);
    double sum = 0;
    uint64_t state = 0;
    for (int64_t i = 0; i + 1 < data.num_tokens; i++) {
        state = after(data[i] == 256 ? 0 : state, (int)data[i]);
        sum += loss_of(state, (int)data[i + 1]);
    }
    for (int64_t seq : {1, 5, 64}) {
        HashTrainer trainer;
        trainer.lane = 12345;  // of something else
        LossOptions o;
        o.seq = seq;
        o.rows = 10;
        o.carry_memory = true;
        LossResult r = evaluate_loss(trainer, data, o);
        CHECK(r.tokens == data.num_tokens - 1);
        CHECK(r.bytes == 0);
        CHECK(std::fabs(r.loss - sum / (double)r.tokens) <= 1e-9);
        CHECK(trainer.largest <= seq);
    }
}

// ----------------------------------------------------------------------------
// Multiple choice

static std::string choices_file(const std::vector<MultipleChoice>& examples) {
    std::string records;
    size_t longest = 0;
    for (size_t i = 0; i < examples.size(); i++) {
        const MultipleChoice& e = examples[i];
        std::vector<uint16_t> words = {65535, 0, (uint16_t)i, (uint16_t)e.label, (uint16_t)e.choices.size(), (uint16_t)e.context.size()};
        words.insert(words.end(), e.context.begin(), e.context.end());
        for (const std::vector<int>& c : e.choices) {
            words.push_back((uint16_t)c.size());
            words.insert(words.end(), c.begin(), c.end());
        }
        words[1] = (uint16_t)(2 * words.size());
        longest = std::max(longest, 2 * words.size());
        records += bytes_of(words);
    }
    std::vector<int32_t> header(256);
    header[0] = 20240522;
    header[1] = 1;
    header[2] = (int32_t)examples.size();
    header[3] = (int32_t)longest;
    return bytes_of(header) + records;
}
static std::string put(const std::string& name, const std::string& content) {
    std::ofstream(directory / name, std::ios::binary) << content;
    return directory / name;
}
// Examples of all sizes.
static std::vector<MultipleChoice> some_choices(int n) {
    std::vector<MultipleChoice> examples;
    for (int i = 0; i < n; i++) {
        MultipleChoice e;
        for (int t = 0; t < i * 5 % 23; t++) e.context.push_back((i * 31 + t * 7) % 256);
        for (int c = 0; c < 2 + i % 4; c++) e.choices.push_back(std::vector<int>((size_t)(1 + (i + c) % 5), (i + 3 * c) % 256));
        e.label = i % (int)e.choices.size();
        examples.push_back(e);
    }
    return examples;
}

TEST_CASE("llm.c's evaluation format: read, and refused where it is cut or changed") {
    std::vector<MultipleChoice> examples = some_choices(9), back;
    std::string file = choices_file(examples), error;
    auto parse = [&](const std::string& s) {
        std::vector<uint8_t> exact(s.begin(), s.end());
        error.clear();
        bool good = parse_choices(exact.data(), exact.size(), back, error);
        CHECK(good == error.empty());
        return good;
    };
    REQUIRE(parse(file));
    REQUIRE(back.size() == examples.size());
    for (size_t i = 0; i < back.size(); i++)
        CHECK((back[i].context == examples[i].context && back[i].choices == examples[i].choices && back[i].label == examples[i].label));
    for (size_t n = 0; n < file.size(); n++) CHECK_MESSAGE(!parse(file.substr(0, n)), n << " bytes");
    CHECK(!parse(file + "xx"));
    CHECK(error.find("2 bytes are left behind its last example") != std::string::npos);
    auto changed = [&](size_t at, uint16_t value, const char* expected) {
        std::string bad = file;
        memcpy(&bad[at], &value, 2);
        CHECK_MESSAGE(!parse(bad), expected);
        CHECK_MESSAGE(error.find(expected) != std::string::npos, error);
    };
    changed(0, 7, "magic");
    changed(4, 2, "version is 2");
    changed(8, 0, "claims 0 examples");
    changed(8, 10, "example 9: it is not there");
    changed(8, 8, "left behind its last example");
    changed(12, 6, "an even number from 4 to the header's 6");
    changed(1024, 3, "example 0: it does not start with 65535");
    changed(1026, 0, "example 0: it has 0 bytes");
    changed(1026, 60000, "example 0: it has 60000 bytes");
    changed(1028, 1, "example 0: it says that it is example 1");
    changed(1030, 2, "example 0: its label is 2");
    changed(1032, 1, "example 0: it has 1 choices");
    changed(1032, 3, "example 0: its choice 2 does not fit");
    changed(1034, 60000, "example 0: its context does not fit");
    changed(1036, 0, "example 0: its choice 0 has no tokens");
    file = choices_file({examples[1]}) + "xx";
    uint16_t record = (uint16_t)(file.size() - 1024);
    memcpy(&file[12], &record, 2);
    changed(1026, record, "example 0: 1 words are left behind its last choice");
    file = choices_file(examples);
    for (size_t bit = 0; bit < file.size() * 8; bit += bit < 128 || bit >= 8192 ? 1 : 61) {  // whatever changes, nothing is read that is not there
        std::string bad = file;
        bad[bit / 8] = (char)(bad[bit / 8] ^ 1 << bit % 8);
        parse(bad);
    }
}

TEST_CASE("multiple choice: files") {
    Tokenizer bytes = make_tokenizer("bytes"), ids = make_tokenizer("ids");
    std::vector<MultipleChoice> e = read_choices(put("c.jsonl",
                                                     "{\"context\": \"ab\", \"choices\": [\" c\", \"d\\u00fc\"], \"label\": 1, \"more\": [1]}\n\n"
                                                     "{\"context\": \"\", \"choices\": [\"a\", \"b\", \"c\"], \"label\": 0}"),
                                                 bytes);
    REQUIRE(e.size() == 2);
    CHECK(e[0].context == std::vector<int>{'a', 'b'});
    CHECK(e[0].choices == std::vector<std::vector<int>>{{' ', 'c'}, {'d', 0xc3, 0xbc}});
    CHECK(e[0].label == 1);
    CHECK((e[1].context.empty() && e[1].choices.size() == 3));
    for (const char* bad :
         {"x", "[]", "{}", "{\"context\": \"a\", \"choices\": [\"b\"], \"label\": 0}", "{\"context\": \"a\", \"choices\": [\"b\", \"\"], \"label\": 0}",
          "{\"context\": \"a\", \"choices\": [\"b\", 1], \"label\": 0}", "{\"context\": \"a\", \"choices\": [\"b\", \"c\"], \"label\": 2}",
          "{\"context\": \"a\", \"choices\": [\"b\", \"c\"], \"label\": -1}", "{\"context\": \"a\", \"choices\": [\"b\", \"c\"], \"label\": 0.5}",
          "{\"context\": 1, \"choices\": [\"b\", \"c\"], \"label\": 0}", "{\"context\": \"\xff\", \"choices\": [\"b\", \"c\"], \"label\": 0}"})
        check_error(EXIT_DATA, {"line 2 of", "bad.jsonl", "\"label\""}, [&] { read_choices(put("bad.jsonl", std::string("\n") + bad), bytes); });
    check_error(EXIT_DATA, {"none.jsonl", "no multiple choices"}, [&] { read_choices(put("none.jsonl", "\n\n"), bytes); });
    check_error(EXIT_DATA, {"c.jsonl", "llm.c"}, [&] { read_choices(directory / "c.jsonl", ids); });
    std::vector<MultipleChoice> large = {{{50256, 7}, {{1}, {300}}, 0}};
    std::string path = put("c.bin", choices_file(large));
    CHECK(read_choices(path, ids).size() == 1);
    check_error(EXIT_DATA, {"token 50256 in example 0", "c.bin", "257"}, [&] { read_choices(path, bytes); });
    check_error(EXIT_DATA, {"short.bin", "cut short"}, [&] { read_choices(put("short.bin", choices_file(large).substr(0, 100)), ids); });
}

TEST_CASE("multiple choice: the lowest mean loss, whatever goes into one batch; the first of equal ones; contexts shortened on the left") {
    std::vector<MultipleChoice> examples = some_choices(60);
    MultipleChoice tie;
    tie.context = {1, 2, 3};
    tie.choices = {{9}, {8, 8}, {8, 8}, {9}};
    examples.push_back(tie);
    for (int max_seq : {5, 12, 64}) {
        std::vector<int> expected;
        int64_t shortened = 0;
        for (const MultipleChoice& e : examples) {
            size_t longest = 0;
            for (const auto& c : e.choices) longest = std::max(longest, c.size());
            std::vector<int> context = e.context.empty() ? std::vector<int>{256} : e.context;
            size_t keep = std::min(context.size(), (size_t)max_seq + 1 - longest);
            shortened += keep < context.size();
            double best = INFINITY;
            int chosen = -1;
            for (size_t c = 0; c < e.choices.size(); c++) {
                uint64_t state = 0;
                for (size_t i = context.size() - keep; i < context.size(); i++) state = after(state, context[i]);
                double sum = 0;
                for (int token : e.choices[c]) {
                    sum += (float)loss_of(state, token);
                    state = after(state, token);
                }
                if (sum / (double)e.choices[c].size() < best) {
                    best = sum / (double)e.choices[c].size();
                    chosen = (int)c;
                }
            }
            expected.push_back(chosen);
        }
        for (int64_t max_tokens : {1, 20, 100, 100000}) {
            HashTrainer trainer(max_seq);
            Choices r = choose(trainer, examples, 256, max_tokens);
            CHECK(r.chosen == expected);
            CHECK(r.shortened == shortened);
            CHECK(trainer.largest <= std::max<int64_t>(max_tokens, max_seq));
            if (max_tokens == 100000) CHECK(trainer.passes == 1);
        }
        CHECK((expected.back() == 0 || expected.back() == 1));
    }
    HashTrainer trainer(4);
    check_error(EXIT_DATA, {"example 2", "5 tokens", "longest sequence 4"}, [&] { choose(trainer, examples, 256, 100); });
}
