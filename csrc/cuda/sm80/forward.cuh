// Portable forward: one block computes kRows queries of one head.
//
// Four warps, each with 16 kRowTiles of the queries; shared memory holds the queries, one tile of
// keys and one of values. Per visited key tile: wait for K, start V, S = Q K^T, mask (partial tiles
// only), online softmax, wait for V, start the next K, O += P V. P stays in registers, as
// accumulators have the layout of operands. (With the wait before the softmax, the compiler reads V
// so early that it runs out of registers.) Deterministic.
#pragma once

#include "../softmax.h"
#include "tile.h"

namespace onepass::cuda::sm80 {

template <typename Element, int kHeadQk, int kHeadV>
__global__ void __launch_bounds__(kThreads, forward_blocks(kHeadQk))
    forward_kernel(const Params params) {
  using Config = ForwardConfig<kHeadQk, kHeadV>;
  constexpr int kRowTiles = Config::kRowTiles, kRows = Config::kRows;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int32_t head = blockIdx.y, row = blockIdx.z, seq = params.seq;
  const int32_t kv_head = head / (params.heads / params.kv_heads);
  const Plan plan = plan_of_row(params.plan, row, seq);
  const int32_t* order = kRows == kTile ? plan.query_order : plan.query_order_2;
  const int32_t first_query = order[blockIdx.x] * kRows;

  Element* q_tile = reinterpret_cast<Element*>(shared_memory());
  Element* k_tile = q_tile + kRows * kHeadQk;
  Element* v_tile = k_tile + kTile * kHeadQk;
  const auto load_k = [&](const Visit& visit) {
    load_tile<Element, kTile, kHeadQk>(k_tile, params.k, row, kv_head, visit.tile * kTile, seq);
    commit_copies();
  };

  KeyTileWalk<kRows> walk(params, row, first_query);
  load_tile<Element, kRows, kHeadQk>(q_tile, params.q, row, head, first_query, seq);
  Visit visit = walk.next();  // at least the tile on the diagonal
  load_k(visit);

  const ScoreScale score_scale(params);
  const int row_in_tile = warp * 16 * kRowTiles;
  Softmax<kRowTiles> softmax;
  Accumulator<kRowTiles, kHeadV / 8> out;
  clear(out);
  while (visit.tile >= 0) {
    const int32_t first_key = visit.tile * kTile;
    wait_copies<0>();
    sync_block();  // K has arrived, and every warp is done with the last V
    load_tile<Element, kTile, kHeadV>(v_tile, params.v, row, kv_head, first_key, seq);
    commit_copies();

    Accumulator<kRowTiles, kTile / 8> scores;
    multiply_transposed<Element, kHeadQk>(scores, q_tile, row_in_tile, k_tile);
    score_scale.cap(scores);
    if (!visit.full) {
      mask_keys(scores, params, row, first_query + row_in_tile, first_key);
    }
    LeftFactor<kRowTiles, kTile / 16> probabilities;
    float rescale[kRowTiles][2];
    softmax.exponentiate(scores, score_scale.factor, rescale,
                         [&](int m, int n, int half, float left, float right) {
                           probabilities[m][n / 2][n % 2 * 2 + half] = pack<Element>(left, right);
                         });
    softmax.rescale_out(out, rescale);

    visit = walk.next();
    wait_copies<0>();
    sync_block();  // V has arrived, and every warp is done with K
    if (visit.tile >= 0) load_k(visit);
    multiply_add<Element, kHeadV>(out, probabilities, v_tile);
  }

  float* lse = params.lse + (static_cast<int64_t>(row) * params.heads + head) * seq;
  const float* sink = params.sinks != nullptr ? params.sinks + head : nullptr;
#pragma unroll
  for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float value = softmax.finish(out, m, half, score_scale.factor, sink);
      const int32_t query = first_query + row_in_tile + 16 * m + 8 * half + lane / 4;
      if (lane % 4 == 0 && query < seq) lse[query] = value;
    }
  }
  // Through the memory of the queries: a warp writes where only it has read.
  sync_warp();
  Element* out_tile = q_tile + row_in_tile * kHeadQk;
  round_to_tile<Element, kHeadV>(out_tile, out);
  sync_warp();
  store_rows<Element, 16 * kRowTiles, kHeadV>(head_of<Element>(params.out, row, head), out_tile,
                                              params.out.seq_stride, first_query + row_in_tile,
                                              seq);
}

template <typename Element, int kHeadQk, int kHeadV>
void launch_forward(const Params& params, Stream stream) {
  using Config = ForwardConfig<kHeadQk, kHeadV>;
  const Grid grid{ceil_div(params.seq, Config::kRows), params.heads, params.batch};
  launch(forward_kernel<Element, kHeadQk, kHeadV>, grid, kThreads, Config::kSharedBytes, stream,
         params);
}

}  // namespace onepass::cuda::sm80
