// libcublas.so: handles with a stream and two modes; a product is one launch on it.
#include "nullcuda.h"

struct Handle {
  void *stream;
  int math, pointer;
};

API int cublasCreate_v2(Handle **h) { return *h = new Handle{}, 0; }
API int cublasSetStream_v2(Handle *h, void *stream) { return h->stream = stream, 0; }
API int cublasGetMathMode(Handle *h, int *mode) { return *mode = h->math, 0; }
API int cublasSetMathMode(Handle *h, int mode) { return h->math = mode, 0; }
API int cublasGetPointerMode_v2(Handle *h, int *mode) { return *mode = h->pointer, 0; }
API int cublasSetPointerMode_v2(Handle *h, int mode) { return h->pointer = mode, 0; }
API int cublasGetVersion_v2(Handle *, int *version) { return *version = 130002, 0; }
API const char *cublasGetStatusString(int) { return "the null GPU's cuBLAS"; }

#define PRODUCT(name) \
  API int name(Handle *h) { return nullcuda_work(LAUNCH, #name, h->stream, 1), 0; }
PRODUCT(cublasGemmEx)
PRODUCT(cublasGemmStridedBatchedEx)
PRODUCT(cublasSgemm_v2)
PRODUCT(cublasSgemmStridedBatched)
PRODUCT(cublasDgemm_v2)
PRODUCT(cublasSgemv_v2)
