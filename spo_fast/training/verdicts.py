"""What validations measured, and what their held-out scores decide: an early end, and which weights are the best.

Values are paired: the pictures of all validations are of the same prompts and noise. "Beyond chance" is a 95 %
interval of the mean difference that lies below 0, over the prompts (Validation.change), as all intervals of a run are.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import statistics
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, TypedDict

import numpy as np
import numpy.typing as npt

from spo_fast.config.errors import RunError, did_you_mean
from spo_fast.data.files import read_json, set_aside, without_nan, write_atomically
from spo_fast.evaluation.image_statistics import IMAGE_STATISTICS, hacking_signs
from spo_fast.evaluation.statistics import Interval, mean_interval

if TYPE_CHECKING:
    from spo_fast.config.run import RunConfig

LEAST_PROMPTS = 8  # fewer have no interval worth the name
BEST = "best"


class Shown(TypedDict, total=False):
    """What validation pictures and their score depend on beside the weights, as JSON has it."""

    prompts: list[str]
    num_validation_images: int
    seed: int
    num_steps: int
    guidance_scale: float
    latents: list[int]
    scorer: list[str]
    embedded_guidance: float
    max_sequence_length: int
    t5_weights: str
    size_told: str


class Validation(NamedTuple):
    """What the validation pictures of some weights were measured at."""

    score: float | None  # by the scorer that is trained on, the mean; None, read back, was not finite
    values: dict[str, list[float]]  # score, held-out metric or look -> of each picture, prompt after prompt
    of: Shown  # only validations of the same can be compared

    @classmethod
    def read(cls, file: Path) -> Validation:
        """One that was kept as JSON, where None stands for NaN."""
        kept = read_json(file)
        values = {name: [math.nan if v is None else v for v in them] for name, them in kept["values"].items()}
        return cls(kept["score"], values, kept.get("of", {}))

    def record(self, metrics: list[str], before: Validation | None, seed: int) -> dict[str, object]:
        """As it is logged. Image statistics stand against those before training, with signs of reward hacking there."""
        found: dict[str, object] = {"validation_score": self.score}
        found |= {f"held_out_{name}": self.mean(name) for name in metrics}
        if before is not None:
            found |= {
                f"look_{name}": self.mean(name) / mean for name in IMAGE_STATISTICS if (mean := before.mean(name)) > 0
            }
            found["hacking"] = "; ".join(hacking_signs(before.looks(), self.looks(), seed).values())
        return found | self.intervals(metrics, before)

    def change(self, name: str, since: Validation | None) -> Interval:
        """Of a metric or look since other weights' pictures, or its value, with the 95 % interval over the prompts."""
        return mean_interval(self.by_prompt(name) - (0.0 if since is None else since.by_prompt(name)))

    def intervals(self, metrics: list[str], before: Validation | None) -> dict[str, float]:
        """half_<field> of `record`: half of the interval of its `change` since before training, or of its value where
        that is not on record. And of how many prompts and pictures they are. None of one prompt."""
        old = {} if before is None else before.values
        fields = {"score": "validation_score"} | {name: f"held_out_{name}" for name in metrics}
        fields |= {name: f"look_{name}" for name in IMAGE_STATISTICS if name in old}
        found: dict[str, float] = {}
        for name, field_name in fields.items():
            if name not in self.values:
                continue
            change = self.change(name, before if name in old else None)
            unit = statistics.fmean(old[name]) if field_name.startswith("look_") else 1.0  # that is a ratio
            if math.isfinite(change.high) and unit > 0:
                found[f"half_{field_name}"] = (change.high - change.mean) / unit
                found["validation_prompts"] = len(self.of["prompts"])
                found["validation_images"] = len(self.values[name])
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
        """Of a metric or look over all pictures; NaN if one is."""
        return statistics.fmean(self.values[name])

    def is_finite(self, name: str) -> bool:
        """Whether a metric or look was measured, and is a number of every picture."""
        return name in self.values and all(map(math.isfinite, self.values[name]))

    def by_prompt(self, name: str) -> npt.NDArray[np.float64]:
        """Of a metric or look the mean over each prompt's pictures, which are no independent samples."""
        return np.array(self.values[name]).reshape(len(self.of["prompts"]), -1).mean(1)

    def looks(self) -> dict[str, npt.NDArray[np.float64]]:
        """`by_prompt` of each image statistic."""
        return {name: self.by_prompt(name) for name in IMAGE_STATISTICS}


