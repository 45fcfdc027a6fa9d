// Device memory of the trainer: arenas for lists of tensors, uploads of small arrays in one copy, states of sequences that are being decoded.
#pragma once

#include <cstring>
#include <string>
#include <vector>

#include "../tensors.h"
#include "common.cuh"

namespace gpu {

// Everything runs on this one stream, one behind another. It does not wait for the default stream: nothing may be launched, set or copied there.
inline cudaStream_t main_stream() {
    static const cudaStream_t stream = [] {
        cudaStream_t s;
        CUDA_CHECK(cudaStreamCreateWithFlags(&s, cudaStreamNonBlocking));
        return s;
    }();
    return stream;
}

inline void wait_for_device() { CUDA_CHECK(cudaStreamSynchronize(main_stream())); }

// As Arena (tensors.h), on the device: one block for a list of tensors, each on a 256-byte boundary; zeros. Compiled with -DARENA_DEBUG each tensor is
// allocated apart and filled with NaN, so that compute-sanitizer sees overruns between neighbours.
struct DeviceArena {
    std::vector<void*> blocks;
    size_t bytes = 0;
    bool plan_only = false;  // count the bytes, allocate nothing

    DeviceArena() = default;
    DeviceArena(const DeviceArena&) = delete;
    DeviceArena& operator=(const DeviceArena&) = delete;
    ~DeviceArena() {
        for (void* p : blocks) cudaFree(p);
    }

    void* block(size_t n) {
        bytes += n;
        if (plan_only) return nullptr;
        void* p;
        CUDA_CHECK(cudaMalloc(&p, n ? n : 1));
        blocks.push_back(p);
        CUDA_CHECK(cudaMemsetAsync(p, 0, n, main_stream()));
        return p;
    }

    // `wanted` says which tensors of the list get memory (the others a null pointer); all are float32 if `float32`, else as their specs say.
    template <class Wanted>
    void allocate(Tensors& t, bool float32, Wanted wanted) {
        std::vector<size_t> sizes;
        size_t total = 0;
        for (const TensorSpec& s : t.specs) {
            sizes.push_back(wanted(s) ? s.size() * (float32 || s.storage == Storage::FLOAT32 ? sizeof(float) : sizeof(floatX)) : 0);
            total += round_up(sizes.back(), 256);
        }
        t.data.clear();
#ifdef ARENA_DEBUG
        for (size_t n : sizes) {
            t.data.push_back(n ? block(n) : nullptr);
            if (n && !plan_only) CUDA_CHECK(cudaMemsetAsync(t.data.back(), 0xff, n, main_stream()));
        }
#else
        char* p = (char*)block(total);
        if (plan_only) return;
        for (size_t n : sizes) {
            t.data.push_back(n ? p : nullptr);
            p += round_up(n, 256);
        }
#endif
    }
    void allocate(Tensors& t, bool float32 = false) {
        allocate(t, float32, [](const TensorSpec&) { return true; });
    }
};

// A block that grows when it has to; what was in it is lost then.
struct DeviceBlock {
    char* memory = nullptr;
    int64_t size = 0;

    DeviceBlock() = default;
    DeviceBlock(const DeviceBlock&) = delete;
    DeviceBlock& operator=(const DeviceBlock&) = delete;
    ~DeviceBlock() {
        if (memory) cudaFree(memory);
    }
    // True if the block has moved.
    bool reserve(int64_t bytes) {
        if (bytes <= size) return false;
        wait_for_device();
        CUDA_CHECK(cudaFree(memory));
        memory = nullptr;
        CUDA_CHECK(cudaMalloc(&memory, bytes));
        size = bytes;
        CUDA_CHECK(cudaMemsetAsync(memory, 0xff, size, main_stream()));  // NaN: what reads scratch before it is written shows
        return true;
    }
};

// Small arrays on their way to the device, all of a pass in one copy: begin(bound on the bytes), put() ..., send(). put() returns where an array will stand.
// The same arrays in the same order stand in the same place, so that a captured graph finds them. The host's side is a ring: a pass is packed while earlier
// ones are on their way.
class Upload {
    static constexpr int RING = 4;
    char* host[RING] = {};
    cudaEvent_t sent[RING] = {};
    int64_t capacity = 0, used = 0;
    int turn = 0;
    DeviceBlock device;

 public:
    Upload() = default;
    Upload(const Upload&) = delete;
    Upload& operator=(const Upload&) = delete;
    ~Upload() {
        for (char* p : host) cudaFreeHost(p);
        for (cudaEvent_t e : sent)
            if (e) cudaEventDestroy(e);
    }

