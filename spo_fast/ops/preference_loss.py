"""The preference loss on log-ratios, its gradient and the trainer's statistics in one pass.

Each of N terms ranks K sides, best first, each with S transitions:
    logit_k = beta * mean over s of clamp(log_ratio_ks, log(1 - clip), log(1 + clip))
    loss_n = - sum over i < K - 1 of (logit_i - logsumexp over j >= i of logit_j)           (ListMLE; Plackett-Luce)
which for K = 2 is SPO's -log sigmoid(beta (log r_w - log r_l)) with r clamped to [1 - clip, 1 + clip] (arXiv
2406.04314, train_spo.py 583-586). The clamp acts on log-ratios, never on exp of them: above 88 the published form
gives inf * 0 = NaN. Its gradient is 0 outside the interval and 1 on its ends, as torch.clamp's.

# A few hundred numbers: latency, not bandwidth. What it saves is about twenty launches a micro-batch and every host
# sync.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from spo_fast.ops import backend
from spo_fast.ops.backend import Context, differentiate, implementations
from spo_fast.ops.optional_triton import jit, launch, tl, triton, two_floats

backend.register(
    "preference_loss",
    cpu=("eager",),
    cuda=("triton", "eager"),
    why="a few hundred numbers: eager on a CPU, one launch on a GPU (the order there awaits a measurement)",
    absent={"c": "a few hundred numbers: a C call costs as much as the eager ops it would replace"},
)

STATS = (
    "terms",  # N
    "margin",  # logit_0 - logit_last
    "accuracy",  # 1 where the best side has the largest logit (strictly)
    "log_ratio_best",  # mean over S before the clamp
    "log_ratio_worst",
    "ratio_best",  # exp of the mean clamped log-ratio: what the published code logs
    "ratio_worst",
    "clamped",  # share of the term's K S transitions outside the clamp
    "dead",  # 1 where all of them are: such a term has no gradient
)
"""What each entry of the returned statistics sums over the terms; divide by `terms` for means."""

# ---------------------------------------------------------------------------------------------------- definition


def preference_loss_ref(log_ratio: Tensor, weight: Tensor, beta: float, low: float, high: float):
    """The definition: the loss, and sums of STATS over its terms."""
    clamped = log_ratio.clamp(low, high)
    logits = beta * clamped.mean(-1)  # (N, K)
    later = logits.flip(-1).logcumsumexp(-1).flip(-1)  # logsumexp over j >= i
    loss = (weight * (later - logits)[:, :-1].sum(-1)).sum()
    with torch.no_grad():
        raw, kept, outside = log_ratio.mean(-1), clamped.mean(-1), (log_ratio != clamped).to(logits.dtype)
        per_term = [
            torch.ones_like(weight),
            logits[:, 0] - logits[:, -1],
            (logits[:, 0] > logits[:, 1:].amax(-1)).to(logits.dtype),
            *(raw[:, 0], raw[:, -1], kept[:, 0].exp(), kept[:, -1].exp()),
            *(outside.mean((1, 2)), outside.amin((1, 2))),
        ]
        stats = torch.stack(per_term).sum(1)
    return loss, stats


# ---------------------------------------------------------------------------------------------------- Triton kernel


@jit
def _mean_clamped(ptr, mask, low, high, S: tl.constexpr):
    """Means over S of the clamped and the raw log-ratio, and how many lie outside the clamp."""
    kept = tl.zeros(mask.shape, ptr.dtype.element_ty)
    raw = kept
    outside = kept
    for s in tl.static_range(S):
        value = tl.load(ptr + s, mask=mask, other=0.0)
        clamped = tl.where(value < low, low, tl.where(value > high, high, value))  # a NaN stays one
        kept += clamped
        raw += value
        outside += tl.where(clamped != value, 1.0, 0.0)
    return kept / S, raw / S, outside


@jit
def _softmax_from(term, mask, beta, low, high, i: tl.constexpr, K: tl.constexpr, S: tl.constexpr):
    """Logit i, the largest of logits i..K-1, and the sum of their exponentials relative to it."""
    kept, _, _ = _mean_clamped(term + i * S, mask, low, high, S)
    first = beta * kept
    top = first
    for j in tl.static_range(i + 1, K):
        kept, _, _ = _mean_clamped(term + j * S, mask, low, high, S)
        top = tl.maximum(top, beta * kept)
    total = tl.exp(first - top)
    for j in tl.static_range(i + 1, K):
        kept, _, _ = _mean_clamped(term + j * S, mask, low, high, S)
        total += tl.exp(beta * kept - top)
    return first, top, total


@jit
def _store_gradient(grad, term, mask, weight, beta, low, high, K: tl.constexpr, S: tl.constexpr):
    """d loss / d log_ratio of every side's transitions, 0 outside the clamp."""
    for j in tl.static_range(K):
        kept, _, _ = _mean_clamped(term + j * S, mask, low, high, S)
        total_grad = tl.zeros(mask.shape, term.dtype.element_ty)
        for i in tl.static_range(K - 1):
            if i <= j:
                _, top, total = _softmax_from(term, mask, beta, low, high, i, K, S)
                total_grad += tl.exp(beta * kept - top) / total
                if i == j:
                    total_grad -= 1.0
        total_grad = weight * total_grad * beta / S
        for s in tl.static_range(S):
            value = tl.load(term + j * S + s, mask=mask, other=0.0)
            inside = (value >= low) & (value <= high)
            tl.store(grad + j * S + s, tl.where(inside, total_grad, 0.0), mask=mask)


