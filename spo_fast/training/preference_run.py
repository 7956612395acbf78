"""Trains a preference model on pairs of images, so that it can judge what a diffusion model predicts at any timestep.

One step (SPO, arXiv 2406.04314, section 3.2; step_aware_preference_model/ of the published code): both images of a pair
are noised to one t with one noise, the frozen diffusion model predicts x0 from each with guidance, and the preference
model, which sees the decoded predictions and t, is trained by cross-entropy to prefer the image people preferred.
"""

from __future__ import annotations

import functools
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from spo_fast.config.preference import PreferenceConfig
from spo_fast.data.pair_stream import PairBatch, PairStream
from spo_fast.evaluation.agreement import Judgements, write_report
from spo_fast.method.noise import RENOISE, TIMESTEPS, KeyedDraws
from spo_fast.method.schedule import NUM_TIMESTEPS
from spo_fast.models.device import WIDE, Choice, fastest_precision, found_device, listed, network_width
from spo_fast.models.flow import load_model
from spo_fast.training import opening
from spo_fast.training.monitor.progress import ProgressLine
from spo_fast.training.monitor.timer import Timer
from spo_fast.training.pair_batches import (
    EVALUATION,
    ImageLoader,
    Images,
    LoadedImage,
    SplitPairs,
    caches_latents,
    repeated,
)
from spo_fast.training.preference_learner import RewardLearner
from spo_fast.training.preference_model import PixelReward, Reward
from spo_fast.training.rewards import Rewards
from spo_fast.training.run import TrainingRun

if TYPE_CHECKING:
    from spo_fast.models.files.sources import Resolved


