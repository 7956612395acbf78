"""Backward passes and optimizer steps on one iteration's experience."""

from __future__ import annotations

import contextlib
import math
import statistics
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from spo_fast.config.errors import RunError
from spo_fast.config.training import Config
from spo_fast.method.experience import Experience, Prediction, Rows, batches
from spo_fast.method.objectives import Objective, predict_states
from spo_fast.method.schedule import StepTable
from spo_fast.models.policy import Policy
from spo_fast.models.sharded import EXPORTED, SAMPLES
from spo_fast.training.accumulation import Slot, slots
from spo_fast.training.checkpoint import TrainState
from spo_fast.training.diagnosis import ratio_deviations
from spo_fast.training.optimizer import WeightUpdates
from spo_fast.training.processes import ALONE, Group


class LastBatch(NamedTuple):
    """What the last backward was given, for a diagnosis."""

    experience: Experience
    m: Prediction
    loss: Tensor


@dataclass
class Sums:
    """What an update adds up for the log."""

    stats: Tensor | None = None  # of the objective, over terms; None before the first
    loss: Tensor | float = 0.0  # over terms
    dead_batches: Tensor | int = 0
    output: Tensor | float = 0.0  # root mean squares of the states' predictions
    states: int = 0
    norms: list[float] = field(default_factory=list)  # of the gradient, a step each


