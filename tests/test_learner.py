"""What the learner leaves out without changing a number, and what it says at the start."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from runs import assert_same_tensors, built, facts, run_toy

from spo_fast.method import objectives
from spo_fast.method.experience import Cond, Experience, States
from spo_fast.method.objectives import Objective
from spo_fast.training.learner import Learner

# steps so large that ratios leave a narrow clamp at once, slots of one pair: many micro-batches are dead
DEADLY = {"learning_rate": 0.05, "clip": 1e-4, "train_batch_size": 1, "max_train_steps": 3}


@pytest.mark.parametrize("optimizer", [{}, {"accumulation": "published", "gradient_accumulation_steps": 2}])
def test_dead_micro_batches_skip_their_backward_and_nothing_else(tmp_path, monkeypatch, optimizer):
    backwards = []
    scale = torch.amp.GradScaler.scale
    monkeypatch.setattr(torch.amp.GradScaler, "scale", lambda self, loss: backwards.append(1) or scale(self, loss))
    skipping = run_toy(tmp_path / "skipping", **DEADLY, **optimizer)
    taken = len(backwards)
    backwards.clear()
    monkeypatch.setattr("spo_fast.training.learner.Learner.is_dead", lambda self, stats: False)
    whole = run_toy(tmp_path / "whole", **DEADLY, **optimizer)
    dead = sum(r["dead_batches"] for r in facts(skipping))
    assert 0 < dead < len(backwards) and taken == len(backwards) - dead
    for a, b in zip(facts(skipping), facts(whole), strict=True):
        assert {k: v for k, v in a.items() if k != "dead_batches"} == {
            k: v for k, v in b.items() if k != "dead_batches"
        }
    assert_same_tensors(*(run / "pytorch_lora_weights.safetensors" for run in (skipping, whole)))


def test_on_a_gpu_dead_ones_are_looked_for_once_there_were_some(tmp_path, monkeypatch):
    """The numbers are those of a look at each; backwards are left out only in steps after one with a dead batch."""
    always = run_toy(tmp_path / "always", **DEADLY)
    update, step, backward = Learner.update, Learner.step, Learner.backward
    taken, dead, steps = [], [], []  # of the step under way; of each step: whether it looked, dead ones, left out

    def as_on_a_gpu(self, *rest):
        if self.always_looks:
            self.always_looks = self.looks = False
        return update(self, *rest)

    def watched(self, e, weight):
        scale = self.scaler.scale
        self.scaler.scale = lambda loss: taken.append(1) or scale(loss)
        found = backward(self, e, weight)
        self.scaler.scale = scale
        dead.append(bool(self.is_dead(found[2])))
        return found

    def counted(self):
        steps.append((self.looks, sum(dead), len(dead) - len(taken)))
        taken.clear(), dead.clear()
        return step(self)

    monkeypatch.setattr(Learner, "update", as_on_a_gpu)
    monkeypatch.setattr(Learner, "backward", watched)
    monkeypatch.setattr(Learner, "step", counted)
    lazy = run_toy(tmp_path / "lazy", **DEADLY)
    assert facts(lazy) == facts(always)
    assert_same_tensors(*(run / "pytorch_lora_weights.safetensors" for run in (always, lazy)))
    assert {looked for looked, *_ in steps} == {True, False} and any(not looked and n for looked, n, _ in steps)
    for (looked, n, left_out), (_, before, _) in zip(steps[1:], steps, strict=False):
        assert looked is (before > 0) and left_out == (n if looked else 0)


def test_a_loss_that_is_nan_drops_its_step_though_the_clamp_hides_it(tmp_path, monkeypatch):
    """The gradient of a clamp at NaN is 0: only the loss tells. The third iteration's first micro-batch, of several."""
    calls, whole = [], objectives.predict_states

    def broken(*args):
        calls.append(1)
        m = whole(*args)
        return m._replace(cond=m.cond * float("nan")) if len(calls) == 5 else m

    monkeypatch.setattr("spo_fast.training.learner.predict_states", broken)
    run = run_toy(tmp_path / "run", train_batch_size=2, max_train_steps=3, checkpointing_steps=1)
    records = facts(run)
    assert len(calls) == 6 and [r["nonfinite_steps"] for r in records] == [0, 0, 1]
    assert [r["optimizer_steps"] for r in records] == [2, 4, 5]


