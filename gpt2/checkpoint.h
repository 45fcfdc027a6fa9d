// Checkpoints. A step's directory is complete in itself:
//
//     step_00001000/model.safetensors      the parameters, in float32, under the names of the parameter list
//                   optimizer.safetensors  AdamW's moments m.NAME and v.NAME; `memory` if memories are carried
//                   state.json             the model's shape, the tokenizer, and where the run stands
//                   encoder.json, vocab.bpe  the vocabulary, if the tokenizer has one
//
// It is written as step_00001000.tmp, every file of it is taken to the disk, and only then does it get its name: a directory of that name is whole,
// whatever kills the program. Random numbers need no state: they have addresses (philox.h), made of the seed and of the counters in state.json.
#pragma once

#include <dirent.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cstdint>
#include <cstring>
#include <fstream>
#include <nlohmann/json.hpp>
#include <sstream>
#include <string>
#include <vector>

#include "config.h"
#include "error.h"
#include "files.h"
#include "safetensors.h"
#include "tokenizer.h"
#include "trainer.h"

struct RunState {
    int64_t step = 0;          // optimiser steps done
    int64_t tokens = 0;        // trained on
    int64_t micro_steps = 0;   // forward passes in training: dropout's counter
    int64_t batch_number = 0;  // the loader's next batch
    int64_t seed = 0;
    int64_t data_tokens = 0;   // size of the training data: another size is other data
    int64_t seq = 0;           // tokens a sequence in training: what evaluation cuts its text into
    bool doc_mask = false;     // documents were kept apart
    nlohmann::json tokenizer;  // Tokenizer::identity()
    nlohmann::json model;      // model_json()
    std::shared_ptr<const Bpe> vocabulary;  // the tokenizer's, if it has one: its files go along

    void set_tokenizer(const Tokenizer& t) {
        tokenizer = t.identity();
        vocabulary = t.bpe;
    }
};

// ----------------------------------------------------------------------------
// The model's shape as JSON: enough to make the same one again

inline nlohmann::json model_json(const ModelConfig& c) {
    nlohmann::json attention = nlohmann::json::array();
    for (const AttentionConfig& a : c.attention) attention.push_back(attention_string(a));
    return {{"vocab_size", c.vocab_size}, {"max_seq", c.max_seq},   {"layers", c.layers},
            {"heads", c.heads},           {"channels", c.channels}, {"positions", positions_names[(int)c.positions]},
            {"attention", attention}};
}

// A member of a JSON object from a file, within a range; a data error naming the file if it is not there or is something else.
inline int64_t json_whole(const nlohmann::json& j, const char* key, int64_t min, int64_t max, const std::string& path) {
    if (!j.is_object() || !j.contains(key) || !j[key].is_number_integer() || (j[key].is_number_unsigned() && j[key].get<uint64_t>() > INT64_MAX) ||
        j[key].get<int64_t>() < min || j[key].get<int64_t>() > max)
        data_error("'%s': %s is missing or not a whole number from %lld to %lld; take another checkpoint", path.c_str(), key, (long long)min, (long long)max);
    return j[key].get<int64_t>();
}
inline std::string json_string(const nlohmann::json& j, const char* key, const std::string& path) {
    if (!j.is_object() || !j.contains(key) || !j[key].is_string())
        data_error("'%s': %s is missing or not a string; take another checkpoint", path.c_str(), key);
    return j[key].get<std::string>();
}

inline ModelConfig model_from_json(const nlohmann::json& j, const std::string& path) {
    ModelConfig c;
    c.set_vocab((int)json_whole(j, "vocab_size", 1, 1 << 24, path));
    c.max_seq = (int)json_whole(j, "max_seq", 1, 1 << 24, path);
    c.layers = (int)json_whole(j, "layers", 1, 1000, path);
    c.heads = (int)json_whole(j, "heads", 1, 1024, path);
    c.channels = (int)json_whole(j, "channels", 1, 65536, path);
    std::string pattern;
    if (j.contains("attention") && j["attention"].is_array())
        for (const nlohmann::json& a : j["attention"])
            if (a.is_string()) pattern += (pattern.empty() ? "" : ",") + a.get<std::string>();
    try {
        parse_attention(c, pattern, {}, json_string(j, "positions", path));
    } catch (const Error& e) {  // not typed by the user: a matter of the file
        data_error("'%s': %s", path.c_str(), e.what());
    }
    return c;
}

inline nlohmann::json read_json(const std::string& path) {
    MappedFile file(path);
    nlohmann::json j = nlohmann::json::parse(file.data, file.data + file.size, nullptr, false);
    if (!j.is_object()) data_error("'%s' is not a JSON object: it is damaged, or another program's", path.c_str());
    return j;
}

// ----------------------------------------------------------------------------
// Directories

inline bool exists(const std::string& path) {
    struct stat st;
    return stat(path.c_str(), &st) == 0;
}

