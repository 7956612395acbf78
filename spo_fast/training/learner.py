"""Backward passes and optimizer steps on one iteration's experience."""

from __future__ import annotations

import contextlib
import math
import statistics
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from spo_fast.config.training import Config
from spo_fast.method.experience import Experience, Prediction, batches
from spo_fast.method.objectives import predict_states
from spo_fast.method.schedule import StepTable
from spo_fast.training.accumulation import Slot, slots
from spo_fast.training.checkpoint import TrainState
from spo_fast.training.diagnosis import ratio_deviations
from spo_fast.training.optimizer import make_optimizer
from spo_fast.training.processes import ALONE, Group
from spo_fast.training.step_sizes import StepSizes


class LastBatch(NamedTuple):
    """What the last backward was given, for a diagnosis."""

    experience: Experience
    m: Prediction
    loss: Tensor


class Learner:
    """The policy and everything that changes it."""

    def __init__(
        self,
        policy: Any,
        objective: Any,
        table: StepTable,
        cfg: Config,
        total_iterations: int,
        group: Group = ALONE,
    ):
        from diffusers.optimization import get_scheduler

        self.policy, self.objective, self.table, self.cfg, self.group = policy, objective, table, cfg, group
        if objective.sampler == "ema":
            policy.keep_averages(objective.ema_decay)
        # a list, not a filter object: AdamW would exhaust an iterator and clipping would see nothing
        self.parameters: list[Tensor] = list(policy.masters)
        self.optimizer = make_optimizer(self.parameters, cfg.optim)
        self.scheduler = get_scheduler(
            cfg.optim.lr_scheduler,
            self.optimizer,
            num_warmup_steps=cfg.optim.lr_warmup_steps,
            num_training_steps=total_iterations,
        )
        self.last: LastBatch | None = None
        self.deviations: dict[int, float] | None = None  # of the ratio from 1 before the first step, by timestep
        self.sizes = StepSizes(policy, cfg.optim)
        self.poison: Tensor | float = 0.0  # NaN if a loss since the last step was not finite, else 0
        self.broken: list[str] = []  # trained weights whose last dropped gradient was not finite
        # fp16 gradients underflow: scale the loss, unscale the float32 masters' gradients, skip steps that overflowed
        self.scaler = torch.amp.GradScaler(policy.device.type, enabled=policy.dtype == torch.float16)
        if self.scaler.is_enabled():
            self.scaler.scale(torch.zeros((), device=policy.device))  # its scale exists from now on, terms or none

    def slots(self, total: int, state: TrainState) -> list[Slot]:
        """Those of `total` terms of all processes."""
        return list(slots(total, self.cfg.optim, state.slots, self.group.size))

    def slot_terms(self, total: int, state: TrainState) -> list[slice]:
        """The terms of each of them."""
        return [slot.terms for slot in self.slots(total, state)]

    def own(self, total: int, state: TrainState) -> Iterator[tuple[Slot, slice]]:
        """Each slot, and which of this process's terms are in it."""
        start = 0
        for slot in self.slots(total, state):
            part = self.group.share(slot.terms)
            yield slot, slice(start, start := start + part.stop - part.start)

    def batches(self, experience: Experience, total: int, state: TrainState) -> list[slice]:
        """The terms of each micro-batch of `update`."""
        most, found = self.cfg.optim.states_at_once, []
        for _, own in self.own(total, state):
            parts = batches(experience.index[own], most)
            found += [slice(own.start + b.start, own.start + b.stop) for b in parts]
        return found

    def update(
        self, experience: Experience, state: TrainState, timer: Any = None, total: int | None = None
    ) -> dict[str, Any]:
        """One pass over prepared experience in the order given, with its optimizer steps. Returns what to log.

        total: terms of all processes, of which `experience` has this one's share of each slot.
        """
        total = len(experience) if total is None else total
        timed = timer or (lambda name: contextlib.nullcontext())
        totals: Tensor | None = None
        loss_sum: Tensor | float = 0.0
        norms, used, dead = [], 0, 0
        guided = self.objective.guided(self.cfg.sample)
        first = state.optimizer_steps + state.skipped_steps == 0
        for slot, own in self.own(total, state):
            part = experience.select(own)
            for e in part.micro_batches(self.cfg.optim.states_at_once):
                with timed("backward"):
                    m = predict_states(self.policy, self.table, e, e.states, guided)
                    loss, stats = self.objective.loss(m, self.table, e, self.cfg.sample, slot.weight)
                    if self.is_dead(stats):
                        dead += 1
                    else:
                        self.scaler.scale(loss).backward()
                totals = stats if totals is None else totals + stats
                loss_sum = loss_sum + loss.detach() / slot.weight
                self.poison = self.poison + 0 * loss.detach()  # a clamp's gradient of NaN is 0: no norm would show it
                self.last = LastBatch(e, m.detach(), loss.detach())
                if first and self.objective.sampler != "data":
                    known = self.deviations or {}
                    for t, value in ratio_deviations(m, self.table, e, self.cfg.sample).items():
                        known[t] = max(value, known.get(t, 0.0))
                    self.deviations = known
            state.slots += 1
            used = slot.terms.stop
            if slot.step:
                with timed("step"):
                    norms.append(self.step())
                first = False
                took = math.isfinite(norms[-1])
                state.optimizer_steps += took
                state.skipped_steps += not took
                state.nonfinite_in_a_row = 0 if took else state.nonfinite_in_a_row + 1
                state.slots = 0
                if state.nonfinite_in_a_row >= self.cfg.optim.max_nonfinite_steps:
                    break
        state.pairs += used
        if state.slots:
            self.hand_in()
        if self.group.size > 1 and used:
            loss_sum, totals, dead = self._summed(loss_sum, totals, dead)
        record = self._log(used, loss_sum, totals, norms) | {"dead_batches": dead}
        self.go_to(self.scheduler.last_epoch + 1)
        return record

    def hand_in(self) -> None:
        """Gradients that wait for the next iteration's become process 0's alone, or parts: they are saved once.

        A NaN loss among them is told by a gradient, so that a resumed run drops the step as well.
        """
        if self.group.size > 1:
            self._add_gradients()
            if not self.group.main and self.policy.shards is None:
                self.optimizer.zero_grad(set_to_none=True)
        if self.group.size == 1 or self.policy.shards is not None:
            waiting = next((p.grad for p in self.parameters if p.grad is not None), None)
            if waiting is not None:
                waiting += self.poison

    def _add_gradients(self) -> None:
        if self.policy.shards is not None:
            self.policy.hand_in()
            return
        for p in self.parameters:  # a share may be empty, and its gradient then zero
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
        if self.group.size > 1:  # so that all processes drop the step
            assert self.parameters[0].grad is not None
            self.parameters[0].grad += self.poison
        self.group.add([p.grad for p in self.parameters if p.grad is not None])

    def _summed(self, loss_sum: Any, totals: Tensor | None, dead: int) -> tuple[Tensor, Tensor, int]:
        """The statistics of all processes."""
        device = self.policy.device
        own = torch.zeros(len(self.objective.stats), device=device) if totals is None else totals
        sums = torch.cat([torch.as_tensor([float(loss_sum), dead], device=device), own]).double()
        self.group.add([sums])
        return sums[0], sums[2:], int(sums[1])

    def is_dead(self, stats: Tensor) -> bool:
        """Whether a clamp holds every side of a micro-batch: then its gradient is exactly 0. Waits for the device."""
        names = self.objective.stats
        if "dead" not in names or getattr(self.objective, "clip", None) is None:
            return False
        terms, dead = stats[[names.index("terms"), names.index("dead")]].tolist()
        return dead == terms

    def step(self) -> float:
        """One optimizer step on the accumulated gradients; returns their norm before clipping, or NaN of a NaN loss.

        What is not finite is dropped, whatever the precision, and no step is taken.
        """
        if self.group.size > 1 or all(p.grad is None for p in self.parameters):
            self._add_gradients()  # of skipped backwards: zeros, momentum moves on all the same
        self.scaler.unscale_(self.optimizer)
        total = torch.nn.utils.get_total_norm([p.grad for p in self.parameters if p.grad is not None])
        total = total + torch.as_tensor(self.poison, dtype=total.dtype, device=total.device)
        self.poison = 0.0
        found = torch.stack([total, self.policy.size().to(total)])
        if self.policy.shards is not None:  # of this process's parts so far
            self.group.add([found.square_()])
            found = found.sqrt()
        total = found[0]
        norm, size = found.tolist()  # waits for the device, once an optimizer step
        self.sizes.look(size)  # of the step before
        finite = math.isfinite(norm)
        if finite:
            if self.cfg.optim.max_grad_norm is not None:
                torch.nn.utils.clip_grads_with_norm_(self.parameters, self.cfg.optim.max_grad_norm, total)
            self.scaler.step(self.optimizer)
            self.policy.publish()
        else:
            names = zip(self.policy.names, self.parameters, strict=True)
            self.broken = [name for name, p in names if p.grad is not None and not p.grad.isfinite().all()]
        # a norm can overflow where no gradient has: the scale falls then too
        self.scaler.update(None if finite or not self.scaler.is_enabled() else self.scaler.get_scale() / 2)
        self.optimizer.zero_grad(set_to_none=True)
        return norm

    def check_weights(self) -> None:
        """Raises RunError if the last optimizer step broke the weights. All processes call it; waits for the device."""
        size = self.policy.size()
        if self.policy.shards is not None:
            self.group.add([size.square_()])
            size = size.sqrt()
        self.sizes.look(float(size))

    def go_to(self, iteration: int) -> None:
        """Put the learning rate where this run's schedule has it at `iteration`."""
        self.scheduler.last_epoch = iteration
        for group, base, factor in zip(
            self.optimizer.param_groups, self.scheduler.base_lrs, self.scheduler.lr_lambdas, strict=True
        ):
            group["lr"] = base * factor(iteration)

    def _log(self, terms: int, loss_sum: Any, totals: Tensor | None, norms: list[float]) -> dict[str, Any]:
        record: dict[str, Any] = {"lr": self.optimizer.param_groups[0]["lr"]}
        if totals is not None:
            record["loss"] = loss_sum / terms
            names = enumerate(self.objective.stats)
            record |= {name: totals[i] / terms for i, name in names if name != "terms"}
        if norms:
            record["grad_norm"] = statistics.fmean([norm for norm in norms if math.isfinite(norm)] or norms)
        if self.scaler.is_enabled():
            record["loss_scale"] = self.scaler.get_scale()
        return record
