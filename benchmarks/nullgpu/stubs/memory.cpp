// Device memory: pages of the host that cost nothing until somebody writes into them, and copies between them.
#include <sys/mman.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <map>

#include "internal.h"

namespace {
constexpr size_t MIB = 1 << 20;
constexpr size_t GRANULE = 2 * MIB;  // what the driver hands out
constexpr size_t CONTEXT = 500 * MIB;
// Larger copies are counted, not made: the numbers that a host reads back are few, and weights would fill its memory.
constexpr size_t COPIED = 4 * MIB;

struct Block {
  size_t bytes;
  int uses = 1;  // its creator's, and one for each address it is mapped at
};
struct Mapping {
  size_t bytes;
  Block *block;  // null: of nullcuda_allocate
};

std::map<char *, Mapping> mapped;
size_t in_use = 0;
size_t peak = 0;

void *pages(void *at, size_t bytes, int protection) {
  int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | (at ? MAP_FIXED : 0);
  void *p = mmap(at, bytes, protection, flags, -1, 0);
  if (p != MAP_FAILED) madvise(p, bytes, MADV_NOHUGEPAGE);  // one number written would cost 2 MiB
  return p == MAP_FAILED ? nullptr : p;
}

bool take(size_t bytes) {
  if (in_use + CONTEXT + bytes > total_memory()) return false;
  in_use += bytes;
  peak = std::max(peak, in_use);
  return true;
}

void let_go(Block *block) {
  if (--block->uses) return;
  in_use -= block->bytes;
  delete block;
}

// Whole pages of zeros are given back: written, they would take memory.
void fill(void *p, int value, size_t bytes) {
  constexpr size_t PAGE = 4096;
  size_t head = std::min((PAGE - (size_t)p % PAGE) % PAGE, bytes);
  size_t whole = (bytes - head) / PAGE * PAGE;
  char *middle = (char *)p + head;
  if (value != 0 || !whole) {
    memset(p, value, bytes);
    return;
  }
  memset(p, 0, head);
  madvise(middle, whole, MADV_DONTNEED);
  memset(middle + whole, 0, bytes - head - whole);
}

cudaError_t copy(void *to, const void *from, size_t bytes, Stream *stream) {
  static const Name DIRECTIONS[2][2] = {{named("memcpy H2H"), named("memcpy D2H")},
                                        {named("memcpy H2D"), named("memcpy D2D")}};
  bool to_device = nullcuda_on_device(to), from_device = nullcuda_on_device(from);
  Name direction = DIRECTIONS[to_device][from_device];
  work(BYTES, direction, stream, bytes);
  if (work(COPY, direction, stream)) {
    if (!to_device || !from_device) fault(*direction + " inside a capture: each replay uses the same host address");
  } else if (bytes <= COPIED) {
    memmove(to, from, bytes);
  }
  return cudaSuccess;
}
}  // namespace

size_t total_memory() {
  static const char *gib = getenv("NULLCUDA_GIB");
  static const size_t bytes = gib ? (size_t)(atof(gib) * 1024 * MIB) : 150110011392;  // an H200's
  return bytes;
}

API void nullcuda_memory(size_t *free_bytes, size_t *total_bytes) {
  Lock lock(mutex);
  *total_bytes = total_memory();
  *free_bytes = total_memory() - CONTEXT - in_use;
}

API size_t nullcuda_peak(bool reset) {
  Lock lock(mutex);
  size_t was = peak;
  if (reset) peak = in_use;
  return was;
}

API bool nullcuda_on_device(const void *p) {
  Lock lock(mutex);
  auto after = mapped.upper_bound((char *)p);
  if (after == mapped.begin()) return false;
  auto &[start, mapping] = *std::prev(after);
  return (char *)p < start + mapping.bytes;
}

// ---- blocks with an address: cudaMalloc, cuMemAlloc
API int nullcuda_allocate(void **p, size_t bytes) {
  Lock lock(mutex);
  static const Name NAME = named("cudaMalloc");
  *p = nullptr;
  if (nullcuda_refused("cudaMalloc")) return cudaErrorStreamCaptureUnsupported;
  bytes = std::max((bytes + GRANULE - 1) / GRANULE, (size_t)1) * GRANULE;
  if (!take(bytes)) return cudaErrorMemoryAllocation;
  *p = pages(nullptr, bytes, PROT_READ | PROT_WRITE);
  mapped[(char *)*p] = {bytes, nullptr};
  count(CALL, NAME);
  return *p ? cudaSuccess : cudaErrorMemoryAllocation;
}

API int nullcuda_free(void *p) {
  Lock lock(mutex);
  static const Name NAME = named("cudaFree");
  if (!p) return cudaSuccess;
  if (nullcuda_refused("cudaFree")) return cudaErrorStreamCaptureUnsupported;
  auto found = mapped.find((char *)p);
  if (found == mapped.end() || found->second.block) return cudaErrorInvalidValue;
  munmap(p, found->second.bytes);
  in_use -= found->second.bytes;
  mapped.erase(found);
  count(CALL, NAME);
  return cudaSuccess;
}

// ---- addresses and blocks apart (expandable segments): a block counts until it is neither held nor mapped
API int nullcuda_reserve(void **p, size_t bytes) {
  *p = pages(nullptr, bytes, PROT_NONE);
  return *p ? cudaSuccess : cudaErrorMemoryAllocation;
}

API int nullcuda_unreserve(void *p, size_t bytes) {
  munmap(p, bytes);
  return cudaSuccess;
}

