// The program around a trainer: ./train_gpt2 train|eval|generate|info. A unit of its own, linked with either trainer: it computes nothing itself, so it is
// compiled without -O3, beside the trainer, and once for both.

#include <csignal>
#include <cstdio>
#include <exception>
#include <fstream>
#include <iostream>
#include <new>
#include <string>
#include <unistd.h>

#include "../attention.h"  // the list of attention layers and their options
#include "checkpoint.h"
#include "error.h"
#include "evaluate.h"
#include "generate.h"
#include "info.h"
#include "loop.h"
#include "options.h"
#include "program.h"

// A trained model, ready to be asked.
struct LoadedModel {
    RunState state;
    Tokenizer tokenizer;
    std::unique_ptr<Trainer> trainer;
};

static LoadedModel load_trained(const Options& o, int64_t min_tokens) {
    if (o.checkpoint.empty()) usage_error("no model: give --checkpoint DIR, a run's directory or one of its step_... directories");
    std::string directory = find_checkpoint(o.checkpoint), path = directory + "/state.json";
    LoadedModel m;
    m.state = read_state(directory);
    m.tokenizer = tokenizer_of(m.state, path);
    ModelConfig config = model_from_json(m.state.model, path);
    if (config.vocab_size != m.tokenizer.vocab_size)
        data_error("'%s': the model's vocabulary of %d is not the tokenizer's; take another checkpoint", path.c_str(), config.vocab_size);
    if (m.state.seq > config.max_seq) data_error("'%s': seq is longer than the model's longest sequence; take another checkpoint", path.c_str());
    TrainerOptions t;
    t.training = false;
    t.dtype = o.dtype;
    t.max_tokens = std::max<int64_t>(min_tokens, config.max_seq);
    m.trainer = make_trainer(config, t);
    load_model(directory, *m.trainer);
    fprintf(stderr, "%s: step %lld, %lld parameters\n", directory.c_str(), (long long)m.state.step, (long long)m.trainer->parameters().size());
    return m;
}

static int evaluate(const Options& o) {
    constexpr int64_t batch_tokens = 4096;
    if (o.data.empty()) usage_error("no data: give --data FILE, a text, token shards or, with --recall, a file of questions");
    bool only_questions = o.recall && is_questions_file(o.data);
    LoadedModel m = load_trained(o, batch_tokens);
    std::vector<Question> questions;
    if (o.recall && !m.tokenizer.text) data_error("--recall asks in words, the model reads token ids: take a model of bytes");
    if (o.recall) questions = read_questions(only_questions ? o.data : questions_path(o.data), m.tokenizer);
    if (!only_questions) {
        Dataset data = open_dataset(o.data, m.tokenizer);
        LossOptions l;
        l.seq = m.state.seq;
        l.rows = std::max<int64_t>(1, batch_tokens / l.seq);
        l.doc_mask = m.state.doc_mask;
        LossResult r = evaluate_loss(*m.trainer, data, l);
        if (!std::isfinite(r.loss))
            data_error("the loss is not finite: the model's training diverged, or the data has nothing to score; take an earlier checkpoint");
        printf("loss %.6f | perplexity %.4f", r.loss, std::exp(r.loss));
        if (m.tokenizer.text && r.bytes) printf(" | bits per byte %.4f", r.bits_per_byte());
        printf(" | %lld tokens\n", (long long)r.tokens);
    }
    if (o.recall) print_recall(questions, answer_questions(*m.trainer, questions, std::max<int64_t>(batch_tokens, m.trainer->config.max_seq)));
    return 0;
}

// The lines of a file, or of standard input; the last one needs no end.
static std::vector<std::string> read_lines(const std::string& path) {
    std::ifstream file;
    if (path != "-") {
        file.open(path);
        if (!file) data_error("cannot read '%s': %s", path.c_str(), strerror(errno));
    }
    std::istream& in = path == "-" ? std::cin : file;
    std::vector<std::string> lines;
    for (std::string line; std::getline(in, line);) lines.push_back(line);
    if (in.bad()) data_error("cannot read '%s': %s", path.c_str(), strerror(errno));
    if (lines.empty()) data_error("there is no prompt in '%s': give one a line", path.c_str());
    return lines;
}

static const char* stop_text(Stop stop) {
    return stop == Stop::END_OF_TEXT ? "end of text" : stop == Stop::TEXT ? "stop" : stop == Stop::POSITIONS ? "positions" : "tokens";
}

