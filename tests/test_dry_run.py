"""What a run chooses for the device it finds, what a dry run prints, and what is said when memory runs out."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from runs import ROOT, SMALL, built, command_line, flags

from spo_fast import train
from spo_fast.config import training
from spo_fast.config.presets import PRESETS
from spo_fast.evaluation.pages.run_record import read_metrics
from spo_fast.method import objectives
from spo_fast.models.device import CONTEXT, GIB, SHARE, Choice, Device, listed, pick_device
from spo_fast.training import learner
from spo_fast.training.plan import dry_run, whole_run
from spo_fast.training.plan.costs import Costs
from spo_fast.training.plan.counters import CountFlops
from spo_fast.training.plan.fake_run import predict
from spo_fast.training.plan.fit_memory import choose, is_out_of_memory, iterations, out_of_memory

MIB = 2**20
OPEN = ("rows_per_forward", "decode_chunk", "states_per_forward", "cuda_graphs", "memory", "gradient_checkpointing")


def gpu(memory_bytes: float) -> Device:
    return Device("a pretended GPU", "cuda", int(memory_bytes))


def toy_on(memory_mib: float, **settings: object) -> tuple[training.Config, dict[str, Choice]]:
    """The toy's choices on a GPU with so much memory besides what is set aside."""
    size = (memory_mib * MIB + CONTEXT) / SHARE
    few = {"num_steps": 4, "branch_start": 2, "sample_batch_size": 4, "train_batch_size": 4}
    cfg = PRESETS["toy"]().with_fields(**{**few, "mixed_precision": "auto", "decode_chunk": None, **settings})
    chosen, found = choose(cfg, gpu(size))
    return chosen, {choice.flag: choice for choice in found}


def test_everything_stays_whole_where_there_is_room() -> None:
    cfg, found = toy_on(100_000)
    assert set(found) == {*OPEN, "mixed_precision", "fuse", "compile"}
    assert cfg.sample.rows_per_forward == 4 * 4 * 2 and cfg.model.decode_chunk == 8
    assert cfg.optim.states_per_forward == 8 and cfg.optim.gradient_checkpointing is False
    assert cfg.model.mixed_precision == "fp16" and cfg.engine.fuse is True and cfg.engine.memory == "fast"
    assert cfg.engine.cuda_graphs is True and "beside an optimizer step" in found["cuda_graphs"].reason


def test_graphs_are_left_out_where_a_step_needs_their_memory() -> None:
    """Before anything is halved or computed twice: their pool holds what a micro-batch took while weights are changed,
    and gradients stay where they are."""
    whole, _ = toy_on(100_000)
    costs = predict(whole)
    took = costs.transient
    pool = max(took["rollout"], took["score"], took["reference"], took["backward"] - costs.gradients)
    # of each prompt and candidate, with and without text: keys and values of 4 attentions' 16 tokens, 64 channels in 16
    # bits, and 128 numbers of sizes and pooled text
    each = 2 * (4 * 2 * 16 * 64 * 2 + 128 * 2)
    assert costs.inputs == each * whole.sample.sample_batch_size * (1 + whole.sample.num_candidates)
    pool += costs.inputs
    without = predict(whole.with_fields(cuda_graphs=False))
    held = sum(costs.resident.values())
    for phase, peak in costs.peaks.items():
        kept = {"encode prompts": without.peaks[phase], "step": without.peaks[phase] + pool}
        assert peak == kept.get(phase, held + costs.gradients + pool), phase
    assert costs.peak > 1.01 * without.peak and pool == costs.kept_by_graphs and without.kept_by_graphs == 0
    between = (costs.peak + without.peak) / 2
    for room, graphs in ((costs.peak + MIB, True), (between, False)):
        cfg, found = toy_on(room / MIB)
        assert cfg.engine.cuda_graphs is graphs and ("step needs" in found["cuda_graphs"].reason) is not graphs
        assert cfg.optim == whole.optim and cfg.sample == whole.sample
    for share in (0.9, 0.8, 0.7, 0.6):  # and only where they would not fit beside the batches that do
        cfg, _ = toy_on(share * without.peak / MIB)
        beside = predict(cfg.with_fields(cuda_graphs=True)).peaks
        fits = max(beside[phase] for phase in ("reference", "backward", "step")) <= share * without.peak
        assert cfg.engine.cuda_graphs is fits
    cfg, _ = toy_on(between / MIB, cuda_graphs=True)  # given: batches give way
    assert cfg.engine.cuda_graphs is True and cfg.optim.states_per_forward < whole.optim.states_per_forward
    advice = out_of_memory(whole, "backward", gpu(GIB))
    assert "--no-cuda_graphs (predicted" in advice


