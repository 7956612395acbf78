"""How a frozen UNet that only draws is computed: fused, compiled, with the fastest attention."""

from __future__ import annotations

import functools
from collections.abc import Mapping

from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

from spo_fast.config.sections import ComputeConfig
from spo_fast.models import attention
from spo_fast.models.compile import compile_network
from spo_fast.models.device import Choice
from spo_fast.models.fuse import fuse


def pick_attention(
    unet: UNet2DConditionModel, cfg: ComputeConfig, rows: int, latent_shape: tuple[int, ...], tokens: int
) -> Choice:
    """The attention kernel that was asked for, or the fastest on a fused UNet's shapes at so many rows."""
    device, dtype = unet.device.type, unet.dtype
    shapes: Mapping[attention.Shape, int] = {}
    if cfg.attention == "auto" and device == "cuda":
        shapes = attention.shapes_of(unet, rows, latent_shape, tokens)
    timed = functools.partial(attention.time_on_gpu, dtype=dtype)
    return Choice("attention", *attention.pick(cfg.attention, shapes, device, dtype, cfg.compile != "off", timed))


def prepare_drawing(
    unet: UNet2DConditionModel, cfg: ComputeConfig, rows: int, latent_shape: tuple[int, ...], tokens: int
) -> Choice:  # of the attention kernel
    """Fuse, and compile if cfg says so, a frozen UNet that draws batches of one size, its LoRA on it."""
    fuse(unet.requires_grad_(False).eval())
    kernel = pick_attention(unet, cfg, rows, latent_shape, tokens)
    attention.attend_with(unet, attention.KERNELS[str(kernel.value)])
    if cfg.compile != "off":
        compile_network(unet, str(cfg.compile))
    return kernel
