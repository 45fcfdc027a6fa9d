// Times of many launches that follow one another, as a decode step has them, warm and as a CUDA graph; for ladders of what is too short to be timed alone.
#pragma once

#include "ladder.h"

// Median of the time of one f(), of nine times `repeats` of them, the first two left out.
inline double median_us(cudaStream_t stream, int repeats, const std::function<void()>& f) {
    cudaEvent_t begin, end;
    CUDA_CHECK(cudaEventCreate(&begin));
    CUDA_CHECK(cudaEventCreate(&end));
    std::vector<double> us;
    for (int i = 0; i < 9; i++) {
        CUDA_CHECK(cudaEventRecord(begin, stream));
        for (int k = 0; k < repeats; k++) f();
        CUDA_CHECK(cudaEventRecord(end, stream));
        CUDA_CHECK(cudaEventSynchronize(end));
        float ms;
        CUDA_CHECK(cudaEventElapsedTime(&ms, begin, end));
        if (i >= 2) us.push_back(ms * 1e3 / repeats);
    }
    CUDA_CHECK(cudaEventDestroy(begin));
    CUDA_CHECK(cudaEventDestroy(end));
    std::sort(us.begin(), us.end());
    return us[us.size() / 2];
}

// Bytes a µs that a copy reads and writes.
inline double copy_rate(cudaStream_t stream) {
    constexpr int64_t bytes = 1 << 30;
    DeviceArray<char> a(bytes), b(bytes);
    return 2.0 * bytes / median_us(stream, 3, [&] { CUDA_CHECK(cudaMemcpyAsync(b, a, bytes, cudaMemcpyDeviceToDevice, stream)); });
}

// The time of a step whose launches are made by `launch`.
inline double step_us(cudaStream_t stream, const std::function<void()>& launch) {
    cudaGraph_t graph;
    cudaGraphExec_t executable;
    CUDA_CHECK(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
    launch();
    CUDA_CHECK(cudaStreamEndCapture(stream, &graph));
    CUDA_CHECK(cudaGraphInstantiate(&executable, graph, 0));
    double us = median_us(stream, 10, [&] { CUDA_CHECK(cudaGraphLaunch(executable, stream)); });
    CUDA_CHECK(cudaGraphExecDestroy(executable));
    CUDA_CHECK(cudaGraphDestroy(graph));
    return us;
}
