// Decode states of many sequences: what AttentionState (attention.h) points into. One pool serves all layers of the network: a page holds the rows of
// page_size tokens in every layer, so one page table a sequence is enough; next to its pages a sequence has one block of constant size (memories).
// Forked sequences share their pages (counted references); a page that others hold too is copied before a sequence writes to it.
// T is the type of the rows in pages, F that of the blocks; Memory says where they stand: HostMemory here, DeviceMemory on a GPU.
#pragma once

#include <sys/mman.h>

#include <cassert>
#include <cstring>
#include <memory>
#include <vector>

#include "config.h"

struct HostMemory {
    static void* allocate(size_t bytes) { return ::operator new(bytes); }
    static void release(void* p) { ::operator delete(p); }
    static void copy(void* to, const void* from, size_t bytes) { memcpy(to, from, bytes); }
    static void zero(void* p, size_t bytes) { memset(p, 0, bytes); }

    // One range of addresses, `capacity` bytes long, that takes memory when it is first written to.
    class Range {
        size_t capacity;

     public:
        char* base = nullptr;
        explicit Range(size_t capacity) : capacity(capacity) {
            if (capacity == 0) return;
            void* p = mmap(nullptr, capacity, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
            if (p == MAP_FAILED) data_error("cannot have %.1f GB of addresses for decode states: ask for fewer --pages", capacity / 1e9);
            base = (char*)p;
        }
        ~Range() {
            if (base) munmap(base, capacity);
        }
        Range(const Range&) = delete;
        Range& operator=(const Range&) = delete;
        void grow(size_t) {}  // to at least so many bytes
    };
};

template <class T, class F = T, class Memory = HostMemory>
struct StatePool {
    struct Release {
        void operator()(void* p) const { Memory::release(p); }
    };
    using Block = std::unique_ptr<F, Release>;

    struct Sequence {
        bool used = false;
        int64_t length = 0;   // rows in its pages, or tokens it has had if no layer has rows
        int64_t dropped = 0;  // tokens before these, whose pages a sliding window has given back
        std::vector<int> pages;
        Block fixed;
        int64_t past() const { return dropped + length; }
    };
    const int page_size;
    const int64_t capacity;                          // pages
    std::vector<int64_t> page_offset, fixed_offset;  // of each network layer, in numbers
    std::vector<int64_t> per_token;
    int64_t page_numbers = 0, fixed_numbers = 0;
    std::vector<Sequence> sequences;

    StatePool(const std::vector<AttentionStateSize>& layers, int page_size, int64_t capacity)
        : page_size(page_size), capacity(capacity), memory(page_bytes(layers, page_size) * capacity) {
        assert(page_size > 0);
        for (const AttentionStateSize& l : layers) {
            page_offset.push_back(page_numbers);
            fixed_offset.push_back(fixed_numbers);
            per_token.push_back(l.per_token);
            page_numbers += l.per_token * page_size;
            fixed_numbers += l.per_sequence;
        }
    }
    static size_t page_bytes(const std::vector<AttentionStateSize>& layers, int page_size) {
        size_t numbers = 0;
        for (const AttentionStateSize& l : layers) numbers += l.per_token * page_size;
        return numbers * sizeof(T);
    }
    bool has_pages() const { return page_numbers > 0; }
    T* page(int p) const { return (T*)memory.base + p * page_numbers; }

    int create() {
        int s = 0;
        while (s < (int)sequences.size() && sequences[s].used) s++;
        if (s == (int)sequences.size()) sequences.emplace_back();
        Sequence& q = sequences[s];
        q.used = true;
        if (spare.empty()) {
            q.fixed.reset((F*)Memory::allocate(fixed_numbers * sizeof(F)));
        } else {
            q.fixed = std::move(spare.back());
            spare.pop_back();
        }
        Memory::zero(q.fixed.get(), fixed_numbers * sizeof(F));
        return s;
    }
    // A sequence with the same past.
    int fork(int from) {
        int s = create();
        Sequence &q = sequences[s], &f = sequences[from];
        q.length = f.length;
        q.dropped = f.dropped;
        q.pages = f.pages;
        for (int p : q.pages) references[p]++;
        Memory::copy(q.fixed.get(), f.fixed.get(), fixed_numbers * sizeof(F));
        return s;
    }
    // As fork(), with all pages its own.
    int copy(int from) {
        int s = fork(from);
        for (int& p : sequences[s].pages) {
            int shared = p;
            p = take_page();
            Memory::copy(page(p), page(shared), page_numbers * sizeof(T));
            give_back(shared);
        }
        return s;
    }
    void release(int s) {
        for (int p : sequences[s].pages) give_back(p);
        spare.push_back(std::move(sequences[s].fixed));
        sequences[s] = Sequence();
    }

    int64_t pages_in_use() const { return (int64_t)references.size() - (int64_t)free_pages.size(); }
    int64_t pages_left() const { return has_pages() ? capacity - pages_in_use() : INT64_MAX; }
    // How many pages reserve(s, n) would take.
    int64_t pages_wanted(int s, int64_t n) const {
        const Sequence& q = sequences[s];
        if (!has_pages() || n == 0) return 0;
        return (q.length + n + page_size - 1) / page_size - (int64_t)q.pages.size() + shares_last(q);
    }
    // Pages for n more tokens of sequence s, which must be left: ask before.
    void reserve(int s, int64_t n) {
        Sequence& q = sequences[s];
        if (pages_wanted(s, n) > pages_left())
            data_error("the state is full: %lld more pages are wanted, %lld of %lld are left; give more --pages", (long long)pages_wanted(s, n),
                       (long long)pages_left(), (long long)capacity);
        if (!has_pages() || n == 0) return;
        if (shares_last(q)) {
            int copy = take_page(), shared = q.pages.back();
            Memory::copy(page(copy), page(shared), page_numbers * sizeof(T));
            give_back(shared);
            q.pages.back() = copy;
        }
        while ((int64_t)q.pages.size() * page_size < q.length + n) q.pages.push_back(take_page());
    }
    // Gives pages back of which the next token of sequence s, seeing `window` tokens with itself, sees nothing.
    void slide(int s, int64_t window) {
        Sequence& q = sequences[s];
        size_t n = 0;
        for (; q.length - page_size >= window - 1 && n < q.pages.size(); n++) {
            give_back(q.pages[n]);
            q.length -= page_size;
            q.dropped += page_size;
        }
        q.pages.erase(q.pages.begin(), q.pages.begin() + n);
    }
    // What living sequences hold; a shared page counts once.
    size_t bytes() const {
        size_t n = pages_in_use() * page_numbers * sizeof(T);
        for (const Sequence& q : sequences) n += q.used ? fixed_numbers * sizeof(F) : 0;
        return n;
    }

 private:
    typename Memory::Range memory;
    std::vector<int> references, free_pages;
    std::vector<Block> spare;

    // Is the page that the next token is written to held by others too?
    bool shares_last(const Sequence& q) const { return q.length < (int64_t)q.pages.size() * page_size && references[q.pages.back()] > 1; }
    int take_page() {
        assert(pages_left() > 0);
        if (free_pages.empty()) {
            free_pages.push_back((int)references.size());
            references.push_back(0);
            memory.grow(references.size() * page_numbers * sizeof(T));
        }
        int p = free_pages.back();
        free_pages.pop_back();
        references[p] = 1;
        return p;
    }
    void give_back(int p) {
        if (--references[p] == 0) free_pages.push_back(p);
    }
};
