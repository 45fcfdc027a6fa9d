// The ladder's common harness: every version of a kernel family checked against the CPU code, and timed against the limits of the machine.
//
//     ./attention_forward              check and time all versions       ./attention_forward 3    version 3 alone
//     ./attention_forward --check      check only (for compute-sanitizer)
//
// A ladder file makes its inputs with random_numbers(), computes the reference with the CPU's own functions, and calls
//     ladder.check(shape, outputs, run)      run(version) launches on ladder.stream; false: this version does not do this shape
//     ladder.time(shape, work, run)
// Outputs are poisoned before each check (NaN), or start from given numbers where a kernel accumulates. Times are medians of runs with a cold L2 cache.
// "limit" is the time that the work's bytes take at this machine's copy bandwidth or its FLOPs at its matrix rate, the larger, both measured in the same run.
#pragma once

#include <cublasLt.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <string>
#include <vector>

#include "../../attention.h"
#include "../../gpt2/cuda/common.cuh"

// ---- numbers on both sides -----------------------------------------------------------------------------------------------------------------------------

inline float round_to_working_type(float x) {
#ifdef GPU_FLOAT32
    return x;
#else
    return __bfloat162float(__float2bfloat16_rn(x));
#endif
}

// n normal numbers, rounded to the working type so that CPU and GPU see the same; a function of `seed` alone.
inline std::vector<float> random_numbers(int64_t n, uint64_t seed, double std = 1, double mean = 0) {
    std::vector<float> x(n);
    for (int64_t i = 0; i < n; i += 2) {
        Philox r = philox(seed, (uint32_t)i, (uint32_t)(i >> 32), 0, 0x4c414444);
        double a, b;
        philox_normal(r.word[0], r.word[1], &a, &b);
        x[i] = round_to_working_type((float)(mean + std * a));
        if (i + 1 < n) x[i + 1] = round_to_working_type((float)(mean + std * b));
    }
    return x;
}

inline void convert(float x, float& y) { y = x; }
inline void convert(float x, __nv_bfloat16& y) { y = __float2bfloat16_rn(x); }
inline float host_float(float x) { return x; }
inline float host_float(__nv_bfloat16 x) { return __bfloat162float(x); }
inline float host_float(int x) { return (float)x; }

// Device memory that lives as long as this object.
template <class T>
struct DeviceArray {
    T* data = nullptr;
    int64_t size = 0;
    explicit DeviceArray(int64_t n = 0) : size(n) {
        CUDA_CHECK(cudaMalloc(&data, std::max<int64_t>(n, 1) * sizeof(T)));
        CUDA_CHECK(cudaMemset(data, 0xff, std::max<int64_t>(n, 1) * sizeof(T)));
    }
    template <class H>
    explicit DeviceArray(const std::vector<H>& host) : DeviceArray((int64_t)host.size()) {
        copy_from(host);
    }
    ~DeviceArray() { cudaFree(data); }
    DeviceArray(const DeviceArray&) = delete;
    DeviceArray& operator=(const DeviceArray&) = delete;
    operator T*() const { return data; }

    template <class H>
    void copy_from(const std::vector<H>& host) {
        assert((int64_t)host.size() == size);
        std::vector<T> x(host.size());
        for (size_t i = 0; i < host.size(); i++) {
            if constexpr (std::is_same_v<H, float>)
                convert(host[i], x[i]);
            else
                x[i] = host[i];
        }
        CUDA_CHECK(cudaMemcpy(data, x.data(), size * sizeof(T), cudaMemcpyHostToDevice));
    }
    std::vector<float> to_host() const {
        std::vector<T> x(size);
        CUDA_CHECK(cudaMemcpy(x.data(), data, size * sizeof(T), cudaMemcpyDeviceToHost));
        std::vector<float> y(size);
        for (int64_t i = 0; i < size; i++) y[i] = host_float(x[i]);
        return y;
    }
};

// ---- the harness -------------------------------------------------------------------------------------------------------------------------------------------

// Empties the L2 cache of what may be read; the result is of no use, but the compiler does not know that it is never wanted.
__global__ void read_kernel(const int4* __restrict__ x, int64_t n, int* result) {
    int bits = 0;
    for (int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x; i < n; i += (int64_t)gridDim.x * blockDim.x) {
        int4 v = x[i];
        bits |= v.x ^ v.y ^ v.z ^ v.w;
    }
    if (bits == 0x5eed5eed) *result = bits;
}

