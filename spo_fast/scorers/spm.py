"""Scorers of decoded images that are CLIPs: the step-aware preference model (SPM) and PickScore.

score = exp(logit_scale) * cos(image, text): logits whose softmax over two images is the probability that people prefer
one (PickScore, arXiv 2305.01569). The SPM's image features also depend on the timestep the image was predicted at.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from spo_fast.method.experience import to_device
from spo_fast.ops.linear import take_linear
from spo_fast.ops.resize_normalize import normalise_channels, resize_normalize
from spo_fast.scorers.clip import Clip, ClipConfig, TowerConfig, unit
from spo_fast.scorers.clip_files import load_clip, save_clip
from spo_fast.scorers.preprocess import CLIP_MEAN, CLIP_STD, PictureScorer, cropped

Preprocess = Callable[[Tensor, int, torch.dtype], Tensor]
Tokenize = Callable[[list[str]], Tensor]
"""P prompts -> (P, L) int64 ids, L at most the text tower's max_length, the end token being the largest id."""

# Prompts through the text tower at a time, the last batch padded: matrix products sum in an order that depends on the
# batch's shape, and a resumed run meets its prompts in other company. With one shape a prompt has one embedding.
TEXT_BATCH = 8
MAX_CACHED_PROMPTS = 65_536  # 256 MiB at D = 1024


# -------------------------------------------------------------------------------------------------------- preprocessing


def preprocess_for_scoring(
    images: Tensor,  # (B, 3, H, W) floating, about [-1, 1]
    size: int,
    dtype: torch.dtype = torch.float32,
) -> Tensor:  # (B, 3, size, size) `dtype`, normalised
    """What the SPM sees while it judges candidates of a diffusion model, as the published trainer has it.

    Bicubic (a = -0.75, no antialias) to short side `size`, centre crop, to [0, 1], clamp: the overshoot of the VAE goes
    through the resize (ops/resize_normalize.py). The SPM itself was trained on `preprocess_for_spm_training`, which
    clamps first and never crops; the two differ in the published code, and published scores need this one.
    """
    return resize_normalize(images, size, CLIP_MEAN, CLIP_STD, dtype)


def preprocess_for_spm_training(
    images: Tensor,  # (B, 3, H, W) floating, about [-1, 1]
    size: int,
) -> Tensor:  # (B, 3, size, size) float32, normalised
    """What the SPM sees in its training: clamp to [0, 1], float32, bicubic to a square whatever the aspect, clamp.

    Kept apart from `preprocess_for_scoring`: a model trained otherwise would not be comparable with the published one.
    """
    x = (images / 2 + 0.5).clamp(0, 1).float()
    x = F.interpolate(x, size=(size, size), mode="bicubic", align_corners=False)
    return normalise(x.clamp(0, 1))


def normalise(pixels: Tensor) -> Tensor:  # (B, 3, H, W) in [0, 1]
    """CLIP's statistics."""
    return normalise_channels(pixels, CLIP_MEAN, CLIP_STD)


# --------------------------------------------------------------------------------------------------------------- scorer


class ClipScorer(PictureScorer):
    """Score of decoded x0: the SPM when `model` is step-aware, PickScore (or any CLIP score) when it is plain.

    model: frozen here, and its towers cast to `dtype` in place (float32 as published; bfloat16 and float16 allowed).
    Whatever the dtype, the timestep's sinusoid, logit_scale and the cosine are float32.
    preprocess: (pixels, size, dtype) -> what the vision tower sees. scale: of the cosine, in place of exp(logit_scale).
    tokenize: prompts -> ids. Each distinct prompt goes through the text tower once; its features stay on the CPU,
    MAX_CACHED_PROMPTS of them.
    """

    def __init__(
        self,
        model: Clip,
        tokenize: Tokenize,
        *,
        dtype: torch.dtype = torch.float32,
        preprocess: Preprocess = preprocess_for_scoring,
        scale: float | None = None,
    ):
        self.preprocess, self.scale = preprocess, scale
        self.model = take_linear(model.set_compute_dtype(dtype).requires_grad_(False).eval())
        self.tokenize = tokenize
        self.dtype = dtype
        self._text_features: dict[str, Tensor] = {}  # prompt -> (D,) float32 on the CPU

    @property
    def device(self) -> torch.device:
        """The model's."""
        return self.model.logit_scale.device

    @torch.no_grad()
    def encode(self, prompts: list[str]) -> Tensor:  # (P, D) float32 unit text features
        """Unit features; those of prompts seen before come from a cache of MAX_CACHED_PROMPTS."""
        cache = self._text_features
        new = [prompt for prompt in dict.fromkeys(prompts) if prompt not in cache]
        for start in range(0, len(new), TEXT_BATCH):
            batch = new[start : start + TEXT_BATCH]
            padded = batch + [""] * (TEXT_BATCH - len(batch))
            cache.update(zip(batch, self.encode_ids(self.tokenize(padded)).cpu(), strict=False))
        features = to_device(torch.stack([cache[prompt] for prompt in prompts]), self.device)
        for prompt in list(cache)[: max(0, len(cache) - MAX_CACHED_PROMPTS)]:
            del cache[prompt]
        return features

    @torch.no_grad()
    def encode_ids(self, ids: Tensor) -> Tensor:  # (P, L) int64 -> (P, D) float32 unit text features
        """Raises ValueError for more tokens than the text tower has positions."""
        limit = self.model.config.max_length
        if ids.shape[1] > limit:
            raise ValueError(
                f"Prompts of {ids.shape[1]} tokens, but the scorer's text tower has {limit} positions: let `tokenize` "
                f"truncate to {limit}."
            )
        return unit(self.model.get_text_features(ids.to(self.device)))

    def score_pixels(
        self,
        pixels: Tensor,  # (N, 3, H, W) about [-1, 1]
        t: Tensor,  # () timestep of all N; a plain CLIP does not look at it
        text: Tensor,  # (N, D) unit text features
    ) -> Tensor:  # (N,) float32
        """exp(logit_scale) * cos(image, text). Differentiable in pixels."""
        x = self.preprocess(pixels, self.model.config.image_size, self.dtype)
        image = unit(self.model.get_image_features(x, t.reshape(1)))
        scale = self.model.logit_scale.exp() if self.scale is None else self.scale
        return scale * (image * text).sum(dim=-1)


