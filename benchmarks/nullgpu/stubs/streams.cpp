// Streams, events and graphs. Nothing runs, so everything has always ended; what a capture forbids is refused.
#include <algorithm>
#include <ctime>
#include <utility>

#include "internal.h"

Capture *capturing = nullptr;

namespace {
Stream legacy;
thread_local cudaStreamCaptureMode mode_of_thread = cudaStreamCaptureModeGlobal;
int graphs = 0;
unsigned long long captures = 0;

struct Event {
  double ms = 0;
  Capture *capture = nullptr;
};

double now_ms() {
  timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return t.tv_sec * 1e3 + t.tv_nsec * 1e-6;
}

cudaError_t wait(Name what) {
  if (nullcuda_refused(what->c_str())) return answer(cudaErrorStreamCaptureUnsupported);
  count(CALL, what);
  return cudaSuccess;
}
}  // namespace

Stream *stream_of(void *handle) {
  bool is_default = !handle || handle == cudaStreamLegacy || handle == cudaStreamPerThread;
  return is_default ? &legacy : (Stream *)handle;
}

bool work(Kind kind, Name what, Stream *stream, long n) {
  Lock lock(mutex);
  if (Capture *c = stream->capture) {
    c->graph->nodes[kind][what] += n;
    c->graph->size += kind != BYTES;
    return true;
  }
  if (capturing) fault("on a stream that is not captured while another is: " + *what);
  count(kind, what, n);
  return false;
}

API bool nullcuda_work(int kind, const char *what, void *stream, long n) {
  return work((Kind)kind, named(what), stream_of(stream), n);
}

API bool nullcuda_refused(const char *what) {
  Lock lock(mutex);
  bool global = mode_of_thread == cudaStreamCaptureModeGlobal;
  if (!capturing || !global || capturing->mode != cudaStreamCaptureModeGlobal) return false;
  fault(std::string("not permitted while a stream is captured: ") + what);
  return capturing->broken = true;
}

// ---- streams
API cudaError_t cudaStreamCreateWithPriority(cudaStream_t *stream, unsigned, int priority) {
  *stream = (cudaStream_t) new Stream{priority};
  return cudaSuccess;
}

API cudaError_t cudaStreamCreate(cudaStream_t *stream) { return cudaStreamCreateWithPriority(stream, 0, 0); }

API cudaError_t cudaStreamGetPriority(cudaStream_t stream, int *priority) {
  *priority = stream_of(stream)->priority;
  return cudaSuccess;
}

API cudaError_t cudaStreamQuery(cudaStream_t stream) {
  bool refused = stream_of(stream)->capture || nullcuda_refused("cudaStreamQuery");
  return refused ? answer(cudaErrorStreamCaptureUnsupported) : cudaSuccess;
}

API cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
  static const Name NAME = named("cudaStreamSynchronize");
  if (!stream_of(stream)->capture) return wait(NAME);
  fault("cudaStreamSynchronize of a stream that is captured");
  return answer(cudaErrorStreamCaptureUnsupported);
}

API cudaError_t cudaDeviceSynchronize() {
  static const Name NAME = named("cudaDeviceSynchronize");
  return wait(NAME);
}

// ---- events
API cudaError_t cudaEventCreateWithFlags(cudaEvent_t *event, unsigned) {
  *event = (cudaEvent_t) new Event;
  return cudaSuccess;
}

API cudaError_t cudaEventCreate(cudaEvent_t *event) { return cudaEventCreateWithFlags(event, 0); }

API cudaError_t cudaEventDestroy(cudaEvent_t event) {
  delete (Event *)event;
  return cudaSuccess;
}

API cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) {
  Lock lock(mutex);
  *(Event *)event = {now_ms(), stream_of(stream)->capture};
  return cudaSuccess;
}

API cudaError_t cudaEventRecordWithFlags(cudaEvent_t event, cudaStream_t stream, unsigned) {
  return cudaEventRecord(event, stream);
}

API cudaError_t cudaStreamWaitEvent(cudaStream_t handle, cudaEvent_t event, unsigned) {
  Lock lock(mutex);
  Capture *recorded = ((Event *)event)->capture;
  Stream *stream = stream_of(handle);
  if (recorded && recorded == capturing && !stream->capture) {  // the capture spreads
    stream->capture = recorded;
    recorded->streams.insert(stream);
  } else if (stream->capture && !recorded) {
    fault("a captured stream waits for an event from outside its capture");
    return answer(cudaErrorStreamCaptureIsolation);
  }
  return cudaSuccess;
}

