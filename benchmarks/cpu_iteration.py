"""One training iteration on a CPU: the published execution strategy beside ours, in the same minutes.

    python -m benchmarks.cpu_iteration --size mid --pairs 5 --out FILE

Each contender is a process with its own networks; their iterations take turns, one thread each, so that a busy machine
is busy for all. What is compared is CPU time by phase and peak resident memory; ratios are of iterations of the same
turn. Every contender first shows its errors against float64 (iteration.py's gate).
"""

from __future__ import annotations

import argparse
import contextlib
import multiprocessing
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from benchmarks import iteration
from benchmarks.iteration import Decisions, Setup, Technique
from benchmarks.records import Records, read, table
from spo_fast.config.command import for_pytorch
from spo_fast.training.monitor.timer import Timer

KINDS = {"mid": "sd15", "toy": "sdxl", "tiny": "sd15"}  # whose parts a size has
PROMPTS = {"mid": 1, "toy": 16, "tiny": 2}

CONTENDERS: dict[str, Technique] = {
    "published": Technique(published=True, mixed_precision="no"),
    "published bf16": Technique(published=True, mixed_precision="bf16", scorer_dtype="no"),
    "plain": Technique(mixed_precision="no"),
    "float32": Technique(mixed_precision="no", fuse=True, merged=True),
    "bf16": Technique(mixed_precision="bf16", scorer_dtype="bf16", fuse=True),
}
"""The published script as it runs on a CPU, and under its own autocast; ours without what is chosen for a CPU, and with
it in both types."""


TYPES = {technique.mixed_precision for technique in CONTENDERS.values()}


class Phases(Timer):
    """CPU milliseconds and peak resident MiB of each phase that is not inside another."""

    def __init__(self) -> None:
        super().__init__("cpu", time.process_time)
        self.peaks: dict[str, float] = {}

    @contextlib.contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        outer = self.phase
        if not outer:
            self.note("between")
        with super().__call__(phase):
            yield
        if not outer:
            self.note(phase)

    def note(self, phase: str) -> None:
        """The peak since the last note was this phase's."""
        self.peaks[phase] = max(self.peaks.get(phase, 0.0), peak_mib())

    def read(self) -> tuple[dict[str, float], dict[str, float]]:
        """CPU ms and peak MiB by phase since the last read; resets."""
        self.note("between")
        peaks, self.peaks = self.peaks, {}
        return self.read_ms(), peaks


def peak_mib() -> float:
    """Most resident memory since the last call."""
    lines = Path("/proc/self/status").read_text().splitlines()
    peak = next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))
    with contextlib.suppress(OSError):  # not ours to reset in some containers: then it is the peak until now
        Path("/proc/self/clear_refs").write_text("5")
    return peak / 1024


# ---------------------------------------------------------------------------------------------------- one contender


def setup_of(size: str, mixed_precision: str) -> Setup:
    setup = Setup(KINDS[size], size, "cpu", PROMPTS[size], mixed_precision)
    setup.timer = Phases()
    return setup


def serve(name: str, size: str, scratch: Path, out: Path, pipe: Connection) -> None:
    """A process: builds, says its errors, then runs an iteration for each share it is sent."""
    torch.set_num_threads(1)
    technique = CONTENDERS[name]
    setup = setup_of(size, technique.mixed_precision)
    contender = iteration.make_contender(setup, technique)
    quality = iteration.parity(contender, setup, technique, scratch)
    Records(out, "cpu", size=size).write(f"{size}/{name}/parity", dtype=technique.mixed_precision, **quality)
    setup.timer.read()  # type: ignore[attr-defined]
    pipe.send(quality)
    while (share := pipe.recv()) is not None:
        decisions = Decisions.scripted(setup.cfg, share, "cpu")
        start = time.process_time()
        facts = contender.iterate(decisions)
        seconds = time.process_time() - start
        ms, peaks = setup.timer.read()  # type: ignore[attr-defined]
        trained = sum(ms.get(f"{phase}_ms", 0.0) for phase in ("reference", "backward", "step"))
        phases = {name.removesuffix("_ms"): value / 1000 for name, value in ms.items() if name != "rollout_ms"}
        phases["rollout"] = seconds - trained / 1000  # decoding and scoring with it
        pipe.send({"cpu_s": seconds, "phases_s": phases, "peak_mib": max(peaks.values()), "peaks_mib": peaks} | facts)


def write_truth(size: str, scratch: Path, out: Path) -> None:
    """A process: float64's loss, log-ratios and gradients, into scratch; its memory goes with it."""
    setup = Setup(KINDS[size], size, "cpu", PROMPTS[size], "fp64", rollouts=False)
    iteration.truth(setup, scratch, Records(out, "cpu", size=size))


