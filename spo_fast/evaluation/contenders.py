"""What an evaluation compares: the base model and what was trained of it, and where their pictures lie."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spo_fast.config import flags
from spo_fast.config.errors import Missing, MissingFilesError
from spo_fast.config.evaluation import EvaluationConfig
from spo_fast.config.presets import EVALUATION_PRESETS
from spo_fast.config.scorers import TRUE_SCORES, judging_parts
from spo_fast.config.sections import TOYS
from spo_fast.data.files import read_json, write_atomically
from spo_fast.data.prompt_sets import prompts_of
from spo_fast.evaluation.required_files import metric_scorers, resolve
from spo_fast.models.files.find import find_contender
from spo_fast.models.files.sources import MODELS, Resolved

OF_THE_RUN = (  # settings that a run's directory brings along, unless they are given
    *("model", "pretrained_model_name_or_path", "pretrained_vae_model_name_or_path", "revision", "variant"),
    *("height", "width", "num_steps", "guidance_scale", "size_told"),
    *("base_model_name_or_path", "embedded_guidance", "max_sequence_length"),  # of flow models
)

# ------------------------------------------------------------------------------------------------------- what to draw


@dataclass(frozen=True)
class Contender:
    """The base model, or what was trained of it."""

    name: str  # of its folder
    source: str  # as it was given
    kind: str  # base, lora or unet
    path: Path | None = None


def named(spec: str) -> tuple[str, str]:
    """ "mine=runs/a" -> ("mine", "runs/a"); a source alone is called by its last part."""
    if (m := re.fullmatch(r"(\w[\w.-]*)=(.+)", spec)) and not Path(spec).exists():
        return m[1], m[2]
    path = Path(os.path.abspath(os.path.expanduser(spec)))
    stem = path.parent.name if path.name == "pytorch_lora_weights.safetensors" else path.name
    return re.sub(r"[^\w.-]", "_", stem.removesuffix(".safetensors")) or "run", spec


def check_metrics(cfg: EvaluationConfig) -> list[str]:
    """The scorers among the metrics. Raises ValueError for a metric that is none, or not of this model."""
    names = cfg.metric.metric_names
    parts = judging_parts(names)
    if parts and not (cfg.pictures.prompts or "").startswith("geneval"):
        raise ValueError(f"metric {parts[0]} judges GenEval's own prompts: add --prompts geneval (or geneval=FILE).")
    return metric_scorers(names, cfg.model.model, "--metrics")


def find_files(cfg: EvaluationConfig) -> tuple[Resolved, list[Contender]]:
    """(paths of the model and the metrics, contenders), base first. Raises MissingFilesError naming all that lack."""
    missing: list[Missing] = []
    try:
        resolved = resolve(cfg.model, cfg.metric.paths_of(check_metrics(cfg)), cfg.pictures.guidance_scale)
    except MissingFilesError as error:
        missing += error.missing
    contenders = [Contender("base", "base", "base")]
    kind = MODELS[cfg.model.model](cfg.model).kind
    for spec in cfg.pictures.lora:
        name, source = named(spec)
        if any(c.name.lower() == name.lower() for c in contenders):
            raise ValueError(f"two contenders would be called {name}. Name them: --lora a=PATH b=PATH (base is taken).")
        found = find_contender(source, kind, "--lora")
        if isinstance(found, Missing):
            missing.append(found)
        else:
            contenders.append(Contender(name, source, *found))
    if missing:
        raise MissingFilesError(missing)
    return resolved, contenders


@dataclass(frozen=True)
class Gallery:
    """Where the pictures of one contender are, in order of prompts."""

    contender: Contender
    folder: Path
    num_prompts: int
    images_per_prompt: int

    @property
    def files(self) -> list[Path]:
        """All pictures, prompt after prompt."""
        per = self.images_per_prompt
        return [self.folder / f"{n // per:05d}-{n % per}.png" for n in range(self.num_prompts * per)]

    def check(self, settings: Mapping[str, Any]) -> None:
        """Raises ValueError if the pictures that are there were drawn otherwise."""
        file = self.folder / "settings.json"
        if file.is_file():
            was = read_json(file)
            if odd := [name for name in settings if was.get(name) != settings[name]]:
                shown = ", ".join(f"{n}: {was.get(n)!s:.24} there, {settings[n]!s:.24} now" for n in odd)
                raise ValueError(f"{self.folder} holds pictures of other settings ({shown}). Use another --output_dir.")
        self.folder.mkdir(parents=True, exist_ok=True)
        write_atomically(file, json.dumps(settings, indent=1) + "\n")

    def digest(self) -> str:
        """One hash of all pictures."""
        whole = hashlib.sha256()
        for file in self.files:
            whole.update(hashlib.sha256(file.read_bytes()).digest())
        return whole.hexdigest()


def fingerprint(contender: Contender) -> str:
    """Of the contender's weights: other weights make other pictures. Empty for the base model."""
    from spo_fast.models.tensor_cache import fingerprint_files

    if contender.path is None:
        return ""
    folder = contender.path
    return fingerprint_files([folder] if folder.is_file() else sorted(p for p in folder.iterdir() if p.is_file()))


# ----------------------------------------------------------------------------------------------------- command line


def settings_of_run(sources: list[str]) -> dict[str, Any]:
    """What the first source that is a run of spo_fast.train was trained with, as far as drawing goes."""
    import yaml

    for source in sources:
        file = Path(os.path.expanduser(named(source)[1])) / "config.yaml"
        if file.is_file():
            try:
                saved = yaml.safe_load(file.read_text(encoding="utf-8"))
            except (UnicodeDecodeError, yaml.YAMLError) as error:
                raise ValueError(f"{file} cannot be read: {' '.join(str(error).split())}") from error
            if isinstance(saved, dict) and "method" in saved:
                return {name: saved[name] for name in OF_THE_RUN if saved.get(name) is not None}
    return {}


def resolve_settings(parser: flags.Parser, arguments: list[str] | None) -> EvaluationConfig:
    """Flags over file over what the first run given by --lora brings along, over the preset."""

    def recipe(given: dict[str, Any], source: dict[str, Any]) -> dict[str, Any]:
        brought = settings_of_run(list(source.get("lora", ())))
        return brought if given.get("model") in (None, brought.get("model")) else {}

    cfg, given, _ = flags.parse(parser, EVALUATION_PRESETS, arguments, recipe)
    if "metrics" in given or cfg.model.model not in TOYS or not (why := why_no_true_scores(cfg, prompts_of(cfg)[0])):
        return cfg
    print(f"left out: {' and '.join(TRUE_SCORES)} {why}.")
    return cfg.with_fields(metrics=tuple(name for name in cfg.metric.metric_names if name not in TRUE_SCORES))


def why_no_true_scores(cfg: EvaluationConfig, prompts: list[str]) -> str:
    """Why the toy's true scores cannot be had of these pictures; empty if they can."""
    from spo_fast.data import toy_world

    if odd := next((prompt for prompt in prompts if prompt not in toy_world.CAPTIONS), None):
        return f"know captions of the toy's world only, not {odd!r:.60}"
    if any(side not in (None, toy_world.SIZE) for side in (cfg.model.height, cfg.model.width)):
        return f"are of pictures of {toy_world.SIZE} pixels"
    return ""
