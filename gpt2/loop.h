// The training loop, for any trainer: batches, accumulation, the optimiser's step, validation, samples of text, the log, checkpoints and signals.
#pragma once

#include <chrono>
#include <cmath>
#include <csignal>
#include <cstdint>
#include <deque>
#include <memory>
#include <set>
#include <string>
#include <vector>
#ifdef _OPENMP
#include <omp.h>
#endif

#include "checkpoint.h"
#include "convert.h"
#include "dataloader.h"
#include "error.h"
#include "evaluate.h"
#include "generate.h"
#include "log.h"
#include "options.h"
#include "run_directory.h"
#include "schedule.h"
#include "tokenizer.h"
#include "trainer.h"

constexpr size_t RECALL_SAMPLE = 256;  // questions asked at a validation within the run; at its end all are
constexpr int64_t SAMPLE_TOKENS = 300;
constexpr int EXIT_DIVERGED = 1;

// A run and all that belongs to it.
struct TrainingRun {
    Options o;
    Tokenizer tokenizer;
    Dataset train_data, val_data;
    std::vector<Question> questions;
    std::unique_ptr<Trainer> trainer;
    std::unique_ptr<DataLoader> loader;
    RunState state;           // where the run stands
    int64_t saved_step = -1;  // of the newest checkpoint

    std::unique_ptr<ModelFile> initial;  // of --init-from, until its weights are taken

    RunDirectory directory;
    Log log;
    Progress progress;
    std::chrono::steady_clock::time_point clock;  // when the last step was finished
};

// ----------------------------------------------------------------------------
// Signals: the first asks for the end of the run behind the present step, the second one ends the program as it would have without us.

inline volatile sig_atomic_t& stop_signal() {
    static volatile sig_atomic_t signal_number = 0;
    return signal_number;
}
inline void catch_stop_signals() {
    struct sigaction action = {};
    action.sa_handler = [](int s) { stop_signal() = s; };
    action.sa_flags = (int)SA_RESETHAND | SA_RESTART;
    for (int s : {SIGINT, SIGTERM}) sigaction(s, &action, nullptr);
}

// ----------------------------------------------------------------------------
// Getting ready

inline void set_threads(int64_t threads) {
#ifdef _OPENMP
    omp_set_num_threads(threads ? (int)threads : omp_get_num_procs());
#else
    (void)threads;
#endif
}

[[noreturn]] inline void contradiction(const Options& o, const std::string& name, const std::string& typed, const std::string& stored) {
    usage_error("--%s %s contradicts the run in '%s', which has %s: leave it out, or start another run in another --out", name.c_str(), typed.c_str(),
                o.out.c_str(), stored.c_str());
}

// The attention that was typed at --resume must be the one of the run, however it is written.
inline void check_attention(const Options& typed, const Options& stored, const Options& merged) {
    constexpr int vocab_size = 1;  // it plays no part
    if (!typed.is_given("attention") && typed.attention_options.empty()) return;
    nlohmann::json before = model_json(model_config(stored, vocab_size))["attention"];
    std::string text;
    for (const nlohmann::json& a : before) text += (text.empty() ? "" : ",") + a.get<std::string>();
    if (merged.attention != stored.attention) {  // another text: it stands for itself, without the options that the run's had
        Options alone = merged;
        alone.attention_options = typed.attention_options;
        if (model_json(model_config(alone, vocab_size))["attention"] != before) contradiction(typed, "attention", merged.attention, text);
    } else if (model_json(model_config(merged, vocab_size))["attention"] != before) {
        for (const auto& [name, value] : typed.attention_options)
            if (!stored.attention_options.count(name) || stored.attention_options.at(name) != value) contradiction(typed, name, value, text);
    }
}

