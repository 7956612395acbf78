"""The command line: which setting wins, what errors say, and what a fresh process prints."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from runs import ROOT, assert_same_tensors, flags, run_toy, start

from spo_fast import train
from spo_fast.config import Config
from spo_fast.models.sources import DEFAULTS, SCORER_SOURCES
from spo_fast.presets import PRESETS


def parse(*arguments: str) -> Config:
    return train.parse(list(arguments))


def written(path: Path, **settings: Any) -> str:
    path.write_text(yaml.safe_dump(settings))
    return str(path)


# ------------------------------------------------------------------------------------------------ which setting wins


@pytest.mark.parametrize("model", PRESETS)
def test_model_alone_is_the_preset(model: str) -> None:
    assert parse("--model", model) == PRESETS[model]()


def test_flags_over_yaml_over_preset(tmp_path: Path) -> None:
    file = written(tmp_path / "c.yaml", model="sd15", rank=16, beta=3.0)
    cfg = parse("--config", file, "--rank", "32")
    assert cfg.adapter.rank == 32  # flag
    assert cfg.objective.beta == 3.0  # file
    assert cfg.sample.num_candidates == 4 and cfg.model.model == "sd15"  # preset
    assert parse("--config", file, "--model", "sdxl").sample.num_candidates == 2


@pytest.mark.parametrize("model", PRESETS)
def test_every_setting_survives_yaml(tmp_path: Path, model: str) -> None:
    cfg = PRESETS[model]().with_fields(
        scorer=("spm:1", "pickscore:0.5"), validation_prompt=("a: cat", "no"), learning_rate=1e-7, max_grad_norm=0.5
    )
    assert parse("--config", written(tmp_path / "c.yaml", **cfg.flat())) == cfg


def test_values_of_every_kind() -> None:
    cfg = parse(
        *("--model", "toy", "--clip", "none", "--max_grad_norm", "NONE", "--learning_rate", "1e-5"),
        *("--no-shuffle", "--full_finetune", "--lora_targets", "to_q", "to_v", "--validation_prompt", "a cat", "a dog"),
    )
    assert cfg.objective.clip is None and cfg.optim.max_grad_norm is None
    assert cfg.optim.learning_rate == 1e-5
    assert cfg.data.shuffle is False and cfg.adapter.full_finetune is True
    assert cfg.adapter.lora_targets == ("to_q", "to_v") and cfg.run.validation_prompt == ("a cat", "a dog")


def test_yaml_reads_no_and_exponents_as_meant(tmp_path: Path) -> None:
    """YAML 1.1 reads a bare no as false, and 1e-5 (without a dot) as a string."""
    file = tmp_path / "c.yaml"
    file.write_text("model: sdxl\nmixed_precision: no\nlearning_rate: 1e-5\nclip: none\nmax_prompts:\n")
    cfg = parse("--config", str(file))
    assert cfg.model.mixed_precision == "no" and cfg.optim.learning_rate == 1e-5
    assert cfg.objective.clip is None and cfg.data.max_prompts is None


def test_shorthands(tmp_path: Path) -> None:
    assert parse("--model", "sd15", "--use_8bit_adam").optim.optimizer == "adamw8bit"
    square = parse("--model", "sd15", "--resolution", "256").model
    assert (square.height, square.width) == (256, 256)
    assert parse("--model", "sd15", "--resolution", "256", "--width", "512").model.width == 512
    file = written(tmp_path / "c.yaml", model="sd15", resolution=256, use_8bit_adam=True)
    cfg = parse("--config", file, "--optimizer", "adamw")
    assert cfg.optim.optimizer == "adamw" and cfg.model.height == 256
    assert parse("--config", file, "--resolution", "512").model.width == 512


def test_abbreviated_flags_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        parse("--model", "toy", "--learning", "1e-5")
    assert end.value.code == 2 and "--learning" in capsys.readouterr().err


@pytest.mark.parametrize(("model", "last_step"), [("sd15", "compare"), ("sdxl", "extend"), ("toy", "extend")])
def test_published_recipe(model: str, last_step: str) -> None:
    cfg = parse("--model", model, "--recipe", "published")
    assert cfg.sample.last_step == last_step
    assert cfg.optim.accumulation == "published" and cfg.optim.max_grad_norm is None
    # settings given beside it win
    assert parse("--model", model, "--recipe", "published", "--last_step", "compare").sample.last_step == "compare"


def test_published_settings() -> None:
    """configs/ of the published code: SD1.5 and SDXL."""
    sd15, sdxl = PRESETS["sd15"](), PRESETS["sdxl"]()
    for cfg in (sd15, sdxl):
        s, o = cfg.sample, cfg.optim
        assert (s.num_steps, s.eta, s.guidance_scale, s.branch_start, s.next_start) == (20, 1.0, 5.0, 4, "random")
        assert (o.adam_beta1, o.adam_beta2, o.adam_weight_decay, o.adam_epsilon) == (0.9, 0.999, 1e-4, 1e-8)
        assert (o.max_grad_norm, o.lr_scheduler) == (None, "constant")
        assert (cfg.objective.beta, cfg.objective.clip, cfg.run.num_train_epochs) == (10.0, 0.1, 10)
        assert cfg.adapter.alpha == cfg.adapter.rank
    assert (sd15.sample.num_candidates, sd15.sample.num_inner_steps, sd15.sample.threshold) == (4, 0, 0.3)
    assert (sd15.optim.learning_rate, sd15.adapter.rank, sd15.sample.sample_batch_size) == (6e-5, 4, 10)
    assert (sd15.optim.train_batch_size, sd15.optim.gradient_accumulation_steps) == (10, 1)
    assert (sdxl.sample.num_candidates, sdxl.sample.num_inner_steps, sdxl.sample.threshold) == (2, 3, 0.4)
    assert (sdxl.optim.learning_rate, sdxl.adapter.rank, sdxl.sample.sample_batch_size) == (1e-5, 64, 2)
    assert (sdxl.optim.train_batch_size, sdxl.optim.gradient_accumulation_steps) == (2, 2)


def test_every_field_is_documented_and_has_a_flag(capsys: pytest.CaptureFixture[str]) -> None:
    names = [f.name for cls in Config.sections().values() for f in dataclasses.fields(cls)]
    assert len(set(names)) == len(names)
    assert set(Config.docs()) == set(names)
    assert all(len(text) > 10 for text in Config.docs().values())
    with pytest.raises(SystemExit) as end:
        parse("--help")
    assert end.value.code == 0
    shown = capsys.readouterr().out
    assert all(f"--{name} " in shown or f"--{name}," in shown or f"--{name}\n" in shown for name in names)
    assert "==SUPPRESS==" not in shown and "(default" not in shown


# -------------------------------------------------------------------------------------------------------- errors


def fails(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one line on stderr a bad command line ends with."""
    try:
        code = train.main(list(arguments))
    except SystemExit as end:  # argparse
        code = end.code if isinstance(end.code, int) else 1
    captured = capsys.readouterr()
    assert code in (1, 2)
    assert "Traceback" not in captured.err
    *usage, message = captured.err.strip().split("\n")
    assert not usage or usage[0].startswith("usage:")
    return message


