// Tiles that the copy engine writes and the tensor cores read: their maps and descriptors.
#pragma once

#include "config.h"
#include "instructions.h"

namespace onepass::cuda::sm90 {

// Where a warpgroup finds a factor of a product in shared memory. All offsets in units of 16 bytes;
// bit 62 says that rows of 128 bytes are swizzled, eight rows (1 KiB) at a time.
__device__ __forceinline__ uint64_t describe(const void* begin, int leading_bytes) {
  constexpr uint64_t kEightRows = 8 * kRowBytes / 16;
  return uint64_t{1} << 62 | kEightRows << 32 |
         static_cast<uint64_t>(leading_bytes / 16 & 0x3fff) << 16 |
         static_cast<uint64_t>(shared_address(begin) / 16 & 0x3fff);
}

// Columns [16 k, 16 k + 16) of the rows from `row` of a tile, summed over columns.
__device__ __forceinline__ uint64_t describe_rows(const uint8_t* tile, int row, int k) {
  constexpr int kStepsPerBlock = kBlockColumns / 16;
  const uint8_t* begin = tile + k / kStepsPerBlock * kBlockBytes + row * kRowBytes +
                         k % kStepsPerBlock * 16 * static_cast<int>(sizeof(uint16_t));
  return describe(begin, 16);  // the leading offset has no meaning here
}

// Rows [16 k, 16 k + 16) of a tile with all its columns, summed over rows.
__device__ __forceinline__ uint64_t describe_columns(const uint8_t* tile, int k) {
  return describe(tile + 16 * k * kRowBytes, kBlockBytes);
}

// Brings the tile of kTileRows tokens from `token`, in kBlocks blocks of columns.
template <int kBlocks>
__device__ __forceinline__ void copy_tile(uint8_t* to, const TensorMap& from, Barrier* barrier,
                                          int token, int head, int row) {
  arrive_and_expect(barrier, kBlocks * kBlockBytes);
#pragma unroll
  for (int block = 0; block < kBlocks; ++block) {
    copy_block(to + block * kBlockBytes, from, barrier, block * kBlockColumns, token, head, row);
  }
}

}  // namespace onepass::cuda::sm90
