"""Presets: functions that return a whole Config, with the published runs' settings (their configs/)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Literal

from spo_fast.config import (
    AdapterConfig,
    Config,
    DataConfig,
    EvaluationConfig,
    MetricConfig,
    ModelConfig,
    ObjectiveConfig,
    OptimConfig,
    PairsConfig,
    PairSourceConfig,
    PicturesConfig,
    PreferenceConfig,
    RewardConfig,
    RewardOptimConfig,
    RewardRunConfig,
    RunConfig,
    SampleConfig,
)


def sd15() -> Config:
    """SPO on SD-1.5: k = 4 candidates at every step from t = 751 on, 10 epochs over the prompts."""
    return Config(
        model=ModelConfig(model="sd15", mixed_precision="auto"),
        adapter=AdapterConfig(rank=4),
        sample=SampleConfig(sample_batch_size=10, num_candidates=4, threshold=0.3),
        objective=ObjectiveConfig(method="spo"),
        optim=OptimConfig(learning_rate=6e-5, train_batch_size=10),
        run=RunConfig(output_dir="runs/sd15", num_train_epochs=10, checkpoints_total_limit=2),
    )


def sdxl() -> Config:
    """SPO with inner steps (MSPO) on SDXL: k = 2, compared every 4 steps."""
    return Config(
        model=ModelConfig(model="sdxl", mixed_precision="auto"),
        adapter=AdapterConfig(rank=64),
        sample=SampleConfig(sample_batch_size=2, num_candidates=2, num_inner_steps=3, threshold=0.4),
        objective=ObjectiveConfig(method="mspo"),
        optim=OptimConfig(learning_rate=1e-5, train_batch_size=2, gradient_accumulation_steps=2),
        run=RunConfig(output_dir="runs/sdxl", num_train_epochs=10, checkpoints_total_limit=2),  # 2 GB each
    )


def toy() -> Config:
    """The embedded world on a CPU: under a minute. Its candidates differ little, so the threshold is low."""
    return Config(
        model=ModelConfig(model="toy", mixed_precision="no", decode_chunk=256),
        adapter=AdapterConfig(rank=8, lora_targets=("to_q", "to_k", "to_v", "to_out.0", "conv1", "conv2")),
        sample=SampleConfig(sample_batch_size=16, num_candidates=4, threshold=0.05, guidance_scale=2.0),
        objective=ObjectiveConfig(method="spo"),
        optim=OptimConfig(learning_rate=5e-4, train_batch_size=16),
        data=DataConfig(max_prompts=96),
        run=RunConfig(output_dir="runs/toy", num_train_epochs=1, num_validation_images=8),
    )


PRESETS: dict[str, Callable[[], Config]] = {"toy": toy, "sd15": sd15, "sdxl": sdxl}


# ---------------------------------------------------------------------------------------------------- methods

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

# ---------------------------------------------------------------------------------------------------- recipes


def published(given: Mapping[str, Any]) -> dict[str, Any]:
    """The published code's accumulation across rollouts, no clipping, and its SDXL's last-step rule."""
    method = given.get("method", "spo")
    if method not in (*SEGMENTS, "gradspo"):  # gradspo and lpo build on SPO's code
        raise ValueError(f"recipe=published is SPO's code: the settings of method={method} are its paper's without it.")
    settings: dict[str, Any] = {"accumulation": "published", "max_grad_norm": None}
    if method not in ("spo", "mspo"):
        return settings
    return settings | {"last_step": "extend" if given["model"] in ("sdxl", "toy") else "compare"}


TINY_VAES = {"sd15": "madebyollin/taesd", "sdxl": "madebyollin/taesdxl"}


def fast(given: Mapping[str, Any]) -> dict[str, Any]:
    """Inexact, for less time and memory: a tiny VAE shows candidates to the scorer, which computes in bf16 (fp16 could
    overflow), and AdamW keeps 8-bit state. The toy's own VAE is tiny already; a VAE that was given stays.
    """
    vae = "pretrained_vae_model_name_or_path"
    settings = {"scorer_dtype": "bf16", "optimizer": "adamw8bit"}
    if given.get(vae) is None and given["model"] in TINY_VAES:
        settings[vae] = TINY_VAES[given["model"]]
    return settings


# by the value of --recipe: all settings given so far, the model's name among them -> the recipe's own
RECIPES: dict[str, Callable[[Mapping[str, Any]], dict[str, Any]]] = {
    "default": lambda given: {},
    "published": published,
    "fast": fast,
}


def small(given: Mapping[str, Any]) -> dict[str, Any]:
    """For cards of 16 GB."""
    few = {"states_per_forward": 2} if given["model"] == "sdxl" else {}
    return {"gradient_checkpointing": True, "decode_chunk": 1, "optimizer": "adamw8bit", **few}


# by the value of --memory, likewise; the others are a matter of the networks alone
MEMORY: dict[str, Callable[[Mapping[str, Any]], dict[str, Any]]] = {"small": small}


# ---------------------------------------------------------------------------------------------------- preference models


def _preference(
    model: str, learning_rate: float, steps: int, relabel: Literal["none", "pickscore"]
) -> PreferenceConfig:
    return PreferenceConfig(
        model=ModelConfig(model=model, mixed_precision="auto", decode_chunk=4),  # type: ignore[arg-type]
        pairs=PairsConfig(relabel=relabel),
        optim=RewardOptimConfig(
            learning_rate=learning_rate,
            adam_weight_decay=0.3,
            max_grad_norm=1.0,
            lr_warmup_steps=500,
            train_batch_size=16,
            gradient_accumulation_steps=4,  # the published runs: 4 GPUs
        ),
        run=RewardRunConfig(
            output_dir=f"runs/{model}-spm",
            max_train_steps=steps,
            num_train_epochs=10_000,
            checkpointing_steps=1000,
            checkpoints_total_limit=2,  # 12 GB each
        ),
    )


def sd15_preference() -> PreferenceConfig:
    """The published SPM of SD-1.5, on the labels of the data."""
    return _preference("sd15", 3e-6, 8000, "none")


def sdxl_preference() -> PreferenceConfig:
    """The published SPM of SDXL, on PickScore's labels."""
    return _preference("sdxl", 1e-6, 7000, "pickscore")


