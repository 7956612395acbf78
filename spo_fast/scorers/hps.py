"""HPSv2 and HPSv2.1 (arXiv 2306.09341): the ViT-H/14 of clip.py, read from open_clip's names of its weights."""

from __future__ import annotations

import html
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from spo_fast.data.weights import read_tensors
from spo_fast.scorers.clip_files import find_weights, load_clip, read_hf_config
from spo_fast.scorers.preprocess import padded
from spo_fast.scorers.spm import ClipScorer, Tokenize, check_vocabulary

TOP = {  # open_clip -> transformers; whether the matrix stands the other way round
    "logit_scale": ("logit_scale", False),
    "token_embedding.weight": ("text_model.embeddings.token_embedding.weight", False),
    "positional_embedding": ("text_model.embeddings.position_embedding.weight", False),
    "ln_final.weight": ("text_model.final_layer_norm.weight", False),
    "ln_final.bias": ("text_model.final_layer_norm.bias", False),
    "text_projection": ("text_projection.weight", True),
    "visual.class_embedding": ("vision_model.embeddings.class_embedding", False),
    "visual.positional_embedding": ("vision_model.embeddings.position_embedding.weight", False),
    "visual.conv1.weight": ("vision_model.embeddings.patch_embedding.weight", False),
    "visual.ln_pre.weight": ("vision_model.pre_layrnorm.weight", False),
    "visual.ln_pre.bias": ("vision_model.pre_layrnorm.bias", False),
    "visual.ln_post.weight": ("vision_model.post_layernorm.weight", False),
    "visual.ln_post.bias": ("vision_model.post_layernorm.bias", False),
    "visual.proj": ("visual_projection.weight", True),
}
LAYER = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}


STRAIGHT = dict.fromkeys(map(ord, "\u02bc\u2018\u2019\u201a\u201b"), "'")
STRAIGHT |= dict.fromkeys(map(ord, "\u201c\u201d\u201e\u201f"), '"')


def from_open_clip(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """open_clip's state dict under transformers' names; what has no counterpart keeps its name."""
    found: dict[str, Tensor] = {}
    for key, value in tensors.items():
        tower, _, rest = key.partition("transformer.resblocks.")
        if key == "attn_mask":  # a buffer of old versions
            continue
        if key in TOP:
            name, turned = TOP[key]
            found[name] = value.T if turned else value
        elif rest and tower in ("", "visual."):
            number, _, part = rest.partition(".")
            layer = f"{'vision' if tower else 'text'}_model.encoder.layers.{number}."
            part, _, kind = part.rpartition(".")
            if part == "attn" and kind.startswith("in_proj_") and len(value) % 3 == 0:
                # query, key, value on top of each other
                for letter, third in zip("qkv", value.chunk(3), strict=True):
                    found[f"{layer}self_attn.{letter}_proj.{kind.removeprefix('in_proj_')}"] = third
            else:
                found[f"{layer}{LAYER.get(part, part)}.{kind}"] = value
        else:
            found[key] = value
    return found


def mended_text(prompt: str) -> str:
    """Straight quotes, and HTML entities resolved twice, as ftfy and open_clip do."""
    return html.unescape(html.unescape(prompt.translate(STRAIGHT)))


def load_hps(
    path: str | Path, tokenize: Tokenize, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32
) -> ClipScorer:
    """HPS_v2_compressed.pt or HPS_v2.1_compressed.pt: 100 cos of the padded picture and the prompt.

    Of what open_clip's tokenizer mends in a prompt first (ftfy) straight quotes and HTML entities are done here.
    """
    file = find_weights(Path(path))
    tensors, config = from_open_clip(read_tensors(file, "state_dict")), read_hf_config(file.parent)
    clip = load_clip(tensors, time_conditioned=False, hf_config=config, device=device, dtype=dtype, name=str(file))
    checked = check_vocabulary(clip, tokenize, file)

    def mended(prompts: list[str]) -> Tensor:
        return tokenize([mended_text(prompt) for prompt in prompts])

    return ClipScorer(checked, mended, dtype=dtype, preprocess=padded, scale=100.0)
