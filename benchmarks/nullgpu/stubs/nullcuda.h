// What the stubs share: a ledger of all that was asked of the device that is not there (ledger.cpp).
#pragma once
#include <cstddef>

#define API extern "C" __attribute__((visibility("default")))

// how something was asked; the names that a dump gives them are in ledger.cpp
enum Kind { LAUNCH, COPY, BYTES, CALL, FAULT, KINDS };

API void nullcuda_count(int kind, const char *what, long n);
API void nullcuda_fault(const char *what);

// Work given to a stream. True: it was recorded into a graph under capture, and must not run now.
API bool nullcuda_work(int kind, const char *what, void *stream, long n);

// Whether a call is refused because a capture is under way; a fault, and it breaks the capture.
API bool nullcuda_refused(const char *what);

// Whether an H200 refuses a launch of this shape; a fault.
API bool nullcuda_bad_launch(const char *kernel, const unsigned grid[3], const unsigned block[3], size_t shared);

API int nullcuda_attribute(int attribute);  // of cudaDeviceAttr and CUdevice_attribute, which number alike

// Memory. Each returns a cudaError_t, whose numbers the driver shares.
API bool nullcuda_on_device(const void *p);
API int nullcuda_allocate(void **p, size_t bytes);
API int nullcuda_free(void *p);
API void nullcuda_memory(size_t *free_bytes, size_t *total_bytes);
API int nullcuda_reserve(void **p, size_t bytes);  // addresses alone
API int nullcuda_unreserve(void *p, size_t bytes);
API int nullcuda_create(void **block, size_t bytes);  // memory without an address
API int nullcuda_release(void *block);
API int nullcuda_map(void *p, size_t bytes, void *block);
API int nullcuda_unmap(void *p, size_t bytes);
