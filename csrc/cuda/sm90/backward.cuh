// Hopper backward, in launches as in sm80/backward.cuh: statistics, dq, and dk with dv. The scores
// are computed twice, nothing is added up in global memory, and the bits are the same every time.
//
// Three warpgroups. One warp of the first has the copy engine bring tiles: at the start, for each
// of the other two warpgroups, the 64 tokens that it keeps (Q and dO for dq, K and V for dk and
// dv), then the tiles of 64 others through two stages (of dO and V one, where head sizes are
// large). A consumer computes the scores and the gradient of the probabilities with its kept tokens
// as rows, P and dS in registers, and multiplies these with a streamed tile. While one consumer
// exponentiates, the products of the other run.
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
// d_v columns), then the stages of the streamed tiles of d_qk columns and of those of d_v columns,
// the statistics that belong to the former, and the barriers.
template <typename Config>
struct BackwardMemory {
  using TileQk = typename Config::TileQk;
  using TileV = typename Config::TileV;
  uint8_t* begin = shared_memory();

  __device__ __forceinline__ uint8_t* kept_qk(int consumer) const {
    return begin + consumer * Config::kPairBytes;
  }
  __device__ __forceinline__ uint8_t* kept_v(int consumer) const {
    return kept_qk(consumer) + TileQk::kBytes;
  }
  __device__ __forceinline__ uint8_t* stage_qk(int stage) const {
    return kept_qk(kConsumers) + stage * TileQk::kBytes;
  }
  __device__ __forceinline__ uint8_t* stage_v(int stage) const {
    return stage_qk(Config::kStagesQk) + stage * TileV::kBytes;
  }
  __device__ __forceinline__ Statistics* statistics(int stage) const {
    return reinterpret_cast<Statistics*>(stage_v(Config::kStagesV)) + stage * Config::kRows;
  }
  __device__ __forceinline__ Barrier* kept_full() const {
    return reinterpret_cast<Barrier*>(statistics(Config::kStagesQk));
  }
  __device__ __forceinline__ Barrier* full_qk(int stage) const { return kept_full() + 1 + stage; }
  __device__ __forceinline__ Barrier* empty_qk(int stage) const {
    return full_qk(Config::kStagesQk) + stage;
  }
  __device__ __forceinline__ Barrier* full_v(int stage) const {
    return empty_qk(Config::kStagesQk) + stage;
  }
  __device__ __forceinline__ Barrier* empty_v(int stage) const {
    return full_v(Config::kStagesV) + stage;
  }

  // By all threads.
  __device__ __forceinline__ void init_barriers() const {
    if (threadIdx.x == 0) {
      init_barrier(kept_full(), 1);
      for (int stage = 0; stage < Config::kStagesQk; ++stage) {
        init_barrier(full_qk(stage), 1);
        init_barrier(empty_qk(stage), kConsumers * 4);
      }
      for (int stage = 0; stage < Config::kStagesV; ++stage) {
        init_barrier(full_v(stage), 1);
        init_barrier(empty_v(stage), kConsumers * 4);
      }
      publish_barriers();
    }
    sync_block();
  }

  // By one thread: each consumer's tokens, from `first` on; those of `v` only if they are wanted.
  __device__ __forceinline__ void copy_kept(const TensorMap& qk, const TensorMap& v, bool want_v,
                                            int first, int head, int row) const {
    arrive_and_expect(kept_full(), kConsumers * (want_v ? Config::kPairBytes : TileQk::kBytes));
    for (int consumer = 0; consumer < kConsumers; ++consumer) {
      const int token = first + consumer * Config::kRows;
      copy_tile<TileQk>(kept_qk(consumer), qk, kept_full(), token, head, row);
      if (want_v) copy_tile<TileV>(kept_v(consumer), v, kept_full(), token, head, row);
    }
  }

