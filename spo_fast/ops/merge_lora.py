"""out = round(W + s B A), rounded stochastically, into a second, fixed storage: the rollout's fast weights.

A 16-bit base lies ON its grid, so nearest rounding of W + delta gives W back wherever delta is under half a step: at
|delta| / |W| = 1e-3 a plainly merged layer moves by about half of what it should (tests/test_merge_lora.py). Rounding
up with the distance to the lower neighbour as the probability is right on average, whatever the size of delta.

W is never written: `out` holds the merged weights, W the base, a layer uses one or the other, and un-merging is to use
W again. `out` keeps its address, so a captured CUDA graph sees the next merge.

One rounding is a function of the key alone: Philox as in philox.py, but the four words serve eight elements. With
q = ceil(n / 8), element `lane * q + group` takes the low 16 bits of word `lane` of its group (lanes 0..3) or the high
16 bits of word `lane - 4`. bfloat16: these are added to the float32 pattern of W + delta, whose upper half is kept.
float16 keeps 13 bits fewer than float32 and takes the upper 13 of the 16. All integers: equal bits on every backend.

The product s B A is PyTorch's, in float32: its order of summation would differ between kernels, and with it the
rounded bits. Fusing it saves the product's 8 n bytes, for all 560 layers of SDXL about 2 ms of an iteration of seconds.

# n = O I elements, 16 bit: 8 n bytes moved beside the product, about 25 integer operations an element; at (1280, 1280)
# 13 MB: 3 us at 4.3 TB/s.
"""

from __future__ import annotations

import torch
from torch import Tensor

from spo_fast.ops import backend, philox
from spo_fast.ops.backend import implementations
from spo_fast.ops.c_library import INT64, POINTER, Arguments, call, check_tensor, fields
from spo_fast.ops.optional_triton import jit, launch, tl

backend.register(
    "merge_lora",
    cpu=("c", "eager"),
    cuda=("triton", "c", "eager"),
    why="one pass, where eager makes over a hundred; the order on a GPU awaits measurement",
)

# ---------------------------------------------------------------------------------------------------- definition


