// What the warpgroups of the Hopper forward kernel share: its shared memory.
//
// Barriers: the phase of a stage's `full` ends when its bytes have arrived, that of `empty` when
// both consumers are done with it (one arrival per warp).
#pragma once

#include "tensor_map.h"
#include "tile.h"

namespace onepass::cuda::sm90 {

struct ForwardMaps {
  TensorMap q, k, v;
};

// Shared memory of the forward kernel: the queries, the stages of keys and those of values, the
// output (in the queries' place if there is no other), which tile a stage of keys holds (-1 after a
// head's last) and which consumers see it, a float for each thread of theirs, and the barriers.
template <typename Config>
struct ForwardMemory {
  using TileQ = typename Config::TileQ;
  using TileK = typename Config::TileK;
  using TileV = typename Config::TileV;
  static constexpr int kStages = Config::kStages;
  uint8_t* begin = shared_memory();

  __device__ __forceinline__ uint8_t* q() const { return begin; }
  __device__ __forceinline__ uint8_t* k(int stage) const {
    return q() + TileQ::kBytes + stage * TileK::kBytes;
  }
  __device__ __forceinline__ uint8_t* v(int stage) const {
    return k(kStages) + stage * TileV::kBytes;
  }
  __device__ __forceinline__ uint8_t* out() const { return Config::kOutApart ? v(kStages) : q(); }
  __device__ __forceinline__ Visit* visit(int stage) const {
    return reinterpret_cast<Visit*>(v(kStages) + Config::kOutBytes) + stage;
  }
  // One for each thread of the consumers: written by finish_before_wait, never read.
  __device__ __forceinline__ float* finished(int thread) const {
    return reinterpret_cast<float*>(visit(kStages)) + thread;
  }
  __device__ __forceinline__ Barrier* q_full() const {
    return reinterpret_cast<Barrier*>(finished(kConsumerThreads));
  }
  __device__ __forceinline__ Barrier* q_empty() const { return q_full() + 1; }
  __device__ __forceinline__ Barrier* k_full(int stage) const { return q_empty() + 1 + stage; }
  __device__ __forceinline__ Barrier* v_full(int stage) const { return k_full(kStages) + stage; }
  __device__ __forceinline__ Barrier* k_empty(int stage) const { return v_full(kStages) + stage; }
  __device__ __forceinline__ Barrier* v_empty(int stage) const { return k_empty(kStages) + stage; }

  // Called by all threads.
  __device__ __forceinline__ void init_barriers() const {
    if (threadIdx.x == 0) {
      init_barrier(q_full(), 1);
      init_barrier(q_empty(), kConsumers * 4);
      for (int stage = 0; stage < kStages; ++stage) {
        init_barrier(k_full(stage), 1);
        init_barrier(v_full(stage), 1);
        init_barrier(k_empty(stage), kConsumers * 4);
        init_barrier(v_empty(stage), kConsumers * 4);
      }
      publish_barriers();
    }
    sync_block();
  }

  // Called by one thread: starts to copy a tile of one head's tokens, starting at `first`.
  __device__ __forceinline__ void copy_q(const TensorMap& map, int first, int head, int b) const {
    arrive_and_expect(q_full(), TileQ::kBytes);
    copy_tile<TileQ>(q(), map, q_full(), first, head, b);
  }
  __device__ __forceinline__ void copy_k(int stage, const TensorMap& map, int first, int head,
                                         int b) const {
    arrive_and_expect(k_full(stage), TileK::kBytes);
    copy_tile<TileK>(k(stage), map, k_full(stage), first, head, b);
  }
  __device__ __forceinline__ void copy_v(int stage, const TensorMap& map, int first, int head,
                                         int b) const {
    arrive_and_expect(v_full(stage), TileV::kBytes);
    copy_tile<TileV>(v(stage), map, v_full(stage), first, head, b);
  }
};

}  // namespace onepass::cuda::sm90
