"""evaluate.py on the toy: same noise for every contender, resumed runs, messages; numbers against formulas."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from runs import Killed, command_line, kill_once, run_toy, start
from safetensors.torch import load_file, save_file

from spo_fast import evaluate
from spo_fast.data import prompt_sets, toy_world
from spo_fast.data.prompt_sets import PROMPT_SETS
from spo_fast.evaluation import contenders, draw, results, score
from spo_fast.evaluation import pictures as evaluation_pictures
from spo_fast.evaluation.image_statistics import hacking_signs, image_statistics
from spo_fast.evaluation.published import PUBLISHED
from spo_fast.evaluation.statistics import bootstrap, win_rate
from spo_fast.models.files.toy import WEIGHTS

TINY: dict[str, Any] = {
    "model": "toy",
    "max_prompts": 3,
    "images_per_prompt": 2,
    "num_steps": 3,
    "images_at_once": 4,
    "metrics": ["layout,aesthetics", "pickscore"],
}


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run_toy(tmp_path_factory.mktemp("run") / "mine", resolution=16, learning_rate=5e-3)


def words(out: Path, **settings: Any) -> list[str]:
    return command_line({**TINY, "output_dir": out, **settings})


def done(out: Path, **settings: Any) -> dict[str, Any]:
    assert evaluate.main(words(out, **settings)) == 0
    return json.loads((out / "results.json").read_text())


def pictures(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.glob("*.png")}


@pytest.fixture(scope="module")
def whole(run_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    out = tmp_path_factory.mktemp("whole")
    return out, done(out, lora=[run_dir])


def test_a_contender_is_called_by_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Never by a name that leads out of the output directory."""
    monkeypatch.chdir(tmp_path)
    for spec, name in (("..", tmp_path.parent.name), ("runs/x/..", "runs"), (".", tmp_path.name), ("org/lora", "lora")):
        assert contenders.named(spec)[0] == name
    assert contenders.named("mine=~/x") == ("mine", "~/x") and contenders.named("..=x")[0] == ".._x"


