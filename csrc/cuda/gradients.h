// What both families of backward kernels do besides products: the statistics of the queries and the
// gradient of the sinks, in separate launches, and the gradient of the scores.
#pragma once

#include "key_block.h"
#include "launch.h"
#include "scores.h"

namespace onepass::cuda {

constexpr int kStatisticsThreads = 128;
constexpr int kLanesPerQuery = 8;
constexpr int kQueriesPerBlock = kStatisticsThreads / kLanesPerQuery;

// The statistics of every query; the score gradients are P * (dP - delta). Eight lanes per query.
// This also sets the sums of dq and their order to zero. Each translation unit has a copy, since
// they are compiled for different devices.
template <typename Element>
static __global__ void __launch_bounds__(kStatisticsThreads)
    statistics_kernel(const BackwardParams params, int32_t head_qk, int32_t head_v) {
  const int32_t query = blockIdx.x * kQueriesPerBlock + threadIdx.x / kLanesPerQuery;
  const int32_t head = blockIdx.y, b = blockIdx.z;
  const int64_t padded_query = padded_index(params, b, head, query);
  if (params.dq_sums != nullptr) {
    uint4* sums = reinterpret_cast<uint4*>(params.dq_sums + padded_query * head_qk);
    for (int32_t i = threadIdx.x % kLanesPerQuery; i < head_qk / 4; i += kLanesPerQuery) {
      sums[i] = uint4{0, 0, 0, 0};
    }
  }
  if (params.dq_order != nullptr && threadIdx.x == 0) {
    if (query % kTile == 0) params.dq_order[params.batch + padded_query / kTile] = 0;
    if (head == 0 && query == 0) params.dq_order[b] = 0;
  }
  float delta = 0;
  if (query < params.seq) {
    const Element* out = head_of<Element>(params.out, b, head) + query * params.out.seq_stride;
    const Element* dout = head_of<Element>(params.dout, b, head) + query * params.dout.seq_stride;
    for (int32_t d = threadIdx.x % kLanesPerQuery * 8; d < head_v; d += kLanesPerQuery * 8) {
      const uint4 of_out = *reinterpret_cast<const uint4*>(out + d);
      const uint4 of_dout = *reinterpret_cast<const uint4*>(dout + d);
      const uint32_t left[4] = {of_out.x, of_out.y, of_out.z, of_out.w};
      const uint32_t right[4] = {of_dout.x, of_dout.y, of_dout.z, of_dout.w};
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float2 x = unpack<Element>(left[i]), y = unpack<Element>(right[i]);
        delta += x.x * y.x + x.y * y.y;
      }
    }
  }
#pragma unroll
  for (int mask = kLanesPerQuery / 2; mask > 0; mask /= 2) delta += shuffle_xor(delta, mask);
  if (threadIdx.x % kLanesPerQuery == 0) {
    Statistics statistics{INFINITY, 0};
    if (query < params.seq) {
      const int64_t index = index_of_head(params, b, head) * params.seq + query;
      if (params.dlse != nullptr) delta -= params.dlse[index];
      statistics = {params.lse[index] * kLog2E, delta};
    }
    params.statistics[padded_query] = statistics;
  }
}

// dsinks[head] = -sum over queries of the sink's probability times delta. A block per head, which
// adds in a fixed order.
static __global__ void __launch_bounds__(kStatisticsThreads)
    dsinks_kernel(const BackwardParams params) {
  const int32_t head = blockIdx.x;
  const float sink = params.sinks[head] * kLog2E;
  float total = 0;
  for (int32_t b = 0; b < params.batch; ++b) {
    const Statistics* of_head = params.statistics + padded_index(params, b, head, 0);
    for (int32_t query = threadIdx.x; query < params.seq; query += kStatisticsThreads) {
      total -= fast_exp2(sink - of_head[query].lse) * of_head[query].delta;
    }
  }
#pragma unroll
  for (int mask = 16; mask > 0; mask /= 2) total += shuffle_xor(total, mask);
  float* of_warp = reinterpret_cast<float*>(shared_memory());
  if (threadIdx.x % 32 == 0) of_warp[threadIdx.x / 32] = total;
  sync_block();
  if (threadIdx.x == 0) {
    for (int warp = 1; warp < kStatisticsThreads / 32; ++warp) total += of_warp[warp];
    params.dsinks[head] = total;
  }
}

// Which gradients of the keys and values one launch computes. Both at once where the registers
// allow it; otherwise the scores are computed again.
enum class Want { dk_and_dv, dk, dv };

// Scores become probabilities P, and the gradient of the probabilities dP becomes the factor by
// which P is multiplied to give dS, the gradient of the products up to `scale`. `statistics_of(n,
// half, column)` gives those of a query.
template <int kBlocks, typename StatisticsOf>
__device__ __forceinline__ void differentiate(Accumulator<1, kBlocks>& scores,
                                              Accumulator<1, kBlocks>& dp,
                                              const ScoreScale& score_scale,
                                              const StatisticsOf& statistics_of) {
  const auto for_each = [&](const auto& compute) {
#pragma unroll
    for (int n = 0; n < kBlocks; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) compute(scores[0][n][e], dp[0][n][e], n, e / 2, e % 2);
    }
  };
  for_each([&](float, float& dp, int n, int half, int column) {
    dp -= statistics_of(n, half, column).delta;
  });
  if (score_scale.capped()) {
    for_each([&](float score, float& dp, int, int, int) { dp *= ScoreScale::derivative(score); });
  }
  for_each([&](float& score, float, int n, int half, int column) {
    score = fast_exp2(score * score_scale.factor - statistics_of(n, half, column).lse);
  });
}

