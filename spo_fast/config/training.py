"""Every setting of a run, one frozen dataclass a concern. Field names are the flags and the YAML file's keys.

A preset (presets.py) returns a whole Config; the resolved one is saved beside the weights as config.yaml.
"""

from __future__ import annotations

import ast
import dataclasses
import difflib
import functools
import math
import re
import sys
import types
import typing
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

if TYPE_CHECKING:
    from typing_extensions import Self


class RunError(ValueError):
    """A run cannot go on, for a reason its user can mend."""


def _need(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


# ------------------------------------------------------------------------------------------------ what a field may hold


@dataclass(frozen=True)
class Range:
    """Where a number may lie, both for its check and for --help. NaN and infinity never do."""

    low: float = -math.inf
    high: float = math.inf
    ends: str = "[]"
    """Which of the limits belong to it: [ or ( and ] or )."""
    why: str = ""

    def __contains__(self, value: float) -> bool:
        above = value > self.low if self.ends[0] == "(" else value >= self.low
        below = value < self.high if self.ends[1] == ")" else value <= self.high
        return math.isfinite(value) and above and below

    def __str__(self) -> str:
        if self.high < math.inf:
            return f"in {self.ends[0]}{self.low}, {self.high}{self.ends[1]}"
        return f"{'above' if self.ends[0] == '(' else 'at least'} {self.low}"


Count = Annotated[int, Range(1)]
Whole = Annotated[int, Range(0)]
Positive = Annotated[float, Range(0, ends="(]")]
NotNegative = Annotated[float, Range(0)]
Guidance = Annotated[float, Range(0, 100, why="beyond, what is drawn is noise")]
Share = Annotated[float, Range(0, 1, "[)")]
Threshold = Annotated[float, Range(-1, 1, "[)", why="probabilities differ by less than 1")]


@dataclass(frozen=True)
class Kind:
    """What a field takes, read off its annotation."""

    base: type
    range: Range | None
    choices: tuple[str, ...]
    optional: bool
    many: bool

    @classmethod
    def of(cls, hint: Any) -> Kind:
        optional = typing.get_origin(hint) in (types.UnionType, typing.Union)
        if optional:
            hint = next(a for a in typing.get_args(hint) if a is not type(None))
        many = typing.get_origin(hint) is tuple
        if many:
            hint = typing.get_args(hint)[0]
        bounds = None
        if typing.get_origin(hint) is Annotated:
            hint, bounds = typing.get_args(hint)
        choices = typing.get_args(hint) if typing.get_origin(hint) is Literal else ()
        return cls(str if choices else hint, bounds, choices, optional, many)

    def check(self, label: str, value: Any) -> None:
        """Raise ValueError, beginning with the label, unless the field may hold the value."""
        if value is None:
            _need(self.optional, f"{label} has no value.")
            return
        for one in value if self.many else (value,):
            self._check_one(label, one)

    def _check_one(self, label: str, value: Any) -> None:
        if self.choices:
            known = ", ".join(self.choices)
            near = did_you_mean(value, self.choices)
            _need(value in self.choices, f"{label}={value!r:.60} is none of {known}.{near}")
        elif self.base is str:
            _need(self.many or value != "", f"{label} is empty. Give a value, or leave it out.")
            broken = re.search("[\0\ud800-\udfff]", value)
            _need(not broken, f"{label}={value!r:.60} holds a character that no text or path may have.")
        elif self.base is not bool:
            _need(math.isfinite(value), f"{label}={value} is not a finite number.")
            why = f": {self.range.why}" if self.range and self.range.why else ""
            _need(self.range is None or value in self.range, f"{label}={value!s:.60} must be {self.range}{why}.")
            # float32 ends at 3e38, and AdamW divides its rate by as little as 1 - beta
            most = 1e30 if self.base is float else 2**63 - 1
            _need(abs(value) <= most, f"{label}={value!s:.60} is too large a number.")


def did_you_mean(name: object, known: Iterable[str]) -> str:
    """A sentence that names the nearest known name, or nothing if none is near."""
    near = difflib.get_close_matches(str(name), list(known), n=1, cutoff=0.5)
    return f" Did you mean {near[0]!r}?" if near else ""


def parted(entries: Iterable[str]) -> list[str]:
    """Names of a list whose entries may hold several, parted by commas; each once."""
    return list(dict.fromkeys(name for entry in entries for name in entry.split(",") if name))


@functools.cache
def kinds_of(section: type) -> dict[str, Kind]:
    """A section's fields."""
    hints = typing.get_type_hints(section, include_extras=True)
    return {f.name: Kind.of(hints[f.name]) for f in dataclasses.fields(section)}


@dataclass(frozen=True, kw_only=True)
class Section:
    """Settings of one concern. Each field is checked by its annotation; what concerns several is checked below."""

    def __post_init__(self) -> None:
        for name, kind in kinds_of(type(self)).items():  # type: ignore[arg-type]  # mypy takes a class for its instance
            kind.check(name, getattr(self, name))


# ---------------------------------------------------------------------------------------------- preference optimisation


@dataclass(frozen=True, kw_only=True)
class ModelConfig(Section):
    model: Literal["toy", "sd15", "sdxl"] = "toy"
    """Architecture: sd15 (512 px), sdxl (1024 px) or the embedded toy, a tiny SDXL pipeline that runs on a CPU."""
    pretrained_model_name_or_path: str | None = None
    """Hub id, local diffusers directory, or one .safetensors file. Default: the architecture's public base model."""
    pretrained_vae_model_name_or_path: str | None = None
    """Another VAE (same three forms). Default for sdxl: madebyollin/sdxl-vae-fp16-fix; otherwise the model's own."""
    revision: str | None = None
    """Hub revision (branch, tag or commit) of the model."""
    variant: str | None = None
    """Hub file variant of the model, such as fp16."""
    height: Count | None = None
    """Image height in pixels, a multiple of the VAE's factor (8). Default: the architecture's own size."""
    width: Count | None = None
    """Image width in pixels, likewise."""
    mixed_precision: Literal["auto", "no", "fp16", "bf16", "fp64"] = "auto"
    """Compute type of UNet and VAE: no = float32, fp16, bf16, fp64 (for checks); auto = fp16 on a GPU, no on a CPU.
    Trained weights stay float32."""
    allow_tf32: bool = True
    """Let what remains in float32 on a GPU (the scorer's towers) use TF32 products, as the published runs did."""
    size_told: Literal["own", "native"] = "own"
    """The size in pixels that SDXL's UNet is told (time_ids): the run's own, or native, the one the model was made for
    (1024) whatever the run's, as the published step-aware preference models were trained."""
    decode_chunk: Count | None = None
    """Images decoded and scored at a time: memory against launches. Default: what the device's memory allows."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _need(
            self.size_told == "own" or self.model != "sd15",
            "size_told=native is SDXL's: an SD-1.5 is told no size. Leave it out.",
        )

    @property
    def images_per_decode(self) -> int:
        return self.decode_chunk or 8

    def precision_on(self, device_type: str) -> str:
        """mixed_precision on a cuda or cpu device, auto resolved: no, fp16, bf16 or fp64."""
        if self.mixed_precision != "auto":
            return self.mixed_precision
        return "fp16" if device_type == "cuda" else "no"


@dataclass(frozen=True, kw_only=True)
class AdapterConfig(Section):
    rank: Count = 4
    """Rank of the LoRA matrices."""
    lora_alpha: Positive | None = None
    """LoRA alpha; the update is scaled by alpha / rank. Default: the rank (scale 1), as published."""
    lora_targets: tuple[str, ...] = ("to_q", "to_k", "to_v", "to_out.0")
    """Names (endings) of the linear layers that get a LoRA."""
    full_finetune: bool = False
    """Train every UNet weight instead of a LoRA; keeps a frozen copy as the reference."""
    lora_path: str | None = None
    """Start from these LoRA weights, which are the reference then: a file of diffusers, PEFT, kohya, ... (or its
    directory) of the same base model, rank, lora_alpha and lora_targets. Default: a new LoRA."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _need(len(self.lora_targets) > 0, "lora_targets is empty: nothing would be trained.")
        _need(
            self.lora_path is None or not self.full_finetune,
            "lora_path starts a LoRA, but full_finetune trains none: leave one of them out.",
        )

    @property
    def alpha(self) -> float:
        return self.rank if self.lora_alpha is None else self.lora_alpha


@dataclass(frozen=True, kw_only=True)
class SampleConfig(Section):
    sample_batch_size: Count = 10
    """Prompts of one rollout on each rank; of dpo and mapo pairs of one iteration."""
    num_steps: Annotated[int, Range(1, 999)] = 20
    """DDIM steps."""
    eta: Annotated[float, Range(0.001, 1, why="at 0 a step is deterministic and has no log-probability")] = 1.0
    """DDIM's noise level; 0 has no log-probabilities, and near it their size knows no limit."""
    guidance_scale: Guidance = 5.0
    """Classifier-free guidance, in sampling and in training. At 1 or below the unconditional half is not evaluated."""
    num_candidates: Annotated[int, Range(2, why="two or more are needed to compare")] = 4
    """k: candidates x_{t-1} drawn at each branching step."""
    num_inner_steps: Whole = 0
    """MSPO: steps that candidates go on by themselves after they part, before they are compared. 0 is SPO."""
    branch_start: Whole = 4
    """First branching step, an index below num_steps. 4 of 20 is t = 751: above it there is no detail to compare."""
    branch_end: Count | None = None
    """Stop branching before this step: with branch_start the range of timesteps that is trained. Default: num_steps."""
    threshold: Threshold = 0.3
    """A pair is kept if softmax([s_w, s_l]) differs by more than this: s_w - s_l > 2 artanh(threshold)."""
    threshold_max: Threshold | None = None
    """LPO: the threshold at the noisiest step; it rises linearly with sigma_t, from --threshold at the least noisy one.
    Default: the same at all."""
    next_start: Literal["random", "winner", "loser"] = "random"
    """Which candidate the next step starts from. The paper's ablation: random is far better."""
    last_step: Literal["compare", "extend", "keep"] = "compare"
    """If the last step is a comparison point: compare there and branch once more, or (extend, the published SDXL code)
    skip that comparison and let the group run to the end. keep (GradSPO's code): as compare, but the final images are
    judged at the last timestep instead of 0, and whatever they score the pair is kept."""
    rows_per_forward: Annotated[int, Range(2, why="one state and its unconditional half")] | None = None
    """UNet rows (candidates times 2 for guidance) in one forward without gradient: memory. Default: all of a step's, or
    what the device's memory allows."""
    branch_window: Literal["all", "auto"] = "all"
    """auto: comparisons whose pairs are almost never valid are left out, one candidate goes on there: less time, a few
    pairs lost, both logged. Inexact."""
    rollout_weights: Literal["unmerged", "merged"] = "unmerged"
    """merged: rollouts use a copy of the weights with the LoRA added in, rounded stochastically in 16 bits: fewer
    products, and right on average only. Candidates are compared among themselves either way."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _need(
            self.branch_start < self.num_steps,
            f"branch_start={self.branch_start} leaves no steps to branch (num_steps={self.num_steps}). "
            f"Use a value from 0 to {self.num_steps - 1}; the published runs use 4 of 20.",
        )
        _need(
            self.branch_start < self.last_branch <= self.num_steps,
            f"branch_end={self.branch_end} must lie above branch_start={self.branch_start} and not above "
            f"num_steps={self.num_steps}. Leave it out to branch to the end.",
        )

    @property
    def last_branch(self) -> int:
        """branch_end, resolved."""
        return self.num_steps if self.branch_end is None else self.branch_end

    @property
    def branching_steps(self) -> int:
        """Steps whose transitions are trained: the most pairs one prompt can give."""
        return self.last_branch - self.branch_start


@dataclass(frozen=True, kw_only=True)
class ComputeConfig(Section):
    """How the networks are computed. Nothing here changes what is computed."""

    compile: Literal["off", "regional", "full"] | None = None
    """torch.compile of UNet, VAE decoder and a training's scorer: of their repeated blocks, or whole; the first use
    waits for it. Default: regional on a GPU, off on a CPU (a minute for two tiny graphs)."""
    fuse: bool | None = None
    """This package's fused operations inside the networks, channels-last, and the text's keys and values once a
    rollout. Default: on a GPU, and for memory=balanced."""
    attention: Literal["auto", "sdpa", "cudnn", "xformers", "flash3"] = "auto"
    """Attention kernel of the fused UNet: PyTorch's own choice, cuDNN's, xformers' or FlashAttention 3. auto: the
    fastest of those that run here, timed at the start on the run's shapes; sdpa on a CPU."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _need(
            self.fuse is not False or self.compile in (None, "off"),
            f"compile={self.compile} works on the fused networks: leave out --no-fuse, or use --compile off.",
        )
        _need(
            self.fuse is not False or self.attention in ("auto", "sdpa"),
            f"attention={self.attention} is for the fused UNet: leave out --no-fuse, or use --attention sdpa.",
        )


