"""The GPU-hours against Diffusion-DPO: counts against published numbers and sums by hand, projections by hand."""

from __future__ import annotations

import json
import math

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import gpu_hours, gpu_run, networks
from benchmarks.records import Records, read
from spo_fast import train
from spo_fast.training.plan.fake_run import predict

# TFLOP of an iteration as published, half of the pairs kept and all of them, counted by other means; a UNet row
PUBLISHED = {"sd15": (3726, 4552), "sdxl": (2533, 3923)}
ROW = {"sd15": 0.803, "sdxl": 6.761}
KINDS = [pytest.param("sd15"), pytest.param("sdxl", marks=pytest.mark.slow)]


@pytest.mark.parametrize("kind", KINDS)
def test_an_iteration_of_spo_costs_what_was_counted(kind):
    counted = [gpu_hours.iteration_flops(kind, "spo", v) / 1e12 for v in gpu_hours.VALID_SHARES]
    assert counted == pytest.approx(PUBLISHED[kind], rel=1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_a_pair_of_diffusion_dpo_by_hand(kind):
    """Two images: encoded, a policy's and a reference's forward, a backward of two forwards' worth; 2 % for what
    attention's backward and the first layer's differ in. SDXL's activations are computed again, but for the last
    product of each checkpointed block: most of another forward."""
    data = gpu_hours.Pairs(kind, "full", "meta", torch.float32)
    with FlopCounterMode(display=False) as counter:
        data.vae.encode(torch.empty(1, 3, data.pixels, data.pixels, device="meta"))
    prompt = {"sd15": 0.013, "sdxl": 0.111}[kind]
    by_hand = 2 * (counter.get_total_flops() / 1e12 + ROW[kind] * (1 + 1 + 2)) + prompt
    counted = gpu_hours.iteration_flops(kind, "dpo", 1.0) / 1e12 / 2048
    least, most = (0.75, 1) if kind == "sdxl" else (0, 0)
    assert 0.98 * (by_hand + least * 2 * ROW[kind]) < counted < 1.02 * (by_hand + most * 2 * ROW[kind])
    assert gpu_hours.judge_flops(kind, "dpo") == 0


@pytest.mark.parametrize("kind", KINDS)
def test_a_pair_of_the_preference_models_training_by_hand(kind):
    """SPM: two images encoded, predicted with guidance, decoded; three forwards' worth of both towers (.335, .047)."""
    encoded = {"sd15": 1.12, "sdxl": 4.87}[kind]  # as the test before counts it, to 2 %
    decoded = {"sd15": 2.51, "sdxl": 10.47}[kind]
    by_hand = 2 * encoded + 4 * ROW[kind] + 2 * decoded + 3 * (2 * 0.335 + 0.047)
    assert gpu_hours.call_costs(kind)["spm"] / 1e12 == pytest.approx(by_hand, rel=0.02)
    relabelled = 2 * 0.335 + 0.047 if kind == "sdxl" else 0
    pairs = {"sd15": 8000 * 64, "sdxl": 7000 * 64}[kind]
    assert gpu_hours.judge_pairs(kind, "spo") == pairs
    assert gpu_hours.judge_flops(kind, "spo") / 1e12 == pytest.approx(pairs * (by_hand + relabelled), rel=0.02)


@pytest.mark.slow
def test_lpo_and_dpo_cost_what_costs_predicts():
    """fake_run runs this package's loop, which evaluates a shared x_t once: half of LPO's policy and reference rows."""
    costs = gpu_hours.call_costs("sd15")
    c = predict(gpu_hours.published_config("sd15", "lpo").with_fields(fuse=False))
    calls = gpu_hours.RECIPES["lpo"].calls(gpu_hours.published_config("sd15", "lpo"), 1.0)
    rows = 4 * 20 * 5  # of reference and of policy
    assert c.samples["reference"] == c.samples["policy"] == rows / 2
    assert calls["unet"] == calls["backward to LoRA"] == rows
    assert calls["unet with LoRA"] == c.samples["rollout"] + rows == 2 * 20 * 5 + rows
    assert calls["latent score"] * costs["latent score"] == pytest.approx(c.full_flops["score"], rel=0.01)
    c = predict(train.parse(["--model", "sd15", "--method", "dpo", "--pairs", "x", "--no-fuse"]))
    assert gpu_hours.iteration_flops("sd15", "dpo", 1.0) - 2048 * costs["prompt"] == pytest.approx(
        sum(c.full_flops.values()), rel=1e-3
    )


def test_published_trainings():
    numbers = {
        (kind, method): gpu_hours.published_iterations(gpu_hours.published_config(kind, method))
        for kind in gpu_hours.KINDS
        for method in gpu_hours.RECIPES
    }
    # 4,000 prompts 10 times in batches of 10 and of 2; 5 times in batches of 5 and of 4; 2,000 steps
    assert numbers == {
        ("sd15", "spo"): 4000,
        ("sd15", "lpo"): 4000,
        ("sd15", "dpo"): 2000,
        ("sdxl", "spo"): 20_000,
        ("sdxl", "lpo"): 5000,
        ("sdxl", "dpo"): 2000,
    }
    for (kind, method), percent in gpu_hours.PAPER.items():
        ours = 100 * gpu_hours.HOURS[kind, method].total / gpu_hours.HOURS[kind, "dpo"].total
        assert round(ours, 1) == percent


# ---------------------------------------------------------------------------------------------------- projections


def cells(table):
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()[2:]]


