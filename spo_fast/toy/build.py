"""`python -m spo_fast.toy.build`: makes the toy's shipped weights from nothing: base model, preference pairs, SPM.

Seeded and resumable: the same command goes on where it was stopped. Pretraining is that of any latent diffusion model:
v-prediction on captioned pictures at uniform timesteps, a tenth of the captions dropped for guidance, an average of the
weights kept. The preference model is trained by `python -m spo_fast.train_spm` on pairs of the same world.
`--size large` makes one for a GPU: 64x64 pictures behind a VAE that is trained first (toy.LARGE).
`--size flow` makes the same world's flow model (toy.FLOW), and an SPM that starts from the small one's PickScore.
"""

from __future__ import annotations

import argparse
import io
import json
import math
import os
import shutil
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from transformers import CLIPTokenizerFast  # type: ignore[attr-defined]  # an alias in transformers 5

from spo_fast import train, train_spm
from spo_fast.data import toy_world
from spo_fast.data.files import versions, write_atomically
from spo_fast.data.pair_sources import need_pyarrow
from spo_fast.evaluation.statistics import Estimate, estimate
from spo_fast.models.files.toy import FLOW_WEIGHTS, MAX_LENGTH, SCALING, SIZES, WEIGHTS, Size, save_pipeline, toy_parts
from spo_fast.scorers.clip import Clip, ClipConfig, TowerConfig
from spo_fast.scorers.clip_files import load_any_clip, save_clip
from spo_fast.toy import evaluate
from spo_fast.training.monitor.progress import ProgressLine

if TYPE_CHECKING:
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

BATCH = 64
STEPS = 7_850  # 502,400 pictures
LEARNING_RATE = 2e-3
WARM_UP = 100
DROP_CAPTION = 0.1
EMA_DECAY = 0.999
SAVE_EVERY = 250
PAIRS, PAIRS_SEED = 49_152, 1000
PICTURES = 512  # to score the base model by
SHIPPED = {"small": WEIGHTS, "flow": FLOW_WEIGHTS}

SMALL = SIZES["small"]


def device_of(size: Size) -> str:
    """The shipped toys are made on a CPU, always by the same numbers."""
    return "cuda" if size.name not in SHIPPED and torch.cuda.is_available() else "cpu"


def precision(size: Size) -> list[str]:
    """Flags of what runs on the large toy's GPU."""
    return ["--mixed_precision", "bf16"] if device_of(size) == "cuda" else []


def train_vae(directory: Path, seed: int, size: Size, deadline: float = math.inf) -> AutoencoderKL | None:
    """The large toy's VAE from pictures, or as it lies there; None if time (monotonic seconds) ran out.

    Squared error, a trace of KL so that the posterior is no point; scaled so that latents have a deviation of 1.
    """
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

    from spo_fast.models.files.toy import deviation

    if (directory / "config.json").is_file():
        return AutoencoderKL.from_pretrained(directory, local_files_only=True)
    device = device_of(size)
    vae = toy_parts(seed, size)["vae"].to(device).train()
    optimizer = torch.optim.AdamW(vae.parameters(), lr=1e-3, betas=(0.9, 0.99))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, size.vae_steps)
    with ProgressLine(size.vae_steps) as progress:
        for step in range(size.vae_steps):
            if time.monotonic() > deadline:
                return None
            generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
            captions = toy_world.random_captions(list(toy_world.CAPTIONS), BATCH, generator)
            x = toy_world.enlarged(toy_world.draw(captions, generator), size.scale).to(device)
            posterior = vae.encode(x).latent_dist
            error = F.mse_loss(vae.decode(posterior.sample(generator)).sample, x)
            (error + 1e-6 * posterior.kl().mean()).backward()
            nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            schedule.step()
            if step % 50 == 0 or step + 1 == size.vae_steps:
                progress.update({"iteration": step, "loss": float(error.detach())})
        with torch.no_grad():
            latents = vae.eval().encode(x).latent_dist.mean
    vae.register_to_config(scaling_factor=1 / deviation(latents))
    draft = directory.with_name(f".{directory.name}")
    vae.cpu().save_pretrained(draft)
    os.replace(draft, directory)
    return vae