def test_a_run_below_home_brings_its_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A shell leaves ~ alone behind an equals sign, and YAML does everywhere."""
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "config.yaml").write_text("method: spo\nguidance_scale: 7.5\n")
    assert contenders.settings_of_run(["mine=~/mine"]) == {"guidance_scale": 7.5}


# ------------------------------------------------------------------------------------------------------- end to end


def test_numbers_are_those_of_the_pictures(whole: tuple[Path, dict[str, Any]]) -> None:
    out, result = whole
    assert {c: row["kind"] for c, row in result["contenders"].items()} == {"base": "base", "mine": "lora"}
    for name, scores in result["scores"].items():
        pixels = [evaluation_pictures.read_picture(out / name / f"{p:05d}-{i}.png") for p in range(3) for i in range(2)]
        texts = [toy_world.TEST[p] for p in range(3) for _ in range(2)]
        truth = toy_world.aesthetics(torch.stack(pixels))
        assert abs(scores["aesthetics"]["mean"] - truth.mean().item()) < 1e-5
        right = toy_world.layout(torch.stack(pixels), texts).all(1).double()
        assert abs(scores["layout"]["mean"] - right.mean().item()) < 1e-9
        assert scores["aesthetics"]["low"] <= scores["aesthetics"]["mean"] <= scores["aesthetics"]["high"]
    gain = result["scores"]["mine"]["pickscore"]["gain"]["mean"]
    means = {name: scores["pickscore"]["mean"] for name, scores in result["scores"].items()}
    assert abs(gain - (means["mine"] - means["base"])) < 1e-9 and gain != 0
    assert result["versions"].keys() > {"python", "torch", "diffusers", "transformers"}
    assert {"seed": 42, "num_steps": 3, "sampler": "DDIM, eta 0"}.items() <= result["settings"].items()
    assert "time" not in json.dumps(result)
    assert "| mine - base, paired" in (out / "results.md").read_text()


def test_pictures_differ_by_image_and_contender_only(whole: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    out, result = whole
    base, mine = pictures(out / "base"), pictures(out / "mine")
    assert base.keys() == mine.keys() and len(set(base.values()) | set(mine.values())) == 12
    again = done(tmp_path)  # alone, in another directory
    assert pictures(tmp_path / "base") == base
    assert again["scores"]["base"] == result["scores"]["base"]
    assert done(tmp_path / "seed", seed=1)["scores"]["base"] != result["scores"]["base"]


def test_a_second_run_draws_and_scores_nothing(
    whole: tuple[Path, dict[str, Any]], run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, _ = whole
    before = (out / "results.json").read_bytes()
    monkeypatch.setattr(draw, "draw", None)
    monkeypatch.setattr(score, "metric_of", None)
    done(out, lora=[run_dir])
    assert (out / "results.json").read_bytes() == before


def test_killed_and_run_again_ends_with_the_same_numbers(
    whole: tuple[Path, dict[str, Any]], run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, result = whole
    write = evaluation_pictures.write_picture
    left = iter(range(9))  # 6 of the base, and 3 of the first batch of 4 of the LoRA's

    def dies(file: Path, pixels: torch.Tensor) -> None:
        if next(left, None) is None:
            raise Killed
        write(file, pixels)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(draw, "write_picture", dies)
        evaluate.main(words(tmp_path, lora=[run_dir]))
    kept = {file: file.stat().st_mtime_ns for file in tmp_path.glob("*/*.png")}
    assert len(kept) == 9 and not (tmp_path / "results.json").exists()

    measured = score.metric_of
    with monkeypatch.context() as patch, pytest.raises(Killed):  # and once more while it scores

        def dies_too(name: str, *rest: Any) -> Any:
            if name == "pickscore":
                raise Killed
            return measured(name, *rest)

        patch.setattr(score, "metric_of", dies_too)
        evaluate.main(words(tmp_path, lora=[run_dir]))
    again = done(tmp_path, lora=[run_dir])
    assert {file: file.stat().st_mtime_ns for file in kept} == kept
    assert pictures(tmp_path / "mine") == pictures(out / "mine")
    for one in (again, result):
        one["settings"].pop("output_dir", None)
    assert again == result


# of 12: the base's are being drawn, or the LoRA's
@pytest.mark.parametrize("pictures_made", [pytest.param(1, marks=pytest.mark.slow), 7])
def test_sigkill_in_another_process(
    whole: tuple[Path, dict[str, Any]], run_dir: Path, tmp_path: Path, pictures_made: int
) -> None:
    process = start(words(tmp_path, lora=[run_dir]), "spo_fast.evaluate")
    kill_once(process, lambda: len(list(tmp_path.glob("*/*.png"))) >= pictures_made)
    assert not (tmp_path / "results.json").exists()
    again, result = done(tmp_path, lora=[run_dir]), dict(whole[1])
    assert again["settings"].pop("output_dir") != (result["settings"] | {"output_dir": str(whole[0])})["output_dir"]
    result["settings"] = {k: v for k, v in result["settings"].items() if k != "output_dir"}
    assert again == result
    for name in ("base", "mine"):
        assert pictures(tmp_path / name) == pictures(whole[0] / name)


# ------------------------------------------------------------------------------------------------ fused and compiled


def levels(folder: Path) -> np.ndarray:
    """All pictures of a contender, 0..255."""
    return np.stack([np.asarray(Image.open(file)).astype(int) for file in sorted(folder.glob("*.png"))])


def test_fused_pictures_are_the_plain_ones(whole: tuple[Path, dict[str, Any]], run_dir: Path, tmp_path: Path) -> None:
    """float32: a level of 255 at most, here and there. Two LoRAs, so that the second starts from clean weights."""
    out, result = whole
    plain = done(tmp_path / "plain", lora=[run_dir], compile="off", fuse=False)
    assert pictures(tmp_path / "plain" / "mine") == pictures(out / "mine")  # what a CPU does by itself
    assert plain["scores"] == result["scores"]
    fused = done(tmp_path / "fused", lora=[run_dir, f"again={run_dir}"], fuse=True)
    assert fused["settings"]["fuse"] is True and fused["settings"]["compile"] == "off"
    for name in ("base", "mine", "again"):
        difference = levels(tmp_path / "fused" / name) - levels(out / ("base" if name == "base" else "mine"))
        assert abs(difference).max() <= 1 and (difference != 0).mean() < 0.02
    assert pictures(tmp_path / "fused" / "again") == pictures(tmp_path / "fused" / "mine")
    for name, row in fused["scores"].items():
        expected = result["scores"]["base" if name == "base" else "mine"]
        assert row["pickscore"]["mean"] == pytest.approx(expected["pickscore"]["mean"], abs=2e-2)


def test_compiled_networks_see_one_batch_size(
    whole: tuple[Path, dict[str, Any]], run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """6 pictures, 4 at once: the second batch is filled up, and what is kept are the same pictures."""
    from spo_fast.models import compile as models_compile
    from spo_fast.models import policy

    compiled_parts, sizes, whole_call = [], set(), policy.denoise
    monkeypatch.setattr(
        models_compile, "compile_network", lambda network, how: compiled_parts.append((type(network), how))
    )
    monkeypatch.setattr("spo_fast.training.accelerate.compile_network", models_compile.compile_network)
    monkeypatch.setattr("spo_fast.models.accelerate.compile_network", models_compile.compile_network)
    monkeypatch.setattr("spo_fast.evaluation.draw.compile_network", models_compile.compile_network)
    monkeypatch.setattr("spo_fast.evaluation.sampling.denoise", lambda *a: sizes.add(len(a[1])) or whole_call(*a))
    done(tmp_path, lora=[run_dir], compile="regional")
    assert sizes == {4} and [how for _, how in compiled_parts] == ["regional"] * 3  # decoder, base, LoRA
    for name in ("base", "mine"):
        assert abs(levels(tmp_path / name) - levels(whole[0] / name)).max() <= 1


@pytest.mark.slow
def test_really_compiled_pictures(whole: tuple[Path, dict[str, Any]], run_dir: Path, tmp_path: Path) -> None:
    done(tmp_path, lora=[run_dir], compile="regional")
    for name in ("base", "mine"):
        assert abs(levels(tmp_path / name) - levels(whole[0] / name)).max() <= 1


def test_other_ways_of_computing_do_not_mix(
    whole: tuple[Path, dict[str, Any]], run_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "fuse: False there, True now" in told(capsys, words(whole[0], lora=[run_dir], fuse=True))
    error = told(capsys, words(whole[0], lora=[run_dir], fuse=False, compile="regional"))
    assert "leave out --no-fuse" in error
    assert "cannot run here" in told(capsys, words(whole[0] / "x", fuse=True, attention="flash3"))


# ------------------------------------------------------------------------------------------------------- contenders


def test_a_lora_in_any_form_and_a_whole_unet(whole: tuple[Path, dict[str, Any]], run_dir: Path, tmp_path: Path) -> None:
    out, _ = whole
    shutil.copytree(WEIGHTS / "unet", tmp_path / "tuned" / "unet")
    forms = [
        f"file={run_dir}/pytorch_lora_weights.safetensors",
        f"kohya={run_dir}/lora_kohya.safetensors",
        str(tmp_path / "tuned"),
    ]
    result = done(tmp_path / "out", lora=forms, num_steps=3, guidance_scale=2)
    assert result["contenders"]["tuned"]["kind"] == "unet"
    assert pictures(tmp_path / "out" / "file") == pictures(out / "mine")
    assert pictures(tmp_path / "out" / "kohya") == pictures(out / "mine")
    assert pictures(tmp_path / "out" / "base") == pictures(tmp_path / "out" / "tuned") == pictures(out / "base")


def test_a_hub_id_is_a_lora_or_a_unet(
    whole: tuple[Path, dict[str, Any]], run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("spo_fast.models.files.find.offline_reason", lambda: "HF_HUB_OFFLINE is set")
    for name in ("lora", "unet"):
        snapshot = tmp_path / f"models--me--{name}" / "snapshots" / "abc"
        if name == "lora":
            snapshot.mkdir(parents=True)
            shutil.copy(run_dir / "pytorch_lora_weights.safetensors", snapshot)
        else:
            shutil.copytree(WEIGHTS / "unet", snapshot / "unet")
        (snapshot.parents[1] / "refs").mkdir()
        (snapshot.parents[1] / "refs" / "main").write_text("abc")
    result = done(tmp_path / "out", lora=["me/lora", "me/unet"], num_steps=3, guidance_scale=2)
    kinds = {name: (row["source"], row["kind"]) for name, row in result["contenders"].items()}
    assert kinds["lora"] == ("me/lora", "lora") and kinds["unet"] == ("me/unet", "unet")
    assert pictures(tmp_path / "out" / "lora") == pictures(whole[0] / "mine")
    assert pictures(tmp_path / "out" / "unet") == pictures(whole[0] / "base")


def with_json(folder: Path, file: str, **changes: Any) -> Path:
    """The toy's pipeline with settings of one of its files changed."""
    shutil.copytree(WEIGHTS, folder)
    settings = json.loads((folder / file).read_text())
    (folder / file).write_text(json.dumps({**settings, **changes}))
    return folder


