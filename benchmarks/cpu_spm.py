"""A step of the preference model's training on a CPU, and reading its pairs: the published way beside ours.

    python -m benchmarks.cpu_spm --turns 5 --out FILE

Steps: each contender is a process with its own networks; their steps take turns, one thread each (cpu_iteration.py).
Every step has fresh pairs: pixels are encoded, prompts too, nothing comes from a cache. Before, each shows its errors
on one batch against float64 (iteration.py's gate; 16 bits are judged by the published trainer's fp16).
Pairs: JPEGs of Pick-a-Pic's sizes from bytes to what the networks take, by Pillow's own path and by ours, in turn.
"""

from __future__ import annotations

import argparse
import functools
import io
import multiprocessing
import statistics
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from benchmarks import iteration, networks
from benchmarks.cpu_iteration import Phases, Worker, ratios, spread
from benchmarks.records import Records, read, table
from benchmarks.shapes import latent_shape
from spo_fast.config.presets import PREFERENCE_PRESETS
from spo_fast.data.images import decode_image, to_square
from spo_fast.method.experience import Cond
from spo_fast.method.schedule import full_table
from spo_fast.models.diffusion import DTYPES, decode, decode_in_cache, embeddings
from spo_fast.models.fuse import fuse
from spo_fast.training.pair_batches import ENCODE_BATCH, Images
from spo_fast.training.preference_learner import RewardLearner
from spo_fast.training.preference_model import PixelReward, pair_loss

KIND = "sd15"
PAIRS = {"mid": 4, "tiny": 2}
GUIDANCE = 5.0


@dataclass(frozen=True, kw_only=True)
class Contender:
    """How a step is computed."""

    published: bool = False
    frozen: str  # type of the UNet, the VAE and the text encoder
    reward: str = "no"  # of the preference model
    fused: bool = False


CONTENDERS = {
    "published": Contender(published=True, frozen="no"),
    "published bf16": Contender(published=True, frozen="bf16"),
    "published fp16": Contender(published=True, frozen="fp16"),  # as it was run, on GPUs
    "plain": Contender(frozen="no"),
    "float32": Contender(frozen="no", fused=True),
    "bf16": Contender(frozen="bf16", fused=True),
    "bf16 reward": Contender(frozen="bf16", reward="bf16", fused=True),
}
"""The published trainer as it runs on a CPU, and its frozen networks in 16 bits; ours without what is chosen for a wide
network on a CPU, and with it in both types; the last with --reward_dtype bf16, which nothing chooses."""
TIMED = [name for name in CONTENDERS if name != "published fp16"]


@dataclass(frozen=True)
class Batch:
    """B pairs and all that is drawn for them, float32."""

    pixels: Tensor  # (2, B, 3, H, W) in [-1, 1]
    posterior: Tensor  # (2, B, C, h, w) noise of the VAE's
    noise: Tensor  # (B, C, h, w), both images'
    t: Tensor  # (B,) int64
    ids: Tensor  # (B, L)


def batch_of(size: str, seed: int) -> Batch:
    g, B, latent = torch.Generator().manual_seed(seed), PAIRS[size], latent_shape(KIND, size)
    side = 8 * latent[-1]
    coarse = torch.randn(2 * B, 3, 8, 8, generator=g)
    pixels = F.interpolate(coarse, size=(side, side), mode="bicubic").clamp(-1, 1).unflatten(0, (2, B))
    posterior, noise = torch.randn(2, B, *latent, generator=g), torch.randn(B, *latent, generator=g)
    ids = networks.token_ids(B, "cpu", size).roll(seed, 0)
    return Batch(pixels, posterior, noise, torch.randint(0, 1000, (B,), generator=g), ids)


# ---------------------------------------------------------------------------------------------------- the steps


