// CPU: merging a LoRA's update into its base weights with stochastic rounding (merge.h).
#include "merge.h"

#include "parallel.h"

namespace {
constexpr int64_t CHUNK = 512;  // Philox groups of one piece
}

extern "C" int spo_merge(const spo_merge_args *args, void *) {
  return spo::with_merge(args, [](const auto &merge) {
    const int64_t q = spo::ceil_div(merge.n, spo::MERGE_LANES);
    return spo::guard([&] {
      spo::parallel_for(spo::ceil_div(q, CHUNK), [&](int64_t piece) {
        for (int64_t group = piece * CHUNK; group < std::min((piece + 1) * CHUNK, q); ++group) merge.group(group, q);
      });
    });
  });
}