// What a version writes, and what it should have written: ‖out − reference‖ <= tolerance·‖reference‖ + absolute·√n. NaN never passes.
struct Output {
    std::string name;
    std::vector<float> reference;
    std::function<std::vector<float>()> read;
    std::function<void()> prepare;  // poison, or the numbers that the kernel adds to
    double tolerance, absolute;
};

#ifdef GPU_FLOAT32
constexpr double TOLERANCE = 2e-5;
#else
constexpr double TOLERANCE = 1e-2;  // bf16 has 8 bits: 2e-3 from rounding a result once, the rest for intermediate results
#endif

template <class T>
inline Output output(const std::string& name, DeviceArray<T>& device, const std::vector<float>& reference, double tolerance = TOLERANCE,
                     double absolute = 1e-6) {
    return {name,      reference, [&device] { return device.to_host(); }, [&device] { CUDA_CHECK(cudaMemset(device.data, 0xff, device.size * sizeof(T))); },
            tolerance, absolute};
}
// For a kernel that adds to what is there: `initial` beforehand.
template <class T>
inline Output accumulated(const std::string& name, DeviceArray<T>& device, const std::vector<float>& initial, const std::vector<float>& reference,
                          double tolerance = TOLERANCE, double absolute = 1e-6) {
    return {name, reference, [&device] { return device.to_host(); }, [&device, initial] { device.copy_from(initial); }, tolerance, absolute};
}

struct Work {
    double flops, bytes;  // that must be done at least: each input read once, each output written once
};

class Ladder {
 public:
    cudaStream_t stream;

    // `versions`: what each version is, from 1.
    Ladder(const char* family, std::vector<const char*> versions, int argc, char** argv) : family(family), versions(std::move(versions)) {
        for (int i = 1; i < argc; i++) {
            if (!strcmp(argv[i], "--check"))
                timing = false;
            else if ((only = atoi(argv[i])) < 1)
                fprintf(stderr, "error: unknown argument '%s': give a version from 1 to %zu, or --check\n", argv[i], this->versions.size()), exit(EXIT_USAGE);
        }
        int devices = 0;
        if (cudaGetDeviceCount(&devices) != cudaSuccess || devices == 0)
            fprintf(stderr, "error: no CUDA device: run this on a machine with one\n"), exit(EXIT_DATA);
        CUDA_CHECK(cudaStreamCreate(&stream));
        if (only > (int)this->versions.size()) fprintf(stderr, "%s has no version %d\n", family, only);  // another family of the same program may
        printf("### %s\n\n", family);
        for (size_t v = 0; v < this->versions.size(); v++) printf("%zu. %s\n", v + 1, this->versions[v]);
        printf("\n");
    }

    bool wanted(int version) const { return only == 0 || version == only; }

    void check(const std::string& shape, std::vector<Output> outputs, const std::function<bool(int)>& run) {
        for (int v = 1; v <= (int)versions.size(); v++) {
            if (!wanted(v)) continue;
            for (Output& o : outputs) o.prepare();
            CUDA_CHECK(cudaDeviceSynchronize());
            if (!run(v)) continue;
            LAUNCH_CHECK();
            CUDA_CHECK(cudaDeviceSynchronize());
            std::vector<std::vector<float>> first;
            for (Output& o : outputs) {
                std::vector<float> out = o.read();
                double difference = 0, norm = 0;
                for (size_t i = 0; i < o.reference.size(); i++) {
                    double a = out[i], b = o.reference[i];
                    // An expected infinity (the lse of a row without keys) must be there exactly.
                    if (std::isinf(b) && a == b) continue;
                    difference += (a - b) * (a - b);
                    norm += b * b;
                }
                difference = std::sqrt(difference);
                norm = std::sqrt(norm);
                bool ok = out.size() == o.reference.size() && difference <= o.tolerance * norm + o.absolute * std::sqrt((double)out.size());
                if (!ok || !quiet)
                    printf("check %s %d %s: %s ‖Δ‖/‖ref‖ %.2e (%.0e) %s\n", family, v, shape.c_str(), o.name.c_str(), norm > 0 ? difference / norm : difference,
                           o.tolerance, ok ? "ok" : "FAIL");
                ok ? passed++ : failed++;
                first.push_back(std::move(out));
            }
            // Once more: the same bits.
            for (Output& o : outputs) o.prepare();
            CUDA_CHECK(cudaDeviceSynchronize());
            run(v);
            CUDA_CHECK(cudaDeviceSynchronize());
            for (size_t k = 0; k < outputs.size(); k++) {
                std::vector<float> again = outputs[k].read();
                bool same = memcmp(again.data(), first[k].data(), again.size() * sizeof(float)) == 0;
                if (!same) printf("check %s %d %s: %s differs from run to run FAIL\n", family, v, shape.c_str(), outputs[k].name.c_str());
                same ? passed++ : failed++;
            }
        }
        fflush(stdout);
    }

