"""Labelled pairs of images as training wants them: VAE latents, read and encoded once, and who trains on which rows.

Both trainers read through this: that of preference models, and that of the methods which learn from pairs (renoise.py).
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from spo_fast.config.sections import PairSourceConfig
from spo_fast.config.training import Config
from spo_fast.data import files
from spo_fast.data.images import RESIZER, decode_image, to_square
from spo_fast.data.pair_rows import BadRows, PairRow, PairSource
from spo_fast.data.pair_sources import open_pairs
from spo_fast.data.pair_stream import PairBatch, PairStream, split_by_prompt
from spo_fast.method.noise import EMPTY, POSTERIOR, KeyedDraws
from spo_fast.method.renoise import PairInputs
from spo_fast.models.diffusion import DiffusionModel
from spo_fast.models.tensor_cache import Row, RowCache
from spo_fast.scorers.spm import ClipScorer, normalise

ENCODE_BATCH = 4  # images through the VAE's encoder at a time, the last batch padded: see models/prompt_cache.py
READ_BATCH = 16  # pairs in host memory as pixels at a time
EVALUATION = 2**32 - 1  # the iteration whose noise evaluations use; training never gets there

# ---------------------------------------------------------------------------------------------------- images


@dataclass(frozen=True)
class Images:
    """B pairs as a preference model may want them."""

    prompts: list[str]
    latents: Tensor | None  # (2, B, C, h, w) clean, scaled; None if nothing is noised
    pixels: Tensor | None  # (2, B, 3, H, W) in [-1, 1]; None if they came from the latent cache


@dataclass
class LoadedImage:
    """One image of a pair as a reading thread leaves it: its cached row, or pixels to make that row from."""

    key: str  # sha256 of the file's bytes
    row: Row | None
    pixels: Tensor | None  # (3, H, W) in [-1, 1]
    original: Tensor | None  # (3, S, S) in [-1, 1] of the file, for PickScore


class ImageLoader:
    """Pairs of the data set -> Images on the device. VAE posteriors and PickScore features are cached by content."""

    def __init__(
        self,
        model: DiffusionModel,
        cfg: PairSourceConfig,
        run_dir: Path,
        cached: bool,
        noise: bool = True,  # latents are wanted, not pixels
        labeller: ClipScorer | None = None,
        labeller_fingerprint: str = "",
        relabel_gap: float = 0.0,
    ):
        if model.height != model.width:
            raise ValueError(f"labelled pairs are read as square images, not {model.width}x{model.height}.")
        self.model, self.labeller, self.gap, self.noise = model, labeller, relabel_gap, noise
        fingerprint = f"{model.vae_fingerprint()} {model.vae.dtype} {model.height} {self.noise} upright, by {RESIZER}"
        if labeller is not None:
            fingerprint += f" {labeller_fingerprint}"
        directory = cfg.latent_cache_dir or run_dir / "latent_cache"
        self.cache = RowCache(directory, fingerprint) if cached and self.needs_row else None

    @property
    def needs_row(self) -> bool:
        """Whether anything that is kept of an image is used."""
        return self.noise or self.labeller is not None

    def load(self, row: PairRow, pixels: bool = False) -> list[LoadedImage]:
        """Runs in a reading thread. pixels: decode the images even if everything else about them is cached."""
        return [self._load_image(row.image(j), pixels or not self.noise) for j in range(2)]

    def _load_image(self, data: bytes, pixels: bool) -> LoadedImage:
        key = hashlib.sha256(data).hexdigest()
        row = self.cache.read(key) if self.cache else None
        missing = row is None and self.needs_row
        if not (missing or pixels):
            return LoadedImage(key, row, None, None)
        image = decode_image(data)
        original = None
        if missing and self.labeller is not None:
            original = to_square(image, self.labeller.model.config.image_size)
        return LoadedImage(key, row, to_square(image, self.model.height), original)

    @torch.no_grad()
    def images(self, batch: PairBatch, draws: KeyedDraws, pixels: bool = False) -> Images:
        """The batch on the device; with pixels, if they were loaded, also where only latents are needed."""
        device = self.model.device
        loaded = [pair[j] for j in range(2) for pair in batch.loaded]  # first images, then second ones
        if self.needs_row:
            self._fill(loaded)
        latents = None
        B = len(batch.prompts)
        if self.noise:
            rows = (torch.stack([i.row[name] for i in loaded if i.row]) for name in MOMENTS)
            mean, std = (row.to(device, self.model.latent_dtype) for row in rows)
            shape = tuple(mean.shape[1:])
            noise = torch.cat([draws.normal(POSTERIOR, shape, j) for j in range(2)])
            latents = self.model.scaled(mean + std * noise).unflatten(0, (2, B))
        decoded = None
        if pixels or not self.noise:
            decoded = torch.stack([i.pixels for i in loaded if i.pixels is not None]).to(device).unflatten(0, (2, B))
        return Images(batch.prompts, latents, decoded)

    def labels(self, batch: PairBatch) -> Tensor:  # (B,)
        """Preferences for the first image to train on: people's, or PickScore's."""
        if self.labeller is None:
            return batch.labels.to(self.model.device)
        return self._relabel(batch.prompts, [pair[j] for j in range(2) for pair in batch.loaded])

    def _fill(self, loaded: list[LoadedImage]) -> None:
        """Give every image its row, and keep it."""
        fresh = {i.key: i for i in loaded if i.row is None}
        if self.cache is not None:
            for image in fresh.values():  # an earlier batch may have made it since a reading thread looked
                image.row = self.cache.read(image.key)
        images = [image for image in fresh.values() if image.row is None]
        for start in range(0, len(images), ENCODE_BATCH):
            part = images[start : start + ENCODE_BATCH]
            rows = self._encode(part)
            for image, row in zip(part, rows, strict=True):
                image.row = row
                if self.cache is not None:
                    self.cache.write(image.key, row)
        for image in loaded:
            image.row = image.row or fresh[image.key].row

    def _encode(self, images: list[LoadedImage]) -> list[Row]:
        rows: list[Row] = [{} for _ in images]

        def padded(tensors: list[Tensor | None]) -> Tensor:
            present = torch.stack([x for x in tensors if x is not None])
            return F.pad(present, [0] * 7 + [ENCODE_BATCH - len(present)]).to(self.model.device)

        if self.noise:
            for name, values in zip(MOMENTS, self.model.posterior(padded([i.pixels for i in images])), strict=True):
                for row, value in zip(rows, values.cpu(), strict=False):
                    row[name] = value.clone(memory_format=torch.contiguous_format)  # a fused VAE's is channels-last
        if self.labeller is not None:
            clip = self.labeller.model
            x = normalise(padded([i.original for i in images]) / 2 + 0.5)
            for row, value in zip(
                rows, clip.get_image_features(x.to(clip.visual_projection.weight.dtype)).cpu(), strict=False
            ):
                row["pickscore"] = value.float().clone()
        return rows

    def _relabel(self, prompts: list[str], loaded: list[LoadedImage]) -> Tensor:  # (B,)
        """PickScore's own preference; a tie where its probabilities differ by no more than the gap."""
        assert self.labeller is not None
        text = self.labeller.encode(prompts)
        image = torch.stack([i.row["pickscore"] for i in loaded if i.row]).to(text.device)
        image = (image / image.norm(dim=-1, keepdim=True)).unflatten(0, (2, len(prompts)))
        p = (self.labeller.model.logit_scale.exp() * (image * text).sum(-1)).softmax(0)
        difference = p[0] - p[1]
        return 0.5 + 0.5 * (difference > self.gap).float() - 0.5 * (difference < -self.gap).float()


