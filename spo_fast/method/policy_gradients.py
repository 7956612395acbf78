"""Policy gradients: the reward's distance from its group's mean weighs each transition's probability ratio.

DDPO, DPOK and Flow-GRPO learn from whole trajectories judged at their ends, step-wise GRPO from children of one x_t
that are judged there and then.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from spo_fast.config.training import SampleConfig
from spo_fast.method.experience import EPSILON, Experience, Prediction, group_advantages
from spo_fast.method.objectives import Objective, Outputs, trajectory_terms
from spo_fast.method.protocols import Policy
from spo_fast.method.renoise import PairInputs
from spo_fast.method.rollout import (
    RolloutBatch,
    Sampler,
    rollout_segments,
    trajectory_rollout,
    window_at,
    with_window,
)
from spo_fast.method.schedule import StepTable
from spo_fast.ops.guidance import guided
from spo_fast.ops.log_ratio import log_ratio


def clipped_surrogate(ratio: Tensor, advantage: Tensor, clip: float | None) -> tuple[Tensor, Tensor]:
    """max(-A r, -A clamp(r, 1 - clip, 1 + clip)), and whether r lies outside; any one shape."""
    kept = ratio if clip is None else ratio.clamp(1 - clip, 1 + clip)
    return torch.maximum(-advantage * ratio, -advantage * kept), ratio != kept


def against(
    m: Prediction, frozen: Prediction, table: StepTable, e: Experience, cfg: SampleConfig
) -> tuple[Tensor, Tensor]:
    """log p(x_{t-1} | x_t) of m minus that of frozen, and their KL, mean (mu - mu_frozen)^2 / (2 std^2): (N, K)."""
    states = (e.states.x_t, e.x_prev.flatten(0, 2), e.index.flatten(), e.states.rows)
    log_r, kl = log_ratio(*m, *frozen, *states, table.coefficients, cfg.guidance_scale)
    return log_r.view(len(e), -1), kl.view(len(e), -1)


def over_global_std(e: Experience, scores: Tensor) -> Experience:
    """Advantages in standard deviations of all scores of the iteration, whatever their prompt."""
    assert e.advantage is not None
    return replace(e, advantage=e.advantage / (scores.std(correction=0) + EPSILON).to(e.advantage.dtype))


@dataclass(frozen=True, kw_only=True)
class PolicyGradient(Objective):
    """What all share: PPO's clipped surrogate of advantages, and a distance from the reference if it weighs anything.

    r = p(x_{t-1} | x_t) / p_old(x_{t-1} | x_t), log-probs as means over C, H, W; a term is the mean over its K
    transitions of max(-A r, -A clamp(r, 1 - clip, 1 + clip)) + kl_weight distance, A clamped to +-advantage_clip.
    """

    clip: float | None
    advantage_clip: float
    kl_weight = 0.0  # of those that have it a field
    stats = ("terms", "ratio", "clamped", "approx_kl", "kl")

    def baselines(self, policy: Policy, outputs: Outputs, own: Outputs) -> dict[str, Prediction]:
        """The policy's own outputs before its first update, made by the training path: the ratio starts at 1. And the
        reference's, if the distance from it weighs anything.

        From the rollout's path (other batches, merged weights) 16-bit rounding alone would exceed the clip at t = 51.
        """
        found = {"frozen": own()}
        if self.kl_weight:
            with policy.reference():
                found["second_reference"] = outputs()
        return found

    def distance(
        self, m: Prediction, reference: Prediction, table: StepTable, e: Experience, cfg: SampleConfig
    ) -> Tensor:
        """(N, K): the KL of each step."""
        return against(m, reference, table, e, cfg)[1]

    def weigh(self, log_r: Tensor, drift: Tensor, std: Tensor, advantage: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Ratios, the surrogate, and what was clamped; drift: mean (mu - mu_old)^2 / (2 std^2). All (N, K)."""
        ratio = log_r.exp()
        return ratio, *clipped_surrogate(ratio, advantage, self.clip)

    def loss(
        self, m: Prediction, table: StepTable, e: Experience, cfg: SampleConfig, weight: float
    ) -> tuple[Tensor, Tensor]:
        """As `Objective.loss`."""
        assert e.advantage is not None and e.frozen is not None, "collect and prepare the experience first"
        log_r, drift = against(m, e.frozen, table, e, cfg)
        std = table.coefficients[e.states.rows, 4][e.index.flatten()].to(log_r.dtype).view_as(log_r)
        advantage = e.advantage.view_as(log_r).clamp(-self.advantage_clip, self.advantage_clip)
        ratio, terms, outside = self.weigh(log_r, drift, std, advantage.to(log_r.dtype))
        kl = torch.zeros_like(log_r)
        if self.kl_weight:
            assert e.second_reference is not None, "prepare the experience first"
            kl = self.distance(m, e.second_reference, table, e, cfg)
        with torch.no_grad():
            told = torch.stack([torch.ones_like(ratio), ratio, outside.to(ratio.dtype), log_r.square() / 2, kl])
        return weight * (terms + self.kl_weight * kl).mean(1).sum(), told.mean(2).sum(1)


