// GPT-2 as transformers saves it: a directory with config.json and model.safetensors, or model.safetensors.index.json and the parts that it names. Its
// Conv1D weights are the transposes of ours; its embedding has V rows, ours is padded. And the layers that transformers has too, MLA and Lightning, one module
// each, under the names that it gives their parameters.
#pragma once

#include <set>
#include <string>
#include <vector>

#include <nlohmann/json.hpp>

#include "exchange.h"

// ----------------------------------------------------------------------------
// Parsing

// JSON as a whole: an object, and not followed by anything. The library would take a zero byte for the end.
inline bool parse_json_object(const uint8_t* bytes, size_t size, nlohmann::json& j, std::string& error) {
    if (size && memchr(bytes, 0, size)) return refuse(error, "it holds a zero byte: this is no JSON");
    j = nlohmann::json::parse(bytes, bytes + size, nullptr, false);
    return j.is_object() || refuse(error, "it is not a JSON object");
}

// config.json: the model's shape and its end-of-text token (-1: none), or what of it is not done here.
inline bool parse_hf_config(const uint8_t* bytes, size_t size, ModelConfig& c, int64_t& end_of_text, std::string& error) {
    nlohmann::json j;
    if (!parse_json_object(bytes, size, j, error)) return false;
    // A value that is left out, or null, is transformers' own default, with which we can do.
    auto value = [&](const char* key) { return j.contains(key) ? j[key] : nlohmann::json(); };
    auto shown = [](const nlohmann::json& v) { return printable(v.dump(-1, ' ', true, nlohmann::json::error_handler_t::replace)); };
    auto must = [&](const char* key, bool good, const char* known) {
        return value(key).is_null() || good || refuse(error, std::string(key) + " is " + shown(value(key)) + ", this program does " + known);
    };
    if (value("model_type") != "gpt2") return refuse(error, "model_type is " + shown(value("model_type")) + ", this program reads \"gpt2\"");
    int64_t shape[5];
    const char* keys[5] = {"vocab_size", j.contains("n_positions") ? "n_positions" : "n_ctx", "n_layer", "n_head", "n_embd"};
    for (int i = 0; i < 5; i++) {
        nlohmann::json v = value(keys[i]);
        if (!v.is_number_integer() || v < 1 || v > 1 << 24)
            return refuse(error, std::string(keys[i]) + " is " + shown(v) + ": a whole number from 1 is needed");
        shape[i] = v.get<int64_t>();
    }
    if (!gpt2_model(shape[0], shape[1], shape[2], shape[3], shape[4], c, error)) return false;
    const nlohmann::json activation = value("activation_function"), eps = value("layer_norm_epsilon"), end = value("eos_token_id");
    end_of_text = end.is_number_integer() && end >= 0 && end < c.vocab_size ? end.get<int64_t>() : -1;
    return must("activation_function", activation == "gelu_new" || activation == "gelu_pytorch_tanh", "gelu_new (the approximation by tanh)") &&
           must("layer_norm_epsilon", eps.is_number() && std::fabs(eps.get<double>() - 1e-5) <= 1e-9, "1e-5") &&
           must("n_inner", value("n_inner") == 4 * c.channels, "four times n_embd") &&
           must("scale_attn_weights", value("scale_attn_weights") == true, "true") &&
           must("scale_attn_by_inverse_layer_idx", value("scale_attn_by_inverse_layer_idx") == false, "false") &&
           must("add_cross_attention", value("add_cross_attention") == false, "false") && must("quantization_config", false, "without quantization");
}

