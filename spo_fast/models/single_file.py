"""One .safetensors file in the original (LDM) layout, or one VAE's file, as diffusers and transformers modules.

Such a file has weights only: settings come from a directory in diffusers layout (spo_fast/models/configs by default).
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spo_fast.files import read_header, read_json, read_tensors

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

UNET_PREFIX = "model.diffusion_model."
VAE_PREFIX = "first_stage_model."
TEXT_PREFIXES = {
    "sd15": ("cond_stage_model.transformer.",),
    "sdxl": ("conditioner.embedders.0.transformer.", "conditioner.embedders.1.model."),
}
OTHER_PREDICTION = ("v_pred", "ztsnr", "edm_mean", "edm_std")  # tensors by which such files are marked
VAE_CLASSES = ("AutoencoderKL", "AutoencoderTiny")
VAE_LAYERS = ("encoder.", "decoder.", "quant_conv.", "post_quant_conv.")  # the rest is the VAE's training loss


def check_model_file(path: Path, kind: str, with_vae: bool) -> None:
    """Raise ValueError unless the file is a whole model of this kind (sd15 or sdxl); with_vae: with its VAE."""
    names = read_header(path)

    def absent(prefixes: list[str]) -> list[str]:
        return [p for p in prefixes if not any(n.startswith(p) for n in names)]

    for other, prefixes in TEXT_PREFIXES.items():  # the likeliest mistake: say so
        if other != kind and not absent([*prefixes]):
            raise ValueError(f"{path} is a {other} model, but kind {kind} was asked for: use {other}.")
    if marker := next((n for n in names if n in OTHER_PREDICTION or n.startswith("edm_vpred.")), None):
        raise ValueError(
            f"{path} holds {marker}: its network predicts something else, or on another noise schedule, than {kind}'s. "
            "Convert it to a diffusers directory, whose scheduler_config.json says which."
        )
    if lacking := absent([UNET_PREFIX, *TEXT_PREFIXES[kind], *([VAE_PREFIX] if with_vae else [])]):
        mend = " Give a VAE by --pretrained_vae_model_name_or_path." if lacking == [VAE_PREFIX] else ""
        raise ValueError(f"{path} is no whole {kind} model: it has no tensors named {'*, '.join(lacking)}*.{mend}")


def check_vae_file(path: Path) -> None:
    """Raise ValueError unless the file has a VAE's decoder, alone or inside a whole model."""
    if not any(n.removeprefix(VAE_PREFIX).startswith("decoder.") for n in read_header(path)):
        raise ValueError(f"{path} holds no VAE: no tensor is named decoder.* or {VAE_PREFIX}decoder.*")


def _check_size(path: Path, part: str, tensors: Mapping[str, Tensor], config: Mapping[str, Any], cls: Any) -> None:
    """diffusers' converters leave what they do not know uninitialised, silently: compare the sizes before."""
    import torch

    with torch.device("meta"):
        expected = sum(p.numel() for p in cls.from_config(config).state_dict().values())
    held = sum(t.numel() for t in tensors.values())
    if held != expected:
        raise ValueError(
            f"the {part} in {path} has {held:,} parameters where its settings give {expected:,}: another architecture "
            "(inpainting, refiner, SD2?) or an incomplete file. Convert it to a diffusers directory, or, for a VAE in "
            "diffusers layout, put its config.json beside it."
        )


def unet_from_file(path: Path, config_dir: Path, dtype: torch.dtype) -> nn.Module:
    from diffusers import UNet2DConditionModel
    from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint

    tensors = read_tensors(path, UNET_PREFIX)
    config = read_json(config_dir / "unet" / "config.json")
    _check_size(path, "UNet", tensors, config, UNet2DConditionModel)
    tensors = convert_ldm_unet_checkpoint({UNET_PREFIX + n: t for n, t in tensors.items()}, config)
    return _from_state_dict(UNet2DConditionModel, config, tensors, dtype)


OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}  # diffusers before 0.17


def vae_from_file(path: Path, config_dir: Path, dtype: torch.dtype) -> nn.Module:
    import diffusers
    from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint

    prefix = VAE_PREFIX if any(n.startswith(VAE_PREFIX) for n in read_header(path)) else ""
    tensors = {n: t for n, t in read_tensors(path, prefix).items() if n.startswith(VAE_LAYERS)}
    ldm = any(n.startswith("decoder.mid.") for n in tensors)  # against diffusers' decoder.mid_block.
    beside = path.parent / "config.json"  # a file out of a diffusers directory has its settings beside it
    config_file = beside if beside.is_file() and not ldm else config_dir / "vae" / "config.json"
    config = read_json(config_file)
    cls = getattr(diffusers, vae_class(config, path))
    _check_size(path, "VAE", tensors, config, cls)
    convert = convert_ldm_vae_checkpoint if ldm else _modern_names
    return _from_state_dict(cls, config, convert(tensors, config), dtype)


