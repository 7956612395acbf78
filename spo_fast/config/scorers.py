"""SCORERS: a record for each scorer, beside its loader (scorers/). Everything that knows scorers reads it.

A scorer from outside the package is a function in a file of the user's own, named as module:function.
"""

from __future__ import annotations

import importlib
import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from spo_fast.config.errors import UsageError, did_you_mean
from spo_fast.config.outside import is_outside, load_outside

KINDS = ("sd15", "sdxl", "sd35", "flux")
"""Architectures of diffusion models; those of FLOWS predict the velocity of a flow."""
FLOWS = ("sd35", "flux")


@dataclass(frozen=True)
class ScorerSource:
    """A scorer's hub repository, and the one file of it (by model kind) or, when there is none, its whole CLIP."""

    what: str
    repository: str
    files: Mapping[str, str] | None = None
    part: str = "clip-alone"
    local_only: str = ""
    """Why it is not fetched from the hub, and what to do."""
    flag: str = ""
    """Help of --<name>_path; none: there is no such flag."""


@dataclass(frozen=True, kw_only=True)
class ScorerRecord:
    """All that is known of a scorer besides its code. Without PyTorch, so that --help takes no second."""

    name: str
    load: str = ""
    """module:function, (path, tokenize, device, dtype, **options) -> Scorer. Left out: it is but a metric."""
    source: ScorerSource | None = None
    """Where its weights are; None: it has none."""
    network: str
    """What it costs (NETWORKS of training/plan/fake_networks.py); unknown: not counted, and said so."""
    beside: str = ""
    """Whose weights it needs besides its own."""
    options: tuple[str, ...] = ()
    """What its loader is told of the run besides: time_conditioned, wanted, flow."""
    judges: str = "pictures"
    """pictures, latents (noisy ones, before the UNet), or toy: a true score of pictures of the toy's world."""
    percent: bool = False
    """It gives shares, and tables have percent."""
    function: Callable[..., Any] | None = None
    """A function of the user's own, in place of a loader."""

    def loader(self) -> Callable[..., Any]:
        """The function that `load` names, imported now."""
        module, _, name = self.load.partition(":")
        found: Callable[..., Any] = getattr(importlib.import_module(module), name)
        return found


_HPS = "Local {}. Default: that of xswu/HPSv2 from the hub."
_LOADERS = "spo_fast.scorers."

SCORERS: dict[str, ScorerRecord] = {
    record.name: record
    for record in (
        ScorerRecord(
            name="spm",
            load=_LOADERS + "spm:load_spm",
            network="vit-h",
            options=("time_conditioned",),
            source=ScorerSource(
                "step-aware preference model",
                "SPO-Diffusion-Models/Step-Aware_Preference_Models",
                {
                    "sd15": "sd-v1-5_step-aware_preference_model.bin",
                    # none is published for flows: a step of equal noise-to-signal ratio looks alike to SDXL's
                    **dict.fromkeys(("sdxl", "sd35", "flux"), "sdxl_step-aware_preference_model.bin"),
                },
                flag="Local step-aware preference model (.bin or .safetensors file, or a directory). Default: the "
                "architecture's, from the hub.",
            ),
        ),
        ScorerRecord(
            name="pickscore",
            load=_LOADERS + "spm:load_pickscore",
            network="vit-h",
            source=ScorerSource(
                "PickScore",
                "yuvalkirstain/PickScore_v1",
                flag="Local PickScore directory. Default: yuvalkirstain/PickScore_v1 from the hub.",
            ),
        ),
        ScorerRecord(
            name="lrm",
            load=_LOADERS + "latent:load_lrm",
            network="latent",
            judges="latents",
            source=ScorerSource(
                "latent reward model",
                "casiatao/LRM",
                part="latent-reward",
                local_only="not fetched: give a folder of that repository, or train one "
                "(train_spm --parameterisation latent)",
                flag="Local latent reward model (a directory). Default: the architecture's, from casiatao/LRM on the "
                "hub.",
            ),
        ),
        ScorerRecord(
            name="dina",
            load=_LOADERS + "dina:load_dina",
            network="latent",
            judges="latents",
            options=("flow",),
            source=ScorerSource(
                "DiNa-LRM",
                "liuhuohuo/DiNa-LRM-SD35M-12layers",
                part="flow-reward",
                local_only="not fetched: give a folder of that repository, or train one "
                "(train_spm --model sd35 --parameterisation latent)",
                flag="Local DiNa-LRM (a directory), SD3.5's own latent judge. Default: none; "
                "liuhuohuo/DiNa-LRM-SD35M-12layers is one.",
            ),
        ),
        ScorerRecord(
            name="hpsv2",
            load=_LOADERS + "hps:load_hps",
            network="open-clip vit-h",
            source=ScorerSource(
                "HPSv2",
                "xswu/HPSv2",
                dict.fromkeys(KINDS, "HPS_v2_compressed.pt"),
                flag=_HPS.format("HPS_v2_compressed.pt"),
            ),
        ),
        ScorerRecord(
            name="hpsv21",
            load=_LOADERS + "hps:load_hps",
            network="open-clip vit-h",
            source=ScorerSource(
                "HPSv2.1",
                "xswu/HPSv2",
                dict.fromkeys(KINDS, "HPS_v2.1_compressed.pt"),
                flag=_HPS.format("HPS_v2.1_compressed.pt"),
            ),
        ),
        ScorerRecord(
            name="clip",
            load=_LOADERS + "spm:load_clip_score",
            network="vit-l",
            source=ScorerSource(
                "CLIP ViT-L/14",
                "openai/clip-vit-large-patch14",
                flag="Local CLIP ViT-L/14 directory (scorers clip, aesthetic, geneval). Default: "
                "openai/clip-vit-large-patch14.",
            ),
        ),
        ScorerRecord(
            name="aesthetic",
            load=_LOADERS + "aesthetic:load_aesthetic",
            network="aesthetic",
            beside="clip",
            source=ScorerSource(
                "LAION's aesthetic predictor",
                "camenduru/improved-aesthetic-predictor",
                dict.fromkeys(KINDS, "sac+logos+ava1-l14-linearMSE.pth"),
                flag="Local sac+logos+ava1-l14-linearMSE.pth. Default: that of camenduru/improved-aesthetic-predictor "
                "from the hub.",
            ),
        ),
        ScorerRecord(
            name="image_reward",
            load=_LOADERS + "image_reward:load_image_reward",
            network="image-reward",
            beside="bert",
            source=ScorerSource(
                "ImageReward",
                "THUDM/ImageReward",
                dict.fromkeys(KINDS, "ImageReward.pt"),
                flag="Local ImageReward.pt. Default: that of THUDM/ImageReward from the hub.",
            ),
        ),
        ScorerRecord(
            name="geneval",
            load=_LOADERS + "geneval:load_geneval",
            network="mask2former",
            beside="clip",
            options=("wanted",),
            percent=True,
            source=ScorerSource(
                "GenEval's detector",
                "facebook/mask2former-swin-small-coco-instance",
                flag="Local Mask2Former directory (geneval). Default: facebook/mask2former-swin-small-coco-instance "
                "from the hub.",
            ),
        ),
        ScorerRecord(name="layout", network="unknown", judges="toy"),
        ScorerRecord(name="aesthetics", network="unknown", judges="toy"),
    )
}
"""By name; in the order of the flags."""

