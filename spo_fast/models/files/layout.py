"""Which of a model's files are which: the parts of a directory, their weights and settings."""

from __future__ import annotations

import re
from collections.abc import Collection
from pathlib import Path
from typing import Any

from spo_fast.data.files import read_json
from spo_fast.models.files import prediction
from spo_fast.models.files.lora_files import LORA_FILE, PEFT_CONFIG, choose_lora
from spo_fast.models.files.single_file import transformer_sizes, vae_settings_of_file, vae_sizes
from spo_fast.models.files.sources import OPTIONAL, Resolved, network_part, published_settings, settings_directory

# ---------------------------------------------------------------------------------------------- what is needed


def file_names(directory: Path) -> set[str]:
    """Names of the files in a directory and one level down (in checkpoint/ two), relative to it, by forward slashes."""
    files = [*directory.glob("*"), *directory.glob("*/*"), *directory.glob("checkpoint/*/*")]
    return {f.relative_to(directory).as_posix() for f in files if f.is_file()}


# ---------------------------------------------------------------------------------------------- files of a layout


WEIGHT_SUFFIXES = (".safetensors", ".bin", ".ckpt", ".pt", ".pth")


def select_files(names: Collection[str], parts: Collection[str], variant: str | None) -> tuple[list[str], list[str]]:
    """(files to use, what is lacking) for these parts, out of a repository's file names.

    Of duplicates one is taken: safetensors before .bin, and the plain weights unless `variant` (e.g. fp16) is
    named. A lacking variant is reported, never replaced by another, unless it ends in "?".
    """
    whole = {"unet", "transformer"} & {*parts} or {"vae", "scheduler"} <= {*parts}  # or all but its single file
    chosen = ["model_index.json"] if "model_index.json" in names and whole else []
    lacking: list[str] = []
    for part in parts:
        if part in OPTIONAL and not any(name.startswith(f"{part}/") for name in names):
            continue
        c, m = _select_part(names, part, variant)
        chosen, lacking = chosen + c, lacking + m
    return chosen, lacking


def _select_part(names: Collection[str], part: str, variant: str | None) -> tuple[list[str], list[str]]:
    if part == "scheduler":
        return _present_or_lacking(["scheduler/scheduler_config.json"], names)
    if part == "scheduler-if-any":
        return [n for n in names if n == "scheduler/scheduler_config.json"], []
    if part == "lora":  # a file beside a UNet is a whole model, if it is not called a LoRA
        whole = LORA_FILE not in names and "unet/config.json" in names
        file, lack = (None, LORA_FILE) if whole else choose_lora(names)
        return ([], [lack]) if file is None else ([file, *({PEFT_CONFIG} & {*names})], [])
    if part.startswith("tokenizer"):
        if f"{part}/tokenizer.json" not in names:
            t5 = part == "tokenizer_3" or f"{part}/spiece.model" in names
            files = [f"{part}/tokenizer.json"] if t5 else [f"{part}/vocab.json", f"{part}/merges.txt"]
            _, lacking = _present_or_lacking(files, names)
            if lacking:
                return [], lacking
        return sorted(n for n in names if re.fullmatch(rf"{part}/[^/]+\.(json|txt)", n)), []
    if part == "latent-reward" and "state_dict.pt" in names:  # as published: a folder a network
        weights = [n for n in names if re.fullmatch(r"(unet|text_encoder(_2)?)/[^/]+\.(json|safetensors|bin)", n)]
        return ["state_dict.pt", *sorted(weights)], []
    if part == "flow-reward":  # as published, or with what is published in checkpoint/
        inside = "checkpoint/" if any(n.startswith("checkpoint/") for n in names) else ""
        wanted = ["config.json", f"{inside}backbone_lora/adapter_model.safetensors", f"{inside}rm_head.pt"]
        return _present_or_lacking(wanted, names)
    if part == "vae-alone":  # either a VAE's own repository, or a pipeline whose VAE is borrowed
        part = "" if "config.json" in names or "vae/config.json" not in names else "vae"
    folder = "" if part in ("", "clip-alone", "latent-reward") else f"{part}/"
    stem = "model" if part.startswith(("text_encoder", "clip-alone", "latent-reward")) else "diffusion_pytorch_model"
    chosen, lacking = _present_or_lacking([folder + "config.json"], names)
    weights = weight_names(names, folder, stem, variant)
    if not weights:
        lacking.append(f"{folder}{stem}{f'.{variant}' if required(variant) else ''}.safetensors")
    return chosen + weights, lacking


