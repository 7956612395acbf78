"""Latent reward model (LRM, arXiv 2502.01051): a diffusion model judges its own noisy latents, no VAE, no up blocks.

The visual feature is what the down and mid blocks of a UNet make of x_t at its timestep: the mean over space of each
down block's output (before it is downsampled) and of the mid block's, concatenated and projected. Guidance sharpens the
mid block's mean alone: u + g (c - u); the down blocks' are those of the prompt's half. The text feature is the pooled
output of the diffusion model's own text encoder: SD-1.5's through a projection that OpenAI's CLIP brings, SDXL's second
encoder with its own. score = exp(logit_scale) * cos(visual, text), a logit as PickScore's (clip_scorers.py).

All of it was trained, text encoders included, so a reward model carries its own. Attribute names are the keys of the
published checkpoints (Kwai-Kolors/LPO); a published UNet's up blocks and output layers are dropped when it is read.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from spo_fast.files import DAMAGED, WEIGHT_NAMES, read_json, shown
from spo_fast.scorers.clip import ClipConfig, TextTower, TowerConfig, unit, write_model
from spo_fast.weights import fill, read_tensors, renamed

if TYPE_CHECKING:
    from spo_fast.experience import Candidates

GUIDANCE_SCALE = 7.5  # of the published models, in their training and in LPO; no checkpoint holds it
LOGIT_SCALE = 2.6592  # ln(1 / 0.07), where CLIP and the published training start
PIXELS_PER_LATENT = 8

PARTS = ("unet", "text_encoder", "text_encoder_2")
UNUSED_KEYS = ("unet.up_blocks.", "unet.conv_norm_out.", "unet.conv_out.", "vae.")
LRM_FILES = (
    "a directory with unet/, text_encoder/ (SDXL: text_encoder_2/ too) and state_dict.pt, such as those of "
    "casiatao/LRM, or one with model.safetensors and config.json, written by save_latent_reward"
)

Configs = Mapping[str, Mapping[str, Any]]
"""Name in PARTS -> its config.json: diffusers' of a UNet2DConditionModel, transformers' of a CLIPTextModel."""

TokenIds = Callable[[Sequence[str]], Sequence[Tensor]]

Text = tuple[Tensor, Tensor]
"""Context (P, L, C) that the UNet attends to; feature (P, D), to be compared and, in SDXL, added to the timestep's."""


# -------------------------------------------------------------------------------------------------------------- network


class TextEncoder(nn.Module):
    """CLIP's text tower as Stable Diffusion uses it: token states beside the pooled one."""

    def __init__(self, config: Mapping[str, Any], projected: bool):
        from transformers import CLIPTextConfig

        super().__init__()
        hf: Any = CLIPTextConfig(**config)  # fills in what a config.json leaves out
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
        x = self.text_model.embeddings(ids)
        for layer in self.text_model.encoder.layers[:-1]:
            x = layer(x, None)
        return x

    def last(self, x: Tensor, ids: Tensor) -> Text:  # penultimate (P, L, width) -> states (P, L, width), pooled (P, D)
        states = self.text_model.final_layer_norm(self.text_model.encoder.layers[-1](x, None))
        # the end token is the largest id, and padding comes after the first of them
        pooled = states[torch.arange(len(ids), device=ids.device), ids.argmax(dim=-1)]
        return states, self.text_projection(pooled) if hasattr(self, "text_projection") else pooled


