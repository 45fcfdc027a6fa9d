// Errors that a user can cause: one line that names the value and the remedy, and an exit status that says whose turn it is.
// main() prints the line and exits; nothing else does. Errors of the programmer are asserts.
#pragma once

#include <cstdarg>
#include <cstdio>
#include <stdexcept>
#include <string>

enum ExitCode { EXIT_USAGE = 2, EXIT_DATA = 3 };

struct Error : std::runtime_error {
    int exit_code;
    Error(int exit_code, const std::string& line) : std::runtime_error(line), exit_code(exit_code) {}
};

#define ERROR_FORMAT(fmt, args) __attribute__((format(printf, fmt, args)))

inline std::string vformat(const char* fmt, va_list args) {
    va_list measure;
    va_copy(measure, args);
    int n = vsnprintf(nullptr, 0, fmt, measure);
    va_end(measure);
    std::string s(n > 0 ? n : 0, '\0');
    if (n > 0) vsnprintf(&s[0], n + 1, fmt, args);
    return s;
}

ERROR_FORMAT(1, 2) inline std::string format(const char* fmt, ...) {
    va_list args;
    va_start(args, fmt);
    std::string s = vformat(fmt, args);
    va_end(args);
    return s;
}

// What was typed is wrong: exit 2.
[[noreturn]] ERROR_FORMAT(1, 2) inline void usage_error(const char* fmt, ...) {
    va_list args;
    va_start(args, fmt);
    std::string s = vformat(fmt, args);
    va_end(args);
    throw Error(EXIT_USAGE, s);
}

// A file, a directory or what it holds is wrong: exit 3.
[[noreturn]] ERROR_FORMAT(1, 2) inline void data_error(const char* fmt, ...) {
    va_list args;
    va_start(args, fmt);
    std::string s = vformat(fmt, args);
    va_end(args);
    throw Error(EXIT_DATA, s);
}
