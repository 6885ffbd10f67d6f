// Backward: a task is one tile of keys of one key head, visited by every query that sees it, in
// every head of its group. A vector lane holds one key; the probabilities are recomputed from lse:
//   P = exp(scale Q K^T - lse),  dS = P (dO V^T - delta),
//   dV^T += dO^T P,  dK^T += Q^T dS  (kept in the task),  dQ = scale dS K  (added to memory).
// dQ is summed over key tiles in ascending order whatever the number of threads, so it is
// deterministic: each task publishes its progress (`progress`), and adds its part for a query tile
// only after the previous key tile that visits it has done so. Tasks are claimed in ascending
// order, so a task that others wait for is always running.
#pragma once

#include <thread>

#include "gemm.h"
#include "scores.h"

namespace onepass::cpu::ONEPASS_VARIANT {

template <typename T>
struct BackwardTile {
  int64_t d_qk_padded;
  T* keys;         // (kTile, d_qk_padded), scaled
  T* keys_t;       // (d_qk, kTile), scaled
  T* values_t;     // (d_v, kTile)
  T* dkeys_t;      // (d_qk, kTile)
  T* dvalues_t;    // (d_v, kTile)
  T* queries;      // (kTile, d_qk), widened from a narrower storage type
  T* douts;        // (kTile, d_v), likewise
  T* probability;  // (kTile queries, kTile)
  T* dscores;      // (kTile queries, kTile)
  T* dqueries;     // (kTile, d_qk_padded)
  T* factor;       // (kTile)
  Int<T>* begin;   // (kTile)
  Int<T>* end;     // (kTile), 0 beyond the last key
  Int<T>* position;

