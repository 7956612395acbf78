// CUDA: merging a LoRA's update into its base weights with stochastic rounding (merge.h). 8 bytes an element in 16 bit.
#include "merge.h"

namespace {

// One thread a Philox group: eight elements, q apart, so that a warp's accesses are contiguous in each lane.
template <class M>
__global__ void __launch_bounds__(spo::THREADS) merge_kernel(const spo::Merge<M> merge, int64_t q) {
  const int64_t group = static_cast<int64_t>(blockIdx.x) * spo::THREADS + threadIdx.x;
  if (group < q) merge.group(group, q);
}

}  // namespace

extern "C" int spo_merge(const spo_merge_args *args, void *stream) {
  return spo::with_merge(args, [&](const auto &merge) {
    const int64_t q = (merge.n + spo::MERGE_LANES - 1) / spo::MERGE_LANES;
    merge_kernel<<<spo::blocks(q), spo::THREADS, 0, static_cast<cudaStream_t>(stream)>>>(merge, q);
    return spo::launch_error();
  });
}
