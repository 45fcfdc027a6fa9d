// Unit tests of the host-side code: parsers, tokenizers, the data path, the configuration. Whole layers and models are test_gpt2.cpp's business.
//
//     unit_tests [--list-test-cases] [--test-case=PATTERN]
//
// Parsers get their bytes in a block of exactly that size, so that the address sanitizer sees a single byte read beyond the end.
#define DOCTEST_CONFIG_IMPLEMENT_WITH_MAIN
#define DOCTEST_CONFIG_SUPER_FAST_ASSERTS  // fast to compile
#include <doctest/doctest.h>

#include <csignal>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <numeric>
#include <random>
#include <set>
#include <sys/resource.h>

#include "attention.h"
#include "dev/test/testing.h"
#include "gpt2/config.h"
#include "gpt2/dataloader.h"
#include "gpt2/files.h"
#include "gpt2/philox.h"
#include "gpt2/safetensors.h"
#include "gpt2/state.h"
#include "gpt2/tokenizer.h"

// ---------------------------------------------------------------------------------------------------------------------------------------------------------
// Tools

static const TemporaryDirectory directory;
static std::string temporary(const std::string& name) { return directory / name; }

static std::string put(const std::string& name, const std::string& bytes) {
    std::ofstream(temporary(name), std::ios::binary) << bytes;
    return temporary(name);
}

// Independent of the code under test: the JSON library refuses to write what is not UTF-8.
static bool is_utf8(const std::string& s) {
    try {
        nlohmann::json(s).dump();
        return true;
    } catch (const nlohmann::json::exception&) {
        return false;
    }
}

// ---------------------------------------------------------------------------------------------------------------------------------------------------------
// Philox

TEST_CASE("philox: known answer") {
    Philox p = philox(0, 0, 0, 0, 0);
    CHECK(p.word[0] == 0x6627e8d5);
    CHECK(p.word[1] == 0xe169c58d);
    CHECK(p.word[2] == 0xbc57ac4c);
    CHECK(p.word[3] == 0x9b00dbd8);
    p = philox(~0ull, ~0u, ~0u, ~0u, ~0u);  // from the authors' own test vectors
    CHECK(p.word[0] == 0x408f276d);
    CHECK(p.word[1] == 0x41c83b0e);
    CHECK(p.word[2] == 0xa20bc7c6);
    CHECK(p.word[3] == 0x6d5451fd);
}

TEST_CASE("philox: uniform and normal numbers") {
    CHECK(philox_uniform(0) == 0);
    CHECK(philox_uniform(~0u) < 1);
    double mean = 0, square = 0;
    int n = 20000;
    for (int i = 0; i < n; i++) {
        Philox p = philox(7, i, 0, 0, 0);
        double x, y;
        philox_normal(p.word[0], p.word[1], &x, &y);
        mean += (x + y) / (2 * n);
        square += (x * x + y * y) / (2 * n);
    }
    CHECK(std::abs(mean) < 0.02);
    CHECK(std::abs(square - 1) < 0.04);
    double x, y;
    philox_normal(0, 0, &x, &y);  // the smallest word: still finite
    CHECK(std::isfinite(x));
    CHECK(std::isfinite(y));
}

// ---------------------------------------------------------------------------------------------------------------------------------------------------------
// safetensors

static bool parse(const std::string& file, SafeTensorsHeader& header, std::string& error) {
    std::vector<uint8_t> exact(file.begin(), file.end());
    exact.shrink_to_fit();
    bool good = parse_safetensors(exact.data(), exact.size(), header, error);
    CHECK(good == error.empty());
    if (!good) CHECK(header.tensors.empty());
    return good;
}

static std::string with_length(const std::string& json) {
    uint64_t n = json.size();
    return std::string((const char*)&n, 8) + json;
}

static TensorToWrite tensor_to_write(const std::string& name, const std::string& dtype, std::vector<int64_t> shape, const void* data) {
    return {name, dtype, std::move(shape), [data] { return data; }};
}

static const std::vector<float> floats = {1.5f, -2, 0.25f, 3e38f, 1e-42f, -0.0f};
static const std::vector<int64_t> longs = {-5, 2147483647, 0};

static std::string small_file() {
    std::string path = temporary("small.safetensors");
    write_safetensors(path, {tensor_to_write("h.0.ln1.w", "F32", {2, 3}, floats.data()), tensor_to_write("n", "I64", {3}, longs.data())},
                      {{"format", "pt"}, {"quote\"", "ä"}});
    return path;
}

TEST_CASE("safetensors: what is written is read") {
    std::string path = temporary("types.safetensors");
    std::vector<double> doubles = {0.1, -1e-300};
    std::vector<int32_t> ints = {1, -1, 7};
    std::vector<uint16_t> bf16 = {0x3f80, 0xc000, 0x7f80}, f16 = {0x3c00, 0xc000, 0x0001, 0x7bff, 0x7c00, 0x8000, 0x0400};
    float scalar = 42;
    write_safetensors(path,
                      {tensor_to_write("z.first", "F32", {2, 3}, floats.data()), tensor_to_write("a.bf16", "BF16", {3}, bf16.data()),
                       tensor_to_write("f16", "F16", {7}, f16.data()), tensor_to_write("f64", "F64", {1, 2, 1}, doubles.data()),
                       tensor_to_write("i32", "I32", {3}, ints.data()), tensor_to_write("empty", "F32", {4, 0}, nullptr),
                       tensor_to_write("i64", "I64", {3}, longs.data()), tensor_to_write("scalar", "F32", {}, &scalar)},
                      {{"step", "10"}});
    CHECK(!std::filesystem::exists(path + ".tmp"));
    SafeTensorsFile f(path);
    CHECK(f.header.data_start % 8 == 0);
    CHECK(f.header.metadata.at("step") == "10");
    CHECK(f.header.tensors.size() == 8);
    CHECK(f.header.tensors[0].name == "z.first");
    CHECK(contents(path).substr(8, 16) == "{\"__metadata__\":");
    CHECK(contents(path).find("z.first") < contents(path).find("a.bf16"));

    std::vector<float> x(7);
    f.copy("z.first", {2, 3}, x.data());
    for (size_t i = 0; i < floats.size(); i++) CHECK(load<uint32_t>(&x[i]) == load<uint32_t>(&floats[i]));
    f.copy("a.bf16", {3}, x.data());
    CHECK(x[0] == 1);
    CHECK(x[1] == -2);
    CHECK(x[2] == std::numeric_limits<float>::infinity());
    f.copy("f16", {7}, x.data());
    CHECK(x[0] == 1);
    CHECK(x[1] == -2);
    CHECK(x[2] == std::ldexp(1.0f, -24));
    CHECK(x[3] == 65504);
    CHECK(x[4] == std::numeric_limits<float>::infinity());
    CHECK(std::signbit(x[5]));
    CHECK(x[6] == std::ldexp(1.0f, -14));
    f.copy("f64", {1, 2, 1}, x.data());
    CHECK(x[0] == 0.1f);
    double d[2];
    f.copy("f64", {1, 2, 1}, d);
    CHECK(d[0] == 0.1);
    CHECK(d[1] == -1e-300);
    int32_t n[3];
    f.copy("i32", {3}, n);
    CHECK(n[1] == -1);
    f.copy("i64", {3}, n);
    CHECK(n[0] == -5);
    CHECK(n[1] == 2147483647);
    f.copy("empty", {4, 0}, x.data());
    f.copy("scalar", {}, x.data());
    CHECK(x[0] == 42);
}

TEST_CASE("safetensors: half precision, every value") {
    CHECK(std::isnan(half_to_float(0x7e00)));
    for (int h = 0; h < 0x7c00; h++) {
        float expected = std::ldexp((float)((h >> 10 ? 1024 : 0) + (h & 1023)), (h >> 10 ? h >> 10 : 1) - 25);
        REQUIRE(half_to_float((uint16_t)h) == expected);
        REQUIRE(half_to_float((uint16_t)(h | 0x8000)) == -expected);
    }
}

TEST_CASE("safetensors: truncated at every byte") {
    std::string file = contents(small_file()), error;
    SafeTensorsHeader header;
    REQUIRE(parse(file, header, error));
    CHECK(header.tensors.size() == 2);
    CHECK(header.metadata.at("quote\"") == "ä");
    for (size_t n = 0; n < file.size(); n++) CHECK_MESSAGE(!parse(file.substr(0, n), header, error), n << " bytes");
    CHECK(!parse(file + '\0', header, error));
}

