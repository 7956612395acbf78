"""Both calls of gpu_run.py on a null GPU: caches filled and packed, then every job again from the pack, timed.

    make nullgpu
    .venv-nullgpu/bin/python -m benchmarks.gpu_rehearsal --work DIR [--call 1] [--only NAME ...]

On a null GPU kernels do nothing, so all seconds are the host's; the device's are estimated from counted FLOPs, and said
to be. The first pass compiles what WORK/cache lacks (long, once), the second starts from what travels, unpacked
elsewhere: what it compiles again would be compiled on the GPU, too. .venv-nullgpu has the PyTorch, Triton and Python
of the GPU's machine (nullgpu/requirements.txt).
"""

from __future__ import annotations

import argparse
import json
import shutil
import tarfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

from benchmarks import gpu_pack, gpu_run
from benchmarks.nullgpu.ledger import DEVICE, start
from benchmarks.records import read, table

COMPUTE_TFLOPS = {"eager": 240.0, "compiled": 320.0, "float32": 40.0}
"""Assumed, not measured: 30 and 40 % of the 790 TFLOP/s that a bf16 product reaches on an H200; 60 % of fp32's peak."""
TESTS_S, TIMED_S = 40.0, 0.2
"""Assumed: the tests' seconds, eight at a time, with what they compile; and those of one contender of one case
(warm-up and repetitions, alone and in a graph; inputs and float64 truth)."""

# ---------------------------------------------------------------------------------------------------- the null GPU


class Share:
    """Of the comparisons, how many are kept: what the row that runs asks for."""

    value = 1.0

    def __mul__(self, comparisons: int) -> float:
        return self.value * comparisons


def use_null_gpu() -> None:
    """What the host would read from a device that computes nothing is answered from the host."""
    gpu_run.import_libraries("cuda")
    import torch

    from benchmarks import iteration, published
    from benchmarks.nullgpu import patches
    from benchmarks.nullgpu.ledger import Ledger

    share: Any = Share()
    patches.apply(Ledger(), share)
    scripted, evaluate, train = (
        iteration.Decisions.scripted,
        iteration.Published.evaluate,
        published.PublishedLoop.train,
    )

    def scripted_with_share(cfg: Any, valid_share: float, device: str) -> Any:
        share.value = valid_share
        return scripted(cfg, valid_share, device)

    def compare(self: Any, scores: Any, threshold: float) -> tuple[Any, Any]:  # sides (2, B), valid (B,)
        best = scores.sort(0, descending=True)[1][[0, -1]]
        valid = torch.arange(best.shape[1]) < share * best.shape[1]
        scores.cpu()  # the read
        return best, valid

    def levels(self: Any, t: Any, like: Any) -> tuple[Any, Any, Any]:
        if t.ndim == 0:
            t.cpu(), t.cpu()  # noqa: B018  # an index of one number is read, twice
        alpha = self.alphas[:1].view(-1, *[1] * (like.ndim - 1))  # of any step
        variance = (1 - alpha) / (1 - alpha) * (1 - alpha / alpha)
        return alpha, alpha, self.cfg.sample.eta * variance**0.5

    def train_on_device(self: Any, pairs: dict[str, Any]) -> Any:
        return train(self, {**pairs, "prompts": pairs["prompts"].to(self.device)})

    def evaluate_to_something(self: Any, pairs: Any) -> Any:
        found = evaluate(self, pairs)  # all zeros, and a truth of norm 0 is refused
        return replace(found, gradients={name: g + 1 for name, g in found.gradients.items()})

    iteration.Decisions.scripted = staticmethod(scripted_with_share)  # type: ignore[assignment]
    iteration.Published.evaluate = evaluate_to_something  # type: ignore[method-assign]
    published.PublishedLoop._compare = compare  # type: ignore[method-assign]
    published.PublishedLoop.train = train_on_device  # type: ignore[method-assign]
    published.PublishedLoop._levels = levels  # type: ignore[method-assign]


