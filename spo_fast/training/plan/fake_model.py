"""A diffusion model without weights: shapes of its files' configs, or of the published architecture's."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from spo_fast.config.recipes import TINY_VAES
from spo_fast.config.training import Config, ModelConfig
from spo_fast.data.files import read_json
from spo_fast.method.flow_schedule import flow_scheduler
from spo_fast.method.noise import KeyedDraws
from spo_fast.method.renoise import PairInputs
from spo_fast.method.schedule import ddim_scheduler
from spo_fast.models.diffusion import DiffusionModel, decode, vae_dtype
from spo_fast.models.files.layout import scheduler_config, vae_files
from spo_fast.models.files.single_file import text_class, vae_class
from spo_fast.models.files.sources import (
    CONFIGS,
    DEFAULTS,
    FLOWS,
    MODELS,
    Resolved,
    forces_zeros,
    network_part,
    settings_directory,
    text_parts,
)
from spo_fast.models.flow import FlowModel
from spo_fast.models.prompt_cache import ENCODE_BATCH, PromptCache
from spo_fast.training.pair_batches import ENCODE_BATCH as IMAGES_BATCH
from spo_fast.training.pair_batches import PairReader
from spo_fast.training.plan.once import Once, shapes_alone

if TYPE_CHECKING:
    from diffusers.models.transformers.transformer_sd3 import SD3Transformer2DModel

    from spo_fast.models.files.load import VAE, TextEncoder


class Fake(DiffusionModel):
    """What models without weights share. resolved: None for the published architecture."""

    prompt_cache: FakePrompts
    lengths: tuple[int, ...]
    """Of each text encoder's prompts."""

    def _take_files(self, cfg: ModelConfig, resolved: Resolved | None, dtype: torch.dtype, once: Once) -> None:
        import diffusers

        source = resolved.source if resolved else MODELS[cfg.model](cfg)
        self.once, self.device, self.dtype, self.kind = once, once.device, dtype, source.kind
        self.config_dir = resolved.config_dir if resolved else settings_directory(source)
        vae_config = vae_settings(self.kind, resolved, source.pretrained_vae_model_name_or_path)
        self.vae = once.weights(fake_vae(vae_config).requires_grad_(False), vae_dtype(self.kind, dtype, vae_config))
        self.vae.decode = once.wrap(self.vae.decode, "decode")
        self.posterior = once.wrap(super().posterior, "encode images")  # type: ignore[method-assign]
        self.parts = [part for _, part in text_parts(self.kind, self.config_dir)]
        network = self.configs()[network_part(self.kind)]
        with shapes_alone():
            self.network = getattr(diffusers, str(network["_class_name"])).from_config(network)
        self._encoders = [once.weights(self._text_encoder(part), dtype) for part in self.parts]
        self.prompt_cache = FakePrompts(once)

    def _schedule(self, resolved: Resolved | None) -> dict[str, object]:
        own = self.config_dir / "scheduler" / "scheduler_config.json"
        return scheduler_config(resolved) if resolved else read_json(own)

    def _positions(self) -> list[int]:
        """Of each text encoder; T5 counts none."""
        return [getattr(encoder.config, "max_position_embeddings", 0) for encoder in self._encoders]

    def encode(self) -> None:
        """A batch of prompts through the text encoders, whose shapes the prompts' rows have from now on."""
        encode, batch = self._load_encoder(), [""] * ENCODE_BATCH
        found = self.once.run("text", "encode prompts", ENCODE_BATCH, lambda: encode(batch))
        self.prompt_cache.rows = {name: values.shape[1:] for name, values in found.items()}

    def _text_encoder(self, part: str) -> TextEncoder:
        made, folder = text_class(self.kind, part), self.config_dir / part
        with shapes_alone():
            found = made(made.config_class.from_pretrained(folder))  # type: ignore[arg-type, union-attr]
        return found.requires_grad_(False)

    def token_ids(self, prompts: Sequence[str]) -> list[Tensor]:
        """Zeros."""
        return [torch.zeros(len(prompts), n, dtype=torch.int64) for n, _ in zip(self.lengths, self.parts, strict=False)]

    def configs(self) -> dict[str, dict[str, object]]:
        """Of the network and the text encoders, by their folders."""
        parts = (network_part(self.kind), *self.parts)
        return {part: read_json(self.config_dir / part / "config.json") for part in parts}

    def decode(self, latents: Tensor) -> Tensor:
        """In one piece, as on the device that is planned for; here all tensors lie on the CPU."""
        return decode(self.vae, latents)

    def text_encoders(self) -> list[TextEncoder]:
        """Without weights."""
        return self._encoders


