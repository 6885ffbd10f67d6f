// Shapes of the Hopper kernels (sm_90a), by head size.
#pragma once

#include "../launch.h"
#include "../plan.h"

namespace onepass::cuda::sm90 {

constexpr int kWarpgroup = 128;  // threads
constexpr int kConsumers = 2;    // warpgroups
constexpr int kThreads = kWarpgroup * (1 + kConsumers);
constexpr int kProducerRegisters = 24, kConsumerRegisters = 240;

// A tile in shared memory is a row of blocks of 64 columns, each of kRows rows of 128 bytes: what
// one bulk copy brings. The 16-byte chunks of a row are permuted by the row's number modulo 8,
// which the copy engine and the tensor cores call the 128-byte swizzle.
constexpr int kBlockColumns = 64;
constexpr int kRowBytes = 128;

template <int kRows, int kColumns>
struct TileShape {
  static_assert(kColumns % kBlockColumns == 0 && kRows % 8 == 0);
  static constexpr int kBlocks = kColumns / kBlockColumns;
  static constexpr int kBlockBytes = kRows * kRowBytes;
  static constexpr int kBytes = kBlocks * kBlockBytes;
};

constexpr int kBarrierBytes = 8;

template <int kHeadQk, int kHeadV>
struct ForwardConfig {
  static constexpr int kRows = 128;  // queries of a block, keys of a streamed tile
  static constexpr int kStages = 2;
  using TileQk = TileShape<kRows, kHeadQk>;
  using TileV = TileShape<kRows, kHeadV>;
  static constexpr int kSharedBytes = TileQk::kBytes + kStages * (TileQk::kBytes + TileV::kBytes) +
                                      (1 + 4 * kStages) * kBarrierBytes;
};

// The backward kernels keep a tile of 64 tokens for each consumer and stream tiles of 64 others.
template <int kHeadQk, int kHeadV>
struct BackwardConfig {
  static constexpr int kRows = 64;
  static constexpr int kStages = 2;
  using TileQk = TileShape<kRows, kHeadQk>;
  using TileV = TileShape<kRows, kHeadV>;
  static constexpr int kPairBytes = TileQk::kBytes + TileV::kBytes;  // K and V, or Q and dO
  // Statistics go with every streamed tile of queries; 1 KiB keeps the tiles aligned.
  static constexpr int kStatisticsBytes = kRows * static_cast<int>(sizeof(Statistics));
  static constexpr int kStageBytes = kPairBytes + 1024;
  static constexpr int kSharedBytes =
      kConsumers * kPairBytes + kStages * kStageBytes + (1 + 2 * kStages) * kBarrierBytes;
};

}  // namespace onepass::cuda::sm90