def test_what_a_pipeline_has_beside_its_unet_is_told(
    whole: tuple[Path, dict[str, Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The base's parts draw for all; parts that differ are named, printed and recorded."""
    same = shutil.copytree(WEIGHTS, tmp_path / "same")
    other = with_json(tmp_path / "other", "scheduler/scheduler_config.json", timestep_spacing="trailing")
    for part, name in (("vae", "diffusion_pytorch_model"), ("text_encoder_2", "model")):
        file = other / part / f"{name}.safetensors"
        tensors = load_file(file)
        save_file({n: v + 1 for n, v in tensors.items()}, file, metadata={"format": "pt"})
    shutil.rmtree(other / "tokenizer")  # as a repository of which the UNet alone was fetched
    result = done(tmp_path / "out", lora=[same, other], num_steps=3, guidance_scale=2)
    not_used = ["vae", "text_encoder_2", "tokenizer", "scheduler"]
    assert result["differences"]["same"] == {"not_used": [], "settings": []}
    assert result["differences"]["other"] == {"not_used": not_used, "settings": []}
    out = capsys.readouterr().out
    assert f"other: only its UNet is used; the base's stand for its own {', '.join(not_used)}, which differ\n" in out
    assert "same: only" not in out
    for name in ("same", "other"):
        assert pictures(tmp_path / "out" / name) == pictures(whole[0] / "base")


@pytest.mark.parametrize(
    ("file", "changes", "names"),
    [
        ("vae/config.json", {"scaling_factor": 0.3}, ["vae"]),
        ("vae/config.json", {"act_fn": "relu"}, ["vae"]),
        ("text_encoder/config.json", {"num_attention_heads": 4}, ["text_encoder"]),
        ("text_encoder_2/config.json", {"hidden_act": "quick_gelu"}, ["text_encoder_2"]),
        ("model_index.json", {"force_zeros_for_empty_prompt": False}, ["force_zeros_for_empty_prompt"]),
        ("text_encoder_2/config.json", {"transformers_version": "4.0"}, []),
        ("vae/config.json", {"_diffusers_version": "0.1", "sample_size": 512}, []),
    ],
)
def test_settings_beside_equal_weights_are_told(
    tmp_path: Path, file: str, changes: dict[str, Any], names: list[str]
) -> None:
    from spo_fast.config.sections import ModelConfig
    from spo_fast.evaluation.required_files import resolve
    from spo_fast.models.files.contenders import check_unet

    other = with_json(tmp_path / "other", file, **changes)
    assert check_unet(other / "unet", resolve(ModelConfig(model="toy"), {})).not_used == names


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda tensors, file: save_file({n: tensors[n] for n in tensors if n != "conv_out.bias"}, file), "1 missing"),
        (lambda tensors, file: file.rename(file.with_suffix(".fp16.safetensors")), "It has diffusion_pytorch_model.fp"),
        (lambda tensors, file: save_file(tensors, file, {"modelspec.prediction_type": "epsilon"}), "says epsilon"),
    ],
)
def test_a_unet_whose_file_is_wrong_is_told_before_anything_is_drawn(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], spoil: Any, message: str
) -> None:
    file = shutil.copytree(WEIGHTS, tmp_path / "other") / "unet" / "diffusion_pytorch_model.safetensors"
    spoil(load_file(file), file)
    assert message in told(capsys, words(tmp_path / "out", lora=[tmp_path / "other"]))
    assert not (tmp_path / "out" / "base").exists()


