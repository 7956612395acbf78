"""Half of the batch: which runs are wanted, and what their records are made to say, by hand."""

from __future__ import annotations

import json

import pytest

from benchmarks import batch_sizes
from spo_fast.toy import claims
from spo_fast.toy.claim_tables import TUNING_SEED


def half(world, name, gains):
    """Tuning runs whose aesthetics are so far above the claims' best."""
    mine = batch_sizes.known(world)
    best = mine[f"{name}/tuning/{batch_sizes.rates(world, name)[1]:g}"]
    found = {}
    for rate, gain in zip(batch_sizes.rates(world, name), gains, strict=True):
        scores = {"aesthetics": [best["aesthetics"][0] + gain, 0.0, 128], "layout": best["layout"]}
        found[batch_sizes.key(world, name, rate)] = {**scores, "optimizer_steps": 99, "learning_rate": rate}
    return found


@pytest.mark.parametrize(
    ("gains", "says"), [((0.0, 0.5, 0.0), "yes"), ((-0.5, -0.9, -0.6), "no"), ((-0.5, 0.01, 0.0), "no difference")]
)
def test_what_half_of_the_batch_is_said_to_do(gains, says):
    records = half("toy", "ddpo", gains)
    whole, rate, gap, error = batch_sizes.compared("toy", "ddpo", records)
    assert whole == 2e-3 and gap == pytest.approx(max(gains)) and 0.02 < error < 0.1
    assert rate == batch_sizes.rates("toy", "ddpo")[gains.index(max(gains))]
    (row,) = [r for r in batch_sizes.table("toy", records).splitlines() if r.startswith("| ddpo")]
    assert f"| {says} " in row and f"{max(gains):+.2f} ± " in row and "| 20 " in row and "| 128 " in row
    wanted = [run for run in batch_sizes.missing("toy", records) if run[0] == "ddpo"]
    assert wanted == ([("ddpo", 2e-3, seed) for seed in (0, 1, 2)] if says == "yes" else [])


def test_a_rate_that_costs_the_layout_is_not_the_best():
    records = half("toy", "ddpo", (0.3, 0.5, 0.0))
    records[batch_sizes.key("toy", "ddpo", 2e-3)]["layout"] = [0.5, 0.0, 128]
    assert batch_sizes.compared("toy", "ddpo", records)[1] == 1e-3


def test_the_seeds_stand_beside_the_claims():
    records = half("toy", "ddpo", (0.0, 0.5, 0.0))
    for seed in (0, 1, 2):
        records[batch_sizes.key("toy", "ddpo", 2e-3, seed)] = {"aesthetics": [7.0 + seed, 0.1, 512]}
    row = next(r for r in batch_sizes.table("toy", records).splitlines() if r.startswith("| ddpo"))
    assert "8.00 ± 0.58; whole 6.51 ± 0.04" in row
    assert "not run" in batch_sizes.table("toy", {}) and batch_sizes.compared("toy", "ddpo", {}) is None


def test_methods_are_those_with_a_rate_of_their_own():
    assert {"spo", "dpo", "ddpo", "stepgrpo", "lpo"} <= set(batch_sizes.methods("toy"))
    assert not {"random picks", "dpok", "lpo"} & set(batch_sizes.methods("flow"))
    assert [batch_sizes.own_batch("flow", n) for n in ("spo", "dpo", "ddpo")] == [16, 16, 20]
    runs = list(batch_sizes.missing("flow", {}))
    assert all(seed == TUNING_SEED for _, _, seed in runs) and len(runs) == 3 * len(batch_sizes.methods("flow"))


def test_every_record_has_its_command_and_no_path():
    records = claims.read(batch_sizes.RECORDS)
    text = json.dumps(records)
    assert "/tmp" not in text and "/home" not in text and "/work/" not in text
    for cell, record in records.items():
        assert record["command"].endswith(f"--run {cell}") and record["commit"]
        assert record["train_batch_size"] == batch_sizes.own_batch(record["world"], record["name"]) // 2
