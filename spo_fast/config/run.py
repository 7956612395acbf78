"""Settings of a run of preference optimisation that are no matter of its method: prompts, length, what it leaves."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Annotated, Literal

from spo_fast.config.fields import Count, Positive, Range, Section, Whole, parted, require
from spo_fast.config.scorers import TRUE_SCORES
from spo_fast.config.sections import LoopConfig


@dataclass(frozen=True, kw_only=True)
class DataConfig(Section):
    """The prompts."""

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
    resolutions: tuple[str, ...] = ()
    """Several sizes, WIDTHxHEIGHT in pixels, such as 1024x1024 832x1216 1216x832: iterations draw them in turn, each
    one of them. Validation and predictions are of the largest. Default: height and width alone."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for text in self.resolutions:
            require(
                re.fullmatch(r"[1-9]\d{0,4}x[1-9]\d{0,4}", text) is not None,
                f"resolutions: {text!r:.40} is no size. Write WIDTHxHEIGHT in pixels, such as 832x1216.",
            )
        require(
            len(set(self.resolutions)) == len(self.resolutions),
            "resolutions names a size twice: leave one of them out.",
        )

    @property
    def sizes(self) -> list[tuple[int, int]]:
        """(height, width) of each of `resolutions`."""
        return [(int(height), int(width)) for width, height in (text.split("x") for text in self.resolutions)]


@dataclass(frozen=True, kw_only=True)
class RunConfig(LoopConfig):
    """How long a run is, and what it shows and leaves."""

    validation_prompt: tuple[str, ...] = ()
    """Prompts of the sample grids made before, during and after training. Default: the first four prompts."""
    validation_prompt_file: str | None = None
    """A file of them instead, of the kinds of --prompts."""
    validation_metrics: tuple[str, ...] = ()
    """Held-out scores of the sample grids: what --metrics of spo_fast.evaluate takes, best one that is not trained on.
    Loaded at each grid and dropped again. Default: of the toy its true scores, if prompts and size are its world's."""
    num_validation_images: Whole = 4
    """Images of each validation prompt, from fixed noise."""
    strengths: tuple[Annotated[float, Range(0, 4)], ...] = (0.25, 0.5, 0.75, 1.0, 1.25)
    """LoRA weights at which the finished run draws one image of each validation prompt, from the same noise, for its
    report: a person picks the strength there. Nothing of a full_finetune; `--strengths` alone turns it off."""
    validation_steps: Count | None = None
    """Iterations between sample grids during training. Default: one with each checkpoint."""
    recipe: Literal["default", "published", "fast"] = "default"
    """published reproduces the published code's accumulation, last step and missing clipping. fast gives up exactness
    where that is cheap: the tiny VAE, a 16-bit scorer, 8-bit AdamW."""
    export_ema: bool = False
    """Export the moving average of the trained weights (ema_decay, such as .999) in their place; the sample grids are
    its own too. On where ema_decay is given, but of gradspo."""
    anchor: tuple[str, ...] = ()
    """Held-out scores that must not fall, named as validation_metrics are: each validation prints and logs their change
    since training began with its 95 % interval over the prompts. The run ends when one has fallen beyond chance, or an
    image statistic has risen so (saturation, contrast, ...): signs of reward hacking. 8 validation prompts or more."""
    stop_when: tuple[str, ...] = ()
    """Held-out scores, such as held_out_hpsv2: the run ends when one has fallen beyond chance below its highest
    validation so far; and hacking: when an image statistic has risen beyond chance. 8 validation prompts or more."""
    keep_best: str | None = None
    """A held-out score: what is exported is kept in best/, too, as it was at the validation where that was highest."""
    max_train_minutes: Positive | None = None
    """End, with all that a finished run leaves, after the iteration in which so many minutes have passed since training
    began or was resumed. --resume_from_checkpoint latest goes on."""
    push_to_hub: bool = False
    """Upload the trained weights, sample grids, model card, log and settings (with the paths that were given) when the
    run ends. Log in first: `hf auth login`."""
    hub_model_id: str | None = None
    """Repository to upload to. Default: the output directory's name, in your account."""

    @property
    def anchored(self) -> tuple[str, ...]:
        """Scores of anchor."""
        return _scores(self.anchor)

    @property
    def falling(self) -> tuple[str, ...]:
        """Scores of stop_when."""
        return tuple(name for name in _scores(self.stop_when) if name != "hacking")

    @property
    def watches_looks(self) -> bool:
        """Whether image statistics may end the run."""
        return bool(self.anchor) or "hacking" in _scores(self.stop_when)

    @property
    def best(self) -> tuple[str, ...]:
        """The score of keep_best, if there is one."""
        return () if self.keep_best is None else (self.keep_best.removeprefix("held_out_"),)

    def __post_init__(self) -> None:
        super().__post_init__()
        for flag in ("anchor", "stop_when"):
            named = getattr(self, flag)
            require(not named or len(_scores(named)) > 0, f"{flag} is empty: name a held-out score, or leave it out.")
        own = [n for n in (*self.anchored, *self.falling, *self.best) if n not in TRUE_SCORES]
        more = tuple(dict.fromkeys(n for n in own if n not in self.validation_metrics))
        object.__setattr__(self, "validation_metrics", (*self.validation_metrics, *more))  # they are measured
        require(
            not (self.validation_prompt and self.validation_prompt_file),
            "validation_prompt and validation_prompt_file say the same thing: give one.",
        )


def _scores(entries: tuple[str, ...]) -> tuple[str, ...]:
    """Names of held-out scores as validation_metrics has them, from those or from the log's."""
    return tuple(name.removeprefix("held_out_") for name in parted(entries))
