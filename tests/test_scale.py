"""The simulator of many GPUs against sums by hand."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.scale import Links, Work, all_reduce_s, check, exchange_s, simulate

# 10 prompts of 16 pairs, all valid, steps of 40 terms: 4 optimizer steps an iteration
WORK = Work(
    rollout_s=8.0,
    spread=0.0,
    train_s=0.25,
    step_s=0.5,
    possible=160,
    valid_share=1.0,
    terms_per_step=40,
    term_bytes=10**6,
    gradient_bytes=2 * 10**9,
)
LINKS = Links(node_gb_s=100.0, network_gb_s=10.0, latency_us=1000.0)


def test_one_gpu_is_the_sum_of_its_phases() -> None:
    assert simulate(WORK, LINKS, 1)["total_s"] == pytest.approx(8.0 + 4 * 0.5 + 160 * 0.25)


def test_links_by_hand() -> None:
    assert all_reduce_s(8, 2e9, LINKS) == pytest.approx(2 * 7 / 8 * 2e9 / 100e9 + 2 * 3 * 1e-3)
    assert all_reduce_s(16, 2e9, LINKS) == pytest.approx(2 * 15 / 16 * 2e9 / 10e9 + 2 * 4 * 1e-3)
    assert exchange_s(4, 160e6, LINKS) == pytest.approx(3 / 4 * 160e6 / 100e9 + 3 * 1e-3)
    extra = simulate(WORK, LINKS, 4)["total_s"] - simulate(WORK, LINKS, 1)["total_s"]
    assert extra == pytest.approx(exchange_s(4, 160e6, LINKS) + 4 * all_reduce_s(4, 2e9, LINKS))


def test_rebalancing_spares_the_wait_for_the_luckiest() -> None:
    rare = replace(WORK, valid_share=0.2)
    t = simulate(rare, LINKS, 256)
    assert t["train_s"] < 1.15 * 0.2 * 160 * 0.25  # each step's share is rounded up
    without = t["unbalanced_s"] - t["total_s"] + t["exchange_s"] + t["train_s"]
    assert without > 1.3 * 0.2 * 160 * 0.25  # 32 pairs on average, the most of 256 GPUs about 46


@pytest.mark.slow
def test_real_processes_send_what_is_predicted(tmp_path: Path) -> None:
    """Steps, all-reduced bytes and the busiest process's terms to the number; who is dealt which term is chance."""
    one, two = check(tmp_path, [2], iterations=3)
    assert one.all_reduces == (0, 0) and one.exchanged_bytes == (0, 0)
    for found in (one, two):
        for predicted, counted in (found.all_reduces, found.all_reduce_bytes, found.most_terms):
            assert predicted == counted
    assert two.all_reduces[0] > 1 and two.all_reduce_bytes[0] > 10_000
    assert 0.5 < two.exchanged_bytes[1] / two.exchanged_bytes[0] < 1.5