// The N of `step_N`, N with 8 digits or more; -1 for any other name.
inline int64_t step_of_name(const std::string& name) {
    size_t digits = name.size() < 5 ? 0 : name.size() - 5;
    if (name.compare(0, 5, "step_") != 0 || digits < 8 || digits > 12 || name.find_first_not_of("0123456789", 5) != std::string::npos) return -1;
    return strtoll(name.c_str() + 5, nullptr, 10);
}
inline std::string step_directory(const std::string& run, int64_t step) { return format("%s/step_%08lld", run.c_str(), (long long)step); }

inline std::vector<std::string> directory_entries(const std::string& path) {
    std::vector<std::string> names;
    DIR* d = opendir(path.c_str());
    if (!d) return names;
    while (dirent* e = readdir(d)) names.push_back(e->d_name);
    closedir(d);
    return names;
}

// The newest complete checkpoint of a run; empty if it has none.
inline std::string newest_checkpoint(const std::string& run) {
    int64_t newest = -1;
    for (const std::string& name : directory_entries(run)) {
        int64_t step = step_of_name(name);
        if (step > newest && exists(run + "/" + name + "/state.json")) newest = step;
    }
    return newest < 0 ? "" : step_directory(run, newest);
}

// What --checkpoint names: a run's directory or one step's.
inline std::string find_checkpoint(const std::string& path) {
    if (exists(path + "/state.json")) return path;
    if (!exists(path)) file_error("open", path, errno);
    std::string newest = newest_checkpoint(path);
    if (newest.empty()) data_error("'%s' holds no complete checkpoint: name the directory of a run, or one of its step_... directories", path.c_str());
    return newest;
}

// Removes the files that a checkpoint consists of, finished or not, and the directory unless something else is in it.
inline void remove_checkpoint(const std::string& directory) {
    for (const char* name : {"state.json", "optimizer.safetensors", "model.safetensors", "encoder.json", "vocab.bpe"})
        for (const char* suffix : {"", ".tmp"}) unlink((directory + "/" + name + suffix).c_str());
    rmdir(directory.c_str());
}

// A directory that is there whole or not at all: its files go to PATH.tmp, which commit() gives its name. Without commit() they go again.
struct NewDirectory {
    std::string path, temporary;
    std::vector<std::string> files;

    explicit NewDirectory(const std::string& path) : path(path), temporary(path + ".tmp") {
        if (exists(path)) data_error("'%s' is there already: move it away", path.c_str());
        if (mkdir(temporary.c_str(), 0777) == 0) return;
        if (errno != EEXIST) file_error("create", temporary, errno);
        if (directory_entries(temporary).size() > 2)  // . and ..
            data_error("'%s' is there already, of a program that was cut off or is still writing: remove it", temporary.c_str());
    }
    NewDirectory(const NewDirectory&) = delete;
    NewDirectory& operator=(const NewDirectory&) = delete;
    ~NewDirectory() {
        for (const std::string& name : files) unlink((temporary + "/" + name).c_str());
        if (!temporary.empty()) rmdir(temporary.c_str());
    }
    std::string file(const std::string& name) {
        files.push_back(name);
        return temporary + "/" + name;
    }
    void commit() {
        if (rename(temporary.c_str(), path.c_str()) != 0) file_error("create", path, errno);
        temporary.clear();
        files.clear();
        sync_directory_of(path);
    }
};

// ----------------------------------------------------------------------------
// Writing and reading

inline void write_state(NewDirectory& directory, const RunState& state) {
    nlohmann::ordered_json j = {{"step", state.step},
                                {"tokens", state.tokens},
                                {"micro_steps", state.micro_steps},
                                {"batch_number", state.batch_number},
                                {"seed", state.seed},
                                {"data_tokens", state.data_tokens},
                                {"seq", state.seq},
                                {"doc_mask", state.doc_mask},
                                {"tokenizer", state.tokenizer},
                                {"model", state.model}};
    if (state.vocabulary) {
        write_file(directory.file("encoder.json"), state.vocabulary->encoder_json);
        write_file(directory.file("vocab.bpe"), state.vocabulary->vocab_bpe);
    }
    write_file(directory.file("state.json"), j.dump(2) + "\n");
}

inline void write_checkpoint_files(NewDirectory& directory, Trainer& trainer, const RunState& state) {
    const std::vector<TensorSpec>& specs = trainer.parameters().specs;
    std::vector<float> buffer;  // one tensor at a time, whatever the size of the model
    auto tensors = [&](Section section, const std::string& prefix, std::vector<TensorToWrite>& list) {
        for (size_t i = 0; i < specs.size(); i++)
            list.push_back({prefix + specs[i].name, "F32", specs[i].shape, [&, section, i]() -> const void* {
                                buffer.resize(specs[i].size());
                                trainer.get(section, (int)i, buffer.data());
                                return buffer.data();
                            }});
    };
    std::vector<TensorToWrite> model, optimizer;
    tensors(Section::PARAMETERS, "", model);
    tensors(Section::MOMENT1, "m.", optimizer);
    tensors(Section::MOMENT2, "v.", optimizer);
    std::vector<float> memory = trainer.get_memory();
    if (!memory.empty()) optimizer.push_back({"memory", "F32", {(int64_t)memory.size()}, [&]() -> const void* { return memory.data(); }});
    write_safetensors(directory.file("model.safetensors"), model, {{"format", "attn.cpp"}});
    write_safetensors(directory.file("optimizer.safetensors"), optimizer, {{"format", "attn.cpp"}});
    write_state(directory, state);
}

