"""Finds or downloads every file a run needs, and imports nothing heavy.

So that a missing file is reported within seconds, and all of them at once.
"""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from spo_fast.config.errors import Missing, MissingFilesError, Needed
from spo_fast.config.scorers import FLOWS, SCORER_SOURCES
from spo_fast.config.sections import ModelConfig
from spo_fast.data.files import WEIGHT_NAMES, read_header, read_json, shown, weight_files
from spo_fast.data.hub import offline_reason
from spo_fast.models.files import kinds, prediction
from spo_fast.models.files.layout import (
    WEIGHT_SUFFIXES,
    file_names,
    required,
    scheduler_config,
    select_files,
    transformer_config,
    unet_files,
    vae_config,
    vae_config_file,
)
from spo_fast.models.files.lora_files import LORA_FILE, find_lora
from spo_fast.models.files.single_file import (
    base_of_file,
    check_model_file,
    check_vae_file,
    unet_sizes,
    vae_sizes,
)
from spo_fast.models.files.sources import (
    DEFAULTS,
    GATED,
    NETWORK_NAMES,
    OPTIONAL,
    PARTS,
    T5S,
    TEXT_PARTS,
    ModelSource,
    Resolved,
    network_part,
    unknown,
)

# ---------------------------------------------------------------------------------------------- what is needed


@dataclass(frozen=True)
class _Need:
    what: str
    source: str
    flag: str
    # sub-folders in diffusers layout; "vae-alone", "clip-alone" and "latent-reward" are whole repositories
    parts: tuple[str, ...] = ()
    file: str = ""  # or one file
    kind: str = ""  # set for the model itself, whose layout is checked against it
    revision: str | None = None
    variant: str | None = None
    local_only: str = ""


def resolve_all(
    model: ModelSource, scorers: Mapping[str, str | None] | None = None, *, download: bool = True
) -> Resolved:
    """Find every file on this machine, or download it, importing nothing heavy.

    scorers maps a name of SCORER_SOURCES to a local path, a hub id, or None for the published one.
    download=False only looks. Raises MissingFilesError with all that cannot be had, ValueError for a file of the
    wrong kind.
    """
    found = {need.flag: _find(need, model, download) for need in _needs(model, scorers or {})}
    missing = [f for f in found.values() if isinstance(f, Missing)]
    if missing:
        raise MissingFilesError(missing)
    paths = {flag: path for flag, path in found.items() if isinstance(path, Path)}
    resolved = Resolved(
        source=model,
        model_path=paths["--pretrained_model_name_or_path"],
        vae_path=paths.get("--pretrained_vae_model_name_or_path"),
        scorer_paths={name: paths[f"--{name}_path"] for name in scorers or {}},
        base_path=paths.get("--base_model_name_or_path"),
    )
    check_kinds(resolved)
    return resolved


def check_kinds(resolved: Resolved) -> None:
    """Raise ValueError for networks of other kinds than are trained here, or that do not belong together."""
    if resolved.source.kind in FLOWS:
        return _check_flow(resolved)
    settings = {part: resolved.config_dir / part / "config.json" for part in ("unet", "text_encoder", "text_encoder_2")}
    unet = read_json(settings["unet"])
    texts = [read_json(settings[encoder]) for _, encoder in TEXT_PARTS[resolved.source.kind]]
    vae_file = vae_config_file(resolved)
    vae = read_json(vae_file)
    unet_file = settings["unet"]
    if resolved.single_file:
        unet_file, unet = resolved.model_path, unet | unet_sizes(resolved.model_path)
    if (vae_path := resolved.vae_path or resolved.model_path).is_file():
        vae_file, vae = vae_path, vae | vae_sizes(vae_path)
    kinds.check_unet(unet, unet_file)
    kinds.check_vae(vae, vae_file, resolved.source.kind, borrowed=resolved.vae_path is not None)
    for (_, encoder), text in zip(TEXT_PARTS[resolved.source.kind], texts, strict=True):
        kinds.check_text(text, settings[encoder])
    kinds.check_together(unet, vae, texts, unet_file, vae_file)
    scheduler = scheduler_config(resolved)
    if resolved.single_file and resolved.vae_path is None:
        prediction.check_scale(resolved.model_path, vae.get("scaling_factor"))
    kinds.check_prediction(scheduler, resolved.config_dir / "scheduler" / "scheduler_config.json")
    if not resolved.single_file:
        for file in (f for f in unet_files(resolved) if f.suffix == ".safetensors"):
            prediction.contradicts(file, scheduler)
    return None


