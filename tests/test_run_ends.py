"""How a run ends before its last iteration, what it keeps, and what it leaves for other programs."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from runs import SMALL, assert_same_end, assert_same_tensors, command_line, facts, killed_run, run_toy
from safetensors import safe_open

from spo_fast import __main__ as every_command
from spo_fast import train
from spo_fast.config.errors import RunError
from spo_fast.config.presets import PRESETS
from spo_fast.config.run import RunConfig
from spo_fast.data.prompt_order import training_prompts, validation_prompts
from spo_fast.models.files.comfyui import CHECKPOINTS, Shown, model_spec, workflow
from spo_fast.models.files.lora_files import KOHYA_FILE, LORA_FILE
from spo_fast.training import loop, run_directory, verdicts
from spo_fast.training.verdicts import HeldOut, Validation

PROMPTS = [f"prompt {n}" for n in range(8)]
TWO = {"max_train_steps": 2, "checkpointing_steps": 1}


def validated(**values: Any) -> Validation:
    looks = {name: [0.1] * 8 for name in ("saturation", "contrast", "edges", "colourfulness")}
    return Validation(1.0, {**looks, **{n: list(map(float, v)) for n, v in values.items()}}, {"prompts": PROMPTS})


def watch(tmp_path: Path, **settings: Any) -> HeldOut:
    return HeldOut(RunConfig(**settings), ["hpsv2", "aesthetic"], 8, tmp_path)


SPREAD = np.linspace(-1, 1, 8)


def test_an_anchor_ends_a_run_when_it_has_fallen_beyond_chance(tmp_path: Path) -> None:
    held_out, before = watch(tmp_path, anchor=("hpsv2",)), validated(hpsv2=SPREAD)
    found = held_out.look(10, validated(hpsv2=SPREAD - 0.1 + 0.3 * SPREAD**3), before, "")
    assert found["anchor_hpsv2"] == pytest.approx(-0.1) and not held_out.stop  # the interval reaches over 0
    assert found["anchor_hpsv2_low"] < found["anchor_hpsv2"] < 0 < found["anchor_hpsv2_high"]  # type: ignore[operator]
    held_out.look(20, validated(hpsv2=SPREAD - 0.1), before, "")
    assert held_out.stop == "hpsv2 has fallen by 0.100 since training began, and not by chance"
    held_out.look(30, validated(hpsv2=SPREAD + 1), before, "saturation is 40% above")
    assert held_out.stop == "saturation is 40% above"


def test_the_interval_is_that_of_the_paired_differences(tmp_path: Path) -> None:
    """Of 8 differences d: mean -+ 2.3646 s / sqrt(8), the quantile .975 of Student's t with 7 degrees of freedom."""
    d = np.array([-3.0, 1, 0, -2, 4, -1, -2, -5])
    found = watch(tmp_path, anchor=("hpsv2",)).look(1, validated(hpsv2=d), validated(hpsv2=0 * d), "")
    assert d.mean() == -1 and found["anchor_hpsv2"] == -1
    half = 2.3646 * (((d + 1) ** 2).sum() / 7) ** 0.5 / 8**0.5
    assert found["anchor_hpsv2_low"] == pytest.approx(-1 - half, abs=1e-3)
    assert found["anchor_hpsv2_high"] == pytest.approx(-1 + half, abs=1e-3)


def test_stop_when_compares_with_the_highest_so_far_also_after_a_resume(tmp_path: Path) -> None:
    (tmp_path / "samples").mkdir()  # the grids are there by then
    held_out = watch(tmp_path, stop_when=("held_out_hpsv2",))
    for done, level in ((1, 0.0), (2, 1.0), (3, 0.9)):
        held_out.look(done, validated(hpsv2=SPREAD + level), None, "")
        assert bool(held_out.stop) == (done == 3)
    again = watch(tmp_path, stop_when=("hpsv2",))
    again.go_on(1)  # what came later is not known, and will be made again
    again.look(2, validated(hpsv2=SPREAD + 0.5), None, "")
    assert not again.stop
    again.go_on(2)
    again.look(3, validated(hpsv2=SPREAD + 0.4), None, "")
    assert "held-out hpsv2 has fallen by 0.100 from its highest" in again.stop


