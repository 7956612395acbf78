/* The C interface of spo_fast: what libspo_fast_cpu.so and libspo_fast_cuda.so both export.
 *
 * Plain C, raw pointers, no torch: one build serves every torch and every Python; spo_fast/ops/c_library.py loads it.
 * A function takes a struct, which stands before it, and whose first field is its size as the caller knows it: one
 * built from another header is refused. spo_fast/ops mirrors each struct beside its op. Fields left 0 are NULL.
 * Every tensor is dense and contiguous. n = C*H*W elements of one sample. Functions return SPO_OK or an error code.
 * On CUDA they launch on `stream` and return: no synchronisation, no allocation, so a graph capture holds. On CPU
 * `stream` is ignored and the result does not depend on the number of threads, bit for bit.
 */
#ifndef SPO_FAST_H
#define SPO_FAST_H

#include <stdint.h>

#define SPO_API __attribute__((visibility("default")))
#define SPO_ABI_VERSION 4 /* raise it with every change of a field or a meaning; c_library.py refuses any other */

enum { SPO_FLOAT32 = 0, SPO_FLOAT64 = 1, SPO_BFLOAT16 = 2, SPO_FLOAT16 = 3 };

enum { SPO_ISA_BEST = 0, SPO_ISA_PLAIN = 1, SPO_ISA_AVX2 = 2, SPO_ISA_AVX512 = 3 };

enum {
  SPO_OK = 0,
  SPO_ERROR_DTYPE = 1, /* unknown dtype code, or latents in a 16-bit type */
  SPO_ERROR_SHAPE = 2, /* a negative count, n = 0, or more samples than a CUDA grid has rows */
  SPO_ERROR_NULL = 3,  /* a required pointer is NULL */
  SPO_ERROR_ROW = 4,   /* a row index outside the table (checked on CPU only: a check on CUDA would synchronise) */
  SPO_ERROR_STATE = 5, /* a state index outside [0, U) (checked on CPU only) */
  SPO_ERROR_MEMORY = 6,
  SPO_ERROR_SIZE = 7, /* the struct has another size than the library was built for */
  SPO_ERROR_ISA = 8,  /* an instruction set that this processor, or this build, does not have */
  SPO_ERROR_CUDA = 1000 /* plus the cudaError_t */
};