class LatentReward(nn.Module):
    """LRM of an SD-1.5 (one text encoder) or an SDXL (two). Nothing in it waits for the device.

    configs: which decide the kind: with text_encoder_2 it is an SDXL.
    projection_dim: D, channels in which visual and text features are compared; SDXL's is its second encoder's.
    Every parameter takes a gradient but the end of SDXL's first text encoder, which no score depends on.
    For gradient checkpointing: `model.unet.enable_gradient_checkpointing()`.
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
            outputs.append(states[len(block.resnets) - 1])  # one state a ResNet; a downsampled one may follow
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


class LatentScorer:
    """LPO's scorer: noisy latents at their (parent's) timestep, before the UNet has seen them; final latents at 0.

    token_ids: prompts -> (P, L) int64 for each text encoder. decode_chunk latents go through it at a time.
    """

    judges = "children"

    def __init__(self, model: LatentReward, token_ids: TokenIds, guidance_scale: float = GUIDANCE_SCALE):
        self.model, self.token_ids, self.guidance_scale = model.requires_grad_(False).eval(), token_ids, guidance_scale
        self.empty = self.encode([""])

    @torch.no_grad()
    def encode(self, prompts: list[str]) -> Text:
        device = self.model.logit_scale.device
        return self.model.encode([ids.to(device) for ids in self.token_ids(prompts)])

    @torch.no_grad()
    def __call__(self, candidates: Candidates) -> Tensor:  # (K*B,) float32, k-major
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


def _attended(block: nn.Module, context: Tensor) -> dict[str, Tensor]:
    return {"encoder_hidden_states": context} if getattr(block, "has_cross_attention", False) else {}


def _headless_unet(config: Mapping[str, Any], is_sdxl: bool) -> Any:
    """diffusers' UNet without what follows its mid block; its other parts, and so their keys, stay where they are."""
    from diffusers import UNet2DConditionModel

    unet: Any = UNet2DConditionModel.from_config(dict(config))
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


# ---------------------------------------------------------------------------------------------------------------- files


def init_latent_reward(
    unet: Any,  # diffusers' UNet2DConditionModel
    text_encoders: Sequence[nn.Module],  # transformers' CLIPTextModel; SDXL's CLIPTextModelWithProjection after it
    *,
    text_projection: Tensor | None = None,  # (D, width): text_projection.weight of openai/clip-vit-large-patch14
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
) -> LatentReward:
    """Where the training starts: copies of the diffusion model's weights, a new visual projection N(0, 0.02^2).

    text_projection: for SD-1.5 only, whose text encoder is that CLIP's without it; None draws one as CLIP does,
    N(0, 1 / width), for text encoders that never had one.
    Raises ValueError for a text_projection given with SDXL, or weights that do not fit together.
    """
    parts: dict[str, Any] = dict(zip(PARTS, (unet, *text_encoders), strict=False))
    configs = {name: json.loads(_config_json(part)) for name, part in parts.items()}
    tensors = {f"{name}.{key}": value for name, part in parts.items() for key, value in part.state_dict().items()}
    generator = torch.Generator().manual_seed(seed)
    if len(text_encoders) == 1:
        width = configs["text_encoder"]["hidden_size"]
        drawn = torch.randn(width, width, generator=generator) / math.sqrt(width)
        tensors["text_projection.weight"] = drawn if text_projection is None else text_projection
        projection_dim = len(tensors["text_projection.weight"])
    else:
        if text_projection is not None:
            raise ValueError("SDXL's second text encoder has its own projection: leave text_projection out.")
        projection_dim = configs["text_encoder_2"]["projection_dim"]
    channels = configs["unet"]["block_out_channels"]
    tensors["visual_projection.weight"] = 0.02 * torch.randn(
        projection_dim, sum(channels) + channels[-1], generator=generator
    )
    tensors["logit_scale"] = torch.tensor(LOGIT_SCALE)
    copies = {key: value.detach().clone() for key, value in tensors.items()}
    return load_latent_reward(copies, configs=configs, device=unet.device, dtype=dtype).train()


def _config_json(part: Any) -> str:
    # transformers would leave out what equals its defaults of the day
    return part.to_json_string() if hasattr(part, "to_json_string") else part.config.to_json_string(use_diff=False)