def load_spm(
    path: str | Path,
    tokenize: Tokenize,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    time_conditioned: bool = True,
) -> ClipScorer:
    """The step-aware preference model, e.g. sdxl_step-aware_preference_model.bin (strict: see load_clip).

    time_conditioned=False: the same training without the timestep, an ablation of the SPO paper.
    """
    clip = load_clip(path, time_conditioned=time_conditioned, device=device, dtype=dtype)
    return ClipScorer(check_vocabulary(clip, tokenize, path), tokenize, dtype=dtype)


def load_pickscore(
    path: str | Path, tokenize: Tokenize, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32
) -> ClipScorer:
    """yuvalkirstain/PickScore_v1: a plain ViT-H/14, blind to the timestep (an ablation of the SPO paper)."""
    clip = load_clip(path, time_conditioned=False, device=device, dtype=dtype)
    return ClipScorer(check_vocabulary(clip, tokenize, path), tokenize, dtype=dtype)


def load_clip_score(
    path: str | Path, tokenize: Tokenize, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32
) -> ClipScorer:
    """openai/clip-vit-large-patch14: 100 cos (CLIPScore, arXiv 2104.08718, in percent and without its floor at 0)."""
    clip = load_clip(path, time_conditioned=False, device=device, dtype=dtype)
    checked = check_vocabulary(clip, tokenize, path)
    return ClipScorer(checked, tokenize, dtype=dtype, preprocess=cropped, scale=100.0)


def check_vocabulary(clip: Clip, tokenize: Tokenize, path: str | Path) -> Clip:
    """The same model. Raises ValueError if it was trained with another tokenizer, whose ids mean other words."""
    tokens = int(tokenize([""]).max()) + 1  # the end token is the last
    if tokens != clip.config.vocab_size:
        raise ValueError(
            f"{path} knows {clip.config.vocab_size} tokens, but the diffusion model's tokenizer has {tokens}: "
            "it belongs to another --model. Give that model's preference model (--spm_path, --pickscore_path)."
        )
    return clip


# ------------------------------------------------------------------------------------------------------------- stand-in


def make_tiny_spm(path: str | Path, seed: int = 0, vocab_size: int = 256, max_length: int = 16) -> Path:
    """Write a random step-aware model (32 px, 0.1 M parameters) in the published layout; one seed, one file.

    Its preferences mean nothing, but depend on the image, the prompt and, since no modulation is zero, the timestep.
    """
    text = TowerConfig(width=32, mlp_width=64, num_layers=2, num_heads=4, activation="gelu")
    vision = TowerConfig(width=48, mlp_width=96, num_layers=2, num_heads=4, activation="gelu")
    config = ClipConfig(
        text=text,
        vision=vision,
        vocab_size=vocab_size,
        max_length=max_length,
        image_size=32,
        patch_size=8,
        projection_dim=24,
        time_conditioned=True,
    )
    with torch.device("meta"):
        shapes = {key: value.shape for key, value in Clip(config).state_dict().items()}
    generator = torch.Generator().manual_seed(seed)
    tensors = {key: _random_tensor(key, shapes[key], generator) for key in sorted(shapes)}
    return save_clip(load_clip(tensors, time_conditioned=True, hf_config=config.to_hf()), path)


def _random_tensor(key: str, shape: torch.Size, generator: torch.Generator) -> Tensor:
    if key == "logit_scale":
        return torch.tensor(math.log(100))
    noise = torch.randn(shape, generator=generator)
    if "norm" in key and key.endswith("weight"):
        return 1 + 0.1 * noise
    if "adaLN" in key and key.endswith("bias"):
        # near the identity start: gates of about 1, or the image would hardly reach the class token
        parts = shape[0] // 48
        return 0.1 * noise + torch.tensor([0.0, 0.0, 1.0, 0.0, 0.0, 1.0][:parts]).repeat_interleave(48)
    if key.endswith("bias") or "position" in key or "class" in key:
        return 0.1 * noise
    if "token" in key:
        return noise
    if "adaLN" in key:
        return noise * 0.1 / math.sqrt(shape[1])  # a preference that changes with t, but not into another
    return noise / math.sqrt(shape[1:].numel())  # fan-in
