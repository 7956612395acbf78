"""Networks of the right shapes without weights."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from spo_fast.config.recipes import TINY_VAES
from spo_fast.config.scorers import find_scorer
from spo_fast.data.files import read_header, read_json, weight_files
from spo_fast.data.weights import read_tensors
from spo_fast.models.files.layout import vae_files
from spo_fast.models.files.single_file import vae_class
from spo_fast.models.files.sources import CONFIGS, DEFAULTS, Resolved
from spo_fast.models.prompt_cache import ENCODE_BATCH
from spo_fast.scorers.clip import Clip, ClipConfig, TowerConfig, unit
from spo_fast.scorers.clip_files import find_weights, load_clip, read_hf_config
from spo_fast.scorers.geneval import GenEval, fake_detector
from spo_fast.scorers.image_reward import MAX_TOKENS, ImageReward, ImageRewardScorer, Sizes
from spo_fast.scorers.preprocess import cropped, score_head
from spo_fast.scorers.spm import ClipScorer

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


@dataclass(frozen=True)
class FakeScorer:
    """A scorer that only costs: its networks on the meta device, and what it does with decoded pictures."""

    networks: tuple[nn.Module, ...]
    score: Callable[[Tensor, Tensor], Any] | None
    """(pixels (N, 3, H, W), text rows) -> anything; None: what it does is not known."""
    text: tuple[tuple[int, ...], torch.dtype]
    """Shape of a prompt's row, and its type."""
    encode: Callable[[], Any] | None = None
    """The text tower on a batch of prompts."""
    one_by_one: bool = False
    """It looks at pictures singly."""


def fake_scorer(name: str, paths: Mapping[str, Path], dtype: torch.dtype, time_conditioned: bool) -> FakeScorer:
    """What stands for a scorer, by the network of its record and the shapes of its files, if there are any.

    Raises ValueError for a network that is not known.
    """
    record = find_scorer(name)
    if record.network not in NETWORKS:
        raise ValueError(f"scorer {name} is costed as {record.network!r}: known are {', '.join(NETWORKS)}.")
    aware = time_conditioned and "time_conditioned" in record.options
    return NETWORKS[record.network](paths.get(name), paths.get(record.beside), dtype, aware)


def _clip(published: ClipConfig, path: Path | None, beside: Path | None, dtype: torch.dtype, aware: bool) -> FakeScorer:
    clip = _clip_of(published, path, dtype, aware)

    def encode() -> Tensor:
        rows = torch.zeros(ENCODE_BATCH, clip.config.max_length, dtype=torch.int64)
        return ClipScorer(clip, lambda prompts: rows, dtype=dtype).encode_ids(rows)

    def score(pixels: Tensor, text: Tensor) -> Tensor:
        scorer = ClipScorer(clip, lambda prompts: torch.zeros(len(prompts), 0), dtype=dtype)
        return scorer.score_pixels(pixels, torch.zeros((), dtype=torch.int64), text)

    return FakeScorer((clip,), score, ((clip.config.projection_dim,), torch.float32), encode)


def _clip_of(published: ClipConfig, path: Path | None, dtype: torch.dtype, aware: bool) -> Clip:
    """By its file's shapes, or of the published sizes."""
    if path is None:
        with torch.device("meta"):
            return Clip(replace(published, time_conditioned=aware)).set_compute_dtype(dtype)
    file = find_weights(path)
    hf_config = read_hf_config(file.parent)
    clip = load_clip(shapes_of(file), time_conditioned=aware, hf_config=hf_config, device="meta", name=str(file))
    return clip.set_compute_dtype(dtype)


def _open_clip(path: Path | None, beside: Path | None, dtype: torch.dtype, aware: bool) -> FakeScorer:
    """HPSv2's file, whose layout is another: the published sizes."""
    return _clip(VIT_H, None, None, dtype, aware)


def _aesthetic(path: Path | None, beside: Path | None, dtype: torch.dtype, aware: bool) -> FakeScorer:
    clip = _clip_of(VIT_L, beside, dtype, aware)
    with torch.device("meta"):
        head = score_head(clip.config.projection_dim)

    def score(pixels: Tensor, text: Tensor) -> Tensor:
        return head(unit(clip.get_image_features(cropped(pixels, clip.config.image_size, dtype))))

    return FakeScorer((clip, head), score, ((0,), torch.float32))


def _image_reward(path: Path | None, beside: Path | None, dtype: torch.dtype, aware: bool) -> FakeScorer:
    sizes = Sizes() if path is None else Sizes.of(shapes_of(find_weights(path)))
    with torch.device("meta"):
        model = ImageRewardScorer(ImageReward(sizes), None, "meta", dtype).model  # type: ignore[arg-type]  # reads none

    def score(pixels: Tensor, text: Tensor) -> Tensor:
        return model(cropped(pixels, model.image_size, dtype), text)

    return FakeScorer((model,), score, ((MAX_TOKENS,), torch.int64))


def _mask2former(path: Path | None, beside: Path | None, dtype: torch.dtype, aware: bool) -> FakeScorer:
    """GenEval's detector on each picture; its CLIP on each object whose colour is asked is held, and not counted."""
    detector = fake_detector(path)
    with torch.device("meta"):
        clip = _clip_of(VIT_L, beside, torch.float32, aware)
        judge = GenEval(detector, clip, lambda prompts: torch.zeros(len(prompts), 0), {})

    def score(pixels: Tensor, text: Tensor) -> Any:
        return judge.logits(pixels.float().clamp(-1, 1))

    return FakeScorer((detector, clip), score, ((), torch.int64), one_by_one=True)


def _unknown(path: Path | None, beside: Path | None, dtype: torch.dtype, aware: bool) -> FakeScorer:
    return FakeScorer((), None, ((), torch.int64))


NETWORKS: dict[str, Callable[[Path | None, Path | None, torch.dtype, bool], FakeScorer]] = {
    "vit-h": functools.partial(_clip, VIT_H),
    "vit-l": functools.partial(_clip, VIT_L),
    "open-clip vit-h": _open_clip,
    "aesthetic": _aesthetic,
    "image-reward": _image_reward,
    "mask2former": _mask2former,
    "unknown": _unknown,
}
"""What scorers of pictures are costed as, by the network of their record."""


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