API cudaError_t cudaEventQuery(cudaEvent_t event) {
  Capture *recorded = ((Event *)event)->capture;
  if (recorded && recorded == capturing) return answer(cudaErrorCapturedEvent);
  return nullcuda_refused("cudaEventQuery") ? answer(cudaErrorStreamCaptureUnsupported) : cudaSuccess;
}

API cudaError_t cudaEventSynchronize(cudaEvent_t) {
  static const Name NAME = named("cudaEventSynchronize");
  return wait(NAME);
}

API cudaError_t cudaEventElapsedTime(float *ms, cudaEvent_t start, cudaEvent_t end) {
  *ms = std::max(((Event *)end)->ms - ((Event *)start)->ms, 1e-3);  // never 0: somebody may divide by it
  return cudaSuccess;
}

// ---- graphs
API cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode *mode) {
  std::swap(*mode, mode_of_thread);
  return cudaSuccess;
}

API cudaError_t cudaStreamBeginCapture(cudaStream_t handle, cudaStreamCaptureMode mode) {
  Lock lock(mutex);
  Stream *stream = stream_of(handle);
  if (stream == &legacy || capturing) {
    fault(capturing ? "a second capture" : "capture of the legacy stream");
    return answer(cudaErrorStreamCaptureUnsupported);
  }
  capturing = stream->capture = new Capture{new Graph{++graphs}, mode, ++captures};
  capturing->streams.insert(stream);
  return cudaSuccess;
}

API cudaError_t cudaStreamEndCapture(cudaStream_t handle, cudaGraph_t *graph) {
  Lock lock(mutex);
  Capture *capture = stream_of(handle)->capture;
  *graph = nullptr;
  if (!capture) return answer(cudaErrorIllegalState);
  for (Stream *stream : capture->streams) stream->capture = nullptr;
  capturing = nullptr;
  if (capture->graph->size == 0) fault("an empty graph was captured");
  if (capture->broken) return answer(cudaErrorStreamCaptureInvalidated);
  *graph = (cudaGraph_t)capture->graph;
  return cudaSuccess;
}

API cudaError_t cudaStreamIsCapturing(cudaStream_t stream, cudaStreamCaptureStatus *status) {
  Capture *capture = stream_of(stream)->capture;
  *status = !capture          ? cudaStreamCaptureStatusNone
            : capture->broken ? cudaStreamCaptureStatusInvalidated
                              : cudaStreamCaptureStatusActive;
  return cudaSuccess;
}

API cudaError_t cudaStreamGetCaptureInfo(cudaStream_t stream, cudaStreamCaptureStatus *status, unsigned long long *id,
                                         cudaGraph_t *graph, const cudaGraphNode_t **nodes,
                                         const cudaGraphEdgeData **edges, size_t *count) {
  Capture *capture = stream_of(stream)->capture;
  if (id) *id = capture ? capture->id : 0;
  if (graph) *graph = capture ? (cudaGraph_t)capture->graph : nullptr;
  if (nodes) *nodes = nullptr;
  if (edges) *edges = nullptr;
  if (count) *count = 0;
  return cudaStreamIsCapturing(stream, status);
}

API cudaError_t cudaGraphInstantiateWithFlags(cudaGraphExec_t *exec, cudaGraph_t graph, unsigned long long) {
  *exec = (cudaGraphExec_t)graph;
  return cudaSuccess;
}

API cudaError_t cudaGraphLaunch(cudaGraphExec_t exec, cudaStream_t) {
  static const Name NAME = named("cudaGraphLaunch");
  count(CALL, NAME);
  count_replay((Graph *)exec);
  return cudaSuccess;
}

API cudaError_t cudaGraphGetNodes(cudaGraph_t graph, cudaGraphNode_t *, size_t *count) {
  *count = ((Graph *)graph)->size;
  return cudaSuccess;
}

API cudaError_t cudaGraphNodeGetDependencies(cudaGraphNode_t, cudaGraphNode_t *, cudaGraphEdgeData *, size_t *count) {
  if (count) *count = 0;
  return cudaSuccess;
}
