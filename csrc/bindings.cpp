// The Python module onepass_trl._C: facts about the build, and tile counts. Loading it registers
// the kernels.
#include <torch/extension.h>

#include "cpu/dispatch.h"
#include "cpu/plan.h"

namespace onepass {
namespace {

py::dict build_info() {
  py::dict info;
#if defined(__clang__)
  info["compiler"] = "clang " __clang_version__;
#else
  info["compiler"] = "gcc " __VERSION__;
#endif
  info["torch"] = TORCH_VERSION;
#if defined(__x86_64__)
  info["cpu_variants"] = py::make_tuple("avx512", "avx2", "portable");
#else
  info["cpu_variants"] = py::make_tuple("portable");
#endif
  info["cpu_variant"] = cpu::variant().name;
#if defined(_OPENMP)
  info["openmp"] = true;
#else
  info["openmp"] = false;
#endif
  return info;
}

py::tuple tile_counts(const at::Tensor& visible_end, int64_t q_tile, int64_t k_tile) {
  TORCH_CHECK_VALUE(visible_end.dim() == 1 && visible_end.scalar_type() == at::kInt &&
                        visible_end.device().is_cpu(),
                    "visible_end has shape ", visible_end.sizes(), " and type ",
                    visible_end.scalar_type(), " on ", visible_end.device(),
                    ", expected (seq,) int32 on the CPU");
  TORCH_CHECK_VALUE(q_tile > 0 && k_tile > 0, "tiles of ", q_tile, " x ", k_tile,
                    " tokens, expected at least 1 x 1");
  const at::Tensor row = visible_end.contiguous();
  const auto counts = cpu::count_tiles(row.const_data_ptr<int32_t>(), row.numel(), q_tile, k_tile);
  return py::make_tuple(counts.skipped, counts.partial, counts.full);
}

}  // namespace
}  // namespace onepass

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.doc() = "The compiled part of onepass_trl.";
  m.def("build_info", &onepass::build_info,
        "Compiler, torch version and instruction sets of this build.");
  m.def("tile_counts", &onepass::tile_counts, py::arg("visible_end"), py::arg("q_tile"),
        py::arg("k_tile"),
        "How many (query, key) tiles of the causal triangle of one row are (skipped, partial, "
        "full).");
}
