"""Which files a run or an evaluation needs, found all at once before anything heavy is imported."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from spo_fast.config.errors import Missing, did_you_mean
from spo_fast.config.fields import parted
from spo_fast.config.outside import is_outside
from spo_fast.config.scorers import SCORERS, TRUE_SCORES, scorer_specs
from spo_fast.config.sections import TOYS, ModelConfig
from spo_fast.config.training import Config, ScorerConfig
from spo_fast.models.files.find import Present, check_asked, look, resolve_all
from spo_fast.models.files.sources import MODELS, Resolved


def scorer_paths(cfg: ScorerConfig) -> dict[str, str | None]:
    """The scorers of a run and the local paths given for them."""
    return cfg.paths_of(name for name, _ in scorer_specs(cfg.scorer))


def metric_scorers(metrics: Iterable[str], model: str, flag: str) -> list[str]:
    """The scorers among the metrics. Raises ValueError for a metric that is none, or not of this model."""
    scorers = [name for name in metrics if name not in TRUE_SCORES]
    if model not in TOYS and (odd := next((name for name in metrics if name in TRUE_SCORES), None)):
        raise ValueError(f"{flag}: {odd} is a true score of the toy's world: --model {model} has none.")
    if any(":" in name and not is_outside(name) for name in scorers):
        raise ValueError(f"{flag}: metrics have no weights: write {flag} pickscore aesthetic.")
    if of_latents := next((name for name in scorers if name in SCORERS and SCORERS[name].judges == "latents"), ""):
        raise ValueError(f"{flag}: {of_latents} judges noisy latents, not pictures. Leave it out.")
    try:
        scorer_specs(tuple(scorers))
    except ValueError as error:
        near = next((did_you_mean(name, TRUE_SCORES) for name in scorers), "") if model in TOYS else ""
        raise ValueError(f"{flag}: {error}{'' if 'Did you mean' in str(error) else near}") from None
    return scorers


def run_paths(cfg: Config) -> dict[str, str | None]:
    """The scorers and held-out metrics of a run and the local paths given for them."""
    metrics = metric_scorers(parted(cfg.run.validation_metrics), cfg.model.model, "--validation_metrics")
    return {**scorer_paths(cfg.scorer), **cfg.scorer.paths_of(metrics)}


def resolve(model: ModelConfig, scorers: Mapping[str, str | None], guidance_scale: float | None = None) -> Resolved:
    """Every file of the run, found (or downloaded) before anything heavy is imported. Raises MissingFilesError.

    ValueError for a size, or a guidance scale, that the model does not take.
    """
    found = resolve_all(MODELS[model.model](model), _with_shipped(model, scorers))
    check_asked(found, model, guidance_scale)
    return found


def look_for(model: ModelConfig, scorers: Mapping[str, str | None]) -> list[Present | Missing]:
    """What the run needs and what of it is on this machine; no network is asked."""
    return look(MODELS[model.model](model), _with_shipped(model, scorers))


def _with_shipped(model: ModelConfig, scorers: Mapping[str, str | None]) -> Mapping[str, str | None]:
    if model.model not in TOYS or None not in scorers.values():
        return scorers
    from spo_fast.models.files.toy import FLOW_WEIGHTS, WEIGHTS, toy_files

    shipped = toy_files(FLOW_WEIGHTS if model.model == "toy-flow" else WEIGHTS)
    return {name: path or (str(shipped[name]) if name in shipped else None) for name, path in scorers.items()}
