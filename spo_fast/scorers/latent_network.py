"""The network of a latent reward model: a UNet's encoder and its text encoders, turned into one score."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from spo_fast.scorers.clip import ClipConfig, TextTower, TowerConfig, unit

if TYPE_CHECKING:
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

GUIDANCE_SCALE = 7.5  # of the published models, in their training and in LPO; no checkpoint holds it
LOGIT_SCALE = 2.6592  # ln(1 / 0.07), where CLIP and the published training start
PIXELS_PER_LATENT = 8

Configs = Mapping[str, Mapping[str, Any]]
"""Name in PARTS -> its config.json: diffusers' of a UNet2DConditionModel, transformers' of a CLIPTextModel."""

Text = tuple[Tensor, Tensor]
"""Context (P, L, C) that the UNet attends to; feature (P, D), to be compared and, in SDXL, added to the timestep's."""


class TextEncoder(nn.Module):
    """CLIP's text tower as Stable Diffusion uses it: token states beside the pooled one."""

    def __init__(self, config: Mapping[str, Any], projected: bool):
        from transformers import CLIPTextConfig

        super().__init__()
        hf = CLIPTextConfig(**config)  # fills in what a config.json leaves out
        assert hf.layer_norm_eps is not None and hf.projection_dim is not None
        tower = TowerConfig(
            width=hf.hidden_size,
            mlp_width=hf.intermediate_size,
            num_layers=hf.num_hidden_layers,
            num_heads=hf.num_attention_heads,
            activation=hf.hidden_act,
            layer_norm_eps=hf.layer_norm_eps,
        )
        clip = ClipConfig(
            text=tower,
            vision=tower,  # a ClipConfig has one; it is not built
            vocab_size=hf.vocab_size,
            max_length=hf.max_position_embeddings,
            image_size=0,
            patch_size=1,
            projection_dim=hf.projection_dim,
            time_conditioned=False,
        )
        self.text_model = TextTower(clip)
        if projected:
            self.text_projection = nn.Linear(tower.width, hf.projection_dim, bias=False)

    def penultimate(self, ids: Tensor) -> Tensor:  # (P, L) -> (P, L, width), which no LayerNorm follows
        """States of the layer before the last."""
        x = self.text_model.embeddings(ids)
        for layer in self.text_model.encoder.layers[:-1]:
            x = layer(x, None)
        return x

    def last(self, x: Tensor, ids: Tensor) -> Text:  # penultimate (P, L, width) -> states (P, L, width), pooled (P, D)
        """Through the last layer and the final norm; pooled at the end token and projected, if it projects."""
        states = self.text_model.final_layer_norm(self.text_model.encoder.layers[-1](x, None))
        # the end token is the largest id, and padding comes after the first of them
        pooled = states[torch.arange(len(ids), device=ids.device), ids.argmax(dim=-1)]
        return states, self.text_projection(pooled) if hasattr(self, "text_projection") else pooled


