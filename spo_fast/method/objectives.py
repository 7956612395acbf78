"""The objectives, side by side. Each collects experience, prepares its baseline, and turns predictions into a loss.

An objective is a frozen dataclass whose fields are its settings; what else is known of a method stands in its record
(config/methods.py), defaults too. `loss` sees unique
states (U) and indices (N, K, S) into them, so that a state shared by winner and loser costs one forward and one
backward. Every loss is a weighted sum over its N terms, and comes with sums of the objective's `stats`.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from spo_fast.config.methods import find_method
from spo_fast.config.training import ObjectiveConfig, SampleConfig
from spo_fast.method.experience import Experience, Prediction, Rows, States, to_device
from spo_fast.method.noise import SIDES, STEPS
from spo_fast.method.protocols import Policy
from spo_fast.method.renoise import PairInputs, renoised_pairs
from spo_fast.method.rollout import (
    RolloutBatch,
    Sampler,
    Segments,
    Trajectories,
    branching_rollout,
    rollout_segments,
    segments,
    trajectory_rollout,
)
from spo_fast.method.schedule import StepTable
from spo_fast.ops.guidance import guided
from spo_fast.ops.log_ratio import log_ratio
from spo_fast.ops.preference_loss import STATS, preference_loss

Batches = Callable[[], Sequence[Rows]]
Outputs = Callable[[], Prediction]
ScoredRollout = Callable[[Sampler, RolloutBatch], Segments | Trajectories]

# ---------------------------------------------------------------------------------------------------- what all share


def predict_states(
    policy: Policy, table: StepTable, experience: Experience, states: States, guided: bool
) -> Prediction:
    """One UNet call on a batch of states, each with its own timestep and prompt."""
    t = table.timesteps[states.rows]
    return policy.predict(states.x_t, t, experience.cond.select(states.prompts), guided)


@torch.no_grad()
def frozen_predictions(
    policy: Policy, table: StepTable, experience: Experience, guided: bool, states_per_forward: int | None
) -> Prediction:
    """The network's outputs on every state of the experience, in batches without gradient."""
    states = experience.states
    size = states_per_forward or max(len(states), 1)
    cut = (states.select(slice(i, i + size)) for i in range(0, len(states), size))
    parts = [predict_states(policy, table, experience, some, guided) for some in cut]
    if not parts:
        empty = states.x_t.to(policy.dtype)
        return Prediction(empty, empty if guided else None)
    return Prediction.cat(parts)


@torch.no_grad()
def predictions_by_term(
    policy: Policy, table: StepTable, experience: Experience, guided: bool, batches: Sequence[Rows]
) -> Prediction:
    """The same, in the very batches of terms that will be trained: then nothing differs, not even by rounding."""
    if not batches:
        return frozen_predictions(policy, table, experience, guided, None)
    used = [to_device(experience.host_index[terms].unique(), experience.x_prev.device) for terms in batches]
    parts = [predict_states(policy, table, experience, experience.states.select(index), guided) for index in used]
    return Prediction.cat(parts).select(torch.cat(used).argsort())


def error_drop(m: Tensor, reference: Tensor, y: Tensor) -> Tensor:  # (T, C, H, W) each -> (T,)
    """|reference - y|^2 - |m - y|^2, mean over C, H, W: how much nearer to y than the reference m is.

    As a product: a difference of two large squares would lose what training changes.
    """
    return ((reference - m) * (reference + m - 2 * y)).flatten(1).mean(1)


def uniform_weights(like: Tensor, count: int, weight: float) -> Tensor:  # (N,)
    """Each of `count` terms' weight in the loss, in the terms' own dtype."""
    return torch.full((count,), weight, device=like.device, dtype=like.dtype)


