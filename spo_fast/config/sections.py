"""Sections that the configs of both trainers and of evaluation share."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

from spo_fast.config.fields import Count, NotNegative, Positive, Range, Section, Share, Whole, require
from spo_fast.config.scorers import SCORER_SOURCES, SCORERS

FLOWS = ("toy-flow", "sd35", "flux")
"""Of --model: those whose networks predict the velocity of a flow."""
TOYS = ("toy", "toy-flow")
"""Of --model: those of the embedded world, whose prompts and true scores are known."""


@dataclass(frozen=True, kw_only=True)
class ModelConfig(Section):
    """The diffusion model: its files, its size and its precision."""

    model: Literal["toy", "toy-flow", "sd15", "sdxl", "sd35", "flux"] = "toy"
    """Architecture: sd15 (512 px), sdxl (1024 px), the flow models sd35 (Stable Diffusion 3.5, medium or large) and
    flux (FLUX.1 dev or schnell), or an embedded toy that runs on a CPU: a tiny SDXL, or with toy-flow a tiny SD3."""
    pretrained_model_name_or_path: str | None = None
    """Hub id, local diffusers directory, or one .safetensors file (of a flow model its transformer, as Stability, BFL
    and ComfyUI have it). Default: the architecture's public base model."""
    base_model_name_or_path: str | None = None
    """Hub id or local diffusers directory of all that a flow model's one file has not: text encoders, VAE, scheduler.
    Default: those of the published model to which the file's shapes belong."""
    pretrained_vae_model_name_or_path: str | None = None
    """Another VAE (a hub id, directory or file). Default for sdxl: madebyollin/sdxl-vae-fp16-fix; otherwise the model's
    own."""
    revision: str | None = None
    """Hub revision (branch, tag or commit) of the model."""
    variant: str | None = None
    """Hub file variant of the model, such as fp16; with a question mark (fp16?) only of the parts that have it. By
    default that is fp16? of flow models in 16 bits, which halves the download of T5."""
    height: Count | None = None
    """Image height in pixels, a multiple of the VAE's factor (8; 16 for flow models). Default: the architecture's own
    size; 512 for flow models."""
    width: Count | None = None
    """Image width in pixels, likewise."""
    mixed_precision: Literal["auto", "no", "fp16", "bf16", "fp64"] = "auto"
    """Compute type of UNet and VAE: no = float32, fp16, bf16, fp64 (for checks); auto = fp16 on a GPU, on a CPU bf16 if
    it multiplies that faster (AMX, or measured in AVX-512) and the UNet is wide, else no. Trained
    weights stay float32."""
    allow_tf32: bool = True
    """Let what remains in float32 on a GPU (the scorer's towers) use TF32 products, as the published runs did."""
    size_told: Literal["own", "native"] = "own"
    """The size in pixels that SDXL's UNet is told (time_ids): the run's own, or native, the one the model was made for
    (1024) whatever the run's, as the published step-aware preference models were trained."""
    embedded_guidance: NotNegative | None = None
    """What FLUX.1-dev is told as guidance, as guidance_scale of diffusers' FluxPipeline. Default: 3.5. Its candidates
    need no second, unconditional half: --guidance_scale stays 1."""
    max_sequence_length: Annotated[int, Range(0, 512)] | None = None
    """Flow models: tokens of T5's prompts (zeros where an SD3 lacks T5), as in diffusers' pipelines.
    Default: 256 of sd35, 512 of flux."""
    t5_weights: Literal["full", "int8"] = "full"
    """Flow models: how T5's linear layers are held while it encodes prompts. int8: half the memory (T5-XXL takes 9.5 GB
    in 16 bits), inexact. --memory small chooses it."""
    decode_chunk: Count | None = None
    """Images decoded and scored at a time: memory against launches. Default: what the device's memory allows."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            self.size_told == "own" or self.model in ("sdxl", "toy"),
            f"size_told=native is SDXL's: a model of kind {self.model} is told no size. Leave it out.",
        )
        odd = next((f"{n}={v}" for n, v in self.told.items() if v is not None and n != "size_told"), None)
        require(
            odd is None or self.model in FLOWS,
            f"{odd} is for flow models ({', '.join(FLOWS)}): --model {self.model} has no such input. Leave it out.",
        )

    @property
    def told(self) -> dict[str, object]:
        """What pictures depend on of what the network is told beside words and guidance_scale; a default is None."""
        names = ("embedded_guidance", "max_sequence_length", "t5_weights", "size_told")
        return {name: None if (own := getattr(self, name)) == getattr(type(self), name) else own for name in names}

    @property
    def images_per_decode(self) -> int:
        """decode_chunk, or 8 where nothing has chosen it."""
        return self.decode_chunk or 8

    def precision_on(self, device_type: str) -> str:
        """mixed_precision on a cuda or cpu device: no, fp16, bf16 or fp64; auto as far as that tells.

        What a CPU is faster in, models/device.py chooses before.
        """
        if self.mixed_precision != "auto":
            return self.mixed_precision
        return "fp16" if device_type == "cuda" else "no"


@dataclass(frozen=True, kw_only=True)
class ComputeConfig(Section):
    """How the networks are computed. Nothing here changes what is computed."""

    compile: Literal["off", "regional", "full"] | None = None
    """torch.compile of UNet, VAE decoder and a training's scorer: of their repeated blocks, or whole; the first use
    waits for it. Default: on a GPU regional, if the run is long enough to save more than that takes; off on a CPU."""
    fuse: bool | None = None
    """This package's fused operations inside the networks, channels-last, and the text's keys and values once a
    rollout. Default: on a GPU, and for memory=balanced. On a CPU it saves memory and costs time."""
    attention: Literal["auto", "sdpa", "cudnn", "xformers", "flash3"] = "auto"
    """Attention kernel of the fused UNet: PyTorch's own choice, cuDNN's, xformers' or FlashAttention 3. auto: the
    fastest of those that run here, timed at the start on the run's shapes; sdpa on a CPU."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            self.fuse is not False or self.compile in (None, "off"),
            f"compile={self.compile} works on the fused networks: leave out --no-fuse, or use --compile off.",
        )
        require(
            self.fuse is not False or self.attention in ("auto", "sdpa"),
            f"attention={self.attention} is for the fused UNet: leave out --no-fuse, or use --attention sdpa.",
        )


