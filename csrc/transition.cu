// CUDA: denoising transitions and their log-ratios. See spo_fast.h for the formulas.
//
// All three kernels are bound by memory: every input is read once, every output written once. A sample of transition
// moves (2 m + 1 + 1 + K) n elements (m: network outputs, half as wide in 16 bit). No atomics: results are repeatable.
#include "transition.h"

namespace spo {
namespace {

constexpr int REDUCE_THREADS = 1024;  // one block a transition: as many loads in flight as a block can have

// One thread a Philox group: four elements, q apart, so that a warp's loads are contiguous in each lane.
template <class M, class X>
__global__ void __launch_bounds__(THREADS) transition_kernel(const Transition<M, X> args) {
  const int64_t q = (args.n + 3) / 4, group = static_cast<int64_t>(blockIdx.x) * THREADS + threadIdx.x,
                sample = blockIdx.y;
  if (group >= q) return;
  const double *row = args.row(sample);
  const X a = static_cast<X>(row[0]), b = static_cast<X>(row[1]), c = static_cast<X>(row[2]),
          d = static_cast<X>(row[3]);
  const X std_dev = static_cast<X>(row[4]);
  X mean[4];
#pragma unroll
  for (int lane = 0; lane < 4; ++lane) {
    const int64_t element = lane * q + group, i = sample * args.n + element;
    mean[lane] = 0;
    if (element >= args.n) continue;
    const X m = guided(args.cond, args.uncond, i, args.guidance), x = args.x_t[i];
    if (args.x0 != nullptr) args.x0[i] = c * x + d * m;
    mean[lane] = a * x + b * m;
  }
  for (int64_t k = 0; k < args.K; ++k) {
    float z[4] = {0, 0, 0, 0};
    if (args.noise == nullptr) group_normals(args.keys + sample * 5, k, group, z);
#pragma unroll
    for (int lane = 0; lane < 4; ++lane) {
      const int64_t element = lane * q + group, i = (k * args.B + sample) * args.n + element;
      if (element >= args.n) continue;
      args.children[i] = mean[lane] + std_dev * (args.noise != nullptr ? args.noise[i] : static_cast<X>(z[lane]));
    }
  }
}

template <class X>
__device__ X warp_sum(X value) {
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) value += __shfl_xor_sync(0xFFFFFFFFu, value, offset);
  return value;
}

// One block a transition. Each thread sums every REDUCE_THREADS-th element, then warps, then the block: a fixed order.
template <class M, class X>
__global__ void __launch_bounds__(REDUCE_THREADS)
    log_ratio_forward_kernel(const LogRatio<M, X> args, X *__restrict__ log_ratio, X *__restrict__ kl) {
  __shared__ X partial[2][32];
  const int64_t t = blockIdx.x, state = args.states[t];
  const double *row = args.row(state);
  const X a = static_cast<X>(row[0]), b = static_cast<X>(row[1]);
  X log_ratio_sum = 0, kl_sum = 0;
#pragma unroll 4
  for (int64_t element = threadIdx.x; element < args.n; element += REDUCE_THREADS) {
    const int64_t i = state * args.n + element;
    const X policy = guided(args.cond, args.uncond, i, args.guidance);
    const X frozen = guided(args.frozen_cond, args.frozen_uncond, i, args.guidance);
    const X drift = a * args.x_t[i], next = args.x_prev[t * args.n + element];
    const X difference = b * (policy - frozen);  // never mu_p - mu_r: a x_t would eat the digits
    log_ratio_sum += difference * ((next - (drift + b * policy)) + (next - (drift + b * frozen)));
    kl_sum += difference * difference;
  }
  log_ratio_sum = warp_sum(log_ratio_sum);
  kl_sum = warp_sum(kl_sum);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  if (lane == 0) {
    partial[0][warp] = log_ratio_sum;
    partial[1][warp] = kl_sum;
  }
  __syncthreads();
  if (warp != 0) return;
  log_ratio_sum = warp_sum(partial[0][lane]);
  kl_sum = warp_sum(partial[1][lane]);
  if (lane != 0) return;
  const X scale = static_cast<X>(1 / (2 * row[4] * row[4] * static_cast<double>(args.n)));
  log_ratio[t] = log_ratio_sum * scale;
  kl[t] = kl_sum * scale;
}

// One thread an element of a state; it visits the transitions in increasing t and skips those of other states.
template <class M, class X>
__global__ void __launch_bounds__(THREADS)
    log_ratio_backward_kernel(const LogRatio<M, X> args, const X *__restrict__ grad_log_ratio,
                              const X *__restrict__ grad_kl, M *__restrict__ grad_cond, M *__restrict__ grad_uncond) {
  const int64_t element = static_cast<int64_t>(blockIdx.x) * THREADS + threadIdx.x, state = blockIdx.y;
  if (element >= args.n) return;
  const double *row = args.row(state);
  const X a = static_cast<X>(row[0]), b = static_cast<X>(row[1]);
  const int64_t i = state * args.n + element;
  const X policy = guided(args.cond, args.uncond, i, args.guidance);
  const X frozen = guided(args.frozen_cond, args.frozen_uncond, i, args.guidance);
  const X mean = a * args.x_t[i] + b * policy, difference = b * (policy - frozen);
  X sum = 0;
  bool reached = false;
  for (int64_t t = 0; t < args.T; ++t) {
    if (args.states[t] != state) continue;
    reached = true;
    sum += grad_log_ratio[t] * (args.x_prev[t * args.n + element] - mean) + grad_kl[t] * difference;
  }
  const X scale = static_cast<X>(row[1] / (row[4] * row[4] * static_cast<double>(args.n)));
  const X grad = reached ? scale * sum : X(0);  // not inf * 0 in a row whose std is 0
  narrow(args.uncond == nullptr ? grad : args.guidance * grad, grad_cond + i);
  if (grad_uncond != nullptr) narrow((1 - args.guidance) * grad, grad_uncond + i);
}

}  // namespace
}  // namespace spo

extern "C" {

int spo_transition(const spo_transition_args *args, void *stream) {
  return spo::with_transition(args, [&](const auto &op) -> int {
    if (op.B > spo::MAX_GRID_Y) return SPO_ERROR_SHAPE;
    const dim3 grid(spo::blocks((op.n + 3) / 4), static_cast<unsigned>(op.B));
    spo::transition_kernel<<<grid, spo::THREADS, 0, static_cast<cudaStream_t>(stream)>>>(op);
    return spo::launch_error();
  });
}

int spo_log_ratio_forward(const spo_log_ratio_args *args, void *stream) {
  return spo::with_log_ratio(args, false, [&](const auto &op) -> int {
    const auto grid = static_cast<unsigned>(op.T);
    spo::log_ratio_forward_kernel<<<grid, spo::REDUCE_THREADS, 0, static_cast<cudaStream_t>(stream)>>>(
        op, op.log_ratio, op.kl);
    return spo::launch_error();
  });
}

int spo_log_ratio_backward(const spo_log_ratio_args *args, void *stream) {
  return spo::with_log_ratio(args, true, [&](const auto &op) -> int {
    if (op.B > spo::MAX_GRID_Y) return SPO_ERROR_SHAPE;
    const dim3 grid(spo::blocks(op.n), static_cast<unsigned>(op.B));
    spo::log_ratio_backward_kernel<<<grid, spo::THREADS, 0, static_cast<cudaStream_t>(stream)>>>(
        op, op.grad_log_ratio, op.grad_kl, op.grad_cond, op.grad_uncond);
    return spo::launch_error();
  });
}

}  // extern "C"
