"""Blocks that a prediction runs once and repeats, with gradient: they leave behind what each would itself."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spo_fast import train
from spo_fast.training.plan import fake_run
from spo_fast.training.plan.once import Once
from spo_fast.training.plan.repeated import Layout, Views


class Block(nn.Module):
    """Two outputs in one storage, one that no gradient comes from, and one that is not there."""

    def __init__(self, width: int):
        super().__init__()
        self.linear = nn.Linear(width, 2 * width, bias=False)
        self.frozen = nn.Linear(width, width, bias=False).requires_grad_(False)
        self.calls = 0

    def forward(self, x: Tensor, *, other: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor, None]:
        self.calls += 1
        a, b = self.linear(F.relu(self.frozen(x))).chunk(2, -1)
        return a, b, x.detach() * 2, None


class Chain(nn.Module):
    def __init__(self, count: int, width: int = 64):
        super().__init__()
        self.blocks = nn.ModuleList(Block(width) for _ in range(count))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            a, b, fixed, nothing = block(x, other=None)
            assert nothing is None and not fixed.requires_grad and a.requires_grad
            assert a.untyped_storage()._cdata == b.untyped_storage()._cdata
            x = a + b + fixed
        return x


def trained(repeat: bool, count: int = 4) -> tuple[Once, Chain]:
    """A forward and a backward of a chain of blocks, counted."""
    once = Once()
    with torch.device("meta"):
        chain = once.weights(Chain(count))
    for block in chain.blocks:
        block.linear.weight.requires_grad_(True)
    if repeat:
        once.repeat_blocks(chain, (Block,))
    with once.start("setting") as live:
        with live.phase("forward"):
            y = chain(once.empty(8, 64, dtype=torch.float32).requires_grad_())
        with live.phase("backward"):
            y.sum().backward()
        del y
    return once, chain


def test_a_chain_of_blocks_leaves_behind_what_each_would():
    (plain, chain), (again, repeated) = trained(False), trained(True)
    assert [block.calls for block in chain.blocks] == [1, 1, 1, 1]
    assert sum(block.calls for block in repeated.blocks) == 1
    assert again.live.flops == plain.live.flops == 4 * (3 * 2 * 8 * 64 * 128 + 2 * 2 * 8 * 64 * 64)
    assert again.live.peaks == plain.live.peaks
    # what stays: the gradients of the weights
    assert again.live.current_bytes == plain.live.current_bytes == 4 * (64 * 128 * 4)
    for a, b in zip(chain.parameters(), repeated.parameters(), strict=True):
        assert (a.grad is None) == (b.grad is None) == (not a.requires_grad)
        assert a.grad is None or a.grad.shape == b.grad.shape == a.shape


def test_inputs_of_other_shapes_run_and_a_second_backward_adds_up():
    once, chain = trained(True)
    with once.live as live:
        before = live.current_bytes
        for rows in (8, 16, 8):  # the first again in another phase, so 8 runs once more
            chain(once.empty(rows, 64, dtype=torch.float32)).sum().backward()
        assert live.current_bytes == before  # gradients there were already
    # without a gradient of the input: another call than the first
    assert sum(block.calls for block in chain.blocks) == 1 + 2 * 2


def test_no_block_is_repeated_where_a_checkpoint_computes_it_again():
    once = Once()
    with torch.device("meta"):
        chain = once.weights(Chain(3))
    once.repeat_blocks(chain, (Block,))
    with once.start("setting", checkpoints=True):
        chain(once.empty(8, 64, dtype=torch.float32)).sum().backward()
    assert [block.calls for block in chain.blocks] == [1, 1, 1]


def test_views_of_one_storage_are_made_so_again():
    base = torch.zeros(6, 8, dtype=torch.bfloat16)
    parts = [*base.split(4, 1), torch.zeros(3, requires_grad=True), base.t()[2:]]
    views = Views.of(parts)
    assert views.sizes == (96, 12) and views.places == ((0, 0), (0, 4), (1, 0), (0, 2))
    assert views.differentiable == (False, False, True, False)

    def empty(layout: Layout) -> Tensor:
        return torch.empty_strided(layout.shape, layout.stride, dtype=layout.dtype)

    made = views.made(empty)
    assert [Layout.of(x) for x in made] == [Layout.of(x) for x in parts]
    assert len({x.untyped_storage()._cdata for x in made}) == 2
    assert [x.storage_offset() for x in made] == [0, 4, 0, 2]


CASES = {
    "toy": ["--model", "toy"],
    "toy, a whole network": ["--model", "toy", "--full_finetune"],
    "toy, checkpoints": ["--model", "toy", "--gradient_checkpointing"],
    "toy, fused": ["--model", "toy", "--fuse"],
    "toy, fused, balanced": ["--model", "toy", "--fuse", "--memory", "balanced"],
    "flow": ["--model", "toy-flow"],
    "flow, fused": ["--model", "toy-flow", "--fuse"],
    "flow, fused, balanced": ["--model", "toy-flow", "--fuse", "--memory", "balanced"],
    "sd15": ["--model", "sd15"],
    "sdxl": ["--model", "sdxl", "--memory", "balanced"],
    "sd35": ["--model", "sd35"],
    "flux": ["--model", "flux"],
}


QUICK = ("toy", "toy, fused, balanced", "flow, fused")


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] * (n not in QUICK)) for n in CASES])
def test_predictions_are_those_of_blocks_that_all_run(name, monkeypatch):
    """To the byte, but for one: of FLUX's blocks whose input is another block's sum, .1 % of the backward's peak more
    than is needed."""
    device = "cpu" if "toy" in CASES[name][1] else "cuda"
    cfg = train.parse([*CASES[name], "--sample_batch_size", "2"])
    counted = []
    for repeats in (False, False, True):  # the first fills caches that outlive a prediction
        if not repeats:
            monkeypatch.setattr(Once, "_block", lambda once, block, function, like: function)
        else:
            monkeypatch.undo()
        fake_run.LATEST.clear()
        counted.append(fake_run.predict(cfg, None, device))
    fake_run.LATEST.clear()
    _, plain, repeated = counted
    assert repeated.peaks == pytest.approx(plain.peaks, rel=2e-3 if name == "flux" else 1e-12)
    assert dataclasses.replace(repeated, transient=plain.transient) == plain
