// How products of queries and keys become scores: scale, softcap and mask, element by element.
#pragma once

#include "accumulator.h"
#include "plan.h"

namespace onepass::cuda {

constexpr float kLog2E = 1.4426950408889634f;
constexpr float kLn2 = 0.6931471805599453f;

// Turns a product q k into a score in units of log2, in which the softmax is computed: the score is
// `capped(product)` times `factor`.
struct ScoreScale {
  float scale, softcap, factor;

  __device__ __forceinline__ explicit ScoreScale(const Scoring<float>& scoring)
      : scale(scoring.scale),
        softcap(scoring.softcap),
        factor(kLog2E * (scoring.softcap > 0 ? scoring.softcap : scoring.scale)) {}

  __device__ __forceinline__ bool capped() const { return softcap != 0; }

  template <int kSlices, int kBlocks>
  __device__ __forceinline__ void cap(Accumulator<kSlices, kBlocks>& products) const {
    if (!capped()) return;
    const float inner = scale / softcap;
#pragma unroll
    for (int m = 0; m < kSlices; ++m) {
#pragma unroll
      for (int n = 0; n < kBlocks; ++n) {
#pragma unroll
        for (int e = 0; e < 4; ++e) products[m][n][e] = fast_tanh(products[m][n][e] * inner);
      }
    }
  }

  // d score / d (scale * product), of a capped product; 1 without a softcap.
  __device__ __forceinline__ static float derivative(float capped) {
    const float finite = fmaxf(capped, -1.0f);  // of a masked product, which is -inf
    return 1.0f - finite * finite;
  }
};

// What masks read: one number for each of kTokens consecutive tokens, spread over the lanes, so
// that every lane can get any of them.
template <int kTokens>
struct TileValues {
  int32_t values[kTokens / 32];

  TileValues() = default;
  __device__ __forceinline__ TileValues(const int32_t* of_row, int32_t first, int32_t seq) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int i = 0; i < kTokens / 32; ++i) {
      // Beyond the row: an end that no query is before, and an arbitrary position.
      const int32_t token = first + 32 * i + lane;
      values[i] = token < seq ? of_row[token] : 0;
    }
  }

  // Of the token in column `column` of block n of an accumulator.
  __device__ __forceinline__ int32_t of_column(int n, int column) const {
    return shuffle(values[n / 4], 8 * (n % 4) + 2 * (threadIdx.x % 4) + column);
  }
};

template <int kKeys>
__device__ __forceinline__ TileValues<kKeys> ends_of_keys(const Params& params, int32_t b,
                                                          int32_t first_key) {
  const int64_t row_begin = static_cast<int64_t>(b) * params.seq;
  return {params.visible_end + row_begin, first_key, params.seq};
}

// Of the queries from `first_query` (of the warp) and the keys of a tile, with their `ends`: the
// score of a key that a query does not see becomes -inf.
template <int kSlices, int kBlocks>
__device__ __forceinline__ void mask_keys(Accumulator<kSlices, kBlocks>& scores,
                                          const TileValues<8 * kBlocks>& ends, const Params& params,
                                          int32_t b, int32_t first_query, int32_t first_key) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int n = 0; n < kBlocks; ++n) {
#pragma unroll
    for (int column = 0; column < 2; ++column) {
      const int32_t key = first_key + 8 * n + 2 * (lane % 4) + column;
      const int32_t end = ends.of_column(n, column);
#pragma unroll
      for (int i = 0; i < 2 * kSlices; ++i) {
        const int32_t query = first_query + 8 * i + lane / 4;
        if (!visible(query, key, end)) scores[i / 2][n][i % 2 * 2 + column] = -INFINITY;
      }
    }
  }
  if (params.scoring.window == 0) return;
  const int32_t seq = params.seq;
  const int64_t row_begin = static_cast<int64_t>(b) * seq;
  const TileValues<8 * kBlocks> positions(params.positions + row_begin, first_key, seq);
  int32_t query_positions[2 * kSlices];
#pragma unroll
  for (int i = 0; i < 2 * kSlices; ++i) {
    const int32_t query = min_of(first_query + 8 * i + lane / 4, seq - 1);
    query_positions[i] = params.positions[row_begin + query];
  }
#pragma unroll
  for (int n = 0; n < kBlocks; ++n) {
#pragma unroll
    for (int column = 0; column < 2; ++column) {
      const int32_t position = positions.of_column(n, column);
#pragma unroll
      for (int i = 0; i < 2 * kSlices; ++i) {
        if (!in_window(query_positions[i], position, params.scoring.window)) {
          scores[i / 2][n][i % 2 * 2 + column] = -INFINITY;
        }
      }
    }
  }
}

// The same for 16 keys and the queries of a tile.
template <int kBlocks>
__device__ __forceinline__ void mask_queries(Accumulator<1, kBlocks>& scores, const Params& params,
                                             int32_t b, int32_t first_key, int32_t first_query) {
  const int lane = threadIdx.x % 32;
  const int32_t seq = params.seq;
  const int64_t row_begin = static_cast<int64_t>(b) * seq;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int32_t key = first_key + 8 * half + lane / 4;
    const int32_t end = key < seq ? params.visible_end[row_begin + key] : 0;
#pragma unroll
    for (int n = 0; n < kBlocks; ++n) {
#pragma unroll
      for (int column = 0; column < 2; ++column) {
        const int32_t query = first_query + 8 * n + 2 * (lane % 4) + column;
        if (!visible(query, key, end)) scores[0][n][2 * half + column] = -INFINITY;
      }
    }
  }
  if (params.scoring.window == 0) return;
  const TileValues<8 * kBlocks> positions(params.positions + row_begin, first_query, seq);
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int32_t key = min_of(first_key + 8 * half + lane / 4, seq - 1);
    const int32_t key_position = params.positions[row_begin + key];
#pragma unroll
    for (int n = 0; n < kBlocks; ++n) {
#pragma unroll
      for (int column = 0; column < 2; ++column) {
        if (!in_window(positions.of_column(n, column), key_position, params.scoring.window)) {
          scores[0][n][2 * half + column] = -INFINITY;
        }
      }
    }
  }
}

// Turns the products of queries from `first_query` (of the warp) and the keys of a tile into
// scores, in units of 1 / `score_scale.factor`; masks them unless the queries see all keys
// (`full`).
template <int kSlices, int kBlocks>
__device__ __forceinline__ void score_keys(Accumulator<kSlices, kBlocks>& products,
                                           const ScoreScale& score_scale, const Params& params,
                                           int32_t b, int32_t first_query, int32_t first_key,
                                           bool full) {
  score_scale.cap(products);
  if (full) return;
  mask_keys(products, ends_of_keys<8 * kBlocks>(params, b, first_key), params, b, first_query,
            first_key);
}

// The same for 16 keys and the queries of a tile.
template <int kBlocks>
__device__ __forceinline__ void score_queries(Accumulator<1, kBlocks>& products,
                                              const ScoreScale& score_scale, const Params& params,
                                              int32_t b, int32_t first_key, int32_t first_query,
                                              bool full) {
  score_scale.cap(products);
  if (!full) mask_queries(products, params, b, first_key, first_query);
}

}  // namespace onepass::cuda
