"""ops/resize_normalize.py against cubic convolution by float64 matrices, on every backend that runs on this machine."""

from __future__ import annotations

import math

import pytest
import torch

from spo_fast.ops.backend import INTERPRET, available_backends, use_backend
from spo_fast.ops.resize_normalize import RESIZE_NORMALIZE, resize_normalize

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = [pytest.mark.gpu] if DEVICE == "cuda" else []  # there, `pytest -m gpu` runs this file on the device
BACKENDS = available_backends("resize_normalize", DEVICE)
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
# the real step from a 1024 px image; the interpreter, which takes half a minute for it, sees the same ratio
REAL = ((1, 3, 256, 256), 56) if INTERPRET and DEVICE == "cpu" else ((1, 3, 1024, 1024), 224)
SHAPES = [((1, 3, 1, 1), 1), ((2, 3, 37, 61), 24), ((3, 3, 70, 33), 40), REAL]  # one pixel; ragged; enlarged; real
DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]


def randn(*shape, dtype=torch.float32, seed=0):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (0.8 * x).to(DEVICE, dtype)


def cubic_matrix(source, target):
    """(target, source): Keys' cubic convolution, a = -0.75, half-pixel centres, edges repeated."""
    a = -0.75
    matrix = torch.zeros(target, source, dtype=torch.float64)
    for i in range(target):
        centre = (i + 0.5) * source / target - 0.5
        for j in range(math.floor(centre) - 1, math.floor(centre) + 3):
            d = abs(centre - j)
            near, far = (a + 2) * d**3 - (a + 3) * d**2 + 1, a * d**3 - 5 * a * d**2 + 8 * a * d - 4 * a
            matrix[i, min(max(j, 0), source - 1)] += near if d <= 1 else far if d < 2 else 0.0
    return matrix.to(DEVICE)


def truth(pixels, size):
    H, W = pixels.shape[-2:]
    h, w = (math.floor(side * size / min(H, W) + 0.5) for side in (H, W))
    resized = cubic_matrix(H, h) @ pixels.double() @ cubic_matrix(W, w).T
    top, left = ((side - size) // 2 + (1 if (side - size) % 4 == 3 else 0) for side in (h, w))  # half to even
    x = (resized[..., top : top + size, left : left + size] / 2 + 0.5).clamp(0, 1)
    return (x - torch.tensor(MEAN, device=DEVICE).view(3, 1, 1)) / torch.tensor(STD, device=DEVICE).view(3, 1, 1)


def max_error(x, y):
    return float((x.double() - y.double()).abs().max()) if y.numel() else 0.0


def skip_what_the_interpreter_misrounds(backend, *dtypes):
    if backend == "triton" and DEVICE == "cpu" and torch.bfloat16 in dtypes:
        pytest.skip("the interpreter misrounds bf16 stores")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("shape", "size"), SHAPES)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_matches_float64(backend, dtype, shape, size, layout, poisoned):
    x = randn(*shape, dtype=dtype).to(memory_format=layout)
    want = truth(x, size)
    eager_error = max_error(RESIZE_NORMALIZE["eager"](x, size, MEAN, STD, torch.float32), want)
    assert eager_error < (1e-3 if dtype in (torch.float32, torch.float64) else 5e-2)
    with use_backend(backend), poisoned():
        got = resize_normalize(x, size, MEAN, STD)
    assert got.dtype == torch.float32 and got.is_contiguous()
    assert max_error(got, want) <= 2 * eager_error + 1e-6


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_output_types(backend, dtype):
    skip_what_the_interpreter_misrounds(backend, dtype)
    x = randn(2, 3, 37, 41)
    with use_backend(backend):
        exact = resize_normalize(x, 24, MEAN, STD)
        got = resize_normalize(x, 24, MEAN, STD, dtype)
    assert got.dtype == dtype and torch.equal(got, exact.to(dtype))


