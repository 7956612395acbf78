// The ledger: counts by phase, kind and name; faults; and what a dump of it says.
#include <cxxabi.h>

#include <cstdio>
#include <cstdlib>
#include <map>
#include <sstream>

#include "internal.h"

std::recursive_mutex mutex;

namespace {
const char *const HOW[KINDS] = {"launch", "copy", "bytes", "call", "FAULT"};

struct Phase {
  Counts counts[KINDS];
  std::unordered_map<Graph *, long> replays;
};

std::unordered_set<std::string> texts;
std::map<std::string, Phase> phases;
Phase *phase = &phases[""];  // the host's, whichever thread works for it
int paused = 0;

std::string readable(const std::string &name) {
  int failed = 1;
  char *plain = abi::__cxa_demangle(name.c_str(), nullptr, nullptr, &failed);
  std::string text = failed ? name : plain;
  free(plain);
  return text;
}

void write(std::ostream &out, const std::string &phase_name, const char *how, const Counts &counts) {
  for (auto &[name, n] : counts) out << n << '\t' << how << '\t' << phase_name << '\t' << readable(*name) << '\n';
}

void write_replays(std::ostream &out, const std::string &phase_name, const Phase &p) {
  const char *const in_graph[KINDS] = {"replay", "replayed copy", "replayed bytes", "replayed call", "FAULT"};
  Counts replayed[KINDS];
  for (auto &[graph, times] : p.replays) {
    out << times << "\tgraph\t" << phase_name << "\tgraph " << graph->number << " of " << graph->size << " nodes\n";
    for (int kind = 0; kind < KINDS; kind++)
      for (auto &[name, n] : graph->nodes[kind]) replayed[kind][name] += n * times;
  }
  for (int kind = 0; kind < KINDS; kind++) write(out, phase_name, in_graph[kind], replayed[kind]);
}
}  // namespace

Name named(const std::string &text) {
  Lock lock(mutex);
  return &*texts.insert(text).first;
}

void count(Kind kind, Name what, long n) {
  Lock lock(mutex);
  if (!paused) phase->counts[kind][what] += n;
}

void count_replay(Graph *graph) {
  Lock lock(mutex);
  if (!paused) phase->replays[graph]++;
}

void fault(const std::string &what) {
  Lock lock(mutex);
  if (phase->counts[FAULT][named(what)]++ == 0) fprintf(stderr, "[null GPU] FAULT: %s\n", what.c_str());
  if (getenv("NULLCUDA_ABORT")) abort();
}

API void nullcuda_count(int kind, const char *what, long n) { count((Kind)kind, named(what), n); }
API void nullcuda_fault(const char *what) { fault(what); }

// ---- for Python (ledger.py)
API void nullcuda_phase(const char *name) {
  Lock lock(mutex);
  phase = &phases[name];
}

API void nullcuda_pause(int step) {  // +1: what follows is not counted; -1: it is again
  Lock lock(mutex);
  paused += step;
}

API void nullcuda_reset() {
  Lock lock(mutex);
  for (auto &[name, p] : phases) p = Phase();  // in place: `phase` stays where it points
}

// Lines of count, how, phase and name, with tabs between. Valid until the next call.
API const char *nullcuda_dump() {
  Lock lock(mutex);
  static std::string text;
  std::ostringstream out;
  for (auto &[name, p] : phases) {
    for (int kind = 0; kind < KINDS; kind++) write(out, name, HOW[kind], p.counts[kind]);
    write_replays(out, name, p);
  }
  text = out.str();
  return text.c_str();
}
