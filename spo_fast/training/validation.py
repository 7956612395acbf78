"""Held-out scores and grids of a run."""

from __future__ import annotations

import math
import statistics
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from spo_fast.config.fields import parted
from spo_fast.config.scorers import TRUE_SCORES, scorer_specs
from spo_fast.config.training import Config
from spo_fast.data.files import read_json
from spo_fast.data.prompt_sets import geneval_records
from spo_fast.evaluation.looks import LOOKS, hacking_signs
from spo_fast.scorers.geneval import check_wanted


class Validation(NamedTuple):
    """What the validation pictures of some weights were measured at."""

    score: float | None  # by the scorer that is trained on, the mean; None, read back, was not finite
    values: dict[str, list[float]]  # held-out metric or look -> of each picture, prompt after prompt
    of: dict[str, Any]  # shown_settings: only validations of the same can be compared

    @classmethod
    def read(cls, file: Path) -> Validation:
        kept = read_json(file)
        values = {name: [math.nan if v is None else v for v in them] for name, them in kept["values"].items()}
        return cls(kept["score"], values, kept.get("of", {}))

    def record(self, metrics: list[str], before: Validation | None, seed: int) -> dict[str, Any]:
        """As it is logged. Looks are logged against those before training, with the signs of reward hacking there."""
        found: dict[str, Any] = {"validation_score": self.score}
        found |= {f"held_out_{name}": self.mean(name) for name in metrics}
        if before is not None:
            found |= {f"look_{name}": self.mean(name) / mean for name in LOOKS if (mean := before.mean(name)) > 0}
            found["hacking"] = "; ".join(hacking_signs(before.by_prompt(), self.by_prompt(), seed).values())
        return found

    def words(self, metrics: list[str], before: Validation | None) -> str:
        """Score and held-out metrics, each with what it was before training."""

        def text(name: str, now: float | None, was: float | None) -> str:
            if now is None or was is None:
                return f"{name} not finite" if now is None else f"{name} {now:.3f}"
            return f"{name} {was:.3f} -> {now:.3f} ({now - was:+.3f})"

        old = before or Validation(None, {}, {})
        held_out = [text(f"held-out {m}", self.mean(m), old.mean(m) if m in old.values else None) for m in metrics]
        return ", ".join([text("score", self.score, old.score), *held_out])

    def mean(self, name: str) -> float:
        return statistics.fmean(self.values[name])

    def by_prompt(self) -> dict[str, np.ndarray]:
        """Look -> its mean over each prompt's pictures, which are no independent samples."""
        count = len(self.of["prompts"])
        return {name: np.array(self.values[name]).reshape(count, -1).mean(1) for name in LOOKS}


def held_out_metrics(cfg: Config, prompts: list[str]) -> list[str]:
    if cfg.run.validation_metrics or cfg.model.model != "toy":
        return parted(cfg.run.validation_metrics)
    from spo_fast.data import toy_world

    whole = all(side in (None, toy_world.SIZE) for side in (cfg.model.height, cfg.model.width))
    return list(TRUE_SCORES) if whole and set(prompts) <= set(toy_world.CAPTIONS) else []


def wanted_by(cfg: Config, prompts: list[str]) -> dict[str, dict[str, Any]] | None:
    """What GenEval looks for, if it judges. Raises ValueError for a prompt of which that is not known."""
    in_training = "geneval" in dict(scorer_specs(cfg.scorer.scorer))
    if not in_training and "geneval" not in parted(cfg.run.validation_metrics):
        return None
    wanted = geneval_records(cfg.data.prompts)
    check_wanted([*(prompts if in_training else ()), *cfg.run.validation_prompt], wanted)
    return wanted
