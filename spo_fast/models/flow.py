"""A latent flow-matching model: SD3.5, FLUX.1 and what FLOW_DOORS has, frozen."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from spo_fast.config.sections import ModelConfig
from spo_fast.config.training import Config
from spo_fast.data.files import read_json
from spo_fast.method.experience import Cond, to_device
from spo_fast.method.flow_schedule import flow_scheduler, flow_steps, flow_table, full_flow_table, judged_table
from spo_fast.method.schedule import StepTable, ddim_scheduler, table_of
from spo_fast.models.diffusion import DTYPES, DiffusionModel, vae_dtype
from spo_fast.models.doors import FLOW_DOORS, FlowDoor, Network, SD3Door, Tokens, flow_door
from spo_fast.models.files import kinds, layout, load, sources
from spo_fast.models.prompt_cache import Encoder, PromptCache
from spo_fast.models.quantised import quantise_t5
from spo_fast.models.tensor_cache import fingerprint_files

if TYPE_CHECKING:
    from diffusers.models.transformers.transformer_sd3 import SD3Transformer2DModel

    from spo_fast.models.files.load import VAE, TextEncoder

GUIDANCE = 3.5
"""What a network is told that has guidance as an input, if nothing is asked: FluxPipeline's default."""


class FlowModel(DiffusionModel):
    """A flow's transformer, VAE, schedule and prompts; its network's door (doors.py) knows what they share."""

    def __init__(
        self, cfg: ModelConfig, resolved: sources.Resolved, device: torch.device, prompt_cache_dir: str | Path
    ):
        self.resolved, self.device = resolved, device
        self.kind, self.dtype = resolved.source.kind, DTYPES[cfg.mixed_precision]
        self.scheduler = flow_scheduler(layout.scheduler_config(resolved))
        self.tokenizers = load.load_tokenizers(resolved)
        vae_config = read_json(layout.vae_config_file(resolved))
        # diffusers' decorator hides what `to` takes
        self.vae: VAE = load.load_vae(resolved, vae_dtype(self.kind, self.dtype, vae_config)).to(device)  # type: ignore[arg-type]
        self.network: Network = load.load_transformer(resolved, self.dtype).to(device)  # type: ignore[arg-type]
        self._take_door(cfg)
        settings = f"{self.kind} {self.dtype} {self.lengths} {self.t5_weights}"
        fingerprint = f"{fingerprint_files(layout.text_files(resolved))} {settings}"
        self.prompt_cache = PromptCache(prompt_cache_dir, fingerprint, self._load_encoder)

    def _take_door(self, cfg: ModelConfig) -> None:
        door = flow_door(self.network)
        assert door is not None
        self.door, config = door, self.network.config
        self.t5_weights = cfg.t5_weights
        own = [t.model_max_length for t in self.tokenizers]
        asked = cfg.max_sequence_length
        if asked == 0 and len(own) == len(door.lengths):
            raise ValueError("max_sequence_length=0 is for an SD3 without T5: this model has one. Use 1 to 512.")
        self.lengths = tuple(own[i] if n is None else n if asked is None else asked for i, n in enumerate(door.lengths))
        kinds.check_guidance(config, {"embedded_guidance": cfg.embedded_guidance}, type(self.network).__name__)
        asked_guidance = GUIDANCE if cfg.embedded_guidance is None else cfg.embedded_guidance
        self.told_guidance = asked_guidance if door.takes_guidance(config) else None
        self._take_sizes(cfg)

    def take_size(self, height: int | None, width: int | None) -> None:
        """As a diffusion's. Raises ValueError for a size that the transformer cannot make."""
        own, door = replace(self._model_cfg, height=height, width=width), self.door
        self.height, self.width, self.latent_shape = sizes(own, door, self.network.config, self.vae.config)
        self.tokens = tokens_of(door, self.latent_shape)

    # ------------------------------------------------------------------------------------------------ prompts

    def token_ids(self, prompts: Sequence[str]) -> list[Tensor]:  # (P, L) int64 for each tokenizer, padded
        """The prompts as each tokenizer has them, cut at the door's length."""
        return [
            torch.tensor(t(list(prompts), padding="max_length", max_length=length, truncation=True).input_ids)
            for t, length in zip(self.tokenizers, self.lengths, strict=False)
        ]

    @property
    def text_tokens(self) -> int:
        """Of a prompt, as the network is told it."""
        return self.door.text_tokens(self.lengths)

    def text_encoders(self) -> list[TextEncoder]:
        """Loaded anew, T5 in 8 bits if that was asked for."""
        encoders = load.load_text_encoders(self.resolved, self.dtype)
        self.make_small(encoders)
        return [encoder.to(self.device) for encoder in encoders]  # type: ignore[arg-type]  # as diffusers'

    def make_small(self, encoders: Sequence[TextEncoder]) -> None:
        """T5 in 8 bits, if that was asked for."""
        for encoder in encoders:
            if self.t5_weights != "full" and encoder.config.model_type == "t5":
                quantise_t5(encoder, self.t5_weights)

    def _load_encoder(self) -> Encoder:
        encoders = self.text_encoders()

        @torch.no_grad()
        def encode(prompts: list[str]) -> dict[str, Tensor]:
            ids = [rows.to(e.device) for e, rows in zip(encoders, self.token_ids(prompts), strict=True)]
            return self.door.embeddings(self.network.config, encoders, Tokens(ids, self.lengths))

        return encode

    def cond(self, prompts: Sequence[str]) -> Cond:
        """Conditioning of the prompts, read from the cache (encoded first if they are not there)."""
        self.prompt_cache.ensure([*prompts, ""])
        cond = self.prompt_cache.get(prompts, self.device, self.dtype)
        uncond = self.prompt_cache.get([""], self.device, self.dtype)
        if self.told_guidance is not None:
            # float32 as its pipeline gives it: the network multiplies by 1000 in its own type
            uncond["guidance"] = to_device(torch.tensor([self.told_guidance]), self.device)
            cond["guidance"] = uncond["guidance"].expand(len(prompts))
        return Cond(cond, uncond)

    # ------------------------------------------------------------------------------------------------ network

    def fresh_network(self, dtype: torch.dtype) -> SD3Transformer2DModel:
        """The network as its files have it, again, on the CPU: for a judge made of its blocks. An SD3's only."""
        if not isinstance(self.door, SD3Door):
            raise ValueError(f"a latent judge is made of SD3's blocks, and a {type(self.network).__name__} has none.")
        return load.load_transformer(self.resolved, dtype)  # type: ignore[return-value]

    # ------------------------------------------------------------------------------------------------ schedule

    def table(self, num_steps: int, eta: float, sampler: str = "ddim") -> StepTable:
        """Steps of the model's own schedule, on the device."""
        sigmas, timesteps = flow_steps(self.scheduler, num_steps, self.tokens, self.door.even_sigmas)
        return flow_table(sigmas, eta, sampler, timesteps).to(self.device)

    def full_table(self) -> StepTable:
        """1000 sigmas, shifted as the model's sampling is, noisiest first, on the device."""
        return full_flow_table(self.scheduler, self.tokens).to(self.device)

    def judged_table(self) -> StepTable:
        """Sigmas of equal noise-to-signal ratio to all timesteps that scorers are told: row 999 - t is timestep t."""
        return judged_table().to(self.device)


