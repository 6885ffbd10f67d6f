// For test_tiles.py: the tiles of a row as csrc/cpu/plan.cpp makes them, counted by the compiled
// `coverage`.
#include "../../csrc/cpu/plan.cpp"

using namespace onepass;

// Adds up, by Coverage, the tiles of one row that contain a causal pair. `window` is 0 for none.
extern "C" void onepass_count_tiles(const int32_t* visible_end, const int32_t* positions,
                                    int64_t seq, int64_t query_tile, int64_t key_tile,
                                    int32_t window, int64_t* counts) {
  const auto queries = cpu::make_tiles(visible_end, positions, seq, query_tile);
  const auto keys = cpu::make_tiles(visible_end, positions, seq, key_tile);
  for (const KeyTile& q : queries) {
    for (const KeyTile& k : keys) {
      if (k.first > q.last) break;
      const QueryTile query{q.first, q.last, q.min_position, q.max_position};
      ++counts[static_cast<int>(coverage(query, k, window))];
    }
  }
}
