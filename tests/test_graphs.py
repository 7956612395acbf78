"""Captured calls, by a tape that keeps a CUDA graph's rules on a CPU (the same on a GPU: test_gpu.py)."""

from __future__ import annotations

import dataclasses

import pytest
import recorded
import torch
from runs import built, facts, run_toy

from spo_fast.method.noise import KeyedDraws
from spo_fast.models.graphs import Graphs
from spo_fast.ops.transition import transition
from spo_fast.training import batches, loop


def test_the_first_call_runs_the_second_is_recorded_later_ones_replay():
    ran = []

    def function(x, scale):
        ran.append(scale)
        return {"y": x["a"] * scale + x["b"], "x": x["a"]}

    graphs = Graphs(recorded.capture)
    call = graphs.wrap("f", function)
    kept = []
    for seed in range(4):
        x = {"a": torch.full((2, 3), float(seed)), "b": torch.ones(3)}
        out = call(x, 2.0)
        assert torch.equal(out["y"], x["a"] * 2 + 1) and torch.equal(out["x"], x["a"])
        kept.append((out["y"], out["y"].clone()))
    assert len(ran) == 2 and len(graphs) == 1
    assert all(torch.equal(now, then) for now, then in kept)  # a later replay rewrites none of them
    for odd in (({"a": torch.ones(1, 3), "b": torch.ones(3)}, 2.0), ({"a": torch.ones(2, 3), "b": torch.ones(3)}, 3.0)):
        call(*odd)  # another shape, another constant: not this graph
    assert len(ran) == 4 and len(graphs) == 1


def test_an_input_is_copied_when_it_changed(monkeypatch):
    copied, whole = [], torch._foreach_copy_
    monkeypatch.setattr(torch, "_foreach_copy_", lambda to, of: copied.append(len(of)) or whole(to, of))
    call = Graphs(recorded.capture).wrap("f", lambda x, text: x + text)
    text = torch.ones(2)
    for n in range(5):
        assert call(torch.full((2,), float(n)), text).tolist() == [n + 1.0] * 2
    assert copied == [2, 1, 1, 1]  # from the second call on; the text once
    text.add_(1)
    assert call(torch.zeros(2), text).tolist() == [2.0, 2.0]
    x = torch.zeros(2)
    assert [call(x, text).tolist(), call(x, text).tolist()] == [[2.0, 2.0]] * 2
    assert copied == [2, 1, 1, 1, 2, 1]


def test_what_python_decided_stays_decided():
    """The rule that calls must keep: a number that is no input is frozen into the graph."""
    state = {"n": 1.0}
    call = Graphs(recorded.capture).wrap("f", lambda x: x * state["n"])
    for _ in range(2):
        call(torch.ones(2))
    state["n"] = 5.0
    assert call(torch.ones(2)).tolist() == [1.0, 1.0]


def test_reading_the_device_cannot_be_recorded():
    call = Graphs(recorded.capture).wrap("f", lambda x: x * float(x.sum()))
    call(torch.ones(2))
    with pytest.raises(RuntimeError, match="waits for the device"):
        call(torch.ones(2))


def test_without_capture_a_function_is_itself():
    assert Graphs(None).wrap("f", len) is len


def test_a_guided_step_draws_afresh_and_sees_new_weights(tmp_path):
    """UNet with LoRA and children, for changing latents, timesteps, prompts, keys and weights."""
    run = built(tmp_path / "run", sample_batch_size=2)
    g, coefficients = run.cfg.sample.guidance_scale, run.table.coefficients

    @torch.no_grad()
    def step(x, t, rows, cond, keys):
        m = run.policy.predict(x, t, cond, guided=True)
        return transition(*m, x, rows, coefficients, g, num_children=2, keys=keys)

    graphs = Graphs(recorded.capture)
    replayed = graphs.wrap("step", lambda x, t, rows, cond, keys: step(x, t, rows, as_cond(cond), keys))
    seen = []
    for i in range(4):
        cond = run.model.cond([run.prompts[i], run.prompts[(i + 1) % 4]])
        draws = KeyedDraws(0, i, torch.tensor([i, (i + 1) % 4]))
        x = draws.latents(run.model.latent_shape, run.model.latent_dtype)
        arguments = (x, run.table.timesteps[i], torch.tensor([i, i]), cond, draws.children(i, 2, 1)["keys"])
        want = step(*arguments)
        got = replayed(*arguments[:3], (cond.cond, cond.uncond), arguments[4])
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
        seen.append(got[1])
        with torch.no_grad():
            for master in run.policy.masters:
                master.add_(0.01)
        run.policy.copy_to_network()
    assert len(graphs) == 1 and not torch.equal(seen[2], seen[3])


def as_cond(parts):
    from spo_fast.method.experience import Cond

    return Cond(*parts)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"num_inner_steps": 1, "method": "mspo", "rows_per_forward": 4, "threshold": 0.0},
        {"rollout_weights": "merged", "max_prompts": 3},  # an epoch's last batch is short
        {"fuse": True, "num_inner_steps": 1, "method": "mspo"},
        {"method": "ddpo", "threshold": None, "guidance_scale": 1.0},
    ],
    ids=["spo", "mspo", "merged", "fused", "ddpo"],
)
def test_iterations_of_replays_equal_plain_ones(tmp_path, monkeypatch, settings):
    """Five iterations: prompts, noise, weights and the number of valid pairs change, no number does."""
    settings = {"num_train_epochs": 3, "max_train_steps": 5, **settings}
    plain = facts(run_toy(tmp_path / "plain", **settings))
    made = []
    record_graphs = loop.Run.record_graphs

    def recorded_graphs(self, capture):
        record_graphs(self, recorded.capture)
        made.append(self.policy.graphs)

    monkeypatch.setattr(loop.Run, "record_graphs", recorded_graphs)
    replayed = facts(run_toy(tmp_path / "replayed", **settings))
    assert replayed == plain and len(plain) == 5
    assert len(made[0]) >= 2  # of them, forward and transition among them


def test_a_rollout_is_all_replays_but_for_branching(tmp_path):
    """From the third rollout on no UNet forward runs outside a graph: the second one is captured."""
    run = built(tmp_path / "run", num_inner_steps=1, method="mspo")
    run.record_graphs(recorded.capture)
    calls = []
    run.policy.unet.register_forward_pre_hook(lambda *_: calls.append(1))
    counts = []
    for iteration in range(4):
        with torch.no_grad():
            batch = batches.rollout_batch(run, [0, 1], iteration)
            run.objective.collect(dataclasses.replace(run.sampler, decode_chunk=8), batch)
        counts.append(len(calls))
        calls.clear()
        run.policy.graphs.waits = False  # as after a run's first iteration
    assert counts[0] > 0 and counts[2:] == [0, 0]
