// What compute-sanitizer's racecheck knows of barriers in shared memory (mbarrier), by which the warps of Hopper's kernels hand each other tiles.
//
//     compute-sanitizer --tool racecheck build/cuda/racecheck_mbarrier N      N: a line of the table in main(); without N all of them, to see the sums
//
// Warp 0 stores 32 numbers to shared memory and warp 1 loads them, by ordinary instructions, eight times over, the next ones only when warp 1 has loaded the
// last. The ways differ in what orders the two. A hazard must be reported of the first way, and of no other: where one is, the tool does not follow that way.
//
// compute-sanitizer of CUDA 13.0 reports hazards in 1, 5 and 6, and there of 31 lanes' numbers: it connects an arrival at an mbarrier with what the arriving
// lane has done, not with what the other lanes had done before a __syncwarp(), which orders that too.
#include "ladder.h"

#include "../../gpt2/cuda/hopper.cuh"

using namespace gpu;

enum Way { NOTHING, BLOCK_BARRIER, NAMED_BARRIER, EVERY_LANE, ONE_LANE, EXPECTING, WHOLE_BLOCK };

// Threads with `leave` true have done their part and say so; the others wait for them.
template <Way WAY>
__device__ void meet(bool leave, uint32_t barrier, int parity) {
    const int lane = threadIdx.x % 32;
    if (WAY == BLOCK_BARRIER) __syncthreads();
    if (WAY == NAMED_BARRIER) named_barrier(1, 64);
    if (WAY == ONE_LANE || WAY == EXPECTING) __syncwarp();
    if (WAY == WHOLE_BLOCK || (WAY == EVERY_LANE && leave) || (WAY == ONE_LANE && leave && lane == 0)) barrier_arrive(barrier);
    if (WAY == EXPECTING && leave && lane == 0) barrier_arrive_expect(barrier, 0);
    if (WAY == WHOLE_BLOCK || (WAY >= EVERY_LANE && !leave)) barrier_wait(barrier, parity);
}

template <Way WAY>
__global__ void racecheck_kernel(float* out) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
    __shared__ volatile float numbers[32];
    __shared__ uint64_t barriers[2];  // full, empty
    const bool stores = threadIdx.x < 32;
    const uint32_t full = shared_address(barriers), empty = full + 8;
    if (threadIdx.x == 0) {
        for (uint32_t barrier : {full, empty}) barrier_init(barrier, WAY == WHOLE_BLOCK ? 64 : WAY == EVERY_LANE ? 32 : 1);
        barrier_init_fence();
    }
    __syncthreads();
    float sum = 0;
    for (int i = 0; i < 8; i++) {
        if (stores) numbers[threadIdx.x] = (float)(threadIdx.x + i);
        meet<WAY>(stores, full, i % 2);
        if (!stores) sum += numbers[63 - threadIdx.x];
        meet<WAY>(!stores, empty, i % 2);
    }
    if (!stores) out[threadIdx.x - 32] = sum;
#endif
}

int main(int argc, char** argv) {
    struct {
        const char* what;
        void (*kernel)(float*);
    } ways[] = {{"nothing: a race", racecheck_kernel<NOTHING>},
                {"__syncthreads()", racecheck_kernel<BLOCK_BARRIER>},
                {"bar.sync of 64 threads", racecheck_kernel<NAMED_BARRIER>},
                {"mbarrier, every storing lane arrives, the loading warp waits", racecheck_kernel<EVERY_LANE>},
                {"mbarrier, __syncwarp() and one lane arrives, the loading warp waits (kernels 6 and 7 of the softmax core)", racecheck_kernel<ONE_LANE>},
                {"the same with mbarrier.arrive.expect_tx", racecheck_kernel<EXPECTING>},
                {"mbarrier, all threads of the block arrive and wait", racecheck_kernel<WHOLE_BLOCK>}};
    if (!hopper_code()) return 0;
    DeviceArray<float> out(32);
    for (int i = 0; i < (int)std::size(ways); i++) {
        if (argc > 1 && i + 1 != atoi(argv[1])) continue;
        ways[i].kernel<<<1, 64>>>(out);
        LAUNCH_CHECK();
        std::vector<float> sums = out.to_host();
        bool right = true;
        for (int lane = 0; lane < 32; lane++) right &= sums[lane] == 8 * (31 - lane) + 28;
        printf("check racecheck_mbarrier %d. %s: %s\n", i + 1, ways[i].what, right ? "right" : i == 0 ? "wrong, as it may be" : "FAIL");
        if (!right && i > 0) return 1;
    }
    return 0;
}