def gpu_record(name, p50_ms, **values):
    gpu = {"status": "ok", "device": "cuda", "size": "full", "gpu": {"name": "H200"}, "time": "2026"}
    return {"name": name, "p50_ms": p50_ms, **gpu, **values}


def test_projections_by_hand(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_hours, "call_costs", lambda kind: dict.fromkeys(CALLS, 10**12))
    rows = [
        gpu_record("sd15/published/v=0.5", 9000, gate="passed", published_batch=True),
        gpu_record("sd15/published/v=1", 18_000, gate="passed", published_batch=True),
        gpu_record("sd15/ours+all/v=1", 4000, gate="passed", published_batch=True),
        gpu_record("sd15/ours+bf16/v=1", 10, gate="failed: gradient_error", published_batch=True),
        gpu_record("sd15/ours+fuse/v=1", 10, gate="passed", published_batch=False),
        gpu_record("sd15/ours+graphs/v=1", 10, gate="passed", published_batch=True, device="cpu", gpu={}),
        gpu_record("sd15/ours+fuse/v=1", 10, gate="passed", published_batch=True, size="tiny"),
        gpu_record("sd15/ours+merged/v=1", 10, gate="passed", published_batch=True),
        gpu_record("sd15/dpo micro-batch of 1", 100, p50_step_ms=1000),
        gpu_record("sd15/spm micro-batch of 16", 900, p50_step_ms=900),
    ]
    (tmp_path / "2026_h200_iteration.jsonl").write_text("\n".join(json.dumps(r) for r in rows))
    found = gpu_hours.gpu_records(tmp_path)
    assert gpu_hours.judge_hours("sd15", "spo", found) == pytest.approx((32_000 * 0.9 + 8000 * 0.9) / 3600) == 10
    assert gpu_hours.projected_hours("sd15", "spo", "published", 1.0, found) == pytest.approx(4000 * 18 / 3600 + 10)
    assert gpu_hours.projected_hours("sd15", "spo", "published", 0.5, found) == pytest.approx(4000 * 9 / 3600 + 10)
    assert gpu_hours.iteration_seconds("sd15", "spo", "ours", 1.0, found) == 4
    dpo = 2000 * (2048 * 0.1 + 1) / 3600
    assert gpu_hours.projected_hours("sd15", "dpo", "published", 1.0, found) == pytest.approx(dpo)
    rows = {tuple(row[:3]): row[3:] for row in cells(gpu_hours.projection_table(found))}
    shares = f"{100 * 20 / dpo:.1f}-{100 * 30 / dpo:.1f}"
    assert rows["sd15", "SPO", "published"] == ["9-18", "10.0", "20.0-30.0", shares]
    ours = ["not measured", "10.0", "not measured", "not measured"]
    assert rows["sd15", "SPO", "ours"] == ours  # v = 0.5 is missing
    assert "hours/sd15-dpo" in gpu_hours.missing_jobs(found)  # its larger micro-batch
    assert "hours/sd15-spm" not in gpu_hours.missing_jobs(found)
    assert "sd15/ours+all" in gpu_hours.missing_jobs(found)
    gpu_run.chosen(gpu_hours.missing_jobs({}))  # every one is a job


CALLS = (
    *("unet", "unet with LoRA", "backward to LoRA", "prompt", "decode", "score", "score text", "latent score"),
    *("latent score text", "dpo", "spm", "lrm"),
)


