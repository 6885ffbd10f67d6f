// Hopper forward: one block computes 128 queries of one head, or of up to four heads one after the
// other.
//
// Three warpgroups. One warp of the first walks the visited tiles of 128 keys (64 if the output is
// wide) and starts the copies of K and V, in two stages each; it tells the other two warpgroups
// which tile a stage has (-1 after a head's last), and each of them computes 64 queries. A consumer
// keeps the tensor cores busy while it computes a softmax: it starts S = Q K^T of the next tile and
// O += P V of this one, then exponentiates the next scores while the latter still runs. The two
// take turns in starting their products, so that one computes exponentials while the products of
// the other run. P stays in registers. While they finish a head, Q, K and V of the next are being
// copied. Deterministic.
//
// Barriers: the phase of a stage's `full` ends when its bytes have arrived, that of `empty` when
// both consumers are done with it (one arrival per warp).
#pragma once

#include "../rows.h"
#include "../softmax.h"
#include "tensor_map.h"
#include "tile.h"

namespace onepass::cuda::sm90 {

struct ForwardMaps {
  TensorMap q, k, v;
};

// The turns of the two consumers in starting products: barrier 1 + consumer is the turn of that
// consumer.
class Turns {
 public:
  __device__ __forceinline__ explicit Turns(int consumer) : consumer_(consumer) {
    if (consumer == 1) give(0);
  }
  __device__ __forceinline__ void wait_for_mine() const {
    sync_threads(1 + consumer_, kConsumerThreads);
  }
  __device__ __forceinline__ void pass_on() const { give(1 - consumer_); }
  // The first consumer takes the last turn that the second gives it.
  __device__ __forceinline__ void finish() const {
    if (consumer_ == 0) wait_for_mine();
  }

