"""ops/transition.py against float64 formulas written out here, on every backend that runs on this machine."""

from __future__ import annotations

import pytest
import torch

from spo_fast.ops import philox
from spo_fast.ops import transition as module
from spo_fast.ops.backend import available_backends, use_backend
from spo_fast.ops.log_ratio import LOG_RATIO, log_ratio
from spo_fast.ops.transition import TRANSITION, transition

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = [pytest.mark.gpu] if DEVICE == "cuda" else []  # there, `pytest -m gpu` runs this file on the device
# one element, ragged, several blocks; no multiples of the four lanes of a noise group: 2, 1 and 3 elements over
SHAPES = [(1, 1, 1, 1), (3, 4, 7, 5), (2, 4, 33, 31), (2, 1, 1, 6), (3, 3, 5, 7), (2, 3, 23, 15)]
# a, b, c, d, std of DDIM-like steps: a middle one, the first (t = 951) and the last (t = 1, std 0.02)
TABLE = torch.tensor(
    [
        [1.0247, -0.0612, 2.61, -2.41, 0.31],
        [1.6, -0.83, 14.5, -14.46, 0.52],
        [1.00034, -0.0292, 1.0004, -0.029, 0.0203],
    ],
    dtype=torch.float64,
    device=DEVICE,
)


