"""The log-ratio of a recorded child under the policy and the frozen network (DDIM eq. 12 and 16).

    log_ratio = mean over C, H, W of (mu_p - mu_r)(2 x_prev - mu_p - mu_r) / (2 std^2)
    kl = mean over C, H, W of (mu_p - mu_r)^2 / (2 std^2)
with mu_p - mu_r = b (m_p - m_r): the difference of two log-probs without a difference of large squares.

# 16 n bytes a transition read forward, the same plus 4 n written backward: memory-bound; at SDXL's (4, 128, 128) and
# eight states about 8 MB: 2 us of an H200's 4.3 TB/s, so launch latency dominates.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from spo_fast.ops import backend
from spo_fast.ops.backend import Context, differentiate, implementations
from spo_fast.ops.c_library import INT64, POINTER, call, check_tensor, fields
from spo_fast.ops.guidance import StepArguments, check_shape, checked_states, guided, guided_kernel, row_of
from spo_fast.ops.optional_triton import jit, launch, tl, two_floats

backend.register(
    "log_ratio",
    cpu=("c", "eager"),
    cuda=("triton", "c", "eager"),
    why="one pass over the inputs; the order on a GPU awaits a measurement",
)

# ---------------------------------------------------------------------------------------------------- definition


def log_ratio_ref(
    cond, uncond, frozen_cond, frozen_uncond, x_t, x_prev, states, rows, coefficients, guidance_scale
) -> tuple[Tensor, Tensor]:
    """The definition: log-ratios and KL divergences, means over C, H, W."""
    a, b, _, _, std = (v[states] for v in row_of(coefficients, rows, x_t))
    m = guided(cond, uncond, guidance_scale, x_t.dtype)[states]
    m_frozen = guided(frozen_cond, frozen_uncond, guidance_scale, x_t.dtype)[states]
    delta = b * (m - m_frozen)  # mu_p - mu_r
    to_child = 2 * (x_prev - a * x_t[states]) - b * (m + m_frozen)  # 2 x_prev - mu_p - mu_r
    dims = tuple(range(1, x_t.ndim))
    return (delta * to_child / (2 * std**2)).mean(dims), (delta**2 / (2 * std**2)).mean(dims)


# ---------------------------------------------------------------------------------------------------- Triton kernels


@jit
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
    m = guided_kernel(cond_ptr, uncond_ptr, at, mask, g, HAS_UNCOND, dtype)
    m_frozen = guided_kernel(frozen_cond_ptr, frozen_uncond_ptr, at, mask, g, HAS_UNCOND, dtype)
    x_t = tl.load(x_t_ptr + at, mask=mask, other=0.0)
    x_prev = tl.load(x_prev_ptr + t * n + element, mask=mask, other=0.0)
    delta = b * (m - m_frozen)
    to_child = 2 * (x_prev - a * x_t) - b * (m + m_frozen)
    scale = (1.0 / (2.0 * std * std * n)).to(dtype)
    out = out_ptr + 2 * (t * num_blocks + tl.program_id(1))
    tl.store(out, tl.sum(delta * to_child) * scale)
    tl.store(out + 1, tl.sum(delta * delta) * scale)


@jit
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
    m = guided_kernel(cond_ptr, uncond_ptr, at, mask, g, HAS_UNCOND, dtype)
    m_frozen = guided_kernel(frozen_cond_ptr, frozen_uncond_ptr, at, mask, g, HAS_UNCOND, dtype)
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


def _launch(
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


def _launch_backward(
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


# ---------------------------------------------------------------------------------------------------- C library


class LogRatioArguments(StepArguments):
    """spo_log_ratio_args of csrc/spo_fast.h."""

    _fields_ = fields(
        frozen_cond=POINTER,
        frozen_uncond=POINTER,
        x_prev=POINTER,
        states=POINTER,
        T=INT64,
        log_ratio=POINTER,
        kl=POINTER,
        grad_log_ratio=POINTER,
        grad_kl=POINTER,
        grad_cond=POINTER,
        grad_uncond=POINTER,
    )

    def __init__(
        self, cond, uncond, frozen_cond, frozen_uncond, x_t, x_prev, states, rows, table, guidance_scale, **more
    ):
        super().__init__(
            *(cond, uncond, x_t, rows, table, guidance_scale),
            frozen_cond=frozen_cond,
            frozen_uncond=frozen_uncond,
            x_prev=x_prev,
            states=states,
            T=x_prev.shape[0],
            **more,
        )
        if (uncond is None) != (frozen_uncond is None):
            raise ValueError("log_ratio: uncond and frozen_uncond must both be given or both be None")
        check_tensor("frozen_cond", frozen_cond, x_t.shape, cond.dtype, x_t)
        check_tensor("frozen_uncond", frozen_uncond, x_t.shape, cond.dtype, x_t)
        check_tensor("x_prev", x_prev, (x_prev.shape[0], *x_t.shape[1:]), x_t.dtype, x_t)
        check_tensor("states", states, x_prev.shape[:1], torch.int64, x_t)
        for name in ("grad_log_ratio", "grad_kl"):
            check_tensor(name, more.get(name), states.shape, x_t.dtype, x_t)


def log_ratio_forward(*inputs):
    """log_ratio (T,) and kl (T,) in x_t's dtype; inputs as log_ratio's, contiguous.

    Raises ValueError for wrong shapes, dtypes, devices or strides, RuntimeError for an index out of range (CPU only).
    """
    log_ratio, kl = _fake(*inputs)
    call("spo_log_ratio_forward", log_ratio.device, LogRatioArguments(*inputs, log_ratio=log_ratio, kl=kl))
    return log_ratio, kl


def log_ratio_backward(*inputs):
    """Gradients of sum(grad_log_ratio log_ratio + grad_kl kl) by cond and uncond (empty if that is None).

    inputs: log_ratio's, then grad_log_ratio (T,) and grad_kl (T,) in x_t's dtype; errors as forward's.
    """
    *inputs, grad_log_ratio, grad_kl = inputs
    grad_cond, grad_uncond = _backward_fake(*inputs)
    arguments = LogRatioArguments(
        *inputs,
        grad_log_ratio=grad_log_ratio,
        grad_kl=grad_kl,
        grad_cond=grad_cond,
        grad_uncond=None if inputs[1] is None else grad_uncond,
    )
    call("spo_log_ratio_backward", grad_cond.device, arguments)
    return grad_cond, grad_uncond


# ---------------------------------------------------------------------------------------------------- torch.library ops


def _fake(cond, uncond, frozen_cond, frozen_uncond, x_t, x_prev, *_):
    return x_t.new_empty(x_prev.shape[0]), x_t.new_empty(x_prev.shape[0])


def _backward_fake(cond, uncond, *_):
    return torch.empty_like(cond), torch.empty_like(cond) if uncond is not None else cond.new_empty(0)


LOG_RATIO = implementations("log_ratio", eager=log_ratio_ref, triton=_launch, c=log_ratio_forward, fake=_fake)
GRADIENT = implementations("log_ratio_backward", triton=_launch_backward, c=log_ratio_backward, fake=_backward_fake)


def _save(ctx: Context, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    *tensors, guidance_scale = inputs
    ctx.constants = (guidance_scale,)
    ctx.save_for_backward(*tensors)


def _backward(
    gradient: Callable[..., tuple[Tensor, Tensor]], ctx: Context, grad_log_ratio: Tensor, grad_kl: Tensor
) -> tuple[Tensor | None, ...]:
    weights = (grad_log_ratio.contiguous(), grad_kl.contiguous())
    grad_cond, grad_uncond = gradient(*ctx.saved_tensors, *ctx.constants, *weights)
    return grad_cond, grad_uncond if ctx.saved_tensors[1] is not None else None, *[None] * 8


differentiate(LOG_RATIO, GRADIENT, _save, _backward)

# ---------------------------------------------------------------------------------------------------- public functions


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
    cond, uncond, x_t, rows, coefficients = checked_states(cond, uncond, x_t, rows, coefficients)
    check_shape("frozen_cond", frozen_cond, x_t.shape, cond.dtype)
    check_shape("frozen_uncond", frozen_uncond, x_t.shape, cond.dtype)
    check_shape("x_prev", x_prev, (states.shape[0], *x_t.shape[1:]), x_t.dtype)
    check_shape("states", states, (states.shape[0],), torch.int64)
    if (uncond is None) != (frozen_uncond is None):
        raise ValueError("uncond and frozen_uncond must both be given (guidance) or both be None")
    if frozen_uncond is not None:
        frozen_uncond = frozen_uncond.contiguous()
    return LOG_RATIO[backend.choose("log_ratio", x_t)](
        *(cond, uncond, frozen_cond.contiguous(), frozen_uncond, x_t, x_prev.contiguous(), states.contiguous()),
        *(rows, coefficients, float(guidance_scale)),
    )
