"""Trains a preference model on pairs of images, so that it can judge what a diffusion model predicts at any timestep.

One step (SPO, arXiv 2406.04314, section 3.2; step_aware_preference_model/ of the published code): both images of a pair
are noised to one t with one noise, the frozen diffusion model predicts x0 from each with guidance, and the preference
model, which sees the decoded predictions and t, is trained by cross-entropy to prefer the image people preferred.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from spo_fast.config.preference import PreferenceConfig, RewardOptimConfig
from spo_fast.data.files import shown, weight_files
from spo_fast.data.pair_stream import PairBatch, PairStream
from spo_fast.data.weights import check_finite, read_tensors
from spo_fast.evaluation.agreement import Judgements, write_report
from spo_fast.method.noise import RENOISE, TIMESTEPS, KeyedDraws
from spo_fast.models.diffusion import DTYPES, DiffusionModel
from spo_fast.models.files.load import load_text_encoders, load_unet
from spo_fast.models.files.sources import Resolved
from spo_fast.models.tensor_cache import fingerprint_files
from spo_fast.scorers.clip_files import find_weights, init_identity_time_conditioning, load_any_clip
from spo_fast.scorers.latent_files import init_latent_reward, load_latent_reward
from spo_fast.scorers.spm import check_vocabulary, load_pickscore
from spo_fast.training.monitor.gpu import gpu_stats
from spo_fast.training.monitor.progress import ProgressLine
from spo_fast.training.monitor.timer import Timer
from spo_fast.training.optimizer import WeightUpdates
from spo_fast.training.pair_batches import (
    EVALUATION,
    ImageLoader,
    Images,
    LoadedImage,
    SplitPairs,
    caches_latents,
    repeated,
)
from spo_fast.training.preference_model import NoisyLatentReward, PixelReward, Reward, pair_loss
from spo_fast.training.run import TrainingRun

# ---------------------------------------------------------------------------------------------------- learning


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


def read_projection(path: Path) -> Tensor:  # (D, width)
    """The text projection of a whole CLIP."""
    file, name = find_weights(path), "text_projection.weight"
    found = {key: value for key, value in read_tensors(file).items() if key == name}
    if not found:
        raise ValueError(f"{shown(file)} has no {name}: give a whole CLIP ViT-L/14 (--text_projection_path).")
    check_finite(found, file)
    return found[name]


# ---------------------------------------------------------------------------------------------------- a run


class PreferenceRun(TrainingRun[PreferenceConfig]):
    """One training run of a preference model: its parts, built from a PreferenceConfig with pairs."""

    def __init__(self, cfg: PreferenceConfig, resolved: Resolved):
        super().__init__(cfg)
        if self.group.size > 1:
            raise ValueError("preference models train on one process. Start train_spm without torchrun.")
        self.cfg = cfg = cfg.with_fields(mixed_precision=cfg.model.precision_on(self.device.type))
        assert cfg.pairs.pairs is not None
        self.lock()

        column = cfg.pairs.caption_column
        self.split = SplitPairs(cfg.pairs, self.run_dir, cfg.run.seed, self.resume is not None, column)
        self.bad, self.source, self.valid_source = self.split.bad, self.split.source, self.split.valid_source
        self.train_rows, self.valid_rows = self.split.train_rows, self.split.valid_rows

        prompt_cache = cfg.pairs.prompt_cache_dir or self.run_dir / "prompt_cache"
        self.model = DiffusionModel(cfg.model, resolved, self.device, prompt_cache)
        self.model.prompt_cache.keep_encoder = True  # new prompts come all the time
        self.start_path = cfg.reward.init_path or resolved.scorer_paths.get("pickscore")
        self.reward = self._initial_reward(resolved)
        for entry in cfg.run.compare_with:
            find_weights(Path(entry.split("=", 1)[1]))  # a wrong path is named now, not when the training is done
        labeller, labeller_fingerprint = None, ""
        if cfg.pairs.relabel == "pickscore":
            path = resolved.scorer_paths["pickscore"]
            labeller = load_pickscore(path, self.model.tokenize, self.device)
            labeller_fingerprint = fingerprint_files(weight_files(find_weights(path)))
        self.pairs_per_step = cfg.optim.train_batch_size * cfg.optim.gradient_accumulation_steps
        per_epoch = max(1, len(self.train_rows) // self.pairs_per_step)
        self.total = cfg.run.iterations(per_epoch)
        cached = caches_latents(cfg.pairs, self.total * self.pairs_per_step, len(self.train_rows))
        noise, gap = cfg.reward.noise != "none", cfg.pairs.relabel_gap
        self.images = ImageLoader(
            self.model, cfg.pairs, self.run_dir, cached, noise, labeller, labeller_fingerprint, gap
        )
        self.learner = RewardLearner(self.reward, cfg.optim, self.total)

    def _initial_reward(self, resolved: Resolved) -> Reward:
        cfg = self.cfg.reward
        if cfg.parameterisation == "pixel":
            assert self.start_path is not None
            return self.pixel_reward(self.start_path, cfg.time_conditioned)
        if cfg.init_path is not None:
            network = load_latent_reward(cfg.init_path, device=self.device).train()
        else:
            path = resolved.scorer_paths.get("text_projection")
            projection = None if path is None else read_projection(path)
            wide = torch.float32  # masters begin with what the files hold, not with its rounding
            parts = load_unet(resolved, wide).to(self.device), load_text_encoders(resolved, wide)
            network = init_latent_reward(*parts, text_projection=projection, seed=self.cfg.run.seed)
        start = {name: p.detach() for name, p in network.named_parameters() if p.requires_grad}
        for name, p in network.named_parameters():
            p.data = p.data.to(torch.float32 if name == "logit_scale" else DTYPES[cfg.reward_dtype])
        if cfg.reward_checkpointing:
            network.unet.enable_gradient_checkpointing()
        reward = NoisyLatentReward(network, self.model, cfg.train_guidance_scale)
        reward.weights.load_state_dict(start)
        return reward

    def pixel_reward(self, path: str | Path, time_conditioned: bool | None) -> PixelReward:
        """A CLIP from a file, given time conditioning if that is wanted (None: as it is)."""
        clip = check_vocabulary(load_any_clip(path, device=self.device), self.model.tokenize, path)
        if time_conditioned and not clip.config.time_conditioned:
            clip = init_identity_time_conditioning(clip, self.cfg.run.seed)
        elif time_conditioned is False and clip.config.time_conditioned:
            raise ValueError(f"{path} is step-aware, but time_conditioned is off: start from a plain CLIP.")
        start = {name: p.detach() for name, p in clip.named_parameters()}
        clip.set_compute_dtype(DTYPES[self.cfg.reward.reward_dtype])
        clip.vision_model.encoder.recompute = self.cfg.reward.reward_checkpointing
        reward = PixelReward(clip, self.model, self.cfg.reward.train_guidance_scale, self.cfg.model.images_per_decode)
        reward.weights.load_state_dict(start)  # masters begin with what the file holds, not with its rounding
        return reward

    # ------------------------------------------------------------------------------------------------ steps

    def draws(self, iteration: int, first: int, count: int) -> KeyedDraws:
        return KeyedDraws(self.cfg.run.seed, iteration, torch.arange(first, first + count, device=self.device))

    def timesteps(self, draws: KeyedDraws) -> Tensor:  # (B,) int64
        """Of a training batch; 0 for clean images."""
        if self.cfg.reward.noise == "none":
            return torch.zeros_like(draws.prompts)
        if self.cfg.reward.noise == "ddim":
            return 1 + 50 * draws.integer(TIMESTEPS, 20)
        return draws.integer(TIMESTEPS, len(self.model.alphas_cumprod))

    def noise(self, images: Images, draws: KeyedDraws) -> Tensor | None:  # (2, B, C, h, w)
        if images.latents is None:
            return None
        shape = tuple(images.latents.shape[2:])
        return torch.stack([draws.normal(RENOISE, shape, 0 if self.cfg.reward.shared_noise else j) for j in range(2)])

    def iterate(self, stream: Iterator[PairBatch], timer: Timer) -> dict[str, Any]:
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
                text, features, scale = self.reward.features(seen, t, batch.prompts)
                weights = (batch.weights / total_weight).to(self.device)
                loss = pair_loss(text, features, scale, labels, weights, cfg.reward.in_batch_negatives)
                loss.backward()
            gap = (features[0] - features[1]).mul(text).sum(-1).detach()
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
            **{
                "epoch": self.state.pairs // max(1, len(self.train_rows)),
                "loss": loss_sum,
                "grad_norm": norm,
                "lr": lr,
            },
            **{"accuracy": right / decided, "logit_scale": scale.detach(), "bad_rows": len(self.bad)},
        }

    def stream(self) -> PairStream[list[LoadedImage]]:
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
        with PairStream(
            self.valid_source,
            self.valid_rows,
            cfg.optim.train_batch_size,
            functools.partial(self.images.load, pixels=True),
            self.bad,
            seed=cfg.run.seed,
            epochs=1,
            shuffle=False,
            workers=cfg.pairs.num_workers,
        ) as stream:
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
        shared: dict[Any, Tensor] = {}  # CLIPs of one size see the same pixels
        for name, reward in contenders.items():
            kind = reward.clip.config.image_size if isinstance(reward, PixelReward) else name
            if kind not in shared:
                shared[kind] = reward.see(images, t, noise)
            text, features, scale = reward.features(shared[kind], t, images.prompts)
            judgements.add(name, timestep, (scale * (features * text).sum(-1)).cpu(), labels.cpu())

    def log_evaluation(self, judgements: Judgements) -> dict[str, float]:
        return {f"accuracy_t{t}": judgements.accuracy("trained", t)[0] for t in judgements.measured("trained")}

    # ------------------------------------------------------------------------------------------------ the run

    def export(self, directory: Path) -> list[Path]:
        """The preference model in the published key layout."""
        self.reward.save(directory / "preference_model")
        return [directory / "preference_model"]

    def announce(self) -> None:
        cfg = self.cfg
        trained = sum(p.numel() for p in self.reward.weights.masters)
        print(f"{cfg.reward.parameterisation} preference model, {trained:,} trained weights, on {self.device}")
        held_out = f"{len(self.valid_rows):,} held out, {len(self.bad):,} rows unusable"
        print(f"pairs from {cfg.pairs.pairs}: {len(self.train_rows):,} to train on, {held_out}")
        if self.images.cache is not None:
            print(f"VAE latents are kept in {self.images.cache.directory}")
        print(f"{self.total:,} steps of {self.pairs_per_step} pairs")
        print(repeated(len(self.train_rows), self.pairs_per_step, "a step"), end="")

    def train(self) -> Path:
        """From the first or the resumed step to the last; returns the run directory."""
        cfg = self.cfg
        self.announce()
        with self.stop, self.start() as log, self.stream() as stream, ProgressLine(self.total) as progress:
            assert log is not None
            self.learner.go_to(self.state.iteration)
            timer = Timer(self.device)
            while self.state.iteration < self.total:
                record = self.iterate(iter(stream), timer)
                self.state.iteration += 1
                self.learner.check_weights()
                done = self.state.iteration == self.total
                if len(self.valid_rows) and self.state.iteration % cfg.run.validation_steps == 0 and not done:
                    with timer("evaluate"):
                        record |= self.log_evaluation(self.evaluate({"trained": self.reward}))
                record |= timer.read_ms() | (gpu_stats(self.device.index or 0) if self.device.type == "cuda" else {})
                progress.update(log.log(self.state.iteration - 1, record))
                if self.state.iteration % cfg.run.checkpointing_steps == 0 or done:
                    self.save()
                if self.stop.signal and not done:
                    self.stopped()
                    return self.run_dir
        self.finish()
        return self.run_dir

    def finish(self) -> None:
        """Export, and say how often the model agrees with people on prompts it has not seen."""
        files = self.export(self.run_dir)
        if len(self.valid_rows):
            judgements = self.evaluate(self.contenders())
            print(write_report(judgements, self.run_dir))
        self.split.finish()
        print("preference model: " + ", ".join(map(str, files)))

    def contenders(self) -> dict[str, Reward]:
        """The trained model, what it started from if that is a plain CLIP, and those it is to be compared with."""
        found: dict[str, Reward] = {"trained": self.reward}
        if self.cfg.reward.parameterisation == "pixel":
            assert self.start_path is not None
            initial = self.pixel_reward(self.start_path, None)
            if not initial.clip.config.time_conditioned:
                found["initial"] = initial
        for entry in self.cfg.run.compare_with:
            name, path = entry.split("=", 1)
            found[name] = self.pixel_reward(path, None)
        return found