 private:
  __device__ __forceinline__ static void give(int consumer) {
    arrive_threads(1 + consumer, kConsumerThreads);
  }
  const int consumer_;
};

template <typename Element, int kHeadQk, int kHeadV>
__global__ void __launch_bounds__(kThreads, 1)
    forward_kernel(const Params params, const __grid_constant__ ForwardMaps maps,
                   const int32_t num_heads) {
  using Config = ForwardConfig<kHeadQk, kHeadV>;
  using TileQ = typename Config::TileQ;
  using TileK = typename Config::TileK;
  using TileV = typename Config::TileV;
  constexpr int kRows = Config::kRows, kKeys = Config::kKeys, kStages = Config::kStages;
  const int warpgroup = threadIdx.x / kWarpgroup, lane = threadIdx.x % 32;
  const int32_t first_head = blockIdx.y * num_heads, row = blockIdx.z, seq = params.seq;
  const int32_t first_query = plan_of_row(params.plan, row, seq).query_order_2[blockIdx.x] * kRows;

  uint8_t* q_tile = shared_memory();
  const auto k_tile = [&](int stage) { return q_tile + TileQ::kBytes + stage * TileK::kBytes; };
  const auto v_tile = [&](int stage) { return k_tile(kStages) + stage * TileV::kBytes; };
  uint8_t* out_tile = Config::kOutApart ? v_tile(kStages) : q_tile;
  Visit* visits = reinterpret_cast<Visit*>(v_tile(kStages) + Config::kOutBytes);
  // One for each thread of the consumers: written by finish_before_wait, never read.
  float* finished = reinterpret_cast<float*>(visits + kStages);
  Barrier* q_full = reinterpret_cast<Barrier*>(finished + kConsumerThreads);
  Barrier* q_empty = q_full + 1;
  Barrier* k_full = q_empty + 1;
  Barrier* v_full = k_full + kStages;
  Barrier* k_empty = v_full + kStages;
  Barrier* v_empty = k_empty + kStages;
  if (threadIdx.x == 0) {
    init_barrier(q_full, 1);
    init_barrier(q_empty, kConsumers * 4);
    for (int stage = 0; stage < kStages; ++stage) {
      init_barrier(k_full + stage, 1);
      init_barrier(v_full + stage, 1);
      init_barrier(k_empty + stage, kConsumers * 4);
      init_barrier(v_empty + stage, kConsumers * 4);
    }
    publish_barriers();
  }
  sync_block();

  if (warpgroup == 0) {
    release_registers<kProducerRegisters>();
    if (threadIdx.x >= 32) return;
    Stage<kStages> k, v;
    for (int i = 0; i < num_heads; ++i) {
      const int32_t head = first_head + i, kv_head = head / (params.heads / params.kv_heads);
      const auto bring_k = [&](const Visit& visit) {
        wait(k_empty + k.index, k.parity ^ 1);  // returns at once in the first round
        if (lane == 0) {
          visits[k.index] = visit;
          if (visit.tile < 0) {
            arrive(k_full + k.index);
          } else {
            arrive_and_expect(k_full + k.index, TileK::kBytes);
            copy_tile<TileK>(k_tile(k.index), maps.k, k_full + k.index, visit.tile * kKeys, kv_head,
                             row);
          }
        }
        k.advance();
      };
      const auto bring_v = [&](const Visit& visit) {
        wait(v_empty + v.index, v.parity ^ 1);
        if (lane == 0) {
          arrive_and_expect(v_full + v.index, TileV::kBytes);
          copy_tile<TileV>(v_tile(v.index), maps.v, v_full + v.index, visit.tile * kKeys, kv_head,
                           row);
        }
        v.advance();
      };
      KeyTileWalk<kRows, kKeys> walk(params, row, first_query);
      Visit visit = walk.next();  // at least the tile on the diagonal
      bring_k(visit);
      wait(q_empty, i % 2 ^ 1);
      if (lane == 0) {
        arrive_and_expect(q_full, TileQ::kBytes);
        copy_tile<TileQ>(q_tile, maps.q, q_full, first_query, head, row);
      }
      while (visit.tile >= 0) {
        bring_v(visit);
        visit = walk.next();
        bring_k(visit);
      }
    }
    return;
  }

  take_registers<kConsumerRegisters>();
  const int consumer = consumer_of_warp();
  const int32_t warp_query = first_query + consumer * 64 + threadIdx.x % kWarpgroup / 32 * 16;
  const ScoreScale score_scale(params);
  Softmax<1> softmax;
  Accumulator<1, kKeys / 8> scores;
  Accumulator<1, kHeadV / 8> out;
  LeftFactor<1, kKeys / 16> probabilities;
  Stage<kStages> k, v;

  const auto next_visit = [&] {
    wait(k_full + k.index, k.parity);
    return visits[k.index];
  };
  const auto start_scores = [&] {
    start_transposed<Element, TileQ, TileK>(scores[0], q_tile, consumer * 64, k_tile(k.index));
    commit_products();
  };
  const auto give_back_k = [&] {
    release(k_empty + k.index);
    k.advance();
  };
  const auto start_values = [&] {
    wait(v_full + v.index, v.parity);
    start_add<Element, TileV>(out[0], probabilities[0], v_tile(v.index));
    commit_products();
  };
  const auto finish_values = [&] {
    wait_products<0>();
    hold(out[0]);
    release(v_empty + v.index);
    v.advance();
  };
  const auto finish_scores = [&](const Visit& visit) {
    hold(scores[0]);
    score_scale.cap(scores);
    if (visit.full) return;
    const int32_t first_key = visit.tile * kKeys;
#pragma unroll
    for (int i = 0; i < kKeys / kTile; ++i) {
      auto& part = reinterpret_cast<Accumulator<1, kTile / 8>&>(scores[0][i * kTile / 8]);
      mask_keys(part, params, row, warp_query, first_key + i * kTile);
    }
  };

  float rescale[1][2];
  const auto exponentiate = [&] {
    softmax.exponentiate(scores, score_scale.factor, rescale,
                         [&](int m, int n, int half, float left, float right) {
                           scores[m][n][2 * half] = left;
                           scores[m][n][2 * half + 1] = right;
                         });
  };

  const Turns turns(consumer);
  for (int i = 0; i < num_heads; ++i) {
    softmax = {};
    clear(out);
    Visit visit = next_visit();
    wait(q_full, i % 2);
    turns.wait_for_mine();
    start_scores();
    turns.pass_on();
    wait_products<0>();
    give_back_k();
    finish_scores(visit);
    exponentiate();
    round_to_factor<Element>(probabilities, scores);
    while (true) {
      visit = next_visit();
      if (visit.tile < 0) break;
      turns.wait_for_mine();
      start_scores();
      start_values();
      turns.pass_on();
      wait_products<1>();
      give_back_k();
      finish_scores(visit);
      exponentiate();  // in place: the products still read the probabilities of the last tile
      finish_before_wait(finished + threadIdx.x % kConsumerThreads,
                         softmax.sum[0][0] + softmax.sum[0][1]);
      finish_values();
      softmax.rescale_out(out, rescale);
      round_to_factor<Element>(probabilities, scores);
    }
    give_back_k();
    if constexpr (Config::kOutApart) release(q_empty);
    start_values();
    finish_values();

    const int32_t head = first_head + i;
    float* lse = params.lse + (static_cast<int64_t>(row) * params.heads + head) * seq;
    const float* sink = params.sinks != nullptr ? params.sinks + head : nullptr;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float value = softmax.finish(out, 0, half, score_scale.factor, sink);
      const int32_t query = warp_query + 8 * half + lane / 4;
      if (lane % 4 == 0 && query < seq) lse[query] = value;
    }
    // In the memory of the queries, blocks of columns have rows of both consumers.
    if constexpr (!Config::kOutApart) sync_threads(3, kConsumerThreads);
    Element* staging = reinterpret_cast<Element*>(out_tile) + (threadIdx.x / 32 - 4) * 16 * kHeadV;
    round_to_tile<Element, kHeadV>(staging, out);
    sync_warp();
    store_rows<Element, 16, kHeadV>(head_of<Element>(params.out, row, head), staging,
                                    params.out.seq_stride, warp_query, seq);
    if constexpr (!Config::kOutApart) {
      publish_writes();
      release(q_empty);
    }
  }
  turns.finish();
}

template <typename Element, int kHeadQk, int kHeadV>
void launch_forward(const Params& params, Stream stream) {
  using Config = ForwardConfig<kHeadQk, kHeadV>;
  constexpr int kRows = Config::kRows, kKeys = Config::kKeys;
  const ForwardMaps maps{
      make_tensor_map<Element>(params.q, params.batch, params.heads, params.seq, kHeadQk, kRows),
      make_tensor_map<Element>(params.k, params.batch, params.kv_heads, params.seq, kHeadQk, kKeys),
      make_tensor_map<Element>(params.v, params.batch, params.kv_heads, params.seq, kHeadV, kKeys)};
  const int32_t tiles = ceil_div(params.seq, kRows);
  const int32_t num_heads =
      heads_of_block(params.heads, static_cast<int64_t>(tiles) * params.batch);
  launch(forward_kernel<Element, kHeadQk, kHeadV>,
         Grid{tiles, params.heads / num_heads, params.batch}, kThreads, Config::kSharedBytes,
         stream, params, maps, num_heads);
}

}  // namespace onepass::cuda::sm90
