"""`pytest benchmarks/`: the paper's claims on the toy world, as far as --budget_s reaches; the rest shows as not run.

Records are benchmarks/results/toy_claims.jsonl; what is there is not run again. Asserts no ordering that is hoped for.
"""

from __future__ import annotations

import torch

from benchmarks.records import RESULTS
from spo_fast.toy import claim_tables, claims


def test_claims(pytestconfig, tmp_path, capsys):
    records = RESULTS / "toy_claims.jsonl"
    torch.set_num_threads(1)  # the records' number: sums, and so choices, depend on it
    claims.run_missing(records, tmp_path, pytestconfig.getoption("budget_s"))
    found = claims.current(claims.read(records))
    with capsys.disabled():
        print("\n" + claim_tables.page(found, "pytest benchmarks/test_claims.py"))
    claim_tables.plot(found, records.with_suffix(".png"))
    assert set(claims.ONCE) <= set(found)
    for r in found.values():
        assert r["command"] and "commit" in r and r["versions"]
        if r["cell"] not in claims.ONCE:
            assert r["spent"] >= claim_tables.BUDGET and r["curve"][-1]["spent"] == r["spent"]
