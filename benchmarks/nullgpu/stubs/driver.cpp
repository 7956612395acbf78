// libcuda.so.1: what Triton's launcher, Inductor's and PyTorch ask of the driver. Functions that do nothing: build.py.
#include <cuda.h>
#include <elf.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>

#include "nullcuda.h"

namespace {
const CUcontext THE_CONTEXT = (CUcontext)0x1234;

struct Function {
  std::string name, label;  // label: with warps and registers, for the ledger
  int registers = 64, shared = 0, shared_asked = 49152;
};

// The registers and the static shared memory that ptxas wrote into the cubin. False: it has no such kernel.
bool read_cubin(const char *image, Function &function) {
  auto *header = (const Elf64_Ehdr *)image;
  auto *sections = (const Elf64_Shdr *)(image + header->e_shoff);
  const char *names = image + sections[header->e_shstrndx].sh_offset;
  bool found = false;
  for (int i = 0; i < header->e_shnum; i++) {
    std::string name = names + sections[i].sh_name;
    if (name == ".nv.shared." + function.name) function.shared = sections[i].sh_size;
    if (name != ".text." + function.name) continue;
    function.registers = sections[i].sh_info >> 24;
    found = true;
  }
  return found;
}

CUresult launch(CUfunction handle, const unsigned grid[3], const unsigned block[3], unsigned shared, CUstream stream) {
  auto *f = (Function *)handle;
  if (nullcuda_bad_launch(f->name.c_str(), grid, block, shared)) return CUDA_ERROR_INVALID_VALUE;
  unsigned threads = block[0] * block[1] * block[2];
  if (f->registers * threads > 65536) {
    nullcuda_fault(("more registers than a block can have: " + f->name).c_str());
    return CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES;
  }
  if ((int)shared > f->shared_asked) {
    nullcuda_fault(("dynamic shared memory beyond what cuFuncSetAttribute asked for: " + f->name).c_str());
    return CUDA_ERROR_INVALID_VALUE;
  }
  if (f->label.empty()) {
    std::string warps = std::to_string(threads / 32), registers = std::to_string(f->registers);
    f->label = f->name + " [" + warps + " warps, " + registers + " registers]";
  }
  nullcuda_work(LAUNCH, f->label.c_str(), stream, 1);
  return CUDA_SUCCESS;
}
}  // namespace

// ---- devices and contexts
API CUresult cuDriverGetVersion(int *version) { return *version = 13000, CUDA_SUCCESS; }
API CUresult cuDeviceGet(CUdevice *device, int number) { return *device = number, CUDA_SUCCESS; }
API CUresult cuDeviceGetCount(int *count) { return *count = 1, CUDA_SUCCESS; }
API CUresult cuCtxGetCurrent(CUcontext *context) { return *context = THE_CONTEXT, CUDA_SUCCESS; }
API CUresult cuCtxPopCurrent_v2(CUcontext *context) { return *context = THE_CONTEXT, CUDA_SUCCESS; }
API CUresult cuDevicePrimaryCtxRetain(CUcontext *context, CUdevice) { return *context = THE_CONTEXT, CUDA_SUCCESS; }
API CUresult cuCtxGetDevice(CUdevice *device) { return *device = 0, CUDA_SUCCESS; }
API CUresult cuCtxGetLimit(size_t *value, CUlimit) { return *value = 1 << 20, CUDA_SUCCESS; }

API CUresult cuDeviceGetName(char *name, int size, CUdevice) {
  snprintf(name, size, "NVIDIA H200");
  return CUDA_SUCCESS;
}

API CUresult cuDeviceGetAttribute(int *value, CUdevice_attribute attribute, CUdevice) {
  *value = nullcuda_attribute(attribute);
  return CUDA_SUCCESS;
}

API CUresult cuDeviceGetUuid(CUuuid *uuid, CUdevice) {
  for (int i = 0; i < 16; i++) uuid->bytes[i] = i + 1;
  return CUDA_SUCCESS;
}

API CUresult cuDevicePrimaryCtxGetState(CUdevice, unsigned *flags, int *active) {
  *flags = 0, *active = 1;
  return CUDA_SUCCESS;
}