@dataclass(frozen=True, kw_only=True)
class AdamConfig(Section):
    """What the optimizers of all trainers share."""

    learning_rate: Positive = 6e-5
    """Peak learning rate, per optimizer step."""
    optimizer: Literal["adamw", "adamw8bit", "paged_adamw8bit", "prodigy", "schedulefree"] = "adamw"
    """torch AdamW; bitsandbytes' 8-bit AdamW with resident or paged state (resident after a resume); prodigy, which
    finds the learning rate itself (learning_rate, a factor of it, is 1 then); schedulefree, an AdamW without a schedule
    whose average of all steps is what is exported (it needs a larger rate, warmed up over lr_warmup_steps)."""
    min_8bit_size: Whole = 4096
    """Elements: 8-bit optimizers keep the state of smaller tensors in float32."""
    adam_beta1: Share = 0.9
    """AdamW's first decay."""
    adam_beta2: Share = 0.999
    """AdamW's second decay."""
    adam_weight_decay: NotNegative = 1e-4
    """Decoupled weight decay."""
    adam_epsilon: Positive = 1e-8
    """AdamW's epsilon."""
    max_grad_norm: Positive | None = None
    """Clip norm. None reproduces the published SPO runs, whose clipping never took effect."""
    lr_warmup_steps: Whole = 0
    """Iterations of warm-up (schedules other than constant)."""
    train_batch_size: Count = 10
    """Pairs of one accumulation slot on each rank: an optimizer step sees train_batch_size x
    gradient_accumulation_steps pairs of each."""
    gradient_accumulation_steps: Count = 1
    """Accumulation slots of an optimizer step. The published runs used 4 GPUs: on one, 4 times their value gives as
    many pairs a step."""

    def __post_init__(self) -> None:
        super().__post_init__()
        decay = self.learning_rate * self.adam_weight_decay
        require(
            self.optimizer != "schedulefree" or getattr(self, "lr_scheduler", "constant") == "constant",
            "optimizer=schedulefree has no schedule: use --lr_scheduler constant (--lr_warmup_steps warms it up).",
        )
        require(
            decay < 1, f"learning_rate x adam_weight_decay is {decay:g}: from 1 on a step turns the weights around."
        )


