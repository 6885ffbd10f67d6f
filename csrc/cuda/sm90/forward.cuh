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
// Which tiles are visited, and masked, is judged for each consumer's 64 queries. For a tile of
// which its queries see nothing, a consumer takes its turn and gives K and V back.
#pragma once

#include "../softmax.h"
#include "../tokens.h"
#include "forward_memory.h"

namespace onepass::cuda::sm90 {

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
  constexpr int kQueries = Config::kQueries, kKeys = Config::kKeys;
  const int warpgroup = threadIdx.x / kWarpgroup, lane = threadIdx.x % 32;
  const Place place = place_of_block();
  const int32_t first_head = place.head * num_heads, b = blockIdx.z, seq = params.seq;
  const int32_t first_query =
      plan_of_row(params.plan, b, seq).query_order_2[place.entry] * kQueries;

  const ForwardMemory<Config> memory;
  memory.init_barriers();

  if (warpgroup == 0) {
    release_registers<kProducerRegisters>();
    if (threadIdx.x >= 32) return;
    Stage<Config::kStages> k, v;
    for (int i = 0; i < num_heads; ++i) {
      const int32_t head = first_head + i, kv_head = head / (params.heads / params.kv_heads);
      const auto bring_k = [&](const Visit& visit) {
        wait(memory.k_empty(k.index), k.parity ^ 1);  // returns at once in the first round
        if (lane == 0) {
          *memory.visit(k.index) = visit;
          if (visit.tile < 0) {
            arrive(memory.k_full(k.index));
          } else {
            memory.copy_k(k.index, maps.k, visit.tile * kKeys, kv_head, b);
          }
        }
        k.advance();
      };
      const auto bring_v = [&](const Visit& visit) {
        wait(memory.v_empty(v.index), v.parity ^ 1);
        if (lane == 0) memory.copy_v(v.index, maps.v, visit.tile * kKeys, kv_head, b);
        v.advance();
      };
      KeyTileWalk<kQueries, kKeys, kConsumers> walk(params, b, first_query);
      Visit visit = walk.next();  // at least the tile on the diagonal
      bring_k(visit);
      wait(memory.q_empty(), i % 2 ^ 1);
      if (lane == 0) memory.copy_q(maps.q, first_query, head, b);
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
  const ScoreScale score_scale(params.scoring);
  Softmax<1> softmax;
  Accumulator<1, kKeys / 8> scores;
  Accumulator<1, kHeadV / 8> out;
  LeftFactor<1, kKeys / 16> probabilities;
  TileValues<kKeys> ends;
  Stage<Config::kStages> k, v;

  const auto of_consumer = [&](uint32_t parts) { return (parts >> consumer & 1) != 0; };
  const auto next_visit = [&] {
    wait(memory.k_full(k.index), k.parity);
    return *memory.visit(k.index);
  };
  const auto start_scores = [&] {
    start_transposed<Element, TileQ, TileK>(scores[0], memory.q(), consumer * 64,
                                            memory.k(k.index));
    commit_products();
  };
  const auto give_back_k = [&] {
    release(memory.k_empty(k.index));
    k.advance();
  };
  const auto start_values = [&] {
    wait(memory.v_full(v.index), v.parity);
    start_add<Element, TileV>(out[0], probabilities[0], memory.v(v.index));
    commit_products();
  };
  const auto give_back_v = [&] {
    release(memory.v_empty(v.index));
    v.advance();
  };
  const auto finish_values = [&] {
    wait_products<0>();
    hold(out[0]);
  };
  const auto finish_scores = [&](const Visit& visit) {
    hold(scores[0]);
    score_scale.cap(scores);
    if (of_consumer(visit.full)) return;
    mask_keys(scores, ends, params, b, warp_query, visit.tile * kKeys);
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
    wait(memory.q_full(), i % 2);
    bool pending = false;  // probabilities whose product with V has not been started
    while (true) {
      const Visit visit = next_visit();
      if (!of_consumer(visit.seen)) {  // a tile of the other consumer alone, or the head's end
        const bool is_end = visit.tile < 0;
        give_back_k();
        if constexpr (Config::kOutApart) {
          if (is_end) release(memory.q_empty());
        }
        turns.wait_for_mine();
        if (pending) start_values();
        turns.pass_on();
        finish_values();
        if (pending) give_back_v();
        if (is_end) break;
        pending = false;
        wait(memory.v_full(v.index), v.parity);  // both are done with the stage's last tile
        give_back_v();
        continue;
      }
      // Read now: they arrive while the products run.
      if (!of_consumer(visit.full)) ends = ends_of_keys<kKeys>(params, b, visit.tile * kKeys);
      turns.wait_for_mine();
      start_scores();
      if (pending) {
        start_values();
        turns.pass_on();
        wait_products<1>();
      } else {
        turns.pass_on();
        wait_products<0>();
      }
      give_back_k();
      finish_scores(visit);
      exponentiate();  // in place: the products still read the probabilities of the last tile
      finish_before_wait(memory.finished(threadIdx.x % kConsumerThreads),
                         softmax.sum[0][0] + softmax.sum[0][1]);
      finish_values();
      if (pending) give_back_v();
      softmax.rescale_out(out, rescale);
      round_to_factor<Element>(probabilities, scores);
      pending = true;
    }

    const int32_t head = first_head + i;
    float* lse = params.lse + index_of_head(params, b, head) * seq;
    const float* sink = params.sinks != nullptr ? params.sinks + head : nullptr;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float value = softmax.finish(out, 0, half, score_scale.factor, sink);
      const int32_t query = warp_query + 8 * half + lane / 4;
      if (lane % 4 == 0 && query < seq) lse[query] = value;
    }
    // In the memory of the queries, blocks of columns have queries of both consumers.
    if constexpr (!Config::kOutApart) sync_threads(3, kConsumerThreads);
    Element* staging =
        reinterpret_cast<Element*>(memory.out()) + (threadIdx.x / 32 - 4) * 16 * kHeadV;
    round_to_tile<Element, kHeadV>(staging, out);
    sync_warp();
    store_tokens<Element, 16, kHeadV>(head_of<Element>(params.out, b, head), staging,
                                      params.out.seq_stride, warp_query, seq);
    if constexpr (!Config::kOutApart) {
      publish_writes();
      release(memory.q_empty());
    }
  }
  turns.finish();
}

template <typename Element, int kHeadQk, int kHeadV>
void launch_forward(const Params& params, Stream stream) {
  using Config = ForwardConfig<kHeadQk, kHeadV>;
  constexpr int kQueries = Config::kQueries, kKeys = Config::kKeys;
  const ForwardMaps maps{
      make_tensor_map<Element>(params.q, params.batch, params.heads, params.seq, kHeadQk, kQueries),
      make_tensor_map<Element>(params.k, params.batch, params.kv_heads, params.seq, kHeadQk, kKeys),
      make_tensor_map<Element>(params.v, params.batch, params.kv_heads, params.seq, kHeadV, kKeys)};
  const int32_t tiles = ceil_div(params.seq, kQueries);
  const int32_t num_heads =
      heads_of_block(params.heads, static_cast<int64_t>(tiles) * params.batch);
  launch(forward_kernel<Element, kHeadQk, kHeadV>,
         Grid{tiles, params.heads / num_heads, params.batch}, kThreads, Config::kSharedBytes,
         stream, params, maps, num_heads);
}

}  // namespace onepass::cuda::sm90