def test_the_ratio_starts_at_one_in_equal_batches(tmp_path, capsys):
    run_toy(tmp_path / "run", max_train_steps=2, train_batch_size=1)
    (said,) = [line for line in capsys.readouterr().out.splitlines() if "probability ratio of policy" in line]
    # a CPU's products can differ in the last bit with where a tensor lies: 1.3e-7 was seen on an EPYC
    off = [float(part.split(" at ")[0]) for part in said.partition("by timestep: ")[2].split(", ") if part]
    assert said.endswith("at the start: exactly 1") or (off and max(off) < 1e-6)
    run_toy(tmp_path / "run", resume_from_checkpoint="latest", max_train_steps=3, train_batch_size=1)
    assert "probability ratio" not in capsys.readouterr().out  # it is no start


def test_a_path_that_differs_is_said_by_timestep(tmp_path, capsys, monkeypatch):
    """A reference that is off by a constant: r = exp(log_ratio) is worked out here from the Gaussians."""
    seen = {}

    prepare = Objective.prepare

    def shifted(self, policy, table, experience, cfg, *rest):
        e = prepare(self, policy, table, experience, cfg, *rest)
        seen["e"], seen["table"] = e, table
        frozen = e.frozen._replace(cond=e.frozen.cond + 0.01, uncond=e.frozen.uncond + 0.01)
        return type(e)(**{**e.__dict__, "frozen": frozen})

    monkeypatch.setattr(Objective, "prepare", shifted)
    run_toy(tmp_path / "run", max_train_steps=1)
    (line,) = [w for w in capsys.readouterr().out.splitlines() if "probability ratio" in w]
    e, table = seen["e"], seen["table"]
    said = dict(reversed(part.split(" at ")) for part in line.split("by timestep: ")[1].split(", "))
    assert set(map(int, said)) <= set(table.timesteps[e.states.rows].tolist())  # those of the first step
    a, b, _, _, std = (table.coefficients[e.states.rows, i].view(-1, 1, 1, 1) for i in range(5))
    m = e.frozen.uncond + 2.0 * (e.frozen.cond - e.frozen.uncond)
    largest = {}
    for n, sides in enumerate(e.index[..., 0].tolist()):
        t = int(table.timesteps[e.states.rows[sides[0]]])
        for k, u in enumerate(sides):
            x_prev, mean = e.x_prev[n, k, 0].double(), (a * e.states.x_t + b * m)[u].double()
            off = mean + b[u] * 0.01
            log_ratio = (((x_prev - off) ** 2 - (x_prev - mean) ** 2) / (2 * std[u] ** 2)).mean()
            largest.setdefault(t, {}).setdefault(n, []).append(abs(float(torch.expm1(log_ratio))))
    for t, text in said.items():
        assert any(float(text) == pytest.approx(max(pair), rel=0.06) for pair in largest[int(t)].values())


def test_the_largest_distance_of_all_micro_batches_is_said(tmp_path, capsys, monkeypatch):
    """Of each timestep; told one micro-batch after the other."""
    found = iter([{751: 0.25, 1: 0.0}, {751: 0.125, 1: 0.5}])
    monkeypatch.setattr("spo_fast.training.learner.ratio_deviations", lambda *_: next(found, {}))
    run_toy(tmp_path / "run", max_train_steps=1, train_batch_size=4, states_per_forward=2)
    (line,) = [w for w in capsys.readouterr().out.splitlines() if "probability ratio" in w]
    assert next(found, None) is None and line.endswith("2.5e-01 at 751, 5.0e-01 at 1")


def test_a_nan_loss_that_waits_for_its_step_is_in_the_checkpoint(tmp_path):
    """The clamp leaves its gradients finite: one of them tells a resumed run."""
    learner = built(tmp_path / "run").learner
    for p in learner.parameters:
        p.grad = torch.ones_like(p)
    learner.nonfinite = 0 * torch.tensor(1.0)
    learner.keep_gradients()
    assert all(p.grad.eq(1).all() for p in learner.parameters)
    learner.nonfinite = 0 * torch.tensor(float("nan"))
    learner.keep_gradients()
    assert learner.parameters[0].grad.isnan().all()


def test_what_was_read_of_an_index_is_no_other_indexs():
    """A method from outside may put in an index of its own: its terms are cut by that one."""
    x_t = torch.arange(6.0).view(6, 1, 1, 1)
    numbers = torch.arange(6)
    states, cond = States(x_t, numbers, numbers), Cond({"e": x_t}, {"e": x_t[:1]})
    e = Experience(states, x_t.view(3, 2, 1, 1, 1, 1), numbers.view(3, 2, 1), cond, torch.empty(0)).select(slice(0, 3))
    turned = dataclasses.replace(e, index=e.index.flip(0, 1))
    for given, want in ((e, [4.0, 5.0]), (turned, [1.0, 0.0])):
        for terms in (slice(2, 3), torch.tensor([2]), torch.tensor([False, False, True])):
            some = given.select(terms)
            assert some.states.x_t[some.index.flatten()].flatten().tolist() == want
