// Small matrix products with register blocking: each element of A is broadcast against vectors of
// B.
#pragma once

#include "simd.h"

namespace onepass::cpu::ONEPASS_VARIANT {

// A (m, k) is given by two strides, so it may be read transposed. B (k, n) and C (m, n) are
// contiguous in n.
template <typename T>
struct MatrixA {
  const T* data;
  int64_t m_stride, k_stride;

  MatrixA transposed() const { return {data, k_stride, m_stride}; }
};

// Tokens [begin, begin + count) of one head: in place, or widened into `copy` (count, width). A
// product reads A too few times for a copy to pay off where no widening is needed.
template <typename Storage, typename T>
MatrixA<T> tokens_of(const Tensor& tensor, int64_t b, int64_t h, int64_t begin, int count,
                     int64_t width, T* copy) {
  if constexpr (std::is_same_v<Storage, T>) {
    return {token_of<Storage>(tensor, b, h, begin), tensor.seq_stride, 1};
  } else {
    load_tokens<Storage, T>(tensor, b, h, begin, count, width, T(1), copy, width);
    return {copy, width, 1};
  }
}

// Sums from zero and adds to C once: over many products, that rounds less than one long sum.
template <typename T, int kM, int kVecs, bool kAccumulate>
ONEPASS_INLINE void gemm_block(int depth, MatrixA<T> a, const T* b, int64_t ldb, T* c,
                               int64_t ldc) {
  constexpr int lanes = Simd<T>::lanes;
  Vec<T> sum[kM][kVecs] = {};
  for (int k = 0; k < depth; ++k) {
    Vec<T> column[kVecs];
#pragma GCC unroll 4
    for (int v = 0; v < kVecs; ++v) column[v] = load(b + k * ldb + v * lanes);
#pragma GCC unroll 16
    for (int i = 0; i < kM; ++i) {
      const Vec<T> x = broadcast(a.data[i * a.m_stride + k * a.k_stride]);
#pragma GCC unroll 4
      for (int v = 0; v < kVecs; ++v) sum[i][v] += x * column[v];
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < kM; ++i) {
#pragma GCC unroll 4
    for (int v = 0; v < kVecs; ++v) {
      T* to = c + i * ldc + v * lanes;
      store(to, kAccumulate ? load(to) + sum[i][v] : sum[i][v]);
    }
  }
}

template <typename T, int kVecs, bool kAccumulate>
void gemm_columns(int64_t m, int depth, MatrixA<T> a, const T* b, int64_t ldb, T* c, int64_t ldc) {
  int64_t i = 0;
  for (; i + ONEPASS_GEMM_M <= m; i += ONEPASS_GEMM_M) {
    gemm_block<T, ONEPASS_GEMM_M, kVecs, kAccumulate>(depth, a, b, ldb, c, ldc);
    a.data += ONEPASS_GEMM_M * a.m_stride;
    c += ONEPASS_GEMM_M * ldc;
  }
  for (; i < m; ++i, a.data += a.m_stride, c += ldc) {
    gemm_block<T, 1, kVecs, kAccumulate>(depth, a, b, ldb, c, ldc);
  }
}

// C (m, n) = A (m, depth) B (depth, n), or += ; n is a multiple of the vector length.
template <bool kAccumulate, typename T>
void gemm(int64_t m, int64_t n, int depth, MatrixA<T> a, const T* b, int64_t ldb, T* c,
          int64_t ldc) {
  constexpr int lanes = Simd<T>::lanes;
  int64_t v = 0;
  for (; v + ONEPASS_GEMM_VECS * lanes <= n; v += ONEPASS_GEMM_VECS * lanes) {
    gemm_columns<T, ONEPASS_GEMM_VECS, kAccumulate>(m, depth, a, b + v, ldb, c + v, ldc);
  }
  for (; v < n; v += lanes) {
    gemm_columns<T, 1, kAccumulate>(m, depth, a, b + v, ldb, c + v, ldc);
  }
}

// Whether a product with (m, k) of a matrix can be masked by zeros: 0 * NaN is not 0.
template <typename T>
bool all_finite(MatrixA<T> x, int m, int64_t k) {
  constexpr int lanes = Simd<T>::lanes;
  Vec<T> sums{};  // 0, or NaN once an element is not finite
  T sum = 0;
  for (int i = 0; i < m; ++i, x.data += x.m_stride) {
    int64_t j = 0;
    for (; j + lanes <= k; j += lanes) sums += load(x.data + j) * 0;
    for (; j < k; ++j) sum += x.data[j] * 0;
  }
  for (int lane = 0; lane < lanes; ++lane) sum += sums[lane];
  return sum == 0;
}

}  // namespace onepass::cpu::ONEPASS_VARIANT
