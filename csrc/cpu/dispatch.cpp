#include "dispatch.h"

#include <cstdlib>
#include <stdexcept>
#include <string>

namespace onepass::cpu {
namespace {

Variant select_variant() {
  const char* forced = std::getenv("ONEPASS_CPU_VARIANT");
  const std::string wanted = forced == nullptr ? "" : forced;
  std::string usable;
  const auto take = [&](const char* name, bool supported) {
    if (supported) usable += std::string(usable.empty() ? "" : ", ") + name;
    return supported && (wanted.empty() || wanted == name);
  };
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl");
  if (take("avx512", avx512)) return variant_avx512();
  if (take("avx2", avx2)) return variant_avx2();
#endif
  if (take("portable", true)) return variant_portable();
  throw std::invalid_argument("ONEPASS_CPU_VARIANT is '" + wanted +
                              "', expected one that this processor has: " + usable);
}

}  // namespace

const Variant& variant() {
  static const Variant selected = select_variant();
  return selected;
}

}  // namespace onepass::cpu
