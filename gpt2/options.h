// The command line. Every option is described once, in option_specs(): its name, the commands that know it, where its value goes, its range and its
// help. Parsing, --help, config.json and the comparison at --resume all iterate that list. The options of the attention layers are not in it: they
// come from the layers' own descriptions (config.h), so that a new layer brings its options along.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <map>
#include <nlohmann/json.hpp>
#include <string>
#include <variant>
#include <vector>

#include "cli.h"
#include "config.h"
#include "error.h"
#include "schedule.h"
#include "trainer.h"

inline const char* executable_name() { return trainer_on_gpu() ? "train_gpt2cu" : "train_gpt2"; }

// Everything that can be said on the command line. Values marked * are settled by resolve_options(): AUTOMATIC or empty until then.
struct Options {
    std::string command;                       // train, eval, generate, info or convert
    std::map<std::string, std::string> given;  // what was typed: option -> text; flags have the text "true"

    // the model
    std::string preset = "tiny", attention = "causal";
    std::string positions, tokenizer;                                                          // *
    int64_t layers = AUTOMATIC, heads = AUTOMATIC, channels = AUTOMATIC, max_seq = AUTOMATIC;  // *
    std::map<std::string, std::string> attention_options;                                      // --segment and the like: option -> text

    // the run
    std::string data, val_data, out;
    int64_t steps = AUTOMATIC, batch = AUTOMATIC, seq = AUTOMATIC, warmup = AUTOMATIC;  // *
    int64_t total_batch = 0;                                                            // *
    double lr = AUTOMATIC, min_lr = AUTOMATIC;                                          // *
    std::string schedule = "cosine";
    double weight_decay = 0.1, grad_clip = 1, beta1 = 0.9, beta2 = 0.95, eps = 1e-8, dropout = 0;
    bool carry_memory = false, doc_mask = false, resume = false, overwrite = false;
    std::string dtype = "bf16";
    int64_t recompute = 0;
    bool tune = false;
    int64_t val_every = 100, val_batches = 10, sample_every = 250, save_every = 250, seed = 1337, threads = 0;

    std::string init_from;

    // a conversion
    std::string to, store;

    // a trained model
    std::string checkpoint, choices, prompt, prompts, stop;
    bool recall = false, jsonl = false, interactive = false, endless = false;
    int64_t stride = 0, tokens = 256, top_k = 0, samples = 1, parallel = 64, window = 0, page_size = 64, pages = 0;
    double temperature = 0.8, top_p = 1, min_p = 0, repetition_penalty = 1;

    bool is_given(const char* name) const { return given.count(name) > 0; }
};

// Sensible numbers for a first run of each preset; the first row whose name the preset's starts with holds.
struct PresetDefaults {
    const char* preset;
    int64_t steps, batch, warmup;
    double lr;
};
constexpr PresetDefaults preset_defaults[] = {{"tiny", 500, 16, 50, 4e-3}, {"gpt2", 1000, 4, 100, 6e-4}};

enum Command : unsigned { TRAIN = 1, EVAL = 2, GENERATE = 4, INFO = 8, CONVERT = 16 };
constexpr struct {
    Command bit;
    const char *name, *help;
} commands[] = {
    {TRAIN, "train", "train a model, or continue a run"},
    {EVAL, "eval", "loss and recall of a trained model on a text or on token shards, and what it gets right in multiple choice"},
    {GENERATE, "generate", "write text with a trained model: the text goes to standard output, everything else to standard error"},
    {INFO, "info", "what a model would be: its tensors, FLOPs and memory; nothing is trained"},
    {CONVERT, "convert", "write a model into the files of another program: transformers, llm.c, llama.cpp, or back into ours"},
};

constexpr unsigned LAYER_OPTIONS = TRAIN | INFO;  // the commands that know the options of the attention layers
inline unsigned command_bit(const Options& o) {
    for (const auto& c : commands)
        if (o.command == c.name) return c.bit;
    return 0;
}

// What an option means to a run that is resumed: MODEL and RUN must be as they were, since the losses depend on them; FREE may change.
enum class Role { MODEL, RUN, FREE };

