// Token shards, llm.c's format: 256 little-endian int32 (magic, version, number of tokens), then the tokens, uint16 each, or uint32 in its variant for
// Llama 3. The number is our extension: 64 bits, words 2 and 3. Up to 2^31-1 tokens word 3 is zero, as llm.c writes it, and the file is llm.c's byte for byte;
// a file of more is one that llm.c refuses, since the size contradicts what it reads.
#pragma once

#include <algorithm>
#include <cassert>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "error.h"
#include "files.h"

constexpr int32_t shard_magic_uint16 = 20240520, shard_magic_uint32 = 20240801;
constexpr uint64_t shard_header_bytes = 1024;

struct ShardHeader {
    int width = 0;      // bytes a token
    int64_t count = 0;  // tokens
};

inline bool is_shard(const uint8_t* bytes, size_t size) {
    int32_t magic = size < 4 ? 0 : load<int32_t>(bytes);
    return magic == shard_magic_uint16 || magic == shard_magic_uint32;
}

// Only the first 1024 of `size` bytes are read: a shard is never loaded as a whole.
inline bool parse_shard(const uint8_t* bytes, size_t size, ShardHeader& out, std::string& error) {
    out = ShardHeader();
    if (!is_shard(bytes, size)) return refuse(error, "it does not start with the magic number of a token shard");
    if (size < shard_header_bytes) return refuse(error, "it has " + std::to_string(size) + " bytes, less than its header of 1024: it is cut short");
    bool wide = load<int32_t>(bytes) == shard_magic_uint32;
    int32_t version = load<int32_t>(bytes + 4);
    uint64_t count = load<uint64_t>(bytes + 8), width = wide ? 4 : 2, needed = 0;
    if (version != (wide ? 7 : 1)) return refuse(error, "its version is " + std::to_string(version) + ", known is " + (wide ? "7" : "1"));
    if (count == 0) return refuse(error, "its header claims 0 tokens: it is empty");
    if (!checked_mul(count, width, needed) || !checked_add(needed, shard_header_bytes, needed))
        return refuse(error, "its header claims " + std::to_string(count) + " tokens, more than any file has");
    if (size != needed)
        return refuse(error, "its header claims " + std::to_string(count) + " tokens, which make a file of " + std::to_string(needed) + " bytes; it has " +
                                 std::to_string(size) + (size < needed ? ": it is cut short" : ""));
    out.width = (int)width;
    out.count = (int64_t)count;
    return true;
}

inline std::vector<int32_t> shard_header(int width, int64_t count) {
    assert((width == 2 || width == 4) && count > 0);
    std::vector<int32_t> header(shard_header_bytes / 4);
    header[0] = width == 2 ? shard_magic_uint16 : shard_magic_uint32;
    header[1] = width == 2 ? 1 : 7;
    header[2] = (int32_t)(uint32_t)count;
    header[3] = (int32_t)(count >> 32);
    return header;
}

// ---------------------------------------------------------------------------------------------------------------------------------------------------------

// Tokens one behind another: a file's, or a part of them.
struct Shard {
    std::string file;
    std::shared_ptr<const void> owner;  // the mapping, or the memory
    const uint8_t* data = nullptr;
    int width = 2;
    int64_t count = 0;
    int64_t file_position = 0;  // number of the first token within the file, for messages
    int64_t start = 0;          // ... within the dataset

    int64_t operator[](int64_t i) const { return width == 2 ? load<uint16_t>(data + 2 * i) : (int64_t)load<uint32_t>(data + 4 * i); }
};

inline Shard open_shard(std::shared_ptr<const MappedFile> file) {
    ShardHeader header;
    std::string error;
    if (!parse_shard(file->data, file->size, header, error))
        data_error("'%s' cannot be used as a token shard: %s; make or fetch it again", file->path.c_str(), error.c_str());
    Shard s;
    s.file = file->path;
    s.data = file->data + shard_header_bytes;
    s.width = header.width;
    s.count = header.count;
    s.owner = file;
    return s;
}

// Writes a shard of any length: under a temporary name, and `path` is there, whole, once close() has returned. Without close() nothing stays.
class ShardWriter {
 public:
    ShardWriter(const std::string& path, int width /* bytes a token, 2 or 4 */) : file(path), width(width) {
        assert(width == 2 || width == 4);
        file.write(std::vector<uint8_t>(shard_header_bytes).data(), shard_header_bytes);  // no magic number yet: what is cut short is no shard
    }

    void write(const uint32_t* tokens, size_t n) {
        if (width == 4) file.write(tokens, (uint64_t)n * 4);
        std::vector<uint16_t> narrow;
        for (size_t done = 0; width == 2 && done < n; done += narrow.size()) {
            narrow.resize(std::min<size_t>(n - done, 1 << 16));
            for (size_t i = 0; i < narrow.size(); i++) {
                uint32_t token = tokens[done + i];
                if (token > UINT16_MAX) data_error("token %u does not fit into the 16 bits a token of '%s': write 32 bits a token", token, file.path.c_str());
                narrow[i] = (uint16_t)token;
            }
            file.write(narrow.data(), narrow.size() * 2);
        }
        count += (int64_t)n;
    }

    int64_t tokens() const { return count; }

    void close() {
        if (count == 0) data_error("there are no tokens for '%s': give a text that is not empty", file.path.c_str());
        if (lseek(file.fd, 0, SEEK_SET) != 0) file_error("write", file.temporary, errno);
        file.write(shard_header(width, count).data(), shard_header_bytes);
        file.commit();
    }

 private:
    AtomicFile file;
    const int width;
    int64_t count = 0;
};
