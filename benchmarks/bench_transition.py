"""ops.transition and ops.log_ratio at the shapes of real steps: eager, torch.compile, Triton and C, against float64."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.networks import ddim_scheduler
from benchmarks.shapes import RatioShape, StepShape, ratio_shapes, step_shapes
from benchmarks.timing import Case
from spo_fast.method.schedule import ddim_table
from spo_fast.ops import backend, philox
from spo_fast.ops.log_ratio import log_ratio, log_ratio_ref
from spo_fast.ops.transition import transition, transition_ref

GUIDANCE = 5.0


def coefficients(device: str) -> Tensor:  # (20, 5) float64
    scheduler = ddim_scheduler("sdxl", 20)
    return ddim_table(scheduler.alphas_cumprod, scheduler.timesteps, 1.0, "epsilon").coefficients.to(device)


def contenders(
    op: str, call: Callable[..., Any], definition: Callable[..., Any], device: str, modes: tuple[str, ...]
) -> tuple[dict[str, Callable[..., Any]], dict[str, str]]:
    """Functions of a case's inputs by name, and why others cannot run here. call runs the public op."""

    def forced(name: str, *inputs: Any) -> Any:
        with backend.use_backend(name):
            return call(*inputs)

    runnable: dict[str, Callable[..., Any]] = {"eager": functools.partial(forced, "eager")}
    if device == "cpu":
        runnable["ours"] = call  # the automatic choice, which there depends on the call
    skipped = {}
    for mode in modes:
        options: dict[str, Any] = {} if mode == "default" else {"mode": mode}
        name = "compile" if mode == "default" else f"compile {mode}"
        runnable[name] = torch.compile(definition, fullgraph=True, dynamic=False, **options)
    if not modes:
        skipped["compile"] = "torch.compile is not asked for"
    for name in ("triton", "c"):
        reason = backend.why_not(op, name, device)
        if reason is None:
            runnable[name] = functools.partial(forced, name)
        else:
            skipped[name] = reason
    return runnable, skipped


def transition_case(
    shape: StepShape, dtype: torch.dtype, device: str, modes: tuple[str, ...], supplied: bool = False
) -> Case:
    """Children with keyed noise, as the rollout draws them, or supplied; with K = 0, the x0 estimate that is judged."""
    table, (C, H, W), B, K = coefficients(device), shape.latent, shape.parents, shape.children
    n, width, want_x0 = C * H * W, dtype.itemsize, shape.children == 0

    def make(seed: int) -> tuple:
        generator = torch.Generator(device).manual_seed(seed)
        draw = functools.partial(torch.randn, (B, C, H, W), generator=generator, device=device)
        rows = torch.arange(4, 4 + B, device=device) % 20
        keys = torch.arange(B * 5, device=device).view(B, 5) + 1000 * seed
        drawn = torch.randn((K, B, C, H, W), generator=generator, device=device) if supplied else keys
        return draw().to(dtype), draw().to(dtype), draw(), rows, drawn

    def call(cond: Tensor, uncond: Tensor, x_t: Tensor, rows: Tensor, drawn: Tensor) -> Any:
        noise = {"noise" if supplied else "keys": drawn}
        return transition(cond, uncond, x_t, rows, table, GUIDANCE, num_children=K, want_x0=want_x0, **noise)

    def definition(cond: Tensor, uncond: Tensor, x_t: Tensor, rows: Tensor, drawn: Tensor) -> Any:
        keys, noise = (None, drawn) if supplied else (drawn, None)
        return transition_ref(cond, uncond, x_t, rows, table, GUIDANCE, K, keys, noise, want_x0)

    def truth(cond: Tensor, uncond: Tensor, x_t: Tensor, rows: Tensor, drawn: Tensor) -> Any:
        a, b, c, d, std = (v.view(-1, 1, 1, 1) for v in table[rows].unbind(1))
        m, x = uncond.double() + GUIDANCE * (cond.double() - uncond.double()), x_t.double()
        x0 = c * x + d * m if want_x0 else x.new_empty((0, C, H, W))
        children = []
        for k in range(K):
            if supplied:
                z = drawn[k]
            else:
                z = philox.normal(drawn + torch.tensor([0, 0, 0, 0, k], device=device), n).view_as(x)
            children.append(a * x + b * m + std * z.double())
        return x0, torch.stack(children) if children else x.new_empty((0, B, C, H, W))

    runnable, skipped = contenders("transition", call, definition, device, modes)
    bytes_moved = B * n * (2 * width + 4 + 4 * (K + want_x0 + K * supplied))
    shapes = {"B": B, "K": K, "latent": shape.latent}
    return Case(f"transition {shape.name}", str(dtype)[6:], shapes, bytes_moved, make, truth, runnable, skipped)


