"""How many GPU-hours against Diffusion-DPO: the published trainings of SD-1.5 and SDXL in FLOPs and in hours.

Counted: FLOPs of the networks on meta tensors times the calls of the published loops times the published iterations,
the preference model's training among them. Published: the hours that authors, or notes about them, give. Measured:
seconds that a GPU printed (iteration.py's rows, and the steps this file times) times the published iterations: a
projection. Where no GPU has printed them, the cells say "not measured".
"""

from __future__ import annotations

import copy
import functools
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from benchmarks import iteration, networks
from benchmarks.records import RESULTS, Records, quantiles, read
from benchmarks.shapes import latent_shape, unet_config
from spo_fast import train
from spo_fast.config.preference import PreferenceConfig
from spo_fast.config.presets import PREFERENCE_PRESETS
from spo_fast.config.recipes import latent_recipe
from spo_fast.config.tables import markdown
from spo_fast.config.training import Config
from spo_fast.method.rollout import segments
from spo_fast.method.schedule import full_table
from spo_fast.models.diffusion import DTYPES, decode, embeddings
from spo_fast.scorers.latent import LatentScorer
from spo_fast.scorers.latent_network import LatentReward
from spo_fast.training.pair_batches import Images
from spo_fast.training.plan.counters import CountFlops
from spo_fast.training.preference_learner import RewardLearner
from spo_fast.training.preference_model import NoisyLatentReward, PixelReward, Reward, pair_loss

KINDS = ("sd15", "sdxl")
PROMPTS = 4000  # of SPO's and LPO's published runs
VALID_SHARES = (0.5, 1.0)  # of the comparisons that pass the threshold; the real weights' is not known
A100_TFLOPS = 312.0  # dense fp16 and bf16, by its data sheet

# ---------------------------------------------------------------------------------------------------- steps that train


class Pairs:
    """Labelled pairs at random: what a step of Diffusion-DPO or of a preference model begins with."""

    def __init__(self, kind: str, size: str, device: str, dtype: torch.dtype):
        self.kind, self.device, self.dtype = kind, device, dtype
        where = (kind, size, device, dtype)
        self.unet, self.vae = networks.make_unet(*where), networks.make_vae(*where)
        self.encoders = networks.make_text_encoders(*where)
        self.latent = latent_shape(kind, size)
        self.pixels = 2 ** (len(self.vae.config.block_out_channels) - 1) * self.latent[-1]
        self.alphas = networks.ddim_scheduler(kind, 20).alphas_cumprod.to(device)

    def ids(self, prompts: int) -> list[Tensor]:
        return [networks.token_ids(prompts, self.device)] * len(self.encoders)

    @torch.no_grad()
    def latents(self, pairs: int) -> Tensor:  # (2, B, C, h, w): both images of each pair through the VAE
        images = torch.randn(2 * pairs, 3, self.pixels, self.pixels, device=self.device, dtype=self.dtype)
        encoded = self.vae.encode(images).latent_dist.mean * self.vae.config.scaling_factor
        return encoded.unflatten(0, (2, pairs))

    @torch.no_grad()
    def told(self, prompts: int) -> dict[str, Tensor]:
        """Prompts through the text encoders, with SDXL's sizes."""
        found = embeddings(self.kind, self.encoders, self.ids(prompts))
        if self.kind == "sdxl":
            given = networks.conditioning(self.kind, "full", 1, self.device, self.dtype)
            found["time_ids"] = given.cond["time_ids"].expand(prompts, -1)
        return found

    def timesteps(self, pairs: int) -> Tensor:
        return torch.randint(0, len(self.alphas), (pairs,), device=self.device)


