"""What is said of children of one x_t: on made-up scores by hand, and on pictures that the world draws."""

from __future__ import annotations

import json

import pytest
import torch

from benchmarks import mechanism
from spo_fast.data import toy_world


def test_what_is_told_by_hand():
    judge = torch.tensor([[0.9, 0.1, 0.5], [0.1, 0.2, 0.5], [0.5, 0.3, 0.52]])  # (K, B)
    layout = torch.tensor([[1.0, 1.0, 1.0], [0.5, 1.0, 1.0], [0.5, 0.0, 1.0]])
    looks = torch.tensor([[3.0, 3.0, 4.0], [5.0, 2.0, 1.0], [4.0, 4.0, 2.0]])
    found = mechanism.told(torch.stack([judge, layout, looks]), threshold=0.15)
    # best and worst: children 0, 1 of the first; 2, 0 of the second; 2, 1 of the third, since of equal ones the
    # last counts as the worst. The softmax of .9 and .1 differs by tanh(.4) = .38, of .3 and .1 by tanh(.1) = .0997
    assert found["kept"][0] == pytest.approx(1 / 3)
    assert found["layout"]["differ"] == pytest.approx(2 / 3) and found["layout"]["right"][0] == 0.5
    assert found["aesthetics"]["differ"] == 1 and found["aesthetics"]["right"][0] == pytest.approx(2 / 3)
    # of three numbers: 1, .5, .5 deviate by .2887, 1, 1, 0 by .5774; 3, 5, 4 and 3, 2, 4 by 1, 4, 1, 2 by 1.5275
    assert found["layout"]["spread"][0] == pytest.approx((0.288675 + 0.577350) / 3, abs=1e-5)
    assert found["aesthetics"]["spread"][0] == pytest.approx((1 + 1 + 1.527525) / 3, abs=1e-5)
    alike = mechanism.told(torch.stack([judge, torch.ones_like(layout), looks]), threshold=0.15)["layout"]
    assert alike["right"] is None and alike["differ"] == 0


def test_children_are_scored_beside_their_own_prompts():
    class Pictures:
        """Two children of two prompts, in a rollout's order: all first children, then all second ones."""

        num_candidates, t = 2, torch.tensor(501)
        pixels = toy_world.draw([*toy_world.TEST[:2], *toy_world.TEST[1::-1]], torch.Generator().manual_seed(0))

        def pixel_chunks(self):
            yield slice(0, 3), self.pixels[:3]
            yield slice(3, 4), self.pixels[3:]

    watched = mechanism.Watched(lambda candidates: torch.arange(4.0), toy_world.TEST[:2])
    assert watched(Pictures()).tolist() == [0, 1, 2, 3]
    judge, layout, looks = watched.seen[501.0][0]
    assert judge.tolist() == [[0, 1], [2, 3]]
    assert layout[0].tolist() == [1, 1] and (layout[1] < 1).all()  # the second ones were drawn of each other's prompts
    assert torch.equal(looks.flatten(), toy_world.aesthetics(Pictures.pixels))


def test_the_figure_is_of_the_record(tmp_path):
    record = json.loads(mechanism.RECORD.read_text())
    assert record["command"] == "python -m benchmarks.mechanism" and record["children"] == mechanism.K
    assert len(mechanism.table(record).splitlines()) == 2 + len(record["toy"]) + len(record["toy-flow"])
    mechanism.draw(record, tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 10_000
