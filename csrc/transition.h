// What both sources of spo_transition and spo_log_ratio share: their structs with types, and checks. See spo_fast.h.
#ifndef SPO_FAST_TRANSITION_H
#define SPO_FAST_TRANSITION_H

#include "common.h"

namespace spo {

template <class M, class X>
struct Step {
  const M *__restrict__ cond;
  const M *__restrict__ uncond;
  const X *__restrict__ x_t;
  const int64_t *__restrict__ rows;
  const double *__restrict__ table;
  X guidance;
  int64_t B, n;

  explicit Step(const spo_step &s)
      : cond(static_cast<const M *>(s.cond)), uncond(static_cast<const M *>(s.uncond)),
        x_t(static_cast<const X *>(s.x_t)), rows(s.rows), table(s.table), guidance(static_cast<X>(s.guidance)), B(s.B),
        n(s.n) {}

  SPO_HD const double *row(int64_t sample) const { return table + rows[sample] * 5; }  // a, b, c, d, std
};

template <class M, class X>
struct Transition : Step<M, X> {
  const int64_t *__restrict__ keys;
  const X *__restrict__ noise;
  int64_t K;
  X *__restrict__ x0;
  X *__restrict__ children;

  explicit Transition(const spo_transition_args &args)
      : Step<M, X>(args.step), keys(args.keys), noise(static_cast<const X *>(args.noise)), K(args.num_children),
        x0(static_cast<X *>(args.x0)), children(static_cast<X *>(args.children)) {}
};

template <class M, class X>
struct LogRatio : Step<M, X> {
  const M *__restrict__ frozen_cond;
  const M *__restrict__ frozen_uncond;
  const X *__restrict__ x_prev;
  const int64_t *__restrict__ states;
  int64_t T;
  X *log_ratio, *kl;
  const X *grad_log_ratio, *grad_kl;
  M *grad_cond, *grad_uncond;

  explicit LogRatio(const spo_log_ratio_args &args)
      : Step<M, X>(args.step), frozen_cond(static_cast<const M *>(args.frozen_cond)),
        frozen_uncond(static_cast<const M *>(args.frozen_uncond)), x_prev(static_cast<const X *>(args.x_prev)),
        states(args.states), T(args.T), log_ratio(static_cast<X *>(args.log_ratio)), kl(static_cast<X *>(args.kl)),
        grad_log_ratio(static_cast<const X *>(args.grad_log_ratio)), grad_kl(static_cast<const X *>(args.grad_kl)),
        grad_cond(static_cast<M *>(args.grad_cond)), grad_uncond(static_cast<M *>(args.grad_uncond)) {}
};

// Calls f(Op<M, X>(args)) with the types of the two dtype codes.
template <template <class, class> class Op, class Args, class F>
int with_types(const Args &args, F f) {
  return with_type(args.step.m_dtype, [&](auto m) -> int {
    using M = decltype(m);
    switch (args.step.x_dtype) {
      case SPO_FLOAT32: return f(Op<M, float>(args));
      case SPO_FLOAT64: return f(Op<M, double>(args));
      default: return SPO_ERROR_DTYPE;
    }
  });
}

// Checks, then calls f(Transition), unless there is nothing to do.
template <class F>
int with_transition(const spo_transition_args *args, F f) {
  if (const int code = check(args)) return code;
  const spo_step &s = args->step;
  if (s.B < 0 || s.n <= 0 || args->num_children < 0) return SPO_ERROR_SHAPE;
  if (s.B == 0) return SPO_OK;
  if (!s.cond || !s.x_t || !s.rows || !s.table) return SPO_ERROR_NULL;
  if (args->num_children > 0 && (!args->children || (!args->noise && !args->keys))) return SPO_ERROR_NULL;
  return with_types<Transition>(*args, f);
}

// The same of f(LogRatio).
template <class F>
int with_log_ratio(const spo_log_ratio_args *args, bool backward, F f) {
  if (const int code = check(args)) return code;
  const spo_step &s = args->step;
  const int64_t T = args->T;
  if (s.B < 0 || T < 0 || s.n <= 0) return SPO_ERROR_SHAPE;
  if (backward && s.B == 0) return T == 0 ? SPO_OK : SPO_ERROR_STATE;
  if (!backward && T == 0) return SPO_OK;
  if (!s.cond || !args->frozen_cond || !s.uncond != !args->frozen_uncond || !s.x_t || !s.rows || !s.table)
    return SPO_ERROR_NULL;
  if (T > 0 && (!args->x_prev || !args->states)) return SPO_ERROR_NULL;
  if (backward && (!args->grad_cond || (T > 0 && (!args->grad_log_ratio || !args->grad_kl)))) return SPO_ERROR_NULL;
  if (!backward && (!args->log_ratio || !args->kl)) return SPO_ERROR_NULL;
  return with_types<LogRatio>(*args, f);
}

}  // namespace spo
#endif
