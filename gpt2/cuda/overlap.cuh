// Launches that overlap (programmatic dependent launch, compute capability 9.0 and up).
//
// Of two kernels that follow one another on a stream the second may begin when all blocks of the first have said let_next_kernel_start() or ended. It then
// does what does not depend on the first, and calls wait_for_kernel_before(): there it stays until the first has ended and its writes can be seen. The first
// itself ended behind its own wait, so everything older is done too. Hence: nothing is written, and nothing but parameters read, before the wait.
// (If the first did not overlap what was before it, the second may also read what the first leaves alone.)
#pragma once

#include "common.cuh"

namespace gpu {

__device__ __forceinline__ void let_next_kernel_start() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}
__device__ __forceinline__ void wait_for_kernel_before() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

__global__ void overlap_probe_kernel() {}

// Whether this program has the instructions, and those for clusters: a kernel without them would not wait.
inline bool overlap_code() {
    static const bool yes = [] {
        cudaFuncAttributes attributes;
        CUDA_CHECK(cudaFuncGetAttributes(&attributes, overlap_probe_kernel));
        return device_properties().major >= 9 && attributes.ptxVersion >= 90 && attributes.binaryVersion >= 90;
    }();
    return yes;
}

// overlap: the kernel may begin before the one in front of it has ended; it calls wait_for_kernel_before(). (Not in the float32 build, which is for proofs.)
// cluster > 1: so many blocks a cluster; ask overlap_code() before.
template <class... Parameters, class... Arguments>
inline void launch_overlapping(cudaStream_t stream, bool overlap, int cluster, void (*kernel)(Parameters...), int64_t blocks, dim3 threads, size_t shared,
                               Arguments... arguments) {
    cudaLaunchAttribute attributes[2] = {};
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3((unsigned)blocks);
    config.blockDim = threads;
    config.dynamicSmemBytes = shared;
    config.stream = stream;
    config.attrs = attributes;
    if (sizeof(floatX) == 2 && overlap && overlap_code()) {
        attributes[config.numAttrs].id = cudaLaunchAttributeProgrammaticStreamSerialization;
        attributes[config.numAttrs++].val.programmaticStreamSerializationAllowed = 1;
    }
    if (cluster > 1) {
        attributes[config.numAttrs].id = cudaLaunchAttributeClusterDimension;
        attributes[config.numAttrs].val.clusterDim.x = (unsigned)cluster;
        attributes[config.numAttrs].val.clusterDim.y = 1;
        attributes[config.numAttrs++].val.clusterDim.z = 1;
    }
    allow_shared_memory(kernel, shared);
    CUDA_CHECK(cudaLaunchKernelEx(&config, kernel, (Parameters)arguments...));
}

}  // namespace gpu