TEST_CASE("safetensors: every bit flipped") {
    std::string file = contents(small_file()), error;
    size_t refused = 0, data_start = 8 + load<uint64_t>(file.data());
    for (size_t i = 0; i < file.size(); i++)
        for (int bit = 0; bit < 8; bit++) {
            std::string bad = file;
            bad[i] = (char)(bad[i] ^ 1 << bit);
            SafeTensorsHeader header;
            if (!parse(bad, header, error)) {
                refused++;
                CHECK(i < data_start);  // the header knows nothing of the data's values
                continue;
            }
            uint64_t bytes = 0;
            for (const SafeTensor& t : header.tensors) bytes += t.end - t.begin;
            CHECK(header.data_start + bytes == bad.size());
        }
    CHECK(refused > 1000);
}

TEST_CASE("safetensors: headers, right and wrong") {
    struct Case {
        const char* json;
        int data_bytes;
        const char* error;  // "": none
    };
    const std::string x = "\"x\":{\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[0,8]}";
    const std::vector<Case> cases = {
        {"{}", 0, ""},
        {"{}   ", 0, ""},
        {"{X}", 8, ""},
        {"{\"__metadata__\":{},X}", 8, ""},
        {"{X,\"s\":{\"dtype\":\"F32\",\"shape\":[],\"data_offsets\":[8,12]}}", 12, ""},
        {"{\"z\":{\"dtype\":\"F32\",\"shape\":[0],\"data_offsets\":[8,8]},X,\"y\":{\"dtype\":\"I8\",\"shape\":[0,7],\"data_offsets\":[0,0]}}", 8, ""},
        {"{\"late\":{\"data_offsets\":[8,9],\"shape\":[1],\"dtype\":\"BOOL\"},X}", 9, ""},
        {"{\"z\":{\"dtype\":\"F64\",\"shape\":[0,9223372036854775807,9223372036854775807],\"data_offsets\":[0,0]}}", 0, ""},
        {"{}", 1, "1 bytes follow"},
        {"{X}", 9, "1 bytes follow"},
        {"{X}", 7, "cut short"},
        {"{X,X}", 8, "'x' is there twice"},
        {"{\"\\u0078\":{\"dtype\":\"F32\",\"shape\":[0],\"data_offsets\":[0,0]},X}", 8, "'x' is there twice"},
        {"{\"__metadata__\":{},X,\"__metadata__\":{}}", 8, "twice"},
        {"{\"__metadata__\":{\"a\":\"1\",\"a\":\"2\"}}", 0, "key 'a' twice"},
        {"{\"__metadata__\":{\"a\":1}}", 0, "number"},
        {"{\"__metadata__\":{\"a\":{}}}", 0, "object"},
        {"{\"__metadata__\":{\"a\":[]}}", 0, "array"},
        {"{\"__metadata__\":null}", 0, "null"},
        {"{\"x\":{\"dtype\":\"F32\",\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[0,8]}}", 8, "'dtype' twice"},
        {"{\"x\":{\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[0,8],\"more\":1}}", 8, "unknown key 'more'"},
        {"{\"x\":{\"dtype\":\"F33\",\"shape\":[2],\"data_offsets\":[0,8]}}", 8, "unknown dtype 'F33'"},
        {"{\"x\":{\"dtype\":7,\"shape\":[2],\"data_offsets\":[0,8]}}", 8, "number"},
        {"{\"x\":{\"dtype\":[7],\"shape\":[2],\"data_offsets\":[0,8]}}", 8, "array"},
        {"{\"x\":{\"shape\":[2],\"data_offsets\":[0,8]}}", 8, "no dtype"},
        {"{\"x\":{\"dtype\":\"F32\",\"data_offsets\":[0,8]}}", 8, "no shape"},
        {"{\"x\":{\"dtype\":\"F32\",\"shape\":[2]}}", 8, "no data_offsets"},
        {"{\"x\":{}}", 0, "no dtype"},
        {"{\"x\":[]}", 0, "array"},
        {"{\"x\":3}", 0, "number"},
        {"{\"x\":\"y\"}", 0, "string"},
        {"{\"x\":{\"dtype\":\"F32\",\"shape\":2,\"data_offsets\":[0,8]}}", 8, "number"},
        {"{\"x\":{\"dtype\":\"F32\",\"shape\":[[2]],\"data_offsets\":[0,8]}}", 8, "array"},
        {"{\"x\":{\"dtype\":\"F32\",\"shape\":[{}],\"data_offsets\":[0,8]}}", 8, "object"},
        {"{\"x\":{\"dtype\":\"F32\",\"shape\":[\"2\"],\"data_offsets\":[0,8]}}", 8, "string"},
        {"{\"x\":{\"dtype\":\"F32\",\"shape\":[true],\"data_offsets\":[0,8]}}", 8, "true or false"},
        {"{\"x\":{\"dtype\":\"F32\",\"shape\":[-2],\"data_offsets\":[0,8]}}", 8, "negative"},
        {"{\"x\":{\"dtype\":\"F32\",\"shape\":[2.0],\"data_offsets\":[0,8]}}", 8, "fraction"},
        {"{\"x\":{\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[8]}}", 8, "two data_offsets"},
        {"{\"x\":{\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[0,8,8]}}", 8, "too many"},
        {"{\"x\":{\"dtype\":\"F32\",\"shape\":[3],\"data_offsets\":[0,8]}}", 8, "takes 12 bytes"},
        {"{\"x\":{\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[8,0]}}", 8, "offsets say 8 to 0"},
        {"{\"x\":{\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[4,12]}}", 12, "hole"},
        {"{X,\"y\":{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[12,16]}}", 16, "hole before it, at byte 8"},
        {"{X,\"y\":{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[4,8]}}", 8, "overlaps"},
        {"{X,\"y\":{\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[0,8]}}", 8, "overlaps"},
        // Sizes and offsets at the limits of 63 and 64 bits.
        {"{\"x\":{\"dtype\":\"I8\",\"shape\":[9223372036854775808],\"data_offsets\":[0,8]}}", 8, "beyond 63 bits"},
        {"{\"x\":{\"dtype\":\"I8\",\"shape\":[18446744073709551616],\"data_offsets\":[0,8]}}", 8, "beyond 64 bits"},
        {"{\"x\":{\"dtype\":\"I8\",\"shape\":[9223372036854775807],\"data_offsets\":[0,9223372036854775807]}}", 8, "cut short"},
        {"{\"x\":{\"dtype\":\"F32\",\"shape\":[4611686018427387906],\"data_offsets\":[0,8]}}", 8, "too large"},
        {"{\"x\":{\"dtype\":\"F32\",\"shape\":[4294967296,4294967296],\"data_offsets\":[0,0]}}", 0, "too large"},
        {"{\"x\":{\"dtype\":\"F32\",\"shape\":[4294967296,4294967296,0],\"data_offsets\":[0,0]}}", 0, "too large"},
        {"{\"x\":{\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[9223372036854775800,9223372036854775808]}}", 8, "beyond 63 bits"},
        {"{\"x\":{\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[9223372036854775799,9223372036854775807]}}", 8, "hole"},
        {"{\"x\":{\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[18446744073709551608,0]}}", 8, "beyond 63 bits"},
        {"{X,\"y\":{\"dtype\":\"I8\",\"shape\":[1000000000000],\"data_offsets\":[8,1000000000008]}}", 8, "cut short"},
        // Not JSON, or not as it must be.
        {"", 0, "start with '{'"},
        {" {}", 0, "start with '{'"},
        {"[]", 0, "start with '{'"},
        {"{", 0, "not JSON"},
        {"{\"x\":NaN}", 0, "not JSON"},
        {"{} {}", 0, "not JSON"},
        {"{}x", 0, "not JSON"},
        {"{X,}", 8, "not JSON"},
        {"{\"\xff\":{\"dtype\":\"F32\",\"shape\":[0],\"data_offsets\":[0,0]}}", 0, "not JSON"},
    };
    for (const Case& c : cases) {
        std::string json = c.json, error;
        for (size_t at; (at = json.find('X')) != std::string::npos;) json.replace(at, 1, x);
        SafeTensorsHeader header;
        bool good = parse(with_length(json) + std::string(c.data_bytes, 'd'), header, error);
        CHECK_MESSAGE(good == !*c.error, json << ": " << error);
        CHECK_MESSAGE(error.find(c.error) != std::string::npos, json << ": '" << c.error << "' is not in: " << error);
    }
}

