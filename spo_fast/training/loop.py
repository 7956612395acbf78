"""The loop: collect experience, evaluate the reference on it, update the policy. Everything else is elsewhere."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import itertools
import json
import math
import shutil
import statistics
import textwrap
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar

import numpy as np
import torch
import yaml
from torch import Tensor

from spo_fast import checkpoint, distributed, window
from spo_fast.checkpoint import TrainState
from spo_fast.choices import (
    Choice,
    choose,
    found_device,
    is_out_of_memory,
    listed,
    out_of_memory,
    pick_device,
)
from spo_fast.config import AdamConfig, Config, OptimConfig, PreferenceConfig, RunError, SampleConfig, parted
from spo_fast.costs import predict
from spo_fast.data import count_repeats, training_prompts
from spo_fast.distributed import ALONE, Group
from spo_fast.engine import compile_networks, pick_attention, replayed
from spo_fast.experience import Candidates, Experience, Prediction, batches
from spo_fast.extras import missing_extra
from spo_fast.files import read_json
from spo_fast.measure import LOOKS, hacking_signs, make_metric
from spo_fast.metrics import MetricsLog, ProgressLine, Timer, gpu_stats, read_metrics
from spo_fast.model_card import claim_repository, upload, write_card
from spo_fast.models import TRUE_SCORES, resolve, run_paths, scorer_specs
from spo_fast.models.attention import KERNELS
from spo_fast.models.compiled import keep_cache_in
from spo_fast.models.diffusion import DTYPES, DiffusionModel
from spo_fast.models.fuse import fuse
from spo_fast.models.graphs import Capture, CudaCapture
from spo_fast.models.policy import Policy
from spo_fast.models.text import count_truncated
from spo_fast.noise import KeyedDraws
from spo_fast.objectives import frozen_predictions, log_ratios, make_objective, predict_states
from spo_fast.ops.transition import guided
from spo_fast.pair_images import PairReader
from spo_fast.preference_report import without_nan
from spo_fast.prompt_sets import geneval_records
from spo_fast.report import write_report
from spo_fast.rollout import RolloutBatch, sample_latents
from spo_fast.schedule import StepTable, full_table
from spo_fast.scorers import InPhase, judges, load_scorer
from spo_fast.scorers.geneval import check_wanted
from spo_fast.stopping import Stopped, StopRequest
from spo_fast.telemetry import Telemetry
from spo_fast.watch import Watch

# ---------------------------------------------------------------------------------------------------- learning


@dataclass(frozen=True)
class Slot:
    """Consecutive terms that share one weight in the loss, and whether an optimizer step follows."""

    terms: slice
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


def make_optimizer(parameters: list[Tensor], cfg: AdamConfig) -> torch.optim.Optimizer:
    """AdamW on the float32 masters, by torch or by bitsandbytes (8-bit state)."""
    settings: dict[str, Any] = {
        **{"lr": cfg.learning_rate, "betas": (cfg.adam_beta1, cfg.adam_beta2)},
        **{"weight_decay": cfg.adam_weight_decay, "eps": cfg.adam_epsilon},
    }
    if cfg.optimizer == "adamw":
        return torch.optim.AdamW(parameters, **settings)
    try:
        import bitsandbytes
    except ImportError as error:
        raise ImportError(missing_extra("optimizer", cfg.optimizer)) from error
    kinds = {"adamw8bit": bitsandbytes.optim.AdamW8bit, "paged_adamw8bit": bitsandbytes.optim.PagedAdamW8bit}
    return kinds[cfg.optimizer](parameters, min_8bit_size=cfg.min_8bit_size, **settings)


class StepSizes:
    """Ends a run whose weights are broken: not finite, or moved by more than their own size in one optimizer step.

    Told from TrainedWeights.size, whose difference is the least that the step can have moved them by. The size that
    counts is that of the frozen weights that LoRAs change, else that of the trained weights before the step.
    """

    def __init__(self, policy: Any, cfg: AdamConfig):
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


# ---------------------------------------------------------------------------------------------------- a run


C = TypeVar("C", Config, PreferenceConfig)


class TrainingRun(Generic[C]):
    """What every trainer's run does with its settings, its directory, its checkpoints and its log."""

    model: DiffusionModel
    # policy (names, masters, state_dict, load_state_dict), optimizer, scaler, go_to(iteration), check_weights()
    learner: Any
    total: int  # iterations

    def __init__(self, cfg: C):
        self.device = pick_device(distributed.own_device(cfg.run.device))
        self.group = distributed.join(self.device)
        self.stop = StopRequest(cfg.run.stop_seconds)
        self.cfg: C = cfg
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = cfg.model.allow_tf32
        self.run_dir = Path(cfg.run.output_dir)
        found = checkpoint.find(self.run_dir, cfg.run.resume_from_checkpoint) if self.group.main else None
        self.resume: Path | None = self.group.told(found)
        self.state = TrainState()

    def settings(self) -> dict[str, Any]:
        """As a checkpoint keeps them; prompt_cache names what the prompts' embeddings come from."""
        return {**self.cfg.flat(), "prompt_cache": self.model.prompt_cache.fingerprint}

    def start(self) -> contextlib.AbstractContextManager[MetricsLog | None]:
        """Resume, or set aside what an earlier run left, and open the log: process 0's, others have none."""
        notes: list[str] = []
        if self.resume is not None:
            main = self.group.main
            self.state, notes = checkpoint.load(self.resume, self.learner, self.settings(), main)
        self.learner.check_weights()  # those that the first step starts from
        if not self.group.main:
            return contextlib.nullcontext()
        if self.resume is not None:
            notes.append(f"resumed from {self.resume} at iteration {self.state.iteration}")
            if self.state.iteration >= self.total:
                more = "--max_train_steps or --num_train_epochs raise that"
                notes.append(f"nothing is left to train: the run is {self.total} iterations ({more})")
        else:
            if self.cfg.run.resume_from_checkpoint is not None:  # the word latest: a path without one is an error
                notes.append(f"{self.run_dir} has no checkpoint yet: starting anew")
            checkpoint.set_aside(self.run_dir / "metrics.jsonl")
        print("".join(note + "\n" for note in notes), end="")
        log = MetricsLog(self.run_dir, self.cfg.run.report_to, self.cfg.flat(), watch=self.watch)
        if self.resume is not None:
            log.truncate_after(self.state.iteration - 1)
            for record in read_metrics(log.path):  # so that it warns as if the run had never stopped
                self.watch(record)
        checkpoint.write_atomically(self.run_dir / "config.yaml", yaml.safe_dump(self.cfg.flat(), sort_keys=False))
        return log

    def save(self) -> Path:
        """Write a checkpoint of the current iteration: process 0, or all of them their parts."""
        if self.group.main or self.learner.policy.shards is not None:
            settings, limit = self.settings(), self.cfg.run.checkpoints_total_limit
            beside = self.export_beside
            checkpoint.save(self.run_dir, self.state, self.learner, beside, settings, limit, self.group)
        return self.run_dir / f"checkpoint-{self.state.iteration}"

    def stopped(self) -> None:
        """Save, unless that has just been done, and say how to go on."""
        last = self.run_dir / f"checkpoint-{self.state.iteration}"
        if not self.group.told(last in checkpoint.checkpoints(self.run_dir)):
            self.save()
        if self.group.main:
            print(
                f"stopped after iteration {self.state.iteration}; --resume_from_checkpoint latest goes on from {last}"
            )

    def export_beside(self, checkpoint_dir: Path) -> None:
        """Other software's files that go into each checkpoint."""

    def watch(self, record: Mapping[str, Any]) -> list[str]:
        """The new warnings that a record of the log gives rise to."""
        return []


