"""Reading JSON and .safetensors so that a damaged file is named. Imports nothing heavy."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor


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


def read_tensors(path: Path, prefix: str = "") -> dict[str, Tensor]:
    """The tensors of a .safetensors file whose names start with prefix, without it; the rest of it is not read."""
    from safetensors import SafetensorError, safe_open

    read_header(path)
    try:
        with safe_open(path, framework="pt") as f:
            return {n.removeprefix(prefix): f.get_tensor(n) for n in f.keys() if n.startswith(prefix)}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged ({error}). Download or copy it again.") from error