class LatentReward(nn.Module):
    """LRM of an SD-1.5 (one text encoder) or an SDXL (two). Nothing in it waits for the device.

    configs: which decide the kind: with text_encoder_2 it is an SDXL.
    projection_dim: D, channels in which visual and text features are compared; SDXL's is its second encoder's.
    Every parameter takes a gradient but the end of SDXL's first text encoder, which no score depends on.
    For gradient checkpointing: `model.network.enable_gradient_checkpointing()`.
    """

    def __init__(self, configs: Configs, projection_dim: int):
        super().__init__()
        self.configs = configs
        self.is_sdxl = "text_encoder_2" in configs
        self.unet = _headless_unet(configs["unet"], self.is_sdxl)
        self.text_encoder = TextEncoder(configs["text_encoder"], projected=False)
        if self.is_sdxl:
            self.text_encoder_2 = TextEncoder(configs["text_encoder_2"], projected=True)
            tower = self.text_encoder.text_model
            tower.encoder.layers[-1].requires_grad_(False)
            tower.final_layer_norm.requires_grad_(False)
        else:
            width = self.text_encoder.text_model.final_layer_norm.normalized_shape[0]
            self.text_projection = nn.Linear(width, projection_dim, bias=False)
        channels = self.unet.config["block_out_channels"]
        self.visual_projection = nn.Linear(sum(channels) + channels[-1], projection_dim, bias=False)
        self.logit_scale = nn.Parameter(torch.tensor(LOGIT_SCALE))

    def encode(self, ids: Sequence[Tensor]) -> Text:
        """Prompts' context and feature (not normalised). ids: (P, L) int64 for each text encoder, in their order."""
        x = self.text_encoder.penultimate(ids[0])
        if not self.is_sdxl:
            context, pooled = self.text_encoder.last(x, ids[0])
            return context, self.text_projection(pooled)
        x_2 = self.text_encoder_2.penultimate(ids[1])
        return torch.cat([x, x_2], dim=-1), self.text_encoder_2.last(x_2, ids[1])[1]

    def visual_features(
        self,
        x_t: Tensor,  # (B, C, h, w)
        t: Tensor,  # (B,) int64
        text: Text,  # B rows
        empty: Text,  # 1 row
        guidance_scale: float = GUIDANCE_SCALE,
    ) -> Tensor:  # (B, D), not normalised
        """Of the noisy latents at their timestep; the mid block's guided away from the empty prompt."""
        num_images = len(x_t)
        if guidance_scale != 1:  # prompts first, then as many empty ones, in one pass
            x_t, t = x_t.repeat(2, 1, 1, 1), t.repeat(2)
            context, feature = (torch.cat([a, b.expand_as(a)]) for a, b in zip(text, empty, strict=True))
        else:
            context, feature = text
        *down, mid = (x.mean(dim=(2, 3), dtype=torch.float32) for x in self._block_outputs(x_t, t, context, feature))
        if guidance_scale != 1:
            cond, uncond = mid.chunk(2)
            mid = uncond + guidance_scale * (cond - uncond)
        pooled = torch.cat([*(x[:num_images] for x in down), mid], dim=-1)
        return self.visual_projection(pooled.to(self.visual_projection.weight.dtype))

    def _block_outputs(self, x_t: Tensor, t: Tensor, context: Tensor, feature: Tensor) -> list[Tensor]:
        """Each down block's output at its own resolution, then the mid block's: (B, channels, h', w')."""
        unet, dtype = self.unet, self.visual_projection.weight.dtype
        emb = unet.time_embedding(unet.time_proj(t).to(dtype))
        if self.is_sdxl:
            # original size, crop, target size: as published those of the native resolution, whatever x_t's
            sizes = torch.full((len(x_t), 6), PIXELS_PER_LATENT * unet.config["sample_size"], device=x_t.device)
            sizes[:, 2:4] = 0
            sizes_emb = unet.add_time_proj(sizes.flatten()).unflatten(0, (len(x_t), -1)).flatten(1)
            emb = emb + unet.add_embedding(torch.cat([feature, sizes_emb.to(dtype)], dim=-1))
        x, outputs = unet.conv_in(x_t.to(dtype)), []
        for block in unet.down_blocks:
            x, states = block(x, emb, **_attended(block, context))
            resnets = block.resnets
            assert isinstance(resnets, nn.ModuleList)
            outputs.append(states[len(resnets) - 1])  # one state a ResNet; a downsampled one may follow
        return [*outputs, unet.mid_block(x, emb, **_attended(unet.mid_block, context))]

    def score(
        self,
        x_t: Tensor,  # (B, C, h, w) noisy latents, in the diffusion model's scaling
        t: Tensor,  # (B,) int64 timesteps 0..999 (LPO gives children x_{t-1} their parent's)
        text: Text,  # what encode gave, one row an image
        empty: Text,  # 1 row, of the prompt ""
        guidance_scale: float = GUIDANCE_SCALE,
    ) -> Tensor:  # (B,) float32
        """exp(logit_scale) * cos(visual, text) for prompts encoded before. Guidance 1 runs no unconditional half."""
        visual = self.visual_features(x_t, t, text, empty, guidance_scale)
        return self.logit_scale.exp() * (unit(visual) * unit(text[1])).sum(dim=-1)

    def forward(
        self,
        x_t: Tensor,  # (K*P, C, h, w) noisy latents, k-major: image b is judged by prompt b % P; pairs are K = 2
        t: Tensor,  # (K*P,) int64
        ids: Sequence[Tensor],  # (P, L) int64 for each text encoder, the end token being the largest id
        empty_ids: Sequence[Tensor],  # (1, L) each: the prompt ""
        guidance_scale: float = GUIDANCE_SCALE,
    ) -> Tensor:  # (K*P,) float32
        """Scores in one pass of the text encoders and one of the UNet, both images of a pair and both halves in it."""
        num_prompts = len(ids[0])
        if not num_prompts or len(x_t) % num_prompts:
            raise ValueError(f"{len(x_t)} latents for {num_prompts} prompts: give K of them a prompt, k-major.")
        context, feature = self.encode([torch.cat(rows) for rows in zip(ids, empty_ids, strict=True)])
        num_candidates = len(x_t) // num_prompts
        text = context[:-1].repeat(num_candidates, 1, 1), feature[:-1].repeat(num_candidates, 1)
        return self.score(x_t, t, text, (context[-1:], feature[-1:]), guidance_scale)


def _attended(block: nn.Module, context: Tensor) -> dict[str, Tensor]:
    return {"encoder_hidden_states": context} if getattr(block, "has_cross_attention", False) else {}


def _headless_unet(config: Mapping[str, Any], is_sdxl: bool) -> UNet2DConditionModel:
    """diffusers' UNet without what follows its mid block; its other parts, and so their keys, stay where they are."""
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

    unet: UNet2DConditionModel = UNet2DConditionModel.from_config(dict(config))
    plain = {
        "addition_embed_type": "text_time" if is_sdxl else None,
        "class_embed_type": None,
        "encoder_hid_dim_type": None,
        "time_cond_proj_dim": None,
        "time_embedding_type": "positional",
        "center_input_sample": False,
    }
    odd = {key: unet.config[key] for key, value in plain.items() if unet.config[key] != value}
    if odd:
        raise ValueError(
            f"This UNet is conditioned as neither SD-1.5's nor, beside two text encoders, SDXL's: {odd}. "
            f"A latent reward model of {'two text encoders' if is_sdxl else 'one text encoder'} needs {plain}."
        )
    del unet.up_blocks, unet.conv_norm_out, unet.conv_act, unet.conv_out
    return unet
