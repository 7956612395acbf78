"""What the stubs counted: read, reset, and said by phase."""

from __future__ import annotations

import ctypes
import os
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

DEVICE = "null GPU"  # of a record
RUNTIME = "libcudart.so.13"
WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaMemcpy", "cuStreamSynchronize", "cuCtxSynchronize")
COLUMNS = {  # of a phase: entries by how, and by name where only some count
    "launches": ("launch", None),
    "in_graphs": ("replay", None),
    "graph_launches": ("call", ("cudaGraphLaunch",)),
    "waits": ("call", WAITS),
    "event_waits": ("call", ("cudaEventSynchronize",)),
    "copies": ("copy", None),
    "copied_bytes": ("bytes", None),
    "mallocs": ("call", ("cudaMalloc", "cuMemCreate")),
    "frees": ("call", ("cudaFree", "cuMemUnmap")),
    "modules": ("call", ("cuModuleLoadData",)),
    "faults": ("FAULT", None),
}
"""launches: kernels and fills outside graphs; copies likewise. modules: compiled kernels that were loaded."""


class Entry(NamedTuple):
    count: int
    how: str
    phase: str
    """The trainer's timer's, innermost; empty outside all."""
    name: str


def parse(dump: str) -> list[Entry]:
    """Lines of count, how, phase and name, with tabs between. Raises ValueError for another line."""
    entries = []
    for line in dump.splitlines():
        parts = line.split("\t", 3)
        if len(parts) != 4 or not parts[0].isdigit():
            raise ValueError(f"no entry of a ledger: {line[:80]!r}. Are the stubs and this file of one commit?")
        entries.append(Entry(int(parts[0]), *parts[1:]))
    return entries


def by_phase(entries: Iterable[Entry]) -> dict[str, dict[str, int]]:
    """Phase -> COLUMNS of it; the last, "all", is their sum. Phases in which nothing was counted are left out."""
    entries = list(entries)
    found: dict[str, Counter[str]] = {}
    for phase in sorted({e.phase for e in entries}):
        for e in (e for e in entries if e.phase == phase):
            for column, (how, names) in COLUMNS.items():
                if e.how == how and (names is None or e.name in names):
                    found.setdefault(phase or "between", Counter())[column] += e.count
    found["all"] = sum(found.values(), Counter())
    return {phase: {column: counts[column] for column in COLUMNS} for phase, counts in found.items()}


class Ledger:
    """The one of this process, whose CUDA runtime is a stub."""

    def __init__(self) -> None:
        self.library = ctypes.CDLL(RUNTIME)
        if not hasattr(self.library, "nullcuda_dump"):
            raise RuntimeError(f"{RUNTIME} is no stub. Start by benchmarks.nullgpu.rows, fit or command.")
        self.library.nullcuda_dump.restype = ctypes.c_char_p
        self.library.nullcuda_peak.restype = ctypes.c_size_t
        self.current, self.pauses = "", 0

    def entries(self) -> list[Entry]:
        """Since the last reset."""
        return parse(self.library.nullcuda_dump().decode())

    def reset(self) -> None:
        self.library.nullcuda_reset()

    def device_peak(self, reset: bool = False) -> int:
        """Bytes of device memory that were most in use at once, by whoever took them."""
        return int(self.library.nullcuda_peak(reset))

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """What is counted inside is of this phase, unless of one inside it."""
        outer, self.current = self.current, name
        self.library.nullcuda_phase(name.encode())
        try:
            yield
        finally:
            self.current = outer
            self.library.nullcuda_phase(outer.encode())

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Nothing inside is counted."""
        self.library.nullcuda_pause(1)
        self.pauses += 1
        try:
            yield
        finally:
            self.pauses -= 1
            self.library.nullcuda_pause(-1)


def start() -> None:
    """The stubs in place of NVIDIA's libraries; for that the process may start once more. Call before importing torch.

    They are those of `make nullgpu`, or of LD_LIBRARY_PATH where it has some.
    """
    before = os.environ.get("LD_LIBRARY_PATH", "")
    if any(Path(place, RUNTIME).is_file() for place in before.split(":") if place):
        return
    stubs = Path(sys.prefix, "nullgpu")
    if not (stubs / RUNTIME).is_file():
        raise SystemExit(f"nullgpu: {stubs} has no stubs. Run `make nullgpu`, then use .venv-nullgpu/bin/python.")
    os.environ["LD_LIBRARY_PATH"] = f"{stubs}:{before}".rstrip(":")
    os.execv(sys.executable, sys.orig_argv)
