"""The command line: which setting wins, what --help says, the same run again. Errors: test_wrong_inputs.py."""

from __future__ import annotations

import dataclasses
import gc
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from runs import PAIRS, ROOT, SMALL, assert_same_end, assert_same_tensors, built, facts, flags, run_toy, start
from safetensors.torch import load_file

from spo_fast import train, train_spm
from spo_fast.config.command import for_pytorch, without_collections
from spo_fast.config.presets import EVALUATION_PRESETS, PREFERENCE_PRESETS, PRESETS
from spo_fast.config.scorers import SCORER_SOURCES
from spo_fast.config.training import Config
from spo_fast.models.files.clip_tokenizer import END, clip_tokenizer
from spo_fast.models.files.sources import DEFAULTS
from spo_fast.scorers.spm import make_tiny_spm


def parse(*arguments: str) -> Config:
    return train.parse(list(arguments))


def written(path: Path, **settings: Any) -> str:
    path.write_text(yaml.safe_dump(settings))
    return str(path)


@pytest.mark.parametrize("name", ["PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF"])
def test_pytorch_is_told_what_the_user_did_not_tell_it(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "linux")
    waits, segments, pages = (
        {"OMP_WAIT_POLICY": "PASSIVE"},
        {"PYTORCH_ALLOC_CONF": "expandable_segments:True"},
        {"THP_MEM_ALLOC_ENABLE": "1"},
    )
    assert for_pytorch({}) == waits | segments | pages
    assert for_pytorch({"OMP_WAIT_POLICY": "ACTIVE"}) == segments | pages
    assert for_pytorch({name: "", "OMP_WAIT_POLICY": "ACTIVE"}) == pages
    assert for_pytorch({name: "", "THP_MEM_ALLOC_ENABLE": "0"}) == waits
    monkeypatch.setattr(sys, "platform", "win32")
    assert for_pytorch({}) == {"OMP_WAIT_POLICY": "PASSIVE"}


@pytest.mark.skipif(sys.platform != "linux", reason="set on Linux")
@pytest.mark.parametrize("module", ["train", "train_spm", "evaluate"])
def test_commands_tell_pytorch_before_it_is_loaded(module: str) -> None:
    """In a process of its own: this one has loaded PyTorch."""
    code = f"""
import os, sys
from spo_fast.config import command
from spo_fast import {module}
command.guarded.__globals__["contextlib"].ExitStack = lambda: sys.exit(
    "torch" in sys.modules or os.environ["PYTORCH_ALLOC_CONF"] != "expandable_segments:True")
{module}.main(["--model", "toy"])
"""
    told = {k: v for k, v in os.environ.items() if not k.endswith("_ALLOC_CONF")}
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=told, check=False).returncode == 0


def test_a_dry_run_leaves_at_once_and_orderly(tmp_path: Path) -> None:
    """Python looks for no cycles meanwhile, nor takes anything apart; what was registered is called, and all is
    printed, also where the output is a file, which Python writes in blocks."""
    code = """
import atexit, gc, sys
class Kept:
    def __del__(self, name="taken apart"):
        print(name)
kept = Kept()
atexit.register(print, "registered")
atexit.register(lambda: print("collections", len(collected), gc.isenabled()))
collected = []
gc.callbacks.append(lambda phase, info: collected.append(phase))
gc.collect()
import runpy
runpy.run_module(sys.argv.pop(1), run_name="__main__", alter_sys=True)
"""
    lines = {}
    for module, *before in (("spo_fast.train",), ("spo_fast", "train")):
        out = tmp_path / module
        with out.open("w") as file:
            words = [sys.executable, "-c", code, module, *before, *flags(tmp_path / "run"), "--dry_run"]
            buffered = {**os.environ, "PYTHONUNBUFFERED": ""}
            done = subprocess.run(words, cwd=ROOT, stdout=file, env=buffered, check=False)
        assert done.returncode == 0
        lines[module] = out.read_text().splitlines()
        name, count, enabled = lines[module][-2].split()
        assert lines[module][-1] == "registered" and (name, enabled) == ("collections", "True")
        assert int(count) < 500  # before the command begins; thousands otherwise
        assert "== time" in lines[module] and "taken apart" not in lines[module]
    assert lines["spo_fast"][:-2] == lines["spo_fast.train"][:-2]


