"""The order in which training prompts are drawn.

A prompt is known by its index in the list, the order of an epoch by (seed, epoch), a batch by its iteration number.
So the whole position in the data is one integer, and a resumed run draws exactly what the interrupted one would have.
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from spo_fast.config.sections import TOYS
from spo_fast.data.prompts import TOY_PROMPTS, column_in, load_prompts

if TYPE_CHECKING:
    from torch import Tensor

    from spo_fast.config.training import Config


class Batch(NamedTuple):
    """The prompts of an iteration."""

    indices: list[int]  # into the list of prompts
    epoch: int
    position: int  # number of this batch within its epoch, from 0
    last_in_epoch: bool


def prompt_file(cfg: Config) -> str | Path | None:
    """The prompts given, else the built-in ones: the toy knows only its own world's."""
    return cfg.data.prompts or (TOY_PROMPTS if cfg.model.model in TOYS else None)


def training_prompts(cfg: Config, processes: int = 1) -> tuple[list[str], PromptSampler]:
    """A run's prompts and their order. Raises as load_prompts does."""
    column = cfg.data.caption_column
    if cfg.pairs.pairs is not None:  # the column is theirs, and the built-in list has none
        column = column_in(cfg.data.prompts, column) if cfg.data.prompts else None
    prompts = load_prompts(prompt_file(cfg), column)[: cfg.data.max_prompts]
    batch_size = processes * cfg.sample.sample_batch_size
    return prompts, PromptSampler(len(prompts), batch_size, cfg.run.seed, shuffle=cfg.data.shuffle)


def validation_prompts(cfg: Config, prompts: list[str]) -> list[str]:
    """Those given, or the first of the training's."""
    if (file := cfg.run.validation_prompt_file) is not None:
        return load_prompts(file, column_in(file, cfg.data.caption_column))
    return list(cfg.run.validation_prompt) or prompts[:4]


class PromptSampler:
    """Which prompts an iteration uses: a pure function of the iteration number, so there is no state to save.

    batch_size is the global one: every rank computes the same batch and takes its part. The last batch of an epoch is
    short when batch_size does not divide num_prompts; drop_last leaves it out. shuffle=False keeps the file's order.
    """

    def __init__(
        self, num_prompts: int, batch_size: int, seed: int, drop_last: bool = False, shuffle: bool = True
    ) -> None:
        if num_prompts < 1 or batch_size < 1:
            raise ValueError(f"num_prompts={num_prompts} and batch_size={batch_size} must both be at least 1.")
        if drop_last and batch_size > num_prompts:
            raise ValueError(
                f"batch_size={batch_size} exceeds the {num_prompts} prompts, so drop_last leaves no batch at all. "
                "Lower the batch size, add prompts, or keep the last short batch."
            )
        self.num_prompts, self.batch_size, self.seed, self.shuffle = num_prompts, batch_size, seed, shuffle
        self.iterations_per_epoch = num_prompts // batch_size if drop_last else -(-num_prompts // batch_size)

    def batch(self, iteration: int) -> Batch:
        """The prompts of an iteration, counted from 0 over all epochs."""
        if iteration < 0:
            raise ValueError(f"iteration={iteration} must not be negative: iterations count from 0.")
        epoch, position = divmod(iteration, self.iterations_per_epoch)
        start = position * self.batch_size
        order = epoch_permutation(self.num_prompts, self.seed if self.shuffle else None, epoch)
        indices = order[start : start + self.batch_size].tolist()
        return Batch(indices, epoch, position, position == self.iterations_per_epoch - 1)


@lru_cache(maxsize=4)  # one epoch's order serves all its batches; a cache of a pure function holds no state
def epoch_permutation(num: int, seed: int | None, epoch: int) -> Tensor:  # (num,) int64
    """A random order of 0..num-1 keyed by (seed, epoch); seed None is the identity."""
    import torch

    from spo_fast.method import noise

    return torch.arange(num) if seed is None else noise.permutation(num, seed, epoch, noise.PROMPTS)
