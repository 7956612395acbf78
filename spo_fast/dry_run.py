"""`--dry_run`: what a run would do, need and cost, before anything is loaded. Needs no weights and no network."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import yaml

from spo_fast.choices import GIB, Device, choose, found_device, listed, pick_device
from spo_fast.config import Config
from spo_fast.costs import Costs, predict
from spo_fast.data import PromptSampler, load_prompts, prompt_file
from spo_fast.models import look_for, resolve, scorer_paths
from spo_fast.models.sources import Looked

MEASURED = Path(__file__).parent / "measured.jsonl"
"""Whole iterations that were timed: device, model, size, FLOPs of the iteration by our count, its median seconds."""
SHARES = (1.0, 0.5)  # of the pairs kept: not known before the run


def report(cfg: Config, device: Device | None = None) -> str:
    """The text of a dry run. device: None looks for one."""
    if device is None:
        device = found_device(pick_device(cfg.run.device))
    looked = look_for(cfg.model, scorer_paths(cfg.scorer))
    resolved = None if any(row.path is None for row in looked) else resolve(cfg.model, scorer_paths(cfg.scorer))
    cfg, choices = choose(cfg, device, resolved)
    prompts = load_prompts(prompt_file(cfg), cfg.data.caption_column)[: cfg.data.max_prompts]
    sampler = PromptSampler(len(prompts), cfg.sample.sample_batch_size, cfg.run.seed, shuffle=cfg.data.shuffle)
    total = min(cfg.run.num_train_epochs * sampler.iterations_per_epoch, cfg.run.max_train_steps or math.inf)
    costs = predict(cfg, resolved, device.type)
    memory = "" if device.memory_bytes is None else f", {device.memory_bytes / GIB:.1f} GiB"
    parts = {
        "settings (flags over file over preset)": yaml.safe_dump(cfg.flat(), sort_keys=False).rstrip(),
        f"chosen for this device ({device.name}{memory})": listed(choices) or "nothing: all was given",
        "files": files_table(looked),
        "steps": f"{len(prompts):,} prompts x {cfg.run.num_train_epochs} epochs in batches of "
        f"{cfg.sample.sample_batch_size}: {total:,} iterations, "
        f"{pairs_of(cfg) * int(total):,} pairs if every one is kept",
        "FLOPs, counted (2 x multiply-add)": flops_table(costs, int(total), len(prompts)),
        "memory, predicted from the shapes": memory_table(costs, device),
        "time": time_estimate(costs, device, int(total)),
    }
    return "\n\n".join(f"== {title}\n{text}" for title, text in parts.items())


def pairs_of(cfg: Config) -> int:
    """Pairs of one iteration if every one is kept."""
    return cfg.sample.sample_batch_size * (cfg.sample.num_steps - cfg.sample.branch_start)


def files_table(looked: Iterable[Looked]) -> str:
    rows = [("what", "from", "file", "here", "flag for a local path")]
    for row in looked:
        here = f"yes, {size_text(row.num_bytes or 0)}: {row.path}" if row.path else f"no: {row.why}"
        rows.append((row.what, row.source, row.file or "-", here, row.flag))
    return columns(rows)


def flops_table(costs: Costs, iterations: int, prompts: int) -> str:
    rows = [("TFLOP", *(f"{share:.0%} of the pairs kept" for share in SHARES))]
    by_share = [costs.flops(share) for share in SHARES]
    for part in by_share[0]:
        rows.append((f"{part} ({costs.samples[part]:,} samples)", *(f"{f[part] / 1e12:,.3g}" for f in by_share)))
    rows.append(("an iteration", *(f"{sum(f.values()) / 1e12:,.4g}" for f in by_share)))
    once = costs.flops_per_prompt * prompts
    whole = [(sum(f.values()) * iterations + once) / 1e12 for f in by_share]
    rows.append((f"the run ({iterations:,} iterations, prompts encoded once)", *(f"{w:,.4g}" for w in whole)))
    return columns(rows)


def memory_table(costs: Costs, device: Device) -> str:
    held = [("held throughout", "")] + [(part, size_text(n)) for part, n in costs.resident.items()]
    peaks = [("peak of a phase", "")] + [(phase, size_text(n)) for phase, n in costs.peaks.items()]
    text = columns([*held, ("", ""), *peaks])
    if device.usable_bytes is None:
        return text
    verdict = "fits" if costs.peak <= device.usable_bytes else "DOES NOT FIT"
    return f"{text}\n\n{size_text(costs.peak)} of {size_text(device.usable_bytes)} usable: {verdict}"


def time_estimate(costs: Costs, device: Device, iterations: int, path: Path = MEASURED) -> str:
    """From a measured iteration on this device, scaled by counted FLOPs; says so, or says that there is none."""
    records = [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []
    here = [r for r in records if r["device"] == device.name]
    if not here:
        return f"no iteration was ever measured on {device.name}: no estimate"
    flops = sum(costs.flops(SHARES[-1]).values())
    # the record whose iteration is nearest in size
    nearest = min(here, key=lambda r: abs(math.log(r["flops"] / flops)))
    seconds = nearest["seconds"] * flops / nearest["flops"] * iterations
    return (
        f"about {duration(seconds)} at {SHARES[-1]:.0%} of the pairs kept, if FLOPs run as fast as in the iteration "
        f"measured on {device.name}: {nearest['what']}, {nearest['seconds']:.3g} s for "
        f"{nearest['flops'] / 1e12:.3g} TFLOP"
    )


def columns(rows: Sequence[tuple[str, ...]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in rows)


def size_text(num_bytes: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(num_bytes) < 1024 or unit == "GiB":
            return f"{num_bytes:.0f} {unit}" if unit == "B" else f"{num_bytes:.1f} {unit}"
        num_bytes /= 1024
    raise AssertionError


def duration(seconds: float) -> str:
    hours, rest = divmod(round(seconds), 3600)
    return f"{hours} h {rest // 60} min" if hours else f"{rest // 60} min {rest % 60} s"


def as_record(what: str, device: Device, costs: Costs, valid_share: float, seconds: float) -> dict[str, Any]:
    """A line of measured.jsonl: an iteration that took so long on this device."""
    return {"what": what, "device": device.name, "flops": sum(costs.flops(valid_share).values()), "seconds": seconds}
