"""report.html: what a run did, in one file that loads nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import yaml

from spo_fast.config.methods import find_method
from spo_fast.data.files import write_atomically
from spo_fast.evaluation.pages.charts import GROUPS, MAX_POINTS, Chart, charts_of, draw
from spo_fast.evaluation.pages.history import History
from spo_fast.evaluation.pages.render import data_url, render
from spo_fast.evaluation.pages.run_record import RunRecord
from spo_fast.evaluation.pictures import MAX_IMAGE_BYTES, STRIP_WIDTHS, cut_rows, encoded, narrowed, sheet_prompts

MAX_GRIDS_DURING = 4
STRENGTHS_WIDTH = 800  # pixels: 16 prompts are some 2 MB at most

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
    columns: int = 1  # pictures of a strip
    pair: bool = False  # whether the first and the last are before and after
    seed: int | None = None  # of the noise; None where a block is no prompt, so that pictures' numbers are not known

    def noise(self, block: int) -> list[str]:
        """What the noise of each of a strip's pictures follows from."""
        numbers = range(block * self.columns, (block + 1) * self.columns)
        return [] if self.seed is None else [f"seed {self.seed}, no. {number}" for number in numbers]


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
    pair = [path.stem for _, path in (shown[0], shown[-1])] == ["before", "after"]
    seed = run.settings["seed"] if prompts else None
    return Samples(extent, blocks, max(1, run.settings["num_validation_images"]), pair, seed)


class Strengths(NamedTuple):
    """What the LoRA draws at several weights."""

    labels: list[str]
    blocks: list[tuple[str, str]]  # prompt, its pictures in a row as a data URL


def strengths(run: RunRecord) -> Strengths:
    """Of a finished run; no blocks if it drew none."""
    path, weights = run.run_dir / "samples" / "strengths.png", run.settings.get("strengths") or []
    if not path.is_file():
        return Strengths([], [])
    prompts = sheet_prompts(path)
    strips = [data_url(*encoded(narrowed(image, STRENGTHS_WIDTH))) for image in cut_rows(path, len(prompts))]
    return Strengths([f"{weight:g}" for weight in weights], list(zip(prompts, strips, strict=False)))


def without_folders(setting: Any) -> Any:
    """A path of this machine by its last part: a report is for others too."""
    if isinstance(setting, list):
        return [without_folders(one) for one in setting]
    return Path(setting).name if isinstance(setting, str) and Path(setting).is_absolute() else setting


# ---------------------------------------------------------------------------------------------------- the page


def page(run: RunRecord) -> str:
    """The whole report as HTML."""
    s = run.settings
    method = find_method(s["method"])
    held_out = [
        Chart(f"Held-out {m}", (f"held_out_{m}",), "not trained on, same pictures", group="hacking")
        for m in run.held_out
    ]
    drawn = [(chart, svg) for chart in (*held_out, *charts_of(method, s)) if (svg := draw(chart, run))]
    by_group = {title: [d for d in drawn if d[0].group == group] for group, title in GROUPS.items()}
    told = {name: without_folders(value) for name, value in s.items()}
    where = run.run_dir.name if run.run_dir.is_absolute() else str(run.run_dir)
    return render(
        "run_report.html",
        title=f"{method.name.upper()} on {s['model']}: {run.run_dir.resolve().name}",
        run=run,
        s=s,
        on_pairs=method.on_pairs,
        charts={title: found for title, found in by_group.items() if found},
        max_points=MAX_POINTS,
        samples=samples(run),
        strengths=strengths(run),
        where=where,
        redraw=run.redraw(where),
        changed={name: tuple(map(without_folders, values)) for name, values in run.changed().items()},
        everything=yaml.safe_dump(told, sort_keys=False, allow_unicode=True),
    )


def write_report(run_dir: str | Path, history: History | None = None) -> Path:
    """Write report.html of a run from what is in its directory, and its records as RunRecord.read takes them."""
    path = Path(run_dir) / "report.html"
    write_atomically(path, page(RunRecord.read(run_dir, history)))
    return path
