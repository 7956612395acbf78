"""Whether what must agree does: policy and reference at the start, a rounded base and the whole one, the processes; and
what is known of numbers that are not finite."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from spo_fast.config.errors import RunError
from spo_fast.config.training import SampleConfig
from spo_fast.data.files import save_tensors, write_atomically
from spo_fast.method.experience import Experience, Prediction
from spo_fast.method.objectives import Objective, frozen_predictions, log_ratios
from spo_fast.method.schedule import StepTable
from spo_fast.models.policy import Policy
from spo_fast.ops.guidance import guided

if TYPE_CHECKING:
    from spo_fast.training.iteration import Iterates
    from spo_fast.training.setup import Parts

# ------------------------------------------------------------------------------------------------ at the start


@torch.no_grad()
def ratio_deviations(m: Prediction, table: StepTable, e: Experience, cfg: SampleConfig) -> dict[int, float]:
    """Timestep -> largest |ratio - 1|; before the first update: what the paths of policy and reference differ by."""
    deviation = log_ratios(m.detach(), table, e, cfg).expm1().abs().flatten()
    timesteps = table.timesteps[e.states.rows[e.index.flatten()]].round().long()
    found: dict[int, float] = {}
    for t, value in zip(timesteps.tolist(), deviation.tolist(), strict=True):
        found[t] = max(value, found.get(t, 0.0))
    return found


def start_text(deviations: dict[int, float]) -> str:
    """A line for what `ratio_deviations` found, noisiest timestep first."""
    if not any(deviations.values()):
        return "probability ratio of policy to reference at the start: exactly 1"
    by_step = ", ".join(f"{value:.1e} at {t}" for t, value in sorted(deviations.items(), reverse=True))
    return f"probability ratio of policy to reference at the start, distance from 1 by timestep: {by_step}"


@torch.no_grad()
def base_errors(
    policy: Policy, table: StepTable, e: Experience, cfg: SampleConfig, objective: Objective, states_per_forward: int
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
    t = table.timesteps[e.states.rows].round().long()
    found = {"base_error": (t, (m - truth).norm(dim=1) / truth.norm(dim=1))}
    if objective.transitions:
        ratio = log_ratios(rounded, table, replace(e, frozen=full), cfg)
        found["base_log_ratio"] = (t[e.index].flatten(), ratio.abs().flatten())
    return found


def base_text(how: str, errors: Mapping[str, tuple[Tensor, Tensor]]) -> str:
    """What `base_errors` found of a base kept as `how`, a line each."""
    told = {"base_error": "relative error of the prediction", "base_log_ratio": "size of the log-ratio to it"}
    lines = [
        f"  {told[name]}: " + ", ".join(f"{values[t == at].mean():.1e} at {at}" for at in t.unique().tolist()[::-1])
        for name, (t, values) in errors.items()
    ]
    found = "means by timestep of the first states" if lines else "not measured, the first iteration kept nothing"
    return "\n".join([f"{how} base (inexact) against the full one, {found}" + ":" * bool(lines), *lines])


def measure_base(run: Iterates, iteration: int, experience: Experience) -> dict[str, float]:
    """In the first iteration: what a rounded base changes, printed; the means of it to log. The full base is let go."""
    found: dict[str, float] = {}
    if iteration == 0 and run.policy.keeps_full_base and run.group.main:
        sample, most = run.cfg.sample, run.cfg.optim.states_at_once
        errors = base_errors(run.policy, run.table, experience, sample, run.objective, most)
        print(base_text(run.cfg.engine.base_weights, errors))
        found = {name: float(values.mean()) for name, (_, values) in errors.items()}
    run.policy.forget_full_base()
    return found


# ------------------------------------------------------------------------------------------------ later


def check_agreement(run: Parts) -> None:
    """Raises RunError if the processes' weights have come apart: a faulty device, or unequal libraries."""
    if run.group.size > 1:
        parts = run.policy.shards is not None
        weights = run.policy.computed_weights().values() if parts else run.learner.parameters
        sums = torch.stack([p.detach().double().sum() for p in weights])
        if any(not torch.equal(*pair) for pair in itertools.pairwise(run.group.gather(sums[None]))):
            raise RunError(
                f"the processes' weights differ after iteration {run.state.iteration}: a device or its libraries "
                "compute something else. --resume_from_checkpoint latest goes on from before it."
            )


def raise_if_nonfinite(run: Parts, pairs: bool) -> None:
    """Raises RunError, its diagnosis written, once too many optimizer steps in a row were dropped, or all of the run.

    pairs: whether the last iteration had any.
    """
    unfit, most = run.state.nonfinite_in_a_row, run.cfg.optim.max_nonfinite_steps
    # in fp16 the first steps overflow while a scale is looked for
    looking = run.learner.scaler.is_enabled()
    never = run.done and not (run.state.optimizer_steps or looking)
    if unfit < most and not (never and unfit > 0):
        return
    what = "optimizer steps" if pairs else "iterations' scores"
    if not run.group.main:
        raise RunError(f"{what} were not finite; process 0 says more.")
    run.report()
    raise RunError(
        f"{unfit} {what} in a row were not finite; see {write_nonfinite(run)}. "
        "Go on from the last checkpoint (--resume_from_checkpoint latest) with a lower --learning_rate, or start "
        "anew with --mixed_precision bf16 or no."
    )


def write_nonfinite(run: Parts) -> Path:
    """nonfinite.json and nonfinite.safetensors: what of the last batch is not finite, and the batch itself."""
    weights = run.policy.computed_weights()
    found: dict[str, object] = {"state": dataclasses.asdict(run.state), "gradients": run.learner.broken}
    found["weights"] = [name for name, value in weights.items() if not value.isfinite().all()]
    if run.learner.scaler.is_enabled():
        found["loss_scale"] = run.learner.scaler.get_scale()
    tensors: dict[str, Tensor] = {}
    if (last := run.learner.last) is not None:
        e = last.experience
        tensors |= {"x_t": e.states.x_t, "x_prev": e.x_prev, "loss": last.loss}
        for whose, m in (("policy", last.m), ("reference", e.frozen)):
            if m is not None:
                tensors |= {f"{whose}_{k}": v for k, v in m._asdict().items() if v is not None}
        found["timesteps"] = run.table.timesteps[e.states.rows].tolist()
    found["finite_share"] = {name: float(value.isfinite().float().mean()) for name, value in tensors.items()}
    path = run.run_dir / "nonfinite.json"
    write_atomically(path, json.dumps(found, indent=1) + "\n")
    whole = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    save_tensors(whole, path.with_suffix(".safetensors"))
    return path