def sizes(
    cfg: ModelConfig, door: FlowDoor, network: Mapping[str, Any], vae: Mapping[str, Any]
) -> tuple[int, int, tuple[int, int, int]]:
    """Height and width of the pictures, and the latents' shape. Raises ValueError for a size that cannot be."""
    levels = vae.get("block_out_channels") or vae.get("decoder_block_out_channels") or (64,) * 4  # a tiny VAE's default
    factor = 2 ** (len(levels) - 1)
    default = door.default_size(network, factor)
    height, width = cfg.height or default, cfg.width or default
    kinds.check_flow_size(network, vae, height, width)
    return height, width, (door.channels(network), height // factor, width // factor)


def tokens_of(door: FlowDoor, latent_shape: tuple[int, int, int]) -> int:
    """Tokens of a picture."""
    _, h, w = latent_shape
    return (h // door.patch) * (w // door.patch)


def sampled_table(cfg: Config, resolved: sources.Resolved | None) -> StepTable:
    """A rollout's steps from a model's files alone, or from those of its published architecture."""
    source, sample = resolved.source if resolved else sources.MODELS[cfg.model.model](cfg.model), cfg.sample
    folder = resolved.config_dir if resolved else sources.settings_directory(source)
    own = folder / "scheduler" / "scheduler_config.json"
    scheduler = layout.scheduler_config(resolved) if resolved else read_json(own)
    if source.kind not in sources.FLOWS:
        return table_of(ddim_scheduler(scheduler), sample.num_steps, sample.eta)
    network = layout.transformer_config(resolved) if resolved else read_json(folder / "transformer" / "config.json")
    door = FLOW_DOORS[str(network["_class_name"])]
    vae = read_json(layout.vae_config_file(resolved) if resolved else folder / "vae" / "config.json")
    tokens = tokens_of(door, sizes(cfg.model, door, network, vae)[2])
    sigmas, timesteps = flow_steps(flow_scheduler(scheduler), sample.num_steps, tokens, door.even_sigmas)
    return flow_table(sigmas, sample.eta, sample.sampler, timesteps)


def load_model(
    cfg: ModelConfig, resolved: sources.Resolved, device: torch.device, prompt_cache_dir: str | Path
) -> DiffusionModel:
    """The model of its kind."""
    made = FlowModel if resolved.source.kind in sources.FLOWS else DiffusionModel
    return made(cfg, resolved, device, prompt_cache_dir)
