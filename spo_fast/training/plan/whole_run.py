"""What a whole run draws to be looked at, and how long it takes, by runs that cost the same."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import NamedTuple

import yaml

from spo_fast.config.training import Config
from spo_fast.data.prompt_order import training_prompts
from spo_fast.evaluation.pages.run_record import duration, read_metrics
from spo_fast.models.device import Device
from spo_fast.training.held_out import validation_prompts
from spo_fast.training.plan.costs import WORK, Costs

COST_SECTIONS = ("model", "adapter", "sample", "scorer")  # runs alike in these cost alike


class ShownPictures(NamedTuple):
    """How many a run draws to be looked at."""

    validation: int  # before, during and after training
    strengths: int  # at its end

    def flops(self, costs: Costs) -> dict[str, float]:
        """By part. Held-out metrics are not counted."""
        draw, score = (costs.picture_flops.get(part, 0) for part in ("draw", "score"))
        return {"validation": self.validation * (draw + score), "strengths": self.strengths * draw}


def shown_pictures(cfg: Config, iterations: int) -> ShownPictures:
    """Of a run of so many iterations that ends when it should."""
    run, count = cfg.run, cfg.run.num_validation_images
    prompts = len(validation_prompts(cfg, training_prompts(cfg)[0])) if count else 0
    validations = 1 + -(-iterations // (run.validation_steps or run.checkpointing_steps))
    weights = 0 if cfg.adapter.full_finetune else len(run.strengths)
    return ShownPictures(validations * prompts * count, weights * prompts)


NOTHING_SHOWN = ShownPictures(0, 0)


def time_estimate(
    cfg: Config,
    costs: Costs,
    device: Device,
    iterations: int,
    kept: float = 0.5,
    shown: ShownPictures = NOTHING_SHOWN,
) -> str:
    """From the runs beside the output directory that had the same costs on this device; says so if there is none."""
    found = measured_before(cfg, device)
    if found is None:
        return (
            f"no iteration with these settings was ever measured on this {device.name} (no such run in "
            f"{Path(cfg.run.output_dir).parent}): no estimate"
        )
    run, seconds, share, count = found
    whole = sum(costs.flops(kept).values()) * iterations + sum(shown.flops(costs).values())
    scaled = seconds * whole / sum(costs.flops(share).values())
    pictures = ", validation and strengths included," if any(shown) else ""
    return (
        f"about {duration(scaled)}{pictures} at {kept:.0%} of the pairs kept: {run} took {seconds:.3g} s an "
        f"iteration (median of {count}) at {share:.0%}, scaled by the FLOPs"
    )


def measured_before(cfg: Config, device: Device) -> tuple[Path, float, float, int] | None:
    """`iteration_of` the longest run beside the output directory, or in it, that cost the same on this device."""
    configs = Path(cfg.run.output_dir).parent.glob("*/config.yaml")
    return max((m for run in configs if (m := iteration_of(run, cfg, device))), key=lambda m: m[3], default=None)


def iteration_of(config: Path, cfg: Config, device: Device) -> tuple[Path, float, float, int] | None:
    """(run directory, median seconds, mean valid share, iterations) of a run whose iterations cost what cfg's do."""
    metrics = config.with_name("metrics.jsonl")
    try:
        saved = yaml.safe_load(config.read_text(encoding="utf-8"))
        matters = {n: v for n, v in cfg.flat().items() if n == "method" or cfg.section_of(n) in COST_SECTIONS}
        same = all(saved[name] == value for name, value in matters.items())
        records = [r for r in read_metrics(metrics) if r.get("device") == device.name][1:] if same else []
    except (OSError, ValueError, KeyError, TypeError, yaml.YAMLError):  # no run of ours, or a damaged one
        return None
    if not records:  # the first iteration warms up
        return None
    seconds = [sum(r.get(f"{phase}_ms") or 0 for phase in WORK) / 1000 for r in records]
    return config.parent, statistics.median(seconds), statistics.fmean(r["valid_share"] for r in records), len(records)
