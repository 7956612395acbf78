"""The claims runner: what it plans, counts, chooses and concludes, on made-up records; and one small run of its own."""

from __future__ import annotations

import json
import math
import os
import shlex
import shutil
import signal
from pathlib import Path

import pytest
import torch

from benchmarks import method_places
from spo_fast import train
from spo_fast.config.errors import RunError
from spo_fast.config.methods import METHODS
from spo_fast.toy import claim_tables, claims, contenders
from spo_fast.toy.claim_tables import CLAIMS, GRID, LADDER, LOOKS, QUESTIONS, SEEDS, TUNING_SEED, key
from spo_fast.toy.contenders import CONTENDERS, MAIN
from spo_fast.training import loop, preference_run

ROOT = Path(__file__).parent.parent


def scores(aesthetics, layout=1.0):
    return {
        "aesthetics": [aesthetics, 0.05, 512],
        "layout": [layout, 0.002, 512],
        **{c: [0.1, 0.01, 512] for c in ("held_out", "out_of_range", "diversity")},
    }


def record(name, seed, aesthetics, layout=1.0, lr=None):
    curve = [{"spent": n * 6000, **scores(6 + (aesthetics - 6) * n / 4)} for n in (1, 2, 3, 4)]
    return {
        "cell": key(name, seed, lr),
        "name": name,
        "seed": seed,
        "learning_rate": lr or 5e-4,
        "cpu_s": 60.0,
        "settings": CONTENDERS[name].on("small"),
        "spent": 24000,
        "curve": curve,
        **scores(aesthetics, layout),
    }


def base():
    rows = {f"guidance {g}": scores(6.0) for g in (1, 2, 3, 5)}
    return {"cell": "base", "tuning": scores(6.0), "marks": scores(6.0), **rows}


def records_of(*rows):
    return {r["cell"]: r for r in (base(), *rows)}


def made(wanted, aesthetics, until=10_000, names=tuple(CONTENDERS)):
    """Records of the runs that are wanted, one after the other, as run_missing makes them."""
    records, order = dict(wanted), []
    while (run := next(claim_tables.missing(records, names), None)) and len(order) < until:
        name, seed, lr = run
        order.append(key(*run))
        layout = 0.9 if lr is None and name == "unguided" else 1.0
        row = record(name, seed, aesthetics(name, seed, lr), layout, lr)
        row |= {"cell": key(*run), "learning_rate": lr or claim_tables.chosen_rate(name, records)}
        records[row["cell"]] = row
    return records, order


def far_apart(name, seed, lr):
    """Every contender elsewhere, seeds alike: each claim is decided by the first look. 1e-3 is the best rate."""
    return 5 + 2 * list(CONTENDERS).index(name) if lr is None else 7 - abs(math.log(lr / 1e-3))


def test_what_is_missing_is_in_order_of_importance_and_complete():
    records, order = made(records_of(), far_apart)
    assert len(set(order)) == len(order)
    tuned = [name for name, c in CONTENDERS.items() if not c.like]
    assert len(order) == len(CONTENDERS) * len(SEEDS) + len(tuned) * len(GRID)
    assert {what.split("/")[0] for what in order[: len(MAIN) * (len(GRID) + len(SEEDS))]} == set(MAIN)
    for name in MAIN:  # the rates come before the seeds that need them
        assert max(order.index(key(name, TUNING_SEED, lr)) for lr in GRID) < order.index(key(name, 0))
    assert {records[key(name, 0)]["learning_rate"] for name in CONTENDERS} == {1e-3}
    assert list(claim_tables.missing({}, ["spo"])) == [("spo", TUNING_SEED, GRID[0])]
    on_flow = {name for name, *_ in claim_tables.missing({}, size="flow")}
    assert set(tuned) - on_flow == {"mapo", "lpo"}  # refused there


