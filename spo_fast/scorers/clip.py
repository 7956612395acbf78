"""CLIP, plain or step-aware, under the parameter names of the published checkpoints.

The towers are written out here because preference models are CLIPs whose vision tower was changed (the step-aware one
sees the timestep), and because the classes of transformers have been renamed and flattened between releases while the
names inside the checkpoints never moved. So a module's attribute names below are the checkpoint's keys, misspelling
(`pre_layrnorm`) included.

Step-aware preference model (SPO, arXiv 2406.04314): each vision layer gets, from the timestep's embedding, a shift and
a scale after either LayerNorm and a gate on either branch, as DiT does (arXiv 2212.09748):
x + gate * branch(norm(x) * (1 + scale) + shift).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

TIME_CHANNELS = 256  # width of the sinusoidal timestep embedding, fixed in the published model

# -------------------------------------------------------------------------------------------------------- configuration


@dataclass(frozen=True, kw_only=True)
class TowerConfig:
    """One transformer, text or vision."""

    width: int
    """Channels of the residual stream."""
    mlp_width: int
    """Channels inside the MLP."""
    num_layers: int
    num_heads: int
    """Attention heads. No tensor's shape shows it: from config.json or KNOWN_CLIPS."""
    activation: str
    """"gelu" (open_clip's laion models) or "quick_gelu" (OpenAI's). No tensor's shape shows it either."""
    layer_norm_eps: float = 1e-5

    def __post_init__(self) -> None:
        sizes = (self.width, self.mlp_width, self.num_layers, self.num_heads)
        if not all(type(size) is int and size > 0 for size in sizes) or not isinstance(self.layer_norm_eps, float):
            raise ValueError(
                f"CLIP sizes {sizes!s:.80} (channels, of the MLP, layers, heads) must be whole numbers above 0, and "
                f"layer_norm_eps={self.layer_norm_eps!r:.20} a number with a point. Mend config.json."
            )
        if self.activation not in list(ACTIVATIONS):
            known = ", ".join(ACTIVATIONS)
            raise ValueError(
                f"CLIP activation {self.activation!r:.40} is not known ({known} are). Mend hidden_act in config.json."
            )
        if self.width % self.num_heads:
            raise ValueError(
                f"CLIP width {self.width} is not a multiple of {self.num_heads} heads: num_attention_heads is wrong."
            )


@dataclass(frozen=True, kw_only=True)
class ClipConfig:
    """Sizes of a CLIP; `config_from_state_dict` reads them off a checkpoint."""

    text: TowerConfig
    vision: TowerConfig
    vocab_size: int
    max_length: int
    """Tokens the text tower has positions for (77 in every published CLIP)."""
    image_size: int
    """Pixels a side; images are square."""
    patch_size: int
    projection_dim: int
    """Channels D shared by image and text features."""
    time_conditioned: bool
    """True: the step-aware model, whose image features depend on the timestep."""

    def to_hf(self) -> dict[str, object]:
        """What config.json holds beside the weights: transformers' form, which `config_from_state_dict` reads."""
        return {
            "model_type": "clip",
            "projection_dim": self.projection_dim,
            "text_config": {
                **_tower_to_hf(self.text),
                "vocab_size": self.vocab_size,
                "max_position_embeddings": self.max_length,
            },
            "vision_config": {
                **_tower_to_hf(self.vision),
                "image_size": self.image_size,
                "patch_size": self.patch_size,
            },
        }


HF_NAMES = {
    "width": "hidden_size",
    "mlp_width": "intermediate_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "activation": "hidden_act",
    "layer_norm_eps": "layer_norm_eps",
}


def _tower_to_hf(tower: TowerConfig) -> dict[str, object]:
    return {HF_NAMES[field]: value for field, value in asdict(tower).items()}


@dataclass(frozen=True)
class KnownClip:
    """A published model: its name, attention heads of both towers, activation."""

    name: str
    vision_heads: int
    text_heads: int
    activation: str


