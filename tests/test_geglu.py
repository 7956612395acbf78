"""ops/geglu.py against the formula in float64, on every backend that runs on this machine."""

from __future__ import annotations

import math

import pytest
import torch

from spo_fast.ops import geglu as module
from spo_fast.ops.backend import available_backends, use_backend
from spo_fast.ops.geglu import geglu

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = [pytest.mark.gpu] if DEVICE == "cuda" else []  # there, `pytest -m gpu` runs this file on the device
BACKENDS = available_backends("geglu", DEVICE)
needs_triton = pytest.mark.skipif("triton" not in BACKENDS, reason="Triton needs a GPU or TRITON_INTERPRET=1")


def case(shape, dtype=torch.float32, scale=2.0):
    """h (..., 2D), 2D the last of `shape`, and the output's gradient."""
    generator = torch.Generator().manual_seed(0)
    h = scale * torch.randn(shape, generator=generator, dtype=torch.float64)
    grad_y = torch.randn((*shape[:-1], shape[-1] // 2), generator=generator, dtype=torch.float64)
    return h.to(DEVICE, dtype), grad_y.to(DEVICE, dtype)


def truth(h, grad_y):
    """y = a g Phi(g) and its gradient, Phi from the error function (Shazeer 2020; Hendrycks and Gimpel 2016)."""
    a, g = h.double().chunk(2, -1)
    cdf = torch.special.erfc(-g / 2**0.5) / 2  # torch.special.ndtr has no digits in the tail
    density = torch.exp(-(g**2) / 2) / math.sqrt(2 * math.pi)
    grad = grad_y.double()
    return a * g * cdf, torch.cat([grad * g * cdf, grad * a * (cdf + g * density)], -1)


def run(backend, h, grad_y):
    h = h.detach().requires_grad_()
    with use_backend(backend):
        y = geglu(h)
    return y.detach(), torch.autograd.grad(y, h, grad_y)[0]


def max_error(x, y):
    return float((x.double() - y).abs().max() / y.abs().max().clamp_min(1))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("shape", [(1, 2), (3, 7, 74), (2, 3, 2 * 1280), (4, 2 * 5120)])  # one, ragged, real
@pytest.mark.parametrize("scale", [2.0, 12.0])  # 12: far into both tails of gelu
def test_output_and_gradient_match_float64(backend, dtype, shape, scale):
    if backend == "triton" and dtype == torch.float64:
        pytest.skip("the kernel computes in float32; float64 is left to the other backends")
    if backend == "triton" and dtype == torch.bfloat16 and DEVICE == "cpu":
        pytest.skip("the interpreter misrounds bf16 stores")
    inputs = case(shape, dtype, scale)
    floor = 1e-14 if dtype == torch.float64 else 1e-6
    for got, eager, exact in zip(run(backend, *inputs), run("eager", *inputs), truth(*inputs), strict=True):
        assert got.dtype == dtype and got.shape == exact.shape
        assert max_error(got, exact) <= 2 * max_error(eager, exact) + floor
        assert max_error(got, exact) < {torch.float64: 1e-14, torch.float32: 1e-6}.get(dtype, 1e-2)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64])
def test_a_bias_is_added_first(backend, dtype):
    """With the gradient of a bias that is trained; the same from a product that brings none as from one that does."""
    if backend == "triton" and dtype == torch.float64:
        pytest.skip("the kernel computes in float32; float64 is left to the other backends")
    h, grad_y = case((3, 7, 600), dtype)
    bias = torch.linspace(-2, 2, 600, dtype=torch.float64).to(DEVICE, dtype)
    inputs = h.detach().requires_grad_(), bias.requires_grad_()
    with use_backend(backend):
        y = geglu(*inputs)
    found = [y.detach(), *torch.autograd.grad(y, inputs, grad_y)]
    exact_y, exact = truth(h.double() + bias.detach().double(), grad_y)
    limit = {torch.float64: 1e-14, torch.float32: 1e-6}.get(dtype, 1e-2)
    for got, want in zip(found, (exact_y, exact, exact.sum((0, 1))), strict=True):
        assert got.shape == want.shape and max_error(got, want) < limit
    for wrong in (bias[:300], bias.double() if dtype != torch.float64 else bias.float()):
        with pytest.raises(ValueError, match=r"the bias is .* h asks for \(600,\)"):
            geglu(h, wrong)


