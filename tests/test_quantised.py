"""--base_weights: NF4, INT8 and FP8 against their formulas in float64; runs, bytes, and the error that they print."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import assert_same_end, built, facts, flags, killed_run, run_toy
from safetensors.torch import load_file
from test_fuse import fake_sdxl
from test_fuse_transformer import build, inputs, results
from test_fuse_transformer import error as error_of
from torch.utils.flop_counter import FlopCounterMode

from spo_fast import train
from spo_fast.config import optional_packages
from spo_fast.config.training import Config
from spo_fast.models.device import Device
from spo_fast.models.fuse import fuse
from spo_fast.models.quantised import QuantisedLinear, import_for, in_full, quantise_base
from spo_fast.ops.lora_linear import lora_linear, lora_linears
from spo_fast.ops.quantised import Quantised, quantise, quantised_linear
from spo_fast.toy.build import write_pairs
from spo_fast.training import diagnosis, loop
from spo_fast.training.plan.fake_run import predict
from spo_fast.training.plan.fit_memory import choose

import_for("nf4")
HOW = ("nf4", "int8", "fp8")
# QLoRA, arXiv 2305.14314, appendix E
NF4 = torch.tensor(
    [-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
     -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
     0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0], dtype=torch.float64,
)  # fmt: skip


def randn(*shape: int, seed: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def e4m3(x: torch.Tensor) -> torch.Tensor:
    """Nearest of 3 mantissa bits and exponents from -6 on, ties to even."""
    step = 2.0 ** (x.abs().clamp(min=2.0**-6).log2().floor() - 3)
    return (x / step).round() * step


def rounded(x: torch.Tensor, how: str) -> torch.Tensor:
    """What remains of a float64 matrix."""
    if how == "nf4":
        blocks = x.flatten().view(-1, 64)
        scale = blocks.abs().amax(1, keepdim=True)
        nearest = (blocks[..., None] / scale[..., None] - NF4).abs().argmin(-1)
        return (NF4[nearest] * scale).view(x.shape)
    largest = {"int8": 127, "fp8": 448}[how]
    scale = x.abs().amax(1, keepdim=True).clamp(min=1e-30) / largest
    return (torch.round(x / scale) if how == "int8" else e4m3(x / scale)) * scale


def error(got: torch.Tensor, want: torch.Tensor) -> float:
    return ((got.double() - want).norm() / want.norm()).item()


def case(dtype: torch.dtype, how: str, rows: int = 48) -> tuple[torch.Tensor, Quantised, torch.Tensor, torch.Tensor]:
    """x (2, 9, 80), W (rows, 80), bias; W in float64 as the formulas leave it. NF4's blocks run over row ends."""
    x, weight, bias = (
        randn(*shape, seed=rows + i, dtype=dtype) for i, shape in enumerate([(2, 9, 80), (rows, 80), (rows,)])
    )
    return x, quantise(weight, how), bias, rounded(weight.double(), how)


