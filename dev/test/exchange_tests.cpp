// Exchange with other programs: models of transformers, llm.c and llama.cpp, read and written, and what is refused. The models in
// dev/reference/outputs/exchange were saved by transformers, which also computed the logits (dev/reference/exchange.py, which also runs the other programs on
// what this one writes).
#define DOCTEST_CONFIG_IMPLEMENT_WITH_MAIN
#define DOCTEST_CONFIG_SUPER_FAST_ASSERTS  // fast to compile
#include <doctest/doctest.h>

#define GPT2_NO_MAIN
#include "train_gpt2.cpp"

#include <cstdlib>
#include <filesystem>
#include <functional>

#include "dev/test/testing.h"
#include "gpt2/convert.h"
#include "gpt2/shards.h"

namespace fs = std::filesystem;
static const std::string fixtures = "dev/reference/outputs/exchange/";

static void convert_to(const std::string& from, const std::string& to, const std::string& out, const std::string& dtype = "") {
    convert({from, to, out, dtype, ""});
}

// Every tensor of two files of the same names, types and shapes has the same bytes.
static void check_same_tensors(const SafeTensorsFile& a, const SafeTensorsFile& b) {
    CHECK(a.header.tensors.size() == b.header.tensors.size());
    for (const SafeTensor& t : a.header.tensors) {
        CAPTURE(t.name);
        const SafeTensor* u = b.find(t.name);
        REQUIRE(u);
        CHECK(t.dtype == u->dtype);
        CHECK(t.shape == u->shape);
        REQUIRE(t.end - t.begin == u->end - u->begin);
        CHECK(memcmp(a.data(t), b.data(*u), t.end - t.begin) == 0);
    }
}

// A model of ours out of nothing: numbers that are different everywhere, and exact in bf16 if need be.
static ModelFile make_model(const std::string& attention, const std::string& positions = "", bool narrow = false, int channels = 16) {
    ModelFile m;
    m.path = "made";
    m.kind = "test";
    m.dtype = narrow ? "BF16" : "F32";
    m.config.set_vocab(61);
    m.config.max_seq = 16;
    m.config.layers = 4;
    m.config.heads = 2;
    m.config.channels = channels;
    parse_attention(m.config, attention, {}, positions);
    set_imported_state(m, make_tokenizer("ids:61"));
    Tensors parameters = model_parameters(m.config);
    auto values = std::make_shared<std::map<std::string, std::vector<float>>>();
    uint32_t state = 1;
    for (const TensorSpec& s : parameters.specs) {
        std::vector<float>& v = (*values)[s.name];
        v.resize((size_t)s.size());
        for (size_t k = 0; k < (s.name == "wte" ? (size_t)m.config.vocab_size * m.config.channels : v.size()); k++) {
            state = state * 1664525 + 1013904223;
            v[k] = (float)(int32_t)state / 8e9f + (float)s.init_value;
            if (narrow && s.storage == Storage::WORKING) v[k] = bf16_to_float(float_to_bf16(v[k]));
        }
    }
    m.read = [values](const TensorSpec& s, float* to) { std::copy(values->at(s.name).begin(), values->at(s.name).end(), to); };
    return m;
}
static std::vector<float> values_of(const ModelFile& m, const std::string& name) {
    Tensors parameters = model_parameters(m.config);
    const TensorSpec& s = parameters.specs[parameters.find(name.c_str())];
    std::vector<float> v((size_t)s.size());
    m.read(s, v.data());
    return v;
}
static void check_same_model(const ModelFile& a, const ModelFile& b) {
    CHECK(model_json(a.config) == model_json(b.config));
    CHECK(a.dtype == b.dtype);
    for (const TensorSpec& s : model_parameters(a.config).specs) {
        CAPTURE(s.name);
        std::vector<float> x = values_of(a, s.name), y = values_of(b, s.name);
        CHECK(memcmp(x.data(), y.data(), x.size() * sizeof(float)) == 0);
    }
}

// Logits and loss over a text of one sequence.
struct Computed {
    std::vector<float> logits;
    double loss;
};
static Computed compute(const ModelFile& m, const std::vector<int>& tokens) {
    TrainerOptions t;
    t.max_tokens = (int64_t)tokens.size();
    t.training = false;
    std::unique_ptr<Trainer> trainer = make_trainer(m.config, t);
    load_weights(m, *trainer);
    Batch batch;
    batch.tokens = tokens;
    batch.targets.assign(tokens.begin() + 1, tokens.end());
    batch.targets.push_back(-1);
    batch.cu_seqlens = {0, (int)tokens.size()};
    Computed c;
    c.logits.resize(tokens.size() * (size_t)m.config.vocab_size);
    c.loss = trainer->forward(batch, Pass(), nullptr, c.logits.data());
    return c;
}
static std::vector<int> fixture_tokens() {
    SafeTensorsFile file(fixtures + "logits.safetensors");
    std::vector<int> tokens(14);
    file.copy("tokens", {14}, tokens.data());
    return tokens;
}

// ----------------------------------------------------------------------------
// transformers

