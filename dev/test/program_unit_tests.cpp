// Unit tests of the program around the trainers: schedules, sampler, log, options, recall's arithmetic, names of checkpoints.
// Pure functions only; what needs a model and files is in program_tests.sh.
#define DOCTEST_CONFIG_IMPLEMENT_WITH_MAIN
#define DOCTEST_CONFIG_SUPER_FAST_ASSERTS  // fast to compile
#include <doctest/doctest.h>

#include <cstdlib>
#include <fstream>
#include <limits>
#include <set>
#include <map>
#include <string>
#include <vector>

#include "attention.h"
#include "dev/test/idle_trainer.h"
#include "dev/test/testing.h"
#include "gpt2/evaluate.h"
#include "gpt2/generate.h"
#include "gpt2/log.h"
#include "gpt2/options.h"
#include "gpt2/run_directory.h"
#include "gpt2/sampler.h"
#include "gpt2/schedule.h"
#include "gpt2/state.h"

bool trainer_on_gpu() { return true; }  // whose options are the most

// ----------------------------------------------------------------------------
// Schedules

TEST_CASE("every schedule warms up on a straight line and reaches lr at the end of it") {
    for (const char* name : schedule_names) {
        Schedule s = {name, 1.0, 0.1, 10, 100};
        CAPTURE(name);
        for (int step = 1; step <= 10; step++) CHECK(learning_rate(s, step) == doctest::Approx(0.1 * step).epsilon(1e-15));
        for (int step = 11; step <= 100; step++) CHECK(learning_rate(s, step) <= learning_rate(s, step - 1));
    }
}
TEST_CASE("schedules in the middle and at the end") {
    Schedule cosine = {"cosine", 1.0, 0.1, 0, 100}, linear = {"linear", 1.0, 0.1, 20, 100}, constant = {"constant", 1.0, 0.1, 0, 100},
             wsd = {"wsd", 1.0, 0.0, 10, 100};
    CHECK(learning_rate(cosine, 50) == doctest::Approx(0.55).epsilon(1e-14));
    CHECK(learning_rate(cosine, 25) == doctest::Approx(0.1 + 0.9 * 0.5 * (1 + std::sqrt(0.5))).epsilon(1e-14));
    CHECK(learning_rate(cosine, 100) == doctest::Approx(0.1).epsilon(1e-14));
    CHECK(learning_rate(linear, 60) == doctest::Approx(0.55).epsilon(1e-14));
    CHECK(learning_rate(linear, 100) == doctest::Approx(0.1).epsilon(1e-14));
    CHECK(learning_rate(constant, 1) == 1);
    CHECK(learning_rate(constant, 100) == 1);
    CHECK(learning_rate(wsd, 80) == 1);
    CHECK(learning_rate(wsd, 90) == doctest::Approx(0.5).epsilon(1e-14));
    CHECK(learning_rate(wsd, 100) == 0);
    CHECK(learning_rate(cosine, 200) == doctest::Approx(0.1).epsilon(1e-14));  // a step beyond the last one
}
TEST_CASE("schedules of short runs are finite and within bounds") {
    for (const char* name : schedule_names)
        for (int steps : {0, 1, 2, 5})
            for (int warmup : {0, 1, 2, 5, 9})
                for (int step = 1; step <= steps + 1; step++) {
                    double lr = learning_rate({name, 1.0, 0.1, warmup, steps}, step);
                    CHECK((lr > 0 && lr <= 1));
                }
}

// ----------------------------------------------------------------------------
// Sampler

