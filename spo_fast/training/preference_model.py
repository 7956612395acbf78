"""What a preference model is trained by: the pair loss on predictions of x0, and the two kinds of model."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from spo_fast.method.experience import Cond
from spo_fast.method.renoise import noised
from spo_fast.method.schedule import StepTable
from spo_fast.models.diffusion import DiffusionModel
from spo_fast.models.doors import Network
from spo_fast.models.policy import denoise
from spo_fast.models.trained_weights import TrainedWeights
from spo_fast.ops.linear import take_linear
from spo_fast.scorers.clip import Clip, unit
from spo_fast.scorers.clip_files import save_clip
from spo_fast.scorers.latent_files import save_latent_reward
from spo_fast.scorers.latent_network import LatentReward
from spo_fast.scorers.spm import preprocess_for_spm_training
from spo_fast.training.pair_batches import Images

# ---------------------------------------------------------------------------------------------------- the loss


def pair_loss(
    text: Tensor,  # (B, D) unit features of the prompts
    images: Tensor,  # (2, B, D) unit features of the first and second images
    scale: Tensor,  # () factor of the cosines
    labels: Tensor,  # (B,) of the first image: 1 preferred, 0 not, 0.5 tie
    weights: Tensor,  # (B,) summing to 1 over the batch of an optimizer step
    in_batch_negatives: bool = False,
) -> Tensor:  # ()
    """Weighted cross-entropy of the preference; a tie's least possible loss, log 2, is taken off. spm_criterion.py.

    in_batch_negatives: each text chooses among all 2B images, and each preferred image among the B texts, averaged.
    """
    labels = torch.stack([labels, 1 - labels])  # (2, B)
    B = text.shape[0]
    if in_batch_negatives:
        logits = scale * images.flatten(0, 1) @ text.T  # (2B, B)
        own = torch.arange(B, device=text.device)
        by_text = -logits.T.log_softmax(1)  # (B, 2B)
        by_image = -logits.log_softmax(1).unflatten(0, (2, B))  # (2, B, B)
        loss = torch.stack([by_text[own, own], by_text[own, own + B]])
        loss = (labels * loss).sum(0) - ties(labels)
        loss = (loss + (labels * by_image[:, own, own]).sum(0)) / 2
    else:
        loss = (labels * -(scale * (images * text).sum(-1)).log_softmax(0)).sum(0) - ties(labels)
    return (loss * weights).sum()


LOG_2 = 0.693147182464599609375  # rounded to float32, as the published code has it whatever it computes in


def ties(labels: Tensor) -> Tensor:  # (2, B) -> (B,)
    """log 2 for ties, whose loss has its least there, else 0."""
    return (labels[0] == labels[1]) * LOG_2


# ---------------------------------------------------------------------------------------------------- what is seen


@torch.no_grad()
def predicted_x0(
    network: Network,
    table: StepTable,  # of all T timesteps that scorers are told, noisiest first
    x_t: Tensor,  # (2, B, C, h, w)
    t: Tensor,  # (B,) int64 of those
    cond: Cond,  # of the B prompts
    guidance_scale: float,
) -> Tensor:  # (2, B, C, h, w) float32
    """What the diffusion model makes of both images of each pair: one UNet forward, both guidance halves in it."""
    B = t.shape[0]
    both = torch.arange(B, device=t.device).repeat(2)
    rows = table.num_steps - 1 - t.repeat(2)
    m = denoise(network, x_t.flatten(0, 1), table.timesteps[rows], cond.select(both), guidance_scale > 1)
    guided = m.cond.float()
    if m.uncond is not None:
        guided = m.uncond.float() + guidance_scale * (guided - m.uncond.float())
    c, d = table.coefficients[rows, 2:4].to(guided.dtype).T.view(2, -1, 1, 1, 1)
    return (c * x_t.flatten(0, 1) + d * guided).unflatten(0, (2, B))


FIDELITY_EPSILON = 1e-6


def thurstone_loss(scores: Tensor, sigma: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
    """DiNa-LRM's: noisier latents decide less. scores (2, B), sigma (B,), labels and weights (B,) as pair_loss's.

    P(first is better) = Phi((s_1 - s_2) / sqrt(2 v)), v = 2 sigma^2 + .05, and the loss is 1 less the fidelity of P and
    the label, sqrt(P label) + sqrt((1 - P) (1 - label)). HKUST-C4G/diffusion-rm has labels of 0 and 1.
    """
    gap = (scores[0] - scores[1]) / (2 * (2 * sigma**2 + 0.05) + FIDELITY_EPSILON).sqrt()
    wins = torch.special.ndtr(torch.stack([gap, -gap]))
    fidelity = (torch.stack([labels, 1 - labels]).sqrt() * (wins + FIDELITY_EPSILON).sqrt()).sum(0)
    return ((1 - fidelity) * weights).sum()


class Comparison(Protocol):
    """What a preference model makes of both images of B pairs."""

    @property
    def scores(self) -> Tensor:
        """(2, B)."""
        ...

    @property
    def gap(self) -> Tensor:
        """(B,) by how much the first is better."""
        ...

    def loss(self, labels: Tensor, weights: Tensor, in_batch_negatives: bool) -> Tensor:
        """(), of labels and weights (B,) as pair_loss's."""
        ...

    def facts(self) -> dict[str, Tensor]:
        """What to log of it."""
        ...