def _modern_names(tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> dict[str, Tensor]:
    return {_modern_attention(n): t for n, t in tensors.items()}


def _modern_attention(name: str) -> str:
    head, _, tail = name.rpartition(".")
    block, _, layer = head.rpartition(".")
    return f"{block}.{OLD_ATTENTION[layer]}.{tail}" if "attentions." in block and layer in OLD_ATTENTION else name


def _from_state_dict(
    cls: Any, config: Mapping[str, Any], tensors: Mapping[str, Tensor], dtype: torch.dtype
) -> nn.Module:
    """A diffusers model around these tensors, strictly.

    Not by from_single_file: that leaves weights it does not find uninitialised without a word, builds the whole
    model in float32 first where accelerate is absent, and warns of casts that do no harm.
    """
    import torch

    with torch.device("meta"):
        model = cls.from_config(config)
    shapes = {n: p.shape for n, p in model.state_dict().items()}
    # attention projections were 1x1 convolutions in old files
    tensors = {n: t.reshape(shapes.get(n, t.shape)).to(dtype) for n, t in tensors.items()}
    model.load_state_dict(tensors, strict=True, assign=True)
    return model


def text_encoder_from_file(path: Path, prefix: str, config_dir: Path, dtype: torch.dtype) -> nn.Module:
    """Own mapping: diffusers' picks the encoder by its width, which two encoders of one width defeat."""
    from transformers import CLIPTextConfig

    tensors = read_tensors(path, prefix)
    tensors = openclip_to_transformers(tensors) if prefix.endswith(".model.") else _transformers_text(tensors)
    config = CLIPTextConfig.from_pretrained(config_dir)
    with no_progress_bar():
        model, info = text_class(config_dir).from_pretrained(
            None, config=config, state_dict=tensors, dtype=dtype, output_loading_info=True
        )
    if info["missing_keys"] or info["mismatched_keys"]:
        wrong = sorted(map(str, [*info["missing_keys"], *info["mismatched_keys"]]))
        raise ValueError(f"the text encoder {prefix}* in {path} does not fit {config_dir}: {', '.join(wrong[:5])}")
    return model


def _transformers_text(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Some files lack the `text_model.` level, many have position_ids, which is a constant."""
    named = {"text_model." + n.removeprefix("text_model."): t for n, t in tensors.items()}
    return {n: t for n, t in named.items() if not n.endswith("position_ids")}


OPENCLIP_NAMES = {
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "ln_final.weight": "text_model.final_layer_norm.weight",
    "ln_final.bias": "text_model.final_layer_norm.bias",
}
OPENCLIP_LAYERS = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}


def openclip_to_transformers(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A text tower of open_clip in transformers' names: fused q, k, v are split, the projection is transposed."""
    out = {OPENCLIP_NAMES[n]: t for n, t in tensors.items() if n in OPENCLIP_NAMES}
    if "text_projection" in tensors:
        out["text_projection.weight"] = tensors["text_projection"].T.contiguous()
    for name, t in tensors.items():
        if not (m := re.fullmatch(r"transformer\.resblocks\.(\d+)\.(.+?)[._](weight|bias)", name)):
            continue
        layer = f"text_model.encoder.layers.{m[1]}"
        if m[2] == "attn.in_proj":
            for projection, rows in zip("qkv", t.chunk(3), strict=True):
                out[f"{layer}.self_attn.{projection}_proj.{m[3]}"] = rows.contiguous()
        else:
            out[f"{layer}.{OPENCLIP_LAYERS[m[2]]}.{m[3]}"] = t
    return out


def vae_class(config: Mapping[str, Any], path: Path) -> str:
    name = config.get("_class_name", "AutoencoderKL")
    if name not in VAE_CLASSES:
        raise ValueError(f"{path} is a {name}; a VAE must be one of {', '.join(VAE_CLASSES)}.")
    return name


def text_class(config_dir: Path) -> Any:
    import transformers

    projects = config_dir.name == "text_encoder_2"
    return transformers.CLIPTextModelWithProjection if projects else transformers.CLIPTextModel


def has_accelerate() -> bool:
    from diffusers.utils import is_accelerate_available

    return is_accelerate_available()


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