API int nullcuda_create(void **block, size_t bytes) {
  Lock lock(mutex);
  static const Name NAME = named("cuMemCreate");
  if (bytes % GRANULE) return cudaErrorInvalidValue;
  if (!take(bytes)) return cudaErrorMemoryAllocation;
  *block = new Block{bytes};
  count(CALL, NAME);
  return cudaSuccess;
}

API int nullcuda_release(void *block) {
  Lock lock(mutex);
  let_go((Block *)block);
  return cudaSuccess;
}

API int nullcuda_map(void *p, size_t bytes, void *handle) {
  Lock lock(mutex);
  auto *block = (Block *)handle;
  if (bytes != block->bytes || nullcuda_on_device(p)) return cudaErrorInvalidValue;
  if (!pages(p, bytes, PROT_READ | PROT_WRITE)) return cudaErrorMemoryAllocation;
  block->uses++;
  mapped[(char *)p] = {bytes, block};
  return cudaSuccess;
}

API int nullcuda_unmap(void *p, size_t bytes) {
  Lock lock(mutex);
  static const Name NAME = named("cuMemUnmap");
  auto first = mapped.find((char *)p), after = mapped.lower_bound((char *)p + bytes);
  if (first == mapped.end()) return cudaErrorInvalidValue;
  for (auto it = first; it != after; it++) let_go(it->second.block);
  mapped.erase(first, after);
  pages(p, bytes, PROT_NONE);
  count(CALL, NAME);
  return cudaSuccess;
}

// ---- the runtime's functions
API cudaError_t cudaMalloc(void **p, size_t bytes) { return answer((cudaError_t)nullcuda_allocate(p, bytes)); }
API cudaError_t cudaMallocAsync(void **p, size_t bytes, cudaStream_t) { return cudaMalloc(p, bytes); }
API cudaError_t cudaMallocManaged(void **p, size_t bytes, unsigned) { return cudaMalloc(p, bytes); }
API cudaError_t cudaFree(void *p) { return answer((cudaError_t)nullcuda_free(p)); }
API cudaError_t cudaFreeAsync(void *p, cudaStream_t) { return cudaFree(p); }

API cudaError_t cudaMemGetInfo(size_t *free_bytes, size_t *total_bytes) {
  nullcuda_memory(free_bytes, total_bytes);
  return cudaSuccess;
}

API cudaError_t cudaHostAlloc(void **p, size_t bytes, unsigned) {
  static const Name NAME = named("cudaHostAlloc");
  if (nullcuda_refused("cudaHostAlloc")) return answer(cudaErrorStreamCaptureUnsupported);
  count(CALL, NAME);
  *p = aligned_alloc(4096, (bytes + 4095) / 4096 * 4096);
  return cudaSuccess;
}

API cudaError_t cudaFreeHost(void *p) {
  free(p);
  return cudaSuccess;
}

API cudaError_t cudaPointerGetAttributes(cudaPointerAttributes *a, const void *p) {
  *a = {};
  bool on_device = nullcuda_on_device(p);
  a->type = on_device ? cudaMemoryTypeDevice : cudaMemoryTypeUnregistered;
  (on_device ? a->devicePointer : a->hostPointer) = (void *)p;
  return cudaSuccess;
}

API cudaError_t cudaMemcpyAsync(void *to, const void *from, size_t bytes, cudaMemcpyKind, cudaStream_t stream) {
  return copy(to, from, bytes, stream_of(stream));
}

API cudaError_t cudaMemcpyPeerAsync(void *to, int, const void *from, int, size_t bytes, cudaStream_t stream) {
  return copy(to, from, bytes, stream_of(stream));
}

API cudaError_t cudaMemcpy(void *to, const void *from, size_t bytes, cudaMemcpyKind) {
  static const Name NAME = named("cudaMemcpy");
  if (nullcuda_refused("cudaMemcpy")) return answer(cudaErrorStreamCaptureUnsupported);
  count(CALL, NAME);
  return copy(to, from, bytes, stream_of(nullptr));
}

API cudaError_t cudaMemcpy2DAsync(void *to, size_t, const void *from, size_t, size_t width, size_t height,
                                  cudaMemcpyKind, cudaStream_t stream) {
  static const Name NAME = named("memcpy 2D");
  work(BYTES, NAME, stream_of(stream), width * height);
  work(COPY, NAME, stream_of(stream));
  return cudaSuccess;
}

API cudaError_t cudaMemsetAsync(void *p, int value, size_t bytes, cudaStream_t stream) {
  static const Name NAME = named("memset");
  bool now = !work(LAUNCH, NAME, stream_of(stream));
  if (now && nullcuda_on_device(p) && (bytes <= COPIED || value == 0)) fill(p, value, bytes);
  return cudaSuccess;
}

API cudaError_t cudaMemset(void *p, int value, size_t bytes) { return cudaMemsetAsync(p, value, bytes, nullptr); }

API cudaError_t cudaMemPrefetchAsync(const void *, size_t, cudaMemLocation, unsigned, cudaStream_t stream) {
  static const Name NAME = named("prefetch");
  work(COPY, NAME, stream_of(stream));
  return cudaSuccess;
}

API cudaError_t cudaMemPoolGetAttribute(cudaMemPool_t, cudaMemPoolAttr, void *value) {
  *(size_t *)value = 0;
  return cudaSuccess;
}

API cudaError_t cudaDeviceGetDefaultMemPool(cudaMemPool_t *pool, int) {
  *pool = (cudaMemPool_t)1;
  return cudaSuccess;
}

API cudaError_t cudaGetSymbolAddress(void **p, const void *) {
  static char room[1 << 16];
  *p = room;
  return cudaSuccess;
}
