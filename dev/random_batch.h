// What benchmarks train on.
#pragma once

#include "../gpt2/philox.h"
#include "../gpt2/trainer.h"

// B sequences of T tokens, and as many targets, all random.
inline Batch random_batch(int B, int T, int vocab_size) {
    Batch batch;
    for (int i = 0; i < B * T; i++) {
        Philox r = philox(1, i, 0, 0, 0);
        batch.tokens.push_back(r.word[0] % vocab_size);
        batch.targets.push_back(r.word[1] % vocab_size);
    }
    for (int b = 0; b <= B; b++) batch.cu_seqlens.push_back(b * T);
    return batch;
}
