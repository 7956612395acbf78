"""The settings of evaluating and comparing models."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

from spo_fast.config.fields import Count, Range, Section, Settings, parted
from spo_fast.config.sections import ComputeConfig, ModelConfig, ScorerPaths
from spo_fast.config.training import Guidance


@dataclass(frozen=True, kw_only=True)
class MetricConfig(ScorerPaths):
    """What pictures are scored by."""

    metrics: tuple[str, ...] = ("pickscore", "hpsv2", "image_reward", "aesthetic")
    """Any scorer but lrm (spm judges at t = 0; geneval in percent); the toy's true scores layout and aesthetics, left
    out by default for other prompts than its captions; functions of your own, module:function. Commas may part them."""
    scorer_dtype: Literal["no", "fp16", "bf16"] = "no"
    """Compute type of the scorers' towers (no: float32)."""

    @property
    def metric_names(self) -> list[str]:
        """The metrics, commas parted."""
        return parted(self.metrics)


@dataclass(frozen=True, kw_only=True)
class PicturesConfig(Section):
    """Whose pictures are drawn, of which prompts, and how."""

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
    noise_of: Literal["evaluation", "validation"] = "evaluation"
    """validation: the noise of a training's sample grids, whose pictures are drawn again so (its report has the
    command). By default noise that no training looked at."""
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
