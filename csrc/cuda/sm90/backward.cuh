// Hopper backward for the head sizes that fused_backward.cuh does not have, in launches as in
// sm80/backward.cuh: statistics, dq, dv and dk. The scores are computed three times, nothing is
// summed in global memory, and the bits are the same every time.
//
// Three warpgroups. One warp of the first starts the copies of tiles: first, for each of the other
// two warpgroups, the 64 tokens that it keeps (Q and dO for dq, K and V for dk and dv), then the
// tiles of 64 others through two stages (one stage of dO and V for large head sizes), and tells the
// consumers which they are. A consumer computes the scores and the gradient of the probabilities
// with its kept tokens, with P and dS in registers, and multiplies these with a streamed tile.
// While one consumer exponentiates, the products of the other run.
#pragma once

#include "../gradients.h"
#include "backward_memory.h"
#include "fused_backward.cuh"

namespace onepass::cuda::sm90 {

template <typename Element, int kHeadQk, int kHeadV>
__global__ void __launch_bounds__(kThreads, 1)
    dq_kernel(const BackwardParams params, const __grid_constant__ BackwardMaps maps) {
  using Config = BackwardConfig<kHeadQk, kHeadV>;
  using TileQk = typename Config::TileQk;
  using TileV = typename Config::TileV;
  constexpr int kStreamed = Config::kStreamed;
  using Walk = KeyTileWalk<kConsumers * kStreamed, kStreamed>;
  const int warpgroup = threadIdx.x / kWarpgroup, lane = threadIdx.x % 32;
  const Place place = place_of_block();
  const int32_t head = place.head, b = blockIdx.z, seq = params.seq;
  const int32_t first_query =
      plan_of_row(params.plan, b, seq).query_order_2[place.entry] * kConsumers * kStreamed;
  const BackwardMemory<Config> memory;
  memory.init_barriers();

  if (warpgroup == 0) {
    release_registers<kProducerRegisters>();
    if (threadIdx.x >= 32) return;
    const int32_t kv_head = head / (params.heads / params.kv_heads);
    if (lane == 0) memory.copy_kept(maps.q, maps.dout, true, first_query, head, b);
    Walk walk(params, b, first_query);
    Stage<Config::kStagesQk> qk;
    Stage<Config::kStagesV> v;
    Visit visit = walk.next();
    for (; visit.tile >= 0; visit = walk.next()) {
      const int32_t first_key = visit.tile * kStreamed;
      wait(memory.empty_qk(qk.index), qk.parity ^ 1);  // returns at once in the first round
      if (lane == 0) {
        *memory.visit(qk.index) = visit;
        memory.copy_qk(qk.index, maps.k, first_key, kv_head, b, 0);
      }
      wait(memory.empty_v(v.index), v.parity ^ 1);
      if (lane == 0) memory.copy_v(v.index, maps.v, first_key, kv_head, b);
      qk.advance();
      v.advance();
    }
    wait(memory.empty_qk(qk.index), qk.parity ^ 1);
    if (lane == 0) {
      *memory.visit(qk.index) = visit;
      arrive(memory.full_qk(qk.index));
    }
    return;
  }

  take_registers<kConsumerRegisters>();
  const int consumer = consumer_of_warp(), warp = threadIdx.x / 32 % 4;
  const int32_t warp_query = first_query + consumer * kStreamed + warp * 16;
  const ScoreScale score_scale(params.scoring);
  Statistics statistics[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int32_t query = warp_query + 8 * half + lane / 4;
    statistics[half] = query < seq ? params.statistics[padded_index(params, b, head, query)]
                                   : Statistics{INFINITY, 0};
  }
  Accumulator<1, kHeadQk / 8> dq;
  clear(dq);
  wait(memory.kept_full(), 0);
  Stage<Config::kStagesQk> qk;
  Stage<Config::kStagesV> v;
  while (true) {
    wait(memory.full_qk(qk.index), qk.parity);
    const Visit visit = *memory.visit(qk.index);
    if (visit.tile < 0) break;
    Accumulator<1, kStreamed / 8> scores, dp;
    start_transposed<Element, TileQk, TileQk>(scores[0], memory.kept_qk(consumer), 0,
                                              memory.stage_qk(qk.index));
    wait(memory.full_v(v.index), v.parity);
    start_transposed<Element, TileV, TileV>(dp[0], memory.kept_v(consumer), 0,
                                            memory.stage_v(v.index));
    commit_products();
    wait_products<0>();
    hold(scores[0]);
    hold(dp[0]);
    release(memory.empty_v(v.index));
    v.advance();
    score_keys(scores, score_scale, params, b, warp_query, visit.tile * kStreamed, visit.full);
    differentiate(scores, dp, score_scale, [&](int, int half, int) { return statistics[half]; });
    LeftFactor<1, kStreamed / 16> ds;
    round_product_to_factor<Element>(ds, scores, dp);
    start_add<Element, TileQk>(dq[0], ds[0], memory.stage_qk(qk.index));
    commit_products();
    wait_products<0>();
    hold(dq[0]);
    release(memory.empty_qk(qk.index));
    qk.advance();
  }
  sync_threads(1 + consumer, kWarpgroup);  // the whole consumer is done with its kept tiles
  multiply_by(dq, params.scoring.scale);
  Element* staging = reinterpret_cast<Element*>(memory.kept_qk(consumer)) + warp * 16 * kHeadQk;
  store_gradient<Element, kHeadQk>(staging, params.dq, b, head, warp_query, seq, dq);
}

// dk or dv: the registers don't hold both.
template <typename Element, int kHeadQk, int kHeadV, Want kWant>
__global__ void __launch_bounds__(kThreads, 1)
    dk_dv_kernel(const BackwardParams params, const __grid_constant__ BackwardMaps maps) {
  using Config = BackwardConfig<kHeadQk, kHeadV>;
  using TileQk = typename Config::TileQk;
  using TileV = typename Config::TileV;
  constexpr int kStreamed = Config::kStreamed;
  static_assert(kWant != Want::dk_and_dv);
  constexpr bool kWantDk = kWant == Want::dk;
  const int warpgroup = threadIdx.x / kWarpgroup;
  const int32_t b = blockIdx.z;
  const BackwardMemory<Config> memory;
  memory.init_barriers_and_block(params);

  if (warpgroup == 0) {
    release_registers<kProducerRegisters>();
    if (threadIdx.x < 32) bring_keys_and_queries(memory, params, maps, kWantDk);
    return;
  }

  take_registers<kConsumerRegisters>();
  const int consumer = consumer_of_warp(), warp = threadIdx.x / 32 - 4;  // of eight
  const KeyBlock& block = memory.block();
  const ScoreScale score_scale(params.scoring);
  Accumulator<1, kWantDk ? kHeadQk / 8 : 1> dk;
  Accumulator<1, kWantDk ? 1 : kHeadV / 8> dv;
  clear(dk);
  clear(dv);
  wait(memory.kept_full(), 0);
  Stage<Config::kStagesQk> qk;
  Stage<Config::kStagesV> v;
  while (true) {
    wait(memory.full_qk(qk.index), qk.parity);
    const QueryStep step = *memory.step(qk.index);
    if (step.head < 0) break;
    Accumulator<1, kStreamed / 8> scores, dp;
    start_transposed<Element, TileQk, TileQk>(scores[0], memory.kept_qk(consumer), 0,
                                              memory.stage_qk(qk.index));
    if constexpr (kWantDk) {
      wait(memory.full_v(v.index), v.parity);
      start_transposed<Element, TileV, TileV>(dp[0], memory.kept_v(consumer), 0,
                                              memory.stage_v(v.index));
    } else {
      clear(dp);
    }
    commit_products();
    wait_products<0>();
    hold(scores[0]);
    hold(dp[0]);
    if constexpr (kWantDk) release(memory.empty_v(v.index));
    score_queries(scores, score_scale, params, b, block.keys.first + warp * 16, step.first,
                  step.full);
    const Statistics* of_queries = memory.statistics(qk.index) + 2 * (recomputed(threadIdx.x) % 4);
    differentiate(scores, dp, score_scale,
                  [&](int n, int, int column) { return of_queries[8 * n + column]; });
    LeftFactor<1, kStreamed / 16> factor;
    if constexpr (kWantDk) {
      round_product_to_factor<Element>(factor, scores, dp);
      start_add<Element, TileQk>(dk[0], factor[0], memory.stage_qk(qk.index));
    } else {
      release(memory.empty_qk(qk.index));
      wait(memory.full_v(v.index), v.parity);
      round_to_factor<Element>(factor, scores);
      start_add<Element, TileV>(dv[0], factor[0], memory.stage_v(v.index));
    }
    commit_products();
    wait_products<0>();
    if constexpr (kWantDk) {
      hold(dk[0]);
      release(memory.empty_qk(qk.index));
    } else {
      hold(dv[0]);
      release(memory.empty_v(v.index));
    }
    qk.advance();
    v.advance();
  }
  const int32_t warp_key = block.keys.first + warp * 16;
  sync_threads(1 + consumer, kWarpgroup);  // the whole consumer is done with its kept tiles
  if constexpr (kWantDk) {
    Element* staging =
        reinterpret_cast<Element*>(memory.kept_qk(consumer)) + warp % 4 * 16 * kHeadQk;
    store_gradient_of_keys<Element, kHeadQk>(staging, params.dk, params.dk_parts, params, block, b,
                                             warp_key, params.scoring.scale, dk);
  } else {
    Element* staging = reinterpret_cast<Element*>(memory.kept_v(consumer)) + warp % 4 * 16 * kHeadV;
    store_gradient_of_keys<Element, kHeadV>(staging, params.dv, params.dv_parts, params, block, b,
                                            warp_key, 1, dv);
  }
}

template <typename Element, int kHeadQk, int kHeadV>
void launch_backward(const BackwardParams& params, Stream stream) {
  using Config = BackwardConfig<kHeadQk, kHeadV>;
  if constexpr (Config::kFused) {
    launch_fused_backward<Element, kHeadQk>(params, stream);
  } else {
    constexpr int kStreamed = Config::kStreamed;
    const auto map = [&](const Tensor& tensor, int32_t heads, int32_t head_dim) {
      return make_tensor_map<Element>(tensor, params.batch, heads, params.seq, head_dim, kStreamed);
    };
    const BackwardMaps maps{
        map(params.q, params.heads, kHeadQk), map(params.k, params.kv_heads, kHeadQk),
        map(params.v, params.kv_heads, kHeadV), map(params.dout, params.heads, kHeadV)};
    const int32_t pairs = ceil_div(params.seq, kConsumers * kStreamed);
    launch_statistics<Element>(params, kHeadQk, kHeadV, stream);
    launch(dq_kernel<Element, kHeadQk, kHeadV>, Grid{pairs, params.heads, params.batch}, kThreads,
           Config::kSharedBytes, stream, params, maps);
    const Grid by_keys{pairs, params.kv_heads * params.group_parts, params.batch};
    launch(dk_dv_kernel<Element, kHeadQk, kHeadV, Want::dv>, by_keys, kThreads,
           Config::kSharedBytes, stream, params, maps);
    launch(dk_dv_kernel<Element, kHeadQk, kHeadV, Want::dk>, by_keys, kThreads,
           Config::kSharedBytes, stream, params, maps);
    launch_add_parts<Element>(params, kHeadQk, kHeadV, stream);
  }
}

}  // namespace onepass::cuda::sm90