    // For each version: a line of a Markdown table. run(version) is called some 30 times.
    void time(const std::string& shape, const Work& work, const std::function<bool(int)>& run) {
        if (!timing) return;
        measure_limits();
        if (!header) printf("\n| shape | version | µs (10 %%–90 %%) | TFLOP/s | GB/s | %% of limit |\n| --- | --- | --- | --- | --- | --- |\n");
        header = true;
        for (int v = 1; v <= (int)versions.size(); v++) {
            if (!wanted(v)) continue;
            if (!run(v)) continue;
            CUDA_CHECK(cudaDeviceSynchronize());
            std::vector<double> us = measure([&] { run(v); });
            double median = us[us.size() / 2], limit = std::max(work.flops / (matmul_tflops * 1e6), work.bytes / (copy_gbs * 1e3));
            printf("| %s | %d | %.1f (%.1f–%.1f) | %.1f | %.0f | %.0f |\n", shape.c_str(), v, median, us[us.size() / 10], us[us.size() * 9 / 10],
                   work.flops / median / 1e6, work.bytes / median / 1e3, 100 * limit / median);
        }
        fflush(stdout);
    }

    int finish() {
        printf("\n%s: %d passed, %d failed\n", family, passed, failed);
        return failed ? 1 : 0;
    }

 private:
    const char* family;
    std::vector<const char*> versions;
    int only = 0, passed = 0, failed = 0;
    bool timing = true, header = false, quiet = getenv("LADDER_QUIET") != nullptr;
    double copy_gbs = 0, matmul_tflops = 0;
    char* flush = nullptr;

    // Empties the L2 cache: what the timed work reads comes from memory. First by writing; but of what is written last some 30 MB stay in the cache and wait to
    // be written back, in the timed work's time: 10 µs that are not its own, a fifth of a small kernel, while the copy of 1 GiB that it is held against hardly
    // feels them. So then by reading other memory: the cache is full of lines that need only be dropped. (What the timed work leaves unwritten in its turn is
    // not in its time: a kernel that writes little more than the cache holds may come out ahead of the copy.)
    void empty_cache() {
        constexpr size_t bytes = 256 << 20;  // larger than any L2 cache
        if (!flush) {
            CUDA_CHECK(cudaMalloc(&flush, 2 * bytes));
            CUDA_CHECK(cudaMemset(flush, 0, 2 * bytes));
        }
        CUDA_CHECK(cudaMemsetAsync(flush, 0, bytes, stream));
        read_kernel<<<1024, 512, 0, stream>>>((const int4*)(flush + bytes), bytes / sizeof(int4), (int*)flush);
        LAUNCH_CHECK();
    }

    // Sorted microseconds.
    std::vector<double> measure(const std::function<void()>& f) {
        cudaEvent_t begin, end;
        CUDA_CHECK(cudaEventCreate(&begin));
        CUDA_CHECK(cudaEventCreate(&end));
        std::vector<double> us;
        double total = 0;
        for (int i = 0; i < 30 && (total < 3e5 || i < 5); i++) {
            empty_cache();
            CUDA_CHECK(cudaEventRecord(begin, stream));
            f();
            CUDA_CHECK(cudaEventRecord(end, stream));
            CUDA_CHECK(cudaEventSynchronize(end));
            float ms;
            CUDA_CHECK(cudaEventElapsedTime(&ms, begin, end));
            total += ms * 1e3;
            if (i >= 2 || total > 3e5) us.push_back(ms * 1e3);
        }
        CUDA_CHECK(cudaEventDestroy(begin));
        CUDA_CHECK(cudaEventDestroy(end));
        std::sort(us.begin(), us.end());
        return us;
    }

