"""Warnings: each told when its fault is there, once, with numbers; and what a run does about values not finite."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import built, facts, flags
from safetensors.torch import load_file

from spo_fast import train
from spo_fast.config.presets import toy
from spo_fast.evaluation.pages.run_record import read_metrics
from spo_fast.training import learner
from spo_fast.training.monitor import timer
from spo_fast.training.monitor.warnings import LN2, Watch
from spo_fast.training.processes import Group
from spo_fast.training.rollout_statistics import Pictures, gaps

FINE: dict[str, Any] = {"pairs": 5, "loss": 0.6, "dead": 0.1, "nonfinite_steps": 0, "saturation": 0.3, "flat_groups": 0}


def warnings_of(records: Iterable[dict[str, Any]]) -> list[tuple[int, str]]:
    """(index of the record, warning) for each warning of a run of such records."""
    watch = Watch(toy())
    return [(i, text) for i, record in enumerate(records) for text in watch.look({**FINE, **record})]


def test_a_healthy_run_is_quiet() -> None:
    losses = [LN2, *(0.69 - 0.0005 * i for i in range(200))]
    assert warnings_of({"loss": loss} for loss in losses) == []


CASES: dict[str, tuple[dict[str, Any], int, tuple[str, ...]]] = {
    # the record that repeats; at which of them the warning comes; words in it
    "still": ({"loss": LN2 + 1e-4}, 49, ("0.6932", "0.6931", "--learning_rate", "0.0005")),
    "rejected": (
        {"pairs": 0, "loss": None, "score_gap": 0.04, "third_threshold": 0.023},
        2,
        ("every pair", "0.04", "--threshold 0.023", "now 0.05"),
    ),
    "clamped": ({"dead": 1.0}, 2, ("clamp", "--learning_rate", "--clip")),
    "skipped": ({"nonfinite_steps": 1}, 0, ("1 optimizer step", "10 in a row")),
    "flat": ({"flat_groups": 0.95}, 2, ("95%", "all alike", "--num_candidates")),
    "scores": ({"pairs": 0, "score_mean": None, "nonfinite": {"score_mean": "nan"}}, 0, ("scores", "bf16")),
}


@pytest.mark.parametrize("name", CASES)
def test_a_fault_is_told_once_while_it_lasts(name: str) -> None:
    record, at, words = CASES[name]
    found = warnings_of([record] * 120)
    assert [i for i, _ in found] == [at]
    for word in words:
        assert word in found[0][1]
    assert "None" not in found[0][1] and "\n" not in found[0][1]


@pytest.mark.parametrize("name", ["rejected", "clamped", "skipped", "flat", "scores"])
def test_a_fault_that_comes_back_is_told_again(name: str) -> None:
    record, at, _ = CASES[name]
    assert [i for i, _ in warnings_of([record] * 5 + [{}] * 2 + [record] * 5)] == [at, 7 + at]


def test_a_fault_that_comes_and_goes_is_told_ever_less_often() -> None:
    """A run of 2,000 iterations told one 87 times."""
    record = CASES["rejected"][0]
    found = warnings_of(([record] * 3 + [{}]) * 20)
    assert [i for i, _ in found] == [4 * (times - 1) + 2 for times in (1, 2, 4, 8, 16)]
    assert [text.endswith("time)") for _, text in found] == [False, False, True, True, True]
    assert found[-1][1].endswith("(the 16th time)")


def test_loss_that_fluctuates_about_ln2_is_still() -> None:
    found = warnings_of({"loss": LN2 + 0.05 * (-1) ** i} for i in range(60))
    assert [i for i, _ in found] == [49]
    moving = warnings_of({"loss": LN2 - 0.002} for _ in range(200))
    assert moving == []


def test_iterations_without_pairs_do_not_reset_the_loss() -> None:
    record: dict[str, Any] = {"loss": LN2}
    assert [i for i, _ in warnings_of([record] * 30 + [{"loss": None}] * 2 + [record] * 30)] == [51]


def test_fp16_may_overflow_a_few_times_while_it_finds_its_scale() -> None:
    assert warnings_of([{"nonfinite_steps": 5, "loss_scale": 2048.0}]) == []
    assert len(warnings_of([{"nonfinite_steps": 6, "loss_scale": 1024.0}])) == 1


def test_saturation_is_told_at_every_further_quarter() -> None:
    records = [{"saturation": 0.2}] * 40 + [{"saturation": 0.2 * (1 + i / 100)} for i in range(100)]
    found = warnings_of(records)
    assert len(found) == 3 and "reward hacking" in found[0][1] and "0.200" in found[0][1]
    # the mean of the last 20 passes 1.25 when they are 1.16 .. 1.35 times the start
    assert found[0][0] in range(40 + 34, 40 + 37)
    assert warnings_of([{"saturation": 0.2 - i / 1000} for i in range(100)]) == []


def test_grey_pictures_have_no_saturation_to_compare_with() -> None:
    assert warnings_of([{"saturation": 0.0}] * 40 + [{"saturation": 0.2}] * 40) == []


def test_looks_of_the_validation_pictures_are_told_once_each() -> None:
    vivid, hard = "saturation is 40% above the base model's", "edges is 30% above the base model's"
    seen = ["", vivid, f"{vivid}; {hard}", f"{vivid}; {hard}", hard, f"{vivid}; {hard}"]
    records: list[dict[str, Any]] = []
    for text in seen:  # two iterations between validations
        records += [{"hacking": text}, {}]
    found = warnings_of(records)
    assert [(i, "saturation" in text) for i, text in found] == [(2, True), (4, False), (10, True)]
    assert "40%" in found[0][1] and "reward hacking" in found[0][1] and "--validation_metrics" in found[0][1]


def test_latent_scorers_have_no_saturation() -> None:
    assert warnings_of({"saturation": None} for _ in range(60)) == []


# ------------------------------------------------------------------------------------------------- what is measured


def test_gaps_by_hand() -> None:
    scores = torch.tensor([[[0.0, 1.0], [0.2, 0.0], [0.1, 0.5]], [[0.0, 0.0], [0.4, 0.6], [0.1, 0.1]]])  # (2, 3, 2)
    found = gaps(scores)
    assert float(found["score_gap"]) == pytest.approx((0.2 + 1.0 + 0.4 + 0.6) / 4)
    differences = sorted(math.exp(g) / (1 + math.exp(g)) * 2 - 1 for g in (0.2, 1.0, 0.4, 0.6))  # p_w - p_l
    assert float(found["third_threshold"]) == pytest.approx(differences[2])  # 2/3 of the way along four values


@pytest.mark.parametrize("normalised", [False, True])
def test_the_threshold_it_names_keeps_a_third(tmp_path: Path, normalised: bool) -> None:
    """The pairs of the same rollout, kept by the threshold that the record of an all-rejecting run recommends."""
    settings = {"max_prompts": 8, "sample_batch_size": 8, "num_candidates": 3, "num_train_epochs": 1}
    settings["normalise_scorers"] = normalised
    nothing = built(tmp_path / "a", threshold=0.999, **settings).iterate(0, timer.Timer())
    assert nothing["pairs"] == 0
    named = built(tmp_path / "b", threshold=float(nothing["third_threshold"]), **settings).iterate(0, timer.Timer())
    assert named["valid_share"] == pytest.approx(1 / 3, abs=1 / 16)


@pytest.mark.parametrize(
    "field, values, at, words",
    [
        # the last 20: 7 of .06 and 13 of .12 are .099 on average, half of .2; 6 and 14 are .102
        ("diversity", (0.2, 0.12, 0.06), 46, ("grown alike", "0.2", "0.099", "--learning_rate")),
        ("output_rms", (1.0, 1.2, 1.32), 48, ("changed their size", "from 1 to 1.25")),
        ("output_rms", (1.0, 0.8, 0.68), 48, ("changed their size", "from 1 to 0.746")),
    ],
)
def test_signs_of_collapse_are_told_against_the_start(
    field: str, values: tuple[float, ...], at: int, words: tuple[str, ...]
) -> None:
    first, quiet, loud = ([{field: value}] * 20 for value in values)
    found = warnings_of([*first, *quiet, *loud])
    assert [i for i, _ in found] == [at] and all(word in found[0][1] for word in words)


def test_saturation_by_hand() -> None:
    pixels = torch.tensor([[1.0, -1.0, -1.0], [0.0, 0.0, 0.0], [3.0, -3.0, 0.0]]).view(3, 3, 1, 1)
    decode = Pictures(lambda latents: pixels)
    everything = (Group(), slice(0, 1), 3)
    assert decode.record(*everything) == {}
    assert decode(torch.zeros(3, 4, 1, 1)) is pixels
    assert float(decode.record(*everything)["saturation"]) == pytest.approx((1 + 0 + 1) / 3)


def test_records_carry_what_the_watch_needs(tmp_path: Path) -> None:
    record = built(tmp_path / "run").iterate(0, timer.Timer())
    assert {"group_std", "flat_groups", "diversity", "output_rms"} <= set(record)
    assert float(record["group_std"]) > 0 and float(record["flat_groups"]) == 0 and float(record["diversity"]) > 0
    assert 0.3 < float(record["output_rms"]) < 3
    assert {"score_gap", "third_threshold", "saturation", "dead", "loss", "pairs", "nonfinite_steps"} <= set(record)
    assert 0 < float(record["saturation"]) < 1


# ------------------------------------------------------------------------------------------------- not finite


def broken_from(iteration: int, value: float) -> Callable[..., Any]:
    """Learner.update whose experience has one latent of a value that is not finite, from an iteration on."""
    whole = learner.Learner.update

    def update(self: Any, experience: Any, state: Any, *rest: Any) -> Any:
        if state.iteration >= iteration:
            experience.x_prev[0, 0, 0, 0, 0, 0] = value
        return whole(self, experience, state, *rest)

    return update


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_step_that_is_not_finite_is_skipped_and_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: float
) -> None:
    run = built(tmp_path / "run", clip="none")
    before = {name: weight.clone() for name, weight in run.policy.state_dict().items()}
    monkeypatch.setattr(learner.Learner, "update", broken_from(0, value))
    record = run.iterate(0, timer.Timer())
    assert record["nonfinite_steps"] == 1 == run.state.skipped_steps  # one latent spoils one of two steps
    assert record["optimizer_steps"] == 1 and run.state.nonfinite_in_a_row in (0, 1)
    after = run.policy.state_dict()
    assert all(weight.isfinite().all() for weight in after.values())
    assert any(not torch.equal(before[name], after[name]) for name in before)  # the other step was taken
    assert math.isfinite(record["grad_norm"])


def test_a_run_stops_with_a_diagnosis(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    settings = {"max_nonfinite_steps": 3, "train_batch_size": 4, "num_train_epochs": 4, "checkpointing_steps": 1}
    monkeypatch.setattr(learner.Learner, "update", broken_from(2, math.nan))
    assert train.main(flags(out, **settings, clip="none")) == 1
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1 and "3 optimizer steps in a row" in captured.err
    assert "nonfinite.json" in captured.err and "--learning_rate" in captured.err
    assert captured.out.count("warning: iteration 2") == 1
    records = read_metrics(out / "metrics.jsonl")
    assert len(records) == 5 and records[2]["warnings"] and "warnings" not in records[3]  # told once
    report = json.loads((out / "nonfinite.json").read_text())
    assert report["finite_share"]["loss"] == 0 and 0 < report["finite_share"]["x_prev"] < 1
    assert report["finite_share"]["policy_cond"] == 1 and report["weights"] == [] and len(report["gradients"]) > 0
    assert report["state"]["skipped_steps"] == 3
    assert not load_file(out / "nonfinite.safetensors")["x_prev"].isfinite().all()
    # the weights of the last checkpoint are those of the last good step
    last = load_file(out / "checkpoint-4" / "trained.safetensors")
    good = load_file(out / "checkpoint-2" / "trained.safetensors")
    assert all(torch.equal(last[name], good[name]) for name in good)


def test_scores_that_are_not_finite_stop_a_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = built(tmp_path / "run", max_nonfinite_steps=2, num_train_epochs=3)
    whole = run.scorer.__class__.__call__
    monkeypatch.setattr(run.scorer.__class__, "__call__", lambda self, c: whole(self, c) * math.nan)
    with pytest.raises(ValueError, match="in a row"):
        run.train()
    assert "the scores are not finite" in capsys.readouterr().out
    assert [r["pairs"] for r in facts(tmp_path / "run")] == [0, 0]


def test_warnings_survive_a_resume(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A resumed run is told nothing twice, and later faults at the same iteration as an undisturbed run."""
    settings = {"threshold": 0.999, "num_train_epochs": 3, "checkpointing_steps": 1}
    assert train.main(flags(tmp_path / "whole", **settings)) == 0
    assert train.main(flags(tmp_path / "part", **settings, max_train_steps=2)) == 0
    assert train.main(flags(tmp_path / "part", **settings, resume_from_checkpoint="latest")) == 0
    told = [r["iteration"] for r in read_metrics(tmp_path / "whole" / "metrics.jsonl") if "warnings" in r]
    assert told == [2]
    assert facts(tmp_path / "whole") == facts(tmp_path / "part")
