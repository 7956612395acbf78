"""ops/merge_lora.py: right on average where nearest rounding is not, equal bits on every backend, base untouched."""

from __future__ import annotations

import pytest
import torch

from spo_fast.ops.backend import available_backends, use_backend
from spo_fast.ops.merge_lora import MERGE, merge_lora

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = [pytest.mark.gpu] if DEVICE == "cuda" else []  # there, `pytest -m gpu` runs this file on the device
BACKENDS = available_backends("merge_lora", DEVICE)
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
SHAPES = [((1, 1), 1), ((37, 53), 3), ((320, 320), 4)]  # one element, ragged, a layer of SD-1.5


def randn(*shape: int, seed: int, dtype=torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(DEVICE, dtype)


def key(iteration=0, module=0):
    return torch.tensor([3, iteration, module, 8 << 24, 0], device=DEVICE)


def case(shape, rank, dtype, size=1e-2):
    """A base of standard deviation 0.02 on dtype's grid, and a LoRA whose update is `size` of it."""
    (rows, columns), scale = shape, 0.5
    weight = (0.02 * randn(rows, columns, seed=0)).to(dtype)
    A, B = randn(rank, columns, seed=1), randn(rows, rank, seed=2)
    B *= size * weight.float().norm() / (scale * B @ A).norm()
    return weight, A, B, scale


def poisoned(weight):
    return torch.full_like(weight, float("nan"))


def neighbours(exact, dtype):
    """The numbers of dtype around each float64, by search among all of them."""
    patterns = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(dtype).double().to(DEVICE)
    grid = patterns[patterns.isfinite()].unique()
    above = torch.searchsorted(grid, exact)
    at = grid[above] == exact
    return grid[torch.where(at, above, above - 1)], grid[above]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape, rank", SHAPES)
def test_every_element_is_a_neighbour_of_the_exact_sum(backend, dtype, shape, rank):
    weight, A, B, scale = case(shape, rank, dtype)
    before, out = weight.clone(), poisoned(weight)
    with use_backend(backend):
        assert merge_lora(weight, A, B, scale, key(), out=out) is out
    assert torch.equal(weight, before)
    exact = weight.double() + scale * B.double() @ A.double()
    tolerance = 1e-6 * float(exact.abs().max())  # of the float32 product and sum
    if dtype == torch.float32:
        assert (out.double() - exact).abs().max() <= tolerance
    else:
        below, above = neighbours(exact, dtype)
        assert bool(((out.double() >= below - tolerance) & (out.double() <= above + tolerance)).all())


@pytest.mark.parametrize("backend", [b for b in BACKENDS if b != "eager"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1), (1, 9), (37, 53), (160, 320)])
def test_backends_agree_bit_for_bit(backend, dtype, shape):
    # beside ordinary numbers: subnormal halves, both ends of a binade, overflow, infinity, NaN, zeros of both signs
    weight = (0.02 * randn(*shape, seed=0)).to(dtype)
    delta = 1e-3 * randn(*shape, seed=1)
    odd = [1e-7, -3e-6, 6.1e-5, 6.103e-5, 65504.0, 65519.0, 70000.0, 3.39e38, -3.4e38, 1e-42, 0.0, -0.0, -0.99999]
    odd = torch.tensor([*odd, float("inf"), float("-inf"), float("nan")], device=DEVICE)
    if delta.numel() > 1000:
        weight.view(-1)[: 10 * len(odd)] = 0
        delta.view(-1)[: 10 * len(odd)] = odd.repeat(10)
    outs = [poisoned(weight) for _ in range(2)]
    MERGE["eager"](weight, delta, key(), outs[0])
    MERGE[backend](weight, delta, key(), outs[1])
    pattern = torch.int32 if dtype == torch.float32 else torch.int16
    assert torch.equal(*(o[~o.isnan()].view(pattern) for o in outs))
    assert torch.equal(outs[0].isnan(), (weight.float() + delta).isnan()) and torch.equal(*(o.isnan() for o in outs))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "value", [0.01234567, -0.7654321, 3.1e-6, 2.0**-14 * 0.99991]
)  # the last two: subnormal halves
def test_the_mean_of_many_roundings_is_the_value(backend, dtype, value):
    n = 1 << 16
    delta = torch.full((256, 256), value, device=DEVICE)
    weight, out = torch.zeros_like(delta, dtype=dtype), torch.empty_like(delta, dtype=dtype)
    MERGE[backend](weight, delta, key(), out)
    exact = delta[0, 0].double()
    below, above = neighbours(exact[None], dtype)
    p = float((exact - below) / (above - below))
    assert out.unique().tolist() == [float(below), float(above)]
    assert abs(float((out.double() == above).double().mean()) - p) < 5 * (p * (1 - p) / n) ** 0.5 + 2.0**-13


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_number_of_the_grid_stays(backend):
    patterns = torch.arange(2**16, dtype=torch.int32).to(torch.int16).to(DEVICE)
    for dtype in (torch.bfloat16, torch.float16):
        weight = patterns.view(dtype).clone()
        out = poisoned(weight)
        MERGE[backend](weight, torch.zeros(weight.shape, device=DEVICE), key(), out)
        assert torch.equal(out.nan_to_num(1.5, 2.5, -2.5), weight.nan_to_num(1.5, 2.5, -2.5))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_key_is_a_rounding(backend):
    weight, A, B, scale = case((64, 96), 4, torch.bfloat16)

    def merged(k):
        with use_backend(backend):
            return merge_lora(weight, A, B, scale, k, out=poisoned(weight))

    first = merged(key())
    assert torch.equal(first, merged(key()))
    for position in range(5):
        other = key()
        other[position] += 1
        assert 0.05 < float((merged(other) != first).float().mean()) < 0.6  # where up and down were near even


