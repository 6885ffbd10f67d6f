// What the kernels offer to the host: no torch type, no device code.
#pragma once

#include "params.h"

struct CUstream_st;

namespace onepass::cuda {

using Stream = CUstream_st*;

enum class ElementType { bf16, fp16 };

// The portable kernels of one element type and head size.
struct Kernels {
  ElementType type;
  int32_t d_qk, d_v;
  void (*forward)(const Params&, Stream);
  int forward_shared_bytes;  // that a block needs
  void (*backward)(const BackwardParams&, Stream);
  int backward_shared_bytes;
};

// Null if this build does not hold them.
const Kernels* find_kernels(ElementType type, int64_t d_qk, int64_t d_v);

// int32 of the plan of one row.
int64_t plan_size(int32_t seq);

// Queries per head of the statistics: whole tiles.
int32_t padded_seq(int32_t seq);

// `counts`: scratch of the size of the plan.
void launch_plan(const PlanParams& params, int32_t* counts, Stream stream);

}  // namespace onepass::cuda