class DiffusionDPO:
    """A step as SalesforceAIResearch/DiffusionDPO executes it, restated: all float32 weights under 16-bit autocast, a
    copied reference, images and prompts encoded each time, SDXL's activations recomputed; SDXL by Adafactor. Two of its
    detours are left out, for it to be quick: the waits for SDXL's offloaded reference and VAE, and reading JPEGs.
    """

    beta = 5000.0

    def __init__(self, kind: str, size: str, device: str, dtype: torch.dtype):
        from transformers import Adafactor

        self.data = Pairs(kind, size, device, dtype)
        self.reference, self.dtype = self.data.unet, dtype
        self.unet = copy.deepcopy(self.reference).float().requires_grad_(True).train()
        if kind == "sdxl":
            self.unet.enable_gradient_checkpointing()
            factored = {"scale_parameter": False, "relative_step": False}
            self.optimizer: Any = Adafactor(self.unet.parameters(), lr=2.048e-5, weight_decay=0.01, **factored)
        else:
            self.optimizer = torch.optim.AdamW(self.unet.parameters(), lr=2.048e-5)
        self.scaler = torch.amp.GradScaler(device, enabled=device == "cuda" and dtype == torch.float16)

    def micro_batch(self, pairs: int) -> Tensor:
        """Forward and backward of so many pairs; the loss (Wallace et al. 2023, eq. 14, one t and noise a pair)."""
        data, both = self.data, torch.arange(pairs, device=self.data.device).repeat(2)
        clean, t = data.latents(pairs).flatten(0, 1), data.timesteps(pairs)[both]
        told = {name: rows[both] for name, rows in data.told(pairs).items()}
        noise = torch.randn_like(clean[:pairs])[both]
        alpha = data.alphas[t].to(clean.dtype).view(-1, 1, 1, 1)
        x_t = alpha.sqrt() * clean + (1 - alpha).sqrt() * noise
        embeds = told.pop("prompt_embeds")
        device_type = "cuda" if data.device == "cuda" else "cpu"
        with torch.autocast(device_type, self.dtype, enabled=self.dtype.itemsize == 2):
            inputs = (x_t.float(), t, embeds.float())
            m = self.unet(*inputs, added_cond_kwargs=told or None, return_dict=False)[0]
        with torch.no_grad():
            m_ref = self.reference(x_t, t, embeds, added_cond_kwargs=told or None, return_dict=False)[0]
        errors, errors_ref = ((out.float() - noise.float()).square().mean((1, 2, 3)) for out in (m, m_ref))
        gain_w, gain_l = (errors - errors_ref).chunk(2)
        loss = -torch.nn.functional.logsigmoid(-self.beta / 2 * (gain_w - gain_l)).mean()
        self.scaler.scale(loss).backward()
        return loss.detach()

    def step(self) -> None:
        self.scaler.step(self.optimizer)  # waits for the device once, as accelerate's does there; the trainer does not
        self.scaler.update()
        self.optimizer.zero_grad()


def make_latent_reward(kind: str, size: str, device: str, dtype: torch.dtype) -> LatentReward:
    """LPO's preference model with random weights: the UNet's down and mid blocks and the text encoders."""
    encoders = networks.make_text_encoders(kind, size, "meta", torch.float32)
    names = ("text_encoder", "text_encoder_2")
    configs = {"unet": unet_config(kind, size)}
    configs |= {name: e.config.to_dict() for name, e in zip(names, encoders, strict=False)}
    last = encoders[-1].config
    with networks.built_on(device, seed=5):
        network = LatentReward(configs, last.projection_dim if kind == "sdxl" else last.hidden_size)
    for name, p in network.named_parameters():
        p.data = p.data.to(torch.float32 if name == "logit_scale" else dtype)
    return network


