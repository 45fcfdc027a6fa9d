// The program around a trainer: ./train_gpt2 train|eval|generate|info|convert. A unit of its own, linked with either trainer: it computes nothing itself, so it
// is compiled without -O3, beside the trainer, and once for both.

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
#include "choices.h"
#include "convert.h"
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
    if (o.checkpoint.empty())
        usage_error("no model: give --checkpoint DIR, a run's directory or one of its step_... directories, or a model of another program");
    ModelFile file = open_model(o.checkpoint);
    if (!o.tokenizer.empty()) choose_tokenizer(file, o.tokenizer);
    const std::string& path = file.path;
    const ModelConfig& config = file.config;
    LoadedModel m;
    m.state = file.state;
    m.tokenizer = file.tokenizer;
    if (m.state.seq > config.max_seq) data_error("'%s': seq is longer than the model's longest sequence; take another checkpoint", path.c_str());
    if (o.window > 0 && config.positions == Positions::LEARNED)
        usage_error("--window %lld: the model's %d positions are learned, and no window slides beyond them: leave it out, or train with --positions rope",
                    (long long)o.window, config.max_seq);
    if (o.carry_memory) check_carry_memory(config);
    TrainerOptions t;
    t.training = false;
    t.dtype = o.dtype;
    t.page_size = (int)o.page_size;
    t.pages = o.pages;
    t.window = o.window;
    t.lanes = o.carry_memory ? 1 : 0;
    t.max_tokens = std::max<int64_t>(min_tokens, config.max_seq);
    m.trainer = make_trainer(config, t);
    load_weights(file, *m.trainer);
    fprintf(stderr, "%s: step %lld, %lld parameters\n", path.c_str(), (long long)m.state.step, (long long)m.trainer->parameters().size());
    return m;
}

static int evaluate(const Options& o) {
    constexpr int64_t batch_tokens = 4096;
    if (o.data.empty() && (o.choices.empty() || o.recall))
        usage_error("no data: give --data FILE, a text, token shards or, with --recall, a file of questions; or --choices FILE");
    if (o.stride && o.carry_memory) usage_error("--stride and --carry-memory are both given: give one of them");
    bool only_questions = o.recall && is_questions_file(o.data);
    LoadedModel m = load_trained(o, batch_tokens);
    if (o.stride > m.state.seq)
        usage_error("--stride %lld is more than the %lld tokens of a window: give less", (long long)o.stride, (long long)m.state.seq);
    std::vector<Question> questions;
    std::vector<MultipleChoice> choices;
    if (o.recall && !m.tokenizer.text) data_error("--recall asks in words, the model reads token ids: take a model of bytes");
    if (o.recall) questions = read_questions(only_questions ? o.data : questions_path(o.data), m.tokenizer);
    if (!o.choices.empty()) choices = read_choices(o.choices, m.tokenizer);
    if (!o.data.empty() && !only_questions) {
        Dataset data = open_dataset(o.data, m.tokenizer);
        LossOptions l;
        l.seq = m.state.seq;
        l.rows = std::max<int64_t>(1, batch_tokens / l.seq);
        l.doc_mask = m.state.doc_mask;
        l.stride = o.stride;
        l.carry_memory = o.carry_memory;
        l.tokenizer = &m.tokenizer;
        LossResult r = evaluate_loss(*m.trainer, data, l);
        if (!std::isfinite(r.loss))
            data_error("the loss is not finite: the model's training diverged, or the data has nothing to score; take an earlier checkpoint");
        printf("loss %.6f | perplexity %.4f", r.loss, std::exp(r.loss));
        if (r.bytes) printf(" | bits per byte %.4f", r.bits_per_byte());
        printf(" | %lld tokens\n", (long long)r.tokens);
    }
    int64_t most = std::max<int64_t>(batch_tokens, m.trainer->config.max_seq);
    if (o.recall) print_recall(questions, answer_questions(*m.trainer, questions, most));
    if (!choices.empty()) print_choices(choices, choose(*m.trainer, choices, m.tokenizer.end_of_text, most));
    return 0;
}

// The lines of a file, or of standard input; the last one needs no end.
static std::vector<std::string> read_lines(const std::string& path) {
    std::ifstream file;
    if (path != "-") {
        file.open(path);
        if (!file) file_error("read", path, errno);
    }
    std::istream& in = path == "-" ? std::cin : file;
    std::vector<std::string> lines;
    for (std::string line; std::getline(in, line);) lines.push_back(line);
    if (in.bad()) file_error("read", path, errno);
    if (lines.empty()) data_error("there is no prompt in '%s': give one a line", path.c_str());
    return lines;
}

