"""`pytest benchmarks/`: whole training iterations, published | modern eager | ours, a technique a row.

At full size on a CUDA device, at a tiny one on a CPU, where times mean nothing; either way only rows that agree with
float32 as well as the published strategy does are counted. Records are appended to
results/<date>_<device>_iteration.jsonl; what the budget (--budget_s) does not reach is recorded as skipped.
"""

from __future__ import annotations

import pytest
import torch

from benchmarks import gpu_run
from benchmarks.records import read, results_path

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SIZE = "full" if DEVICE == "cuda" else "tiny"


@pytest.mark.parametrize("kind", ["sd15", "sdxl"])
def test_iteration(kind, pytestconfig, tmp_path, capsys):
    budget = str(pytestconfig.getoption("budget_s"))
    rows = gpu_run.run_command(tmp_path, "--only", kind, "--budget_s", budget, "--size", SIZE, "--device", DEVICE)
    path = results_path("iteration", DEVICE)
    with path.open("a") as file:
        file.write((tmp_path / "records.jsonl").read_text())
    with capsys.disabled():
        print(f"\n{DEVICE}, {SIZE} networks, appended to {path}\n{gpu_run.summary(rows)}")
    assert not [r for r in rows if r["status"] == "failed"]
    # every row of the table is there, done or skipped, and none counts that is less exact than the published strategy
    said = {r["name"].removeprefix("job ") for r in rows if r["name"].startswith("job ")}
    assert said == set(gpu_run.STAGES[kind])
    assert all("gate" in r for r in rows if "/v=" in r["name"])
    assert len(read(path)) >= len(rows)
