"""Several processes compute what one does with the same global batch: terms dealt out, weights, log, files."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from runs import ROOT, facts, flags, run_toy
from safetensors.torch import load_file
from test_objectives import randn

from spo_fast.config.errors import RunError
from spo_fast.config.training import OptimConfig
from spo_fast.method.experience import Cond, Experience, States
from spo_fast.models import sharded
from spo_fast.models.diffusion import DTYPES
from spo_fast.models.trained_weights import TrainedWeights
from spo_fast.training.accumulation import slots
from spo_fast.training.optimizer import flatten_optimizer
from spo_fast.training.processes import Group
from spo_fast.training.rebalance import rebalance, whole_scores


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def launch(size: int, lines: list[list[str]], timeout: float = 900, **environment: str) -> list[tuple[int, str, str]]:
    """Runs of `size` gloo processes, one after the other; (status, stdout, stderr) of each process."""
    told = json.dumps([[free_port(), line] for line in lines])
    processes = [
        subprocess.Popen(
            [sys.executable, "tests/ranks.py", told],
            cwd=ROOT,
            env={
                **os.environ,
                "OMP_NUM_THREADS": "1",
                "RANK": str(r),
                "WORLD_SIZE": str(size),
                "PYTHONPATH": str(ROOT),
                # diffusers 0.36 on a CPU, when one of its models is imported
                "PYTHONWARNINGS": "ignore::UserWarning:diffusers.models.transformers.transformer_kandinsky",
                **environment,
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for r in range(size)
    ]
    outputs = [p.communicate(timeout=timeout) for p in processes]
    return [(p.returncode, *output) for p, output in zip(processes, outputs, strict=True)]


# 5 prompts in batches of 4: the second batch leaves all processes but one without a prompt; some pairs are rejected
WORK: dict[str, Any] = {
    "mixed_precision": "fp64",
    "branch_start": 1,
    "threshold": 0.02,
    "max_prompts": 5,
    "num_train_epochs": 1,
    "optimizer": "adamw",
}
METHODS: dict[str, dict[str, Any]] = {
    "spo": {},
    "mspo": {"method": "mspo", "num_inner_steps": 1},
    "ddpo": {"method": "ddpo", "clip": "none", "threshold": None},
}


def split(size: int, **settings: Any) -> dict[str, Any]:
    return {**WORK, "sample_batch_size": 4 // size, "train_batch_size": 4 // size, **settings}


def assert_same_weights(a: Path, b: Path, tolerance: float = 1e-10) -> None:
    ours, theirs = (load_file(run / "checkpoint-2" / "trained.safetensors") for run in (a, b))
    assert ours.keys() == theirs.keys()
    moved = 0.0
    for name, value in ours.items():
        assert value.dtype == torch.float64
        assert (value - theirs[name]).abs().max() <= tolerance, name
        moved = max(moved, float(value.abs().max())) if "lora_B" in name else moved
    assert moved > 1e-4  # B starts at 0


def assert_same_log(a: Path, b: Path) -> None:
    # of other micro-batches; signs of ratios that all start at 1
    skipped = {"dead_batches", "device", "states", "accuracy"}
    for ours, theirs in zip(facts(a), facts(b), strict=True):
        assert ours.keys() == theirs.keys()
        assert ours["device"] == theirs["device"]
        assert ours["states"] <= theirs["states"]  # terms that share a state may be dealt to several
        for name in ours.keys() - skipped:
            assert ours[name] == pytest.approx(theirs[name], rel=1e-4, abs=1e-6), name  # the scorer is float32
        skipped.discard("accuracy")


def compare(tmp_path: Path, size: int, methods: dict[str, dict[str, Any]]) -> None:
    """The scorer is in float64 too: its float32 sums depend on how many pictures share a batch."""
    with mock.patch.dict(DTYPES, {"no": torch.float64}):
        for name, settings in methods.items():
            run_toy(tmp_path / f"{name}-1", **split(1, **settings))
    lines = [flags(tmp_path / f"{name}-{size}", **split(size, **settings)) for name, settings in methods.items()]
    for status, _, errors in launch(size, lines, FLOAT64_SCORER="1"):
        assert status == 0, errors
    for name in methods:
        one, several = tmp_path / f"{name}-1", tmp_path / f"{name}-{size}"
        assert_same_weights(one, several)
        assert_same_log(one, several)
        assert (several / "report.html").is_file() and (several / "pytorch_lora_weights.safetensors").is_file()
    if "spo" in methods:
        assert any(0 < r["valid_share"] < 1 for r in facts(tmp_path / "spo-1"))


def test_two_processes_are_one(tmp_path: Path) -> None:
    """Where candidates of a step are compared, and whole trajectories; four processes do the others, too."""
    compare(tmp_path, 2, {name: METHODS[name] for name in ("spo", "ddpo")})


@pytest.mark.slow
def test_four_processes_are_one(tmp_path: Path) -> None:
    gradients_that_wait = {"recipe": "published", "gradient_accumulation_steps": 2}
    compare(tmp_path, 4, {**METHODS, "published": gradients_that_wait, "dense": {"method": "dense", "threshold": None}})


def test_two_processes_with_a_wrong_batch_would_differ(tmp_path: Path) -> None:
    """The comparison can fail."""
    a = run_toy(tmp_path / "a", **split(1))
    b = run_toy(tmp_path / "b", **split(1, train_batch_size=2))
    with pytest.raises(AssertionError):
        assert_same_weights(a, b)


@pytest.mark.slow
def test_another_number_of_processes_goes_on(tmp_path: Path) -> None:
    """Stopped after the first iteration on two, with gradients that wait; one process ends as if it had begun."""
    waits = {"recipe": "published", "gradient_accumulation_steps": 2, "checkpointing_steps": 1}
    whole = run_toy(tmp_path / "whole", **split(1, **waits))
    out = tmp_path / "out"
    for status, _, errors in launch(2, [flags(out, **split(2, **waits), max_train_steps=1)]):
        assert status == 0, errors
    run_toy(out, **split(1, **waits), resume_from_checkpoint="latest")
    assert_same_weights(whole, out)


@pytest.mark.slow
def test_a_process_that_dies_ends_the_others_with_a_message(tmp_path: Path) -> None:
    told = json.dumps([[free_port(), flags(tmp_path / "run", **split(2, num_train_epochs=500))]])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "WORLD_SIZE": "2", "PYTHONPATH": str(ROOT)}
    ranks = [
        subprocess.Popen(
            [sys.executable, "tests/ranks.py", told],
            cwd=ROOT,
            env={**environment, "RANK": str(r)},
            stderr=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            text=True,
        )
        for r in range(2)
    ]
    metrics = tmp_path / "run" / "metrics.jsonl"
    while not (metrics.is_file() and metrics.read_bytes().count(b"\n") >= 2):
        assert ranks[0].poll() is None and ranks[1].poll() is None
    ranks[1].kill()
    _, errors = ranks[0].communicate(timeout=60)
    assert ranks[0].returncode == 1 and "another process of this run has ended" in errors and errors.count("\n") == 1


@pytest.mark.slow  # for what it sleeps
def test_no_process_times_out_while_process_0_works_alone(tmp_path: Path) -> None:
    lines = [
        flags(tmp_path / name, **split(2, max_train_steps=1, **more)) for name, more in (("lora", {}), ("full", FULL))
    ]
    for status, _, errors in launch(2, lines, PATIENCE_S="15"):
        assert status == 0, errors


# ------------------------------------------------------------------------------------------------- sharded masters

# a clip that acts: the norm is of all parts
FULL: dict[str, Any] = {"full_finetune": True, "learning_rate": 1e-4, "max_grad_norm": 0.1}
STRADDLES: dict[str, Any] = {"recipe": "published", "gradient_accumulation_steps": 2, "checkpointing_steps": 1}
AVERAGES: dict[str, Any] = {"method": "gradspo", "threshold": 0.02, "checkpointing_steps": 1}


def assert_same_unet(a: Path, b: Path, tolerance: float = 1e-10) -> None:
    """As diffusers loads them, but in the files' own float64; both away from where training started."""
    from diffusers import UNet2DConditionModel

    ours, theirs, base = (
        UNet2DConditionModel.from_pretrained(str(d), torch_dtype=torch.float64).state_dict()
        for d in (a / "unet", b / "unet", ROOT / "spo_fast" / "toy" / "weights" / "unet")
    )
    assert ours.keys() == base.keys()
    assert max((ours[n] - theirs[n]).abs().max() for n in ours) <= tolerance
    assert all((ours[n] - base[n]).abs().max() > 1e-6 for n in ours)


