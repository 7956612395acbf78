"""The batches of an iteration that keeps every pair."""

from __future__ import annotations

from dataclasses import dataclass

from spo_fast.config.training import Config
from spo_fast.method.noise import permutation
from spo_fast.method.objectives import make_objective


@dataclass(frozen=True)
class Plan:
    """How many pairs and UNet states an iteration that keeps every pair has, and its largest micro-batch."""

    all_pairs: int
    all_states: int
    pairs: int
    states: int
    slot_pairs: int  # of the slot that has it
    slot_states: int
    accumulates: bool  # an optimizer step sees several micro-batches
    straddles: bool  # gradients can outlive an iteration


def plan_of(cfg: Config) -> Plan:
    """The first iteration's terms in its order, cut as accumulation.slots and Experience.micro_batches cut them."""
    optim, B = cfg.optim, cfg.sample.sample_batch_size
    objective = make_objective(cfg.objective)
    terms = [states for states in objective.term_states(cfg.sample) for _ in range(B)]
    shuffled = [terms[n] for n in permutation(len(terms), cfg.run.seed, 0).tolist()]
    published, N = optim.accumulation == "published", len(terms)
    if published:
        slots = [shuffled[i : i + optim.train_batch_size] for i in range(0, N, optim.train_batch_size)]
    else:
        steps = max(1, round(N / (optim.train_batch_size * optim.gradient_accumulation_steps)))
        slots = [shuffled[i * N // steps : (i + 1) * N // steps] for i in range(steps)]
    batches = [(batch, slot) for slot in slots for batch in _packed(slot, cfg.optim.states_at_once)]
    batch, slot = max(batches, key=lambda both: sum(both[0]))
    straddles = published and optim.gradient_accumulation_steps > 1
    states = sum(batch)
    if objective.shape[1] > 1:  # terms whose steps were drawn may share states: then more of them fit into a batch
        states = max(states, min(cfg.optim.states_at_once, sum(slot)))
    sizes = (len(terms), sum(terms), len(batch), states, len(slot), sum(slot))
    return Plan(*sizes, accumulates=straddles or len(batches) > len(slots), straddles=straddles)


def _packed(slot: list[int], most: int) -> list[list[int]]:
    """Consecutive terms in batches of at most `most` states."""
    batches: list[list[int]] = [[]]
    for states in slot:
        if batches[-1] and sum(batches[-1]) + states > most:
            batches.append([])
        batches[-1].append(states)
    return batches
