"""Terms of a rollout dealt out so that every process trains on as many."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from spo_fast.method.experience import Cond, Experience, Rows, States
from spo_fast.method.noise import permutation
from spo_fast.training.processes import Group


class Rebalanced(NamedTuple):
    """A rollout after rebalancing."""

    experience: Experience  # this process's terms in the order of training
    total: int  # terms of all processes
    rows: Tensor  # (total,) of all terms: the StepTable's row of their first transition


def rebalance(
    e: Experience,  # of this process's rollout
    prompts: Rows,  # which of the global batch's prompts it rolled out; of an empty part nothing is kept
    group: Group,
    seed: int,
    iteration: int,
    cut: Callable[[int], Iterable[Rows]],  # number of terms -> those of each accumulation slot
) -> Rebalanced:
    """Permute the terms of all processes once, and deal each slot's out evenly."""
    if group.size == 1:
        return Rebalanced(e.select(permutation(len(e), seed, iteration)), len(e), _first_rows(e))
    if prompts.start == prompts.stop:
        e = e.select(slice(0, 0))
    assert e.order is not None, "an experience that is dealt out knows its order"
    prompt = e.states.prompts[e.index[:, 0, 0]] + prompts.start
    about = group.gather(torch.stack((e.order, prompt, _first_rows(e)), dim=1))
    sizes = torch.tensor([len(part) for part in about])
    source = torch.arange(group.size).repeat_interleave(sizes)  # (N,) whose a term is; of all terms, by process
    number = torch.arange(len(source)) - (sizes.cumsum(0) - sizes)[source]  # (N,) its number there
    order, prompt, rows = torch.cat(about).T
    # as one process would have them; order and prompt may leave gaps, and terms of both alike keep theirs
    whole = (order * (int(prompt.max()) + 1 if len(prompt) else 1) + prompt).argsort(stable=True)
    trained = whole[permutation(len(whole), seed, iteration)]
    source, number = source[trained], number[trained]
    owner = torch.empty_like(source)
    for slot in cut(len(trained)):
        for rank in range(group.size):
            owner[group.share(slot, rank)] = rank
    mine = source == group.rank
    parts = [e.select(number[mine & (owner == rank)]) for rank in range(group.size)]
    position = torch.cat([((owner == group.rank) & (source == rank)).nonzero()[:, 0] for rank in range(group.size)])
    received = _joined(_exchanged(parts, group), e)
    return Rebalanced(received.select(position.argsort()), len(trained), rows[trained])


def whole_scores(scores: Tensor, prompts: Rows, group: Group) -> Tensor:
    """Everybody's scores in the order of one process. scores: (J K B,), b fastest, of a rollout of `prompts`."""
    count = prompts.stop - prompts.start
    if group.size == 1 or not len(scores):
        return scores
    by_prompt = scores.view(-1, max(count, 1)).T[:count]  # an empty part's rollout was of one prompt
    return torch.cat(group.gather(by_prompt)).T.flatten().to(scores.device)


def _first_rows(e: Experience) -> Tensor:  # (N,)
    return e.states.rows[e.index[:, 0, 0]]


def _exchanged(parts: list[Experience], group: Group) -> list[list[Tensor]]:
    """Experience for each process -> what comes from each: x_t, places (U, 2: row and prompt), x_prev, index, advantage
    and of the prompts that they use each tensor of the conditioning."""
    fields: list[list[Tensor]] = []
    for e in parts:
        used, prompts = torch.unique(e.states.prompts, return_inverse=True)
        places = torch.stack([e.states.rows, prompts], dim=1)
        advantage = e.x_prev.new_zeros(len(e)) if e.advantage is None else e.advantage
        fields.append([e.states.x_t, places, e.x_prev, e.index, advantage, *e.cond.select(used).cond.values()])
    received = [group.exchange(list(same)) for same in zip(*fields, strict=True)]
    return [list(part) for part in zip(*received, strict=True)]


def _joined(parts: list[list[Tensor]], like: Experience) -> Experience:
    """One experience of several processes' terms; what numbers states and prompts is shifted."""
    states, prompts, shifted = 0, 0, []
    for x_t, places, x_prev, index, advantage, *cond in parts:
        place = places + places.new_tensor([0, prompts])
        shifted.append([x_t, place, x_prev, index + states, advantage, *cond])
        states, prompts = states + len(x_t), prompts + len(cond[0])
    x_t, places, x_prev, index, advantage, *cond = (torch.cat(same) for same in zip(*shifted, strict=True))
    return replace(
        like,
        states=States(x_t, *places.T),
        x_prev=x_prev,
        index=index,
        cond=Cond(dict(zip(like.cond.cond, cond, strict=True)), like.cond.uncond),
        advantage=None if like.advantage is None else advantage,
        order=None,
    )
