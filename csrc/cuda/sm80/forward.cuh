// Portable forward: one block computes kQueries queries of one head.
//
// Four warps, each with 16 kSlices of the queries; shared memory holds the queries, one tile of
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
  constexpr int kSlices = Config::kSlices, kQueries = Config::kQueries;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int32_t head = blockIdx.y, b = blockIdx.z, seq = params.seq;
  const int32_t kv_head = head / (params.heads / params.kv_heads);
  const Plan plan = plan_of_row(params.plan, b, seq);
  const int32_t* order = kQueries == kTile ? plan.query_order : plan.query_order_2;
  const int32_t first_query = order[blockIdx.x] * kQueries;

  Element* q_tile = reinterpret_cast<Element*>(shared_memory());
  Element* k_tile = q_tile + kQueries * kHeadQk;
  Element* v_tile = k_tile + kTile * kHeadQk;
  const auto load_k = [&](const Visit& visit) {
    load_tile<Element, kTile, kHeadQk>(k_tile, params.k, b, kv_head, visit.tile * kTile, seq);
    commit_copies();
  };

  KeyTileWalk<kQueries> walk(params, b, first_query);
  load_tile<Element, kQueries, kHeadQk>(q_tile, params.q, b, head, first_query, seq);
  Visit visit = walk.next();  // at least the tile on the diagonal
  load_k(visit);

  const ScoreScale score_scale(params.scoring);
  const int warp_begin = warp * 16 * kSlices;
  Softmax<kSlices> softmax;
  Accumulator<kSlices, kHeadV / 8> out;
  clear(out);
  while (visit.tile >= 0) {
    const int32_t first_key = visit.tile * kTile;
    wait_copies<0>();
    sync_block();  // K has arrived, and every warp is done with the last V
    load_tile<Element, kTile, kHeadV>(v_tile, params.v, b, kv_head, first_key, seq);
    commit_copies();

    Accumulator<kSlices, kTile / 8> scores;
    multiply_transposed<Element, kHeadQk>(scores, q_tile, warp_begin, k_tile);
    score_keys(scores, score_scale, params, b, first_query + warp_begin, first_key, visit.full);
    LeftFactor<kSlices, kTile / 16> probabilities;
    float rescale[kSlices][2];
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

  float* lse = params.lse + index_of_head(params, b, head) * seq;
  const float* sink = params.sinks != nullptr ? params.sinks + head : nullptr;
#pragma unroll
  for (int m = 0; m < kSlices; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float value = softmax.finish(out, m, half, score_scale.factor, sink);
      const int32_t query = first_query + warp_begin + 16 * m + 8 * half + lane / 4;
      if (lane % 4 == 0 && query < seq) lse[query] = value;
    }
  }
  // Through the memory of the queries: a warp writes where only it has read.
  sync_warp();
  Element* out_tile = q_tile + warp_begin * kHeadQk;
  round_to_tile<Element, kHeadV>(out_tile, out);
  sync_warp();
  store_tokens<Element, 16 * kSlices, kHeadV>(head_of<Element>(params.out, b, head), out_tile,
                                              params.out.seq_stride, first_query + warp_begin, seq);
}

template <typename Element, int kHeadQk, int kHeadV>
void launch_forward(const Params& params, Stream stream) {
  using Config = ForwardConfig<kHeadQk, kHeadV>;
  const Grid grid{ceil_div(params.seq, Config::kQueries), params.heads, params.batch};
  launch(forward_kernel<Element, kHeadQk, kHeadV>, grid, kThreads, Config::kSharedBytes, stream,
         params);
}

}  // namespace onepass::cuda::sm80