def _check_flow(resolved: Resolved) -> None:
    kind, folder = resolved.source.kind, resolved.config_dir
    file = resolved.model_path if resolved.single_file else folder / "transformer" / "config.json"
    transformer, vae = transformer_config(resolved), vae_config(resolved)
    vae_path = resolved.vae_path or folder
    vae_file = vae_path if vae_path.is_file() else vae_config_file(resolved)
    kinds.check_transformer(transformer, file, kind)
    kinds.check_flow_vae(vae, vae_file, kind)
    texts = {part: read_json(folder / part / "config.json") for _, part in resolved.text_parts}
    for part, text in texts.items():
        kinds.check_text(text, folder / part / "config.json", (kind, part) in T5S)
    kinds.check_flow_together(kind, transformer, vae, texts, file, vae_file)
    kinds.check_flow_scheduler(scheduler_config(resolved), folder / "scheduler" / "scheduler_config.json")


def check_asked(resolved: Resolved, cfg: ModelConfig, guidance_scale: float | None = None) -> None:
    """Raise ValueError for a picture's size or a guidance that a flow model does not take."""
    if resolved.source.kind not in FLOWS:
        return
    transformer = transformer_config(resolved)
    kinds.check_flow_size(transformer, vae_config(resolved), cfg.height, cfg.width)
    asked = {"embedded_guidance": cfg.embedded_guidance, "guidance_scale": guidance_scale}
    kinds.check_guidance(transformer, asked, resolved.source.pretrained_model_name_or_path)


@dataclass(frozen=True)
class Present(Needed):
    """One thing a run needs and has."""

    path: Path
    num_bytes: int  # of the files that would be read


def look(model: ModelSource, scorers: Mapping[str, str | None] | None = None) -> list[Present | Missing]:
    """What a run needs and what of it is here, without asking the network."""
    return [_sized(need, _find(need, model, download=False)) for need in _needs(model, scorers or {})]


def _sized(need: _Need, found: Path | Missing) -> Present | Missing:
    if isinstance(found, Missing):
        return found
    names = [] if found.is_file() else select_files(file_names(found), need.parts, need.variant)[0]
    size = sum(file.stat().st_size for file in [found / name for name in names] or [found])
    return Present(need.what, need.source, need.file, need.flag, found, size)


def _needs(model: ModelSource, scorers: Mapping[str, str | None]) -> list[_Need]:
    own_vae = model.pretrained_vae_model_name_or_path is None
    part = network_part(model.kind)
    parts = tuple(p for p in PARTS[model.kind] if own_vae or p != "vae")
    whole = _Need(
        what=f"{model.kind}: {NETWORK_NAMES[part]}, text encoders" + (", VAE" if own_vae else ""),
        source=model.pretrained_model_name_or_path,
        flag="--pretrained_model_name_or_path",
        parts=parts,
        kind=model.kind,
        revision=model.revision,
        variant=model.variant,
    )
    found = [whole]
    if model.kind in FLOWS and (single := Path(os.path.expanduser(whole.source))).is_file():
        found = [
            replace(whole, what=f"{model.kind}: {NETWORK_NAMES[part]}", parts=(part,), revision=None),
            replace(
                whole,
                what=f"{model.kind}: text encoders" + (", VAE" if own_vae else ""),
                source=model.base_model_name_or_path or _base_of(single, model.kind),
                flag="--base_model_name_or_path",
                parts=tuple(p for p in parts if p != part),
            ),
        ]
    elif model.base_model_name_or_path is not None:
        raise ValueError(
            "--base_model_name_or_path is for a transformer in one file (--model sd35 or flux): "
            f"{shown(whole.source, 90)} is none. Leave it out."
        )
    if model.pretrained_vae_model_name_or_path is not None:
        vae = model.pretrained_vae_model_name_or_path
        found.append(_Need("VAE", vae, "--pretrained_vae_model_name_or_path", parts=("vae-alone",)))
    for name, path in scorers.items():
        if name not in SCORER_SOURCES:
            raise ValueError(unknown("scorer", name, SCORER_SOURCES))
        s = SCORER_SOURCES[name]
        file = s.files[model.kind] if s.files else ""
        need = _Need(s.what, path or s.repository, f"--{name}_path", () if file else (s.part,), file)
        found.append(replace(need, local_only=s.local_only))
    return found


def _base_of(file: Path, kind: str) -> str:
    _check_file(file, _Need("", str(file), "", parts=(network_part(kind),), kind=kind), kind)
    return base_of_file(file, kind)


