"""ops/linear.py: which library multiplies, and that either gives the formula's numbers and gradients."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from runs import default_float64
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from spo_fast.ops import backend, onednn
from spo_fast.ops.linear import LEAST_SIDE, OpLinear, linear, take_linear, takes_onednn
from spo_fast.ops.lora_linear import lora_linear, lora_linears, lora_three

needs_onednn = pytest.mark.skipif(not onednn.exists(), reason="this PyTorch has no oneDNN")


def decided(monkeypatch: pytest.MonkeyPatch, reason: str | None) -> None:
    """As if oneDNN had been measured so."""
    monkeypatch.setattr(onednn, "why_slow", lambda: reason)
    backend.why_not.cache_clear()
    backend._cached_choice.cache_clear()


@pytest.fixture
def fast(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[int, ...]]]:
    """oneDNN's products are the faster ones here; the shapes of those that it makes."""
    if not onednn.exists():
        pytest.skip("this PyTorch has no oneDNN")
    made: list[tuple[int, ...]] = []

    def recorded(name: str) -> Callable[..., Tensor]:
        plain = getattr(onednn, name)

        def product(*args: Tensor) -> Tensor:
            found: Tensor = plain(*args)
            made.append(tuple(found.shape))
            return found

        return product

    decided(monkeypatch, None)
    for name in ("product", "added"):
        monkeypatch.setattr(onednn, name, recorded(name))
    yield made
    monkeypatch.undo()
    backend.why_not.cache_clear()
    backend._cached_choice.cache_clear()


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def assert_near(got: Tensor, want: Tensor) -> None:
    assert got.shape == want.shape
    assert float((got.double() - want).abs().max()) < 2e-6 * float(want.abs().max())


INPUTS = {
    "rows": lambda: randn(5, 160),
    "one row": lambda: randn(160),
    "batches": lambda: randn(2, 3, 160),
    "a slice": lambda: randn(7, 320)[:, ::2],
    "turned": lambda: randn(160, 9).t(),
    "expanded": lambda: randn(1, 160).expand(4, 160),
}


BIASES = {
    "none": lambda: None,
    "plain": lambda: randn(130, seed=2),
    "a slice": lambda: randn(260, seed=2)[::2],
    "expanded": lambda: randn(1, seed=2).expand(130),
}


@pytest.mark.parametrize("kind", INPUTS)
@pytest.mark.parametrize("of_bias", BIASES)
@pytest.mark.parametrize("turned", [False, True])
def test_values_and_gradient_are_the_formulas(
    fast: list[tuple[int, ...]], kind: str, of_bias: str, turned: bool
) -> None:
    x, bias = INPUTS[kind]().requires_grad_(), BIASES[of_bias]()
    weight = randn(160, 130, seed=1).t() if turned else randn(130, 160, seed=1)
    y = linear(x, weight, bias)
    dy = randn(*y.shape, seed=3)
    (dx,) = torch.autograd.grad(y, x, dy)
    truth = x.detach().double() @ weight.double().t() + (0 if bias is None else bias.double())
    assert_near(y.detach(), truth)
    assert_near(dx, dy.double() @ weight.double())
    with torch.no_grad():
        assert_near(linear(x, weight, bias), truth)
    with torch.inference_mode():
        assert_near(linear(x, weight, bias), truth)
    assert fast == [tuple(y.shape), tuple(x.shape), tuple(y.shape), tuple(y.shape)]


