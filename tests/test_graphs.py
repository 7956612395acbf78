"""Captured calls, by a tape that keeps a CUDA graph's rules on a CPU (the same on a GPU: test_gpu.py)."""

from __future__ import annotations

import dataclasses

import pytest
import recorded
import torch
from runs import assert_same_tensors, built, facts, killed_run, run_toy

from spo_fast.method.noise import KeyedDraws
from spo_fast.models.graphs import Graphs
from spo_fast.models.trained_weights import TrainedWeights
from spo_fast.ops.transition import transition
from spo_fast.training import accelerate, batches


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
    assert len(ran) == 3 and len(graphs) == 1  # before it is recorded it runs once more
    assert all(torch.equal(now, then) for now, then in kept)  # a later replay rewrites none of them
    for odd in (({"a": torch.ones(1, 3), "b": torch.ones(3)}, 2.0), ({"a": torch.ones(2, 3), "b": torch.ones(3)}, 3.0)):
        call(*odd)  # another shape, another constant: not this graph
    assert len(ran) == 5 and len(graphs) == 1


def test_an_input_is_copied_when_it_changed(monkeypatch):
    copied, whole = [], torch._foreach_copy_
    monkeypatch.setattr(torch, "_foreach_copy_", lambda to, of: copied.append(len(of)) or whole(to, of))
    call = Graphs(recorded.capture).wrap("f", lambda x, text: x + text)
    text = torch.ones(2)
    for n in range(5):
        assert call(torch.full((2,), float(n)), text).tolist() == [n + 1.0] * 2
    assert copied == [1, 1, 1]  # after the second call, which is captured with what it was given; the text never
    text.add_(1)
    assert call(torch.zeros(2), text).tolist() == [2.0, 2.0]
    x = torch.zeros(2)
    assert [call(x, text).tolist(), call(x, text).tolist()] == [[2.0, 2.0]] * 2
    assert copied == [1, 1, 1, 2, 1]


def test_what_calls_are_given_alike_is_held_once():
    """And each sees its own when they are given others; so do two arguments that were one."""
    graphs = Graphs(recorded.capture)
    add, times = graphs.wrap("add", lambda x, text: x + text), graphs.wrap("times", lambda x, text: x * text)
    text = torch.full((2,), 3.0)
    for n in range(2):
        assert add(torch.full((2,), float(n)), text).tolist() == [n + 3.0] * 2
        assert times(torch.full((2,), float(n)), text).tolist() == [n * 3.0] * 2
    assert len(graphs) == 2 and len(graphs._inputs) == 3
    other = torch.full((2,), 5.0)
    for _ in range(2):
        assert add(torch.ones(2), other).tolist() == [6.0, 6.0] and times(torch.ones(2), text).tolist() == [3.0, 3.0]
    twice = graphs.wrap("twice", lambda a, b: a - b)
    for _ in range(2):
        assert twice(text, text).tolist() == [0.0, 0.0]
    assert twice(text, other).tolist() == [-2.0, -2.0] and twice(other, text).tolist() == [2.0, 2.0]


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


LIST = {"method": "dense", "num_candidates": 3, "num_ranked": 2, "num_sampled_steps": 2, "threshold": None}
VARIANTS = {
    "spo": {},
    "mspo": {"num_inner_steps": 1, "method": "mspo", "rows_per_forward": 4, "threshold": 0.0},
    "merged": {"rollout_weights": "merged", "max_prompts": 3},  # an epoch's last batch is short
    "fused": {"fuse": True, "num_inner_steps": 1, "method": "mspo"},
    "ddpo": {"method": "ddpo", "threshold": None, "guidance_scale": 1.0},
    "clamped": {"clip": 1e-4, "learning_rate": 0.05, "train_batch_size": 1},  # micro-batches are dead
    "masters": {
        "mixed_precision": "bf16",
        "states_per_forward": 2,
        "train_batch_size": 4,
    },  # several add up in the masters' gradients
    "published": {"accumulation": "published", "gradient_accumulation_steps": 3},  # gradients wait for an iteration
    "checkpointed": {"gradient_checkpointing": True, "fuse": True},
    "d3po": {"method": "d3po"},
    "dpok": {"method": "dpok", "threshold": None},
    "gradspo": {"method": "gradspo"},
    "dense": LIST,
    "full": {"full_finetune": True, "learning_rate": 1e-5},
}


