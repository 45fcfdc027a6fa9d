// Decode states of many sequences: what AttentionState (attention.h) points into. One pool serves all layers of the network: a page holds the rows of
// page_size tokens in every layer, so one page table a sequence is enough; next to its pages a sequence has one block of constant size (memories).
// Forked sequences share their full pages (counted references) and own a copy of the last, partly filled one.
// T is the type of the rows in pages, F that of the blocks; Memory says where they stand: HostMemory here, DeviceMemory on a GPU.
#pragma once

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
};

template <class T, class F = T, class Memory = HostMemory>
struct StatePool {
    struct Release {
        void operator()(void* p) const { Memory::release(p); }
    };
    template <class N>
    using Block = std::unique_ptr<N, Release>;

    struct Sequence {
        bool used = false;
        int64_t length = 0;
        std::vector<int> pages;
        Block<F> fixed;
    };
    int page_size;
    std::vector<int64_t> page_offset, fixed_offset;  // of each network layer, in numbers
    std::vector<int64_t> per_token;
    int64_t page_numbers = 0, fixed_numbers = 0;
    std::vector<Block<T>> pages;
    std::vector<int> references, free_pages;
    std::vector<Sequence> sequences;

    explicit StatePool(const std::vector<AttentionStateSize>& layers, int page_size = 64) : page_size(page_size) {
        for (const AttentionStateSize& l : layers) {
            page_offset.push_back(page_numbers);
            fixed_offset.push_back(fixed_numbers);
            per_token.push_back(l.per_token);
            page_numbers += l.per_token * page_size;
            fixed_numbers += l.per_sequence;
        }
    }
    int create() {
        int s = 0;
        while (s < (int)sequences.size() && sequences[s].used) s++;
        if (s == (int)sequences.size()) sequences.emplace_back();
        sequences[s].used = true;
        sequences[s].fixed.reset((F*)Memory::allocate(fixed_numbers * sizeof(F)));
        Memory::zero(sequences[s].fixed.get(), fixed_numbers * sizeof(F));
        return s;
    }
    // Pages for n more tokens.
    void reserve(int s, int64_t n) {
        Sequence& q = sequences[s];
        while ((int64_t)q.pages.size() * page_size < q.length + n) q.pages.push_back(take_page());
    }
    int fork(int from) {
        int s = create();
        sequences[s].length = sequences[from].length;
        Memory::copy(sequences[s].fixed.get(), sequences[from].fixed.get(), fixed_numbers * sizeof(F));
        int64_t full = sequences[from].length / page_size;
        for (int64_t i = 0; i < full; i++) {
            sequences[s].pages.push_back(sequences[from].pages[i]);
            references[sequences[from].pages[i]]++;
        }
        if (sequences[from].length % page_size) {
            int copy = take_page();
            Memory::copy(pages[copy].get(), pages[sequences[from].pages[full]].get(), page_numbers * sizeof(T));
            sequences[s].pages.push_back(copy);
        }
        return s;
    }
    void release(int s) {
        for (int p : sequences[s].pages)
            if (--references[p] == 0) free_pages.push_back(p);
        sequences[s] = Sequence();
    }
    // What living sequences hold; a shared page counts once.
    size_t bytes() const {
        size_t n = (pages.size() - free_pages.size()) * page_numbers * sizeof(T);
        for (const Sequence& q : sequences) n += q.used ? fixed_numbers * sizeof(F) : 0;
        return n;
    }

 private:
    int take_page() {
        if (free_pages.empty()) {
            pages.emplace_back((T*)Memory::allocate(page_numbers * sizeof(T)));
            references.push_back(0);
            free_pages.push_back((int)pages.size() - 1);
        }
        int p = free_pages.back();
        free_pages.pop_back();
        references[p] = 1;
        return p;
    }
};
