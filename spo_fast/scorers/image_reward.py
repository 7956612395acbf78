"""ImageReward (arXiv 2304.05977): BLIP's text encoder reads the picture, an MLP scores its first token.

The networks are transformers' BLIP; the published file has BLIP's own names. Sizes come from its shapes, and heads are
64 channels wide in both towers of BLIP.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from spo_fast.data.weights import fill, read_tensors
from spo_fast.ops.linear import take_linear
from spo_fast.scorers.clip_files import find_weights
from spo_fast.scorers.preprocess import PictureScorer, cropped, score_head

if TYPE_CHECKING:
    from tokenizers.implementations import BertWordPieceTokenizer

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
    """A tensor of BLIP's vision tower, timm's names -> transformers'."""
    if key.startswith("norm."):
        return f"post_layernorm.{key.removeprefix('norm.')}"
    for old, new in VISION:
        key = key.replace(old, new)
    return key


class Sizes(NamedTuple):
    """Of both towers; ImageReward.pt's where nothing is said: BLIP-L's pictures, BERT-base's words."""

    width: int = 1024
    mlp_width: int = 4096
    layers: int = 24
    image_size: int = 224
    patch: int = 16
    text_width: int = 768
    text_mlp_width: int = 3072
    text_layers: int = 12
    vocabulary: int = 30524
    positions: int = 512

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> Sizes:
        """By the shapes of a state dict."""
        vision, text = "blip.visual_encoder.", "blip.text_encoder."
        width, _, patch, _ = tensors[f"{vision}patch_embed.proj.weight"].shape
        vocabulary, text_width = tensors[f"{text}embeddings.word_embeddings.weight"].shape
        return cls(
            width=width,
            mlp_width=tensors[f"{vision}blocks.0.mlp.fc1.weight"].shape[0],
            layers=_layers(tensors, f"{vision}blocks."),
            image_size=round((tensors[f"{vision}pos_embed"].shape[1] - 1) ** 0.5) * patch,
            patch=patch,
            text_width=text_width,
            text_mlp_width=tensors[f"{text}encoder.layer.0.intermediate.dense.weight"].shape[0],
            text_layers=_layers(tensors, f"{text}encoder.layer."),
            vocabulary=vocabulary,
            positions=tensors[f"{text}embeddings.position_embeddings.weight"].shape[0],
        )


class ImageReward(nn.Module):
    """(r - mean) / std of the published model, about standard normal on its training pictures."""

    def __init__(self, sizes: Sizes):
        from transformers import BlipTextConfig, BlipTextModel, BlipVisionConfig, BlipVisionModel

        super().__init__()
        self.image_size = sizes.image_size
        self.vision = BlipVisionModel(
            BlipVisionConfig(
                hidden_size=sizes.width,
                intermediate_size=sizes.mlp_width,
                num_hidden_layers=sizes.layers,
                num_attention_heads=sizes.width // HEAD_WIDTH,
                image_size=sizes.image_size,
                patch_size=sizes.patch,
                layer_norm_eps=1e-6,
            )
        )
        self.text = BlipTextModel(
            BlipTextConfig(
                vocab_size=sizes.vocabulary,
                hidden_size=sizes.text_width,
                encoder_hidden_size=sizes.width,
                intermediate_size=sizes.text_mlp_width,
                num_hidden_layers=sizes.text_layers,
                num_attention_heads=sizes.text_width // HEAD_WIDTH,
                max_position_embeddings=sizes.positions,
                layer_norm_eps=1e-12,
            ),
            add_pooling_layer=False,
        )
        self.head = score_head(sizes.text_width)

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor], name: str | Path = "state dict") -> ImageReward:
        """From the published state dict; `name` is what errors call it."""
        found = cls(Sizes.of(tensors))
        fill(found, _renamed(tensors), name, torch.float32)
        return found

    def forward(self, x: Tensor, ids: Tensor) -> Tensor:  # (N, 3, S, S) normalised, (N, L) -> (N,) float32
        """The MLP of the words' first state, which has attended to the picture, standardised."""
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
    """Standardised over the authors' data: mean 0, deviation 1."""

    def __init__(
        self, model: ImageReward, tokenizer: BertWordPieceTokenizer, device: str | torch.device, dtype: torch.dtype
    ):
        self.model = take_linear(model.to(device, dtype).requires_grad_(False).eval())
        self.model.head.float()
        self.tokenizer, self.device, self.dtype = tokenizer, device, dtype

    def encode(self, prompts: list[str]) -> Tensor:  # (P, 35) int64 ids
        """BERT's ids, cut and padded to 35."""
        ids = [encoding.ids for encoding in self.tokenizer.encode_batch(list(prompts))]
        return torch.tensor(ids, dtype=torch.long, device=self.device)

    def score_pixels(self, pixels: Tensor, t: Tensor, text: Tensor) -> Tensor:  # (N, 3, H, W) -> (N,) float32
        """Cropped to the network's size, in its dtype."""
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
        model = ImageReward.of(read_tensors(file), file)
    except (KeyError, RuntimeError, IndexError) as error:
        what = str(error).split(":")[0]
        raise ValueError(f"{file} is no ImageReward ({what}). Give ImageReward.pt (--image_reward_path).") from error
    tokenizer = BertWordPieceTokenizer(str(bert), lowercase=True)
    tokenizer.enable_truncation(MAX_TOKENS)
    tokenizer.enable_padding(length=MAX_TOKENS)
    return ImageRewardScorer(model, tokenizer, device, dtype)
