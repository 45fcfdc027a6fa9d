// Hopper's own instructions (compute capability 9.0a): bulk tensor copies, barriers in shared memory, products by a warpgroup, registers moved between warps.
//
// A kernel made of them has warps that only copy (the producer) and warpgroups that only compute (the consumers). Tiles go through a ring of stages: the
// producer waits until a stage is empty, starts the copies and leaves; these complete the stage's barrier `full`; the consumers wait for it, multiply, and
// arrive at the stage's barrier `empty`.
//
// All tiles in shared memory are made of panels: 64 columns of bf16 (128 bytes) by any multiple of 8 rows, row r at r·128, its 16-byte chunk c at
// (c ^ r%8)·16: the 128-byte swizzle, which the copies write and the products read, both without bank conflicts. Panels begin at multiples of 1024 bytes. A
// tile of 128 columns is two panels, one behind the other.
//
// The bodies are empty where the instructions do not exist; hopper_code() tells the host. Source: PTX ISA, sections on wgmma, cp.async.bulk.tensor, mbarrier.
#pragma once

#include <algorithm>

#include "tensor_cores.cuh"

namespace gpu {

#ifdef __CUDA_ARCH_FEAT_SM90_ALL
#define HOPPER_ONLY(...) __VA_ARGS__
#else
#define HOPPER_ONLY(...)
#endif

static __global__ void hopper_probe_kernel(int* out) {  // has static shared memory where it was compiled for 9.0a
    HOPPER_ONLY(__shared__ int probe[16]; probe[threadIdx.x % 16] = *out; __syncthreads(); *out = probe[0];)
}
// Whether this GPU has these instructions and this program code for them.
inline bool hopper_code() {
    static const bool yes = [] {
        int devices = 0;
        if (cudaGetDeviceCount(&devices) != cudaSuccess || devices == 0) return false;  // a plan is made on machines without a GPU too
        cudaFuncAttributes attributes;
        CUDA_CHECK(cudaFuncGetAttributes(&attributes, hopper_probe_kernel));
        return device_properties().major == 9 && attributes.sharedSizeBytes > 0;
    }();
    return yes;
}

// ---- tensor maps: what a bulk copy needs to know about a tensor in device memory ---------------------------------------------------------------------------

// bf16 numbers in up to 5 dimensions, the innermost (contiguous) first: sizes, strides in elements of the others (multiples of 8), and the box that one copy
// fetches; box[0] = 64: one panel. `data` is aligned to 16 bytes. Numbers outside the sizes arrive as zeros, and are not written. Passed to kernels as
// `const __grid_constant__ CUtensorMap`.
template <int RANK>
inline CUtensorMap tensor_map(const void* data, const int64_t (&size)[RANK], const int64_t (&stride)[RANK - 1], const int (&box)[RANK]) {
    static const auto encode = DRIVER_FUNCTION(cuTensorMapEncodeTiled);
    cuuint64_t sizes[RANK], strides[RANK];
    cuuint32_t boxes[RANK], steps[RANK];
    for (int i = 0; i < RANK; i++) {
        sizes[i] = (cuuint64_t)std::max<int64_t>(size[i], 1);  // no box is fetched of an empty tensor
        boxes[i] = (cuuint32_t)box[i];
        steps[i] = 1;
        if (i > 0) strides[i - 1] = (cuuint64_t)stride[i - 1] * sizeof(__nv_bfloat16);
    }
    CUtensorMap map;
    CUresult status = encode(&map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, RANK, (void*)data, sizes, strides, boxes, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
                             CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    if (status != CUDA_SUCCESS) data_error("CUDA: a tensor map of rank %d was refused (error %d)", RANK, (int)status);
    return map;
}

// ---- barriers in shared memory ------------------------------------------------------------------------------------------------------------------------------
//
// A barrier (8 bytes) completes a phase when `count` arrivals have come and all bytes it was told to expect; then the next phase begins. A waiter names the
// parity of the phase it waits for: 0 for the first, 1 for the second, 0 for the third ... A barrier whose first phase has not completed counts as having
// completed one of parity 1: producers begin by waiting for parity 1 of `empty`.

__device__ __forceinline__ void barrier_init(uint32_t barrier, int count) {
    HOPPER_ONLY(asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(count) : "memory");)
}
// By the thread that made the barriers, before the __syncthreads() after which others use them: bulk copies must see them too.
__device__ __forceinline__ void barrier_init_fence() {
    HOPPER_ONLY(asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); asm volatile("fence.proxy.async.shared::cta;" ::: "memory");)
}
__device__ __forceinline__ void barrier_arrive(uint32_t barrier) {
    HOPPER_ONLY(asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");)
}
// Arrive, and let the phase wait for so many bytes of bulk copies too.
__device__ __forceinline__ void barrier_arrive_expect(uint32_t barrier, int bytes) {
    HOPPER_ONLY(asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");)
}
__device__ __forceinline__ void barrier_wait(uint32_t barrier, int parity) {
    HOPPER_ONLY(asm volatile("{\n"
                             ".reg .pred done;\n"
                             "again:\n"
                             "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
                             "@!done bra again;\n"
                             "}" ::"r"(barrier),
                             "r"(parity)
                             : "memory");)
}
// Four 8×8 matrices to shared memory, where load_matrices() finds them.
__device__ __forceinline__ void store_matrices(uint32_t address, const uint32_t (&x)[4]) {
    HOPPER_ONLY(asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1,%2,%3,%4};" ::"r"(address), "r"(x[0]), "r"(x[1]), "r"(x[2]), "r"(x[3])
                             : "memory");)
}

