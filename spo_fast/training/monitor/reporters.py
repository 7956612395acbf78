"""Copies of the record for TensorBoard and Weights & Biases."""

from __future__ import annotations

import difflib
import functools
import os
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from spo_fast.config.optional_packages import missing_extra


class Reporter(Protocol):
    def report(self, iteration: int, numbers: Mapping[str, float]) -> None: ...
    def images(self, iteration: int, name: str, path: Path) -> None: ...  # a PNG
    def resume(self, iteration: int) -> None: ...
    def close(self) -> None: ...


class NoReporter:
    """metrics.jsonl alone."""

    def __init__(self, run_dir: Path, config: Mapping[str, Any]) -> None: ...
    def report(self, iteration: int, numbers: Mapping[str, float]) -> None: ...
    def images(self, iteration: int, name: str, path: Path) -> None: ...  # a PNG
    def resume(self, iteration: int) -> None: ...
    def close(self) -> None: ...


class TensorBoardReporter:
    """Event files in `run_dir`/tensorboard."""

    def __init__(self, run_dir: Path, config: Mapping[str, Any]) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ImportError(missing_extra("report_to", "tensorboard")) from error
        self._make_writer = functools.partial(SummaryWriter, log_dir=str(run_dir / "tensorboard"))
        self._writer: Any = None
        self._purge_step: int | None = None

    def report(self, iteration: int, numbers: Mapping[str, float]) -> None:
        for name, number in numbers.items():
            self.writer.add_scalar(name, number, iteration)

    def images(self, iteration: int, name: str, path: Path) -> None:
        from PIL import Image

        with Image.open(path) as image:
            self.writer.add_image(name, np.array(image.convert("RGB")), iteration, dataformats="HWC")

    @property
    def writer(self) -> Any:
        if self._writer is None:  # made at the first record, when it is known what a resume purges
            self._writer = self._make_writer(purge_step=self._purge_step)
        return self._writer

    def resume(self, iteration: int) -> None:
        self._purge_step = iteration + 1

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()


class WandbReporter:
    """One Weights & Biases run for one run_dir: its id is kept in `run_dir`/wandb_id, so a resumed run continues it.

    W&B ignores records at steps it has seen; a resumed run computes the same values there, so nothing is lost.
    """

    def __init__(self, run_dir: Path, config: Mapping[str, Any]) -> None:
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
        self._run.log(dict(numbers), step=iteration)

    def images(self, iteration: int, name: str, path: Path) -> None:
        import wandb

        self._run.log({name: wandb.Image(str(path))}, step=iteration)

    def resume(self, iteration: int) -> None: ...

    def close(self) -> None:
        self._run.finish()


REPORTERS: dict[str, Callable[[Path, Mapping[str, Any]], Reporter]] = {
    "none": NoReporter,
    "tensorboard": TensorBoardReporter,
    "wandb": WandbReporter,
}


def make_reporter(report_to: str, run_dir: Path, config: Mapping[str, Any]) -> Reporter:
    if report_to not in REPORTERS:
        near = difflib.get_close_matches(report_to, REPORTERS, n=1)
        hint = f" Did you mean {near[0]}?" if near else ""
        raise ValueError(f"report_to={report_to!r} is unknown; it can be {', '.join(REPORTERS)}.{hint}")
    return REPORTERS[report_to](run_dir, config)
