"""The network of DiNa-LRM (arXiv 2602.11146): a flow's first transformer blocks and a head judge noisy latents.

Features are the states of picture and text after some of SD3's blocks, which a LoRA tunes. The head scales each by what
the network is told of time, lays them side by side, and a few queries attend to them: the mean of their scores is the
judgement. Attribute names are the keys of the published checkpoints (HKUST-C4G/diffusion-rm).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

if TYPE_CHECKING:
    from diffusers.models.transformers.transformer_sd3 import SD3Transformer2DModel

LORA_TARGETS = ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
OF_TEXT = LORA_TARGETS[4:]
Text = tuple[Tensor, Tensor]
"""Context (B, L, C) and pooled prompt (B, P), as the diffusion model itself is told them."""


@dataclass(frozen=True)
class DinaSettings:
    """`model` of the published config.json, as far as it decides the network; the defaults are SD3.5-medium's."""

    num_transformer_layers: int = 12
    visual_head_idx: tuple[int, ...] = (4, 8, 12)
    """Blocks after which the picture's states are features; 0: before the first."""
    text_head_idx: tuple[int, ...] = (4, 8, 12)
    rank: int = 64
    alpha: float = 128
    width: int = -1
    """Channels of the head; -1: those of a block."""
    num_queries: int = 4
    num_attn_heads: int = 8
    use_proj_in: bool = False

    @classmethod
    def of_blocks(cls, num_layers: int, width: int) -> DinaSettings:
        """Half of a network's blocks and three features, as published for 24 blocks."""
        half = max(1, num_layers // 2)
        after = tuple(sorted({-(-half * i // 3) for i in (1, 2, 3)}))
        heads = next(n for n in (8, 5, 4, 3, 2, 1) if width % n == 0)
        return cls(half, after, after, num_attn_heads=heads)

    @classmethod
    def read(cls, model: Mapping[str, Any], name: str) -> DinaSettings:
        """From `model` of a config.json. Raises ValueError for what is another network."""
        other = {"freeze_backbone": True, "use_lora": False, "use_logistic": True}
        odd = next((f"{key}={model[key]}" for key, value in other.items() if model.get(key) == value), None)
        if odd:
            raise ValueError(f"{name} has {odd}: read here are judges with a LoRA and a plain head.")
        try:
            lora, head = model["lora_config"], model["reward_head"]
            found = {**head, **model, "rank": lora["r"], "alpha": lora["lora_alpha"]}
            settings = {f.name: found[f.name] for f in fields(cls) if f.name in found}
            after = {key: tuple(found[key]) for key in ("visual_head_idx", "text_head_idx")}
            return cls(**settings | after)
        except (KeyError, TypeError) as error:
            raise ValueError(f"{name} is no DiNa-LRM's: its `model` lacks or misstates {error}.") from error

    def written(self) -> dict[str, Any]:
        """`model` of a config.json that the published code reads."""
        own = asdict(self)
        head = {key: own.pop(key) for key in ("width", "num_queries", "num_attn_heads", "use_proj_in")}
        lora = {"r": own.pop("rank"), "lora_alpha": own.pop("alpha"), "init_lora_weights": "gaussian"}
        kinds = {"model_type": "thurstone", "freeze_backbone": False, "use_lora": True, "use_logistic": False}
        return {
            **kinds,
            "use_text_features": True,
            "use_t_embed": True,
            **own,
            "lora_config": lora,
            "reward_head": head,
        }


class Backbone(nn.Module):
    """What comes before an SD3's blocks, and the first of them."""

    def __init__(self, transformer: SD3Transformer2DModel, settings: DinaSettings):
        super().__init__()
        count, wanted = len(transformer.transformer_blocks), settings.num_transformer_layers
        after = (*settings.visual_head_idx, *settings.text_head_idx)
        if not settings.visual_head_idx or not 0 <= min(after) <= max(after) <= wanted <= count:
            raise ValueError(
                f"features after blocks {after} of {wanted}, but the network has {count}: another model's."
            )
        if transformer.transformer_blocks[wanted - 1].context_pre_only and wanted in settings.text_head_idx:
            raise ValueError(f"block {wanted} is the network's last, which gives no text: take fewer blocks.")
        self.pos_embed, self.time_text_embed = transformer.pos_embed, transformer.time_text_embed
        self.context_embedder = transformer.context_embedder
        self.transformer_blocks = transformer.transformer_blocks[:wanted]

    def forward(self, x: Tensor, t: Tensor, text: Text) -> tuple[list[Tensor], list[Tensor], Tensor]:
        """States of picture and text before and after every block, and the embedding of time and pooled prompt."""
        picture, words = self.pos_embed(x), self.context_embedder(text[0])
        temb = self.time_text_embed(t, text[1])
        pictures, texts = [picture], [words]
        for block in self.transformer_blocks:
            words, picture = block(hidden_states=picture, encoder_hidden_states=words, temb=temb)
            pictures.append(picture)
            texts.append(words)
        return pictures, texts, temb


class LayerAdapter(nn.Module):
    """One block's states, scaled and shifted by time, in a quarter of the head's channels."""

    def __init__(self, channels: int, width: int, use_proj_in: bool):
        super().__init__()
        self.proj_in = nn.Linear(channels, width) if channels != width or use_proj_in else nn.Identity()
        self.layer_embed = nn.Parameter(0.02 * torch.randn(1, 1, width))
        self.cond_mlp = nn.Sequential(nn.Linear(channels, 2 * width), nn.SiLU(), nn.Linear(2 * width, 2 * width))
        self.proj = nn.Linear(width, width // 4)
        _zero(self.cond_mlp[2])

    def forward(self, x: Tensor, temb: Tensor) -> Tensor:  # (B, N, C), (B, C) -> (B, N, width / 4)
        """Nothing is scaled or shifted before training."""
        scale, shift = self.cond_mlp(temb)[:, None].chunk(2, dim=-1)
        out: Tensor = self.proj(self.proj_in(x) * (1 + scale) + shift + self.layer_embed)
        return out


class GatedAttention(nn.Module):
    """Queries attend to the picture and, added up, to the text; gated, each token's value has a weight of its own."""

    def __init__(self, width: int, num_heads: int, text: bool, gated: bool):
        super().__init__()
        self.num_heads, kinds = num_heads, ("vis", "text") if text else ("vis",)
        self.norm_q, self.norm_v = nn.RMSNorm(width), nn.RMSNorm(width)
        if text:
            self.norm_t = nn.RMSNorm(width)
        self.to_q, self.to_out = nn.Linear(width, width), nn.Sequential(nn.Linear(width, width))
        for kind in kinds:
            setattr(self, f"to_k_{kind}", nn.Linear(width, width))
            setattr(self, f"to_v_{kind}", nn.Linear(width, width))
            if gated:
                gate = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, 1))
                _zero(gate[2])
                setattr(self, f"gate_{kind}", gate)

    def forward(self, queries: Tensor, picture: Tensor, text: Tensor | None = None) -> Tensor:  # (B, Q, D), (B, N, D)
        """Queries with what they found added."""
        q = self._heads(self.to_q(self.norm_q(queries)))
        found = self._attend(q, self.norm_v(picture), "vis")
        if text is not None:
            found = found + self._attend(q, self.norm_t(text), "text")
        out: Tensor = queries + self.to_out(found.transpose(1, 2).flatten(2))
        return out

    def _attend(self, q: Tensor, tokens: Tensor, kind: str) -> Tensor:
        values = getattr(self, f"to_v_{kind}")(tokens)
        if hasattr(self, f"gate_{kind}"):
            values = values * getattr(self, f"gate_{kind}")(tokens).sigmoid()
        keys = self._heads(getattr(self, f"to_k_{kind}")(tokens))
        return F.scaled_dot_product_attention(q, keys, self._heads(values))

    def _heads(self, x: Tensor) -> Tensor:  # (B, N, D) -> (B, H, N, D / H)
        return x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)


class RewardHead(nn.Module):
    """From the states of some blocks to a score."""

    def __init__(self, channels: int, settings: DinaSettings):
        super().__init__()
        width = channels if settings.width == -1 else settings.width
        pictures, texts = len(settings.visual_head_idx), len(settings.text_head_idx)
        self.layer_adapters_visual, self.layer_adapters_text = (
            nn.ModuleList(LayerAdapter(channels, width, settings.use_proj_in) for _ in range(count))
            for count in (pictures, texts)
        )
        self.agg_visual = nn.Linear(pictures * (width // 4), width)
        self.agg_text = nn.Linear(texts * (width // 4), width) if texts else None
        self.query_tokens = nn.Parameter(0.02 * torch.randn(1, settings.num_queries, width))
        self.attn1 = GatedAttention(width, settings.num_attn_heads, text=texts > 0, gated=True)
        self.attn2 = GatedAttention(width, settings.num_attn_heads, text=False, gated=False)
        self.norm_ff = nn.RMSNorm(width)
        self.ff = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        self.head = nn.Linear(width, 1)

    def forward(self, pictures: Sequence[Tensor], texts: Sequence[Tensor], temb: Tensor) -> Tensor:  # -> (B,)
        """pictures, texts: each (B, N, C); temb (B, C)."""
        picture = self.agg_visual(_side_by_side(self.layer_adapters_visual, pictures, temb))
        text = None if self.agg_text is None else self.agg_text(_side_by_side(self.layer_adapters_text, texts, temb))
        queries = self.query_tokens.expand(len(temb), -1, -1)
        queries = self.attn2(self.attn1(queries, picture, text), picture)
        queries = queries + self.ff(self.norm_ff(queries))
        out: Tensor = self.head(queries).mean(1).squeeze(-1)
        return out


def _side_by_side(adapters: nn.ModuleList, states: Sequence[Tensor], temb: Tensor) -> Tensor:
    return torch.cat([adapt(x, temb) for adapt, x in zip(adapters, states, strict=True)], dim=-1)


def _zero(layer: nn.Module) -> None:
    for p in layer.parameters():
        nn.init.zeros_(p)


class DinaReward(nn.Module):
    """Blocks with a LoRA, and the head: the only weights that train.

    transformer: an SD3's, which it takes apart. Raises ValueError for settings that are another network's.
    """

    def __init__(self, transformer: SD3Transformer2DModel, settings: DinaSettings):
        from peft import LoraConfig, inject_adapter_in_model

        super().__init__()
        self.settings, last = settings, settings.num_transformer_layers - 1
        self.backbone = Backbone(transformer.requires_grad_(False), settings)
        unused = [] if settings.num_transformer_layers in settings.text_head_idx else list(OF_TEXT)
        self.lora = LoraConfig(
            r=settings.rank,
            lora_alpha=settings.alpha,  # type: ignore[arg-type]  # an int, says peft, and multiplies
            init_lora_weights="gaussian",
            target_modules=list(LORA_TARGETS),
            exclude_modules=[f"transformer_blocks.{last}.attn.{name}" for name in unused] or None,
        )
        inject_adapter_in_model(self.lora, self.backbone)
        self.reward_head = RewardHead(transformer.inner_dim, settings)

    def forward(self, x_t: Tensor, sigma: Tensor, text: Text) -> Tensor:  # (B, C, h, w), (B,), B rows -> (B,) float32
        """Scores of noisy latents; the network is told 1000 sigma."""
        dtype = self.reward_head.query_tokens.dtype
        context, pooled = (part.to(dtype) for part in text)
        pictures, texts, temb = self.backbone(x_t.to(dtype), 1000 * sigma, (context, pooled))
        own = self.settings
        chosen = [pictures[i] for i in own.visual_head_idx], [texts[i] for i in own.text_head_idx]
        score: Tensor = self.reward_head(*chosen, temb).float()
        return score
