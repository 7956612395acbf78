"""A scorer of the user's own: a function of pictures and prompts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, TypeAlias

import torch
from torch import Tensor

from spo_fast.config.errors import RunError
from spo_fast.scorers.preprocess import PictureScorer

if TYPE_CHECKING:
    from numpy.typing import ArrayLike

PictureFunction: TypeAlias = "Callable[[Tensor, list[str]], Tensor | ArrayLike]"
TRIED_SIZE = 64  # pixels of the pictures that a function is tried on


class FunctionScorer(PictureScorer):
    """function(pictures (N, 3, H, W) float32 in [0, 1], N prompts) -> N numbers, higher is better.

    It may wait for the device or leave PyTorch, so no CUDA graph holds it.
    """

    reads_device = True

    def __init__(self, name: str, function: PictureFunction, device: str | torch.device = "cpu"):
        self.name, self.function, self.device = name, function, device
        self._numbers: dict[str, int] = {}

    def encode(self, prompts: list[str]) -> Tensor:  # (P,) int64: a prompt's number
        """Numbers under which `score_pixels` finds the prompts again."""
        return torch.tensor([self._numbers.setdefault(prompt, len(self._numbers)) for prompt in prompts])

    @torch.no_grad()
    def score_pixels(self, pixels: Tensor, t: Tensor, text: Tensor) -> Tensor:  # (N, 3, H, W) -> (N,) float32
        """The function's numbers. Raises RunError if it fails or gives another count."""
        known = list(self._numbers)
        return self._called((pixels.float() / 2 + 0.5).clamp(0, 1), [known[n] for n in text.tolist()])

    def _called(self, pictures: Tensor, prompts: list[str]) -> Tensor:
        try:
            scores = torch.as_tensor(self.function(pictures, list(prompts))).to(pictures.device, torch.float32)
        except Exception as error:  # whatever the user's own code raises
            what = " ".join(f"{type(error).__name__}: {error}".split())
            raise RunError(f"scorer {self.name} ends in {what:.150}. Mend that function.") from error
        if scores.shape != (len(prompts),):
            shape = tuple(scores.shape)
            raise RunError(f"scorer {self.name} gives {shape} for {len(prompts)} pictures: give ({len(prompts)},).")
        return scores

    def check(self, prompts: Sequence[str]) -> None:
        """Try it before the run: two pictures of noise. Raises RunError unless it gives two finite numbers."""
        pixels = torch.rand(2, 3, TRIED_SIZE, TRIED_SIZE, generator=torch.Generator().manual_seed(0))
        texts = [*prompts, "", ""][:2]
        if not (scores := self._called(pixels.to(self.device), texts)).isfinite().all():
            raise RunError(
                f"scorer {self.name} gives {scores.tolist()} for two pictures of noise: give finite numbers."
            )
