// The rest of libcudart.so: kernels and their launches, the device's properties, errors. What does nothing at all is not
// here: build.py makes the functions that PyTorch asks for and nobody wrote.
#include <dlfcn.h>

#include <cstdio>
#include <cstdlib>
#include <algorithm>
#include <cstring>
#include <map>
#include <utility>
#include <vector>

#include "internal.h"

namespace {
struct Kernel {
  Name name;
  int shared_asked = 49152;  // beyond that cudaFuncSetAttribute must ask
};
std::unordered_map<const void *, Kernel> kernels;  // by the address of their host function
thread_local cudaError_t last_error = cudaSuccess;

const char *const DEVICE = "NVIDIA H200";
const std::map<int, int> ATTRIBUTES = {
    {cudaDevAttrComputeCapabilityMajor, 9},
    {cudaDevAttrComputeCapabilityMinor, 0},
    {cudaDevAttrMultiProcessorCount, 132},
    {cudaDevAttrWarpSize, 32},
    {cudaDevAttrMaxThreadsPerBlock, 1024},
    {cudaDevAttrMaxBlockDimX, 1024},
    {cudaDevAttrMaxBlockDimY, 1024},
    {cudaDevAttrMaxBlockDimZ, 64},
    {cudaDevAttrMaxGridDimX, 2147483647},
    {cudaDevAttrMaxGridDimY, 65535},
    {cudaDevAttrMaxGridDimZ, 65535},
    {cudaDevAttrMaxThreadsPerMultiProcessor, 2048},
    {cudaDevAttrMaxBlocksPerMultiprocessor, 32},
    {cudaDevAttrMaxSharedMemoryPerBlock, 49152},
    {cudaDevAttrMaxSharedMemoryPerBlockOptin, SHARED_BYTES},
    {cudaDevAttrMaxSharedMemoryPerMultiprocessor, 233472},
    {cudaDevAttrReservedSharedMemoryPerBlock, 1024},
    {cudaDevAttrMaxRegistersPerBlock, 65536},
    {cudaDevAttrMaxRegistersPerMultiprocessor, 65536},
    {cudaDevAttrTotalConstantMemory, 65536},
    {cudaDevAttrTextureAlignment, 512},
    {cudaDevAttrL2CacheSize, 62914560},
    {cudaDevAttrClockRate, 1980000},
    {cudaDevAttrMemoryClockRate, 3201000},
    {cudaDevAttrGlobalMemoryBusWidth, 6144},
    {cudaDevAttrAsyncEngineCount, 3},
    {cudaDevAttrConcurrentKernels, 1},
    {cudaDevAttrUnifiedAddressing, 1},
    {cudaDevAttrManagedMemory, 1},
    {cudaDevAttrConcurrentManagedAccess, 1},
    {cudaDevAttrCooperativeLaunch, 1},
    {cudaDevAttrMemoryPoolsSupported, 1},
    {cudaDevAttrStreamPrioritiesSupported, 1},
    {cudaDevAttrCanUseHostPointerForRegisteredMem, 1},
    {cudaDevAttrCanMapHostMemory, 1},
    {102 /* CU_DEVICE_ATTRIBUTE_VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED */, 1},
    {120 /* cudaDevAttrClusterLaunch */, 1},
};

cudaError_t launch(const void *function, dim3 grid, dim3 block, size_t shared, cudaStream_t stream) {
  Lock lock(mutex);
  static const Name UNKNOWN = named("unknown kernel");
  Kernel &kernel = kernels.try_emplace(function, Kernel{UNKNOWN}).first->second;
  const unsigned g[] = {grid.x, grid.y, grid.z}, b[] = {block.x, block.y, block.z};
  if (nullcuda_bad_launch(kernel.name->c_str(), g, b, shared)) return answer(cudaErrorInvalidConfiguration);
  if ((int)shared > kernel.shared_asked) {
    fault("dynamic shared memory beyond what cudaFuncSetAttribute asked for: " + *kernel.name);
    return answer(cudaErrorInvalidValue);
  }
  work(LAUNCH, kernel.name, stream_of(stream));
  return cudaSuccess;
}
}  // namespace

cudaError_t answer(cudaError_t error) {
  if (error != cudaSuccess) last_error = error;
  return error;
}

