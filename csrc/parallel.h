// CPU only: work is cut into pieces whose borders depend on the shapes alone, and one thread computes a piece, so the
// number of threads never shows in the result.
//
// Threads of our own, not libgomp's: torch brings a copy of libgomp in its wheel, and a second one beside it keeps a
// second pool of waiting threads, makes the wheel depend on the machine's libgomp, and hangs in a forked child (a data
// loader's worker) once the parent has used it. OpenMP's simd pragmas need no runtime (-fopenmp-simd) and are used.
#ifndef SPO_FAST_PARALLEL_H
#define SPO_FAST_PARALLEL_H

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <exception>
#include <new>
#include <thread>
#include <vector>

#include "spo_fast.h"

namespace spo {

extern std::atomic<int> num_threads;

constexpr int64_t MIN_PIECES_PER_THREAD = 8;  // of a few microseconds each: less would not pay for starting a thread

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Runs piece(0) ... piece(num_pieces - 1), contiguous runs of them on each thread.
template <class F>
void parallel_for(int64_t num_pieces, F piece, int64_t min_pieces = MIN_PIECES_PER_THREAD) {
  const int wanted =
      num_threads.load() > 0 ? num_threads.load() : static_cast<int>(std::thread::hardware_concurrency());
  const int64_t count = std::max<int64_t>(1, std::min<int64_t>(wanted, num_pieces / min_pieces));
  const auto run = [&](int64_t worker) {
    for (int64_t i = num_pieces * worker / count; i < num_pieces * (worker + 1) / count; ++i) piece(i);
  };
  std::vector<std::thread> threads;
  threads.reserve(static_cast<size_t>(count));
  for (int64_t worker = 1; worker < count; ++worker) {
    try {
      threads.emplace_back(run, worker);
    } catch (const std::exception &) {  // no more threads to be had: do its share here
      run(worker);
    }
  }
  run(0);
  for (auto &thread : threads) thread.join();
}

// Nothing may be thrown through a C interface.
template <class F>
int guard(F f) {
  try {
    f();
  } catch (const std::bad_alloc &) {
    return SPO_ERROR_MEMORY;
  }
  return SPO_OK;
}

}  // namespace spo
#endif
