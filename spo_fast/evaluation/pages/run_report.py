"""report.html: what a run did, in one file that loads nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
import yaml

from spo_fast.config.methods import find_method
from spo_fast.data.files import write_atomically
from spo_fast.evaluation.pages.charts import MAX_POINTS, Chart, charts_of, draw
from spo_fast.evaluation.pages.history import History
from spo_fast.evaluation.pages.render import data_url, render
from spo_fast.evaluation.pages.run_record import RunRecord
from spo_fast.evaluation.pictures import MAX_IMAGE_BYTES, STRIP_WIDTHS, cut_rows, encoded, narrowed, sheet_prompts

MAX_GRIDS_DURING = 4

# ---------------------------------------------------------------------------------------------------- samples


def grids(run: RunRecord) -> tuple[list[tuple[str, Path]], int]:
    """Labelled sample grids to show (before, some of those during, after), and how many there are."""
    samples = run.run_dir / "samples"
    scores = run.validated

    def label(text: str, done: int) -> str:
        score = scores.get(done)
        return text if score is None else f"{text}: {score:.4g}"

    steps = {int(p.stem.removeprefix("step-")): p for p in samples.glob("step-*.png") if p.stem[5:].isdigit()}
    after = [(label("after", run.iterations), samples / "after.png")] if (samples / "after.png").is_file() else []
    if after:
        steps.pop(run.iterations, None)  # the same grid
    before = [(label("before", 0), samples / "before.png")] if (samples / "before.png").is_file() else []
    order = sorted(steps)
    # evenly spread; while the run goes on, its latest is the last of them
    parts = np.array_split(order, min(MAX_GRIDS_DURING, len(order))) if order else []
    during = [(label(f"iteration {n}", n), steps[n]) for n in (int(part[-1]) for part in parts)]
    return [*before, *during, *after], len(before) + len(steps) + len(after)


class Samples(NamedTuple):
    """The grids, a block a prompt, and in it under each other what the same noise became."""

    extent: str  # how much of it is shown
    blocks: list[tuple[str, list[tuple[str, str]]]]  # prompt, (label, image as a data URL)


def samples(run: RunRecord) -> Samples:
    """Of a run, small enough for a page; no blocks if it left none."""
    shown, count = grids(run)
    if not shown:
        return Samples("", [])
    prompts = sheet_prompts(shown[-1][1])
    shown = [(label, path) for label, path in shown if sheet_prompts(path) == prompts]
    sheets = [cut_rows(path, len(prompts) or 1) for _, path in shown]
    for width in STRIP_WIDTHS:
        strips = [[encoded(narrowed(image, width)) for image in sheet] for sheet in sheets]
        if sum(len(data) for sheet in strips for _, data in sheet) <= MAX_IMAGE_BYTES:
            break
    labels = [label for label, _ in shown]
    blocks = [
        (prompt, [(label, data_url(*image)) for label, image in zip(labels, block, strict=True)])
        for prompt, *block in zip(prompts or ["all prompts"], *strips, strict=False)
    ]
    extent = f"{len(shown)} of {count} grids"
    if len(prompts) > len(blocks):
        extent += f", {len(blocks)} of {len(prompts)} prompts"
    return Samples(extent, blocks)


# ---------------------------------------------------------------------------------------------------- the page


def page(run: RunRecord) -> str:
    """The whole report as HTML."""
    s = run.settings
    method = find_method(s["method"])
    held_out = [Chart(f"Held-out {m}", (f"held_out_{m}",), "not trained on, same pictures") for m in run.held_out]
    known = charts_of(method, s)
    return render(
        "run_report.html",
        title=f"{method.name.upper()} on {s['model']}: {run.run_dir.resolve().name}",
        run=run,
        s=s,
        on_pairs=method.on_pairs,
        charts=[(c, svg) for c in (*known[:1], *held_out, *known[1:]) if (svg := draw(c, run))],
        max_points=MAX_POINTS,
        samples=samples(run),
        changed=run.changed(),
        everything=yaml.safe_dump(s, sort_keys=False, allow_unicode=True),
    )


def write_report(run_dir: str | Path, history: History | None = None) -> Path:
    """Write report.html of a run from what is in its directory, and its records as RunRecord.read takes them."""
    path = Path(run_dir) / "report.html"
    write_atomically(path, page(RunRecord.read(run_dir, history)))
    return path