struct OptionSpec {
    const char* name;
    unsigned commands;
    Role role;
    std::variant<bool Options::*, int64_t Options::*, double Options::*, std::string Options::*> field;
    double min, max;  // of numbers
    const char* help;
    const char* initial = nullptr;          // what --help shows where the value is settled later
    std::vector<const char*> choices = {};  // of words; empty: any text
    bool gpu = false;                       // only the GPU's trainer knows it
};

constexpr double MANY = 2147483647, EXACT = 9007199254740992;  // 2^31-1; 2^53, up to where JSON's numbers are exact

inline const std::vector<OptionSpec>& option_specs() {
    using O = Options;
    constexpr Role MODEL = Role::MODEL, RUN = Role::RUN, FREE = Role::FREE;
    static const std::vector<OptionSpec> specs = {
        {"preset", TRAIN | INFO, MODEL, &O::preset, 0, 0, "shape to start from", nullptr, {"tiny", "gpt2-124M", "gpt2-350M", "gpt2-774M", "gpt2-1558M"}},
        {"attention", TRAIN | INFO, MODEL, &O::attention, 0, 0, "attention layer, or a pattern: lightning*3,causal or infini:segment=64,causal:window=32"},
        {"layers", TRAIN | INFO, MODEL, &O::layers, 1, 1000, "layers of the network", "the preset's"},
        {"heads", TRAIN | INFO, MODEL, &O::heads, 1, 1024, "attention heads; must divide the channels", "the preset's"},
        {"channels", TRAIN | INFO, MODEL, &O::channels, 1, 65536, "width of the residual stream", "the preset's"},
        {"max-seq", TRAIN | INFO, MODEL, &O::max_seq, 1, 1 << 24, "longest sequence; with learned positions also their number", "the preset's"},
        {"positions",
         TRAIN | INFO,
         MODEL,
         &O::positions,
         0,
         0,
         "position encoding",
         "learned if every layer is causal, else rope",
         {"learned", "rope", "none"}},
        {"tokenizer", TRAIN | INFO, MODEL, &O::tokenizer, 0, 0,
         "bytes, a directory with encoder.json and vocab.bpe, or the token ids of shards (ids; of a vocabulary of V: ids:V)",
         "bytes for a text, ids for shards"},

        {"data", TRAIN | EVAL, FREE, &O::data, 0, 0, "a text file, a token shard, or a quoted glob of shards"},
        {"val-data", TRAIN, FREE, &O::val_data, 0, 0, "the same, for validation", "the last tenth of --data"},
        {"steps", TRAIN, FREE, &O::steps, 0, MANY, "number of the last step, after a resume too", "by preset"},
        {"batch", TRAIN | INFO, RUN, &O::batch, 1, 1 << 20, "sequences a batch", "by preset"},
        {"seq", TRAIN | INFO, RUN, &O::seq, 1, 1 << 24, "tokens a sequence", "--max-seq"},
        {"total-batch", TRAIN, RUN, &O::total_batch, 0, MANY, "tokens a step, a multiple of batch times seq: gradients are accumulated; 0: one batch"},
        {"carry-memory", TRAIN | EVAL, RUN, &O::carry_memory, 0, 0, "a row of the batch reads on through the text, with the memory it has (recurrent layers)"},
        {"doc-mask", TRAIN, RUN, &O::doc_mask, 0, 0, "no attention across documents"},
        {"lr", TRAIN, RUN, &O::lr, 0, 1000, "learning rate", "by preset"},
        {"min-lr", TRAIN, RUN, &O::min_lr, 0, 1000, "learning rate at the end", "a tenth of --lr"},
        {"warmup", TRAIN, RUN, &O::warmup, 0, MANY, "steps until the full learning rate", "by preset, at most a tenth of --steps"},
        {"schedule",
         TRAIN,
         RUN,
         &O::schedule,
         0,
         0,
         "course of the learning rate",
         nullptr,
         {schedule_names[0], schedule_names[1], schedule_names[2], schedule_names[3]}},
        {"weight-decay", TRAIN, RUN, &O::weight_decay, 0, 100, "AdamW's, on matrices only"},
        {"grad-clip", TRAIN, RUN, &O::grad_clip, 0, 1e9, "largest global norm of the gradient; 0: off"},
        {"beta1", TRAIN, RUN, &O::beta1, 0, 0.999999, "AdamW's first moment"},
        {"beta2", TRAIN, RUN, &O::beta2, 0, 0.999999, "AdamW's second moment"},
        {"eps", TRAIN, RUN, &O::eps, 1e-30, 1, "AdamW's epsilon"},
        {"dropout", TRAIN, RUN, &O::dropout, 0, 0.99, "of attention weights, embeddings and residual branches"},
        {"dtype",
         TRAIN | EVAL | GENERATE | INFO,
         RUN,
         &O::dtype,
         0,
         0,
         "storage; sums and master weights are always float32",
         nullptr,
         {"bf16", "float32"},
         true},
        {"recompute",
         TRAIN | INFO,
         FREE,
         &O::recompute,
         0,
         2,
         "what backward computes again instead of keeping it: 0 nothing, 1 norms and GELU, 2 whole blocks",
         nullptr,
         {},
         true},
        {"tune", TRAIN, FREE, &O::tune, 0, 0, "time the algorithms for each matrix product at the start and keep the fastest", nullptr, {}, true},
        {"val-every", TRAIN, FREE, &O::val_every, 0, MANY, "steps between validations; 0: off"},
        {"val-batches", TRAIN, FREE, &O::val_batches, 1, MANY, "batches a validation, always the same ones"},
        {"sample-every", TRAIN, FREE, &O::sample_every, 0, MANY, "steps between samples of text; 0: off"},
        {"save-every", TRAIN, FREE, &O::save_every, 0, MANY, "steps between checkpoints, and one at the end; 0: none"},
        {"out", TRAIN, FREE, &O::out, 0, 0, "directory for config.json, log.jsonl and checkpoints", "nothing is kept"},
        {"resume", TRAIN, FREE, &O::resume, 0, 0, "continue the run in --out from its newest checkpoint"},
        {"overwrite", TRAIN, FREE, &O::overwrite, 0, 0, "replace the run in --out"},

        {"init-from", TRAIN, FREE, &O::init_from, 0, 0,
         "start from the weights of this model and with its shape: a checkpoint, a directory of transformers' GPT-2, or llm.c's model .bin",
         "initial values from --seed"},

        {"checkpoint", EVAL | GENERATE | CONVERT, FREE, &O::checkpoint, 0, 0,
         "a run's directory (its newest step) or one step's; or GPT-2 of others: transformers' directory, llm.c's model .bin"},
        {"to",
         CONVERT,
         FREE,
         &O::to,
         0,
         0,
         "the program that is to read it: ours, transformers (its GPT-2, or its MLA and Lightning layers alone), llm.c, llama.cpp",
         "none",
         {"attn", "hf", "hf-attention", "llmc", "gguf"}},
        {"out", CONVERT, FREE, &O::out, 0, 0, "the directory to make, or the file (llmc, gguf); nothing may be there", "none"},
        {"tokenizer", EVAL | GENERATE | CONVERT, FREE, &O::tokenizer, 0, 0,
         "for a model whose tokens are numbers: bytes, or a directory with GPT-2's encoder.json and vocab.bpe", "the model's own"},
        {"dtype", CONVERT, FREE, &O::store, 0, 0, "type of the numbers (gguf: of the matrices)", "as they are", {"float32", "bf16", "float16"}},
        {"stride", EVAL, FREE, &O::stride, 0, MANY, "tokens from a window of --data to the next, which overlap: every token sees many others; 0: side by side"},
        {"choices", EVAL, FREE, &O::choices, 0, 0, "multiple choice: llm.c's evaluation format, or lines of {\"context\", \"choices\", \"label\"}", "none"},
        {"recall", EVAL, FREE, &O::recall, 0, 0, "answer the questions beside the text (X.questions.jsonl), or --data itself if it is such a file"},
        {"prompt", GENERATE, FREE, &O::prompt, 0, 0, "text to go on from", "none"},
        {"prompts", GENERATE, FREE, &O::prompts, 0, 0, "a file with a prompt a line; -: standard input", "none"},
        {"interactive", GENERATE, FREE, &O::interactive, 0, 0, "a conversation: the model goes on behind each line of standard input; an empty line ends it"},
        {"samples", GENERATE, FREE, &O::samples, 1, 1e6, "texts for each prompt"},
        {"parallel", GENERATE, FREE, &O::parallel, 1, 512, "texts written at the same time"},
        {"window", GENERATE, FREE, &O::window, 0, MANY,
         "a token sees so many, with itself, and memory stays as it is however long the text (not with learned positions); 0: all"},
        {"page-size", GENERATE, FREE, &O::page_size, 1, 1024, "tokens in a page of the memory for states"},
        {"pages", GENERATE, FREE, &O::pages, 0, MANY, "pages at most, of all texts together; where they run out, the last texts wait; 0: what memory takes"},
        {"jsonl", GENERATE, FREE, &O::jsonl, 0, 0, "a line of JSON for each text, as they end: prompt and sample (from 0), text, why it ended"},
        {"tokens", GENERATE, FREE, &O::tokens, 0, MANY, "write at most so many"},
        {"endless", GENERATE, FREE, &O::endless, 0, 0, "where the model ends a text, the next one follows"},
        {"stop", GENERATE, FREE, &O::stop, 0, 0, "end a text before this", "nothing"},
        {"temperature", GENERATE, FREE, &O::temperature, 0, 100, "0: always the likeliest token"},
        {"top-k", GENERATE, FREE, &O::top_k, 0, MANY, "choose among the k likeliest tokens; 0: all"},
        {"top-p", GENERATE, FREE, &O::top_p, 1e-9, 1, "choose among the likeliest tokens that make up this probability; 1: all"},
        {"min-p", GENERATE, FREE, &O::min_p, 0, 1, "choose among the tokens at least so many times as probable as the likeliest; 0: all"},
        {"repetition-penalty", GENERATE, FREE, &O::repetition_penalty, 0.01, 100, "above 1: tokens that the text has already become less likely"},
        {"seed", TRAIN | GENERATE, RUN, &O::seed, 0, EXACT, "of everything random"},
        {"threads", TRAIN | EVAL | GENERATE, FREE, &O::threads, 0, 4096, "0: one for each core"},
    };
    return specs;
}

