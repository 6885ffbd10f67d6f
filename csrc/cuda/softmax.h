// The online softmax of the forward kernels.
#pragma once

#include "scores.h"

namespace onepass::cuda {

// The running maximum and sum of the softmax of a warp's queries. Four lanes share 2 kSlices
// queries: each has its part of every query's sum but, to save registers, the maximum of only one
// query.
template <int kSlices>
struct Softmax {
  float maximum, sum[kSlices][2];

  __device__ __forceinline__ Softmax() : maximum(-INFINITY) {
#pragma unroll
    for (int m = 0; m < kSlices; ++m) sum[m][0] = sum[m][1] = 0;
  }

  __device__ __forceinline__ float maximum_of(int m, int half) const {
    return shuffle(maximum, threadIdx.x % 32 / 4 * 4 + 2 * m + half);
  }

  // Passes the probabilities of scores (in units of 1 / factor), not yet divided by the query's
  // sum, to `take(m, n, half, left, right)`, two columns at a time; `rescale` is the factor that
  // brings earlier output to the new maximum.
  template <int kBlocks, typename Take>
  __device__ __forceinline__ void exponentiate(const Accumulator<kSlices, kBlocks>& scores,
                                               float factor, float (&rescale)[kSlices][2],
                                               const Take& take) {
#pragma unroll
    for (int m = 0; m < kSlices; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float before = maximum_of(m, half);
        float highest = before;
#pragma unroll
        for (int n = 0; n < kBlocks; ++n) {
          highest = fmaxf(highest, fmaxf(scores[m][n][2 * half], scores[m][n][2 * half + 1]));
        }
        highest = fmaxf(highest, shuffle_xor(highest, 1));
        highest = fmaxf(highest, shuffle_xor(highest, 2));
        // A query that has seen no key yet: any finite maximum gives it probabilities of 0.
        const float offset = highest == -INFINITY ? 0.0f : highest * factor;
        rescale[m][half] = fast_exp2(before * factor - offset);
        if (threadIdx.x % 4 == 2 * m + half) maximum = highest;
        float total = sum[m][half] * rescale[m][half];
#pragma unroll
        for (int n = 0; n < kBlocks; ++n) {
          const float left = fast_exp2(scores[m][n][2 * half] * factor - offset);
          const float right = fast_exp2(scores[m][n][2 * half + 1] * factor - offset);
          total += left + right;
          take(m, n, half, left, right);
        }
        sum[m][half] = total;
      }
    }
  }

  template <int kOutBlocks>
  __device__ __forceinline__ void rescale_out(Accumulator<kSlices, kOutBlocks>& out,
                                              const float (&rescale)[kSlices][2]) const {
#pragma unroll
    for (int m = 0; m < kSlices; ++m) {
#pragma unroll
      for (int n = 0; n < kOutBlocks; ++n) {
#pragma unroll
        for (int e = 0; e < 4; ++e) out[m][n][e] *= rescale[m][e / 2];
      }
    }
  }

  // Normalizes one query of `out` and returns its log-sum-exp (natural logarithm). The sink is one
  // more score without a value.
  template <int kOutBlocks>
  __device__ __forceinline__ float finish(Accumulator<kSlices, kOutBlocks>& out, int m, int half,
                                          float factor, const float* sink) {
    float total = sum[m][half];
    total += shuffle_xor(total, 1);
    total += shuffle_xor(total, 2);
    const float highest = maximum_of(m, half) * factor;
    const float sink_score = sink != nullptr ? *sink * kLog2E : -INFINITY;
    const float offset = fmaxf(highest, sink_score);
    const float rescale = fast_exp2(highest - offset);
    total = total * rescale + fast_exp2(sink_score - offset);
    const float normalize = rescale / total;
#pragma unroll
    for (int n = 0; n < kOutBlocks; ++n) {
      out[m][n][2 * half] *= normalize;
      out[m][n][2 * half + 1] *= normalize;
    }
    return (offset + log2f(total)) * kLn2;
  }
};

}  // namespace onepass::cuda