class Judge:
    """A step of the preference model's training as train_spm makes it: SPO's SPM, or LPO's latent reward model."""

    def __init__(self, kind: str, size: str, device: str, dtype: torch.dtype, latent: bool):
        self.data, self.latent = Pairs(kind, size, device, dtype), latent
        self.cfg = preference_config(kind, latent)
        given = self.data
        model: Any = SimpleNamespace(
            judged_table=lambda: full_table(networks.ddim_scheduler(kind, 20).alphas_cumprod, "epsilon").to(device),
            device=torch.device(device),
            network=given.unet,
            decode=functools.partial(decode, given.vae),
            cond=lambda prompts: networks.conditioning(kind, size, len(prompts), device, dtype),
            tokenize=lambda prompts: networks.token_ids(len(prompts), device),
            token_ids=lambda prompts: given.ids(len(prompts)),
        )
        guidance_scale = self.cfg.reward.train_guidance_scale
        if latent:
            network = make_latent_reward(kind, size, device, dtype)
            self.reward: Reward = NoisyLatentReward(network, model, guidance_scale)
        else:
            clip = networks.make_spm(size, device, torch.float32).model.requires_grad_(True).set_compute_dtype(dtype)
            self.reward = PixelReward(clip, model, guidance_scale, self.cfg.model.decode_chunk or 4)
        self.learner = RewardLearner(self.reward, self.cfg.optim, total=self.cfg.run.max_train_steps or 1)

    def micro_batch(self, pairs: int) -> Tensor:
        latents, t = self.data.latents(pairs), self.data.timesteps(pairs)
        prompts = ["a prompt"] * pairs
        noise = torch.randn_like(latents[0]).expand_as(latents)
        seen = self.reward.see(Images(prompts, latents, None), t, noise)
        text, images, scale = self.reward.compare(seen, t, prompts)
        labels = torch.ones(pairs, device=text.device)
        loss = pair_loss(text, images, scale, labels, labels / pairs)
        loss.backward()
        return loss.detach()

    def step(self) -> None:
        self.learner.step()


def preference_config(kind: str, latent: bool) -> PreferenceConfig:
    cfg = PREFERENCE_PRESETS[kind]()
    return cfg.with_fields(**latent_recipe({"model": kind})) if latent else cfg


# ---------------------------------------------------------------------------------------------------- what calls cost


def fused_attention(q: Tensor, k: Tensor, v: Tensor, *_: Any, **__: Any) -> Tensor:
    """Meta tensors would take attention's plain products. A GPU's kernels compute the scores again in the backward."""
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v)[0]


def counted(function: Callable[[], Any]) -> int:
    """FLOPs (2 x MAC) of matrix products, convolutions and attention; a causal mask saves none, as PyTorch counts.

    The function is replaced, not a mode entered: autograd's threads, which recompute activations, know no mode of it.
    """
    fused = mock.patch.object(torch.nn.functional, "scaled_dot_product_attention", fused_attention)
    with CountFlops() as counter, fused:
        function()
    return counter.total


@functools.cache
def call_costs(kind: str) -> dict[str, int]:
    """FLOPs of the published loops' calls at full size, a row, an image, a prompt or a pair of it."""
    from peft import LoraConfig

    data = Pairs(kind, "full", "meta", torch.float32)
    cfg, x, t = published_config(kind, "spo"), torch.empty(1, *data.latent, device="meta"), data.timesteps(1)
    told = data.told(1)
    embeds = told.pop("prompt_embeds")

    def forward() -> Tensor:
        return data.unet(x, t, embeds, added_cond_kwargs=told or None, return_dict=False)[0]

    spm = networks.make_spm("full", "meta", torch.float32)
    size = spm.model.config.image_size
    with torch.no_grad():
        found = {
            "unet": counted(forward),
            "prompt": counted(lambda: data.told(1)),
            "decode": counted(lambda: decode(data.vae, x)),
            "score": counted(lambda: spm.model.get_image_features(torch.empty(1, 3, size, size, device="meta"), t)),
            "score text": counted(lambda: spm.encode_ids(networks.token_ids(1, "meta"))),
            **_latent_costs(kind, x, t, data),
        }
    rank = cfg.adapter.rank
    with torch.device("meta"):
        data.unet.add_adapter(LoraConfig(r=rank, lora_alpha=rank, target_modules=list(cfg.adapter.lora_targets)))
    with torch.no_grad():
        found["unet with LoRA"] = counted(forward)
    found["backward to LoRA"] = counted(lambda: forward().sum().backward()) - found["unet with LoRA"]
    for name, make in STEPS.items():
        found[name] = counted(functools.partial(make(kind, "full", "meta", torch.float32).micro_batch, 1))
    return found


