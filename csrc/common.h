// What the CPU and the CUDA sources share: element types, dispatch on dtype codes, guidance and table rows.
#ifndef SPO_FAST_COMMON_H
#define SPO_FAST_COMMON_H

#include <cstdint>
#include <cstring>

#include "philox.h"
#include "spo_fast.h"

#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime_api.h>
#endif

namespace spo {

#ifdef __CUDACC__

using bfloat16 = __nv_bfloat16;
using float16 = __half;
SPO_HD float widen(bfloat16 value) { return __bfloat162float(value); }
SPO_HD float widen(float16 value) { return __half2float(value); }
SPO_HD void narrow(float value, bfloat16 *out) { *out = __float2bfloat16(value); }
SPO_HD void narrow(float value, float16 *out) { *out = __float2half(value); }

constexpr int THREADS = 256;  // of a block
constexpr int64_t MAX_GRID_Y = 65535;

inline unsigned blocks(int64_t threads) { return static_cast<unsigned>((threads + THREADS - 1) / THREADS); }

inline int launch_error() {
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? static_cast<int>(SPO_OK) : SPO_ERROR_CUDA + static_cast<int>(error);
}

#else  // by bit operations: neither type is in C++17

struct bfloat16 {
  uint16_t bits;
};
struct float16 {
  uint16_t bits;
};

inline float float_from_bits(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

inline uint32_t bits_of_float(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

inline float widen(bfloat16 value) { return float_from_bits(static_cast<uint32_t>(value.bits) << 16); }

inline float widen(float16 value) {  // no branches, so that loops over halves vectorise
  const uint32_t sign = static_cast<uint32_t>(value.bits & 0x8000u) << 16;
  const int32_t magnitude = (value.bits & 0x7FFF) << 13;  // signed: SSE2 has no unsigned comparison
  const int32_t normal = magnitude + (112 << 23);      // bias 15 -> 127
  const int32_t not_finite = magnitude + (224 << 23);  // infinity, NaN: exponent 31 -> 255
  const auto subnormal = static_cast<int32_t>(bits_of_float(float_from_bits(magnitude + (113 << 23)) - 0x1p-14f));
  const int32_t finite = magnitude < (1 << 23) ? subnormal : normal;
  const int32_t bits = magnitude < (31 << 23) ? finite : not_finite;
  return float_from_bits(sign | static_cast<uint32_t>(bits));
}

// Both round to nearest, ties to even.
inline void narrow(float value, bfloat16 *out) {
  const uint32_t bits = bits_of_float(value);
  if ((bits & 0x7FFFFFFFu) > 0x7F800000u)  // NaN: rounding could carry its payload away into infinity
    out->bits = static_cast<uint16_t>(bits >> 16 | 0x40u);
  else
    out->bits = static_cast<uint16_t>((bits + 0x7FFFu + (bits >> 16 & 1u)) >> 16);
}

inline void narrow(float value, float16 *out) {
  const uint32_t bits = bits_of_float(value);
  const uint32_t sign = bits >> 16 & 0x8000u;
  const uint32_t magnitude = bits & 0x7FFFFFFFu;
  uint32_t half;
  if (magnitude > 0x7F800000u)
    half = 0x7E00u;  // NaN
  else if (magnitude >= 0x477FF000u)
    half = 0x7C00u;                  // 65520 and above round to infinity
  else if (magnitude < 0x38800000u)  // below 2^-14 halves lie 2^-24 apart, as floats do above 1/2: its adder rounds
    half = bits_of_float(float_from_bits(magnitude) + 0.5f) - bits_of_float(0.5f);
  else
    half = (magnitude - (112u << 23) + 0xFFFu + (magnitude >> 13 & 1u)) >> 13;
  out->bits = static_cast<uint16_t>(sign | half);
}

#endif

SPO_HD float widen(float value) { return value; }
SPO_HD double widen(double value) { return value; }
SPO_HD void narrow(float value, float *out) { *out = value; }
SPO_HD void narrow(float value, double *out) { *out = value; }
SPO_HD void narrow(double value, double *out) { *out = value; }
template <class M>
SPO_HD void narrow(double value, M *out) {
  narrow(static_cast<float>(value), out);
}

// m = uncond + g (cond - uncond), or cond where uncond is null.
template <class X, class M>
SPO_HD X guided(const M *cond, const M *uncond, int64_t i, X guidance) {
  const X with_text = static_cast<X>(widen(cond[i]));
  if (uncond == nullptr) return with_text;
  const X without = static_cast<X>(widen(uncond[i]));
  return without + guidance * (with_text - without);
}

constexpr int TABLE_COLUMNS = 5;  // a, b, c, d, std

// Whether a function's struct is there, and is the one that this library was built for.
template <class Args>
int check(const Args *args) {
  if (args == nullptr) return SPO_ERROR_NULL;
  return *reinterpret_cast<const int64_t *>(args) == static_cast<int64_t>(sizeof(Args)) ? SPO_OK : SPO_ERROR_SIZE;
}

// Calls f(T{}) with the type of a dtype code.
template <class F>
int with_type(int64_t dtype, F f) {
  switch (dtype) {
    case SPO_FLOAT32: return f(float{});
    case SPO_FLOAT64: return f(double{});
    case SPO_BFLOAT16: return f(bfloat16{});
    case SPO_FLOAT16: return f(float16{});
    default: return SPO_ERROR_DTYPE;
  }
}

}  // namespace spo
#endif
