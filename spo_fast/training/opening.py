"""The table that a run opens with: what it is about to do, on what, for how long, and what it will leave."""

from __future__ import annotations

import os
import sys
import textwrap
from collections.abc import Mapping
from typing import TYPE_CHECKING, TextIO

from spo_fast.config.methods import find_method
from spo_fast.config.sections import FLOWS, TOYS
from spo_fast.config.tables import size_text
from spo_fast.data.prompts import count_repeats
from spo_fast.evaluation.pages.run_record import count_text, duration
from spo_fast.models.device import Device, listed
from spo_fast.models.files.lora_files import COMFYUI_FILE, KOHYA_FILE, LORA_FILE
from spo_fast.models.files.sources import Resolved, network_part
from spo_fast.training.monitor.progress import is_terminal
from spo_fast.training.outputs import WORKFLOW
from spo_fast.training.pair_batches import repeated
from spo_fast.training.plan.counted import known
from spo_fast.training.plan.whole_run import measured_before
from spo_fast.training.verdicts import BEST

if TYPE_CHECKING:
    from spo_fast.config.training import Config
    from spo_fast.models.diffusion import DiffusionModel
    from spo_fast.training.setup import Parts

WIDTH = 80  # columns, where no terminal says how many there are


def show(rows: Mapping[str, str], stream: TextIO | None = None) -> None:
    """A framed table on a terminal; elsewhere lines of at most WIDTH, which never break inside a path."""
    stream = sys.stdout if stream is None else stream
    if is_terminal(stream):
        from rich.box import ROUNDED
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text

        table = Table(box=ROUNDED, show_header=False)
        for name, value in rows.items():
            table.add_row(Text(name, style="bold", no_wrap=True), Text(value, overflow="fold"))
        Console(file=stream, force_terminal=True).print(table)
        return
    indent = max(map(len, rows)) + 2
    for name, value in rows.items():
        wrapped = textwrap.fill(value, WIDTH - indent, break_long_words=False, break_on_hyphens=False)
        print(f"{name:<{indent}}" + wrapped.replace("\n", "\n" + " " * indent), file=stream)


def announce(run: Parts) -> None:
    """The table of a run of preference optimisation, what was chosen for its device, and what should be known first."""
    cfg, pairs, model = run.cfg, run.pairs, run.model
    trained = sum(p.numel() for p in run.policy.computed_weights().values())
    weights = "the whole network" if cfg.adapter.full_finetune else f"a LoRA of rank {cfg.adapter.rank}"
    rows = {
        "model": model_text(cfg.model.model, model),
        "method": cfg.objective.method
        + ("" if pairs is not None else f", scored by {' and '.join(cfg.scorer.scorer)}"),
        "trained": f"{weights}, {trained:,} weights, {run.policy.dtype} on {run.device}".replace("torch.", ""),
    }
    if cfg.data.resolutions:
        rows["sizes"] = f"in turn {' '.join(cfg.data.resolutions)} (width x height)"
    if pairs is not None:
        rows["pairs"] = f"{len(pairs.train_rows):,} of {cfg.pairs.pairs}, {len(pairs.valid_rows):,} held out"
    else:
        repeats = f", {count:,} of them repeats" if (count := count_repeats(run.prompts)) else ""
        rows["prompts"] = f"{len(run.prompts):,} of {cfg.data.prompts or 'the built-in list'}{repeats}"
    rows |= {
        "iteration": iteration_text(run),
        "iterations": length_text(run),
        "time": time_text(cfg, run.found, run.total - run.resumed_at),
        "memory": memory_text(cfg, run.found, model.resolved),
        "writes into": str(run.run_dir),
        "files": ", ".join(files_left(run)),
    }
    show(rows)
    if run.choices:
        print(f"chosen for this device ({run.found.name}):\n{textwrap.indent(listed(run.choices), '  ')}")
    if pairs is not None:
        print(repeated(len(pairs.train_rows), cfg.sample.sample_batch_size, "an iteration"), end="")


def model_text(name: str, model: DiffusionModel) -> str:
    """Which model, from where, in pixels."""
    path, source = str(model.resolved.model_path), model.resolved.source.pretrained_model_name_or_path
    where = path if path == source else f"{source}, {path}"
    return f"{name} ({where}), {model.height}x{model.width}"


def iteration_text(run: Parts) -> str:
    """What one iteration learns from, on all processes."""
    size, each, method = run.group.size, run.cfg.sample.sample_batch_size, find_method(run.cfg.objective.method)
    on = f" on {size} processes" if size > 1 else ""
    if run.pairs is not None:
        return f"{count_text(size * each, 'pair')}{on}"
    prompts = min(size * each, len(run.prompts))
    terms = count_text(prompts * len(run.objective.term_states(run.cfg.sample)), method.unit)
    return f"{count_text(prompts, 'prompt')}{on}, {terms}" + (" if every one is kept" if method.compares else "")


def length_text(run: Parts) -> str:
    """Iterations, how many of them are done, and what decides their number."""
    length, done = run.cfg.run, f", {run.resumed_at:,} of them done" if run.resumed_at else ""
    if run.total == length.max_train_steps:
        return f"{run.total:,}{done} (--max_train_steps)"
    return f"{run.total:,}{done} ({count_text(length.num_train_epochs, 'epoch')}: --num_train_epochs)"


def time_text(cfg: Config, device: Device, iterations: int) -> str:
    """From a run that cost the same on this device, if there is one."""
    found = measured_before(cfg, device)
    if found is None:
        return "known after the first iteration: no run beside this one had these settings on this device"
    run, seconds, _, count = found
    about = duration(seconds * iterations)
    return f"about {about} without validations: {run} took {seconds:.3g} s an iteration (median of {count})"


def memory_text(cfg: Config, device: Device, resolved: Resolved) -> str:
    """Predicted and there. Counting takes seconds, so it is said where it was counted to choose the settings."""
    costs = None if device.usable_bytes is None else known(cfg, resolved, device.type)
    if costs is None or device.usable_bytes is None:
        return f"{memory_there(device)}; what the run needs --dry_run predicts"
    unknown = f" without {' and '.join(costs.unknown)}" if costs.unknown else ""
    return (
        f"{size_text(costs.peak)} predicted{unknown}, {size_text(device.usable_bytes)} usable; {memory_there(device)}"
    )


def memory_there(device: Device) -> str:
    """The device's memory, of a CPU the machine's, as far as the system says it."""
    size = device.memory_bytes
    if size is None:
        try:
            size = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        except (AttributeError, ValueError, OSError):
            return f"{device.name}, of unknown memory"
    return f"{device.name} with {size_text(size)}"


def files_left(run: Parts) -> list[str]:
    """Names of what a finished run has written, the weights first."""
    cfg, kind = run.cfg, run.model.kind
    weights = [LORA_FILE, COMFYUI_FILE if kind in FLOWS else KOHYA_FILE]
    if cfg.adapter.full_finetune:
        weights = [f"{network_part(kind)}/"]
    elif cfg.model.model not in TOYS:
        weights.append(WORKFLOW)
    return [
        *weights,
        *([f"{BEST}/"] if cfg.run.best else []),
        "report.html",
        "README.md",
        *(["samples/"] if cfg.run.num_validation_images else []),
        "metrics.jsonl",
        "config.yaml",
        checkpoints_text(cfg.run.checkpointing_steps, "iteration"),
    ]


def checkpoints_text(every: int, unit: str) -> str:
    """Their folders, and when they are written."""
    return f"checkpoint-N/ (each {count_text(every, unit) if every > 1 else unit}, and at the end)"
