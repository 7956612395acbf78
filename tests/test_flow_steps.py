"""method/flow_schedule.py against what published code computed, and against float64 formulas written out here."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from golden_replay import load, table

from spo_fast.config.errors import UsageError
from spo_fast.config.sections import ModelConfig
from spo_fast.config.training import SampleConfig
from spo_fast.method import flow_schedule
from spo_fast.method.rollout import trained_steps
from spo_fast.ops.backend import available_backends, use_backend
from spo_fast.ops.log_ratio import log_ratio
from spo_fast.ops.transition import transition
from spo_fast.train import parse

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = [pytest.mark.gpu] if DEVICE == "cuda" else []  # there, `pytest -m gpu` runs this file on the device
SAMPLERS = ("ddim", "flow_sde", "cps", "dance")
GOLDEN = ("flow_steps_sd35_10", "flow_steps_flux512_6")


def step_of(sampler: str, s: float, to: float, eta: float) -> tuple[float, float, float]:
    """a, b and std of a step, from the papers' own terms: x0 and e of x_t, or the SDE's drift."""
    if sampler in ("ddim", "cps"):
        # the forward process from to to s: x_s = ratio x_to + added e; its posterior has this variance
        ratio = (1 - s) / (1 - to)
        added = s**2 - (ratio * to) ** 2
        std = eta * to / s * math.sqrt(added) if sampler == "ddim" else to * math.sin(eta * math.pi / 2)
        along = math.sqrt(max(to**2 - std**2, 0.0))
        # x0 = x - s v, e = x + (1 - s) v
        return (1 - to) + along, -(1 - to) * s + along * (1 - s), std
    g = eta if sampler == "dance" else eta * math.sqrt(s / (1 - (s if s < 1 else to)))
    dt = to - s
    # dx = (v + g^2 / (2 s) (x + (1 - s) v)) dt + g dw
    return 1 + g**2 / (2 * s) * dt, (1 + g**2 / (2 * s) * (1 - s)) * dt, g * math.sqrt(-dt)


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("eta", [0.0, 0.25, 0.7, 1.0])
@pytest.mark.parametrize("sigmas", ["shifted", "uneven", "from below 1", "to above 0"])
def test_rows_are_the_papers_steps(sampler: str, eta: float, sigmas: str) -> None:
    even = torch.linspace(1, 0, 9, dtype=torch.float64)
    s = {
        "shifted": 3 * even / (1 + 2 * even),
        "uneven": even**2.3,
        "from below 1": 0.97 * even,
        "to above 0": 0.1 + 0.9 * even,
    }[sigmas]
    found = flow_schedule.flow_table(s, eta, sampler)
    for i in range(8):
        a, b, std = step_of(sampler, float(s[i]), float(s[i + 1]), eta)
        want = torch.tensor([a, b, 1.0, -float(s[i]), std], dtype=torch.float64)
        assert torch.allclose(found.coefficients[i], want, rtol=1e-12, atol=1e-12), (i, found.coefficients[i], want)
    assert torch.equal(found.signal, 1 - s[:-1]) and torch.equal(found.noise, s[:-1])
    assert torch.equal(found.timesteps, (1000 * s[:-1]).float())


def test_without_noise_all_samplers_take_eulers_step() -> None:
    s = torch.linspace(1, 0, 7, dtype=torch.float64)
    for sampler in SAMPLERS:
        a, b, _, _, std = flow_schedule.flow_table(s, 0.0, sampler).coefficients.T
        assert torch.allclose(a, torch.ones_like(a), atol=1e-15) and torch.allclose(b, s.diff(), atol=1e-15)
        assert (std == 0).all()


@pytest.mark.parametrize("name", GOLDEN)
@pytest.mark.parametrize("backend", available_backends("transition", DEVICE))
@pytest.mark.parametrize("sampler", ["ddim", "flow_sde", "cps"])
def test_steps_of_published_code(name: str, backend: str, sampler: str) -> None:
    data, facts = load(name)
    data = {key: value.to(DEVICE) for key, value in data.items()}
    steps = flow_schedule.flow_table(data["sigmas"], facts["etas"][sampler], sampler, data["timesteps"])
    there = data[f"{sampler}.std"].isfinite()  # MixGRPO's code divides by 0 where sigma is 1 or 0
    assert there.sum() >= steps.num_steps - 2
    assert torch.allclose(steps.coefficients[there, 4].float(), data[f"{sampler}.std"][there], rtol=1e-5, atol=1e-6)
    for i in there.nonzero().flatten().tolist():
        x, v, noise = (data[f"in.{part}"][i] for part in ("x_t", "v", "noise"))
        rows = torch.full((len(x),), i, device=DEVICE)
        with use_backend(backend):
            mean, x_prev = (
                transition(v, None, x, rows, steps.coefficients, 1.0, noise=n[None])[1][0]
                for n in (torch.zeros_like(noise), noise)
            )
        assert torch.allclose(mean, data[f"{sampler}.mean"][i], rtol=1e-5, atol=1e-5)
        if sampler != "ddim":  # there the published code's children were not kept
            assert torch.allclose(x_prev, data[f"{sampler}.x_prev"][i], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", GOLDEN)
@pytest.mark.parametrize("backend", available_backends("log_ratio", DEVICE))
@pytest.mark.parametrize("sampler", ["flow_sde", "cps"])
def test_log_probs_of_published_code(name: str, backend: str, sampler: str) -> None:
    """Their difference between two velocities is our log-ratio. Flow-CPS publishes -mean (x' - mean)^2."""
    data, facts = load(name)
    data = {key: value.to(DEVICE) for key, value in data.items()}
    steps = flow_schedule.flow_table(data["sigmas"], facts["etas"][sampler], sampler, data["timesteps"])
    for i in range(steps.num_steps):
        std = float(data[f"{sampler}.std"][i])
        if std == 0:
            continue
        x, v, other, child = (data[key][i] for key in ("in.x_t", "in.v", "in.v2", f"{sampler}.x_prev"))
        own, rows = torch.arange(len(x), device=DEVICE), torch.full((len(x),), i, device=DEVICE)
        with use_backend(backend):
            found = log_ratio(other, None, v, None, x, child, own, rows, steps.coefficients, 1.0)[0]
        published = (data[f"{sampler}.log_prob_v2"][i] - data[f"{sampler}.log_prob"][i]).double()
        if sampler == "cps":
            published = published / (2 * std**2)
        # theirs is a difference of two float32 numbers
        rounding = 4e-7 * data[f"{sampler}.log_prob_v2"][i].abs().max() / (2 * std**2 if sampler == "cps" else 1)
        assert torch.allclose(found.double(), published, rtol=1e-4, atol=1e-5 + float(rounding)), (i, found, published)


@pytest.mark.parametrize("eta", [0.3, 1.0])
def test_ddim_on_a_flow_is_ddim_at_equal_noise_to_signal(eta: float) -> None:
    """x_flow = x / (signal + noise): both processes in one set of coordinates."""
    diffusion = table(20, eta)
    last = diffusion.coefficients[-1]
    alphas = load("ddim")[0]["alphas_cumprod"].double()
    scale = torch.cat([diffusion.signal + diffusion.noise, (alphas[0].sqrt() + (1 - alphas[0]).sqrt()).view(1)])
    sigmas = torch.cat([diffusion.noise, (1 - alphas[0]).sqrt().view(1)]) / scale
    flow = flow_schedule.flow_table(sigmas, eta)
    generator = torch.Generator().manual_seed(0)
    for i in range(20):
        x, epsilon = torch.randn(2, 5, generator=generator, dtype=torch.float64)
        a, b, c, d, std = diffusion.coefficients[i]
        v = epsilon - (c * x + d * epsilon)
        fa, fb, fc, fd, fstd = flow.coefficients[i]
        x_flow = x / scale[i]
        want, x0 = (a * x + b * epsilon) / scale[i + 1], c * x + d * epsilon
        assert torch.allclose(fa * x_flow + fb * v, want, rtol=1e-12, atol=1e-12)
        assert torch.allclose(fc * x_flow + fd * v, x0, rtol=1e-12, atol=1e-12)
        assert torch.allclose(fstd, std / scale[i + 1], rtol=1e-12, atol=1e-12)
    assert last[4] > 0
    assert torch.equal(flow.judged_at, diffusion.judged_at)


def test_a_judge_is_told_the_timestep_of_equal_noise() -> None:
    t = torch.tensor([751, 551, 351, 151, 51, 1])
    assert torch.allclose(
        flow_schedule.sigma_of(t).float(), torch.tensor([0.805, 0.658, 0.498, 0.314, 0.186, 0.040]), atol=6e-4
    )
    every = torch.arange(1000)
    assert torch.equal(flow_schedule.timestep_of(flow_schedule.sigma_of(every)), every)
    alphas = load("ddim")[0]["alphas_cumprod"].double()
    assert torch.allclose(flow_schedule.noise_to_signal(), ((1 - alphas) / alphas).sqrt(), rtol=3e-5)
    judged = flow_schedule.judged_table()
    assert torch.equal(judged.judged_at, every.flip(0)) and judged.num_steps == 1000
    assert flow_schedule.timestep_of(torch.tensor([1.0, 0.0]).double()).tolist() == [999, 0]


def test_sigmas_are_the_schedulers_own() -> None:
    """As the two pipelines ask for them: static and dynamic shift."""
    sd3 = FlowMatchEulerDiscreteScheduler(shift=3.0)
    sigmas, timesteps = flow_schedule.flow_steps(sd3, 10, tokens=1024, even=False)
    sd3.set_timesteps(10)
    assert torch.equal(sigmas, sd3.sigmas) and torch.equal(timesteps, sd3.timesteps) and float(sigmas[9]) < 0.01
    flux = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, base_shift=0.5, max_shift=1.15)
    for tokens, mu in ((1024, 0.63), (4096, 1.15)):
        sigmas, _ = flow_schedule.flow_steps(flux, 6, tokens, even=True)
        even = torch.linspace(1, 1 / 6, 6, dtype=torch.float64)
        want = math.exp(mu) / (math.exp(mu) + 1 / even - 1)
        assert torch.allclose(sigmas[:-1].double(), want, atol=1e-6) and sigmas[-1] == 0
    full = flow_schedule.full_flow_table(sd3, 1024)
    assert full.num_steps == 1000 and full.noise[0] == 1 and (full.noise.diff() < 0).all()


