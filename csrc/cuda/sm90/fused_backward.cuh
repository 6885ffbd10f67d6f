// Hopper backward in one launch after the statistics, for head sizes whose dk and dv fit into the
// registers together: five products where dq_kernel and dk_dv_kernel need eight.
//
// As in dk_dv_kernel two consumers keep 64 keys each and stream queries. dS^T also goes through
// shared memory, where both meet once per tile: each then multiplies the dS of all 128 keys with K
// for its half of the tile's dq (of the columns, or of the queries). A second warp of the
// producer's warpgroup lets the copy engine add the tile of dq to sums in global memory. Blocks of
// other keys add to the same sums: in any order, on which the bits of dq depend, or where the same
// bits are requested in that of their entries, one waiting for the other. A last launch scales and
// rounds the sums.
//
// dP is multiplied while a consumer exponentiates, dv while it computes dS, and dk while it passes
// on dq.
#pragma once

#include "../gradients.h"
#include "backward_memory.h"

namespace onepass::cuda::sm90 {

// Sums of dq are stored in the order of the accumulators: for a tile of queries, 1,024 floats for
// each of eight warps, those of an accumulator of 16 tokens x 64 columns.
constexpr int kDqBlocks = kBlockColumns / 8;
constexpr int kDqOfWarp = 16 * kBlockColumns;

// The floats of the tile of queries that starts at `first`.
template <int kHead>
__device__ __forceinline__ float* sums_of_tile(const BackwardParams& params, int32_t b,
                                               int32_t head, int32_t first) {
  return params.dq_sums + padded_index(params, b, head, first) * kHead;
}

// Adds every tile of dq that the consumers pass on. Called by a warp.
template <int kHead>
__device__ __forceinline__ void add_dq(const BackwardMemory<FusedBackwardConfig<kHead>>& memory,
                                       const BackwardParams& params) {
  using Config = FusedBackwardConfig<kHead>;
  constexpr int kKeys = kConsumers * kTile;
  const int lane = threadIdx.x % 32;
  const int32_t b = blockIdx.z;
  const bool in_order = params.dq_order != nullptr;
  KeyBlock& block = memory.block();
  QueryTileWalk<Config::kStreamed, kKeys> walk(params, block);
  DqOrder<Config::kStreamed, kKeys> order(params, block);
  int parity = 0;
  while (true) {
    const QueryStep step = walk.next();
    if (step.head < 0) break;
    if (in_order) order.wait_for_turn(step);
    wait(memory.dq_full(), parity);
    if (lane == 0) {
      if (in_order) order_additions();
      add_floats(sums_of_tile<kHead>(params, b, step.head, step.first), memory.dq(), kFusedDqBytes);
      wait_read();
      arrive(memory.dq_empty());
      if (in_order) {
        wait_added();
        order.end_turn();
      }
    }
    sync_warp();
    parity ^= 1;
  }
}

// P as the factor of dv. The scores become the factor by which dP - delta is multiplied to give dS.
template <typename Element, int kBlocks, bool kCapped>
__device__ __forceinline__ void exponentiate(LeftFactor<1, kBlocks / 2>& probabilities,
                                             Accumulator<1, kBlocks>& scores, float factor,
                                             const Statistics* of_queries) {
#pragma unroll
  for (int n = 0; n < kBlocks; ++n) {
    const float lse[2] = {of_queries[8 * n].lse, of_queries[8 * n + 1].lse};
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float p[2];
#pragma unroll
      for (int column = 0; column < 2; ++column) {
        float& score = scores[0][n][2 * half + column];
        p[column] = fast_exp2(score * factor - lse[column]);
        score = kCapped ? p[column] * ScoreScale::derivative(score) : p[column];
      }
      probabilities[0][n / 2][n % 2 * 2 + half] = pack<Element>(p[0], p[1]);
    }
  }
}

template <typename Element, int kBlocks>
__device__ __forceinline__ void differentiate_to_factor(LeftFactor<1, kBlocks / 2>& ds,
                                                        const Accumulator<1, kBlocks>& scores,
                                                        const Accumulator<1, kBlocks>& dp,
                                                        const Statistics* of_queries) {
#pragma unroll
  for (int n = 0; n < kBlocks; ++n) {
    const float delta[2] = {of_queries[8 * n].delta, of_queries[8 * n + 1].delta};
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int e = 2 * half;
      ds[0][n / 2][n % 2 * 2 + half] =
          pack<Element>(scores[0][n][e] * (dp[0][n][e] - delta[0]),
                        scores[0][n][e + 1] * (dp[0][n][e + 1] - delta[1]));
    }
  }
}