@pytest.mark.parametrize("best", [LADDER[0], 1e-4, 5e-4, 1e-3, 5e-3, LADDER[-1]])
def test_the_grid_grows_while_its_best_is_an_end(best):
    peak = lambda name, seed, lr: 7 - abs(math.log(lr / best)) if lr else 7.0  # noqa: E731
    records, order = made(records_of(), peak, names=["spo"])
    assert claim_tables.chosen_rate("spo", records) == best == records["spo/0"]["learning_rate"]
    tried, at = set(claim_tables.rates_tried("spo", records)), LADDER.index(best)
    assert (
        set(LADDER[max(0, at - 1) : at + 2]) | set(GRID) <= tried
    )  # the best lies between two, or on the ladder's end
    assert len(order) == len(tried) + len(SEEDS)
    assert claim_tables.chosen_rate("winner start", records) == best  # an ablation takes SPO's
    assert claim_tables.chosen_rate("mspo", records) is None
    del records["base"]  # what the layout was is not known
    assert claim_tables.chosen_rate("spo", records) is None


def test_the_learning_rate_is_the_best_that_keeps_the_layout():
    found = {2e-4: (8.0, 0.98), 5e-4: (8.5, 0.971), 1e-3: (9.0, 0.969), 2e-3: (9.5, 0.9)}  # .03 may be lost
    grid = [record("spo", TUNING_SEED, a, layout, lr) for lr, (a, layout) in found.items()]
    assert claim_tables.chosen_rate("spo", records_of(*grid)) == 5e-4
    assert claim_tables.next_rate("spo", records_of(*grid[1:])) == 2e-4  # the best that may be chosen is an end
    lost = [record("spo", TUNING_SEED, a, 0.5, lr) for lr, (a, _) in found.items()]
    assert claim_tables.next_rate("spo", records_of(*lost)) == 5e-3  # if none keeps the layout, all count


def test_runs_at_a_rate_that_the_grid_no_longer_chooses_are_made_again():
    grid = [record("spo", TUNING_SEED, a, lr=lr) for a, lr in zip((6.0, 7.0, 8.0, 7.5), (*GRID, 5e-3), strict=True)]
    old, ablation, other = (
        record(name, 0, 7.0, lr=lr) for name, lr in (("spo", 5e-4), ("random picks", 5e-4), ("dpo", 1e-3))
    )
    for row in (old, ablation, other):
        row["cell"] = key(row["name"], 0)
    assert set(claims.current(records_of(*grid[:-1], old))) >= {"spo/0"}  # as long as there are rates to try
    kept = set(claims.current(records_of(*grid, old, ablation, other)))
    assert kept == {"base", "dpo/0", *(r["cell"] for r in grid)}
    again = {**old, "learning_rate": 2e-3}
    assert "spo/0" in claims.current(records_of(*grid, old, again))  # the later record counts
    assert "dpo/0" not in claims.current(records_of({**other, "settings": {"method": "dpo", "beta": 5000.0}}))


def gaps(*gains, error=0.01):
    return [(gain, error) for gain in gains]


@pytest.mark.parametrize(
    ("found", "says"),
    [
        (gaps(1.0, 1.1, 0.9), "reproduced (3 seeds)"),  # 1 / (.1 / sqrt 3) = 17.3 errors
        (gaps(-1.0, -1.1, -0.9), "not reproduced (3 seeds)"),
        (gaps(1.0, 1.3, 0.7), "undecided"),  # 5.8 errors: enough for a normal variable, not for Student's t
        (gaps(1.0, 1.1, 0.9, error=0.2), "undecided"),  # the same pictures: their error does not fall with seeds
        (gaps(1.0, 1.3, 0.7, 1.0, 1.3), "undecided"),  # nobody looks at five
        (gaps(1.0, 1.3, 0.7, 1.0, 1.3, 0.7), "reproduced (6 seeds)"),
        (gaps(1.0, 1.1, 0.9, -9.0, -9.0, -9.0), "reproduced (3 seeds)"),  # the first look that is sure decides
        (gaps(*[1.0, -1.0] * 6), "undecided"),
        (gaps(0.5, 0.5), "not run"),
        ([], "not run"),
    ],
)
def test_verdicts(found, says):
    assert claim_tables.verdict(found) == says
    rows = [record("spo", s, 7 + g) for s, (g, _) in enumerate(found)] + [
        record("dpo", s, 7.0) for s in range(len(found))
    ]
    line = next(row for row in claim_tables.claims_table(records_of(*rows)).splitlines() if "Diffusion-DPO" in row)
    if found and found[0][1] == 0.01 and says != "undecided":  # the errors of `record` are .05 each
        assert line.rstrip(" |").endswith(says)