// Writes the checkpoint of state.step into `run`, or leaves nothing behind.
inline void save_checkpoint(const std::string& run, Trainer& trainer, const RunState& state) {
    std::string path = step_directory(run, state.step);
    remove_checkpoint(path + ".tmp");  // left by a run that was killed
    NewDirectory directory(path);
    write_checkpoint_files(directory, trainer, state);
    directory.commit();
}

inline RunState state_from_json(const nlohmann::json& j, const std::string& path) {
    RunState s;
    s.step = json_whole(j, "step", 0, INT32_MAX, path);
    s.tokens = json_whole(j, "tokens", 0, INT64_MAX, path);
    s.micro_steps = json_whole(j, "micro_steps", 0, INT64_MAX, path);
    s.batch_number = json_whole(j, "batch_number", 0, INT64_MAX, path);
    s.seed = json_whole(j, "seed", 0, INT64_MAX, path);
    s.data_tokens = json_whole(j, "data_tokens", 0, INT64_MAX, path);
    s.seq = json_whole(j, "seq", 1, INT32_MAX, path);
    s.doc_mask = j.contains("doc_mask") && j["doc_mask"] == true;
    s.tokenizer = j.contains("tokenizer") ? j["tokenizer"] : nlohmann::json();
    json_string(s.tokenizer, "name", path);
    s.model = j.contains("model") ? j["model"] : nlohmann::json();
    return s;
}
inline RunState read_state(const std::string& directory) {
    std::string path = directory + "/state.json";
    return state_from_json(read_json(path), path);
}

// Reads one tensor for each entry of the parameter list. All are checked before the first is set, so that an error leaves the trainer as it was.
inline void load_section(const SafeTensorsFile& file, const std::string& prefix, Section section, Trainer& trainer) {
    const std::vector<TensorSpec>& specs = trainer.parameters().specs;
    for (const TensorSpec& s : specs) file.tensor(prefix + s.name, s.shape);
    std::vector<float> buffer;
    for (size_t i = 0; i < specs.size(); i++) {
        buffer.resize(specs[i].size());
        file.copy(prefix + specs[i].name, specs[i].shape, buffer.data());
        trainer.set(section, (int)i, buffer.data());
    }
}
inline void expect_tensors(const SafeTensorsFile& file, size_t n) {
    if (file.header.tensors.size() != n)
        data_error("'%s' holds %zu tensors, the model needs %zu: is it of another model?", file.file->path.c_str(), file.header.tensors.size(), n);
}

inline void load_model(const std::string& directory, Trainer& trainer) {
    SafeTensorsFile file(directory + "/model.safetensors");
    expect_tensors(file, trainer.parameters().specs.size());
    load_section(file, "", Section::PARAMETERS, trainer);
}

// Moments and carried memory, for a resumed run.
inline void load_optimizer(const std::string& directory, Trainer& trainer) {
    SafeTensorsFile file(directory + "/optimizer.safetensors");
    std::vector<float> memory = trainer.get_memory();
    expect_tensors(file, 2 * trainer.parameters().specs.size() + !memory.empty());
    if (!memory.empty()) file.copy("memory", {(int64_t)memory.size()}, memory.data());
    load_section(file, "m.", Section::MOMENT1, trainer);
    load_section(file, "v.", Section::MOMENT2, trainer);
    if (!memory.empty()) trainer.set_memory(memory);
}

// The tokenizer that a model was trained with. A vocabulary lies beside state.json (`path`), and must be the one that state.json means.
inline Tokenizer tokenizer_of(RunState& state, const std::string& path) {
    std::string name = json_string(state.tokenizer, "name", path);
    int vocab_size, end_of_text;
    bool known = name == "bytes" || name == "bpe" || name == "ids" || parse_ids_tokenizer(name, vocab_size, end_of_text);
    if (!known) data_error("'%s': the tokenizer '%s' is unknown; take another checkpoint", path.c_str(), printable(name).c_str());
    Tokenizer t = make_tokenizer(name == "bpe" ? path.substr(0, path.rfind('/')) : name);
    std::string what = t.bpe ? "vocabulary than the encoder.json and vocab.bpe beside it" : "tokenizer of the name " + name;
    if (t.identity() != state.tokenizer) data_error("'%s' was made with another %s; take another checkpoint", path.c_str(), what.c_str());
    state.vocabulary = t.bpe;
    return t;
}
