"""What a rollout hands to training. Every objective eats one shape, (N, K, S), and a UNet state is stored once.

Letters: N loss terms, K sides of a term (of a comparison the best first), S transitions of a side, U unique states, P
prompts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

Rows: TypeAlias = "slice[int, int, int]"
"""Consecutive ones, by start and stop."""
Index: TypeAlias = "Tensor | Rows"
Text: TypeAlias = "Tensor | tuple[Text, ...]"
"""Of a scorer: rows of features, or several scorers' such."""


class Prediction(NamedTuple):
    """The network's raw outputs on a batch of states."""

    cond: Tensor  # (B, C, H, W)
    uncond: Tensor | None  # (B, C, H, W); None when guidance_scale <= 1, then m = cond

    def select(self, index: Index) -> Prediction:
        """Of some of the states, in the index's order."""
        return Prediction(self.cond[index], None if self.uncond is None else self.uncond[index])

    @staticmethod
    def cat(parts: list[Prediction]) -> Prediction:
        """Of all parts' states; all or none have an uncond."""
        uncond = [part.uncond for part in parts if part.uncond is not None]
        return Prediction(torch.cat([part.cond for part in parts]), torch.cat(uncond) if uncond else None)

    def detach(self) -> Prediction:
        """The same values without their graph."""
        return Prediction(self.cond.detach(), None if self.uncond is None else self.uncond.detach())


Precomputed: TypeAlias = "tuple[object, ...]"
"""What a network has computed of its prompts: a NamedTuple that only its door knows."""


@dataclass(frozen=True)
class Cond:
    """Conditioning of P prompts. Opaque: only its model knows what the tensors mean."""

    cond: dict[str, Tensor]  # each (P, ...)
    uncond: dict[str, Tensor]  # each (1, ...), the empty prompt's
    text: Precomputed | None = None  # what a network has computed of it alone (Policy.precompute_text)

    def __len__(self) -> int:
        return next(iter(self.cond.values())).shape[0]

    def select(self, index: Tensor) -> Cond:  # (B,) int64 -> of B prompts
        """Prompts by number, repeated as the index repeats them."""
        cond = {name: value[index] for name, value in self.cond.items()}
        if self.text is None:
            return Cond(cond, self.uncond)
        P = len(self)

        def rows(v: Tensor) -> Tensor:  # guided, the empty prompt's come first
            return v[index] if len(v) == P else v[torch.cat([index, index + P])]

        return Cond(cond, self.uncond, pytree.tree_map_only(Tensor, rows, self.text))


pytree.register_pytree_node(Cond, lambda c: ([c.cond, c.uncond, c.text], None), lambda parts, _: Cond(*parts))


@dataclass(frozen=True)
class States:
    """Where the network is evaluated."""

    x_t: Tensor  # (U, C, H, W) float32 or float64
    rows: Tensor  # (U,) int64 rows of the StepTable
    prompts: Tensor  # (U,) int64 into the experience's Cond

    def __len__(self) -> int:
        return self.x_t.shape[0]

    def select(self, index: Index) -> States:
        """Some of the states; their prompts' numbers stay."""
        return States(self.x_t[index], self.rows[index], self.prompts[index])


@dataclass(frozen=True)
class Candidates:
    """What a scorer judges: K candidates of each of B prompts, k-major (row k B + b)."""

    x_t: Tensor | None  # (K B, C, H, W) noisy latents; None at the very end
    x0: Tensor  # (K B, C, H, W) clean estimates, or the final latents; of children before the UNet, x_t again
    t: Tensor  # () int64 timestep they are judged at; of children their parent's or own; 0 for the final latents
    text: Text  # scorer.encode(prompts), rows repeated k-major
    num_candidates: int
    decode: Callable[[Tensor], Tensor]  # latents (N, C, H, W) -> pixels (N, 3, 8H, 8W) in about [-1, 1]
    decode_chunk: int = 8
    at: int | None = None  # t on the host, for a scorer that asks when (Rollout.when)

    def pixel_chunks(self) -> Iterator[tuple[Rows, Tensor]]:
        """Decodes a few images at a time, and only if asked: a latent scorer never pays for the VAE."""
        for start in range(0, self.x0.shape[0], self.decode_chunk):
            chunk = slice(start, min(start + self.decode_chunk, self.x0.shape[0]))
            yield chunk, self.decode(self.x0[chunk])


