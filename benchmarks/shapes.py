"""The shapes of the published runs' steps, listed once, and the settings of an iteration."""

from __future__ import annotations

import json
import math
from collections import Counter
from dataclasses import dataclass, replace
from typing import Any

from spo_fast.config.presets import PRESETS
from spo_fast.config.training import Config
from spo_fast.models.files.sources import CONFIGS
from spo_fast.models.files.toy import WEIGHTS

KINDS = ("sd15", "sdxl")

LATENTS = {"sd15": (4, 64, 64), "sdxl": (4, 128, 128)}  # C, H, W at 512 and 1024 pixels
TINY_LATENTS = (4, 8, 8)

SIZES = ("full", "mid", "toy", "tiny")
"""Of the networks: as shipped; SD-1.5's with 37 M weights for 256 pixels, what a CPU can do in seconds; the embedded
toy's, which are SDXL's parts; two levels of 16 and 32 channels, for tests of the code."""


def latent_shape(kind: str, size: str) -> tuple[int, int, int]:
    """C, H, W."""
    return {"full": LATENTS[kind], "mid": (4, 32, 32), "toy": (3, 16, 16), "tiny": TINY_LATENTS}[size]


PREFERENCE_TERMS = (16, 320)  # a micro-batch's pairs; twice what an iteration of SD1.5 can keep


@dataclass(frozen=True)
class StepShape:
    """One call of ops.transition."""

    name: str
    parents: int  # B
    children: int  # K; 0 only estimates x0
    latent: tuple[int, int, int]


@dataclass(frozen=True)
class RatioShape:
    """One call of ops.log_ratio."""

    name: str
    states: int  # U
    transitions: int  # T
    latent: tuple[int, int, int]


@dataclass(frozen=True)
class AttentionShape:
    """One attention of a rollout step, both guidance halves in the batch."""

    name: str
    batch: int
    heads: int
    queries: int
    keys: int
    width: int  # of a head


@dataclass(frozen=True)
class ScorerShape:
    """One call of ops.resize_normalize."""

    name: str
    images: int  # N
    pixels: int  # height and width
    side: int  # of the scorer's input


@dataclass(frozen=True)
class LoraShape:
    """One adapted layer of an attention: to_q, to_k, to_v, to_out.0."""

    name: str
    batch: int  # both guidance halves
    tokens: int
    columns: int  # I, in
    rows: int  # O, out
    rank: int


@dataclass(frozen=True)
class LayerShape:
    """One kind of call of ops.group_norm_silu or ops.geglu; x is its input."""

    name: str
    x: tuple[int, ...]
    calls: int  # in one forward of the network
    groups: int = 0
    silu: bool = False


@dataclass(frozen=True)
class StreamShape:
    """Tokens of text and picture in a block of a transformer, both guidance halves in the batch."""

    name: str
    batch: int
    tokens: int
    text: int  # of the tokens
    width: int
    heads: int
    rotary: bool


STREAMS = {
    "full": [
        StreamShape("sd35 1024", 8, 4096 + 333, 333, 1536, 24, False),
        StreamShape("flux 1024", 4, 4096 + 512, 512, 3072, 24, True),
    ],
    "tiny": [StreamShape("tiny", 2, 11, 4, 32, 2, False), StreamShape("tiny flux", 2, 11, 4, 32, 2, True)],
}
"""A rollout's step of SD3.5-medium and of FLUX.1 at 1024 pixels."""


def step_shapes(size: str) -> list[StepShape]:
    """The published batches' children, and the x0 estimate of all candidates."""
    if size == "tiny":
        return [StepShape("tiny K=2", 2, 2, TINY_LATENTS), StepShape("tiny x0", 4, 0, TINY_LATENTS)]
    return [
        StepShape("sd15 K=4", 10, 4, LATENTS["sd15"]),
        StepShape("sdxl K=2", 2, 2, LATENTS["sdxl"]),
        StepShape("sd15 x0", 40, 0, LATENTS["sd15"]),
    ]


def ratio_shapes(size: str) -> list[RatioShape]:
    """A micro-batch of 8 states and 16 transitions: winner and loser of 8 pairs that share x_t."""
    if size == "tiny":
        return [RatioShape("tiny", 2, 4, TINY_LATENTS)]
    return [RatioShape(kind, 8, 16, LATENTS[kind]) for kind in KINDS]


