"""Whole iterations on flows (SD3.5, FLUX.1 at tiny size) against an independent float64 loop.

The loop has diffusers' pipelines, transformers, scheduler and VAE, PEFT's LoRA and PyTorch's AdamW, and writes the
samplers, the judgements and the losses out. Only random numbers are ours: noise is drawn by key.
"""

from __future__ import annotations

import contextlib
import functools
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import recorded
import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler, FluxPipeline, StableDiffusion3Pipeline
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from peft import LoraConfig
from PIL import Image
from runs import command_line
from safetensors.torch import load_file
from tiny import make_tiny_flux, make_tiny_sd3
from torch import Tensor

from spo_fast import train
from spo_fast.evaluation.pages.run_record import read_metrics
from spo_fast.method.noise import CHILDREN, PICK, POSTERIOR, RENOISE, SIDES, STEPS, TIMESTEPS, KeyedDraws, permutation
from spo_fast.ops import philox
from spo_fast.training import batches
from spo_fast.training.loop import Run

SEED, PROMPTS, TOKENS = 42, ("a red cat", "the sea", "blue dogs"), 16
HEIGHT, WIDTH = 32, 48
SETTINGS: dict[str, Any] = {
    "height": HEIGHT,
    "width": WIDTH,
    "mixed_precision": "fp64",
    "max_sequence_length": TOKENS,
    "sample_batch_size": len(PROMPTS),
    "learning_rate": 3e-3,
    "adam_weight_decay": 0.01,
    "rank": 3,
    "lora_alpha": 6,
    "num_validation_images": 0,
    "scorer": "flow_scores:brightness",
    "seed": SEED,
}
SCORES = "def brightness(x, prompts):\n    return 100 * x.mean((1, 2, 3))\n"
KINDS: dict[str, dict[str, Any]] = {
    "sd35": {"num_steps": 8, "guidance_scale": 3.0},
    "flux": {"num_steps": 8, "guidance_scale": 1.0, "gradient_accumulation_steps": 1},
}