TEST_CASE("temperature 0 takes the likeliest token, the lower id of two") {
    float logits[] = {1, 3, -2, 3, 0};
    for (double u : {0.0, 0.5, 0.999}) CHECK(sample_token(logits, 5, {0, 0, 1}, u) == 1);
}
TEST_CASE("draws follow the softmax") {
    float logits[] = {0, std::log(2.0f), std::log(5.0f), -100};
    for (double temperature : {1.0, 0.5, 2.0}) {
        double weight[] = {1, std::pow(2, 1 / temperature), std::pow(5, 1 / temperature)}, sum = weight[0] + weight[1] + weight[2];
        int n = 100000, count[4] = {};
        for (int i = 0; i < n; i++) count[sample_token(logits, 4, {temperature, 0, 1}, sampling_uniform(3, 0, i))]++;
        for (int t = 0; t < 3; t++) CHECK(std::fabs(count[t] / (double)n - weight[t] / sum) < 0.006);  // four standard deviations
        CHECK(count[3] == 0);
    }
}
TEST_CASE("top k and top p cut where they say") {
    float logits[] = {std::log(0.1f), std::log(0.4f), std::log(0.2f), std::log(0.3f)};
    auto drawn = [&](int64_t k, double p) {
        std::string s;
        for (int t = 0; t < 4; t++)
            for (int i = 0; i < 1000; i++)
                if (sample_token(logits, 4, {1, k, p}, i / 1000.0) == t) {
                    s += (char)('0' + t);
                    break;
                }
        return s;
    };
    CHECK(drawn(0, 1) == "0123");
    CHECK(drawn(1, 1) == "1");
    CHECK(drawn(2, 1) == "13");
    CHECK(drawn(9, 1) == "0123");
    CHECK(drawn(0, 0.39) == "1");
    CHECK(drawn(0, 0.41) == "13");
    CHECK(drawn(0, 0.71) == "123");
    CHECK(drawn(0, 0.95) == "0123");
    CHECK(drawn(2, 0.9) == "13");
    CHECK(drawn(2, 0.5) == "1");  // of the two that are left, 4/7 and 3/7
}
TEST_CASE("min p keeps what is near the likeliest") {
    float logits[] = {std::log(0.1f), std::log(0.4f), std::log(0.2f), std::log(0.3f)};
    auto drawn = [&](const SamplerOptions& o) {
        std::set<int> tokens;
        for (int i = 0; i < 1000; i++) tokens.insert(sample_token(logits, 4, o, i / 1000.0));
        return tokens;
    };
    CHECK(drawn({1, 0, 1, 0.2}) == std::set<int>{0, 1, 2, 3});
    CHECK(drawn({1, 0, 1, 0.26}) == std::set<int>{1, 2, 3});
    CHECK(drawn({1, 0, 1, 0.51}) == std::set<int>{1, 3});
    CHECK(drawn({1, 0, 1, 1}) == std::set<int>{1});
    CHECK(drawn({0.5, 0, 1, 0.26}) == std::set<int>{1, 3});  // of probabilities after the temperature
    CHECK(drawn({1, 3, 1, 0.6}) == std::set<int>{1, 3});
    CHECK(drawn({1, 0, 0.5, 0.1}) == std::set<int>{1, 3});
}
TEST_CASE("repetitions become less likely, whatever the sign of their logits") {
    float logits[] = {2, -2, 3, 0};
    penalise_repetitions(logits, {0, 1, 3}, 2);
    CHECK((logits[0] == 1 && logits[1] == -4 && logits[2] == 3 && logits[3] == 0));
}
TEST_CASE("what may be the beginning of the text to stop at is held back") {
    auto all = [](const std::string& stop, const std::vector<std::string>& pieces) {
        StopFinder finder;
        finder.stop = stop;
        std::string out;
        bool found = false;
        for (const std::string& piece : pieces)
            if (!found) out += finder.push(piece, &found) + "|";
        return out + (found ? "!" : finder.held);
    };
    CHECK(all("", {"a", "b"}) == "a|b|");
    CHECK(all("end", {"the e", "n", "t e", "nd."}) == "the ||ent ||!");
    CHECK(all("end", {"een", "een"}) == "e|ene|en");
    CHECK(all("aab", {"aa", "a", "ab"}) == "|a|a|!");
    CHECK(all("x", {"axb"}) == "a|!");
}
TEST_CASE("equal logits rank by id") {
    std::vector<float> logits(100, 1.5f);
    for (int i = 0; i < 100; i++) CHECK(sample_token(logits.data(), 100, {1, 10, 1}, i / 100.0) < 10);
    CHECK(sample_token(logits.data(), 100, {1, 0, 1}, 0) == 0);
    CHECK(sample_token(logits.data(), 100, {1, 0, 1}, std::nextafter(1.0, 0.0)) == 99);
}
TEST_CASE("extreme logits") {
    float logits[] = {-3e38f, 3e38f, 0};
    CHECK(sample_token(logits, 3, {1, 0, 1}, 0.999) == 1);
    CHECK(sample_token(logits, 3, {1e-6, 0, 0.5}, 0.999) == 1);
    for (float v : {std::numeric_limits<float>::quiet_NaN(), std::numeric_limits<float>::infinity()}) {
        float broken[] = {0, v, 0};
        CHECK_THROWS_AS(sample_token(broken, 3, {1, 0, 1}, 0.5), Error);
        CHECK_THROWS_AS(sample_token(broken, 3, {0, 0, 1}, 0.5), Error);
    }
}
TEST_CASE("random numbers have addresses") {
    double u = sampling_uniform(1, 2, 3);
    CHECK((u >= 0 && u < 1));
    CHECK(u == sampling_uniform(1, 2, 3));
    CHECK(u != sampling_uniform(2, 2, 3));
    CHECK(u != sampling_uniform(1, 3, 3));
    CHECK(u != sampling_uniform(1, 2, 4));
    CHECK(u != sampling_uniform(1, 2, 3 + ((uint64_t)1 << 32)));
}

// ----------------------------------------------------------------------------
// Log

static std::string read_all(const std::string& path) {
    std::ifstream f(path, std::ios::binary);
    return std::string(std::istreambuf_iterator<char>(f), {});
}
struct TemporaryFile {
    std::string path;
    TemporaryFile() {
        char name[] = "/tmp/log_test_XXXXXX";
        close(mkstemp(name));
        path = name;
    }
    ~TemporaryFile() { unlink(path.c_str()); }
};

