// What a training run tells: log.jsonl for programs, one line a step, and lines on the screen for people.
#pragma once

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <fstream>
#include <nlohmann/json.hpp>
#include <string>

#include "error.h"
#include "files.h"

// One optimiser step.
struct StepRecord {
    int64_t step = 0;
    double loss = 0;                      // mean over the step's batch, nats a token
    double val_loss = NAN, recall = NAN;  // NaN: not measured at this step
    double lr = 0, grad_norm = 0;         // the norm before clipping
    double ms = 0, tokens_per_s = 0;      // of the step alone: without validation, samples and checkpoints
    double utilisation = NAN;             // share of the device's peak that the model's FLOPs make up; NaN: the peak is not known
    int64_t tokens = 0;                   // trained on so far
};

// %.17g gives a double back exactly: two runs are the same if and only if their lines say so. JSON has no NaN and no infinity.
inline std::string json_number(double v) { return std::isfinite(v) ? format("%.17g", v) : "null"; }

inline std::string log_line(const StepRecord& r) {
    std::string s = format("{\"step\": %lld, \"loss\": %s", (long long)r.step, json_number(r.loss).c_str());
    if (!std::isnan(r.val_loss)) s += ", \"val_loss\": " + json_number(r.val_loss);
    if (!std::isnan(r.recall)) s += ", \"recall\": " + json_number(r.recall);
    s += format(", \"lr\": %s, \"grad_norm\": %s", json_number(r.lr).c_str(), json_number(r.grad_norm).c_str());
    return s + format(", \"ms\": %.3f, \"tokens_per_s\": %.1f, \"tokens\": %lld}", r.ms, r.tokens_per_s, (long long)r.tokens);
}

// How many bytes of a log hold the steps up to `last_step`: what stands behind them was written after the checkpoint that a run resumes from (or was
// being written when the run was killed) and will be written again.
inline int64_t log_bytes_up_to(const std::string& path, int64_t last_step) {
    std::ifstream file(path, std::ios::binary);
    int64_t bytes = 0;
    for (std::string line; std::getline(file, line) && !file.eof();) {  // eof: the last line lacks its newline
        nlohmann::json j = nlohmann::json::parse(line, nullptr, false);
        if (!j.is_object() || !j.contains("step") || !j["step"].is_number_integer() || j["step"].get<int64_t>() > last_step) break;
        bytes += (int64_t)line.size() + 1;
    }
    return bytes;
}

// Appends to log.jsonl. Each line reaches the kernel before step() returns, so that a killed run loses none; sync() takes them to the disk.
class Log {
    int fd = -1;
    std::string path;

 public:
    Log() = default;
    Log(const Log&) = delete;
    Log& operator=(const Log&) = delete;
    ~Log() {
        if (fd >= 0) close(fd);
    }

    // Keeps the lines up to `last_step` of a log that is there already.
    void open(const std::string& file, int64_t last_step) {
        path = file;
        fd = ::open(path.c_str(), O_WRONLY | O_CREAT | O_CLOEXEC, 0666);
        if (fd < 0) file_error("open", path, errno);
        int64_t bytes = log_bytes_up_to(path, last_step);
        if (ftruncate(fd, bytes) != 0 || lseek(fd, bytes, SEEK_SET) < 0) file_error("shorten", path, errno);
    }
    void step(const StepRecord& r) {
        if (fd < 0) return;
        std::string line = log_line(r) + "\n";
        for (size_t done = 0; done < line.size();) {
            ssize_t n = write(fd, line.data() + done, line.size() - done);
            if (n < 0 && errno != EINTR) file_error("write", path, errno);
            if (n > 0) done += n;
        }
    }
    void sync() {
        if (fd >= 0 && fsync(fd) != 0) file_error("write", path, errno);
    }
};

inline std::string duration_text(double seconds) {
    long s = std::lround(seconds);
    if (s < 60) return format("%lds", s);
    if (s < 3600) return format("%ldm%02lds", s / 60, s % 60);
    return format("%ldh%02ldm", s / 3600, s / 60 % 60);
}

// Progress on standard output. On a terminal one line is rewritten in place; elsewhere there are plain lines: the first step, every tenth (in a long
// run every 1/50 of it) and the last.
class Progress {
    bool terminal = isatty(STDOUT_FILENO);
    bool line_open = false;
    int64_t steps = 0, first_step = 0;
    double seconds = 0;  // of all steps since the start

 public:
    Progress() = default;
    Progress(const Progress&) = delete;
    Progress& operator=(const Progress&) = delete;
    ~Progress() { end_line(); }  // an error message must not stand on the live line

    void start(int64_t from_step, int64_t to_step) {
        first_step = from_step;
        steps = to_step;
    }
    void step(const StepRecord& r) {
        seconds += r.ms / 1000;
        int64_t every = std::max<int64_t>(10, steps / 50);
        bool plain = r.step == first_step + 1 || r.step % every == 0 || r.step == steps;
        if (!terminal && !plain) return;
        double eta = seconds / (double)(r.step - first_step) * (double)(steps - r.step);
        std::string share = std::isnan(r.utilisation) ? "" : format(" (%.1f%% utilisation)", 100 * r.utilisation);
        std::string s = format("step %lld/%lld | loss %.4f | lr %.2e | norm %.3f | %.0f tokens/s%s | ETA %s", (long long)r.step, (long long)steps, r.loss, r.lr,
                               r.grad_norm, r.tokens_per_s, share.c_str(), duration_text(eta).c_str());
        printf(terminal ? "\r\033[K%s" : "%s\n", s.c_str());
        fflush(stdout);
        line_open = terminal;
    }
    // Ends the live line, so that something else can be printed.
    void end_line() {
        if (line_open) printf("\n");
        line_open = false;
        fflush(stdout);
    }
};