@dataclass(frozen=True)
class Experience:
    """N loss terms over U states. `states` holds each (x_t, row, prompt) once; `index` says which a transition used."""

    states: States
    x_prev: Tensor  # (N, K, S, C, H, W) recorded children; of re-noised images what the network should have said,
    # or the clean latents
    index: Tensor  # (N, K, S) int64 into states
    cond: Cond
    scores: Tensor  # every score of the rollout, for the log; empty without a rollout
    frozen: Prediction | None = None  # of the reference (or old policy) on the states
    second_reference: Prediction | None = (
        None  # of a second frozen network: the moving average, or the reference beside the old
    )
    advantage: Tensor | None = None  # (N,) of policy gradients, or (N, K) of each side
    order: Tensor | None = None  # (N,) int64: a rollout's terms come by it, then by prompt (training/processes.py)
    read: tuple[Tensor, Tensor] | None = None  # an index, and its numbers on the host; of another index it says nothing

    def __len__(self) -> int:
        return self.x_prev.shape[0]

    @property
    def host_index(self) -> Tensor:
        """The index, on the host, where work is cut by it. Waits for the device if it has not been read."""
        return self.index.cpu() if self.read is None or self.read[0] is not self.index else self.read[1]

    def select(self, terms: Index) -> Experience:
        """Some of the terms, with only the states they use. The order of terms is kept; indices are renumbered.

        Waits for the device only if the index has not been read, or the terms are there.
        """
        if isinstance(terms, Tensor):
            terms = terms.cpu()
        used, renumbered = torch.unique(self.host_index[terms], return_inverse=True)
        device = self.x_prev.device
        index, states = to_device(renumbered, device), to_device(used, device)
        if isinstance(terms, Tensor):
            terms = to_device(terms, device)
        return replace(
            self,
            states=self.states.select(states),
            x_prev=self.x_prev[terms],
            index=index,
            frozen=None if self.frozen is None else self.frozen.select(states),
            second_reference=None if self.second_reference is None else self.second_reference.select(states),
            advantage=None if self.advantage is None else self.advantage[terms],
            order=None if self.order is None else self.order[terms],
            read=(index, renumbered),
        )

    def micro_batches(self, max_states: int | None) -> Iterator[Experience]:
        """Consecutive terms packed into batches of at most `max_states` unique states; a term is never split."""
        whole = max_states is None and len(self)
        yield from ([self] if whole else map(self.select, batches(self.host_index, max_states)))


def to_device(x: Tensor, device: torch.device) -> Tensor:
    """A copy of what is on the host, without waiting for the device."""
    return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else x.to(device)


def batches(index: Tensor, max_states: int | None) -> Iterator[Rows]:  # index (N, K, S) on the host
    """The terms of each micro-batch."""
    if max_states is None or len(index) == 0:
        yield from [slice(0, len(index))] if len(index) else []
        return
    index = index.flatten(1)
    start, seen = 0, set(index[0].tolist())
    for n in range(1, len(index)):
        grown = seen | set(index[n].tolist())
        if len(grown) > max_states:
            yield slice(start, n)
            start, grown = n, set(index[n].tolist())
        seen = grown
    yield slice(start, len(index))


EPSILON = 1e-4  # beside a deviation of scores (flow_grpo/stat_tracking.py)


def group_advantages(scores: Tensor, global_std: bool = False) -> Tensor:  # (..., K, B) -> the same
    """Distance of each score from the mean of its prompt's K, in their standard deviations (population's).

    global_std: not divided yet, since the deviation is that of everybody's scores (policy_gradients.over_global_std).
    """
    wide = scores.double()  # equal ones have no distance, and a prompt's distances sum to 0
    distance = wide - wide.mean(-2, keepdim=True)
    found = distance if global_std else distance / (wide.std(-2, correction=0, keepdim=True) + EPSILON)
    return found.to(scores.dtype)


def asks_when(scorer: object) -> bool:
    """Whether a scorer must be told the timestep on the host: its parts judge at some only."""
    return bool(getattr(scorer, "asks_when", False))


def judges(scorer: object) -> str:
    """What a scorer wants to see: "x0", clean estimates after the UNet, or "children", noisy x_{t-1} before it."""
    return getattr(scorer, "judges", "x0")


def children_told(scorer: object) -> int:
    """Steps beyond their parent's whose timestep a scorer of children is told: none, as LPO's."""
    return getattr(scorer, "children_told", 0)


def repeat_text(text: Text, num_candidates: int) -> Text:
    """What encode returned for B prompts (a tensor, or a tuple of them) -> the same with K*B rows, k-major."""
    if isinstance(text, tuple):
        return tuple(repeat_text(part, num_candidates) for part in text)
    return text.repeat(num_candidates, *[1] * (text.ndim - 1))
