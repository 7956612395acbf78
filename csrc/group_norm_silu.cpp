// CPU: group norm with frozen weights, and SiLU. See spo_fast.h for the formulas.
//
// Both memory layouts are walked as tiles of rows x columns whose columns are contiguous: pixels x channels in
// channels-last (several pixels a row where they have few channels: short loops are slow ones), stretches x offsets of
// one channel's plane otherwise. Moments are taken a column at a time, twice over a piece that fits the cache (first the
// mean, then squared deviations from it), and merged in float64 in a fixed order.
#include <cmath>
#include <vector>

#include "activations.h"
#include "common.h"
#include "isa.h"
#include "parallel.h"

namespace spo {
namespace {

constexpr int64_t PIECE = 16384;  // elements: 64 KiB of float32 stay in a core's cache between two sweeps
constexpr int64_t COLUMNS = 256;  // of a tile, at most
constexpr int64_t PLANE_COLUMNS = 64;  // where all of them belong to one channel

template <class A>
SPO_INLINE A sigmoid(A z) {
  return 1 / (1 + exponential(-z));
}

// What a tile's columns need to know: its channels' affine weights and their groups' statistics.
template <class A>
struct Columns {
  A mean[COLUMNS], rstd[COLUMNS], weight[COLUMNS], bias[COLUMNS];
  A grad_mean[COLUMNS], grad_projection[COLUMNS];  // backward only: means of w dz and of w dz x_hat over the group
};

// A row in the wide type and back, by loops of their own: those of the arithmetic vectorise better without conversions.
template <class T, class A>
SPO_INLINE const A *widen_row(const T *__restrict x, int64_t columns, A *__restrict row) {
  if constexpr (std::is_same_v<T, A>) return x;
  for (int64_t j = 0; j < columns; ++j) row[j] = static_cast<A>(widen(x[j]));
  return row;
}

template <class T, class A>
SPO_INLINE void narrow_row(const A *__restrict row, int64_t columns, T *__restrict y) {
  for (int64_t j = 0; j < columns; ++j) narrow(row[j], y + j);
}

// Sum of a column, then of deviations from its mean (what rounding left) and of their squares.
template <class T, class A>
SPO_INLINE void column_moments(const T *x, int64_t rows, int64_t stride, int64_t columns, A *__restrict mean,
                               A *__restrict rest, A *__restrict squares) {
  A buffer[COLUMNS];
  for (int64_t j = 0; j < columns; ++j) mean[j] = rest[j] = squares[j] = 0;
  for (int64_t i = 0; i < rows; ++i) {
    const A *__restrict row = widen_row(x + i * stride, columns, buffer);
    for (int64_t j = 0; j < columns; ++j) mean[j] += row[j];
  }
  for (int64_t j = 0; j < columns; ++j) mean[j] /= static_cast<A>(rows);
  for (int64_t i = 0; i < rows; ++i) {
    const A *__restrict row = widen_row(x + i * stride, columns, buffer);
    for (int64_t j = 0; j < columns; ++j) {
      const A deviation = row[j] - mean[j];
      rest[j] += deviation;
      squares[j] += deviation * deviation;
    }
  }
}

template <class T, class A>
SPO_INLINE void normalise(const T *x, int64_t rows, int64_t stride, int64_t columns, const Columns<A> &c, bool silu,
                          T *y) {
  A buffer[COLUMNS], z[COLUMNS];
  for (int64_t i = 0; i < rows; ++i) {
    const A *__restrict row = widen_row(x + i * stride, columns, buffer);
    for (int64_t j = 0; j < columns; ++j) z[j] = (row[j] - c.mean[j]) * c.rstd[j] * c.weight[j] + c.bias[j];
    if (silu)
      for (int64_t j = 0; j < columns; ++j) z[j] *= sigmoid(z[j]);
    narrow_row(z, columns, y + i * stride);
  }
}

// x_hat of a row, and w dz: the gradient of the loss with respect to it.
template <class T, class A>
SPO_INLINE void grad_row(const T *x, const T *grad_y, int64_t columns, const Columns<A> &c,
                                            bool silu, A *__restrict x_hat, A *__restrict grad) {
  const A *wide_x = widen_row(x, columns, x_hat), *wide_grad = widen_row(grad_y, columns, grad);
  for (int64_t j = 0; j < columns; ++j) {
    x_hat[j] = (wide_x[j] - c.mean[j]) * c.rstd[j];
    grad[j] = wide_grad[j] * c.weight[j];
  }
  if (silu)
    for (int64_t j = 0; j < columns; ++j) {
      const A z = x_hat[j] * c.weight[j] + c.bias[j], s = sigmoid(z);
      grad[j] *= s * (1 + z * (1 - s));
    }
}

template <class T, class A>
SPO_INLINE void column_sums(const T *x, const T *grad_y, int64_t rows, int64_t stride, int64_t columns,
                            const Columns<A> &c, bool silu, A *__restrict total, A *__restrict projection) {
  A x_hat[COLUMNS], grad[COLUMNS];
  for (int64_t j = 0; j < columns; ++j) total[j] = projection[j] = 0;
  for (int64_t i = 0; i < rows; ++i) {
    grad_row(x + i * stride, grad_y + i * stride, columns, c, silu, x_hat, grad);
    for (int64_t j = 0; j < columns; ++j) {
      total[j] += grad[j];
      projection[j] += grad[j] * x_hat[j];
    }
  }
}

template <class T, class A>
SPO_INLINE void grad_input(const T *x, const T *grad_y, int64_t rows, int64_t stride, int64_t columns,
                           const Columns<A> &c, bool silu, T *grad_x) {
  A x_hat[COLUMNS], grad[COLUMNS];
  for (int64_t i = 0; i < rows; ++i) {
    grad_row(x + i * stride, grad_y + i * stride, columns, c, silu, x_hat, grad);
    for (int64_t j = 0; j < columns; ++j)
      grad[j] = c.rstd[j] * (grad[j] - c.grad_mean[j] - x_hat[j] * c.grad_projection[j]);
    narrow_row(grad, columns, grad_x + i * stride);
  }
}

struct Moments {
  double count = 0, mean = 0, squares = 0;  // squares: of deviations from the mean

