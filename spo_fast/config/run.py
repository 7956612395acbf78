"""Settings of a run of preference optimisation that are no matter of its method: prompts, length, what it leaves."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from spo_fast.config.fields import Count, Section, Whole, require
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
    export_ema: bool = False
    """Export the moving average of the trained weights (ema_decay, such as .999) in their place; the sample grids are
    its own too. On where ema_decay is given, but of gradspo."""
    push_to_hub: bool = False
    """Upload the trained weights, sample grids, model card, log and settings (with the paths that were given) when the
    run ends. Log in first: `hf auth login`."""
    hub_model_id: str | None = None
    """Repository to upload to. Default: the output directory's name, in your account."""
