// CPU: denoising transitions and their log-ratios. See spo_fast.h for the formulas.
//
// Work is cut into pieces (parallel.h); partial sums are added in the order of the pieces.
#include <algorithm>
#include <vector>

#include "common.h"
#include "parallel.h"

namespace spo {
namespace {

constexpr int64_t CHUNK = 4096;  // elements of one piece

bool all_within(const int64_t *indices, int64_t count, int64_t limit) {
  return std::all_of(indices, indices + count, [&](int64_t i) { return 0 <= i && i < limit; });
}

template <class M, class X>
struct Transition {
  const M *cond, *uncond;
  const X *x_t;
  const int64_t *rows;
  const double *table;
  X guidance;
  const int64_t *keys;
  const X *noise;
  int64_t K, B, n;
  X *x0, *children;

  void run() const {
    const int64_t q = ceil_div(n, 4), pieces = ceil_div(q, CHUNK / 4);
    parallel_for(B * pieces, [&](int64_t i) {
      const int64_t begin = i % pieces * (CHUNK / 4);
      sample_groups(i / pieces, begin, std::min(begin + CHUNK / 4, q), q);
    });
  }

  void sample_groups(int64_t sample, int64_t begin, int64_t end, int64_t q) const {
    const double *row = table + rows[sample] * TABLE_COLUMNS;
    const X a = static_cast<X>(row[0]), b = static_cast<X>(row[1]), c = static_cast<X>(row[2]),
            d = static_cast<X>(row[3]);
    const X std_dev = static_cast<X>(row[4]);
    for (int64_t group = begin; group < end; ++group) {
      X mean[4] = {};
      for (int lane = 0; lane < 4; ++lane) {
        const int64_t element = lane * q + group, i = sample * n + element;
        if (element >= n) break;
        const X m = guided(cond, uncond, i, guidance);
        if (x0 != nullptr) x0[i] = c * x_t[i] + d * m;
        mean[lane] = a * x_t[i] + b * m;
      }
      for (int64_t k = 0; k < K; ++k) {
        float z[4];
        if (noise == nullptr) group_normals(keys + sample * 5, k, group, z);
        for (int lane = 0; lane < 4; ++lane) {
          const int64_t element = lane * q + group, i = (k * B + sample) * n + element;
          if (element >= n) break;
          children[i] = mean[lane] + std_dev * (noise != nullptr ? noise[i] : static_cast<X>(z[lane]));
        }
      }
    }
  }
};

template <class M, class X>
struct LogRatio {
  const M *cond, *uncond, *frozen_cond, *frozen_uncond;
  const X *x_t, *x_prev;
  const int64_t *states, *rows;
  const double *table;
  X guidance;
  int64_t U, T, n;

  struct Sums {
    double log_ratio, kl;
  };

  void forward(X *log_ratio, X *kl) const {
    const int64_t pieces = ceil_div(n, CHUNK);
    std::vector<Sums> partial(static_cast<size_t>(T * pieces));
    parallel_for(T * pieces, [&](int64_t i) { partial[i] = sum_chunk(i / pieces, i % pieces * CHUNK); });
    for (int64_t t = 0; t < T; ++t) {
      Sums total{0, 0};
      for (int64_t i = t * pieces; i < (t + 1) * pieces; ++i) {
        total.log_ratio += partial[i].log_ratio;
        total.kl += partial[i].kl;
      }
      const double std_dev = table[rows[states[t]] * TABLE_COLUMNS + 4];
      const double scale = 1 / (2 * std_dev * std_dev * static_cast<double>(n));
      log_ratio[t] = static_cast<X>(total.log_ratio * scale);
      kl[t] = static_cast<X>(total.kl * scale);
    }
  }

