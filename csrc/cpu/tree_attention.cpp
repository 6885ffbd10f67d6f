// The CPU implementations of onepass::tree_attention and its backward: checks, outputs, and the
// loop over tasks.
#include <ATen/Parallel.h>
#include <torch/extension.h>

#include <atomic>
#include <memory>
#include <optional>
#include <tuple>
#include <vector>

#include "dispatch.h"
#include "plan.h"

namespace onepass::cpu {
namespace {

using OptionalTensor = std::optional<at::Tensor>;

at::ScalarType accumulation_type(at::ScalarType type) {
  return type == at::kDouble ? at::kDouble : at::kFloat;
}

const Kernels& kernels_for(at::ScalarType type) {
  switch (type) {
    case at::kFloat: return variant().float32;
    case at::kDouble: return variant().float64;
    case at::kBFloat16: return variant().bfloat16;
    default: TORCH_CHECK_VALUE(false, "q is ", type);
  }
}

// Returns `x` after checking what memory safety needs. onepass_trl/attention/validation.py and
// implementations/cpu.py have checked the same in more words, unless the ops are called directly.
const at::Tensor& checked(const char* name, const at::Tensor& x, at::IntArrayRef shape,
                          at::ScalarType type) {
  TORCH_CHECK_VALUE(x.sizes() == shape && x.scalar_type() == type, name, " is ", x.scalar_type(),
                    " ", x.sizes(), ", expected ", type, " ", shape);
  TORCH_CHECK_VALUE(x.device().is_cpu(), name, " is on ", x.device());
  return x;
}

// onepass_trl.visibility has the messages of the rule: let it name the key that breaks the tree.
void raise_not_a_tree(const at::Tensor& row) {
  pybind11::gil_scoped_acquire gil;
  pybind11::module_::import("onepass_trl.visibility")
      .attr("check_visible_end")(py::cast(row).attr("numpy")());
  TORCH_INTERNAL_ASSERT(false,
                        "visible_end: csrc/cpu/plan.cpp and onepass_trl/visibility.py disagree");
}

at::Tensor last_dim_contiguous(const at::Tensor& tensor) {
  return tensor.size(3) <= 1 || tensor.stride(3) == 1 ? tensor : tensor.contiguous();
}

Tensor raw(const at::Tensor& tensor) {
  return {tensor.data_ptr(), tensor.stride(0), tensor.stride(1), tensor.stride(2)};
}

// (batch, heads, seq, width) with heads next to width in memory, as models need it after
// transpose(1, 2).
at::Tensor empty_heads_last(const at::Tensor& like, int64_t width, at::ScalarType type) {
  return at::empty({like.size(0), like.size(2), like.size(1), width}, like.options().dtype(type))
      .transpose(1, 2);
}

// What forward and backward share: checked inputs and the plan. It owns what `params` points to.
template <typename ParamsType>
struct Call {
  ParamsType params{};
  at::Tensor q, k, v, visible_end, positions, sinks;
  std::vector<KeyTile> blocks, tiles;

  Call(const at::Tensor& q_, const at::Tensor& k_, const at::Tensor& v_,
       const at::Tensor& visible_end_, const OptionalTensor& positions_,
       const OptionalTensor& sinks_, double scale, int64_t window, double softcap) {
    TORCH_CHECK_VALUE(q_.dim() == 4 && k_.dim() == 4 && v_.dim() == 4, "q, k and v have ", q_.dim(),
                      ", ", k_.dim(), " and ", v_.dim(), " dimensions");
    const auto type = q_.scalar_type();
    const int64_t batch = q_.size(0), heads = q_.size(1), seq = q_.size(2), kv_heads = k_.size(1);
    TORCH_CHECK_VALUE(kv_heads > 0 && heads % kv_heads == 0, "heads is ", heads, ", kv_heads ",
                      kv_heads);
    TORCH_CHECK_VALUE(seq < (int64_t{1} << 30), "seq is ", seq, ", expected less than 2^30");
    TORCH_CHECK_VALUE(0 <= window && window <= INT32_MAX, "window is ", window);
    q = last_dim_contiguous(q_);
    k = last_dim_contiguous(checked("k", k_, {batch, kv_heads, seq, q_.size(3)}, type));
    v = last_dim_contiguous(checked("v", v_, {batch, kv_heads, seq, v_.size(3)}, type));
    visible_end = checked("visible_end", visible_end_, {batch, seq}, at::kInt).contiguous();
    if (window > 0) {
      TORCH_CHECK_VALUE(positions_.has_value(), "window is ", window, ", without positions");
      positions = checked("positions", *positions_, {batch, seq}, at::kInt).contiguous();
    }
    if (sinks_.has_value()) {
      sinks = checked("sinks", *sinks_, {heads}, accumulation_type(type)).contiguous();
    }
    Params& p = params;
    p.batch = batch, p.heads = heads, p.kv_heads = kv_heads, p.seq = seq;
    p.d_qk = q.size(3), p.d_v = v.size(3);
    p.scoring = {scale, softcap, static_cast<int32_t>(window)};
    p.q = raw(q), p.k = raw(k), p.v = raw(v);
    p.visible_end = visible_end.const_data_ptr<int32_t>();
    p.positions = positions.defined() ? positions.const_data_ptr<int32_t>() : nullptr;
    p.sinks = sinks.defined() ? sinks.const_data_ptr() : nullptr;
    plan();
  }

