// The table of the kernels that the build instantiates.
#include "kernels.h"

// Written by the build: ONEPASS_HEAD_DIMS is HEAD_DIMS(d_qk, d_v) for every head size.
#include "head_dims.h"
#include "sm80/config.h"

namespace onepass::cuda {

namespace sm80 {
template <typename Element, int kHeadQk, int kHeadV>
void launch_forward(const Params& params, Stream stream);
template <typename Element, int kHeadQk, int kHeadV>
void launch_backward(const BackwardParams& params, Stream stream);
}  // namespace sm80

namespace {

template <typename Element, int kHeadQk, int kHeadV>
Kernels kernels_of(ElementType type) {
  return {type,
          kHeadQk,
          kHeadV,
          &sm80::launch_forward<Element, kHeadQk, kHeadV>,
          sm80::ForwardConfig<kHeadQk, kHeadV>::kSharedBytes,
          &sm80::launch_backward<Element, kHeadQk, kHeadV>,
          sm80::BackwardConfig<kHeadQk, kHeadV>::kSharedBytes};
}

}  // namespace

const Kernels* find_kernels(ElementType type, int64_t d_qk, int64_t d_v) {
#define HEAD_DIMS(d_qk, d_v) \
  kernels_of<Bf16, d_qk, d_v>(ElementType::bf16), kernels_of<Fp16, d_qk, d_v>(ElementType::fp16),
  static const Kernels built[] = {ONEPASS_HEAD_DIMS};
#undef HEAD_DIMS
  for (const Kernels& kernels : built) {
    if (kernels.type == type && kernels.d_qk == d_qk && kernels.d_v == d_v) return &kernels;
  }
  return nullptr;
}

}  // namespace onepass::cuda