  // Sums of (mu_p - mu_r)(2 x_prev - mu_p - mu_r) and (mu_p - mu_r)^2 over one chunk of transition t.
  Sums sum_chunk(int64_t t, int64_t begin) const {
    constexpr int LANES = 8;  // independent accumulators: one alone would wait for its own adder
    double log_ratio[LANES] = {}, kl[LANES] = {};
    const int64_t state = states[t], end = std::min(begin + CHUNK, n);
    const double *row = table + rows[state] * TABLE_COLUMNS;
    const X a = static_cast<X>(row[0]), b = static_cast<X>(row[1]);
    for (int64_t element = begin; element < end; ++element) {
      const int64_t i = state * n + element, lane = element % LANES;
      const X policy = guided(cond, uncond, i, guidance), frozen = guided(frozen_cond, frozen_uncond, i, guidance);
      const X drift = a * x_t[i], next = x_prev[t * n + element];
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

  void backward(const X *grad_log_ratio, const X *grad_kl, M *grad_cond, M *grad_uncond) const {
    std::vector<std::vector<int64_t>> transitions(static_cast<size_t>(U));  // of each state, in increasing t
    for (int64_t t = 0; t < T; ++t) transitions[states[t]].push_back(t);
    const int64_t pieces = ceil_div(n, CHUNK);
    parallel_for(U * pieces, [&](int64_t piece) {
      const int64_t state = piece / pieces, begin = piece % pieces * CHUNK, end = std::min(begin + CHUNK, n);
      const double *row = table + rows[state] * TABLE_COLUMNS;
      const X a = static_cast<X>(row[0]), b = static_cast<X>(row[1]);
      const X scale = static_cast<X>(row[1] / (row[4] * row[4] * static_cast<double>(n)));
      for (int64_t element = begin; element < end; ++element) {
        const int64_t i = state * n + element;
        const X policy = guided(cond, uncond, i, guidance), frozen = guided(frozen_cond, frozen_uncond, i, guidance);
        const X mean = a * x_t[i] + b * policy, difference = b * (policy - frozen);
        X sum = 0;
        for (const int64_t t : transitions[state])
          sum += grad_log_ratio[t] * (x_prev[t * n + element] - mean) + grad_kl[t] * difference;
        const X grad = transitions[state].empty() ? X(0) : scale * sum;  // not inf * 0 in a row whose std is 0
        narrow(uncond == nullptr ? grad : guidance * grad, grad_cond + i);
        if (grad_uncond != nullptr) narrow((1 - guidance) * grad, grad_uncond + i);
      }
    });
  }
};

}  // namespace
}  // namespace spo

extern "C" {

int spo_transition(int m_dtype, int x_dtype, const void *cond, const void *uncond, const void *x_t, const int64_t *rows,
                   const double *table, int64_t num_rows, double guidance, const int64_t *keys, const void *noise,
                   int64_t num_children, int64_t B, int64_t n, void *x0, void *children, void *) {
  if (B < 0 || n <= 0 || num_children < 0) return SPO_ERROR_SHAPE;
  if (B == 0) return SPO_OK;
  if (!cond || !x_t || !rows || !table) return SPO_ERROR_NULL;
  if (num_children > 0 && (!children || (!noise && !keys))) return SPO_ERROR_NULL;
  if (!spo::all_within(rows, B, num_rows)) return SPO_ERROR_ROW;
  return spo::dispatch(m_dtype, x_dtype, [&](auto m, auto x) {
    using M = decltype(m);
    using X = decltype(x);
    const spo::Transition<M, X> op{static_cast<const M *>(cond),
                                   static_cast<const M *>(uncond),
                                   static_cast<const X *>(x_t),
                                   rows,
                                   table,
                                   static_cast<X>(guidance),
                                   keys,
                                   static_cast<const X *>(noise),
                                   num_children,
                                   B,
                                   n,
                                   static_cast<X *>(x0),
                                   static_cast<X *>(children)};
    return spo::guard([&] { op.run(); });
  });
}

int spo_log_ratio_forward(int m_dtype, int x_dtype, const void *cond, const void *uncond, const void *frozen_cond,
                          const void *frozen_uncond, const void *x_t, const void *x_prev, const int64_t *states,
                          const int64_t *rows, const double *table, int64_t num_rows, double guidance, int64_t U,
                          int64_t T, int64_t n, void *log_ratio, void *kl, void *) {
  if (U < 0 || T < 0 || n <= 0) return SPO_ERROR_SHAPE;
  if (T == 0) return SPO_OK;
  if (!cond || !frozen_cond || !uncond != !frozen_uncond || !x_t || !x_prev || !states || !rows || !table ||
      !log_ratio || !kl)
    return SPO_ERROR_NULL;
  if (!spo::all_within(rows, U, num_rows)) return SPO_ERROR_ROW;
  if (!spo::all_within(states, T, U)) return SPO_ERROR_STATE;
  return spo::dispatch(m_dtype, x_dtype, [&](auto m, auto x) {
    using M = decltype(m);
    using X = decltype(x);
    const spo::LogRatio<M, X> op{static_cast<const M *>(cond),
                                 static_cast<const M *>(uncond),
                                 static_cast<const M *>(frozen_cond),
                                 static_cast<const M *>(frozen_uncond),
                                 static_cast<const X *>(x_t),
                                 static_cast<const X *>(x_prev),
                                 states,
                                 rows,
                                 table,
                                 static_cast<X>(guidance),
                                 U,
                                 T,
                                 n};
    return spo::guard([&] { op.forward(static_cast<X *>(log_ratio), static_cast<X *>(kl)); });
  });
}

int spo_log_ratio_backward(int m_dtype, int x_dtype, const void *cond, const void *uncond, const void *frozen_cond,
                           const void *frozen_uncond, const void *x_t, const void *x_prev, const int64_t *states,
                           const int64_t *rows, const double *table, int64_t num_rows, double guidance, int64_t U,
                           int64_t T, int64_t n, const void *grad_log_ratio, const void *grad_kl, void *grad_cond,
                           void *grad_uncond, void *) {
  if (U < 0 || T < 0 || n <= 0) return SPO_ERROR_SHAPE;
  if (U == 0) return T == 0 ? SPO_OK : SPO_ERROR_STATE;
  if (!cond || !frozen_cond || !uncond != !frozen_uncond || !x_t || !rows || !table || !grad_cond)
    return SPO_ERROR_NULL;
  if (T > 0 && (!x_prev || !states || !grad_log_ratio || !grad_kl)) return SPO_ERROR_NULL;
  if (!spo::all_within(rows, U, num_rows)) return SPO_ERROR_ROW;
  if (!spo::all_within(states, T, U)) return SPO_ERROR_STATE;
  return spo::dispatch(m_dtype, x_dtype, [&](auto m, auto x) {
    using M = decltype(m);
    using X = decltype(x);
    const spo::LogRatio<M, X> op{static_cast<const M *>(cond),
                                 static_cast<const M *>(uncond),
                                 static_cast<const M *>(frozen_cond),
                                 static_cast<const M *>(frozen_uncond),
                                 static_cast<const X *>(x_t),
                                 static_cast<const X *>(x_prev),
                                 states,
                                 rows,
                                 table,
                                 static_cast<X>(guidance),
                                 U,
                                 T,
                                 n};
    return spo::guard([&] {
      op.backward(static_cast<const X *>(grad_log_ratio), static_cast<const X *>(grad_kl), static_cast<M *>(grad_cond),
                  static_cast<M *>(grad_uncond));
    });
  });
}

}  // extern "C"
