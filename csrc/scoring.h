// The options of the scores that are numbers, as the bindings pass them to the kernels.
#pragma once

#include <cstdint>

namespace onepass {

template <typename Real>
struct Scoring {
  Real scale;      // of the products of queries and keys
  Real softcap;    // a score becomes softcap * tanh(score / softcap); 0: none
  int32_t window;  // positions that a query looks back, itself included; 0: all
};

}  // namespace onepass