  void plan() {
    Params& p = params;
    for (int64_t b = 0; b < p.batch; ++b) {
      const int32_t* row = p.visible_end + b * p.seq;
      const int32_t* row_positions = p.positions == nullptr ? nullptr : p.positions + b * p.seq;
      if (!is_tree(row, p.seq)) raise_not_a_tree(visible_end[b]);
      const auto row_blocks = make_tiles(row, row_positions, p.seq, kKeyBlock);
      const auto row_tiles = make_tiles(row, row_positions, p.seq, kTile);
      blocks.insert(blocks.end(), row_blocks.begin(), row_blocks.end());
      tiles.insert(tiles.end(), row_tiles.begin(), row_tiles.end());
    }
    p.key_blocks = blocks.data();
    p.tiles = tiles.data();
    p.num_blocks = (p.seq + kKeyBlock - 1) / kKeyBlock;
    p.num_tiles = (p.seq + kTile - 1) / kTile;
  }
};

struct FreeDeleter {
  void operator()(void* memory) const { std::free(memory); }
};

// Every thread claims the next task in ascending order until none is left.
template <typename Run>
void run_tasks(int64_t num_tasks, int64_t scratch_bytes, const Run& run) {
  std::atomic<int64_t> next{0};
  const int64_t num_workers = std::min<int64_t>(at::get_num_threads(), num_tasks);
  at::parallel_for(0, num_workers, 1, [&](int64_t, int64_t) {
    const std::unique_ptr<void, FreeDeleter> scratch(
        std::aligned_alloc(64, std::max<int64_t>(scratch_bytes, 64)));
    TORCH_CHECK(scratch != nullptr, "out of memory: ", scratch_bytes, " bytes of scratch");
    for (int64_t task = next++; task < num_tasks; task = next++) run(task, scratch.get());
  });
}

std::tuple<at::Tensor, at::Tensor> tree_attention(
    const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const at::Tensor& visible_end,
    const OptionalTensor& positions, const OptionalTensor& sinks, double scale, int64_t window,
    double softcap, const OptionalTensor& /*plan*/) {
  const Kernels& kernels = kernels_for(q.scalar_type());
  Call<Params> call(q, k, v, visible_end, positions, sinks, scale, window, softcap);
  Params& p = call.params;
  at::Tensor out = empty_heads_last(q, v.size(3), q.scalar_type());
  at::Tensor lse =
      at::empty({p.batch, p.heads, p.seq}, q.options().dtype(accumulation_type(q.scalar_type())));
  p.out = raw(out);
  p.lse = lse.data_ptr();
  run_tasks(p.batch * p.heads * p.num_tiles, kernels.forward_scratch_bytes(p),
            [&](int64_t task, void* scratch) { kernels.forward(p, task, scratch); });
  return {out, lse};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> tree_attention_backward(
    const at::Tensor& dout, const OptionalTensor& dlse, const at::Tensor& q, const at::Tensor& k,
    const at::Tensor& v, const at::Tensor& out, const at::Tensor& lse,
    const at::Tensor& visible_end, const OptionalTensor& positions, const OptionalTensor& sinks,
    double scale, int64_t window, double softcap, const OptionalTensor& /*plan*/,
    bool /*deterministic: always*/) {
  const auto type = q.scalar_type(), accumulation = accumulation_type(type);
  const Kernels& kernels = kernels_for(type);
  Call<BackwardParams> call(q, k, v, visible_end, positions, sinks, scale, window, softcap);
  BackwardParams& p = call.params;
  const auto shaped_as_out = [&](const char* name, const at::Tensor& x) {
    return last_dim_contiguous(checked(name, x, {p.batch, p.heads, p.seq, p.d_v}, type));
  };
  const auto shaped_as_lse = [&](const char* name, const at::Tensor& x) {
    return checked(name, x, {p.batch, p.heads, p.seq}, accumulation).contiguous();
  };
  const at::Tensor own_dout = shaped_as_out("dout", dout), own_out = shaped_as_out("out", out);
  const at::Tensor own_lse = shaped_as_lse("lse", lse);
  const at::Tensor own_dlse = dlse.has_value() ? shaped_as_lse("dlse", *dlse) : at::Tensor();
  at::Tensor dq = empty_heads_last(q, p.d_qk, accumulation).zero_();
  at::Tensor dk = empty_heads_last(k, p.d_qk, type), dv = empty_heads_last(v, p.d_v, type);
  at::Tensor delta = at::empty_like(own_lse);
  at::Tensor progress = at::zeros({p.batch, p.kv_heads, p.num_tiles}, q.options().dtype(at::kInt));
  p.out = raw(own_out), p.dout = raw(own_dout);
  p.dq = raw(dq), p.dk = raw(dk), p.dv = raw(dv);
  p.lse = own_lse.data_ptr(), p.delta = delta.data_ptr();
  p.dlse = own_dlse.defined() ? own_dlse.const_data_ptr() : nullptr;
  p.progress = progress.data_ptr<int32_t>();
  run_tasks(p.batch * p.heads * p.num_tiles, 0,
            [&](int64_t task, void*) { kernels.delta(p, task); });
  run_tasks(p.batch * p.kv_heads * p.num_tiles, kernels.backward_scratch_bytes(p),
            [&](int64_t task, void* scratch) { kernels.backward(p, task, scratch); });
  at::Tensor dsinks = at::empty({0}, lse.options());
  if (call.sinks.defined()) {
    const at::Tensor of_sinks = at::exp(call.sinks.view({1, -1, 1}) - own_lse);
    dsinks = (of_sinks * delta).sum(at::IntArrayRef{0, 2}).neg();
  }
  return {dq.to(type), dk, dv, dsinks};
}

}  // namespace

TORCH_LIBRARY_IMPL(onepass, CPU, m) {
  m.impl("tree_attention", &tree_attention);
  m.impl("tree_attention_backward", &tree_attention_backward);
}

}  // namespace onepass::cpu
