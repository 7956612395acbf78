"""`pytest benchmarks/`: how many GPU-hours against Diffusion-DPO; FLOPs everywhere, projections where a GPU has timed.

On a CUDA device what is missing is measured first, as far as --budget_s reaches. Records are appended to
results/<date>_<device>_gpu_hours.jsonl.
"""

from __future__ import annotations

import torch

from benchmarks import gpu_hours, gpu_run
from benchmarks.records import Records, results_path

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def test_gpu_hours(pytestconfig, tmp_path, capsys):
    path, failed = results_path("gpu_hours", DEVICE), []
    if DEVICE == "cuda" and (jobs := gpu_hours.missing_jobs(gpu_hours.gpu_records())):
        budget = str(pytestconfig.getoption("budget_s"))
        rows = gpu_run.run_command(tmp_path, "--only", *jobs, "--budget_s", budget)
        with path.open("a") as file:
            file.write((tmp_path / "records.jsonl").read_text())
        failed = [r for r in rows if r["status"] == "failed"]
    found = gpu_hours.gpu_records()
    gpu_hours.record(Records(path, "gpu_hours", DEVICE), found)
    with capsys.disabled():
        print(f"\nappended to {path}\n\n{gpu_hours.count_table()}\n\n{gpu_hours.projection_table(found)}")
    assert not failed
