"""What each iteration learns from: prompts of a list, drawn by their order, or labelled pairs as they are read."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from spo_fast.method import skipped_segments
from spo_fast.method.experience import Rows, judges, to_device
from spo_fast.method.noise import KeyedDraws
from spo_fast.method.renoise import PairInputs
from spo_fast.method.rollout import RolloutBatch

if TYPE_CHECKING:
    from spo_fast.training.iteration import Iterates
    from spo_fast.training.setup import Parts


class Inputs(NamedTuple):
    """What an iteration learns from."""

    batch: RolloutBatch | PairInputs  # of this process
    prompts: Rows  # which of the global batch it is; empty if nothing of it is kept
    total: int  # prompts of the global batch
    epoch: int


def encode_prompts(run: Parts) -> None:
    """All prompts through the text encoders once; they leave memory afterwards."""
    prompts = run.prompts if run.pairs is None else []  # those of pairs are encoded as they come
    if not run.group.main:
        run.group.any(False)  # process 0 encodes them, the others read
    encoded = run.model.prompt_cache.ensure([*prompts, "", *run.validator.prompts])
    if run.group.main:
        run.group.any(False)
    if encoded:
        print(f"encoded {encoded} prompts into {run.model.prompt_cache.directory}")


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
    return RolloutBatch(model.cond(prompts), text, draws, model.latent_shape, model.latent_dtype)


def count_comparisons(run: Iterates, inputs: Inputs, rows: Tensor) -> dict[str, float]:
    """--branch_window auto: what of each segment was kept; rows: of all terms' first transitions. What to log."""
    sample, window = run.cfg.sample, run.state.window
    if sample.branch_window != "auto" or isinstance(inputs.batch, PairInputs):
        return {}
    skipped_segments.observe(window, rows.tolist(), sample, inputs.batch.skipped, inputs.total)
    of_children = judges(run.scorer) == "children"
    return skipped_segments.saved(window, inputs.batch.skipped, sample, inputs.total, of_children)
