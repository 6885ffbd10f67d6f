// Forward: a task is one tile of queries of one head. A vector lane holds one query, so the online
// softmax (running maximum and sum per query) needs no cross-lane reduction, and K and V no
// transpose:
//   scores (keys, lanes) = K Q^T,  acc (d_v, lanes) += V^T exp(scores - max).
// The task walks the visible blocks of keys, up to kChunkBlocks adjacent ones per softmax step.
#pragma once

#include "gemm.h"
#include "scores.h"

namespace onepass::cpu::ONEPASS_VARIANT {

// The queries of a task, and the state of their softmax.
template <typename T>
struct ForwardTile {
  T* queries;     // (d_qk, kTile), scaled
  T* keys;        // (chunk, d_qk), widened from a narrower storage type
  T* values;      // (chunk, d_v), likewise
  T* scores;      // (chunk, kTile)
  T* acc;         // (d_v, kTile)
  T* max;         // (kTile)
  T* sum;         // (kTile)
  Int<T>* index;  // (kTile)
  Int<T>* position;

  ForwardTile(const Params& p, Scratch& scratch) {
    constexpr int chunk = kChunkBlocks * kKeyBlock;
    queries = scratch.take<T>(p.d_qk * kTile);
    keys = scratch.take<T>(chunk * p.d_qk);
    values = scratch.take<T>(chunk * p.d_v);
    scores = scratch.take<T>(chunk * kTile);
    acc = scratch.take<T>(p.d_v * kTile);
    max = scratch.take<T>(kTile);
    sum = scratch.take<T>(kTile);
    index = scratch.take<Int<T>>(kTile);
    position = scratch.take<Int<T>>(kTile);
  }
};

// Which queries see a key.
template <bool kBlocks, typename T>
ONEPASS_INLINE IntVec<T> visible_lanes(const Params& p, const ForwardTile<T>& tile, int64_t b,
                                       int64_t key, int lane) {
  Int<T> begin = key;
  if constexpr (kBlocks) begin = p.visible_begin[b * p.seq + key];
  const Int<T> end = p.visible_end[b * p.seq + key];
  IntVec<T> mask = visible(load_int<T>(tile.index + lane), IntVec<T>{} + begin, IntVec<T>{} + end);
  if (p.scoring.window > 0) {
    const Int<T> position = p.positions[b * p.seq + key];
    mask &= in_window(load_int<T>(tile.position + lane), IntVec<T>{} + position, p.scoring.window);
  }
  return mask;
}

template <bool kBlocks, typename T>
void hide_unseen(const Params& p, const ForwardTile<T>& tile, int64_t b, int64_t key,
                 int num_keys) {
  const Vec<T> unseen = broadcast<T>(-__builtin_inf());
  for (int n = 0; n < num_keys; ++n) {
    for (int lane = 0; lane < kTile; lane += Simd<T>::lanes) {
      T* score = tile.scores + n * kTile + lane;
      store(score, visible_lanes<kBlocks>(p, tile, b, key + n, lane) ? load(score) : unseen);
    }
  }
}

// One online softmax step: scores become probabilities up to the final 1 / sum.
template <typename T>
void softmax_step(const ForwardTile<T>& tile, int num_keys, int64_t d_v) {
  constexpr int lanes = Simd<T>::lanes, vecs = kTile / lanes;
  Vec<T> highest[vecs];
  for (int v = 0; v < vecs; ++v) highest[v] = load(tile.max + v * lanes);
  for (int n = 0; n < num_keys; ++n) {
    for (int v = 0; v < vecs; ++v)
      highest[v] = max<T>(highest[v], load(tile.scores + n * kTile + v * lanes));
  }
  for (int v = 0; v < vecs; ++v) {
    const int lane = v * lanes;
    const Vec<T> old_max = load(tile.max + lane), new_max = highest[v];
    // Until a query has seen a key, all its scores are -inf, of which exp must be 0.
    const Vec<T> origin = new_max == broadcast<T>(-__builtin_inf()) ? Vec<T>{} : new_max;
    Vec<T> sum = Vec<T>{};
    for (int n = 0; n < num_keys; ++n) {
      const Vec<T> probability = exp(load(tile.scores + n * kTile + lane) - origin);
      sum += probability;
      store(tile.scores + n * kTile + lane, probability);
    }
    const Vec<T> decay = exp(old_max - origin);
    store(tile.max + lane, new_max);
    store(tile.sum + lane, load(tile.sum + lane) * decay + sum);
    for (int64_t d = 0; d < d_v; ++d)
      store(tile.acc + d * kTile + lane, load(tile.acc + d * kTile + lane) * decay);
  }
}

// acc += V^T P, where a key that a query does not see must not contribute even 0 * NaN.
template <bool kBlocks, typename T>
void add_values_seen(const Params& p, const ForwardTile<T>& tile, MatrixA<T> values, int64_t b,
                     int64_t key, int num_keys) {
  for (int n = 0; n < num_keys; ++n) {
    for (int lane = 0; lane < kTile; lane += Simd<T>::lanes) {
      const IntVec<T> mask = visible_lanes<kBlocks>(p, tile, b, key + n, lane);
      const Vec<T> probability = load(tile.scores + n * kTile + lane);
      for (int64_t d = 0; d < p.d_v; ++d) {
        T* acc = tile.acc + d * kTile + lane;
        store(acc,
              load(acc) + (mask ? probability * values.data[n * values.m_stride + d] : Vec<T>{}));
      }
    }
  }
}

template <typename Storage, typename T>
void attend(const Params& p, const ForwardTile<T>& tile, int64_t b, int64_t kv_head, int64_t key,
            int num_keys, bool partial) {
  constexpr int lanes = Simd<T>::lanes;
  const auto keys = tokens_of<Storage>(p.k, b, kv_head, key, num_keys, p.d_qk, tile.keys);
  const auto values = tokens_of<Storage>(p.v, b, kv_head, key, num_keys, p.d_v, tile.values);
  gemm<false>(num_keys, kTile, p.d_qk, keys, tile.queries, kTile, tile.scores, kTile);
  const ScoreFunction<T> score_of(p.scoring);
  if (!score_of.is_identity()) {
    for (int i = 0; i < num_keys * kTile; i += lanes) {
      store(tile.scores + i, score_of(load(tile.scores + i)).value);
    }
  }
  // Without blocks, masks don't load begins.
  const bool has_blocks = p.visible_begin != nullptr;
  if (partial) {
    (has_blocks ? hide_unseen<true, T> : hide_unseen<false, T>)(p, tile, b, key, num_keys);
  }
  softmax_step(tile, num_keys, p.d_v);
  if (partial && !all_finite(values, num_keys, p.d_v)) {
    (has_blocks ? add_values_seen<true, T> : add_values_seen<false, T>)(p, tile, values, b, key,
                                                                        num_keys);
  } else {
    gemm<true>(p.d_v, kTile, num_keys, values.transposed(), tile.scores, kTile, tile.acc, kTile);
  }
}

template <typename T>
void start_tile(const Params& p, const ForwardTile<T>& tile, int64_t b, int64_t begin,
                int num_queries) {
  for (int lane = 0; lane < kTile; ++lane) {
    const int64_t query = begin + (lane < num_queries ? lane : num_queries - 1);
    tile.max[lane] = -__builtin_inf();
    tile.sum[lane] = 0;
    tile.index[lane] = query;
    tile.position[lane] = p.scoring.window > 0 ? p.positions[b * p.seq + query] : 0;
  }
  for (int64_t i = 0; i < p.d_v * kTile; ++i) tile.acc[i] = 0;
}

// The logarithm of the softmax's denominator, and by what the accumulated values are multiplied.
struct Denominator {
  double lse, factor;
};

// `sum` is that of exp(score - max). A sink comes last: it may be infinite, and takes all then.
inline Denominator denominator(double max, double sum, const double* sink) {
  const double lse = max + ::log(sum);
  if (sink == nullptr) return {lse, 1 / sum};
  if (lse == -__builtin_inf()) return {*sink, 0};
  const double share = 1 / (1 + ::exp(*sink - lse));  // of the probability, that the keys get
  const double high = lse > *sink ? lse : *sink, low = lse > *sink ? *sink : lse;
  return {high == __builtin_inf() ? high : high + ::log1p(::exp(low - high)), share / sum};
}

template <typename Storage, typename T>
void forward(const Params& p, int64_t task, void* memory) {
  // The last tile first: it sees the most keys.
  const int64_t t = p.num_tiles - 1 - task % p.num_tiles, head = task / p.num_tiles % p.heads;
  const int64_t b = task / p.num_tiles / p.heads, kv_head = head / (p.heads / p.kv_heads);
  const QueryTile queries = query_tile(p.tiles[b * p.num_tiles + t]);
  const int num_queries = queries.last - queries.first + 1;
  Scratch scratch{static_cast<char*>(memory)};
  const ForwardTile<T> tile(p, scratch);
  start_tile(p, tile, b, queries.first, num_queries);
  load_transposed<Storage, T>(p.q, b, head, queries.first, num_queries, p.d_qk, T(p.scoring.scale),
                              tile.queries);

  const KeyTile* blocks = p.key_blocks + b * p.num_blocks;
  int64_t num_blocks = queries.last / kKeyBlock + 1;
  while (num_blocks < p.num_blocks && blocks[num_blocks].min_begin <= queries.last) ++num_blocks;
  for (int64_t block = 0; block < num_blocks;) {
    const int64_t begin = block;
    bool partial = false;
    for (; block < num_blocks && block < begin + kChunkBlocks; ++block) {
      const Coverage covered = coverage(queries, blocks[block], p.scoring.window);
      if (covered == Coverage::skipped) break;
      partial |= covered == Coverage::partial;
    }
    if (block == begin) {
      ++block;
      continue;
    }
    const int num_keys = blocks[block - 1].last - blocks[begin].first + 1;
    attend<Storage>(p, tile, b, kv_head, blocks[begin].first, num_keys, partial);
  }

  T* lse = static_cast<T*>(p.lse) + (b * p.heads + head) * p.seq + queries.first;
  const bool has_sink = p.sinks != nullptr;
  const double sink = has_sink ? static_cast<const T*>(p.sinks)[head] : 0;
  for (int lane = 0; lane < num_queries; ++lane) {
    const Denominator found =
        denominator(tile.max[lane], tile.sum[lane], has_sink ? &sink : nullptr);
    lse[lane] = static_cast<T>(found.lse);
    tile.sum[lane] = static_cast<T>(found.factor);
  }
  store_transposed<Storage>(p.out, b, head, queries.first, num_queries, p.d_v, tile.acc, tile.sum);
}

template <typename T>
int64_t forward_scratch_bytes(const Params& p) {
  Scratch scratch{nullptr};
  ForwardTile<T>(p, scratch);
  return scratch.bytes;
}

}  // namespace onepass::cpu::ONEPASS_VARIANT