// What this thread has written to shared memory becomes visible to products and bulk copies that are started after the next barrier.
__device__ __forceinline__ void async_fence() { HOPPER_ONLY(asm volatile("fence.proxy.async.shared::cta;" ::: "memory");) }

// ---- clusters -----------------------------------------------------------------------------------------------------------------------------------------------

__device__ __forceinline__ int cluster_rank() {
    int rank = 0;
    HOPPER_ONLY(asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));)
    return rank;
}
// All threads of the cluster that have not left.
__device__ __forceinline__ void cluster_barrier() { HOPPER_ONLY(asm volatile("barrier.cluster.arrive.release;\nbarrier.cluster.wait.acquire;" ::: "memory");) }
// Arrive at the barrier that stands at the same place in block `rank` of the cluster.
__device__ __forceinline__ void barrier_arrive_at(uint32_t barrier, int rank) {
    HOPPER_ONLY(asm volatile("{\n"
                             ".reg .b32 remote;\n"
                             "mapa.shared::cluster.u32 remote, %0, %1;\n"
                             "mbarrier.arrive.shared::cluster.b64 _, [remote];\n"
                             "}" ::"r"(barrier),
                             "r"(rank)
                             : "memory");)
}

// ---- bulk copies, by one thread -----------------------------------------------------------------------------------------------------------------------------

// The box at coordinates (c0 innermost ...) to shared memory; its bytes (zeros outside the tensor included) count towards the barrier's phase.
__device__ __forceinline__ void bulk_load(uint32_t to, const CUtensorMap* map, uint32_t barrier, int c0, int c1) {
    HOPPER_ONLY(asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3,%4}], [%2];" ::"r"(to), "l"(map),
                             "r"(barrier), "r"(c0), "r"(c1)
                             : "memory");)
}
__device__ __forceinline__ void bulk_load(uint32_t to, const CUtensorMap* map, uint32_t barrier, int c0, int c1, int c2) {
    HOPPER_ONLY(asm volatile("cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3,%4,%5}], [%2];" ::"r"(to), "l"(map),
                             "r"(barrier), "r"(c0), "r"(c1), "r"(c2)
                             : "memory");)
}
__device__ __forceinline__ void bulk_load(uint32_t to, const CUtensorMap* map, uint32_t barrier, int c0, int c1, int c2, int c3) {
    HOPPER_ONLY(asm volatile("cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3,%4,%5,%6}], [%2];" ::"r"(to), "l"(map),
                             "r"(barrier), "r"(c0), "r"(c1), "r"(c2), "r"(c3)
                             : "memory");)
}
// The box to the same place in all blocks of the cluster that `mask` has a bit for, and its bytes to each block's own barrier.
__device__ __forceinline__ void bulk_load_multicast(uint32_t to, const CUtensorMap* map, uint32_t barrier, int c0, int c1, int mask) {
    HOPPER_ONLY(
        asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster [%0], [%1, {%3,%4}], [%2], %5;" ::"r"(to),
                     "l"(map), "r"(barrier), "r"(c0), "r"(c1), "h"((uint16_t)mask)
                     : "memory");)
}
__device__ __forceinline__ void bulk_load_multicast(uint32_t to, const CUtensorMap* map, uint32_t barrier, int c0, int c1, int c2, int mask) {
    HOPPER_ONLY(
        asm volatile(
            "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster [%0], [%1, {%3,%4,%5}], [%2], %6;" ::"r"(to),
            "l"(map), "r"(barrier), "r"(c0), "r"(c1), "r"(c2), "h"((uint16_t)mask)
            : "memory");)
}
// From shared memory (async_fence() and a barrier behind the writes first) to the box. The shared memory may be used again, or the kernel end, after
// bulk_store_wait().
__device__ __forceinline__ void bulk_store(const CUtensorMap* map, uint32_t from, int c0, int c1) {
    HOPPER_ONLY(asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%0, {%2,%3}], [%1];" ::"l"(map), "r"(from), "r"(c0), "r"(c1) : "memory");)
}
__device__ __forceinline__ void bulk_store(const CUtensorMap* map, uint32_t from, int c0, int c1, int c2, int c3) {
    HOPPER_ONLY(asm volatile("cp.async.bulk.tensor.4d.global.shared::cta.bulk_group [%0, {%2,%3,%4,%5}], [%1];" ::"l"(map), "r"(from), "r"(c0), "r"(c1),
                             "r"(c2), "r"(c3)
                             : "memory");)
}
__device__ __forceinline__ void bulk_store_commit() { HOPPER_ONLY(asm volatile("cp.async.bulk.commit_group;" ::: "memory");) }
template <int PENDING = 0>
__device__ __forceinline__ void bulk_store_wait() {  // until all groups of this thread but the last PENDING have been read from shared memory
    HOPPER_ONLY(asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(PENDING) : "memory");)
}

