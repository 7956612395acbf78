"""Packages that only some settings need: found missing before anything is loaded, and what installs them."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import re
from collections.abc import Mapping
from typing import Any

NEEDS = {  # (setting, value) -> package, extra of this one, value that needs neither
    ("optimizer", "adamw8bit"): ("bitsandbytes", "8bit", "adamw"),
    ("optimizer", "paged_adamw8bit"): ("bitsandbytes", "8bit", "adamw"),
    ("optimizer", "prodigy"): ("prodigyopt", "prodigy", "adamw"),
    ("optimizer", "schedulefree"): ("schedulefree", "schedulefree", "adamw"),
    ("base_weights", "nf4"): ("bitsandbytes", "8bit", "int8"),
    ("attention", "xformers"): ("xformers", "cuda", "auto"),
    ("report_to", "tensorboard"): ("tensorboard", "tensorboard", "none"),
    ("report_to", "wandb"): ("wandb", "wandb", "none"),
}

LEAST = {"bitsandbytes": (0, 50), "prodigyopt": (1, 1), "schedulefree": (1, 4)}
"""Versions of pyproject.toml's extras; bitsandbytes 0.48 and 0.49 import, but have no 8-bit optimizer on a CPU."""


def missing_extra(setting: str, value: str) -> str:
    """The message of the ImportError."""
    package, extra, instead = NEEDS[setting, value]
    return f"--{setting} {value} needs {package}: pip install 'spo_fast[{extra}]', or use --{setting} {instead}."


def check_extras(settings: Mapping[str, Any]) -> None:
    """Raise ImportError if the flat settings need a package that is not installed, or is too old. Imports none."""
    for (setting, value), (package, _, _) in NEEDS.items():
        if settings.get(setting) != value:
            continue
        if importlib.util.find_spec(package) is None:
            raise ImportError(missing_extra(setting, value))
        version = importlib.metadata.version(package) if package in LEAST else ""
        if package in LEAST and tuple(map(int, re.findall(r"\d+", version)[:2])) < LEAST[package]:
            raise ImportError(f"{missing_extra(setting, value)} Here it is {version}, which is too old.")
