"""Recipes: changes to a preset, as the published runs, for speed or for little memory."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from spo_fast.config.methods import find_method
from spo_fast.config.sections import FLOWS

# ---------------------------------------------------------------------------------------------------- recipes


def published(given: Mapping[str, Any]) -> dict[str, Any]:
    """The published code's accumulation across rollouts, no clipping, and its SDXL's last-step rule."""
    method = find_method(given.get("method", "spo"))
    if method.recipe is None:
        raise ValueError(
            f"recipe=published is SPO's code: the settings of method={method.name} are its paper's without it."
        )
    return dict(method.asked("recipe", given))


TINY_VAES = {
    "sd15": "madebyollin/taesd",
    "sdxl": "madebyollin/taesdxl",
    "sd35": "madebyollin/taesd3",
    "flux": "madebyollin/taef1",
}


def fast(given: Mapping[str, Any]) -> dict[str, Any]:
    """Inexact, for less time and memory: a tiny VAE shows candidates to the scorer, which computes in bf16 (fp16 could
    overflow), and AdamW keeps 8-bit state. The toy's own VAE is tiny already; a VAE that was given stays.
    """
    vae = "pretrained_vae_model_name_or_path"
    settings = {"scorer_dtype": "bf16", **eight_bits(given)}
    if given.get(vae) is None and given["model"] in TINY_VAES:
        settings[vae] = TINY_VAES[given["model"]]
    return settings


# by the value of --recipe: all settings given so far, the model's name among them -> the recipe's own
RECIPES: dict[str, Callable[[Mapping[str, Any]], dict[str, Any]]] = {
    "default": lambda given: {},
    "published": published,
    "fast": fast,
}


def eight_bits(given: Mapping[str, Any]) -> dict[str, Any]:
    """8-bit state in AdamW's place; any other optimizer was chosen."""
    return {"optimizer": "adamw8bit"} if given.get("optimizer", "adamw") == "adamw" else {}


def small(given: Mapping[str, Any]) -> dict[str, Any]:
    """For cards of 16 GB."""
    own: dict[str, Any] = {"states_per_forward": 2} if given["model"] == "sdxl" else {}
    own |= {"t5_weights": "int8"} if given["model"] in FLOWS else {}
    return {"gradient_checkpointing": True, "decode_chunk": 1, **eight_bits(given), **own}


# by the value of --memory, likewise; the others are a matter of the networks alone
MEMORY: dict[str, Callable[[Mapping[str, Any]], dict[str, Any]]] = {"small": small}


def optimizer_rate(given: Mapping[str, Any], source: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    """Prodigy multiplies the rate that it finds by learning_rate, so another optimizer's would be wrong.

    own: what goes with the source, a method's rate among it.
    """
    optimizer = {**given, **own, **source}.get("optimizer")
    return (
        {"learning_rate": 1.0} if optimizer == "prodigy" and ("optimizer" in source or "learning_rate" in own) else {}
    )


# by the value of --sampler: the published eta, of flow_sde that of SD3.5 (FLUX .8 to .9, Qwen-Image 1.2)
ETAS = {"ddim": 1.0, "flow_sde": 0.7, "cps": 0.8, "dance": 0.3}

# ---------------------------------------------------------------------------------------------------- preference models


def latent_recipe(given: Mapping[str, Any]) -> dict[str, Any]:
    """What LPO's training of its latent reward model does otherwise (8 GPUs: 128 pairs a step, SDXL 32), or of flows
    DiNa-LRM's (HKUST-C4G/diffusion-rm; 4 pairs a GPU, one epoch)."""
    if given["model"] in FLOWS:
        own = {"parameterisation": "latent", "noise": "all", "shared_noise": True, "relabel": "none"}
        published = {"learning_rate": 5e-5, "lr_scheduler": "constant_with_warmup", "lr_warmup_steps": 1000}
        return own | (published if given["model"] == "sd35" else {})
    size = {"sd15": (16, 8, 4000, 500), "sdxl": (4, 8, 8000, 1000)}.get(given["model"])
    settings: dict[str, Any] = {
        "parameterisation": "latent",
        "noise": "ddim",
        "shared_noise": False,
        "train_guidance_scale": 7.5,
        "relabel": "none",
    }
    if size is None:
        return settings
    batch, accumulation, steps, warmup = size
    return settings | {
        "learning_rate": 1e-5,
        "train_batch_size": batch,
        "gradient_accumulation_steps": accumulation,
        "max_train_steps": steps,
        "lr_warmup_steps": warmup,
        "lr_decay_steps": steps,
    }
