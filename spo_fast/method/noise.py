"""Randomness is a key, not a stream: the same (seed, iteration, prompt, step, candidate) gives the same number.

So the same global batch gives the same numbers on 1 or 8 ranks and in any micro-batch, a resumed run draws what the
uninterrupted one would have, and a replayed CUDA graph draws fresh noise once its key tensor is refilled.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol, TypedDict

import torch
from torch import Tensor

from spo_fast.method.experience import to_device
from spo_fast.ops import philox

# The high byte of a key's step word says what is drawn, so that no two uses share a counter.
LATENTS, CHILDREN, PICK, PAIRS, PROMPTS, TIMESTEPS, RENOISE, POSTERIOR, SIDES, STEPS, EMPTY, MERGE = (
    use << 24 for use in range(12)
)


class Drawn(TypedDict, total=False):
    """What ops.transition makes children from: one of these."""

    keys: Tensor
    noise: Tensor


class Draws(Protocol):
    """Everything random in a rollout of B prompts. Tests replay recorded draws through the same protocol."""

    def latents(self, shape: tuple[int, ...], dtype: torch.dtype, num_starts: int = 1) -> Tensor:
        """(num_starts * B, C, H, W) initial standard normals, k-major."""
        ...

    def children(self, step: int, num_children: int, num_parents: int) -> Drawn:
        """`keys=` or `noise=` of ops.transition for the children of step `step`.

        num_parents is 1 when all children come from one latent a prompt, K when each candidate goes on by itself.
        """
        ...

    def integer(self, use: int, high: int, count: int = 1) -> Tensor:
        """(count B,) int64 below a bound, for another use."""
        ...

    def picks(self, steps: Sequence[int], num_candidates: int) -> Iterator[Tensor]:
        """(B,) int64 of each step: the candidate that it starts from, uniform. Asked once a rollout, in order."""
        ...

    def normal(self, use: int, shape: tuple[int, ...], which: int = 0, count: int = 1) -> Tensor:
        """(count B, *shape) float32 standard normals for another use."""
        ...


@dataclass(frozen=True)
class KeyedDraws:
    """Draws from Philox keys (ops/philox.py)."""

    seed: int
    iteration: int
    prompts: Tensor  # (B,) int64 global index of each prompt of the batch

    def _keys(self, step: int, candidates: int = 1) -> Tensor:
        """(candidates * B, 5) key rows, k-major."""
        B = self.prompts.shape[0]
        keys = self.prompts.new_empty(candidates, B, 5)
        keys[..., 0], keys[..., 1], keys[..., 2], keys[..., 3] = self.seed, self.iteration, self.prompts, step
        keys[..., 4] = torch.arange(candidates, device=keys.device)[:, None]
        return keys.flatten(0, 1)

    def normal(self, use: int, shape: tuple[int, ...], which: int = 0, count: int = 1) -> Tensor:
        """(count B, *shape) float32 standard normals for one use; numbers from `which` on tell apart several of it."""
        keys = self._keys(use, count)
        keys[:, 4] += which
        return philox.normal(keys, int(torch.Size(shape).numel())).view(-1, *shape)

    def integer(self, use: int, high: int, count: int = 1) -> Tensor:
        """(count * B,) int64 uniform in [0, high), high up to 2^31; B prompts after B prompts."""
        return philox.integer(self._keys(use, count), high)

    def latents(self, shape: tuple[int, ...], dtype: torch.dtype, num_starts: int = 1) -> Tensor:
        """(num_starts * B, *shape) standard normals, drawn in float32: where trajectories start."""
        keys = self._keys(LATENTS, num_starts)
        return philox.normal(keys, int(torch.Size(shape).numel())).view(-1, *shape).to(dtype)

    def children(self, step: int, num_children: int, num_parents: int) -> Drawn:
        """The keys of the noise that step's children of each parent get; the op draws it."""
        return {"keys": self._keys(CHILDREN + step, num_parents)}

    def picks(self, steps: Sequence[int], num_candidates: int) -> Iterator[Tensor]:
        """(B,) int64 of each step: the candidate of each prompt that it starts from. All are drawn at once."""
        if not steps:
            return iter(())
        keys = self._keys(PICK, len(steps)).view(len(steps), -1, 5)
        keys[..., 3] += to_device(torch.tensor(steps), keys.device)[:, None]
        keys[..., 4] = 0
        return iter(philox.integer(keys.flatten(0, 1), num_candidates).view(len(steps), -1))


def permutation(n: int, seed: int, number: int, use: int = PAIRS) -> Tensor:
    """(n,) int64 random order: of the pairs of iteration `number`, or of the prompts of epoch `number`."""
    keys = torch.tensor([[seed, number, 0, use, 0]])
    return philox.words(keys, n)[0][0].argsort(stable=True)
