"""Checkpoints: all a run needs to go on as if it had never stopped; a crash leaves the last one whole.

checkpoint-<iteration>/ holds trained.safetensors (float32 masters), averages.safetensors and
exported_averages.safetensors (moving averages of them, where the run keeps some), optimizer.safetensors,
gradients.safetensors (only when an accumulation is under way),
state.json (counters, settings, non-tensor optimizer state, versions), the LoRA as other software loads it, and
SHA256SUMS of all that. Of sharded masters (models/sharded.py) shards/ takes the tensors' place: each process's parts,
as torch.distributed.checkpoint writes them. The directory is written under a temporary name and renamed, so a name
without "tmp" is complete; the sums tell what a disk did to it later. There is no generator state to keep, of no
process: all randomness is keyed by counters (method/noise.py).
"""

from __future__ import annotations

import json
import os
import shutil
import uuid
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TypeVar

from torch import Tensor

from spo_fast.data.files import read_json, read_safetensors, save_tensors, set_aside, versions
from spo_fast.models import sharded
from spo_fast.models.sharded import AVERAGES, EXPORTED
from spo_fast.training.optimizer import WeightUpdates, flatten_optimizer, unflatten_optimizer
from spo_fast.training.processes import ALONE, Group
from spo_fast.training.run_directory import MismatchError, checkpoints, number, to_disk, write_sums

T = TypeVar("T")


@dataclass
class TrainState:
    """The run's counters: everything about its position."""

    iteration: int = 0  # rollouts (with their updates) done
    optimizer_steps: int = 0  # that changed the weights
    skipped_steps: int = 0  # whose gradient was not finite (in fp16 now and then one overflows)
    nonfinite_in_a_row: int = 0  # of them, since the last step that was taken
    slots: int = 0  # accumulation slots since the last optimizer step (recipe published)
    pairs: int = 0  # loss terms used so far
    position: int = 0  # rows of preference pairs read so far (methods that train on pairs)
    window: dict[str, list[float]] = field(default_factory=dict)  # method/skipped_segments.py

    def count_step(self, taken: bool) -> None:
        """An optimizer step, or one that was dropped."""
        self.optimizer_steps += taken
        self.skipped_steps += not taken
        self.nonfinite_in_a_row = 0 if taken else self.nonfinite_in_a_row + 1
        self.slots = 0


SHARDS = "shards"


def save(
    run_dir: Path,
    state: TrainState,
    learner: WeightUpdates,
    export: Callable[[Path], object],
    settings: Mapping[str, object],
    limit: int | None,
    group: Group = ALONE,  # with sharded masters all its processes call this
) -> Path:
    """Write checkpoint-<iteration>; `export(directory)` adds the LoRA files. Keeps the newest `limit`."""
    final, shards = run_dir / f"checkpoint-{state.iteration}", learner.policy.shards
    temporary, main = run_dir / f".tmp-{uuid.uuid4().hex}", True
    if shards is not None:
        temporary, main = group.from_main(temporary), group.main
    temporary.mkdir(parents=True, exist_ok=shards is not None)
    try:
        optimizer, rest = flatten_optimizer(learner.optimizer.state_dict())
        gradients = {
            name: p.grad
            for name, p in zip(learner.policy.names, learner.policy.masters, strict=True)
            if p.grad is not None and (state.slots or not learner.policy.holds_gradients)
        }
        kinds = {"trained": learner.policy.state_dict(), "optimizer": optimizer}  # no step yet: it is empty
        some = {"gradients": gradients, **{kind: learner.policy.average_state_dict(kind) for kind in AVERAGES}}
        kinds |= {kind: tensors for kind, tensors in some.items() if tensors}
        if shards is not None:
            shards.save(temporary / SHARDS, kinds)
        else:
            for kind, tensors in kinds.items():
                save_tensors({k: v.cpu().contiguous() for k, v in tensors.items()}, temporary / f"{kind}.safetensors")
        export(temporary)
        if not main:
            return final
        record = {
            "state": asdict(state),
            "optimizer": rest,
            "scaler": learner.scaler.state_dict(),
            "settings": settings,
            "versions": versions(),
        }
        (temporary / "state.json").write_text(json.dumps(record, indent=1))
        write_sums(temporary)
        to_disk(temporary)
        set_aside(final)
        os.replace(temporary, final)
    finally:
        if main:
            shutil.rmtree(temporary, ignore_errors=True)
    older = sorted((c for c in checkpoints(run_dir) if c != final), key=number)
    for old in older[: max(len(older) + 1 - limit, 0)] if limit else []:
        try:
            shutil.rmtree(old)
        except OSError as error:  # what was just saved is worth more than the room
            print(f"warning: {old} cannot be removed ({error.strerror}); delete it yourself.")
    return final


