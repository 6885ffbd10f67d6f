// The kernels of the best instruction set that this processor has.
#pragma once

#include "params.h"

namespace onepass::cpu {

// ONEPASS_CPU_VARIANT (portable, avx2, avx512) forces one, for tests and measurements.
const Variant& variant();

}  // namespace onepass::cpu
