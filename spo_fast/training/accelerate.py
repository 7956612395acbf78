"""How a run's networks are computed, beyond what they compute: compiled, and replayed from CUDA graphs."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from spo_fast.config.training import Config
from spo_fast.method.objectives import make_objective
from spo_fast.method.rollout import trajectory_rollout
from spo_fast.models.accelerate import pick_attention
from spo_fast.models.attention import KERNELS
from spo_fast.models.compile import Backend, compile_network, keep_cache
from spo_fast.models.device import Choice
from spo_fast.models.diffusion import DiffusionModel
from spo_fast.models.fuse import fuse
from spo_fast.models.graphs import Capture, CudaCapture, Graphs
from spo_fast.models.policy import Policy
from spo_fast.scorers.base import Scorer, sees_pixels
from spo_fast.scorers.clip import Layer

if TYPE_CHECKING:
    from spo_fast.models.files.load import VAE


def make_policy(model: DiffusionModel, cfg: Config, processes: int) -> tuple[Policy, list[Choice]]:
    """The model's UNet as cfg has it trained, stored and computed, and the attention kernel that was picked."""
    policy = Policy(model.network, cfg.adapter, cfg.run.seed)
    return policy, set_up(policy, model, cfg, processes)


def set_up(policy: Policy, model: DiffusionModel, cfg: Config, processes: int = 1) -> list[Choice]:
    """How cfg has the policy, and the model's VAE, stored and computed. Returns what was picked."""
    if cfg.adapter.full_finetune and processes > 1:
        policy.shard()
    if cfg.engine.base_weights != "full":
        policy.quantise(cfg.engine.base_weights)
    recompute(policy, cfg)
    if not cfg.engine.fuse:
        return []
    fuse(model.vae)
    rows = cfg.optim.states_at_once * (2 if cfg.sample.guidance_scale > 1 else 1)
    choice = pick_attention(policy.network, cfg.engine, rows, model.latent_shape, model.text_tokens)
    policy.attend_with(KERNELS[str(choice.value)])
    return [choice]


def recompute(policy: Policy, cfg: Config) -> None:
    """What of the forward the backward pass computes again, instead of keeping it; may be called again."""
    if cfg.optim.gradient_checkpointing:
        # nothing is random without dropout, and no generator's state can be read while a graph is recorded
        again = functools.partial(checkpoint, use_reentrant=False, preserve_rng_state=False)
        policy.network.enable_gradient_checkpointing(again)
    else:
        policy.network.disable_gradient_checkpointing()
    if cfg.engine.fuse:
        policy.fuse(recompute=cfg.engine.memory == "balanced")


def capture_for(cfg: Config, device: torch.device) -> Capture | None:
    """Of CUDA graphs, where there are some and cfg wants them."""
    return CudaCapture(device) if device.type == "cuda" and cfg.engine.cuda_graphs else None


def compile_networks(
    policy: Policy,
    vae: VAE,
    scorer: Scorer,
    cfg: Config,
    backend: str | Backend = "inductor",
    cache: Path | None = None,
) -> None:
    """torch.compile of all networks as cfg says; from then on they see few batch sizes. cache: as keep_cache has it."""
    if cache is not None:
        print(f"compiled networks are kept in {keep_cache(cache)}")
    how = str(cfg.engine.compile)
    policy.batch_sizes, pictures = batch_sizes(cfg)
    policy.state_sizes = state_sizes(cfg)
    for unet in filter(None, (policy.network, policy._frozen_copy)):
        compile_network(unet, how, backend=backend)
    if hasattr(vae, "decoder"):
        compile_network(vae.decoder, how, backend=backend, sizes=pictures)
    for part in parts_of(scorer):
        towers = getattr(part, "model", getattr(part, "clip", None))
        if isinstance(vision := getattr(towers, "vision_model", None), nn.Module):
            compile_network(vision, how, (Layer,), backend, pictures)


def batch_sizes(cfg: Config) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """All that a compiled run draws, each rising: of latents at one timestep, of pictures. Every one comes in a first
    iteration."""
    sample, objective, chunk = cfg.sample, make_objective(cfg.objective), cfg.model.images_per_decode
    B, K, shown = sample.sample_batch_size, sample.num_candidates, min(chunk, cfg.run.num_validation_images)
    at_once = (sample.rows_per_forward or sample.rows_of_a_step) // (2 if sample.guidance_scale > 1 else 1)
    drawn, judged = {B, K * B}, {min(chunk, K * B), K * B % chunk}
    if objective.samples_from == "data":
        drawn = judged = {shown}
    elif objective.rollout is trajectory_rollout:
        drawn = {K * B, shown}
    a, b = (tuple(sorted(sizes - {0})) for sizes in ({min(at_once, size) for size in drawn}, judged))
    return a, b


def state_sizes(cfg: Config, parts: int = 1) -> tuple[int, ...]:
    """Of an experience's states in one forward, whatever pairs are kept: the most, and so many equal parts of it."""
    most = max(cfg.optim.states_at_once, math.prod(make_objective(cfg.objective).shape))
    return tuple(sorted({-(-most * n // parts) for n in range(1, parts + 1)}))


def replayed(
    policy: Policy, decode: Callable[[Tensor], Tensor], scorer: Scorer, capture: Capture | None, cfg: Config
) -> Callable[[Tensor], Tensor]:
    """From now on calls whose shapes came before are replayed; returns the decoder to use.

    The first iteration runs as it is, until `policy.graphs.waits` is set to False.
    """
    policy.graphs = graphs = Graphs(capture, waits=True)
    graphs.first_calls_beside = not policy.state_sizes
    if capture is not None and not policy.state_sizes:
        policy.state_sizes = state_sizes(cfg, 8)  # a graph each
    for number, part in enumerate(parts_of(scorer)):
        if sees_pixels(part) and not getattr(part, "reads_device", False):
            part.score_pixels = graphs.wrap(f"score {number}", type(part).score_pixels.__get__(part))  # type: ignore[method-assign]
    return graphs.wrap("decode", decode)


def parts_of(scorer: Scorer) -> tuple[Scorer, ...]:
    """The scorers of a weighted sum, or the only one."""
    return getattr(scorer, "scorers", (scorer,))
