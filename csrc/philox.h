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

#ifdef __CUDACC__
#define SPO_HD __host__ __device__ __forceinline__
#else
#define SPO_HD inline
#endif

namespace spo {

SPO_HD void philox4x32_10(const uint32_t counter[4], const uint32_t key[2], uint32_t out[4]) {
  uint32_t c0 = counter[0], c1 = counter[1], c2 = counter[2], c3 = counter[3];
  uint32_t k0 = key[0], k1 = key[1];
#ifdef __CUDA_ARCH__
#pragma unroll
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

// Two independent normals from two words. float32 always, so a float64 run sees the same draws as a float32 one.
SPO_HD void box_muller(uint32_t w0, uint32_t w1, float *z0, float *z1) {
  const float radius = sqrtf(-2.0f * logf(uniform(w0)));
  const float theta = 6.2831853071795864f * uniform(w1);
#ifdef __CUDA_ARCH__
  float sine, cosine;
  sincosf(theta, &sine, &cosine);
#else
  const float sine = sinf(theta), cosine = cosf(theta);
#endif
  *z0 = radius * cosine;
  *z1 = radius * sine;
}

// The four normals of one group. sample_key: (seed, iteration, prompt, step, candidate); child k is candidate + k.
SPO_HD void group_normals(const int64_t sample_key[5], int64_t child, int64_t group, float z[4]) {
  const uint32_t key[2] = {static_cast<uint32_t>(sample_key[0]), static_cast<uint32_t>(sample_key[1])};
  const uint32_t counter[4] = {static_cast<uint32_t>(group), static_cast<uint32_t>(sample_key[4] + child),
                               static_cast<uint32_t>(sample_key[3]), static_cast<uint32_t>(sample_key[2])};
  uint32_t words[4];
  philox4x32_10(counter, key, words);
  box_muller(words[0], words[1], &z[0], &z[1]);
  box_muller(words[2], words[3], &z[2], &z[3]);
}

}  // namespace spo
#endif
