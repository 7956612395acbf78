"""`--dry_run`: what a run would do, need and cost, before anything is loaded. Needs no weights and no network."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

import yaml

from spo_fast.config.errors import Missing
from spo_fast.config.methods import find_method
from spo_fast.config.tables import columns, size_text
from spo_fast.config.training import Config
from spo_fast.data.prompt_order import training_prompts
from spo_fast.evaluation.required_files import look_for, resolve, run_paths
from spo_fast.models.device import GIB, Device, found_device, listed, pick_device
from spo_fast.models.files.load import check_weights
from spo_fast.models.files.lora_files import find_lora
from spo_fast.models.unasked import import_networks
from spo_fast.training.plan.costs import Costs
from spo_fast.training.plan.counted import predict
from spo_fast.training.plan.fit_memory import choose
from spo_fast.training.plan.whole_run import NOTHING_SHOWN, ShownPictures, shown_pictures, time_estimate
from spo_fast.training.processes import sharing

if TYPE_CHECKING:
    from spo_fast.models.files.find import Present

SHARES = (1.0, 0.5)  # of the pairs kept: not known before the run


def report(cfg: Config, device: Device | None = None) -> str:
    """The text of a dry run. device: None looks for one."""
    return "\n\n".join(sections(cfg, device))


def sections(cfg: Config, device: Device | None = None) -> Iterator[str]:
    """Its parts as they are known: the files at once, what is counted seconds later."""
    if device is None:
        device = found_device(pick_device(cfg.run.device))
    looked = look_for(cfg.model, run_paths(cfg))
    if cfg.adapter.lora_path is not None:
        find_lora(cfg.adapter.lora_path)
    lacks = any(isinstance(row, Missing) for row in looked)
    resolved = None if lacks else resolve(cfg.model, run_paths(cfg), cfg.sample.guidance_scale)
    if resolved is not None:
        import_networks()
        check_weights(resolved)
    yield _section("files", files_table(looked))
    cfg, choices = choose(cfg, device, resolved)
    costs = predict(cfg, resolved, device.type)
    total, encoded, steps = steps_text(cfg, costs.terms_per_prompt)
    shown = shown_pictures(cfg, total)
    shares = SHARES if find_method(cfg.objective.method).compares else SHARES[:1]
    memory = "" if device.memory_bytes is None else f", {device.memory_bytes / GIB:.1f} GiB"
    parts = {
        "settings (flags over file over preset)": yaml.safe_dump(cfg.flat(), sort_keys=False).rstrip(),
        f"chosen for this device ({device.name}{memory})": listed(choices) or "nothing: all was given",
        "steps": steps,
        "FLOPs, counted (2 x multiply-add)": flops_table(costs, total, encoded, shares, shown),
        "disk": disk_text(cfg, costs, total),
        "memory, predicted from the shapes": memory_table(costs, device),
        "time": time_estimate(cfg, costs, device, total, shares[-1], shown),
    }
    yield from (_section(title, text) for title, text in parts.items())


def _section(title: str, text: str) -> str:
    return f"== {title}\n{text}"


def files_table(looked: Iterable[Present | Missing]) -> str:
    """Which files are needed, and which are here."""
    rows = [("what", "from", "file", "here", "flag for a local path")]
    for row in looked:
        here = f"no: {row.why}" if isinstance(row, Missing) else f"yes, {size_text(row.num_bytes)}: {row.path}"
        rows.append((row.what, row.source, row.file or "-", here, row.flag))
    return columns(rows)


def steps_text(cfg: Config, terms_per_prompt: int) -> tuple[int, int, str]:
    """Iterations, prompts that are encoded, and what to say of both."""
    B = cfg.sample.sample_batch_size
    if find_method(cfg.objective.method).on_pairs:
        total = cfg.run.max_train_steps or 1
        said = (
            f"{total:,} iterations of {B:,} pairs (--max_train_steps), or fewer if the epochs end before"
            if cfg.run.max_train_steps
            else f"counted for one iteration of {B:,} pairs: how many there are the data says, and stays shut"
        )
        return total, total * B, f"{said}; images are encoded in the first pass only if their latents are kept"
    prompts, sampler = training_prompts(cfg)
    total = cfg.run.iterations(sampler.iterations_per_epoch)
    epochs, rest = divmod(total, sampler.iterations_per_epoch)
    terms = (epochs * min(len(prompts), B * sampler.iterations_per_epoch) + rest * B) * terms_per_prompt
    kept = "pairs if every one is kept" if find_method(cfg.objective.method).compares else "terms of the loss"
    said = f"{len(prompts):,} prompts x {cfg.run.num_train_epochs} epochs in batches of {B}: {total:,} iterations"
    return total, min(len(prompts), total * B), f"{said}, {terms:,} {kept}"


def flops_table(
    costs: Costs,
    iterations: int,
    prompts: int,
    shares: Sequence[float] = SHARES,
    shown: ShownPictures = NOTHING_SHOWN,
) -> str:
    """By part, of an iteration and of the run."""
    rows = [("TFLOP", *(f"{share:.0%} of the pairs kept" if len(shares) > 1 else "" for share in shares))]
    by_share = [costs.flops(share) for share in shares]
    for part in by_share[0]:
        rows.append((f"{part} ({costs.samples[part]:,} samples)", *(f"{f[part] / 1e12:,.3g}" for f in by_share)))
    rows += [(f"scorer {name}", *("unknown, not counted" for _ in shares)) for name in costs.unknown]
    rows.append(("an iteration", *(f"{sum(f.values()) / 1e12:,.4g}" for f in by_share)))
    once: float = costs.flops_per_prompt * prompts
    for (part, flops), count in zip(shown.flops(costs).items(), shown, strict=True):
        rows.append((f"{part} ({count:,} pictures)", *(f"{flops / 1e12:,.3g}" for _ in shares)))
        once += flops
    whole = [(sum(f.values()) * iterations + once) / 1e12 for f in by_share]
    all_of_it = f"the run ({iterations:,} iterations, these pictures, prompts encoded once)"
    rows.append((all_of_it, *(f"{w:,.4g}" for w in whole)))
    return columns(rows)


def disk_text(cfg: Config, costs: Costs, iterations: int) -> str:
    """A checkpoint holds masters, optimizer state, and the LoRA in two formats; a full fine-tune its UNet."""
    masters = costs.gradients  # as many bytes
    state = costs.resident["optimizer state"] * sharing(cfg)
    checkpoint = (2 if cfg.adapter.full_finetune else 3) * masters + state
    written = -(-iterations // cfg.run.checkpointing_steps)
    kept = min(written, cfg.run.checkpoints_total_limit or written)
    return (
        f"a checkpoint every {cfg.run.checkpointing_steps} iterations, {size_text(checkpoint)} each; {kept} of "
        f"{written} kept (--checkpoints_total_limit): {size_text(kept * checkpoint)} at most"
    )


def memory_table(costs: Costs, device: Device) -> str:
    """What is held throughout, the phases' peaks, and whether they fit."""
    held = [("held throughout", "")] + [(part, size_text(n)) for part, n in costs.resident.items()]
    held += [(f"scorer {name}", "unknown, not counted") for name in costs.unknown]
    peaks = [("peak of a phase", "")] + [(phase, size_text(n)) for phase, n in costs.peaks.items()]
    if costs.graphs:
        peaks.append(("of these, kept by CUDA graphs", size_text(costs.kept_by_graphs)))
    text = columns([*held, ("", ""), *peaks])
    if device.usable_bytes is None:
        return text
    verdict = "fits" if costs.peak <= device.usable_bytes else "DOES NOT FIT"
    return f"{text}\n\n{size_text(costs.peak)} of {size_text(device.usable_bytes)} usable: {verdict}"