class Inputs(NamedTuple):
    """What an iteration learns from."""

    batch: Any  # RolloutBatch of this process, or offline.PairInputs
    prompts: slice  # which of the global batch it is; empty if nothing of it is kept
    total: int  # prompts of the global batch
    epoch: int


class Run(TrainingRun[Config]):
    """One run of preference optimisation: its parts, built from a Config."""

    def __init__(self, cfg: Config):
        super().__init__(cfg)
        sharded = cfg.adapter.full_finetune and self.group.size > 1
        if sharded and cfg.optim.optimizer != "adamw":
            raise ValueError(
                f"--full_finetune on several processes keeps a part of the optimizer's state on each, which "
                f"--optimizer {cfg.optim.optimizer} cannot be cut into. Use --optimizer adamw."
            )
        self.prompts, self.sampler = training_prompts(cfg, self.group.size)
        self.metrics, self.wanted = held_out_metrics(cfg, self.validation_prompts()), wanted_by(cfg, self.prompts)
        resolved = resolve(cfg.model, run_paths(cfg))
        self.lock = checkpoint.lock(self.run_dir) if self.group.main else None
        self.found = found_device(self.device)
        if self.found.memory_bytes is not None:
            print("predicting what fits into memory ...", flush=True)
        cfg, self.choices = choose(cfg, self.found, resolved)
        self.cfg = cfg
        # before anything is loaded: nobody should learn after ten hours that nobody was logged in
        self.repository = (
            claim_repository(cfg.run.hub_model_id or self.run_dir.resolve().name)
            if cfg.run.push_to_hub and self.group.main
            else None
        )

        prompt_cache = cfg.data.prompt_cache_dir or self.run_dir / "prompt_cache"
        self.model = DiffusionModel(cfg.model, resolved, self.device, prompt_cache)
        if cfg.optim.gradient_checkpointing:
            self.model.unet.enable_gradient_checkpointing()
        self.policy = Policy(self.model.unet, cfg.adapter, cfg.run.seed)
        if sharded:
            self.policy.shard()
        if cfg.engine.base_weights != "full":
            self.policy.quantise(cfg.engine.base_weights)
        if cfg.engine.fuse:
            self.policy.fuse(recompute=cfg.engine.memory == "balanced")
            fuse(self.model.vae)
            self.choices.append(self.pick_attention())
        self.objective, self.pairs = make_objective(cfg.objective), None
        if self.objective.sampler == "data":
            if self.group.size > 1:
                raise ValueError(f"--method {cfg.objective.method} trains on one process. Start it without torchrun.")
            self.pairs = PairReader(self.model, cfg, self.run_dir, self.resume is not None)
        self.table = self.model.table(cfg.sample.num_steps, cfg.sample.eta)
        if self.pairs is not None:  # noised to any timestep
            self.table = full_table(self.model.alphas_cumprod, self.model.prediction_type).to(self.device)
        self.scorer = load_scorer(
            scorer_specs(cfg.scorer.scorer), resolved.scorer_paths, self.model.tokenize, self.device,
            DTYPES[cfg.scorer.scorer_dtype], token_ids=self.model.token_ids,
            time_conditioned=cfg.scorer.spm_time_conditioned, wanted=self.wanted,
        )  # fmt: skip
        check_fit(self.objective, self.scorer, cfg)
        if cfg.engine.compile != "off":
            self.compile()
        on_gpu = self.device.type == "cuda"
        self.record_graphs(CudaCapture(self.device) if on_gpu and cfg.engine.cuda_graphs else None)
        self.total = cfg.run.iterations((self.pairs or self.sampler).iterations_per_epoch)
        self.learner = Learner(self.policy, self.objective, self.table, cfg, self.total, self.group)
        self.warnings = Watch(cfg)
        self.before: Validation | None = None
        self.shown: dict[int, Validation] = {}  # of this process, by iterations done

    def compile(self, backend: Any = "inductor") -> None:
        """torch.compile of all networks, its cache in the run's directory."""
        keep_cache_in(self.run_dir)
        compile_networks(self.policy, self.model.vae, self.scorer, self.cfg, backend)

    def record_graphs(self, capture: Capture | None) -> None:
        """From now on calls of a rollout whose shapes came before are replayed."""
        self.decode = replayed(self.policy, self.model.decode, self.scorer, capture)

    def pick_attention(self) -> Choice:
        """Put the attention kernel into the fused UNet that was asked for, or the fastest on this run's shapes."""
        rows = self.cfg.optim.states_at_once * (2 if self.cfg.sample.guidance_scale > 1 else 1)
        tokens = self.model.tokenizers[0].model_max_length
        choice = pick_attention(self.policy.unet, self.cfg.engine, rows, self.model.latent_shape, tokens)
        self.policy.attend_with(KERNELS[choice.value])
        return choice

    def announce(self) -> None:
        """What the run is about to do, in a few lines."""
        cfg, trained = self.cfg, sum(p.numel() for p in self.policy.network().values())
        if self.choices:
            print(f"chosen for this device ({self.found.name}):\n{textwrap.indent(listed(self.choices), '  ')}")
        repeats = count_repeats(self.prompts)
        cut = count_truncated(self.model.tokenizers[0], self.prompts)
        print(
            f"{cfg.objective.method} on {self.model.resolved.model_path} ({self.model.height}x{self.model.width}), ",
            end="",
        )
        print(f"{trained:,} trained weights, {self.policy.dtype} on {self.device}".replace("torch.", ""))
        if self.pairs is not None:
            rows, held_out = len(self.pairs.train_rows), len(self.pairs.valid_rows)
            print(f"{rows:,} pairs of {cfg.pairs.pairs}, {held_out:,} held out; ", end="")
        else:
            print(f"{len(self.prompts)} prompts, {repeats} of them repeats; ", end="")
        size, each = self.group.size, cfg.sample.sample_batch_size
        of = f"{size * each} {'pairs' if self.pairs else 'prompts'}"
        print(f"{self.total} iterations of {of}" + (f" on {size} processes" if size > 1 else ""))
        if self.pairs is not None:
            print(repeated(len(self.pairs.train_rows), each, "an iteration"), end="")
        if cut and self.pairs is None:
            limit = self.model.tokenizers[0].model_max_length
            print(f"warning: prompts longer than {limit} tokens: {cut}; what lies beyond is not read.")

    def encode_prompts(self) -> None:
        """All prompts through the text encoders once; they leave memory afterwards."""
        prompts = self.prompts if self.pairs is None else []  # those of pairs are encoded as they come
        if not self.group.main:
            self.group.any(False)  # process 0 encodes them, the others read
        encoded = self.model.prompt_cache.ensure([*prompts, "", *self.validation_prompts()])
        if self.group.main:
            self.group.any(False)
        if encoded:
            print(f"encoded {encoded} prompts into {self.model.prompt_cache.directory}")

    def inputs(self, iteration: int) -> Inputs:
        if self.pairs is not None:
            pairs, self.state.position = self.pairs.batch(iteration, self.state.position)
            epoch = self.state.position // len(self.pairs.train_rows)
            return Inputs(pairs, slice(0, len(pairs)), len(pairs), epoch)
        batch = self.sampler.batch(iteration)
        own = self.group.share(slice(0, len(batch.indices)))
        # a short last batch may leave a process nothing: it draws the first prompt, of which nothing is kept
        inputs = self.rollout_batch(batch.indices[own] or batch.indices[:1], iteration)
        inputs = replace(inputs, closed=window.closed(self.state.window, iteration, self.cfg.sample))
        return Inputs(inputs, own, len(batch.indices), batch.epoch)

    def rollout_batch(self, indices: list[int], iteration: int) -> RolloutBatch:
        prompts = [self.prompts[i] for i in indices]
        draws = KeyedDraws(self.cfg.run.seed, iteration, torch.tensor(indices, device=self.device))
        text = self.scorer.encode(prompts)
        return RolloutBatch(self.model.cond(prompts), text, draws, self.model.latent_shape, self.model.latent_dtype)

    def rollout_weights(self, sample: SampleConfig, iteration: int) -> contextlib.AbstractContextManager[None]:
        """Inside, the policy's weights are those that `iteration`'s rollout uses."""
        merged = sample.rollout_weights == "merged"
        return self.policy.merged(self.cfg.run.seed, iteration) if merged else contextlib.nullcontext()

    def iterate(self, iteration: int, timer: Timer) -> dict[str, Any] | None:
        """One iteration: experience, frozen networks, updates. Returns what to log; None if the run is to stop."""
        cfg, sample, objective = self.cfg, self.cfg.sample, self.objective
        decode = Saturation(self.decode)
        score = InPhase(self.scorer, functools.partial(self.score_phase, timer))  # decoding included
        with contextlib.suppress(Stopped), timer("rollout"), self.rollout_weights(sample, iteration):
            inputs = self.inputs(iteration)
            arguments = (self.policy, self.table, score, decode, inputs.batch, sample, cfg.model.images_per_decode)
            experience = objective.collect(*arguments)
        if self.group.any(bool(self.stop.signal)):
            return None
        scores = distributed.whole_scores(experience.scores, inputs.prompts, self.group)
        cut = lambda total: (slot.terms for slot in self.learner.slots(total, self.state))  # noqa: E731
        dealt = distributed.rebalance(experience, inputs.prompts, self.group, cfg.run.seed, iteration, cut)
        experience, total, B = dealt.experience, dealt.total, inputs.total
        left_out: dict[str, float] = {}
        if sample.branch_window == "auto":
            window.observe(self.state.window, dealt.rows.tolist(), sample, inputs.batch.closed, B)
            of_children = judges(self.scorer) == "children"
            left_out = window.saved(self.state.window, inputs.batch.closed, sample, B, of_children)
        with timer("reference"):
            batches = functools.partial(self.learner.batches, experience, total, self.state)
            most = cfg.optim.states_at_once
            experience = objective.prepare(self.policy, self.table, experience, sample, most, batches)
            if iteration == 0 and self.policy.keeps_full_base and self.group.main:
                errors = base_errors(self.policy, self.table, experience, sample, objective, most)
                print(base_text(cfg.engine.base_weights, errors))
                left_out |= {name: float(values.mean()) for name, (_, values) in errors.items()}
            self.policy.forget_full_base()
        skipped = self.state.skipped_steps
        record = self.learner.update(experience, self.state, timer, total)
        if self.learner.deviations is not None and iteration == 0:
            print(start_text(self.learner.deviations))
        if total == 0 and not scores.isfinite().all():
            self.state.nonfinite_in_a_row += 1
        states = sum(int(n) for n in self.group.gather(torch.tensor([len(experience.states)])))
        judged: dict[str, Any] = {}
        if len(scores):  # labelled pairs have none
            judged = {"score_mean": scores.mean(), "score_std": scores.std()}
            judged |= gaps(scores.view(-1, sample.num_candidates, B))
        return {
            **{"epoch": inputs.epoch, **judged},
            **{"pairs": total, "valid_share": total / (B * len(objective.term_states(sample))), "states": states},
            "images": scores.numel(),
            **decode.record(self.group, inputs.prompts),
            **left_out,
            **record,
            **{"optimizer_steps": self.state.optimizer_steps, "skipped_steps": self.state.skipped_steps},
            **{"nonfinite_steps": self.state.skipped_steps - skipped},
        }

    def score_phase(self, timer: Timer) -> contextlib.AbstractContextManager[None]:
        """A judgement is a safe point: nothing has changed yet in this iteration."""
        self.stop.safe_point()
        return timer("score")

    def diagnosis(self) -> Path:
        """nonfinite.json and nonfinite.safetensors: what of the last batch is not finite, and the batch itself."""
        from safetensors.torch import save_file

        weights = self.policy.network()
        report: dict[str, Any] = {"state": dataclasses.asdict(self.state), "gradients": self.learner.broken}
        report["weights"] = [name for name, value in weights.items() if not value.isfinite().all()]
        if self.learner.scaler.is_enabled():
            report["loss_scale"] = self.learner.scaler.get_scale()
        tensors: dict[str, Tensor] = {}
        if (last := self.learner.last) is not None:
            e = last.experience
            tensors |= {"x_t": e.states.x_t, "x_prev": e.x_prev, "loss": last.loss}
            for whose, m in (("policy", last.m), ("reference", e.frozen)):
                if m is not None:
                    tensors |= {f"{whose}_{k}": v for k, v in m._asdict().items() if v is not None}
            report["timesteps"] = self.table.timesteps[e.states.rows].tolist()
        report["finite_share"] = {name: float(value.isfinite().float().mean()) for name, value in tensors.items()}
        path = self.run_dir / "nonfinite.json"
        checkpoint.write_atomically(path, json.dumps(report, indent=1) + "\n")
        save_file(
            {name: value.detach().cpu().contiguous() for name, value in tensors.items()},
            path.with_suffix(".safetensors"),
        )
        return path

    def export(self, directory: Path) -> list[Path]:
        return self.model.save(self.policy, directory)

    def settings(self) -> dict[str, Any]:
        size = self.group.size
        return {**super().settings(), "world_size": size, "global_batch": size * self.cfg.sample.sample_batch_size}

    def export_beside(self, checkpoint_dir: Path) -> None:
        self.export(checkpoint_dir)

    def watch(self, record: Mapping[str, Any]) -> list[str]:
        return self.warnings.look(record)

    # ------------------------------------------------------------------------------------------------ validation

    def validation_prompts(self) -> list[str]:
        return list(self.cfg.run.validation_prompt) or self.prompts[:4]

    @torch.no_grad()
    def validate(self) -> tuple[list[list[Tensor]], float] | None:
        """Images of the validation prompts from fixed noise, and the scorer's mean opinion of them; None if turned off.

        Plain DDIM (eta = 0) with the training's steps and guidance. The noise depends on the seed only, so values
        before and after training are of the same noise.
        """
        prompts, count = self.validation_prompts(), self.cfg.run.num_validation_images
        if count == 0:
            return None
        table = self.model.table(self.cfg.sample.num_steps, 0.0)
        images, scores = [], []
        for p, prompt in enumerate(prompts):
            row: list[Tensor] = []
            for start in range(0, count, self.cfg.model.images_per_decode):
                size = min(self.cfg.model.images_per_decode, count - start)
                pixels, score = self._validation_images(table, prompt, p * count + start, size)
                row += list(pixels.float().cpu())
                scores.append(score)
            images.append(row)
        return images, float(torch.cat(scores).mean())

    def _validation_images(self, table: StepTable, prompt: str, first: int, size: int) -> tuple[Tensor, Tensor]:
        """`size` images of one prompt from the noise of validation image `first` on, and their scores at timestep 0."""
        index = torch.arange(first, first + size, device=self.device)
        # iteration 2^32 - 1: a key that no iteration of training uses
        draws = KeyedDraws(self.cfg.run.seed, 2**32 - 1, index)
        x = draws.latents(self.model.latent_shape, self.model.latent_dtype)
        prompts = [prompt] * size
        sample = self.cfg.sample
        cond = self.model.cond(prompts)
        latents = sample_latents(self.policy, table, cond, sample.guidance_scale, x, sample.rows_per_forward)
        pixels = self.model.decode(latents)
        now = torch.zeros((), dtype=torch.int64, device=self.device)
        text = self.scorer.encode(prompts)
        # already decoded: the scorer gets the same pixels, whatever it asks for
        return pixels, self.scorer(Candidates(None, latents, now, text, 1, lambda _: pixels, size))

    def show(self, name: str) -> Validation | None:
        """Validate and write samples/<name>.png, a row a prompt."""
        result = self.validate()
        if result is None:
            return None
        images, score = result
        write_grid(self.run_dir / "samples" / f"{name}.png", images, self.validation_prompts())
        return Validation(score, self.measured(images), self.shown_settings())

    def shown_settings(self) -> dict[str, Any]:
        """What validation pictures and their score depend on beside the weights, as JSON gives it back."""
        cfg = self.cfg
        found = {
            "prompts": self.validation_prompts(),
            **{name: cfg.flat()[name] for name in ("num_validation_images", "seed", "num_steps", "guidance_scale")},
            **{"latents": list(self.model.latent_shape), "scorer": list(cfg.scorer.scorer)},
        }
        return json.loads(json.dumps(found))

    @torch.no_grad()
    def measured(self, images: list[list[Tensor]]) -> dict[str, list[float]]:
        """Held-out metrics and looks of the pictures, prompt after prompt. A metric's weights are loaded for it and
        dropped again: training has the memory."""
        found: dict[str, list[float]] = {}
        pictures = torch.stack([image for row in images for image in row]).clamp(-1, 1)
        texts = [prompt for prompt, row in zip(self.validation_prompts(), images, strict=True) for _ in row]
        for name in ("looks", *self.metrics):
            paths, dtype = self.model.resolved.scorer_paths, DTYPES[self.cfg.scorer.scorer_dtype]
            metric = make_metric(name, paths, self.model.tokenize, self.device, dtype, self.wanted)
            for start in range(0, len(texts), self.cfg.model.images_per_decode):
                part = slice(start, start + self.cfg.model.images_per_decode)
                for what, values in metric(pictures[part].to(self.device), texts[part]).items():
                    found.setdefault(what, []).extend(values.double().tolist())
        return found

    @torch.no_grad()
    def held_out_accuracy(self) -> float | None:
        """Share of the held-out pairs whose preferred image is ahead in what the loss compares; level ones count half.

        None without held-out pairs. Always of the same noise. Before training Diffusion-DPO's is 1/2.
        """
        held_out = None if self.pairs is None else self.pairs.held_out()
        if held_out is None:
            return None
        sample, most = self.cfg.sample, self.cfg.optim.states_at_once
        whole = self.objective.collect(self.policy, self.table, None, None, held_out, sample, 1)
        ahead = []
        for part in whole.micro_batches(most):
            e = self.objective.prepare(self.policy, self.table, part, sample, None)
            sides = self.objective.sides(predict_states(self.policy, self.table, e, e.states, False), e)
            ahead.append(sides[:, 0] - sides[:, 1])
        return float((torch.cat(ahead).sign() + 1).mean() / 2)

    def show_progress(self, iteration: int, log: MetricsLog, timer: Timer) -> dict[str, Any]:
        """The grid and scores of the weights after `iteration`, where they are due: what to log."""
        done, every = self.state.iteration, self.cfg.run.validation_steps or self.cfg.run.checkpointing_steps
        if done % every and done != self.total:
            return {}
        with timer("validate"):
            shown, accuracy = self.show(f"step-{done}"), self.held_out_accuracy()
        found: dict[str, Any] = {} if accuracy is None else {"validation_accuracy": accuracy}
        if shown is None:
            return found
        self.shown[done] = shown
        log.reporter.images(iteration, "samples", self.run_dir / "samples" / f"step-{done}.png")
        print(f"validation after {done} iterations: {shown.words(self.metrics, self.before)}")
        return {**found, **shown.record(self.metrics, self.before, self.cfg.run.seed)}

    def report(self) -> None:
        """Write report.html. Training never ends because of it."""
        try:
            write_report(self.run_dir)
        except Exception as error:
            again = f"python -m spo_fast.report {self.run_dir} makes it later"
            print(f"no report.html ({type(error).__name__}: {error}); {again}")

    # ------------------------------------------------------------------------------------------------ the run

    def train(self) -> Path:
        """From the first or the resumed iteration to the last; returns the run directory."""
        timer = Timer(self.device)
        try:
            with self.stop:
                return self._train(timer)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            raise RunError(out_of_memory(self.cfg, timer.phase, self.found, self.model.resolved)) from error
        finally:
            self.group.leave()

    def _train(self, timer: Timer) -> Path:
        self.announce()
        with timer("encode prompts"):
            self.encode_prompts()
        with self.start() as log:
            if log is not None:
                with timer("validate"):
                    self.before = self.before_training(log)
            timer.read_ms()  # the first iteration's record has its own times only
            try:
                done = self._loop(log, timer)
            finally:
                if self.pairs is not None:
                    self.pairs.close()
        if not done:
            self.stopped()
        elif self.group.main:
            self.finish()
        elif self.policy.shards is not None:
            self.export(self.run_dir)  # its part of what process 0 writes
        self.group.any(False)
        return self.run_dir

    def _loop(self, log: MetricsLog | None, timer: Timer) -> bool:
        """False if the run was asked to stop before its end."""
        costs = None if self.found.memory_bytes is None else predict(self.cfg, self.model.resolved, self.device.type)
        records = () if log is None else read_metrics(log.path)
        telemetry = Telemetry(self.device, self.found.name, costs, records, self.group.size)
        print("".join(f"{note}\n" for note in telemetry.notes()), end="")
        with ProgressLine(self.total) as progress:
            while (iteration := self.state.iteration) < self.total:
                before = copy.deepcopy(self.state)
                record = self.iterate(iteration, timer)
                if record is None:
                    self.state = before
                    return False
                self.state.iteration += 1
                self.learner.check_weights()
                if log is not None:
                    self.tell(iteration, record, log, timer, telemetry, progress)
                timer.read_ms()
                unfit, most = self.state.nonfinite_in_a_row, self.cfg.optim.max_nonfinite_steps
                # in fp16 the first steps overflow while a scale is looked for
                looking = self.learner.scaler.is_enabled()
                never = self.state.iteration == self.total and not (self.state.optimizer_steps or looking)
                broken = unfit >= most or (never and unfit > 0)
                if broken:
                    raise RunError(self.broken_text("optimizer steps" if record["pairs"] else "iterations' scores"))
                if self.state.iteration % self.cfg.run.checkpointing_steps == 0 or self.state.iteration == self.total:
                    self.check_agreement()
                    with timer("save"):
                        self.save()
                if self.group.any(bool(self.stop.signal)):  # where all wait for process 0's files
                    return self.state.iteration == self.total
        return True

    def tell(
        self,
        iteration: int,
        record: dict[str, Any],
        log: MetricsLog,
        timer: Timer,
        telemetry: Telemetry,
        progress: ProgressLine,
    ) -> None:
        """Grids, log, warnings and progress of an iteration, by process 0."""
        record |= self.show_progress(iteration, log, timer)
        record["device"] = self.found.name
        record |= (times := timer.read_ms()) | telemetry.read(record, times)
        record |= gpu_stats(self.device.index or 0) if self.device.type == "cuda" else {}
        # logged before it is saved: what a resumed run repeats is cut from the log, what is missing stays so
        record = log.log(iteration, record)
        for warning in record.get("warnings", ()):
            print(f"warning: iteration {iteration}: {warning}.")
        progress.update(record)
        if "validation_score" in record and self.state.iteration < self.total:
            self.report()

    def broken_text(self, what: str) -> str:
        """Why the run stops, its diagnosis written."""
        if not self.group.main:
            return f"{what} were not finite; process 0 says more."
        self.report()
        return (
            f"{self.state.nonfinite_in_a_row} {what} in a row were not finite; see {self.diagnosis()}. "
            "Go on from the last checkpoint (--resume_from_checkpoint latest) with a lower --learning_rate, or start "
            "anew with --mixed_precision bf16 or no."
        )

    def check_agreement(self) -> None:
        """Raises RunError if the processes' weights have come apart: a faulty device, or unequal libraries."""
        if self.group.size > 1:
            parts = self.policy.shards is not None
            weights = self.policy.network().values() if parts else self.learner.parameters
            sums = torch.stack([p.detach().double().sum() for p in weights])
            if any(not torch.equal(*pair) for pair in itertools.pairwise(self.group.gather(sums[None]))):
                raise RunError(
                    f"the processes' weights differ after iteration {self.state.iteration}: a device or its libraries "
                    "compute something else. --resume_from_checkpoint latest goes on from before it."
                )

    def before_training(self, log: MetricsLog) -> Validation | None:
        """The validation before training, kept in the run directory so that a resumed run still has it."""
        samples = self.run_dir / "samples"
        path = samples / "before.json"
        # like the log's records: what this run is about to repeat, and the end that is none any more
        later = [
            p for p in samples.glob("step-*.png") if p.stem[5:].isdigit() and int(p.stem[5:]) > self.state.iteration
        ]
        for grid in (*later, samples / "after.png"):
            grid.unlink(missing_ok=True)
        if self.resume is not None:
            kept = Validation.read(path) if path.is_file() else None
            if kept is None or not self.cfg.run.num_validation_images or kept.of == self.shown_settings():
                return kept
            print("the pictures before training were of other validation settings: nothing is compared with them")
            for old in (path, path.with_suffix(".png")):
                checkpoint.set_aside(old)
            return None
        shown = self.show("before")
        if (accuracy := self.held_out_accuracy()) is not None:
            print(f"held-out preference accuracy before training: {accuracy:.3f}")
        if shown is not None:
            checkpoint.write_atomically(path, json.dumps(without_nan(shown._asdict())) + "\n")
            log.reporter.images(0, "samples_before", samples / "before.png")
        return shown

    def finish(self) -> None:
        """Export the trained weights and show what training did to images from the same noise."""
        files = self.export(self.run_dir)
        if self.pairs is not None:
            self.pairs.split.finish()
        samples, before, after = self.run_dir / "samples", self.before, self.shown.get(self.state.iteration)
        if after is None:  # a finished run, resumed
            after = self.show("after")
        else:
            shutil.copyfile(samples / f"step-{self.state.iteration}.png", samples / "after.png")
        if before is not None and after is not None:
            count = len(self.validation_prompts()) * self.cfg.run.num_validation_images
            print(f"{count} images from the same noise, before and after: {after.words(self.metrics, before)}")
            print(f"sample grids: {samples / 'before.png'}, {samples / 'after.png'}")
        self.report()
        write_card(self.run_dir, self.repository)
        print(f"what the run did: {self.run_dir / 'report.html'}; model card: {self.run_dir / 'README.md'}")
        print("trained weights: " + ", ".join(str(f) for f in files))
        if self.repository is not None:
            print(f"uploaded to {upload(self.run_dir, self.repository)}")