def sampled(sampler: str = "ddim", num_steps: int = 10, **settings: object) -> tuple[int, int]:
    sigmas, _ = flow_schedule.flow_steps(FlowMatchEulerDiscreteScheduler(shift=3.0), num_steps, 1024, even=False)
    eta = {"ddim": 1.0, "flow_sde": 0.7, "cps": 0.8, "dance": 0.3}[sampler]
    cfg = SampleConfig(**{"branch_start": None, "num_steps": num_steps, "sampler": sampler, "eta": eta, **settings})
    return trained_steps(cfg, flow_schedule.flow_table(sigmas, eta, sampler))


def test_steps_that_are_trained() -> None:
    """From SPO's noise level on; what has no noise, and the step before it, are left out."""
    sigmas, _ = flow_schedule.flow_steps(FlowMatchEulerDiscreteScheduler(shift=3.0), 10, 1024, even=False)
    first = int((sigmas > 0.805).sum())
    assert sampled() == sampled("cps") == (first, 8)
    assert sampled("flow_sde") == sampled("dance") == (first, 10)
    assert sampled(branch_sigma=1.0) == (0, 8) and sampled(branch_start=2) == (2, 8)
    assert sampled(branch_end=9) == (first, 9)
    with pytest.raises(ValueError, match="trains the last of 10 steps.*no noise with sampler=ddim"):
        sampled(branch_end=10)
    with pytest.raises(ValueError, match="leaves no step to train of 10: use a higher --branch_sigma"):
        sampled(branch_sigma=0.001)
    with pytest.raises(ValueError, match=r"the one before hardly any \(--branch_end 9 trains it\)"):
        sampled(branch_start=8)
    assert sampled(branch_start=8, branch_end=9) == (8, 9)
    with pytest.raises(ValueError, match=r"branch_start=9 leaves .* adds no noise\. Use a lower"):
        sampled(branch_start=9)
    with pytest.raises(ValueError, match=r"branch_sigma=0.805 leaves no step to train of 1"):
        sampled(num_steps=1)