@pytest.mark.parametrize("seeds", LOOKS)
def test_looks_are_students_t(seeds):
    """The tail of its density, summed: .0125 on both sides, and so of four looks at most one in twenty."""
    n = seeds - 1
    density = math.gamma(seeds / 2) / math.sqrt(n * math.pi) / math.gamma(n / 2)
    angle = torch.linspace(math.atan(LOOKS[seeds]), math.pi / 2, 200_001, dtype=torch.float64)[:-1]
    tail = torch.trapezoid(density * (1 + angle.tan() ** 2 / n) ** (-seeds / 2) / angle.cos() ** 2, angle)
    assert 2 * float(tail) == pytest.approx(0.05 / len(LOOKS), rel=2e-3)


def test_at_most_one_in_twenty_claims_about_nothing_gets_a_verdict():
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randn(4000, max(LOOKS), generator=generator, dtype=torch.float64)
    decided = sum(claim_tables.verdict([(g, 0.0) for g in row]) != "undecided" for row in drawn.tolist())
    assert 0.02 < decided / len(drawn) <= 0.05  # 200 +- 14 at the bound, which counts all looks as separate


def test_what_an_undecided_claim_needs():
    """The formula by hand: ((2.498 + .842) .3 / .3)^2 = 11.2, 12 and 2 more: 14 seeds, +-8.86 .3 / sqrt 3 around .3."""
    found = [(0.0, 0.01), (0.3, 0.01), (0.6, 0.01)]
    assert claim_tables.said(found) == "undecided: -1.23 to +1.83; about 14 seeds"
    assert claim_tables.needed([(0.2, 0.01), (0.3, 0.01), (0.4, 0.01)]).endswith(
        "about 6 seeds"
    )  # 4 by it: the next look
    assert claim_tables.needed([(g, 0.2) for g, _ in found]).endswith("14 seeds and more pictures")
    assert claim_tables.said(gaps(1.0, 1.1, 0.9)) == "reproduced (3 seeds)"


def test_more_seeds_are_run_where_a_claim_is_undecided():
    """SPO and the winner's start differ by chance, and the rest of all is far apart."""

    def near(name, seed, lr):
        if lr is None and name in ("spo", "winner start"):
            return 7 + 0.3 * math.sin(7 * seed + len(name))
        return far_apart(name, seed, lr)

    records, order = made(records_of(), near)
    extra = [what for what in order if what.split("/")[1] not in ("tuning", "0", "1", "2")]
    assert set(extra) >= {key(name, seed) for name in ("spo", "winner start") for seed in range(3, 12)}
    first = [what for what in extra if what.startswith(("spo/", "winner start/"))]
    assert [int(what.split("/")[1]) for what in first] == sorted(int(what.split("/")[1]) for what in first)
    assert max(int(what.split("/")[1]) for what in extra) == 11  # and no more: it stays undecided
    assert not any(what.startswith(("ddpo/", "grpo/", "nft/")) for what in extra)  # decided by the first look
    assert claim_tables.verdict(claim_tables.paired("spo", "winner start", records)) == "undecided"


