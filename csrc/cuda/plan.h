// Which tiles a kernel visits, and in which order its blocks take their tiles: the contents of the
// plan, and the walks over it. The plan is made once per batch (plan.cu) and serves all layers and
// heads.
//
// For each row, int32:
//   ranges           4 x num_tiles: TileRange of every tile of kTile tokens
//   query_order      num_tiles: tiles as queries, most visited key tiles first
//   query_order_2    ceil(num_tiles / 2): the same for pairs of tiles
//   key_order        num_tiles: tiles as keys, most visiting query tiles first
//   key_order_2      ceil(num_tiles / 2): the same for pairs of tiles
//   query_begin      num_tiles: for tiles as queries, the first key tile that they visit
//   query_begin_2    ceil(num_tiles / 2): the same for pairs of tiles
//   key_end          num_tiles: for tiles as keys, the query tile after the last that visits them
//   key_end_2        ceil(num_tiles / 2): the same for pairs of tiles
#pragma once

#include "../visibility.h"
#include "instructions.h"
#include "params.h"

namespace onepass::cuda {

constexpr int kTile = 64;  // tokens

ONEPASS_INLINE int32_t ceil_div(int32_t a, int32_t b) { return (a + b - 1) / b; }
ONEPASS_INLINE int32_t num_tiles(int32_t seq) { return ceil_div(seq, kTile); }
// The number of tokens, rounded up to whole pairs of tiles.
ONEPASS_INLINE int32_t padded(int32_t seq) { return ceil_div(seq, 2 * kTile) * 2 * kTile; }
// int32 per row: a multiple of four, so that every row's ranges are aligned to 16 bytes.
ONEPASS_INLINE int64_t plan_stride(int32_t seq) {
  const int64_t tiles = num_tiles(seq);
  return 4 * (tiles + tiles + (tiles + 1) / 2);
}

struct Plan {
  const TileRange* ranges;
  const int32_t* query_order;
  const int32_t* query_order_2;
  const int32_t* key_order;
  const int32_t* key_order_2;
  const int32_t* query_begin;
  const int32_t* query_begin_2;
  const int32_t* key_end;
  const int32_t* key_end_2;
};

ONEPASS_INLINE Plan plan_of_row(const int32_t* plan, int32_t b, int32_t seq) {
  const int32_t tiles = num_tiles(seq), both = tiles + ceil_div(tiles, 2);
  const int32_t* begin = plan + b * plan_stride(seq);
  const int32_t* of[4];
  for (int i = 0; i < 4; ++i) of[i] = begin + 4 * tiles + i * both;
  return {reinterpret_cast<const TileRange*>(begin),
          of[0],
          of[0] + tiles,
          of[1],
          of[1] + tiles,
          of[2],
          of[2] + tiles,
          of[3],
          of[3] + tiles};
}

ONEPASS_INLINE int32_t min_of(int32_t a, int32_t b) { return a < b ? a : b; }
ONEPASS_INLINE int32_t max_of(int32_t a, int32_t b) { return a > b ? a : b; }

// kKeys keys from `first`, within one tile or over whole tiles. The last may be beyond the row:
// keys that no query sees keep such a tile from being full.
template <int kKeys>
ONEPASS_INLINE KeyTile key_tile(const TileRange* ranges, int32_t first, int32_t seq) {
  const int32_t end = first + kKeys;
  KeyTile key{first, end - 1, first, end - 1, INT32_MAX, INT32_MIN, INT32_MAX, INT32_MIN};
  const int32_t last = min_of(key.last, seq - 1) / kTile;
#pragma unroll
  for (int i = 0; i < (kKeys + kTile - 1) / kTile; ++i) {
    const TileRange range = ranges[min_of(first / kTile + i, last)];
    key.min_end = min_of(key.min_end, range.min_end);
    key.max_end = max_of(key.max_end, range.max_end);
    key.min_position = min_of(key.min_position, range.min_position);
    key.max_position = max_of(key.max_position, range.max_position);
  }
  return key;
}

// kQueries queries from `first`, within one tile or over whole tiles.
template <int kQueries>
ONEPASS_INLINE QueryTile query_tile(const TileRange* ranges, int32_t first, int32_t seq) {
  QueryTile query{first, min_of(first + kQueries, seq) - 1, INT32_MAX, INT32_MIN};
#pragma unroll
  for (int i = 0; i < (kQueries + kTile - 1) / kTile; ++i) {
    const TileRange range = ranges[min_of(first / kTile + i, query.last / kTile)];
    query.min_position = min_of(query.min_position, range.min_position);
    query.max_position = max_of(query.max_position, range.max_position);
  }
  return query;
}

// As many blocks as keep the multiprocessors of a large device evenly busy until the last one ends:
// some four for each. A power of two.
constexpr int32_t kBalancedBlocks = 512;
#if defined(ONEPASS_EMULATE)
constexpr int32_t kBlocksInBalance = 8;  // short rows have few
#else
constexpr int32_t kBlocksInBalance = kBalancedBlocks;
#endif

// The entry of an order and the head that a block takes.
struct Place {
  int32_t entry, head;
};

// Blocks start by ascending x, then y, of a grid of entries x heads. Those of one head follow one
// another, so that blocks that run together read the same tokens from the cache. Of the last heads,
// as many as have `balanced` blocks (a power of two), the longest blocks come first: a long one
// that starts late would run alone in the end.
__device__ __forceinline__ Place place_of(int32_t x, int32_t y, int32_t entries, int32_t heads,
                                          int32_t balanced = kBlocksInBalance) {
  const int wanted = max_of(leading_zeros(entries) - leading_zeros(balanced), 0);
  const int shift = min_of(wanted, 31 - leading_zeros(heads));
  const int32_t apart = heads - (1 << shift);
  if (y < apart) return {x, y};
  const int32_t index = (y - apart) * entries + x;
  return {index >> shift, apart + (index & ((1 << shift) - 1))};
}
__device__ __forceinline__ Place place_of_block() {
  return place_of(recomputed(blockIdx.x), recomputed(blockIdx.y), gridDim.x, gridDim.y);
}

// Heads that advance together where blocks of a head wait for each other: with fewer, too many do.
constexpr int32_t kHeadsInOrder = 4;

// Into how many parts to cut the query heads of a group so that `blocks` become `balanced`, or
// nearly.
ONEPASS_INLINE int32_t parts_for_balance(int64_t blocks, int32_t group,
                                         int32_t balanced = kBlocksInBalance) {
  int32_t parts = 1;
  while (parts < group && parts * blocks < balanced) parts *= 2;
  return min_of(parts, group);
}

// A tile of keys and which parts of the queries see it: bit i is that of part i.
struct alignas(16) Visit {
  int32_t tile;         // index of the key tile, -1 if none is left
  uint32_t seen, full;  // parts of which some query sees some key, or every query every key
};

// The tiles of kKeys keys that kQueries queries from `first` visit, in ascending order, found 32 at
// a time by a warp, and which of kParts equal parts of the queries see them. Where all warps of a
// block walk (portable kernels), they agree without synchronizing. A walk keeps little state and
// reads the rest again for every 32 tiles: registers are scarce in their main loops, and in the
// warp that walks for others (Hopper).
template <int kQueries, int kKeys = kTile, int kParts = 1>
class KeyTileWalk {
  static_assert(kQueries == kTile || kQueries == 2 * kTile);

