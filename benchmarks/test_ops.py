"""`pytest benchmarks/`: the op table of this machine, all its ratios from one run. Asserts facts, never a time.

Records are appended to results/<date>_<device>_ops.jsonl; without a CUDA device they are of small shapes, and say so,
but for those of test_cpu_table: real shapes on one thread of a CPU.
"""

from __future__ import annotations

import importlib

import pytest
import torch

from benchmarks import cpu_ops
from benchmarks.gpu_run import LAYER_OPS, OPS, summary
from benchmarks.records import Records, read, results_path
from benchmarks.timing import compare_on_cpu, time_cases
from spo_fast.ops.backend import available_backends

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SIZE = "full" if DEVICE == "cuda" else "tiny"
MODES = ("default",) if DEVICE == "cuda" else ()

ALL = (*OPS, *LAYER_OPS)
PATH = results_path("ops", DEVICE)


@pytest.mark.parametrize("bench", [importlib.import_module(f"benchmarks.bench_{op}") for op in ALL], ids=ALL)
def test_op_table(bench, capsys):
    records, earlier = Records(PATH, "ops", DEVICE, SIZE), len(read(PATH))
    time_cases(bench.cases(SIZE, DEVICE, MODES), records, DEVICE, SIZE)
    rows = read(PATH)[earlier:]
    with capsys.disabled():
        print(f"\n{DEVICE}, {SIZE} shapes, appended to {PATH}\n{summary(rows)}")
    measured = [r for r in rows if r["status"] == "ok"]
    assert not [r for r in rows if r["status"] == "failed"]
    for case in bench.cases(SIZE, DEVICE, MODES):
        mine = {r["contender"]: r for r in measured if r["name"] == case.name}
        assert set(mine) == set(case.contenders)
        assert set(mine) >= set(available_backends(case.name.split()[0], DEVICE))
        for row in mine.values():  # the style guide's bound: at most twice what eager errs
            assert row["max_error"] <= 2 * mine["eager"]["max_error"] + 1e-6
            assert row["n"] >= 3 and row["bytes"] == case.bytes_moved


@pytest.mark.skipif(DEVICE == "cuda", reason="a CPU's table, of a machine that has no better")
def test_cpu_table(capsys):
    records, earlier = Records(PATH, "cpu ops", "cpu"), len(read(PATH))
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for case in cpu_ops.cases():
            compare_on_cpu(case, records)
    finally:
        torch.set_num_threads(before)
    rows = read(PATH)[earlier:]
    with capsys.disabled():
        print(f"\none CPU thread, appended to {PATH}\n{cpu_ops.summary(rows)}")
    for row in rows:
        (eager,) = (r for r in rows if (r["name"], r["dtype"], r["contender"]) == (row["name"], row["dtype"], "eager"))
        # compile keeps more digits than eager in 16 bits, and is not ours to judge
        assert row["contender"] == "compile" or row["max_error"] <= 2 * eager["max_error"] + 1e-6
