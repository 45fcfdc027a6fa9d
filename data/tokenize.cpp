// tokenize: texts to token shards and back, and vocabularies of one's own.
//
//     tokenize encode --tokenizer bytes|DIR [--documents] FILE... -o OUT.bin
//     tokenize decode --tokenizer bytes|DIR IN.bin -o FILE
//     tokenize train --vocab N FILE... -o DIR
//
// DIR holds encoder.json and vocab.bpe, GPT-2's or what `train` wrote. Any bytes can be encoded, and decode gives them back. Only with --documents is
// <|endoftext|> more than text: it separates documents, and each of them starts with the end-of-text token, as where training reads a text.
// Files are read in blocks, by all threads; the result depends neither on their number nor on the blocks.

#include <algorithm>
#include <atomic>
#include <chrono>
#include <csignal>
#include <cstdio>
#include <memory>
#include <new>
#include <string>
#include <vector>

#include "../gpt2/bpe_train.h"
#include "../gpt2/cli.h"
#include "../gpt2/corpus.h"
#include "../gpt2/error.h"
#include "../gpt2/files.h"
#include "../gpt2/log.h"
#include "../gpt2/shards.h"
#include "../gpt2/tokenizer.h"

struct TokenizeOptions {
    std::string tokenizer, out;
    std::vector<std::string> files;
    bool documents = false;
    int64_t vocab = 0, threads = 0;
};

// ----------------------------------------------------------------------------
// Signals: what was begun is removed, and the program ends as it would have without us.

static volatile sig_atomic_t signal_caught = 0;
struct Interrupted {};

static void catch_signals() {
    struct sigaction action = {};
    action.sa_handler = [](int s) { signal_caught = s; };
    action.sa_flags = (int)SA_RESETHAND;
    for (int s : {SIGINT, SIGTERM, SIGHUP}) sigaction(s, &action, nullptr);
    signal(SIGXFSZ, SIG_IGN);  // a file over the limit becomes an error of write(), which says which file
}
static void stop_if_interrupted() {
    if (signal_caught) throw Interrupted();
}

// ----------------------------------------------------------------------------

// One line on a terminal, rewritten five times a second.
class Bar {
    using Clock = std::chrono::steady_clock;
    bool terminal = isatty(STDERR_FILENO), open = false;
    Clock::time_point begun = Clock::now(), shown = begun;

 public:
    ~Bar() { clear(); }
    double seconds() const { return std::chrono::duration<double>(Clock::now() - begun).count(); }
    // `all`: 0 if it is not known.
    void show(const char* what, double done, double all, const char* unit) {
        Clock::time_point now = Clock::now();
        if (!terminal || now - shown < std::chrono::milliseconds(200)) return;
        shown = now;
        open = true;
        double rate = done / std::max(seconds(), 1e-9);
        fprintf(stderr, "\r\033[K%s", what);
        if (all > 0) {
            double share = std::min(1.0, done / all);
            int filled = (int)(share * 30);
            fprintf(stderr, " [%s%s] %3.0f %%", std::string(filled, '=').c_str(), std::string(30 - filled, ' ').c_str(), 100 * share);
        }
        fprintf(stderr, " | %.1f %s | %.1f %s/s", done, unit, rate, unit);
        if (all > 0 && rate > 0) fprintf(stderr, " | ETA %s", duration_text(std::max(0.0, all - done) / rate).c_str());
        fflush(stderr);
    }
    void clear() {
        if (open) fprintf(stderr, "\r\033[K");
        open = false;
    }
};

static BlockOptions block_options(bool words, bool documents) {
    BlockOptions b;
    b.words = words;
    b.documents = documents;
    b.round = std::max(b.round, (size_t)num_threads() * 4 * b.block);
    return b;
}

// Bytes of all files, or 0 if that is not known.
static double total_size(const std::vector<std::string>& files) {
    double total = 0;
    for (const std::string& file : files) {
        struct stat st;
        if (stat(file.c_str(), &st) != 0 || !S_ISREG(st.st_mode)) return 0;
        total += (double)st.st_size;
    }
    return total;
}

static void refuse_to_overwrite_input(const TokenizeOptions& o) {
    struct stat in, out;
    for (const std::string& file : o.files)
        if (stat(file.c_str(), &in) == 0 && stat(o.out.c_str(), &out) == 0 && in.st_dev == out.st_dev && in.st_ino == out.st_ino)
            usage_error("'%s' is both read and written: choose another -o", o.out.c_str());
}

[[noreturn]] static void refuse_no_text(const std::vector<std::string>& files) { data_error("'%s' holds no text: name another file", files[0].c_str()); }

