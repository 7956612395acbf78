"""Where a model comes from: a hub id, a diffusers directory or one .safetensors file, for SD1.5 and SDXL.

Two halves. `resolve_all` finds (or downloads) every file a run needs and imports nothing heavy, so that a missing
file is reported within seconds, all of them at once. `load_unet`, `load_vae`, `load_text` then load one part each,
from the disk only: the text encoders can be loaded, used and dropped before the UNet takes its memory.
"""

from __future__ import annotations

import contextlib
import difflib
import functools
import gzip
import json
import re
import struct
import threading
import urllib.error
import urllib.request
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

CONFIGS = Path(__file__).parent / "configs"
"""Architecture settings of SD1.5 and SDXL (for single files) and the CLIP merges: nothing here is fetched."""

PROBE_SECONDS = 3.0
"""How long the hub may take to answer before a process calls itself offline."""

KINDS = ("sd15", "sdxl")
PARTS = {  # the safety checker is left out: training has no use for it
    "sd15": ("unet", "vae", "text_encoder", "tokenizer", "scheduler"),
    "sdxl": ("unet", "vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "scheduler"),
}
TEXT_PARTS = {"sd15": (("tokenizer", "text_encoder"),), "sdxl": (("tokenizer", "text_encoder"), ("tokenizer_2", "text_encoder_2"))}
VAE_CLASSES = ("AutoencoderKL", "AutoencoderTiny")


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
}


# ---------------------------------------------------------------------------------------------- what is missing


@dataclass(frozen=True)
class Missing:
    """One thing a run needs and cannot find."""

    what: str
    source: str  # the hub id or path that was asked for
    file: str  # its file, or "" when several are meant
    flag: str  # the flag that takes a local path instead
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
    count = "1 thing this run needs is missing:" if len(missing) == 1 else f"{len(missing)} things this run needs are missing:"
    return "\n".join([count, *lines, "Connect to the hub, or copy the files here and give their paths by the flags."])


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


@dataclass(frozen=True)
class _Need:
    what: str
    source: str
    flag: str
    parts: tuple[str, ...] = ()  # sub-folders in diffusers layout; "vae-alone" and "clip-alone" are whole repositories
    file: str = ""  # or one file
    kind: str = ""  # set for the model itself, whose layout is checked against it
    revision: str | None = None
    variant: str | None = None


