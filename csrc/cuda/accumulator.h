// What the threads of a warp hold of 16-token slices: accumulators of products, and left factors of
// others. mma.sync and wgmma use the same layout for both.
#pragma once

#include "instructions.h"

namespace onepass::cuda {

// Accumulators of kSlices x 16 tokens and 8 kBlocks columns: element [m][n] holds tokens
// 16 m + l / 4 (and 8 below), columns 8 n + 2 (l % 4) (and the next).
template <int kSlices, int kBlocks>
using Accumulator = float[kSlices][kBlocks][4];

template <int kSlices, int kBlocks>
__device__ __forceinline__ void clear(Accumulator<kSlices, kBlocks>& c) {
#pragma unroll
  for (int m = 0; m < kSlices; ++m) {
#pragma unroll
    for (int n = 0; n < kBlocks; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) c[m][n][e] = 0;
    }
  }
}

// A warp's tokens as the left factor of a product over 16 kSteps.
template <int kSlices, int kSteps>
using LeftFactor = uint32_t[kSlices][kSteps][4];

// An accumulator has the layout of a left factor, except for the rounding.
template <typename Element, int kSlices, int kBlocks>
__device__ __forceinline__ void round_to_factor(LeftFactor<kSlices, kBlocks / 2>& factor,
                                                const Accumulator<kSlices, kBlocks>& c) {
#pragma unroll
  for (int m = 0; m < kSlices; ++m) {
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

// The elementwise product of two accumulators, as a left factor.
template <typename Element, int kBlocks>
__device__ __forceinline__ void round_product_to_factor(LeftFactor<1, kBlocks / 2>& factor,
                                                        const Accumulator<1, kBlocks>& a,
                                                        const Accumulator<1, kBlocks>& b) {
#pragma unroll
  for (int n = 0; n < kBlocks; ++n) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int e = 2 * half;
      factor[0][n / 2][n % 2 * 2 + half] =
          pack<Element>(a[0][n][e] * b[0][n][e], a[0][n][e + 1] * b[0][n][e + 1]);
    }
  }
}

template <int kBlocks>
__device__ __forceinline__ void multiply_by(Accumulator<1, kBlocks>& c, float factor) {
#pragma unroll
  for (int n = 0; n < kBlocks; ++n) {
#pragma unroll
    for (int e = 0; e < 4; ++e) c[0][n][e] *= factor;
  }
}

}  // namespace onepass::cuda
