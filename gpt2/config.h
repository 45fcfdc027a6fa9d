// What a model is: the shape of the network, and for each of its layers which attention it has and with which options.
//
// An attention layer's options are declared once, in the layer's own section of attention.h (AttentionOption); the pattern language, the command line,
// config.json and the tables that `info` prints are all made from that declaration.
#pragma once

#include <cctype>
#include <cerrno>
#include <cmath>
#include <cstdlib>
#include <map>
#include <string>
#include <vector>

#include "error.h"
#include "tensors.h"

enum class Positions { LEARNED, ROPE, NONE };
constexpr const char* positions_names[] = {"learned", "rope", "none"};

// One option of an attention layer. A number within [min, max], whole unless `fraction`; or, if `choices` is not empty, one of these words (the value is
// its index). AUTOMATIC as initial value means that the layer's resolve() derives it from the rest of the configuration.
struct AttentionOption {
    const char* name;
    const char* help;
    double initial, min, max;
    std::vector<const char*> choices = {};
    bool fraction = false;
};
constexpr double AUTOMATIC = -1;

// One network layer's attention, with what its kernels need to know of the network around it.
struct AttentionConfig {
    std::string name;
    std::map<std::string, double> options;
    int layer = 0, layers = 1, heads = 1, channels = 1;
    Positions positions = Positions::LEARNED;

    double number(const char* option) const { return options.at(option); }
    int operator[](const char* option) const { return (int)options.at(option); }
    int head_size() const { return channels / heads; }
    double residual_std() const { return 0.02 / std::sqrt(2.0 * layers); }  // GPT-2: projections onto the residual stream start smaller
};

// How much a sequence's decode state takes, in numbers of the working type: so many a token, and so many whatever its length.
struct AttentionStateSize {
    int64_t per_token, per_sequence;
};

// What is known of an attention layer on every device. The functions that compute stand in a table per device (cpu::Attention in attention.h).
struct AttentionDescription {
    const char* name;
    const char* help;
    std::vector<AttentionOption> options;
    void (*resolve)(AttentionConfig&);                              // fills in AUTOMATIC values; a usage error if the configuration is impossible
    std::vector<TensorSpec> (*parameters)(const AttentionConfig&);  // in the order of the parameter list
    AttentionStateSize (*state)(const AttentionConfig&);
    double (*flops)(const AttentionConfig&, double T);  // forward, a token, mean over a sequence of length T; projections included
    bool learned_positions;                             // GPT-2's default: the model has wpe iff every layer says true
    bool recurrent;                                     // has a memory of constant size that --carry-memory can hand on
};

inline const std::vector<AttentionDescription>& attention_descriptions();  // all layers, defined at the end of attention.h

inline const AttentionDescription& attention_description(const std::string& name) {
    std::string known;
    for (const AttentionDescription& d : attention_descriptions()) {
        if (name == d.name) return d;
        known += std::string(known.empty() ? "" : ", ") + d.name;
    }
    usage_error("unknown attention '%s': choose one of %s", name.c_str(), known.c_str());
}

inline const AttentionOption* find_option(const AttentionDescription& d, const std::string& name) {
    for (const AttentionOption& o : d.options)
        if (name == o.name) return &o;
    return nullptr;
}

// The number that `text` is; `what` has it, in a message.
inline double parse_number(const std::string& what, const std::string& text, double min, double max, bool whole) {
    char* end;
    errno = 0;
    double v = strtod(text.c_str(), &end);
    bool spaced = text.empty() || isspace((unsigned char)text[0]);
    if (spaced || *end || errno == ERANGE || (whole && v != std::floor(v)) || !(v >= min && v <= max))
        usage_error("%s is '%s': give %s from %.16g to %.16g", what.c_str(), text.c_str(), whole ? "a whole number" : "a number", min, max);
    return v;
}

// The value of `text` for option `o`, checked.
inline double parse_option(const AttentionDescription& d, const AttentionOption& o, const std::string& text) {
    if (!o.choices.empty()) {
        std::string known;
        for (size_t i = 0; i < o.choices.size(); i++) {
            if (text == o.choices[i]) return (double)i;
            known += std::string(i ? ", " : "") + o.choices[i];
        }
        usage_error("%s of %s is '%s': choose one of %s", o.name, d.name, text.c_str(), known.c_str());
    }
    return parse_number(format("%s of %s", o.name, d.name), text, o.min, o.max, !o.fraction);
}

struct ModelConfig {
    int vocab_size = 257;         // V
    int padded_vocab_size = 384;  // Vp, a multiple of 128: rows V.. of wte are padding, never a target, never in the softmax
    int max_seq = 256;            // longest sequence (the rows of wpe)
    int layers = 4, heads = 4, channels = 128;
    Positions positions = Positions::LEARNED;
    std::vector<AttentionConfig> attention;  // one for each layer of the network

    void set_vocab(int v) {
        vocab_size = v;
        padded_vocab_size = (v + 127) / 128 * 128;
    }
};

struct Preset {
    const char* name;
    int layers, heads, channels, max_seq, vocab_size;
};
// The published GPT-2 family, and one small enough to learn something in a minute on two cores.
constexpr Preset presets[] = {
    {"tiny", 4, 4, 128, 256, 257},
    {"gpt2-124M", 12, 12, 768, 1024, 50257},
    {"gpt2-350M", 24, 16, 1024, 1024, 50257},
    {"gpt2-774M", 36, 20, 1280, 1024, 50257},
    {"gpt2-1558M", 48, 25, 1600, 1024, 50257},
};

// `infini:segment=256:memory-update=delta`, every option of the layer with its value: what config.json stores for one network layer.
inline std::string attention_string(const AttentionConfig& a) {
    std::string s = a.name;
    for (const AttentionOption& o : attention_description(a.name).options) {
        double v = a.number(o.name);
        s += format(":%s=", o.name) + (o.choices.empty() ? format("%.17g", v) : std::string(o.choices[(int)v]));
    }
    return s;
}