def resolve_all(
    model: ModelSource, scorers: Mapping[str, str | None] | None = None, *, download: bool = True
) -> Resolved:
    """Find every file on this machine, or download it, before anything heavy is imported.

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
    return Resolved(
        source=model,
        model_path=paths["--pretrained_model_name_or_path"],
        vae_path=paths.get("--pretrained_vae_model_name_or_path"),
        scorer_paths={name: paths[f"--{name}_path"] for name in scorers or {}},
    )


def _needs(model: ModelSource, scorers: Mapping[str, str | None]) -> list[_Need]:
    own_vae = model.pretrained_vae_model_name_or_path is None
    needs = [
        _Need(
            what={"sd15": "SD1.5", "sdxl": "SDXL"}[model.kind] + " (UNet, text encoders" + (", VAE)" if own_vae else ")"),
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
        parts = () if file else ("clip-alone",)
        needs.append(_Need(s.what, path or s.repository, f"--{name}_path", parts=parts, file=file))
    return needs


def _find(need: _Need, model: ModelSource, download: bool) -> Path | Missing:
    local = Path(need.source).expanduser()
    if local.is_file():
        _check_single_file(local, need)
        return local
    if local.is_dir():
        return _find_in_directory(local, need, why="the directory lacks ")
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", need.source) or local.suffix in WEIGHT_SUFFIXES:
        return _lacks(need, "no such file or directory")
    cached = _find_in_cache(need, model.cache_dir)
    if isinstance(cached, Path) or not download:
        return cached
    if why := offline_reason():
        return _lacks(need, f"{cached.why}; {why}")
    return _download(need, model.cache_dir)


def _find_in_directory(directory: Path, need: _Need, why: str) -> Path | Missing:
    if need.file:
        file = directory / need.file
        return file if file.is_file() else _lacks(need, why + need.file)
    _, lacking = select_files(_names(directory), need.parts, need.variant)
    if lacking:
        return _lacks(need, why + ", ".join(lacking))
    if need.kind:
        _check_directory_kind(directory, need.kind)
    return directory


def _lacks(need: _Need, why: str) -> Missing:
    return Missing(need.what, need.source, need.file, need.flag, why)


def _names(directory: Path) -> set[str]:
    """Names of the files in a directory and one level down, relative to it, with forward slashes."""
    files = [*directory.glob("*"), *directory.glob("*/*")]
    return {f.relative_to(directory).as_posix() for f in files if f.is_file()}


def _unknown(noun: str, name: str, known: Collection[str]) -> str:
    near = difflib.get_close_matches(name, list(known), n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    return f"unknown {noun} {name!r}; known: {', '.join(known)}.{hint}"


# ---------------------------------------------------------------------------------------------- files of a layout

WEIGHT_SUFFIXES = (".safetensors", ".bin", ".ckpt", ".pt", ".pth")


def select_files(names: Collection[str], parts: Collection[str], variant: str | None) -> tuple[list[str], list[str]]:
    """(files to use, what is lacking) for these parts, out of a repository's file names.

    Of duplicates one is taken: safetensors before .bin, and the plain weights unless `variant` (e.g. fp16) is
    named. A lacking variant is reported, never replaced by another.
    """
    chosen: list[str] = [n for n in ("model_index.json",) if n in names and "unet" in parts]
    lacking: list[str] = []
    for part in parts:
        c, m = _select_part(names, part, variant)
        chosen, lacking = chosen + c, lacking + m
    return chosen, lacking


def _select_part(names: Collection[str], part: str, variant: str | None) -> tuple[list[str], list[str]]:
    if part == "vae-alone":  # either a VAE's own repository, or a pipeline whose VAE is borrowed
        part = "" if "config.json" in names or "vae/config.json" not in names else "vae"
    clip = part.startswith(("text_encoder", "clip-alone"))
    folder = "" if part in ("", "clip-alone") else f"{part}/"
    if part == "scheduler":
        config = "scheduler/scheduler_config.json"
        return ([config], []) if config in names else ([], [config])
    if part.startswith("tokenizer"):
        files = sorted(n for n in names if re.fullmatch(re.escape(folder) + r"[^/]+\.(json|txt)", n))
        whole = {folder + "tokenizer.json"} <= set(files) or {folder + "vocab.json", folder + "merges.txt"} <= set(files)
        return (files, []) if whole else (files, [folder + "vocab.json", folder + "merges.txt"])
    config = folder + "config.json"
    weights = _weight_files(names, folder, "model" if clip else "diffusion_pytorch_model", variant)
    infix = f".{variant}" if variant else ""
    wanted = folder + ("model" if clip else "diffusion_pytorch_model") + infix + ".safetensors"
    lacking = [n for n, there in ((config, config in names), (wanted, bool(weights))) if not there]
    return [n for n in (config,) if n in names] + weights, lacking


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
    config = json.loads((directory / "unet" / "config.json").read_text())
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
    threading.Thread(target=_knock, args=(constants.ENDPOINT, answered), daemon=True).start()
    return None if answered.wait(PROBE_SECONDS) else "the hub cannot be reached"


def _knock(url: str, answered: threading.Event) -> None:
    try:
        urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=PROBE_SECONDS).close()
    except urllib.error.HTTPError:
        pass  # any answer is an answer
    except (OSError, ValueError):
        return
    answered.set()


def _find_in_cache(need: _Need, cache_dir: str | None) -> Path | Missing:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        snapshot = snapshot_download(need.source, revision=need.revision, cache_dir=cache_dir, local_files_only=True)
    except (LocalEntryNotFoundError, HFValidationError):
        return _lacks(need, "not in the hub cache")
    return _find_in_directory(Path(snapshot), need, why="the hub cache lacks ")


def _download(need: _Need, cache_dir: str | None) -> Path | Missing:
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError

    try:
        names = HfApi().list_repo_files(need.source, revision=need.revision)
        chosen, lacking = ([need.file], []) if need.file else select_files(names, need.parts, need.variant)
        lacking += [n for n in chosen if n not in names]
        if lacking:
            return _lacks(need, "the repository lacks " + ", ".join(lacking))
        snapshot = snapshot_download(need.source, revision=need.revision, cache_dir=cache_dir, allow_patterns=chosen)
    except GatedRepoError:
        return _lacks(need, "gated: accept its terms on the hub, then `hf auth login`")
    except RepositoryNotFoundError:
        return _lacks(need, "no such repository on the hub (or private: `hf auth login`)")
    except RevisionNotFoundError:
        return _lacks(need, f"the repository has no revision {need.revision}")
    except HfHubHTTPError as error:
        return _lacks(need, f"the hub refused: {str(error).splitlines()[0]}")
    except OSError as error:  # cut connections, and full disks
        return _lacks(need, f"the download failed: {error}")
    return _find_in_directory(Path(snapshot), need, why="the hub cache lacks ")


# ---------------------------------------------------------------------------------------------- single files

UNET_PREFIX = "model.diffusion_model."
VAE_PREFIX = "first_stage_model."
TEXT_PREFIXES = {
    "sd15": ("cond_stage_model.transformer.",),
    "sdxl": ("conditioner.embedders.0.transformer.", "conditioner.embedders.1.model."),
}
VAE_LAYERS = ("encoder.", "decoder.", "quant_conv.", "post_quant_conv.")  # the rest is the VAE's training loss


def read_header(path: Path) -> dict[str, Any]:
    """Names, dtypes and shapes of a .safetensors file, read without loading it (or torch)."""
    with path.open("rb") as f:
        head = f.read(8)
        size = struct.unpack("<Q", head)[0] if len(head) == 8 else -1
        text = f.read(size) if 0 < size < 100_000_000 else b""
    try:
        header = json.loads(text)
    except ValueError:
        raise ValueError(f"{path} is no .safetensors file, or was cut short; download or convert it again.") from None
    header.pop("__metadata__", None)
    return header


def _check_single_file(path: Path, need: _Need) -> None:
    """Raise ValueError unless the file holds what it is needed for."""
    if need.file or "clip-alone" in need.parts:
        return  # the scorers read their own formats
    if path.suffix != ".safetensors":
        raise ValueError(f"{path}: only .safetensors is read as a single file (a .ckpt is a pickle); convert it first.")
    names = read_header(path)
    if need.parts == ("vae-alone",):
        if not any(n.removeprefix(VAE_PREFIX).startswith("decoder.") for n in names):
            raise ValueError(f"{path} holds no VAE: no tensor is named decoder.* or {VAE_PREFIX}decoder.*")
        return
    for kind in KINDS:  # a file for the other kind is the likeliest mistake: say so
        there = all(any(n.startswith(p) for n in names) for p in TEXT_PREFIXES[kind])
        if there and kind != need.kind:
            raise ValueError(f"{path} is a {kind} model, but kind {need.kind} was asked for: use {kind}.")
    prefixes = [UNET_PREFIX, *TEXT_PREFIXES[need.kind]] + ([VAE_PREFIX] if "vae" in need.parts else [])
    if absent := [p for p in prefixes if not any(n.startswith(p) for n in names)]:
        mend = " Give a VAE by --pretrained_vae_model_name_or_path." if absent == [VAE_PREFIX] else ""
        raise ValueError(f"{path} is no whole {need.kind} model: it has no tensors named {', '.join(absent)}*.{mend}")


def _config_dir(source: ModelSource) -> Path:
    return Path(source.config).expanduser() if source.config else CONFIGS / source.kind


def _read_tensors(path: Path, prefix: str = "") -> dict[str, Tensor]:
    """The tensors whose names start with prefix, without it; the rest of the file is not read."""
    from safetensors import safe_open

    with safe_open(path, framework="pt") as f:
        return {n.removeprefix(prefix): f.get_tensor(n) for n in f.keys() if n.startswith(prefix)}  # noqa: SIM118


def _check_size(path: Path, part: str, tensors: Mapping[str, Tensor], config: Mapping[str, Any], cls: Any) -> None:
    """diffusers' converters leave what they do not know uninitialised, silently: compare the sizes before."""
    import torch

    with torch.device("meta"):
        expected = sum(p.numel() for p in cls.from_config(config).state_dict().values())
    held = sum(t.numel() for t in tensors.values())
    if held != expected:
        raise ValueError(
            f"the {part} in {path} has {held:,} parameters where its settings give {expected:,}: another architecture "
            f"(inpainting, refiner, SD2?) or an incomplete file. Give matching settings by `config`."
        )


