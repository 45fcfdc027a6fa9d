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
#include "gpt2/evaluate.h"
#include "gpt2/generate.h"
#include "gpt2/log.h"
#include "gpt2/options.h"
#include "gpt2/run_directory.h"
#include "gpt2/sampler.h"
#include "gpt2/schedule.h"

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
    for (const OptionSpec& s : option_specs()) CHECK(seen.emplace(s.name, s.commands).second);
    for (const auto& f : attention_flags()) CHECK(!seen.count(f.first));
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
    char name[] = "/tmp/run_test_XXXXXX";
    REQUIRE(mkdtemp(name));
    Options o = parsed({"train", "--lr", "0.1", "--doc-mask", "--seed", "9007199254740992", "--data", "a \"b\"", "--window", "3", "--layers", "2"});
    resolve_options(o);
    o.positions = "learned";
    o.tokenizer = "bytes";
    write_run_config(name, o, model_config(o, 257));
    Options back = read_run_options(name);
    for (const OptionSpec& s : option_specs()) CHECK(option_json(back, s) == option_json(o, s));
    CHECK(back.attention_options == o.attention_options);
    CHECK(holds_run(name));
    ModelConfig c = model_config(o, 257), d = model_from_json(model_json(c), "test");
    CHECK(model_json(d) == model_json(c));
    unlink((std::string(name) + "/config.json").c_str());
    CHECK(!holds_run(name));
    rmdir(name);
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

// A trainer that knows the whole text by heart: the next token's id is the present one's plus one. Everything else about it is as simple as can be.
struct CountingTrainer : Trainer {
    Tensors none;
    std::vector<std::vector<int>> seen;  // the tokens of each extend()
    int64_t largest = 0;
    CountingTrainer() {
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
    int created = 0;
    size_t most = 0;  // living at the same time
    void extend(const Batch& b, const std::vector<int>& sequences, float* logits) override {
        seen.push_back(b.tokens);
        REQUIRE(b.cu_seqlens.size() == sequences.size() + 1);
        CHECK((b.cu_seqlens.back() == (int)b.tokens.size() && b.targets.size() == b.tokens.size()));
        CHECK(std::set<int>(sequences.begin(), sequences.end()).size() == sequences.size());
        for (size_t s = 0; s < sequences.size(); s++) {
            std::vector<int>& state = states.at(sequences[s]);
            state.insert(state.end(), b.tokens.begin() + b.cu_seqlens[s], b.tokens.begin() + b.cu_seqlens[s + 1]);
            write(state.back(), logits + 257 * s);
        }
    }
    void initialise(uint64_t) override {}
    void backward() override {}
    double update(const AdamW&) override { return 0; }
    int new_sequence() override {
        states[created];
        most = std::max(most, states.size());
        return created++;
    }
    int fork_sequence(int s) override {
        int fork = new_sequence();
        states[fork] = states.at(s);
        return fork;
    }
    void free_sequence(int s) override { CHECK(states.erase(s) == 1); }
    size_t state_bytes() override { return 100 * states.size(); }
    const Tensors& parameters() override { return none; }
    void get(Section, int, float*) override {}
    void set(Section, int, const float*) override {}
    std::vector<float> get_memory() override { return {}; }
    void set_memory(const std::vector<float>&) override {}
    size_t parameter_bytes() override { return 0; }
    size_t gradient_bytes() override { return 0; }
    size_t activation_bytes() override { return 0; }
};

TEST_CASE("loss: every token but the first is scored once, whatever the windows") {
    CountingTrainer trainer;
    Dataset data = text_dataset("test", "abcdefghijklmnopqrstuvw<|endoftext|>xyz", make_tokenizer("bytes"));
    double sum = 0;
    for (int64_t i = 1; i < data.num_tokens; i++) sum += (double)data[i];
    for (int64_t seq : {1, 2, 5, 16, 27, 100})
        for (int64_t rows : {1, 3, 50})
            for (bool mask : {false, true}) {
                LossResult r = evaluate_loss(trainer, data, {seq, rows, 0, mask});
                CHECK(r.tokens == data.num_tokens - 1);
                CHECK(r.bytes == data.num_tokens - 2);
                CHECK(r.loss == doctest::Approx(sum / (double)r.tokens).epsilon(1e-12));
            }
    CHECK(evaluate_loss(trainer, data, {5, 2, 3, false}).tokens == 15);
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
TEST_CASE("many texts: each is what it is alone, in whatever company") {
    Tokenizer bytes = make_tokenizer("bytes");
    std::vector<Request> requests = {
        {{256, 'a', 'b', 'c', 'd', 'e', 'f', 'g'}, 1}, {{256}, 2}, {{256, 'x', 'y'}, 3}, {{256, 'p'}, 1}, {{256, 'q', 'q', 'q', 'q', 'q'}, 5}};
    auto texts = [&](CountingTrainer& trainer, const std::vector<Request>& some, int64_t chunk, int64_t sequences, double temperature) {
        trainer.config.positions = Positions::ROPE;
        GenerateOptions g;
        g.sampler.temperature = temperature;
        g.seed = 7;
        g.tokens = 9;
        g.max_chunk = chunk;
        g.max_sequences = sequences;
        g.stop = "z";
        std::map<int, std::string> out;
        std::map<int, int> ended;
        std::vector<int> order;
        Generator generator(
            trainer, bytes, g, [&](int text, const std::string& piece) { out[text] += piece; },
            [&](int text, Stop) {
                ended[text]++;
                order.push_back(text);
            });
        GenerateStats stats = generator.run(some);
        size_t expected = 0;
        for (const Request& r : some) expected += (size_t)r.samples;
        CHECK((out.size() == expected && ended.size() == expected));
        for (auto& [text, times] : ended) CHECK(times == 1);
        if (sequences == 1) CHECK(std::is_sorted(order.begin(), order.end()));  // first come, first served
        CHECK(trainer.states.empty());
        CHECK(trainer.most <= (size_t)sequences);
        CHECK(stats.state_bytes <= 100 * (size_t)sequences);
        for (auto& call : trainer.seen) CHECK((int64_t)call.size() <= chunk);
        return out;
    };
    for (double temperature : {0.0, 4.0}) {
        std::vector<std::string> alone;
        for (const Request& r : requests) {
            CountingTrainer trainer;
            for (auto& [number, text] : texts(trainer, {r}, 100, 100, temperature)) alone.push_back(text);
        }
        if (temperature == 0) CHECK(alone[0] == "hijklmnop");
        if (temperature > 0) CHECK(std::set<std::string>(alone.begin(), alone.end()).size() > 9);  // samples of a prompt differ
        for (int64_t chunk : {1, 2, 5, 100})
            for (int64_t sequences : {1, 2, 5, 100}) {
                CountingTrainer trainer;
                size_t i = 0;
                for (auto& [number, text] : texts(trainer, requests, chunk, sequences, temperature)) CHECK(text == alone[i++]);
            }
    }
    CountingTrainer shared;  // the samples of a prompt read it once
    texts(shared, {requests[4]}, 100, 100, 0);
    CHECK(shared.seen[0] == requests[4].prompt);
    CHECK(shared.seen[1].size() == 5);
}