# (vision width, vision layers, patch size) -> what the shapes of a checkpoint do not show. laion's L/14 and B models
# have the shapes of OpenAI's with another activation: they need their config.json, which goes before this table.
KNOWN_CLIPS = {
    (1280, 32, 14): KnownClip("ViT-H/14 laion", 16, 16, "gelu"),
    (1664, 48, 14): KnownClip("ViT-bigG/14 laion", 16, 20, "gelu"),
    (1024, 24, 14): KnownClip("ViT-L/14 openai", 16, 12, "quick_gelu"),
    (768, 12, 16): KnownClip("ViT-B/16 openai", 12, 8, "quick_gelu"),
    (768, 12, 32): KnownClip("ViT-B/32 openai", 12, 8, "quick_gelu"),
}

# config.json holds only what differs from these when a recent transformers wrote it
HF_TOWER_DEFAULTS = {
    "text": {"num_attention_heads": 8, "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5},
    "vision": {"num_attention_heads": 12, "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5},
}

# -------------------------------------------------------------------------------------------------------------- network


def quick_gelu(x: Tensor) -> Tensor:
    """OpenAI's cheap GELU."""
    return x * torch.sigmoid(1.702 * x)


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"gelu": F.gelu, "quick_gelu": quick_gelu}


def timestep_embedding(
    t: Tensor,  # (B,) timesteps 0..999, any dtype
    channels: int = TIME_CHANNELS,
) -> Tensor:  # (B, channels) float32
    """cos then sin of t at frequencies 10000^(-i / half), i = 0..half-1."""
    half = channels // 2
    # float32 whatever the towers compute in: 951 rad is not even an integer in bf16
    i = torch.arange(half, dtype=torch.float32, device=t.device)
    angle = t.float()[:, None] * torch.exp(-math.log(10000) * i / half)
    return torch.cat([angle.cos(), angle.sin()], dim=-1)


class TimestepEmbedder(nn.Module):
    """MLP of the timestep's sinusoids, under the SPM's names."""

    def __init__(self, width: int):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(TIME_CHANNELS, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, t: Tensor) -> Tensor:  # (B,) -> (B, width)
        """In the towers' dtype; the sinusoids are float32."""
        return self.mlp(timestep_embedding(t).to(next(self.parameters()).dtype))


def modulation(width: int, num_parts: int) -> nn.Sequential:
    """Timestep embedding (B, width) -> num_parts shifts, scales and gates, (B, num_parts * width)."""
    return nn.Sequential(nn.SiLU(), nn.Linear(width, num_parts * width))


class Attention(nn.Module):
    """Multi-head self-attention of transformers' CLIP, with four projections."""

    def __init__(self, tower: TowerConfig, causal: bool):
        super().__init__()
        self.num_heads, self.causal = tower.num_heads, causal
        self.q_proj = nn.Linear(tower.width, tower.width)
        self.k_proj = nn.Linear(tower.width, tower.width)
        self.v_proj = nn.Linear(tower.width, tower.width)
        self.out_proj = nn.Linear(tower.width, tower.width)

    def forward(self, x: Tensor) -> Tensor:  # (B, L, width) -> same
        """Scaled dot products; causal in the text tower."""
        q, k, v = (
            p(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for p in (self.q_proj, self.k_proj, self.v_proj)
        )
        y = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)  # (B, heads, L, width / heads)
        return self.out_proj(y.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    """The feed-forward part of a layer."""

    def __init__(self, tower: TowerConfig):
        super().__init__()
        self.activation = ACTIVATIONS[tower.activation]
        self.fc1 = nn.Linear(tower.width, tower.mlp_width)
        self.fc2 = nn.Linear(tower.mlp_width, tower.width)

    def forward(self, x: Tensor) -> Tensor:
        """(B, L, width) -> same."""
        return self.fc2(self.activation(self.fc1(x)))


class Layer(nn.Module):
    """A transformer layer; time-conditioned, both halves are shifted, scaled and gated by the timestep."""

    def __init__(self, tower: TowerConfig, causal: bool, time_conditioned: bool):
        super().__init__()
        self.self_attn = Attention(tower, causal)
        self.layer_norm1 = nn.LayerNorm(tower.width, eps=tower.layer_norm_eps)
        self.mlp = MLP(tower)
        self.layer_norm2 = nn.LayerNorm(tower.width, eps=tower.layer_norm_eps)
        if time_conditioned:
            self.adaLN_modulation = modulation(tower.width, 6)

    def forward(
        self,
        x: Tensor,  # (B, L, width)
        time: Tensor | None,  # (B, width) or, one timestep for all, (1, width)
    ) -> Tensor:  # (B, L, width)
        """Pre-norm attention and MLP with residuals; without time no modulation."""
        if time is None:
            x = x + self.self_attn(self.layer_norm1(x))
            return x + self.mlp(self.layer_norm2(x))
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = self.adaLN_modulation(time)[:, None].chunk(6, dim=-1)
        x = x + gate_a * self.self_attn(self.layer_norm1(x) * (1 + scale_a) + shift_a)
        return x + gate_m * self.mlp(self.layer_norm2(x) * (1 + scale_m) + shift_m)


class Encoder(nn.Module):
    """The layers of a tower."""

    def __init__(self, tower: TowerConfig, causal: bool, time_conditioned: bool = False):
        super().__init__()
        self.layers = nn.ModuleList(Layer(tower, causal, time_conditioned) for _ in range(tower.num_layers))
        self.recompute = False  # in the backward pass, instead of keeping activations

    def forward(self, x: Tensor, time: Tensor | None = None) -> Tensor:
        """(B, L, width) -> same, through all layers."""
        for layer in self.layers:
            x = checkpoint(layer, x, time, use_reentrant=False) if self.recompute else layer(x, time)
        return x


class TextEmbeddings(nn.Module):
    """Tokens and positions."""

    def __init__(self, config: ClipConfig):
        super().__init__()
        self.token_embedding = nn.Embedding(config.vocab_size, config.text.width)
        self.position_embedding = nn.Embedding(config.max_length, config.text.width)

    def forward(self, ids: Tensor) -> Tensor:  # (B, L) -> (B, L, width)
        """Their sum; L at most the number of positions."""
        return self.token_embedding(ids) + self.position_embedding.weight[: ids.shape[1]]


class TextTower(nn.Module):
    """Causal, pooled at the end token."""

    def __init__(self, config: ClipConfig):
        super().__init__()
        self.embeddings = TextEmbeddings(config)
        self.encoder = Encoder(config.text, causal=True)
        self.final_layer_norm = nn.LayerNorm(config.text.width, eps=config.text.layer_norm_eps)

    def forward(self, ids: Tensor) -> Tensor:  # (B, L) int64 -> (B, width)
        """The feature at the first position of the largest id, which is the end token in CLIP's vocabulary.

        Attention is causal, so nothing after that position can reach it: how a prompt is padded, and with what, is of
        no consequence (as long as no larger id follows), and no padding mask is needed.
        """
        x = self.encoder(self.embeddings(ids))
        pooled = x[torch.arange(len(ids), device=ids.device), ids.argmax(dim=-1)]  # argmax gives the first of equals
        return self.final_layer_norm(pooled)


class VisionEmbeddings(nn.Module):
    """A class token and patches, with positions."""

    def __init__(self, config: ClipConfig):
        super().__init__()
        width, patch = config.vision.width, config.patch_size
        self.class_embedding = nn.Parameter(torch.zeros(width))
        self.patch_embedding = nn.Conv2d(3, width, kernel_size=patch, stride=patch, bias=False)
        self.position_embedding = nn.Embedding((config.image_size // patch) ** 2 + 1, width)

    def forward(self, pixels: Tensor) -> Tensor:  # (B, 3, S, S) -> (B, 1 + patches, width)
        """The class token first; S must be the size of the positions."""
        patches = self.patch_embedding(pixels.to(self.patch_embedding.weight.dtype)).flatten(2).transpose(1, 2)
        cls = self.class_embedding.expand(len(pixels), 1, -1)
        return torch.cat([cls, patches], dim=1) + self.position_embedding.weight


class VisionTower(nn.Module):
    """Pooled at the class token; time-conditioned, that is shifted and scaled by the timestep."""

    def __init__(self, config: ClipConfig):
        super().__init__()
        vision = config.vision
        self.embeddings = VisionEmbeddings(config)
        self.pre_layrnorm = nn.LayerNorm(vision.width, eps=vision.layer_norm_eps)
        self.encoder = Encoder(vision, causal=False, time_conditioned=config.time_conditioned)
        self.post_layernorm = nn.LayerNorm(vision.width, eps=vision.layer_norm_eps)
        if config.time_conditioned:
            self.adaLN_modulation = modulation(vision.width, 2)

    def forward(
        self,
        pixels: Tensor,  # (B, 3, S, S) normalised
        time: Tensor | None,  # (B, width) or (1, width)
    ) -> Tensor:  # (B, width)
        """The class token's last state, normed."""
        x = self.encoder(self.pre_layrnorm(self.embeddings(pixels)), time)
        x = self.post_layernorm(x[:, 0])
        if time is None:
            return x
        shift, scale = self.adaLN_modulation(time).chunk(2, dim=-1)
        return x * (1 + scale) + shift


class Clip(nn.Module):
    """CLIP; with config.time_conditioned the step-aware preference model. Nothing in it waits for the device."""

    def __init__(self, config: ClipConfig):
        super().__init__()
        self.config = config
        self.text_model = TextTower(config)
        self.vision_model = VisionTower(config)
        self.text_projection = nn.Linear(config.text.width, config.projection_dim, bias=False)
        self.visual_projection = nn.Linear(config.vision.width, config.projection_dim, bias=False)
        self.logit_scale = nn.Parameter(torch.tensor(math.log(100)))
        if config.time_conditioned:
            self.t_embedder = TimestepEmbedder(config.vision.width)

    def get_text_features(self, ids: Tensor) -> Tensor:  # (P, L) int64 -> (P, D), not normalised
        """Of the end token, projected."""
        return self.text_projection(self.text_model(ids))

    def get_image_features(
        self,
        pixels: Tensor,  # (B, 3, S, S) normalised
        timesteps: Tensor | None = None,  # (B,), or (1,) for all images: then the modulation is computed once
    ) -> Tensor:  # (B, D), not normalised
        """Of the class token, projected. Raises ValueError if a step-aware CLIP gets no timesteps."""
        if self.config.time_conditioned and timesteps is None:
            raise ValueError("A step-aware CLIP needs timesteps: (B,) or (1,), 0 for clean images.")
        time = self.t_embedder(timesteps) if self.config.time_conditioned else None
        return self.visual_projection(self.vision_model(pixels, time))

    def forward(
        self,
        pixels: Tensor,  # (B, 3, S, S) normalised
        ids: Tensor,  # (P, L)
        timesteps: Tensor | None = None,  # (B,) or (1,)
    ) -> tuple[Tensor, Tensor]:  # (B, D), (P, D) float32 unit vectors of images and texts
        """Both features."""
        return unit(self.get_image_features(pixels, timesteps)), unit(self.get_text_features(ids))

    def set_compute_dtype(self, dtype: torch.dtype) -> Clip:
        """Cast the towers. logit_scale stays float32: ln 100 rounded to bf16 would scale every score by 0.989.

        Parameters are replaced, not cast in place (FakeTensorMode allows no swap): cast before making an optimizer.
        """
        for module in self.modules():
            for name, parameter in list(module.named_parameters(recurse=False)):
                if parameter is not self.logit_scale and parameter.dtype != dtype:
                    setattr(module, name, nn.Parameter(parameter.detach().to(dtype), parameter.requires_grad))
        return self


def unit(features: Tensor) -> Tensor:  # (..., D) any dtype -> float32 of length 1
    """Divided by its norm; a zero vector becomes NaN."""
    features = features.float()
    return features / features.norm(dim=-1, keepdim=True)