  void add(const Moments &other) {  // Chan, Golub and LeVeque 1983
    if (other.count == 0) return;
    const double total = count + other.count, shift = other.mean - mean;
    mean += shift * other.count / total;
    squares += other.squares + shift * shift * count * other.count / total;
    count = total;
  }
};

struct Tile {
  int64_t start, rows, stride, columns;
  int64_t sample, channel, step;  // column j belongs to channel + j * step
  int64_t pixels = 1;  // of a row, each `columns` wide

  int64_t width() const { return pixels * columns; }

  // f(j) for each of a run's columns in all pixels of a row.
  template <class F>
  SPO_INLINE void each(int64_t first, int64_t count, F f) const {
    for (int64_t p = 0; p < pixels; ++p)
      for (int64_t j = 0; j < count; ++j) f(p * columns + first + j);
  }
};

// Moments of a run of columns of one group: column j has mean center + rest / rows.
template <class A>
Moments moments_of(const Tile &tile, int64_t first, int64_t columns, const A *center, const A *rest,
                   const A *squares) {
  const double rows = static_cast<double>(tile.rows), count = static_cast<double>(tile.pixels * columns);
  double sum = 0, sum_squares = 0;
  tile.each(first, columns, [&](int64_t j) { sum += center[j] + rest[j] / rows; });
  const double mean = sum / count;
  tile.each(first, columns, [&](int64_t j) {
    const double left = rest[j] / rows, shift = center[j] + left - mean;
    sum_squares += squares[j] + rows * (shift * shift - left * left);
  });
  return {rows * count, mean, sum_squares};
}

struct Sums {
  double total = 0, projection = 0;

  void add(const Sums &other) {
    total += other.total;
    projection += other.projection;
  }
};

template <class T>
struct GroupNorm {
  using A = Wide<T>;
  const T *x, *weight, *bias;
  int64_t N, C, S, G;
  bool channels_last, silu;

  explicit GroupNorm(const spo_group_norm_silu_args &args)
      : x(static_cast<const T *>(args.x)), weight(static_cast<const T *>(args.weight)),
        bias(static_cast<const T *>(args.bias)), N(args.N), C(args.C), S(args.S), G(args.num_groups),
        channels_last(args.channels_last != 0), silu(args.silu != 0) {}

