"""`python -m spo_fast.train --model sdxl`: the command line. Flags over --config file over the model's preset.

Nothing heavy is imported before the files of the run are known to be there.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import os
import sys
import types
import typing
from pathlib import Path
from typing import Any

import yaml

from spo_fast.config import SECTIONS, Config, field_docs, section_of
from spo_fast.presets import PRESETS, published

TITLES = {
    "model": "model",
    "adapter": "what is trained",
    "sample": "rollout",
    "objective": "objective",
    "optim": "optimisation",
    "scorer": "scorer",
    "data": "prompts",
    "run": "run",
}


def build_parser() -> argparse.ArgumentParser:
    """One flag a config field, grouped by section; help is the field's docstring."""
    parser = argparse.ArgumentParser(
        prog="python -m spo_fast.train",
        description="Step-by-step preference optimisation of a text-to-image diffusion model.",
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    parser.add_argument("--config", help="YAML file with the same names as the flags; flags override it")
    docs = field_docs()
    for section, cls in SECTIONS.items():
        group = parser.add_argument_group(TITLES[section])
        hints = typing.get_type_hints(cls)
        for field in dataclasses.fields(cls):
            group.add_argument(
                f"--{field.name}", help=docs[field.name].replace("%", "%%"), **_argument(hints[field.name])
            )
            if field.name == "height":
                group.add_argument("--resolution", type=int, help="Height and width in pixels of a square image.")
            if field.name == "optimizer":
                group.add_argument("--use_8bit_adam", action="store_true", help="The same as --optimizer adamw8bit.")
    return parser


def _defaults(section: str, name: str) -> str:
    """The presets' values of a field: one if they agree."""
    values = {model: getattr(getattr(preset(), section), name) for model, preset in PRESETS.items()}
    shown = {m: " ".join(v) if isinstance(v, tuple) else "none" if v is None else str(v) for m, v in values.items()}
    if len(set(shown.values())) == 1:
        return next(iter(shown.values())) or "none"
    return ", ".join(f"{model} {value}" for model, value in shown.items())


def _argument(hint: Any) -> dict[str, Any]:
    """argparse settings of a field's type. Fields that may be None take the word none."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    optional = origin in (types.UnionType, typing.Union) and type(None) in args
    if optional:
        hint = next(a for a in args if a is not type(None))
        origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Literal:
        return {"choices": args}
    if origin is tuple:
        return {"nargs": "*", "type": str}
    if hint is bool:
        return {"action": argparse.BooleanOptionalAction}

    def convert(text: str) -> Any:
        return None if optional and text.lower() == "none" else hint(text)

    convert.__name__ = hint.__name__  # argparse names it in errors
    return {"type": convert, "metavar": hint.__name__.upper()}


def read_yaml(path: str) -> dict[str, Any]:
    """A flat mapping of setting names. Unknown names raise ValueError with the nearest known one."""
    try:
        loaded = yaml.safe_load(Path(path).read_text())
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
    if loaded is None:
        return {}
    if not isinstance(loaded, dict):
        raise ValueError(f"{path}: expected lines such as 'learning_rate: 1e-5', found a {type(loaded).__name__}")
    known = [*field_docs(), "resolution", "use_8bit_adam"]
    for name in loaded:
        if name not in known:
            nearest = difflib.get_close_matches(str(name), known, n=1)
            raise ValueError(
                f"{path}: unknown setting {name!r}." + (f" Did you mean {nearest[0]!r}?" if nearest else "")
            )
    return loaded


def _from_yaml(path: str, name: str, value: Any) -> Any:
    """A YAML value in the field's type, checked as the command line would."""
    if name in ("resolution", "use_8bit_adam"):
        return value
    hint = typing.get_type_hints(SECTIONS[section_of(name)])[name]
    if value is None:
        if type(None) not in typing.get_args(hint):
            raise ValueError(f"{path}: {name} has no value")
        return None
    settings = _argument(hint)
    if "choices" in settings:
        value = (
            {True: "yes", False: "no"}.get(value, value) if isinstance(value, bool) else value
        )  # YAML reads no as false
        if value not in settings["choices"]:
            raise ValueError(f"{path}: {name}: {value!r} is none of {', '.join(settings['choices'])}")
        return value
    if "nargs" in settings:
        return tuple(str(v) for v in (value if isinstance(value, list) else [value]))
    if "action" in settings:
        if not isinstance(value, bool):
            raise ValueError(f"{path}: {name}: {value!r} must be true or false")
        return value
    try:
        return settings["type"](str(value))
    except ValueError as error:
        raise ValueError(f"{path}: {name}: {value!r} is no {settings['metavar'].lower()}") from error


def _expanded(values: dict[str, Any]) -> dict[str, Any]:
    """One source's settings with diffusers' shorthands as the fields they stand for; a field given beside them wins."""
    values = dict(values)
    if values.pop("use_8bit_adam", False):
        values.setdefault("optimizer", "adamw8bit")
    if resolution := values.pop("resolution", None):
        values = {"height": resolution, "width": resolution, **values}
    return values


def parse(arguments: list[str] | None = None) -> Config:
    """The resolved Config of a command line. Raises ValueError for settings that do not fit together."""
    parser = build_parser()
    flags: dict[str, Any] = {
        k: tuple(v) if isinstance(v, list) else v for k, v in vars(parser.parse_args(arguments)).items()
    }
    path = flags.pop("config", None)
    saved = {name: _from_yaml(path, name, value) for name, value in read_yaml(path).items()} if path else {}
    model = flags.get("model", saved.get("model"))
    if model is None:
        parser.error(f"--model is needed: {', '.join(PRESETS)}")
    cfg = PRESETS[model]()
    for source in (saved, flags):  # each over the one before; a recipe comes before its own source's other settings
        if source.get("recipe") == "published":
            cfg = published(cfg)
        cfg = cfg.with_fields(**_expanded(source))
    if cfg.data.prompts is not None and "max_prompts" not in saved | flags:
        cfg = cfg.with_fields(max_prompts=None)  # the toy preset's limit is meant for the built-in list
    return cfg


def main(arguments: list[str] | None = None) -> int:
    # OpenMP threads that spin while they wait make a shared CPU several times slower; read when PyTorch is loaded
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        cfg = parse(arguments)
        from spo_fast.models import resolve

        resolve(cfg)  # everything missing is named at once, before PyTorch is imported
        from spo_fast.trainer import Run

        run = Run(cfg)
    except (ValueError, ImportError, OSError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    from spo_fast.checkpoint import MismatchError, checkpoints, number

    try:
        run.train()
    except MismatchError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        last = max(checkpoints(run.run_dir), key=number, default=None)
        goes_on = f"--resume_from_checkpoint latest goes on from {last}" if last else "no checkpoint was written yet"
        print(f"stopped; {goes_on}", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