def find_contender(source: str, kind: str, flag: str) -> tuple[str, Path] | Missing:
    """("lora", file) or ("unet", directory) of a run, a LoRA, a UNet or a hub id of either, downloaded if need be.

    A LoRA's file is diffusers' or else the only .safetensors of its folder or repository.
    """
    local = Path(os.path.expanduser(source))
    for folder in (local, local / "unet"):
        if (folder / "config.json").is_file() and not (local / LORA_FILE).is_file():
            return ("unet", folder)
    if kind in FLOWS and (local / "transformer").is_dir():
        raise ValueError(f"{flag} {shown(source)} is a whole transformer: of flow models LoRAs are compared. Give one.")
    if local.exists():
        return ("lora", find_lora(local, flag))
    model = dataclasses.replace(DEFAULTS[kind], cache_dir=None)
    lora = _find(_Need("LoRA", source, flag, parts=("lora",)), model, download=True)
    if isinstance(lora, Path):
        return ("lora", find_lora(lora, flag))
    if kind in FLOWS:
        return lora
    unet = _find(_Need("LoRA or UNet", source, flag, parts=("unet", "scheduler-if-any")), model, download=True)
    if isinstance(unet, Path):
        return ("unet", unet / "unet")
    return unet if lora.why == unet.why else replace(unet, why=f"{lora.why}; {unet.why}")


def _find(need: _Need, model: ModelSource, download: bool) -> Path | Missing:
    local = Path(os.path.expanduser(need.source))  # Path's own raises for a user that is none
    if local.is_file():
        _check_file(local, need, model.kind)
        return local
    if local.is_dir():
        return _find_in_directory(local, need, why="the directory lacks ")
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", need.source) or local.suffix in WEIGHT_SUFFIXES:
        return _lacks(need, "no such file or directory")
    if need.local_only:
        return _lacks(need, need.local_only)
    cached = _find_in_cache(need, model.cache_dir)
    if isinstance(cached, Missing) and need.source in GATED:
        cached = replace(cached, why=f"{cached.why}; {_gated(need.source)}")
    if isinstance(cached, Path) or not download:
        return cached
    if why := offline_reason():
        return _lacks(need, f"{cached.why}; {why}")
    return _download(need, model.cache_dir)


def _check_file(file: Path, need: _Need, kind: str) -> None:
    if need.file or need.parts in (("clip-alone",), ("latent-reward",)):
        if file.suffix == ".safetensors":
            read_header(file)
        return  # the scorers read their own formats
    if file.suffix != ".safetensors":
        raise ValueError(f"{file}: only .safetensors is read as a single file (a .ckpt is a pickle); convert it first.")
    if need.parts == ("vae-alone",):
        check_vae_file(file, kind)
    else:
        check_model_file(file, need.kind, with_vae="vae" in need.parts)


def _find_in_directory(directory: Path, need: _Need, why: str) -> Path | Missing:
    if need.file:
        # the published name, or those of a model trained here (preference_model/)
        for file in (directory / name for name in (need.file, f"{need.file}.index.json", *WEIGHT_NAMES)):
            if file.is_file():
                for shard in weight_files(file):
                    _check_file(shard, need, need.kind)
                return file
        return _lacks(need, f"{why}{need.file} or model.safetensors")
    if need.kind and {"unet", "transformer"} & {*need.parts}:
        _check_directory_kind(directory, need.kind)  # before what is missing: another kind has other parts
    chosen, lacking = select_files(file_names(directory), need.parts, need.variant)
    lacking += _promised(directory, need.parts)
    if lacking:
        return _lacks(need, why + ", ".join(lacking) + _instead(file_names(directory), lacking, need))
    for name in chosen:  # one that was cut short is named now, not after minutes of loading the others
        if name.endswith(".safetensors"):
            read_header(directory / name)
    return directory


def _promised(directory: Path, parts: Collection[str]) -> list[str]:
    """Parts that a directory may lack, but not this one: its model_index.json names them."""
    index = directory / "model_index.json"
    listed = read_json(index) if index.is_file() else {}
    missing = [p for p in OPTIONAL if p in parts and not (directory / p).is_dir()]
    return [f"{part}/" for part in missing if listed.get(part, [None, None]) != [None, None]]


