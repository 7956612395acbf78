"""One recorded rollout, trained on plainly and with each shortcut of the engine: the loss curve is the same."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import recorded
import torch
from runs import built

from spo_fast import trainer
from spo_fast.experience import Experience

# 4 candidates of 3 prompts, both sides of a pair sharing x_t
SETTINGS: dict[str, Any] = {
    **{"num_steps": 4, "branch_start": 1, "num_candidates": 4, "sample_batch_size": 3, "resolution": 16},
    **{"train_batch_size": 2, "states_per_forward": 2, "decode_chunk": 4, "learning_rate": 5e-3},
}
PASSES = 3
TOLERANCE = 1e-4  # relative: float32 sums in another order, after a dozen steps that build on each other


def rolled_out(run: trainer.Run, iteration: int = 0) -> Experience:
    with torch.no_grad():
        batch = run.rollout_batch([0, 1, 2], iteration)
        return run.objective.collect(run.policy, run.table, run.scorer, run.decode, batch, run.cfg.sample, 4)


def curve(run: trainer.Run, experience: Experience, monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The loss of every micro-batch, over several passes of optimizer steps."""
    losses: list[float] = []
    whole = type(run.objective).loss

    def noted(*args: Any) -> Any:
        found = whole(*args)
        losses.append(float(found[0].detach()))
        return found

    with monkeypatch.context() as patch:
        patch.setattr(type(run.objective), "loss", noted)
        for _ in range(PASSES):
            most = run.cfg.optim.states_at_once
            prepared = run.objective.prepare(run.policy, run.table, experience, run.cfg.sample, most)
            run.learner.update(prepared, run.state)
    return losses


def undone(experience: Experience) -> Experience:
    """Every transition with a state of its own, as without de-duplication."""
    states = experience.states.select(experience.index.flatten())
    return replace(experience, states=states, index=torch.arange(len(states)).view_as(experience.index))


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> tuple[Experience, list[float]]:
    run = built(tmp_path_factory.mktemp("plain") / "run", **SETTINGS)
    experience = rolled_out(run)
    assert len(experience) == 9 and len(experience.states) == 9
    with pytest.MonkeyPatch.context() as patch:
        return experience, curve(run, experience, patch)


@pytest.mark.parametrize(
    "shortcut", ["undone", "fuse", "graphs", pytest.param("compile", marks=pytest.mark.slow)]
)  # fmt: skip
def test_the_loss_curve_is_the_same(shortcut: str, plain: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    experience, want = plain
    more = {"fuse": {"fuse": True}, "compile": {"compile": "regional", "fuse": True}}.get(shortcut, {})
    if shortcut == "compile":
        whole = trainer.Run.compile
        monkeypatch.setattr(trainer.Run, "compile", lambda run: whole(run, backend="aot_eager"))
    run = built(tmp_path / "run", **SETTINGS, **more)
    if shortcut == "undone":  # a micro-batch of two states holds one term then
        run.cfg = run.learner.cfg = run.cfg.with_fields(states_per_forward=4)
        experience = undone(experience)
        assert len(experience.states) == 18
    elif shortcut == "graphs":
        run.record_graphs(recorded.capture)
        for iteration in (5, 6, 0):  # called, recorded, replayed
            again = rolled_out(run, iteration)
        assert len(run.policy.graphs) >= 2 and torch.equal(again.x_prev, experience.x_prev)
        experience = again
    got = curve(run, experience, monkeypatch)
    assert len(got) == PASSES * 5  # 9 terms, two a micro-batch
    assert got == pytest.approx(want, rel=TOLERANCE)
    if shortcut == "graphs":
        assert got == want
    assert want[-1] < want[0] - 0.05  # it learns
    assert got != want or shortcut == "graphs"  # another engine indeed
