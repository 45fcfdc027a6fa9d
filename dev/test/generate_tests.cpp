// Generation with real models: the greedy text of every attention layer, and of a hybrid, is the same by whatever way it comes about.
//
//     build/generate_tests            all            build/generate_tests 8k/mla      the tests whose name contains this
//
// The ways: naive (the whole text through forward() again for each new token), token by token, prompts in chunks of any size, pages of any size, texts beside
// each other, and texts that had to wait because pages ran out. Then what memory all this takes: windows, states of constant size, bytes a token. Built
// against the CPU's trainer, or, with -DTEST_GPU, linked with the GPU's, in float32.
#ifdef TEST_GPU
#include "attention.h"
#include "gpt2/trainer.h"
#else
#define GPT2_NO_MAIN
#include "train_gpt2.cpp"
#endif

#include <omp.h>

#include <map>

#include "gpt2/generate.h"
#include "gpt2/philox.h"

static int passed = 0, failed = 0;
static void check(bool ok, const std::string& what) {
    if (!ok) printf("FAIL  %s\n", what.c_str());
    ok ? passed++ : failed++;
}

// ----------------------------------------------------------------------------
// Models

constexpr int VOCABULARY = 61;
#ifdef ARENA_DEBUG  // under the sanitizers
constexpr int LONG = 1024, ENDLESS = 1000;
#else
constexpr int LONG = 8192, ENDLESS = 20000;
#endif

// Each with its rows or memories: a token's past is beyond a page and beyond a segment soon.
static const std::vector<const char*> layers = {"causal", "infini:segment=16", "lightning", "mla", "lightning,causal:window=40,mla,infini:segment=16"};

static ModelConfig model(const std::string& attention, const std::string& positions = "", int depth = 0, int heads = 2) {
    ModelConfig c;
    c.set_vocab(VOCABULARY);
    c.max_seq = 1 << 20;
    c.layers = depth ? depth : attention.find(',') == std::string::npos ? 2 : 4;
    c.heads = heads;
    c.channels = 16 * heads;
    parse_attention(c, attention, {}, positions.empty() ? attention[0] == 'l' || attention[0] == 'i' ? "" : "rope" : positions);
    return c;
}
static TrainerOptions trainer_options(int64_t max_tokens, int page_size, int64_t pages = 0, int64_t window = 0) {
    TrainerOptions o;
    o.training = false;
    o.dtype = "float32";
    o.max_tokens = max_tokens;
    o.page_size = page_size;
    o.pages = pages;
    o.window = window;
    return o;
}
// Larger than the usual initial values: attention is not flat, and the likeliest token is so by far.
static std::unique_ptr<Trainer> make(const ModelConfig& c, const TrainerOptions& o) {
    std::unique_ptr<Trainer> trainer = make_trainer(c, o);
    const std::vector<TensorSpec>& specs = trainer->parameters().specs;
    for (size_t i = 0; i < specs.size(); i++) {
        std::vector<float> p(specs[i].size());
        double scale = specs[i].shape.size() == 2 ? 1 / std::sqrt((double)specs[i].shape[1]) : 0.3;
        for (size_t k = 0; k < p.size(); k++) {
            Philox r = philox(11, (uint32_t)k, (uint32_t)i, 0, 0);
            double a, b;
            philox_normal(r.word[0], r.word[1], &a, &b);
            p[k] = (float)(specs[i].init_value + scale * a);
        }
        trainer->set(Section::PARAMETERS, (int)i, p.data());
    }
    return trainer;
}

static std::vector<int> random_tokens(int n, uint64_t seed) {
    std::vector<int> tokens;
    for (int i = 0; i < n; i++) tokens.push_back((int)(philox(seed, (uint32_t)i, 0, 0, 1).word[0] % VOCABULARY));
    return tokens;
}

// Numbers as text, and none of them ends a text.
static Tokenizer numbers() {
    Tokenizer t = make_tokenizer("ids");
    t.vocab_size = VOCABULARY;
    t.end_of_text = -1;
    return t;
}

// ----------------------------------------------------------------------------
// Ways to write a text

static Batch one_sequence(const std::vector<int>& tokens) {
    Batch b;
    b.tokens = tokens;
    b.targets.assign(tokens.size(), -1);
    b.cu_seqlens = {0, (int)tokens.size()};
    return b;
}

