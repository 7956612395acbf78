"""Small training runs for the end-to-end tests: the toy, in this process or another, killed if a test wants it."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from safetensors.torch import load_file

from spo_fast import train
from spo_fast.config.presets import PRESETS
from spo_fast.evaluation.pages import run_report
from spo_fast.evaluation.pages.run_record import read_metrics
from spo_fast.training import learner, loop

ROOT = Path(__file__).parent.parent
# 4 steps, 2 of them branching, 2 candidates; threshold -1 keeps every pair: 4 pairs of 2 prompts an iteration
SMALL: dict[str, Any] = {
    "model": "toy",
    "num_steps": 4,
    "branch_start": 2,
    "num_candidates": 2,
    "sample_batch_size": 2,
    "threshold": -1,
    "max_prompts": 4,
    "num_train_epochs": 2,
    "num_validation_images": 0,
    "train_batch_size": 2,
    "resolution": 8,
    "learning_rate": 1e-3,
    "guidance_scale": 2.0,
}
PAIRS = 4
ITERATIONS = 4


def command_line(settings: dict[str, Any]) -> list[str]:
    """Settings as flags; a value of None leaves one out."""
    words = []
    for name, value in settings.items():
        if value is True or value is False:
            words.append(f"--{name}" if value else f"--no-{name}")
        elif isinstance(value, (tuple, list)):
            words += [f"--{name}", *map(str, value)]
        elif value is not None:
            words += [f"--{name}", str(value)]
    return words


def flags(output_dir: Path, **settings: Any) -> list[str]:
    """SMALL's command line with some settings changed."""
    return command_line({**SMALL, "output_dir": output_dir, **settings})


def run_toy(output_dir: Path, *, curves: bool = False, **settings: Any) -> Path:
    """A run in this process to its end. curves: of its report, whose drawing is a quarter of a small run's time."""
    with contextlib.nullcontext() if curves else mock.patch.object(run_report, "draw", lambda chart, run: None):
        assert train.main(flags(output_dir, **settings)) == 0
    return output_dir


def built(output_dir: Path, **settings: Any) -> loop.Run:
    """The parts of a run, not started."""
    return loop.Run(train.parse(flags(output_dir, **settings)))


class Killed(BaseException):
    """Stands in for SIGKILL: nothing in the trainer catches it."""


def killed_run(output_dir: Path, monkeypatch: pytest.MonkeyPatch, after: int, **settings: Any) -> Path:
    """A run in this process that dies inside the iteration after `after` whole ones, its rollout done."""
    whole = learner.Learner.update

    def dies(self: Any, experience: Any, state: Any, *rest: Any) -> Any:
        record = whole(self, experience, state, *rest)
        if state.iteration == after:
            raise Killed
        return record

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(learner.Learner, "update", dies)
        train.main(flags(output_dir, **settings))
    return output_dir


def start(line: list[str], module: str = "spo_fast.train", **environment: str) -> subprocess.Popen[str]:
    """`python -m module` in another process, with as many threads as this one, so that it sums alike."""
    return subprocess.Popen(
        [sys.executable, "-m", module, *line],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads()), **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def kill_once_logged(process: subprocess.Popen[str], metrics: Path, records: int) -> None:
    """SIGKILL a training process as soon as its log has so many records."""
    kill_once(process, lambda: metrics.is_file() and metrics.read_bytes().count(b"\n") >= records)


def kill_once(process: subprocess.Popen[str], condition: Callable[[], bool]) -> None:
    """SIGKILL as soon as the condition holds."""
    deadline = time.monotonic() + 300
    while not condition():
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL


@contextlib.contextmanager
def default_float64() -> Iterator[None]:
    """transformers 4 makes the mask of a float64 network in the default type."""
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


def facts(run_dir: Path) -> list[dict[str, Any]]:
    """The metrics without times, which no two runs share."""
    records = read_metrics(run_dir / "metrics.jsonl")
    return [{k: v for k, v in r.items() if k != "time" and not k.endswith(("_ms", "_per_s"))} for r in records]


def assert_same_tensors(a: Path, b: Path) -> None:
    """Tensors, not bytes: safetensors writes its metadata in no fixed order."""
    ours, theirs = load_file(a), load_file(b)
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert torch.equal(ours[name], theirs[name]), f"{a.name}: {name}"


def assert_same_end(a: Path, b: Path) -> None:
    """Two runs whose last checkpoints and metrics agree to the last bit."""
    last = max(a.glob("checkpoint-*"), key=lambda p: int(p.name.split("-")[1])).name
    for file in ("trained.safetensors", "optimizer.safetensors"):
        assert_same_tensors(a / last / file, b / last / file)
    assert facts(a) == facts(b)


def leave_run(run_dir: Path, records: list[dict[str, Any]], before: float | None = None, **settings: Any) -> Path:
    """A run directory as training leaves it: iterations are numbered, times given if they are not there."""
    (run_dir / "samples").mkdir(parents=True)
    cfg = PRESETS[settings.pop("model", "toy")]().with_fields(output_dir=str(run_dir), **settings)
    (run_dir / "config.yaml").write_text(yaml.safe_dump(cfg.flat()))
    lines = [json.dumps({"iteration": i, "time": 0.0, "epoch": 0, **r}) + "\n" for i, r in enumerate(records)]
    (run_dir / "metrics.jsonl").write_text("".join(lines))
    if before is not None:
        (run_dir / "samples" / "before.json").write_text(json.dumps({"score": before, "values": {}}))
    return run_dir


def leave_grid(path: Path, pixels: np.ndarray, prompts: list[str]) -> None:
    texts = PngInfo()
    texts.add_text("prompts", json.dumps(prompts))
    Image.fromarray(pixels).save(path, pnginfo=texts, compress_level=0)
