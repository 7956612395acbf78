"""ops/group_norm_silu.py against the formula in float64, on every backend that runs on this machine."""

from __future__ import annotations

import pytest
import torch

from spo_fast.ops.backend import available_backends, choose, table, use_backend
from spo_fast.ops.group_norm_silu import GROUP_NORM_SILU, group_norm_silu

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = [pytest.mark.gpu] if DEVICE == "cuda" else []  # there, `pytest -m gpu` runs this file on the device
BACKENDS = available_backends("group_norm_silu", DEVICE)
KERNELS = [b for b in BACKENDS if b != "eager"]
DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]
LAYOUTS = [torch.contiguous_format, torch.channels_last]
SHAPES = [  # and the number of groups
    ((1, 2, 1, 1), 1),
    ((3, 30, 7, 5), 6),  # ragged
    ((2, 12, 20, 17), 2),  # several chunks of pixels
    ((1, 640, 16, 16), 32),  # SD1.5's
]


def randn(*shape: int, seed: int, dtype=torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(DEVICE, dtype)


def case(shape, dtype=torch.float32, layout=torch.contiguous_format, mean=0.3, std=1.5):
    """x, weight, bias and the output's gradient."""
    x = (mean + std * randn(*shape, seed=0, dtype=torch.float64)).to(dtype).contiguous(memory_format=layout)
    weight = (1 + 0.3 * randn(shape[1], seed=1, dtype=torch.float64)).to(dtype)
    return x, weight, randn(shape[1], seed=2, dtype=dtype), randn(*shape, seed=3, dtype=dtype)


def truth(x, weight, bias, grad_y, groups, silu, eps=1e-5):
    """y and dL/dx in float64 from Wu and He 2018, eq. 1 to 3, and Elfwing et al. 2017's SiLU."""
    x = x.double().requires_grad_()
    grouped = x.reshape(x.shape[0], groups, -1)
    centred = grouped - grouped.sum(-1, keepdim=True) / grouped.shape[-1]
    variance = (centred**2).sum(-1, keepdim=True) / grouped.shape[-1]
    z = (centred / (variance + eps).sqrt()).reshape(x.shape)
    z = z * weight.double().view(-1, 1, 1) + bias.double().view(-1, 1, 1)
    y = z / (1 + torch.exp(-z)) if silu else z
    return y.detach(), torch.autograd.grad(y, x, grad_y.double())[0]


def run(backend, x, weight, bias, grad_y, groups, silu):
    x = x.detach().requires_grad_()
    with use_backend(backend):
        y = group_norm_silu(x, weight, bias, groups, silu=silu)
    return y.detach(), torch.autograd.grad(y, x, grad_y)[0]


def max_error(x, y):
    return float((x.double() - y).abs().max() / y.abs().max().clamp_min(1))


def skip_unless_sound(backend, dtype):
    if backend == "triton" and dtype == torch.float64:
        pytest.skip("the kernels compute in float32; float64 is left to the other backends")
    if backend == "triton" and dtype == torch.bfloat16 and DEVICE == "cpu":
        pytest.skip("the interpreter misrounds bf16 stores")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("shape", "groups"), SHAPES)
@pytest.mark.parametrize("silu", [True, False])
def test_output_and_gradient_match_float64(backend, dtype, layout, shape, groups, silu):
    skip_unless_sound(backend, dtype)
    inputs = case(shape, dtype, layout)
    want = truth(*inputs, groups, silu)
    floor = 1e-13 if dtype == torch.float64 else 1e-6
    mine, theirs = run(backend, *inputs, groups, silu), run("eager", *inputs, groups, silu)
    assert mine[0].is_contiguous(memory_format=layout)
    for got, eager, exact in zip(mine, theirs, want, strict=True):
        assert got.dtype == dtype
        assert max_error(got, exact) <= 2 * max_error(eager, exact) + floor
        assert max_error(got, exact) < {torch.float64: 1e-12, torch.float32: 1e-5}.get(dtype, 1e-2)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("dtype", "mean", "std", "bound"),
    [(torch.float32, 1000, 0.01, 0.01), (torch.float16, 30, 0.1, 2e-3), (torch.bfloat16, 30, 0.1, 1e-2)],
)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_mean_far_above_std(backend, dtype, mean, std, bound, layout):
    """Also where PyTorch's channels-last kernel for CPUs has lost every digit."""
    skip_unless_sound(backend, dtype)
    inputs = case((2, 64, 9, 7), dtype, layout, mean, std)
    want = truth(*inputs, 8, True)
    got, eager = run(backend, *inputs, 8, True), run("eager", *inputs, 8, True)
    for mine, theirs, exact in zip(got, eager, want, strict=True):
        assert max_error(mine, exact) <= 2 * max_error(theirs, exact) + 1e-6
        assert max_error(mine, exact) < bound
    # the formula that must not be used misses by more than the bound: this test can see it
    x = inputs[0].float().reshape(2, 8, -1)
    variance = (x**2).mean(-1) - x.mean(-1) ** 2
    exact = inputs[0].double().reshape(2, 8, -1).var(-1, unbiased=False)
    missed = float((variance / exact - 1).abs().max())
    assert dtype != torch.float32 or missed > 1


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_mean_is_right_to_the_last_bit_of_float32(backend, layout):
    """Near 1000 floats lie 6.1e-5 apart: an error of the mean counts 100 times in y where std is 0.01."""
    x, weight, bias, _ = case((2, 64, 9, 7), torch.float32, layout, 1000, 0.01)
    _, mean, _ = GROUP_NORM_SILU[backend](x, weight, bias, 8, 1e-5, True, layout == torch.channels_last)
    assert (mean.double() - x.double().reshape(2, 8, -1).mean(-1)).abs().max() < 4e-5


