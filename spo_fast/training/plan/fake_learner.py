"""The learner on fake tensors: of an iteration's micro-batches the largest runs, once."""

from __future__ import annotations

import contextlib
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from spo_fast.method.experience import Experience, Prediction
from spo_fast.training.checkpoint import TrainState
from spo_fast.training.learner import Learner

if TYPE_CHECKING:
    from spo_fast.training.iteration import Timer
    from spo_fast.training.plan.fake_run import FakeRun


class FakeLearner(Learner):
    """A smaller micro-batch is taken to need no more memory, and FLOPs in proportion to its states."""

    def __init__(self, run: FakeRun):
        cfg, policy = run.cfg, run.policy
        policy.kept.clear()
        for master in policy.masters:
            master.grad = None  # of the prediction before
        whole = replace(cfg, optim=replace(cfg.optim, optimizer="adamw"))  # its steps are not taken
        super().__init__(policy, run.objective, run.table, whole, total_iterations=1)
        self.once, self.step_bytes = run.once, run.held.step(cfg, policy.masters)
        self.guided, self.most, self.accumulates = run.objective.guided(cfg.sample), 0, False
        self.ran = False
        """Whether the largest micro-batch has run."""
        self.straddles = cfg.optim.accumulation == "published" and cfg.optim.gradient_accumulation_steps > 1
        """Gradients can outlive an iteration."""

    def update(
        self,
        experience: Experience,
        state: TrainState,
        timer: Timer = lambda phase: contextlib.nullcontext(),
        total: int | None = None,
    ) -> dict[str, object]:
        """As the trainer's, which is told what its largest micro-batch is."""
        parts = self.batches(experience, len(experience), state)
        self.most = max(len(experience.index[part].unique()) for part in parts)
        self.accumulates = self.straddles or len(parts) > len(self.slots(len(experience), state))
        return super().update(experience, state, timer, total)

    def backward(self, e: Experience, weight: float) -> tuple[Prediction, Tensor, Tensor]:
        """Of the largest micro-batch, where several add up beside the gradients of those before."""
        states, whole, optim = len(e.states), super().backward, self.cfg.optim
        if states < self.most or self.ran:
            return self._nothing(e)
        self.ran = True
        if self.accumulates:
            self.fill_gradients()
        how = (self.accumulates, optim.gradient_checkpointing, self.cfg.engine.memory)
        key = ("backward", self.cfg.objective, self.cfg.sample.guidance_scale, len(e), states, *how)
        found = self.once.run(key, "policy", states * (1 + self.guided), lambda: whole(e, weight))
        self.fill_gradients()
        return found

    def _nothing(self, e: Experience) -> tuple[Prediction, Tensor, Tensor]:
        shape, dtype = e.states.x_t.shape, self.policy.dtype
        halves = [self.once.empty(*shape, dtype=dtype) for _ in range(1 + self.guided)]
        return (
            Prediction(halves[0], halves[1] if self.guided else None),
            torch.zeros(()),
            torch.zeros(len(self.objective.stats)),
        )

    def fill_gradients(self) -> None:
        """Gradients of all masters, those that are there kept."""
        for master in self.policy.masters:
            master.grad = torch.empty_like(master) if master.grad is None else master.grad

    def is_dead(self, stats: Tensor) -> bool:
        """No clamp holds anything."""
        return False

    def step(self) -> float:
        """Nothing moves."""
        self.once.live.note(self.once.live.current_bytes + self.step_bytes)
        self.optimizer.zero_grad(set_to_none=True)
        self.nonfinite = 0.0
        return 1.0
