"""ops/preference_loss.py against the papers' formulas in float64, on every backend that runs on this machine."""

from __future__ import annotations

import math

import pytest
import torch

from spo_fast.ops import preference_loss as module
from spo_fast.ops.backend import available_backends, use_backend
from spo_fast.ops.preference_loss import STATS, preference_loss

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = [pytest.mark.gpu] if DEVICE == "cuda" else []  # there, `pytest -m gpu` runs this file on the device
BACKENDS = available_backends("preference_loss", DEVICE)


def ratios(N, K, S, scale=0.08, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return (scale * torch.randn(N, K, S, generator=generator, dtype=torch.float64)).to(DEVICE, dtype)


def plackett_luce(log_ratio, weight, beta, clip):
    """- sum_n w_n log P(the given order), written as products of softmaxes over those that are left."""
    lo, hi = (math.log(1 - clip), math.log(1 + clip)) if clip else (-math.inf, math.inf)
    logits = beta * torch.clamp(log_ratio, lo, hi).mean(-1)
    total = 0.0
    for n in range(len(logits)):
        for i in range(logits.shape[1] - 1):
            left = logits[n, i:]
            total = total - weight[n] * (left[0].exp() / left.exp().sum()).log()
    return total


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(1, 2, 1), (7, 2, 1), (300, 2, 1), (5, 2, 3), (6, 4, 3)])
@pytest.mark.parametrize("clip", [0.1, None])
def test_loss_and_gradient_match_float64(backend, dtype, shape, clip, poisoned):
    x = ratios(*shape, dtype=dtype)
    weight = torch.linspace(0.5, 1.5, shape[0], dtype=dtype, device=DEVICE) / shape[0]
    exact = x.double().clone().requires_grad_()
    want = plackett_luce(exact, weight.double(), 10.0, clip)
    want.backward()
    x.requires_grad_()
    with use_backend(backend), poisoned():
        loss, stats = preference_loss(x, weight, 10.0, clip)
        (3 * loss).backward()
    assert stats.isfinite().all()
    tolerance = 2e-6 if dtype == torch.float32 else 1e-13
    assert abs(float(loss) - float(want)) < tolerance * abs(float(want))
    assert (x.grad.double() - 3 * exact.grad).abs().max() < 5 * tolerance * exact.grad.abs().max().clamp_min(1e-3)


@pytest.mark.parametrize("backend", BACKENDS)
def test_two_sides_by_hand(backend):
    # log-ratios 0.05 and -0.02, beta 10: logits 0.5 and -0.2; -log sigmoid(0.7) = log(1 + e^-0.7) = 0.403186
    # gradient on the winner: -10 sigmoid(-0.7) = -10 * 0.331812 = -3.31812
    x = torch.tensor([[[0.05], [-0.02]]], device=DEVICE, requires_grad=True)
    with use_backend(backend):
        loss, stats = preference_loss(x, torch.ones(1, device=DEVICE), 10.0, 0.1)
    loss.backward()
    assert loss.item() == pytest.approx(0.403186, abs=2e-6)
    assert x.grad.flatten().tolist() == pytest.approx([-3.31812, 3.31812], abs=2e-5)
    mean = dict(zip(STATS, stats.tolist(), strict=True))
    assert mean["margin"] == pytest.approx(0.7) and mean["accuracy"] == 1 and mean["terms"] == 1
    assert mean["ratio_best"] == pytest.approx(math.exp(0.05)) and mean["log_ratio_worst"] == pytest.approx(-0.02)
    assert mean["clamped"] == 0 and mean["dead"] == 0


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("side", [0, 1, 2])
@pytest.mark.parametrize("clip", [0.1, None])
def test_a_nan_is_not_clamped_away(backend, side, clip):
    """The loss tells of it, and the sides beside it get no finite gradient: training must not go on."""
    log_ratio = ratios(5, 3, 2, scale=0.01)
    log_ratio[3, side, 1] = float("nan")
    log_ratio.requires_grad_()
    with use_backend(backend):
        loss, stats = preference_loss(log_ratio, torch.full((5,), 0.2, device=DEVICE), 10.0, clip)
    loss.backward()
    assert loss.isnan() and stats[STATS.index("margin")].isnan() == (side != 1)
    others = [k for k in range(3) if k != side]
    assert log_ratio.grad[3, others].isnan().all() and log_ratio.grad[[0, 1, 2, 4]].isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_clamp_has_no_gradient_outside_on_either_side_and_no_nan(backend):
    # outside on the right side, outside on the wrong side, both, far beyond exp's range (the published form: NaN), and
    # just inside both ends: log 1.1 = 0.09531, log 0.9 = -0.10536
    x = torch.tensor([[0.2, 0.01], [-0.3, 0.01], [0.4, -0.5], [120.0, -400.0], [0.0943, -0.1043]], device=DEVICE)
    x = x.unsqueeze(-1).requires_grad_()
    with use_backend(backend):
        loss, stats = preference_loss(x, torch.ones(5, device=DEVICE), 10.0, 0.1)
    loss.backward()
    grad = x.grad.squeeze(-1).tolist()
    assert grad[0][0] == 0 and grad[0][1] > 0 and grad[1][0] == 0 and grad[1][1] > 0
    assert grad[2] == [0, 0] and grad[3] == [0, 0] and math.isfinite(loss.item())
    assert grad[4][0] < 0 < grad[4][1]
    sums = dict(zip(STATS, stats.tolist(), strict=True))
    assert sums["clamped"] == pytest.approx(0.5 + 0.5 + 1 + 1) and sums["dead"] == 2