def run_call(work: Path, cache: Path, call: int, only: Sequence[str], size: str, name: str) -> list[dict[str, Any]]:
    """The call's jobs without a limit of time. The pass `fill` runs only what compiles, and once."""
    out = work / f"{name}{call}"
    shutil.rmtree(out, ignore_errors=True)
    asked, fills = gpu_run.chosen(only), name == "fill"
    planned = gpu_run.CALLS[call]
    # tests would compare zeros
    jobs = [job for job in (*planned.jobs, *planned.spare) if job in asked and job != "tests"]
    if fills:
        jobs = [job for job in jobs if "/ours+" in job or job.startswith("ops") or job.endswith(("-spo", "-lpo"))]
    patient = {stage: {n: replace(j, limit_s=20_000.0) for n, j in js.items()} for stage, js in gpu_run.STAGES.items()}
    calls = {n: replace(c, repetitions=1 if fills else c.repetitions) for n, c in gpu_run.CALLS.items()}
    words = [
        "--out",
        str(out),
        "--call",
        str(call),
        "--cache",
        str(cache),
        "--budget_s",
        "100000",
        "--size",
        size,
        "--only",
        *jobs,
    ]
    with mock.patch.multiple(gpu_run, STAGES=patient, CALLS=calls):
        return gpu_run.run_all(gpu_run.parse(words)) if jobs else []


# ---------------------------------------------------------------------------------------------------- the device's time


def device_seconds(job: str, records: Sequence[Mapping[str, Any]]) -> float | None:
    """Estimated from the counted FLOPs of what the job's records say it did; None where nothing counts it."""
    stage, _, row = job.partition("/")
    if stage in ("sd15", "sdxl"):
        return row_seconds(stage, row, records)
    if stage in ("ops", "libraries", "ceilings", "graph"):
        return TIMED_S * sum("p50_ms" in r or r["status"] == "failed" for r in records)
    kind, name = row.split("-")
    if name == "spo":
        return sum(row_seconds(kind, row, records, warm_up=1) for row in ("published", "ours+all"))
    return hours_seconds(kind, name, records)


def row_seconds(kind: str, row: str, records: Sequence[Mapping[str, Any]], warm_up: int | None = None) -> float:
    """Parity's eight states and the iterations, the warm-up ones too."""
    from benchmarks import gpu_hours

    costs = gpu_hours.call_costs(kind)
    how = "float32" if row == "truth" else "compiled" if row.startswith(("ours+a", "ours+c", "ours+g")) else "eager"
    evaluated = gpu_hours.step_loss_calls(4, recomputed=False)
    if row == "truth":
        evaluated["unet with LoRA"] += 16  # children are drawn first
    tflop = sum(n * costs[name] for name, n in evaluated.items()) / 1e12
    for r in (r for r in records if r["name"].startswith(f"{kind}/{row}/v=")):
        calls = dict(gpu_hours.spo_calls(gpu_hours.published_config(kind, "spo"), float(r["name"].split("=")[1])))
        rows = 4 * r["pairs"] - 2 * r["states"] if r.get("states") else 0  # a shared x_t is one state
        calls |= {name: calls[name] - rows for name in ("unet", "unet with LoRA", "backward to LoRA")}
        warm_ups = 2 if row.startswith(("ours+a", "ours+g")) else 1
        tflop += (r["n"] + warm_ups) * sum(n * costs[name] for name, n in calls.items()) / 1e12
    return tflop / COMPUTE_TFLOPS[how]