// The options of a resumed run: those of its config.json, and over them what was typed, if the losses do not depend on it.
inline Options resumed_options(const Options& typed) {
    Options stored = read_run_options(typed.out), merged = stored;
    merged.command = typed.command;
    merged.given = typed.given;
    apply_given(merged);
    for (const OptionSpec& s : option_specs())
        if (s.role != Role::FREE && typed.is_given(s.name) && s.name != std::string("attention") && s.name != std::string("tokenizer") &&
            option_json(merged, s) != option_json(stored, s))
            contradiction(typed, s.name, option_text(merged, s), option_text(stored, s));
    check_attention(typed, stored, merged);
    merged.attention = stored.attention;
    merged.attention_options = stored.attention_options;
    resolve_options(merged);
    if (merged.steps != stored.steps && merged.schedule != "constant")
        printf("the %s schedule now ends at step %lld; it was made for %lld\n", merged.schedule.c_str(), (long long)merged.steps, (long long)stored.steps);
    return merged;
}

// --init-from: the model's shape is the file's. What was typed must say the same.
inline void take_shape(Options& o, const ModelFile& m) {
    const ModelConfig& c = m.config;
    struct {
        const char* name;
        int64_t Options::*field;
        int Preset::*preset;
        int has;
    } numbers[] = {{"layers", &Options::layers, &Preset::layers, c.layers},
                   {"heads", &Options::heads, &Preset::heads, c.heads},
                   {"channels", &Options::channels, &Preset::channels, c.channels},
                   {"max-seq", &Options::max_seq, &Preset::max_seq, c.max_seq}};
    for (const auto& n : numbers) {
        if (o.*n.field == AUTOMATIC && o.is_given("preset") && find_preset(o.preset).*n.preset != n.has)
            usage_error("--preset %s contradicts '%s', which has %s %d instead of %d: leave it out", o.preset.c_str(), m.path.c_str(), n.name, n.has,
                        find_preset(o.preset).*n.preset);
        if (o.*n.field != AUTOMATIC && o.*n.field != n.has)
            usage_error("--%s %lld contradicts '%s', which has %d: leave it out", n.name, (long long)(o.*n.field), m.path.c_str(), n.has);
        o.*n.field = n.has;
    }
    nlohmann::json shape = model_json(c);
    std::string attention, positions = shape["positions"];
    bool uniform = std::set<nlohmann::json>(shape["attention"].begin(), shape["attention"].end()).size() == 1;
    for (const nlohmann::json& a : shape["attention"])
        if (!uniform || attention.empty()) attention += (attention.empty() ? "" : ",") + a.get<std::string>();
    if (!o.positions.empty() && o.positions != positions)
        usage_error("--positions %s contradicts '%s', which has %s: leave it out", o.positions.c_str(), m.path.c_str(), positions.c_str());
    o.positions = positions;
    if ((o.is_given("attention") || !o.attention_options.empty()) && model_json(model_config(o, c.vocab_size))["attention"] != shape["attention"])
        usage_error("--attention %s%s contradicts '%s', which has %s: leave it out", o.attention.c_str(),
                    o.attention_options.empty() ? "" : ", with its options,", m.path.c_str(), attention.c_str());
    o.attention = attention;
    o.attention_options.clear();
    if (o.is_given("preset")) return;
    o.preset = c.channels > presets[0].channels ? presets[1].name : presets[0].name;  // whose learning rate and batch size are sensible
}

inline std::string default_tokenizer(const std::string& data) {
    MappedFile file(matching_files(data)[0]);
    return is_shard(file.data, file.size) ? "ids" : "bytes";
}