TEST_CASE("models saved by transformers have the logits here that they have there") {
    SafeTensorsFile file(fixtures + "logits.safetensors");
    for (const std::string name : {"gpt2", "gpt2_parts"}) {  // float32 in one file; bf16 in parts, without prefix
        CAPTURE(name);
        ModelFile m = open_model(fixtures + name);
        CHECK(m.config.vocab_size == 300);
        CHECK(m.config.padded_vocab_size == 384);
        CHECK(m.dtype == (name == "gpt2" ? "F32" : "BF16"));
        CHECK(m.tokenizer.name == "ids:300");
        std::vector<float> expected(14 * 300), seen = compute(m, fixture_tokens()).logits;
        file.copy(name, {14, 300}, expected.data());
        double difference = 0, norm = 0, dot = 0, own = 0;
        for (size_t i = 0; i < expected.size(); i++) {
            difference += std::pow((double)seen[i] - expected[i], 2);
            norm += std::pow((double)expected[i], 2);
            own += std::pow((double)seen[i], 2);
            dot += (double)seen[i] * expected[i];
        }
        MESSAGE(name << ": logits differ by " << std::sqrt(difference / norm) << ", cosine 1 - " << 1 - dot / std::sqrt(norm * own));
        CHECK(std::sqrt(difference / norm) <= 2e-6);
        CHECK(1 - dot / std::sqrt(norm * own) <= 1e-9);
    }
}

TEST_CASE("theirs, ours, theirs: the same bits") {
    TemporaryDirectory d;
    convert_to(fixtures + "gpt2", "attn", d / "ours");
    convert_to(d / "ours", "hf", d / "theirs");
    check_same_tensors(SafeTensorsFile(fixtures + "gpt2/model.safetensors"), SafeTensorsFile(d / "theirs/model.safetensors"));
    CHECK(SafeTensorsFile(d / "theirs/model.safetensors").header.metadata.at("format") == "pt");
    nlohmann::json before = read_json(fixtures + "gpt2/config.json"), after = read_json(d / "theirs/config.json");
    for (const char* key :
         {"model_type", "architectures", "vocab_size", "n_positions", "n_embd", "n_layer", "n_head", "n_inner", "activation_function", "layer_norm_epsilon",
          "scale_attn_weights", "scale_attn_by_inverse_layer_idx", "tie_word_embeddings", "bos_token_id", "eos_token_id"})
        CHECK_MESSAGE(before[key] == after[key], key);
    // In parts and in bf16: as one file the numbers are the same.
    convert_to(fixtures + "gpt2_parts", "attn", d / "parts");
    convert_to(d / "parts", "hf", d / "parts_back");
    check_same_model(open_model(fixtures + "gpt2_parts"), open_model(d / "parts_back"));
    CHECK(SafeTensorsFile(d / "parts/model.safetensors").find("wte")->dtype == "BF16");
    CHECK(read_json(d / "parts_back/config.json")["torch_dtype"] == "bfloat16");
}

// A copy of the fixture whose tensors `change` may alter: its list of name, type, shape and data.
struct Loose {
    std::string name, dtype;
    std::vector<int64_t> shape;
    std::string data;
};
static void altered(const std::string& out, const std::function<void(std::vector<Loose>&)>& change) {
    SafeTensorsFile file(fixtures + "gpt2/model.safetensors");
    std::vector<Loose> list;
    for (const SafeTensor& t : file.header.tensors) list.push_back({t.name, t.dtype, t.shape, std::string((const char*)file.data(t), t.end - t.begin)});
    change(list);
    std::vector<TensorToWrite> tensors;
    for (const Loose& t : list) tensors.push_back({t.name, t.dtype, t.shape, [&t]() -> const void* { return t.data.data(); }});
    fs::create_directories(out);
    write_safetensors(out + "/model.safetensors", tensors);
    fs::copy_file(fixtures + "gpt2/config.json", out + "/config.json", fs::copy_options::overwrite_existing);
}
static Loose& named(std::vector<Loose>& list, const std::string& name) {
    for (Loose& t : list)
        if (t.name == "transformer." + name) return t;
    REQUIRE(false);
    return list[0];
}

TEST_CASE("what old and other versions save beside the parameters") {
    TemporaryDirectory d;
    ModelFile plain = open_model(fixtures + "gpt2");
    altered(d / "masks", [](std::vector<Loose>& list) {
        for (Loose& t : list) t.name = without_prefix(t.name);
        for (const char* l : {"0", "1"}) {
            list.push_back({std::string("h.") + l + ".attn.bias", "BOOL", {1, 1, 32, 32}, std::string(1024, '\1')});
            list.push_back({std::string("h.") + l + ".attn.masked_bias", "F32", {}, std::string(4, '\0')});
        }
    });
    check_same_model(plain, open_model(d / "masks"));
    altered(d / "tied", [](std::vector<Loose>& list) {
        Loose head = named(list, "wte.weight");
        head.name = "lm_head.weight";
        list.push_back(head);
    });
    check_same_model(plain, open_model(d / "tied"));
    altered(d / "untied", [](std::vector<Loose>& list) {
        Loose head = named(list, "wte.weight");
        head.name = "lm_head.weight";
        head.data[4 * (24 * 299 + 23)] ^= 1;  // the last bit of its last number
        list.push_back(head);
    });
    check_error(EXIT_DATA, {"lm_head.weight", "row 299", "wte.weight"}, [&] { open_model(d / "untied"); });
}