@dataclass
class HeldOut:
    """The held-out scores that a run was told to watch."""

    cfg: RunConfig
    metrics: list[str]  # that validations measure
    num_prompts: int
    run_dir: Path
    highest: dict[str, Validation] = field(default_factory=dict)  # of stop_when
    stop: str = ""
    """Why the run is to end; empty: it goes on."""

    def __post_init__(self) -> None:
        cfg = self.cfg
        for flag, names in (("anchor", cfg.anchored), ("stop_when", cfg.falling), ("keep_best", cfg.best)):
            if odd := next((name for name in names if name not in self.metrics), None):
                known = ", ".join(self.metrics) or "none"
                raise ValueError(
                    f"--{flag} {odd:.60} is not measured here, only {known}.{did_you_mean(odd, self.metrics)}"
                )
        if not (cfg.anchor or cfg.stop_when or cfg.best):
            return
        if cfg.num_validation_images == 0:
            raise ValueError(
                "--anchor, --stop_when and --keep_best need pictures: use --num_validation_images 1 or more."
            )
        if (cfg.anchor or cfg.stop_when) and self.num_prompts < LEAST_PROMPTS:
            raise ValueError(
                f"--anchor and --stop_when tell change from chance by validation prompts: {self.num_prompts} are too "
                f"few. Give {LEAST_PROMPTS} or more by --validation_prompt_file."
            )

    def go_on(self, done: int) -> None:
        """What a run that goes on after so many iterations knows; 0: it begins, whatever an earlier one left here."""
        steps = {int(p.stem[5:]): p for p in (self.run_dir / "samples").glob("step-*.json") if p.stem[5:].isdigit()}
        for step, path in sorted(steps.items()):
            if step <= done:
                self._raise(Validation.read(path))
            else:
                path.unlink()
        kept = self.run_dir / BEST / "best.json"
        if kept.is_file() and read_json(kept)["iteration"] > done:
            set_aside(kept.parent)

    def check_before(self, before: Validation | None) -> None:
        """Raises RunError if there is nothing that later pictures could be compared with, and that is asked for."""
        named = next((n for n in self.cfg.anchored if before is None or not before.is_finite(n)), None)
        flag = f"--anchor {named}" if named else "--stop_when hacking"
        if named is None and (before is not None or not self.cfg.watches_looks):
            return
        why = "there are none of these settings" if before is None else "these were not measured so, or are not finite"
        raise RunError(
            f"{flag:.80} compares with the pictures before training (samples/before.json), and {why}. Go on with the "
            "validation settings that the run began with, or leave it out."
        )

    def look(self, done: int, now: Validation, before: Validation | None, hacking: str) -> dict[str, object]:
        """What to log of a validation after so many iterations; hacking: signs in its pictures. Decides `stop`."""
        found: dict[str, object] = {}
        reasons = [hacking] if hacking and self.cfg.watches_looks else []
        watched = dict.fromkeys((*self.cfg.anchored, *self.cfg.falling))
        reasons += [f"held-out {name} is not finite" for name in watched if not now.is_finite(name)]
        for name in self.cfg.anchored if before is not None else ():
            assert before is not None
            change = now.change(name, before)
            found |= {
                f"anchor_{name}": change.mean,
                f"anchor_{name}_low": change.low,
                f"anchor_{name}_high": change.high,
            }
            print(f"anchor {name}: {change.mean:+.3f} [{change.low:+.3f}, {change.high:+.3f}] since training began")
            if change.high < 0:
                reasons.append(f"{name} has fallen by {-change.mean:.3f} since training began, and not by chance")
        for name in self.cfg.falling:
            if (high := self.highest.get(name)) is not None and high.of == now.of:
                change = now.change(name, high)
                if change.high < 0:
                    reasons.append(f"held-out {name} has fallen by {-change.mean:.3f} from its highest, beyond chance")
            elif high is not None:
                print(f"--stop_when {name}: validations so far were of other settings, and this one is its highest")
        self._raise(now)
        if self.cfg.falling:
            path = self.run_dir / "samples" / f"step-{done}.json"
            write_atomically(path, json.dumps(without_nan(now._asdict())) + "\n")
        self.stop = "; ".join(reasons)
        return found

    def _raise(self, now: Validation) -> None:
        for name in self.cfg.falling:
            high = self.highest.get(name)
            if now.is_finite(name) and (high is None or high.of != now.of or now.mean(name) > high.mean(name)):
                self.highest[name] = now

    def keep(self, done: int, now: Validation, save: Callable[[Path], object]) -> None:
        """Save the weights of the best validation so far in best/, if this is it."""
        for name in self.cfg.best:
            if not now.is_finite(name):
                return
            folder, mean, standard = self.run_dir / BEST, now.mean(name), {"metric": name, "of": now.of}
            before = self.run_dir / f".{BEST}-before"  # .tmp-...: a new run begins by removing those
            if before.is_dir() and not folder.exists():  # a run was killed between the two renames below
                os.replace(before, folder)
            kept = read_json(folder / "best.json") if (folder / "best.json").is_file() else None
            alike = kept is not None and standard == {"metric": kept["metric"], "of": kept.get("of", now.of)}
            if kept is not None and alike and mean <= kept["mean"]:
                return
            if kept is not None and not alike:
                print(f"{folder} is the best by another score or other validation settings: it is set aside")
                set_aside(folder)
            draft = self.run_dir / f".tmp-{BEST}"
            shutil.rmtree(draft, ignore_errors=True)
            save(draft)
            record = {"iteration": done, "mean": mean, **standard}
            write_atomically(draft / "best.json", json.dumps(record) + "\n")
            shutil.rmtree(before, ignore_errors=True)
            if folder.exists():
                os.replace(folder, before)
            os.replace(draft, folder)
            shutil.rmtree(before, ignore_errors=True)
            print(f"best so far: held-out {name} {mean:.3f} after {done} iterations, kept in {folder}")
