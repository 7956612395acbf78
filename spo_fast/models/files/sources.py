"""What a user may name as a model, and what it resolves to: a hub id, a diffusers directory, a single file."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from pathlib import Path

from spo_fast.config.errors import did_you_mean
from spo_fast.config.scorers import KINDS
from spo_fast.config.sections import ModelConfig
from spo_fast.data.files import read_json

CONFIGS = Path(__file__).parent / "configs"
"""Architecture settings of SD1.5 and SDXL (for single files) and the CLIP merges: nothing here is fetched."""

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
            raise ValueError(unknown("model kind", self.kind, KINDS))


DEFAULTS = {
    "sd15": ModelSource(kind="sd15", pretrained_model_name_or_path="stable-diffusion-v1-5/stable-diffusion-v1-5"),
    "sdxl": ModelSource(
        kind="sdxl",
        pretrained_model_name_or_path="stabilityai/stable-diffusion-xl-base-1.0",
        pretrained_vae_model_name_or_path="madebyollin/sdxl-vae-fp16-fix",  # the original overflows in float16
    ),
}

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
        """Whether the model is one file and no directory."""
        return self.model_path.is_file()

    @property
    def config_dir(self) -> Path:
        """Directory with model_index.json, unet/config.json, ...: the model's own, or the published settings."""
        return settings_directory(self.source) if self.single_file else self.model_path


def settings_directory(source: ModelSource) -> Path:
    """Where a single file's settings come from."""
    return Path(source.config).expanduser() if source.config else CONFIGS / source.kind


def unknown(noun: str, name: str, known: Collection[str]) -> str:
    """An error's text for a name that is not among the known."""
    return f"unknown {noun} {name!r}; known: {', '.join(known)}.{did_you_mean(name, known)}"


# ---------------------------------------------------------------------------------------------- loading


def forces_zeros(pipeline: Path) -> bool:
    """SDXL's unconditional embeddings are zeros, not those of the empty prompt, if its model_index.json says so."""
    index = pipeline / "model_index.json"
    return bool((read_json(index) if index.is_file() else {}).get("force_zeros_for_empty_prompt", True))


def _public(kind: str, cfg: ModelConfig) -> ModelSource:
    """The architecture's public base model, with whatever the user gave instead."""
    given = {
        name: getattr(cfg, name)
        for name in ("pretrained_model_name_or_path", "pretrained_vae_model_name_or_path", "revision", "variant")
        if getattr(cfg, name) is not None
    }
    base = DEFAULTS[kind]
    if "pretrained_model_name_or_path" in given:
        # another model brings its own VAE unless one is named
        base = dataclasses.replace(base, pretrained_vae_model_name_or_path=None)
    return dataclasses.replace(base, **given)


def _toy(cfg: ModelConfig) -> ModelSource:
    from spo_fast.models.files.toy import toy_files

    if cfg.pretrained_model_name_or_path is None:
        cfg = dataclasses.replace(cfg, pretrained_model_name_or_path=str(toy_files()["model"]))
    return _public("sdxl", cfg)


MODELS: dict[str, Callable[[ModelConfig], ModelSource]] = {
    "toy": _toy,
    "sd15": functools.partial(_public, "sd15"),
    "sdxl": functools.partial(_public, "sdxl"),
}
