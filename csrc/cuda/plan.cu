// Makes the plan of plan.h on the device, in three launches and without a host synchronization.
#include <cassert>

#include "launch.h"
#include "plan.h"

namespace onepass::cuda {
namespace {

template <typename T>
__device__ __forceinline__ T warp_min(T value) {
  for (int mask = 16; mask > 0; mask /= 2) value = min_of(value, shuffle_xor(value, mask));
  return value;
}

constexpr int kPlanThreads = 128;
constexpr int kPlanWarps = kPlanThreads / 32;

// A warp per tile: the ranges of its ends and positions.
__global__ void __launch_bounds__(kPlanThreads) range_kernel(const PlanParams params) {
  const int32_t tile = blockIdx.x * kPlanWarps + threadIdx.x / 32;
  const int lane = threadIdx.x % 32;
  if (tile >= num_tiles(params.seq)) return;
  const int32_t b = blockIdx.y;
  const int64_t row_begin = static_cast<int64_t>(b) * params.seq;
  TileRange range{INT32_MAX, INT32_MAX, INT32_MAX, INT32_MAX};  // maxima negated
  for (int32_t token = tile * kTile + lane; token < min_of((tile + 1) * kTile, params.seq);
       token += 32) {
    const int32_t end = params.visible_end[row_begin + token];
    assert(token < end && end <= params.seq && "visible_end[j] has to be in [j + 1, seq]");
    const int32_t position = params.positions != nullptr ? params.positions[row_begin + token] : 0;
    range.min_end = min_of(range.min_end, end);
    range.max_end = min_of(range.max_end, -end);
    range.min_position = min_of(range.min_position, position);
    range.max_position = min_of(range.max_position, -position);
  }
  range = {warp_min(range.min_end), -warp_min(range.max_end), warp_min(range.min_position),
           -warp_min(range.max_position)};
  if (lane == 0) {
    int32_t* plan = params.plan + b * plan_stride(params.seq);
    reinterpret_cast<TileRange*>(plan)[tile] = range;
  }
}

// A warp per tile: how many tiles it visits as queries and how many visit it as keys, alone and,
// for every other tile, with the next one. The counts are stored like the orders of the plan, and
// the first of the former and the end of the latter at their place in the plan.
__global__ void __launch_bounds__(kPlanThreads)
    count_kernel(const PlanParams params, int32_t* counts) {
  const int32_t b = blockIdx.y, seq = params.seq, tiles = num_tiles(seq);
  const int32_t tile = blockIdx.x * kPlanWarps + threadIdx.x / 32;
  const int lane = threadIdx.x % 32;
  if (tile >= tiles) return;
  const TileRange* ranges = plan_of_row(params.plan, b, seq).ranges;
  const int32_t both = tiles + ceil_div(tiles, 2);
  const int32_t places[] = {tile, tiles + tile / 2, both + tile, both + tiles + tile / 2};

  const int32_t first = tile * kTile;
  const QueryTile query = query_tile<kTile>(ranges, first, seq);
  const QueryTile query_pair = query_tile<2 * kTile>(ranges, first, seq);
  const KeyTile key = key_tile<kTile>(ranges, first, seq);
  const KeyTile key_pair = key_tile<2 * kTile>(ranges, first, seq);
  int32_t totals[4] = {}, bounds[4] = {INT32_MAX, INT32_MAX, 0, 0};  // ends negated
  const auto add = [&](int i, Coverage covered, int32_t bound) {
    if (covered == Coverage::skipped) return;
    ++totals[i];
    bounds[i] = min_of(bounds[i], bound);
  };
  for (int32_t other = lane * kTile; other < seq; other += 32 * kTile) {
    const KeyTile other_key = key_tile<kTile>(ranges, other, seq);
    const QueryTile other_query = query_tile<kTile>(ranges, other, seq);
    const int32_t number = other / kTile;
    add(0, coverage(query, other_key, params.window), number);
    add(1, coverage(query_pair, other_key, params.window), number);
    add(2, coverage(other_query, key, params.window), -number - 1);
    add(3, coverage(other_query, key_pair, params.window), -number - 1);
  }
  counts += b * plan_stride(seq);
  int32_t* in_plan = params.plan + b * plan_stride(seq) + 4 * tiles + 2 * both;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    for (int mask = 16; mask > 0; mask /= 2) totals[i] += shuffle_xor(totals[i], mask);
    const int32_t bound = warp_min(bounds[i]);
    const bool of_pair = i % 2 == 1;
    if (lane == 0 && !(of_pair && tile % 2 == 1)) {
      counts[places[i]] = totals[i];
      in_plan[places[i]] = i < 2 ? bound : -bound;
    }
  }
}

// A warp per entry: its place is its rank among the counts of its order, larger counts first and
// earlier entries first among equals.
__global__ void __launch_bounds__(kPlanThreads)
    order_kernel(const PlanParams params, const int32_t* counts) {
  const int32_t b = blockIdx.y;
  const int32_t tiles = num_tiles(params.seq), pairs = ceil_div(tiles, 2);
  const int32_t entries = tiles + pairs;  // of the queries, and the same number of the keys
  int32_t entry = blockIdx.x * kPlanWarps + threadIdx.x / 32;
  const int lane = threadIdx.x % 32;
  if (entry >= 2 * entries) return;
  int32_t* order = params.plan + b * plan_stride(params.seq) + 4 * tiles;
  counts += b * plan_stride(params.seq);

  const bool of_pair = entry % entries >= tiles;
  const int32_t begin = entry / entries * entries + (of_pair ? tiles : 0);
  const int32_t size = of_pair ? pairs : tiles;
  entry -= begin;
  const int32_t count = counts[begin + entry];
  int32_t rank = 0;
  for (int32_t other = lane; other < size; other += 32) {
    const int32_t other_count = counts[begin + other];
    rank += other_count > count || (other_count == count && other < entry);
  }
  for (int mask = 16; mask > 0; mask /= 2) rank += shuffle_xor(rank, mask);
  if (lane == 0) order[begin + rank] = entry;
}

}  // namespace

int64_t plan_size(int32_t seq) { return plan_stride(seq); }

int32_t padded_seq(int32_t seq) { return padded(seq); }

int64_t dq_order_size(int32_t batch, int32_t heads, int32_t seq) {
  return batch * (1 + int64_t{heads} * (padded(seq) / kTile));
}

int32_t parts_of_group(int32_t batch, int32_t heads, int32_t kv_heads, int32_t seq, bool in_order) {
  // Of pairs of tiles: blocks of portable kernels have one tile, and run two at a time.
  const int64_t blocks = int64_t{batch} * kv_heads * ceil_div(seq, 2 * kTile);
  const int32_t group = heads / kv_heads;
  const int32_t parts = parts_for_balance(blocks, group);
  return in_order ? max_of(parts, parts_for_balance(kv_heads, group, kHeadsInOrder)) : parts;
}

void launch_plan(const PlanParams& params, int32_t* counts, Stream stream) {
  const int32_t tiles = num_tiles(params.seq);
  const int32_t entries = 2 * (tiles + ceil_div(tiles, 2));
  const Grid by_tile{ceil_div(tiles, kPlanWarps), params.batch, 1};
  const Grid by_entry{ceil_div(entries, kPlanWarps), params.batch, 1};
  launch(range_kernel, by_tile, kPlanThreads, 0, stream, params);
  launch(count_kernel, by_tile, kPlanThreads, 0, stream, params, counts);
  launch(order_kernel, by_entry, kPlanThreads, 0, stream, params,
         static_cast<const int32_t*>(counts));
}

}  // namespace onepass::cuda
