// For the ladders of AdamW and of the global norm: whole models as lists of parameters, on the CPU (cpu::Gpt2, the reference) and on the device.
#pragma once

#define GPT2_NO_MAIN
#include "ladder.h"

#include "../../gpt2/cuda/adamw.cuh"
#include "../../train_gpt2.cpp"

inline ModelConfig model_config(int layers, int heads, int channels, int vocabulary, int max_seq, const char* attention) {
    ModelConfig c;
    c.layers = layers;
    c.heads = heads;
    c.channels = channels;
    c.max_seq = max_seq;
    c.set_vocab(vocabulary);
    parse_attention(c, attention, {}, "");
    return c;
}
inline ModelConfig gpt2_124M() { return model_config(12, 12, 768, 50257, 1024, "causal"); }

// Where each tensor of the list stands in one array: at multiples of `alignment` numbers.
struct Layout {
    std::vector<int64_t> begin;
    int64_t size = 0;
    Layout(const Tensors& t, int64_t alignment) {
        for (const TensorSpec& s : t.specs) {
            begin.push_back(gpu::round_up(size, alignment));
            size = begin.back() + s.size();
        }
    }
    // The list with its data in such an array.
    template <class T>
    Tensors bind(Tensors t, T* array) const {
        t.data.clear();
        for (int64_t b : begin) t.data.push_back(array + b);
        return t;
    }
    // A section of the CPU's model as such an array, with 7 in the gaps.
    std::vector<float> section(cpu::Gpt2& model, Section s) const {
        std::vector<float> array(size, 7);
        for (size_t i = 0; i < begin.size(); i++) model.get(s, (int)i, &array[begin[i]]);
        return array;
    }
};

// Random numbers of this size in a whole section; squares of them for the second moment.
inline void randomise(cpu::Gpt2& model, Section section, uint64_t seed, float size) {
    for (size_t i = 0; i < model.parameters().specs.size(); i++) {
        std::vector<float> x = random_numbers(model.parameters().specs[i].size(), seed + 100 * i);
        for (float& v : x) v = section == Section::MOMENT2 ? size * v * v : size * v;
        model.set(section, (int)i, x.data());
    }
}

// `some` again and again.
inline void fill(DeviceArray<float>& array, const std::vector<float>& some) {
    DeviceArray<float> d_some(some);
    for (int64_t i = 0; i < array.size; i += d_some.size)
        CUDA_CHECK(cudaMemcpy(array + i, d_some, std::min(d_some.size, array.size - i) * sizeof(float), cudaMemcpyDeviceToDevice));
}
