"""One denoising step, x_t -> K children, and the log-ratio of a child under the policy and the frozen network.

Every sampler is a row (a, b, c, d, std) of a StepTable:
    m = uncond + g (cond - uncond),   x0 = c x_t + d m,   mean = a x_t + b m,   x_prev ~ N(mean, std^2).

`transition` makes x0 and the children; `log_ratio` compares two networks on a recorded child (DDIM eq. 12 and 16):
    log_ratio = mean over C, H, W of (mu_p - mu_r)(2 x_prev - mu_p - mu_r) / (2 std^2)
    kl = mean over C, H, W of (mu_p - mu_r)^2 / (2 std^2)
with mu_p - mu_r = b (m_p - m_r): the difference of two log-probs without a difference of large squares.

# transition, K children, fp32 latents, 16-bit m: 4 + 4 n (x_t, cond, uncond) read, 4 (1 + K) n written (bytes a
# sample). log_ratio: 16 n bytes a transition read forward, the same plus 4 n written backward. Both memory-bound; at
# SDXL's (4, 128, 128) and eight states about 8 MB: 2 us of an H200's 4.3 TB/s, so launch latency dominates.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from spo_fast.ops import backend, philox
from spo_fast.ops.backend import launch, library_op, two_floats

backend.register(
    backend.Op(
        "transition",
        order={"cpu": ("c", "eager"), "cuda": ("triton", "c", "eager")},
        why="one pass over the inputs; the order on a GPU awaits a measurement",
    )
)
backend.register(
    backend.Op(
        "log_ratio",
        order={"cpu": ("c", "eager"), "cuda": ("triton", "c", "eager")},
        why="one pass over the inputs; the order on a GPU awaits a measurement",
    )
)

# ---------------------------------------------------------------------------------------------------- definition


def _row(coefficients: Tensor, rows: Tensor, like: Tensor) -> tuple[Tensor, ...]:
    """a, b, c, d, std of each sample, shaped (B, 1, 1, 1) in the latents' dtype."""
    picked = coefficients[rows].to(like.dtype)
    return tuple(v.view(-1, *[1] * (like.ndim - 1)) for v in picked.unbind(1))


def guided(cond: Tensor, uncond: Tensor | None, guidance_scale: float, dtype: torch.dtype) -> Tensor:
    """m = uncond + g (cond - uncond) in `dtype`; cond alone without an unconditional half."""
    if uncond is None:
        return cond.to(dtype)
    uncond = uncond.to(dtype)
    return uncond + guidance_scale * (cond.to(dtype) - uncond)


def transition_ref(cond, uncond, x_t, rows, coefficients, guidance_scale, num_children, keys, noise, want_x0):
    a, b, c, d, std = _row(coefficients, rows, x_t)
    m = guided(cond, uncond, guidance_scale, x_t.dtype)
    x0 = c * x_t + d * m if want_x0 else x_t.new_empty((0, *x_t.shape[1:]))
    if num_children == 0:
        return x0, x_t.new_empty((0, *x_t.shape))
    if noise is None:
        child = torch.arange(num_children, device=keys.device)
        keys = keys.repeat(num_children, 1)
        keys[:, 4] += child.repeat_interleave(x_t.shape[0])
        noise = philox.normal(keys, x_t.shape[1:].numel()).to(x_t.dtype).view(num_children, *x_t.shape)
    return x0, a * x_t + b * m + std * noise


def log_ratio_ref(
    cond, uncond, frozen_cond, frozen_uncond, x_t, x_prev, states, rows, coefficients, guidance_scale
) -> tuple[Tensor, Tensor]:
    a, b, _, _, std = (v[states] for v in _row(coefficients, rows, x_t))
    m = guided(cond, uncond, guidance_scale, x_t.dtype)[states]
    m_frozen = guided(frozen_cond, frozen_uncond, guidance_scale, x_t.dtype)[states]
    delta = b * (m - m_frozen)  # mu_p - mu_r
    to_child = 2 * (x_prev - a * x_t[states]) - b * (m + m_frozen)  # 2 x_prev - mu_p - mu_r
    dims = tuple(range(1, x_t.ndim))
    return (delta * to_child / (2 * std**2)).mean(dims), (delta**2 / (2 * std**2)).mean(dims)


