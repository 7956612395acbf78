// CPU: the scorer's input from decoded pixels. See spo_fast.h for the formulas.
//
// A piece is one row of one output image: the four source rows are mixed first, then four columns each. Pixels that
// lie channel by channel are mixed as three lines, those that lie side by side as one: both vectorise.
#include "resize_normalize.h"

#include <atomic>
#include <memory>
#include <vector>

#include "isa.h"
#include "parallel.h"

namespace spo {
namespace {

struct Columns {  // of every output column: where its taps lie in a line, and their weights
  std::vector<int> index[4];
  std::vector<float> weight[4];
};

// line[x] of the source columns [begin, end), `step` elements apart
template <class P>
SPO_INLINE void mix_rows(const P *plane, const Taps &rows, int64_t stride_h, int64_t step, int64_t begin, int64_t end,
                         float *__restrict line) {
  const float w0 = rows.weight[0], w1 = rows.weight[1], w2 = rows.weight[2], w3 = rows.weight[3];
  const P *r0 = plane + rows.index[0] * stride_h, *r1 = plane + rows.index[1] * stride_h;
  const P *r2 = plane + rows.index[2] * stride_h, *r3 = plane + rows.index[3] * stride_h;
  const auto mix = [&](int64_t x, int64_t at) __attribute__((always_inline)) {
    line[x] = w0 * static_cast<float>(widen(r0[at])) + w1 * static_cast<float>(widen(r1[at])) +
              w2 * static_cast<float>(widen(r2[at])) + w3 * static_cast<float>(widen(r3[at]));
  };
  if (step == 1)
    for (int64_t x = begin; x < end; ++x) mix(x, x);
  else
    for (int64_t x = begin; x < end; ++x) mix(x, x * step);
}

template <class P, class O>
SPO_INLINE void output_row(const ResizeArgs<P, O> &args, int64_t image, int y, const Columns &columns, int64_t begin,
                           int64_t end, bool side_by_side, float *__restrict line) {
  const Taps rows = cubic_taps(y + args.top, args.H, args.resized_h);
  const int *i0 = columns.index[0].data(), *i1 = columns.index[1].data();
  const int *i2 = columns.index[2].data(), *i3 = columns.index[3].data();
  const float *w0 = columns.weight[0].data(), *w1 = columns.weight[1].data();
  const float *w2 = columns.weight[2].data(), *w3 = columns.weight[3].data();
  for (int c = 0; c < CHANNELS; ++c) {
    const P *plane = args.pixels + image * args.stride_n + c * args.stride_c;
    if (c == 0 || !side_by_side)
      mix_rows(plane, rows, args.stride_h, side_by_side ? 1 : args.stride_w, begin, end, line);
    const float *mixed = side_by_side ? line + c : line, mean = args.mean[c], std_dev = args.std_dev[c];
    O *__restrict out = args.out + ((image * CHANNELS + c) * args.size + y) * args.size;
    for (int x = 0; x < args.size; ++x) {
      const float value = w0[x] * mixed[i0[x]] + w1[x] * mixed[i1[x]] + w2[x] * mixed[i2[x]] + w3[x] * mixed[i3[x]];
      narrow(normalised(value, mean, std_dev), out + x);
    }
  }
}

template <class P, class O>
int resize_normalize(const ResizeArgs<P, O> &args) {
  const bool side_by_side = args.stride_c == 1 && args.stride_w == CHANNELS;
  const int spread = side_by_side ? CHANNELS : 1;  // elements of a line that a pixel has
  Columns columns;
  int begin = args.W, end = 0;  // the source columns that are read
  for (int x = 0; x < args.size; ++x) {
    const Taps taps = cubic_taps(x + args.left, args.W, args.resized_w);
    for (int k = 0; k < 4; ++k) {
      columns.index[k].push_back(taps.index[k] * spread);
      columns.weight[k].push_back(taps.weight[k]);
    }
    begin = std::min(begin, taps.index[0]);
    end = std::max(end, taps.index[3] + 1);
  }
  std::atomic<bool> failed{false};
  parallel_for(static_cast<int64_t>(args.N) * args.size, [&](int64_t i) {
    const std::unique_ptr<float[]> line(new (std::nothrow) float[static_cast<size_t>(args.W) * spread]);
    if (line == nullptr) {
      failed = true;  // a thread must not throw
      return;
    }
    vectorised([&] SPO_LOOP {
      output_row(args, i / args.size, static_cast<int>(i % args.size), columns, begin * spread, end * spread,
                 side_by_side, line.get());
    });
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