// ---- registers: the producer's warps give theirs to the consumers (whole warpgroups; multiples of 8) --------------------------------------------------------

template <int REGISTERS>
__device__ __forceinline__ void fewer_registers() {
    HOPPER_ONLY(asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(REGISTERS));)
}
template <int REGISTERS>
__device__ __forceinline__ void more_registers() {
    HOPPER_ONLY(asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(REGISTERS));)
}

// ---- products by a warpgroup ------------------------------------------------------------------------------------------------------------------------------
//
// C (64×N, float32 in registers) = or += A (64×16)·B (16×N). Warp w of the four (w = warp of block % 4: the warpgroup begins at a multiple of 4) has the rows
// 16·w ... 16·w+15 of C, and lane l of these the rows l/4 and l/4 + 8: c[4·n], c[4·n+1] = C(l/4, 8·n + 2·(l%4) ...), c[4·n+2], c[4·n+3] the same 8 rows below.
// So eight neighbouring c, rounded to bf16, are 16 columns of an A in registers: a[0] = C(l/4, ...), a[1] = 8 rows below, a[2], a[3] = 8 columns on.
//
// Operands in shared memory are named by descriptors of panels. Depth is the dimension summed over (16 a product).
//     by rows     (K-major):  panel rows are rows of A (columns of B), panel columns the depth.   16 further: + 2 (32 bytes); beyond 64 the next panel
//     transposed  (MN-major): panel rows are the depth, panel columns the rows of A (columns of B). 16 further: + 128 (16 rows)
// Transposed operands wider than 64 go on in the next panel, `panel_bytes` behind.
//
// Several products run one behind another without waiting:
//     products_begin();  product<N>(...);  product<N>(...);  products_commit();  ...  products_wait<0>();
// Between begin and wait nobody may touch the c (nor the a in registers) of products under way; panels must not be overwritten.

__device__ __forceinline__ uint64_t panel_operand(uint32_t address) {  // rows of 128 bytes, eight rows 1024 bytes, 128-byte swizzle
    return (uint64_t)(address >> 4) | (uint64_t)1 << 16 | (uint64_t)(1024 >> 4) << 32 | (uint64_t)1 << 62;
}
__device__ __forceinline__ uint64_t panel_operand_transposed(uint32_t address, int panel_bytes) {
    return (uint64_t)(address >> 4) | (uint64_t)(panel_bytes >> 4) << 16 | (uint64_t)(1024 >> 4) << 32 | (uint64_t)1 << 62;
}

