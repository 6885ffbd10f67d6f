// Tiles that the copy engine writes and the tensor cores read: their maps and descriptors.
#pragma once

#include "config.h"
#include "instructions.h"

namespace onepass::cuda::sm90 {

// The descriptor of a product's factor in shared memory, `offset` bytes into a tile. All offsets
// are in units of 16 bytes; bit 62 says that lines of 128 bytes are swizzled, eight lines (1 KiB)
// at a time. Addresses of a block that is not in a cluster are so small that no offset carries, so
// the descriptors of the steps over a tile are one addition apart.
__device__ __forceinline__ uint64_t describe(const void* tile, int leading_bytes, int offset) {
  constexpr uint32_t kEightLines = 8 * kLineBytes / 16;
  static_assert((kMaxSharedBytes + 1024) / 16 <= 0x3fff);  // dynamic memory begins at 1 KiB
  const uint32_t low =
      (static_cast<uint32_t>(leading_bytes / 16) << 16 | shared_address(tile) / 16) + offset / 16;
  return static_cast<uint64_t>(uint32_t{1} << 30 | kEightLines) << 32 | low;
}

// Columns [16 k, 16 k + 16) of the tokens from `first` of a tile, summed over columns.
template <typename Tile>
__device__ __forceinline__ uint64_t describe_tokens(const uint8_t* tile, int first, int k) {
  constexpr int kStepsPerBlock = kBlockColumns / 16;
  const int offset = k / kStepsPerBlock * Tile::kBlockBytes +
                     k % kStepsPerBlock * 16 * static_cast<int>(sizeof(uint16_t));
  return describe(tile + first * kLineBytes, 16, offset);  // the leading offset has no meaning here
}

// Tokens [16 k, 16 k + 16) of a tile with all its columns, summed over tokens.
template <typename Tile>
__device__ __forceinline__ uint64_t describe_columns(const uint8_t* tile, int k) {
  return describe(tile, Tile::kBlockBytes, 16 * k * kLineBytes);
}

// Starts to copy a tile of tokens that begins at `token`; the barrier must expect Tile::kBytes.
template <typename Tile>
__device__ __forceinline__ void copy_tile(uint8_t* to, const TensorMap& from, Barrier* barrier,
                                          int token, int head, int b) {
#pragma unroll
  for (int block = 0; block < Tile::kBlocks; ++block) {
    copy_block(to + block * Tile::kBlockBytes, from, barrier, block * kBlockColumns, token, head,
               b);
  }
}

// c = a b^T: 64 tokens from `first` of tile `a` with all tokens of tile `b`; the tiles may differ
// in their tokens only. Begins but does not commit.
template <typename Element, typename TileA, typename TileB, int kBlocks>
__device__ __forceinline__ void start_transposed(float (&c)[kBlocks][4], const uint8_t* a,
                                                 int first, const uint8_t* b) {
  static_assert(TileA::kBlocks == TileB::kBlocks);
  hold(c);
  begin_products();
#pragma unroll
  for (int k = 0; k < TileA::kBlocks * kBlockColumns / 16; ++k) {
    multiply_transposed<Element>(c, describe_tokens<TileA>(a, first, k),
                                 describe_tokens<TileB>(b, 0, k), k > 0);
  }
}

// c += a b: all tokens of tile `b`. Begins but does not commit.
template <typename Element, typename TileB, int kBlocks, int kSteps>
__device__ __forceinline__ void start_add(float (&c)[kBlocks][4], const uint32_t (&a)[kSteps][4],
                                          const uint8_t* b) {
  hold(c);
  begin_products();
#pragma unroll
  for (int k = 0; k < kSteps; ++k) {
    multiply_add<Element>(c, a[k], describe_columns<TileB>(b, k));
  }
}

// Which of one or two stages is next, and the parity of its phase.
template <int kStages>
struct Stage {
  static_assert(kStages == 1 || kStages == 2);
  int index = 0, parity = 0;
  __device__ __forceinline__ void advance() {
    parity ^= kStages == 1 ? 1 : index;
    index ^= kStages - 1;
  }
};

// The consumer that a thread belongs to. It is the same for a warp, which the shuffle tells the
// compiler.
__device__ __forceinline__ int consumer_of_warp() {
  return shuffle(static_cast<int>(threadIdx.x) / kWarpgroup - 1, 0);
}

// A warp is done with a stage.
__device__ __forceinline__ void release(Barrier* empty) {
  sync_warp();
  if (threadIdx.x % 32 == 0) arrive(empty);
}

}  // namespace onepass::cuda::sm90
