// How products of queries and keys become scores.
#pragma once

#include "simd.h"

namespace onepass::cpu::ONEPASS_VARIANT {

template <typename T>
struct Score {
  Vec<T> value;
  Vec<T> slope;  // d value / d (scale q k)
};

// The score of a product that has been scaled.
template <typename T>
class ScoreFunction {
 public:
  explicit ScoreFunction(const Scoring<double>& scoring)
      : cap_(scoring.softcap), inverse_(scoring.softcap > 0 ? 1 / scoring.softcap : 0) {}

  ONEPASS_INLINE bool is_identity() const { return cap_ == 0; }

  ONEPASS_INLINE Score<T> operator()(Vec<T> scaled) const {
    if (is_identity()) return {scaled, broadcast<T>(1)};
    const Vec<T> capped = tanh(scaled * inverse_);
    return {capped * cap_, 1 - capped * capped};
  }

 private:
  T cap_, inverse_;
};

}  // namespace onepass::cpu::ONEPASS_VARIANT
