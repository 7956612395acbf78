"""Checkpoints: all a run needs to go on as if it had never stopped; a crash leaves the last one whole.

checkpoint-<iteration>/ holds trained.safetensors (float32 masters), optimizer.safetensors, gradients.safetensors
(only when an accumulation is under way), state.json (counters, scheduler, non-tensor optimizer state, versions) and
the LoRA as other software loads it. The directory is written under a temporary name and renamed, so a name without
"tmp" is complete. There is no generator state to keep: all randomness is keyed by counters (noise.py).
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import uuid
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor


@dataclass
class TrainState:
    """The run's counters: everything about its position."""

    iteration: int = 0  # rollouts (with their updates) done
    optimizer_steps: int = 0
    slots: int = 0  # accumulation slots since the last optimizer step (recipe published)
    pairs: int = 0  # loss terms used so far


def flatten_optimizer(state: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """An optimizer's state_dict -> tensors by "param.name" and the rest, which JSON can hold."""
    tensors: dict[str, Tensor] = {}
    rest: dict[str, Any] = {}
    for index, entries in state["state"].items():
        for name, value in entries.items():
            if isinstance(value, Tensor):
                tensors[f"{index}.{name}"] = value.detach().cpu().contiguous()
            else:
                rest[f"{index}.{name}"] = value
    return tensors, {"entries": rest, "param_groups": state["param_groups"]}


def unflatten_optimizer(tensors: dict[str, Tensor], rest: dict[str, Any]) -> dict[str, Any]:
    """The inverse of `flatten_optimizer`."""
    state: dict[int, dict[str, Any]] = {}
    for key, value in [*tensors.items(), *rest["entries"].items()]:
        index, name = key.split(".", 1)
        state.setdefault(int(index), {})[name] = value
    return {"state": state, "param_groups": rest["param_groups"]}


def versions() -> dict[str, str]:
    """Versions of what decides the numbers, for the record."""
    found = {"python": platform.python_version()}
    for package in ("spo_fast", "torch", "triton", "diffusers", "transformers", "peft", "bitsandbytes"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def write_atomically(path: Path, text: str) -> None:
    """A file that is either the old or the new one, whole."""
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    temporary.write_text(text)
    os.replace(temporary, path)


def save(
    run_dir: Path, state: TrainState, learner: Any, export: Any, settings: dict[str, Any], limit: int | None
) -> Path:
    """Write checkpoint-<iteration>; `export(directory)` adds the LoRA files. Keeps the newest `limit`."""
    final = run_dir / f"checkpoint-{state.iteration}"
    temporary = run_dir / f".tmp-{uuid.uuid4().hex}"
    temporary.mkdir(parents=True)
    try:
        save_file(
            {k: v.cpu().contiguous() for k, v in learner.policy.state_dict().items()}, temporary / "trained.safetensors"
        )
        tensors, rest = flatten_optimizer(learner.optimizer.state_dict())
        save_file(tensors, temporary / "optimizer.safetensors")
        gradients = {
            name: p.grad.cpu().contiguous()
            for name, p in zip(learner.policy.names, learner.policy.masters, strict=True)
            if p.grad is not None
        }
        if gradients:
            save_file(gradients, temporary / "gradients.safetensors")
        export(temporary)
        record = {
            **{"state": asdict(state), "optimizer": rest, "scheduler": learner.scheduler.state_dict()},
            **{"scaler": learner.scaler.state_dict(), "settings": settings, "versions": versions()},
        }
        (temporary / "state.json").write_text(json.dumps(record, indent=1))
        if final.exists():  # moved aside, not deleted: at no moment is there neither the old nor the new one
            os.replace(final, run_dir / f".tmp-{uuid.uuid4().hex}")
        os.replace(temporary, final)
    finally:
        for leftover in run_dir.glob(".tmp-*"):  # also of processes that were killed here
            shutil.rmtree(leftover, ignore_errors=True)
    for old in sorted(checkpoints(run_dir), key=number)[: -limit if limit else 0]:
        shutil.rmtree(old)
    return final


def checkpoints(run_dir: Path) -> list[Path]:
    """Complete checkpoints of a run, in no order."""
    return [p for p in run_dir.glob("checkpoint-*") if p.name.removeprefix("checkpoint-").isdigit()]


def number(path: Path) -> int:
    return int(path.name.removeprefix("checkpoint-"))


def find(run_dir: Path, wanted: str | None) -> Path | None:
    """The checkpoint to resume from: None, "latest" of the run directory, or a path.

    Raises FileExistsError if the directory holds a run and none was asked for, FileNotFoundError for a path without
    one.
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
        return existing[-1] if existing else None
    path = Path(wanted)
    if not (path / "state.json").is_file():
        raise FileNotFoundError(
            f"--resume_from_checkpoint {wanted} is no checkpoint (no state.json in it). "
            f"{run_dir} has: {', '.join(p.name for p in existing) or 'none'}."
        )
    return path


def load(path: Path, learner: Any) -> tuple[TrainState, dict[str, Any]]:
    """Put a checkpoint's weights, optimizer and gradients into the learner; returns counters and settings."""
    record = json.loads((path / "state.json").read_text())
    learner.policy.load_state_dict(load_file(path / "trained.safetensors"))
    tensors = load_file(path / "optimizer.safetensors")
    learner.optimizer.load_state_dict(unflatten_optimizer(tensors, record["optimizer"]))
    learner.scheduler.load_state_dict(record["scheduler"])
    learner.scaler.load_state_dict(record["scaler"])
    if (path / "gradients.safetensors").is_file():
        gradients = load_file(path / "gradients.safetensors")
        for name, p in zip(learner.policy.names, learner.policy.masters, strict=True):
            p.grad = gradients[name].to(p.device) if name in gradients else None
    return TrainState(**record["state"]), record["settings"]


def differences(old: dict[str, Any], new: dict[str, Any], ignore: Iterable[str]) -> list[str]:
    """Settings that changed between the saved run and this one, as "name: old -> new"."""
    skip = set(ignore)
    return [f"{k}: {old[k]} -> {new[k]}" for k in new if k in old and k not in skip and old[k] != new[k]]