def _present_or_lacking(wanted: list[str], names: Collection[str]) -> tuple[list[str], list[str]]:
    return [n for n in wanted if n in names], [n for n in wanted if n not in names]


def required(variant: str | None) -> bool:
    """Whether weights of no other variant will do."""
    return variant is not None and not variant.endswith("?")


def weight_names(names: Collection[str], folder: str, stem: str, variant: str | None) -> list[str]:
    """One complete set of weights, whole or in shards, or nothing. A variant that ends in "?" may be lacking."""
    if variant is not None and not required(variant):
        return weight_names(names, folder, stem, variant[:-1]) or weight_names(names, folder, stem, None)
    v = f".{variant}" if variant else ""
    for s, suffix in ((stem, "safetensors"), ({"model": "pytorch_model"}.get(stem, stem), "bin")):
        if (whole := f"{folder}{s}{v}.{suffix}") in names:
            return [whole]
        pattern = rf"{re.escape(folder + s)}({re.escape(v)})?-\d+-of-(\d+)({re.escape(v)})?\.{suffix}"
        shards = sorted(n for n in names if (m := re.fullmatch(pattern, n)) and (not v or m[1] or m[3]))
        index = f"{folder}{s}.{suffix}.index{v}.json"
        if shards and index in names and len(shards) == int(re.findall(r"-of-(\d+)", shards[0])[0]):
            return [index, *shards]
    return []


# ---------------------------------------------------------------------------------------------- loading


def vae_folder(resolved: Resolved) -> Path:
    """Of a VAE that is no single file: its own repository, or the vae/ of a pipeline."""
    path = resolved.vae_path or resolved.base_path or resolved.model_path
    return path if resolved.vae_path is not None and (path / "config.json").is_file() else path / "vae"


def vae_config_file(resolved: Resolved) -> Path:
    """The VAE's settings; of a single file those beside it, if it came out of a diffusers directory, or its model's."""
    path = resolved.vae_path or resolved.base_path or resolved.model_path
    if not path.is_file():
        return vae_folder(resolved) / "config.json"
    return vae_settings_of_file(path, settings_directory(resolved.source))


def text_files(resolved: Resolved) -> list[Path]:
    """The files that decide what a prompt is encoded to: to fingerprint a cache of embeddings with."""
    parts = [part for pair in resolved.text_parts for part in pair]
    if resolved.single_file and resolved.base_path is None:
        settings = [f for part in parts for f in (resolved.config_dir / part).glob("*.json")]
        return [resolved.model_path, *sorted(settings)]
    folder = resolved.config_dir
    chosen, _ = select_files(file_names(folder), parts, resolved.source.variant)
    return [folder / name for name in chosen]


def unet_files(resolved: Resolved) -> list[Path]:
    """The files that hold the UNet, or a flow model's transformer."""
    if resolved.single_file:
        return [resolved.model_path]
    part = network_part(resolved.source.kind)
    chosen, _ = select_files(file_names(resolved.model_path), (part,), resolved.source.variant)
    return [resolved.model_path / name for name in chosen if name.startswith(f"{part}/")]


def vae_files(resolved: Resolved) -> list[Path]:
    """The files that decide what an image is encoded to."""
    path = resolved.vae_path or resolved.base_path or resolved.model_path
    if path.is_file():
        return [path]
    return sorted(file for file in vae_folder(resolved).iterdir() if file.suffix in (".json", ".safetensors", ".bin"))


def transformer_config(resolved: Resolved) -> dict[str, Any]:
    """A flow transformer's settings: its directory's, or what its single file shows over the published ones."""
    if not resolved.single_file:
        return read_json(resolved.model_path / "transformer" / "config.json")
    published = read_json(published_settings(resolved.source) / "transformer" / "config.json")
    return published | transformer_sizes(resolved.model_path, resolved.source.kind)


def vae_config(resolved: Resolved) -> dict[str, Any]:
    """The VAE's settings, with the channels that a single file shows."""
    path = resolved.vae_path or resolved.base_path or resolved.model_path
    return read_json(vae_config_file(resolved)) | (vae_sizes(path) if path.is_file() else {})


def scheduler_config(resolved: Resolved) -> dict[str, Any]:
    """The scheduler's settings as its JSON, and a single file itself, have them; nothing heavy is imported."""
    settings = read_json(resolved.config_dir / "scheduler" / "scheduler_config.json")
    if not resolved.single_file or resolved.base_path is not None:
        return settings
    return prediction.scheduler_settings(resolved.model_path, settings, resolved.source.config is not None)
