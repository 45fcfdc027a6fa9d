// safetensors: our checkpoints, and what is exchanged with others. A file is
//
//     uint64 N | N bytes of JSON: {name: {"dtype", "shape", "data_offsets": [begin, end]}, ..., "__metadata__": {string: string}} | data
//
// little-endian, C order, offsets relative to the data. The parser is a pure function of bytes and believes nothing: sizes are multiplied with checks,
// and the tensors must tile the data exactly, so that nothing is read twice, nothing is left out, and nothing can hide between them.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <limits>
#include <map>
#include <memory>
#include <set>
#include <string>
#include <vector>

#include <nlohmann/json.hpp>

#include "error.h"
#include "files.h"

struct SafeTensor {
    std::string name, dtype;
    std::vector<int64_t> shape;
    uint64_t begin = 0, end = 0;  // bytes, within the data
};

struct SafeTensorsHeader {
    std::vector<SafeTensor> tensors;  // in the order of their data
    std::map<std::string, std::string> metadata;
    uint64_t data_start = 0;  // from the file's first byte
};

constexpr uint64_t safetensors_header_limit = 100000000;

// Bytes an element; 0: no such type.
inline int dtype_width(const std::string& dtype) {
    static const std::map<std::string, int> widths = {{"BOOL", 1}, {"U8", 1},  {"I8", 1},  {"F8_E4M3", 1}, {"F8_E5M2", 1}, {"F8_E8M0", 1},
                                                      {"U16", 2},  {"I16", 2}, {"F16", 2}, {"BF16", 2},    {"U32", 4},     {"I32", 4},
                                                      {"F32", 4},  {"U64", 8}, {"I64", 8}, {"F64", 8}};
    auto found = widths.find(dtype);
    return found == widths.end() ? 0 : found->second;
}

inline std::string shape_string(const std::vector<int64_t>& shape) {
    std::string s;
    for (int64_t d : shape) s += (s.empty() ? "" : ", ") + std::to_string(d);
    return "(" + s + ")";
}

// Bytes of a tensor; false if the type is unknown or the size does not fit into 63 bits.
inline bool tensor_bytes(const std::string& dtype, const std::vector<int64_t>& shape, uint64_t& bytes) {
    bytes = (uint64_t)dtype_width(dtype);
    bool fits = bytes > 0;
    for (int64_t d : shape) fits = fits && d >= 0 && checked_mul(bytes, (uint64_t)d, bytes);
    return fits && bytes <= (uint64_t)INT64_MAX;
}

// The JSON of the header, as a stream of events rather than a document: a document would keep the last of two equal keys without a word.
// A false return ends the parse; `error` then says why.
class SafeTensorsReader : public nlohmann::json_sax<nlohmann::json> {
 public:
    SafeTensorsReader(SafeTensorsHeader& out, std::string& error) : out(out), error(error) {}

    bool start_object(size_t) override {
        if (level > 1) return unexpected("an object");
        level++;
        field.clear();
        seen.clear();
        return true;
    }
    bool end_object() override {
        level--;
        if (level != 1 || in_metadata()) return true;
        for (const char* needed : {"dtype", "shape", "data_offsets"})
            if (!seen.count(needed)) return fail("has no " + std::string(needed));
        if (offsets.size() != 2) return fail("needs two data_offsets, begin and end");
        tensor.begin = offsets[0];
        tensor.end = offsets[1];
        out.tensors.push_back(tensor);
        return true;
    }
    bool key(string_t& k) override {
        if (level == 1) {
            tensor = SafeTensor();
            tensor.name = k;
            offsets.clear();
            return names.insert(k).second || fail("is there twice");
        }
        field = k;
        if (!seen.insert(k).second) return fail("has the key '" + printable(k) + "' twice");
        return in_metadata() || k == "dtype" || k == "shape" || k == "data_offsets" || fail("has the unknown key '" + printable(k) + "'");
    }
    bool string(string_t& s) override {
        if (level == 2 && in_metadata()) {
            out.metadata[field] = s;
            return true;
        }
        if (level != 2 || field != "dtype") return unexpected("a string");
        if (!dtype_width(s)) return fail("has the unknown dtype '" + printable(s) + "'");
        tensor.dtype = s;
        return true;
    }
    bool start_array(size_t) override {
        if (level != 2 || in_metadata() || field == "dtype") return unexpected("an array");
        level++;
        return true;
    }
    bool end_array() override {
        level--;
        return true;
    }
    bool number_unsigned(number_unsigned_t n) override {
        if (level != 3) return unexpected("a number");
        if (n > (uint64_t)INT64_MAX) return fail("has a " + field + " beyond 63 bits");
        if (field == "shape")
            tensor.shape.push_back((int64_t)n);
        else
            offsets.push_back(n);
        if (tensor.shape.size() > 64 || offsets.size() > 2) return fail("has too many numbers in " + field);
        return true;
    }
    bool null() override { return unexpected("null"); }
    bool boolean(bool) override { return unexpected("true or false"); }
    bool number_integer(number_integer_t) override { return unexpected("a negative number"); }
    bool number_float(number_float_t, const string_t&) override { return unexpected("a fraction, or a number beyond 64 bits,"); }
    bool binary(binary_t&) override { return unexpected("binary data"); }
    bool parse_error(size_t position, const std::string&, const nlohmann::detail::exception&) override {
        if (error.empty()) error = "the header is not JSON: byte " + std::to_string(position + 7) + " makes no sense";  // from 1, behind the length
        return false;
    }