class FakeModel(Fake):
    """A diffusion without weights."""

    def __init__(self, cfg: ModelConfig, resolved: Resolved | None, dtype: torch.dtype, once: Once):
        self._take_files(cfg, resolved, dtype, once)
        self._ddim = ddim_scheduler(self._schedule(resolved))
        self.zero_uncond = self.kind == "sdxl" and forces_zeros(self.config_dir)
        self.lengths = tuple(self._positions())
        self.tokenizers = [SimpleNamespace(model_max_length=n) for n in self.lengths]  # type: ignore[misc]  # all that is asked
        self._take_sizes(cfg)


class FakeFlow(Fake, FlowModel):
    """A flow without weights."""

    def __init__(self, cfg: ModelConfig, resolved: Resolved | None, dtype: torch.dtype, once: Once):
        self._take_files(cfg, resolved, dtype, once)
        self.scheduler = flow_scheduler(self._schedule(resolved))
        self.tokenizers = [SimpleNamespace(model_max_length=n) for n in self._positions()]  # type: ignore[misc]
        self._take_door(cfg)
        with once.mode:
            self.make_small(self._encoders)

    def fresh_network(self, dtype: torch.dtype) -> SD3Transformer2DModel:
        """On the meta device."""
        return type(self.network).from_config(self.configs()[network_part(self.kind)])  # type: ignore[return-value]


def fake_model(cfg: ModelConfig, resolved: Resolved | None, dtype: torch.dtype, once: Once) -> FakeModel | FakeFlow:
    """The model of its kind, without weights."""
    source = resolved.source if resolved else MODELS[cfg.model](cfg)
    return (FakeFlow if source.kind in FLOWS else FakeModel)(cfg, resolved, dtype, once)


class FakePrompts(PromptCache):
    """Rows of prompt embeddings of the right shapes."""

    def __init__(self, once: Once):
        self.once = once
        self.rows: dict[str, torch.Size] = {}

    def ensure(self, prompts: Iterable[str]) -> int:
        """All are there."""
        return 0

    def get(self, prompts: Sequence[str], device: torch.device | str, dtype: torch.dtype) -> dict[str, Tensor]:
        """Rows of nothing."""
        return {name: self.once.empty(len(prompts), *shape, dtype=dtype) for name, shape in self.rows.items()}


class FakePairs(PairReader):
    """Labelled pairs of which no latents were kept: the VAE encodes them."""

    def __init__(self, model: Fake, cfg: Config):
        self.model, self.cfg, self.train_rows, self.once = model, cfg, np.zeros(1), model.once

    @torch.no_grad()
    def batch(self, iteration: int, position: int) -> tuple[PairInputs, int]:
        """The pairs of an iteration, and the position after them."""
        model, B = self.model, self.cfg.sample.sample_batch_size
        cond = model.cond([""] * B)
        pixels = self.once.empty(IMAGES_BATCH, 3, model.height, model.width, dtype=torch.float32)
        for _ in range(-(-2 * B // IMAGES_BATCH)):
            model.posterior(pixels)
        latents = torch.cat([self.once.empty(2, B, *model.latent_shape, dtype=model.latent_dtype)])
        draws = KeyedDraws(self.cfg.run.seed, iteration, torch.arange(B, device=self.once.device))
        return PairInputs(cond, latents, draws), position + B


def vae_settings(kind: str, resolved: Resolved | None, name: str | None) -> dict[str, object]:
    """The config of the VAE's files, or of the published one's."""
    files = [] if resolved is None else [file for file in vae_files(resolved) if file.name == "config.json"]
    if files:
        return read_json(files[0])
    if resolved is None and name in TINY_VAES.values():
        channels = read_json(CONFIGS / kind / "vae" / "config.json")["latent_channels"]
        return {"_class_name": "AutoencoderTiny", "latent_channels": channels}  # else the class's own defaults
    fixed = {"force_upcast": False} if name == DEFAULTS["sdxl"].pretrained_vae_model_name_or_path else {}
    return read_json(CONFIGS / kind / "vae" / "config.json") | fixed


def fake_vae(config: Mapping[str, object]) -> VAE:
    """On the meta device."""
    import diffusers

    with shapes_alone():
        return getattr(diffusers, vae_class(config, Path("the VAE"))).from_config(config)
