"""Experience without a rollout: the two images of a labelled pair, noised to one timestep with one noise."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from spo_fast.method.experience import Cond, Experience, States, to_device
from spo_fast.method.noise import RENOISE, TIMESTEPS, KeyedDraws
from spo_fast.method.schedule import StepTable


@dataclass(frozen=True)
class PairInputs:
    """B labelled pairs."""

    cond: Cond  # of the B prompts
    latents: Tensor  # (2, B, C, h, w) clean and scaled, the preferred image first
    draws: KeyedDraws

    def __len__(self) -> int:
        return self.latents.shape[1]


@torch.no_grad()
def noised(
    table: StepTable,
    latents: Tensor,  # (2, B, C, h, w)
    rows: Tensor,  # (B,) int64 into the table
    noise: Tensor,  # (2, B, C, h, w) or (B, C, h, w)
) -> Tensor:  # (2, B, C, h, w)
    """x_t = signal x0 + noise e, one row for both images of a pair."""
    signal, sigma = (of[rows].to(latents.dtype).view(-1, 1, 1, 1) for of in (table.signal, table.noise))
    return signal * latents + sigma * noise


@torch.no_grad()
def renoised_pairs(table: StepTable, batch: PairInputs) -> Experience:  # table: of all T timesteps, noisiest first
    """One term a pair, K = 2, S = 1. In x_prev's place stands the output that would have been right.

    From x0 = c x_t + d m it is (x0 - c x_t) / d, whatever the network predicts: of epsilon the noise itself, of a flow
    noise - x0.
    """
    B, T, latents = len(batch), table.num_steps, batch.latents
    row = T - 1 - batch.draws.integer(TIMESTEPS, T)
    noise = batch.draws.normal(RENOISE, tuple(latents.shape[2:])).to(latents.dtype)
    x_t, rows = noised(table, latents, row, noise), row.repeat(2)
    c, d = table.coefficients[rows, 2:4].to(x_t.dtype).T.view(2, 2, B, 1, 1, 1)
    target = (latents - c * x_t) / d
    number = torch.arange(B)
    index = torch.stack([number, number + B], dim=1).unsqueeze(2)
    there = to_device(index, x_t.device)
    return Experience(
        States(x_t.flatten(0, 1), rows, to_device(number.repeat(2), x_t.device)),
        target.transpose(0, 1).unsqueeze(2),
        there,
        batch.cond,
        scores=x_t.new_empty(0),
        read=(there, index),
    )