@pytest.mark.parametrize("backend", BACKENDS)
def test_statistics_add_up_over_micro_batches(backend):
    x = ratios(9, 2, 1)
    weight = torch.full((9,), 1 / 9, device=DEVICE)
    with use_backend(backend):
        loss, stats = preference_loss(x, weight, 10.0, 0.1)
        parts = [preference_loss(x[s], weight[s], 10.0, 0.1) for s in (slice(0, 4), slice(4, 9))]
    assert torch.allclose(loss, parts[0][0] + parts[1][0], rtol=1e-6)
    assert torch.allclose(stats, parts[0][1] + parts[1][1], rtol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_terms(backend):
    x = ratios(0, 2, 1).requires_grad_()
    with use_backend(backend):
        loss, stats = preference_loss(x, torch.ones(0, device=DEVICE), 10.0, 0.1)
    loss.backward()
    assert loss.item() == 0 and not stats.any() and x.grad.shape == (0, 2, 1)


def test_errors():
    with pytest.raises(ValueError, match="K >= 2"):
        preference_loss(torch.zeros(3, 1, 1), torch.ones(3), 1.0, 0.1)
    with pytest.raises(ValueError, match="None turns the clamp off"):
        preference_loss(torch.zeros(3, 2, 1), torch.ones(3), 1.0, 1.5)


def test_gradcheck_of_the_definition():
    x = ratios(4, 3, 2, dtype=torch.float64).requires_grad_()
    with use_backend("eager"):
        torch.autograd.gradcheck(lambda x: preference_loss(x, torch.ones(4, device=DEVICE), 3.0, 0.1)[0], (x,))


@pytest.mark.skipif("triton" not in BACKENDS, reason="Triton needs a GPU or TRITON_INTERPRET=1")
def test_library_op_is_sound():
    x = ratios(5, 2, 1).requires_grad_()
    torch.library.opcheck(module.PREFERENCE_LOSS["triton"], (x, torch.ones(5, device=DEVICE), 10.0, -0.1, 0.1))


@pytest.mark.parametrize("backend", BACKENDS)
def test_compiles_without_a_graph_break(backend):
    x, weight = ratios(5, 2, 1), torch.ones(5, device=DEVICE)
    with use_backend(backend):
        torch._dynamo.reset()
        compiled = torch.compile(lambda x: preference_loss(x, weight, 10.0, 0.1), fullgraph=True, backend="aot_eager")
        for got, want in zip(compiled(x), preference_loss(x, weight, 10.0, 0.1), strict=True):
            assert torch.allclose(got, want, rtol=1e-6)
