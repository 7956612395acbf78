"""Checkpoints: all a run needs to go on as if it had never stopped; a crash leaves the last one whole.

checkpoint-<iteration>/ holds trained.safetensors (float32 masters), averages.safetensors (only when the method keeps
moving averages of them), optimizer.safetensors, gradients.safetensors (only when an accumulation is under way),
state.json (counters, settings, non-tensor optimizer state, versions), the LoRA as other software loads it, and
SHA256SUMS of all that. Of sharded masters (models/sharded.py) shards/ takes the tensors' place: each process's parts,
as torch.distributed.checkpoint writes them. The directory is written under a temporary name and renamed, so a name
without "tmp" is complete; the sums tell what a disk did to it later. There is no generator state to keep, of no
process: all randomness is keyed by counters (noise.py).
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import platform
import shutil
import time
import uuid
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from spo_fast.config import RunError
from spo_fast.files import read_json, read_tensors, reason_of
from spo_fast.models import sharded


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
    window: dict[str, list[float]] = field(default_factory=dict)  # window.py


def flatten_optimizer(state: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """An optimizer's state_dict -> tensors by "param.name" and the rest, which JSON can hold.

    bitsandbytes nests its quantised state one level deeper; it also loads the flat form, so the nesting is dropped.
    """
    tensors: dict[str, Tensor] = {}
    rest: dict[str, Any] = {}
    for index, entries in state["state"].items():
        nested = {k: v for value in entries.values() if isinstance(value, dict) for k, v in value.items()}
        for name, value in {**entries, **nested}.items():
            if isinstance(value, Tensor):
                # a copy: bitsandbytes shares one table among all parameters, which safetensors refuses to write
                tensors[f"{index}.{name}"] = value.detach().to("cpu", copy=True).contiguous()
            elif not isinstance(value, dict):
                rest[f"{index}.{name}"] = value
    return tensors, {"entries": rest}


def unflatten_optimizer(
    tensors: dict[str, Tensor], rest: dict[str, Any], param_groups: list[dict[str, Any]]
) -> dict[str, Any]:
    """The inverse of `flatten_optimizer`, with the given parameter groups (this run's settings, not the saved ones)."""
    state: dict[int, dict[str, Any]] = {}
    for key, value in [*tensors.items(), *rest["entries"].items()]:
        index, name = key.split(".", 1)
        state.setdefault(int(index), {})[name] = value
    return {"state": state, "param_groups": param_groups}


def versions() -> dict[str, str]:
    """Versions of what decides the numbers, for the record."""
    found = {"python": platform.python_version()}
    for package in ("spo_fast", "torch", "triton", "diffusers", "transformers", "peft", "bitsandbytes"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def write_atomically(path: Path, content: str | bytes) -> None:
    """A file that is either the old or the new one, whole."""
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    temporary.write_bytes(content.encode() if isinstance(content, str) else content)
    os.replace(temporary, path)


def lock(run_dir: Path) -> Any:
    """Hold the run directory for this process; the returned file keeps the lock while it is open.

    Raises RuntimeError if another process holds it: two runs would write over each other. OSError if nothing can be
    written there.
    """
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        file = (run_dir / ".lock").open("w")
    except OSError as error:
        raise OSError(f"cannot write to {run_dir} ({error.strerror}). Choose another --output_dir.") from error
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        raise RuntimeError(f"another process is training in {run_dir}. Choose another --output_dir.") from error
    for leftover in run_dir.glob(".tmp-*"):  # of a process that was killed while it saved
        shutil.rmtree(leftover, ignore_errors=True)
    return file


SUMS = "SHA256SUMS"  # as sha256sum writes and checks it
SHARDS = "shards"


def _sum(path: Path) -> str:
    found = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(2**22):
            found.update(block)
    return found.hexdigest()


def write_sums(directory: Path) -> None:
    """SHA256SUMS of every other file in it."""
    files = sorted(p for p in directory.rglob("*") if p.is_file() and p.name != SUMS)
    sums = [f"{_sum(path)}  {path.relative_to(directory)}\n" for path in files]
    (directory / SUMS).write_text("".join(sums), encoding="utf-8")


def damage(checkpoint_dir: Path) -> str | None:
    """What is wrong with a checkpoint's files; None if every one is as it was written. Reads them all."""
    try:
        lines = (checkpoint_dir / SUMS).read_text(encoding="utf-8").splitlines()
        for line in lines:
            expected, _, name = line.partition("  ")
            if not (checkpoint_dir / name).resolve().is_relative_to(checkpoint_dir.resolve()):
                return f"{SUMS} names a file outside"
            if _sum(checkpoint_dir / name) != expected:
                return f"{name} is not what was saved"
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except (OSError, ValueError) as error:
        return reason_of(error)
    return None if lines else f"{SUMS} is empty"


def _to_disk(directory: Path) -> None:
    """fsync every file and the directory: a rename must not reach the disk before what it names."""
    for path in [*directory.rglob("*"), directory]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def save(
    run_dir: Path,
    state: TrainState,
    learner: Any,
    export: Any,
    settings: dict[str, Any],
    limit: int | None,
    group: Any = None,  # distributed.Group: with sharded masters all its processes call this
) -> Path:
    """Write checkpoint-<iteration>; `export(directory)` adds the LoRA files. Keeps the newest `limit`."""
    final, shards = run_dir / f"checkpoint-{state.iteration}", learner.policy.shards
    temporary, main = run_dir / f".tmp-{uuid.uuid4().hex}", True
    if shards is not None:
        temporary, main = group.told(temporary), group.main
    temporary.mkdir(parents=True, exist_ok=shards is not None)
    try:
        optimizer, rest = flatten_optimizer(learner.optimizer.state_dict())
        gradients = {
            name: p.grad
            for name, p in zip(learner.policy.names, learner.policy.masters, strict=True)
            if p.grad is not None
        }
        kinds = {"trained": learner.policy.state_dict(), "optimizer": optimizer}  # no step yet: it is empty
        some = {"gradients": gradients, "averages": learner.policy.average_state_dict()}
        kinds |= {kind: tensors for kind, tensors in some.items() if tensors}
        if shards is not None:
            shards.save(temporary / SHARDS, kinds)
        else:
            for kind, tensors in kinds.items():
                save_file({k: v.cpu().contiguous() for k, v in tensors.items()}, temporary / f"{kind}.safetensors")
        export(temporary)
        if not main:
            return final
        record = {
            **{"state": asdict(state), "optimizer": rest, "scaler": learner.scaler.state_dict()},
            **{"settings": settings, "versions": versions()},
        }
        (temporary / "state.json").write_text(json.dumps(record, indent=1))
        write_sums(temporary)
        _to_disk(temporary)
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


def set_aside(path: Path) -> None:
    """Rename what stands in the way of a run that starts again, so that nothing is lost."""
    if path.exists():
        os.replace(path, path.with_name(f"old-{time.strftime('%Y%m%d-%H%M%S')}-{path.name}"))


def checkpoints(run_dir: Path) -> list[Path]:
    """Complete checkpoints of a run, in no order."""
    return [p for p in run_dir.glob("checkpoint-*") if p.name.removeprefix("checkpoint-").isdigit()]


def number(path: Path) -> int:
    return int(path.name.removeprefix("checkpoint-"))


def find(run_dir: Path, wanted: str | None) -> Path | None:
    """The checkpoint to resume from: None, "latest" whole one of the run directory, or a path.

    Raises FileExistsError if the directory holds a run and none of it was asked for, FileNotFoundError for a path
    without one, MismatchError for a damaged one.
    """
    existing = sorted(checkpoints(run_dir), key=number)
    if wanted is None:
        if existing:
            raise FileExistsError(
                f"{run_dir} already holds a run ({existing[-1].name}). Add --resume_from_checkpoint latest to "
                "go on with it, or choose another --output_dir."
            )
        return None
    if wanted == "latest":
        found: list[str] = []
        for path in reversed(existing):
            wrong = damage(path)
            if wrong is None:
                return path
            found.append(wrong)
            print(f"skipped {path}: it is damaged ({wrong})")
        if existing:
            raise MismatchError(
                f"{existing[-1]} is damaged ({found[0]}), and no other is whole. Start again in another --output_dir."
            )
        return None
    path = Path(wanted)
    if not (path / "state.json").is_file():
        raise FileNotFoundError(
            f"--resume_from_checkpoint {wanted} is no checkpoint (no state.json in it). "
            f"{run_dir} has: {', '.join(p.name for p in existing) or 'none'}."
        )
    if existing and path.parent.resolve() != run_dir.resolve():
        raise FileExistsError(
            f"{run_dir} already holds a run ({existing[-1].name}), and {path} is another's. "
            "Go on with its own (latest), or choose another --output_dir."
        )
    if (wrong := damage(path)) is not None:
        raise MismatchError(f"{path} is damaged: {wrong}. Resume from latest, which is the last whole one.")
    return path


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
    "base_weights",
    "optimizer",
    "min_8bit_size",
    "parameterisation",
    "time_conditioned",
    "noise",
)
REORDERS = ("seed", "global_batch", "shuffle", "prompts", "max_prompts", "pairs", "validation_share")


class MismatchError(RunError):
    """A checkpoint and the run that is to go on from it do not fit together."""


def load(path: Path, learner: Any, settings: dict[str, Any], main: bool = True) -> tuple[TrainState, list[str]]:
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
    if learner.policy.averages is not None:
        learner.policy.load_average_state_dict(_tensors(path, "averages", learner))
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
    run_dir = Path(settings["output_dir"])
    for later in checkpoints(run_dir) if main and path.parent.resolve() == run_dir.resolve() else []:
        if number(later) > state.iteration:
            set_aside(later)
    notes = [f"changed since the checkpoint: {text}" for text in changed.values()]
    if any(name in changed for name in REORDERS):
        notes.append("iterations now mean other data: some of it is repeated or left out in this epoch")
    return state, notes


def _tensors(path: Path, kind: str, learner: Any) -> dict[str, Tensor]:
    """trained, optimizer, gradients or averages, as the learner holds them; no gradients is none."""
    shards = learner.policy.shards
    if (path / SHARDS).is_dir():
        return _read(path, lambda directory: sharded.load(directory, kind, shards), SHARDS)
    if kind == "gradients" and not (path / "gradients.safetensors").is_file():
        return {}
    tensors = _read(path, read_tensors, f"{kind}.safetensors")
    if shards is None or kind == "averages":
        return tensors
    whole = {name: value.shape == shards.shapes[shards.index(kind, name)] for name, value in tensors.items()}
    return {name: shards.part(value) if whole[name] else value for name, value in tensors.items()}


def _read(path: Path, reader: Callable[[Path], Any], name: str) -> Any:
    try:
        return reader(path / name)
    except (ValueError, OSError) as error:
        others = sorted((c for c in checkpoints(path.parent) if c.resolve() != path.resolve()), key=number)
        instead = f"Resume from {others[-1]}" if others else "Start again"
        raise MismatchError(f"{path} is damaged: {error} {instead}.") from error


def differences(old: dict[str, Any], new: dict[str, Any]) -> dict[str, str]:
    """Settings that changed between the saved run and this one: name -> "name: old -> new"."""
    skip = ("resume_from_checkpoint", "output_dir", "device", "report_to", "prompt_cache_dir", "stop_seconds")
    return {k: f"{k}: {old[k]} -> {new[k]}" for k in new if k in old and k not in skip and old[k] != new[k]}