# ---------------------------------------------------------------------------------------------------- trajectories


@dataclass(frozen=True, kw_only=True)
class DDPO(PolicyGradient):
    """DDPO (arXiv 2305.13301): one transition a term, A its trajectory's.

    A is the reward's distance from the prompt's mean in its standard deviations. Mean and deviation are of the prompt's
    K trajectories; the published code has one trajectory a prompt and keeps a prompt's last rewards over rollouts
    instead (stat_tracking.py).
    """

    shape = (1, 1)
    rollout = staticmethod(trajectory_rollout)

    def term_states(self, cfg: SampleConfig) -> list[int]:
        """One state a transition; K trajectories."""
        return [1] * (cfg.num_candidates * cfg.branching_steps)

    def collect(self, sampler: Sampler, batch: RolloutBatch | PairInputs) -> Experience:
        """Every transition of K trajectories of a prompt, with its trajectory's advantage."""
        assert isinstance(batch, RolloutBatch)
        walk, cfg = trajectory_rollout(sampler, batch), sampler.cfg
        std, mean = torch.std_mean(walk.scores, dim=0, correction=0)
        advantage = ((walk.scores - mean) / (std + 1e-6)).flatten().repeat(cfg.branching_steps)
        return replace(trajectory_terms(walk, cfg, batch), advantage=advantage)


@dataclass(frozen=True, kw_only=True)
class DPOK(DDPO):
    """DPOK (arXiv 2305.16381): DDPO plus kl_weight times the KL to the reference.

    The authors' KL is the squared difference of the guided predictions, mean over C, H, W (google-research/dpok); the
    Categorical KL over the batch in d3po's restatement is meaningless. Their learnt value function is DDPO's mean here.
    """

    kl_weight: float

    def distance(
        self, m: Prediction, reference: Prediction, table: StepTable, e: Experience, cfg: SampleConfig
    ) -> Tensor:
        """(N, 1): the authors' KL."""
        policy, frozen = (guided(*p, cfg.guidance_scale, e.states.x_t.dtype)[e.index.flatten()] for p in (m, reference))
        return (policy - frozen).square().flatten(1).mean(1)[:, None]


# ---------------------------------------------------------------------------------------------------- groups


