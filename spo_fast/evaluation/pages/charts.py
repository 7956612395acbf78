"""Curves of a run as SVG."""

from __future__ import annotations

import fnmatch
import io
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from html import escape
from typing import TYPE_CHECKING, Any

import numpy as np

from spo_fast.config.methods import Method
from spo_fast.evaluation.image_statistics import RISE
from spo_fast.evaluation.pages.run_record import RunRecord

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MAX_POINTS = 300  # of a curve; more records are drawn as means of equal parts and a band from least to greatest
MAX_EPOCH_MARKS = 12


@dataclass(frozen=True)
class Chart:
    """A chart of a report, and which fields of the log it draws."""

    title: str
    fields: tuple[str, ...]  # of the records; patterns
    about: str = ""
    level: float | None = None  # a dotted line, drawn where it is within reach of the curve
    stacked: bool = False
    group: str = "learning"  # of GROUPS


GROUPS = {"learning": "Is it learning?", "hacking": "Is it hacking the score?", "cost": "What does it cost?"}
"""Sections of a report's curves."""

CHARTS = (
    Chart("Validation score", ("validation_score",), "of the validation prompts, always from the same noise"),
    Chart(
        "Image statistics",
        ("look_*",),
        f"1: before training; above {1 + RISE:.3g} (dotted, if near): reward hacking?",
        level=1 + RISE,
        group="hacking",
    ),
    Chart("Loss", ("loss",)),
    Chart("Candidates' mean score", ("score_mean",), "of the prompts of each iteration: it varies with them"),
    Chart("Share of valid pairs", ("valid_share",), "pairs whose scores differ by more than the threshold"),
    Chart("Log-ratio of policy to reference", ("log_ratio_best", "log_ratio_worst"), "of winners and losers"),
    Chart("Accuracy", ("accuracy",), "share of pairs whose winner gained more probability than its loser"),
    Chart("Held-out accuracy", ("validation_accuracy",), "held-out pairs whose preferred image is ahead", level=0.5),
    Chart("Margin", ("margin",)),
    Chart("Probability ratio", ("ratio",), "of the policy to the one that collected"),
    Chart(
        "KL",
        ("approx_kl", "kl"),
        "approx_kl: to the policy that collected; kl: of what kl_weight weighs",
        group="hacking",
    ),
    Chart("Clamped share", ("clamped", "dead"), "transitions outside the clamp; dead: terms without gradient"),
    Chart("Gradient norm", ("grad_norm",), "before clipping"),
    Chart("Spread of a prompt's scores", ("group_std",), "their standard deviation: without it nothing is learnt"),
    Chart("Groups without spread", ("flat_groups",), "share of the prompts' candidates that score all alike"),
    Chart(
        "Diversity",
        ("diversity",),
        "difference of a prompt's pictures: towards 0 the policy has collapsed",
        group="hacking",
    ),
    Chart(
        "Size of the predictions",
        ("output_rms",),
        "root mean square of the network's output on trained states",
        group="hacking",
    ),
    Chart("Saturation", ("saturation*",), "a climb is a sign of reward hacking", group="hacking"),
    Chart("Time of an iteration, seconds", ("*_ms",), "phases stacked", stacked=True, group="cost"),
    Chart("TFLOP/s", ("tflop_per_s",), "model FLOPs, counted from the shapes", group="cost"),
)


def charts_of(method: Method, settings: Mapping[str, Any]) -> tuple[Chart, ...]:
    """CHARTS that say something of the method, with its words and its start line."""
    start = method.start_of(settings)
    of = {
        "Loss": ("" if start is None else f"of a policy that has learnt nothing: {start:.3g} (dotted, if near)", start),
        "Margin": (method.margin, None),
    }
    return tuple(
        replace(chart, about=of[chart.title][0], level=of[chart.title][1]) if chart.title in of else chart
        for chart in CHARTS
        if method.compares or chart.fields != ("valid_share",)
    )


INK = "#808080"  # stands for the page's text colour
COLOURS = ("#3b82c4", "#d9822b", "#3a9d5d", "#c2525a", "#8a6bbf", "#8f7a5c")


def binned(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, ...]:
    """(x, mean, least, greatest) of at most MAX_POINTS equal parts; NaN where a part has no finite value."""
    parts = np.array_split(np.arange(len(x)), min(MAX_POINTS, len(x)))
    rows = []
    for part in parts:
        values = y[part][np.isfinite(y[part])]
        rows.append((x[part].mean(), *((values.mean(), values.min(), values.max()) if len(values) else [math.nan] * 3)))
    return tuple(np.array(rows).T)


