// CPU: the gate of a feed-forward, its bias added on the way. See spo_fast.h for the formulas.
#include "activations.h"
#include "isa.h"
#include "parallel.h"

namespace spo {
namespace {

constexpr int64_t COLUMNS = 256;  // of a strip: its rows of float32 stay in a core's cache
constexpr int64_t PIECE = 16384;  // elements of y in one piece, about

// Phi(g) and phi(g), the standard normal's distribution and density.
SPO_INLINE void normal_law(double g, double *cdf, double *density) {
  *cdf = 0.5 * std::erfc(-g * 0.70710678118654752);
  *density = 0.39894228040143268 * std::exp(-0.5 * g * g);
}

// Branch-free, so that compilers vectorise it. P(Z > |g|) = e^(-g^2 / 2) t Q(t) with t = 1 / (1 + c |g|): Q is a
// polynomial fitted to erfc(x) e^(x^2) / (2 t) at x = |g| / sqrt 2 over [0, 14], relative error 2.5e-8, so that the tail
// keeps its digits; until 1e-36 and then 0, since subnormal numbers are ten times as slow.
SPO_INLINE void normal_law(float g, float *cdf, float *density) {
  const float size = g < 0 ? -g : g, half = 0.5f * g * g;
  const float e = half > 80.0f ? 0.0f : exponential(-half), t = 1 / (1 + 0.268700577f * size);
  float q = 0.02921109459f;
  q = q * t - 0.12993108485f;
  q = q * t + 0.17967111387f;
  q = q * t - 0.07842129942f;
  q = q * t + 0.11361049585f;
  q = q * t + 0.06983982086f;
  q = q * t + 0.10184271982f;
  q = q * t + 0.10697221520f;
  q = q * t + 0.10720491693f;
  const float tail = e * t * q;
  *cdf = g < 0 ? tail : 1 - tail;
  *density = 0.39894228f * e;
}

template <class T>
struct Geglu {
  using A = Wide<T>;
  const T *h, *bias, *grad_y;
  T *y, *grad_h;
  int64_t rows, D;

  explicit Geglu(const spo_geglu_args &args)
      : h(static_cast<const T *>(args.h)), bias(static_cast<const T *>(args.bias)),
        grad_y(static_cast<const T *>(args.grad_y)), y(static_cast<T *>(args.y)),
        grad_h(static_cast<T *>(args.grad_h)), rows(args.rows), D(args.D) {}

  // f(row, first column, columns) of each strip; strips of one row's columns for many rows, whose bias is read once.
  template <class F>
  void strips(F f) const {
    const int64_t height = std::max<int64_t>(1, PIECE / D);
    parallel_for(ceil_div(rows, height), [&](int64_t piece) {
      vectorised([&] SPO_LOOP {
        for (int64_t first = 0; first < D; first += COLUMNS) {
          const int64_t columns = std::min(COLUMNS, D - first);
          A bias_a[COLUMNS], bias_g[COLUMNS];
          for (int64_t j = 0; j < columns; ++j) {
            bias_a[j] = bias == nullptr ? 0 : static_cast<A>(widen(bias[first + j]));
            bias_g[j] = bias == nullptr ? 0 : static_cast<A>(widen(bias[D + first + j]));
          }
          for (int64_t row = piece * height; row < std::min((piece + 1) * height, rows); ++row) {
            A a[COLUMNS], g[COLUMNS];
            const T *start = h + row * 2 * D + first;
            for (int64_t j = 0; j < columns; ++j) a[j] = static_cast<A>(widen(start[j])) + bias_a[j];
            for (int64_t j = 0; j < columns; ++j) g[j] = static_cast<A>(widen(start[D + j])) + bias_g[j];
            f(row, first, columns, a, g);
          }
        }
      });
    });
  }

  void forward() const {
    strips([&](int64_t row, int64_t first, int64_t columns, const A *a, const A *g) __attribute__((always_inline)) {
      A out[COLUMNS];
      for (int64_t j = 0; j < columns; ++j) {
        A cdf, density;
        normal_law(g[j], &cdf, &density);
        out[j] = a[j] * (g[j] * cdf);
      }
      for (int64_t j = 0; j < columns; ++j) narrow(out[j], y + row * D + first + j);
    });
  }

  void backward() const {
    strips([&](int64_t row, int64_t first, int64_t columns, const A *a, const A *g) __attribute__((always_inline)) {
      A grad[COLUMNS], grad_a[COLUMNS], grad_g[COLUMNS];
      for (int64_t j = 0; j < columns; ++j) grad[j] = static_cast<A>(widen(grad_y[row * D + first + j]));
      for (int64_t j = 0; j < columns; ++j) {
        A cdf, density;
        normal_law(g[j], &cdf, &density);
        grad_a[j] = grad[j] * (g[j] * cdf);
        grad_g[j] = grad[j] * a[j] * (cdf + g[j] * density);
      }
      T *start = grad_h + row * 2 * D + first;
      for (int64_t j = 0; j < columns; ++j) narrow(grad_a[j], start + j);
      for (int64_t j = 0; j < columns; ++j) narrow(grad_g[j], start + D + j);
    });
  }
};

// Checks, then calls f(Geglu<T>) with the type of the dtype code, unless there is nothing to do.
template <class F>
int with_geglu(const spo_geglu_args *args, bool backward, F f) {
  if (const int code = check(args)) return code;
  if (args->rows < 0 || args->D <= 0) return SPO_ERROR_SHAPE;
  if (args->rows == 0) return SPO_OK;
  if (!args->h || (backward ? !args->grad_y || !args->grad_h : !args->y)) return SPO_ERROR_NULL;
  return with_type(args->dtype, [&](auto t) {
    const Geglu<decltype(t)> op(*args);
    return guard([&] { f(op); });
  });
}

}  // namespace
}  // namespace spo

extern "C" {

int spo_geglu_forward(const spo_geglu_args *args, void *) {
  return spo::with_geglu(args, false, [](const auto &op) { op.forward(); });
}

int spo_geglu_backward(const spo_geglu_args *args, void *) {
  return spo::with_geglu(args, true, [](const auto &op) { op.backward(); });
}

}  // extern "C"
