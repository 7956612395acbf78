"""One denoising step, x_t -> K children.

Every sampler is a row (a, b, c, d, std) of a StepTable:
    m = uncond + g (cond - uncond),   x0 = c x_t + d m,   mean = a x_t + b m,   x_prev ~ N(mean, std^2).

K children, float32 latents, 16-bit m: 4 + 4 n (x_t, cond, uncond) read, 4 (1 + K) n written (bytes a sample): memory.
"""

from __future__ import annotations

import torch
from torch import Tensor

from spo_fast.ops import backend, philox
from spo_fast.ops.backend import implementations
from spo_fast.ops.c_library import INT64, POINTER, call, check_tensor, fields
from spo_fast.ops.guidance import StepArguments, check_shape, checked_states, guided, guided_kernel, row_of
from spo_fast.ops.optional_triton import jit, launch, tl, two_floats

backend.register(
    "transition",
    cpu=("c", "eager"),
    cuda=("triton", "c", "eager"),
    why="one pass over the inputs; the order on a GPU awaits a measurement",
)

# ---------------------------------------------------------------------------------------------------- definition


def transition_ref(cond, uncond, x_t, rows, coefficients, guidance_scale, num_children, keys, noise, want_x0):
    """The definition."""
    a, b, c, d, std = row_of(coefficients, rows, x_t)
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


# ---------------------------------------------------------------------------------------------------- Triton kernels


@jit
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


@jit
def _row(row, dtype: tl.constexpr):
    """a, b, c, d, std."""
    a = tl.load(row).to(dtype)
    b = tl.load(row + 1).to(dtype)
    c = tl.load(row + 2).to(dtype)
    d = tl.load(row + 3).to(dtype)
    std = tl.load(row + 4).to(dtype)
    return a, b, c, d, std


@jit
def _inside(group, quarter, n):
    """Which elements of each lane there are."""
    first = group < quarter
    return first, first & (group + quarter < n), first & (group + 2 * quarter < n), first & (group + 3 * quarter < n)


@jit
def _normals(key, k, group, dtype: tl.constexpr):
    """The four lanes' standard normals of child k, for the Philox key that starts at `key`."""
    seed = (tl.load(key) & 0xFFFFFFFF) | (tl.load(key + 1) << 32)
    prompt = tl.load(key + 2).to(tl.uint32)
    step = tl.load(key + 3).to(tl.uint32)
    candidate = (tl.load(key + 4) + k).to(tl.uint32)
    zero = tl.zeros(group.shape, tl.uint32)
    w0, w1, w2, w3 = tl.philox(seed, group.to(tl.uint32), zero + candidate, zero + step, zero + prompt, n_rounds=10)
    z0, z1 = _box_muller(w0, w1)
    z2, z3 = _box_muller(w2, w3)
    return z0.to(dtype), z1.to(dtype), z2.to(dtype), z3.to(dtype)


@jit
def _store_child(child_ptr, noise_ptr, offsets, mask, mean, std, z, HAS_NOISE: tl.constexpr):
    if HAS_NOISE:
        z = tl.load(noise_ptr + offsets, mask=mask, other=0.0)
    tl.store(child_ptr + offsets, mean + std * z.to(mean.dtype), mask=mask)


