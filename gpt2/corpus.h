// Texts of any size, in blocks that can be encoded apart, by as many threads as there are: what is in memory is a few blocks for each thread.
//
// A block ends where the words, and so the tokens, of both sides do not depend on each other: before white space behind a visible ASCII character. Words have
// no white space behind anything else, and only white space looks at what follows it (bpe.h). Where a text has no such place, in Chinese without line feeds,
// say, its words are looked at; a single word is never cut, however long it is.
#pragma once

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <exception>
#include <string>
#include <string_view>
#include <vector>

#include "error.h"
#include "files.h"
#include "threads.h"
#include "tokenizer.h"

// True if the text may be cut before byte i. Nor is it cut behind a separator: a line feed there belongs to it.
inline bool may_cut(std::string_view text, size_t i) {
    char c = text[i], before = text[i - 1];
    if (!(c == ' ' || (c >= '\t' && c <= '\r')) || before <= ' ' || before >= 0x7f) return false;
    size_t n = document_separator.size();
    return i < n || text.compare(i - n, n, document_separator) != 0;
}

// How a text is read.
struct BlockOptions {
    bool words = true;       // tokens depend on words; otherwise bytes are tokens
    bool documents = false;  // separators are looked for
    size_t block = 1 << 18;  // bytes that are encoded at a time, about
    size_t round = 1 << 23;  // bytes that are read at a time, and shared out among the threads
};

// The same for a text without such places: the last boundary of words where what comes behind `text` changes nothing; 0 if there is none. A word is settled
// once 16 bytes behind it are known: it depends on no more than two characters there, and a separator that is incomplete at the end begins behind it.
inline size_t cut_between_words(std::string_view text, const BlockOptions& o) {
    constexpr size_t unsettled = 16;
    static_assert(document_separator.size() < unsettled, "");
    if (text.size() <= unsettled) return 0;
    size_t limit = text.size() - unsettled, separator = o.documents ? text.rfind(document_separator) : std::string_view::npos, begin = 0, cut = 0;
    if (separator != std::string_view::npos) {
        cut = separator;
        begin = separator + document_separator.size();
        if (begin < text.size() && text[begin] == '\n') begin++;
    }
    if (begin >= limit) return cut;
    if (!o.words) return limit;
    WordSplitter splitter;
    std::vector<size_t> ends = {begin};
    splitter.split(text.substr(begin), [&](size_t, size_t end) {
        if (begin + end <= limit) ends.push_back(begin + end);
    });
    for (size_t k = ends.size() - 1; k > 0; k--) {
        // White space at the end of a block, which is two words before a visible character, must not become one.
        size_t from = ends[k > 1 ? k - 2 : 0], last = 0;
        splitter.split(text.substr(from, ends[k] - from), [&](size_t word, size_t) { last = from + word; });
        if (last == ends[k - 1]) return ends[k];
    }
    return cut;
}

// Reads a file, or standard input ("-").
class TextBlocks {
 public:
    std::string path;
    uint64_t bytes_read = 0;
    uint64_t size = 0;  // of the file; 0 if it is not known

    TextBlocks(const std::string& path, const BlockOptions& options) : path(path), o(options) {
        fd = path == "-" ? dup(STDIN_FILENO) : ::open(path.c_str(), O_RDONLY | O_CLOEXEC);
        if (fd < 0) file_error("open", path, errno);
        struct stat st;
        if (fstat(fd, &st) == 0 && S_ISREG(st.st_mode)) size = (uint64_t)st.st_size;
    }
    TextBlocks(const TextBlocks&) = delete;
    TextBlocks& operator=(const TextBlocks&) = delete;
    ~TextBlocks() { close(fd); }

    // The next blocks, valid until the next call; none at the end.
    const std::vector<std::string_view>& next() {
        buffer.erase(0, used);
        used = 0;
        blocks.clear();
        for (size_t wanted = o.round; blocks.empty(); wanted = 2 * buffer.size()) {
            bool whole = !fill(wanted);
            if (buffer.empty()) break;
            cut(whole);
        }
        return blocks;
    }

 private:
    int fd;
    BlockOptions o;
    size_t used = 0;
    std::string buffer;
    std::vector<std::string_view> blocks;

    // Reads until the buffer has `wanted` bytes; false if the text ends before.
    bool fill(size_t wanted) {
        size_t filled = buffer.size();
        buffer.resize(std::max(wanted, filled));
        while (filled < buffer.size()) {
            ssize_t n = read(fd, &buffer[filled], buffer.size() - filled);
            if (n < 0 && errno == EINTR) continue;
            if (n < 0) file_error("read", path, errno);
            if (n == 0) break;
            filled += (size_t)n;
            bytes_read += (uint64_t)n;
        }
        bool more = filled == buffer.size();
        buffer.resize(filled);
        return more;
    }

    void cut(bool whole) {
        std::string_view text = buffer;
        while (used < text.size()) {
            size_t end = used + o.block;
            while (end < text.size() && !may_cut(text, end)) end++;
            if (end >= text.size()) {
                if (!whole) break;
                end = text.size();
            }
            blocks.push_back(text.substr(used, end - used));
            used = end;
        }
        if (!blocks.empty() || whole) return;
        used = cut_between_words(text, o);
        if (used) blocks.push_back(text.substr(0, used));
    }
};

// Calls work(i) for i = 0 .. n-1, by several threads at once. The first exception ends it.
template <class Work>
void in_parallel(size_t n, Work work) {
    std::exception_ptr error;
    std::atomic<bool> failed = false;
#pragma omp parallel for schedule(dynamic)
    for (size_t i = 0; i < n; i++) {
        try {
            if (!failed) work(i);
        } catch (...) {
            if (!failed.exchange(true)) error = std::current_exception();
        }
    }
    if (failed) std::rethrow_exception(error);
}