TEST_CASE("a log line gives every digit back, and names only what was measured") {
    StepRecord r;
    r.step = 7;
    r.loss = 1.0 / 3;
    r.lr = 1e-3;
    r.grad_norm = std::numeric_limits<double>::infinity();
    nlohmann::json j = nlohmann::json::parse(log_line(r));
    CHECK(j["step"] == 7);
    CHECK(j["loss"].get<double>() == 1.0 / 3);
    CHECK(j["lr"].get<double>() == 1e-3);
    CHECK(j["grad_norm"].is_null());
    CHECK(!j.contains("val_loss"));
    CHECK(!j.contains("recall"));
    r.val_loss = 2.0 / 3;
    r.recall = 0;
    j = nlohmann::json::parse(log_line(r));
    CHECK(j["val_loss"].get<double>() == 2.0 / 3);
    CHECK(j["recall"].get<double>() == 0);
}
TEST_CASE("a log is cut back to the step that a run resumes from") {
    TemporaryFile file;
    std::string lines[5];
    for (int i = 1; i <= 4; i++) {
        StepRecord r;
        r.step = i;
        lines[i] = lines[i - 1] + log_line(r) + "\n";
    }
    for (int keep = 0; keep <= 5; keep++)
        for (const char* rest : {"", "{\"step\": 5, \"lo", "garbage\n", "{\"step\": 1}"}) {
            std::ofstream(file.path, std::ios::binary) << lines[4] << rest;
            Log log;
            log.open(file.path, keep);
            CHECK(read_all(file.path) == lines[std::min(keep, 4)]);
            StepRecord r;
            r.step = keep + 1;
            log.step(r);
            CHECK(read_all(file.path) == lines[std::min(keep, 4)] + log_line(r) + "\n");
        }
}
TEST_CASE("a log that was never opened swallows lines") {
    Log log;
    log.step(StepRecord());
    log.sync();
}
TEST_CASE("durations") {
    CHECK(duration_text(0) == "0s");
    CHECK(duration_text(59.6) == "1m00s");
    CHECK(duration_text(125) == "2m05s");
    CHECK(duration_text(7384) == "2h03m");
}

// ----------------------------------------------------------------------------
// Options

static Options parsed(std::vector<std::string> words) {
    std::vector<char*> argv = {(char*)"train_gpt2"};
    for (std::string& w : words) argv.push_back(&w[0]);
    Options o;
    bool parsed = parse_command_line((int)argv.size(), argv.data(), o);
    CHECK(parsed);
    return o;
}
static std::string refused(std::vector<std::string> words) {
    try {
        Options o = parsed(words);
        resolve_options(o);
    } catch (const Error& e) {
        CHECK(e.exit_code == EXIT_USAGE);
        CHECK(std::string(e.what()).find('\n') == std::string::npos);
        return e.what();
    }
    return "";
}

TEST_CASE("the last value wins, in both spellings") {
    Options o = parsed({"train", "--lr", "1", "--steps=3", "--lr=0.25", "--attention", "x,y:z=1", "--resume", "--resume"});
    CHECK(o.command == "train");
    CHECK(o.lr == 0.25);
    CHECK(o.steps == 3);
    CHECK(o.attention == "x,y:z=1");
    CHECK(o.resume);
    CHECK(!o.overwrite);
    CHECK(o.is_given("lr"));
    CHECK(!o.is_given("batch"));
}
TEST_CASE("texts are taken as they are") {
    for (const char* text : {"-x", "--", "[a,b]", "{}", "\"q\"", " a  b ", "a\nb", "%d", "#c"})
        CHECK(parsed({"generate", std::string("--prompt=") + text}).prompt == text);
    for (const char* text : {"-x", "--tokens", ""}) CHECK(parsed({"generate", "--prompt", text}).prompt == text);
}
TEST_CASE("every number is refused beyond its range, and taken at its ends") {
    for (const OptionSpec& s : option_specs()) {
        if (std::holds_alternative<bool Options::*>(s.field) || std::holds_alternative<std::string Options::*>(s.field)) continue;
        std::string name = std::string("--") + s.name;
        const char* command = "info";
        for (const auto& c : commands)
            if (s.commands & c.bit) command = c.name;
        CAPTURE(name);
        for (double v : {s.min, s.max}) CHECK_NOTHROW(parsed({command, name, format("%.17g", v)}));
        for (std::string text : {format("%.17g", s.min - 1), format("%.17g", s.max * 2 + 1), std::string("x"), std::string("1x"), std::string("nan")})
            CHECK(refused({command, name, text}).find(name + " is '" + text + "': give ") == 0);
    }
}
TEST_CASE("names are not declared twice, and layer options do not hide behind the program's") {
    std::map<std::string, unsigned> seen;
    for (const OptionSpec& s : option_specs()) {
        CHECK((seen[s.name] & s.commands) == 0);  // another command may have another option of the name
        seen[s.name] |= s.commands;
    }
    for (const auto& f : attention_flags()) CHECK((!seen.count(f.first) || !(seen[f.first] & LAYER_OPTIONS)));
    // --window is a layer's option in training, and generate's own
    Options train = parsed({"train", "--window", "3"}), generate = parsed({"generate", "--window", "5"});
    CHECK((train.window == 0 && train.attention_options.at("window") == "3"));
    CHECK((generate.window == 5 && generate.attention_options.empty()));
}
TEST_CASE("options that depend on others are settled") {
    Options o = parsed({"train", "--max-seq", "64", "--batch", "2", "--lr", "0.5"});
    resolve_options(o);
    CHECK(o.seq == 64);
    CHECK(o.total_batch == 128);
    CHECK(o.min_lr == 0.05);
    CHECK(o.layers == presets[0].layers);
    o = parsed({"train", "--preset", "gpt2-350M"});
    resolve_options(o);
    CHECK(o.layers == 24);
    CHECK(o.lr == preset_defaults[1].lr);
    CHECK(refused({"train", "--seq", "100000"}).find("raise --max-seq") != std::string::npos);
    CHECK(refused({"train", "--batch", "1000000", "--seq", "10000", "--max-seq", "10000"}).find("2^31") != std::string::npos);
}
TEST_CASE("a run's options come back from its config.json") {
    TemporaryDirectory run;
    Options o = parsed({"train", "--lr", "0.1", "--doc-mask", "--seed", "9007199254740992", "--data", "a \"b\"", "--window", "3", "--layers", "2"});
    resolve_options(o);
    o.positions = "learned";
    o.tokenizer = "bytes";
    write_run_config(run.path, o, model_config(o, 257));
    Options back = read_run_options(run.path);
    for (const OptionSpec& s : option_specs()) CHECK(option_json(back, s) == option_json(o, s));
    CHECK(back.attention_options == o.attention_options);
    CHECK(holds_run(run.path));
    ModelConfig c = model_config(o, 257), d = model_from_json(model_json(c), "test");
    CHECK(model_json(d) == model_json(c));
    unlink((run / "config.json").c_str());
    CHECK(!holds_run(run.path));
}

