"""How a run's networks are computed, beyond what they compute: compiled, and replayed from CUDA graphs."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from spo_fast.config.training import Config
from spo_fast.models.accelerate import pick_attention
from spo_fast.models.attention import KERNELS
from spo_fast.models.compile import Backend, compile_network, keep_cache_in
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
    policy = Policy(model.unet, cfg.adapter, cfg.run.seed)
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
    tokens = model.tokenizers[0].model_max_length
    choice = pick_attention(policy.unet, cfg.engine, rows, model.latent_shape, tokens)
    policy.attend_with(KERNELS[str(choice.value)])
    return [choice]


def recompute(policy: Policy, cfg: Config) -> None:
    """What of the forward the backward pass computes again, instead of keeping it; may be called again."""
    if cfg.optim.gradient_checkpointing:
        # nothing is random without dropout, and no generator's state can be read while a graph is recorded
        again = functools.partial(checkpoint, use_reentrant=False, preserve_rng_state=False)
        policy.unet.enable_gradient_checkpointing(again)
    else:
        policy.unet.disable_gradient_checkpointing()
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
    """torch.compile of all networks as cfg says; from then on the policy sees few batch sizes. cache: keep it here."""
    if cache is not None:
        keep_cache_in(cache)
    how = str(cfg.engine.compile)
    policy.batch_sizes = batch_sizes(cfg, 1)
    for unet in filter(None, (policy.unet, policy._frozen_copy)):
        compile_network(unet, how, backend=backend)
    if hasattr(vae, "decoder"):
        compile_network(vae.decoder, how, backend=backend)
    for part in parts_of(scorer):
        towers = getattr(part, "model", getattr(part, "clip", None))
        if isinstance(vision := getattr(towers, "vision_model", None), nn.Module):
            compile_network(vision, how, (Layer,), backend)


def batch_sizes(cfg: Config, parts: int) -> tuple[int, ...]:
    """Rising: a rollout's, and of the training the largest and equal parts of it."""
    sample, largest = cfg.sample, cfg.optim.states_at_once
    most = (sample.rows_per_forward or sample.rows_of_a_step) // (2 if sample.guidance_scale > 1 else 1)
    rollout = {min(most, n * sample.sample_batch_size) for n in (1, sample.num_candidates)}
    return tuple(sorted(rollout | {-(-largest * n // parts) for n in range(1, parts + 1)}))


def replayed(
    policy: Policy, decode: Callable[[Tensor], Tensor], scorer: Scorer, capture: Capture | None, cfg: Config
) -> Callable[[Tensor], Tensor]:
    """From now on calls whose shapes came before are replayed; returns the decoder to use.

    The first iteration runs as it is, until `policy.graphs.waits` is set to False.
    """
    policy.graphs = graphs = Graphs(capture, waits=True)
    graphs.first_calls_beside = not policy.batch_sizes
    if capture is not None and not policy.batch_sizes:
        policy.batch_sizes = batch_sizes(cfg, 8)  # a graph each
    for number, part in enumerate(parts_of(scorer)):
        if sees_pixels(part) and not getattr(part, "reads_device", False):
            part.score_pixels = graphs.wrap(f"score {number}", type(part).score_pixels.__get__(part))  # type: ignore[method-assign]
    return graphs.wrap("decode", decode)


def parts_of(scorer: Scorer) -> tuple[Scorer, ...]:
    """The scorers of a weighted sum, or the only one."""
    return getattr(scorer, "scorers", (scorer,))