def outputs(size, merge, dtype=torch.bfloat16):
    """What merging does to a layer's output: slope on the unmerged LoRA's, and noise over that of nearest rounding."""
    weight, A, B, scale = case((1280, 1280), 64, dtype, size)
    before, out = weight.clone(), poisoned(weight)
    merge(weight, A, B, scale, out)
    x = randn(256, 1280, seed=3)
    base = x @ weight.float().t()
    move = scale * (x @ A.t()) @ B.t()  # the unmerged LoRA's output - the base's
    merged = x @ out.float().t() - base
    slope = float((merged * move).sum() / (move * move).sum())
    generic = 0.02 * randn(1280, 1280, seed=4)  # weights that lie on no grid
    nearest = x @ (generic.to(dtype).float() - generic).t()
    noise = float((merged - move).pow(2).mean().sqrt() / nearest.pow(2).mean().sqrt())
    assert torch.equal(x @ weight.float().t(), base) and torch.equal(weight, before)  # un-merged: the base's bits
    return slope, noise


@pytest.mark.parametrize("backend", [b for b in BACKENDS if b != "triton" or DEVICE == "cuda"])
@pytest.mark.parametrize("size", [1e-4, 1e-3, 1e-2])
def test_a_merged_layer_moves_as_the_unmerged_lora_does(backend, size):
    with use_backend(backend):
        slope, noise = outputs(size, lambda w, A, B, s, out: merge_lora(w, A, B, s, key(), out=out))
    assert abs(slope - 1) < 0.05
    assert noise < 1.5


@pytest.mark.parametrize("size, expected", [(1e-4, 0.06), (1e-3, 0.52), (1e-2, 1.00)])
def test_plain_rounding_loses_small_updates(size, expected):
    """About .07, .56, 1.00, by how weights are distributed: the first two would fail the test above by far."""
    slope, _ = outputs(size, lambda w, A, B, s, out: out.copy_((w.float() + s * B @ A).to(w.dtype)))
    assert slope == pytest.approx(expected, abs=0.05)


def test_layouts_and_errors():
    weight, A, B, scale = case((24, 40), 3, torch.bfloat16)
    want = merge_lora(weight, A, B, scale, key(), out=poisoned(weight))
    strided = [torch.stack([v, v], -1)[..., 0] for v in (weight, A, B)]
    assert not any(v.is_contiguous() for v in strided)
    keys = torch.stack([key(), key()], -1)[:, 0]
    assert torch.equal(merge_lora(*strided, scale, keys, out=poisoned(weight)), want)
    cast = merge_lora(weight, A.bfloat16(), B.bfloat16(), scale, key(), out=poisoned(weight))  # 16-bit LoRA
    assert (cast.float() - want.float()).abs().max() < 0.01
    assert not merge_lora(weight, A.requires_grad_(), B, scale, key(), out=poisoned(weight)).requires_grad
    empty = weight[:0]
    assert merge_lora(empty, A, B[:0], scale, key(), out=torch.empty_like(empty)).shape == (0, 40)
    buffer = torch.empty(48, 40, dtype=torch.bfloat16, device=DEVICE)
    for bad in (weight, weight.view(24, 40), buffer[:24]):
        base = buffer[24:] if bad.data_ptr() == buffer.data_ptr() else weight
        with pytest.raises(ValueError, match="shares the base's memory"):
            merge_lora(base, A, B, scale, key(), out=bad)
    for bad in (poisoned(weight).t(), poisoned(weight).half(), poisoned(weight.t().contiguous()).t()):
        with pytest.raises(ValueError, match="out is"):
            merge_lora(weight, A, B, scale, key(), out=bad)
    with pytest.raises(ValueError, match="do not fit"):
        merge_lora(weight, A[:2], B, scale, key(), out=poisoned(weight))
    with pytest.raises(ValueError, match="key is"):
        merge_lora(weight, A, B, scale, key().int(), out=poisoned(weight))
    with pytest.raises(TypeError, match="float64"):
        merge_lora(weight.double(), A, B, scale, key(), out=poisoned(weight))


@pytest.mark.parametrize("backend", [b for b in BACKENDS if b != "eager"])
def test_library_op_is_sound(backend):
    for dtype in DTYPES:
        weight, A, B, scale = case((9, 14), 2, dtype)
        torch.library.opcheck(MERGE[backend], (weight, scale * B @ A, key(), torch.empty_like(weight)))


@pytest.mark.parametrize("backend", BACKENDS)
def test_compiles_without_a_graph_break(backend):
    weight, A, B, scale = case((24, 40), 3, torch.bfloat16)
    x = randn(5, 40, seed=5, dtype=torch.bfloat16)

    def merged_layer(x, k, out):
        merge_lora(weight, A, B, scale, k, out=out)
        return torch.nn.functional.linear(x, out)

    with use_backend(backend):
        torch._dynamo.reset()
        compiled = torch.compile(merged_layer, fullgraph=True, backend="aot_eager")
        for iteration in (0, 1):
            outs = [poisoned(weight) for _ in range(2)]
            got, want = compiled(x, key(iteration), outs[0]), merged_layer(x, key(iteration), outs[1])
            assert torch.equal(got, want) and torch.equal(*outs)
