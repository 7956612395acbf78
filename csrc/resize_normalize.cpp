// CPU: the scorer's input from decoded pixels. See spo_fast.h for the formulas.
//
// A piece is one row of one output image: the four source rows are mixed first, which vectorises, then four columns each.
#include "resize_normalize.h"

#include <atomic>
#include <memory>
#include <vector>

#include "parallel.h"

namespace spo {
namespace {

template <class P, class O>
void output_row(const ResizeArgs<P, O> &args, int64_t image, int y, const std::vector<Taps> &columns, int begin,
                int end, float *line) {
  const Taps rows = cubic_taps(y + args.top, args.H, args.resized_h);
  const float w0 = rows.weight[0], w1 = rows.weight[1], w2 = rows.weight[2], w3 = rows.weight[3];
  const int64_t step = args.stride_w;
  for (int c = 0; c < CHANNELS; ++c) {
    const P *plane = args.pixels + image * args.stride_n + c * args.stride_c;
    const P *r0 = plane + rows.index[0] * args.stride_h, *r1 = plane + rows.index[1] * args.stride_h;
    const P *r2 = plane + rows.index[2] * args.stride_h, *r3 = plane + rows.index[3] * args.stride_h;
    const auto mix = [&](int64_t x, int64_t at) {
      line[x] = w0 * static_cast<float>(widen(r0[at])) + w1 * static_cast<float>(widen(r1[at])) +
                w2 * static_cast<float>(widen(r2[at])) + w3 * static_cast<float>(widen(r3[at]));
    };
    if (step == 1) {
#pragma omp simd
      for (int64_t x = begin; x < end; ++x) mix(x, x);
    } else {
      for (int64_t x = begin; x < end; ++x) mix(x, x * step);
    }
    O *out = args.out + ((image * CHANNELS + c) * args.size + y) * args.size;
    for (int x = 0; x < args.size; ++x) {
      const Taps &taps = columns[x];
      const float value = taps.weight[0] * line[taps.index[0]] + taps.weight[1] * line[taps.index[1]] +
                          taps.weight[2] * line[taps.index[2]] + taps.weight[3] * line[taps.index[3]];
      narrow(normalised(value, args.mean[c], args.std_dev[c]), out + x);
    }
  }
}

template <class P, class O>
int resize_normalize(const ResizeArgs<P, O> &args) {
  std::vector<Taps> columns(static_cast<size_t>(args.size));
  int begin = args.W, end = 0;  // the source columns that are read
  for (int x = 0; x < args.size; ++x) {
    columns[x] = cubic_taps(x + args.left, args.W, args.resized_w);
    begin = std::min(begin, columns[x].index[0]);
    end = std::max(end, columns[x].index[3] + 1);
  }
  std::atomic<bool> failed{false};
  parallel_for(static_cast<int64_t>(args.N) * args.size, [&](int64_t i) {
    const std::unique_ptr<float[]> line(new (std::nothrow) float[static_cast<size_t>(args.W)]);
    if (line == nullptr)
      failed = true;  // a thread must not throw
    else
      output_row(args, i / args.size, static_cast<int>(i % args.size), columns, begin, end, line.get());
  });
  return failed ? SPO_ERROR_MEMORY : SPO_OK;
}

}  // namespace
}  // namespace spo

extern "C" int spo_resize_normalize(const spo_resize_normalize_args *args, void *) {
  return spo::with_resize_args(args, [](const auto &resize) {
    int code = SPO_OK;
    const int memory = spo::guard([&] { code = spo::resize_normalize(resize); });
    return memory != SPO_OK ? memory : code;
  });
}
