"""Whole runs of the toy: what they leave behind, and that killed and resumed ones end like one that was left alone."""

from __future__ import annotations

import dataclasses
import gc
import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from runs import (
    ITERATIONS,
    PAIRS,
    Killed,
    assert_same_end,
    assert_same_tensors,
    built,
    facts,
    flags,
    kill_once_logged,
    killed_run,
    run_toy,
    start,
)
from safetensors.torch import load_file, save_file

from spo_fast import report, train
from spo_fast.data import toy_world
from spo_fast.evaluation import metrics, pictures
from spo_fast.evaluation.image_statistics import image_statistics
from spo_fast.evaluation.pages.run_record import read_metrics
from spo_fast.method.objectives import predict_states
from spo_fast.models.device import found_device
from spo_fast.models.files.toy import toy_files
from spo_fast.models.prompt_cache import PromptCache
from spo_fast.scorers.registry import load_metric
from spo_fast.training import batches, checkpoint, loop, run_directory, validation
from spo_fast.training import run as training_run
from spo_fast.training.checkpoint import TrainState
from spo_fast.training.monitor.timer import Timer
from spo_fast.training.plan.fit_memory import choose

LORA = "pytorch_lora_weights.safetensors"
EIGHT_BIT = {"optimizer": "adamw8bit", "min_8bit_size": 1}


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of four iterations that nobody disturbed, with a checkpoint after each."""
    return run_toy(tmp_path_factory.mktemp("whole") / "run", checkpointing_steps=1)


# ------------------------------------------------------------------------------------------------- a run's files


def test_run_leaves_metrics_checkpoints_and_lora(whole_run: Path) -> None:
    records = read_metrics(whole_run / "metrics.jsonl")
    assert [r["iteration"] for r in records] == list(range(ITERATIONS))
    assert all(r["pairs"] == PAIRS and r["valid_share"] == 1 and math.isfinite(r["loss"]) for r in records)
    assert [r["optimizer_steps"] for r in records] == [2 * (i + 1) for i in range(ITERATIONS)]
    assert {p.name for p in whole_run.glob("checkpoint-*")} == {f"checkpoint-{i + 1}" for i in range(ITERATIONS)}
    for directory in (whole_run, whole_run / f"checkpoint-{ITERATIONS}"):
        assert (directory / "pytorch_lora_weights.safetensors").is_file()
        assert (directory / "lora_kohya.safetensors").is_file()
    for name in ("pytorch_lora_weights.safetensors", "lora_kohya.safetensors"):
        assert_same_tensors(whole_run / name, whole_run / f"checkpoint-{ITERATIONS}" / name)


def test_saved_config_reads_back_as_the_same(whole_run: Path) -> None:
    cfg = train.parse(flags(whole_run, checkpointing_steps=1))
    resolved, _ = choose(cfg, found_device(torch.device("cpu")))
    assert train.parse(["--config", str(whole_run / "config.yaml")]) == resolved != cfg


@pytest.mark.parametrize("precision", ["no", "bf16", "fp16"])
def test_log_ratio_is_exactly_zero_before_the_first_update(tmp_path: Path, precision: str) -> None:
    """LoRA's B is 0, so policy and reference are one network; evaluated in equal batches, to the last bit."""
    run_toy(tmp_path / "run", train_batch_size=PAIRS, max_train_steps=1, mixed_precision=precision)
    record = facts(tmp_path / "run")[0]
    assert record["log_ratio_best"] == 0 and record["log_ratio_worst"] == 0 and record["margin"] == 0
    assert record["loss"] == pytest.approx(math.log(2), abs=1e-6)


