"""The policy's weights with the LoRA added in, in a second storage: the rollout's network without the LoRA's products.

16-bit weights are rounded stochastically (ops/merge_lora.py says why); the base is never written, so leaving the block
restores it bit for bit, and the storages keep their addresses, so that CUDA graphs see the next merge.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping

import torch
from peft.tuners.lora.layer import LoraLayer
from torch import Tensor, nn

from spo_fast.method.noise import MERGE
from spo_fast.ops.merge_lora import merge_lora


def lora_layers(unet: nn.Module) -> Iterator[tuple[str, LoraLayer]]:
    """(name, PEFT layer) of every layer with a LoRA."""
    for name, layer in unet.named_modules():
        if isinstance(layer, LoraLayer) and "default" in layer.scaling:
            yield name, layer


def base_weight(layer: LoraLayer) -> Tensor:
    """The frozen weight that a LoRA is added to."""
    weight = layer.get_base_layer().weight
    assert isinstance(weight, Tensor)
    return weight


class MergedWeights:
    """Storages for the merged weights of a network's LoRA layers."""

    def __init__(self, unet: nn.Module, masters: Mapping[str, Tensor]):
        """masters: float32 LoRA matrices by name in the network. ValueError for types it cannot round to."""
        self.layers: list[tuple[Tensor, Tensor, Tensor, float, Tensor]] = []
        for name, layer in lora_layers(unet):
            weight = base_weight(layer)
            if weight.dtype not in (torch.float32, torch.bfloat16, torch.float16):
                raise ValueError(f"{name} is {weight.dtype}: merged weights need --mixed_precision no, bf16 or fp16.")
            lora_A, lora_B = (masters[f"{name}.{part}.default.weight"] for part in ("lora_A", "lora_B"))
            storage = torch.empty(weight.shape, dtype=weight.dtype, device=weight.device)
            self.layers.append((weight, lora_A, lora_B, layer.scaling["default"], storage))

    @torch.no_grad()
    def merge(self, seed: int, iteration: int) -> None:
        """Fill the storages from the masters; the rounding is a function of (seed, iteration, layer)."""
        if not self.layers:
            return
        keys = torch.zeros(len(self.layers), 5, dtype=torch.int64, device=self.layers[0][0].device)
        keys[:, 0], keys[:, 1], keys[:, 3] = seed, iteration, MERGE
        keys[:, 2] = torch.arange(len(keys), device=keys.device)
        for key, (weight, lora_A, lora_B, scale, storage) in zip(keys, self.layers, strict=True):
            # a convolution's LoRA is a product too: B is 1x1, A has the kernel
            out = storage.flatten(1)
            merge_lora(weight.flatten(1), lora_A.flatten(1), lora_B.flatten(1), scale, key, out=out)

    @contextlib.contextmanager
    def swapped_in(self) -> Iterator[None]:
        """Inside, the layers' own weights are the merged ones."""
        bases = [weight.data for weight, *_ in self.layers]
        for weight, *_, storage in self.layers:
            weight.data = storage
        try:
            yield
        finally:
            for (weight, *_), base in zip(self.layers, bases, strict=True):
                weight.data = base
