"""LoRA files: what they are called, how one is found, and how a flow transformer's is written. lora.py reads them."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from spo_fast.data.files import as_new_files, read_header, save_tensors

if TYPE_CHECKING:
    from peft import LoraConfig
    from torch import Tensor

LORA_FILE = "pytorch_lora_weights.safetensors"
KOHYA_FILE, COMFYUI_FILE = "lora_kohya.safetensors", "lora_comfyui.safetensors"
"""Beside it for other programs: of UNets with kohya's names, of flow transformers with ComfyUI's."""
PEFT_FILE, PEFT_CONFIG = "adapter_model.safetensors", "adapter_config.json"


def choose_lora(names: Collection[str]) -> tuple[str | None, str]:
    """(diffusers' file or else the only .safetensors of a folder, or None; what is wrong then)."""
    files = sorted(name for name in names if name.endswith(".safetensors") and "/" not in name)
    if LORA_FILE in files or len(files) == 1:
        return (LORA_FILE if LORA_FILE in files else files[0]), ""
    shown = ", ".join(f"{name:.40}" for name in files[:3]) + (", ..." if len(files) > 3 else "")
    return None, f"{LORA_FILE} or one .safetensors" + (f" (it has {len(files)}: {shown})" if files else "")


def find_lora(path: str | Path, flag: str = "--lora_path") -> Path:
    """The file that the flag names. Raises FileNotFoundError, or ValueError for one that is damaged."""
    file = Path(path).expanduser()
    if file.is_dir():
        name, lacking = choose_lora([f.name for f in file.iterdir() if f.is_file()])
        if name is None:
            raise FileNotFoundError(f"{flag} {path}: there is no {lacking}. Name the file.")
        file = file / name
    if not file.is_file():
        raise FileNotFoundError(f"{flag} {path}: there is no {file}. Give a {LORA_FILE} or its directory.")
    read_header(file)
    return file


def written_settings(config: LoraConfig) -> dict[str, object]:
    """A LoraConfig for a file's metadata: what every loader asks for, and what differs from PEFT's defaults.

    Not all of it: a loader hands the fields to its own PEFT, and an older one raises on a field that it does not know.
    """
    plain, always = type(config)().to_dict(), {"r", "lora_alpha", "target_modules", "rank_pattern", "alpha_pattern"}
    return {key: value for key, value in config.to_dict().items() if key in always or value != plain[key]}


MAGNITUDE = ".lora_magnitude_vector"


def plain_alpha(settings: Mapping[str, object]) -> float:
    """What a program that divides alpha by the rank must be told: of an rsLoRA alpha sqrt(rank)."""
    config = {"use_rslora": False, **settings}
    alpha, rank = float(str(config["lora_alpha"])), int(str(config["r"]))
    return alpha * rank**0.5 if config["use_rslora"] else alpha


def peft_names(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Trained weights by the names of PEFT's own files, which leave out the adapter's."""
    ours = f"{MAGNITUDE}.default.weight"
    return {
        (n.removesuffix(ours) + MAGNITUDE if n.endswith(ours) else n.replace(".default.", ".")): value
        for n, value in weights.items()
    }


def _magnitudes(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A DoRA's, layer -> (D', 1) or (C', 1, 1, 1), as programs other than PEFT have them."""
    downs = {name: state[f"{name.removesuffix(MAGNITUDE)}.lora_A.weight"] for name in state if name.endswith(MAGNITUDE)}
    return {
        name.removesuffix(MAGNITUDE): state[name].reshape(-1, *[1] * (down.ndim - 1)) for name, down in downs.items()
    }


def save_unet_lora(
    kind: str,
    state: Mapping[str, Tensor],
    settings: Mapping[str, object],
    directory: Path,
    about: Mapping[str, str],
) -> list[Path]:
    """Write a UNet's LoRA for diffusers (LORA_FILE) and under kohya's names (KOHYA_FILE); returns the files.

    state: ...to_q.lora_A.weight, as PEFT names them without an adapter's name. settings: `written_settings`. about:
    kohya's metadata besides.
    """
    import torch

    # the pipelines inherit these; importing the pipelines would pull in image processors and their warnings
    from diffusers.loaders import StableDiffusionLoraLoaderMixin, StableDiffusionXLLoraLoaderMixin
    from diffusers.utils import convert_state_dict_to_diffusers, convert_state_dict_to_kohya

    writer = {"sd15": StableDiffusionLoraLoaderMixin, "sdxl": StableDiffusionXLLoraLoaderMixin}[kind]
    published = convert_state_dict_to_diffusers(state)  # ...lora.down.weight, which it knows for attention only
    # a file that mixes the two ways of naming is read in part, without a word
    layers = state if any(".lora_A." in name for name in published) else published
    # the metadata carries alpha: without it a loader takes alpha = rank and the images are wrong
    writer.save_lora_weights(
        save_directory=directory, unet_lora_layers=layers, unet_lora_adapter_metadata=dict(settings)
    )
    as_new_files([directory / LORA_FILE])
    layers = {name: value for name, value in state.items() if "lora_magnitude_vector" not in name}
    kohya = convert_state_dict_to_kohya({f"unet.{name}": value for name, value in layers.items()})
    kohya |= {f"lora_unet_{name.replace('.', '_')}.dora_scale": value for name, value in _magnitudes(state).items()}
    if kind == "sdxl":  # diffusers reads these two layers' LoRA by their names in the original network only
        for ours, theirs in (("add_embedding_linear", "label_emb_0"), ("time_embedding_linear", "time_embed")):
            for number, place in ((1, 0), (2, 2)):
                old, new = f"lora_unet_{ours}_{number}.", f"lora_unet_{theirs}_{place}."
                kohya = {name.replace(old, new): value for name, value in kohya.items()}
    alpha = plain_alpha(settings)
    for name in kohya:
        if name.endswith(".alpha"):  # diffusers writes the rank
            kohya[name] = torch.tensor(alpha)
    metadata = {
        **about,
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(settings["r"]),
        "ss_network_alpha": str(alpha),
    }
    save_tensors(kohya, directory / KOHYA_FILE, metadata)
    return [directory / LORA_FILE, directory / KOHYA_FILE]


def save_transformer_lora(
    kind: str,
    state: Mapping[str, Tensor],
    settings: Mapping[str, object],
    directory: Path,
    about: Mapping[str, str],
) -> list[Path]:
    """Write a flow transformer's LoRA for diffusers (LORA_FILE) and for ComfyUI (COMFYUI_FILE); returns the files.

    state: ...to_q.lora_A.weight, as PEFT names them without an adapter's name. settings: `written_settings`. diffusers
    reads alpha from the metadata, and its SD3 refuses a file with tensors of that name; ComfyUI reads those alone.
    """
    import torch
    from diffusers.loaders import FluxLoraLoaderMixin, SD3LoraLoaderMixin

    directory.mkdir(parents=True, exist_ok=True)
    state = {name: value.contiguous() for name, value in state.items()}
    writer = {"sd35": SD3LoraLoaderMixin, "flux": FluxLoraLoaderMixin}[kind]
    writer.save_lora_weights(
        save_directory=directory,
        transformer_lora_layers=state,
        transformer_lora_adapter_metadata=dict(settings),
    )
    as_new_files([directory / LORA_FILE])
    alpha = torch.tensor(plain_alpha(settings))
    tensors = {f"transformer.{name}": value for name, value in state.items() if not name.endswith(MAGNITUDE)}
    tensors |= {f"transformer.{name}.dora_scale": value for name, value in _magnitudes(state).items()}
    downs = [name for name in tensors if name.endswith(".lora_A.weight")]
    tensors |= {f"{name.removesuffix('.lora_A.weight')}.alpha": alpha.clone() for name in downs}
    save_tensors(tensors, directory / COMFYUI_FILE, {"format": "pt", **about})
    return [directory / LORA_FILE, directory / COMFYUI_FILE]
