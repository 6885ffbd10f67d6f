// What is computed once per call from visible_end and positions: the ranges of its tiles, and
// whether it is a tree.
#pragma once

#include <cstdint>
#include <vector>

#include "../visibility.h"

namespace onepass::cpu {

// Tiles of `size` tokens over one row; `positions` may be null. The last tile may be shorter.
std::vector<KeyTile> make_tiles(const int32_t* visible_end, const int32_t* positions, int64_t seq,
                                int64_t size);

// Whether every key sees itself and the intervals [j, visible_end[j]) nest within the row.
bool is_tree(const int32_t* visible_end, int64_t seq);

struct TileCounts {
  int64_t skipped = 0, partial = 0, full = 0;
};

// Over the tiles of one row that contain a causal pair. `window` is 0 for none; then `positions`
// may be null.
TileCounts count_tiles(const int32_t* visible_end, const int32_t* positions, int64_t seq,
                       int64_t query_tile, int64_t key_tile, int32_t window);

}  // namespace onepass::cpu
