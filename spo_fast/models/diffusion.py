"""A latent diffusion model: prompt embeddings, UNet, VAE, schedule, and the files of trained weights others load."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from spo_fast.config.sections import ModelConfig
from spo_fast.data.files import read_json, save_tensors
from spo_fast.method.experience import Cond, to_device
from spo_fast.method.schedule import StepTable, ddim_scheduler, full_table, schedule_notes, table_of
from spo_fast.models.doors import Network
from spo_fast.models.files import layout, load, sources
from spo_fast.models.files.comfyui import model_spec
from spo_fast.models.files.lora_files import peft_names, save_transformer_lora, save_unet_lora, written_settings
from spo_fast.models.fuse import fuse
from spo_fast.models.policy import Policy
from spo_fast.models.prompt_cache import Encoder, PromptCache
from spo_fast.models.tensor_cache import fingerprint_files
from spo_fast.ops.linear import take_linear

if TYPE_CHECKING:
    from spo_fast.models.files.load import VAE, TextEncoder

DTYPES = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16, "fp64": torch.float64}

IN_CACHE = 32 * 32
"""Latent pixels from which a CPU decodes one or two pictures at a time, whose activations its caches hold: the same
work, up to a fifth faster (benchmarks/LOG.md)."""


class DiffusionModel:
    """SD-1.5, SDXL and every pipeline of their layout, frozen."""

    def __init__(
        self, cfg: ModelConfig, resolved: sources.Resolved, device: torch.device, prompt_cache_dir: str | Path
    ):
        self.resolved, self.device = resolved, device
        self.kind = resolved.source.kind
        self.dtype = DTYPES[cfg.mixed_precision]
        self.scheduler_config = layout.scheduler_config(resolved)
        self._ddim = ddim_scheduler(self.scheduler_config)
        print("".join(f"{note}\n" for note in schedule_notes(self.scheduler_config)), end="")
        self.tokenizers = load.load_tokenizers(resolved)
        # strict: rows of the days when encoders were loaded in part are not read again
        fingerprint = f"{fingerprint_files(layout.text_files(resolved))} {self.kind} {self.dtype} strict"
        self.prompt_cache = PromptCache(prompt_cache_dir, fingerprint, self._load_encoder)
        self.zero_uncond = self.kind == "sdxl" and sources.forces_zeros(resolved.config_dir)

        dtype = vae_dtype(self.kind, self.dtype, read_json(layout.vae_config_file(resolved)))
        # diffusers' decorator hides what `to` takes
        self.vae: VAE = load.load_vae(resolved, dtype).to(device)  # type: ignore[arg-type]
        self.network: Network = load.load_unet(resolved, self.dtype).to(device)  # type: ignore[arg-type]
        self._take_sizes(cfg)

    def _take_sizes(self, cfg: ModelConfig) -> None:
        self._model_cfg = cfg
        self.take_size(cfg.height, cfg.width)

    def take_size(self, height: int | None, width: int | None) -> None:
        """Pictures are of this size from now on; None: the model's own. Raises ValueError for what the VAE cannot."""
        factor = 2 ** (len(self.vae.config["block_out_channels"]) - 1)
        default: int = self.network.config["sample_size"] * factor
        self.height, self.width = height or default, width or default
        check_size(self.height, self.width, factor)
        self.size_told = (default, default) if self._model_cfg.size_told == "native" else (self.height, self.width)
        self.latent_shape = (self.network.config["in_channels"], self.height // factor, self.width // factor)

    @property
    def latent_dtype(self) -> torch.dtype:
        """Latents and log-probabilities are float32 in 16-bit runs too (float64 in checks)."""
        return torch.float64 if self.dtype == torch.float64 else torch.float32

    # ------------------------------------------------------------------------------------------------ prompts

    def token_ids(self, prompts: Sequence[str]) -> list[Tensor]:  # (P, L) int64 for each tokenizer, padded
        """The prompts as each tokenizer has them, cut at its length."""
        return [
            torch.tensor(
                t(list(prompts), padding="max_length", max_length=t.model_max_length, truncation=True).input_ids
            )
            for t in self.tokenizers
        ]

    @property
    def text_tokens(self) -> int:
        """Of a prompt, as the network is told it."""
        return self.tokenizers[0].model_max_length

    def tokenize(self, prompts: Sequence[str]) -> Tensor:  # (P, L) int64
        """Ids of the first tokenizer: what the CLIP scorers read (all share CLIP's vocabulary)."""
        return self.token_ids(prompts)[0]

    def text_encoders(self) -> list[TextEncoder]:
        """Loaded anew."""
        return [
            take_linear(e.to(self.device))  # type: ignore[arg-type]  # as diffusers'
            for e in load.load_text_encoders(self.resolved, self.dtype)
        ]

    def _load_encoder(self) -> Encoder:
        encoders = self.text_encoders()

        @torch.no_grad()
        def encode(prompts: list[str]) -> dict[str, Tensor]:
            ids = (rows.to(self.device) for rows in self.token_ids(prompts))
            return embeddings(self.kind, encoders, ids)

        return encode

    def cond(self, prompts: Sequence[str]) -> Cond:
        """Conditioning of the prompts, read from the cache (encoded first if they are not there)."""
        self.prompt_cache.ensure([*prompts, ""])
        cond = self.prompt_cache.get(prompts, self.device, self.dtype)
        uncond = self.prompt_cache.get([""], self.device, self.dtype)
        if self.zero_uncond:
            uncond = {name: torch.zeros_like(value) for name, value in uncond.items()}
        if self.kind == "sdxl":
            # original size, crop corner, target size
            size = torch.tensor([[*self.size_told, 0, 0, *self.size_told]])
            uncond["time_ids"] = to_device(size, self.device).to(self.dtype)
            cond["time_ids"] = uncond["time_ids"].expand(len(prompts), -1)
        return Cond(cond, uncond)

    # ------------------------------------------------------------------------------------------------ images

    def fuse(self) -> None:
        """From now on UNet and VAE compute by our ops; LoRA layers must be there already."""
        fuse(self.network)
        fuse(self.vae)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:  # (N, C, h, w) -> (N, 3, H, W) in about [-1, 1]
        """Pictures of latents."""
        return decode_in_cache(self.vae, latents)

    @torch.no_grad()
    def posterior(self, pixels: Tensor) -> tuple[Tensor, Tensor]:  # (N, 3, H, W) in [-1, 1] -> (N, C, h, w) each
        """Mean and standard deviation of the VAE's latents, before scaling. A tiny VAE has no deviation."""
        encoded = self.vae.encode(pixels.to(self.vae.dtype))
        if hasattr(encoded, "latents"):
            return encoded.latents, torch.zeros_like(encoded.latents)
        return encoded.latent_dist.mean, encoded.latent_dist.std

    def scaled(self, latents: Tensor) -> Tensor:
        """The VAE's latents as the network sees them."""
        return scaled(self.vae, latents)

    def vae_fingerprint(self) -> str:
        """Names the VAE's weights, for what is kept of its outputs."""
        return fingerprint_files(layout.vae_files(self.resolved))

    def table(self, num_steps: int, eta: float, sampler: str = "ddim") -> StepTable:
        """Steps of the model's own noise schedule, on the device; of a diffusion DDIM's, whatever the sampler."""
        return table_of(self._ddim, num_steps, eta).to(self.device)

    def full_table(self) -> StepTable:
        """All timesteps, noisiest first, on the device: for what is noised to any of them."""
        return full_table(self._ddim.alphas_cumprod, self._ddim.config["prediction_type"]).to(self.device)

    def judged_table(self) -> StepTable:
        """Steps of all timesteps that scorers are told, 999 first: row 999 - t is timestep t."""
        return self.full_table()

    # ------------------------------------------------------------------------------------------------ export

    def save(self, policy: Policy, directory: Path, title: str = "LoRA") -> list[Path]:
        """A policy's trained weights in the formats other software loads; returns the files (or the network's folder).

        LoRA: diffusers' pytorch_lora_weights.safetensors and a kohya/ComfyUI file. Full fine-tuning: unet/ or
        transformer/ in diffusers' layout. Of sharded masters every process calls it, and process 0 writes.
        """
        weights = policy.whole()  # the float32 masters, not the 16-bit weights the network computes with
        if not weights:
            return []
        directory.mkdir(parents=True, exist_ok=True)
        if policy.adapter.full_finetune:
            folder = directory / sources.network_part(self.kind)
            policy.network.save_config(folder)
            save_tensors(weights, folder / "diffusion_pytorch_model.safetensors", metadata={"format": "pt"})
            return [folder]
        state = peft_names(weights)
        save = save_transformer_lora if self.kind in sources.FLOWS else save_unet_lora
        about = model_spec(self.kind, title, (self.height, self.width))
        return save(self.kind, state, written_settings(policy.network.peft_config["default"]), directory, about)


def embeddings(kind: str, encoders: Sequence[TextEncoder], ids: Iterable[Tensor]) -> dict[str, Tensor]:
    """What the UNet is told of P prompts: (P, L, D) prompt_embeds, and SDXL's (P, D') text_embeds."""
    with _default_dtype(encoders[0].dtype):
        hidden = [encoder(row, output_hidden_states=True) for encoder, row in zip(encoders, ids, strict=True)]
    if kind == "sd15":
        return {"prompt_embeds": hidden[0].last_hidden_state}
    # SDXL reads the layer before the last of both encoders, and the second's pooled projection
    embeds = torch.cat([out.hidden_states[-2] for out in hidden], dim=-1)
    return {"prompt_embeds": embeds, "text_embeds": hidden[-1].text_embeds}


@contextlib.contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """float64 as torch's default for float64 encoders: transformers 4.57 makes their masks in it, or raises."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64 if dtype == torch.float64 else before)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def decode(vae: VAE, latents: Tensor) -> Tensor:  # (N, C, h, w) -> (N, 3, H, W) in about [-1, 1]
    """The VAE's pictures of scaled latents."""
    latents = latents.to(vae.dtype) / vae.config["scaling_factor"]
    if shift := vae.config.get("shift_factor"):
        latents = latents + shift
    return vae.decode(latents, return_dict=False)[0]


def decode_in_cache(vae: VAE, latents: Tensor) -> Tensor:
    """The same, on a CPU of large pictures one or two at a time."""
    if latents.device.type != "cpu" or latents.shape[2:].numel() < IN_CACHE:
        return decode(vae, latents)
    return torch.cat([decode(vae, few) for few in latents.split(1 if vae.dtype == torch.float32 else 2)])


def scaled(vae: VAE, latents: Tensor) -> Tensor:
    """The VAE's latents as a network sees them: of a flow's VAE shifted, too."""
    return (latents - (vae.config.get("shift_factor") or 0)) * vae.config["scaling_factor"]


def vae_dtype(kind: str, dtype: torch.dtype, config: Mapping[str, object]) -> torch.dtype:
    """The VAE computes in the run's type, but SDXL's own VAE, which overflows in float16, in float32."""
    upcast = config.get("force_upcast", config.get("_class_name") != "AutoencoderTiny")  # the classes' own defaults
    return torch.float32 if kind == "sdxl" and dtype == torch.float16 and upcast else dtype


def check_size(height: int, width: int, factor: int) -> None:
    """Raises ValueError for images the VAE cannot make."""
    for name, size in (("height", height), ("width", width)):
        if size % factor:
            raise ValueError(f"{name}={size} must be a multiple of {factor}, the VAE's factor.")
