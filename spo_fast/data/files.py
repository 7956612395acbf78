"""Reading JSON and .safetensors so that a damaged file is named; writing whole files or none. Imports nothing heavy."""

from __future__ import annotations

import fcntl
import json
import math
import os
import platform
import re
import shutil
import struct
import time
import uuid
from collections.abc import Iterable, Mapping
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

if TYPE_CHECKING:
    from torch import Tensor

DAMAGED = "Download or convert it again."
WEIGHT_NAMES = tuple(name + end for end in ("", ".index.json") for name in ("model.safetensors", "pytorch_model.bin"))
"""Of a preference model's directory, the first that is there."""
INDEX = re.compile(r"\.index(\.\w+)?\.json$")


def reason_of(error: BaseException) -> str:
    """An error's words in one line, the system's without its number and path."""
    return error.strerror if isinstance(error, OSError) and error.strerror else " ".join(str(error).split())


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object. Raises ValueError naming the file if it holds anything else."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged: no JSON ({error}). Download or copy it again.") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} holds a JSON {type(found).__name__}, not an object. Download or copy it again.")
    return found


def read_header(path: Path) -> dict[str, Any]:
    """Names, dtypes and shapes of a whole .safetensors file, without loading it (or torch)."""
    with path.open("rb") as f:
        head = f.read(8)
        size = struct.unpack("<Q", head)[0] if len(head) == 8 else -1
        text = f.read(size) if 0 < size < 100_000_000 else b""
    try:
        header = json.loads(text)
        header.pop("__metadata__", None)
        end = 8 + size + max((entry["data_offsets"][1] for entry in header.values()), default=0)
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError):
        raise ValueError(f"{path} is no .safetensors file, or was cut short; download or convert it again.") from None
    if path.stat().st_size < end:
        raise ValueError(f"{path} was cut short: {path.stat().st_size:,} bytes of {end:,}; download or copy it again.")
    return header


def read_metadata(path: Path) -> dict[str, str]:
    """The words that a .safetensors file holds beside its tensors."""
    read_header(path)
    with path.open("rb") as f:
        found = json.loads(f.read(struct.unpack("<Q", f.read(8))[0])).get("__metadata__")
    return {str(key): str(value) for key, value in found.items()} if isinstance(found, dict) else {}


def read_safetensors(path: Path, prefix: str = "") -> dict[str, Tensor]:
    """The tensors of a .safetensors file whose names start with prefix, without it; the rest of it is not read."""
    from safetensors import SafetensorError, safe_open

    read_header(path)
    try:
        with safe_open(path, framework="pt") as f:
            return {n.removeprefix(prefix): f.get_tensor(n) for n in f.keys() if n.startswith(prefix)}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged ({error}). Download or copy it again.") from error


def weight_files(file: Path) -> list[Path]:
    """The shards that an index (model.safetensors.index.json) names, or the file itself. Raises ValueError."""
    if not INDEX.search(file.name):
        return [file]
    places = read_json(file).get("weight_map")
    if not isinstance(places, dict) or not places or not all(Path(str(p)).name == p for p in places.values()):
        raise ValueError(f"{shown(file)} is no index of shards: weight_map names none. {DAMAGED}")
    shards = [file.parent / name for name in sorted(set(places.values()))]
    if lacking := [shard.name for shard in shards if not shard.is_file()]:
        raise ValueError(f"{shown(file)} names shards that are not there: {some(lacking, 120)}. {DAMAGED}")
    return shards


def some(names: Iterable[str], room: int) -> str:
    """As many of the names as there is room for, at least one (in part), and how many more there are."""
    names = list(names)
    room -= len(" and 1000 more")
    kept = [names[0] if len(names[0]) <= max(room, 40) else f"{names[0][: max(room, 40) - 3]}..."]
    while len(kept) < len(names) and len(", ".join([*kept, names[len(kept)]])) <= room:
        kept.append(names[len(kept)])
    more = len(names) - len(kept)
    return ", ".join(kept) + (f" and {more} more" if more else "")


def shown(name: str | Path, room: int = 110) -> str:
    """A path, of a long one its end."""
    text = str(name)
    return text if len(text) <= room else f"...{text[3 - room :]}"


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


def save_tensors(tensors: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str] | None = None) -> None:
    """A .safetensors file that others may read as they may any other new file: safetensors 0.8 gives it to its owner
    alone, whatever the umask."""
    from safetensors.torch import save_file

    save_file(dict(tensors), path, metadata=None if metadata is None else dict(metadata))
    as_new_files([path])


def as_new_files(files: Iterable[Path]) -> None:
    """Give files the permissions that a file opened for writing has."""
    allowed = 0o666 & ~_umask()
    for file in files:
        file.chmod(allowed)


def _umask() -> int:
    """This process's: Linux tells it; elsewhere it is only told when another is set."""
    status = Path("/proc/self/status")
    told = re.search(r"^Umask:\s*([0-7]+)$", status.read_text(), re.MULTILINE) if status.is_file() else None
    if told is not None:
        return int(told[1], 8)
    umask = os.umask(0o077)
    os.umask(umask)
    return umask


def lock(run_dir: Path) -> TextIO:
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


def set_aside(path: Path) -> None:
    """Rename what stands in the way of a run that starts again, so that nothing is lost."""
    if path.exists():
        os.replace(path, path.with_name(f"old-{time.strftime('%Y%m%d-%H%M%S')}-{path.name}"))


def without_nan(value: object) -> object:
    """NaN as None, which JSON has a word for."""
    if isinstance(value, dict):
        return {key: without_nan(v) for key, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [without_nan(v) for v in value]
    return None if isinstance(value, float) and math.isnan(value) else value
