"""What a user may name as a model, and what it resolves to: a hub id, a diffusers directory, a single file."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from pathlib import Path

from spo_fast.config.errors import did_you_mean
from spo_fast.config.scorers import FLOWS, KINDS
from spo_fast.config.sections import ModelConfig
from spo_fast.data.files import read_json

CONFIGS = Path(__file__).parent / "configs"
"""Architecture settings of the published models, and the CLIP merges: nothing here is fetched."""

PARTS = {  # the safety checker is left out: training has no use for it
    "sd15": ("unet", "vae", "text_encoder", "tokenizer", "scheduler"),
    "sdxl": ("unet", "vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "scheduler"),
    "sd35": (
        *("transformer", "vae", "text_encoder", "text_encoder_2", "text_encoder_3"),
        *("tokenizer", "tokenizer_2", "tokenizer_3", "scheduler"),
    ),
    "flux": ("transformer", "vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "scheduler"),
}
TEXT_PARTS = {  # pairs that belong together
    "sd15": (("tokenizer", "text_encoder"),),
    "sdxl": (("tokenizer", "text_encoder"), ("tokenizer_2", "text_encoder_2")),
    "sd35": (("tokenizer", "text_encoder"), ("tokenizer_2", "text_encoder_2"), ("tokenizer_3", "text_encoder_3")),
    "flux": (("tokenizer", "text_encoder"), ("tokenizer_2", "text_encoder_2")),
}
T5S = {("sd35", "text_encoder_3"), ("flux", "text_encoder_2")}
OPTIONAL = ("text_encoder_3", "tokenizer_3")
"""SD3 works without its T5, in whose place stand zeros."""


@dataclass(frozen=True, kw_only=True)
class ModelSource:
    """What the user asked for. Each path is a hub id, a local diffusers directory or a local .safetensors file."""

    kind: str
    """One of KINDS: which parts there are and how they are wired."""
    pretrained_model_name_or_path: str
    pretrained_vae_model_name_or_path: str | None = None
    """Another VAE (an AutoencoderKL or an AutoencoderTiny); None takes the model's own."""
    revision: str | None = None
    """Branch, tag or commit of the model's hub repository. The VAE is taken from its main branch."""
    base_model_name_or_path: str | None = None
    """A flow model's single file is its transformer alone: a hub id or directory with all else. None: the published."""
    variant: str | None = None
    """Weights with this infix, e.g. fp16; of the model only. None takes the plain ones, fp16? those where there are."""
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
    "sd35": ModelSource(kind="sd35", pretrained_model_name_or_path="stabilityai/stable-diffusion-3.5-medium"),
    "flux": ModelSource(kind="flux", pretrained_model_name_or_path="black-forest-labs/FLUX.1-dev"),
}
SETTINGS = {
    "stabilityai/stable-diffusion-3.5-large": "sd35_large",
    "black-forest-labs/FLUX.1-schnell": "flux_schnell",
}
"""Published models whose settings are no default's -> their folder of CONFIGS."""
GATED = ("black-forest-labs/FLUX.1-dev", "stabilityai/stable-diffusion-3.5-medium", *SETTINGS)
"""Whose terms each user accepts on the hub."""

# ---------------------------------------------------------------------------------------------- what is needed


@dataclass(frozen=True)
class Resolved:
    """Paths on this machine for everything `ModelSource` and the scorers named."""

    source: ModelSource
    model_path: Path  # a diffusers directory, or a single file
    vae_path: Path | None  # a directory, or a single file; None: the model's own
    scorer_paths: dict[str, Path] = field(default_factory=dict)
    base_path: Path | None = None  # of a flow model's single file: the directory with all but the transformer

    @property
    def single_file(self) -> bool:
        """Whether the model is one file and no directory."""
        return self.model_path.is_file()

    @property
    def config_dir(self) -> Path:
        """Directory with scheduler/scheduler_config.json, ...: the model's own, its base's, or published settings."""
        if self.base_path is not None:
            return self.base_path
        return settings_directory(self.source) if self.single_file else self.model_path

    @property
    def text_parts(self) -> tuple[tuple[str, str], ...]:
        """(tokenizer, text encoder) folders in the pipeline's order; an SD3 may lack its T5."""
        return text_parts(self.source.kind, self.config_dir)


def settings_directory(source: ModelSource) -> Path:
    """Where a single file's settings come from."""
    return Path(source.config).expanduser() if source.config else published_settings(source)


def published_settings(source: ModelSource) -> Path:
    """The shipped settings of the published model that a source names, or of its kind's default."""
    return CONFIGS / SETTINGS.get(source.pretrained_model_name_or_path, source.kind)


def text_parts(kind: str, directory: Path) -> tuple[tuple[str, str], ...]:
    """TEXT_PARTS of a kind without those that a directory may lack, and lacks."""
    return tuple(pair for pair in TEXT_PARTS[kind] if pair[1] not in OPTIONAL or (directory / pair[1]).is_dir())


NETWORK_NAMES = {"unet": "UNet", "transformer": "transformer"}


def network_part(kind: str) -> str:
    """The folder of the network that predicts."""
    return "transformer" if kind in FLOWS else "unet"


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
        for name in (
            *("pretrained_model_name_or_path", "pretrained_vae_model_name_or_path", "base_model_name_or_path"),
            *("revision", "variant"),
        )
        if getattr(cfg, name) is not None
    }
    base = DEFAULTS[kind]
    if "pretrained_model_name_or_path" in given:
        # another model brings its own VAE unless one is named
        base = dataclasses.replace(base, pretrained_vae_model_name_or_path=None)
    return dataclasses.replace(base, **given)


def _toy(cfg: ModelConfig) -> ModelSource:
    from spo_fast.models.files.toy import toy_files

    given = cfg.pretrained_model_name_or_path is not None
    return _public("sdxl", cfg if given else _with_model(cfg, toy_files()["model"]))


def _flow(kind: str, cfg: ModelConfig) -> ModelSource:
    """As published, T5 and CLIPs are there in float32 and in fp16: in 16 bits the second are half the download."""
    source = _public(kind, cfg)
    half = cfg.mixed_precision not in ("no", "fp64") and source.variant is None
    return dataclasses.replace(source, variant="fp16?") if half else source


def _toy_flow(cfg: ModelConfig) -> ModelSource:
    from spo_fast.models.files.toy import FLOW_WEIGHTS, toy_files

    given = cfg.pretrained_model_name_or_path is not None
    return _public("sd35", cfg if given else _with_model(cfg, toy_files(FLOW_WEIGHTS)["model"]))


def _with_model(cfg: ModelConfig, path: Path) -> ModelConfig:
    return dataclasses.replace(cfg, pretrained_model_name_or_path=str(path))


MODELS: dict[str, Callable[[ModelConfig], ModelSource]] = {
    "toy": _toy,
    "sd15": functools.partial(_public, "sd15"),
    "sdxl": functools.partial(_public, "sdxl"),
    "sd35": functools.partial(_flow, "sd35"),
    "flux": functools.partial(_flow, "flux"),
    "toy-flow": _toy_flow,
}
