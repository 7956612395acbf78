// CPU: merging a LoRA's update into its base weights with stochastic rounding (merge.h).
#include "merge.h"

#include "isa.h"
#include "parallel.h"

namespace spo {
namespace {

constexpr int64_t CHUNK = 512;  // Philox groups of one piece

// Groups [begin, end), a strip at a time, of which each lane's elements are contiguous.
template <class M>
SPO_INLINE void merge_groups(const Merge<M> &merge, int64_t begin, int64_t end, int64_t q) {
  uint32_t words[4][GROUPS];
  for (int64_t first = begin; first < end; first += GROUPS) {
    strip_words(merge.key, 0, first, words);
    for (int lane = 0; lane < MERGE_LANES; ++lane) {
      const int64_t start = lane * q + first, count = std::min(std::min(GROUPS, end - first), merge.n - start);
      const uint32_t *word = words[lane % 4];
      for (int64_t j = 0; j < count; ++j) merge.element(start + j, lane, word[j]);
    }
  }
}

}  // namespace
}  // namespace spo

extern "C" int spo_merge(const spo_merge_args *args, void *) {
  return spo::with_merge(args, [](const auto &merge) {
    const int64_t q = spo::ceil_div(merge.n, spo::MERGE_LANES);
    return spo::guard([&] {
      spo::parallel_for(spo::ceil_div(q, spo::CHUNK), [&](int64_t piece) {
        const int64_t begin = piece * spo::CHUNK, end = std::min(begin + spo::CHUNK, q);
        spo::vectorised([&] SPO_LOOP { spo::merge_groups(merge, begin, end, q); });
      });
    });
  });
}