@pytest.mark.parametrize("has_input", [True, False])
@pytest.mark.parametrize("rows", [(200,), (2, 3, 40)])
def test_gradients_of_weights_that_learn(fast: list[tuple[int, ...]], has_input: bool, rows: tuple[int, ...]) -> None:
    x, weight, bias = randn(*rows, 160), randn(130, 160, seed=1).requires_grad_(), randn(130, seed=2).requires_grad_()
    x.requires_grad_(has_input)
    leaves = [x, weight, bias] if has_input else [weight, bias]
    y, dy = linear(x, weight, bias), randn(*rows, 130, seed=3)
    X, W, b, g = (t.detach().double() for t in (x, weight, bias, dy))
    assert_near(y.detach(), X @ W.t() + b)
    want = [g @ W, torch.einsum("...o,...i->oi", g, X), g.flatten(0, -2).sum(0)][-len(leaves) :]
    for got, truth in zip(torch.autograd.grad(y, leaves, dy, retain_graph=True), want, strict=True):
        assert_near(got, truth)
    assert fast == [(*rows, 130), *[(*rows, 160)] * has_input, (130, 160)]
    (alone,) = torch.autograd.grad(y, bias, dy)
    assert_near(alone, want[-1])


def test_what_is_left_to_pytorch(fast: list[tuple[int, ...]]) -> None:
    """Other types, small layers, no rows; each with PyTorch's own numbers."""
    x, weight, bias = randn(5, 160), randn(130, 160, seed=1), randn(130, seed=2)
    for dtype in (torch.float64, torch.bfloat16):
        got = linear(x.to(dtype), weight.to(dtype), bias.to(dtype))
        assert torch.equal(got, F.linear(x.to(dtype), weight.to(dtype), bias.to(dtype)))
    for small in (randn(LEAST_SIDE - 1, 160, seed=1), randn(160, 160)[:, : LEAST_SIDE - 1].contiguous()):
        part = x[:, : small.shape[1]]
        assert torch.equal(linear(part, small), F.linear(part, small))
    strided = randn(130, 320, seed=1)[:, ::2]
    assert torch.equal(linear(x, strided), F.linear(x, strided))
    overlapping = randn(2000).as_strided((130, 160), (7, 3))
    assert torch.equal(linear(x, overlapping), F.linear(x, overlapping))
    assert torch.equal(linear(x, weight, bias[:1]), F.linear(x, weight, bias[:1]))
    with torch.autocast("cpu", torch.bfloat16):
        assert linear(x, weight, bias).dtype == torch.bfloat16
    before = torch.backends.mkldnn.enabled
    torch._C._set_mkldnn_enabled(False)
    try:
        linear(x, weight, bias)
    finally:
        torch._C._set_mkldnn_enabled(before)
    assert linear(x[:0], weight, bias).shape == (0, 130)
    with FakeTensorMode() as mode:
        assert linear(mode.from_tensor(x), mode.from_tensor(weight)).shape == (5, 130)
    assert fast == []


@pytest.mark.parametrize("wants_input", [True, False])
def test_the_base_of_a_lora_is_multiplied_so_too(fast: list[tuple[int, ...]], wants_input: bool) -> None:
    x, weight, bias = randn(6, 160).requires_grad_(wants_input), randn(130, 160, seed=1), randn(130, seed=2)
    A, B = randn(4, 160, seed=3).requires_grad_(), randn(130, 4, seed=4).requires_grad_()
    dy = randn(6, 130, seed=5)
    leaves = [x, A, B] if wants_input else [A, B]
    X, W, a, b, g = (t.detach().double() for t in (x, weight, A, B, dy))
    truth = X @ (W + 0.5 * b @ a).t() + bias.double()
    gradients = [g @ (W + 0.5 * b @ a), 0.5 * b.t() @ g.t() @ X, 0.5 * g.t() @ X @ a.t()][-len(leaves) :]

    y = lora_linear(x, weight, bias, A, B, 0.5)
    assert_near(y.detach(), truth)
    for got, want in zip(torch.autograd.grad(y, leaves, dy), gradients, strict=True):
        assert_near(got, want)
    assert fast == [(6, 130), (6, 160)][: 1 + wants_input]

    fast.clear()
    two = lora_linears(x, [(weight, bias, A, B)] * 2, 0.5)
    for got, want in zip(torch.autograd.grad(two, leaves, [dy, dy]), gradients, strict=True):
        assert_near(got, 2 * want)
    assert fast == [(6, 130)] * 2 + [(6, 160)] * 2 * wants_input

    fast.clear()
    whole = torch.cat([weight[:100]] * 3)
    with torch.no_grad():
        three = lora_three(x, whole, [A] * 3, [B[:100]] * 3, 0.5, torch.cat([bias[:100]] * 3))
    for got in three:
        assert_near(got, truth[:, :100])
    assert fast == [(6, 300)]


