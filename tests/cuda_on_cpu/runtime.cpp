// Blocks, threads, barriers and shuffles of cuda_runtime_api.h.
#include "cuda_runtime_api.h"

#include <ucontext.h>

#include <deque>
#include <memory>
#include <vector>

dim3 threadIdx, blockIdx;

namespace {

constexpr unsigned WARP = 32;
constexpr size_t STACK_BYTES = 1 << 16;
constexpr uint64_t NOTHING = ~0ull;  // of a lane that takes no part: NaN in either float type

enum class State { READY, AT_BARRIER, AT_SHUFFLE, DONE };

struct Fibre {
  ucontext_t context;
  std::unique_ptr<char[]> stack{new char[STACK_BYTES]};  // untouched pages cost nothing
};

struct Thread {
  State state = State::READY;
  Fibre *fibre = nullptr;  // it waits in
  uint32_t mask = 0;       // of its shuffle
  unsigned partner = 0;    // lane it takes from
  uint64_t value = 0;      // given; after the shuffle, taken
};

cudaError_t last_error = cudaSuccess;
bool backwards = false;
const std::function<void()> *body;
std::vector<Thread> threads;  // of the block
unsigned begun, current;      // threads that have started; the one that runs
std::deque<Fibre> fibres;     // kept: contexts must not move
ucontext_t scheduler;

unsigned in_order(unsigned i, unsigned count) { return backwards ? count - 1 - i : i; }

void enter(unsigned thread, Fibre *fibre) {
  current = threadIdx.x = thread;
  threads[thread].fibre = fibre;
}

// A thread that ends without having waited leaves its fibre to the next, so most kernels need one.
void run_threads(unsigned fibre) {
  while (begun < threads.size()) {
    enter(in_order(begun++, static_cast<unsigned>(threads.size())), &fibres[fibre]);
    (*body)();
    threads[current].state = State::DONE;
  }
}

void wait(State state) {
  Thread &me = threads[current];
  me.state = state;
  swapcontext(&me.fibre->context, &scheduler);
}

void start(unsigned fibre) {
  if (fibre == fibres.size()) fibres.emplace_back();
  ucontext_t &context = fibres[fibre].context;
  getcontext(&context);
  context.uc_stack.ss_sp = fibres[fibre].stack.get();
  context.uc_stack.ss_size = STACK_BYTES;
  context.uc_link = &scheduler;
  makecontext(&context, reinterpret_cast<void (*)()>(run_threads), 1, fibre);
  swapcontext(&scheduler, &context);
}

void run_ready() {
  const auto count = static_cast<unsigned>(threads.size());
  for (unsigned i = 0; i < count; ++i) {
    Thread &thread = threads[in_order(i, count)];
    if (thread.state != State::READY) continue;
    enter(in_order(i, count), thread.fibre);
    swapcontext(&scheduler, &thread.fibre->context);
  }
}

// The lanes of a warp that wait at a shuffle of this mask.
uint32_t waiting(unsigned first, uint32_t mask) {
  uint32_t lanes = 0;
  for (unsigned lane = 0; lane < WARP && first + lane < threads.size(); ++lane) {
    const Thread &thread = threads[first + lane];
    if (thread.state == State::AT_SHUFFLE && thread.mask == mask) lanes |= 1u << lane;
  }
  return lanes;
}

// Exchanges values once all lanes of a mask, and no others, wait with it.
bool release_shuffle(unsigned first) {
  for (unsigned i = first; i < first + WARP && i < threads.size(); ++i) {
    const uint32_t mask = threads[i].mask;
    if (threads[i].state != State::AT_SHUFFLE || waiting(first, mask) != mask) continue;
    uint64_t given[WARP];
    for (unsigned lane = 0; lane < WARP; ++lane) given[lane] = mask >> lane & 1 ? threads[first + lane].value : NOTHING;
    for (unsigned lane = 0; lane < WARP; ++lane) {
      if (!(mask >> lane & 1)) continue;
      Thread &thread = threads[first + lane];
      thread.value = thread.partner < WARP ? given[thread.partner] : NOTHING;
      thread.state = State::READY;
    }
    return true;
  }
  return false;
}

// Whether any thread goes on.
bool release() {
  bool any = false;
  for (unsigned first = 0; first < threads.size(); first += WARP) any = release_shuffle(first) || any;
  if (any) return true;
  for (const Thread &thread : threads)
    if (thread.state != State::AT_BARRIER) return false;
  for (Thread &thread : threads) thread.state = State::READY;
  return true;
}

bool run_block(unsigned count) {
  threads.assign(count, Thread{});
  begun = 0;
  for (unsigned fibre = 0; begun < count; ++fibre) start(fibre);
  while (release()) run_ready();
  return std::all_of(threads.begin(), threads.end(), [](const Thread &thread) { return thread.state == State::DONE; });
}

}  // namespace

namespace cuda_on_cpu {

void launch(dim3 grid, dim3 block, size_t, cudaStream_t, const std::function<void()> &thread) {
  const bool grid_fits = grid.x > 0 && grid.x <= INT32_MAX && grid.y > 0 && grid.y <= 65535;
  if (!grid_fits || grid.z != 1 || block.x == 0 || block.x > 1024 || block.y != 1 || block.z != 1) {
    last_error = cudaErrorInvalidConfiguration;
    return;
  }
  body = &thread;
  for (unsigned y = 0; y < grid.y; ++y) {
    for (unsigned x = 0; x < grid.x; ++x) {
      blockIdx = dim3(in_order(x, grid.x), in_order(y, grid.y));
      if (!run_block(block.x)) {
        last_error = cudaErrorLaunchFailure;
        return;
      }
    }
  }
}

uint64_t exchange(uint32_t mask, uint64_t value, int lane_mask) {
  Thread &me = threads[current];
  me.mask = mask;
  me.partner = current % WARP ^ static_cast<unsigned>(lane_mask);
  me.value = value;
  wait(State::AT_SHUFFLE);
  return me.value;
}

}  // namespace cuda_on_cpu

void __syncthreads() { wait(State::AT_BARRIER); }

cudaError_t cudaGetLastError() {
  const cudaError_t error = last_error;
  last_error = cudaSuccess;
  return error;
}

const char *cudaGetErrorString(cudaError_t error) {
  switch (error) {
    case cudaSuccess: return "no error";
    case cudaErrorInvalidConfiguration: return "a grid or a block that no card takes";
    case cudaErrorIllegalAddress: return "an index outside an array of the kernel";
    default: return "a barrier or a shuffle that not every thread reaches";
  }
}

// Called by what -fsanitize=bounds puts before an access: arrays of threads and blocks, whose lengths the compiler knows.
extern "C" void __ubsan_handle_out_of_bounds(void *, void *) { last_error = cudaErrorIllegalAddress; }

// Last blocks and threads first: results must not depend on the order.
extern "C" __attribute__((visibility("default"))) void cuda_on_cpu_backwards(int yes) { backwards = yes != 0; }
