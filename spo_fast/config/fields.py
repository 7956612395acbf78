"""What a setting may hold: kinds, ranges, and the sections and whole configs that are checked by them."""

from __future__ import annotations

import ast
import dataclasses
import functools
import inspect
import math
import numbers
import re
import sys
import types
import typing
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

from spo_fast.config.errors import did_you_mean

if TYPE_CHECKING:
    from typing_extensions import Self


def require(condition: bool, message: str) -> None:
    """Raises ValueError with the message unless the condition holds."""
    if not condition:
        raise ValueError(message)


# ------------------------------------------------------------------------------------------------ what a field may hold


@dataclass(frozen=True)
class Range:
    """Where a number may lie, both for its check and for --help. NaN and infinity never do."""

    low: float = -math.inf
    high: float = math.inf
    ends: str = "[]"
    """Which of the limits belong to it: [ or ( and ] or )."""
    why: str = ""

    def __contains__(self, value: float) -> bool:
        above = value > self.low if self.ends[0] == "(" else value >= self.low
        below = value < self.high if self.ends[1] == ")" else value <= self.high
        return math.isfinite(value) and above and below

    def __str__(self) -> str:
        if self.high < math.inf:
            return f"in {self.ends[0]}{self.low}, {self.high}{self.ends[1]}"
        return f"{'above' if self.ends[0] == '(' else 'at least'} {self.low}"


Count = Annotated[int, Range(1)]
Whole = Annotated[int, Range(0)]
Positive = Annotated[float, Range(0, ends="(]")]
NotNegative = Annotated[float, Range(0)]
Share = Annotated[float, Range(0, 1, "[)")]
Threshold = Annotated[float, Range(-1, 1, "[)", why="probabilities differ by less than 1")]


NAMES = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}
TYPES: dict[type, type] = {int: numbers.Integral, float: numbers.Real, bool: bool, str: str}


@dataclass(frozen=True)
class Kind:
    """What a field takes, read off its annotation."""

    base: type
    range: Range | None
    choices: Collection[str]
    optional: bool
    many: bool

    @classmethod
    def of(cls, hint: Any) -> Kind:
        """A field's, from its type hint."""
        optional = typing.get_origin(hint) in (types.UnionType, typing.Union)
        if optional:
            hint = next(a for a in typing.get_args(hint) if a is not type(None))
        many = typing.get_origin(hint) is tuple
        if many:
            hint = typing.get_args(hint)[0]
        bounds = None
        if typing.get_origin(hint) is Annotated:
            hint, bounds = typing.get_args(hint)
        choices: Collection[str] = typing.get_args(hint) if typing.get_origin(hint) is Literal else ()
        if isinstance(bounds, Mapping):  # a table that may grow
            choices, bounds = bounds, None
        return cls(str if choices else hint, bounds, choices, optional, many)

    def check(self, label: str, value: Any) -> None:
        """Raise ValueError, beginning with the label, unless the field may hold the value."""
        if value is None:
            require(self.optional, f"{label} has no value.")
            return
        for one in value if self.many else (value,):
            self._check_one(label, one)

    def _check_one(self, label: str, value: Any) -> None:
        fits: bool = isinstance(value, TYPES[self.base]) and (self.base is bool or not isinstance(value, bool))
        if self.choices:
            known = ", ".join(self.choices)
            near = did_you_mean(value, self.choices)
            require(value in self.choices, f"{label}={value!r:.60} is none of {known}.{near}")
        elif not fits:
            raise ValueError(f"{label}={value!r:.60} is not {NAMES[self.base]}.")
        elif self.base is str:
            require(self.many or value != "", f"{label} is empty. Give a value, or leave it out.")
            broken = re.search("[\0\ud800-\udfff]", value)
            require(not broken, f"{label}={value!r:.60} holds a character that no text or path may have.")
        elif self.base is not bool:
            require(math.isfinite(value), f"{label}={value} is not a finite number.")
            why = f": {self.range.why}" if self.range and self.range.why else ""
            require(self.range is None or value in self.range, f"{label}={value!s:.60} must be {self.range}{why}.")
            # float32 ends at 3e38, and AdamW divides its rate by as little as 1 - beta
            most = 1e30 if self.base is float else 2**63 - 1
            require(abs(value) <= most, f"{label}={value!s:.60} is too large a number.")