// ----------------------------------------------------------------------------
// Names, questions, windows

TEST_CASE("names of steps") {
    CHECK(step_of_name("step_00000000") == 0);
    CHECK(step_of_name("step_00001000") == 1000);
    CHECK(step_of_name("step_123456789") == 123456789);
    for (const char* other : {"", "step", "step_", "step_1", "step_0000100", "step_00001000.tmp", "step_0000100x", "stop_00001000", "step_-0001000"})
        CHECK(step_of_name(other) == -1);
    CHECK(step_directory("r", 1000) == "r/step_00001000");
    CHECK(questions_path("a/b.txt") == "a/b.questions.jsonl");
    CHECK(questions_path("a/b") == "a/b.questions.jsonl");
}
TEST_CASE("questions") {
    Tokenizer bytes = make_tokenizer("bytes");
    Question q = parse_question(R"({"prompt": "ab", "answer": "cd", "distance": 40, "guess": 0.5})", bytes, "here");
    CHECK(q.tokens == std::vector<int>{256, 'a', 'b', 'c'});
    CHECK(q.answer == std::vector<int>{'c', 'd'});
    for (const char* bad : {"", "x", "[]", "{}", R"({"prompt": "ab", "answer": "", "distance": 40, "guess": 0.5})",
                            R"({"prompt": 1, "answer": "c", "distance": 40, "guess": 0.5})", R"({"prompt": "a", "answer": "c", "distance": -1, "guess": 0.5})",
                            R"({"prompt": "a", "answer": "c", "distance": 1.5, "guess": 0.5})", R"({"prompt": "a", "answer": "c", "distance": 1, "guess": 2})"})
        CHECK_THROWS_AS(parse_question(bad, bytes, "here"), Error);
    std::vector<Question> many(1000);
    for (int i = 0; i < 1000; i++) many[i].distance = i;
    CHECK(question_sample(many, 1000).size() == 1000);
    CHECK(question_sample(many, 256).size() == 256);
    CHECK(question_sample(many, 256)[255].distance == 996);
    RecallScore s;
    s.add(q, 1);
    s.add(q, 0);
    s.add(q, -1);
    CHECK(s.exact() == 0.5);
    CHECK(s.guessing() == 0.5);
    CHECK(s.skipped == 1);
}

// A trainer that knows the whole text by heart: the next token's id is the present one's plus one. Everything else about it is as simple as can be, but the
// pages of its states are real: each token has a row, and what the trainer knows of the past it reads there.
struct CountingTrainer : IdleTrainer {
    std::vector<std::vector<int>> seen;  // the tokens of each extend()
    int64_t largest = 0;
    StatePool<float> pool;
    int64_t window;
    explicit CountingTrainer(int page_size = 4, int64_t pages = 10000, int64_t window = 0) : pool({{1, 0}}, page_size, pages), window(window) {
        config.set_vocab(257);
        config.max_seq = 16;
    }
    void write(int token, float* logits) {
        for (int v = 0; v < 257; v++) logits[v] = v == (token + 1) % 257 ? 10.0f : 0.0f;
    }
    double forward(const Batch& b, const Pass& pass, float*, float* logits) override {
        CHECK(!pass.training);
        CHECK(b.cu_seqlens.back() == (int)b.tokens.size());
        CHECK(b.targets.size() == b.tokens.size());
        largest = std::max(largest, (int64_t)b.tokens.size());
        for (size_t i = 0; logits && i < b.tokens.size(); i++) write(b.tokens[i], logits + 257 * i);
        double sum = 0;  // a loss that tells which tokens were scored
        for (int t : b.targets) sum += t;
        return sum / (double)b.targets.size();
    }
    std::map<int, std::vector<int>> states;  // of the living sequences, what each has read
    size_t most = 0;                         // living at the same time
    // Besides the next token another one is likely, whose id tells whether all of the past is right.
    void extend(const Batch& b, const std::vector<int>& sequences, float* logits) override {
        seen.push_back(b.tokens);
        REQUIRE(b.cu_seqlens.size() == sequences.size() + 1);
        CHECK((b.cu_seqlens.back() == (int)b.tokens.size() && b.targets.size() == b.tokens.size()));
        CHECK(std::set<int>(sequences.begin(), sequences.end()).size() == sequences.size());
        for (size_t s = 0; s < sequences.size(); s++) {
            int n = b.cu_seqlens[s + 1] - b.cu_seqlens[s];
            REQUIRE(n > 0);
            std::vector<int>& state = states.at(sequences[s]);
            auto& q = pool.sequences[sequences[s]];
            REQUIRE(pool.pages_wanted(sequences[s], n) <= pool.pages_left());
            pool.reserve(sequences[s], n);
            for (int i = b.cu_seqlens[s]; i < b.cu_seqlens[s + 1]; i++, q.length++) {
                state.push_back(b.tokens[i]);
                pool.page(q.pages[q.length / pool.page_size])[q.length % pool.page_size] = (float)b.tokens[i];
            }
            int64_t visible = window > 0 ? std::min(window, q.length) : q.length;
            int sum = 0;
            for (int64_t j = q.length - visible; j < q.length; j++) sum = (3 * sum + (int)pool.page(q.pages[j / pool.page_size])[j % pool.page_size]) % 257;
            if (logits) {
                write(state.back(), logits + 257 * s);
                logits[257 * s + sum] += 5;
            }
            CHECK(q.past() == (int64_t)state.size());
            if (window > 0) pool.slide(sequences[s], window);
        }
    }
    int new_sequence() override {
        int s = pool.create();
        CHECK(states.emplace(s, std::vector<int>()).second);
        most = std::max(most, states.size());
        return s;
    }
    int fork_sequence(int from) override {
        int s = pool.fork(from);
        states[s] = states.at(from);
        most = std::max(most, states.size());
        return s;
    }
    void free_sequence(int s) override {
        CHECK(states.erase(s) == 1);
        pool.release(s);
    }
    size_t state_bytes() override { return 100 * states.size(); }
    int64_t pages_left() override { return pool.pages_left(); }
    int64_t pages_wanted(int s, int64_t tokens) override { return pool.pages_wanted(s, tokens); }
};

