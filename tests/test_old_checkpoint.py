"""A run begun before the package had its rooms goes on after: golden/run_before_rooms, the toy's SMALL run of rank 1.

config.yaml, the log's first two records and checkpoint-2 are what that run left when it was half done; end.safetensors
and end.jsonl are what it came to by itself, without a stop.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from runs import ROOT, facts
from safetensors.torch import load_file

from spo_fast import train

BEFORE = ROOT / "tests" / "golden" / "run_before_rooms"


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """What the old program had left when it was half done."""
    return Path(shutil.copytree(BEFORE, tmp_path / "run", ignore=shutil.ignore_patterns("end.*")))


def test_it_goes_on_to_the_same_end(run_dir: Path) -> None:
    """But for rounding, which Adam enlarges: since then the CPU's noise has other last bits in 1.5 % of its normals."""
    line = ["--config", str(run_dir / "config.yaml"), "--output_dir", str(run_dir)]
    assert train.main([*line, "--resume_from_checkpoint", "latest"]) == 0
    begun, wanted = load_file(run_dir / "checkpoint-2" / "trained.safetensors"), load_file(BEFORE / "end.safetensors")
    ours = load_file(run_dir / "pytorch_lora_weights.safetensors")
    assert ours.keys() == wanted.keys() and len(ours) == len(begun)
    for name, end in wanted.items():
        torch.testing.assert_close(ours[name], end, rtol=1e-4, atol=2e-6, msg=lambda text, name=name: f"{name}: {text}")
    last = load_file(run_dir / "checkpoint-4" / "trained.safetensors")
    assert max(float((last[name] - start).abs().max()) for name, start in begun.items()) > 1e-3  # 4 steps at 1e-3
    records = [json.loads(line) for line in (BEFORE / "end.jsonl").read_text().splitlines()]
    for record, old in zip(facts(run_dir)[2:], records, strict=True):
        for name in ("iteration", "epoch", "pairs", "states", "images", "lr", "accuracy"):
            assert record[name] == old[name], name
        for name in ("score_mean", "score_std", "loss", "margin", "grad_norm"):
            # a margin is beta times a small difference of log-ratios, each of a small difference of means
            rel = 5e-4 if name == "margin" else 1e-4
            assert record[name] == pytest.approx(old[name], rel=rel, abs=1e-6), name
