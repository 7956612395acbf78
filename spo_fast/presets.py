"""Presets: functions that return a whole Config, with the published runs' settings (their configs/)."""

from __future__ import annotations

from collections.abc import Callable

from spo_fast.config import (
    AdapterConfig,
    Config,
    DataConfig,
    ModelConfig,
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
        run=RunConfig(output_dir="runs/sd15", num_train_epochs=10),
    )


def sdxl() -> Config:
    """SPO with inner steps (MSPO) on SDXL: k = 2, compared every 4 steps."""
    return Config(
        model=ModelConfig(model="sdxl", mixed_precision="auto", decode_chunk=4),
        adapter=AdapterConfig(rank=64),
        sample=SampleConfig(sample_batch_size=2, num_candidates=2, num_inner_steps=3, threshold=0.4),
        objective=ObjectiveConfig(method="mspo"),
        optim=OptimConfig(learning_rate=1e-5, train_batch_size=2, gradient_accumulation_steps=2),
        run=RunConfig(output_dir="runs/sdxl", num_train_epochs=10),
    )


def toy() -> Config:
    """The embedded pipeline on a CPU: about a minute."""
    return Config(
        model=ModelConfig(model="toy", mixed_precision="no", decode_chunk=64),
        adapter=AdapterConfig(rank=8),
        sample=SampleConfig(sample_batch_size=8, num_candidates=4, threshold=0.3, guidance_scale=1.0),
        objective=ObjectiveConfig(method="spo"),
        optim=OptimConfig(learning_rate=1e-2, train_batch_size=32),
        data=DataConfig(max_prompts=128),
        run=RunConfig(output_dir="runs/toy", num_train_epochs=1, num_validation_images=8),
    )


PRESETS: dict[str, Callable[[], Config]] = {"toy": toy, "sd15": sd15, "sdxl": sdxl}


def published(cfg: Config) -> Config:
    """The published code's accumulation across rollouts, no clipping, and its SDXL's last-step rule."""
    last_step = "extend" if cfg.model.model in ("sdxl", "toy") else "compare"
    return cfg.with_fields(accumulation="published", max_grad_norm=None, last_step=last_step, recipe="published")
