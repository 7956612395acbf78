"""Group norm, then SiLU: y = silu(z), z = (x - mean) rstd w + b, mean and variance over a group's channels and pixels.

A UNet's ResNet blocks and a VAE's have it before every convolution; a transformer's input has it without SiLU. The
affine weights are frozen, so the backward gives dx only:
    t = w dL/dz,   dx = rstd (t - mean(t) - x_hat mean(t x_hat)),   x_hat = (x - mean) rstd
and saves x, mean and rstd. x may be NCHW or channels-last; each is read as it lies. The variance is the mean squared
deviation from the mean, never E[x^2] - E[x]^2: at mean 1000 and std 0.01 that difference has no correct digit.

# x read twice, y written: 3 n elements (forward), x and dy read twice, dx written: 5 n (backward); memory-bound. At
# SDXL's (8, 320, 128, 128) in 16 bits n is 84 MB: 58 us and 98 us of 4.3 TB/s, less where the second read hits the L2
# cache.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from spo_fast.ops import backend
from spo_fast.ops.backend import Context, differentiate, implementations
from spo_fast.ops.c_library import DOUBLE, INT64, POINTER, Arguments, call, fields
from spo_fast.ops.optional_triton import jit, launch, tl

SMALL = 2**17  # elements: below, a call of the C library costs more than it saves


def _channels_last(x: Tensor) -> bool:
    return not x.is_contiguous() and x.stride(1) == 1


def _case(x: Tensor) -> str:
    device_type = x.device.type
    large = device_type == "cpu" and _channels_last(x) and x.numel() >= SMALL
    return f"{device_type} channels-last" if large else device_type


backend.register(
    "group_norm_silu",
    cpu=("eager", "c"),
    cuda=("eager", "triton"),
    why="on a CPU as measured for NCHW and for small tensors; on CUDA it awaits measurement: PyTorch's is first",
    absent={"c cuda": "bound by memory: Triton's kernels already read and write as little as CUDA C++ could"},
    case=_case,
    cases={
        "cpu channels-last": backend.Order(
            ("c", "eager"), f"reads it as it lies, where eager goes through NCHW (from {SMALL} elements)"
        )
    },
)

# ---------------------------------------------------------------------------------------------------- definition


def group_norm_silu_ref(
    x: Tensor, weight: Tensor, bias: Tensor, num_groups: int, eps: float, silu: bool, channels_last: bool
) -> Tensor:
    """The definition."""
    # NCHW: PyTorch's channels-last kernel for CPUs takes the variance as E[x^2] - E[x]^2
    y = F.group_norm(x.contiguous(), num_groups, weight, bias, eps)
    if silu:
        y = F.silu(y)  # the norm's result goes before the copy comes: 2 GiB of SDXL's decoder
    return y.contiguous(memory_format=_format(channels_last))


def _format(channels_last: bool) -> torch.memory_format:
    return torch.channels_last if channels_last else torch.contiguous_format


# ---------------------------------------------------------------------------------------------------- Triton kernels


@jit
def _tile(sample, first, C, S, BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr, CHANNELS_LAST: tl.constexpr):
    """Where a tile of pixels x channels starts (64 bits: a VAE's activations have 2^28 elements an image), and the
    32-bit offsets inside it."""
    s = tl.arange(0, BLOCK_S)[:, None]
    c = tl.arange(0, BLOCK_C)[None, :]
    first_channel = tl.program_id(1).to(tl.int64) * BLOCK_C
    pixel = sample.to(tl.int64) * S
    if CHANNELS_LAST:
        return (pixel + first) * C + first_channel, s * C + c
    else:  # noqa: RET505  Triton compiles the branch of a constexpr alone: without else it would see both
        return pixel * C + first_channel * S + first, s + c * S


@jit
def _columns(sample, channel, inside, mean_ptr, rstd_ptr, gamma_ptr, beta_ptr, C, group_size):
    """Mean, rstd, w and b of each channel of a tile, and its group's row in the statistics."""
    group = sample.to(tl.int64) * (C // group_size) + channel // group_size
    mean = tl.load(mean_ptr + group, mask=inside, other=0.0)[None, :]
    rstd = tl.load(rstd_ptr + group, mask=inside, other=0.0)[None, :]
    w = tl.load(gamma_ptr + channel, mask=inside, other=0.0).to(tl.float32)[None, :]
    b = tl.load(beta_ptr + channel, mask=inside, other=0.0).to(tl.float32)[None, :]
    return mean, rstd, w, b, group


@jit
def _grad_normalised(x_hat, grad_y, w, b, SILU: tl.constexpr):
    """t = w dL/dz."""
    t = w * grad_y
    if SILU:
        z = x_hat * w + b
        sigmoid = 1.0 / (1.0 + tl.exp(-z))
        t = t * sigmoid * (1.0 + z * (1.0 - sigmoid))
    return t


@jit
def _moments_kernel(
    x_ptr,
    partial_ptr,
    C,
    S,
    chunk,
    num_chunks,
    CHANNELS_LAST: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """partial[sample, chunk, channel] = mean, sum of squared deviations from it, over a chunk of the pixels."""
    sample = tl.program_id(0) // num_chunks
    k = tl.program_id(0) % num_chunks
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    end = tl.minimum((k + 1) * chunk, S)
    count = 0.0
    mean = tl.zeros([BLOCK_C], tl.float32)
    squares = tl.zeros([BLOCK_C], tl.float32)
    for first in range(k * chunk, end, BLOCK_S):
        start, offsets = _tile(sample, first, C, S, BLOCK_S, BLOCK_C, CHANNELS_LAST)
        mask = (first + tl.arange(0, BLOCK_S) < end)[:, None] & (channel < C)[None, :]
        x = tl.load(x_ptr + start + offsets, mask=mask, other=0.0).to(tl.float32)
        rows = tl.minimum(end - first, BLOCK_S).to(tl.float32)
        tile_mean = tl.sum(x, 0) / rows
        # twice: near 1000 the rounding of one sum costs as much again as the rounding of the mean itself
        tile_mean += tl.sum(tl.where(mask, x - tile_mean[None, :], 0.0), 0) / rows
        deviation = tl.where(mask, x - tile_mean[None, :], 0.0)
        total = count + rows
        shift = tile_mean - mean
        mean += shift * (rows / total)
        squares += tl.sum(deviation * deviation, 0) + shift * shift * (count * rows / total)
        count = total
    out = partial_ptr + 2 * (tl.program_id(0).to(tl.int64) * C + channel)
    tl.store(out, mean, mask=channel < C)
    tl.store(out + 1, squares, mask=channel < C)


@jit
def _combine_kernel(partial_ptr, mean_ptr, rstd_ptr, C, S, chunk, num_chunks, group_size, eps, BLOCK: tl.constexpr):
    """mean and rstd of one group from the moments of its channels' chunks: two passes over those."""
    sample = tl.program_id(0) // (C // group_size)
    group = tl.program_id(0) % (C // group_size)
    parts = partial_ptr + 2 * (sample.to(tl.int64) * num_chunks * C + group * group_size)
    pivot = tl.load(parts)  # sums of differences keep the digits that sums of means would lose
    total = tl.zeros([BLOCK], tl.float32)
    for begin in range(0, num_chunks * group_size, BLOCK):
        i = begin + tl.arange(0, BLOCK)
        k = i // group_size
        inside = i < num_chunks * group_size
        count = tl.minimum(S - k * chunk, chunk).to(tl.float32)
        part = tl.load(parts + 2 * (k * C + i % group_size), mask=inside, other=0.0)
        total += tl.where(inside, count * (part - pivot), 0.0)
    elements = 1.0 * S * group_size
    mean = pivot + tl.sum(total) / elements
    squares = tl.zeros([BLOCK], tl.float32)
    for begin in range(0, num_chunks * group_size, BLOCK):
        i = begin + tl.arange(0, BLOCK)
        k = i // group_size
        inside = i < num_chunks * group_size
        count = tl.minimum(S - k * chunk, chunk).to(tl.float32)
        at = parts + 2 * (k * C + i % group_size)
        shift = tl.load(at, mask=inside, other=0.0) - mean
        squares += tl.where(inside, tl.load(at + 1, mask=inside, other=0.0) + count * shift * shift, 0.0)
    tl.store(mean_ptr + tl.program_id(0), mean)
    tl.store(rstd_ptr + tl.program_id(0), 1.0 / tl.sqrt(tl.sum(squares) / elements + eps))


@jit
def _normalise_kernel(
    x_ptr,
    gamma_ptr,
    beta_ptr,
    mean_ptr,
    rstd_ptr,
    y_ptr,
    C,
    S,
    num_blocks,
    group_size,
    SILU: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    sample = tl.program_id(0) // num_blocks
    first = tl.program_id(0) % num_blocks * BLOCK_S
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    mean, rstd, w, b, _ = _columns(sample, channel, channel < C, mean_ptr, rstd_ptr, gamma_ptr, beta_ptr, C, group_size)
    start, offsets = _tile(sample, first, C, S, BLOCK_S, BLOCK_C, CHANNELS_LAST)
    mask = (first + tl.arange(0, BLOCK_S) < S)[:, None] & (channel < C)[None, :]
    x = tl.load(x_ptr + start + offsets, mask=mask, other=0.0).to(tl.float32)
    z = (x - mean) * rstd * w + b
    if SILU:
        z = z / (1.0 + tl.exp(-z))
    tl.store(y_ptr + start + offsets, z.to(y_ptr.dtype.element_ty), mask=mask)


@jit
def _grad_sums_kernel(
    x_ptr,
    grad_y_ptr,
    gamma_ptr,
    beta_ptr,
    mean_ptr,
    rstd_ptr,
    partial_ptr,
    C,
    S,
    chunk,
    num_chunks,
    group_size,
    SILU: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """partial[sample, chunk, channel] = sums of t and of t x_hat over a chunk of the pixels."""
    sample = tl.program_id(0) // num_chunks
    k = tl.program_id(0) % num_chunks
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    mean, rstd, w, b, _ = _columns(sample, channel, channel < C, mean_ptr, rstd_ptr, gamma_ptr, beta_ptr, C, group_size)
    end = tl.minimum((k + 1) * chunk, S)
    total = tl.zeros([BLOCK_C], tl.float32)
    projection = tl.zeros([BLOCK_C], tl.float32)
    for first in range(k * chunk, end, BLOCK_S):
        start, offsets = _tile(sample, first, C, S, BLOCK_S, BLOCK_C, CHANNELS_LAST)
        mask = (first + tl.arange(0, BLOCK_S) < end)[:, None] & (channel < C)[None, :]
        x_hat = (tl.load(x_ptr + start + offsets, mask=mask, other=0.0).to(tl.float32) - mean) * rstd
        grad_y = tl.load(grad_y_ptr + start + offsets, mask=mask, other=0.0).to(tl.float32)
        t = tl.where(mask, _grad_normalised(x_hat, grad_y, w, b, SILU), 0.0)
        total += tl.sum(t, 0)
        projection += tl.sum(t * x_hat, 0)
    out = partial_ptr + 2 * (tl.program_id(0).to(tl.int64) * C + channel)
    tl.store(out, total, mask=channel < C)
    tl.store(out + 1, projection, mask=channel < C)


@jit
def _grad_input_kernel(
    x_ptr,
    grad_y_ptr,
    gamma_ptr,
    beta_ptr,
    mean_ptr,
    rstd_ptr,
    sums_ptr,
    grad_x_ptr,
    C,
    S,
    num_blocks,
    group_size,
    SILU: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    sample = tl.program_id(0) // num_blocks
    first = tl.program_id(0) % num_blocks * BLOCK_S
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    mean, rstd, w, b, group = _columns(
        sample, channel, channel < C, mean_ptr, rstd_ptr, gamma_ptr, beta_ptr, C, group_size
    )
    elements = 1.0 * S * group_size
    mean_t = tl.load(sums_ptr + 2 * group, mask=channel < C, other=0.0)[None, :] / elements
    projection = tl.load(sums_ptr + 2 * group + 1, mask=channel < C, other=0.0)[None, :] / elements
    start, offsets = _tile(sample, first, C, S, BLOCK_S, BLOCK_C, CHANNELS_LAST)
    mask = (first + tl.arange(0, BLOCK_S) < S)[:, None] & (channel < C)[None, :]
    x_hat = (tl.load(x_ptr + start + offsets, mask=mask, other=0.0).to(tl.float32) - mean) * rstd
    grad_y = tl.load(grad_y_ptr + start + offsets, mask=mask, other=0.0).to(tl.float32)
    grad_x = rstd * (_grad_normalised(x_hat, grad_y, w, b, SILU) - mean_t - x_hat * projection)
    tl.store(grad_x_ptr + start + offsets, grad_x.to(grad_x_ptr.dtype.element_ty), mask=mask)


# Pixels x channels of a tile: 64 contiguous elements, 16 a thread. Twice as many spill in the backward.
TILES = {True: (32, 64), False: (64, 32)}
PARTS = 1024  # moments that _combine_kernel takes at a time


def _geometry(x: Tensor, num_groups: int, channels_last: bool) -> tuple[dict[str, int], int, int, int]:
    """Counts of the kernels, and how many chunks, blocks of pixels and blocks of channels there are."""
    block_s, block_c = TILES[channels_last]
    C, S = x.shape[1], x.shape[2] * x.shape[3]
    # Four tiles a chunk at least, 512 chunks at most: of the shape alone, so that no sample's bits depend on the batch.
    chunk = block_s * max(4, -(-S // (512 * block_s)))
    counts = {"C": C, "S": S, "chunk": chunk, "group_size": C // num_groups}
    return counts, -(-S // chunk), -(-S // block_s), -(-C // block_c)


def _constants(channels_last: bool) -> dict[str, int]:
    block_s, block_c = TILES[channels_last]
    return {"CHANNELS_LAST": channels_last, "BLOCK_S": block_s, "BLOCK_C": block_c}


def _launch(
    x: Tensor, weight: Tensor, bias: Tensor, num_groups: int, eps: float, silu: bool, channels_last: bool
) -> tuple[Tensor, Tensor, Tensor]:
    N = x.shape[0]
    counts, num_chunks, num_blocks, channel_blocks = _geometry(x, num_groups, channels_last)
    C, S, chunk, group_size = counts.values()
    y, (mean, rstd) = torch.empty_like(x), _statistics(x, num_groups)
    partial = torch.empty((N, num_chunks, C, 2), dtype=torch.float32, device=x.device)
    constants = _constants(channels_last)
    launch(_moments_kernel)[(N * num_chunks, channel_blocks)](x, partial, C, S, chunk, num_chunks, **constants)
    launch(_combine_kernel)[(N * num_groups,)](
        partial, mean, rstd, C, S, chunk, num_chunks, group_size, eps, BLOCK=PARTS
    )
    launch(_normalise_kernel)[(N * num_blocks, channel_blocks)](
        x, weight, bias, mean, rstd, y, C, S, num_blocks, group_size, SILU=silu, **constants
    )
    return y, mean, rstd


def _launch_backward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    mean: Tensor,
    rstd: Tensor,
    grad_y: Tensor,
    num_groups: int,
    silu: bool,
    channels_last: bool,
) -> Tensor:
    N = x.shape[0]
    counts, num_chunks, num_blocks, channel_blocks = _geometry(x, num_groups, channels_last)
    C, S, chunk, group_size = counts.values()
    grad_x = torch.empty_like(x)
    partial = torch.empty((N, num_chunks, C, 2), dtype=torch.float32, device=x.device)
    inputs, constants = (x, grad_y, weight, bias, mean, rstd), _constants(channels_last)
    launch(_grad_sums_kernel)[(N * num_chunks, channel_blocks)](
        *inputs, partial, C, S, chunk, num_chunks, group_size, SILU=silu, **constants
    )
    sums = partial.view(N, num_chunks, num_groups, group_size, 2).sum((1, 3))
    launch(_grad_input_kernel)[(N * num_blocks, channel_blocks)](
        *inputs, sums, grad_x, C, S, num_blocks, group_size, SILU=silu, **constants
    )
    return grad_x


def _statistics(x: Tensor, num_groups: int) -> tuple[Tensor, Tensor]:
    """Mean and rstd of each group, to be filled: float32, or float64 for float64."""
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    shape = (x.shape[0], num_groups)
    return torch.empty(shape, dtype=dtype, device=x.device), torch.empty(shape, dtype=dtype, device=x.device)


# ---------------------------------------------------------------------------------------------------- C library


class GroupNormSiluArguments(Arguments):
    """spo_group_norm_silu_args of csrc/spo_fast.h."""

    _fields_ = fields(
        dtype=INT64,
        x=POINTER,
        weight=POINTER,
        bias=POINTER,
        N=INT64,
        C=INT64,
        S=INT64,
        num_groups=INT64,
        channels_last=INT64,
        silu=INT64,
        eps=DOUBLE,
        mean=POINTER,
        rstd=POINTER,
        y=POINTER,
        grad_y=POINTER,
        grad_x=POINTER,
    )

    def __init__(self, x, mean, rstd, **more):
        N, C, S, groups = x.shape[0], x.shape[1], x.shape[2] * x.shape[3], mean.shape[1]
        super().__init__(dtype=x.dtype, x=x, N=N, C=C, S=S, num_groups=groups, mean=mean, rstd=rstd, **more)


def _forward_c(x, weight, bias, num_groups, eps, silu, channels_last):
    y, mean, rstd = _fake(x, weight, bias, num_groups, eps, silu, channels_last)
    arguments = GroupNormSiluArguments(
        x, mean, rstd, weight=weight, bias=bias, silu=silu, channels_last=channels_last, eps=eps, y=y
    )
    call("spo_group_norm_silu_forward", x.device, arguments)
    return y, mean, rstd


def _backward_c(x, weight, bias, mean, rstd, grad_y, num_groups, silu, channels_last):
    grad_x = torch.empty_like(x)
    arguments = GroupNormSiluArguments(
        x, mean, rstd, weight=weight, bias=bias, silu=silu, channels_last=channels_last, grad_y=grad_y, grad_x=grad_x
    )
    call("spo_group_norm_silu_backward", x.device, arguments)
    return grad_x


# ---------------------------------------------------------------------------------------------------- torch.library ops


def _fake(x, weight, bias, num_groups, eps, silu, channels_last):
    return torch.empty_like(x), *_statistics(x, num_groups)


def _backward_fake(x, *_):
    return torch.empty_like(x)


GROUP_NORM_SILU = implementations("group_norm_silu", triton=_launch, c=_forward_c, fake=_fake)
GRADIENT = implementations("group_norm_silu_backward", triton=_launch_backward, c=_backward_c, fake=_backward_fake)


def _save(ctx: Context, inputs: tuple, output: tuple[Tensor, Tensor, Tensor]) -> None:
    x, weight, bias, num_groups, _, silu, channels_last = inputs
    _, mean, rstd = output
    ctx.constants = (num_groups, silu, channels_last)
    ctx.save_for_backward(x, weight, bias, mean, rstd)
    ctx.mark_non_differentiable(mean, rstd)


def _backward(gradient: Callable[..., Tensor], ctx: Context, grad_y: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    grad_y = grad_y.contiguous(memory_format=_format(bool(ctx.constants[-1])))
    return gradient(*ctx.saved_tensors, grad_y, *ctx.constants), *[None] * 6


differentiate(GROUP_NORM_SILU, GRADIENT, _save, _backward)

# ---------------------------------------------------------------------------------------------------- public function


def group_norm_silu(
    x: Tensor,  # (N, C, H, W) any float type, NCHW or channels-last; other strides are copied
    weight: Tensor,  # (C,) frozen, of x's type
    bias: Tensor,  # (C,)
    num_groups: int,
    eps: float = 1e-5,
    *,
    silu: bool = True,  # False: the norm alone
) -> Tensor:  # (N, C, H, W) in x's type and memory layout
    """silu(group_norm(x)); gradient flows to x only, statistics are float32 (float64 for float64).

    Raises ValueError for shapes or types that do not fit, and for weights that want a gradient.
    """
    if x.ndim != 4 or num_groups <= 0 or x.shape[1] % num_groups:
        raise ValueError(f"x is {tuple(x.shape)}, expected (N, C, H, W) with C a multiple of num_groups={num_groups}")
    for name, value in (("weight", weight), ("bias", bias)):
        if value.shape != x.shape[1:2] or value.dtype != x.dtype:
            raise ValueError(f"{name} is {tuple(value.shape)} {value.dtype}, expected {(x.shape[1],)} {x.dtype}")
        if value.requires_grad and torch.is_grad_enabled():
            raise ValueError(f"{name} requires a gradient, and none is computed: freeze it with .requires_grad_(False)")
    channels_last = _channels_last(x)
    x = x.contiguous(memory_format=_format(channels_last))
    name = backend.choose("group_norm_silu", x)
    if name == "eager" or x.numel() == 0:
        return group_norm_silu_ref(x, weight, bias, num_groups, eps, silu, channels_last)
    implementation = GROUP_NORM_SILU[name]
    return implementation(x, weight.contiguous(), bias.contiguous(), num_groups, eps, silu, channels_last)[0]
