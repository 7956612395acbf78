"""docs/spo_fast.ipynb: its cells one after the other, in a directory of their own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

NOTEBOOK = Path(__file__).parent.parent / "docs" / "spo_fast.ipynb"


def cells() -> list[str]:
    found = json.loads(NOTEBOOK.read_text())
    assert (found["nbformat"], found["metadata"]["language_info"]["name"]) == (4, "python")
    assert not any(cell.get("outputs") for cell in found["cells"])
    return ["".join(cell["source"]) for cell in found["cells"] if cell["cell_type"] == "code"]


def test_its_cells_are_python() -> None:
    assert len(cells()) == 5
    for number, cell in enumerate(cells()):
        compile(cell, f"cell {number}", "exec")


@pytest.mark.slow
def test_it_runs_to_its_end_and_shows_pictures(tmp_path: Path) -> None:
    """As a notebook would: IPython's display is told to count pictures; the LoRA changes what diffusers draws."""
    shown = tmp_path / "IPython"
    shown.mkdir()
    (shown / "__init__.py").write_text("")
    (shown / "display.py").write_text("def display(picture):\n    print('shown', *picture.size)\n")
    (tmp_path / "notebook.py").write_text("\n".join(cells()))
    paths = os.pathsep.join([str(tmp_path), str(NOTEBOOK.parents[1])])
    done = subprocess.run(
        [sys.executable, "notebook.py"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": paths},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    sizes = [line for line in done.stdout.splitlines() if line.startswith("shown ")]
    assert len(sizes) == 6 and sizes[2:] == ["shown 96 96"] * 4
    assert "aesthetics" in done.stdout