// The index of a model in parts: which file has which tensor. Files are named, not paths.
inline bool parse_hf_index(const uint8_t* bytes, size_t size, std::map<std::string, std::string>& files, std::string& error) {
    nlohmann::json j;
    files.clear();
    if (!parse_json_object(bytes, size, j, error)) return false;
    if (!j.contains("weight_map") || !j["weight_map"].is_object() || j["weight_map"].empty()) return refuse(error, "it has no weight_map");
    for (const auto& [tensor, file] : j["weight_map"].items()) {
        std::string name = file.is_string() ? file.get<std::string>() : "";
        if (name.empty() || name[0] == '.' || name.find('/') != std::string::npos || name.find('\0') != std::string::npos)
            return refuse(error, "weight_map puts tensor '" + printable(tensor) + "' into '" + printable(name) + "': the name of a file beside it is needed");
        files[tensor] = name;
    }
    return true;
}

// `transformer.h.3.attn.c_attn.weight` -> `h.3.attn.c_attn.weight`.
inline std::string without_prefix(const std::string& name) { return name.rfind("transformer.", 0) == 0 ? name.substr(strlen("transformer.")) : name; }

// Buffers that old versions saved beside the parameters: `h.3.attn.bias`, the mask, and `h.3.attn.masked_bias`, its minus infinity.
inline bool is_mask_buffer(const std::string& name) {
    size_t digits = name.find_first_not_of("0123456789", 2);
    if (name.rfind("h.", 0) != 0 || digits == 2 || digits == std::string::npos) return false;
    std::string rest = name.substr(digits);
    return rest == ".attn.bias" || rest == ".attn.masked_bias";
}

// ----------------------------------------------------------------------------
// Reading

// The parts of a model, and where in them each tensor is. Copies share the mappings.
struct HfTensors {
    struct Place {
        size_t part;
        std::string name;  // there, with its prefix
    };
    std::vector<SafeTensorsFile> parts;
    std::map<std::string, Place> places;  // by the name without prefix

    explicit HfTensors(const std::string& directory) {
        std::string whole = directory + "/model.safetensors", index = whole + ".index.json";
        std::map<std::string, std::string> wanted;
        std::set<std::string> names = {"model.safetensors"};
        if (!exists(whole) && exists(index)) {
            MappedFile file(index);
            std::string error;
            if (!parse_hf_index(file.data, file.size, wanted, error)) data_error("'%s' cannot be used: %s; save the model again", index.c_str(), error.c_str());
            names.clear();
            for (const auto& w : wanted) names.insert(w.second);
        } else if (!exists(whole)) {
            data_error("'%s' has no model.safetensors: %s", directory.c_str(),
                       exists(directory + "/pytorch_model.bin") ? "save the model again with a transformers that writes it" : "name the directory of a model");
        }
        for (const std::string& name : names) {
            parts.emplace_back(directory + "/" + name);
            for (const SafeTensor& t : parts.back().header.tensors) {
                auto want = wanted.find(t.name);
                if (!wanted.empty() && (want == wanted.end() || want->second != name))
                    data_error("'%s' holds tensor %s, which the index does not look for there: save the model again", path_of(parts.size() - 1),
                               printable(t.name).c_str());
                if (!places.insert({without_prefix(t.name), {parts.size() - 1, t.name}}).second)
                    data_error("'%s' holds tensor %s, with and without prefix: save the model again", path_of(parts.size() - 1), printable(t.name).c_str());
            }
        }
        for (const auto& [tensor, name] : wanted)
            if (!places.count(without_prefix(tensor)))
                data_error("'%s/%s' has no tensor %s, and the index says it has: save the model again", directory.c_str(), name.c_str(),
                           printable(tensor).c_str());
    }
    const char* path_of(size_t part) const { return parts[part].file->path.c_str(); }

    const SafeTensor& tensor(const std::string& name, const std::vector<int64_t>& shape) const {
        auto place = places.find(name);
        if (place == places.end())
            data_error("'%s' has no tensor %s, config.json needs one of shape %s: is it of another model?", path_of(0), name.c_str(),
                       shape_string(shape).c_str());
        return parts[place->second.part].tensor(place->second.name, shape);
    }
    void copy(const std::string& name, const std::vector<int64_t>& shape, float* to) const {
        const Place& place = places.at(name);
        parts[place.part].copy(place.name, shape, to);
    }
};

