// Compiled into both libraries: version, error texts, thread count, and Philox for its known-answer test.
#include "common.h"

#include <atomic>

#ifdef SPO_WITH_CUDA
#include <cuda_runtime_api.h>
#endif

namespace spo {
std::atomic<int> num_threads{0};  // 0: one per processor
}

extern "C" {

int spo_abi_version(void) { return SPO_ABI_VERSION; }

const char *spo_error_string(int code) {
#ifdef SPO_WITH_CUDA
  if (code >= SPO_ERROR_CUDA) return cudaGetErrorString(static_cast<cudaError_t>(code - SPO_ERROR_CUDA));
#endif
  switch (code) {
    case SPO_OK: return "no error";
    case SPO_ERROR_DTYPE:
      return "unsupported dtype: network outputs float32, float64, bfloat16 or float16; latents float32 or float64";
    case SPO_ERROR_SHAPE:
      return "bad size: no negative counts, no empty samples, at most 65535 samples at a time on CUDA";
    case SPO_ERROR_NULL: return "a required pointer is NULL (children need noise or keys)";
    case SPO_ERROR_ROW: return "a row index lies outside the step table";
    case SPO_ERROR_STATE: return "a state index lies outside [0, number of states)";
    case SPO_ERROR_MEMORY: return "out of host memory";
    case SPO_ERROR_SIZE: return "the C library was built from other sources than this Python code: `pip install -e .` again";
    default: return "unknown error code";
  }
}

int spo_set_num_threads(int num_threads) {
  if (num_threads < 0) return SPO_ERROR_SHAPE;
  spo::num_threads.store(num_threads);
  return SPO_OK;
}

int spo_philox(const uint32_t counter[4], const uint32_t key[2], uint32_t out[4]) {
  if (counter == nullptr || key == nullptr || out == nullptr) return SPO_ERROR_NULL;
  spo::philox4x32_10(counter, key, out);
  return SPO_OK;
}

}  // extern "C"