TEST_CASE("safetensors: lengths, zero bytes, depth") {
    SafeTensorsHeader header;
    std::string error;
    for (uint64_t length : {1ull, 3ull, 100000000ull, 100000001ull, 1ull << 32, 1ull << 63, ~0ull, ~0ull - 7}) {
        std::string file = std::string((const char*)&length, 8) + "{}";
        CHECK_MESSAGE(!parse(file, header, error), length);
    }
    CHECK(!parse(with_length(std::string("{}\0{", 4)), header, error));
    CHECK(error.find("zero byte") != std::string::npos);
    CHECK(!parse(with_length("{\"x\":" + std::string(200000, '[')), header, error));
    std::string deep = "{";
    for (int i = 0; i < 100000; i++) deep += "\"x\":{";
    CHECK(!parse(with_length(deep), header, error));
    std::string rank = "{\"x\":{\"dtype\":\"I8\",\"shape\":[1";
    for (int i = 0; i < 1000; i++) rank += ",1";
    CHECK(!parse(with_length(rank + "],\"data_offsets\":[0,1]}}") + "d", header, error));
    CHECK(error.find("too many") != std::string::npos);
    CHECK(!parse(with_length("{\"a\\nb\":1}"), header, error));
    CHECK(error.find('\n') == std::string::npos);
}

TEST_CASE("safetensors: what a user gets to read") {
    std::string path = small_file();
    SafeTensorsFile f(path);
    std::vector<float> x(128);
    std::vector<int32_t> n(128);
    check_error(EXIT_DATA, {"tensor h.0.ln1.w of '" + path + "' has shape (2, 3), the model needs (128)"}, [&] { f.copy("h.0.ln1.w", {128}, x.data()); });
    check_error(EXIT_DATA, {"no tensor h.1.ln1.w", path, "(2, 3)"}, [&] { f.copy("h.1.ln1.w", {2, 3}, x.data()); });
    check_error(EXIT_DATA, {"n of '" + path, "I64", "F32"}, [&] { f.copy("n", {3}, x.data()); });
    check_error(EXIT_DATA, {"h.0.ln1.w of '" + path, "F32", "I32"}, [&] { f.copy("h.0.ln1.w", {2, 3}, n.data()); });
    int64_t large = 1ll << 31;
    write_safetensors(temporary("large"), {tensor_to_write("large", "I64", {}, &large)});
    check_error(EXIT_DATA, {"2147483648", "32 bits"}, [&] { SafeTensorsFile(temporary("large")).copy("large", {}, n.data()); });
    check_error(EXIT_DATA, {path + ".gone", "No such file"}, [&] { SafeTensorsFile g(path + ".gone"); });
    check_error(EXIT_DATA, {directory.path, "not a regular file"}, [&] { SafeTensorsFile g(directory.path); });
    check_error(EXIT_DATA, {"empty'", "too few"}, [&] { SafeTensorsFile g(put("empty", "")); });
    check_error(EXIT_DATA, {"cut'", "cut short"}, [&] { SafeTensorsFile g(put("cut", contents(path).substr(0, 100))); });
}

TEST_CASE("files: whole or not at all") {
    std::string path = put("old", "what stood there");
    // A disk that fills up: a limit on file sizes fails the write in its middle in the same way.
    struct rlimit before, limit;
    getrlimit(RLIMIT_FSIZE, &before);
    limit = before;
    limit.rlim_cur = 1000;
    auto handler = std::signal(SIGXFSZ, SIG_IGN);
    setrlimit(RLIMIT_FSIZE, &limit);
    std::vector<float> much(1000);
    std::string error;
    int exit_code = 0;
    try {
        write_safetensors(path, {tensor_to_write("a", "F32", {10}, much.data()), tensor_to_write("b", "F32", {1000}, much.data())});
    } catch (const Error& e) {
        error = e.what();
        exit_code = e.exit_code;
    }
    setrlimit(RLIMIT_FSIZE, &before);
    std::signal(SIGXFSZ, handler);
    CHECK(exit_code == EXIT_DATA);
    CHECK_MESSAGE(error.find("make room") != std::string::npos, error);
    CHECK(contents(path) == "what stood there");
    CHECK(!std::filesystem::exists(path + ".tmp"));

    check_error(EXIT_DATA, {"nowhere", "No such file"}, [&] { write_file(temporary("nowhere/file"), "x"); });
    std::filesystem::create_directory(temporary("directory"));
    check_error(EXIT_DATA, {"directory"}, [&] { write_file(temporary("directory"), "x"); });
    CHECK(!std::filesystem::exists(temporary("directory.tmp")));
    write_file(path, "new");
    CHECK(contents(path) == "new");
}

// ---------------------------------------------------------------------------------------------------------------------------------------------------------
// Tokenizers

TEST_CASE("tokenizer: bytes") {
    Tokenizer t = make_tokenizer("bytes");
    CHECK(t.vocab_size == 257);
    CHECK(t.end_of_text == 256);
    std::string all;
    for (int i = 0; i < 256; i++) all += (char)i;
    std::vector<int> ids = t.encode(all);
    REQUIRE(ids.size() == 256);
    for (int i = 0; i < 256; i++) {
        CHECK(ids[i] == i);
        CHECK(t.decode(i) == all.substr(i, 1));
    }
    CHECK(t.decode(256) == "<|endoftext|>");
    ids = t.encode("<|endoftext|>");
    CHECK(ids.size() == 13);
    CHECK(*std::max_element(ids.begin(), ids.end()) < 256);
    CHECK(t.encode("").empty());
    CHECK(t.identity() == nlohmann::json::parse("{\"name\":\"bytes\",\"vocab_size\":257,\"end_of_text\":256}"));
    CHECK(t.identity() != make_tokenizer("ids").identity());
    check_error(EXIT_USAGE, {"'words'", "bytes", "ids"}, [] { make_tokenizer("words"); });
}

TEST_CASE("tokenizer: documents") {
    Tokenizer t = make_tokenizer("bytes");
    // Tokens shown as text, the end of text as '#'.
    auto shown = [&](const std::string& corpus) {
        std::string s;
        for (int id : t.encode_corpus(corpus)) s += id == 256 ? '#' : (char)id;
        return s;
    };
    CHECK(shown("") == "");
    CHECK(shown("one") == "#one");
    CHECK(shown("one\n") == "#one\n");
    CHECK(shown("one<|endoftext|>two") == "#one#two");
    CHECK(shown("one\n<|endoftext|>\ntwo\n") == "#one\n#two\n");
    CHECK(shown("one\n<|endoftext|>\n\ntwo\n") == "#one\n#\ntwo\n");
    CHECK(shown("one\n<|endoftext|>\n") == "#one\n");
    CHECK(shown("one<|endoftext|>") == "#one");
    CHECK(shown("<|endoftext|>one") == "#one");
    CHECK(shown("<|endoftext|>\n<|endoftext|><|endoftext|>one") == "#one");
    CHECK(shown("<|endoftext|>") == "");
    CHECK(shown("a<|endoftext|b<|endoftext|") == "#a<|endoftext|b<|endoftext|");
    CHECK(shown("a<|endof<|endoftext|>text|>") == "#a<|endof#text|>");
}

TEST_CASE("tokenizer: ids") {
    Tokenizer t = make_tokenizer("ids");
    CHECK(t.vocab_size == 50257);
    CHECK(t.end_of_text == 50256);
    CHECK(t.encode(" 15496 11\n50256  0 ") == std::vector<int>{15496, 11, 50256, 0});
    CHECK(t.encode("").empty());
    CHECK(t.decode(15496) + t.decode(0) == "15496 0 ");
    for (const char* bad : {"50257", "-1", "12a", "hello", "99999999999999999999", "1,2"})
        check_error(EXIT_USAGE, {"'ids'", bad, "50256"}, [&] { t.encode(bad); });
}

