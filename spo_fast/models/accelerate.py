"""How a frozen network that only draws is computed: fused, compiled, with the fastest attention."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping

import torch

from spo_fast.config.sections import ComputeConfig
from spo_fast.models import attention
from spo_fast.models.compile import compile_network
from spo_fast.models.device import Choice
from spo_fast.models.doors import Network, door_of
from spo_fast.models.fuse import fuse


def pick_attention(
    network: Network, cfg: ComputeConfig, rows: int, latent_shape: tuple[int, ...], tokens: int
) -> Choice:
    """The attention kernel that was asked for, or the fastest on a fused network's shapes at so many rows."""
    device, dtype = network.device.type, network.dtype
    shapes: Mapping[attention.Shape, int] = {}
    if cfg.attention == "auto" and device == "cuda":
        shapes = attention.shapes_of(network, blank_forward(network, rows, latent_shape, tokens))
    timed = functools.partial(attention.time_on_gpu, dtype=dtype)
    return Choice("attention", *attention.pick(cfg.attention, shapes, device, dtype, cfg.compile != "off", timed))


def blank_forward(network: Network, rows: int, latent_shape: tuple[int, ...], tokens: int) -> Callable[[], object]:
    """A forward of nothing but zeros, of so many rows and the prompts' tokens."""
    zeros = functools.partial(torch.zeros, dtype=network.dtype, device=network.device)
    door, t = door_of(network), torch.zeros((), dtype=torch.int64, device=network.device)
    inputs = {name: zeros(rows, *shape) for name, shape in door.shapes(network.config, tokens).items()}
    return lambda: door.predict(network, zeros(rows, *latent_shape), t, inputs)


def prepare_drawing(
    network: Network, cfg: ComputeConfig, rows: int, latent_shape: tuple[int, ...], tokens: int
) -> Choice:  # of the attention kernel
    """Fuse, and compile if cfg says so, a frozen network that draws batches of one size, its LoRA on it."""
    fuse(network.requires_grad_(False).eval())
    kernel = pick_attention(network, cfg, rows, latent_shape, tokens)
    attention.attend_with(network, attention.KERNELS[str(kernel.value)])
    if cfg.compile != "off":
        compile_network(network, str(cfg.compile))
    return kernel
