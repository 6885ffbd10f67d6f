// Shapes of the Hopper kernels (sm_90a), by head size.
#pragma once

#include "../launch.h"
#include "../plan.h"

namespace onepass::cuda::sm90 {

constexpr int kWarpgroup = 128;  // threads
constexpr int kConsumers = 2;    // warpgroups
constexpr int kThreads = kWarpgroup * (1 + kConsumers);
constexpr int kProducerRegisters = 24, kConsumerRegisters = 240;

// A tile in shared memory is a row of blocks of 64 columns, each of kTileRows rows of 128 bytes:
// what one bulk copy brings. The 16-byte chunks of a row are permuted by the row's number modulo 8,
// which the copy engine and the tensor cores call the 128-byte swizzle.
constexpr int kTileRows = 128;
constexpr int kBlockColumns = 64;
constexpr int kRowBytes = 128;
constexpr int kBlockBytes = kTileRows * kRowBytes;

template <int kHeadQk, int kHeadV>
struct ForwardConfig {
  static_assert(kHeadQk % kBlockColumns == 0 && kHeadV % kBlockColumns == 0);
  static constexpr int kStages = 2;
  static constexpr int kQkBlocks = kHeadQk / kBlockColumns, kVBlocks = kHeadV / kBlockColumns;
  static constexpr int kQkBytes = kQkBlocks * kBlockBytes;  // of a tile of Q or K
  static constexpr int kVBytes = kVBlocks * kBlockBytes;
  static constexpr int kBarriers = 1 + 4 * kStages;
  static constexpr int kSharedBytes = kQkBytes + kStages * (kQkBytes + kVBytes) + kBarriers * 8;
};

}  // namespace onepass::cuda::sm90
