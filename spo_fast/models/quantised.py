"""`--base_weights`: the frozen network's transformers hold their linear layers in fewer bits. Inexact.

Policy and reference share the base, so their ratio still starts at 1, but it is another base: what that changes is
measured in the first iteration (diagnosis.base_errors), for which the weights stay in the CPU's memory until then.
Convolutions and the embeddings of time, 14 % of SDXL's weights, stay as they are.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, TypeGuard

import torch
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from torch import Tensor, nn

from spo_fast.config.optional_packages import missing_extra
from spo_fast.models.compile import FLOW_BLOCKS
from spo_fast.ops.linear import is_plain, linear
from spo_fast.ops.quantised import Quantised, quantise, quantised_linear

if TYPE_CHECKING:
    from transformers import PreTrainedModel

TRANSFORMERS = (Transformer2DModel, *FLOW_BLOCKS)
"""Whose linear layers are held in fewer bits: of a flow all that its blocks have, modulations too."""
MULTIPLE = 16  # of both sizes: what FP8's products take


class QuantisedLinear(nn.Linear):
    """A frozen linear layer whose weight is held in fewer bits."""

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
        return linear(x, weight, self.bias)


def import_for(how: str) -> None:
    """Raises ImportError, with the remedy, if what `how` needs is not installed. Never inside a fake mode."""
    if how == "nf4":
        try:
            import bitsandbytes  # noqa: F401  # its operators; it makes tables, which must be real
        except ImportError as error:
            raise ImportError(missing_extra("base_weights", how)) from error


def quantise_base(network: nn.Module, how: str) -> dict[QuantisedLinear, Tensor]:
    """In place, before `fuse` and after the LoRA is on; returns the layers and their weights, on the CPU."""
    transformers = [m for m in network.modules() if isinstance(m, TRANSFORMERS)]
    return {
        layer: _quantise(layer, how).cpu()  # type: ignore[misc]  # mypy does not see __class__ change
        for layer in (m for transformer in transformers for m in transformer.modules())
        if _fits(layer)
    }


def quantise_t5(encoder: PreTrainedModel, how: str) -> None:
    """A frozen T5's linear layers in place. Inexact.

    Layers that stay float32 beside float16 stay so here too: their sums overflow (files/networks.py).
    """
    for layer in encoder.modules():
        if _fits(layer) and layer.weight.dtype == encoder.dtype:
            _quantise(layer, how)


def _fits(layer: nn.Module) -> TypeGuard[nn.Linear]:
    """A frozen linear layer, so no LoRA's matrix, of sizes that can be multiplied."""
    if not is_plain(layer) or layer.weight.requires_grad:
        return False
    return not any(size % MULTIPLE for size in layer.weight.shape)


@torch.no_grad()
def _quantise(layer: nn.Linear, how: str) -> Tensor:
    """Makes it a QuantisedLinear; returns the weight that it was."""
    weight = layer.weight.detach()
    values, scale = quantise(weight, how)
    layer.__class__ = QuantisedLinear
    layer.weight = nn.Parameter(values, requires_grad=False)
    layer.register_buffer("weight_scale", scale)
    return weight


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
