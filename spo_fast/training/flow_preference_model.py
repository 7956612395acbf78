"""A flow's latent judge as it is trained."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from spo_fast.method.flow_schedule import flow_table
from spo_fast.method.renoise import noised
from spo_fast.models.flow import FlowModel
from spo_fast.models.trained_weights import TrainedWeights
from spo_fast.scorers.dina import save_dina, text_of
from spo_fast.scorers.dina_network import DinaReward
from spo_fast.training.pair_batches import Images
from spo_fast.training.preference_model import NoisyScores


class FlowLatentReward:
    """DiNa-LRM: it sees a flow's x_t. t stands for sigma = (t + 1) / 1000, so that those drawn are even in sigma."""

    def __init__(self, network: DinaReward, model: FlowModel):
        self.network, self.model = network, model
        sigmas = torch.arange(1000, -1, -1, dtype=torch.float64) / 1000
        self.table = flow_table(sigmas, 0.0).to(model.device)
        self.weights = TrainedWeights([(name, p) for name, p in network.named_parameters() if p.requires_grad])

    @torch.no_grad()
    def see(self, images: Images, t: Tensor, noise: Tensor | None) -> Tensor:  # (2B, C, h, w)
        """The latents noised to t."""
        assert images.latents is not None and noise is not None
        return noised(self.table, images.latents, self.table.num_steps - 1 - t, noise).flatten(0, 1)

    def compare(self, seen: Tensor, t: Tensor, prompts: list[str]) -> NoisyScores:
        """By the network, without guidance, of which it gains nothing (its authors)."""
        sigma = (t + 1).float() / 1000
        context, pooled = (torch.cat([part, part]) for part in text_of(self.model.cond(prompts)))
        scores = self.network(seen, sigma.repeat(2), (context, pooled))
        return NoisyScores(scores.unflatten(0, (2, len(prompts))), sigma)

    def save(self, directory: Path) -> None:
        """As HKUST-C4G/diffusion-rm has it."""
        save_dina(self.network, directory, self.weights.state_dict())