@pytest.mark.parametrize("line", [[], ["--method", "ddpo"], ["--branch_start", "none"]])
def test_a_branch_sigma_takes_the_place_of_a_first_step(line: list[str], tmp_path: Path) -> None:
    """Also of one that a method's record or a file names; beside one that is given it is an error."""
    wanted = ["--model", "toy-flow", *line, "--branch_sigma", "0.7"]
    assert (parse(wanted).sample.branch_start, parse(wanted).sample.branch_sigma) == (None, 0.7)
    file = tmp_path / "config.yaml"
    file.write_text("branch_start: 3\n")
    assert parse([*wanted, "--config", str(file)]).sample.branch_start is None
    file.write_text("branch_sigma: 0.6\n")
    assert parse(["--model", "toy-flow", "--method", "ddpo", "--config", str(file)]).sample.branch_sigma == 0.6
    later = parse(["--model", "toy-flow", "--config", str(file), "--branch_start", "2"]).sample
    assert (later.branch_start, later.branch_sigma) == (2, None)
    with pytest.raises(ValueError, match="branch_start=2 and branch_sigma=0.7 say the same thing"):
        parse([*wanted, "--branch_start", "2"])


@pytest.mark.parametrize(("method", "flag", "value"), [("dpo", "sampler", "cps"), ("nft", "branch_sigma", "0.5")])
def test_noise_that_a_method_does_not_read(method: str, flag: str, value: str) -> None:
    line = ["--model", "toy-flow", "--method", method, "--pairs", "x"] if method == "dpo" else ["--method", method]
    with pytest.raises(UsageError, match=f"--{flag} is not read by --method {method}"):
        parse(["--model", "toy-flow", *line, f"--{flag}", value])


