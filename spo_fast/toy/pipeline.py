"""A tiny SDXL pipeline with random weights, in diffusers layout: two text encoders, a UNet, a VAE, 16x16 images.

It is loaded by the code that loads SDXL (models/sources.py) and by StableDiffusionXLPipeline.from_pretrained, so
everything downstream meets a real pipeline. Its pictures mean nothing.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import nn

VERSION = 2
"""Raised whenever the weights or settings below change, so that a cached directory is never mistaken for another."""

IMAGE_SIZE = 16
WIDTH = 32
"""Of each text encoder; the UNet attends to both side by side."""
MAX_LENGTH = 77
"""Tokens, one a byte: CLIP's own length, so most prompts keep their first 75 characters."""
PIXEL_STD = 0.45
"""Of decoded N(0, 1) latents, about 0: pixels fill [-1, 1] and 3 % lie outside."""


def toy_directory(cache_dir: str | Path, seed: int = 0) -> Path:
    """Where a cache keeps this version of the toy pipeline."""
    return Path(cache_dir) / f"toy-sdxl-v{VERSION}-seed{seed}"


def make_toy_pipeline(path: str | Path, seed: int = 0) -> Path:
    """Write the pipeline (about 5 MB, float32) and return its path; one that is there is left as it is.

    Written beside its place and renamed, so that processes that start together cannot see half of it.
    """
    path = Path(path)
    if (path / "model_index.json").is_file():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(prefix=f".{path.name}-", dir=path.parent))
    try:
        draft.chmod(0o755)  # mkdtemp's 0700 would hide it from other users of a shared cache
        save_pipeline(draft, toy_parts(seed), "StableDiffusionXLPipeline")
        os.rename(draft, path)
    except OSError:
        if not (path / "model_index.json").is_file():  # else another process was first, with the same weights
            raise
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return path


def save_pipeline(path: Path, parts: dict[str, Any], pipeline: str) -> None:
    """Each part in its folder and model_index.json, as the pipeline's own save_pretrained would."""
    from spo_fast.models.single_file import no_progress_bar

    index: dict[str, Any] = {"_class_name": pipeline}
    for name, part in parts.items():
        with no_progress_bar():
            part.save_pretrained(str(path / name))
        index[name] = [type(part).__module__.split(".")[0], type(part).__name__.removesuffix("Fast")]
    for absent in ("feature_extractor", "image_encoder", "safety_checker"):
        index[absent] = [None, None]
    if pipeline == "StableDiffusionXLPipeline":
        del index["safety_checker"]
        index["force_zeros_for_empty_prompt"] = True
    (path / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")


def toy_parts(seed: int) -> dict[str, Any]:
    """The pipeline's modules, tokenizers and scheduler by their folders' names. The global RNG is left as it was."""
    import torch
    from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel

    from spo_fast.models.clip_tokenizer import END, clip_tokenizer

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        tokenizer, tokenizer_2 = (clip_tokenizer(pad, MAX_LENGTH, merges=()) for pad in (END, "!"))
        unet = UNet2DConditionModel(
            sample_size=IMAGE_SIZE,
            block_out_channels=(16, 32),
            layers_per_block=1,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            attention_head_dim=(2, 4),  # heads, as in SDXL's settings, despite the name
            transformer_layers_per_block=(1, 1),
            norm_num_groups=8,
            cross_attention_dim=2 * WIDTH,
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=6 * 8 + WIDTH,
        )
        vae = AutoencoderKL(
            sample_size=IMAGE_SIZE,
            block_out_channels=(16,),  # one entry: latents are as large as the image
            layers_per_block=1,
            norm_num_groups=4,
            latent_channels=4,
            mid_block_add_attention=False,
            scaling_factor=0.13025,
            force_upcast=False,
        )
        _set_pixel_range(vae, torch.randn(64, 4, IMAGE_SIZE, IMAGE_SIZE))
        return {
            "tokenizer": tokenizer,
            "tokenizer_2": tokenizer_2,
            "text_encoder": tiny_text_encoder(tokenizer, WIDTH, projected=False),
            "text_encoder_2": tiny_text_encoder(tokenizer_2, WIDTH, projected=True),
            "unet": unet,
            "vae": vae,
            "scheduler": DDIMScheduler(
                beta_start=0.00085,
                beta_end=0.012,
                beta_schedule="scaled_linear",
                # A random network's output is near 0, and v = 0 is the right answer for latents of N(0, 1): they stay
                # N(0, 1) through all steps. With epsilon they would grow fifteenfold, and candidates look alike.
                prediction_type="v_prediction",
                clip_sample=False,
                set_alpha_to_one=False,
                steps_offset=1,
            ),
        }


def tiny_text_encoder(tokenizer: Any, width: int, projected: bool) -> nn.Module:
    """A two-layer CLIP text encoder for this tokenizer; projected adds the pooled projection of SDXL's second one."""
    import torch
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        projection_dim=width,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=tokenizer.model_max_length,
        hidden_act="gelu" if projected else "quick_gelu",
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    encoder = (CLIPTextModelWithProjection if projected else CLIPTextModel)(config)
    # SDXL conditions on the layer before the last, which no LayerNorm follows: the default embeddings of
    # std 0.02 would leave every prompt nearly the same
    for table in (m for m in encoder.modules() if isinstance(m, torch.nn.Embedding)):
        torch.nn.init.normal_(table.weight, std=0.5)
    return encoder


def _set_pixel_range(
    vae: Any,
    latents: torch.Tensor,  # (B, C, H, W) of N(0, 1)
) -> None:
    """Scale the decoder's last layer, in place, to a mean of 0 and a std of PIXEL_STD in each colour."""
    import torch

    with torch.no_grad():
        pixels = vae.decode(latents / vae.config.scaling_factor).sample
        mean, std = pixels.mean((0, 2, 3)), pixels.std((0, 2, 3))
        last = vae.decoder.conv_out
        last.weight.mul_(PIXEL_STD / std[:, None, None, None])
        last.bias.sub_(mean).mul_(PIXEL_STD / std)