// ----------------------------------------------------------------------------
// Values as text and as JSON

inline void set_option(Options& o, const OptionSpec& s, const std::string& text) {
    if (auto f = std::get_if<bool Options::*>(&s.field)) o.** f = text == "true";
    if (auto f = std::get_if<int64_t Options::*>(&s.field)) o.** f = (int64_t)parse_number("--" + std::string(s.name), text, s.min, s.max, true);
    if (auto f = std::get_if<double Options::*>(&s.field)) o.** f = parse_number("--" + std::string(s.name), text, s.min, s.max, false);
    if (auto f = std::get_if<std::string Options::*>(&s.field)) {
        std::string known;
        bool found = s.choices.empty();
        for (const char* c : s.choices) {
            found = found || text == c;
            known += std::string(known.empty() ? "" : ", ") + c;
        }
        if (!found) usage_error("--%s is '%s': choose one of %s", s.name, text.c_str(), known.c_str());
        o.** f = text;
    }
}

inline nlohmann::json option_json(const Options& o, const OptionSpec& s) {
    return std::visit([&](auto field) { return nlohmann::json(o.*field); }, s.field);
}
// How a value is shown: 500, 0.001, causal.
inline std::string option_text(const Options& o, const OptionSpec& s) {
    nlohmann::json j = option_json(o, s);
    return j.is_string() ? j.get<std::string>() : j.is_number_float() ? format("%g", j.get<double>()) : j.dump();
}

