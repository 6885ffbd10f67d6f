// The CUDA kernels on the emulator, for ctypes: see emulation.py, which builds this file.
#include "kernels.cu"
#include "plan.cu"
#include "sm80/backward.cuh"
#include "sm80/forward.cuh"
#include "sm90/backward.cuh"
#include "sm90/forward.cuh"

using namespace onepass::cuda;

namespace {

ElementType element(bool is_bf16) { return is_bf16 ? ElementType::bf16 : ElementType::fp16; }

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

int onepass_forward(int major, bool is_bf16, int d_qk, int d_v, const Params* params) {
  const auto* kernel = find_forward(major, element(is_bf16), d_qk, d_v);
  if (kernel != nullptr) kernel->launch(*params, nullptr);
  return kernel != nullptr;
}

int onepass_backward(int major, bool is_bf16, int d_qk, int d_v, const BackwardParams* params) {
  const auto* kernel = find_backward(major, element(is_bf16), d_qk, d_v);
  if (kernel != nullptr) kernel->launch(*params, nullptr);
  return kernel != nullptr;
}
}
