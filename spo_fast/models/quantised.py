"""`--base_weights`: the frozen network's transformer blocks hold their linear layers in fewer bits. Inexact.

Policy and reference share the base, so their ratio still starts at 1, but it is another base: what that changes is
measured in the first iteration (diagnosis.base_errors), for which the weights stay in the CPU's memory until then.
Convolutions and the embeddings of time, 14 % of SDXL's weights, stay as they are; of SD3.5's and FLUX's, what lies
outside their blocks.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from diffusers.models.attention import JointTransformerBlock
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from diffusers.models.transformers.transformer_flux import FluxSingleTransformerBlock, FluxTransformerBlock
from torch import Tensor, nn

from spo_fast.config.optional_packages import missing_extra
from spo_fast.ops.quantised import Quantised, quantise, quantised_linear

HOLDERS = (Transformer2DModel, JointTransformerBlock, FluxTransformerBlock, FluxSingleTransformerBlock)
"""Whose linear layers they are."""
MULTIPLE = 16  # of both sizes: what FP8's products take


class QuantisedLinear(nn.Linear):
    """A frozen linear layer whose weight is held in 8 bits."""

    weight_scale: Tensor
    full: Tensor | None = None
    """The weight as it was, while a comparison computes with it."""

    @property
    def frozen_weight(self) -> Tensor | Quantised:
        """The weight to compute with."""
        if self.full is not None:
            return self.full.to(self.weight.device)
        return Quantised(self.weight, self.weight_scale)

    def forward(self, x: Tensor) -> Tensor:
        """W x + b with the weight as it is held."""
        weight = self.frozen_weight
        if isinstance(weight, Quantised):
            return quantised_linear(x, weight, self.bias)
        return F.linear(x, weight, self.bias)


def import_for(how: str) -> None:
    """Raises ImportError, with the remedy, if what `how` needs is not installed. Never inside a fake mode."""
    if how == "nf4":
        try:
            import bitsandbytes  # noqa: F401  # its operators; it makes tables, which must be real
        except ImportError as error:
            raise ImportError(missing_extra("base_weights", how)) from error


@torch.no_grad()
def quantise_base(network: nn.Module, how: str) -> dict[QuantisedLinear, Tensor]:
    """In place, before `fuse` and after the LoRA is on; returns the layers and their weights, on the CPU."""
    holders = [m for m in network.modules() if isinstance(m, HOLDERS)]
    full = {}
    for layer in (m for holder in holders for m in holder.modules() if type(m) is nn.Linear):
        if layer.weight.requires_grad or any(size % MULTIPLE for size in layer.weight.shape):
            continue  # a LoRA's matrix, or one that does not fit
        weight = layer.weight.detach()
        values, scale = quantise(weight, how)
        layer.__class__ = QuantisedLinear
        layer.weight = nn.Parameter(values, requires_grad=False)
        layer.register_buffer("weight_scale", scale)
        full[layer] = weight.cpu()
    return full  # type: ignore[return-value]  # mypy does not see __class__ change


@contextlib.contextmanager
def in_full(weights: dict[QuantisedLinear, Tensor]) -> Iterator[None]:
    """Inside, the layers compute with these weights, brought to the device one at a time, uncompiled."""
    for layer, weight in weights.items():
        layer.full = weight
    try:
        with torch.compiler.set_stance("force_eager"):
            yield
    finally:
        for layer in weights:
            layer.full = None