@dataclass(frozen=True, kw_only=True)
class EngineConfig(ComputeConfig):
    """How the networks are computed. Nothing here but base_weights and memory=small changes what is computed."""

    memory: Literal["fast", "balanced", "small"] | None = None
    """What the backward keeps of the forward. fast: all it needs. balanced: norms are computed again. small: everything
    is (gradient_checkpointing), images are decoded singly and AdamW keeps 8-bit state, unless set otherwise. Default:
    the first whose activations fit into the device's memory."""
    base_weights: Literal["full", "nf4", "int8", "fp8"] = "full"
    """How the frozen UNet's transformers hold their linear layers. nf4 (bitsandbytes): a quarter of the memory. int8,
    fp8 (a GPU of compute capability 8.9): half, and products in 8 bits. All but full are inexact, for policy and
    reference alike; what they change is measured and printed in the first iteration."""
    cuda_graphs: bool | None = None
    """On a CUDA device: what a rollout repeats (UNet and transition, decoding, scoring) is replayed as CUDA graphs.
    Default: where the memory they keep fits beside a training step."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _need(
            self.fuse is not False or self.memory != "balanced",
            "memory=balanced is a property of the fused networks: leave out --no-fuse, or use fast or small.",
        )


@dataclass(frozen=True, kw_only=True)
class AdamConfig(Section):
    """What the optimizers of all trainers share."""

    learning_rate: Positive = 6e-5
    """Peak learning rate, per optimizer step."""
    optimizer: Literal["adamw", "adamw8bit", "paged_adamw8bit"] = "adamw"
    """torch AdamW, or bitsandbytes' 8-bit AdamW with resident or paged state (resident after a resume)."""
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
        _need(decay < 1, f"learning_rate x adam_weight_decay is {decay:g}: from 1 on a step turns the weights around.")


