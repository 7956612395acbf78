"""Pictures from noise that depends on their number alone: the same for every policy, in validations and evaluations."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from spo_fast.method.experience import Cond, Prediction
from spo_fast.method.noise import KeyedDraws
from spo_fast.method.protocols import Denoiser
from spo_fast.method.rollout import sample_latents
from spo_fast.method.schedule import StepTable
from spo_fast.models.diffusion import DiffusionModel
from spo_fast.models.doors import Network
from spo_fast.models.policy import denoise, precomputed, told

NOISES = {"evaluation": 2**32 - 3, "validation": 2**32 - 1}
"""The iteration whose noise pictures start from, by whose pictures they are: no other use gets there."""


def draw_latents(
    policy: Denoiser,
    model: DiffusionModel,
    table: StepTable,  # of eta 0
    prompts: Sequence[str],
    numbers: Sequence[int],  # of the pictures, one a prompt
    guidance_scale: float,
    noise: tuple[int, int],  # seed and iteration, which with the number decide what a picture starts from
    most_rows: int | None = None,  # UNet rows in one forward
) -> Tensor:  # (B, C, h, w)
    """Final latents of plain DDIM: what every picture of an evaluation or a validation is decoded from."""
    draws = KeyedDraws(*noise, torch.tensor(numbers, device=model.device))
    x = draws.latents(model.latent_shape, model.latent_dtype)
    return sample_latents(policy, table, model.cond(prompts), guidance_scale, x, most_rows)


class Drawn:
    """What sample_latents asks of a policy."""

    def __init__(self, network: Network, fused: bool) -> None:
        self.network, self.fused = network, fused

    def precompute_text(self, cond: Cond, guided: bool) -> Cond:
        """As Policy's."""
        if not self.fused:
            return cond
        return replace(cond, text=precomputed(self.network, told(self.network, len(cond), cond, guided)))

    def predict(self, x_t: Tensor, t: Tensor, cond: Cond, guided: bool) -> Prediction:
        """As Policy's."""
        return denoise(self.network, x_t, t, cond, guided)
