"""An iteration on a GPU, counted without one: where the host waits, what is copied, and which devices meet.

Whole iterations (rollout, decoding, scoring, reference, backward, step, log) run on fake tensors that say they are on a
CUDA device, with the networks' published sizes; a number that the host branches on is computed beside (fake_cuda/).
PyTorch built without CUDA learns of such a device from fake_cuda/guard.cpp, compiled here, in a process of its own.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from runs import ROOT

HERE = Path(__file__).parent / "fake_cuda"
TORCH = Path(torch.__file__).parent
CASES = ("toy", "toy:merged", "toy:faulty", "sd15", "sdxl")


class Place(NamedTuple):
    """What happens where in a phase of an iteration."""

    phase: str
    kind: str
    """wait: the host reads a number, or a size that depends on numbers. to host, to device: a copy, and a wait as well.
    sent: a copy from pinned memory, for which the host does not wait.
    mixed: a tensor of each in one operation. on the host: a tensor made there, which 0-dimensional ones are not."""
    where: str


EVERY = {
    # the prompts: rows of the caches, keys, sizes
    Place("rollout", "on the host", "method/noise.py permutation"): 1,
    Place("rollout", "on the host", "ops/philox.py words"): 1,
    Place("rollout", "on the host", "training/batches.py rollout_batch"): 1,
    Place("rollout", "sent", "training/batches.py rollout_batch"): 1,
    Place("rollout", "sent", "scorers/spm.py ClipScorer.encode"): 1,
    # the rollout's one read, and the index that is made of it
    Place("rollout", "to host", "method/rollout.py Segments.compact"): 1,
    Place("rollout", "on the host", "method/rollout.py Segments.compact"): 5,
    Place("rollout", "sent", "method/rollout.py Segments.compact"): 7,
    # the permutation
    Place("between", "on the host", "method/noise.py permutation"): 1,
    Place("between", "on the host", "ops/philox.py words"): 1,
    Place("between", "on the host", "training/processes.py Group.total"): 1,
    # an optimizer step: its norm
    Place("step", "to host", "training/learner.py Learner.step"): 1,
    # the log: the weights' size, all else at once
    Place("log", "wait", "training/learner.py Learner.check_weights"): 1,
    Place("log", "to host", "training/monitor/log.py fetch_scalars"): 1,
}
"""Of a model's iteration, whatever its batches: the host waits four times, and once more with each further step."""
SDXL_SIZES = {
    Place("rollout", "on the host", "models/diffusion.py DiffusionModel.cond"): 1,
    Place("rollout", "sent", "models/diffusion.py DiffusionModel.cond"): 1,
}
PICKS = {  # of where the second segment starts; SDXL's inner steps leave one
    Place("rollout", "on the host", "method/noise.py KeyedDraws.picks"): 1,
    Place("rollout", "sent", "method/noise.py KeyedDraws.picks"): 1,
}


def of(micro_batches: int, embeddings: int) -> dict[Place, int]:
    """With so many micro-batches in the one step, and tensors of a prompt's embeddings."""
    return {
        Place("rollout", "sent", "models/prompt_cache.py PromptCache.get"): 2 * embeddings,  # and the empty one's
        # index and states: of the permuted terms (their numbers, too), of the step's, of each micro-batch's
        Place("between", "sent", "method/experience.py Experience.select"): 1 + 2 * (2 + micro_batches),
    }


EXPECTED = {
    "toy": EVERY | SDXL_SIZES | PICKS | of(2, embeddings=2),
    "toy:merged": EVERY | SDXL_SIZES | PICKS | of(2, embeddings=2),
    "sd15": EVERY | PICKS | of(2, embeddings=1),
    "sdxl": EVERY | SDXL_SIZES | of(4, embeddings=2),
}
PLANTED = {
    Place("rollout", "wait", "method/rollout.py advance"): 2,  # its 2 unbranched steps
    Place("rollout", "wait", "method/rollout.py Rollout.predict"): 2,
    Place("backward", "on the host", "training/learner.py Learner.backward"): 2,  # micro-batches
    Place("backward", "mixed", "method/experience.py States.select"): 6,  # x_t, rows and prompts of each
}


@pytest.fixture(scope="module")
def crossed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    """Case -> events."""
    if torch.version.cuda is not None:
        pytest.skip("PyTorch is built with CUDA, and has a guard of its own")
    if (compiler := shutil.which(os.environ.get("CXX", "c++"))) is None:
        pytest.skip("no C++ compiler (CXX, or c++ in PATH)")
    guard, include, lib = tmp_path_factory.mktemp("fake_cuda") / "guard.so", TORCH / "include", TORCH / "lib"
    flags = ["-std=c++20", "-shared", "-fPIC", "-w", f"-I{include}", f"-I{include}/torch/csrc/api/include"]
    link = ["-o", guard, f"-L{lib}", "-lc10", "-ltorch_cpu", f"-Wl,-rpath,{lib}"]
    built = subprocess.run([compiler, *flags, HERE / "guard.cpp", *link], capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stderr
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, HERE / "iteration.py", guard, *CASES]
    run = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT, env=environment)
    assert run.returncode == 0, run.stderr
    return dict(zip(CASES, map(json.loads, run.stdout.splitlines()), strict=True))


def counts(events: list[dict[str, Any]]) -> tuple[Counter[Place], dict[Place, set[str]]]:
    """Events of each place, and their lines and operators."""
    found: Counter[Place] = Counter()
    lines: dict[Place, set[str]] = {}
    for e in events:
        place = Place(e["phase"], e["kind"], f"{e['file']} {e['function'].split('.<locals>')[0]}")
        found[place] += e["count"]
        lines.setdefault(place, set()).add(f"spo_fast/{e['file']}:{e['line']} ({e['op']})")
    return found, lines


def differences(events: list[dict[str, Any]], expected: dict[Place, int]) -> list[str]:
    """What is new, more or gone, a line each."""
    assert isinstance(events, list), events  # else a traceback
    found, lines = counts(events)
    return [
        f"{place.phase}: {place.kind}, {found[place]} times instead of {expected.get(place, 0)}, at "
        f"{' '.join(sorted(lines.get(place, {place.where})))}"
        for place in sorted({*found, *expected})
        if found[place] != expected.get(place, 0)
    ]


@pytest.mark.parametrize("case", EXPECTED)
def test_an_iteration_waits_and_copies_where_it_must_and_nowhere_else(crossed: dict[str, Any], case: str) -> None:
    assert differences(crossed[case], EXPECTED[case]) == []


def test_planted_faults_are_seen(crossed: dict[str, Any]) -> None:
    """A number read in each forward of a rollout, an index from the host in each of the training."""
    found, _ = counts(crossed["toy:faulty"])
    assert {place: found[place] for place in PLANTED} == PLANTED
    told = differences(crossed["toy:faulty"], EXPECTED["toy"])
    assert len(told) == len(PLANTED)
    assert any("rollout: wait, 2 times instead of 0, at spo_fast/method/rollout.py:" in line for line in told)
    assert any("backward: mixed, 6 times instead of 0, at spo_fast/method/experience.py:" in line for line in told)
