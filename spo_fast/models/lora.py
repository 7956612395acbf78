"""A LoRA file of diffusers, to start a run from: found, and checked against the network that is to take it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spo_fast.files import read_header, read_tensors

if TYPE_CHECKING:
    from torch import Tensor

    from spo_fast.config import AdapterConfig

LORA_FILE = "pytorch_lora_weights.safetensors"


def find_lora(path: str | Path, flag: str = "--lora_path") -> Path:
    """The file that the flag names. Raises FileNotFoundError, or ValueError for one that is damaged."""
    file = Path(path) / LORA_FILE if Path(path).is_dir() else Path(path)
    if not file.is_file():
        raise FileNotFoundError(f"{flag} {path}: there is no {file}. Give a {LORA_FILE} or its directory.")
    read_header(file)
    return file


def read_lora(path: str | Path, unet: Any, adapter: AdapterConfig) -> dict[str, Tensor]:
    """The file's tensors by the names of the UNet's own LoRA, which it fits. Raises ValueError saying what differs."""
    from diffusers.utils import convert_unet_state_dict_to_peft

    file = find_lora(path)
    tensors = read_tensors(file)
    layers = {name.removeprefix("unet."): value for name, value in tensors.items() if name.startswith("unet.")}
    if not layers or len(layers) < len(tensors):
        odd = next((name for name in tensors if not name.startswith("unet.")), "nothing")
        raise ValueError(
            f"--lora_path {file} is no LoRA of a UNet in diffusers' names: it holds {odd}. Only unet.* is trained."
        )
    # PEFT's names have the adapter's in them
    found = {
        name.replace(".lora_A.", ".lora_A.default.").replace(".lora_B.", ".lora_B.default."): value
        for name, value in convert_unet_state_dict_to_peft(layers).items()
    }
    metadata = _metadata(file)
    for option in ("alpha_pattern", "use_rslora", "use_dora"):
        if metadata.get(f"unet.{option}"):
            raise ValueError(f"--lora_path {file} has {option}: training goes on from one alpha for all layers only.")
    _check(f"--lora_path {file}", found, metadata.get("unet.lora_alpha"), unet, adapter)
    return found


def apply_lora(file: Path, unet: Any, kind: str) -> None:
    """Put a LoRA of any rank, alpha and layers on a UNet; `unet.delete_adapters("default")` takes it off again.

    file: in diffusers' names or kohya's. Raises ValueError if it is damaged, for another model, or does not fit itself.
    """
    from diffusers.loaders import StableDiffusionLoraLoaderMixin, StableDiffusionXLLoraLoaderMixin

    loader: Any = {"sd15": StableDiffusionLoraLoaderMixin, "sdxl": StableDiffusionXLLoraLoaderMixin}[kind]
    read_header(file)
    try:
        state, alphas, metadata = loader.lora_state_dict(
            str(file.parent), weight_name=file.name, local_files_only=True, return_lora_metadata=True,
            unet_config=unet.config,
        )  # fmt: skip
    except (ValueError, KeyError, RuntimeError, OSError) as error:
        raise ValueError(
            f"{file} is no LoRA that diffusers reads ({error}). Convert it to diffusers' names."
        ) from error
    if odd := next((name for name in state if not name.startswith("unet.")), None):
        raise ValueError(f"{file} holds more than a LoRA of a UNet ({odd}), which is all that is compared here.")
    if any(name.endswith(".dora_scale") for name in read_header(file)):
        raise ValueError(f"{file} is a DoRA: its dora_scale would be left out. Merge it into a UNet and compare that.")
    layers = _peft_names(state)
    # kohya's alphas go into the weights: diffusers looks some layers' up by a name that none has, and takes another
    scales = {name.split(".lora_A.")[0]: alpha for name, alpha in _peft_names(alphas or {}, ".alpha").items()}
    for name, up in layers.items():
        layer, _, matrix = name.partition(".lora_")
        if matrix.startswith("B.") and scales.get(layer, up.shape[1]) != up.shape[1]:
            layers[name] = (up.float() * (scales[layer] / up.shape[1])).to(up.dtype)
    if not layers:
        raise ValueError(f"{file} holds no LoRA of a UNet: no name in it begins with unet. or lora_unet_.")
    weights = {name: module.weight.shape for name, module in unet.named_modules() if hasattr(module, "weight")}
    for name, down in layers.items():
        if ".lora_A." not in name:
            continue
        layer, up = name.split(".lora_A.")[0], layers.get(name.replace(".lora_A.", ".lora_B."))
        if layer not in weights:
            raise ValueError(f"{file} belongs to another base model: this one has no layer {layer}.")
        if up is None or up.shape[1] != down.shape[0]:
            ranks = f"{down.shape[0]} and {'none' if up is None else up.shape[1]}"
            raise ValueError(f"{file} is damaged: the two matrices of {layer} have ranks {ranks}. Save it again.")
        if down.shape[1:] != weights[layer][1:] or up.shape[0] != weights[layer][0]:
            raise ValueError(
                f"{file} belongs to another base model: its {layer} takes {tuple(down.shape[1:])} and gives "
                f"{up.shape[0]} channels, here {tuple(weights[layer][1:])} and {weights[layer][0]}."
            )
    state = {f"unet.{name}": value for name, value in layers.items()}
    loader.load_lora_into_unet(state, None, unet, adapter_name="default", metadata=metadata)
    dtype = unet.dtype
    for name, parameter in unet.named_parameters():
        if ".lora_" in name:  # unet.to warns of modules to keep in float32, of which it has none
            parameter.data = parameter.data.to(dtype)
    unet.requires_grad_(False).eval()


def _peft_names(found: dict[str, Any], suffix: str = "") -> dict[str, Any]:
    """By PEFT's names of the layers' matrices; found: by names that begin with unet. and end with the suffix."""
    from diffusers.utils import convert_unet_state_dict_to_peft

    bare = {name.removeprefix("unet.").removesuffix(suffix): value for name, value in found.items()}
    return convert_unet_state_dict_to_peft(bare)


def _check(label: str, found: dict[str, Tensor], alpha: float | None, unet: Any, adapter: AdapterConfig) -> None:
    modules = {name for name, _ in unet.named_modules()}
    own = {name: p.shape for name, p in unet.named_parameters() if ".lora_" in name}
    layers = {name: name.split(".lora_")[0] for name in found}
    if odd := [name for name, layer in layers.items() if layer not in modules]:
        raise ValueError(f"{label} belongs to another base model: this one has no layer {layers[odd[0]]}.")
    if (ranks := {value.shape[0] for name, value in found.items() if ".lora_A." in name}) != {adapter.rank}:
        shown = ", ".join(map(str, sorted(ranks))) or "none"
        raise ValueError(f"{label} has rank {shown}, but --rank is {adapter.rank}: use the same.")
    for name in found.keys() & own.keys():
        if found[name].shape != own[name]:
            raise ValueError(
                f"{label} belongs to another base model: {name} has shape {tuple(found[name].shape)}, "
                f"here it is {tuple(own[name])}."
            )
    if found.keys() != own.keys():
        targets = sorted({_ending(layer) for layer in layers.values()})
        raise ValueError(
            f"{label} is on other layers than --lora_targets {' '.join(adapter.lora_targets)}: "
            f"use --lora_targets {' '.join(targets)}, or another file."
        )
    if (alpha or adapter.rank) != adapter.alpha:  # diffusers takes a missing alpha for the rank
        raise ValueError(
            f"{label} has alpha {alpha or adapter.rank:g}, but here it is {adapter.alpha:g}: "
            f"use --lora_alpha {alpha or adapter.rank:g}."
        )


def _ending(layer: str) -> str:
    """down_blocks.0.attn1.to_out.0 -> to_out.0, as --lora_targets has it."""
    parts = layer.split(".")
    return ".".join(parts[-2:] if parts[-1].isdigit() else parts[-1:])


def _metadata(file: Path) -> dict[str, Any]:
    """What diffusers writes of the adapter beside the tensors: unet.lora_alpha, ..."""
    from safetensors import safe_open

    with safe_open(file, framework="pt") as f:
        text = (f.metadata() or {}).get("lora_adapter_metadata", "{}")
    try:
        found = json.loads(text)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}
