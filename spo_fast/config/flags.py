"""What every command line shares: one flag a setting, a YAML file of the same names, a preset underneath."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NoReturn

import yaml

from spo_fast.config.errors import UsageError, did_you_mean
from spo_fast.config.fields import NAMES, Kind, Range, Settings
from spo_fast.config.outside import is_outside

TITLES = {
    "model": "model",
    "adapter": "what is trained",
    "sample": "rollout",
    "engine": "how it is computed",
    "objective": "objective",
    "optim": "optimisation",
    "scorer": "scorer",
    "data": "prompts",
    "reward": "preference model",
    "pairs": "preference pairs",
    "run": "run",
    "metric": "metrics",
    "pictures": "pictures",
}
# diffusers' shorthands, each after the field it belongs to: name, what it takes, help
SHORTHANDS = {
    "height": ("resolution", Kind(int, Range(1), (), False, False), "Height and width in pixels of a square image."),
    "validation_prompt": (
        *("validation_prompts", Kind(str, None, (), False, True)),
        "The same as --validation_prompt.",
    ),
    "optimizer": ("use_8bit_adam", Kind(bool, None, (), False, False), "The same as --optimizer adamw8bit."),
}
TRUE, FALSE = ("true", "yes", "on"), ("false", "no", "off")


class Parser(argparse.ArgumentParser):
    """argparse whose errors are exceptions of one line, with the nearest flag; help fits 80 columns."""

    def __init__(self, prog: str, description: str, **options: Any) -> None:
        layout = functools.partial(argparse.RawDescriptionHelpFormatter, max_help_position=8)
        super().__init__(prog, description=description, formatter_class=layout, allow_abbrev=False, **options)
        self.add_argument(
            "--debug", action="store_true", default=argparse.SUPPRESS, help="On an error show the whole traceback."
        )

    def error(self, message: str) -> NoReturn:
        """Raises UsageError."""
        raise UsageError(f"{message.removeprefix('argument ')} (--help lists all flags)")

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As argparse's; an unknown flag is answered with the nearest one."""
        known, unknown = self.parse_known_args(args, namespace)
        if unknown:
            name = next((word for word in unknown if word.startswith("-")), unknown[0]).split("=")[0]
            self.error(f"unknown argument {name!r:.60}.{did_you_mean(name, self._option_string_actions)}")
        return known


def known_names(settings: type[Settings]) -> dict[str, Kind]:
    """Every name a YAML file may have."""
    kinds = settings.kinds()
    return kinds | {name: kind for field, (name, kind, _) in SHORTHANDS.items() if field in kinds}


def build_parser(
    presets: Mapping[str, Callable[[], Settings]], prog: str, description: str, examples: list[str]
) -> Parser:
    """One flag a config field, grouped by section; help is the field's docstring, its range and its defaults."""
    made = {name: preset() for name, preset in presets.items()}
    settings = type(next(iter(made.values())))
    parser = Parser(
        prog,
        description,
        usage=f"{prog} \\\n      --model {{{','.join(presets)}}} [--flag value ...]",
        epilog="examples:\n" + "\n".join(f"  {prog} \\\n      {line}" for line in examples),
        argument_default=argparse.SUPPRESS,
    )
    parser.add_argument(
        "--config", metavar="FILE", help="YAML file with the same names as the flags, which override it"
    )
    docs, kinds = settings.docs(), settings.kinds()
    defaults = {name: cfg.flat() for name, cfg in made.items()}
    for section, cls in settings.sections().items():
        group = parser.add_argument_group(TITLES[section])
        for field in dataclasses.fields(cls):
            values = {preset: flat[field.name] for preset, flat in defaults.items()}
            notes = [] if field.name == "model" else [shown_defaults(values, "Default: " in docs[field.name])]
            add_flag(group, field.name, kinds[field.name], docs[field.name], notes)
            if field.name in SHORTHANDS:
                name, kind, text = SHORTHANDS[field.name]
                add_flag(group, name, kind, text, [])
    return parser


