"""Copies of the record for TensorBoard and Weights & Biases."""

from __future__ import annotations

import difflib
import functools
import os
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np

from spo_fast.config.optional_packages import missing_extra

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter


class Reporter(Protocol):
    """Where copies of the record go."""

    def report(self, iteration: int, numbers: Mapping[str, float]) -> None:
        """An iteration's numbers, all finite or NaN."""

    def images(self, iteration: int, name: str, path: Path) -> None:
        """A PNG, under a name that comes again."""

    def resume(self, iteration: int) -> None:
        """Called before anything is reported: what came after `iteration` will be computed again."""

    def close(self) -> None:
        """Nothing is reported after it."""


class NoReporter(Reporter):
    """metrics.jsonl alone."""

    def __init__(self, run_dir: Path, config: Mapping[str, object]) -> None: ...


class TensorBoardReporter(Reporter):
    """Event files in `run_dir`/tensorboard."""

    def __init__(self, run_dir: Path, config: Mapping[str, object]) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ImportError(missing_extra("report_to", "tensorboard")) from error
        self._make_writer = functools.partial(SummaryWriter, log_dir=str(run_dir / "tensorboard"))
        self._writer: SummaryWriter | None = None
        self._purge_step: int | None = None

    def report(self, iteration: int, numbers: Mapping[str, float]) -> None:
        """A scalar each."""
        for name, number in numbers.items():
            self.writer.add_scalar(name, number, iteration)

    def images(self, iteration: int, name: str, path: Path) -> None:
        """Under the name, with a slider over iterations."""
        from PIL import Image

        with Image.open(path) as image:
            self.writer.add_image(name, np.array(image.convert("RGB")), iteration, dataformats="HWC")

    @property
    def writer(self) -> SummaryWriter:
        """Made at the first record, when it is known what a resume purges."""
        if self._writer is None:
            self._writer = self._make_writer(purge_step=self._purge_step)
        return self._writer

    def resume(self, iteration: int) -> None:
        """Later events of the files are purged."""
        self._purge_step = iteration + 1

    def close(self) -> None:
        """Flush; a run without a record leaves no file."""
        if self._writer is not None:
            self._writer.close()


class WandbReporter(Reporter):
    """One Weights & Biases run for one run_dir: its id is kept in `run_dir`/wandb_id, so a resumed run continues it.

    W&B ignores records at steps it has seen; a resumed run computes the same values there, so nothing is lost.
    """

    def __init__(self, run_dir: Path, config: Mapping[str, object]) -> None:
        try:
            import wandb
        except ImportError as error:
            raise ImportError(missing_extra("report_to", "wandb")) from error
        id_file = run_dir / "wandb_id"
        if not id_file.exists():
            id_file.write_text(uuid.uuid4().hex[:16])
        self._run = wandb.init(
            dir=str(run_dir),
            id=id_file.read_text().strip(),
            name=run_dir.resolve().name,
            project=os.environ.get("WANDB_PROJECT", "spo_fast"),
            config=dict(config),
            resume="allow",
        )

    def report(self, iteration: int, numbers: Mapping[str, float]) -> None:
        """One step of W&B's history."""
        self._run.log(dict(numbers), step=iteration)

    def images(self, iteration: int, name: str, path: Path) -> None:
        """Uploaded under the name."""
        import wandb

        self._run.log({name: wandb.Image(str(path))}, step=iteration)

    def close(self) -> None:
        """The run is shown as finished."""
        self._run.finish()


REPORTERS: dict[str, Callable[[Path, Mapping[str, object]], Reporter]] = {
    "none": NoReporter,
    "tensorboard": TensorBoardReporter,
    "wandb": WandbReporter,
}


def make_reporter(report_to: str, run_dir: Path, config: Mapping[str, object]) -> Reporter:
    """The reporter of this name. Raises ValueError for an unknown one, ImportError if its package is missing."""
    if report_to not in REPORTERS:
        near = difflib.get_close_matches(report_to, REPORTERS, n=1)
        hint = f" Did you mean {near[0]}?" if near else ""
        raise ValueError(f"report_to={report_to!r} is unknown; it can be {', '.join(REPORTERS)}.{hint}")
    return REPORTERS[report_to](run_dir, config)
