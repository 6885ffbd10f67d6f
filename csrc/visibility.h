// The rule of onepass_trl/visibility.py for compiled code, and what follows from it for tiles.
//
// Query i sees key j iff visible_begin[j] <= i < visible_end[j] and, with a window, positions[i] -
// positions[j] < window. visible_begin[j] is j, but for tokens of a block that sees itself in both
// directions, as images are seen by some models: the block's first token.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define ONEPASS_INLINE __host__ __device__ __forceinline__
#else
// Always inline: the linker could merge copies across instruction sets.
#define ONEPASS_INLINE __attribute__((always_inline)) inline
#endif

namespace onepass {

// Integers or vectors of integers. The window is tested separately because few layers have one.
template <typename Query, typename Key>
ONEPASS_INLINE auto visible(Query query, Key visible_begin, Key visible_end) {
  return (visible_begin <= query) & (query < visible_end);
}

template <typename Query, typename Key>
ONEPASS_INLINE auto in_window(Query query_position, Key key_position, int32_t window) {
  return query_position - key_position < window;
}

// A tile of consecutive queries, [first, last] inclusive, and the range of their positions.
struct QueryTile {
  int32_t first, last;
  int32_t min_position, max_position;
};

// A tile of consecutive keys, [first, last] inclusive, and the ranges of their begins, ends and
// positions. Without blocks, the begins are the keys.
struct KeyTile {
  int32_t first, last;
  int32_t min_begin, max_begin;
  int32_t min_end, max_end;
  int32_t min_position, max_position;
};

enum class Coverage { skipped, partial, full };

// `window` is 0 for none. Exact without a window; with one, a tile that is skipped or full may be
// reported as partial.
ONEPASS_INLINE Coverage coverage(const QueryTile& query, const KeyTile& key, int32_t window) {
  if (key.min_begin > query.last || key.max_end <= query.first ||
      (window > 0 && query.min_position - key.max_position >= window)) {
    return Coverage::skipped;
  }
  const bool all_visible = key.max_begin <= query.first && key.min_end > query.last;
  const bool all_in_window = window == 0 || query.max_position - key.min_position < window;
  return all_visible && all_in_window ? Coverage::full : Coverage::partial;
}

}  // namespace onepass
