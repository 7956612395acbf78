"""Where a model comes from: a hub id, a diffusers directory or one .safetensors file, for SD1.5 and SDXL.

Two halves. `resolve_all` finds (or downloads) every file a run needs and imports nothing heavy, so that a missing
file is reported within seconds, all of them at once. `load_unet`, `load_vae`, `load_text` then load one part each,
from the disk only: the text encoders can be loaded, used and dropped before the UNet takes its memory.
"""

from __future__ import annotations

import dataclasses
import functools
import http.client
import os
import re
import threading
import urllib.error
import urllib.request
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spo_fast.config import did_you_mean
from spo_fast.files import DAMAGED, WEIGHT_NAMES, read_header, read_json, shown, weight_files
from spo_fast.models import kinds, prediction
from spo_fast.models.clip_tokenizer import clip_tokenizer
from spo_fast.models.lora import LORA_FILE, PEFT_CONFIG, choose_lora, find_lora
from spo_fast.models.single_file import (
    TEXT_PREFIXES,
    check_model_file,
    check_vae_file,
    text_class,
    unet_sizes,
    vae_class,
    vae_settings_of_file,
    vae_sizes,
)

if TYPE_CHECKING:
    import torch
    from torch import nn

CONFIGS = Path(__file__).parent / "configs"
"""Architecture settings of SD1.5 and SDXL (for single files) and the CLIP merges: nothing here is fetched."""

PROBE_SECONDS = 3.0
"""How long the hub may take to answer before a process calls itself offline."""

KINDS = ("sd15", "sdxl")
PARTS = {  # the safety checker is left out: training has no use for it
    "sd15": ("unet", "vae", "text_encoder", "tokenizer", "scheduler"),
    "sdxl": ("unet", "vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "scheduler"),
}
TEXT_PARTS = {  # pairs that belong together
    "sd15": (("tokenizer", "text_encoder"),),
    "sdxl": (("tokenizer", "text_encoder"), ("tokenizer_2", "text_encoder_2")),
}


@dataclass(frozen=True, kw_only=True)
class ModelSource:
    """What the user asked for. Each path is a hub id, a local diffusers directory or a local .safetensors file."""

    kind: str
    """sd15 or sdxl: which parts there are and how they are wired."""
    pretrained_model_name_or_path: str
    pretrained_vae_model_name_or_path: str | None = None
    """Another VAE (an AutoencoderKL or an AutoencoderTiny); None takes the model's own."""
    revision: str | None = None
    """Branch, tag or commit of the model's hub repository. The VAE is taken from its main branch."""
    variant: str | None = None
    """Weights with this infix, e.g. fp16; of the model only. None takes the plain ones (float32 for both defaults)."""
    cache_dir: str | None = None
    """Hub cache; None is the hub client's own (HF_HOME)."""
    config: str | None = None
    """Single files carry no settings: a directory in diffusers layout that has them. None: the published ones."""

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(_unknown("model kind", self.kind, KINDS))


DEFAULTS = {
    "sd15": ModelSource(kind="sd15", pretrained_model_name_or_path="stable-diffusion-v1-5/stable-diffusion-v1-5"),
    "sdxl": ModelSource(
        kind="sdxl",
        pretrained_model_name_or_path="stabilityai/stable-diffusion-xl-base-1.0",
        pretrained_vae_model_name_or_path="madebyollin/sdxl-vae-fp16-fix",  # the original overflows in float16
    ),
}


@dataclass(frozen=True)
class ScorerSource:
    """A scorer's hub repository, and the one file of it (by model kind) or, when there is none, its whole CLIP."""

    what: str
    repository: str
    files: Mapping[str, str] | None = None
    part: str = "clip-alone"
    local_only: str = ""
    """Why it is not fetched from the hub, and what to do."""


SCORER_SOURCES = {
    "spm": ScorerSource(
        "step-aware preference model",
        "SPO-Diffusion-Models/Step-Aware_Preference_Models",
        {
            "sd15": "sd-v1-5_step-aware_preference_model.bin",
            "sdxl": "sdxl_step-aware_preference_model.bin",
        },
    ),
    "pickscore": ScorerSource("PickScore", "yuvalkirstain/PickScore_v1"),
    "lrm": ScorerSource(
        "latent reward model",
        "casiatao/LRM",
        part="latent-reward",
        local_only="not fetched: give a folder of that repository, or train one (train_spm --parameterisation latent)",
    ),
    "hpsv2": ScorerSource("HPSv2", "xswu/HPSv2", dict.fromkeys(KINDS, "HPS_v2_compressed.pt")),
    "hpsv21": ScorerSource("HPSv2.1", "xswu/HPSv2", dict.fromkeys(KINDS, "HPS_v2.1_compressed.pt")),
    "clip": ScorerSource("CLIP ViT-L/14", "openai/clip-vit-large-patch14"),
    "aesthetic": ScorerSource(
        "LAION's aesthetic predictor",
        "camenduru/improved-aesthetic-predictor",
        dict.fromkeys(KINDS, "sac+logos+ava1-l14-linearMSE.pth"),
    ),
    "image_reward": ScorerSource("ImageReward", "THUDM/ImageReward", dict.fromkeys(KINDS, "ImageReward.pt")),
    "geneval": ScorerSource("GenEval's detector", "facebook/mask2former-swin-small-coco-instance"),
    "bert": ScorerSource("BERT's vocabulary", "google-bert/bert-base-uncased", dict.fromkeys(KINDS, "vocab.txt")),
    "text_projection": ScorerSource("CLIP ViT-L/14 (its text projection)", "openai/clip-vit-large-patch14"),
}


# ---------------------------------------------------------------------------------------------- what is missing


@dataclass(frozen=True)
class Needed:
    """One thing a run needs."""

    what: str
    source: str  # the hub id or path that was asked for
    file: str  # its file, or "" when several are meant
    flag: str  # the flag that takes a local path instead


@dataclass(frozen=True)
class Missing(Needed):
    """One thing a run needs and cannot find."""

    why: str


class MissingFilesError(FileNotFoundError):
    """Everything a run needs and cannot find, in one message; `missing` has the rows."""

    def __init__(self, missing: list[Missing]) -> None:
        self.missing = missing
        super().__init__(missing_table(missing))


def missing_table(missing: list[Missing]) -> str:
    """The message of MissingFilesError: one line for each thing, with the flag that takes a local path."""
    rows = [("what", "from", "file", "flag for a local path", "why")]
    rows += [(m.what, m.source, m.file or "-", m.flag, m.why) for m in missing]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  " + "  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows]
    head = f"this run needs what is missing here ({len(missing)}):"
    return "\n".join([head, *lines, "Connect to the hub, or copy the files here and give their paths by the flags."])