FLOOR = {torch.float64: 1e-6, torch.float32: 1e-6, torch.bfloat16: 1e-2}  # relative; scales are float32 throughout


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("how", HOW)
def test_forward_and_dx_match_the_formulas(how, dtype):
    x, weight, bias, W = case(dtype, how)
    tokens = x.double().flatten(0, 1)
    read = tokens if how == "nf4" else rounded(tokens, how)
    dy = randn(2, 9, 48, seed=5, dtype=dtype)
    saved: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda v: saved.append(v) or v, lambda v: v):
        y = quantised_linear(x.requires_grad_(), weight, bias)
    y.backward(dy)
    assert error(y.detach(), (read @ W.t() + bias.double()).view(2, 9, 48)) < FLOOR[dtype]
    assert error(x.grad, dy.double() @ W) < FLOOR[dtype]
    assert {v.data_ptr() for v in saved} == {v.data_ptr() for v in weight}  # not x
    assert weight.shape == (48, 80) and not any(v.requires_grad for v in weight)
    assert 1e-3 < error(W, randn(48, 80, seed=49)) < 0.12  # it is not the full one
    with torch.no_grad():
        torch.testing.assert_close(quantised_linear(x, weight, None) + bias, y, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("how", HOW)
def test_lora_layers_on_a_quantised_base_match_float64(how):
    x, weight, bias, W = case(torch.float32, how)
    tokens, s = x.double().flatten(0, 1), 0.5
    read = tokens if how == "nf4" else rounded(tokens, how)
    A, B, dy = (randn(*shape, seed=7 + i) for i, shape in enumerate([(4, 80), (48, 4), (18, 48)]))
    want = [
        read @ W.t() + bias.double() + s * tokens @ A.t() @ B.t(),
        dy @ W + s * dy @ B @ A,
        s * (dy @ B).t() @ tokens,
        s * dy.t() @ (tokens @ A.t()),
    ]
    other = case(torch.float32, how, rows=32)[1]
    for shared in (False, True):
        leaves = [v.float().clone().requires_grad_() for v in (x, A, B)]
        if shared:  # queries, keys and values: the second's output gets no gradient
            layers = [(weight, bias, *leaves[1:]), (other, None, leaves[1].detach(), torch.zeros(32, 4))]
            y = lora_linears(leaves[0], layers, s)[0]
        else:
            y = lora_linear(leaves[0], weight, bias, *leaves[1:], s)
        y.backward(dy.float().view_as(y))
        got = [y.detach().flatten(0, 1), leaves[0].grad.flatten(0, 1), leaves[1].grad, leaves[2].grad]
        assert max(map(error, got, want)) < 2e-6


@pytest.mark.parametrize("how", HOW)
def test_compiled_and_counted(how):
    x, weight, bias, _ = case(torch.float32, how)
    A, B = randn(4, 80, seed=1, dtype=torch.float32).requires_grad_(), randn(48, 4, seed=2, dtype=torch.float32)

    def both(x: torch.Tensor, *weight: torch.Tensor) -> torch.Tensor:
        return lora_linear(x, Quantised(*weight), bias, A, B, 1.0) + quantised_linear(x, Quantised(*weight), None)

    x.requires_grad_()
    with FlopCounterMode(display=False) as flops:
        want = torch.autograd.grad(both(x, *weight).square().sum(), (x, A))
    if how != "int8":  # PyTorch has no formula for that product: training/plan/fake_run.py has
        assert flops.get_total_flops() == 4 * 2 * 18 * 80 * 48 + 2 * 18 * 4 * (3 * 80 + 2 * 48)  # B has no gradient
    torch._dynamo.reset()
    got = torch.autograd.grad(
        torch.compile(both, fullgraph=True, backend="aot_eager")(x, *weight).square().sum(), (x, A)
    )
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("how", ["int8", "fp8"])
def test_what_is_not_finite_stays_so_and_zeros_are_zeros(how):
    x, weight, _, _ = case(torch.float32, how)
    x[0, 0, 0], x[0, 1, 0], x[0, 2] = torch.inf, torch.nan, 0.0
    y = quantised_linear(x, weight, None)
    assert not y[0, :2].isfinite().any() and not y[0, 2].any() and y[1].isfinite().all()


# ------------------------------------------------------------------------------------------------- runs


def base_layers(run: loop.Run) -> dict[str, Any]:
    return {name: m for name, m in run.policy.network.named_modules() if isinstance(m, QuantisedLinear)}


@pytest.mark.parametrize("how", HOW)
def test_bytes_are_predicted_and_only_the_lora_is_trained(how, tmp_path):
    run = built(tmp_path / "run", base_weights=how, fuse=True, mixed_precision="bf16")
    layers = base_layers(run)
    assert len(layers) == 4 * 12  # of each transformer: proj_in, proj_out, 8 of attention, 2 of the feed-forward
    assert run.policy.dtype == torch.bfloat16 and all("lora_" in name for name in run.policy.names)
    trained = [p for p in run.policy.network.parameters() if p.requires_grad]
    assert len(trained) == len(run.policy.names)
    held = [t for t in (*run.policy.network.parameters(), *run.policy.network.buffers()) if not t.requires_grad]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in held}
    assert predict(run.cfg, device_type="cpu").resident["UNet"] == sum(storages.values())
    weights = sum(m.in_features * m.out_features for m in layers.values())
    rows = sum(m.out_features for m in layers.values())
    found = sum(m.weight.nbytes + m.weight_scale.nbytes for m in layers.values())
    assert found == (weights * 9 / 16 if how == "nf4" else weights + 4 * rows)