  BackwardTile(const Params& p, Scratch& scratch) : d_qk_padded(round_up(p.d_qk, Simd<T>::lanes)) {
    keys = scratch.take<T>(kTile * d_qk_padded);
    keys_t = scratch.take<T>(p.d_qk * kTile);
    values_t = scratch.take<T>(p.d_v * kTile);
    dkeys_t = scratch.take<T>(p.d_qk * kTile);
    dvalues_t = scratch.take<T>(p.d_v * kTile);
    queries = scratch.take<T>(kTile * p.d_qk);
    douts = scratch.take<T>(kTile * p.d_v);
    probability = scratch.take<T>(kTile * kTile);
    dscores = scratch.take<T>(kTile * kTile);
    dqueries = scratch.take<T>(kTile * d_qk_padded);
    factor = scratch.take<T>(kTile);
    begin = scratch.take<Int<T>>(kTile);
    end = scratch.take<Int<T>>(kTile);
    position = scratch.take<Int<T>>(kTile);
  }
};

// The queries [first, last] of one query tile that may see a key tile.
ONEPASS_INLINE QueryTile visiting(const KeyTile& queries, const KeyTile& keys) {
  QueryTile tile = query_tile(queries);
  tile.first = tile.first > keys.min_begin ? tile.first : keys.min_begin;
  tile.last = tile.last < keys.max_end - 1 ? tile.last : keys.max_end - 1;
  return tile;
}

ONEPASS_INLINE bool visits(const Params& p, const KeyTile& queries, const KeyTile& keys) {
  return coverage(query_tile(queries), keys, p.scoring.window) != Coverage::skipped;
}

// Which keys a query sees.
template <typename T>
ONEPASS_INLINE IntVec<T> seen_lanes(const BackwardParams& p, const BackwardTile<T>& tile, int64_t b,
                                    int32_t query, int lane) {
  const IntVec<T> i = IntVec<T>{} + static_cast<Int<T>>(query);
  IntVec<T> mask = visible(i, load_int<T>(tile.begin + lane), load_int<T>(tile.end + lane));
  if (p.scoring.window > 0) {
    const Int<T> position = p.positions[b * p.seq + query];
    mask &= in_window(IntVec<T>{} + position, load_int<T>(tile.position + lane), p.scoring.window);
  }
  return mask;
}

// From scores and dP, in place: probability = P, dscores = dS with respect to scale Q K^T.
template <typename T, bool kPartial>
void differentiate(const BackwardParams& p, const BackwardTile<T>& tile, const QueryTile& queries,
                   int64_t b, int64_t head) {
  constexpr int lanes = Simd<T>::lanes;
  const int64_t head_begin = (b * p.heads + head) * p.seq;
  const T* lse = static_cast<const T*>(p.lse) + head_begin;
  const T* delta = static_cast<const T*>(p.delta) + head_begin;
  const ScoreFunction<T> score_of(p.scoring);
  for (int32_t query = queries.first; query <= queries.last; ++query) {
    const int64_t line = (query - queries.first) * kTile;
    for (int lane = 0; lane < kTile; lane += lanes) {
      const Score<T> score = score_of(load(tile.probability + line + lane));
      Vec<T> probability = exp(score.value - lse[query]);
      Vec<T> dscore = probability * (load(tile.dscores + line + lane) - delta[query]) * score.slope;
      if constexpr (kPartial) {
        const IntVec<T> mask = seen_lanes(p, tile, b, query, lane);
        probability = mask ? probability : Vec<T>{};
        dscore = mask ? dscore : Vec<T>{};
      }
      store(tile.probability + line + lane, probability);
      store(tile.dscores + line + lane, dscore);
    }
  }
}

// sums (width, kTile) += tokens^T weights: of each key, over the queries that see it.
template <typename T>
void add_seeing(const BackwardParams& p, const BackwardTile<T>& tile, const QueryTile& queries,
                int64_t b, MatrixA<T> tokens, int64_t width, const T* weights, T* sums) {
  for (int32_t query = queries.first; query <= queries.last;
       ++query, tokens.data += tokens.m_stride, weights += kTile) {
    for (int lane = 0; lane < kTile; lane += Simd<T>::lanes) {
      const IntVec<T> mask = seen_lanes(p, tile, b, query, lane);
      const Vec<T> weight = load(weights + lane);
      for (int64_t d = 0; d < width; ++d) {
        T* sum = sums + d * kTile + lane;
        store(sum, load(sum) + (mask ? weight * tokens.data[d] : Vec<T>{}));
      }
    }
  }
}

// dqueries = dscores keys: of each query, over the keys that it sees.
template <typename T>
void sum_seen(const BackwardParams& p, const BackwardTile<T>& tile, const QueryTile& queries,
              int64_t b, int num_keys) {
  constexpr int lanes = Simd<T>::lanes;
  for (int32_t query = queries.first; query <= queries.last; ++query) {
    const int64_t line = query - queries.first;
    T* sums = tile.dqueries + line * tile.d_qk_padded;
    for (int64_t d = 0; d < tile.d_qk_padded; d += lanes) store(sums + d, Vec<T>{});
    for (int first = 0; first < num_keys; first += lanes) {
      const IntVec<T> mask = seen_lanes(p, tile, b, query, first);
      for (int key = first; key < num_keys && key < first + lanes; ++key) {
        if (!mask[key - first]) continue;
        const T weight = tile.dscores[line * kTile + key];
        for (int64_t d = 0; d < tile.d_qk_padded; d += lanes)
          store(sums + d, load(sums + d) + load(tile.keys + key * tile.d_qk_padded + d) * weight);
      }
    }
  }
}

// Waits until the last key tile before `k` that visits query tile `t` has added its part of dQ.
inline void wait_for_turn(const BackwardParams& p, const KeyTile* tiles, const int32_t* progress,
                          int64_t k, int64_t t, int32_t step) {
  int64_t previous = k - 1;
  while (previous >= 0 && !visits(p, tiles[t], tiles[previous])) --previous;
  if (previous < 0) return;
  for (int spin = 0; __atomic_load_n(progress + previous, __ATOMIC_ACQUIRE) <= step; ++spin) {
    if (spin >= 256) std::this_thread::yield();
  }
}

template <typename Storage, typename T>
void visit(const BackwardParams& p, const BackwardTile<T>& tile, const QueryTile& queries,
           const KeyTile& keys, bool keys_finite, int64_t b, int64_t head) {
  const int num_queries = queries.last - queries.first + 1;
  const int num_keys = keys.last - keys.first + 1;
  const auto q = tokens_of<Storage>(p.q, b, head, queries.first, num_queries, p.d_qk, tile.queries);
  const auto dout =
      tokens_of<Storage>(p.dout, b, head, queries.first, num_queries, p.d_v, tile.douts);
  gemm<false>(num_queries, kTile, p.d_qk, q, tile.keys_t, kTile, tile.probability, kTile);
  gemm<false>(num_queries, kTile, p.d_v, dout, tile.values_t, kTile, tile.dscores, kTile);
  const bool full = coverage(queries, keys, p.scoring.window) == Coverage::full;
  if (full) {
    differentiate<T, false>(p, tile, queries, b, head);
  } else {
    differentiate<T, true>(p, tile, queries, b, head);
  }
  if (full || all_finite(dout, num_queries, p.d_v)) {
    gemm<true>(p.d_v, kTile, num_queries, dout.transposed(), tile.probability, kTile,
               tile.dvalues_t, kTile);
  } else {
    add_seeing(p, tile, queries, b, dout, p.d_v, tile.probability, tile.dvalues_t);
  }
  if (full || all_finite(q, num_queries, p.d_qk)) {
    gemm<true>(p.d_qk, kTile, num_queries, q.transposed(), tile.dscores, kTile, tile.dkeys_t,
               kTile);
  } else {
    add_seeing(p, tile, queries, b, q, p.d_qk, tile.dscores, tile.dkeys_t);
  }
  if (full || keys_finite) {
    gemm<false, T>(num_queries, tile.d_qk_padded, num_keys, {tile.dscores, kTile, 1}, tile.keys,
                   tile.d_qk_padded, tile.dqueries, tile.d_qk_padded);
  } else {
    sum_seen(p, tile, queries, b, num_keys);
  }
}

template <typename T>
void add_dqueries(const BackwardParams& p, const BackwardTile<T>& tile, const QueryTile& queries,
                  int64_t b, int64_t head) {
  for (int32_t query = queries.first; query <= queries.last; ++query) {
    T* dq = static_cast<T*>(p.dq.data) + b * p.dq.batch_stride + head * p.dq.head_stride +
            query * p.dq.seq_stride;
    const T* part = tile.dqueries + (query - queries.first) * tile.d_qk_padded;
    for (int64_t d = 0; d < p.d_qk; ++d) dq[d] += part[d];
  }
}

template <typename Storage, typename T>
void start_tile(const BackwardParams& p, const BackwardTile<T>& tile, const KeyTile& keys,
                int64_t b, int64_t kv_head) {
  const int num_keys = keys.last - keys.first + 1;
  const T scale = p.scoring.scale;
  load_tokens<Storage, T>(p.k, b, kv_head, keys.first, num_keys, p.d_qk, scale, tile.keys,
                          tile.d_qk_padded);
  load_transposed<Storage, T>(p.k, b, kv_head, keys.first, num_keys, p.d_qk, scale, tile.keys_t);
  load_transposed<Storage, T>(p.v, b, kv_head, keys.first, num_keys, p.d_v, T(1), tile.values_t);
  for (int64_t i = 0; i < p.d_qk * kTile; ++i) tile.dkeys_t[i] = 0;
  for (int64_t i = 0; i < p.d_v * kTile; ++i) tile.dvalues_t[i] = 0;
  for (int lane = 0; lane < kTile; ++lane) {
    const int64_t key = b * p.seq + keys.first + lane;
    const bool has_begin = p.visible_begin != nullptr && lane < num_keys;
    tile.begin[lane] = has_begin ? p.visible_begin[key] : keys.first + lane;
    tile.end[lane] = lane < num_keys ? p.visible_end[key] : 0;
    tile.position[lane] = lane < num_keys && p.scoring.window > 0 ? p.positions[key] : 0;
  }
}

template <typename Storage, typename T>
void backward(const BackwardParams& p, int64_t task, void* memory) {
  const int64_t k = task % p.num_tiles, kv_head = task / p.num_tiles % p.kv_heads;
  const int64_t b = task / p.num_tiles / p.kv_heads, group = p.heads / p.kv_heads;
  const KeyTile* tiles = p.tiles + b * p.num_tiles;
  int32_t* progress = p.progress + (b * p.kv_heads + kv_head) * p.num_tiles;
  const KeyTile& keys = tiles[k];
  Scratch scratch{static_cast<char*>(memory)};
  const BackwardTile<T> tile(p, scratch);
  start_tile<Storage, T>(p, tile, keys, b, kv_head);
  const bool keys_finite =
      all_finite<T>({tile.keys, tile.d_qk_padded, 1}, keys.last - keys.first + 1, p.d_qk);
  for (int64_t g = 0; g < group; ++g) {
    const int64_t head = kv_head * group + g;
    for (int64_t t = keys.min_begin / kTile; t <= (keys.max_end - 1) / kTile; ++t) {
      if (!visits(p, tiles[t], keys)) continue;
      const QueryTile queries = visiting(tiles[t], keys);
      visit<Storage>(p, tile, queries, keys, keys_finite, b, head);
      const int32_t step = g * p.num_tiles + t;
      wait_for_turn(p, tiles, progress, k, t, step);
      add_dqueries(p, tile, queries, b, head);
      __atomic_store_n(progress + k, step + 1, __ATOMIC_RELEASE);
    }
  }
  const int num_keys = keys.last - keys.first + 1;
  for (int lane = 0; lane < kTile; ++lane) tile.factor[lane] = p.scoring.scale;
  store_transposed<Storage>(p.dk, b, kv_head, keys.first, num_keys, p.d_qk, tile.dkeys_t,
                            tile.factor);
  for (int lane = 0; lane < kTile; ++lane) tile.factor[lane] = 1;
  store_transposed<Storage>(p.dv, b, kv_head, keys.first, num_keys, p.d_v, tile.dvalues_t,
                            tile.factor);
}

// delta = sum_d dout * out - dlse for one tile of queries of one head.
template <typename Storage, typename T>
void delta(const BackwardParams& p, int64_t task) {
  const int64_t t = task % p.num_tiles, head = task / p.num_tiles % p.heads,
                b = task / p.num_tiles / p.heads;
  const KeyTile& queries = p.tiles[b * p.num_tiles + t];
  for (int64_t query = queries.first; query <= queries.last; ++query) {
    const Storage* out = static_cast<const Storage*>(p.out.data) + b * p.out.batch_stride +
                         head * p.out.head_stride + query * p.out.seq_stride;
    const Storage* dout = static_cast<const Storage*>(p.dout.data) + b * p.dout.batch_stride +
                          head * p.dout.head_stride + query * p.dout.seq_stride;
    T partial[16] = {};  // independent sums, for the vector unit
    int64_t d = 0;
    for (; d + 16 <= p.d_v; d += 16) {
      for (int i = 0; i < 16; ++i) partial[i] += widen<T>(dout[d + i]) * widen<T>(out[d + i]);
    }
    for (; d < p.d_v; ++d) partial[0] += widen<T>(dout[d]) * widen<T>(out[d]);
    T sum = 0;
    for (T x : partial) sum += x;
    const int64_t index = (b * p.heads + head) * p.seq + query;
    static_cast<T*>(p.delta)[index] =
        p.dlse == nullptr ? sum : sum - static_cast<const T*>(p.dlse)[index];
  }
}

template <typename T>
int64_t backward_scratch_bytes(const Params& p) {
  Scratch scratch{nullptr};
  BackwardTile<T>(p, scratch);
  return scratch.bytes;
}

}  // namespace onepass::cpu::ONEPASS_VARIANT