class PreferenceRun(TrainingRun[PreferenceConfig]):
    """One training run of a preference model: its parts, built from a PreferenceConfig with pairs."""

    learner: RewardLearner

    def __init__(self, cfg: PreferenceConfig, resolved: Resolved):
        super().__init__(cfg)
        if self.group.size > 1:
            raise ValueError("preference models train on one process. Start train_spm without torchrun.")
        width = network_width(resolved, cfg.model.model)
        self.found, self.choices = found_device(self.device), list[Choice]()
        if cfg.model.mixed_precision == "auto":
            self.choices = [fastest_precision(self.found, width)]
            self.cfg = cfg = cfg.with_fields(mixed_precision=self.choices[0].value)
        assert cfg.pairs.pairs is not None
        self.lock()

        column = cfg.pairs.caption_column
        self.split = SplitPairs(cfg.pairs, self.run_dir, cfg.run.seed, self.resume is not None, column)
        self.bad, self.source, self.valid_source = self.split.bad, self.split.source, self.split.valid_source
        self.train_rows, self.valid_rows = self.split.train_rows, self.split.valid_rows

        prompt_cache = cfg.pairs.prompt_cache_dir or self.run_dir / "prompt_cache"
        self.model = load_model(cfg.model, resolved, self.device, prompt_cache)
        self.model.prompt_cache.keep_encoder = True  # new prompts come all the time
        self.fused = self.device.type == "cpu" and width >= WIDE
        if self.fused:
            self.model.fuse()
        self.rewards = Rewards(cfg, self.model)
        self.reward = self.rewards.initial()
        self.rewards.check_compared()
        labeller, labeller_fingerprint = self.rewards.labeller()
        self.pairs_per_step = cfg.optim.train_batch_size * cfg.optim.gradient_accumulation_steps
        per_epoch = max(1, len(self.train_rows) // self.pairs_per_step)
        self.total = cfg.run.iterations(per_epoch)
        cached = caches_latents(cfg.pairs, self.total * self.pairs_per_step, len(self.train_rows))
        noise, gap = cfg.reward.noise != "none", cfg.pairs.relabel_gap
        self.images = ImageLoader(
            self.model, cfg.pairs, self.run_dir, cached, noise, labeller, labeller_fingerprint, gap
        )
        self.learner = RewardLearner(self.reward, cfg.optim, self.total)

    # ------------------------------------------------------------------------------------------------ steps

    def draws(self, iteration: int, first: int, count: int) -> KeyedDraws:
        """Random numbers of an iteration's pairs `first` to first + count - 1."""
        return KeyedDraws(self.cfg.run.seed, iteration, torch.arange(first, first + count, device=self.device))

    def timesteps(self, draws: KeyedDraws) -> Tensor:  # (B,) int64
        """Of a training batch; 0 for clean images."""
        if self.cfg.reward.noise == "none":
            return torch.zeros_like(draws.prompts)
        if self.cfg.reward.noise == "ddim":
            return 1 + 50 * draws.integer(TIMESTEPS, 20)
        return draws.integer(TIMESTEPS, NUM_TIMESTEPS)

    def noise(self, images: Images, draws: KeyedDraws) -> Tensor | None:  # (2, B, C, h, w)
        """For both images of each pair, one or two by --shared_noise; None where there are no latents."""
        if images.latents is None:
            return None
        shape = tuple(images.latents.shape[2:])
        return torch.stack([draws.normal(RENOISE, shape, 0 if self.cfg.reward.shared_noise else j) for j in range(2)])

    def iterate(self, stream: Iterator[PairBatch], timer: Timer) -> dict[str, object]:
        """One optimizer step. Returns what to log."""
        cfg = self.cfg
        with timer("data"):
            batches = [next(stream) for _ in range(cfg.optim.gradient_accumulation_steps)]
        total_weight = sum(float(batch.weights.sum()) for batch in batches)
        loss_sum, right, decided = torch.zeros(3, device=self.device)
        for number, batch in enumerate(batches):
            B = len(batch.prompts)
            draws = self.draws(self.state.iteration, number * cfg.optim.train_batch_size, B)
            with timer("frozen"):
                images = self.images.images(batch, draws)
                labels = self.images.labels(batch)
                t, noise = self.timesteps(draws), self.noise(images, draws)
                seen = self.reward.see(images, t, noise)
            with timer("backward"):
                found = self.reward.compare(seen, t, batch.prompts)
                weights = (batch.weights / total_weight).to(self.device)
                loss = found.loss(labels, weights, cfg.reward.in_batch_negatives)
                loss.backward()
            gap = found.gap.detach()
            right += ((gap > 0) * labels + (gap < 0) * (1 - labels)).mul(labels != 0.5).sum()
            decided += (labels != 0.5).sum()
            loss_sum += loss.detach()
        with timer("step"):
            norm = self.learner.step()
        lr = self.learner.lr
        self.state.count_step(taken=True)
        self.state.pairs = batches[-1].position
        self.learner.go_to(self.state.iteration + 1)
        return {
            "epoch": self.state.pairs // max(1, len(self.train_rows)),
            "loss": loss_sum,
            "grad_norm": norm,
            "lr": lr,
            "accuracy": right / decided,
            **found.facts(),
            "bad_rows": len(self.bad),
        }

    def stream(self) -> PairStream[list[LoadedImage]]:
        """The training pairs from where the run stands on, without end."""
        cfg = self.cfg
        return PairStream(
            self.source,
            self.train_rows,
            cfg.optim.train_batch_size,
            self.images.load,
            self.bad,
            seed=cfg.run.seed,
            position=self.state.pairs,
            workers=cfg.pairs.num_workers,
        )

    # ------------------------------------------------------------------------------------------------ evaluation

    @torch.no_grad()
    def evaluate(self, contenders: dict[str, Reward]) -> Judgements:
        """Every contender's preference on the same held-out pairs at the same noise, at each validation timestep."""
        cfg = self.cfg
        judgements = Judgements(list(cfg.run.validation_timesteps))
        seen_rows = 0
        stream = PairStream(
            self.valid_source,
            self.valid_rows,
            cfg.optim.train_batch_size,
            functools.partial(self.images.load, pixels=True),
            self.bad,
            seed=cfg.run.seed,
            epochs=1,
            shuffle=False,
            workers=cfg.pairs.num_workers,
        )
        with self.reward.weights.exported(), stream:
            for batch in stream:
                draws = self.draws(EVALUATION, seen_rows, len(batch.prompts))
                seen_rows += len(batch.prompts)
                images = self.images.images(batch, draws, pixels=True)
                labels = batch.labels.to(self.device)  # people's, whatever the training was on
                for timestep in cfg.run.validation_timesteps:
                    self._judge(judgements, contenders, images, labels, timestep, draws)
        return judgements

    def _judge(
        self,
        judgements: Judgements,
        contenders: dict[str, Reward],
        images: Images,
        labels: Tensor,
        timestep: int,
        draws: KeyedDraws,
    ) -> None:
        t = torch.full((len(labels),), timestep, dtype=torch.int64, device=self.device)
        noise = self.noise(images, draws)
        if timestep > 0 and noise is None:
            return  # a run without noise knows clean images only
        if timestep == 0 and self.cfg.reward.parameterisation == "pixel":
            noise = None  # as published: at 0 the images themselves are judged
        shared: dict[int | str, Tensor] = {}  # CLIPs of one size see the same pixels
        for name, reward in contenders.items():
            kind = reward.clip.config.image_size if isinstance(reward, PixelReward) else name
            if kind not in shared:
                shared[kind] = reward.see(images, t, noise)
            found = reward.compare(shared[kind], t, images.prompts)
            judgements.add(name, timestep, found.scores.cpu(), labels.cpu())

    def log_evaluation(self, judgements: Judgements) -> dict[str, float]:
        """The trained model's agreement with people at each timestep, as it is logged."""
        return {f"accuracy_t{t}": judgements.accuracy("trained", t)[0] for t in judgements.measured("trained")}

    # ------------------------------------------------------------------------------------------------ the run

    def export(self, directory: Path) -> list[Path]:
        """The preference model in the published key layout."""
        self.reward.save(directory / "preference_model")
        return [directory / "preference_model"]

    def announce(self) -> None:
        """The table of the run, and what was chosen for its device."""
        cfg, cache = self.cfg, self.images.cache
        trained = sum(p.numel() for p in self.reward.weights.masters)
        unusable = f", {len(self.bad):,} rows unusable" if len(self.bad) else ""
        left = ["preference_model/", *(["evaluation.md, .json and .png"] if len(self.valid_rows) else [])]
        left += ["metrics.jsonl", "config.yaml", opening.checkpoints_text(cfg.run.checkpointing_steps, "step")]
        rows = {
            "model": opening.model_text(cfg.model.model, self.model),
            "method": f"{cfg.reward.parameterisation} preference model, {trained:,} trained weights, on {self.device}",
            "pairs": f"{len(self.train_rows):,} of {cfg.pairs.pairs}, {len(self.valid_rows):,} held out{unusable}",
            "step": f"{self.pairs_per_step:,} pairs",
            "steps": f"{self.total:,}" + (f", {self.resumed_at:,} of them done" if self.resumed_at else ""),
            "time": "known after the first step",
            "memory": opening.memory_there(self.found),
            "writes into": str(self.run_dir),
            "files": ", ".join(left),
        }
        rows |= {} if cache is None else {"VAE latents": f"kept in {cache.directory}"}
        opening.show(rows)
        if self.choices:
            print(f"chosen for this device ({self.found.name}):\n{textwrap.indent(listed(self.choices), '  ')}")
        if self.fused:
            print("frozen networks are fused: fewer operations and bytes, for a wide network on a CPU")
        print(repeated(len(self.train_rows), self.pairs_per_step, "a step"), end="")

    def train(self) -> Path:
        """From the first or the resumed step to the last; returns the run directory."""
        cfg = self.cfg
        self.announce()
        with (
            self.held,
            self.stop,
            self.start() as log,
            self.stream() as stream,
            ProgressLine(self.total, done=self.state.iteration) as progress,
        ):
            assert log is not None
            self.learner.go_to(self.state.iteration)
            timer = Timer(self.device)
            while self.state.iteration < self.total:
                record = self.iterate(iter(stream), timer)
                self.state.iteration += 1
                self.learner.check_weights()
                if len(self.valid_rows) and self.due(cfg.run.validation_steps) and not self.done:
                    with timer("evaluate"):
                        record |= self.log_evaluation(self.evaluate({"trained": self.reward}))
                record |= timer.read_ms() | self.gpu_stats()
                progress.update(log.log(self.state.iteration - 1, record))
                if self.due(cfg.run.checkpointing_steps):
                    self.save()
                if self.stop.signal and not self.done:
                    self.stopped()
                    return self.run_dir
        self.finish()
        return self.run_dir

    def finish(self) -> None:
        """Export, and say how often the model agrees with people on prompts it has not seen."""
        files = self.export(self.run_dir)
        if len(self.valid_rows):
            judgements = self.evaluate({"trained": self.reward, **self.rewards.compared()})
            print(write_report(judgements, self.run_dir))
        self.split.finish()
        print("preference model: " + ", ".join(map(str, files)))
