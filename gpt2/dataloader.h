// The data path: a file becomes a Dataset (shards of tokens, mapped or in memory), a Dataset becomes batches.
//
// Batch number n is a pure function of (n, rank, ranks, seed): a resumed run, a run on more GPUs and a run that died and is examined all see the same
// data, and the only thing that a checkpoint must remember of the loader is n.
#pragma once

#include <glob.h>

#include <algorithm>
#include <cassert>
#include <cmath>
#include <cstdint>
#include <limits>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "error.h"
#include "files.h"
#include "philox.h"
#include "shards.h"
#include "tokenizer.h"
#include "trainer.h"

// ---------------------------------------------------------------------------------------------------------------------------------------------------------

struct Dataset {
    std::string name;  // for messages: the file, the pattern, or which part of it
    std::vector<Shard> shards;
    int64_t num_tokens = 0;
    int end_of_text = -1;

    void add(Shard shard) {
        shard.start = num_tokens;
        num_tokens += shard.count;
        shards.push_back(std::move(shard));
    }
    // The shard that token `position` stands in.
    const Shard& shard_at(int64_t position) const {
        assert(position >= 0 && position < num_tokens);
        auto after = std::upper_bound(shards.begin(), shards.end(), position, [](int64_t p, const Shard& s) { return p < s.start; });
        return *--after;
    }
    int64_t operator[](int64_t position) const {
        const Shard& s = shard_at(position);
        return s[position - s.start];
    }
    // Tokens begin .. end-1; nothing is copied.
    Dataset slice(int64_t begin, int64_t end, const std::string& slice_name) const {
        assert(0 <= begin && begin <= end && end <= num_tokens);
        Dataset d;
        d.name = slice_name;
        d.end_of_text = end_of_text;
        for (Shard s : shards) {
            int64_t first = std::max(begin - s.start, (int64_t)0), last = std::min(end - s.start, s.count);
            if (first >= last) continue;
            s.data += first * s.width;
            s.file_position += first;
            s.count = last - first;
            d.add(std::move(s));
        }
        return d;
    }
    // Copies tokens, across shards if need be. A shard is checked here, as it is used: nobody waits until a terabyte has been looked through.
    void read(int64_t position, int64_t count, int vocab_size, int* to) const {
        while (count > 0) {
            const Shard& s = shard_at(position);
            int64_t first = position - s.start, n = std::min(count, s.count - first);
            for (int64_t i = 0; i < n; i++) {
                int64_t token = s[first + i];
                if (token >= vocab_size) outside_vocabulary(s, first + i, vocab_size);
                to[i] = (int)token;
            }
            position += n;
            count -= n;
            to += n;
        }
    }
    [[noreturn]] static void outside_vocabulary(const Shard& s, int64_t i, int vocab_size) {
        data_error("token %lld at position %lld of '%s' is outside the vocabulary of %d: choose the --tokenizer that the file was made with", (long long)s[i],
                   (long long)(s.file_position + i), s.file.c_str(), vocab_size);
    }
};

// The tokens of a text, in memory.
inline Dataset text_dataset(const std::string& name, std::string_view text, const Tokenizer& tokenizer) {
    if (!tokenizer.text)
        data_error("'%s' is a text, and the tokenizer '%s' reads none: choose --tokenizer bytes, or name a token shard", name.c_str(), tokenizer.name.c_str());
    auto encoded = tokenizer.encode_corpus(text);
    if (encoded.empty()) data_error("'%s' holds no text: name another file", name.c_str());
    auto tokens = std::make_shared<const decltype(encoded)>(std::move(encoded));
    Shard s;
    s.file = name;
    s.data = (const uint8_t*)tokens->data();
    s.width = (int)sizeof(*tokens->data());
    s.count = (int64_t)tokens->size();
    s.owner = tokens;
    Dataset d;
    d.name = name;
    d.end_of_text = tokenizer.end_of_text;
    d.add(std::move(s));
    return d;
}

// The files that a pattern names, sorted; a name with a bracket in it is a name first.
inline std::vector<std::string> matching_files(const std::string& pattern) {
    if (access(pattern.c_str(), F_OK) == 0) return {pattern};
    glob_t found = {};
    int status = glob(pattern.c_str(), 0, nullptr, &found);
    std::vector<std::string> files;
    if (status == 0) files.assign(found.gl_pathv, found.gl_pathv + found.gl_pathc);
    globfree(&found);
    if (files.empty()) data_error("no file is named '%s' and none matches it: check the path", pattern.c_str());
    std::sort(files.begin(), files.end());
    return files;
}

