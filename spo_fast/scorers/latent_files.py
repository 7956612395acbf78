"""Latent reward models on the disk: ours, the published ones, and new ones from a diffusion model."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from spo_fast.data.files import DAMAGED, WEIGHT_NAMES, read_json, shown
from spo_fast.data.weights import fill, read_tensors, renamed
from spo_fast.scorers.clip_files import write_model
from spo_fast.scorers.latent_network import LOGIT_SCALE, Configs, LatentReward

if TYPE_CHECKING:
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

    from spo_fast.models.files.load import TextEncoder

PARTS = ("unet", "text_encoder", "text_encoder_2")
UNUSED_KEYS = ("unet.up_blocks.", "unet.conv_norm_out.", "unet.conv_out.", "vae.")
LRM_FILES = (
    "a directory with unet/, text_encoder/ (SDXL: text_encoder_2/ too) and state_dict.pt, such as those of "
    "casiatao/LRM, or one with model.safetensors and config.json, written by save_latent_reward"
)


def init_latent_reward(
    unet: UNet2DConditionModel,
    text_encoders: Sequence[TextEncoder],  # SDXL's CLIPTextModelWithProjection second
    *,
    text_projection: Tensor | None = None,  # (D, width): text_projection.weight of openai/clip-vit-large-patch14
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
) -> LatentReward:
    """Where the training starts: copies of the diffusion model's weights, a new visual projection N(0, 0.02^2).

    text_projection: for SD-1.5 only, whose text encoder is that CLIP's without it; None draws one as CLIP does,
    N(0, 1 / width), for text encoders that never had one.
    Raises ValueError for a text_projection given with SDXL, or weights that do not fit together.
    """
    parts = dict(zip(PARTS, (unet, *text_encoders), strict=False))
    configs = {name: json.loads(_config_json(part)) for name, part in parts.items()}
    tensors = {f"{name}.{key}": value for name, part in parts.items() for key, value in part.state_dict().items()}
    generator = torch.Generator().manual_seed(seed)
    if len(text_encoders) == 1:
        width = configs["text_encoder"]["hidden_size"]
        drawn = torch.randn(width, width, generator=generator) / math.sqrt(width)
        tensors["text_projection.weight"] = drawn if text_projection is None else text_projection
        projection_dim = len(tensors["text_projection.weight"])
    else:
        if text_projection is not None:
            raise ValueError("SDXL's second text encoder has its own projection: leave text_projection out.")
        projection_dim = configs["text_encoder_2"]["projection_dim"]
    channels = configs["unet"]["block_out_channels"]
    tensors["visual_projection.weight"] = 0.02 * torch.randn(
        projection_dim, sum(channels) + channels[-1], generator=generator
    )
    tensors["logit_scale"] = torch.tensor(LOGIT_SCALE)
    copies = {key: value.detach().clone() for key, value in tensors.items()}
    return load_latent_reward(copies, configs=configs, device=unet.device, dtype=dtype).train()


def _config_json(part: UNet2DConditionModel | TextEncoder) -> str:
    if isinstance(part.config, dict):  # diffusers'
        return part.to_json_string()
    # transformers would leave out what equals its defaults of the day
    return part.config.to_json_string(use_diff=False)


def load_latent_reward(
    source: str | Path | Mapping[str, Tensor],
    *,
    configs: Configs | None = None,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
) -> LatentReward:
    """Read a latent reward model strictly: every tensor it needs must be there, and none that it does not know.

    source: LRM_FILES, a file of tensors, or a state dict. configs: the parts' configs, by default read beside the
    weights. dtype: of all but logit_scale, which stays float32 (the published scorer rounds it to float16 too).
    Raises FileNotFoundError, or ValueError naming what is missing, unexpected or of the wrong shape.
    """
    if isinstance(source, Mapping):
        name, tensors = "state dict", source
    else:
        name = str(source)
        tensors, found = _read(Path(source))
        configs = configs or found
    configs = configs or {}
    if not {"unet", "text_encoder"} <= configs.keys() or "visual_projection.weight" not in tensors:
        raise ValueError(
            f"{name} is no latent reward model: it has configs of {sorted(configs) or 'no part'} and "
            f"{'a' if 'visual_projection.weight' in tensors else 'no'} visual_projection.weight. Expected {LRM_FILES}."
        )
    tensors = {key: value for key, value in tensors.items() if not key.startswith(UNUSED_KEYS)}
    tensors = renamed(tensors, _published_key, name)
    with torch.device("meta"):
        model = LatentReward(configs, projection_dim=len(tensors["visual_projection.weight"]))
    return fill(model, tensors, name, dtype, device, float32=("logit_scale",)).eval()


def save_latent_reward(model: LatentReward, directory: str | Path, weights: Mapping[str, Tensor] | None = None) -> Path:
    """Write model.safetensors (published keys, dtypes as they are) and config.json, for load_latent_reward.

    weights: tensors to write in place of the model's own of the same names (its float32 masters).
    """
    return write_model(directory, {**model.state_dict(), **(weights or {})}, model.configs)


def _published_key(key: str) -> str:
    """Recent transformers name a CLIPTextModel's tensors without the `text_model.` that every checkpoint has."""
    for part in PARTS[1:]:
        if key.startswith((f"{part}.embeddings.", f"{part}.encoder.", f"{part}.final_layer_norm.")):
            return key.replace(f"{part}.", f"{part}.text_model.", 1)
    return key


def read_configs(path: Path) -> dict[str, dict[str, Any]]:
    """Of a latent reward model's parts, without its weights."""
    if (path / "state_dict.pt").is_file():
        return {p: read_json(path / p / "config.json") for p in PARTS if (path / p / "config.json").is_file()}
    return read_json((path if path.is_dir() else path.parent) / "config.json")


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, dict[str, Any]]]:
    """Tensors under their whole keys, and the configs beside them."""
    if (path / "state_dict.pt").is_file():
        return _read_published(path)
    files = [path / name for name in WEIGHT_NAMES] if path.is_dir() else [path]
    file = next((file for file in files if file.is_file()), None)
    if file is None:
        raise FileNotFoundError(f"{files[0]} does not exist. Expected {LRM_FILES}.")
    config = file.with_name("config.json")
    return read_tensors(file), read_json(config) if config.is_file() else {}


def _read_published(directory: Path) -> tuple[dict[str, Tensor], dict[str, dict[str, Any]]]:
    """One directory a part, and state_dict.pt: {"visual_projection": {"weight": ...}, ..., "logit_scale": number}."""
    file = directory / "state_dict.pt"
    try:
        rest = dict(torch.load(file, map_location="cpu", weights_only=True))
        tensors = {"logit_scale": torch.as_tensor(rest.pop("logit_scale"))}
        tensors |= {f"{name}.{key}": value for name, state in rest.items() for key, value in state.items()}
    except OSError:
        raise
    except Exception as error:  # whatever the unpickler makes of bytes, or this of what was pickled
        raise ValueError(f"{shown(file)} holds no logit_scale and projections of a reward model. {DAMAGED}") from error
    configs = {}
    for part in PARTS:
        files = sorted((directory / part).glob("*.index.json"))  # of shards
        files = files or sorted(p for p in (directory / part).glob("*") if p.suffix in (".safetensors", ".bin"))
        if not files:
            continue
        if len(files) > 1:
            names = ", ".join(file.name for file in files)
            raise ValueError(f"{directory / part} has {len(files)} files of weights, one is wanted: {names}.")
        tensors |= {f"{part}.{key}": value for key, value in read_tensors(files[0]).items()}
        configs[part] = read_json(directory / part / "config.json")
    return tensors, configs