def train(cfg: Config) -> Path:
    """Train as cfg says; returns the run directory, which holds the LoRA, checkpoints, metrics and sample grids."""
    return Run(cfg).train()


class Validation(NamedTuple):
    """What the validation pictures of some weights were measured at."""

    score: float | None  # by the scorer that is trained on, the mean; None, read back, was not finite
    values: dict[str, list[float]]  # held-out metric or look -> of each picture, prompt after prompt
    of: dict[str, Any]  # shown_settings: only validations of the same can be compared

    @classmethod
    def read(cls, file: Path) -> Validation:
        kept = read_json(file)
        values = {name: [math.nan if v is None else v for v in them] for name, them in kept["values"].items()}
        return cls(kept["score"], values, kept.get("of", {}))

    def record(self, metrics: list[str], before: Validation | None, seed: int) -> dict[str, Any]:
        """As it is logged. Looks are logged against those before training, with the signs of reward hacking there."""
        found: dict[str, Any] = {"validation_score": self.score}
        found |= {f"held_out_{name}": self.mean(name) for name in metrics}
        if before is not None:
            found |= {f"look_{name}": self.mean(name) / mean for name in LOOKS if (mean := before.mean(name)) > 0}
            found["hacking"] = "; ".join(hacking_signs(before.by_prompt(), self.by_prompt(), seed).values())
        return found

    def words(self, metrics: list[str], before: Validation | None) -> str:
        """Score and held-out metrics, each with what it was before training."""

        def text(name: str, now: float | None, was: float | None) -> str:
            if now is None or was is None:
                return f"{name} not finite" if now is None else f"{name} {now:.3f}"
            return f"{name} {was:.3f} -> {now:.3f} ({now - was:+.3f})"

        old = before or Validation(None, {}, {})
        held_out = [text(f"held-out {m}", self.mean(m), old.mean(m) if m in old.values else None) for m in metrics]
        return ", ".join([text("score", self.score, old.score), *held_out])

    def mean(self, name: str) -> float:
        return statistics.fmean(self.values[name])

    def by_prompt(self) -> dict[str, np.ndarray]:
        """Look -> its mean over each prompt's pictures, which are no independent samples."""
        count = len(self.of["prompts"])
        return {name: np.array(self.values[name]).reshape(count, -1).mean(1) for name in LOOKS}