def test_a_networks_layers_are_given_it(fast: list[tuple[int, ...]]) -> None:
    class Own(nn.Linear):
        pass

    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = nn.Sequential(nn.Linear(160, 130), nn.GELU(), nn.Linear(130, 8), Own(8, 4096)).requires_grad_(False)
    x = randn(3, 160)
    want = copy.deepcopy(network).double()(x.double())
    take_linear(network)
    assert_near(network(x), want)
    assert fast == [(3, 130)] and [type(m) for m in network[::2]] == [OpLinear, nn.Linear]  # it is narrow
    assert type(network[3]) is Own
    assert sorted(network.state_dict()) == sorted(f"{i}.{name}" for i in (0, 2, 3) for name in ("weight", "bias"))
    other = copy.deepcopy(network)
    with torch.no_grad():
        other[0].weight.zero_()
    assert not torch.equal(other(x), network(x))  # a copy has its own weights
    assert_near(network(x), want)
    fast.clear()
    assert_near(network.requires_grad_()(x).detach(), want)
    assert fast == [(3, 130)]


def test_where_it_is_no_faster_nothing_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    decided(monkeypatch, "measured here it is 1.01 times as fast")
    try:
        x, weight = randn(5, 160), randn(130, 160, seed=1)
        assert not takes_onednn(x, weight) and torch.equal(linear(x, weight), F.linear(x, weight))
        network = nn.Sequential(nn.Linear(160, 130))
        take_linear(network)
        assert type(network[0]) is nn.Linear
        rows = {row[1:3]: row[3] for row in backend.table(("cpu",)) if row[0] == "linear"}
        assert rows["cpu float32", "onednn"] == "measured here it is 1.01 times as fast"
        assert rows["cpu float32", "eager"] == "chosen: onednn is no faster"
    finally:
        monkeypatch.undo()
        backend.why_not.cache_clear()
        backend._cached_choice.cache_clear()


@needs_onednn
def test_it_can_be_forced_where_it_is_no_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    decided(monkeypatch, "measured here it is 1.01 times as fast")
    try:
        with backend.use_backend("onednn"):
            assert takes_onednn(randn(5, 160), randn(130, 160))
            assert backend.choose("linear", randn(5, dtype=torch.float64)) == "eager"  # which it has not
            assert backend.choose("geglu", randn(5)) in ("c", "eager")
        with backend.use_backend("eager"):
            assert not takes_onednn(randn(5, 160), randn(130, 160))
    finally:
        monkeypatch.undo()
        backend.why_not.cache_clear()
        backend._cached_choice.cache_clear()


def two_layers() -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(160, 256), nn.GELU(), nn.Linear(256, 160)).requires_grad_(False)


def test_derivatives_of_every_kind_are_pytorchs(fast: list[tuple[int, ...]]) -> None:
    """Forward ones, those of torch.func, and second ones."""
    plain = two_layers()
    taken, x, v = take_linear(copy.deepcopy(plain)), randn(4, 160), randn(4, 160, seed=1)

    def second(network: nn.Sequential) -> Tensor:
        at = x.clone().to(network[0].weight.dtype).requires_grad_()
        (g,) = torch.autograd.grad(network(at).square().sum(), at, create_graph=True)
        return torch.autograd.grad(g.square().sum(), at)[0]

    assert_near(second(taken), second(copy.deepcopy(plain).double()))
    assert fast
    assert_near(torch.func.jvp(taken, (x,), (v,))[1], torch.func.jvp(plain, (x,), (v,))[1].double())
    for transform in (torch.func.grad, lambda f: torch.func.grad(lambda a: torch.func.grad(f)(a).square().sum())):
        got, want = (transform(lambda a, n=n: n(a).square().sum())(x) for n in (taken, plain))
        assert_near(got, want.double())
    assert_near(torch.func.vmap(taken)(x), plain(x).double())