static std::string print_in_pieces(const std::string& bytes, size_t piece, bool check_pieces = true) {
    Utf8Printer printer;
    std::string out;
    for (size_t i = 0; i < bytes.size(); i += piece) {
        std::string part = printer.push(std::string_view(bytes).substr(i, piece));
        if (check_pieces) CHECK(is_utf8(part));
        out += part;
    }
    return out + printer.finish();
}

TEST_CASE("UTF-8: valid text, split at every byte") {
    std::string text = "a\u00e4\u00df \u20ac\u4e2d\ud7ff\ue000\uffff \U0001F600\U00010000\U0010ffff\u007f\u0080\u07ff\u0800 \n";
    text += '\0';
    REQUIRE(is_utf8(text));
    for (size_t split = 0; split <= text.size(); split++) {
        Utf8Printer printer;
        std::string head = printer.push(text.substr(0, split)), tail = printer.push(text.substr(split));
        CHECK(is_utf8(head));
        CHECK(head.size() + 3 >= split);  // no more is held back than the beginning of one character
        CHECK(head + tail == text);
        CHECK(printer.finish() == "");
    }
    for (size_t piece : {1, 2, 3, 5}) CHECK(print_in_pieces(text, piece) == text);
}

TEST_CASE("UTF-8: invalid bytes become U+FFFD") {
    const std::string r = "\xEF\xBF\xBD";
    const std::vector<std::pair<std::string, std::string>> cases = {
        {"\x80", r},
        {"a\xffz", "a" + r + "z"},
        {"\xc3", r},
        {"\xc3(", r + "("},
        {"\xc0\xaf", r + r},  // overlong
        {"\xe0\x80\xaf", r + r + r},
        {"\xf0\x80\x80\xaf", r + r + r + r},
        {"\xed\xa0\x80", r + r + r},          // a surrogate
        {"\xf4\x90\x80\x80", r + r + r + r},  // beyond U+10FFFF
        {"\xf5\x80\x80\x80", r + r + r + r},
        {"\xe2\x82", r},  // one for a part that was right so far
        {"\xe2\x82z", r + "z"},
        {"\xf0\x9f\x98", r},
        {"\xf0\x9f\x98\xe2\x82\xac", r + "\u20ac"},
        {"\xe1\x80\xe2\xf0\x91\x92\xf1\xbf\x41", r + r + r + r + "A"},  // the example of the Unicode standard, table 3-11
    };
    for (const auto& c : cases)
        for (size_t piece : {1, 2, 100}) CHECK(print_in_pieces(c.first, piece) == c.second);
    std::string noise;
    for (uint32_t i = 0; i < 5000; i++) {
        Philox p = philox(1, i, 0, 0, 0);
        noise += (char)(p.word[0] % 4 ? 0x80 | p.word[1] : p.word[1]);  // mostly beyond ASCII
    }
    std::string whole = print_in_pieces(noise, noise.size());
    CHECK(is_utf8(whole));
    for (size_t piece : {1, 3, 64}) CHECK(print_in_pieces(noise, piece, false) == whole);
}

// ---------------------------------------------------------------------------------------------------------------------------------------------------------
// Shards and datasets

static std::string shard_header(int32_t magic, int32_t version, int32_t count) {
    std::vector<int32_t> header(256);
    header[0] = magic;
    header[1] = version;
    header[2] = count;
    return bytes_of(header);
}

static std::string shard_file(const std::vector<uint16_t>& tokens) { return shard_header(20240520, 1, (int32_t)tokens.size()) + bytes_of(tokens); }

static bool parse_shard_bytes(const std::string& file, ShardHeader& header, std::string& error) {
    std::vector<uint8_t> exact(file.begin(), file.end());
    exact.shrink_to_fit();
    error.clear();
    bool good = parse_shard(exact.data(), exact.size(), header, error);
    CHECK(good == error.empty());
    return good;
}

// Numbers first, first+1, ...
static std::vector<uint16_t> counting(int first, int count) {
    std::vector<uint16_t> v(count);
    std::iota(v.begin(), v.end(), first);
    return v;
}

// A dataset in memory, a shard for each list.
static Dataset dataset_of(const std::vector<std::vector<uint16_t>>& shards, int end_of_text = 65535) {
    Dataset d;
    d.name = "test";
    d.end_of_text = end_of_text;
    for (const auto& tokens : shards) {
        auto memory = std::make_shared<std::vector<uint16_t>>(tokens);
        Shard s;
        s.file = "shard " + std::to_string(d.shards.size());
        s.data = (const uint8_t*)memory->data();
        s.count = (int64_t)memory->size();
        s.owner = memory;
        d.add(std::move(s));
    }
    return d;
}

static LoaderOptions loader_options(int B, int T, bool shuffle = false, uint64_t seed = 1) {
    LoaderOptions o;
    o.B = B;
    o.T = T;
    o.shuffle = shuffle;
    o.seed = seed;
    o.end_of_text = 65535;
    o.vocab_size = 65536;
    return o;
}

TEST_CASE("shard: truncated at every byte, every bit of the header flipped") {
    std::string file = shard_file({1, 2, 3, 500, 50256}), error;
    ShardHeader header;
    REQUIRE(parse_shard_bytes(file, header, error));
    CHECK(header.count == 5);
    CHECK(header.width == 2);
    for (size_t n = 0; n < file.size(); n++) CHECK_MESSAGE(!parse_shard_bytes(file.substr(0, n), header, error), n << " bytes");
    CHECK(!parse_shard_bytes(file + "x", header, error));
    for (size_t bit = 0; bit < 12 * 8; bit++) {
        std::string bad = file;
        bad[bit / 8] = (char)(bad[bit / 8] ^ 1 << bit % 8);
        CHECK_MESSAGE(!parse_shard_bytes(bad, header, error), "bit " << bit);
    }
}

TEST_CASE("shard: headers, right and wrong") {
    ShardHeader header;
    std::string error, two(2, 'x'), four(4, 'x');
    CHECK(parse_shard_bytes(shard_header(20240801, 7, 1) + four, header, error));
    CHECK(header.width == 4);
    CHECK(!parse_shard_bytes(shard_header(20240801, 7, 1) + two, header, error));
    CHECK(!parse_shard_bytes(shard_header(20240801, 1, 1) + four, header, error));
    CHECK(!parse_shard_bytes(shard_header(20240520, 7, 1) + two, header, error));
    CHECK(error.find("version is 7") != std::string::npos);
    CHECK(!parse_shard_bytes(shard_header(20240520, 1, 0), header, error));
    CHECK(error.find("empty") != std::string::npos);
    for (int32_t count : {-1, INT32_MIN, INT32_MAX, 1 << 30}) CHECK(!parse_shard_bytes(shard_header(20240520, 1, count) + two, header, error));
    CHECK(!parse_shard_bytes(shard_header(20240326, 3, 1) + two, header, error));
}

