"""Whether an optimizer step leaves the weights whole: finite, and moved by less than their size."""

from __future__ import annotations

import math

from spo_fast.config.errors import RunError
from spo_fast.config.sections import AdamConfig
from spo_fast.models.trained_weights import TrainedWeights


class StepSizes:
    """Ends a run whose weights are broken: not finite, or moved by more than their own size in one optimizer step.

    Told from TrainedWeights.size, whose difference is the least that the step can have moved them by. The size that
    counts is that of the frozen weights that LoRAs change, else that of the trained weights before the step.
    """

    def __init__(self, policy: TrainedWeights, cfg: AdamConfig):
        reach = getattr(policy, "reach", None)
        self.reach, self.cfg = None if reach is None else float(reach), cfg
        self.last: float | None = None

    def look(self, size: float) -> None:
        """size: of the weights after each step. Raises RunError."""
        last, self.last = self.last, size
        moved = 0.0 if last is None else size - last
        if math.isfinite(size) and moved <= (last or 0.0 if self.reach is None else self.reach):
            return
        what = "moved what is trained by more than the weights' own size" if math.isfinite(size) else "left no number"
        raise RunError(
            f"an optimizer step {what}: nothing of it is saved. Lower --learning_rate ({self.cfg.learning_rate:g}), "
            f"--adam_weight_decay ({self.cfg.adam_weight_decay:g}) or a large --lora_alpha; --resume_from_checkpoint "
            "latest goes on from before it."
        )
