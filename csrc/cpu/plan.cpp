#include "plan.h"

#include <algorithm>

namespace onepass::cpu {

std::vector<KeyTile> make_tiles(const int32_t* visible_begin, const int32_t* visible_end,
                                const int32_t* positions, int64_t seq, int64_t size) {
  std::vector<KeyTile> tiles;
  tiles.reserve((seq + size - 1) / size);
  for (int64_t first = 0; first < seq; first += size) {
    const int64_t end = std::min(first + size, seq);
    const auto [min_end, max_end] = std::minmax_element(visible_end + first, visible_end + end);
    const int32_t first_key = static_cast<int32_t>(first), last_key = static_cast<int32_t>(end - 1);
    KeyTile tile{first_key, last_key, first_key, last_key, *min_end, *max_end, 0, 0};
    if (visible_begin != nullptr) {
      // They ascend.
      tile.min_begin = visible_begin[first];
      tile.max_begin = visible_begin[end - 1];
    }
    if (positions != nullptr) {
      const auto [min_position, max_position] =
          std::minmax_element(positions + first, positions + end);
      tile.min_position = *min_position;
      tile.max_position = *max_position;
    }
    tiles.push_back(tile);
  }
  return tiles;
}

bool is_tree(const int32_t* visible_end, int64_t seq) {
  std::vector<int32_t> open;  // the ends of the subtrees around key j, innermost last
  for (int64_t key = 0; key < seq; ++key) {
    const int32_t end = visible_end[key];
    if (end <= key || end > seq) return false;
    while (!open.empty() && open.back() <= key) open.pop_back();
    if (!open.empty() && end > open.back()) return false;
    if (open.empty() || end < open.back()) open.push_back(end);
  }
  return true;
}

bool are_blocks(const int32_t* visible_begin, const int32_t* visible_end, int64_t seq) {
  for (int64_t key = 0; key < seq; ++key) {
    const bool joins = key > 0 && visible_begin[key] == visible_begin[key - 1] &&
                       visible_end[key] == visible_end[key - 1];
    if (visible_begin[key] != key && !joins) return false;
  }
  return true;
}

}  // namespace onepass::cpu
