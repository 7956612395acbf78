"""A UNet of another model beside the base: what of the two differs, found from their files before anything is drawn."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import NamedTuple

from spo_fast.data.files import read_json
from spo_fast.models.files import prediction
from spo_fast.models.files.layout import scheduler_config, vae_config_file, vae_files
from spo_fast.models.files.load import load_unet_from
from spo_fast.models.files.single_file import vae_class
from spo_fast.models.files.sources import PARTS, Resolved, forces_zeros
from spo_fast.models.tensor_cache import fingerprint_files

# of a UNet's config: what it is told and what it gives. Its own depth and widths are its own affair
INTERFACE = (
    *("in_channels", "out_channels", "cross_attention_dim", "encoder_hid_dim", "encoder_hid_dim_type"),
    *("addition_embed_type", "addition_time_embed_dim", "projection_class_embeddings_input_dim", "time_cond_proj_dim"),
    *("class_embed_type", "num_class_embeds", "center_input_sample"),
)
WEIGHTS = (".safetensors", ".bin")
TEXT_SETTINGS = (  # of a CLIP's, what no tensor's shape shows
    *("num_attention_heads", "hidden_act", "layer_norm_eps", "num_hidden_layers", "eos_token_id", "projection_dim"),
)


class Differences(NamedTuple):
    """Between a UNet, with the pipeline around it, and the base."""

    not_used: list[str]
    """Parts of its pipeline that are others than the base's, or not there to compare: the base's are used."""
    settings: list[str]
    """Of its network, such as block_out_channels: it is another one, and draws."""

    def __str__(self) -> str:
        used = f"only its UNet is used; the base's stand for its own {', '.join(self.not_used)}, which differ"
        other = f"its UNet has other settings than the base's: {', '.join(self.settings)}"
        return "; ".join([*([used] if self.not_used else []), *([other] if self.settings else [])])


def check_unet(folder: Path, resolved: Resolved) -> Differences:
    """What differs between the UNet in this folder and the base.

    Raises ValueError for a network that cannot stand in the base UNet's place, or was trained on other noise.
    """
    mine, base = read_json(folder / "config.json"), read_json(resolved.config_dir / "unet" / "config.json")
    shown = str(folder) if len(str(folder)) <= 120 else f"...{str(folder)[-117:]}"
    if mine.get("_class_name", "UNet2DConditionModel") != "UNet2DConditionModel":
        raise ValueError(
            f"{shown} holds a {mine['_class_name']!s:.60}, not a UNet2DConditionModel, which is compared here."
        )
    for name in INTERFACE:
        ours, theirs = (_setting(config, name) for config in (base, mine))
        if ours != theirs:
            raise ValueError(
                f"{shown} belongs to another base model: its {name} is {theirs!s:.40}, here it is {ours!s:.40}."
            )
    pipeline = folder.parent
    index = pipeline / "model_index.json"
    named = read_json(index) if folder.name == "unet" and index.is_file() else {}
    parts = [part for part in PARTS[resolved.source.kind] if part != "unet"]
    there = [part for part in parts if _files(pipeline / part)] if folder.name == "unet" else []
    if "scheduler" in there:
        _check_noise(shown, _scheduler(pipeline), scheduler_config(resolved))
    load_unet_from(folder, None)  # names and shapes
    for file in folder.glob("*.safetensors"):
        prediction.contradicts(file, scheduler_config(resolved))
    differ = [part for part in parts if (not _same(part, pipeline, resolved) if part in there else _has(named, part))]
    if resolved.source.kind == "sdxl" and named and forces_zeros(pipeline) != forces_zeros(resolved.config_dir):
        differ.append("force_zeros_for_empty_prompt")
    return Differences(
        differ,
        [n for n in sorted(mine.keys() & base.keys()) if n[0] != "_" and n != "sample_size" and mine[n] != base[n]],
    )


def _setting(config: dict[str, object], name: str) -> object:
    from diffusers import UNet2DConditionModel

    value = config.get(name, inspect.signature(UNet2DConditionModel.__init__).parameters[name].default)
    return value[0] if isinstance(value, list) and value and len(set(map(str, value))) == 1 else value


def _has(index: dict[str, object], part: str) -> bool:
    """model_index.json names a part's library and class, or [null, null]."""
    found = index.get(part)
    return isinstance(found, list) and None not in found


def _scheduler(pipeline: Path) -> dict[str, object]:
    return read_json(pipeline / "scheduler" / "scheduler_config.json")


def _check_noise(shown: str, mine: dict[str, object], base: dict[str, object]) -> None:
    """Pictures are drawn on the base's noise schedule: a UNet of another one draws garbage on it."""
    from diffusers import DDIMScheduler

    ours = DDIMScheduler.from_config(base)
    try:
        theirs = DDIMScheduler.from_config(mine)
    except (NotImplementedError, ValueError, TypeError) as error:
        raise ValueError(
            f"{shown}: its scheduler_config.json is not one that is drawn by here ({error!s:.60})."
        ) from None
    types = [scheduler.config.prediction_type for scheduler in (theirs, ours)]
    why = f"its prediction_type is {types[0]!s:.30}, the base's {types[1]!s:.30}" if types[0] != types[1] else ""
    if not why and not theirs.alphas_cumprod.allclose(ours.alphas_cumprod, rtol=1e-5, atol=0):
        why = "its noise schedule is another than the base's"
    if why:
        raise ValueError(f"{shown}: {why}, by which all are drawn. Give it as --pretrained_model_name_or_path instead.")


def _same(part: str, pipeline: Path, resolved: Resolved) -> bool:
    """A part of two pipelines: by its settings, and by the bytes of the files that both have."""
    if part == "scheduler":
        return _plain(_scheduler(pipeline)) == _plain(scheduler_config(resolved))
    settings = vae_config_file(resolved) if part == "vae" else resolved.config_dir / part / "config.json"
    if settings.is_file() and _computes(part, pipeline / part) != _computes(part, settings.parent):
        return False
    ours = vae_files(resolved) if part == "vae" else _files(resolved.model_path / part)
    prints = [{file.name: fingerprint_files([file]) for file in files} for files in (_files(pipeline / part), ours)]
    both = prints[0].keys() & prints[1].keys()
    weights = [name for name in both if name.endswith(WEIGHTS)]
    needed = weights if part == "vae" or part.startswith("text_encoder") else both
    return bool(needed) and all(prints[0][name] == prints[1][name] for name in needed)


def _computes(part: str, folder: Path) -> dict[str, object]:
    """What a network's config.json says of its numbers; what it leaves out is the class's default, as other versions
    write it."""
    if not (folder / "config.json").is_file():
        return {}
    if part != "vae":
        from transformers import CLIPTextConfig

        found = CLIPTextConfig.from_pretrained(folder).to_dict()
        return {name: found.get(name) for name in TEXT_SETTINGS}
    import diffusers

    config = read_json(folder / "config.json")
    arguments = inspect.signature(getattr(diffusers, vae_class(config, folder)).__init__).parameters.values()
    own = {p.name: p.default for p in arguments if p.name not in ("self", "sample_size")}
    return {name: list(v) if isinstance(v := config.get(name, own[name]), tuple) else v for name in own}


def _files(folder: Path) -> list[Path]:
    return [file for file in folder.iterdir() if file.is_file()] if folder.is_dir() else []


def _plain(config: dict[str, object]) -> dict[str, object]:
    """Without what says which version wrote it."""
    return {name: value for name, value in config.items() if name != "_diffusers_version"}