def held_out_metrics(cfg: Config, prompts: list[str]) -> list[str]:
    if cfg.run.validation_metrics or cfg.model.model != "toy":
        return parted(cfg.run.validation_metrics)
    from spo_fast.toy import world

    whole = all(side in (None, world.SIZE) for side in (cfg.model.height, cfg.model.width))
    return list(TRUE_SCORES) if whole and set(prompts) <= set(world.CAPTIONS) else []


def wanted_by(cfg: Config, prompts: list[str]) -> dict[str, dict[str, Any]] | None:
    """What GenEval looks for, if it judges. Raises ValueError for a prompt of which that is not known."""
    in_training = "geneval" in dict(scorer_specs(cfg.scorer.scorer))
    if not in_training and "geneval" not in parted(cfg.run.validation_metrics):
        return None
    wanted = geneval_records(cfg.data.prompts)
    check_wanted([*(prompts if in_training else ()), *cfg.run.validation_prompt], wanted)
    return wanted


def repeated(rows: int, batch: int, of: str) -> str:
    """A line if a batch reads pairs more than once; of: whose batch it is."""
    return "" if batch <= rows else f"warning: {of} reads {batch:,} pairs, of which there are {rows:,}: they repeat.\n"


def check_fit(objective: Any, scorer: Any, cfg: Config) -> None:
    """Raises ValueError for a method with a scorer that it cannot use."""
    if objective.judges not in (None, judges(scorer)):
        method, names = cfg.objective.method, " ".join(cfg.scorer.scorer)
        raise ValueError(f"--method {method} needs a scorer of noisy latents, and {names} is none. Use --scorer lrm.")


