// What all CUDA files share: the working type, errors, scratch memory, 16-byte vectors, sums over a warp and over a block, dropout's counters.
//
// Storage is floatX: bfloat16, or float32 in a build with -DGPU_FLOAT32. Every sum, statistic and exponential is float32; parameter gradients, master weights,
// moments and recurrent memories are stored as float32. Kernels take one stream, never allocate, never wait, and use no floating-point atomics: the same
// call gives the same bits.
#pragma once

#include <cuda.h>
#include <cuda_bf16.h>
#include <cuda_runtime.h>
#include <nvtx3/nvToolsExt.h>

#include <cassert>
#include <cmath>
#include <cstdint>
#include <initializer_list>
#include <map>
#include <tuple>

#include "../error.h"
#include "../philox.h"

#ifdef GPU_FLOAT32
#define gpu gpu_float32  // both builds of everything stand in one program
#endif

#define CUDA_CHECK(call) ::gpu::cuda_check((call), #call, __FILE__, __LINE__)
#define LAUNCH_CHECK() CUDA_CHECK(cudaGetLastError())  // behind every kernel launch

namespace gpu {

#ifdef GPU_FLOAT32
using floatX = float;
constexpr const char* dtype_name = "float32";
#else
using floatX = __nv_bfloat16;
constexpr const char* dtype_name = "bf16";
#endif

inline void cuda_check(cudaError_t status, const char* what, const char* file, int line) {
    if (status == cudaSuccess) return;
    data_error("CUDA: %s (%s, %s:%d)", cudaGetErrorString(status), what, file, line);
}

inline const cudaDeviceProp& device_properties() {
    static const cudaDeviceProp properties = [] {
        cudaDeviceProp p;
        int device;
        CUDA_CHECK(cudaGetDevice(&device));
        CUDA_CHECK(cudaGetDeviceProperties(&p, device));
        return p;
    }();
    return properties;
}

// A function of the driver. libcuda is not linked: programs start on machines without a GPU too.
inline void* driver_function(const char* name) {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult result;
#if CUDART_VERSION >= 12050
    CUDA_CHECK(cudaGetDriverEntryPointByVersion(name, &function, 12000, cudaEnableDefault, &result));
#else
    CUDA_CHECK(cudaGetDriverEntryPoint(name, &function, cudaEnableDefault, &result));
#endif
    if (!function) data_error("the driver has no %s: install one for CUDA 12 or later", name);
    return function;
}
#define DRIVER_FUNCTION(name) ((decltype(&name))::gpu::driver_function(#name))

// More than 48 KB of shared memory a block must be asked for, kernel by kernel.
template <class Kernel>
inline void allow_shared_memory(Kernel* kernel, size_t bytes) {
    if (bytes > 48 << 10) CUDA_CHECK(cudaFuncSetAttribute((const void*)kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)bytes));
}

// How many blocks of a kernel the GPU runs at the same time. Asked once for each kernel and size.
template <class Kernel>
inline int64_t resident_blocks(Kernel* kernel, int threads, size_t shared_bytes) {
    static std::map<std::tuple<const void*, int, size_t>, int> known;
    int& blocks = known[{(const void*)kernel, threads, shared_bytes}];
    if (blocks == 0) {
        allow_shared_memory(kernel, shared_bytes);
        CUDA_CHECK(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kernel, threads, shared_bytes));
        assert(blocks > 0);
    }
    return (int64_t)blocks * device_properties().multiProcessorCount;
}

// A range in the timeline of Nsight Systems: NvtxRange range("mlp forward");
struct NvtxRange {
    explicit NvtxRange(const char* name) { nvtxRangePushA(name); }
    ~NvtxRange() { nvtxRangePop(); }
    NvtxRange(const NvtxRange&) = delete;
};

HOST_DEVICE constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
HOST_DEVICE constexpr int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

// Scratch memory is taken from the front of one block. A copy of the struct gives back at the end of its scope what was taken from the copy.
struct Scratch {
    char* memory = nullptr;
    int64_t size = 0;  // bytes
    template <class T>
    T* take(int64_t n) {
        int64_t bytes = round_up(n * (int64_t)sizeof(T), 256);
        assert(bytes <= size);
        T* p = (T*)memory;
        memory += bytes;
        size -= bytes;
        return p;
    }
};

// One block that every function may use within its own launches, for partial sums and for cuBLASLt: all run on one stream, one behind another.
constexpr int64_t WORKSPACE_BYTES = 64 << 20;
inline char* workspace() {
    static char* const memory = [] {
        void* p;
        CUDA_CHECK(cudaMalloc(&p, WORKSPACE_BYTES));
        return (char*)p;
    }();
    return memory;
}

inline int64_t scratch_bytes(std::initializer_list<int64_t> takes) {  // what Scratch needs for takes of so many bytes each
    int64_t total = 0;
    for (int64_t n : takes) total += round_up(n, 256);
    return total;
}

// ---- numbers -------------------------------------------------------------------------------------------------------------------------------------------