class Pretraining:
    """The base model being trained, its average, and its optimizer. The large one computes in bf16 on a GPU.

    This one is a diffusion; `FlowPretraining` says what else a flow is.
    """

    def __init__(self, seed: int, steps: int, size: Size = SMALL, vae: AutoencoderKL | None = None):
        self.seed, self.steps, self.step, self.cpu_s = seed, steps, 0, 0.0
        self.size, self.device, self.batch = size, device_of(size), size.batch or BATCH
        self.parts = toy_parts(seed, size) | ({} if vae is None else {"vae": vae})
        self.trained = (size.network, "text_encoder", "text_encoder_2")
        self.modules = nn.ModuleDict({name: self.parts[name] for name in self.trained}).train().to(self.device)
        self.parts["vae"].to(self.device)
        self.parameters = list(self.modules.parameters())
        self.average = [p.detach().clone() for p in self.parameters]
        rate = size.learning_rate or LEARNING_RATE
        self.optimizer = torch.optim.AdamW(self.parameters, lr=rate, betas=(0.9, 0.99), weight_decay=1e-2, fused=True)
        linear = torch.optim.lr_scheduler.LinearLR(self.optimizer, 1e-2, total_iters=WARM_UP)
        schedules = [linear, self.annealing(steps - WARM_UP)]
        self.schedule = torch.optim.lr_scheduler.SequentialLR(self.optimizer, schedules, [WARM_UP])

    def annealing(self, steps: int) -> torch.optim.lr_scheduler.LRScheduler:
        """The learning rate after the warm-up: half a cosine."""
        return torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, steps)

    def encode(self, captions: list[str]) -> tuple[Tensor, list[Tensor]]:  # (B, L, 2 WIDTH), (B, WIDTH) each
        """As the pipelines do: the layer before the last of both encoders side by side; the pooled output of each.

        SDXL's first encoder pools nothing: its last layer stands there, and is not read.
        """
        outputs = []
        for tokenizer, encoder in (("tokenizer", "text_encoder"), ("tokenizer_2", "text_encoder_2")):
            length = self.parts[tokenizer].model_max_length
            ids = self.parts[tokenizer](captions, padding="max_length", max_length=length, truncation=True).input_ids
            outputs.append(self.parts[encoder](torch.tensor(ids, device=self.device), output_hidden_states=True))
        return torch.cat([o.hidden_states[-2] for o in outputs], dim=-1), [o[0] for o in outputs]

    @torch.no_grad()
    def latents(self, pixels: Tensor) -> Tensor:  # (B, 3, 16, 16) as drawn -> (B, C, h, w)
        """What the network is trained on."""
        if not self.size.vae_channels:
            return pixels * SCALING
        vae = self.parts["vae"]
        encoded = vae.encode(toy_world.enlarged(pixels, self.size.scale).to(self.device)).latent_dist.mean
        return encoded * vae.config.scaling_factor

    def times(self, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:  # (B,) each
        """Uniform timesteps as the network is told them, signal sqrt(alphabar) and noise sqrt(1 - alphabar)."""
        alphas = self.parts["scheduler"].alphas_cumprod
        t = torch.randint(len(alphas), (self.batch,), generator=generator)
        return t, alphas[t].sqrt(), (1 - alphas[t]).sqrt()

    def target(self, x0: Tensor, noise: Tensor, signal: Tensor, sigma: Tensor) -> Tensor:  # (B, C, h, w)
        """v = sqrt(alphabar) noise - sqrt(1 - alphabar) x0 (arXiv 2202.00512)."""
        return signal * noise - sigma * x0

    def condition(self, captions: list[str], keep: Tensor) -> dict[str, Any]:  # keep: (B,) bool
        """What the UNet is told beside t: a dropped caption is zeros, as SDXL's unconditional embeddings are."""
        embeds, pooled = self.encode(captions)
        kept, side = keep.to(embeds), self.size.pixels
        sizes = torch.tensor([[side, side, 0, 0, side, side]], device=self.device).expand(len(captions), -1).float()
        added = {"text_embeds": pooled[1] * kept[:, None], "time_ids": sizes}
        return {"encoder_hidden_states": embeds * kept[:, None, None], "added_cond_kwargs": added}

    def loss(self, generator: torch.Generator) -> Tensor:
        """Mean squared error of the prediction on noised pictures, a tenth of the captions dropped."""
        captions = toy_world.random_captions(list(toy_world.CAPTIONS), self.batch, generator)
        x0 = self.latents(toy_world.draw(captions, generator))
        t, *levels = (level.to(self.device) for level in self.times(generator))
        signal, sigma = (level.view(-1, 1, 1, 1) for level in levels)
        noise = torch.randn(x0.shape, generator=generator).to(self.device)
        keep = torch.rand(self.batch, generator=generator) >= DROP_CAPTION
        told = self.condition(captions, keep)
        with torch.autocast("cuda", torch.bfloat16, enabled=self.device == "cuda"):
            out = self.parts[self.size.network](signal * x0 + sigma * noise, timestep=t, **told).sample
        return (out.float() - self.target(x0, noise, signal, sigma)).square().mean()

    def advance(self) -> float:
        """One optimizer step on pictures that depend on (seed, step) alone; returns the loss."""
        loss = self.loss(torch.Generator().manual_seed(self.seed * 1_000_003 + self.step))
        loss.backward()
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.schedule.step()
        self.step += 1
        decay = min(EMA_DECAY, self.step / (self.step + 10))
        torch._foreach_lerp_(self.average, [p.detach() for p in self.parameters], 1 - decay)
        return float(loss.detach())

    def save(self, path: Path) -> None:
        """All that a later `load` goes on from."""
        state = {
            "settings": [self.seed, self.steps],
            "step": self.step,
            "cpu_s": self.cpu_s,
            "modules": self.modules.state_dict(),
            "average": self.average,
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
        }
        temporary = path.with_suffix(".tmp")
        torch.save(state, temporary)
        os.replace(temporary, path)

    def load(self, path: Path) -> None:
        """Go on from here. Raises ValueError for a file of other settings."""
        state = torch.load(path, weights_only=True)
        if state["settings"] != [self.seed, self.steps]:
            raise ValueError(f"{path} belongs to seed, steps = {state['settings']}. Choose another --work_dir.")
        self.step, self.cpu_s = state["step"], state["cpu_s"]
        self.modules.load_state_dict(state["modules"])
        self.average = state["average"]
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])

    @torch.no_grad()
    def averaged_parts(self) -> dict[str, object]:
        """The pipeline with the averaged weights in 16 bits, as it is shipped. Ends the training: weights are gone."""
        for p, average in zip(self.parameters, self.average, strict=True):
            p.copy_(average)
        for name in (*self.trained, "vae"):
            self.parts[name].cpu().half().eval()
        return self.parts