inline std::string hf_name(const std::string& ours, bool& transposed) {
    int layer;
    const Gpt2Name& n = gpt2_name(ours, layer);
    transposed = n.transposed;
    return (layer < 0 ? "" : format("h.%d.", layer)) + n.hf;
}
// As it is there: V rows for the embedding, the transpose of a Conv1D weight.
inline std::vector<int64_t> hf_shape(const TensorSpec& s, const ModelConfig& c, bool transposed) {
    std::vector<int64_t> shape = s.shape;
    if (s.name == "wte") shape[0] = c.vocab_size;
    if (transposed) std::swap(shape[0], shape[1]);
    return shape;
}

// The head must be the embedding: ours is never another.
inline void check_head(const HfTensors& tensors, const ModelConfig& c) {
    if (!tensors.places.count("lm_head.weight")) return;
    std::vector<int64_t> shape = {c.vocab_size, c.channels};
    const SafeTensor& head = tensors.tensor("lm_head.weight", shape);
    std::vector<float> a((size_t)c.vocab_size * c.channels), b(a.size());
    tensors.copy("wte.weight", shape, a.data());
    tensors.copy("lm_head.weight", shape, b.data());
    for (size_t i = 0; i < a.size(); i++)
        if (!(a[i] == b[i]) && memcmp(&a[i], &b[i], sizeof(float)) != 0)
            data_error("tensor %s of '%s' differs from the embedding wte.weight, first in row %zu (%g for %g): this program's models have one for both",
                       printable(head.name).c_str(), tensors.path_of(0), i / (size_t)c.channels, b[i], a[i]);
}

// GPT-2's two files under the names that they have there; without them, the tokens are numbers.
inline Tokenizer hf_tokenizer(const std::string& directory, const ModelConfig& c, int64_t end_of_text) {
    if (exists(directory + "/vocab.json") && exists(directory + "/merges.txt")) {
        Tokenizer t = make_tokenizer(load_bpe(directory));
        if (t.vocab_size == c.vocab_size) return t;
        fprintf(stderr, "'%s/vocab.json' has %d tokens, the model %d: its tokens are known by their numbers only\n", directory.c_str(), t.vocab_size,
                c.vocab_size);
    }
    return make_tokenizer(ids_tokenizer_name(c.vocab_size, end_of_text));
}

// Whether it is a model of transformers, of whatever kind: no config.json of ours has these members.
inline bool is_hf(const std::string& directory) {
    std::string path = directory + "/config.json", error;
    if (!exists(path)) return false;
    MappedFile config(path);
    nlohmann::json j;
    return parse_json_object(config.data, config.size, j, error) && (j.contains("model_type") || j.contains("architectures"));
}

inline ModelFile open_hf(const std::string& directory) {
    MappedFile config(directory + "/config.json");
    ModelFile m;
    m.path = directory;
    m.kind = "GPT-2 of transformers";
    std::string error;
    int64_t end_of_text;
    if (!parse_hf_config(config.data, config.size, m.config, end_of_text, error)) data_error("'%s' cannot be used: %s", config.path.c_str(), error.c_str());
    HfTensors tensors(directory);
    std::set<std::string> known = {"lm_head.weight"};
    CommonType type;
    for (const TensorSpec& s : model_parameters(m.config).specs) {
        bool transposed;
        std::string name = hf_name(s.name, transposed);
        type.see(tensors.tensor(name, hf_shape(s, m.config, transposed)), directory);
        known.insert(name);
    }
    for (const auto& [name, place] : tensors.places)
        if (!known.count(name) && !is_mask_buffer(name))
            data_error("'%s' holds tensor %s, which GPT-2 does not have: is it of another model?", tensors.path_of(place.part), printable(name).c_str());
    check_head(tensors, m.config);
    m.dtype = type.dtype;
    set_imported_state(m, hf_tokenizer(directory, m.config, end_of_text));
    ModelConfig c = m.config;
    m.read = [tensors, c](const TensorSpec& s, float* to) {
        bool transposed;
        std::string name = hf_name(s.name, transposed);
        std::vector<int64_t> shape = hf_shape(s, c, transposed);
        std::fill(to, to + s.size(), 0.0f);  // the rows that pad the vocabulary
        if (!transposed) return tensors.copy(name, shape, to);
        std::vector<float> theirs((size_t)s.size());
        tensors.copy(name, shape, theirs.data());
        for (int64_t i = 0; i < shape[0]; i++)
            for (int64_t o = 0; o < shape[1]; o++) to[o * shape[0] + i] = theirs[i * shape[1] + o];
    };
    return m;
}