// A single text is streamed. Of several, the first that has not ended is, and the others follow in their order; as JSON they come as they end.
static int generate_text(const Options& o) {
    constexpr int64_t chunk = 512;
    if (o.is_given("prompt") && o.is_given("prompts")) usage_error("--prompt and --prompts are both given: give one of them");
    std::vector<std::string> prompts = o.is_given("prompts") ? read_lines(o.prompts) : std::vector<std::string>{o.prompt};
    LoadedModel m = load_trained(o, chunk);
    std::vector<Request> requests;
    for (const std::string& prompt : prompts) {
        requests.push_back({{m.tokenizer.end_of_text}, (int)o.samples});
        for (int token : m.tokenizer.encode(prompt)) requests.back().prompt.push_back(token);
    }
    GenerateOptions g;
    g.sampler = {o.temperature, o.top_k, o.top_p, o.min_p, o.repetition_penalty};
    g.seed = (uint64_t)o.seed;
    g.tokens = o.tokens;
    g.max_chunk = chunk;
    g.max_sequences = o.parallel;
    g.stop = o.stop;

    int texts = (int)(prompts.size() * o.samples), current = 0;
    std::vector<std::string> waiting(texts);  // what has been written of texts behind the current one
    std::vector<bool> ended(texts);
    Stop last = Stop::TOKENS;
    auto print = [](const std::string& text) {
        if (fwrite(text.data(), 1, text.size(), stdout) != text.size() || fflush(stdout) != 0)
            data_error("cannot write to standard output: %s", strerror(errno));
    };
    auto begin = [&](int text) {
        if (texts == 1 || o.jsonl) return;
        print(format("%s--- prompt %d, sample %d\n", text > 0 ? "\n" : "", text / (int)o.samples + 1, text % (int)o.samples + 1));
    };
    begin(0);
    Generator generator(
        *m.trainer, m.tokenizer, g,
        [&](int text, const std::string& piece) {
            if (o.jsonl || text != current)
                waiting[text] += piece;
            else if (!piece.empty())
                print(piece);
        },
        [&](int text, Stop stop) {
            last = stop;
            ended[text] = true;
            if (o.jsonl) {
                nlohmann::ordered_json line = {{"prompt", text / o.samples}, {"sample", text % o.samples}, {"text", waiting[text]}, {"ended", stop_text(stop)}};
                print(line.dump() + "\n");
                return;
            }
            while (current < texts && ended[current]) {
                if (++current == texts) break;
                begin(current);
                print(waiting[current]);
                waiting[current].clear();
            }
        });
    GenerateStats stats = generator.run(requests);
    if (isatty(STDOUT_FILENO) && !o.jsonl) fprintf(stderr, "\n");
    if (texts == 1 && last == Stop::POSITIONS) fprintf(stderr, "stopped: all of the model's %d positions are used up\n", m.trainer->config.max_seq);
    if (texts == 1 && last == Stop::END_OF_TEXT) fprintf(stderr, "stopped: the model ended its text\n");
    auto rate = [](int64_t tokens, double seconds) { return seconds > 0 ? (double)tokens / seconds : 0; };
    fprintf(stderr, "prefill %lld tokens, %.0f tokens/s | decode %lld tokens, %.0f tokens/s | state %s\n", (long long)stats.prefill_tokens,
            rate(stats.prefill_tokens, stats.prefill_seconds), (long long)stats.decode_tokens, rate(stats.decode_tokens, stats.decode_seconds),
            bytes_text((double)stats.state_bytes).c_str());
    return 0;
}

static int run_command(int argc, char** argv) {
    Options o;
    if (!parse_command_line(argc, argv, o)) return 0;
    if (o.command == "train") return train(o);
    set_threads(o.threads);
    if (o.command == "eval") return evaluate(o);
    if (o.command == "generate") return generate_text(o);
    return print_info(o);
}

int run_program(int argc, char** argv) {
    signal(SIGXFSZ, SIG_IGN);  // a file over the limit becomes an error of write(), which says which file
    try {
        int status = run_command(argc, argv);
        if (fflush(stdout) != 0 || ferror(stdout)) data_error("cannot write to standard output: %s", strerror(errno));
        return status;
    } catch (const Error& e) {
        fflush(stdout);
        fprintf(stderr, "error: %s\n", e.what());
        return e.exit_code;
    } catch (const std::bad_alloc&) {
        fflush(stdout);
        fprintf(stderr, "error: not enough memory: use a smaller model, --batch or --seq\n");
        return EXIT_DATA;
    } catch (const std::exception& e) {  // a library's: JSON of the wrong kind in a file that something else wrote, say
        fflush(stdout);
        fprintf(stderr, "error: %s\n", e.what());
        return EXIT_DATA;
    }
}
