"""What a run costs, counted before it starts: its own iteration on fake tensors, no weights, no network.

A fake tensor has a shape, a type and a storage that takes no memory. The trainer's iteration (training/iteration.py)
runs on networks of such weights, while a mode adds up the products and the bytes of the storages that are alive. A
network runs once for each shape it meets, and so does one of its blocks that are alike, with gradient too; later calls
repeat what the first one took. So a prediction takes as long as the Python of a few forwards of a few blocks, whatever
the batch (SDXL: 11 s on a core, of which counting is 4).

Not counted: what a kernel allocates inside itself (cuDNN's and cuBLAS's workspaces), the CUDA context (about 0.5 GB),
what the allocator cannot reuse, the bytes of the validation's sampling (num_validation_images at a time, or a
decode_chunk), and the images of labelled pairs while they are read (pair_batches.READ_BATCH at a time).
"""

from __future__ import annotations

import contextlib
from collections.abc import Hashable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

from torch import Tensor
from torch.utils import _pytree as pytree

from spo_fast.data.prompt_order import PromptSampler
from spo_fast.evaluation.required_files import resolve, scorer_paths
from spo_fast.method.objectives import make_objective
from spo_fast.training.accelerate import recompute
from spo_fast.training.checkpoint import TrainState
from spo_fast.training.iteration import Iterates
from spo_fast.training.plan.costs import PHASES, Costs
from spo_fast.training.plan.fake_learner import FakeLearner
from spo_fast.training.plan.fake_model import FakePairs
from spo_fast.training.plan.fake_picture import picture_flops
from spo_fast.training.plan.held_bytes import HeldBytes
from spo_fast.training.plan.networks import Networks
from spo_fast.training.processes import ALONE
from spo_fast.training.signals import StopRequest
from spo_fast.training.sizes import check_sizes

if TYPE_CHECKING:
    from spo_fast.config.training import Config, SampleConfig
    from spo_fast.models.files.sources import Resolved
    from spo_fast.training.plan.counters import LiveStorage

LATEST: dict[Hashable, Networks] = {}
"""Settings of memory and batches may change: the networks and what they took are kept."""


def predict(cfg: Config, resolved: Resolved | None = None, device_type: str = "cuda") -> Costs:
    """The costs of cfg's run on a device of this type. Architectures are read from the resolved files' configs.

    resolved=None: the published architectures, and the shipped toy. Memory is that of an iteration that keeps every
    pair. One that keeps a few can have up to 1.5 times longer slots; states_per_forward bounds what they take.
    """
    if resolved is None and cfg.model.model.startswith("toy"):
        resolved = resolve(cfg.model, scorer_paths(cfg.scorer))
    model = replace(cfg.model, decode_chunk=None)
    key = (model, cfg.adapter, cfg.scorer, cfg.engine.fuse, cfg.engine.base_weights, repr(resolved), device_type)
    if key not in LATEST:
        LATEST.clear()  # the old ones go first
        LATEST[key] = Networks(cfg, resolved, device_type)
    return FakeRun(cfg, LATEST[key]).costs()


class FakeRun(Iterates):
    """A run's parts as setup.py has them, its networks without weights."""

    learner: FakeLearner

    def __init__(self, cfg: Config, networks: Networks):
        self.cfg = cfg = networks.computed(cfg)
        self.networks, self.once = networks, networks.once
        self.held = HeldBytes(networks.once.live.block, together=networks.cuda)
        self.group, self.stop = ALONE, StopRequest(cfg.run.stop_seconds)
        self.model, self.policy, self.scorer = networks.model, networks.policy, networks.scorer
        self.device, self.decode = self.model.device, self.model.decode
        check_sizes(cfg, self.model)
        recompute(self.policy, cfg)
        self.objective, B = make_objective(cfg.objective), cfg.sample.sample_batch_size
        self.table, self.shown_table = self.make_table(), self.model.table(cfg.sample.num_steps, 0.0)
        self.prompts, self.prompt_order = [""] * B, PromptSampler(B, B, cfg.run.seed)
        self.pairs = FakePairs(networks.model, cfg) if self.objective.samples_from == "data" else None
        self.learner = FakeLearner(self)
        self.state = TrainState(optimizer_steps=1)  # nothing is measured as before the first step

    @contextlib.contextmanager
    def rollout_weights(self, sample: SampleConfig, iteration: int) -> Iterator[None]:
        """Merged ones have the shapes of a network without a LoRA, and storages that are resident."""
        merged = sample.rollout_weights == "merged" and not self.cfg.adapter.full_finetune
        if merged:
            self.policy.network.disable_adapters()
        yield
        if merged:
            self.policy.network.enable_adapters()

    def costs(self) -> Costs:
        """Every phase of an iteration, on fake tensors."""
        cfg, once = self.cfg, self.once
        live = once.start(cfg.sample.rollout_weights, checkpoints=bool(cfg.optim.gradient_checkpointing))
        with live:
            with live.phase("encode prompts"):
                self.networks.encode_prompts()
            encoded, early = once.tally.pop("encode prompts"), live.peaks.pop("encode prompts")
            if self.learner.straddles:
                self.learner.fill_gradients()
            states, text = self._iterate(live), self._text()
            picture = picture_flops(self, live)
        once.tally.pop("", None)  # that text again, of no phase
        resident = self.held.resident(cfg, self.policy, self.model.vae, self.networks.scorers)
        encoders = sum(self.held.of(encoder.parameters()) for encoder in self.model.text_encoders())
        if self.pairs is not None:  # new prompts come all the time
            resident["text encoders"], encoders = encoders, 0
        peaks = {**live.peaks, "encode prompts": early + encoders}
        samples, flops = ({part: n[what] for part, n in once.tally.items()} for what in ("samples", "flops"))
        # the update ran its largest micro-batch; all take in proportion to their states
        rows = states * (1 + self.objective.guided(cfg.sample))
        flops["policy"], samples["policy"] = flops["policy"] * rows // samples["policy"], rows
        return Costs(
            samples=samples,
            full_flops=flops,
            flops_per_prompt=encoded["flops"] // encoded["samples"],
            resident=resident,
            gradients=self.held.of(self.policy.masters),
            terms_per_prompt=0 if self.pairs else len(self.objective.term_states(cfg.sample)),
            unknown=self.networks.unknown,
            graphs=self.networks.cuda and cfg.engine.cuda_graphs is not False,
            inputs=text,
            picture_flops=picture,
            transient={phase: peaks[phase] for phase in PHASES if phase in peaks},
        )

    def _text(self) -> int:
        """Bytes of what a fused network computes of a rollout's prompts, and of its candidates' once more."""
        sample, objective = self.cfg.sample, self.objective
        if objective.rollout is None:
            return 0
        one = self.policy.precompute_text(self.model.cond(self.prompts[:1]), sample.guidance_scale > 1).text
        tensors = [v for v in pytree.tree_leaves(one) if isinstance(v, Tensor)]
        return self.held.of(tensors) * sample.sample_batch_size * (1 + sample.num_candidates)

    def _iterate(self, live: LiveStorage) -> int:
        """An iteration as every later one is: its states. The learner keeps its last micro-batch for a diagnosis."""
        record = self.iterate(1, live.phase)
        assert record is not None
        states = record["states"]
        assert isinstance(states, int)
        del record
        kept, self.learner.last = live.current_bytes, None
        for phase in {"rollout", "score", "reference"} & live.peaks.keys():
            live.peaks[phase] += kept - live.current_bytes
        return states
