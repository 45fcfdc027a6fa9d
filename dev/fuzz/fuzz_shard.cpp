// Token shards: what parse_shard takes is all there, and its header is the one that we would write.
#include <cstdlib>
#include <cstring>

#include "gpt2/shards.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
    ShardHeader header;
    std::string error;
    if (!parse_shard(data, size, header, error)) {
        if (error.empty()) abort();
        return 0;
    }
    Shard s;
    s.data = data + shard_header_bytes;
    s.width = header.width;
    s.count = header.count;
    uint64_t sum = 0;
    for (int64_t i = 0; i < s.count; i++) sum += (uint64_t)s[i];
    if (sum > (uint64_t)s.count * UINT32_MAX || memcmp(data, shard_header(s.width, s.count).data(), 16) != 0) abort();
    return 0;
}