  int64_t group_size() const { return C / G; }
  int64_t pixels() const { return std::max<int64_t>(1, PIECE / C); }  // of a piece, channels-last
  int64_t chunks() const { return ceil_div(S, channels_last ? pixels() : PIECE); }
  int64_t pieces() const { return chunks() * (channels_last ? N : N * C); }
  int64_t slots() const { return channels_last ? G : 1; }  // groups that meet in a piece

  template <class F>
  void tiles(int64_t piece, F f) const {
    const int64_t k = piece % chunks(), owner = piece / chunks();  // owner: a sample, or one of its channels
    if (channels_last) {
      const int64_t first = k * pixels(), count = std::min(pixels(), S - first), start = (owner * S + first) * C;
      const int64_t together = std::max<int64_t>(1, COLUMNS / C), rows = count / together, rest = count % together;
      for (int64_t c = 0; c < C && rows > 0; c += COLUMNS)
        f(Tile{start + c, rows, together * C, std::min(COLUMNS, C - c), owner, c, 1, together});
      if (rest > 0) f(Tile{start + (count - rest) * C, 1, rest * C, C, owner, 0, 1, rest});
      return;
    }
    const int64_t start = owner * S + k * PIECE, count = std::min(PIECE, S - k * PIECE), rows = count / PLANE_COLUMNS;
    if (rows > 0) f(Tile{start, rows, PLANE_COLUMNS, PLANE_COLUMNS, owner / C, owner % C, 0});
    const int64_t done = rows * PLANE_COLUMNS;
    if (done < count) f(Tile{start + done, 1, count - done, count - done, owner / C, owner % C, 0});
  }

  // The runs of a pixel's columns that belong to one group: f(slot of the piece, first column, columns).
  template <class F>
  void runs(const Tile &tile, F f) const {
    if (tile.step == 0) return f(0, 0, tile.columns);
    for (int64_t j = 0; j < tile.columns;) {
      const int64_t group = (tile.channel + j) / group_size();
      const int64_t columns = std::min((group + 1) * group_size() - tile.channel, tile.columns) - j;
      f(group, j, columns);
      j += columns;
    }
  }

  // Sums what each piece found for each of its groups, in the order of the pieces; then result(sample * G + group, sum).
  template <class Part, class Result>
  void combine(const std::vector<Part> &parts, Result result) const {
    for (int64_t n = 0; n < N; ++n)
      for (int64_t g = 0; g < G; ++g) {
        Part sum;
        if (channels_last)
          for (int64_t k = 0; k < chunks(); ++k) sum.add(parts[(n * chunks() + k) * G + g]);
        else
          for (int64_t i = 0; i < group_size() * chunks(); ++i)
            sum.add(parts[(n * C + g * group_size()) * chunks() + i]);
        result(n * G + g, sum);
      }
  }

  Columns<A> columns_of(const Tile &tile, const A *mean, const A *rstd, const std::vector<Sums> *grads) const {
    Columns<A> c;
    runs(tile, [&](int64_t, int64_t first, int64_t columns) {
      const int64_t at = tile.sample * G + (tile.channel + first * tile.step) / group_size();
      for (int64_t j = first; j < first + columns; ++j) {
        c.mean[j] = mean[at];
        c.rstd[j] = rstd[at];
        c.weight[j] = static_cast<A>(widen(weight[tile.channel + j * tile.step]));
        c.bias[j] = static_cast<A>(widen(bias[tile.channel + j * tile.step]));
        c.grad_mean[j] = grads == nullptr ? 0 : static_cast<A>((*grads)[at].total);
        c.grad_projection[j] = grads == nullptr ? 0 : static_cast<A>((*grads)[at].projection);
      }
    });
    for (A *column : {c.mean, c.rstd, c.weight, c.bias, c.grad_mean, c.grad_projection})
      for (int64_t j = tile.columns; j < tile.width(); ++j) column[j] = column[j - tile.columns];
    return c;
  }

