// What a block of a backward pass that keeps keys takes, which queries it visits, and when it may
// add to their dq.
#pragma once

#include "tokens.h"

namespace onepass::cuda {

// What a block that computes dk and dv takes: a tile of keys, and of the query heads of their group
// one part. It visits `num_tiles` tiles of queries (or fewer: some may be skipped) from its keys
// on, backwards from the tile `begin`, and from the last one again after the first.
struct KeyBlock {
  const TileRange* ranges;  // of the row's plan
  const int32_t* order;     // in which blocks take keys
  int32_t entry;
  int32_t kv_head, part, first_head, end_head;
  int32_t num_tiles, begin;
  KeyTile keys;
  // Of DqOrder.
  int32_t* last;
  int32_t queries, before;
};

// Taken by one thread of a block that keeps kKeys keys and streams tiles of kQueries queries.
template <int kQueries, int kKeys>
__device__ __forceinline__ KeyBlock take_key_block(const BackwardParams& params) {
  const int32_t seq = params.seq, parts = params.group_parts, heads = params.kv_heads * parts;
  const int32_t b = blockIdx.z;
  Place place = place_of_block();
  if (params.dq_order != nullptr) {
    // A block waits for those of its row that come before it in the order of dq. They run or have
    // ended, since whichever block starts next takes what comes next. All heads advance together:
    // the fewer blocks of a head run, the less they wait for each other.
    const int32_t number = take_number(params.dq_order + b);
    place = {number / heads, number % heads};
  }
  const Plan plan = plan_of_row(params.plan, b, seq);
  const bool pairs = kKeys == 2 * kTile;
  const int32_t* order = pairs ? plan.key_order_2 : plan.key_order;
  const int32_t index = order[place.entry], first_key = index * kKeys;
  // As far as the tree lets queries see a key: a window shortens the walk by coverage alone, as
  // DqOrder judges it, which would otherwise wait for blocks whose walk has ended.
  const KeyTile keys = key_tile<kKeys>(plan.ranges, first_key, seq);
  const int32_t num_tiles = ceil_div(min_of(keys.max_end, seq) - first_key, kQueries);
  // Blocks start together and visit the last queries first, as far as they see the same. But the
  // end of a packed document is seen together with the next one by a block that has keys of both:
  // it visits its own tiles first, so that the other blocks of the document don't wait for it.
  const int32_t own = first_key / kTile, next = own + kKeys / kTile;
  const bool of_two_documents = next < onepass::cuda::num_tiles(seq) &&
                                plan.query_begin[next] >= own && plan.query_begin[own] < own;
  const int32_t group = params.heads / params.kv_heads;
  const int32_t kv_head = place.head / parts, part = place.head % parts;
  return {plan.ranges,
          order,
          place.entry,
          kv_head,
          part,
          kv_head * group + part * group / parts,
          kv_head * group + (part + 1) * group / parts,
          num_tiles,
          min_of(of_two_documents ? kKeys / kQueries : num_tiles, num_tiles) - 1,
          keys,
          nullptr,
          -1,
          0};
}

struct QueryStep {
  int32_t head;   // -1 if none is left
  int32_t first;  // query
  bool full;      // every query sees every key
};

// The tiles of kQueries queries that visit the keys of a block, each for one query head of the
// block after the other, found as in KeyTileWalk.
template <int kQueries, int kKeys = kTile>
class QueryTileWalk {
  static_assert((kKeys == kTile || kKeys == 2 * kTile) && kKeys % kQueries == 0);

 public:
  // `block` is in shared memory.
  __device__ __forceinline__ QueryTileWalk(const BackwardParams& params, const KeyBlock& block)
      : params_(params),
        block_(block),
        head_(block.end_head - 1),
        base_(-32),
        visited_(0),
        full_(0) {}

  __device__ __forceinline__ QueryStep next() {
    if (++head_ == block_.end_head) {
      head_ = block_.first_head;
      visited_ &= visited_ - 1;
      while (visited_ == 0) {
        base_ += 32;
        if (base_ >= block_.num_tiles) return {-1, 0, false};
        const int32_t seq = params_.seq, index = base_ + threadIdx.x % 32;
        const Coverage covered =
            index < block_.num_tiles
                ? coverage(query_tile<kQueries>(block_.ranges, first_of(index), seq), block_.keys,
                           params_.scoring.window)
                : Coverage::skipped;
        visited_ = ballot(covered != Coverage::skipped);
        full_ = ballot(covered == Coverage::full);
      }
    }
    const int bit = first_bit(visited_);
    return {head_, first_of(base_ + bit), ((full_ >> bit) & 1) != 0};
  }

 private:
  // The first query of the tile that is visited after `index` others.
  __device__ __forceinline__ int32_t first_of(int32_t index) const {
    const int32_t tile = block_.begin - index;
    return block_.keys.first + (tile < 0 ? tile + block_.num_tiles : tile) * kQueries;
  }

  const BackwardParams& params_;
  const KeyBlock& block_;
  int32_t head_, base_;
  uint32_t visited_, full_;
};

// The order of entries, in which blocks add to the dq of a tile of queries so that its bits are the
// same every time: each waits for the one before it. What is known of a tile is kept in the block's
// shared memory, for lack of registers.
template <int kQueries, int kKeys = kTile>
class DqOrder {
 public:
  __device__ __forceinline__ DqOrder(const BackwardParams& params, KeyBlock& block)
      : params_(params), block_(block) {}

  // Called by a warp: waits until this block may add to the tile of a step.
  __device__ __forceinline__ void wait_for_turn(const QueryStep& step) {
    if (step.first != block_.queries) {  // the tile of another step than the last
      const int32_t before = find_before(step.first);
      sync_warp();
      if (threadIdx.x % 32 == 0) block_.queries = step.first, block_.before = before;
      sync_warp();
    }
    if (threadIdx.x % 32 == 0) {
      const int64_t first_query = padded_index(params_, blockIdx.z, step.head, step.first);
      block_.last = params_.dq_order + params_.batch + first_query / kTile;
      wait_until(block_.last, block_.before);
    }
  }
  // Called by the first thread of that warp: this block has added to the tile of the last turn, if
  // there was one.
  __device__ __forceinline__ void end_turn() {
    if (block_.last != nullptr) set_after_writes(block_.last, block_.entry + 1);
  }

  // The number, from 1, of the entry that adds to a tile of queries before this block; 0 for none.
  // Called by a warp.
  __device__ __forceinline__ int32_t find_before(int32_t first) const {
    const int32_t seq = params_.seq;
    const QueryTile query = query_tile<kQueries>(block_.ranges, first, seq);
    for (int32_t end = block_.entry; end > 0; end -= 32) {
      const int32_t entry = end - 1 - threadIdx.x % 32;
      const Coverage covered =
          entry >= 0
              ? coverage(query, key_tile<kKeys>(block_.ranges, block_.order[entry] * kKeys, seq),
                         params_.scoring.window)
              : Coverage::skipped;
      const uint32_t visiting = ballot(covered != Coverage::skipped);
      if (visiting != 0) return end - first_bit(visiting);
    }
    return 0;
  }

 private:
  const BackwardParams& params_;
  KeyBlock& block_;
};

}  // namespace onepass::cuda
