// libnvrtc.so: compiles nothing, and says so.
#include "nullcuda.h"

API int nvrtcVersion(int *major, int *minor) { return *major = 13, *minor = 0, 0; }
API const char *nvrtcGetErrorString(int) { return "the null GPU has no run-time compiler"; }
API int nvrtcCompileProgram() { return 1; }
API int nvrtcGetProgramLogSize(void *, size_t *size) { return *size = 1, 0; }
API int nvrtcGetProgramLog(void *, char *text) { return *text = 0; }