# ---------------------------------------------------------------------------------------------- what is needed


@dataclass(frozen=True)
class Resolved:
    """Paths on this machine for everything `ModelSource` and the scorers named."""

    source: ModelSource
    model_path: Path  # a diffusers directory, or a single file
    vae_path: Path | None  # a directory, or a single file; None: the model's own
    scorer_paths: dict[str, Path] = field(default_factory=dict)

    @property
    def single_file(self) -> bool:
        return self.model_path.is_file()

    @property
    def config_dir(self) -> Path:
        """Directory with model_index.json, unet/config.json, ...: the model's own, or the published settings."""
        return _config_dir(self.source) if self.single_file else self.model_path


def _config_dir(source: ModelSource) -> Path:
    return Path(source.config).expanduser() if source.config else CONFIGS / source.kind


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
    needs = _needs(model, scorers or {})
    found = {need.flag: _find(need, model, download) for need in needs}
    missing = [f for f in found.values() if isinstance(f, Missing)]
    if missing:
        raise MissingFilesError(missing)
    paths = {flag: path for flag, path in found.items() if isinstance(path, Path)}
    resolved = Resolved(
        source=model,
        model_path=paths["--pretrained_model_name_or_path"],
        vae_path=paths.get("--pretrained_vae_model_name_or_path"),
        scorer_paths={name: paths[f"--{name}_path"] for name in scorers or {}},
    )
    check_kinds(resolved)
    return resolved