SCHEDULER = "scheduler/scheduler_config.json"


@pytest.mark.parametrize(
    ("file", "changes", "message"),
    [
        (SCHEDULER, {"prediction_type": "epsilon"}, "its prediction_type is epsilon, the base's v_prediction"),
        (SCHEDULER, {"beta_end": 0.02}, "its noise schedule is another than the base's"),
        (SCHEDULER, {"rescale_betas_zero_snr": True}, "its noise schedule is another than the base's"),
        (SCHEDULER, {"beta_schedule": "mine"}, "is not one that is drawn by here"),
        ("unet/config.json", {"cross_attention_dim": 7}, "its cross_attention_dim is 7, here it is"),
        ("unet/config.json", {"in_channels": 9}, "its in_channels is 9, here it is"),
        ("unet/config.json", {"addition_embed_type": None}, "its addition_embed_type is None, here it is text_time"),
        ("unet/config.json", {"time_cond_proj_dim": 256}, "its time_cond_proj_dim is 256, here it is None"),
        ("unet/config.json", {"_class_name": "SD3Transformer2DModel"}, "holds a SD3Transformer2DModel, not a UNet2DCo"),
    ],
)
def test_a_unet_that_cannot_stand_for_the_base_is_told_before_anything_is_drawn(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], file: str, changes: dict[str, Any], message: str
) -> None:
    error = told(capsys, words(tmp_path / "out", lora=[with_json(tmp_path / "other", file, **changes)]))
    assert message in error and error.count("\n") == 1 and len(error) <= 300 + len("error: ") + 1
    assert not (tmp_path / "out" / "base").exists()