TEST_CASE("tensors that are not GPT-2's are refused by name") {
    TemporaryDirectory d;
    auto refused = [&](const std::vector<std::string>& parts, const std::function<void(std::vector<Loose>&)>& change) {
        altered(d / "model", change);
        check_error(EXIT_DATA, parts, [&] { open_model(d / "model"); });
    };
    refused({"h.1.ln_2.bias", "(24)", "no tensor"}, [](auto& list) { named(list, "h.1.ln_2.bias").name = "h.1.attn.bias"; });
    refused({"transformer.h.0.attn.c_attn.weight", "(72, 24)", "(24, 72)"}, [](auto& list) { named(list, "h.0.attn.c_attn.weight").shape = {72, 24}; });
    refused({"transformer.wpe.weight", "F64"}, [](auto& list) {
        named(list, "wpe.weight").dtype = "F64";
        named(list, "wpe.weight").data += named(list, "wpe.weight").data;
    });
    refused({"h.0.crossattention.q_attn.weight"}, [](auto& list) { list.push_back({"transformer.h.0.crossattention.q_attn.weight", "F32", {1}, "abcd"}); });
    refused({"h.x.attn.bias"}, [](auto& list) { list.push_back({"h.x.attn.bias", "F32", {1}, "abcd"}); });
    refused({"ln_f.bias", "with and without prefix"}, [](auto& list) {
        list.push_back(named(list, "ln_f.bias"));
        list.back().name = "ln_f.bias";
    });
}

TEST_CASE("what a config.json says that is not done here is refused by name") {
    auto parse = [](const std::string& text) {
        ModelConfig c;
        int64_t end;
        std::string error;
        return parse_hf_config((const uint8_t*)text.data(), text.size(), c, end, error) ? "good" : error;
    };
    nlohmann::json good = read_json(fixtures + "gpt2/config.json");
    CHECK(parse(good.dump()) == "good");
    auto changed = [&](const char* key, nlohmann::json value) {
        nlohmann::json j = good;
        if (value.is_discarded())
            j.erase(key);
        else
            j[key] = value;
        return parse(j.dump());
    };
    const nlohmann::json gone(nlohmann::json::value_t::discarded);
    struct {
        const char* key;
        nlohmann::json value;
        const char* shown;
    } refused[] = {{"model_type", "llama", "\"llama\""},
                   {"model_type", gone, "null"},
                   {"activation_function", "gelu", "\"gelu\""},
                   {"activation_function", "relu", "\"relu\""},
                   {"layer_norm_epsilon", 1e-6, "1e-06"},
                   {"layer_norm_epsilon", "small", "\"small\""},
                   {"n_inner", 100, "100"},
                   {"scale_attn_weights", false, "false"},
                   {"scale_attn_by_inverse_layer_idx", true, "true"},
                   {"add_cross_attention", true, "true"},
                   {"quantization_config", {{"bits", 4}}, "bits"},
                   {"vocab_size", gone, "null"},
                   {"vocab_size", 0, "0"},
                   {"vocab_size", -1, "-1"},
                   {"vocab_size", 1e300, "1e+300"},
                   {"vocab_size", UINT64_MAX, "18446744073709551615"},
                   {"n_positions", "many", "\"many\""},
                   {"n_layer", 1001, "1001 layers"},
                   {"n_head", 5, "5 heads"},
                   {"n_head", 0, "0"},
                   {"n_embd", 1 << 20, "1048576 channels"}};
    for (const auto& r : refused) {
        std::string error = changed(r.key, r.value);
        CAPTURE(r.key);
        CAPTURE(error);
        CHECK(error != "good");
        CHECK(error.find(r.shown) != std::string::npos);
    }
    for (const char* key : {"n_inner", "activation_function", "layer_norm_epsilon", "scale_attn_weights", "eos_token_id"}) {
        CHECK(changed(key, gone) == "good");
        CHECK(changed(key, nullptr) == "good");
    }
    CHECK(changed("n_inner", 96) == "good");
    CHECK(changed("eos_token_id", {1, 2}) == "good");
    for (const char* text : {"", "{", "[]", "null", "{} x", "\xff"}) CHECK(parse(text) != "good");
    CHECK(parse(good.dump() + std::string(1, '\0')) != "good");
}

TEST_CASE("an index names files beside it, and each tensor is where it says") {
    auto parse = [](const std::string& text) {
        std::map<std::string, std::string> files;
        std::string error;
        return parse_hf_index((const uint8_t*)text.data(), text.size(), files, error);
    };
    CHECK(parse(R"({"weight_map": {"wte": "a.safetensors"}})"));
    for (const char* text : {"", "{}", R"({"weight_map": []})", R"({"weight_map": {}})", R"({"weight_map": {"a": 1}})", R"({"weight_map": {"a": ""}})",
                             R"({"weight_map": {"a": "../b"}})", R"({"weight_map": {"a": "/etc/passwd"}})", R"({"weight_map": {"a": "b\u0000c"}})"})
        CHECK_MESSAGE(!parse(text), text);
    TemporaryDirectory d;
    auto copy = [&](const std::function<void(nlohmann::json&)>& change) {
        fs::remove_all(d / "m");
        fs::copy(fixtures + "gpt2_parts", d / "m");
        nlohmann::json j = read_json(d / "m/model.safetensors.index.json");
        change(j["weight_map"]);
        write_file(d / "m/model.safetensors.index.json", j.dump());
    };
    copy([](nlohmann::json& map) { map["wte.weight"] = map["ln_f.bias"]; });
    check_error(EXIT_DATA, {"wte.weight", "index"}, [&] { open_model(d / "m"); });
    copy([](nlohmann::json& map) { map["more"] = map["ln_f.bias"]; });
    check_error(EXIT_DATA, {"more", "model-0000"}, [&] { open_model(d / "m"); });
    copy([](nlohmann::json& map) { map.erase("ln_f.bias"); });
    check_error(EXIT_DATA, {"ln_f.bias", "index"}, [&] { open_model(d / "m"); });
    copy([](nlohmann::json&) {});
    fs::remove(d / "m/model-00002-of-00003.safetensors");
    check_error(EXIT_DATA, {"model-00002-of-00003.safetensors"}, [&] { open_model(d / "m"); });
    fs::remove(d / "m/model.safetensors.index.json");
    check_error(EXIT_DATA, {"no model.safetensors"}, [&] { open_model(d / "m"); });
}