@pytest.mark.parametrize("name", VARIANTS)
def test_iterations_of_replays_equal_plain_ones(tmp_path, monkeypatch, name):
    """Iterations whose prompts, noise, weights and number of valid pairs change: no number does, in log or file.

    The first runs as it is, the second is recorded, the third replayed.
    """
    settings = {"num_train_epochs": 3, "max_train_steps": 3, "checkpointing_steps": 2, **VARIANTS[name]}
    # no batch is filled up: sums over more rows differ in their last bits
    monkeypatch.setattr(accelerate, "state_sizes", lambda cfg, parts: ())
    plain = run_toy(tmp_path / "plain", **settings)
    runs = recorded.recording(monkeypatch)
    replayed = run_toy(tmp_path / "replayed", **settings)
    assert facts(replayed) == facts(plain) and len(facts(plain)) == 3
    assert tree(replayed) == tree(plain)
    for file in ("checkpoint-2/trained", "checkpoint-3/trained", "checkpoint-2/optimizer"):
        assert_same_tensors(plain / f"{file}.safetensors", replayed / f"{file}.safetensors")
    graphs = runs[0]
    kinds = {(key[0], key[1]) for key in graphs._captured}
    assert {("predict ", False), ("size", True)} <= kinds  # a backward, and what follows a step
    assert (("copy", True) in kinds) is (name == "masters")  # float32 weights are their own masters
    assert {name for name, _ in kinds} & {"advance", "predict_rows"}


def tree(directory):
    """The names of a checkpoint's files: gradients among them only if some wait."""
    return sorted(str(file.relative_to(directory)) for file in directory.glob("checkpoint-*/*.safetensors"))


def test_a_replayed_run_is_resumed_bit_for_bit(tmp_path, monkeypatch):
    """Killed while gradients wait for the next iteration; the new process captures anew."""
    settings = {"accumulation": "published", "gradient_accumulation_steps": 3, "checkpointing_steps": 1}
    settings |= {"num_train_epochs": 3, "max_train_steps": 6}
    recorded.recording(monkeypatch)
    whole = run_toy(tmp_path / "whole", **settings)
    cut = killed_run(tmp_path / "cut", monkeypatch, after=2, **settings)
    assert (cut / "checkpoint-2/gradients.safetensors").is_file()
    run_toy(cut, resume_from_checkpoint="latest", **settings)
    assert facts(cut) == facts(whole)
    assert_same_tensors(*(run / "pytorch_lora_weights.safetensors" for run in (whole, cut)))


# ---------------------------------------------------------------------------------------------- with a gradient


class Line:
    """y = x w, as models/graphs.py sees weights."""

    def __init__(self):
        self.w = torch.tensor([2.0, 3.0], dtype=torch.float64, requires_grad=True)

    @property
    def network_weights(self):
        return [self.w]

    def hold_gradients(self, reached=()):
        self.w.grad = torch.zeros_like(self.w) if self.w.grad is None else self.w.grad


def test_a_backward_is_replayed_into_the_gradient_that_is_there():
    """d (c w x) / d w = c x, added up over calls; the outputs' structure stays, None too."""
    line, ran = Line(), []

    def function(x, scale):
        ran.append(1)
        return {"y": scale * x * line.w, "none": None}

    call = Graphs(recorded.capture).wrap_trained("f", function, line)
    want = torch.zeros(2, dtype=torch.float64)
    for n in range(1, 5):
        x = torch.tensor([n, -n], dtype=torch.float64)
        out = call(x, 2.0)
        assert out["none"] is None and torch.equal(out["y"], 2 * x * line.w)
        (out["y"] * n).sum().backward()
        want += 2 * n * x
        assert torch.equal(line.w.grad, want)
        with torch.no_grad():
            line.w += 1  # as an optimizer does: in place
    assert len(ran) == 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_weight_that_no_backward_reaches_has_no_gradient(dtype):
    """Weight decay and momentum leave it alone then; a gradient of zeros they would not."""
    used, unused = (torch.nn.Parameter(torch.full((2,), 3.0, dtype=dtype)) for _ in range(2))
    weights = TrainedWeights([("used", used), ("unused", unused)])
    optimizer = torch.optim.AdamW(weights.masters, lr=0.5, weight_decay=0.5)
    call = Graphs(recorded.capture).wrap_trained("f", lambda x: x * used, weights)
    x = torch.ones(2, dtype=dtype)
    for _ in range(4):
        call(x).sum().backward()
        call(2 * x).sum().backward()
        assert weights.masters[0].grad.tolist() == [3.0, 3.0] and weights.masters[1].grad is None
        optimizer.step()
        weights.drop_gradients()
        weights.copy_to_network()
    assert weights.masters[1].tolist() == [3.0, 3.0] and list(optimizer.state) == weights.masters[:1]
    assert weights.masters[0].max() < 2
    weights.masters[0].grad = torch.ones(2)  # as a checkpoint's that waited
    call(x).sum().backward()
    assert weights.masters[0].grad.tolist() == [2.0, 2.0]
    weights.masters[0].grad = torch.ones(2)
    weights.drop_gradients()
    call(x).sum().backward()
    assert weights.masters[0].grad.tolist() == [1.0, 1.0]


