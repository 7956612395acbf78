"""Wrong inputs, each with the one line it ends with: what is wrong, where, and what to do about it."""

from __future__ import annotations

import errno
import json
import os
import pickle
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from runs import command_line, flags, run_toy
from safetensors.torch import load_file, save_file
from tiny import make_tiny_sd15, make_tiny_sdxl

from spo_fast import train, train_spm
from spo_fast.config.preference import PreferenceConfig
from spo_fast.config.presets import PREFERENCE_PRESETS, PRESETS
from spo_fast.config.training import Config
from spo_fast.data import files
from spo_fast.models.files.toy import WEIGHTS
from spo_fast.scorers.spm import make_tiny_spm
from spo_fast.toy import evaluate
from spo_fast.training import checkpoint

SPM, PICKSCORE = WEIGHTS / "spm", WEIGHTS / "pickscore"


def refused(
    main: Callable[[list[str]], int], line: list[Any], capsys: pytest.CaptureFixture[str], status: int | None = None
) -> str:
    """The one line on stderr that a command ends with."""
    capsys.readouterr()
    code = main([str(word) for word in line])
    error = capsys.readouterr().err
    assert code in ((1, 2) if status is None else (status,)), error
    assert error.startswith("error: ") and error.endswith("\n"), error
    assert len(error.splitlines()) == 1 and "Traceback" not in error and "error: unexpected" not in error, error
    return error.removeprefix("error: ").strip()


class Place:
    """A scratch directory, a small finished run, and tiny models of the other kinds."""

    def __init__(self, path: Path, shared: Path):
        self.path, self.finished = path, shared / "finished"
        self.sd15, self.sdxl = shared / "sd15", shared / "sdxl"

    def file(self, name: str, content: str | bytes) -> Path:
        path = self.path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    def yaml(self, text: str | bytes) -> list[Any]:
        return ["--config", self.file("c.yaml", text)]

    def prompts(self, name: str, content: str | bytes) -> list[Any]:
        return ["--prompts", self.file(name, content)]

    def cut(self, source: Path, file: str, size: int = 200) -> Path:
        """A copy of a directory in which one file was cut short."""
        copy = self.path / "cut"
        shutil.copytree(source, copy, dirs_exist_ok=True)
        (copy / file).write_bytes((copy / file).read_bytes()[:-size])
        return copy

    def with_scheduler(self, config: dict[str, Any]) -> Path:
        """The toy with another scheduler."""
        copy = self.path / "scheduled"
        shutil.copytree(WEIGHTS, copy)
        (copy / "scheduler" / "scheduler_config.json").write_text(json.dumps(config))
        return copy

    def resume(self, damaged: str | None = None, **changes: Any) -> list[Any]:
        """Going on with a copy of the finished run, with settings changed or a file of its checkpoint cut short."""
        copy = self.cut(self.finished, f"checkpoint-1/{damaged}") if damaged else self.path / "copy"
        if not damaged:
            shutil.copytree(self.finished, copy)
        return flags(copy, **{"max_train_steps": 2, "resume_from_checkpoint": "latest", **changes})

    def lora(self, **changes: Any) -> list[Any]:
        return flags(self.path / "run", **{"lora_path": self.finished, **changes})

    def lora_with(self, rename: Callable[[str], str]) -> Path:
        """The finished run's LoRA under other names."""
        tensors = load_file(self.finished / "pytorch_lora_weights.safetensors")
        path = self.path / "other.safetensors"
        save_file({rename(name): value for name, value in tensors.items()}, path)
        return path

    def lora_saying(self, metadata: dict[str, Any]) -> Path:
        """The finished run's LoRA with other metadata."""
        path = self.path / "other.safetensors"
        tensors = load_file(self.finished / "pytorch_lora_weights.safetensors")
        save_file(tensors, path, metadata={"lora_adapter_metadata": json.dumps(metadata)})
        return path

    def of_sd15(self, **changes: Any) -> list[Any]:
        settings = {"model": "sd15", "pretrained_model_name_or_path": self.sd15, "spm_path": SPM, "resolution": None}
        return flags(self.path / "run", **{**settings, **changes})

    def pickle(self, value: Any) -> Path:
        return self.file("spm.bin", pickle.dumps(value))


