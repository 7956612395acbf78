"""Rollouts with merged weights: equal to unmerged ones up to rounding, and the base restored bit for bit."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from runs import built, facts, run_toy

from spo_fast.models.graphs import Graphs
from spo_fast.models.merged import lora_layers
from spo_fast.training import batches


def policy_of(tmp_path, **settings):
    """A policy whose LoRA does something, on attention and convolutions, and inputs for it."""
    run = built(tmp_path / "run", lora_alpha=4.0, lora_targets=["to_q", "to_v", "to_out.0", "conv1"], **settings)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, master in zip(run.policy.names, run.policy.masters, strict=True):
            if "lora_B" in name:
                master.copy_(0.05 * torch.randn(master.shape, generator=generator))
    run.policy.copy_to_network()
    x = torch.randn(3, *run.model.latent_shape, generator=generator, dtype=run.model.latent_dtype)
    return run, (x, run.table.timesteps[1], run.model.cond(run.prompts[:3]), True)


@torch.no_grad()
def outputs(run, inputs):
    return torch.stack(run.policy.predict(*inputs)).float()


def test_float32_agrees_and_the_base_comes_back(tmp_path):
    run, inputs = policy_of(tmp_path)
    state = {name: value.clone() for name, value in run.policy.network.state_dict().items()}
    unmerged = outputs(run, inputs)
    with run.policy.reference():
        off = outputs(run, inputs)
    with run.policy.merged(7, 0):
        merged = outputs(run, inputs)
    assert (unmerged - off).abs().max() > 1e-2  # the LoRA matters
    torch.testing.assert_close(merged, unmerged, rtol=1e-4, atol=1e-5)
    assert torch.equal(outputs(run, inputs), unmerged)
    after = run.policy.network.state_dict()
    assert state.keys() == after.keys() and all(torch.equal(state[name], after[name]) for name in state)


def test_restored_after_an_error(tmp_path):
    run, inputs = policy_of(tmp_path)
    before = outputs(run, inputs)
    with pytest.raises(RuntimeError, match="mid-way"), run.policy.merged(7, 0):
        raise RuntimeError("mid-way")
    assert torch.equal(outputs(run, inputs), before)


def test_16_bits_are_right_on_average(tmp_path):
    """The mean over roundings approaches the unmerged network of the same base, computed in float32."""
    run, inputs = policy_of(tmp_path, mixed_precision="bf16")
    draws = []
    for iteration in range(40):
        with run.policy.merged(1, iteration):
            draws.append(outputs(run, inputs))
    with run.policy.merged(1, 3):
        assert torch.equal(outputs(run, inputs), draws[3])  # a key gives one rounding
    assert not torch.equal(draws[0], draws[1])
    unmerged = outputs(run, inputs)
    with run.policy.reference():
        effect = unmerged - outputs(run, inputs)
    off_by = torch.stack(draws).mean(0) - unmerged
    slope = 1 + (off_by * effect).sum() / effect.square().sum()
    assert abs(float(slope) - 1) < 0.05


def test_storages_stay_where_they_are_for_graphs(tmp_path):
    """A recorded rollout step sees the next merge."""
    import recorded

    run, inputs = policy_of(tmp_path)
    call = Graphs(recorded.capture).wrap("predict", lambda x: torch.stack(run.policy.predict(x, *inputs[1:])))
    for iteration in range(4):
        with torch.no_grad():
            for master in run.policy.masters:
                master.mul_(1.1)
        with run.policy.merged(0, iteration):
            got = call(inputs[0])
            torch.testing.assert_close(got, outputs(run, inputs), rtol=0, atol=0)


def test_layers_counted(tmp_path):
    run, _ = policy_of(tmp_path)
    with run.policy.merged(0, 0):
        pass
    assert len(list(lora_layers(run.policy.network))) == len(run.policy._merged.layers) == len(run.policy.masters) // 2


@pytest.mark.parametrize("full_finetune", [False, True])
def test_a_run_with_merged_rollouts(tmp_path, full_finetune):
    """Full fine-tuning has nothing to merge: its numbers are the same."""
    plain = run_toy(tmp_path / "plain", full_finetune=full_finetune)
    merged = run_toy(tmp_path / "merged", full_finetune=full_finetune, rollout_weights="merged")
    for a, b in zip(facts(plain), facts(merged), strict=True):
        assert a == b if full_finetune else a["score_mean"] == pytest.approx(b["score_mean"], abs=1e-3)


def test_candidates_of_merged_rollouts_score_alike(tmp_path):
    """64 rollouts in 16 bits, the same noise: their scores' mean differs by less than 3 standard errors."""
    many = {"max_prompts": 64, "sample_batch_size": 64, "mixed_precision": "bf16", "num_steps": 6, "branch_start": 1}
    run, _ = policy_of(tmp_path, **many)
    means = []
    for weights in ("unmerged", "merged"):
        cfg = run.cfg.with_fields(rollout_weights=weights)
        with run.rollout_weights(cfg.sample, 0):
            sampler = dataclasses.replace(run.sampler, decode=run.model.decode, cfg=cfg.sample)
            experience = run.objective.collect(sampler, batches.rollout_batch(run, list(range(64)), 0))
        means.append(experience.scores.view(-1, 64).double().mean(0))
    difference = means[1] - means[0]
    error = difference.std() / 8
    assert 0 < error < 0.5 and abs(float(difference.mean())) < 3 * error
