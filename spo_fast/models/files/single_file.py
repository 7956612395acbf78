"""What one .safetensors file in the original (LDM) layout, or one VAE's file, says of itself before it is loaded.

Such a file has weights only: settings come from a directory in diffusers layout (configs/ by default).
networks.py loads it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from spo_fast.data.files import read_header, shown

if TYPE_CHECKING:
    from transformers import CLIPTextModel, CLIPTextModelWithProjection

UNET_PREFIX = "model.diffusion_model."
VAE_PREFIX = "first_stage_model."
TEXT_PREFIXES = {
    "sd15": ("cond_stage_model.transformer.",),
    "sdxl": ("conditioner.embedders.0.transformer.", "conditioner.embedders.1.model."),
}
EDM_MARKERS = ("edm_mean", "edm_std", "edm_vpred.")  # tensors by which files of another noise schedule are marked
VAE_CLASSES = ("AutoencoderKL", "AutoencoderTiny")
VAE_UNUSED = ("loss.", "model_ema.")  # of a VAE's training


def check_model_file(path: Path, kind: str, with_vae: bool) -> None:
    """Raise ValueError unless the file is a whole model of this kind (sd15 or sdxl); with_vae: with its VAE."""
    names = read_header(path)

    def absent(prefixes: list[str]) -> list[str]:
        return [p for p in prefixes if not any(n.startswith(p) for n in names)]

    for other, prefixes in TEXT_PREFIXES.items():  # the likeliest mistake: say so
        if other != kind and not absent([*prefixes]):
            raise ValueError(f"{path} is a {other} model, but kind {kind} was asked for: use {other}.")
    if marker := next((n for n in names if n.startswith(EDM_MARKERS)), None):
        raise ValueError(f"{shown(path)} holds {marker}: its noise schedule is EDM's, which is not trained here.")
    if lacking := absent([UNET_PREFIX, *TEXT_PREFIXES[kind], *([VAE_PREFIX] if with_vae else [])]):
        mend = " Give a VAE by --pretrained_vae_model_name_or_path." if lacking == [VAE_PREFIX] else ""
        raise ValueError(f"{path} is no whole {kind} model: it has no tensors named {'*, '.join(lacking)}*.{mend}")


def check_vae_file(path: Path, kind: str) -> None:
    """Raise ValueError unless the file has a VAE's decoder, alone or inside a whole model of this kind."""
    names = read_header(path)
    for other, prefixes in TEXT_PREFIXES.items():
        if other != kind and any(n.startswith(prefixes) for n in names):
            why = f"its latents mean nothing to a UNet of {kind}. Give another VAE"
            raise ValueError(f"{shown(path)} is a {other} model with the VAE of {other}: {why}.")
    if not any(n.removeprefix(VAE_PREFIX).startswith("decoder.") for n in names):
        raise ValueError(f"{path} holds no VAE: no tensor is named decoder.* or {VAE_PREFIX}decoder.*")


FILE_SIZES = {  # tensor -> (axis, setting) that its size along the axis is
    f"{UNET_PREFIX}input_blocks.0.0.weight": (1, "in_channels"),
    f"{UNET_PREFIX}out.2.weight": (0, "out_channels"),
    f"{UNET_PREFIX}middle_block.1.transformer_blocks.0.attn2.to_k.weight": (1, "cross_attention_dim"),
}


def unet_sizes(path: Path) -> dict[str, int]:
    """The UNet's settings that a single file's shapes show."""
    return _sizes(path, FILE_SIZES)


def vae_sizes(path: Path) -> dict[str, int]:
    """Channels of the latents, read from the header."""
    return _sizes(path, {f"{prefix}decoder.conv_in.weight": (1, "latent_channels") for prefix in (VAE_PREFIX, "")})


def _sizes(path: Path, wanted: Mapping[str, tuple[int, str]]) -> dict[str, int]:
    names = read_header(path)
    shapes = {name: names[name]["shape"] for name in wanted if name in names}
    return {wanted[name][1]: shape[wanted[name][0]] for name, shape in shapes.items() if len(shape) > wanted[name][0]}


def vae_settings_of_file(path: Path, config_dir: Path) -> Path:
    """The config.json of a VAE's single file: beside it, if it came out of a diffusers directory, or config_dir's."""
    beside = path.parent / "config.json"
    ldm = any(n.removeprefix(VAE_PREFIX).startswith("decoder.mid.") for n in read_header(path))
    return beside if beside.is_file() and not ldm else config_dir / "vae" / "config.json"


def vae_class(config: Mapping[str, object], path: Path) -> str:
    """The diffusers class of a VAE's settings. Raises ValueError for one that is not known here."""
    name = config.get("_class_name", "AutoencoderKL")
    if name not in VAE_CLASSES:
        raise ValueError(f"{path} is a {name}; a VAE must be one of {', '.join(VAE_CLASSES)}.")
    return name


def text_class(config_dir: Path) -> type[CLIPTextModel | CLIPTextModelWithProjection]:
    """transformers' class of a text encoder's folder."""
    import transformers

    projects = config_dir.name == "text_encoder_2"
    return transformers.CLIPTextModelWithProjection if projects else transformers.CLIPTextModel


@contextlib.contextmanager
def no_progress_bar() -> Iterator[None]:
    """transformers draws a bar for every encoder it loads; ours to restore, since it is a global switch."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
