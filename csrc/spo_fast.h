/* The C interface of spo_fast: what libspo_fast_cpu.so and libspo_fast_cuda.so both export.
 *
 * Plain C, raw pointers, no torch: one build serves every torch and every Python; spo_fast/ops/c_library.py loads it.
 * Every tensor is dense and contiguous. n = C*H*W elements of one sample. Functions return SPO_OK or an error code.
 * On CUDA they launch on `stream` and return: no synchronisation, no allocation, so a graph capture holds. On CPU
 * `stream` is ignored and the result does not depend on the number of threads, bit for bit.
 */
#ifndef SPO_FAST_H
#define SPO_FAST_H

#include <stdint.h>

#define SPO_API __attribute__((visibility("default")))
#define SPO_ABI_VERSION 2 /* raise it with every change of a signature or a meaning; clib.py refuses any other */

enum { SPO_FLOAT32 = 0, SPO_FLOAT64 = 1, SPO_BFLOAT16 = 2, SPO_FLOAT16 = 3 };

enum {
  SPO_OK = 0,
  SPO_ERROR_DTYPE = 1, /* unknown dtype code, or latents in a 16-bit type */
  SPO_ERROR_SHAPE = 2, /* a negative count, n = 0, or more samples than a CUDA grid has rows */
  SPO_ERROR_NULL = 3,  /* a required pointer is NULL */
  SPO_ERROR_ROW = 4,   /* a row index outside the table (checked on CPU only: a check on CUDA would synchronise) */
  SPO_ERROR_STATE = 5, /* a state index outside [0, U) (checked on CPU only) */
  SPO_ERROR_MEMORY = 6,
  SPO_ERROR_CUDA = 1000 /* plus the cudaError_t */
};

