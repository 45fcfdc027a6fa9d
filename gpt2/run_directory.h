// The directory of a run (--out): config.json, log.jsonl, on a GPU matmul_plans.txt, and a directory a checkpoint. Nothing in it is overwritten unasked, and
// nothing but these is ever removed from it.
#pragma once

#include <fcntl.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

#include <nlohmann/json.hpp>
#include <string>

#include "checkpoint.h"
#include "error.h"
#include "files.h"
#include "options.h"

constexpr const char* program_name = "attn.cpp";

inline bool holds_run(const std::string& directory) {
    std::string config = directory + "/config.json";
    if (exists(config)) {
        nlohmann::json j = read_json(config);
        if (!j.contains("program") || j["program"] != program_name) data_error("'%s' is not of this program: choose another --out", config.c_str());
        return true;
    }
    if (exists(directory + "/log.jsonl") || !newest_checkpoint(directory).empty())
        data_error("'%s' holds a log or a checkpoint but no config.json: choose another --out, or move them away", directory.c_str());
    return false;
}

// What a run needs to go on: all options as they were settled, and the model they gave, for people and for --resume.
inline void write_run_config(const std::string& directory, const Options& o, const ModelConfig& model) {
    nlohmann::ordered_json options;
    for (const OptionSpec& s : option_specs()) {
        std::string name = s.name;
        // The CPU's trainer has nothing to say about the GPU's options, but does not forget those of a run that it goes on with.
        bool idle = s.gpu && !trainer_on_gpu() && option_json(o, s) == option_json(Options(), s);
        if ((s.commands & TRAIN) && name != "out" && name != "resume" && name != "overwrite" && !idle) options[name] = option_json(o, s);
    }
    nlohmann::ordered_json j = {
        {"program", program_name}, {"version", 1}, {"model", model_json(model)}, {"options", options}, {"attention_options", o.attention_options}};
    write_file(directory + "/config.json", j.dump(2) + "\n");
}

// The options of a run, as its config.json has them.
inline Options run_options_from_json(const nlohmann::json& j, const std::string& path) {
    Options o;
    if (!j.contains("options") || !j["options"].is_object()) data_error("'%s' has no options: it is damaged; start another run", path.c_str());
    try {
        for (const OptionSpec& s : option_specs()) {
            if (!(s.commands & TRAIN) || !j["options"].contains(s.name)) continue;
            nlohmann::json value = j["options"][s.name];
            set_option(o, s, value.is_string() ? value.get<std::string>() : value.is_number_float() ? format("%.17g", value.get<double>()) : value.dump());
        }
        if (j.contains("attention_options")) o.attention_options = j["attention_options"].get<std::map<std::string, std::string>>();
    } catch (const std::exception& e) {
        data_error("'%s': %s", path.c_str(), e.what());
    }
    return o;
}
inline Options read_run_options(const std::string& directory) {
    std::string path = directory + "/config.json";
    return run_options_from_json(read_json(path), path);
}

// A run's directory while a run is going on in it: nobody else may write there.
class RunDirectory {
    int lock = -1;

 public:
    std::string path;

    RunDirectory() = default;
    RunDirectory(const RunDirectory&) = delete;
    RunDirectory& operator=(const RunDirectory&) = delete;
    ~RunDirectory() {
        if (lock >= 0) close(lock);
    }

    // Makes the directory if need be, and takes it for this process.
    void claim(const std::string& directory) {
        path = directory;
        make_directories(path);
        lock = ::open(path.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC);
        if (lock < 0) file_error("open", path, errno);
        if (flock(lock, LOCK_EX | LOCK_NB) != 0 && errno == EWOULDBLOCK)  // other errors: a file system without locks
            data_error("another run is writing into '%s': wait for it, or choose another --out", path.c_str());
        if (access(path.c_str(), W_OK) != 0) file_error("write into", path, errno);
    }
    // Removes the run that is there: its checkpoints and its log. config.json stays until it is replaced, so that the directory is known as ours.
    void clear() {
        for (const std::string& name : directory_entries(path)) {
            bool temporary = name.size() > 4 && name.compare(name.size() - 4, 4, ".tmp") == 0;
            if (step_of_name(temporary ? name.substr(0, name.size() - 4) : name) >= 0) remove_checkpoint(path + "/" + name);
        }
        for (const char* name : {"/log.jsonl", "/matmul_plans.txt"}) unlink((path + name).c_str());
    }
};