#ifdef __cplusplus
extern "C" {
#endif

SPO_API int spo_abi_version(void);
SPO_API const char *spo_error_string(int code);
SPO_API int spo_set_num_threads(int num_threads); /* CPU only; 0 means one per processor */

/* CPU only: the instruction set of the loops, so that a test can hold each against the others: all give the same bits.
 * The best one of this processor is in use until this is called. */
SPO_API int spo_set_isa(int isa);

/* One Philox4x32-10 block, so that a test can hold it against the published known answers. */
SPO_API int spo_philox(const uint32_t counter[4], const uint32_t key[2], uint32_t out[4]);

/* States of a denoising step. A table row is (a, b, c, d, std): mean = a x_t + b m, x0 = c x_t + d m, with
 * m = uncond + g (cond - uncond), or m = cond where uncond is NULL. */
typedef struct {
  int64_t bytes;       /* sizeof the struct that this one begins */
  int64_t m_dtype;     /* of the network's outputs */
  int64_t x_dtype;     /* of latents, float32 or float64; computed in, too */
  const void *cond;    /* (B, n) m_dtype */
  const void *uncond;  /* (B, n) or NULL */
  const void *x_t;     /* (B, n) x_dtype */
  const int64_t *rows; /* (B) */
  const double *table; /* (num_rows, 5) */
  int64_t num_rows;
  double guidance;
  int64_t B;
  int64_t n;
} spo_step;

typedef struct {
  spo_step step;
  const int64_t *keys;  /* (B, 5) or NULL */
  const void *noise;    /* (K, B, n) or NULL; goes before keys */
  int64_t num_children; /* K */
  void *x0;             /* (B, n) out, or NULL */
  void *children;       /* (K, B, n) out; NULL if K is 0 */
} spo_transition_args;

/* x0 = c x_t + d m, children[k] = mean + std z_k, in one pass. z_k is noise[k], or without noise the normals of keys
 * (seed, iteration, prompt, step, candidate + k), drawn as philox.h says. */
SPO_API int spo_transition(const spo_transition_args *args, void *stream);

typedef struct {
  spo_step step;              /* of the policy */
  const void *frozen_cond;    /* (B, n) m_dtype */
  const void *frozen_uncond;  /* (B, n), NULL exactly where uncond is */
  const void *x_prev;         /* (T, n) x_dtype */
  const int64_t *states;      /* (T), each in [0, B) */
  int64_t T;
  void *log_ratio;            /* forward: (T) out, x_dtype */
  void *kl;                   /* forward: (T) out, x_dtype */
  const void *grad_log_ratio; /* backward: (T) x_dtype */
  const void *grad_kl;        /* backward: (T) x_dtype */
  void *grad_cond;            /* backward: (B, n) out, m_dtype */
  void *grad_uncond;          /* backward: (B, n) out, m_dtype, or NULL */
} spo_log_ratio_args;

/* With mu = a x_t + b m of the policy (p) and of the frozen network (r), means over the n elements:
 * log_ratio = log N(x_prev; mu_p, std^2) - log N(x_prev; mu_r, std^2)
 *           = mean (mu_p - mu_r)(2 x_prev - mu_p - mu_r) / (2 std^2)
 * kl        = KL(N(mu_p, std^2) || N(mu_r, std^2)) = mean (mu_p - mu_r)^2 / (2 std^2) */
SPO_API int spo_log_ratio_forward(const spo_log_ratio_args *args, void *stream);

/* d log_ratio_t / d m_p = b (x_prev - mu_p) / (std^2 n), d kl_t / d m_p = b (mu_p - mu_r) / (std^2 n), summed over the
 * transitions of a state in increasing t; times g for cond, 1 - g for uncond. A state without transitions gets 0. */
SPO_API int spo_log_ratio_backward(const spo_log_ratio_args *args, void *stream);

typedef struct {
  int64_t bytes;
  int64_t pixel_dtype;
  int64_t out_dtype;
  const void *pixels; /* (N, 3, H, W), any strides */
  int64_t strides[4]; /* in elements */
  int64_t N;
  int64_t H;
  int64_t W;
  int64_t resized_h;
  int64_t resized_w;
  int64_t top;
  int64_t left;
  int64_t size;
  double mean[3];
  double std_dev[3];
  void *out; /* (N, 3, size, size) out, out_dtype */
} spo_resize_normalize_args;

/* A scorer's input: pixels resized bicubically (a = -0.75, no antialias) to (resized_h, resized_w), of which the square of
 * `size` at (top, left) is kept, then y = (clamp(x / 2 + 1/2, 0, 1) - mean_c) / std_c, in one read. Computed in float32;
 * nothing outside the square is. */
SPO_API int spo_resize_normalize(const spo_resize_normalize_args *args, void *stream);

typedef struct {
  int64_t bytes;
  int64_t dtype;
  const void *weight; /* (n) dtype */
  const float *delta; /* (n) */
  const int64_t *key; /* (5), on the device */
  int64_t n;
  void *out;          /* (n) out, dtype */
} spo_merge_args;

/* out = weight + delta, summed in float32 and rounded stochastically to dtype (bfloat16, float16; float32 is not
 * rounded), as merge.h says, with the bits of key (seed, iteration and three more). out must not overlap the others. */
SPO_API int spo_merge(const spo_merge_args *args, void *stream);

typedef struct {
  int64_t bytes;
  int64_t dtype;        /* of everything but mean and rstd: float32, or float64 for float64 */
  const void *x;        /* (N, C, S) or, with channels_last, (N, S, C); S pixels */
  const void *weight;   /* (C) */
  const void *bias;     /* (C) */
  int64_t N;
  int64_t C;
  int64_t S;
  int64_t num_groups;
  int64_t channels_last;
  int64_t silu;
  double eps;
  void *mean;           /* (N, num_groups): forward out, backward in */
  void *rstd;           /* (N, num_groups): forward out, backward in */
  void *y;              /* forward: as x, out */
  const void *grad_y;   /* backward: as x */
  void *grad_x;         /* backward: as x, out */
} spo_group_norm_silu_args;

/* Group norm with frozen weights, then SiLU if `silu`: z = (x - mean) rstd weight + bias, y = z sigmoid(z), over the
 * C / num_groups channels and S pixels of each group. CPU library only. */
SPO_API int spo_group_norm_silu_forward(const spo_group_norm_silu_args *args, void *stream);

/* grad_x = rstd (t - mean(t) - x_hat mean(t x_hat)), t = weight dL/dz, means over a group. CPU library only. */
SPO_API int spo_group_norm_silu_backward(const spo_group_norm_silu_args *args, void *stream);

typedef struct {
  int64_t bytes;
  int64_t dtype;        /* of all tensors */
  const void *h;        /* (rows, 2 D) */
  const void *bias;     /* (2 D), or NULL */
  const void *grad_y;   /* backward: (rows, D) */
  int64_t rows;
  int64_t D;
  void *y;              /* forward: (rows, D) out */
  void *grad_h;         /* backward: (rows, 2 D) out */
} spo_geglu_args;

/* y = a g Phi(g), a and g the halves of a row of h + bias, Phi the standard normal's distribution; in float32 inside, or
 * float64 for float64. CPU library only. */
SPO_API int spo_geglu_forward(const spo_geglu_args *args, void *stream);

/* grad_h = (dy g Phi(g), dy a (Phi(g) + g phi(g))), phi the density. CPU library only. */
SPO_API int spo_geglu_backward(const spo_geglu_args *args, void *stream);

#ifdef __cplusplus
}
#endif
#endif
