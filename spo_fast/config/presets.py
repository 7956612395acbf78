"""Presets: functions that return a whole Config, with the published runs' settings (their configs/)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
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


ATTENTION = tuple(
    f"attn.{name}"  # not attn2, which a bare to_q would take too
    for name in ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
)
FEED_FORWARD = ("ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2")


def sd35() -> Config:
    """SPO on Stable Diffusion 3.5, with the steps, LoRA and rate of the published flow recipes (Flow-GRPO)."""
    return Config(
        model=ModelConfig(model="sd35", mixed_precision="auto", height=512, width=512),
        adapter=AdapterConfig(rank=32, lora_alpha=64, lora_targets=ATTENTION),
        sample=SampleConfig(sample_batch_size=4, num_steps=10, guidance_scale=4.5, branch_start=None),
        objective=ObjectiveConfig(method="spo"),
        optim=OptimConfig(learning_rate=3e-4, train_batch_size=4),
        run=RunConfig(output_dir="runs/sd35", num_train_epochs=10, checkpoints_total_limit=2),
    )


def flux() -> Config:
    """SPO on FLUX.1, with the steps, LoRA and rate of the published flow recipes. float16 would overflow."""
    return Config(
        model=ModelConfig(model="flux", mixed_precision="bf16", height=512, width=512),
        adapter=AdapterConfig(rank=64, lora_alpha=128, lora_targets=(*ATTENTION, *FEED_FORWARD)),
        sample=SampleConfig(sample_batch_size=2, num_candidates=2, num_steps=6, guidance_scale=1.0, branch_start=None),
        objective=ObjectiveConfig(method="spo"),
        optim=OptimConfig(learning_rate=3e-4, train_batch_size=2, gradient_accumulation_steps=2),
        run=RunConfig(output_dir="runs/flux", num_train_epochs=10, checkpoints_total_limit=2),
    )


def toy_flow() -> Config:
    """The embedded world on a CPU, by a flow model of SD3's kind."""
    return Config(
        model=ModelConfig(model="toy-flow", mixed_precision="no", decode_chunk=256, max_sequence_length=0),
        adapter=AdapterConfig(rank=8, lora_alpha=16, lora_targets=ATTENTION),
        sample=SampleConfig(sample_batch_size=16, num_steps=10, threshold=0.05, guidance_scale=2.0, branch_start=None),
        objective=ObjectiveConfig(method="spo"),
        optim=OptimConfig(learning_rate=5e-4, train_batch_size=16),
        data=DataConfig(max_prompts=96),
        run=RunConfig(output_dir="runs/toy-flow", num_train_epochs=1, num_validation_images=8),
    )


PRESETS: dict[str, Callable[[], Config]] = {
    "toy": toy,
    "toy-flow": toy_flow,
    "sd15": sd15,
    "sdxl": sdxl,
    "sd35": sd35,
    "flux": flux,
}


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


def flow_preference(model: Literal["sd35", "flux"]) -> PreferenceConfig:
    """As SDXL's, on PickScore's labels: none is published for flows."""
    found, drawn = _preference(model, 1e-6, 7000, "pickscore"), PRESETS[model]()
    reward = RewardConfig(train_guidance_scale=drawn.sample.guidance_scale)
    return replace(found, model=replace(drawn.model, decode_chunk=4), reward=reward)


def toy_preference(model: Literal["toy", "toy-flow"] = "toy") -> PreferenceConfig:
    """The embedded world's SPM, from its PickScore."""
    return PreferenceConfig(
        model=PRESETS[model]().model,
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
            output_dir=f"runs/{model}-spm", num_train_epochs=1, validation_steps=200, checkpointing_steps=100
        ),
    )


PREFERENCE_PRESETS: dict[str, Callable[[], PreferenceConfig]] = {
    "toy": toy_preference,
    "toy-flow": lambda: toy_preference("toy-flow"),
    "sd15": sd15_preference,
    "sdxl": sdxl_preference,
    "sd35": lambda: flow_preference("sd35"),
    "flux": lambda: flow_preference("flux"),
}


def evaluation(model: Literal["sd15", "sdxl"]) -> EvaluationConfig:
    """As the published tables were made: 20 steps, guidance 5."""
    return EvaluationConfig(model=ModelConfig(model=model))


def flow_evaluation(model: Literal["sd35", "flux"], steps: int) -> EvaluationConfig:
    """As the published flow recipes evaluate: more steps than in training, the same guidance."""
    cfg = PRESETS[model]()
    pictures = PicturesConfig(guidance_scale=cfg.sample.guidance_scale, num_steps=steps)
    return EvaluationConfig(model=cfg.model, pictures=pictures)


def toy_evaluation(model: Literal["toy", "toy-flow"] = "toy") -> EvaluationConfig:
    """The embedded world's true scores beside PickScore."""
    return EvaluationConfig(
        model=PRESETS[model]().model,
        metric=MetricConfig(metrics=("layout", "aesthetics", "pickscore")),
        pictures=PicturesConfig(guidance_scale=2.0, images_per_prompt=2, images_at_once=128),
    )


EVALUATION_PRESETS: dict[str, Callable[[], EvaluationConfig]] = {
    "toy": toy_evaluation,
    "toy-flow": lambda: toy_evaluation("toy-flow"),
    "sd15": lambda: evaluation("sd15"),
    "sdxl": lambda: evaluation("sdxl"),
    "sd35": lambda: flow_evaluation("sd35", 40),
    "flux": lambda: flow_evaluation("flux", 28),
}
