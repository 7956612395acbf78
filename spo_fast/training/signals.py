"""SIGTERM and Ctrl-C: a run stops at the next safe point and saves, as a machine that is taken away allows for."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable
from types import FrameType


class Stopped(Exception):
    """Raised at a safe point of a run that was asked to stop; nothing of the iteration has changed anything yet."""


class StopRequest:
    """Inside `with`, the first SIGTERM or SIGINT only asks; a second one interrupts at once.

    limit_s: after so many seconds without an end the process ends itself with status 1: what comes next would be
    SIGKILL, perhaps inside a write.
    """

    def __init__(self, limit_s: float) -> None:
        self.limit_s = limit_s
        self.signal = ""
        """Name of the signal that asked; empty if none did."""
        self._before: dict[int, Callable[[int, FrameType | None], object] | int | None] = {}
        self._timer: threading.Timer | None = None

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():  # Python lets no other install handlers
            self._before = {number: signal.signal(number, self._asked) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        if self._timer is not None:
            self._timer.cancel()

    def _asked(self, number: int, frame: FrameType | None) -> None:
        if self.signal:
            raise KeyboardInterrupt
        self.signal = signal.Signals(number).name
        self._timer = threading.Timer(self.limit_s, self._too_late)
        self._timer.daemon = True
        self._timer.start()  # first: nobody may read what is printed
        print(f"{self.signal}: saving at the next safe point; a second one stops at once", flush=True)

    def _too_late(self) -> None:
        print(f"error: not done {self.limit_s:g} s after {self.signal} (--stop_seconds).", file=sys.stderr, flush=True)
        os._exit(1)

    def safe_point(self) -> None:
        """Raises Stopped if the run was asked to stop."""
        if self.signal:
            raise Stopped
