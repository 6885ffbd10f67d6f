// The tokens of a head in global memory, and where a warp stores them in shared memory to write
// them.
#pragma once

#include "accumulator.h"
#include "plan.h"

namespace onepass::cuda {

// The number of a head in (batch, heads).
__device__ __forceinline__ int64_t index_of_head(const Params& params, int32_t b, int32_t head) {
  return static_cast<int64_t>(b) * params.heads + head;
}

// The number of a query in (batch, heads, padded_seq), the shape of the backward pass's scratch.
__device__ __forceinline__ int64_t padded_index(const Params& params, int32_t b, int32_t head,
                                                int32_t query) {
  return index_of_head(params, b, head) * padded(recomputed(params.seq)) + query;
}

template <typename Element>
__device__ __forceinline__ Element* head_of(const Tensor& tensor, int32_t b, int32_t head) {
  return static_cast<Element*>(tensor.data) + b * tensor.batch_stride + head * tensor.head_stride;
}

// The offset, in elements, of the 16-byte chunk (token, chunk) in a tile of tokens with kCols
// elements each. Chunks are permuted within groups of eight (or four) of their token, so that the
// eight rows of a matrix that ldmatrix reads are in different banks.
template <int kCols>
struct Swizzle {
  static_assert(kCols % 32 == 0, "a token has a multiple of 64 bytes");
  static constexpr int kGroup = kCols % 64 == 0 ? 8 : 4;
  static constexpr int kGroups = kCols / 8 / kGroup;

  static __device__ __forceinline__ int offset(int token, int chunk) {
    const int key = kGroup == 8 ? token & 7 : (token >> 1) & 3;
    return token * kCols + (chunk ^ key) * 8;
  }

  // The offset of chunk `chunk + 2 pairs` of the same token, given that of an even `chunk` or the
  // one after it below kGroup: the part of an offset that changes in each step of a product loop.
  static __device__ __forceinline__ int advance(int offset, int pairs) {
    constexpr int kPairs = kGroup / 2;
    return (offset ^ (pairs % kPairs * 16)) + pairs / kPairs * kGroup * 8;
  }
};

// Rounds a warp's accumulator into a tile of 16 kSlices tokens in shared memory.
template <typename Element, int kCols, int kSlices>
__device__ __forceinline__ void round_to_tile(Element* tile,
                                              const Accumulator<kSlices, kCols / 8>& c) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int m = 0; m < kSlices; ++m) {
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

// Writes kTokens tokens that a warp has stored in shared memory to one head, starting at token
// `first`; tokens from `end` on are left out.
template <typename Element, int kTokens, int kCols>
__device__ __forceinline__ void store_tokens(Element* to, const Element* from, int64_t seq_stride,
                                             int32_t first, int32_t end) {
  using Layout = Swizzle<kCols>;
  constexpr int kTokensAtOnce = 32 / Layout::kGroup;
  const int chunk = threadIdx.x % Layout::kGroup;
#pragma unroll
  for (int i = 0; i < kTokens / kTokensAtOnce; ++i) {
    const int token = i * kTokensAtOnce + threadIdx.x % 32 / Layout::kGroup;
    if (first + token >= end) continue;
    const uint4* source = reinterpret_cast<const uint4*>(from + Layout::offset(token, chunk));
    uint4* target = reinterpret_cast<uint4*>(to + (first + token) * seq_stride + chunk * 8);
#pragma unroll
    for (int group = 0; group < Layout::kGroups; ++group) {
      target[group * Layout::kGroup] = source[group * Layout::kGroup];
    }
  }
}

}  // namespace onepass::cuda
