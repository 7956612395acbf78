"""--resolutions: iterations of several sizes, each of one; diffusers' pipeline is the truth of every size."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionXLPipeline
from runs import SMALL, assert_same_end, built, command_line, facts, killed_run, run_toy

from spo_fast import train
from spo_fast.config.presets import PRESETS
from spo_fast.method.rollout import sample_latents
from spo_fast.models.device import GIB, Device
from spo_fast.training import batches
from spo_fast.training.plan.fake_run import predict
from spo_fast.training.plan.fit_memory import choose
from spo_fast.training.sizes import size_of

SIZES = ("16x16", "24x16", "16x24")
MORE: dict[str, Any] = {"resolution": None, "resolutions": SIZES, "max_train_steps": 4, "checkpointing_steps": 1}


def test_iterations_draw_the_sizes_in_turn_and_go_on_bit_for_bit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run_toy(tmp_path / "whole", **MORE, num_validation_images=1)
    assert [r["resolution"] for r in facts(whole)] == ["16x16", "24x16", "16x24", "16x16"]
    killed = killed_run(tmp_path / "killed", monkeypatch, 2, **MORE, num_validation_images=1)
    run_toy(killed, **MORE, num_validation_images=1, resume_from_checkpoint="latest")
    assert_same_end(whole, killed)


def test_an_iteration_of_a_size_is_that_of_a_run_of_it_alone(tmp_path: Path) -> None:
    """Iteration 1 of both draws and trains 24 x 16 pictures of the same prompts from the same noise."""
    several = built(tmp_path / "several", **MORE)
    alone = built(tmp_path / "alone", resolution=None, width=24, height=16)
    for run in (several, alone):
        batches.encode_first(run)
    with size_of(several, 1) as size:
        assert size == {"resolution": "24x16"} and several.model.latent_shape == alone.model.latent_shape
        first = several.iterate(1, batches_timer)
    assert several.model.latent_shape[1:] == (16, 24)  # the largest again
    second = alone.iterate(1, batches_timer)
    assert first is not None and second is not None
    assert float(first["loss"]) == float(second["loss"])  # type: ignore[arg-type]
    ours, theirs = several.policy.state_dict(), alone.policy.state_dict()
    assert all(torch.equal(v, theirs[n]) for n, v in ours.items())


def batches_timer(phase: str) -> Any:
    import contextlib

    return contextlib.nullcontext()


@pytest.mark.parametrize("size", [(16, 24), (24, 16)])
def test_the_lora_draws_alike_in_diffusers_at_each_size(tmp_path: Path, size: tuple[int, int]) -> None:
    run = built(tmp_path / "run", **MORE)
    draw = torch.Generator().manual_seed(7)
    state = {n: 0.3 * torch.randn(v.shape, generator=draw) for n, v in run.policy.state_dict().items()}
    run.policy.load_state_dict(state)
    run.export(tmp_path / "lora")
    run.model.take_size(*size)
    x = torch.randn(1, *run.model.latent_shape, generator=draw)
    prompt = [run.prompts[0]]
    latents = sample_latents(run.policy, run.model.table(4, 0.0), run.model.cond(prompt), 3.0, x)
    ours = (run.model.decode(latents) / 2 + 0.5).clamp(0, 1)
    pipe = StableDiffusionXLPipeline.from_pretrained(str(run.model.resolved.model_path), torch_dtype=torch.float32)
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, clip_sample=False, set_alpha_to_one=False)
    pipe.load_lora_weights(str(tmp_path / "lora"), weight_name="pytorch_lora_weights.safetensors")
    height, width = size
    told = dict(height=height, width=width, num_inference_steps=4, guidance_scale=3.0, eta=0.0, output_type="pt")
    theirs = pipe(prompt, latents=x, **told).images
    assert theirs.shape[-2:] == size and (theirs - ours).abs().max() < 1e-4


def test_flows_draw_several_sizes(tmp_path: Path) -> None:
    more = {**MORE, "model": "toy-flow", "resolutions": ("16x16", "8x16"), "max_train_steps": 2, "branch_start": None}
    run_toy(tmp_path / "run", **more)
    assert [r["resolution"] for r in facts(tmp_path / "run")] == ["16x16", "8x16"]


def test_memory_is_predicted_of_the_largest() -> None:
    cfg = PRESETS["toy"]().with_fields(resolutions=SIZES)
    assert (cfg.model.height, cfg.model.width) == (16, 24) and cfg == cfg.with_fields(resolutions=SIZES)
    assert predict(cfg).peak == pytest.approx(predict(PRESETS["toy"]().with_fields(height=16, width=24)).peak, rel=1e-3)
    assert predict(cfg).peak > 1.2 * predict(PRESETS["toy"]().with_fields(height=16, width=16)).peak
    chosen, found = choose(cfg, Device("a pretended GPU", "cuda", 100 * GIB))
    why = {choice.flag: choice.reason for choice in found}
    assert chosen.engine.cuda_graphs is False and "several sizes" in why["cuda_graphs"]


def test_a_dry_run_refuses_a_smaller_size_too() -> None:
    odd: dict[str, Any] = {"resolutions": ("16x16", "17x15")}
    with pytest.raises(ValueError, match="must be a multiple of"):
        predict(PRESETS["toy-flow"]().with_fields(**odd))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"resolutions": ["16"]}, "'16' is no size. Write WIDTHxHEIGHT"),
        ({"resolutions": ["16x0"]}, "is no size"),
        ({"resolutions": ["16x16", "16x16"]}, "names a size twice"),
        ({"resolutions": ["16x16", "24x16"], "resolution": 16}, "leave height, width and resolution out"),
        ({"resolutions": ["16x16", "17x16"], "model": "toy-flow"}, "must be a multiple of"),
        ({"resolutions": ["16x16", "24x16"], "cuda_graphs": True}, "cuda_graphs would keep the memory of each"),
        ({"resolutions": ["16x16"], "method": "dpo", "pairs": "x"}, "reads labelled pairs as square images"),
    ],
)
def test_what_is_no_size_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], settings: dict[str, Any], message: str
) -> None:
    assert train.main(command_line({**SMALL, "resolution": None, **settings, "output_dir": tmp_path})) in (1, 2)
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1 and len(error) <= 310