inline void open_data(TrainingRun& run) {
    Options& o = run.o;
    if (run.initial && !o.tokenizer.empty()) choose_tokenizer(*run.initial, o.tokenizer);
    if (run.initial && o.tokenizer.empty()) o.tokenizer = run.initial->tokenizer.bpe ? run.initial->path : run.initial->tokenizer.name;
    // A run goes on with the vocabulary that its checkpoints have; the directory it came from may be gone.
    std::string newest = o.resume ? newest_checkpoint(o.out) : "";
    if (!newest.empty() && !o.is_given("tokenizer")) {
        RunState state = read_state(newest);
        run.tokenizer = tokenizer_of(state, newest + "/state.json");
    } else if (!o.tokenizer.empty()) {
        run.tokenizer = make_tokenizer(o.tokenizer);
    }
    if (o.data.empty()) usage_error("no data: give --data FILE, a text or token shards");
    if (o.tokenizer.empty()) run.tokenizer = make_tokenizer(o.tokenizer = default_tokenizer(o.data));
    run.train_data = open_dataset(o.data, run.tokenizer);
    if (!o.val_data.empty()) {
        run.val_data = open_dataset(o.val_data, run.tokenizer);
    } else {
        Dataset all = run.train_data;
        split_dataset(all, run.train_data, run.val_data);
    }
    LoaderOptions l;
    l.B = (int)o.batch;
    l.T = (int)o.seq;
    l.seed = (uint64_t)o.seed;
    l.shuffle = true;
    l.doc_mask = o.doc_mask;
    l.carry_memory = o.carry_memory;
    l.end_of_text = run.tokenizer.end_of_text;
    l.vocab_size = run.tokenizer.vocab_size;
    run.loader = std::make_unique<DataLoader>(run.train_data, l);

    if (run.val_data.num_tokens < 2 && o.val_every)
        data_error("%s is too short to validate on: give more data, --val-data, or --val-every 0", run.val_data.name.c_str());
    std::string questions = questions_path(o.val_data.empty() ? o.data : o.val_data);
    if (run.tokenizer.text && o.val_every && exists(questions)) run.questions = read_questions(questions, run.tokenizer);
}

inline void check_carry_memory(const ModelConfig& model) {
    std::string able;
    for (const AttentionDescription& d : attention_descriptions())
        if (d.recurrent) able += (able.empty() ? "" : ", ") + std::string(d.name);
    for (const AttentionConfig& a : model.attention)
        if (attention_description(a.name).recurrent) return;
    usage_error("--carry-memory needs a layer with a memory, '%s' has none: choose one of %s, or leave it out", model.attention[0].name.c_str(), able.c_str());
}

// A new run's state, or the state of the checkpoint that is resumed, which must be of the same model, tokenizer and data.
inline void load_state(TrainingRun& run) {
    RunState& state = run.state;
    const Options& o = run.o;
    if (!o.resume) {
        state.seed = o.seed;
        state.data_tokens = run.train_data.num_tokens;
        state.seq = o.seq;
        state.doc_mask = o.doc_mask || o.carry_memory;
        state.set_tokenizer(run.tokenizer);
        state.model = model_json(run.trainer->config);
        run.trainer->initialise((uint64_t)o.seed);
        if (run.initial) load_weights(*run.initial, *run.trainer);
        run.initial.reset();
        return;
    }
    std::string from = newest_checkpoint(o.out);
    if (from.empty()) data_error("the run in '%s' has no complete checkpoint to resume from: start it again with --overwrite", o.out.c_str());
    state = read_state(from);
    if (state.tokenizer != run.tokenizer.identity())
        usage_error("--tokenizer %s contradicts the run in '%s', which has another one: leave it out, or start another run in another --out",
                    o.tokenizer.c_str(), o.out.c_str());
    state.vocabulary = run.tokenizer.bpe;
    if (state.model != model_json(run.trainer->config))
        data_error("'%s' is a checkpoint of another model than '%s/config.json' says: name the run it belongs to", from.c_str(), o.out.c_str());
    if (state.data_tokens != run.train_data.num_tokens)
        data_error("%s has %lld tokens, the run in '%s' was training on %lld: give the same --data", run.train_data.name.c_str(),
                   (long long)run.train_data.num_tokens, o.out.c_str(), (long long)state.data_tokens);
    if (o.steps < state.step)
        usage_error("--steps %lld is behind the checkpoint's step %lld: --steps is the number of the last step", (long long)o.steps, (long long)state.step);
    load_model(from, *run.trainer);
    load_optimizer(from, *run.trainer);
    if (exists(o.out + "/matmul_plans.txt")) {
        MappedFile plans(o.out + "/matmul_plans.txt");
        run.trainer->set_matmul_plans(std::string((const char*)plans.data, plans.size));
    }
    run.saved_step = state.step;
}