// Opens what --data names: a text file, a token shard, or a pattern that several shards match.
inline Dataset open_dataset(const std::string& pattern, const Tokenizer& tokenizer) {
    std::vector<std::string> files = matching_files(pattern);
    Dataset d;
    d.name = pattern;
    d.end_of_text = tokenizer.end_of_text;
    for (const std::string& name : files) {
        auto file = std::make_shared<MappedFile>(name);
        if (file->size == 0) data_error("'%s' is empty: name another file", name.c_str());
        if (files.size() == 1 && !is_shard(file->data, file->size)) {
            // Other binary files must not become byte soup: a text has no zero bytes, their headers do.
            if (memchr(file->data, 0, std::min(file->size, shard_header_bytes)))
                data_error("'%s' is neither a text nor a token shard: name another file", name.c_str());
            return text_dataset(name, {(const char*)file->data, file->size}, tokenizer);
        }
        if (!is_shard(file->data, file->size))
            data_error("'%s' is no token shard, as all files that match '%s' must be: name a text by itself, or make shards of texts by ./tokenize encode",
                       name.c_str(), pattern.c_str());
        d.add(open_shard(file));
    }
    return d;
}

// Holds out the last tenth: at the document boundary nearest to it, if there is one within a fiftieth of all tokens (a million at most). Views, no copies.
inline void split_dataset(const Dataset& all, Dataset& train, Dataset& val) {
    int64_t cut = all.num_tokens - all.num_tokens / 10, reach = std::min(all.num_tokens / 50, (int64_t)1 << 20);
    for (int64_t away = 0; away <= reach; away++) {
        auto document_starts_at = [&](int64_t position) { return position < all.num_tokens && all[position] == all.end_of_text; };
        bool below = document_starts_at(cut - away), above = document_starts_at(cut + away);
        if (!below && !above) continue;
        cut += below ? -away : away;
        break;
    }
    train = all.slice(0, cut, "the first nine tenths of " + all.name);
    val = all.slice(cut, all.num_tokens, "the last tenth of " + all.name);
}

// ---------------------------------------------------------------------------------------------------------------------------------------------------------

// A pseudo-random permutation of 0 .. size-1, computed and not stored: a Feistel network over the next even number of bits, with Philox as its round
// function, applied again until the result is below `size` (cycle walking; fewer than four times on average).
inline int64_t permute(int64_t i, int64_t size, uint64_t seed, int64_t epoch) {
    assert(0 <= i && i < size);
    int half = 1;
    while (half < 31 && (int64_t)1 << 2 * half < size) half++;
    uint32_t mask = (uint32_t)(((uint64_t)1 << half) - 1), left, right;
    do {
        left = (uint32_t)(i >> half) & mask;
        right = (uint32_t)i & mask;
        for (uint32_t round = 0; round < 8; round++) {
            uint32_t f = philox(seed, right, round, (uint32_t)epoch, 0x73687566).word[0];
            uint32_t next = (left ^ f) & mask;
            left = right;
            right = next;
        }
        i = (int64_t)left << half | right;
    } while (i >= size);
    return i;
}

struct LoaderOptions {
    int B = 1, T = 1;
    uint64_t seed = 0;
    bool shuffle = false;
    int rank = 0, ranks = 1;    // this process's share of every global batch of ranks * B rows
    bool doc_mask = false;      // a sequence ends where its document does
    bool carry_memory = false;  // rows are continuous lanes through the documents
    int end_of_text = -1;
    int vocab_size = 0;
};

// Batches without end.
//
// Without carried memory a row is a window of T inputs and their T next tokens. Each shard is cut into as many windows as fit; the at most T-1 tokens that are
// left over move to its front or back, so that shuffled epochs cut the documents at different places. Samples are numbered through all epochs, in each of which
// every window comes once, and sample (number * ranks + rank) * B + b is row b: neither the order nor the end of an epoch depends on B or ranks, and a batch
// may hold the end of one epoch and the beginning of the next.
//
// With carried memory the dataset, shard behind shard, is cut into ranks * B lanes of equal length, and batch n holds the n-th T tokens of each; after the last
// the lanes start again. A rank numbers its own lanes 0 .. B-1, which are its rows. The order is the text's, `shuffle` has no meaning.
struct DataLoader {
    Dataset dataset;
    LoaderOptions options;

    DataLoader(Dataset data, LoaderOptions o) : dataset(std::move(data)), options(o) {
        assert(o.B >= 1 && o.T >= 1 && o.rank >= 0 && o.rank < o.ranks && o.vocab_size > 0);
        for (const Shard& s : dataset.shards) {
            first_window.push_back(windows);
            windows += (s.count - 1) / o.T;  // a window's last target is the next one's first input
        }
        int64_t rows = (int64_t)o.B * o.ranks;
        lane_chunks = (dataset.num_tokens - 1) / rows / o.T;
        if (o.carry_memory ? lane_chunks < 1 : windows < rows)
            data_error("%s has %lld tokens, too few for one batch of %lld rows of %d + 1: use a smaller --batch or --seq, or more data", dataset.name.c_str(),
                       (long long)dataset.num_tokens, (long long)rows, o.T);
    }

    // Whole batches in an epoch.
    int64_t batches_per_epoch() const { return options.carry_memory ? lane_chunks : windows / ((int64_t)options.B * options.ranks); }

