"""How an iteration's time grows with the number of GPUs: simulated from measured phase times and link bandwidths.

    python -m benchmarks.scale RUN_DIR [--network_gb_s 50]      1 to 1,024 GPUs from a run's metrics.jsonl
    python -m benchmarks.scale --check 1 2 4                    runs of the toy on so many gloo processes, beside what
                                                                the one-process run predicts of them

Measured: the medians of a one-process run's phases. Assumed, and printed: the links. The batch of a GPU stays what it
was, so a perfect line is flat. Rollouts take equally long on every GPU up to their measured spread; valid pairs of a
prompt are independent, each valid with the measured share; with rebalancing a GPU trains on its even part of each
optimizer step's terms, without it all wait for the one that kept most.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shlex
import socket
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from safetensors import safe_open

from spo_fast.evaluation.pages.run_record import read_metrics

SIZES = (1, 2, 4, 8, 16, 64, 256, 1024)
DRAWS = 200  # iterations simulated
IMAGES = {"toy": (16, 2), "sd15": (512, 8), "sdxl": (1024, 8)}  # side in pixels, pixels a latent


@dataclass(frozen=True)
class Work:
    """One GPU's part of an iteration."""

    rollout_s: float  # and its judgements
    spread: float  # of rollout_s between iterations, relative
    train_s: float  # of one term: its frozen prediction, forward and backward
    step_s: float  # of one optimizer step
    possible: int  # pairs, if every one is valid
    valid_share: float
    terms_per_step: int
    term_bytes: int  # that travel with a term
    gradient_bytes: int


@dataclass(frozen=True)
class Links:
    node_gb_s: float = 300.0  # between GPUs of a node, each way
    network_gb_s: float = 25.0  # between nodes, a GPU's part
    latency_us: float = 15.0  # of one message
    gpus_per_node: int = 8

    def gb_s(self, size: int) -> float:
        return self.node_gb_s if size <= self.gpus_per_node else self.network_gb_s


def all_reduce_s(size: int, num_bytes: float, links: Links) -> float:
    """A ring's volume, 2 (W - 1) / W of the bytes, and a tree's latency, 2 log2 W messages."""
    if size == 1:
        return 0.0
    volume = 2 * (size - 1) / size * num_bytes
    return volume / (links.gb_s(size) * 1e9) + 2 * math.log2(size) * links.latency_us * 1e-6


def exchange_s(size: int, num_bytes: float, links: Links) -> float:
    """All but a W-th of a GPU's terms go elsewhere; W - 1 messages."""
    if size == 1:
        return 0.0
    return (size - 1) / size * num_bytes / (links.gb_s(size) * 1e9) + (size - 1) * links.latency_us * 1e-6


def simulate(work: Work, links: Links, size: int, seed: int = 0) -> dict[str, float]:
    """Mean seconds of an iteration by part, on `size` GPUs; unbalanced_s: the whole without rebalancing."""
    draw = np.random.default_rng(seed)
    slowest = work.rollout_s * (1 + work.spread * draw.standard_normal((DRAWS, size)).max(1).clip(-1).mean())
    pairs = draw.binomial(work.possible, work.valid_share, (DRAWS, size))
    steps = np.maximum(1, np.round(pairs.sum(1) / (work.terms_per_step * size)))
    # the largest part of each step, ceil of an even share
    most = (np.ceil(pairs.sum(1) / steps / size) * steps).mean()
    reduce_s = steps.mean() * all_reduce_s(size, work.gradient_bytes, links)
    exchanged = exchange_s(size, pairs.mean() * work.term_bytes, links)
    fixed = slowest + steps.mean() * work.step_s + reduce_s
    return {
        "rollout_s": slowest,
        "exchange_s": exchanged,
        "train_s": most * work.train_s,
        "all_reduce_s": reduce_s,
        "total_s": fixed + exchanged + most * work.train_s,
        "steps": steps.mean(),
        "most_terms": most,
        "exchanged_bytes": (size - 1) / size * pairs.mean() * work.term_bytes,
        "unbalanced_s": fixed + pairs.max(1).mean() * work.train_s,
    }