def _latent_costs(kind: str, x: Tensor, t: Tensor, data: Pairs) -> dict[str, int]:
    network = make_latent_reward(kind, "full", "meta", torch.float32)
    text = network.encode(data.ids(1))
    return {
        "latent score": counted(lambda: network.score(x, t, text, text)),
        "latent score text": counted(lambda: network.encode(data.ids(1))),
    }


STEPS: dict[str, Callable[..., Any]] = {
    "dpo": DiffusionDPO,
    "spm": functools.partial(Judge, latent=False),
    "lrm": functools.partial(Judge, latent=True),
}

# ---------------------------------------------------------------------------------------------------- published recipes

Calls = Mapping[str, float]  # name in call_costs -> how many


def step_loss_calls(pairs: float, recomputed: bool) -> dict[str, float]:
    """Policy and reference on winner and loser, each with both guidance halves, also where the two share x_t."""
    forwards = 4 * pairs * (2 if recomputed else 1)
    return {"unet with LoRA": forwards, "unet": 4 * pairs, "backward to LoRA": 4 * pairs}


def spo_calls(cfg: Config, valid_share: float) -> Calls:
    """An iteration of one GPU, B prompts: a row a prompt until the first branching, then k; k images a comparison."""
    s = cfg.sample
    B, k, branched = s.sample_batch_size, s.num_candidates, s.num_steps - s.first_branch
    calls = step_loss_calls(valid_share * branched * B, recomputed=False)
    calls["unet with LoRA"] += 2 * B * (s.first_branch + 1 + k * (branched - 1))
    images = k * B * len(segments(s))
    return calls | {"decode": images, "score": images, "score text": images, "prompt": B}


def lpo_calls(cfg: Config, valid_share: float) -> Calls:
    """Children are judged as they are, so only the picked one meets the UNet; SDXL's activations are recomputed."""
    s = cfg.sample
    B, k = s.sample_batch_size, s.num_candidates
    calls = step_loss_calls(valid_share * s.num_steps * B, recomputed=cfg.model.model == "sdxl")
    calls["unet with LoRA"] += 2 * B * s.num_steps
    return calls | {"latent score": k * B * s.num_steps, "latent score text": B, "prompt": B}


def dpo_calls(cfg: Config, valid_share: float) -> Calls:
    return {"dpo": cfg.sample.sample_batch_size}


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A published training."""

    flags: tuple[str, ...]
    calls: Callable[[Config, float], Calls]
    judge: str | None = None
    """Name in STEPS of the preference model's training."""
    what: str
    """An iteration."""


RECIPES = {
    "spo": Recipe(flags=(), calls=spo_calls, judge="spm", what="rollout and training of one GPU's prompts"),
    "lpo": Recipe(
        flags=("--method", "lpo", "--lrm_path", "lrm"), calls=lpo_calls, judge="lrm", what="the same, in latents"
    ),
    "dpo": Recipe(flags=("--method", "dpo", "--pairs", "pairs"), calls=dpo_calls, what="optimizer step of 2048 pairs"),
}
TITLES = {"spo": "SPO", "lpo": "LPO", "dpo": "Diffusion-DPO"}


def published_config(kind: str, method: str) -> Config:
    return train.parse(["--model", kind, *RECIPES[method].flags])


def published_iterations(cfg: Config) -> int:
    """Of one GPU, those of all GPUs added up; a step of Diffusion-DPO counts once however many GPUs share it."""
    given = PROMPTS * cfg.run.num_train_epochs // cfg.sample.sample_batch_size
    return cfg.run.max_train_steps or given