def test_less_memory_means_smaller_batches_that_fit() -> None:
    whole, _ = toy_on(100_000, cuda_graphs=False)
    floor = predict(
        whole.with_fields(rows_per_forward=2, states_per_forward=2, decode_chunk=1, gradient_checkpointing=True)
    ).peak
    seen = []
    for room in (1.5, 1.02):
        cfg, found = toy_on(room * floor / MIB)
        assert predict(cfg).peak <= room * floor
        seen.append((cfg.sample.rows_per_forward, cfg.optim.states_per_forward, cfg.optim.gradient_checkpointing))
        assert "GiB predicted" in found["rows_per_forward"].reason
    assert seen == sorted(seen, key=lambda s: (-s[0], -s[1])) and seen[0] != seen[-1]


def test_activations_are_recomputed_only_if_no_batch_fits_without() -> None:
    whole, _ = toy_on(100_000, cuda_graphs=False)
    least = whole.with_fields(states_per_forward=2)
    fast, balanced = (predict(least.with_fields(memory=m)).peaks["backward"] for m in ("fast", "balanced"))
    assert balanced < 0.99 * fast
    for room, memory in ((1.001 * fast, "fast"), (1.001 * balanced, "balanced"), (0.98 * balanced, "small")):
        cfg, found = toy_on(room / MIB)
        assert cfg.engine.memory == memory and cfg.optim.gradient_checkpointing is (memory == "small")
        assert ("needed" in found["memory"].reason) is (memory != "fast")
    assert "needed" in found["gradient_checkpointing"].reason
    # norms are recomputed in fused networks only
    cfg, _ = toy_on(1.001 * balanced / MIB, fuse=False)
    assert cfg.engine.memory == "small" and cfg.optim.gradient_checkpointing is True


def test_memory_modes_fill_in_what_was_not_given() -> None:
    small = train.parse(["--model", "sdxl", "--memory", "small"])
    assert small.optim.gradient_checkpointing is True and small.model.decode_chunk == 1
    assert small.optim.optimizer == "adamw8bit" and small.optim.states_per_forward == 2
    mine = train.parse(["--model", "sdxl", "--memory", "small", "--optimizer", "adamw", "--states_per_forward", "4"])
    assert mine.optim.optimizer == "adamw" and mine.optim.states_per_forward == 4
    balanced, found = choose(train.parse(["--model", "toy", "--memory", "balanced"]), Device("CPU", "cpu", None))
    assert balanced.engine.fuse is True and balanced.optim.gradient_checkpointing is False
    with pytest.raises(ValueError, match="leave out --no-fuse"):
        train.parse(["--model", "toy", "--memory", "balanced", "--no-fuse"])


def test_compiling_is_chosen_where_it_saves_more_than_it_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    """The counted FLOPs at 40 % of the card's peak, a fifth of that time, against 100 s."""
    cfg, found = toy_on(100_000, num_train_epochs=1)
    assert cfg.engine.compile == "off" and "save only" in found["compile"].reason and cfg.engine.fuse is True
    # 96 prompts, 4 an iteration: the toy's iteration counted larger, until the whole run saves 99 or 101 s
    whole = predict(cfg).flops(0.5)
    seconds = 0.2 * 24 * sum(whole.values()) / (0.4 * 989e12)
    for name, peak in (("NVIDIA H200", 989), ("no card that is known", 989), ("NVIDIA A100-SXM4-80GB", 312)):
        for saved in (99, 101):
            large = saved * peak / 989 / seconds
            monkeypatch.setattr(Costs, "flops", lambda _, share, large=large: {"all": large * sum(whole.values())})
            chosen, choices = choose(
                cfg.with_fields(compile=None, states_per_forward=None), Device(name, "cuda", 80 * GIB)
            )
            assert chosen.engine.compile == ("regional" if saved > 100 else "off"), (name, saved)
            reason = next(choice.reason for choice in choices if choice.flag == "compile")
            assert (
                f"{saved / 60:.2g} of the {5 * saved / 60:.2g} minutes" in reason and "need 1.7 for compiling" in reason
            )
    given, found = toy_on(100_000, compile="regional")
    assert given.engine.compile == "regional" and "compile" not in found
    unfused, found = toy_on(100_000, fuse=False)
    assert unfused.engine.compile == "off" and found["compile"].reason == "--no-fuse"