@torch.no_grad()
def ratio_deviations(m: Prediction, table: StepTable, e: Experience, cfg: SampleConfig) -> dict[int, float]:
    """Timestep -> largest |ratio - 1|; before the first update: what the paths of policy and reference differ by."""
    deviation = log_ratios(m.detach(), table, e, cfg).expm1().abs().flatten()
    timesteps = table.timesteps[e.states.rows[e.index.flatten()]]
    found: dict[int, float] = {}
    for t, value in zip(timesteps.tolist(), deviation.tolist(), strict=True):
        found[t] = max(value, found.get(t, 0.0))
    return found


def start_text(deviations: dict[int, float]) -> str:
    if not any(deviations.values()):
        return "probability ratio of policy to reference at the start: exactly 1"
    by_step = ", ".join(f"{value:.1e} at {t}" for t, value in sorted(deviations.items(), reverse=True))
    return f"probability ratio of policy to reference at the start, distance from 1 by timestep: {by_step}"


@torch.no_grad()
def base_errors(
    policy: Policy, table: StepTable, e: Experience, cfg: SampleConfig, objective: Any, states_per_forward: int
) -> dict[str, tuple[Tensor, Tensor]]:
    """What a rounded base changes: name -> timesteps, values. Of the reference, with the rounded and the full base.

    base_error: |m' - m| / |m| of each state's guided prediction. base_log_ratio: |log p'(x_{t-1}) - log p(x_{t-1})| of
    each transition; labelled pairs have none. Nothing if no term was kept.
    """
    if not len(e):
        return {}
    both = functools.partial(frozen_predictions, policy, table, e, objective.guided(cfg), states_per_forward)
    with policy.reference():
        rounded = both()
        with policy.full_base():
            full = both()
    m, truth = (guided(*p, cfg.guidance_scale, e.states.x_t.dtype).flatten(1) for p in (rounded, full))
    t = table.timesteps[e.states.rows]
    found = {"base_error": (t, (m - truth).norm(dim=1) / truth.norm(dim=1))}
    if objective.sampler != "data":
        ratio = log_ratios(rounded, table, replace(e, frozen=full), cfg)
        found["base_log_ratio"] = (t[e.index].flatten(), ratio.abs().flatten())
    return found


