"""The scorers by name: where their weights come from, and how a command line names them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from spo_fast.config.errors import did_you_mean

SCORERS_BESIDE = {"aesthetic": "clip", "image_reward": "bert", "geneval": "clip"}
"""Scorer -> whose weights it needs beside its own."""

KINDS = ("sd15", "sdxl")


@dataclass(frozen=True)
class ScorerSource:
    """A scorer's hub repository, and the one file of it (by model kind) or, when there is none, its whole CLIP."""

    what: str
    repository: str
    files: Mapping[str, str] | None = None
    part: str = "clip-alone"
    local_only: str = ""
    """Why it is not fetched from the hub, and what to do."""


SCORER_SOURCES = {
    "spm": ScorerSource(
        "step-aware preference model",
        "SPO-Diffusion-Models/Step-Aware_Preference_Models",
        {
            "sd15": "sd-v1-5_step-aware_preference_model.bin",
            "sdxl": "sdxl_step-aware_preference_model.bin",
        },
    ),
    "pickscore": ScorerSource("PickScore", "yuvalkirstain/PickScore_v1"),
    "lrm": ScorerSource(
        "latent reward model",
        "casiatao/LRM",
        part="latent-reward",
        local_only="not fetched: give a folder of that repository, or train one (train_spm --parameterisation latent)",
    ),
    "hpsv2": ScorerSource("HPSv2", "xswu/HPSv2", dict.fromkeys(KINDS, "HPS_v2_compressed.pt")),
    "hpsv21": ScorerSource("HPSv2.1", "xswu/HPSv2", dict.fromkeys(KINDS, "HPS_v2.1_compressed.pt")),
    "clip": ScorerSource("CLIP ViT-L/14", "openai/clip-vit-large-patch14"),
    "aesthetic": ScorerSource(
        "LAION's aesthetic predictor",
        "camenduru/improved-aesthetic-predictor",
        dict.fromkeys(KINDS, "sac+logos+ava1-l14-linearMSE.pth"),
    ),
    "image_reward": ScorerSource("ImageReward", "THUDM/ImageReward", dict.fromkeys(KINDS, "ImageReward.pt")),
    "geneval": ScorerSource("GenEval's detector", "facebook/mask2former-swin-small-coco-instance"),
    "bert": ScorerSource("BERT's vocabulary", "google-bert/bert-base-uncased", dict.fromkeys(KINDS, "vocab.txt")),
    "text_projection": ScorerSource("CLIP ViT-L/14 (its text projection)", "openai/clip-vit-large-patch14"),
}

SCORER_NAMES = ("spm", "pickscore", "hpsv2", "hpsv21", "clip", "aesthetic", "image_reward", "geneval", "lrm")
TRUE_SCORES = ("layout", "aesthetics")
"""Of the toy's world."""


def scorer_specs(names: tuple[str, ...]) -> list[tuple[str, float]]:
    """("spm:1", "pickscore:0.5") -> [("spm", 1.0), ("pickscore", 0.5)]; a missing weight is 1."""
    specs = []
    for name in names:
        name, _, weight = name.partition(":")
        if name not in SCORER_NAMES:
            hint = did_you_mean(name, SCORER_NAMES)
            raise ValueError(f"unknown scorer {name!r:.60}. Known: {', '.join(SCORER_NAMES)}.{hint}")
        try:
            specs.append((name, float(weight or 1)))
        except ValueError:
            specs.append((name, math.nan))
        if not math.isfinite(specs[-1][1]):
            raise ValueError(
                f"scorer {name}:{weight!s:.60}: the weight after the colon must be a number, as in {name}:0.5"
            )
    return specs
