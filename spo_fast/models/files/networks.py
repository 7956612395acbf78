"""Networks of a diffusers directory or of one file in the original layout, filled strictly (data/weights.py).

A single file has weights only: settings come from a directory in diffusers layout (configs/ by default).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from spo_fast.data.files import DAMAGED, read_header, read_json, read_safetensors, shown, some
from spo_fast.data.weights import Network, fill, read_tensors, renamed
from spo_fast.models.files.single_file import (
    UNET_PREFIX,
    VAE_PREFIX,
    VAE_UNUSED,
    text_class,
    transformer_sizes,
    vae_class,
    vae_settings_of_file,
)

if TYPE_CHECKING:
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

    from spo_fast.models.files.load import VAE, FlowTransformer, TextEncoder


def load_part(cls: type[Network], file: Path, config_dir: Path, dtype: torch.dtype | None) -> Network:
    """The network of a folder: its class, its file of weights or their index, the folder of its config.json."""
    tensors = read_tensors(file)
    if cls.__name__ == "T5EncoderModel":
        return t5_encoder(cls, config_dir, tensors, file, dtype)
    if cls.__module__.startswith("transformers"):
        return text_encoder(cls, config_dir, tensors, file, dtype)
    return diffusers_network(cls, read_json(config_dir / "config.json"), tensors, file, dtype)


def unet_from_file(path: Path, config_dir: Path, dtype: torch.dtype | None) -> UNet2DConditionModel:
    """A UNet out of a single file in the original layout."""
    from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

    def convert(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return convert_ldm_unet_checkpoint({UNET_PREFIX + n: t for n, t in tensors.items()}, config)

    config = read_json(config_dir / "unet" / "config.json")
    tensors = _converted(path, f"UNet, {UNET_PREFIX}*", read_safetensors(path, UNET_PREFIX), convert)
    return diffusers_network(UNet2DConditionModel, config, tensors, f"the UNet in {shown(path, 90)}", dtype)


def transformer_from_file(
    path: Path, kind: str, config: Mapping[str, object], dtype: torch.dtype | None
) -> FlowTransformer:
    """A flow's transformer out of a single file; config: what its shapes do not show."""
    import diffusers
    from diffusers.loaders import single_file_utils

    classes: dict[str, tuple[Any, Callable[..., dict[str, Tensor]]]] = {
        "sd35": (diffusers.SD3Transformer2DModel, single_file_utils.convert_sd3_transformer_checkpoint_to_diffusers),
        "flux": (diffusers.FluxTransformer2DModel, single_file_utils.convert_flux_transformer_checkpoint_to_diffusers),
    }
    cls, convert = classes[kind]
    prefix = UNET_PREFIX if any(n.startswith(UNET_PREFIX) for n in read_header(path)) else ""
    rest = read_safetensors(path, prefix) if dtype is not None else shapes_of(path, prefix)
    part = f"transformer of {kind}"
    try:
        found = convert(rest)  # takes out what it converts
    except (KeyError, IndexError) as error:
        raise _incomplete(path, part, error) from error
    except RuntimeError as error:
        why = f"its shapes are no {kind}'s ({' '.join(str(error).split())[:80]})"
        raise ValueError(f"{shown(path)}: {why}. {DAMAGED}") from error
    if rest:
        raise _unknown(path, part, [*rest])
    sizes = transformer_sizes(path, kind)
    return diffusers_network(cls, {**config, **sizes}, found, f"the {part} in {shown(path, 90)}", dtype)


def shapes_of(path: Path, prefix: str = "") -> dict[str, Tensor]:
    """The tensors of a .safetensors file as read_safetensors names them, on the meta device: only shapes are read."""
    whole = ("I", "U", "BOOL")
    return {
        name.removeprefix(prefix): torch.empty(
            entry["shape"], device="meta", dtype=torch.int8 if entry["dtype"].startswith(whole) else None
        )
        for name, entry in read_header(path).items()
        if name.startswith(prefix)
    }


OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}  # diffusers before 0.17


def vae_from_file(path: Path, config_dir: Path, dtype: torch.dtype | None) -> VAE:
    """A VAE out of a single file, a model's or its own, in the original layout or in diffusers'."""
    import diffusers
    from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint

    prefix = VAE_PREFIX if any(n.startswith(VAE_PREFIX) for n in read_header(path)) else ""
    tensors = {n: t for n, t in read_safetensors(path, prefix).items() if not n.startswith(VAE_UNUSED)}
    ldm = any(n.startswith("decoder.mid.") for n in tensors)  # against diffusers' decoder.mid_block.
    config = read_json(vae_settings_of_file(path, config_dir))
    if ldm:
        tensors = _converted(path, f"VAE, {prefix}*", tensors, lambda found: convert_ldm_vae_checkpoint(found, config))
    cls = getattr(diffusers, vae_class(config, path))
    return diffusers_network(cls, config, tensors, f"the VAE in {shown(path, 90)}", dtype)


def _converted(
    path: Path, part: str, tensors: dict[str, Tensor], convert: Callable[[dict[str, Tensor]], dict[str, Tensor]]
) -> dict[str, Tensor]:
    """diffusers' converters pass over what they do not know and stumble over what is missing: both are named here."""
    try:
        found = {n: t for n, t in convert(dict(tensors)).items() if t is not None}
    except (KeyError, IndexError) as error:
        raise _incomplete(path, part, error) from error
    used = {t.data_ptr() for t in found.values()}  # converters rename, and cut views at most
    if unknown := [n for n, t in tensors.items() if t.data_ptr() not in used]:
        raise _unknown(path, part, unknown)
    return found


def _incomplete(path: Path, part: str, error: Exception) -> ValueError:
    return ValueError(f"{shown(path)} is incomplete ({part}): it lacks {some([str(error.args[0])], 90)}. {DAMAGED}")