 private:
    SafeTensorsHeader& out;
    std::string& error;
    int level = 0;  // 1: names, 2: within a tensor or the metadata, 3: within an array
    std::string field;
    SafeTensor tensor;
    std::vector<uint64_t> offsets;
    std::set<std::string> names, seen;

    bool in_metadata() const { return tensor.name == "__metadata__"; }
    bool fail(const std::string& what) { return refuse(error, "tensor '" + printable(tensor.name) + "' " + what); }
    bool unexpected(const char* what) { return fail(std::string("has ") + what + " where none belongs"); }
};

// In the order of their offsets the tensors must follow one another without a hole or an overlap, from 0 to the last byte of the data.
inline bool check_tiling(SafeTensorsHeader& header, uint64_t data_bytes, std::string& error) {
    std::sort(header.tensors.begin(), header.tensors.end(),
              [](const SafeTensor& a, const SafeTensor& b) { return a.begin != b.begin ? a.begin < b.begin : a.end < b.end; });
    uint64_t position = 0;
    for (const SafeTensor& t : header.tensors) {
        uint64_t bytes, end;
        std::string name = "tensor '" + printable(t.name) + "' ";
        if (!tensor_bytes(t.dtype, t.shape, bytes)) return refuse(error, name + "is too large: " + t.dtype + " " + shape_string(t.shape));
        if (!checked_add(t.begin, bytes, end) || t.end != end)
            return refuse(error,
                          name + "takes " + std::to_string(bytes) + " bytes, its offsets say " + std::to_string(t.begin) + " to " + std::to_string(t.end));
        if (t.begin != position)
            return refuse(error, name + (t.begin > position ? "leaves a hole before it" : "overlaps the one before it") + ", at byte " +
                                     std::to_string(position) + " of the data");
        if (end > data_bytes)
            return refuse(error,
                          name + "ends at byte " + std::to_string(end) + " of the data, the file has " + std::to_string(data_bytes) + ": it is cut short");
        position = end;
    }
    if (position != data_bytes) return refuse(error, std::to_string(data_bytes - position) + " bytes follow the last tensor");
    return true;
}

// Reads the header of a whole file. False, and one line in `error`, for anything that is not a safetensors file to the last byte.
inline bool parse_safetensors(const uint8_t* bytes, size_t size, SafeTensorsHeader& out, std::string& error) {
    out = SafeTensorsHeader();
    error.clear();
    if (size < 8) return refuse(error, "it has " + std::to_string(size) + " bytes, too few for a safetensors file");
    uint64_t length = load<uint64_t>(bytes);
    if (length > safetensors_header_limit) return refuse(error, "its header claims " + std::to_string(length) + " bytes: this is no safetensors file");
    if (length > size - 8)
        return refuse(error, "its header claims " + std::to_string(length) + " bytes, " + std::to_string(size - 8) + " are left: it is cut short");
    const uint8_t *json = bytes + 8, *end = json + length;
    if (length == 0 || json[0] != '{') return refuse(error, "its header does not start with '{': this is no safetensors file");
    // The JSON library takes a zero byte for the end of its input, and would not look at what follows.
    if (memchr(json, 0, length)) return refuse(error, "its header holds a zero byte");
    SafeTensorsReader reader(out, error);
    bool good = nlohmann::json::sax_parse(json, end, &reader) && error.empty();
    if (!good && error.empty()) error = "its header is not JSON";
    out.data_start = 8 + length;
    good = good && check_tiling(out, size - out.data_start, error);
    if (!good) out = SafeTensorsHeader();
    return good;
}

