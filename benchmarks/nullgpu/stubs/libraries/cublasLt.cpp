// libcublasLt.so: one algorithm for everything, without a workspace.
#include <cstdint>
#include <cstring>

#include "nullcuda.h"

API size_t cublasLtGetVersion() { return 130002; }

API int cublasLtMatmulAlgoGetHeuristic(void *, void *, void *, void *, void *, void *, void *, int, char *results,
                                       int *returned) {
  memset(results, 0, 128);  // one cublasLtMatmulHeuristicResult_t
  return *returned = 1, 0;
}

API int cublasLtMatmul(void *, void *, const void *, const void *, void *, const void *, void *, const void *,
                       const void *, void *, void *, void *, const void *, void *, size_t, void *stream) {
  return nullcuda_work(LAUNCH, "cublasLtMatmul", stream, 1), 0;
}