def test_without_a_gpu_no_number_stands_in_its_columns(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_hours, "call_costs", lambda kind: dict.fromkeys(CALLS, 10**12))
    found = gpu_hours.gpu_records(tmp_path)
    for _, method, _, seconds, judge, *hours in cells(gpu_hours.projection_table(found)):
        assert {seconds, *hours} == {"not measured"}
        assert judge == ("0.0" if method == "Diffusion-DPO" else "not measured")
    records = Records(tmp_path / "records.jsonl", "gpu_hours")
    gpu_hours.record(records, found)
    spo = read(records.path)[0]
    assert spo["name"] == "sd15/spo training" and spo["projected_hours"]["ours"] == [None, None]
    papers = {(row[0], row[1]): row[-2] for row in cells(gpu_hours.count_table())}
    assert papers["sd15", "SPO"] == "20.8" and papers["sdxl", "SPO"] == "4.9" and papers["sdxl", "LPO"] == ""


# ---------------------------------------------------------------------------------------------------- what is timed


@pytest.mark.parametrize("kind", gpu_hours.KINDS)
@pytest.mark.parametrize("name", ["dpo", "spm", "lrm", "lpo"])
def test_every_step_runs_at_tiny_size(kind, name, tmp_path, monkeypatch):
    """Times mean nothing here: the records say tiny and cpu, and no projection is made of them."""
    monkeypatch.setitem(gpu_hours.BATCHES, kind, {"dpo": (1, 2), "spm": (2,), "lrm": (2,)})
    records = Records(tmp_path / "x_gpu_hours.jsonl", "hours", "cpu", "tiny")
    gpu_hours.run(f"{kind}-{name}", "tiny", "cpu", records, left_s=lambda: 0.0)
    rows = read(records.path)
    assert [r["n"] for r in rows] == [1] * len(rows) and len(rows) == (1 if name in ("spm", "lrm") else 2)
    assert all(r["size"] == "tiny" and r["device"] == "cpu" for r in rows)
    assert not gpu_hours.gpu_records(tmp_path)


@pytest.mark.parametrize("kind", gpu_hours.KINDS)
def test_the_restated_loss_is_diffusion_dpos(kind):
    """log 2 where policy and reference agree; after a change, the formula written out on the same draws."""
    dpo = gpu_hours.DiffusionDPO(kind, "tiny", "cpu", torch.float32)
    assert float(dpo.micro_batch(2)) == pytest.approx(math.log(2), abs=5e-4)  # beta magnifies rounding
    with torch.no_grad(), networks.seeded(0):
        for p in dpo.unet.parameters():
            p.add_(0.003 * torch.randn_like(p))
    clean, t = dpo.data.latents(2), torch.tensor([700, 20])
    dpo.data.latents = lambda pairs: clean
    dpo.data.timesteps = lambda pairs: t
    with networks.seeded(1):
        loss = float(dpo.micro_batch(2))
    with networks.seeded(1), torch.no_grad():
        noise = torch.randn_like(clean[0])
        told = dpo.data.told(2)
        embeds = told.pop("prompt_embeds")
        errors = {}
        for side in range(2):
            alpha = dpo.data.alphas[t].view(-1, 1, 1, 1)
            x_t = alpha.sqrt() * clean[side] + (1 - alpha).sqrt() * noise
            for name, unet in (("policy", dpo.unet), ("reference", dpo.reference)):
                out = unet(x_t, t, embeds, added_cond_kwargs=told or None, return_dict=False)[0]
                errors[name, side] = (noise - out).double().square().mean((1, 2, 3))
    gain = [errors["policy", side] - errors["reference", side] for side in range(2)]  # winner, loser
    truth = -(-2500 * (gain[0] - gain[1])).sigmoid().log().mean()
    assert abs(float(truth) - math.log(2)) > 1e-3
    assert loss == pytest.approx(float(truth), rel=1e-3)


@pytest.mark.parametrize("name", ["spm", "lrm"])
def test_a_step_changes_the_preference_model(name):
    step = gpu_hours.STEPS[name]("sd15", "tiny", "cpu", torch.float32)
    before = [p.detach().clone() for p in step.reward.weights.masters]
    step.learner.go_to(100)  # its learning rate warms up from 0
    assert float(step.micro_batch(2)) > 0
    step.step()
    assert any(not torch.equal(a, b) for a, b in zip(before, step.reward.weights.masters, strict=True))