TEST_CASE("loss: every token but the first is scored once, whatever the windows") {
    CountingTrainer trainer;
    Tokenizer bytes = make_tokenizer("bytes");
    Dataset data = text_dataset("test", "abcdefghijklmnopqrstuvw<|endoftext|>xyz", bytes);
    double sum = 0;
    for (int64_t i = 1; i < data.num_tokens; i++) sum += (double)data[i];
    for (int64_t seq : {1, 2, 5, 16, 27, 100})
        for (int64_t rows : {1, 3, 50})
            for (bool mask : {false, true}) {
                LossResult r = evaluate_loss(trainer, data, {seq, rows, 0, mask, 0, false, &bytes});
                CHECK(r.tokens == data.num_tokens - 1);
                CHECK(r.bytes == data.num_tokens - 2);
                CHECK(r.loss == doctest::Approx(sum / (double)r.tokens).epsilon(1e-12));
            }
    CHECK(evaluate_loss(trainer, data, {5, 2, 3, false, 0, false, nullptr}).tokens == 15);
}
TEST_CASE("recall: right where every token is, over any packing; too long ones are not asked") {
    CountingTrainer trainer;
    Tokenizer bytes = make_tokenizer("bytes");
    std::vector<Question> questions;
    std::vector<int> expected;
    auto ask = [&](const char* prompt, const char* answer, int outcome) {
        questions.push_back(parse_question(nlohmann::json({{"prompt", prompt}, {"answer", answer}, {"distance", 20}, {"guess", 0.1}}).dump(), bytes, "here"));
        expected.push_back(outcome);
    };
    ask("xa", "b", 1);
    ask("xa", "bcd", 1);
    ask("xa", "bcx", 0);
    ask("xa", "xcd", 0);
    ask("xa", "bxd", 0);
    ask("0123456789012", "345", 1);    // 16 tokens: as many as fit
    ask("01234567890123", "456", -1);  // 17
    for (int64_t max_tokens : {16, 17, 20, 1000}) {
        trainer.largest = 0;
        CHECK(answer_questions(trainer, questions, max_tokens) == expected);
        CHECK(trainer.largest <= max_tokens);
    }
}
TEST_CASE("generation: the prompt goes in chunks, the text comes out, and it stops where it must") {
    CountingTrainer trainer;
    trainer.config.positions = Positions::ROPE;
    Tokenizer bytes = make_tokenizer("bytes");
    GenerateOptions g;
    g.sampler.temperature = 0;
    g.tokens = 3;
    g.max_chunk = 4;
    std::string text;
    auto print = [&](const std::string& s) { text += s; };
    CHECK(generate(trainer, bytes, {256, 'x', 'x', 'x', 'x', 'a'}, g, print) == Stop::TOKENS);
    CHECK(text == "bcd");
    CHECK(trainer.seen == std::vector<std::vector<int>>{{256, 'x', 'x', 'x'}, {'x', 'a'}, {'b'}, {'c'}});
    text.clear();
    g.tokens = 1000;
    CHECK(generate(trainer, bytes, {256, 'z'}, g, print) == Stop::END_OF_TEXT);
    CHECK(text.substr(0, 5) == "{|}~\x7f");
    CHECK(text.find("<|endoftext|>") == std::string::npos);
    text.clear();
    g.endless = true;
    g.tokens = 300;
    CHECK(generate(trainer, bytes, {256, 'z'}, g, print) == Stop::TOKENS);
    CHECK(trainer.seen.back() == std::vector<int>{('z' + 299) % 257});
    CHECK(text.find("<|endoftext|>") != std::string::npos);
    text.clear();
    g.endless = false;
    g.tokens = 1000;
    trainer.config.positions = Positions::LEARNED;  // 16 positions: prompt and new text but for the last token, which is never read
    CHECK(generate(trainer, bytes, {256, 'a'}, g, print) == Stop::POSITIONS);
    CHECK(text == "bcdefghijklmnop");
    CHECK_THROWS_AS(generate(trainer, bytes, std::vector<int>(17, 'a'), g, print), Error);
    CHECK(trainer.states.empty());
    trainer.config.positions = Positions::ROPE;
    text.clear();
    g.stop = "efg";
    CHECK(generate(trainer, bytes, {256, 'a'}, g, print) == Stop::TEXT);
    CHECK(text == "bcd");
    CHECK(trainer.seen.back() == std::vector<int>{'f'});  // nothing is read behind it
    text.clear();
    g.stop = "ex";
    g.tokens = 4;  // the text ends where what it is to stop at might have begun
    CHECK(generate(trainer, bytes, {256, 'a'}, g, print) == Stop::TOKENS);
    CHECK(text == "bcde");
}

