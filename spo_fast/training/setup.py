"""A run's parts, built from a Config in the order in which what may be wrong is told earliest."""

from __future__ import annotations

import functools
from pathlib import Path

from spo_fast.config.training import Config
from spo_fast.data.prompt_order import training_prompts, validation_prompts
from spo_fast.evaluation.pages.model_card import claim_repository
from spo_fast.evaluation.required_files import resolve, run_paths
from spo_fast.method.objectives import make_objective
from spo_fast.models.flow import load_model
from spo_fast.training import accelerate
from spo_fast.training.held_out import held_out_accuracy, held_out_metrics, wanted_by, watched_by
from spo_fast.training.iteration import Iterates
from spo_fast.training.learner import Learner
from spo_fast.training.pair_batches import PairReader
from spo_fast.training.plan.fit_memory import choose_for
from spo_fast.training.run import TrainingRun
from spo_fast.training.scorer import check_ranges, make_scorer
from spo_fast.training.validation import Validator


class Parts(TrainingRun[Config], Iterates):
    """What a run of preference optimisation is made of."""

    learner: Learner
    encoded = 0
    """Iterations whose prompts' embeddings are there."""

    def __init__(self, cfg: Config):
        super().__init__(cfg)
        check_processes(cfg, self.group.size)
        self.prompts, self.prompt_order = training_prompts(cfg, self.group.size)
        shown = validation_prompts(cfg, self.prompts)
        metrics, wanted = held_out_metrics(cfg, shown), wanted_by(cfg, self.prompts)
        watched = watched_by(cfg, metrics, shown, self.run_dir)
        resolved = resolve(cfg.model, run_paths(cfg))
        self.lock()
        cfg, self.choices, self.found = choose_for(self.device, cfg, resolved)
        self.cfg = cfg
        # before anything is loaded: nobody should learn after ten hours that nobody was logged in
        self.repository = (
            claim_repository(cfg.run.hub_model_id or self.run_dir.resolve().name)
            if cfg.run.push_to_hub and self.group.main
            else None
        )
        prompt_cache = cfg.data.prompt_cache_dir or self.run_dir / "prompt_cache"
        self.model = load_model(cfg.model, resolved, self.device, prompt_cache)
        self.policy, picked = accelerate.make_policy(self.model, cfg, self.group.size)
        self.choices += picked
        self.objective = make_objective(cfg.objective)
        if self.objective.samples_from == "data":
            if self.group.size > 1:
                raise ValueError(f"--method {cfg.objective.method} trains on one process. Start it without torchrun.")
            self.pairs = PairReader(self.model, cfg, self.run_dir, self.resume is not None)
        self.table = self.make_table()
        self.scorer = make_scorer(cfg, self.model, self.objective, wanted, shown)
        check_ranges(self.scorer, self.table, self.objective, cfg.sample)
        if cfg.engine.compile != "off":
            self.compile()
        self.record_graphs(accelerate.capture_for(cfg, self.device))
        self.total = cfg.run.iterations((self.pairs or self.prompt_order).iterations_per_epoch)
        self.learner = Learner(self.policy, self.objective, self.table, cfg, self.total, self.group)
        accuracy = functools.partial(held_out_accuracy, self.pairs, self.objective, self.sampler, cfg)
        self.validator = Validator(
            *(cfg, self.run_dir, self.model, self.policy, self.scorer),
            *(shown, metrics, wanted, accuracy, watched),
        )

    def compile(self, backend: str | accelerate.Backend = "inductor") -> None:
        """torch.compile of all networks; what is compiled is kept (keep_cache)."""
        accelerate.compile_networks(self.policy, self.model.vae, self.scorer, self.cfg, backend, self.run_dir)

    def record_graphs(self, capture: accelerate.Capture | None) -> None:
        """From the second iteration on calls whose shapes came before are replayed."""
        self.decode = accelerate.replayed(self.policy, self.model.decode, self.scorer, capture, self.cfg)

    def settings(self) -> dict[str, object]:
        """As every run's, and how many processes share an iteration."""
        size = self.group.size
        return {**super().settings(), "world_size": size, "global_batch": size * self.cfg.sample.sample_batch_size}

    def export(self, directory: Path) -> list[Path]:
        """The trained weights as other software loads them."""
        return self.model.save(self.policy, directory, self.run_dir.resolve().name)

    def export_beside(self, checkpoint_dir: Path) -> None:
        """The trained weights as `export` has them."""
        self.export(checkpoint_dir)


def check_processes(cfg: Config, count: int) -> None:
    """Raises ValueError for what cannot be sharded over so many processes."""
    if cfg.adapter.full_finetune and count > 1 and cfg.run.keep_best is not None:
        raise ValueError("--keep_best saves from one process, which --full_finetune on several has not. Leave it out.")
    if cfg.adapter.full_finetune and count > 1 and cfg.optim.optimizer != "adamw":
        raise ValueError(
            f"--full_finetune on several processes keeps a part of the optimizer's state on each, which "
            f"--optimizer {cfg.optim.optimizer} cannot be cut into. Use --optimizer adamw."
        )