def judge_pairs(kind: str, method: str) -> int:
    """Pairs that the preference model's published training sees."""
    if RECIPES[method].judge is None:
        return 0
    cfg = preference_config(kind, RECIPES[method].judge == "lrm")
    return (cfg.run.max_train_steps or 0) * cfg.optim.train_batch_size * cfg.optim.gradient_accumulation_steps


def judge_flops(kind: str, method: str) -> int:
    judge, costs = RECIPES[method].judge, call_costs(kind)
    if judge is None:
        return 0
    # SDXL's labels are PickScore's, the same ViT-H/14 without its timestep layers, which weigh nothing in FLOPs
    relabel = preference_config(kind, judge == "lrm").pairs.relabel == "pickscore"
    labels = 2 * costs["score"] + costs["score text"] if relabel else 0
    return judge_pairs(kind, method) * (costs[judge] + labels)


def iteration_flops(kind: str, method: str, valid_share: float) -> float:
    costs, calls = call_costs(kind), RECIPES[method].calls(published_config(kind, method), valid_share)
    return sum(number * costs[name] for name, number in calls.items())


def training_flops(kind: str, method: str, valid_share: float) -> float:
    """Of the whole published training, the preference model's among them."""
    iterations = published_iterations(published_config(kind, method))
    return iterations * iteration_flops(kind, method, valid_share) + judge_flops(kind, method)


@dataclass(frozen=True)
class Hours:
    """Published GPU-hours; `judge` of them are the preference model's, None where that is not told."""

    total: float
    judge: float | None
    source: str


LAUNCHERS, NOTES = "its launch scripts: 16 GPUs", "secondary notes"
HOURS = {
    ("sd15", "dpo"): Hours(16 * 24, 0, f"{LAUNCHERS} x 24 h"),
    ("sdxl", "dpo"): Hours(16 * 300, 0, f"{LAUNCHERS} x 300 h (derived: 30 h a 200 steps)"),
    ("sd15", "spo"): Hours(80, 32, NOTES),
    ("sdxl", "spo"): Hours(234, 116, NOTES),
    ("sd15", "lpo"): Hours(23, None, NOTES),
    ("sdxl", "lpo"): Hours(92, None, NOTES),
}
PAPER = {("sd15", "spo"): 20.8, ("sdxl", "spo"): 4.9}
"""SPO's paper: its training compute in per cent of Diffusion-DPO's."""

# ---------------------------------------------------------------------------------------------------- measuring

BATCHES = {  # pairs of a timed micro-batch: Diffusion-DPO's published one and a larger one, what fits for the judges
    "sd15": {"dpo": (1, 16), "spm": (16,), "lrm": (16,)},
    "sdxl": {"dpo": (1, 4), "spm": (4,), "lrm": (4,)},
}


def measure_step(
    kind: str, name: str, size: str, device: str, mixed_precision: str, records: Records, left_s: Callable[[], float]
) -> None:
    """A record a batch size: a micro-batch's milliseconds, and the optimizer step's (p50_step_ms)."""
    step = STEPS[name](kind, size, device, DTYPES[mixed_precision])
    for pairs in BATCHES[kind][name]:
        iteration.reset_peak(device)
        found = timed(functools.partial(step.micro_batch, pairs), device, left_s)
        facts = {"pairs": pairs, "dtype": mixed_precision, **iteration.peak_memory(device)}
        before = functools.partial(step.micro_batch, pairs)  # the step needs gradients
        facts["p50_step_ms"] = timed(step.step, device, left_s, before)["p50_ms"]
        records.write(step_record(kind, name, pairs), **found, **facts)


def step_record(kind: str, name: str, pairs: int) -> str:
    return f"{kind}/{name} micro-batch of {pairs}"