// ----------------------------------------------------------------------------
// Settling what depends on other options

inline const Preset& find_preset(const std::string& name) {
    for (const Preset& p : presets)
        if (name == p.name) return p;
    usage_error("--preset is '%s': see --help for the presets", name.c_str());
}
inline const PresetDefaults& find_preset_defaults(const std::string& name) {
    for (const PresetDefaults& d : preset_defaults)
        if (name.rfind(d.preset, 0) == 0) return d;
    return preset_defaults[0];
}

// Fills in what is AUTOMATIC. `positions` and `tokenizer` are settled by model_config() and by the kind of the data.
inline void resolve_options(Options& o) {
    const Preset& p = find_preset(o.preset);
    const PresetDefaults& d = find_preset_defaults(o.preset);
    auto settle = [](auto& value, auto automatic) {
        if (value == AUTOMATIC) value = automatic;
    };
    settle(o.layers, p.layers);
    settle(o.heads, p.heads);
    settle(o.channels, p.channels);
    settle(o.max_seq, p.max_seq);
    settle(o.seq, o.max_seq);
    settle(o.batch, d.batch);
    settle(o.steps, d.steps);
    settle(o.warmup, std::min(d.warmup, o.steps / 10));
    settle(o.lr, d.lr);
    settle(o.min_lr, o.lr / 10);
    int64_t one = o.batch * o.seq;
    if (o.total_batch == 0) o.total_batch = one;

    if (o.seq > o.max_seq)
        usage_error("--seq %lld is longer than the model's %lld positions: raise --max-seq or lower --seq", (long long)o.seq, (long long)o.max_seq);
    if (one > MANY) usage_error("--batch %lld times --seq %lld is over 2^31 tokens: lower one of them", (long long)o.batch, (long long)o.seq);
    if (o.total_batch % one)
        usage_error("--total-batch %lld is not a multiple of --batch %lld times --seq %lld = %lld tokens: give %lld", (long long)o.total_batch,
                    (long long)o.batch, (long long)o.seq, (long long)one, (long long)((o.total_batch + one - 1) / one * one));
    if (o.min_lr > o.lr) usage_error("--min-lr %g is above --lr %g: lower it", o.min_lr, o.lr);
}