# Settings a checkpoint cannot go on with if they change, and those that change what is left of the run.
FIXED = (
    "model",
    "method",
    "mixed_precision",
    "rank",
    "lora_alpha",
    "lora_targets",
    "lora_path",
    "full_finetune",
    "use_rslora",
    "use_dora",
    "base_weights",
    "optimizer",
    "min_8bit_size",
    "parameterisation",
    "time_conditioned",
    "noise",
)
REORDERS = ("seed", "global_batch", "resolutions", "shuffle", "prompts", "max_prompts", "pairs", "validation_share")


def load(
    path: Path, learner: WeightUpdates, settings: Mapping[str, object], main: bool = True
) -> tuple[TrainState, list[str]]:
    """Put a checkpoint's weights, optimizer state and gradients into the learner; returns the counters and what to say.

    main: process 0, which alone moves files and takes up gradients that wait for more: they are the sum of all's.
    Learning rate, betas, weight decay and schedule are this run's. Raises MismatchError if a setting of FIXED changed
    or the checkpoint is damaged.
    """
    record = _read(path, read_json, "state.json")
    if not {"settings", "state", "optimizer", "scaler"} <= record.keys():
        raise MismatchError(f"{path / 'state.json'} is not of a checkpoint that this version wrote.")
    changed = differences(record["settings"], settings)
    fixed = [changed[name] for name in FIXED if name in changed]
    if fixed:
        raise MismatchError(
            f"{path} cannot go on with other settings ({'; '.join(fixed)}): use those it was saved with."
        )
    state = TrainState(**record["state"])
    learner.policy.load_state_dict(_tensors(path, "trained", learner))
    for kind in learner.policy.kept:
        if kind == EXPORTED and not (path / SHARDS).is_dir() and not (path / f"{kind}.safetensors").is_file():
            raise MismatchError(
                f"{path} has no moving average to export: it was saved without --export_ema. Leave that and "
                "--ema_decay out, or start again in another --output_dir."
            )
        learner.policy.load_average_state_dict(_tensors(path, kind, learner), kind)
    tensors = _tensors(path, "optimizer", learner)
    groups = learner.optimizer.state_dict()["param_groups"]
    learner.optimizer.load_state_dict(unflatten_optimizer(tensors, record["optimizer"], groups))
    learner.go_to(state.iteration)
    if learner.scaler.is_enabled():
        learner.scaler.load_state_dict(record["scaler"])
    if main or learner.policy.shards is not None:
        gradients = _tensors(path, "gradients", learner)
        for name, p in zip(learner.policy.names, learner.policy.masters, strict=True):
            p.grad = gradients[name].to(p.device) if name in gradients else None
    # what was saved after it belongs to another continuation: out of the way of "latest", but kept
    run_dir = Path(str(settings["output_dir"]))
    for later in checkpoints(run_dir) if main and path.parent.resolve() == run_dir.resolve() else []:
        if number(later) > state.iteration:
            set_aside(later)
    notes = [f"changed since the checkpoint: {text}" for text in changed.values()]
    if any(name in changed for name in REORDERS):
        notes.append("iterations now mean other data: some of it is repeated or left out in this epoch")
    return state, notes


def _tensors(path: Path, kind: str, learner: WeightUpdates) -> dict[str, Tensor]:
    """trained, optimizer, gradients or one of AVERAGES, as the learner holds them; no gradients is none."""
    shards = learner.policy.shards
    if (path / SHARDS).is_dir():
        return _read(path, lambda directory: sharded.load(directory, kind, shards), SHARDS)
    if kind == "gradients" and not (path / "gradients.safetensors").is_file():
        return {}
    tensors = _read(path, read_safetensors, f"{kind}.safetensors")
    if shards is None or kind in AVERAGES:
        return tensors
    whole = {name: value.shape == shards.shapes[shards.index(kind, name)] for name, value in tensors.items()}
    return {name: shards.part(value) if whole[name] else value for name, value in tensors.items()}


def _read(path: Path, reader: Callable[[Path], T], name: str) -> T:
    try:
        return reader(path / name)
    except (ValueError, OSError) as error:
        others = sorted((c for c in checkpoints(path.parent) if c.resolve() != path.resolve()), key=number)
        instead = f"Resume from {others[-1]}" if others else "Start again"
        raise MismatchError(f"{path} is damaged: {error} {instead}.") from error


def differences(old: Mapping[str, object], new: Mapping[str, object]) -> dict[str, str]:
    """Settings that changed between the saved run and this one: name -> "name: old -> new"."""
    skip = ("resume_from_checkpoint", "output_dir", "device", "report_to", "prompt_cache_dir", "stop_seconds")
    return {k: f"{k}: {old[k]} -> {new[k]}" for k in new if k in old and k not in skip and old[k] != new[k]}