// ----------------------------------------------------------------------------
// llm.c

TEST_CASE("llm.c's file: its layout, and back again bit for bit with the same loss") {
    TemporaryDirectory d;
    for (bool narrow : {false, true}) {
        ModelFile m = make_model("causal", "", narrow);
        write_own(m, d / (narrow ? "own16" : "own"), m.dtype);
        convert_to(d / (narrow ? "own16" : "own"), "llmc", d / "m.bin");
        std::string bytes = contents(d / "m.bin");
        int width = narrow ? 2 : 4;
        const int32_t expected[8] = {20240326, narrow ? 5 : 3, 16, 61, 4, 2, 16, 128};
        CHECK(memcmp(bytes.data(), expected, sizeof expected) == 0);
        CHECK(bytes.size() == 1024 + (size_t)width * (128 * 16 + 16 * 16 + 4 * (12 * 16 * 16 + 13 * 16) + 2 * 16));
        // The first number of layer 3's qkvw, say: behind wte, wpe, all of ln1w and ln1b, and three layers of qkvw.
        size_t at = 1024 + (size_t)width * (128 * 16 + 16 * 16 + 2 * 4 * 16 + 3 * 48 * 16);
        float first = narrow ? bf16_to_float(load<uint16_t>(&bytes[at])) : load<float>(&bytes[at]);
        CHECK(first == values_of(m, "h.3.attn.wqkv")[0]);

        ModelFile back = open_model(d / "m.bin");
        CHECK(back.tokenizer.name == "ids:61");
        check_same_model(m, back);
        std::vector<int> tokens = {60, 3, 1, 4, 1, 5, 9, 2, 6};
        CHECK(compute(m, tokens).loss == compute(back, tokens).loss);
        convert_to(d / "m.bin", "attn", d / "back");
        convert_to(d / "back", "llmc", d / "m2.bin");
        CHECK(contents(d / "m2.bin") == bytes);
        for (const char* name : {"m.bin", "m2.bin", "back"}) fs::remove_all(d / name);
    }
}

TEST_CASE("an embedding padded otherwise, as another program may") {
    TemporaryDirectory d;
    ModelFile m = make_model("causal");
    write_llmc(m, d / "m.bin", "F32");
    std::string bytes = contents(d / "m.bin"), other = bytes;
    other.erase(1024 + 64 * 16 * 4, 64 * 16 * 4);  // 64 rows instead of 128
    int32_t rows = 64;
    memcpy(&other[28], &rows, 4);
    for (int i = 0; i < 3 * 16 * 4; i++) other[1024 + 61 * 16 * 4 + i] = 'x';  // padding that is not zero
    write_file(d / "other.bin", other);
    check_same_model(m, open_model(d / "other.bin"));
}

TEST_CASE("headers of llm.c that cannot be") {
    TemporaryDirectory d;
    write_llmc(make_model("causal"), d / "m.bin", "F32");
    const std::string good = contents(d / "m.bin");
    LlmcModel out;
    std::string error;
    auto parse = [&](const std::string& bytes) {
        // A copy of exactly its size: the sanitizers see a byte read behind it.
        std::vector<uint8_t> copy(bytes.begin(), bytes.end());
        return parse_llmc_model(copy.data(), copy.size(), out, error);
    };
    REQUIRE(parse(good));
    for (size_t n : {(size_t)0, (size_t)3, (size_t)4, (size_t)1023, (size_t)1024, (size_t)5000, good.size() - 1}) {
        CHECK(!parse(good.substr(0, n)));
        CHECK(!error.empty());
    }
    CHECK(!parse(good + "x"));
    for (int word = 0; word < 8; word++)
        for (int32_t value : {INT32_MIN, -1, 0, 1, 2, 7, 1000, 65536, 1 << 24, 1 << 30, INT32_MAX}) {
            std::string bad = good;
            int32_t before = load<int32_t>(&bad[word * 4]);
            memcpy(&bad[word * 4], &value, 4);
            CAPTURE(word);
            CAPTURE(value);
            bool may = value == before || (word == 5 && (value == 1 || value == 2)) || (word == 3 && value > 0 && value <= 128);
            CHECK(parse(bad) == may);
        }
    for (int32_t version : {1, 2, 4, 6}) {
        std::string bad = good;
        memcpy(&bad[4], &version, 4);
        CHECK(!parse(bad));
        CHECK(error.find("version is " + std::to_string(version)) != std::string::npos);
    }
}

// ----------------------------------------------------------------------------
// Our own checkpoints, and what is written of them