class Bomb:
    """What an attacker would put into a pickle."""

    def __init__(self, path: Path):
        self.path = str(path)

    def __reduce__(self) -> Any:
        return os.mkdir, (self.path,)


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("shared")
    run_toy(root / "finished", max_train_steps=1)
    make_tiny_sd15(root / "sd15")
    make_tiny_sdxl(root / "sdxl")
    return root


@pytest.fixture
def place(tmp_path: Path, shared: Path) -> Place:
    return Place(tmp_path, shared)


# ------------------------------------------------------------------------------------------------------------ the table

# flags that are typed after --model toy --output_dir DIR, and words of the line they end with
SETTINGS = [
    ("--learning_rat 1e-5", ["unknown argument '--learning_rat'", "'--learning_rate'", "--help"]),
    ("--learning_rat=1e-5", ["unknown argument '--learning_rat'", "'--learning_rate'"]),
    ("--learning-rate 1e-5", ["unknown argument '--learning-rate'", "'--learning_rate'"]),
    ("--no-shufle", ["unknown argument '--no-shufle'", "'--no-shuffle'"]),
    ("--learning 1e-5", ["unknown argument '--learning'"]),
    ("runs/mine", ["unknown argument 'runs/mine'", "--help"]),
    ("--rank", ["--rank", "expected one argument"]),
    ("--model sdx", ["--model='sdx' is none of toy, toy-flow, sd15, sdxl, sd35, flux.", "Did you mean 'sdxl'"]),
    ("--method dspo", ["--method='dspo' is none of spo, mspo, d3po", "Did you mean 'spo'"]),
    ("--recipe publish", ["--recipe='publish' is none of default, published, fast.", "Did you mean 'published'"]),
    ("--scorer pikscore", ["unknown scorer 'pikscore'. Known: spm, pickscore, ", "Did you mean 'pickscore'"]),
    ("--scorer text_projection", ["unknown scorer 'text_projection'. Known: spm, pickscore"]),
    ("--scorer spm:high", ["spm:high", "must be a number, as in spm:0.5"]),
    ("--scorer spm:nan", ["spm:nan", "must be a number"]),
    ("--scorer", ["scorer is empty"]),
    ("--report_to wandbb", ["--report_to='wandbb' is none of none, tensorboard, wandb.", "Did you mean 'wandb'"]),
    ("--optimizer adam", ["--optimizer='adam' is none of adamw,", "Did you mean 'adamw'"]),
    ("--lr_scheduler cosin", ["Did you mean 'cosine'"]),
    ("--mixed_precision fp61", ["--mixed_precision='fp61'", "Did you mean 'fp64'"]),
    ("--learning_rate abc", ["--learning_rate='abc' is not a number"]),
    ("--rank 4.5", ["--rank='4.5' is not a whole number"]),
    ("--eta 1e-10", ["eta=1e-10 must be in [0.001, 2]"]),
    ("--guidance_scale 1e10", ["guidance_scale=10000000000.0 must be in [0, 100]: beyond"]),
    ("--eta 0", ["eta=0.0 must be in [0.001, 2]: at 0 a step is deterministic"]),
    ("--branch_start 20", ["branch_start=20 leaves no steps to branch (num_steps=20). Use a value from 0 to 19"]),
    ("--num_steps 4", ["leaves no steps to branch (num_steps=4). Use a value from 0 to 3"]),
    ("--num_steps 1001 --branch_start 2", ["num_steps=1001 must be in [1, 999]"]),
    ("--method gradspo --last_step extend", ["last_step=extend joins two steps. Use keep or compare"]),
    ("--method dense --num_ranked 3 --num_candidates 2", ["method=dense cannot draw num_ranked=3", "num_candidates=2"]),
    ("--method gradspo --rollout_weights merged", ["rollout_weights", "gradspo"]),
    ("--method ddpo --recipe published", ["recipe=published is SPO's code", "method=ddpo"]),
    ("--num_candidates 1", ["num_candidates=1 must be at least 2: two or more are needed to compare"]),
    ("--threshold 1", ["threshold=1.0 must be in [-1, 1)"]),
    ("--clip 1", ["clip=1.0 must be in (0, 1): none turns the clamp off"]),
    ("--seed 4294967296", ["seed=4294967296 must be in [0, 4294967295]"]),
    ("--resolution 0", ["--resolution=0 must be at least 1"]),
    ("--rank 99999999999999999999999", ["rank=99999999999999999999999 is too large"]),
    ("--lora_targets nothing", ["--lora_targets nothing fits no layer of the network", "Try to_q to_k to_v"]),
    ("--lora_targets", ["lora_targets is empty"]),
    ("--lora_path x --full_finetune", ["lora_path starts a LoRA, but full_finetune trains none"]),
    ("--lora_path nowhere", ["--lora_path nowhere", "pytorch_lora_weights.safetensors or its directory"]),
    ("--device tpu", ["--device tpu is unknown. Use auto, cpu, cuda or cuda:N"]),
    ("--device mps", ["--device mps is not supported. Use auto, cpu, cuda or cuda:N"]),
    ("--prompts nowhere.txt", ["nowhere.txt does not exist", "leave the flag out"]),
    ("--config nowhere.yaml", ["--config nowhere.yaml does not exist. Give a YAML file"]),
    ("--resume_from_checkpoint nowhere", ["--resume_from_checkpoint nowhere is no checkpoint (no state.json in it)"]),
    ("--output_dir /proc/spo/run", ["cannot write to /proc/spo/run", "Choose another --output_dir"]),
]

