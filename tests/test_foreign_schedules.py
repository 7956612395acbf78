"""Noise schedules of other people's models: every spacing, offset and end against diffusers' own scheduler in float64,
and runs on them whose every step is taken."""

from __future__ import annotations

import itertools
import json
import shutil
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers import DDIMScheduler
from runs import facts, flags, run_toy

from spo_fast import train
from spo_fast.config.sections import ModelConfig
from spo_fast.config.training import SampleConfig
from spo_fast.evaluation.required_files import resolve
from spo_fast.evaluation.sampling import Drawn
from spo_fast.method.objectives import D3PO
from spo_fast.method.rollout import sample_latents, segments, threshold_at, trained_steps
from spo_fast.method.schedule import ddim_scheduler, ddim_table, full_table, schedule_notes, table_of
from spo_fast.models.diffusion import DiffusionModel
from spo_fast.models.files.toy import WEIGHTS
from spo_fast.toy.build import write_pairs

TOY = json.loads((WEIGHTS / "scheduler" / "scheduler_config.json").read_text())
ABSENT = object()


def config_of(**changes: Any) -> dict[str, Any]:
    return {name: value for name, value in {**TOY, **changes}.items() if value is not ABSENT}


def toy_with(folder: Path, **changes: Any) -> Path:
    """The toy with other settings of its scheduler."""
    shutil.copytree(WEIGHTS, folder)
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(config_of(**changes)))
    return folder


# ------------------------------------------------------------------------------------------------- one step at a time

# 30 and 7 do not divide 1000; of 61 trailing steps diffusers itself makes 62, the last of them at t = -1
STEPS = (4, 5, 7, 10, 20, 30, 50, 61)
SETTINGS = (("epsilon", 1.0), ("epsilon", 0.0), ("v_prediction", 0.5), ("sample", 1.0))


def step_of(scheduler: Any, i: int, timesteps: list[int], *inputs: Any, eta: float) -> tuple[Any, Any]:
    """DDIMScheduler.step from the i-th timestep to the next one, told so: it would go to t - T // R by itself."""
    m, x, z = inputs
    T, R = scheduler.config.num_train_timesteps, scheduler.num_inference_steps
    if i + 1 < len(timesteps):
        scheduler.register_to_config(num_train_timesteps=timesteps[i] - timesteps[i + 1])
        scheduler.num_inference_steps = 1
    try:
        out = scheduler.step(m, timesteps[i], x, eta=eta, variance_noise=z)
    finally:
        scheduler.register_to_config(num_train_timesteps=T)
        scheduler.num_inference_steps = R
    return out.prev_sample, out.pred_original_sample


def in_float64(config: dict[str, Any], num_steps: int) -> DDIMScheduler:
    scheduler = DDIMScheduler.from_config(config)
    scheduler.alphas_cumprod = scheduler.alphas_cumprod.double()
    scheduler.final_alpha_cumprod = scheduler.final_alpha_cumprod.double()
    scheduler.set_timesteps(num_steps)
    return scheduler