inline float half_to_float(uint16_t h) {
    uint32_t sign = (uint32_t)(h >> 15) << 31, exponent = h >> 10 & 31, mantissa = h & 1023;
    if (exponent == 0) {  // zero and subnormals: mantissa * 2^-24, exact in float
        float f = (float)mantissa * (1.0f / 16777216.0f);
        return sign ? -f : f;
    }
    uint32_t bits = sign | (exponent == 31 ? 255u : exponent + 112) << 23 | mantissa << 13;
    return load<float>(&bits);
}
inline float bf16_to_float(uint16_t b) {
    uint32_t bits = (uint32_t)b << 16;
    return load<float>(&bits);
}
// Back again, to the nearest, ties to even: what came from such a number becomes it again, bit for bit. NaN stays NaN; beyond the range: infinity.
inline uint16_t float_to_bf16(float f) {
    uint32_t bits = load<uint32_t>(&f), low = bits & 0xffff;
    if (f != f) return (uint16_t)(bits >> 16 | (bits << 9 >> 25 ? 0 : 0x40));
    return (uint16_t)((bits >> 16) + (low > 0x8000 || (low == 0x8000 && (bits >> 16 & 1))));
}
inline uint16_t float_to_half(float f) {
    uint32_t bits = load<uint32_t>(&f), sign = bits >> 16 & 0x8000, magnitude = bits & 0x7fffffff;
    if (f != f) return (uint16_t)(sign | 0x7c00 | (magnitude >> 13 & 1023 ? magnitude >> 13 & 1023 : 512));
    if (magnitude >= 0x477ff000) return (uint16_t)(sign | 0x7c00);  // 65520, half way between the largest number and the next power of two
    if (magnitude < 0x38800000) return (uint16_t)(sign | (uint32_t)std::lrint(load<float>(&magnitude) * 16777216.0f));  // subnormal: units of 2^-24
    return (uint16_t)(sign | (((magnitude + 0xfff + (magnitude >> 13 & 1)) >> 13) - (112 << 10)));
}

// n numbers of a floating-point type, at any address, as float or double; false: of another type.
template <class To>
bool read_floats(const std::string& dtype, const uint8_t* p, uint64_t n, To* to) {
    auto convert = [&](auto from, auto f) {
        for (uint64_t i = 0; i < n; i++) to[i] = (To)f(load<decltype(from)>(p + i * sizeof from));
    };
    if (dtype == "F32")
        convert(float(), [](float x) { return x; });
    else if (dtype == "F64")
        convert(double(), [](double x) { return x; });
    else if (dtype == "BF16")
        convert(uint16_t(), bf16_to_float);
    else if (dtype == "F16")
        convert(uint16_t(), half_to_float);
    else
        return false;
    return true;
}

// A file opened for reading: its header checked, its tensors copied out by name. Copies of it share the mapping.
struct SafeTensorsFile {
    std::shared_ptr<const MappedFile> file;
    SafeTensorsHeader header;
    std::map<std::string, size_t> index;

    explicit SafeTensorsFile(const std::string& path) : file(std::make_shared<MappedFile>(path)) {
        std::string error;
        if (!parse_safetensors(file->data, file->size, header, error))
            data_error("'%s' cannot be used: %s; name another file, or fetch or write this one again", path.c_str(), error.c_str());
        for (size_t i = 0; i < header.tensors.size(); i++) index[header.tensors[i].name] = i;
    }

    const SafeTensor* find(const std::string& name) const {
        auto found = index.find(name);
        return found == index.end() ? nullptr : &header.tensors[found->second];
    }
    const uint8_t* data(const SafeTensor& t) const { return file->data + header.data_start + t.begin; }

    // The tensor of that name, which must have that shape.
    const SafeTensor& tensor(const std::string& name, const std::vector<int64_t>& shape) const {
        const SafeTensor* t = find(name);
        if (!t)
            data_error("'%s' has no tensor %s, the model needs one of shape %s: is it of another model?", file->path.c_str(), name.c_str(),
                       shape_string(shape).c_str());
        if (t->shape != shape)
            data_error("tensor %s of '%s' has shape %s, the model needs %s: is it of another model?", name.c_str(), file->path.c_str(),
                       shape_string(t->shape).c_str(), shape_string(shape).c_str());
        return *t;
    }

