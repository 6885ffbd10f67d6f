// Shapes of the Hopper kernels (sm_90a), by head size.
#pragma once

#include "../key_block.h"
#include "../launch.h"

namespace onepass::cuda::sm90 {

constexpr int kWarpgroup = 128;  // threads
constexpr int kConsumers = 2;    // warpgroups
constexpr int kConsumerThreads = kWarpgroup * kConsumers;
constexpr int kThreads = kWarpgroup + kConsumerThreads;
// Per thread, after the producer has given its registers away; a kernel starts with kRegisters
// each.
constexpr int kProducerRegisters = 24, kConsumerRegisters = 240;
constexpr int kRegisters = 168;
static_assert(kProducerRegisters + kConsumers * kConsumerRegisters <= (1 + kConsumers) * kRegisters,
              "consumers would wait for registers forever");

// A tile in shared memory is a series of blocks of 64 columns, each of kTokens lines of 128 bytes,
// the size of one bulk copy. The 16-byte chunks of a line are permuted by its index modulo 8, which
// is the 128-byte swizzle of the copy engine and the tensor cores.
constexpr int kBlockColumns = 64;
constexpr int kLineBytes = 128;

template <int kTokens, int kColumns>
struct TileShape {
  static_assert(kColumns % kBlockColumns == 0 && kTokens % 8 == 0);
  static constexpr int kBlocks = kColumns / kBlockColumns;
  static constexpr int kBlockBytes = kTokens * kLineBytes;
  static constexpr int kBytes = kBlocks * kBlockBytes;
};

constexpr int kBarrierBytes = 8;

constexpr int kMaxSharedBytes = 227 * 1024;

template <int kHeadQk, int kHeadV>
struct ForwardConfig {
  static constexpr int kQueries = 128;  // queries of a block
  // Of a streamed tile: its scores must fit into the registers together with the output.
  static constexpr int kKeys = kHeadV <= 128 ? 128 : 64;
  static constexpr int kStages = 2;
  using TileQ = TileShape<kQueries, kHeadQk>;
  using TileK = TileShape<kKeys, kHeadQk>;
  using TileV = TileShape<kKeys, kHeadV>;
  using TileOut = TileShape<kQueries, kHeadV>;
  // The output goes through the memory of the queries if there is no other.
  static constexpr bool kOutApart = kHeadQk <= 128;
  static constexpr int kOutBytes = kOutApart ? TileOut::kBytes : 0;
  static constexpr int kSharedBytes =
      TileQ::kBytes + kStages * (TileK::kBytes + TileV::kBytes + static_cast<int>(sizeof(Visit))) +
      kOutBytes + kConsumerThreads * static_cast<int>(sizeof(float)) +
      (2 + 4 * kStages) * kBarrierBytes;
  static_assert(kSharedBytes <= kMaxSharedBytes);
};

// Heads per block, one after the other, so that start-up is paid once: up to four, while enough
// blocks remain to balance the multiprocessors.
#if defined(ONEPASS_EMULATE)
constexpr int64_t kEnoughBlocks = 1;
#else
constexpr int64_t kEnoughBlocks = 1024;
#endif
inline int32_t heads_of_block(int32_t heads, int64_t tiles) {
  for (const int32_t together : {4, 2}) {
    if (heads % together == 0 && tiles * heads / together >= kEnoughBlocks) return together;
  }
  return 1;
}

// A backward kernel keeps tiles of 64 tokens for each consumer (Q and dO, or K and V) and streams
// tiles of kStreamed others (K and V, or Q and dO).
template <int kHeadQk, int kHeadV, int kStreamedTokens, int kScratch>
struct BackwardShape {
  static constexpr int kStreamed = kStreamedTokens;
  using KeptQk = TileShape<kTile, kHeadQk>;
  using KeptV = TileShape<kTile, kHeadV>;
  using TileQk = TileShape<kStreamed, kHeadQk>;
  using TileV = TileShape<kStreamed, kHeadV>;
  static constexpr int kPairBytes = KeptQk::kBytes + KeptV::kBytes;
  static constexpr int kStagesQk = 2;
  static constexpr int kStagesV = kHeadV <= 128 ? 2 : 1;
  static constexpr int kScratchBytes = kScratch;
  // Every streamed tile of Q comes with statistics and a step.
  static constexpr int kStatisticsBytes = kStreamed * static_cast<int>(sizeof(Statistics));
  static constexpr int kStepBytes = 16;
  static_assert(sizeof(QueryStep) <= kStepBytes && sizeof(Visit) <= kStepBytes);
  static constexpr int kSharedBytes =
      kConsumers * kPairBytes + kStagesQk * (TileQk::kBytes + kStatisticsBytes + kStepBytes) +
      kStagesV * TileV::kBytes + kScratchBytes +
      (3 + 2 * kStagesQk + 2 * kStagesV) * kBarrierBytes + static_cast<int>(sizeof(KeyBlock));
  static_assert(kSharedBytes <= kMaxSharedBytes);
};

// dq, dk and dv at once: a tile with the number of queries that makes dq 64 x 64 for each consumer,
// and scratch for two tiles of dS^T and one of dq in float32.
constexpr int kFusedDq = kConsumers * kTile * kTile;  // elements
constexpr int kFusedDqBytes = kFusedDq * static_cast<int>(sizeof(float));
template <int kHead>
struct FusedBackwardConfig
    : BackwardShape<kHead, kHead, kFusedDq / kHead,
                    2 * kConsumers * TileShape<kTile, kFusedDq / kHead>::kBytes + kFusedDqBytes> {
  using TileDs = TileShape<kTile, kFusedDq / kHead>;  // of one consumer's keys
  static constexpr int kDsBytes = kConsumers * TileDs::kBytes;
};

template <int kHeadQk, int kHeadV>
struct BackwardConfig : BackwardShape<kHeadQk, kHeadV, kTile, 0> {
  // Whether dq, dk and dv are computed at once: the registers hold dk, dv and half a tile of dq.
  static constexpr bool kFused = kHeadQk == kHeadV && kHeadQk <= 128;
  // Of the kernel that needs the most.
  static constexpr int kMostSharedBytes = [] {
    if constexpr (kFused) return FusedBackwardConfig<kHeadQk>::kSharedBytes;
    return BackwardConfig::kSharedBytes;
  }();
};

}  // namespace onepass::cuda::sm90
