// CPU: denoising transitions and their log-ratios. See spo_fast.h for the formulas.
//
// Work is cut into pieces (parallel.h); partial sums are added in the order of the pieces.
#include <algorithm>
#include <vector>

#include "isa.h"
#include "parallel.h"
#include "transition.h"

namespace spo {
namespace {

constexpr int64_t CHUNK = 4096;  // elements of one piece
constexpr int64_t STRIP = 256;   // of them at a time: buffers that stay in the first cache

bool all_within(const int64_t *indices, int64_t count, int64_t limit) {
  return std::all_of(indices, indices + count, [&](int64_t i) { return 0 <= i && i < limit; });
}

// What a sample's row says, in the type of the arithmetic.
template <class X>
struct Row {
  X a, b, c, d, std_dev;

  explicit Row(const double *row)
      : a(static_cast<X>(row[0])), b(static_cast<X>(row[1])), c(static_cast<X>(row[2])), d(static_cast<X>(row[3])),
        std_dev(static_cast<X>(row[4])) {}
};

// Calls f(j, m) for the `count` elements behind i, m = uncond + g (cond - uncond), or cond without uncond: one loop each,
// which vectorises.
template <class M, class X, class F>
SPO_INLINE void for_guided(const M *cond, const M *uncond, int64_t count, X guidance, F f) {
  if (uncond == nullptr)
    for (int64_t j = 0; j < count; ++j) f(j, static_cast<X>(widen(cond[j])));
  else
    for (int64_t j = 0; j < count; ++j) f(j, guided(cond, uncond, j, guidance));
}

// The means of elements [i, i + count), and x0.
template <class M, class X>
SPO_INLINE void mean_strip(const Transition<M, X> &op, const Row<X> &row, int64_t i, int64_t count, X *__restrict mean) {
  const M *cond = op.cond + i, *uncond = op.uncond == nullptr ? nullptr : op.uncond + i;
  const X *x_t = op.x_t + i;
  X *__restrict x0 = op.x0 == nullptr ? nullptr : op.x0 + i;
  const auto x0_alone = [&](int64_t j, X m) __attribute__((always_inline)) { x0[j] = row.c * x_t[j] + row.d * m; };
  const auto mean_alone = [&](int64_t j, X m) __attribute__((always_inline)) { mean[j] = row.a * x_t[j] + row.b * m; };
  if (x0 == nullptr)
    for_guided(cond, uncond, count, op.guidance, mean_alone);
  else if (op.K == 0)
    for_guided(cond, uncond, count, op.guidance, x0_alone);
  else
    for_guided(cond, uncond, count, op.guidance, [&](int64_t j, X m) __attribute__((always_inline)) {
      x0_alone(j, m);
      mean_alone(j, m);
    });
}

template <class Z, class X>
SPO_INLINE void child_strip(const X *mean, X std_dev, const Z *z, int64_t count, X *__restrict child) {
  for (int64_t j = 0; j < count; ++j) child[j] = mean[j] + std_dev * static_cast<X>(z[j]);
}

// The normals of groups first ... first + GROUPS - 1, a row a lane.
SPO_INLINE void normals(const int64_t *key, int64_t child, int64_t first, float (&z)[4][GROUPS]) {
  uint32_t words[4][GROUPS];
  strip_words(key, child, first, words);
  for (int lane = 0; lane < 4; lane += 2)
    for (int64_t j = 0; j < GROUPS; ++j) box_muller(words[lane][j], words[lane + 1][j], &z[lane][j], &z[lane + 1][j]);
}

// Children of groups [begin, end) of a sample with keyed noise; a group's four lanes lie q apart.
template <class M, class X>
SPO_INLINE void keyed_children(const Transition<M, X> &op, int64_t sample, int64_t begin, int64_t end, int64_t q) {
  const Row<X> row(op.row(sample));
  X mean[4][GROUPS];
  float z[4][GROUPS];
  for (int64_t first = begin; first < end; first += GROUPS) {
    int64_t start[4], count[4];  // of each lane's elements: the last lanes may have fewer, or none
    for (int lane = 0; lane < 4; ++lane) {
      const int64_t element = lane * q + first;
      start[lane] = sample * op.n + element;
      count[lane] = std::max<int64_t>(0, std::min(std::min(GROUPS, end - first), op.n - element));
      mean_strip(op, row, start[lane], count[lane], mean[lane]);
    }
    for (int64_t k = 0; k < op.K; ++k) {
      normals(op.keys + sample * 5, k, first, z);
      for (int lane = 0; lane < 4; ++lane)
        child_strip(mean[lane], row.std_dev, z[lane], count[lane], op.children + k * op.B * op.n + start[lane]);
    }
  }
}

// Children of elements [begin, end) of a sample with supplied noise.
template <class M, class X>
SPO_INLINE void supplied_children(const Transition<M, X> &op, int64_t sample, int64_t begin, int64_t end) {
  const Row<X> row(op.row(sample));
  X mean[STRIP];
  for (int64_t first = begin; first < end; first += STRIP) {
    const int64_t i = sample * op.n + first, count = std::min(STRIP, end - first);
    mean_strip(op, row, i, count, mean);
    for (int64_t k = 0; k < op.K; ++k) {
      const int64_t at = k * op.B * op.n + i;
      child_strip(mean, row.std_dev, op.noise + at, count, op.children + at);
    }
  }
}

template <class M, class X>
void transition(const Transition<M, X> &op) {
  const bool keyed = op.K > 0 && op.noise == nullptr;
  const int64_t units = keyed ? ceil_div(op.n, 4) : op.n;  // of a sample: groups, or elements
  const int64_t chunk = keyed ? CHUNK / 4 : CHUNK, pieces = ceil_div(units, chunk);
  parallel_for(op.B * pieces, [&](int64_t i) {
    const int64_t sample = i / pieces, begin = i % pieces * chunk, end = std::min(begin + chunk, units);
    vectorised([&] SPO_LOOP {
      if (keyed)
        keyed_children(op, sample, begin, end, units);
      else
        supplied_children(op, sample, begin, end);
    });
  }, keyed ? 1 : MIN_PIECES_PER_THREAD);
}

struct Sums {
  double log_ratio, kl;
};

// Independent accumulators in float64: one alone would wait for its own adder. As two vectors of a width that compilers
// have instructions for, or two halves of one.
constexpr int64_t WIDTH = 4, LANES = 2 * WIDTH;  // divides STRIP
typedef double Vector __attribute__((vector_size(WIDTH * sizeof(double))));
struct Lanes {
  Vector half[2] = {};

