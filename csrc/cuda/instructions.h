// The instructions that the kernels use, one function each, so that a kernel is ordinary C++ around
// them. tests/cuda/emulator.h has the same functions for a CPU, on which the tests run the kernels.
#pragma once

#include <cstdint>

#if defined(ONEPASS_EMULATE)

#include "emulator.h"

#else

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

namespace onepass::cuda {

using Bf16 = __nv_bfloat16;
using Fp16 = __half;

// The block's dynamic shared memory, aligned to 1 KiB.
__device__ __forceinline__ uint8_t* shared_memory() {
  extern __shared__ __align__(1024) uint8_t memory[];
  return memory;
}

__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// The same value, opaque to the compiler: what a loop computes from it is computed in each
// iteration instead of being kept in registers that the loop lacks.
__device__ __forceinline__ int32_t recomputed(int32_t value) {
  asm volatile("" : "+r"(value));
  return value;
}

// Two floats rounded to Element, the first in the low half.
template <typename Element>
__device__ __forceinline__ uint32_t pack(float low, float high);
template <>
__device__ __forceinline__ uint32_t pack<Bf16>(float low, float high) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  return reinterpret_cast<const uint32_t&>(pair);
}
template <>
__device__ __forceinline__ uint32_t pack<Fp16>(float low, float high) {
  const __half2 pair = __floats2half2_rn(low, high);
  return reinterpret_cast<const uint32_t&>(pair);
}

template <typename Element>
__device__ __forceinline__ float2 unpack(uint32_t pair);
template <>
__device__ __forceinline__ float2 unpack<Bf16>(uint32_t pair) {
  return __bfloat1622float2(reinterpret_cast<const __nv_bfloat162&>(pair));
}
template <>
__device__ __forceinline__ float2 unpack<Fp16>(uint32_t pair) {
  return __half22float2(reinterpret_cast<const __half2&>(pair));
}

// 2^x, with denormal results flushed to zero; exp2(-inf) is 0.
__device__ __forceinline__ float fast_exp2(float x) {
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
}

// Exact to a few float32 roundings of 1.
__device__ __forceinline__ float fast_tanh(float x) {
  constexpr float kTwoLog2E = 2.8853900817779268f;
  return 1.0f - __fdividef(2.0f, 1.0f + fast_exp2(kTwoLog2E * x));
}

__device__ __forceinline__ void sync_block() { __syncthreads(); }
__device__ __forceinline__ void sync_warp() { __syncwarp(); }
__device__ __forceinline__ uint32_t ballot(bool predicate) {
  return __ballot_sync(0xffffffff, predicate);
}
template <typename T>
__device__ __forceinline__ T shuffle_xor(T value, int lane_mask) {
  return __shfl_xor_sync(0xffffffff, value, lane_mask);
}
template <typename T>
__device__ __forceinline__ T shuffle(T value, int lane) {
  return __shfl_sync(0xffffffff, value, lane);
}
__device__ __forceinline__ int first_bit(uint32_t bits) { return __ffs(bits) - 1; }
__device__ __forceinline__ int leading_zeros(uint32_t bits) { return first_bit(__brev(bits)); }

// c (16 x 8) += a (16 x 16) * b (16 x 8), one warp. Of lane l: c[0..1] are matrix row l / 4,
// columns 2 (l % 4) and the next, c[2..3] the same eight rows below.
template <typename Element>
__device__ __forceinline__ void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0,
                                    uint32_t b1);
template <>
__device__ __forceinline__ void mma<Bf16>(float (&c)[4], const uint32_t (&a)[4], uint32_t b0,
                                          uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
template <>
__device__ __forceinline__ void mma<Fp16>(float (&c)[4], const uint32_t (&a)[4], uint32_t b0,
                                          uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Four 8 x 8 matrices of 16-bit elements: lane l provides the address of matrix row l % 8 of matrix
// l / 8, and receives from each the elements of matrix row l / 4, columns 2 (l % 4) and the next.
__device__ __forceinline__ void load_matrices(uint32_t (&r)[4], const void* matrix_row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(matrix_row))
               : "memory");
}

// The same, each matrix transposed.
__device__ __forceinline__ void load_matrices_transposed(uint32_t (&r)[4], const void* matrix_row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(matrix_row))
               : "memory");
}

// Adds to a float in global memory to which others add at the same time.
__device__ __forceinline__ void add_to(float* sum, float value) { atomicAdd(sum, value); }

// What a counter in global memory was before others and this thread have added 1 each.
__device__ __forceinline__ int32_t take_number(int32_t* counter) { return atomicAdd(counter, 1); }

// Of a number in global memory by which blocks wait for each other: sets it, after what this thread
// has written or has seen written.
__device__ __forceinline__ void set_after_writes(int32_t* number, int32_t value) {
  asm volatile("st.release.gpu.global.s32 [%0], %1;" : : "l"(number), "r"(value) : "memory");
}
// Waits until it is `value`, and sees what was written before.
__device__ __forceinline__ void wait_until(const int32_t* number, int32_t value) {
  int32_t seen;
  do {
    asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(seen) : "l"(number) : "memory");
  } while (seen != value);
}

// Starts to copy 16 bytes from global to shared memory; zeros unless `valid`.
__device__ __forceinline__ void copy_async(void* to, const void* from, bool valid) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
               :
               : "r"(shared_address(to)), "l"(from), "r"(valid ? 16 : 0)
               : "memory");
}

// Closes the group of the copies that this thread started since the last one.
__device__ __forceinline__ void commit_copies() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}

// Waits until at most kPending of this thread's groups are pending.
template <int kPending>
__device__ __forceinline__ void wait_copies() {
  asm volatile("cp.async.wait_group %0;" : : "n"(kPending) : "memory");
}

}  // namespace onepass::cuda

#endif
