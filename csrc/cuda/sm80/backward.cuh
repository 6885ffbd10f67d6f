// Portable backward, in four launches: the queries' statistics (and the sinks' gradient), dq, and
// dk with dv.
//
// dq has a block per tile of queries that streams the key tiles they see; dk and dv have a block
// per tile of keys that streams the query tiles that see them, through all query heads of the key's
// group. The scores are computed twice (seven products instead of five); for that nothing is added
// up in global memory: no atomics, no float32 buffer of dq, and the same bits every time.
//
// Both keep their own tile (K and V, or Q and dO) in shared memory, a warp working on 16 of its
// rows, and stream the others through one or two stages. Scores are computed with the kept rows as
// accumulator rows, so that P and dS go into the next product from registers.
#pragma once

#include "../launch.h"
#include "mask.h"

namespace onepass::cuda::sm80 {

constexpr int kLanesPerRow = 8;
constexpr int kRowsPerBlock = kThreads / kLanesPerRow;

// The statistics of every query; delta is what the score gradients lack of P * dP. Eight lanes per
// query. Each translation unit has its own, since they are compiled for different devices.
template <typename Element>
static __global__ void __launch_bounds__(kThreads)
    statistics_kernel(const BackwardParams params, int32_t head_v) {
  const int32_t query = blockIdx.x * kRowsPerBlock + threadIdx.x / kLanesPerRow;
  const int32_t head = blockIdx.y, row = blockIdx.z, padded = num_tiles(params.seq) * kTile;
  const int64_t head_of_row = static_cast<int64_t>(row) * params.heads + head;
  float delta = 0;
  if (query < params.seq) {
    const Element* out = head_of<Element>(params.out, row, head) + query * params.out.seq_stride;
    const Element* dout = head_of<Element>(params.dout, row, head) + query * params.dout.seq_stride;
    for (int32_t d = threadIdx.x % kLanesPerRow * 8; d < head_v; d += kLanesPerRow * 8) {
      const uint4 a = *reinterpret_cast<const uint4*>(out + d);
      const uint4 b = *reinterpret_cast<const uint4*>(dout + d);
      const uint32_t left[4] = {a.x, a.y, a.z, a.w}, right[4] = {b.x, b.y, b.z, b.w};
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float2 x = unpack<Element>(left[i]), y = unpack<Element>(right[i]);
        delta += x.x * y.x + x.y * y.y;
      }
    }
  }
#pragma unroll
  for (int mask = kLanesPerRow / 2; mask > 0; mask /= 2) delta += shuffle_xor(delta, mask);
  if (query < padded && threadIdx.x % kLanesPerRow == 0) {
    Statistics statistics{INFINITY, 0};
    if (query < params.seq) {
      const int64_t index = head_of_row * params.seq + query;
      if (params.dlse != nullptr) delta -= params.dlse[index];
      statistics = {params.lse[index] * kLog2E, delta};
    }
    params.statistics[head_of_row * padded + query] = statistics;
  }
}

// dsinks[head] = -sum over queries of the sink's probability times delta. A block per head, which
// adds in a fixed order.
static __global__ void __launch_bounds__(kThreads) dsinks_kernel(const BackwardParams params) {
  const int32_t head = blockIdx.x, padded = num_tiles(params.seq) * kTile;
  const float sink = params.sinks[head] * kLog2E;
  float total = 0;
  for (int32_t row = 0; row < params.batch; ++row) {
    const Statistics* of_head =
        params.statistics + (static_cast<int64_t>(row) * params.heads + head) * padded;
    for (int32_t query = threadIdx.x; query < params.seq; query += kThreads) {
      total -= fast_exp2(sink - of_head[query].lse) * of_head[query].delta;
    }
  }
#pragma unroll
  for (int mask = 16; mask > 0; mask /= 2) total += shuffle_xor(total, mask);
  float* of_warp = reinterpret_cast<float*>(shared_memory());
  if (threadIdx.x % 32 == 0) of_warp[threadIdx.x / 32] = total;
  sync_block();
  if (threadIdx.x == 0) {
    for (int warp = 1; warp < kWarps; ++warp) total += of_warp[warp];
    params.dsinks[head] = total;
  }
}