@pytest.mark.parametrize("setting", [{"embedded_guidance": 3.0}, {"max_sequence_length": 77}, {"t5_weights": "int8"}])
def test_settings_of_flows_are_told_to_diffusions(setting: dict[str, Any]) -> None:
    ModelConfig(model="flux", **setting)
    with pytest.raises(ValueError, match=r"is for flow models \(toy-flow, sd35, flux\): --model sd15"):
        ModelConfig(model="sd15", **setting)


def test_a_sampler_of_flows_is_told_to_a_diffusion() -> None:
    """Before any file is looked for."""
    with pytest.raises(ValueError, match="sampler=cps is for flows: --model sd15 takes DDIM's steps"):
        parse(["--model", "sd15", "--sampler", "cps"])


@pytest.mark.parametrize(
    ("sigmas", "eta", "sampler", "says"),
    [
        ([1.0, 0.5, 0.0], 1.2, "ddim", r"eta=1.2 of sampler=ddim must lie in \[0, 1\]"),
        ([1.0, 0.5, 0.0], -0.1, "flow_sde", "eta=-0.1 of sampler=flow_sde"),
        ([1.0, 0.5, 0.0], 1.0, "euler", "sampler='euler' is unknown"),
        ([0.0, 0.5, 1.0], 1.0, "ddim", "must fall, and lie within 0 to 1"),
        ([1.5, 0.5, 0.0], 1.0, "ddim", "must fall, and lie within 0 to 1"),
        ([1.0], 1.0, "ddim", "must fall, and lie within 0 to 1"),
    ],
)
def test_wrong_steps_are_refused(sigmas: list[float], eta: float, sampler: str, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        flow_schedule.flow_table(torch.tensor(sigmas), eta, sampler)


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"_class_name": "DDIMScheduler"}, "is no flow's"),
        ({"_class_name": "FlowMatchEulerDiscreteScheduler", "invert_sigmas": True}, "invert_sigmas=true"),
        ({"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 500}, "counts 500 timesteps"),
    ],
)
def test_wrong_schedulers_are_refused(config: dict[str, object], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        flow_schedule.flow_scheduler(config)