TEST_CASE("every layer's checkpoint, in float32 and bf16, back again bit for bit") {
    for (const char* attention :
         {"causal:kv-heads=1:window=5", "infini:segment=4", "lightning", "mla:q-lora-rank=6", "causal,infini:segment=4,lightning,mla"}) {
        CAPTURE(attention);
        TemporaryDirectory d;
        ModelFile m = make_model(attention), narrow = make_model(attention, "", true);
        write_own(m, d / "a", "F32");
        check_same_model(m, open_model(d / "a"));
        convert_to(d / "a", "attn", d / "b");
        CHECK(contents(d / "a/model.safetensors") == contents(d / "b/model.safetensors"));
        CHECK(contents(d / "a/state.json") == contents(d / "b/state.json"));
        write_own(narrow, d / "n", "BF16");
        check_same_model(narrow, open_model(d / "n"));
        convert_to(d / "n", "attn", d / "wide", "float32");
        convert_to(d / "wide", "attn", d / "n2", "bf16");
        CHECK(contents(d / "n/model.safetensors") == contents(d / "n2/model.safetensors"));
        // What is float32 in every model stays so.
        for (const SafeTensor& t : SafeTensorsFile(d / "n/model.safetensors").header.tensors)
            CHECK(t.dtype == (t.name.find("beta") == std::string::npos ? "BF16" : "F32"));
    }
}

TEST_CASE("what GPT-2 does not have is not left out in silence") {
    struct {
        const char *attention, *positions, *named;
    } cases[] = {{"causal", "rope", "rope"},
                 {"causal", "none", "none"},
                 {"causal:kv-heads=1", "", "kv-heads=1"},
                 {"causal*3,causal:window=9", "", "layer 3 has window=9"},
                 {"causal*2,lightning,causal", "learned", "layer 2 is lightning"},
                 {"infini:segment=4", "learned", "layer 0 is infini"},
                 {"mla", "learned", "layer 0 is mla"}};
    TemporaryDirectory d;
    for (const auto& c : cases) {
        CAPTURE(c.attention);
        ModelFile m = make_model(c.attention, c.positions);
        check_error(EXIT_DATA, {c.named, "made"}, [&] { write_hf(m, d / "out", "F32"); });
        check_error(EXIT_DATA, {c.named, "made"}, [&] { write_llmc(m, d / "out", "F32"); });
        check_error(EXIT_DATA, {c.named, "made"}, [&] { write_gguf(m, d / "out", "F32"); });
    }
    check_error(EXIT_DATA, {"no mla or lightning"}, [&] { write_hf_attention(make_model("causal"), d / "out", "F32"); });
    check_error(EXIT_DATA, {"layer 0", "decay=fla"}, [&] { write_hf_attention(make_model("lightning:decay=fla"), d / "out", "F32"); });
    CHECK(fs::is_empty(d.path));
}

TEST_CASE("attention modules: names, q, k and v of a head together, nothing else moved") {
    TemporaryDirectory d;
    ModelFile m = make_model("lightning,mla,mla:q-lora-rank=6,causal");
    write_hf_attention(m, d / "out", "F32");
    SafeTensorsFile file(d / "out/model.safetensors");
    CHECK(file.header.tensors.size() == 4 + 5 + 7);
    auto values = [&](const std::string& name, std::vector<int64_t> shape) {
        std::vector<float> v((size_t)(shape[0] * (shape.size() > 1 ? shape[1] : 1)));
        file.copy("model.layers." + name + ".weight", shape, v.data());
        return v;
    };
    std::vector<float> packed = values("0.self_attn.qkv_proj", {48, 16}), ours = values_of(m, "h.0.attn.wqkv");
    int hs = 8, C = 16;
    for (int h = 0; h < 2; h++)
        for (int which = 0; which < 3; which++)
            for (int row = 0; row < hs; row++)
                CHECK(memcmp(&packed[((h * 3 + which) * hs + row) * C], &ours[(which * C + h * hs + row) * C], C * sizeof(float)) == 0);
    CHECK(values("0.self_attn.out_proj", {16, 16}) == values_of(m, "h.0.attn.wo"));
    CHECK(values("0.self_attn.output_gate", {16, 16}) == values_of(m, "h.0.attn.wg"));
    CHECK(values("0.self_attn.norm", {16}) == values_of(m, "h.0.attn.gain"));
    const AttentionConfig& a = m.config.attention[2];
    int dc = a["kv-lora-rank"], rope = a["qk-rope-dim"], nope = a["qk-nope-dim"], v = a["v-dim"];
    CHECK(values("1.self_attn.q_proj", {2 * (nope + rope), 16}) == values_of(m, "h.1.attn.wq"));
    CHECK(values("2.self_attn.q_a_proj", {6, 16}) == values_of(m, "h.2.attn.wdq"));
    CHECK(values("2.self_attn.q_a_layernorm", {6}) == values_of(m, "h.2.attn.gq"));
    CHECK(values("2.self_attn.q_b_proj", {2 * (nope + rope), 6}) == values_of(m, "h.2.attn.wuq"));
    CHECK(values("2.self_attn.kv_a_proj_with_mqa", {dc + rope, 16}) == values_of(m, "h.2.attn.wdkv"));
    CHECK(values("2.self_attn.kv_a_layernorm", {dc}) == values_of(m, "h.2.attn.gkv"));
    CHECK(values("2.self_attn.kv_b_proj", {2 * (nope + v), dc}) == values_of(m, "h.2.attn.wukv"));
    CHECK(values("2.self_attn.o_proj", {16, 2 * v}) == values_of(m, "h.2.attn.wo"));
    nlohmann::json modules = nlohmann::json::parse(contents(d / "out/attention.json"));
    REQUIRE(modules.size() == 3);
    CHECK(modules[0]["module"] == "MiniMaxLightningAttention");
    CHECK(modules[0]["config"]["num_hidden_layers"] == 4);  // the slopes depend on it
    CHECK(modules[1]["config"]["q_lora_rank"].is_null());
    CHECK(modules[2]["config"]["q_lora_rank"] == 6);
    CHECK(modules[2]["layer"] == 2);
    CHECK(modules[2]["config"]["rope_interleave"] == true);
}

