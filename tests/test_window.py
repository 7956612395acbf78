"""--branch_window auto: what it leaves out, what that saves, and that a resumed run leaves out the same."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from runs import built, facts, killed_run, run_toy

from spo_fast.config.training import SampleConfig
from spo_fast.method import skipped_segments
from spo_fast.method.rollout import branching_rollout, segments
from spo_fast.method.skipped_segments import NEAR_ZERO, REOPEN, TRUST, to_skip
from spo_fast.scorers.spm import ClipScorer
from spo_fast.training import batches

CFG = SampleConfig(num_steps=8, branch_start=2, num_candidates=2, num_inner_steps=1, branch_window="auto")


def test_what_is_left_out():
    starts = [first for first, _ in segments(CFG)]
    assert starts == [2, 4, 6]
    poor, rich, new = [TRUST, NEAR_ZERO / 2], [TRUST, 2 * NEAR_ZERO], [TRUST - 1, 0.0]
    assert to_skip({}, 1, CFG) == frozenset()
    assert to_skip({"2": poor, "4": rich, "6": new}, 1, CFG) == {2}
    assert to_skip({"2": poor, "6": poor, "40": poor}, 1, CFG) == {2, 6}
    assert to_skip({"2": poor}, REOPEN, CFG) == frozenset()  # all are compared again
    assert to_skip({"2": poor, "4": poor, "6": poor}, 1, CFG) == frozenset()  # something must be learnt from
    assert to_skip({"2": poor}, 1, SampleConfig(num_steps=8, branch_start=2)) == frozenset()  # not asked for


def test_the_running_share_is_a_mean_first_and_then_moves(monkeypatch):
    seen: skipped_segments.Window = {}
    skipped_segments.observe(seen, [2, 3, 2, 3, 4, 5], CFG, frozenset(), 4)
    assert seen == {"2": [4.0, 0.5], "4": [4.0, 0.25], "6": [4.0, 0.0]}
    skipped_segments.observe(seen, [2, 3], CFG, frozenset({4}), 4)
    assert seen["2"] == [8.0, pytest.approx((2 + 1) / 8)] and seen["4"] == [4.0, 0.25]
    for _ in range(200):
        skipped_segments.observe(seen, [], CFG, frozenset(), 4)
    assert seen["2"][1] < 1e-3


def test_a_left_out_segment_costs_one_candidate(tmp_path):
    """Counted on the UNet; the rest of the rollout goes on from the child that was not compared."""
    run = built(tmp_path / "run", num_steps=8, num_inner_steps=1, method="mspo", branch_window="auto")
    sample, rows, images = run.cfg.sample, [], []
    run.policy.network.register_forward_pre_hook(lambda _, args: rows.append(len(args[0])))

    def collect(left_out):
        rows.clear(), images.clear()

        def decode(latents):
            images.append(len(latents))
            return run.model.decode(latents)

        batch = trainer_batch(run, left_out)
        sampler = dataclasses.replace(run.sampler, decode=decode, cfg=sample, decode_chunk=8)
        return branching_rollout(sampler, batch), sum(rows), sum(images)

    everything, all_rows, all_images = collect(frozenset())
    for left_out in ({2}, {4}, {6}, {2, 6}):
        part, fewer_rows, fewer_images = collect(frozenset(left_out))
        shares = {str(first): [100.0, 0.01] for first in left_out}
        told = skipped_segments.saved(shares, frozenset(left_out), sample, 2, False)
        assert all_rows - fewer_rows == told["rows_saved"] > 0
        assert all_images - fewer_images == told["images_saved"] > 0
        assert told["pairs_lost"] == pytest.approx(sum(0.01 * 2 * 2 for _ in left_out))
        kept = set(part.states.rows.tolist())
        assert kept == {r for first, end in segments(sample) if first not in left_out for r in range(first, end)}
        assert len(part) == len(everything) - 4 * len(left_out)  # threshold -1: every pair of the others is there
        assert part.x_prev.isfinite().all()


def test_children_judged_as_they_are_cost_the_network_nothing(tmp_path):
    """LPO's scorer asks for no prediction of candidates: a segment of one step saves no row of the UNet."""
    sample = SampleConfig(num_steps=8, branch_start=2, num_candidates=4, branch_end=6)
    shares = {"2": [100.0, 0.01], "5": [100.0, 0.01]}
    assert skipped_segments.saved(shares, frozenset({2, 5}), sample, 3, True)["rows_saved"] == 0
    # 2 guidance halves of 3 prompts: 3 of 4 candidates' predictions in the middle, and all 4 where nothing goes on
    assert skipped_segments.saved(shares, frozenset({2, 5}), sample, 3, False)["rows_saved"] == 2 * 3 * (3 + 4)


def trainer_batch(run, left_out):
    with torch.no_grad():
        return dataclasses.replace(batches.rollout_batch(run, [0, 1], 0), skipped=left_out)


def test_a_run_leaves_out_what_never_counts_and_resumes_alike(tmp_path, monkeypatch):
    """A judge that sees no difference from the second segment on: its comparisons stop, also after a resume."""
    monkeypatch.setattr(skipped_segments, "TRUST", 4.0)
    few = {"num_steps": 6, "branch_start": 2, "branch_window": "auto", "threshold": 0.0, "max_train_steps": 4}
    blind(monkeypatch)
    whole = run_toy(tmp_path / "whole", **few)
    closed_at = [r["window_closed"] for r in facts(whole)]
    assert closed_at[0] == 0 and closed_at[-1] == 3 and facts(whole)[-1]["rows_saved"] > 0
    run = killed_run(tmp_path / "killed", monkeypatch, after=3, checkpointing_steps=1, **few)
    run_toy(run, checkpointing_steps=1, resume_from_checkpoint="latest", **few)
    assert facts(run) == facts(whole)


def blind(monkeypatch):
    score = ClipScorer.score_pixels
    monkeypatch.setattr(
        ClipScorer, "score_pixels", lambda self, pixels, t, text: score(self, pixels, t, text) * (t > 200)
    )
