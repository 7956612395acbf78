"""The progress line on the terminal."""

from __future__ import annotations

import logging
import math
import os
import statistics
import sys
import textwrap
import time
from collections import deque
from collections.abc import Callable, Mapping
from typing import TextIO

logger = logging.getLogger(__name__)

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
    live: None looks whether the stream is a terminal. done: iterations before this process.
    """

    def __init__(
        self,
        total: int,
        stream: TextIO | None = None,
        every_s: float = 30.0,
        clock: Callable[[], float] = time.monotonic,
        live: bool | None = None,
        done: int = 0,
    ) -> None:
        self.total, self.every_s, self.clock = total, every_s, clock
        self.stream = sys.stdout if stream is None else stream
        self._durations_s: deque[float] = deque(maxlen=MEDIAN_WINDOW)
        self._last_update_s, self._last_print_s = clock(), -math.inf
        self._live = LiveLine(self.stream) if (is_terminal(self.stream) if live is None else live) else None
        if self._live is not None:  # minutes may pass until there is more to say
            self._live.show(done, total, f"{done}/{total}  ETA after the first iteration")

    def update(self, record: Mapping[str, object]) -> None:
        """Show a record that MetricsLog.log returned: iteration (from 0) and whatever of PROGRESS_FIELDS and *_ms."""
        now = self.clock()
        self._durations_s.append(now - self._last_update_s)
        self._last_update_s = now
        iteration = record["iteration"]
        assert isinstance(iteration, int)
        done = iteration + 1
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


def progress_text(record: Mapping[str, object], done: int, total: int, iteration_s: float) -> str:
    """One line: 120/4000  epoch 1  score 0.21  valid 43%  loss 0.6931  rollout 812 ms  0.81 it/s  ETA 1:19:51"""
    parts = [f"{done}/{total}"]
    parts += [
        f"{label} {'not finite' if record[field] is None else form.format(record[field])}"
        for field, label, form in PROGRESS_FIELDS
        if field in record
    ]
    phases = {name[: -len("_ms")]: value for name, value in record.items() if name.endswith("_ms")}
    parts += [f"{phase} {duration_text(value)}" for phase, value in phases.items() if isinstance(value, (int, float))]
    if iteration_s > 0:
        parts.append(f"{1 / iteration_s:.2f} it/s" if iteration_s < 1 else f"{iteration_s:.2f} s/it")
        parts.append(f"ETA {clock_text((total - done) * iteration_s)}")
    return "  ".join(parts)


def duration_text(ms: float) -> str:
    """812 ms, and from ten seconds on 10.0 s."""
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
    """Whether a line can be redrawn on it."""
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
        """Redraw: the bar at done of total, and the text, broken between its fields."""
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        grid = Table.grid(padding=(0, 1))
        words = wrap_fields(text, self._live.console.width - BAR_WIDTH - 1)
        grid.add_row(ProgressBar(total=total, completed=done, width=BAR_WIDTH), Text(words))
        self._live.update(grid)

    def stop(self) -> None:
        """Leave the last line standing; the log handlers write where they did before."""
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
