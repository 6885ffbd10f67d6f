// What is computed once per call from visible_begin, visible_end and positions: the ranges of its
// tiles, and whether it is a tree.
#pragma once

#include <cstdint>
#include <vector>

#include "../visibility.h"

namespace onepass::cpu {

// Tiles of `size` tokens over one row; `visible_begin` and `positions` may be null. The last tile
// may be shorter.
std::vector<KeyTile> make_tiles(const int32_t* visible_begin, const int32_t* visible_end,
                                const int32_t* positions, int64_t seq, int64_t size);

// Whether every key sees itself and the intervals [j, visible_end[j]) nest within the row.
bool is_tree(const int32_t* visible_end, int64_t seq);

// Whether every token begins where it is, or where the token before it does, which then ends where
// it does: blocks are runs of tokens that are seen by all of a subtree or none of it.
bool are_blocks(const int32_t* visible_begin, const int32_t* visible_end, int64_t seq);

}  // namespace onepass::cpu