SCORER_SOURCES: dict[str, ScorerSource] = {
    **{name: record.source for name, record in SCORERS.items() if record.source is not None},
    "bert": ScorerSource(
        "BERT's vocabulary",
        "google-bert/bert-base-uncased",
        dict.fromkeys(KINDS, "vocab.txt"),
        flag="Local vocab.txt of BERT (scorer image_reward). Default: that of google-bert/bert-base-uncased from the "
        "hub.",
    ),
    "text_projection": ScorerSource("CLIP ViT-L/14 (its text projection)", "openai/clip-vit-large-patch14"),
}
"""Scorers' weights, and what stands beside them."""

TRUE_SCORES = tuple(name for name, record in SCORERS.items() if record.judges == "toy")
"""Of the toy's world: metrics, and no scorers to train with."""


def scorer_names() -> tuple[str, ...]:
    """What --scorer takes by name."""
    return tuple(name for name in SCORERS if name not in TRUE_SCORES and not is_outside(name))


def register_scorer(name: str, function: Callable[..., Any]) -> str:
    """Make a function of the user's own, (pictures (N, 3, H, W) in [0, 1], N prompts) -> N numbers, a scorer.

    Raises UsageError for what cannot be called.
    """
    if not callable(function):
        raise UsageError(f"--scorer {name}: that is a {type(function).__name__}, not a function.")
    SCORERS[name] = ScorerRecord(name=name, function=function, network="unknown")
    return name


def find_scorer(name: str) -> ScorerRecord:
    """A scorer's record by name; module:function is imported. Raises ValueError for an unknown one."""
    known = scorer_names()
    if name not in SCORERS and is_outside(name):
        register_scorer(name, load_outside("--scorer", name, did_you_mean(name.partition(":")[0], known)))
    if name not in SCORERS or name in TRUE_SCORES:
        raise ValueError(f"unknown scorer {name!r:.60}. Known: {', '.join(known)}.{did_you_mean(name, known)}")
    return SCORERS[name]


def judging_parts(names: Iterable[str]) -> list[str]:
    """Those that must be told what each prompt asks for (GenEval's objects, numbers, colours, places)."""
    return [name for name in names if name in SCORERS and "wanted" in SCORERS[name].options]


def name_and_weight(entry: str) -> tuple[str, str]:
    """spm:0.5 -> (spm, 0.5); my_file:my_function:0.5 -> (my_file:my_function, 0.5); a missing weight is empty.

    What follows an @, timesteps, is left out.
    """
    entry = entry.partition("@")[0]
    first, _, rest = entry.partition(":")
    own = ":".join((first, rest.partition(":")[0]))
    if first in SCORERS or not is_outside(own):
        return first, rest
    return own, rest.partition(":")[2]


def scorer_specs(names: tuple[str, ...]) -> list[tuple[str, float]]:
    """("spm:1", "pickscore:0.5") -> [("spm", 1.0), ("pickscore", 0.5)]; a missing weight is 1."""
    specs = []
    for entry in names:
        name, weight = name_and_weight(entry)
        find_scorer(name)
        try:
            specs.append((name, float(weight or 1)))
        except ValueError:
            specs.append((name, math.nan))
        if not math.isfinite(specs[-1][1]):
            raise ValueError(
                f"scorer {name}:{weight!s:.60}: the weight after the colon must be a number, as in {name}:0.5"
            )
        judged_range(entry)
    return specs


ALWAYS = (0, 1000)


def judged_range(entry: str) -> tuple[int, int]:
    """spm:1@0-750 -> (0, 750): the timesteps at which a scorer judges, both included; ALWAYS if none are given."""
    _, at, given = entry.partition("@")
    if not at:
        return ALWAYS
    found = re.fullmatch(r"(\d{1,4})-(\d{1,4})", given)
    if found is None or not int(found[1]) <= int(found[2]) <= ALWAYS[1]:
        raise ValueError(
            f"scorer {entry!s:.60}: after the @ stand two timesteps of 0 to 1000, the lower first, as in spm:1@0-750"
        )
    return int(found[1]), int(found[2])
