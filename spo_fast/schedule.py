"""A schedule is a table. Every sampler step is a row: mean = a x_t + b m, x0 = c x_t + d m, std.

m is the network's raw (guided) output. DDIM with epsilon, v or sample prediction and the flow-matching SDE differ
only in their rows, so one set of kernels serves all of them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class StepTable:
    """One row a denoising step, noisiest first."""

    timesteps: Tensor  # (R,) int64, what the network is told
    coefficients: Tensor  # (R, 5) float64: a, b, c, d, std
    alphas_cumprod: Tensor | None = None  # (R,) float64 alphabar_t of a diffusion's rows; flows have none

    @property
    def num_steps(self) -> int:
        return self.timesteps.shape[0]

    def to(self, device: torch.device | str) -> StepTable:
        alphas = None if self.alphas_cumprod is None else self.alphas_cumprod.to(device)
        return StepTable(self.timesteps.to(device), self.coefficients.to(device), alphas)


def ddim_table(
    alphas_cumprod: Tensor,  # (T,) the scheduler's own float32 table
    timesteps: Tensor,  # (R,) int64, descending
    eta: float,
    prediction_type: str,
) -> StepTable:
    """DDIM (arXiv 2010.02502, eq. 12 and 16). Matches ddim_with_logprob.py of the published code, quirks included:

    the previous timestep is t - T // R clamped to 0, so the last step goes to alphas_cumprod[0], keeps std > 0, and
    set_alpha_to_one is ignored. The table is cast to float64 before any arithmetic: from float64 betas the published
    std would be missed by 3e-7. eta = 0 gives std = 0: fine for sampling, useless for log-probabilities. Raises
    ValueError for an unknown prediction type or eta outside [0, 1].
    """
    if not 0 <= eta <= 1:
        raise ValueError(f"eta={eta} must lie in [0, 1]")
    num_train_timesteps, num_steps = alphas_cumprod.shape[0], timesteps.shape[0]
    previous = (timesteps - num_train_timesteps // num_steps).clamp_min(0)
    alpha = alphas_cumprod.double()[timesteps]
    alpha_prev = alphas_cumprod.double()[previous]
    std = eta * ((1 - alpha_prev) / (1 - alpha) * (1 - alpha / alpha_prev)).sqrt()

    # x0 = c x_t + d m and epsilon = e x_t + f m for the three meanings of m
    zero, one = torch.zeros_like(alpha), torch.ones_like(alpha)
    signal, sigma = alpha.sqrt(), (1 - alpha).sqrt()
    conversions = {
        "epsilon": (1 / signal, -sigma / signal, zero, one),
        "v_prediction": (signal, -sigma, sigma, signal),
        "sample": (zero, one, 1 / sigma, -signal / sigma),
    }
    if prediction_type not in conversions:
        raise ValueError(f"prediction_type={prediction_type!r} is unknown. Known: {', '.join(conversions)}.")
    c, d, e, f = conversions[prediction_type]
    towards_x0, towards_noise = alpha_prev.sqrt(), (1 - alpha_prev - std**2).clamp_min(0).sqrt()
    a = towards_x0 * c + towards_noise * e
    b = towards_x0 * d + towards_noise * f
    return StepTable(timesteps, torch.stack([a, b, c, d, std], dim=1), alpha)


def full_table(alphas_cumprod: Tensor, prediction_type: str) -> StepTable:
    """DDIM rows of all T timesteps (eta = 0), T-1 first: row T-1-t is timestep t."""
    return ddim_table(alphas_cumprod, torch.arange(len(alphas_cumprod) - 1, -1, -1), 0.0, prediction_type)
