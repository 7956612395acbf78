"""Command lines, YAML files and prompt files that nobody thought of: settings, or one line that says what is wrong."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import math
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy

from spo_fast import train, train_spm
from spo_fast.config.fields import Kind, Settings
from spo_fast.config.preference import PreferenceConfig
from spo_fast.config.training import Config
from spo_fast.data.prompts import READERS, load_prompts

# derandomized: the same cases each time. tmp_path is shared by a test's cases, and each writes its file anew
FUZZ = settings(
    max_examples=100,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
TEXT = st.text(max_size=12) | st.sampled_from(
    ["", " ", "none", "null", "~", "yes", "no", "1e-5", "-", "--rank", "a\0b"]
)


def numbers(kind: Kind) -> SearchStrategy[Any]:
    """Around the limits of the field's range and far outside it."""
    limits = [v for r in [kind.range] if r for v in (r.low, r.high) if math.isfinite(v)]
    if kind.base is int:
        near = st.sampled_from([int(v) + d for v in limits or [0] for d in (-1, 0, 1)])
        return near | st.integers(1, 64) | st.integers()
    near = st.sampled_from([v + d for v in limits or [0] for d in (-1e-9, 0.0, 1e-9)])
    return near | st.floats(0, 1) | st.floats()


def values(kind: Kind) -> SearchStrategy[Any]:
    one = (
        st.sampled_from(tuple(kind.choices)) | TEXT
        if kind.choices
        else {bool: st.booleans(), str: TEXT}.get(kind.base) or numbers(kind)
    )
    return st.lists(one, max_size=3) if kind.many else one | st.none() if kind.optional else one


def some_settings(of: type[Settings]) -> SearchStrategy[dict[str, Any]]:
    """A few of the settings, most of them as they should be."""
    kinds = {name: kind for name, kind in of.kinds().items() if name != "model"}
    drawn = st.lists(st.sampled_from(sorted(kinds)), max_size=4, unique=True)
    return drawn.flatmap(lambda names: st.fixed_dictionaries({name: values(kinds[name]) for name in names}))


def as_flags(drawn: dict[str, Any]) -> list[str]:
    words = []
    for name, value in drawn.items():
        if isinstance(value, bool):
            words.append(f"--{name}" if value else f"--no-{name}")
        elif isinstance(value, list):
            words += [f"--{name}", *map(str, value)]
        else:
            words.append(f"--{name}={'none' if value is None else value}")
    return words


def parsed_or_one_line(module: Any, line: list[str]) -> Any:
    """The settings, or None where parse raised a ValueError of one line (or named a file that is not there)."""
    try:
        return module.parse(line)
    except (ValueError, FileNotFoundError) as error:
        assert str(error) and "\n" not in str(error) and "\r" not in str(error), str(error)
        return None


def check(module: Any, line: list[str], tmp_path: Path) -> None:
    cfg = parsed_or_one_line(module, line)
    if cfg is not None:
        saved = tmp_path / "config.yaml"
        saved.write_text(yaml.safe_dump(cfg.flat(), sort_keys=False))
        assert module.parse(["--config", str(saved)]) == cfg


BOTH = pytest.mark.parametrize(
    ("module", "config"), [(train, Config), (train_spm, PreferenceConfig)], ids=["train", "train_spm"]
)
MODELS = st.sampled_from(["toy", "sd15", "sdxl"])


@BOTH
def test_settings_as_flags(module: Any, config: type[Settings], tmp_path: Path) -> None:
    accepted = []

    @FUZZ
    @given(MODELS, some_settings(config))
    def run(model: str, drawn: dict[str, Any]) -> None:
        check(module, ["--model", model, *as_flags(drawn)], tmp_path)
        accepted.append(parsed_or_one_line(module, ["--model", model, *as_flags(drawn)]) is not None)

    run()
    assert 0.1 < sum(accepted) / len(accepted) < 0.9  # both outcomes are met


@BOTH
def test_settings_as_yaml(module: Any, config: type[Settings], tmp_path: Path) -> None:
    @FUZZ
    @given(MODELS, some_settings(config))
    def run(model: str, drawn: dict[str, Any]) -> None:
        file = tmp_path / "c.yaml"
        file.write_text(yaml.safe_dump({"model": model, **drawn}))
        check(module, ["--config", str(file)], tmp_path)

    run()


@FUZZ
@given(st.lists(TEXT | st.sampled_from(["--model", "toy", "--rank", "--config", "--scorer", "=", "--no-"]), max_size=5))
def test_any_words(words: list[str]) -> None:
    if "--help" not in words and "-h" not in words:
        parsed_or_one_line(train, words)


@FUZZ
@given(
    st.binary(max_size=60)
    | st.text(max_size=60).map(str.encode)
    | st.text("rank: 2[]{}&*!|>%@`'\"\\-?#\n\t U0xFe", max_size=40).map(str.encode)
)
def test_any_bytes_as_yaml(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "c.yaml"
    file.write_bytes(b"model: toy\n" + content)
    parsed_or_one_line(train, ["--config", str(file)])


# ------------------------------------------------------------------------------------------------------- prompt files

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(["caption", "text", "a\nb"]), inner),
    max_leaves=8,
)
ROWS = st.lists(st.lists(st.text(max_size=6) | st.just("caption"), max_size=3), max_size=4)


def as_csv(rows: list[list[str]]) -> bytes:
    out = io.StringIO()
    with contextlib.suppress(csv.Error):
        csv.writer(out).writerows(rows)
    return out.getvalue().encode("utf-8", "surrogatepass")


CONTENTS = st.one_of(
    st.binary(max_size=60),
    st.text(max_size=60).map(lambda text: text.encode("utf-8", "surrogatepass")),
    JSON.map(lambda value: json.dumps(value).encode()),
    st.lists(JSON, max_size=3).map(lambda values: "\n".join(map(json.dumps, values)).encode()),
    ROWS.map(as_csv),
)


@FUZZ
@given(st.sampled_from([*READERS, ".TXT", "", ".png"]), CONTENTS, st.none() | st.sampled_from(["caption", "a\nb", ""]))
def test_any_prompt_file(tmp_path: Path, suffix: str, content: bytes, column: str | None) -> None:
    file = tmp_path / f"prompts{suffix}"
    file.write_bytes(content)
    try:
        prompts = load_prompts(file, column)
    except ValueError as error:
        assert str(file) in str(error) and len(str(error).splitlines()) == 1, str(error)
        return
    assert prompts
    for prompt in prompts:
        assert isinstance(prompt, str) and prompt and prompt == prompt.strip()
        prompt.encode()  # a tokenizer can read it
