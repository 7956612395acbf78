// Counter-based normals: the same (key, counter) gives the same numbers on every device, in any batch, on any rank.
//
// Philox4x32-10: Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
// key = (seed, iteration), counter = (group, candidate, step, prompt), the low 32 bits of each. One block gives four
// words, hence four normals. With q = ceil(n / 4) groups, element lane * q + group takes normal number `lane`:
// neighbouring groups touch neighbouring elements in every lane, so loads and stores coalesce. Lanes that fall on
// elements >= n are dropped.
#ifndef SPO_FAST_PHILOX_H
#define SPO_FAST_PHILOX_H

#include <cmath>
#include <cstdint>
#include <cstring>

// Inlined always: a loop over them is compiled once per instruction set (isa.h), which ends where a call begins.
#define SPO_INLINE __attribute__((always_inline)) inline
#ifdef __CUDACC__
#define SPO_HD __host__ __device__ __forceinline__
#else
#define SPO_HD SPO_INLINE
#endif

namespace spo {

SPO_HD void philox4x32_10(const uint32_t counter[4], const uint32_t key[2], uint32_t out[4]) {
  uint32_t c0 = counter[0], c1 = counter[1], c2 = counter[2], c3 = counter[3];
  uint32_t k0 = key[0], k1 = key[1];
#if defined(__CUDA_ARCH__) || defined(__clang__)
#pragma unroll
#elif !defined(__CUDACC__)  // whose compiler of host code does not know it
#pragma GCC unroll 10
#endif
  for (int round = 0; round < 10; ++round) {
    const uint64_t p0 = static_cast<uint64_t>(0xD2511F53u) * c0;
    const uint64_t p1 = static_cast<uint64_t>(0xCD9E8D57u) * c2;
    const uint32_t high0 = static_cast<uint32_t>(p0 >> 32), high1 = static_cast<uint32_t>(p1 >> 32);
    c0 = high1 ^ c1 ^ k0;
    c2 = high0 ^ c3 ^ k1;
    c1 = static_cast<uint32_t>(p1);
    c3 = static_cast<uint32_t>(p0);
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  out[0] = c0, out[1] = c1, out[2] = c2, out[3] = c3;
}

// A word as a float32 in (0, 1]: the half step 2^-33 keeps 0, and so log(0), out.
SPO_HD float uniform(uint32_t word) { return static_cast<float>(word) * 0x1p-32f + 0x1p-33f; }

// log, sine and cosine of a float32, evaluated in float64 by Taylor series and rounded once: off by 1e-11 before that, so
// all but one in a thousand is the float32 nearest to the truth, whatever the compiler, processor or C library. Without
// branches or calls, so that loops over them vectorise.

// u in (0, 1]: u = 2^k m, m in [sqrt(1/2), sqrt(2)), log m = 2 artanh(s), s = (m - 1) / (m + 1) (|s| < 0.172).
SPO_HD float log_of(float u) {
  uint32_t bits;
  memcpy(&bits, &u, sizeof bits);
  const int32_t k = static_cast<int32_t>(bits - 0x3F3504F3u) >> 23;  // the pattern of sqrt(1/2)
  bits -= static_cast<uint32_t>(k) << 23;
  float mantissa;
  memcpy(&mantissa, &bits, sizeof mantissa);
  const double m = static_cast<double>(mantissa), s = (m - 1) / (m + 1), y = s * s;
  double series = 2.0 / 13;
  series = series * y + 2.0 / 11;
  series = series * y + 2.0 / 9;
  series = series * y + 2.0 / 7;
  series = series * y + 2.0 / 5;
  series = series * y + 2.0 / 3;
  series = series * y + 2.0;
  return static_cast<float>(k * 0.69314718055994530942 + s * series);
}

// theta in [0, 2 pi]: the nearest quarter turn and a rest x, |x| <= pi / 4.
SPO_HD void sine_cosine(float theta, float *sine, float *cosine) {
  const double t = static_cast<double>(theta);
  const int32_t quarters = static_cast<int32_t>(t * 0.63661977236758134308 + 0.5);  // t / (pi / 2)
  const double x = t - quarters * 1.57079632679489661923, y = x * x;
  double odd = -1.0 / 39916800;
  odd = odd * y + 1.0 / 362880;
  odd = odd * y - 1.0 / 5040;
  odd = odd * y + 1.0 / 120;
  odd = odd * y - 1.0 / 6;
  double even = 1.0 / 479001600;
  even = even * y - 1.0 / 3628800;
  even = even * y + 1.0 / 40320;
  even = even * y - 1.0 / 720;
  even = even * y + 1.0 / 24;
  even = even * y - 0.5;
  const float sin_x = static_cast<float>(x + x * (odd * y)), cos_x = static_cast<float>(even * y + 1);
  const float s = quarters & 1 ? cos_x : sin_x, c = quarters & 1 ? sin_x : cos_x;
  *sine = quarters & 2 ? -s : s;
  *cosine = (quarters + 1) & 2 ? -c : c;
}

// Two independent normals from two words. float32 always, so a float64 run sees the same draws as a float32 one.
SPO_HD void box_muller(uint32_t w0, uint32_t w1, float *z0, float *z1) {
  const float u = uniform(w0), theta = 6.2831853071795864f * uniform(w1);
  float sine, cosine;
#ifdef __CUDA_ARCH__  // whose float64 may be 64 times slower
  const float log_u = logf(u);
  sincosf(theta, &sine, &cosine);
#else
  const float log_u = log_of(u);
  sine_cosine(theta, &sine, &cosine);
#endif
  const float radius = sqrtf(-2.0f * log_u);
  *z0 = radius * cosine;
  *z1 = radius * sine;
}

// The four words of one group. sample_key: (seed, iteration, prompt, step, candidate); child k is candidate + k.
SPO_HD void group_words(const int64_t sample_key[5], int64_t child, int64_t group, uint32_t words[4]) {
  const uint32_t key[2] = {static_cast<uint32_t>(sample_key[0]), static_cast<uint32_t>(sample_key[1])};
  const uint32_t counter[4] = {static_cast<uint32_t>(group), static_cast<uint32_t>(sample_key[4] + child),
                               static_cast<uint32_t>(sample_key[3]), static_cast<uint32_t>(sample_key[2])};
  philox4x32_10(counter, key, words);
}

// The words of groups first ... first + GROUPS - 1, a row a lane, by a loop that vectorises.
constexpr int64_t GROUPS = 64;
SPO_INLINE void strip_words(const int64_t *sample_key, int64_t child, int64_t first, uint32_t (&words)[4][GROUPS]) {
  for (int64_t j = 0; j < GROUPS; ++j) {
    uint32_t word[4];
    group_words(sample_key, child, first + j, word);
    for (int lane = 0; lane < 4; ++lane) words[lane][j] = word[lane];
  }
}

// The four normals of one group.
SPO_HD void group_normals(const int64_t sample_key[5], int64_t child, int64_t group, float z[4]) {
  uint32_t words[4];
  group_words(sample_key, child, group, words);
  box_muller(words[0], words[1], &z[0], &z[1]);
  box_muller(words[2], words[3], &z[2], &z[3]);
}

}  // namespace spo
#endif
