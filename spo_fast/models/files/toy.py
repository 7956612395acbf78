"""The toys' pipelines: SDXL's parts, or Stable Diffusion 3's, at a tiny size, in diffusers layout, for 16x16 pictures.

They are loaded by the code that loads SDXL or SD3 (sources.py) and by the pipelines' own from_pretrained, so everything
downstream meets a real pipeline. toy/build.py pretrains them; their weights are shipped in toy/weights and
toy/weights_flow.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spo_fast.config.errors import RunError
from spo_fast.data.files import save_tensors
from spo_fast.data.toy_world import COLOURS, SHAPES, SIZE

if TYPE_CHECKING:
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
    from diffusers.models.transformers.transformer_sd3 import SD3Transformer2DModel
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
    from torch import Tensor
    from transformers import CLIPTextModel, CLIPTextModelWithProjection, PreTrainedTokenizerBase

WEIGHTS = Path(__file__).parents[2] / "toy" / "weights"
"""The shipped pipeline; its step-aware preference model lies in spm/, the record of the build in build.json."""
FLOW_WEIGHTS = WEIGHTS.with_name("weights_flow")
"""The flow model of the same world, pictures and latents, so WEIGHTS' preference models judge it too."""

WIDTH = 64
"""Of each text encoder of the shipped toys; the network attends to both side by side."""
MAX_LENGTH = 16
"""Tokens: every caption of the world fits; other text falls apart into bytes."""
SCALING = 3.0
"""VAE scaling factor: latents are 3 times the pixels, with a standard deviation of 0.7."""


@dataclass(frozen=True, kw_only=True)
class Size:
    """How large a toy is. The shipped one has these defaults; LARGE is for a GPU."""

    name: str = "small"
    scale: int = 1
    """Pixels along each side of one of the world's pixels: pictures of 16 scale x 16 scale."""
    vae_channels: tuple[int, ...] = ()
    """Of a trained AutoencoderKL with 4 latent channels. Empty: latents are the pixels, with nothing to train."""
    vae_steps: int = 0
    channels: tuple[int, ...] = (32, 64)
    """Of the UNet; all levels but the first attend to the prompt."""
    layers: int = 1
    heads: tuple[int, ...] = (2, 4)
    groups: int = 8
    width: int = WIDTH
    text_layers: int = 3
    clip_widths: tuple[int, int] = (48, 72)
    """Text and vision tower of the preference models, patches of 4x4 world pixels."""
    clip_layers: tuple[int, int] = (2, 3)
    blocks: int = 0
    """Of an MMDiT in the UNet's place, two attentions in the first of them: a flow model. 0: a UNet."""
    patch: int = 2
    """A side of the MMDiT's patches in latent pixels; `channels` and `heads` have one entry, its width and heads."""
    shift: float = 1.0
    """Of a flow's sigmas, in pretraining as in sampling: shift sigma / (1 + (shift - 1) sigma)."""
    batch: int | None = None
    """Pictures of a pretraining step; None: build.BATCH."""
    steps: int | None = None
    learning_rate: float | None = None

    @property
    def pixels(self) -> int:
        """A side of its pictures."""
        return SIZE * self.scale

    @property
    def latent(self) -> tuple[int, int, int]:
        """C, H, W"""
        side = self.pixels // 2 ** max(0, len(self.vae_channels) - 1)
        return (4 if self.vae_channels else 3), side, side

    @property
    def pipeline(self) -> str:
        """Name of the pipeline's class in diffusers."""
        return "StableDiffusion3Pipeline" if self.blocks else "StableDiffusionXLPipeline"

    @property
    def network(self) -> str:
        """Folder of the network that is trained."""
        return "transformer" if self.blocks else "unet"


LARGE = Size(
    name="large",
    scale=4,
    vae_channels=(32, 64, 96),
    vae_steps=2000,
    channels=(96, 256, 256),
    layers=2,
    heads=(2, 4, 4),
    groups=32,
    width=128,
    text_layers=5,
    clip_widths=(128, 256),
    clip_layers=(4, 6),
    batch=256,
    steps=6000,
    learning_rate=4e-4,
)
"""64x64 pictures through a trained VAE. Not tried on a GPU yet."""
FLOW = Size(
    name="flow",
    channels=(80,),
    heads=(5,),
    blocks=4,
    patch=4,
    shift=1.5,
    steps=12000,
)
"""The shipped flow model. Its text is the 16 tokens of both CLIPs: without T5 diffusers appends max_sequence_length
zeros to them, 256 unless told, which it was not trained with: call the pipeline with max_sequence_length=0."""
SIZES = {"small": Size(), "large": LARGE, "flow": FLOW}


def flags_of(directory: Path, scorers: bool = True) -> list[str]:
    """What makes `--model toy` load a toy that build.py left there; scorers=False: for train_spm."""
    flags = ["--pretrained_model_name_or_path", str(directory), "--pickscore_path", str(directory / "pickscore")]
    return [*flags, "--spm_path", str(directory / "spm" / "model.safetensors")] if scorers else flags