def base_text(how: str, errors: Mapping[str, tuple[Tensor, Tensor]]) -> str:
    told = {"base_error": "relative error of the prediction", "base_log_ratio": "size of the log-ratio to it"}
    lines = [
        f"  {told[name]}: " + ", ".join(f"{values[t == at].mean():.1e} at {at}" for at in t.unique().tolist()[::-1])
        for name, (t, values) in errors.items()
    ]
    found = "means by timestep of the first states" if lines else "not measured, the first iteration kept nothing"
    return "\n".join([f"{how} base (inexact) against the full one, {found}" + ":" * bool(lines), *lines])


def gaps(scores: Tensor) -> dict[str, Tensor]:  # (J, K, B) scores of J comparisons of B prompts
    """How far the best and the worst candidate are apart, and the threshold that would keep a third of the pairs."""
    gap = (scores.amax(1) - scores.amin(1)).flatten()
    # softmax([s_w, s_l]) differs by tanh of half the gap
    return {"score_gap": gap.mean(), "third_threshold": torch.quantile((gap / 2).tanh().float(), 2 / 3)}


class Saturation:
    """A decoder that remembers how colourful its images were: mean over pixels of max - min of R, G, B in [0, 1]."""

    def __init__(self, decode: Any) -> None:
        self.decode = decode
        self._means: list[Tensor] = []

    def __call__(self, latents: Tensor) -> Tensor:
        pixels = self.decode(latents)
        shown = (pixels.float() / 2 + 0.5).clamp(0, 1)
        self._means.append((shown.amax(1) - shown.amin(1)).mean((1, 2)))
        return pixels

    def record(self, group: Group, prompts: slice) -> dict[str, Tensor]:
        """Of everybody's images; prompts: those of this process's that count, none or all."""
        if not self._means:
            return {}
        own = torch.cat(self._means)
        return {"saturation": torch.cat(group.gather(own if prompts.stop > prompts.start else own[:0])).mean()}


