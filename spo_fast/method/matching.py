"""Learning from finished pictures: samples of the probability flow are noised again, and their rewards weigh how well
the network undoes that. No step needs noise, a log-probability or guidance.

A moving average of the policy (the old policy) draws the samples, and the losses are against its predictions. Both
losses are the authors' for the velocity of a flow. With x0 = c x_t + d m they hold for whatever a network predicts.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from spo_fast.config.training import SampleConfig
from spo_fast.method.experience import Experience, Prediction, States, group_advantages, to_device
from spo_fast.method.noise import RENOISE
from spo_fast.method.objectives import Objective, Outputs, error_drop
from spo_fast.method.policy_gradients import clipped_surrogate, over_global_std
from spo_fast.method.protocols import Policy
from spo_fast.method.renoise import PairInputs
from spo_fast.method.rollout import RolloutBatch, Sampler, trajectory_rollout
from spo_fast.method.schedule import StepTable

DECAY_RISE, MOST_DECAY = 0.001, 0.5  # of the old policy: a step more, and at most
LEAST_ERROR = 1e-5


@dataclass(frozen=True, kw_only=True)
class ForwardProcess(Objective):
    """What NFT and AWM share: the samples, how they are noised, and whose predictions are compared with."""

    advantage_clip: float
    advantage_std: str
    kl_weight: float
    samples_from = "ema"
    ema_decay = 1.0  # it stands while an iteration's updates are made
    shape = (1, 1)
    transitions = False
    rollout = staticmethod(trajectory_rollout)

    def guided(self, cfg: SampleConfig) -> bool:
        """Never: the prompt's half alone."""
        return False

    def decay_after(self, steps: int) -> float:
        """Of the old policy at an iteration's end: min(.001 steps, .5), so that at first it is the policy."""
        return min(DECAY_RISE * steps, MOST_DECAY)

    def term_states(self, cfg: SampleConfig) -> list[int]:
        """Each of K samples at each of the trained steps' noise levels."""
        return [1] * (cfg.num_candidates * cfg.branching_steps)

    def collect(self, sampler: Sampler, batch: RolloutBatch | PairInputs) -> Experience:
        """The old policy's K samples of a prompt, noised to each trained step; x_prev is the sample itself."""
        assert isinstance(batch, RolloutBatch)
        with sampler.policy.ema():
            walk = trajectory_rollout(sampler, batch)
        cfg, x0, table = sampler.cfg, walk.x[-1], sampler.table  # (K, B, C, H, W)
        S, (K, B) = cfg.branching_steps, walk.scores.shape
        noise = batch.draws.normal(RENOISE, tuple(batch.latent_shape), count=S * K).to(x0.dtype)
        rows = torch.arange(cfg.first_branch, cfg.last_branch, device=x0.device).repeat_interleave(K * B)
        x0 = x0.flatten(0, 1).repeat(S, 1, 1, 1)  # (S K B, C, H, W)
        signal, sigma = (of[rows].to(x0.dtype).view(-1, 1, 1, 1) for of in (table.signal, table.noise))
        prompts = torch.arange(B, device=x0.device).repeat(S * K)
        own = torch.arange(S * K * B).view(-1, 1, 1)
        index = to_device(own, x0.device)
        return Experience(
            States(signal * x0 + sigma * noise, rows, prompts),
            x0[:, None, None],
            index,
            batch.cond,
            walk.scores.flatten(),
            advantage=group_advantages(walk.scores, self.advantage_std == "global").flatten().repeat(S),
            order=torch.arange(S * K, device=x0.device).repeat_interleave(B),
            read=(index, own),
        )

    def judged(self, e: Experience, scores: Tensor) -> Experience:
        """The advantages, divided by a deviation of everybody's scores if that is asked for."""
        return over_global_std(e, scores) if self.advantage_std == "global" else e

    def baselines(self, policy: Policy, outputs: Outputs, own: Outputs) -> dict[str, Prediction]:
        """The old policy's outputs by the training path, so that they are the policy's at first; the reference's if it
        weighs anything."""
        with policy.ema():
            found = {"frozen": own()}
        if self.kl_weight:
            with policy.reference():
                found["second_reference"] = outputs()
        return found

    def terms(self, m: Terms) -> tuple[Tensor, list[Tensor]]:
        """(N,) losses without the KL, and what `stats` names beside terms, kl and old_distance, (N,) each."""
        raise NotImplementedError

    def loss(
        self, m: Prediction, table: StepTable, e: Experience, cfg: SampleConfig, weight: float
    ) -> tuple[Tensor, Tensor]:
        """As `Objective.loss`: the terms, and kl_weight mean (m - m_ref)^2."""
        assert e.advantage is not None and e.frozen is not None, "collect and prepare the experience first"
        index, dtype = e.index.flatten(), e.states.x_t.dtype
        policy, old = (p.cond.to(dtype)[index] for p in (m, e.frozen))
        c, d = (v.to(dtype).view(-1, 1, 1, 1) for v in table.coefficients[e.states.rows[index], 2:4].T)
        advantage = e.advantage.clamp(-self.advantage_clip, self.advantage_clip) / self.advantage_clip
        given = Terms(policy, old, e.states.x_t[index], e.x_prev.flatten(0, 2), c, d, advantage.to(dtype))
        terms, told = self.terms(given)
        kl = torch.zeros_like(terms)
        if e.second_reference is not None:
            kl = mean_square(policy - e.second_reference.cond.to(dtype)[index])
        stats = torch.stack([torch.ones_like(kl), kl, mean_square(policy - old), *told]).detach().sum(1)
        return weight * (terms + self.kl_weight * kl).sum(), stats