def _unknown(path: Path, part: str, names: list[str]) -> ValueError:
    others = "inpainting, refiner, SD2?" if part.startswith(("UNet", "VAE")) else "scaled fp8, control?"
    return ValueError(
        f"{shown(path)} ({part}) has {len(names)} tensors that this architecture has not ({others}): "
        f"{some(names, 100)}. Convert it to a diffusers directory."
    )


def _modern_attention(name: str) -> str:
    head, _, tail = name.rpartition(".")
    block, _, layer = head.rpartition(".")
    return f"{block}.{OLD_ATTENTION[layer]}.{tail}" if "attentions." in block and layer in OLD_ATTENTION else name


def diffusers_network(
    cls: type[Network],
    config: Mapping[str, object],
    tensors: Mapping[str, Tensor],
    name: Path | str,
    dtype: torch.dtype | None,
) -> Network:
    """A UNet or VAE of these settings with these tensors (diffusers' names, old ones too). Strict: see weights.fill."""
    network = _built(lambda: cls.from_config(config), cls, name)  # type: ignore[attr-defined]  # a ConfigMixin too
    return fill(network, renamed(tensors, _modern_attention, name), name, dtype)


def _built(make: Callable[[], Network], cls: type[Network], name: Path | str) -> Network:
    """A network on the meta device. Raises ValueError for settings that describe none."""
    try:
        with torch.device("meta"):
            return make()
    except Exception as error:  # whatever a library makes of settings that do not fit together
        why = f"{type(error).__name__}: {' '.join(str(error).split())[:70]}"
        raise ValueError(
            f"the config.json of {shown(name, 100)} describes no {cls.__name__} ({why}). {DAMAGED}"
        ) from error


REST_OF_CLIP = ("vision_model.", "visual_projection.", "text_projection.", "logit_scale")


def text_encoder(
    cls: type[Network], config_dir: Path, tensors: Mapping[str, Tensor], name: Path | str, dtype: torch.dtype | None
) -> Network:
    """A CLIP text encoder of transformers. Strict: see weights.fill.

    transformers names CLIPTextModel's tensors without `text_model.` since 5.6, older ones and the projected class with
    it, and neither reads the other's: either is read here, whichever is installed. A whole CLIP's other tensors, which
    OpenAI's own repository and merged files hold, are left out as transformers leaves them.
    """
    from transformers import CLIPTextConfig

    network = _built(lambda: cls(CLIPTextConfig.from_pretrained(config_dir)), cls, name)
    own = {n.removeprefix("text_model."): n for n in network.state_dict()}

    def rename(key: str) -> str:
        bare = key.removeprefix("text_model.")
        return own.get(bare, key)

    others = tuple(part for part in REST_OF_CLIP if not any(name.startswith(part) for name in own.values()))
    ours = {name: value for name, value in tensors.items() if not name.startswith(others)}
    return fill(network, renamed(ours, rename, name), name, dtype)


def t5_encoder(
    cls: type[Network], config_dir: Path, tensors: Mapping[str, Tensor], name: Path | str, dtype: torch.dtype | None
) -> Network:
    """T5's encoder of transformers. Strict: see weights.fill.

    One table has two names, of which files hold one or both. A whole T5's decoder is left out. In float16 the last
    layer of each block stays float32, as transformers keeps it: its sums overflow.
    """
    from transformers import T5Config

    network = _built(lambda: cls(T5Config.from_pretrained(config_dir)), cls, name)
    tables = ("shared.weight", "encoder.embed_tokens.weight")
    ours = {n: t for n, t in tensors.items() if not n.startswith(("decoder.", "lm_head."))}
    if given := [ours[table] for table in tables if table in ours]:
        ours |= dict.fromkeys(tables, given[0])
    wide = [n for n in network.state_dict() if ".wo." in n] if dtype == torch.float16 else []
    network = fill(network, ours, name, dtype, float32=wide)
    network.encoder.embed_tokens = network.shared  # type: ignore[union-attr]  # one in memory too
    return network


def text_encoder_from_file(
    path: Path, kind: str, prefix: str, config_dir: Path, dtype: torch.dtype | None
) -> TextEncoder:
    """Own mapping: diffusers' picks the encoder by its width, which two encoders of one width defeat."""
    tensors = read_safetensors(path, prefix)
    tensors = openclip_to_transformers(tensors) if prefix.endswith(".model.") else tensors
    cls = text_class(kind, config_dir.name)
    return text_encoder(cls, config_dir, tensors, f"{shown(path, 80)} ({prefix}*)", dtype)  # type: ignore[return-value]


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
    """A text tower of open_clip in transformers' names: fused q, k, v are split, the projection is transposed.

    logit_scale and attn_mask, which nothing here needs, are left out; what else is unknown keeps its name.
    """
    out = {}
    for name, t in tensors.items():
        m = re.fullmatch(r"transformer\.resblocks\.(\d+)\.(.+?)[._](weight|bias)", name)
        layer = f"text_model.encoder.layers.{m[1]}" if m else ""
        if name in ("logit_scale", "attn_mask"):
            continue
        if name == "text_projection" and t.ndim == 2:
            out["text_projection.weight"] = t.T.contiguous()
        elif m and m[2] == "attn.in_proj" and len(t) % 3 == 0:
            for projection, rows in zip("qkv", t.chunk(3), strict=True):
                out[f"{layer}.self_attn.{projection}_proj.{m[3]}"] = rows.contiguous()
        elif m and m[2] in OPENCLIP_LAYERS:
            out[f"{layer}.{OPENCLIP_LAYERS[m[2]]}.{m[3]}"] = t
        else:
            out[OPENCLIP_NAMES.get(name, name)] = t
    return out
