// Hopper backward, in launches as in sm80/backward.cuh: statistics, dq, and dk with dv. The scores
// are computed twice, nothing is added up in global memory, and the bits are the same every time.
//
// Three warpgroups. One warp of the first has the copy engine bring tiles: at the start, for each
// of the other two warpgroups, the 64 tokens that it keeps (Q and dO for dq, K and V for dk and
// dv), then the tiles of 64 others, two stages. A consumer computes the scores and the gradient of
// the probabilities with its kept tokens as rows, P and dS in registers, and multiplies these with
// the streamed tile. While one consumer exponentiates, the products of the other run.
//
// Barriers: `full` of a stage is over when its bytes are there, `empty` when both consumers are
// done with it (one arrival per warp).
#pragma once

#include "../gradients.h"
#include "tensor_map.h"
#include "tile.h"

namespace onepass::cuda::sm90 {

struct BackwardMaps {
  TensorMap q, k, v, dout;
};

// Shared memory of both backward kernels: of each consumer its pair of kept tiles (of d_qk and of
// d_v columns), then the stages (the streamed pair, and statistics), then the barriers.
template <typename Config>
struct BackwardMemory {
  uint8_t* begin = shared_memory();

  __device__ __forceinline__ uint8_t* kept_qk(int consumer) const {
    return begin + consumer * Config::kPairBytes;
  }
  __device__ __forceinline__ uint8_t* kept_v(int consumer) const {
    return kept_qk(consumer) + Config::TileQk::kBytes;
  }
  __device__ __forceinline__ uint8_t* stage_qk(int stage) const {
    return kept_qk(kConsumers) + stage * Config::kStageBytes;
  }
  __device__ __forceinline__ uint8_t* stage_v(int stage) const {
    return stage_qk(stage) + Config::TileQk::kBytes;
  }
  __device__ __forceinline__ Statistics* stage_statistics(int stage) const {
    return reinterpret_cast<Statistics*>(stage_qk(stage) + Config::kPairBytes);
  }
  __device__ __forceinline__ Barrier* kept_full() const {
    return reinterpret_cast<Barrier*>(stage_qk(Config::kStages));
  }
  __device__ __forceinline__ Barrier* full(int stage) const { return kept_full() + 1 + stage; }
  __device__ __forceinline__ Barrier* empty(int stage) const {
    return full(Config::kStages) + stage;
  }

  // By all threads.
  __device__ __forceinline__ void init_barriers() const {
    if (threadIdx.x == 0) {
      init_barrier(kept_full(), 1);
      for (int stage = 0; stage < Config::kStages; ++stage) {
        init_barrier(full(stage), 1);
        init_barrier(empty(stage), kConsumers * 4);
      }
      publish_barriers();
    }
    sync_block();
  }

  // By one thread: each consumer's tokens, from `first` on.
  __device__ __forceinline__ void copy_kept(const TensorMap& qk, const TensorMap& v, int first,
                                            int head, int row) const {
    arrive_and_expect(kept_full(), kConsumers * Config::kPairBytes);
    for (int consumer = 0; consumer < kConsumers; ++consumer) {
      const int token = first + consumer * Config::kRows;
      copy_tile<typename Config::TileQk>(kept_qk(consumer), qk, kept_full(), token, head, row);
      copy_tile<typename Config::TileV>(kept_v(consumer), v, kept_full(), token, head, row);
    }
  }

