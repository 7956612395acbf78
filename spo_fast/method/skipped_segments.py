"""`--branch_window auto`: comparisons that almost never tell candidates apart are left out, inexactly and logged.

A segment whose running share of valid pairs is near zero goes on with one candidate a prompt, unjudged. Every REOPEN
iterations all are compared again, so that a segment can come back.
"""

from __future__ import annotations

from collections.abc import Mapping

from spo_fast.config.training import SampleConfig
from spo_fast.method.rollout import segments

NEAR_ZERO = 0.02  # of a segment's pairs
TRUST = 60.0  # comparisons that a share rests on before it is believed
DECAY = 0.98  # of what was counted, per comparison of a prompt: the last 50 weigh most
REOPEN = 25  # iterations

Window = dict[str, list[float]]
"""First step of a segment -> [comparisons so far, running share of valid ones]; a checkpoint keeps it as JSON."""


def to_skip(window: Mapping[str, list[float]], iteration: int, cfg: SampleConfig) -> frozenset[int]:
    """First steps of the segments that iteration's rollout leaves out; never all."""
    if cfg.branch_window == "all" or iteration % REOPEN == 0:
        return frozenset()
    starts = {first for first, _ in segments(cfg)}
    poor = starts & {int(i) for i, (count, share) in window.items() if count >= TRUST and share < NEAR_ZERO}
    return frozenset(poor) if poor < starts else frozenset()


def observe(window: Window, rows: list[int], cfg: SampleConfig, left_out: frozenset[int], prompts: int) -> None:
    """Count a rollout's comparisons; rows: of its terms' first transitions, in any order."""
    for first, _ in segments(cfg):
        if first not in left_out:
            count, share = window.get(str(first), [0.0, 0.0])
            kept = rows.count(first) / prompts
            # the mean of all at first, then a moving one
            keep = min(DECAY**prompts, count / (count + prompts))
            window[str(first)] = [count + prompts, keep * share + (1 - keep) * kept]


def saved(
    window: Mapping[str, list[float]], left_out: frozenset[int], cfg: SampleConfig, prompts: int, of_children: bool
) -> dict[str, float]:
    """What leaving segments out saved of a rollout (UNet rows, images not judged) and the pairs it probably lost.

    of_children: the scorer judges children as they are, without a prediction.
    """
    rows = images = lost = 0.0
    halves = 2 if cfg.guidance_scale > 1 else 1
    for first, end in segments(cfg):
        if first in left_out:
            # every step of the segment but the first is evaluated for all candidates, and so is the judgement's
            evaluations = (cfg.num_candidates - 1) * (end - first - 1)
            if end < cfg.num_steps and not of_children:
                evaluations += cfg.num_candidates - (end < cfg.last_branch)
            rows += halves * prompts * evaluations
            images += cfg.num_candidates * prompts
            lost += window[str(first)][1] * prompts * (end - first)
    return {"window_closed": len(left_out), "rows_saved": rows, "images_saved": images, "pairs_lost": lost}