@pytest.mark.slow
def test_compiled_networks_are_pytorchs(fast: list[tuple[int, ...]]) -> None:
    """By Inductor, whose own lowering of the operator takes packed weights alone; LoRA layers too; traced ones."""
    plain, x = two_layers(), randn(4, 160)
    taken = take_linear(copy.deepcopy(plain))
    assert_near(torch.compile(taken, fullgraph=True)(x), plain(x).double())
    A, B, weight = randn(4, 160, seed=1), randn(256, 4, seed=2), randn(256, 160, seed=3)
    compiled = torch.compile(lambda a: lora_linear(a, weight, None, A, B, 1.0), fullgraph=True)
    assert_near(compiled(x), x.double() @ (weight.double() + B.double() @ A.double()).t())
    assert fast == []
    assert_near(torch.jit.trace(taken, x)(x), plain(x).double())


STATES: dict[str, Callable[[], contextlib.AbstractContextManager[object]]] = {
    "fake tensors": FakeTensorMode,
    "counting": lambda: FlopCounterMode(display=False),
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "another device": lambda: torch.device("meta"),
    "float64": default_float64,
    "gradients": torch.enable_grad,
}


@needs_onednn
@pytest.mark.parametrize("state", STATES)
def test_the_first_call_may_come_in_any_state(state: str) -> None:
    """What is multiplied is float32 on the CPU, and nothing else sees it."""
    seen: list[tuple[torch.dtype, str, type]] = []

    def clock() -> float:
        return float(len(seen))

    plain = onednn.product

    def product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        seen.append((x.dtype, x.device.type, type(x)))
        y = plain(x, weight, bias)
        assert y.dtype == torch.float32 and type(y) is Tensor
        return y

    with pytest.MonkeyPatch.context() as patch, STATES[state]() as mode:
        patch.setattr(onednn, "product", product)
        onednn.measured_gain(clock)
        if isinstance(mode, FlopCounterMode):
            assert mode.get_total_flops() == 0
    assert set(seen) == {(torch.float32, "cpu", Tensor)}


@needs_onednn
@pytest.mark.parametrize(("seconds", "gain"), [((2.0, 1.0), 2.0), ((1.0, 1.0), 1.0), ((1.0, 4.0), 0.25)])
def test_the_gain_is_of_least_times(seconds: tuple[float, float], gain: float) -> None:
    """Of a clock that tells the one library's calls so long and the other's so; some much longer, by other programs."""
    times, now = [], 0.0
    for turn in range(onednn.TURNS + 1):
        times.append(now)
        for place, took in enumerate(seconds):
            times.append(now := now + took * (7 if (turn + place) % 2 == 0 else 1))
    for measure in (onednn.measured_gain, onednn.measured_bf16_gain):
        clock = iter(times)
        assert measure(lambda clock=clock: next(clock)) == gain


@needs_onednn
def test_its_products_are_counted() -> None:
    x, weight, bias, y = randn(2, 3, 160), randn(130, 160), randn(130), randn(6, 130)
    with FlopCounterMode(display=False) as counter:
        onednn.product(x, weight, bias)
    assert counter.get_total_flops() == 2 * 6 * 160 * 130
    with FlopCounterMode(display=False) as counter:
        onednn.product(x, weight, None)
        onednn.added(y, x.flatten(0, 1), weight)
    assert counter.get_total_flops() == 2 * 2 * 6 * 160 * 130
