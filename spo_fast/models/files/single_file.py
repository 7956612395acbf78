"""What one .safetensors file in the original layout, or one VAE's file, says of itself before it is loaded.

A UNet's (LDM) holds the whole model; a flow's (Stability's, BFL's or ComfyUI's) the transformer, whatever else it has.
It has weights only: settings come from a directory in diffusers layout (configs/ by default).
networks.py loads it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from spo_fast.config.scorers import FLOWS
from spo_fast.data.files import DAMAGED, read_header, shown
from spo_fast.models.files.sources import NETWORK_NAMES, T5S, network_part

if TYPE_CHECKING:
    from transformers import CLIPTextModel, CLIPTextModelWithProjection, T5EncoderModel

UNET_PREFIX = "model.diffusion_model."
VAE_PREFIX = "first_stage_model."
TEXT_PREFIXES = {
    "sd15": ("cond_stage_model.transformer.",),
    "sdxl": ("conditioner.embedders.0.transformer.", "conditioner.embedders.1.model."),
}
EDM_MARKERS = ("edm_mean", "edm_std", "edm_vpred.")  # tensors by which files of another noise schedule are marked
FLOW_MARKERS = {"sd35": "joint_blocks.0.x_block.attn.qkv.weight", "flux": "double_blocks.0.img_mod.lin.weight"}
VAE_CLASSES = ("AutoencoderKL", "AutoencoderTiny")
VAE_UNUSED = ("loss.", "model_ema.")  # of a VAE's training


def kind_of_file(path: Path) -> str | None:
    """The kind that a file's tensors show."""
    names = read_header(path)
    for kind, prefixes in TEXT_PREFIXES.items():
        if all(any(n.startswith(p) for n in names) for p in prefixes):
            return kind
    return next((k for k, marker in FLOW_MARKERS.items() if {marker, UNET_PREFIX + marker} & names.keys()), None)


def check_model_file(path: Path, kind: str, with_vae: bool) -> None:
    """Raise ValueError unless it is a whole model of this kind (with_vae: with its VAE), or a flow's transformer."""
    names, found = read_header(path), kind_of_file(path)

    def absent(prefixes: list[str]) -> list[str]:
        return [p for p in prefixes if not any(n.startswith(p) for n in names)]

    if found not in (None, kind):  # the likeliest mistake: say so
        raise ValueError(f"{path} is a {found} model, but kind {kind} was asked for: use {found}.")
    if kind in FLOWS:
        if found is None:
            raise ValueError(
                f"{shown(path)} holds no transformer of {kind} in its original layout: no tensor is named "
                f"{FLOW_MARKERS[kind]}. If it is diffusers' own file, give the directory of the whole pipeline."
            )
        return
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
            why = f"its latents mean nothing to a {NETWORK_NAMES[network_part(kind)]} of {kind}. Give another VAE"
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


def transformer_sizes(path: Path, kind: str) -> dict[str, object]:
    """A flow transformer's settings that a single file's shapes show. Raises ValueError for one that lacks tensors."""
    shapes = {name.removeprefix(UNET_PREFIX): entry["shape"] for name, entry in read_header(path).items()}
    try:
        return {"sd35": _mmdit_sizes, "flux": _flux_sizes}[kind](shapes)
    except (LookupError, ValueError, ArithmeticError) as error:
        lack = f"it lacks {error}" if isinstance(error, KeyError) else "a tensor has another shape"
        raise ValueError(f"{shown(path)} is incomplete (transformer of {kind}): {lack}. {DAMAGED}") from error


Shapes = Mapping[str, list[int]]


def _mmdit_sizes(shapes: Shapes) -> dict[str, object]:
    width, channels, patch = shapes["x_embedder.proj.weight"][:3]
    head = shapes.get("joint_blocks.0.x_block.attn.ln_q.weight", [64])[0]
    blocks = _count_of(shapes, "joint_blocks")
    return {
        "num_layers": blocks,
        "in_channels": channels,
        "out_channels": shapes["final_layer.linear.weight"][0] // patch**2,
        "patch_size": patch,
        "attention_head_dim": head,
        "num_attention_heads": width // head,
        "caption_projection_dim": shapes["context_embedder.weight"][0],
        "joint_attention_dim": shapes["context_embedder.weight"][1],
        "pooled_projection_dim": shapes["y_embedder.mlp.0.weight"][1],
        "pos_embed_max_size": math.isqrt(shapes["pos_embed"][1]),
        "qk_norm": "rms_norm" if "joint_blocks.0.x_block.attn.ln_q.weight" in shapes else None,
        "dual_attention_layers": [i for i in range(blocks) if f"joint_blocks.{i}.x_block.attn2.qkv.weight" in shapes],
    }


def _flux_sizes(shapes: Shapes) -> dict[str, object]:
    head = shapes["double_blocks.0.img_attn.norm.query_norm.scale"][0]
    return {
        "num_layers": _count_of(shapes, "double_blocks"),
        "num_single_layers": _count_of(shapes, "single_blocks"),
        "in_channels": shapes["img_in.weight"][1],
        "out_channels": shapes["final_layer.linear.weight"][0],
        "attention_head_dim": head,
        "num_attention_heads": shapes["img_in.weight"][0] // head,
        "joint_attention_dim": shapes["txt_in.weight"][1],
        "pooled_projection_dim": shapes["vector_in.in_layer.weight"][1],
        "guidance_embeds": "guidance_in.in_layer.weight" in shapes,
    }


def _count_of(shapes: Shapes, blocks: str) -> int:
    return len({m[1] for name in shapes if (m := re.match(rf"{blocks}\.(\d+)\.", name))})


def base_of_file(path: Path, kind: str) -> str:
    """The hub id of the published pipeline to which a flow's single file belongs."""
    sizes = transformer_sizes(path, kind)
    if kind == "flux":
        return "black-forest-labs/FLUX.1-dev" if sizes["guidance_embeds"] else "black-forest-labs/FLUX.1-schnell"
    return f"stabilityai/stable-diffusion-3.5-{'medium' if sizes['dual_attention_layers'] else 'large'}"


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


def text_class(kind: str, part: str) -> type[CLIPTextModel | CLIPTextModelWithProjection | T5EncoderModel]:
    """transformers' class of a text encoder's folder."""
    import transformers

    if (kind, part) in T5S:
        return transformers.T5EncoderModel
    projects = part == "text_encoder_2" or kind == "sd35"
    return transformers.CLIPTextModelWithProjection if projects else transformers.CLIPTextModel