def timed(
    function: Callable[[], Any],
    device: str,
    left_s: Callable[[], float],
    before: Callable[[], Any] | None = None,  # ahead of each call, not timed
    most: int = 3,
    warm_ups: int = 1,
) -> dict[str, Any]:
    """Quantiles of so many calls after the warm-ups, or of as many as the time allows, at least one."""
    sync = torch.cuda.synchronize if device == "cuda" else lambda: None
    times: list[float] = []
    for n in range(warm_ups + most):
        whole = time.perf_counter()
        if before is not None:
            before()
        sync()
        start = time.perf_counter()
        function()
        sync()
        end = time.perf_counter()
        times += [1000 * (end - start)] if n >= warm_ups else []
        if times and left_s() < 1.2 * (end - whole):
            break
    return quantiles(times)


class LatentSetup(iteration.Setup):
    """An iteration of LPO: no VAE, and the latent reward model in the preference model's place."""

    def parts(self, dtype: torch.dtype, scorer_dtype: torch.dtype) -> dict[str, Any]:
        return {"unet": networks.make_unet(*self.where, dtype), "vae": None, "spm": self.scorer(dtype)}

    def scorer(self, dtype: torch.dtype) -> LatentScorer:
        network = make_latent_reward(*self.where, dtype)
        encoders = 1 + network.is_sdxl
        scorer: Any = LatentScorer(network, lambda prompts: [networks.token_ids(len(prompts), self.device)] * encoders)
        scorer.encode_ids = lambda ids: scorer.encode([""] * len(ids))
        return scorer


def measure_lpo(kind: str, size: str, device: str, records: Records, left_s: Callable[[], float]) -> None:
    """A record a share of valid pairs: whole iterations of LPO by this package, fused; nothing is compared with them
    that is compiled."""
    precision = "fp16" if device == "cuda" else "no"
    cfg = published_config(kind, "lpo").with_fields(mixed_precision=precision)
    if size == "tiny":
        cfg = cfg.with_fields(sample_batch_size=2, num_steps=3, train_batch_size=3, rank=4)
    technique = iteration.Technique(mixed_precision=precision, fuse=True, tf32=True)
    setup = LatentSetup(kind, size, device, None, precision, cfg=cfg)
    with iteration.tf32(technique.tf32):
        ours = iteration.Ours(setup, technique)
        for share in VALID_SHARES:
            decisions = iteration.Decisions.scripted(cfg, share, device)
            iteration.reset_peak(device)
            warm_ups = int(share == VALID_SHARES[0])  # the shapes of a micro-batch are the same
            found = timed(functools.partial(ours.iterate, decisions), device, left_s, most=1, warm_ups=warm_ups)
            facts = {"prompts": cfg.sample.sample_batch_size, "dtype": precision, **iteration.peak_memory(device)}
            records.write(f"{kind}/lpo/v={share:g}", **found, **facts)


def run(job: str, size: str, device: str, records: Records, left_s: Callable[[], float]) -> None:
    """job: sd15-dpo, sdxl-spm, ..., or sd15-lpo."""
    kind, name = job.split("-")
    if name == "lpo":
        measure_lpo(kind, size, device, records, left_s)
    else:  # Diffusion-DPO's launch scripts train in fp16
        precision = "no" if device == "cpu" else "fp16" if name == "dpo" else "bf16"
        measure_step(kind, name, size, device, precision, records, left_s)


# ---------------------------------------------------------------------------------------------------- projecting

Found = Mapping[str, Mapping[str, Any]]  # records by name


def gpu_records(folder: Path = RESULTS) -> Found:
    """The latest full-size record of each name that a GPU printed, of the GPU of the latest one."""
    paths = sorted([*folder.glob("*iteration.jsonl"), *folder.glob("*gpu_hours.jsonl")])
    rows = [r for path in paths for r in read(path) if r.get("device") == "cuda" and r.get("size") == "full"]
    rows = [r for r in rows if r["status"] == "ok" and "p50_ms" in r and r.get("published_batch", True)]
    rows = [r for r in rows if r.get("gate", "passed") == "passed"]
    rows.sort(key=lambda r: r["time"])
    return {r["name"]: r for r in rows if r["gpu"].get("name") == rows[-1]["gpu"].get("name")}


