"""The loop around iterations (iteration.py): when to validate, log, save and stop. The parts come from setup.py."""

from __future__ import annotations

import contextlib
import copy
import time
from collections.abc import Callable
from pathlib import Path

from spo_fast.config.errors import RunError
from spo_fast.config.training import Config
from spo_fast.scorers.function import PictureFunction
from spo_fast.training import batches, diagnosis, opening, outputs
from spo_fast.training.monitor.timer import Timer
from spo_fast.training.monitor.warnings import Watch
from spo_fast.training.plan.fit_memory import is_out_of_memory, out_of_memory
from spo_fast.training.scorer import with_scorer
from spo_fast.training.setup import Parts
from spo_fast.training.sizes import check_sizes, size_of


class Run(Parts):
    """One run of preference optimisation."""

    after_iteration: Callable[[int], None] = staticmethod(lambda iteration: None)
    """Called with each iteration's number once its updates are done; may lower `total`."""

    def train(self) -> Path:
        """From the first or the resumed iteration to the last; returns the run directory."""
        timer = Timer(self.device)
        try:
            with self.held, self.stop:
                self._train(timer)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            raise RunError(out_of_memory(self.cfg, timer.phase, self.found, self.model.resolved)) from error
        finally:
            self.group.leave()
        return self.run_dir

    def _train(self, timer: Timer) -> None:
        check_sizes(self.cfg, self.model)
        if self.group.main:
            opening.announce(self)
        with timer("encode prompts"):
            batches.encode_first(self)
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

    def is_out_of_time(self) -> bool:
        """Whether max_train_minutes have passed; process 0 decides it and says so."""
        minutes = self.cfg.run.max_train_minutes
        if minutes is None or self.done or not self.group.main or time.monotonic() - self.began < 60 * minutes:
            return False
        print(f"max_train_minutes={minutes:g} have passed: the run ends after {self.state.iteration} iterations")
        return True

    def ends_early(self) -> bool:
        """Whether the held-out scores end the run before its last iteration, as a finished one; process 0 decides it
        and says why."""
        stop = self.validator.held_out.stop
        if self.done or not self.group.main or not stop:
            return False
        print(f"ends early, after {self.state.iteration} iterations: {stop}")
        return True

    def _loop(self, monitor: outputs.Monitor, timer: Timer) -> bool:
        """False if the run was asked to stop before its end."""
        self.began = time.monotonic()
        while (iteration := self.state.iteration) < self.total:
            batches.encode_ahead(self, iteration, timer)
            before = copy.deepcopy(self.state)
            with size_of(self, iteration) as size:
                record = self.iterate(iteration, timer)
            if record is None:
                self.state = before
                return False
            self.after_iteration(iteration)
            self.state.iteration += 1
            self.learner.check_weights()
            if self.group.any(self.is_out_of_time()):  # before it is written: what ends is validated
                self.total = self.state.iteration
            monitor.write(iteration, record | size)
            diagnosis.raise_if_nonfinite(self, bool(record["pairs"]))
            if self.group.any(self.ends_early()):
                self.total = self.state.iteration
            if self.due(self.cfg.run.checkpointing_steps):
                diagnosis.check_agreement(self)
                with timer("save"):
                    self.save()
            if self.group.any(bool(self.stop.signal)):  # where all wait for process 0's files
                return self.done
        return True


def train(cfg: Config, scorer: PictureFunction | None = None) -> Path:
    """Train as cfg says; returns the run directory, which holds the LoRA, checkpoints, metrics and sample grids.

    scorer: a function of your own, pictures (N, 3, H, W) in [0, 1] and N prompts -> N numbers, in place of cfg's.
    """
    return Run(cfg if scorer is None else with_scorer(cfg, scorer)).train()