class Step(ABC):
    """What both have: networks with the same random weights, and the optimizer's settings."""

    def __init__(self, size: str, how: Contender, phase: Phases):
        where, self.dtype, self.phase = (KIND, size, "cpu"), DTYPES[how.frozen], phase
        self.unet, self.vae = networks.make_unet(*where, self.dtype), networks.make_vae(*where, self.dtype)
        self.encoders = networks.make_text_encoders(*where, self.dtype)
        clip = networks.make_spm(size, "cpu", torch.float32).model.requires_grad_(True)
        self.clip = clip.set_compute_dtype(DTYPES["fp64" if how.frozen == "fp64" else how.reward])
        self.scheduler = networks.ddim_scheduler(KIND, 20)
        self.alphas = self.scheduler.alphas_cumprod
        self.cfg = PREFERENCE_PRESETS[KIND]()

        self.cond = networks.conditioning(KIND, size, PAIRS[size], "cpu", self.dtype)

    @torch.no_grad()
    def told(self, ids: Tensor) -> Cond:  # (B, L)
        """The prompts through the text encoder: its work is timed, but it is narrower than the UNet expects."""
        embeddings(KIND, self.encoders, [ids])
        return self.cond

    @torch.no_grad()
    def encode(self, pixels: Tensor, noise: Tensor) -> Tensor:  # (N, 3, H, W) -> (N, C, h, w) scaled latents
        found = self.vae.encode(pixels.to(self.dtype)).latent_dist
        return (found.mean + found.std * noise.to(self.dtype)) * self.vae.config.scaling_factor

    @abstractmethod
    def backward(self, batch: Batch) -> Tensor:
        """The batch's loss, its gradients added to the preference model's."""

    @abstractmethod
    def update(self) -> None:
        """The optimizer's step on them."""

    @abstractmethod
    def gradients(self) -> dict[str, Tensor]:
        """By the weights' names."""

    def evaluate(self, batch: Batch) -> iteration.Evaluation:
        loss = self.backward(batch)
        return iteration.Evaluation(torch.ones(1), loss.double(), self.gradients())


class Published(Step):
    """SPMTask.train_step and the trainer's loop at 27a8642, restated: the images of a pair one after the other through
    VAE and UNet, the text encoder for every batch, latents and the estimate of x0 in the frozen networks' type, the
    logits of all texts with all images though the diagonal is used, and three reads by the host. Attention is SDPA.
    """

    def __init__(self, size: str, how: Contender, phase: Phases):
        super().__init__(size, how, phase)
        o = self.cfg.optim
        betas = (o.adam_beta1, o.adam_beta2)
        self.optimizer = torch.optim.AdamW(
            self.clip.parameters(), o.learning_rate, betas, o.adam_epsilon, o.adam_weight_decay
        )

    @torch.no_grad()
    def predicted(self, batch: Batch) -> list[Tensor]:
        """Both images of the pairs, decoded from the estimate of x0."""
        t, B = batch.t, len(batch.t)
        cond = self.told(batch.ids)
        embeds = torch.cat([cond.uncond["prompt_embeds"].expand(B, -1, -1), cond.cond["prompt_embeds"]])
        noisy = []
        for pixels, noise in zip(batch.pixels, batch.posterior, strict=True):
            latents = self.encode(pixels, noise)
            noisy.append(self.scheduler.add_noise(latents, batch.noise.to(latents.dtype), t))
        outputs = [self.unet(torch.cat([x, x]), torch.cat([t, t]), embeds, return_dict=False)[0] for x in noisy]
        alpha = self.alphas[t].double() if self.dtype == torch.float64 else self.alphas[t]
        alpha = alpha.view(-1, 1, 1, 1)
        found = []
        for x, out in zip(noisy, outputs, strict=True):
            uncond, text = out.chunk(2)
            m = uncond + GUIDANCE * (text - uncond)
            found.append((x - (1 - alpha).sqrt().to(m.dtype) * m) / alpha.sqrt().to(m.dtype))
        return [decode(self.vae, x0) for x0 in found]

    def backward(self, batch: Batch) -> Tensor:
        clip = self.clip
        with self.phase("frozen"), torch.no_grad():
            size, wide = clip.config.image_size, clip.visual_projection.weight.dtype
            seen = []
            for image in self.predicted(batch):
                x = (image / 2 + 0.5).clamp(0, 1).to(wide)
                x = F.interpolate(x, size=(size, size), mode="bicubic", align_corners=False).clamp(0, 1)
                seen.append((x - torch.tensor(CLIP_MEAN, dtype=wide)) / torch.tensor(CLIP_STD, dtype=wide))
        with self.phase("backward"):
            text = clip.get_text_features(batch.ids)
            images = clip.get_image_features(torch.cat(seen), torch.cat([batch.t, batch.t]))
            images, text = (x / x.norm(dim=-1, keepdim=True) for x in (images, text))
            logits = (clip.logit_scale.exp() * text @ images.T).chunk(2, dim=-1)
            own = torch.arange(len(batch.t))
            pair = torch.stack([x[own, own] for x in logits], dim=-1)
            losses = F.cross_entropy(pair, torch.zeros_like(own), reduction="none")  # the first image is preferred
            loss = (losses / len(own)).sum()
            loss.item()
            loss.backward()
        return loss.detach()

    def update(self) -> None:
        with self.phase("step"):
            torch.nn.utils.clip_grad_norm_(self.clip.parameters(), 1.0)
            self.optimizer.step()
            self.optimizer.zero_grad()

    def gradients(self) -> dict[str, Tensor]:
        return {name: p.grad.clone() for name, p in self.clip.named_parameters() if p.grad is not None}