API CUresult cuGetErrorString(CUresult error, const char **text) {
  static char words[64];
  snprintf(words, sizeof words, "the null driver's error %d", (int)error);
  *text = words;
  return CUDA_SUCCESS;
}

API CUresult cuGetErrorName(CUresult error, const char **text) { return cuGetErrorString(error, text); }

API CUresult cuCtxSynchronize() {
  nullcuda_count(CALL, "cuCtxSynchronize", 1);
  return CUDA_SUCCESS;
}

API CUresult cuStreamSynchronize(CUstream) {
  nullcuda_count(CALL, "cuStreamSynchronize", 1);
  return CUDA_SUCCESS;
}

// ---- kernels
API CUresult cuModuleLoadData(CUmodule *module, const void *image) {
  if (nullcuda_refused("cuModuleLoadData")) return CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED;
  nullcuda_count(CALL, "cuModuleLoadData", 1);
  *module = (CUmodule)image;
  return CUDA_SUCCESS;
}

API CUresult cuModuleLoadDataEx(CUmodule *module, const void *image, unsigned, CUjit_option *, void **) {
  size_t size = memcmp(image, ELFMAG, SELFMAG) ? strlen((const char *)image) + 1 : 0;
  if (!size) {  // the sections' table is a cubin's end
    auto *header = (const Elf64_Ehdr *)image;
    size = header->e_shoff + (size_t)header->e_shnum * header->e_shentsize;
    size = std::max(size, header->e_phoff + (size_t)header->e_phnum * header->e_phentsize);
  }
  return cuModuleLoadData(module, memcpy(malloc(size), image, size));  // the caller may free its own
}

API CUresult cuModuleLoad(CUmodule *module, const char *path) {
  FILE *file = fopen(path, "rb");
  if (!file) return CUDA_ERROR_FILE_NOT_FOUND;
  fseek(file, 0, SEEK_END);
  size_t size = ftell(file);
  rewind(file);
  char *image = (char *)malloc(size);
  bool whole = fread(image, 1, size, file) == size;
  fclose(file);
  return whole ? cuModuleLoadData(module, image) : CUDA_ERROR_INVALID_IMAGE;
}

API CUresult cuModuleGetFunction(CUfunction *function, CUmodule module, const char *name) {
  auto *f = new Function{name};
  bool is_cubin = !memcmp((const char *)module, ELFMAG, SELFMAG);
  if (is_cubin && !read_cubin((const char *)module, *f)) return CUDA_ERROR_NOT_FOUND;
  *function = (CUfunction)f;
  return CUDA_SUCCESS;
}

API CUresult cuModuleGetGlobal_v2(CUdeviceptr *, size_t *, CUmodule, const char *) { return CUDA_ERROR_NOT_FOUND; }

API CUresult cuFuncGetAttribute(int *value, CUfunction_attribute attribute, CUfunction handle) {
  auto *f = (Function *)handle;
  *value = attribute == CU_FUNC_ATTRIBUTE_NUM_REGS                ? f->registers
           : attribute == CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES     ? f->shared
           : attribute == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? 1024
           : attribute == CU_FUNC_ATTRIBUTE_BINARY_VERSION        ? 90
                                                                  : 0;
  return CUDA_SUCCESS;
}

API CUresult cuFuncSetAttribute(CUfunction handle, CUfunction_attribute attribute, int value) {
  auto *f = (Function *)handle;
  if (attribute == CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES) f->shared_asked = std::max(value, 49152);
  return CUDA_SUCCESS;
}

API CUresult cuLaunchKernel(CUfunction f, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz,
                            unsigned shared, CUstream stream, void **, void **) {
  const unsigned grid[] = {gx, gy, gz}, block[] = {bx, by, bz};
  return launch(f, grid, block, shared, stream);
}

API CUresult cuLaunchKernelEx(const CUlaunchConfig *c, CUfunction f, void **, void **) {
  const unsigned grid[] = {c->gridDimX, c->gridDimY, c->gridDimZ}, block[] = {c->blockDimX, c->blockDimY, c->blockDimZ};
  return launch(f, grid, block, c->sharedMemBytes, c->hStream);
}

