"""The optimizer steps of a preference model."""

from __future__ import annotations

import math
from collections.abc import Callable

from torch import Tensor

from spo_fast.config.preference import RewardOptimConfig
from spo_fast.training.optimizer import WeightUpdates
from spo_fast.training.preference_model import Reward


def learning_rate_factor(cfg: RewardOptimConfig, total: int) -> Callable[[int], float]:
    """Step -> factor of the learning rate under warmup_decay, as DeepSpeed's WarmupDecayLR has it."""
    warmup, end = cfg.lr_warmup_steps, cfg.lr_decay_steps or 4 * total

    def factor(step: int) -> float:
        if step < warmup:
            return math.log(step + 1) / math.log(warmup) if warmup > 1 else 1.0
        return max(0.0, (end - step) / max(1, end - warmup))

    return factor


class RewardLearner(WeightUpdates):
    """The preference model's weights and everything that changes them, as checkpoint.py wants it."""

    def __init__(self, reward: Reward, cfg: RewardOptimConfig, total: int):
        decay = cfg.lr_scheduler == "warmup_decay"
        super().__init__(reward.weights, cfg, learning_rate_factor(cfg, total) if decay else cfg.lr_scheduler, total)

    def step(self) -> Tensor:
        """One optimizer step on the accumulated gradients; returns their norm before clipping."""
        norm = self.gradient_norm()
        self.clip(norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.policy.copy_to_network()
        return norm