def test_a_backward_must_follow_its_forward():
    line = Line()
    graphs = Graphs(recorded.capture)
    call, other = graphs.wrap_trained("f", lambda x: x * line.w, line), graphs.wrap("g", lambda x: x + 1)
    x = torch.ones(2, dtype=torch.float64)
    for _ in range(2):
        call(x).sum().backward()
    late = call(x)
    other(x)
    with pytest.raises(RuntimeError, match="before the next call"):
        late.sum().backward()
    twice = call(x).sum()
    twice.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="must run once"):
        twice.backward()


def test_a_wrapped_call_inside_another_is_a_part_of_it():
    graphs = Graphs(recorded.capture)
    inner = graphs.wrap("inner", lambda x: x + 1)
    outer = graphs.wrap("outer", lambda x: inner(x) * 2)
    for n in range(4):
        assert outer(torch.tensor([n])).tolist() == [2 * (n + 1)]
    assert len(graphs) == 1
    for n in range(3):  # by itself it is another call
        assert inner(torch.tensor([n])).tolist() == [n + 1]
    assert len(graphs) == 2


def test_nothing_is_captured_before_the_first_iteration_ends():
    graphs = Graphs(recorded.capture, waits=True)
    call = graphs.wrap("f", lambda x: x + 1)
    for _ in range(3):
        call(torch.ones(2))
    assert len(graphs) == 0
    graphs.waits = False
    call(torch.ones(2))
    call(torch.ones(3))  # a shape that is new runs as it is
    assert len(graphs) == 1


def test_shapes_without_end_end(monkeypatch):
    monkeypatch.setattr("spo_fast.models.graphs.MOST", 3)
    graphs = Graphs(recorded.capture)
    call = graphs.wrap("f", lambda x: x + 1)
    for n in range(1, 6):
        for _ in range(3):
            assert call(torch.ones(n)).tolist() == [2.0] * n
    assert len(graphs) == 3


def test_a_rollout_is_all_replays_but_for_branching(tmp_path):
    """From the third rollout on no UNet forward runs outside a graph: the second one is captured."""
    run = built(tmp_path / "run", num_inner_steps=1, method="mspo")
    run.record_graphs(recorded.capture)
    calls = []
    run.policy.network.register_forward_pre_hook(lambda *_: calls.append(1))
    counts = []
    for iteration in range(4):
        with torch.no_grad():
            batch = batches.rollout_batch(run, [0, 1], iteration)
            run.objective.collect(dataclasses.replace(run.sampler, decode_chunk=8), batch)
        counts.append(len(calls))
        calls.clear()
        run.policy.graphs.waits = False  # as after a run's first iteration
    assert counts[0] > 0 and counts[2:] == [0, 0]


def test_a_network_whose_masters_are_parts_has_its_gradients(tmp_path):
    """Their sums come and go, so no graph could add to them: with gradient it runs as it is, without it is replayed."""
    run = built(tmp_path / "run", full_finetune=True)
    run.record_graphs(recorded.capture)
    run.policy.graphs.waits = False
    run.policy.shards = object()
    states = torch.randn(1, *run.model.latent_shape, dtype=run.model.latent_dtype)
    cond, t = run.model.cond(run.prompts[:1]), run.table.timesteps[:1]
    for n in range(1, 4):
        m = run.policy.predict(states, t, cond, guided=True)
        (m.cond.sum() + m.uncond.sum()).backward()
        if n == 1:
            first = [p.grad.clone() for p in run.policy.network_weights]
    for p, grad in zip(run.policy.network_weights, first, strict=True):
        torch.testing.assert_close(p.grad, 3 * grad)
    assert len(run.policy.graphs) == 0
    with torch.no_grad():
        for _ in range(2):
            run.policy.predict(states, t, cond, guided=True)
    assert len(run.policy.graphs) == 1