// ----------------------------------------------------------------------------
// Writing GPT-2

inline const char* torch_dtype(const std::string& dtype) { return dtype == "F32" ? "float32" : dtype == "BF16" ? "bfloat16" : "float16"; }

inline void write_hf(const ModelFile& m, const std::string& out, const std::string& dtype) {
    need_gpt2(m, "GPT2LMHeadModel");
    const ModelConfig& c = m.config;
    TensorExport from(m, dtype);
    std::vector<TensorToWrite> tensors;
    for (const TensorSpec& s : model_parameters(c).specs) {
        bool transposed;
        std::string name = "transformer." + hf_name(s.name, transposed);
        tensors.push_back(from.tensor(s, name, s.name == "wte" ? c.vocab_size : -1, transposed));
    }
    nlohmann::ordered_json config = {{"model_type", "gpt2"},
                                     {"architectures", {"GPT2LMHeadModel"}},
                                     {"vocab_size", c.vocab_size},
                                     {"n_positions", c.max_seq},
                                     {"n_ctx", c.max_seq},
                                     {"n_embd", c.channels},
                                     {"n_layer", c.layers},
                                     {"n_head", c.heads},
                                     {"n_inner", nullptr},
                                     {"activation_function", "gelu_new"},
                                     {"layer_norm_epsilon", 1e-5},
                                     {"scale_attn_weights", true},
                                     {"scale_attn_by_inverse_layer_idx", false},
                                     {"tie_word_embeddings", true},
                                     {"bos_token_id", m.tokenizer.end_of_text},
                                     {"eos_token_id", m.tokenizer.end_of_text},
                                     {"torch_dtype", torch_dtype(dtype)}};
    NewDirectory directory(out);
    write_safetensors(directory.file("model.safetensors"), tensors, {{"format", "pt"}});
    write_file(directory.file("config.json"), config.dump(2) + "\n");
    if (m.tokenizer.bpe) {
        write_file(directory.file("vocab.json"), m.tokenizer.bpe->encoder_json);
        write_file(directory.file("merges.txt"), m.tokenizer.bpe->vocab_bpe);
        write_file(directory.file("tokenizer_config.json"), "{\"tokenizer_class\": \"GPT2Tokenizer\"}\n");
    }
    directory.commit();
}

// ----------------------------------------------------------------------------
// Writing attention modules: DeepseekV3Attention for MLA, MiniMaxLightningAttention for Lightning

// Our names and theirs. MLA: rows of q and kv are [nope | rope] and [k | v] a head there too, and with rope_interleave, their default, rotated pairs are
// adjacent as ours. Lightning: they pack q, k and v of a head together, we all of q before all of k; slopes, scale and the norm's epsilon are the same.
inline const std::map<std::string, const char*>& module_names(const std::string& attention) {
    static const std::map<std::string, const char*> mla = {
        {"wdq", "q_a_proj"},       {"gq", "q_a_layernorm"}, {"wuq", "q_b_proj"}, {"wq", "q_proj"}, {"wdkv", "kv_a_proj_with_mqa"},
        {"gkv", "kv_a_layernorm"}, {"wukv", "kv_b_proj"},   {"wo", "o_proj"}};
    static const std::map<std::string, const char*> lightning = {{"wqkv", "qkv_proj"}, {"gain", "norm"}, {"wg", "output_gate"}, {"wo", "out_proj"}};
    return attention == "mla" ? mla : lightning;
}