@dataclass(frozen=True, kw_only=True)
class OptimConfig(AdamConfig):
    lr_scheduler: Literal["constant", "constant_with_warmup", "linear", "cosine", "polynomial"] = "constant"
    """Learning-rate schedule over the iterations of the run."""
    accumulation: Literal["balanced", "published"] = "balanced"
    """balanced: an iteration's pairs are cut into nearly equal optimizer steps, every pair weighs the same and is used
    once. published: slots straddle rollouts, a short one has full weight, as in the published code."""
    states_per_forward: Annotated[int, Range(2, why="the two sides of a pair can have different x_t")] | None = None
    """UNet states (times 2 for guidance) in one training forward and backward: memory. Default: one slot's most, or
    what the device's memory allows."""
    gradient_checkpointing: bool | None = None
    """Recompute activations in the backward pass: less memory, about a third more training time. Default: if memory is
    small."""
    max_nonfinite_steps: Count = 10
    """Stop, with a diagnosis, after so many optimizer steps in a row whose loss or gradient was not finite. Each is
    skipped and counted."""

    @property
    def states_at_once(self) -> int:
        """UNet states in one forward of training; a slot has two a term at most."""
        return self.states_per_forward or 2 * self.train_batch_size


@dataclass(frozen=True, kw_only=True)
class ObjectiveConfig(Section):
    """Settings that only some methods read; READS (presets.py) says which."""

    method: Literal["spo", "mspo", "d3po", "lpo", "gradspo", "ddpo", "dpok", "dense", "dpo", "mapo"] = "spo"
    """What trains the model; it brings its published settings. On rollouts: spo, mspo (with inner steps), d3po (whole
    trajectories), lpo (latent scorer), gradspo, ddpo and dpok (policy gradients), dense (DenseReward). On --pairs: dpo
    (Diffusion-DPO), mapo."""
    beta: Positive = 10.0
    """Strength of the preference in the loss; of mapo the weight of its margin. Not of ddpo, dpok."""
    clip: Annotated[float, Range(0, 1, "()", why="none turns the clamp off")] | None = 0.1
    """Probability ratios are clamped to [1 - clip, 1 + clip]; none turns the clamp off. Not of dpo, mapo."""
    guidance_step: Positive = 0.5
    """gradspo: how far the noise target is shifted along the reward."""
    ema_decay: Share = 0.9
    """gradspo: of the moving average that collects, per optimizer step."""
    advantage_clip: Positive = 5.0
    """ddpo, dpok: advantages are clamped to +- this many standard deviations."""
    kl_weight: NotNegative = 0.01
    """dpok: weight of the squared difference from the reference's predictions."""
    gamma: Annotated[float, Range(0, 1, "(]")] = 0.9
    """dense: step i (0 the noisiest) is drawn with weight gamma^i."""
    num_ranked: Annotated[int, Range(2)] = 2
    """dense: trajectories of a prompt that one term ranks, drawn from its num_candidates."""
    num_sampled_steps: Count = 3
    """dense: steps drawn for a term. All of a term's states are in one backward: memory."""
    terms_per_prompt: Count = 10
    """dense: terms drawn from each prompt's trajectories."""
    prompt_dropout: Share = 0.0
    """dpo, mapo: share of the prompts that are replaced by the empty one."""


