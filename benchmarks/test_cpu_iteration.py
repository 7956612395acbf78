"""`pytest benchmarks/test_cpu_iteration.py`: the published strategy beside ours on this CPU, for the toy's networks and
for 37 M weights, every pair kept and half of them.

Ratios of CPU seconds turn by turn, peak memory, errors against float64. Records are appended to
results/<date>_cpu_iteration.jsonl. Minutes for the toy, half an hour for the other: `-k toy` takes one.
"""

from __future__ import annotations

import pytest

from benchmarks import cpu_iteration
from benchmarks.records import results_path


@pytest.mark.parametrize("size", ["toy", "mid"])
def test_cpu_iteration(size, capsys):
    path = results_path("iteration", "cpu")
    found = cpu_iteration.run(path, size, list(cpu_iteration.CONTENDERS), (1.0, 0.5), turns=5)
    with capsys.disabled():
        print(f"\n{size}, appended to {path}\n{cpu_iteration.summary(found)}")
    assert [r["name"] for r in found if r["gate"] != "passed"] == []  # speed does not count without
