// Shapes of the Hopper kernels (sm_90a), by head size.
#pragma once

#include "../launch.h"
#include "../plan.h"

namespace onepass::cuda::sm90 {

constexpr int kWarpgroup = 128;  // threads
constexpr int kConsumers = 2;    // warpgroups
constexpr int kThreads = kWarpgroup * (1 + kConsumers);
// Per thread, once the producer has given its registers away; a kernel starts with kRegisters each.
constexpr int kProducerRegisters = 24, kConsumerRegisters = 240;
constexpr int kRegisters = 168;
static_assert(kProducerRegisters + kConsumers * kConsumerRegisters <= (1 + kConsumers) * kRegisters,
              "consumers would wait for registers for ever");

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

constexpr int kMaxSharedBytes = 227 * 1024;

template <int kHeadQk, int kHeadV>
struct ForwardConfig {
  static constexpr int kRows = 128;  // queries of a block
  // Of a streamed tile: its scores are to fit into the registers beside the output.
  static constexpr int kKeys = kHeadV <= 128 ? 128 : 64;
  static constexpr int kStages = 2;
  using TileQ = TileShape<kRows, kHeadQk>;
  using TileK = TileShape<kKeys, kHeadQk>;
  using TileV = TileShape<kKeys, kHeadV>;
  static constexpr int kSharedBytes =
      TileQ::kBytes + kStages * (TileK::kBytes + TileV::kBytes) + (1 + 4 * kStages) * kBarrierBytes;
  static_assert(kSharedBytes <= kMaxSharedBytes);
};

// The backward kernels keep tiles of 64 tokens for each consumer (Q and dO, or K and V) and stream
// tiles of 64 others (K and V, or Q and dO).
template <int kHeadQk, int kHeadV>
struct BackwardConfig {
  static constexpr int kRows = 64;
  using TileQk = TileShape<kRows, kHeadQk>;
  using TileV = TileShape<kRows, kHeadV>;
  static constexpr int kPairBytes = TileQk::kBytes + TileV::kBytes;
  static constexpr int kStagesQk = 2;
  static constexpr int kStagesV = kHeadV <= 128 ? 2 : 1;
  // Statistics go with every streamed tile of Q.
  static constexpr int kStatisticsBytes = kRows * static_cast<int>(sizeof(Statistics));
  static constexpr int kSharedBytes =
      kConsumers * kPairBytes + kStagesQk * (TileQk::kBytes + kStatisticsBytes) +
      kStagesV * TileV::kBytes + (1 + 2 * kStagesQk + 2 * kStagesV) * kBarrierBytes;
  static_assert(kSharedBytes <= kMaxSharedBytes);
  // Accumulators of dk and dv together, 64 registers per 128 columns, or one after the other.
  static constexpr bool kSeparate = kHeadQk + kHeadV > 256;
};

}  // namespace onepass::cuda::sm90