class Ours(Step):
    """PreferenceRun.iterate's own parts."""

    def __init__(self, size: str, how: Contender, phase: Phases):
        super().__init__(size, how, phase)
        if how.fused:
            fuse(self.unet)
            fuse(self.vae)
        self.ids = torch.empty(0)
        model: Any = SimpleNamespace(
            judged_table=lambda: full_table(self.alphas, "epsilon"),
            device=torch.device("cpu"),
            network=self.unet,
            decode=functools.partial(decode_in_cache, self.vae),
            cond=lambda _: self.told(self.ids),
            tokenize=lambda _: self.ids,
        )
        self.reward = PixelReward(self.clip, model, GUIDANCE, self.cfg.model.images_per_decode)
        self.learner = RewardLearner(self.reward, self.cfg.optim, total=self.cfg.run.max_train_steps or 1)

    def backward(self, batch: Batch) -> Tensor:
        B = len(batch.t)
        self.ids = batch.ids
        with self.phase("frozen"):
            flat = (x.flatten(0, 1).split(ENCODE_BATCH) for x in (batch.pixels, batch.posterior))
            parts = zip(*flat, strict=True)
            latents = torch.cat([self.encode(*part) for part in parts]).float().unflatten(0, (2, B))
            prompts = [""] * B
            images = Images(prompts, latents, None)
            seen = self.reward.see(images, batch.t, batch.noise.expand_as(latents))
        with self.phase("backward"):
            text, features, scale = self.reward.compare(seen, batch.t, prompts)
            labels = torch.ones(B)
            loss = pair_loss(text, features, scale, labels, labels / B)
            loss.backward()
        return loss.detach()

    def update(self) -> None:
        with self.phase("step"):
            self.learner.step()

    def gradients(self) -> dict[str, Tensor]:
        weights = self.reward.weights
        named = zip(weights.names, weights.masters, strict=True)
        return {name: master.grad.clone() for name, master in named if master.grad is not None}


CLIP_MEAN, CLIP_STD = (  # as transformers' processor of the laion models has them
    [[[value]] for value in values]
    for values in ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
)


def make_step(size: str, how: Contender, phase: Phases) -> Step:
    return (Published if how.published else Ours)(size, how, phase)


# ---------------------------------------------------------------------------------------------------- taking turns


def serve(name: str, size: str, truth: iteration.Evaluation, pipe: Connection) -> None:
    """A process: builds, says its errors, then makes a step for each seed it is sent."""
    torch.set_num_threads(1)
    phase = Phases()
    step = make_step(size, CONTENDERS[name], phase)
    errors = step.evaluate(batch_of(size, 0)).errors(truth)
    del errors["log_ratio_error"]  # a preference model has none
    step.update()
    phase.read()
    pipe.send(errors)
    while (seed := pipe.recv()) is not None:
        batch = batch_of(size, seed)
        start = time.process_time()
        loss = step.backward(batch)
        step.update()
        seconds = time.process_time() - start
        ms, peaks = phase.read()
        phases = {name.removesuffix("_ms"): value / 1000 for name, value in ms.items()}
        pipe.send({"cpu_s": seconds, "phases_s": phases, "peak_mib": max(peaks.values()), "loss": float(loss)})