// What became of some requests.
struct Written {
    std::map<int, std::string> texts;
    std::map<int, Stop> ended;
    std::vector<int> order;  // of their ends
    GenerateStats stats;
};
static GenerateOptions many_options(int64_t chunk, int64_t sequences, double temperature) {
    GenerateOptions g;
    g.sampler.temperature = temperature;
    g.seed = 7;
    g.tokens = 9;
    g.max_chunk = chunk;
    g.max_sequences = sequences;
    g.stop = "z";
    return g;
}
static Written written(CountingTrainer& trainer, const std::vector<Request>& requests, const GenerateOptions& g) {
    trainer.config.positions = Positions::ROPE;
    Tokenizer bytes = make_tokenizer("bytes");
    Written w;
    Generator generator(
        trainer, bytes, g,
        [&](int text, const std::string& piece) {
            CHECK(!w.ended.count(text));
            w.texts[text] += piece;
        },
        [&](int text, Stop why) {
            CHECK(w.ended.emplace(text, why).second);
            w.order.push_back(text);
        });
    w.stats = generator.run(requests);
    size_t expected = 0;
    for (const Request& r : requests) expected += (size_t)r.samples;
    CHECK(w.ended.size() == expected);
    if (g.max_sequences == 1) CHECK(std::is_sorted(w.order.begin(), w.order.end()));  // first come, first served
    CHECK(trainer.states.empty());
    CHECK(trainer.pool.pages_in_use() == 0);
    CHECK(trainer.most <= (size_t)g.max_sequences);
    CHECK(w.stats.state_bytes <= 100 * (size_t)g.max_sequences);
    for (auto& call : trainer.seen) CHECK((int64_t)call.size() <= g.max_chunk);
    return w;
}
static const std::vector<Request>& some_requests() {
    static const std::vector<Request> requests = {
        {{256, 'a', 'b', 'c', 'd', 'e', 'f', 'g'}, 1}, {{256}, 2}, {{256, 'x', 'y'}, 3}, {{256, 'p'}, 1}, {{256, 'q', 'q', 'q', 'q', 'q'}, 5}};
    return requests;
}
// Every text of these requests, written alone.
static std::vector<std::string> alone(const std::vector<Request>& requests, double temperature, int64_t window = 0) {
    std::vector<std::string> texts;
    for (const Request& r : requests) {
        CountingTrainer trainer(4, 10000, window);
        for (auto& [number, text] : written(trainer, {r}, many_options(100, 100, temperature)).texts) texts.push_back(text);
    }
    return texts;
}