def check_kinds(resolved: Resolved) -> None:
    """Raise ValueError for networks of other kinds than are trained here, or that do not belong together."""
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
    names = [] if found.is_file() else select_files(_names(found), need.parts, need.variant)[0]
    size = sum(file.stat().st_size for file in [found / name for name in names] or [found])
    return Present(need.what, need.source, need.file, need.flag, found, size)


def _needs(model: ModelSource, scorers: Mapping[str, str | None]) -> list[_Need]:
    own_vae = model.pretrained_vae_model_name_or_path is None
    needs = [
        _Need(
            what=f"{model.kind}: UNet, text encoders" + (", VAE" if own_vae else ""),
            source=model.pretrained_model_name_or_path,
            flag="--pretrained_model_name_or_path",
            parts=tuple(p for p in PARTS[model.kind] if own_vae or p != "vae"),
            kind=model.kind,
            revision=model.revision,
            variant=model.variant,
        )
    ]
    if model.pretrained_vae_model_name_or_path is not None:
        vae = model.pretrained_vae_model_name_or_path
        needs.append(_Need("VAE", vae, "--pretrained_vae_model_name_or_path", parts=("vae-alone",)))
    for name, path in scorers.items():
        if name not in SCORER_SOURCES:
            raise ValueError(_unknown("scorer", name, SCORER_SOURCES))
        s = SCORER_SOURCES[name]
        file = s.files[model.kind] if s.files else ""
        need = _Need(s.what, path or s.repository, f"--{name}_path", () if file else (s.part,), file)
        needs.append(replace(need, local_only=s.local_only))
    return needs


def find_contender(source: str, kind: str, flag: str) -> tuple[str, Path] | Missing:
    """("lora", file) or ("unet", directory) of a run, a LoRA, a UNet or a hub id of either, downloaded if need be.

    A LoRA's file is diffusers' or else the only .safetensors of its folder or repository.
    """
    local = Path(os.path.expanduser(source))
    for folder in (local, local / "unet"):
        if (folder / "config.json").is_file() and not (local / LORA_FILE).is_file():
            return ("unet", folder)
    if local.exists():
        return ("lora", find_lora(local, flag))
    model = dataclasses.replace(DEFAULTS[kind], cache_dir=None)
    lora = _find(_Need("LoRA", source, flag, parts=("lora",)), model, download=True)
    if isinstance(lora, Path):
        return ("lora", find_lora(lora, flag))
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
    if need.kind and (directory / "unet" / "config.json").is_file():
        _check_directory_kind(directory, need.kind)  # before what is missing: another kind has other parts
    chosen, lacking = select_files(_names(directory), need.parts, need.variant)
    if lacking:
        return _lacks(need, why + ", ".join(lacking) + _instead(_names(directory), lacking, need))
    for name in chosen:  # one that was cut short is named now, not after minutes of loading the others
        if name.endswith(".safetensors"):
            read_header(directory / name)
    return directory


def _instead(names: Collection[str], lacking: Collection[str], need: _Need) -> str:
    """Which weights there are in the place of those that are lacking: half a repository's are fp16 alone."""
    found = {}
    for name in lacking:
        folder, _, file = name.rpartition("/")
        pattern = rf"(pytorch_)?{re.escape(file.split('.')[0])}(\.(\w+))?(-\d+-of-\d+)?(\.(\w+))?\.(safetensors|bin)"
        for there in sorted(n for n in names if n.rpartition("/")[0] == folder):
            if m := re.fullmatch(pattern, there.rpartition("/")[2]):
                found[m[3] or m[6]] = there
    found.pop(need.variant, None)  # shards, not all of them
    if not found:
        return ""
    variant, there = next(iter(found.items()))
    if not need.kind:
        return f"; it has {there}: give that file itself"
    return f"; it has {there}: {f'use --variant {variant}' if variant else 'leave --variant out'}"


def _lacks(need: _Need, why: str) -> Missing:
    return Missing(need.what, need.source, need.file, need.flag, why)


def _names(directory: Path) -> set[str]:
    """Names of the files in a directory and one level down, relative to it, with forward slashes."""
    files = [*directory.glob("*"), *directory.glob("*/*")]
    return {f.relative_to(directory).as_posix() for f in files if f.is_file()}


def _unknown(noun: str, name: str, known: Collection[str]) -> str:
    return f"unknown {noun} {name!r}; known: {', '.join(known)}.{did_you_mean(name, known)}"


