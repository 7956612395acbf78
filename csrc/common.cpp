// Compiled into both libraries: version, error texts, threads, instruction set, and Philox for its known-answer test.
#include "common.h"

#include <atomic>

#include "isa.h"

#ifdef SPO_WITH_CUDA
#include <cuda_runtime_api.h>
#endif

namespace spo {
std::atomic<int> num_threads{0};  // 0: one per processor

namespace {

int best_isa() {
#ifdef SPO_X86
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl"))
    return SPO_ISA_AVX512;
  if (__builtin_cpu_supports("avx2")) return SPO_ISA_AVX2;
#endif
  return SPO_ISA_PLAIN;
}

}  // namespace

std::atomic<int> isa{best_isa()};

}  // namespace spo

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
    case SPO_ERROR_ISA: return "this processor, or this build of the library, lacks that instruction set";
    default: return "unknown error code";
  }
}

int spo_set_num_threads(int num_threads) {
  if (num_threads < 0) return SPO_ERROR_SHAPE;
  spo::num_threads.store(num_threads);
  return SPO_OK;
}

int spo_set_isa(int isa) {
  const int best = spo::best_isa();
  if (isa < SPO_ISA_BEST || isa > best) return SPO_ERROR_ISA;
  spo::isa.store(isa == SPO_ISA_BEST ? best : isa);
  return SPO_OK;
}

int spo_philox(const uint32_t counter[4], const uint32_t key[2], uint32_t out[4]) {
  if (counter == nullptr || key == nullptr || out == nullptr) return SPO_ERROR_NULL;
  spo::philox4x32_10(counter, key, out);
  return SPO_OK;
}

}  // extern "C"
