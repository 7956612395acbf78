// CUDA: the scorer's input from decoded pixels. See spo_fast.h for the formulas.
//
// One thread a pixel of the output, three channels each: positions and weights are computed once, and neighbouring
// threads read neighbouring pixels, so each line of the source comes from memory once.
#include "resize_normalize.h"

namespace spo {
namespace {

template <class P, class O>
__global__ void __launch_bounds__(THREADS) resize_normalize_kernel(const ResizeArgs<P, O> args) {
  const int at = static_cast<int>(blockIdx.x) * THREADS + static_cast<int>(threadIdx.x);
  if (at >= args.size * args.size) return;
  const int64_t image = blockIdx.y;
  const Taps rows = cubic_taps(at / args.size + args.top, args.H, args.resized_h);
  const Taps columns = cubic_taps(at % args.size + args.left, args.W, args.resized_w);
#pragma unroll
  for (int c = 0; c < CHANNELS; ++c) {
    const P *plane = args.pixels + image * args.stride_n + c * args.stride_c;
    float value = 0;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const P *line = plane + rows.index[j] * args.stride_h;
      float sum = 0;
#pragma unroll
      for (int k = 0; k < 4; ++k)
        sum += columns.weight[k] * static_cast<float>(widen(line[columns.index[k] * args.stride_w]));
      value += rows.weight[j] * sum;
    }
    O *out = args.out + (image * CHANNELS + c) * args.size * args.size + at;
    narrow(normalised(value, args.mean[c], args.std_dev[c]), out);
  }
}

}  // namespace
}  // namespace spo

extern "C" int spo_resize_normalize(const spo_resize_normalize_args *args, void *stream) {
  return spo::with_resize_args(args, [&](const auto &resize) -> int {
    if (resize.N > spo::MAX_GRID_Y || resize.size > 32768) return SPO_ERROR_SHAPE;
    const dim3 grid(spo::blocks(resize.size * resize.size), static_cast<unsigned>(resize.N));
    spo::resize_normalize_kernel<<<grid, spo::THREADS, 0, static_cast<cudaStream_t>(stream)>>>(resize);
    return spo::launch_error();
  });
}
