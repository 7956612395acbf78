"""The loop: collect experience, evaluate the frozen networks on it, update the policy. The parts come from setup.py."""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from spo_fast.config.errors import RunError
from spo_fast.config.training import Config, SampleConfig
from spo_fast.scorers.base import InPhase
from spo_fast.scorers.function import PictureFunction
from spo_fast.training import batches, diagnosis, outputs
from spo_fast.training.monitor.timer import Timer
from spo_fast.training.monitor.warnings import Watch
from spo_fast.training.plan.fit_memory import is_out_of_memory, out_of_memory
from spo_fast.training.rebalance import rebalance, whole_scores
from spo_fast.training.rollout_statistics import Saturation, of_scores
from spo_fast.training.scorer import with_scorer
from spo_fast.training.setup import Parts
from spo_fast.training.signals import Stopped


class Run(Parts):
    """One run of preference optimisation."""

    after_iteration: Callable[[int], None] = staticmethod(lambda iteration: None)
    """Called with each iteration's number once its updates are done; may lower `total`."""

    def train(self) -> Path:
        """From the first or the resumed iteration to the last; returns the run directory."""
        timer = Timer(self.device)
        try:
            with self.stop:
                self._train(timer)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            raise RunError(out_of_memory(self.cfg, timer.phase, self.found, self.model.resolved)) from error
        finally:
            self.group.leave()
        return self.run_dir

    def _train(self, timer: Timer) -> None:
        outputs.announce(self)
        with timer("encode prompts"):
            batches.encode_prompts(self)
        reading = contextlib.closing(self.pairs) if self.pairs is not None else contextlib.nullcontext()
        with self.start(Watch(self.cfg).look) as log, reading:
            if log is not None:
                with timer("validate"):
                    self.validator.before_training(log, self.resume is not None, self.state.iteration)
            timer.read_ms()  # the first iteration's record has its own times only
            with outputs.Monitor(self, log, timer) as monitor:
                finished = self._loop(monitor, timer)
        if finished:
            outputs.finish(self)
        else:
            self.stopped()
        self.group.any(False)

    def _loop(self, monitor: outputs.Monitor, timer: Timer) -> bool:
        """False if the run was asked to stop before its end."""
        while (iteration := self.state.iteration) < self.total:
            before = copy.deepcopy(self.state)
            record = self.iterate(iteration, timer)
            if record is None:
                self.state = before
                return False
            self.after_iteration(iteration)
            self.state.iteration += 1
            self.learner.check_weights()
            monitor.write(iteration, record)
            diagnosis.raise_if_nonfinite(self, bool(record["pairs"]))
            if self.due(self.cfg.run.checkpointing_steps):
                diagnosis.check_agreement(self)
                with timer("save"):
                    self.save()
            if self.group.any(bool(self.stop.signal)):  # where all wait for process 0's files
                return self.done
        return True

    def iterate(self, iteration: int, timer: Timer) -> dict[str, object] | None:
        """One iteration: experience, frozen networks, updates. Returns what to log; None if the run is to stop."""
        cfg, sample, objective, state = self.cfg, self.cfg.sample, self.objective, self.state
        decode = Saturation(self.decode)
        score = InPhase(self.scorer, functools.partial(self.score_phase, timer))  # decoding included
        with contextlib.suppress(Stopped), timer("rollout"), self.rollout_weights(sample, iteration):
            inputs = batches.inputs(self, iteration)
            experience = objective.collect(replace(self.sampler, scorer=score, decode=decode), inputs.batch)
        if self.group.any(bool(self.stop.signal)):
            return None
        scores = whole_scores(experience.scores, inputs.prompts, self.group)
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
        if iteration == 0 and self.learner.deviations is not None:
            print(diagnosis.start_text(self.learner.deviations))
        if total == 0 and not scores.isfinite().all():
            state.nonfinite_in_a_row += 1
        return {
            "epoch": inputs.epoch,
            **of_scores(scores, sample.num_candidates, inputs.total),
            "pairs": total,
            "valid_share": total / (inputs.total * len(objective.term_states(sample))),
            "states": self.group.total(len(experience.states)),
            "images": scores.numel(),
            **decode.record(self.group, inputs.prompts),
            **skipped_segments,
            **rounded,
            **learned,
            "optimizer_steps": state.optimizer_steps,
            "skipped_steps": state.skipped_steps,
            "nonfinite_steps": state.skipped_steps - dropped,
        }

    def rollout_weights(self, sample: SampleConfig, iteration: int) -> contextlib.AbstractContextManager[None]:
        """Inside, the policy's weights are those that `iteration`'s rollout uses."""
        merged = sample.rollout_weights == "merged"
        return self.policy.merged(self.cfg.run.seed, iteration) if merged else contextlib.nullcontext()

    def score_phase(self, timer: Timer) -> contextlib.AbstractContextManager[None]:
        """A judgement is a safe point: nothing has changed yet in this iteration."""
        self.stop.safe_point()
        return timer("score")


def train(cfg: Config, scorer: PictureFunction | None = None) -> Path:
    """Train as cfg says; returns the run directory, which holds the LoRA, checkpoints, metrics and sample grids.

    scorer: a function of your own, pictures (N, 3, H, W) in [0, 1] and N prompts -> N numbers, in place of cfg's.
    """
    return Run(cfg if scorer is None else with_scorer(cfg, scorer)).train()