class Objective:
    """What an objective is to the trainer. Subclasses are frozen dataclasses, and say what differs."""

    stats: ClassVar[tuple[str, ...]] = STATS
    """What each entry of the statistics sums over the terms."""
    samples_from: ClassVar[str] = "policy"
    """Whose samples it learns from: the policy's, its moving average's (ema), or the pairs of a data set (data)."""
    judges: ClassVar[str | None] = None
    """What its scorer must judge (experience.judges); None: whatever it does."""
    shape: tuple[int, int] = (2, 1)
    """K sides, S transitions of a term."""
    ema_decay: float
    """Of the moving average, if the samples are from it."""
    clip: float | None = None
    """Half the width of the ratio's clamp; None: no clamp."""
    rollout: ScoredRollout | None = staticmethod(rollout_segments)
    """The part of `collect` that costs something; None without a rollout."""
    transitions: ClassVar[bool] = True
    """Its terms are recorded transitions, which have log-probabilities; else it learns from clean latents noised."""
    takes_both: bool = False
    """Its rollouts take steps without noise too (Sampler.ode)."""

    def guided(self, cfg: SampleConfig) -> bool:
        """Whether the unconditional half is evaluated in training."""
        return cfg.guidance_scale > 1

    def sampling(self, cfg: SampleConfig) -> SampleConfig:
        """The rollout's settings."""
        return cfg

    def term_states(self, cfg: SampleConfig) -> list[int]:
        """Most UNet states of each term of one prompt, in the rollout's order, if every pair is kept."""
        # both sides of a pair share their x_t in a segment's first step only
        return [2 - (i == first) for first, end in segments(self.sampling(cfg)) for i in range(first, end)]

    def collect(self, sampler: Sampler, batch: RolloutBatch | PairInputs) -> Experience:
        """The iteration's terms; the batch is one of PairInputs for a sampler of data."""
        raise NotImplementedError

    def decay_after(self, steps: int) -> float | None:
        """Of the moving average at an iteration's end, after so many optimizer steps; None: it moves with each step."""
        return None

    def judged(self, e: Experience, scores: Tensor) -> Experience:
        """The experience of this process, told the scores of all; scores: (J K B,)."""
        return e

    def prepare(
        self,
        policy: Policy,
        table: StepTable,
        experience: Experience,
        cfg: SampleConfig,
        states_per_forward: int | None,
        batches: Batches | None = None,  # terms that will be trained together
    ) -> Experience:
        """The experience with its baselines."""
        arguments = (policy, table, experience, self.guided(cfg))
        outputs = functools.partial(frozen_predictions, *arguments, states_per_forward)
        own = outputs if batches is None else lambda: predictions_by_term(*arguments, batches())
        found = self.baselines(policy, outputs, own)
        return replace(experience, frozen=found.get("frozen"), second_reference=found.get("second_reference"))

    def baselines(self, policy: Policy, outputs: Outputs, own: Outputs) -> dict[str, Prediction]:
        """What `loss` compares the policy with: frozen, and second_reference if it needs two.

        outputs: the network's on every state, at a convenient batch size; own: in the batches of the training.
        """
        with policy.reference():
            return {"frozen": outputs()}

    def loss(
        self,
        m: Prediction,  # the policy's outputs on the U states, with gradient
        table: StepTable,
        e: Experience,  # N terms
        cfg: SampleConfig,
        weight: float,  # of each term
    ) -> tuple[Tensor, Tensor]:
        """The weighted sum of the terms' losses (), and sums of the statistics over the terms (len(self.stats),)."""
        raise NotImplementedError


def log_ratios(m: Prediction, table: StepTable, e: Experience, cfg: SampleConfig) -> Tensor:  # (N, K, S)
    """log p(x_{t-1} | x_t) of the policy minus that of the frozen network, means over C, H, W."""
    assert e.frozen is not None, "prepare the experience first"
    states = (e.states.x_t, e.x_prev.flatten(0, 2), e.index.flatten(), e.states.rows)
    ratio, _ = log_ratio(*m, *e.frozen, *states, table.coefficients, cfg.guidance_scale)
    return ratio.view(e.index.shape)


# ---------------------------------------------------------------------------------------------------- pairs of steps