    // Copies a tensor as the type of `to`: any floating-point type as float or double, I32 and I64 as int32 if the values fit.
    void copy(const std::string& name, const std::vector<int64_t>& shape, float* to) const { copy_real(name, shape, to); }
    void copy(const std::string& name, const std::vector<int64_t>& shape, double* to) const { copy_real(name, shape, to); }
    void copy(const std::string& name, const std::vector<int64_t>& shape, int32_t* to) const {
        const SafeTensor& t = tensor(name, shape);
        const uint8_t* p = data(t);
        if (t.dtype == "I32") {
            if (t.end > t.begin) memcpy(to, p, t.end - t.begin);
            return;
        }
        if (t.dtype != "I64") wrong_type(t, "I32 or I64");
        for (uint64_t i = 0; i < (t.end - t.begin) / 8; i++) {
            int64_t v = load<int64_t>(p + 8 * i);
            if (v != (int32_t)v)
                data_error("tensor %s of '%s' holds %lld, which does not fit into 32 bits: is it of another model?", name.c_str(), file->path.c_str(),
                           (long long)v);
            to[i] = (int32_t)v;
        }
    }

 private:
    [[noreturn]] void wrong_type(const SafeTensor& t, const char* needed) const {
        data_error("tensor %s of '%s' has dtype %s: %s is needed; convert it", t.name.c_str(), file->path.c_str(), t.dtype.c_str(), needed);
    }
    template <class To>
    void copy_real(const std::string& name, const std::vector<int64_t>& shape, To* to) const {
        const SafeTensor& t = tensor(name, shape);
        if (!read_floats(t.dtype, data(t), (t.end - t.begin) / dtype_width(t.dtype), to)) wrong_type(t, "F32, F64, BF16 or F16");
    }
};

// A tensor to write. `data` is called once, when its turn has come, and returns the address of all its bytes, good until the next one is asked for:
// a model on a GPU is written through one buffer of the largest tensor's size.
struct TensorToWrite {
    std::string name, dtype;
    std::vector<int64_t> shape;
    std::function<const void*()> data;
};

// The first bytes of a file with these tensors, one behind the other in the order given; padded so that the data is aligned to 8 bytes.
inline std::string safetensors_header(const std::vector<TensorToWrite>& tensors, const std::map<std::string, std::string>& metadata) {
    auto quoted = [](const std::string& s) { return nlohmann::json(s).dump(-1, ' ', false, nlohmann::json::error_handler_t::replace); };
    std::string json = "{", separator;
    if (!metadata.empty()) {
        json += "\"__metadata__\":{";
        for (const auto& m : metadata) {
            json += separator + quoted(m.first) + ":" + quoted(m.second);
            separator = ",";
        }
        json += "}";
    }
    uint64_t begin = 0;
    for (const TensorToWrite& t : tensors) {
        uint64_t bytes;
        if (!tensor_bytes(t.dtype, t.shape, bytes))
            data_error("cannot write tensor %s: no dtype %s of shape %s", t.name.c_str(), t.dtype.c_str(), shape_string(t.shape).c_str());
        std::string shape;
        for (int64_t d : t.shape) shape += (shape.empty() ? "" : ",") + std::to_string(d);
        json += separator + quoted(t.name) + ":{\"dtype\":" + quoted(t.dtype) + ",\"shape\":[" + shape + "],\"data_offsets\":[" + std::to_string(begin) + "," +
                std::to_string(begin + bytes) + "]}";
        separator = ",";
        begin += bytes;
    }
    json += "}";
    json.resize((json.size() + 7) / 8 * 8, ' ');
    uint64_t length = json.size();
    return std::string((const char*)&length, 8) + json;
}

// Writes a file, whole or not at all (AtomicFile).
inline void write_safetensors(const std::string& path, const std::vector<TensorToWrite>& tensors, const std::map<std::string, std::string>& metadata = {}) {
    std::string header = safetensors_header(tensors, metadata);
    AtomicFile file(path);
    file.write(header.data(), header.size());
    for (const TensorToWrite& t : tensors) {
        uint64_t bytes = 0;
        tensor_bytes(t.dtype, t.shape, bytes);
        if (bytes) file.write(t.data(), bytes);
    }
    file.commit();
}
