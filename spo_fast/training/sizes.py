"""Pictures of several sizes in a run: each iteration draws one, in turn, so that a batch is of one size.

Which one follows from the iteration's number, as its prompts and noise do: a resumed run goes on as it would have.
Prompts meet other sizes in other epochs, whose order is another. Validation draws the largest.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

from spo_fast.config.sections import FLOWS

if TYPE_CHECKING:
    from spo_fast.config.training import Config
    from spo_fast.models.diffusion import DiffusionModel
    from spo_fast.training.setup import Parts


def check_sizes(cfg: Config, model: DiffusionModel) -> None:
    """Raises ValueError for a size of --resolutions that the model cannot make."""
    own = model.height, model.width
    for size in (*cfg.data.sizes, own):
        model.take_size(*size)


@contextlib.contextmanager
def size_of(run: Parts, iteration: int) -> Iterator[dict[str, object]]:
    """Inside, the model draws this iteration's size; yields what to log of it."""
    sizes = run.cfg.data.sizes
    if len(sizes) < 2:
        yield {}
        return
    own = run.model.height, run.model.width
    height, width = sizes[iteration % len(sizes)]
    _take(run, height, width)
    try:
        yield {"resolution": f"{width}x{height}"}
    finally:
        _take(run, *own)


def _take(run: Parts, height: int, width: int) -> None:
    run.model.take_size(height, width)
    if run.cfg.model.model in FLOWS:  # some shift their sigmas by the number of tokens
        vars(run).pop("ode_table", None)
        run.table = run.learner.table = run.make_table()