HELP_COLUMNS = 80


def add_flag(group: Any, name: str, kind: Kind, text: str, notes: list[str]) -> None:
    """The values stay text here: `converted` reads them, as it does those of a YAML file."""
    choices = f"{{{','.join(kind.choices)}}}" if kind.choices else ""
    if len(f"  --{name} {choices}") > HELP_COLUMNS:  # argparse breaks no word: among the notes it can
        notes, choices = [f"one of {', '.join(kind.choices)}", *notes], ""
    options: dict[str, Any] = {"metavar": choices or kind.base.__name__.upper()}
    if kind.many:
        options["nargs"] = "*"
    elif kind.base is bool:
        options = {"action": argparse.BooleanOptionalAction}
    notes = [note for note in (str(kind.range or ""), *notes) if note]
    text += f" ({'; '.join(notes)})" if notes else ""
    group.add_argument(f"--{name}", help=text.replace("%", "%%"), **options)


def first(arguments: list[str] | None, name: str, use: Callable[[str], Any]) -> None:
    """Hand a setting of the command line, or of its --config file, to `use` before there is a parser for the rest.

    Only if it names something outside the package; what is wrong with the line or the file the parser itself will say.
    """
    wanted: Any = None
    early = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    early.add_argument(f"--{name}")
    early.add_argument("--config")
    with contextlib.suppress(argparse.ArgumentError, OSError, ValueError, SystemExit):
        given, _ = early.parse_known_args(arguments)
        values = {name: getattr(given, name)}
        if values[name] is None and given.config:
            root = _yaml_tree(given.config)
            pairs = root.value if isinstance(root, yaml.MappingNode) else []
            values = {key.value: node.value for key, node in pairs}
        wanted = values.get(name)
    if isinstance(wanted, str) and is_outside(wanted):
        use(wanted)


def shown_defaults(values: Mapping[str, Any], documented: bool) -> str:
    """One preset's value if all are alike, else each preset's. documented: the help says already what none means."""
    texts = {preset: shown(value) for preset, value in values.items()}
    if len(set(texts.values())) > 1:
        return "default: " + ", ".join(f"{preset} {text}" for preset, text in texts.items())
    text = next(iter(texts.values()))
    return "" if documented and text == "none" else f"default: {text}"


def shown(value: Any) -> str:
    """A setting as it is written on a command line."""
    if isinstance(value, list):
        return " ".join(map(str, value)) or "none"
    return {None: "none", True: "on", False: "off"}[value] if value is None or isinstance(value, bool) else str(value)


def converted(label: str, kind: Kind, text: Any) -> Any:
    """A setting's text (a list of them for a setting of many) in its type. ValueError begins with the label."""
    if kind.many:
        value: Any = tuple(_converted(label, kind, one) for one in text)
    elif text is None or (kind.optional and str(text).lower() == "none"):
        value = None
    else:
        value = _converted(label, kind, text)
    kind.check(label, value)
    return value


def _converted(label: str, kind: Kind, text: str) -> Any:
    try:
        if kind.base is bool:
            return {**dict.fromkeys(TRUE, True), **dict.fromkeys(FALSE, False)}[text.lower()]
        return kind.base(text)
    except (ValueError, KeyError):
        raise ValueError(f"{label}={text!r:.60} is not {NAMES[kind.base]}.") from None


def read_yaml(path: str, known: Mapping[str, Kind]) -> dict[str, Any]:
    """A flat mapping of setting names to values. Raises ValueError naming the line of what is wrong in it.

    Values are read as the text that stands there, so that no is not false where a setting has a choice of that name,
    and 1e-5 is a number.
    """
    values: dict[str, Any] = {}
    root = _yaml_tree(path)
    if root is None:
        return values
    if not isinstance(root, yaml.MappingNode):
        raise ValueError(f"{path}: expected lines such as 'learning_rate: 1e-5', not a list or a single value.")
    for key, node in root.value:
        name, label = str(key.value), f"{path}, line {key.start_mark.line + 1}: "
        if name not in known:
            raise ValueError(f"{label}unknown setting {name!r:.60}.{did_you_mean(name, known)}")
        if name in values:
            raise ValueError(f"{label}{name} stands there a second time. Delete one.")
        values[name] = converted(label + name, known[name], _yaml_text(label + name, known[name], node))
    return values