TEST_CASE("dataset: what --data may name") {
    Tokenizer bytes = make_tokenizer("bytes"), ids = make_tokenizer("ids");
    Dataset d = open_dataset(put("text.txt", "Hello\n<|endoftext|>\nyou\n"), bytes);
    CHECK(d.num_tokens == 1 + 6 + 1 + 4);
    CHECK(d[0] == 256);
    CHECK(d[1] == 'H');
    CHECK(d[7] == 256);

    put("b.bin", shard_file(counting(100, 7)));
    put("a.bin", shard_file(counting(1, 5)));
    put("c.bin", shard_header(20240801, 7, 2) + bytes_of(std::vector<uint32_t>{128000, 4000000000u}));
    d = open_dataset(temporary("[a-c].bin"), ids);
    CHECK(d.num_tokens == 14);
    CHECK(d.end_of_text == 50256);
    CHECK(d[0] == 1);
    CHECK(d[4] == 5);
    CHECK(d[5] == 100);
    CHECK(d[12] == 128000);
    CHECK(d[13] == 4000000000);
    std::vector<int> row(7);
    d.read(3, 7, 50257, row.data());
    CHECK(row == std::vector<int>{4, 5, 100, 101, 102, 103, 104});
    check_error(EXIT_DATA, {"token 128000", "position 0", "c.bin", "50257", "--tokenizer"}, [&] { d.read(10, 4, 50257, row.data()); });
    CHECK(open_dataset(temporary("a.bin"), bytes).num_tokens == 5);
    put("[x].bin", shard_file({9}));  // a name that is a pattern, too
    CHECK(open_dataset(temporary("[x].bin"), ids)[0] == 9);

    check_error(EXIT_DATA, {"none", "check the path"}, [&] { open_dataset(temporary("none"), bytes); });
    check_error(EXIT_DATA, {"no*ne"}, [&] { open_dataset(temporary("no*ne"), bytes); });
    check_error(EXIT_DATA, {"nothing", "empty"}, [&] { open_dataset(put("nothing", ""), bytes); });
    check_error(EXIT_DATA, {"separator", "no text"}, [&] { open_dataset(put("separator", "<|endoftext|>\n"), bytes); });
    check_error(EXIT_DATA, {"text.txt", "'ids'", "--tokenizer bytes"}, [&] { open_dataset(temporary("text.txt"), ids); });
    check_error(EXIT_DATA, {"short.bin", "cut short"}, [&] { open_dataset(put("short.bin", shard_file({1, 2}).substr(0, 1026)), ids); });
    check_error(EXIT_DATA, {"zero.bin", "empty"}, [&] { open_dataset(put("zero.bin", shard_file({})), ids); });
    check_error(EXIT_DATA, {"model.bin", "neither"}, [&] { open_dataset(put("model.bin", shard_header(20240326, 3, 1)), bytes); });
    put("text2.txt", "Only shards go together.");
    check_error(EXIT_DATA, {"text.txt", "no token shard", "text*.txt", "by itself"}, [&] { open_dataset(temporary("text*.txt"), bytes); });
    check_error(EXIT_DATA, {directory.path, "regular"}, [&] { open_dataset(directory.path, bytes); });
}

TEST_CASE("dataset: the last tenth") {
    Dataset train, val;
    split_dataset(dataset_of({counting(0, 1000)}), train, val);
    CHECK(train.num_tokens == 900);
    CHECK(val.num_tokens == 100);
    CHECK(val[0] == 900);
    CHECK(val.shards[0].file_position == 900);
    split_dataset(dataset_of({counting(0, 1000)}, 915), train, val);  // a document starts near the tenth
    CHECK(train.num_tokens == 915);
    CHECK(val[0] == 915);
    split_dataset(dataset_of({counting(0, 1000)}, 888), train, val);
    CHECK(val[0] == 888);
    split_dataset(dataset_of({counting(0, 1000)}, 850), train, val);  // too far away
    CHECK(val[0] == 900);
    split_dataset(dataset_of({counting(0, 950), counting(2000, 30), counting(3000, 20)}), train, val);
    CHECK(train.shards.size() == 1);
    CHECK(val.shards.size() == 3);
    CHECK(val.num_tokens == 100);
    CHECK(val[99] == 3019);
    CHECK(val[50] == 2000);
    split_dataset(dataset_of({counting(0, 4)}), train, val);
    CHECK(train.num_tokens == 4);
    CHECK(val.num_tokens == 0);
    check_error(EXIT_DATA, {"last tenth of test", "0 tokens", "--batch", "--seq"}, [&] { DataLoader(val, loader_options(1, 1)); });
}

TEST_CASE("dataset: a shard beyond 2 GiB") {
    int64_t count = 1300000000;
    std::string path = put("large.bin", shard_header(20240520, 1, (int32_t)count));
    REQUIRE(truncate(path.c_str(), 1024 + 2 * count) == 0);  // sparse: takes no room
    {
        std::fstream f(path, std::ios::in | std::ios::out | std::ios::binary);
        f.seekp(1024 + 2 * (count - 5));
        f << bytes_of(std::vector<uint16_t>{11, 12, 13, 14, 15});
    }
    Dataset d = open_dataset(path, make_tokenizer("ids"));
    CHECK(d.num_tokens == count);
    CHECK(d[count - 5] == 11);
    LoaderOptions o = loader_options(1, 4);
    o.vocab_size = 15;
    DataLoader loader(d, o);
    CHECK(loader.batches_per_epoch() == (count - 1) / 4);
    Batch batch;
    loader.fill((count - 1) / 4 - 1, batch);
    CHECK(batch.targets == std::vector<int>{0, 0, 11, 12});
    o.carry_memory = true;
    o.B = 2;
    DataLoader(d, o).fill(0, batch);
    o.T = 3;
    DataLoader end(d.slice(count - 7, count, "end"), o);
    check_error(EXIT_DATA, {"token 15", "position 1299999999", "large.bin"}, [&] { end.fill(0, batch); });
    std::filesystem::remove(path);
}

// ---------------------------------------------------------------------------------------------------------------------------------------------------------
// The loader

TEST_CASE("permute is a permutation") {
    std::vector<int64_t> sizes(70);
    std::iota(sizes.begin(), sizes.end(), 1);
    for (int64_t n : {255, 256, 257, 1023, 1024, 1025, 4095, 4097, 65537}) sizes.push_back(n);
    for (int64_t n : sizes) {
        std::vector<bool> seen(n);
        for (int64_t i = 0; i < n; i++) {
            int64_t j = permute(i, n, 5, 2);
            REQUIRE(j >= 0);
            REQUIRE(j < n);
            REQUIRE(!seen[j]);
            seen[j] = true;
        }
    }
    // Beyond 32 bits: in range, and no two alike.
    int64_t large = (1ll << 40) + 12345;
    std::set<int64_t> seen;
    for (int64_t i = 0; i < 1000; i++) {
        int64_t j = permute(large - 1 - i, large, 5, 0);
        CHECK(j >= 0);
        CHECK(j < large);
        seen.insert(j);
    }
    CHECK(seen.size() == 1000);
    CHECK(*seen.rbegin() > large / 2);
}

TEST_CASE("permute mixes, differently for every seed and epoch") {
    int n = 1000, fixed = 0, neighbours = 0, same_epoch = 0, same_seed = 0;
    std::vector<int> first(8);
    for (int i = 0; i < n; i++) {
        int64_t j = permute(i, n, 5, 0);
        fixed += j == i;
        neighbours += std::abs(permute((i + 1) % n, n, 5, 0) - j) == 1;
        same_epoch += j == permute(i, n, 5, 1);
        same_seed += j == permute(i, n, 6, 0);
        first[permute(0, 8, i, 0)]++;
    }
    for (int count : {fixed, neighbours, same_epoch, same_seed}) CHECK(count < 12);  // 1 or 2 are expected
    for (int count : first) CHECK(std::abs(count - n / 8) < 50);
}

TEST_CASE("loader: in order") {
    DataLoader loader(dataset_of({counting(0, 13), counting(100, 4), counting(200, 9)}), loader_options(2, 4));
    Batch b;
    loader.fill(0, b);
    CHECK(b.tokens == std::vector<int>{0, 1, 2, 3, 4, 5, 6, 7});
    CHECK(b.targets == std::vector<int>{1, 2, 3, 4, 5, 6, 7, 8});
    CHECK(b.cu_seqlens == std::vector<int>{0, 4, 8});
    CHECK(b.first_row == 0);
    CHECK(b.memory_from.empty());
    loader.fill(1, b);  // 100.. is too short for a window and its last target
    CHECK(b.tokens == std::vector<int>{8, 9, 10, 11, 200, 201, 202, 203});
    CHECK(b.targets == std::vector<int>{9, 10, 11, 12, 201, 202, 203, 204});
    CHECK(b.first_row == 2);
    loader.fill(2, b);  // the last window, and the first again
    CHECK(b.tokens == std::vector<int>{204, 205, 206, 207, 0, 1, 2, 3});
    CHECK(loader.batches_per_epoch() == 2);
}

