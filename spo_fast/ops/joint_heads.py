"""Queries, keys and values of joint attention: RMS norm of each head, rotary embedding, one row for text and picture.

    Q = R(s) (q / rms(q)) w_q,   K likewise,   V = v;   rms(q)^2 = mean(q^2) + eps over a head's D channels

The streams (text, picture), each with weights of its own, come to stand one behind the other in S tokens. R(s) turns
each pair of channels (2 i, 2 i + 1) by the angle of token s (RoPE, arXiv 2104.09864; FLUX), given as cosines and sines;
SD3 has none. With one stream V is a view of v. q, k, v may be columns of one product: they are read where they lie.
Backward: g = w R(s)^T dQ, dq = (g - x_hat mean(g x_hat)) / rms, with x_hat = q / rms made again: q and k are saved, no
more. The weights are frozen.

# 4 H D elements a token forward (q, k read, Q, K written), 6 H D with V; 6 H D and 8 H D backward. Memory-bound: at
# SD3.5-M's 8 x 4429 tokens of 1536 in 16 bits 653 MB, 152 us of 4.3 TB/s. PyTorch: one pass each for both norms, both
# rotations and the three that join.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from spo_fast.ops import backend
from spo_fast.ops.backend import Context, implementations
from spo_fast.ops.optional_triton import jit, launch, tl, triton

backend.register(
    "joint_heads",
    cpu=("eager",),
    cuda=("eager", "triton"),
    why="PyTorch's norms; on CUDA Triton's single pass awaits measurement, so they stay first",
    absent={"c": "bound by memory: Triton's kernel already moves as little as C++ could; on a CPU the products decide"},
)


class Stream(NamedTuple):
    """Of the text, or of the picture."""

    q: Tensor  # (B, L, H D)
    k: Tensor
    v: Tensor
    weight_q: Tensor | None  # (D,) frozen; None for both: no norm
    weight_k: Tensor | None


# ---------------------------------------------------------------------------------------------------- definition


def joint_heads_ref(
    streams: Sequence[Stream], heads: int, rotary: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The definition."""
    parts = [
        (_normed(s.q, s.weight_q, heads, eps), _normed(s.k, s.weight_k, heads, eps), s.v.unflatten(-1, (heads, -1)))
        for s in streams
    ]
    q, k, v = parts[0] if len(parts) == 1 else (torch.cat(x, 1) for x in zip(*parts, strict=True))
    return _turned(q, rotary), _turned(k, rotary), v


def _normed(x: Tensor, weight: Tensor | None, heads: int, eps: float) -> Tensor:
    x = x.unflatten(-1, (heads, -1))
    return x if weight is None else F.rms_norm(x, weight.shape, weight, eps)


def _turned(x: Tensor, rotary: Tensor | None) -> Tensor:  # (B, S, H, D)
    if rotary is None:
        return x
    cos, sin = rotary[:, :, None]  # in float32, and so is all that is multiplied by them, if it is not in float64
    a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.addcmul(a * cos, b, sin, value=-1), torch.addcmul(b * cos, a, sin)
    return torch.stack(turned, -1).flatten(-2).to(x.dtype)


# ---------------------------------------------------------------------------------------------------- Triton kernels


@jit
def _tile(heads, D, BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr):
    """Offsets of a block of heads inside a token, and which of them are inside."""
    head = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)[:, None]
    channel = tl.arange(0, BLOCK_D)[None, :]
    return head * D + channel, (head < heads) & (channel < D)


@jit
def _weights(weight_ptr, D, BLOCK_D: tl.constexpr):
    channel = tl.arange(0, BLOCK_D)
    return tl.load(weight_ptr + channel, mask=channel < D, other=0.0).to(tl.float32)[None, :]


