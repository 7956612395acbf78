// CPU only: what the layers' activations compute with.
#ifndef SPO_FAST_ACTIVATIONS_H
#define SPO_FAST_ACTIVATIONS_H

#include <cmath>
#include <type_traits>

#include "common.h"

namespace spo {

// What a type is computed in.
template <class T>
using Wide = std::conditional_t<std::is_same_v<T, double>, double, float>;

SPO_INLINE double exponential(double x) { return std::exp(x); }

// e^x = 2^k e^r, |r| <= ln 2 / 2, a Taylor polynomial in r (remainder 5e-9): branch-free, so that compilers vectorise it.
SPO_INLINE float exponential(float x) {
  constexpr float LIMIT = 87.0f, LOG2_E = 1.44269504f, LN2_HIGH = 0.693359375f, LN2_LOW = -2.12194440e-4f;
  constexpr float ROUND = 12582912.0f;  // 1.5 * 2^23: adding it leaves an integer
  const float kept = x < -LIMIT ? -LIMIT : x > LIMIT ? LIMIT : x;
  const float k = (kept * LOG2_E + ROUND) - ROUND;
  const float r = (kept - k * LN2_HIGH) - k * LN2_LOW;
  float series = 1.0f / 5040;
  series = series * r + 1.0f / 720;
  series = series * r + 1.0f / 120;
  series = series * r + 1.0f / 24;
  series = series * r + 1.0f / 6;
  series = series * r + 0.5f;
  series = series * r + 1;
  series = series * r + 1;
  return series * float_from_bits(static_cast<uint32_t>(static_cast<int32_t>(k) + 127) << 23);
}

}  // namespace spo
#endif