inline ModelConfig model_config(const Options& o, int vocab_size) {
    ModelConfig c;
    c.set_vocab(vocab_size);
    c.max_seq = (int)o.max_seq;
    c.layers = (int)o.layers;
    c.heads = (int)o.heads;
    c.channels = (int)o.channels;
    parse_attention(c, o.attention, o.attention_options, o.positions);
    return c;
}

// ----------------------------------------------------------------------------
// Reading the command line

// An option of one or more attention layers, as the command line shows it.
struct AttentionFlag {
    std::string help, initial;
};
inline std::map<std::string, AttentionFlag> attention_flags() {
    std::map<std::string, std::vector<std::pair<std::string, std::string>>> texts;  // option -> (help, the layers that have it with this help)
    std::map<std::string, AttentionFlag> flags;
    for (const AttentionDescription& d : attention_descriptions()) {
        for (const AttentionOption& option : d.options) {
            std::string help = option.help, choices, initial;
            bool told = true;  // whether the help names all the choices already
            for (const char* c : option.choices) {
                told = told && help.find(c) != std::string::npos;
                choices += (choices.empty() ? "" : ", ") + std::string(c);
            }
            if (!told) help += ": " + choices;
            if (!option.choices.empty())
                initial = option.choices[(int)option.initial];
            else if (option.initial != AUTOMATIC)
                initial = format("%g", option.initial);  // the layer's help says what automatic means
            AttentionFlag& f = flags[option.name];
            if (f.initial.find(initial) == std::string::npos) f.initial += (f.initial.empty() ? "" : " or ") + initial;
            auto& known = texts[option.name];
            auto same = std::find_if(known.begin(), known.end(), [&](const auto& t) { return t.first == help; });
            if (same == known.end())
                known.push_back({help, d.name});
            else
                same->second += std::string(", ") + d.name;
        }
    }
    for (const auto& [name, list] : texts)
        for (const auto& [help, layers] : list) flags[name].help += (flags[name].help.empty() ? "" : "; ") + layers + ": " + help;
    return flags;
}

