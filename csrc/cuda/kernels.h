// What the kernels offer to the host: no torch type, no device code.
#pragma once

#include "params.h"

struct CUstream_st;

namespace onepass::cuda {

using Stream = CUstream_st*;

enum class ElementType { bf16, fp16 };
enum class Family { sm80, sm90 };  // portable; Hopper

// A forward or backward pass for one element type and head size.
template <typename ParamsType>
struct Kernel {
  Family family;
  ElementType type;
  int32_t d_qk, d_v;
  void (*launch)(const ParamsType&, Stream);
  int shared_bytes;  // of a block
  bool adds_dq;      // takes dq_sums: a backward pass that computes all gradients at once
};

// The best kernel of this build for a device of compute capability `major`.x, or null.
const Kernel<Params>* find_forward(int major, ElementType type, int64_t d_qk, int64_t d_v);
const Kernel<BackwardParams>* find_backward(int major, ElementType type, int64_t d_qk, int64_t d_v);

// int32 of the plan of one row.
int64_t plan_size(int32_t seq);

// Queries per head of the backward pass's scratch: whole pairs of tiles.
int32_t padded_seq(int32_t seq);

// int32 of BackwardParams::dq_order.
int64_t dq_order_size(int32_t batch, int32_t heads, int32_t seq);

// Into how many parts a backward pass cuts the query heads of a group: several where there are few
// tiles of keys and values, or few heads of them and dq is added in order.
int32_t parts_of_group(int32_t batch, int32_t heads, int32_t kv_heads, int32_t seq, bool in_order);

// `counts`: scratch of the size of the plan.
void launch_plan(const PlanParams& params, int32_t* counts, Stream stream);

}  // namespace onepass::cuda