@pytest.mark.parametrize("to_one", [True, False, ABSENT], ids=["to_one", "not_to_one", "absent"])
@pytest.mark.parametrize("offset", [0, 1, ABSENT], ids=["0", "1", "absent"])
@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace", ABSENT], ids=lambda s: s if s else "absent")
def test_every_row_is_diffusers_own(spacing: Any, offset: Any, to_one: Any) -> None:
    generator = torch.Generator().manual_seed(0)
    x, m, z = torch.randn(3, 1, 5, dtype=torch.float64, generator=generator)
    for num_steps, (prediction_type, eta) in itertools.product(STEPS, SETTINGS):
        config = config_of(
            timestep_spacing=spacing,
            steps_offset=offset,
            set_alpha_to_one=to_one,
            prediction_type=prediction_type,
        )
        truth = in_float64(config, num_steps)
        timesteps = [t for t in truth.timesteps.tolist() if t >= 0]
        table = table_of(ddim_scheduler(config), num_steps, eta)
        assert table.timesteps.tolist() == timesteps and table.num_steps == num_steps
        for i, (a, b, c, d, std) in enumerate(table.coefficients):
            x_prev, x0 = step_of(truth, i, timesteps, m, x, z, eta=eta)
            torch.testing.assert_close(c * x + d * m, x0, rtol=1e-9, atol=1e-9)
            torch.testing.assert_close(a * x + b * m + std * z, x_prev, rtol=1e-9, atol=1e-9)
        # the last row ends beyond 0, where alphabar is 1 unless the file says otherwise (absent: the class's default)
        quiet = timesteps[-1] == 0 or (to_one is not False and timesteps[-1] < 1000 // num_steps)
        noisy = [eta > 0] * (num_steps - 1) + [eta > 0 and not quiet]
        assert (table.coefficients[:, 4] > 0).tolist() == noisy


@pytest.mark.parametrize(("spacing", "num_steps"), [("leading", 20), ("leading", 30), ("trailing", 20)])
def test_where_the_next_row_is_where_diffusers_goes_by_itself(spacing: str, num_steps: int) -> None:
    config = config_of(timestep_spacing=spacing, prediction_type="epsilon")
    truth, table = in_float64(config, num_steps), table_of(ddim_scheduler(config), num_steps, 1.0)
    x, m, z = torch.randn(3, 1, 5, dtype=torch.float64)
    for t, (a, b, _, _, std) in zip(truth.timesteps, table.coefficients, strict=True):
        torch.testing.assert_close(a * x + b * m + std * z, truth.step(m, t, x, eta=1.0, variance_noise=z).prev_sample)


def test_linspace_takes_no_step_that_the_network_is_not_told_of() -> None:
    """By hand: 999, 666, 333, 0 are each reached from the one before, as q(x_s | x_t, x0) has it."""
    table, alphas = table_of(ddim_scheduler(config_of(timestep_spacing="linspace")), 4, 1.0), DDIMScheduler(
        **{k: TOY[k] for k in ("beta_start", "beta_end", "beta_schedule")}
    ).alphas_cumprod.double()  # fmt: skip
    assert table.timesteps.tolist() == [999, 666, 333, 0]
    for i, (t, s) in enumerate([(999, 666), (666, 333), (333, 0)]):
        posterior = (1 - alphas[s]) / (1 - alphas[t]) * (1 - alphas[t] / alphas[s])
        assert table.coefficients[i, 4] == pytest.approx(float(posterior.sqrt()), rel=1e-12)
    assert table.coefficients[3, 4] == 0


def test_full_table_is_the_inverse_of_noising() -> None:
    """x0 = c x_t + d m at every timestep of every spacing's schedule, the last without signal too (zero SNR)."""
    for kind, zero in itertools.product(("epsilon", "v_prediction", "sample"), (False, True)):
        if zero and kind == "epsilon":
            continue
        scheduler = ddim_scheduler(config_of(prediction_type=kind, rescale_betas_zero_snr=zero))
        alphas = scheduler.alphas_cumprod.double()
        table = full_table(scheduler.alphas_cumprod, kind)
        x0, noise = torch.randn(2, 1000, dtype=torch.float64)
        t = table.timesteps
        signal, sigma = alphas[t].sqrt(), (1 - alphas[t]).sqrt()
        x_t = signal * x0 + sigma * noise
        m = {"epsilon": noise, "v_prediction": signal * noise - sigma * x0, "sample": x0}[kind]
        c, d = table.coefficients[:, 2], table.coefficients[:, 3]
        torch.testing.assert_close(c * x_t + d * m, x0, rtol=1e-9, atol=1e-9)
        assert (alphas[-1] == 0) == zero and table.coefficients.isfinite().all()


@pytest.mark.parametrize("kind", ["v_prediction", "sample"])
@pytest.mark.parametrize("spacing", ["trailing", "linspace", "leading"])
def test_zero_terminal_snr_is_diffusers_own(spacing: str, kind: str) -> None:
    """At eta = 1 diffusers takes the root of 1 - a - (1 - a), which rounding makes negative on some CPUs (0.42)."""
    config = config_of(timestep_spacing=spacing, rescale_betas_zero_snr=True, prediction_type=kind)
    truth, x, m, z = in_float64(config, 5), *torch.randn(3, 1, 5, dtype=torch.float64)
    timesteps = truth.timesteps.tolist()
    for i, (a, b, c, d, std) in enumerate(table_of(ddim_scheduler(config), 5, 0.99).coefficients):
        x_prev, x0 = step_of(truth, i, timesteps, m, x, z, eta=0.99)
        torch.testing.assert_close(torch.stack([a * x + b * m + std * z, c * x + d * m]), torch.stack([x_prev, x0]))


# ------------------------------------------------------------------------------------------------- other samplers


@pytest.mark.parametrize(
    "name",
    ["EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler", "DPMSolverMultistepScheduler", "PNDMScheduler",
     "UniPCMultistepScheduler", "HeunDiscreteScheduler", "DEISMultistepScheduler",
     "LCMScheduler", "TCDScheduler"],
)  # fmt: skip
@pytest.mark.parametrize("written", ["all", "betas"])
def test_a_file_means_what_the_class_it_names_makes_of_it(name: str, written: str) -> None:
    betas = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    config = {"_class_name": name, **betas}
    if written == "all":
        config |= {"timestep_spacing": "leading", "steps_offset": 1, "prediction_type": "v_prediction"}
    own, ours = getattr(diffusers, name).from_config(config), ddim_scheduler(config)
    assert torch.equal(ours.alphas_cumprod, own.alphas_cumprod)
    for key in ("timestep_spacing", "steps_offset", "prediction_type"):
        assert ours.config[key] == own.config[key]
    assert not ours.config.clip_sample and ours.config.set_alpha_to_one == own.config.get("set_alpha_to_one", False)
    if name.startswith("Euler"):  # the timesteps too, where its own sampler takes one a step
        own.set_timesteps(20)
        assert table_of(ours, 20, 1.0).timesteps.tolist() == own.timesteps.round().long().tolist()


def test_sampler_of_a_package_that_is_not_here() -> None:
    """diffusers' LMSDiscreteScheduler (scipy) and DPMSolverSDEScheduler (torchsde) have linspace as their default."""
    for name in ("LMSDiscreteScheduler", "DPMSolverSDEScheduler"):
        config = {"_class_name": name, "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
        assert table_of(ddim_scheduler(config), 4, 1.0).timesteps.tolist() == [999, 666, 333, 0]


def test_what_is_not_done_is_told() -> None:
    assert schedule_notes(TOY) == schedule_notes({"_class_name": "EulerDiscreteScheduler"}) == []
    (note,) = schedule_notes({"_class_name": "DPMSolverMultistepScheduler", "use_karras_sigmas": True})
    assert "DPMSolverMultistepScheduler) has use_karras_sigmas" in note and "DDIM's steps" in note
    assert "distilled" in schedule_notes({"_class_name": "LCMScheduler"})[0]


REFUSED: dict[str, tuple[dict[str, Any], list[str]]] = {
    "clipped": ({"clip_sample": True}, ["DDIMScheduler) has clip_sample=true:", "Set clip_sample to false"]),
    "clipped by default": ({"clip_sample": ABSENT}, ["clip_sample=true by default"]),
    "DDPM clips by default": (
        {"_class_name": "DDPMScheduler", "clip_sample": ABSENT},
        ["DDPMScheduler) has clip_sample=true by default"],
    ),
    "thresholding": ({"thresholding": True}, ["has thresholding=true"]),
    "epsilon without signal": (
        {"rescale_betas_zero_snr": True, "prediction_type": "epsilon"},
        ["no signal left at its last timestep", "v_prediction"],
    ),
    "another output": ({"prediction_type": "flow_prediction"}, ["prediction_type='flow_prediction'"]),
    "no output": ({"prediction_type": None}, ["prediction_type=None"]),
    "flow": ({"use_flow_sigmas": True}, ["use_flow_sigmas=True"]),
    "continuous timesteps": ({"timestep_type": "continuous"}, ["timestep_type=continuous"]),
    "learned variance": ({"variance_type": "learned_range"}, ["variance_type=learned_range"]),
    "another beta_schedule": ({"beta_schedule": "sigmoid"}, ["sigmoid is not implemented"]),
    "another spacing": ({"timestep_spacing": "karras"}, ["karras is not supported"]),
    "betas as text": ({"beta_start": "0.00085"}, ["is damaged or of another kind"]),
    "offset as text": ({"steps_offset": "1"}, ["is damaged or of another kind"]),
    "fewer timesteps": ({"num_train_timesteps": 500}, ["counts 500 timesteps, 500 betas", "1000"]),
    "fewer betas": ({"trained_betas": [0.01] * 10}, ["counts 1000 timesteps, 10 betas"]),
    "nested betas": ({"trained_betas": [[0.01] * 10] * 100}, ["1000 betas"]),
    "betas of 0": ({"trained_betas": [0.0] * 500 + [0.01] * 500}, ["betas that are not between 0 and 1"]),
    "betas above 1": ({"trained_betas": [1.5] * 1000}, ["betas that are not between 0 and 1"]),
    "betas of NaN": ({"trained_betas": [float("nan")] * 1000}, ["betas that are not between 0 and 1"]),
    "falling betas": ({"beta_schedule": "linear", "beta_end": -0.02}, ["betas that are not between 0 and 1"]),
    "no betas": ({"beta_start": ABSENT}, ["has no betas"]),
    "another world": ({"_class_name": "FlowMatchEulerDiscreteScheduler", "beta_start": ABSENT}, ["has no betas"]),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_schedules_that_are_refused(case: str) -> None:
    changes, words = REFUSED[case]
    with pytest.raises(ValueError) as caught:
        ddim_scheduler(config_of(**changes))
    text = str(caught.value)
    assert len(text) <= 290 and "\n" not in text and all(word in text for word in words), text


@pytest.mark.parametrize(
    ("changes", "num_steps", "word"),
    [
        ({"steps_offset": 100}, 20, "goes from t = 1050 to 100"),
        ({"steps_offset": -1}, 20, "goes from t = 949 to -1"),
        ({"timestep_spacing": "linspace"}, 1, "goes from t = 0 to 0"),
        ({"steps_offset": 0}, 1, "goes from t = 0 to 0"),
        ({"steps_offset": 2}, 999, "goes from t = 1000 to 2"),
    ],
)
def test_steps_outside_the_schedule_are_refused(changes: dict[str, Any], num_steps: int, word: str) -> None:
    with pytest.raises(ValueError, match=word) as caught:
        table_of(ddim_scheduler(config_of(**changes)), num_steps, 1.0)
    assert len(str(caught.value)) <= 290


@pytest.mark.parametrize("timesteps", [[1000, 5], [5, -1], [5, 5], [5, 6]])
def test_timesteps_must_fall_within_the_schedule(timesteps: list[int]) -> None:
    with pytest.raises(ValueError, match="must fall"):
        ddim_table(ddim_scheduler(TOY).alphas_cumprod, torch.tensor(timesteps), 1.0, "epsilon")


def test_every_number_of_steps_is_taken() -> None:
    """1 to 999 of each spacing: so many rows, falling, and only the last may have no noise."""
    for spacing in ("leading", "trailing", "linspace"):
        scheduler = ddim_scheduler(config_of(timestep_spacing=spacing))
        for num_steps in range(2, 1000):
            table = table_of(scheduler, num_steps, 1.0)
            assert table.num_steps == num_steps and table.coefficients.isfinite().all()
            assert (table.coefficients[:-1, 4] > 0).all()


# ------------------------------------------------------------------------------------------------- what is trained


def test_training_ends_where_the_noise_does() -> None:
    cfg = SampleConfig(num_steps=4, branch_start=1)
    linspace, leading = (
        table_of(ddim_scheduler(config_of(timestep_spacing=spacing)), 4, 1.0) for spacing in ("linspace", "leading")
    )
    assert (trained_steps(cfg, leading), trained_steps(cfg, linspace)) == ((1, 4), (1, 3))
    assert trained_steps(SampleConfig(num_steps=4, branch_start=1, branch_end=2), linspace) == (1, 2)
    with pytest.raises(ValueError, match="branch_start=3 leaves no step to train: .* from t = 0, adds no noise"):
        trained_steps(SampleConfig(num_steps=4, branch_start=3), linspace)
    trained = SampleConfig(num_steps=4, branch_start=1, branch_end=3)
    assert segments(trained) == [(1, 2), (2, 3)] and segments(D3PO(beta=0.1, clip=0.1).sampling(trained)) == [(1, 4)]
    # of LPO's thresholds --threshold is the one of the least noisy step that is compared
    lpo = SampleConfig(num_steps=4, branch_start=1, branch_end=3, threshold=0.1, threshold_max=0.5)
    assert threshold_at(linspace, lpo, 2) == pytest.approx(0.1) and threshold_at(linspace, lpo, 0) == pytest.approx(0.5)


FOREIGN: dict[str, dict[str, Any]] = {
    "linspace": {"timestep_spacing": "linspace"},
    "offset 0": {"steps_offset": 0},
    "ends at x0": {"set_alpha_to_one": True},
    "trailing": {"timestep_spacing": "trailing"},
    "zero SNR": {"timestep_spacing": "trailing", "rescale_betas_zero_snr": True},
    "Euler's defaults": {"_class_name": "EulerDiscreteScheduler", "timestep_spacing": ABSENT, "steps_offset": ABSENT},
    "betas of its own": {"trained_betas": [0.0001 + 0.00002 * i for i in range(1000)]},
}
WITHOUT_LAST = ("linspace", "offset 0", "ends at x0", "Euler's defaults")


@pytest.mark.parametrize("case", FOREIGN)
def test_no_step_is_skipped(tmp_path: Path, capsys: pytest.CaptureFixture[str], case: str) -> None:
    model = toy_with(tmp_path / "model", **FOREIGN[case])
    run_toy(tmp_path / "run", pretrained_model_name_or_path=model, max_train_steps=2)
    text = capsys.readouterr().out
    shorter = case in WITHOUT_LAST
    assert ("--branch_end 3: on the model's schedule the last step, from t = " in text) == shorter
    for record in facts(tmp_path / "run"):
        assert record["skipped_steps"] == 0 and record["optimizer_steps"] > 0 and record["loss"] > 0
        assert record["pairs"] == (2 if shorter else 4)  # of 2 prompts, at threshold -1


@pytest.mark.parametrize("method", ["mspo", "d3po", "gradspo", "ddpo", "dpok", "dense", "dpo", "mapo"])
def test_every_method_trains_on_linspace(tmp_path: Path, method: str) -> None:
    settings: dict[str, Any] = {"method": method, "max_train_steps": 1}
    if method in ("dpo", "mapo"):
        write_pairs(tmp_path / "pairs.parquet", 12, seed=0)
        settings |= {"pairs": tmp_path / "pairs.parquet", "validation_share": 0.3, "sample_batch_size": 4}
        settings |= dict.fromkeys(("branch_start", "num_candidates", "threshold", "guidance_scale", "max_prompts"))
        settings |= {"num_steps": None}
    if method in ("ddpo", "dpok", "dense"):
        settings |= {"threshold": None}
    if method == "mspo":
        settings |= {"num_inner_steps": 1, "branch_start": 0}
    model = toy_with(tmp_path / "model", timestep_spacing="linspace")
    run_toy(tmp_path / "run", pretrained_model_name_or_path=model, **settings)
    (record,) = facts(tmp_path / "run")
    assert record["skipped_steps"] == 0 and record["grad_norm"] > 0


def test_dry_run_says_what_is_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = toy_with(tmp_path / "model", timestep_spacing="linspace")
    assert train.main([*flags(tmp_path / "run", pretrained_model_name_or_path=model), "--dry_run"]) == 0
    text = capsys.readouterr().out
    assert "--branch_end 3: on the model's schedule" in text and "8 pairs if every one is kept" in text
    model = toy_with(tmp_path / "clipped", clip_sample=True)
    assert train.main([*flags(tmp_path / "run", pretrained_model_name_or_path=model), "--dry_run"]) == 1
    assert "clip_sample=true" in capsys.readouterr().err


@pytest.mark.parametrize("changes", [{"set_alpha_to_one": True}, {"timestep_spacing": "trailing"}])
def test_pictures_are_diffusers_own(tmp_path: Path, changes: dict[str, Any]) -> None:
    """The whole drawing, eta 0, against a loop over DDIMScheduler in float64."""
    model = toy_with(tmp_path / "model", **changes)
    cfg = ModelConfig(model="toy", pretrained_model_name_or_path=str(model), mixed_precision="fp64", height=8, width=8)
    ours = DiffusionModel(cfg, resolve(cfg, {}), torch.device("cpu"), tmp_path / "cache")
    cond = ours.cond(["a red square"])
    x = torch.randn(1, *ours.latent_shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    policy = Drawn(ours.network, False)
    drawn = sample_latents(policy, ours.table(5, 0.0), cond, 3.0, x)
    scheduler = in_float64(config_of(**changes), 5)
    for t in scheduler.timesteps:
        m = policy.predict(x, t, cond, True)
        guided = m.uncond + 3.0 * (m.cond - m.uncond)
        x = scheduler.step(guided, t, x).prev_sample
    torch.testing.assert_close(drawn, x, rtol=1e-9, atol=1e-9)