// The likeliest token behind each one, all at once; *margin: by how much it is so, at the least, from `first` on.
static std::vector<int> likeliest(Trainer& trainer, const std::vector<int>& tokens, size_t first, float* margin) {
    std::vector<float> logits(tokens.size() * VOCABULARY);
    trainer.forward(one_sequence(tokens), Pass(), nullptr, logits.data());
    std::vector<int> best;
    for (size_t n = 0; n < tokens.size(); n++) {
        float* row = &logits[n * VOCABULARY];
        best.push_back(greedy_token(row, VOCABULARY));
        std::swap(row[0], row[best[n]]);
        if (n >= first) *margin = std::min(*margin, row[0] - *std::max_element(row + 1, row + VOCABULARY));
    }
    return best;
}
// Token after token, each from the beginning again.
static std::string naive(Trainer& trainer, std::vector<int> tokens, int count, float* margin) {
    std::string text;
    for (int i = 0; i < count; i++) {
        tokens.push_back(likeliest(trainer, tokens, tokens.size() - 1, margin).back());
        text += std::to_string(tokens.back()) + " ";
    }
    return text;
}

struct Written {
    std::vector<std::string> texts;
    std::vector<Stop> ended;
    GenerateStats stats;
};
static Written write(Trainer& trainer, const std::vector<Request>& requests, const GenerateOptions& g) {
    Written w;
    size_t count = 0, kept = 0;
    for (const Request& r : requests) {
        count += (size_t)r.samples;
        kept += r.conversation != nullptr;
    }
    w.texts.resize(count);
    w.ended.resize(count);
    Tokenizer tokenizer = numbers();
    Generator generator(
        trainer, tokenizer, g, [&](int text, const std::string& piece) { w.texts[text] += piece; }, [&](int text, Stop why) { w.ended[text] = why; });
    w.stats = generator.run(requests);
    check((trainer.state_bytes() > 0) == (kept > 0), "every state has been given back");
    return w;
}
static GenerateOptions options(int64_t tokens, int64_t chunk, int64_t sequences, double temperature = 0) {
    GenerateOptions g;
    g.sampler.temperature = temperature;
    g.tokens = tokens;
    g.max_chunk = chunk;
    g.max_sequences = sequences;
    g.seed = 3;
    return g;
}

// ----------------------------------------------------------------------------
// Tests

static void test_ways(const std::string& attention) {
    ModelConfig c = model(attention);
    std::vector<Request> requests;
    for (int n : {1, 63, 7, 130}) requests.push_back({random_tokens(n, n), 1});
    float margin = 1;
    std::vector<std::string> expected;
    std::unique_ptr<Trainer> trainer = make(c, trainer_options(256, 64));
    for (const Request& r : requests) expected.push_back(naive(*trainer, r.prompt, 40, &margin));
    check(margin > 2e-5, attention + format(": the two likeliest tokens differ by %.1e only", margin));
    for (int page : {1, 16, 64}) {
        trainer = make(c, trainer_options(256, page));
        for (int64_t chunk : {1, 7, page, 256})
            check(write(*trainer, requests, options(40, chunk, chunk == 256 ? 1 : 4)).texts == expected,
                  attention + format(": pages of %d, chunks of %lld", page, (long long)chunk));
    }
}

// The naive way is walked once for all tokens: each is the likeliest behind those before it. Token by token only the last 200 are read.
static void test_8k(const std::string& attention) {
    ModelConfig c = model(attention, "", attention.find(',') == std::string::npos ? 1 : 4, /*heads*/ 1);
    const int n = LONG + 13, count = 12;
    std::vector<int> prompt = random_tokens(n, 5);
    std::string expected;
    struct Way {
        int page;
        int64_t chunk, beginning;  // which is read in pieces of 500
    };
    for (Way way : {Way{64, n, 0}, Way{16, 1, n - 200}, Way{64, 7, n - 900}, Way{1, 500, 0}}) {
        std::unique_ptr<Trainer> trainer = make(c, trainer_options(n + count, way.page));
        Conversation text;
        if (way.beginning) write(*trainer, {{{prompt.begin(), prompt.begin() + way.beginning}, 1, &text}}, options(0, 500, 1));
        std::string answer = write(*trainer, {{{prompt.begin() + way.beginning, prompt.end()}, 1, &text}}, options(count, way.chunk, 1)).texts[0];
        if (expected.empty()) {
            expected = answer;
            std::vector<int> own = numbers().encode(answer);
            check(own.size() == count && std::equal(own.begin(), own.end(), text.tokens.end() - count), attention + ": the text's tokens");
            text.tokens.pop_back();
            float margin = 1;
            std::vector<int> best = likeliest(*trainer, text.tokens, n - 1, &margin);
            check(margin > 2e-5, attention + format(": the two likeliest tokens differ by %.1e only", margin));
            check(std::vector<int>(best.begin() + n - 1, best.end()) == own, attention + ": the naive way");
        }
        check(answer == expected, attention + format(": pages of %d, chunks of %lld", way.page, (long long)way.chunk));
    }
}

