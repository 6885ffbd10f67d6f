// Scores: softcap, and the mask of partial tiles, element by element.
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

  __device__ __forceinline__ explicit ScoreScale(const Params& params)
      : scale(params.scale),
        softcap(params.softcap),
        factor(kLog2E * (params.softcap > 0 ? params.softcap : params.scale)) {}

  template <int kRowTiles, int kBlocks>
  __device__ __forceinline__ void cap(Accumulator<kRowTiles, kBlocks>& products) const {
    if (softcap == 0) return;
    const float inner = scale / softcap;
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m) {
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

// Rows are queries from `first_query` (of the warp), columns the keys of a tile: a key that a query
// does not see gets -inf.
template <int kRowTiles, int kBlocks>
__device__ __forceinline__ void mask_keys(Accumulator<kRowTiles, kBlocks>& scores,
                                          const Params& params, int32_t row, int32_t first_query,
                                          int32_t first_key) {
  const int lane = threadIdx.x % 32;
  const int32_t seq = params.seq;
  const int64_t of_row = static_cast<int64_t>(row) * seq;
  const TileValues<8 * kBlocks> ends(params.visible_end + of_row, first_key, seq);
#pragma unroll
  for (int n = 0; n < kBlocks; ++n) {
#pragma unroll
    for (int column = 0; column < 2; ++column) {
      const int32_t key = first_key + 8 * n + 2 * (lane % 4) + column;
      const int32_t end = ends.of_column(n, column);
#pragma unroll
      for (int i = 0; i < 2 * kRowTiles; ++i) {
        const int32_t query = first_query + 8 * i + lane / 4;
        if (!visible(query, key, end)) scores[i / 2][n][i % 2 * 2 + column] = -INFINITY;
      }
    }
  }
  if (params.window == 0) return;
  const TileValues<8 * kBlocks> positions(params.positions + of_row, first_key, seq);
  int32_t query_positions[2 * kRowTiles];
#pragma unroll
  for (int i = 0; i < 2 * kRowTiles; ++i) {
    const int32_t query = min_of(first_query + 8 * i + lane / 4, seq - 1);
    query_positions[i] = params.positions[of_row + query];
  }
#pragma unroll
  for (int n = 0; n < kBlocks; ++n) {
#pragma unroll
    for (int column = 0; column < 2; ++column) {
      const int32_t position = positions.of_column(n, column);
#pragma unroll
      for (int i = 0; i < 2 * kRowTiles; ++i) {
        if (!in_window(query_positions[i], position, params.window)) {
          scores[i / 2][n][i % 2 * 2 + column] = -INFINITY;
        }
      }
    }
  }
}

// The same with 16 keys as rows and the queries of a tile as columns.
template <int kBlocks>
__device__ __forceinline__ void mask_queries(Accumulator<1, kBlocks>& scores, const Params& params,
                                             int32_t row, int32_t first_key, int32_t first_query) {
  const int lane = threadIdx.x % 32;
  const int32_t seq = params.seq;
  const int64_t of_row = static_cast<int64_t>(row) * seq;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int32_t key = first_key + 8 * half + lane / 4;
    const int32_t end = key < seq ? params.visible_end[of_row + key] : 0;
#pragma unroll
    for (int n = 0; n < kBlocks; ++n) {
#pragma unroll
      for (int column = 0; column < 2; ++column) {
        const int32_t query = first_query + 8 * n + 2 * (lane % 4) + column;
        if (!visible(query, key, end)) scores[0][n][2 * half + column] = -INFINITY;
      }
    }
  }
  if (params.window == 0) return;
  const TileValues<8 * kBlocks> positions(params.positions + of_row, first_query, seq);
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int32_t key = min_of(first_key + 8 * half + lane / 4, seq - 1);
    const int32_t key_position = params.positions[of_row + key];
#pragma unroll
    for (int n = 0; n < kBlocks; ++n) {
#pragma unroll
      for (int column = 0; column < 2; ++column) {
        if (!in_window(positions.of_column(n, column), key_position, params.window)) {
          scores[0][n][2 * half + column] = -INFINITY;
        }
      }
    }
  }
}

}  // namespace onepass::cuda
