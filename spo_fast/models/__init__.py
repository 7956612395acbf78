"""Layer 2: what is trained. MODELS names the architectures; sources.py finds files, diffusion.py wires them up."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from spo_fast.config import Config, ModelConfig
from spo_fast.models.sources import DEFAULTS, SCORER_SOURCES, ModelSource, Resolved, resolve_all


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


def _sd15(cfg: Config) -> tuple[ModelSource, dict[str, str | None]]:
    return _public("sd15", cfg.model), _scorer_paths(cfg)


def _sdxl(cfg: Config) -> tuple[ModelSource, dict[str, str | None]]:
    return _public("sdxl", cfg.model), _scorer_paths(cfg)


def _toy(cfg: Config) -> tuple[ModelSource, dict[str, str | None]]:
    from spo_fast.toy.files import toy_files

    directory, spm = toy_files()
    given = dataclasses.replace(
        cfg.model, pretrained_model_name_or_path=cfg.model.pretrained_model_name_or_path or str(directory)
    )
    return _public("sdxl", given), {"spm": str(spm), **{k: v for k, v in _scorer_paths(cfg).items() if v}}


MODELS: dict[str, Callable[[Config], tuple[ModelSource, dict[str, str | None]]]] = {
    "toy": _toy,
    "sd15": _sd15,
    "sdxl": _sdxl,
}


def scorer_specs(names: tuple[str, ...]) -> list[tuple[str, float]]:
    """("spm:1", "pickscore:0.5") -> [("spm", 1.0), ("pickscore", 0.5)]; a missing weight is 1."""
    specs = []
    for name in names:
        name, _, weight = name.partition(":")
        if name not in SCORER_SOURCES:
            raise ValueError(f"unknown scorer {name!r}. Known: {', '.join(SCORER_SOURCES)}.")
        try:
            specs.append((name, float(weight or 1)))
        except ValueError:
            raise ValueError(f"scorer {name}:{weight}: the weight after the colon must be a number") from None
    return specs


def _scorer_paths(cfg: Config) -> dict[str, str | None]:
    given = {"spm": cfg.scorer.spm_path, "pickscore": cfg.scorer.pickscore_path}
    return {name: given.get(name) for name, _ in scorer_specs(cfg.scorer.scorer)}


def resolve(cfg: Config) -> Resolved:
    """Every file of the run, found (or downloaded) before anything heavy is imported. Raises MissingFilesError."""
    source, scorers = MODELS[cfg.model.model](cfg)
    return resolve_all(source, scorers)


__all__ = ["MODELS", "resolve", "scorer_specs"]