// ----------------------------------------------------------------------------
// GGUF: a reader of its own, as strict as the format

struct Gguf {
    std::string bytes;
    size_t at = 0;
    std::map<std::string, std::string> keys;  // values as text
    struct Tensor {
        std::vector<uint64_t> shape;  // innermost first
        uint32_t type;
        uint64_t offset;
    };
    std::map<std::string, Tensor> tensors;
    size_t data = 0;

    template <class T>
    T next() {
        REQUIRE(at + sizeof(T) <= bytes.size());
        at += sizeof(T);
        return load<T>(&bytes[at - sizeof(T)]);
    }
    std::string text() {
        uint64_t n = next<uint64_t>();
        REQUIRE(n <= bytes.size() - at);
        at += n;
        return bytes.substr(at - n, n);
    }
    std::string value(uint32_t type) {
        if (type == 4) return std::to_string(next<uint32_t>());
        if (type == 5) return std::to_string(next<int32_t>());
        if (type == 6) return format("%g", next<float>());
        if (type == 7) return next<uint8_t>() ? "true" : "false";
        if (type == 8) return text();
        REQUIRE(type == 9);
        uint32_t of = next<uint32_t>();
        uint64_t n = next<uint64_t>();
        std::string all;
        for (uint64_t i = 0; i < n; i++) all += (i ? "|" : "") + value(of);
        return all;
    }
    explicit Gguf(const std::string& path) : bytes(contents(path)) {
        REQUIRE(bytes.substr(0, 4) == "GGUF");
        at = 4;
        CHECK(next<uint32_t>() == 3);
        uint64_t count = next<uint64_t>(), pairs = next<uint64_t>();
        for (uint64_t i = 0; i < pairs; i++) {
            std::string key = text();
            CHECK(keys.insert({key, value(next<uint32_t>())}).second);
        }
        for (uint64_t i = 0; i < count; i++) {
            std::string name = text();
            Tensor t;
            t.shape.resize(next<uint32_t>());
            for (uint64_t& s : t.shape) s = next<uint64_t>();
            t.type = next<uint32_t>();
            t.offset = next<uint64_t>();
            CHECK(t.offset % 32 == 0);
            CHECK(tensors.insert({name, t}).second);
        }
        data = (at + 31) / 32 * 32;
    }
    std::vector<float> values(const std::string& name) {
        REQUIRE(tensors.count(name));
        const Tensor& t = tensors.at(name);
        uint64_t n = 1;
        for (uint64_t s : t.shape) n *= s;
        std::vector<float> v(n);
        uint64_t width = t.type == 0 ? 4 : 2;
        REQUIRE(data + t.offset + n * width <= bytes.size());
        read_floats(t.type == 0 ? "F32" : t.type == 1 ? "F16" : "BF16", (const uint8_t*)&bytes[data + t.offset], n, v.data());
        return v;
    }
};

TEST_CASE("GGUF: keys, names, shapes and numbers") {
    TemporaryDirectory d;
    ModelFile m = make_model("causal", "", false, 12);  // few tensors end at a multiple of 32 bytes
    for (const char* dtype : {"F32", "F16", "BF16"}) {
        CAPTURE(dtype);
        uint32_t type = dtype == std::string("F32") ? 0 : dtype == std::string("F16") ? 1 : 30;
        std::string path = d / (std::string(dtype) + ".gguf");
        write_gguf(m, path, dtype);
        Gguf g(path);
        CHECK(g.keys["general.architecture"] == "gpt2");
        CHECK(g.keys["general.alignment"] == "32");
        CHECK(g.keys["gpt2.context_length"] == "16");
        CHECK(g.keys["gpt2.embedding_length"] == "12");
        CHECK(g.keys["gpt2.feed_forward_length"] == "48");
        CHECK(g.keys["gpt2.block_count"] == "4");
        CHECK(g.keys["gpt2.attention.head_count"] == "2");
        CHECK(g.keys["gpt2.attention.layer_norm_epsilon"] == "1e-05");
        CHECK(g.keys["gpt2.vocab_size"] == "61");
        CHECK(g.keys["tokenizer.ggml.model"] == "no_vocab");
        CHECK(g.tensors.size() == 5 + 4 * 12);
        CHECK(g.tensors["token_embd.weight"].shape == std::vector<uint64_t>{12, 61});
        CHECK(g.tensors["blk.3.ffn_up.weight"].shape == std::vector<uint64_t>{12, 48});
        CHECK(g.tensors["blk.3.ffn_down.weight"].shape == std::vector<uint64_t>{48, 12});
        CHECK(g.values("output.weight") == g.values("token_embd.weight"));
        for (const TensorSpec& s : model_parameters(m.config).specs) {
            CAPTURE(s.name);
            CHECK(g.tensors[gguf_name(s.name)].type == (s.shape.size() == 1 ? 0 : type));
            std::vector<float> ours = values_of(m, s.name), theirs = g.values(gguf_name(s.name));
            if (s.name == "wte") ours.resize(61 * 12);
            for (float& x : ours)
                if (s.shape.size() > 1 && type) x = type == 1 ? half_to_float(float_to_half(x)) : bf16_to_float(float_to_bf16(x));
            CHECK(ours == theirs);
        }
        uint64_t last = 0;
        for (const auto& t : g.tensors) last = std::max(last, t.second.offset);
        CHECK(g.bytes.size() == g.data + last + (type ? 1472 : 2944));  // output.weight's 1464 or 2928 bytes, padded
    }
}