def parted(entries: Iterable[str]) -> list[str]:
    """Names of a list whose entries may hold several, parted by commas; each once."""
    return list(dict.fromkeys(name for entry in entries for name in entry.split(",") if name))


@functools.cache
def kinds_of(section: type) -> dict[str, Kind]:
    """A section's fields."""
    hints = typing.get_type_hints(section, include_extras=True)
    return {f.name: Kind.of(hints[f.name]) for f in dataclasses.fields(section)}


@dataclass(frozen=True, kw_only=True)
class Section:
    """Settings of one concern. Each field is checked by its annotation; what concerns several is checked below."""

    def __post_init__(self) -> None:
        for name, kind in kinds_of(type(self)).items():  # type: ignore[arg-type]  # mypy takes a class for its instance
            kind.check(name, getattr(self, name))


# ---------------------------------------------------------------------------------------------- preference optimisation


class Settings:
    """A whole run's settings: a dataclass of sections. Field names are flags, so a name is in one section only."""

    @classmethod
    def sections(cls) -> dict[str, type]:
        """The config's sections by name."""
        return typing.get_type_hints(cls)

    @classmethod
    def docs(cls) -> dict[str, str]:
        """Flat field name -> the docstring written under it, or its metadata's help."""
        return {f.name: doc_of(section, f) for section in cls.sections().values() for f in dataclasses.fields(section)}

    @classmethod
    def kinds(cls) -> dict[str, Kind]:
        """Flat field name -> what it may hold."""
        return {name: kind for section in cls.sections().values() for name, kind in kinds_of(section).items()}

    @classmethod
    def section_of(cls, name: str) -> str:
        """The section that owns a flat field name."""
        return next(s for s, c in cls.sections().items() if name in {f.name for f in dataclasses.fields(c)})

    def with_fields(self, **values: Any) -> Self:
        """A copy with flat field names set, e.g. cfg.with_fields(rank=8, eta=0.5). Unknown names raise KeyError."""
        parts: dict[str, dict[str, Any]] = {}
        for name, value in values.items():
            if name not in self.docs():
                raise KeyError(name)
            parts.setdefault(self.section_of(name), {})[name] = value
        new = {s: dataclasses.replace(getattr(self, s), **v) for s, v in parts.items()}
        return dataclasses.replace(self, **new)  # type: ignore[type-var]  # subclasses are dataclasses

    def flat(self) -> dict[str, Any]:
        """Every setting under its flag name; tuples as lists, so that it can be written as YAML or JSON."""
        values = {}
        for section in self.sections():
            for name, value in dataclasses.asdict(getattr(self, section)).items():
                values[name] = list(value) if isinstance(value, tuple) else value
        return values


def doc_of(section: type, field: dataclasses.Field[Any]) -> str:
    """A field's docstring, that of the class that declares it."""
    written = (docstrings(c.__module__).get(c.__name__, {}) for c in section.__mro__)
    return field.metadata.get("help") or next((docs[field.name] for docs in written if field.name in docs), "")


@functools.cache
def docstrings(module: str) -> dict[str, dict[str, str]]:
    """Class name -> field name -> its docstring, of the classes of a module."""
    docs: dict[str, dict[str, str]] = {}
    try:
        source = inspect.getsource(sys.modules[module])
    except (KeyError, TypeError, OSError):  # built in, or typed at a prompt
        return docs
    for node in ast.parse(source).body:
        if not isinstance(node, ast.ClassDef):
            continue
        for statement, after in zip(node.body, node.body[1:], strict=False):
            if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
                text = after.value if isinstance(after, ast.Expr) else None
                if isinstance(text, ast.Constant) and isinstance(text.value, str):
                    docs.setdefault(node.name, {})[statement.target.id] = " ".join(text.value.split())
    return docs