@pytest.mark.parametrize(
    ("model", "tiles", "words"),
    [
        ("sd15", True, "--mixed_precision bf16 --compile off --fuse"),
        ("sd15", False, "--mixed_precision no --compile off --fuse --rollout_weights merged"),
        ("sdxl", False, "--mixed_precision no --compile off --fuse --rollout_weights merged"),
        ("toy", True, "--compile off --no-fuse"),  # its preset says float32
    ],
)
def test_what_a_cpu_is_given(model: str, tiles: bool, words: str) -> None:
    """By what its products are and by the network's width; what was asked for stays."""
    cpu = Device("CPU", "cpu", None, fast_bf16="by tiles (AMX)" if tiles else "")
    _, found = choose(PRESETS[model](), cpu)
    flags = ("mixed_precision", "compile", "fuse", "rollout_weights")
    assert " ".join(choice.words for choice in found if choice.flag in flags) == words
    narrow, _ = choose(PRESETS["toy"]().with_fields(mixed_precision="auto"), cpu)
    assert narrow.model.mixed_precision == "no" and narrow.sample.rollout_weights == "unmerged"
    given = {"mixed_precision": "no", "rollout_weights": "unmerged", "fuse": False}
    asked, found = choose(PRESETS[model]().with_fields(**given), cpu)
    assert {flag: asked.flat()[flag] for flag in given} == given and not {c.flag for c in found} & given.keys()
    for other in ({"full_finetune": True}, {"method": "dpo", "pairs": "nowhere"}):
        whole, _ = choose(PRESETS["sd15"]().with_fields(mixed_precision="no", **other), cpu)
        assert whole.sample.rollout_weights == "unmerged"


def test_how_long_a_run_is() -> None:
    """All of it, resumed or not; pairs are not opened for it."""
    toy = PRESETS["toy"]()
    assert iterations(toy) == 6 and iterations(toy.with_fields(max_train_steps=4)) == 4
    pairs = train.parse(["--model", "toy", "--method", "dpo", "--pairs", "nowhere"])
    assert iterations(pairs.with_fields(max_train_steps=7)) == 7 and iterations(pairs) == 1000