def draw(chart: Chart, run: RunRecord) -> str | None:
    """The chart as SVG, a group with id curve-<field> a curve; None if there is nothing to draw."""
    import matplotlib
    from cycler import cycler
    from matplotlib.figure import Figure

    names = [n for pattern in chart.fields for n in run.history.columns if fnmatch.fnmatchcase(n, pattern)]
    curves = {n: binned(*run.curve(n)) for n in names if np.isfinite(run.curve(n)[1]).any()}
    if not curves:
        return None
    style: dict[Any, Any] = {
        "svg.fonttype": "none",
        "svg.hashsalt": chart.title,
        "path.simplify": False,
        "font.size": 8.5,
        **dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), INK),
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.prop_cycle": cycler(color=COLOURS),
        "axes.formatter.useoffset": False,
        "legend.frameon": False,
        "font.family": "sans-serif",
    }
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(4.6, 2.4))
        axes = figure.add_axes((0.13, 0.12, 0.85, 0.8 if len(curves) == 1 else 0.72))  # a power of ten stands above
        intervals: list[np.ndarray] = []
        if chart.stacked:
            stack(axes, run, list(curves))
        else:
            for name, (x, mean, least, greatest) in curves.items():
                (line,) = axes.plot(
                    x,
                    mean,
                    "o-" if len(x) <= 40 else "-",
                    ms=2.5,
                    lw=1.2,
                    label=name.removeprefix("look_"),
                    gid=f"curve-{name}",
                )
                if len(run.curve(name)[0]) > MAX_POINTS:
                    axes.fill_between(x, least, greatest, color=line.get_color(), alpha=0.25, lw=0)
                elif (half := interval(run, name)).any():
                    bars = axes.errorbar(x, mean, half, fmt="none", ecolor=line.get_color(), elinewidth=0.8, alpha=0.6)
                    bars.lines[2][0].set_gid(f"error-{name}")
                    intervals += [mean - half, mean + half]
            keep_readable(axes, [band for _, *bands in curves.values() for band in bands] + intervals)
        if chart.level is not None:
            mark_level(axes, chart.level)
        axes.locator_params(axis="x", integer=True)
        for start in epoch_starts(run):
            axes.axvline(start, color=INK, lw=0.5, alpha=0.35, gid="epoch")
        if len(curves) > 1:
            axes.legend(ncols=3, fontsize=7.5, loc="lower left", bbox_to_anchor=(0, 0.98), borderaxespad=0)
        out = io.StringIO()
        nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(out, format="svg", transparent=True, metadata=nothing)
    svg = out.getvalue().replace(INK, "currentColor")
    return svg[svg.index("<svg") :].replace("<svg", f'<svg role="img" aria-label="{escape(chart.title)}"', 1)


def interval(run: RunRecord, name: str) -> np.ndarray:
    """Half of the 95 % interval of a curve's points; 0 where none was logged, as before training."""
    halves = dict(zip(*(values.tolist() for values in run.curve(f"half_{name}")), strict=True))
    return np.nan_to_num([halves.get(x, 0.0) for x in run.curve(name)[0].tolist()])


def stack(axes: Axes, run: RunRecord, names: list[str]) -> None:
    """Phases on top of each other; one that an iteration lacks took no time."""
    x = np.array(run.history.iterations, dtype=float) + 1
    values = {n: run.history.filled(n) / 1000 for n in names}
    heights = [binned(x, y)[1] for y in values.values()]
    if len(x) == 1:  # an area needs two
        x, heights = np.array([0.5, 1.5]) + x - 1, [h.repeat(2) for h in heights]
    areas = axes.stackplot(binned(x, x)[0], *heights, labels=[n.removesuffix("_ms") for n in names], alpha=0.8, lw=0)
    for name, area in zip(names, areas, strict=True):
        area.set_gid(f"curve-{name}")


def keep_readable(axes: Axes, values: list[np.ndarray]) -> None:
    """A few spikes may leave the picture rather than flatten the rest of the curve."""
    drawn = np.concatenate(values)
    drawn = drawn[np.isfinite(drawn)]
    low, high = np.percentile(drawn, (2, 98))
    if high > low and np.ptp(drawn) > 5 * (high - low):
        room, least, greatest = (high - low) / 2, drawn.min(), drawn.max()
        axes.set_ylim(max(low - room, least), min(high + room, greatest))
        text = f"from {least:.3g} to {greatest:.3g}: spikes are cut off"
        axes.text(1, 1, text, transform=axes.transAxes, ha="right", va="bottom", fontsize=7.5)


def mark_level(axes: Axes, level: float) -> None:
    """A dotted line where it is no further from the curve than the curve is high: the axis is the curve's."""
    low, high = axes.get_ylim()
    if low - (high - low) <= level <= high + (high - low):
        axes.axhline(level, color=INK, lw=0.8, ls=":", gid="level")
    else:
        axes.set_ylim(low, high)


def epoch_starts(run: RunRecord) -> list[float]:
    """Where a new epoch begins, thinned out."""
    starts = [iteration + 0.5 for iteration in run.history.epoch_starts]
    return starts[:: math.ceil(len(starts) / MAX_EPOCH_MARKS) or 1]