# ---------------------------------------------------------------------------------------------- files of a layout


WEIGHT_SUFFIXES = (".safetensors", ".bin", ".ckpt", ".pt", ".pth")


def select_files(names: Collection[str], parts: Collection[str], variant: str | None) -> tuple[list[str], list[str]]:
    """(files to use, what is lacking) for these parts, out of a repository's file names.

    Of duplicates one is taken: safetensors before .bin, and the plain weights unless `variant` (e.g. fp16) is
    named. A lacking variant is reported, never replaced by another.
    """
    chosen = ["model_index.json"] if "model_index.json" in names and "unet" in parts else []
    lacking: list[str] = []
    for part in parts:
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
            _, lacking = _present_or_lacking([f"{part}/vocab.json", f"{part}/merges.txt"], names)
            if lacking:
                return [], lacking
        return sorted(n for n in names if re.fullmatch(rf"{part}/[^/]+\.(json|txt)", n)), []
    if part == "latent-reward" and "state_dict.pt" in names:  # as published: a folder a network
        weights = [n for n in names if re.fullmatch(r"(unet|text_encoder(_2)?)/[^/]+\.(json|safetensors|bin)", n)]
        return ["state_dict.pt", *sorted(weights)], []
    if part == "vae-alone":  # either a VAE's own repository, or a pipeline whose VAE is borrowed
        part = "" if "config.json" in names or "vae/config.json" not in names else "vae"
    folder = "" if part in ("", "clip-alone", "latent-reward") else f"{part}/"
    stem = "model" if part.startswith(("text_encoder", "clip-alone", "latent-reward")) else "diffusion_pytorch_model"
    chosen, lacking = _present_or_lacking([folder + "config.json"], names)
    weights = _weight_files(names, folder, stem, variant)
    if not weights:
        lacking.append(f"{folder}{stem}{f'.{variant}' if variant else ''}.safetensors")
    return chosen + weights, lacking


def _present_or_lacking(wanted: list[str], names: Collection[str]) -> tuple[list[str], list[str]]:
    return [n for n in wanted if n in names], [n for n in wanted if n not in names]


def _weight_files(names: Collection[str], folder: str, stem: str, variant: str | None) -> list[str]:
    """One complete set of weights, whole or in shards, or nothing."""
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


def _check_directory_kind(directory: Path, kind: str) -> None:
    config = read_json(directory / "unet" / "config.json")
    found = "sdxl" if config.get("addition_embed_type") == "text_time" else "sd15"
    if found != kind:
        raise ValueError(f"{directory} holds a UNet of kind {found}, but kind {kind} was asked for: use {found}.")


# ---------------------------------------------------------------------------------------------- the hub


@functools.cache
def offline_reason() -> str | None:
    """None when the hub answers, else why not. Asked once a process: one request, no retries, PROBE_SECONDS at most."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set"
    answered = threading.Event()
    # a thread, since the timeout of a request does not cover the look-up of its host's name
    probe = threading.Thread(target=_knock, args=(constants.ENDPOINT, answered), daemon=True)
    probe.start()
    probe.join(PROBE_SECONDS)
    return None if answered.is_set() else "the hub cannot be reached"


def _knock(url: str, answered: threading.Event) -> None:
    try:
        urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=PROBE_SECONDS).close()
    except urllib.error.HTTPError:
        pass  # any answer is an answer
    except (OSError, ValueError, http.client.HTTPException):
        return
    answered.set()


def _find_in_cache(need: _Need, cache_dir: str | None) -> Path | Missing:
    from huggingface_hub import constants, try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    # one file tells the snapshot's folder; snapshot_download(local_files_only=True) would not, for it refuses a
    # snapshot without the duplicates that were never wanted
    names = [need.file] if need.file else ["unet/config.json", "vae/config.json", "config.json"]
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
        return _lacks(need, "gated: accept its terms on the hub, then `hf auth login`")
    except RepositoryNotFoundError:
        return _lacks(need, "no such repository on the hub (or private: `hf auth login`)")
    except RevisionNotFoundError:
        return _lacks(need, f"the repository has no revision {need.revision}")
    except HfHubHTTPError as error:
        return _lacks(need, f"the hub refused: {str(error).splitlines()[0]}")
    except Exception as error:  # full disks, cut connections: each hub client raises another HTTP library's errors
        return _lacks(need, f"the download failed: {error}")
    return _find_in_directory(Path(snapshot), need, why="the hub cache lacks ")


# ---------------------------------------------------------------------------------------------- loading


def check_weights(resolved: Resolved) -> None:
    """Raise ValueError for a network whose names and shapes are not its files', or a tokenizer that is not its text
    encoder's. No weight is read."""
    for load in (load_unet, load_vae, load_text_encoders):
        load(resolved, None)
    load_tokenizers(resolved)


