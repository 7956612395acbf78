"""How an iteration's terms become optimizer steps."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from spo_fast.config.training import OptimConfig
from spo_fast.method.experience import Rows


@dataclass(frozen=True)
class Slot:
    """Consecutive terms that share one weight in the loss, and whether an optimizer step follows."""

    terms: Rows
    weight: float
    step: bool


def slots(num_terms: int, cfg: OptimConfig, filled: int, processes: int = 1) -> Iterator[Slot]:
    """How an iteration's terms, those of all processes, become optimizer steps. A slot is shared by all processes.

    filled: slots already waiting from the iteration before.

    balanced: cut into equal parts of about train_batch_size x gradient_accumulation_steps terms, a mean each, so every
    term of the iteration is used once with (up to one term) equal weight. published: train_batch_size terms a slot, a
    mean each however short, a step every gradient_accumulation_steps slots, counted across iterations
    (train_spo.py: accelerator.accumulate with end_of_dataloader held off).
    """
    size = cfg.train_batch_size * processes
    if cfg.accumulation == "published":
        for i, start in enumerate(range(0, num_terms, size), start=filled + 1):
            stop = min(start + size, num_terms)
            weight = 1 / ((stop - start) * cfg.gradient_accumulation_steps)
            yield Slot(slice(start, stop), weight, step=i % cfg.gradient_accumulation_steps == 0)
        return
    steps = max(1, round(num_terms / (size * cfg.gradient_accumulation_steps))) if num_terms else 0
    for i in range(steps):
        start, stop = i * num_terms // steps, (i + 1) * num_terms // steps
        yield Slot(slice(start, stop), 1 / (stop - start), step=True)