    void fill(int64_t number, Batch& batch) const {
        assert(number >= 0);
        int B = options.B, T = options.T;
        int64_t first_row = (number * options.ranks + options.rank) * B;
        batch.tokens.resize((size_t)B * T);
        batch.targets.resize((size_t)B * T);
        batch.cu_seqlens.assign(1, 0);
        batch.memory_from.clear();
        batch.memory_to.clear();
        batch.first_row = first_row & INT32_MAX;  // dropout's counters have 32 bits
        std::vector<int> row(T + 1);
        for (int b = 0; b < B; b++) {
            dataset.read(options.carry_memory ? lane_position(number, b) : window_position(first_row + b), T + 1, options.vocab_size, row.data());
            std::copy(row.begin(), row.end() - 1, batch.tokens.begin() + (size_t)b * T);
            std::copy(row.begin() + 1, row.end(), batch.targets.begin() + (size_t)b * T);
            add_sequences(b, row, number, batch);
        }
    }

 private:
    std::vector<int64_t> first_window;  // of each shard
    int64_t windows = 0, lane_chunks = 0;

    int64_t window_position(int64_t sample) const {
        int64_t epoch = sample / windows, w = sample % windows, shift = 0;
        if (options.shuffle) w = permute(w, windows, options.seed, epoch);
        size_t i = std::upper_bound(first_window.begin(), first_window.end(), w) - first_window.begin() - 1;
        const Shard& s = dataset.shards[i];
        if (options.shuffle) shift = philox(options.seed, (uint32_t)i, 0, (uint32_t)epoch, 0x73686966).word[0] % ((s.count - 1) % options.T + 1);
        return s.start + shift + (w - first_window[i]) * options.T;
    }
    int64_t lane_position(int64_t number, int b) const {
        int64_t lane = (int64_t)options.rank * options.B + b;
        return (lane * lane_chunks + number % lane_chunks) * options.T;
    }

    // Row b becomes one sequence; or, where documents are kept apart, one for each document in it: an end-of-text token starts its document.
    void add_sequences(int b, const std::vector<int>& row, int64_t number, Batch& batch) const {
        int T = options.T;
        bool split = options.doc_mask || options.carry_memory;
        size_t first = batch.cu_seqlens.size() - 1;
        for (int t = 1; t < T && split; t++)
            if (row[t] == options.end_of_text) batch.cu_seqlens.push_back(b * T + t);
        batch.cu_seqlens.push_back((b + 1) * T);
        if (!options.carry_memory) return;
        batch.memory_from.resize(batch.cu_seqlens.size() - 1, -1);
        batch.memory_to.resize(batch.cu_seqlens.size() - 1, -1);
        if (number % lane_chunks != 0 && row[0] != options.end_of_text) batch.memory_from[first] = b;  // the document goes on
        batch.memory_to.back() = b;
    }
};

// ---------------------------------------------------------------------------------------------------------------------------------------------------------

// Cross-entropy (nats a token) on `val` of a bigram model counted on `train`: what a model has to beat to have learnt more than pairs of tokens.
// Witten-Bell smoothing: p(b|a) = (count(ab) + D(a) p(b)) / (count(a) + D(a)), where D(a) is how many different tokens were seen behind a, and p(b) is the
// add-one unigram. The table has vocab^2 entries: NaN for a vocabulary beyond 1024, and if `val` has no pair. Of each, the first 2^26 tokens are looked at.
inline double bigram_loss(const Dataset& train, const Dataset& val, int vocab) {
    if (vocab > 1024) return std::numeric_limits<double>::quiet_NaN();
    std::vector<int64_t> pairs((size_t)vocab * vocab), followers(vocab), kinds(vocab), single(vocab);
    auto each_pair = [&](const Dataset& d, auto&& visit) {
        Dataset first = d.slice(0, std::min(d.num_tokens, (int64_t)1 << 26), d.name);
        for (const Shard& s : first.shards)
            for (int64_t i = 0, a = -1; i < s.count; i++) {
                int64_t b = s[i];
                if (b >= vocab) Dataset::outside_vocabulary(s, i, vocab);
                if (a >= 0) visit(a, b);
                a = b;
            }
    };
    int64_t total = 0, scored = 0;
    each_pair(train, [&](int64_t a, int64_t b) {
        kinds[a] += pairs[a * vocab + b]++ == 0;
        followers[a]++;
        single[b]++;
        total++;
    });
    double loss = 0;
    each_pair(val, [&](int64_t a, int64_t b) {
        double unigram = (single[b] + 1.0) / (double)(total + vocab);
        double p = kinds[a] ? ((double)pairs[a * vocab + b] + (double)kinds[a] * unigram) / (double)(followers[a] + kinds[a]) : unigram;
        loss -= std::log(p);
        scored++;
    });
    return scored ? loss / (double)scored : std::numeric_limits<double>::quiet_NaN();
}