def scorer_shapes(size: str) -> list[ScorerShape]:
    """A chunk of decoded candidates, to the 224 pixels of the step-aware model."""
    if size == "tiny":
        return [ScorerShape("tiny", 2, 64, 32)]
    return [
        ScorerShape("sdxl N=16", 16, 1024, 224),
        ScorerShape("sd15 N=16", 16, 512, 224),
    ]


def attention_shapes(size: str) -> list[AttentionShape]:
    """Where a UNet spends its attention: the two largest resolutions, self and cross (77 text tokens)."""
    if size == "tiny":
        return [AttentionShape("tiny self", 2, 2, 64, 64, 8)]
    return [
        AttentionShape("sdxl self 64x64", 8, 10, 4096, 4096, 64),
        AttentionShape("sdxl self 32x32", 8, 20, 1024, 1024, 64),
        AttentionShape("sdxl cross 32x32", 8, 20, 1024, 77, 64),
        AttentionShape("sd15 self 64x64", 80, 8, 4096, 4096, 40),
        AttentionShape("sd15 self 32x32", 80, 8, 1024, 1024, 80),
        AttentionShape("sd15 cross 64x64", 80, 8, 4096, 77, 40),
    ]


def lora_layer_shapes(size: str) -> list[LoraShape]:
    """The layers on a micro-batch of four states: both resolutions with most of the work, and the text's keys."""
    if size == "tiny":
        return [LoraShape("tiny", 2, 20, 32, 48, 4)]
    return [
        LoraShape("sdxl 32x32", 8, 1024, 1280, 1280, 64),
        LoraShape("sdxl 64x64", 8, 4096, 640, 640, 64),
        LoraShape("sdxl text", 8, 77, 2048, 1280, 64),
        LoraShape("sd15 64x64", 8, 4096, 320, 320, 4),
        LoraShape("sd15 text", 8, 77, 768, 320, 4),
    ]


BATCHES = {"sd15": 80, "sdxl": 8}  # states of a rollout step, both guidance halves


def layer_shapes(op: str, size: str) -> list[LayerShape]:
    """The two kinds of call of each UNet that move most, and for the norm the VAE decoder's largest. Needs diffusers.

    Taken from forwards on the meta device: nothing is allocated, and the counts cannot go stale.
    """
    if size == "tiny":
        norms = [LayerShape("tiny", (2, 16, 6, 5), 1, 4, True), LayerShape("tiny without SiLU", (2, 16, 6, 5), 1, 4)]
        return norms if op == "group_norm_silu" else [LayerShape("tiny", (2, 6, 20), 1)]
    shapes: list[LayerShape] = []
    for kind in KINDS:
        found = [s for s in unet_layers(kind) if (s.groups > 0) == (op == "group_norm_silu")]
        shapes += sorted(found, key=lambda s: -s.calls * math.prod(s.x))[:2]
    if op == "group_norm_silu":
        shapes += sorted(vae_norms("sdxl"), key=lambda s: -math.prod(s.x))[:1]
    return shapes


def unet_layers(kind: str) -> list[LayerShape]:
    """Every kind of group norm and GEGLU of a rollout step's UNet forward."""
    import torch
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(unet_config(kind))
        width, batch = unet.config.cross_attention_dim, BATCHES[kind]
        added = {"text_embeds": torch.empty(batch, 1280), "time_ids": torch.empty(batch, 6)}
        inputs = torch.empty(batch, *LATENTS[kind]), torch.empty(batch), torch.empty(batch, 77, width)
        return _recorded(kind, unet, lambda: unet(*inputs, added_cond_kwargs=added))


def vae_norms(kind: str) -> list[LayerShape]:
    """Every kind of group norm of decoding one image."""
    import torch
    from diffusers import AutoencoderKL

    with torch.device("meta"):
        vae = AutoencoderKL.from_config(json.loads((CONFIGS / kind / "vae" / "config.json").read_text()))
        return _recorded(f"{kind} VAE", vae, lambda: vae.decode(torch.empty(1, *LATENTS[kind])))


def _recorded(name: str, model: Any, forward: Any) -> list[LayerShape]:
    """The calls of one forward; an attention's group norm has no SiLU behind it."""
    import torch

    calls: Counter[LayerShape] = Counter()

    def hook(path: str) -> Any:
        def record(module: Any, inputs: tuple, output: Any) -> None:
            if isinstance(module, torch.nn.GroupNorm):
                x, groups, silu = tuple(inputs[0].shape), module.num_groups, "attentions" not in path
                size = "x".join(map(str, x[1:]))
                calls[LayerShape(f"{name} {size}{'' if silu else ' without SiLU'}", x, 0, groups, silu)] += 1
            else:
                x = (*output.shape[:-1], 2 * output.shape[-1])
                calls[LayerShape(f"{name} {x[1]}x{x[2]}", x, 0)] += 1

        return record

    for path, module in model.named_modules():
        if isinstance(module, torch.nn.GroupNorm) or type(module).__name__ == "GEGLU":
            module.register_forward_hook(hook(path))
    forward()
    # a VAE's attention normalises (B, C, H W), at its smallest size
    return [replace(shape, calls=count) for shape, count in calls.items() if not shape.groups or len(shape.x) == 4]