def test_sdxls_base_takes_less_than_2_gib():
    mode, policy = fake_sdxl(lora=True)
    full = sum(p.nbytes for n, p in policy.network.named_parameters() if "lora_" not in n)
    with mode:
        policy.quantise("nf4")
    held = [*policy.network.named_parameters(), *policy.network.named_buffers()]
    # 2,567,463,684 weights, 2,207,744,000 of them in the transformers' linear layers
    assert full == 2 * 2_567_463_684
    assert (
        sum(t.nbytes for n, t in held if "lora_" not in n)
        == 2 * (2_567_463_684 - 2_207_744_000) + 2_207_744_000 * 9 // 16
    )


@pytest.mark.slow
@pytest.mark.parametrize("how, unet, peak", [("full", 4.78, 13.1), ("nf4", 1.83, 10.1), ("fp8", 2.73, 11.2)])
def test_the_readmes_peaks_of_small(how, unet, peak):
    cfg = train.parse(["--model", "sdxl", "--memory", "small", "--base_weights", how])
    cfg, _ = choose(cfg, Device("16 GB", "cuda", 2**34, capability=(8, 9)))
    costs = predict(cfg)
    assert costs.peak / 2**30 == pytest.approx(peak, abs=0.1)
    assert costs.resident["UNet"] / 2**30 == pytest.approx(unet, abs=0.01)


@pytest.mark.parametrize("how", HOW)
def test_fused_and_checkpointed_networks_agree_with_plain_ones(how, tmp_path):
    """NF4 in float64, where sums differ by nothing; the others round what sums leave, so that a step may be another."""
    dtype = "fp64" if how == "nf4" else "no"
    found = []
    for name, settings in {"plain": {}, "fused": {"fuse": True, "gradient_checkpointing": True}}.items():
        run = built(tmp_path / name, base_weights=how, mixed_precision=dtype, **settings)
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for master in run.policy.masters:
                master.copy_(0.1 * torch.randn(master.shape, generator=generator, dtype=torch.float64))
        run.policy.copy_to_network()
        x = torch.randn(2, *run.model.latent_shape, generator=generator, dtype=torch.float64).to(run.model.latent_dtype)
        m = run.policy.predict(x, run.table.timesteps[:2], run.model.cond(run.prompts[:2]), True)
        (m.cond.square().sum() + m.uncond.sum()).backward()
        found.append([m.cond.detach(), m.uncond.detach(), *(p.grad for p in run.policy.masters)])
    tolerance = 1e-10 if how == "nf4" else 0.03
    for got, want in zip(*found, strict=True):
        assert error(got, want.double()) < tolerance


@pytest.mark.parametrize("how", ["nf4", *(pytest.param(how, marks=pytest.mark.slow) for how in HOW[1:])])
def test_runs_resume_to_the_last_bit_and_say_what_they_are(how, tmp_path, monkeypatch, capsys):
    settings = {"base_weights": how, "max_train_steps": 2, "checkpointing_steps": 1, "fuse": how != "int8"}
    whole = run_toy(tmp_path / "whole", **settings)
    told = capsys.readouterr().out
    assert f"--base_weights {how}: as given. Inexact" in told
    assert told.count(f"{how} base (inexact) against the full one") == 1
    assert told.count("relative error of the prediction: ") == told.count("size of the log-ratio to it: ") == 1
    assert f"base_weights: {how}\n" in (whole / "config.yaml").read_text()
    assert f"computed with the base model rounded to {how}." in (whole / "README.md").read_text()
    first, *rest = facts(whole)
    assert 0 < first["base_log_ratio"] < first["base_error"] < 0.5 and not any("base_error" in r for r in rest)
    killed = killed_run(tmp_path / "killed", monkeypatch, 1, **settings)
    capsys.readouterr()
    run_toy(killed, **settings, resume_from_checkpoint="latest")
    assert "against the full one" not in capsys.readouterr().out
    assert_same_end(whole, killed)
    exact = run_toy(tmp_path / "exact", **{**settings, "base_weights": "full", "max_train_steps": 1})
    for file in ("pytorch_lora_weights.safetensors", "lora_kohya.safetensors"):
        ours, theirs = load_file(whole / file), load_file(exact / file)
        assert {n: v.shape for n, v in ours.items()} == {n: v.shape for n, v in theirs.items()}
    assert "Inexact" not in (out := capsys.readouterr().out) and "inexact" not in out
    assert train.main(flags(killed, **settings | {"base_weights": "full"}, resume_from_checkpoint="latest")) != 0
    assert f"base_weights: {how} -> full" in capsys.readouterr().err