static void print(const std::string& text) {
    if (fwrite(text.data(), 1, text.size(), stdout) != text.size() || fflush(stdout) != 0) data_error("cannot write to standard output: %s", strerror(errno));
}

static std::string memory_is_full(const Options& o, const ModelConfig& c, const GenerateStats& stats) {
    const char* window = c.positions == Positions::LEARNED ? "" : o.window > 0 ? ", or a smaller --window" : ", or a --window that slides";
    return format("the state is full: %lld page%s of %lld tokens; give more --pages%s", (long long)stats.pages, stats.pages == 1 ? "" : "s",
                  (long long)o.page_size, window);
}

// How MLA layers go about new tokens: the choice is made at each call, from their number and that of the tokens before them (mla_form in attention.h).
static void print_mla_forms(const ModelConfig& config) {
    std::string last;
    for (const AttentionConfig& a : config.attention) {
        if (a.name != "mla") continue;
        double most = std::ceil(mla_crossover(MlaShape(a))) - 1;
        std::string text = std::isinf(most) ? "whatever follows absorbed"
                           : most < 1       ? "whatever follows, too"
                                            : format("behind a long past up to %.0f new tokens at once absorbed, more un-absorbed", most);
        if (text != last) fprintf(stderr, "mla: the beginning un-absorbed; %s\n", text.c_str());
        last = text;
    }
}

static void print_statistics(const Options& o, const ModelConfig& config, const GenerateStats& stats) {
    auto rate = [](int64_t tokens, double seconds) { return seconds > 0 ? (double)tokens / seconds : 0; };
    std::string put_back = stats.put_back ? format(" | put back to wait %lld times", (long long)stats.put_back) : "";
    fprintf(stderr, "prefill %lld tokens, %.0f tokens/s | decode %lld tokens, %.0f tokens/s | state %s: %s%s\n", (long long)stats.prefill_tokens,
            rate(stats.prefill_tokens, stats.prefill_seconds), (long long)stats.decode_tokens, rate(stats.decode_tokens, stats.decode_seconds),
            bytes_text((double)stats.state_bytes).c_str(), state_bytes_text(decode_state_bytes(config, o.dtype)).c_str(), put_back.c_str());
}