def toy_files(weights: Path = WEIGHTS) -> dict[str, Path]:
    """A shipped toy: its pipeline (model), WEIGHTS or FLOW_WEIGHTS, its spm, and the pickscore of both."""
    found = {"model": weights, "spm": weights / "spm" / "model.safetensors", "pickscore": WEIGHTS / "pickscore"}
    for path in found.values():
        if not path.exists():
            raise FileNotFoundError(
                f"{path} is missing from the installation. Install spo_fast again, or make the toy's weights with "
                f"`python -m spo_fast.toy.build{' --size flow' * (path == FLOW_WEIGHTS)}` (about an hour on 2 cores)."
            )
    return found


@contextlib.contextmanager
def no_progress_bar() -> Iterator[None]:
    """transformers draws a bar for every encoder it loads; ours to restore, since it is a global switch."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


WITHOUT_T5 = {"text_encoder_3": None, "tokenizer_3": None}
"""What StableDiffusion3Pipeline.from_pretrained asks to be told even of an index that says so (seen with 0.42.1)."""
ABSENT = {
    "StableDiffusionPipeline": ("safety_checker",),
    "StableDiffusion3Pipeline": tuple(WITHOUT_T5),
}
"""What else a pipeline's index names though it is not there."""


def save_pipeline(path: Path, parts: dict[str, Any], pipeline: str) -> None:
    """Each part in its folder and model_index.json, as the pipeline's own save_pretrained would."""
    index: dict[str, str | bool | list[str] | list[None]] = {"_class_name": pipeline}
    for name, part in parts.items():
        with no_progress_bar():
            part.save_pretrained(str(path / name))
        if name.startswith("text_encoder"):
            with_old_names(path / name / "model.safetensors")
        if name.startswith("tokenizer"):  # transformers < 5 reads vocab.json and merges.txt where diffusers loads one
            part.backend_tokenizer.model.save(str(path / name))
        index[name] = [type(part).__module__.split(".")[0], type(part).__name__.removesuffix("Fast")]
    index |= {absent: [None, None] for absent in ("feature_extractor", "image_encoder", *ABSENT.get(pipeline, ()))}
    if pipeline == "StableDiffusionXLPipeline":
        index["force_zeros_for_empty_prompt"] = True
    (path / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")


def with_old_names(file: Path) -> None:
    """transformers >= 5.6 writes a CLIPTextModel without the prefix text_model., which every version reads and older
    ones need: without it they start from random weights with no more than a warning (seen with 4.57.1)."""
    from safetensors.torch import load_file

    tensors = load_file(file)
    if not any(name.startswith("text_model.") for name in tensors):
        named = {f"text_model.{name}": value for name, value in tensors.items()}
        save_tensors(named, file, metadata={"format": "pt"})


def word_merges() -> list[tuple[str, str]]:
    """Byte-pair merges that make one token of a word of the world's captions, but for green, which red's break up."""
    words = [*COLOURS, *SHAPES, "left", "right", "of", "above", "below"]
    merges: dict[tuple[str, str], None] = {}  # in order, each once
    for word in words:
        letters = [*word[:-1], word[-1] + "</w>"]
        for i in range(1, len(letters)):
            merges["".join(letters[:i]), letters[i]] = None
    return list(merges)


def toy_parts(seed: int, size: Size = SIZES["small"]) -> dict[str, Any]:
    """The pipeline's modules, tokenizers and scheduler by their folders' names, before pretraining.

    The global RNG is left as it was.
    """
    import torch
    from diffusers.schedulers.scheduling_ddim import DDIMScheduler
    from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler

    from spo_fast.models.files.clip_tokenizer import END, clip_tokenizer

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        tokenizer, tokenizer_2 = (clip_tokenizer(pad, MAX_LENGTH, merges=word_merges()) for pad in (END, "!"))
        network = tiny_mmdit(size) if size.blocks else tiny_unet(size)
        encoders = [
            tiny_text_encoder(part, size.width, projected, num_layers=size.text_layers)
            for part, projected in ((tokenizer, bool(size.blocks)), (tokenizer_2, True))
        ]
        vae = untrained_vae(size) if size.vae_channels else identity_vae()
    if size.blocks:
        vae.register_to_config(shift_factor=0.0)  # the pipeline of SD3 adds it without asking whether there is one
        scheduler = FlowMatchEulerDiscreteScheduler(shift=size.shift)
    else:
        scheduler = DDIMScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            prediction_type="v_prediction",
            clip_sample=False,
            set_alpha_to_one=False,
            steps_offset=1,
        )
    return {
        "tokenizer": tokenizer,
        "tokenizer_2": tokenizer_2,
        "text_encoder": encoders[0],
        "text_encoder_2": encoders[1],
        size.network: network,
        "vae": vae,
        "scheduler": scheduler,
    }


