"""What each iteration learns from: prompts of a list, drawn by their order, or labelled pairs as they are read."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from spo_fast.method import skipped_segments
from spo_fast.method.experience import Rows, judges, to_device
from spo_fast.method.noise import KeyedDraws
from spo_fast.method.renoise import PairInputs
from spo_fast.method.rollout import RolloutBatch
from spo_fast.models.prompt_cache import warn_too_long

if TYPE_CHECKING:
    from spo_fast.training.iteration import Iterates, Timer
    from spo_fast.training.setup import Parts


WINDOW = 1024  # prompts encoded ahead on a CPU: a few seconds of loading among minutes of encoding


class Inputs(NamedTuple):
    """What an iteration learns from."""

    batch: RolloutBatch | PairInputs  # of this process
    prompts: Rows  # which of the global batch it is; empty if nothing of it is kept
    total: int  # prompts of the global batch
    epoch: int


def encode_first(run: Parts) -> None:
    """What is read before the loop, and, unless a checkpoint has yet to say where that begins, the first window."""
    shown = run.validator.prompts if run.cfg.run.num_validation_images else []
    ahead, run.encoded = upcoming(run, 0) if run.resume is None or run.device.type == "cuda" else ([], 0)
    encode(run, ahead, ["", *shown])


def encode_ahead(run: Parts, iteration: int, timer: Timer) -> None:
    """The next window, if the prompts of `iteration` lie beyond the last one."""
    if run.pairs is None and iteration >= run.encoded:
        with timer("encode prompts"):
            ahead, run.encoded = upcoming(run, iteration)
            encode(run, ahead)


def upcoming(run: Parts, iteration: int) -> tuple[list[str], int]:
    """A window of prompts, of `iteration` and those after it, and the first iteration that it does not serve.

    On a GPU it is all that the run will draw: text encoders are there once, before the optimizer has state and graphs
    keep memory, and take minutes of a run of days. A CPU, where 100,000 prompts would take hours before the first
    iteration, loads them again for each WINDOW. Not in a thread beside: no core is idle, and a GPU's memory is planned
    without them.
    """
    if run.pairs is not None:  # theirs are encoded as they come
        return [], run.total
    most = math.inf if run.device.type == "cuda" else WINDOW
    found: dict[int, None] = {}
    while iteration < run.total and len(found) < min(most, len(run.prompts)):
        found |= dict.fromkeys(run.prompt_order.batch(iteration).indices)
        iteration += 1
    whole = len(found) == len(run.prompts)
    return [run.prompts[i] for i in found], run.total if whole else iteration


def encode(run: Parts, prompts: list[str], others: Sequence[str] = ()) -> None:
    """The run's prompts, and others, through the text encoders, which leave memory again; says how many are cut."""
    if not run.group.main:
        run.group.any(False)  # process 0 encodes them, the others read
    encoded = run.model.prompt_cache.ensure([*others, *prompts])
    if run.group.main:
        run.group.any(False)
    if encoded:
        print(f"encoded {encoded} prompts into {run.model.prompt_cache.directory}")
    if run.group.main:
        warn_too_long(run.model.tokenizers[0], prompts)


def inputs(run: Iterates, iteration: int) -> Inputs:
    """An iteration's. The position in labelled pairs moves on."""
    if run.pairs is not None:
        pairs, run.state.position = run.pairs.batch(iteration, run.state.position)
        return Inputs(pairs, slice(0, len(pairs)), len(pairs), run.state.position // len(run.pairs.train_rows))
    batch = run.prompt_order.batch(iteration)
    own = run.group.share(slice(0, len(batch.indices)))
    # a short last batch may leave a process nothing: it draws the first prompt, of which nothing is kept
    prompts = rollout_batch(run, batch.indices[own] or batch.indices[:1], iteration)
    skipped = skipped_segments.to_skip(run.state.window, iteration, run.cfg.sample)
    return Inputs(replace(prompts, skipped=skipped), own, len(batch.indices), batch.epoch)


def rollout_batch(run: Iterates, indices: list[int], iteration: int) -> RolloutBatch:
    """The prompts of these numbers, with the noise that `iteration` gives them."""
    prompts = [run.prompts[i] for i in indices]
    draws = KeyedDraws(run.cfg.run.seed, iteration, to_device(torch.tensor(indices), run.device))
    text, model = run.scorer.encode(prompts), run.model
    return RolloutBatch(model.cond(prompts), text, draws, model.latent_shape, model.latent_dtype, iteration=iteration)


def count_comparisons(run: Iterates, inputs: Inputs, rows: Tensor) -> dict[str, float]:
    """--branch_window auto: what of each segment was kept; rows: of all terms' first transitions. What to log."""
    sample, window = run.cfg.sample, run.state.window
    if sample.branch_window != "auto" or isinstance(inputs.batch, PairInputs):
        return {}
    skipped_segments.observe(window, rows.tolist(), sample, inputs.batch.skipped, inputs.total)
    of_children = judges(run.scorer) == "children"
    return skipped_segments.saved(window, inputs.batch.skipped, sample, inputs.total, of_children)
