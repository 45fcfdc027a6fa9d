// Multiple choice, llm.c's format and lines of JSON: what is taken can be asked, and what is not has a reason. Questions of recall, by the way.
#include <cstdlib>

#include "attention.h"
#include "gpt2/choices.h"
#include "gpt2/evaluate.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
    static const Tokenizer bytes = make_tokenizer("bytes");
    std::vector<MultipleChoice> examples;
    std::string error;
    if (is_choices_binary(data, size)) {
        if (!parse_choices(data, size, examples, error) && error.empty()) abort();
        if (!error.empty()) return 0;
        if (examples.empty()) abort();
    } else {
        std::string_view line((const char*)data, size);
        examples.emplace_back();
        if (!parse_choice_line(line, bytes, examples[0], error)) {
            if (error.empty()) abort();
            examples.clear();
        }
        try {
            if (parse_question(line, bytes, "here").answer.empty()) abort();
        } catch (const Error&) {
        }
    }
    for (const MultipleChoice& e : examples) {
        if (e.choices.size() < 2 || e.label < 0 || e.label >= (int)e.choices.size()) abort();
        for (const std::vector<int>& c : e.choices)
            if (c.empty()) abort();
    }
    return 0;
}
