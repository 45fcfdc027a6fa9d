// Tensor cores the portable way (compute capability 8.0 and later): mma.sync, ldmatrix, cp.async. Hopper's own instructions are in hopper.cuh.
//
// mma.sync.m16n8k16 multiplies A (16×16) by B (16×8), all 32 lanes together. With row = lane/4 and pair = lane%4 a lane holds, two bf16 to a register,
//     A: a[0] = A(row, 2·pair ...), a[1] = A(row+8, 2·pair ...), a[2] = A(row, 2·pair+8 ...), a[3] = A(row+8, 2·pair+8 ...)
//     B: b0 = B(2·pair ..., row), b1 = B(2·pair+8 ..., row)
//     C: c[0], c[1] = C(row, 2·pair ...), c[2], c[3] = C(row+8, 2·pair ...), float32
// so that two neighbouring C, rounded to bf16, are an A.
#pragma once

#include "common.cuh"

namespace gpu {

__device__ inline uint32_t shared_address(const void* p) { return (uint32_t)__cvta_generic_to_shared(p); }

// c += a·b
__device__ inline void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Four 8×8 matrices from shared memory: lane i gives the address of row i%8 of matrix i/8, 16 bytes. A lane gets the numbers (row, 2·pair ...) of each;
// `transposed`: (2·pair ..., row).
__device__ inline void load_matrices(uint32_t (&x)[4], uint32_t address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];" : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3]) : "r"(address) : "memory");
}
__device__ inline void load_matrices_transposed(uint32_t (&x)[4], uint32_t address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
                 : "r"(address)
                 : "memory");
}

// 16, 8 or 4 bytes from global to shared memory without passing through registers; zeros unless `valid`: then nothing is read.
__device__ inline void copy_async16(uint32_t to, const void* from, bool valid) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(valid ? 16 : 0) : "memory");
}
__device__ inline void copy_async8(uint32_t to, const void* from, bool valid) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 8, %2;" ::"r"(to), "l"(from), "r"(valid ? 8 : 0) : "memory");
}
__device__ inline void copy_async4(uint32_t to, const void* from, bool valid) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(to), "l"(from), "r"(valid ? 4 : 0) : "memory");
}
__device__ inline void copy_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Until all but the last PENDING groups of this thread have come.
template <int PENDING>
__device__ inline void copy_async_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}
__device__ inline void copy_async_wait_all() { asm volatile("cp.async.wait_all;" ::: "memory"); }

// Threads of whole warps that meet at one of the block's 16 hardware barriers (0 is __syncthreads()'s); `threads`: how many in all.
__device__ inline void named_barrier(int id, int threads) { asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory"); }
__device__ inline void named_barrier_arrive(int id, int threads) { asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory"); }

__device__ inline uint32_t pack_bf16(float low, float high) {
    __nv_bfloat162 x = __floats2bfloat162_rn(low, high);
    return *(uint32_t*)&x;
}
__device__ inline float2 unpack_bf16(uint32_t x) { return make_float2(__uint_as_float(x << 16), __uint_as_float(x & 0xffff0000)); }

__device__ inline float exp2_fast(float x) {  // relative error 2⁻²²
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
__device__ inline float tanh_fast(float x) {  // relative error 2⁻¹¹
    float y;
    asm("tanh.approx.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// Ordinary accesses by addresses of shared memory.
__device__ __forceinline__ float2 load_shared_pair(uint32_t address) {
    float2 x;
    asm volatile("ld.shared.v2.f32 {%0,%1}, [%2];" : "=f"(x.x), "=f"(x.y) : "r"(address) : "memory");
    return x;
}
__device__ __forceinline__ void store_shared(uint32_t address, const float2& x) {
    asm volatile("st.shared.v2.f32 [%0], {%1,%2};" ::"r"(address), "f"(x.x), "f"(x.y) : "memory");
}
__device__ __forceinline__ void store_shared(uint32_t address, const uint4& x) {
    asm volatile("st.shared.v4.b32 [%0], {%1,%2,%3,%4};" ::"r"(address), "r"(x.x), "r"(x.y), "r"(x.z), "r"(x.w) : "memory");
}
__device__ __forceinline__ void store_shared(uint32_t address, uint32_t x) {
    asm volatile("st.shared.b32 [%0], %1;" ::"r"(address), "r"(x) : "memory");
}
__device__ __forceinline__ uint4 load_shared(uint32_t address) {
    uint4 x;
    asm volatile("ld.shared.v4.b32 {%0,%1,%2,%3}, [%4];" : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w) : "r"(address) : "memory");
    return x;
}

}  // namespace gpu