def log_ratio_case(shape: RatioShape, dtype: torch.dtype, device: str, modes: tuple[str, ...], backward: bool) -> Case:
    """Winner and loser of pairs that share x_t: T = 2 U transitions; backward adds the gradient of both predictions."""
    table, (C, H, W), U, T = coefficients(device), shape.latent, shape.states, shape.transitions
    n, width = C * H * W, dtype.itemsize
    states = torch.arange(T, device=device) // (T // U)
    rows = torch.arange(4, 4 + U, device=device) % 20

    def make(seed: int) -> tuple:
        generator = torch.Generator(device).manual_seed(seed)
        draw = functools.partial(torch.randn, generator=generator, device=device)
        cond, uncond = draw(U, C, H, W), draw(U, C, H, W)
        frozen = [(m + 0.05 * draw(U, C, H, W)).to(dtype) for m in (cond, uncond)]
        x_t = draw(U, C, H, W)
        a, b, _, _, std = (v.float().view(-1, 1, 1, 1) for v in table[rows[states]].unbind(1))
        m = (uncond + GUIDANCE * (cond - uncond))[states]
        x_prev = a * x_t[states] + b * m + std * draw(T, C, H, W)
        policy = [m.to(dtype).requires_grad_(backward) for m in (cond, uncond)]
        return *policy, *frozen, x_t, x_prev

    def with_gradients(outputs: tuple[Tensor, Tensor], cond: Tensor, uncond: Tensor) -> Any:
        if not backward:
            return outputs
        # weights of both signs, as the loss gives winners and losers
        weight = torch.linspace(-1, 1, T, device=device, dtype=outputs[0].dtype)
        total = (weight * outputs[0]).sum() + outputs[1].sum()
        return *(o.detach() for o in outputs), *torch.autograd.grad(total, (cond, uncond))

    def call(cond, uncond, frozen_cond, frozen_uncond, x_t, x_prev):
        out = log_ratio(cond, uncond, frozen_cond, frozen_uncond, x_t, x_prev, states, rows, table, GUIDANCE)
        return with_gradients(out, cond, uncond)

    forward = log_ratio_ref
    if modes:
        options: dict[str, Any] = {} if modes[0] == "default" else {"mode": modes[0]}
        forward = torch.compile(log_ratio_ref, fullgraph=True, dynamic=False, **options)

    def compiled(cond, uncond, frozen_cond, frozen_uncond, x_t, x_prev):
        out = forward(cond, uncond, frozen_cond, frozen_uncond, x_t, x_prev, states, rows, table, GUIDANCE)
        return with_gradients(out, cond, uncond)

    def truth(cond, uncond, frozen_cond, frozen_uncond, x_t, x_prev):
        cond, uncond = (v.detach().double().requires_grad_(backward) for v in (cond, uncond))
        a, b, _, _, std = (v.view(-1, 1, 1, 1) for v in table[rows[states]].unbind(1))

        def log_prob(c: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
            mean = a * x_t.double()[states] + b * (u.double() + GUIDANCE * (c.double() - u.double()))[states]
            return -((x_prev.double() - mean) ** 2 / (2 * std**2)).mean((1, 2, 3)), mean

        (policy, mean), (frozen, frozen_mean) = log_prob(cond, uncond), log_prob(frozen_cond, frozen_uncond)
        kl = ((mean - frozen_mean) ** 2 / (2 * std**2)).mean((1, 2, 3))
        return with_gradients((policy - frozen, kl), cond, uncond)

    runnable, skipped = contenders("log_ratio", call, log_ratio_ref, device, ())
    if modes:
        skipped.pop("compile")
        runnable["compile"] = compiled
    # read: four predictions, x_t, and every child once; backward the same again, and two gradients written
    read = U * n * (4 * width + 4) + T * n * 4
    bytes_moved = 2 * read + 2 * U * n * width if backward else read
    name = f"log_ratio {shape.name} {'forward+backward' if backward else 'forward'}"
    shapes = {"U": U, "T": T, "latent": shape.latent}
    return Case(name, str(dtype)[6:], shapes, bytes_moved, make, truth, runnable, skipped)


def cases(size: str, device: str, modes: tuple[str, ...] = ()) -> list[Case]:
    """All of both ops; 16-bit predictions and float32 latents, as in training."""
    dtype = torch.float16 if device == "cuda" else torch.float32
    out = [transition_case(shape, dtype, device, modes) for shape in step_shapes(size)]
    for shape in ratio_shapes(size):
        out += [log_ratio_case(shape, dtype, device, modes, backward) for backward in (False, True)]
    return out