TEST_CASE("loader: every window once in an epoch, never across shards") {
    const int T = 4, B = 3;
    Dataset d = dataset_of({counting(0, 4 * 10 + 3), counting(1000, 4 * 7 + 1), counting(2000, 3), counting(3000, 4 * 5)});
    int64_t windows = 10 + 7 + 0 + 4;
    DataLoader loader(d, loader_options(B, T, true));
    std::vector<std::vector<int>> order(6);
    std::set<int> shifts;
    Batch b;
    for (int64_t sample = 0; sample < 6 * windows; sample++) {
        loader.fill(sample / B, b);
        int row = (int)(sample % B) * T, x = b.tokens[row];
        for (int t = 0; t < T; t++) {
            REQUIRE(b.tokens[row + t] == x + t);
            REQUIRE(b.targets[row + t] == x + t + 1);
        }
        order[sample / windows].push_back(x);
    }
    for (auto& epoch : order) {
        std::set<int> seen(epoch.begin(), epoch.end());
        CHECK((int64_t)seen.size() == windows);
        std::map<int, std::set<int>> grid;  // of each shard: all of its windows start at the same remainder
        for (int x : seen) grid[x / 1000].insert(x % 1000 % T);
        for (auto& g : grid) CHECK(g.second.size() == 1);
        shifts.insert(*grid[0].begin());
        CHECK(!std::is_sorted(epoch.begin(), epoch.end()));
        for (int& x : epoch) x = x / 1000 * 1000 + x % 1000 / T;  // which window, wherever the grid stands
        CHECK((&epoch == &order[0] || epoch != order[0]));
    }
    CHECK(shifts.size() > 1);  // epochs cut the documents at different places
}

TEST_CASE("loader: reproducible, in any order of asking") {
    Dataset d = dataset_of({counting(0, 16 * 300 + 1)});  // no room for another grid: only the order depends on the seed
    DataLoader one(d, loader_options(4, 16, true, 9)), two(d, loader_options(4, 16, true, 9)), other(d, loader_options(4, 16, true, 10));
    std::vector<Batch> batches(100);
    for (int n = 0; n < 100; n++) one.fill(n, batches[n]);
    int same = 0;
    for (int n = 99; n >= 0; n--) {
        Batch b;
        two.fill(n, b);
        CHECK(b.tokens == batches[n].tokens);
        CHECK(b.targets == batches[n].targets);
        CHECK(b.first_row == batches[n].first_row);
        other.fill(n, b);
        same += b.tokens == batches[n].tokens;
    }
    CHECK(same == 0);
    Batch b;
    one.fill(1ll << 40, b);  // far away
    CHECK(b.first_row == 0);
    CHECK(b.tokens.size() == 64);
}

TEST_CASE("loader: ranks share the same global batches") {
    Dataset d = dataset_of({counting(0, 700), counting(1000, 900)});
    for (bool doc_mask : {false, true}) {
        for (int ranks : {1, 2, 4}) {
            LoaderOptions whole = loader_options(8, 10, true), part = loader_options(8 / ranks, 10, true);
            whole.doc_mask = part.doc_mask = doc_mask;
            DataLoader all(d, whole);
            part.ranks = ranks;
            for (int64_t n = 0; n < 40; n++) {  // several epochs
                Batch expected, b;
                all.fill(n, expected);
                std::vector<int> tokens, targets;
                for (part.rank = 0; part.rank < ranks; part.rank++) {
                    DataLoader share(d, part);
                    CHECK(share.batches_per_epoch() == all.batches_per_epoch());
                    share.fill(n, b);
                    CHECK(b.first_row == expected.first_row + part.rank * part.B);
                    tokens.insert(tokens.end(), b.tokens.begin(), b.tokens.end());
                    targets.insert(targets.end(), b.targets.begin(), b.targets.end());
                }
                CHECK(tokens == expected.tokens);
                CHECK(targets == expected.targets);
            }
        }
    }
}

TEST_CASE("loader: too little data, and just enough") {
    Batch b;
    check_error(EXIT_DATA, {"test has 32 tokens", "4 rows of 8 + 1", "--batch", "--seq"},
                [] { DataLoader(dataset_of({counting(0, 32)}), loader_options(4, 8)); });
    DataLoader enough(dataset_of({counting(0, 33)}), loader_options(4, 8, true));
    CHECK(enough.batches_per_epoch() == 1);
    enough.fill(0, b);
    CHECK(std::set<int>(b.tokens.begin(), b.tokens.end()).size() == 32);
    LoaderOptions o = loader_options(2, 8);
    o.ranks = 2;
    check_error(EXIT_DATA, {"4 rows"}, [&] { DataLoader(dataset_of({counting(0, 32)}), o); });
    o.carry_memory = true;
    check_error(EXIT_DATA, {"4 rows"}, [&] { DataLoader(dataset_of({counting(0, 32)}), o); });
    CHECK(DataLoader(dataset_of({counting(0, 33)}), o).batches_per_epoch() == 1);
    check_error(EXIT_DATA, {"too few"}, [] { DataLoader(dataset_of({{}}), loader_options(1, 1)); });
}

TEST_CASE("loader: a token outside the vocabulary") {
    LoaderOptions o = loader_options(1, 4);
    o.vocab_size = 257;
    Dataset d = dataset_of({{1, 2, 3, 4, 256, 6, 7, 8, 257}});
    Batch b;
    DataLoader(d.slice(3, 8, "good"), o).fill(0, b);
    DataLoader bad(d.slice(4, 9, "bad"), o);  // only the last target is
    check_error(EXIT_DATA, {"token 257 at position 8 of 'shard 0'", "vocabulary of 257", "--tokenizer"}, [&] { bad.fill(0, b); });
}

// A text of documents of many lengths: token 0 starts one, the others count up.
static std::vector<uint16_t> documents(int count, uint32_t seed) {
    std::vector<uint16_t> v;
    while ((int)v.size() < count) {
        uint32_t length = philox(seed, (uint32_t)v.size(), 0, 0, 0).word[0] % 23;
        v.push_back(0);
        for (uint32_t i = 0; i < length; i++) v.push_back((uint16_t)(v.size() + 1));
    }
    v.resize(count);
    return v;
}

TEST_CASE("loader: --doc-mask keeps documents apart") {
    Dataset d = dataset_of({documents(3000, 1)}, 0);
    LoaderOptions o = loader_options(4, 32, true), plain = o;
    o.doc_mask = true;
    o.end_of_text = plain.end_of_text = 0;
    DataLoader loader(d, o), dense(d, plain);
    int splits = 0, at_start = 0;
    for (int64_t n = 0; n < 50; n++) {
        Batch b, same;
        loader.fill(n, b);
        dense.fill(n, same);
        CHECK(b.tokens == same.tokens);
        CHECK(b.targets == same.targets);  // all of them scored
        CHECK(same.cu_seqlens == std::vector<int>{0, 32, 64, 96, 128});
        std::vector<int> expected;
        for (int i = 0; i < 128; i++)
            if (i % 32 == 0 || b.tokens[i] == 0) expected.push_back(i);
        for (int i = 0; i < 128; i += 32) at_start += b.tokens[i] == 0;
        expected.push_back(128);
        CHECK(b.cu_seqlens == expected);
        splits += b.num_seqs() - 4;
    }
    CHECK(splits > 100);
    CHECK(at_start > 0);  // so that an empty sequence would have been seen
}

TEST_CASE("loader: --carry-memory reads lanes") {
    const int T = 16, B = 2, ranks = 2;
    std::vector<uint16_t> text = documents(1000, 2), more = documents(500, 3);
    Dataset d = dataset_of({text, more}, 0);
    text.insert(text.end(), more.begin(), more.end());
    const int64_t chunks = (1500 - 1) / (B * ranks * T);
    LoaderOptions o = loader_options(B, T);
    o.carry_memory = true;
    o.end_of_text = 0;
    o.ranks = ranks;
    int carried = 0, afresh = 0;
    for (o.rank = 0; o.rank < ranks; o.rank++) {
        DataLoader loader(d, o);
        CHECK(loader.batches_per_epoch() == chunks);
        for (int64_t n = 0; n < 2 * chunks + 1; n++) {
            Batch batch;
            loader.fill(n, batch);
            REQUIRE((int)batch.memory_from.size() == batch.num_seqs());
            REQUIRE((int)batch.memory_to.size() == batch.num_seqs());
            CHECK(batch.first_row == (n * ranks + o.rank) * B);
            CHECK(batch.cu_seqlens.back() == B * T);
            for (int s = 0; s < batch.num_seqs(); s++) {
                int begin = batch.cu_seqlens[s], end = batch.cu_seqlens[s + 1], row = begin / T;
                REQUIRE(begin < end);
                CHECK((end - 1) / T == row);
                bool opens = begin % T == 0, closes = end % T == 0;
                bool continues = opens && n % chunks > 0 && batch.tokens[begin] != 0;
                CHECK((opens || batch.tokens[begin] == 0));
                CHECK(batch.memory_from[s] == (continues ? row : -1));
                CHECK(batch.memory_to[s] == (closes ? row : -1));
                (continues ? carried : afresh)++;
                for (int i = begin; i < end; i++) {
                    int64_t position = ((o.rank * B + row) * chunks + n % chunks) * T + i % T;
                    REQUIRE(batch.tokens[i] == text[position]);
                    REQUIRE(batch.targets[i] == text[position + 1]);
                    if (i > begin) REQUIRE(batch.tokens[i] != 0);
                }
            }
        }
    }
    CHECK(carried > 50);
    CHECK(afresh > 50);
}