def test_a_unet_of_other_widths_draws_and_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from diffusers import UNet2DConditionModel

    config = json.loads((WEIGHTS / "unet" / "config.json").read_text())
    wide: Any = UNet2DConditionModel.from_config({**config, "layers_per_block": 2})
    wide.save_pretrained(tmp_path / "wide" / "unet")
    result = done(tmp_path / "out", lora=[tmp_path / "wide"])
    assert result["differences"]["wide"]["settings"] == ["layers_per_block"]
    assert "wide: its UNet has other settings than the base's: layers_per_block\n" in capsys.readouterr().out


def test_a_run_brings_its_model_and_sampling_along(run_dir: Path) -> None:
    cfg = evaluate.parse(["--lora", str(run_dir)])
    assert (cfg.model.model, cfg.pictures.num_steps, cfg.pictures.guidance_scale) == ("toy", 4, 2.0)
    cfg = evaluate.parse(["--lora", f"a={run_dir}", "--num_steps", "7", "--resolution", "24"])
    assert (cfg.pictures.num_steps, cfg.model.height, cfg.pictures.guidance_scale) == (7, 24, 2.0)


def test_loras_of_a_flow_are_drawn_one_after_the_other(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Each on the transformer as its file has it. What a network is told is the run's, and does not mix."""
    run = run_toy(
        tmp_path / "mine", model="toy-flow", max_sequence_length=3, branch_start=1, resolution=16, learning_rate=5e-3
    )
    brought = evaluate.parse(["--lora", str(run)])
    assert (brought.model.model, brought.model.max_sequence_length) == ("toy-flow", 3)
    line = {**TINY, "model": "toy-flow", "max_prompts": 1, "metrics": ["aesthetics"], "output_dir": tmp_path / "out"}
    assert evaluate.main(command_line({**line, "lora": [f"a={run}", f"b={run}"]})) == 0
    base, a, b = (pictures(tmp_path / "out" / name) for name in ("base", "a", "b"))
    assert a == b and base.keys() == a.keys() and base != a
    error = told(capsys, command_line({**line, "max_sequence_length": 5}))
    assert "max_sequence_length: 3 there, 5 now" in error


# ------------------------------------------------------------------------------------------------------ what is wrong


def told(capsys: pytest.CaptureFixture[str], line: list[str], status: int = 1) -> str:
    capsys.readouterr()
    assert evaluate.main(line) == status
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    return error


def test_a_damaged_picture_is_named_and_nothing_else_is_lost(
    run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = done(tmp_path, lora=[run_dir])
    file = tmp_path / "mine" / "00001-1.png"
    good = file.read_bytes()
    file.write_bytes(good[: len(good) // 2])
    kept = {f: f.stat().st_mtime_ns for f in tmp_path.glob("*/*.png")}
    error = told(capsys, words(tmp_path, lora=[run_dir]))
    assert str(file) in error and "Delete it and run again" in error and error.count("\n") == 1
    assert {f: f.stat().st_mtime_ns for f in tmp_path.glob("*/*.png")} == kept
    file.unlink()
    assert done(tmp_path, lora=[run_dir]) == result and file.read_bytes() == good


def test_other_settings_do_not_mix(
    whole: tuple[Path, dict[str, Any]], run_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    error = told(capsys, words(whole[0], lora=[run_dir], guidance_scale=7))
    assert "guidance_scale: 2.0 there, 7.0 now" in error and "--output_dir" in error


def changed(lora: Path, out: Path, change: Any) -> Path:
    tensors = load_file(lora)
    name = next(n for n in sorted(tensors) if "lora_A" in n or "lora.down" in n)
    change(tensors, name)
    save_file(tensors, out)
    return out


def test_loras_that_do_not_fit_are_told(run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lora = run_dir / "pytorch_lora_weights.safetensors"

    def rank(tensors: dict[str, torch.Tensor], name: str) -> None:
        tensors[name] = tensors[name][:3].contiguous()

    def width(tensors: dict[str, torch.Tensor], name: str) -> None:
        tensors[name] = tensors[name][:, :5].contiguous()

    for number, (change, message) in enumerate(
        [
            (rank, "the two matrices of .* have ranks 3 and 8"),
            (width, "belongs to another base model"),
            (lambda t, n: t.update({n.replace("blocks.0", "blocks.7"): t.pop(n)}), "belongs to another base model"),
            (
                lambda t, n: t.update({"text_encoder.layers.0.lora_A.weight": t[n].clone()}),
                "more than a LoRA of a UNet",
            ),
            (lambda t, n: [t.clear(), t.update({"hello": torch.zeros(3)})], "more than a LoRA of a UNet"),
        ]
    ):
        bad = changed(lora, tmp_path / f"bad{number}.safetensors", change)
        error = told(capsys, words(tmp_path / "out", lora=[bad]))
        assert re.search(message, error) and bad.name in error and error.count("\n") == 1, error
    (tmp_path / "cut.safetensors").write_bytes(lora.read_bytes()[:300])
    assert "cut short" in told(capsys, words(tmp_path / "out", lora=[tmp_path / "cut.safetensors"]))
    assert "there is no" in told(capsys, words(tmp_path / "out", lora=[tmp_path]))
    assert not pictures(tmp_path / "out" / "base")  # nothing was drawn before the LoRA was read


def test_wrong_names_are_told(
    run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("spo_fast.models.files.find.offline_reason", lambda: "HF_HUB_OFFLINE is set")
    out = tmp_path / "out"
    error = told(capsys, words(out, metrics=["hpsv21", "image_reward"], lora=["nobody/nothing"]))
    for text in ("HPS_v2.1_compressed.pt", "--hpsv21_path", "ImageReward.pt", "--bert_path", "nobody/nothing"):
        assert text in error
    assert "Did you mean 'aesthetic'" in told(capsys, words(out, metrics=["aestetic"]))
    assert "toy's world" in told(capsys, ["--model", "sd15", "--metrics", "layout", "--output_dir", str(out)])
    assert "--prompts geneval" in told(capsys, words(out, metrics=["geneval"]))
    assert "two contenders" in told(capsys, words(out, lora=[run_dir, f"mine={run_dir}"]))
    assert "two contenders" in told(capsys, words(out, lora=[f"base={run_dir}"]))
    assert not out.exists()


# ----------------------------------------------------------------------------------------------------------- prompts


def test_long_and_blank_prompts_are_drawn(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text("a red ring\n\n   \n" + "very " * 2000 + "long\n")
    result = done(tmp_path / "out", prompts=file, metrics=["pickscore"])
    assert result["prompts"] == {"from": "prompts.txt", "count": 2, "truncated": 1}
    assert "longer than 16 tokens: 1" in capsys.readouterr().out
    file.write_bytes(b"a ring\n\xff\xfe\n")
    assert "not UTF-8" in told(capsys, words(tmp_path / "out", prompts=file))
    assert "captions of the toy's world only" in told(
        capsys, words(tmp_path / "out2", prompts=tmp_path / "b.txt", metrics=["layout"])
        if (tmp_path / "b.txt").write_text("hello there") else []
    )  # fmt: skip


def test_known_sets_come_from_a_folder_or_say_where(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("spo_fast.data.prompt_sets.offline_reason", lambda: "the hub cannot be reached")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))
    for name, known in PROMPT_SETS.items():
        error = told(capsys, words(tmp_path / "out", prompts=name))
        assert (known.repository or known.where) in error and f"--prompts {name}=FOLDER" in error
        assert f"{known.count:,}" in error and error.count("\n") == 1
    assert "Did you mean 'hpsv2'" in told(capsys, words(tmp_path / "out", prompts="hpsv3"))
    for style in ("anime", "concept-art", "paintings", "photo"):
        texts = [f"{style} {n}" for n in range(800)]
        (tmp_path / f"{style}.json").write_text(json.dumps(texts))
    cfg = evaluate.parse(words(tmp_path, prompts=f"hpsv2={tmp_path}", max_prompts=None))
    prompts, _ = prompt_sets.prompts_of(cfg)
    assert len(prompts) == 3200 and prompts[0] == "anime 0" and prompts[-1] == "photo 799"
    (tmp_path / "photo.json").write_text('["one"]')
    assert "2,401 prompts" in told(capsys, words(tmp_path / "out", prompts=f"hpsv2={tmp_path}"))
    lines = [f"P2\tprompt {n}\tAnimals" for n in range(1631)]
    lines.insert(1560, 'P2\t"G I G G L E" painted in thick colors\tWorld Knowledge')  # its cells are not quoted
    (tmp_path / "PartiPrompts.tsv").write_text("\n".join(["Id\tPrompt\tCategory", *lines]))
    prompts, name = prompt_sets.prompts_of(
        evaluate.parse(words(tmp_path, prompts=f"parti={tmp_path}", max_prompts=None))
    )
    assert (len(prompts), prompts[7], name) == (1632, "prompt 7", "PartiPrompts")
    assert prompts[1560] == '"G I G G L E" painted in thick colors'


# ----------------------------------------------------------------------------------------------------------- numbers


def test_bootstrap_interval_is_that_of_the_normal_distribution() -> None:
    values = np.random.default_rng(0).normal(3.0, 2.0, 4000)
    found = bootstrap(values, seed=1)
    error = values.std() / 4000**0.5
    assert found.mean == pytest.approx(values.mean(), abs=1e-12)
    assert found.low == pytest.approx(values.mean() - 1.96 * error, abs=0.1 * error * 1.96)
    assert found.high == pytest.approx(values.mean() + 1.96 * error, abs=0.1 * error * 1.96)
    assert bootstrap(values, 1) == found != bootstrap(values, 2)
    assert bootstrap(np.full(5, 2.5), 0) == (2.5, 2.5, 2.5)
    assert np.isnan(bootstrap(np.array([]), 0).mean)


def test_win_rate_counts_ties_half() -> None:
    ours, theirs = np.array([1.0, 2.0, 3.0, 5.0]), np.array([0.0, 2.0, 4.0, 4.0])
    assert win_rate(ours, theirs, 0).mean == (1 + 0.5 + 0 + 1) / 4


def test_image_statistics_by_hand() -> None:
    x = torch.full((3, 3, 8, 8), 0.0)  # mid grey
    x[1, :, :, 4:] = 1.0  # a white half
    x[2, 0], x[2, 1], x[2, 2] = 1.0, -1.0, -1.0  # pure red
    found = {name: values.tolist() for name, values in image_statistics(x).items()}
    assert found["saturation"] == pytest.approx([0, 0, 1])
    assert found["contrast"] == pytest.approx([0, 0.25, 0], abs=1e-6)
    assert found["edges"] == pytest.approx([0, 2 / 8, 0])  # the two columns along the step change by 0.25 a pixel
    # red - green 255, yellow - blue 127.5 everywhere: no spread, 0.3 times the length of the mean
    assert found["colourfulness"] == pytest.approx([0, 0, 0.3 * (255**2 + 127.5**2) ** 0.5], abs=1e-3)


def test_hacking_is_flagged_when_image_statistics_rise_beyond_chance() -> None:
    random = np.random.default_rng(0)
    base = {name: 1 + 0.1 * random.random(50) for name in ("saturation", "contrast", "edges", "colourfulness")}
    vivid = {**base, "saturation": base["saturation"] * 1.4, "edges": base["edges"] * 1.2}
    assert hacking_signs(base, base, 0) == {}
    assert hacking_signs(base, vivid, 0) == {"saturation": "saturation is 40% above the base model's"}


def test_published_rows_stand_in_the_table() -> None:
    scores = {m: {"mean": 21.0, "low": 20.0, "high": 22.0} for m in ("pickscore", "hpsv2")}
    text = results.table({"scores": {"base": scores}}, "sdxl", ["pickscore", "hpsv2"])
    assert re.search(r"\| SPO \(published\) +\| 23.06 +\| 31.8 ", text)
    assert PUBLISHED["sd15"]["SPO"]["image_reward"] == 0.171