def load_latent_reward(
    source: str | Path | Mapping[str, Tensor],
    *,
    configs: Configs | None = None,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
) -> LatentReward:
    """Read a latent reward model strictly: every tensor it needs must be there, and none that it does not know.

    source: LRM_FILES, a file of tensors, or a state dict. configs: the parts' configs, by default read beside the
    weights. dtype: of all but logit_scale, which stays float32 (the published scorer rounds it to float16 too).
    Raises FileNotFoundError, or ValueError naming what is missing, unexpected or of the wrong shape.
    """
    if isinstance(source, Mapping):
        name, tensors = "state dict", source
    else:
        name = str(source)
        tensors, found = _read(Path(source))
        configs = configs or found
    configs = configs or {}
    if not {"unet", "text_encoder"} <= configs.keys() or "visual_projection.weight" not in tensors:
        raise ValueError(
            f"{name} is no latent reward model: it has configs of {sorted(configs) or 'no part'} and "
            f"{'a' if 'visual_projection.weight' in tensors else 'no'} visual_projection.weight. Expected {LRM_FILES}."
        )
    tensors = {key: value for key, value in tensors.items() if not key.startswith(UNUSED_KEYS)}
    tensors = renamed(tensors, _published_key, name)
    with torch.device("meta"):
        model = LatentReward(configs, projection_dim=len(tensors["visual_projection.weight"]))
    return fill(model, tensors, name, dtype, device, float32=("logit_scale",)).eval()


def save_latent_reward(model: LatentReward, directory: str | Path, weights: Mapping[str, Tensor] | None = None) -> Path:
    """Write model.safetensors (published keys, dtypes as they are) and config.json, for load_latent_reward.

    weights: tensors to write in place of the model's own of the same names (its float32 masters).
    """
    return write_model(directory, {**model.state_dict(), **(weights or {})}, model.configs)


def _published_key(key: str) -> str:
    """Recent transformers name a CLIPTextModel's tensors without the `text_model.` that every checkpoint has."""
    for part in PARTS[1:]:
        if key.startswith((f"{part}.embeddings.", f"{part}.encoder.", f"{part}.final_layer_norm.")):
            return key.replace(f"{part}.", f"{part}.text_model.", 1)
    return key


def read_configs(path: Path) -> dict[str, dict[str, Any]]:
    """Of a latent reward model's parts, without its weights."""
    if (path / "state_dict.pt").is_file():
        return {p: read_json(path / p / "config.json") for p in PARTS if (path / p / "config.json").is_file()}
    return read_json((path if path.is_dir() else path.parent) / "config.json")


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, dict[str, Any]]]:
    """Tensors under their whole keys, and the configs beside them."""
    if (path / "state_dict.pt").is_file():
        return _read_published(path)
    files = [path / name for name in WEIGHT_NAMES] if path.is_dir() else [path]
    file = next((file for file in files if file.is_file()), None)
    if file is None:
        raise FileNotFoundError(f"{files[0]} does not exist. Expected {LRM_FILES}.")
    config = file.with_name("config.json")
    return read_tensors(file), read_json(config) if config.is_file() else {}


def _read_published(directory: Path) -> tuple[dict[str, Tensor], dict[str, dict[str, Any]]]:
    """One directory a part, and state_dict.pt: {"visual_projection": {"weight": ...}, ..., "logit_scale": number}."""
    file = directory / "state_dict.pt"
    try:
        rest = dict(torch.load(file, map_location="cpu", weights_only=True))
        tensors = {"logit_scale": torch.as_tensor(rest.pop("logit_scale"))}
        tensors |= {f"{name}.{key}": value for name, state in rest.items() for key, value in state.items()}
    except OSError:
        raise
    except Exception as error:  # whatever the unpickler makes of bytes, or this of what was pickled
        raise ValueError(f"{shown(file)} holds no logit_scale and projections of a reward model. {DAMAGED}") from error
    configs = {}
    for part in PARTS:
        files = sorted((directory / part).glob("*.index.json"))  # of shards
        files = files or sorted(p for p in (directory / part).glob("*") if p.suffix in (".safetensors", ".bin"))
        if not files:
            continue
        if len(files) > 1:
            names = ", ".join(file.name for file in files)
            raise ValueError(f"{directory / part} has {len(files)} files of weights, one is wanted: {names}.")
        tensors |= {f"{part}.{key}": value for key, value in read_tensors(files[0]).items()}
        configs[part] = read_json(directory / part / "config.json")
    return tensors, configs
