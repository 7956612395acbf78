"""The reasons why design choices do not matter: what is measured, by hand, and what records are made to say."""

from __future__ import annotations

import json

import pytest
import torch

from benchmarks import design_choices
from spo_fast.toy import claims

JUDGE = torch.tensor([[0.9, 0.1], [0.1, 0.2], [0.5, 0.15]])  # (K, B)
LOOKS = torch.tensor([[3.0, 3.0], [5.0, 2.0], [4.0, 7.0]])
THREE = torch.stack([JUDGE, torch.ones_like(JUDGE), LOOKS])


def test_what_a_comparison_tells_by_hand():
    """Best and worst are children 0 and 1, 1 and 0. Softmaxes differ by tanh(.4) = .38 and tanh(.05) = .05."""
    assert design_choices.told_by(THREE, 0.2).tolist() == [-2, 0]
    assert design_choices.told_by(THREE, 0.01).tolist() == [-2, -1]
    assert design_choices.ahead(THREE).tolist() == pytest.approx([3 - 4, 2 - 4])


SIX = (0.4, 0.5, 0.6, 0.4, 0.5, 0.6)


@pytest.mark.parametrize(
    ("gap", "apart", "by_a_comparison", "by_a_rollout", "gains", "says"),
    [
        (0.05, 0.3, 0.1, -1.0, SIX, ["holds", "holds", "holds", "holds"]),
        (0.5, 0.5, -0.1, -1.0, [-gain for gain in SIX], ["fails", "fails", "fails", "fails"]),
        (0.15, 0.38, 0.01, -1.0, (-0.4, 0.5, 0.6, 0.0, 0.1, 0.2), ["undecided"] * 4),
        (0.05, -0.3, 0.1, 1.0, SIX, ["holds", "holds", "holds", "fails"]),
        (0.05, -0.5, 0.065, -1.0, SIX, ["holds", "fails", "holds", "undecided"]),
    ],
)
def test_the_answers_by_hand(gap, apart, by_a_comparison, by_a_rollout, gains, says):
    """1.96 standard errors of .03 are .06, 2.24 are .067; .089 between seeds makes 3.81 * .089 / sqrt 6 = .14 of six;
    a fifth of what random starts tell is .4."""
    starts = {"random": [2.0, 0.1, 128], "winner - random": [0.0, 0.03, 128], "loser - random": [apart, 0.03, 128]}
    start = {"winner - loser": [gap, 0.03, 128], "ahead of siblings, summed over steps": [2.0, 0.1, 128]}
    told = {"by a comparison": [by_a_comparison, 0.03, 128], "by a rollout": [by_a_rollout, 0.03, 128]}
    base = claims.read(design_choices.WORLDS["toy"])["base"]["guidance 2"]["aesthetics"][0]
    records = {"start": start, "starts": starts, "told again": {"mspo - spo": told}}
    for seed, gain in enumerate(gains):
        records[f"high/{seed}"] = {"aesthetics": [base + gain, 0.02, 512], "layout": [1.0, 0.0, 512]}
    rows = design_choices.answers(records).splitlines()[2:]
    assert [row.split(" | ")[-1].rstrip(" |") for row in rows] == says


def test_the_tables_are_of_the_records():
    assert len(design_choices.choices_table().splitlines()) == 2 + len(design_choices.CHOICES)
    records = claims.read(design_choices.RECORDS)
    text = json.dumps(records)
    assert "/tmp" not in text and "/home" not in text and "/work/" not in text
    for name, record in records.items():
        assert name in design_choices.EXPERIMENTS
        assert record["command"].endswith(f"--run {name}") and record["commit"]
