"""What is exported beside the plain LoRA of the last step: a moving average, other kinds of LoRA, other optimizers'."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from runs import PAIRS, SMALL, assert_same_end, assert_same_tensors, built, command_line, killed_run, run_toy
from safetensors.torch import load_file

from spo_fast import train, train_spm
from spo_fast.config.presets import PRESETS
from spo_fast.config.sections import AdamConfig
from spo_fast.models.files.lora_files import LORA_FILE
from spo_fast.training import batches
from spo_fast.training.monitor.timer import Timer
from spo_fast.training.optimizer import make_optimizer
from spo_fast.training.setup import check_processes

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


# ------------------------------------------------------------------------------------------------- other optimizers

OPTIMIZERS: dict[str, dict[str, Any]] = {
    "prodigy": {"optimizer": "prodigy", "learning_rate": None, "adam_weight_decay": 0.01},
    "prodigy, warm": {"optimizer": "prodigy", "learning_rate": 0.5, "lr_warmup_steps": 1, "lr_scheduler": "cosine"},
    "schedulefree": {"optimizer": "schedulefree", "learning_rate": 2e-3, "lr_warmup_steps": 3},
    "schedulefree, 16 bits": {"optimizer": "schedulefree", "mixed_precision": "bf16", "learning_rate": 2e-3},
}


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_optimizers_go_on_bit_for_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    """With a validation before each step, and a step that only one of them resumes after."""
    pytest.importorskip("prodigyopt" if "prodigy" in kind else "schedulefree")
    more = {**TWO, "max_train_steps": 3, "train_batch_size": 1, **OPTIMIZERS[kind]}
    whole = run_toy(tmp_path / "whole", **more)
    assert yaml.safe_load((whole / "config.yaml").read_text())["learning_rate"] == (more["learning_rate"] or 1.0)
    killed = killed_run(tmp_path / "killed", monkeypatch, 2, **more)
    run_toy(killed, **more, resume_from_checkpoint="latest")
    assert_same_end(whole, killed)
    found = [json.loads((run / "checkpoint-3" / "state.json").read_text())["optimizer"] for run in (whole, killed)]
    assert found[0] == found[1] and found[0]["group"]["k"] > PAIRS
    quiet = run_toy(tmp_path / "quiet", **{**more, "num_validation_images": 0})
    assert_same_tensors(whole / "checkpoint-3" / "trained.safetensors", quiet / "checkpoint-3" / "trained.safetensors")


@pytest.mark.parametrize(
    ("file", "words", "found"),
    [
        ("optimizer: prodigy", "--method ddpo", ("prodigy", 1.0)),  # which brings a rate of AdamW's
        ("optimizer: prodigy", "--method ddpo --learning_rate 0.5", ("prodigy", 0.5)),
        ("optimizer: prodigy\nlearning_rate: 0.5", "--rank 8", ("prodigy", 0.5)),
        ("optimizer: prodigy", "--memory small", ("prodigy", 1.0)),  # 8 bits take AdamW's place alone
        ("optimizer: schedulefree", "--recipe fast", ("schedulefree", 5e-4)),
        ("optimizer: adamw", "--memory small", ("adamw8bit", 5e-4)),
        ("learning_rate: 1e-4", "--optimizer prodigy", ("prodigy", 1.0)),
    ],
)
def test_an_optimizer_and_its_rate_go_together(tmp_path: Path, file: str, words: str, found: tuple[str, float]) -> None:
    (path := tmp_path / "own.yaml").write_text(f"model: toy\n{file}\n")
    cfg = train.parse(["--config", str(path), *words.split()])
    assert (cfg.optim.optimizer, cfg.optim.learning_rate) == found


def test_of_preference_models_too(tmp_path: Path) -> None:
    (path := tmp_path / "own.yaml").write_text("model: sdxl\noptimizer: prodigy\npairs: x\n")
    cfg = train_spm.parse(["--config", str(path), "--parameterisation", "latent"])
    assert (cfg.optim.optimizer, cfg.optim.learning_rate) == ("prodigy", 1.0)


def test_prodigy_finds_its_rate() -> None:
    """Of |x - 3|: d grows from 1e-6 and x comes near; AdamW's rate of 1e-6 would have moved it by 2e-4."""
    pytest.importorskip("prodigyopt")
    x = torch.zeros(1, requires_grad=True)
    optimizer = make_optimizer([x], AdamConfig(optimizer="prodigy", learning_rate=1.0, adam_weight_decay=0.0))
    for _ in range(200):
        x.grad = torch.sign(x.detach() - 3)
        optimizer.step()
    assert abs(float(x.detach()) - 3) < 1 and optimizer.param_groups[0]["d"] > 1e-3


def test_prodigys_rate_is_logged_as_it_found_it(tmp_path: Path) -> None:
    pytest.importorskip("prodigyopt")
    learner = built(tmp_path / "run", optimizer="prodigy", learning_rate=0.5).learner
    assert learner.lr == pytest.approx(0.5 * 1e-6)  # where d begins
    for _ in range(5):
        for master in learner.parameters:
            master.grad = torch.ones_like(master)
        learner.optimizer.step()
    assert learner.lr == 0.5 * learner.optimizer.param_groups[0]["d"] > 1e-6


def test_schedule_free_exports_the_average_of_its_steps(tmp_path: Path) -> None:
    """Defazio et al., 2405.15682, eq. 2 to 4 in float64 on given gradients: x = (1 - c) x + c z, c = 1 / t."""
    pytest.importorskip("schedulefree")
    run = built(tmp_path / "run", optimizer="schedulefree", learning_rate=1e-2, adam_weight_decay=0.0)
    learner, draw = run.learner, torch.Generator().manual_seed(1)
    z = {n: v.double().clone() for n, v in run.policy.state_dict().items()}
    x, v = {n: z[n].clone() for n in z}, {n: torch.zeros_like(z[n]) for n in z}
    for t in range(1, 6):
        for name, master in zip(run.policy.names, run.policy.masters, strict=True):
            y = 0.1 * z[name] + 0.9 * x[name]
            torch.testing.assert_close(master.detach().double(), y, rtol=1e-5, atol=1e-6)
            master.grad = torch.randn(master.shape, generator=draw)
            g = master.grad.double()
            v[name] = 0.999 * v[name] + 0.001 * g**2
            z[name] = z[name] - 1e-2 * g / ((v[name] / (1 - 0.999**t)).sqrt() + 1e-8)
            x[name] = (1 - 1 / t) * x[name] + z[name] / t
        learner.optimizer.step()
    whole = run.policy.whole()
    for name in whole:
        torch.testing.assert_close(whole[name].double(), x[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"optimizer": "schedulefree", "lr_scheduler": "cosine"}, "optimizer=schedulefree has no schedule"),
        ({"optimizer": "schedulefree", "ema_decay": 0.99}, "exports an average of its own"),
        ({"optimizer": "prodigy", "learning_rate": 0}, "learning_rate"),
    ],
)
def test_optimizers_refuse_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], settings: dict[str, Any], message: str
) -> None:
    assert train.main(command_line({**SMALL, **settings, "output_dir": tmp_path})) in (1, 2)
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1 and len(error) <= 310


def test_shards_take_adamw_alone() -> None:
    cfg = PRESETS["toy"]().with_fields(full_finetune=True, optimizer="prodigy")
    with pytest.raises(ValueError, match="--optimizer prodigy cannot be cut into. Use --optimizer adamw"):
        check_processes(cfg, 2)