def _instead(names: Collection[str], lacking: Collection[str], need: _Need) -> str:
    """Which weights there are in the place of those that are lacking: half a repository's are fp16 alone."""
    found = {}
    for name in lacking:
        folder, _, file = name.rpartition("/")
        pattern = rf"(pytorch_)?{re.escape(file.split('.')[0])}(\.(\w+))?(-\d+-of-\d+)?(\.(\w+))?\.(safetensors|bin)"
        for there in sorted(n for n in names if n.rpartition("/")[0] == folder):
            if m := re.fullmatch(pattern, there.rpartition("/")[2]):
                found[m[3] or m[6]] = there
    found.pop(need.variant if required(need.variant) else None, None)  # shards, not all of them
    if not found:
        return ""
    variant, there = next(iter(found.items()))
    if not need.kind:
        return f"; it has {there}: give that file itself"
    return f"; it has {there}: {f'use --variant {variant}' if variant else 'leave --variant out'}"


def _lacks(need: _Need, why: str) -> Missing:
    folders = " ".join(f"{part}/" for part in need.parts if part in PARTS.get(need.kind, ()))
    return Missing(need.what, need.source, need.file or folders, need.flag, why)


# ---------------------------------------------------------------------------------------------- files of a layout


def _check_directory_kind(directory: Path, kind: str) -> None:
    files = {part: directory / part / "config.json" for part in NETWORK_NAMES}
    if not (part := next((part for part, file in files.items() if file.is_file()), "")):
        return
    config = read_json(files[part])
    if part == "unet":
        found = "sdxl" if config.get("addition_embed_type") == "text_time" else "sd15"
    elif not (found := {name: k for k, name in kinds.TRANSFORMERS.items()}.get(config.get("_class_name", ""), "")):
        known = ", ".join(kinds.TRANSFORMERS.values())
        raise ValueError(f"{shown(directory)} holds a {config.get('_class_name')!s:.60}; trained here are {known}.")
    if found != kind:
        network = NETWORK_NAMES[part]
        raise ValueError(f"{directory} holds a {network} of kind {found}, but kind {kind} was asked for: use {found}.")


# ---------------------------------------------------------------------------------------------- the hub


def _find_in_cache(need: _Need, cache_dir: str | None) -> Path | Missing:
    from huggingface_hub import constants, try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    # one file tells the snapshot's folder; snapshot_download(local_files_only=True) would not, for it refuses a
    # snapshot without the duplicates that were never wanted
    folders = ("unet/", "transformer/", "vae/", "text_encoder/", "")
    names = [need.file] if need.file else [f"{folder}config.json" for folder in folders]
    if need.parts == ("lora",):
        cache = Path(cache_dir or constants.HF_HUB_CACHE) / f"models--{need.source.replace('/', '--')}" / "snapshots"
        names = [LORA_FILE, *sorted({file.name for file in cache.glob("*/*.safetensors")})]
    for name in names:
        try:
            file = try_to_load_from_cache(need.source, name, cache_dir=cache_dir, revision=need.revision)
        except HFValidationError:
            return _lacks(need, "no such path, and no hub id")
        if isinstance(file, str):
            snapshot = Path(file).parents[name.count("/")]
            return _find_in_directory(snapshot, need, why="the hub cache lacks ")
    return _lacks(need, "no such path, and not in the hub cache")


def _gated(source: str) -> str:
    return f"gated: accept its terms at https://huggingface.co/{source}, then `hf auth login` or set HF_TOKEN"


def _download(need: _Need, cache_dir: str | None) -> Path | Missing:
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError

    try:
        names = HfApi().list_repo_files(need.source, revision=need.revision)
        chosen, lacking = ([need.file], []) if need.file else select_files(names, need.parts, need.variant)
        lacking += [n for n in chosen if n not in names]
        if lacking:
            return _lacks(need, "the repository lacks " + ", ".join(lacking) + _instead(names, lacking, need))
        snapshot = snapshot_download(need.source, revision=need.revision, cache_dir=cache_dir, allow_patterns=chosen)
    except GatedRepoError:
        return _lacks(need, _gated(need.source))
    except RepositoryNotFoundError:
        return _lacks(need, "no such repository on the hub (or private: `hf auth login`)")
    except RevisionNotFoundError:
        return _lacks(need, f"the repository has no revision {need.revision}")
    except HfHubHTTPError as error:
        return _lacks(need, f"the hub refused: {str(error).splitlines()[0]}")
    except Exception as error:  # full disks, cut connections: each hub client raises another HTTP library's errors
        return _lacks(need, f"the download failed: {error}")
    return _find_in_directory(Path(snapshot), need, why="the hub cache lacks ")
