// Describes tensors to the copy engine, on the host.
#pragma once

#include <stdexcept>
#include <string>

#include "config.h"
#include "instructions.h"

namespace onepass::cuda::sm90 {

#if !defined(ONEPASS_EMULATE)

// The driver's encoder, found at run time: the library does not link against the driver.
inline auto tensor_map_encoder() {
  static const auto encoder = [] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult found;
    const cudaError_t error = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function,
                                                               12000, cudaEnableDefault, &found);
    if (error != cudaSuccess || found != cudaDriverEntryPointSuccess) {
      throw std::runtime_error(
          "the CUDA driver has no cuTensorMapEncodeTiled: it is older than 12");
    }
    return reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(function);
  }();
  return encoder;
}

// The map of a tensor that is copied in blocks of `box_tokens` tokens.
template <typename Element>
TensorMap make_tensor_map(const Tensor& tensor, int32_t batch, int32_t heads, int32_t seq,
                          int32_t head_dim, int32_t box_tokens) {
  constexpr bool is_bf16 = std::is_same_v<Element, Bf16>;
  const cuuint64_t sizes[] = {static_cast<cuuint64_t>(head_dim), static_cast<cuuint64_t>(seq),
                              static_cast<cuuint64_t>(heads), static_cast<cuuint64_t>(batch)};
  // A dimension of size 1 may have any stride, which the encoder might refuse: use a token's.
  const auto bytes = [&](int64_t stride, int32_t size) {
    return static_cast<cuuint64_t>(size == 1 ? head_dim : stride) * sizeof(Element);
  };
  const cuuint64_t strides[] = {bytes(tensor.seq_stride, seq), bytes(tensor.head_stride, heads),
                                bytes(tensor.batch_stride, batch)};
  const cuuint32_t box[] = {kBlockColumns, static_cast<cuuint32_t>(box_tokens), 1, 1};
  const cuuint32_t steps[] = {1, 1, 1, 1};
  TensorMap map;
  const CUresult result = tensor_map_encoder()(
      &map, is_bf16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16, 4,
      tensor.data, sizes, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
      CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
      CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result != CUDA_SUCCESS) {
    throw std::runtime_error("cuTensorMapEncodeTiled failed with CUresult " +
                             std::to_string(static_cast<int>(result)));
  }
  return map;
}

#else

template <typename Element>
TensorMap make_tensor_map(const Tensor& tensor, int32_t batch, int32_t heads, int32_t seq,
                          int32_t head_dim, int32_t box_tokens) {
  return {static_cast<const uint8_t*>(tensor.data),
          {head_dim, seq, heads, batch},
          {1, tensor.seq_stride, tensor.head_stride, tensor.batch_stride},
          box_tokens};
}

#endif

}  // namespace onepass::cuda::sm90
