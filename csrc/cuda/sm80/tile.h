// Tiles in shared memory, and the products of a warp's 16-token slices with them.
#pragma once

#include "../tokens.h"
#include "config.h"

namespace onepass::cuda::sm80 {

// Starts to copy tokens [first, first + kTokens) of one head; tokens at or beyond `end` become
// zeros.
template <typename Element, int kTokens, int kCols>
__device__ __forceinline__ void load_tile(Element* to, const Tensor& from, int32_t b, int32_t head,
                                          int32_t first, int32_t end) {
  using Layout = Swizzle<kCols>;
  constexpr int kTokensAtOnce = kThreads / Layout::kGroup;
  const int thread = recomputed(threadIdx.x);
  const int token = thread / Layout::kGroup, chunk = thread % Layout::kGroup;
  to += Layout::offset(token, chunk);
  const Element* source =
      head_of<Element>(from, b, recomputed(head)) + (first + token) * from.seq_stride + chunk * 8;
#pragma unroll
  for (int i = 0; i < kTokens / kTokensAtOnce; ++i) {
    const bool valid = first + token + i * kTokensAtOnce < end;
#pragma unroll
    for (int group = 0; group < Layout::kGroups; ++group) {
      copy_async(to + i * kTokensAtOnce * kCols + group * Layout::kGroup * 8,
                 source + group * Layout::kGroup * 8, valid);
    }
    source += kTokensAtOnce * from.seq_stride;
  }
}

// Starts to copy the statistics of kQueries queries of one head.
template <int kQueries>
__device__ __forceinline__ void load_statistics(Statistics* to, const BackwardParams& params,
                                                int32_t b, int32_t head, int32_t first) {
  constexpr int kAtOnce = 16 / sizeof(Statistics);
  if (threadIdx.x >= kQueries / kAtOnce) return;
  const int64_t query = padded_index(params, b, head, first + threadIdx.x * kAtOnce);
  copy_async(to + threadIdx.x * kAtOnce, params.statistics + query, true);
}

// What the block takes, at the end of its shared memory. Called by all threads.
template <int kQueries>
__device__ __forceinline__ KeyBlock& key_block_of(const BackwardParams& params, int shared_bytes) {
  KeyBlock* block = reinterpret_cast<KeyBlock*>(shared_memory() + shared_bytes - sizeof(KeyBlock));
  if (threadIdx.x == 0) *block = take_key_block<kQueries, kTile>(params);
  sync_block();
  return *block;
}

// c = a b^T: the tokens of tile `a` from `first`, with all tokens of tile `b`, over kCols.
template <typename Element, int kCols, int kSlices, int kBlocks>
__device__ __forceinline__ void multiply_transposed(Accumulator<kSlices, kBlocks>& c,
                                                    const Element* a, int first, const Element* b) {
  using Layout = Swizzle<kCols>;
  const int lane = threadIdx.x % 32;
  const int a_offset = Layout::offset(first + lane % 16, lane / 16);
  const int b_offset = Layout::offset(lane % 8 + lane / 16 * 8, lane / 8 % 2);
  clear(c);
#pragma unroll
  for (int k = 0; k < kCols / 16; ++k) {
    uint32_t left[kSlices][4];
#pragma unroll
    for (int m = 0; m < kSlices; ++m) {
      load_matrices(left[m], a + 16 * m * kCols + Layout::advance(a_offset, k));
    }
#pragma unroll
    for (int n = 0; n < kBlocks; n += 2) {
      uint32_t columns[4];
      load_matrices(columns, b + 8 * n * kCols + Layout::advance(b_offset, k));
#pragma unroll
      for (int m = 0; m < kSlices; ++m) {
        mma<Element>(c[m][n], left[m], columns[0], columns[1]);
        mma<Element>(c[m][n + 1], left[m], columns[2], columns[3]);
      }
    }
  }
}

// c += a b, summed over the tokens of tile `b`. Of every kEvery times 16 columns of `b`, only the
// 16 with index `part`.
template <typename Element, int kCols, int kEvery = 1, int kSlices, int kSteps>
__device__ __forceinline__ void multiply_add(Accumulator<kSlices, kCols / 8 / kEvery>& c,
                                             const LeftFactor<kSlices, kSteps>& a, const Element* b,
                                             int part = 0) {
  using Layout = Swizzle<kCols>;
  const int lane = threadIdx.x % 32;
  const int b_offset = Layout::advance(Layout::offset(lane % 16, lane / 16), part);
#pragma unroll
  for (int k = 0; k < kSteps; ++k) {
#pragma unroll
    for (int n = 0; n < kCols / 8 / kEvery; n += 2) {
      uint32_t columns[4];
      load_matrices_transposed(columns,
                               b + 16 * k * kCols + Layout::advance(b_offset, kEvery * n / 2));
#pragma unroll
      for (int m = 0; m < kSlices; ++m) {
        mma<Element>(c[m][n], a[m][k], columns[0], columns[1]);
        mma<Element>(c[m][n + 1], a[m][k], columns[2], columns[3]);
      }
    }
  }
}

// Writes a factor into 16 tokens of a tile with the same number of columns.
template <typename Element, int kSteps>
__device__ __forceinline__ void store_factor(Element* tile, const LeftFactor<1, kSteps>& a) {
  const int lane = threadIdx.x % 32, column = 2 * (lane % 4);
#pragma unroll
  for (int n = 0; n < 2 * kSteps; ++n) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int offset = Swizzle<16 * kSteps>::offset(lane / 4 + 8 * half, n);
      *reinterpret_cast<uint32_t*>(tile + offset + column) = a[0][n / 2][n % 2 * 2 + half];
    }
  }
}

// 16 kSlices columns from `column` of a tile, as tokens of a factor.
template <typename Element, int kCols, int kSlices, int kSteps>
__device__ __forceinline__ void load_transposed(LeftFactor<kSlices, kSteps>& a, const Element* tile,
                                                int column) {
  using Layout = Swizzle<kCols>;
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int m = 0; m < kSlices; ++m) {
    const int offset = Layout::offset(lane % 8 + lane / 16 * 8, column / 8 + 2 * m + lane / 8 % 2);
#pragma unroll
    for (int k = 0; k < kSteps; ++k) {
      load_matrices_transposed(a[m][k], tile + 16 * k * kCols + offset);
    }
  }
}

}  // namespace onepass::cuda::sm80