def test_a_sharded_full_finetune_is_that_of_one_process(tmp_path: Path) -> None:
    """Also from one process's checkpoint to two processes' and back, with gradients that wait and moving averages."""
    first = {"max_train_steps": 1}
    one = {
        name: run_toy(tmp_path / f"{name}-1", **split(1, **FULL, **more))
        for name, more in {"spo": {}, "straddles": STRADDLES, "averages": AVERAGES}.items()
    }
    up, down = tmp_path / "up", tmp_path / "down"
    run_toy(up, **split(1, **FULL, **STRADDLES, **first))
    lines = [
        flags(tmp_path / "spo-2", **split(2, **FULL)),
        flags(up, **split(2, **FULL, **STRADDLES), resume_from_checkpoint="latest"),
        flags(down, **split(2, **FULL, **AVERAGES, **first)),
    ]
    for status, _, errors in launch(2, lines):
        assert status == 0 and errors == "", errors
    run_toy(down, **split(1, **FULL, **AVERAGES), resume_from_checkpoint="latest")
    for a, b in ((tmp_path / "spo-2", one["spo"]), (up, one["straddles"]), (down, one["averages"])):
        assert_same_unet(a, b)
        assert_same_log(b, a)
    assert max(r["grad_norm"] for r in facts(one["spo"])) > 0.1
    assert any((up / "checkpoint-1").glob("gradients.safetensors")) and (up / "checkpoint-2" / "shards").is_dir()
    saved = down / "checkpoint-1"
    parts = [{n: v.numel() for n, v in load_file(f).items() if n[:7] == "trained"} for f in saved.glob("shards/*")]
    whole = load_file(saved / "unet" / "diffusion_pytorch_model.safetensors")
    assert len(parts) == 2 and max(sum(p.values()) for p in parts) < 0.52 * sum(v.numel() for v in whole.values())
    assert {p.suffix for p in saved.rglob("*") if p.is_file()} <= {".safetensors", ".json", ""}  # no pickle


