// Shapes of the portable kernels (sm_80 and later), by head size. All fit into the shared memory of
// the smaller devices (8.6, 8.9, 12.0).
#pragma once

#include "../key_block.h"
#include "../launch.h"

namespace onepass::cuda::sm80 {

constexpr int kWarps = 4;
constexpr int kThreads = 32 * kWarps;
constexpr int kElementBytes = 2;
constexpr int kMaxSharedBytes = 99 * 1024;

// The number of blocks for which a multiprocessor's registers must suffice. For Blackwell, ptxas
// needs more registers in the forward kernel.
constexpr int backward_blocks(int head_qk) { return head_qk <= 64 ? 3 : 2; }
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
constexpr int forward_blocks(int) { return 2; }
#else
constexpr int forward_blocks(int head_qk) { return head_qk <= 64 ? 3 : 2; }
#endif

// Forward: a block has kQueries queries, each warp 16 kSlices of them, and streams key tiles.
template <int kHeadQk, int kHeadV>
struct ForwardConfig {
  // As many as the accumulators and shared memory leave room for.
  static constexpr int kSlices = kHeadQk <= 192 && kHeadV <= 128 ? 2 : 1;
  static constexpr int kQueries = 16 * kSlices * kWarps;
  static constexpr int kSharedBytes =
      (kQueries * kHeadQk + kTile * (kHeadQk + kHeadV)) * kElementBytes;
  static_assert(kSharedBytes <= kMaxSharedBytes);
};

// Backward with dq, dk and dv at once: a block keeps a tile of keys, 16 for each warp, and streams
// tiles of queries through one stage, so that more than one block fits on an A100. dS^T also goes
// through shared memory.
template <int kHead>
struct FusedBackwardConfig {
  static constexpr int kTileBytes = kTile * kHead * kElementBytes;
  static constexpr int kDsBytes = kTile * kTile * kElementBytes;
  static constexpr int kStatisticsBytes = kTile * static_cast<int>(sizeof(Statistics));
  static constexpr int kSharedBytes =
      4 * kTileBytes + kDsBytes + kStatisticsBytes + static_cast<int>(sizeof(KeyBlock));
};

// Other backward passes: a block keeps a tile of kTile queries (for dq) or keys (for dk and dv), 16
// for each warp, and streams tiles of kStreamed of the others, two at a time where they fit.
template <int kHeadQk, int kHeadV>
struct BackwardConfig {
  static constexpr int kStages = kHeadQk <= 128 ? 2 : 1;
  static constexpr int kStreamed = kHeadQk + kHeadV <= 384 ? kTile : kTile / 2;
  static constexpr int kKeptBytes = kTile * (kHeadQk + kHeadV) * kElementBytes;
  // Every streamed tile of queries comes with its statistics.
  static constexpr int kStatisticsBytes = kStreamed * static_cast<int>(sizeof(Statistics));
  static constexpr int kStageBytes =
      kStreamed * (kHeadQk + kHeadV) * kElementBytes + kStatisticsBytes;
  static constexpr int kSharedBytes =
      kKeptBytes + kStages * kStageBytes + static_cast<int>(sizeof(KeyBlock));
  static_assert(kSharedBytes <= kMaxSharedBytes);
  // Accumulators of dk and dv together, 64 registers per 128 columns, or one after the other.
  static constexpr bool kSeparate = kHeadQk + kHeadV > 256;
  // Whether dq is computed together with them: the registers can also hold a quarter of its tile.
  static constexpr bool kFused = kHeadQk == kHeadV && kHeadQk <= 128;
  // Of the kernel that needs the most.
  static constexpr int kMostSharedBytes = [] {
    if constexpr (kFused) return FusedBackwardConfig<kHeadQk>::kSharedBytes;
    return BackwardConfig::kSharedBytes;
  }();
};

}  // namespace onepass::cuda::sm80
