// Defines one variant of the kernels. Before including this file, variant_<name>.cpp sets
//   ONEPASS_VARIANT, ONEPASS_VARIANT_FUNCTION  its namespace and the function that returns it
//   ONEPASS_VECTOR_BYTES                       the length of a vector register
//   ONEPASS_GEMM_M, ONEPASS_GEMM_VECS          a product's block of C that is kept in registers
// and the instruction set itself by a pragma: no flags per file are needed, and code of the
// standard library, which is included above the pragma, stays portable.
#include "backward.h"
#include "forward.h"

namespace onepass::cpu {
namespace ONEPASS_VARIANT {

template <typename Storage, typename T>
Kernels kernels() {
  return {forward<Storage, T>, delta<Storage, T>, backward<Storage, T>, forward_scratch_bytes<T>,
          backward_scratch_bytes<T>};
}

}  // namespace ONEPASS_VARIANT

#define ONEPASS_STRING(x) #x
#define ONEPASS_NAME(x) ONEPASS_STRING(x)

Variant ONEPASS_VARIANT_FUNCTION() {
  using namespace ONEPASS_VARIANT;
  return {ONEPASS_NAME(ONEPASS_VARIANT), kernels<float, float>(), kernels<double, double>(),
          kernels<BFloat16, float>()};
}

}  // namespace onepass::cpu