API int nullcuda_attribute(int attribute) {
  auto found = ATTRIBUTES.find(attribute);
  return found == ATTRIBUTES.end() ? 0 : found->second;
}

API bool nullcuda_bad_launch(const char *kernel, const unsigned grid[3], const unsigned block[3], size_t shared) {
  bool empty = false, large = shared > (size_t)SHARED_BYTES || (long)block[0] * block[1] * block[2] > 1024;
  for (int i = 0; i < 3; i++) {
    empty |= !grid[i] || !block[i];
    large |= grid[i] > (unsigned)nullcuda_attribute(cudaDevAttrMaxGridDimX + i);
    large |= block[i] > (unsigned)nullcuda_attribute(cudaDevAttrMaxBlockDimX + i);
  }
  if (!empty && !large) return false;
  char shape[160];
  snprintf(shape, sizeof shape, "a launch with grid %u %u %u, block %u %u %u, %zu bytes of shared memory: ", grid[0],
           grid[1], grid[2], block[0], block[1], block[2], shared);
  fault(std::string(shape) + kernel);
  return true;
}

// ---- kernels, as nvcc's code registers and launches them
API void **__cudaRegisterFatBinary(void *) { return (void **)calloc(1, 64); }
API char __cudaInitModule(void **) { return 1; }

API void __cudaRegisterFunction(void **, const char *host, char *, const char *name, int, uint3 *, uint3 *, dim3 *,
                                dim3 *, int *) {
  Lock lock(mutex);
  kernels[host] = {named(name)};
}

struct Configuration {
  dim3 grid, block;
  size_t shared;
  void *stream;
};
static thread_local std::vector<Configuration> configurations;

API unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, void *stream) {
  configurations.push_back({grid, block, shared, stream});
  return 0;
}

API cudaError_t __cudaPopCallConfiguration(dim3 *grid, dim3 *block, size_t *shared, void *stream) {
  Configuration c = configurations.back();
  configurations.pop_back();
  *grid = c.grid, *block = c.block, *shared = c.shared, *(void **)stream = c.stream;
  return cudaSuccess;
}

API cudaError_t __cudaGetKernel(cudaKernel_t *kernel, const void *function) {
  *kernel = (cudaKernel_t)function;
  return cudaSuccess;
}

API cudaError_t cudaLaunchKernel(const void *f, dim3 grid, dim3 block, void **, size_t shared, cudaStream_t stream) {
  return launch(f, grid, block, shared, stream);
}

API cudaError_t __cudaLaunchKernel(cudaKernel_t f, dim3 grid, dim3 block, void **, size_t shared, cudaStream_t stream) {
  return launch((const void *)f, grid, block, shared, stream);
}

API cudaError_t cudaLaunchCooperativeKernel(const void *f, dim3 grid, dim3 block, void **, size_t shared,
                                            cudaStream_t stream) {
  return launch(f, grid, block, shared, stream);
}

API cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t *c, const void *f, void **) {
  return launch(f, c->gridDim, c->blockDim, c->dynamicSmemBytes, c->stream);
}

API cudaError_t cudaLaunchHostFunc(cudaStream_t stream, cudaHostFn_t function, void *data) {
  static const Name NAME = named("host function");
  if (!work(CALL, NAME, stream_of(stream))) function(data);
  return cudaSuccess;
}

API cudaError_t cudaStreamAddCallback(cudaStream_t stream, cudaStreamCallback_t function, void *data, unsigned) {
  static const Name NAME = named("callback");
  if (!work(CALL, NAME, stream_of(stream))) function(stream, cudaSuccess, data);
  return cudaSuccess;
}

API cudaError_t cudaFuncGetAttributes(cudaFuncAttributes *a, const void *) {
  *a = {};
  a->maxThreadsPerBlock = 1024, a->numRegs = 64, a->maxDynamicSharedSizeBytes = SHARED_BYTES;
  a->binaryVersion = a->ptxVersion = 90;
  return cudaSuccess;
}

API cudaError_t cudaFuncSetAttribute(const void *function, cudaFuncAttribute attribute, int value) {
  Lock lock(mutex);
  if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize) return cudaSuccess;
  if (value > SHARED_BYTES) {
    fault("cudaFuncSetAttribute: more shared memory than a block can have");
    return answer(cudaErrorInvalidValue);
  }
  auto found = kernels.find(function);
  if (found != kernels.end()) found->second.shared_asked = std::max(value, 49152);
  return cudaSuccess;
}

API cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int *blocks, const void *, int, size_t,
                                                                       unsigned) {
  *blocks = 2;
  return cudaSuccess;
}

API cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int *blocks, const void *, int, size_t) {
  *blocks = 2;
  return cudaSuccess;
}

// ---- the device
API cudaError_t cudaGetDeviceCount(int *count) { return *count = 1, cudaSuccess; }
API cudaError_t cudaGetDevice(int *device) { return *device = 0, cudaSuccess; }
API cudaError_t cudaSetDevice(int device) { return answer(device ? cudaErrorInvalidDevice : cudaSuccess); }
API cudaError_t cudaDriverGetVersion(int *version) { return *version = 13000, cudaSuccess; }
API cudaError_t cudaRuntimeGetVersion(int *version) { return *version = 13000, cudaSuccess; }
API cudaError_t cudaDeviceCanAccessPeer(int *can, int, int) { return *can = 0, cudaSuccess; }

API cudaError_t cudaDeviceGetStreamPriorityRange(int *least, int *greatest) {
  if (least) *least = 0;
  if (greatest) *greatest = -5;
  return cudaSuccess;
}

API cudaError_t cudaDeviceGetPCIBusId(char *id, int size, int) {
  snprintf(id, size, "0000:01:00.0");
  return cudaSuccess;
}

API cudaError_t cudaDeviceGetAttribute(int *value, cudaDeviceAttr attribute, int) {
  *value = nullcuda_attribute(attribute);
  return cudaSuccess;
}

API cudaError_t cudaGetDeviceProperties(cudaDeviceProp *p, int) {
  *p = {};
  strcpy(p->name, DEVICE);
  p->totalGlobalMem = total_memory();
  p->major = 9;
  p->multiProcessorCount = 132, p->warpSize = 32;
  p->maxThreadsPerBlock = 1024, p->maxThreadsPerMultiProcessor = 2048, p->maxBlocksPerMultiProcessor = 32;
  p->sharedMemPerBlock = 49152, p->sharedMemPerBlockOptin = SHARED_BYTES, p->sharedMemPerMultiprocessor = 233472;
  p->regsPerBlock = p->regsPerMultiprocessor = p->totalConstMem = 65536;
  p->l2CacheSize = 62914560, p->memoryBusWidth = 6144, p->textureAlignment = 512, p->pciBusID = 1;
  for (int i = 0; i < 3; i++) {
    p->maxGridSize[i] = nullcuda_attribute(cudaDevAttrMaxGridDimX + i);
    p->maxThreadsDim[i] = nullcuda_attribute(cudaDevAttrMaxBlockDimX + i);
  }
  p->concurrentKernels = p->managedMemory = p->unifiedAddressing = p->cooperativeLaunch = 1;
  p->concurrentManagedAccess = p->clusterLaunch = 1;
  for (int i = 0; i < 16; i++) p->uuid.bytes[i] = i + 1;
  return cudaSuccess;
}

// ---- errors
API cudaError_t cudaPeekAtLastError() { return last_error; }

API cudaError_t cudaGetLastError() { return std::exchange(last_error, cudaSuccess); }

API const char *cudaGetErrorString(cudaError_t error) {
  static thread_local char text[64];
  snprintf(text, sizeof text, "the null GPU's error %d", (int)error);
  return text;
}

API const char *cudaGetErrorName(cudaError_t error) { return cudaGetErrorString(error); }

// ---- the driver, as PyTorch finds it
API cudaError_t cudaGetDriverEntryPointByVersion(const char *name, void **function, unsigned, unsigned long long,
                                                 cudaDriverEntryPointQueryResult *result) {
  static void *driver = dlopen("libcuda.so.1", RTLD_NOW);
  *function = driver ? dlsym(driver, name) : nullptr;
  if (driver && !*function) *function = dlsym(driver, (std::string(name) + "_v2").c_str());
  if (result) *result = *function ? cudaDriverEntryPointSuccess : cudaDriverEntryPointSymbolNotFound;
  return cudaSuccess;
}
