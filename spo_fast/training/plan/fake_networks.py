"""Networks of the right shapes without weights."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from spo_fast.config.recipes import TINY_VAES
from spo_fast.data.files import read_header, read_json, weight_files
from spo_fast.data.weights import read_tensors
from spo_fast.models.files.layout import vae_files
from spo_fast.models.files.single_file import vae_class
from spo_fast.models.files.sources import CONFIGS, DEFAULTS, Resolved
from spo_fast.scorers.clip import ClipConfig, TowerConfig

VIT_H = ClipConfig(
    text=TowerConfig(width=1024, mlp_width=4096, num_layers=24, num_heads=16, activation="gelu"),
    vision=TowerConfig(width=1280, mlp_width=5120, num_layers=32, num_heads=16, activation="gelu"),
    **{"vocab_size": 49408, "max_length": 77, "image_size": 224, "patch_size": 14, "projection_dim": 1024},
    time_conditioned=False,
)
VIT_L = replace(
    VIT_H,
    text=TowerConfig(width=768, mlp_width=3072, num_layers=12, num_heads=12, activation="quick_gelu"),
    vision=TowerConfig(width=1024, mlp_width=4096, num_layers=24, num_heads=16, activation="quick_gelu"),
    projection_dim=768,
)
SCORER_CLIPS = {"clip": VIT_L, "aesthetic": VIT_L, "image_reward": VIT_L}  # the others: VIT_H. ImageReward is a BLIP-L


def vae_settings(kind: str, resolved: Resolved | None, name: str | None) -> dict[str, Any]:
    files = [] if resolved is None else [file for file in vae_files(resolved) if file.name == "config.json"]
    if files:
        return read_json(files[0])
    if resolved is None and name in TINY_VAES.values():
        return {"_class_name": "AutoencoderTiny"}  # the class's own defaults
    fixed = {"force_upcast": False} if name == DEFAULTS["sdxl"].pretrained_vae_model_name_or_path else {}
    return read_json(CONFIGS / kind / "vae" / "config.json") | fixed


def fake_vae(config: dict[str, Any]) -> Any:
    import diffusers

    with torch.device("meta"):
        return getattr(diffusers, vae_class(config, Path("the VAE"))).from_config(config)


def shapes_of(path: Path) -> dict[str, Tensor]:
    """The tensors of a file of weights, or of an index's shards, as meta tensors: only shapes are read."""
    return {name: value for file in weight_files(path) for name, value in _shapes_of(file).items()}


def _shapes_of(file: Path) -> dict[str, Tensor]:
    if file.suffix == ".safetensors":
        return {name: torch.empty(entry["shape"], device="meta") for name, entry in read_header(file).items()}
    try:
        return torch.load(file, map_location="meta", mmap=True, weights_only=True)
    except Exception:  # an older format, or no file of tensors: then this says so
        return read_tensors(file)
