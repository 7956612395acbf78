"""The toy at a GPU's size: what it draws, how large it is, and all of it once, much reduced, on a CPU."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionXLPipeline

from benchmarks import gpu_run
from benchmarks.records import Records, read
from spo_fast.config.errors import RunError
from spo_fast.data import toy_world
from spo_fast.models.files.toy import LARGE, SIZES, deviation, toy_parts
from spo_fast.toy import build, claim_tables, claims
from spo_fast.toy.contenders import Contender

CAPTIONS = toy_world.TRAIN[:48]


def drawn(seed: int = 0) -> torch.Tensor:
    return toy_world.draw(CAPTIONS, torch.Generator().manual_seed(seed))


def test_large_pictures_have_the_scores_of_the_scene() -> None:
    """A drawn caption is right, and every score is that of the 16x16 picture by definition."""
    small = drawn()
    large = toy_world.enlarged(small, LARGE.scale)
    assert large.shape == (48, 3, 64, 64)
    assert torch.equal(large[:, :, 5, 11], small[:, :, 1, 2])
    assert toy_world.layout(large, CAPTIONS).float().mean() > 0.97  # grain hides a thing now and then
    scenes = toy_world.scenes(CAPTIONS, torch.Generator().manual_seed(0))
    nothing = torch.zeros(48)
    best = replace(scenes, stripes=torch.zeros(48, 2, 2), grain=nothing, vividness=nothing + toy_world.BEST_VIVIDNESS)
    clean = toy_world.enlarged(best.pixels(), LARGE.scale)
    assert toy_world.layout(clean, CAPTIONS).all()
    least_grain = 10 * (1 - 0.2 * toy_world.BEST_GRAIN / toy_world.WORST_GRAIN)  # none at all is not the best
    assert torch.allclose(toy_world.aesthetics(clean), torch.full((48,), least_grain), atol=0.05)
    assert torch.equal(toy_world.layout(large, CAPTIONS), toy_world.layout(small, CAPTIONS))
    assert torch.allclose(toy_world.aesthetics(large), toy_world.aesthetics(small), atol=1e-4)
    assert not toy_world.layout(large.roll(1, 0), CAPTIONS).all(1).any()  # other pictures are wrong
    # what is wrong inside a pixel of the world is seen by its mean
    shifted = large.clone()
    shifted[:, :, ::4] += 0.4
    assert torch.allclose(toy_world.cells(shifted), toy_world.cells(large) + 0.1, atol=1e-5)


def test_small_pictures_are_left_as_they_are() -> None:
    x = drawn()
    assert toy_world.cells(x) is x or torch.equal(toy_world.cells(x), x)
    assert toy_parts(0)["unet"].config.block_out_channels == (32, 64)
    assert claims.size_of(Path("nowhere")) == SIZES["small"] and claims.toy_flags(Path("nowhere")) == ["--model", "toy"]


def test_the_large_toy_is_what_it_says() -> None:
    parts = toy_parts(0, LARGE)
    parameters = {
        name: sum(p.numel() for p in parts[name].parameters()) for name in ("unet", "text_encoder", "text_encoder_2")
    }
    assert 30e6 < parameters["unet"] <= 40e6
    assert parts["text_encoder"].config.hidden_size == parts["text_encoder_2"].config.hidden_size == 128
    assert parts["unet"].config.cross_attention_dim == 256
    assert parts["unet"].config.sample_size == 16 and parts["unet"].config.in_channels == 4
    with torch.no_grad():
        latents = parts["vae"].encode(toy_world.enlarged(drawn()[:2], 4)).latent_dist.mean
        assert latents.shape == (2, *LARGE.latent) == (2, 4, 16, 16)
        assert parts["vae"].decode(latents).sample.shape == (2, 3, 64, 64)
    clip = build.new_clip(0, 300, LARGE)
    assert clip.config.image_size == 64 and clip.config.patch_size == 16


def test_gpu_run_gives_it_a_budget(tmp_path, monkeypatch):
    """A stage of its own, only by name; its records lie beside the others, so the same --out goes on."""
    assert "toy_large" not in gpu_run.chosen([])
    asked = []
    monkeypatch.setattr(claims, "main", lambda arguments: asked.append(arguments) or 0)
    records = Records(tmp_path / "records.jsonl", "toy_large")
    context = gpu_run.Context("toy_large", records, "full", "cuda", None, tmp_path, lambda: 1000.0)
    gpu_run.chosen(["toy_large"])["toy_large"].run(context)
    (arguments,) = asked
    given = dict(zip(arguments[::2], arguments[1::2], strict=True))
    assert given["--size"] == "large" and given["--records"] == str(tmp_path / "toy_large.jsonl")
    assert given["--budget_s"] == "880" and read(records.path)[0]["summary"].startswith("0 runs")


TINY = replace(
    LARGE, channels=(16, 32, 32), layers=1, heads=(2, 2, 2), groups=8, width=32, text_layers=2,
    vae_channels=(8, 16, 16), vae_steps=20, clip_widths=(16, 24), clip_layers=(2, 2), batch=8, steps=6,
)  # fmt: skip


@pytest.mark.slow
def test_the_large_toy_end_to_end(tmp_path, monkeypatch, capsys):
    """Narrower, a few steps of each training, runs of one iteration: built, tried, resumed, within the budget."""
    monkeypatch.setitem(SIZES, "large", TINY)
    changes = {"WARM_UP": 2, "PAIRS": 240, "PICTURES": 4, "BATCH": 8}
    for name, value in changes.items():
        monkeypatch.setattr(build, name, value)
    small = {"sample_batch_size": 2, "num_steps": 6, "branch_start": 3, "num_candidates": 2, "threshold": 0}
    few = {"spo": Contender(small)}
    both = {"BUDGET": 1, "PICTURES": 66, "MARK_PICTURES": 65, "CONTENDERS": few}
    plans = {"GRID": (1e-3,), "LADDER": (1e-3,), "SEEDS": (0,), "MAIN": few, "GROUPS": (few,)}
    plans |= dict.fromkeys(("REINFORCEMENT", "ABLATIONS", "BY_NOISE", "REST"), {})
    for part, values in ((claims, both), (claim_tables, both | plans)):
        for name, value in values.items():
            monkeypatch.setattr(part, name, value)
    monkeypatch.setattr(claims.evaluate, "GUIDANCE_SCALES", (2.0,))
    path, work = tmp_path / "records.jsonl", tmp_path / "work"
    common = ["--size", "large", "--records", str(path), "--work_dir", str(work)]

    assert claims.main([*common, "--budget_s", "0"]) == 0  # no time to build it
    assert "same command goes on" in capsys.readouterr().out and not path.is_file()
    assert not (work / "toy").exists()
    assert claims.main(common) == 0
    found = claims.read(path)
    assert set(found) == {"base", "judge", "spo/tuning/0.001", "spo/0"} and found["judge"]["pairs"] == 240
    assert {r["size"] for r in found.values()} == {"large"}
    assert found["spo/0"]["iterations"] == 1 and "--size large --cell 'spo/0'" in found["spo/0"]["command"]
    first = path.read_text()
    assert claims.main(common) == 0 and path.read_text() == first  # nothing is built or run twice

    toy = work / "toy"
    record = json.loads((toy / "build.json").read_text())
    assert record["pretraining"]["size"] == "large" and record["pretraining"]["pictures"] == 6 * 8
    pipe = StableDiffusionXLPipeline.from_pretrained(toy, dtype=torch.float32, local_files_only=True)
    assert pipe.text_encoder.config.hidden_size == pipe.text_encoder_2.config.hidden_size == 32
    assert pipe.vae.config.scaling_factor != 1 and pipe.vae.config.latent_channels == 4
    pipe.set_progress_bar_config(disable=True)
    out = pipe(CAPTIONS[:2], num_inference_steps=2, output_type="latent").images
    assert out.shape == (2, 4, 16, 16)
    assert pipe(CAPTIONS[:2], num_inference_steps=2, output_type="pt").images.shape == (2, 3, 64, 64)
    x = toy_world.enlarged(drawn()[:8], 4)
    untrained = toy_parts(0, TINY)["vae"]
    with torch.no_grad():  # the saved VAE has learnt something of the pictures, and its latents are scaled
        latents = pipe.vae.encode(x).latent_dist.mean
        errors = [
            (vae.decode(vae.encode(x).latent_dist.mean).sample - x).square().mean() for vae in (pipe.vae, untrained)
        ]
        assert errors[0] < 0.7 * errors[1]
        assert 0.5 < float(latents.std()) * pipe.vae.config.scaling_factor < 2

    # the shipped toy's records are no place for these, and the other way round
    assert claims.main(["--records", str(path), "--work_dir", str(tmp_path / "other")]) == 1
    assert "Give another --records" in capsys.readouterr().err
    assert claims.main([*common, "--cell", "spo/0"]) == 0
    printed = capsys.readouterr().out
    again = json.loads(printed[printed.index("{") :])
    assert again["aesthetics"] == found["spo/0"]["aesthetics"]


@pytest.mark.slow
def test_a_build_goes_on_where_its_time_ended(tmp_path, monkeypatch):
    for name, value in {"WARM_UP": 2, "BATCH": 4}.items():
        monkeypatch.setattr(build, name, value)
    for name in ("whole", "parts"):
        (tmp_path / name).mkdir()
    whole = build.pretrain(tmp_path / "whole", 0, 6, TINY)
    assert build.pretrain(tmp_path / "parts", 0, 6, TINY, deadline=0) is None  # not even the VAE
    assert build.train_vae(tmp_path / "parts" / "vae", 0, TINY) is not None
    calls = 0
    while (parts := build.pretrain(tmp_path / "parts", 0, 6, TINY, deadline=0)) is None:
        calls += 1  # a step each
    assert calls == 5
    for folder in ("unet", "text_encoder", "vae"):
        a, b = (next((p / folder).glob("*.safetensors")).read_bytes() for p in (whole, parts))
        assert a == b, folder


def test_latents_that_do_not_differ_are_no_scale():
    latents = torch.randn(8, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    assert deviation(latents) == float(latents.std())
    with pytest.raises(RunError, match="training failed"):
        deviation(torch.zeros(8, 4, 16, 16))
    with pytest.raises(RunError, match="nan"):
        deviation(torch.full((8, 4, 16, 16), torch.nan))


@pytest.mark.parametrize("command", ["build", "claims"])
def test_a_package_that_pairs_need_is_missed_before_anything_is_trained(tmp_path, monkeypatch, capsys, command):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    monkeypatch.setattr(build, "pretrain", lambda *_: pytest.fail("it trains"))
    if command == "build":
        with pytest.raises(ImportError, match=r"spo_fast\[data\]"):
            build.build(tmp_path / "work", tmp_path / "toy", LARGE, 0, 10, 10)
    else:
        words = ["--size", "large", "--records", str(tmp_path / "r.jsonl"), "--work_dir", str(tmp_path / "work")]
        assert claims.main(words) == 1
        assert "spo_fast[data]" in capsys.readouterr().err