// Writes a warp's 16 tokens of a factor, from `first` on, into a block of columns, for products.
__device__ __forceinline__ void write_factor(uint8_t* block,
                                             const LeftFactor<1, kBlockColumns / 16>& factor,
                                             int first) {
  const int lane = recomputed(threadIdx.x) % 32;
  uint8_t* line = block + (first + lane % 16) * kLineBytes;
#pragma unroll
  for (int k = 0; k < kBlockColumns / 16; ++k) {
    store_matrices(line + ((2 * k + lane / 16) ^ lane % 8) * 16, factor[0][k]);
  }
}

template <typename Element, int kHead>
__global__ void __launch_bounds__(kThreads, 1)
    dq_dk_dv_kernel(const BackwardParams params, const __grid_constant__ BackwardMaps maps) {
  using Config = FusedBackwardConfig<kHead>;
  using Tile = TileShape<kTile, kHead>;  // kept, or part of a streamed tile
  using TileDs = typename Config::TileDs;
  constexpr int kParts = Config::kStreamed / kTile;
  const int warpgroup = threadIdx.x / kWarpgroup;
  const int32_t b = blockIdx.z;
  const BackwardMemory<Config> memory;
  memory.init_barriers_and_block(params);

  if (warpgroup == 0) {
    release_registers<kProducerRegisters>();
    const int warp = threadIdx.x / 32;
    if (warp == 0) bring_keys_and_queries(memory, params, maps, true);
    if (warp == 1) add_dq<kHead>(memory, params);
    return;
  }

  take_registers<kConsumerRegisters>();
  const int consumer = consumer_of_warp(), warp = threadIdx.x / 32 - 4;  // of eight
  const KeyBlock& block = memory.block();
  const auto ds_tile = [&](int stage, int of_consumer) {
    return memory.scratch() + stage * Config::kDsBytes + of_consumer * TileDs::kBytes;
  };
  // Which 64 x 64 of dq are this consumer's.
  const int query_block = kParts == 2 ? consumer : 0, column_block = kParts == 2 ? 0 : consumer;

  const ScoreScale score_scale(params.scoring);
  Accumulator<1, kHead / 8> dk, dv;
  clear(dk);
  clear(dv);
  wait(memory.kept_full(), 0);
  static_assert(Config::kStagesQk == Config::kStagesV);
  Stage<Config::kStagesQk> stage;
  const auto next_step = [&] {
    wait(memory.full_qk(stage.index), stage.parity);
    return *memory.step(stage.index);
  };
  QueryStep step = next_step();
  while (step.head >= 0) {
    LeftFactor<1, kTile / 16> probabilities[kParts], ds[kParts];  // products read them until waits
#pragma unroll
    for (int part = 0; part < kParts; ++part) {
      const uint8_t* q_tile = memory.stage_qk(stage.index) + part * Tile::kBytes;
      const uint8_t* dout_tile = memory.stage_v(stage.index) + part * Tile::kBytes;
      const Statistics* of_queries =
          memory.statistics(stage.index) + part * kTile + 2 * (recomputed(threadIdx.x) % 4);
      Accumulator<1, kTile / 8> scores, dp;
      start_transposed<Element, Tile, Tile>(scores[0], memory.kept_qk(consumer), 0, q_tile);
      commit_products();
      if (part == 0) wait(memory.full_v(stage.index), stage.parity);
      start_transposed<Element, Tile, Tile>(dp[0], memory.kept_v(consumer), 0, dout_tile);
      commit_products();
      wait_products<1>();
      hold(scores[0]);
      score_queries(scores, score_scale, params, b, block.keys.first + warp * 16,
                    step.first + part * kTile, step.full);
      if (!score_scale.capped()) {
        exponentiate<Element, kTile / 8, false>(probabilities[part], scores, score_scale.factor,
                                                of_queries);
      } else {
        exponentiate<Element, kTile / 8, true>(probabilities[part], scores, score_scale.factor,
                                               of_queries);
      }
      start_add<Element, Tile>(dv[0], probabilities[part][0], dout_tile);
      commit_products();
      wait_products<1>();
      hold(dp[0]);
      differentiate_to_factor<Element>(ds[part], scores, dp, of_queries);
      write_factor(ds_tile(stage.index, consumer) + part * TileDs::kBlockBytes, ds[part],
                   warp % 4 * 16);
    }
    publish_writes();
    // Also, both are done with the dS of the previous tile, whose memory the next one takes.
    sync_threads(1, kConsumerThreads);

    Accumulator<1, kDqBlocks> dq;
    hold(dq[0]);
    begin_products();
#pragma unroll
    for (int of = 0; of < kConsumers; ++of) {
#pragma unroll
      for (int k = 0; k < kTile / 16; ++k) {
        multiply_columns<Element>(
            dq[0],
            describe_columns<TileDs>(ds_tile(stage.index, of) + query_block * TileDs::kBlockBytes,
                                     k),
            describe_columns<Tile>(memory.kept_qk(of) + column_block * Tile::kBlockBytes, k),
            of + k > 0);
      }
    }
    commit_products();
#pragma unroll
    for (int part = 0; part < kParts; ++part) {
      start_add<Element, Tile>(dk[0], ds[part][0],
                               memory.stage_qk(stage.index) + part * Tile::kBytes);
    }
    commit_products();
    wait_products<2>();
    hold(dv[0]);
    release(memory.empty_v(stage.index));
    wait_products<1>();
    hold(dq[0]);
    wait(memory.dq_empty(), stage.index ^ 1);  // returns at once in the first round
    const int thread = recomputed(threadIdx.x);
    uint8_t* of_lane = memory.dq() + (thread / 32 - 4) * kDqOfWarp * 4 + thread % 32 * 16;
#pragma unroll
    for (int n = 0; n < kDqBlocks; ++n) {
      const float4 four{dq[0][n][0], dq[0][n][1], dq[0][n][2], dq[0][n][3]};
      write_shared(of_lane + n * 32 * 16, four);
    }
    publish_writes();
    release(memory.dq_full());
    Barrier* empty = memory.empty_qk(stage.index);
    stage.advance();
    step = next_step();  // while dk is multiplied
    wait_products<0>();
    hold(dk[0]);
    release(empty);
  }
  const int32_t warp_key = block.keys.first + warp * 16;
  sync_threads(1, kConsumerThreads);  // both are done with the kept tiles
  Element* kept_k = reinterpret_cast<Element*>(memory.kept_qk(consumer)) + warp % 4 * 16 * kHead;
  store_gradient_of_keys<Element, kHead>(kept_k, params.dk, params.dk_parts, params, block, b,
                                         warp_key, params.scoring.scale, dk);
  Element* kept_v = reinterpret_cast<Element*>(memory.kept_v(consumer)) + warp % 4 * 16 * kHead;
  store_gradient_of_keys<Element, kHead>(kept_v, params.dv, params.dv_parts, params, block, b,
                                         warp_key, 1, dv);
}

