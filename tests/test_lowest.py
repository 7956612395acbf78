"""The lower bounds of pyproject.toml: installed by `make test-lowest`, and checked where a package is optional."""

from __future__ import annotations

import contextlib
import re

import pytest

tomllib = pytest.importorskip("tomllib")  # Python 3.11

from lowest import PROJECT, lowest  # noqa: E402

from spo_fast.config import optional_packages  # noqa: E402


@pytest.mark.parametrize(
    ("version", "old"), [("0.48.2", True), ("0.49.0.dev1", True), ("0.50.0", False), ("1.0", False)]
)
def test_extras_that_are_too_old(monkeypatch: pytest.MonkeyPatch, version: str, old: bool) -> None:
    monkeypatch.setattr(optional_packages.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(optional_packages.importlib.metadata, "version", lambda name: version)
    found = re.escape(f"or use --optimizer adamw. Here it is {version}, which is too old")
    with pytest.raises(ImportError, match=found) if old else contextlib.nullcontext():
        optional_packages.check_extras({"optimizer": "adamw8bit", "report_to": "wandb"})


def test_lower_bounds_are_written_once() -> None:
    """What `make test-lowest` installs is what pyproject.toml says, and that is what the program checks."""
    project = tomllib.loads(PROJECT.read_text())["project"]
    of_extras = project["optional-dependencies"]
    found = lowest([*project["dependencies"], *of_extras["test"]])
    assert {"diffusers==0.36", "transformers==4.57.1", "peft==0.18"} <= set(found)
    assert not [name for name in found if name.startswith("torch==")]
    for package, least in optional_packages.LEAST.items():
        bound = f"{package}=={'.'.join(map(str, least))}"
        extra = next(extra for name, extra, _ in optional_packages.NEEDS.values() if name == package)
        assert bound in found and bound in lowest(of_extras[extra])
    with pytest.raises(ValueError, match="einops in pyproject.toml has no lower bound"):
        lowest(["einops"])
