"""Latent reward model (LRM, arXiv 2502.01051): a diffusion model judges its own noisy latents, no VAE, no up blocks.

The visual feature is what the down and mid blocks of a UNet make of x_t at its timestep: the mean over space of each
down block's output (before it is downsampled) and of the mid block's, concatenated and projected. Guidance sharpens the
mid block's mean alone: u + g (c - u); the down blocks' are those of the prompt's half. The text feature is the pooled
output of the diffusion model's own text encoder: SD-1.5's through a projection that OpenAI's CLIP brings, SDXL's second
encoder with its own. score = exp(logit_scale) * cos(visual, text), a logit as PickScore's (spm.py).

All of it was trained, text encoders included, so a reward model carries its own. Attribute names are the keys of the
published checkpoints (Kwai-Kolors/LPO); a published UNet's up blocks and output layers are dropped when it is read.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from spo_fast.ops.linear import take_linear
from spo_fast.scorers.latent_files import load_latent_reward
from spo_fast.scorers.latent_network import GUIDANCE_SCALE, LatentReward, Text

if TYPE_CHECKING:
    from spo_fast.method.experience import Candidates

TokenIds = Callable[[Sequence[str]], Sequence[Tensor]]


class LatentScorer:
    """LPO's scorer: noisy latents at their (parent's) timestep, before the UNet has seen them; final latents at 0.

    token_ids: prompts -> (P, L) int64 for each text encoder. decode_chunk latents go through it at a time.
    """

    judges = "children"

    def __init__(self, model: LatentReward, token_ids: TokenIds, guidance_scale: float = GUIDANCE_SCALE):
        self.model = take_linear(model.requires_grad_(False).eval())
        self.token_ids, self.guidance_scale = token_ids, guidance_scale
        self.empty = self.encode([""])

    @torch.no_grad()
    def encode(self, prompts: list[str]) -> Text:
        """Context (P, L, C) and feature (P, D) of the model's own text encoders."""
        device = self.model.logit_scale.device
        return self.model.encode([ids.to(device) for ids in self.token_ids(prompts)])

    @torch.no_grad()
    def __call__(self, candidates: Candidates) -> Tensor:  # (K*B,) float32, k-major
        """Of the noisy latents; of final ones, where there are none, at timestep 0."""
        x = candidates.x0 if candidates.x_t is None else candidates.x_t
        rows = torch.arange(len(x), device=x.device).split(candidates.decode_chunk)
        context, feature = candidates.text
        parts = [
            self.model.score(
                x[r], candidates.t.expand(len(r)), (context[r], feature[r]), self.empty, self.guidance_scale
            )
            for r in rows
        ]
        return torch.cat(parts)


def load_lrm(
    path: str | Path, token_ids: TokenIds, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32
) -> LatentScorer:
    """A latent reward model as a scorer (strict: see load_latent_reward)."""
    model = load_latent_reward(path, device=device, dtype=dtype)
    encoders = [model.text_encoder, model.text_encoder_2] if model.is_sdxl else [model.text_encoder]
    known, given = [len(e.text_model.embeddings.token_embedding.weight) for e in encoders], token_ids([""])
    if known != [int(ids.max()) + 1 for ids in given]:  # the end token is the last
        raise ValueError(
            f"{path} knows {known} tokens, the diffusion model's tokenizers {[int(i.max()) + 1 for i in given]}: "
            "it belongs to another --model. Give that model's latent reward model (--lrm_path)."
        )
    return LatentScorer(model, token_ids)