# what is made of a Place, and words of the line
FILES: dict[str, tuple[Callable[[Place], list[Any]], list[str]]] = {
    # prompts
    "empty prompt file": (lambda p: p.prompts("p.txt", "\n# nothing\n"), ["p.txt: no prompts in it"]),
    "binary prompt file": (lambda p: p.prompts("p.txt", bytes(range(256))), ["p.txt: byte 128 is not UTF-8"]),
    "Latin-1 prompt file": (lambda p: p.prompts("p.txt", b"caf\xe9"), ["p.txt: byte 3 is not UTF-8", "as UTF-8"]),
    "prompts are a picture": (lambda p: p.prompts("p.png", b"\x89PNG"), ["cannot read prompts from a .png", ".jsonl"]),
    "prompts are a directory": (lambda p: ["--prompts", p.file("d.txt/x", "").parent], ["d.txt is a folder"]),
    "prompts cut off": (lambda p: p.prompts("p.json", '["a", "b'), ["p.json, line 1, column 7: not JSON"]),
    "prompts nested deep": (lambda p: p.prompts("p.json", "[" * 100_000), ["p.json, from line 1 on: not JSON"]),
    "numbers as prompts": (lambda p: p.prompts("p.json", "[1, 2]"), ["p.json, entry 1: a prompt must be a string"]),
    "half a character": (lambda p: p.prompts("p.json", r'["\ud800"]'), ["p.json, entry 1:", "not valid Unicode"]),
    "no such column": (
        lambda p: [*p.prompts("p.csv", "id,text\n1,a\n"), "--caption_column", "title"],
        ["p.csv, line 1: no column title; found id, text", "--caption_column"],
    ),
    "comma in a prompt": (lambda p: p.prompts("p.csv", "id,text\n1,a,b\n"), ["p.csv, line 2: more cells", "quotes"]),
    "no parquet": (lambda p: p.prompts("p.parquet", "PAR1 not"), ["p.parquet: not a whole parquet file"]),
    # YAML
    "unknown key": (lambda p: p.yaml("rank: 2\nlearning_rte: 1"), ["c.yaml, line 2", "Did you mean 'learning_rate'"]),
    "key twice": (lambda p: p.yaml("rank: 2\neta: 1\nrank: 4"), ["c.yaml, line 3: rank stands there a second time"]),
    "wrong type": (lambda p: p.yaml("\nrank: many"), ["c.yaml, line 2: rank='many' is not a whole number"]),
    "no truth": (lambda p: p.yaml("shuffle: 3"), ["c.yaml, line 1: shuffle='3' is not true or false"]),
    "no value": (lambda p: p.yaml("rank:"), ["c.yaml, line 1: rank has no value"]),
    "unknown choice": (lambda p: p.yaml("method: mspoo"), ["line 1: method='mspoo' is none of", "'mspo'"]),
    "out of range": (lambda p: p.yaml("eta: 0"), ["c.yaml, line 1: eta=0.0 must be in [0.001, 2]"]),
    "not a number": (lambda p: p.yaml("eta: .nan"), ["c.yaml, line 1: eta='.nan' is not a number"]),
    "list for a number": (lambda p: p.yaml("rank: [4]"), ["c.yaml, line 1: rank must be one plain value"]),
    "mapping for names": (lambda p: p.yaml("scorer: {spm: 1}"), ["line 1: scorer must be a list of plain values"]),
    "tab": (lambda p: p.yaml("rank: 2\n\teta: 1"), ["c.yaml, line 2 is not YAML"]),
    "open bracket": (lambda p: p.yaml("rank: 2\nscorer: [spm"), ["c.yaml, line 2 is not YAML"]),
    "YAML list": (lambda p: p.yaml("- rank"), ["c.yaml: expected lines such as 'learning_rate: 1e-5', not a list"]),
    "two documents": (lambda p: p.yaml("rank: 2\n---\nrank: 3"), ["c.yaml, line 2 is not YAML"]),
    "not UTF-8": (lambda p: p.yaml(b"output_dir: caf\xe9"), ["c.yaml: byte 15 is not UTF-8", "Save the file as UTF-8"]),
    "binary YAML": (lambda p: p.yaml(b"\0\1\2"), ["c.yaml is not YAML"]),
    "NUL in a path": (lambda p: p.yaml('prompts: "a\\0b"'), ["line 1: prompts='a\\x00b' holds a character that"]),
    "empty path": (lambda p: p.yaml("prompts: ''"), ["line 1: prompts is empty"]),
    "YAML is a directory": (lambda p: ["--config", p.path], ["is a directory. Give a YAML file"]),
    "endless escape": (lambda p: p.yaml('prompts: "\\UFFFFFFFF"'), ["c.yaml is not YAML"]),
    # the run's directory
    "output_dir is a file": (lambda p: ["--output_dir", p.file("f", "")], ["cannot write to", "another --output_dir"]),
    "output_dir under a file": (lambda p: ["--output_dir", p.file("f", "") / "run"], ["cannot write to"]),
    "output_dir has a run": (lambda p: ["--output_dir", p.finished], ["already holds a run", "checkpoint latest"]),
    # preference models
    "SPM for another tokenizer": (
        lambda p: ["--spm_path", make_tiny_spm(p.path / "spm")],
        ["knows 256 tokens, but the diffusion model's tokenizer has", "--spm_path"],
    ),
    "PickScore as SPM": (
        lambda p: ["--spm_path", PICKSCORE / "model.safetensors"],
        ["missing: t_embedder", "cannot score as a step-aware one: use it as --scorer pickscore"],
    ),
    "SPM as PickScore": (
        lambda p: ["--scorer", "pickscore", "--pickscore_path", SPM],
        ["unexpected: t_embedder", "use it as --scorer spm"],
    ),
    "UNet as SPM": (
        lambda p: ["--spm_path", WEIGHTS / "unet" / "diffusion_pytorch_model.safetensors"],
        ["is no CLIP: it has no vision_model"],
    ),
    "SPM cut short": (lambda p: ["--spm_path", p.cut(SPM, "model.safetensors")], ["was cut short", "bytes of"]),
    "SPM is text": (lambda p: ["--spm_path", p.file("a.safetensors", "hello")], ["is no .safetensors file"]),
    "pickle that runs code": (
        lambda p: ["--spm_path", p.pickle(Bomb(p.path / "never"))],
        ["spm.bin cannot be read", "run code"],
    ),
    "pickle of a list": (lambda p: ["--spm_path", p.pickle([1, 2])], ["spm.bin", "state dict"]),
    "not a pickle": (lambda p: ["--spm_path", p.file("spm.bin", b"\x80\x02}q")], ["spm.bin cannot be read"]),
    "SPM without its config": (
        lambda p: ["--spm_path", shutil.copy(SPM / "model.safetensors", p.path)],
        ["no known CLIP has", "config.json"],
    ),
    "SPM with a torn config": (
        lambda p: ["--spm_path", p.cut(SPM, "config.json", 20)],
        ["config.json is damaged: no JSON"],
    ),
    # models
    "UNet cut short": (
        lambda p: ["--pretrained_model_name_or_path", p.cut(WEIGHTS, "unet/diffusion_pytorch_model.safetensors")],
        ["unet/diffusion_pytorch_model.safetensors was cut short", "download or copy it again"],
    ),
    "VAE cut short": (
        lambda p: ["--pretrained_model_name_or_path", p.cut(WEIGHTS, "vae/diffusion_pytorch_model.safetensors")],
        ["vae/diffusion_pytorch_model.safetensors was cut short"],
    ),
    "text encoder cut short": (
        lambda p: ["--pretrained_model_name_or_path", p.cut(WEIGHTS, "text_encoder_2/model.safetensors")],
        ["text_encoder_2/model.safetensors was cut short"],
    ),
    "UNet's config torn": (
        lambda p: ["--pretrained_model_name_or_path", p.cut(WEIGHTS, "unet/config.json", 20)],
        ["unet/config.json is damaged: no JSON"],
    ),
    "model of another kind": (
        lambda p: ["--pretrained_model_name_or_path", p.sd15],
        ["holds a UNet of kind sd15, but kind sdxl was asked for"],
    ),
    "checkpoint of WebUI": (
        lambda p: ["--pretrained_model_name_or_path", p.file("m.ckpt", b"")],
        ["m.ckpt: only .safetensors is read", "convert it first"],
    ),
    "LoRA as a model": (
        lambda p: ["--pretrained_model_name_or_path", p.finished / "pytorch_lora_weights.safetensors"],
        ["is no whole sdxl model"],
    ),
    "width": (lambda p: p.of_sd15(width=68), ["width=68 must be a multiple of 8, the VAE's factor"]),
    "VAE of another size": (
        lambda p: p.of_sd15(pretrained_vae_model_name_or_path=WEIGHTS / "vae" / "config.json"),
        ["only .safetensors is read"],
    ),
    # going on
    "another rank": (lambda p: p.resume(rank=16), ["cannot go on with other settings", "rank: 8 -> 16"]),
    "another alpha": (lambda p: p.resume(lora_alpha=2), ["lora_alpha: None -> 2.0", "use those it was saved with"]),
    "other targets": (lambda p: p.resume(lora_targets=["to_q"]), ["lora_targets: ["]),
    "full fine-tuning": (lambda p: p.resume(full_finetune=True), ["full_finetune: False -> True"]),
    "another optimizer": (lambda p: p.resume(optimizer="adamw8bit"), ["optimizer: adamw -> adamw8bit"]),
    "from a LoRA now": (lambda p: p.resume(lora_path=p.finished), ["lora_path: None -> "]),
    "another run's checkpoint": (
        lambda p: p.resume(resume_from_checkpoint=p.finished / "checkpoint-1"),
        ["already holds a run (checkpoint-1)", "is another's. Go on with its own (latest)"],
    ),
    "scheduler of another noise schedule": (
        lambda p: ["--pretrained_model_name_or_path", p.with_scheduler({"_class_name": "EDMEulerScheduler"})],
        ["scheduler (EDMEulerScheduler) has no betas"],
    ),
    "no checkpoint there": (lambda p: p.resume(resume_from_checkpoint=p.path), ["is no checkpoint", "checkpoint-1"]),
    "weights cut short": (lambda p: p.resume("trained.safetensors"), ["checkpoint-1 is damaged", "Start again"]),
    "optimizer cut short": (
        lambda p: p.resume("optimizer.safetensors"),
        ["damaged (optimizer.safetensors is not what was saved), and no other is whole"],
    ),
    "counters torn": (
        lambda p: p.resume("state.json"),
        ["damaged (state.json is not what was saved), and no other is whole"],
    ),
    # starting from a LoRA
    "LoRA of another rank": (lambda p: p.lora(rank=4), ["has rank 8, but --rank is 4: use the same"]),
    "LoRA of another rank, in a dry run": (
        lambda p: [*p.lora(rank=4), "--dry_run"],
        ["has rank 8, but --rank is 4: use the same"],
    ),
    "LoRA on other layers": (
        lambda p: p.lora(lora_targets=["to_q", "to_k"]),
        ["on other layers than --lora_targets: use --lora_targets conv1 conv2 to_k to_out.0 to_q to_v"],
    ),
    "LoRA of another alpha": (lambda p: p.lora(lora_alpha=2), ["has alpha 8, but here it is 2: use --lora_alpha 8"]),
    "LoRA of another base model": (
        lambda p: p.of_sd15(lora_path=p.finished, rank=8),
        ["belongs to another base model: this one has no layer"],
    ),
    "LoRA of another width": (
        lambda p: p.lora(pretrained_model_name_or_path=p.sdxl, spm_path=SPM, resolution=64, lora_targets=["conv1"]),
        ["belongs to another base model"],
    ),
    "LoRA of a text encoder": (
        lambda p: p.lora(lora_path=p.lora_with(lambda name: name.replace("unet.", "text_encoder."))),
        ["holds more than a LoRA of a UNet: 96 tensors of text encoders, such as text_encoder."],
    ),
    "kohya's LoRA of another rank": (
        lambda p: p.lora(lora_path=p.finished / "lora_kohya.safetensors", rank=4),
        ["has rank 8, but --rank is 4"],
    ),
    "LoRA with an alpha for each layer": (
        lambda p: p.lora(lora_path=p.lora_saying({"unet.lora_alpha": 8, "unet.alpha_pattern": {"to_q": 2}})),
        ["has alphas of 2 to 8: training goes on from one alpha"],
    ),
    "LoRA scaled by the root of its rank": (
        lambda p: p.lora(lora_path=p.lora_saying({"unet.lora_alpha": 8, "unet.use_rslora": True})),
        ["has alpha 22.627417, but here it is 8: use --lora_alpha 22.627417"],
    ),
    "LoRA cut short": (
        lambda p: p.lora(lora_path=p.cut(p.finished, "pytorch_lora_weights.safetensors")),
        ["pytorch_lora_weights.safetensors was cut short"],
    ),
}


