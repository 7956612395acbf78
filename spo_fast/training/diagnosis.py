"""Whether reference and policy agree where they must, and how far a quantised base is from the whole one."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from spo_fast.config.training import SampleConfig
from spo_fast.method.experience import Experience, Prediction
from spo_fast.method.objectives import frozen_predictions, log_ratios
from spo_fast.method.schedule import StepTable
from spo_fast.models.policy import Policy
from spo_fast.ops.guidance import guided


@torch.no_grad()
def ratio_deviations(m: Prediction, table: StepTable, e: Experience, cfg: SampleConfig) -> dict[int, float]:
    """Timestep -> largest |ratio - 1|; before the first update: what the paths of policy and reference differ by."""
    deviation = log_ratios(m.detach(), table, e, cfg).expm1().abs().flatten()
    timesteps = table.timesteps[e.states.rows[e.index.flatten()]]
    found: dict[int, float] = {}
    for t, value in zip(timesteps.tolist(), deviation.tolist(), strict=True):
        found[t] = max(value, found.get(t, 0.0))
    return found


def start_text(deviations: dict[int, float]) -> str:
    if not any(deviations.values()):
        return "probability ratio of policy to reference at the start: exactly 1"
    by_step = ", ".join(f"{value:.1e} at {t}" for t, value in sorted(deviations.items(), reverse=True))
    return f"probability ratio of policy to reference at the start, distance from 1 by timestep: {by_step}"


@torch.no_grad()
def base_errors(
    policy: Policy, table: StepTable, e: Experience, cfg: SampleConfig, objective: Any, states_per_forward: int
) -> dict[str, tuple[Tensor, Tensor]]:
    """What a rounded base changes: name -> timesteps, values. Of the reference, with the rounded and the full base.

    base_error: |m' - m| / |m| of each state's guided prediction. base_log_ratio: |log p'(x_{t-1}) - log p(x_{t-1})| of
    each transition; labelled pairs have none. Nothing if no term was kept.
    """
    if not len(e):
        return {}
    both = functools.partial(frozen_predictions, policy, table, e, objective.guided(cfg), states_per_forward)
    with policy.reference():
        rounded = both()
        with policy.full_base():
            full = both()
    m, truth = (guided(*p, cfg.guidance_scale, e.states.x_t.dtype).flatten(1) for p in (rounded, full))
    t = table.timesteps[e.states.rows]
    found = {"base_error": (t, (m - truth).norm(dim=1) / truth.norm(dim=1))}
    if objective.sampler != "data":
        ratio = log_ratios(rounded, table, replace(e, frozen=full), cfg)
        found["base_log_ratio"] = (t[e.index].flatten(), ratio.abs().flatten())
    return found


def base_text(how: str, errors: Mapping[str, tuple[Tensor, Tensor]]) -> str:
    told = {"base_error": "relative error of the prediction", "base_log_ratio": "size of the log-ratio to it"}
    lines = [
        f"  {told[name]}: " + ", ".join(f"{values[t == at].mean():.1e} at {at}" for at in t.unique().tolist()[::-1])
        for name, (t, values) in errors.items()
    ]
    found = "means by timestep of the first states" if lines else "not measured, the first iteration kept nothing"
    return "\n".join([f"{how} base (inexact) against the full one, {found}" + ":" * bool(lines), *lines])
