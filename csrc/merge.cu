// CUDA: merging a LoRA's update into its base weights with stochastic rounding (merge.h). 8 bytes an element in 16 bit.
#include "merge.h"

#include <cuda_runtime_api.h>

namespace {

constexpr int THREADS = 256;

// One thread a Philox group: eight elements, q apart, so that a warp's accesses are contiguous in each lane.
template <class M>
__global__ void __launch_bounds__(THREADS) merge_kernel(const spo::Merge<M> merge, int64_t q) {
  const int64_t group = static_cast<int64_t>(blockIdx.x) * THREADS + threadIdx.x;
  if (group < q) merge.group(group, q);
}

template <class M>
int launch(const spo::Merge<M> &merge, cudaStream_t stream) {
  const int64_t q = (merge.n + spo::MERGE_LANES - 1) / spo::MERGE_LANES;
  merge_kernel<<<static_cast<unsigned>((q + THREADS - 1) / THREADS), THREADS, 0, stream>>>(merge, q);
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? SPO_OK : SPO_ERROR_CUDA + static_cast<int>(error);
}

}  // namespace

extern "C" int spo_merge(int dtype, const void *weight, const float *delta, const int64_t *key, int64_t n, void *out,
                         void *stream) {
  return spo::dispatch_merge(dtype, weight, delta, key, n, out, [&](auto merge) {
    return launch(merge, static_cast<cudaStream_t>(stream));
  });
}