  // By one thread, with `more_bytes` to come.
  __device__ __forceinline__ void copy_stage(int stage, const TensorMap& qk, const TensorMap& v,
                                             int first, int head, int row, int more_bytes) const {
    arrive_and_expect(full(stage), Config::kPairBytes + more_bytes);
    copy_tile<typename Config::TileQk>(stage_qk(stage), qk, full(stage), first, head, row);
    copy_tile<typename Config::TileV>(stage_v(stage), v, full(stage), first, head, row);
  }
};

template <typename Element, int kHeadQk, int kHeadV>
__global__ void __launch_bounds__(kThreads, 1)
    dq_kernel(const BackwardParams params, const __grid_constant__ BackwardMaps maps) {
  using Config = BackwardConfig<kHeadQk, kHeadV>;
  using TileQk = typename Config::TileQk;
  using TileV = typename Config::TileV;
  constexpr int kRows = Config::kRows;
  using Walk = KeyTileWalk<kConsumers * kRows, kRows>;
  const int warpgroup = threadIdx.x / kWarpgroup, lane = threadIdx.x % 32;
  const int32_t head = blockIdx.y, row = blockIdx.z, seq = params.seq;
  const int32_t first_query =
      plan_of_row(params.plan, row, seq).query_order_2[blockIdx.x] * kConsumers * kRows;
  const BackwardMemory<Config> memory;
  memory.init_barriers();

  if (warpgroup == 0) {
    release_registers<kProducerRegisters>();
    if (threadIdx.x >= 32) return;
    const int32_t kv_head = head / (params.heads / params.kv_heads);
    if (lane == 0) memory.copy_kept(maps.q, maps.dout, first_query, head, row);
    Walk walk(params, row, first_query);
    Stage stage;
    for (Visit visit = walk.next(); visit.tile >= 0; visit = walk.next(), stage.advance()) {
      wait(memory.empty(stage.index), stage.parity ^ 1);  // over at once in the first round
      if (lane == 0) {
        memory.copy_stage(stage.index, maps.k, maps.v, visit.tile * kRows, kv_head, row, 0);
      }
    }
    return;
  }

  take_registers<kConsumerRegisters>();
  const int consumer = warpgroup - 1, warp = threadIdx.x / 32 % 4;
  const int32_t warp_query = first_query + consumer * kRows + warp * 16;
  const ScoreScale score_scale(params);
  const int64_t head_of_row = static_cast<int64_t>(row) * params.heads + head;
  Statistics statistics[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int32_t query = warp_query + 8 * half + lane / 4;
    statistics[half] = query < seq ? params.statistics[head_of_row * num_tiles(seq) * kTile + query]
                                   : Statistics{INFINITY, 0};
  }
  Accumulator<1, kHeadQk / 8> dq;
  clear(dq);
  wait(memory.kept_full(), 0);
  Walk walk(params, row, first_query);
  Stage stage;
  for (Visit visit = walk.next(); visit.tile >= 0; visit = walk.next(), stage.advance()) {
    const int32_t first_key = visit.tile * kRows;
    wait(memory.full(stage.index), stage.parity);
    Accumulator<1, kRows / 8> scores, dp;
    start_transposed<Element, TileQk, TileQk>(scores[0], memory.kept_qk(consumer), 0,
                                              memory.stage_qk(stage.index));
    start_transposed<Element, TileV, TileV>(dp[0], memory.kept_v(consumer), 0,
                                            memory.stage_v(stage.index));
    commit_products();
    wait_products<0>();
    hold(scores[0]);
    hold(dp[0]);
    score_scale.cap(scores);
    if (!visit.full) mask_keys(scores, params, row, warp_query, first_key);
    differentiate(scores, dp, score_scale, [&](int, int half, int) { return statistics[half]; });
    LeftFactor<1, kRows / 16> ds;
    round_product_to_factor<Element>(ds, scores, dp);
    start_add<Element, TileQk>(dq[0], ds[0], memory.stage_qk(stage.index));
    commit_products();
    wait_products<0>();
    hold(dq[0]);
    release(memory.empty(stage.index));
  }
  sync_threads(1 + consumer, kWarpgroup);  // the whole consumer is done with its kept tiles
  multiply_by(dq, params.scale);
  Element* staging = reinterpret_cast<Element*>(memory.kept_qk(consumer)) + warp * 16 * kHeadQk;
  store_gradient<Element, kHeadQk>(staging, params.dq, row, head, warp_query, seq, dq);
}

template <typename Element, int kHeadQk, int kHeadV>
__global__ void __launch_bounds__(kThreads, 1)
    dk_dv_kernel(const BackwardParams params, const __grid_constant__ BackwardMaps maps) {
  using Config = BackwardConfig<kHeadQk, kHeadV>;
  using TileQk = typename Config::TileQk;
  using TileV = typename Config::TileV;
  constexpr int kRows = Config::kRows;
  using Walk = QueryTileWalk<kRows, kConsumers * kRows>;
  const int warpgroup = threadIdx.x / kWarpgroup, lane = threadIdx.x % 32;
  const int32_t kv_head = blockIdx.y, row = blockIdx.z, seq = params.seq;
  const int32_t group = params.heads / params.kv_heads;
  const Plan plan = plan_of_row(params.plan, row, seq);
  const int32_t tile = plan.key_order_2[blockIdx.x];
  const int32_t first_key = tile * kConsumers * kRows;
  const BackwardMemory<Config> memory;
  memory.init_barriers();

  if (warpgroup == 0) {
    release_registers<kProducerRegisters>();
    if (threadIdx.x >= 32) return;
    if (lane == 0) memory.copy_kept(maps.k, maps.v, first_key, kv_head, row);
    Walk walk(params, row, tile, group);
    Stage stage;
    for (auto step = walk.next(); step.head >= 0; step = walk.next(), stage.advance()) {
      const int32_t head = kv_head * group + step.head;
      const int64_t head_of_row = static_cast<int64_t>(row) * params.heads + head;
      wait(memory.empty(stage.index), stage.parity ^ 1);  // over at once in the first round
      if (lane == 0) {
        memory.copy_stage(stage.index, maps.q, maps.dout, step.first, head, row,
                          Config::kStatisticsBytes);
        copy_bytes(memory.stage_statistics(stage.index),
                   params.statistics + head_of_row * num_tiles(seq) * kTile + step.first,
                   Config::kStatisticsBytes, memory.full(stage.index));
      }
    }
    return;
  }

  take_registers<kConsumerRegisters>();
  const int consumer = warpgroup - 1, warp = threadIdx.x / 32 % 4;
  // Found anew where it is needed: the main loop has no register for it.
  const auto warp_key = [&] {
    return plan_of_row(params.plan, row, seq).key_order_2[blockIdx.x] * kConsumers * kRows +
           (recomputed(threadIdx.x) / 32 - 4) * 16;
  };
  const ScoreScale score_scale(params);
  Accumulator<1, kHeadQk / 8> dk;
  Accumulator<1, kHeadV / 8> dv;
  clear(dk);
  clear(dv);
  wait(memory.kept_full(), 0);
  Walk walk(params, row, tile, group);
  Stage stage;
  for (auto step = walk.next(); step.head >= 0; step = walk.next(), stage.advance()) {
    wait(memory.full(stage.index), stage.parity);
    Accumulator<1, kRows / 8> scores, dp;
    start_transposed<Element, TileQk, TileQk>(scores[0], memory.kept_qk(consumer), 0,
                                              memory.stage_qk(stage.index));
    start_transposed<Element, TileV, TileV>(dp[0], memory.kept_v(consumer), 0,
                                            memory.stage_v(stage.index));
    commit_products();
    wait_products<0>();
    hold(scores[0]);
    hold(dp[0]);
    score_scale.cap(scores);
    if (!step.full) mask_queries(scores, params, row, warp_key(), step.first);
    const Statistics* statistics = memory.stage_statistics(stage.index);
    differentiate(scores, dp, score_scale, [&](int n, int, int column) {
      return statistics[8 * n + 2 * (lane % 4) + column];
    });
    LeftFactor<1, kRows / 16> probabilities, ds;
    round_to_factor<Element>(probabilities, scores);
    start_add<Element, TileV>(dv[0], probabilities[0], memory.stage_v(stage.index));
    commit_products();
    wait_products<0>();
    hold(dv[0]);
    round_product_to_factor<Element>(ds, scores, dp);
    start_add<Element, TileQk>(dk[0], ds[0], memory.stage_qk(stage.index));
    commit_products();
    wait_products<0>();
    hold(dk[0]);
    release(memory.empty(stage.index));
  }
  sync_threads(1 + consumer, kWarpgroup);  // the whole consumer is done with its kept tiles
  multiply_by(dk, params.scale);
  Element* k_staging = reinterpret_cast<Element*>(memory.kept_qk(consumer)) + warp * 16 * kHeadQk;
  Element* v_staging = reinterpret_cast<Element*>(memory.kept_v(consumer)) + warp * 16 * kHeadV;
  store_gradient<Element, kHeadQk>(k_staging, params.dk, row, kv_head, warp_key(), seq, dk);
  store_gradient<Element, kHeadV>(v_staging, params.dv, row, kv_head, warp_key(), seq, dv);
}

template <typename Element, int kHeadQk, int kHeadV>
void launch_backward(const BackwardParams& params, Stream stream) {
  using Config = BackwardConfig<kHeadQk, kHeadV>;
  constexpr int kRows = Config::kRows;
  const auto map = [&](const Tensor& tensor, int32_t heads, int32_t head_dim) {
    return make_tensor_map<Element>(tensor, params.batch, heads, params.seq, head_dim, kRows);
  };
  const BackwardMaps maps{
      map(params.q, params.heads, kHeadQk), map(params.k, params.kv_heads, kHeadQk),
      map(params.v, params.kv_heads, kHeadV), map(params.dout, params.heads, kHeadV)};
  const int32_t pairs = ceil_div(params.seq, kConsumers * kRows);
  launch_statistics<Element>(params, kHeadV, stream);
  launch(dq_kernel<Element, kHeadQk, kHeadV>, Grid{pairs, params.heads, params.batch}, kThreads,
         Config::kSharedBytes, stream, params, maps);
  launch(dk_dv_kernel<Element, kHeadQk, kHeadV>, Grid{pairs, params.kv_heads, params.batch},
         kThreads, Config::kSharedBytes, stream, params, maps);
}

}  // namespace onepass::cuda::sm90
