// What the host's tests share: a directory for their files, whole files as strings, and the errors that must come.
#pragma once

#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <string>
#include <vector>

#include <doctest/doctest.h>

#include "gpt2/error.h"

// A new directory below $TMPDIR, or /tmp; gone with all that is in it at the end of its scope.
struct TemporaryDirectory {
    std::string path;
    TemporaryDirectory() {
        const char* base = getenv("TMPDIR");
        path = std::string(base && *base ? base : "/tmp") + "/attn_tests.XXXXXX";
        if (mkdtemp(&path[0])) return;
        fprintf(stderr, "cannot make a directory '%s': set TMPDIR to a writable one\n", path.c_str());
        exit(EXIT_DATA);
    }
    TemporaryDirectory(const TemporaryDirectory&) = delete;
    ~TemporaryDirectory() { std::filesystem::remove_all(path); }
    std::string operator/(const std::string& name) const { return path + "/" + name; }
};

inline std::string contents(const std::string& path) {
    std::ifstream file(path, std::ios::binary);
    return {std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>()};
}

template <class T>
std::string bytes_of(const std::vector<T>& v) {
    return {(const char*)v.data(), v.size() * sizeof(T)};
}

// Runs `f`, which must throw an Error with that exit code whose one line holds each of `parts`.
template <class F>
void check_error(int exit_code, const std::vector<std::string>& parts, F f) {
    try {
        f();
        FAIL_CHECK("no error; expected one with '" << parts[0] << "'");
    } catch (const Error& e) {
        std::string line = e.what();
        CHECK_MESSAGE(e.exit_code == exit_code, line);
        CHECK_MESSAGE(line.find('\n') == std::string::npos, line);
        for (const std::string& part : parts) CHECK_MESSAGE(line.find(part) != std::string::npos, "'" << part << "' is not in: " << line);
    }
}