def test_the_best_is_kept_and_what_a_resume_makes_again_is_dropped(tmp_path: Path) -> None:
    held_out, saved = watch(tmp_path, keep_best="hpsv2"), []

    def save(folder: Path) -> None:
        folder.mkdir()
        saved.append(folder)

    for done, level in ((1, 0.0), (2, 1.0), (3, 0.5)):
        held_out.keep(done, validated(hpsv2=SPREAD + level), save)
    assert len(saved) == 2 and not saved[0].exists()
    assert json.loads((tmp_path / "best" / "best.json").read_text())["iteration"] == 2
    held_out.go_on(2)
    assert (tmp_path / "best").is_dir()
    held_out.go_on(1)
    assert not (tmp_path / "best").exists()


def made(folder: Path) -> None:
    folder.mkdir()


def test_a_kill_between_the_old_best_and_the_new_loses_neither(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    held_out = watch(tmp_path, keep_best="hpsv2")
    held_out.keep(1, validated(hpsv2=SPREAD), made)
    move = os.replace

    def killed(source: Path, target: Path) -> None:
        if Path(source).name == ".tmp-best":
            raise KeyboardInterrupt
        move(source, target)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(os, "replace", killed)
        held_out.keep(2, validated(hpsv2=SPREAD + 1), made)
    assert not (tmp_path / "best").exists()
    again = watch(tmp_path, keep_best="hpsv2")
    again.keep(2, validated(hpsv2=SPREAD - 1), made)  # worse than what was kept
    assert json.loads((tmp_path / "best" / "best.json").read_text())["iteration"] == 1
    again.keep(3, validated(hpsv2=SPREAD + 2), made)
    assert json.loads((tmp_path / "best" / "best.json").read_text())["iteration"] == 3
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".tmp")]


def test_what_is_not_finite_is_no_best_and_no_highest_and_ends_the_run(tmp_path: Path) -> None:
    (tmp_path / "samples").mkdir()
    held_out, broken = watch(tmp_path, keep_best="hpsv2", stop_when=("hpsv2",)), SPREAD.copy()
    broken[3] = np.nan
    for done, values in ((1, broken), (2, SPREAD), (3, broken), (4, SPREAD - 0.5)):
        held_out.look(done, validated(hpsv2=values), None, "")
        held_out.keep(done, validated(hpsv2=values), made)
        assert ("hpsv2 is not finite" in held_out.stop) == (done % 2 == 1)
    assert "has fallen by 0.500 from its highest" in held_out.stop
    assert json.loads((tmp_path / "best" / "best.json").read_text())["iteration"] == 2
    assert "NaN" not in (tmp_path / "samples" / "step-1.json").read_text()  # JSON has no such word
    again = watch(tmp_path, stop_when=("hpsv2",))
    again.go_on(3)
    assert again.highest["hpsv2"].mean("hpsv2") == pytest.approx(SPREAD.mean())


