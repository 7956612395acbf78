// CPU: merging a LoRA's update into its base weights with stochastic rounding (merge.h).
#include "merge.h"

#include "parallel.h"

namespace {
constexpr int64_t CHUNK = 512;  // Philox groups of one piece
}

extern "C" int spo_merge(int dtype, const void *weight, const float *delta, const int64_t *key, int64_t n, void *out,
                         void *) {
  return spo::dispatch_merge(dtype, weight, delta, key, n, out, [&](auto merge) {
    const int64_t q = spo::ceil_div(n, spo::MERGE_LANES);
    return spo::guard([&] {
      spo::parallel_for(spo::ceil_div(q, CHUNK), [&](int64_t piece) {
        for (int64_t group = piece * CHUNK; group < std::min((piece + 1) * CHUNK, q); ++group) merge.group(group, q);
      });
    });
  });
}