static Tokenizer text_tokenizer(const std::string& name) {
    Tokenizer t = make_tokenizer(name);
    if (!t.text) usage_error("--tokenizer is '%s', which knows no text: choose bytes, or a directory that holds encoder.json and vocab.bpe", name.c_str());
    return t;
}

static void encode(const TokenizeOptions& o) {
    Tokenizer tokenizer = text_tokenizer(o.tokenizer);
    std::vector<CorpusEncoder> encoders;
    for (int i = 0; i < num_threads(); i++) encoders.emplace_back(tokenizer);
    std::vector<EncodedPart> parts;
    std::atomic<bool> separators = false;
    double bytes = 0, all = total_size(o.files);
    refuse_to_overwrite_input(o);
    Bar bar;
    ShardWriter out(o.out, tokenizer.vocab_size <= 65536 ? 2 : 4);
    for (const std::string& file : o.files) {
        TextBlocks text(file, block_options(tokenizer.bpe != nullptr, o.documents));
        bool within = false;  // a document
        while (true) {
            const std::vector<std::string_view>& blocks = text.next();
            if (blocks.empty()) break;
            parts.resize(std::max(parts.size(), blocks.size()));
            in_parallel(blocks.size(), [&](size_t i) {
                CorpusEncoder& encoder = encoders[thread_number()];
                if (o.documents) return encoder.encode(blocks[i], parts[i]);
                parts[i].tokens.clear();
                encoder.encode_text(blocks[i], parts[i].tokens);
                if (!separators && blocks[i].find(document_separator) != std::string_view::npos) separators = true;
            });
            for (size_t i = 0; i < blocks.size(); i++) {
                size_t skip = o.documents && within && parts[i].begins_within;
                out.write(parts[i].tokens.data() + skip, parts[i].tokens.size() - skip);
                within = parts[i].ends_within;
            }
            stop_if_interrupted();
            bar.show("encoding", (bytes + (double)text.bytes_read) / 1e6, all / 1e6, "MB");
        }
        bytes += (double)text.bytes_read;
    }
    if (out.tokens() == 0) refuse_no_text(o.files);
    out.close();
    bar.clear();
    if (separators) fprintf(stderr, "note: %s was found, and encoded as text; with --documents it separates documents\n", document_separator.data());
    printf("%s: %lld tokens, %.0f bytes, %.2f bytes a token, %.1f MB/s\n", o.out.c_str(), (long long)out.tokens(), bytes, bytes / (double)out.tokens(),
           bytes / 1e6 / bar.seconds());
}

static void decode(const TokenizeOptions& o) {
    Tokenizer tokenizer = text_tokenizer(o.tokenizer);
    Shard in = open_shard(std::make_shared<MappedFile>(o.files[0]));
    refuse_to_overwrite_input(o);
    std::unique_ptr<AtomicFile> file;
    if (o.out != "-") file = std::make_unique<AtomicFile>(o.out);
    Bar bar;
    std::string text;
    double bytes = 0;
    for (int64_t i = 0; i < in.count; i++) {
        int64_t token = in[i];
        if (token >= tokenizer.vocab_size)
            data_error("token %lld at position %lld of '%s' is outside the vocabulary of %d: choose the --tokenizer that the file was made with",
                       (long long)token, (long long)i, o.files[0].c_str(), tokenizer.vocab_size);
        if (token != tokenizer.end_of_text)
            text += tokenizer.decode((int)token);
        else if (i > 0)
            text.append(document_separator).append("\n");
        if (text.size() < 1 << 20 && i + 1 < in.count) continue;
        if (file)
            file->write(text.data(), text.size());
        else if (fwrite(text.data(), 1, text.size(), stdout) != text.size() || fflush(stdout) != 0)
            data_error("cannot write to standard output: %s", strerror(errno));
        bytes += (double)text.size();
        text.clear();
        stop_if_interrupted();
        bar.show("decoding", (double)i / 1e6, (double)in.count / 1e6, "million tokens");
    }
    if (file) file->commit();
    bar.clear();
    if (file) printf("%s: %.0f bytes, %lld tokens\n", o.out.c_str(), bytes, (long long)in.count);
}