__device__ __forceinline__ void products_begin() { HOPPER_ONLY(asm volatile("wgmma.fence.sync.aligned;" ::: "memory");) }
__device__ __forceinline__ void products_commit() { HOPPER_ONLY(asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");) }
template <int PENDING>
__device__ __forceinline__ void products_wait() {  // until all committed groups but the last PENDING are done
    HOPPER_ONLY(asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");)
}
// Nobody looks at these registers before this line: the compiler does not know that products write them late. Behind products_wait().
template <int N>
__device__ __forceinline__ void products_done(float (&c)[N]) {
#pragma unroll
    for (int i = 0; i < N; i++) asm volatile("" : "+f"(c[i])::"memory");
}

// clang-format off
#define WGMMA_0_32 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define WGMMA_32_48 "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47"
#define WGMMA_48_64 "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define WGMMA_64_96 "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, %80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95"
#define WGMMA_96_128 "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, %112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"
#define WGMMA_C8(i) "+f"(c[i]), "+f"(c[i + 1]), "+f"(c[i + 2]), "+f"(c[i + 3]), "+f"(c[i + 4]), "+f"(c[i + 5]), "+f"(c[i + 6]), "+f"(c[i + 7])
#define WGMMA_C16(i) WGMMA_C8(i), WGMMA_C8(i + 8)
#define WGMMA_C32(i) WGMMA_C16(i), WGMMA_C16(i + 16)
#define WGMMA_32 WGMMA_0_32
#define WGMMA_48 WGMMA_0_32 ", " WGMMA_32_48
#define WGMMA_64 WGMMA_48 ", " WGMMA_48_64
#define WGMMA_96 WGMMA_64 ", " WGMMA_64_96
#define WGMMA_128 WGMMA_96 ", " WGMMA_96_128
#define WGMMA_LIST_32 WGMMA_C32(0)
#define WGMMA_LIST_48 WGMMA_C32(0), WGMMA_C16(32)
#define WGMMA_LIST_64 WGMMA_C32(0), WGMMA_C32(32)
#define WGMMA_LIST_96 WGMMA_LIST_64, WGMMA_C32(64)
#define WGMMA_LIST_128 WGMMA_LIST_96, WGMMA_C32(96)
// N: columns; C = N/2 registers a thread, %C ... are the operands behind them.
#define WGMMA_BOTH_SHARED(N, C, P0, P1, P2, P3, P4)                                                                                       \
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #P2 ", 0;\n"                                                                        \
                 "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32.bf16.bf16 {" WGMMA_##C "}, %" #P0 ", %" #P1 ", p, 1, 1, %" #P3 ", %" #P4 ";\n}" \
                 : WGMMA_LIST_##C : "l"(a), "l"(b), "r"((int)accumulate), "n"(TRANSPOSED_A), "n"(TRANSPOSED_B))
#define WGMMA_A_REGISTERS(N, C, P0, P1, P2, P3, P4, P5, P6)                                                                               \
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #P5 ", 0;\n"                                                                        \
                 "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32.bf16.bf16 {" WGMMA_##C "}, {%" #P0 ", %" #P1 ", %" #P2 ", %" #P3 "}, %" #P4 ", p, 1, 1, %" #P6 ";\n}" \
                 : WGMMA_LIST_##C : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"((int)accumulate), "n"(TRANSPOSED_B))
// clang-format on

// c = a·b, or c += a·b if `accumulate`; both operands in shared memory.
template <int TRANSPOSED_A = 0, int TRANSPOSED_B = 0, int C>
__device__ __forceinline__ void product(float (&c)[C], uint64_t a, uint64_t b, bool accumulate) {
    static_assert(C == 32 || C == 48 || C == 64 || C == 96 || C == 128, "64, 96, 128, 192 or 256 columns");
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
    if constexpr (C == 32) WGMMA_BOTH_SHARED(64, 32, 32, 33, 34, 35, 36);
    if constexpr (C == 48) WGMMA_BOTH_SHARED(96, 48, 48, 49, 50, 51, 52);
    if constexpr (C == 64) WGMMA_BOTH_SHARED(128, 64, 64, 65, 66, 67, 68);
    if constexpr (C == 96) WGMMA_BOTH_SHARED(192, 96, 96, 97, 98, 99, 100);
    if constexpr (C == 128) WGMMA_BOTH_SHARED(256, 128, 128, 129, 130, 131, 132);
#endif
}
// The same with a in registers.
template <int TRANSPOSED_B = 0, int C>
__device__ __forceinline__ void product(float (&c)[C], const uint32_t (&a)[4], uint64_t b, bool accumulate) {
    static_assert(C == 32 || C == 48 || C == 64 || C == 96 || C == 128, "64, 96, 128, 192 or 256 columns");
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
    if constexpr (C == 32) WGMMA_A_REGISTERS(64, 32, 32, 33, 34, 35, 36, 37, 38);
    if constexpr (C == 48) WGMMA_A_REGISTERS(96, 48, 48, 49, 50, 51, 52, 53, 54);
    if constexpr (C == 64) WGMMA_A_REGISTERS(128, 64, 64, 65, 66, 67, 68, 69, 70);
    if constexpr (C == 96) WGMMA_A_REGISTERS(192, 96, 96, 97, 98, 99, 100, 101, 102);
    if constexpr (C == 128) WGMMA_A_REGISTERS(256, 128, 128, 129, 130, 131, 132, 133, 134);
#endif
}

}  // namespace gpu