def worker_of(name: str, size: str, truth: iteration.Evaluation) -> Worker:
    """Of this file's contenders."""
    return Worker(name, CONTENDERS[name].published, serve, size, truth)


def judged_by(how: Contender) -> str:
    """Whose errors a contender may have, times iteration.TIMES_WORSE."""
    return "published" if how.frozen == "no" else "published fp16"


def true_evaluation(size: str) -> iteration.Evaluation:
    """The published step in float64."""
    torch.set_num_threads(1)
    return make_step(size, Contender(published=True, frozen="fp64"), Phases()).evaluate(batch_of(size, 0))


def run_steps(out: Path, size: str, names: Sequence[str], turns: int) -> list[dict[str, Any]]:
    """A record a contender; the first of `names` is what ratios are taken to."""
    records = Records(out, "cpu", size=size)
    with multiprocessing.get_context("spawn").Pool(1) as pool:  # whose memory goes with it
        truth = pool.apply(true_evaluation, (size,))
    judges = {"published", *(judged_by(CONTENDERS[name]) for name in names)}
    errors = {}
    for name in judges - {*names}:
        worker = worker_of(name, size, truth)
        errors[name] = worker.quality
        worker.end()
    workers = {name: worker_of(name, size, truth) for name in names}
    errors |= {name: worker.quality for name, worker in workers.items()}
    results: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    for turn in range(turns + 1):  # the first warms up
        for name, worker in workers.items():
            result = worker.iterate(turn + 1)
            results[name] += [result] if turn else []
    written = []
    for name, mine in results.items():
        how = CONTENDERS[name]
        verdict = iteration.gate(errors[name], errors[judged_by(how)], how.frozen)
        written.append(
            records.write(
                f"spm {size}/{name}",
                dtype=how.frozen,
                reward_dtype=how.reward,
                pairs=PAIRS[size],
                cpu_s=spread([r["cpu_s"] for r in mine]),
                phases_s={p: statistics.median(r["phases_s"][p] for r in mine) for p in mine[0]["phases_s"]},
                peak_mib=max(r["peak_mib"] for r in mine),
                ratio_to=names[0],
                ratios=ratios(mine, results[names[0]]),
                losses=[r["loss"] for r in mine],
                turns=turns,
                gate=verdict,
                **errors[name],
            )
        )
    for name in judges - {*names}:
        records.write(f"spm {size}/{name}/parity", dtype=CONTENDERS[name].frozen, **errors[name])
    for worker in workers.values():
        worker.end()
    return written


# ---------------------------------------------------------------------------------------------------- reading pairs


def photograph(width: int, height: int, seed: int) -> bytes:
    """A JPEG of quality 90: smooth colours, texture down to two pixels, a little grain; bytes as a photograph's."""
    rng = np.random.default_rng(seed)
    total = np.full((height, width, 3), 128.0)
    for cells, weight in ((8, 70), (32, 40), (128, 25), (256, 10)):
        for c in range(3):
            plane = Image.fromarray(rng.normal(size=(cells, cells)).astype(np.float32))
            total[..., c] += weight * np.asarray(plane.resize((width, height), Image.Resampling.BICUBIC))
    total += 3 * rng.normal(size=(height, width, 1))
    file = io.BytesIO()
    Image.fromarray(total.clip(0, 255).astype(np.uint8)).save(file, "JPEG", quality=90)
    return file.getvalue()


def by_pillow(data: bytes, size: int) -> Tensor:  # (3, size, size) float32 in [-1, 1]
    """Decoded, resized and cropped by Pillow, scaled by PyTorch: what to_square did."""
    with Image.open(io.BytesIO(data)) as stored:
        image = stored.convert("RGB")
    short = min(image.size)
    width, height = (int(size * side / short) for side in image.size)
    if (width, height) != image.size:
        image = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = (width - size) // 2, (height - size) // 2
    pixels = np.array(image.crop((left, top, left + size, top + size)))
    return torch.from_numpy(pixels).permute(2, 0, 1).float().contiguous() / 255 * 2 - 1


def by_us(data: bytes, size: int) -> Tensor:  # the same
    return to_square(decode_image(data), size)