class FlowPretraining(Pretraining):
    """A flow model's: x_t = (1 - sigma) x0 + sigma noise, as Stable Diffusion 3 has it (arXiv 2403.03206)."""

    def annealing(self, steps: int) -> torch.optim.lr_scheduler.LRScheduler:
        """Constant, then down to nothing in the last quarter: what lies before it is the same for every `steps`."""
        down = steps / 4
        return torch.optim.lr_scheduler.LambdaLR(self.optimizer, lambda step: min(1.0, (steps - step) / down))

    def times(self, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:  # (B,) each
        """Sigmas as dense as sampling has them: 1000 sigma is told, signal 1 - sigma, noise sigma."""
        sigma, shift = torch.rand(self.batch, generator=generator), self.size.shift
        sigma = shift * sigma / (1 + (shift - 1) * sigma)
        return 1000 * sigma, 1 - sigma, sigma

    def target(self, x0: Tensor, noise: Tensor, signal: Tensor, sigma: Tensor) -> Tensor:  # (B, C, h, w)
        """The velocity dx/dsigma = noise - x0."""
        return noise - x0

    def condition(self, captions: list[str], keep: Tensor) -> dict[str, Any]:  # keep: (B,) bool
        """What the transformer is told beside t: a dropped caption is the empty one; no tokens stand for T5's."""
        texts = [caption if kept else "" for caption, kept in zip(captions, keep.tolist(), strict=True)]
        embeds, pooled = self.encode(texts)
        return {"encoder_hidden_states": embeds, "pooled_projections": torch.cat(pooled, dim=-1)}


def pretrain(work_dir: Path, seed: int, steps: int, size: Size = SMALL, deadline: float = math.inf) -> Path | None:
    """Train the base model, or go on; returns the pipeline's directory, None if time (monotonic seconds) ran out."""
    directory = work_dir / "pipeline"
    if (directory / "model_index.json").is_file():
        return directory
    state, vae = work_dir / "pretraining.pt", None
    if size.vae_channels:
        vae = train_vae(work_dir / "vae", seed, size, deadline)
        if vae is None:
            return None
    run = (FlowPretraining if size.blocks else Pretraining)(seed, steps, size, vae)
    if state.is_file():
        run.load(state)
        print(f"going on at step {run.step}")
    before_s, started_s = run.cpu_s, time.process_time()
    average_loss = None
    with ProgressLine(steps) as progress:
        while run.step < steps:
            loss = run.advance()
            average_loss = loss if average_loss is None else 0.99 * average_loss + 0.01 * loss
            progress.update({"iteration": run.step - 1, "loss": average_loss})
            late = time.monotonic() > deadline
            if run.step % SAVE_EVERY == 0 or run.step == steps or late:
                run.cpu_s = before_s + time.process_time() - started_s
                run.save(state)
            if late and run.step < steps:
                return None
    record = {
        "seed": seed,
        "steps": steps,
        "pictures": steps * run.batch,
        "final_loss": average_loss,
        "cpu_minutes": round(run.cpu_s / 60, 1),
        "versions": versions(),
        "size": size.name,
    }
    draft = work_dir / ".pipeline"
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(parents=True)
    save_pipeline(draft, run.averaged_parts(), size.pipeline)
    write_atomically(draft / "build.json", json.dumps({"pretraining": record}, indent=1) + "\n")
    os.replace(draft, directory)
    return directory


def write_pairs(
    path: Path,
    count: int,
    seed: int,
    prompts: list[str] = toy_world.TRAIN,
    scale: int = 1,
    labelled: Callable[[int, torch.Generator, list[str]], toy_world.LabelledPairs] = toy_world.draw_pairs,
) -> None:
    """Labelled pairs of the prompts as Pick-a-Pic's parquet has them: PNG bytes, labels, pairs per prompt."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    pairs = labelled(count, torch.Generator().manual_seed(seed), prompts)
    repeats = Counter(pairs.prompts)
    columns: dict[str, object] = {
        "caption": pairs.prompts,
        **{f"jpg_{j}": [png(toy_world.enlarged(x, scale)) for x in pairs.pixels[j]] for j in range(2)},
        "label_0": pairs.labels.tolist(),
        "label_1": (1 - pairs.labels).tolist(),
        "has_label": [True] * count,
        "num_example_per_prompt": [repeats[prompt] for prompt in pairs.prompts],
    }
    temporary = path.with_suffix(".tmp")
    pq.write_table(pa.table(columns), temporary, row_group_size=1024)
    os.replace(temporary, path)


def png(pixels: Tensor) -> bytes:  # (3, H, W) in [-1, 1]
    """A picture as a file's bytes."""
    file = io.BytesIO()
    values = ((pixels / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8)
    Image.fromarray(values.permute(1, 2, 0).contiguous().numpy()).save(file, "PNG")
    return file.getvalue()


def new_clip(seed: int, vocab_size: int, size: Size = SMALL) -> Clip:
    """An untrained CLIP: 16 patches of 4x4 world pixels. The small one, for 16x16 pictures, has 0.2 M parameters."""
    text, vision = (
        TowerConfig(width=width, mlp_width=2 * width, num_layers=layers, num_heads=4, activation="gelu")
        for width, layers in zip(size.clip_widths, size.clip_layers, strict=True)
    )
    config = ClipConfig(
        text=text,
        vision=vision,
        vocab_size=vocab_size,
        max_length=MAX_LENGTH,
        image_size=size.pixels,
        patch_size=4 * size.scale,
        projection_dim=32,
        time_conditioned=False,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        clip = Clip(config)
        for table in (m for m in clip.modules() if isinstance(m, nn.Embedding)):
            nn.init.normal_(table.weight, std=0.1)
        nn.init.normal_(clip.vision_model.embeddings.class_embedding, std=0.1)
        nn.init.constant_(clip.logit_scale, math.log(10))
    return clip


def train_preference_model(work_dir: Path, name: str, *flags: str, model: str = "toy") -> Path:
    """`python -m spo_fast.train_spm` on the world's pairs; returns what it saved. Resumes if it must."""
    run_dir = work_dir / name
    if not (run_dir / "evaluation.json").is_file():
        status = train_spm.main(
            [
                *("--model", model, "--pretrained_model_name_or_path", str(work_dir / "pipeline")),
                *("--pairs", str(work_dir / "pairs.parquet"), "--output_dir", str(run_dir)),
                *("--resume_from_checkpoint", "latest", *flags),
            ]
        )
        if status:
            raise RuntimeError(f"the training of {name} ended with status {status}")
    return run_dir / "preference_model"


def agreement(pairs: toy_world.LabelledPairs) -> dict[str, float]:
    """How often labels side with the picture of the higher score, where the two differ."""
    first = pairs.labels.bool()
    found = {}
    for name, score in (("layout", toy_world.layout), ("aesthetics", lambda x, _: toy_world.aesthetics(x)[:, None])):
        a, b = (score(x, pairs.prompts).float().mean(1) for x in pairs.pixels)
        found[name] = round(float(((a > b) == first)[a != b].float().mean()), 4)
        found[f"{name}_differs"] = round(float((a != b).float().mean()), 4)
    return found


def base_scores(work_dir: Path, size: Size = SMALL) -> dict[str, dict[str, Estimate]]:
    """True scores of PICTURES of test prompts at each guidance scale: (mean, standard error, pictures)."""
    prompts = evaluate.prompts_to_test(PICTURES)

    def scores_of(pictures: Callable[[float], Tensor]) -> dict[str, dict[str, Estimate]]:
        found = {}
        for g in evaluate.GUIDANCE_SCALES:
            scores = evaluate.true_scores(pictures(g), prompts)
            found[f"guidance {g:g}"] = {name: estimate(values) for name, values in scores.items()}
        return found

    if size.blocks:
        return scores_of(lambda g: evaluate.flow_pictures(work_dir / "pipeline", prompts, g, seed=0))
    spm = work_dir / "spm" / "preference_model" / "model.safetensors"
    paths = ("--pretrained_model_name_or_path", str(work_dir / "pipeline"), "--spm_path", str(spm))
    out = ("--output_dir", str(work_dir / "base"), *precision(size))
    run = train.build(train.parse(["--model", "toy", *paths, *out]))
    with run.policy.reference():
        return scores_of(lambda g: evaluate.pictures(run, prompts, g, seed=0))


def assemble(work_dir: Path, output_dir: Path, size: Size = SMALL) -> None:
    """The pipeline, preference models of its own in 16 bits, and the record, put in the place of what was there."""
    draft = work_dir / ".weights"
    shutil.rmtree(draft, ignore_errors=True)
    shutil.copytree(work_dir / "pipeline", draft)
    record = json.loads((draft / "build.json").read_text())
    for name in ("spm",) if size.blocks else ("pickscore", "spm"):
        clip = load_any_clip(work_dir / name / "preference_model")
        save_clip(clip, draft / name, {key: value.half() for key, value in clip.state_dict().items()})
        record[name] = json.loads((work_dir / name / "evaluation.json").read_text())
    if not size.blocks:
        record["labels"] = agreement(toy_world.draw_pairs(8192, torch.Generator().manual_seed(PAIRS_SEED + 1)))
    record["base"] = base_scores(work_dir, size)
    (draft / "build.json").write_text(json.dumps(record, indent=1) + "\n")
    for path in draft.rglob("*"):
        path.chmod(0o755 if path.is_dir() else 0o644)
    old = output_dir.with_name(f".{output_dir.name}-old")
    shutil.rmtree(old, ignore_errors=True)
    output_dir.parent.mkdir(parents=True, exist_ok=True)
    if output_dir.exists():
        os.replace(output_dir, old)
    shutil.move(draft, output_dir)
    shutil.rmtree(old, ignore_errors=True)


def build(
    work_dir: Path, output_dir: Path, size: Size, seed: int, steps: int, pairs: int, deadline: float = math.inf
) -> bool:
    """All of it, or what is missing; False if time (monotonic seconds) ran out between two parts or in pretraining."""
    need_pyarrow("the labelled pairs")  # asked before the hours of pretraining that they come after
    work_dir.mkdir(parents=True, exist_ok=True)
    pipeline = pretrain(work_dir, seed, steps, size, deadline)
    if pipeline is None:
        return False
    if not train_judges(work_dir, pipeline, size, seed, pairs, deadline):
        return False
    assemble(work_dir, output_dir, size)
    print(f"the toy's weights: {output_dir}")
    return True


def train_judges(work_dir: Path, pipeline: Path, size: Size, seed: int, pairs: int, deadline: float) -> bool:
    """PickScore (a flow has the small one's) and the SPM on labelled pairs; False if time (monotonic seconds) ran out
    before one of them."""
    if not (work_dir / "pairs.parquet").is_file():
        write_pairs(work_dir / "pairs.parquet", pairs, PAIRS_SEED + seed, scale=size.scale)
    common = ("--seed", str(seed), *precision(size))
    if time.monotonic() > deadline:
        return False
    if size.blocks:
        train_preference_model(work_dir, "spm", *common, model="toy-flow")
        return True
    tokenizer = CLIPTokenizerFast.from_pretrained(str(pipeline / "tokenizer"))
    untrained = save_clip(new_clip(seed, len(tokenizer), size), work_dir / "untrained")
    # its PickScore: a plain CLIP on clean images; in_batch_negatives, as CLIP learns what words mean
    clean = ("--noise", "none", "--no-time_conditioned", "--in_batch_negatives")
    longer = ("--num_train_epochs", "4", "--learning_rate", "1e-3", "--init_path", str(untrained))
    pickscore = train_preference_model(work_dir, "pickscore", *clean, *longer, *common)
    if time.monotonic() > deadline:
        return False
    train_preference_model(work_dir, "spm", "--init_path", str(pickscore), *common)
    return True


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns its exit status."""
    parser = argparse.ArgumentParser(prog="python -m spo_fast.toy.build", description=(__doc__ or "").split("\n")[0])
    sizes = "large: 64x64 pictures, for a GPU; flow: Stable Diffusion 3's kind of model"
    parser.add_argument("--size", choices=tuple(SIZES), default="small", help=sizes)
    parser.add_argument("--work_dir", help="where the build is kept until it is done (default runs/toy-build[-SIZE])")
    parser.add_argument("--output_dir", help="where the finished weights go (default the package, or runs/toy-large)")
    parser.add_argument("--seed", type=int, default=0)
    defaults = ", ".join(f"{name} {size.steps}" for name, size in SIZES.items() if size.steps)
    parser.add_argument("--steps", type=int, help=f"of pretraining (default {STEPS}, {defaults})")
    parser.add_argument("--pairs", type=int, default=PAIRS, help=f"labelled pairs (default {PAIRS})")
    args = parser.parse_args(arguments)
    size = SIZES[args.size]
    work_dir = Path(args.work_dir or ("runs/toy-build" if size == SMALL else f"runs/toy-build-{size.name}"))
    output_dir = Path(args.output_dir or SHIPPED.get(size.name, f"runs/toy-{size.name}"))
    build(work_dir, output_dir, size, args.seed, args.steps or size.steps or STEPS, args.pairs)
    return 0


if __name__ == "__main__":
    sys.exit(main())