@jit
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
    """The four lanes of a Philox group are four contiguous quarters of the sample: all accesses are coalesced."""
    sample = tl.program_id(0).to(tl.int64)
    group = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    dtype: tl.constexpr = x_t_ptr.dtype.element_ty
    a, b, c, d, std = _row(table_ptr + 5 * tl.load(rows_ptr + sample), dtype)
    g = tl.cast(guidance, dtype) + tl.cast(guidance_low, dtype)
    quarter = (n + 3) // 4
    at0 = sample * n + group
    at1 = at0 + quarter
    at2 = at1 + quarter
    at3 = at2 + quarter
    in0, in1, in2, in3 = _inside(group, quarter, n)
    m0 = guided_kernel(cond_ptr, uncond_ptr, at0, in0, g, HAS_UNCOND, dtype)
    m1 = guided_kernel(cond_ptr, uncond_ptr, at1, in1, g, HAS_UNCOND, dtype)
    m2 = guided_kernel(cond_ptr, uncond_ptr, at2, in2, g, HAS_UNCOND, dtype)
    m3 = guided_kernel(cond_ptr, uncond_ptr, at3, in3, g, HAS_UNCOND, dtype)
    x0 = tl.load(x_t_ptr + at0, mask=in0, other=0.0)
    x1 = tl.load(x_t_ptr + at1, mask=in1, other=0.0)
    x2 = tl.load(x_t_ptr + at2, mask=in2, other=0.0)
    x3 = tl.load(x_t_ptr + at3, mask=in3, other=0.0)
    if WANT_X0:
        tl.store(x0_ptr + at0, c * x0 + d * m0, mask=in0)
        tl.store(x0_ptr + at1, c * x1 + d * m1, mask=in1)
        tl.store(x0_ptr + at2, c * x2 + d * m2, mask=in2)
        tl.store(x0_ptr + at3, c * x3 + d * m3, mask=in3)
    mean0 = a * x0 + b * m0
    mean1 = a * x1 + b * m1
    mean2 = a * x2 + b * m2
    mean3 = a * x3 + b * m3
    shift = tl.zeros([], tl.int64)
    for k in range(num_children):
        z0, z1, z2, z3 = mean0, mean1, mean2, mean3  # where noise is supplied: loaded below
        if not HAS_NOISE:
            z0, z1, z2, z3 = _normals(keys_ptr + 5 * sample, k, group, dtype)
        _store_child(child_ptr, noise_ptr, shift + at0, in0, mean0, std, z0, HAS_NOISE)
        _store_child(child_ptr, noise_ptr, shift + at1, in1, mean1, std, z1, HAS_NOISE)
        _store_child(child_ptr, noise_ptr, shift + at2, in2, mean2, std, z2, HAS_NOISE)
        _store_child(child_ptr, noise_ptr, shift + at3, in3, mean3, std, z3, HAS_NOISE)
        shift += child_stride


def _outputs(cond, uncond, x_t, rows, coefficients, guidance_scale, num_children, keys, noise, want_x0):
    """x0 and children to be filled."""
    return x_t.new_empty(x_t.shape if want_x0 else (0, *x_t.shape[1:])), x_t.new_empty((num_children, *x_t.shape))


GROUPS = 128  # Philox groups of four a program: one a thread; two make ptxas spill at its limit of 64 registers


def _launch(
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
    x0, children = _outputs(cond, uncond, x_t, rows, coefficients, guidance_scale, num_children, keys, noise, want_x0)
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


# ---------------------------------------------------------------------------------------------------- C library


class TransitionArguments(StepArguments):
    """spo_transition_args of csrc/spo_fast.h."""

    _fields_ = fields(keys=POINTER, noise=POINTER, num_children=INT64, x0=POINTER, children=POINTER)


def transition_c(cond, uncond, x_t, rows, table, guidance_scale, num_children, keys, noise, want_x0=True):
    """x0 = c x_t + d m and children a x_t + b m + std z, in one pass; arguments as transition's, contiguous.

    Raises ValueError for wrong shapes, dtypes, devices or strides, RuntimeError for a row outside the table (CPU only).
    """
    if num_children > 0 and keys is None and noise is None:
        raise ValueError(f"transition: {num_children} children need keys (B, 5) or noise (K, B, ...)")
    x0, children = _outputs(cond, uncond, x_t, rows, table, guidance_scale, num_children, keys, noise, want_x0)
    arguments = TransitionArguments(
        *(cond, uncond, x_t, rows, table, guidance_scale),
        keys=keys,
        noise=noise,
        num_children=num_children,
        x0=x0 if want_x0 else None,
        children=children,
    )
    check_tensor("keys", keys, (x_t.shape[0], 5), torch.int64, x_t)
    check_tensor("noise", noise, (num_children, *x_t.shape), x_t.dtype, x_t)
    call("spo_transition", x_t.device, arguments)
    return x0, children


# ---------------------------------------------------------------------------------------------------- torch.library ops


TRANSITION = implementations("transition", eager=transition_ref, triton=_launch, c=transition_c, fake=_outputs)

# ---------------------------------------------------------------------------------------------------- public functions


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
    states = checked_states(cond, uncond, x_t, rows, coefficients)
    check_shape("keys", keys, (x_t.shape[0], 5), torch.int64)
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
        keys = None if noise is not None else keys
        return implementation(*states, float(guidance_scale), num_children, keys, noise, want_x0)