@jit
def _turn(x, cos_ptr, sin_ptr, token, sign, D, BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr):
    """Every pair of channels by the token's angle, or back (sign -1)."""
    pair = tl.arange(0, BLOCK_D // 2)[None, :]
    at = token * (D // 2) + pair
    cos = tl.load(cos_ptr + at, mask=pair < D // 2, other=0.0)
    sin = sign * tl.load(sin_ptr + at, mask=pair < D // 2, other=0.0)
    a, b = tl.split(tl.reshape(x, [BLOCK_H, BLOCK_D // 2, 2]))
    return tl.reshape(tl.join(a * cos - b * sin, b * cos + a * sin), [BLOCK_H, BLOCK_D])


@jit
def _head(
    x_ptr, weight_ptr, cos_ptr, sin_ptr, offsets, inside, token, D, eps,
    NORM: tl.constexpr, ROTARY: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    x = tl.load(x_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
    if NORM:
        x = x / tl.sqrt(tl.sum(x * x, 1) / D + eps)[:, None] * _weights(weight_ptr, D, BLOCK_D)
    if ROTARY:
        x = _turn(x, cos_ptr, sin_ptr, token, 1.0, D, BLOCK_H, BLOCK_D)
    return x


@jit
def _head_backward(
    x_ptr, grad_ptr, weight_ptr, cos_ptr, sin_ptr, offsets, inside, token, D, eps,
    NORM: tl.constexpr, ROTARY: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    grad = tl.load(grad_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
    if ROTARY:
        grad = _turn(grad, cos_ptr, sin_ptr, token, -1.0, D, BLOCK_H, BLOCK_D)
    if NORM:
        x = tl.load(x_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
        rms = tl.sqrt(tl.sum(x * x, 1) / D + eps)[:, None]
        x_hat = x / rms
        grad = grad * _weights(weight_ptr, D, BLOCK_D)
        grad = (grad - x_hat * (tl.sum(grad * x_hat, 1) / D)[:, None]) / rms
    return grad


@jit
def _joint_heads_kernel(
    q_ptr, k_ptr, v_ptr, weight_q_ptr, weight_k_ptr, cos_ptr, sin_ptr, q_out_ptr, k_out_ptr, v_out_ptr,
    L, S, first, heads, D, in_b, in_l, eps,
    NORM: tl.constexpr, ROTARY: tl.constexpr, COPY_V: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One token of a stream, which begins at token `first` of S, and a block of heads."""
    sample = (tl.program_id(0) // L).to(tl.int64)
    row = tl.program_id(0) % L
    s = first + row
    offsets, inside = _tile(heads, D, BLOCK_H, BLOCK_D)
    at = sample * in_b + row * in_l
    out = (sample * S + s) * heads * D + offsets
    dtype: tl.constexpr = q_out_ptr.dtype.element_ty
    x = _head(q_ptr + at, weight_q_ptr, cos_ptr, sin_ptr, offsets, inside, s, D, eps, NORM, ROTARY, BLOCK_H, BLOCK_D)
    tl.store(q_out_ptr + out, x.to(dtype), mask=inside)
    x = _head(k_ptr + at, weight_k_ptr, cos_ptr, sin_ptr, offsets, inside, s, D, eps, NORM, ROTARY, BLOCK_H, BLOCK_D)
    tl.store(k_out_ptr + out, x.to(dtype), mask=inside)
    if COPY_V:
        tl.store(v_out_ptr + out, tl.load(v_ptr + at + offsets, mask=inside), mask=inside)


@jit
def _joint_heads_backward_kernel(
    q_ptr, k_ptr, grad_q_out_ptr, grad_k_out_ptr, grad_v_out_ptr, weight_q_ptr, weight_k_ptr, cos_ptr, sin_ptr,
    grad_q_ptr, grad_k_ptr, grad_v_ptr,
    L, S, first, heads, D, in_b, in_l, eps,
    NORM: tl.constexpr, ROTARY: tl.constexpr, COPY_V: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    sample = (tl.program_id(0) // L).to(tl.int64)
    row = tl.program_id(0) % L
    s = first + row
    offsets, inside = _tile(heads, D, BLOCK_H, BLOCK_D)
    at = sample * in_b + row * in_l
    out = (sample * S + s) * heads * D
    into = tl.program_id(0).to(tl.int64) * heads * D + offsets
    dtype: tl.constexpr = grad_q_ptr.dtype.element_ty
    grad = _head_backward(
        q_ptr + at, grad_q_out_ptr + out, weight_q_ptr, cos_ptr, sin_ptr, offsets, inside, s, D, eps,
        NORM, ROTARY, BLOCK_H, BLOCK_D,
    )  # fmt: skip
    tl.store(grad_q_ptr + into, grad.to(dtype), mask=inside)
    grad = _head_backward(
        k_ptr + at, grad_k_out_ptr + out, weight_k_ptr, cos_ptr, sin_ptr, offsets, inside, s, D, eps,
        NORM, ROTARY, BLOCK_H, BLOCK_D,
    )  # fmt: skip
    tl.store(grad_k_ptr + into, grad.to(dtype), mask=inside)
    if COPY_V:
        tl.store(grad_v_ptr + into, tl.load(grad_v_out_ptr + out + offsets, mask=inside), mask=inside)


BLOCK_H = 4  # heads a program: SD3.5's and FLUX's 24 are six


def _constants(D: int, norm: bool, rotary: bool, copy_v: bool) -> dict[str, int]:
    block = max(2, triton.next_power_of_2(D))
    blocks = {"BLOCK_H": BLOCK_H, "BLOCK_D": block, "num_warps": max(1, BLOCK_H * block // 256)}  # 8 channels a thread
    return {"NORM": norm, "ROTARY": rotary, "COPY_V": copy_v, **blocks}


def _launch(
    qs: list[Tensor],
    ks: list[Tensor],
    vs: list[Tensor],
    weights_q: list[Tensor],
    weights_k: list[Tensor],
    rotary: Tensor | None,
    heads: int,
    eps: float,
) -> list[Tensor]:
    out = _fake(qs, ks, vs, weights_q, weights_k, rotary, heads, eps)
    S, D, first = out[0].shape[1], out[0].shape[3], 0
    cos, sin = (qs[0], qs[0]) if rotary is None else rotary
    for i, (q, k) in enumerate(zip(qs, ks, strict=True)):
        B, L, _ = q.shape
        weights = (weights_q[i], weights_k[i]) if weights_q else (q, k)
        launch(_joint_heads_kernel)[(B * L, -(-heads // BLOCK_H))](
            *(q, k, vs[i] if vs else q, *weights, cos, sin, *out[:2], out[2] if vs else out[0]),
            *(L, S, first, heads, D, q.stride(0), q.stride(1), eps),
            **_constants(D, bool(weights_q), rotary is not None, bool(vs)),
        )
        first += L
    return out


def _launch_backward(
    grads: list[Tensor],
    qs: list[Tensor],
    ks: list[Tensor],
    weights_q: list[Tensor],
    weights_k: list[Tensor],
    rotary: Tensor | None,
    eps: float,
) -> list[Tensor]:
    out = _backward_fake(grads, qs, ks, weights_q, weights_k, rotary, eps)
    n, (_, S, heads, D), first = len(qs), grads[0].shape, 0
    cos, sin = (grads[0], grads[0]) if rotary is None else rotary
    joint = len(grads) == 3
    for i, (q, k) in enumerate(zip(qs, ks, strict=True)):
        B, L, _ = q.shape
        weights = (weights_q[i], weights_k[i]) if weights_q else (q, k)
        launch(_joint_heads_backward_kernel)[(B * L, -(-heads // BLOCK_H))](
            *(q, k, *grads[:2], grads[-1], *weights, cos, sin, out[i], out[n + i], out[-n + i]),
            *(L, S, first, heads, D, q.stride(0), q.stride(1), eps),
            **_constants(D, bool(weights_q), rotary is not None, joint),
        )
        first += L
    return out


# ---------------------------------------------------------------------------------------------------- torch.library ops


def _fake(qs, ks, vs, weights_q, weights_k, rotary, heads, eps):
    """Q, K, and V if there is more than one stream."""
    S, (B, _, width) = sum(q.shape[1] for q in qs), qs[0].shape
    return [qs[0].new_empty(B, S, heads, width // heads) for _ in range(3 if vs else 2)]


def _backward_fake(grads, qs, ks, weights_q, weights_k, rotary, eps):
    """Of each q, each k, and each v that was copied."""
    return [q.new_empty(q.shape) for _ in grads for q in qs]


JOINT_HEADS = implementations("joint_heads", triton=_launch, fake=_fake)
GRADIENT = implementations("joint_heads_backward", triton=_launch_backward, fake=_backward_fake)


class _JointContext(Context):
    count: int
    name: str
    eps: float


class _JointHeads(torch.autograd.Function):
    """parts: each q, each k, each v if they are to be joined, each weight of q, each of k."""

    @staticmethod
    def forward(ctx: _JointContext, name, heads, eps, rotary, count, *parts):
        joint = count > 1
        groups = [list(parts[i : i + count]) for i in range(0, len(parts), count)]
        qs, ks, vs = groups[0], groups[1], groups[2] if joint else []
        weights = groups[3 if joint else 2 :] or [[], []]
        ctx.save_for_backward(rotary, *qs, *ks, *weights[0], *weights[1])
        ctx.count, ctx.name, ctx.eps = count, name, eps
        return tuple(JOINT_HEADS[name](qs, ks, vs, *weights, rotary, heads, eps))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: _JointContext, *grads):
        n, (rotary, *rest) = ctx.count, ctx.saved_tensors
        qs, ks, *weights = [rest[i : i + n] for i in range(0, len(rest), n)]
        found = GRADIENT[ctx.name]([g.contiguous() for g in grads], qs, ks, *(weights or ([], [])), rotary, ctx.eps)
        return None, None, None, None, None, *found, *[None] * sum(map(len, weights))


# ---------------------------------------------------------------------------------------------------- public function


def joint_heads(
    streams: Sequence[Stream],
    heads: int,
    rotary: Tensor | None = None,  # (2, S, D / 2) float32: cosines, sines
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor, Tensor]:  # Q, K, V (B, S, H, D), the streams in the order given
    """Queries, keys and values of attention over all streams; inside a kernel in float32. Gradients to q, k, v.

    Raises ValueError for shapes that do not fit, for a stream with a norm beside one without, and for weights that want
    a gradient.
    """
    _check(streams, heads, rotary)
    first = streams[0]
    if len(streams) == 1 and first.weight_q is None and rotary is None:
        q, k, v = (x.unflatten(-1, (heads, -1)) for x in first[:3])
        return q, k, v
    name = backend.choose("joint_heads", first.q)
    if name == "eager" or any(s.q.numel() == 0 for s in streams):
        return joint_heads_ref(streams, heads, rotary, eps)
    joint = len(streams) > 1
    qs, ks, vs = zip(*(_alike(s) for s in streams), strict=True)
    weights = [] if first.weight_q is None else [w for ws in zip(*(s[3:] for s in streams), strict=True) for w in ws]
    rotary = None if rotary is None else rotary.float().contiguous()
    parts = [*qs, *ks, *(vs if joint else ()), *(w.contiguous() for w in weights)]
    out = _JointHeads.apply(name, heads, float(eps), rotary, len(streams), *parts)
    return out if joint else (*out, first.v.unflatten(-1, (heads, -1)))


def _alike(stream: Stream) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v whose tokens lie equally far apart: columns of one product, or copies."""
    q, k, v = stream[:3]
    same = len({x.stride() for x in (q, k, v)}) == 1 and q.stride(2) == 1
    return (q, k, v) if same else (q.contiguous(), k.contiguous(), v.contiguous())


def _check(streams: Sequence[Stream], heads: int, rotary: Tensor | None) -> None:
    B, _, width = streams[0].q.shape
    for s in streams:
        shapes = {tuple(x.shape) for x in s[:3]}
        weights = {None if w is None else tuple(w.shape) for w in s[3:]}
        if (
            shapes != {(B, s.q.shape[1], width)}
            or width % heads
            or weights not in ({None}, {(width // heads,)})
            or (s.weight_q is None) != (streams[0].weight_q is None)
        ):
            raise ValueError(f"joint_heads: {shapes} with weights {weights} do not fit {B} samples, {heads} heads")
        if torch.is_grad_enabled() and any(w is not None and w.requires_grad for w in s[3:]):
            raise ValueError("joint_heads gives its weights no gradient: freeze them with .requires_grad_(False)")
    S = sum(s.q.shape[1] for s in streams)
    if rotary is not None and tuple(rotary.shape) != (2, S, width // heads // 2):
        raise ValueError(f"rotary is {tuple(rotary.shape)}, expected {(2, S, width // heads // 2)}")