MOMENTS = ("mean", "std")  # of the VAE's posterior

# ---------------------------------------------------------------------------------------------------- rows


class SplitPairs:
    """The rows of a run's pairs: those to train on, and those held out. Reads bad_rows.jsonl of a resumed run."""

    def __init__(self, cfg: PairSourceConfig, run_dir: Path, seed: int, resumed: bool, caption_column: str | None):
        assert cfg.pairs is not None
        if not resumed:
            files.set_aside(run_dir / "bad_rows.jsonl")
        self.bad = BadRows(run_dir / "bad_rows.jsonl", cfg.max_bad_share)
        self.source = open_pairs(cfg.pairs, self.bad, caption_column=caption_column, revision=cfg.pairs_revision)
        self.valid_source = self.source
        if cfg.validation_pairs is None:
            self.train_rows, valid_rows = split_by_prompt(self.source, cfg.validation_share, seed)
        else:
            where = cfg.validation_pairs
            self.valid_source = open_pairs(where, self.bad, caption_column=caption_column, split="validation")
            self.train_rows, valid_rows = np.arange(len(self.source)), np.flatnonzero(self.valid_source.labelled)
        chosen = np.random.Generator(np.random.Philox(seed)).permutation(valid_rows)
        self.valid_rows = np.sort(chosen[: cfg.max_validation_pairs])  # in the file's order, to read it once

    def finish(self) -> None:
        """The limit on bad rows holds of all rows, as the index has looked at all. Says how many there were."""
        seen = {id(source): source.seen for source in (self.source, self.valid_source)}
        self.bad.check(sum(seen.values()), final=True)
        if len(self.bad):
            print(f"{len(self.bad)} rows were unusable: {self.bad.path}")