def test_the_table_is_long() -> None:
    assert len(SETTINGS) + len(FILES) >= 100


@pytest.mark.parametrize(("setting", "says"), SETTINGS, ids=[setting for setting, _ in SETTINGS])
def test_settings(tmp_path: Path, capsys: pytest.CaptureFixture[str], setting: str, says: list[str]) -> None:
    error = refused(train.main, ["--model", "toy", "--output_dir", tmp_path / "run", *setting.split()], capsys)
    for words in says:
        assert words in error


@pytest.mark.parametrize("name", FILES)
def test_files(place: Place, capsys: pytest.CaptureFixture[str], name: str) -> None:
    make, says = FILES[name]
    error = refused(train.main, ["--model", "toy", "--output_dir", place.path / "run", *make(place)], capsys)
    for words in says:
        assert words in error
    assert not (place.path / "run" / "checkpoint-1").exists()
    assert not (place.path / "never").exists()


# numbers: every field that is one, from its own annotation's point of view and from the command line's
NUMBERS = [
    (main, name)
    for main, config in ((train.main, Config), (train_spm.main, PreferenceConfig))
    for name, kind in config.kinds().items()
    if kind.base in (int, float) and (config is Config or name not in Config.kinds())
]


@pytest.mark.parametrize(("main", "name"), NUMBERS, ids=[name for _, name in NUMBERS])
def test_no_number_may_be_negative_or_none(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], main: Any, name: str
) -> None:
    for value in ("nan", "inf", "1e999", "-2", "ten", ""):
        line = ["--model", "toy", "--output_dir", tmp_path / "run", f"--{name}={value}"]
        assert refused(main, line, capsys, status=2).startswith(f"--{name}=")


