// For test_tiles.py: the tiles of a row as csrc/cpu/plan.cpp makes them, and the compiled
// `coverage`.
#include "../../csrc/cpu/plan.cpp"

using namespace onepass;

// Writes the Coverage of each tile of one row, (query_tiles, key_tiles). `window` is 0 for none.
extern "C" void onepass_cover(const int32_t* visible_begin, const int32_t* visible_end,
                              const int32_t* positions, int64_t seq, int64_t query_tile,
                              int64_t key_tile, int32_t window, int64_t* out) {
  const auto queries = cpu::make_tiles(visible_begin, visible_end, positions, seq, query_tile);
  const auto keys = cpu::make_tiles(visible_begin, visible_end, positions, seq, key_tile);
  for (const KeyTile& q : queries) {
    for (const KeyTile& k : keys) {
      const QueryTile query{q.first, q.last, q.min_position, q.max_position};
      *out++ = static_cast<int64_t>(coverage(query, k, window));
    }
  }
}