@pytest.mark.parametrize("other", ["score", "prompts"])
def test_validations_of_other_settings_are_not_compared(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], other: str
) -> None:
    """A best or highest by another score or of other prompts stands in nobody's way."""
    (tmp_path / "samples").mkdir()
    first = watch(tmp_path, keep_best="hpsv2", stop_when=("hpsv2",))
    first.look(1, high := validated(hpsv2=SPREAD + 9), None, "")
    first.keep(1, high, made)
    name = "aesthetic" if other == "score" else "hpsv2"
    shown = {"prompts": [f"other {n}" for n in range(16)]} if other == "prompts" else high.of
    now = validated(**{name: [*SPREAD] * (len(shown["prompts"]) // 8)})._replace(of=shown)
    again = HeldOut(RunConfig(keep_best=name, stop_when=(name,)), [name], len(shown["prompts"]), tmp_path)
    again.go_on(1)
    again.look(2, now, None, "")
    again.keep(2, now, made)
    assert not again.stop and again.highest[name] is now
    best = json.loads((tmp_path / "best" / "best.json").read_text())
    assert (best["iteration"], best["metric"], best["of"]) == (2, name, shown)
    assert len(list(tmp_path.glob("old-*-best"))) == 1 and "set aside" in capsys.readouterr().out


def test_a_new_run_knows_nothing_of_one_that_left_no_checkpoint(tmp_path: Path, prompt_file: Path) -> None:
    more = {"resolution": None, "num_validation_images": 1, "validation_prompt_file": prompt_file, "max_train_steps": 1}
    (old := tmp_path / "run" / "best").mkdir(parents=True)
    (old / "best.json").write_text(json.dumps({"iteration": 1, "metric": "layout", "mean": 1e9}))
    run = run_toy(tmp_path / "run", **more, keep_best="layout")
    assert json.loads((run / "best" / "best.json").read_text())["mean"] < 1e9 and (run / "best" / LORA_FILE).is_file()


@pytest.mark.parametrize(
    ("settings", "before", "message"),
    [
        ({"anchor": ("hpsv2",)}, None, "--anchor hpsv2 compares with the pictures before training"),
        ({"anchor": ("aesthetic",)}, {"hpsv2": SPREAD}, "were not measured so, or are not finite"),
        ({"anchor": ("hpsv2",)}, {"hpsv2": SPREAD * np.nan}, "were not measured so, or are not finite"),
        ({"stop_when": ("hacking",)}, None, "--stop_when hacking compares with"),
        ({"stop_when": ("hpsv2",)}, None, None),
        ({"anchor": ("hpsv2",), "stop_when": ("hacking",)}, {"hpsv2": SPREAD}, None),
    ],
)
def test_nothing_to_compare_with_is_an_error(
    tmp_path: Path, settings: dict[str, Any], before: dict[str, Any] | None, message: str | None
) -> None:
    held_out = watch(tmp_path, **settings)
    with pytest.raises(RunError, match=message) if message else contextlib.nullcontext():
        held_out.check_before(None if before is None else validated(**before))


def test_an_anchor_of_other_pictures_is_one_line(
    tmp_path: Path, prompt_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = {**TWO, "resolution": None, "num_validation_images": 1, "validation_prompt_file": prompt_file}
    more |= {"anchor": ["layout"]}
    run = run_toy(tmp_path / "run", **{**more, "max_train_steps": 1})
    capsys.readouterr()
    line = command_line({**SMALL, **more, "seed": 7, "output_dir": run, "resume_from_checkpoint": "latest"})
    assert train.main(line) == 1
    error = capsys.readouterr().err
    assert "--anchor layout compares with" in error and error.count("\n") == 1 and len(error) <= 310
    assert (run / "samples" / "before.json").is_file()  # the settings may be put right


def test_a_text_file_of_validation_prompts_beside_a_table_of_prompts(tmp_path: Path) -> None:
    """--caption_column is the table's: a text file has no columns, whichever of the two it is."""
    (table := tmp_path / "prompts.csv").write_text("words,caption\na cat,x\na dog,y\n")
    (text := tmp_path / "shown.txt").write_text("one\ntwo\n")
    cfg = PRESETS["toy"]().with_fields(prompts=str(table), caption_column="words", validation_prompt_file=str(text))
    prompts, _ = training_prompts(cfg)
    assert (prompts, validation_prompts(cfg, prompts)) == (["a cat", "a dog"], ["one", "two"])
    both = cfg.with_fields(validation_prompt_file=str(table))
    assert validation_prompts(both, prompts) == prompts
    of_pairs = cfg.with_fields(method="dpo", pairs="a table", prompts=str(text))
    assert training_prompts(of_pairs)[0] == ["one", "two"]
    with pytest.raises(ValueError, match="a text file has no columns"):
        training_prompts(cfg.with_fields(prompts=str(text)))


def test_scores_are_named_as_the_log_or_validation_metrics_have_them() -> None:
    cfg = RunConfig(anchor=("held_out_hpsv2,aesthetic",), stop_when=("hacking,hpsv2",), keep_best="held_out_clip")
    assert (cfg.anchored, cfg.falling, cfg.best) == (("hpsv2", "aesthetic"), ("hpsv2",), ("clip",))
    assert cfg.watches_looks and set(cfg.validation_metrics) == {"hpsv2", "aesthetic", "clip"}
    assert not RunConfig(stop_when=("hpsv2",)).watches_looks


@pytest.fixture
def prompt_file(tmp_path: Path) -> Path:
    from spo_fast.data import toy_world

    file = tmp_path / "shown.txt"
    file.write_text("\n".join(sorted(toy_world.CAPTIONS)[:8]))
    return file


def test_a_run_watches_its_true_scores(
    tmp_path: Path, prompt_file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    more = {**TWO, "resolution": None, "num_validation_images": 1, "validation_prompt_file": prompt_file}
    more |= {"anchor": ["layout"], "stop_when": ["held_out_layout"], "keep_best": "held_out_layout"}
    whole = run_toy(tmp_path / "whole", **more)
    assert "anchor layout: " in capsys.readouterr().out
    records = facts(whole)
    assert all(r["anchor_layout_low"] <= r["anchor_layout"] <= r["anchor_layout_high"] for r in records)
    before = json.loads((whole / "samples" / "before.json").read_text())["values"]["layout"]
    assert records[0]["anchor_layout"] == pytest.approx(records[0]["held_out_layout"] - np.mean(before))
    best = json.loads((whole / "best" / "best.json").read_text())
    scores = [r["held_out_layout"] for r in records]
    assert best["mean"] == max(scores) and best["iteration"] == scores.index(max(scores)) + 1
    assert (whole / "best" / LORA_FILE).is_file()
    killed = killed_run(tmp_path / "killed", monkeypatch, 1, **more)
    run_toy(killed, **more, resume_from_checkpoint="latest")
    assert_same_end(whole, killed)


def test_a_stop_leaves_all_that_a_finished_run_does(
    tmp_path: Path, prompt_file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(verdicts, "mean_interval", lambda values: early_stop_interval())
    more = {"resolution": None, "num_validation_images": 1, "validation_prompt_file": prompt_file, "anchor": ["layout"]}
    run = run_toy(tmp_path / "run", **{**TWO, "max_train_steps": 4}, **more)
    assert len(facts(run)) == 1 and (run / LORA_FILE).is_file() and (run / "report.html").is_file()
    assert (run / "checkpoint-1").is_dir() and (run / "samples" / "after.png").is_file()
    out = capsys.readouterr().out
    assert "ends early, after 1 iterations: layout has fallen by 0.300 since training began" in out


def early_stop_interval() -> Any:
    from spo_fast.evaluation.statistics import Interval

    return Interval(-0.3, -0.4, -0.2)


def test_minutes_end_a_run_and_it_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shown = {"num_validation_images": 1, "resolution": None, "keep_best": "layout"}
    whole = run_toy(tmp_path / "whole", **TWO, **shown)
    clock = iter(range(0, 10_000, 61))
    with monkeypatch.context() as patch:
        patch.setattr(loop.time, "monotonic", lambda: float(next(clock)))
        part = run_toy(tmp_path / "part", **{**TWO, "checkpointing_steps": 2}, **shown, max_train_minutes=1)
    assert "max_train_minutes=1 have passed: the run ends after 1 iterations" in capsys.readouterr().out
    assert (part / LORA_FILE).is_file() and (part / "checkpoint-1").is_dir() and not (part / "checkpoint-2").exists()
    assert "held_out_layout" in facts(part)[-1] and (part / "best" / LORA_FILE).is_file()  # as any run's end
    run_toy(part, **TWO, **shown, resume_from_checkpoint="latest")
    assert_same_end(whole, part)


# ------------------------------------------------------------------------------------------------------- from the hub


def test_a_checkpoint_from_the_hub_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = run_toy(tmp_path / "whole", **TWO)
    remote, asked = tmp_path / "hub" / "snapshots" / "0123", []
    (blobs := tmp_path / "hub" / "blobs").mkdir(parents=True)
    shutil.copytree(whole / "checkpoint-1", remote / "checkpoint-1")
    for number, file in enumerate(p for p in remote.rglob("*") if p.is_file()):  # as the hub's cache has them
        file.rename(blobs / str(number))
        file.symlink_to(blobs / str(number))

    def download(name: str, **options: Any) -> str:
        asked.append((name, options))
        return str(remote)

    files = ["README.md", "checkpoint-1/state.json", "checkpoint-0/state.json", "checkpoint-x/a", "a/checkpoint-9/b"]
    monkeypatch.setattr("huggingface_hub.HfApi.list_repo_files", lambda api, name, revision: files)
    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    monkeypatch.setattr(run_directory, "offline_reason", lambda: None)
    mine = run_toy(tmp_path / "mine", **TWO, resume_from_checkpoint="hub:me/run@main")
    assert asked == [("me/run", {"revision": "main", "allow_patterns": ["checkpoint-1/*"]})]
    for file in ("trained.safetensors", "optimizer.safetensors"):
        assert_same_tensors(whole / "checkpoint-2" / file, mine / "checkpoint-2" / file)


def raises(error: Exception) -> Any:
    def function(*args: Any, **options: Any) -> Any:
        raise error

    return function


@pytest.mark.parametrize(
    ("wanted", "offline", "download", "message"),
    [
        ("hub:me/run", "HF_HUB_OFFLINE is set", None, "cannot be downloaded: HF_HUB_OFFLINE is set"),
        ("hub:me", None, None, "is no repository. Write hub:OWNER/NAME"),
        ("hub:../run", None, None, "is no repository"),
        ("hub:me/run", None, raises(OSError("404 " * 200)), "Mend its name, or log in"),
        ("hub:me/run", None, lambda *a, **o: "/nowhere", "has no checkpoint-N folder"),
    ],
)
def test_what_the_hub_has_not_is_one_line(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    wanted: str,
    offline: str | None,
    download: Any,
    message: str,
) -> None:
    monkeypatch.setattr("huggingface_hub.HfApi.list_repo_files", lambda api, name, revision: ["README.md"])
    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    monkeypatch.setattr(run_directory, "offline_reason", lambda: offline)
    line = command_line({**SMALL, **TWO, "output_dir": tmp_path / "run", "resume_from_checkpoint": wanted})
    assert train.main(line) == 1
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1 and len(error) <= 310


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"anchor": ["layouts"], "resolution": None, "num_validation_images": 1}, "layouts"),
        ({"stop_when": ["layout"], "resolution": None, "num_validation_images": 1}, "are too few. Give 8 or more"),
        ({"keep_best": "layout", "resolution": None}, "need pictures"),
        ({"keep_best": "layout", "num_validation_images": 1}, "--keep_best layout is not measured here, only none"),
        ({"max_train_minutes": 0}, "max_train_minutes"),
        ({"validation_prompt": ["a"], "validation_prompt_file": "b.txt"}, "say the same thing"),
        ({"validation_prompt_file": "/nowhere.txt"}, "/nowhere.txt"),
        ({"anchor": ["spm"]}, "spm is the scorer"),
        ({"anchor": [""]}, "anchor is empty"),
        ({"stop_when": [","]}, "stop_when is empty"),
    ],
)
def test_wrong_values_are_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], settings: dict[str, Any], message: str
) -> None:
    assert train.main(command_line({**SMALL, **settings, "output_dir": tmp_path / "run"})) in (1, 2)
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1 and len(error) <= 310


