"""The flow model of the embedded world: what it is pretrained on, that it is built anew, and what is shipped."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline
from safetensors import safe_open

from spo_fast.data import toy_world
from spo_fast.data.toy_world import CAPTIONS, TEST, layout
from spo_fast.models.files import toy
from spo_fast.toy import build, evaluate

FLOW = toy.SIZES["flow"]


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def pipeline(path: Path) -> StableDiffusion3Pipeline:
    parts = {"text_encoder_3": None, "tokenizer_3": None}  # diffusers 0.42.1 has to be told, whatever the index says
    pipe = StableDiffusion3Pipeline.from_pretrained(path, **parts, torch_dtype=torch.float32, local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    return pipe


# ---------------------------------------------------------------------------------------------------- pretraining


def test_it_learns_the_velocity_from_what_diffusers_noises(monkeypatch: pytest.MonkeyPatch) -> None:
    """The loss of a network that answers noise - x0 is zero; what it is shown is scale_noise's at the t it is told."""
    monkeypatch.setattr(build, "BATCH", 4)
    run = build.FlowPretraining(0, 300, FLOW)
    scheduler = run.parts["scheduler"]
    assert isinstance(scheduler, FlowMatchEulerDiscreteScheduler)

    class Oracle:
        def __call__(self, x_t, timestep, encoder_hidden_states, pooled_projections):
            g = generator(7)  # the draws of loss(), in its order
            captions = toy_world.random_captions(list(CAPTIONS), 4, g)
            x0 = toy_world.draw(captions, g) * toy.SCALING
            u = torch.rand(4, generator=g)
            scheduler.timesteps = timestep  # of any table: diffusers looks the sigma up
            scheduler.sigmas = 1.5 * u / (1 + 0.5 * u)
            noise = torch.randn(x0.shape, generator=g)
            assert torch.allclose(timestep, 1000 * scheduler.sigmas)
            assert torch.allclose(x_t, scheduler.scale_noise(x0, timestep, noise), atol=1e-5)

            class Output:
                sample = noise - x0

            return Output

    run.parts["transformer"] = Oracle()
    assert float(run.loss(generator(7))) < 1e-10


def test_it_is_told_what_the_pipeline_tells() -> None:
    """Both encoders' embeddings and pooled outputs, a dropped caption as the pipeline's negative prompt."""
    run = build.FlowPretraining(0, 300, FLOW)
    run.modules.eval()
    texts, keep = TEST[:3], torch.tensor([True, False, True])
    parts = run.parts | {"text_encoder_3": None, "tokenizer_3": None}
    embeds, negative, pooled, negative_pooled = StableDiffusion3Pipeline(**parts).encode_prompt(
        texts, None, None, max_sequence_length=0
    )
    told = run.condition(texts, keep)
    assert embeds.shape == (3, toy.MAX_LENGTH, 2 * FLOW.width)  # CLIP's tokens and no others
    expected = torch.where(keep[:, None, None], embeds, negative), torch.where(keep[:, None], pooled, negative_pooled)
    assert torch.allclose(told["encoder_hidden_states"], expected[0], atol=1e-6)
    assert torch.allclose(told["pooled_projections"], expected[1], atol=1e-6)
    assert not torch.allclose(embeds[1], negative[1], atol=0.1)


def test_its_learning_rate_is_the_same_for_all_lengths_before_the_last_quarter() -> None:
    rates = {}
    for steps in (140, 180):  # 100 of warm-up
        run = build.FlowPretraining(0, steps, FLOW)
        rates[steps] = []
        for _ in range(steps):
            rates[steps].append(run.optimizer.param_groups[0]["lr"])
            run.optimizer.step()
            run.schedule.step()
    assert rates[140][:130] == rates[180][:130]
    assert rates[180][0] == pytest.approx(2e-5) and rates[180][100] == rates[180][159] == 2e-3
    assert rates[140][135] == pytest.approx(2e-3 * 5 / 10) and rates[180][175] == pytest.approx(2e-3 * 5 / 20)