@pytest.mark.skipif("c" not in BACKENDS, reason="the C library is the CPU's")
def test_the_tail_keeps_its_digits():
    """Gates of -12 to -1, where 1 + erf has none left; a gate of infinity or NaN shows."""
    g = torch.linspace(-12, -1, 1001)
    h = torch.cat([torch.ones_like(g), g])[None]
    y, grad = run("c", h, torch.ones(1, 1001))
    wide = g.double()
    cdf, density = torch.special.erfc(-wide / 2**0.5) / 2, torch.exp(-(wide**2) / 2) / math.sqrt(2 * math.pi)
    exact = wide * cdf
    for got, want in ((y[0], exact), (grad[0, :1001], exact), (grad[0, 1001:], cdf + wide * density)):
        assert ((got.double() - want) / want).abs().max() < 1e-5
    with use_backend("c"):
        assert str(geglu(torch.tensor([[1.0, 1.0, torch.inf, torch.nan]])).tolist()) == "[[inf, nan]]"
    _, grad = run("c", torch.tensor([[1.0, 1.0, -1e38, 1e38]]), torch.ones(1, 2))
    assert torch.equal(grad.abs(), torch.tensor([[0.0, 1e38, 0.0, 1.0]]))


@pytest.mark.parametrize("backend", BACKENDS)
def test_by_hand(backend):
    # gelu(1) = Phi(1) = 0.8413447; gelu'(1) = Phi(1) + phi(1) = 0.8413447 + 0.2419707; a = 3, dy = 2
    h = torch.tensor([[3.0, 1.0]], device=DEVICE)
    y, grad = run(backend, h, torch.tensor([[2.0]], device=DEVICE))
    assert y.item() == pytest.approx(2.524034, abs=1e-5)
    assert grad.flatten().tolist() == pytest.approx([1.682689, 6.499892], abs=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_strides_and_empty(backend):
    h, grad_y = case((4, 6, 20))
    want = run(backend, h, grad_y)
    wide = torch.cat([h, h], -1)
    for view in (wide[..., :20], h.transpose(0, 1).contiguous().transpose(0, 1)):
        assert all(torch.equal(a, b) for a, b in zip(run(backend, view, grad_y), want, strict=True))
    y, grad = run(backend, h[:0], grad_y[:0])
    assert y.shape == (0, 6, 10) and grad.shape == (0, 6, 20)
    with pytest.raises(ValueError, match="must be even"):
        geglu(h[..., :19])


@needs_triton
@pytest.mark.parametrize("shape", [(3, 7, 74), (2, 2 * 1280)])
def test_every_element_is_written(shape, monkeypatch):
    """Memory from the allocator holds NaN here."""
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    inputs = case(shape)
    want = run("eager", *inputs)
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty_like(inputs[0]).isnan().all()
        got = run("triton", *inputs)
    finally:
        torch.use_deterministic_algorithms(False)
    for mine, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)


@needs_triton
def test_saves_only_h():
    h, _ = case((5, 12))
    saved = []
    with use_backend("triton"), torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        geglu(h.requires_grad_())
    assert [t.data_ptr() for t in saved] == [h.data_ptr()]


def test_gradcheck_of_the_definition():
    h, _ = case((3, 8), torch.float64)
    with use_backend("eager"):
        torch.autograd.gradcheck(geglu, (h.requires_grad_(),))


@needs_triton
def test_library_op_is_sound():
    for bias in (None, torch.ones(8, device=DEVICE)):
        torch.library.opcheck(module.GEGLU["triton"], (case((3, 8))[0].requires_grad_(), bias))


@pytest.mark.parametrize("backend", BACKENDS)
def test_compiles_without_a_graph_break(backend):
    h, grad_y = case((3, 8))
    with use_backend(backend):
        torch._dynamo.reset()
        mine = h.clone().requires_grad_()
        got = torch.compile(geglu, fullgraph=True, backend="aot_eager")(mine)
        y, grad = run(backend, h, grad_y)
        torch.testing.assert_close(got.detach(), y)
        torch.testing.assert_close(torch.autograd.grad(got, mine, grad_y)[0], grad)


def test_one_row_without_a_batch_has_a_bias_gradient():
    h = torch.tensor([1.0, 2.0, 3.0, -1.0, 0.5, 0.25], dtype=torch.float64, requires_grad=True)
    bias = torch.zeros(6, dtype=torch.float64, requires_grad=True)
    for backend_name in ("c", "eager"):
        if backend_name in available_backends("geglu", "cpu"):
            with use_backend(backend_name):
                grad_h, grad_bias = torch.autograd.grad(geglu(h, bias).sum(), (h, bias))
            assert torch.equal(grad_h, grad_bias)