inline void refuse_to_replace(const Options& o) {
    if (!o.out.empty() && !o.resume && holds_run(o.out) && !o.overwrite)
        usage_error("'%s' holds a run: continue it with --resume, replace it with --overwrite, or choose another --out", o.out.c_str());
}

// From here on the directory changes: everything else is ready.
inline void prepare_directory(TrainingRun& run) {
    const Options& o = run.o;
    if (o.out.empty()) {
        printf("without --out DIR nothing of this run is kept\n");
        return;
    }
    if (!o.resume) run.directory.claim(o.out);
    refuse_to_replace(o);  // again: another process may have started one there
    if (o.overwrite && holds_run(o.out)) run.directory.clear();
    write_run_config(o.out, o, run.trainer->config);
    run.log.open(o.out + "/log.jsonl", run.state.step);
}

// Before anything is allocated.
inline void print_plan(const Options& o, Trainer& plan) {
    const ModelConfig& c = plan.config;
    double training = 3 * model_flops(c, (double)o.seq), peak = plan.peak_flops();
    printf("model: %s, attention %s, %d layers, %d heads, %d channels, %lld parameters\n", o.init_from.empty() ? o.preset.c_str() : o.init_from.c_str(),
           o.attention.c_str(), c.layers, c.heads, c.channels, (long long)plan.parameters().size());
    printf("memory: parameters %.1f MB, gradients and moments %.1f MB, activations %.1f MB\n", plan.parameter_bytes() / 1e6, plan.gradient_bytes() / 1e6,
           plan.activation_bytes() / 1e6);
    if (peak > 0)
        printf("work: %.4g FLOPs a token (3 x forward, matrix products and the keys that are seen); utilisation is that times tokens/s over %.0f TFLOP/s\n",
               training, peak / 1e12);
    fflush(stdout);
}

inline void print_start(const TrainingRun& run) {
    const Options& o = run.o;
    printf("data: %lld tokens to train on (%lld batches of %lld x %lld an epoch), %lld to validate on, %zu questions\n", (long long)run.train_data.num_tokens,
           (long long)run.loader->batches_per_epoch(), (long long)o.batch, (long long)o.seq, (long long)run.val_data.num_tokens, run.questions.size());
    double bigram = o.val_every ? bigram_loss(run.train_data, run.val_data, run.trainer->config.vocab_size) : NAN;
    if (!std::isnan(bigram)) printf("a bigram model's validation loss: %.4f\n", bigram);
    if (run.state.step) printf("resuming from step %lld\n", (long long)run.state.step);
    fflush(stdout);
}

// ----------------------------------------------------------------------------
// Steps

// Starts an optimiser step: its batches, the update. Loss and norm of its record are not known yet.
inline StepRecord start_step(TrainingRun& run) {
    const Options& o = run.o;
    RunState& state = run.state;
    StepRecord record;
    record.step = state.step + 1;
    int64_t accumulation = o.total_batch / (o.batch * o.seq);
    Batch batch;
    for (int64_t i = 0; i < accumulation; i++) {
        Pass pass;
        pass.training = true;
        pass.grad_scale = 1.0 / (double)accumulation;
        pass.dropout = o.dropout;
        pass.seed = (uint64_t)o.seed;
        pass.step = (uint32_t)state.micro_steps++;
        run.loader->fill(state.batch_number++, batch);
        run.trainer->train(batch, pass);
    }
    record.lr = learning_rate({o.schedule, o.lr, o.min_lr, o.warmup, o.steps}, record.step);
    run.trainer->end_step({record.lr, o.beta1, o.beta2, o.eps, o.weight_decay, o.grad_clip, record.step});
    state.step = record.step;
    state.tokens += o.total_batch;
    record.tokens = state.tokens;
    return record;
}

