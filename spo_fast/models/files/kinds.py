"""Whether a model's parts are of the kind that is trained here, told from their settings before anything is loaded.

diffusers' UNets take more inputs than SD-1.5's and SDXL's (masks, classes, guidance, other embeddings) and VAEs shift
latents in more ways than one: a model that needs what it is not given here would be trained on something else.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from spo_fast.data.files import shown
from spo_fast.models.files.single_file import vae_class

Config = Mapping[str, Any]

PURPOSES = {8: "it edits images (InstructPix2Pix)", 9: "it inpaints", 16: "it belongs to a 16-channel VAE"}
UNET_SETTINGS = {  # what a UNet of SD-1.5 or SDXL has, which diffusers takes for absent settings too
    "class_embed_type": None,
    "num_class_embeds": None,
    "encoder_hid_dim_type": None,
    "encoder_hid_dim": None,
    "time_cond_proj_dim": None,  # of guidance-distilled (LCM) networks, which are told the guidance scale
    "time_embedding_type": "positional",
    "attention_type": "default",
    "dual_cross_attention": False,
}
VAE_SETTINGS = {"latents_mean": None, "latents_std": None, "shift_factor": None}
SCALES = {"sd15": 0.18215, "sdxl": 0.13025}
TEXT_TYPES = ("clip_text_model", "clip")
PREDICTIONS = ("epsilon", "v_prediction", "sample")
TIME_IDS = 6  # SDXL's original size, crop corner, target size; its refiner's are 5


def check_unet(config: Config, file: Path) -> None:
    """Raise ValueError unless the UNet takes noisy latents, a timestep, a prompt and, in SDXL, its sizes, no more."""
    name = config.get("_class_name", "UNet2DConditionModel")
    _need(name == "UNet2DConditionModel", file, f"_class_name={name}", "a UNet2DConditionModel is trained here")
    channels, out = config.get("in_channels", 4), config.get("out_channels", 4)
    purpose = PURPOSES.get(channels, "it takes more than noisy latents, or predicts more than their noise")
    _need(channels == out, file, f"in_channels={channels}, out_channels={out}", purpose)
    _check_settings(config, UNET_SETTINGS, file)
    added = config.get("addition_embed_type")
    _need(added in (None, "text_time"), file, f"addition_embed_type={added}", "only SDXL's text_time is known")
    size = config.get("sample_size")
    _need(type(size) is int and size > 0, file, f"sample_size={size}", "it must be one whole number, latents a side")


def check_vae(config: Config, file: Path, kind: str, borrowed: bool) -> None:
    """Raise ValueError unless latents are the encoder's output times one scaling factor, which is known.

    borrowed: of another model than the UNet. The two kinds' latents have one shape, but their factors differ.
    """
    name = vae_class(config, file)
    _check_settings(config, VAE_SETTINGS, file)
    # of a missing one diffusers takes SD-1.5's, in SD-1.5's days the only one
    factor = config.get("scaling_factor", None if kind == "sdxl" and name == "AutoencoderKL" else 1.0)
    finite = isinstance(factor, (int, float)) and math.isfinite(factor) and factor > 0
    mend = "SDXL's is 0.13025, SD-1.5's 0.18215"
    _need(finite, file, f"scaling_factor={factor}", "it must be a positive number", mend)
    if borrowed and name == "AutoencoderKL":
        for other, scale in SCALES.items():
            why = f"that is the VAE of {other}, whose latents mean nothing to a UNet of {kind}"
            _need(other == kind or factor != scale, file, f"scaling_factor={factor}", why, "Give another VAE")
    for name in ("in_channels", "out_channels"):
        _need(config.get(name, 3) == 3, file, f"{name}={config.get(name)}", "pictures have 3")


def check_text(config: Config, file: Path) -> None:
    """Raise ValueError unless it is a CLIP."""
    name = config.get("model_type", "clip_text_model")
    _need(name in TEXT_TYPES, file, f"model_type={name}", "the text encoders of SD-1.5 and SDXL are CLIPs")
    eps = config.get("layer_norm_eps", 1e-5)
    _need(isinstance(eps, float), file, f"layer_norm_eps={eps!r:.40}", "a CLIP's is a number such as 1e-05", "Mend it")


def check_tokenizer(max_length: int, tokens: int, config: Config, folder: Path) -> None:
    """Raise ValueError for a tokenizer whose prompts are too long for its text encoder, or that knows more tokens."""
    text = config.get("text_config") or config
    positions, vocabulary = text.get("max_position_embeddings", 77), text.get("vocab_size", 49408)
    given = f"model_max_length={max_length}" if max_length < 10**9 else "no model_max_length"
    mend = f"Set it to {positions} in its tokenizer_config.json"
    _need(0 < max_length <= positions, folder, given, f"its text encoder has {positions} positions", mend)
    why = f"its text encoder has embeddings of {vocabulary}"
    _need(tokens <= vocabulary, folder, f"{tokens} tokens", why, "Give the tokenizer that belongs to it")


def check_together(unet: Config, vae: Config, texts: Sequence[Config], unet_file: Path, vae_file: Path) -> None:
    """Raise ValueError unless the UNet takes the VAE's latents and the text encoders' embeddings."""
    latents, channels = _count(vae, "latent_channels", 4, vae_file), _count(unet, "in_channels", 4, unet_file)
    _need(
        latents == channels, vae_file, f"latent_channels={latents}",
        f"the UNet takes {channels} (in_channels). Use the VAE that the UNet was trained with", "",
    )  # fmt: skip
    own = [text.get("text_config") or text for text in texts]  # a whole CLIP's has two towers'
    widths = [_count(text, "hidden_size", 512, unet_file) for text in own]
    context = unet.get("cross_attention_dim", 1280)
    contexts = set(context) if isinstance(context, (list, tuple)) else {context}
    made = f"the text encoders make {' + '.join(map(str, widths))} channels"
    _need(contexts == {sum(widths)}, unet_file, f"cross_attention_dim={context}", made)
    if unet.get("addition_embed_type") == "text_time":
        pooled = _count(own[-1], "projection_dim", 512, unet_file)
        wanted = TIME_IDS * (unet.get("addition_time_embed_dim") or 0) + pooled
        dim = unet.get("projection_class_embeddings_input_dim")
        why = f"SDXL's {TIME_IDS} sizes and the pooled prompt make {wanted} (a refiner takes 5)"
        _need(dim == wanted, unet_file, f"projection_class_embeddings_input_dim={dim}", why)


def check_prediction(scheduler: Config, file: Path) -> None:
    """Raise ValueError for a network that predicts what no table here knows."""
    kind = scheduler.get("prediction_type", "epsilon")
    _need(kind in PREDICTIONS, file, f"prediction_type={kind}", f"known are {', '.join(PREDICTIONS)}", "")


def _count(config: Config, name: str, default: int, file: Path) -> int:
    value = config.get(name, default)
    if type(value) is not int:
        raise ValueError(f"{shown(file)} or what belongs to it has {name}={value!r:.40}, which is no whole number.")
    return value


def _check_settings(config: Config, plain: Config, file: Path) -> None:
    for name, value in plain.items():
        found = config.get(name, value)
        fits = found == value or (name == "shift_factor" and found == 0)
        _need(fits, file, f"{name}={str(found)[:40]}", f"SD-1.5 and SDXL have {value}")


def _need(holds: bool, file: Path, found: str, why: str, mend: str = "Such models are not trained here") -> None:
    if not holds:
        raise ValueError(f"{shown(file)} has {found}: {why}. {f'{mend}.' if mend else ''}".rstrip())
