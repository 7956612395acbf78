"""Philox4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"): noise from a key, not a stream.

A key row is five int64 numbers (seed, iteration, prompt, step, candidate); each counts modulo 2^32. The generator is
called once per group of four elements: key words (seed, iteration), counter words (group, candidate, step, prompt).
With q = ceil(n / 4) groups, element `lane * q + group` takes output word pair `lane // 2`, so that every lane is a
contiguous quarter of the sample. csrc/philox.h and the Triton kernel in transition.py follow the same layout.
"""

from __future__ import annotations

import torch
from torch import Tensor

MASK = 0xFFFFFFFF
M0, M1 = 0xD2511F53, 0xCD9E8D57
W0, W1 = 0x9E3779B9, 0xBB67AE85


def _mul_hi_lo(a: int, b: Tensor) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of a * b for 32-bit unsigned values held in int64."""
    # The product has 64 bits and int64 is signed: halve b for the high word; the low word survives wrapping.
    hi = (a * (b >> 16) + ((a * (b & 0xFFFF)) >> 16)) >> 16
    return hi & MASK, (a * b) & MASK


def philox4x32(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[Tensor, Tensor]) -> list[Tensor]:
    """Ten rounds of Philox4x32 on int64 tensors that hold 32-bit values and broadcast together; returns 4 words."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        hi0, lo0 = _mul_hi_lo(M0, c0)
        hi1, lo1 = _mul_hi_lo(M1, c2)
        c0, c1, c2, c3 = hi1 ^ c1 ^ k0, lo1, hi0 ^ c3 ^ k1, lo0
        k0, k1 = (k0 + W0) & MASK, (k1 + W1) & MASK
    return [c0, c1, c2, c3]


def words(keys: Tensor, num_groups: int) -> list[Tensor]:
    """Four int64 tensors (B, num_groups) of 32-bit words for key rows (B, 5)."""
    seed, iteration, prompt, step, candidate = (k & MASK for k in keys.unsqueeze(-1).unbind(1))
    group = torch.arange(num_groups, device=keys.device).expand(keys.shape[0], -1)
    return philox4x32((group, candidate, step, prompt), (seed, iteration))


def uniform(word: Tensor) -> Tensor:
    """float32 in (0, 1] from 32-bit words: w 2^-32 + 2^-33."""
    return word.to(torch.float32) * 2.0**-32 + 2.0**-33


def normal(keys: Tensor, n: int) -> Tensor:  # keys (B, 5) int64
    """(B, n) float32 standard normals by Box-Muller, one row a key."""
    w0, w1, w2, w3 = words(keys, (n + 3) // 4)
    lanes = []
    for a, b in ((w0, w1), (w2, w3)):
        radius = torch.sqrt(-2.0 * torch.log(uniform(a)))
        angle = 6.283185307179586 * uniform(b)
        lanes += [radius * torch.cos(angle), radius * torch.sin(angle)]
    return torch.cat(lanes, dim=1)[:, :n]


def integer(keys: Tensor, high: int) -> Tensor:  # keys (B, 5) int64
    """(B,) int64 uniform in [0, high): floor(w high / 2^32), biased by at most high / 2^32."""
    return (words(keys, 1)[0][:, 0] * high) >> 32
