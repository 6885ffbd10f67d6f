#include <cmath>
#include <cstdint>
#include <thread>
#include <type_traits>

// 16 bytes: SSE2 and NEON.
#define ONEPASS_VARIANT portable
#define ONEPASS_VARIANT_FUNCTION variant_portable
#define ONEPASS_VECTOR_BYTES 16
#define ONEPASS_GEMM_M 4
#define ONEPASS_GEMM_VECS 2
#include "variant.h"