static void test_waiting(const std::string& attention) {
    ModelConfig c = model(attention);
    std::vector<Request> requests;
    for (int n : {20, 63, 7, 90, 1, 33}) requests.push_back({random_tokens(n, n), 1 + n % 3});
    std::unique_ptr<Trainer> trainer = make(c, trainer_options(256, 8));
    for (double temperature : {0.0, 1.0}) {
        GenerateOptions g = options(30, 16, 8, temperature);
        Written plenty = write(*trainer, requests, g);
        int64_t most = plenty.stats.pages == INT64_MAX ? 0 : 17;  // the longest text alone: 90 + 29 rows are 15 pages, and two for its samples
        std::unique_ptr<Trainer> scarce = make(c, trainer_options(256, 8, most));
        Written few = write(*scarce, requests, g);
        check(few.texts == plenty.texts, attention + ": the same texts in few pages");
        check((few.stats.put_back > 0) == (most > 0), attention + ": texts had to wait");
        check(plenty.stats.put_back == 0, attention + ": none waits where there is room");
    }
}

// What a window no longer sees may be given back: the text is that of a state from which nothing is.
static void test_window(const std::string& attention) {
    const int window = 20;
    ModelConfig c = model(attention);
    std::vector<Request> requests = {{random_tokens(50, 1), 2}, {random_tokens(3, 2), 1}};
    GenerateOptions g = options(60, 7, 3);
    std::unique_ptr<Trainer> whole = make(c, trainer_options(256, 1024, 0, window));
    Written expected = write(*whole, requests, g), without = write(*make(c, trainer_options(256, 64)), requests, g);
    check(expected.texts != without.texts, attention + ": a window is seen");
    g.window = window;
    for (int page : {1, 3, 8})
        for (int64_t chunk : {3, 7}) {
            g.max_chunk = chunk;
            // 19 rows behind the next token, a page that they begin in, and what is written at once; for each of three texts
            int64_t pages = 3 * ((window - 1 + chunk + page - 1) / page + 1);
            Written w = write(*make(c, trainer_options(256, page, pages, window)), requests, g);
            check(w.texts == expected.texts, attention + format(": a window, pages of %d, chunks of %lld", page, (long long)chunk));
            check(w.stats.put_back == 0, attention + ": memory is enough");
        }
    if (attention != "causal") return;
    std::unique_ptr<Trainer> own = make(model("causal:window=20"), trainer_options(256, 64));
    float margin = 1;
    check(expected.texts[2] == naive(*own, requests[1].prompt, 60, &margin), "causal: --window is the layer's window");
    check(margin > 2e-5, format("causal, window: the two likeliest tokens differ by %.1e", margin));
}

static void test_bytes(const std::string& attention) {
    ModelConfig c = model(attention);
    StateBytes bytes = decode_state_bytes(c, "float32");
    int64_t numbers_token = 0, numbers_sequence = 0;
    for (const AttentionConfig& a : c.attention) {
        numbers_token += attention_description(a.name).state(a).per_token;
        numbers_sequence += attention_description(a.name).state(a).per_sequence;
    }
    check(bytes.token == 4 * numbers_token && bytes.sequence == 4 * numbers_sequence, attention + ": bytes of the state");
    for (int page : {1, 16}) {
        std::unique_ptr<Trainer> trainer = make(c, trainer_options(256, page));
        int a = trainer->new_sequence();
        for (int n = 0; n <= 40; n += 20) {
            int64_t rows = (n + page - 1) / page * page;
            check((int64_t)trainer->state_bytes() == rows * bytes.token + bytes.sequence, attention + format(": bytes of %d tokens in pages of %d", n, page));
            if (n < 40) trainer->extend(one_sequence(random_tokens(20, n)), {a}, nullptr);
        }
        trainer->free_sequence(a);
    }
}

