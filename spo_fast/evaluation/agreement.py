"""How often preference models agree with people on held-out pairs, at each noise level, and how far to trust them."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from spo_fast.config.tables import markdown
from spo_fast.data.files import without_nan, write_atomically
from spo_fast.evaluation.statistics import Estimate, estimate, shown

BINS = 10
SHOWN = 10  # pairs a bin must have to be drawn


class Judgements:
    """Score differences of contenders on the same pairs. Ties have no right answer and are left out of everything."""

    def __init__(self, timesteps: list[int]) -> None:
        self.timesteps = timesteps
        self._margins: dict[tuple[str, int], list[Tensor]] = {}  # score of the preferred image minus the other's

    def add(
        self,
        name: str,
        timestep: int,
        scores: Tensor,  # (2, B)
        labels: Tensor,  # (B,) of the first image
    ) -> None:
        """What a model says of B pairs at a timestep. Ties of the labels teach nothing about it and are left out."""
        decided = labels != 0.5
        margins = ((scores[0] - scores[1]) * (labels - 0.5).sign())[decided]  # labels may be shares of opinions
        self._margins.setdefault((name, timestep), []).append(margins.double())

    @property
    def names(self) -> list[str]:
        """The models, in the order in which they came."""
        return list(dict.fromkeys(name for name, _ in self._margins))

    def measured(self, name: str) -> list[int]:
        """The timesteps at which a model has judged."""
        return [t for t in self.timesteps if (name, t) in self._margins]

    def margins(self, name: str, timestep: int | None = None) -> Tensor:
        """(n,) at a timestep, or of all timesteps."""
        keys = [timestep] if timestep is not None else self.measured(name)
        return torch.cat([m for t in keys for m in self._margins[name, t]])

    def right(self, name: str, timestep: int) -> Tensor:  # (n,) 1 right, 0 wrong, 0.5 undecided
        """Of each pair."""
        return self.margins(name, timestep).sign() / 2 + 0.5

    def accuracy(self, name: str, timestep: int) -> Estimate:
        """The share of pairs that a model has right."""
        return estimate(self.right(name, timestep))

    def gain(self, name: str, over: str, timestep: int) -> Estimate:
        """Difference of accuracy, paired: both judged the same images at the same noise."""
        return estimate(self.right(name, timestep) - self.right(over, timestep))

    def calibration(self, name: str) -> list[tuple[float, float, int]]:
        """Over all timesteps, by how sure the model is: (mean probability of its choice, share right, pairs) a bin."""
        margins = self.margins(name)
        sure, right = margins.abs().sigmoid(), margins.sign() / 2 + 0.5
        place = ((sure - 0.5) * 2 * BINS).long().clamp(0, BINS - 1)
        bins = [(sure[place == b], right[place == b]) for b in range(BINS)]
        return [(float(s.mean()), float(r.mean()), len(s)) for s, r in bins if len(s)]

    def calibration_error(self, name: str) -> float:
        """Expected calibration error: |probability - share right| averaged over pairs (arXiv 1706.04599)."""
        bins = self.calibration(name)
        return sum(abs(p - r) * n for p, r, n in bins) / (sum(n for _, _, n in bins) or math.nan)

    def log_loss(self, name: str) -> float:
        """Mean -log of the probability given to people's choice, nats; a coin's is 0.693."""
        return float(torch.nn.functional.softplus(-self.margins(name)).mean())

    def table(self) -> str:
        """Markdown: accuracy by timestep and model, each with its standard error; then calibration."""
        names, first = self.names, self.names[0]
        rows = [["t", "pairs", *names, *(f"{first} - {name}" for name in names[1:])]]
        for t in self.timesteps:
            cells = [self.accuracy(n, t).text() for n in names if t in self.measured(n)]
            gains = [self.gain(first, name, t) for name in names[1:] if t in self.measured(first)]
            if cells:
                count = self.accuracy(first, t).pairs
                rows.append([str(t), str(count), *cells, *(e.text("+") for e in gains)])
        text = markdown(rows)
        rows = [["", *names]]
        rows.append(["log loss (coin: 0.693)", *(shown(self.log_loss(n)) for n in names)])
        rows.append(["calibration error", *(shown(self.calibration_error(n)) for n in names)])
        return f"Agreement with people on held-out pairs (ties left out):\n\n{text}\n\n{markdown(rows)}\n"

    def to_json(self) -> dict[str, Any]:
        """Everything that the report says."""
        names, first = self.names, self.names[0]
        return {
            "accuracy": {n: {t: self.accuracy(n, t) for t in self.measured(n)} for n in names},
            "gain": {n: {t: self.gain(first, n, t) for t in self.measured(n)} for n in names[1:]},
            "log_loss": {n: self.log_loss(n) for n in self.names},
            "calibration_error": {n: self.calibration_error(n) for n in self.names},
            "calibration": {n: self.calibration(n) for n in self.names},
        }


def write_report(judgements: Judgements, run_dir: Path) -> str:
    """evaluation.json, evaluation.md and evaluation.png; returns the table."""
    table = judgements.table()
    write_atomically(run_dir / "evaluation.json", json.dumps(without_nan(judgements.to_json()), indent=1) + "\n")
    write_atomically(run_dir / "evaluation.md", table)
    plot(judgements, run_dir / "evaluation.png")
    return table


def plot(judgements: Judgements, path: Path) -> None:
    """Left: accuracy against timestep. Right: reliability, the share right against the probability claimed."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.8), layout="constrained")
    left, right = figure.subplots(1, 2)
    for name in judgements.names:
        times = judgements.measured(name)
        points = [judgements.accuracy(name, t) for t in times]
        left.errorbar(times, [p.mean for p in points], [p.error for p in points], marker="o", capsize=3, label=name)
        bins = [(p, r, n) for p, r, n in judgements.calibration(name) if n >= SHOWN]
        errors = [math.sqrt(r * (1 - r) / n) for _, r, n in bins]
        right.errorbar([p for p, _, _ in bins], [r for _, r, _ in bins], errors, marker="o", capsize=3, label=name)
    left.axhline(0.5, color="grey", linestyle=":")
    left.set(xlabel="timestep", ylabel="agreement with people", title="held-out pairs, one standard error")
    left.legend()
    right.plot([0.5, 1], [0.5, 1], color="grey", linestyle=":")
    right.set(xlabel="probability of the preferred image", ylabel="share right", title="calibration, all timesteps")
    temporary = path.with_name(f".{path.name}")
    figure.savefig(temporary, format="png", dpi=110)
    temporary.replace(path)