// Scores become probabilities P, and the gradient of the probabilities dP becomes what P has to be
// multiplied with to give dS, the gradient of the products up to `scale`. `statistics_of(n, half,
// column)` gives those of a query.
template <int kBlocks, typename StatisticsOf>
__device__ __forceinline__ void differentiate(Accumulator<1, kBlocks>& scores,
                                              Accumulator<1, kBlocks>& dp,
                                              const ScoreScale& score_scale,
                                              const StatisticsOf& statistics_of) {
#pragma unroll
  for (int n = 0; n < kBlocks; ++n) {
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const Statistics of_query = statistics_of(n, e / 2, e % 2);
      const float score = scores[0][n][e];
      scores[0][n][e] = fast_exp2(score * score_scale.factor - of_query.lse);
      dp[0][n][e] = (dp[0][n][e] - of_query.delta) * score_scale.derivative(score);
    }
  }
}

// The elementwise product of two accumulators, as a left factor.
template <typename Element, int kBlocks>
__device__ __forceinline__ void round_product_to_factor(LeftFactor<1, kBlocks / 2>& factor,
                                                        const Accumulator<1, kBlocks>& a,
                                                        const Accumulator<1, kBlocks>& b) {
#pragma unroll
  for (int n = 0; n < kBlocks; ++n) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int e = 2 * half;
      factor[0][n / 2][n % 2 * 2 + half] =
          pack<Element>(a[0][n][e] * b[0][n][e], a[0][n][e + 1] * b[0][n][e + 1]);
    }
  }
}

template <int kBlocks>
__device__ __forceinline__ void multiply_by(Accumulator<1, kBlocks>& c, float factor) {
#pragma unroll
  for (int n = 0; n < kBlocks; ++n) {
#pragma unroll
    for (int e = 0; e < 4; ++e) c[0][n][e] *= factor;
  }
}

// Writes a warp's 16 rows of a gradient through its own rows of a kept tile of shared memory, which
// no other warp reads.
template <typename Element, int kCols>
__device__ __forceinline__ void store_gradient(Element* staging, const Tensor& gradient,
                                               int32_t row, int32_t head, int32_t first,
                                               int32_t seq,
                                               const Accumulator<1, kCols / 8>& values) {
  sync_warp();
  round_to_tile<Element, kCols>(staging, values);
  sync_warp();
  store_rows<Element, 16, kCols>(head_of<Element>(gradient, row, head), staging,
                                 gradient.seq_stride, first, seq);
}

