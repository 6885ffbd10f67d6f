// The Python module onepass_trl._C: facts about the build, and tile counts. Loading it registers
// the kernels.
#include <torch/extension.h>

#include <optional>

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

void check_row(const at::Tensor& row, const char* name) {
  TORCH_CHECK_VALUE(row.dim() == 1 && row.scalar_type() == at::kInt && row.device().is_cpu(), name,
                    " has shape ", row.sizes(), " and type ", row.scalar_type(), " on ",
                    row.device(), ", expected (seq,) int32 on the CPU");
}

py::tuple tile_counts(const at::Tensor& visible_end, int64_t q_tile, int64_t k_tile,
                      const std::optional<at::Tensor>& positions, int32_t window) {
  check_row(visible_end, "visible_end");
  TORCH_CHECK_VALUE(q_tile > 0 && k_tile > 0, "tiles of ", q_tile, " x ", k_tile,
                    " tokens, expected at least 1 x 1");
  TORCH_CHECK_VALUE(window >= 0 && (window == 0 || positions.has_value()), "window is ", window,
                    positions.has_value() ? "" : " without positions",
                    ", expected 0 for none, or at least 1 with positions");
  const at::Tensor row = visible_end.contiguous();
  at::Tensor own_positions;
  if (positions.has_value()) {
    check_row(*positions, "positions");
    TORCH_CHECK_VALUE(positions->numel() == row.numel(), "positions has ", positions->numel(),
                      " tokens, expected as many as visible_end has, ", row.numel());
    own_positions = positions->contiguous();
  }
  const auto counts =
      cpu::count_tiles(row.const_data_ptr<int32_t>(),
                       own_positions.defined() ? own_positions.const_data_ptr<int32_t>() : nullptr,
                       row.numel(), q_tile, k_tile, window);
  return py::make_tuple(counts.skipped, counts.partial, counts.full);
}

}  // namespace
}  // namespace onepass

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.doc() = "The compiled part of onepass_trl.";
  m.def("build_info", &onepass::build_info,
        "Compiler, torch version and instruction sets of this build.");
  m.def("tile_counts", &onepass::tile_counts, py::arg("visible_end"), py::arg("q_tile"),
        py::arg("k_tile"), py::arg("positions") = py::none(), py::arg("window") = 0,
        "How many (query, key) tiles of the causal triangle of one row are (skipped, partial, "
        "full), in a layer with this sliding window, or without one if it is 0.");
}