def _unet_from_file(path: Path, config_dir: Path, dtype: torch.dtype) -> nn.Module:
    from diffusers import UNet2DConditionModel

    tensors = _read_tensors(path, UNET_PREFIX)
    config = json.loads((config_dir / "unet" / "config.json").read_text())
    _check_size(path, "UNet", tensors, config, UNet2DConditionModel)
    return UNet2DConditionModel.from_single_file(  # its converter asks for the prefix
        {UNET_PREFIX + n: t for n, t in tensors.items()},
        config=str(config_dir),
        subfolder="unet",
        local_files_only=True,
        torch_dtype=dtype,
        low_cpu_mem_usage=_has_accelerate(),
    )


OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}  # diffusers before 0.17


def _vae_from_file(path: Path, config_dir: Path, dtype: torch.dtype) -> nn.Module:
    import diffusers

    names = read_header(path)
    prefix = VAE_PREFIX if any(n.startswith(VAE_PREFIX) for n in names) else ""
    tensors = {n: t for n, t in _read_tensors(path, prefix).items() if n.startswith(VAE_LAYERS)}
    ldm = any(n.startswith("decoder.mid.") for n in tensors)  # against diffusers' decoder.mid_block.
    beside = path.parent / "config.json"  # a file out of a diffusers directory has its settings beside it
    folder, subfolder = (path.parent, "") if beside.is_file() and not ldm else (config_dir, "vae")
    config = json.loads((folder / subfolder / "config.json").read_text())
    cls = getattr(diffusers, _vae_class(config, path))
    _check_size(path, "VAE", tensors, config, cls)
    if not ldm:
        tensors = {_modern_attention(n): t for n, t in tensors.items()}
        return _from_state_dict(cls, config, tensors, dtype)
    return cls.from_single_file(
        tensors,
        config=str(folder),
        subfolder=subfolder,
        local_files_only=True,
        torch_dtype=dtype,
        low_cpu_mem_usage=_has_accelerate(),
    )


