"""ops.preference_loss, forward and backward, at a micro-batch's and an iteration's number of pairs."""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from torch import Tensor

from benchmarks.bench_transition import contenders
from benchmarks.shapes import PREFERENCE_TERMS
from benchmarks.timing import Case
from spo_fast.ops.preference_loss import preference_loss, preference_loss_ref

BETA, CLIP = 10.0, 0.1
LOW, HIGH = math.log1p(-CLIP), math.log1p(CLIP)


def preference_loss_case(terms: int, device: str, modes: tuple[str, ...]) -> Case:
    """N pairs (K = 2, S = 1), a part of them outside the clamp; loss and gradient."""

    def make(seed: int) -> tuple:
        generator = torch.Generator(device).manual_seed(seed)
        ratio = 0.08 * torch.randn(terms, 2, 1, generator=generator, device=device)
        return ratio.requires_grad_(), torch.full((terms,), 1 / terms, device=device)

    def with_gradient(loss: Tensor, ratio: Tensor) -> tuple[Tensor, Tensor]:
        return loss.detach(), torch.autograd.grad(loss, ratio)[0]

    def call(ratio: Tensor, weight: Tensor) -> Any:
        return with_gradient(preference_loss(ratio, weight, BETA, CLIP)[0], ratio)

    forward: Any = preference_loss_ref
    if modes:
        options: dict[str, Any] = {} if modes[0] == "default" else {"mode": modes[0]}
        forward = torch.compile(preference_loss_ref, fullgraph=True, dynamic=False, **options)

    def compiled(ratio: Tensor, weight: Tensor) -> Any:
        return with_gradient(forward(ratio, weight, BETA, LOW, HIGH)[0], ratio)

    def truth(ratio: Tensor, weight: Tensor) -> Any:
        ratio = ratio.detach().double().requires_grad_()
        kept = ratio.clamp(LOW, HIGH)[:, :, 0]
        loss = -(weight.double() * torch.nn.functional.logsigmoid(BETA * (kept[:, 0] - kept[:, 1]))).sum()
        return with_gradient(loss, ratio)

    runnable, skipped = contenders("preference_loss", call, preference_loss_ref, device, ())
    if modes:
        skipped.pop("compile")
        runnable["compile"] = compiled
    bytes_moved = terms * (2 * 4 * 2 + 4)  # ratios read, gradients written, weights read
    name = f"preference_loss N={terms} forward+backward"
    return Case(name, "float32", {"N": terms, "K": 2, "S": 1}, bytes_moved, make, truth, runnable, skipped)


def cases(size: str, device: str, modes: tuple[str, ...] = ()) -> list[Case]:
    terms = PREFERENCE_TERMS if size == "full" else PREFERENCE_TERMS[:1]
    return list(map(functools.partial(preference_loss_case, device=device, modes=modes), terms))