class Learner(WeightUpdates):
    """The policy and everything that changes it."""

    policy: Policy

    def __init__(
        self,
        policy: Policy,
        objective: Objective,
        table: StepTable,
        cfg: Config,
        total_iterations: int,
        group: Group = ALONE,
    ):
        self.objective, self.table, self.cfg, self.group = objective, table, cfg, group
        if objective.samples_from == "ema":
            policy.keep_averages(objective.ema_decay)
        super().__init__(policy, cfg.optim, cfg.optim.lr_scheduler, total_iterations)
        if cfg.run.export_ema:
            steady = objective.samples_from == "ema" and objective.ema_decay == cfg.objective.ema_decay
            if not steady:
                policy.keep_averages(cfg.objective.ema_decay, EXPORTED)
            policy.export_average(SAMPLES if steady else EXPORTED)
        self.last: LastBatch | None = None
        self.deviations: dict[int, float] | None = None  # of the ratio from 1 before the first step, by timestep
        self.nonfinite: Tensor | float = 0.0  # NaN if a loss since the last step was not finite, else 0
        self.broken: list[str] = []  # trained weights whose last dropped gradient was not finite
        self.dead: Tensor | int = 0  # micro-batches since the last step whose gradient is 0
        self.always_looks = self.looks = policy.device.type == "cpu"
        """Whether a backward of a dead micro-batch is left out. On a GPU each look waits, so it looks only if the step
        before had a dead one: until then their zeros are added."""
        # fp16 gradients underflow: scale the loss, unscale the float32 masters' gradients, skip steps that overflowed
        self.scaler = torch.amp.GradScaler(policy.device.type, enabled=policy.dtype == torch.float16)
        if self.scaler.is_enabled():
            self.scaler.scale(torch.zeros((), device=policy.device))  # its scale exists from now on, terms or none

    def slots(self, total: int, state: TrainState) -> list[Slot]:
        """Those of `total` terms of all processes."""
        return list(slots(total, self.cfg.optim, state.slots, self.group.size))

    def slot_terms(self, total: int, state: TrainState) -> list[Rows]:
        """The terms of each of them."""
        return [slot.terms for slot in self.slots(total, state)]

    def own(self, total: int, state: TrainState) -> Iterator[tuple[Slot, Rows]]:
        """Each slot, and which of this process's terms are in it."""
        start = 0
        for slot in self.slots(total, state):
            part = self.group.share(slot.terms)
            yield slot, slice(start, start := start + part.stop - part.start)

    def batches(self, experience: Experience, total: int, state: TrainState) -> list[Rows]:
        """The terms of each micro-batch of `update`."""
        most, found = self.cfg.optim.states_at_once, []
        for _, own in self.own(total, state):
            parts = batches(experience.index[own], most)
            found += [slice(own.start + b.start, own.start + b.stop) for b in parts]
        return found

    def update(
        self,
        experience: Experience,
        state: TrainState,
        timer: Callable[[str], AbstractContextManager[None]] = lambda phase: contextlib.nullcontext(),
        total: int | None = None,
    ) -> dict[str, object]:
        """One pass over prepared experience in the order given, with its optimizer steps. Returns what to log.

        total: terms of all processes, of which `experience` has this one's share of each slot.
        """
        sums, used = Sums(), 0
        for slot, own in self.own(len(experience) if total is None else total, state):
            for e in experience.select(own).micro_batches(self.cfg.optim.states_at_once):
                self.last = None  # its memory
                with timer("backward"):
                    self.last = self._backward(e, slot.weight, sums)
                if state.optimizer_steps + state.skipped_steps == 0:
                    self._compare_with_reference(self.last)
            state.slots += 1
            used = slot.terms.stop
            if slot.step:
                with timer("step"):
                    sums.norms.append(self.step())
                state.count_step(taken=math.isfinite(sums.norms[-1]))
                if state.nonfinite_in_a_row >= self.cfg.optim.max_nonfinite_steps:
                    break
        state.pairs += used
        if (decay := self.objective.decay_after(state.optimizer_steps)) is not None:
            self.policy.move_averages(decay)
        if state.slots:
            self.keep_gradients()
        record = self._log(used, self._of_all(sums) if used else sums)
        self.go_to(self.scheduler.last_epoch + 1)
        return record

    def _backward(self, e: Experience, weight: float, sums: Sums) -> LastBatch:
        """Add a micro-batch's gradient to the masters', and what it says to the sums."""
        m, loss, stats = self.backward(e, weight)
        dead = self.is_dead(stats)
        sums.dead_batches, self.dead = sums.dead_batches + dead, self.dead + dead
        sums.stats = stats if sums.stats is None else sums.stats + stats
        sums.loss = sums.loss + loss / weight
        sums.output = sums.output + m.cond.float().square().flatten(1).mean(1).sqrt().sum()
        sums.states += len(e.states)
        self.nonfinite = self.nonfinite + 0 * loss  # a clamp's gradient of NaN is 0: no norm would show it
        return LastBatch(e, m, loss)

    def backward(self, e: Experience, weight: float) -> tuple[Prediction, Tensor, Tensor]:
        """Add a micro-batch's gradient to the masters'. Returns outputs, loss and statistics."""
        m = predict_states(self.policy, self.table, e, e.states, self.objective.guided(self.cfg.sample))
        loss, stats = self._checked(self.objective.loss(m, self.table, e, self.cfg.sample, weight))
        if not (self.looks and self.is_dead(stats)):
            self.scaler.scale(loss).backward()
        return m.detach(), loss.detach(), stats

    def _checked(self, made: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """What an objective's loss returned. Raises RunError unless it is what Objective.loss promises."""
        names, parts = self.objective.stats, made if isinstance(made, tuple) else (made,)
        shapes = [tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__ for x in parts]
        if shapes != [(), (len(names),)] or not parts[0].requires_grad:
            raise RunError(
                f"{type(self.objective).__name__}.loss must return the loss, () with a gradient, and ({len(names)},) "
                f"sums over its terms ({', '.join(names)}), and gave {' and '.join(map(str, shapes))}. Mend it."
            )
        return made

    def _compare_with_reference(self, batch: LastBatch) -> None:
        """Before the first step policy and reference are one: how far the computed ratio is from 1."""
        if not self.objective.transitions:
            return
        known = self.deviations or {}
        for t, value in ratio_deviations(batch.m, self.table, batch.experience, self.cfg.sample).items():
            known[t] = max(value, known.get(t, 0.0))
        self.deviations = known

    def keep_gradients(self) -> None:
        """Gradients that wait for the next iteration's become process 0's alone, or parts: they are saved once.

        A NaN loss among them shows in a gradient, so that a resumed run drops the step as well.
        """
        if self.group.size > 1:
            self._add_gradients()
            if not self.group.main and self.policy.shards is None:
                self.policy.drop_gradients()
        if self.group.size == 1 or self.policy.shards is not None:
            waiting = next((p.grad for p in self.parameters if p.grad is not None), None)
            if waiting is not None:
                waiting += self.nonfinite

    def _add_gradients(self) -> None:
        if self.policy.shards is not None:
            self.policy.reduce_gradients()
            return
        for p in self.parameters:  # a share may be empty, and its gradient then zero
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
        if self.group.size > 1:  # so that all processes drop the step
            assert self.parameters[0].grad is not None
            self.parameters[0].grad += self.nonfinite
        self.group.add([p.grad for p in self.parameters if p.grad is not None])

    def _of_all(self, sums: Sums) -> Sums:
        """The sums of all processes; norms are everybody's."""
        if self.group.size == 1:
            return sums
        device = self.policy.device
        own = torch.zeros(len(self.objective.stats), device=device) if sums.stats is None else sums.stats
        about = [float(sums.loss), float(sums.dead_batches), float(sums.output), sums.states]
        found = torch.cat([torch.as_tensor(about, device=device), own]).double()
        self.group.add([found])
        return Sums(found[4:], found[0], int(found[1]), found[2], int(found[3]), sums.norms)

    def is_dead(self, stats: Tensor) -> Tensor | bool:
        """() Whether a clamp holds every side of a micro-batch: then its gradient is exactly 0."""
        names = self.objective.stats
        if "dead" not in names or self.objective.clip is None:
            return False
        return stats[names.index("terms")] == stats[names.index("dead")]

    def step(self) -> float:
        """One optimizer step on the accumulated gradients; returns their norm before clipping, or NaN of a NaN loss.

        What is not finite is dropped, whatever the precision, and no step is taken.
        """
        if self.group.size > 1 or all(p.grad is None for p in self.parameters):
            self._add_gradients()  # of skipped backwards: zeros, momentum moves on all the same
        self.scaler.unscale_(self.optimizer)
        total = self.gradient_norm()
        total = (total + self.nonfinite).to(total.dtype)
        self.nonfinite = 0.0
        found = self._over_shards(torch.stack([total, self.size().to(total)]))
        dead = (torch.zeros_like(total) + self.dead).to(total.dtype)
        norm, size, batches = torch.cat([found, dead[None]]).tolist()  # waits for the device, once an optimizer step
        self.sizes.look(size)  # of the step before
        self.looks, self.dead = self.always_looks or batches > 0, 0
        finite = math.isfinite(norm)
        if finite:
            self.clip(found[0])
            self.optimizer.step()  # scaler.step would read from the device once more that nothing overflowed
            self.copy_to_network()
        else:
            names = zip(self.policy.names, self.parameters, strict=True)
            self.broken = [name for name, p in names if p.grad is not None and not p.grad.isfinite().all()]
        # a norm can overflow where no gradient has: the scale falls then too
        self.scaler.update(None if finite or not self.scaler.is_enabled() else self.scaler.get_scale() / 2)
        self.policy.drop_gradients()
        return norm

    def size(self) -> Tensor:  # ()
        """The policy's, whose thousands of small products are replayed where that can be."""
        return self.policy.graphs.wrap("size", self.policy.size)()

    def copy_to_network(self) -> None:
        """As the policy's, whose copies are replayed if there are any: not of weights that are their own masters."""
        policy = self.policy
        if policy.shards is not None or policy.dtype.itemsize > 2:
            policy.copy_to_network()
            return
        policy.graphs.wrap("copy", policy.copy_masters)()
        policy.average()

    def _over_shards(self, norms: Tensor) -> Tensor:
        """Of all weights, where `norms` are of this process's parts of them."""
        if self.policy.shards is None:
            return norms
        self.group.add([norms.square_()])
        return norms.sqrt()

    def check_weights(self) -> None:
        """Raises RunError if the last optimizer step broke the weights. All processes call it; waits for the device."""
        self.sizes.look(float(self._over_shards(self.size())))

    def _log(self, terms: int, sums: Sums) -> dict[str, object]:
        record: dict[str, object] = {"lr": self.lr}
        if sums.stats is not None:
            record["loss"] = sums.loss / terms
            names = enumerate(self.objective.stats)
            record |= {name: sums.stats[i] / terms for i, name in names if name != "terms"}
        if sums.states:
            record["output_rms"] = sums.output / sums.states
        if sums.norms:
            record["grad_norm"] = statistics.fmean([norm for norm in sums.norms if math.isfinite(norm)] or sums.norms)
        if self.scaler.is_enabled():
            record["loss_scale"] = self.scaler.scale(torch.ones((), device=self.policy.device))  # get_scale waits
        return record | {"dead_batches": sums.dead_batches}
