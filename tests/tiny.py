"""Tiny SD1.5 and SDXL directories in diffusers layout for tests: 64x64 images, 8x8 latents, under a second each."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, EulerDiscreteScheduler, PNDMScheduler, UNet2DConditionModel

from spo_fast.models.files.clip_tokenizer import END, clip_tokenizer
from spo_fast.models.files.toy import save_pipeline, tiny_text_encoder

MAX_LENGTH = 16
TEXT_WIDTH = 16
LATENT_SIZE = 8
VAE_FACTOR = 8


def make_tiny_sd15(path: str | Path, seed: int = 0) -> Path:
    """Write StableDiffusionPipeline's parts to path: one text encoder, UNet channels (16, 32)."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        tokenizer = clip_tokenizer(END, MAX_LENGTH, merges=())
        parts = {
            "tokenizer": tokenizer,
            "text_encoder": tiny_text_encoder(tokenizer, TEXT_WIDTH, projected=False),
            "unet": UNet2DConditionModel(
                **_unet_settings(),
                down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
                up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
                attention_head_dim=2,
                cross_attention_dim=TEXT_WIDTH,
            ),
            "vae": tiny_vae(scaling_factor=0.18215),
            "scheduler": PNDMScheduler(skip_prk_steps=True, **_noise_settings()),
        }
    save_pipeline(Path(path), parts, "StableDiffusionPipeline")
    return Path(path)


def make_tiny_sdxl(path: str | Path, seed: int = 0) -> Path:
    """Write StableDiffusionXLPipeline's parts to path: two text encoders of one width, UNet channels (16, 32)."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        tokenizer, tokenizer_2 = (clip_tokenizer(pad, MAX_LENGTH, merges=()) for pad in (END, "!"))
        parts = {
            "tokenizer": tokenizer,
            "tokenizer_2": tokenizer_2,
            "text_encoder": tiny_text_encoder(tokenizer, TEXT_WIDTH, projected=False),
            "text_encoder_2": tiny_text_encoder(tokenizer_2, TEXT_WIDTH, projected=True),
            "unet": UNet2DConditionModel(
                **_unet_settings(),
                down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
                up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
                attention_head_dim=(2, 4),
                transformer_layers_per_block=(1, 2),
                cross_attention_dim=2 * TEXT_WIDTH,
                use_linear_projection=True,
                addition_embed_type="text_time",
                addition_time_embed_dim=8,
                projection_class_embeddings_input_dim=6 * 8 + TEXT_WIDTH,
            ),
            "vae": tiny_vae(scaling_factor=0.13025),
            "scheduler": EulerDiscreteScheduler(timestep_spacing="leading", **_noise_settings()),
        }
    save_pipeline(Path(path), parts, "StableDiffusionXLPipeline")
    return Path(path)


def tiny_vae(scaling_factor: float) -> AutoencoderKL:
    """Four resolutions, so a downsampling factor of 8 (VAE_FACTOR)."""
    return AutoencoderKL(
        sample_size=LATENT_SIZE * VAE_FACTOR,
        block_out_channels=(8, 8, 8, 16),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        norm_num_groups=4,
        latent_channels=4,
        scaling_factor=scaling_factor,
    )


def _unet_settings() -> dict[str, Any]:
    return dict(sample_size=LATENT_SIZE, block_out_channels=(16, 32), layers_per_block=1, norm_num_groups=8)


def _noise_settings() -> dict[str, Any]:
    return dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1)


def tiny_detector(path: Path) -> Path:
    """A random Mask2Former of COCO's 80 classes that finds 5 things, as transformers saves it."""
    import importlib
    from unittest import mock

    from transformers import Mask2FormerConfig, SwinConfig

    from spo_fast.scorers.geneval import NoLoss

    mask2former = importlib.import_module("transformers.models.mask2former.modeling_mask2former")
    backbone = SwinConfig(
        embed_dim=8, depths=[1, 1, 1, 1], num_heads=[1, 1, 1, 1], window_size=4, drop_path_rate=0.0,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )  # fmt: skip
    config = Mask2FormerConfig(
        backbone_config=backbone, num_labels=80, num_queries=5, hidden_dim=32, mask_feature_size=32, feature_size=32,
        encoder_layers=1, decoder_layers=2, num_attention_heads=2, dim_feedforward=16, encoder_feedforward_dim=16,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]), mock.patch.object(mask2former, "Mask2FormerLoss", NoLoss):
        torch.manual_seed(0)
        mask2former.Mask2FormerForUniversalSegmentation(config).save_pretrained(path)
    return path
