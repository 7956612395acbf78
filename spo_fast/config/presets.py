"""Presets: functions that return a whole Config, with the published runs' settings (their configs/)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from spo_fast.config.evaluation import EvaluationConfig, MetricConfig, PicturesConfig
from spo_fast.config.preference import PairsConfig, PreferenceConfig, RewardConfig, RewardOptimConfig, RewardRunConfig
from spo_fast.config.sections import ModelConfig
from spo_fast.config.training import (
    AdapterConfig,
    Config,
    DataConfig,
    ObjectiveConfig,
    OptimConfig,
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


PREFERENCE_PRESETS: dict[str, Callable[[], PreferenceConfig]] = {
    "toy": toy_preference,
    "sd15": sd15_preference,
    "sdxl": sdxl_preference,
}


def evaluation(model: Literal["sd15", "sdxl"]) -> EvaluationConfig:
    """As the published tables were made: 20 steps, guidance 5."""
    return EvaluationConfig(model=ModelConfig(model=model))


def toy_evaluation() -> EvaluationConfig:
    """The embedded world's true scores beside PickScore."""
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