def _with_paths(section: type) -> type:
    """A field <name>_path for each source of scorers' weights."""
    for name, source in SCORER_SOURCES.items():
        if source.flag:
            section.__annotations__[f"{name}_path"] = "str | None"
            setattr(section, f"{name}_path", dataclasses.field(default=None, metadata={"help": source.flag}))
    return section


@dataclass(frozen=True, kw_only=True)
@_with_paths
class ScorerPaths(Section):
    """Where scorers' weights are, <name>_path each; none takes the published ones from the hub."""

    def paths_of(self, names: Iterable[str]) -> dict[str, str | None]:
        """Scorers, and what they need beside their own weights, with the local paths given for them."""
        found = [record for name in names if (record := SCORERS[name]).source is not None]
        wanted = dict.fromkeys(one for record in found for one in (record.name, record.beside or record.name))
        return {name: getattr(self, f"{name}_path", None) for name in wanted}

    if TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any: ...


@dataclass(frozen=True, kw_only=True)
class PairSourceConfig(Section):
    """Where labelled pairs are, and how they are read."""

    pairs: str | None = None
    """Preference pairs: Pick-a-Pic style parquet (file or directory), a hub data set id, or a folder with a .jsonl,
    .csv or .tsv of prompt, image_0, image_1, label_0, label_1. Of files named after splits the training split's."""
    pairs_revision: str | None = None
    """Hub revision (branch, tag or commit) of the pairs."""
    validation_share: Share = 0.02
    """Share of the prompts held out, with all their pairs."""
    validation_pairs: str | None = None
    """Another source of pairs to hold out, in place of a share of the prompts. Of files named after splits the
    validation split's, else the test split's."""
    max_validation_pairs: Count = 512
    """Held-out pairs used in an evaluation."""
    max_bad_share: Share = 0.01
    """Stop when more than this share of the rows is unusable. They are counted and named in bad_rows.jsonl."""
    cache_latents: bool | None = None
    """Keep the VAE's posterior of every image on disk: encoded once, not once an epoch. In 16 bits an image takes 64 KB
    at 512 px, 256 KB at 1024 px. Default: if the run makes more than one pass."""
    latent_cache_dir: str | None = None
    """Where they are kept. Default: latent_cache in the output directory."""
    num_workers: Count = 4
    """Threads that read and decode images."""


@dataclass(frozen=True, kw_only=True)
class LoopConfig(Section):
    """What the runs of all trainers share."""

    output_dir: str = "runs/spo"
    """Everything the run writes."""
    seed: Annotated[int, Range(0, 2**32 - 1)] = 42
    """Of all randomness."""
    num_train_epochs: Count = 10
    """Passes over the data."""
    max_train_steps: Count | None = None
    """Stop after so many iterations, whatever the epochs. SPO: one rollout and its updates each; preference models: one
    optimizer step each."""
    checkpointing_steps: Count = 100
    """Iterations between checkpoints; there is one at the end of the run as well."""
    checkpoints_total_limit: Count | None = None
    """Checkpoints kept; the oldest are deleted."""
    resume_from_checkpoint: str | None = None
    """The word latest (the last whole one), the path of a checkpoint, or hub:OWNER/NAME (with @REVISION), a repository
    that has some: its newest."""
    stop_seconds: Count = 100
    """After SIGTERM or Ctrl-C the run saves at its next safe point (a judgement of the rollout, or the end of the
    iteration) and ends with status 0; after so many seconds it gives up and ends without."""
    report_to: Literal["none", "tensorboard", "wandb"] = "none"
    """Besides metrics.jsonl, which is always written."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""

    def iterations(self, per_epoch: int) -> int:
        """Of the whole run."""
        return min(self.num_train_epochs * per_epoch, self.max_train_steps or sys.maxsize)