TEST_CASE("GGUF: a tokenizer of bytes, and a vocabulary's") {
    GgufHeader h;
    add_tokenizer(h, make_tokenizer("bytes"));
    CHECK(h.keys == 8);
    for (const char* part : {"tokenizer.ggml.model", "gpt2", "tokenizer.ggml.merges", "<|endoftext|>", "\xc4\xa0" /* a space */, "\xc4\x8a" /* a line feed */})
        CHECK_MESSAGE(h.bytes.find(part) != std::string::npos, part);
    // 256 bytes, a merge, the end.
    std::string json = "{", comma;
    for (int b = 0; b < 256; b++) {
        json += comma + nlohmann::json(byte_characters().shown(std::string(1, (char)b))).dump() + ":" + std::to_string(b);
        comma = ",";
    }
    auto bpe = std::make_shared<Bpe>();
    std::string error;
    REQUIRE(parse_bpe(json + R"(,"\u0120a":256,"<|endoftext|>":257})", "#version: 0.2\n\xc4\xa0 a\n", *bpe, error));
    GgufHeader g;
    add_tokenizer(g, make_tokenizer(bpe));
    CHECK(g.bytes.find("\xc4\xa0 a") != std::string::npos);
    CHECK(g.bytes.find("\xc4\xa0"
                       "a") != std::string::npos);
}

// ----------------------------------------------------------------------------
// The command, and training from a model

TEST_CASE("what the input is, its content says") {
    TemporaryDirectory d;
    write_file(d / "text", "hello");
    write_file(d / "empty", "");
    write_file(d / "gguf", "GGUF\3");
    fs::create_directory(d / "nothing");
    check_error(EXIT_DATA, {"no model of llm.c"}, [&] { open_model(d / "text"); });
    check_error(EXIT_DATA, {"no model of llm.c"}, [&] { open_model(d / "empty"); });
    check_error(EXIT_DATA, {"GGUF"}, [&] { open_model(d / "gguf"); });
    check_error(EXIT_DATA, {"nothing"}, [&] { open_model(d / "nothing"); });
    check_error(EXIT_DATA, {"missing"}, [&] { open_model(d / "missing"); });
    fs::create_directory(d / "llama");
    write_file(d / "llama/config.json", R"({"model_type": "llama"})");
    check_error(EXIT_DATA, {"config.json", "model_type", "llama"}, [&] { open_model(d / "llama"); });
}

TEST_CASE("outputs appear whole, or not at all, and replace nothing") {
    TemporaryDirectory d;
    for (const char* to : {"attn", "hf", "llmc", "gguf"}) {
        convert_to(fixtures + "gpt2", to, d / to);
        std::string before = fs::is_directory(d / to) ? contents(d / to + "/model.safetensors") : contents(d / to);
        check_error(EXIT_DATA, {"is there already", to}, [&] { convert_to(fixtures + "gpt2", to, d / to); });
        CHECK(before == (fs::is_directory(d / to) ? contents(d / to + "/model.safetensors") : contents(d / to)));
        fs::remove_all(d / to);
    }
    ModelFile m = make_model("causal");
    auto read = m.read;
    m.read = [read](const TensorSpec& s, float* to) {
        read(s, to);
        if (s.name == "h.2.mlp.wfc") to[5] = -70000;  // beyond float16, when most is written
    };
    check_error(EXIT_DATA, {"h.2.mlp.wfc", "-70000", "float16"}, [&] { write_hf(m, d / "hf", "F16"); });
    check_error(EXIT_DATA, {"h.2.mlp.wfc"}, [&] { write_gguf(m, d / "gguf", "F16"); });
    check_error(EXIT_USAGE, {"float16"}, [&] { write_llmc(m, d / "llmc", "F16"); });
    {
        NewDirectory half(d / "half");
        write_file(half.file("first"), "x");
        CHECK(fs::exists(d / "half.tmp/first"));
    }
    CHECK(fs::is_empty(d.path));
    fs::create_directory(d / "hf.tmp");
    write_file(d / "hf.tmp/somebody's", "x");
    check_error(EXIT_DATA, {"hf.tmp"}, [&] { write_hf(m, d / "hf", "F32"); });
    CHECK(fs::exists(d / "hf.tmp/somebody's"));
}

