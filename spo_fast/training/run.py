"""What every trainer's run does with its settings, its directory, its checkpoints and its log."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Generic, TypeVar

import torch
import yaml

from spo_fast.config.preference import PreferenceConfig
from spo_fast.config.training import Config
from spo_fast.data import files
from spo_fast.evaluation.pages.history import History
from spo_fast.evaluation.pages.run_record import read_metrics
from spo_fast.evaluation.pages.run_report import write_report
from spo_fast.models.device import pick_device
from spo_fast.models.diffusion import DiffusionModel
from spo_fast.training import checkpoint, processes, run_directory
from spo_fast.training.checkpoint import TrainState
from spo_fast.training.monitor.gpu import gpu_stats
from spo_fast.training.monitor.log import MetricsLog, Record
from spo_fast.training.optimizer import WeightUpdates
from spo_fast.training.signals import StopRequest

C = TypeVar("C", Config, PreferenceConfig)


class TrainingRun(Generic[C]):
    """What every trainer's run does with its settings, its directory, its checkpoints and its log."""

    model: DiffusionModel
    learner: WeightUpdates
    total: int  # iterations

    def __init__(self, cfg: C):
        self.device = pick_device(processes.own_device(cfg.run.device))
        self.group = processes.join(self.device)
        self.stop = StopRequest(cfg.run.stop_seconds)
        self.cfg: C = cfg
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = cfg.model.allow_tf32
        self.run_dir = Path(cfg.run.output_dir)
        found = run_directory.find(self.run_dir, cfg.run.resume_from_checkpoint) if self.group.main else None
        self.resume: Path | None = self.group.from_main(found)
        self.state = TrainState()
        self.history = History()

    def settings(self) -> dict[str, object]:
        """As a checkpoint keeps them; prompt_cache names what the prompts' embeddings come from."""
        return {**self.cfg.flat(), "prompt_cache": self.model.prompt_cache.fingerprint}

    def lock(self) -> None:
        """The run directory is this run's from now on, until it has trained."""
        self.held = contextlib.ExitStack()
        if self.group.main:
            self.held.enter_context(files.lock(self.run_dir))

    def gpu_stats(self) -> dict[str, float]:
        """Of its GPU now, as far as it has one that tells."""
        return gpu_stats(self.device.index or 0) if self.device.type == "cuda" else {}

    @property
    def resumed_at(self) -> int:
        """Iterations done before this process, as far as the checkpoint's name says so."""
        path = self.resume
        return run_directory.number(path) if path is not None and run_directory.is_checkpoint(path) else 0

    @property
    def done(self) -> bool:
        """Whether all iterations have been trained."""
        return self.state.iteration >= self.total

    def due(self, every: int) -> bool:
        """Whether what happens every so many iterations, and at the end, happens now."""
        return self.state.iteration % every == 0 or self.done

    def start(
        self, watch: Callable[[Record], list[str]] = lambda record: []
    ) -> contextlib.AbstractContextManager[MetricsLog | None]:
        """Resume, or set aside what an earlier run left, and open the log: process 0's, others have none.

        watch: a record of the log -> the new warnings that it gives rise to.
        """
        notes: list[str] = []
        if self.resume is not None:
            main = self.group.main
            self.state, notes = checkpoint.load(self.resume, self.learner, self.settings(), main)
        self.learner.check_weights()  # those that the first step starts from
        if not self.group.main:
            return contextlib.nullcontext()
        if self.resume is not None:
            notes.append(f"resumed from {self.resume} at iteration {self.state.iteration}")
            if self.done:
                more = "--max_train_steps or --num_train_epochs raise that"
                notes.append(f"nothing is left to train: the run is {self.total} iterations ({more})")
        else:
            if self.cfg.run.resume_from_checkpoint is not None:  # the word latest: a path without one is an error
                notes.append(f"{self.run_dir} has no checkpoint yet: starting anew")
            files.set_aside(self.run_dir / "metrics.jsonl")
        print("".join(note + "\n" for note in notes), end="")
        log = MetricsLog(self.run_dir, self.cfg.run.report_to, self.cfg.flat(), watch=watch, history=self.history)
        if self.resume is not None:
            log.truncate_after(self.state.iteration - 1)
            for record in read_metrics(log.path):  # so that it warns as if the run had never stopped
                watch(record)
                self.history.add(record)
        files.write_atomically(self.run_dir / "config.yaml", yaml.safe_dump(self.cfg.flat(), sort_keys=False))
        return log

    def save(self) -> Path:
        """Write a checkpoint of the current iteration: process 0, or all of them their parts."""
        if self.group.main or self.learner.policy.shards is not None:
            settings, limit = self.settings(), self.cfg.run.checkpoints_total_limit
            beside = self.export_beside
            checkpoint.save(self.run_dir, self.state, self.learner, beside, settings, limit, self.group)
        return self.run_dir / f"checkpoint-{self.state.iteration}"

    def last_checkpoint(self) -> Path | None:
        """The newest whole one of this run's directory."""
        return max(run_directory.checkpoints(self.run_dir), key=run_directory.number, default=None)

    def stopped(self) -> None:
        """Save, unless that has just been done, and say how to go on."""
        last = self.run_dir / f"checkpoint-{self.state.iteration}"
        if not self.group.from_main(last in run_directory.checkpoints(self.run_dir)):
            self.save()
        if self.group.main:
            print(
                f"stopped after iteration {self.state.iteration}; --resume_from_checkpoint latest goes on from {last}"
            )

    def report(self) -> None:
        """Write report.html. Training never ends because of it."""
        try:
            write_report(self.run_dir, self.history)
        except Exception as error:
            again = f"python -m spo_fast.report {self.run_dir} makes it later"
            print(f"no report.html ({type(error).__name__}: {error}); {again}")

    def export_beside(self, checkpoint_dir: Path) -> None:
        """Other software's files that go into each checkpoint."""