def _yaml_tree(path: str) -> yaml.Node | None:
    if not Path(path).is_file():
        what = "is a directory" if Path(path).is_dir() else "does not exist"
        raise FileNotFoundError(f"--config {path} {what}. Give a YAML file, such as the config.yaml of a run.")
    try:
        return yaml.compose(Path(path).read_text(encoding="utf-8-sig"), Loader=yaml.SafeLoader)
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: byte {error.start} is not UTF-8. Save the file as UTF-8.") from error
    except yaml.MarkedYAMLError as error:
        line = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise ValueError(f"{path}{line} is not YAML: {error.problem}. Mend this line.") from error
    except (yaml.YAMLError, ValueError, OverflowError, RecursionError) as error:
        raise ValueError(f"{path} is not YAML: {' '.join(str(error).split())}.") from error


def _yaml_text(label: str, kind: Kind, node: yaml.Node) -> Any:
    """A node's text, None where YAML has null; a list of texts for settings of many."""
    nodes = node.value if kind.many and isinstance(node, yaml.SequenceNode) else [node]
    if not all(isinstance(one, yaml.ScalarNode) for one in nodes):
        raise ValueError(f"{label} must be {'a list of plain values' if kind.many else 'one plain value'}.")
    texts = [None if one.tag == "tag:yaml.org,2002:null" else str(one.value) for one in nodes]
    if kind.many and None in texts:
        raise ValueError(f"{label} has no value.")
    return texts if kind.many else texts[0]


def _expanded(values: dict[str, Any]) -> dict[str, Any]:
    """One source's settings with diffusers' shorthands as the fields they stand for; a field given beside them wins."""
    values = dict(values)
    if values.pop("use_8bit_adam", False):
        values.setdefault("optimizer", "adamw8bit")
    if "validation_prompts" in values:
        values.setdefault("validation_prompt", values.pop("validation_prompts"))
    if "resolution" in values:
        resolution = values.pop("resolution")
        values = {"height": resolution, "width": resolution, **values}
    return values


def parse(
    parser: Parser,
    presets: Mapping[str, Callable[[], Settings]],  # by the value of --model
    arguments: list[str] | None,
    recipe: Callable[[dict[str, Any], dict[str, Any]], dict[str, Any]],
) -> tuple[Any, set[str], set[str]]:
    """The resolved settings, flags over file over preset; the names that were given, and those given as flags.

    recipe: (all given up to a source, that source) -> settings that go with it; what the source itself says wins.
    Raises ValueError for settings that do not fit together, UsageError for flags that there are not.
    """
    settings = type(next(iter(presets.values()))())
    known = known_names(settings)
    texts = vars(parser.parse_args(arguments))
    for action in ("debug", "dry_run"):  # what to do, not settings of the run
        texts.pop(action, None)
    path = texts.pop("config", None)
    try:
        flags = {
            name: text if isinstance(text, bool) else converted(f"--{name}", known[name], text)
            for name, text in texts.items()
        }
    except ValueError as error:
        raise UsageError(str(error)) from None
    saved = read_yaml(path, known) if path else {}
    values: dict[str, Any] = {}
    for source in ({name: value for name, value in saved.items() if name not in flags}, flags):
        own = _expanded(source)
        values |= recipe({**values, **own, "model": flags.get("model", saved.get("model"))}, own) | own
    if unknown := next((name for name in values if name not in known), None):
        raise ValueError(f"the published settings have {unknown!r:.60}, which is none.{did_you_mean(unknown, known)}")
    if "model" not in values:
        parser.error(f"--model is needed: {', '.join(presets)}")
    return presets[values["model"]]().with_fields(**values), set(saved) | set(flags), set(flags)
