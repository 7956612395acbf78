"""CLIP weights from any layout (ours, transformers, OpenCLIP, the published SPMs) and back."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from spo_fast.data.files import DAMAGED, WEIGHT_NAMES, read_json, save_tensors, shown
from spo_fast.data.weights import fill, read_tensors, renamed, without_constants
from spo_fast.scorers.clip import HF_NAMES, HF_TOWER_DEFAULTS, KNOWN_CLIPS, TIME_CHANNELS, Clip, ClipConfig, TowerConfig

SPM_FILES = "a .bin of SPO-Diffusion-Models/Step-Aware_Preference_Models, or a directory written by save_clip"
PLAIN_FILES = "the weights of a CLIPModel such as yuvalkirstain/PickScore_v1, or the directory with its config.json"


def load_clip(
    source: str | Path | Mapping[str, Tensor],
    *,
    time_conditioned: bool,
    hf_config: Mapping[str, object] | None = None,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    name: str = "state dict",
) -> Clip:
    """Read a CLIP strictly: every tensor of the network must be there, and nothing else but `position_ids` buffers.

    source: a `.safetensors` or `.bin` file, a directory with model.safetensors or pytorch_model.bin, or a state dict.
    hf_config: transformers' CLIPConfig as a dict; by default config.json beside the weights, else KNOWN_CLIPS.
    name: what errors call a state dict.
    The published loader leaves missing tensors uninitialised; here they are an error that names them.
    Raises FileNotFoundError, or ValueError for a pickle that holds more than tensors, wrong keys or shapes, or an
    architecture that is not known.
    """
    if isinstance(source, Mapping):
        tensors = source
    else:
        file = find_weights(Path(source))
        name, tensors = str(file), read_tensors(file)
        hf_config = hf_config or read_hf_config(file.parent)
    # the published step-aware model keeps the network in an attribute `model`; old transformers saved index buffers
    tensors = renamed(without_constants(tensors), lambda key: key.removeprefix("model."), name)
    config = config_from_state_dict(tensors, time_conditioned=time_conditioned, hf_config=hf_config, name=name)
    with torch.device("meta"):
        model = Clip(config)
    hint = _hint(model, tensors)
    return fill(model, tensors, name, dtype, device, float32=("logit_scale",), hint=hint).eval()


def load_any_clip(path: str | Path, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32) -> Clip:
    """load_clip for a file that says itself, by its tensors, whether it is step-aware."""
    file = find_weights(Path(path))
    tensors = read_tensors(file)
    aware = any("t_embedder" in key or "adaLN_modulation" in key for key in tensors)
    config = read_hf_config(file.parent)
    return load_clip(tensors, time_conditioned=aware, hf_config=config, device=device, dtype=dtype, name=str(file))


def save_clip(model: Clip, directory: str | Path, weights: Mapping[str, Tensor] | None = None) -> Path:
    """Write model.safetensors (keys as published: under `model.` if step-aware) and config.json, for load_clip.

    weights: tensors to write in place of the model's own of the same names (its float32 masters).
    """
    prefix = "model." if model.config.time_conditioned else ""
    tensors = {prefix + key: value for key, value in {**model.state_dict(), **(weights or {})}.items()}
    return write_model(directory, tensors, model.config.to_hf())


def write_model(directory: str | Path, tensors: Mapping[str, Tensor], config: Mapping[str, object]) -> Path:
    """model.safetensors and config.json, each written under another name and renamed."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    temporary = directory / ".model.safetensors.tmp"
    save_tensors({key: value.cpu().contiguous() for key, value in tensors.items()}, temporary)
    os.replace(temporary, directory / "model.safetensors")
    temporary = directory / ".config.json.tmp"
    temporary.write_text(json.dumps(config, indent=1) + "\n")
    os.replace(temporary, directory / "config.json")
    return directory


def find_weights(path: Path) -> Path:
    """The file of weights of a directory, or the index of its shards; a file is itself."""
    if path.is_file():
        return path
    if not path.is_dir():
        raise FileNotFoundError(f"{path} does not exist. Expected {SPM_FILES}; or {PLAIN_FILES}.")
    for name in WEIGHT_NAMES:
        if (path / name).is_file():
            return path / name
    others = sorted(p.name for p in path.iterdir() if p.suffix in (".bin", ".safetensors"))
    hint = f"It holds {', '.join(others)}: give the file itself." if others else "It holds no weights."
    raise FileNotFoundError(f"{path} has neither model.safetensors nor pytorch_model.bin. {hint}")


def read_hf_config(directory: Path) -> dict[str, object] | None:
    """config.json if it is a CLIP's; any other model's is none of ours."""
    file = directory / "config.json"
    if not file.is_file():
        return None
    config = read_json(file)
    if not {"text_config", "vision_config"} <= config.keys():
        return None
    for kind in ("text_config", "vision_config"):
        if not isinstance(config[kind], dict):
            raise ValueError(f"{shown(file)}: {kind} is a JSON {type(config[kind]).__name__}, not an object. {DAMAGED}")
    return config