# ---------------------------------------------------------------------------------------------------- Triton kernels

try:
    import triton
    import triton.language as tl
except ImportError:  # the table of `python -m spo_fast.ops` says so; nothing below is reached without Triton
    triton = None

if triton is not None:

    @triton.jit
    def _guided(cond_ptr, uncond_ptr, offsets, mask, g, HAS_UNCOND: tl.constexpr, dtype: tl.constexpr):
        m = tl.load(cond_ptr + offsets, mask=mask, other=0.0).to(dtype)
        if HAS_UNCOND:
            u = tl.load(uncond_ptr + offsets, mask=mask, other=0.0).to(dtype)
            m = u + g * (m - u)
        return m

    @triton.jit
    def _box_muller(word_a, word_b):
        """tl.cos and tl.sin hold a table for huge angles on the stack under some Tritons (32 bytes with 3.6 and 3.8).
        Less than a turn needs none: the nearest quarter turn, and Taylor series to x^9 and x^10 of |x| <= pi / 4."""
        u = word_a.to(tl.float32) * 2.3283064365386963e-10 + 1.1641532182693481e-10
        v = word_b.to(tl.float32) * 2.3283064365386963e-10 + 1.1641532182693481e-10
        radius = tl.sqrt(-2.0 * tl.log(u))
        quarters = (v * 4.0 + 0.5).to(tl.int32)
        x = 6.283185307179586 * (v - 0.25 * quarters.to(tl.float32))
        y = x * x
        sin = x + x * y * (-1 / 6 + y * (1 / 120 + y * (-1 / 5040 + y * (1 / 362880))))
        cos = 1.0 + y * (-1 / 2 + y * (1 / 24 + y * (-1 / 720 + y * (1 / 40320 + y * (-1 / 3628800)))))
        odd = (quarters & 1) == 1
        turned_cos = tl.where(odd, sin, cos)
        turned_sin = tl.where(odd, cos, sin)
        turned_cos = tl.where(((quarters + 1) & 2) == 2, -turned_cos, turned_cos)
        turned_sin = tl.where((quarters & 2) == 2, -turned_sin, turned_sin)
        return radius * turned_cos, radius * turned_sin

    @triton.jit
    def _child(child_ptr, noise_ptr, offsets, mask, mean, std, z, HAS_NOISE: tl.constexpr):
        if HAS_NOISE:
            z = tl.load(noise_ptr + offsets, mask=mask, other=0.0)
        tl.store(child_ptr + offsets, mean + std * z.to(mean.dtype), mask=mask)

    @triton.jit
    def _transition_kernel(
        cond_ptr,
        uncond_ptr,
        x_t_ptr,
        rows_ptr,
        table_ptr,
        keys_ptr,
        noise_ptr,
        x0_ptr,
        child_ptr,
        guidance,
        guidance_low,
        n,
        num_children,
        child_stride,
        HAS_UNCOND: tl.constexpr,
        HAS_NOISE: tl.constexpr,
        WANT_X0: tl.constexpr,
        BLOCK: tl.constexpr,
    ):
        sample = tl.program_id(0).to(tl.int64)
        group = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        quarter = (n + 3) // 4
        dtype: tl.constexpr = x_t_ptr.dtype.element_ty
        row = table_ptr + 5 * tl.load(rows_ptr + sample)
        a = tl.load(row).to(dtype)
        b = tl.load(row + 1).to(dtype)
        c = tl.load(row + 2).to(dtype)
        d = tl.load(row + 3).to(dtype)
        std = tl.load(row + 4).to(dtype)
        g = tl.cast(guidance, dtype) + tl.cast(guidance_low, dtype)

        # The four lanes of a Philox group are four contiguous quarters of the sample: all accesses are coalesced.
        at0 = sample * n + group
        at1 = at0 + quarter
        at2 = at1 + quarter
        at3 = at2 + quarter
        in0 = group < quarter
        in1 = in0 & (group + quarter < n)
        in2 = in0 & (group + 2 * quarter < n)
        in3 = in0 & (group + 3 * quarter < n)
        m0 = _guided(cond_ptr, uncond_ptr, at0, in0, g, HAS_UNCOND, dtype)
        m1 = _guided(cond_ptr, uncond_ptr, at1, in1, g, HAS_UNCOND, dtype)
        m2 = _guided(cond_ptr, uncond_ptr, at2, in2, g, HAS_UNCOND, dtype)
        m3 = _guided(cond_ptr, uncond_ptr, at3, in3, g, HAS_UNCOND, dtype)
        x0_ = tl.load(x_t_ptr + at0, mask=in0, other=0.0)
        x1_ = tl.load(x_t_ptr + at1, mask=in1, other=0.0)
        x2_ = tl.load(x_t_ptr + at2, mask=in2, other=0.0)
        x3_ = tl.load(x_t_ptr + at3, mask=in3, other=0.0)
        if WANT_X0:
            tl.store(x0_ptr + at0, c * x0_ + d * m0, mask=in0)
            tl.store(x0_ptr + at1, c * x1_ + d * m1, mask=in1)
            tl.store(x0_ptr + at2, c * x2_ + d * m2, mask=in2)
            tl.store(x0_ptr + at3, c * x3_ + d * m3, mask=in3)
        mean0 = a * x0_ + b * m0
        mean1 = a * x1_ + b * m1
        mean2 = a * x2_ + b * m2
        mean3 = a * x3_ + b * m3
        shift = tl.zeros([], tl.int64)
        for k in range(num_children):
            z0 = mean0
            z1 = mean1
            z2 = mean2
            z3 = mean3
            if not HAS_NOISE:
                key = keys_ptr + 5 * sample
                seed = (tl.load(key) & 0xFFFFFFFF) | (tl.load(key + 1) << 32)
                prompt = tl.load(key + 2).to(tl.uint32)
                step = tl.load(key + 3).to(tl.uint32)
                candidate = (tl.load(key + 4) + k).to(tl.uint32)
                zero = tl.zeros([BLOCK], tl.uint32)
                w0, w1, w2, w3 = tl.philox(
                    seed, group.to(tl.uint32), zero + candidate, zero + step, zero + prompt, n_rounds=10
                )
                n0, n1 = _box_muller(w0, w1)
                n2, n3 = _box_muller(w2, w3)
                z0 = n0.to(dtype)
                z1 = n1.to(dtype)
                z2 = n2.to(dtype)
                z3 = n3.to(dtype)
            _child(child_ptr, noise_ptr, shift + at0, in0, mean0, std, z0, HAS_NOISE)
            _child(child_ptr, noise_ptr, shift + at1, in1, mean1, std, z1, HAS_NOISE)
            _child(child_ptr, noise_ptr, shift + at2, in2, mean2, std, z2, HAS_NOISE)
            _child(child_ptr, noise_ptr, shift + at3, in3, mean3, std, z3, HAS_NOISE)
            shift += child_stride

    @triton.jit
    def _log_ratio_kernel(
        cond_ptr,
        uncond_ptr,
        frozen_cond_ptr,
        frozen_uncond_ptr,
        x_t_ptr,
        x_prev_ptr,
        states_ptr,
        rows_ptr,
        table_ptr,
        out_ptr,
        guidance,
        guidance_low,
        n,
        num_blocks,
        HAS_UNCOND: tl.constexpr,
        BLOCK: tl.constexpr,
    ):
        """out[t, block] = partial sums of (log-ratio, KL) over one block of a sample: summed afterwards, in order."""
        t = tl.program_id(0).to(tl.int64)
        element = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        mask = element < n
        dtype: tl.constexpr = x_t_ptr.dtype.element_ty
        state = tl.load(states_ptr + t)
        row = table_ptr + 5 * tl.load(rows_ptr + state)
        a = tl.load(row).to(dtype)
        b = tl.load(row + 1).to(dtype)
        std = tl.load(row + 4)
        g = tl.cast(guidance, dtype) + tl.cast(guidance_low, dtype)
        at = state * n + element
        m = _guided(cond_ptr, uncond_ptr, at, mask, g, HAS_UNCOND, dtype)
        m_frozen = _guided(frozen_cond_ptr, frozen_uncond_ptr, at, mask, g, HAS_UNCOND, dtype)
        x_t = tl.load(x_t_ptr + at, mask=mask, other=0.0)
        x_prev = tl.load(x_prev_ptr + t * n + element, mask=mask, other=0.0)
        delta = b * (m - m_frozen)
        to_child = 2 * (x_prev - a * x_t) - b * (m + m_frozen)
        scale = (1.0 / (2.0 * std * std * n)).to(dtype)
        out = out_ptr + 2 * (t * num_blocks + tl.program_id(1))
        tl.store(out, tl.sum(delta * to_child) * scale)
        tl.store(out + 1, tl.sum(delta * delta) * scale)

    @triton.jit
    def _log_ratio_backward_kernel(
        cond_ptr,
        uncond_ptr,
        frozen_cond_ptr,
        frozen_uncond_ptr,
        x_t_ptr,
        x_prev_ptr,
        states_ptr,
        rows_ptr,
        table_ptr,
        grad_log_ratio_ptr,
        grad_kl_ptr,
        grad_cond_ptr,
        grad_uncond_ptr,
        guidance,
        guidance_low,
        n,
        num_transitions,
        HAS_UNCOND: tl.constexpr,
        BLOCK: tl.constexpr,
    ):
        """One block of one state: sums over its transitions in order, so nothing is atomic and bits are repeatable."""
        state = tl.program_id(0).to(tl.int64)
        element = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        mask = element < n
        dtype: tl.constexpr = x_t_ptr.dtype.element_ty
        row = table_ptr + 5 * tl.load(rows_ptr + state)
        a = tl.load(row).to(dtype)
        b64 = tl.load(row + 1)
        std = tl.load(row + 4)
        b = b64.to(dtype)
        g = tl.cast(guidance, dtype) + tl.cast(guidance_low, dtype)
        at = state * n + element
        m = _guided(cond_ptr, uncond_ptr, at, mask, g, HAS_UNCOND, dtype)
        m_frozen = _guided(frozen_cond_ptr, frozen_uncond_ptr, at, mask, g, HAS_UNCOND, dtype)
        mean = a * tl.load(x_t_ptr + at, mask=mask, other=0.0) + b * m
        delta = b * (m - m_frozen)
        scale = (b64 / (std * std * n)).to(dtype)
        grad = tl.zeros([BLOCK], dtype)
        child = x_prev_ptr + element
        for t in range(num_transitions):
            if tl.load(states_ptr + t) == state:
                x_prev = tl.load(child, mask=mask, other=0.0)
                grad += tl.load(grad_log_ratio_ptr + t) * (x_prev - mean) + tl.load(grad_kl_ptr + t) * delta
            child += n
        grad = grad * scale
        if HAS_UNCOND:
            tl.store(grad_cond_ptr + at, (g * grad).to(grad_cond_ptr.dtype.element_ty), mask=mask)
            tl.store(grad_uncond_ptr + at, ((1 - g) * grad).to(grad_cond_ptr.dtype.element_ty), mask=mask)
        else:
            tl.store(grad_cond_ptr + at, grad.to(grad_cond_ptr.dtype.element_ty), mask=mask)


