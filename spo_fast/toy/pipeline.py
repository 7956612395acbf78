"""The toy's pipeline: SDXL's parts at a tiny size, in diffusers layout, for 16x16 pictures.

It is loaded by the code that loads SDXL (models/sources.py) and by StableDiffusionXLPipeline.from_pretrained, so
everything downstream meets a real pipeline. Its weights are pretrained by toy/build.py and shipped in toy/weights.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spo_fast.toy.world import COLOURS, SHAPES, SIZE

if TYPE_CHECKING:
    from torch import nn

WEIGHTS = Path(__file__).parent / "weights"
"""The shipped pipeline; its step-aware preference model lies in spm/, the record of the build in build.json."""

WIDTH = 64
"""Of each text encoder; the UNet attends to both side by side."""
MAX_LENGTH = 16
"""Tokens: every caption of the world fits; other text falls apart into bytes."""
SCALING = 3.0
"""VAE scaling factor: latents are 3 times the pixels, with a standard deviation of 0.7."""


def toy_files() -> dict[str, Path]:
    """The shipped toy: its pipeline (model) and its preference models (spm, pickscore)."""
    found = {"model": WEIGHTS, "spm": WEIGHTS / "spm" / "model.safetensors", "pickscore": WEIGHTS / "pickscore"}
    for path in found.values():
        if not path.exists():
            raise FileNotFoundError(
                f"{path} is missing from the installation. Install spo_fast again, or make the toy's weights with "
                "`python -m spo_fast.toy.build` (about an hour on 2 cores)."
            )
    return found


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


def word_merges() -> list[tuple[str, str]]:
    """Byte-pair merges that make one token of a word of the world's captions, but for green, which red's break up."""
    words = [*COLOURS, *SHAPES, "left", "right", "of", "above", "below"]
    merges: dict[tuple[str, str], None] = {}  # in order, each once
    for word in words:
        letters = [*word[:-1], word[-1] + "</w>"]
        for i in range(1, len(letters)):
            merges["".join(letters[:i]), letters[i]] = None
    return list(merges)


def toy_parts(seed: int) -> dict[str, Any]:
    """The pipeline's modules, tokenizers and scheduler by their folders' names, before pretraining.

    The global RNG is left as it was.
    """
    import torch
    from diffusers import DDIMScheduler, UNet2DConditionModel

    from spo_fast.models.clip_tokenizer import END, clip_tokenizer

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        tokenizer, tokenizer_2 = (clip_tokenizer(pad, MAX_LENGTH, merges=word_merges()) for pad in (END, "!"))
        unet = UNet2DConditionModel(
            sample_size=SIZE,
            in_channels=3,
            out_channels=3,
            block_out_channels=(32, 64),
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
        return {
            "tokenizer": tokenizer,
            "tokenizer_2": tokenizer_2,
            "text_encoder": tiny_text_encoder(tokenizer, WIDTH, projected=False, num_layers=3),
            "text_encoder_2": tiny_text_encoder(tokenizer_2, WIDTH, projected=True, num_layers=3),
            "unet": unet,
            "vae": identity_vae(),
            "scheduler": DDIMScheduler(
                beta_start=0.00085,
                beta_end=0.012,
                beta_schedule="scaled_linear",
                prediction_type="v_prediction",
                clip_sample=False,
                set_alpha_to_one=False,
                steps_offset=1,
            ),
        }


def tiny_text_encoder(tokenizer: Any, width: int, projected: bool, num_layers: int = 2) -> nn.Module:
    """A small CLIP text encoder for this tokenizer; projected adds the pooled projection of SDXL's second one."""
    import torch
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        projection_dim=width,
        num_hidden_layers=num_layers,
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


def identity_vae(large: float = 64.0) -> Any:
    """An AutoencoderKL whose latents are the pixels times SCALING: exact to 1e-4, with nothing to train.

    Its ResNets add zero. What is left in the way, a group norm and a SiLU, is made linear: each group of channels holds
    x, -x, L and -L, so its mean is 0 and its deviation L / sqrt(2) up to x^2 / L^2, and silu(y) - silu(-y) = y.
    """
    import torch
    from diffusers import AutoencoderKL

    vae: Any = AutoencoderKL(
        sample_size=SIZE,
        block_out_channels=(12,),  # one entry: latents are as large as the image
        layers_per_block=1,
        norm_num_groups=3,
        latent_channels=3,
        mid_block_add_attention=False,
        scaling_factor=SCALING,
        force_upcast=False,
    )
    with torch.no_grad():
        for name, parameter in vae.named_parameters():
            parameter.fill_(1.0 if "norm" in name and name.endswith("weight") else 0.0)
        for part in (vae.encoder, vae.decoder):
            for channel in range(3):
                group = 4 * channel
                part.conv_in.weight[group, channel, 1, 1] = 1
                part.conv_in.weight[group + 1, channel, 1, 1] = -1
                part.conv_in.bias[group + 2 : group + 4] = torch.tensor([large, -large])
                part.conv_out.weight[channel, group, 1, 1] = large / 2**0.5
                part.conv_out.weight[channel, group + 1, 1, 1] = -large / 2**0.5
        vae.quant_conv.weight[:3, :3, 0, 0] = torch.eye(3)
        vae.quant_conv.bias[3:] = -30.0  # log-variance of the posterior: none
        vae.post_quant_conv.weight[:, :, 0, 0] = torch.eye(3)
    return vae