__device__ inline float to_float(float x) { return x; }
__device__ inline float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
template <class T>
__device__ inline T from_float(float x);
template <>
__device__ inline float from_float<float>(float x) {
    return x;
}
template <>
__device__ inline __nv_bfloat16 from_float<__nv_bfloat16>(float x) {
    return __float2bfloat16_rn(x);
}

// 16 bytes, which one thread reads or writes in one instruction; the address must be a multiple of 16.
template <class T>
struct alignas(16) Packed {
    static constexpr int size = 16 / sizeof(T);
    T v[size];
    __device__ float operator[](int i) const { return to_float(v[i]); }
    __device__ void set(int i, float x) { v[i] = from_float<T>(x); }
};
template <class T>
__device__ inline Packed<T> load_packed(const T* p) {
    int4 bits = *(const int4*)p;
    return *(Packed<T>*)&bits;
}
template <class T>
__device__ inline void store_packed(T* p, const Packed<T>& x) {
    *(int4*)p = *(const int4*)&x;
}
// The same for data that is not wanted in the caches afterwards.
template <class T>
__device__ inline Packed<T> load_packed_streaming(const T* p) {
    int4 bits = __ldcs((const int4*)p);
    return *(Packed<T>*)&bits;
}
template <class T>
__device__ inline void store_packed_streaming(T* p, const Packed<T>& x) {
    __stcs((int4*)p, *(const int4*)&x);
}
inline bool aligned16(const void* p) { return (uintptr_t)p % 16 == 0; }

// ---- sums and maxima: always in the same order ------------------------------------------------------------------------------------------------------------

__device__ inline float warp_sum(float x) {
    for (int offset = 16; offset > 0; offset /= 2) x += __shfl_xor_sync(0xffffffff, x, offset);
    return x;
}
__device__ inline float warp_max(float x) {
    for (int offset = 16; offset > 0; offset /= 2) x = fmaxf(x, __shfl_xor_sync(0xffffffff, x, offset));
    return x;
}
// Over all threads of a one-dimensional block of whole warps; every thread gets the result. Each call needs its own `shared` (32 floats), or a
// __syncthreads() before it is used again.
__device__ inline float block_sum(float x, float* shared) {
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
    x = warp_sum(x);
    if (lane == 0) shared[warp] = x;
    __syncthreads();
    return warp_sum(lane < warps ? shared[lane] : 0);
}
__device__ inline float block_max(float x, float* shared) {
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
    x = warp_max(x);
    if (lane == 0) shared[warp] = x;
    __syncthreads();
    return warp_max(lane < warps ? shared[lane] : -INFINITY);
}

// ---- dropout: the same Philox counters as on the CPU (gpt2/cpu/layers.h) -----------------------------------------------------------------------------------

// What changes from step to step stands in device memory, so that a captured graph can be replayed.
struct PassCounters {
    uint32_t step;      // Pass::step
    int64_t first_row;  // Batch::first_row
};
struct DropoutKey {
    double p = 0;  // 0: no dropout; host code asks this
    uint64_t seed = 0;
    uint32_t threshold = 0;  // keep a weight iff its random word >= threshold = p·2³², and scale it by 1/(1−p)
    float scale = 1;
    uint32_t layer = 0, layers = 1;
    const PassCounters* pass = nullptr;  // device memory
    __device__ uint32_t counter() const { return pass->step * layers + layer; }
};
inline DropoutKey dropout_key(double p, uint64_t seed, int layer, int layers, const PassCounters* pass) {
    return {p, seed, (uint32_t)(p * 4294967296.0), (float)(1 / (1 - p)), (uint32_t)layer, (uint32_t)layers, pass};
}

// ---- what attention layers are handed -----------------------------------------------------------------------------------------------------------------------

// Where a row of the batch stands: in which sequence, and at which position of it.
struct TokenPlace {
    int seq, pos;
};

// The rows of one network layer in all pages of the pool, known to the host: a tensor (pages, page_size, per_token) with strides (page_stride, per_token, 1).
struct StatePages {
    const floatX* rows = nullptr;  // in page 0; null: not known
    int64_t pages = 0, page_stride = 0, per_token = 0;
    int page_size = 0;
};

// One sequence's decode state in one network layer (device memory): a block of constant size, always float32, all zeros for an empty sequence; and one row
// of floatX a token in pages of a pool that is one range of memory.
struct AttentionState {
    int64_t length;         // rows in it, before those that extend() appends now, which have been allocated
    float* fixed;           // AttentionStateSize::per_sequence numbers
    floatX* rows;           // this network layer's rows in page 0 of the pool
    const int* page_table;  // row j is in page page_table[j / page_size]; entries behind the last page needed may be anything
    int64_t page_stride;    // numbers from a page of the pool to the next
    int page_size;          // rows of a page
    int64_t per_token;      // AttentionStateSize::per_token: the length of a row
    __device__ floatX* row(int64_t j) const { return rows + page_table[j / page_size] * page_stride + j % page_size * per_token; }
};

}  // namespace gpu
