// Files on the host: read-only mappings, files that appear whole or not at all, and arithmetic for sizes that a file claims.
// Whatever the system refuses becomes a data error (exit 3) that names the file, the reason and the remedy.
#pragma once

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <string>
#include <string_view>

#include "error.h"

static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "files are little-endian, and read without swapping");

// Sums and products of numbers from a file: false if they do not fit into 64 bits.
inline bool checked_add(uint64_t a, uint64_t b, uint64_t& sum) { return !__builtin_add_overflow(a, b, &sum); }
inline bool checked_mul(uint64_t a, uint64_t b, uint64_t& product) { return !__builtin_mul_overflow(a, b, &product); }

// A number at any address: what a file holds need not be aligned.
template <class T>
T load(const void* p) {
    T value;
    memcpy(&value, p, sizeof value);
    return value;
}

// How a parser leaves that returns its errors: `return refuse(error, "...")`.
inline bool refuse(std::string& error, const std::string& why) {
    error = why;
    return false;
}

// A name from a file, fit for an error message of one line: nothing that moves a terminal's cursor, no kilometres.
inline std::string printable(const std::string& name) {
    std::string s;
    for (size_t i = 0; i < name.size() && i < 200; i++) s += (unsigned char)name[i] < 0x20 || name[i] == 0x7f ? '?' : name[i];
    return name.size() > 200 ? s + "..." : s;
}

[[noreturn]] inline void file_error(const char* what, const std::string& path, int reason) {
    const char* remedy = "check the path and its permissions";
    if (reason == ENOSPC || reason == EDQUOT || reason == EFBIG) remedy = "make room, or choose another directory";
    data_error("cannot %s '%s': %s; %s", what, path.c_str(), strerror(reason), remedy);
}

inline void make_directories(const std::string& path) {
    for (size_t slash = path.find('/', 1);; slash = path.find('/', slash + 1)) {
        std::string part = path.substr(0, slash);
        if (mkdir(part.c_str(), 0777) != 0 && errno != EEXIST) file_error("create", part, errno);
        if (slash == std::string::npos) return;
    }
}

// A regular file mapped read-only; 64-bit offsets throughout. The pages belong to the system's cache, so a corpus larger than memory is fine.
// Whoever shortens a file while it is mapped ends the program (SIGBUS).
struct MappedFile {
    std::string path;
    const uint8_t* data = nullptr;
    uint64_t size = 0;

    explicit MappedFile(const std::string& path) : path(path) {
        int fd = ::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK);  // a named pipe must not hang here
        if (fd < 0) file_error("open", path, errno);
        struct stat st;
        void* p = nullptr;
        int reason = fstat(fd, &st) != 0 ? errno : 0;
        bool regular = !reason && S_ISREG(st.st_mode);
        if (regular && st.st_size > 0) {
            p = mmap(nullptr, (size_t)st.st_size, PROT_READ, MAP_PRIVATE, fd, 0);
            if (p == MAP_FAILED) reason = errno;
        }
        ::close(fd);
        if (reason) file_error("read", path, reason);
        if (!regular) data_error("'%s' is not a regular file: name a file", path.c_str());
        data = (const uint8_t*)p;
        size = (uint64_t)st.st_size;
    }
    MappedFile(const MappedFile&) = delete;
    MappedFile& operator=(const MappedFile&) = delete;
    ~MappedFile() {
        if (data) munmap((void*)data, size);
    }
};

// visit(line, where): the lines of a text, but for empty ones; `where` names the line in a message.
template <class Visit>
void each_line(const MappedFile& file, Visit visit) {
    std::string_view text((const char*)file.data, file.size);
    long long number = 0;
    for (size_t begin = 0, end; begin < text.size(); begin = end + 1) {
        end = std::min(text.find('\n', begin), text.size());
        number++;
        if (end > begin) visit(text.substr(begin, end - begin), format("line %lld of '%s'", number, file.path.c_str()));
    }
}

inline void sync_directory_of(const std::string& path) {
    size_t slash = path.rfind('/');
    std::string directory = slash == std::string::npos ? "." : path.substr(0, slash + 1);
    int fd = ::open(directory.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (fd < 0) file_error("open", directory, errno);
    int reason = fsync(fd) != 0 ? errno : 0;
    ::close(fd);
    if (reason && reason != EINVAL) file_error("sync", directory, reason);  // EINVAL: a file system without directory syncs
}

// A file that replaces `path` whole or not at all: written as path.tmp, and renamed by commit() once all of it is on the disk. Without commit(), because
// a write failed, say, the temporary file goes and what stood at `path` stays. A directory, a pipe or a device is never replaced.
struct AtomicFile {
    std::string path, temporary;
    int fd;

    explicit AtomicFile(const std::string& path) : path(path), temporary(path + ".tmp") {
        struct stat st;
        if (stat(path.c_str(), &st) == 0 && !S_ISREG(st.st_mode)) data_error("'%s' is not a regular file: name another to write", path.c_str());
        fd = ::open(temporary.c_str(), O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0666);
        if (fd < 0) file_error("create", temporary, errno);
    }
    AtomicFile(const AtomicFile&) = delete;
    AtomicFile& operator=(const AtomicFile&) = delete;
    ~AtomicFile() {
        if (fd >= 0) ::close(fd);
        if (!temporary.empty()) unlink(temporary.c_str());
    }

    void write(const void* data, uint64_t size) {
        for (uint64_t done = 0; done < size;) {
            ssize_t n = ::write(fd, (const char*)data + done, size - done);
            if (n < 0 && errno == EINTR) continue;
            if (n <= 0) file_error("write", temporary, n < 0 ? errno : ENOSPC);
            done += (uint64_t)n;
        }
    }
    void commit() {
        if (fsync(fd) != 0) file_error("write", temporary, errno);
        int closed = ::close(fd);
        fd = -1;
        if (closed != 0) file_error("write", temporary, errno);
        if (rename(temporary.c_str(), path.c_str()) != 0) file_error("create", path, errno);
        temporary.clear();
        sync_directory_of(path);
    }
};

inline void write_file(const std::string& path, const std::string& content) {
    AtomicFile file(path);
    file.write(content.data(), content.size());
    file.commit();
}
