// libcudnn.so: convolutions by its old interface and by the graph interface's one plan, without workspaces. Attention
// has no plan here: PyTorch is told not to use it (patches.py).
#include <cstdint>
#include <cstdio>
#include <cstring>

#include "nullcuda.h"

struct Handle {
  void *stream;
};

API size_t cudnnGetVersion() { return 91900; }
API size_t cudnnGetCudartVersion() { return 13000; }
API const char *cudnnGetErrorString(int) { return "the null GPU's cuDNN"; }
API void cudnnGetLastErrorString(char *text, size_t size) { snprintf(text, size, "none"); }
API int cudnnGetProperty(int part, int *value) { return *value = part == 0 ? 9 : part == 1 ? 19 : 0, 0; }
API int cudnnCreate(Handle **h) { return *h = new Handle{}, 0; }
API int cudnnSetStream(Handle *h, void *stream) { return h->stream = stream, 0; }
API int cudnnGetStream(Handle *h, void **stream) { return *stream = h->stream, 0; }

// ---- graph interface
API int cudnnBackendCreateDescriptor(int type, void **d) {
  bool unknown = type == 18 || type == 19 || type > 33;  // not of a convolution
  *d = unknown ? nullptr : new char[256]();
  return unknown ? 3000 /* CUDNN_STATUS_NOT_SUPPORTED */ : 0;
}

API int cudnnBackendDestroyDescriptor(void *d) { return delete[] (char *)d, 0; }

API int cudnnBackendGetAttribute(void *, int name, int type, int64_t requested, int64_t *count, void *out) {
  const int HEURISTIC_RESULTS = 202, PLAN_FIRST = 400, PLAN_LAST = 403, INT64 = 3;
  bool of_plan = name >= PLAN_FIRST && name <= PLAN_LAST;  // handle, configuration, workspace size, ...
  if (of_plan && out && requested > 0) memset(out, 0, 8);
  if (name != HEURISTIC_RESULTS && !of_plan && out && requested == 1 && type == INT64) *(int64_t *)out = 0;
  if (count) *count = name == HEURISTIC_RESULTS || of_plan;
  return 0;
}

API int cudnnBackendExecute(Handle *h, void *, void *) {
  return nullcuda_work(LAUNCH, "cudnnBackendExecute", h->stream, 1), 0;
}

// ---- old interface
struct Performance {  // cudnnConvolutionFwdAlgoPerf_t and its like
  int algorithm, status;
  float time;
  size_t memory;
  int determinism, math, reserved[3];
};

#define ALGORITHM(direction)                                                                                        \
  API int cudnnGetConvolution##direction##Algorithm_v7(void *, void *, void *, void *, void *, int, int *returned, \
                                                       Performance *p) {                                           \
    *p = {1, 0, 1.0f, 0, 0, 1};                                                                                    \
    return *returned = 1, 0;                                                                                       \
  }                                                                                                                \
  API int cudnnGetConvolution##direction##WorkspaceSize(void *, void *, void *, void *, void *, int, size_t *n) {  \
    return *n = 0, 0;                                                                                              \
  }                                                                                                                \
  API int cudnnConvolution##direction(Handle *h) {                                                                 \
    return nullcuda_work(LAUNCH, "cudnnConvolution" #direction, h->stream, 1), 0;                                  \
  }
ALGORITHM(Forward)
ALGORITHM(BackwardData)
ALGORITHM(BackwardFilter)
