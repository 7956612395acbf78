"""Loads one part of a model from the disk: UNet, VAE, text encoders, tokenizers.

Each alone, so that the text encoders can be loaded, used and dropped before the UNet takes its memory.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias, TypeVar

from spo_fast.data.files import DAMAGED, read_json, shown
from spo_fast.models.files import kinds
from spo_fast.models.files.clip_tokenizer import clip_tokenizer
from spo_fast.models.files.layout import WEIGHT_SUFFIXES, vae_folder, weight_names
from spo_fast.models.files.single_file import TEXT_PREFIXES, text_class, vae_class
from spo_fast.models.files.sources import TEXT_PARTS, Resolved, settings_directory

if TYPE_CHECKING:
    import torch
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
    from diffusers.models.autoencoders.autoencoder_tiny import AutoencoderTiny
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
    from torch import nn
    from transformers import CLIPTextModel, CLIPTextModelWithProjection, PreTrainedTokenizerBase

    VAE: TypeAlias = AutoencoderKL | AutoencoderTiny
    TextEncoder: TypeAlias = CLIPTextModel | CLIPTextModelWithProjection

Network = TypeVar("Network", bound="nn.Module")


def check_weights(resolved: Resolved) -> None:
    """Raise ValueError for a network whose names and shapes are not its files', or a tokenizer that is not its text
    encoder's. No weight is read."""
    for load in (load_unet, load_vae, load_text_encoders):
        load(resolved, None)
    load_tokenizers(resolved)


def load_unet(resolved: Resolved, dtype: torch.dtype | None) -> UNet2DConditionModel:
    """The UNet2DConditionModel in dtype on the CPU, in eval mode, frozen (requires_grad False)."""
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

    from spo_fast.models.files.networks import unet_from_file

    if resolved.single_file:
        return _frozen(unet_from_file(resolved.model_path, resolved.config_dir, dtype))
    return _from_directory(UNet2DConditionModel, resolved.model_path / "unet", dtype, resolved.source.variant)


def load_unet_from(directory: Path, dtype: torch.dtype | None) -> UNet2DConditionModel:
    """Another UNet2DConditionModel, such as what full fine-tuning left."""
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

    kinds.check_unet(read_json(directory / "config.json"), directory / "config.json")
    return _from_directory(UNet2DConditionModel, directory, dtype, None)


def load_vae(resolved: Resolved, dtype: torch.dtype | None) -> VAE:
    """The AutoencoderKL or AutoencoderTiny in dtype on the CPU, in eval mode, frozen."""
    import diffusers

    from spo_fast.models.files.networks import vae_from_file

    path = resolved.vae_path or resolved.model_path
    if path.is_file():
        return _frozen(vae_from_file(path, settings_directory(resolved.source), dtype))
    folder = vae_folder(resolved)
    cls = getattr(diffusers, vae_class(read_json(folder / "config.json"), path))
    return _from_directory(cls, folder, dtype, None if resolved.vae_path else resolved.source.variant)


def load_text(resolved: Resolved, dtype: torch.dtype | None) -> tuple[list[PreTrainedTokenizerBase], list[TextEncoder]]:
    """(tokenizers, text encoders): one of each for SD1.5, two for SDXL; encoders in dtype, eval mode, frozen."""
    return load_tokenizers(resolved), load_text_encoders(resolved, dtype)


def load_tokenizers(resolved: Resolved) -> list[PreTrainedTokenizerBase]:
    """One CLIPTokenizer for SD1.5, two for SDXL. A single file has none: they are built from the shipped merges."""
    found = []
    for name, encoder in TEXT_PARTS[resolved.source.kind]:
        folder, config = resolved.config_dir / name, read_json(resolved.config_dir / encoder / "config.json")
        try:
            tokenizer = _tokenizer(folder)
        except Exception as error:  # whatever the library makes of files that are no tokenizer's
            why = f"{type(error).__name__}: {' '.join(str(error).split())[:70]}"
            raise ValueError(f"{shown(folder)} holds no CLIP tokenizer ({why}). {DAMAGED}") from error
        kinds.check_tokenizer(tokenizer.model_max_length, len(tokenizer), config, folder)
        found.append(tokenizer)
    if len(lengths := {tokenizer.model_max_length for tokenizer in found}) > 1:
        raise ValueError(
            f"the tokenizers in {shown(resolved.config_dir)} have model_max_length {min(lengths)} and {max(lengths)}: "
            "their prompts are joined, so it must be one. Mend their tokenizer_config.json."
        )
    return found


def load_text_encoders(resolved: Resolved, dtype: torch.dtype | None) -> list[TextEncoder]:
    """CLIPTextModel, and for SDXL CLIPTextModelWithProjection as well."""
    from spo_fast.models.files.networks import text_encoder_from_file

    kind, path = resolved.source.kind, resolved.model_path
    encoders = []
    for (_, part), prefix in zip(TEXT_PARTS[kind], TEXT_PREFIXES[kind], strict=True):
        if resolved.single_file:
            encoders.append(_frozen(text_encoder_from_file(path, prefix, resolved.config_dir / part, dtype)))
        else:
            encoders.append(_from_directory(text_class(path / part), path / part, dtype, resolved.source.variant))
    return encoders


def _tokenizer(directory: Path) -> PreTrainedTokenizerBase:
    from transformers import CLIPTokenizerFast  # type: ignore[attr-defined]  # an alias in transformers 5

    if any((directory / name).is_file() for name in ("tokenizer.json", "vocab.json")):
        return CLIPTokenizerFast.from_pretrained(str(directory), local_files_only=True)
    settings = read_json(directory / "tokenizer_config.json")
    return clip_tokenizer(pad_token=settings["pad_token"], max_length=settings["model_max_length"])


def _from_directory(cls: type[Network], folder: Path, dtype: torch.dtype | None, variant: str | None) -> Network:
    from spo_fast.models.files.networks import load_part

    stem = "model" if cls.__module__.startswith("transformers") else "diffusion_pytorch_model"
    chosen = weight_names({file.name for file in folder.iterdir()}, "", stem, variant)
    if not chosen:
        others = sorted(file.name for file in folder.glob(f"{stem}*") if file.suffix in WEIGHT_SUFFIXES)
        mend = f"It has {others[0]}: rename that, if it is what you want." if others else DAMAGED
        lacking = f"{stem}{f'.{variant}' if variant else ''}.safetensors"
        raise FileNotFoundError(f"{shown(folder)} has no {lacking}. {mend}")
    return _frozen(load_part(cls, folder / chosen[0], folder, dtype))


def _frozen(model: Network) -> Network:
    return model.requires_grad_(False).eval()
