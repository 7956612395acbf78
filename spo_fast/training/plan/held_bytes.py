"""What a run holds throughout, and what its optimizer takes in a step: bytes of tensors that are never made."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from torch import Tensor

from spo_fast.config.sections import AdamConfig
from spo_fast.config.training import Config
from spo_fast.models.doors import flow_door
from spo_fast.models.merged import base_weight, lora_layers
from spo_fast.models.policy import Policy
from spo_fast.models.sharded import BUCKET
from spo_fast.training.plan.fake_networks import networks_of
from spo_fast.training.processes import sharing

if TYPE_CHECKING:
    from torch import nn

    from spo_fast.scorers.base import Scorer


def optimizer_state(masters: dict[str, Tensor], cfg: AdamConfig) -> Iterator[int]:
    """Bytes of each tensor: two moments a weight; in 8 bits with a float32 scale for each 256 weights. Prodigy keeps
    four, three of what begins as zeros."""
    for name, master in masters.items():
        n, copies = master.numel(), 4 - (".lora_B." in name) if cfg.optimizer == "prodigy" else 2
        eight_bit = cfg.optimizer.endswith("8bit") and n >= cfg.min_8bit_size
        yield from (n, n, 4 * -(-n // 256), 4 * -(-n // 256)) if eight_bit else [master.nbytes] * copies


class HeldBytes:
    """block: storages take multiples of so many bytes. together: an optimizer steps all weights at once, as on CUDA."""

    def __init__(self, block: int, together: bool):
        self.block, self.together = block, together

    def rounded(self, num_bytes: int) -> int:
        """What so many bytes take."""
        return -(-num_bytes // self.block) * self.block

    def of(self, tensors: Iterable[Tensor]) -> int:
        """What the tensors take."""
        return sum(self.rounded(t.nbytes) for t in tensors)

    def resident(self, cfg: Config, policy: Policy, vae: nn.Module, scorers: dict[str, Scorer]) -> dict[str, int]:
        """Part -> bytes held through the training."""
        trained, full = {id(p) for p in policy._weights}, cfg.adapter.full_finetune
        network = "UNet" if flow_door(policy.network) is None else "transformer"
        copies = [m for m, p in zip(policy.masters, policy._weights, strict=True) if sharing(cfg) > 1 or m is not p]
        rest = [t for t in _tensors(policy.network) if full or id(t) not in trained]
        merged = [base_weight(layer) for _, layer in lora_layers(policy.network)]
        state = optimizer_state(dict(zip(policy.names, _own(cfg, policy.masters), strict=True)), cfg.optim)
        weights = {name: [w for part in networks_of(s) for w in part.parameters()] for name, s in scorers.items()}
        held = {
            network: self.of(rest),
            "LoRA": 0 if full else self.of(policy._weights),
            "float32 masters": self.of(_own(cfg, copies)),
            "merged weights": 0 if full or cfg.sample.rollout_weights != "merged" else self.of(merged),
            "optimizer state": sum(map(self.rounded, state)),
            "moving averages": sum(self.of(average.tensors) for average in policy.kept.values()),
            "reference copy": self.of(_tensors(copy) if (copy := policy._frozen_copy) else policy._start or ()),
            "VAE": self.of(_tensors(vae)),
            **{f"scorer {name}": self.of(found) for name, found in weights.items()},
        }
        return {part: n for part, n in held.items() if n or part == "optimizer state"}

    def step(self, cfg: Config, masters: list[Tensor]) -> int:
        """What torch's AdamW allocates in a step: for all weights at once on CUDA, for each in turn on a CPU; sharded
        masters' gradients besides, and two buffers in which a bucket travels."""
        sizes = [self.of([part]) for part in _own(cfg, masters)]
        together = self.together or cfg.optim.optimizer == "schedulefree"
        adamw = sum(sizes) if together else 2 * max(sizes)
        travels = sum(sizes) + 2 * masters[0].element_size() * min(BUCKET, sum(m.numel() for m in masters))
        return (0 if cfg.optim.optimizer.endswith("8bit") else adamw) + (travels if sharing(cfg) > 1 else 0)


def _tensors(network: nn.Module) -> list[Tensor]:
    return [*network.parameters(), *network.buffers()]


def _own(cfg: Config, masters: list[Tensor]) -> list[Tensor]:
    """The largest process's rows of the masters, which are all of them unless they are sharded."""
    return [m.detach()[: -(-len(m) // sharing(cfg))] for m in masters]
