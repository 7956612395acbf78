"""ops/ada_norm.py against the formulas in float64, on every backend that runs on this machine."""

from __future__ import annotations

import pytest
import torch

from spo_fast.ops import ada_norm as module
from spo_fast.ops.ada_norm import ada_norm
from spo_fast.ops.backend import available_backends, use_backend

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = [pytest.mark.gpu] if DEVICE == "cuda" else []
BACKENDS = available_backends("ada_norm", DEVICE)
needs_triton = pytest.mark.skipif("triton" not in BACKENDS, reason="Triton needs a GPU or TRITON_INTERPRET=1")
KINDS = [(0, 1), (1, 1), (2, 1), (1, 2), (0, 2)]  # residuals, norms


def case(kind, shape, dtype=torch.float32, mean=0.0):
    """x, modulations, residuals, and the outputs' gradients; modulations are columns of one matrix, as in a block."""
    generator = torch.Generator().manual_seed(0)
    (residuals, norms), (B, L, D) = kind, shape

    def draw(*size):
        return torch.randn(size, generator=generator, dtype=torch.float64)

    columns = draw(B, (2 * norms + residuals) * D).to(DEVICE, dtype).split(D, 1)
    x = (draw(B, L, D) + mean).to(DEVICE, dtype)
    ys = [draw(B, L, D).to(DEVICE, dtype) for _ in range(residuals)]
    grads = [draw(B, L, D).to(DEVICE, dtype) for _ in range(1 + norms)]
    modulations = [(columns[2 * i], columns[2 * i + 1]) for i in range(norms)]
    return x, modulations, list(zip(columns[2 * norms :], ys, strict=True)), grads


def flat(x, modulations, residuals):
    return [x, *(v for pair in (*modulations, *residuals) for v in pair)]


def nested(tensors, kind):
    x, *rest = tensors
    pairs = [(rest[i], rest[i + 1]) for i in range(0, len(rest), 2)]
    return x, pairs[: kind[1]], pairs[kind[1] :]


def truth(kind, x, modulations, residuals, grads):
    """h and each n; gradients to x, each shift and scale, each gate and y: adaLN-Zero, differentiated by hand."""
    x = x.double() + sum(gate.double()[:, None] * y.double() for gate, y in residuals)
    mean, variance = x.mean(-1, keepdim=True), x.var(-1, keepdim=True, correction=0)
    rstd = (variance + 1e-6).rsqrt()
    x_hat = (x - mean) * rstd
    norms = [x_hat * (1 + scale.double()[:, None]) + shift.double()[:, None] for shift, scale in modulations]
    grad_h, *grad_ns = (g.double() for g in grads)
    t = sum((1 + scale.double()[:, None]) * g for (_, scale), g in zip(modulations, grad_ns, strict=True))
    dx = grad_h + rstd * (t - t.mean(-1, keepdim=True) - x_hat * (t * x_hat).mean(-1, keepdim=True))
    out = [dx]
    for g in grad_ns:
        out += [g.sum(1), (g * x_hat).sum(1)]
    for gate, y in residuals:
        out += [(y.double() * dx).sum(1), gate.double()[:, None] * dx]
    return [x, *norms], out


def run(backend, kind, x, modulations, residuals, grads):
    inputs = [v.detach().requires_grad_() for v in flat(x, modulations, residuals)]
    with use_backend(backend):
        out = ada_norm(*nested(inputs, kind))
    return [v.detach() for v in out], list(torch.autograd.grad(out, inputs, grads))


def max_error(x, y):
    return float((x.double() - y).abs().max() / y.abs().max().clamp_min(1))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("shape", [(1, 1, 8), (3, 5, 74), (2, 3, 1536)])  # one, ragged, real
@pytest.mark.parametrize("kind", KINDS)
def test_outputs_and_gradients_match_float64(backend, dtype, shape, kind):
    if backend == "triton" and dtype == torch.float64:
        pytest.skip("the kernel computes in float32; float64 is left to the other backends")
    if backend == "triton" and dtype == torch.bfloat16 and DEVICE == "cpu":
        pytest.skip("the interpreter misrounds bf16 stores")
    inputs = case(kind, shape, dtype)
    exact, found, eager = truth(kind, *inputs), run(backend, kind, *inputs), run("eager", kind, *inputs)
    # one token has few roundings: luck decides by how much
    floor = {torch.float64: 1e-13, torch.float32: 3e-6}.get(dtype, torch.finfo(dtype).eps)
    for parts in zip(found, eager, exact, strict=True):
        for got, plain, want in zip(*parts, strict=True):
            assert got.dtype == dtype and got.shape == want.shape
            assert max_error(got, want) <= 2 * max_error(plain, want) + floor


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_mean_far_above_the_deviation(backend):
    inputs = case((0, 1), (2, 4, 1536), mean=1000.0)
    exact, found = truth((0, 1), *inputs), run(backend, (0, 1), *inputs)
    assert max_error(found[0][1], exact[0][1]) < 1e-3  # of values of 1000, float32 has 6e-5 of a deviation