def config_from_state_dict(
    tensors: Mapping[str, Tensor],  # keys without `model.`
    *,
    time_conditioned: bool,
    hf_config: Mapping[str, object] | None = None,
    name: str = "state dict",
) -> ClipConfig:
    """Sizes from the shapes; heads, activation and epsilon, which no shape shows, from hf_config or KNOWN_CLIPS."""

    def shape(key: str) -> torch.Size:
        found = tensors[key].shape if key in tensors else None
        if found is None or len(found) != (4 if "patch_embedding" in key else 2):
            expected = SPM_FILES if time_conditioned else PLAIN_FILES
            what = f"it has no {key}" if found is None else f"its {key} has {len(found)} dimensions"
            raise ValueError(f"{shown(name, 80)} is no CLIP: {what}. Expected {expected}.")
        return found

    def tower(kind: str, fixed: Mapping[str, Any]) -> TowerConfig:
        prefix = f"{kind}_model.encoder.layers."
        layers = {int(m[1]) for key in tensors if (m := re.match(re.escape(prefix) + r"(\d+)\.", key))}
        mlp_width, width = shape(f"{prefix}0.mlp.fc1.weight")
        sizes = {"width": width, "mlp_width": mlp_width, "num_layers": max(layers) + 1}
        for field, size in sizes.items():
            if fixed.get(field, size) != size:
                raise ValueError(
                    f"config.json and {name} disagree: {kind}_config.{HF_NAMES[field]} is {fixed[field]}, the weights "
                    f"have {size}. Put the weights beside the config.json they came with, or (for a known CLIP) alone."
                )
        return TowerConfig(**{**fixed, **sizes})

    width, _, patch_size, _ = shape("vision_model.embeddings.patch_embedding.weight")
    if hf_config is None:
        num_layers = len({key.split(".")[3] for key in tensors if key.startswith("vision_model.encoder.layers.")})
        text, vision = _known_towers((width, num_layers, patch_size), name)
    else:
        text, vision = _hf_tower(hf_config, "text"), _hf_tower(hf_config, "vision")
    return ClipConfig(
        text=tower("text", text),
        vision=tower("vision", vision),
        vocab_size=shape("text_model.embeddings.token_embedding.weight")[0],
        max_length=shape("text_model.embeddings.position_embedding.weight")[0],
        image_size=math.isqrt(shape("vision_model.embeddings.position_embedding.weight")[0] - 1) * patch_size,
        patch_size=patch_size,
        projection_dim=shape("visual_projection.weight")[0],
        time_conditioned=time_conditioned,
    )


def _known_towers(key: tuple[int, int, int], name: str) -> tuple[dict[str, Any], dict[str, Any]]:
    if key not in KNOWN_CLIPS:
        known = ", ".join(clip.name for clip in KNOWN_CLIPS.values())
        raise ValueError(
            f"{shown(name, 70)}: no known CLIP has (vision width, layers, patch) = {key}, which tells heads and "
            f"activation. Put its config.json beside it. Known: {known}."
        )
    clip = KNOWN_CLIPS[key]
    return (
        {"num_heads": clip.text_heads, "activation": clip.activation},
        {"num_heads": clip.vision_heads, "activation": clip.activation},
    )


def _hf_tower(hf_config: Mapping[str, Any], kind: str) -> dict[str, Any]:
    # old files carry a second copy, `text_config_dict`, which transformers lets win
    merged = {
        **HF_TOWER_DEFAULTS[kind],
        **hf_config[f"{kind}_config"],
        **(hf_config.get(f"{kind}_config_dict") or {}),
    }
    return {field: merged[hf] for field, hf in HF_NAMES.items() if hf in merged}


def _hint(model: Clip, tensors: Mapping[str, Tensor]) -> str:
    """What to do about tensors that do not fit: models that see the timestep are mistaken for others."""
    sees_time = any("t_embedder" in key or "adaLN_modulation" in key for key in tensors)
    if model.config.time_conditioned and not sees_time:
        return "A CLIP without a timestep cannot score as a step-aware one: use it as --scorer pickscore."
    if sees_time and not model.config.time_conditioned:
        return "This is a step-aware model: use it as --scorer spm."
    return DAMAGED


def init_identity_time_conditioning(model: Clip, seed: int = 0) -> Clip:
    """A step-aware model that starts as the plain CLIP `model` for every timestep, sharing its tensors.

    Gates 1, shifts and scales 0, all weights of the modulations 0; timestep MLP N(0, 0.02^2) with biases 0: as the
    published SPM training starts. (The published from_pretrained alone leaves these tensors uninitialised.)
    """
    if model.config.time_conditioned:
        raise ValueError(
            "This CLIP is step-aware already; init_identity_time_conditioning takes a plain one: "
            "load_clip(..., time_conditioned=False)."
        )
    width, num_layers = model.config.vision.width, model.config.vision.num_layers
    like = model.visual_projection.weight
    generator = torch.Generator().manual_seed(seed)
    state = model.state_dict()

    def put(key: str, value: Tensor) -> None:
        state[key] = value.to(like.device, like.dtype)

    put("t_embedder.mlp.0.weight", 0.02 * torch.randn(width, TIME_CHANNELS, generator=generator))
    put("t_embedder.mlp.0.bias", torch.zeros(width))
    put("t_embedder.mlp.2.weight", 0.02 * torch.randn(width, width, generator=generator))
    put("t_embedder.mlp.2.bias", torch.zeros(width))
    shift_scale_gate = torch.tensor([0.0, 0.0, 1.0]).repeat_interleave(
        width
    )  # (3 width,), once for attention, once for the MLP
    for i in range(num_layers):
        put(f"vision_model.encoder.layers.{i}.adaLN_modulation.1.weight", torch.zeros(6 * width, width))
        put(f"vision_model.encoder.layers.{i}.adaLN_modulation.1.bias", shift_scale_gate.repeat(2))
    put("vision_model.adaLN_modulation.1.weight", torch.zeros(2 * width, width))
    put("vision_model.adaLN_modulation.1.bias", torch.zeros(2 * width))

    with torch.device("meta"):
        step_aware = Clip(replace(model.config, time_conditioned=True))
    step_aware.load_state_dict(state, assign=True)
    return step_aware