TEST_CASE("the tokenizer of numbers has a name for each vocabulary") {
    struct {
        const char* name;
        int vocab_size, end_of_text;
    } good[] = {{"ids", 50257, 50256}, {"ids:300", 300, 299}, {"ids:300:7", 300, 7}, {"ids:50257:0", 50257, 0}, {"ids:1", 1, 0}};
    for (const auto& g : good) {
        Tokenizer t = make_tokenizer(g.name);
        CHECK(t.vocab_size == g.vocab_size);
        CHECK(t.end_of_text == g.end_of_text);
        CHECK(ids_tokenizer_name(t.vocab_size, t.end_of_text) == g.name);
    }
    for (const char* bad :
         {"ids:", "ids:0", "ids:-1", "ids:50257", "ids:300:299", "ids:300:300", "ids:300:-1", "ids:300:", "ids:300x", "ids:0300", "ids: 300", "ids:99999999"})
        check_error(EXIT_USAGE, {bad}, [&] { make_tokenizer(bad); });
}

// The program's exit status; what it says last on standard error is in `line`.
static int run_program(const TemporaryDirectory& d, const std::string& arguments, std::string& line) {
    const char* path = getenv("TRAIN_GPT2");
    std::string command = std::string(path ? path : "./train_gpt2") + " " + arguments + " >" + (d / "out.txt") + " 2>" + (d / "err.txt");
    int status = system(command.c_str());
    line = contents(d / "err.txt");
    return WIFEXITED(status) ? WEXITSTATUS(status) : -1;
}

TEST_CASE("training, evaluation and generation start from a model of each kind") {
    TemporaryDirectory d;
    std::vector<int32_t> header = shard_header(2, 200);
    std::string shard((const char*)header.data(), header.size() * 4), line;
    for (uint16_t i = 0; i < 200; i++) {
        uint16_t token = i % 61;
        shard.append((const char*)&token, 2);
    }
    write_file(d / "tokens.bin", shard);
    ModelFile m = make_model("causal"), hybrid = make_model("lightning,mla*2,causal");
    write_own(m, d / "own", "F32");
    write_own(hybrid, d / "hybrid", "BF16");
    write_hf(m, d / "hf", "F32");
    write_llmc(m, d / "m.bin", "BF16");
    const std::string train = "train --threads 1 --steps 0 --val-every 0 --sample-every 0 --batch 2 --seq 8 --data " + (d / "tokens.bin");
    for (const char* from : {"own", "hybrid", "hf", "m.bin"}) {
        std::string out = d / (std::string("run_") + from), path = d / from;
        REQUIRE_MESSAGE(run_program(d, train + " --out " + out + " --init-from " + path, line) == 0, line);
        ModelFile start = open_model(path), run = open_model(out);
        start.dtype = "F32";  // what a run keeps
        check_same_model(start, run);
        CHECK(run.state.step == 0);
        CHECK(run.state.tokenizer["name"] == "ids:61");
        CHECK_MESSAGE(run_program(d, "train --threads 1 --resume --steps 2 --out " + out, line) == 0, line);
        run = open_model(out);
        CHECK(run.state.step == 2);
        CHECK(values_of(run, "wte") != values_of(start, "wte"));
        CHECK_MESSAGE(run_program(d, "eval --data " + (d / "tokens.bin") + " --checkpoint " + path, line) == 0, line);
        CHECK_MESSAGE(run_program(d, "generate --tokens 3 --prompt 5 --checkpoint " + path, line) == 0, line);
    }
    struct {
        const char *typed, *named;
    } contradictions[] = {{"--layers 5", "has 4"},
                          {"--max-seq 8", "has 16"},
                          {"--preset gpt2-124M", "layers 4 instead of 12"},
                          {"--positions rope", "has learned"},
                          {"--attention mla", "has causal"},
                          {"--window 4", "window=0"},
                          {"--tokenizer ids", "50257 tokens"},
                          {"--tokenizer bytes", "257 tokens"}};
    for (const auto& c : contradictions) {
        CAPTURE(c.typed);
        CHECK(run_program(d, train + " --out " + (d / "never") + " --init-from " + (d / "own") + " " + c.typed, line) == EXIT_USAGE);
        CAPTURE(line);
        if (std::string(c.typed) != "--window 4") CHECK(line.find(c.typed) != std::string::npos);
        CHECK(line.find(c.named) != std::string::npos);
        CHECK(line.find(d / "own") != std::string::npos);
        CHECK(!fs::exists(d / "never"));
    }
    const std::string agree = " --layers 4 --heads 2 --attention causal:kv-heads=2 --positions learned --tokenizer ids:61:3";
    CHECK_MESSAGE(run_program(d, train + " --out " + (d / "agrees") + " --init-from " + (d / "own") + agree, line) == 0, line);
    CHECK(open_model(d / "agrees").tokenizer.end_of_text == 3);
    CHECK(run_program(d, "train --resume --out " + (d / "agrees") + " --init-from " + (d / "own"), line) == EXIT_USAGE);
    CHECK(line.find("leave out --init-from") != std::string::npos);
    CHECK_MESSAGE(run_program(d, "convert --checkpoint " + (d / "own") + " --to llmc --dtype bf16 --out " + (d / "again.bin"), line) == 0, line);
    CHECK(contents(d / "again.bin") == contents(d / "m.bin"));
    CHECK(run_program(d, "convert --to llmc --out x", line) == EXIT_USAGE);
    CHECK(run_program(d, "convert --checkpoint x --out x", line) == EXIT_USAGE);
    CHECK(run_program(d, "convert --checkpoint x --to word --out x", line) == EXIT_USAGE);
    CHECK(line.find("attn, hf, hf-attention, llmc, gguf") != std::string::npos);
}