def iteration_seconds(kind: str, method: str, strategy: str, valid_share: float, found: Found) -> float | None:
    """Of a published iteration; strategy: published or ours.

    Diffusion-DPO's is the published micro-batches and a step; ours: the same in larger micro-batches, no code of ours.
    """
    if method == "dpo":
        pairs = BATCHES[kind]["dpo"][strategy == "ours"]
        number = published_config(kind, "dpo").sample.sample_batch_size / pairs
        return _steps_seconds(found.get(step_record(kind, "dpo", pairs)), number, 1)
    if method == "lpo":
        names = [f"{kind}/lpo/v={valid_share:g}"] if strategy == "ours" else []
    else:
        # merged rollouts are of rounded weights: another training
        ours = [row for row, t in iteration.ROWS.items() if row.startswith("ours") and not t.merged]
        rows = ["published"] if strategy == "published" else ours
        names = [f"{kind}/{row}/v={valid_share:g}" for row in rows]
    return min((found[name]["p50_ms"] / 1000 for name in names if name in found), default=None)


def _steps_seconds(record: Mapping[str, Any] | None, micro_batches: float, steps: float) -> float | None:
    return None if record is None else (micro_batches * record["p50_ms"] + steps * record["p50_step_ms"]) / 1000


def judge_hours(kind: str, method: str, found: Found) -> float | None:
    """GPU-hours of the preference model's published training, as train_spm runs it; 0 where there is none."""
    judge = RECIPES[method].judge
    if judge is None:
        return 0.0
    (pairs,), seen = BATCHES[kind][judge], judge_pairs(kind, method)
    steps = preference_config(kind, judge == "lrm").run.max_train_steps or 0
    seconds = _steps_seconds(found.get(step_record(kind, judge, pairs)), seen / pairs, steps)
    return None if seconds is None else seconds / 3600


def projected_hours(kind: str, method: str, strategy: str, valid_share: float, found: Found) -> float | None:
    """GPU-hours of the whole published training on the GPU of the records; None if one of its times is missing."""
    seconds, judge = iteration_seconds(kind, method, strategy, valid_share, found), judge_hours(kind, method, found)
    if seconds is None or judge is None:
        return None
    return seconds * published_iterations(published_config(kind, method)) / 3600 + judge


def missing_jobs(found: Found) -> list[str]:
    """Of gpu_run.py, for the cells that say "not measured"."""
    jobs = []
    for kind in KINDS:
        if any(iteration_seconds(kind, "spo", s, v, found) is None for s in STRATEGIES for v in VALID_SHARES):
            jobs += [f"{kind}/{row}" for row in ("truth", "published", "ours+all")]
        records = {name: [step_record(kind, name, pairs) for pairs in BATCHES[kind][name]] for name in BATCHES[kind]}
        records["lpo"] = [f"{kind}/lpo/v={share:g}" for share in VALID_SHARES]
        jobs += [f"hours/{kind}-{name}" for name, names in records.items() if not set(names) <= set(found)]
    return jobs


# ---------------------------------------------------------------------------------------------------- tables

STRATEGIES = ("published", "ours")


def span(values: Sequence[float | None], spec: str) -> str:
    """Both ends of the valid shares, or one number where they agree."""
    if any(v is None for v in values):
        return "not measured"
    low, high = (format(v, spec) for v in (min(values), max(values)))  # type: ignore[type-var]
    return low if low == high else f"{low}-{high}"