#ifdef __cplusplus
extern "C" {
#endif

SPO_API int spo_abi_version(void);
SPO_API const char *spo_error_string(int code);
SPO_API int spo_set_num_threads(int num_threads); /* CPU only; 0 means one per processor */

/* One Philox4x32-10 block, so that a test can hold it against the published known answers. */
SPO_API int spo_philox(const uint32_t counter[4], const uint32_t key[2], uint32_t out[4]);

/* A table row is (a, b, c, d, std): mean = a x_t + b m, x0 = c x_t + d m, with m = uncond + g (cond - uncond), or
 * m = cond where uncond is NULL. m_dtype: the network's outputs. x_dtype: latents, float32 or float64, computed in too.
 *
 * x0 = c x_t + d m, children[k] = mean + std z_k, in one pass. z_k is noise[k], or without noise the normals of keys
 * (seed, iteration, prompt, step, candidate + k), drawn as philox.h says. x0 may be NULL; so may children if
 * num_children is 0. */
SPO_API int spo_transition(int m_dtype, int x_dtype,
                           const void *cond,      /* (B, n) */
                           const void *uncond,    /* (B, n) or NULL */
                           const void *x_t,       /* (B, n) */
                           const int64_t *rows,   /* (B) */
                           const double *table,   /* (num_rows, 5) */
                           int64_t num_rows,
                           double guidance,
                           const int64_t *keys,   /* (B, 5) or NULL */
                           const void *noise,     /* (K, B, n) or NULL */
                           int64_t num_children,  /* K */
                           int64_t B, int64_t n,
                           void *x0,              /* (B, n) out, or NULL */
                           void *children,        /* (K, B, n) out, or NULL */
                           void *stream);

/* With mu = a x_t + b m of the policy (p) and of the frozen network (r), means over the n elements:
 * log_ratio = log N(x_prev; mu_p, std^2) - log N(x_prev; mu_r, std^2)
 *           = mean (mu_p - mu_r)(2 x_prev - mu_p - mu_r) / (2 std^2)
 * kl        = KL(N(mu_p, std^2) || N(mu_r, std^2)) = mean (mu_p - mu_r)^2 / (2 std^2) */
SPO_API int spo_log_ratio_forward(int m_dtype, int x_dtype,
                                  const void *cond,          /* (U, n) */
                                  const void *uncond,        /* (U, n) or NULL */
                                  const void *frozen_cond,   /* (U, n) */
                                  const void *frozen_uncond, /* (U, n), NULL exactly where uncond is */
                                  const void *x_t,           /* (U, n) */
                                  const void *x_prev,        /* (T, n) */
                                  const int64_t *states,     /* (T), each in [0, U) */
                                  const int64_t *rows,       /* (U) */
                                  const double *table,       /* (num_rows, 5) */
                                  int64_t num_rows,
                                  double guidance, int64_t U, int64_t T, int64_t n,
                                  void *log_ratio,           /* (T) out, x_dtype */
                                  void *kl,                  /* (T) out, x_dtype */
                                  void *stream);

/* d log_ratio_t / d m_p = b (x_prev - mu_p) / (std^2 n), d kl_t / d m_p = b (mu_p - mu_r) / (std^2 n), summed over the
 * transitions of a state in increasing t; times g for cond, 1 - g for uncond. A state without transitions gets 0. */
SPO_API int spo_log_ratio_backward(int m_dtype, int x_dtype,
                                   const void *cond, const void *uncond,
                                   const void *frozen_cond, const void *frozen_uncond,
                                   const void *x_t, const void *x_prev,
                                   const int64_t *states, const int64_t *rows,
                                   const double *table, int64_t num_rows,
                                   double guidance, int64_t U, int64_t T, int64_t n,
                                   const void *grad_log_ratio, /* (T) x_dtype */
                                   const void *grad_kl,        /* (T) x_dtype */
                                   void *grad_cond,            /* (U, n) out, m_dtype */
                                   void *grad_uncond,          /* (U, n) out, m_dtype, or NULL */
                                   void *stream);

/* A scorer's input: pixels resized bicubically (a = -0.75, no antialias) to (resized_h, resized_w), of which the square of
 * `size` at (top, left) is kept, then y = (clamp(x / 2 + 1/2, 0, 1) - mean_c) / std_c, in one read. Computed in float32;
 * nothing outside the square is. strides, mean and std_dev are read on the host, on CUDA too. */
SPO_API int spo_resize_normalize(int pixel_dtype, int out_dtype,
                                 const void *pixels,      /* (N, 3, H, W), any strides */
                                 const int64_t *strides,  /* (4) in elements */
                                 int64_t N, int64_t H, int64_t W,
                                 int64_t resized_h, int64_t resized_w, int64_t top, int64_t left, int64_t size,
                                 const double *mean,      /* (3) */
                                 const double *std_dev,   /* (3) */
                                 void *out,               /* (N, 3, size, size) out, out_dtype */
                                 void *stream);

/* out = weight + delta, summed in float32 and rounded stochastically to dtype (bfloat16, float16; float32 is not
 * rounded), as merge.h says, with the bits of key (seed, iteration and three more). out must not overlap the others. */
SPO_API int spo_merge(int dtype,
                      const void *weight,  /* (n) */
                      const float *delta,  /* (n) */
                      const int64_t *key,  /* (5), on the device */
                      int64_t n,
                      void *out,           /* (n) out, dtype */
                      void *stream);

/* Group norm with frozen weights, then SiLU if `silu`, of x (N, C, S) or, with channels_last, (N, S, C); S pixels:
 * z = (x - mean) rstd weight + bias, y = z sigmoid(z), over the C / num_groups channels and S pixels of each group.
 * Everything is of `dtype` but mean and rstd: float32, or float64 for float64. CPU library only. */
SPO_API int spo_group_norm_silu_forward(int dtype, const void *x,
                                        const void *weight, /* (C) */
                                        const void *bias,   /* (C) */
                                        int64_t N, int64_t C, int64_t S, int64_t num_groups, int channels_last,
                                        double eps, int silu,
                                        void *y,            /* as x, out */
                                        void *mean,         /* (N, num_groups) out */
                                        void *rstd,         /* (N, num_groups) out */
                                        void *stream);

/* grad_x = rstd (t - mean(t) - x_hat mean(t x_hat)), t = weight dL/dz, means over a group. CPU library only. */
SPO_API int spo_group_norm_silu_backward(int dtype, const void *x, const void *weight, const void *bias,
                                         const void *mean, const void *rstd,
                                         const void *grad_y, /* as x */
                                         int64_t N, int64_t C, int64_t S, int64_t num_groups, int channels_last,
                                         int silu,
                                         void *grad_x,       /* as x, out */
                                         void *stream);

#ifdef __cplusplus
}
#endif
#endif