@pytest.mark.parametrize("how", HOW)
def test_the_printed_error_is_what_the_rounded_weights_change(how, tmp_path, monkeypatch):
    """Again from a network of plain layers that hold the rounded weights, and the Gaussian written out."""
    seen: list[Any] = []
    whole = diagnosis.base_errors
    monkeypatch.setattr(diagnosis, "base_errors", lambda *a: seen.append((a[2], whole(*a))) or seen[-1][1])
    predictions: list[Any] = []
    predict = diagnosis.frozen_predictions
    monkeypatch.setattr(diagnosis, "frozen_predictions", lambda *a: predictions.append(predict(*a)) or predictions[-1])
    run_toy(tmp_path / "run", base_weights=how, max_train_steps=1)
    ((e, found),) = seen
    outputs = []
    for base in ("full", how):
        run = built(tmp_path / base)
        for name, m in run.policy.network.named_modules():
            fits = type(m) is torch.nn.Linear and min(m.weight.shape) >= 16 and ("attentions" in name)
            if fits and base != "full":
                m.weight.data = rounded(m.weight.detach().double(), base).float()
                if base != "nf4":
                    m.register_forward_pre_hook(
                        lambda _, x: rounded(x[0].double().flatten(0, -2), how).view(x[0].shape).float()
                    )
        with torch.no_grad(), run.policy.reference():
            t = run.table.timesteps[e.states.rows]
            cond, uncond = run.policy.predict(e.states.x_t, t, e.cond.select(e.states.prompts), True)
        outputs.append((uncond + 2.0 * (cond - uncond)).double())  # the guidance scale of runs.SMALL
    full, mine = outputs
    timesteps, errors = found["base_error"]
    want = (mine - full).flatten(1).norm(dim=1) / full.flatten(1).norm(dim=1)
    assert torch.equal(timesteps, t)
    tolerance = 1e-3 if how == "nf4" else 0.2  # one x rounded otherwise, and all after it are
    assert error(errors, want) < tolerance and 1e-3 < want.mean() < 0.2
    a, b, _, _, std = run.table.coefficients.double()[e.states.rows].view(-1, 5, 1, 1, 1).unbind(1)

    def log_ratios(m: torch.Tensor, of: torch.Tensor) -> torch.Tensor:
        means = ((a * e.states.x_t + b * x)[e.index] for x in (m, of))
        log_p, log_q = (-((e.x_prev.double() - x) ** 2 / (2 * std[e.index] ** 2)).mean((-3, -2, -1)) for x in means)
        return (log_p - log_q).abs().flatten()

    timesteps, ratios = found["base_log_ratio"]
    assert torch.equal(timesteps, t[e.index].flatten())
    # of the predictions that were compared, every digit
    given = [(u.double() + 2.0 * (c.double() - u.double())) for c, u in predictions]
    assert error(ratios, log_ratios(*given)) < 1e-3
    assert error(given[1], full) < 1e-5
    if how != "fp8":  # whose errors of the same size have another direction, on which a log-ratio depends
        loose, want_ratios = tolerance if how == "nf4" else 0.5, log_ratios(mine, full)
        assert error(ratios, want_ratios) < loose
        assert ratios.mean().item() == pytest.approx(want_ratios.mean().item(), rel=loose)
    text = diagnosis.base_text(how, found)
    last = int(t.min())
    assert f"{want[t == last].mean():.0e}"[:1] in text and f" at {last}" in text.splitlines()[1]
    assert facts(tmp_path / "run")[0]["base_error"] == pytest.approx(float(want.mean()), rel=tolerance)


def test_a_flows_timesteps_are_told_as_whole_numbers(tmp_path, capsys):
    run_toy(tmp_path / "run", model="toy-flow", base_weights="fp8", num_steps=8, max_train_steps=1)
    lines = [line for line in capsys.readouterr().out.splitlines() if re.match(r"  .*: \S+ at \d", line)]
    told = [part.split(" at ")[1] for line in lines for part in line.split(", ")]
    assert len(lines) == 2 and len(told) == 8 and all(t.isdigit() for t in told)


def test_labelled_pairs_have_no_log_ratio(tmp_path, capsys):
    write_pairs(tmp_path / "pairs.parquet", 10, seed=0)
    beside: dict[str, Any] = {"num_candidates": None, "threshold": None, "branch_start": None, "validation_share": 0.1}
    beside |= {"method": "mapo", "pairs": tmp_path / "pairs.parquet"}
    run = run_toy(tmp_path / "run", base_weights="fp8", max_train_steps=1, **beside)
    out = capsys.readouterr().out
    assert "relative error of the prediction" in out and "log-ratio to it" not in out
    assert 0 < facts(run)[0]["base_error"] < 0.5 and "base_log_ratio" not in facts(run)[0]