def test_no_model(capsys: pytest.CaptureFixture[str]) -> None:
    said = "--model is needed: toy, toy-flow, sd15, sdxl, sd35, flux"
    assert refused(train.main, [], capsys, status=2).startswith(said)


# ------------------------------------------------------------------------------------------------- the machine's part


def test_directory_in_use(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with files.lock(tmp_path / "run"):
        error = refused(train.main, flags(tmp_path / "run"), capsys)
    assert "another process is training in" in error and "Choose another --output_dir" in error


def test_read_only_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """root writes anywhere, so the refusal is made here."""

    def refuse(self: Path, *args: Any, **options: Any) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(self))

    with monkeypatch.context() as patch:
        patch.setattr(Path, "mkdir", refuse)
        error = refused(train.main, flags(tmp_path / "run"), capsys)
    assert f"cannot write to {tmp_path / 'run'} (Read-only file system). Choose another --output_dir" in error


@pytest.mark.parametrize("where", ["save_file", "write_text"])
def test_full_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], where: str
) -> None:
    from safetensors import SafetensorError

    def full(*args: Any, **options: Any) -> None:
        if where == "save_file":
            raise SafetensorError("I/O error: No space left on device (os error 28)")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "state.json")

    with monkeypatch.context() as patch:
        patch.setattr(*((checkpoint, "save_tensors") if where == "save_file" else (Path, "write_text")), full)
        error = refused(train.main, flags(tmp_path / "run", max_train_steps=1), capsys)
    assert "No space left on device" in error and "--checkpoints_total_limit" in error
    assert not list((tmp_path / "run").glob("checkpoint-*"))