// Waits for a step's loss and norm. Its time is the time since the step before was finished, or since this one was started (`run.clock`).
inline void finish_step(TrainingRun& run, StepRecord& record) {
    StepResult result = run.trainer->step_result();
    record.loss = result.loss;
    record.grad_norm = result.grad_norm;
    if (!std::isfinite(record.loss) || !std::isfinite(record.grad_norm))
        throw Error(EXIT_DIVERGED, format("the run diverged at step %lld: loss %g, gradient norm %g; lower --lr or raise --warmup%s", (long long)record.step,
                                          std::fabs(record.loss), record.grad_norm,
                                          run.saved_step < 0 ? "" : format(" (step %lld is the last checkpoint)", (long long)run.saved_step).c_str()));
    auto now = std::chrono::steady_clock::now();
    record.ms = std::chrono::duration<double, std::milli>(now - run.clock).count();
    record.tokens_per_s = (double)run.o.total_batch / record.ms * 1000;
    if (run.trainer->peak_flops() > 0)
        record.utilisation = 3 * model_flops(run.trainer->config, (double)run.o.seq) * record.tokens_per_s / run.trainer->peak_flops();
    run.clock = now;
    run.progress.step(record);
}

// Loss and recall, into the step's record. Without carried memory, whatever the training does: the windows are the same for every run.
inline void validate(TrainingRun& run, StepRecord& record, bool all_questions) {
    const Options& o = run.o;
    LossOptions l;
    l.seq = o.seq;
    l.rows = o.batch;
    l.max_windows = o.val_batches * o.batch;
    l.doc_mask = run.state.doc_mask;
    record.val_loss = evaluate_loss(*run.trainer, run.val_data, l).loss;
    run.progress.end_line();
    if (!std::isfinite(record.val_loss))
        throw Error(EXIT_DIVERGED, format("step %lld: the validation loss is not finite: the training diverged; lower --lr", (long long)record.step));
    printf("step %lld | validation loss %.4f", (long long)record.step, record.val_loss);
    std::vector<Question> questions = all_questions ? run.questions : question_sample(run.questions, RECALL_SAMPLE);
    std::vector<int> outcomes = answer_questions(*run.trainer, questions, o.batch * o.seq);
    RecallScore recall = total_recall(questions, outcomes);
    if (recall.asked) {
        record.recall = recall.exact();
        printf(" | recall %.1f%% of %lld (guessing: %.1f%%)", 100 * recall.exact(), (long long)recall.asked, 100 * recall.guessing());
    }
    printf("\n");
    if (all_questions && !questions.empty()) print_recall(questions, outcomes);
    fflush(stdout);
}

inline void print_sample(TrainingRun& run) {
    run.progress.end_line();
    printf("--- a sample at step %lld\n", (long long)run.state.step);
    GenerateOptions g;
    g.sampler.temperature = 0.8;
    g.seed = (uint64_t)run.o.seed;
    g.sequence = (uint32_t)run.state.step;
    g.tokens = SAMPLE_TOKENS;
    generate(*run.trainer, run.tokenizer, {run.tokenizer.end_of_text}, g, [](const std::string& text) { fputs(text.c_str(), stdout); });
    printf("\n---\n");
    fflush(stdout);
}

inline void save(TrainingRun& run) {
    if (run.o.out.empty() || run.o.save_every == 0 || run.saved_step == run.state.step) return;
    run.log.sync();
    save_checkpoint(run.o.out, *run.trainer, run.state);
    // Plans that were timed differ from run to run; cuBLASLt's own choice does not, and is made anew on another machine.
    std::string plans = run.o.tune ? run.trainer->matmul_plans() : "";
    if (!plans.empty()) write_file(run.o.out + "/matmul_plans.txt", plans);
    run.saved_step = run.state.step;
}

