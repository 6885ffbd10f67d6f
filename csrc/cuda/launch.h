// Starts a kernel on a stream, or fails before that: the caller's check for the last CUDA error
// reports both.
#pragma once

#include "instructions.h"
#include "kernels.h"

namespace onepass::cuda {

#if defined(ONEPASS_EMULATE)

using emulator::Grid;
using emulator::launch;

#else

struct Grid {
  int32_t x, y, z;
};

template <typename... Params, typename... Arguments>
void launch(void (*kernel)(Params...), Grid grid, int threads, int shared_bytes, Stream stream,
            const Arguments&... arguments) {
  constexpr int kDefaultLimit = 48 * 1024;
  if (shared_bytes > kDefaultLimit) {
    const cudaError_t error =
        cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                             cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
    if (error != cudaSuccess) return;
  }
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(grid.x, grid.y, grid.z);
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  cudaLaunchKernelEx(&config, kernel, arguments...);
}

#endif

}  // namespace onepass::cuda