template <typename Element, int kHeadQk, int kHeadV>
__global__ void __launch_bounds__(kThreads, 2) dq_kernel(const BackwardParams params) {
  using Config = BackwardConfig<kHeadQk, kHeadV>;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int32_t head = blockIdx.y, row = blockIdx.z, seq = params.seq;
  const int32_t kv_head = head / (params.heads / params.kv_heads);
  const Plan plan = plan_of_row(params.plan, row, seq);
  const int32_t first_query = plan.query_order[blockIdx.x] * kTile;
  const int32_t warp_query = first_query + warp * 16;

  Element* q_tile = reinterpret_cast<Element*>(shared_memory());
  Element* dout_tile = q_tile + kTile * kHeadQk;
  uint8_t* stages = shared_memory() + Config::kKeptBytes;
  const auto k_stage = [&](int stage) {
    return reinterpret_cast<Element*>(stages + stage * Config::kStageBytes);
  };
  const auto v_stage = [&](int stage) { return k_stage(stage) + kTile * kHeadQk; };
  const auto load = [&](const Visit& visit, int stage) {
    if (visit.tile < 0) return;
    load_tile<Element, kTile, kHeadQk>(k_stage(stage), params.k, row, kv_head, visit.tile * kTile,
                                       seq);
    load_tile<Element, kTile, kHeadV>(v_stage(stage), params.v, row, kv_head, visit.tile * kTile,
                                      seq);
  };

  KeyTileWalk<kTile> walk(params, row, first_query);
  load_tile<Element, kTile, kHeadQk>(q_tile, params.q, row, head, first_query, seq);
  load_tile<Element, kTile, kHeadV>(dout_tile, params.dout, row, head, first_query, seq);
  Visit visit = walk.next();
  load(visit, 0);
  commit_copies();

  Statistics statistics[2];
  const int64_t head_of_row = static_cast<int64_t>(row) * params.heads + head;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    statistics[half] =
        params.statistics[head_of_row * num_tiles(seq) * kTile + warp_query + 8 * half + lane / 4];
  }
  const ScoreScale score_scale(params);
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
    sync_block();  // this stage is there

    Accumulator<1, kTile / 8> scores, dp;
    multiply_transposed<Element, kHeadQk>(scores, q_tile, warp * 16, k_stage(stage));
    score_scale.cap(scores);
    if (!visit.full) mask_keys(scores, params, row, warp_query, visit.tile * kTile);
    multiply_transposed<Element, kHeadV>(dp, dout_tile, warp * 16, v_stage(stage));
    differentiate(scores, dp, score_scale, [&](int, int half, int) { return statistics[half]; });
    LeftFactor<1, kTile / 16> ds;
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
  multiply_by(dq, params.scale);
  store_gradient<Element, kHeadQk>(q_tile + warp * 16 * kHeadQk, params.dq, row, head, warp_query,
                                   seq, dq);
}

// Which gradients of the keys and values one launch computes. Both at once where the registers
// allow it; else the scores are computed once more.
enum class Want { dk_and_dv, dk, dv };

