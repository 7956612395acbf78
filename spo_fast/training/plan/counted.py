"""What runs were counted to cost (fake_run.py), kept in this user's cache: counting SDXL takes seconds.

The key is everything that a count follows from: the settings of networks, batches and method, the files whose shapes
are read, the number of processes, the libraries that the networks are of, which backends an op has here, and this
package's source.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import json
import os
from collections.abc import Iterator
from dataclasses import fields
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

import spo_fast
from spo_fast.config.outside import is_outside
from spo_fast.config.scorers import scorer_specs
from spo_fast.config.training import Config
from spo_fast.data.files import write_atomically
from spo_fast.training.plan.costs import Costs
from spo_fast.training.processes import sharing

if TYPE_CHECKING:
    from spo_fast.models.files.sources import Resolved

LIBRARIES = ("torch", "diffusers", "transformers", "peft")
NOT_COUNTED = ("run", "data", "pairs")
"""Sections of settings that change how long a run is and what it reads, not what an iteration costs."""


def predict(cfg: Config, resolved: Resolved | None = None, device_type: str = "cuda") -> Costs:
    """As fake_run.predict: what was counted before, or counted now and kept. A file that cannot be read or written
    makes no difference but time."""
    if (before := known(cfg, resolved, device_type)) is not None:
        return before
    from spo_fast.models.unasked import import_networks

    import_networks()
    from spo_fast.training.plan import fake_run

    found = fake_run.predict(cfg, resolved, device_type)
    if (file := kept_file(cfg, resolved, device_type)) is not None:
        keep(file, found)
    return found


def known(cfg: Config, resolved: Resolved | None, device_type: str) -> Costs | None:
    """What was counted before, without counting; None if nothing was, or it could not be kept."""
    file = kept_file(cfg, resolved, device_type)
    return None if file is None else read(file)


def kept_file(cfg: Config, resolved: Resolved | None, device_type: str) -> Path | None:
    """Where this count is kept; None where none is: of a user's own code nobody knows when it changes."""
    names = [cfg.objective.method, *(name for name, _ in scorer_specs(cfg.scorer.scorer))]
    if any(is_outside(name) for name in names if ":" in name):
        return None
    settings = {f.name: repr(getattr(cfg, f.name)) for f in fields(cfg) if f.name not in NOT_COUNTED}
    try:
        shapes = list(_files(cfg, resolved))
        home = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    except (OSError, RuntimeError):  # RuntimeError: a user without a home
        return None
    key = [settings, shapes, repr(resolved), device_type, sharing(cfg), _installed()]
    name = hashlib.sha256(json.dumps([*key, _source()]).encode()).hexdigest()
    return home / "spo_fast" / "costs" / f"{name[:32]}.json"


def _files(cfg: Config, resolved: Resolved | None) -> Iterator[tuple[str, int, int]]:
    """Path, size and time of every file that a count may read."""
    roots = [] if cfg.adapter.lora_path is None else [Path(cfg.adapter.lora_path).expanduser()]
    if resolved is not None:
        roots += [resolved.config_dir, resolved.model_path, *resolved.scorer_paths.values()]
        roots += [] if resolved.vae_path is None else [resolved.vae_path]
    for root in roots:
        # os.walk, as rglob passes over folders that are links
        below = [Path(folder, name) for folder, _, names in os.walk(root, followlinks=True) for name in names]
        for path in sorted(below) if root.is_dir() else [root]:
            if path.is_file():
                status = path.stat()
                yield str(path), status.st_size, status.st_mtime_ns


@functools.cache
def _source() -> str:
    """Of all modules of this package, and of the settings and the libraries that it ships."""
    root, found = Path(spo_fast.__file__).parent, hashlib.sha256()
    for path in sorted(p for suffix in ("*.py", "*.json", "lib/*") for p in root.rglob(suffix)):
        found.update(f"{path.relative_to(root)} ".encode() + path.read_bytes())
    return found.hexdigest()


def _installed() -> list[object]:
    triton = importlib.util.find_spec("triton") is not None
    backends = [os.environ.get(name) for name in ("SPO_FAST_BACKEND", "SPO_FAST_LIB_DIR", "TRITON_INTERPRET")]
    return [*(version(name) for name in LIBRARIES), triton, *backends]


def _sum(costs: object) -> str:
    return hashlib.sha256(json.dumps(costs).encode()).hexdigest()


def read(file: Path) -> Costs | None:
    """What was kept; None if nothing was, or it is not as it was written."""
    try:
        kept = json.loads(file.read_bytes())
        whole = kept["sha256"] == _sum(kept["costs"])
        return Costs(**kept["costs"] | {"unknown": tuple(kept["costs"]["unknown"])}) if whole else None
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None


def keep(file: Path, found: Costs) -> None:
    """Write it where that can be done."""
    costs = {f.name: getattr(found, f.name) for f in fields(found)}
    costs = {name: dict(value) if isinstance(value, dict) else value for name, value in costs.items()}
    costs["unknown"] = list(found.unknown)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(file, json.dumps({"costs": costs, "sha256": _sum(costs)}))
    except OSError:
        pass
