// Portable backward for head sizes of which not all gradients fit into the registers (otherwise
// fused_backward.cuh), in launches: the queries' statistics (and the sinks' gradient), dq, and dk
// with dv, or one after the other.
//
// dq has a block per tile of queries that streams the key tiles they see; dk and dv have a block
// per tile of keys that streams the query tiles that see them, through all query heads of the key's
// group. The scores are computed twice (seven products instead of five); in return nothing is
// summed in global memory: no atomics, no float32 buffer of dq, and the same bits every time.
//
// Both keep their tile (K and V, or Q and dO) in shared memory, with 16 of its tokens for each
// warp, and stream the others through one or two stages. The accumulators of the scores are those
// of the kept tokens, so that P and dS enter the next product from registers.
#pragma once

#include "../gradients.h"
#include "fused_backward.cuh"
#include "tile.h"

namespace onepass::cuda::sm80 {

template <typename Element, int kHeadQk, int kHeadV>
__global__ void __launch_bounds__(kThreads, 2) dq_kernel(const BackwardParams params) {
  using Config = BackwardConfig<kHeadQk, kHeadV>;
  constexpr int kStreamed = Config::kStreamed;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const Place place = place_of_block();
  const int32_t head = place.head, b = blockIdx.z, seq = params.seq;
  const int32_t kv_head = head / (params.heads / params.kv_heads);
  const Plan plan = plan_of_row(params.plan, b, seq);
  const int32_t first_query = plan.query_order[place.entry] * kTile;
  const int32_t warp_query = first_query + warp * 16;

  Element* q_tile = reinterpret_cast<Element*>(shared_memory());
  Element* dout_tile = q_tile + kTile * kHeadQk;
  uint8_t* stages = shared_memory() + Config::kKeptBytes;
  const auto k_stage = [&](int stage) {
    return reinterpret_cast<Element*>(stages + stage * Config::kStageBytes);
  };
  const auto v_stage = [&](int stage) { return k_stage(stage) + kStreamed * kHeadQk; };
  const auto load = [&](const Visit& visit, int stage) {
    if (visit.tile < 0) return;
    load_tile<Element, kStreamed, kHeadQk>(k_stage(stage), params.k, b, kv_head,
                                           visit.tile * kStreamed, seq);
    load_tile<Element, kStreamed, kHeadV>(v_stage(stage), params.v, b, kv_head,
                                          visit.tile * kStreamed, seq);
  };

  KeyTileWalk<kTile, kStreamed> walk(params, b, first_query);
  load_tile<Element, kTile, kHeadQk>(q_tile, params.q, b, head, first_query, seq);
  load_tile<Element, kTile, kHeadV>(dout_tile, params.dout, b, head, first_query, seq);
  Visit visit = walk.next();
  load(visit, 0);
  commit_copies();

  Statistics statistics[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    statistics[half] =
        params.statistics[padded_index(params, b, head, warp_query + 8 * half + lane / 4)];
  }
  const ScoreScale score_scale(params.scoring);
  Accumulator<1, kHeadQk / 8> dq;
  clear(dq);
  int stage = 0;
  while (visit.tile >= 0) {
    const Visit next = walk.next();
    if constexpr (Config::kStages == 2) {
      load(next, stage ^ 1);
      commit_copies();
    }
    wait_copies<Config::kStages - 1>();
    sync_block();  // this stage has arrived

    Accumulator<1, kStreamed / 8> scores, dp;
    multiply_transposed<Element, kHeadQk>(scores, q_tile, warp * 16, k_stage(stage));
    score_keys(scores, score_scale, params, b, warp_query, visit.tile * kStreamed, visit.full);
    multiply_transposed<Element, kHeadV>(dp, dout_tile, warp * 16, v_stage(stage));
    differentiate(scores, dp, score_scale, [&](int, int half, int) { return statistics[half]; });
    LeftFactor<1, kStreamed / 16> ds;
    round_product_to_factor<Element>(ds, scores, dp);
    multiply_add<Element, kHeadQk>(dq, ds, k_stage(stage));

    sync_block();  // every warp is done with this stage
    if constexpr (Config::kStages == 1) {
      load(next, 0);
      commit_copies();
    }
    stage ^= Config::kStages - 1;
    visit = next;
  }
  multiply_by(dq, params.scoring.scale);
  store_gradient<Element, kHeadQk>(q_tile + warp * 16 * kHeadQk, params.dq, b, head, warp_query,
                                   seq, dq);
}

template <typename Element, int kHeadQk, int kHeadV, Want kWant>
__global__ void __launch_bounds__(kThreads, 2) dk_dv_kernel(const BackwardParams params) {
  using Config = BackwardConfig<kHeadQk, kHeadV>;
  constexpr int kStreamed = Config::kStreamed;
  constexpr bool kWantDk = kWant != Want::dv, kWantDv = kWant != Want::dk;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const KeyBlock& block = key_block_of<kStreamed>(params, Config::kSharedBytes);
  const int32_t b = blockIdx.z, seq = params.seq;
  const int32_t first_key = block.keys.first, warp_key = first_key + warp * 16;

  Element* k_tile = reinterpret_cast<Element*>(shared_memory());
  Element* v_tile = k_tile + kTile * kHeadQk;
  uint8_t* stages = shared_memory() + Config::kKeptBytes;
  const auto q_stage = [&](int stage) {
    return reinterpret_cast<Element*>(stages + stage * Config::kStageBytes);
  };
  const auto dout_stage = [&](int stage) { return q_stage(stage) + kStreamed * kHeadQk; };
  const auto statistics_stage = [&](int stage) {
    return reinterpret_cast<Statistics*>(dout_stage(stage) + kStreamed * kHeadV);
  };
  const auto load = [&](const QueryStep& step, int stage) {
    if (step.head < 0) return;
    load_tile<Element, kStreamed, kHeadQk>(q_stage(stage), params.q, b, step.head, step.first, seq);
    load_tile<Element, kStreamed, kHeadV>(dout_stage(stage), params.dout, b, step.head, step.first,
                                          seq);
    load_statistics<kStreamed>(statistics_stage(stage), params, b, step.head, step.first);
  };

  QueryTileWalk<kStreamed> walk(params, block);
  load_tile<Element, kTile, kHeadQk>(k_tile, params.k, b, block.kv_head, first_key, seq);
  if constexpr (kWantDk) {
    load_tile<Element, kTile, kHeadV>(v_tile, params.v, b, block.kv_head, first_key, seq);
  }
  QueryStep step = walk.next();  // at least the tile on the diagonal
  load(step, 0);
  commit_copies();

  const ScoreScale score_scale(params.scoring);
  Accumulator<1, kWantDk ? kHeadQk / 8 : 1> dk;
  Accumulator<1, kWantDv ? kHeadV / 8 : 1> dv;
  clear(dk);
  clear(dv);
  int stage = 0;
  while (step.head >= 0) {
    const QueryStep next = walk.next();
    if constexpr (Config::kStages == 2) {
      load(next, stage ^ 1);
      commit_copies();
    }
    wait_copies<Config::kStages - 1>();
    sync_block();  // this stage has arrived

    Accumulator<1, kStreamed / 8> scores, dp;
    multiply_transposed<Element, kHeadQk>(scores, k_tile, warp * 16, q_stage(stage));
    score_queries(scores, score_scale, params, b, warp_key, step.first, step.full);
    if constexpr (kWantDk) {
      multiply_transposed<Element, kHeadV>(dp, v_tile, warp * 16, dout_stage(stage));
    } else {
      clear(dp);
    }
    const Statistics* statistics = statistics_stage(stage);
    differentiate(scores, dp, score_scale, [&](int n, int, int column) {
      return statistics[8 * n + 2 * (lane % 4) + column];
    });
    LeftFactor<1, kStreamed / 16> factor;
    if constexpr (kWantDv) {
      round_to_factor<Element>(factor, scores);
      multiply_add<Element, kHeadV>(dv, factor, dout_stage(stage));
    }
    if constexpr (kWantDk) {
      round_product_to_factor<Element>(factor, scores, dp);
      multiply_add<Element, kHeadQk>(dk, factor, q_stage(stage));
    }

    sync_block();  // every warp is done with this stage
    if constexpr (Config::kStages == 1) {
      load(next, 0);
      commit_copies();
    }
    stage ^= Config::kStages - 1;
    step = next;
  }
  if constexpr (kWantDk) {
    store_gradient_of_keys<Element, kHeadQk>(k_tile + warp * 16 * kHeadQk, params.dk,
                                             params.dk_parts, params, block, b, warp_key,
                                             params.scoring.scale, dk);
  }
  if constexpr (kWantDv) {
    store_gradient_of_keys<Element, kHeadV>(v_tile + warp * 16 * kHeadV, params.dv, params.dv_parts,
                                            params, block, b, warp_key, 1, dv);
  }
}

template <typename Element, int kHeadQk, int kHeadV>
void launch_backward(const BackwardParams& params, Stream stream) {
  using Config = BackwardConfig<kHeadQk, kHeadV>;
  if constexpr (Config::kFused) {
    launch_fused_backward<Element, kHeadQk>(params, stream);
  } else {
    const int32_t tiles = num_tiles(params.seq);
    launch_statistics<Element>(params, kHeadQk, kHeadV, stream);
    launch(dq_kernel<Element, kHeadQk, kHeadV>, Grid{tiles, params.heads, params.batch}, kThreads,
           Config::kSharedBytes, stream, params);
    const Grid by_keys{tiles, params.kv_heads * params.group_parts, params.batch};
    if constexpr (Config::kSeparate) {
      launch(dk_dv_kernel<Element, kHeadQk, kHeadV, Want::dv>, by_keys, kThreads,
             Config::kSharedBytes, stream, params);
      launch(dk_dv_kernel<Element, kHeadQk, kHeadV, Want::dk>, by_keys, kThreads,
             Config::kSharedBytes, stream, params);
    } else {
      launch(dk_dv_kernel<Element, kHeadQk, kHeadV, Want::dk_and_dv>, by_keys, kThreads,
             Config::kSharedBytes, stream, params);
    }
    launch_add_parts<Element>(params, kHeadQk, kHeadV, stream);
  }
}

}  // namespace onepass::cuda::sm80
