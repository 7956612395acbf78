// What the parts of libcudart.so share.
#pragma once
#include <cuda_runtime_api.h>

#include <mutex>
#include <string>
#include <unordered_map>
#include <unordered_set>

#include "nullcuda.h"

using Name = const std::string *;  // each text once: counting 170,000 launches compares no strings
using Counts = std::unordered_map<Name, long>;

extern std::recursive_mutex mutex;
using Lock = std::lock_guard<std::recursive_mutex>;

struct Graph {
  int number;
  Counts nodes[KINDS];
  long size = 0;
};

struct Capture {
  Graph *graph;
  cudaStreamCaptureMode mode;
  unsigned long long id;
  bool broken = false;
  std::unordered_set<struct Stream *> streams;
};

struct Stream {
  int priority = 0;
  Capture *capture = nullptr;
};

extern Capture *capturing;  // one at a time is enough here

Name named(const std::string &text);
void count(Kind kind, Name what, long n = 1);
void count_replay(Graph *graph);
bool work(Kind kind, Name what, Stream *stream, long n = 1);
void fault(const std::string &what);
Stream *stream_of(void *handle);
cudaError_t answer(cudaError_t error);  // remembered for cudaGetLastError
size_t total_memory();

constexpr int SHARED_BYTES = 232448;  // that a block of an H200 may ask for
