// The instructions of sm_90a that the Hopper kernels use, from CuTe. tests/cuda/emulator_sm90.h has
// the same functions for a CPU.
#pragma once

#include "../instructions.h"
#include "../kernels.h"

#if defined(ONEPASS_EMULATE)

#include "emulator_sm90.h"

#else

#include <cuda.h>
#include <cutlass/arch/barrier.h>
#include <cutlass/arch/reg_reconfig.h>

#include <cute/arch/copy_sm90_desc.hpp>
#include <cute/arch/copy_sm90_tma.hpp>
#include <cute/arch/mma_sm90_gmma.hpp>
#include <utility>

namespace onepass::cuda::sm90 {

// The copy engine's description of a (batch, heads, seq, head_dim) tensor.
using TensorMap = CUtensorMap;

// A barrier in shared memory that counts arrivals and bytes, phase after phase.
using Barrier = uint64_t;

__device__ __forceinline__ void init_barrier(Barrier* barrier, int arrivals) {
  cutlass::arch::ClusterBarrier::init(barrier, arrivals);
}
// Makes initialized barriers visible to the copy engine; a block-wide barrier must follow.
__device__ __forceinline__ void publish_barriers() { cutlass::arch::fence_barrier_init(); }
// Arrives, and makes the phase also wait for this many bytes.
__device__ __forceinline__ void arrive_and_expect(Barrier* barrier, int bytes) {
  asm volatile("" ::: "memory");  // CuTe's barriers do not declare that memory depends on them
  cutlass::arch::ClusterTransactionBarrier::arrive_and_expect_tx(barrier, bytes);
}
__device__ __forceinline__ void arrive(Barrier* barrier) {
  asm volatile("" ::: "memory");
  cutlass::arch::ClusterBarrier::arrive(barrier);
}
// Waits until the phase of this parity is over.
__device__ __forceinline__ void wait(Barrier* barrier, int parity) {
  cutlass::arch::ClusterBarrier::wait(barrier, parity);
  asm volatile("" ::: "memory");
}

// Starts to copy one block of columns of one head, with the map's number of tokens; tokens beyond
// the tensor become zeros.
__device__ __forceinline__ void copy_block(void* to, const TensorMap& from, Barrier* barrier,
                                           int column, int token, int head, int b) {
  cute::SM90_TMA_LOAD_4D::copy(&from, barrier,
                               static_cast<uint64_t>(cute::TMA::CacheHintSm90::EVICT_NORMAL), to,
                               column, token, head, b);
}

// Starts to copy contiguous memory, in multiples of 16 bytes.
__device__ __forceinline__ void copy_bytes(void* to, const void* from, int bytes,
                                           Barrier* barrier) {
  cute::SM90_BULK_COPY_G2S::copy(from, barrier, to, bytes);
}

// Writes shared memory for products or the copy engine: they may read it after the writer has
// called publish_writes() and synchronized with the thread that starts them.
template <typename T>
__device__ __forceinline__ void write_shared(void* to, const T& value) {
  *static_cast<T*>(to) = value;
}
// The same for four 8 x 8 matrices of 16-bit elements, in the layout of load_matrices: lane l gives
// the address of matrix row l % 8 of matrix l / 8.
__device__ __forceinline__ void store_matrices(void* matrix_row, const uint32_t (&r)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1,%2,%3,%4};"
               :
               : "r"(shared_address(matrix_row)), "r"(r[0]), "r"(r[1]), "r"(r[2]), "r"(r[3])
               : "memory");
}
__device__ __forceinline__ void publish_writes() {
  asm volatile("" ::: "memory");  // CuTe does not declare that its fence orders memory
  cutlass::arch::fence_view_async_shared();
  asm volatile("" ::: "memory");
}

// Starts to add floats of shared memory to those of global memory, in multiples of 16 bytes.
__device__ __forceinline__ void add_floats(float* to, const void* from, int bytes) {
  asm volatile(
      "cp.reduce.async.bulk.global.shared::cta.bulk_group.add.f32 [%0], [%1], %2;\n"
      "cp.async.bulk.commit_group;"
      :
      : "l"(to), "r"(shared_address(from)), "r"(bytes)
      : "memory");
}
// Waits until all such additions that this thread has started have read shared memory.
__device__ __forceinline__ void wait_read() { cute::tma_store_wait<0>(); }
// Waits until they are done and this thread sees them.
__device__ __forceinline__ void wait_added() {
  asm volatile("cp.async.bulk.wait_group 0;" : : : "memory");
}
// Additions that this thread starts later come after what it has seen in global memory.
__device__ __forceinline__ void order_additions() {
  asm volatile("fence.proxy.async.global;" : : : "memory");
}

// A barrier of `threads` threads, by number; 0 is the block's own.
__device__ __forceinline__ void sync_threads(int number, int threads) {
  asm volatile("bar.sync %0, %1;" : : "r"(number), "r"(threads) : "memory");
}
__device__ __forceinline__ void arrive_threads(int number, int threads) {
  asm volatile("bar.arrive %0, %1;" : : "r"(number), "r"(threads) : "memory");
}

template <int kRegisters>
__device__ __forceinline__ void release_registers() {
  cutlass::arch::warpgroup_reg_dealloc<kRegisters>();
}
template <int kRegisters>
__device__ __forceinline__ void take_registers() {
  cutlass::arch::warpgroup_reg_alloc<kRegisters>();
}

