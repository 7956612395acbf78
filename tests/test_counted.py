"""Counted costs that are kept: the same numbers, counted anew where they may not be, and nothing heavy imported."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from runs import ROOT, command_line

from spo_fast import train
from spo_fast.config.training import Config
from spo_fast.ops import backend
from spo_fast.training.plan import counted, fake_run, once
from spo_fast.training.plan.costs import Costs
from spo_fast.training.plan.once import Once

SMALL = {"sample_batch_size": 2, "train_batch_size": 2, "num_steps": 6, "branch_start": 2}


def settings(model: str, **more: object) -> Config:
    """SD-1.5 and SDXL on small latents: counted in seconds."""
    line = ["--model", model, *(() if model == "toy" else ("--resolution", "64"))]
    return train.parse(line).with_fields(**SMALL, **more)


@pytest.fixture
def counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """An empty cache; a word for each time that something is counted."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    seen, predict = [], fake_run.predict

    def noted(*arguments: object) -> Costs:
        seen.append("counted")
        return predict(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(fake_run, "predict", noted)
    return seen


@pytest.mark.parametrize(
    ("model", "device", "more"),
    [
        ("toy", "cpu", {}),
        ("toy", "cuda", {"fuse": True, "mixed_precision": "bf16"}),
        ("toy", "cuda", {"gradient_checkpointing": True, "mixed_precision": "fp16"}),
        pytest.param("sd15", "cpu", {}, marks=pytest.mark.slow),
        pytest.param("sdxl", "cpu", {}, marks=pytest.mark.slow),
        pytest.param("sdxl", "cuda", {"fuse": True, "mixed_precision": "bf16"}, marks=pytest.mark.slow),
    ],
)
def test_kept_is_counted_is_block_by_block(
    model: str, device: str, more: dict[str, object], counts: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg = settings(model, **more)
    fake_run.predict(cfg, None, device)  # the first count of a process holds 16 bytes more: a table that stays
    counts.clear()
    fake_run.LATEST.clear()
    fresh = counted.predict(cfg, None, device)
    assert counted.predict(cfg, None, device) == fresh and counts == ["counted"]
    monkeypatch.setattr(Once, "repeat_blocks", lambda *blocks: None)  # every block runs
    fake_run.LATEST.clear()
    assert fake_run.predict(cfg, None, device) == fresh
    fake_run.LATEST.clear()


def test_kept_is_of_the_same_settings_files_and_source(
    tmp_path: Path, counts: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg = settings("toy")
    counted.predict(cfg, None, "cpu")
    longer = replace(cfg, run=replace(cfg.run, max_train_steps=5, output_dir="elsewhere"))
    counted.predict(longer, None, "cpu")
    assert len(counts) == 1  # as long as a run is, an iteration costs the same
    counted.predict(cfg.with_fields(num_candidates=2), None, "cpu")
    counted.predict(cfg, None, "cuda")
    with monkeypatch.context() as other:
        other.setattr(counted, "_source", lambda: "another")
        counted.predict(cfg, None, "cpu")
    with monkeypatch.context() as other:
        other.setenv("SPO_FAST_BACKEND", "eager")
        counted.predict(cfg, None, "cpu")
    assert len(counts) == 5
    lora = tmp_path / "lora"
    lora.mkdir()
    start = cfg.with_fields(lora_path=str(lora))
    before = counted.kept_file(start, None, "cpu")
    (lora / "w.safetensors").write_bytes(b"1")
    assert before != counted.kept_file(start, None, "cpu") != counted.kept_file(cfg, None, "cpu")
    (tmp_path / "parts").mkdir()
    (tmp_path / "parts" / "unet").symlink_to(lora, target_is_directory=True)
    through = cfg.with_fields(lora_path=str(tmp_path / "parts"))
    before = counted.kept_file(through, None, "cpu")
    (lora / "w.safetensors").write_bytes(b"22")  # behind a folder that is a link
    assert before != counted.kept_file(through, None, "cpu")
    before = counted.kept_file(cfg, None, "cpu")
    with monkeypatch.context() as other:
        other.setenv("SPO_FAST_LIB_DIR", str(tmp_path))  # decides which backends there are
        assert before != counted.kept_file(cfg, None, "cpu")
    (tmp_path / "mine.py").write_text("def judge(pictures, prompts): ...")
    monkeypatch.syspath_prepend(tmp_path)
    assert counted.kept_file(cfg.with_fields(scorer=("mine:judge",)), None, "cpu") is None


@pytest.mark.parametrize("damage", ["torn", "digit", "no object", "deep", "other fields", "no file", "not writable"])
def test_what_cannot_be_read_is_counted_anew(counts: list[str], tmp_path: Path, damage: str) -> None:
    cfg = settings("toy")
    if damage == "not writable":
        (tmp_path / "cache").write_text("a file stands where the folder would")
    first = counted.predict(cfg, None, "cpu")
    file = counted.kept_file(cfg, None, "cpu")
    assert file is not None
    if damage != "not writable":
        text = file.read_text()
        place = text.index('"gradients": ') + len('"gradients": ')
        broken = {
            "torn": text[:-9],
            "digit": text[:place] + str(9 - int(text[place])) + text[place + 1 :],
            "no object": "[]",
            "deep": "[" * 200_000,
            "other fields": text.replace("gradients", "gradient"),
        }
        file.unlink() if damage == "no file" else file.write_text(broken[damage])
    assert counted.predict(cfg, None, "cpu") == first and len(counts) == 2
    assert counted.predict(cfg, None, "cpu") == first and len(counts) == (3 if damage == "not writable" else 2)


HEAVY = ("bitsandbytes", "torch._inductor.compile_fx", "diffusers.pipelines", "matplotlib")
COMPILER = ("torch._dynamo", "torch._inductor", "diffusers", "transformers", "peft", "triton")


def imported(line: list[str], names: tuple[str, ...]) -> str:
    """Which of these a command has imported when it is done."""
    code = (
        "import sys\nfrom spo_fast import train\ntry:\n    train.main(sys.argv[1:])\nexcept SystemExit:\n    pass\n"
        f"print('imported:', *(name for name in {names} if sys.modules.get(name)))"
    )
    done = subprocess.run([sys.executable, "-c", code, *line], cwd=ROOT, capture_output=True, text=True, check=True)
    return done.stdout.splitlines()[-1]


def test_nothing_is_imported_that_nobody_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A dry run that counts, and one that finds what was counted of a model that is not here."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert imported(["--help"], (*HEAVY, *COMPILER, "torch")) == "imported:"
    settings = {"model": "sd15", "resolution": 64, "device": "cpu", "output_dir": tmp_path / "x"}
    line = [*command_line(settings), "--dry_run"]
    assert imported(line, HEAVY) == "imported:"
    assert imported(line, (*HEAVY, *COMPILER)) == "imported:"


def test_networks_of_shapes_draw_nothing_and_leave_pytorch_as_it_was() -> None:
    plain = {name: getattr(torch.nn.init, name) for name in once.INITIALISERS}
    before = torch.get_rng_state()
    with pytest.raises(RuntimeError, match="in the middle"), once.shapes_alone():
        layer = torch.nn.Linear(3, 4)
        assert layer.weight.is_meta and torch.nn.init.normal_(layer.weight) is layer.weight
        raise RuntimeError("in the middle")
    assert {name: getattr(torch.nn.init, name) for name in plain} == plain
    assert torch.equal(torch.get_rng_state(), before) and not torch.nn.Linear(3, 4).weight.is_meta
    made = once.Once(False).weights(layer, torch.bfloat16)
    assert all(type(p.data).__name__ == "FakeTensor" and isinstance(p, torch.nn.Parameter) for p in made.parameters())
    assert [(p.dtype, p.requires_grad, tuple(p.shape)) for p in made.parameters()] == [
        (torch.bfloat16, True, (4, 3)),
        (torch.bfloat16, True, (4,)),
    ]


def test_a_constant_is_marked_as_the_compiler_marks_it() -> None:
    def same() -> None: ...

    marked = vars(torch.compiler.assume_constant_result(same))
    assert marked and marked.items() <= vars(backend._choose).items()