@pytest.mark.parametrize(
    ("setting", "says"),
    [
        ("--eta 0", "eta=0.0 must lie in (0, 1]"),
        ("--branch_start 20", "branch_start=20 leaves no steps to branch (num_steps=20)"),
        ("--num_steps 4", "leaves no steps to branch (num_steps=4)"),
        ("--num_steps 1001 --branch_start 2", "num_steps=1001"),
        ("--threshold 1", "threshold=1.0"),
        ("--num_candidates 1", "num_candidates=1"),
        ("--clip 1", "clip=1.0"),
        ("--rank 0", "rank=0"),
        ("--learning_rate 0", "learning_rate=0.0"),
        ("--learning_rate abc", "abc"),
        ("--optimizer adam", "adamw8bit"),
        ("--scorer spn", "unknown scorer 'spn'. Known: spm, pickscore"),
        ("--scorer spm:high", "must be a number"),
        ("--seed -1", "seed=-1"),
        ("--prompts nowhere.txt", "nowhere.txt does not exist"),
        ("--device tpu", "tpu"),
        ("--config nowhere.yaml", "nowhere.yaml"),
        ("--resume_from_checkpoint nowhere", "nowhere is no checkpoint"),
        ("--lora_targets nothing", "'nothing'"),
    ],
)
def test_bad_settings_end_with_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], setting: str, says: str
) -> None:
    assert says in fails(capsys, "--model", "toy", "--output_dir", str(tmp_path / "run"), *setting.split())