// A trainer that works beside the host is given steps_ahead() more steps before the result of one is asked for; before anything that stands still for the
// trainer anyway (validation, samples, checkpoints) all results are fetched.
inline void training_loop(TrainingRun& run) {
    const Options& o = run.o;
    auto due = [&](int64_t every, int64_t step) { return every > 0 && (step % every == 0 || step == o.steps); };
    std::deque<StepRecord> started;
    run.progress.start(run.state.step, o.steps);
    run.clock = std::chrono::steady_clock::now();
    while ((run.state.step < o.steps && !stop_signal()) || !started.empty()) {
        if (run.state.step < o.steps && !stop_signal()) started.push_back(start_step(run));
        int64_t step = run.state.step;
        bool validation = due(o.val_every, step), sample = due(o.sample_every, step), checkpoint = due(o.save_every, step);
        bool all = validation || sample || checkpoint || step == o.steps || stop_signal();
        while (!started.empty() && (all || (int)started.size() > run.trainer->steps_ahead())) {
            StepRecord record = started.front();
            started.pop_front();
            finish_step(run, record);
            if (validation && record.step == step) validate(run, record, step == o.steps);
            run.log.step(record);
        }
        if (sample) print_sample(run);
        if (checkpoint) save(run);
        if (all) run.clock = std::chrono::steady_clock::now();
    }
    run.progress.end_line();
    save(run);
}

inline int train(const Options& typed) {
    TrainingRun run;
    Options& o = run.o;
    if (typed.resume && typed.overwrite) usage_error("--resume and --overwrite exclude each other: give one of them");
    if (typed.resume && !typed.init_from.empty()) usage_error("--resume goes on from the run's own checkpoint: leave out --init-from");
    if ((typed.resume || typed.overwrite) && typed.out.empty())
        usage_error("--%s needs --out DIR, the directory of the run", typed.resume ? "resume" : "overwrite");
    if (typed.resume) {
        if (!exists(typed.out + "/config.json") || !holds_run(typed.out))
            data_error("there is no run in '%s' to resume: leave out --resume to start one", typed.out.c_str());
        run.directory.claim(typed.out);  // before a checkpoint is chosen: nobody may be writing one
    }
    o = typed.resume ? resumed_options(typed) : typed;
    if (!o.resume && !o.init_from.empty()) {
        run.initial = std::make_unique<ModelFile>(open_model(o.init_from));
        take_shape(o, *run.initial);
    }
    if (!o.resume) resolve_options(o);
    set_threads(o.threads);
    refuse_to_replace(o);
    model_config(o, 1);  // what was typed wrong comes before what is wrong with the files
    open_data(run);
    ModelConfig model = model_config(o, run.tokenizer.vocab_size);
    o.positions = positions_names[(int)model.positions];
    if (o.carry_memory) check_carry_memory(model);
    TrainerOptions t;
    t.max_tokens = o.batch * o.seq;
    t.lanes = o.carry_memory ? (int)o.batch : 0;
    t.dtype = o.dtype;
    t.recompute = (int)o.recompute;
    t.tune = o.tune;
    t.plan_only = true;
    print_plan(o, *make_trainer(model, t));
    t.plan_only = false;
    run.trainer = make_trainer(model, t);
    load_state(run);
    prepare_directory(run);
    print_start(run);
    catch_stop_signals();
    training_loop(run);

    if (run.state.step < o.steps) printf("stopped by a signal behind step %lld\n", (long long)run.state.step);
    if (run.saved_step >= 0) printf("checkpoint: %s\n", step_directory(o.out, run.saved_step).c_str());
    if (run.state.step < o.steps && run.saved_step >= 0) printf("continue with: %s train --out %s --resume\n", executable_name(), o.out.c_str());
    return 0;
}