TEST_CASE("bigram loss") {
    // By hand: train 0 1 0 1 0 2, pairs 01 10 01 10 02; unigram over second tokens: (2+1)/8, (2+1)/8, (1+1)/8.
    Dataset train = dataset_of({{0, 1, 0, 1, 0, 2}}), val = dataset_of({{0, 1, 2}, {2, 0}});
    double p01 = (2 + 2 * 3.0 / 8) / (3 + 2), p12 = (0 + 1 * 2.0 / 8) / (2 + 1), p20 = 3.0 / 8;
    CHECK(bigram_loss(train, val, 3) == doctest::Approx(-(std::log(p01) + std::log(p12) + std::log(p20)) / 3).epsilon(1e-12));
    // Every row is a distribution: exp(-loss) over all continuations adds up to 1.
    for (uint16_t a : {0, 1, 2}) {
        double sum = 0;
        for (uint16_t b : {0, 1, 2}) sum += std::exp(-bigram_loss(train, dataset_of({{a, b}}), 3));
        CHECK(sum == doctest::Approx(1).epsilon(1e-12));
    }
    std::vector<uint16_t> cycle(10000);
    for (size_t i = 0; i < cycle.size(); i++) cycle[i] = (uint16_t)(i % 100);
    CHECK(bigram_loss(dataset_of({cycle}), dataset_of({cycle}), 257) < 0.02);
    CHECK(std::isnan(bigram_loss(train, val, 50257)));
    CHECK(std::isnan(bigram_loss(train, dataset_of({{1}}), 3)));
    check_error(EXIT_DATA, {"token 2", "position 5", "vocabulary of 2"}, [&] { bigram_loss(train, val, 2); });
}

// ---------------------------------------------------------------------------------------------------------------------------------------------------------
// The configuration

TEST_CASE("config: an option's value") {
    AttentionDescription d = {};
    d.name = "some";
    AttentionOption whole = {"window", "", 0, 0, 1000}, word = {"memory", "", 0, 0, 1, {"linear", "delta"}}, fraction = {"rate", "", 1, 0, 2};
    fraction.fraction = true;
    CHECK(parse_option(d, whole, "0") == 0);
    CHECK(parse_option(d, whole, "1000") == 1000);
    CHECK(parse_option(d, word, "delta") == 1);
    CHECK(parse_option(d, fraction, "0.5") == 0.5);
    for (const char* bad : {"", "x", "1x", "1.5", "-1", "1001", "nan", "inf", "1e999", "99999999999999999999"})
        check_error(EXIT_USAGE, {"window of some is '" + std::string(bad) + "'", "0 to 1000"}, [&] { parse_option(d, whole, bad); });
    for (const char* bad : {"", "nan", "2.1", "-0.1", "one"}) check_error(EXIT_USAGE, {"rate of some"}, [&] { parse_option(d, fraction, bad); });
    for (const char* bad : {"", "Delta", "1", "delta "})
        check_error(EXIT_USAGE, {"memory of some is '" + std::string(bad) + "'", "linear, delta"}, [&] { parse_option(d, word, bad); });
}

static ModelConfig parsed(const std::string& pattern, const std::map<std::string, std::string>& defaults = {}, const std::string& positions = "") {
    ModelConfig c;
    parse_attention(c, pattern, defaults, positions);
    return c;
}

TEST_CASE("config: attention patterns") {
    ModelConfig c = parsed("causal");
    REQUIRE(c.attention.size() == 4);
    CHECK(c.positions == Positions::LEARNED);
    for (int l = 0; l < 4; l++) {
        CHECK(c.attention[l].layer == l);
        CHECK(c.attention[l].layers == 4);
        CHECK(c.attention[l]["kv-heads"] == 4);  // resolved
        CHECK(c.attention[l]["window"] == 0);
    }
    c = parsed("causal:window=8:kv-heads=2,causal*2");  // repeats to the depth
    CHECK(c.attention[0]["window"] == 8);
    CHECK(c.attention[0]["kv-heads"] == 2);
    CHECK(c.attention[1]["window"] == 0);
    CHECK(c.attention[2]["window"] == 0);
    CHECK(c.attention[3]["window"] == 8);
    c = parsed("causal:window=8,causal", {{"window", "5"}});  // an entry's own value goes over the command line's
    CHECK(c.attention[0]["window"] == 8);
    CHECK(c.attention[1]["window"] == 5);
    CHECK(parsed("causal:window=5:window=6").attention[0]["window"] == 6);
    CHECK(parsed("causal", {}, "rope").positions == Positions::ROPE);
    CHECK(parsed("causal", {}, "none").positions == Positions::NONE);
    // What is written down is what is read.
    for (const AttentionDescription& d : attention_descriptions()) {
        ModelConfig first = parsed(d.name), second = parsed(attention_string(first.attention[2]));
        for (int l = 0; l < 4; l++) CHECK(second.attention[l].options == first.attention[2].options);
    }
}

TEST_CASE("config: wrong patterns") {
    struct Case {
        const char* pattern;
        std::vector<std::string> error;
    };
    const std::vector<Case> cases = {
        {"", {"unknown attention ''", "causal"}},
        {"casual", {"unknown attention 'casual'", "causal"}},
        {"causal,", {"unknown attention ''"}},
        {",causal", {"unknown attention ''"}},
        {"causal,,causal", {"unknown attention ''"}},
        {"causal:", {"no option ''", "window"}},
        {"causal:wndow=3", {"no option 'wndow'", "window"}},
        {"causal:window", {"window=VALUE"}},
        {"causal:window=", {"window of causal is ''"}},
        {"causal:window=-1", {"window of causal is '-1'"}},
        {"causal:window=2.5", {"window of causal is '2.5'"}},
        {"causal:window=3=4", {"window of causal is '3=4'"}},
        {"causal*", {"after *", "1 to 4"}},
        {"causal*0", {"after *"}},
        {"causal*-1", {"after *"}},
        {"causal*5", {"after *"}},
        {"causal*2x", {"after *"}},
        {"causal*2*2", {"after *"}},
        {"causal*99999999999999999999", {"after *"}},
        {"causal*3,causal*2", {"5 layers", "the network has 4"}},
        {"causal:kv-heads=3", {"3 kv-heads do not divide 4 heads", "--kv-heads"}},
        {"causal:kv-heads=8", {"kv-heads"}},
        {"causal:kv-heads=0", {"kv-heads of causal is '0'"}},
    };
    for (const Case& c : cases) {
        INFO(std::string(c.pattern));
        check_error(EXIT_USAGE, c.error, [&] { parsed(c.pattern); });
    }
    check_error(EXIT_USAGE, {"--nonsense has no meaning", "'causal'"}, [] { parsed("causal", {{"nonsense", "1"}}); });
    check_error(EXIT_USAGE, {"window of causal is 'x'"}, [] { parsed("causal", {{"window", "x"}}); });
    check_error(EXIT_USAGE, {"positions 'absolute'", "learned, rope or none"}, [] { parsed("causal", {}, "absolute"); });
    check_error(EXIT_USAGE, {"5 heads do not divide 128 channels"}, [] {
        ModelConfig c;
        c.heads = 5;
        parse_attention(c, "causal", {}, "");
    });
}

