"""What every command line shares: one flag a setting, a YAML file of the same names, a preset underneath."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import os
import sys
import types
import typing
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import yaml

from spo_fast.config import RunError, Settings

TITLES = {
    "model": "model",
    "adapter": "what is trained",
    "sample": "rollout",
    "objective": "objective",
    "optim": "optimisation",
    "scorer": "scorer",
    "data": "prompts",
    "reward": "preference model",
    "pairs": "preference pairs",
    "run": "run",
}
# diffusers' shorthands, each after the field it belongs to
SHORTHANDS: dict[str, tuple[str, dict[str, Any]]] = {
    "height": ("resolution", {"type": int, "help": "Height and width in pixels of a square image."}),
    "optimizer": ("use_8bit_adam", {"action": "store_true", "help": "The same as --optimizer adamw8bit."}),
}


def build_parser(settings: type[Settings], prog: str, description: str) -> argparse.ArgumentParser:
    """One flag a config field, grouped by section; help is the field's docstring."""
    parser = argparse.ArgumentParser(
        prog=prog, description=description, argument_default=argparse.SUPPRESS, allow_abbrev=False
    )
    parser.add_argument("--config", help="YAML file with the same names as the flags; flags override it")
    docs = settings.docs()
    for section, cls in settings.sections().items():
        group = parser.add_argument_group(TITLES[section])
        hints = typing.get_type_hints(cls)
        for field in dataclasses.fields(cls):
            group.add_argument(
                f"--{field.name}", help=docs[field.name].replace("%", "%%"), **_argument(hints[field.name])
            )
            if field.name in SHORTHANDS:
                name, options = SHORTHANDS[field.name]
                group.add_argument(f"--{name}", **options)
    return parser


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
        return {"nargs": "*", "type": args[0]}
    if hint is bool:
        return {"action": argparse.BooleanOptionalAction}

    def convert(text: str) -> Any:
        return None if optional and text.lower() == "none" else hint(text)

    convert.__name__ = hint.__name__  # argparse names it in errors
    return {"type": convert, "metavar": hint.__name__.upper()}


def read_yaml(path: str, known: list[str]) -> dict[str, Any]:
    """A flat mapping of setting names. Unknown names raise ValueError with the nearest known one."""
    try:
        loaded = yaml.safe_load(Path(path).read_text())
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
    if loaded is None:
        return {}
    if not isinstance(loaded, dict):
        raise ValueError(f"{path}: expected lines such as 'learning_rate: 1e-5', found a {type(loaded).__name__}")
    for name in loaded:
        if name not in known:
            nearest = difflib.get_close_matches(str(name), known, n=1)
            raise ValueError(
                f"{path}: unknown setting {name!r}." + (f" Did you mean {nearest[0]!r}?" if nearest else "")
            )
    return loaded


def _from_yaml(settings: type[Settings], path: str, name: str, value: Any) -> Any:
    """A YAML value in the field's type, checked as the command line would."""
    if name in (shorthand for shorthand, _ in SHORTHANDS.values()):
        return value
    hint = typing.get_type_hints(settings.sections()[settings.section_of(name)])[name]
    if value is None:
        if type(None) not in typing.get_args(hint):
            raise ValueError(f"{path}: {name} has no value")
        return None
    options = _argument(hint)
    if "choices" in options:
        value = (
            {True: "yes", False: "no"}.get(value, value) if isinstance(value, bool) else value
        )  # YAML reads no as false
        if value not in options["choices"]:
            raise ValueError(f"{path}: {name}: {value!r} is none of {', '.join(options['choices'])}")
        return value
    try:
        if "nargs" in options:
            return tuple(options["type"](str(v)) for v in (value if isinstance(value, list) else [value]))
        if "action" in options:
            if not isinstance(value, bool):
                raise ValueError(f"{path}: {name}: {value!r} must be true or false")
            return value
        return options["type"](str(value))
    except ValueError as error:
        if str(error).startswith(path):
            raise
        kind = options.get("metavar", "NUMBER").lower()
        raise ValueError(f"{path}: {name}: {value!r} is no {kind}") from error


def _expanded(values: dict[str, Any]) -> dict[str, Any]:
    """One source's settings with diffusers' shorthands as the fields they stand for; a field given beside them wins."""
    values = dict(values)
    if values.pop("use_8bit_adam", False):
        values.setdefault("optimizer", "adamw8bit")
    if resolution := values.pop("resolution", None):
        values = {"height": resolution, "width": resolution, **values}
    return values


def parse(
    parser: argparse.ArgumentParser,
    presets: Mapping[str, Callable[[], Settings]],  # by the value of --model
    arguments: list[str] | None,
    recipe: Callable[[Any, dict[str, Any]], Any],  # (settings, what a source gives) -> settings that go with it
) -> tuple[Any, set[str]]:
    """The resolved settings, flags over file over preset, and the names that were given.

    Raises ValueError for settings that do not fit together.
    """
    settings = type(next(iter(presets.values()))())
    flags: dict[str, Any] = {
        k: tuple(v) if isinstance(v, list) else v for k, v in vars(parser.parse_args(arguments)).items()
    }
    path = flags.pop("config", None)
    saved: dict[str, Any] = {}
    if path:
        known = [*settings.docs(), *(name for name, _ in SHORTHANDS.values())]
        saved = {name: _from_yaml(settings, path, name, value) for name, value in read_yaml(path, known).items()}
    model = flags.get("model", saved.get("model"))
    if model is None:
        parser.error(f"--model is needed: {', '.join(presets)}")
    cfg = presets[model]()
    for source in (saved, flags):  # each over the one before; a recipe comes before its own source's other settings
        cfg = recipe(cfg, source)
        cfg = cfg.with_fields(**_expanded(source))
    return cfg, set(saved) | set(flags)


def main(build: Callable[[], Any]) -> int:
    """Build a run (an object with train() and run_dir) and train it. Returns the exit status; errors are one line."""
    # OpenMP threads that spin while they wait make a shared CPU several times slower; read when PyTorch is loaded
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        run = build()
    except (ValueError, ImportError, OSError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    from spo_fast.checkpoint import checkpoints, number

    try:
        run.train()
    except RunError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        last = max(checkpoints(run.run_dir), key=number, default=None)
        goes_on = f"--resume_from_checkpoint latest goes on from {last}" if last else "no checkpoint was written yet"
        print(f"stopped; {goes_on}", file=sys.stderr)
        return 130
    return 0