// A single text is streamed. Of several, the first that has not ended is, and the others follow in their order; as JSON they come as they end.
// Texts that do not fit into memory are cut short, and said to be; if not even one could begin, the exit status says so.
static int write_texts(const Options& o, LoadedModel& m, const GenerateOptions& g, const std::vector<std::string>& prompts) {
    std::vector<Request> requests;
    for (const std::string& prompt : prompts) {
        requests.push_back({{m.tokenizer.end_of_text}, (int)o.samples});
        for (int token : m.tokenizer.encode(prompt)) requests.back().prompt.push_back(token);
    }
    int texts = (int)(prompts.size() * o.samples), current = 0, cut = 0, empty = 0;
    std::vector<std::string> waiting(texts);  // what has been written of texts behind the current one
    std::vector<bool> begun(texts), ended(texts);
    Stop last = Stop::TOKENS;
    auto begin = [&](int text) {
        if (texts == 1 || o.jsonl) return;
        print(format("%s--- prompt %d, sample %d\n", text > 0 ? "\n" : "", text / (int)o.samples + 1, text % (int)o.samples + 1));
    };
    begin(0);
    Generator generator(
        *m.trainer, m.tokenizer, g,
        [&](int text, const std::string& piece) {
            begun[text] = true;
            if (o.jsonl || text != current)
                waiting[text] += piece;
            else if (!piece.empty())
                print(piece);
        },
        [&](int text, Stop stop) {
            last = stop;
            ended[text] = true;
            cut += stop == Stop::MEMORY;
            empty += stop == Stop::MEMORY && !begun[text];
            if (o.jsonl) {
                nlohmann::ordered_json line = {
                    {"prompt", text / o.samples}, {"sample", text % o.samples}, {"text", waiting[text]}, {"ended", stop_names[(int)stop]}};
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
    const ModelConfig& config = m.trainer->config;
    if (empty == texts) data_error("no text could begin: %s", memory_is_full(o, config, stats).c_str());
    if (cut > 0) fprintf(stderr, "stopped%s: %s\n", texts > 1 ? format(" %d of %d texts", cut, texts).c_str() : "", memory_is_full(o, config, stats).c_str());
    if (texts == 1 && last == Stop::POSITIONS) fprintf(stderr, "stopped: all of the model's %d positions are used up\n", config.max_seq);
    if (texts == 1 && last == Stop::END_OF_TEXT) fprintf(stderr, "stopped: the model ended its text\n");
    print_statistics(o, config, stats);
    return 0;
}

// In a conversation ctrl-C ends the answer that is being written; behind that, and where none is, it ends the program as it would have without us.
static volatile sig_atomic_t interrupted = 0, answering = 0;
static void catch_interrupts() {
    struct sigaction action = {};
    action.sa_handler = [](int s) {
        if (answering && !interrupted) {
            interrupted = 1;
        } else {
            signal(s, SIG_DFL);
            raise(s);
        }
    };
    action.sa_flags = SA_RESTART;
    sigaction(SIGINT, &action, nullptr);
}

// Each line goes behind what there is, and the model goes on behind it. A line begins on a line of its own: a line feed is put in where there is none.
static int converse(const Options& o, LoadedModel& m, GenerateOptions g) {
    const ModelConfig& config = m.trainer->config;
    bool terminal = isatty(STDIN_FILENO);
    Stop stop = Stop::TOKENS;
    g.max_sequences = 1;
    g.interrupted = &interrupted;
    Generator generator(
        *m.trainer, m.tokenizer, g, [&](int, const std::string& piece) { print(piece); }, [&](int, Stop why) { stop = why; });
    Conversation conversation;
    GenerateStats stats;
    catch_interrupts();
    while (stop != Stop::POSITIONS && stop != Stop::MEMORY) {
        if (terminal) fprintf(stderr, "> ");
        std::string line;
        if (!std::getline(std::cin, line) || line.find_first_not_of(" \t\r") == std::string::npos) break;
        Request turn;
        turn.conversation = &conversation;
        if (conversation.tokens.empty()) conversation.tokens = {m.tokenizer.end_of_text};
        int before = conversation.tokens.back();
        std::string end = m.tokenizer.decode(before);
        bool own_line = before == m.tokenizer.end_of_text || (!end.empty() && end.back() == '\n');
        try {
            turn.prompt = m.tokenizer.encode(own_line ? line : "\n" + line);
        } catch (const Error& e) {  // the next line may be better
            fprintf(stderr, "error: %s\n", e.what());
            continue;
        }
        interrupted = 0;
        answering = 1;
        stats = generator.run({turn});
        answering = 0;
        print("\n");
    }
    if (terminal && !std::cin) fprintf(stderr, "\n");
    if (std::cin.bad()) data_error("cannot read standard input: %s", strerror(errno));
    if (stop == Stop::POSITIONS) fprintf(stderr, "stopped: all of the model's %d positions are used up\n", config.max_seq);
    if (stop == Stop::MEMORY) fprintf(stderr, "stopped: %s\n", memory_is_full(o, config, stats).c_str());
    print_statistics(o, config, stats);
    return 0;
}

static int generate_text(const Options& o) {
    constexpr int64_t chunk = 512;
    if (o.is_given("prompt") && o.is_given("prompts")) usage_error("--prompt and --prompts are both given: give one of them");
    for (const char* other : {"prompt", "prompts", "jsonl", "samples"})
        if (o.interactive && o.is_given(other)) usage_error("--interactive and --%s are both given: give one of them", other);
    std::vector<std::string> prompts = o.is_given("prompts") ? read_lines(o.prompts) : std::vector<std::string>{o.prompt};
    LoadedModel m = load_trained(o, chunk);
    print_mla_forms(m.trainer->config);
    GenerateOptions g;
    g.sampler = {o.temperature, o.top_k, o.top_p, o.min_p, o.repetition_penalty};
    g.seed = (uint64_t)o.seed;
    g.tokens = o.tokens;
    g.max_chunk = chunk;
    g.max_sequences = o.parallel;
    g.window = o.window;
    g.stop = o.stop;
    g.endless = o.endless;
    return o.interactive ? converse(o, m, g) : write_texts(o, m, g, prompts);
}

static int run_command(int argc, char** argv) {
    Options o;
    if (!parse_command_line(argc, argv, o)) return 0;
    if (o.command == "train") return train(o);
    set_threads(o.threads);
    if (o.command == "eval") return evaluate(o);
    if (o.command == "generate") return generate_text(o);
    if (o.command == "convert") {
        convert({o.checkpoint, o.to, o.out, o.store, o.tokenizer});
        return 0;
    }
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