BLOCK = 1024
GROUPS = 128  # Philox groups of four a program: one a thread; two make ptxas spill at its limit of 64 registers


def _launch_transition(
    cond: Tensor,
    uncond: Tensor | None,
    x_t: Tensor,
    rows: Tensor,
    coefficients: Tensor,
    guidance_scale: float,
    num_children: int,
    keys: Tensor | None,
    noise: Tensor | None,
    want_x0: bool,
) -> tuple[Tensor, Tensor]:
    B, n = x_t.shape[0], x_t.shape[1:].numel()
    x0 = torch.empty_like(x_t) if want_x0 else x_t.new_empty((0, *x_t.shape[1:]))
    children = x_t.new_empty((num_children, *x_t.shape))
    grid = (B, -(-((n + 3) // 4) // GROUPS))
    launch(_transition_kernel)[grid](
        *(cond, cond if uncond is None else uncond, x_t, rows, coefficients),
        *(rows if keys is None else keys, x_t if noise is None else noise, x0, children),
        *(*two_floats(guidance_scale), n, num_children, B * n),
        HAS_UNCOND=uncond is not None,
        HAS_NOISE=noise is not None,
        WANT_X0=want_x0,
        BLOCK=GROUPS,
    )
    return x0, children


def _launch_log_ratio(
    cond: Tensor,
    uncond: Tensor | None,
    frozen_cond: Tensor,
    frozen_uncond: Tensor | None,
    x_t: Tensor,
    x_prev: Tensor,
    states: Tensor,
    rows: Tensor,
    coefficients: Tensor,
    guidance_scale: float,
) -> tuple[Tensor, Tensor]:
    T, n = x_prev.shape[0], x_t.shape[1:].numel()
    num_blocks = -(-n // BLOCK)
    partial = x_t.new_empty(T, num_blocks, 2)
    launch(_log_ratio_kernel)[(T, num_blocks)](
        *(cond, cond if uncond is None else uncond, frozen_cond, cond if frozen_uncond is None else frozen_uncond),
        *(x_t, x_prev, states, rows, coefficients, partial, *two_floats(guidance_scale), n, num_blocks),
        HAS_UNCOND=uncond is not None,
        BLOCK=BLOCK,
    )
    total = partial.sum(1)
    return total[:, 0].clone(), total[:, 1].clone()


def _launch_log_ratio_backward(
    cond: Tensor,
    uncond: Tensor | None,
    frozen_cond: Tensor,
    frozen_uncond: Tensor | None,
    x_t: Tensor,
    x_prev: Tensor,
    states: Tensor,
    rows: Tensor,
    coefficients: Tensor,
    guidance_scale: float,
    grad_log_ratio: Tensor,
    grad_kl: Tensor,
) -> tuple[Tensor, Tensor]:
    U, n = x_t.shape[0], x_t.shape[1:].numel()
    grad_cond = torch.empty_like(cond)
    grad_uncond = torch.empty_like(cond) if uncond is not None else cond.new_empty(0)
    launch(_log_ratio_backward_kernel)[(U, -(-n // BLOCK))](
        *(cond, cond if uncond is None else uncond, frozen_cond, cond if frozen_uncond is None else frozen_uncond),
        *(x_t, x_prev, states, rows, coefficients, grad_log_ratio, grad_kl, grad_cond, grad_uncond),
        *(*two_floats(guidance_scale), n, x_prev.shape[0]),
        HAS_UNCOND=uncond is not None,
        BLOCK=BLOCK,
    )
    return grad_cond, grad_uncond


# ---------------------------------------------------------------------------------------------------- torch.library ops
# One op a backend, all with the same arguments; `eager` needs none: PyTorch sees through it.

_TRANSITION = (
    "(Tensor cond, Tensor? uncond, Tensor x_t, Tensor rows, Tensor coefficients, float guidance_scale, "
    "int num_children, Tensor? keys, Tensor? noise, bool want_x0) -> (Tensor, Tensor)"
)


_INPUTS = (
    "Tensor cond, Tensor? uncond, Tensor frozen_cond, Tensor? frozen_uncond, Tensor x_t, Tensor x_prev, Tensor states, "
    "Tensor rows, Tensor coefficients, float guidance_scale"
)
_LOG_RATIO = f"({_INPUTS}) -> (Tensor, Tensor)"
_LOG_RATIO_BACKWARD = f"({_INPUTS}, Tensor grad_log_ratio, Tensor grad_kl) -> (Tensor, Tensor)"


def _transition_fake(cond, uncond, x_t, rows, coefficients, guidance_scale, num_children, keys, noise, want_x0):
    return x_t.new_empty(x_t.shape if want_x0 else (0, *x_t.shape[1:])), x_t.new_empty((num_children, *x_t.shape))


def _log_ratio_fake(cond, uncond, frozen_cond, frozen_uncond, x_t, x_prev, *_: Any):
    return x_t.new_empty(x_prev.shape[0]), x_t.new_empty(x_prev.shape[0])


def _log_ratio_backward_fake(cond, uncond, *_: Any):
    return torch.empty_like(cond), torch.empty_like(cond) if uncond is not None else cond.new_empty(0)


def _setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    *tensors, ctx.guidance_scale = inputs
    ctx.save_for_backward(*tensors)


def _make_backward(backward_op: Any) -> Any:
    def backward(ctx: Any, g_ratio: Tensor, g_kl: Tensor) -> tuple:
        uncond = ctx.saved_tensors[1]
        grad_cond, grad_uncond = backward_op(
            *ctx.saved_tensors, ctx.guidance_scale, g_ratio.contiguous(), g_kl.contiguous()
        )
        return grad_cond, grad_uncond if uncond is not None else None, *[None] * 8

    return backward


def _c_transition(cond, uncond, x_t, rows, coefficients, guidance_scale, num_children, keys, noise, want_x0):
    from spo_fast.ops import clib

    return clib.transition(
        cond, uncond, x_t, rows, coefficients, guidance_scale, keys, noise, num_children, want_x0=want_x0
    )


def _c_log_ratio(*args):
    from spo_fast.ops import clib

    return clib.log_ratio_forward(*args)


def _c_log_ratio_backward(*args):
    from spo_fast.ops import clib

    grad_cond, grad_uncond = clib.log_ratio_backward(*args)
    return grad_cond, grad_cond.new_empty(0) if grad_uncond is None else grad_uncond


TRANSITION = {
    "eager": transition_ref,
    "triton": library_op("transition_triton", _TRANSITION, _launch_transition, _transition_fake),
    "c": library_op("transition_c", _TRANSITION, _c_transition, _transition_fake),
}
LOG_RATIO = {
    "eager": log_ratio_ref,
    "triton": library_op("log_ratio_triton", _LOG_RATIO, _launch_log_ratio, _log_ratio_fake),
    "c": library_op("log_ratio_c", _LOG_RATIO, _c_log_ratio, _log_ratio_fake),
}
_BACKWARD = {
    "triton": library_op(
        "log_ratio_backward_triton", _LOG_RATIO_BACKWARD, _launch_log_ratio_backward, _log_ratio_backward_fake
    ),
    "c": library_op("log_ratio_backward_c", _LOG_RATIO_BACKWARD, _c_log_ratio_backward, _log_ratio_backward_fake),
}
for _name, _backward in _BACKWARD.items():
    LOG_RATIO[_name].register_autograd(_make_backward(_backward), setup_context=_setup_context)

# ---------------------------------------------------------------------------------------------------- public functions


def _latents(x: Tensor) -> Tensor:
    """Latents are float32 or float64, contiguous: std is 0.02 at the last step and bf16 resolves only 0.008 near 1."""
    if x.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"latents must be float32 or float64, got {x.dtype}: convert them with .float() first")
    return x.contiguous()


def _check(name: str, value: Tensor | None, shape: tuple[int, ...], dtype: torch.dtype | None = None) -> None:
    """Shapes and types only: they cost no wait for the device, and a kernel would read out of bounds."""
    if value is not None and (value.shape != shape or (dtype is not None and value.dtype != dtype)):
        wanted = f"{shape}" + (f" {dtype}" if dtype else "")
        raise ValueError(f"{name} is {tuple(value.shape)} {value.dtype}, expected {wanted}")


def _check_states(cond: Tensor, uncond: Tensor | None, x_t: Tensor, rows: Tensor, coefficients: Tensor) -> None:
    _check("cond", cond, x_t.shape)
    _check("uncond", uncond, x_t.shape, cond.dtype)
    _check("rows", rows, x_t.shape[:1], torch.int64)
    _check("coefficients", coefficients, (coefficients.shape[0], 5), torch.float64)


def _output(m: Tensor | None) -> Tensor | None:
    # UNets in channels_last give channels_last outputs; they are 4 channels wide, so a copy costs nothing.
    return None if m is None else m.contiguous()


def transition(
    cond: Tensor,  # (B, C, H, W) text-conditioned UNet output, any float type
    uncond: Tensor | None,  # (B, C, H, W) unconditional output; None: m = cond
    x_t: Tensor,  # (B, C, H, W) float32 or float64
    rows: Tensor,  # (B,) int64 rows of the table
    coefficients: Tensor,  # (R, 5) float64 StepTable coefficients a, b, c, d, std
    guidance_scale: float,
    *,
    num_children: int = 1,
    keys: Tensor | None = None,  # (B, 5) int64 Philox keys of the first child; child k adds k to the candidate
    noise: Tensor | None = None,  # (K, B, C, H, W) supplied standard normals
    want_x0: bool = True,
) -> tuple[Tensor, Tensor]:  # x0 (B, C, H, W) or empty, children (K, B, C, H, W)
    """x0 estimate and K children of x_t in one pass over the inputs. No gradient flows through it.

    Raises ValueError unless exactly one of `keys` and `noise` is given (none is needed for num_children=0).
    """
    _check_states(cond, uncond, x_t, rows, coefficients)
    _check("keys", keys, (x_t.shape[0], 5), torch.int64)
    if num_children > 0 and (keys is None) == (noise is None):
        raise ValueError("transition draws children from exactly one of keys=(B, 5) int64 or noise=(K, B, C, H, W)")
    if noise is not None:
        noise = noise.to(x_t.dtype).expand(num_children, *x_t.shape).contiguous()
    elif keys is None:
        keys = rows.new_zeros(x_t.shape[0], 5)
    else:
        keys = keys.contiguous()
    implementation = TRANSITION[backend.choose("transition", x_t)]
    with torch.no_grad():
        return implementation(
            *(_output(cond), _output(uncond), _latents(x_t), rows.contiguous(), coefficients, float(guidance_scale)),
            *(num_children, None if noise is not None else keys, noise, want_x0),
        )


def log_ratio(
    cond: Tensor,  # (U, C, H, W) the policy's output on each unique state; gradient flows to it
    uncond: Tensor | None,  # (U, C, H, W) likewise
    frozen_cond: Tensor,  # (U, C, H, W) the reference's (or old policy's) output, no gradient
    frozen_uncond: Tensor | None,
    x_t: Tensor,  # (U, C, H, W) float32 or float64
    x_prev: Tensor,  # (T, C, H, W) recorded children
    states: Tensor,  # (T,) int64 in [0, U): the state each child came from
    rows: Tensor,  # (U,) int64 rows of the table
    coefficients: Tensor,  # (R, 5) float64
    guidance_scale: float,
) -> tuple[Tensor, Tensor]:  # log_ratio (T,), kl (T,) in the latents' dtype
    """log N(x_prev; mu_policy, std^2) - log N(x_prev; mu_frozen, std^2) and KL(policy || frozen), both means.

    Raises ValueError for shapes or types that do not fit, TypeError for 16-bit latents.
    """
    _check_states(cond, uncond, x_t, rows, coefficients)
    _check("frozen_cond", frozen_cond, x_t.shape, cond.dtype)
    _check("frozen_uncond", frozen_uncond, x_t.shape, cond.dtype)
    _check("x_prev", x_prev, (states.shape[0], *x_t.shape[1:]), x_t.dtype)
    _check("states", states, (states.shape[0],), torch.int64)
    if (uncond is None) != (frozen_uncond is None):
        raise ValueError("uncond and frozen_uncond must both be given (guidance) or both be None")
    implementation = LOG_RATIO[backend.choose("log_ratio", x_t)]
    return implementation(
        *(_output(cond), _output(uncond), _output(frozen_cond), _output(frozen_uncond)),
        *(_latents(x_t), _latents(x_prev), states.contiguous(), rows.contiguous(), coefficients, float(guidance_scale)),
    )