@dataclass(frozen=True, kw_only=True)
class SPO(Objective):
    """Step-by-step preference optimisation (arXiv 2406.04314): the best and the worst of K candidates of one x_t.

    log r = log p_policy(x_{t-1} | x_t) - log p_ref(x_{t-1} | x_t), means over C, H, W; the loss is
    -log sigmoid(beta (log r_w - log r_l)), r clamped to [1 - clip, 1 + clip]. The paper sums over C, H, W and does not
    clamp; this follows the published code (train_spo.py 535-586), so the paper's beta is beta / (C H W).
    """

    beta: float
    clip: float | None

    def collect(self, sampler: Sampler, batch: RolloutBatch | PairInputs) -> Experience:
        """Terms of the pairs that a branching rollout kept."""
        assert isinstance(batch, RolloutBatch)
        return branching_rollout(replace(sampler, cfg=self.sampling(sampler.cfg)), batch)

    def loss(
        self, m: Prediction, table: StepTable, e: Experience, cfg: SampleConfig, weight: float
    ) -> tuple[Tensor, Tensor]:
        """As `Objective.loss`, of the clamped ratios."""
        ratios = log_ratios(m, table, e, cfg)
        return preference_loss(ratios, uniform_weights(ratios, len(e), weight), self.beta, self.clip)


class MSPO(SPO):
    """SPO with inner steps (the published SDXL runs): one comparison labels every transition of a segment.

    Each transition is its own term and is permuted singly, as published. Only a segment's first transition shares x_t
    between the sides.
    """


class D3PO(SPO):
    """D3PO (arXiv 2311.13231): whole trajectories from one x_T are compared by their ends; each step is a term.

    It is MSPO with one segment from branch_start to the end. scripts/rm/train_d3po.py, whose loss is SPO's. Where the
    last steps are not trained (they add no noise) the trajectories still go to their ends.
    """

    def sampling(self, cfg: SampleConfig) -> SampleConfig:
        """One segment: all steps are inner ones."""
        return replace(cfg, num_inner_steps=cfg.num_steps, branch_end=None)

    def term_states(self, cfg: SampleConfig) -> list[int]:
        """Of the steps that are trained."""
        return super().term_states(cfg)[: cfg.branching_steps]

    def collect(self, sampler: Sampler, batch: RolloutBatch | PairInputs) -> Experience:
        """Terms of whole trajectories' trained steps."""
        assert isinstance(batch, RolloutBatch)
        walk = rollout_segments(replace(sampler, cfg=self.sampling(sampler.cfg)), batch)
        return walk.first(sampler.cfg.branching_steps).compact(batch.cond)


class LPO(SPO):
    """Latent preference optimisation (arXiv 2502.01051): SPO whose scorer judges the children x_{t-1} themselves.

    No x0, no VAE, and the UNet sees one child a prompt: the scorer is asked before it (rollout.py).
    """

    judges = "children"


@dataclass(frozen=True, kw_only=True)
class GradSPO(SPO):
    """GradSPO (NeurIPS 2025): a regression to a noise target shifted along the reward takes the log-ratio's place.

    y = m_ema -+ s sqrt(1 - alphabar_t) (z_w - z_l) / 2, upper sign for the winner; r = |m_ref - y|^2 - |m - y|^2. The
    children's noise is not stored: z_w - z_l = (x_w - x_l) / std, as they share x_t. An EMA of the policy collects.

    The paper's target, which is the published SD-1.5 code's; the published SDXL code takes each side's own z. That code
    evaluates m_ema after every optimizer step, here it is the average that collected: r_w - r_l = 2 <m - m_ref,
    y_w - y_l> does not depend on m_ema, only where the clamp begins does.
    """

    guidance_step: float
    ema_decay: float
    samples_from = "ema"

    def collect(self, sampler: Sampler, batch: RolloutBatch | PairInputs) -> Experience:
        """SPO's, by the moving average."""
        with sampler.policy.ema():
            return super().collect(sampler, batch)

    def baselines(self, policy: Policy, outputs: Outputs, own: Outputs) -> dict[str, Prediction]:
        """The reference, and the moving average as second_reference."""
        with policy.ema():
            second = outputs()
        return {**super().baselines(policy, outputs, own), "second_reference": second}

    def loss(
        self, m: Prediction, table: StepTable, e: Experience, cfg: SampleConfig, weight: float
    ) -> tuple[Tensor, Tensor]:
        """As `Objective.loss`, of differences of squared errors."""
        assert e.frozen is not None and e.second_reference is not None
        dtype, index = e.states.x_t.dtype, e.index[:, 0, 0]
        rows = e.states.rows[index]
        signal, noise, (d, std) = table.signal[rows], table.noise[rows], table.coefficients[rows, 3:].T
        # as noise, up to a term in x_t that all three share: d m = dx0 = -(noise / signal) depsilon
        to_noise = (-d * signal / noise).to(dtype).view(-1, 1, 1, 1)
        outputs = (guided(*p, cfg.guidance_scale, dtype) for p in (m, e.frozen, e.second_reference))
        policy, reference, ema = (to_noise * output[index] for output in outputs)
        reach = (self.guidance_step * noise / std / 2).to(dtype).view(-1, 1, 1, 1)
        shift = reach * (e.x_prev[:, 0, 0] - e.x_prev[:, 1, 0])
        r = torch.stack([error_drop(policy, reference, ema - sign * shift) for sign in (1, -1)], dim=1)
        return preference_loss(r.unsqueeze(-1), uniform_weights(r, len(e), weight), self.beta, self.clip)


