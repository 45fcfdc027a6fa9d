// config.json and state.json of a run, and what is not JSON as a pattern of attention layers: whatever they hold, it is taken or refused by an Error.
#include <cstdlib>

#include "attention.h"
#include "gpt2/run_directory.h"

bool trainer_on_gpu() { return true; }  // whose options are the most

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
    auto attempt = [](auto f) {
        try {
            f();
        } catch (const Error& e) {
            if (!*e.what()) abort();
        }
    };
    nlohmann::json j = nlohmann::json::parse(data, data + size, nullptr, false);
    if (!j.is_object()) {
        attempt([&] {
            ModelConfig c;
            parse_attention(c, std::string((const char*)data, size), {}, "");
            if (c.attention.size() != (size_t)c.layers) abort();
        });
        return 0;
    }
    attempt([&] {
        Options o = run_options_from_json(j, "here");
        resolve_options(o);
        model_config(o, 257);
    });
    attempt([&] {
        RunState s = state_from_json(j, "here");
        attempt([&] { tokenizer_of(s, "here"); });
        ModelConfig c = model_from_json(s.model, "here");
        if (model_json(model_from_json(model_json(c), "here")) != model_json(c)) abort();
    });
    return 0;
}