SHEET_PIXELS = 80_000_000


def write_grid(path: Path, rows: list[list[Tensor]], prompts: list[str] | None = None, smallest: int = 96) -> None:
    """PNG of images (3, H, W) in [-1, 1], one list a row; images under `smallest` pixels are enlarged.

    A sheet of more than SHEET_PIXELS, which image software refuses to open, is made smaller. The rows' prompts go into
    its text chunk "prompts", as a JSON list.
    """
    from PIL import Image
    from PIL.PngImagePlugin import PngInfo

    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = torch.stack([torch.stack(row) for row in rows])  # (R, N, 3, H, W)
    R, N, _, H, W = pixels.shape
    if (share := (SHEET_PIXELS / (R * N * (H + 4) * (W + 4))) ** 0.5) < 1:
        size = max(1, int(share * (H + 4)) - 4), max(1, int(share * (W + 4)) - 4)  # with borders of 2 pixels
        pixels = torch.nn.functional.interpolate(pixels.flatten(0, 1), size, mode="area").unflatten(0, (R, N))
    zoom = max(1, smallest // pixels.shape[-1])
    pixels = pixels.repeat_interleave(zoom, -1).repeat_interleave(zoom, -2)
    pixels = torch.nn.functional.pad(pixels, (2, 2, 2, 2), value=1.0)
    sheet = pixels.permute(0, 3, 1, 4, 2).flatten(2, 3).flatten(0, 1)
    texts = PngInfo()
    if prompts:
        texts.add_text("prompts", json.dumps(prompts))
    image = Image.fromarray(((sheet / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8).numpy())
    image.save(path, pnginfo=texts)