# ---------------------------------------------------------------------------------------------------- trajectories


def trajectory_terms(walk: Trajectories, cfg: SampleConfig, batch: RolloutBatch) -> Experience:
    """Each transition of the trained steps as a term of its own (K = S = 1): term and state (s K + k) B + b."""
    first, end = cfg.first_branch, cfg.last_branch
    S, (_, K, B), device = end - first, walk.x.shape[:3], walk.x.device
    rows = torch.arange(first, end, device=device).repeat_interleave(K * B)
    states = States(walk.x[first:end].flatten(0, 2), rows, torch.arange(B, device=device).repeat(S * K))
    x_prev = walk.x[first + 1 : end + 1].flatten(0, 2)[:, None, None]
    own = torch.arange(S * K * B).view(-1, 1, 1)
    order = torch.arange(S * K, device=device).repeat_interleave(B)
    index = to_device(own, device)
    return Experience(states, x_prev, index, batch.cond, walk.scores.flatten(), order=order, read=(index, own))


@dataclass(frozen=True, kw_only=True)
class DenseReward(SPO):
    """DenseReward (arXiv 2402.08265): ListMLE over trajectories of a prompt, early steps weighing more.

    A term: num_ranked of the prompt's K trajectories, best first, and num_sampled_steps steps drawn with weights
    gamma^i, i = 0 the noisiest, the same for all of them; logit = beta mean_s clamp(log r_s), and SPO's loss on it.
    A prompt gives terms_per_prompt terms of each rollout: the published replay buffer holds exactly one rollout of 1000
    prompts, from which it draws 10 times as many terms.
    """

    gamma: float
    num_ranked: int
    num_sampled_steps: int
    terms_per_prompt: int
    rollout = staticmethod(trajectory_rollout)

    @property
    def shape(self) -> tuple[int, int]:  # type: ignore[override]
        """num_ranked sides, num_sampled_steps transitions."""
        return self.num_ranked, self.num_sampled_steps

    def term_states(self, cfg: SampleConfig) -> list[int]:
        """No two transitions of a term share a state."""
        return [self.num_ranked * self.num_sampled_steps] * self.terms_per_prompt

    def collect(self, sampler: Sampler, batch: RolloutBatch | PairInputs) -> Experience:
        """Terms drawn among all trajectories of a prompt and their steps, best trajectory first."""
        assert isinstance(batch, RolloutBatch)
        walk, cfg = trajectory_rollout(sampler, batch), sampler.cfg
        every, (K, B) = trajectory_terms(walk, cfg, batch), walk.scores.shape
        D, (_, S), device = self.terms_per_prompt, self.shape, walk.x.device
        # a random subset: the first of a random order, then the best of it first
        order = batch.draws.integer(SIDES, 2**30, D * K).view(D, K, B).argsort(1)[:, : self.num_ranked]
        scores = walk.scores.expand(D, K, B).gather(1, order)
        order = order.gather(1, scores.argsort(dim=1, descending=True, stable=True))  # (D, num_ranked, B)
        weights = self.gamma ** torch.arange(cfg.branching_steps, device=device, dtype=torch.float64)
        u = batch.draws.integer(STEPS, 2**30, D * S).view(D, 1, S, B).double() / 2**30
        steps = torch.searchsorted((weights.cumsum(0) / weights.sum())[:-1], u, right=True)
        index = (steps * K + order.unsqueeze(2)) * B + torch.arange(B, device=device)  # (D, num_ranked, S, B)
        index = index.permute(0, 3, 1, 2).flatten(0, 1)  # (D B, num_ranked, S)
        drawn = torch.arange(D, device=device).repeat_interleave(B)
        return replace(every, x_prev=every.x_prev[index, 0, 0], index=index, order=drawn).select(slice(None))