@dataclass(frozen=True)
class Terms:
    """What a loss is made of, N terms each."""

    policy: Tensor  # (N, C, H, W) outputs, with gradient
    old: Tensor  # (N, C, H, W) of the old policy
    x_t: Tensor  # (N, C, H, W)
    x0: Tensor  # (N, C, H, W) the sample that was noised
    c: Tensor  # (N, 1, 1, 1) x0 = c x_t + d m
    d: Tensor
    advantage: Tensor  # (N,) in [-1, 1]


def mean_square(x: Tensor) -> Tensor:  # (N, C, H, W) -> (N,)
    """Over C, H, W."""
    return x.square().flatten(1).mean(1)


@dataclass(frozen=True, kw_only=True)
class NFT(ForwardProcess):
    """DiffusionNFT (arXiv 2509.16117): the policy's step from the old one is good as far as the reward r says, and the
    opposite step as far as it does not.

    m+ = beta m + (1 - beta) m_old, m- = (1 + beta) m_old - beta m; x+ and x- are what they make of x_t; their errors
    are divided by w = mean |x - x0|, at least 1e-5, without gradient. With r = 1/2 + A / 2 clip, |A| <= clip:
    clip (r mean((x+ - x0)^2 / w+) + (1 - r) mean((x- - x0)^2 / w-)) / beta + kl_weight mean (m - m_ref)^2.
    """

    beta: float
    stats = ("terms", "kl", "old_distance", "positive", "negative")

    def terms(self, m: Terms) -> tuple[Tensor, list[Tensor]]:
        """As ForwardProcess's; positive and negative are the two errors."""
        up = self.error(self.beta * m.policy + (1 - self.beta) * m.old, m)
        down = self.error((1 + self.beta) * m.old - self.beta * m.policy, m)
        r = 0.5 + m.advantage / 2
        return self.advantage_clip * (r * up + (1 - r) * down) / self.beta, [up, down]

    def error(self, output: Tensor, m: Terms) -> Tensor:  # (N, C, H, W) -> (N,)
        """Squared error of x0, over its mean size."""
        error = m.c * m.x_t + m.d * output - m.x0
        return mean_square(error) / error.detach().abs().flatten(1).mean(1).clamp_min(LEAST_ERROR)


@dataclass(frozen=True, kw_only=True)
class AWM(ForwardProcess):
    """Advantage weighted matching (arXiv 2509.25050): PPO's surrogate with the denoising loss for a log-probability.

    l = -mean (m - y)^2, y what the network should have said (of a flow noise - x0); r = exp(l - l_old);
    max(-A r, -A clamp(r, 1 +- awm_clip)) + kl_weight mean (m - m_ref)^2 + ema_weight mean (m - m_old)^2, with A in
    units of advantage_clip. The old policy takes the place of the code's moving average.
    """

    awm_clip: float
    ema_weight: float
    stats = ("terms", "kl", "old_distance", "ratio", "clamped")

    def terms(self, m: Terms) -> tuple[Tensor, list[Tensor]]:
        """As ForwardProcess's."""
        y = (m.x0 - m.c * m.x_t) / m.d
        ratio = error_drop(m.policy, m.old, y).exp()
        terms, outside = clipped_surrogate(ratio, m.advantage, self.awm_clip)
        return terms + self.ema_weight * mean_square(m.policy - m.old), [ratio, outside.to(ratio.dtype)]