def test_a_loss_of_aesthetics_is_a_sure_one_that_matters():
    for gap, says in ((0.2, "reproduced"), (-0.04, "reproduced"), (-0.2, "not reproduced")):
        assert claim_tables.no_loss([(gap, 0.01)] * 3) == says
    assert claim_tables.no_loss([(-0.2, 0.11)] * 3) == "reproduced" and claim_tables.no_loss([(0.0, 0.1)]) == "not run"
    rows = [record(name, s, a, layout) for s in SEEDS for name, a, layout in
            (("by noise level", 6.0, 0.99), ("unguided", 7.0, 0.90))]  # fmt: skip
    raised, lost = claim_tables.questions_table(records_of(*rows)).splitlines()[-2:]
    assert "+0.090" in raised and raised.rstrip(" |").endswith("| reproduced (3 seeds)")
    assert "-1.000" in lost and lost.rstrip(" |").endswith("| not reproduced")


def test_what_has_not_run_shows_as_not_run():
    text = claim_tables.page(records_of(record("spo", 0, 7.0)), "a command")
    assert f"\n1 of {len(CONTENDERS) * len(SEEDS)} runs" in text
    assert sum("not run" in row for row in claim_tables.score_table(records_of()).splitlines()) == len(CONTENDERS)
    assert claim_tables.claims_table(records_of()).count("not run") == len(CLAIMS)
    assert claim_tables.questions_table(records_of()).count("not run") == len(QUESTIONS)


