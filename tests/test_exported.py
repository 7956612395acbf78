"""What is exported beside the plain LoRA of the last step: a moving average, other kinds of LoRA, other optimizers'."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import SMALL, assert_same_end, assert_same_tensors, built, command_line, killed_run, run_toy
from safetensors.torch import load_file

from spo_fast import train
from spo_fast.models.files.lora_files import LORA_FILE
from spo_fast.training import batches
from spo_fast.training.monitor.timer import Timer

TWO = {"max_train_steps": 2, "checkpointing_steps": 1, "num_validation_images": 1}
EMA = {"ema_decay": 0.75, "train_batch_size": 1, "learning_rate": 1e-2}


def test_the_exported_average_is_the_formula(tmp_path: Path) -> None:
    run = built(tmp_path / "run", **EMA)
    assert run.cfg.run.export_ema
    batches.encode_first(run)
    want = {name: v.double().clone() for name, v in run.policy.state_dict().items()}
    step = run.learner.step

    def followed() -> float:
        norm = step()
        for name, v in run.policy.state_dict().items():
            want[name] = 0.75 * want[name] + 0.25 * v.double()
        return norm

    run.learner.step = followed  # type: ignore[method-assign]
    run.iterate(0, Timer())
    whole = run.policy.whole()
    for name, v in run.policy.state_dict().items():
        torch.testing.assert_close(whole[name].double(), want[name], rtol=1e-6, atol=1e-9)
        assert not torch.equal(whole[name], v) or not v.any()
    before = [p.clone() for p in run.policy.network_weights]
    with run.policy.exported():
        for p, name in zip(run.policy.network_weights, run.policy.names, strict=True):
            assert torch.equal(p, whole[name])
    assert all(torch.equal(p, q) for p, q in zip(before, run.policy.network_weights, strict=True))


def test_an_average_is_exported_and_changes_no_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = run_toy(tmp_path / "plain", **TWO, **{**EMA, "ema_decay": None})
    whole = run_toy(tmp_path / "whole", **TWO, **EMA)
    last = whole / "checkpoint-2"
    assert_same_tensors(plain / "checkpoint-2" / "trained.safetensors", last / "trained.safetensors")
    average, lora = load_file(last / "exported_averages.safetensors"), load_file(whole / LORA_FILE)
    assert {name.removeprefix("unet."): v.sum() for name, v in lora.items()} and len(lora) == len(average)
    assert sorted(float(v.double().sum()) for v in lora.values()) == sorted(
        float(v.double().sum()) for v in average.values()
    )
    assert not (plain / "checkpoint-2" / "exported_averages.safetensors").exists()
    killed = killed_run(tmp_path / "killed", monkeypatch, 1, **TWO, **EMA)
    run_toy(killed, **TWO, **EMA, resume_from_checkpoint="latest")
    assert_same_end(whole, killed)
    assert_same_tensors(
        last / "exported_averages.safetensors", killed / "checkpoint-2" / "exported_averages.safetensors"
    )


def test_what_asks_for_an_average(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = ["--model", "toy"]
    assert not train.parse(line).run.export_ema
    assert train.parse([*line, "--ema_decay", "0.9"]).run.export_ema
    assert not train.parse([*line, "--ema_decay", "0.9", "--no-export_ema"]).run.export_ema
    assert not train.parse([*line, "--method", "gradspo", "--ema_decay", "0.8"]).run.export_ema
    old, new = tmp_path / "old.yaml", tmp_path / "new.yaml"
    old.write_text("model: toy\nema_decay: 0.9\n")  # as every run wrote it once
    new.write_text("model: toy\nema_decay: 0.999\n")
    assert not train.parse(["--config", str(old)]).run.export_ema
    assert train.parse(["--config", str(new)]).run.export_ema
    run_toy(tmp_path / "run", **TWO)
    again = {**SMALL, **TWO, **EMA, "output_dir": tmp_path / "run", "resume_from_checkpoint": "latest"}
    assert train.main(command_line(again)) == 1
    error = capsys.readouterr().err
    assert "has no moving average to export" in error and len(error) <= 310 and error.count("\n") == 1


def test_gradspo_exports_its_own_average(tmp_path: Path) -> None:
    run = built(tmp_path / "run", method="gradspo", last_step="keep", export_ema=True, ema_decay=0.5)
    assert list(run.policy.kept) == ["averages"]
    assert run.policy.finished() is run.policy.averages


KINDS: dict[str, dict[str, Any]] = {
    "rsLoRA": {"use_rslora": True, "rank": 8},
    "DoRA": {"use_dora": True},
    "DoRA, fused": {"use_dora": True, "fuse": True},
}


@pytest.mark.parametrize("kind", KINDS)
def test_kinds_of_lora_go_on_bit_for_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    whole = run_toy(tmp_path / "whole", **TWO, **KINDS[kind])
    killed = killed_run(tmp_path / "killed", monkeypatch, 1, **TWO, **KINDS[kind])
    run_toy(killed, **TWO, **KINDS[kind], resume_from_checkpoint="latest")
    assert_same_end(whole, killed)
    trained = load_file(whole / "checkpoint-2" / "trained.safetensors")
    assert any("magnitude" in name for name in trained) == ("DoRA" in kind)


def test_rslora_is_the_lora_of_a_larger_alpha(tmp_path: Path) -> None:
    """alpha / sqrt(r) = (alpha sqrt(r)) / r: the same run to the digit."""
    rs = run_toy(tmp_path / "rs", **TWO, use_rslora=True, rank=4, lora_alpha=1.5)
    plain = run_toy(tmp_path / "plain", **TWO, rank=4, lora_alpha=3.0)
    assert_same_tensors(rs / "checkpoint-2" / "trained.safetensors", plain / "checkpoint-2" / "trained.safetensors")
    assert built(tmp_path / "b", use_rslora=True, rank=16, lora_alpha=3.0).cfg.adapter.scale == 3 / math.sqrt(16)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"use_dora": True, "full_finetune": True}, "use_dora is a kind of LoRA"),
        ({"use_rslora": True, "full_finetune": True}, "use_rslora is a kind of LoRA"),
        ({"use_dora": True, "base_weights": "int8"}, "base_weights=int8 knows plain LoRAs alone"),
        ({"use_dora": True, "rollout_weights": "merged"}, "rollout_weights=merged knows plain LoRAs alone"),
    ],
)
def test_what_does_not_go_together_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], settings: dict[str, Any], message: str
) -> None:
    assert train.main(command_line({**SMALL, **settings, "output_dir": tmp_path})) in (1, 2)
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1 and len(error) <= 310
