"""The objectives, side by side. Each collects experience, prepares its baseline, and turns predictions into a loss.

An objective is a frozen dataclass whose fields are its settings. `loss` sees unique states (U) and indices (N, K, S)
into them, so that a state shared by winner and loser costs one forward and one backward.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from spo_fast.config import ObjectiveConfig, SampleConfig
from spo_fast.experience import Experience, Prediction, States
from spo_fast.ops.preference_loss import preference_loss
from spo_fast.ops.transition import log_ratio
from spo_fast.rollout import RolloutBatch, branching_rollout
from spo_fast.schedule import StepTable


def predict_states(policy: Any, table: StepTable, experience: Experience, states: States, guided: bool) -> Prediction:
    """One UNet call on a batch of states, each with its own timestep and prompt."""
    t = table.timesteps[states.rows]
    return policy.predict(states.x_t, t, experience.cond.select(states.prompts), guided)


@torch.no_grad()
def frozen_predictions(
    policy: Any, table: StepTable, experience: Experience, guided: bool, states_per_forward: int | None
) -> Prediction:
    """The reference's outputs on every state of the experience, in batches without gradient."""
    states = experience.states
    size = states_per_forward or max(len(states), 1)
    with policy.reference():
        parts = [
            predict_states(policy, table, experience, states.select(slice(i, i + size)), guided)
            for i in range(0, len(states), size)
        ]
    if not parts:
        empty = states.x_t.to(policy.dtype)
        return Prediction(empty, empty if guided else None)
    uncond = [p.uncond for p in parts if p.uncond is not None]
    return Prediction(torch.cat([p.cond for p in parts]), torch.cat(uncond) if uncond else None)


@dataclass(frozen=True, kw_only=True)
class SPO:
    """Step-by-step preference optimisation (arXiv 2406.04314): the best and the worst of K candidates of one x_t.

    log r = log p_policy(x_{t-1} | x_t) - log p_ref(x_{t-1} | x_t), means over C, H, W; the loss is
    -log sigmoid(beta (log r_w - log r_l)), r clamped to [1 - clip, 1 + clip]. The paper sums over C, H, W and does not
    clamp; this follows the published code (train_spo.py 535-586), so the paper's beta is beta / (C H W).
    """

    beta: float = 10.0
    clip: float | None = 0.1

    def collect(
        self,
        policy: Any,
        table: StepTable,
        scorer: Any,
        decode: Any,
        batch: RolloutBatch,
        cfg: SampleConfig,
        chunk: int,
    ) -> Experience:
        return branching_rollout(policy, table, scorer, decode, batch, cfg, chunk)

    def prepare(
        self, policy: Any, table: StepTable, experience: Experience, cfg: SampleConfig, states_per_forward: int | None
    ) -> Experience:
        frozen = frozen_predictions(policy, table, experience, cfg.guidance_scale > 1, states_per_forward)
        return replace(experience, frozen=frozen)

    def loss(
        self,
        m: Prediction,  # the policy's outputs on the U states, with gradient
        table: StepTable,
        e: Experience,  # N terms, K = 2 sides, S = 1 transition
        cfg: SampleConfig,
        weight: float,  # of each term
    ) -> tuple[Tensor, Tensor]:  # the weighted sum of the terms' losses (), statistics (ops.preference_loss.STATS)
        assert e.frozen is not None, "prepare the experience first"
        ratio, _ = log_ratio(
            *(*m, *e.frozen, e.states.x_t, e.x_prev.flatten(0, 2), e.index.flatten(), e.states.rows),
            *(table.coefficients, cfg.guidance_scale),
        )
        weights = torch.full((len(e),), weight, device=ratio.device, dtype=ratio.dtype)
        return preference_loss(ratio.view(e.index.shape), weights, self.beta, self.clip)


class MSPO(SPO):
    """SPO with inner steps (the published SDXL runs): one comparison labels every transition of a segment.

    Each transition is its own term and is permuted singly, as published. Only a segment's first transition shares x_t
    between the sides.
    """


OBJECTIVES: dict[str, Callable[..., SPO]] = {"spo": SPO, "mspo": MSPO}


def make_objective(cfg: ObjectiveConfig) -> SPO:
    return OBJECTIVES[cfg.method](beta=cfg.beta, clip=cfg.clip)