@pytest.mark.parametrize("backend", BACKENDS)
def test_by_hand(backend):
    # h = (1, 3) + 2 (1, 2) = (3, 7): mean 5, deviation 2, x_hat = (-1, 1)
    x, y = torch.tensor([[[1.0, 3.0]]], device=DEVICE), torch.tensor([[[1.0, 2.0]]], device=DEVICE)
    two, shift, scale = (torch.tensor([v], device=DEVICE) for v in ([2.0, 2.0], [0.5, 0.5], [1.0, 2.0]))
    with use_backend(backend):
        h, n = ada_norm(x, [(shift, scale)], [(two, y)])
    assert h.flatten().tolist() == [3.0, 7.0]
    assert n.flatten().tolist() == pytest.approx([-1.5, 3.5], abs=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_strides_and_empty(backend):
    """Tokens of a joint tensor, modulations of different matrices, gradients of one output alone, no samples."""
    kind = (1, 1)
    x, modulations, residuals, grads = case(kind, (2, 6, 20))
    want = run(backend, kind, x, modulations, residuals, grads)
    joint = torch.cat([torch.ones_like(x[:, :3]), x], 1)[:, 3:]
    apart = [(shift.clone(), scale) for shift, scale in modulations]
    strided = x.transpose(1, 2).contiguous().transpose(1, 2)
    for view, mods in ((joint, modulations), (x, apart), (strided, modulations)):
        got = run(backend, kind, view, mods, residuals, grads)
        pairs = zip((*got[0], *got[1]), (*want[0], *want[1]), strict=True)
        assert all(torch.allclose(a, b, atol=1e-5) for a, b in pairs)
    mine = x.clone().requires_grad_()
    with use_backend(backend):
        h, n = ada_norm(mine, modulations, residuals)
        alone = [torch.autograd.grad(v, mine, g, retain_graph=True)[0] for v, g in zip((h, n), grads, strict=True)]
        torch.testing.assert_close(sum(alone), want[1][0])
        empty = ada_norm(x[:0], [(s[:0], c[:0]) for s, c in modulations])
    assert [v.shape for v in empty] == [(0, 6, 20)] * 2
    for wrong in (([], []), (modulations * 3, []), ([(x[:, 0].double(), x[:, 0])], []), (modulations, [(x[0], x)])):
        with pytest.raises(ValueError, match="ada_norm"):
            ada_norm(x, *wrong)


@needs_triton
@pytest.mark.parametrize("trained", [False, True])
def test_saves_the_stream_and_what_a_trained_gate_asks_for(trained):
    x, modulations, residuals, _ = case((1, 1), (2, 3, 64))
    (gate, y), saved = residuals[0], []
    gate, y = gate.clone().requires_grad_(trained), y.requires_grad_()
    with use_backend("triton"), torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        h, _ = ada_norm(x.requires_grad_(), modulations, [(gate, y)])
    assert [t.data_ptr() for t in saved if t.numel() >= x.numel()] == [h.data_ptr(), *[y.data_ptr()] * trained]


def test_gradcheck_of_the_definition():
    inputs = case((1, 2), (2, 3, 6), torch.float64)
    tensors = [v.clone().requires_grad_() for v in flat(*inputs[:3])]
    with use_backend("eager"):
        torch.autograd.gradcheck(lambda *v: ada_norm(*nested(v, (1, 2))), tensors)


@needs_triton
def test_library_op_is_sound():
    x, modulations, residuals, _ = case((1, 1), (2, 3, 8))
    (shift, scale), (gate, y) = modulations[0], residuals[0]
    torch.library.opcheck(module.ADA_NORM["triton"], (x, [gate], [y], [shift], [scale], 1e-6))
    n, h, mean, rstd = module.ADA_NORM["triton"](x, [gate], [y], [shift], [scale], 1e-6)
    torch.library.opcheck(module.GRADIENT["triton"], (h, mean, rstd, [gate], [scale], None, [n]))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", [(0, 1), (1, 2)])
def test_compiles_without_a_graph_break(backend, kind):
    x, modulations, residuals, grads = case(kind, (2, 3, 8))
    with use_backend(backend):
        torch._dynamo.reset()
        mine = [v.detach().clone().requires_grad_() for v in flat(x, modulations, residuals)]
        compiled = torch.compile(lambda *v: ada_norm(*nested(v, kind)), fullgraph=True, backend="aot_eager")
        got = compiled(*mine)
        out, wanted = run(backend, kind, x, modulations, residuals, grads)
        for a, b in zip((*got, *torch.autograd.grad(got, mine, grads)), (*out, *wanted), strict=True):
            torch.testing.assert_close(a, b)