API CUresult cuLaunchCooperativeKernel(CUfunction f, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by,
                                       unsigned bz, unsigned shared, CUstream stream, void **arguments) {
  return cuLaunchKernel(f, gx, gy, gz, bx, by, bz, shared, stream, arguments, nullptr);
}

API CUresult cuOccupancyMaxActiveBlocksPerMultiprocessor(int *blocks, CUfunction, int, size_t) {
  return *blocks = 2, CUDA_SUCCESS;
}

API CUresult cuOccupancyMaxActiveClusters(int *clusters, CUfunction, const CUlaunchConfig *) {
  return *clusters = 66, CUDA_SUCCESS;
}

// ---- memory
API CUresult cuMemAlloc_v2(CUdeviceptr *p, size_t bytes) { return (CUresult)nullcuda_allocate((void **)p, bytes); }
API CUresult cuMemFree_v2(CUdeviceptr p) { return (CUresult)nullcuda_free((void *)p); }

API CUresult cuMemGetInfo_v2(size_t *free_bytes, size_t *total) {
  return nullcuda_memory(free_bytes, total), CUDA_SUCCESS;
}

API CUresult cuDeviceTotalMem_v2(size_t *total, CUdevice) {
  size_t free_bytes;
  return cuMemGetInfo_v2(&free_bytes, total);
}

API CUresult cuMemGetAllocationGranularity(size_t *bytes, const CUmemAllocationProp *,
                                           CUmemAllocationGranularity_flags) {
  return *bytes = 2 << 20, CUDA_SUCCESS;
}

API CUresult cuMemAddressReserve(CUdeviceptr *p, size_t bytes, size_t, CUdeviceptr, unsigned long long) {
  return (CUresult)nullcuda_reserve((void **)p, bytes);
}

API CUresult cuMemAddressFree(CUdeviceptr p, size_t bytes) { return (CUresult)nullcuda_unreserve((void *)p, bytes); }

API CUresult cuMemCreate(CUmemGenericAllocationHandle *block, size_t bytes, const CUmemAllocationProp *,
                         unsigned long long) {
  return (CUresult)nullcuda_create((void **)block, bytes);
}

API CUresult cuMemMap(CUdeviceptr p, size_t bytes, size_t, CUmemGenericAllocationHandle block, unsigned long long) {
  return (CUresult)nullcuda_map((void *)p, bytes, (void *)block);
}

API CUresult cuMemUnmap(CUdeviceptr p, size_t bytes) { return (CUresult)nullcuda_unmap((void *)p, bytes); }
API CUresult cuMemRelease(CUmemGenericAllocationHandle block) { return (CUresult)nullcuda_release((void *)block); }

API CUresult cuMemsetD32Async(CUdeviceptr, unsigned, size_t, CUstream stream) {
  nullcuda_work(LAUNCH, "memset", stream, 1);
  return CUDA_SUCCESS;
}

API CUresult cuStreamWriteValue32_v2(CUstream stream, CUdeviceptr, cuuint32_t, unsigned) {
  nullcuda_work(LAUNCH, "cuStreamWriteValue32", stream, 1);
  return CUDA_SUCCESS;
}

API CUresult cuPointerGetAttribute(void *value, CUpointer_attribute attribute, CUdeviceptr p) {
  bool asks_device = attribute == CU_POINTER_ATTRIBUTE_DEVICE_POINTER || attribute == CU_POINTER_ATTRIBUTE_MEMORY_TYPE;
  if (asks_device && !nullcuda_on_device((void *)p)) return CUDA_ERROR_INVALID_VALUE;
  if (attribute == CU_POINTER_ATTRIBUTE_DEVICE_POINTER) *(CUdeviceptr *)value = p;
  else if (attribute == CU_POINTER_ATTRIBUTE_CONTEXT) *(CUcontext *)value = THE_CONTEXT;
  else *(unsigned *)value = asks_device ? CU_MEMORYTYPE_DEVICE : 0;
  return CUDA_SUCCESS;
}