TEST_CASE("many texts: each is what it is alone, in whatever company") {
    const std::vector<Request>& requests = some_requests();
    for (double temperature : {0.0, 4.0}) {
        std::vector<std::string> expected = alone(requests, temperature);
        if (temperature == 0) CHECK(expected[0] == "hijklmnop");
        if (temperature > 0) CHECK(std::set<std::string>(expected.begin(), expected.end()).size() > 9);  // samples of a prompt differ
        for (int64_t chunk : {1, 2, 5, 100})
            for (int64_t sequences : {1, 2, 5, 100}) {
                CountingTrainer trainer;
                size_t i = 0;
                for (auto& [number, text] : written(trainer, requests, many_options(chunk, sequences, temperature)).texts) CHECK(text == expected[i++]);
                CHECK(i == expected.size());
            }
    }
    CountingTrainer shared;  // the samples of a prompt read it once
    written(shared, {requests[4]}, many_options(100, 100, 0));
    CHECK(shared.seen[0] == requests[4].prompt);
    CHECK(shared.seen[1].size() == 5);
}
TEST_CASE("out of pages: the last texts wait, nothing is lost, every text is what it would have been") {
    const std::vector<Request>& requests = some_requests();
    for (double temperature : {0.0, 4.0}) {
        std::vector<std::string> expected = alone(requests, temperature);
        int64_t put_back = 0;
        for (int page_size : {1, 2, 4, 16})
            for (int more : {0, 1, 3, 7})
                for (int64_t chunk : {1, 5, 100})
                    for (int64_t sequences : {1, 3, 100}) {
                        int64_t longest = 8 + 8;  // rows: the longest prompt, and its text but for the last token
                        CountingTrainer trainer(page_size, (longest + page_size - 1) / page_size + more);
                        Written w = written(trainer, requests, many_options(chunk, sequences, temperature));
                        size_t i = 0;
                        for (auto& [number, text] : w.texts) CHECK(text == expected[i++]);
                        CHECK(i == expected.size());
                        for (auto& [number, why] : w.ended) CHECK(why != Stop::MEMORY);
                        CHECK(w.stats.pages == trainer.pool.capacity);
                        // A text that ends may call another one in, which is then put back once.
                        CHECK(w.stats.put_back <= 2 * (int64_t)expected.size());
                        if (sequences == 1) CHECK(w.stats.put_back == 0);
                        put_back += w.stats.put_back;
                    }
        CHECK(put_back > 100);
    }
    // The oldest is never kept waiting: its tokens come one a call, whoever waits.
    CountingTrainer trainer(1, 20);
    Written w = written(trainer, {{{256, 'a'}, 1}, {{256, 'h'}, 1}, {{256, 'i'}, 1}}, many_options(100, 100, 0));
    CHECK(w.stats.put_back > 0);
    CHECK(w.order == std::vector<int>{0, 1, 2});
    for (size_t call = 1; call <= 8; call++) CHECK(trainer.seen[call][0] == 'a' + (int)call);
}
TEST_CASE("who comes in has room to begin beside the others") {
    GenerateOptions g = many_options(100, 4, 0);  // texts end before z
    for (Request last : {Request{{256, 'u', 'v', 'w'}, 1}, Request{{256, 'w'}, 3}}) {
        g.max_sequences = last.samples + 1;
        // When the first one ends, the second has 4 of the 9 pages; the last wants 5, and the second one more.
        CountingTrainer trainer(1, 9);
        Written w = written(trainer, {{{256, 'w'}, 1}, {{256, 's'}, 1}, last}, g);
        CHECK(w.stats.put_back == 0);
        CHECK(w.order[1] == 1);
        CountingTrainer larger(1, 10);
        w = written(larger, {{{256, 'w'}, 1}, {{256, 's'}, 1}, last}, g);
        CHECK(w.stats.put_back > 0);
    }
}
TEST_CASE("what fits into no memory ends, and says so; the others do not care") {
    GenerateOptions g = many_options(100, 100, 0);
    std::vector<int> endless(30, 'c');
    for (int64_t chunk : {1, 7, 100}) {
        g.max_chunk = chunk;
        CountingTrainer trainer(4, 5);
        Written w = written(trainer, {{{256, 'a'}, 2}, {endless, 2}, {{256, 'd'}, 1}}, g);
        CHECK(w.ended == std::map<int, Stop>{{0, Stop::TOKENS}, {1, Stop::TOKENS}, {2, Stop::MEMORY}, {3, Stop::MEMORY}, {4, Stop::TOKENS}});
        CHECK(w.texts == std::map<int, std::string>{{0, "bcdefghij"}, {1, "bcdefghij"}, {4, "efghijklm"}});
        g.tokens = 100;  // two texts that outgrow it: each comes as far as it would alone, and the token that is not read any more is written
        CountingTrainer small(4, 3);
        w = written(small, {{{256, 'A'}, 2}}, g);
        CHECK(w.ended == std::map<int, Stop>{{0, Stop::MEMORY}, {1, Stop::MEMORY}});
        CHECK(w.texts == std::map<int, std::string>{{0, "BCDEFGHIJKL"}, {1, "BCDEFGHIJKL"}});
        CHECK(w.stats.pages == 3);
        g.tokens = 9;
    }
}
TEST_CASE("a window: texts without end in a few pages, prompts longer than the pages too") {
    GenerateOptions g = many_options(16, 3, 4);
    g.window = 10;
    g.tokens = 500;
    g.stop = "";
    std::vector<Request> requests = {{{256, 'a'}, 2}, {std::vector<int>(300, 'c'), 1}, {{256, 'd'}, 3}};
    auto texts = [&](int page_size, int64_t pages, int64_t chunk) {
        g.max_chunk = chunk;
        CountingTrainer trainer(page_size, pages, g.window);
        Written w = written(trainer, requests, g);
        for (auto& [number, why] : w.ended) CHECK((why == Stop::TOKENS || why == Stop::END_OF_TEXT));
        return w.texts;
    };
    std::map<int, std::string> expected = texts(4, 10000, 16);
    CHECK(std::set<std::string>{expected[0], expected[1], expected[2], expected[3], expected[4], expected[5]}.size() == 6);
    for (int64_t chunk : {3, 16})
        for (int64_t pages : {4, 6, 9, 14})
            CHECK(texts(4, pages, chunk) == expected);  // 9 tokens behind the window's edge are in up to 3 pages, and one is written
    CHECK(texts(1, 10, 16) == expected);
    g.max_chunk = 3;
    CountingTrainer trainer(4, 14, g.window);
    written(trainer, {requests[0], requests[1]}, g);
    CHECK(trainer.most == 3);  // a prompt of 300 tokens wants no more pages than its window does
}
TEST_CASE("a conversation reads on where it is, and its answers are those of one long text") {
    Tokenizer bytes = make_tokenizer("bytes");
    for (double temperature : {0.0, 4.0})
        for (int64_t tokens : {0, 1, 5}) {
            GenerateOptions g = many_options(4, 1, temperature);
            g.tokens = tokens;
            g.stop = "";
            CountingTrainer trainer;
            trainer.config.positions = Positions::ROPE;
            Conversation c;
            std::string answer;
            Generator generator(
                trainer, bytes, g, [&](int, const std::string& piece) { answer += piece; }, [](int, Stop) {});
            std::vector<int> whole;
            size_t read = 0;
            for (std::vector<int> line : {std::vector<int>{256, 'a', 'b'}, {'x'}, {'p', 'q', 'r', 's', 't', 'u'}}) {
                whole.insert(whole.end(), line.begin(), line.end());
                answer.clear();
                Request turn = {line, 1, &c};
                generator.run({turn});
                CountingTrainer other;
                Written one = written(other, {{whole, 1}}, g);
                CHECK(answer == one.texts[0]);
                CHECK((tokens == 0 || answer.size() > 0));
                whole = c.tokens;
                CHECK(trainer.states.size() == 1);
                CHECK(trainer.states.at(c.sequence) == std::vector<int>(whole.begin(), whole.begin() + c.read));
                read = 0;
                for (auto& call : trainer.seen) read += call.size();
                CHECK(read == (size_t)c.read);  // nothing twice
            }
        }
}
TEST_CASE("a conversation at the end of its memory or positions, or interrupted") {
    Tokenizer bytes = make_tokenizer("bytes");
    GenerateOptions g = many_options(4, 1, 0);
    g.stop = "";
    volatile sig_atomic_t interrupted = 0;
    g.interrupted = &interrupted;
    CountingTrainer trainer(4, 5);
    trainer.config.positions = Positions::ROPE;
    Conversation c;
    std::string answer;
    Stop stop = Stop::TEXT;
    int ends = 0, until = -1;
    Generator generator(
        trainer, bytes, g,
        [&](int, const std::string& piece) {
            answer += piece;
            if ((int)answer.size() == until) interrupted = 1;
        },
        [&](int, Stop why) {
            stop = why;
            ends++;
        });
    auto say = [&](std::vector<int> line) {
        answer.clear();
        ends = 0;
        interrupted = 0;
        generator.run({{line, 1, &c}});
        CHECK(ends == 1);
        return answer;
    };
    until = 3;
    CHECK(say({256, 'a'}) == "bcd");
    CHECK(stop == Stop::INTERRUPTED);
    CHECK(c.tokens == std::vector<int>{256, 'a', 'b', 'c', 'd'});
    CHECK(c.read == 4);
    until = -1;
    CHECK(say({'j'}) == "klmnopqrs");
    CHECK(stop == Stop::TOKENS);
    CHECK(say({'0'}) == "12345");  // 20 tokens are in the state, one more is written
    CHECK(stop == Stop::MEMORY);
    CHECK(say({'0'}) == "");
    CHECK(stop == Stop::MEMORY);
    CHECK(trainer.states.at(c.sequence).size() == 20);
    interrupted = 1;
    Request turn = {{'x'}, 1, &c};
    generator.run({turn});
    CHECK((stop == Stop::INTERRUPTED && c.read == 20 && trainer.states.size() == 1));

    CountingTrainer learned;
    Conversation d;
    interrupted = 0;
    Generator other(
        learned, bytes, g, [&](int, const std::string& piece) { answer += piece; }, [&](int, Stop why) { stop = why; });
    other.run({{{256, 'a', 'b', 'c', 'd', 'e', 'f', 'g', 'h'}, 1, &d}});
    CHECK(stop == Stop::POSITIONS);
    CHECK(d.tokens.size() == 17);
    answer.clear();
    other.run({{{'x'}, 1, &d}});
    CHECK((stop == Stop::POSITIONS && answer.empty() && d.tokens.size() == 17));
}
TEST_CASE("interrupted: whatever is being written, read, or waits, ends") {
    volatile sig_atomic_t interrupted = 0;
    GenerateOptions g = many_options(3, 3, 4);
    g.interrupted = &interrupted;
    for (int after : {0, 1, 4, 9}) {
        int64_t pages = after == 9 ? 16 : 10000;
        interrupted = after == 0;
        struct Interrupting : CountingTrainer {
            using CountingTrainer::CountingTrainer;
            volatile sig_atomic_t* flag;
            int calls;
            void extend(const Batch& b, const std::vector<int>& s, float* logits) override {
                CountingTrainer::extend(b, s, logits);
                if (--calls == 0) *flag = 1;
            }
        } trainer(1, pages);
        trainer.flag = &interrupted;
        trainer.calls = after;
        Written w = written(trainer, some_requests(), g);
        CHECK(w.ended.size() == 12);
        CHECK(w.ended[11] == Stop::INTERRUPTED);
        CHECK((int)trainer.seen.size() <= after + 1);
    }
}
TEST_CASE("bytes of decode states") {
    ModelConfig c;
    c.set_vocab(257);
    c.layers = 2;
    c.heads = 2;
    c.channels = 16;
    parse_attention(c, "causal,lightning", {}, "");
    StateBytes bf16 = decode_state_bytes(c, "bf16"), full = decode_state_bytes(c, "float32");
    CHECK((bf16.token == 2 * 16 * 2 && full.token == 2 * 16 * 4));
    CHECK((bf16.sequence == 2 * 8 * 8 * 4 && full.sequence == bf16.sequence));
}
