"""The run's scorers, their networks of the right shapes and without weights."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from spo_fast.config.scorers import find_scorer
from spo_fast.data.files import read_header, weight_files
from spo_fast.data.weights import read_tensors
from spo_fast.scorers.aesthetic import AestheticScorer
from spo_fast.scorers.base import PixelScorer
from spo_fast.scorers.clip import Clip, ClipConfig, Layer, TowerConfig
from spo_fast.scorers.clip_files import find_weights, load_clip, read_hf_config
from spo_fast.scorers.geneval import GenEval, fake_detector
from spo_fast.scorers.image_reward import MAX_TOKENS, ImageReward, ImageRewardScorer, Sizes
from spo_fast.scorers.preprocess import PictureScorer, score_head
from spo_fast.scorers.spm import ClipScorer
from spo_fast.training.plan.once import Once, shapes_alone

VIT_H = ClipConfig(
    text=TowerConfig(width=1024, mlp_width=4096, num_layers=24, num_heads=16, activation="gelu"),
    vision=TowerConfig(width=1280, mlp_width=5120, num_layers=32, num_heads=16, activation="gelu"),
    vocab_size=49408,
    max_length=77,
    image_size=224,
    patch_size=14,
    projection_dim=1024,
    time_conditioned=False,
)
VIT_L = replace(
    VIT_H,
    text=TowerConfig(width=768, mlp_width=3072, num_layers=12, num_heads=12, activation="quick_gelu"),
    vision=TowerConfig(width=1024, mlp_width=4096, num_layers=24, num_heads=16, activation="quick_gelu"),
    projection_dim=768,
)


class Files(NamedTuple):
    """A scorer's weights and those beside them, where there are any, and how it computes."""

    path: Path | None
    beside: Path | None
    dtype: torch.dtype
    time_conditioned: bool


def fake_scorer(name: str, paths: Mapping[str, Path], dtype: torch.dtype, time_conditioned: bool) -> PixelScorer:
    """A scorer of pictures on the meta device, by the network of its record and the shapes of its files, if any.

    Raises ValueError for a network that is not known.
    """
    record = find_scorer(name)
    if record.network not in NETWORKS:
        raise ValueError(f"scorer {name} is costed as {record.network!r}: known are {', '.join(NETWORKS)}.")
    aware = time_conditioned and "time_conditioned" in record.options
    with shapes_alone():
        return NETWORKS[record.network](Files(paths.get(name), paths.get(record.beside), dtype, aware))


def networks_of(scorer: object) -> list[nn.Module]:
    """What a scorer computes with."""
    return [part for part in vars(scorer).values() if isinstance(part, nn.Module)]


def run_once(scorer: PixelScorer, once: Once) -> PixelScorer:
    """The scorer of pictures with fake weights, which runs once for each shape."""
    for network in networks_of(scorer):
        once.repeat_blocks(once.weights(network), (Layer,))
    if isinstance(scorer, GenEval):  # it looks at pictures singly
        scorer.logits = once.wrap(scorer.logits, "score")  # type: ignore[method-assign]
    elif networks_of(scorer):
        scorer.score_pixels = once.wrap(scorer.score_pixels, "score")  # type: ignore[method-assign]
    if isinstance(scorer, ClipScorer):
        scorer.encode_ids = once.wrap(scorer.encode_ids, "encode prompts", samples=False)  # type: ignore[method-assign]
        with once.live:
            scorer.encode([""])  # it keeps what it encoded
    return scorer


def _clip(published: ClipConfig, files: Files) -> ClipScorer:
    clip = _clip_of(published, files.path, files.dtype, files.time_conditioned)
    return ClipScorer(clip, lambda prompts: torch.zeros(len(prompts), clip.config.max_length).long(), dtype=files.dtype)


def _clip_of(published: ClipConfig, path: Path | None, dtype: torch.dtype, aware: bool = False) -> Clip:
    """By its file's shapes, or of the published sizes."""
    if path is None:
        return Clip(replace(published, time_conditioned=aware)).set_compute_dtype(dtype)
    file = find_weights(path)
    hf_config = read_hf_config(file.parent)
    clip = load_clip(shapes_of(file), time_conditioned=aware, hf_config=hf_config, device="meta", name=str(file))
    return clip.set_compute_dtype(dtype)


def _aesthetic(files: Files) -> AestheticScorer:
    clip = _clip_of(VIT_L, files.beside, files.dtype)
    return AestheticScorer(clip, score_head(clip.config.projection_dim), files.dtype)


def _image_reward(files: Files) -> ImageRewardScorer:
    sizes = Sizes() if files.path is None else Sizes.of(shapes_of(find_weights(files.path)))
    words = SimpleNamespace(encode_batch=lambda prompts: [SimpleNamespace(ids=[0] * MAX_TOKENS)] * len(prompts))
    scorer = ImageRewardScorer(ImageReward(sizes), words, "meta", files.dtype)  # type: ignore[arg-type]  # one method
    scorer.device = "cpu"  # of the words
    return scorer


class Detector(GenEval):
    """GenEval's detector on each picture; its CLIP on each object whose colour is asked is held, and not counted."""

    def _right(self, pixels: Tensor, wanted: Mapping[str, object]) -> bool:
        self.logits(pixels)
        return True


def _mask2former(files: Files) -> Detector:
    clip = _clip_of(VIT_L, files.beside, torch.float32)
    return Detector(fake_detector(files.path), clip, lambda prompts: torch.zeros(len(prompts), 0), {"": {}})


class Unknown(PictureScorer):
    """A scorer of which nothing is known but that it sees pictures."""

    def __init__(self, files: Files):
        pass

    def encode(self, prompts: list[str]) -> Tensor:
        """As PixelScorer's."""
        return torch.empty(len(prompts))

    def score_pixels(self, pixels: Tensor, t: Tensor, text: Tensor) -> Tensor:
        """As PixelScorer's."""
        return torch.empty(len(pixels))


NETWORKS: dict[str, Callable[[Files], PixelScorer]] = {
    "vit-h": functools.partial(_clip, VIT_H),
    "vit-l": functools.partial(_clip, VIT_L),
    "open-clip vit-h": lambda files: _clip(VIT_H, files._replace(path=None)),  # its file's layout is another
    "aesthetic": _aesthetic,
    "image-reward": _image_reward,
    "mask2former": _mask2former,
    "unknown": Unknown,
}
"""What scorers of pictures are costed as, by the network of their record."""


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