def _modern_attention(name: str) -> str:
    head, _, tail = name.rpartition(".")
    block, _, layer = head.rpartition(".")
    return f"{block}.{OLD_ATTENTION[layer]}.{tail}" if "attentions." in block and layer in OLD_ATTENTION else name


def _from_state_dict(cls: Any, config: Mapping[str, Any], tensors: Mapping[str, Tensor], dtype: torch.dtype) -> nn.Module:
    import torch

    with torch.device("meta"):
        model = cls.from_config(config)
    shapes = {n: p.shape for n, p in model.state_dict().items()}
    # attention projections were 1x1 convolutions in old files
    tensors = {n: t.reshape(shapes.get(n, t.shape)) for n, t in tensors.items()}
    model.load_state_dict(tensors, strict=True, assign=True)
    return model.to(dtype).eval()


def _text_encoder_from_file(path: Path, prefix: str, config_dir: Path, dtype: torch.dtype) -> nn.Module:
    """Own mapping: diffusers' picks the encoder by its width, which two encoders of one width defeat."""
    from transformers import CLIPTextConfig

    tensors = _read_tensors(path, prefix)
    tensors = openclip_to_transformers(tensors) if prefix.endswith(".model.") else _transformers_text(tensors)
    config = CLIPTextConfig.from_pretrained(config_dir)
    with _no_progress_bar():
        model, info = _text_class(config_dir).from_pretrained(
            None, config=config, state_dict=tensors, dtype=dtype, output_loading_info=True
        )
    if info["missing_keys"] or info["mismatched_keys"]:
        wrong = sorted(map(str, [*info["missing_keys"], *info["mismatched_keys"]]))
        raise ValueError(f"the text encoder {prefix}* in {path} does not fit {config_dir}: {', '.join(wrong[:5])}")
    return model