// Texts far beyond anything trained on, in memory that is what it was at the first token.
static void test_endless(const std::string& attention) {
    ModelConfig c = model(attention, "", 1);
    std::unique_ptr<Trainer> trainer = make(c, trainer_options(64, 64));
    Written w = write(*trainer, {{{0}, 1}}, options(ENDLESS, 64, 1, 1));
    check(w.ended[0] == Stop::TOKENS && numbers().encode(w.texts[0]).size() == ENDLESS, attention + ": as many tokens as asked for");
    check((int64_t)w.stats.state_bytes == decode_state_bytes(c, "float32").sequence, attention + ": in the memory of one");
    check(w.stats.pages == INT64_MAX, attention + ": without pages");
}

static std::string refused(const std::function<void()>& f) {
    try {
        f();
    } catch (const Error& e) {
        return format("%d %s", e.exit_code, e.what());
    }
    return "";
}
static void test_errors() {
    ModelConfig c = model("causal", "learned");
    c.max_seq = 20;
    std::unique_ptr<Trainer> trainer = make(c, trainer_options(64, 4, 5));
    int a = trainer->new_sequence();
    trainer->extend(one_sequence(random_tokens(15, 1)), {a}, nullptr);
    std::string text = refused([&] { trainer->extend(one_sequence(random_tokens(6, 1)), {a}, nullptr); });
    check(text.find("2 a sequence of 21 tokens is longer than the model's 20 learned positions") == 0, "positions past the end: " + text);
    trainer->extend(one_sequence(random_tokens(5, 1)), {a}, nullptr);  // up to the end
    check(trainer->pages_left() == 0, "all pages are taken");
    int b = trainer->new_sequence(), c2 = trainer->new_sequence();
    auto refuses = [&](const std::vector<int>& tokens, const std::vector<int>& offsets, const std::vector<int>& sequences, const char* expected) {
        Batch batch = one_sequence(tokens);
        batch.cu_seqlens = offsets;
        text = refused([&] { trainer->extend(batch, sequences, nullptr); });
        check(text.find(expected) != std::string::npos, format("expected '%s', got '%s'", expected, text.c_str()));
    };
    refuses({1}, {0, 1}, {b}, "3 the state is full: 1 more pages are wanted, 0 of 5 are left");
    refuses({1, 2, 3}, {0, 2, 1, 3}, {a, b, c2}, "3 the offsets of a batch decrease");
    refuses({1, 2, 3}, {0, 2}, {b}, "3 the offsets of a batch decrease, or do not go from 0 to its 3 tokens");
    refuses({1, 2, 3}, {1, 3}, {b}, "offsets");
    refuses({}, {}, {}, "offsets");
    refuses({1, 2, 3}, {0, 3}, {b, c2}, "3 2 sequences are given tokens for 1");
    refuses(random_tokens(65, 1), {0, 65}, {b}, "3 65 tokens are more than the 64");
    refuses({VOCABULARY}, {0, 1}, {b}, "3 token 61 is outside the vocabulary of 61");
    refuses({-1}, {0, 1}, {b}, "3 token -1");
    trainer->free_sequence(b);
    trainer->free_sequence(c2);
    trainer->free_sequence(a);
}

int main(int argc, char** argv) {
    omp_set_num_threads(1);  // the models are too small for more
    struct Test {
        const char* name;
        void (*run)(const std::string& attention);
        std::vector<const char*> layers;
    };
    for (const Test& t : {Test{"ways", test_ways, layers}, Test{"waiting", test_waiting, layers}, Test{"window", test_window, {"causal", "mla", layers[4]}},
                          Test{"bytes", test_bytes, layers}, Test{"endless", test_endless, {layers[1], layers[2]}}, Test{"8k", test_8k, layers}})
        for (const char* attention : t.layers)
            if (argc < 2 || (std::string(t.name) + "/" + attention).find(argv[1]) != std::string::npos) t.run(attention);
    if (argc < 2) test_errors();
    printf("%d passed, %d failed\n", passed, failed);
    return failed ? 1 : 0;
}