READERS: dict[str, Callable[[bytes, int], Tensor]] = {"pillow": by_pillow, "ours": by_us}
PICTURES = ((512, 512), (768, 768), (1024, 1024), (832, 640), (640, 832), (1024, 768))
TARGETS = {"mid": (512, 1024), "tiny": (64,)}  # SD-1.5's and SDXL's


def run_pairs(out: Path, size: str, turns: int) -> list[dict[str, Any]]:
    """A record a picture's size and target: pairs a second on one core, and how far the values lie apart."""
    torch.set_num_threads(1)
    records, written = Records(out, "cpu", size=size), []
    for target in TARGETS[size]:
        for width, height in PICTURES:
            pair = [photograph(width, height, seed) for seed in (1, 2)]
            times: dict[str, list[float]] = {name: [] for name in READERS}
            for turn in range(turns + 1):
                for name, reader in READERS.items():
                    start = time.process_time()
                    for _ in range(4):
                        pixels = [reader(data, target) for data in pair]
                    seconds = (time.process_time() - start) / 4
                    times[name] += [seconds] if turn else []
                    assert pixels[0].shape == (3, target, target)
            steps = torch.stack([(by_us(d, target) - by_pillow(d, target)).abs() * 127.5 for d in pair]).round()
            start = time.process_time()
            for data in pair:
                Image.open(io.BytesIO(data)).load()
            written.append(
                records.write(
                    f"pairs/{width}x{height} to {target}",
                    dtype="no",
                    pairs_per_second={name: 1 / statistics.median(seconds) for name, seconds in times.items()},
                    ratio=spread([a / b for a, b in zip(times["pillow"], times["ours"], strict=True)]),
                    decode_share_of_ours=(time.process_time() - start) / statistics.median(times["ours"]),
                    kib=[len(data) / 1024 for data in pair],
                    steps_of_255={"max": float(steps.max()), "mean": float(steps.mean())},
                    turns=turns,
                )
            )
    return written


# ---------------------------------------------------------------------------------------------------- all


def summary(records: Sequence[dict[str, Any]]) -> str:
    """A line a contender, and one a size of pictures."""
    rows: list[list[Any]] = [["name", "CPU s", "step", "frozen", "backward", "peak MiB", "less", "gate"]]
    for r in (r for r in records if "ratios" in r):
        cells = [
            "{min:.2f} {median:.2f} {max:.2f}".format(**r["ratios"][p]) for p in ("iteration", "frozen", "backward")
        ]
        memory = f"{r['ratios']['peak memory']['median']:.2f}"
        rows.append([r["name"], f"{r['cpu_s']['median']:.2f}", *cells, f"{r['peak_mib']:.0f}", memory, r["gate"]])
    read_rows: list[list[Any]] = [
        ["pictures", "pairs/s, Pillow", "ours", "ratio", "decoding's share", "max, mean of 255"]
    ]
    for r in (r for r in records if "pairs_per_second" in r):
        speed, steps = r["pairs_per_second"], r["steps_of_255"]
        cells = [
            f"{speed['pillow']:.1f}",
            f"{speed['ours']:.1f}",
            "{min:.2f} {median:.2f} {max:.2f}".format(**r["ratio"]),
        ]
        apart = f"{steps['max']:.0f}, {steps['mean']:.4f}"
        read_rows.append([r["name"].removeprefix("pairs/"), *cells, f"{r['decode_share_of_ours']:.2f}", apart])
    return "\n\n".join(table(part) for part in (rows, read_rows) if len(part) > 1)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=PAIRS, default="mid")
    parser.add_argument("--only", nargs="+", choices=CONTENDERS, default=TIMED, help="the first is compared with")
    parser.add_argument("--what", nargs="+", choices=("steps", "pairs"), default=("steps", "pairs"))
    parser.add_argument("--turns", type=int, default=5, help="of each, after one that warms up")
    parser.add_argument("--out", type=Path, required=True, help="records")
    args = parser.parse_args(argv)
    before = len(read(args.out))
    if "steps" in args.what:
        run_steps(args.out, args.size, args.only, args.turns)
    if "pairs" in args.what:
        run_pairs(args.out, args.size, args.turns)
    print(summary(read(args.out)[before:]))


if __name__ == "__main__":
    main()
