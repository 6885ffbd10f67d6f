// Binds the CUDA kernels to the ops of onepass_trl/attention/ops.py.
#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/macros.h>

#include <tuple>

#include "../tensors.h"
#include "kernels.h"

namespace onepass::cuda {
namespace {

const StableTensor& checked(const char* name, const StableTensor& x,
                            std::initializer_list<int64_t> shape, ScalarType type, int32_t device) {
  return onepass::checked(name, x, shape, type, x.is_cuda() && x.get_device_index() == device);
}

// The kernels read a token in 16-byte chunks; tensors with another layout are copied.
StableTensor aligned(const StableTensor& x) {
  bool fits = x.stride(3) == 1 && reinterpret_cast<uintptr_t>(x.const_data_ptr()) % 16 == 0;
  for (int64_t dim = 0; dim < 3; ++dim) {
    fits = fits && (x.size(dim) == 1 || (x.stride(dim) % 8 == 0 && x.stride(dim) > 0));
  }
  if (fits) return x;
  StableTensor copy = torch::stable::new_empty(x, x.sizes());
  torch::stable::copy_(copy, x);
  return copy;
}

Tensor raw(const StableTensor& x) {
  return {const_cast<void*>(x.const_data_ptr()), x.stride(0), x.stride(1), x.stride(2)};
}

cudaStream_t current_stream(int32_t device) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  return static_cast<cudaStream_t>(stream);
}

int attribute(cudaDeviceAttr name, int32_t device) {
  int value = 0;
  STD_CUDA_CHECK(cudaDeviceGetAttribute(&value, name, device));
  return value;
}

// Starts a kernel on the current stream, or raises an error that says why it cannot run.
template <typename ParamsType>
void launch(const Kernel<ParamsType>* kernel, const ParamsType& params, int32_t device) {
  STD_TORCH_CHECK(kernel != nullptr, "no kernel for these head sizes");
  const torch::stable::accelerator::DeviceGuard guard(device);
  const int available = attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  const int needed = kernel->shared_bytes;
  STD_TORCH_CHECK(needed <= available, "this head size needs ", needed,
                  " bytes of shared memory per block and the device has ", available,
                  ": use impl='flex'");
  kernel->launch(params, current_stream(device));
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

// What says which keys the queries of a batch of rows see.
struct Rows {
  StableTensor visible_end;
  OptionalTensor positions;  // none without a window
};

Rows checked_rows(const StableTensor& visible_end, const OptionalTensor& positions, int64_t window,
                  int64_t batch, int64_t seq, int32_t device) {
  STD_TORCH_CHECK(batch < (1 << 16), "batch is ", batch, ", expected less than 65,536");
  STD_TORCH_CHECK(seq < (int64_t{1} << 30), "seq is ", seq, ", expected less than 2^30");
  STD_TORCH_CHECK(0 <= window && window <= INT32_MAX, "window is ", window);
  Rows rows;
  rows.visible_end = torch::stable::contiguous(
      checked("visible_end", visible_end, {batch, seq}, ScalarType::Int, device));
  if (window > 0) {
    STD_TORCH_CHECK(positions.has_value(), "window is ", window, ", without positions");
    rows.positions = torch::stable::contiguous(
        checked("positions", *positions, {batch, seq}, ScalarType::Int, device));
  }
  return rows;
}

StableTensor tree_plan(const StableTensor& visible_end, const OptionalTensor& positions,
                       int64_t window) {
  STD_TORCH_CHECK(visible_end.dim() == 2, "visible_end has ", visible_end.dim(), " dimensions");
  const int32_t device = visible_end.get_device_index();
  const int64_t batch = visible_end.size(0), seq = visible_end.size(1);
  const Rows rows = checked_rows(visible_end, positions, window, batch, seq, device);
  StableTensor plan =
      new_empty(visible_end, {batch, plan_size(static_cast<int32_t>(seq))}, ScalarType::Int);
  if (batch == 0 || seq == 0) return plan;

  StableTensor counts = torch::stable::new_empty(plan, plan.sizes());
  const torch::stable::accelerator::DeviceGuard guard(device);
  const PlanParams params{
      static_cast<int32_t>(batch),      static_cast<int32_t>(seq),
      static_cast<int32_t>(window),     pointer<int32_t>(rows.visible_end),
      pointer<int32_t>(rows.positions), static_cast<int32_t*>(plan.mutable_data_ptr())};
  launch_plan(params, static_cast<int32_t*>(counts.mutable_data_ptr()), current_stream(device));
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return plan;
}

// What forward and backward share: checked inputs. It owns what `params` points to.
template <typename ParamsType>
struct Call {
  ParamsType params{};
  ElementType element;
  int32_t device;
  StableTensor q, k, v, plan;
  OptionalTensor sinks;
  Rows rows;

  Call(const StableTensor& q_, const StableTensor& k_, const StableTensor& v_,
       const StableTensor& visible_end, const OptionalTensor& positions,
       const OptionalTensor& sinks_, double scale, int64_t window, double softcap,
       const OptionalTensor& plan_)
      : device(q_.get_device_index()) {
    STD_TORCH_CHECK(q_.dim() == 4 && k_.dim() == 4 && v_.dim() == 4, "q, k and v have ", q_.dim(),
                    ", ", k_.dim(), " and ", v_.dim(), " dimensions");
    const ScalarType type = q_.scalar_type();
    STD_TORCH_CHECK(type == ScalarType::BFloat16 || type == ScalarType::Half, "q is ",
                    toString(type));
    element = type == ScalarType::BFloat16 ? ElementType::bf16 : ElementType::fp16;
    const int64_t batch = q_.size(0), heads = q_.size(1), seq = q_.size(2), kv_heads = k_.size(1);
    STD_TORCH_CHECK(kv_heads > 0 && heads % kv_heads == 0, "heads is ", heads, ", kv_heads ",
                    kv_heads);
    STD_TORCH_CHECK(heads < (1 << 16), "q has ", heads, " heads, expected less than 65,536");
    STD_TORCH_CHECK(scale > 0, "scale is ", scale);
    q = aligned(q_);
    k = aligned(checked("k", k_, {batch, kv_heads, seq, q_.size(3)}, type, device));
    v = aligned(checked("v", v_, {batch, kv_heads, seq, v_.size(3)}, type, device));
    rows = checked_rows(visible_end, positions, window, batch, seq, device);
    // Only the size of a plan is checked: the caller must pass the plan of this batch.
    plan = plan_.has_value() ? *plan_ : tree_plan(rows.visible_end, rows.positions, window);
    plan = torch::stable::contiguous(checked(
        "plan", plan, {batch, plan_size(static_cast<int32_t>(seq))}, ScalarType::Int, device));
    if (sinks_.has_value()) {
      sinks =
          torch::stable::contiguous(checked("sinks", *sinks_, {heads}, ScalarType::Float, device));
    }
    Params& p = params;
    p.batch = static_cast<int32_t>(batch), p.heads = static_cast<int32_t>(heads);
    p.kv_heads = static_cast<int32_t>(kv_heads), p.seq = static_cast<int32_t>(seq);
    p.scoring = {static_cast<float>(scale), static_cast<float>(softcap),
                 static_cast<int32_t>(window)};
    p.visible_end = pointer<int32_t>(rows.visible_end);
    p.positions = pointer<int32_t>(rows.positions);
    p.plan = static_cast<const int32_t*>(plan.const_data_ptr());
    p.sinks = pointer<float>(sinks);
    p.q = raw(q), p.k = raw(k), p.v = raw(v);
  }

  bool empty() const { return params.batch == 0 || params.seq == 0 || params.heads == 0; }
};

void check_no_blocks(const OptionalTensor& visible_begin) {
  STD_TORCH_CHECK(!visible_begin.has_value(), "these kernels don't take visible_begin");
}

std::tuple<StableTensor, StableTensor> tree_attention(
    const StableTensor& q, const StableTensor& k, const StableTensor& v,
    const StableTensor& visible_end, const OptionalTensor& positions, const OptionalTensor& sinks,
    double scale, int64_t window, double softcap, const OptionalTensor& plan,
    const OptionalTensor& visible_begin) {
  check_no_blocks(visible_begin);
  Call<Params> call(q, k, v, visible_end, positions, sinks, scale, window, softcap, plan);
  Params& p = call.params;
  StableTensor out = empty_heads_last(q, v.size(3), q.scalar_type());
  StableTensor lse = new_empty(q, {q.size(0), q.size(1), q.size(2)}, ScalarType::Float);
  if (call.empty()) return {out, lse};
  p.out = raw(out);
  p.lse = static_cast<float*>(lse.mutable_data_ptr());
  const int major = attribute(cudaDevAttrComputeCapabilityMajor, call.device);
  launch(find_forward(major, call.element, q.size(3), v.size(3)), p, call.device);
  return {out, lse};
}

std::tuple<StableTensor, StableTensor, StableTensor, StableTensor> tree_attention_backward(
    const StableTensor& dout, const OptionalTensor& dlse, const StableTensor& q,
    const StableTensor& k, const StableTensor& v, const StableTensor& out, const StableTensor& lse,
    const StableTensor& visible_end, const OptionalTensor& positions, const OptionalTensor& sinks,
    double scale, int64_t window, double softcap, const OptionalTensor& plan, bool deterministic,
    const OptionalTensor& visible_begin) {
  check_no_blocks(visible_begin);
  Call<BackwardParams> call(q, k, v, visible_end, positions, sinks, scale, window, softcap, plan);
  BackwardParams& p = call.params;
  const ScalarType type = q.scalar_type();
  const int64_t batch = q.size(0), heads = q.size(1), seq = q.size(2);
  const int64_t d_qk = q.size(3), d_v = v.size(3);
  const auto shaped_as_out = [&](const char* name, const StableTensor& x) {
    return aligned(checked(name, x, {batch, heads, seq, d_v}, type, call.device));
  };
  const auto shaped_as_lse = [&](const char* name, const StableTensor& x) {
    return torch::stable::contiguous(
        checked(name, x, {batch, heads, seq}, ScalarType::Float, call.device));
  };
  const StableTensor own_dout = shaped_as_out("dout", dout), own_out = shaped_as_out("out", out);
  const StableTensor own_lse = shaped_as_lse("lse", lse);
  OptionalTensor own_dlse;
  if (dlse.has_value()) own_dlse = shaped_as_lse("dlse", *dlse);
  StableTensor dq = empty_heads_last(q, d_qk, type), dk = empty_heads_last(k, d_qk, type),
               dv = empty_heads_last(v, d_v, type);
  const int64_t padded = padded_seq(static_cast<int32_t>(seq));
  StableTensor statistics = new_empty(own_lse, {batch, heads, padded, 2}, ScalarType::Float);
  // Zeros, which remain where there is no query.
  StableTensor dsinks = call.sinks.has_value()
                            ? torch::stable::new_zeros(*call.sinks, call.sinks->sizes())
                            : new_empty(own_lse, {0}, ScalarType::Float);
  if (call.empty()) {
    torch::stable::zero_(dk), torch::stable::zero_(dv);  // there may be keys without a query head
    return {dq, dk, dv, dsinks};
  }
  p.out = raw(own_out), p.dout = raw(own_dout);
  p.dq = raw(dq), p.dk = raw(dk), p.dv = raw(dv);
  p.lse = const_cast<float*>(pointer<float>(own_lse));
  p.dlse = pointer<float>(own_dlse);
  p.statistics = static_cast<Statistics*>(statistics.mutable_data_ptr());
  p.dsinks = static_cast<float*>(dsinks.mutable_data_ptr());
  const int major = attribute(cudaDevAttrComputeCapabilityMajor, call.device);
  const auto* kernel = find_backward(major, call.element, d_qk, d_v);
  OptionalTensor dq_sums, dq_order;
  if (kernel != nullptr && kernel->adds_dq) {
    dq_sums = new_empty(own_lse, {batch, heads, padded, d_qk}, ScalarType::Float);
    p.dq_sums = static_cast<float*>(dq_sums->mutable_data_ptr());
    if (deterministic) {
      dq_order = new_empty(own_lse, {dq_order_size(p.batch, p.heads, p.seq)}, ScalarType::Int);
      p.dq_order = static_cast<int32_t*>(dq_order->mutable_data_ptr());
    }
  }
  p.group_parts = parts_of_group(p.batch, p.heads, p.kv_heads, p.seq, p.dq_order != nullptr);
  OptionalTensor dk_parts, dv_parts;
  if (p.group_parts > 1) {
    const auto parts = [&](int64_t d) {
      return new_empty(own_lse, {p.group_parts, batch, p.kv_heads, padded, d}, ScalarType::Float);
    };
    dk_parts = parts(d_qk), dv_parts = parts(d_v);
    p.dk_parts = static_cast<float*>(dk_parts->mutable_data_ptr());
    p.dv_parts = static_cast<float*>(dv_parts->mutable_data_ptr());
  }
  launch(kernel, p, call.device);
  return {dq, dk, dv, dsinks};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(onepass, CUDA, m) {
  m.impl("tree_plan", TORCH_BOX(&tree_plan));
  m.impl("tree_attention", TORCH_BOX(&tree_attention));
  m.impl("tree_attention_backward", TORCH_BOX(&tree_attention_backward));
}

}  // namespace onepass::cuda