@pytest.fixture(scope="module")
def directories(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("flows")
    return {"sd35": make_tiny_sd3(folder / "sd35"), "flux": make_tiny_flux(folder / "flux")}


@pytest.fixture(autouse=True)
def exact(monkeypatch: pytest.MonkeyPatch) -> None:
    """diffusers rounds two things to float32 whatever the type: the variance of q and k, and rotated q and k."""

    def normed(self: torch.nn.Module, x: Tensor) -> Tensor:
        return x * (x.square().mean(-1, keepdim=True) + self.eps).rsqrt() * self.weight

    def rotated(x: Tensor, angles: tuple[Tensor, Tensor], sequence_dim: int) -> Tensor:
        assert sequence_dim == 1  # (B, tokens, heads, channels)
        cos, sin = (part[None, :, None].to(x.dtype) for part in angles)
        even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
        return x * cos + torch.stack([-odd, even], dim=-1).flatten(-2) * sin

    monkeypatch.setattr(diffusers.models.normalization.RMSNorm, "forward", normed)
    monkeypatch.setattr(diffusers.models.transformers.transformer_flux, "apply_rotary_emb", rotated)


@pytest.fixture
def make(directories: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Run]:
    """A run as the command line builds it, with settings changed; a function of pictures scores."""
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    (tmp_path / "flow_scores.py").write_text(SCORES)
    monkeypatch.chdir(tmp_path)

    def build(kind: str, **settings: Any) -> Run:
        found = {"output_dir": tmp_path / "run", "prompts": "prompts.txt", **SETTINGS, **KINDS[kind], **settings}
        given = {"model": kind, "pretrained_model_name_or_path": directories[kind], **found}
        return train.build(train.parse(command_line(given)))

    return build


def no_timer(phase: str) -> contextlib.AbstractContextManager[None]:
    return contextlib.nullcontext()


# ------------------------------------------------------------------------------------------- what both loops are given


class Drawn(KeyedDraws):
    """Our draws, handed out as noise: a kernel's own differs in a float32's last bit."""

    def children(self, step: int, num_children: int, num_parents: int) -> Any:
        noises = [noise(self.prompts, CHILDREN + step, k) for k in range(max(num_children, num_parents))]
        return {"noise": torch.stack(noises) if num_parents == 1 else torch.cat(noises)[None]}


def keys(prompts: Tensor, use: int, candidate: int) -> Tensor:
    return torch.tensor([[SEED, 0, int(p), use, candidate] for p in prompts])


def noise(prompts: Tensor, use: int, candidate: int = 0, shape: tuple[int, ...] = (4, HEIGHT // 8, WIDTH // 8)):
    """(B, C, H, W) by the key."""
    return philox.normal(keys(prompts, use, candidate), math.prod(shape)).view(-1, *shape).double()


def opinion(pixels: Tensor, t: int, text: Tensor) -> Tensor:  # (N, 3, H, W) -> (N,)
    """Of pictures and prompts, and of the timestep that a judge is told."""
    return 40 * (pixels * (1 + text / 9).view(-1, 1, 1, 1) + 0.37 * t).sin().mean((1, 2, 3))


class Judge:
    """A scorer of the run, in float64, that remembers its scores."""

    def __init__(self) -> None:
        self.scores: list[Tensor] = []

    def encode(self, prompts: list[str]) -> Tensor:
        return torch.tensor([len(p) for p in prompts], dtype=torch.float64)

    def __call__(self, candidates: Any) -> Tensor:
        found = [opinion(x, int(candidates.t), candidates.text[rows]) for rows, x in candidates.pixel_chunks()]
        self.scores.append(torch.cat(found))
        return self.scores[-1]


# ------------------------------------------------------------------------------------------- the independent loop


@dataclass
class Terms:
    """Stacked over N terms, K sides, S transitions."""

    x: Tensor  # (N, K, S, C, H, W)
    child: Tensor
    z: Tensor  # the noise that made the child
    row: Tensor  # (N, K, S)
    prompt: Tensor  # (N,)
    advantage: Tensor | None = None  # (N,)
    old: dict[str, Tensor] = field(default_factory=dict)  # velocities of frozen networks

    def select(self, n: Tensor) -> Terms:
        parts = (self.x[n], self.child[n], self.z[n], self.row[n], self.prompt[n])
        return Terms(
            *parts, None if self.advantage is None else self.advantage[n], {k: v[n] for k, v in self.old.items()}
        )


class Theirs:
    """diffusers' pipeline of a directory, and a flow's maths."""

    def __init__(self, run: Run, directory: Path):
        self.cfg, self.kind = run.cfg, run.cfg.model.model
        kinds = {"sd35": StableDiffusion3Pipeline, "flux": FluxPipeline}
        self.pipe = kinds[self.kind].from_pretrained(directory).to(torch.float64)
        self.network = self.pipe.transformer.requires_grad_(False)
        adapter = self.cfg.adapter
        self.network.add_adapter(
            LoraConfig(r=adapter.rank, lora_alpha=adapter.alpha, target_modules=list(adapter.lora_targets))
        )
        self.weights = {n: p for n, p in self.network.named_parameters() if p.requires_grad}
        self.h, self.w = run.model.latent_shape[1:]
        self.prompts = run.prompts
        self.set_steps(self.cfg.sample.num_steps)
        alphas = DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear").alphas_cumprod
        self.ratios = ((1 - alphas.double()) / alphas.double()).sqrt()  # of the judge's diffusion

    def set_steps(self, n: int, even: bool = False) -> None:
        scheduler, options = self.pipe.scheduler, {}
        if scheduler.config.use_dynamic_shifting:
            names = ("base_image_seq_len", "max_image_seq_len", "base_shift", "max_shift")
            options["mu"] = calculate_shift(self.h // 2 * (self.w // 2), *(scheduler.config[name] for name in names))
        if self.kind == "flux" or even:
            options["sigmas"] = np.linspace(1.0, 1 / n, n)
        scheduler.set_timesteps(n, **options)
        self.sigmas, self.told = scheduler.sigmas.double(), scheduler.timesteps

    def text(self, prompts: list[str]) -> dict[str, Tensor]:
        if self.kind == "sd35":
            found = self.pipe.encode_prompt(
                prompts, None, None, do_classifier_free_guidance=False, max_sequence_length=TOKENS
            )
            return {"encoder_hidden_states": found[0], "pooled_projections": found[2]}
        embeds, pooled, ids = self.pipe.encode_prompt(prompts, None, max_sequence_length=TOKENS)
        return {"encoder_hidden_states": embeds, "pooled_projections": pooled, "txt_ids": ids}

    @functools.cached_property
    def texts(self) -> dict[str, Tensor]:
        return self.text(list(self.prompts))

    @functools.cached_property
    def empty(self) -> dict[str, Tensor]:
        return self.text([""])

    def half(self, x: Tensor, row: Tensor, text: dict[str, Tensor]) -> Tensor:
        t, B = self.told[row], len(x)
        if self.kind == "sd35":
            return self.network(hidden_states=x, timestep=t, **text, return_dict=False)[0]
        C, h, w = x.shape[1:]
        out = self.network(
            hidden_states=FluxPipeline._pack_latents(x, B, C, h, w),
            timestep=t.to(x.dtype) / 1000,
            guidance=torch.full([1], 3.5).expand(B),
            img_ids=FluxPipeline._prepare_latent_image_ids(B, h // 2, w // 2, x.device, x.dtype),
            **text,
            return_dict=False,
        )[0]
        return FluxPipeline._unpack_latents(out, 8 * h, 8 * w, 8)

    def velocity(self, x: Tensor, row: Tensor | int, prompt: Tensor, g: float | None = None) -> Tensor:
        """Guided, of x (B, C, H, W); row: of the schedule, (B,) or one."""
        g = self.cfg.sample.guidance_scale if g is None else g
        row = torch.as_tensor(row).expand(len(x))
        per_row = ("encoder_hidden_states", "pooled_projections")
        v = self.half(x, row, {n: e[prompt] if n in per_row else e for n, e in self.texts.items()})
        if g <= 1:
            return v
        u = self.half(x, row, {n: e.expand(len(x), *e.shape[1:]) if n in per_row else e for n, e in self.empty.items()})
        return u + g * (v - u)

    def step(self, x: Tensor, v: Tensor, row: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and std of x_{t-1}."""
        s, to = (self.sigmas[row + i].view(-1, 1, 1, 1) for i in (0, 1))
        eta = self.cfg.sample.eta
        x0, e = x - s * v, x + (1 - s) * v
        if self.cfg.sample.sampler == "ddim":
            std = eta * to * (1 - ((1 - s) * to / ((1 - to) * s)) ** 2).sqrt()
            return (1 - to) * x0 + (to**2 - std**2).sqrt() * e, std
        assert self.cfg.sample.sampler == "flow_sde"
        g2 = eta**2 * s / (1 - torch.where(s == 1, self.sigmas[1], s))
        return x * (1 + g2 / (2 * s) * (to - s)) + v * (1 + g2 * (1 - s) / (2 * s)) * (to - s), (g2 * (s - to)).sqrt()

    @torch.no_grad()
    def child(self, x: Tensor, i: int, k: int, prompt: Tensor) -> tuple[Tensor, Tensor]:
        """Candidate k's x_{t-1} of step i, and its noise."""
        mean, std = self.step(x, self.velocity(x, i, prompt), torch.full((len(x),), i))
        z = noise(prompt, CHILDREN + i, k)
        return mean + std * z, z

    @torch.no_grad()
    def judged(self, x: Tensor, i: int, prompt: Tensor) -> Tensor:
        """Scores of latents at step i, of their x0; at the end of themselves."""
        t = 0
        if i < len(self.told):
            s = self.sigmas[i]
            x = x - s * self.velocity(x, i, prompt)
            t = int((self.ratios.log() - (s / (1 - s)).log()).abs().argmin())
        vae = self.pipe.vae
        pixels = vae.decode(x / vae.config.scaling_factor + vae.config.shift_factor).sample
        return opinion(pixels, t, torch.tensor([len(self.prompts[p]) for p in prompt], dtype=torch.float64))

    # --------------------------------------------------------------------------------------------- rollouts

    def branching(self, prompt: Tensor, inner: int, to_the_end: bool = False) -> tuple[Terms, list[Tensor]]:
        """Candidates of steps, compared after `inner` more; all transitions by segment, step, prompt.

        A comparison's softmax difference stands where others have an advantage.
        """
        cfg, B = self.cfg.sample, len(prompt)
        first, end, K = cfg.first_branch, cfg.last_branch, cfg.num_candidates
        x = noise(prompt, 0)
        for i in range(first):
            x, _ = self.child(x, i, 0, prompt)
        terms, scores = [], []
        while first < end:
            stop = min(first + 1 + inner, end)
            paths = [[(x, x)] for _ in range(K)]
            for k, path in enumerate(paths):
                for i in range(first, cfg.num_steps if to_the_end else stop):
                    path.append(self.child(path[-1][0], i, k, prompt))
            last = cfg.num_steps if to_the_end else stop
            score = torch.stack([self.judged(path[-1][0], last, prompt) for path in paths])  # (K, B)
            scores.append(score.flatten())
            for i in range(first, stop):
                for b in range(B):
                    most, least = int(score[:, b].argmax()), int(score[:, b].argmin())
                    p = score[[most, least], b].softmax(0)
                    before, after = ([paths[k][i - first + n] for k in (most, least)] for n in (0, 1))
                    wanted = ((before, 0), (after, 0), (after, 1))
                    sides = (torch.stack([side[j][b] for side in part])[:, None] for part, j in wanted)
                    terms.append((*sides, torch.full((2, 1), i), prompt[b], p[0] - p[1]))
            if stop < end:
                picked = [int(philox.integer(keys(prompt[b, None], PICK + stop, 0), K)) for b in range(B)]
                x = torch.stack([paths[k][-1][0][b] for b, k in enumerate(picked)])
            first = stop
        return Terms(*(torch.stack(parts) for parts in zip(*terms, strict=True))), scores

    def trajectories(self, prompt: Tensor) -> tuple[Terms, list[Tensor]]:
        """All of K of each prompt, every trained transition a term: by step, candidate, prompt."""
        cfg, B = self.cfg.sample, len(prompt)
        K, n = cfg.num_candidates, cfg.num_steps
        paths = [[(noise(prompt, 0, k), noise(prompt, 0, k))] for k in range(K)]
        for k, path in enumerate(paths):
            for i in range(n):
                path.append(self.child(path[-1][0], i, k, prompt))
        score = torch.stack([self.judged(path[-1][0], n, prompt) for path in paths])
        advantage = (score - score.mean(0)) / (score.std(0, correction=0) + 1e-6)
        terms = [
            (path[i][0][b], path[i + 1][0][b], path[i + 1][1][b], torch.tensor(i), prompt[b], advantage[k, b])
            for i in range(cfg.first_branch, cfg.last_branch)
            for k, path in enumerate(paths)
            for b in range(B)
        ]
        x, child, z, row, owner, advantage = (torch.stack(parts) for parts in zip(*terms, strict=True))
        return Terms(*(v[:, None, None] for v in (x, child, z, row)), owner, advantage), [score.flatten()]

    def ranked(self, prompt: Tensor) -> tuple[Terms, list[Tensor]]:
        """DenseReward's: some trajectories of a prompt, best first, at some steps."""
        every, scores = self.trajectories(prompt)
        cfg, o, B = self.cfg.sample, self.cfg.objective, len(prompt)
        K, score = cfg.num_candidates, scores[0].view(cfg.num_candidates, B)
        share = o.gamma ** torch.arange(cfg.branching_steps).double()
        share = share.cumsum(0) / share.sum()
        found = []
        for d in range(o.terms_per_prompt):
            for b in range(B):
                drawn = [int(philox.integer(keys(prompt[b, None], SIDES, d * K + k), 2**30)) for k in range(K)]
                some = sorted(
                    sorted(range(K), key=drawn.__getitem__)[: o.num_ranked], key=lambda k: -float(score[k, b])
                )
                u = [
                    int(philox.integer(keys(prompt[b, None], STEPS, d * o.num_sampled_steps + s), 2**30)) / 2**30
                    for s in range(o.num_sampled_steps)
                ]
                steps = [int((share[:-1] <= v).sum()) for v in u]
                found.append([[(s * K + k) * B + b for s in steps] for k in some])
        n = torch.tensor(found)  # (N, num_ranked, S)
        return Terms(
            *(v[:, 0, 0][n] for v in (every.x, every.child, every.z, every.row)), every.prompt[n[:, 0, 0]]
        ), scores

    # --------------------------------------------------------------------------------------------- updates

    def of_terms(self, t: Terms) -> Tensor:
        """Velocities on all states, (N, K, S, C, H, W)."""
        N, K, S = t.row.shape
        owner = t.prompt.repeat_interleave(K * S)
        return self.velocity(t.x.flatten(0, 2), t.row.flatten(), owner).view_as(t.x)

    def log_prob(self, t: Terms, v: Tensor) -> Tensor:  # (N, K, S)
        mean, std = self.step(t.x.flatten(0, 2), v.flatten(0, 2), t.row.flatten())
        error = (t.child.flatten(0, 2) - mean) ** 2 / (2 * std**2)
        return (-error - std.log() - math.log(2 * math.pi) / 2).mean((1, 2, 3)).view(t.row.shape)

    def losses(self, t: Terms) -> Tensor:  # (N,)
        o, v = self.cfg.objective, self.of_terms(t)
        if o.method in ("ddpo", "dpok"):
            r = (self.log_prob(t, v) - self.log_prob(t, t.old["policy"])).exp().flatten()
            A = t.advantage.clamp(-o.advantage_clip, o.advantage_clip)
            self.clamped += int(((r - 1).abs() > o.clip).sum())
            loss = torch.maximum(-A * r, -A * r.clamp(1 - o.clip, 1 + o.clip))
            if o.method == "dpok":
                loss = loss + o.kl_weight * ((v - t.old["reference"]) ** 2).mean((1, 2, 3, 4, 5))
            return loss
        if o.method == "gradspo":
            s = self.sigmas[t.row[:, 0, 0]].view(-1, 1, 1, 1)
            m, reference, ema = ((1 - s) * p[:, 0, 0] for p in (v, t.old["reference"], t.old["ema"]))
            shift = o.guidance_step * s * (t.z[:, 0, 0] - t.z[:, 1, 0]) / 2
            r = [(-((m - y) ** 2) + (reference - y) ** 2).mean((1, 2, 3)) for y in (ema - shift, ema + shift)]
            log_r = torch.stack(r, 1)[..., None]
        else:
            log_r = self.log_prob(t, v) - self.log_prob(t, t.old["reference"])
        self.clamped += int(((log_r.exp() - 1).abs() > o.clip).sum())
        logits = o.beta * log_r.exp().clamp(1 - o.clip, 1 + o.clip).log().mean(2)  # (N, K)
        # the likelihood of the order; of two sides the log-sigmoid of their difference
        return sum(torch.logsumexp(logits[:, k:], 1) - logits[:, k] for k in range(logits.shape[1]))

    @torch.no_grad()
    def freeze(self, t: Terms, ema: dict[str, Tensor]) -> None:
        t.old["policy"] = self.of_terms(t)
        with self.using(ema):
            t.old["ema"] = self.of_terms(t)
        self.network.disable_adapters()
        t.old["reference"] = self.of_terms(t)
        self.network.enable_adapters()

    @contextlib.contextmanager
    def using(self, weights: dict[str, Tensor]) -> Iterator[None]:
        own = {n: p.detach().clone() for n, p in self.weights.items()}
        self.fill(weights)
        yield
        self.fill(own)

    @torch.no_grad()
    def fill(self, weights: dict[str, Tensor]) -> None:
        assert weights.keys() == self.weights.keys()
        for name, p in self.weights.items():
            p.copy_(weights[name])

    def update(
        self, losses: Callable[[Tensor], Tensor], count: int, steps: int
    ) -> tuple[float, list[dict[str, Tensor]]]:
        """Optimizer steps on equal parts of the terms; the mean loss, and each step's gradients."""
        optim, order = self.cfg.optim, permutation(count, SEED, 0)
        optimizer = torch.optim.AdamW(
            self.weights.values(),
            lr=optim.learning_rate,
            betas=(optim.adam_beta1, optim.adam_beta2),
            eps=optim.adam_epsilon,
            weight_decay=optim.adam_weight_decay,
        )
        self.clamped, total, gradients = 0, 0.0, []
        for j in range(steps):
            loss = losses(order[j * count // steps : (j + 1) * count // steps])
            optimizer.zero_grad()
            loss.mean().backward()
            gradients.append({n: p.grad.clone() for n, p in self.weights.items()})
            if optim.max_grad_norm is not None:
                torch.nn.utils.clip_grad_norm_(self.weights.values(), optim.max_grad_norm)
            optimizer.step()
            total += float(loss.detach().sum())
        return total / count, gradients


# ------------------------------------------------------------------------------------------- ours, looked at


@dataclass
class Ours:
    record: dict[str, Any]
    experience: Any
    gradients: list[dict[str, Tensor]]


@torch.no_grad()
def randomise(run: Run) -> dict[str, dict[str, Tensor]]:
    """Policy and moving average unlike the reference, and unlike each other; returns both."""
    generator = torch.Generator().manual_seed(1)
    sets = {"policy": run.policy.masters, "ema": run.policy.averages or [p.clone() for p in run.policy.masters]}
    for weights in sets.values():
        for name, p in zip(run.policy.names, weights, strict=True):
            p.add_((0.25 if ".lora_B." in name else 0.1) * torch.randn(p.shape, generator=generator, dtype=p.dtype))
    run.policy.copy_to_network()
    return {who: dict(zip(run.policy.names, map(torch.clone, ps), strict=True)) for who, ps in sets.items()}


def iterate(run: Run) -> Ours:
    """Iteration 0 of a run."""
    seen: list[Any] = []
    gradients: list[dict[str, Tensor]] = []
    update, step = run.learner.update, run.learner.step

    def updated(experience: Any, *rest: Any) -> Any:
        seen.append(experience)
        return update(experience, *rest)

    def stepped() -> float:
        grads = (torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in run.policy.masters)
        gradients.append(dict(zip(run.policy.names, grads, strict=True)))
        return step()

    run.learner.update, run.learner.step = updated, stepped  # type: ignore[method-assign]
    record = run.iterate(0, no_timer)
    assert record is not None
    return Ours(record, seen[0], gradients)


def close(ours: Tensor, theirs: Tensor, what: str = "") -> None:
    assert ours.dtype == theirs.dtype == torch.float64 and ours.shape == theirs.shape, what
    assert float((ours - theirs).abs().max()) <= 1e-10 * float(theirs.abs().max()), what


def compare(run: Run, ours: Ours, theirs: Theirs, gradients: list[dict[str, Tensor]]) -> None:
    """Gradients of each step, and the weights after the last."""
    for found, wanted in zip(ours.gradients, gradients, strict=True):
        for name, gradient in wanted.items():
            close(found[name], gradient, f"gradient of {name}")
        assert max(float(g.abs().max()) for g in wanted.values()) > 1e-4
    for name, p in zip(run.policy.names, run.policy.masters, strict=True):
        close(p.detach(), theirs.weights[name].detach(), name)


METHODS: dict[str, dict[str, Any]] = {
    "spo": {},
    "mspo": {"num_inner_steps": 1, "branch_start": 2},
    "d3po": {"num_steps": 6, "branch_start": 1, "beta": 10.0},
    "gradspo": {"branch_start": None},
    "ddpo": {"num_steps": 6, "branch_start": 1, "clip": 0.002},
    "dpok": {"num_steps": 6, "branch_start": 1, "clip": 0.002, "kl_weight": 2.0},
    "dense": {"branch_start": 1, "num_candidates": 4, "num_ranked": 3, "num_sampled_steps": 2, "terms_per_prompt": 2},
}
CASES = [
    *((kind, method, "ddim") for kind in KINDS for method in ("spo", "mspo", "ddpo")),
    *(("sd35", method, "ddim") for method in ("d3po", "dpok")),
    *(("flux", method, "ddim") for method in ("gradspo", "dense")),
    *((kind, method, "flow_sde") for kind, method in (("sd35", "ddpo"), ("flux", "spo"))),
]


@pytest.mark.parametrize(("kind", "method", "sampler"), CASES)
def test_an_iteration_is_that_of_an_independent_loop(
    make: Callable[..., Run],
    directories: dict[str, Path],
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
    method: str,
    sampler: str,
) -> None:
    """Rollout, judgement and two optimizer steps: scores, pairs, loss, gradients and weights to 1e-10."""
    monkeypatch.setattr(batches, "KeyedDraws", Drawn)
    settings = {"num_candidates": 3, "clip": 0.02, **METHODS[method]}
    run = make(kind, sampler=sampler, method=method, **settings)
    judge = run.scorer = Judge()  # type: ignore[assignment]
    theirs, start = Theirs(run, directories[kind]), randomise(run)
    prompt = torch.tensor(run.prompt_order.batch(0).indices)
    collect = {
        "mspo": lambda: theirs.branching(prompt, inner=1),
        "d3po": lambda: theirs.branching(prompt, inner=1000, to_the_end=True),
        "ddpo": lambda: theirs.trajectories(prompt),
        "dpok": lambda: theirs.trajectories(prompt),
        "dense": lambda: theirs.ranked(prompt),
    }.get(method, lambda: theirs.branching(prompt, inner=0))
    theirs.fill(start["ema" if method == "gradspo" else "policy"])
    terms, scores = collect()
    theirs.fill(start["policy"])
    if run.cfg.objective.method in ("spo", "mspo", "d3po", "gradspo"):  # half of the comparisons are too close
        assert terms.advantage is not None
        gaps = terms.advantage.unique()
        threshold = float(gaps[len(gaps) // 2 - 1 : len(gaps) // 2 + 1].mean())
        run.cfg, terms = run.cfg.with_fields(threshold=threshold), terms.select(terms.advantage > threshold)
    N = len(terms.row)
    run.learner.cfg = run.learner.cfg.with_fields(train_batch_size=-(-N // 2))
    theirs.freeze(terms, start["ema"])
    loss, gradients = theirs.update(lambda n: theirs.losses(terms.select(n)), N, steps=2)

    ours = iterate(run)
    close(torch.cat(judge.scores), torch.cat(scores), "scores")
    e, order = ours.experience, permutation(N, SEED, 0)
    assert len(e) == N
    close(e.states.x_t[e.index], terms.x[order], "x_t")
    close(e.x_prev, terms.child[order], "x_{t-1}")
    assert torch.equal(e.states.rows[e.index], terms.row[order])
    assert float(ours.record["loss"]) == pytest.approx(loss, abs=1e-10)
    compare(run, ours, theirs, gradients)
    assert 0 < theirs.clamped < terms.row.numel()  # the clamp is met, and not by all


# ------------------------------------------------------------------------------------------- labelled pairs


def labelled_pairs(folder: Path) -> list[tuple[str, Tensor, int]]:
    """Four pairs of 32 x 32 pictures in a folder: prompt, pixels (2, 3, H, W) of -1 and 1, which is preferred."""
    folder.mkdir()
    generator, found, lines = torch.Generator().manual_seed(2), [], []
    for number, preferred in enumerate((0, 1, 1, 0)):
        bits = torch.randint(0, 2, (2, 3, 32, 32), generator=generator)
        for j in range(2):
            picture = (bits[j] * 255).to(torch.uint8).permute(1, 2, 0).numpy()
            Image.fromarray(picture).save(folder / f"{number}_{j}.png")
        names = {f"image_{j}": f"{number}_{j}.png" for j in range(2)}
        labels = {f"label_{j}": float(j == preferred) for j in range(2)}
        lines.append(json.dumps({"prompt": f"picture {number}", **names, **labels}))
        found.append((f"picture {number}", bits.double() * 2 - 1, preferred))
    (folder / "pairs.jsonl").write_text("\n".join(lines))
    return found


DPO: dict[str, Any] = {
    "method": "dpo",
    "pairs": "pairs",
    "sample_batch_size": 4,
    "train_batch_size": 2,
    "validation_share": 0,
    "shuffle": False,
    "beta": 30.0,
    "height": 32,
    "width": 32,
    "prompts": None,
}


@pytest.mark.parametrize("kind", KINDS)
def test_diffusion_dpo_is_that_of_an_independent_loop(
    make: Callable[..., Run], directories: dict[str, Path], tmp_path: Path, kind: str
) -> None:
    """Noised by (1 - s) x0 + s e, compared with e - x0 in both networks' errors; no guidance."""
    pairs = labelled_pairs(tmp_path / "pairs")
    run = make(kind, **DPO)
    theirs, start = Theirs(run, directories[kind]), randomise(run)
    theirs.prompts = [prompt for prompt, *_ in pairs]
    theirs.set_steps(1000, even=True)
    number, vae, shape = torch.arange(4), theirs.pipe.vae, (4, 4, 4)
    with torch.no_grad():
        images = []
        for j in range(2):
            z = vae.encode(torch.stack([pixels[j] for _, pixels, _ in pairs])).latent_dist
            z = z.mean + z.std * noise(number, POSTERIOR, j, shape)
            images.append((z - vae.config.shift_factor) * vae.config.scaling_factor)
    best = torch.tensor([preferred for *_, preferred in pairs])
    x0 = torch.stack(images)[torch.stack([best, 1 - best]), number]  # (2, 4, C, h, w)
    row = 999 - torch.tensor([int(philox.integer(keys(number[n, None], TIMESTEPS, 0), 1000)) for n in range(4)])
    s, e = theirs.sigmas[row].view(4, 1, 1, 1), noise(number, RENOISE, 0, shape)

    def errors(n: Tensor) -> Tensor:  # (2, n)
        found = []
        for side in range(2):
            v = theirs.velocity((1 - s[n]) * x0[side, n] + s[n] * e[n], row[n], n, g=1.0)
            found.append(((e[n] - x0[side, n] - v) ** 2).mean((1, 2, 3)))
        return torch.stack(found)

    theirs.network.disable_adapters()
    with torch.no_grad():
        reference = errors(number)
    theirs.network.enable_adapters()
    theirs.fill(start["policy"])

    def losses(n: Tensor) -> Tensor:
        further = errors(n) - reference[:, n]
        return -F.logsigmoid(-run.cfg.objective.beta / 2 * (further[0] - further[1]))

    loss, gradients = theirs.update(losses, 4, steps=2)
    ours = iterate(run)
    run.pairs.close()
    assert float(ours.record["loss"]) == pytest.approx(loss, abs=1e-10) and abs(loss - math.log(2)) > 1e-3
    compare(run, ours, theirs, gradients)


# ------------------------------------------------------------------------------------------- what is evaluated


@pytest.mark.parametrize(
    ("kind", "method", "settings"),
    [
        ("sd35", "spo", {"threshold": -1, "branch_sigma": 0.9}),
        ("flux", "mspo", {"num_inner_steps": 1, "threshold": -1}),
        ("sd35", "d3po", {"threshold": -1, "branch_start": 1}),
        ("flux", "dpok", {"branch_start": 1}),
        ("flux", "dpok", {"branch_start": 1, "kl_weight": 0.0}),  # then the reference is not evaluated
    ],
)
def test_unique_states_are_evaluated_once(
    make: Callable[..., Run], kind: str, method: str, settings: dict[str, Any]
) -> None:
    """Rows through the network in each phase, pictures decoded, and states, against what they must be."""
    K, B, n = 3, len(PROMPTS), int(KINDS[kind]["num_steps"])
    run = make(kind, method=method, num_candidates=K, train_batch_size=100, mixed_precision="no", **settings)
    first, end = run.cfg.sample.first_branch, run.cfg.sample.last_branch
    assert end == n - 2 and end - first >= 2
    rows: dict[str, int] = {}
    phases: list[str] = []

    @contextlib.contextmanager
    def timer(phase: str) -> Iterator[None]:
        phases.append(phase)
        yield
        phases.pop()

    def count(module: Any, args: Any, output: tuple[Tensor]) -> None:
        rows[phases[-1]] = rows.get(phases[-1], 0) + len(output[0])

    run.policy.network.register_forward_hook(count)
    record = run.iterate(0, timer)
    halves, S = 2 if kind == "sd35" else 1, end - first
    rollout, states, images, references = {
        # what judged a candidate starts its next step
        "spo": (B * (first + 1) + K * B * S, B * S, K * B * S, 1),
        "mspo": (B * (first + 1) + K * B * S, B * (S + S // 2), K * B * -(-S // 2), 1),
        "d3po": (B * (first + 1) + K * B * (n - first - 1), B * (2 * S - 1), K * B, 1),
        "dpok": (K * B * n, K * B * S, K * B, 2 if settings.get("kl_weight", True) else 1),
    }[method]
    assert record is not None and (record["states"], record["images"]) == (states, images)
    expected = {"rollout": rollout, "reference": references * states, "backward": states}
    assert rows == {phase: halves * count for phase, count in expected.items()}


# ------------------------------------------------------------------------------------------- other ways to compute


def weights_after(run: Run, iterations: int) -> dict[str, Tensor]:
    randomise(run)
    for i in range(iterations):
        assert run.iterate(i, no_timer) is not None
    return {name: p.detach().clone() for name, p in zip(run.policy.names, run.policy.masters, strict=True)}


@pytest.mark.parametrize(("kind", "method"), [("sd35", "mspo"), ("flux", "ddpo")])
def test_fused_and_replayed_iterations_equal_plain_ones(
    make: Callable[..., Run], tmp_path: Path, kind: str, method: str
) -> None:
    """Iterations whose prompts, noise, weights and pairs change: as they are, by our ops, and by graphs of these."""
    settings: dict[str, Any] = {"num_steps": 6, "num_candidates": 2, "train_batch_size": 8, "branch_start": 2}
    settings |= {"num_inner_steps": 1, "threshold": 0.05} if method == "mspo" else {}
    found: dict[str, dict[str, Tensor]] = {}
    for how in ("plain", "fused", "fused and replayed"):
        run = make(kind, method=method, fuse="fused" in how, output_dir=tmp_path / how, **settings)
        randomise(run)
        if "replayed" in how:
            run.record_graphs(recorded.capture)
        # an iteration as it is, one that is recorded, and one of replays
        assert all(run.iterate(i, no_timer) is not None for i in range(3))
        assert ("replayed" in how) == ({"advance", "predict "} <= {key[0] for key in run.policy.graphs._captured})
        found[how] = {name: p.detach().clone() for name, p in zip(run.policy.names, run.policy.masters, strict=True)}
    for how, weights in found.items():
        for name, p in weights.items():
            close(p, found["plain"][name], f"{how}: {name}")


# ------------------------------------------------------------------------------------------- from the command line


RUNS: dict[str, dict[str, Any]] = {
    "spo": {"num_candidates": 2, "threshold": -1, "num_validation_images": 1},
    "mspo": {"num_candidates": 2, "num_inner_steps": 1, "threshold": -1},
    "d3po": {"threshold": -1},
    "gradspo": {"num_candidates": 2, "threshold": -1},
    "ddpo": {"num_candidates": 2},
    "dpok": {"num_candidates": 2},
    "dense": {"num_candidates": 3, "terms_per_prompt": 2},
    "dpo": DPO,
}


@pytest.mark.parametrize("method", RUNS)
def test_two_steps_from_the_command_line(
    directories: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    """Every method of flows, with the defaults that it brings."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    (tmp_path / "flow_scores.py").write_text(SCORES)
    if method == "dpo":
        labelled_pairs(tmp_path / "pairs")
    given = {"model": "sd35", "pretrained_model_name_or_path": directories["sd35"], "prompts": "prompts.txt"}
    given |= {**SETTINGS, "method": method, "num_steps": 6, "mixed_precision": "no", "output_dir": "run"}
    given |= {"max_train_steps": 2, **RUNS[method], "height": 32, "width": 32}
    if method == "dpo":
        del given["num_steps"]
    assert train.main(command_line(given)) == 0
    records = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert [r["optimizer_steps"] > 0 and math.isfinite(r["loss"]) and r["grad_norm"] > 0 for r in records] == [True] * 2
    weights = load_file(tmp_path / "run" / "checkpoint-2" / "trained.safetensors")
    assert any(bool(w.any()) for name, w in weights.items() if ".lora_B." in name)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"method": "lpo"}, "method=lpo is judged by a latent reward model, a UNet of SD-1.5 or SDXL"),
        ({"method": "mapo", "pairs": "pairs"}, "method=mapo weighs errors of predicted noise"),
        ({"scorer": "lrm"}, "scorer=lrm is a UNet of SD-1.5 or SDXL"),
    ],
)
@pytest.mark.parametrize("model", ["sd35", "flux", "toy-flow"])
def test_what_no_flow_has_is_refused_in_a_line(
    model: str, given: dict[str, Any], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train.main(command_line({"model": model, **given})) != 0
    error = capsys.readouterr().err.strip()
    assert says in error and model in error and len(error) <= 300 and "\n" not in error
