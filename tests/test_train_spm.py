"""Whole runs that train the toy's preference model: what they leave, resuming, counts, precision, labels, errors."""

from __future__ import annotations

import hashlib
import io
import json
import math
import os
import shutil
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from golden_replay import load
from PIL import Image
from runs import (
    ROOT,
    Killed,
    assert_same_end,
    assert_same_tensors,
    command_line,
    default_float64,
    facts,
    kill_once_logged,
    start,
)
from safetensors.torch import load_file
from torch import Tensor, nn

from spo_fast import train_spm
from spo_fast.data.toy_world import TUNE
from spo_fast.evaluation.agreement import Judgements, write_report
from spo_fast.evaluation.pages.run_record import read_metrics
from spo_fast.models import device
from spo_fast.models.device import Device
from spo_fast.models.files.toy import WEIGHTS
from spo_fast.models.fuse import FusedAttention, FusedResnet
from spo_fast.scorers.clip_files import load_clip
from spo_fast.scorers.latent_files import load_latent_reward
from spo_fast.scorers.registry import load_scorer
from spo_fast.toy.build import write_pairs
from spo_fast.training import checkpoint, pair_batches, preference_run
from spo_fast.training.monitor.timer import Timer
from spo_fast.training.preference_learner import RewardLearner, learning_rate_factor
from spo_fast.training.preference_run import PreferenceRun

pa = pytest.importorskip("pyarrow")
import pyarrow.parquet as pq  # noqa: E402

# 24 pairs, about a fifth of them held out: an epoch has 4 steps, so that 6 steps cross its end
SMALL: dict[str, Any] = {
    "model": "toy",
    "device": "cpu",
    "train_batch_size": 4,
    "max_train_steps": 6,
    "validation_share": 0.2,
    "learning_rate": 1e-3,
    "max_validation_pairs": 8,
    "validation_timesteps": (0, 501),
    "checkpointing_steps": 2,
    "validation_steps": 3,
    "lr_scheduler": "constant",
    "lr_warmup_steps": 0,
    "num_workers": 2,
    "cache_latents": True,
    "num_train_epochs": 3,
}
STEPS = 6


def line(output_dir: Path, **settings: Any) -> list[str]:
    """SMALL's command line with some settings changed."""
    return command_line({**SMALL, "output_dir": output_dir, **settings})


def trained(output_dir: Path, **settings: Any) -> Path:
    """A run in this process to its end."""
    assert train_spm.main(line(output_dir, **settings)) == 0
    return output_dir


def built(output_dir: Path, **settings: Any) -> PreferenceRun:
    """The parts of a run, not started."""
    return train_spm.build(train_spm.parse(line(output_dir, **settings)))


def refused(capsys: pytest.CaptureFixture[str], output_dir: Path, **settings: Any) -> str:
    """The error of a run that ends with status 1 (2: of its command line)."""
    assert train_spm.main(line(output_dir, **settings)) in (1, 2)
    error = capsys.readouterr().err
    assert error.startswith("error: ") and "Traceback" not in error
    return error


def one_step(run: PreferenceRun) -> dict[str, Any]:
    with run.stream() as stream:
        return run.iterate(iter(stream), Timer())


def gradients(run: PreferenceRun) -> dict[str, Tensor]:
    """Of the masters, as the first optimizer step finds them."""
    kept: dict[str, Tensor] = {}
    whole = run.learner.step

    def step() -> Tensor:
        weights = run.reward.weights
        kept.update(
            {n: p.grad.clone() for n, p in zip(weights.names, weights.masters, strict=True) if p.grad is not None}
        )
        return whole()

    run.learner.step = step  # type: ignore[method-assign]
    one_step(run)
    return kept


