"""What an iteration on a flow model is predicted to cost, at full size on fake tensors, against the least there is."""

from __future__ import annotations

import pytest
from test_fuse_transformer import least_flops

from spo_fast import train
from spo_fast.models.device import GIB, Device
from spo_fast.training.plan import fit_memory
from spo_fast.training.plan.fake_run import predict

CARD = Device("a card of 24 GB", "cuda", 24 * GIB, capability=(8, 9))


@pytest.mark.slow
@pytest.mark.parametrize("model", ["sd35", "flux"])
def test_an_iterations_flops_are_the_least_that_its_rows_need(model: str) -> None:
    """Rows by hand: unbranched steps and the first branching one see a child a prompt, later ones all K; every kept
    transition has one state, for the reference once, for the policy with its backward."""
    cfg = train.parse(["--model", model, "--mixed_precision", "bf16"])
    cfg, _ = fit_memory.choose(cfg, Device("H200", "cuda", 141 * GIB, capability=(9, 0)))
    costs, s = predict(cfg, None, "cuda"), cfg.sample
    B, K, halves = s.sample_batch_size, s.num_candidates, 2 if s.guidance_scale > 1 else 1
    # each comparison of children of step i is by a prediction at step i + 1
    drawn = halves * B * (s.first_branch + 1 + K * s.branching_steps)
    states = halves * B * s.branching_steps
    assert (costs.samples["rollout"], costs.samples["reference"], costs.samples["policy"]) == (drawn, states, states)
    kind, tokens = {"sd35": "sd3"}.get(model, model), (512 // 16) ** 2
    (forward, backward), (plain, _) = least_flops(kind, tokens), least_flops(kind, tokens, rank=0)
    wanted = {"rollout": drawn * forward, "reference": states * plain, "policy": states * (forward + backward)}
    for part, least in wanted.items():
        print(f"\n{model} {part}: {costs.full_flops[part] / 1e12:,.1f} TFLOP, least {least / 1e12:,.1f}")
    assert sum(costs.full_flops[part] for part in wanted) == pytest.approx(sum(wanted.values()), rel=0.02)


@pytest.mark.slow
def test_sd35_fits_a_card_of_24_gb() -> None:
    """GiB predicted for each choice of --memory; small leaves 4 of the 24."""
    peaks = {}
    for memory in ("fast", "balanced", "small"):
        cfg = train.parse(["--model", "sd35", "--mixed_precision", "bf16", "--memory", memory])
        cfg, _ = fit_memory.choose(cfg, CARD)
        peaks[memory] = predict(cfg, None, "cuda").peak / GIB
    print(peaks)
    assert peaks["small"] <= 20 and max(peaks.values()) * GIB <= (CARD.usable_bytes or 0)
