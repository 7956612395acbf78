"""ImageReward (arXiv 2304.05977): BLIP's text encoder reads the picture, an MLP scores its first token.

The networks are transformers' BLIP; the published file has BLIP's own names. Sizes come from its shapes, and heads are
64 channels wide in both towers of BLIP.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from spo_fast.data.weights import fill, read_tensors
from spo_fast.scorers.clip_files import find_weights
from spo_fast.scorers.preprocess import PictureScorer, cropped, score_head

MEAN, STD = 0.16717362830052426, 1.0333394966054072  # of the raw reward, in the published code
MAX_TOKENS = 35
HEAD_WIDTH = 64
VISION = (  # BLIP's names -> transformers'
    ("cls_token", "embeddings.class_embedding"),
    ("pos_embed", "embeddings.position_embedding"),
    ("patch_embed.proj", "embeddings.patch_embedding"),
    ("blocks.", "encoder.layers."),
    (".norm1", ".layer_norm1"),
    (".norm2", ".layer_norm2"),
    (".attn.qkv", ".self_attn.qkv"),
    (".attn.proj", ".self_attn.projection"),
)


def vision_name(key: str) -> str:
    if key.startswith("norm."):
        return f"post_layernorm.{key.removeprefix('norm.')}"
    for old, new in VISION:
        key = key.replace(old, new)
    return key


class ImageReward(nn.Module):
    """(r - mean) / std of the published model, about standard normal on its training pictures."""

    # the published state dict, whose shapes decide the sizes, and what errors call it
    def __init__(self, tensors: Mapping[str, Tensor], name: str | Path = "state dict"):
        from transformers import BlipTextConfig, BlipTextModel, BlipVisionConfig, BlipVisionModel

        super().__init__()
        vision, text = "blip.visual_encoder.", "blip.text_encoder."
        width, _, patch, _ = tensors[f"{vision}patch_embed.proj.weight"].shape
        positions = tensors[f"{vision}pos_embed"].shape[1]
        self.image_size = round((positions - 1) ** 0.5) * patch
        self.vision = BlipVisionModel(
            BlipVisionConfig(
                hidden_size=width,
                intermediate_size=tensors[f"{vision}blocks.0.mlp.fc1.weight"].shape[0],
                num_hidden_layers=_layers(tensors, f"{vision}blocks."),
                num_attention_heads=width // HEAD_WIDTH,
                image_size=self.image_size,
                patch_size=patch,
                layer_norm_eps=1e-6,
            )
        )
        vocabulary, text_width = tensors[f"{text}embeddings.word_embeddings.weight"].shape
        self.text = BlipTextModel(
            BlipTextConfig(
                vocab_size=vocabulary,
                hidden_size=text_width,
                encoder_hidden_size=width,
                intermediate_size=tensors[f"{text}encoder.layer.0.intermediate.dense.weight"].shape[0],
                num_hidden_layers=_layers(tensors, f"{text}encoder.layer."),
                num_attention_heads=text_width // HEAD_WIDTH,
                max_position_embeddings=tensors[f"{text}embeddings.position_embeddings.weight"].shape[0],
                layer_norm_eps=1e-12,
            ),
            add_pooling_layer=False,
        )
        self.head = score_head(text_width)
        fill(self, _renamed(tensors), name, torch.float32)

    def forward(self, x: Tensor, ids: Tensor) -> Tensor:  # (N, 3, S, S) normalised, (N, L) -> (N,) float32
        seen = self.vision(pixel_values=x).last_hidden_state
        everywhere = torch.ones(seen.shape[:2], dtype=torch.long, device=x.device)
        read = self.text(
            input_ids=ids,
            attention_mask=(ids != 0).long(),  # 0 is the padding
            encoder_hidden_states=seen,
            encoder_attention_mask=everywhere,
        ).last_hidden_state
        return (self.head(read[:, 0].float())[:, 0] - MEAN) / STD


def _layers(tensors: Mapping[str, Tensor], prefix: str) -> int:
    return 1 + max(int(m[1]) for key in tensors if (m := re.match(re.escape(prefix) + r"(\d+)\.", key)))


def _renamed(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    found = {}
    for key, value in tensors.items():
        if key.startswith("blip.visual_encoder."):
            found[f"vision.{vision_name(key.removeprefix('blip.visual_encoder.'))}"] = value
        elif key.startswith("blip.text_encoder.") and not key.endswith("position_ids"):
            found[f"text.{key.removeprefix('blip.text_encoder.')}"] = value
        elif key.startswith("mlp.layers."):
            found[f"head.{key.removeprefix('mlp.layers.')}"] = value
    return found


class ImageRewardScorer(PictureScorer):
    def __init__(self, model: ImageReward, tokenizer: Any, device: str | torch.device, dtype: torch.dtype):
        self.model = model.to(device, dtype).requires_grad_(False).eval()
        self.model.head.float()
        self.tokenizer, self.device, self.dtype = tokenizer, device, dtype

    def encode(self, prompts: list[str]) -> Tensor:  # (P, 35) int64 ids
        ids = [encoding.ids for encoding in self.tokenizer.encode_batch(list(prompts))]
        return torch.tensor(ids, dtype=torch.long, device=self.device)

    def score_pixels(self, pixels: Tensor, t: Tensor, text: Tensor) -> Tensor:  # (N, 3, H, W) -> (N,) float32
        return self.model(cropped(pixels, self.model.image_size, self.dtype), text)


def load_image_reward(
    path: str | Path,
    tokenize: object,  # the diffusion model's: BERT's is another
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    *,
    bert: str | Path,  # vocab.txt of bert-base-uncased
) -> ImageRewardScorer:
    """ImageReward.pt. Raises ValueError if it is another file."""
    from tokenizers import BertWordPieceTokenizer

    file = find_weights(Path(path))
    try:
        model = ImageReward(read_tensors(file), file)
    except (KeyError, RuntimeError, IndexError) as error:
        what = str(error).split(":")[0]
        raise ValueError(f"{file} is no ImageReward ({what}). Give ImageReward.pt (--image_reward_path).") from error
    tokenizer = BertWordPieceTokenizer(str(bert), lowercase=True)
    tokenizer.enable_truncation(MAX_TOKENS)
    tokenizer.enable_padding(length=MAX_TOKENS)
    return ImageRewardScorer(model, tokenizer, device, dtype)
