"""A run watched iteration by iteration: what the ledger counted, peaks, what was compiled, who waited."""

from __future__ import annotations

import sys
import time
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from benchmarks.iteration import compiled_graphs
from benchmarks.nullgpu.ledger import Ledger, by_phase
from benchmarks.records import ROOT, table

GIB = 2.0**30
LINES = 12  # of those that wait, printed; all are recorded
SHOWN = ("launches", "in_graphs", "graph_launches", "waits", "event_waits", "copies", "mallocs", "frees", "faults")


class Watch:
    """Iterations that `Timer.read_ms` ends, as the trainer's loop does once an iteration."""

    def __init__(self, ledger: Ledger, tables: bool = True):
        self.ledger, self.tables = ledger, tables
        self.iterations: list[dict[str, Any]] = []
        self._lines: Counter[str] = Counter()

    def begin(self) -> None:
        """What was before belongs to no iteration."""
        self.ledger.reset()
        self.ledger.device_peak(reset=True)
        torch.cuda.reset_peak_memory_stats()
        self._lines.clear()
        self._compiled, self._before = compiled_graphs(), torch.cuda.memory_stats()
        self._start, self._cpu = time.perf_counter(), time.process_time()

    def end(self, phases_ms: dict[str, float]) -> dict[str, Any]:
        """The iteration since `begin`, and the next begins."""
        host_s, stats = time.perf_counter() - self._start, torch.cuda.memory_stats()
        entries = self.ledger.entries()
        iteration = {
            "host_s": round(host_s, 3),
            "cpu_s": round(time.process_time() - self._cpu, 3),
            **by_phase(entries)["all"],
            "graphs_compiled": compiled_graphs() - self._compiled,
            "allocated_gib": round(stats["allocated_bytes.all.peak"] / GIB, 3),
            "reserved_gib": round(stats["reserved_bytes.all.peak"] / GIB, 3),
            "device_gib": round(self.ledger.device_peak() / GIB, 3),
            "retries": stats["num_alloc_retries"] - self._before.get("num_alloc_retries", 0),
            "ooms": stats["num_ooms"] - self._before.get("num_ooms", 0),
            "phases": by_phase(entries),
            "phases_ms": {phase: round(ms) for phase, ms in phases_ms.items()},
            "graphs": sorted(e.name for e in entries if e.how == "graph"),
            "faults_found": sorted({e.name for e in entries if e.how == "FAULT"}),
            "wait_lines": dict(self._lines.most_common()),
        }
        self.iterations.append(iteration)
        text = summary(len(self.iterations) - 1, iteration)
        print(text if self.tables else text.splitlines()[0], flush=True)
        self.begin()
        return iteration

    @contextmanager
    def lines(self) -> Iterator[None]:
        """Inside, PyTorch warns at each of its waits, and the line of ours that led there is kept."""
        show = warnings.showwarning

        def keep(message: Any, category: Any, filename: str, lineno: int, *rest: Any) -> None:
            if "synchronizing CUDA operation" not in str(message):
                show(message, category, filename, lineno, *rest)
            elif not self.ledger.pauses:
                self._lines[own_line(f"{Path(filename).name}:{lineno}")] += 1

        with warnings.catch_warnings():
            warnings.filterwarnings("always", message=".*synchronizing CUDA operation")
            warnings.showwarning = keep
            torch.cuda.set_sync_debug_mode("warn")
            try:
                yield
            finally:
                torch.cuda.set_sync_debug_mode("default")


def own_line(otherwise: str) -> str:
    """Innermost frame of the package or of a benchmark: "training/learner.py:209 is_dead"."""
    frame = sys._getframe(1)
    here = str(Path(__file__).parent)
    while frame is not None:
        file = frame.f_code.co_filename
        if file.startswith(str(ROOT)) and not file.startswith(here) and "site-packages" not in file:
            name = getattr(frame.f_code, "co_qualname", frame.f_code.co_name)  # the whole name since Python 3.11
            return f"{Path(file).relative_to(ROOT)}:{frame.f_lineno} {name.split('.<locals>')[0]}"
        frame = frame.f_back
    return otherwise


def summary(number: int, iteration: dict[str, Any]) -> str:
    """An iteration in words and a table by phase."""
    i = iteration
    memory = f"peak allocated {i['allocated_gib']:.2f}, reserved {i['reserved_gib']:.2f} GiB, {i['retries']} retries"
    compiled = f"{i['graphs_compiled']} graphs compiled, {i['modules']} modules loaded"
    text = [
        f"iteration {number}: {i['host_s']:.2f} s of the host ({i['cpu_s']:.2f} of its CPU), {memory}; {compiled}",
        phase_table(i["phases"]),
    ]
    text += [f"  {n:4} waits at {line}" for line, n in list(i["wait_lines"].items())[:LINES]]
    text += [f"FAULT: {fault}" for fault in i["faults_found"]]
    return "\n".join(text)


def phase_table(phases: dict[str, dict[str, int]], shown: Sequence[str] = SHOWN) -> str:
    """A row a phase, and MiB copied."""
    heading = ["phase", *(c.replace("_", " ") for c in shown), "MiB copied"]
    rows = [[phase, *(c[s] for s in shown), f"{c['copied_bytes'] / 2**20:.1f}"] for phase, c in phases.items()]
    return table([heading, *rows])


def watched_timer(watch: Watch) -> None:
    """From now on the trainer's timer ends an iteration where it is read."""
    from spo_fast.training.monitor.timer import Timer

    plain = Timer.read_ms

    def read_ms(self: Timer) -> dict[str, float]:
        with watch.ledger.phase("timer"):  # it waits for each phase's last event
            phases_ms = plain(self)
        if phases_ms:  # the loop reads once more, for a record to begin anew
            watch.end(phases_ms)
        return phases_ms

    Timer.read_ms = read_ms
