"""ops/lora_linear.py against the formula in float64 and PEFT's LoRA layer, on every backend that runs here."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from spo_fast.ops.backend import available_backends, use_backend
from spo_fast.ops.lora_linear import DOWN_UP, MAX_RANK, OUTER, lora_linear, lora_linear_ref, lora_linears, lora_three

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = [pytest.mark.gpu] if DEVICE == "cuda" else []  # there, `pytest -m gpu` runs this file on the device
BACKENDS = available_backends("lora_linear", DEVICE)
SCALE = 0.7
SHAPES = [  # x's batch shape, I, O, rank: one element; ragged; text of SD-1.5, rank 4; a piece of SDXL, rank 64
    ((1,), 1, 1, 1),
    ((3, 7), 37, 53, 5),
    ((2, 77), 768, 320, 4),
    ((1, 130), 640, 640, 64),
]


def randn(*shape: int, seed: int, dtype=torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(DEVICE, dtype)


def case(batch, columns, rows, r, dtype, masters=torch.float32):
    """x, weight, bias, A, B, dy; the LoRA's share of the output is about a third of the base's."""
    x, dy = randn(*batch, columns, seed=0, dtype=dtype), randn(*batch, rows, seed=1, dtype=dtype)
    weight, bias = randn(rows, columns, seed=2).div(columns**0.5).to(dtype), randn(rows, seed=3, dtype=dtype)
    A, B = randn(r, columns, seed=4).div(columns**0.5).to(masters), randn(rows, r, seed=5).div(2 * r**0.5).to(masters)
    return x, weight, bias, A, B, dy


def truth(x, weight, bias, A, B, dy):
    """y and the gradients of sum(y dy), written out; float64."""
    x, weight, A, B, dy = (v.double() for v in (x, weight, A, B, dy))
    y = torch.einsum("...i,oi->...o", x, weight + SCALE * B @ A) + (0 if bias is None else bias.double())
    dW = torch.einsum("...o,...i->oi", dy, x)  # of the effective weight W + s B A
    return y, torch.einsum("...o,oi->...i", dy, weight + SCALE * B @ A), SCALE * B.t() @ dW, SCALE * dW @ A.t()


def results(function, x, weight, bias, A, B, dy):
    leaves = [v.detach().clone().requires_grad_() for v in (x, A, B)]
    y = function(leaves[0], weight, bias, *leaves[1:], SCALE)
    return y.detach(), *torch.autograd.grad(y, leaves, dy)


def errors(got, want):
    return [
        float((g.double() - w).abs().max() / w.abs().max().clamp_min(1e-30)) for g, w in zip(got, want, strict=True)
    ]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("masters", ["float32", "same"])
@pytest.mark.parametrize("shape", SHAPES)
def test_output_and_gradients_match_float64(backend, dtype, masters, shape):
    if backend == "triton" and dtype == torch.float64:
        pytest.skip("Triton takes Python scalars as float32; float64 is left to the other backends")
    if backend == "triton" and dtype == torch.bfloat16 and DEVICE == "cpu":
        pytest.skip("the interpreter misrounds bf16 stores")
    inputs = case(*shape, dtype, dtype if masters == "same" or dtype == torch.float64 else torch.float32)
    with use_backend(backend):
        got = results(lora_linear, *inputs)
    assert [g.dtype for g in got] == [dtype, dtype, inputs[3].dtype, inputs[4].dtype]
    want = truth(*inputs)
    floor = 1e-14 if dtype == torch.float64 else 1e-6
    if got[0].numel() == 1:
        floor = torch.finfo(dtype).eps / 2  # how near one number happens to round is luck
    for mine, definition in zip(errors(got, want), errors(results(lora_linear_ref, *inputs), want), strict=True):
        assert mine <= 2 * definition + floor
        assert (
            definition < {torch.float64: 1e-13, torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 5e-2}[dtype]
        )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bias", [True, False])
def test_agrees_with_peft(backend, bias):
    from peft import LoraConfig, inject_adapter_in_model

    x, weight, b, A, B, dy = case((2, 9), 24, 40, 6, torch.float32)
    model = torch.nn.Sequential(torch.nn.Linear(24, 40, bias=bias)).to(DEVICE)
    # a Python float of 4.2 / 6: PEFT's scale
    layer = inject_adapter_in_model(LoraConfig(r=6, lora_alpha=4.2, target_modules=["0"]), model)[0].double()
    layer.base_layer.weight.data.copy_(weight)
    if bias:
        layer.base_layer.bias.data.copy_(b)
    layer.lora_A["default"].weight.data.copy_(A)
    layer.lora_B["default"].weight.data.copy_(B)
    exact = x.double().requires_grad_()
    y = layer(exact)
    y.backward(dy.double())
    want = y.detach(), exact.grad, layer.lora_A["default"].weight.grad, layer.lora_B["default"].weight.grad
    with use_backend(backend):
        got = results(lora_linear, x, weight, b if bias else None, A, B, dy)
    assert max(errors(got, want)) < 2e-6
    assert layer.base_layer.weight.grad is None


@pytest.mark.parametrize("backend", BACKENDS)
def test_only_x_and_its_projection_are_saved(backend):
    dtype = torch.float32 if backend == "triton" and DEVICE == "cpu" else torch.bfloat16
    x, weight, bias, A, B, _ = case((4, 50), 64, 96, 8, dtype)
    saved = []
    with use_backend(backend), torch.autograd.graph.saved_tensors_hooks(lambda v: saved.append(v) or v, lambda v: v):
        lora_linear(x.requires_grad_(), weight, bias, A.requires_grad_(), B.requires_grad_(), SCALE)
    parameters = {v.data_ptr() for v in (weight, bias, A, B)}
    assert sorted(v.numel() for v in saved if v.data_ptr() not in parameters) == [200 * 8, 200 * 64]


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_that_nobody_asked_for_are_not_made(backend):
    x, weight, bias, A, B, dy = case((2, 9), 24, 40, 6, torch.float32)
    want = truth(x, weight, bias, A, B, dy)
    with use_backend(backend):
        A.requires_grad_(), B.requires_grad_()
        lora_linear(x, weight, bias, A, B, SCALE).backward(dy)  # text: x has no gradient
        assert x.grad is None and max(errors((A.grad, B.grad), want[2:])) < 2e-6
        x.requires_grad_()
        (dx,) = torch.autograd.grad(lora_linear(x, weight, bias, A.detach(), B.detach(), SCALE), x, dy)
    assert max(errors((dx,), want[1:2])) < 2e-6


@pytest.mark.parametrize("backend", BACKENDS)
def test_layouts_and_empty(backend):
    x, weight, bias, A, B, dy = case((3, 10), 24, 40, 6, torch.float32)
    with use_backend(backend):
        want = results(lora_linear, x, weight, bias, A, B, dy)

        def strided(v):
            return torch.stack([v, v], -1)[..., 0]

        assert not strided(x).is_contiguous()
        got = results(lora_linear, *map(strided, (x, weight, bias, A, B)), strided(dy))
        transposed = x.transpose(0, 1).contiguous().transpose(0, 1)  # (L, B, C) in memory
        others = results(lora_linear, transposed, weight, bias, A, B, dy.sum(-1, keepdim=True).expand_as(dy))
        y, *gradients = results(lora_linear, x[:0], weight, bias, A, B, dy[:0])
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(others[0], want[0], rtol=1e-5, atol=1e-5)
    exact = truth(x, weight, bias, A, B, dy.sum(-1, keepdim=True).expand_as(dy))
    assert max(errors(others, exact)) < 2e-6
    assert y.shape == (0, 10, 40) and gradients[0].shape == (0, 10, 24)
    assert not gradients[1].any() and not gradients[2].any()


@pytest.mark.skipif("triton" not in BACKENDS, reason="Triton needs a GPU or TRITON_INTERPRET=1")
@pytest.mark.parametrize("tokens", [1, 130, 700])  # 700: the outer product is summed over several pieces
def test_the_kernels_write_every_element(tokens, monkeypatch):
    x, _, bias, A, B, _ = case((tokens,), 70, 90, 5, torch.float32)
    empty = torch.Tensor.new_empty
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda *a, **k: empty(*a, **k).fill_(float("nan")))
    y, t = DOWN_UP["triton"](x, A, B, bias, SCALE)
    down = x.double() @ A.double().t()
    assert max(errors((y, t), (SCALE * down @ B.double().t() + bias.double(), down))) < 2e-6
    for p, q in ((t, x), (y, t)):  # the rank on either side
        assert errors((OUTER["triton"](p, q, SCALE),), (SCALE * p.double().t() @ q.double(),))[0] < 2e-6


def test_errors():
    x, weight, bias, A, B, _ = case((2, 9), 24, 40, 6, torch.float32)
    for bad in ((x[..., 1:], weight, bias, A, B), (x, weight, bias[1:], A, B), (x, weight, bias, A[1:], B)):
        with pytest.raises(ValueError, match="do not fit"):
            lora_linear(*bad, SCALE)
    with pytest.raises(TypeError, match="convert the base once"):
        lora_linear(x.half(), weight, bias, A, B, SCALE)
    with pytest.raises(ValueError, match="requires_grad_"):
        lora_linear(x, torch.nn.Parameter(weight), bias, A, B, SCALE)


@pytest.mark.skipif("triton" not in BACKENDS, reason="Triton needs a GPU or TRITON_INTERPRET=1")
def test_a_rank_beyond_the_kernels_is_an_error():
    x, weight, bias, A, B, _ = case((4,), 8, 8, MAX_RANK + 1, torch.float32)
    with use_backend("triton"), pytest.raises(ValueError, match="at most rank 128"):
        lora_linear(x, weight, bias, A, B, SCALE)


def test_gradcheck_of_the_definition():
    x, weight, bias, A, B, _ = case((2, 3), 4, 5, 2, torch.float64, torch.float64)
    leaves = tuple(v.requires_grad_() for v in (x, A, B))
    with use_backend("eager"):
        for function in (lora_linear_ref, lora_linear):
            torch.autograd.gradcheck(lambda x, A, B, f=function: f(x, weight, bias, A, B, SCALE), leaves)


@pytest.mark.skipif("triton" not in BACKENDS, reason="Triton needs a GPU or TRITON_INTERPRET=1")
def test_library_ops_are_sound():
    x, _, bias, A, B, dy = case((9,), 24, 40, 6, torch.float32)
    torch.library.opcheck(DOWN_UP["triton"], (x, A, B, bias, SCALE))
    torch.library.opcheck(DOWN_UP["triton"], (dy, B.t(), A.t(), None, SCALE))
    torch.library.opcheck(OUTER["triton"], (x, dy, SCALE))


@pytest.mark.parametrize("backend", BACKENDS)
def test_flops_are_counted(backend):
    inputs = case((2, 9), 24, 40, 6, torch.float32)
    with use_backend(backend), FlopCounterMode(display=False) as counter:
        results(lora_linear, *inputs)
    base, lora = 2 * 18 * 24 * 40, 2 * 18 * 6 * (24 + 40)
    assert counter.get_total_flops() == 2 * base + 3 * lora  # forward; dx; dA and dB


@pytest.mark.parametrize("backend", BACKENDS)
def test_compiles_without_a_graph_break(backend):
    inputs = case((2, 9), 24, 40, 6, torch.float32)
    with use_backend(backend):
        torch._dynamo.reset()
        compiled = torch.compile(lora_linear, fullgraph=True, backend="aot_eager")
        for got, want in zip(results(compiled, *inputs), results(lora_linear, *inputs), strict=True):
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("masters", ["float32", "same"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_layers_that_share_x_match_float64(backend, dtype, masters):
    """Three layers of one input, of other widths and ranks, with and without bias: the gradients of x add up."""
    if backend == "triton" and (dtype == torch.float64 or (dtype == torch.bfloat16 and DEVICE == "cpu")):
        pytest.skip("see above")
    own = dtype if masters == "same" or dtype == torch.float64 else torch.float32
    sizes = [(53, 5), (40, 5), (64, 3)]  # O, rank
    cases = [case((3, 7), 37, rows, r, dtype, own) for rows, r in sizes]
    x, layers = cases[0][0], [c[1:5] for c in cases]
    layers[1] = (layers[1][0], None, *layers[1][2:])
    dys = [randn(3, 7, rows, seed=10 + i, dtype=dtype) for i, (rows, _) in enumerate(sizes)]
    want = [truth(x, *layer, dy) for layer, dy in zip(layers, dys, strict=True)]

    def run(function):
        leaf = x.clone().requires_grad_()
        trained = [(w, b, A.clone().requires_grad_(), B.clone().requires_grad_()) for w, b, A, B in layers]
        out = function(leaf, trained)
        torch.autograd.backward(out, dys)
        grads = [g for _, _, A, B in trained for g in (A.grad, B.grad)]
        return [*(y.detach() for y in out), leaf.grad, *grads]

    exact = [*(w[0] for w in want), sum(w[1] for w in want), *(g for w in want for g in w[2:])]
    with use_backend(backend):
        got = run(lambda x, layers: lora_linears(x, layers, SCALE))
    eager = run(lambda x, layers: [lora_linear_ref(x, *layer, SCALE) for layer in layers])
    assert [g.dtype for g in got] == [*[dtype] * 4, *[own] * 6]
    floor = 1e-14 if dtype == torch.float64 else 1e-6
    for mine, definition in zip(errors(got, exact), errors(eager, exact), strict=True):
        assert mine <= 2 * definition + floor
    with use_backend(backend), pytest.raises(ValueError, match="do not fit"):
        lora_linears(x[..., 1:], layers, SCALE)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64])
@pytest.mark.parametrize(
    ("tokens", "columns", "rows", "r"), [((1,), 1, 1, 1), ((3, 7), 37, 53, 5), ((2, 70), 64, 96, 8)]
)
def test_queries_keys_and_values_without_gradient(backend, dtype, tokens, columns, rows, r):
    if backend == "triton" and dtype == torch.float64:
        pytest.skip("Triton takes Python scalars as float32; float64 is left to the other backends")
    x = randn(*tokens, columns, seed=0, dtype=dtype)
    weight = randn(3 * rows, columns, seed=1).div(columns**0.5).to(dtype)
    downs = [randn(r, columns, seed=2 + i).div(columns**0.5).to(dtype) for i in range(3)]
    ups = [randn(rows, r, seed=5 + i).div(2 * r**0.5).to(dtype) for i in range(3)]
    layers = list(zip(weight.split(rows), downs, ups, strict=True))
    with use_backend(backend):
        got = lora_three(x, weight, downs, ups, SCALE)
    want = [truth(x, W, None, A, B, x.new_zeros(*tokens, rows))[0] for W, A, B in layers]
    apart = [lora_linear_ref(x, W, None, A, B, SCALE) for W, A, B in layers]
    floor = {torch.float64: 1e-14, torch.float32: 1e-6, torch.float16: 1e-3}[dtype]
    for mine, definition in zip(errors(got, want), errors(apart, want), strict=True):
        assert mine <= 2 * definition + floor
    with pytest.raises(ValueError, match="do not fit"):
        lora_three(x, weight, downs, [up[:, 1:] for up in ups] if r > 1 else [up[1:] for up in ups], SCALE)
    wider = torch.cat([downs[1], downs[1]]), torch.cat([ups[1], ups[1]], 1)
    with pytest.raises(ValueError, match="one rank"):
        lora_three(x, weight, [downs[0], wider[0], downs[2]], [ups[0], wider[1], ups[2]], SCALE)


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_rows_give_none(backend):
    _, weight, bias, A, B, _ = case((4, 50), 64, 96, 8, torch.float32)
    with use_backend(backend):
        assert [y.shape for y in lora_linears(torch.zeros(0, 5, 64), [(weight, bias, A, B)] * 2, SCALE)] == [
            (0, 5, 96)
        ] * 2


def test_layers_that_share_x_save_it_once_and_read_it_once():
    x, weight, bias, A, B, _ = case((4, 50), 64, 96, 8, torch.float32)
    saved = []
    layers = [(weight, bias, A.clone().requires_grad_(), B.clone().requires_grad_()) for _ in range(3)]
    with (
        use_backend("eager"),
        torch.autograd.graph.saved_tensors_hooks(lambda v: saved.append(v) or v, lambda v: v),
        FlopCounterMode(display=False) as flops,
    ):
        lora_linears(x.requires_grad_(), layers, SCALE)
    kept = {v.untyped_storage().data_ptr() for v in saved}
    weights = {v.untyped_storage().data_ptr() for layer in layers for v in layer}
    assert len(kept - weights) == 2  # x, and the three t's in one tensor
    assert flops.get_total_flops() == 3 * 2 * 200 * (64 * 96 + 8 * (64 + 96))
