"""The run's scorers of the right shapes and without weights: of pictures, and of noisy latents."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from spo_fast.config.scorers import find_scorer
from spo_fast.config.training import ScorerConfig
from spo_fast.models.diffusion import DTYPES
from spo_fast.scorers.base import Scorer
from spo_fast.scorers.dina import DinaScorer, read_settings
from spo_fast.scorers.dina_network import DinaReward, DinaSettings
from spo_fast.scorers.latent import LatentScorer
from spo_fast.scorers.latent_files import read_configs
from spo_fast.scorers.latent_network import LatentReward
from spo_fast.scorers.spm import TEXT_BATCH, ClipScorer
from spo_fast.training.plan.fake_model import Fake, FakeFlow, FakeModel
from spo_fast.training.plan.fake_networks import fake_scorer, run_once
from spo_fast.training.plan.once import Once, shapes_alone


def scorer_without_weights(name: str, paths: Mapping[str, Path], cfg: ScorerConfig, model: Fake, once: Once) -> Scorer:
    """By its record and, if there are any, its files."""
    dtype = DTYPES[cfg.scorer_dtype]
    if find_scorer(name).judges != "latents":
        return run_once(fake_scorer(name, paths, dtype, cfg.spm_time_conditioned), once)
    if isinstance(model, FakeFlow):
        return dina_scorer(paths.get(name), model, dtype, once)
    assert isinstance(model, FakeModel)
    return latent_scorer(paths.get(name), model, dtype, once)


def encode_text(scorer: Scorer) -> None:
    """A batch of prompts through the text tower, of a scorer that encodes each prompt once."""
    if isinstance(scorer, ClipScorer):
        scorer.encode_ids(scorer.tokenize([""] * TEXT_BATCH))


def latent_scorer(path: Path | None, model: FakeModel, dtype: torch.dtype, once: Once) -> LatentScorer:
    """LPO's, of its own files or of the published form: the diffusion model's architecture."""
    configs = read_configs(path) if path else model.configs()
    with shapes_alone():
        width = configs[list(model.configs())[-1]]["projection_dim" if model.kind == "sdxl" else "hidden_size"]
        assert isinstance(width, int)
        network = LatentReward(configs, width)
    once.weights(network, dtype)
    network.encode = once.wrap(network.encode, "score text")  # type: ignore[method-assign]
    network.score = once.wrap(network.score, "score")  # type: ignore[method-assign]
    return LatentScorer(network, model.token_ids)


def dina_scorer(path: Path | None, model: FakeFlow, dtype: torch.dtype, once: Once) -> DinaScorer:
    """DiNa-LRM, by its own config.json or of the published form."""
    with shapes_alone():
        base = model.fresh_network(dtype)
        published = DinaSettings.of_blocks(len(base.transformer_blocks), base.inner_dim)
        network = DinaReward(base, read_settings(path) if path else published)
    once.weights(network, dtype)
    network.forward = once.wrap(network.forward, "score")  # type: ignore[method-assign]
    return DinaScorer(network, model)