static void train(const TokenizeOptions& o) {
    for (const char* name : {"/encoder.json", "/vocab.bpe"})
        if (access((o.out + name).c_str(), F_OK) == 0) usage_error("'%s' holds a vocabulary: move it away, or choose another -o", o.out.c_str());
    Bar bar;
    double bytes = 0, all = total_size(o.files);
    std::vector<WordCounts> counts(num_threads());
    for (const std::string& file : o.files) {
        TextBlocks text(file, block_options(true, true));
        while (true) {
            const std::vector<std::string_view>& blocks = text.next();
            if (blocks.empty()) break;
            in_parallel(blocks.size(), [&](size_t i) { counts[thread_number()].add_corpus(blocks[i]); });
            stop_if_interrupted();
            bar.show("counting", (bytes + (double)text.bytes_read) / 1e6, all / 1e6, "MB");
        }
        bytes += (double)text.bytes_read;
    }
    if (bytes == 0) refuse_no_text(o.files);
    for (size_t i = 1; i < counts.size(); i++) counts[0].take(counts[i]);
    BpeTrainer trainer(counts[0]);
    size_t merges = (size_t)o.vocab - 257;
    while (trainer.merges.size() < merges && trainer.step()) {
        stop_if_interrupted();
        bar.show("merging", (double)trainer.merges.size(), (double)merges, "merges");
    }
    std::string json, list;
    trainer.write(json, list);
    make_directories(o.out);
    AtomicFile encoder(o.out + "/encoder.json"), vocab(o.out + "/vocab.bpe");
    encoder.write(json.data(), json.size());
    vocab.write(list.data(), list.size());
    encoder.commit();
    vocab.commit();
    bar.clear();
    size_t tokens = trainer.merges.size() + 257;
    if ((int64_t)tokens < o.vocab) printf("no pair of tokens is left that occurs twice: a vocabulary of %zu rather than %lld\n", tokens, (long long)o.vocab);
    printf("%s: %zu tokens from %zu different words in %.0f bytes, %.1f s\n", o.out.c_str(), tokens, counts[0].words.size(), bytes, bar.seconds());
    printf("next: ./tokenize encode --tokenizer %s --documents %s -o OUT.bin\n", o.out.c_str(), o.files[0].c_str());
}

// ----------------------------------------------------------------------------

// False if only help was asked for, which has then been printed.
static bool parse(int argc, char** argv, TokenizeOptions& o, std::string& command) {
    CLI::App app("Texts to token shards and back, and vocabularies of one's own.", "tokenize");
    app.get_formatter()->column_width(28);
    CLI::App* commands[] = {app.add_subcommand("encode", "text to a token shard (llm.c's format)"), app.add_subcommand("decode", "a token shard to text"),
                            app.add_subcommand("train", "a vocabulary of one's own, in GPT-2's two files")};
    for (CLI::App* c : commands) {
        bool train = c == commands[2], encode = c == commands[0];
        if (train)
            c->add_option("--vocab", o.vocab, "tokens of the vocabulary, with the 256 bytes and <|endoftext|>")->required()->check(CLI::Range(257, 1 << 24));
        else
            c->add_option("--tokenizer", o.tokenizer, "bytes, or a directory that holds encoder.json and vocab.bpe")->required();
        c->add_option("FILE", o.files, encode || train ? "texts; -: standard input" : "a token shard")->required()->expected(1, 1 << 20);
        c->add_option("-o,--out", o.out,
                      train    ? "directory for encoder.json and vocab.bpe"
                      : encode ? "the token shard"
                               : "the text; -: standard output")
            ->required();
        if (encode) c->add_flag("--documents", o.documents, "<|endoftext|> separates documents; each starts with the end-of-text token");
        c->add_option("--threads", o.threads, "0: one for each core")->check(CLI::Range(0, 4096));
    }
    if (!parse_arguments(app, argc, argv, "encode, decode or train")) return false;
    command = app.get_subcommands()[0]->get_name();
    if (command == "decode" && o.files.size() > 1) usage_error("'%s' is one shard too many: decode takes one", o.files[1].c_str());
    if (o.out.empty()) usage_error("--out is '': give it a value");
    return true;
}

int main(int argc, char** argv) {
    TokenizeOptions o;
    std::string command;
    catch_signals();
    try {
        if (!parse(argc, argv, o, command)) return 0;
#ifdef _OPENMP
        omp_set_num_threads(o.threads ? (int)o.threads : omp_get_num_procs());
#endif
        if (command == "encode") encode(o);
        if (command == "decode") decode(o);
        if (command == "train") train(o);
        if (fflush(stdout) != 0 || ferror(stdout)) data_error("cannot write to standard output: %s", strerror(errno));
        return 0;
    } catch (const Interrupted&) {
        raise(signal_caught);
        return 1;
    } catch (const Error& e) {
        fprintf(stderr, "error: %s\n", e.what());
        return e.exit_code;
    } catch (const std::bad_alloc&) {
        fprintf(stderr, "error: not enough memory: a single word may be too long, or the texts have too many different ones\n");
        return EXIT_DATA;
    }
}
