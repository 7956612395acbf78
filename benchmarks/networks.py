"""Networks of the published sizes with random weights, built on the device: speed does not depend on the weights.

Weights are drawn on the bf16 grid, so that float32, bf16 and fp16 networks of one seed compute with the same numbers
(fp16 keeps them all but the smallest).
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.shapes import text_config, text_length, unet_config, vae_config, vocabulary
from spo_fast.method.experience import Cond
from spo_fast.models.files.sources import CONFIGS
from spo_fast.scorers.clip import Clip, ClipConfig, TowerConfig
from spo_fast.scorers.spm import ClipScorer

# Std of the entries of a LoRA's update B A. Not zero: the policy would be the reference, every log-ratio 0. Not tiny
# either: at 0.0005 the log-ratios of a random SD1.5 are near 1e-4 and bf16's rounding is three times larger
# (LOG.md): no comparison of them could fail. Here they are hundredths, below the published clamp of 0.1.
LORA_UPDATE_STD = 0.02


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """The global generators set for the block, and put back."""
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        yield


@contextlib.contextmanager
def built_on(device: str, seed: int) -> Iterator[None]:
    """New modules come into being on the device in bf16 with seeded weights."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with seeded(seed), torch.device(device):
            yield
    finally:
        torch.set_default_dtype(before)


def frozen(module: nn.Module, device: str, dtype: torch.dtype) -> Any:
    from diffusers.utils import logging

    logging.set_verbosity_error()  # it warns at every cast of a network that it has no float32 modules to keep
    return module.to(device, dtype).requires_grad_(False).eval()


def make_unet(kind: str, size: str, device: str, dtype: torch.dtype) -> Any:
    from diffusers import UNet2DConditionModel

    with built_on(device, seed=1):
        unet = UNet2DConditionModel.from_config(unet_config(kind, size))
    return frozen(unet, device, dtype)


def make_vae(kind: str, size: str, device: str, dtype: torch.dtype) -> Any:
    from diffusers import AutoencoderKL

    with built_on(device, seed=2):
        vae = AutoencoderKL.from_config(vae_config(kind, size))
    return frozen(vae, device, dtype)


def make_text_encoders(kind: str, size: str, device: str, dtype: torch.dtype) -> list[Any]:
    """CLIP-L, and for SDXL bigG with its projection."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    encoders = []
    for part in ("text_encoder", "text_encoder_2") if kind == "sdxl" else ("text_encoder",):
        config = text_config(kind, size, part)
        projected = "CLIPTextModelWithProjection" in config.get("architectures", ())
        with built_on(device, seed=3):
            encoder = (CLIPTextModelWithProjection if projected else CLIPTextModel)(CLIPTextConfig(**config))
        encoders.append(frozen(encoder, device, dtype))
    return encoders


def spm_config(size: str) -> ClipConfig:
    """ViT-H/14 with timestep modulations (the step-aware preference model), or a smaller one (shapes.SIZES)."""
    text, vision, pixels, patch, shared = {  # width, layers and heads of each tower
        "full": ((1024, 24, 16), (1280, 32, 16), 224, 14, 1024),
        "mid": ((256, 8, 4), (384, 12, 6), 224, 16, 256),
        "toy": ((48, 2, 4), (72, 3, 4), 16, 4, 32),
        "tiny": ((32, 2, 4), (48, 2, 4), 32, 8, 24),
    }[size]

    def tower(width: int, layers: int, heads: int) -> TowerConfig:
        mlp = (4 if width > 100 else 2) * width
        return TowerConfig(width=width, mlp_width=mlp, num_layers=layers, num_heads=heads, activation="gelu")

    return ClipConfig(
        text=tower(*text),
        vision=tower(*vision),
        vocab_size=vocabulary(size),
        max_length=text_length(size),
        image_size=pixels,
        patch_size=patch,
        projection_dim=shared,
        time_conditioned=True,
    )


def make_spm(size: str, device: str, dtype: torch.dtype) -> ClipScorer:
    with built_on(device, seed=4):
        clip = Clip(spm_config(size))
        for name, p in clip.named_parameters():
            if p.ndim >= 2:
                nn.init.normal_(p, std=p[0].numel() ** -0.5)
            elif not name.endswith("norm.weight") and "logit_scale" not in name and "layer_norm" not in name:
                nn.init.normal_(p, std=0.02)
    clip = clip.to(device, torch.float32)
    with torch.no_grad():
        clip.logit_scale.fill_(4.6052)

    def no_tokenizer(prompts: list[str]) -> Tensor:
        raise AssertionError("benchmarks bring token ids")

    return ClipScorer(clip, no_tokenizer, dtype=dtype)


def token_ids(prompts: int, device: str, size: str = "full") -> Tensor:
    """(P, 77) int64: start, random words, and the end token (the largest id) at the last place."""
    generator, words = torch.Generator().manual_seed(5), vocabulary(size)
    ids = torch.randint(0, words - 2, (prompts, text_length(size)), generator=generator)
    ids[:, 0], ids[:, -1] = words - 2, words - 1
    return ids.to(device)


def conditioning(kind: str, size: str, prompts: int, device: str, dtype: torch.dtype) -> Cond:
    """Random prompt embeddings of the UNet's widths, the empty prompt's beside them."""
    config, generator = unet_config(kind, size), torch.Generator().manual_seed(6)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).bfloat16().to(device, dtype)

    width = config["cross_attention_dim"]
    cond, uncond = ({"prompt_embeds": draw(n, text_length(size), width)} for n in (prompts, 1))
    if kind == "sdxl":
        pooled = config["projection_class_embeddings_input_dim"] - 6 * config["addition_time_embed_dim"]
        pixels = 8.0 * config["sample_size"]
        uncond["text_embeds"], cond["text_embeds"] = torch.zeros(1, pooled).to(device, dtype), draw(prompts, pooled)
        uncond["time_ids"] = torch.tensor([[pixels, pixels, 0, 0, pixels, pixels]]).to(device, dtype)
        cond["time_ids"] = uncond["time_ids"].expand(prompts, -1)
    return Cond(cond, uncond)


def lora_weights(shapes: Mapping[str, torch.Size]) -> dict[str, Tensor]:
    """float32 on the CPU, by name and rank only: A as PEFT's gaussian start, N(0, 1 / rank^2), B to LORA_UPDATE_STD."""
    weights = {}
    for i, name in enumerate(sorted(shapes)):
        generator = torch.Generator().manual_seed(1000 + i)
        is_a = ".lora_A." in name
        rank = shapes[name][0] if is_a else shapes[name][1]
        std = 1 / rank if is_a else LORA_UPDATE_STD * rank**0.5
        weights[name] = std * torch.randn(shapes[name], generator=generator)
    return weights


def ddim_scheduler(kind: str, num_steps: int) -> Any:
    """The model's shipped noise schedule as DDIM with its timesteps set."""
    from diffusers import DDIMScheduler

    config = json.loads((CONFIGS / kind / "scheduler" / "scheduler_config.json").read_text())
    scheduler = DDIMScheduler.from_config({k: v for k, v in config.items() if not k.startswith("_")})
    scheduler.set_timesteps(num_steps)
    return scheduler