def load_unet(resolved: Resolved, dtype: torch.dtype | None) -> nn.Module:
    """The UNet2DConditionModel in dtype on the CPU, in eval mode, frozen (requires_grad False)."""
    from diffusers import UNet2DConditionModel

    from spo_fast.models.networks import unet_from_file

    if resolved.single_file:
        return _frozen(unet_from_file(resolved.model_path, resolved.config_dir, dtype))
    return _from_directory(UNet2DConditionModel, resolved.model_path / "unet", dtype, resolved.source.variant)


def load_unet_from(directory: Path, dtype: torch.dtype | None) -> nn.Module:
    """Another UNet2DConditionModel, such as what full fine-tuning left."""
    from diffusers import UNet2DConditionModel

    kinds.check_unet(read_json(directory / "config.json"), directory / "config.json")
    return _from_directory(UNet2DConditionModel, directory, dtype, None)


def load_vae(resolved: Resolved, dtype: torch.dtype | None) -> nn.Module:
    """The AutoencoderKL or AutoencoderTiny in dtype on the CPU, in eval mode, frozen."""
    import diffusers

    from spo_fast.models.networks import vae_from_file

    path = resolved.vae_path or resolved.model_path
    if path.is_file():
        return _frozen(vae_from_file(path, _config_dir(resolved.source), dtype))
    folder = _vae_folder(resolved)
    cls = getattr(diffusers, vae_class(read_json(folder / "config.json"), path))
    return _from_directory(cls, folder, dtype, None if resolved.vae_path else resolved.source.variant)


def _vae_folder(resolved: Resolved) -> Path:
    """Of a VAE that is no single file: its own repository, or the vae/ of a pipeline."""
    path = resolved.vae_path or resolved.model_path
    return path if resolved.vae_path is not None and (path / "config.json").is_file() else path / "vae"


def vae_config_file(resolved: Resolved) -> Path:
    """The VAE's settings; of a single file those beside it, if it came out of a diffusers directory, or its model's."""
    path = resolved.vae_path or resolved.model_path
    if not path.is_file():
        return _vae_folder(resolved) / "config.json"
    return vae_settings_of_file(path, _config_dir(resolved.source))


def load_text(resolved: Resolved, dtype: torch.dtype | None) -> tuple[list[Any], list[nn.Module]]:
    """(tokenizers, text encoders): one of each for SD1.5, two for SDXL; encoders in dtype, eval mode, frozen."""
    return load_tokenizers(resolved), load_text_encoders(resolved, dtype)


def load_tokenizers(resolved: Resolved) -> list[Any]:
    """One CLIPTokenizer for SD1.5, two for SDXL. A single file has none: they are built from the shipped merges."""
    found = []
    for name, encoder in TEXT_PARTS[resolved.source.kind]:
        folder, config = resolved.config_dir / name, read_json(resolved.config_dir / encoder / "config.json")
        try:
            tokenizer = _tokenizer(folder)
        except Exception as error:  # whatever the library makes of files that are no tokenizer's
            why = f"{type(error).__name__}: {' '.join(str(error).split())[:70]}"
            raise ValueError(f"{shown(folder)} holds no CLIP tokenizer ({why}). {DAMAGED}") from error
        kinds.check_tokenizer(tokenizer.model_max_length, len(tokenizer), config, folder)
        found.append(tokenizer)
    if len(lengths := {tokenizer.model_max_length for tokenizer in found}) > 1:
        raise ValueError(
            f"the tokenizers in {shown(resolved.config_dir)} have model_max_length {min(lengths)} and {max(lengths)}: "
            "their prompts are joined, so it must be one. Mend their tokenizer_config.json."
        )
    return found