inline std::string initial_text(const OptionSpec& s) {
    Options fresh;
    std::string note = s.initial ? s.initial : option_text(fresh, s), text;
    if (note.rfind("by preset", 0) != 0) return note;
    for (const PresetDefaults& d : preset_defaults) {
        Options o;
        for (const Preset& p : presets)
            if (std::string(p.name).rfind(d.preset, 0) == 0) o.preset = p.name;
        resolve_options(o);
        text += (text.empty() ? "" : ", ") + option_text(o, s) + " for " + d.preset;
    }
    return text + note.substr(strlen("by preset"));
}

inline void declare_options(CLI::App& app, Command command, std::map<std::string, std::string>& texts, std::map<std::string, bool>& flags) {
    auto default_text = [](const std::string& initial) { return initial.empty() ? "" : " (default: " + initial + ")"; };
    for (const OptionSpec& s : option_specs()) {
        if (!(s.commands & command) || (s.gpu && !trainer_on_gpu())) continue;
        std::string name = std::string("--") + s.name, help = s.help;
        for (size_t i = 0; i < s.choices.size(); i++) help += (i ? ", " : ": ") + std::string(s.choices[i]);
        CLI::Option* option;
        if (std::holds_alternative<bool Options::*>(s.field)) {
            option = app.add_flag(name, flags[s.name], help);
        } else {
            help += default_text(initial_text(s));
            if (name == "--attention")
                for (const AttentionDescription& d : attention_descriptions()) help += format("\n  %s: %s", d.name, d.help);
            option = app.add_option(name, texts[s.name], help);
            option->type_name(std::holds_alternative<std::string Options::*>(s.field) ? "TEXT"
                              : std::holds_alternative<double Options::*>(s.field)    ? "NUMBER"
                                                                                      : "N");
        }
        option->multi_option_policy(CLI::MultiOptionPolicy::TakeLast)->group(s.role == Role::MODEL ? "Model" : "Options");
    }
    app.get_formatter()->column_width(24);
    if (!(command & LAYER_OPTIONS)) return;
    for (const auto& [name, f] : attention_flags()) {
        CLI::Option* option = app.add_option("--" + name, texts[name], f.help + default_text(f.initial));
        option->type_name("VALUE")->group("Attention layers")->multi_option_policy(CLI::MultiOptionPolicy::TakeLast);
    }
}

// What was typed goes over what the options hold so far.
inline void apply_given(Options& o) {
    std::map<std::string, AttentionFlag> layer_options;
    if (command_bit(o) & LAYER_OPTIONS) layer_options = attention_flags();
    for (const auto& [name, text] : o.given)
        if (layer_options.count(name)) o.attention_options[name] = text;
    for (const OptionSpec& s : option_specs())
        if ((s.commands & command_bit(o)) && o.is_given(s.name)) {
            auto text = std::get_if<std::string Options::*>(&s.field);
            if (text && *text != &Options::prompt && *text != &Options::stop && o.given.at(s.name).empty())  // --out "$DIR" of a DIR that is not set
                usage_error("--%s is '': give it a value, or leave it out", s.name);
            set_option(o, s, o.given.at(s.name));
        }
}

// False if only help was asked for, which has then been printed.
inline bool parse_command_line(int argc, char** argv, Options& o) {
    CLI::App app("Trains GPTs whose attention layers can be exchanged.", executable_name());
    std::map<std::string, std::map<std::string, std::string>> texts;
    std::map<std::string, std::map<std::string, bool>> flags;
    for (const auto& c : commands) declare_options(*app.add_subcommand(c.name, c.help), c.bit, texts[c.name], flags[c.name]);
    if (!parse_arguments(app, argc, argv, "train, eval, generate, info or convert")) return false;
    const CLI::App& chosen = *app.get_subcommands()[0];
    o.command = chosen.get_name();
    for (const auto& [name, text] : texts[o.command])
        if (chosen.count("--" + name)) o.given[name] = text;
    for (const auto& [name, flag] : flags[o.command])
        if (flag) o.given[name] = "true";
    apply_given(o);
    return true;
}
