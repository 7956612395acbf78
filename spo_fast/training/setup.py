"""Checks that a run's parts fit together."""

from __future__ import annotations

from typing import Any

from spo_fast.config.training import Config
from spo_fast.method.experience import judges


def check_fit(objective: Any, scorer: Any, cfg: Config) -> None:
    """Raises ValueError for a method with a scorer that it cannot use."""
    if objective.judges not in (None, judges(scorer)):
        method, names = cfg.objective.method, " ".join(cfg.scorer.scorer)
        raise ValueError(f"--method {method} needs a scorer of noisy latents, and {names} is none. Use --scorer lrm.")
