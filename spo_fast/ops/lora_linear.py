"""A frozen linear layer with a LoRA: y = x W^T + bias + s (x A^T) B^T, and dx, dA, dB.

Compute is in x's type (W and bias have it too, or W is quantised), accumulated in float32; A and B are float32 masters,
cast once, or already 16-bit. Only x and t = x A^T are saved; W and bias get no gradient.

The product with W is cuBLAS' on every backend: nothing here would beat it. The LoRA is a matter of bytes, not FLOPs, so
its part goes FIRST and the base accumulates on it (beta = 1, where the read of y hides behind the multiplications):
    t = x A^T,  y = bias + s t B^T,  y += x W^T           u = dy B,  dx = s u A,  dx += dy W
instead of two results and a sum, forward and backward. It is also the better rounding: what is rounded to 16 bits
before the sum is the small summand. Triton makes the first line one kernel of either direction, casts included, and
sums dA = s u^T x and dB = s dy^T t in float32, over pieces of the M tokens, without atomics.

# M tokens, I in, O out, 16 bit: beside the base's own M (2 I + 4 O) bytes forward, 2 M O of them in the base's product
# (plain PyTorch: M (2 I + 12 O)), and M (6 I + 4 O) backward, 2 M I of them there; 2 M r (I + O) FLOPs forward, twice
# that backward. At SDXL's M = 8 x 4096, I = O = 640, r = 64 the LoRA's own pass forward is 84 MB, 20 us at 4.3 TB/s;
# the base's 27 GFLOP take 34 us at 790 TFLOP/s.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import linear
from torch.utils.flop_counter import register_flop_formula

from spo_fast.ops import backend
from spo_fast.ops.backend import Context, implementations
from spo_fast.ops.linear import added_product
from spo_fast.ops.optional_triton import jit, launch, tl, triton
from spo_fast.ops.quantised import Quantised, add_product, dense

backend.register(
    "lora_linear",
    cpu=("eager",),
    cuda=("eager", "triton"),
    why="PyTorch's matrix products; Triton's kernels for the LoRA's part await measurement on a GPU",
    absent={"c": "matrix products: the vendor's library, which PyTorch calls, is what C would have to beat"},
)

# ---------------------------------------------------------------------------------------------------- definition


def lora_linear_ref(x, weight, bias, lora_A, lora_B, scale):
    """The definition."""
    t = linear(x, lora_A.to(x.dtype))
    return linear(x, weight, bias) + scale * linear(t, lora_B.to(x.dtype))


def _down_up_ref(x, down, up, bias, scale):
    """t = x down^T and s t up^T + bias: the LoRA's part, forward (A, B) and backward (B^T, A^T)."""
    t = x @ down.to(x.dtype).t()
    up = (up if scale == 1 else scale * up).to(x.dtype).t()
    return t @ up if bias is None else torch.addmm(bias, t, up), t


def _outer_ref(p, q, scale):
    """s p^T q, summed over the tokens."""
    if q.is_cuda and q.dtype in (torch.float16, torch.bfloat16):
        return scale * torch.mm(p.t(), q, out_dtype=torch.float32)  # else the sum over all tokens is rounded to 16 bits
    return scale * (p.t() @ q)


# ---------------------------------------------------------------------------------------------------- Triton kernels


