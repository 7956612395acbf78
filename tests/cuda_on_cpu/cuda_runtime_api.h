// Enough of CUDA for csrc/*.cu to be compiled by a C++ compiler and run on a CPU: tests/test_cuda_sources.py does.
//
// A block's threads are fibres of one host thread (runtime.cpp): each runs until it waits for others at a barrier or a
// shuffle, blocks one after the other. A barrier that a thread of the block never reaches, a shuffle that a lane of its
// mask never reaches, an index outside a kernel's own array and a grid that no card takes are errors. It shows what a kernel computes, not how fast, nor what
// only a card's memory model or compiler does.
//
// Included before everything else, as nvcc includes cuda_runtime.h. A launch, kernel<<<grid, block, shared,
// stream>>>(arguments), is no C++: the test has it as cuda_on_cpu::launch(grid, block, shared, stream, [&] { kernel(...) }).
#ifndef CUDA_ON_CPU_RUNTIME_H
#define CUDA_ON_CPU_RUNTIME_H

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>

#define __CUDACC__
#define __CUDA_ARCH__ 900
#define __host__
#define __device__
#define __global__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__ static  // blocks run one after the other

enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidConfiguration = 9,
  cudaErrorIllegalAddress = 700,
  cudaErrorLaunchFailure = 719
};
using cudaStream_t = struct cuda_on_cpu_stream *;

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

extern dim3 threadIdx, blockIdx;

cudaError_t cudaGetLastError();
const char *cudaGetErrorString(cudaError_t error);
void __syncthreads();

namespace cuda_on_cpu {
void launch(dim3 grid, dim3 block, size_t shared, cudaStream_t stream, const std::function<void()> &thread);
uint64_t exchange(uint32_t mask, uint64_t value, int lane_mask);
}  // namespace cuda_on_cpu

template <class T>
T __shfl_xor_sync(uint32_t mask, T value, int lane_mask) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8, "as CUDA has it");
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof value);
  bits = cuda_on_cpu::exchange(mask, bits, lane_mask);
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

// A float of 16 bits, so many of them mantissa. Arithmetic in float64, in which every step is exact but the rounding.
template <int MANTISSA>
struct SmallFloat {
  static constexpr int EXPONENT = 15 - MANTISSA, BIAS = (1 << (EXPONENT - 1)) - 1;
  static constexpr uint16_t INFINITE = ((1 << EXPONENT) - 1) << MANTISSA;
  uint16_t bits;

  // to nearest, ties to even
  static SmallFloat from(float value) {
    if (std::isnan(value)) return {0x7FFF};
    const double magnitude = std::min(std::fabs(static_cast<double>(value)), std::ldexp(1.0, BIAS + 1));
    const int exponent = magnitude == 0 ? 1 - BIAS : std::max(std::ilogb(magnitude), 1 - BIAS);  // subnormals share one
    const auto units = static_cast<int>(std::nearbyint(std::ldexp(magnitude, MANTISSA - exponent)));
    const int pattern = std::min<int>(((exponent + BIAS - 1) << MANTISSA) + units, INFINITE);
    return {static_cast<uint16_t>(pattern | (std::signbit(value) ? 0x8000 : 0))};
  }

  float widened() const {
    const int magnitude = bits & 0x7FFF, exponent = magnitude >> MANTISSA, units = magnitude & ((1 << MANTISSA) - 1);
    const double value = magnitude > INFINITE    ? std::nan("")
                         : magnitude == INFINITE ? HUGE_VAL
                         : exponent == 0 ? std::ldexp(units, 1 - BIAS - MANTISSA)
                                         : std::ldexp(units + (1 << MANTISSA), exponent - BIAS - MANTISSA);
    return static_cast<float>(bits & 0x8000 ? -value : value);
  }
};

using __half = SmallFloat<10>;
using __nv_bfloat16 = SmallFloat<7>;
inline float __half2float(__half value) { return value.widened(); }
inline float __bfloat162float(__nv_bfloat16 value) { return value.widened(); }
inline __half __float2half(float value) { return __half::from(value); }
inline __nv_bfloat16 __float2bfloat16(float value) { return __nv_bfloat16::from(value); }

#endif
