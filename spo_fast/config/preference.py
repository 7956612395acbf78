"""The settings of training a preference model."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

from spo_fast.config.fields import Count, Range, Section, Settings, Share, require
from spo_fast.config.sections import FLOWS, AdamConfig, LoopConfig, ModelConfig, PairSourceConfig
from spo_fast.config.training import Guidance


@dataclass(frozen=True, kw_only=True)
class RewardConfig(Section):
    """The preference model, and what it sees of a pair."""

    parameterisation: Literal["pixel", "latent"] = "pixel"
    """pixel: the step-aware preference model (SPM), a CLIP that sees the decoded x0 estimate. latent: a judge that sees
    x_t and needs no VAE: LPO's latent reward model, the UNet's own encoder, or DiNa-LRM, SD3.5's first blocks."""
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
        require(
            self.noise != "none" or not self.time_conditioned,
            "noise=none trains on clean images: there is no timestep. Add --no-time_conditioned.",
        )
        require(
            self.parameterisation == "pixel" or (self.noise != "none" and self.time_conditioned),
            "parameterisation=latent judges noisy latents at their timestep: leave noise and time_conditioned alone.",
        )


@dataclass(frozen=True, kw_only=True)
class PairsConfig(PairSourceConfig):
    """The pairs that a preference model is trained on, and whose labels count."""

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
    """AdamW and the learning rate of a preference model's training."""

    lr_scheduler: Literal["warmup_decay", "constant", "constant_with_warmup", "linear", "cosine"] = "warmup_decay"
    """warmup_decay: logarithmic warm-up, then linear decay to zero at lr_decay_steps (DeepSpeed's WarmupDecayLR)."""
    lr_decay_steps: Count | None = None
    """Where warmup_decay reaches zero. Default: 4 times the steps, as in the published run on 4 GPUs."""


@dataclass(frozen=True, kw_only=True)
class RewardRunConfig(LoopConfig):
    """How long a preference model is trained, and what it is compared with."""

    validation_steps: Count = 1000
    """Iterations between evaluations on held-out pairs; there is one after training as well."""
    validation_timesteps: tuple[Annotated[int, Range(0, 999)], ...] = (0, 251, 501, 701, 951)
    """Noise levels of the evaluation; at 0 a pixel model sees the images themselves."""
    compare_with: tuple[str, ...] = ()
    """Other preference models (files or directories) to evaluate beside the trained one, as name=path."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(len(self.validation_timesteps) > 0, "validation_timesteps is empty: give one or more of 0 to 999.")
        names = ["trained", "initial", *(entry.split("=", 1)[0] for entry in self.compare_with)]
        paths = [entry.partition("=")[2] for entry in self.compare_with]
        require(
            all(paths) and "" not in names and len(set(names)) == len(names),
            "compare_with: write name=path, each name once, and neither trained nor initial.",
        )


@dataclass(frozen=True, kw_only=True)
class PreferenceConfig(Settings):
    """A run that trains a preference model (train_spm.py)."""

    def __post_init__(self) -> None:
        require(
            self.reward.parameterisation == "pixel" or not self.run.compare_with,
            "compare_with takes pixel models, which see decoded images; parameterisation=latent has nothing for them.",
        )
        require(
            self.reward.parameterisation == "pixel" or self.model.model != "flux",
            "parameterisation=latent on a flow is made of SD3's blocks, and --model flux has none. Use pixel.",
        )
        require(
            not self.reward.reward_checkpointing
            or self.reward.parameterisation == "pixel"
            or self.model.model not in FLOWS,
            "reward_checkpointing is for CLIPs and UNets: a flow's latent judge keeps its activations. Leave it out.",
        )
        require(
            self.reward.noise != "none" or 0 in self.run.validation_timesteps,
            "noise=none judges images as they are: validation_timesteps must have 0 among them.",
        )

    model: ModelConfig = field(default_factory=ModelConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)
    pairs: PairsConfig = field(default_factory=PairsConfig)
    optim: RewardOptimConfig = field(default_factory=RewardOptimConfig)
    run: RewardRunConfig = field(default_factory=RewardRunConfig)