def test_leaving_keeps_the_status_and_says_what_was_not_written() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "spo_fast.train", "--dry_run", "--model", "no such"], cwd=ROOT, check=False
    )
    assert done.returncode == 2
    without = "import sys; from spo_fast.config.command import leave; sys.stdout = sys.stderr = None; leave(4)"
    assert subprocess.run([sys.executable, "-c", without], cwd=ROOT, check=False).returncode == 4
    code = "import os, sys; from spo_fast.config.command import leave; sys.stdout.write('x'); leave(3)"
    with open("/dev/full", "w") as full:
        out: dict[str, Any] = {"stdout": full, "stderr": subprocess.PIPE, "env": {**os.environ, "PYTHONUNBUFFERED": ""}}
        done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False, text=True, **out)
    assert done.returncode == 120 and "No space left" in done.stderr


def test_a_profiler_sees_the_end(tmp_path: Path) -> None:
    file = tmp_path / "program.py"
    file.write_text("from spo_fast.config.command import leave\nleave(0)\n")
    words = [sys.executable, "-m", "cProfile", str(file)]
    paths = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(words, cwd=tmp_path, env=paths, check=True, capture_output=True, text=True)
    assert "function calls" in done.stdout


def test_cycles_are_looked_for_again() -> None:
    with pytest.raises(RuntimeError), without_collections():
        assert not gc.isenabled()
        with without_collections():
            pass
        assert not gc.isenabled()
        raise RuntimeError
    assert gc.isenabled()


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


def test_published_settings_of_flows() -> None:
    """Flow-GRPO's recipes at 512 px; as many steps in use as the models' pages give."""
    for model, told in (("sd35", (10, 40, 4.5, 32, 64)), ("flux", (6, 28, 1.0, 64, 128))):
        cfg, use, pairs = PRESETS[model](), EVALUATION_PRESETS[model](), PREFERENCE_PRESETS[model]()
        s, a = cfg.sample, cfg.adapter
        assert (s.num_steps, use.pictures.num_steps, s.guidance_scale, a.rank, a.alpha) == told
        assert use.pictures.guidance_scale == pairs.reward.train_guidance_scale == s.guidance_scale
        assert use.model == cfg.model and (cfg.model.height, cfg.model.width) == (pairs.model.height, 512) == (512, 512)
        assert cfg.optim.learning_rate == 3e-4


def test_a_sampler_brings_its_published_eta() -> None:
    line = ("--model", "flux", "--sampler")
    for sampler, eta in (("ddim", 1.0), ("flow_sde", 0.7), ("cps", 0.8), ("dance", 0.3)):
        assert parse(*line, sampler).sample.eta == eta
    assert parse(*line, "cps", "--eta", "0.5").sample.eta == 0.5
    assert parse("--model", "flux", "--method", "grpo").sample.eta == 0.9  # FLUX's own
    assert parse("--model", "toy-flow", "--method", "grpo").sample.eta == 0.7  # flow_sde is the method's


# ---------------------------------------------------------------------------------------------------------- help


def help_of(main: Callable[[list[str]], int], capsys: pytest.CaptureFixture[str]) -> dict[str, str]:
    """Flag -> what --help says of it, at 80 columns; the epilog under ""."""
    with pytest.raises(SystemExit) as end:
        main(["--help"])
    assert end.value.code == 0
    shown = capsys.readouterr().out
    assert max(map(len, shown.splitlines())) <= 80 and "==SUPPRESS==" not in shown
    body, _, epilog = shown.partition("\nexamples:\n")
    entries = re.split(r"^  (?=-)", body, flags=re.MULTILINE)[1:]
    return {
        "": epilog,
        **{re.search(r"--([a-z]\w*)", e)[1]: " ".join(e.replace("-\n        ", "-").split()) for e in entries},  # type: ignore[index]
    }


def as_typed(value: Any) -> str:
    """A setting as one would type it, written here again."""
    if isinstance(value, (list, tuple)):
        return " ".join(str(v) for v in value) if value else "none"
    return "none" if value is None else {"True": "on", "False": "off"}.get(str(value), str(value))


