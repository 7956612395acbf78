"""Tiny SD1.5, SDXL, SD3 and FLUX directories in diffusers layout for tests, under a second each.

The UNets' images are 64x64 (8x8 latents), SD3's 128x128 by default, FLUX's of any size.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, EulerDiscreteScheduler, PNDMScheduler, UNet2DConditionModel
from transformers import PreTrainedTokenizerBase, T5EncoderModel

from spo_fast.models.files.clip_tokenizer import END, clip_tokenizer
from spo_fast.models.files.toy import save_pipeline, tiny_text_encoder, with_old_names

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


FLOW_WIDTH = 32
"""joint_attention_dim of the flow models: T5's width, to which CLIP's 2 x TEXT_WIDTH channels are padded in SD3."""
SD3_VAE = dict(scaling_factor=1.5305, shift_factor=0.0609, use_quant_conv=False, use_post_quant_conv=False)
FLUX_VAE = dict(scaling_factor=0.3611, shift_factor=0.1159, use_quant_conv=False, use_post_quant_conv=False)


def make_tiny_sd3(path: str | Path, seed: int = 0, t5: bool = True, **settings: Any) -> Path:
    """Write StableDiffusion3Pipeline's parts to path: two CLIPs and a T5 (t5=False: none), 3 blocks, 2 of them dual.

    settings: others of the transformer. Of SD3.5's VAE come the factors, of 4 channels.
    """
    from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        tokenizer, tokenizer_2 = (clip_tokenizer(pad, MAX_LENGTH, merges=()) for pad in (END, "!"))
        network = dict(
            sample_size=16, patch_size=2, in_channels=4, out_channels=4, num_layers=3, attention_head_dim=8,
            num_attention_heads=4, joint_attention_dim=FLOW_WIDTH, caption_projection_dim=32,
            pooled_projection_dim=2 * TEXT_WIDTH, pos_embed_max_size=24, dual_attention_layers=(0, 1),
            qk_norm="rms_norm",
        )  # fmt: skip
        parts = {
            "tokenizer": tokenizer,
            "tokenizer_2": tokenizer_2,
            "tokenizer_3": t5_tokenizer() if t5 else None,
            "text_encoder": tiny_text_encoder(tokenizer, TEXT_WIDTH, projected=True),
            "text_encoder_2": tiny_text_encoder(tokenizer_2, TEXT_WIDTH, projected=True),
            "text_encoder_3": tiny_t5() if t5 else None,
            "transformer": SD3Transformer2DModel(**network | settings),
            "vae": tiny_vae(**SD3_VAE, latent_channels=settings.get("in_channels", 4)),
            "scheduler": FlowMatchEulerDiscreteScheduler(shift=3.0),
        }
    StableDiffusion3Pipeline(**parts).save_pretrained(path)
    return Path(path)


def make_tiny_flux(path: str | Path, seed: int = 0, guidance: bool = True, **settings: Any) -> Path:
    """Write FluxPipeline's parts to path: a CLIP and a T5, 2 double and 2 single blocks.

    guidance=False: as FLUX.1-schnell, with its scheduler. Of FLUX's VAE come the factors, of 4 channels.
    """
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        tokenizer = clip_tokenizer(END, MAX_LENGTH, merges=())
        network = dict(
            patch_size=1, in_channels=16, num_layers=2, num_single_layers=2, attention_head_dim=16,
            num_attention_heads=2, joint_attention_dim=FLOW_WIDTH, pooled_projection_dim=TEXT_WIDTH,
            guidance_embeds=guidance, axes_dims_rope=(4, 4, 8),
        )  # fmt: skip
        moving = dict(
            shift=3.0, use_dynamic_shifting=True, base_shift=0.5, max_shift=1.15, base_image_seq_len=256,
            max_image_seq_len=4096,
        )  # fmt: skip
        parts = {
            "tokenizer": tokenizer,
            "tokenizer_2": t5_tokenizer(),
            "text_encoder": tiny_text_encoder(tokenizer, TEXT_WIDTH, projected=False),
            "text_encoder_2": tiny_t5(),
            "transformer": FluxTransformer2DModel(**network | settings),
            "vae": tiny_vae(**FLUX_VAE),
            "scheduler": FlowMatchEulerDiscreteScheduler(**moving if guidance else dict(shift=1.0)),
        }
    FluxPipeline(**parts).save_pretrained(path)
    with_old_names(Path(path) / "text_encoder" / "model.safetensors")
    return Path(path)


def tiny_t5() -> T5EncoderModel:
    """Of T5 v1.1's kind (gated GELU), as wide as what the flow models attend to."""
    from transformers import T5Config

    config = T5Config(
        vocab_size=len(t5_tokenizer()), d_model=FLOW_WIDTH, d_kv=8, d_ff=48, num_layers=2, num_heads=4,
        relative_attention_num_buckets=8, feed_forward_proj="gated-gelu", tie_word_embeddings=False,
    )  # fmt: skip
    return T5EncoderModel(config)


def t5_tokenizer() -> PreTrainedTokenizerBase:
    """T5's, knowing single letters alone; it pads as the published one."""
    from tokenizers import Tokenizer, pre_tokenizers, processors
    from tokenizers.models import Unigram
    from transformers import T5TokenizerFast

    letters = "\u2581abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.,:;!?'\"()-"
    words = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *((letter, -2.0) for letter in letters)]
    tokenizer = Tokenizer(Unigram(words, unk_id=2))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save(f"{folder}/tokenizer.json")
        settings = {"tokenizer_class": "T5Tokenizer", "extra_ids": 0, "model_max_length": 512}
        Path(folder, "tokenizer_config.json").write_text(json.dumps(settings))
        return T5TokenizerFast.from_pretrained(folder)


def tiny_vae(scaling_factor: float, latent_channels: int = 4, **settings: Any) -> AutoencoderKL:
    """Four resolutions, so a downsampling factor of 8 (VAE_FACTOR)."""
    return AutoencoderKL(
        sample_size=LATENT_SIZE * VAE_FACTOR,
        block_out_channels=(8, 8, 8, 16),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        norm_num_groups=4,
        latent_channels=latent_channels,
        scaling_factor=scaling_factor,
        **settings,
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