  // By one thread, with `more_bytes` to come.
  __device__ __forceinline__ void copy_qk(int stage, const TensorMap& qk, int first, int head,
                                          int row, int more_bytes) const {
    arrive_and_expect(full_qk(stage), TileQk::kBytes + more_bytes);
    copy_tile<TileQk>(stage_qk(stage), qk, full_qk(stage), first, head, row);
  }
  __device__ __forceinline__ void copy_v(int stage, const TensorMap& v, int first, int head,
                                         int row) const {
    arrive_and_expect(full_v(stage), TileV::kBytes);
    copy_tile<TileV>(stage_v(stage), v, full_v(stage), first, head, row);
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
    if (lane == 0) memory.copy_kept(maps.q, maps.dout, true, first_query, head, row);
    Walk walk(params, row, first_query);
    Stage<Config::kStagesQk> qk;
    Stage<Config::kStagesV> v;
    for (Visit visit = walk.next(); visit.tile >= 0; visit = walk.next()) {
      const int32_t first_key = visit.tile * kRows;
      wait(memory.empty_qk(qk.index), qk.parity ^ 1);  // over at once in the first round
      if (lane == 0) memory.copy_qk(qk.index, maps.k, first_key, kv_head, row, 0);
      wait(memory.empty_v(v.index), v.parity ^ 1);
      if (lane == 0) memory.copy_v(v.index, maps.v, first_key, kv_head, row);
      qk.advance();
      v.advance();
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
  Stage<Config::kStagesQk> qk;
  Stage<Config::kStagesV> v;
  for (Visit visit = walk.next(); visit.tile >= 0; visit = walk.next()) {
    const int32_t first_key = visit.tile * kRows;
    Accumulator<1, kRows / 8> scores, dp;
    wait(memory.full_qk(qk.index), qk.parity);
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
    score_scale.cap(scores);
    if (!visit.full) mask_keys(scores, params, row, warp_query, first_key);
    differentiate(scores, dp, score_scale, [&](int, int half, int) { return statistics[half]; });
    LeftFactor<1, kRows / 16> ds;
    round_product_to_factor<Element>(ds, scores, dp);
    start_add<Element, TileQk>(dq[0], ds[0], memory.stage_qk(qk.index));
    commit_products();
    wait_products<0>();
    hold(dq[0]);
    release(memory.empty_qk(qk.index));
    qk.advance();
  }
  sync_threads(1 + consumer, kWarpgroup);  // the whole consumer is done with its kept tiles
  multiply_by(dq, params.scale);
  Element* staging = reinterpret_cast<Element*>(memory.kept_qk(consumer)) + warp * 16 * kHeadQk;
  store_gradient<Element, kHeadQk>(staging, params.dq, row, head, warp_query, seq, dq);
}

template <typename Element, int kHeadQk, int kHeadV, Want kWant>
__global__ void __launch_bounds__(kThreads, 1)
    dk_dv_kernel(const BackwardParams params, const __grid_constant__ BackwardMaps maps) {
  using Config = BackwardConfig<kHeadQk, kHeadV>;
  using TileQk = typename Config::TileQk;
  using TileV = typename Config::TileV;
  constexpr int kRows = Config::kRows;
  constexpr bool kWantDk = kWant != Want::dv, kWantDv = kWant != Want::dk;
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
    if (lane == 0) memory.copy_kept(maps.k, maps.v, kWantDk, first_key, kv_head, row);
    Walk walk(params, row, tile, group);
    Stage<Config::kStagesQk> qk;
    Stage<Config::kStagesV> v;
    for (auto step = walk.next(); step.head >= 0; step = walk.next()) {
      const int32_t head = kv_head * group + step.head;
      const int64_t head_of_row = static_cast<int64_t>(row) * params.heads + head;
      wait(memory.empty_qk(qk.index), qk.parity ^ 1);  // over at once in the first round
      if (lane == 0) {
        memory.copy_qk(qk.index, maps.q, step.first, head, row, Config::kStatisticsBytes);
        copy_bytes(memory.statistics(qk.index),
                   params.statistics + head_of_row * num_tiles(seq) * kTile + step.first,
                   Config::kStatisticsBytes, memory.full_qk(qk.index));
      }
      wait(memory.empty_v(v.index), v.parity ^ 1);
      if (lane == 0) memory.copy_v(v.index, maps.dout, step.first, head, row);
      qk.advance();
      v.advance();
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
  Accumulator<1, kWantDk ? kHeadQk / 8 : 1> dk;
  Accumulator<1, kWantDv ? kHeadV / 8 : 1> dv;
  clear(dk);
  clear(dv);
  wait(memory.kept_full(), 0);
  Walk walk(params, row, tile, group);
  Stage<Config::kStagesQk> qk;
  Stage<Config::kStagesV> v;
  for (auto step = walk.next(); step.head >= 0; step = walk.next()) {
    Accumulator<1, kRows / 8> scores, dp;
    wait(memory.full_qk(qk.index), qk.parity);
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
    if constexpr (!kWantDv) release(memory.empty_v(v.index));
    score_scale.cap(scores);
    if (!step.full) mask_queries(scores, params, row, warp_key(), step.first);
    const Statistics* statistics = memory.statistics(qk.index);
    differentiate(scores, dp, score_scale, [&](int n, int, int column) {
      return statistics[8 * n + 2 * (lane % 4) + column];
    });
    if constexpr (!kWantDk) {
      release(memory.empty_qk(qk.index));
      wait(memory.full_v(v.index), v.parity);
    }
    if constexpr (kWantDv) {
      LeftFactor<1, kRows / 16> probabilities;
      round_to_factor<Element>(probabilities, scores);
      start_add<Element, TileV>(dv[0], probabilities[0], memory.stage_v(v.index));
      commit_products();
      wait_products<0>();
      hold(dv[0]);
      release(memory.empty_v(v.index));
    }
    if constexpr (kWantDk) {
      LeftFactor<1, kRows / 16> ds;
      round_product_to_factor<Element>(ds, scores, dp);
      start_add<Element, TileQk>(dk[0], ds[0], memory.stage_qk(qk.index));
      commit_products();
      wait_products<0>();
      hold(dk[0]);
      release(memory.empty_qk(qk.index));
    }
    qk.advance();
    v.advance();
  }
  sync_threads(1 + consumer, kWarpgroup);  // the whole consumer is done with its kept tiles
  if constexpr (kWantDk) {
    multiply_by(dk, params.scale);
    Element* staging = reinterpret_cast<Element*>(memory.kept_qk(consumer)) + warp * 16 * kHeadQk;
    store_gradient<Element, kHeadQk>(staging, params.dk, row, kv_head, warp_key(), seq, dk);
  }
  if constexpr (kWantDv) {
    Element* staging = reinterpret_cast<Element*>(memory.kept_v(consumer)) + warp * 16 * kHeadV;
    store_gradient<Element, kHeadV>(staging, params.dv, row, kv_head, warp_key(), seq, dv);
  }
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
  const Grid by_keys{pairs, params.kv_heads, params.batch};
  if constexpr (Config::kSeparate) {
    launch(dk_dv_kernel<Element, kHeadQk, kHeadV, Want::dv>, by_keys, kThreads,
           Config::kSharedBytes, stream, params, maps);
    launch(dk_dv_kernel<Element, kHeadQk, kHeadV, Want::dk>, by_keys, kThreads,
           Config::kSharedBytes, stream, params, maps);
  } else {
    launch(dk_dv_kernel<Element, kHeadQk, kHeadV, Want::dk_and_dv>, by_keys, kThreads,
           Config::kSharedBytes, stream, params, maps);
  }
}

}  // namespace onepass::cuda::sm90