@pytest.mark.parametrize("backend", BACKENDS)
def test_any_strides_are_read_in_place(backend):
    wide = randn(4, 3, 40, 80)
    with use_backend(backend):
        column = wide[..., :1].expand(4, 3, 40, 40)
        last = wide.contiguous(memory_format=torch.channels_last)  # its three channels are mixed as one line
        for x in (wide[::2], wide[..., 20:60], wide[..., ::2], wide.transpose(2, 3), column, last[..., 3:35, 20:60]):
            want = resize_normalize(x.contiguous(), 24, MEAN, STD)
            assert max_error(resize_normalize(x, 24, MEAN, STD), want) <= (1e-5 if backend == "eager" else 0)
        flipped = resize_normalize(wide.flip(3), 24, MEAN, STD).flip(3)  # and the crop is centred
        assert max_error(flipped, resize_normalize(wide, 24, MEAN, STD)) < 1e-4


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_image_none_and_extremes(backend):
    x = randn(3, 3, 30, 30)
    with use_backend(backend):
        whole = resize_normalize(x, 16, MEAN, STD)
        for i in range(3):
            assert max_error(resize_normalize(x[i : i + 1], 16, MEAN, STD), whole[i : i + 1]) < 1e-6
        assert resize_normalize(x[:0], 16, MEAN, STD).shape == (0, 3, 16, 16)
        ends = [(torch.tensor(v) - torch.tensor(MEAN)) / torch.tensor(STD) for v in (1.0, 0.0)]
        for value, want in zip((1e30, -1e30), ends, strict=True):  # clamped after the resize, never infinite
            got = resize_normalize(torch.full_like(x, value), 16, MEAN, STD)
            assert max_error(got, want.to(DEVICE).view(1, 3, 1, 1).expand_as(got)) < 1e-6
        x[1, 2, 15, 15] = torch.nan  # stays visible where it is, and only there
        got = resize_normalize(x, 16, MEAN, STD)
        assert got[1, 2].isnan().any() and got[1, :2].isfinite().all() and got[[0, 2]].isfinite().all()


def test_overshoot_goes_through_the_resize():
    x = torch.full((1, 3, 8, 8), 3.0, device=DEVICE)
    x[..., ::2] = -1.0  # clamped first, the mean of a pair would be that of 1 and -1
    got = resize_normalize(x, 4, (0.0,) * 3, (1.0,) * 3)
    assert (got[..., 1:-1] == 1).all()  # away from the edges, which repeat: (3 - 1) / 2 = 1, which is 1 in [0, 1] too


def test_gradient_goes_through_the_definition():
    x = randn(1, 3, 10, 10).requires_grad_()
    for backend in BACKENDS:
        with use_backend(backend):
            resize_normalize(x, 8, MEAN, STD).sum().backward()
        assert x.grad.abs().max() > 0
        x.grad = None
        with use_backend(backend), torch.no_grad():
            assert not resize_normalize(x, 8, MEAN, STD).requires_grad


def test_errors():
    with pytest.raises(ValueError, match=r"\(N, 3, H, W\)"):
        resize_normalize(randn(2, 4, 8, 8), 4, MEAN, STD)
    with pytest.raises(ValueError, match="not empty"):
        resize_normalize(randn(2, 3, 0, 8), 4, MEAN, STD)
    with pytest.raises(ValueError, match="torch.int32 is no type"):
        resize_normalize(randn(2, 3, 8, 8), 4, MEAN, STD, torch.int32)
    with pytest.raises(ValueError, match="crop it first"):
        resize_normalize(torch.zeros(1, 3, 1, 20000, device=DEVICE), 4, MEAN, STD)


@pytest.mark.parametrize("backend", [b for b in BACKENDS if b != "eager"])
def test_library_ops_are_sound(backend):
    torch.library.opcheck(RESIZE_NORMALIZE[backend], (randn(2, 3, 9, 11), 6, list(MEAN), list(STD), torch.float32))


@pytest.mark.parametrize("backend", BACKENDS)
def test_compiles_without_a_graph_break(backend):
    x = randn(2, 3, 20, 26)

    def score(x):
        return resize_normalize(x, 12, MEAN, STD) * 2

    with use_backend(backend):
        torch._dynamo.reset()
        assert max_error(torch.compile(score, fullgraph=True, backend="aot_eager")(x), score(x)) < 1e-5
