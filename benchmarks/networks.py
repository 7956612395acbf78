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

from benchmarks.shapes import unet_config
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

    config = json.loads((CONFIGS / kind / "vae" / "config.json").read_text())
    if size == "tiny":
        config |= {"block_out_channels": (8, 8, 8, 16), "layers_per_block": 1, "norm_num_groups": 4, "sample_size": 64}
    with built_on(device, seed=2):
        vae = AutoencoderKL.from_config(config)
    return frozen(vae, device, dtype)


def make_text_encoders(kind: str, size: str, device: str, dtype: torch.dtype) -> list[Any]:
    """CLIP-L, and for SDXL bigG with its projection."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    encoders = []
    for part in ("text_encoder", "text_encoder_2") if kind == "sdxl" else ("text_encoder",):
        config = json.loads((CONFIGS / kind / part / "config.json").read_text())
        projected = "CLIPTextModelWithProjection" in config.get("architectures", ())
        if size == "tiny":
            config |= {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "num_hidden_layers": 2}
            config |= {"projection_dim": 16}
        with built_on(device, seed=3):
            encoder = (CLIPTextModelWithProjection if projected else CLIPTextModel)(CLIPTextConfig(**config))
        encoders.append(frozen(encoder, device, dtype))
    return encoders


def spm_config(size: str) -> ClipConfig:
    """ViT-H/14 with timestep modulations (the step-aware preference model), or 32 px of it."""
    if size == "tiny":
        text = TowerConfig(width=32, mlp_width=64, num_layers=2, num_heads=4, activation="gelu")
        vision = TowerConfig(width=48, mlp_width=96, num_layers=2, num_heads=4, activation="gelu")
        sizes = {"image_size": 32, "patch_size": 8, "projection_dim": 24}
    else:
        text = TowerConfig(width=1024, mlp_width=4096, num_layers=24, num_heads=16, activation="gelu")
        vision = TowerConfig(width=1280, mlp_width=5120, num_layers=32, num_heads=16, activation="gelu")
        sizes = {"image_size": 224, "patch_size": 14, "projection_dim": 1024}
    return ClipConfig(text=text, vision=vision, vocab_size=49408, max_length=77, time_conditioned=True, **sizes)


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


def token_ids(prompts: int, device: str) -> Tensor:
    """(P, 77) int64: start, random words, and the end token (the largest id) at the last place."""
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(0, 49406, (prompts, 77), generator=generator)
    ids[:, 0], ids[:, -1] = 49406, 49407
    return ids.to(device)


def conditioning(kind: str, size: str, prompts: int, device: str, dtype: torch.dtype) -> Cond:
    """Random prompt embeddings of the UNet's widths, the empty prompt's beside them."""
    config, generator = unet_config(kind, size), torch.Generator().manual_seed(6)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).bfloat16().to(device, dtype)

    width = config["cross_attention_dim"]
    cond, uncond = {"prompt_embeds": draw(prompts, 77, width)}, {"prompt_embeds": draw(1, 77, width)}
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
