"""The checkpoints of a run's directory: which there are, whether they are whole."""

from __future__ import annotations

import hashlib
import os
import re
from pathlib import Path

from spo_fast.config.errors import RunError
from spo_fast.data.files import reason_of
from spo_fast.data.hub import offline_reason

SUMS = "SHA256SUMS"  # as sha256sum writes and checks it


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


def to_disk(directory: Path) -> None:
    """fsync every file and the directory: a rename must not reach the disk before what it names."""
    for path in [*directory.rglob("*"), directory]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def checkpoints(run_dir: Path) -> list[Path]:
    """Complete checkpoints of a run, in no order."""
    return [p for p in run_dir.glob("checkpoint-*") if is_checkpoint(p)]


def is_checkpoint(path: Path) -> bool:
    """By its name."""
    return path.name.startswith("checkpoint-") and path.name.removeprefix("checkpoint-").isdigit()


def number(path: Path) -> int:
    """The iteration of a checkpoint's directory."""
    return int(path.name.removeprefix("checkpoint-"))


def find(run_dir: Path, wanted: str | None) -> Path | None:
    """The checkpoint to resume from: None, "latest" whole one of the run directory, a path, or hub:owner/name.

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
    path = hub_checkpoint(wanted.removeprefix("hub:")) if wanted.startswith("hub:") else Path(wanted)
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


def hub_checkpoint(repository: str) -> Path:
    """The newest checkpoint of a repository of the hub, downloaded. Raises RunError."""
    from huggingface_hub import snapshot_download

    name, _, revision = repository.partition("@")
    flag = f"--resume_from_checkpoint hub:{repository:.100}"
    if re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name) is None:
        raise RunError(f"{flag} is no repository. Write hub:OWNER/NAME, or hub:OWNER/NAME@REVISION.")
    if (reason := offline_reason()) is not None:
        raise RunError(f"{flag} cannot be downloaded: {reason}. Give the path of a checkpoint on this machine.")
    try:
        folder = Path(snapshot_download(name, revision=revision or None, allow_patterns=["checkpoint-*/*"]))
    except Exception as error:  # the hub's, its HTTP library's and the network's have no common class
        why = " ".join(f"{type(error).__name__}: {error}".split())
        raise RunError(
            f"{flag} cannot be downloaded ({why:.120}). Mend its name, or log in (hf auth login)."
        ) from error
    found = sorted(checkpoints(folder), key=number)
    if not found:
        raise RunError(
            f"{flag} has no checkpoint-N folder. Upload one: hf upload {name:.60} RUN/checkpoint-N checkpoint-N"
        )
    return found[-1]


class MismatchError(RunError):
    """A checkpoint and the run that is to go on from it do not fit together."""