@jit
def _down_up_kernel(
    x_ptr,
    down_ptr,
    up_ptr,
    bias_ptr,
    y_ptr,
    t_ptr,
    scale,
    M,
    K,
    N,
    r,
    down_r,
    down_k,
    up_n,
    up_r,
    y_m,
    HAS_BIAS: tl.constexpr,
    SAVE_T: tl.constexpr,
    R: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """One block of tokens: t = x down^T stays in registers for y = s t up^T + bias."""
    token = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    rank = tl.arange(0, R)
    is_token = (token < M)[:, None]
    is_rank = rank < r
    token = token.to(tl.int64)[:, None]
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    t = tl.zeros([BLOCK_M, R], tl.float32)
    for start in range(0, K, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        x = tl.load(x_ptr + token * K + k[None, :], mask=is_token & (k < K)[None, :], other=0.0)
        at = rank[None, :] * down_r + k[:, None] * down_k
        down = tl.load(down_ptr + at, mask=is_rank[None, :] & (k < K)[:, None], other=0.0)
        t = tl.dot(x, down.to(dtype), t, input_precision="ieee")
    t_rounded = t.to(dtype)
    if SAVE_T:
        tl.store(t_ptr + token * r + rank[None, :], t_rounded, mask=is_token & is_rank[None, :])
    for start in range(0, N, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        at = n[None, :] * up_n + rank[:, None] * up_r
        up = tl.load(up_ptr + at, mask=is_rank[:, None] & (n < N)[None, :], other=0.0)
        y = scale * tl.dot(t_rounded, up.to(dtype), input_precision="ieee")
        if HAS_BIAS:
            y += tl.load(bias_ptr + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
        tl.store(y_ptr + token * y_m + n[None, :], y.to(dtype), mask=is_token & (n < N)[None, :])


@jit
def _down_up_three_kernel(
    x_ptr,
    down_0_ptr,
    down_1_ptr,
    down_2_ptr,
    up_0_ptr,
    up_1_ptr,
    up_2_ptr,
    bias_ptr,
    y_ptr,
    scale,
    M,
    K,
    N,
    r,
    HAS_BIAS: tl.constexpr,
    R: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Three layers of one x, side by side in the rows of y (M, 3 N): program (block of tokens, layer)."""
    if tl.program_id(1) == 0:
        down_ptr, up_ptr = down_0_ptr, up_0_ptr
    elif tl.program_id(1) == 1:
        down_ptr, up_ptr = down_1_ptr, up_1_ptr
    else:
        down_ptr, up_ptr = down_2_ptr, up_2_ptr
    y_ptr += tl.program_id(1) * N
    if HAS_BIAS:
        bias_ptr += tl.program_id(1) * N
    _down_up_kernel(
        *(x_ptr, down_ptr, up_ptr, bias_ptr, y_ptr, y_ptr, scale, M, K, N, r, K, 1, r, 1, 3 * N),
        HAS_BIAS=HAS_BIAS,
        SAVE_T=False,
        R=R,
        BLOCK_M=BLOCK_M,
        BLOCK_K=BLOCK_K,
        BLOCK_N=BLOCK_N,
    )


@jit
def _outer_kernel(
    p_ptr,
    q_ptr,
    partial_ptr,
    scale,
    M,
    N,
    r,
    piece,
    out_r,
    out_n,
    R: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """One piece of the tokens and one block of columns of s p^T q: summed over pieces afterwards, in order."""
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    rank = tl.arange(0, R)
    first = tl.program_id(1) * piece
    last = tl.minimum(first + piece, M)
    total = tl.zeros([R, BLOCK_N], tl.float32)
    for start in range(first, last, BLOCK_M):
        token = start + tl.arange(0, BLOCK_M)
        is_token = token < last
        token = token.to(tl.int64)
        p = tl.load(p_ptr + token[None, :] * r + rank[:, None], mask=is_token[None, :] & (rank < r)[:, None], other=0.0)
        q = tl.load(q_ptr + token[:, None] * N + n[None, :], mask=is_token[:, None] & (n < N)[None, :], other=0.0)
        total = tl.dot(p, q, total, input_precision="ieee")
    at = tl.program_id(1).to(tl.int64) * (r * N) + rank[:, None] * out_r + n[None, :] * out_n
    tl.store(partial_ptr + at, scale * total, mask=(rank < r)[:, None] & (n < N)[None, :])


MAX_RANK = 128  # a wider LoRA does not fit into the registers of one program
PROGRAMS = 264  # that _outer_kernel is cut into: two for each of an H200's 132 processors


def _padded(rank: int) -> int:
    if rank > MAX_RANK:
        raise ValueError(f"lora_linear's Triton kernels hold at most rank {MAX_RANK}, got {rank}: use backend 'eager'")
    return max(16, triton.next_power_of_2(rank))


def _down_up_blocks(num_tokens: int, rank: int, dtype: torch.dtype) -> dict[str, int]:
    if dtype.itemsize > 2:  # no tensor cores: sums of products in registers
        return {"BLOCK_M": 32, "BLOCK_K": 32, "BLOCK_N": 32}
    if rank > 64:  # tiles of 64 x 128 float32 masters do not fit into registers: Triton 3.8 spills 268 bytes (sm_100)
        return {"BLOCK_M": 32, "BLOCK_K": 32, "BLOCK_N": 32}
    many = num_tokens >= 8192  # of few tokens (text) rather more programs than larger ones
    return {"BLOCK_M": 64 if many else 32, "BLOCK_K": 64, "BLOCK_N": 64}


def _outer_blocks(dtype: torch.dtype) -> dict[str, int]:
    return {"BLOCK_M": 32, "BLOCK_N": 32} if dtype.itemsize > 2 else {"BLOCK_M": 64, "BLOCK_N": 64}


def _launch_down_up(x: Tensor, down: Tensor, up: Tensor, bias: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    (M, K), N, r = x.shape, up.shape[0], down.shape[0]
    y, t = x.new_empty(M, N), x.new_empty(M, r)
    blocks = _down_up_blocks(M, r, x.dtype)
    launch(_down_up_kernel)[(-(-M // blocks["BLOCK_M"]),)](
        *(x, down, up, x if bias is None else bias, y, t, scale, M, K, N, r, *down.stride(), *up.stride(), N),
        HAS_BIAS=bias is not None,
        SAVE_T=True,
        R=_padded(r),
        **blocks,
    )
    return y, t


def _launch_down_up_three(
    x: Tensor, downs: list[Tensor], ups: list[Tensor], bias: Tensor | None, scale: float
) -> Tensor:
    (M, K), (N, r) = x.shape, ups[0].shape
    y = x.new_empty(M, 3 * N)
    blocks = _down_up_blocks(M, r, x.dtype)
    downs, ups = [w.contiguous() for w in downs], [w.contiguous() for w in ups]
    launch(_down_up_three_kernel)[(-(-M // blocks["BLOCK_M"]), 3)](
        *(x, *downs, *ups, x if bias is None else bias, y, scale, M, K, N, r),
        HAS_BIAS=bias is not None,
        R=_padded(r),
        **blocks,
    )
    return y


def _launch_outer(p: Tensor, q: Tensor, scale: float) -> Tensor:
    M, rows, columns = p.shape[0], p.shape[1], q.shape[1]
    strides = (columns, 1)
    if rows > columns:  # the kernel keeps the whole of the narrow side, the rank
        p, q, strides = q, p, strides[::-1]
    r, N = p.shape[1], q.shape[1]
    blocks = _outer_blocks(q.dtype)
    tiles, block = -(-N // blocks["BLOCK_N"]), blocks["BLOCK_M"]
    pieces = max(1, min(PROGRAMS // tiles, -(-M // (4 * block))))
    piece = -(-M // (pieces * block)) * block  # the last ones may be short or empty: they write zeros
    partial = p.new_empty(pieces, rows, columns, dtype=torch.float32)
    launch(_outer_kernel)[(tiles, pieces)](
        *(p, q, partial, scale, M, N, r, piece, *strides),
        R=_padded(r),
        **blocks,
    )
    return partial.sum(0)


# ---------------------------------------------------------------------------------------------------- torch.library ops


def _down_up_fake(x, down, up, bias, scale):
    return x.new_empty(x.shape[0], up.shape[0]), x.new_empty(x.shape[0], down.shape[0])


def _down_up_three_ref(x, downs, ups, bias, scale):
    biases = (None,) * 3 if bias is None else bias.chunk(3)
    return torch.cat([_down_up_ref(x, *part, scale)[0] for part in zip(downs, ups, biases, strict=True)], 1)


def _down_up_three_fake(x, downs, ups, bias, scale):
    return x.new_empty(x.shape[0], 3 * ups[0].shape[0])


def _outer_fake(p, q, scale):
    return p.new_empty(p.shape[1], q.shape[1], dtype=torch.float32)


DOWN_UP = implementations("lora_down_up", eager=_down_up_ref, triton=_launch_down_up, fake=_down_up_fake)
DOWN_UP_THREE = implementations(
    "lora_down_up_three", eager=_down_up_three_ref, triton=_launch_down_up_three, fake=_down_up_three_fake
)
OUTER = implementations("lora_outer", eager=_outer_ref, triton=_launch_outer, fake=_outer_fake)


@register_flop_formula(torch.ops.spo_fast.lora_down_up_triton)
def _down_up_flops(x: torch.Size, down: torch.Size, up: torch.Size, *_: object, **__: object) -> int:
    return 2 * x[0] * down[0] * (x[1] + up[0])


@register_flop_formula(torch.ops.spo_fast.lora_down_up_three_triton)
def _down_up_three_flops(
    x: torch.Size, downs: Sequence[torch.Size], ups: Sequence[torch.Size], *_: object, **__: object
) -> int:
    return sum(2 * x[0] * down[0] * (x[1] + up[0]) for down, up in zip(downs, ups, strict=True))


@register_flop_formula(torch.ops.spo_fast.lora_outer_triton)
def _outer_flops(p: torch.Size, q: torch.Size, *_: object, **__: object) -> int:
    return 2 * p[0] * p[1] * q[1]


class _LoraContext(Context):
    scale: float
    name: str  # of the backend


class _LoraLinear(torch.autograd.Function):
    """x (M, I) contiguous. The base's products stay PyTorch's, in the open, whatever computes the LoRA's part."""

    @staticmethod
    def forward(ctx: _LoraContext, x, weight, weight_scale, bias, lora_A, lora_B, scale, name):
        y, t = DOWN_UP[name](x, lora_A, lora_B, bias, scale)
        ctx.save_for_backward(x, t, weight, weight_scale, lora_A, lora_B)
        ctx.scale, ctx.name = scale, name
        return add_product(y, x, weight, weight_scale, out=y)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: _LoraContext, dy):
        x, t, weight, weight_scale, lora_A, lora_B = ctx.saved_tensors
        outer, dy, dx = OUTER[ctx.name], dy.contiguous(), None
        if ctx.needs_input_grad[0]:
            dx, u = DOWN_UP[ctx.name](dy, lora_B.t(), lora_A.t(), None, ctx.scale)
            dx = added_product(dx, dy, dense(weight, weight_scale, dy.dtype).t(), out=dx)
        else:  # text keys and values: their input has no gradient
            u = dy @ lora_B.to(dy.dtype)
        grad_A = outer(u, x, ctx.scale).to(lora_A.dtype) if ctx.needs_input_grad[4] else None
        grad_B = outer(dy, t, ctx.scale).to(lora_B.dtype) if ctx.needs_input_grad[5] else None
        return dx, None, None, None, grad_A, grad_B, None, None


class _LoraLinears(torch.autograd.Function):
    """Layers that read the same x (M, I) contiguous: their A's, stacked, make one product with x of all the t's."""

    @staticmethod
    def forward(ctx: _LoraContext, x, scale, *parts):
        layers = [parts[i : i + 5] for i in range(0, len(parts), 5)]
        down = torch.cat([lora_A for *_, lora_A, _ in layers]).to(x.dtype)
        t = x @ down.t()
        ctx.save_for_backward(x, t, *parts)
        ctx.scale, out = scale, []
        for (weight, weight_scale, bias, _, lora_B), t_i in zip(layers, _parts(t, layers), strict=True):
            up = (lora_B if scale == 1 else scale * lora_B).to(x.dtype).t()
            y = t_i @ up if bias is None else torch.addmm(bias, t_i, up)
            out.append(add_product(y, x, weight, weight_scale, out=y))
        return tuple(out)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: _LoraContext, *grads):
        x, t, *parts = ctx.saved_tensors
        layers = [parts[i : i + 5] for i in range(0, len(parts), 5)]
        grads = tuple(dy.contiguous() for dy in grads)
        u = torch.cat([dy @ lora_B.to(dy.dtype) for dy, (*_, lora_B) in zip(grads, layers, strict=True)], 1)
        dx, scale = None, ctx.scale
        if ctx.needs_input_grad[0]:
            down = torch.cat([lora_A for *_, lora_A, _ in layers])
            dx = u @ (down if scale == 1 else scale * down).to(u.dtype)
            for dy, (weight, weight_scale, *_) in zip(grads, layers, strict=True):
                dx = added_product(dx, dy, dense(weight, weight_scale, dy.dtype).t(), out=dx)
        grad_A = _outer_ref(u, x, scale).split([lora_A.shape[0] for *_, lora_A, _ in layers])
        out: list[Tensor | None] = [dx, None]
        for dy, t_i, g, (*_, lora_A, lora_B) in zip(grads, _parts(t, layers), grad_A, layers, strict=True):
            out += [None, None, None, g.to(lora_A.dtype), _outer_ref(dy, t_i, scale).to(lora_B.dtype)]
        return tuple(out)


def _parts(t, layers):
    return t.split([lora_A.shape[0] for *_, lora_A, _ in layers], 1)


# ---------------------------------------------------------------------------------------------------- public functions


def lora_linear(
    x: Tensor,  # (..., I) any float type: the compute type
    weight: Tensor | Quantised,  # (O, I) frozen, same type
    bias: Tensor | None,  # (O,) frozen, same type
    lora_A: Tensor,  # (r, I) float32 master, or of x's type
    lora_B: Tensor,  # (O, r)
    scale: float,  # alpha / r
) -> Tensor:  # (..., O)
    """x W^T + bias + scale (x A^T) B^T; gradients to x, lora_A and lora_B, each in its own type.

    Raises ValueError for shapes that do not fit or a base that wants a gradient, TypeError for a base of another type.
    """
    _check(x, weight, bias, lora_A, lora_B)
    name = backend.choose("lora_linear", x)
    bias = None if bias is None else bias.contiguous()
    flat = x.reshape(-1, x.shape[-1]).contiguous()
    y = _LoraLinear.apply(flat, *_tensors(weight), bias, lora_A, lora_B, float(scale), name)
    return y.view(*x.shape[:-1], weight.shape[0])


def lora_linears(
    x: Tensor,  # (..., I)
    layers: Sequence[tuple[Tensor | Quantised, Tensor | None, Tensor, Tensor]],  # weight, bias, lora_A, lora_B of each
    scale: float,
) -> tuple[Tensor, ...]:  # (..., O) of each layer
    """lora_linear of several layers that share x, such as queries, keys and values: x is read once for all the A's.

    Triton's kernel keeps t in registers, so there the layers stay apart.
    """
    if backend.choose("lora_linear", x) == "triton":
        return tuple(lora_linear(x, *layer, scale) for layer in layers)
    for layer in layers:
        _check(x, *layer)
    parts = [part for weight, *rest in layers for part in (*_tensors(weight), *rest)]
    out = _LoraLinears.apply(x.reshape(-1, x.shape[-1]).contiguous(), float(scale), *parts)
    return tuple(y.view(*x.shape[:-1], y.shape[1]) for y in out)


@torch.no_grad()
def lora_three(
    x: Tensor,  # (..., I)
    weight: Tensor,  # (3 O, I) of three layers, one below the other
    downs: Sequence[Tensor],  # (r, I) each
    ups: Sequence[Tensor],  # (O, r) each
    scale: float,
    bias: Tensor | None = None,  # (3 O,)
) -> tuple[Tensor, ...]:  # (..., O) views of one tensor
    """lora_linears of queries, keys and values in two launches, where no gradient is wanted.

    Raises ValueError for ranks that differ, and as lora_linear does.
    """
    rows = len(weight) // 3
    if len({len(down) for down in downs}) > 1:
        raise ValueError(f"lora_three takes one rank, got {[len(down) for down in downs]}: use lora_linears")
    for i, (down, up) in enumerate(zip(downs, ups, strict=True)):
        place = slice(i * rows, (i + 1) * rows)
        _check(x, weight[place], None if bias is None else bias[place], down, up)
    flat = x.reshape(-1, x.shape[-1]).contiguous()
    y = DOWN_UP_THREE[backend.choose("lora_linear", x)](flat, list(downs), list(ups), bias, float(scale))
    y = added_product(y, flat, weight, out=y)
    return y.view(*x.shape[:-1], 3 * rows).split(rows, -1)


def _tensors(weight: Tensor | Quantised) -> tuple[Tensor, Tensor | None]:
    return weight if isinstance(weight, Quantised) else (weight, None)


def _check(x: Tensor, weight: Tensor | Quantised, bias: Tensor | None, lora_A: Tensor, lora_B: Tensor) -> None:
    (rows, columns), r = weight.shape, lora_A.shape[0]
    if (
        x.shape[-1] != columns
        or lora_A.shape != (r, columns)
        or lora_B.shape != (rows, r)
        or (bias is not None and bias.shape != (rows,))
    ):
        raise ValueError(
            f"x {tuple(x.shape)}, lora_A {tuple(lora_A.shape)} and lora_B {tuple(lora_B.shape)} do not fit weight "
            f"{tuple(weight.shape)}: expected (..., {columns}), (r, {columns}), ({rows}, r), and a bias ({rows},)"
        )
    if isinstance(weight, Quantised):
        return
    if weight.dtype != x.dtype or (bias is not None and bias.dtype != x.dtype):
        raise TypeError(f"lora_linear: weight is {weight.dtype}, x {x.dtype}: convert the base once, not at every call")
    if weight.requires_grad or (bias is not None and bias.requires_grad):
        raise ValueError("lora_linear gives its base no gradient: call requires_grad_(False) on weight and bias")
