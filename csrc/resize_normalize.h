// What both sources of spo_resize_normalize share: arguments, taps and the last step. See spo_fast.h for the formulas.
#ifndef SPO_FAST_RESIZE_NORMALIZE_H
#define SPO_FAST_RESIZE_NORMALIZE_H

#include "common.h"

namespace spo {

constexpr int CHANNELS = 3;

template <class P, class O>
struct ResizeArgs {
  const P *pixels;
  O *out;
  int64_t stride_n, stride_c, stride_h, stride_w;
  int N, H, W, resized_h, resized_w, top, left, size;
  float mean[CHANNELS], std_dev[CHANNELS];
};

struct Taps {
  int index[4];  // source pixels, edges repeated
  float weight[4];
};

// Keys' kernel for a = -0.75 at t and at 1 + t, 0 <= t <= 1, without cancellation.
SPO_HD float cubic_near(float t) { return 1 - t * t * (2.25f - 1.25f * t); }
SPO_HD float cubic_far(float t) { return -0.75f * t * (1 - t) * (1 - t); }

// Half-pixel centres: (o + 1/2) source / target - 1/2 as a whole number and a fraction, by integers, since in float32
// the position at pixel 1000 would be off by 3e-5 of a pixel.
SPO_HD Taps cubic_taps(int o, int source, int target) {
  const int numerator = (2 * o + 1) * source + target;  // 2 target times the position, plus one pixel: never negative
  const int first = numerator / (2 * target) - 2;
  const float t = static_cast<float>(numerator % (2 * target)) / static_cast<float>(2 * target);
  Taps taps = {{0, 0, 0, 0}, {cubic_far(t), cubic_near(t), cubic_near(1 - t), cubic_far(1 - t)}};
  for (int k = 0; k < 4; ++k) {
    const int i = first + k;
    taps.index[k] = i < 0 ? 0 : i >= source ? source - 1 : i;
  }
  return taps;
}

SPO_HD float normalised(float x, float mean, float std_dev) {
  x = x / 2 + 0.5f;
  x = x < 0 ? 0.0f : x > 1 ? 1.0f : x;  // a NaN stays one
  return (x - mean) / std_dev;
}

// Checks, then calls f(ResizeArgs) with the types of the two dtype codes, unless there is nothing to do.
template <class F>
int with_resize_args(const spo_resize_normalize_args *given, F f) {
  constexpr int64_t LIMIT = INT32_MAX;
  if (const int code = check(given)) return code;
  const spo_resize_normalize_args &g = *given;
  if (g.N < 0 || g.N > LIMIT || g.H <= 0 || g.W <= 0 || g.size <= 0 || g.top < 0 || g.left < 0) return SPO_ERROR_SHAPE;
  if (g.top + g.size > g.resized_h || g.left + g.size > g.resized_w) return SPO_ERROR_SHAPE;
  if (g.H > LIMIT / (4 * g.resized_h) || g.W > LIMIT / (4 * g.resized_w)) return SPO_ERROR_SHAPE;  // 32-bit taps
  if (g.N == 0) return SPO_OK;
  if (!g.pixels || !g.out) return SPO_ERROR_NULL;
  return with_type(g.pixel_dtype, [&](auto p) {
    using P = decltype(p);
    return with_type(g.out_dtype, [&](auto o) {
      using O = decltype(o);
      ResizeArgs<P, O> args{};
      args.pixels = static_cast<const P *>(g.pixels), args.out = static_cast<O *>(g.out);
      args.stride_n = g.strides[0], args.stride_c = g.strides[1];
      args.stride_h = g.strides[2], args.stride_w = g.strides[3];
      args.N = static_cast<int>(g.N), args.H = static_cast<int>(g.H), args.W = static_cast<int>(g.W);
      args.resized_h = static_cast<int>(g.resized_h), args.resized_w = static_cast<int>(g.resized_w);
      args.top = static_cast<int>(g.top), args.left = static_cast<int>(g.left), args.size = static_cast<int>(g.size);
      for (int c = 0; c < CHANNELS; ++c) {
        args.mean[c] = static_cast<float>(g.mean[c]), args.std_dev[c] = static_cast<float>(g.std_dev[c]);
      }
      return f(args);
    });
  });
}

}  // namespace spo
#endif
