"""Rows of flow matching: x_t = (1 - sigma) x0 + sigma e, the network predicts the velocity e - x0.

1 - sigma and sigma stand where a diffusion has sqrt(alphabar) and sqrt(1 - alphabar), so DDIM's step, SPO's own
sampler, is the posterior of this forward process too: at equal noise-to-signal ratio its rows are ddim_table's in
other coordinates, x_flow = (1 - sigma) / sqrt(alphabar) x_diffusion. The other samplers are those of published
reinforcement learning on flow models.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from spo_fast.method.schedule import NUM_TIMESTEPS, StepTable

if TYPE_CHECKING:
    from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler

PUBLISHED_BETAS = (0.00085, 0.012)
"""Of SD-1.5 and SDXL, scaled linear: the schedule whose timesteps the step-aware scorers know."""


def flow_table(
    sigmas: Tensor,  # (R + 1,) falling, from at most 1 to at least 0: where each step starts, and where the last ends
    eta: float,
    sampler: str = "ddim",  # or flow_sde, cps, dance
    timesteps: Tensor | None = None,  # (R,) what the network is told; None: 1000 sigma
) -> StepTable:
    """Rows of a flow. With eta = 0 all samplers take Euler's steps of the probability flow.

    ddim: the posterior of the forward process, std = eta s' sqrt(1 - ((1 - s) s' / ((1 - s') s))^2) (MixGRPO's step).
    flow_sde: the SDE of Flow-GRPO, g = eta sqrt(s / (1 - s)), where s = 1 with the next sigma inside 1 - s.
    cps: ddim's mean with std = s' sin(eta pi / 2) (Flow-CPS). dance: Flow-SDE with g = eta (DanceGRPO).

    ddim and cps end with std 0 where the sigmas end with 0: no log-probability there. Raises ValueError for an unknown
    sampler, eta out of its range, and sigmas that do not fall within [0, 1].
    """
    known = {"ddim": 1.0, "flow_sde": math.inf, "cps": 1.0, "dance": math.inf}
    if sampler not in known:
        raise ValueError(f"sampler={sampler!r} is unknown. Known: {', '.join(known)}.")
    if not 0 <= eta <= known[sampler]:
        raise ValueError(f"eta={eta} of sampler={sampler} must lie in [0, {known[sampler]:g}].")
    s = sigmas.double()
    if len(s) < 2 or not (s[0] <= 1 and s[-1] >= 0 and bool((s.diff() < 0).all())):
        raise ValueError(f"sigmas {sigmas.tolist()!s:.80} must fall, and lie within 0 to 1.")
    s, to = s[:-1], s[1:]
    if sampler in ("ddim", "cps"):
        if sampler == "ddim":
            kept = (1 - s) * to / ((1 - to) * s)  # of the noise that was there at `to`; at s = 1 none
            std = eta * to * (1 - kept.square()).clamp_min(0).sqrt()
        else:
            std = to * math.sin(eta * math.pi / 2)
        q = (to.square() - std.square()).clamp_min(0).sqrt()
        a, b = (1 - to) + q, -s * (1 - to) + (1 - s) * q
    else:
        dt = to - s
        # Flow-GRPO's code looks for sigma = 1 alone
        signal = (1 - s).where(s < 1, 1 - to)
        g = eta * (s / signal).sqrt() if sampler == "flow_sde" else torch.full_like(s, eta)
        drift = g.square() / (2 * s)
        a, b, std = 1 + drift * dt, (1 + drift * (1 - s)) * dt, g * (-dt).sqrt()
    rows = torch.stack([a, b, torch.ones_like(s), -s, std], dim=1)
    told = (sigmas[:-1] * NUM_TIMESTEPS).float() if timesteps is None else timesteps
    return StepTable(told, rows, 1 - s, s, timestep_of(s))


def noise_to_signal() -> Tensor:  # (1000,) float64, rising
    """sqrt((1 - alphabar) / alphabar) of the published diffusions' timesteps."""
    low, high = (math.sqrt(beta) for beta in PUBLISHED_BETAS)
    alphas = (1 - torch.linspace(low, high, NUM_TIMESTEPS, dtype=torch.float64).square()).cumprod(0)
    return ((1 - alphas) / alphas).sqrt()


def timestep_of(sigma: Tensor) -> Tensor:  # float64 -> int64
    """The published diffusions' timestep whose noise-to-signal ratio is nearest, by its logarithm."""
    ratios, wanted = noise_to_signal().log(), (sigma / (1 - sigma)).log()
    above = torch.searchsorted(ratios, wanted.contiguous()).clamp(1, NUM_TIMESTEPS - 1)
    nearer_below = wanted - ratios[above - 1] <= ratios[above] - wanted
    return torch.where(nearer_below, above - 1, above)


def sigma_of(t: Tensor) -> Tensor:  # int64 -> float64
    """The sigma of equal noise-to-signal ratio: 751 -> .805, 551 -> .658, 351 -> .498, 151 -> .314, 1 -> .040."""
    ratio = noise_to_signal()[t]
    return ratio / (1 + ratio)


def judged_table() -> StepTable:
    """Rows of all timesteps that a scorer can be told, 999 first, as a flow has them (eta = 0)."""
    t = torch.arange(NUM_TIMESTEPS - 1, -1, -1)
    return flow_table(torch.cat([sigma_of(t), torch.zeros(1, dtype=torch.float64)]), 0.0)


# ---------------------------------------------------------------------------------------------------- a model's files


def flow_scheduler(config: Mapping[str, object]) -> FlowMatchEulerDiscreteScheduler:
    """diffusers' Euler scheduler of a scheduler_config.json. Raises ValueError for one that is no flow's."""
    from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler

    name = str(config.get("_class_name"))
    where = f"the model's scheduler ({name})"
    if "FlowMatch" not in name and not config.get("use_flow_sigmas"):
        raise ValueError(f"{where} is no flow's: the model belongs to --model sd15 or sdxl, or its file is another's.")
    known = [key for key in inspect.signature(FlowMatchEulerDiscreteScheduler.__init__).parameters if key != "self"]
    settings = {key: config[key] for key in known if key in config}
    settings.setdefault("shift", config.get("flow_shift", 1.0))  # the multistep solvers' name
    if config.get("invert_sigmas"):
        raise ValueError(f"{where} has invert_sigmas=true: sigma grows along such a model's steps. Not trained here.")
    try:
        scheduler: FlowMatchEulerDiscreteScheduler = FlowMatchEulerDiscreteScheduler(**settings)
    except (ValueError, TypeError, RuntimeError) as error:
        raise ValueError(f"{where} is damaged: {' '.join(str(error).split()):.150}.") from error
    if (T := scheduler.config["num_train_timesteps"]) != NUM_TIMESTEPS:
        raise ValueError(f"{where} counts {T} timesteps; flows are told 1000 sigma here. Mend num_train_timesteps.")
    return scheduler


def shift_of(scheduler: FlowMatchEulerDiscreteScheduler, tokens: int) -> dict[str, float]:
    """mu, for set_timesteps of a schedule that shifts by the image's tokens; none for others. As the pipelines do."""
    config = scheduler.config
    if not config["use_dynamic_shifting"]:
        return {}
    few, many = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
    low, high = config.get("base_shift", 0.5), config.get("max_shift", 1.15)
    slope = (high - low) / (many - few)
    return {"mu": tokens * slope + low - slope * few}


def flow_steps(
    scheduler: FlowMatchEulerDiscreteScheduler, num_steps: int, tokens: int, even: bool
) -> tuple[Tensor, Tensor]:
    """Sigmas (R + 1,) and timesteps (R,), float32, that a model's own pipeline would take.

    even: the pipeline gives sigmas 1, 1 - 1/R, ..., 1/R to be shifted (FLUX); else the scheduler makes them (SD3).
    """
    sigmas = np.linspace(1.0, 1 / num_steps, num_steps).tolist() if even else None
    scheduler.set_timesteps(num_steps, sigmas=sigmas, **shift_of(scheduler, tokens))  # type: ignore[arg-type]
    return torch.as_tensor(scheduler.sigmas).clone(), torch.as_tensor(scheduler.timesteps).clone()


def full_flow_table(scheduler: FlowMatchEulerDiscreteScheduler, tokens: int) -> StepTable:
    """Rows of 1000 sigmas, 1 first, shifted as the model's sampling is (eta = 0): for what is noised to any of them."""
    sigmas, timesteps = flow_steps(scheduler, NUM_TIMESTEPS, tokens, even=True)
    return flow_table(sigmas, 0.0, timesteps=timesteps)
