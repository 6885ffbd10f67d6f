// Tiles in shared memory, and the products of a warp's 16-row slices with them.
#pragma once

#include "../rows.h"
#include "config.h"

namespace onepass::cuda::sm80 {

// Starts to copy tokens [first, first + kRows) of one head; tokens at or beyond `end` become zeros.
template <typename Element, int kRows, int kCols>
__device__ __forceinline__ void load_tile(Element* to, const Tensor& from, int32_t row,
                                          int32_t head, int32_t first, int32_t end) {
  using Layout = Swizzle<kCols>;
  constexpr int kRowsAtOnce = kThreads / Layout::kGroup;
  const int thread = recomputed(threadIdx.x);
  const int token = thread / Layout::kGroup, chunk = thread % Layout::kGroup;
  to += Layout::offset(token, chunk);
  const Element* source =
      head_of<Element>(from, row, recomputed(head)) + (first + token) * from.seq_stride + chunk * 8;
#pragma unroll
  for (int i = 0; i < kRows / kRowsAtOnce; ++i) {
    const bool valid = first + token + i * kRowsAtOnce < end;
#pragma unroll
    for (int group = 0; group < Layout::kGroups; ++group) {
      copy_async(to + i * kRowsAtOnce * kCols + group * Layout::kGroup * 8,
                 source + group * Layout::kGroup * 8, valid);
    }
    source += kRowsAtOnce * from.seq_stride;
  }
}

// Starts to copy the statistics of kRows queries of one head.
template <int kRows>
__device__ __forceinline__ void load_statistics(Statistics* to, const BackwardParams& params,
                                                int32_t row, int32_t head, int32_t first) {
  constexpr int kAtOnce = 16 / sizeof(Statistics);
  if (threadIdx.x >= kRows / kAtOnce) return;
  const int64_t head_of_row = static_cast<int64_t>(row) * params.heads + head;
  const int64_t query = head_of_row * padded(params.seq) + first + threadIdx.x * kAtOnce;
  copy_async(to + threadIdx.x * kAtOnce, params.statistics + query, true);
}

// c = a b^T: the rows of tile `a` from `row`, with all rows of tile `b`, over kCols.
template <typename Element, int kCols, int kRowTiles, int kBlocks>
__device__ __forceinline__ void multiply_transposed(Accumulator<kRowTiles, kBlocks>& c,
                                                    const Element* a, int row, const Element* b) {
  using Layout = Swizzle<kCols>;
  const int lane = threadIdx.x % 32;
  const int a_offset = Layout::offset(row + lane % 16, lane / 16);
  const int b_offset = Layout::offset(lane % 8 + lane / 16 * 8, lane / 8 % 2);
  clear(c);
#pragma unroll
  for (int k = 0; k < kCols / 16; ++k) {
    uint32_t rows[kRowTiles][4];
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m) {
      load_matrices(rows[m], a + 16 * m * kCols + Layout::advance(a_offset, k));
    }
#pragma unroll
    for (int n = 0; n < kBlocks; n += 2) {
      uint32_t columns[4];
      load_matrices(columns, b + 8 * n * kCols + Layout::advance(b_offset, k));
#pragma unroll
      for (int m = 0; m < kRowTiles; ++m) {
        mma<Element>(c[m][n], rows[m], columns[0], columns[1]);
        mma<Element>(c[m][n + 1], rows[m], columns[2], columns[3]);
      }
    }
  }
}

// c += a b, summed over the rows of tile `b`. Of every kEvery times 16 columns of `b`, only the 16
// with index `part`.
template <typename Element, int kCols, int kEvery = 1, int kRowTiles, int kSteps>
__device__ __forceinline__ void multiply_add(Accumulator<kRowTiles, kCols / 8 / kEvery>& c,
                                             const LeftFactor<kRowTiles, kSteps>& a,
                                             const Element* b, int part = 0) {
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
      for (int m = 0; m < kRowTiles; ++m) {
        mma<Element>(c[m][n], a[m][k], columns[0], columns[1]);
        mma<Element>(c[m][n + 1], a[m][k], columns[2], columns[3]);
      }
    }
  }
}

// Writes a factor into 16 rows of a tile with the same number of columns.
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

// 16 kRowTiles columns from `column` of a tile, as rows of a factor.
template <typename Element, int kCols, int kRowTiles, int kSteps>
__device__ __forceinline__ void load_transposed(LeftFactor<kRowTiles, kSteps>& a,
                                                const Element* tile, int column) {
  using Layout = Swizzle<kCols>;
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int m = 0; m < kRowTiles; ++m) {
    const int offset = Layout::offset(lane % 8 + lane / 16 * 8, column / 8 + 2 * m + lane / 8 % 2);
#pragma unroll
    for (int k = 0; k < kSteps; ++k) {
      load_matrices_transposed(a[m][k], tile + 16 * k * kCols + offset);
    }
  }
}

}  // namespace onepass::cuda::sm80