def load_text_encoders(resolved: Resolved, dtype: torch.dtype | None) -> list[nn.Module]:
    """CLIPTextModel, and for SDXL CLIPTextModelWithProjection as well."""
    from spo_fast.models.networks import text_encoder_from_file

    kind, path = resolved.source.kind, resolved.model_path
    encoders = []
    for (_, part), prefix in zip(TEXT_PARTS[kind], TEXT_PREFIXES[kind], strict=True):
        if resolved.single_file:
            encoders.append(_frozen(text_encoder_from_file(path, prefix, resolved.config_dir / part, dtype)))
        else:
            encoders.append(_from_directory(text_class(path / part), path / part, dtype, resolved.source.variant))
    return encoders


def text_files(resolved: Resolved) -> list[Path]:
    """The files that decide what a prompt is encoded to: to fingerprint a cache of embeddings with."""
    parts = [part for pair in TEXT_PARTS[resolved.source.kind] for part in pair]
    if resolved.single_file:
        settings = [f for part in parts for f in (resolved.config_dir / part).glob("*.json")]
        return [resolved.model_path, *sorted(settings)]
    chosen, _ = select_files(_names(resolved.model_path), parts, resolved.source.variant)
    return [resolved.model_path / name for name in chosen]


def unet_files(resolved: Resolved) -> list[Path]:
    """The files that hold the UNet."""
    if resolved.single_file:
        return [resolved.model_path]
    chosen, _ = select_files(_names(resolved.model_path), ("unet",), resolved.source.variant)
    return [resolved.model_path / name for name in chosen if name.startswith("unet/")]


def vae_files(resolved: Resolved) -> list[Path]:
    """The files that decide what an image is encoded to."""
    path = resolved.vae_path or resolved.model_path
    if path.is_file():
        return [path]
    return sorted(file for file in _vae_folder(resolved).iterdir() if file.suffix in (".json", ".safetensors", ".bin"))


def forces_zeros(pipeline: Path) -> bool:
    """SDXL's unconditional embeddings are zeros, not those of the empty prompt, if its model_index.json says so."""
    index = pipeline / "model_index.json"
    return bool((read_json(index) if index.is_file() else {}).get("force_zeros_for_empty_prompt", True))


def scheduler_config(resolved: Resolved) -> dict[str, Any]:
    """The scheduler's settings as its JSON, and a single file itself, have them; nothing heavy is imported."""
    settings = read_json(resolved.config_dir / "scheduler" / "scheduler_config.json")
    if not resolved.single_file:
        return settings
    return prediction.scheduler_settings(resolved.model_path, settings, resolved.source.config is not None)


def _tokenizer(directory: Path) -> Any:
    from transformers import CLIPTokenizerFast  # type: ignore[attr-defined]  # an alias in transformers 5

    if any((directory / name).is_file() for name in ("tokenizer.json", "vocab.json")):
        return CLIPTokenizerFast.from_pretrained(str(directory), local_files_only=True)
    settings = read_json(directory / "tokenizer_config.json")
    return clip_tokenizer(pad_token=settings["pad_token"], max_length=settings["model_max_length"])


def _from_directory(cls: Any, folder: Path, dtype: torch.dtype | None, variant: str | None) -> nn.Module:
    from spo_fast.models.networks import load_part

    stem = "model" if cls.__module__.startswith("transformers") else "diffusion_pytorch_model"
    chosen = _weight_files({file.name for file in folder.iterdir()}, "", stem, variant)
    if not chosen:
        others = sorted(file.name for file in folder.glob(f"{stem}*") if file.suffix in WEIGHT_SUFFIXES)
        mend = f"It has {others[0]}: rename that, if it is what you want." if others else DAMAGED
        lacking = f"{stem}{f'.{variant}' if variant else ''}.safetensors"
        raise FileNotFoundError(f"{shown(folder)} has no {lacking}. {mend}")
    return _frozen(load_part(cls, folder / chosen[0], folder, dtype))


def _frozen(model: nn.Module) -> nn.Module:
    return model.requires_grad_(False).eval()