def test_a_device_without_a_number_is_the_current_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch makes no device current that has no number; auto and cuda have none."""
    chosen: list[int] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 2)
    monkeypatch.setattr(torch._C, "_cuda_setDevice", chosen.append, raising=False)
    for name, number in (("auto", 2), ("cuda", 2), ("cuda:3", 3), ("cuda:0", 0)):
        assert pick_device(name) == torch.device("cuda", number) and chosen.pop() == number
    with pytest.raises(ValueError, match="sees 4 CUDA devices"):
        pick_device("cuda:4")
    with pytest.raises(ValueError, match="specified index"):  # of PyTorch's own: what this is about
        torch.cuda.set_device(torch.device("cuda"))


def test_what_was_given_is_not_chosen() -> None:
    given = {"rows_per_forward": 64, "states_per_forward": 8, "gradient_checkpointing": False}
    cfg, found = toy_on(1, **given)
    assert set(found) == {"mixed_precision", "decode_chunk", "fuse", "memory", "compile", "cuda_graphs"}
    assert (cfg.sample.rows_per_forward, cfg.optim.states_per_forward) == (64, 8)


@pytest.mark.slow
@pytest.mark.parametrize("model", ["sd15", "sdxl"])
def test_published_presets_fit_24_80_and_141_gb(model: str) -> None:
    states = []
    expected = {"sd15": (14.5, 21.9, 21.9), "sdxl": (18.4, 49.4, 49.4)}[model]  # the README's, GiB
    for memory, peak in zip((24, 80, 141), expected, strict=True):
        device = gpu(memory * 1e9)
        cfg, found = choose(PRESETS[model](), device)
        print(f"{model}, {memory} GB:", listed(found), f"peak {predict(cfg).peak / GIB:.1f} GiB", sep="\n  ")
        assert predict(cfg).peak <= (device.usable_bytes or 0)
        assert predict(cfg).peak / GIB == pytest.approx(peak, abs=0.1)
        assert cfg.optim.gradient_checkpointing is (model == "sdxl" and memory == 24)
        states.append(cfg.optim.states_per_forward)
    assert states == sorted(states)


def test_choices_are_printed_and_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    assert train.main(flags(out, max_train_steps=1, decode_chunk="none")) == 0
    printed = capsys.readouterr().out
    chosen = "--rows_per_forward 8 --decode_chunk 4 --states_per_forward 4 --memory fast --no-gradient_checkpointing"
    assert f"  {chosen}: memory is not planned" in printed and "--no-cuda_graphs: a CPU has none" in printed
    assert "--no-fuse: the network is narrow: a CPU would take more time, for less memory" in printed
    assert train.parse(["--config", str(out / "config.yaml")]).sample.rows_per_forward == 8


# ------------------------------------------------------------------------------------------------- the dry run


def dry(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "spo_fast.train", "--dry_run", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1", **environment},
        check=False,
    )


def test_toy_dry_run_says_all_and_writes_nothing(tmp_path: Path) -> None:
    done = dry(*flags(tmp_path / "run"))
    assert done.returncode == 0, done.stderr
    text = done.stdout
    for title in ("settings", "chosen", "files", "steps", "FLOPs", "disk", "memory", "time"):
        assert f"== {title}" in text
    assert f"{SMALL['max_prompts']} prompts x 2 epochs in batches of 2: 4 iterations" in text
    assert "spm/model.safetensors" in text and "--spm_path" in text and "learning_rate: 0.001" in text
    assert not (tmp_path / "run").exists()


def test_dry_run_of_missing_models_names_them_and_counts_all_the_same(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    # at 64 px: counted in a second or two
    cfg = train.parse(["--model", "sd15", "--resolution", "64", "--sample_batch_size", "1", "--device", "cpu"])
    text = dry_run.report(cfg)
    assert "stable-diffusion-v1-5/stable-diffusion-v1-5" in text and "no: " in text
    assert "--spm_path" in text and "sd-v1-5_step-aware_preference_model.bin" in text
    assert "rollout (130 samples)" in text  # a tenth of the published 1,300


def test_flops_of_the_run_are_the_iterations_and_the_prompts(tmp_path: Path) -> None:
    cfg = built(tmp_path / "run").cfg
    costs = predict(cfg, device_type="cpu")
    text = dry_run.flops_table(costs, 4, 4)
    whole = (sum(costs.flops(1.0).values()) * 4 + 4 * costs.flops_per_prompt) / 1e12
    assert f"{whole:,.4g}" in text.splitlines()[-1]


@pytest.mark.parametrize("model", ["toy", "toy-flow"])
def test_flops_of_pictures_are_those_of_drawing_them(tmp_path: Path, model: str) -> None:
    """Real networks, counted while they draw a validation and the strengths; and the dry run's sums, by hand."""
    more = {
        "num_steps": 8,
        "resolution": 16,
        "model": model,
        "num_validation_images": 3,
        "validation_prompt": ["a", "b"],
    }
    run = built(
        tmp_path / "run", **more, strengths=[0.5, 1.0], max_train_steps=5, checkpointing_steps=2, decode_chunk=8
    )
    run.model.prompt_cache.ensure(["", "a", "b"])
    costs = predict(run.cfg, run.model.resolved, device_type="cpu")
    draw, score = costs.picture_flops["draw"], costs.picture_flops["score"]
    with CountFlops() as validation:
        run.validator.validate()
    with CountFlops() as sweep:
        run.validator.sweep()
    # a row of the scorer's text beside the pictures, which the run counts with its prompts
    texts = validation.total - 6 * (draw + score)
    assert sweep.total == pytest.approx(2 * 2 * draw, rel=0.005)
    assert 0 <= texts <= 0.05 * validation.total and 0 < score < draw
    shown = whole_run.shown_pictures(run.cfg, 5)
    assert shown == (4 * 2 * 3, 2 * 2)  # before, after 2, 4 and 5 iterations; each strength of each prompt
    pictures = 24 * (draw + score) + 4 * draw
    whole = sum(costs.flops(1.0).values()) * 5 + 4 * costs.flops_per_prompt + pictures
    assert f"{whole / 1e12:,.4g}" in dry_run.flops_table(costs, 5, 4, shown=shown).splitlines()[-1]
    assert whole_run.shown_pictures(run.cfg.with_fields(strengths=()), 5).strengths == 0
    assert whole_run.shown_pictures(run.cfg.with_fields(num_validation_images=0), 5) == (0, 0)


