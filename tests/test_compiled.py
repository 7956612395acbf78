"""models/compile.py: no graph break, no recompilation after the first iteration, and the same numbers."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from runs import built
from torch._dynamo.utils import counters

from spo_fast.method.experience import Experience
from spo_fast.method.objectives import SPO
from spo_fast.training import batches, loop

TOY: dict[str, Any] = {
    "num_steps": 4,
    "branch_start": 2,
    "sample_batch_size": 4,
    "max_prompts": 16,
    "train_batch_size": 4,
    "resolution": 16,
    "states_per_forward": 5,
    "decode_chunk": 6,
    "threshold": -1,
    "fuse": True,
}


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch.compiler.set_stance("default")
    torch._dynamo.reset()


def iteration(run: loop.Run, number: int, share: float) -> dict[str, Any]:
    """Of its rollout only this share of the pairs is kept."""

    class Fewer(SPO):
        def collect(self, *args: Any) -> Experience:
            experience = super().collect(*args)
            return experience.select(slice(0, round(share * len(experience))))

    run.objective = run.learner.objective = Fewer()
    return run.iterate(number, lambda name: contextlib.nullcontext())  # type: ignore[arg-type, return-value]


@pytest.mark.slow
@pytest.mark.parametrize("how", ["regional", "full"])
def test_nothing_is_recompiled(how, tmp_path, monkeypatch):
    whole = loop.Run.compile
    monkeypatch.setattr(loop.Run, "compile", lambda run: whole(run, backend="aot_eager"))
    run = built(tmp_path / "run", **TOY, compile=how)
    batches.encode_prompts(run)
    plain = built(tmp_path / "plain", **TOY)
    plain.encode_prompts()
    seen = []
    for number, share in enumerate((1.0, 0.55, 0.3, 0.0)):
        torch.compiler.set_stance("fail_on_recompile" if number else "default")
        got, want = iteration(run, number, share), iteration(plain, number, share)
        seen.append(got["pairs"])
        assert got["pairs"] == want["pairs"]
        if got["pairs"]:
            assert float(got["loss"]) == pytest.approx(float(want["loss"]), rel=1e-5)
            assert got["grad_norm"] == pytest.approx(want["grad_norm"], rel=1e-3)
    assert len(set(seen)) == 4 and not counters["graph_break"] and counters["stats"]["unique_graphs"] >= 5
    # what the padding is for
    run.policy.batch_sizes = ()
    with pytest.raises(RuntimeError, match="recompile"):
        iteration(run, 4, 0.9)
