// STUB: declarations only, being written.
#pragma once
#include "common.cuh"
namespace gpu {
enum DropoutSite { DROP_EMBEDDING, DROP_ATTENTION, DROP_MLP };
// out = base + Z⊙x over (N,C); base may be null or out itself.
void dropout_add(cudaStream_t stream, floatX* out, const floatX* base, const floatX* x, const DropoutKey& key, DropoutSite site, const TokenPlace* place,
                 int64_t N, int64_t C);
}