@pytest.fixture
def group_of_one(tmp_path: Path) -> Iterator[None]:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_sharded_weights_do_what_whole_ones_do(
    group_of_one: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    """Bit for bit: steps, a hand-in between them, a step that is dropped, averages, what is saved and exported."""
    monkeypatch.setattr(sharded, "BUCKET", 32)

    def trained(shard: bool) -> tuple[TrainedWeights, torch.nn.Module, torch.optim.Optimizer]:
        torch.manual_seed(0)
        net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.GELU(), torch.nn.Linear(8, 3)).to(dtype)
        weights = TrainedWeights(list(net.named_parameters()))
        if shard:
            weights.shard()
        weights.keep_averages(0.9)
        optimizer = torch.optim.AdamW(weights.masters, lr=1e-2)
        for step in range(4):
            for batch in range(2):
                net(randn(2, 4, seed=3 * step + batch).to(dtype)).square().sum().backward()
                if shard and (step, batch) == (1, 0):
                    weights.reduce_gradients()
            if shard:
                weights.reduce_gradients()
            if step != 2:
                optimizer.step()
                weights.copy_to_network()
            optimizer.zero_grad()
        return weights, net, optimizer

    whole, net, _ = trained(False)
    parts, own, optimizer = trained(True)
    assert parts.shards is not None and len(parts.shards.buckets) == 3
    for a, b in zip(net.parameters(), own.parameters(), strict=True):
        assert torch.equal(a, b)
    for a, b in zip(whole.averages or (), parts.averages or (), strict=True):
        assert torch.equal(a, b)
    exported = parts.whole()
    assert all(torch.equal(value, exported[name]) for name, value in whole.state_dict().items())
    moments, _ = flatten_optimizer(optimizer.state_dict())
    kinds = {"trained": parts.state_dict(), "optimizer": moments, "averages": parts.average_state_dict()}
    parts.shards.save(tmp_path / "shards", kinds)
    for kind, tensors in kinds.items():
        for shards in (parts.shards, None):
            found = sharded.load(tmp_path / "shards", kind, shards)
            assert found.keys() == tensors.keys() and all(torch.equal(found[n], t) for n, t in tensors.items())
    assert sharded.load(tmp_path / "shards", "gradients", None) == {}
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="file"):
        parts.shards.save(tmp_path / "file" / "shards", kinds)


def test_eight_bit_state_cannot_be_sharded(tmp_path: Path) -> None:
    for status, _, errors in launch(2, [flags(tmp_path / "run", **split(2, **{**FULL, "optimizer": "adamw8bit"}))]):
        assert status == 1 and errors.count("\n") == 1 and "Use --optimizer adamw." in errors


# ------------------------------------------------------------------------------------------------- dealing terms out


class Threads:
    """Groups of `size` threads of this process, which meet in lists."""

    def __init__(self, size: int):
        self.size, self.barrier, self.box = size, threading.Barrier(size), [None] * size

    def meet(self, rank: int, value: Any) -> list[Any]:
        self.box[rank] = value
        self.barrier.wait(60)
        found = list(self.box)
        self.barrier.wait(60)
        return found

    def run(self, work: Any) -> list[Any]:
        found: list[Any] = [None] * self.size
        threads = self

        class InThread(Group):
            def gather(self, rows):
                return threads.meet(self.rank, rows)

            def exchange(self, parts):
                return [sent[self.rank] for sent in threads.meet(self.rank, parts)]

        def one(rank: int) -> None:
            try:
                found[rank] = work(InThread(rank, self.size))
            except BaseException:
                self.barrier.abort()
                raise

        started = [threading.Thread(target=one, args=(r,)) for r in range(self.size)]
        for t in started:
            t.start()
        for t in started:
            t.join()
        return found