def hours_seconds(kind: str, name: str, records: Sequence[Mapping[str, Any]]) -> float:
    from benchmarks import gpu_hours

    costs, tflop = gpu_hours.call_costs(kind), 0.0
    for r in records:
        if "pairs" in r:  # a step's warm-up and repetitions, alone and before an optimizer's step
            tflop += 2 * (r["n"] + 1) * r["pairs"] * costs[name] / 1e12
        elif "/lpo/v=" in r["name"]:
            calls = dict(gpu_hours.lpo_calls(gpu_hours.published_config(kind, "lpo"), float(r["name"].split("=")[1])))
            shared = calls["unet"] / 2  # x_t is shared by both sides of every pair
            calls |= {n: calls[n] - shared for n in ("unet", "unet with LoRA", "backward to LoRA")}
            tflop += (r["n"] + 0.5) * sum(n * costs[call] for call, n in calls.items()) / 1e12
    return tflop / COMPUTE_TFLOPS["eager"]


# ---------------------------------------------------------------------------------------------------- both passes


def compare(call: int, records: Sequence[dict[str, Any]]) -> str:
    """A line a job: the host's seconds as the null GPU took them, the device's as estimated, their sum so far."""
    heads = ["call", "job", "status", "host CPU s", "compiled again", "device s (estimated)", "both, so far"]
    rows: list[list[Any]] = [[*heads]]
    mine: list[dict[str, Any]] = []
    total = 0.0
    if "tests" in gpu_run.CALLS[call].jobs:
        total = TESTS_S
        rows.append([call, "tests", "not run", "", "", f"{TESTS_S:.0f}, assumed", f"{total:.0f}"])
    for r in records:
        if not r["name"].startswith("job "):
            mine.append(r)
            continue
        name = r["name"].removeprefix("job ")
        device = device_seconds(name, mine) or 0.0
        total += r.get("cpu_s", 0.0) + device
        again = " ".join(f"{count} {what}" for what, count in r.get("compiled", {}).items() if count)
        if r["status"] == "skipped":
            continue
        cells: list[Any] = [call, name, r["status"], f"{r.get('cpu_s', 0.0):.1f}", again or "nothing"]
        rows.append([*cells, f"{device:.0f}", f"{total:.0f}"])
        mine = []
    return table(rows)


def keep_jobs(call: int, records: Sequence[Mapping[str, Any]], path: Path) -> None:
    """How long each job took the host, appended; what it timed is left out, as times of a device that did nothing."""
    with path.open("a") as file:
        for r in (r for r in records if r["name"].startswith("job ")):
            told = {name: value for name, value in r.items() if name not in ("error", "command")}
            file.write(json.dumps({**told, "call": call, "device": DEVICE}) + "\n")


def unpack() -> None:
    """The pack's caches where the GPU's machine will have them."""
    shutil.rmtree(gpu_pack.UNPACKED, ignore_errors=True)
    with tarfile.open(gpu_pack.PACK / "cache.tar.xz") as tar:
        tar.extractall(gpu_pack.UNPACKED, filter="data")


def main(argv: Sequence[str] | None = None) -> None:
    start()
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--work", type=Path, required=True, help="caches, records and logs of the passes")
    parser.add_argument("--call", type=int, nargs="+", default=list(gpu_run.CALLS))
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", help="of the calls' jobs")
    parser.add_argument("--size", choices=("full", "tiny"), default="full", help="tiny: whether it all runs")
    parser.add_argument("--wheels", nargs="*", default=gpu_pack.WHEELS, metavar="NAME==VERSION")
    args = parser.parse_args(argv)
    work = args.work.resolve()
    use_null_gpu()
    only = args.only or list(gpu_run.STAGES)
    for call in args.call:
        run_call(work, work / "cache", call, only, args.size, "fill")
    gpu_pack.main(["--cache", str(work / "cache"), "--wheels", *args.wheels])
    unpack()
    for call in args.call:
        run_call(work, gpu_pack.UNPACKED, call, only, args.size, "timed")
    for call in args.call:
        found = read(work / f"timed{call}" / "records.jsonl")
        keep_jobs(call, found, work / "rehearsal.jsonl")
        print(compare(call, found), end="\n\n")


if __name__ == "__main__":
    main()
