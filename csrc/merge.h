// Stochastic rounding of W + delta with keyed bits: the same for CPU, CUDA, and spo_fast/ops/merge_lora.py.
//
// The four Philox words of a group serve eight elements: with q = ceil(n / 8), element lane * q + group takes the low
// 16 bits of word `lane` (lanes 0..3) or the high 16 bits of word lane - 4.
#ifndef SPO_FAST_MERGE_H
#define SPO_FAST_MERGE_H

#include "common.h"

namespace spo {

constexpr int MERGE_LANES = 8;

SPO_HD uint32_t float_pattern(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  return bits;
}

// The 16-bit pattern of value, rounded away from 0 with the probability of its distance to the neighbour towards 0.
// A carry into the exponent is right: the next binade. The last argument names the type.
SPO_HD uint16_t round_stochastic(float value, uint32_t random, bfloat16) {
  const uint32_t bits = float_pattern(value);
  if ((bits & 0x7FFFFFFFu) > 0x7F800000u) return 0x7FC0u;  // NaN: a carry could make it a number
  return static_cast<uint16_t>((bits + random) >> 16);
}

SPO_HD uint16_t round_stochastic(float value, uint32_t random, float16) {
  const uint32_t bits = float_pattern(value), magnitude = bits & 0x7FFFFFFFu;
  if (magnitude > 0x7F800000u) return 0x7E00u;
  random >>= 3;  // float16 has 13 bits fewer than float32
  uint32_t half;
  if (magnitude < 0x38800000u)  // below 2^-14 halves lie 2^-24 apart: fixed point with 13 bits behind it
    half = (static_cast<uint32_t>(fabsf(value) * 0x1p37f) + random) >> 13;
  else
    half = (magnitude - (112u << 23) + random) >> 13;  // exponent bias 127 -> 15
  if (half > 0x7C00u) half = 0x7C00u;                  // infinity
  return static_cast<uint16_t>((bits >> 16 & 0x8000u) | half);
}

SPO_HD float round_stochastic(float value, uint32_t, float) { return value; }

// What a type's results are stored as.
template <class M>
struct Pattern {
  using type = uint16_t;
};
template <>
struct Pattern<float> {
  using type = float;
};

template <class M>
struct Merge {
  const M *weight;
  const float *delta;
  const int64_t *key;
  int64_t n;
  typename Pattern<M>::type *out;

  SPO_HD void element(int64_t i, int lane, uint32_t word) const {
    const uint32_t random = lane < 4 ? word & 0xFFFFu : word >> 16;
    out[i] = round_stochastic(widen(weight[i]) + delta[i], random, M{});
  }

  SPO_HD void group(int64_t group, int64_t q) const {
    uint32_t words[4];
    group_words(key, 0, group, words);
#ifdef __CUDA_ARCH__
#pragma unroll
#endif
    for (int lane = 0; lane < MERGE_LANES; ++lane) {
      const int64_t i = lane * q + group;
      if (i >= n) break;
      element(i, lane, words[lane % 4]);
    }
  }
};

// Checks, then calls f with the Merge of the dtype code, unless there is nothing to do.
template <class F>
int with_merge(const spo_merge_args *args, F f) {
  if (const int code = check(args)) return code;
  if (args->n < 0) return SPO_ERROR_SHAPE;
  if (args->n == 0) return SPO_OK;
  if (!args->weight || !args->delta || !args->key || !args->out) return SPO_ERROR_NULL;
  const auto run = [&](auto m) -> int {
    using M = decltype(m);
    return f(Merge<M>{static_cast<const M *>(args->weight), args->delta, args->key, args->n,
                      static_cast<typename Pattern<M>::type *>(args->out)});
  };
  switch (args->dtype) {
    case SPO_FLOAT32: return run(float{});
    case SPO_BFLOAT16: return run(bfloat16{});
    case SPO_FLOAT16: return run(float16{});
    default: return SPO_ERROR_DTYPE;
  }
}

}  // namespace spo
#endif
