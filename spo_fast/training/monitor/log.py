"""What a run reports: metrics.jsonl, TensorBoard or Weights & Biases, a progress line, phase times, GPU load.

metrics.jsonl is the record, always written: one JSON object a line, flushed at once, so that a killed run loses nothing
and a resumed one can drop exactly the iterations it will repeat. The other reporters are copies of it.
"""

from __future__ import annotations

import difflib
import functools
import json
import logging
import math
import os
import statistics
import sys
import textwrap
import time
import uuid
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol, TextIO

import numpy as np
import torch
from torch import Tensor

from spo_fast.extras import missing_extra

logger = logging.getLogger(__name__)

RESERVED = ("iteration", "time", "nonfinite", "warnings")  # fields the log itself writes

# ---- metrics.jsonl ---------------------------------------------------------------------------------------------------


class MetricsLog:
    """Appends records to `run_dir`/metrics.jsonl and copies their numbers to a reporter.

    report_to: none, tensorboard or wandb. config: the resolved settings, shown by wandb.
    watch: sees every record before it is written; the warnings it returns go into the record as `warnings`.
    clock: seconds since 1970, written to each record as `time`.
    Made by one process of a run (rank 0).
    """

    def __init__(
        self,
        run_dir: str | Path,
        report_to: str = "none",
        config: Mapping[str, Any] | None = None,
        clock: Callable[[], float] = time.time,
        watch: Callable[[Mapping[str, Any]], list[str]] = lambda record: [],
    ) -> None:
        run_dir = Path(run_dir)
        run_dir.mkdir(parents=True, exist_ok=True)
        self.path, self.clock, self.watch = run_dir / "metrics.jsonl", clock, watch
        self.reporter = make_reporter(report_to, run_dir, config or {})
        cut_torn_line(self.path)
        self._file = self.path.open("a", encoding="utf-8")

    def log(self, iteration: int, values: Mapping[str, Any]) -> dict[str, Any]:
        """Write one record; returns it as written.

        values: numbers, booleans, strings, None, or tensors of one element, which are fetched in one copy. A NaN or an
        infinity is written as null (JSON has neither) and named under `nonfinite`.
        """
        taken = [name for name in RESERVED if name in values]
        if taken:
            raise ValueError(f"metrics may not be named {', '.join(taken)}: the log writes these itself. Rename them.")
        fetched = fetch_scalars(values)
        finite, nonfinite = split_nonfinite(fetched)
        record: dict[str, Any] = {"iteration": iteration, "time": round(self.clock(), 3), **finite}
        if nonfinite:
            record["nonfinite"] = nonfinite
        if warnings := self.watch(record):
            record["warnings"] = warnings
        self._file.write(json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n")
        self._file.flush()
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
        self._file.close()
        self.reporter.close()

    def __enter__(self) -> MetricsLog:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """All records of a metrics.jsonl; a torn last line (a run still writing, or killed) is left out."""
    records = []
    for number, line in enumerate(Path(path).read_bytes().split(b"\n")[:-1], 1):
        try:
            records.append(json.loads(line))
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: not a record ({error}). Delete this line.") from error
    return records


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


def fetch_scalars(values: Mapping[str, Any]) -> dict[str, Any]:
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
    numbers: dict[str, Any] = {}
    for tensors in by_device.values():
        host = torch.stack([value.double() for value in tensors.values()]).tolist()
        for (name, tensor), number in zip(tensors.items(), host, strict=True):
            numbers[name] = number if tensor.is_floating_point() else plain_type(tensor.dtype)(number)
    return {name: numbers[name] if name in numbers else plain_value(name, value) for name, value in values.items()}


def plain_type(dtype: torch.dtype) -> type:
    return bool if dtype == torch.bool else int


def plain_value(name: str, value: Any) -> Any:
    """A JSON value; numpy's scalars through their own item()."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if hasattr(value, "item"):
        return value.item()
    raise TypeError(f"metric {name} is a {type(value).__name__}; log a number, a string or a tensor of one element.")


def split_nonfinite(values: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, str]]:
    """(values with None for what is not finite, {name: "nan", "inf" or "-inf"})."""
    bad = {name: repr(v) for name, v in values.items() if isinstance(v, float) and not math.isfinite(v)}
    return {name: None if name in bad else value for name, value in values.items()}, bad


# ---- reporters -------------------------------------------------------------------------------------------------------


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


# ---- progress on the terminal ----------------------------------------------------------------------------------------

# (field of the record, label, format); a field that is absent is left out
PROGRESS_FIELDS = (
    ("epoch", "epoch", "{}"),
    ("score_mean", "score", "{:.4g}"),
    ("valid_share", "valid", "{:.0%}"),
    ("loss", "loss", "{:.4f}"),
    ("tflop_per_s", "TFLOP/s", "{:.0f}"),
    ("mfu", "MFU", "{:.0%}"),
)
BAR_WIDTH = 20  # characters
MEDIAN_WINDOW = 50  # iterations; a median, so a slow one (compilation, a checkpoint) does not move the ETA


class ProgressLine:
    """Where a run is: a live line on a terminal, a plain line every `every_s` seconds elsewhere (logs, nohup, CI).

    total: the last iteration's number plus one. Made right before the loop: the first iteration is timed from here.
    live: None looks whether the stream is a terminal.
    """

    def __init__(
        self,
        total: int,
        stream: TextIO | None = None,
        every_s: float = 30.0,
        clock: Callable[[], float] = time.monotonic,
        live: bool | None = None,
    ) -> None:
        self.total, self.every_s, self.clock = total, every_s, clock
        self.stream = sys.stdout if stream is None else stream
        self._durations_s: deque[float] = deque(maxlen=MEDIAN_WINDOW)
        self._last_update_s, self._last_print_s = clock(), -math.inf
        self._live = LiveLine(self.stream) if (is_terminal(self.stream) if live is None else live) else None

    def update(self, record: Mapping[str, Any]) -> None:
        """Show a record that MetricsLog.log returned: iteration (from 0) and whatever of PROGRESS_FIELDS and *_ms."""
        now = self.clock()
        self._durations_s.append(now - self._last_update_s)
        self._last_update_s = now
        done = int(record["iteration"]) + 1
        text = progress_text(record, done, self.total, statistics.median(self._durations_s))
        if self._live is not None:
            self._live.show(done, self.total, text)
        elif now - self._last_print_s >= self.every_s or done == self.total:
            self._last_print_s = now
            print(text, file=self.stream, flush=True)

    def close(self) -> None:
        """Leave the last line standing and give the terminal back. Safe to call twice."""
        if self._live is not None:
            self._live.stop()
            self._live = None

    def __enter__(self) -> ProgressLine:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def progress_text(record: Mapping[str, Any], done: int, total: int, iteration_s: float) -> str:
    """One line: 120/4000  epoch 1  score 0.21  valid 43%  loss 0.6931  rollout 812 ms  0.81 it/s  ETA 1:19:51"""
    parts = [f"{done}/{total}"]
    parts += [
        f"{label} {'not finite' if record[field] is None else form.format(record[field])}"
        for field, label, form in PROGRESS_FIELDS
        if field in record
    ]
    phases = {name[: -len("_ms")]: value for name, value in record.items() if name.endswith("_ms")}
    parts += [f"{phase} {duration_text(value)}" for phase, value in phases.items() if value is not None]
    if iteration_s > 0:
        parts.append(f"{1 / iteration_s:.2f} it/s" if iteration_s < 1 else f"{iteration_s:.2f} s/it")
        parts.append(f"ETA {clock_text((total - done) * iteration_s)}")
    return "  ".join(parts)


def duration_text(ms: float) -> str:
    return f"{ms:.0f} ms" if ms < 10_000 else f"{ms / 1000:.1f} s"


def clock_text(seconds: float) -> str:
    """3:07, 1:19:51, 2d 03:10:00"""
    minutes, s = divmod(round(seconds), 60)
    hours, m = divmod(minutes, 60)
    days, h = divmod(hours, 24)
    if days:
        return f"{days}d {h:02}:{m:02}:{s:02}"
    return f"{h}:{m:02}:{s:02}" if h else f"{m}:{s:02}"


def is_terminal(stream: TextIO) -> bool:
    return stream.isatty() and os.environ.get("TERM") != "dumb"


class LiveLine:
    """A bar and the progress text, redrawn in place; what is printed or logged meanwhile appears above it."""

    def __init__(self, stream: TextIO) -> None:
        from rich.console import Console
        from rich.live import Live

        terminal = {sys.stdout, sys.stderr}
        self._live = Live(console=Console(file=stream, force_terminal=True), refresh_per_second=4)
        self._live.start()
        # rich redirects sys.stdout and sys.stderr, but a handler made earlier holds the old one and would write into
        # the middle of the line
        self._handlers = [(handler, handler.setStream(sys.stderr)) for handler in stream_handlers(terminal)]

    def show(self, done: int, total: int, text: str) -> None:
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        grid = Table.grid(padding=(0, 1))
        words = wrap_fields(text, self._live.console.width - BAR_WIDTH - 1)
        grid.add_row(ProgressBar(total=total, completed=done, width=BAR_WIDTH), Text(words))
        self._live.update(grid)

    def stop(self) -> None:
        self._live.stop()
        for handler, stream in self._handlers:
            handler.setStream(stream)


def wrap_fields(text: str, width: int) -> str:
    """Lines of at most `width`, broken only between fields, which stand two spaces apart (rich breaks inside too)."""
    # textwrap never breaks at a no-break space
    words = "  ".join(field.replace(" ", "\u00a0") for field in text.split("  "))
    return textwrap.fill(words, max(width, 1), break_on_hyphens=False).replace("\u00a0", " ")


def stream_handlers(streams: set[TextIO]) -> list[logging.StreamHandler]:
    """All loggers' handlers that write to one of the streams."""
    loggers = [logging.root, *(x for x in logging.root.manager.loggerDict.values() if isinstance(x, logging.Logger))]
    handlers = {handler for logger in loggers for handler in logger.handlers}
    return [h for h in handlers if isinstance(h, logging.StreamHandler) and h.stream in streams]


# ---- times and load --------------------------------------------------------------------------------------------------


class Timer:
    """Milliseconds per phase: `with timer("rollout"): ...`, then read_ms() once an iteration.

    A phase inside another is taken off the outer one's time, so the times add up.

    On CUDA a phase lies between two events on the current stream: entering and leaving it never waits for the GPU, and
    the time is the GPU's own, including its gaps while it waits for the host. Elsewhere it is the host's clock.
    """

    def __init__(self, device: torch.device | str = "cpu", clock: Callable[[], float] = time.perf_counter) -> None:
        self.device, self.clock = torch.device(device), clock
        self.phase = ""  # the innermost one under way; after an exception, the one that raised it
        self._order: dict[str, None] = {}
        self._host_ms: dict[str, float] = defaultdict(float)
        self._events: list[tuple[str, str, torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        """Adds the block's time to `phase`, also when it raises; the same phase may be timed many times."""
        measure = self._on_cuda if self.device.type == "cuda" else self._on_host
        outer, self.phase = self.phase, phase
        self._order.setdefault(phase)
        with measure(phase, outer):
            yield
        self.phase = outer

    @contextmanager
    def _on_host(self, phase: str, outer: str) -> Iterator[None]:
        start = self.clock()
        try:
            yield
        finally:
            _add_time(self._host_ms, phase, outer, 1000 * (self.clock() - start))

    @contextmanager
    def _on_cuda(self, phase: str, outer: str) -> Iterator[None]:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        stream = torch.cuda.current_stream(self.device)
        start.record(stream)
        try:
            yield
        finally:
            end.record(torch.cuda.current_stream(self.device))
            self._events.append((phase, outer, start, end))

    def read_ms(self) -> dict[str, float]:
        """{"rollout_ms": ...} since the last read, in the order the phases first began. Waits for the GPU; resets."""
        totals = defaultdict(float, self._host_ms)
        for phase, outer, start, end in self._events:
            end.synchronize()
            _add_time(totals, phase, outer, start.elapsed_time(end))
        self._host_ms.clear()
        self._events.clear()
        self.phase = ""
        return {f"{phase}_ms": totals[phase] for phase in self._order if phase in totals}


def _add_time(totals: dict[str, float], phase: str, outer: str, ms: float) -> None:
    totals[phase] += ms
    if outer:
        totals[outer] -= ms


def gpu_stats(device_index: int = 0) -> dict[str, float]:
    """Load of a CUDA device by NVML; {} without nvidia-ml-py, a driver or the device. Costs well under a millisecond.

    gpu_utilisation_percent, gpu_memory_used_gib, gpu_memory_total_gib (the whole card's, other processes included),
    gpu_power_w; a value this card does not report (MIG has no utilisation) is left out.
    device_index: as torch counts, so CUDA_VISIBLE_DEVICES is respected.
    """
    handle = nvml_handle(device_index)
    if handle is None:
        return {}
    import pynvml

    readings: dict[str, Callable[[], float]] = {
        "gpu_utilisation_percent": lambda: float(pynvml.nvmlDeviceGetUtilizationRates(handle).gpu),
        "gpu_memory_used_gib": lambda: pynvml.nvmlDeviceGetMemoryInfo(handle).used / 2**30,
        "gpu_memory_total_gib": lambda: pynvml.nvmlDeviceGetMemoryInfo(handle).total / 2**30,
        "gpu_power_w": lambda: pynvml.nvmlDeviceGetPowerUsage(handle) / 1000,
    }
    stats = {}
    for name, read in readings.items():
        try:
            stats[name] = read()
        except pynvml.NVMLError:
            continue
    return stats


def nvml_energy_j(device_index: int = 0) -> float | None:
    """Joules the device has drawn since its driver was loaded; None if it does not say."""
    handle = nvml_handle(device_index)
    if handle is None:
        return None
    import pynvml

    try:
        return pynvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1000
    except pynvml.NVMLError:
        return None


def nvml_handle(device_index: int) -> Any | None:
    """NVML's handle of a torch device, found by its UUID: NVML counts all cards, torch only the visible ones."""
    return _nvml(device_index)[0]


def nvml_missing(device_index: int) -> str | None:
    """Why there is no handle; None if there is one."""
    return _nvml(device_index)[1]


@functools.lru_cache
def _nvml(device_index: int) -> tuple[Any | None, str | None]:
    try:
        import pynvml
    except ImportError:
        return None, "nvidia-ml-py is not installed (pip install 'spo_fast[nvml]')"
    if device_index >= torch.cuda.device_count():
        return None, f"there is no CUDA device {device_index}"
    try:
        pynvml.nvmlInit()
        name = f"GPU-{torch.cuda.get_device_properties(device_index).uuid}"
        return pynvml.nvmlDeviceGetHandleByUUID(name), None
    except pynvml.NVMLError as error:
        return None, f"NVML says {error}"
