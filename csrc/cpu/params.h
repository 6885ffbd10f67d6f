// The arguments of the CPU kernels: raw pointers and shapes, no torch type.
#pragma once

#include <cstdint>

#include "../scoring.h"
#include "../visibility.h"

namespace onepass::cpu {

constexpr int kTile = 64;  // queries of a forward task, keys of a backward task: the vector lanes
constexpr int kKeyBlock = 16;    // forward: keys are skipped in blocks of this size
constexpr int kChunkBlocks = 8;  // forward: visible blocks that share one softmax step

// A (batch, heads, seq, head_dim) tensor whose head_dim is contiguous; strides in elements.
struct Tensor {
  void* data;
  int64_t batch_stride, head_stride, seq_stride;
};

struct Params {
  int64_t batch, heads, kv_heads, seq, d_qk, d_v;
  Scoring<double> scoring;

  const int32_t* visible_begin;  // (batch, seq), null if each token's is its own index
  const int32_t* visible_end;    // (batch, seq)
  const int32_t* positions;      // (batch, seq), null without a window
  const KeyTile* key_blocks;     // (batch, num_blocks), kKeyBlock keys each
  const KeyTile* tiles;          // (batch, num_tiles), kTile tokens each
  int64_t num_blocks, num_tiles;

  Tensor q, k, v, out;
  void* lse;          // (batch, heads, seq), accumulation type, natural logarithm
  const void* sinks;  // (heads,), accumulation type, null without sinks
};

struct BackwardParams : Params {
  Tensor dout, dq, dk, dv;  // dq in the accumulation type, zero at the start
  const void* dlse;         // (batch, heads, seq), or null
  void* delta;              // (batch, heads, seq): sum_d dout * out - dlse
  int32_t* progress;        // (batch, kv_heads, num_tiles), zero at the start: see backward.h
};

ONEPASS_INLINE QueryTile query_tile(const KeyTile& tile) {
  return {tile.first, tile.last, tile.min_position, tile.max_position};
}

// The kernels of one instruction set for one pair of storage and accumulation types. A task is one
// tile of one head.
struct Kernels {
  void (*forward)(const Params&, int64_t task, void* scratch);
  void (*delta)(const BackwardParams&, int64_t task);
  void (*backward)(const BackwardParams&, int64_t task, void* scratch);
  int64_t (*forward_scratch_bytes)(const Params&);
  int64_t (*backward_scratch_bytes)(const Params&);
};

struct Variant {
  const char* name;
  Kernels float32, float64, bfloat16;
};

Variant variant_portable();
#if defined(__x86_64__)
Variant variant_avx2();
Variant variant_avx512();
#endif

}  // namespace onepass::cpu
