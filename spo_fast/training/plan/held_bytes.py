"""What a run holds throughout: the optimizer's state, and over how many processes it is sharded."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from spo_fast.config.sections import AdamConfig
from spo_fast.config.training import Config
from spo_fast.training.processes import world_size


def processes(cfg: Config) -> int:
    """Over which the masters and the optimizer's state are sharded: those that this one was launched with."""
    return world_size() if cfg.adapter.full_finetune else 1


def optimizer_state(masters: list[Tensor], cfg: AdamConfig) -> Iterator[int]:
    """Bytes of each tensor: two moments a weight; in 8 bits with a float32 scale for each 256 weights."""
    for master in masters:
        n = master.numel()
        eight_bit = cfg.optimizer != "adamw" and n >= cfg.min_8bit_size
        yield from (n, n, 4 * -(-n // 256), 4 * -(-n // 256)) if eight_bit else (master.nbytes, master.nbytes)