def test_odd_size_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "height=0" in fails(capsys, "--model", "toy", "--output_dir", str(tmp_path / "run"), "--height", "0")


def test_no_model_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert "toy, sd15, sdxl" in fails(capsys)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("learning_rte: 1e-5", "Did you mean 'learning_rate'?"),
        ("completely_unheard_of: 1", "unknown setting 'completely_unheard_of'"),
        ("rank: many", "rank: 'many' is no int"),
        ("shuffle: 3", "shuffle: 3 must be true or false"),
        ("optimizer: sgd", "'sgd' is none of adamw"),
        ("rank:", "rank has no value"),
        ("- a\n- b", "found a list"),
        ("eta: 0", "eta=0.0 must lie in"),
        ("a: [", "c.yaml"),
    ],
)
def test_bad_yaml_ends_with_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, says: str) -> None:
    file = tmp_path / "c.yaml"
    file.write_text(text)
    assert says in fails(capsys, "--model", "toy", "--config", str(file))


# -------------------------------------------------------------------------------------------------- fresh processes


def test_missing_weights_are_all_named_before_torch_is_imported(tmp_path: Path) -> None:
    (tmp_path / "home").mkdir()
    code = (
        "import sys; from spo_fast.train import main; code = main(sys.argv[1:]);"
        "print(sorted({'torch', 'diffusers', 'transformers'} & sys.modules.keys())); sys.exit(code)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "--model", "sdxl", "--output_dir", str(tmp_path / "run")],
        cwd=ROOT,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "home")},
        capture_output=True,
        text=True,
        timeout=10,
    )
    assert done.returncode == 1
    assert done.stdout.strip() == "[]"
    assert "Traceback" not in done.stderr and done.stderr.count("error:") == 1
    source, spm = DEFAULTS["sdxl"], SCORER_SOURCES["spm"]
    assert source.pretrained_vae_model_name_or_path is not None and spm.files is not None
    for name, flag in (
        (source.pretrained_model_name_or_path, "--pretrained_model_name_or_path"),
        (source.pretrained_vae_model_name_or_path, "--pretrained_vae_model_name_or_path"),
        (spm.repository, "--spm_path"),
        (spm.files["sdxl"], "--spm_path"),
    ):
        assert any(name in line and flag in line for line in done.stderr.splitlines()), (name, done.stderr)
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_module_in_a_fresh_process(tmp_path: Path) -> None:
    """The command a user types: what it prints, all of it, and the same numbers as in this process."""
    out = tmp_path / "run"
    settings = {"max_train_steps": 2, "num_validation_images": 1}
    process = start(flags(out, **settings))
    output, errors = process.communicate()
    assert process.returncode == 0
    assert errors == ""
    lines = output.splitlines()
    assert [line.split()[0] for line in lines] == [
        *("spo", "4", "encoded", "1/2", "2/2", "score", "sample", "trained"),
    ], output
    here = run_toy(tmp_path / "here", **settings)
    name = "pytorch_lora_weights.safetensors"
    assert_same_tensors(out / name, here / name)