 public:
  __device__ __forceinline__ KeyTileWalk(const Params& params, int32_t b, int32_t first)
      : params_(params), b_(b), first_(first), visited_(0), seen_{}, full_{} {
    const Plan plan = plan_of_row(params.plan, b, params.seq);
    const int32_t* begin = kQueries == kTile ? plan.query_begin : plan.query_begin_2;
    base_ = begin[first / kQueries] * kTile / kKeys - 32;
  }

  __device__ __forceinline__ Visit next() {
    while (visited_ == 0) {
      const int32_t seq = params_.seq;
      const TileRange* ranges = plan_of_row(params_.plan, b_, seq).ranges;
      const int32_t last = min_of(first_ + kQueries, seq) - 1;
      base_ += 32;
      if (base_ > last / kKeys) return {-1, 0, 0};
      const int32_t first_key = (base_ + threadIdx.x % 32) * kKeys;
#pragma unroll
      for (int part = 0; part < kParts; ++part) {
        constexpr int kOfPart = kQueries / kParts;
        const Coverage covered =
            first_key <= last
                ? coverage(query_tile<kOfPart>(ranges, first_ + part * kOfPart, seq),
                           key_tile<kKeys>(ranges, first_key, seq), params_.scoring.window)
                : Coverage::skipped;
        seen_[part] = ballot(covered != Coverage::skipped);
        full_[part] = ballot(covered == Coverage::full);
        visited_ |= seen_[part];
      }
    }
    const int bit = first_bit(visited_);
    visited_ &= visited_ - 1;
    Visit visit{base_ + bit, 0, 0};
#pragma unroll
    for (int part = 0; part < kParts; ++part) {
      visit.seen |= (seen_[part] >> bit & 1) << part;
      visit.full |= (full_[part] >> bit & 1) << part;
    }
    return visit;
  }

 private:
  const Params& params_;
  const int32_t b_, first_;
  int32_t base_;
  uint32_t visited_, seen_[kParts], full_[kParts];
};

}  // namespace onepass::cuda
