// Binds the CPU kernels to the ops of onepass_trl/attention/ops.py: checks, outputs, and the loop
// over tasks.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdlib>
#include <memory>
#include <string>
#include <tuple>
#include <vector>

#include "../tensors.h"
#include "dispatch.h"
#include "plan.h"

namespace onepass::cpu {
namespace {

ScalarType accumulation_type(ScalarType type) {
  return type == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

const Kernels& kernels_for(ScalarType type) {
  switch (type) {
    case ScalarType::Float: return variant().float32;
    case ScalarType::Double: return variant().float64;
    case ScalarType::BFloat16: return variant().bfloat16;
    default: STD_TORCH_CHECK(false, "q is ", toString(type));
  }
}

const StableTensor& checked(const char* name, const StableTensor& x,
                            std::initializer_list<int64_t> shape, ScalarType type) {
  return onepass::checked(name, x, shape, type, x.is_cpu());
}

StableTensor last_dim_contiguous(const StableTensor& x) {
  return x.size(3) <= 1 || x.stride(3) == 1 ? x : torch::stable::contiguous(x);
}

Tensor raw(const StableTensor& x) {
  return {const_cast<void*>(x.const_data_ptr()), x.stride(0), x.stride(1), x.stride(2)};
}

// What forward and backward share: checked inputs and the plan. It owns what `params` points to.
template <typename ParamsType>
struct Call {
  ParamsType params{};
  StableTensor q, k, v, visible_end;
  OptionalTensor visible_begin, positions, sinks;
  std::vector<KeyTile> blocks, tiles;

  Call(const StableTensor& q_, const StableTensor& k_, const StableTensor& v_,
       const StableTensor& visible_end_, const OptionalTensor& positions_,
       const OptionalTensor& sinks_, double scale, int64_t window, double softcap,
       const OptionalTensor& visible_begin_) {
    STD_TORCH_CHECK(q_.dim() == 4 && k_.dim() == 4 && v_.dim() == 4, "q, k and v have ", q_.dim(),
                    ", ", k_.dim(), " and ", v_.dim(), " dimensions");
    const ScalarType type = q_.scalar_type();
    const int64_t batch = q_.size(0), heads = q_.size(1), seq = q_.size(2), kv_heads = k_.size(1);
    STD_TORCH_CHECK(kv_heads > 0 && heads % kv_heads == 0, "heads is ", heads, ", kv_heads ",
                    kv_heads);
    STD_TORCH_CHECK(seq < (int64_t{1} << 30), "seq is ", seq, ", expected less than 2^30");
    STD_TORCH_CHECK(0 <= window && window <= INT32_MAX, "window is ", window);
    q = last_dim_contiguous(q_);
    k = last_dim_contiguous(checked("k", k_, {batch, kv_heads, seq, q_.size(3)}, type));
    v = last_dim_contiguous(checked("v", v_, {batch, kv_heads, seq, v_.size(3)}, type));
    visible_end = torch::stable::contiguous(
        checked("visible_end", visible_end_, {batch, seq}, ScalarType::Int));
    if (visible_begin_.has_value()) {
      visible_begin = torch::stable::contiguous(
          checked("visible_begin", *visible_begin_, {batch, seq}, ScalarType::Int));
    }
    if (window > 0) {
      STD_TORCH_CHECK(positions_.has_value(), "window is ", window, ", without positions");
      positions = torch::stable::contiguous(
          checked("positions", *positions_, {batch, seq}, ScalarType::Int));
    }
    if (sinks_.has_value()) {
      sinks =
          torch::stable::contiguous(checked("sinks", *sinks_, {heads}, accumulation_type(type)));
    }
    Params& p = params;
    p.batch = batch, p.heads = heads, p.kv_heads = kv_heads, p.seq = seq;
    p.d_qk = q.size(3), p.d_v = v.size(3);
    p.scoring = {scale, softcap, static_cast<int32_t>(window)};
    p.q = raw(q), p.k = raw(k), p.v = raw(v);
    p.visible_begin = pointer<int32_t>(visible_begin);
    p.visible_end = pointer<int32_t>(visible_end);
    p.positions = pointer<int32_t>(positions);
    p.sinks = pointer(sinks);
    plan();
  }

  void plan() {
    Params& p = params;
    for (int64_t b = 0; b < p.batch; ++b) {
      const int32_t* row = p.visible_end + b * p.seq;
      const int32_t* row_begins =
          p.visible_begin == nullptr ? nullptr : p.visible_begin + b * p.seq;
      const int32_t* row_positions = p.positions == nullptr ? nullptr : p.positions + b * p.seq;
      STD_TORCH_CHECK(is_tree(row, p.seq), "visible_end of row ", b, " is not a tree, see ",
                      "onepass_trl.visibility.check_visible_end");
      STD_TORCH_CHECK(row_begins == nullptr || are_blocks(row_begins, row, p.seq),
                      "visible_begin of row ", b, " has no blocks, see ",
                      "onepass_trl.visibility.check_visible_begin");
      STD_TORCH_CHECK(row_positions == nullptr || p.seq == 0 ||
                          *std::min_element(row_positions, row_positions + p.seq) >= 0,
                      "positions of row ", b, " are negative");
      const auto row_blocks = make_tiles(row_begins, row, row_positions, p.seq, kKeyBlock);
      const auto row_tiles = make_tiles(row_begins, row, row_positions, p.seq, kTile);
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
  const int64_t num_workers = std::min<int64_t>(torch::stable::get_num_threads(), num_tasks);
  torch::stable::parallel_for(0, num_workers, 1, [&](int64_t, int64_t) {
    const std::unique_ptr<void, FreeDeleter> scratch(
        std::aligned_alloc(64, std::max<int64_t>(scratch_bytes, 64)));
    STD_TORCH_CHECK(scratch != nullptr, "out of memory: ", scratch_bytes, " bytes of scratch");
    for (int64_t task = next++; task < num_tasks; task = next++) run(task, scratch.get());
  });
}

// dsinks[h] = -sum of exp(sinks[h] - lse) * delta over the queries of head h.
template <typename T>
void sinks_backward(const BackwardParams& p, int64_t h, void* dsinks) {
  const T sink = static_cast<const T*>(p.sinks)[h];
  double sum = 0;
  for (int64_t b = 0; b < p.batch; ++b) {
    const int64_t head_begin = (b * p.heads + h) * p.seq;
    const T* lse = static_cast<const T*>(p.lse) + head_begin;
    const T* delta = static_cast<const T*>(p.delta) + head_begin;
    for (int64_t i = 0; i < p.seq; ++i) {
      const T probability = lse[i] == sink ? 1 : std::exp(sink - lse[i]);  // also if infinite
      sum += probability * delta[i];
    }
  }
  static_cast<T*>(dsinks)[h] = static_cast<T>(-sum);
}

std::tuple<StableTensor, StableTensor> tree_attention(
    const StableTensor& q, const StableTensor& k, const StableTensor& v,
    const StableTensor& visible_end, const OptionalTensor& positions, const OptionalTensor& sinks,
    double scale, int64_t window, double softcap, const OptionalTensor& /*plan*/,
    const OptionalTensor& visible_begin) {
  const ScalarType type = q.scalar_type();
  const Kernels& kernels = kernels_for(type);
  Call<Params> call(q, k, v, visible_end, positions, sinks, scale, window, softcap, visible_begin);
  Params& p = call.params;
  StableTensor out = empty_heads_last(q, v.size(3), type);
  StableTensor lse = new_empty(q, {p.batch, p.heads, p.seq}, accumulation_type(type));
  p.out = raw(out);
  p.lse = lse.mutable_data_ptr();
  run_tasks(p.batch * p.heads * p.num_tiles, kernels.forward_scratch_bytes(p),
            [&](int64_t task, void* scratch) { kernels.forward(p, task, scratch); });
  return {out, lse};
}

std::tuple<StableTensor, StableTensor, StableTensor, StableTensor> tree_attention_backward(
    const StableTensor& dout, const OptionalTensor& dlse, const StableTensor& q,
    const StableTensor& k, const StableTensor& v, const StableTensor& out, const StableTensor& lse,
    const StableTensor& visible_end, const OptionalTensor& positions, const OptionalTensor& sinks,
    double scale, int64_t window, double softcap, const OptionalTensor& /*plan*/,
    bool /*deterministic: always*/, const OptionalTensor& visible_begin) {
  const ScalarType type = q.scalar_type(), accumulation = accumulation_type(type);
  const Kernels& kernels = kernels_for(type);
  Call<BackwardParams> call(q, k, v, visible_end, positions, sinks, scale, window, softcap,
                            visible_begin);
  BackwardParams& p = call.params;
  const auto shaped_as_out = [&](const char* name, const StableTensor& x) {
    return last_dim_contiguous(checked(name, x, {p.batch, p.heads, p.seq, p.d_v}, type));
  };
  const auto shaped_as_lse = [&](const char* name, const StableTensor& x) {
    return torch::stable::contiguous(checked(name, x, {p.batch, p.heads, p.seq}, accumulation));
  };
  const StableTensor own_dout = shaped_as_out("dout", dout), own_out = shaped_as_out("out", out);
  const StableTensor own_lse = shaped_as_lse("lse", lse);
  OptionalTensor own_dlse;
  if (dlse.has_value()) own_dlse = shaped_as_lse("dlse", *dlse);
  StableTensor dq = empty_heads_last(q, p.d_qk, accumulation);
  torch::stable::zero_(dq);
  StableTensor dk = empty_heads_last(k, p.d_qk, type), dv = empty_heads_last(v, p.d_v, type);
  StableTensor delta = torch::stable::empty_like(own_lse);
  StableTensor progress = new_empty(q, {p.batch, p.kv_heads, p.num_tiles}, ScalarType::Int);
  torch::stable::zero_(progress);
  StableTensor dsinks = new_empty(lse, {call.sinks.has_value() ? p.heads : 0}, accumulation);
  p.out = raw(own_out), p.dout = raw(own_dout);
  p.dq = raw(dq), p.dk = raw(dk), p.dv = raw(dv);
  p.lse = const_cast<void*>(pointer(own_lse)), p.delta = delta.mutable_data_ptr();
  p.dlse = pointer(own_dlse);
  p.progress = static_cast<int32_t*>(progress.mutable_data_ptr());
  run_tasks(p.batch * p.heads * p.num_tiles, 0,
            [&](int64_t task, void*) { kernels.delta(p, task); });
  run_tasks(p.batch * p.kv_heads * p.num_tiles, kernels.backward_scratch_bytes(p),
            [&](int64_t task, void* scratch) { kernels.backward(p, task, scratch); });
  const auto sinks_task =
      type == ScalarType::Double ? sinks_backward<double> : sinks_backward<float>;
  run_tasks(dsinks.size(0), 0,
            [&](int64_t h, void*) { sinks_task(p, h, dsinks.mutable_data_ptr()); });
  return {torch::stable::to(dq, type), dk, dv, dsinks};
}

// The instruction set in use and the compiler, for people.
std::string cpu_build() {
#if defined(__clang__)
  const std::string compiler = "clang " __clang_version__;
#else
  const std::string compiler = "gcc " __VERSION__;
#endif
  return variant().name + (", " + compiler);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(onepass, CPU, m) {
  m.impl("tree_attention", TORCH_BOX(&tree_attention));
  m.impl("tree_attention_backward", TORCH_BOX(&tree_attention_backward));
}

STABLE_TORCH_LIBRARY_IMPL(onepass, CompositeExplicitAutograd, m) {
  m.impl("cpu_build", TORCH_BOX(&cpu_build));
}

}  // namespace onepass::cpu