    void begin(int64_t bytes) {
        if (bytes > capacity) {
            wait_for_device();
            capacity = round_up(bytes + bytes / 4, 4096);
            for (char*& p : host) {
                CUDA_CHECK(cudaFreeHost(p));
                CUDA_CHECK(cudaMallocHost(&p, capacity));
            }
            device.reserve(capacity);
        }
        for (cudaEvent_t& e : sent)
            if (!e) CUDA_CHECK(cudaEventCreateWithFlags(&e, cudaEventDisableTiming));
        turn = (turn + 1) % RING;
        CUDA_CHECK(cudaEventSynchronize(sent[turn]));
        used = 0;
    }
    template <class T>
    T* put(const T* values, int64_t n) {
        int64_t bytes = n * (int64_t)sizeof(T), at = used;
        used += round_up(bytes, 16);
        assert(used <= capacity);
        if (n) memcpy(host[turn] + at, values, bytes);
        return (T*)(device.memory + at);
    }
    template <class T>
    T* put(const std::vector<T>& values) {
        return put(values.data(), (int64_t)values.size());
    }
    void send() {
        CUDA_CHECK(cudaMemcpyAsync(device.memory, host[turn], used, cudaMemcpyHostToDevice, main_stream()));
        CUDA_CHECK(cudaEventRecord(sent[turn], main_stream()));
    }
    const char* place() const { return device.memory; }
    const char* end() const { return device.memory + used; }  // where the next array will stand
};

// For StatePool (gpt2/state.h).
struct DeviceMemory {
    static void* allocate(size_t bytes) {
        void* p;
        CUDA_CHECK(cudaMalloc(&p, bytes ? bytes : 1));
        return p;
    }
    static void release(void* p) { cudaFree(p); }
    static void copy(void* to, const void* from, size_t bytes) { CUDA_CHECK(cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToDevice, main_stream())); }
    static void zero(void* p, size_t bytes) { CUDA_CHECK(cudaMemsetAsync(p, 0, bytes, main_stream())); }

    // One range of addresses, `capacity` bytes long, that grow() gives memory, from its beginning on. What stands there stays where it is.
    class Range {
        static constexpr size_t PIECE = 64 << 20;  // a multiple of what can be mapped
        size_t capacity, size = 0;
        std::vector<CUmemGenericAllocationHandle> pieces;

        static void check(const char* name, CUresult status) {
            if (status == CUDA_ERROR_OUT_OF_MEMORY) data_error("no GPU memory is left for decode states: give fewer --pages or a smaller --parallel");
            if (status != CUDA_SUCCESS) data_error("%s failed with the driver's error %d: restart the program, or see what nvidia-smi says", name, (int)status);
        }

     public:
        char* base = nullptr;
        explicit Range(size_t bytes) : capacity(round_up(bytes, PIECE)) {
            CUdeviceptr p = 0;
            if (capacity) check("cuMemAddressReserve", DRIVER_FUNCTION(cuMemAddressReserve)(&p, capacity, 0, 0, 0));
            base = (char*)p;
        }
        ~Range() {
            if (size) DRIVER_FUNCTION(cuMemUnmap)((CUdeviceptr)base, size);
            for (CUmemGenericAllocationHandle h : pieces) DRIVER_FUNCTION(cuMemRelease)(h);
            if (base) DRIVER_FUNCTION(cuMemAddressFree)((CUdeviceptr)base, capacity);
        }
        Range(const Range&) = delete;
        Range& operator=(const Range&) = delete;
        void grow(size_t bytes) {
            assert(bytes <= capacity);
            while (size < bytes) {
                CUmemAllocationProp kind{};
                kind.type = CU_MEM_ALLOCATION_TYPE_PINNED;
                kind.location.type = CU_MEM_LOCATION_TYPE_DEVICE;
                CUDA_CHECK(cudaGetDevice(&kind.location.id));
                CUmemGenericAllocationHandle piece;
                check("cuMemCreate", DRIVER_FUNCTION(cuMemCreate)(&piece, PIECE, &kind, 0));
                pieces.push_back(piece);
                CUdeviceptr at = (CUdeviceptr)base + size;
                check("cuMemMap", DRIVER_FUNCTION(cuMemMap)(at, PIECE, 0, piece, 0));
                size += PIECE;
                CUmemAccessDesc access{};
                access.location = kind.location;
                access.flags = CU_MEM_ACCESS_FLAGS_PROT_READWRITE;
                check("cuMemSetAccess", DRIVER_FUNCTION(cuMemSetAccess)(at, PIECE, &access, 1));
            }
        }
    };
};

}  // namespace gpu
