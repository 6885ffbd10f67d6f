// The CUDA kernels on the emulator, for ctypes: see emulation.py, which builds this file.
#include "kernels.cu"
#include "plan.cu"
#include "sm80/backward.cuh"
#include "sm80/forward.cuh"
#include "sm90/backward.cuh"
#include "sm90/forward.cuh"

using namespace onepass::cuda;

namespace {

const Kernels* find(bool is_bf16, int d_qk, int d_v) {
  return find_kernels(is_bf16 ? ElementType::bf16 : ElementType::fp16, d_qk, d_v);
}

}  // namespace

extern "C" {

int64_t onepass_size_of_params() { return sizeof(Params); }
int64_t onepass_size_of_backward_params() { return sizeof(BackwardParams); }
int64_t onepass_plan_size(int32_t seq) { return plan_size(seq); }

void onepass_seed(uint64_t seed) { emulator::seed = seed; }

// Matrix loads, those with a bank conflict, and products, since the last call.
void onepass_counters(int64_t* values) {
  values[0] = emulator::counters.matrix_loads;
  values[1] = emulator::counters.bank_conflicts;
  values[2] = emulator::counters.products;
  emulator::counters = {};
}

void onepass_plan(const PlanParams* params, int32_t* counts) {
  launch_plan(*params, counts, nullptr);
}

int onepass_forward(bool is_bf16, int d_qk, int d_v, const Params* params) {
  const Kernels* kernels = find(is_bf16, d_qk, d_v);
  if (kernels != nullptr) kernels->forward(*params, nullptr);
  return kernels != nullptr;
}

int onepass_forward_sm90(bool is_bf16, int d_qk, int d_v, const Params* params) {
  if (d_qk == 64 && d_v == 64) {
    is_bf16 ? sm90::launch_forward<Bf16, 64, 64>(*params, nullptr)
            : sm90::launch_forward<Fp16, 64, 64>(*params, nullptr);
  } else if (d_qk == 128 && d_v == 128) {
    is_bf16 ? sm90::launch_forward<Bf16, 128, 128>(*params, nullptr)
            : sm90::launch_forward<Fp16, 128, 128>(*params, nullptr);
  } else if (d_qk == 192 && d_v == 128) {
    is_bf16 ? sm90::launch_forward<Bf16, 192, 128>(*params, nullptr)
            : sm90::launch_forward<Fp16, 192, 128>(*params, nullptr);
  } else {
    return 0;
  }
  return 1;
}

int onepass_backward_sm90(bool is_bf16, int d_qk, int d_v, const BackwardParams* params) {
  if (d_qk == 64 && d_v == 64) {
    is_bf16 ? sm90::launch_backward<Bf16, 64, 64>(*params, nullptr)
            : sm90::launch_backward<Fp16, 64, 64>(*params, nullptr);
  } else if (d_qk == 128 && d_v == 128) {
    is_bf16 ? sm90::launch_backward<Bf16, 128, 128>(*params, nullptr)
            : sm90::launch_backward<Fp16, 128, 128>(*params, nullptr);
  } else {
    return 0;
  }
  return 1;
}

int onepass_backward(bool is_bf16, int d_qk, int d_v, const BackwardParams* params) {
  const Kernels* kernels = find(is_bf16, d_qk, d_v);
  if (kernels != nullptr) kernels->backward(*params, nullptr);
  return kernels != nullptr;
}
}
