// The kernels for the best instruction set of this processor.
#pragma once

#include "params.h"

namespace onepass::cpu {

// ONEPASS_CPU_VARIANT (portable, avx2, avx512) forces one, for tests and measurements.
const Variant& variant();

}  // namespace onepass::cpu
