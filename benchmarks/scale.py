"""How an iteration's time grows with the number of GPUs: simulated from measured phase times and link bandwidths.

    python -m benchmarks.scale RUN_DIR [--network_gb_s 50]      1 to 1,024 GPUs from a run's metrics.jsonl
    python -m benchmarks.scale RUN_DIR --against RUN_DIR_OF_W   the same for W processes, beside what they measured

Measured: the medians of a one-process run's phases. Assumed, and printed: the links. The batch of a GPU stays what it
was, so a perfect line is flat. Rollouts take equally long on every GPU up to their measured spread; valid pairs of a
prompt are independent, each valid with the measured share; with rebalancing a GPU trains on its even part of each
optimizer step's terms, without it all wait for the one that kept most.
"""

from __future__ import annotations

import argparse
import math
import statistics
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import yaml
from safetensors import safe_open

from spo_fast.metrics import read_metrics

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
        **{"rollout_s": slowest, "exchange_s": exchanged, "train_s": most * work.train_s, "all_reduce_s": reduce_s},
        **{"total_s": fixed + exchanged + most * work.train_s},
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
    row = next((run_dir / "prompt_cache").rglob("*.safetensors"), None)
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
        term_bytes=3 * latent + (row.stat().st_size if row else 0),
        gradient_bytes=weights * width,
    )


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("--against", type=Path, help="run directory of several processes with the same batch each")
    parser.add_argument("--processes", type=int, default=2, help="of --against")
    parser.add_argument("--cores_each", type=float, default=1.0, help="share of a core that each of --against had")
    for name in ("node_gb_s", "network_gb_s", "latency_us"):
        parser.add_argument(f"--{name}", type=float, default=getattr(Links, name))
    args = parser.parse_args()
    work = measured(args.run_dir)
    links = Links(node_gb_s=args.node_gb_s, network_gb_s=args.network_gb_s, latency_us=args.latency_us)
    print(f"measured: {work}\nassumed: {links}")
    if args.against is None:
        print(table(work, links))
        return
    slower = 1 / args.cores_each
    work = replace(work, rollout_s=slower * work.rollout_s, train_s=slower * work.train_s, step_s=slower * work.step_s)
    predicted, found = simulate(work, links, args.processes)["total_s"], iteration_s(args.against)
    alone, measured_alone = simulate(work, links, 1)["total_s"] / slower, iteration_s(args.run_dir)
    print(f"1 process: {alone:.3f} s predicted, {measured_alone:.3f} s measured")
    print(f"{args.processes} processes: {predicted:.3f} s predicted, {found:.3f} s measured")


if __name__ == "__main__":
    main()
