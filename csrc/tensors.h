// What both bindings, cpu/tree_attention.cpp and cuda/api.cpp, do with tensors of LibTorch's stable
// ABI. A library that uses nothing else of torch serves every Python and every torch since 2.11.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <initializer_list>
#include <optional>
#include <sstream>
#include <string>

namespace onepass {

using StableTensor = torch::stable::Tensor;
using OptionalTensor = std::optional<StableTensor>;
using Sizes = torch::headeronly::IntHeaderOnlyArrayRef;
using torch::headeronly::ScalarType;

inline std::string to_string(Sizes values) {
  std::ostringstream text;
  text << "(";
  for (size_t i = 0; i < values.size(); ++i) text << (i > 0 ? ", " : "") << values[i];
  text << ")";
  return text.str();
}

// Returns `x` after checking what memory safety needs; `here`: it is on the device of q. Validation
// and implementations in onepass_trl/attention have checked the same in more words, unless the ops
// are called directly.
inline const StableTensor& checked(const char* name, const StableTensor& x,
                                   std::initializer_list<int64_t> shape, ScalarType type,
                                   bool here) {
  const Sizes expected(shape.begin(), shape.size());
  STD_TORCH_CHECK(x.sizes().equals(expected) && x.scalar_type() == type, name, " is ",
                  toString(x.scalar_type()), " ", to_string(x.sizes()), ", expected ",
                  toString(type), " ", to_string(expected));
  STD_TORCH_CHECK(here, name, " is on another device");
  return x;
}

inline StableTensor new_empty(const StableTensor& like, std::initializer_list<int64_t> shape,
                              ScalarType type) {
  return torch::stable::new_empty(like, Sizes(shape.begin(), shape.size()), type);
}

// (batch, heads, seq, width) with heads next to width in memory, as models need it after
// transpose(1, 2).
inline StableTensor empty_heads_last(const StableTensor& like, int64_t width, ScalarType type) {
  return torch::stable::transpose(
      new_empty(like, {like.size(0), like.size(2), like.size(1), width}, type), 1, 2);
}

// Null for none.
template <typename T = void>
const T* pointer(const OptionalTensor& x) {
  return x.has_value() ? static_cast<const T*>(x->const_data_ptr()) : nullptr;
}

}  // namespace onepass
