// The table of the kernels that the build instantiates.
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

#include "kernels.h"

// Written by the build: ONEPASS_SM80_FORWARD and so on are lists of HEAD_DIMS(d_qk, d_v); those of
// the Hopper family are empty without sm_90a.
#include "head_dims.h"
#include "sm80/config.h"
#include "sm90/config.h"

namespace onepass::cuda {

namespace sm80 {
template <typename Element, int kHeadQk, int kHeadV>
void launch_forward(const Params& params, Stream stream);
template <typename Element, int kHeadQk, int kHeadV>
void launch_backward(const BackwardParams& params, Stream stream);
}  // namespace sm80

namespace sm90 {
template <typename Element, int kHeadQk, int kHeadV>
void launch_forward(const Params& params, Stream stream);
template <typename Element, int kHeadQk, int kHeadV>
void launch_backward(const BackwardParams& params, Stream stream);
}  // namespace sm90

namespace {

// Both element types of one pass of one family.
#define KERNELS(family, launch, d_qk, d_v, shared_bytes, adds_dq)                                    \
  {Family::family, ElementType::bf16, d_qk, d_v, &family::launch<Bf16, d_qk, d_v>, shared_bytes,     \
   adds_dq},                                                                                         \
      {Family::family, ElementType::fp16, d_qk, d_v, &family::launch<Fp16, d_qk, d_v>, shared_bytes, \
       adds_dq},

// The better family first.
const Kernel<Params> kForward[] = {
#define HEAD_DIMS(d_qk, d_v) \
  KERNELS(sm90, launch_forward, d_qk, d_v, (sm90::ForwardConfig<d_qk, d_v>::kSharedBytes), false)
    ONEPASS_SM90_FORWARD
#undef HEAD_DIMS
#define HEAD_DIMS(d_qk, d_v) \
  KERNELS(sm80, launch_forward, d_qk, d_v, (sm80::ForwardConfig<d_qk, d_v>::kSharedBytes), false)
        ONEPASS_SM80_FORWARD
#undef HEAD_DIMS
};

const Kernel<BackwardParams> kBackward[] = {
#define HEAD_DIMS(d_qk, d_v)                                                                     \
  KERNELS(sm90, launch_backward, d_qk, d_v, (sm90::BackwardConfig<d_qk, d_v>::kMostSharedBytes), \
          (sm90::BackwardConfig<d_qk, d_v>::kFused))
    ONEPASS_SM90_BACKWARD
#undef HEAD_DIMS
#define HEAD_DIMS(d_qk, d_v)                                                                     \
  KERNELS(sm80, launch_backward, d_qk, d_v, (sm80::BackwardConfig<d_qk, d_v>::kMostSharedBytes), \
          (sm80::BackwardConfig<d_qk, d_v>::kFused))
        ONEPASS_SM80_BACKWARD
#undef HEAD_DIMS
};

// ONEPASS_CUDA_FAMILY=sm80 selects the portable kernels on Hopper too, for comparison.
bool only_portable() {
  const char* family = std::getenv("ONEPASS_CUDA_FAMILY");
  if (family == nullptr || std::strcmp(family, "sm90") == 0) return false;
  if (std::strcmp(family, "sm80") == 0) return true;
  throw std::runtime_error(std::string("ONEPASS_CUDA_FAMILY is '") + family +
                           "', expected sm80, sm90, or nothing for the best");
}

template <typename ParamsType, size_t kCount>
const Kernel<ParamsType>* find(const Kernel<ParamsType> (&kernels)[kCount], int major,
                               ElementType type, int64_t d_qk, int64_t d_v) {
  static const bool portable = only_portable();
  for (const Kernel<ParamsType>& kernel : kernels) {
    const bool runs = kernel.family == Family::sm80 || (major == 9 && !portable);
    if (runs && kernel.type == type && kernel.d_qk == d_qk && kernel.d_v == d_v) return &kernel;
  }
  return nullptr;
}

}  // namespace

const Kernel<Params>* find_forward(int major, ElementType type, int64_t d_qk, int64_t d_v) {
  return find(kForward, major, type, d_qk, d_v);
}

const Kernel<BackwardParams>* find_backward(int major, ElementType type, int64_t d_qk,
                                            int64_t d_v) {
  return find(kBackward, major, type, d_qk, d_v);
}

}  // namespace onepass::cuda
