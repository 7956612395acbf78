"""Times of an iteration's phases, without waiting for the GPU."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch


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
