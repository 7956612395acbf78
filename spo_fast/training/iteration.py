"""One iteration: collect experience, evaluate the frozen networks on it, update the policy.

The run iterates on its networks, a prediction of what that costs (plan/) on networks without weights.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from spo_fast.method.rollout import Sampler
from spo_fast.scorers.base import InPhase
from spo_fast.scorers.weighted import Normalised, WeightedSum
from spo_fast.training import batches, diagnosis
from spo_fast.training.rebalance import rebalance, whole_scores
from spo_fast.training.rollout_statistics import Pictures, of_scores
from spo_fast.training.signals import Stopped

if TYPE_CHECKING:
    from spo_fast.config.training import Config, SampleConfig
    from spo_fast.data.prompt_order import PromptSampler
    from spo_fast.method.objectives import Objective
    from spo_fast.method.protocols import Decode
    from spo_fast.method.schedule import StepTable
    from spo_fast.models.diffusion import DiffusionModel
    from spo_fast.models.policy import Policy
    from spo_fast.scorers.base import Scorer
    from spo_fast.training.checkpoint import TrainState
    from spo_fast.training.learner import Learner
    from spo_fast.training.pair_batches import PairReader
    from spo_fast.training.processes import Group
    from spo_fast.training.signals import StopRequest

Timer = Callable[[str], AbstractContextManager[None]]
"""phase -> a context: the clock of monitor/timer.py, or what counts bytes."""


class Iterates:
    """What an iteration needs, and the iteration."""

    cfg: Config
    device: torch.device
    model: DiffusionModel
    policy: Policy
    objective: Objective
    table: StepTable
    scorer: Scorer
    decode: Decode
    learner: Learner
    state: TrainState
    group: Group
    stop: StopRequest
    prompts: list[str]
    prompt_order: PromptSampler
    pairs: PairReader | None = None
    """Of a method that trains on labelled pairs."""

    def make_table(self) -> StepTable:
        """The rollout's steps; of labelled pairs, which are noised to any timestep, all of them."""
        sample = self.cfg.sample
        if self.objective.samples_from == "data":
            return self.model.full_table()
        if not self.objective.transitions:
            return self.ode_table
        return self.model.table(sample.num_steps, sample.eta, sample.sampler)

    @functools.cached_property
    def ode_table(self) -> StepTable:
        """The rollout's steps without noise."""
        sample = self.cfg.sample
        return self.model.table(sample.num_steps, 0.0, sample.sampler)

    @property
    def sampler(self) -> Sampler:
        """Draws from the policy as it is trained, decodes and judges."""
        cfg = self.cfg
        chunk, ode = cfg.model.images_per_decode, self.ode_table if self.objective.takes_both else None
        return Sampler(self.policy, self.table, self.scorer, self.decode, cfg.sample, chunk, ode)

    def iterate(self, iteration: int, timer: Timer) -> dict[str, object] | None:
        """One iteration: experience, frozen networks, updates. Returns what to log; None if the run is to stop."""
        cfg, sample, objective, state = self.cfg, self.cfg.sample, self.objective, self.state
        decode = Pictures(self.decode)
        normalised = None
        if cfg.scorer.normalise_scorers and objective.rollout is not None:
            assert isinstance(self.scorer, WeightedSum)  # make_scorer's, even of one
            normalised = Normalised(self.scorer)
        score = InPhase(normalised or self.scorer, functools.partial(self.score_phase, timer))  # decoding included
        with contextlib.suppress(Stopped), timer("rollout"), self.rollout_weights(sample, iteration):
            inputs = batches.inputs(self, iteration)
            experience = objective.collect(replace(self.sampler, scorer=score, decode=decode), inputs.batch)
        if self.group.any(bool(self.stop.signal)):
            return None
        scores = compared = whole_scores(experience.scores, inputs.prompts, self.group)
        experience = objective.judged(experience, compared)
        if normalised is not None:  # what is logged has a scale
            scores = whole_scores(torch.cat(normalised.raw), inputs.prompts, self.group)
        slots = functools.partial(self.learner.slot_terms, state=state)
        experience, total, rows = rebalance(experience, inputs.prompts, self.group, cfg.run.seed, iteration, slots)
        skipped_segments = batches.count_comparisons(self, inputs, rows)
        with timer("reference"):
            trained_together = functools.partial(self.learner.batches, experience, total, state)
            most = cfg.optim.states_at_once
            experience = objective.prepare(self.policy, self.table, experience, sample, most, trained_together)
            rounded = diagnosis.measure_base(self, iteration, experience)
        dropped = state.skipped_steps
        learned = self.learner.update(experience, state, timer, total)
        self.policy.graphs.waits = False
        if iteration == 0 and self.learner.deviations is not None and self.group.main:
            print(diagnosis.start_text(self.learner.deviations))
        if total == 0 and not scores.isfinite().all():
            state.nonfinite_in_a_row += 1
        return {
            "epoch": inputs.epoch,
            **of_scores(scores, compared, sample.num_candidates, inputs.total),
            "pairs": total,
            "valid_share": total / (inputs.total * len(objective.term_states(sample))),
            "states": self.group.total(len(experience.states)),
            "images": scores.numel(),
            **decode.record(self.group, inputs.prompts, sample.num_candidates),
            **skipped_segments,
            **rounded,
            **learned,
            "optimizer_steps": state.optimizer_steps,
            "skipped_steps": state.skipped_steps,
            "nonfinite_steps": state.skipped_steps - dropped,
        }

    def rollout_weights(self, sample: SampleConfig, iteration: int) -> AbstractContextManager[None]:
        """Inside, the policy's weights are those that `iteration`'s rollout uses."""
        merged = sample.rollout_weights == "merged"
        return self.policy.merged(self.cfg.run.seed, iteration) if merged else contextlib.nullcontext()

    def score_phase(self, timer: Timer) -> AbstractContextManager[None]:
        """A judgement is a safe point: nothing has changed yet in this iteration."""
        self.stop.safe_point()
        return timer("score")