def network_config(kind: str, size: str, part: str) -> dict[str, Any]:
    """The settings that are shipped: of the toy if size says so, else the kind's."""
    config = json.loads(((WEIGHTS if size == "toy" else CONFIGS / kind) / part / "config.json").read_text())
    return {name: value for name, value in config.items() if not name.startswith("_")}


def unet_config(kind: str, size: str = "full") -> dict[str, Any]:
    """The UNet's settings at a size (SIZES)."""
    config = network_config(kind, size, "unet")
    if size == "mid":
        channels = (128, 256, 256, 256)
        return config | {
            "sample_size": 32,
            "block_out_channels": channels,
            "layers_per_block": 1,
            "attention_head_dim": 4,  # heads: as wide as the full size's, 32 and 64 in place of 40 to 160
        }
    if size != "tiny":
        return config
    config |= {"sample_size": 8, "block_out_channels": (16, 32), "layers_per_block": 1, "norm_num_groups": 8}
    if kind == "sd15":
        return config | {
            "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
            "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
            "attention_head_dim": 2,
            "cross_attention_dim": 16,
        }
    return config | {
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "attention_head_dim": (2, 4),
        "transformer_layers_per_block": (1, 2),
        "cross_attention_dim": 32,
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 6 * 8 + 16,
    }


def lora_shapes(kind: str, rank: int, size: str = "full") -> list[tuple[int, int]]:
    """(rows, columns) of every LoRA matrix, A then B of each adapted layer. Needs diffusers; allocates nothing."""
    import torch
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(unet_config(kind, size))
    targets = PRESETS[kind]().adapter.lora_targets
    shapes = []
    for name, module in unet.named_modules():
        if isinstance(module, torch.nn.Linear) and name.endswith(tuple(f".{t}" for t in targets)):
            shapes += [(rank, module.in_features), (module.out_features, rank)]
    return shapes


def vocabulary(size: str) -> int:
    """Words that text encoders and preference models know."""
    return 555 if size == "toy" else 49408


def text_length(size: str) -> int:
    """Tokens of a prompt."""
    return 16 if size == "toy" else 77


def vae_config(kind: str, size: str) -> dict[str, Any]:
    """The VAE's settings at a size (SIZES)."""
    config = network_config(kind, size, "vae")
    small = {"layers_per_block": 1, "norm_num_groups": 4, "sample_size": 64}
    channels = {"mid": (32, 64, 128, 128), "tiny": (8, 8, 8, 16)}
    return config | {**small, "block_out_channels": channels[size]} if size in channels else config


def text_config(kind: str, size: str, part: str) -> dict[str, Any]:
    """A text encoder's settings at a size (SIZES)."""
    config = network_config(kind, size, part)
    widths = {"mid": (256, 1024, 8, 8), "tiny": (16, 32, 2, 2)}
    if size in widths:
        names = ("hidden_size", "intermediate_size", "num_attention_heads", "num_hidden_layers")
        config |= dict(zip(names, widths[size], strict=True)) | {"projection_dim": widths[size][0]}
    return config


def iteration_config(kind: str, size: str, prompts: int | None, mixed_precision: str) -> Config:
    """The published settings of one iteration (presets.py), or fewer prompts; tiny has a ragged last micro-batch."""
    if size == "toy":
        return PRESETS["toy"]().with_fields(sample_batch_size=prompts or 16, mixed_precision=mixed_precision)
    cfg = PRESETS[kind]().with_fields(
        mixed_precision=mixed_precision, last_step="extend" if kind == "sdxl" else "compare"
    )
    if size == "tiny":
        inner = min(1, cfg.sample.num_inner_steps)
        cfg = cfg.with_fields(
            sample_batch_size=2,
            num_steps=6,
            branch_start=2,
            num_inner_steps=inner,
            rank=4,
            train_batch_size=3,
            decode_chunk=4,
        )
    return cfg if prompts is None else cfg.with_fields(sample_batch_size=prompts)