# -------------------------------------------------------------------------------------------------- other programs

SHOWN = Shown(prompt="a cat", height=768, width=512, steps=20, guidance_scale=5.0, seed=42)


@pytest.mark.parametrize("kind", ["sd15", "sdxl", "sd35", "flux"])
def test_a_workflow_is_a_closed_graph_with_the_lora(kind: str) -> None:
    nodes: Any = workflow(kind, "mine.safetensors", SHOWN)
    links = [v for node in nodes.values() for v in node["inputs"].values() if isinstance(v, list)]
    assert {number for number, _ in links} | {"9"} == set(nodes)  # each feeds another, but for the picture's
    kinds = {node["class_type"]: node["inputs"] for node in nodes.values()}
    assert kinds["LoraLoaderModelOnly"]["lora_name"] == "mine.safetensors"
    assert kinds["KSampler"]["model"] == ["2", 0] and kinds["KSampler"]["cfg"] == (1.0 if kind == "flux" else 5.0)
    latent = kinds["EmptyLatentImage" if kind in ("sd15", "sdxl") else "EmptySD3LatentImage"]
    assert (latent["width"], latent["height"]) == (512, 768)
    assert ("CheckpointLoaderSimple" in kinds) == (kind in CHECKPOINTS)


def test_the_kohya_file_says_what_it_is(tmp_path: Path) -> None:
    run = run_toy(tmp_path / "mine", max_train_steps=1)
    with safe_open(run / KOHYA_FILE, "pt") as file:
        found = file.metadata()
    assert found["modelspec.title"] == "mine" and found["modelspec.sai_model_spec"] == "1.0.0"
    assert found["modelspec.architecture"] == "stable-diffusion-xl-v1-base/lora"
    assert found["modelspec.resolution"] == "8x8" and found["modelspec.trigger_phrase"] == "none"
    assert model_spec("sd15", "x", (768, 512))["modelspec.resolution"] == "512x768"


# ------------------------------------------------------------------------------------------------------ spo-fast


def test_every_command_by_one_name(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert every_command.main([]) == 0 and "train-spm" in capsys.readouterr().out
    assert every_command.main(["trian"]) == 2
    assert "Did you mean 'train'?" in capsys.readouterr().err
    assert every_command.main(["report", str(tmp_path)]) == 1
    assert every_command.main(["train", "--model", "toy", "--rank", "0"]) == 2
    assert "rank" in capsys.readouterr().err
    assert every_command.main(["ops", "--device", "cpu"]) == 0
    assert "lora_linear" in (printed := capsys.readouterr().out) and " cuda " not in printed
    with pytest.raises(SystemExit) as refused:
        every_command.main(["ops", "--devise", "cpu"])
    assert refused.value.code == 2 and "--devise" in capsys.readouterr().err
    assert set(PRESETS) >= {"toy"}
