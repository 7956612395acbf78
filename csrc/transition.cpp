// CPU: denoising transitions and their log-ratios. See spo_fast.h for the formulas.
//
// Work is cut into pieces (parallel.h); partial sums are added in the order of the pieces.
#include <algorithm>
#include <vector>

#include "parallel.h"
#include "transition.h"

namespace spo {
namespace {

constexpr int64_t CHUNK = 4096;  // elements of one piece

bool all_within(const int64_t *indices, int64_t count, int64_t limit) {
  return std::all_of(indices, indices + count, [&](int64_t i) { return 0 <= i && i < limit; });
}

template <class M, class X>
void sample_groups(const Transition<M, X> &op, int64_t sample, int64_t begin, int64_t end, int64_t q) {
  const double *row = op.row(sample);
  const X a = static_cast<X>(row[0]), b = static_cast<X>(row[1]), c = static_cast<X>(row[2]),
          d = static_cast<X>(row[3]);
  const X std_dev = static_cast<X>(row[4]);
  for (int64_t group = begin; group < end; ++group) {
    X mean[4] = {};
    for (int lane = 0; lane < 4; ++lane) {
      const int64_t element = lane * q + group, i = sample * op.n + element;
      if (element >= op.n) break;
      const X m = guided(op.cond, op.uncond, i, op.guidance);
      if (op.x0 != nullptr) op.x0[i] = c * op.x_t[i] + d * m;
      mean[lane] = a * op.x_t[i] + b * m;
    }
    for (int64_t k = 0; k < op.K; ++k) {
      float z[4];
      if (op.noise == nullptr) group_normals(op.keys + sample * 5, k, group, z);
      for (int lane = 0; lane < 4; ++lane) {
        const int64_t element = lane * q + group, i = (k * op.B + sample) * op.n + element;
        if (element >= op.n) break;
        op.children[i] = mean[lane] + std_dev * (op.noise != nullptr ? op.noise[i] : static_cast<X>(z[lane]));
      }
    }
  }
}

template <class M, class X>
void transition(const Transition<M, X> &op) {
  const int64_t q = ceil_div(op.n, 4), pieces = ceil_div(q, CHUNK / 4);
  parallel_for(op.B * pieces, [&](int64_t i) {
    const int64_t begin = i % pieces * (CHUNK / 4);
    sample_groups(op, i / pieces, begin, std::min(begin + CHUNK / 4, q), q);
  });
}

struct Sums {
  double log_ratio, kl;
};

// Sums of (mu_p - mu_r)(2 x_prev - mu_p - mu_r) and (mu_p - mu_r)^2 over one chunk of transition t.
template <class M, class X>
Sums sum_chunk(const LogRatio<M, X> &op, int64_t t, int64_t begin) {
  constexpr int LANES = 8;  // independent accumulators: one alone would wait for its own adder
  double log_ratio[LANES] = {}, kl[LANES] = {};
  const int64_t state = op.states[t], end = std::min(begin + CHUNK, op.n);
  const double *row = op.row(state);
  const X a = static_cast<X>(row[0]), b = static_cast<X>(row[1]);
  for (int64_t element = begin; element < end; ++element) {
    const int64_t i = state * op.n + element, lane = element % LANES;
    const X policy = guided(op.cond, op.uncond, i, op.guidance);
    const X frozen = guided(op.frozen_cond, op.frozen_uncond, i, op.guidance);
    const X drift = a * op.x_t[i], next = op.x_prev[t * op.n + element];
    const X difference = b * (policy - frozen);  // never mu_p - mu_r: a x_t would eat the digits
    const X residuals = (next - (drift + b * policy)) + (next - (drift + b * frozen));
    log_ratio[lane] += static_cast<double>(difference) * static_cast<double>(residuals);
    kl[lane] += static_cast<double>(difference) * static_cast<double>(difference);
  }
  Sums sums{0, 0};
  for (int lane = 0; lane < LANES; ++lane) {
    sums.log_ratio += log_ratio[lane];
    sums.kl += kl[lane];
  }
  return sums;
}

template <class M, class X>
void log_ratio_forward(const LogRatio<M, X> &op) {
  const int64_t pieces = ceil_div(op.n, CHUNK);
  std::vector<Sums> partial(static_cast<size_t>(op.T * pieces));
  parallel_for(op.T * pieces, [&](int64_t i) { partial[i] = sum_chunk(op, i / pieces, i % pieces * CHUNK); });
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

template <class M, class X>
void log_ratio_backward(const LogRatio<M, X> &op) {
  std::vector<std::vector<int64_t>> transitions(static_cast<size_t>(op.B));  // of each state, in increasing t
  for (int64_t t = 0; t < op.T; ++t) transitions[op.states[t]].push_back(t);
  const int64_t pieces = ceil_div(op.n, CHUNK);
  parallel_for(op.B * pieces, [&](int64_t piece) {
    const int64_t state = piece / pieces, begin = piece % pieces * CHUNK, end = std::min(begin + CHUNK, op.n);
    const double *row = op.row(state);
    const X a = static_cast<X>(row[0]), b = static_cast<X>(row[1]);
    const X scale = static_cast<X>(row[1] / (row[4] * row[4] * static_cast<double>(op.n)));
    for (int64_t element = begin; element < end; ++element) {
      const int64_t i = state * op.n + element;
      const X policy = guided(op.cond, op.uncond, i, op.guidance);
      const X frozen = guided(op.frozen_cond, op.frozen_uncond, i, op.guidance);
      const X mean = a * op.x_t[i] + b * policy, difference = b * (policy - frozen);
      X sum = 0;
      for (const int64_t t : transitions[state])
        sum += op.grad_log_ratio[t] * (op.x_prev[t * op.n + element] - mean) + op.grad_kl[t] * difference;
      const X grad = transitions[state].empty() ? X(0) : scale * sum;  // not inf * 0 in a row whose std is 0
      narrow(op.uncond == nullptr ? grad : op.guidance * grad, op.grad_cond + i);
      if (op.grad_uncond != nullptr) narrow((1 - op.guidance) * grad, op.grad_uncond + i);
    }
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
