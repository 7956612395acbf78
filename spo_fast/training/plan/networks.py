"""A run's networks without weights, built as the run builds its own."""

from __future__ import annotations

from dataclasses import replace

import torch

from spo_fast.config.scorers import find_scorer, judged_range, scorer_specs
from spo_fast.config.training import Config
from spo_fast.models.compile import BLOCKS
from spo_fast.models.diffusion import DTYPES
from spo_fast.models.files.lora import read_lora
from spo_fast.models.files.sources import Resolved
from spo_fast.models.policy import Policy
from spo_fast.models.quantised import import_for
from spo_fast.models.trained_weights import TrainedWeights
from spo_fast.scorers.base import Scorer
from spo_fast.scorers.registry import summed
from spo_fast.training.accelerate import set_up
from spo_fast.training.plan.fake_model import fake_model
from spo_fast.training.plan.fake_scorers import encode_text, scorer_without_weights
from spo_fast.training.plan.once import Once, shapes_alone


class Networks:
    """The model, the policy and the scorers; what each took at the shapes it has met is kept in `once`."""

    def __init__(self, cfg: Config, resolved: Resolved | None, device_type: str, once: Once | None = None):
        self.cuda, specs = device_type == "cuda", scorer_specs(cfg.scorer.scorer)
        self.once = once or Once(self.cuda)
        self.model = fake_model(cfg.model, resolved, DTYPES[cfg.model.precision_on(device_type)], self.once)
        self.policy = self._policy(cfg)
        self.scorers = {name: self._scorer(name, cfg, resolved) for name, _ in specs}
        ranges, normalise = [judged_range(entry) for entry in cfg.scorer.scorer], cfg.scorer.normalise_scorers
        self.scorer = summed([(self.scorers[name], weight) for name, weight in specs], ranges, normalise)
        self.unknown = tuple(name for name in self.scorers if find_scorer(name).network == "unknown")

    def computed(self, cfg: Config) -> Config:
        """cfg with what this device would choose of how the networks are computed."""
        fuse = self.cuda if cfg.engine.fuse is None else cfg.engine.fuse
        return replace(cfg, engine=replace(cfg.engine, fuse=fuse, attention="auto"))

    def _policy(self, cfg: Config) -> Policy:
        once, model = self.once, self.model
        with shapes_alone():  # no weight is drawn, and fake ones cannot be cast as PEFT casts them
            policy = Policy(model.network, replace(cfg.adapter, lora_path=None), seed=0)
        policy.reach = None
        if cfg.adapter.lora_path is not None:
            # one that does not fit is told by a dry run too
            read_lora(cfg.adapter.lora_path, model.network, cfg.adapter)
        networks = [n for n in (model.network, policy._frozen_copy) if n is not None]
        for network in networks:
            once.weights(network, model.dtype)
        import_for(cfg.engine.base_weights)
        with once.mode:  # masters and hooks again, for the fake weights
            TrainedWeights.__init__(policy, [(n, p) for n, p in model.network.named_parameters() if p.requires_grad])
            set_up(policy, model, self.computed(cfg))
            if cfg.adapter.lora_path is not None:
                policy._start = [torch.empty_like(p) for p in policy._weights]
        policy.forget_full_base()
        for network in networks:
            once.repeat_blocks(network, BLOCKS)
            # diffusers walks all modules for it, a hundred times an iteration
            network.__class__ = type("FakeNetwork", (type(network),), {"dtype": network.dtype})
            network.forward = once.wrap(network.forward)
        policy.text = once.wrap(policy.text, samples=False)  # type: ignore[method-assign]
        return policy

    def _scorer(self, name: str, cfg: Config, resolved: Resolved | None) -> Scorer:
        paths = resolved.scorer_paths if resolved else {}
        return scorer_without_weights(name, paths, cfg.scorer, self.model, self.once)

    @torch.no_grad()
    def encode_prompts(self) -> None:
        """A batch of prompts through the text encoders and the scorers' text towers."""
        self.model.encode()
        for scorer in self.scorers.values():
            encode_text(scorer)