class Worker:
    """A contender's process, seen from outside; ours has the environment that the package's commands give themselves.

    serve(name, *arguments, pipe) sends its errors, and then an answer for each request until that is None.
    """

    def __init__(self, name: str, published: bool, serve: Callable[..., None], *arguments: Any):
        self.name, spawn = name, multiprocessing.get_context("spawn")
        self.pipe, theirs = spawn.Pipe()
        self.process = spawn.Process(target=serve, args=(name, *arguments, theirs), daemon=True)
        with mock.patch.dict(os.environ, {} if published else for_pytorch(os.environ)):
            self.process.start()
        theirs.close()
        self.quality = self.answer()

    def answer(self) -> dict[str, Any]:
        """What it sent. Raises RuntimeError if it has died."""
        try:
            return self.pipe.recv()
        except (EOFError, ConnectionError):
            self.process.join()
            code = self.process.exitcode
            why = "for want of memory, most likely: compare fewer at a time (--only)" if code == -9 else f"with {code}"
            raise RuntimeError(f"the process of {self.name} ended {why}") from None

    def iterate(self, request: float) -> dict[str, Any]:
        """One iteration of this share of kept pairs; of a preference model's training one step of this seed."""
        with contextlib.suppress(ConnectionError):  # answer says why
            self.pipe.send(request)
        return self.answer()

    def end(self) -> None:
        self.pipe.send(None)
        self.process.join()


# ---------------------------------------------------------------------------------------------------- all of them


def spread(values: Sequence[float]) -> dict[str, float]:
    """Smallest, median and largest."""
    return {"min": min(values), "median": statistics.median(values), "max": max(values)}


def ratios(mine: Sequence[dict[str, Any]], theirs: Sequence[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Theirs over mine, turn by turn: of the iteration, its phases, its peak memory."""
    found = {"iteration": spread([b["cpu_s"] / a["cpu_s"] for a, b in zip(mine, theirs, strict=True)])}
    for phase in mine[0]["phases_s"]:
        if all(r["phases_s"].get(phase, 0.0) > 0 for r in (*mine, *theirs)):
            pairs = zip(mine, theirs, strict=True)
            found[phase] = spread([b["phases_s"][phase] / a["phases_s"][phase] for a, b in pairs])
    found["peak memory"] = spread([b["peak_mib"] / a["peak_mib"] for a, b in zip(mine, theirs, strict=True)])
    return found


def run(out: Path, size: str, names: Sequence[str], shares: Sequence[float], turns: int) -> list[dict[str, Any]]:
    """A record a contender and share; the first of `names` is what ratios are taken to."""
    records, written = Records(out, "cpu", size=size), []
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        first = multiprocessing.get_context("spawn").Process(target=write_truth, args=(size, scratch, out))
        first.start()
        first.join()
        # a type's errors are judged by the published strategy's in it
        for technique in (CONTENDERS[name] for name in names):
            shutil.copytree(scratch, scratch / technique.mixed_precision, ignore=lambda *_: TYPES, dirs_exist_ok=True)
        workers = {}
        for name in names:
            how = CONTENDERS[name]
            workers[name] = Worker(name, how.published, serve, size, scratch / how.mixed_precision, out)
        for share in shares:
            results: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
            for turn in range(turns + 1):  # the first warms up
                for name, worker in workers.items():
                    result = worker.iterate(share)
                    results[name] += [result] if turn else []
            for name, mine in results.items():
                written.append(
                    records.write(
                        f"{size}/{name}/v={share:g}",
                        dtype=CONTENDERS[name].mixed_precision,
                        cpu_s=spread([r["cpu_s"] for r in mine]),
                        phases_s={p: statistics.median(r["phases_s"][p] for r in mine) for p in mine[0]["phases_s"]},
                        peak_mib=max(r["peak_mib"] for r in mine),
                        peaks_mib={p: max(r["peaks_mib"][p] for r in mine) for p in mine[0]["peaks_mib"]},
                        ratio_to=names[0],
                        ratios=ratios(mine, results[names[0]]),
                        turns=turns,
                        pairs=mine[0]["pairs"],
                        **workers[name].quality,
                    )
                )
        for worker in workers.values():
            worker.end()
    return written


def summary(records: Sequence[dict[str, Any]]) -> str:
    """A line a contender and share."""
    rows: list[list[Any]] = [
        ["name", "CPU s", "iteration", "rollout", "reference", "backward", "peak MiB", "less", "gate"]
    ]
    for r in (r for r in records if "/v=" in r["name"]):
        cells = [
            "{min:.2f} {median:.2f} {max:.2f}".format(**r["ratios"][p]) if p in r["ratios"] else ""
            for p in ("iteration", "rollout", "reference", "backward")
        ]
        memory = f"{r['ratios']['peak memory']['median']:.2f}"
        rows.append([r["name"], r["cpu_s"]["median"], *cells, f"{r['peak_mib']:.0f}", memory, r["gate"]])
    return table(rows)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=KINDS, default="mid")
    parser.add_argument(
        "--only", nargs="+", choices=CONTENDERS, default=list(CONTENDERS), help="the first is compared with"
    )
    parser.add_argument(
        "--shares", nargs="+", type=float, default=[1.0, 0.5], metavar="V", help="of pairs that are kept"
    )
    parser.add_argument("--turns", type=int, default=5, help="iterations of each, after one that warms up")
    parser.add_argument("--out", type=Path, required=True, help="records")
    args = parser.parse_args(argv)
    before = len(read(args.out))
    run(args.out, args.size, args.only, args.shares, args.turns)
    print(summary(read(args.out)[before:]))


if __name__ == "__main__":
    main()
