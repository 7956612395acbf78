"""Why comparisons of steps teach aesthetics: what children of one x_t differ in by timestep, and what a judge sees.

    python -m benchmarks.mechanism            # both toys, a few CPU minutes: record, figure and table
    python -m benchmarks.mechanism --draw     # the figure and the table from the record

The base model draws K children of each x_t of the test prompts, at every step, and K whole trajectories of each prompt.
Their x0 estimates are scored by the world itself: how far layout and aesthetics spread among the K; how often the one
that the preference model calls best is better than the one it calls worst, in either (of those that differ); and the
share of pairs that the preset's threshold keeps.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.records import RESULTS
from spo_fast import train
from spo_fast.config.tables import markdown
from spo_fast.config.training import SampleConfig
from spo_fast.data import toy_world
from spo_fast.evaluation.statistics import estimate
from spo_fast.method.experience import Candidates, Text
from spo_fast.method.noise import KeyedDraws
from spo_fast.method.rollout import RolloutBatch, best_and_worst, rollout_segments, trajectory_rollout
from spo_fast.toy.claims import software
from spo_fast.toy.evaluate import NOISE
from spo_fast.training.loop import Run

RECORD, FIGURE = RESULTS / "toy_mechanism.json", RESULTS / "toy_mechanism.png"
K, ROUNDS = 4, 1  # children, and x_t of each prompt and step
FEW = 0.1  # of the pairs that differ: not drawn below
WHOLE = "whole trajectories"
TOYS = ("toy", "toy-flow")


@dataclass
class Watched:
    """In the scorer's place: its scores, and the world's true ones of the same x0 estimates, by timestep."""

    judge: Any
    prompts: list[str]
    seen: dict[float, list[Tensor]] = field(default_factory=dict)  # (3, K, B): judge, layout, aesthetics

    def __call__(self, candidates: Candidates) -> Tensor:  # (K B,)
        """The scorer's scores."""
        scores, shape = self.judge(candidates), (candidates.num_candidates, len(self.prompts))
        pixels = torch.cat([part for _, part in candidates.pixel_chunks()])
        layout = toy_world.layout(pixels, self.prompts * shape[0]).float().mean(1)
        three = torch.stack([scores.float(), layout, toy_world.aesthetics(pixels)])
        self.seen.setdefault(float(candidates.t), []).append(three.unflatten(1, shape))
        return scores


def told(three: Tensor, threshold: float) -> dict[str, Any]:  # (3, K, B)
    """Spread of layout and of aesthetics among the K; how often the judge's best beats its worst; share kept."""
    judge, *truths = three
    sides, kept = best_and_worst(judge, threshold)  # as training chooses
    found: dict[str, Any] = {"kept": list(estimate(kept.float()))}
    for name, truth in zip(("layout", "aesthetics"), truths, strict=True):
        best, worst = truth.gather(0, sides)
        gap = best - worst
        differ = gap[gap.abs() > 1e-6]
        found[name] = {"spread": list(estimate(truth.std(0))), "differ": len(differ) / len(gap)}
        found[name]["right"] = list(estimate((differ > 0).float())) if len(differ) > 1 else None
    return found


def seen(
    run: Run, cfg: SampleConfig, rollout: Callable[..., Any] = rollout_segments, rounds: int = ROUNDS
) -> dict[float, Tensor]:
    """(3, K, B): judge, layout and aesthetics of rollouts of the test prompts, always from one noise, by the timestep
    judged at, highest first."""
    prompts = toy_world.TEST
    text: Text = run.scorer.encode(prompts)
    scorer = Watched(run.scorer, prompts)
    for number in range(rounds):
        draws = KeyedDraws(number, NOISE - 1, torch.arange(len(prompts)))
        batch = RolloutBatch(run.model.cond(prompts), text, draws, run.model.latent_shape, run.model.latent_dtype)
        with torch.no_grad():
            rollout(replace(run.sampler, scorer=scorer, decode=run.model.decode, cfg=cfg), batch)
    return {t: torch.cat(scorer.seen[t], 2) for t in sorted(scorer.seen, reverse=True)}


