"""The methods by name: their settings, the flags they read, the data they need, their papers."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from spo_fast.config.sections import PairSourceConfig

ROLLOUT = ("spo", "mspo", "d3po", "lpo", "gradspo", "ddpo", "dpok", "dense")
SEGMENTS = ("spo", "mspo", "lpo")
COMPARED = (*SEGMENTS, "d3po", "gradspo")
DATA = ("dpo", "mapo")

READS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("num_candidates", "eta", "branch_start"), ROLLOUT),
    "branch_end": tuple(m for m in ROLLOUT if m != "d3po"),
    "num_inner_steps": SEGMENTS,
    **dict.fromkeys(("next_start", "last_step", "branch_window"), (*SEGMENTS, "gradspo")),
    "rollout_weights": tuple(m for m in ROLLOUT if m != "gradspo"),  # its rollouts are of averaged weights
    **dict.fromkeys(("threshold", "threshold_max"), COMPARED),
    "beta": (*COMPARED, "dense", *DATA),
    "clip": ROLLOUT,
    **dict.fromkeys(("guidance_step", "ema_decay"), ("gradspo",)),
    "advantage_clip": ("ddpo", "dpok"),
    "kl_weight": ("dpok",),
    **dict.fromkeys(("gamma", "num_ranked", "num_sampled_steps", "terms_per_prompt"), ("dense",)),
    **dict.fromkeys(("prompt_dropout", *(f.name for f in dataclasses.fields(PairSourceConfig))), DATA),
}
"""Setting -> the methods that read it, of those that not all read. Given to another method it is an error."""

Given = Mapping[str, Any]


def _by_model(given: Given, everywhere: Given, **models: Given) -> dict[str, Any]:
    return {**everywhere, **models.get(given["model"], {})}


def spo_method(given: Given) -> dict[str, Any]:
    return {"num_inner_steps": 0}


def mspo_method(given: Given) -> dict[str, Any]:
    return {"num_inner_steps": 3, "num_candidates": 2}


def d3po(given: Given) -> dict[str, Any]:
    """config/base.py of yk7333/d3po: 20 steps, a step sees the 20 transitions of a pair; nothing published for SDXL."""
    settings = {"num_candidates": 2, "num_inner_steps": 0, "branch_start": 0, "threshold": 0.0, "beta": 0.1}
    return _by_model(
        given,
        settings,
        sd15={"learning_rate": 3e-5, "train_batch_size": 10, "gradient_accumulation_steps": 2, "max_grad_norm": 1.0},
        sdxl={"learning_rate": 1e-5, "train_batch_size": 2, "gradient_accumulation_steps": 10, "max_grad_norm": 1.0},
        toy={"beta": 10.0, "train_batch_size": 32, "max_grad_norm": 1.0},
    )


def lpo(given: Given) -> dict[str, Any]:
    """lpo/configs of Kwai-Kolors/LPO. The toy ships no latent reward model: give --lrm_path."""
    settings = {"scorer": ("lrm",), "num_candidates": 4, "num_inner_steps": 0, "branch_start": 0, "num_train_epochs": 5}
    return _by_model(
        given,
        {**settings, "beta": 500.0},
        sd15={"threshold": 0.35, "threshold_max": 0.5, "sample_batch_size": 5},
        sdxl={"threshold": 0.45, "threshold_max": 0.6, "sample_batch_size": 4, "train_batch_size": 4}
        | {"gradient_accumulation_steps": 1},
        toy={"beta": 10.0, "num_train_epochs": 1},
    )


def gradspo(given: Given) -> dict[str, Any]:
    """configs of JoshuaTTJ/GradSPO: SPO's, and for SDXL k = 4 without inner steps."""
    return _by_model(
        given,
        {"num_inner_steps": 0, "num_candidates": 4, "last_step": "keep"},
        sdxl={"train_batch_size": 1, "gradient_accumulation_steps": 4},
    )


def ddpo(given: Given) -> dict[str, Any]:
    """config/dgx.py of kvablack/ddpo-pytorch (aesthetic): 256 trajectories a rollout, 2 steps of 128 of them, each with
    all of its 50 transitions. SDXL: the same with fewer trajectories; nothing is published for it.
    """
    settings = {"branch_start": 0, "num_inner_steps": 0, "clip": 1e-4, "num_candidates": 16, "max_grad_norm": 1.0}
    return _by_model(
        given,
        {**settings, "num_steps": 50, "learning_rate": 3e-4},
        sd15={"sample_batch_size": 16, "train_batch_size": 4, "gradient_accumulation_steps": 1600}
        | {"max_train_steps": 200},
        sdxl={"sample_batch_size": 2, "train_batch_size": 2, "gradient_accumulation_steps": 400}
        | {"max_train_steps": 200},
        toy={"num_steps": 20, "num_candidates": 8, "train_batch_size": 1280, "states_per_forward": 256}
        | {"learning_rate": 1e-3},
    )