SCORERS_BESIDE = {"aesthetic": "clip", "image_reward": "bert", "geneval": "clip"}
"""Scorer -> whose weights it needs beside its own."""


@dataclass(frozen=True, kw_only=True)
class ScorerPaths(Section):
    """Where scorers' weights are; none takes the published ones from the hub."""

    spm_path: str | None = None
    """Local step-aware preference model (.bin or .safetensors file, or a directory). Default: the architecture's, from
    the hub."""
    pickscore_path: str | None = None
    """Local PickScore directory. Default: yuvalkirstain/PickScore_v1 from the hub."""
    lrm_path: str | None = None
    """Local latent reward model (a directory). Default: the architecture's, from casiatao/LRM on the hub."""
    hpsv2_path: str | None = None
    """Local HPS_v2_compressed.pt. Default: that of xswu/HPSv2 from the hub."""
    hpsv21_path: str | None = None
    """Local HPS_v2.1_compressed.pt. Default: that of xswu/HPSv2 from the hub."""
    clip_path: str | None = None
    """Local CLIP ViT-L/14 directory (scorers clip, aesthetic, geneval). Default: openai/clip-vit-large-patch14."""
    aesthetic_path: str | None = None
    """Local sac+logos+ava1-l14-linearMSE.pth. Default: that of camenduru/improved-aesthetic-predictor from the hub."""
    image_reward_path: str | None = None
    """Local ImageReward.pt. Default: that of THUDM/ImageReward from the hub."""
    geneval_path: str | None = None
    """Local Mask2Former directory (geneval). Default: facebook/mask2former-swin-small-coco-instance from the hub."""
    bert_path: str | None = None
    """Local vocab.txt of BERT (scorer image_reward). Default: that of google-bert/bert-base-uncased from the hub."""

    def paths_of(self, names: Iterable[str]) -> dict[str, str | None]:
        """Scorers, and what they need beside their own weights, with the local paths given for them."""
        wanted = dict.fromkeys(one for name in names for one in (name, SCORERS_BESIDE.get(name, name)))
        return {name: getattr(self, f"{name}_path", None) for name in wanted}