@pytest.mark.parametrize("backend", BACKENDS)
def test_layouts_and_strides(backend):
    x, weight, bias, _ = case((2, 16, 6, 10))
    with use_backend(backend):
        want = group_norm_silu(x, weight, bias, 4)
        last = group_norm_silu(x.to(memory_format=torch.channels_last), weight, bias, 4)
        assert last.is_contiguous(memory_format=torch.channels_last) and want.is_contiguous()
        torch.testing.assert_close(last, want, rtol=1e-5, atol=1e-5)
        wide = torch.cat([x, x], 1)
        for view in (wide[:, :16], wide.to(memory_format=torch.channels_last)[:, :16], x.transpose(2, 3)):
            expected = want.transpose(2, 3) if view.shape != x.shape else want
            torch.testing.assert_close(group_norm_silu(view, weight, bias, 4), expected, rtol=1e-5, atol=1e-5)
        both = torch.stack([weight, bias], 1)  # strided weights
        torch.testing.assert_close(group_norm_silu(x, both[:, 0], both[:, 1], 4), want)


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_sample_does_not_depend_on_its_batch(backend, layout):
    inputs = case((5, 30, 7, 9), layout=layout)
    y, grad = run(backend, *inputs, 6, True)
    x, weight, bias, grad_y = inputs
    alone = run(backend, x[2:3], weight, bias, grad_y[2:3], 6, True)
    assert torch.equal(y[2:3], alone[0]) and torch.equal(grad[2:3], alone[1])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_empty_batch(backend, layout):
    y, grad = run(backend, *case((0, 8, 4, 4), layout=layout), 4, True)
    assert y.shape == grad.shape == (0, 8, 4, 4)


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("shape", "groups"), SHAPES[1:3])
def test_every_element_is_written(backend, layout, shape, groups, monkeypatch):
    """Memory from the allocator holds NaN here, also that of partial sums."""
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    inputs = case(shape, layout=layout)
    want = run("eager", *inputs, groups, True)
    x, weight, bias, grad_y = inputs
    x = x.requires_grad_()
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(3, device=DEVICE).isnan().all() and torch.empty_like(x).isnan().all()
        last = layout == torch.channels_last
        y, mean, rstd = GROUP_NORM_SILU[backend](x, weight, bias, groups, 1e-5, True, last)
        (grad,) = torch.autograd.grad(y, x, grad_y)
    finally:
        torch.use_deterministic_algorithms(False)
    assert mean.isfinite().all() and rstd.isfinite().all() and not (mean.requires_grad or rstd.requires_grad)
    torch.testing.assert_close(y, want[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(grad, want[1], rtol=1e-4, atol=1e-5)


@pytest.mark.skipif("c" not in BACKENDS, reason="the C library is not there")
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("shape", "groups"), [((1, 4, 130, 131), 2), ((1, 600, 40, 3), 30)])
def test_pieces_of_the_c_library(layout, shape, groups):
    """A channel longer than a piece; groups that straddle two tiles of columns."""
    inputs = case(shape, layout=layout)
    for got, exact in zip(run("c", *inputs, groups, True), truth(*inputs, groups, True), strict=True):
        assert max_error(got, exact) < 3e-6


@pytest.mark.skipif("c" not in BACKENDS, reason="the C library is not there")
def test_threads_never_show_in_the_result():
    inputs = case((2, 96, 64, 65), layout=torch.channels_last)
    before, results = torch.get_num_threads(), []
    try:
        for num_threads in (1, 2, 7):
            torch.set_num_threads(num_threads)
            results.append(run("c", *inputs, 32, True))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("backend", KERNELS)
def test_saves_no_more_than_the_inputs_and_the_statistics(backend):
    x, weight, bias, _ = case((2, 16, 8, 8))
    saved = []
    with use_backend(backend), torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        group_norm_silu(x.requires_grad_(), weight, bias, 4)
    assert sorted(t.numel() for t in saved) == [8, 8, 16, 16, x.numel()]


def test_errors():
    x, weight, bias, _ = case((2, 16, 4, 4))
    with pytest.raises(ValueError, match="multiple of num_groups=5"):
        group_norm_silu(x, weight, bias, 5)
    with pytest.raises(ValueError, match=r"x is \(2, 16\)"):
        group_norm_silu(x[:, :, 0, 0], weight, bias, 4)
    with pytest.raises(ValueError, match="weight is"):
        group_norm_silu(x, weight[:8], bias, 4)
    with pytest.raises(ValueError, match="bias is .* torch.float16"):
        group_norm_silu(x, weight, bias.half(), 4)
    with pytest.raises(ValueError, match="freeze it"):
        group_norm_silu(x, weight.requires_grad_(), bias, 4)
    with torch.no_grad():
        group_norm_silu(x, weight, bias, 4)


@pytest.mark.parametrize("silu", [True, False])
def test_gradcheck_of_the_definition(silu):
    x, weight, bias, _ = case((2, 6, 3, 2), torch.float64)
    with use_backend("eager"):
        torch.autograd.gradcheck(lambda x: group_norm_silu(x, weight, bias, 3, silu=silu), (x.requires_grad_(),))


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_library_op_is_sound(backend, layout):
    x, weight, bias, _ = case((2, 8, 6, 5), layout=layout)
    last = layout == torch.channels_last
    torch.library.opcheck(GROUP_NORM_SILU[backend], (x.requires_grad_(), weight, bias, 4, 1e-5, True, last))


@pytest.mark.skipif("c" not in BACKENDS, reason="the C library is not there")
def test_the_choice_is_by_layout_and_size():
    """On a CPU: C for large channels-last tensors, also inside a compiled graph, which is right for each of them."""
    chosen = {(row[1], row[2]): row[3] for row in table(("cpu",)) if row[0] == "group_norm_silu"}
    assert chosen["cpu", "eager"].startswith("chosen: ") and "NCHW" in chosen["cpu", "eager"]
    assert chosen["cpu channels-last", "c"].startswith("chosen: ") and "131072" in chosen["cpu channels-last", "c"]
    called: list[str] = []

    def record(graph, inputs):
        called.extend(str(node.target) for node in graph.graph.nodes)
        return graph

    torch._dynamo.reset()
    compiled = torch.compile(lambda *inputs: group_norm_silu(*inputs, 8), fullgraph=True, backend=record)
    for shape, layout, want in (
        ((2, 64, 32, 32), torch.channels_last, "c"),  # 2^17 elements
        ((2, 64, 32, 31), torch.channels_last, "eager"),
        ((2, 64, 32, 32), torch.contiguous_format, "eager"),
    ):
        x, weight, bias, _ = case(shape, layout=layout)
        assert choose("group_norm_silu", x) == want
        called.clear()
        compiled(x, weight, bias)
        assert called and ("spo_fast.group_norm_silu_c.default" in called) == (want == "c")
        with use_backend("c" if want == "eager" else "eager"):
            assert choose("group_norm_silu", x) != want


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_compiles_without_a_graph_break(backend, layout):
    x, weight, bias, grad_y = case((2, 8, 6, 5), layout=layout)
    with use_backend(backend):
        torch._dynamo.reset()
        compiled = torch.compile(
            lambda x: group_norm_silu(x, weight, bias, 4) + group_norm_silu(x, weight, bias, 4, silu=False),
            fullgraph=True,
            backend="aot_eager",
        )
        mine, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
        got = compiled(mine)
        want = group_norm_silu(theirs, weight, bias, 4) + group_norm_silu(theirs, weight, bias, 4, silu=False)
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)
        grads = torch.autograd.grad(got, mine, grad_y)[0], torch.autograd.grad(want, theirs, grad_y)[0]
        torch.testing.assert_close(*grads, rtol=1e-5, atol=1e-6)
