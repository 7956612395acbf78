"""Labels that conflict with aesthetics: what the runs are made of, and what their records are made to say, by hand."""

from __future__ import annotations

import itertools
import json
import math

import pytest
import torch

from benchmarks import conflict
from benchmarks.records import fill
from spo_fast.data import toy_world
from spo_fast.toy import claims
from spo_fast.toy.claim_tables import GRID

BASE = claims.read(conflict.BASE)["base"]["guidance 2"]


def run(gain, layout=0.0):
    scores = {"aesthetics": gain, "layout": layout}
    return {"learning_rate": 5e-4, **{name: [BASE[name][0] + value, 0.0, 512] for name, value in scores.items()}}


def made_up():
    """SPO gains 1 less .1, .2, .3 times the share; Diffusion-DPO .8 less 1.1, 1.2, 1.3 times it."""
    right = {"right": [0.7, 0.03, 60]}
    steps = {f"{t}": {"aesthetics": right} for t in (900, 500, 100)}
    records = {}
    for share in conflict.SHARES:
        for seed in conflict.SEEDS:
            records[conflict.key("spo", share, seed)] = run(1 - (seed + 1) * share / 10)
            records[conflict.key("dpo", share, seed)] = run(0.8 - (11 + seed) * share / 10, -0.1)
            for name in conflict.METHODS:
                records[conflict.key(name, share, seed)]["share"] = share
            record = {"share": share, "accuracy": {"trained": {"0": [0.8, 0.02, 500]}}, "trained_steps": [1, 3]}
            whole = {conflict.mechanism.WHOLE: {"aesthetics": {"right": [0.9, 0.05, 60]}}}
            records[conflict.key("judge", share, seed)] = {**record, "children": {**steps, **whole}}
    return records


def test_the_answers_by_hand():
    """What is left of a line is 0, .1 share and -.1 share of the three seeds: 2 * .01 * .46875 in all, over 13 degrees
    of freedom and over the shares' own 3 * .15625, the root of it times 2.160: .0847."""
    rows = [row.split(" | ") for row in conflict.answers(made_up()).splitlines()[2:]]
    assert [row[-1].rstrip(" |") for row in rows] == ["yes", "yes", "yes", "reproduced (3 seeds)"]
    assert "-1.20 (-1.28 to -1.12)" in rows[0][1] and "-0.20 (-0.28 to -0.12)" in rows[1][1]
    # -.1 / 1 + 1.1 / .8, and so on: 1.275, 1.3, 1.325, a quarter as far apart
    assert "+1.30 (+1.28 to +1.32)" in rows[2][1]
    flat = conflict.slope(conflict.SHARES, [[0.0, 0.3], [0.3, 0.0], [0.0, 0.3], [0.3, 0.0], [0.0, 0.3]])
    assert abs(flat[0]) < 1e-9 and flat[1] > 0.2
    # at .5: .95 - .25, .9 - .2, .85 - .15
    assert "+0.70" in rows[3][1]
    coin = made_up() | {f"random picks/0.5/{seed}": run(gain) for seed, gain in enumerate((-0.1, 0.1, 0.0))}
    assert "| +0.00 ± 0.06 " in conflict.answers(coin) and conflict.answers(coin).endswith("| -0.10, +0.10, +0.00  |")
    some = {cell: r for cell, r in made_up().items() if not cell.endswith("/2") and cell not in ("spo/0.5/1",)}
    assert "5 shares, 1 seed:" in conflict.answers(some) and "fewer than three seeds" in conflict.answers(some)


