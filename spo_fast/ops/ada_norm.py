"""Adaptive layer norm after gated residuals, of diffusion transformers (adaLN-Zero, Peebles and Xie, arXiv 2212.09748):

    h = x + sum_i gate_i y_i,   n_j = x_hat (1 + scale_j) + shift_j,   x_hat = (h - mean) rstd over the channels

i counts what a block adds to its stream (none before the first block; one; two where SD3.5 has a second attention), j
the layers that read it. gate, shift and scale are of a sample, one for all its tokens. Backward:
    t = sum_j (1 + scale_j) dn_j,   dx = dh + rstd (t - mean(t) - x_hat mean(t x_hat)),   dy_i = gate_i dx
saves h, which the residual stream holds anyway, mean and rstd; y_i only for a gate that wants a gradient.

# One residual, one norm: x, y read, h, n written: 4 D elements a token forward (PyTorch, three passes: 7 D); h, dh, dn
# read, dx, dy written: 5 D backward. Memory-bound: at SD3.5-M's (8, 4096, 1536) in 16 bits 403 MB, 94 us of 4.3 TB/s.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from spo_fast.ops import backend
from spo_fast.ops.backend import Context, implementations
from spo_fast.ops.optional_triton import jit, launch, tl, triton

backend.register(
    "ada_norm",
    cpu=("eager",),
    cuda=("eager", "triton"),
    why="PyTorch's fused pointwise operations; on CUDA Triton's single pass awaits measurement, so they stay first",
    absent={"c": "bound by memory: Triton's kernel already moves as little as C++ could; on a CPU the products decide"},
)

Pairs = Sequence[tuple[Tensor, Tensor]]

# ---------------------------------------------------------------------------------------------------- definition


def ada_norm_ref(x: Tensor, residuals: Pairs, modulations: Pairs, eps: float) -> tuple[Tensor, ...]:
    """The definition."""
    for gate, y in residuals:
        x = torch.addcmul(x, gate[:, None], y)
    x_hat = F.layer_norm(x, x.shape[-1:], eps=eps)
    return x, *(torch.addcmul(shift[:, None], x_hat, 1 + scale[:, None]) for shift, scale in modulations)


# ---------------------------------------------------------------------------------------------------- Triton kernels


@jit
def _read(ptr, inside):
    return tl.load(ptr, mask=inside, other=0.0).to(tl.float32)


@jit
def _ada_norm_kernel(
    x_ptr, y_0_ptr, y_1_ptr, gate_0_ptr, gate_1_ptr, shift_0_ptr, shift_1_ptr, scale_0_ptr, scale_1_ptr,
    h_ptr, n_0_ptr, n_1_ptr, mean_ptr, rstd_ptr,
    L, D, x_b, gate_b, mod_b, eps,
    RESIDUALS: tl.constexpr, NORMS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One token. x_b, gate_b, mod_b: from a sample to the next; gates are columns of one matrix, so are modulations."""
    token = tl.program_id(0).to(tl.int64)
    sample = (tl.program_id(0) // L).to(tl.int64)
    j = tl.arange(0, BLOCK)
    inside = j < D
    dtype: tl.constexpr = n_0_ptr.dtype.element_ty
    at, gates, modulations = token * D + j, sample * gate_b + j, sample * mod_b + j
    h = _read(x_ptr + sample * x_b + (token - sample * L) * D + j, inside)
    if RESIDUALS > 0:
        h += _read(gate_0_ptr + gates, inside) * _read(y_0_ptr + at, inside)
        if RESIDUALS > 1:
            h += _read(gate_1_ptr + gates, inside) * _read(y_1_ptr + at, inside)
        h = h.to(dtype)
        tl.store(h_ptr + at, h, mask=inside)
        h = h.to(tl.float32)  # the norm is of what was stored: the backward sees no other
    mean = tl.sum(h) / D
    deviation = tl.where(inside, h - mean, 0.0)
    rstd = 1.0 / tl.sqrt(tl.sum(deviation * deviation) / D + eps)
    tl.store(mean_ptr + token, mean)
    tl.store(rstd_ptr + token, rstd)
    x_hat = deviation * rstd
    n = x_hat * (1.0 + _read(scale_0_ptr + modulations, inside)) + _read(shift_0_ptr + modulations, inside)
    tl.store(n_0_ptr + at, n.to(dtype), mask=inside)
    if NORMS > 1:
        n = x_hat * (1.0 + _read(scale_1_ptr + modulations, inside)) + _read(shift_1_ptr + modulations, inside)
        tl.store(n_1_ptr + at, n.to(dtype), mask=inside)


@jit
def _ada_norm_backward_kernel(
    h_ptr, mean_ptr, rstd_ptr, gate_0_ptr, gate_1_ptr, scale_0_ptr, scale_1_ptr, grad_h_ptr, grad_n_0_ptr, grad_n_1_ptr,
    grad_x_ptr, grad_y_0_ptr, grad_y_1_ptr,
    L, D, h_b, gate_b, mod_b,
    HAS_GRAD_H: tl.constexpr, RESIDUALS: tl.constexpr, NORMS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    sample = (tl.program_id(0) // L).to(tl.int64)
    j = tl.arange(0, BLOCK)
    inside = j < D
    dtype: tl.constexpr = grad_x_ptr.dtype.element_ty
    at, gates, modulations = token * D + j, sample * gate_b + j, sample * mod_b + j
    t = (1.0 + _read(scale_0_ptr + modulations, inside)) * _read(grad_n_0_ptr + at, inside)
    if NORMS > 1:
        t += (1.0 + _read(scale_1_ptr + modulations, inside)) * _read(grad_n_1_ptr + at, inside)
    h = _read(h_ptr + sample * h_b + (token - sample * L) * D + j, inside)
    rstd = tl.load(rstd_ptr + token)
    x_hat = tl.where(inside, (h - tl.load(mean_ptr + token)) * rstd, 0.0)
    grad = rstd * (t - tl.sum(t) / D - x_hat * (tl.sum(t * x_hat) / D))
    if HAS_GRAD_H:
        grad += _read(grad_h_ptr + at, inside)
    tl.store(grad_x_ptr + at, grad.to(dtype), mask=inside)
    if RESIDUALS > 0:
        tl.store(grad_y_0_ptr + at, (_read(gate_0_ptr + gates, inside) * grad).to(dtype), mask=inside)
        if RESIDUALS > 1:
            tl.store(grad_y_1_ptr + at, (_read(gate_1_ptr + gates, inside) * grad).to(dtype), mask=inside)


def _block(D: int) -> dict[str, int]:
    """A whole token in a program: 16 channels a thread, and no fewer than 4 warps."""
    block = triton.next_power_of_2(D)
    return {"BLOCK": block, "num_warps": min(16, max(4, block // 512))}


def _two(tensors: Sequence[Tensor], like: Tensor) -> list[Tensor]:
    """The pointers of a kernel that may read two; it does not read what is not there."""
    return [*tensors, like, like][:2]


def _launch(
    x: Tensor, gates: list[Tensor], ys: list[Tensor], shifts: list[Tensor], scales: list[Tensor], eps: float
) -> list[Tensor]:
    out = _fake(x, gates, ys, shifts, scales, eps)
    (B, L, D), (h, mean, rstd), norms = x.shape, (out[-3:] if gates else [x, *out[-2:]]), out[: len(shifts)]
    launch(_ada_norm_kernel)[(B * L,)](
        *(x, *_two(ys, x), *_two(gates, x), *_two(shifts, x), *_two(scales, x), h, *_two(norms, x), mean, rstd),
        *(L, D, x.stride(0), gates[0].stride(0) if gates else 0, shifts[0].stride(0), eps),
        RESIDUALS=len(gates),
        NORMS=len(shifts),
        **_block(D),
    )
    return out


def _launch_backward(
    h: Tensor,
    mean: Tensor,
    rstd: Tensor,
    gates: list[Tensor],
    scales: list[Tensor],
    grad_h: Tensor | None,
    grad_ns: list[Tensor],
) -> list[Tensor]:
    out = _backward_fake(h, mean, rstd, gates, scales, grad_h, grad_ns)
    B, L, D = h.shape
    launch(_ada_norm_backward_kernel)[(B * L,)](
        *(h, mean, rstd, *_two(gates, h), *_two(scales, h), h if grad_h is None else grad_h, *_two(grad_ns, h)),
        *(out[0], *_two(out[1:], h)),
        *(L, D, h.stride(0), gates[0].stride(0) if gates else 0, scales[0].stride(0)),
        HAS_GRAD_H=grad_h is not None,
        RESIDUALS=len(gates),
        NORMS=len(scales),
        **_block(D),
    )
    return out


# ---------------------------------------------------------------------------------------------------- torch.library ops


def _fake(x, gates, ys, shifts, scales, eps):
    """Each norm; h if anything was added; mean and rstd of each token."""
    full = [x.new_empty(x.shape) for _ in range(len(shifts) + bool(gates))]
    return [*full, *(x.new_empty(x.shape[:2], dtype=torch.float32) for _ in range(2))]


def _backward_fake(h, mean, rstd, gates, scales, grad_h, grad_ns):
    return [h.new_empty(h.shape) for _ in range(1 + len(gates))]


ADA_NORM = implementations("ada_norm", triton=_launch, fake=_fake)
GRADIENT = implementations("ada_norm_backward", triton=_launch_backward, fake=_backward_fake)


class _AdaNormContext(Context):
    counts: tuple[int, int]
    name: str

    def set_materialize_grads(self, value: bool) -> None: ...


class _AdaNorm(torch.autograd.Function):
    """parts: gates, ys, shifts, scales."""

    @staticmethod
    def forward(ctx: _AdaNormContext, name, eps, num_residuals, x, *parts):
        residuals, norms = num_residuals, (len(parts) - 2 * num_residuals) // 2
        gates, ys, shifts, scales = map(list, _split(parts, residuals, norms))
        out = ADA_NORM[name](x, gates, ys, shifts, scales, eps)
        h = out[norms] if residuals else x
        kept = [y if ctx.needs_input_grad[4 + i] else None for i, y in enumerate(ys)]
        ctx.save_for_backward(h, *out[-2:], *gates, *scales, *kept)  # type: ignore[arg-type]  # it takes None
        ctx.counts, ctx.name = (residuals, norms), name
        ctx.set_materialize_grads(False)
        return (*out[norms:-2], *out[:norms])

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: _AdaNormContext, *grads):
        residuals, norms = ctx.counts
        h, mean, rstd, *rest = ctx.saved_tensors
        gates, scales, ys = rest[:residuals], rest[residuals : residuals + norms], rest[residuals + norms :]
        grad_h = grads[0] if residuals else None
        grad_h = None if grad_h is None else grad_h.contiguous()
        grad_ns = [h.new_zeros(h.shape) if g is None else g.contiguous() for g in grads[bool(residuals) :]]
        grad_x, *grad_ys = GRADIENT[ctx.name](h, mean, rstd, gates, scales, grad_h, grad_ns)
        wanted = iter(ctx.needs_input_grad[4:])
        # of frozen modulations, which is the rule, none; sums over the tokens in float32
        grad_gates = [_sum(grad_x, y, h.dtype) if next(wanted) else None for y in ys]
        wanted = iter(ctx.needs_input_grad[4 + 2 * residuals :])
        grad_shifts = [_sum(g, None, h.dtype) if next(wanted) else None for g in grad_ns]
        grad_scales: list[Tensor | None] = [None] * norms
        if any(ctx.needs_input_grad[4 + 2 * residuals + norms :]):
            x_hat = (h.float() - mean[..., None]) * rstd[..., None]
            grad_scales = [_sum(g, x_hat, h.dtype) for g in grad_ns]
        return None, None, None, grad_x, *grad_gates, *grad_ys, *grad_shifts, *grad_scales


def _split(parts: Sequence[Tensor], residuals: int, norms: int) -> list[Sequence[Tensor]]:
    ends = (0, residuals, 2 * residuals, 2 * residuals + norms, 2 * (residuals + norms))
    return [parts[start:end] for start, end in zip(ends, ends[1:], strict=False)]


def _sum(p: Tensor, q: Tensor | None, dtype: torch.dtype) -> Tensor:
    return (p.float() if q is None else p.float() * q.float()).sum(1).to(dtype)


# ---------------------------------------------------------------------------------------------------- public function


def ada_norm(
    x: Tensor,  # (B, L, D) any float type
    modulations: Pairs,  # one or two (shift, scale), (B, D) each of x's type
    residuals: Pairs = (),  # none, one or two (gate, y), (B, D) and (B, L, D)
    eps: float = 1e-6,
) -> tuple[Tensor, ...]:  # h, then each n, (B, L, D)
    """x + sum gate y, and its layer norm under each modulation; inside a kernel in float32. Gradients to all of them.

    Raises ValueError for shapes or types that do not fit.
    """
    _check(x, modulations, residuals)
    name = backend.choose("ada_norm", x)
    if name == "eager" or x.numel() == 0:
        return ada_norm_ref(x, residuals, modulations, eps)
    gates, ys = [gate for gate, _ in residuals], [y.contiguous() for _, y in residuals]
    shifts, scales = [shift for shift, _ in modulations], [scale for _, scale in modulations]
    x = x if x.stride()[1:] == (x.shape[-1], 1) else x.contiguous()
    columns = [v for group in (_alike(gates), ys, _alike([*shifts, *scales])) for v in group]
    out = _AdaNorm.apply(name, float(eps), len(ys), x, *columns)
    return out if residuals else (x, *out)


def _alike(rows: list[Tensor]) -> list[Tensor]:
    """Matrices (B, D) whose samples lie equally far apart: columns of one matrix, or copies."""
    same = len({row.stride() for row in rows}) <= 1 and all(row.stride(1) == 1 for row in rows)
    return rows if same else [row.contiguous() for row in rows]


def _check(x: Tensor, modulations: Pairs, residuals: Pairs) -> None:
    if x.ndim != 3 or not 1 <= len(modulations) <= 2 or len(residuals) > 2:
        raise ValueError(
            f"ada_norm takes x (B, L, D), 1 or 2 modulations and at most 2 residuals: x is {tuple(x.shape)}, with "
            f"{len(modulations)} and {len(residuals)}"
        )
    rows = [v for pair in modulations for v in pair] + [gate for gate, _ in residuals]
    for shape, values in (((len(x), x.shape[-1]), rows), (tuple(x.shape), [y for _, y in residuals])):
        for v in values:
            if tuple(v.shape) != shape or v.dtype != x.dtype:
                raise ValueError(f"ada_norm: {tuple(v.shape)} {v.dtype} does not fit, expected {shape} {x.dtype}")