    // Copying 1 GiB, and a bf16 product of 8192³ through cuBLASLt's first choice, random numbers.
    void measure_limits() {
        if (copy_gbs > 0) return;
        constexpr int64_t bytes = 1 << 30, n = 8192;
        char *a, *b;
        CUDA_CHECK(cudaMalloc(&a, bytes));
        CUDA_CHECK(cudaMalloc(&b, bytes));
        std::vector<float> x = random_numbers(n * n / 16, 1);
        std::vector<__nv_bfloat16> bits(x.size());
        for (size_t i = 0; i < x.size(); i++) bits[i] = __float2bfloat16_rn(x[i]);
        for (int64_t i = 0; i < bytes; i += n * n / 8) CUDA_CHECK(cudaMemcpy(a + i, bits.data(), n * n / 8, cudaMemcpyHostToDevice));
        CUDA_CHECK(cudaMemcpy(b, a, bytes, cudaMemcpyDeviceToDevice));
        std::vector<double> us = measure([&] { cudaMemcpyAsync(b, a, bytes, cudaMemcpyDeviceToDevice, stream); });
        copy_gbs = 2.0 * bytes / us[us.size() / 2] / 1e3;

        cublasLtHandle_t lt;
        cublasLtMatmulDesc_t desc;
        cublasLtMatrixLayout_t layout;
        cublasLtMatmulPreference_t preference;
        cublasLtMatmulHeuristicResult_t result;
        size_t workspace = 32 << 20;
        int found = 0;
        float one = 1, zero = 0;
        void* w;
        CUDA_CHECK(cudaMalloc(&w, workspace));
        cublasOperation_t transpose = CUBLAS_OP_T;
        bool ok =
            cublasLtCreate(&lt) == CUBLAS_STATUS_SUCCESS && cublasLtMatmulDescCreate(&desc, CUBLAS_COMPUTE_32F, CUDA_R_32F) == CUBLAS_STATUS_SUCCESS &&
            cublasLtMatmulDescSetAttribute(desc, CUBLASLT_MATMUL_DESC_TRANSA, &transpose, sizeof transpose) == CUBLAS_STATUS_SUCCESS &&
            cublasLtMatrixLayoutCreate(&layout, CUDA_R_16BF, n, n, n) == CUBLAS_STATUS_SUCCESS &&
            cublasLtMatmulPreferenceCreate(&preference) == CUBLAS_STATUS_SUCCESS &&
            cublasLtMatmulPreferenceSetAttribute(preference, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, &workspace, sizeof workspace) == CUBLAS_STATUS_SUCCESS &&
            cublasLtMatmulAlgoGetHeuristic(lt, desc, layout, layout, layout, layout, preference, 1, &result, &found) == CUBLAS_STATUS_SUCCESS && found > 0;
        if (!ok) data_error("cuBLASLt cannot be used to measure the matrix rate");
        us = measure(
            [&] { cublasLtMatmul(lt, desc, &one, a, layout, a + (bytes / 4), layout, &zero, b, layout, b, layout, &result.algo, w, workspace, stream); });
        matmul_tflops = 2.0 * n * n * n / us[us.size() / 2] / 1e6;
        cublasLtMatmulPreferenceDestroy(preference);
        cublasLtMatrixLayoutDestroy(layout);
        cublasLtMatmulDescDestroy(desc);
        cublasLtDestroy(lt);
        for (void* p : {(void*)a, (void*)b, w}) CUDA_CHECK(cudaFree(p));
        for (int i = 0; i < 300; i++) empty_cache();  // 50 ms: after the products clocks take some time to settle
        CUDA_CHECK(cudaStreamSynchronize(stream));
        printf("\nlimits of %s: copy %.0f GB/s, bf16 matrix product %.0f TFLOP/s\n", gpu::device_properties().name, copy_gbs, matmul_tflops);
    }
};
