"""Does it do what it is for: whole runs of the toy over three seeds, judged by true scores training never sees.

Only what is robust is asserted. About ten minutes on two cores; `python -m benchmarks.toy` runs the same and keeps it.
"""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks import toy

SEEDS = [0, 1, 2]
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    records = toy.quality_records(SEEDS, tmp_path_factory.mktemp("quality") / "records.jsonl")
    print(toy.quality_table(records))
    return records


def of(runs: list[dict[str, Any]], picks: str) -> list[dict[str, Any]]:
    return [r for r in runs if r["picks"] == picks]


def test_aesthetics_rise(runs: list[dict[str, Any]]) -> None:
    for r in of(runs, "spm"):
        gain, error, pictures = r["scores"]["gain"]["aesthetics"]
        assert pictures >= 1000 and gain > 3 * error, r["run"]


def test_layout_stays(runs: list[dict[str, Any]]) -> None:
    for r in of(runs, "spm"):
        assert r["scores"]["gain"]["layout"][0] >= -0.03, r["run"]


def test_random_picks_raise_nothing(runs: list[dict[str, Any]]) -> None:
    """On average: one training on noise drifts either way by more than its pictures' standard error."""
    random_runs, spm_runs = of(runs, "random"), of(runs, "spm")
    assert all(r["optimizer_steps"] >= 0.7 * s["optimizer_steps"] for r, s in zip(random_runs, spm_runs, strict=True))
    gain, error = toy.gain_in("aesthetics", random_runs)
    assert gain < 3 * error


def test_candidates_differ_in_layout_early_only(runs: list[dict[str, Any]]) -> None:
    """The spread of layout among the children of one x_t falls with t."""
    for r in of(runs, "spm"):
        spread = {int(t): e[0] for t, e in r["layout_spread"].items()}
        parts = [(801, 951), (601, 751), (401, 551), (0, 351)]
        means = [sum(v := [s for t, s in spread.items() if low <= t <= high]) / len(v) for low, high in parts]
        assert means == sorted(means, reverse=True) and means[0] > 5 * means[-1], (r["run"], means)


def test_the_timestep_does_not_hurt(tmp_path_factory: pytest.TempPathFactory) -> None:
    """A step-aware model is not below the same training without the timestep by more than two standard errors."""
    records = toy.spm_records(SEEDS, tmp_path_factory.mktemp("spm") / "records.jsonl")
    print(toy.spm_table(records))
    for t in records[0]["accuracy"]["trained"]:
        gain, error = toy.gain_over("unconditioned", records, t)
        assert gain > -2 * error, t