@jit
def _best_and_worst(term, mask, beta, low, high, K: tl.constexpr, S: tl.constexpr):
    """Both sides' clamped and raw means, the largest logit but the best's, and all transitions outside the clamp."""
    kept_best, raw_best, outside = _mean_clamped(term, mask, low, high, S)
    kept_worst, raw_worst, _ = _mean_clamped(term + (K - 1) * S, mask, low, high, S)
    rival = beta * kept_worst
    for k in tl.static_range(1, K):
        kept, _, outside_k = _mean_clamped(term + k * S, mask, low, high, S)
        outside += outside_k
        rival = tl.maximum(rival, beta * kept)
    return kept_best, kept_worst, raw_best, raw_worst, rival, outside


@jit
def _preference_loss_kernel(
    log_ratio_ptr,
    weight_ptr,
    loss_ptr,
    grad_ptr,
    stats_ptr,
    N,
    beta,
    beta_low,
    low,
    low_low,
    high,
    high_low,
    K: tl.constexpr,
    S: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program: N terms in blocks, sums in registers, so the result does not depend on scheduling."""
    dtype: tl.constexpr = log_ratio_ptr.dtype.element_ty
    beta = tl.cast(beta, dtype) + tl.cast(beta_low, dtype)
    low = tl.cast(low, dtype) + tl.cast(low_low, dtype)
    high = tl.cast(high, dtype) + tl.cast(high_low, dtype)
    zero = tl.zeros([BLOCK], dtype)
    loss, terms, margin, accuracy = zero, zero, zero, zero
    raw_best, raw_worst, ratio_best, ratio_worst = zero, zero, zero, zero
    clamped, dead = zero, zero
    for start in range(0, N, BLOCK):
        n = start + tl.arange(0, BLOCK)
        mask = n < N
        term = log_ratio_ptr + n.to(tl.int64) * (K * S)
        weight = tl.load(weight_ptr + n, mask=mask, other=0.0)
        for i in tl.static_range(K - 1):
            first, top, total = _softmax_from(term, mask, beta, low, high, i, K, S)
            loss += weight * (tl.log(total) + (top - first))  # -log softmax of the best of those left
        _store_gradient(grad_ptr + n.to(tl.int64) * (K * S), term, mask, weight, beta, low, high, K, S)
        kept_0, kept_z, raw_0, raw_z, rival, outside = _best_and_worst(term, mask, beta, low, high, K, S)
        terms += tl.where(mask, 1.0, 0.0)
        margin += tl.where(mask, beta * (kept_0 - kept_z), 0.0)
        accuracy += tl.where(mask & (beta * kept_0 > rival), 1.0, 0.0)
        raw_best += tl.where(mask, raw_0, 0.0)
        raw_worst += tl.where(mask, raw_z, 0.0)
        ratio_best += tl.where(mask, tl.exp(kept_0), 0.0)
        ratio_worst += tl.where(mask, tl.exp(kept_z), 0.0)
        clamped += tl.where(mask, outside / (K * S), 0.0)
        dead += tl.where(mask & (outside == K * S), 1.0, 0.0)
    tl.store(loss_ptr, tl.sum(loss))
    tl.store(stats_ptr, tl.sum(terms))
    tl.store(stats_ptr + 1, tl.sum(margin))
    tl.store(stats_ptr + 2, tl.sum(accuracy))
    tl.store(stats_ptr + 3, tl.sum(raw_best))
    tl.store(stats_ptr + 4, tl.sum(raw_worst))
    tl.store(stats_ptr + 5, tl.sum(ratio_best))
    tl.store(stats_ptr + 6, tl.sum(ratio_worst))
    tl.store(stats_ptr + 7, tl.sum(clamped))
    tl.store(stats_ptr + 8, tl.sum(dead))


def _launch(log_ratio: Tensor, weight: Tensor, beta: float, low: float, high: float) -> tuple[Tensor, Tensor, Tensor]:
    N, K, S = log_ratio.shape
    loss, stats, grad = log_ratio.new_empty(()), log_ratio.new_empty(len(STATS)), torch.empty_like(log_ratio)
    block = min(256, max(16, triton.next_power_of_2(max(N, 1))))
    launch(_preference_loss_kernel)[(1,)](
        *(log_ratio, weight, loss, grad, stats, N, *two_floats(beta), *two_floats(low), *two_floats(high)),
        K=K,
        S=S,
        BLOCK=block,
    )
    return loss, stats, grad


# ---------------------------------------------------------------------------------------------------- torch.library op


def _fake(log_ratio, weight, beta, low, high):
    return log_ratio.new_empty(()), log_ratio.new_empty(len(STATS)), torch.empty_like(log_ratio)


PREFERENCE_LOSS = implementations("preference_loss", triton=_launch, fake=_fake)


def _save(ctx: Context, inputs: tuple[Tensor, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(output[2])
    ctx.mark_non_differentiable(output[1], output[2])


def _backward(_: None, ctx: Context, grad_loss: Tensor, *__: Tensor) -> tuple[Tensor | None, ...]:
    return grad_loss * ctx.saved_tensors[0], None, None, None, None


differentiate(PREFERENCE_LOSS, {}, _save, _backward)

# ---------------------------------------------------------------------------------------------------- public function


def preference_loss(
    log_ratio: Tensor,  # (N, K, S) float32 or float64, sides best first
    weight: Tensor,  # (N,) of each term; 1/N gives the mean
    beta: float,
    clip: float | None,  # ratios are kept in [1 - clip, 1 + clip]; None: no clamp
) -> tuple[Tensor, Tensor]:  # loss (), statistics (len(STATS),) without gradient
    """sum over n of weight_n loss_n, and the sums of STATS. Gradient flows to log_ratio only. N = 0 gives 0."""
    if log_ratio.ndim != 3 or log_ratio.shape[1] < 2:
        raise ValueError(f"log_ratio must be (N, K >= 2, S), got {tuple(log_ratio.shape)}")
    if clip is not None and not 0 < clip < 1:
        raise ValueError(f"clip={clip} must lie in (0, 1); None turns the clamp off")
    low, high = (-math.inf, math.inf) if clip is None else (math.log1p(-clip), math.log1p(clip))
    weight = weight.to(log_ratio.dtype)
    if backend.choose("preference_loss", log_ratio) == "triton":
        loss, stats, _ = PREFERENCE_LOSS["triton"](log_ratio.contiguous(), weight.contiguous(), float(beta), low, high)
        return loss, stats
    return preference_loss_ref(log_ratio, weight, beta, low, high)
