"""What the method needs of a network, of a scorer and of what replays calls; the models and scorers have it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import ParamSpec, Protocol, TypeVar

import torch
from torch import Tensor

from spo_fast.method.experience import Candidates, Cond, Prediction

P = ParamSpec("P")
R = TypeVar("R")
Decode = Callable[[Tensor], Tensor]
"""Latents (N, C, H, W) -> pixels (N, 3, 8H, 8W) in about [-1, 1]."""


class Denoiser(Protocol):
    """A network that predicts from noisy latents."""

    def predict(self, x_t: Tensor, t: Tensor, cond: Cond, guided: bool) -> Prediction:
        """Raw outputs on x_t (B, C, H, W) at t, () or (B,); guided: of the empty prompt too, in one forward."""
        ...

    def precompute_text(self, cond: Cond, guided: bool) -> Cond:
        """cond with what the network computes of it alone, for many calls."""
        ...


class Replays(Protocol):
    """What may record calls whose shapes repeat, and play them again."""

    def wrap(self, name: str, function: Callable[P, R]) -> Callable[P, R]:
        """The same function; name tells apart functions of equal shapes."""
        ...


class Policy(Denoiser, Protocol):
    """The trained network, with those it is compared with."""

    @property
    def graphs(self) -> Replays:
        """Of a rollout's calls."""
        ...

    @property
    def dtype(self) -> torch.dtype:
        """What the network computes in."""
        ...

    def reference(self) -> AbstractContextManager[None]:
        """Inside, `predict` is the network that training started from."""
        ...

    def ema(self) -> AbstractContextManager[None]:
        """Inside, `predict` is the moving average of the trained network."""
        ...


class Judge(Protocol):
    """What a rollout asks of a scorer. One that judges children says so: experience.judges."""

    def __call__(self, candidates: Candidates) -> Tensor:
        """(K B,) scores, k-major; higher is better."""
        ...