// Writes a warp's 16 tokens of a gradient through a part of shared memory that only this warp uses
// by then.
template <typename Element, int kCols>
__device__ __forceinline__ void store_gradient(Element* staging, const Tensor& gradient, int32_t b,
                                               int32_t head, int32_t first, int32_t seq,
                                               const Accumulator<1, kCols / 8>& values) {
  sync_warp();
  round_to_tile<Element, kCols>(staging, values);
  sync_warp();
  store_tokens<Element, 16, kCols>(head_of<Element>(gradient, b, head), staging,
                                   gradient.seq_stride, first, seq);
}

// A key of a part of dk or dv, `width` floats.
__device__ __forceinline__ float* part_of_gradient(float* parts, const BackwardParams& params,
                                                   int32_t width, int32_t part, int32_t b,
                                                   int32_t kv_head, int32_t key) {
  const int64_t head_index = (int64_t{part} * params.batch + b) * params.kv_heads + kv_head;
  return parts + (head_index * padded(params.seq) + key) * width;
}

// Writes a warp's 16 keys of dk or dv, times `factor`: as store_gradient does, or the block's part.
template <typename Element, int kCols>
__device__ __forceinline__ void store_gradient_of_keys(Element* staging, const Tensor& gradient,
                                                       float* parts, const BackwardParams& params,
                                                       const KeyBlock& block, int32_t b,
                                                       int32_t first, float factor,
                                                       Accumulator<1, kCols / 8>& values) {
  multiply_by(values, factor);
  if (parts == nullptr) {
    store_gradient<Element, kCols>(staging, gradient, b, block.kv_head, first, params.seq, values);
    return;
  }
  const int lane = threadIdx.x % 32;
  float* of_lane =
      part_of_gradient(parts, params, kCols, block.part, b, block.kv_head, first + lane / 4) +
      lane % 4 * 2;
#pragma unroll
  for (int n = 0; n < kCols / 8; ++n) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      *reinterpret_cast<float2*>(of_lane + 8 * half * kCols + 8 * n) = {values[0][n][2 * half],
                                                                        values[0][n][2 * half + 1]};
    }
  }
}

// dk or dv from its parts, added in their order. A thread per 8 columns of a key.
template <typename Element>
static __global__ void __launch_bounds__(kStatisticsThreads)
    add_parts_kernel(const BackwardParams params, const Tensor gradient, float* parts,
                     int32_t width) {
  const int32_t chunk = blockIdx.x * kStatisticsThreads + threadIdx.x;
  const int32_t key = chunk / (width / 8), column = chunk % (width / 8) * 8;
  const int32_t kv_head = blockIdx.y, b = blockIdx.z;
  if (key >= params.seq) return;
  float2 total[4] = {};
  for (int32_t part = 0; part < params.group_parts; ++part) {
    const float2* of_part = reinterpret_cast<const float2*>(
        part_of_gradient(parts, params, width, part, b, kv_head, key) + column);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      total[i].x += of_part[i].x;
      total[i].y += of_part[i].y;
    }
  }
  uint4* out = reinterpret_cast<uint4*>(head_of<Element>(gradient, b, kv_head) +
                                        key * gradient.seq_stride + column);
  *out = {pack<Element>(total[0].x, total[0].y), pack<Element>(total[1].x, total[1].y),
          pack<Element>(total[2].x, total[2].y), pack<Element>(total[3].x, total[3].y)};
}

// Static, like its kernel: the linker would keep one family's copy for both.
template <typename Element>
static void launch_add_parts(const BackwardParams& params, int32_t head_qk, int32_t head_v,
                             Stream stream) {
  if (params.group_parts == 1) return;
  const auto add = [&](const Tensor& gradient, float* parts, int32_t width) {
    const Grid by_chunk{ceil_div(params.seq * (width / 8), kStatisticsThreads), params.kv_heads,
                        params.batch};
    launch(add_parts_kernel<Element>, by_chunk, kStatisticsThreads, 0, stream, params, gradient,
           parts, width);
  };
  add(params.dk, params.dk_parts, head_qk);
  add(params.dv, params.dv_parts, head_v);
}

// Static, like its kernels: the linker would keep one family's copy for both.
template <typename Element>
static void launch_statistics(const BackwardParams& params, int32_t head_qk, int32_t head_v,
                              Stream stream) {
  const Grid by_query{padded(params.seq) / kQueriesPerBlock, params.heads, params.batch};
  launch(statistics_kernel<Element>, by_query, kStatisticsThreads, 0, stream, params, head_qk,
         head_v);
  if (params.sinks != nullptr) {
    launch(dsinks_kernel, Grid{params.heads, 1, 1}, kStatisticsThreads,
           kStatisticsThreads / 32 * static_cast<int>(sizeof(float)), stream, params);
  }
}

}  // namespace onepass::cuda