def test_an_iteration_that_keeps_nothing_measures_nothing(tmp_path, capsys):
    run_toy(tmp_path / "run", base_weights="int8", max_train_steps=1, threshold=0.9999999)
    assert "the full one, not measured, the first iteration kept nothing\n" in capsys.readouterr().out
    assert "base_error" not in facts(tmp_path / "run")[0]


@pytest.mark.slow
@pytest.mark.parametrize("how", HOW)
def test_compiled_runs_train_alike(how, tmp_path, monkeypatch):
    whole = loop.Run.compile
    monkeypatch.setattr(loop.Run, "compile", lambda run: whole(run, backend="aot_eager"))
    torch._dynamo.reset()
    compiled = run_toy(tmp_path / "compiled", base_weights=how, max_train_steps=1, fuse=True, compile="regional")
    plain = run_toy(tmp_path / "plain", base_weights=how, max_train_steps=1, fuse=True)
    torch._dynamo.reset()
    (ours,), (theirs,) = facts(compiled), facts(plain)
    assert ours["base_error"] == pytest.approx(theirs["base_error"], rel=0.05)
    assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=0.05)


# ------------------------------------------------------------------------------------------------- refusals


def config(tmp_path: Path, **settings: Any) -> Config:
    return train.parse(flags(tmp_path, **settings))


def test_what_cannot_be_is_said(tmp_path, monkeypatch):
    for settings, said in (
        ({"full_finetune": True}, "base_weights=int8 rounds the weights that full_finetune trains"),
        ({"rollout_weights": "merged"}, "use --rollout_weights unmerged, or --base_weights full"),
    ):
        with pytest.raises(ValueError, match=said):
            config(tmp_path, base_weights="int8", **settings)
    fp8 = config(tmp_path, base_weights="fp8", memory="fast", rows_per_forward=4, states_per_forward=4, decode_chunk=1)
    fp8 = fp8.with_fields(gradient_checkpointing=False)
    with pytest.raises(
        ValueError, match="compute capability 8.9 or later; a T4 has 7.5. Use --base_weights int8 or nf4"
    ):
        choose(fp8, Device("a T4", "cuda", 2**34, capability=(7, 5)))
    for device in (Device("an L4", "cuda", 2**34, capability=(8, 9)), Device("CPU", "cpu", None)):
        assert choose(fp8, device)[1][0].words == "--base_weights fp8"
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(ImportError, match=r"--base_weights nf4 needs bitsandbytes: pip install 'spo_fast\[8bit\]'"):
        import_for("nf4")
    monkeypatch.setattr(optional_packages.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"or use --base_weights int8"):
        optional_packages.check_extras(config(tmp_path, base_weights="nf4").flat())


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("kind", ["sd3", "flux"])
def test_transformers_take_a_quantised_base(how: str, kind: str) -> None:
    """Every linear layer of the blocks whose sizes fit, modulations of few rows included; fused as diffusers'."""
    plain, fused, exact = (build(kind, "published", torch.float32) for _ in range(3))
    layers = [quantise_base(network, how) for network in (plain, fused)]
    names = {n for n, m in fused.named_modules() if isinstance(m, QuantisedLinear)}
    blocks = [n for n, m in exact.named_modules() if type(m) is torch.nn.Linear and "transformer_blocks." in n]
    assert names == {n for n in blocks if "lora_" not in n} and len(layers[1]) == len(names)
    fuse(fused)
    told = inputs(kind, dtype=torch.float32)
    want = results(plain, told)
    assert error_of(results(fused, told), want) < 2e-2  # of a last bit that rounds to another step
    assert 1e-3 < error_of(results(exact, told), want) < 1
    with in_full(layers[1]):
        assert error_of(results(fused, told), results(exact, told)) < 1e-4


def test_int8_products_of_few_rows() -> None:
    """cuBLAS asks for more than 16: they are filled up with zeros, which changes no sum."""
    weight, x = quantise(randn(32, 48, seed=0), "int8"), randn(40, 48, seed=1)
    whole = quantised_linear(x, weight, None)
    for rows in (1, 16, 17):
        assert torch.equal(quantised_linear(x[:rows], weight, None), whole[:rows])