// Reads a pattern: entries separated by commas, each `name[:option=value]...[*repeats]`, the whole list repeated to the depth of the network.
// `defaults` (option name -> text) are the long options of the command line; they reach every entry that knows the option, and an entry's own options
// go over them. Sets positions to `positions` ("" = GPT-2's default: learned iff every layer is causal, rope otherwise).
inline void parse_attention(ModelConfig& c, const std::string& pattern, const std::map<std::string, std::string>& defaults, const std::string& positions) {
    std::vector<AttentionConfig> list;
    auto split = [](const std::string& s, char separator) {
        std::vector<std::string> parts(1);
        for (char ch : s) {
            if (ch == separator)
                parts.emplace_back();
            else
                parts.back() += ch;
        }
        return parts;
    };
    std::map<std::string, bool> used;
    for (std::string entry : split(pattern, ',')) {
        int repeats = 1;
        size_t star = entry.find('*');
        if (star != std::string::npos) {
            char* end;
            errno = 0;
            long n = strtol(entry.c_str() + star + 1, &end, 10);
            if (errno || *end || end == entry.c_str() + star + 1 || n < 1 || n > c.layers)
                usage_error("attention '%s': after * give how often, from 1 to %d (the number of layers)", entry.c_str(), c.layers);
            repeats = (int)n;
            entry.resize(star);
        }
        std::vector<std::string> parts = split(entry, ':');
        const AttentionDescription& d = attention_description(parts[0]);
        AttentionConfig a;
        a.name = d.name;
        for (const AttentionOption& o : d.options) {
            auto given = defaults.find(o.name);
            a.options[o.name] = given == defaults.end() ? o.initial : parse_option(d, o, given->second);
            if (given != defaults.end()) used[o.name] = true;
        }
        for (size_t i = 1; i < parts.size(); i++) {
            size_t eq = parts[i].find('=');
            const AttentionOption* o = find_option(d, parts[i].substr(0, eq));
            if (!o) {
                std::string known;
                for (const AttentionOption& k : d.options) known += std::string(known.empty() ? "" : ", ") + k.name;
                usage_error("attention '%s': %s has no option '%s'; it has %s", entry.c_str(), d.name, parts[i].substr(0, eq).c_str(), known.c_str());
            }
            if (eq == std::string::npos) usage_error("attention '%s': write %s=VALUE", entry.c_str(), o->name);
            a.options[o->name] = parse_option(d, *o, parts[i].substr(eq + 1));
        }
        for (int r = 0; r < repeats; r++) list.push_back(a);
    }
    for (const auto& d : defaults)
        if (!used.count(d.first)) usage_error("--%s has no meaning for the attention '%s': leave it out", d.first.c_str(), pattern.c_str());
    if ((int)list.size() > c.layers)
        usage_error("attention '%s' lists %zu layers, the network has %d: shorten the list or raise --layers", pattern.c_str(), list.size(), c.layers);

    bool all_learned = true;
    for (const AttentionConfig& a : list) all_learned = all_learned && attention_description(a.name).learned_positions;
    c.positions = all_learned ? Positions::LEARNED : Positions::ROPE;
    if (!positions.empty()) {
        int found = -1;
        for (int i = 0; i < 3; i++)
            if (positions == positions_names[i]) found = i;
        if (found < 0) usage_error("positions '%s': choose learned, rope or none", positions.c_str());
        c.positions = (Positions)found;
    }
    if (c.heads < 1 || c.channels % c.heads) usage_error("%d heads do not divide %d channels: change --heads or --channels", c.heads, c.channels);
    c.attention.clear();
    for (int l = 0; l < c.layers; l++) {
        AttentionConfig a = list[l % list.size()];
        a.layer = l;
        a.layers = c.layers;
        a.heads = c.heads;
        a.channels = c.channels;
        a.positions = c.positions;
        attention_description(a.name).resolve(a);
        c.attention.push_back(a);
    }
}

// The parameters of the whole model, in order. Names: h.3.attn.wqkv; shapes are (out, in) for every linear layer.
inline Tensors model_parameters(const ModelConfig& c) {
    Tensors t;
    int64_t C = c.channels;
    t.add("", {matrix_spec("wte", c.padded_vocab_size, C, 0.02)});
    if (c.positions == Positions::LEARNED) t.add("", {matrix_spec("wpe", c.max_seq, C, 0.02)});
    for (int l = 0; l < c.layers; l++) {
        const AttentionConfig& a = c.attention[l];
        std::string h = format("h.%d.", l);
        t.add(h, {vector_spec("ln1.w", C, 1), vector_spec("ln1.b", C, 0)});
        t.add(h + "attn.", attention_description(a.name).parameters(a));
        t.add(h, {vector_spec("ln2.w", C, 1), vector_spec("ln2.b", C, 0)});
        t.add(h + "mlp.",
              {matrix_spec("wfc", 4 * C, C, 0.02), vector_spec("bfc", 4 * C, 0), matrix_spec("wproj", C, 4 * C, a.residual_std()), vector_spec("bproj", C, 0)});
    }
    t.add("", {vector_spec("lnf.w", C, 1), vector_spec("lnf.b", C, 0)});
    return t;
}

// Forward FLOPs a token of the whole model at sequence length T (2 for a multiply-add); a training step does three times as many.
inline double model_flops(const ModelConfig& c, double T) {
    double C = c.channels, flops = 2 * C * c.padded_vocab_size;
    for (const AttentionConfig& a : c.attention) flops += attention_description(a.name).flops(a, T) + 2 * 8 * C * C;
    return flops;
}