// What the module's configuration must say; Error if it cannot say what the layer is.
inline nlohmann::ordered_json module_config(const AttentionConfig& a, const std::string& path) {
    nlohmann::ordered_json j = {
        {"hidden_size", a.channels}, {"num_hidden_layers", a.layers}, {"num_attention_heads", a.heads}, {"num_key_value_heads", a.heads}};
    if (a.name == "lightning") {
        if (a["decay"] != 0)
            data_error("layer %d of '%s' is lightning with decay=%s, MiniMaxLightningAttention's is minimax: it cannot be written", a.layer, path.c_str(),
                       find_option(attention_description("lightning"), "decay")->choices[a["decay"]]);
        j["head_dim"] = a.head_size();
        j["hidden_act"] = "silu";
        j["layer_types"] = std::vector<std::string>(a.layers, "linear_attention");
        return j;
    }
    j["q_lora_rank"] = a["q-lora-rank"] ? nlohmann::ordered_json(a["q-lora-rank"]) : nlohmann::ordered_json();
    j["kv_lora_rank"] = a["kv-lora-rank"];
    j["qk_nope_head_dim"] = a["qk-nope-dim"];
    j["qk_rope_head_dim"] = a["qk-rope-dim"];
    j["v_head_dim"] = a["v-dim"];
    j["rope_theta"] = 10000.0;
    j["rope_interleave"] = true;
    j["attention_bias"] = false;
    return j;
}

// model.safetensors with the parameters of each MLA and Lightning layer under model.layers.N.self_attn, and attention.json, which says for each of these
// layers the module, its prefix and its configuration. Layers of other kinds have no such module and are named on standard error.
inline void write_hf_attention(const ModelFile& m, const std::string& out, const std::string& dtype) {
    TensorExport from(m, dtype);
    std::vector<TensorToWrite> tensors;
    nlohmann::ordered_json modules = nlohmann::ordered_json::array();
    Tensors parameters = model_parameters(m.config);
    for (const AttentionConfig& a : m.config.attention) {
        if (a.name != "mla" && a.name != "lightning") {
            fprintf(stderr, "layer %d is %s attention, for which transformers has no module: left out\n", a.layer, a.name.c_str());
            continue;
        }
        std::string prefix = format("model.layers.%d.self_attn.", a.layer), ours = format("h.%d.attn.", a.layer);
        modules.push_back({{"layer", a.layer},
                           {"module", a.name == "mla" ? "DeepseekV3Attention" : "MiniMaxLightningAttention"},
                           {"prefix", prefix},
                           {"config", module_config(a, m.path)}});
        for (TensorSpec s : parameters.part(ours).specs) {
            std::string name = prefix + module_names(a.name).at(s.name) + ".weight";
            std::function<int64_t(int64_t)> order;
            int64_t hs = a.head_size(), C = a.channels;
            if (s.name == "wqkv") order = [hs, C](int64_t row) { return row / hs % 3 * C + row / (3 * hs) * hs + row % hs; };
            s.name = ours + s.name;
            tensors.push_back(from.tensor(s, name, -1, false, nullptr, order));
        }
    }
    if (tensors.empty()) data_error("'%s' has no mla or lightning layer: for causal layers choose --to hf", m.path.c_str());
    NewDirectory directory(out);
    write_safetensors(directory.file("model.safetensors"), tensors, {{"format", "pt"}});
    write_file(directory.file("attention.json"), modules.dump(2) + "\n");
    directory.commit();
}
