// libcupti.so: there is nothing to profile.
#include "nullcuda.h"

API int cuptiGetVersion(unsigned *version) { return *version = 130000, 0; }
API int cuptiSubscribe() { return 1; }
API int cuptiGetResultString(int, const char **text) { return *text = "the null GPU's CUPTI", 0; }
