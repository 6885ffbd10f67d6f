#if defined(__x86_64__)

#include <cmath>
#include <cstdint>
#include <thread>
#include <type_traits>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC target("avx2,fma")
#endif

#define ONEPASS_VARIANT avx2
#define ONEPASS_VARIANT_FUNCTION variant_avx2
#define ONEPASS_VECTOR_BYTES 32
#define ONEPASS_GEMM_M 4
#define ONEPASS_GEMM_VECS 2
#include "variant.h"

#if defined(__clang__)
#pragma clang attribute pop
#endif

#endif