def toy_preference() -> PreferenceConfig:
    """The embedded world's SPM, from its PickScore."""
    return PreferenceConfig(
        model=ModelConfig(model="toy", mixed_precision="no", decode_chunk=256),
        optim=RewardOptimConfig(
            learning_rate=5e-4,
            adam_weight_decay=0.01,
            max_grad_norm=1.0,
            lr_scheduler="cosine",
            lr_warmup_steps=20,
            train_batch_size=64,
        ),
        reward=RewardConfig(train_guidance_scale=2.0),
        pairs=PairsConfig(cache_latents=False),  # its VAE is faster than a file
        run=RewardRunConfig(
            output_dir="runs/toy-spm", num_train_epochs=1, validation_steps=200, checkpointing_steps=100
        ),
    )


def latent_recipe(given: Mapping[str, Any]) -> dict[str, Any]:
    """What LPO's training of its latent reward model does otherwise (8 GPUs: 128 pairs a step, SDXL 32)."""
    size = {"sd15": (16, 8, 4000, 500), "sdxl": (4, 8, 8000, 1000)}.get(given["model"])
    settings: dict[str, Any] = {
        **{"parameterisation": "latent", "noise": "ddim", "shared_noise": False, "train_guidance_scale": 7.5},
        **{"relabel": "none"},
    }
    if size is None:
        return settings
    batch, accumulation, steps, warmup = size
    return settings | {
        **{"learning_rate": 1e-5, "train_batch_size": batch, "gradient_accumulation_steps": accumulation},
        **{"max_train_steps": steps, "lr_warmup_steps": warmup, "lr_decay_steps": steps},
    }


PREFERENCE_PRESETS: dict[str, Callable[[], PreferenceConfig]] = {
    "toy": toy_preference,
    "sd15": sd15_preference,
    "sdxl": sdxl_preference,
}


def evaluation(model: Literal["sd15", "sdxl"]) -> EvaluationConfig:
    """As the published tables were made: 20 steps, guidance 5."""
    return EvaluationConfig(model=ModelConfig(model=model))


def toy_evaluation() -> EvaluationConfig:
    return EvaluationConfig(
        model=toy().model,
        metric=MetricConfig(metrics=("layout", "aesthetics", "pickscore")),
        pictures=PicturesConfig(guidance_scale=2.0, images_per_prompt=2, images_at_once=128),
    )


EVALUATION_PRESETS: dict[str, Callable[[], EvaluationConfig]] = {
    "toy": toy_evaluation,
    "sd15": lambda: evaluation("sd15"),
    "sdxl": lambda: evaluation("sdxl"),
}