def test_the_table_and_the_figure(tmp_path):
    table = conflict.table(made_up()).splitlines()  # the error is the base's, .039: seeds differ by .05 / sqrt 3
    assert len(table) == 2 + len(conflict.SHARES) and "+0.90 ± 0.04" in table[-1] and "-0.100" in table[-1]
    # the trained steps are the last two of three: .7 with .03 / sqrt 2
    assert conflict.agreement(made_up()["judge/0/0"], "aesthetics") == pytest.approx((0.7, 0.03 / math.sqrt(2)))
    assert conflict.agreement(made_up()["judge/0/0"], "aesthetics", whole=True) == pytest.approx((0.9, 0.05))
    conflict.draw(made_up(), tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 10_000


def test_tables_are_put_where_their_command_is_named(tmp_path):
    page = tmp_path / "page.md"
    of_x, of_y = (
        f"<!-- python -m benchmarks.{name} -->\n\n{text}\n\n<!-- up to here -->\n" for name, text in ("x1", "y2")
    )
    page.write_text("a\n\n" + of_x + "\nb\n" + of_y)
    before = page.read_text()
    fill(page, "| new |", "x")
    assert page.read_text() == before.replace("\n1\n", "\n| new |\n")


def test_a_coin_prefers_nothing():
    pairs = conflict.by_coin(400, torch.Generator().manual_seed(0), toy_world.TRAIN)
    assert all(toy_world.layout(x, pairs.prompts).all(1).float().mean() > 0.99 for x in pairs.pixels)
    nicer = toy_world.aesthetics(pairs.pixels[0]) > toy_world.aesthetics(pairs.pixels[1])
    assert abs(float((nicer == pairs.labels.bool()).float().mean()) - 0.5) < 0.1


def test_the_toys_own_share_is_as_stated():
    """Of draw_pairs' labels, those against aesthetics that agree with a difference of layouts."""
    pairs = toy_world.draw_pairs(4000, torch.Generator().manual_seed(3))
    right, looks = [], []
    for x in pairs.pixels:
        right.append(toy_world.layout(x, pairs.prompts).sum(1))
        looks.append(toy_world.aesthetics(x))
    side = 2 * pairs.labels - 1
    against = (side * (looks[0] - looks[1]) < 0) & (side * (right[0] - right[1]) > 0)
    assert abs(float(against.float().mean()) - conflict.NATURAL) < 0.02


def test_rates_are_chosen_for_each_share_before_seeds_are_run():
    """SPO's best of the grid is 1e-3 at .25 and its lowest elsewhere, so that there a lower one is tried."""
    records, order = {}, []
    while run := next(conflict.missing(records), None):
        what, share, seed, rate = run
        order.append(conflict.key(*run))
        best = 1e-3 if what == "dpo" or share == 0.25 else 5e-4
        aesthetics = 6 - abs(math.log((rate or best) / best))
        scores = {"layout": [1.0, 0.0, 128], "aesthetics": [aesthetics, 0.1, 128]}
        records[order[-1]] = {"cell": order[-1], "share": share, "seed": seed, "learning_rate": rate, **scores}
    order, more = order[:79], order[79:]
    assert len(order) == len(set(order)) == 15 + 5 * 3 + 5 * 3 + 4 + 30
    # both gain as much at .5: undecided to the end
    assert more[:27] == [f"{what}/0.5/{seed}" for seed in range(3, 12) for what in ("judge", "spo", "dpo")]
    assert more[27:] == [f"random picks/0.5/{seed}" for seed in range(12)]
    assert records["random picks/0.5/3"]["learning_rate"] == records["spo/0.5/3"]["learning_rate"]
    assert order[:6] == ["judge/0/0", *(f"spo/0/tuning/{rate:g}" for rate in (*GRID, 2e-4)), "spo/0/0"]
    for name, share in itertools.product(conflict.METHODS, ("0", "0.25", "0.5")):
        tuned = [i for i, cell in enumerate(order) if cell.startswith(f"{name}/{share}/tuning")]
        assert max(tuned) < order.index(f"{name}/{share}/0") < order.index(f"judge/{share}/1")
    assert [cell for cell in order if "tuning/0.0002" in cell] == [
        f"spo/{s}/tuning/0.0002" for s in (0, 0.125, 0.375, 0.5)
    ]
    rates = {cell: r["learning_rate"] for cell, r in records.items()}
    assert (
        rates["spo/0.25/2"] == rates["dpo/0.5/1"] == 1e-3 and rates["spo/0.5/0"] == 5e-4 and rates["judge/0/1"] is None
    )


def test_an_answer_at_the_largest_share_needs_no_more_seeds():
    left = list(conflict.missing(made_up() | rates_of_all()))
    assert [conflict.key(*cell) for cell in left] == [f"random picks/0.5/{seed}" for seed in conflict.SEEDS]
    undecided = made_up() | {"spo/0.5/1": {**run(0.2), "share": 0.5}}
    assert conflict.next_look(made_up()) == 0 and conflict.next_look(undecided) == 6
    assert [conflict.key(*cell) for cell in conflict.missing(undecided | rates_of_all())][:3] == [
        "judge/0.5/3",
        "spo/0.5/3",
        "dpo/0.5/3",
    ]
    assert len(conflict.at_most({**undecided, "spo/0.5/3": run(0.2)})) == 3  # which has no Diffusion-DPO beside it


def rates_of_all():
    """Tuning runs whose best is the middle of the grid."""
    rates = [(f"{n}/{s:g}/tuning/{r:g}", r, s) for n in conflict.METHODS for s in conflict.SHARES for r in GRID]
    return {cell: {**run(1.0 - abs(rate - 1e-3)), "cell": cell, "share": share} for cell, rate, share in rates}


def test_every_record_has_its_command_and_no_path():
    text = conflict.RECORDS.read_text()
    assert "/tmp" not in text and "/home" not in text and "/work/" not in text
    records = list(map(json.loads, text.splitlines()))
    assert len({r["cell"] for r in records}) == len(records) > 0
    for record in records:
        assert record["command"].endswith(f"--run {record['cell']}") and record["commit"]


@pytest.mark.slow
def test_a_small_sweep(tmp_path, monkeypatch):
    """A judge on few pairs, SPO by it and Diffusion-DPO on the same pairs, each for a tiny budget."""
    for name, value in {"PAIRS": 256, "CAPTIONED": 256, "CLEAN_EPOCHS": 1, "CAPTION_EPOCHS": 1, "STEPS": 2}.items():
        monkeypatch.setattr(conflict, name, value)
    monkeypatch.setattr(conflict, "BUDGET", 600)
    monkeypatch.setattr(claims, "PICTURES", 66)
    judged = conflict.made(tmp_path, "judge", 0.5, 1, None)
    assert judged["accuracy"]["trained"]["501"] and "children" not in judged
    found = [conflict.made(tmp_path, name, 0.5, 1, 1e-3) for name in conflict.METHODS]
    assert all(record["spent"] >= 600 and len(record["curve"]) == 1 for record in found)
    assert str(tmp_path) not in json.dumps([judged, *found])
