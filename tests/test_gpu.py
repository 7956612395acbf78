"""What only a CUDA device can show: nothing waits for the host; a captured step draws fresh noise at each replay."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import pytest
import torch
from golden_replay import conditioning, load, networks, policy, spm, table
from runs import run_toy
from torch import Tensor

from benchmarks.timing import capture
from spo_fast.config.training import SampleConfig
from spo_fast.evaluation.pages.run_record import read_metrics
from spo_fast.method.experience import Cond
from spo_fast.method.noise import KeyedDraws
from spo_fast.method.rollout import RolloutBatch, Sampler, rollout_segments
from spo_fast.ops.backend import available_backends, use_backend
from spo_fast.ops.geglu import geglu
from spo_fast.ops.group_norm_silu import group_norm_silu
from spo_fast.ops.log_ratio import log_ratio
from spo_fast.ops.lora_linear import lora_linear
from spo_fast.ops.merge_lora import merge_lora
from spo_fast.ops.preference_loss import preference_loss
from spo_fast.ops.resize_normalize import resize_normalize
from spo_fast.ops.transition import transition
from spo_fast.scorers.preprocess import CLIP_MEAN, CLIP_STD

pytestmark = pytest.mark.gpu
DEVICE = "cuda"


def to_cuda(cond: Cond) -> Cond:
    return Cond(
        {k: v.cuda().contiguous() for k, v in cond.cond.items()},
        {k: v.cuda().contiguous() for k, v in cond.uncond.items()},
    )


@pytest.mark.parametrize("backend", ["eager", "c", "triton"])
def test_rollout_never_waits_for_the_gpu(backend):
    if backend not in available_backends("transition", "cuda"):
        pytest.skip(f"{backend} cannot run here")
    cfg = SampleConfig(num_candidates=2, num_inner_steps=3)
    unet, _ = networks("sdxl", torch.float32)
    golden, _ = load("rollout_sdxl_k2_inner3")
    scorer = spm()
    scorer.model.cuda()
    trained, steps = policy(unet.cuda()), table().to("cuda")
    text = scorer.encode_ids(golden["in.spm_input_ids"])
    cond, index = to_cuda(conditioning(golden, torch.float32)), torch.arange(2, device="cuda")
    batch = RolloutBatch(cond, text, KeyedDraws(1, 0, index), (4, 8, 8), torch.float32)

    def decode(latents):
        return latents[:, :3].repeat_interleave(8, 2).repeat_interleave(8, 3)

    with use_backend(backend):
        rollout_segments(Sampler(trained, steps, scorer, decode, cfg), batch)  # loads kernels
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            s = rollout_segments(Sampler(trained, steps, scorer, decode, cfg), batch)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert s.valid.shape == (16, 2) and bool(s.x_prev.isfinite().all())


# ---------------------------------------------------------------------------------------------------- graph capture


@dataclass(frozen=True)
class Captured:
    """An op as it is captured: `call` on inputs that `make` draws from a seed, outputs and gradients in a list."""

    op: str
    make: Callable[[int], Sequence[Tensor]]
    call: Callable[..., Sequence[Tensor]]
    tolerance: float
    """Against eager, of the largest value."""


def randn(seed: int, *shapes: tuple[int, ...]) -> list[Tensor]:
    generator = torch.Generator(DEVICE).manual_seed(seed)
    return [torch.randn(shape, device=DEVICE, generator=generator) for shape in shapes]


ROWS = (4, 9, 19)
LATENT = (3, 4, 16, 16)


def keys_of(seed: int) -> Tensor:
    return torch.tensor([[1, seed, p, 4, 0] for p in range(3)], device=DEVICE)


def capture_transition(cond: Tensor, uncond: Tensor, x_t: Tensor, keys: Tensor, rows: Tensor, steps: Tensor):
    return transition(cond, uncond, x_t, rows, steps, 5.0, num_children=4, keys=keys)


def capture_log_ratio(cond: Tensor, uncond: Tensor, f_cond: Tensor, f_uncond: Tensor, x_t: Tensor, x_prev, rows, steps):
    policy = (cond.detach().requires_grad_(), uncond.detach().requires_grad_())
    out = log_ratio(*policy, f_cond, f_uncond, x_t, x_prev, torch.arange(3, device=DEVICE), rows, steps, 5.0)
    return [*(o.detach() for o in out), *torch.autograd.grad((out[0] + 2 * out[1]).sum(), policy)]


def capture_preference_loss(ratio: Tensor, weight: Tensor):
    ratio = ratio.detach().requires_grad_()
    loss, stats = preference_loss(ratio, weight, 10.0, 0.1)
    return [loss.detach(), stats, *torch.autograd.grad(loss, ratio)]


def capture_resize_normalize(pixels: Tensor):
    return [resize_normalize(pixels, 32, CLIP_MEAN, CLIP_STD, torch.float32)]


def steps_of(seed: int) -> list[Tensor]:  # other rows each time
    return [torch.tensor(ROWS, device=DEVICE) - seed, table().coefficients.to(DEVICE)]


CAPTURED = {
    "transition": Captured(
        "transition", lambda s: [*randn(s, *[LATENT] * 3), keys_of(s), *steps_of(s)], capture_transition, 1e-5
    ),
    "log_ratio": Captured("log_ratio", lambda s: [*randn(s, *[LATENT] * 6), *steps_of(s)], capture_log_ratio, 1e-5),
    "preference_loss": Captured(
        "preference_loss",
        lambda s: [0.05 * randn(s, (7, 2, 1))[0], torch.full((7,), 1 / 7, device=DEVICE)],
        capture_preference_loss,
        1e-5,
    ),
    "resize_normalize": Captured(
        "resize_normalize", lambda s: randn(s, (2, 3, 70, 61)), capture_resize_normalize, 1e-4
    ),
}


@pytest.mark.parametrize("backend", ["c", "triton"])
@pytest.mark.parametrize("name", CAPTURED)
def test_three_replays_with_changed_inputs_equal_eager(name, backend):
    op = CAPTURED[name]
    if backend not in available_backends(op.op, DEVICE):
        pytest.skip(f"{name} has no backend {backend} here")
    inputs = op.make(0)
    with use_backend(backend):
        replay, outputs = capture(lambda: op.call(*inputs))
    before: list[Tensor] = []
    for seed in (1, 2, 3):
        for place, value in zip(inputs, op.make(seed), strict=True):
            place.copy_(value)
        replay()
        with use_backend(backend):
            uncaptured = op.call(*inputs)
        with use_backend("eager"):
            want = op.call(*inputs)
        for got, same, exact in zip(outputs, uncaptured, want, strict=True):
            assert torch.equal(got, same)  # the same kernels on the same inputs
            assert (got - exact).abs().max() <= op.tolerance * exact.abs().max().clamp_min(1)
        assert not before or not torch.equal(before[0], outputs[0])  # and the inputs did arrive
        before = [o.clone() for o in outputs]


@pytest.mark.parametrize("backend", ["c", "triton"])
def test_a_captured_step_draws_fresh_noise_at_each_replay(backend):
    if backend not in available_backends("transition", "cuda"):
        pytest.skip(f"{backend} cannot run here")
    generator = torch.Generator("cuda").manual_seed(0)
    cond, uncond, x_t = (torch.randn(3, 4, 16, 16, device="cuda", generator=generator) for _ in range(3))
    rows = torch.tensor([4, 9, 19], device="cuda")
    keys = torch.tensor([[1, 0, p, 4, 0] for p in range(3)], device="cuda")
    coefficients = table().coefficients.cuda()

    def step():
        x0, children = transition(cond, uncond, x_t, rows, coefficients, 5.0, num_children=4, keys=keys)
        ratio, _ = log_ratio(
            cond, uncond, uncond, cond, x_t, children[0], torch.arange(3, device="cuda"), rows, coefficients, 5.0
        )
        return x0, children, ratio

    with use_backend(backend):
        replay, captured = capture(step)
        seen = []
        for iteration in (1, 2, 1):
            keys[:, 1] = iteration
            x_t.copy_(torch.randn(x_t.shape, device="cuda", generator=generator))
            replay()
            for got, want in zip(captured, step(), strict=True):
                assert torch.equal(got, want)  # the same kernels on the same inputs
            a, b, *_ = coefficients[rows].float().unbind(1)
            mean = a.view(-1, 1, 1, 1) * x_t + b.view(-1, 1, 1, 1) * (uncond + 5 * (cond - uncond))
            seen.append((captured[1] - mean).clone())
    assert (seen[0] - seen[1]).abs().mean() > 0.01  # another iteration: other noise
    torch.testing.assert_close(seen[0], seen[2], rtol=1e-4, atol=1e-4)  # the same key: the same noise


@pytest.mark.parametrize("backend", ["eager", "c", "triton"])
def test_a_captured_merge_rounds_afresh_at_each_replay(backend):
    if backend not in available_backends("merge_lora", "cuda"):
        pytest.skip(f"{backend} cannot run here")
    generator = torch.Generator("cuda").manual_seed(0)
    weight = (0.02 * torch.randn(320, 640, device="cuda", generator=generator)).bfloat16()
    A, B = (0.01 * torch.randn(*s, device="cuda", generator=generator) for s in ((4, 640), (320, 4)))
    key, out = torch.tensor([1, 0, 2, 3, 0], device="cuda"), torch.empty_like(weight)
    x, before = torch.randn(8, 640, device="cuda", generator=generator).bfloat16(), weight.clone()

    def step():
        return torch.nn.functional.linear(x, merge_lora(weight, A, B, 0.5, key, out=out))

    seen = []
    with use_backend(backend):
        replay, captured = capture(step)
        for iteration in (1, 2, 1):
            key[1] = iteration
            B.mul_(1.5 if iteration == 2 else 1 / 1.5)  # trained on; back to the first replay's at the third
            out.fill_(float("nan"))
            replay()
            merged, y = out.clone(), captured.clone()
            with use_backend("eager"):
                want = step()
            # the product may be summed in another order outside the graph: then a rounding in thousands differs
            assert (merged != out).float().mean() < 1e-3
            assert (y - want).abs().max() <= 0.02 * want.abs().max()
            seen.append(merged)
        key[1] = 3  # only the key
        replay()
    assert not torch.equal(seen[0], seen[1]) and not torch.equal(seen[2], out)
    assert torch.equal(weight, before)


@pytest.mark.parametrize("backend", ["eager", "triton"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_a_captured_lora_layer_follows_its_inputs(backend, dtype):
    if backend not in available_backends("lora_linear", "cuda"):
        pytest.skip(f"{backend} cannot run here")
    generator = torch.Generator("cuda").manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, device="cuda", generator=generator)

    weight, bias = (draw(640, 320) / 18).to(dtype), draw(640).to(dtype)
    x, dy = draw(2, 1000, 320).to(dtype).requires_grad_(), draw(2, 1000, 640).to(dtype)
    A, B = (draw(64, 320) / 18).requires_grad_(), (draw(640, 64) / 16).requires_grad_()

    def step():
        y = lora_linear(x, weight, bias, A, B, 0.5)
        return y.detach(), *torch.autograd.grad(y, (x, A, B), dy)

    tolerance = {torch.float16: 4e-3, torch.bfloat16: 3e-2, torch.float32: 1e-5}[dtype]
    with use_backend(backend):
        replay, captured = capture(step)
        for _ in range(3):
            with torch.no_grad():
                for v in (x, dy, A, B):
                    v.copy_(v.roll(1, 0) * 0.9)
            replay()
            got = [v.clone() for v in captured]
            with use_backend("eager"):
                for g, want in zip(got, step(), strict=True):
                    assert (g - want).abs().max() <= tolerance * want.abs().max()


POINTWISE = {  # function of x, x's shape and layout
    "group_norm_silu": (
        lambda x: group_norm_silu(x, torch.ones_like(x[0, :, 0, 0]), torch.full_like(x[0, :, 0, 0], 0.1), 32),
        *((2, 320, 24, 20), torch.channels_last),
    ),
    "geglu": (geglu, (2, 96, 2560), torch.contiguous_format),
}


@pytest.mark.parametrize("op", POINTWISE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_captured_forward_and_backward_equal_eager_on_changed_inputs(op, dtype):
    if "triton" not in available_backends(op, "cuda"):
        pytest.skip("triton cannot run here")
    function, shape, layout = POINTWISE[op]
    generator = torch.Generator("cuda").manual_seed(0)
    x = torch.randn(shape, device="cuda", generator=generator).to(dtype).contiguous(memory_format=layout)
    x.requires_grad_()
    grad_y = torch.randn_like(function(x))

    def step():
        y = function(x)
        return y.detach(), torch.autograd.grad(y, x, grad_y)[0]

    with use_backend("triton"):
        replay, captured = capture(step)
    tolerance = {torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 4e-2}[dtype]
    previous = None
    for seed in range(3):
        with torch.no_grad():
            x.copy_(torch.randn(shape, device="cuda", generator=torch.Generator("cuda").manual_seed(seed)))
        replay()
        with use_backend("eager"):
            for got, want in zip(captured, step(), strict=True):
                torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)
        assert previous is None or not torch.equal(previous, captured[0])
        previous = captured[0].clone()


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_group_norm_of_more_than_2_to_the_31_elements(layout):
    """A VAE's (17, 128, 1024, 1024): 32-bit offsets would wrap. The last sample alone must give the same bits."""
    if "triton" not in available_backends("group_norm_silu", "cuda") or torch.cuda.mem_get_info()[0] < 24 << 30:
        pytest.skip("needs Triton and 24 GiB of free memory")
    x = torch.empty(17, 128, 1024, 1024, device="cuda", dtype=torch.float16, memory_format=layout).normal_()
    x.requires_grad_()
    weight, bias = torch.ones(128, device="cuda", dtype=x.dtype), torch.zeros(128, device="cuda", dtype=x.dtype)
    last = x.detach()[16:].clone(memory_format=layout).requires_grad_()
    with use_backend("triton"):
        y, alone = group_norm_silu(x, weight, bias, 32), group_norm_silu(last, weight, bias, 32)
        assert torch.equal(y[16:], alone)
        (grad,) = torch.autograd.grad(y, x, y.detach())
        (grad_alone,) = torch.autograd.grad(alone, last, alone.detach())
    assert torch.equal(grad[16:], grad_alone)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"num_inner_steps": 1, "method": "mspo"},
        {"rollout_weights": "merged"},
        {"gradient_checkpointing": True},
        {"clip": 1e-5, "train_batch_size": 1},  # dead micro-batches
    ],
    ids=["spo", "mspo", "merged", "checkpointed", "clamped"],
)
def test_captured_iterations_equal_eager_ones(tmp_path, settings):
    """Three iterations and more of the toy: prompts, noise, weights and the number of valid pairs change."""
    few = {"device": "cuda", "mixed_precision": "no", "allow_tf32": False, "num_train_epochs": 3, "max_train_steps": 5}
    records = []
    for graphs in (False, True):
        out = run_toy(tmp_path / str(graphs), cuda_graphs=graphs, threshold=0.0, **few, **settings)
        records.append(read_metrics(out / "metrics.jsonl"))
    for plain, captured in zip(*records, strict=True):
        assert plain["pairs"] == captured["pairs"]
        for name in ("score_mean", "loss", "grad_norm", "log_ratio_best", "log_ratio_worst"):
            assert captured[name] == pytest.approx(plain[name], rel=1e-3, abs=1e-4), name
