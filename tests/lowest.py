"""The lowest versions that pyproject.toml allows, as pip takes them: python tests/lowest.py -> numpy==1.26 ...

torch is left out: its lowest version is to be had as a build of several gigabytes only, so the pinned one stays.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

import tomllib

PROJECT = Path(__file__).parents[1] / "pyproject.toml"
TOOLS = ("ruff", "mypy", "types-PyYAML")  # they judge the text of the program, which no version of a library changes


def lowest(requirements: Iterable[str]) -> list[str]:
    """name>=version -> name==version, each once, without torch and tools. Raises ValueError for one without a bound."""
    found = {}
    for requirement in requirements:
        text = requirement.split(";")[0].strip()
        bound = re.fullmatch(r"([\w.-]+)>=([\w.]+)", text)
        if bound is None and text not in TOOLS:
            raise ValueError(f"{text} in pyproject.toml has no lower bound: name>=version.")
        if bound is not None and bound[1] != "torch":
            found[bound[1]] = f"{bound[1]}=={bound[2]}"
    return list(found.values())


if __name__ == "__main__":
    project = tomllib.loads(PROJECT.read_text(encoding="utf-8"))["project"]
    print(*lowest([*project["dependencies"], *project["optional-dependencies"]["test"]]))
