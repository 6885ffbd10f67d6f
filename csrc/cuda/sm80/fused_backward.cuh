// Portable backward in one launch after the statistics, for head sizes whose dk and dv fit into the
// registers together: five products where dq_kernel and dk_dv_kernel need seven.
//
// As in dk_dv_kernel a block keeps a tile of keys, 16 for each warp, and streams tiles of queries.
// dS^T also goes through shared memory, where all warps meet: each then multiplies the dS of 32
// queries and all keys with half the columns of K, and adds that quarter of dq to sums in global
// memory. Blocks of other keys add to the same sums: in any order, on which the bits of dq depend,
// or where the same bits are requested in that of their entries, one waiting for the other. A last
// launch scales and rounds the sums.
//
// There is one stage: the next dO is loaded while dk and dq are multiplied, the next Q while dq is.
#pragma once

#include "../gradients.h"
#include "tile.h"

namespace onepass::cuda::sm80 {

// Of a query tile's dq, warp w computes 32 queries from 32 (w / 2) and, of every 32 columns, 16
// from 16 (w % 2). The sums are stored in the order of the accumulators.
template <int kHead>
using DqOfWarp = Accumulator<2, kHead / 16>;

// The sum to which a lane adds element [0][0][0].
template <int kHead>
__device__ __forceinline__ float* dq_of_warp(const BackwardParams& params, int32_t b, int32_t head,
                                             int32_t first, int warp) {
  return params.dq_sums + padded_index(params, b, head, first + 16 * warp) * kHead +
         threadIdx.x % 32;
}

// The offset of element [m][n][e] from that.
template <int kHead>
__device__ __forceinline__ int dq_offset(int m, int n, int e) {
  return ((m * kHead / 16 + n) * 4 + e) * 32;
}

template <typename Element, int kHead>
__global__ void __launch_bounds__(kThreads, backward_blocks(kHead))
    dq_dk_dv_kernel(const BackwardParams params) {
  const int warp = threadIdx.x / 32;
  const int32_t b = blockIdx.z;
  KeyBlock& block = key_block_of<kTile>(params, FusedBackwardConfig<kHead>::kSharedBytes);

  Element* k_tile = reinterpret_cast<Element*>(shared_memory());
  Element* v_tile = k_tile + kTile * kHead;
  Element* q_tile = v_tile + kTile * kHead;
  Element* dout_tile = q_tile + kTile * kHead;
  Element* ds_tile = dout_tile + kTile * kHead;
  Statistics* statistics = reinterpret_cast<Statistics*>(ds_tile + kTile * kTile);
  const auto load_q = [&](const QueryStep& step) {
    if (step.head >= 0) {
      load_tile<Element, kTile, kHead>(q_tile, params.q, b, step.head, step.first, params.seq);
    }
    commit_copies();
  };
  const auto load_dout = [&](const QueryStep& step) {
    if (step.head >= 0) {
      load_tile<Element, kTile, kHead>(dout_tile, params.dout, b, step.head, step.first,
                                       params.seq);
      load_statistics<kTile>(statistics, params, b, step.head, step.first);
    }
    commit_copies();
  };

  QueryTileWalk<kTile> walk(params, block);
  DqOrder<kTile> order(params, block);
  load_tile<Element, kTile, kHead>(k_tile, params.k, b, block.kv_head, block.keys.first,
                                   params.seq);
  load_tile<Element, kTile, kHead>(v_tile, params.v, b, block.kv_head, block.keys.first,
                                   params.seq);
  QueryStep step = walk.next();  // at least the tile on the diagonal
  load_q(step);
  load_dout(step);

  const ScoreScale score_scale(params.scoring);
  Accumulator<1, kHead / 8> dk, dv;
  clear(dk);
  clear(dv);
  while (step.head >= 0) {
    wait_copies<0>();
    sync_block();  // this tile has arrived, and every warp has added the last dq
    if (threadIdx.x == 0) order.end_turn();

    Accumulator<1, kTile / 8> scores, dp;
    multiply_transposed<Element, kHead>(scores, k_tile, warp * 16, q_tile);
    score_queries(scores, score_scale, params, b, block.keys.first + warp * 16, step.first,
                  step.full);
    multiply_transposed<Element, kHead>(dp, v_tile, warp * 16, dout_tile);
    const Statistics* of_queries = statistics + 2 * (recomputed(threadIdx.x) % 4);
    differentiate(scores, dp, score_scale,
                  [&](int n, int, int column) { return of_queries[8 * n + column]; });
    LeftFactor<1, kTile / 16> probabilities, ds;
    round_to_factor<Element>(probabilities, scores);
    round_product_to_factor<Element>(ds, scores, dp);
    store_factor<Element>(ds_tile + warp * 16 * kTile, ds);
    multiply_add<Element, kHead>(dv, probabilities, dout_tile);

    const QueryStep next = walk.next();
    sync_block();  // dS is complete, and every warp is done with dO
    load_dout(next);
    multiply_add<Element, kHead>(dk, ds, q_tile);

    if (params.dq_order != nullptr && warp == 0) order.wait_for_turn(step);
    sync_block();  // every warp is done with Q, and this block may add to dq
    load_q(next);
    DqOfWarp<kHead> dq;
    clear(dq);
#pragma unroll
    for (int k = 0; k < kTile; k += 16) {  // step by step, to save registers
      LeftFactor<2, 1> of_keys;
      load_transposed<Element, kTile>(of_keys, ds_tile + k * kTile, warp / 2 * 32);
      multiply_add<Element, kHead, 2>(dq, of_keys, k_tile + k * kHead, warp % 2);
    }
    float* sums = dq_of_warp<kHead>(params, b, step.head, step.first, warp);
#pragma unroll
    for (int m = 0; m < 2; ++m) {
#pragma unroll
      for (int n = 0; n < kHead / 16; ++n) {
#pragma unroll
        for (int e = 0; e < 4; ++e) add_to(sums + dq_offset<kHead>(m, n, e), dq[m][n][e]);
      }
    }
    step = next;
  }
  sync_block();  // every warp is done with K and dq
  if (threadIdx.x == 0) order.end_turn();
  const int32_t warp_key = block.keys.first + warp * 16;
  store_gradient_of_keys<Element, kHead>(k_tile + warp * 16 * kHead, params.dk, params.dk_parts,
                                         params, block, b, warp_key, params.scoring.scale, dk);
  store_gradient_of_keys<Element, kHead>(v_tile + warp * 16 * kHead, params.dv, params.dv_parts,
                                         params, block, b, warp_key, 1, dv);
}

// dq from its sums: a block per tile of queries, 16 of them for each warp.
template <typename Element, int kHead>
__global__ void __launch_bounds__(kThreads) round_dq_kernel(const BackwardParams params) {
  const int32_t first = blockIdx.x * kTile, head = blockIdx.y, b = blockIdx.z;
  const int warp = threadIdx.x / 32;
  Accumulator<1, kHead / 8> dq;
#pragma unroll
  for (int n = 0; n < kHead / 8; ++n) {
    const int of_warp = warp / 2 * 2 + n / 2 % 2;
    const float* sums = dq_of_warp<kHead>(params, b, head, first, of_warp);
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      dq[0][n][e] = sums[dq_offset<kHead>(warp % 2, n / 4 * 2 + n % 2, e)];
    }
  }
  multiply_by(dq, params.scoring.scale);
  Element* staging = reinterpret_cast<Element*>(shared_memory()) + warp * 16 * kHead;
  store_gradient<Element, kHead>(staging, params.dq, b, head, first + 16 * warp, params.seq, dq);
}

template <typename Element, int kHead>
void launch_fused_backward(const BackwardParams& params, Stream stream) {
  using Config = FusedBackwardConfig<kHead>;
  const int32_t tiles = num_tiles(params.seq);
  launch_statistics<Element>(params, kHead, kHead, stream);
  launch(dq_dk_dv_kernel<Element, kHead>,
         Grid{tiles, params.kv_heads * params.group_parts, params.batch}, kThreads,
         Config::kSharedBytes, stream, params);
  launch(round_dq_kernel<Element, kHead>, Grid{tiles, params.heads, params.batch}, kThreads,
         Config::kTileBytes, stream, params);
  launch_add_parts<Element>(params, kHead, kHead, stream);
}

}  // namespace onepass::cuda::sm80