  void forward(const spo_group_norm_silu_args &args) const {
    T *y = static_cast<T *>(args.y);
    A *mean = static_cast<A *>(args.mean), *rstd = static_cast<A *>(args.rstd);
    const double eps = args.eps;
    std::vector<Moments> parts(static_cast<size_t>(pieces() * slots()));
    parallel_for(pieces(), [&](int64_t piece) {
      tiles(piece, [&](const Tile &tile) {
        A center[COLUMNS], rest[COLUMNS], squares[COLUMNS];
        vectorised([&] SPO_LOOP {
          column_moments(x + tile.start, tile.rows, tile.stride, tile.width(), center, rest, squares);
        });
        runs(tile, [&](int64_t slot, int64_t first, int64_t columns) {
          parts[piece * slots() + slot].add(moments_of(tile, first, columns, center, rest, squares));
        });
      });
    });
    combine(parts, [&](int64_t at, const Moments &moments) {
      mean[at] = static_cast<A>(moments.mean);
      rstd[at] = static_cast<A>(1 / std::sqrt(moments.squares / moments.count + eps));
    });
    parallel_for(pieces(), [&](int64_t piece) {
      tiles(piece, [&](const Tile &tile) {
        const Columns<A> c = columns_of(tile, mean, rstd, nullptr);
        vectorised([&] SPO_LOOP {
          normalise(x + tile.start, tile.rows, tile.stride, tile.width(), c, silu, y + tile.start);
        });
      });
    });
  }

  void backward(const spo_group_norm_silu_args &args) const {
    const A *mean = static_cast<const A *>(args.mean), *rstd = static_cast<const A *>(args.rstd);
    const T *grad_y = static_cast<const T *>(args.grad_y);
    T *grad_x = static_cast<T *>(args.grad_x);
    std::vector<Sums> parts(static_cast<size_t>(pieces() * slots())), grads(static_cast<size_t>(N * G));
    parallel_for(pieces(), [&](int64_t piece) {
      tiles(piece, [&](const Tile &tile) {
        const Columns<A> c = columns_of(tile, mean, rstd, nullptr);
        A total[COLUMNS], projection[COLUMNS];
        vectorised([&] SPO_LOOP {
          column_sums(x + tile.start, grad_y + tile.start, tile.rows, tile.stride, tile.width(), c, silu, total,
                      projection);
        });
        runs(tile, [&](int64_t slot, int64_t first, int64_t columns) {
          tile.each(first, columns, [&](int64_t j) { parts[piece * slots() + slot].add({total[j], projection[j]}); });
        });
      });
    });
    const double elements = static_cast<double>(group_size() * S);
    combine(parts, [&](int64_t at, const Sums &sums) { grads[at] = {sums.total / elements, sums.projection / elements}; });
    parallel_for(pieces(), [&](int64_t piece) {
      tiles(piece, [&](const Tile &tile) {
        const Columns<A> c = columns_of(tile, mean, rstd, &grads);
        vectorised([&] SPO_LOOP {
          grad_input(x + tile.start, grad_y + tile.start, tile.rows, tile.stride, tile.width(), c, silu,
                     grad_x + tile.start);
        });
      });
    });
  }
};

// Checks, then calls f(GroupNorm<T>) with the type of the dtype code, unless there is nothing to do.
template <class F>
int with_group_norm(const spo_group_norm_silu_args *args, bool backward, F f) {
  if (const int code = check(args)) return code;
  if (args->N < 0 || args->C <= 0 || args->S <= 0 || args->num_groups <= 0 || args->C % args->num_groups != 0)
    return SPO_ERROR_SHAPE;
  if (args->N == 0) return SPO_OK;
  if (!args->x || !args->weight || !args->bias || !args->mean || !args->rstd) return SPO_ERROR_NULL;
  if (backward ? !args->grad_y || !args->grad_x : !args->y) return SPO_ERROR_NULL;
  return with_type(args->dtype, [&](auto t) {
    const GroupNorm<decltype(t)> op(*args);
    return guard([&] { f(op); });
  });
}

}  // namespace
}  // namespace spo

extern "C" {

int spo_group_norm_silu_forward(const spo_group_norm_silu_args *args, void *) {
  return spo::with_group_norm(args, false, [&](const auto &op) { op.forward(*args); });
}

int spo_group_norm_silu_backward(const spo_group_norm_silu_args *args, void *) {
  return spo::with_group_norm(args, true, [&](const auto &op) { op.backward(*args); });
}

}  // extern "C"
