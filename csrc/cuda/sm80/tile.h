// Tiles in shared memory, and the products of a warp's 16-row slices with them.
#pragma once

#include "config.h"

namespace onepass::cuda::sm80 {

template <typename Element>
__device__ __forceinline__ Element* head_of(const Tensor& tensor, int32_t row, int32_t head) {
  return static_cast<Element*>(tensor.data) + row * tensor.batch_stride + head * tensor.head_stride;
}

// Where a tile of rows of kCols elements keeps the 16-byte chunk (row, chunk), in elements. Chunks
// are permuted within groups of eight (or four) of their row, so that the eight rows of a matrix
// that ldmatrix reads lie in different banks.
template <int kCols>
struct Swizzle {
  static_assert(kCols % 32 == 0, "rows are whole multiples of 64 bytes");
  static constexpr int kGroup = kCols % 64 == 0 ? 8 : 4;
  static constexpr int kGroups = kCols / 8 / kGroup;

  static __device__ __forceinline__ int offset(int row, int chunk) {
    const int key = kGroup == 8 ? row & 7 : (row >> 1) & 3;
    return row * kCols + (chunk ^ key) * 8;
  }

  // The offset of chunk `chunk + 2 pairs` of the same row, from that of an even `chunk` or the one
  // after it below kGroup: what the product loops need of an offset per step.
  static __device__ __forceinline__ int advance(int offset, int pairs) {
    constexpr int kPairs = kGroup / 2;
    return (offset ^ (pairs % kPairs * 16)) + pairs / kPairs * kGroup * 8;
  }
};

// Starts to copy tokens [first, first + kRows) of one head; tokens from `end` on become zeros.
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

// Writes kRows rows that a warp has put into shared memory to rows `first` and on of one head; rows
// from `end` on are left out.
template <typename Element, int kRows, int kCols>
__device__ __forceinline__ void store_rows(Element* to, const Element* from, int64_t row_stride,
                                           int32_t first, int32_t end) {
  using Layout = Swizzle<kCols>;
  constexpr int kRowsAtOnce = 32 / Layout::kGroup;
  const int chunk = threadIdx.x % Layout::kGroup;
#pragma unroll
  for (int i = 0; i < kRows / kRowsAtOnce; ++i) {
    const int row = i * kRowsAtOnce + threadIdx.x % 32 / Layout::kGroup;
    if (first + row >= end) continue;
    const uint4* source = reinterpret_cast<const uint4*>(from + Layout::offset(row, chunk));
    uint4* target = reinterpret_cast<uint4*>(to + (first + row) * row_stride + chunk * 8);
#pragma unroll
    for (int group = 0; group < Layout::kGroups; ++group) {
      target[group * Layout::kGroup] = source[group * Layout::kGroup];
    }
  }
}

// Accumulators of 16 rows x 8 kBlocks columns, in kRowTiles pieces: element [m][n] holds rows
// 16 m + l / 4 (and 8 below), columns 8 n + 2 (l % 4) (and the next).
template <int kRowTiles, int kBlocks>
using Accumulator = float[kRowTiles][kBlocks][4];

template <int kRowTiles, int kBlocks>
__device__ __forceinline__ void clear(Accumulator<kRowTiles, kBlocks>& c) {
#pragma unroll
  for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
    for (int n = 0; n < kBlocks; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) c[m][n][e] = 0;
    }
  }
}

// c = a b^T: rows `row` and on of tile `a` with all rows of tile `b`, over kCols.
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

// A warp's rows as the left factor of a product over 16 kSteps.
template <int kRowTiles, int kSteps>
using LeftFactor = uint32_t[kRowTiles][kSteps][4];

// An accumulator has the layout of a left factor but for the rounding.
template <typename Element, int kRowTiles, int kBlocks>
__device__ __forceinline__ void round_to_factor(LeftFactor<kRowTiles, kBlocks / 2>& factor,
                                                const Accumulator<kRowTiles, kBlocks>& c) {
#pragma unroll
  for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
    for (int n = 0; n < kBlocks; ++n) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        factor[m][n / 2][n % 2 * 2 + half] =
            pack<Element>(c[m][n][2 * half], c[m][n][2 * half + 1]);
      }
    }
  }
}

// c += a b: the rows of tile `b` are what is summed over.
template <typename Element, int kCols, int kRowTiles, int kSteps>
__device__ __forceinline__ void multiply_add(Accumulator<kRowTiles, kCols / 8>& c,
                                             const LeftFactor<kRowTiles, kSteps>& a,
                                             const Element* b) {
  using Layout = Swizzle<kCols>;
  const int lane = threadIdx.x % 32;
  const int b_offset = Layout::offset(lane % 16, lane / 16);
#pragma unroll
  for (int k = 0; k < kSteps; ++k) {
#pragma unroll
    for (int n = 0; n < kCols / 8; n += 2) {
      uint32_t columns[4];
      load_matrices_transposed(columns, b + 16 * k * kCols + Layout::advance(b_offset, n / 2));
#pragma unroll
      for (int m = 0; m < kRowTiles; ++m) {
        mma<Element>(c[m][n], a[m][k], columns[0], columns[1]);
        mma<Element>(c[m][n + 1], a[m][k], columns[2], columns[3]);
      }
    }
  }
}

// Rounds a warp's accumulator into a tile of 16 kRowTiles rows in shared memory.
template <typename Element, int kCols, int kRowTiles>
__device__ __forceinline__ void round_to_tile(Element* tile,
                                              const Accumulator<kRowTiles, kCols / 8>& c) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int m = 0; m < kRowTiles; ++m) {
    const int top = 16 * m + lane / 4;
#pragma unroll
    for (int n = 0; n < kCols / 8; ++n) {
      const int column = 2 * (lane % 4);
      *reinterpret_cast<uint32_t*>(tile + Swizzle<kCols>::offset(top, n) + column) =
          pack<Element>(c[m][n][0], c[m][n][1]);
      *reinterpret_cast<uint32_t*>(tile + Swizzle<kCols>::offset(top + 8, n) + column) =
          pack<Element>(c[m][n][2], c[m][n][3]);
    }
  }
}

}  // namespace onepass::cuda::sm80
