"""metrics.jsonl, the record of a run: one JSON object a line, flushed at once.

A killed run loses nothing, and a resumed one drops exactly the iterations that it will repeat. The other reporters are
copies of it.
"""

from __future__ import annotations

import json
import logging
import math
import os
import time
import uuid
from collections import defaultdict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeAlias

import torch
from torch import Tensor

from spo_fast.evaluation.pages.history import History
from spo_fast.training.monitor.reporters import make_reporter

logger = logging.getLogger(__name__)

Record: TypeAlias = Mapping[str, object]
"""What is logged of an iteration, by name."""
RESERVED = ("iteration", "time", "nonfinite", "warnings")  # fields the log itself writes


class MetricsLog:
    """Appends records to `run_dir`/metrics.jsonl and copies their numbers to a reporter.

    report_to: none, tensorboard or wandb. config: the resolved settings, shown by wandb.
    watch: sees every record before it is written; the warnings it returns go into the record as `warnings`.
    history: takes each record as it is written.
    clock: seconds since 1970, written to each record as `time`.
    Made by one process of a run (rank 0).
    """

    def __init__(
        self,
        run_dir: str | Path,
        report_to: str = "none",
        config: Mapping[str, object] | None = None,
        clock: Callable[[], float] = time.time,
        watch: Callable[[Record], list[str]] = lambda record: [],
        history: History | None = None,
    ) -> None:
        run_dir = Path(run_dir)
        run_dir.mkdir(parents=True, exist_ok=True)
        self.path, self.clock, self.watch, self.history = run_dir / "metrics.jsonl", clock, watch, history
        self.reporter = make_reporter(report_to, run_dir, config or {})
        cut_torn_line(self.path)
        self._file = self.path.open("a", encoding="utf-8")

    def log(self, iteration: int, values: Record) -> dict[str, object]:
        """Write one record; returns it as written.

        values: numbers, booleans, strings, None, or tensors of one element, which are fetched in one copy. A NaN or an
        infinity is written as null (JSON has neither) and named under `nonfinite`.
        """
        taken = [name for name in RESERVED if name in values]
        if taken:
            raise ValueError(f"metrics may not be named {', '.join(taken)}: the log writes these itself. Rename them.")
        fetched = fetch_scalars(values)
        finite, nonfinite = split_nonfinite(fetched)
        record: dict[str, object] = {"iteration": iteration, "time": round(self.clock(), 3), **finite}
        if nonfinite:
            record["nonfinite"] = nonfinite
        if warnings := self.watch(record):
            record["warnings"] = warnings
        self._file.write(json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n")
        self._file.flush()
        if self.history is not None:
            self.history.add(record)
        self.reporter.report(iteration, {k: v for k, v in finite.items() if isinstance(v, (int, float))})
        return record

    def truncate_after(self, iteration: int) -> int:
        """On resume: drop the records later than `iteration`, which the run is about to repeat. Returns how many.

        Call it before the first log. Lines that are not JSON are dropped too, with a warning.
        """
        self._file.close()
        lines = self.path.read_bytes().split(b"\n")[:-1]
        records = [(line, parsed_iteration(line)) for line in lines]
        damaged = sum(number is None for _, number in records)
        if damaged:
            logger.warning(f"{self.path}: dropped {damaged} damaged lines")
        kept = [line for line, number in records if number is not None and number <= iteration]
        # renamed into place: a kill in between leaves the old file whole
        temporary = self.path.with_name(f".{self.path.name}.{uuid.uuid4().hex}.tmp")
        temporary.write_bytes(b"".join(line + b"\n" for line in kept))
        os.replace(temporary, self.path)
        self._file = self.path.open("a", encoding="utf-8")
        self.reporter.resume(iteration)
        return len(lines) - len(kept) - damaged

    def close(self) -> None:
        """Close the file and the reporter; every record is on disk already."""
        self._file.close()
        self.reporter.close()

    def __enter__(self) -> MetricsLog:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def number(record: Record, name: str) -> float | None:
    """A record's number of this name; None if it has none, or one that was not finite."""
    value = record.get(name)
    return value if isinstance(value, (int, float)) else None


def parsed_iteration(line: bytes) -> int | None:
    """The iteration of a record, None if the line is damaged."""
    try:
        return int(json.loads(line)["iteration"])
    except (ValueError, KeyError, TypeError):
        return None


def cut_torn_line(path: Path) -> None:
    """Drop what stands after the last newline: a record whose writer was killed, to which the next would be glued."""
    if not path.exists():
        return
    content = path.read_bytes()
    whole = content.rfind(b"\n") + 1
    if whole < len(content):
        os.truncate(path, whole)
        logger.warning(f"{path}: dropped a torn last line of {len(content) - whole} bytes")


def fetch_scalars(values: Record) -> dict[str, object]:
    """The same values with tensors as Python numbers, by one device-to-host copy for all of a device's tensors.

    `.item()` on each would wait for the GPU once a metric. They travel as float64, which holds float32, bfloat16 and
    integers below 2^53 exactly.
    """
    by_device: dict[torch.device, dict[str, Tensor]] = defaultdict(dict)
    for name, value in values.items():
        if isinstance(value, Tensor):
            if value.numel() != 1:
                raise ValueError(
                    f"metric {name} has shape {tuple(value.shape)}, but a record holds one number a name. "
                    "Log its mean, or its parts under names of their own."
                )
            by_device[value.device][name] = value.detach().reshape(())
    numbers: dict[str, object] = {}
    for tensors in by_device.values():
        host = torch.stack([value.double() for value in tensors.values()]).tolist()
        for (name, tensor), number in zip(tensors.items(), host, strict=True):
            numbers[name] = number if tensor.is_floating_point() else plain_type(tensor.dtype)(number)
    return {name: numbers[name] if name in numbers else plain_value(name, value) for name, value in values.items()}


def plain_type(dtype: torch.dtype) -> type[int]:
    """Python's type of a tensor's values that are no floating-point numbers."""
    return bool if dtype == torch.bool else int


def plain_value(name: str, value: object) -> object:
    """A JSON value; numpy's scalars through their own item()."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if hasattr(value, "item"):
        return value.item()
    raise TypeError(f"metric {name} is a {type(value).__name__}; log a number, a string or a tensor of one element.")


def split_nonfinite(values: Record) -> tuple[dict[str, object], dict[str, str]]:
    """(values with None for what is not finite, {name: "nan", "inf" or "-inf"})."""
    bad = {name: repr(v) for name, v in values.items() if isinstance(v, float) and not math.isfinite(v)}
    return {name: None if name in bad else value for name, value in values.items()}, bad