def test_the_page_of_the_documents_is_what_the_command_writes(tmp_path, monkeypatch, capsys):
    """From the committed records, by the command that the page names."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "docs").mkdir()
    page = (ROOT / "docs/claims.md").read_text()
    command = shlex.split(page.split("`")[1])
    records = tmp_path / command[command.index("--records") + 1]
    records.parent.mkdir(parents=True)
    shutil.copy(ROOT / "benchmarks/results/toy_claims.jsonl", records)
    assert command[:3] == ["python", "-m", "spo_fast.toy.claims"] and claims.main(command[3:]) == 0
    assert (tmp_path / "docs/claims.md").read_text() == page == capsys.readouterr().out
    link = page.rsplit("](", 1)[1].rstrip(")\n")
    assert (tmp_path / "docs" / link).is_file() and (ROOT / "docs" / link).is_file()


def test_places_of_methods_and_the_table_in_the_documents(tmp_path, monkeypatch, capsys):
    rows = [record("spo", s, 7 + s / 10) for s in range(4)] + [record("dpo", 0, 7.5, 0.99), record("ddpo", 0, 5.9)]
    found = method_places.places(records_of(*rows), "flow")
    assert found["dpo"] == "1. +1.50 ± 0.05, layout -0.010, 1 seed"
    assert found["spo"] == "2. +1.15 ± 0.06, layout +0.000, 4 seeds"  # .129 / 2
    assert found["ddpo"].startswith("3. -0.10") and found["grpo"] == "not run" and found["mapo"] == "refused"
    assert set(method_places.CHOOSE) == set(METHODS)
    page = tmp_path / "methods.md"
    shutil.copy(method_places.PAGE, page)
    monkeypatch.setattr(method_places, "PAGE", page)
    method_places.main()
    assert page.read_text() == (ROOT / "docs/methods.md").read_text() and capsys.readouterr().out in page.read_text()


def test_compute_to_reach_a_level():
    tuning = [record(name, TUNING_SEED, 7.0, lr=lr) for name in ("spo", "dpo") for lr in GRID]
    records = records_of(*(record("spo", s, 8.0) for s in SEEDS), *(record("dpo", s, 7.0) for s in SEEDS), *tuning)
    assert claim_tables.rows_to_reach("spo", 7.0, records) == (pytest.approx(12000), False)
    assert claim_tables.rows_to_reach("dpo", 7.0, records) == (pytest.approx(24000), False)
    assert claim_tables.rows_to_reach("spo", 6.2, records) == (
        pytest.approx(6000),
        True,
    )  # what lies before is not known
    assert claim_tables.rows_to_reach("dpo", 7.5, records) is None
    assert "12,000 (30 s + the judge's)" in claim_tables.cost_table(
        records
    ) and "not reached" in claim_tables.cost_table(records)
    with_judge = claim_tables.cost_table(records | {"judge": {"cell": "judge", "cpu_s": 90.0}})
    assert "12,000 (30 s + 90 s)" in with_judge and "24,000 (60 s)" in with_judge  # dpo needs no judge


def test_layouts_are_matched_by_the_best_point_that_keeps_them():
    rows = [record("spo", s, 8.0) for s in SEEDS] + [record("dpo", s, 7.0) for s in SEEDS]
    for r in rows[: len(SEEDS)]:  # SPO's last quarter lost the layout
        r["curve"][-1]["layout"][0] = 0.5
    records = records_of(*rows)
    kept = claim_tables.layout_kept(records)
    assert claim_tables.difference("spo", "dpo", records, of_a=kept, of_b=kept)[0] == pytest.approx(7.5 - 7.0)
    line = next(row for row in claim_tables.claims_table(records).splitlines() if "equal compute" in row)
    assert "+1.000" in line and "+0.500" in line
    for r in rows[: len(SEEDS)]:
        for point in r["curve"]:
            point["layout"][0] = 0.5
    assert claim_tables.difference("spo", "dpo", records, of_a=kept, of_b=kept) is None
    quarter = next(row for row in claim_tables.claims_table(records).splitlines() if "quarter" in row)
    assert "-0.500" in quarter and " not reproduced" not in quarter  # 6.5 against 7.0, each .05: 7.1 errors


def test_points_on_the_way_are_moved_by_what_their_pictures_are_better():
    """The fewer pictures of the marks score .2 higher with the base model already."""
    records = records_of(*(record("spo", s, 8.0) for s in SEEDS), *(record("dpo", s, 7.0) for s in SEEDS))
    records["base"]["marks"] = scores(6.2)
    assert [p["aesthetics"][0] for p in claim_tables.curve_of(records["spo/0"], records)] == pytest.approx(
        [6.3, 6.8, 7.3, 8]
    )
    quarter = next(row for row in claim_tables.claims_table(records).splitlines() if "quarter" in row)
    assert "-0.700" in quarter
    assert claim_tables.rows_to_reach("spo", 6.8, records) == (pytest.approx(12000), False)


def test_rows_are_counted_as_they_cost():
    unet = torch.nn.Linear(3, 3)
    meter = claims.Meter(unet)
    with torch.no_grad():
        unet(torch.zeros(5, 3))
    unet(torch.zeros(2, 3))
    meter.on = False
    unet(torch.zeros(9, 3))
    assert meter.spent == 5 + 3 * 2


def test_a_run_that_counts_nothing_ends(tmp_path, monkeypatch):
    """As a replayed one: its forwards run no hook. On a GPU nothing is replayed therefore, nor compiled."""
    small = {"sample_batch_size": 1, "num_steps": 4, "branch_start": 2, "num_candidates": 2}
    monkeypatch.setattr(claims, "CONTENDERS", {"spo": contenders.Contender(small)})
    monkeypatch.setattr(claims.Meter, "_count", lambda *_: None)
    with pytest.raises(RunError, match="Iteration 0 of spo spent nothing"):
        claims.cell("spo", 0, 1e-3, tmp_path, budget=600)
    cfg = train.parse(["--model", "toy", *claims._endless()])
    assert cfg.engine.cuda_graphs is False and cfg.engine.compile == "off"


@pytest.mark.slow
def test_a_small_study_resumes_and_repeats_its_cells(tmp_path, monkeypatch, capsys):
    """Two contenders, one rate, one seed, a tiny budget: a second call runs nothing, --cell gives the same number."""
    for name, value in {
        "BUDGET": 600,
        "PICTURES": 66,
        "MARK_PICTURES": 65,
        "GRID": (1e-3,),
        "LADDER": (1e-3,),
        "SEEDS": (0,),
    }.items():
        for part in (claim_tables, claims, contenders):
            if hasattr(part, name):
                monkeypatch.setattr(part, name, value)
    small = {"sample_batch_size": 2, "num_steps": 6, "branch_start": 3, "num_candidates": 2}
    few = {
        "spo": contenders.Contender(small),
        "random picks": contenders.Contender(small, like="spo", random_picks=True),
    }
    monkeypatch.setattr(claim_tables, "MAIN", few)
    for group in ("REINFORCEMENT", "ABLATIONS", "BY_NOISE", "REST"):
        monkeypatch.setattr(claim_tables, group, {})
    monkeypatch.setattr(claim_tables, "GROUPS", (few,))
    monkeypatch.setattr(claims, "CONTENDERS", few)
    monkeypatch.setattr(claim_tables, "CONTENDERS", few)
    monkeypatch.setattr(claims.evaluate, "GUIDANCE_SCALES", (2.0,))
    path = tmp_path / "records.jsonl"
    common = ["--records", str(path), "--work_dir", str(tmp_path / "work")]
    monkeypatch.setattr(claims, "ONCE", {"base": claims.base})  # a judge trains for minutes
    assert claims.main([*common, "--budget_s", "0"]) == 0  # the base is always scored
    assert set(claims.read(path)) == {"base"}
    assert claims.main(common) == 0
    first = path.read_text()
    found = claims.read(path)
    assert set(found) == {"base", "spo/tuning/0.001", "spo/0", "random picks/0"}
    assert found["spo/0"]["spent"] >= 600 and found["spo/0"]["learning_rate"] == 1e-3
    assert path.with_suffix(".md").is_file() and path.with_suffix(".png").is_file()
    assert claims.main(common) == 0 and path.read_text() == first
    capsys.readouterr()
    *start, cell, name, flag, rate = shlex.split(found["spo/0"]["command"])  # alone, as whoever reads a record has it
    assert start == ["python", "-m", "spo_fast.toy.claims"] and (cell, name, flag) == (
        "--cell",
        "spo/0",
        "--learning_rate",
    )
    elsewhere = ["--records", str(tmp_path / "none.jsonl"), "--work_dir", str(tmp_path / "elsewhere")]
    assert claims.main([*elsewhere, cell, name]) == 1 and "needs --learning_rate" in capsys.readouterr().err
    assert claims.main([*elsewhere, cell, name, flag, rate]) == 0
    printed = capsys.readouterr().out
    again = json.loads(printed[printed.index("{") :])
    assert {k: again[k] for k in ("aesthetics", "layout", "spent", "pairs")} == {
        k: found["spo/0"][k] for k in ("aesthetics", "layout", "spent", "pairs")
    }
    iterate = loop.Run.iterate

    def stopped(run, *args):
        os.kill(os.getpid(), signal.SIGTERM)
        return iterate(run, *args)

    monkeypatch.setattr(loop.Run, "iterate", stopped)
    path.write_text("".join(line for line in first.splitlines(True) if "random picks" not in line))
    assert claims.main(common) == 1 and "before its budget was spent" in capsys.readouterr().err
    assert "random picks/0" not in claims.read(path)  # a run cut short is no result
    assert claims.main([*common, "--cell", "spo/7"]) == 1 and "is no run" in capsys.readouterr().err


def test_a_judge_that_was_stopped_is_no_result(tmp_path, monkeypatch, capsys):
    """A signal stops train_spm in good order: status 0, and no model."""
    monkeypatch.setattr(claims.build, "PAIRS", 240)
    iterate = preference_run.PreferenceRun.iterate

    def stopped(run, *args):
        os.kill(os.getpid(), signal.SIGTERM)
        return iterate(run, *args)

    monkeypatch.setattr(preference_run.PreferenceRun, "iterate", stopped)
    line = ["--cell", "judge", "--records", str(tmp_path / "records.jsonl"), "--work_dir", str(tmp_path / "work")]
    assert claims.main(line) == 1
    printed = capsys.readouterr()
    assert "was stopped" in printed.err and printed.err.count("\n") == 1 and '"cpu_s"' not in printed.out