@dataclass(frozen=True, kw_only=True)
class StepGRPO(PolicyGradient):
    """Step-wise GRPO: K children of one x_t are judged as SPO's are, and each is a transition with its advantage.

    The K transitions of a prompt's step are the sides of one term, all from one state: one forward and one backward
    serve them, in whatever batch the term lands. For K = 2 the first gradient is SPO's, nothing clamped, over beta / 2.

    weight_by_std: each surrogate times its step's std (TempFlow-GRPO). guard_ratio: r = exp(std (log r + mean
    (mu - mu_old)^2 / (2 std^2))), GRPO-Guard's, whose mean and variance are the same at all steps. dead_zone: steps
    whose K scores differ by no more give no term.
    """

    kl_weight: float
    weight_by_std: bool
    guard_ratio: bool
    dead_zone: float | None

    def collect(self, sampler: Sampler, batch: RolloutBatch | PairInputs) -> Experience:
        """A term a step and prompt of a branching rollout, with all of its children."""
        assert isinstance(batch, RolloutBatch)
        e = rollout_segments(sampler, batch, functools.partial(all_children, dead_zone=self.dead_zone)).compact(
            batch.cond
        )
        advantage = group_advantages(e.scores.view(-1, sampler.cfg.num_candidates, len(batch)))  # (G, K, B)
        return replace(e, advantage=advantage[e.order, :, e.states.prompts[e.index[:, 0, 0]]])

    def weigh(self, log_r: Tensor, drift: Tensor, std: Tensor, advantage: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """As PolicyGradient's, by the options."""
        ratio, terms, outside = super().weigh(
            (log_r + drift) * std if self.guard_ratio else log_r, drift, std, advantage
        )
        return ratio, terms * std if self.weight_by_std else terms, outside


def all_children(scores: Tensor, threshold: float | Tensor, dead_zone: float | None) -> tuple[Tensor, Tensor]:
    """As rollout.best_and_worst: indices (K, B) of all, and of whose prompts they are used; no threshold is read."""
    K, B = scores.shape
    spread = scores.amax(0) - scores.amin(0)
    used = torch.ones(B, dtype=torch.bool, device=scores.device) if dead_zone is None else spread > dead_zone
    return torch.arange(K, device=scores.device)[:, None].expand(K, B), used


@dataclass(frozen=True, kw_only=True)
class GRPO(PolicyGradient):
    """Flow-GRPO (arXiv 2505.05470): K whole trajectories of a prompt, judged at their ends; a transition is a term.

    advantage_std: the deviation is of the prompt's K scores, or of all of the iteration's (global). grpo_window
    FIRST:END (MixGRPO, arXiv 2507.21802): noise is added, and transitions are trained, in these steps alone; the others
    follow the probability flow. window_moves: iterations after which the window moves by one step, from the last place
    back to the first.
    """

    kl_weight: float
    advantage_std: str
    grpo_window: str | None
    window_moves: int | None
    shape = (1, 1)
    rollout = staticmethod(trajectory_rollout)

    @property
    def takes_both(self) -> bool:  # type: ignore[override]
        """With a window."""
        return self.grpo_window is not None

    def trained(self, cfg: SampleConfig, iteration: int = 0) -> SampleConfig:
        """The settings with the steps that an iteration trains."""
        if self.grpo_window is None:
            return cfg
        first, end = window_at(self.grpo_window, self.window_moves, cfg.last_branch, iteration)
        return replace(cfg, branch_start=first, branch_end=end)

    def term_states(self, cfg: SampleConfig) -> list[int]:
        """One state a transition; K trajectories."""
        return [1] * (cfg.num_candidates * self.trained(cfg).branching_steps)

    def collect(self, sampler: Sampler, batch: RolloutBatch | PairInputs) -> Experience:
        """Every trained transition of K trajectories of a prompt, with its trajectory's advantage."""
        assert isinstance(batch, RolloutBatch)
        cfg = self.trained(sampler.cfg, batch.iteration)
        if self.grpo_window is not None:
            sampler = with_window(sampler, cfg)
        walk = trajectory_rollout(sampler, batch)
        advantage = group_advantages(walk.scores, self.advantage_std == "global")
        e = trajectory_terms(walk, cfg, batch)
        return replace(e, advantage=advantage.flatten().repeat(cfg.branching_steps))

    def judged(self, e: Experience, scores: Tensor) -> Experience:
        """The advantages, divided by a deviation of everybody's scores if that is asked for."""
        return over_global_std(e, scores) if self.advantage_std == "global" else e