def distance(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    """Norm of the difference over the norm."""
    assert a.keys() == b.keys()
    difference = sum(float((a[name].double() - b[name].double()).square().sum()) for name in a)
    return math.sqrt(difference / sum(float(value.double().square().sum()) for value in a.values()))


def rows_of(module: nn.Module) -> list[int]:
    """Grows by the batch size of each forward of the module."""
    rows: list[int] = []
    module.register_forward_pre_hook(lambda _, args: rows.append(len(args[0])))
    return rows


def images_of(module: nn.Module) -> Counter[bytes]:
    """Counts the images that enter the module; those of one colour are padding."""
    seen: Counter[bytes] = Counter()

    def look(_: nn.Module, args: tuple[Tensor, ...]) -> None:
        seen.update(x.numpy().tobytes() for x in args[0] if x.flatten(1).std(1).any())

    module.register_forward_pre_hook(look)
    return seen


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("pairs") / "pairs.parquet"
    write_pairs(path, 24, seed=0)
    return path


@pytest.fixture(scope="module")
def folder(pairs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same pairs as PNG files and a table."""
    path = tmp_path_factory.mktemp("folder")
    with (path / "pairs.jsonl").open("w") as table:
        for i, row in enumerate(pq.read_table(pairs).to_pylist()):
            for j in range(2):
                (path / f"{i}_{j}.png").write_bytes(row[f"jpg_{j}"])
            record = {"prompt": row["caption"], "image_0": f"{i}_0.png", "image_1": f"{i}_1.png"}
            table.write(json.dumps(record | {"label_0": row["label_0"], "label_1": row["label_1"]}) + "\n")
    return path


def changed(source: Path, path: Path, change: Callable[[dict[str, list[Any]]], None]) -> Path:
    """A copy of a parquet file whose columns were changed."""
    columns = pq.read_table(source).to_pydict()
    change(columns)
    pq.write_table(pa.table(columns), path)
    return path


@pytest.fixture(scope="module")
def whole_run(pairs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained(tmp_path_factory.mktemp("whole") / "run", pairs=pairs)


# ------------------------------------------------------------------------------------------------- a run's files


def test_run_leaves_a_model_that_loads_as_scorer_spm(whole_run: Path, pairs: Path) -> None:
    file = whole_run / "preference_model" / "model.safetensors"
    saved = load_file(file)
    assert all(name.startswith("model.") for name in saved)
    assert saved.keys() == load_file(WEIGHTS / "spm" / "model.safetensors").keys()
    masters = load_file(whole_run / f"checkpoint-{STEPS}" / "trained.safetensors")
    assert saved.keys() == {f"model.{name}" for name in masters}
    assert all(torch.equal(saved[f"model.{name}"], value) for name, value in masters.items())
    end = len(saved["model.text_model.embeddings.token_embedding.weight"]) - 1
    paths = {"spm": whole_run / "preference_model"}
    scorer = load_scorer([("spm", 1.0)], paths, lambda prompts: torch.full((len(prompts), 1), end))
    assert scorer.model.config.time_conditioned  # type: ignore[attr-defined]
    assert {p.name for p in whole_run.glob("checkpoint-*")} == {"checkpoint-2", "checkpoint-4", "checkpoint-6"}


def test_metrics(whole_run: Path) -> None:
    records = read_metrics(whole_run / "metrics.jsonl")
    assert [r["iteration"] for r in records] == list(range(STEPS))
    assert [r["epoch"] for r in records][0] == 0 and records[-1]["epoch"] == 1
    for r in records:
        assert math.isfinite(r["loss"]) and r["grad_norm"] > 0 and r["lr"] == 1e-3 and r["bad_rows"] == 0
        assert r["accuracy"] in (0, 0.25, 0.5, 0.75, 1)
        assert all(r[f"{phase}_ms"] >= 0 for phase in ("data", "frozen", "backward", "step"))
    evaluated = [i for i, r in enumerate(records) if "evaluate_ms" in r]
    assert evaluated == [2] and {"accuracy_t0", "accuracy_t501"} <= records[2].keys()


def test_saved_config_reads_back_as_the_same(whole_run: Path, pairs: Path) -> None:
    cfg = train_spm.parse(line(whole_run, pairs=pairs))
    assert train_spm.parse(["--config", str(whole_run / "config.yaml")]) == cfg
    latent = train_spm.parse(line(whole_run, pairs=pairs, parameterisation="latent", noise="all"))
    file = whole_run.parent / "latent.yaml"
    file.write_text(yaml.safe_dump(latent.flat()))
    assert latent.reward.noise == "all" and not latent.reward.shared_noise  # given beside the recipe, it wins
    assert train_spm.parse(["--config", str(file)]) == latent


def test_evaluation(whole_run: Path) -> None:
    found = json.loads((whole_run / "evaluation.json").read_text())
    assert found.keys() == {"accuracy", "gain", "log_loss", "calibration_error", "calibration"}
    assert found["accuracy"].keys() == {"trained", "initial"}  # it starts from a plain CLIP
    assert found["accuracy"]["trained"].keys() == {"0", "501"}
    held_out = {pairs for by_time in found["accuracy"].values() for _, _, pairs in by_time.values()}
    assert len(held_out) == 1 and 1 <= held_out.pop() <= 8
    for t, (gain, _, _) in found["gain"]["initial"].items():
        assert gain == pytest.approx(found["accuracy"]["trained"][t][0] - found["accuracy"]["initial"][t][0])
    assert "| t   | pairs | trained " in (whole_run / "evaluation.md").read_text()
    with Image.open(whole_run / "evaluation.png") as image:
        assert image.width > 500 and len(image.convert("L").getcolors(256) or []) > 10


def test_other_models_are_compared(whole_run: Path, pairs: Path, tmp_path: Path) -> None:
    """A finished run, resumed, evaluates again: its own export agrees with itself, the plain CLIP with the start."""
    copy = Path(shutil.copytree(whole_run, tmp_path / "run"))
    others = (f"itself={whole_run / 'preference_model'}", f"pickscore={WEIGHTS / 'pickscore'}")
    trained(copy, pairs=pairs, resume_from_checkpoint="latest", compare_with=others)
    assert_same_end(whole_run, copy)
    found = json.loads((copy / "evaluation.json").read_text())
    for kind in ("accuracy", "log_loss", "calibration"):
        assert found[kind]["itself"] == found[kind]["trained"]
        assert found[kind]["pickscore"] == found[kind]["initial"]
    assert found["log_loss"]["trained"] != found["log_loss"]["initial"]


# --------------------------------------------------------------------------------------------------------- resuming


def killed(output_dir: Path, monkeypatch: pytest.MonkeyPatch, after: int, **settings: Any) -> Path:
    """A run in this process that dies inside an optimizer step, after `after` whole ones."""
    whole, calls = RewardLearner.step, []

    def dies(self: RewardLearner) -> Tensor:
        calls.append(1)
        norm = whole(self)
        if len(calls) > after:
            raise Killed
        return norm

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(RewardLearner, "step", dies)
        train_spm.main(line(output_dir, **settings))
    return output_dir


def assert_same_model(a: Path, b: Path) -> None:
    assert_same_tensors(*(run / "preference_model" / "model.safetensors" for run in (a, b)))
    assert (a / "evaluation.json").read_bytes() == (b / "evaluation.json").read_bytes()


BF16_UNGUIDED = {"train_guidance_scale": 1.0, "reward_dtype": "bf16"}
EIGHT_BIT = {"optimizer": "adamw8bit", "min_8bit_size": 1}


@pytest.mark.parametrize(
    ("killed_after", "settings"),
    [
        (5, {}),  # in the second epoch; a step is repeated
        (3, {"cache_latents": False, "gradient_accumulation_steps": 2, "max_train_steps": 4, **BF16_UNGUIDED}),
        (3, {"parameterisation": "latent", "max_train_steps": 4, **EIGHT_BIT}),
        pytest.param(1, {"lr_scheduler": "warmup_decay", "lr_warmup_steps": 3}, marks=pytest.mark.slow),
        pytest.param(5, {"parameterisation": "latent", "cache_latents": False}, marks=pytest.mark.slow),
        pytest.param(5, {"parameterisation": "latent", "gradient_accumulation_steps": 2}, marks=pytest.mark.slow),
        pytest.param(3, {"parameterisation": "latent", "reward_dtype": "bf16"}, marks=pytest.mark.slow),
        pytest.param(5, {"relabel": "pickscore", "relabel_gap": 0.01}, marks=pytest.mark.slow),
        pytest.param(
            3,
            {"relabel": "pickscore", "relabel_gap": 0.01, "noise": "none", "time_conditioned": False},
            marks=pytest.mark.slow,
        ),
        pytest.param(5, {"in_batch_negatives": True, **EIGHT_BIT}, marks=pytest.mark.slow),
    ],
)
def test_killed_and_resumed_ends_bit_identical(
    pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, killed_after: int, settings: dict[str, Any]
) -> None:
    settings = {"pairs": pairs, **settings}
    whole = trained(tmp_path / "whole", **settings)
    other = killed(tmp_path / "killed", monkeypatch, killed_after, **settings)
    assert len(read_metrics(other / "metrics.jsonl")) == killed_after
    trained(other, resume_from_checkpoint="latest", **settings)
    assert_same_end(whole, other)
    assert_same_model(whole, other)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_ends_well(
    whole_run: Path, pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any, number: int
) -> None:
    out, calls, step = tmp_path / "run", [0], RewardLearner.step

    def signals(self: RewardLearner) -> Tensor:
        calls[0] += 1
        if calls[0] == 3:
            os.kill(os.getpid(), number)
        return step(self)

    with monkeypatch.context() as patch:
        patch.setattr(RewardLearner, "step", signals)
        assert train_spm.main(line(out, pairs=pairs, checkpointing_steps=100)) == 0
    assert "stopped after iteration 3" in capsys.readouterr().out
    assert [p.name for p in out.glob("checkpoint-*")] == ["checkpoint-3"] and len(facts(out)) == 3
    assert not (out / "preference_model").exists()  # it is no end
    trained(out, pairs=pairs, resume_from_checkpoint="latest")
    assert_same_end(whole_run, out)
    assert_same_model(whole_run, out)


def test_a_folder_of_images_resumes_alike(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = {"pairs": folder, "validation_share": 0, "noise": "none", "time_conditioned": False}
    whole = trained(tmp_path / "whole", **settings, max_train_steps=8)  # an epoch has 6 steps
    other = killed(tmp_path / "killed", monkeypatch, 7, **settings, max_train_steps=8)
    trained(other, resume_from_checkpoint="latest", **settings, max_train_steps=8)
    assert [r["epoch"] for r in facts(whole)] == [0] * 5 + [1] * 3
    assert_same_end(whole, other)


def test_eight_bit_state_is_eight_bit(pairs: Path, tmp_path: Path) -> None:
    out = trained(tmp_path / "run", pairs=pairs, max_train_steps=1, **EIGHT_BIT)
    state = load_file(out / "checkpoint-1" / "optimizer.safetensors")
    moments = [v for name, v in state.items() if name.split(".")[1] in ("state1", "state2")]
    assert moments and all(v.dtype == torch.uint8 for v in moments)


@pytest.mark.slow
@pytest.mark.parametrize("parameterisation", ["pixel", "latent"])
def test_sigkill_in_another_process(tmp_path: Path, parameterisation: str) -> None:
    pairs = tmp_path / "pairs.parquet"
    write_pairs(pairs, 120, seed=1)
    settings = {"pairs": pairs, "parameterisation": parameterisation, "max_train_steps": 60, "checkpointing_steps": 4}
    out = tmp_path / "killed"

    def spm(**more: Any) -> subprocess.Popen[str]:
        return start(line(out, **settings, **more), "spo_fast.train_spm")

    kill_once_logged(spm(), out / "metrics.jsonl", 30)
    assert len(read_metrics(out / "metrics.jsonl")) < 60
    resumed = spm(resume_from_checkpoint="latest")
    output, errors = resumed.communicate()
    assert resumed.returncode == 0, errors
    assert "resumed from" in output
    whole = trained(tmp_path / "whole", **settings)
    assert_same_end(whole, out)
    assert_same_model(whole, out)


# what a kill meets: the file whose name is about to become final, and how many such went well
@pytest.mark.parametrize(
    ("spared", "is_target"),
    [
        pytest.param(0, lambda run, p: p == run / "checkpoint-4", id="checkpoint"),
        pytest.param(0, lambda run, p: p == run / "preference_model" / "model.safetensors", id="weights"),
        pytest.param(3, lambda run, p: p.is_relative_to(run / "latent_cache"), id="latents"),
        pytest.param(0, lambda run, p: p.name == "config.json", id="settings", marks=pytest.mark.slow),
        pytest.param(3, lambda run, p: p.is_relative_to(run / "prompt_cache"), id="prompts", marks=pytest.mark.slow),
        pytest.param(0, lambda run, p: p == run / "evaluation.json", id="report", marks=pytest.mark.slow),
        pytest.param(0, lambda run, p: p == run / "evaluation.png", id="picture", marks=pytest.mark.slow),
    ],
)
def test_killed_while_saving_leaves_nothing_half_written(
    whole_run: Path,
    pairs: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    spared: int,
    is_target: Callable[[Path, Path], bool],
) -> None:
    out, rename, met = tmp_path / "run", os.replace, []

    def dies(source: Any, target: Any) -> None:
        if is_target(out, Path(target)):
            met.append(Path(target))
            if len(met) > spared:
                raise Killed
        rename(source, target)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(os, "replace", dies)
        patch.setattr(checkpoint.shutil, "rmtree", lambda *_, **__: None)  # a killed process tidies nothing up
        patch.setattr(Path, "unlink", lambda *_, **__: None)
        train_spm.main(line(out, pairs=pairs))
    assert not met[-1].exists()
    seen = [p for p in out.rglob("*") if not any(part.startswith(".") for part in p.relative_to(out).parts)]
    for path in seen:
        if path.suffix == ".safetensors":
            load_file(path)
        if path.suffix in (".json", ".png") and path.parent == out:
            assert path.read_bytes() == (whole_run / path.name).read_bytes()
    for directory in out.glob("checkpoint-*"):
        assert {p.name for p in directory.iterdir()} == {p.name for p in (whole_run / directory.name).iterdir()}
    trained(out, pairs=pairs, resume_from_checkpoint="latest")
    assert_same_end(whole_run, out)
    assert_same_model(whole_run, out)
    assert not list(out.glob(".tmp-*"))


def test_killed_while_writing_weights_leaves_no_checkpoint(
    pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def torn(tensors: Any, path: Path) -> None:
        path.write_bytes(b"\x10")
        raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(checkpoint, "save_tensors", torn)
        patch.setattr(checkpoint.shutil, "rmtree", lambda *_, **__: None)
        train_spm.main(line(tmp_path / "run", pairs=pairs))
    assert not list((tmp_path / "run").glob("checkpoint-*")) and list((tmp_path / "run").glob(".tmp-*"))


# ----------------------------------------------------------------------------------------------------------- counts


@pytest.mark.parametrize(("guidance", "halves"), [(2.0, 2), (1.0, 1)])
def test_pixel_model_needs_one_unet_forward_a_slot(pairs: Path, tmp_path: Path, guidance: float, halves: int) -> None:
    run = built(tmp_path / "run", pairs=pairs, gradient_accumulation_steps=2, train_guidance_scale=guidance)
    unet, vision = rows_of(run.model.network), rows_of(run.reward.clip.vision_model)  # type: ignore[attr-defined]
    decoder = rows_of(run.model.vae.decoder)
    one_step(run)
    assert unet == [2 * 4 * halves] * 2  # both images of 4 pairs
    assert decoder == vision == [2 * 4] * 2


@pytest.mark.parametrize(("guidance", "halves"), [(7.5, 2), (1.0, 1)])
def test_latent_model_needs_one_forward_of_its_own(pairs: Path, tmp_path: Path, guidance: float, halves: int) -> None:
    run = built(tmp_path / "run", pairs=pairs, parameterisation="latent", train_guidance_scale=guidance)
    frozen, own = rows_of(run.model.network), rows_of(run.reward.network.unet.mid_block)  # type: ignore[attr-defined]
    one_step(run)
    assert frozen == [] and own == [2 * 4 * halves]


@pytest.mark.parametrize("cached", [True, False])
def test_each_image_and_each_prompt_is_encoded_once(pairs: Path, tmp_path: Path, cached: bool) -> None:
    """Two epochs of a data set in which every prompt, and with the cache every image, comes twice."""

    def repeat(columns: dict[str, list[Any]]) -> None:
        columns["caption"] = columns["caption"][:12] * 2
        if cached:
            columns["jpg_1"] = [*columns["jpg_0"][5:], *columns["jpg_0"][:5]]

    table = changed(pairs, tmp_path / "pairs.parquet", repeat)
    settings = {"validation_share": 0, "num_train_epochs": 2, "max_train_steps": None, "cache_latents": cached}
    run = built(tmp_path / "run", pairs=table, relabel="pickscore", **settings)
    assert run.total == 12
    cache = run.model.prompt_cache
    prompts: Counter[str] = Counter()
    load_encoder, loads = cache.load_encoder, []

    def loaded() -> Callable[[list[str]], dict[str, Tensor]]:
        encode = load_encoder()
        loads.append(1)

        def counted(batch: list[str]) -> dict[str, Tensor]:
            prompts.update(batch)
            return encode(batch)

        return counted

    cache.load_encoder = loaded
    assert run.images.labeller is not None
    counts = [images_of(run.model.vae.encoder), images_of(run.images.labeller.model.vision_model)]
    run.train()
    for count in counts:
        assert len(count) == (24 if cached else 48)
        assert set(count.values()) == {1 if cached else 2}
    del prompts[""]  # the unconditional one, which is padding too
    assert len(prompts) == len(set(pq.read_table(table)["caption"].to_pylist())) and set(prompts.values()) == {1}
    assert len(loads) == 1


# ------------------------------------------------------------------------------------------------ gradients, precision


@pytest.mark.parametrize("unequal", [False, True])
@pytest.mark.parametrize("parameterisation", ["pixel", "latent"])
def test_slots_add_up_to_one_batch(pairs: Path, tmp_path: Path, unequal: bool, parameterisation: str) -> None:
    def weigh(columns: dict[str, list[Any]]) -> None:
        columns["num_example_per_prompt"] = [1 + (7 * i % 11) ** 2 if unequal else 1 for i in range(24)]

    table = changed(pairs, tmp_path / "pairs.parquet", weigh)
    settings = {"parameterisation": parameterisation, "learning_rate": 1e-2, "adam_epsilon": 1e-3}  # far from sign(g)
    found, weights = [], []
    for size, slots in ((4, 2), (8, 1)):
        run = built(
            tmp_path / str(size), pairs=table, train_batch_size=size, gradient_accumulation_steps=slots, **settings
        )
        with run.stream() as stream:
            sums = [float(next(stream).weights.sum()) for _ in range(slots)]
        assert slots == 1 or (abs(sums[0] / sums[1] - 1) > 0.05) == unequal
        before = {name: value.clone() for name, value in run.reward.weights.state_dict().items()}
        found.append(gradients(run))
        weights.append(run.reward.weights.state_dict())
        assert any((before[name] != value).any() for name, value in weights[-1].items())
    assert distance(*found) < 1e-5
    assert all((weights[0][name] - value).abs().max() < 1e-5 for name, value in weights[1].items())


def test_bf16_reward_has_float32_masters(pairs: Path, tmp_path: Path) -> None:
    run = built(tmp_path / "run", pairs=pairs, reward_dtype="bf16", max_train_steps=2, learning_rate=1e-5)
    run.train()
    masters = run.reward.weights.state_dict()
    saved = load_file(tmp_path / "run" / "preference_model" / "model.safetensors")
    assert saved.keys() == {f"model.{name}" for name in masters}
    for name, p in run.reward.clip.named_parameters():  # type: ignore[attr-defined]
        assert masters[name].dtype == saved[f"model.{name}"].dtype == torch.float32
        assert torch.equal(saved[f"model.{name}"], masters[name])
        assert p.dtype == (torch.float32 if name == "logit_scale" else torch.bfloat16)
        assert torch.equal(p.detach(), masters[name].to(p.dtype))
    # steps of 1e-5, which bf16 could not add to weights of 0.1
    assert sum(int((m != m.bfloat16().float()).sum()) for m in masters.values()) > 1000
    start = load_clip(WEIGHTS / "pickscore", time_conditioned=False).state_dict()
    moved = torch.cat([(masters[name] - value).flatten() for name, value in start.items()])
    assert 0 < moved.abs().max() < 4e-5  # from the file's values, not from their roundings


def on_cpu(monkeypatch: pytest.MonkeyPatch, tiles: bool, wide: int = 128) -> None:
    """A CPU with or without tiles for bf16, and the channels from which on a UNet is called wide."""
    monkeypatch.setattr(
        preference_run,
        "found_device",
        lambda _: Device("CPU", "cpu", None, fast_bf16="by tiles (AMX)" if tiles else ""),
    )
    for module in (preference_run, device):
        monkeypatch.setattr(module, "WIDE", wide)


@pytest.mark.parametrize(
    ("tiles", "wide", "asked", "dtype", "why"),
    [
        (True, 64, "auto", torch.bfloat16, "multiplies bf16 by tiles"),
        (False, 64, "auto", torch.float32, "no faster products"),
        (True, 128, "auto", torch.float32, "the network is narrow"),  # as the toy's is
        (True, 64, "no", torch.float32, ""),
        (False, 128, "bf16", torch.bfloat16, ""),
    ],
)
def test_frozen_networks_are_computed_as_is_fastest_on_a_cpu(
    pairs: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tiles: bool,
    wide: int,
    asked: str,
    dtype: torch.dtype,
    why: str,
) -> None:
    on_cpu(monkeypatch, tiles, wide)
    run = built(tmp_path / "run", pairs=pairs, mixed_precision=asked)
    assert run.model.network.dtype == run.model.vae.dtype == dtype
    assert {master.dtype for master in run.reward.weights.masters} == {torch.float32}
    assert {p.dtype for p in run.reward.clip.parameters()} == {torch.float32}  # type: ignore[attr-defined]
    norms = [type(m) for network in (run.model.network, run.model.vae) for m in network.modules()]
    assert (FusedAttention in norms) == (wide == 64) == (FusedResnet in norms)
    run.announce()
    told = capsys.readouterr().out
    assert ("chosen for this device" in told) == (asked == "auto") and why in told
    assert ("frozen networks are fused" in told) == (wide == 64)
    assert "known after the first step" in told and "preference_model/, " in told and str(tmp_path / "run") in told
    assert run.cfg.model.mixed_precision == {torch.bfloat16: "bf16", torch.float32: "no"}[dtype]


def test_fused_frozen_networks_change_no_gradient(pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for name, wide, precision in (("plain", 128, "no"), ("fused", 64, "no"), ("bf16", 64, "auto")):
        on_cpu(monkeypatch, True, wide)
        found.append(gradients(built(tmp_path / name, pairs=pairs, mixed_precision=precision)))
    assert 0 < distance(found[0], found[1]) < 1e-4 < distance(found[0], found[2]) < 0.2


@pytest.mark.parametrize("parameterisation", ["pixel", "latent"])
def test_reward_checkpointing_changes_no_gradient(pairs: Path, tmp_path: Path, parameterisation: str) -> None:
    found, calls = [], []
    for on in (False, True):
        settings = {"parameterisation": parameterisation, "reward_checkpointing": on}
        run = built(tmp_path / str(on), pairs=pairs, **settings)
        if parameterisation == "pixel":
            calls.append(rows_of(run.reward.clip.vision_model.encoder.layers[0]))  # type: ignore[attr-defined]
        else:
            calls.append(rows_of(run.reward.network.unet.mid_block.resnets[1]))  # type: ignore[attr-defined]
        found.append(gradients(run))
    assert [len(c) for c in calls] == [1, 2]  # recomputed in the backward pass
    assert distance(*found) < 1e-6


# -------------------------------------------------------------------------------------------------- parameterisations


@pytest.mark.parametrize("noise", ["all", "none"])
def test_without_time_conditioning_the_export_is_a_plain_clip(pairs: Path, tmp_path: Path, noise: str) -> None:
    run = built(tmp_path / "run", pairs=pairs, time_conditioned=False, noise=noise, max_train_steps=1)
    unet, vae = rows_of(run.model.network), rows_of(run.model.vae.encoder)
    run.train()
    file = tmp_path / "run" / "preference_model" / "model.safetensors"
    assert load_file(file).keys() == load_file(WEIGHTS / "pickscore" / "model.safetensors").keys()
    load_clip(file.parent, time_conditioned=False)
    report = json.loads((tmp_path / "run" / "evaluation.json").read_text())
    if noise == "none":  # clean images alone: neither noised nor encoded nor judged at another timestep
        assert unet == vae == [] and not (tmp_path / "run" / "latent_cache").exists()
        assert report["accuracy"]["trained"].keys() == {"0"}
    else:
        assert unet and vae and report["accuracy"]["trained"].keys() == {"0", "501"}


def test_latent_model_is_read_back_and_trained_on(pairs: Path, tmp_path: Path) -> None:
    first = trained(tmp_path / "first", pairs=pairs, parameterisation="latent", max_train_steps=2)
    network = load_latent_reward(first / "preference_model")
    masters = load_file(first / "checkpoint-2" / "trained.safetensors")
    assert all(torch.equal(network.state_dict()[name], value) for name, value in masters.items())
    settings = {"parameterisation": "latent", "init_path": first / "preference_model"}
    again = built(tmp_path / "again", pairs=pairs, **settings)
    assert distance(dict(again.reward.weights.state_dict()), masters) == 0


def published(path: Path, tensors: dict[str, Tensor], config: dict[str, Any], name: str) -> Path:
    """A .bin file of tensors, beside the settings that shapes do not show."""
    path.mkdir()
    (path / "config.json").write_text(json.dumps(config))
    torch.save(tensors, path / name)
    return path / name


def test_published_layout_is_read_and_written_bit_identically(pairs: Path, tmp_path: Path) -> None:
    """The golden SPM: names and shapes are the published code's own."""
    tensors, config = load("models_spm")
    words = "model.text_model.embeddings.token_embedding.weight"  # with a row for each of the toy's tokens
    toys = len(load_file(WEIGHTS / "spm" / "model.safetensors")[words])
    tensors = {**tensors, words: torch.cat([tensors[words], tensors[words][: toys - len(tensors[words])]])}
    file = published(tmp_path / "spm", tensors, config["clip_config"], "sd-v1-5_step-aware_preference_model.bin")
    run = built(tmp_path / "run", pairs=pairs, init_path=file)
    run.export(tmp_path)
    saved = load_file(tmp_path / "preference_model" / "model.safetensors")
    assert saved.keys() == {name for name in tensors if not name.endswith("position_ids")}
    assert all(torch.equal(value, tensors[name]) for name, value in saved.items())


def test_step_aware_start_goes_on_where_it_was(pairs: Path, tmp_path: Path) -> None:
    tensors = load_file(WEIGHTS / "spm" / "model.safetensors")
    config = json.loads((WEIGHTS / "spm" / "config.json").read_text())
    file = published(tmp_path / "spm", tensors, config, "mine.bin")
    out = trained(tmp_path / "run", pairs=pairs, init_path=file, max_train_steps=1, learning_rate=1e-12)
    saved = load_file(out / "preference_model" / "model.safetensors")
    assert saved.keys() == tensors.keys()
    assert all((value - tensors[name]).abs().max() < 1e-9 for name, value in saved.items())
    # no "initial" to compare with: it is no plain CLIP
    assert json.loads((out / "evaluation.json").read_text())["accuracy"].keys() == {"trained"}


def test_incomplete_start_is_refused(pairs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tensors = load_file(WEIGHTS / "spm" / "model.safetensors")
    del tensors["model.t_embedder.mlp.0.bias"]
    config = json.loads((WEIGHTS / "spm" / "config.json").read_text())
    file = published(tmp_path / "spm", tensors, config, "torn.bin")
    error = refused(capsys, tmp_path / "run", pairs=pairs, init_path=file)
    assert "torn.bin" in error and "t_embedder.mlp.0.bias" in error


# ----------------------------------------------------------------------------------------------------------- errors


def test_settings_that_do_not_fit(pairs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    assert "--no-time_conditioned" in refused(capsys, out, pairs=pairs, noise="none")
    assert "latent judges noisy latents" in refused(
        capsys, out, pairs=pairs, parameterisation="latent", noise="none", time_conditioned=False
    )
    assert "--pairs is needed" in refused(capsys, out)
    assert "no-such.parquet: no such file" in refused(capsys, out, pairs=tmp_path / "no-such.parquet")
    error = refused(capsys, out, pairs=pairs, init_path=WEIGHTS / "spm", time_conditioned=False)
    assert "is step-aware, but time_conditioned is off" in error
    assert "square images, not 32x16" in refused(capsys, out, pairs=pairs, height=16, width=32)
    error = refused(capsys, out, pairs=pairs, compare_with=(f"mine={tmp_path / 'nowhere'}",))
    assert "nowhere does not exist" in error
    assert "name=path" in refused(capsys, out, pairs=pairs, compare_with=("nameless",))


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"parameterisation": "latent"}, "parameterisation: pixel -> latent"),
        ({"time_conditioned": False}, "time_conditioned: True -> False"),
        ({"noise": "ddim"}, "noise: all -> ddim"),
    ],
)
def test_resuming_as_another_model_is_refused(
    whole_run: Path, pairs: Path, capsys: pytest.CaptureFixture[str], settings: dict[str, Any], said: str
) -> None:
    before = (whole_run / "metrics.jsonl").read_bytes()
    error = refused(capsys, whole_run, pairs=pairs, resume_from_checkpoint="latest", **settings)
    assert said in error and error.count("\n") == 1
    assert (whole_run / "metrics.jsonl").read_bytes() == before