def measured(run_dir: Path, skip: int = 1) -> Work:
    """From a one-process run's log and settings; its first iterations, which warm up, are left out."""
    records = [r for r in read_metrics(run_dir / "metrics.jsonl")[skip:] if r["pairs"]]
    cfg = yaml.safe_load((run_dir / "config.yaml").read_text())
    median = statistics.median

    def phase(name: str) -> list[float]:
        return [r.get(f"{name}_ms", 0.0) / 1000 for r in records]

    rollouts = [a + b for a, b in zip(phase("rollout"), phase("score"), strict=True)]
    trained = [(a + b) / r["pairs"] for a, b, r in zip(phase("reference"), phase("backward"), records, strict=True)]
    steps = [
        1 + r["optimizer_steps"] - before["optimizer_steps"] for before, r in zip(records, records[1:], strict=False)
    ]
    last = max(run_dir.glob("checkpoint-*"), key=lambda p: int(p.name.split("-")[1]))
    with safe_open(last / "trained.safetensors", "pt") as f:
        slices = [f.get_slice(name) for name in f.keys()]  # noqa: SIM118
        weights = sum(math.prod(s.get_shape()) for s in slices)
        width = 8 if slices[0].get_dtype() == "F64" else 4
    shard = next((run_dir / "prompt_cache").rglob("*.safetensors"), None)
    row = 0 if shard is None else shard.stat().st_size // held(shard)
    pixels, factor = IMAGES[cfg["model"]]
    latent = 4 * ((cfg["height"] or pixels) // factor) * ((cfg["width"] or pixels) // factor) * width
    return Work(
        rollout_s=median(rollouts),
        spread=statistics.pstdev(rollouts) / median(rollouts) if len(rollouts) > 1 else 0.0,
        train_s=median(trained),
        step_s=median(phase("step")) / max(1, median(steps) - 1 if steps else 1),
        possible=round(median(r["pairs"] / r["valid_share"] for r in records)),
        valid_share=statistics.fmean(r["valid_share"] for r in records),
        terms_per_step=cfg["train_batch_size"] * cfg["gradient_accumulation_steps"],
        term_bytes=3 * latent + row,
        gradient_bytes=weights * width,
    )


def held(shard: Path) -> int:
    """Prompts of a file of the cache."""
    with safe_open(shard, "pt") as f:
        return len(json.loads(f.metadata()["keys"]))


def table(work: Work, links: Links, sizes: tuple[int, ...] = SIZES) -> str:
    one = simulate(work, links, 1)["total_s"]
    lines = ["| GPUs | iteration s | efficiency | exchange ms | all-reduce ms | without rebalancing |"]
    lines.append("|---|---|---|---|---|---|")
    for size in sizes:
        t = simulate(work, links, size)
        cells = [f"{size}", f"{t['total_s']:.3f}", f"{one / t['total_s']:.1%}", f"{1000 * t['exchange_s']:.2f}"]
        cells += [f"{1000 * t['all_reduce_s']:.2f}", f"{t['unbalanced_s'] / t['total_s']:.2f}x"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def iteration_s(run_dir: Path, skip: int = 1) -> float:
    """Median of what a run's own log says of an iteration: its phases but grids and checkpoints."""
    records = [r for r in read_metrics(run_dir / "metrics.jsonl")[skip:] if r["pairs"]]
    phases = ("rollout", "score", "reference", "backward", "step")
    return statistics.median(sum(r.get(f"{p}_ms", 0.0) for p in phases) / 1000 for r in records)


# ---------------------------------------------------------------------------------------------------- real processes

TOY = shlex.split(
    "--model toy --num_steps 6 --branch_start 2 --num_candidates 2 --sample_batch_size 4 --threshold -1 --resolution 8 "
    "--max_prompts 16 --num_train_epochs 100 --num_validation_images 0 --train_batch_size 4 --checkpointing_steps 100 "
    "--gradient_accumulation_steps 2"
)


def counted_process(told: Path, line: list[str]) -> int:
    """A training process that writes down what it hands to the others: one JSON object."""
    from spo_fast import train
    from spo_fast.training import learner, processes

    sent: dict[str, list[int]] = {"gradients": [], "exchanged": [], "terms": []}

    def count(owner: Any, name: str, into: str, amount: Callable[..., int | None]) -> None:
        whole = getattr(owner, name)

        def call(self: Any, *args: Any) -> Any:
            if (n := amount(self, *args)) is not None:
                sent[into].append(n)
            return whole(self, *args)

        setattr(owner, name, call)

    def others(group: Any, parts: list[Any]) -> int:
        return sum(part.nbytes for rank, part in enumerate(parts) if rank != group.rank)

    group = processes.Group
    # an all-reduce of one tensor is of statistics
    count(group, "add", "gradients", lambda _, tensors: sum(t.nbytes for t in tensors) if len(tensors) > 1 else None)
    count(group, "exchange", "exchanged", others)
    count(learner.Learner, "update", "terms", lambda _, experience, *rest: len(experience))
    status = train.main(line)
    told.write_text(json.dumps(sent))
    return status


def run_processes(root: Path, size: int, iterations: int) -> tuple[Path, list[dict[str, list[int]]]]:
    """A run of the toy on so many gloo processes; its directory, and what each process wrote down."""
    out = root / f"of-{size}"
    line = [*TOY, "--max_train_steps", str(iterations), "--output_dir", str(out)]
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        environment = {**os.environ, "MASTER_PORT": str(s.getsockname()[1]), "MASTER_ADDR": "127.0.0.1"}
    environment |= {"OMP_NUM_THREADS": "1", "WORLD_SIZE": str(size)}
    told = [root / f"{size}-{rank}.json" for rank in range(size)]
    started = [
        subprocess.Popen(
            [sys.executable, "-m", "benchmarks.scale", "--counted", str(told[rank]), "--", *line],
            env={**environment, "RANK": str(rank)},
            stdout=subprocess.DEVNULL,
        )
        for rank in range(size)
    ]
    assert [p.wait() for p in started] == [0] * size
    return out, [json.loads(path.read_text()) for path in told]


@dataclass(frozen=True)
class Checked:
    """What was predicted and what was counted or measured, of one iteration."""

    size: int
    all_reduces: tuple[float, float]
    all_reduce_bytes: tuple[int, int]  # each
    most_terms: tuple[float, float]  # trained on by one process
    exchanged_bytes: tuple[float, float]  # that leave a process, on average
    seconds: tuple[float, float]


def check(root: Path, sizes: Sequence[int], iterations: int = 8, cores: int | None = None) -> Iterator[Checked]:
    """Runs of 1 and of each size. Processes that share cores are predicted to take turns."""
    cores = cores or len(os.sched_getaffinity(0))
    links = Links(node_gb_s=1.0, latency_us=200.0)  # gloo on one machine, assumed
    work: Work | None = None
    for size in (1, *(size for size in sizes if size > 1)):
        run_dir, counted = run_processes(root, size, iterations)
        work = work or measured(run_dir)
        turns = max(1.0, size / cores)
        t = simulate(work, links, size)
        computed = t["rollout_s"] + t["train_s"] + t["steps"] * work.step_s
        seconds = turns * computed + t["exchange_s"] + t["all_reduce_s"]
        reduced = counted[0]["gradients"]
        yield Checked(
            size,
            (t["steps"] if size > 1 else 0, len(reduced) / iterations),
            (work.gradient_bytes if size > 1 else 0, max(reduced, default=0)),
            (t["most_terms"], max(sum(c["terms"]) for c in counted) / iterations),
            (t["exchanged_bytes"], statistics.fmean(sum(c["exchanged"]) for c in counted) / iterations),
            (seconds, iteration_s(run_dir)),
        )


def check_table(rows: Iterable[Checked], cores: int) -> Iterator[str]:
    heads = ("all-reduces", "bytes of each", "terms of the busiest", "KiB that leave a process")
    yield f"| processes on {cores} cores | " + " | ".join(f"{h}: predicted, counted" for h in heads) + " | s | ratio |"
    yield "|" + "---|" * 7
    for c in rows:
        cells = ["{:g}, {:g}".format(*pair) for pair in (c.all_reduces, c.all_reduce_bytes, c.most_terms)]
        cells.append("{:.1f}, {:.1f}".format(*(n / 1024 for n in c.exchanged_bytes)))
        cells.append("{:.3f}, {:.3f} measured | {:.2f}".format(*c.seconds, c.seconds[1] / c.seconds[0]))
        yield f"| {c.size} | " + " | ".join(cells) + " |"


def main() -> None:
    if sys.argv[1:2] == ["--counted"]:
        sys.exit(counted_process(Path(sys.argv[2]), sys.argv[4:]))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run_dir", type=Path, nargs="?")
    parser.add_argument("--check", type=int, nargs="+", help="numbers of real processes")
    for name in ("node_gb_s", "network_gb_s", "latency_us"):
        parser.add_argument(f"--{name}", type=float, default=getattr(Links, name))
    args = parser.parse_args()
    if args.check:
        cores = len(os.sched_getaffinity(0))
        with tempfile.TemporaryDirectory() as root:
            for row in check_table(check(Path(root), args.check), cores):
                print(row, flush=True)
        return
    if args.run_dir is None:
        parser.error("a RUN_DIR or --check is needed")
    work = measured(args.run_dir)
    links = Links(node_gb_s=args.node_gb_s, network_gb_s=args.network_gb_s, latency_us=args.latency_us)
    print(f"measured: {work}\nassumed: {links}")
    print(table(work, links))


if __name__ == "__main__":
    main()
