"""ops/gelu_tanh.py against the formula in float64, on every backend that runs on this machine."""

from __future__ import annotations

import math

import pytest
import torch

from spo_fast.ops import gelu_tanh as module
from spo_fast.ops.backend import available_backends, use_backend
from spo_fast.ops.gelu_tanh import gelu_tanh

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = [pytest.mark.gpu] if DEVICE == "cuda" else []
BACKENDS = available_backends("gelu_tanh", DEVICE)
needs_triton = pytest.mark.skipif("triton" not in BACKENDS, reason="Triton needs a GPU or TRITON_INTERPRET=1")


def draw(*shape, dtype=torch.float32, scale=2.0, seed=0):
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (scale * values).to(DEVICE, dtype)


def truth(h, before, grad_y):
    """y, dh and dbefore by z (1 + tanh u) / 2 (Hendrycks and Gimpel 2016), its derivative taken by hand."""
    z = h.double()
    u = math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)
    y = z * torch.special.expit(2 * u)
    slope = math.sqrt(2 / math.pi) * (1 + 3 * 0.044715 * z**2)
    derivative = torch.special.expit(2 * u) + 0.5 * z * slope / torch.cosh(u.clamp(-300, 300)) ** 2
    P = grad_y.shape[-1] - h.shape[-1]
    dh = grad_y.double()[..., P:] * derivative
    y = y if before is None else torch.cat([before.double(), y], -1)
    return y, dh, grad_y.double()[..., :P]


def run(backend, h, before, grad_y):
    inputs = [v.detach().requires_grad_() for v in (h, before) if v is not None]
    with use_backend(backend):
        y = gelu_tanh(*inputs)
    return y.detach(), *torch.autograd.grad(y, inputs, grad_y), *[None] * (before is None)


def max_error(x, y):
    return float((x.double() - y).abs().max() / y.abs().max().clamp_min(1))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("shape", [(1, 1), (3, 7, 37), (2, 3, 6144)])  # one, ragged, real
@pytest.mark.parametrize("width", [0, 5, 1536])  # of the columns before
@pytest.mark.parametrize("scale", [2.0, 12.0])  # 12: far into both tails
def test_output_and_gradients_match_float64(backend, dtype, shape, width, scale):
    if backend == "triton" and dtype == torch.float64:
        pytest.skip("the kernel computes in float32; float64 is left to the other backends")
    if backend == "triton" and dtype == torch.bfloat16 and DEVICE == "cpu":
        pytest.skip("the interpreter misrounds bf16 stores")
    h, grad_y = draw(*shape, dtype=dtype, scale=scale), draw(*shape[:-1], width + shape[-1], dtype=dtype, seed=1)
    before = draw(*shape[:-1], width, dtype=dtype, seed=3) if width else None
    exact = truth(h, before, grad_y)
    found, eager = (run(name, h, before, grad_y) for name in (backend, "eager"))
    for got, plain, want in zip(found, eager, exact, strict=True):
        if got is not None:
            floor = 1e-13 if dtype == torch.float64 else 2e-6
            assert got.dtype == dtype and got.shape == want.shape
            assert max_error(got, want) <= 2 * max_error(plain, want) + floor


@pytest.mark.parametrize("backend", BACKENDS)
def test_by_hand(backend):
    # gelu(1) = .5 (1 + tanh(.7978846 * 1.044715)) = .8411920; gelu'(1) = .8411920 + .5 * .9049235 / cosh^2(.8335620)
    y, grad, _ = run(backend, torch.tensor([[1.0]], device=DEVICE), None, torch.tensor([[2.0]], device=DEVICE))
    assert y.item() == pytest.approx(0.841192, abs=1e-6)
    assert grad.item() == pytest.approx(2 * (0.841192 + 0.5 * 0.9049235 / math.cosh(0.8335620) ** 2), abs=1e-5)


@needs_triton
def test_far_out_gradients_are_their_limits():
    h = torch.tensor([[-1e38, -300.0, 300.0, 1e38]], device=DEVICE)
    y, grad, _ = run("triton", h, None, torch.ones(1, 4, device=DEVICE))
    assert y.abs().tolist() == h.clamp(min=0).tolist() and grad.abs().tolist() == [[0.0, 0.0, 1.0, 1.0]]
    with use_backend("triton"):
        assert gelu_tanh(torch.tensor([[torch.nan]], device=DEVICE)).isnan().all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_strides_empty_and_what_does_not_fit(backend):
    h, grad_y = draw(4, 6, 20), draw(4, 6, 27, seed=1)
    before = draw(4, 6, 7, seed=2)
    want = run(backend, h, before, grad_y)
    wide = torch.cat([h, h], -1)
    for view in (wide[..., :20], h.transpose(0, 1).contiguous().transpose(0, 1)):
        found = run(backend, view, before, grad_y)
        assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(found, want, strict=True))
    y, grad, grad_before = run(backend, h[:0], before[:0], grad_y[:0])
    assert y.shape == (0, 6, 27) and grad.shape == (0, 6, 20) and grad_before.shape == (0, 6, 7)
    for columns in (before[:2], before.double()):
        with pytest.raises(ValueError, match="beside h"):
            gelu_tanh(h, columns)


@needs_triton
def test_saves_only_h():
    h, before = draw(5, 12), draw(5, 3)
    saved = []
    with use_backend("triton"), torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        gelu_tanh(h.requires_grad_(), before.requires_grad_())
    assert {t.data_ptr() for t in saved} == {h.data_ptr()}


def test_gradcheck_of_the_definition():
    inputs = [draw(*shape, dtype=torch.float64).requires_grad_() for shape in ((3, 8), (3, 2))]
    with use_backend("eager"):
        torch.autograd.gradcheck(gelu_tanh, inputs)


@needs_triton
def test_library_op_is_sound():
    for before in (None, draw(3, 2).requires_grad_()):
        torch.library.opcheck(module.GELU_TANH["triton"], (draw(3, 8).requires_grad_(), before))


@pytest.mark.parametrize("backend", BACKENDS)
def test_compiles_without_a_graph_break(backend):
    h, grad_y = draw(3, 8), draw(3, 8, seed=1)
    with use_backend(backend):
        torch._dynamo.reset()
        mine = h.clone().requires_grad_()
        got = torch.compile(gelu_tanh, fullgraph=True, backend="aot_eager")(mine)
        y, grad, _ = run(backend, h, None, grad_y)
        torch.testing.assert_close(got.detach(), y)
        torch.testing.assert_close(torch.autograd.grad(got, mine, grad_y)[0], grad)
