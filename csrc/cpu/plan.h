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

}  // namespace onepass::cpu