  // Adds x y of LANES elements.
  template <class X>
  SPO_INLINE void add_product(const X *x, const X *y) {
    typedef X Narrow __attribute__((vector_size(WIDTH * sizeof(X))));
    for (int h = 0; h < 2; ++h) {
      Narrow a, b;
      std::memcpy(&a, x + h * WIDTH, sizeof a);
      std::memcpy(&b, y + h * WIDTH, sizeof b);
      half[h] += __builtin_convertvector(a, Vector) * __builtin_convertvector(b, Vector);
    }
  }

  SPO_INLINE double sum() const {
    double total = 0;
    for (int64_t lane = 0; lane < LANES; ++lane) total += half[lane / WIDTH][lane % WIDTH];
    return total;
  }
};

// What the policy's and the frozen network's outputs say of elements [i, i + count): their means, and the difference.
template <class M, class X>
SPO_INLINE void two_means(const LogRatio<M, X> &op, const Row<X> &row, int64_t i, int64_t count, X *__restrict policy,
                          X *__restrict frozen, X *__restrict difference) {
  const bool both = op.uncond != nullptr;
  const X *x_t = op.x_t + i;
  for_guided(op.frozen_cond + i, both ? op.frozen_uncond + i : nullptr, count, op.guidance,
             [&](int64_t j, X m) __attribute__((always_inline)) { frozen[j] = m; });
  for_guided(op.cond + i, both ? op.uncond + i : nullptr, count, op.guidance,
             [&](int64_t j, X m) __attribute__((always_inline)) {
               const X drift = row.a * x_t[j];
               difference[j] = row.b * (m - frozen[j]);  // never mu_p - mu_r: a x_t would eat the digits
               policy[j] = drift + row.b * m;
               frozen[j] = drift + row.b * frozen[j];
             });
}

// Sums of (mu_p - mu_r)(2 x_prev - mu_p - mu_r) and (mu_p - mu_r)^2 over elements [begin, end) of a state, for `count`
// of its transitions: sums[t * pieces].
constexpr int64_t TOGETHER = 4;  // transitions, at most
template <class M, class X>
SPO_INLINE void sum_chunk(const LogRatio<M, X> &op, int64_t state, const int64_t *transitions, int64_t num_transitions,
                          int64_t begin, int64_t end, Sums *sums, int64_t pieces) {
  Lanes log_ratio[TOGETHER], kl;
  X policy[STRIP], frozen[STRIP], difference[STRIP], residuals[STRIP];
  const Row<X> row(op.row(state));
  for (int64_t first = begin; first < end; first += STRIP) {
    const int64_t count = std::min(STRIP, end - first), padded = ceil_div(count, LANES) * LANES;
    two_means(op, row, state * op.n + first, count, policy, frozen, difference);
    for (int64_t j = count; j < padded; ++j) difference[j] = residuals[j] = 0;
    for (int64_t j = 0; j < padded; j += LANES) kl.add_product(difference + j, difference + j);
    for (int64_t k = 0; k < num_transitions; ++k) {
      const X *next = op.x_prev + transitions[k] * op.n + first;
      for (int64_t j = 0; j < count; ++j) residuals[j] = (next[j] - policy[j]) + (next[j] - frozen[j]);
      Lanes sum = log_ratio[k];
      for (int64_t j = 0; j < padded; j += LANES) sum.add_product(difference + j, residuals + j);
      log_ratio[k] = sum;
    }
  }
  for (int64_t k = 0; k < num_transitions; ++k) sums[transitions[k] * pieces] = {log_ratio[k].sum(), kl.sum()};
}

// Those of each state, in increasing t.
template <class M, class X>
std::vector<std::vector<int64_t>> transitions_of(const LogRatio<M, X> &op) {
  std::vector<std::vector<int64_t>> transitions(static_cast<size_t>(op.B));
  for (int64_t t = 0; t < op.T; ++t) transitions[op.states[t]].push_back(t);
  return transitions;
}

template <class M, class X>
void log_ratio_forward(const LogRatio<M, X> &op) {
  const std::vector<std::vector<int64_t>> transitions = transitions_of(op);
  const int64_t pieces = ceil_div(op.n, CHUNK);
  std::vector<Sums> partial(static_cast<size_t>(op.T * pieces));
  parallel_for(op.B * pieces, [&](int64_t i) {
    const int64_t state = i / pieces, begin = i % pieces * CHUNK, end = std::min(begin + CHUNK, op.n);
    const int64_t *mine = transitions[state].data(), count = static_cast<int64_t>(transitions[state].size());
    Sums *sums = partial.data() + i % pieces;
    for (int64_t k = 0; k < count; k += TOGETHER)
      vectorised([&] SPO_LOOP {
        sum_chunk(op, state, mine + k, std::min(TOGETHER, count - k), begin, end, sums, pieces);
      });
  });
  for (int64_t t = 0; t < op.T; ++t) {
    Sums total{0, 0};
    for (int64_t i = t * pieces; i < (t + 1) * pieces; ++i) {
      total.log_ratio += partial[i].log_ratio;
      total.kl += partial[i].kl;
    }
    const double std_dev = op.row(op.states[t])[4];
    const double scale = 1 / (2 * std_dev * std_dev * static_cast<double>(op.n));
    op.log_ratio[t] = static_cast<X>(total.log_ratio * scale);
    op.kl[t] = static_cast<X>(total.kl * scale);
  }
}

// The gradients of elements [begin, end) of a state, summed over its transitions in increasing t.
template <class M, class X>
SPO_INLINE void gradients(const LogRatio<M, X> &op, int64_t state, const std::vector<int64_t> &transitions,
                          int64_t begin, int64_t end) {
  const Row<X> row(op.row(state));
  const X scale = static_cast<X>(op.row(state)[1] / (op.row(state)[4] * op.row(state)[4] * static_cast<double>(op.n)));
  X mean[STRIP], frozen[STRIP], difference[STRIP], sum[STRIP];
  const bool both = op.uncond != nullptr;
  for (int64_t first = begin; first < end; first += STRIP) {
    const int64_t i = state * op.n + first, count = std::min(STRIP, end - first);
    two_means(op, row, i, count, mean, frozen, difference);
    for (int64_t j = 0; j < count; ++j) sum[j] = 0;
    for (const int64_t t : transitions) {
      const X *x_prev = op.x_prev + t * op.n + first, weight = op.grad_log_ratio[t], kl_weight = op.grad_kl[t];
      for (int64_t j = 0; j < count; ++j) sum[j] += weight * (x_prev[j] - mean[j]) + kl_weight * difference[j];
    }
    for (int64_t j = 0; j < count; ++j)
      sum[j] = transitions.empty() ? X(0) : scale * sum[j];  // not inf * 0 in a row whose std is 0
    M *__restrict grad_cond = op.grad_cond + i;
    const X share = both ? op.guidance : X(1);
    for (int64_t j = 0; j < count; ++j) narrow(share * sum[j], grad_cond + j);
    if (op.grad_uncond != nullptr) {
      M *__restrict grad_uncond = op.grad_uncond + i;
      for (int64_t j = 0; j < count; ++j) narrow((1 - op.guidance) * sum[j], grad_uncond + j);
    }
  }
}

template <class M, class X>
void log_ratio_backward(const LogRatio<M, X> &op) {
  const std::vector<std::vector<int64_t>> transitions = transitions_of(op);
  const int64_t pieces = ceil_div(op.n, CHUNK);
  parallel_for(op.B * pieces, [&](int64_t piece) {
    const int64_t state = piece / pieces, begin = piece % pieces * CHUNK, end = std::min(begin + CHUNK, op.n);
    vectorised([&] SPO_LOOP { gradients(op, state, transitions[state], begin, end); });
  });
}

template <class M, class X>
int check_indices(const LogRatio<M, X> &op, int64_t num_rows) {
  if (!all_within(op.rows, op.B, num_rows)) return SPO_ERROR_ROW;
  return all_within(op.states, op.T, op.B) ? SPO_OK : SPO_ERROR_STATE;
}

}  // namespace
}  // namespace spo

extern "C" {

int spo_transition(const spo_transition_args *args, void *) {
  return spo::with_transition(args, [&](const auto &op) -> int {
    if (!spo::all_within(op.rows, op.B, args->step.num_rows)) return SPO_ERROR_ROW;
    return spo::guard([&] { spo::transition(op); });
  });
}

int spo_log_ratio_forward(const spo_log_ratio_args *args, void *) {
  return spo::with_log_ratio(args, false, [&](const auto &op) -> int {
    if (const int code = spo::check_indices(op, args->step.num_rows)) return code;
    return spo::guard([&] { spo::log_ratio_forward(op); });
  });
}

int spo_log_ratio_backward(const spo_log_ratio_args *args, void *) {
  return spo::with_log_ratio(args, true, [&](const auto &op) -> int {
    if (const int code = spo::check_indices(op, args->step.num_rows)) return code;
    return spo::guard([&] { spo::log_ratio_backward(op); });
  });
}

}  // extern "C"
