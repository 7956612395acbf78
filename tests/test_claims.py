"""The claims runner: what it plans, counts, chooses and concludes, on made-up records; and one small run of its own."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
from pathlib import Path

import pytest
import torch

from spo_fast.toy import claim_tables, claims, contenders
from spo_fast.toy.claim_tables import CLAIMS, GRID, SEEDS, TUNING_SEED, key
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
        "settings": CONTENDERS[name].recorded,
        "spent": 24000,
        "curve": curve,
        **scores(aesthetics, layout),
    }


def base():
    rows = {f"guidance {g}": scores(6.0) for g in (1, 2, 3, 5)}
    return {"cell": "base", "tuning": scores(6.0), "marks": scores(6.0), **rows}


def records_of(*rows):
    return {r["cell"]: r for r in (base(), *rows)}


def test_the_plan_is_in_order_of_importance_and_complete():
    plan = claim_tables.plan()
    cells = [key(*run) for run in plan]
    assert len(set(cells)) == len(cells)
    tuned = [name for name, c in CONTENDERS.items() if not c.like]
    assert len(plan) == len(CONTENDERS) * len(SEEDS) + len(tuned) * len(GRID)
    assert {name for name, *_ in plan[: len(MAIN) * (len(GRID) + len(SEEDS))]} == set(MAIN)
    for name in MAIN:  # the grid comes before the seeds that need it
        assert max(cells.index(key(name, TUNING_SEED, lr)) for lr in GRID) < cells.index(key(name, 0))


def test_the_learning_rate_is_the_best_that_keeps_the_layout():
    grid = [record("spo", TUNING_SEED, a, layout, lr) for (a, layout), lr in zip(
        [(6.5, 1.0), (7.0, 0.99), (8.0, 0.98), (9.0, 0.90), (9.0, 0.90), (7.0, 0.98)], GRID, strict=True)]  # fmt: skip
    assert claim_tables.chosen_rate("spo", records_of(*grid)) == GRID[2]
    assert claim_tables.chosen_rate("winner start", records_of(*grid)) == GRID[2]  # an ablation takes SPO's
    assert claim_tables.chosen_rate("mspo", records_of(*grid)) is None
    assert claim_tables.chosen_rate("spo", records_of(*grid[:3])) is None
    assert claim_tables.chosen_rate("spo", {r["cell"]: r for r in grid}) is None  # what the layout was is not known


def test_runs_at_a_rate_that_the_grid_no_longer_chooses_are_made_again():
    grid = [record("spo", TUNING_SEED, 6 + n, lr=lr) for n, lr in enumerate(GRID)]
    old, ablation, other = (
        record(name, 0, 7.0, lr=lr) for name, lr in (("spo", 5e-4), ("random picks", 5e-4), ("dpo", 1e-3))
    )
    for row in (old, ablation, other):
        row["cell"] = key(row["name"], 0)
    assert set(claims.current(records_of(*grid[:-1], old))) >= {"spo/0"}  # as long as the grid is not complete
    kept = set(claims.current(records_of(*grid, old, ablation, other)))
    assert kept == {"base", "dpo/0", *(r["cell"] for r in grid)}
    again = {**old, "learning_rate": GRID[-1]}
    assert "spo/0" in claims.current(records_of(*grid, old, again))  # the later record counts
    assert "dpo/0" not in claims.current(records_of({**other, "settings": {"method": "dpo", "beta": 5000.0}}))


@pytest.mark.parametrize(
    ("gains", "says"),
    [((1.0, 1.1, 0.9), "reproduced"), ((-1.0, -1.1, -0.9), "not reproduced"), ((1.0, -1.2, 0.3), "undecided"),
     ((0.5,), "not run"), ((), "not run")],
)  # fmt: skip
def test_verdicts(gains, says):
    rows = [record("spo", s, 7 + g) for s, g in enumerate(gains)] + [record("dpo", s, 7.0) for s, _ in enumerate(gains)]
    records = records_of(*rows)
    assert claim_tables.verdict(claim_tables.difference("spo", "dpo", records)) == says
    line = next(row for row in claim_tables.claims_table(records).splitlines() if "Diffusion-DPO" in row)
    assert line.rstrip(" |").endswith(says)


def test_what_has_not_run_shows_as_not_run():
    text = claim_tables.page(records_of(record("spo", 0, 7.0)), "a command")
    assert f"\n1 of {len(claim_tables.plan())} runs" in text
    assert sum("not run" in row for row in claim_tables.score_table(records_of()).splitlines()) == len(CONTENDERS)
    assert claim_tables.claims_table(records_of()).count("not run") == len(CLAIMS)


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
    assert "-0.500" in quarter and quarter.endswith("not reproduced |")  # 6.5 against 7.0


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


@pytest.mark.slow
def test_a_small_study_resumes_and_repeats_its_cells(tmp_path, monkeypatch, capsys):
    """Two contenders, one rate, one seed, a tiny budget: a second call runs nothing, --cell gives the same number."""
    for name, value in {"BUDGET": 600, "PICTURES": 66, "MARK_PICTURES": 65, "GRID": (1e-3,), "SEEDS": (0,)}.items():
        for part in (claim_tables, claims, contenders):
            if hasattr(part, name):
                monkeypatch.setattr(part, name, value)
    small = {"sample_batch_size": 2, "num_steps": 6, "branch_start": 3, "num_candidates": 2}
    few = {
        "spo": contenders.Contender(small),
        "random picks": contenders.Contender(small, like="spo", random_picks=True),
    }
    monkeypatch.setattr(contenders, "MAIN", few)
    monkeypatch.setattr(claim_tables, "MAIN", few)
    monkeypatch.setattr(contenders, "ABLATIONS", {})
    monkeypatch.setattr(claim_tables, "ABLATIONS", {})
    monkeypatch.setattr(contenders, "REST", {})
    monkeypatch.setattr(claim_tables, "REST", {})
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