def test_pictures_are_in_the_estimated_time(tmp_path: Path) -> None:
    """Ten iterations' FLOPs of pictures, an iteration of 3 s: 100 iterations take 330 s."""
    cfg = PRESETS["toy"]().with_fields(output_dir=str(tmp_path / "next"))
    device = Device("a card", "cuda", 10 * GIB)
    costs = replace(
        predict(cfg, device_type="cpu"), full_flops={"rollout": 1000}, picture_flops={"draw": 8, "score": 2}
    )
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "config.yaml").write_text(yaml.safe_dump(cfg.flat()))
    records = [{"iteration": i, "device": "a card", "valid_share": 0.5, "rollout_ms": 3000} for i in range(3)]
    (tmp_path / "one" / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    shown = whole_run.ShownPictures(validation=920, strengths=100)
    text = whole_run.time_estimate(cfg, costs, device, 100, shown=shown)
    assert "about 5 min 30 s, validation and strengths included, at 50%" in text


def test_time_is_estimated_from_measurements_only(tmp_path: Path) -> None:
    """Of runs with the same costs, on the same device, beside the output directory; the first iteration is left out."""
    cfg = PRESETS["toy"]().with_fields(output_dir=str(tmp_path / "next"))
    costs = predict(cfg, device_type="cpu")
    device = Device("a card", "cuda", 10 * GIB)
    assert "no iteration" in whole_run.time_estimate(cfg, costs, device, 100)

    def run(name: str, seconds: list[float], on: str = "a card", **changes: object) -> None:
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.yaml").write_text(yaml.safe_dump(cfg.with_fields(**changes).flat()))
        alike = {"device": on, "valid_share": 0.5, "save_ms": 1e6}
        records = [{"iteration": i, **alike, "rollout_ms": 1000 * s} for i, s in enumerate(seconds)]
        (tmp_path / name / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))

    run("other", [1.0] * 50, num_candidates=5)
    run("elsewhere", [1.0] * 50, on="another card")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "config.yaml").write_text("- a list")
    assert "no iteration" in whole_run.time_estimate(cfg, costs, device, 100)
    run("like", [90.0, 3.0, 3.0, 2.0, 50.0], learning_rate=1e-3, max_prompts=7)
    assert "about 5 min 0 s" in whole_run.time_estimate(cfg, costs, device, 100)  # 100 iterations of 3 s
    assert "about 5 min 0 s" not in whole_run.time_estimate(cfg, predict(cfg, device_type="cpu"), device, 200)


# ------------------------------------------------------------------------------------------------- out of memory


@pytest.mark.parametrize(
    ("phase", "words"),
    [
        ("rollout", ["--rows_per_forward 4 (now 8)"]),
        ("score", ["--decode_chunk 4 (now 8)"]),
        ("backward", ["--states_per_forward 2 (now 4)", "--gradient_checkpointing"]),
        ("step", ["--optimizer adamw8bit"]),
    ],
)
def test_out_of_memory_says_which_phase_and_what_to_lower(tmp_path: Path, phase: str, words: list[str]) -> None:
    cfg = built(tmp_path / "run", decode_chunk=8).cfg
    text = out_of_memory(cfg, phase, gpu(8 * GIB))
    assert repr(phase) in text and "\n" not in text
    for word in words:
        assert word in text
    predicted = [float(x) for x in re.findall(r"predicted ([\d.]+) -> ", text)]
    assert len(predicted) == len(words) or phase == "step"


def test_a_run_without_memory_ends_with_advice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The third iteration's backward finds no memory; the checkpoints before it stand, and a resumed run goes on."""
    whole = objectives.predict_states
    calls = []

    def predict_states(*args: object) -> object:
        calls.append(1)
        if len(calls) == 5:  # what the error's advice predicts runs it too
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")
        return whole(*args)

    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(learner, "predict_states", predict_states)
        assert train.main(flags(out, checkpointing_steps=1)) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: out of memory") and error.count("\n") == 1
    assert "'backward'" in error and "--states_per_forward 2 (now 4)" in error
    done = len(read_metrics(out / "metrics.jsonl"))
    assert (out / f"checkpoint-{done}").is_dir()
    assert train.main([*command_line({"config": out / "config.yaml", "output_dir": out}), "--states_per_forward", "2",
                       "--resume_from_checkpoint", "latest"]) == 0  # fmt: skip


def test_memory_of_a_cpu_that_is_full(tmp_path: Path) -> None:
    error = RuntimeError("[enforce fail at alloc_cpu.cpp:121] DefaultCPUAllocator: can't allocate memory: you tried")
    assert is_out_of_memory(error) and not is_out_of_memory(RuntimeError("shape mismatch"))