// Products of a warpgroup run asynchronously: begin, multiply, commit, and wait before touching the
// accumulator, or shared memory or registers that they read.
__device__ __forceinline__ void begin_products() { cute::warpgroup_arrive(); }
__device__ __forceinline__ void commit_products() { cute::warpgroup_commit_batch(); }
template <int kPending>
__device__ __forceinline__ void wait_products() {
  cute::warpgroup_wait<kPending>();
}
// Forces `value` to be computed before the next wait, while products are running: ptxas moves a
// wait up past what does not depend on it, but not across a write to shared memory, for which every
// thread has a `place`.
__device__ __forceinline__ void finish_before_wait(float* place, float value) {
  asm volatile("st.shared.f32 [%0], %1;" : : "r"(shared_address(place)), "f"(value) : "memory");
}
// Keeps the compiler from moving accesses to an accumulator across this point.
template <int kBlocks>
__device__ __forceinline__ void hold(float (&c)[kBlocks][4]) {
#pragma unroll
  for (int n = 0; n < kBlocks; ++n) {
#pragma unroll
    for (int e = 0; e < 4; ++e) asm volatile("" : "+f"(c[n][e])::"memory");
  }
}

namespace detail {

using cute::SM90::GMMA::Major;
using cute::SM90::GMMA::ScaleOut;

template <typename Element, int kColumns>
struct Atoms;
template <>
struct Atoms<Bf16, 64> {
  using Shared = cute::SM90::GMMA::MMA_64x64x16_F32BF16BF16_SS<Major::K, Major::K>;
  using SharedColumns = cute::SM90::GMMA::MMA_64x64x16_F32BF16BF16_SS<Major::MN, Major::MN>;
  using Registers = cute::SM90::GMMA::MMA_64x64x16_F32BF16BF16_RS<Major::K, Major::MN>;
};
template <>
struct Atoms<Bf16, 128> {
  using Shared = cute::SM90::GMMA::MMA_64x128x16_F32BF16BF16_SS<Major::K, Major::K>;
  using Registers = cute::SM90::GMMA::MMA_64x128x16_F32BF16BF16_RS<Major::K, Major::MN>;
};
template <>
struct Atoms<Fp16, 64> {
  using Shared = cute::SM90::GMMA::MMA_64x64x16_F32F16F16_SS<Major::K, Major::K>;
  using SharedColumns = cute::SM90::GMMA::MMA_64x64x16_F32F16F16_SS<Major::MN, Major::MN>;
  using Registers = cute::SM90::GMMA::MMA_64x64x16_F32F16F16_RS<Major::K, Major::MN>;
};
template <>
struct Atoms<Fp16, 128> {
  using Shared = cute::SM90::GMMA::MMA_64x128x16_F32F16F16_SS<Major::K, Major::K>;
  using Registers = cute::SM90::GMMA::MMA_64x128x16_F32F16F16_RS<Major::K, Major::MN>;
};

template <>
struct Atoms<Bf16, 192> {
  using Registers = cute::SM90::GMMA::MMA_64x192x16_F32BF16BF16_RS<Major::K, Major::MN>;
};
template <>
struct Atoms<Bf16, 256> {
  using Registers = cute::SM90::GMMA::MMA_64x256x16_F32BF16BF16_RS<Major::K, Major::MN>;
};
template <>
struct Atoms<Fp16, 192> {
  using Registers = cute::SM90::GMMA::MMA_64x192x16_F32F16F16_RS<Major::K, Major::MN>;
};
template <>
struct Atoms<Fp16, 256> {
  using Registers = cute::SM90::GMMA::MMA_64x256x16_F32F16F16_RS<Major::K, Major::MN>;
};

template <typename Atom, int kBlocks, size_t... kIndex>
__device__ __forceinline__ void multiply(float (&c)[kBlocks][4], uint64_t a, uint64_t b,
                                         bool accumulate, std::index_sequence<kIndex...>) {
  Atom::fma(a, b, c[kIndex / 4][kIndex % 4]..., accumulate ? ScaleOut::One : ScaleOut::Zero);
}
template <typename Atom, int kBlocks, size_t... kIndex>
__device__ __forceinline__ void multiply(float (&c)[kBlocks][4], const uint32_t (&a)[4], uint64_t b,
                                         std::index_sequence<kIndex...>) {
  Atom::fma(a[0], a[1], a[2], a[3], b, c[kIndex / 4][kIndex % 4]..., ScaleOut::One);
}

}  // namespace detail

// c (64 x 8 kBlocks) = or += a b^T over 16 columns: `a` and `b` describe tokens in shared memory.
template <typename Element, int kBlocks>
__device__ __forceinline__ void multiply_transposed(float (&c)[kBlocks][4], uint64_t a, uint64_t b,
                                                    bool accumulate) {
  using Atom = typename detail::Atoms<Element, 8 * kBlocks>::Shared;
  detail::multiply<Atom>(c, a, b, accumulate, std::make_index_sequence<4 * kBlocks>{});
}

// c (64 x 8 kBlocks) = or += a^T b over 16 tokens: `a` and `b` describe columns in shared memory.
template <typename Element, int kBlocks>
__device__ __forceinline__ void multiply_columns(float (&c)[kBlocks][4], uint64_t a, uint64_t b,
                                                 bool accumulate) {
  using Atom = typename detail::Atoms<Element, 8 * kBlocks>::SharedColumns;
  detail::multiply<Atom>(c, a, b, accumulate, std::make_index_sequence<4 * kBlocks>{});
}

// c (64 x 8 kBlocks) += a b over 16 tokens of `b`: `a` is in registers, `b` describes shared
// memory.
template <typename Element, int kBlocks>
__device__ __forceinline__ void multiply_add(float (&c)[kBlocks][4], const uint32_t (&a)[4],
                                             uint64_t b) {
  using Atom = typename detail::Atoms<Element, 8 * kBlocks>::Registers;
  detail::multiply<Atom>(c, a, b, std::make_index_sequence<4 * kBlocks>{});
}

}  // namespace onepass::cuda::sm90

#endif