def _random_bits(key: Tensor, n: int) -> Tensor:  # key (5,) int64
    """(n,) int32 in [0, 2^16)."""
    words = philox.words(key.unsqueeze(0), (n + 7) // 8)
    return torch.cat([w[0] & 0xFFFF for w in words] + [w[0] >> 16 for w in words])[:n].to(torch.int32)


def round_stochastic_ref(value: Tensor, random: Tensor, dtype: torch.dtype) -> Tensor:
    """float32 -> bfloat16 or float16, up with the probability of the distance to the neighbour towards 0."""
    bits = value.view(torch.int32)
    magnitude = bits & 0x7FFFFFFF
    if dtype == torch.bfloat16:
        rounded, nan = (bits + random) >> 16, 0x7FC0  # a carry into the exponent is right: the next binade
    else:
        random = random >> 3
        normal = (magnitude - (112 << 23) + random) >> 13  # exponent bias 127 -> 15
        # below 2^-14 halves lie 2^-24 apart: fixed point with 13 bits behind it
        tiny = ((value.abs().clamp(max=2.0**-14) * 2.0**37).to(torch.int32) + random) >> 13
        half = torch.where(magnitude < 0x38800000, tiny, normal).clamp(max=0x7C00)
        rounded, nan = (bits >> 16 & 0x8000) | half, 0x7E00
    return torch.where(magnitude > 0x7F800000, nan, rounded).to(torch.int16).view(dtype)


def merge_ref(weight: Tensor, delta: Tensor, key: Tensor, out: Tensor) -> None:
    """The definition."""
    value = weight.float() + delta
    if weight.dtype != torch.float32:
        random = _random_bits(key, weight.numel())
        value = round_stochastic_ref(value, random.view(weight.shape), weight.dtype)
    out.copy_(value)


# ---------------------------------------------------------------------------------------------------- Triton kernel


@jit
def _merge_lane(weight_ptr, delta_ptr, out_ptr, at, mask, random):
    dtype: tl.constexpr = weight_ptr.dtype.element_ty
    weight = tl.load(weight_ptr + at, mask=mask, other=0.0)
    if dtype == tl.bfloat16:  # by bits, which also the interpreter does exactly
        value = (weight.to(tl.int16, bitcast=True).to(tl.int32) << 16).to(tl.float32, bitcast=True)
    else:
        value = weight.to(tl.float32)
    value += tl.load(delta_ptr + at, mask=mask, other=0.0)
    if dtype == tl.float32:
        tl.store(out_ptr + at, value, mask=mask)
    else:
        bits = value.to(tl.int32, bitcast=True)
        magnitude = bits & 0x7FFFFFFF
        random = random.to(tl.int32)
        if dtype == tl.bfloat16:
            rounded = (bits + random) >> 16
            nan = 0x7FC0
        else:
            random = random >> 3
            normal = (magnitude - 0x38000000 + random) >> 13
            fixed = tl.minimum(tl.abs(value), 6.103515625e-05) * 137438953472.0
            tiny = (fixed.to(tl.int32) + random) >> 13
            half = tl.minimum(tl.where(magnitude < 0x38800000, tiny, normal), 0x7C00)
            rounded = ((bits >> 16) & 0x8000) | half
            nan = 0x7E00
        rounded = tl.where(magnitude > 0x7F800000, nan, rounded).to(tl.int16)
        tl.store(out_ptr + at, rounded.to(dtype, bitcast=True), mask=mask)


@jit
def _merge_two(weight_ptr, delta_ptr, out_ptr, at, apart, mask, n, word):
    """The lanes of a word's low and high half."""
    _merge_lane(weight_ptr, delta_ptr, out_ptr, at, mask & (at < n), word & 0xFFFF)
    at += apart
    _merge_lane(weight_ptr, delta_ptr, out_ptr, at, mask & (at < n), word >> 16)


@jit
def _merge_kernel(weight_ptr, delta_ptr, key_ptr, out_ptr, n, q, BLOCK: tl.constexpr):
    group = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    seed = (tl.load(key_ptr) & 0xFFFFFFFF) | (tl.load(key_ptr + 1) << 32)
    module = tl.load(key_ptr + 2).to(tl.uint32)
    use = tl.load(key_ptr + 3).to(tl.uint32)
    which = tl.load(key_ptr + 4).to(tl.uint32)
    zero = tl.zeros([BLOCK], tl.uint32)
    w0, w1, w2, w3 = tl.philox(seed, group.to(tl.uint32), zero + which, zero + use, zero + module, n_rounds=10)
    mask = group < q
    at = group.to(tl.int64)
    _merge_two(weight_ptr, delta_ptr, out_ptr, at, 4 * q, mask, n, w0)
    _merge_two(weight_ptr, delta_ptr, out_ptr, at + q, 4 * q, mask, n, w1)
    _merge_two(weight_ptr, delta_ptr, out_ptr, at + 2 * q, 4 * q, mask, n, w2)
    _merge_two(weight_ptr, delta_ptr, out_ptr, at + 3 * q, 4 * q, mask, n, w3)


GROUPS = 256  # Philox groups of eight a program


def _launch(weight: Tensor, delta: Tensor, key: Tensor, out: Tensor) -> None:
    n = weight.numel()
    q = (n + 7) // 8
    launch(_merge_kernel)[(-(-q // GROUPS),)](weight, delta, key, out, n, q, BLOCK=GROUPS)


# ---------------------------------------------------------------------------------------------------- C library


class MergeArguments(Arguments):
    """spo_merge_args of csrc/spo_fast.h."""

    _fields_ = fields(dtype=INT64, weight=POINTER, delta=POINTER, key=POINTER, n=INT64, out=POINTER)


def merge_c(weight: Tensor, delta: Tensor, key: Tensor, out: Tensor) -> None:
    """As merge_ref; ValueError for wrong shapes, dtypes, devices or strides."""
    for name, tensor, dtype in (
        ("weight", weight, weight.dtype),
        ("delta", delta, torch.float32),
        ("out", out, weight.dtype),
    ):
        check_tensor(name, tensor, weight.shape, dtype, weight)
    check_tensor("key", key, (5,), torch.int64, weight)
    n = weight.numel()
    arguments = MergeArguments(dtype=weight.dtype, weight=weight, delta=delta, key=key, n=n, out=out)
    call("spo_merge", weight.device, arguments)


# ---------------------------------------------------------------------------------------------------- torch.library ops

MERGE = implementations(
    "merge_lora",
    eager=merge_ref,
    triton=_launch,
    c=merge_c,
    fake=lambda *_: None,
    schema="(Tensor weight, Tensor delta, Tensor key, Tensor(a!) out) -> ()",
    mutates_args=("out",),
)

# ---------------------------------------------------------------------------------------------------- public function


@torch.no_grad()
def merge_lora(
    weight: Tensor,  # (O, I) the base, float32, bfloat16 or float16: only read
    lora_A: Tensor,  # (r, I)
    lora_B: Tensor,  # (O, r)
    scale: float,  # alpha / r
    key: Tensor,  # (5,) int64 on weight's device: seed, iteration, and three more that name the layer and the use
    *,
    out: Tensor,  # (O, I) the merged weights' own storage, of weight's type
) -> Tensor:  # out
    """Fill `out` with weight + scale B A, rounded stochastically (float32: added). Without gradient.

    `out` must be contiguous and not weight's memory. Raises ValueError or TypeError otherwise.
    """
    (rows, columns), r = weight.shape, lora_A.shape[0]
    if lora_A.shape != (r, columns) or lora_B.shape != (rows, r):
        raise ValueError(
            f"merge_lora: lora_A {tuple(lora_A.shape)} and lora_B {tuple(lora_B.shape)} do not fit weight "
            f"{tuple(weight.shape)}: expected (r, {columns}) and ({rows}, r)"
        )
    if weight.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise TypeError(
            f"merge_lora rounds to float32, bfloat16 or float16, not {weight.dtype}: convert the base first"
        )
    if out.shape != weight.shape or out.dtype != weight.dtype or not out.is_contiguous():
        raise ValueError(
            f"out is {tuple(out.shape)} {out.dtype}, expected contiguous {tuple(weight.shape)} {weight.dtype}"
        )
    if out is weight or (not torch.compiler.is_compiling() and _share_memory(out, weight)):
        raise ValueError("out shares the base's memory: give the merged weights a storage of their own")
    if key.shape != (5,) or key.dtype != torch.int64:
        raise ValueError(f"key is {tuple(key.shape)} {key.dtype}, expected (5,) int64")
    delta = (scale * lora_B.float()) @ lora_A.float()
    MERGE[backend.choose("merge_lora", weight)](weight.contiguous(), delta, key.contiguous(), out)
    return out


def _share_memory(a: Tensor, b: Tensor) -> bool:
    return a.numel() > 0 and a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()
