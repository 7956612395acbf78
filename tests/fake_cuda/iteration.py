"""python iteration.py GUARD.so CASE ...: an iteration each on fake CUDA tensors; prints a line of JSON, what crossed.

In a process of its own: the guard stays in PyTorch until the process ends. A case is MODEL or MODEL:VARIATION.
"""

from __future__ import annotations

import ctypes
import json
import sys
import traceback
from collections.abc import Sequence
from typing import Any

ctypes.CDLL(sys.argv[1])  # before PyTorch, which asks once whether there is a device

import torch  # noqa: E402
from device import FakeDevice, OnceWatched  # noqa: E402
from pytest import MonkeyPatch  # noqa: E402
from torch import Tensor  # noqa: E402
from torch._subclasses.fake_tensor import FakeTensor  # noqa: E402

from spo_fast.config.presets import PRESETS  # noqa: E402
from spo_fast.config.training import Config  # noqa: E402
from spo_fast.data.prompt_order import PromptSampler, epoch_permutation  # noqa: E402
from spo_fast.evaluation.required_files import resolve, scorer_paths  # noqa: E402
from spo_fast.method import objectives, rollout  # noqa: E402
from spo_fast.method.experience import Experience, Prediction, States  # noqa: E402
from spo_fast.method.objectives import make_objective  # noqa: E402
from spo_fast.models.prompt_cache import PromptCache  # noqa: E402
from spo_fast.models.tensor_cache import Row  # noqa: E402
from spo_fast.scorers.base import Scorer  # noqa: E402
from spo_fast.training.checkpoint import TrainState  # noqa: E402
from spo_fast.training.iteration import Iterates  # noqa: E402
from spo_fast.training.learner import Learner  # noqa: E402
from spo_fast.training.monitor.log import fetch_scalars  # noqa: E402
from spo_fast.training.plan.fake_model import FakePrompts  # noqa: E402
from spo_fast.training.plan.networks import Networks  # noqa: E402
from spo_fast.training.processes import ALONE  # noqa: E402
from spo_fast.training.signals import StopRequest  # noqa: E402


def pinned(x: Tensor) -> Tensor:
    """As pin_memory: what is sent from here, the host does not wait for."""
    x = x.clone()
    x.pinned = True  # type: ignore[attr-defined]
    return x


Tensor.pin_memory = pinned  # type: ignore[method-assign]  # there is no such memory

# 2 steps of 2 prompts are compared: 4 pairs, one optimizer step, at least 2 micro-batches
SMALL = {
    "num_steps": 4, "branch_start": 2, "sample_batch_size": 2, "num_candidates": 2, "decode_chunk": 2,
    "train_batch_size": 4, "gradient_accumulation_steps": 1, "states_per_forward": 2, "cuda_graphs": False,
    "mixed_precision": "fp16", "fuse": True, "compile": "off", "attention": "sdpa",
}  # fmt: skip


class HostPrompts(FakePrompts):
    """Rows that lie on the host, as those of files do."""

    get = PromptCache.get

    def __init__(self, fake: FakePrompts):
        self.row = {name: torch.empty(*shape, dtype=torch.float16) for name, shape in fake.rows.items()}

    def _rows(self, prompts: Sequence[str]) -> list[Row]:
        return [self.row for _ in prompts]


class OnCuda(Networks):
    """Networks of weights that say they are on a GPU."""

    def computed(self, cfg: Config) -> Config:
        """As given: no kernel of attention is timed."""
        return cfg

    def _scorer(self, *args: Any) -> Scorer:
        with self.once.mode:  # it keeps what its text tower made of a prompt
            return super()._scorer(*args)


class LearnerOnce(Learner):
    """Where calls are repeated, the first micro-batch stands for all: what waits in one does not depend on its size."""

    once: OnceWatched

    def backward(self, e: Experience, weight: float) -> tuple[Prediction, Tensor, Tensor]:
        """As the trainer's."""
        whole = super().backward
        found = self.once.run("backward", "policy", 0, lambda: whole(e, weight))
        for master in self.policy.masters:
            master.grad = torch.empty_like(master) if master.grad is None else master.grad
        return found


class CudaRun(Iterates):
    """A run's parts, as a prediction has them, with the learner of a run."""

    def __init__(self, cfg: Config, networks: Networks, once: OnceWatched):
        self.cfg, self.group, self.stop = cfg, ALONE, StopRequest(None)
        self.model, self.policy, self.scorer = networks.model, networks.policy, networks.scorer
        self.device, self.decode = self.model.device, self.model.decode
        self.objective, B = make_objective(cfg.objective), cfg.sample.sample_batch_size
        self.table = self.make_table()
        self.prompts, self.prompt_order = [""] * B, PromptSampler(B, B, cfg.run.seed)
        self.learner = LearnerOnce(self.policy, self.objective, self.table, cfg, total_iterations=2)
        self.learner.once = once
        self.state = TrainState(optimizer_steps=1)  # nothing is measured as before the first step


# ---------------------------------------------------------------------------------------------------- variations


def plant_faults(patch: MonkeyPatch) -> None:
    """A wait for the device in each step of a rollout; an index from the host in each forward of the training."""
    right, right_states = rollout.predict_rows, objectives.predict_states

    def faulty(policy: Any, x: Tensor, *rest: Any) -> Prediction:
        assert x.abs().amax().item() > 0
        return right(policy, x, *rest)

    def faulty_states(policy: Any, table: Any, e: Experience, states: States, guided: bool) -> Prediction:
        return right_states(policy, table, e, states.select(torch.arange(len(states))), guided)

    patch.setattr(rollout, "predict_rows", faulty)
    patch.setattr("spo_fast.training.learner.predict_states", faulty_states)


def iteration(case: str) -> list[dict[str, object]]:
    """What crossed, event by event."""
    model, _, variation = case.partition(":")
    watch = FakeDevice()
    once = OnceWatched(watch, repeat=model != "toy")
    cfg = PRESETS[model]().with_fields(**SMALL)
    if variation == "merged":
        cfg = cfg.with_fields(rollout_weights="merged")
    epoch_permutation.cache_clear()  # each case makes its own
    networks = OnCuda(cfg, resolve(cfg.model, scorer_paths(cfg.scorer)) if model == "toy" else None, "cuda", once)
    with MonkeyPatch.context() as patch, once.mode, watch, torch.autograd.set_multithreading_enabled(False):
        patch.setattr(FakeTensor, "tolist", lambda self: watch.tolist(self))  # noqa: PLW0108  a bound one gets no self
        # a GradScaler is told that there is a GPU
        patch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
        patch.setattr("spo_fast.ops.merge_lora._share_memory", lambda a, b: a is b)  # a fake tensor has no address
        networks.encode_prompts()
        networks.model.prompt_cache = HostPrompts(networks.model.prompt_cache)
        if variation == "faulty":
            plant_faults(patch)
        run = CudaRun(cfg, networks, once)
        watch.seen.clear()
        with watch.phase("between"):
            record = run.iterate(1, watch.phase)
        assert record is not None and run.learner.scaler.is_enabled()
        with watch.phase("log"):
            run.learner.check_weights()
            fetch_scalars(record)
    return [{"phase": phase, **event._asdict(), "count": n} for (phase, event), n in watch.seen.items()]


for case in sys.argv[2:]:
    try:
        print(json.dumps(iteration(case)), flush=True)
    except Exception:
        print(json.dumps(traceback.format_exc()), flush=True)
