"""The engine against the plain path on recorded rollouts: losses, log-ratios, gradients; and one loss curve for all."""

from __future__ import annotations

import dataclasses
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import recorded
import torch
from runs import built
from torch import Tensor
from torch.utils import _pytree as pytree

from spo_fast.method.experience import Experience, States
from spo_fast.method.objectives import log_ratios, predict_states
from spo_fast.training import batches, loop

# 4 candidates of 3 prompts, both sides of a pair sharing x_t
SETTINGS: dict[str, Any] = {
    "num_steps": 4,
    "branch_start": 1,
    "num_candidates": 4,
    "sample_batch_size": 3,
    "resolution": 16,
    "train_batch_size": 2,
    "states_per_forward": 2,
    "decode_chunk": 4,
    "learning_rate": 5e-3,
}
PASSES = 3
TOLERANCE = 1e-4  # relative: float32 sums in another order, after a dozen steps that build on each other


def rolled_out(run: loop.Run, iteration: int = 0) -> Experience:
    with torch.no_grad():
        batch = batches.rollout_batch(run, [0, 1, 2], iteration)
        return run.objective.collect(dataclasses.replace(run.sampler, decode_chunk=4), batch)


def curve(run: loop.Run, experience: Experience, monkeypatch: pytest.MonkeyPatch) -> list[float]:
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
        whole = loop.Run.compile
        monkeypatch.setattr(loop.Run, "compile", lambda run: whole(run, backend="aot_eager"))
    run = built(tmp_path / "run", **SETTINGS, **more)
    if shortcut == "undone":  # a micro-batch of two states holds one term then
        run.cfg = run.learner.cfg = run.cfg.with_fields(states_per_forward=4)
        experience = undone(experience)
        assert len(experience.states) == 18
    elif shortcut == "graphs":
        run.record_graphs(recorded.capture)
        run.policy.graphs.waits = False  # as after a run's first iteration
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


# ------------------------------------------------------------------------------------------------ one pass, exactly


def trained(run: loop.Run) -> loop.Run:
    """With a LoRA that does something: as it starts, half of the gradients are zero."""
    generator = torch.Generator().manual_seed(3)
    state = run.policy.state_dict()
    for name, value in state.items():
        if "lora_B" in name:  # values of every type
            drawn = 0.02 * torch.randn(value.shape, generator=generator)
            state[name] = drawn.to(torch.bfloat16).to(value.dtype)
    run.policy.load_state_dict(state)
    return run


def computed(run: loop.Run, experience: Experience) -> tuple[list[Tensor], list[Tensor]]:
    """(loss, log-ratios), gradients of the trained weights; no gradients without a term."""
    objective, cfg = run.objective, run.cfg.sample
    prepared = objective.prepare(run.policy, run.table, experience, cfg, run.cfg.optim.states_at_once)
    found: list[Tensor] = []
    for e in prepared.micro_batches(run.cfg.optim.states_at_once):
        m = predict_states(run.policy, run.table, e, e.states, objective.guided(cfg))
        loss, _ = objective.loss(m, run.table, e, cfg, 1 / len(experience))
        loss.backward()
        found += [loss.detach(), log_ratios(m, run.table, e, cfg).detach()]
    return found, [p.grad for p in run.policy.masters if p.grad is not None]


def distance(ours: list[Tensor], truth: list[Tensor]) -> float:
    """Largest difference over the largest true value, of the worst tensor."""
    pairs = zip(ours, truth, strict=True)
    return max(float((a.double() - b).abs().max() / b.abs().max().clamp_min(1e-12)) for a, b in pairs)


@pytest.mark.parametrize("method", [{}, {"method": "mspo", "num_inner_steps": 1}], ids=["spo", "mspo"])
@pytest.mark.parametrize("kept", ["all", "some", "none"])
def test_the_engine_computes_what_the_plain_path_does(method: Any, kept: str, tmp_path: Path) -> None:
    """In float64: the rollout (fused, replayed), then loss, log-ratios and the LoRA's gradients of its pairs."""
    settings = {**SETTINGS, "mixed_precision": "fp64", "num_candidates": 2, "threshold": -1, **method}
    plain = trained(built(tmp_path / "plain", **settings))
    ours = trained(built(tmp_path / "ours", **settings, fuse=True))
    ours.record_graphs(recorded.capture)
    want = rolled_out(plain)
    for iteration in (5, 6, 0):  # called, recorded, replayed
        got = rolled_out(ours, iteration)
    assert len(got) == len(want) and torch.equal(got.index, want.index)
    assert distance([got.scores, got.x_prev, got.states.x_t], [want.scores, want.x_prev, want.states.x_t]) < 1e-4
    terms = {"all": slice(None), "some": slice(1, None, 2), "none": slice(0, 0)}[kept]
    # float32 embeddings and scores let the rollouts differ a little: what follows begins with the same
    e = want.select(terms)
    (mine, gradients), (theirs, true) = computed(ours, e), computed(plain, e)
    assert len(gradients) == len(true) == (0 if kept == "none" else len(plain.policy.masters))
    if kept != "none":
        assert distance(mine, theirs) < 1e-10 and distance(gradients, true) < 1e-10


def test_16_bits_err_no_more_than_eager(tmp_path: Path) -> None:
    """Loss, log-ratios and gradients of the fused bf16 network are within twice plain bf16's distance from float64."""
    runs = {
        name: trained(built(tmp_path / name, **SETTINGS, mixed_precision=precision, fuse=fuse))
        for name, precision, fuse in (("plain", "bf16", False), ("ours", "bf16", True), ("truth", "fp64", False))
    }
    for p in runs["truth"].policy.network.parameters():
        p.data = p.data.to(torch.bfloat16).double()
    e = rolled_out(runs["plain"])
    double = lambda x: x.double() if isinstance(x, Tensor) and x.is_floating_point() else x  # noqa: E731
    states = States(e.states.x_t.double(), e.states.rows, e.states.prompts)
    exact = replace(e, states=states, x_prev=e.x_prev.double(), cond=pytree.tree_map(double, e.cond))
    truth, gradients = computed(runs["truth"], exact)
    errors = {}
    for name in ("plain", "ours"):
        found, grads = computed(runs[name], e)
        errors[name] = distance(found, truth), distance(grads, gradients)
    for mine, theirs in zip(errors["ours"], errors["plain"], strict=True):
        assert 1e-5 < mine <= 2 * theirs