def test_two_steps_are_built_into_a_pipeline_that_diffusers_reads(tmp_path: Path, monkeypatch) -> None:
    changes = {"WARM_UP": 1, "BATCH": 4, "PICTURES": 3}
    for name, value in changes.items():
        monkeypatch.setattr(build, name, value)
    monkeypatch.setattr(evaluate, "GUIDANCE_SCALES", (1.0, 2.0))
    monkeypatch.setattr(evaluate, "FLOW_STEPS", 2)
    first, again = tmp_path / "first", tmp_path / "again"
    for out in (first, again):
        command = ["--size", "flow", "--steps", "2", "--pairs", "240", "--work_dir", str(tmp_path / f"work-{out.name}")]
        assert build.main([*command, "--output_dir", str(out)]) == 0
    for path in first.rglob("*.safetensors"):  # the same numbers by the same command
        assert path.read_bytes() == (again / path.relative_to(first)).read_bytes()

    assert (first / "spm" / "model.safetensors").is_file()
    record = json.loads((first / "build.json").read_text())
    assert record["spm"] and record["pretraining"]["size"] == "flow" and record["pretraining"]["pictures"] == 2 * 4
    assert set(record["base"]) == {"guidance 1", "guidance 2"} and record["base"]["guidance 2"]["layout"][2] == 3
    pipe = pipeline(first)
    assert pipe.text_encoder_3 is None and pipe.tokenizer_3 is None
    settings = {"num_inference_steps": 2, "guidance_scale": 2.0, "max_sequence_length": 0, "output_type": "pt"}
    x = pipe(TEST[:2], generator=generator(), **settings).images
    assert x.shape == (2, 3, 16, 16) and x.isfinite().all()
    untrained = toy.toy_parts(0, FLOW)["transformer"].proj_out.weight
    assert not torch.equal(pipe.transformer.proj_out.weight, untrained)


def test_what_it_is() -> None:
    """SD3.5's own features at this size, and the latents of the diffusion toy."""
    parts = toy.toy_parts(0, FLOW)
    config = parts["transformer"].config
    assert config.qk_norm == "rms_norm" and config.dual_attention_layers == (0,)
    assert 0.8e6 < sum(p.numel() for p in parts["transformer"].parameters()) < 1.2e6
    assert FLOW.latent == toy.SIZES["small"].latent == (3, 16, 16)
    x = toy_world.draw(TEST[:4], generator())
    with torch.no_grad():
        latents = parts["vae"].encode(x).latent_dist.mean * parts["vae"].config.scaling_factor
    assert (latents - toy.SCALING * x).abs().max() < 1e-3 and parts["vae"].config.shift_factor == 0


# ---------------------------------------------------------------------------------------------------- what is shipped


def shipped(pattern: str) -> list[Path]:
    return sorted(p for p in toy.FLOW_WEIGHTS.rglob(pattern) if p.is_file())


def test_what_is_shipped_is_small_and_in_16_bits() -> None:
    assert sum(p.stat().st_size for p in shipped("*")) <= 4_000_000
    assert {p.parent.name for p in shipped("*.safetensors")} == {
        *("transformer", "vae", "text_encoder", "text_encoder_2", "spm"),
    }
    for path in shipped("*.safetensors"):
        with safe_open(path, "pt") as file:
            assert {file.get_slice(name).get_dtype() for name in file.keys()} == {"F16"}, path  # noqa: SIM118
    record = json.loads((toy.FLOW_WEIGHTS / "build.json").read_text())
    assert record["pretraining"]["steps"] == FLOW.steps and record["pretraining"]["cpu_minutes"] <= 60
    assert record["base"]["guidance 2"]["layout"][0] >= 0.7


def test_diffusers_draws_the_captions_with_what_is_shipped() -> None:
    texts = TEST[:8]
    settings = {"num_inference_steps": 20, "guidance_scale": 2.0, "max_sequence_length": 0, "output_type": "pt"}
    x = pipeline(toy.FLOW_WEIGHTS)(texts, generator=generator(), **settings).images * 2 - 1
    assert x.shape == (8, 3, 16, 16)
    assert layout(x, texts).all(1).float().mean() > 0.5  # everything as the caption says; by chance under 0.01
    others = texts[1:] + texts[:1]
    assert layout(x, others).all(1).float().mean() < 0.3