@pytest.mark.parametrize(
    ("main", "presets"), [(train.main, PRESETS), (train_spm.main, PREFERENCE_PRESETS)], ids=["train", "train_spm"]
)
def test_help_shows_every_flags_defaults(
    main: Any, presets: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    shown = help_of(main, capsys)
    made = {name: preset() for name, preset in presets.items()}
    names = [f.name for cls in type(made["toy"]).sections().values() for f in dataclasses.fields(cls)]
    actions = {"help", "debug", *(["dry_run", "validation_prompts"] if main is train.main else [])}
    assert set(shown) == {"", *actions, "config", "resolution", "use_8bit_adam", *names}
    for name in set(names) - {"model"}:
        values = {preset: as_typed(cfg.flat()[name]) for preset, cfg in made.items()}
        if len(set(values.values())) > 1:
            expected = "default: " + ", ".join(f"{preset} {value}" for preset, value in values.items()) + ")"
        elif "none" not in values.values() or "Default: " not in shown[name]:
            expected = f"default: {values['toy']})"
        else:
            expected = "Default: "  # in words
        assert expected in shown[name], (name, expected, shown[name])
    assert shown[""].count("python -m spo_fast.") == (4 if main is train.main else 3)


def test_help_shows_ranges(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    shown = help_of(train.main, capsys)
    for name, said in {
        "eta": "(in [0.001, 2]; default: 1.0)",
        "num_candidates": "(at least 2;",
        "learning_rate": "(above 0; default: toy",
        "clip": "(in (0, 1); default: 0.1)",
        "threshold": "(in [-1, 1); default: toy 0.05, toy-flow 0.05, sd15 0.3, sdxl 0.4, sd35 0.3, flux 0.3)",
    }.items():
        assert said in shown[name]


@pytest.mark.parametrize("module", ["spo_fast.train", "spo_fast.train_spm"])
def test_help_does_not_import_torch(module: str) -> None:
    code = (
        f"import sys; from {module} import main\n"
        "try: main(['--help'])\n"
        "except SystemExit: sys.exit(sorted({'torch', 'diffusers', 'transformers', 'numpy'} & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 1 and done.stderr.strip() == "[]", done.stderr


def test_every_field_is_documented() -> None:
    names = [f.name for cls in Config.sections().values() for f in dataclasses.fields(cls)]
    assert len(set(names)) == len(names)
    assert set(Config.docs()) == set(names) == set(Config.kinds())
    assert all(len(text) > 10 for text in Config.docs().values())


# -------------------------------------------------------------------------------------------------- the same run again


def test_yaml_and_flags_are_the_same_run(tmp_path: Path) -> None:
    settings = {**SMALL, "num_train_epochs": 1, "learning_rate": 2e-3, "rank": 3, "lora_targets": ["to_q", "to_v"]}
    by_flags = run_toy(tmp_path / "flags", **settings)
    file = written(tmp_path / "c.yaml", **settings, output_dir=str(tmp_path / "yaml"))
    assert train.main(["--config", file]) == 0
    assert_same_end(by_flags, tmp_path / "yaml")
    assert_same_tensors(*(d / "pytorch_lora_weights.safetensors" for d in (by_flags, tmp_path / "yaml")))
    other = run_toy(tmp_path / "other", **{**settings, "learning_rate": 3e-3})
    assert facts(other) != facts(by_flags)  # the comparison can fail


def test_saved_config_repeats_the_run(tmp_path: Path) -> None:
    """config.yaml holds every setting: the preset under it may change, the run does not."""
    first = run_toy(tmp_path / "first", num_train_epochs=1, recipe="published", train_batch_size=1, clip="none")
    saved = yaml.safe_load((first / "config.yaml").read_text())
    assert saved.keys() == Config().flat().keys()
    assert train.main(["--config", str(first / "config.yaml"), "--output_dir", str(tmp_path / "again")]) == 0
    assert_same_end(first, tmp_path / "again")
    again = yaml.safe_load((tmp_path / "again" / "config.yaml").read_text())
    assert again == {**saved, "output_dir": str(tmp_path / "again")}


# ------------------------------------------------------------------------------------------------------------- fast


@pytest.mark.parametrize(
    ("model", "vae"), [("sd15", "madebyollin/taesd"), ("sdxl", "madebyollin/taesdxl"), ("toy", None)]
)
def test_fast_recipe(model: str, vae: str | None, tmp_path: Path) -> None:
    cfg = parse("--model", model, "--recipe", "fast")
    assert cfg.run.recipe == "fast"
    assert (cfg.scorer.scorer_dtype, cfg.optim.optimizer) == ("bf16", "adamw8bit")
    assert cfg.model.pretrained_vae_model_name_or_path == vae
    # what is given beside it wins, and a VAE given anywhere stays
    cfg = parse("--model", model, "--recipe", "fast", "--optimizer", "adamw", "--scorer_dtype", "no")
    assert (cfg.scorer.scorer_dtype, cfg.optim.optimizer) == ("no", "adamw")
    file = written(tmp_path / "c.yaml", model=model, pretrained_vae_model_name_or_path="my/vae", scorer_dtype="no")
    cfg = parse("--config", file, "--recipe", "fast")
    assert cfg.model.pretrained_vae_model_name_or_path == "my/vae"
    assert cfg.scorer.scorer_dtype == "bf16"  # a flag over the file
    file = written(tmp_path / "d.yaml", model=model, recipe="fast")
    assert parse("--config", file, "--optimizer", "adamw").optim.optimizer == "adamw"
    assert parse("--config", file, "--recipe", "default").optim.optimizer == "adamw"


def test_fast_recipe_asks_for_the_tiny_vae(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from spo_fast.config.errors import MissingFilesError
    from spo_fast.models.files.find import resolve_all
    from spo_fast.models.files.sources import MODELS

    cfg = parse("--model", "sd15", "--recipe", "fast")
    source = dataclasses.replace(MODELS["sd15"](cfg.model), cache_dir=str(tmp_path))
    with pytest.raises(MissingFilesError) as error:
        resolve_all(source, download=False)
    assert ("madebyollin/taesd", "--pretrained_vae_model_name_or_path") in {
        (m.source, m.flag) for m in error.value.missing
    }


def test_fast_recipe_runs(tmp_path: Path) -> None:
    """A VAE of TAESD's class in its own repository's layout, and the toy with its own."""
    from diffusers import AutoencoderTiny
    from tiny import make_tiny_sd15

    run = run_toy(tmp_path / "toy", recipe="fast", max_train_steps=2)
    assert len(facts(run)) == 2
    channels = (8, 8, 8, 8)
    tiny = AutoencoderTiny(
        encoder_block_out_channels=channels,
        decoder_block_out_channels=channels,
        num_encoder_blocks=(1, 1, 1, 1),
        num_decoder_blocks=(1, 1, 1, 1),
    )
    tiny.save_pretrained(tmp_path / "taesd")
    make_tiny_spm(tmp_path / "spm", vocab_size=len(clip_tokenizer(END, 16, merges=())))
    parts = {
        "pretrained_model_name_or_path": make_tiny_sd15(tmp_path / "m"),
        "pretrained_vae_model_name_or_path": tmp_path / "taesd",
        "spm_path": tmp_path / "spm",
    }
    run = run_toy(tmp_path / "run", model="sd15", recipe="fast", resolution=64, max_train_steps=2, **parts)
    assert len(facts(run)) == 2


# ------------------------------------------------------------------------------------------------------ from a LoRA


def test_exported_lora_is_read_back_as_it_was(tmp_path: Path) -> None:
    """The weights a run ends with are those that another starts from, and they are its reference."""
    first = run_toy(tmp_path / "first", max_train_steps=1, lora_alpha=2.0)
    run = built(tmp_path / "second", lora_path=first, lora_alpha=2.0)
    end = load_file(first / "checkpoint-1" / "trained.safetensors")
    start = run.policy.state_dict()
    assert start.keys() == end.keys() and all(torch.equal(start[name], end[name]) for name in end)
    fresh = built(tmp_path / "third", lora_alpha=2.0)
    assert not all(torch.equal(fresh.policy.state_dict()[name], end[name]) for name in end)

    x = torch.randn(2, *run.model.latent_shape, generator=torch.Generator().manual_seed(0))
    cond, t = run.model.cond(["a", "b"]), torch.tensor(500)
    with torch.no_grad():
        now = run.policy.predict(x, t, cond, guided=False).cond
        base = fresh.policy.predict(x, t, cond, guided=False).cond
        assert not torch.equal(now, base)
        run.policy.load_state_dict({name: v + 1 for name, v in end.items()})
        with run.policy.reference():
            assert torch.equal(run.policy.predict(x, t, cond, guided=False).cond, now)
        assert not torch.equal(run.policy.predict(x, t, cond, guided=False).cond, now)
    assert all(torch.equal(v, end[name] + 1) for name, v in run.policy.state_dict().items())


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_run_from_a_lora_starts_at_ratio_one(tmp_path: Path, precision: str) -> None:
    first = run_toy(tmp_path / "first", max_train_steps=1)
    settings = {"train_batch_size": PAIRS, "mixed_precision": precision}
    run = run_toy(tmp_path / "run", lora_path=first, max_train_steps=2, **settings)
    before, after = facts(run)
    assert before["log_ratio_best"] == 0 and before["log_ratio_worst"] == 0
    assert after["log_ratio_best"] != 0


def test_run_from_a_lora_resumes(tmp_path: Path) -> None:
    start = {"lora_path": run_toy(tmp_path / "first", max_train_steps=1), "max_train_steps": 2}
    whole = run_toy(tmp_path / "whole", **start, checkpointing_steps=1)
    shutil.copytree(whole, tmp_path / "cut")
    shutil.rmtree(tmp_path / "cut" / "checkpoint-2")
    assert_same_end(whole, run_toy(tmp_path / "cut", **start, resume_from_checkpoint="latest"))


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
        check=False,
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
        *("chosen", "--rows_per_forward", "spo", "4", "encoded", "1/2", "2/2", "score", "sample", "what", "trained"),
    ], output
    here = run_toy(tmp_path / "here", **settings)
    name = "pytorch_lora_weights.safetensors"
    assert_same_tensors(out / name, here / name)