def _transformers_text(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Some files lack the `text_model.` level, many have position_ids, which is a constant."""
    named = {"text_model." + n.removeprefix("text_model."): t for n, t in tensors.items()}
    return {n: t for n, t in named.items() if not n.endswith("position_ids")}


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
    """A text tower of open_clip in transformers' names: fused q, k, v are split, the projection is transposed."""
    out = {OPENCLIP_NAMES[n]: t for n, t in tensors.items() if n in OPENCLIP_NAMES}
    if "text_projection" in tensors:
        out["text_projection.weight"] = tensors["text_projection"].T.contiguous()
    for name, t in tensors.items():
        if not (m := re.fullmatch(r"transformer\.resblocks\.(\d+)\.(.+?)[._](weight|bias)", name)):
            continue
        layer = f"text_model.encoder.layers.{m[1]}"
        if m[2] == "attn.in_proj":
            for projection, rows in zip("qkv", t.chunk(3), strict=True):
                out[f"{layer}.self_attn.{projection}_proj.{m[3]}"] = rows.contiguous()
        else:
            out[f"{layer}.{OPENCLIP_LAYERS[m[2]]}.{m[3]}"] = t
    return out


# ---------------------------------------------------------------------------------------------- loading


def load_unet(resolved: Resolved, dtype: torch.dtype) -> nn.Module:
    """The UNet2DConditionModel in dtype on the CPU, in eval mode, frozen (requires_grad False)."""
    from diffusers import UNet2DConditionModel

    if resolved.single_file:
        return _frozen(_unet_from_file(resolved.model_path, resolved.config_dir, dtype))
    return _frozen(_from_directory(UNet2DConditionModel, resolved.model_path, "unet", dtype, resolved.source.variant))


def load_vae(resolved: Resolved, dtype: torch.dtype) -> nn.Module:
    """The AutoencoderKL or AutoencoderTiny in dtype on the CPU, in eval mode, frozen."""
    import diffusers

    path = resolved.vae_path or resolved.model_path
    if path.is_file():
        return _frozen(_vae_from_file(path, _config_dir(resolved.source), dtype))
    borrowed = resolved.vae_path is not None
    folder = "" if borrowed and (path / "config.json").is_file() else "vae"
    config = json.loads((path / folder / "config.json").read_text())
    cls = getattr(diffusers, _vae_class(config, path))
    return _frozen(_from_directory(cls, path, folder, dtype, None if borrowed else resolved.source.variant))


def load_text(resolved: Resolved, dtype: torch.dtype) -> tuple[list[Any], list[nn.Module]]:
    """(tokenizers, text encoders): one of each for SD1.5, two for SDXL; encoders in dtype, eval mode, frozen."""
    return load_tokenizers(resolved), load_text_encoders(resolved, dtype)


def load_tokenizers(resolved: Resolved) -> list[Any]:
    """One CLIPTokenizer for SD1.5, two for SDXL. A single file has none: they are built from the shipped merges."""
    return [_tokenizer(resolved.config_dir / tokenizer) for tokenizer, _ in TEXT_PARTS[resolved.source.kind]]


def load_text_encoders(resolved: Resolved, dtype: torch.dtype) -> list[nn.Module]:
    """CLIPTextModel, and for SDXL CLIPTextModelWithProjection as well."""
    kind, path = resolved.source.kind, resolved.model_path
    encoders = []
    for (_, part), prefix in zip(TEXT_PARTS[kind], TEXT_PREFIXES[kind], strict=True):
        if resolved.single_file:
            encoder = _text_encoder_from_file(path, prefix, resolved.config_dir / part, dtype)
        else:
            encoder = _from_directory(_text_class(path / part), path, part, dtype, resolved.source.variant)
        encoders.append(_frozen(encoder))
    return encoders


def scheduler_config(resolved: Resolved) -> dict[str, Any]:
    """The published scheduler's settings as its JSON has them; nothing heavy is imported."""
    return json.loads((resolved.config_dir / "scheduler" / "scheduler_config.json").read_text())


def _from_directory(cls: Any, path: Path, folder: str, dtype: torch.dtype, variant: str | None) -> nn.Module:
    options: dict[str, Any] = {"local_files_only": True, "variant": variant}
    if cls.__module__.startswith("diffusers"):
        # said outright, since diffusers warns on every load when accelerate is absent
        options |= {"torch_dtype": dtype, "low_cpu_mem_usage": _has_accelerate()}
    else:
        options |= {"dtype": dtype}
    try:
        with _no_progress_bar():
            return cls.from_pretrained(str(path), subfolder=folder, **options)
    except (OSError, ValueError, RuntimeError) as error:
        # the libraries speak of hub ids and connections here; the directory was found, so its content is at fault
        where = path / folder if folder else path
        raise OSError(f"cannot load {cls.__name__} from {where}: {error}. Download or convert it again.") from error


def _frozen(model: nn.Module) -> nn.Module:
    return model.requires_grad_(False).eval()


def _vae_class(config: Mapping[str, Any], path: Path) -> str:
    name = config.get("_class_name", "AutoencoderKL")
    if name not in VAE_CLASSES:
        raise ValueError(f"{path} is a {name}; a VAE must be one of {', '.join(VAE_CLASSES)}.")
    return name


def _text_class(config_dir: Path) -> Any:
    import transformers

    projects = config_dir.name == "text_encoder_2"
    return transformers.CLIPTextModelWithProjection if projects else transformers.CLIPTextModel


def _has_accelerate() -> bool:
    from diffusers.utils import is_accelerate_available

    return is_accelerate_available()


@contextlib.contextmanager
def _no_progress_bar() -> Iterator[None]:
    """transformers draws a bar for every encoder it loads; ours to restore, since it is a global switch."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


# ---------------------------------------------------------------------------------------------- the CLIP tokenizer

START, END = "<|startoftext|>", "<|endoftext|>"


def _tokenizer(directory: Path) -> Any:
    from transformers import CLIPTokenizer

    if any((directory / name).is_file() for name in ("tokenizer.json", "vocab.json")):
        return CLIPTokenizer.from_pretrained(str(directory), local_files_only=True)
    settings = json.loads((directory / "tokenizer_config.json").read_text())
    return clip_tokenizer(pad_token=settings["pad_token"], max_length=settings["model_max_length"])


def clip_tokenizer(pad_token: str = END, max_length: int = 77) -> Any:
    """The published CLIP tokenizer (49,408 tokens), from the merges shipped with this package.

    pad_token is the end token for CLIP ViT-L and "!" (id 0) for the second encoder of SDXL.
    """
    from transformers import CLIPTokenizer

    merges = clip_merges()
    # dict and list: CLIPTokenizer(vocab_file=...) of transformers 5 quietly knows two tokens only
    return CLIPTokenizer(
        vocab=clip_vocab(merges),
        merges=merges,
        bos_token=START,
        eos_token=END,
        unk_token=END,
        pad_token=pad_token,
        model_max_length=max_length,
    )


def clip_merges() -> list[tuple[str, str]]:
    """The 48,894 byte-pair merges, first one first; source and licence in configs/clip_bpe/NOTICE.txt."""
    text = gzip.decompress((CONFIGS / "clip_bpe" / "merges.txt.gz").read_bytes()).decode()
    return [(a, b) for a, b in (line.split() for line in text.splitlines())]


def clip_vocab(merges: list[tuple[str, str]]) -> dict[str, int]:
    """Token to id: the 256 bytes, the same ending a word, one token a merge, start, end."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    # bytes without a glyph of their own stand at 256, 257, ... in the order of their values
    glyphs = [chr(b) for b in printable] + [chr(256 + i) for i in range(256 - len(printable))]
    tokens = glyphs + [g + "</w>" for g in glyphs] + [a + b for a, b in merges] + [START, END]
    return {token: i for i, token in enumerate(tokens)}
