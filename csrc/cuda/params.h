// The arguments of the CUDA kernels: raw pointers and shapes, no torch type.
#pragma once

#include <cstdint>

#include "../scoring.h"

namespace onepass::cuda {

// A (batch, heads, seq, head_dim) tensor of bf16 or fp16 whose head_dim is contiguous, every token
// aligned to 16 bytes; strides in elements.
struct Tensor {
  void* data;
  int64_t batch_stride, head_stride, seq_stride;
};

// The keys of one tile of kTile tokens, and their positions (0 without positions).
struct TileRange {
  int32_t min_end, max_end;
  int32_t min_position, max_position;
};

struct Params {
  int32_t batch, heads, kv_heads, seq;
  Scoring<float> scoring;  // its scale is positive

  const int32_t* visible_end;  // (batch, seq)
  const int32_t* positions;    // (batch, seq), null without a window
  const int32_t* plan;         // (batch, plan_size(seq)), see plan.h
  const float* sinks;          // (heads,), or null

  Tensor q, k, v, out;
  float* lse;  // (batch, heads, seq), natural logarithm
};

// What the backward pass needs for a query in addition to its tensors.
struct Statistics {
  float lse;    // in units of log2; infinite beyond the row, so that probabilities are 0
  float delta;  // sum_d dout * out - dlse
};

struct BackwardParams : Params {
  Tensor dout, dq, dk, dv;
  const float* dlse;       // (batch, heads, seq), or null
  Statistics* statistics;  // (batch, heads, padded_seq): scratch
  float* dsinks;           // (heads,), or null
  // (batch, heads, padded_seq, d_qk): scratch to which blocks add dq; null where a launch of its
  // own computes it.
  float* dq_sums;
  // Scratch by which they add in the same order every time, null to add in any: how many blocks of
  // each row have started, (batch,), and for each tile of queries which block was last, (batch,
  // heads, padded_seq / kTile).
  int32_t* dq_order;
  // Into how many parts the query heads of a group are cut, each with blocks of its own. Of
  // several, each has its part of the gradients of the keys and values in scratch, (group_parts,
  // batch, kv_heads, padded_seq, d_qk or d_v), null for one.
  int32_t group_parts;
  float *dk_parts, *dv_parts;
};

struct PlanParams {
  int32_t batch, seq, window;
  const int32_t* visible_end;  // (batch, seq)
  const int32_t* positions;    // (batch, seq), null without a window
  int32_t* plan;               // (batch, plan_size(seq))
};

}  // namespace onepass::cuda
