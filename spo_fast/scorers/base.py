"""What a scorer is: the protocol of all, and that of those which see pixels."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Protocol, TypeGuard

from torch import Tensor

from spo_fast.method.experience import asks_when, children_told, judges

if TYPE_CHECKING:
    from spo_fast.method.experience import Candidates, Text
    from spo_fast.method.protocols import Judge


class Scorer(Protocol):
    """Judges K candidates of each of B prompts; higher is better, and a softmax over two scores is a preference."""

    def encode(self, prompts: list[str]) -> Text:
        """P prompts -> (P, D) float32 text features (a weighted sum: a tuple of such). repeat_text makes K*B rows."""
        ...

    def __call__(self, candidates: Candidates) -> Tensor:
        """(K*B,) float32 scores, k-major. Takes no gradient and, but for geneval, never waits for the device."""
        ...


class InPhase:
    """A scorer each of whose calls runs in a phase: the trainer's timer, or a count of memory."""

    def __init__(self, scorer: Judge, phase: Callable[[], AbstractContextManager[object]]):
        self.scorer, self.phase = scorer, phase
        self.judges, self.asks_when = judges(scorer), asks_when(scorer)
        self.children_told = children_told(scorer)

    def __call__(self, candidates: Candidates) -> Tensor:  # (K*B,) float32, k-major
        """The scorer's own, inside the phase."""
        with self.phase():
            return self.scorer(candidates)


class PixelScorer(Scorer, Protocol):
    """A scorer of decoded images, which lets a weighted sum decode once for all of them."""

    def encode(self, prompts: list[str]) -> Tensor:
        """P prompts -> (P, ...), one tensor."""
        ...

    def score_pixels(self, pixels: Tensor, t: Tensor, text: Tensor) -> Tensor:
        """(N, 3, H, W) in about [-1, 1], (), (N, D) -> (N,) float32."""
        ...


def sees_pixels(scorer: Scorer) -> TypeGuard[PixelScorer]:
    """Whether a scorer judges decoded images."""
    return hasattr(scorer, "score_pixels")