@dataclass(frozen=True, kw_only=True)
class ScorerConfig(ScorerPaths):
    scorer: tuple[str, ...] = ("spm",)
    """Scorers: spm, pickscore, hpsv2, hpsv21, clip, aesthetic, image_reward, geneval, lrm; a weight after a colon, as
    in spm:1 pickscore:0.5, makes a weighted sum. geneval (1 if all is as asked, else 0) needs --prompts with what it
    looks for, such as evaluation_metadata.jsonl. lrm, the latent reward model, judges noisy latents and cannot be
    mixed."""
    spm_time_conditioned: bool = True
    """Off: --spm_path holds a model without the timestep (train_spm --no-time_conditioned), the paper's ablation."""
    scorer_dtype: Literal["no", "fp16", "bf16"] = "no"
    """Compute type of the scorers' towers; the published code uses float32 (no)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _need(len(self.scorer) > 0, "scorer is empty: name one, such as spm.")


@dataclass(frozen=True, kw_only=True)
class DataConfig(Section):
    prompts: str | None = None
    """Prompt file: .txt (one a line; # begins a comment), .json, .jsonl, .csv, .tsv or .parquet. Default: the built-in
    list."""
    caption_column: str | None = None
    """Column or key that holds the prompt, also that of --pairs. Default: the first of caption, prompt, text."""
    shuffle: bool = True
    """A new prompt order each epoch."""
    max_prompts: Count | None = None
    """Use only the first so many prompts. The toy preset's limit is for the built-in list only."""
    prompt_cache_dir: str | None = None
    """Where prompt embeddings are kept. Default: prompt_cache in the output directory."""


@dataclass(frozen=True, kw_only=True)
class PairSourceConfig(Section):
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
    """The word latest (the last whole one), or the path of a checkpoint."""
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


@dataclass(frozen=True, kw_only=True)
class RunConfig(LoopConfig):
    validation_prompt: tuple[str, ...] = ()
    """Prompts of the sample grids made before, during and after training. Default: the first four prompts."""
    validation_metrics: tuple[str, ...] = ()
    """Held-out scores of the sample grids: what --metrics of spo_fast.evaluate takes, best one that is not trained on.
    Loaded at each grid and dropped again. Default: of the toy its true scores, if prompts and size are its world's."""
    num_validation_images: Whole = 4
    """Images of each validation prompt, from fixed noise."""
    validation_steps: Count | None = None
    """Iterations between sample grids during training. Default: one with each checkpoint."""
    recipe: Literal["default", "published", "fast"] = "default"
    """published reproduces the published code's accumulation, last step and missing clipping. fast gives up exactness
    where that is cheap: the tiny VAE, a 16-bit scorer, 8-bit AdamW."""
    push_to_hub: bool = False
    """Upload the trained weights, sample grids, model card, log and settings (with the paths that were given) when the
    run ends. Log in first: `hf auth login`."""
    hub_model_id: str | None = None
    """Repository to upload to. Default: the output directory's name, in your account."""


class Settings:
    """A whole run's settings: a dataclass of sections. Field names are flags, so a name is in one section only."""

    @classmethod
    def sections(cls) -> dict[str, type]:
        return typing.get_type_hints(cls)

    @classmethod
    def docs(cls) -> dict[str, str]:
        """Flat field name -> the docstring written under it in this file."""
        written = _docstrings()
        return {
            f.name: next(written[c.__name__][f.name] for c in section.__mro__ if f.name in written.get(c.__name__, {}))
            for section in cls.sections().values()
            for f in dataclasses.fields(section)
        }

    @classmethod
    def kinds(cls) -> dict[str, Kind]:
        """Flat field name -> what it may hold."""
        return {name: kind for section in cls.sections().values() for name, kind in kinds_of(section).items()}

    @classmethod
    def section_of(cls, name: str) -> str:
        """The section that owns a flat field name."""
        return next(s for s, c in cls.sections().items() if name in {f.name for f in dataclasses.fields(c)})

    def with_fields(self, **values: Any) -> Self:
        """A copy with flat field names set, e.g. cfg.with_fields(rank=8, eta=0.5). Unknown names raise KeyError."""
        parts: dict[str, dict[str, Any]] = {}
        for name, value in values.items():
            if name not in self.docs():
                raise KeyError(name)
            parts.setdefault(self.section_of(name), {})[name] = value
        new = {s: dataclasses.replace(getattr(self, s), **v) for s, v in parts.items()}
        return dataclasses.replace(self, **new)  # type: ignore[type-var]  # subclasses are dataclasses

    def flat(self) -> dict[str, Any]:
        """Every setting under its flag name; tuples as lists, so that it can be written as YAML or JSON."""
        values = {}
        for section in self.sections():
            for name, value in dataclasses.asdict(getattr(self, section)).items():
                values[name] = list(value) if isinstance(value, tuple) else value
        return values


@functools.cache
def _docstrings() -> dict[str, dict[str, str]]:
    """Class name -> field name -> its docstring."""
    docs: dict[str, dict[str, str]] = {}
    for node in ast.parse(Path(__file__).read_text()).body:
        if not isinstance(node, ast.ClassDef):
            continue
        for statement, after in zip(node.body, node.body[1:], strict=False):
            if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
                text = after.value if isinstance(after, ast.Expr) else None
                if isinstance(text, ast.Constant) and isinstance(text.value, str):
                    docs.setdefault(node.name, {})[statement.target.id] = " ".join(text.value.split())
    return docs


@dataclass(frozen=True, kw_only=True)
class Config(Settings):
    """A run of preference optimisation (train.py)."""

    def __post_init__(self) -> None:
        trained = {entry.split(":")[0] for entry in self.scorer.scorer}
        shown = next((name for name in parted(self.run.validation_metrics) if name in trained), None)
        _need(shown is None, f"validation_metrics: {shown} is the scorer, whose score is shown anyway. Name another.")
        _need(
            self.objective.method != "gradspo" or self.sample.num_inner_steps == 0,
            "method=gradspo compares children of one x_t: num_inner_steps must be 0.",
        )
        _need(
            self.objective.method != "gradspo" or self.sample.last_step != "extend",
            "method=gradspo compares children of one x_t: last_step=extend joins two steps. Use keep or compare.",
        )
        rounded = self.engine.base_weights
        _need(
            rounded == "full" or not self.adapter.full_finetune,
            f"base_weights={rounded} rounds the weights that full_finetune trains: leave one of them out.",
        )
        _need(
            rounded == "full" or self.sample.rollout_weights == "unmerged",
            f"rollout_weights=merged adds the LoRA to a base that base_weights={rounded} has rounded: use "
            "--rollout_weights unmerged, or --base_weights full.",
        )
        most = self.sample.num_candidates
        _need(
            self.objective.method != "dense" or self.objective.num_ranked <= most,
            f"num_ranked={self.objective.num_ranked} trajectories cannot be drawn from num_candidates={most}. "
            "Lower it, or raise --num_candidates.",
        )

    model: ModelConfig = field(default_factory=ModelConfig)
    adapter: AdapterConfig = field(default_factory=AdapterConfig)
    sample: SampleConfig = field(default_factory=SampleConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    scorer: ScorerConfig = field(default_factory=ScorerConfig)
    data: DataConfig = field(default_factory=DataConfig)
    pairs: PairSourceConfig = field(default_factory=PairSourceConfig)
    run: RunConfig = field(default_factory=RunConfig)


# ---------------------------------------------------------------------------------------------------- preference models


@dataclass(frozen=True, kw_only=True)
class RewardConfig(Section):
    parameterisation: Literal["pixel", "latent"] = "pixel"
    """pixel: the step-aware preference model (SPM), a CLIP that sees the decoded x0 estimate. latent: the latent reward
    model of LPO, the diffusion UNet's own encoder, which sees x_t and needs no VAE."""
    init_path: str | None = None
    """What training starts from. pixel: a CLIP (PickScore, the default) or a step-aware one, file or directory. latent:
    a latent reward model; default: the diffusion model's own weights."""
    time_conditioned: bool = True
    """pixel: give the vision tower the timestep. Off: the same training without it, an ablation."""
    noise: Literal["all", "ddim", "none"] = "all"
    """all: images are noised to t ~ U{0..999} and judged as the diffusion model would predict them. ddim: to one of the
    20 sampling steps 1, 51, ..., 951. none: images as they are (as PickScore itself is trained)."""
    shared_noise: bool = True
    """Both images of a pair get the same noise."""
    text_projection_path: str | None = None
    """latent, SD-1.5: local CLIP ViT-L/14, whose text projection the model starts with. Default:
    openai/clip-vit-large-patch14 from the hub."""
    train_guidance_scale: Guidance = 5.0
    """pixel: classifier-free guidance of the x0 estimate. latent: of the reward model's visual feature (LPO: 7.5)."""
    in_batch_negatives: bool = False
    """Let each prompt choose among all images of the batch as well, as CLIP is trained; the published SPM does not."""
    reward_dtype: Literal["no", "bf16"] = "no"
    """Compute type of the preference model (no: float32, as published). Trained weights stay float32."""
    reward_checkpointing: bool = False
    """Recompute the vision tower's activations in the backward pass: less memory, about a third more time."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _need(
            self.noise != "none" or not self.time_conditioned,
            "noise=none trains on clean images: there is no timestep. Add --no-time_conditioned.",
        )
        _need(
            self.parameterisation == "pixel" or (self.noise != "none" and self.time_conditioned),
            "parameterisation=latent judges noisy latents at their timestep: leave noise and time_conditioned alone.",
        )


@dataclass(frozen=True, kw_only=True)
class PairsConfig(PairSourceConfig):
    caption_column: str | None = None
    """Column that holds the prompt. Default: caption or prompt."""
    relabel: Literal["none", "pickscore"] = "none"
    """pickscore: labels come from PickScore's opinion of the two original images, as the published SDXL run has it."""
    relabel_gap: Share = 0.1
    """Relabelled pairs whose probabilities differ by no more than this are ties."""
    pickscore_path: str | None = None
    """Local PickScore directory. Default: yuvalkirstain/PickScore_v1 from the hub."""
    prompt_cache_dir: str | None = None
    """Where prompt embeddings are kept. Default: prompt_cache in the output directory."""


@dataclass(frozen=True, kw_only=True)
class RewardOptimConfig(AdamConfig):
    lr_scheduler: Literal["warmup_decay", "constant", "constant_with_warmup", "linear", "cosine"] = "warmup_decay"
    """warmup_decay: logarithmic warm-up, then linear decay to zero at lr_decay_steps (DeepSpeed's WarmupDecayLR)."""
    lr_decay_steps: Count | None = None
    """Where warmup_decay reaches zero. Default: 4 times the steps, as in the published run on 4 GPUs."""


@dataclass(frozen=True, kw_only=True)
class RewardRunConfig(LoopConfig):
    validation_steps: Count = 1000
    """Iterations between evaluations on held-out pairs; there is one after training as well."""
    validation_timesteps: tuple[Annotated[int, Range(0, 999)], ...] = (0, 251, 501, 701, 951)
    """Noise levels of the evaluation; at 0 a pixel model sees the images themselves."""
    compare_with: tuple[str, ...] = ()
    """Other preference models (files or directories) to evaluate beside the trained one, as name=path."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _need(len(self.validation_timesteps) > 0, "validation_timesteps is empty: give one or more of 0 to 999.")
        names = ["trained", "initial", *(entry.split("=", 1)[0] for entry in self.compare_with)]
        paths = [entry.partition("=")[2] for entry in self.compare_with]
        _need(
            all(paths) and "" not in names and len(set(names)) == len(names),
            "compare_with: write name=path, each name once, and neither trained nor initial.",
        )


@dataclass(frozen=True, kw_only=True)
class PreferenceConfig(Settings):
    """A run that trains a preference model (train_spm.py)."""

    def __post_init__(self) -> None:
        _need(
            self.reward.parameterisation == "pixel" or not self.run.compare_with,
            "compare_with takes pixel models, which see decoded images; parameterisation=latent has nothing for them.",
        )
        _need(
            self.reward.noise != "none" or 0 in self.run.validation_timesteps,
            "noise=none judges images as they are: validation_timesteps must have 0 among them.",
        )

    model: ModelConfig = field(default_factory=ModelConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)
    pairs: PairsConfig = field(default_factory=PairsConfig)
    optim: RewardOptimConfig = field(default_factory=RewardOptimConfig)
    run: RewardRunConfig = field(default_factory=RewardRunConfig)


# ----------------------------------------------------------------------------------------------------------- evaluation


@dataclass(frozen=True, kw_only=True)
class MetricConfig(ScorerPaths):
    metrics: tuple[str, ...] = ("pickscore", "hpsv2", "image_reward", "aesthetic")
    """Any scorer but lrm (spm judges at t = 0; geneval in percent); the toy's true scores layout and aesthetics. Commas
    may part them."""
    scorer_dtype: Literal["no", "fp16", "bf16"] = "no"
    """Compute type of the scorers' towers (no: float32)."""

    @property
    def metric_names(self) -> list[str]:
        return parted(self.metrics)


@dataclass(frozen=True, kw_only=True)
class PicturesConfig(Section):
    lora: tuple[str, ...] = ()
    """What stands beside the base model, as source or name=source: a run's directory, a LoRA (a file of diffusers,
    PEFT, kohya, ..., or its directory), a UNet's directory, or a hub id of either."""
    prompts: str | None = None
    """Prompt file, or a known set: pickapic (500), hpsv2 (3,200), parti (1,632), geneval (553); set=folder takes it
    from local files. Default: the built-in list (toy: its 64 test prompts)."""
    caption_column: str | None = None
    """Column or key that holds the prompt. Default: the first of caption, prompt, text."""
    max_prompts: Count | None = None
    """Use only the first so many prompts."""
    images_per_prompt: Count = 1
    """Pictures of each prompt, from noise of their own; the same for every contender. GenEval's tables use 4."""
    num_steps: Annotated[int, Range(1, 999)] = 20
    """DDIM steps, without noise of their own (eta 0)."""
    guidance_scale: Guidance = 5.0
    """Classifier-free guidance."""
    seed: Annotated[int, Range(0, 2**32 - 1)] = 42
    """Of the noise pictures start from, of the bootstrap and of the order in blind votes."""
    images_at_once: Count = 8
    """Pictures drawn and scored together: memory. Their last bits depend on it."""
    output_dir: str = "runs/evaluation"
    """Where pictures, scores and tables go. Pictures that are there are not made again."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig(Settings):
    """What evaluate.py and compare.py draw and judge."""

    model: ModelConfig = field(default_factory=ModelConfig)
    engine: ComputeConfig = field(default_factory=ComputeConfig)
    metric: MetricConfig = field(default_factory=MetricConfig)
    pictures: PicturesConfig = field(default_factory=PicturesConfig)
