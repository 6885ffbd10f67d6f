// What the Hopper backward kernels share: their shared memory, and the warp that starts the copies
// into it.
//
// Barriers: the phase of a stage's `full` ends when its bytes have arrived, that of `empty` when
// both consumers are done with it (one arrival per warp). That of `dq_full` ends when the consumers
// have written a tile of dq (one per warp), that of `dq_empty` when the copy engine has read it.
#pragma once

#include "../gradients.h"
#include "../tokens.h"
#include "tensor_map.h"
#include "tile.h"

namespace onepass::cuda::sm90 {

struct BackwardMaps {
  TensorMap q, k, v, dout;
};

// Shared memory of a backward kernel: for each consumer its pair of kept tiles (of d_qk and of d_v
// columns), then the stages of the streamed tiles of d_qk columns and of those of d_v columns,
// further scratch of the kernel, what belongs to a streamed tile (statistics of queries; which tile
// it is, -1 after the last), the barriers, and what the block takes if it keeps keys.
template <typename Config>
struct BackwardMemory {
  using KeptQk = typename Config::KeptQk;
  using KeptV = typename Config::KeptV;
  using TileQk = typename Config::TileQk;
  using TileV = typename Config::TileV;
  uint8_t* begin = shared_memory();

  __device__ __forceinline__ uint8_t* kept_qk(int consumer) const {
    return begin + consumer * Config::kPairBytes;
  }
  __device__ __forceinline__ uint8_t* kept_v(int consumer) const {
    return kept_qk(consumer) + KeptQk::kBytes;
  }
  __device__ __forceinline__ uint8_t* stage_qk(int stage) const {
    return kept_qk(kConsumers) + stage * TileQk::kBytes;
  }
  __device__ __forceinline__ uint8_t* stage_v(int stage) const {
    return stage_qk(Config::kStagesQk) + stage * TileV::kBytes;
  }
  __device__ __forceinline__ uint8_t* scratch() const { return stage_v(Config::kStagesV); }
  // A tile of dq on its way to the sums, the end of the scratch.
  __device__ __forceinline__ uint8_t* dq() const {
    return scratch() + Config::kScratchBytes - kFusedDqBytes;
  }
  __device__ __forceinline__ Statistics* statistics(int stage) const {
    return reinterpret_cast<Statistics*>(scratch() + Config::kScratchBytes) +
           stage * Config::kStreamed;
  }
  __device__ __forceinline__ QueryStep* step(int stage) const {
    uint8_t* steps = reinterpret_cast<uint8_t*>(statistics(Config::kStagesQk));
    return reinterpret_cast<QueryStep*>(steps + stage * Config::kStepBytes);
  }
  __device__ __forceinline__ Visit* visit(int stage) const {
    return reinterpret_cast<Visit*>(step(stage));
  }
  __device__ __forceinline__ Barrier* kept_full() const {
    return reinterpret_cast<Barrier*>(step(Config::kStagesQk));
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
  __device__ __forceinline__ Barrier* dq_full() const { return empty_v(Config::kStagesV); }
  __device__ __forceinline__ Barrier* dq_empty() const { return dq_full() + 1; }
  __device__ __forceinline__ KeyBlock& block() const {
    return *reinterpret_cast<KeyBlock*>(dq_empty() + 1);
  }

  // Called by all threads.
  __device__ __forceinline__ void init_barriers() const {
    if (threadIdx.x == 0) {
      init_barrier(kept_full(), 1);
      init_barrier(dq_full(), kConsumers * 4);
      init_barrier(dq_empty(), 1);
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
  // The same for a kernel that keeps keys: also takes them.
  __device__ __forceinline__ void init_barriers_and_block(const BackwardParams& params) const {
    if (threadIdx.x == 0) {
      block() = take_key_block<Config::kStreamed, kConsumers * kTile>(params);
    }
    init_barriers();
  }

  // Called by one thread: each consumer's tokens, starting at `first`; those of `v` only if needed.
  __device__ __forceinline__ void copy_kept(const TensorMap& qk, const TensorMap& v, bool want_v,
                                            int first, int head, int b) const {
    arrive_and_expect(kept_full(), kConsumers * (want_v ? Config::kPairBytes : KeptQk::kBytes));
    for (int consumer = 0; consumer < kConsumers; ++consumer) {
      const int token = first + consumer * kTile;
      copy_tile<KeptQk>(kept_qk(consumer), qk, kept_full(), token, head, b);
      if (want_v) copy_tile<KeptV>(kept_v(consumer), v, kept_full(), token, head, b);
    }
  }

  // Called by one thread, with `more_bytes` to follow.
  __device__ __forceinline__ void copy_qk(int stage, const TensorMap& qk, int first, int head,
                                          int b, int more_bytes) const {
    arrive_and_expect(full_qk(stage), TileQk::kBytes + more_bytes);
    copy_tile<TileQk>(stage_qk(stage), qk, full_qk(stage), first, head, b);
  }
  __device__ __forceinline__ void copy_v(int stage, const TensorMap& v, int first, int head,
                                         int b) const {
    arrive_and_expect(full_v(stage), TileV::kBytes);
    copy_tile<TileV>(stage_v(stage), v, full_v(stage), first, head, b);
  }
};

// The producer of a kernel that keeps keys: a warp loads K, V if needed, and then, for the query
// heads of the block, Q with its statistics and dO, and tells the consumers where they are. After
// the last comes a step without a head.
template <typename Config>
__device__ __forceinline__ void bring_keys_and_queries(const BackwardMemory<Config>& memory,
                                                       const BackwardParams& params,
                                                       const BackwardMaps& maps, bool want_v) {
  const int lane = threadIdx.x % 32;
  const int32_t b = blockIdx.z;
  const KeyBlock& block = memory.block();
  if (lane == 0) memory.copy_kept(maps.k, maps.v, want_v, block.keys.first, block.kv_head, b);
  QueryTileWalk<Config::kStreamed, kConsumers * kTile> walk(params, block);
  Stage<Config::kStagesQk> qk;
  Stage<Config::kStagesV> v;
  while (true) {
    const QueryStep step = walk.next();
    wait(memory.empty_qk(qk.index), qk.parity ^ 1);  // returns at once in the first round
    if (lane == 0) {
      *memory.step(qk.index) = step;
      if (step.head < 0) {
        arrive(memory.full_qk(qk.index));
      } else {
        memory.copy_qk(qk.index, maps.q, step.first, step.head, b, Config::kStatisticsBytes);
        copy_bytes(memory.statistics(qk.index),
                   params.statistics + padded_index(params, b, step.head, step.first),
                   Config::kStatisticsBytes, memory.full_qk(qk.index));
      }
    }
    sync_warp();
    if (step.head < 0) return;
    wait(memory.empty_v(v.index), v.parity ^ 1);
    if (lane == 0) memory.copy_v(v.index, maps.dout, step.first, step.head, b);
    sync_warp();  // a lane that falls behind would miss phases
    qk.advance();
    v.advance();
  }
}

}  // namespace onepass::cuda::sm90