def tiny_unet(size: Size) -> UNet2DConditionModel:
    """A UNet of SDXL's kind; all levels but the first attend to the prompt."""
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

    attending = len(size.channels) - 1
    return UNet2DConditionModel(
        sample_size=size.latent[-1],
        in_channels=size.latent[0],
        out_channels=size.latent[0],
        block_out_channels=size.channels,
        layers_per_block=size.layers,
        down_block_types=("DownBlock2D", *["CrossAttnDownBlock2D"] * attending),
        up_block_types=(*["CrossAttnUpBlock2D"] * attending, "UpBlock2D"),
        attention_head_dim=size.heads,  # heads, as in SDXL's settings, despite the name
        transformer_layers_per_block=(1,) * len(size.channels),
        norm_num_groups=size.groups,
        cross_attention_dim=2 * size.width,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + size.width,
    )


def tiny_mmdit(size: Size) -> SD3Transformer2DModel:
    """A transformer of SD3.5's kind; modulations start at none, the output at zero (adaLN-Zero, arXiv 2212.09748)."""
    import torch
    from diffusers.models.transformers.transformer_sd3 import SD3Transformer2DModel

    (width,), (heads,) = size.channels, size.heads
    channels, side, _ = size.latent
    transformer = SD3Transformer2DModel(
        sample_size=side,
        patch_size=size.patch,
        in_channels=channels,
        out_channels=channels,
        num_layers=size.blocks,
        attention_head_dim=width // heads,
        num_attention_heads=heads,
        joint_attention_dim=2 * size.width,
        caption_projection_dim=width,
        pooled_projection_dim=2 * size.width,
        pos_embed_max_size=side // size.patch,
        dual_attention_layers=(0,),
        qk_norm="rms_norm",
    )
    for name, module in transformer.named_modules():
        if isinstance(module, torch.nn.Linear):
            torch.nn.init.zeros_(module.bias)
            if name == "proj_out" or name.endswith(".linear"):  # of the modulations
                torch.nn.init.zeros_(module.weight)
    return transformer


def tiny_text_encoder(
    tokenizer: PreTrainedTokenizerBase, width: int, projected: bool, num_layers: int = 2
) -> CLIPTextModel | CLIPTextModelWithProjection:
    """A small CLIP text encoder for this tokenizer; projected adds the pooled projection of SDXL's second one."""
    import torch
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        projection_dim=width,
        num_hidden_layers=num_layers,
        num_attention_heads=2,
        max_position_embeddings=tokenizer.model_max_length,
        hidden_act="gelu" if projected else "quick_gelu",
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    encoder = (CLIPTextModelWithProjection if projected else CLIPTextModel)(config)
    # SDXL conditions on the layer before the last, which no LayerNorm follows: the default embeddings of
    # std 0.02 would leave every prompt nearly the same
    for table in (m for m in encoder.modules() if isinstance(m, torch.nn.Embedding)):
        torch.nn.init.normal_(table.weight, std=0.5)
    return encoder


def untrained_vae(size: Size) -> AutoencoderKL:
    """An AutoencoderKL of SDXL's kind, each of its levels after the first half as large."""
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

    levels = len(size.vae_channels)
    return AutoencoderKL(
        sample_size=size.pixels,
        block_out_channels=size.vae_channels,
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        layers_per_block=1,
        norm_num_groups=8,
        latent_channels=size.latent[0],
        mid_block_add_attention=False,
        force_upcast=False,
    )


def identity_vae(large: float = 64.0) -> AutoencoderKL:
    """An AutoencoderKL whose latents are the pixels times SCALING: exact to 1e-4, with nothing to train.

    Its ResNets add zero. What is left in the way, a group norm and a SiLU, is made linear: each group of channels holds
    x, -x, L and -L, so its mean is 0 and its deviation L / sqrt(2) up to x^2 / L^2, and silu(y) - silu(-y) = y.
    """
    import torch
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

    vae = AutoencoderKL(
        sample_size=SIZE,
        block_out_channels=(12,),  # one entry: latents are as large as the image
        layers_per_block=1,
        norm_num_groups=3,
        latent_channels=3,
        mid_block_add_attention=False,
        scaling_factor=SCALING,
        force_upcast=False,
    )
    with torch.no_grad():
        for name, parameter in vae.named_parameters():
            parameter.fill_(1.0 if "norm" in name and name.endswith("weight") else 0.0)
        for part in (vae.encoder, vae.decoder):
            for channel in range(3):
                group = 4 * channel
                part.conv_in.weight[group, channel, 1, 1] = 1
                part.conv_in.weight[group + 1, channel, 1, 1] = -1
                part.conv_in.bias[group + 2 : group + 4] = torch.tensor([large, -large])
                part.conv_out.weight[channel, group, 1, 1] = large / 2**0.5
                part.conv_out.weight[channel, group + 1, 1, 1] = -large / 2**0.5
        vae.quant_conv.weight[:3, :3, 0, 0] = torch.eye(3)
        vae.quant_conv.bias[3:] = -30.0  # log-variance of the posterior: none
        vae.post_quant_conv.weight[:, :, 0, 0] = torch.eye(3)
    return vae


def deviation(latents: Tensor) -> float:
    """Of all their numbers. Raises RunError where they do not differ: the VAE tells no picture from another."""
    found = float(latents.std())
    if not found > 0:
        raise RunError(f"The VAE's latents have a deviation of {found}: its training failed. Choose another --seed.")
    return found