def randn(*shape: int, seed: int, dtype=torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(DEVICE, dtype)


def case(shape, dtype=torch.float32, latent=torch.float32):
    """Outputs and latents of U states and a child near the mean of each of T transitions."""
    U = shape[0]
    cond, uncond, r_cond, r_uncond = (randn(*shape, seed=i, dtype=dtype) for i in range(4))
    x_t = randn(*shape, seed=4, dtype=latent)
    states = torch.tensor([0, U - 1, *range(U), 0], device=DEVICE)
    rows = torch.arange(U, device=DEVICE) % len(TABLE)
    noise = randn(len(states), *shape[1:], seed=5, dtype=torch.float64)
    table = TABLE[rows][states][:, :, None, None, None]
    mean = table[:, 0] * x_t.double()[states] + table[:, 1] * cond.double()[states]
    x_prev = (mean + table[:, 4] * noise).to(latent)
    return cond, uncond, r_cond, r_uncond, x_t, x_prev, states, rows


def truth(cond, uncond, r_cond, r_uncond, x_t, x_prev, states, rows, g):
    """log N(x_prev; mu_p, s^2) - log N(x_prev; mu_r, s^2), as the difference of the two densities in float64."""
    a, b, _, _, std = TABLE[rows][states][..., None, None, None].unbind(1)

    def log_prob_and_mean(c, u):
        m = c if u is None else u + g * (c - u)
        mean = a * x_t.double()[states] + b * m[states]
        density = (
            -((x_prev.double() - mean) ** 2) / (2 * std**2) - std.log() - 0.5 * torch.log(torch.tensor(2 * torch.pi))
        )
        return density.mean((1, 2, 3)), mean

    log_p, mean_p = log_prob_and_mean(cond, uncond)
    log_r, mean_r = log_prob_and_mean(r_cond.double(), None if r_uncond is None else r_uncond.double())
    return log_p - log_r, ((mean_p - mean_r) ** 2 / (2 * std**2)).mean((1, 2, 3))


def max_error(x, y):
    return float((x.double() - y.double()).abs().max() / y.double().abs().max().clamp_min(1e-30))


@pytest.mark.parametrize("backend", available_backends("log_ratio", DEVICE))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("guidance", [2.3, None])
def test_log_ratio_and_gradients_match_float64(backend, dtype, shape, guidance, poisoned):
    if backend == "triton" and dtype == torch.bfloat16 and DEVICE == "cpu":
        pytest.skip("the interpreter misrounds bf16 stores")
    latent = torch.float64 if dtype == torch.float64 else torch.float32
    inputs = list(case(shape, dtype, latent))
    if guidance is None:
        inputs[1] = inputs[3] = None
    g = 1.0 if guidance is None else guidance
    policy = [None if m is None else m.clone().requires_grad_() for m in inputs[:2]]
    exact = [None if m is None else m.double().clone().requires_grad_() for m in inputs[:2]]
    weights = randn(2, len(inputs[6]), seed=9, dtype=torch.float64)

    want = truth(*exact, *inputs[2:], g)
    (weights[0] * want[0] + weights[1] * want[1]).sum().backward()

    def error(name):
        for m in policy:
            if m is not None:
                m.grad = None
        with use_backend(name), poisoned():
            got = log_ratio(*policy, *inputs[2:], TABLE, g)
            (weights[0].to(latent) * got[0] + weights[1].to(latent) * got[1]).sum().backward()
        pairs = [*zip(got, want, strict=True)]
        pairs += [(p.grad, e.grad) for p, e in zip(policy, exact, strict=True) if p is not None]
        return [max_error(x.detach(), y.detach()) for x, y in pairs]

    floor = 1e-13 if dtype == torch.float64 else 2e-6
    for got, eager in zip(error(backend), error("eager"), strict=True):
        assert got <= 2 * eager + floor
        assert eager < (1e-11 if dtype == torch.float64 else 1e-5 if dtype == torch.float32 else 2e-2)


@pytest.mark.parametrize("backend", available_backends("transition", DEVICE))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("num_children", [0, 1, 3])
def test_transition_matches_float64_with_supplied_noise(backend, dtype, shape, num_children, poisoned):
    latent = torch.float64 if dtype == torch.float64 else torch.float32
    cond, uncond, _, _, x_t, _, _, rows = case(shape, dtype, latent)
    noise = randn(max(num_children, 1), *shape, seed=7, dtype=latent)
    a, b, c, d, std = TABLE[rows][..., None, None, None].unbind(1)
    m = uncond.double() + 7.5 * (cond.double() - uncond.double())
    with use_backend(backend), poisoned():
        x0, children = transition(
            cond, uncond, x_t, rows, TABLE, 7.5, num_children=num_children, noise=noise if num_children else None
        )
    tolerance = 1e-13 if dtype == torch.float64 else 2e-6
    assert max_error(x0, c * x_t.double() + d * m) < tolerance
    assert children.shape == (num_children, *shape)
    if num_children:
        assert max_error(children, a * x_t.double() + b * m + std * noise.double()) < tolerance


def keys(B, seed=3, iteration=11, step=6, candidate=0):
    return torch.tensor([[seed, iteration, 100 + b, step, candidate] for b in range(B)], device=DEVICE)


@pytest.mark.parametrize("backend", available_backends("transition", DEVICE))
@pytest.mark.parametrize("shape", [(4, 4, 9, 7), (4, 1, 1, 6), (4, 3, 5, 7), (4, 3, 23, 15)])
def test_keyed_noise_is_the_same_on_every_backend_and_for_any_batching(backend, shape):
    cond, uncond, _, _, x_t, _, _, rows = case(shape)
    with use_backend(backend):
        _, children = transition(cond, uncond, x_t, rows, TABLE, 5.0, num_children=3, keys=keys(4))
        halves = [
            transition(cond[i], uncond[i], x_t[i], rows[i], TABLE, 5.0, num_children=3, keys=keys(4)[i])[1]
            for i in (slice(0, 2), slice(2, 4))
        ]
        one = transition(cond, uncond, x_t, rows, TABLE, 5.0, keys=keys(4, candidate=2))[1]
    with use_backend("eager"):
        _, eager = transition(cond, uncond, x_t, rows, TABLE, 5.0, num_children=3, keys=keys(4))
    assert torch.equal(children, torch.cat(halves, 1))  # bit for bit
    assert torch.equal(children[2], one[0])  # child 2 is the child of the key with candidate 2
    assert max_error(children, eager) < 3e-6  # logarithm and cosine differ in the last digits between libraries


@pytest.mark.parametrize("backend", available_backends("transition", DEVICE))
def test_nothing_comes_of_nothing(backend):
    cond, uncond, _, _, x_t, _, _, rows = (v[:0] for v in case((4, 4, 9, 7)))
    with use_backend(backend):
        x0, children = transition(cond, uncond, x_t, rows, TABLE, 5.0, num_children=3, keys=keys(4)[:0])
    assert x0.shape == (0, 4, 9, 7) and children.shape == (3, 0, 4, 9, 7)


@pytest.mark.skipif("triton" not in available_backends("transition", DEVICE), reason="Triton cannot run here")
@pytest.mark.parametrize("channels", [4, 3])
def test_keyed_noise_does_not_depend_on_the_launch_shape(monkeypatch, channels):
    """The C library's threads: test_build.py. n = 252 and 189 are no multiples of any block."""
    cond, uncond, _, _, x_t, _, _, rows = case((2, channels, 9, 7))
    draws = []
    for groups in (16, 64, 256):
        monkeypatch.setattr(module, "GROUPS", groups)
        with use_backend("triton"):
            draws.append(transition(cond, uncond, x_t, rows, TABLE, 5.0, num_children=2, keys=keys(2))[1])
    assert torch.equal(draws[0], draws[1]) and torch.equal(draws[0], draws[2])


@pytest.mark.parametrize("position", range(5))
def test_every_word_of_a_key_changes_the_noise(position):
    key = keys(1)
    other = key.clone()
    other[0, position] += 1
    assert (philox.normal(key, 64) - philox.normal(other, 64)).abs().min() > 0


def test_philox_known_answers():
    # Random123's kat_vectors for philox4x32-10
    for counter, key, want in [
        ([0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
    ]:
        got = philox.philox4x32(*(tuple(torch.tensor(v) for v in words) for words in (counter, key)))
        assert [int(w) for w in got] == want


def test_keyed_noise_is_standard_normal():
    sample = torch.cat([philox.normal(keys(8, step=s), 4 * 64 * 64).flatten() for s in range(4)]).double()
    n = sample.numel()
    assert abs(sample.mean()) < 4 / n**0.5
    assert abs(sample.var() - 1) < 4 * (2 / n) ** 0.5
    assert abs((sample**4).mean() - 3) < 4 * (96 / n) ** 0.5
    halves = philox.normal(keys(8), 4 * 64 * 64).double().view(8, 4, -1)  # the four lanes of a group
    correlation = torch.corrcoef(halves.transpose(0, 1).reshape(4, -1)) - torch.eye(4, device=DEVICE)
    assert correlation.abs().max() < 5 / (n / 16) ** 0.5


def test_integers_are_uniform():
    many = torch.tensor([[1, 2, p, 3, 0] for p in range(6000)])
    counts = torch.bincount(philox.integer(many, 3), minlength=3)
    assert counts.sum() == 6000 and (counts - 2000).abs().max() < 5 * (6000 * 2 / 9) ** 0.5


def test_layouts_and_errors():
    cond, uncond, r_cond, r_uncond, x_t, x_prev, states, rows = case((3, 4, 8, 6))
    want = log_ratio(cond, uncond, r_cond, r_uncond, x_t, x_prev, states, rows, TABLE, 5.0)
    last = [v.to(memory_format=torch.channels_last) for v in (cond, uncond, r_cond, r_uncond, x_t, x_prev)]
    got = log_ratio(*last, states, rows, TABLE, 5.0)
    assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1])
    strided = torch.cat([cond, uncond], 1)
    got = log_ratio(strided[:, :4], strided[:, 4:], r_cond, r_uncond, x_t, x_prev, states, rows, TABLE, 5.0)
    assert torch.equal(got[0], want[0])
    with pytest.raises(TypeError, match="float32 or float64"):
        transition(cond, uncond, x_t.half(), rows, TABLE, 5.0, keys=keys(3))
    with pytest.raises(ValueError, match="exactly one"):
        transition(cond, uncond, x_t, rows, TABLE, 5.0)
    for bad in (keys(2), keys(3).int()):
        with pytest.raises(ValueError, match="keys is"):
            transition(cond, uncond, x_t, rows, TABLE, 5.0, keys=bad)
    with pytest.raises(ValueError, match="rows is"):
        transition(cond, uncond, x_t, rows[:2], TABLE, 5.0, keys=keys(3))
    with pytest.raises(ValueError, match="both"):
        log_ratio(cond, uncond, r_cond, None, x_t, x_prev, states, rows, TABLE, 5.0)
    empty = log_ratio(cond, uncond, r_cond, r_uncond, x_t, x_prev[:0], states[:0], rows, TABLE, 5.0)
    assert empty[0].shape == (0,)


def test_identical_networks_have_exactly_zero_log_ratio():
    cond, uncond, _, _, x_t, x_prev, states, rows = case((3, 4, 8, 6), torch.float16)
    ratio, kl = log_ratio(cond, uncond, cond, uncond, x_t, x_prev, states, rows, TABLE, 5.0)
    assert not ratio.any() and not kl.any()


def test_gradcheck_of_the_definition():
    cond, uncond, r_cond, r_uncond, x_t, x_prev, states, rows = case((2, 2, 3, 2), torch.float64, torch.float64)
    with use_backend("eager"):
        torch.autograd.gradcheck(
            lambda c, u: log_ratio(c, u, r_cond, r_uncond, x_t, x_prev, states, rows, TABLE, 3.0),
            (cond.requires_grad_(), uncond.requires_grad_()),
        )


@pytest.mark.parametrize("backend", [b for b in available_backends("log_ratio", DEVICE) if b != "eager"])
def test_library_ops_are_sound(backend):
    cond, uncond, r_cond, r_uncond, x_t, x_prev, states, rows = case((2, 4, 6, 5))
    arguments = (r_cond, r_uncond, x_t, x_prev, states, rows, TABLE, 5.0)
    torch.library.opcheck(LOG_RATIO[backend], (cond.requires_grad_(), uncond.requires_grad_(), *arguments))
    cond, uncond = cond.detach(), uncond.detach()
    torch.library.opcheck(TRANSITION[backend], (cond, uncond, x_t, rows, TABLE, 5.0, 2, keys(2), None, True))
    torch.library.opcheck(TRANSITION[backend], (cond, None, x_t, rows, TABLE, 1.0, 0, keys(2), None, True))


@pytest.mark.parametrize("backend", available_backends("log_ratio", DEVICE))
def test_compiles_without_a_graph_break(backend):
    cond, uncond, r_cond, r_uncond, x_t, x_prev, states, rows = case((2, 4, 6, 5))

    def step(cond, uncond):
        x0, children = transition(cond, uncond, x_t, rows, TABLE, 5.0, num_children=2, keys=keys(2))
        ratio, kl = log_ratio(cond, uncond, r_cond, r_uncond, x_t, x_prev, states, rows, TABLE, 5.0)
        return x0, children, ratio, kl

    with use_backend(backend):
        torch._dynamo.reset()
        compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
        for got, want in zip(compiled(cond, uncond), step(cond, uncond), strict=True):
            assert max_error(got, want) < 1e-6