// dq from its sums: a block per tile of queries, with a warp for the sums of each warp.
constexpr int kRoundThreads = 256;

template <typename Element, int kHead>
__global__ void __launch_bounds__(kRoundThreads) round_dq_kernel(const BackwardParams params) {
  using Config = FusedBackwardConfig<kHead>;
  const int32_t first = blockIdx.x * Config::kStreamed, head = blockIdx.y, b = blockIdx.z;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const float4* sums =
      reinterpret_cast<const float4*>(sums_of_tile<kHead>(params, b, head, first)) +
      warp * kDqOfWarp / 4;
  Accumulator<1, kDqBlocks> dq;
#pragma unroll
  for (int n = 0; n < kDqBlocks; ++n) {
    const float4 four = sums[n * 32 + lane];
    dq[0][n][0] = four.x, dq[0][n][1] = four.y, dq[0][n][2] = four.z, dq[0][n][3] = four.w;
  }
  multiply_by(dq, params.scoring.scale);
  Tensor columns = params.dq;
  int32_t query = first + warp % 4 * 16;
  if constexpr (Config::kStreamed == kTile) {
    columns.data = static_cast<Element*>(columns.data) + warp / 4 * kBlockColumns;
  } else {
    query += warp / 4 * kTile;
  }
  Element* staging = reinterpret_cast<Element*>(shared_memory()) + warp * kDqOfWarp;
  store_gradient<Element, kBlockColumns>(staging, columns, b, head, query, params.seq, dq);
}

template <typename Element, int kHead>
void launch_fused_backward(const BackwardParams& params, Stream stream) {
  using Config = FusedBackwardConfig<kHead>;
  const auto map = [&](const Tensor& tensor, int32_t heads, int32_t tokens) {
    return make_tensor_map<Element>(tensor, params.batch, heads, params.seq, kHead, tokens);
  };
  const BackwardMaps maps{
      map(params.q, params.heads, Config::kStreamed), map(params.k, params.kv_heads, kTile),
      map(params.v, params.kv_heads, kTile), map(params.dout, params.heads, Config::kStreamed)};
  launch_statistics<Element>(params, kHead, kHead, stream);
  launch(dq_dk_dv_kernel<Element, kHead>,
         Grid{ceil_div(params.seq, kConsumers * kTile), params.kv_heads * params.group_parts,
              params.batch},
         kThreads, Config::kSharedBytes, stream, params, maps);
  launch(round_dq_kernel<Element, kHead>,
         Grid{ceil_div(params.seq, Config::kStreamed), params.heads, params.batch}, kRoundThreads,
         kRoundThreads / 32 * kDqOfWarp * static_cast<int>(sizeof(Element)), stream, params);
  launch_add_parts<Element>(params, kHead, kHead, stream);
}

}  // namespace onepass::cuda::sm90
