"""Do the other methods do what they are for: rewards rise, held-out pairs are told apart. Whole runs, three seeds.

A few minutes each on one core. Only what is robust is asserted; what a run printed is in benchmarks/LOG.md.
"""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import built

from spo_fast.method.noise import KeyedDraws
from spo_fast.method.rollout import sample_latents
from spo_fast.toy.build import write_pairs
from spo_fast.training import batches
from spo_fast.training.monitor.timer import Timer

SEEDS = (0, 1, 2)
pytestmark = pytest.mark.slow


class Brightness:
    """The reward: a picture's mean pixel, 10 a unit. random: numbers that mean nothing instead."""

    def __init__(self, random: bool):
        self.generator = torch.Generator().manual_seed(0) if random else None

    def encode(self, prompts: list[str]) -> torch.Tensor:
        return torch.zeros(len(prompts), 1)

    def __call__(self, candidates: Any) -> torch.Tensor:
        if self.generator is not None:
            return torch.randn(len(candidates.x0), generator=self.generator)
        return torch.cat([10 * pixels.mean((1, 2, 3)) for _, pixels in candidates.pixel_chunks()])


POLICY_GRADIENT: dict[str, Any] = {
    "guidance_scale": 1.0,
    "num_steps": 8,
    "branch_start": 0,
    "num_candidates": 8,
    "sample_batch_size": 4,
    "train_batch_size": 128,
    "states_per_forward": 128,
    "learning_rate": 4e-3,
    "threshold": None,
    "clip": 1e-3,
    "max_prompts": 32,
    "max_train_steps": 12,
    "num_train_epochs": 2,
}


@torch.no_grad()
def brightness(run: Any) -> torch.Tensor:  # (64,)
    """Of pictures of 64 test prompts' worth of fixed noise, sampled without noise of its own."""
    prompts = (run.prompts * 64)[:64]
    draws = KeyedDraws(1, 2**32 - 2, torch.arange(64))
    x = draws.latents(run.model.latent_shape, run.model.latent_dtype)
    table = run.model.table(run.cfg.sample.num_steps, 0.0)
    return 10 * run.model.decode(sample_latents(run.policy, table, run.model.cond(prompts), 1.0, x)).mean((1, 2, 3))


def gain(output_dir: Path, method: str, seed: int, random: bool) -> float:
    run = built(output_dir, **POLICY_GRADIENT, method=method, seed=seed)
    run.scorer = Brightness(random)
    batches.encode_first(run)
    before = brightness(run)
    for iteration in range(run.total):
        run.iterate(iteration, Timer())
    return float((brightness(run) - before).mean())


@pytest.mark.parametrize("method", ["ddpo", "dpok"])
def test_policy_gradients_raise_a_reward_and_random_advantages_do_not(tmp_path: Path, method: str) -> None:
    gains = {
        random: [gain(tmp_path / f"{random}-{seed}", method, seed, random) for seed in SEEDS]
        for random in (False, True)
    }
    print(method, "reward", gains[False], "random", gains[True])
    noise = max(map(abs, gains[True]))
    assert min(gains[False]) > 0 and statistics.mean(gains[False]) > 3 * noise
    error = statistics.stdev(gains[True]) / len(SEEDS) ** 0.5
    assert abs(statistics.mean(gains[True])) < max(3 * error, 0.2 * statistics.mean(gains[False]))


PAIRS: dict[str, Any] = {
    **dict.fromkeys(("threshold", "num_candidates", "branch_start"), None),
    "resolution": 16,
    "sample_batch_size": 64,
    "train_batch_size": 32,
    "num_train_epochs": 3,
    "max_train_steps": 12,
    "validation_share": 0.2,
    "max_validation_pairs": 512,
    "cache_latents": True,
    "num_workers": 1,
}


@pytest.mark.parametrize(
    "method, settings",
    [
        ("dpo", {"beta": 500.0, "learning_rate": 5e-4}),
        ("mapo", {"learning_rate": 4e-3}),
    ],
)
def test_offline_methods_raise_held_out_accuracy(tmp_path: Path, method: str, settings: dict[str, Any]) -> None:
    pytest.importorskip("pyarrow")
    write_pairs(tmp_path / "pairs.parquet", 2048, seed=3)
    before, after = [], []
    for seed in SEEDS:
        run = built(
            tmp_path / str(seed), **{**PAIRS, **settings}, method=method, seed=seed, pairs=tmp_path / "pairs.parquet"
        )
        batches.encode_first(run)
        before.append(run.validator.held_out_accuracy())
        for iteration in range(run.total):
            run.iterate(iteration, Timer())
        after.append(run.validator.held_out_accuracy())
        run.pairs.close()
    print(method, "held-out accuracy before", before, "after", after, "pairs", len(run.pairs.valid_rows))
    # each is a share of some 400 pairs, whose error is 0.025
    assert all(b > a for a, b in zip(before, after, strict=True))
    assert statistics.mean(after) - statistics.mean(before) > 0.02