class Cosines(NamedTuple):
    """Of text and image features."""

    text: Tensor  # (B, D) unit vectors
    images: Tensor  # (2, B, D)
    scale: Tensor  # ()

    @property
    def scores(self) -> Tensor:
        """Scaled cosines."""
        return self.scale * (self.images * self.text).sum(-1)

    @property
    def gap(self) -> Tensor:
        """Of the cosines."""
        return (self.images[0] - self.images[1]).mul(self.text).sum(-1)

    def loss(self, labels: Tensor, weights: Tensor, in_batch_negatives: bool) -> Tensor:
        """pair_loss."""
        return pair_loss(self.text, self.images, self.scale, labels, weights, in_batch_negatives)

    def facts(self) -> dict[str, Tensor]:
        """The factor, which is trained."""
        return {"logit_scale": self.scale.detach()}


class NoisyScores(NamedTuple):
    """Of latents noised to sigma."""

    scores: Tensor  # (2, B)
    sigma: Tensor  # (B,)

    @property
    def gap(self) -> Tensor:
        """Of the scores."""
        return self.scores[0] - self.scores[1]

    def loss(self, labels: Tensor, weights: Tensor, in_batch_negatives: bool) -> Tensor:
        """thurstone_loss."""
        return thurstone_loss(self.scores, self.sigma, labels, weights)

    def facts(self) -> dict[str, Tensor]:
        """None."""
        return {}


class Reward(Protocol):
    """A trainable preference model."""

    weights: TrainedWeights

    def see(
        self,
        images: Images,
        t: Tensor,  # (B,) int64
        noise: Tensor | None,  # (2, B, C, h, w); None: the images themselves
    ) -> Tensor:
        """What it judges, without gradient."""
        ...

    def compare(self, seen: Tensor, t: Tensor, prompts: list[str]) -> Comparison:
        """Both images of B pairs in one forward; float32."""
        ...

    def save(self, directory: Path) -> None:
        """The float32 masters in the published key layout."""
        ...


class PixelReward:
    """A CLIP that sees decoded predictions of x0: the SPM, or without time conditioning its ablation and PickScore."""

    def __init__(self, clip: Clip, model: DiffusionModel, guidance_scale: float, decode_chunk: int):
        self.clip, self.model, self.guidance_scale, self.decode_chunk = clip, model, guidance_scale, decode_chunk
        take_linear(clip)
        self.table = model.judged_table()
        self.weights = TrainedWeights(list(clip.named_parameters()))

    @torch.no_grad()
    def see(self, images: Images, t: Tensor, noise: Tensor | None) -> Tensor:  # (2B, 3, S, S)
        """The images, or what the diffusion model predicts of them noised to t, at the CLIP's size."""
        size = self.clip.config.image_size
        if noise is None:
            assert images.pixels is not None
            return preprocess_for_spm_training(images.pixels.flatten(0, 1), size)
        assert images.latents is not None
        x_t = noised(self.table, images.latents, self.table.num_steps - 1 - t, noise)
        cond = self.model.cond(images.prompts)
        x0 = predicted_x0(self.model.network, self.table, x_t, t, cond, self.guidance_scale).flatten(0, 1)
        chunks = x0.split(self.decode_chunk)
        return torch.cat([preprocess_for_spm_training(self.model.decode(x), size) for x in chunks])

    def compare(self, seen: Tensor, t: Tensor, prompts: list[str]) -> Cosines:
        """By the CLIP, told t if it is time-conditioned."""
        ids = self.model.tokenize(prompts).to(seen.device)
        image, text = self.clip(seen, ids, t.repeat(2) if self.clip.config.time_conditioned else None)
        return Cosines(text, image.unflatten(0, (2, len(prompts))), self.clip.logit_scale.exp())

    def save(self, directory: Path) -> None:
        """As transformers' CLIPModel has it; time conditioning under the SPM's names."""
        save_clip(self.clip, directory, self.weights.whole())


class NoisyLatentReward:
    """The latent reward model of LPO: it sees x_t."""

    def __init__(self, network: LatentReward, model: DiffusionModel, guidance_scale: float):
        self.network, self.model, self.guidance_scale = take_linear(network), model, guidance_scale
        self.table = model.judged_table()
        self.weights = TrainedWeights([(name, p) for name, p in network.named_parameters() if p.requires_grad])

    @torch.no_grad()
    def see(self, images: Images, t: Tensor, noise: Tensor | None) -> Tensor:  # (2B, C, h, w)
        """The latents noised to t."""
        assert images.latents is not None and noise is not None
        return noised(self.table, images.latents, self.table.num_steps - 1 - t, noise).flatten(0, 1)

    def compare(self, seen: Tensor, t: Tensor, prompts: list[str]) -> Cosines:
        """Guided by the empty prompt, as the scorer is."""
        ids = [rows.to(seen.device) for rows in self.model.token_ids([*prompts, ""])]
        context, feature = self.network.encode(ids)
        both = context[:-1].repeat(2, 1, 1), feature[:-1].repeat(2, 1)
        empty = context[-1:], feature[-1:]
        visual = self.network.visual_features(seen, t.repeat(2), both, empty, self.guidance_scale)
        images = unit(visual).unflatten(0, (2, len(prompts)))
        return Cosines(unit(feature[:-1]), images, self.network.logit_scale.exp())

    def save(self, directory: Path) -> None:
        """As LPO's repository has it."""
        save_latent_reward(self.network, directory, self.weights.whole())