def test_prompt_file_and_sample_grids(tmp_path: Path) -> None:
    prompts = tmp_path / "mine.txt"
    prompts.write_text("a red cube\na blue ball\n# not a prompt\na green cone\n")
    out = run_toy(tmp_path / "run", prompts=prompts, max_prompts=None, num_train_epochs=1, num_validation_images=2)
    assert [r["pairs"] for r in facts(out)] == [PAIRS, PAIRS // 2]  # 3 prompts, the last batch is short
    for name in ("before", "after"):
        with Image.open(out / "samples" / f"{name}.png") as image:
            # 3 prompts down, 2 images across, 8 pixels shown 12 times as large with a frame of 2
            assert image.size == (2 * 100, 3 * 100)
            assert len(set(image.getdata())) > 100
    assert (out / "samples" / "before.png").read_bytes() != (out / "samples" / "after.png").read_bytes()


def test_validation_scores_are_of_the_same_noise(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With next to no learning rate nothing changes, so neither may the score nor a pixel."""
    out = run_toy(tmp_path / "run", learning_rate=1e-30, max_train_steps=1, num_validation_images=1)
    assert (out / "samples" / "before.png").read_bytes() == (out / "samples" / "after.png").read_bytes()
    assert "(+0.000)" in capsys.readouterr().out


# ------------------------------------------------------------------------------------------- grids during training

GRIDS = {"num_validation_images": 1, "checkpointing_steps": 2}


def samples(run_dir: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in (run_dir / "samples").iterdir()}


@pytest.fixture(scope="module")
def shown_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four iterations with a grid after each, a checkpoint every second."""
    return run_toy(tmp_path_factory.mktemp("shown") / "run", validation_steps=1, **GRIDS)


def test_grids_during_training(shown_run: Path) -> None:
    scores = [r["validation_score"] for r in facts(shown_run)]
    assert len(set(scores)) == ITERATIONS and all(map(math.isfinite, scores))
    grids = samples(shown_run)
    steps = {f"step-{i + 1}.png" for i in range(ITERATIONS)}
    assert grids.keys() == {"before.png", "before.json", "prompts.json", "after.png", "strengths.png", *steps}
    assert len({grids[f"step-{i + 1}.png"] for i in range(ITERATIONS)} | {grids["before.png"]}) == ITERATIONS + 1
    assert grids["after.png"] == grids[f"step-{ITERATIONS}.png"]
    with Image.open(shown_run / "samples" / "step-2.png") as image:
        assert json.loads(image.text["prompts"]) == built(shown_run / "x").prompts[:4]


def test_grids_are_of_the_weights_of_their_iteration(shown_run: Path, tmp_path: Path) -> None:
    run = built(tmp_path / "run", **GRIDS)
    batches.encode_first(run)
    assert run.validator.show("before")._asdict() == json.loads((shown_run / "samples" / "before.json").read_text())
    checkpoint.load(shown_run / "checkpoint-2", run.learner, run.cfg.flat())
    assert run.validator.show("again").score == facts(shown_run)[1]["validation_score"]
    grids = samples(tmp_path / "run")
    assert grids["again.png"] == samples(shown_run)["step-2.png"]
    assert grids["before.png"] == samples(shown_run)["before.png"]


def test_grids_come_with_checkpoints_and_change_no_number(shown_run: Path, tmp_path: Path) -> None:
    out = run_toy(tmp_path / "run", num_validation_images=1, checkpointing_steps=3)
    assert [i for i, r in enumerate(facts(out)) if "validation_score" in r] == [2, 3]
    assert {"step-3.png", "step-4.png"} == {name for name in samples(out) if name.startswith("step")}
    of_grids = ("validation_", "half_", "hacking", "look_", "held_out_", "warnings")
    without = [
        [{k: v for k, v in r.items() if not k.startswith(of_grids)} for r in facts(run)] for run in (shown_run, out)
    ]
    assert without[0] == without[1]


def test_killed_and_resumed_has_the_same_grids(
    shown_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"validation_steps": 1, **GRIDS}
    killed = killed_run(tmp_path / "run", monkeypatch, 3, **settings)
    whole = samples(shown_run)
    assert samples(killed).keys() == whole.keys() - {"step-4.png", "after.png", "strengths.png"}
    assert report.main([str(killed)]) == 0  # of what there is so far
    # from checkpoint-2 on, and what was drawn after it is another run's
    (killed / "samples" / "step-3.png").write_bytes(b"drawn by the killed run")
    run_toy(killed, resume_from_checkpoint="latest", **settings)
    assert_same_end(shown_run, killed)
    assert samples(killed) == whole


def test_a_sheet_of_many_images_can_still_be_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Image software refuses pictures of hundreds of millions of pixels: the sheet is made smaller."""
    monkeypatch.setattr(pictures, "SHEET_PIXELS", 40_000)
    colours = torch.tensor([[-1.0, -1.0, 1.0], [1.0, -1.0, -1.0]])
    rows = [[c[:, None, None].expand(3, 128, 256) for _ in range(5)] for c in colours]
    pictures.write_grid(tmp_path / "sheet.png", rows, ["a", "b"])
    with Image.open(tmp_path / "sheet.png") as image:
        assert 30_000 < image.width * image.height <= 40_000 and json.loads(image.text["prompts"]) == ["a", "b"]
        assert 1.8 < (image.width / 5) / (image.height / 2) < 2.2
        for row, colour in enumerate(((0, 0, 255), (255, 0, 0))):
            assert image.getpixel((image.width // 10, image.height // 4 * (1 + 2 * row))) == colour


def test_resumed_with_other_grids_compares_nothing_with_the_old_ones(
    shown_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Fewer pictures, of other prompts, or told another size: a gain over other pictures would be none."""
    for n, other in enumerate(
        ({"num_validation_images": 2}, {"validation_prompt": ["a red circle"]}, {"size_told": "native"})
    ):
        copy = tmp_path / str(n)
        shutil.copytree(shown_run, copy)
        shutil.rmtree(copy / "checkpoint-4")
        capsys.readouterr()
        run_toy(copy, resume_from_checkpoint="latest", validation_steps=1, **{**GRIDS, **other})
        out = capsys.readouterr().out
        assert "of other validation settings: nothing is compared" in out and "before and after" not in out
        assert not any("hacking" in r for r in facts(copy)[2:]) and not (copy / "samples" / "before.json").exists()
        assert len(list((copy / "samples").glob("old-*before*"))) == 2
        assert "before training: not on record" in (copy / "report.html").read_text()


def test_resumed_without_grids_keeps_none_of_what_it_repeats(shown_run: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(shown_run, tmp_path / "run")
    settings = {**GRIDS, "num_validation_images": 0}
    run_toy(copy, resume_from_checkpoint=copy / "checkpoint-2", **settings)
    assert samples(copy).keys() == {"before.png", "before.json", "prompts.json", "step-1.png", "step-2.png"}
    assert [r.get("validation_score") for r in facts(copy)][2:] == [None, None]


def test_finished_run_resumed_keeps_its_grids(shown_run: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(shown_run, tmp_path / "run")
    run_toy(copy, resume_from_checkpoint="latest", validation_steps=1, **GRIDS)
    assert samples(copy) == samples(shown_run)
    assert facts(copy) == facts(shown_run)


def test_held_out_scores_and_looks_of_the_grids(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The toy's true scores, and a metric that was asked for, of the pictures of the grids."""
    settings = {**GRIDS, "resolution": 16, "num_validation_images": 2}
    out = run_toy(tmp_path / "run", curves=True, **settings)
    assert "held-out layout" in capsys.readouterr().out
    records = [r for r in facts(out) if "validation_score" in r]
    run = built(tmp_path / "again", **settings)
    batches.encode_first(run)
    texts = [prompt for prompt in run.validator.prompts for _ in range(2)]
    start = json.loads((out / "samples" / "before.json").read_text())
    for where, expected in ((None, start["values"]), ("checkpoint-4", records[-1])):
        if where:
            checkpoint.load(out / where, run.learner, run.cfg.flat())
        images, _ = run.validator.validate()
        pixels = torch.stack([image for row in images for image in row]).clamp(-1, 1)
        truth = {"aesthetics": toy_world.aesthetics(pixels), "layout": toy_world.layout(pixels, texts).all(1).float()}
        for name, values in truth.items():
            if where:
                assert expected[f"held_out_{name}"] == pytest.approx(float(values.mean()), rel=1e-6)
            else:
                assert expected[name] == pytest.approx(values.tolist(), rel=1e-6)
        saturation = float(image_statistics(pixels)["saturation"].mean())
        if where:
            ratio = saturation / (sum(start["values"]["saturation"]) / len(texts))
            assert expected["look_saturation"] == pytest.approx(ratio, rel=1e-6) and "hacking" in expected
    page, card = (out / "report.html").read_text(), (out / "README.md").read_text()
    for name in ("curve-held_out_layout", "curve-held_out_aesthetics", "curve-look_contrast"):
        assert f'id="{name}"' in page
    before, after = sum(start["values"]["aesthetics"]) / len(texts), records[-1]["held_out_aesthetics"]
    assert f"| aesthetics | {before:.4g} | {after:.4g} |" in card


def test_a_held_out_metric_is_that_of_evaluate(tmp_path: Path) -> None:
    run = built(tmp_path / "run", **GRIDS, validation_metrics="pickscore")
    batches.encode_first(run)
    images, _ = run.validator.validate()
    scorer = load_metric("pickscore", toy_files(), run.model.tokenize, "cpu", torch.float32)
    texts = run.validator.prompts
    pixels = torch.stack([row[0] for row in images]).clamp(-1, 1)
    truth = scorer.score_pixels(pixels, torch.tensor(0), scorer.encode(texts))
    assert run.validator.measured(images)["pickscore"] == pytest.approx(truth.tolist(), rel=1e-6)


def test_nothing_is_loaded_for_validation_unasked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made, whole = [], metrics.make_metric
    monkeypatch.setattr(validation, "make_metric", lambda name, *rest: made.append(name) or whole(name, *rest))
    (tmp_path / "mine.txt").write_text("a prompt of another world\na red cube\n")
    run_toy(tmp_path / "run", **GRIDS, prompts=tmp_path / "mine.txt", max_train_steps=1)
    assert set(made) == {"looks"}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"validation_metrics": "aestetics"}, "--validation_metrics: unknown scorer 'aestetics'"),
        ({"validation_metrics": "spm", "scorer": "spm:2"}, "spm is the scorer, whose score is shown anyway"),
        ({"validation_metrics": "lrm"}, "lrm judges noisy latents, not pictures"),
        ({"validation_metrics": "pickscore:2"}, "metrics have no weights"),
        ({"validation_metrics": "image_reward,aesthetic"}, "--image_reward_path"),
        ({"validation_metrics": "layout", "num_validation_images": 1}, "pictures of 16 pixels"),
        ({"model": "sd15", "resolution": None, "validation_metrics": "layout"}, "--model sd15 has none"),
    ],
)
def test_wrong_validation_metrics_are_told(
    settings: dict[str, Any],
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("spo_fast.models.files.find.offline_reason", lambda: "HF_HUB_OFFLINE is set")
    assert train.main(flags(tmp_path / "run", **settings)) == 1
    assert message in capsys.readouterr().err


def test_garish_pictures_raise_the_alarm(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Against the pictures at step 0, also after a resume: on the terminal, in the log, report and card."""
    whole, show, seen = validation.Validator.validate, validation.Validator.show, []

    def garish(validator: validation.Validator) -> Any:
        images, score = whole(validator)
        late = seen[-1] in ("step-2", "step-3", "step-4")
        return [[(2 if late else 0.5) * image for image in row] for row in images], score

    monkeypatch.setattr(validation.Validator, "show", lambda self, name: seen.append(name) or show(self, name))
    monkeypatch.setattr(validation.Validator, "validate", garish)
    settings = {**GRIDS, "resolution": 16, "validation_steps": 1, "checkpointing_steps": 1, "num_validation_images": 2}
    run_toy(tmp_path / "run", **settings, max_train_steps=1)
    assert "hacking" not in capsys.readouterr().out
    run_toy(tmp_path / "run", **settings, resume_from_checkpoint="latest")
    assert seen == ["before", "step-1", "step-2", "step-3", "step-4"]
    records = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert [bool(r["hacking"]) for r in records] == [False, True, True, True]
    told = [text for text in records[1]["warnings"] if "sign of reward hacking" in text]
    assert len(told) >= 3 and any("saturation is" in text for text in told)
    assert not any("sign of reward hacking" in text for r in records[2:] for text in r.get("warnings", ()))
    assert capsys.readouterr().out.count("warning: iteration 1: in the validation pictures saturation is") == 1
    assert "in the validation pictures saturation is" in (tmp_path / "run" / "report.html").read_text()
    assert "Signs of reward hacking in these images: saturation is" in (tmp_path / "run" / "README.md").read_text()


def test_report_is_there_while_the_run_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written = []
    monkeypatch.setattr(training_run, "write_report", lambda run_dir, history: written.append(len(facts(run_dir))))
    run_toy(tmp_path / "run", validation_steps=2, **{**GRIDS, "checkpointing_steps": 4})
    assert written == [2, 4]


def test_a_report_that_fails_stops_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(run_dir: Path, history: object) -> None:
        raise KeyError("odd")

    monkeypatch.setattr(training_run, "write_report", fails)
    out = run_toy(tmp_path / "run", max_train_steps=1, num_validation_images=1)
    assert (out / LORA).is_file() and (out / "README.md").is_file() and not (out / "report.html").exists()
    assert f"no report.html (KeyError: 'odd'); python -m spo_fast.report {out}" in capsys.readouterr().out


def test_run_prints_no_noise(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Neither the libraries' warnings nor their progress bars; this process has imported them before, so see also
    test_cli.py for a fresh one."""
    run_toy(tmp_path / "run", max_train_steps=1, num_validation_images=1, max_prompts=2, mixed_precision="bf16")
    captured = capfd.readouterr()
    assert captured.err == ""
    assert "Writing model shards" not in captured.out and "float32: []" not in captured.out


def test_mspo_runs(tmp_path: Path) -> None:
    out = run_toy(tmp_path / "run", method="mspo", num_inner_steps=1, max_train_steps=2)
    # one segment of 2 steps: each is a term; in the second winner and loser have a state each
    assert [(r["pairs"], r["states"]) for r in facts(out)] == [(PAIRS, PAIRS * 3 // 2)] * 2


def test_no_valid_pair_is_no_step(tmp_path: Path) -> None:
    out = run_toy(tmp_path / "run", threshold=0.999999, max_train_steps=2)
    assert [(r["pairs"], r["optimizer_steps"]) for r in facts(out)] == [(0, 0)] * 2
    assert all("loss" not in r for r in facts(out))
    trained = load_file(out / "checkpoint-2" / "trained.safetensors")
    assert all((value == 0).all() for name, value in trained.items() if "lora_B" in name)


# --------------------------------------------------------------------------------------------------------- resuming


@pytest.mark.parametrize(
    ("killed_after", "settings"),
    [
        # one iteration is repeated; the schedule must stand where it stood
        (3, {"checkpointing_steps": 2, "lr_scheduler": "cosine", "lr_warmup_steps": 2, "rank": 3, "lora_alpha": 2}),
        # 8-bit state, and gradients that wait for the next rollout's
        (3, {**EIGHT_BIT, "checkpointing_steps": 1, "recipe": "published", "gradient_accumulation_steps": 3}),
        # there is no checkpoint yet
        pytest.param(1, {"checkpointing_steps": 2}, marks=pytest.mark.slow),
        # a loss scale to keep
        pytest.param(3, {"checkpointing_steps": 1, "mixed_precision": "fp16"}, marks=pytest.mark.slow),
        pytest.param(2, {"checkpointing_steps": 1, "full_finetune": True}, marks=pytest.mark.slow),
        pytest.param(3, {"checkpointing_steps": 3, "method": "mspo", "num_inner_steps": 1}, marks=pytest.mark.slow),
    ],
)
def test_killed_and_resumed_ends_bit_identical(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, killed_after: int, settings: dict[str, Any]
) -> None:
    whole = run_toy(tmp_path / "whole", **settings)
    killed = killed_run(tmp_path / "killed", monkeypatch, killed_after, **settings)
    assert len(read_metrics(killed / "metrics.jsonl")) == killed_after
    run_toy(killed, resume_from_checkpoint="latest", **settings)
    assert [r["iteration"] for r in facts(killed)] == list(range(ITERATIONS))
    assert_same_end(whole, killed)


def test_a_resumed_run_that_forgot_something_would_differ(whole_run: Path, tmp_path: Path) -> None:
    """The comparison above can fail: with one wrong number in the optimizer's state the end is another."""
    copy = shutil.copytree(whole_run, tmp_path / "run")
    file = copy / "checkpoint-2" / "optimizer.safetensors"
    state = load_file(file)
    state["0.step"] += 1
    save_file(state, file)
    run_directory.write_sums(file.parent)
    run_toy(copy, resume_from_checkpoint=copy / "checkpoint-2", checkpointing_steps=1)
    assert [r["iteration"] for r in facts(copy)] == list(range(ITERATIONS))
    with pytest.raises(AssertionError, match="trained.safetensors"):
        assert_same_end(whole_run, copy)


def test_going_back_keeps_the_later_checkpoints_aside(whole_run: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(whole_run, tmp_path / "run")
    run_toy(copy, resume_from_checkpoint=copy / "checkpoint-2", checkpointing_steps=1)
    assert_same_end(whole_run, copy)
    assert {p.name.split("-", 3)[3] for p in copy.glob("old-*")} == {"checkpoint-3", "checkpoint-4"}


def test_eight_bit_state_is_eight_bit(tmp_path: Path) -> None:
    out = run_toy(tmp_path / "run", **EIGHT_BIT, max_train_steps=1)
    state = load_file(out / "checkpoint-1" / "optimizer.safetensors")
    moments = {name: v for name, v in state.items() if name.split(".")[1] in ("state1", "state2")}
    trained = load_file(out / "checkpoint-1" / "trained.safetensors")
    assert len(moments) == 2 * len(trained)
    assert all(v.dtype == torch.uint8 for v in moments.values())


def test_published_accumulation_keeps_gradients_between_rollouts(tmp_path: Path) -> None:
    """2 slots a rollout, a step every 3: the checkpoint after the first holds two slots' gradients."""
    settings = {"recipe": "published", "gradient_accumulation_steps": 3, "checkpointing_steps": 1, "max_train_steps": 3}
    out = run_toy(tmp_path / "run", **settings)
    assert [r["optimizer_steps"] for r in facts(out)] == [0, 1, 2]
    kept = [(out / f"checkpoint-{i}" / "gradients.safetensors").is_file() for i in (1, 2, 3)]
    assert kept == [True, True, False]


@pytest.mark.slow
def test_sigkill_in_another_process(tmp_path: Path) -> None:
    settings = {"checkpointing_steps": 2, "max_prompts": 24, "num_train_epochs": 2}
    out = tmp_path / "killed"
    # in the second epoch: what the first has left in memory is gone after the kill
    kill_once_logged(start(flags(out, **settings)), out / "metrics.jsonl", 15)
    assert len(read_metrics(out / "metrics.jsonl")) < 24
    resumed = start(flags(out, resume_from_checkpoint="latest", **settings))
    output, errors = resumed.communicate()
    assert resumed.returncode == 0, errors
    assert "resumed from" in output
    assert [r["iteration"] for r in facts(out)] == list(range(24))
    assert_same_end(run_toy(tmp_path / "whole", **settings), out)


def test_finished_run_resumed_changes_nothing(whole_run: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(whole_run, tmp_path / "run")
    files = ["metrics.jsonl", f"checkpoint-{ITERATIONS}/trained.safetensors", f"checkpoint-{ITERATIONS}/state.json"]
    before = {name: (copy / name).read_bytes() for name in files}
    run_toy(copy, resume_from_checkpoint="latest", checkpointing_steps=1)
    assert {name: (copy / name).read_bytes() for name in files} == before
    assert_same_tensors(copy / LORA, whole_run / LORA)
    assert len(list(copy.glob("checkpoint-*"))) == ITERATIONS


def test_longer_run_goes_on_from_a_finished_one(whole_run: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(whole_run, tmp_path / "run")
    run_toy(copy, resume_from_checkpoint="latest", checkpointing_steps=1, num_train_epochs=3)
    assert facts(copy)[:ITERATIONS] == facts(whole_run)
    assert len(facts(copy)) == ITERATIONS * 3 // 2


def test_resume_from_a_named_checkpoint_into_a_new_directory(whole_run: Path, tmp_path: Path) -> None:
    out = run_toy(
        tmp_path / "run", checkpointing_steps=1, resume_from_checkpoint=str(whole_run / f"checkpoint-{ITERATIONS - 1}")
    )
    assert facts(out) == facts(whole_run)[-1:]
    last = f"checkpoint-{ITERATIONS}/trained.safetensors"
    assert_same_tensors(whole_run / last, out / last)  # which is where it was: that run is not ours to tidy up


def test_run_directory_in_use_is_refused(whole_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = (whole_run / "metrics.jsonl").read_bytes()
    assert train.main(flags(whole_run)) == 1
    error = capsys.readouterr().err
    assert "already holds a run (checkpoint-4)" in error and "--resume_from_checkpoint latest" in error
    assert error.count("\n") == 1
    assert (whole_run / "metrics.jsonl").read_bytes() == before


def test_missing_checkpoint_is_named(whole_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train.main(flags(whole_run, resume_from_checkpoint=str(whole_run / "checkpoint-77"))) == 1
    error = capsys.readouterr().err
    assert "checkpoint-77" in error and "checkpoint-4" in error and error.count("\n") == 1


def test_another_rank_is_refused(whole_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = (whole_run / "metrics.jsonl").read_bytes()
    assert train.main(flags(whole_run, resume_from_checkpoint="latest", rank=2)) == 1
    error = capsys.readouterr().err
    assert "rank: 8 -> 2" in error and "Traceback" not in error and error.count("\n") == 1
    assert (whole_run / "metrics.jsonl").read_bytes() == before


def test_changed_settings_are_printed(whole_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    copy = shutil.copytree(whole_run, tmp_path / "run")
    run_toy(copy, resume_from_checkpoint="latest", checkpointing_steps=1, beta=5.0)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("changed since")]
    assert lines == ["changed since the checkpoint: beta: 10.0 -> 5.0"]


def test_torn_checkpoint_is_ignored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that dies while it writes a checkpoint leaves a directory that is not taken for one."""
    whole_dump = json.dumps

    def dies(record: Any, **options: Any) -> str:
        if isinstance(record, dict) and record.get("state", {}).get("iteration") == 2:
            raise Killed
        return whole_dump(record, **options)

    out = tmp_path / "run"
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(checkpoint.json, "dumps", dies)
        patch.setattr(checkpoint.shutil, "rmtree", lambda *a, **k: None)  # a killed process tidies nothing up
        train.main(flags(out, checkpointing_steps=1))
    assert any(p.name.startswith(".tmp") for p in out.iterdir())
    assert run_directory.find(out, "latest") == out / "checkpoint-1"
    run_toy(out, resume_from_checkpoint="latest", checkpointing_steps=1)
    assert not any(p.name.startswith(".tmp") for p in out.iterdir())  # and is swept away by the next


def test_checkpoints_total_limit(tmp_path: Path) -> None:
    out = run_toy(tmp_path / "run", checkpointing_steps=1, checkpoints_total_limit=2)
    assert {p.name for p in out.glob("checkpoint-*")} == {"checkpoint-3", "checkpoint-4"}


# ------------------------------------------------------------------------------------------- precision and memory


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_sixteen_bit_compute(tmp_path: Path, precision: str) -> None:
    out = run_toy(tmp_path / "run", mixed_precision=precision)
    assert all(math.isfinite(r["loss"]) for r in facts(out))
    last = facts(out)[-1]
    assert math.isfinite(last["grad_norm"])  # the first fp16 steps may overflow, which lowers the loss scale
    assert last["optimizer_steps"] + last["skipped_steps"] == 2 * ITERATIONS
    assert last["skipped_steps"] == (0 if precision == "bf16" else pytest.approx(3, abs=3))
    for file in ("checkpoint-4/trained.safetensors", "pytorch_lora_weights.safetensors", "lora_kohya.safetensors"):
        assert {v.dtype for v in load_file(out / file).values()} == {torch.float32}, file
    trained = load_file(out / "checkpoint-4" / "trained.safetensors")
    assert any((v != 0).any() for name, v in trained.items() if "lora_B" in name)
    # masters, not copies of the 16-bit weights
    dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}[precision]
    assert any(not torch.equal(v, v.to(dtype).float()) for v in trained.values())


def one_gradient(run: loop.Run, slots: list[slice]) -> list[list[torch.Tensor]]:
    """Gradients of the masters after each of these parts of the first iteration's experience, added up."""
    batches.encode_first(run)
    batch = batches.rollout_batch(run, run.prompt_order.batch(0).indices, 0)
    e = run.objective.collect(dataclasses.replace(run.sampler, decode=run.model.decode, decode_chunk=8), batch)
    randomise_lora(run)
    e = run.objective.prepare(run.policy, run.table, e, run.cfg.sample, None)
    snapshots = []
    for terms in slots:
        part = e.select(terms)
        m = predict_states(run.policy, run.table, part, part.states, run.cfg.sample.guidance_scale > 1)
        loss, _ = run.objective.loss(m, run.table, part, run.cfg.sample, 1.0)
        loss.backward()
        snapshots.append([p.grad.clone() for p in run.learner.parameters if p.grad is not None])
    return snapshots


def randomise_lora(run: loop.Run, scale: float = 1e-3) -> None:
    generator = torch.Generator().manual_seed(1)
    state = {k: v + scale * torch.randn(v.shape, generator=generator) for k, v in run.policy.state_dict().items()}
    run.policy.load_state_dict(state)


def test_masters_add_gradients_up_in_float32(tmp_path: Path) -> None:
    """bf16 gradients of single terms are exact in float32; their sum must err like float32, not like bf16."""
    settings = {"mixed_precision": "bf16", "clip": "none"}
    terms = [slice(i, i + 1) for i in range(PAIRS)]
    *_, added = one_gradient(built(tmp_path / "added", **settings), terms)
    alone = [one_gradient(built(tmp_path / f"alone{i}", **settings), [t])[0] for i, t in enumerate(terms)]
    for total, *parts in zip(added, *alone, strict=True):
        assert total.dtype == torch.float32
        assert all(torch.equal(p, p.bfloat16().float()) for p in parts)
        truth = sum(p.double() for p in parts)
        rounded = sum((p.bfloat16() for p in parts[1:]), parts[0].bfloat16()).double()
        scale = sum(p.double().abs() for p in parts)
        assert ((total.double() - truth).abs() <= 1e-6 * scale).all()
        assert ((rounded - truth).abs() > 1e-6 * scale).any()


def test_gradient_checkpointing_changes_no_gradient(tmp_path: Path) -> None:
    calls = {}
    gradients = {}
    for on in (False, True):
        run = built(tmp_path / f"run{on}", gradient_checkpointing=on, clip="none")
        count: list[int] = []
        # before, not after the forward: the recomputation stops as soon as it has what it needs
        run.policy.network.mid_block.resnets[1].register_forward_pre_hook(lambda *_, count=count: count.append(1))
        [gradients[on]] = one_gradient(run, [slice(0, PAIRS)])
        calls[on] = len(count)
    assert calls[True] == calls[False] + 1  # recomputed in the backward pass
    for with_it, without in zip(gradients[True], gradients[False], strict=True):
        assert (without != 0).any()
        torch.testing.assert_close(with_it, without, rtol=1e-5, atol=1e-9)


def test_reference_switches_the_adapter_off_and_on_again(tmp_path: Path) -> None:
    run = built(tmp_path / "run")
    batches.encode_first(run)
    cond = run.model.cond(run.prompts[:2])
    x = torch.randn(2, *run.model.latent_shape, generator=torch.Generator().manual_seed(0))

    def output() -> torch.Tensor:
        with torch.no_grad():
            return run.policy.predict(x, torch.tensor(500), cond, guided=False).cond

    base = output()
    randomise_lora(run, scale=0.3)
    trained = output()
    assert (trained - base).abs().max() > 0.01
    with run.policy.reference():
        assert torch.equal(output(), base)
    assert torch.equal(output(), trained)
    with pytest.raises(KeyError), run.policy.reference():
        raise KeyError
    assert torch.equal(output(), trained)


def test_full_finetune(tmp_path: Path) -> None:
    from diffusers import UNet2DConditionModel

    settings = {"full_finetune": True, "checkpointing_steps": 1, "max_train_steps": 2, "learning_rate": 1e-4}
    out = run_toy(tmp_path / "run", train_batch_size=PAIRS, **settings)
    first = facts(out)[0]
    assert first["log_ratio_best"] == 0  # the reference is the frozen copy, equal before the first update
    run = built(tmp_path / "again", **settings)
    base = {name: value.clone() for name, value in run.policy.state_dict().items()}
    state, _ = checkpoint.load(out / "checkpoint-2", run.learner, run.cfg.flat())
    assert state == TrainState(iteration=2, optimizer_steps=2, slots=0, pairs=2 * PAIRS)
    saved = UNet2DConditionModel.from_pretrained(str(out / "unet"))
    weights = dict(saved.named_parameters())
    assert weights.keys() == base.keys()
    for name, value in run.policy.state_dict().items():
        assert torch.equal(weights[name], value)
        assert not torch.equal(value, base[name]), f"{name} was not trained"
    with run.policy.reference():
        frozen = dict(run.policy.network.named_parameters())
    assert all(torch.equal(frozen[name], value) for name, value in base.items())


# ------------------------------------------------------------------------------------------------ accounting


def test_iteration_uses_every_pair_once(tmp_path: Path) -> None:
    run = built(tmp_path / "run", train_batch_size=3)
    batches.encode_first(run)
    record = run.iterate(0, Timer())
    assert (record["pairs"], run.state.pairs, run.state.optimizer_steps) == (PAIRS, PAIRS, round(PAIRS / 3))


def test_prompts_are_encoded_a_window_ahead(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As many as the run draws, a window at a time, and its log is the same to the bit."""
    asked: list[int] = []
    ensure = PromptCache._encode
    monkeypatch.setattr(
        PromptCache, "_encode", lambda self, prompts: (asked.append(len(prompts)), ensure(self, prompts))[1]
    )
    settings = {"max_prompts": 12, "max_train_steps": 3}  # 2 prompts an iteration
    whole = run_toy(tmp_path / "whole", **settings)
    assert asked == [7]  # and the empty one
    monkeypatch.setattr(batches, "WINDOW", 3)
    parts = run_toy(tmp_path / "parts", **settings)
    assert asked == [7, 5, 2]

    def logged(run_dir: Path) -> list[dict[str, object]]:
        times = ("time", "_ms", "_per_s")
        records = read_metrics(run_dir / "metrics.jsonl")
        return [{k: v for k, v in r.items() if not k.endswith(times)} for r in records]

    assert len(logged(whole)) == 3 and logged(whole) == logged(parts)
    assert "encode prompts_ms" in read_metrics(parts / "metrics.jsonl")[2]


def test_a_directory_is_let_go_when_its_run_has_trained(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Not when Python happens to free what the run was made of: the next one may be a line below."""
    gc.collect()
    gc.disable()
    try:
        for steps in (1, 2):
            assert train.main(flags(tmp_path / "run", max_train_steps=steps, resume_from_checkpoint="latest")) == 0
    finally:
        gc.enable()


def test_strengths_are_the_lora_at_each_weight(tmp_path: Path) -> None:
    """At 1 the picture after training, at 0 the one before, at 0.5 neither."""
    settings = {**GRIDS, "learning_rate": 0.02}
    out = run_toy(tmp_path / "run", **settings, strengths=(0, 0.5, 1))
    sheets = {n: np.asarray(Image.open(out / "samples" / f"{n}.png")) for n in ("before", "after", "strengths")}
    width = sheets["strengths"].shape[1] // 3
    zero, half, one = (sheets["strengths"][:, k * width : (k + 1) * width] for k in range(3))
    assert (zero == sheets["before"][:, :width]).all() and (one == sheets["after"][:, :width]).all()
    assert (half != zero).any() and (half != one).any()
    assert "How strong?" in (out / "report.html").read_text()
