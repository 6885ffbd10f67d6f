// Small matrix products with register blocking: each element of A is broadcast against vectors of
// B.
#pragma once

#include "simd.h"

namespace onepass::cpu::ONEPASS_VARIANT {

// A is given by two strides, so it may be read transposed. B and C are row-major.
template <typename T>
struct MatrixA {
  const T* data;
  int64_t row_stride, depth_stride;

  MatrixA transposed() const { return {data, depth_stride, row_stride}; }
};

// Rows [begin, begin + rows) of one head: in place, or widened into `copy` (rows, columns). A
// product reads A too few times for a copy to pay off where no widening is needed.
template <typename Storage, typename T>
MatrixA<T> rows_of(const Tensor& tensor, int64_t b, int64_t h, int64_t begin, int rows,
                   int64_t columns, T* copy) {
  if constexpr (std::is_same_v<Storage, T>) {
    return {row_of<Storage>(tensor, b, h, begin), tensor.seq_stride, 1};
  } else {
    load_rows<Storage, T>(tensor, b, h, begin, rows, columns, T(1), copy, columns);
    return {copy, columns, 1};
  }
}

// Sums from zero and adds to C once: over many products, that rounds less than one long sum.
template <typename T, int kRows, int kVecs, bool kAccumulate>
ONEPASS_INLINE void gemm_block(int depth, MatrixA<T> a, const T* b, int64_t ldb, T* c,
                               int64_t ldc) {
  constexpr int lanes = Simd<T>::lanes;
  Vec<T> sum[kRows][kVecs] = {};
  for (int k = 0; k < depth; ++k) {
    Vec<T> column[kVecs];
#pragma GCC unroll 4
    for (int v = 0; v < kVecs; ++v) column[v] = load(b + k * ldb + v * lanes);
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
      const Vec<T> x = broadcast(a.data[r * a.row_stride + k * a.depth_stride]);
#pragma GCC unroll 4
      for (int v = 0; v < kVecs; ++v) sum[r][v] += x * column[v];
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < kVecs; ++v) {
      T* to = c + r * ldc + v * lanes;
      store(to, kAccumulate ? load(to) + sum[r][v] : sum[r][v]);
    }
  }
}

template <typename T, int kVecs, bool kAccumulate>
void gemm_columns(int64_t rows, int depth, MatrixA<T> a, const T* b, int64_t ldb, T* c,
                  int64_t ldc) {
  int64_t r = 0;
  for (; r + ONEPASS_GEMM_ROWS <= rows; r += ONEPASS_GEMM_ROWS) {
    gemm_block<T, ONEPASS_GEMM_ROWS, kVecs, kAccumulate>(depth, a, b, ldb, c, ldc);
    a.data += ONEPASS_GEMM_ROWS * a.row_stride;
    c += ONEPASS_GEMM_ROWS * ldc;
  }
  for (; r < rows; ++r, a.data += a.row_stride, c += ldc) {
    gemm_block<T, 1, kVecs, kAccumulate>(depth, a, b, ldb, c, ldc);
  }
}

// C (rows, columns) = A (rows, depth) B (depth, columns), or += ; `columns` is a multiple of the
// vector length.
template <bool kAccumulate, typename T>
void gemm(int64_t rows, int64_t columns, int depth, MatrixA<T> a, const T* b, int64_t ldb, T* c,
          int64_t ldc) {
  constexpr int lanes = Simd<T>::lanes;
  int64_t v = 0;
  for (; v + ONEPASS_GEMM_VECS * lanes <= columns; v += ONEPASS_GEMM_VECS * lanes) {
    gemm_columns<T, ONEPASS_GEMM_VECS, kAccumulate>(rows, depth, a, b + v, ldb, c + v, ldc);
  }
  for (; v < columns; v += lanes) {
    gemm_columns<T, 1, kAccumulate>(rows, depth, a, b + v, ldb, c + v, ldc);
  }
}

}  // namespace onepass::cpu::ONEPASS_VARIANT