def test_directory_that_holds_a_run_is_refused(
    whole_run: Path, pairs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    error = refused(capsys, whole_run, pairs=pairs)
    assert "already holds a run (checkpoint-6)" in error and "--resume_from_checkpoint latest" in error


@pytest.mark.parametrize(
    ("settings", "sources", "flags"),
    [
        (
            ["--model", "sdxl"],
            ["stabilityai/stable-diffusion-xl-base-1.0", "yuvalkirstain/PickScore_v1"],
            ["pickscore"],
        ),
        (
            ["--model", "sd15", "--parameterisation", "latent"],
            ["stable-diffusion-v1-5/stable-diffusion-v1-5", "openai/clip-vit-large-patch14"],
            ["text_projection"],
        ),
    ],
)
def test_missing_files_are_named_before_pytorch_is_imported(
    tmp_path: Path, settings: list[str], sources: list[str], flags: list[str]
) -> None:
    code = "import sys; from spo_fast import train_spm; status = train_spm.main(sys.argv[1:]); "
    code += "print(status, 'torch' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code, *settings, "--pairs", "p.parquet", "--output_dir", str(tmp_path / "run")],
        cwd=ROOT,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.split() == ["1", "False"], done.stderr
    for word in [*sources, "--pretrained_model_name_or_path", *(f"--{flag}_path" for flag in flags), "HF_HUB_OFFLINE"]:
        assert word in done.stderr
    assert "Traceback" not in done.stderr and not (tmp_path / "run").exists()


# ----------------------------------------------------------------------------------------------------------- labels


def png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def pickscore_gap(tokenize: Any, prompts: list[str], images: list[list[Image.Image]]) -> Tensor:  # (B,) float64
    """Probability of the first image minus that of the second, by transformers."""
    from transformers import CLIPConfig, CLIPModel

    config = CLIPConfig.from_pretrained(WEIGHTS / "pickscore")
    config.text_config.eos_token_id = 2  # read the feature of the largest id, as CLIP's first release did
    model = CLIPModel.from_pretrained(WEIGHTS / "pickscore", config=config).double().eval()
    mean, std = np.array([0.48145466, 0.4578275, 0.40821073]), np.array([0.26862954, 0.26130258, 0.27577711])
    scores = []
    with torch.no_grad():
        for side in images:
            pixels = np.stack([(np.asarray(image) / 255 - mean) / std for image in side]).transpose(0, 3, 1, 2)
            with default_float64():
                out = model(input_ids=tokenize(prompts), pixel_values=torch.from_numpy(pixels.copy()))
            scores.append(out.logits_per_image.diagonal())
    p = torch.stack(scores).exp() / torch.stack(scores).exp().sum(0)
    return p[0] - p[1]


def test_labels_are_pickscores(pairs: Path, tmp_path: Path) -> None:
    wide = Image.effect_noise((40, 32), 90).convert("RGB")  # to 20 x 16, then its middle

    def widen(columns: dict[str, list[Any]]) -> None:
        columns["jpg_1"] = [png(wide), *columns["jpg_1"][1:]]
        columns["label_0"], columns["label_1"] = columns["label_1"], columns["label_0"]  # which nobody looks at

    table = changed(pairs, tmp_path / "pairs.parquet", widen)
    settings = {"pairs": table, "relabel": "pickscore", "validation_share": 0, "train_batch_size": 24}

    def labels(out: Path, gap: float) -> tuple[list[list[str]], list[str], Tensor]:
        run = built(out, relabel_gap=gap, **settings)
        with run.stream() as stream:
            batch = next(stream)
        keys = [[pair[j].key for pair in batch.loaded] for j in range(2)]
        run.images.images(batch, run.draws(0, 0, 24))
        return keys, batch.prompts, run.images.labels(batch)

    run = built(tmp_path / "any", **settings)
    keys, prompts, sharp = labels(tmp_path / "sharp", 0.0)
    columns = pq.read_table(table).to_pydict()
    files = {hashlib.sha256(data).hexdigest(): data for j in range(2) for data in columns[f"jpg_{j}"]}
    pictures = [[Image.open(io.BytesIO(files[key])).convert("RGB") for key in side] for side in keys]
    middle = wide.resize((20, 16), Image.Resampling.BICUBIC).crop((2, 0, 18, 16))
    pictures = [[image if image.size == (16, 16) else middle for image in side] for side in pictures]
    difference = pickscore_gap(run.model.tokenize, prompts, pictures)
    assert torch.equal(sharp.double(), (difference > 0).double())
    ordered = difference.abs().sort().values
    gap = float(ordered[11:13].mean())
    assert float(ordered[12] - ordered[11]) > 1e-6
    same_keys, _, blunt = labels(tmp_path / "blunt", gap)
    assert same_keys == keys and int((blunt == 0.5).sum()) == 12
    assert torch.equal(blunt.double(), torch.where(difference.abs() > gap, (difference > 0).double(), 0.5))


def test_ties_alone_are_no_failure(pairs: Path, tmp_path: Path) -> None:
    settings = {"relabel": "pickscore", "relabel_gap": 0.999999, "noise": "none", "time_conditioned": False}
    out = trained(tmp_path / "run", pairs=pairs, max_train_steps=2, **settings)
    for record in facts(out):
        assert record["accuracy"] is None and record["nonfinite"] == {"accuracy": "nan"}
        assert record["loss"] >= 0 and record["grad_norm"] > 0


def test_shared_cache_knows_what_it_holds(pairs: Path, tmp_path: Path) -> None:
    """PickScore's features alone are kept by a run on clean images; one that noises them needs latents as well."""
    settings = {"pairs": pairs, "relabel": "pickscore", "latent_cache_dir": tmp_path / "cache", "max_train_steps": 1}
    settings["validation_share"] = 0
    trained(tmp_path / "clean", noise="none", time_conditioned=False, **settings)
    trained(tmp_path / "noised", **settings)


# -------------------------------------------------------------------------------------------------------- the schedule


@pytest.mark.parametrize(("warmup", "end", "total"), [(500, None, 8000), (500, 4000, 4000), (3, 8, 6), (0, None, 5)])
def test_schedule_is_deepspeeds(warmup: int, end: int | None, total: int) -> None:
    cfg = train_spm.parse(["--model", "sd15"]).with_fields(lr_warmup_steps=warmup, lr_decay_steps=end).optim
    factor = learning_rate_factor(cfg, total)
    stop = end or 4 * total
    for step in {*range(10), warmup - 1, warmup, warmup + 1, total - 1, total, stop - 1, stop, stop + 10}:
        if 0 <= step < warmup:
            assert factor(step) == pytest.approx(math.log(1 + step) / math.log(warmup), rel=1e-12)
        elif step >= warmup:
            assert factor(step) == pytest.approx(max(0, (stop - step) / (stop - warmup)), rel=1e-12)


def test_run_follows_the_schedule(pairs: Path, tmp_path: Path) -> None:
    settings = {"lr_scheduler": "warmup_decay", "lr_warmup_steps": 3, "lr_decay_steps": 8, "learning_rate": 1e-3}
    out = trained(tmp_path / "run", pairs=pairs, validation_share=0, **settings)
    wanted = [0, 1e-3 * math.log(2) / math.log(3), 1e-3, 1e-3, 0.8e-3, 0.6e-3]  # log 3 / log 3; 5/5, 4/5, 3/5
    assert [r["lr"] for r in facts(out)] == pytest.approx(wanted, rel=1e-12)


# ---------------------------------------------------------------------------------------------------------- the report


def hand_made() -> Judgements:
    """Five pairs at two noise levels, the fourth a tie, the fifth of divided opinion."""
    judgements = Judgements([0, 501])
    labels = torch.tensor([1.0, 0.0, 1.0, 0.5, 0.25])
    scores = {
        # margins 2, -1, 0, (tie), 3
        ("new", 0): [[3.0, 1.0, 2.0, 9.0, 1.0], [1.0, 0.0, 2.0, 1.0, 4.0]],
        ("old", 0): [[0.0, 0.0, 5.0, 9.0, 1.0], [1.0, 1.0, 1.0, 1.0, 0.0]],  # -1, 1, 4, -1
        ("new", 501): [[1.0, 0.0, 1.0, 0.0, 0.0], [0.0, 1.0, 0.0, 9.0, 1.0]],  # 1, 1, 1, 1
        ("old", 501): [[1.0, 0.0, 0.0, 0.0, 0.0], [0.0, 1.0, 1.0, 9.0, 1.0]],  # 1, 1, -1, 1
    }
    for (name, timestep), values in scores.items():
        judgements.add(name, timestep, torch.tensor(values), labels)
    return judgements


def test_report_by_hand() -> None:
    j = hand_made()
    assert j.margins("new", 0).tolist() == [2, -1, 0, 3] and j.margins("old", 0).tolist() == [-1, 1, 4, -1]
    # 1, 0, 1/2, 1: mean 0.625, variance (0.140625 + 0.390625 + 0.015625 + 0.140625) / 3 = 0.229167, error 0.239357
    assert j.accuracy("new", 0) == pytest.approx((0.625, 0.2393568, 4), abs=1e-6)
    # paired: 1, -1, -1/2, 1: mean 0.125, variance (0.765625 + 1.265625 + 0.390625 + 0.765625) / 3 = 1.0625
    assert j.gain("new", "old", 0) == pytest.approx((0.125, math.sqrt(1.0625) / 2, 4), abs=1e-12)
    margins = [2, -1, 0, 3, 1, 1, 1, 1]
    assert j.log_loss("new") == pytest.approx(sum(math.log(1 + math.exp(-m)) for m in margins) / 8, abs=1e-12)
    # bins a twentieth wide: 0.5 (half right), 0.731 (4 of 5), 0.881 (right), 0.953 (right)
    sure = [1 / (1 + math.exp(-m)) for m in (0, 1, 2, 3)]
    wanted = [(sure[0], 0.5, 1), (sure[1], 0.8, 5), (sure[2], 1, 1), (sure[3], 1, 1)]
    assert [c for bin in j.calibration("new") for c in bin] == pytest.approx([c for bin in wanted for c in bin])
    error = (0 + 5 * (0.8 - sure[1]) + (1 - sure[2]) + (1 - sure[3])) / 8
    assert j.calibration_error("new") == pytest.approx(error, abs=1e-12)


def test_report_matches_float64_formulas() -> None:
    generator = torch.Generator().manual_seed(0)
    j = Judgements([7])
    parts = []
    for n in (40, 1, 59):  # batches
        scores = 2 * torch.randn(2, n, generator=generator, dtype=torch.float64)
        labels = torch.randint(0, 3, (n,), generator=generator) / 2
        j.add("a", 7, scores, labels)
        parts.append((scores, labels))
    scores, labels = torch.cat([s for s, _ in parts], 1).numpy(), torch.cat([y for _, y in parts]).numpy()
    kept = labels != 0.5
    p = np.exp(scores[0]) / (np.exp(scores[0]) + np.exp(scores[1]))  # of the first image
    chosen = np.where(labels == 1, p, 1 - p)[kept]
    assert j.accuracy("a", 7).mean == pytest.approx((chosen > 0.5).mean(), abs=1e-12)
    spread = (chosen > 0.5).std(ddof=1) / math.sqrt(kept.sum())
    assert j.accuracy("a", 7).error == pytest.approx(spread, abs=1e-12)
    assert j.log_loss("a") == pytest.approx(-np.log(chosen).mean(), abs=1e-12)
    sure, right = np.maximum(chosen, 1 - chosen), chosen > 0.5
    bins = np.digitize(sure, np.linspace(0.5, 1, 11)[1:-1])
    gaps = [abs(sure[bins == b].mean() - right[bins == b].mean()) * (bins == b).mean() for b in set(bins)]
    assert j.calibration_error("a") == pytest.approx(sum(gaps), abs=1e-12)


def test_report_table(tmp_path: Path) -> None:
    text = write_report(hand_made(), tmp_path)
    assert text == (tmp_path / "evaluation.md").read_text()
    lines = text.splitlines()
    assert lines[0] == "Agreement with people on held-out pairs (ties left out):"
    assert lines[2] == "| t   | pairs | new           | old           | new - old      |"
    assert lines[4] == "| 0   | 4     | 0.625 ± 0.239 | 0.500 ± 0.289 | +0.125 ± 0.515 |"
    assert lines[5] == "| 501 | 4     | 1.000 ± 0.000 | 0.750 ± 0.250 | +0.250 ± 0.250 |"
    assert lines[9].startswith("| log loss (coin: 0.693) | 0.4") and lines[10].startswith("| calibration error ")
    assert {p.name for p in tmp_path.iterdir()} == {"evaluation.json", "evaluation.md", "evaluation.png"}


def test_report_of_ties_alone(tmp_path: Path) -> None:
    j = Judgements([0])
    j.add("a", 0, torch.zeros(2, 3), torch.full((3,), 0.5))
    text = write_report(j, tmp_path)
    assert "| 0 | 0     | -" in text and "nan" not in text


def test_report_of_one_pair(tmp_path: Path) -> None:
    """Its accuracy has no standard error."""
    j = Judgements([0])
    for name, scores in (("a", [0.0, 1.0]), ("b", [1.0, 0.0])):
        j.add(name, 0, torch.tensor(scores)[:, None], torch.tensor([1.0]))
    lines = write_report(j, tmp_path).splitlines()
    assert [cell.strip() for cell in lines[4].split("|")[1:-1]] == ["0", "1", "0.000", "1.000", "-1.000"]
    assert json.loads((tmp_path / "evaluation.json").read_text())["accuracy"]["a"]["0"] == [0.0, None, 1]


def test_pairs_that_repeat_within_a_step_are_told(pairs: Path, tmp_path: Path, capsys: Any) -> None:
    trained(tmp_path / "many", pairs=pairs, max_train_steps=1, train_batch_size=32)
    assert "warning: a step reads 32 pairs, of which there are " in capsys.readouterr().out
    trained(tmp_path / "few", pairs=pairs, max_train_steps=1)
    assert "they repeat" not in capsys.readouterr().out


# --------------------------------------------------------------------------------------------------------- bad rows


def spoilt(pairs: Path, path: Path, images: list[int], prompts: list[int] | None = None) -> Path:
    """Pairs with a torn first image in some rows and an empty prompt in others."""

    def spoil(columns: dict[str, list[Any]]) -> None:
        for i in images:
            columns["jpg_0"][i] = columns["jpg_0"][i][:40]
        for i in prompts or []:
            columns["caption"][i] = " "

    return changed(pairs, path, spoil)


def test_bad_rows_are_counted_and_named(pairs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table = spoilt(pairs, tmp_path / "pairs.parquet", [3], [7])
    out = trained(tmp_path / "run", pairs=table, validation_share=0, max_bad_share=0.1)
    assert facts(out)[0]["bad_rows"] >= 1 and facts(out)[-1]["bad_rows"] == 2
    named = {entry["row"]: entry["reason"] for entry in map(json.loads, (out / "bad_rows.jsonl").open())}
    assert named.keys() == {"pairs.parquet, row 4", "pairs.parquet, row 8"}
    assert named["pairs.parquet, row 4"].startswith("not an image")
    assert named["pairs.parquet, row 8"] == "the prompt is empty"
    assert "2 rows were unusable" in capsys.readouterr().out


def test_share_of_bad_rows_is_of_all_rows(pairs: Path, tmp_path: Path) -> None:
    """One of 24 is 4%, however few of them a short run has met."""
    table = spoilt(pairs, tmp_path / "pairs.parquet", [], [7])
    trained(tmp_path / "run", pairs=table, validation_share=0, max_bad_share=0.05, max_train_steps=1)


@pytest.mark.parametrize(("images", "prompts"), [([], [1, 2, 3]), ([1, 2, 3], [])])
def test_too_many_bad_rows_end_the_run(
    pairs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], images: list[int], prompts: list[int]
) -> None:
    table = spoilt(pairs, tmp_path / "pairs.parquet", images, prompts)
    error = refused(capsys, tmp_path / "run", pairs=table, validation_share=0, max_bad_share=0.1)
    assert error.count("\n") == 1
    assert "3 of 24 rows are unusable (12.5%; the limit is 10.0%): pairs.parquet, row" in error
    assert "bad_rows.jsonl names them all" in error


def test_bad_images_stop_a_long_run_on_the_way(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_pairs(tmp_path / "good.parquet", 120, seed=1)
    table = spoilt(tmp_path / "good.parquet", tmp_path / "pairs.parquet", list(range(0, 120, 4)))
    settings = {"noise": "none", "time_conditioned": False, "max_train_steps": 40}  # quick
    error = refused(capsys, tmp_path / "run", pairs=table, validation_share=0, max_bad_share=0.1, **settings)
    assert "rows are unusable" in error and error.count("\n") == 1
    assert len(facts(tmp_path / "run")) < 30  # 100 rows are looked at before a share means anything
    assert not (tmp_path / "run" / "preference_model").exists()


# ----------------------------------------------------------------------------------------------------------- presets


@pytest.mark.parametrize(
    ("model", "learning_rate", "steps", "relabel"), [("sd15", 3e-6, 8000, "none"), ("sdxl", 1e-6, 7000, "pickscore")]
)
def test_published_settings(model: str, learning_rate: float, steps: int, relabel: str) -> None:
    """The published configurations of the two step-aware preference models."""
    cfg = train_spm.parse(["--model", model])
    o, r, p = cfg.optim, cfg.reward, cfg.pairs
    assert (o.learning_rate, o.adam_weight_decay, o.lr_warmup_steps, o.max_grad_norm) == (learning_rate, 0.3, 500, 1.0)
    assert (o.adam_beta1, o.adam_beta2, o.adam_epsilon, o.optimizer) == (0.9, 0.999, 1e-8, "adamw")
    assert (o.lr_scheduler, o.lr_decay_steps) == ("warmup_decay", None)
    assert o.train_batch_size * o.gradient_accumulation_steps == 64 and cfg.run.max_train_steps == steps
    assert (r.parameterisation, r.time_conditioned, r.noise, r.shared_noise) == ("pixel", True, "all", True)
    assert (r.train_guidance_scale, r.in_batch_negatives, r.reward_dtype) == (5.0, False, "no")
    assert (p.relabel, p.relabel_gap) == (relabel, 0.1)
    assert cfg.run.num_train_epochs * 64 >= steps  # the steps decide, not the epochs


@pytest.mark.parametrize(("model", "size", "steps", "warmup"), [("sd15", 128, 4000, 500), ("sdxl", 32, 8000, 1000)])
def test_latent_settings(model: str, size: int, steps: int, warmup: int) -> None:
    """LPO's configurations of its latent reward models."""
    cfg = train_spm.parse(["--model", model, "--parameterisation", "latent"])
    o, r = cfg.optim, cfg.reward
    assert (o.learning_rate, o.lr_warmup_steps, o.lr_decay_steps) == (1e-5, warmup, steps)
    assert o.train_batch_size * o.gradient_accumulation_steps == size and cfg.run.max_train_steps == steps
    assert (r.noise, r.shared_noise, r.train_guidance_scale, cfg.pairs.relabel) == ("ddim", False, 7.5, "none")
    given = train_spm.parse(["--model", model, "--parameterisation", "latent", "--learning_rate", "2e-5"])
    assert given.optim.learning_rate == 2e-5
    assert train_spm.needed_scorers(cfg) == ({"text_projection": None} if model == "sd15" else {})


def test_ddim_noise_is_at_the_sampling_steps(pairs: Path, tmp_path: Path) -> None:
    times = {}
    for noise in ("ddim", "all"):
        run = built(tmp_path / noise, pairs=pairs, noise=noise)
        times[noise] = run.timesteps(run.draws(0, 0, 4000))
    assert set(times["ddim"].tolist()) == set(range(1, 1000, 50))
    assert times["all"].min() == 0 and times["all"].max() == 999
    assert pair_batches.EVALUATION > 4000


def test_held_out_pairs_of_their_own(pairs: Path, tmp_path: Path) -> None:
    """--validation_pairs: all rows train, and another source validates, judged by people's labels."""
    held_out = tmp_path / "held_out.parquet"
    write_pairs(held_out, 12, 77, TUNE)
    run = built(tmp_path / "run", pairs=pairs, validation_pairs=held_out, max_validation_pairs=10, relabel="pickscore")
    assert len(run.train_rows) == len(run.source) == 24 and len(run.valid_rows) == 10
    assert {row.prompt for row in run.valid_source.read(run.valid_rows)} <= set(TUNE)
    run.images._relabel = lambda *_: pytest.fail("labels of the evaluation are people's")
    judged = run.evaluate({"trained": run.reward})
    labels = [row.label for row in run.valid_source.read(run.valid_rows)]
    seen = judged.margins("trained", 0)
    assert len(seen) == sum(label != 0.5 for label in labels)


@pytest.mark.parametrize(("steps", "cached"), [(2, False), (6, False), (7, True)])
def test_what_is_read_once_is_not_cached(pairs: Path, tmp_path: Path, steps: int, cached: bool) -> None:
    """By default latents are kept only if the run passes over its pairs more than once: 24 pairs are 6 steps of 4."""
    cfg = train_spm.parse(line(tmp_path, pairs=pairs, validation_share=0, max_train_steps=steps, num_train_epochs=9))
    run = train_spm.build(cfg.with_fields(cache_latents=None))
    assert (run.images.cache is not None) == cached