def experience(keep: torch.Tensor, first: int, count: int) -> Experience:  # keep (G, B) bool of the global batch
    """A rollout of prompts first to first + count: every value says where it comes from."""
    group, prompt = keep[:, first : first + count].nonzero(as_tuple=True)
    label = (100.0 * group + prompt + first).double()
    x_prev = label.view(-1, 1, 1, 1, 1, 1) + torch.tensor([0.0, 0.5]).view(1, 2, 1, 1, 1, 1)
    index = torch.arange(2 * len(label)).view(-1, 2, 1)
    states = States(x_prev.flatten(0, 2) + 1000, group.repeat_interleave(2), prompt.repeat_interleave(2))
    embeds = torch.arange(first, first + max(count, 1)).to(torch.bfloat16)[:, None]
    cond = Cond({"prompt_embeds": embeds}, {"prompt_embeds": torch.zeros(1, 1)})
    return Experience(states, x_prev, index, cond, torch.zeros(0), advantage=-label, order=group)


@pytest.mark.parametrize("size", [2, 3, 4, 7])
@pytest.mark.parametrize("share", [0.0, 0.1, 0.6, 1.0])
def test_terms_are_dealt_out_evenly_and_in_one_order(size: int, share: float) -> None:
    keep = torch.rand(6, 5, generator=torch.Generator().manual_seed(size)) < share
    keep[:, 0] = False  # a process without a valid pair
    optim = OptimConfig(train_batch_size=2)

    def cut(total: int):
        return (slot.terms for slot in slots(total, optim, 0, size))

    def work(group: Group) -> Any:
        own = group.share(slice(0, 5))
        return rebalance(experience(keep, own.start, own.stop - own.start), own, group, 7, 3, cut)

    one = rebalance(experience(keep, 0, 5), slice(0, 5), Group(), 7, 3, cut)
    dealt = Threads(size).run(work)
    assert {d.total for d in dealt} == {one.total} == {int(keep.sum())}
    taken = [0] * size
    for terms in cut(one.total):
        parts = [Group(r, size).share(terms) for r in range(size)]
        lengths = [p.stop - p.start for p in parts]
        assert max(lengths) - min(lengths) <= 1 and sum(lengths) == terms.stop - terms.start
        for r, part in enumerate(parts):
            e, at = dealt[r].experience, slice(taken[r], taken[r] + lengths[r])
            assert torch.equal(e.x_prev[at], one.experience.x_prev[part])
            assert torch.equal(e.advantage[at], one.experience.advantage[part])
            taken[r] = at.stop
    for r, d in enumerate(dealt):
        e = d.experience
        assert len(e) == taken[r] and torch.equal(d.rows.sort().values, one.rows.sort().values)
        assert torch.equal(e.states.x_t[e.index.flatten()], e.x_prev.flatten(0, 2) + 1000)  # its own states
        label = e.x_prev[:, 0].flatten()[: len(e)]
        state = e.index[:, 0, 0]
        assert torch.equal(e.states.rows[state], (label // 100).long())
        embeds = e.cond.cond["prompt_embeds"]
        assert torch.equal(embeds[e.states.prompts[state], 0].long(), (label % 100).long())
        assert embeds.dtype == torch.bfloat16


def test_scores_of_all_are_in_the_order_of_one() -> None:
    scores = randn(3, 2, 5, seed=0)  # J, K, B

    def work(group: Group) -> torch.Tensor:
        own = group.share(slice(0, 5))
        seen = scores[..., own] if own.stop > own.start else scores[..., :1]  # the rollout that stands in
        return whole_scores(seen.flatten(), own, group)

    assert all(torch.equal(found, scores.flatten()) for found in Threads(7).run(work))


def test_launched_halfway_is_an_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Any) -> None:
    from spo_fast import train

    monkeypatch.setenv("WORLD_SIZE", "2")
    for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    assert train.main(flags(tmp_path / "run")) == 1
    assert "Start with torchrun or accelerate launch" in capsys.readouterr().err


def test_lost_peers_are_named() -> None:
    from spo_fast.training.processes import _peers

    with pytest.raises(RunError, match="another process of this run has ended"), _peers():
        raise RuntimeError("Connection closed by peer")