def test_no_cuda(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    error = refused(train.main, flags(tmp_path / "run", device="cuda"), capsys)
    assert "--device cuda, but PyTorch sees 0 CUDA devices" in error


@pytest.mark.parametrize(
    ("module", "setting", "says"),
    [
        ("bitsandbytes", {"optimizer": "adamw8bit"}, "pip install 'spo_fast[8bit]', or use --optimizer adamw"),
        ("wandb", {"report_to": "wandb"}, "spo_fast[wandb]"),
        ("tensorboard", {"report_to": "tensorboard"}, "spo_fast[tensorboard]"),
        ("pyarrow", {"prompts": "p.parquet"}, "spo_fast[data]"),
    ],
)
def test_missing_extras(
    place: Place,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    module: str,
    setting: Any,
    says: str,
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    place.file("p.parquet", b"PAR1")
    monkeypatch.chdir(place.path)
    assert says in refused(train.main, flags(place.path / "run", **setting), capsys)
    assert not (place.path / "run").exists()  # known before anything is loaded or written


def test_missing_files_are_a_table(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    """The one error of several lines: every file, and its flag."""
    model = shutil.copytree(WEIGHTS, place.path / "m")
    (model / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    settings = {"pretrained_model_name_or_path": model, "spm_path": "no/where/spm.bin"}
    assert train.main(flags(place.path / "run", **settings)) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: this run needs what is missing here (2):") and "Traceback" not in error
    assert "vae/diffusion_pytorch_model.safetensors" in error
    assert "--pretrained_model_name_or_path" in error and "no/where/spm.bin" in error and "--spm_path" in error


# --------------------------------------------------------------------------------------------------- what is no error


def test_long_prompts_are_counted(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    file = place.file("p.txt", "a red square\n\n" + "word " * 100 + "\n")
    run_toy(place.path / "run", prompts=file, max_train_steps=1)
    assert "warning: prompts longer than 16 tokens: 1, such as " in capsys.readouterr().out


def test_latest_of_an_empty_directory_starts_anew(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_toy(tmp_path / "run", max_train_steps=1, resume_from_checkpoint="latest")
    assert f"{tmp_path / 'run'} has no checkpoint yet: starting anew" in capsys.readouterr().out


def test_another_seed_goes_on_with_a_note(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    assert train.main([str(word) for word in place.resume(seed=7)]) == 0
    shown = capsys.readouterr().out
    assert "changed since the checkpoint: seed: 42 -> 7" in shown and "iterations now mean other data" in shown


def test_empty_yaml_is_no_settings(place: Place) -> None:
    assert train.parse(["--model", "toy", *map(str, place.yaml("# nothing\n"))]) == PRESETS["toy"]()


# ----------------------------------------------------------------------------------------------------- tracebacks


def test_a_bug_is_one_line_and_a_traceback_with_debug(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def bug(*args: Any) -> Any:
        return [][0]  # noqa: PLE0643

    monkeypatch.setattr(train, "resolve", bug)
    assert train.main(flags(tmp_path / "run")) == 1
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1
    assert error.startswith("error: unexpected IndexError at train.py:") and "list index out of range" in error
    assert "--debug" in error
    assert train.main([*flags(tmp_path / "run"), "--debug"]) == 1
    error = capsys.readouterr().err
    assert error.startswith("Traceback") and "IndexError" in error and "in bug" in error


def test_a_librarys_error_is_unexpected_and_ours_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(train, "resolve", lambda *args: json.loads("no"))
    assert train.main(flags(tmp_path / "run")) == 1
    assert "unexpected JSONDecodeError at train.py:" in capsys.readouterr().err
    refused(train.main, flags(tmp_path / "run", eta=0), capsys)


@pytest.mark.parametrize("main", [train.main, train_spm.main])
def test_debug_shows_the_traceback_of_a_wrong_setting(main: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--model", "toy", "--seed", "-1", "--debug"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("Traceback") and error.splitlines()[-1].startswith("error: --seed=-1 must be in")


# ------------------------------------------------------------------------------------------------- the other commands

PAIR_TABLE = "prompt,image_0,image_1,label_0,label_1\n"
PREFERENCE: dict[str, tuple[Callable[[Place], list[Any]], list[str]]] = {
    "no pairs": (lambda p: [], ["--pairs is needed"]),
    "unknown flag": (lambda p: ["--pair", "x"], ["unknown argument '--pair'", "'--pairs'"]),
    "unknown choice": (lambda p: ["--noise", "ddmi"], ["--noise='ddmi' is none of all, ddim, none.", "'ddim'"]),
    "flag of the other trainer": (lambda p: ["--eta", "1"], ["unknown argument '--eta'"]),
    "noise and time": (lambda p: ["--noise", "none"], ["Add --no-time_conditioned"]),
    "latent and clean": (
        lambda p: ["--parameterisation", "latent", "--no-time_conditioned"],
        ["parameterisation=latent judges noisy latents"],
    ),
    "share": (lambda p: ["--validation_share", "1"], ["validation_share=1.0 must be in [0, 1)"]),
    "timesteps": (lambda p: ["--validation_timesteps", "0", "1000"], ["validation_timesteps=1000 must be in [0, 999]"]),
    "comparison": (lambda p: ["--compare_with", "x"], ["compare_with: write name=path"]),
    "comparison without a path": (lambda p: ["--compare_with", "x="], ["compare_with: write name=path"]),
    "no file": (lambda p: ["--pairs", "no.parquet"], ["no.parquet: no such file or folder"]),
    "empty folder": (lambda p: ["--pairs", p.path], ["found neither. Give a .parquet file"]),
    "torn parquet": (lambda p: ["--pairs", p.file("a.parquet", b"PAR1")], ["cannot be read as parquet"]),
    "no rows": (lambda p: ["--pairs", p.file("a.csv", PAIR_TABLE)], ["no rows in it"]),
    "bad rows": (lambda p: ["--pairs", p.file("a.csv", PAIR_TABLE + "a,b,c,2,3\n")], ["1 of 1 rows are unusable"]),
    "missing columns": (lambda p: ["--pairs", p.file("a.csv", "text,label\na,b\n")], ["no column"]),
    "start is missing": (lambda p: ["--pairs", "x.csv", "--init_path", "nowhere"], ["nowhere does not exist"]),
    "YAML of the other trainer": (lambda p: p.yaml("eta: 1"), ["c.yaml, line 1: unknown setting 'eta'"]),
}


@pytest.mark.parametrize("name", PREFERENCE)
def test_preference_models(place: Place, capsys: pytest.CaptureFixture[str], name: str) -> None:
    make, says = PREFERENCE[name]
    error = refused(train_spm.main, ["--model", "toy", "--output_dir", place.path / "run", *make(place)], capsys)
    for words in says:
        assert words in error


def test_start_of_another_tokenizer(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    from PIL import Image

    for name in "ab":
        Image.new("RGB", (16, 16)).save(place.path / f"{name}.png")
    rows = "".join(f"prompt {i},a.png,b.png,1,0\n" for i in range(8))
    pairs = place.file("pairs.csv", PAIR_TABLE + rows)
    settings = {"model": "toy", "output_dir": place.path / "run", "pairs": pairs, "validation_share": 0.3}
    line = command_line({**settings, "init_path": make_tiny_spm(place.path / "spm")})
    assert "knows 256 tokens" in refused(train_spm.main, line, capsys)


@pytest.mark.parametrize("preset", PREFERENCE_PRESETS)
def test_preference_presets_pass_their_own_checks(preset: str) -> None:
    assert train_spm.parse(["--model", preset]) == PREFERENCE_PRESETS[preset]()


EVALUATE: dict[str, tuple[Callable[[Place], list[Any]], list[str]]] = {
    "nothing": (lambda p: [], ["the following arguments are required: run_dir"]),
    "unknown flag": (lambda p: [p.finished, "--num_image", 2], ["unknown argument '--num_image'", "'--num_images'"]),
    "no run": (lambda p: [p.path], ["is no run's directory: it has no config.yaml"]),
    "no number": (lambda p: [p.finished, "--num_images", "x"], ["--num_images: invalid int value: 'x'"]),
    "no pictures": (lambda p: [p.finished, "--num_images", "0"], ["--num_images=0 must be at least 1"]),
    "not finished": (lambda p: [p.path / "copy"], ["has no checkpoint 2: the run has not finished"]),
}


@pytest.mark.parametrize("name", EVALUATE)
def test_evaluate(place: Place, capsys: pytest.CaptureFixture[str], name: str) -> None:
    if name == "not finished":
        copy = shutil.copytree(place.finished, place.path / "copy")
        config = yaml.safe_load((copy / "config.yaml").read_text())
        (copy / "config.yaml").write_text(yaml.safe_dump({**config, "max_train_steps": 2}))
    make, says = EVALUATE[name]
    error = refused(evaluate.main, make(place), capsys)
    for words in says:
        assert words in error
