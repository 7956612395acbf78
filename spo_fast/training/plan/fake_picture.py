"""What a picture costs that is drawn to be looked at, counted on networks without weights."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from spo_fast.evaluation.sampling import NOISES, draw_latents
from spo_fast.method.experience import Candidates

if TYPE_CHECKING:
    from spo_fast.training.plan.counters import LiveStorage
    from spo_fast.training.plan.fake_run import FakeRun


@torch.no_grad()
def picture_flops(run: FakeRun, live: LiveStorage) -> dict[str, int]:
    """FLOPs of a validation's picture: draw (its steps and decoding), and score (by what is trained on)."""
    cfg, once, of_iteration = run.cfg, run.once, run.once.tally
    once.tally = {}
    with live.phase("draw"):
        given = (run.policy, run.model, run.shown_table, [""], [0], cfg.sample.guidance_scale)
        latents = draw_latents(*given, (cfg.run.seed, NOISES["validation"]))
        pixels, text = run.model.decode(latents), run.scorer.encode([""])
        now = torch.zeros((), dtype=torch.int64)
        run.scorer(Candidates(None, latents, now, text, 1, lambda _: pixels, 1))
    found, once.tally = once.tally, of_iteration
    flops = {part: counted["flops"] for part, counted in found.items()}
    return {"draw": flops["draw"] + flops["decode"], "score": flops.get("score", 0)}