def watch(run: Run) -> dict[str, Any]:
    """By timestep, highest first, and of whole trajectories what children differ in."""
    first = {"num_candidates": K, "branch_start": 0, "branch_end": None, "num_inner_steps": 0}
    cfg, threshold = run.cfg.with_fields(**first).sample, run.cfg.sample.threshold
    found = {f"{t:g}": told(three, threshold) for t, three in seen(run, cfg).items()}
    (whole,) = seen(run, cfg, trajectory_rollout).values()
    return {**found, WHOLE: told(whole, threshold)}


def measured() -> dict[str, Any]:
    """Of both toys, with the command and the software."""
    found: dict[str, Any] = {"command": "python -m benchmarks.mechanism", "children": K, **software()}
    for model in TOYS:
        with tempfile.TemporaryDirectory() as directory:
            found[model] = watch(train.build(train.parse(["--model", model, "--output_dir", directory])))
    return found


def table(record: Mapping[str, Any]) -> str:
    """A row a timestep and toy."""
    rows = [
        [
            "toy",
            "judged at t",
            *(f"{what} of {of}" for of in ("layout", "aesthetics") for what in ("spread", "best better in")),
            "pairs kept",
        ]
    ]
    for model in TOYS:
        for t, found in record[model].items():
            row = [model, t]
            for name in ("layout", "aesthetics"):
                right = found[name]["right"]
                row += [f"{found[name]['spread'][0]:.3f}", f"{right[0]:.2f} ± {right[1]:.2f}" if right else ""]
            rows.append([*row, f"{found['kept'][0]:.2f}"])
    return markdown(rows)


def draw(record: Mapping[str, Any], path: Path) -> None:
    """A row a toy: spreads, agreement and share kept by timestep; dashed: of whole trajectories."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(len(TOYS), 3, figsize=(11, 6), layout="constrained", sharex=True, squeeze=False)
    for row, model in zip(panels, TOYS, strict=True):
        whole, steps = record[model][WHOLE], {float(t): f for t, f in record[model].items() if t != WHOLE}
        for name, colour in (("layout", "C0"), ("aesthetics", "C1")):
            # aesthetics is of 10, a layout of 1
            scale = 10 if name == "aesthetics" else 1
            row[0].plot(list(steps), [f[name]["spread"][0] / scale for f in steps.values()], "o-", ms=3, label=name)
            row[0].axhline(whole[name]["spread"][0] / scale, color=colour, ls="--", lw=1)
            right = {t: f[name]["right"] for t, f in steps.items() if f[name]["differ"] > FEW}
            values, errors = zip(*((r[0], r[1]) for r in right.values()), strict=True)
            row[1].errorbar(list(right), values, errors, fmt="o-", ms=3, color=colour, label=name)
            if whole[name]["differ"] > FEW:
                row[1].axhline(whole[name]["right"][0], color=colour, ls="--", lw=1)
        row[2].plot(list(steps), [f["kept"][0] for f in steps.values()], "o-", ms=3, color="C2")
        row[2].axhline(whole["kept"][0], color="C2", ls="--", lw=1)
        row[1].axhline(0.5, color="#8888", lw=0.8, zorder=0)
        row[2].set_ylim(0, 1.05)
        row[0].set_ylabel(model)
        row[0].legend(frameon=False, fontsize=8)
    titles = "spread among children, share of its scale", "judge's best better than its worst in", "share of pairs kept"
    for axes, title, last in zip(panels[0], titles, panels[-1], strict=True):
        axes.set_title(title, fontsize=9)
        axes.invert_xaxis()
        last.set_xlabel("timestep judged at (dashed: whole trajectories)", fontsize=8)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--draw", action="store_true", help="measure nothing: the figure and the table of the record")
    if not parser.parse_args().draw:
        RECORD.write_text(json.dumps(measured(), indent=1) + "\n", encoding="utf-8")
    record = json.loads(RECORD.read_text(encoding="utf-8"))
    draw(record, FIGURE)
    print(table(record))


if __name__ == "__main__":
    main()
