"""Loads one part of a model from the disk: UNet or transformer, VAE, text encoders, tokenizers.

Each alone, so that the text encoders can be loaded, used and dropped before the network takes its memory.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias, TypeVar

from spo_fast.data.files import DAMAGED, read_json, shown
from spo_fast.models.files import kinds
from spo_fast.models.files.clip_tokenizer import clip_tokenizer
from spo_fast.models.files.layout import WEIGHT_SUFFIXES, required, vae_folder, weight_names
from spo_fast.models.files.single_file import TEXT_PREFIXES, text_class, vae_class
from spo_fast.models.files.sources import T5S, Resolved, network_part, published_settings, settings_directory

if TYPE_CHECKING:
    import torch
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
    from diffusers.models.autoencoders.autoencoder_tiny import AutoencoderTiny
    from diffusers.models.transformers.transformer_flux import FluxTransformer2DModel
    from diffusers.models.transformers.transformer_sd3 import SD3Transformer2DModel
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
    from torch import nn
    from transformers import CLIPTextModel, CLIPTextModelWithProjection, PreTrainedTokenizerBase, T5EncoderModel

    VAE: TypeAlias = AutoencoderKL | AutoencoderTiny
    FlowTransformer: TypeAlias = FluxTransformer2DModel | SD3Transformer2DModel
    TextEncoder: TypeAlias = CLIPTextModel | CLIPTextModelWithProjection | T5EncoderModel

Network = TypeVar("Network", bound="nn.Module")


def check_weights(resolved: Resolved) -> None:
    """Raise ValueError for a network whose names and shapes are not its files', or a tokenizer that is not its text
    encoder's. No weight is read."""
    for load in (load_network, load_vae, load_text_encoders):
        load(resolved, None)
    load_tokenizers(resolved)


def load_network(resolved: Resolved, dtype: torch.dtype | None) -> UNet2DConditionModel | FlowTransformer:
    """The model's UNet, or a flow model's transformer."""
    if network_part(resolved.source.kind) == "unet":
        return load_unet(resolved, dtype)
    return load_transformer(resolved, dtype)


def load_unet(resolved: Resolved, dtype: torch.dtype | None) -> UNet2DConditionModel:
    """The UNet2DConditionModel in dtype on the CPU, in eval mode, frozen (requires_grad False)."""
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

    from spo_fast.models.files.networks import unet_from_file

    if resolved.single_file:
        return _frozen(unet_from_file(resolved.model_path, resolved.config_dir, dtype))
    return _from_directory(UNet2DConditionModel, resolved.model_path / "unet", dtype, resolved.source.variant)


def load_transformer(resolved: Resolved, dtype: torch.dtype | None) -> FlowTransformer:
    """A flow's SD3Transformer2DModel or FluxTransformer2DModel in dtype on the CPU, in eval mode, frozen."""
    import diffusers

    from spo_fast.models.files.networks import transformer_from_file

    kind = resolved.source.kind
    if resolved.single_file:
        config = read_json(published_settings(resolved.source) / "transformer" / "config.json")
        return _frozen(transformer_from_file(resolved.model_path, kind, config, dtype))
    cls = getattr(diffusers, kinds.TRANSFORMERS[kind])
    return _from_directory(cls, resolved.model_path / "transformer", dtype, resolved.source.variant)


def load_unet_from(directory: Path, dtype: torch.dtype | None) -> UNet2DConditionModel:
    """Another UNet2DConditionModel, such as what full fine-tuning left."""
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

    kinds.check_unet(read_json(directory / "config.json"), directory / "config.json")
    return _from_directory(UNet2DConditionModel, directory, dtype, None)


def load_vae(resolved: Resolved, dtype: torch.dtype | None) -> VAE:
    """The AutoencoderKL or AutoencoderTiny in dtype on the CPU, in eval mode, frozen."""
    import diffusers

    from spo_fast.models.files.networks import vae_from_file

    path = resolved.vae_path or resolved.base_path or resolved.model_path
    if path.is_file():
        return _frozen(vae_from_file(path, settings_directory(resolved.source), dtype))
    folder = vae_folder(resolved)
    cls = getattr(diffusers, vae_class(read_json(folder / "config.json"), path))
    return _from_directory(cls, folder, dtype, None if resolved.vae_path else resolved.source.variant)


def load_tokenizers(resolved: Resolved) -> list[PreTrainedTokenizerBase]:
    """In the pipeline's order: one CLIPTokenizer for SD1.5, two for SDXL and SD3, whose third is T5's, FLUX's second.

    A UNet's single file has none: they are built from the shipped merges.
    """
    found, lengths = [], set()
    for name, encoder in resolved.text_parts:
        folder, config = resolved.config_dir / name, read_json(resolved.config_dir / encoder / "config.json")
        t5 = (resolved.source.kind, encoder) in T5S
        try:
            tokenizer = _tokenizer(folder, t5)
        except Exception as error:  # whatever the library makes of files that are no tokenizer's
            why = f"{type(error).__name__}: {' '.join(str(error).split())[:70]}"
            raise ValueError(
                f"{shown(folder)} holds no {'T5' if t5 else 'CLIP'} tokenizer ({why}). {DAMAGED}"
            ) from error
        kinds.check_tokenizer(tokenizer.model_max_length, len(tokenizer), config, folder, t5)
        found.append(tokenizer)
        lengths |= set() if t5 else {tokenizer.model_max_length}
    if len(lengths) > 1:
        raise ValueError(
            f"the tokenizers in {shown(resolved.config_dir)} have model_max_length {min(lengths)} and {max(lengths)}: "
            "their prompts are joined, so it must be one. Mend their tokenizer_config.json."
        )
    return found


def load_text_encoders(resolved: Resolved, dtype: torch.dtype | None) -> list[TextEncoder]:
    """All of them in the pipeline's order, in memory together, in dtype, eval mode, frozen."""
    return [load_text_encoder(resolved, part, dtype) for _, part in resolved.text_parts]


def load_text_encoder(resolved: Resolved, part: str, dtype: torch.dtype | None) -> TextEncoder:
    """One of Resolved.text_parts alone, in dtype, eval mode, frozen."""
    from spo_fast.models.files.networks import text_encoder_from_file

    kind, folder = resolved.source.kind, resolved.config_dir / part
    if resolved.single_file and resolved.base_path is None:
        prefix = TEXT_PREFIXES[kind][[encoder for _, encoder in resolved.text_parts].index(part)]
        return _frozen(text_encoder_from_file(resolved.model_path, kind, prefix, folder, dtype))
    return _from_directory(text_class(kind, part), folder, dtype, resolved.source.variant)


def _tokenizer(directory: Path, t5: bool) -> PreTrainedTokenizerBase:
    from transformers import CLIPTokenizerFast, T5TokenizerFast  # type: ignore[attr-defined]  # aliases in transformers 5

    if t5:
        return T5TokenizerFast.from_pretrained(str(directory), local_files_only=True)
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
        lacking = f"{stem}{f'.{variant}' if required(variant) else ''}.safetensors"
        raise FileNotFoundError(f"{shown(folder)} has no {lacking}. {mend}")
    return _frozen(load_part(cls, folder / chosen[0], folder, dtype))


def _frozen(model: Network) -> Network:
    return model.requires_grad_(False).eval()