# ---------------------------------------------------------------------------------------------------- labelled pairs


@dataclass(frozen=True, kw_only=True)
class DiffusionDPO(Objective):
    """Diffusion-DPO (arXiv 2311.12908): the two images of a labelled pair, noised alike, without guidance.

    -log sigmoid(-(beta / 2) [(|e - e_p(x_w)|^2 - |e - e_r(x_w)|^2) - (the same of x_l)]), errors as means over C, H, W
    (train.py of the published code: no factor T beside beta = 5000).
    """

    beta: float
    prompt_dropout: float  # read where pairs are (training/pair_batches.py)
    samples_from = "data"
    transitions = False
    rollout = None

    def guided(self, cfg: SampleConfig) -> bool:
        """Never: the prompt's half alone."""
        return False

    def term_states(self, cfg: SampleConfig) -> list[int]:
        """Both images of a pair."""
        return [2]

    def collect(self, sampler: Sampler, batch: RolloutBatch | PairInputs) -> Experience:
        """The pairs re-noised, a term each; nothing is drawn or scored."""
        assert isinstance(batch, PairInputs)
        return renoised_pairs(sampler.table, batch)

    def sides(self, m: Prediction, e: Experience) -> Tensor:  # (N, 2)
        """What is compared: how much nearer to the noise than the reference the policy is."""
        assert e.frozen is not None, "prepare the experience first"
        dtype, index = e.states.x_t.dtype, e.index.flatten()
        policy, reference = (p.cond.to(dtype)[index] for p in (m, e.frozen))
        return error_drop(policy, reference, e.x_prev.flatten(0, 2)).view(-1, 2)

    def loss(
        self, m: Prediction, table: StepTable, e: Experience, cfg: SampleConfig, weight: float
    ) -> tuple[Tensor, Tensor]:
        """As `Objective.loss`, of the two sides at beta / 2."""
        sides = self.sides(m, e)
        return preference_loss(sides.unsqueeze(-1), uniform_weights(sides, len(e), weight), self.beta / 2, None)


@dataclass(frozen=True, kw_only=True)
class MaPO(DiffusionDPO):
    """MaPO (arXiv 2406.06424): no reference. l is the denoising error, f(l) = .5 l / (exp(.5 l) - 1):
    l_w - beta logsigmoid(1000 (f(l_w) - f(l_l))).
    """

    scale: ClassVar[float] = 1000.0  # the number of timesteps

    def baselines(self, policy: Policy, outputs: Outputs, own: Outputs) -> dict[str, Prediction]:
        """None."""
        return {}

    def errors(self, m: Prediction, e: Experience) -> Tensor:  # (N, 2) l
        """The denoising errors, means over C, H, W."""
        difference = m.cond.to(e.x_prev.dtype)[e.index.flatten()] - e.x_prev.flatten(0, 2)
        return difference.square().flatten(1).mean(1).view(-1, 2)

    def sides(self, m: Prediction, e: Experience) -> Tensor:  # (N, 2) f(l)
        """What is compared."""
        half = self.errors(m, e) / 2
        return half / torch.expm1(half)

    def loss(
        self, m: Prediction, table: StepTable, e: Experience, cfg: SampleConfig, weight: float
    ) -> tuple[Tensor, Tensor]:
        """As `Objective.loss`; the margin has weight beta beside the winner's error."""
        sides = self.sides(m, e)
        weights = uniform_weights(sides, len(e), self.beta * weight)
        margin, stats = preference_loss(sides.unsqueeze(-1), weights, self.scale, None)
        return weight * self.errors(m, e)[:, 0].sum() + margin, stats


def make_objective(cfg: ObjectiveConfig) -> Objective:
    """The method's objective, its fields filled from the settings of the same names."""
    record = find_method(cfg.method)
    kind = record.kind()
    return kind(**{field.name: getattr(cfg, field.name) for field in dataclasses.fields(kind)})
