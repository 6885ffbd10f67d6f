#if defined(__x86_64__)

#include <cmath>
#include <cstdint>
#include <thread>
#include <type_traits>

#if defined(__clang__)
#pragma clang attribute push( \
    __attribute__((target("avx512f,avx512dq,avx512bw,avx512vl,avx2,fma"))), apply_to = function)
#else
#pragma GCC target("avx512f,avx512dq,avx512bw,avx512vl,avx2,fma")
#endif

#define ONEPASS_VARIANT avx512
#define ONEPASS_VARIANT_FUNCTION variant_avx512
#define ONEPASS_VECTOR_BYTES 64
#define ONEPASS_GEMM_M 4
#define ONEPASS_GEMM_VECS 4
#include "variant.h"

#if defined(__clang__)
#pragma clang attribute pop
#endif

#endif