def dpok(given: Given) -> dict[str, Any]:
    """google-research/dpok: learning rate 1e-5, gradients clipped at 0.1, guidance 7.5, KL weight 0.01."""
    if given["model"] == "toy":
        return ddpo(given)
    return ddpo(given) | {"learning_rate": 1e-5, "max_grad_norm": 0.1, "guidance_scale": 7.5, "adam_weight_decay": 0.0}


def dense(given: Given) -> dict[str, Any]:
    """parse_args.py of Shentao-YANG/Dense_Reward_T2I (many prompts: temperature 12.5); its rollouts have 1000 prompts,
    which here would have to fit into memory."""
    settings = {"branch_start": 0, "num_inner_steps": 0, "clip": 1e-4, "num_candidates": 5, "max_grad_norm": 1.0}
    published = {"beta": 12.5, "num_steps": 50, "guidance_scale": 7.5, "learning_rate": 3e-5, "adam_weight_decay": 2e-3}
    sizes = {"sample_batch_size": 16, "train_batch_size": 1, "gradient_accumulation_steps": 4}
    return _by_model(
        given,
        settings,
        sd15={**published, **sizes},
        sdxl={**published, **sizes, "sample_batch_size": 4, "learning_rate": 1e-5},
        toy={"clip": 0.1, "train_batch_size": 32},
    )


def dpo(given: Given) -> dict[str, Any]:
    """launchers/ of SalesforceAIResearch/DiffusionDPO: all weights, 2000 steps of 2048 pairs, 1e-8 x 2048."""
    steps = {"max_train_steps": 2000, "num_train_epochs": 10_000, "sample_batch_size": 2048, "checkpointing_steps": 500}
    optim = {"learning_rate": 2.048e-5, "adam_weight_decay": 0.01, "max_grad_norm": 1.0}
    schedule = {"lr_scheduler": "constant_with_warmup", "lr_warmup_steps": 500}
    published = {"full_finetune": True, "scorer": ("pickscore",), "prompt_dropout": 0.2, **steps, **optim, **schedule}
    return _by_model(
        given,
        {"beta": 5000.0, "num_inner_steps": 0, "branch_start": 0},
        sd15={**published, "train_batch_size": 16, "gradient_accumulation_steps": 128},
        sdxl={**published, "train_batch_size": 4, "gradient_accumulation_steps": 512, "lr_warmup_steps": 200}
        | {"optimizer": "adamw8bit"},  # published: Adafactor, to save memory too
        toy={"sample_batch_size": 256, "train_batch_size": 64, "learning_rate": 1e-4},
    )


def mapo(given: Given) -> dict[str, Any]:
    """README.md of mapo-t2i/mapo, its LoRA run (SDXL; nothing is published for SD-1.5): 16 pairs a step, 2000 steps."""
    steps = {"max_train_steps": 2000, "num_train_epochs": 10_000, "sample_batch_size": 16, "checkpointing_steps": 500}
    optim = {"learning_rate": 1e-5, "adam_weight_decay": 0.01, "max_grad_norm": 1.0, "optimizer": "adamw8bit"}
    sizes = {"train_batch_size": 8, "gradient_accumulation_steps": 2, "rank": 8}
    published = {"scorer": ("pickscore",), **steps, **optim, **sizes}
    toy = {"sample_batch_size": 256, "train_batch_size": 64, "learning_rate": 1e-4}
    settings = {"beta": 0.1, "num_inner_steps": 0, "branch_start": 0}
    return _by_model(given, settings, sd15=published, sdxl=published, toy=toy)


# by the value of --method: all settings given so far, the model's name among them -> the published ones over the preset
METHODS: dict[str, Callable[[Given], dict[str, Any]]] = {
    **{"spo": spo_method, "mspo": mspo_method, "d3po": d3po, "lpo": lpo, "gradspo": gradspo},
    **{"ddpo": ddpo, "dpok": dpok, "dense": dense, "dpo": dpo, "mapo": mapo},
}

SPO_PAPER = (
    "*Aesthetic Post-Training Diffusion Models from Generic Preferences with Step-by-step Preference Optimization*\n"
    "(CVPR 2025, [arXiv 2406.04314](https://arxiv.org/abs/2406.04314))."
)
PAPERS = {  # of the other methods: name, arXiv id
    "d3po": ("D3PO", "2311.13231"),
    "lpo": ("Latent Preference Optimization", "2502.01051"),
    "gradspo": ("GradSPO (NeurIPS 2025)", ""),
    "ddpo": ("DDPO", "2305.13301"),
    "dpok": ("DPOK", "2305.16381"),
    "dense": ("a dense reward view on aligning text-to-image diffusion", "2402.08265"),
    "dpo": ("Diffusion-DPO", "2311.12908"),
    "mapo": ("MaPO", "2406.06424"),
}

LEAVES_LN2 = ("spo", "mspo", "lpo", "dpo")  # the others' clamps or betas keep the loss there, or it starts elsewhere