def caches_latents(cfg: PairSourceConfig, pairs_read: int, rows: int) -> bool:
    """What is read once only is not worth its place on the disk."""
    return pairs_read > rows if cfg.cache_latents is None else cfg.cache_latents


class PairReader:
    """Batches of labelled pairs for a method that learns from them. Ties teach such a method nothing: left out."""

    def __init__(self, model: DiffusionModel, cfg: Config, run_dir: Path, resumed: bool):
        self.model, self.cfg, self.seed = model, cfg, cfg.run.seed
        self.split = SplitPairs(cfg.pairs, run_dir, cfg.run.seed, resumed, cfg.data.caption_column)
        model.prompt_cache.keep_encoder = True  # new prompts come all the time
        self.train_rows = self.split.train_rows[~self.split.source.tied[self.split.train_rows]]
        self.valid_rows = self.split.valid_rows[~self.split.valid_source.tied[self.split.valid_rows]]
        if not len(self.train_rows):
            raise ValueError(f"{cfg.pairs.pairs}: every pair is a tie. Give pairs with a preferred image.")
        self.batch_size = cfg.sample.sample_batch_size
        self.iterations_per_epoch = max(1, len(self.train_rows) // self.batch_size)
        pairs_read = cfg.run.iterations(self.iterations_per_epoch) * self.batch_size
        cached = caches_latents(cfg.pairs, pairs_read, len(self.train_rows))
        self.images = ImageLoader(model, cfg.pairs, run_dir, cached)
        self._stream: PairStream[list[LoadedImage]] | None = None

    def _open(
        self, source: PairSource, rows: npt.NDArray[np.int64], batch_size: int, position: int, epochs: int | None
    ) -> PairStream[list[LoadedImage]]:
        """To train on again and again, or for so many epochs as they lie."""
        return PairStream(
            *(source, rows, batch_size, self.images.load, self.split.bad),
            seed=self.seed,
            position=position,
            epochs=epochs,
            shuffle=epochs is None and self.cfg.data.shuffle,
            workers=self.cfg.pairs.num_workers,
        )

    def batch(self, iteration: int, position: int) -> tuple[PairInputs, int]:
        """The pairs of an iteration, and the position after them; position: rows read by the iterations before."""
        part = next(n for n in range(min(READ_BATCH, self.batch_size), 0, -1) if self.batch_size % n == 0)
        if self._stream is None:
            self._stream = self._open(self.split.source, self.train_rows, part, position, None)
        parts = itertools.islice(self._stream, self.batch_size // part)
        return self._inputs(parts, iteration, self.cfg.objective.prompt_dropout)

    def held_out(self) -> PairInputs | None:
        """The held-out pairs, at the same noise each time."""
        if not len(self.valid_rows):
            return None
        with self._open(self.split.valid_source, self.valid_rows, READ_BATCH, 0, 1) as stream:
            return self._inputs(stream, EVALUATION, 0.0)[0]

    def _inputs(
        self, parts: Iterable[PairBatch[list[LoadedImage]]], iteration: int, dropout: float
    ) -> tuple[PairInputs, int]:
        """The pairs of the parts, and the position after them; the pixels of one part at a time are in memory."""
        latents, prompts, first, position = [], [], 0, 0
        device = self.model.device
        for batch in parts:
            number = torch.arange(first, first + len(batch.prompts), device=device)
            first, position = first + len(batch.prompts), batch.position
            x = self.images.images(batch, KeyedDraws(self.seed, iteration, number)).latents
            assert x is not None
            preferred = (batch.labels < 0.5).long().to(device)  # the second image
            order = torch.stack([preferred, 1 - preferred])
            latents.append(x[order, torch.arange(len(number), device=device)])
            prompts += batch.prompts
            del batch  # and its pixels, before the next part is read
        draws = KeyedDraws(self.seed, iteration, torch.arange(first, device=device))
        if dropout > 0:
            dropped = (draws.integer(EMPTY, 2**30) < dropout * 2**30).tolist()
            prompts = ["" if drop else prompt for prompt, drop in zip(prompts, dropped, strict=True)]
        return PairInputs(self.model.cond(prompts), torch.cat(latents, 1), draws), position

    def close(self) -> None:
        """Stop reading; `batch` begins again at the position it is given."""
        if self._stream is not None:
            self._stream.close()
            self._stream = None


# ---------------------------------------------------------------------------------------------------- a run


def repeated(rows: int, batch: int, of: str) -> str:
    """A line if a batch reads pairs more than once; of: whose batch it is."""
    return "" if batch <= rows else f"warning: {of} reads {batch:,} pairs, of which there are {rows:,}: they repeat.\n"