TEST_CASE("config: the parameter list") {
    ModelConfig c = parsed("causal");
    c.set_vocab(257);
    CHECK(c.padded_vocab_size == 384);
    c.set_vocab(256);
    CHECK(c.padded_vocab_size == 256);
    Tensors t = model_parameters(c);
    std::set<std::string> names;
    for (const TensorSpec& s : t.specs) CHECK_MESSAGE(names.insert(s.name).second, s.name);
    CHECK(names.count("wpe"));
    CHECK(!std::count_if(t.specs.begin(), t.specs.end(), [](const TensorSpec& s) { return s.decay != (s.shape.size() == 2); }));
    CHECK(t.part("h.3.mlp.").find("wfc") == 0);
    CHECK(t.find("h.4.ln1.w") == -1);
    // GPT-2 124M: 124,439,808 as published, and 47 rows of padding.
    for (const Preset& p : presets) {
        if (p.name != std::string("gpt2-124M")) continue;
        c.layers = p.layers;
        c.heads = p.heads;
        c.channels = p.channels;
        c.max_seq = p.max_seq;
        c.set_vocab(p.vocab_size);
        parse_attention(c, "causal", {}, "");
        CHECK(model_parameters(c).size() == 124439808 + 47 * 768);
    }
    CHECK(model_parameters(parsed("causal", {}, "rope")).find("wpe") == -1);
}

// ----------------------------------------------------------------------------
// States of sequences that are being decoded

using TestPool = StatePool<float, double>;
static const std::vector<AttentionStateSize> test_layers = {{3, 2}, {0, 5}};  // two layers: rows of 3 and a block of 2; a block of 5

TEST_CASE("a forked sequence shares pages until it writes, and owns its block") {
    TestPool pool(test_layers, /*page_size*/ 4, /*capacity*/ 100);
    int a = pool.create();
    CHECK(pool.fixed_offset == std::vector<int64_t>{0, 2});
    for (int i = 0; i < 7; i++) CHECK(pool.sequences[a].fixed.get()[i] == 0);
    CHECK(pool.pages_wanted(a, 6) == 2);
    pool.reserve(a, 6);
    REQUIRE(pool.sequences[a].pages.size() == 2);
    pool.sequences[a].length = 6;
    auto page = [&](int s, int p) { return pool.page(pool.sequences[s].pages[p]); };
    for (int i = 0; i < 12; i++) page(a, 0)[i] = (float)i, page(a, 1)[i] = (float)(100 + i);
    for (int i = 0; i < 7; i++) pool.sequences[a].fixed.get()[i] = i + 0.5;

    int b = pool.fork(a);
    CHECK(pool.sequences[b].length == 6);
    CHECK(page(b, 0) == page(a, 0));
    CHECK(page(b, 1) == page(a, 1));
    CHECK(pool.bytes() == 2 * 12 * sizeof(float) + 2 * 7 * sizeof(double));  // a shared page counts once
    CHECK(pool.pages_wanted(b, 1) == 1);
    CHECK(pool.pages_wanted(b, 3) == 2);
    pool.reserve(b, 1);
    CHECK(page(b, 0) == page(a, 0));
    REQUIRE(page(b, 1) != page(a, 1));
    for (int i = 0; i < 12; i++) CHECK(page(b, 1)[i] == (float)(100 + i));
    for (int i = 0; i < 7; i++) CHECK(pool.sequences[b].fixed.get()[i] == i + 0.5);
    CHECK(pool.bytes() == 3 * 12 * sizeof(float) + 2 * 7 * sizeof(double));
    CHECK(pool.pages_wanted(a, 2) == 0);  // the page is its own now

    page(b, 1)[0] = pool.sequences[b].fixed.get()[0] = -1;  // what one does the other does not see
    CHECK(page(a, 1)[0] == 100);
    CHECK(pool.sequences[a].fixed.get()[0] == 0.5);
    pool.release(a);
    CHECK(page(b, 0)[11] == 11);  // still held by the other
    CHECK(pool.bytes() == 2 * 12 * sizeof(float) + 7 * sizeof(double));
    pool.release(b);
    CHECK(pool.bytes() == 0);
    int c = pool.create();  // numbers, pages and blocks are used again, blocks start from zero
    CHECK(c == a);
    pool.reserve(c, 12);
    for (int p : pool.sequences[c].pages) CHECK((p >= 0 && p < 3));
    for (int i = 0; i < 7; i++) CHECK(pool.sequences[c].fixed.get()[i] == 0);
}

TEST_CASE("a full page at the end of a shared state is never copied") {
    TestPool pool(test_layers, 4, 100);
    int a = pool.create();
    pool.reserve(a, 8);
    pool.sequences[a].length = 8;
    int b = pool.fork(a);
    CHECK(pool.pages_wanted(b, 1) == 1);
    pool.reserve(b, 1);
    CHECK(pool.sequences[b].pages[1] == pool.sequences[a].pages[1]);
    CHECK(pool.pages_in_use() == 3);
}

TEST_CASE("a window gives pages back that the next token does not see") {
    TestPool pool(test_layers, 4, 100);
    int a = pool.create();
    pool.reserve(a, 14);
    pool.sequences[a].length = 14;
    std::vector<int> before = pool.sequences[a].pages;
    pool.slide(a, 8);  // the next token, number 14, sees 7 ... 14
    CHECK(pool.sequences[a].dropped == 4);
    CHECK(pool.sequences[a].length == 10);
    CHECK(pool.sequences[a].past() == 14);
    CHECK(pool.sequences[a].pages == std::vector<int>(before.begin() + 1, before.end()));
    CHECK(pool.pages_in_use() == 3);
    pool.slide(a, 7);  // 8 ... 14
    CHECK(pool.sequences[a].dropped == 8);
    CHECK(pool.pages_in_use() == 2);
    pool.slide(a, 1);  // itself alone
    CHECK(pool.sequences[a].past() == 14);
    CHECK(pool.sequences[a].length == 2);
}

// Every sequence's numbers are what was written for it, whatever its neighbours do; nothing leaks.
TEST_CASE("100,000 random requests to the page allocator") {
    struct Text {
        int number;
        std::vector<float> tokens;  // all that it has been given, those in dropped pages included
    };
    std::mt19937 random(1);
    auto below = [&](int n) { return (int)(random() % (unsigned)n); };
    for (int page_size : {1, 3, 16}) {
        TestPool pool(test_layers, page_size, 60);
        std::vector<Text> texts;
        float next = 1;
        int64_t refused = 0;
        for (int request = 0; request < 33334; request++) {
            int kind = below(10), who = texts.empty() ? 0 : below((int)texts.size());
            if (texts.empty() || (kind == 0 && texts.size() < 12)) {
                texts.push_back({pool.create(), {}});
            } else if (kind == 1 && texts.size() < 12) {
                texts.push_back({pool.fork(texts[who].number), texts[who].tokens});
            } else if (kind == 2) {
                pool.release(texts[who].number);
                texts.erase(texts.begin() + who);
            } else if (kind == 3) {
                pool.slide(texts[who].number, 1 + below(20));
            } else {
                Text& t = texts[who];
                int n = below(2 * page_size + 2);
                if (pool.pages_wanted(t.number, n) > pool.pages_left()) {
                    refused++;
                    pool.release(t.number);
                    texts.erase(texts.begin() + who);
                    continue;
                }
                int64_t wanted = pool.pages_wanted(t.number, n), left = pool.pages_left();
                pool.reserve(t.number, n);
                REQUIRE(left - pool.pages_left() == wanted);
                auto& q = pool.sequences[t.number];
                for (int i = 0; i < n; i++, q.length++) {
                    t.tokens.push_back(next);
                    for (int k = 0; k < 3; k++) pool.page(q.pages[q.length / page_size])[q.length % page_size * 3 + k] = next;
                    next = next < 1e6f ? next + 1 : 1;
                }
            }
            if (request % 16) continue;
            std::vector<int> holders(60, 0);
            bool right = true;
            for (const Text& t : texts) {
                const auto& q = pool.sequences[t.number];
                right = right && q.past() == (int64_t)t.tokens.size() && (int64_t)q.pages.size() * page_size >= q.length;
                for (int p : q.pages) holders[p]++;
                for (int64_t j = 0; j < q.length; j++)
                    for (int k = 0; k < 3; k++)
                        right = right && pool.page(q.pages[j / page_size])[j % page_size * 3 + k] == t.tokens[q.dropped + j];
            }
            REQUIRE(right);
            REQUIRE(pool.pages_in_use() == 60 - std::count(holders.begin(), holders.end(), 0));
        }
        CHECK(refused > 100);
        for (const Text& t : texts) pool.release(t.number);
        CHECK(pool.pages_in_use() == 0);
        CHECK(pool.pages_left() == 60);
        CHECK(pool.bytes() == 0);
    }
}
