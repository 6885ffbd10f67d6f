// Fixed-width SIMD through the vector extensions of GCC and Clang, and the element types of the
// kernels. Included only by variant_*.cpp, inside the namespace of an instruction set.
#pragma once

#include <cmath>
#include <cstdint>
#include <type_traits>

#include "params.h"

namespace onepass::cpu::ONEPASS_VARIANT {

template <typename T>
struct Simd;

#define ONEPASS_SIMD(FLOAT, INT)                                                               \
  template <>                                                                                  \
  struct Simd<FLOAT> {                                                                         \
    using Int = INT;                                                                           \
    static constexpr int lanes = ONEPASS_VECTOR_BYTES / sizeof(FLOAT);                         \
    typedef FLOAT Vec __attribute__((vector_size(ONEPASS_VECTOR_BYTES)));                      \
    typedef INT IntVec __attribute__((vector_size(ONEPASS_VECTOR_BYTES)));                     \
    typedef FLOAT Memory                                                                       \
        __attribute__((vector_size(ONEPASS_VECTOR_BYTES), aligned(sizeof(FLOAT)), may_alias)); \
    typedef INT IntMemory                                                                      \
        __attribute__((vector_size(ONEPASS_VECTOR_BYTES), aligned(sizeof(INT)), may_alias));   \
  };
ONEPASS_SIMD(float, int32_t)
ONEPASS_SIMD(double, int64_t)
#undef ONEPASS_SIMD

template <typename T>
using Vec = typename Simd<T>::Vec;
template <typename T>
using IntVec = typename Simd<T>::IntVec;
template <typename T>
using Int = typename Simd<T>::Int;

template <typename T>
ONEPASS_INLINE Vec<T> load(const T* p) {
  return *reinterpret_cast<const typename Simd<T>::Memory*>(p);
}
template <typename T>
ONEPASS_INLINE void store(T* p, Vec<T> x) {
  *reinterpret_cast<typename Simd<T>::Memory*>(p) = x;
}
template <typename T>
ONEPASS_INLINE IntVec<T> load_int(const Int<T>* p) {
  return *reinterpret_cast<const typename Simd<T>::IntMemory*>(p);
}
// x - 0 is x even for -0; x + 0 would cost an addition per broadcast, with vectors of 512 bits on
// the ports of the products.
template <typename T>
ONEPASS_INLINE Vec<T> broadcast(T x) {
  return x - Vec<T>{};
}
// A NaN in `b` never replaces `a`; a NaN in `a` stays.
template <typename T>
ONEPASS_INLINE Vec<T> max(Vec<T> a, Vec<T> b) {
  return b > a ? b : a;
}

// exp(x) within 2 units in the last place: 2^n * e^r, |r| <= ln(2)/2, the polynomial of Cephes'
// expf. Exactly 0 below the smallest normal result; NaN gives NaN.
ONEPASS_INLINE Vec<float> exp(Vec<float> x) {
  using V = Vec<float>;
  const V lowest = broadcast(-87.33654f), highest = broadcast(88.37626f);
  const V y = x > highest ? highest : x;
  const V magic = broadcast(12582912.0f);  // 1.5 * 2^23: adding it rounds to the nearest integer
  const V n = (y * 1.44269504f + magic) - magic;
  const V r = (y - n * 0.693359375f) + n * 2.12194440e-4f;
  V p = broadcast(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + (r + 1.0f);
  // The low bits of n + 127 + magic are the integer n + 127: shifted into the exponent they are
  // 2^n.
  const V power = reinterpret_cast<V>(reinterpret_cast<IntVec<float>>(n + (magic + 127.0f)) << 23);
  const V result = p * power;
  return x < lowest ? V{} : result;
}
ONEPASS_INLINE Vec<double> exp(Vec<double> x) {
  for (int i = 0; i < Simd<double>::lanes; ++i) x[i] = ::exp(x[i]);
  return x;
}

// tanh(x), by Cephes' odd polynomial near 0, where 1 - 2 / (e^2x + 1) would cancel.
ONEPASS_INLINE Vec<float> tanh(Vec<float> x) {
  using V = Vec<float>;
  const V z = x * x;
  V p = broadcast(-5.70498872745e-3f);
  p = p * z + 2.06390887954e-2f;
  p = p * z - 5.37397155531e-2f;
  p = p * z + 1.33314422036e-1f;
  p = p * z - 3.33332819422e-1f;
  const V small = p * z * x + x;
  const V large = 1.0f - 2.0f / (exp(x + x) + 1.0f);
  return z < 0.390625f ? small : large;
}
ONEPASS_INLINE Vec<double> tanh(Vec<double> x) {
  for (int i = 0; i < Simd<double>::lanes; ++i) x[i] = ::tanh(x[i]);
  return x;
}

struct BFloat16 {
  uint16_t bits;
};

// Storage type to accumulation type and back (round to nearest even).
template <typename T>
ONEPASS_INLINE T widen(T x) {
  return x;
}
template <typename T>
ONEPASS_INLINE T widen(BFloat16 x) {
  const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
  return __builtin_bit_cast(float, bits);
}
template <typename Storage, typename T>
struct Narrow {
  static ONEPASS_INLINE Storage from(T x) { return x; }
};
template <>
struct Narrow<BFloat16, float> {
  static ONEPASS_INLINE BFloat16 from(float x) {
    const uint32_t bits = __builtin_bit_cast(uint32_t, x);
    const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    return {static_cast<uint16_t>(x != x ? 0x7fc0 : rounded)};
  }
};

constexpr int64_t round_up(int64_t x, int64_t multiple) {
  return (x + multiple - 1) / multiple * multiple;
}

// Divides a task's scratch into aligned arrays; without memory it only measures.
struct Scratch {
  char* memory;
  int64_t bytes = 0;

  template <typename T>
  T* take(int64_t count) {
    T* result = reinterpret_cast<T*>(memory + bytes);
    bytes += round_up(count * static_cast<int64_t>(sizeof(T)), 64);
    return result;
  }
};

template <typename Storage>
ONEPASS_INLINE const Storage* token_of(const Tensor& tensor, int64_t b, int64_t h, int64_t token) {
  return static_cast<const Storage*>(tensor.data) + b * tensor.batch_stride +
         h * tensor.head_stride + token * tensor.seq_stride;
}

// Tokens [begin, begin + count) of one head, widened into a dense (count, width) array padded with
// zeros; times `scale`.
template <typename Storage, typename T>
void load_tokens(const Tensor& tensor, int64_t b, int64_t h, int64_t begin, int count,
                 int64_t columns, T scale, T* to, int64_t width) {
  const Storage* from = token_of<Storage>(tensor, b, h, begin);
  for (int i = 0; i < count; ++i, from += tensor.seq_stride, to += width) {
    for (int64_t c = 0; c < columns; ++c) to[c] = widen<T>(from[c]) * scale;
    for (int64_t c = columns; c < width; ++c) to[c] = 0;
  }
}

// The same tokens transposed: (columns, kTile), lanes beyond `count` zero.
template <typename Storage, typename T>
void load_transposed(const Tensor& tensor, int64_t b, int64_t h, int64_t begin, int count,
                     int64_t columns, T scale, T* to) {
  const Storage* from = token_of<Storage>(tensor, b, h, begin);
  for (int64_t c = 0; c < columns; ++c) {
    for (int lane = 0; lane < count; ++lane)
      to[c * kTile + lane] = widen<T>(from[lane * tensor.seq_stride + c]) * scale;
    for (int lane = count; lane < kTile; ++lane) to[c * kTile + lane] = 0;
  }
}

// The transpose of a (columns, kTile) array, each lane times its own factor, into tokens of one
// head.
template <typename Storage, typename T>
void store_transposed(const Tensor& tensor, int64_t b, int64_t h, int64_t begin, int count,
                      int64_t columns, const T* from, const T* factor) {
  Storage* to = static_cast<Storage*>(tensor.data) + b * tensor.batch_stride +
                h * tensor.head_stride + begin * tensor.seq_stride;
  for (int lane = 0; lane < count; ++lane) {
    for (int64_t c = 0; c < columns; ++c) {
      to[lane * tensor.seq_stride + c] =
          Narrow<Storage, T>::from(from[c * kTile + lane] * factor[lane]);
    }
  }
}

}  // namespace onepass::cpu::ONEPASS_VARIANT
