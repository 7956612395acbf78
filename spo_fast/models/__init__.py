"""Layer 2: what is trained. MODELS names the architectures; sources.py finds files, diffusion.py wires them up."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Mapping

from spo_fast.config import Config, ModelConfig, ScorerConfig, did_you_mean, parted
from spo_fast.models.lora import find_lora
from spo_fast.models.sources import (
    DEFAULTS,
    Missing,
    ModelSource,
    Present,
    Resolved,
    find_contender,
    look,
    resolve_all,
)


def _public(kind: str, cfg: ModelConfig) -> ModelSource:
    """The architecture's public base model, with whatever the user gave instead."""
    given = {
        name: getattr(cfg, name)
        for name in ("pretrained_model_name_or_path", "pretrained_vae_model_name_or_path", "revision", "variant")
        if getattr(cfg, name) is not None
    }
    base = DEFAULTS[kind]
    if "pretrained_model_name_or_path" in given:
        # another model brings its own VAE unless one is named
        base = dataclasses.replace(base, pretrained_vae_model_name_or_path=None)
    return dataclasses.replace(base, **given)


def _toy(cfg: ModelConfig) -> ModelSource:
    from spo_fast.toy.pipeline import toy_files

    if cfg.pretrained_model_name_or_path is None:
        cfg = dataclasses.replace(cfg, pretrained_model_name_or_path=str(toy_files()["model"]))
    return _public("sdxl", cfg)


MODELS: dict[str, Callable[[ModelConfig], ModelSource]] = {
    "toy": _toy,
    "sd15": functools.partial(_public, "sd15"),
    "sdxl": functools.partial(_public, "sdxl"),
}


SCORER_NAMES = ("spm", "pickscore", "hpsv2", "hpsv21", "clip", "aesthetic", "image_reward", "geneval", "lrm")
TRUE_SCORES = ("layout", "aesthetics")
"""Of the toy's world."""


def scorer_specs(names: tuple[str, ...]) -> list[tuple[str, float]]:
    """("spm:1", "pickscore:0.5") -> [("spm", 1.0), ("pickscore", 0.5)]; a missing weight is 1."""
    specs = []
    for name in names:
        name, _, weight = name.partition(":")
        if name not in SCORER_NAMES:
            hint = did_you_mean(name, SCORER_NAMES)
            raise ValueError(f"unknown scorer {name!r:.60}. Known: {', '.join(SCORER_NAMES)}.{hint}")
        try:
            specs.append((name, float(weight or 1)))
        except ValueError:
            specs.append((name, math.nan))
        if not math.isfinite(specs[-1][1]):
            raise ValueError(
                f"scorer {name}:{weight!s:.60}: the weight after the colon must be a number, as in {name}:0.5"
            )
    return specs


def scorer_paths(cfg: ScorerConfig) -> dict[str, str | None]:
    """The scorers of a run and the local paths given for them."""
    return cfg.paths_of(name for name, _ in scorer_specs(cfg.scorer))


def metric_scorers(metrics: Iterable[str], model: str, flag: str) -> list[str]:
    """The scorers among the metrics. Raises ValueError for a metric that is none, or not of this model."""
    scorers = [name for name in metrics if name not in TRUE_SCORES]
    if model != "toy" and (odd := next((name for name in metrics if name in TRUE_SCORES), None)):
        raise ValueError(f"{flag}: {odd} is a true score of the toy's world: --model {model} has none.")
    if any(":" in name for name in scorers):
        raise ValueError(f"{flag}: metrics have no weights: write {flag} pickscore aesthetic.")
    if "lrm" in scorers:
        raise ValueError(f"{flag}: lrm judges noisy latents, not pictures. Leave it out.")
    try:
        scorer_specs(tuple(scorers))
    except ValueError as error:
        near = next((did_you_mean(name, TRUE_SCORES) for name in scorers), "") if model == "toy" else ""
        raise ValueError(f"{flag}: {error}{'' if 'Did you mean' in str(error) else near}") from None
    return scorers


def run_paths(cfg: Config) -> dict[str, str | None]:
    """The scorers and held-out metrics of a run and the local paths given for them."""
    metrics = metric_scorers(parted(cfg.run.validation_metrics), cfg.model.model, "--validation_metrics")
    return {**scorer_paths(cfg.scorer), **cfg.scorer.paths_of(metrics)}


def resolve(model: ModelConfig, scorers: Mapping[str, str | None]) -> Resolved:
    """Every file of the run, found (or downloaded) before anything heavy is imported. Raises MissingFilesError."""
    return resolve_all(MODELS[model.model](model), _with_shipped(model, scorers))


def look_for(model: ModelConfig, scorers: Mapping[str, str | None]) -> list[Present | Missing]:
    """What the run needs and what of it is on this machine; no network is asked."""
    return look(MODELS[model.model](model), _with_shipped(model, scorers))


def _with_shipped(model: ModelConfig, scorers: Mapping[str, str | None]) -> Mapping[str, str | None]:
    if model.model != "toy" or None not in scorers.values():
        return scorers
    from spo_fast.toy.pipeline import toy_files

    shipped = toy_files()
    return {name: path or (str(shipped[name]) if name in shipped else None) for name, path in scorers.items()}


__all__ = [
    "MODELS",
    "TRUE_SCORES",
    "find_contender",
    "find_lora",
    "look_for",
    "metric_scorers",
    "resolve",
    "run_paths",
    "scorer_paths",
    "scorer_specs",
]