def counts(kind: str, method: str) -> dict[str, Any]:
    """What the first table shows of a training; two numbers are those of VALID_SHARES."""
    cfg, hours, dpo = published_config(kind, method), HOURS[kind, method], HOURS[kind, "dpo"]
    flops = [training_flops(kind, method, v) for v in VALID_SHARES]
    whole = training_flops(kind, "dpo", 1.0)
    return {
        "iterations": published_iterations(cfg),
        "batch": cfg.sample.sample_batch_size,
        "iteration_tflop": [iteration_flops(kind, method, v) / 1e12 for v in VALID_SHARES],
        "training_eflop": [n / 1e18 for n in flops],
        "judge_eflop": judge_flops(kind, method) / 1e18,
        "judge_pairs": judge_pairs(kind, method),
        "flops_percent": [100 * n / whole for n in flops],
        "published_hours": hours.total,
        "published_judge_hours": hours.judge,
        "source": hours.source,
        "hours_percent": 100 * hours.total / dpo.total,
        "paper_percent": PAPER.get((kind, method)),
        "a100_mfu_percent": [100 * n / (3600 * hours.total * A100_TFLOPS * 1e12) for n in flops],
    }


def count_table() -> str:
    rows = [
        ["model", "method", "published iterations", "TFLOP of one", "EFLOP in all (preference model)"],
        ["FLOPs, % of Diffusion-DPO's", "published GPU-hours (preference model)", "hours, %", "the paper, %"],
        ["MFU of these hours if on A100s (derived), %"],
    ]
    lines = [sum(rows, [])]
    for kind in KINDS:
        for method, recipe in RECIPES.items():
            c = counts(kind, method)
            unit = "pairs" if method == "dpo" else "prompts"
            judge = "" if not c["judge_pairs"] else f" ({c['judge_eflop']:.1f})"
            told = c["published_judge_hours"]
            within = "" if recipe.judge is None else f" ({'not told' if told is None else told})"
            lines.append(
                [
                    *(kind, TITLES[method], f"{c['iterations']:,} of {c['batch']:,} {unit}"),
                    *(span(c["iteration_tflop"], ",.0f"), span(c["training_eflop"], ".1f") + judge),
                    *(span(c["flops_percent"], ".0f"), f"{c['published_hours']:,}{within}, {c['source']}"),
                    *(f"{c['hours_percent']:.1f}", "" if c["paper_percent"] is None else f"{c['paper_percent']}"),
                    span(c["a100_mfu_percent"], ".0f"),
                ]
            )
    return markdown(lines)


def projection_table(found: Found) -> str:
    """What the GPU's own seconds give; every number of hours is a projection.

    Preference models are trained by train_spm whatever the strategy.
    """
    gpu = next(iter(found.values()))["gpu"]["name"] if found else "no GPU yet"
    heads = [
        "model",
        "method",
        "strategy",
        f"s an iteration ({gpu})",
        "GPU-hours of the preference model by train_spm, projection",
    ]
    lines = [[*heads, "GPU-hours in all, projection", "% of Diffusion-DPO's"]]
    for kind in KINDS:
        for method in RECIPES:
            for strategy in STRATEGIES if method != "lpo" else ("ours",):
                seconds = [iteration_seconds(kind, method, strategy, v, found) for v in VALID_SHARES]
                hours = [projected_hours(kind, method, strategy, v, found) for v in VALID_SHARES]
                dpo = projected_hours(kind, "dpo", strategy, 1.0, found)
                shares = [None if h is None or dpo is None else 100 * h / dpo for h in hours]
                judge = span([judge_hours(kind, method, found)], ".1f")
                cells = (span(seconds, ".3g"), judge, span(hours, ".1f"), span(shares, ".1f"))
                name = "published, larger micro-batches" if (method, strategy) == ("dpo", "ours") else strategy
                lines.append([kind, TITLES[method], name, *cells])
    return markdown(lines)


def record(records: Records, found: Found) -> None:
    """A record a training: its counts, and its projections where there are any."""
    for kind in KINDS:
        for method in RECIPES:
            hours = {s: [projected_hours(kind, method, s, v, found) for v in VALID_SHARES] for s in STRATEGIES}
            values = {**counts(kind, method), "valid_shares": VALID_SHARES, "projected_hours": hours}
            records.write(f"{kind}/{method} training", **values)