template <typename Element, int kHeadQk, int kHeadV, Want kWant>
__global__ void __launch_bounds__(kThreads, 2) dk_dv_kernel(const BackwardParams params) {
  using Config = BackwardConfig<kHeadQk, kHeadV>;
  using Walk = QueryTileWalk<kTile>;
  constexpr bool kWantDk = kWant != Want::dv, kWantDv = kWant != Want::dk;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int32_t kv_head = blockIdx.y, row = blockIdx.z, seq = params.seq;
  const int32_t group = params.heads / params.kv_heads;
  const Plan plan = plan_of_row(params.plan, row, seq);
  const int32_t tile = plan.key_order[blockIdx.x];
  const int32_t first_key = tile * kTile, warp_key = first_key + warp * 16;

  Element* k_tile = reinterpret_cast<Element*>(shared_memory());
  Element* v_tile = k_tile + kTile * kHeadQk;
  uint8_t* stages = shared_memory() + Config::kKeptBytes;
  const auto q_stage = [&](int stage) {
    return reinterpret_cast<Element*>(stages + stage * Config::kStageBytes);
  };
  const auto dout_stage = [&](int stage) { return q_stage(stage) + kTile * kHeadQk; };
  const auto statistics_stage = [&](int stage) {
    return reinterpret_cast<Statistics*>(dout_stage(stage) + kTile * kHeadV);
  };
  const auto load = [&](const typename Walk::Step& step, int stage) {
    if (step.head < 0) return;
    const int32_t head = kv_head * group + step.head;
    load_tile<Element, kTile, kHeadQk>(q_stage(stage), params.q, row, head, step.first, seq);
    load_tile<Element, kTile, kHeadV>(dout_stage(stage), params.dout, row, head, step.first, seq);
    if (threadIdx.x < kTile) {
      const int64_t head_of_row = static_cast<int64_t>(row) * params.heads + head;
      statistics_stage(stage)[threadIdx.x] =
          params.statistics[head_of_row * num_tiles(seq) * kTile + step.first + threadIdx.x];
    }
  };

  Walk walk(params, row, tile, group);
  load_tile<Element, kTile, kHeadQk>(k_tile, params.k, row, kv_head, first_key, seq);
  if constexpr (kWantDk) {
    load_tile<Element, kTile, kHeadV>(v_tile, params.v, row, kv_head, first_key, seq);
  }
  typename Walk::Step step = walk.next();  // at least the tile on the diagonal
  load(step, 0);
  commit_copies();

  const ScoreScale score_scale(params);
  Accumulator<1, kWantDk ? kHeadQk / 8 : 1> dk;
  Accumulator<1, kWantDv ? kHeadV / 8 : 1> dv;
  clear(dk);
  clear(dv);
  int stage = 0;
  while (step.head >= 0) {
    const typename Walk::Step next = walk.next();
    if constexpr (Config::kStages == 2) {
      load(next, stage ^ 1);
      commit_copies();
    }
    wait_copies<Config::kStages - 1>();
    sync_block();  // this stage is there

    Accumulator<1, kTile / 8> scores, dp;
    multiply_transposed<Element, kHeadQk>(scores, k_tile, warp * 16, q_stage(stage));
    score_scale.cap(scores);
    if (!step.full) mask_queries(scores, params, row, warp_key, step.first);
    if constexpr (kWantDk) {
      multiply_transposed<Element, kHeadV>(dp, v_tile, warp * 16, dout_stage(stage));
    } else {
      clear(dp);
    }
    const Statistics* statistics = statistics_stage(stage);
    differentiate(scores, dp, score_scale, [&](int n, int, int column) {
      return statistics[8 * n + 2 * (lane % 4) + column];
    });
    LeftFactor<1, kTile / 16> factor;
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
    multiply_by(dk, params.scale);
    store_gradient<Element, kHeadQk>(k_tile + warp * 16 * kHeadQk, params.dk, row, kv_head,
                                     warp_key, seq, dk);
  }
  if constexpr (kWantDv) {
    store_gradient<Element, kHeadV>(v_tile + warp * 16 * kHeadV, params.dv, row, kv_head, warp_key,
                                    seq, dv);
  }
}

template <typename Element>
void launch_statistics(const BackwardParams& params, int32_t head_v, Stream stream) {
  const Grid by_query{num_tiles(params.seq) * kTile / kRowsPerBlock, params.heads, params.batch};
  launch(statistics_kernel<Element>, by_query, kThreads, 0, stream, params, head_v);
  if (params.sinks != nullptr) {
    launch(dsinks_kernel, Grid{params.heads, 1, 1}, kThreads,
           kWarps * static_cast<int>(sizeof(float)), stream, params);
  }
}

template <typename Element, int kHeadQk, int kHeadV>
void launch_backward(const BackwardParams& params, Stream stream) {
  using Config = BackwardConfig<kHeadQk, kHeadV>;
  const int32_t tiles = num_tiles(params.seq);
  launch_statistics<Element>(params, kHeadV, stream);
  launch(dq_kernel<Element, kHeadQk, kHeadV>, Grid{tiles, params.heads, params.batch}, kThreads,
         Config::kSharedBytes, stream, params);
  const Grid by_key_tile{tiles, params.kv_heads, params.batch};
  if constexpr (Config::kSeparate) {
    launch(dk_dv_kernel<Element, kHeadQk, kHeadV, Want::dv>, by_key_tile, kThreads,
           Config::kSharedBytes, stream, params);
    launch(dk_dv_kernel<Element, kHeadQk, kHeadV, Want::dk>, by_key_tile, kThreads,
           Config::kSharedBytes, stream, params);
  } else {
    launch(dk_dv_kernel<Element, kHeadQk, kHeadV, Want::dk_and_dv>, by_key_tile, kThreads,
           Config::kSharedBytes, stream, params);
  }
}

}  // namespace onepass::cuda::sm80
