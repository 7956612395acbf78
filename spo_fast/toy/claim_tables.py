"""What the claims' records say: means over seeds, verdicts, tables and the plot."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from spo_fast.config.tables import markdown
from spo_fast.data import toy_world
from spo_fast.toy import evaluate
from spo_fast.toy.contenders import ABLATIONS, BY_NOISE, CONTENDERS, MAIN, REINFORCEMENT, REST

BUDGET = 24_000  # UNet sample-forwards of a training, a backward counted as two
PICTURES, MARK_PICTURES = 512, 128
GRID = (5e-4, 1e-3, 2e-3)  # learning rates of every method, and beyond an end that is the best those of LADDER
LADDER = (1e-5, 2e-5, 5e-5, 1e-4, 2e-4, *GRID, 5e-3, 1e-2, 2e-2)
TUNING_SEED = 100
LOOKS = {3: 8.860, 6: 3.810, 9: 3.206, 12: 2.981}
"""Numbers of seeds at which a difference is looked at, and how many standard errors it must exceed: Student's t, at
.0125 on both sides together, so that of claims about no difference at most one in twenty ever gets a verdict."""
SEEDS, MORE_SEEDS = range(min(LOOKS)), range(min(LOOKS), max(LOOKS))  # of all, and of undecided claims
OWN = "guidance 2"  # of the base's scores: the preset's, with which all are trained and scored
LAYOUT_LOSS = 0.03  # a learning rate that costs more of the layout than this is not chosen; nor a point of a curve kept
SIGMAS, LOSS = 2.0, 0.05  # what is less than two standard errors, or than this of 10 points, is no loss of aesthetics

# ---------------------------------------------------------------------------------------------------- all runs


Cell = tuple[str, int, float | None]


def key(name: str, seed: int, learning_rate: float | None = None) -> str:
    """A run's name in the records."""
    return f"{name}/{seed}" if learning_rate is None else f"{name}/tuning/{learning_rate:g}"


GROUPS = (MAIN, REINFORCEMENT, ABLATIONS, BY_NOISE, REST)


def size_in(records: Mapping[str, Any]) -> str:
    """Which toy the records are of."""
    return next((record.get("size", "small") for record in records.values()), "small")


def runs_on(size: str) -> list[str]:
    """The contenders that a toy takes."""
    return [name for name, contender in CONTENDERS.items() if contender.on(size) is not None]


def missing(records: Mapping[str, Any], names: Collection[str] = tuple(CONTENDERS), size: str = "") -> Iterator[Cell]:
    """(name, seed, learning rate to try) of runs to make by what is known now, in order of importance.

    Of each group first the rates, then the seeds; after all of them, more seeds where a claim is undecided.
    """
    names = set(names) & set(runs_on(size or size_in(records)))
    for group in GROUPS:
        here = [name for name in group if name in names]
        for name in here:
            if not CONTENDERS[name].like and (rate := next_rate(name, records)) is not None:
                yield name, TUNING_SEED, rate
        for seed, name in itertools.product(SEEDS, here):
            if key(name, seed) not in records and chosen_rate(name, records) is not None:
                yield name, seed, None
    for a, b in undecided(records):
        have = min(len(seeds_of(name, records)) for name in (a, b))
        upto = min((look for look in LOOKS if look > have), default=0)
        for seed, name in itertools.product(range(upto), (a, b)):
            if key(name, seed) not in records and name in names:
                yield name, seed, None


def rates_tried(name: str, records: Mapping[str, Any]) -> dict[float, Any]:
    """Tuning runs by learning rate, of the contender or of that whose rate it takes."""
    owner = CONTENDERS[name].like or name
    return {lr: records[what] for lr in LADDER if (what := key(owner, TUNING_SEED, lr)) in records}


def best_rate(tried: Mapping[float, Any], records: Mapping[str, Any]) -> float:
    """Of the tuning runs the best for aesthetics, layout kept."""
    floor = records["base"]["tuning"]["layout"][0] - LAYOUT_LOSS
    safe = [lr for lr, r in tried.items() if r["layout"][0] >= floor] or list(tried)
    return max(safe, key=lambda lr: tried[lr]["aesthetics"][0])


def next_rate(name: str, records: Mapping[str, Any]) -> float | None:
    """The learning rate to try next: the grid's, then what lies beside the best; None if the best lies between two."""
    tried = rates_tried(name, records)
    if rest := [lr for lr in GRID if lr not in tried]:
        return rest[0]
    at = LADDER.index(best_rate(tried, records))
    beside = LADDER[max(0, at - 1) : at + 2]
    return next((lr for lr in beside if lr not in tried), None)


def chosen_rate(name: str, records: Mapping[str, Any]) -> float | None:
    """The best learning rate on the tuning prompts; None while there are others to try."""
    owner = CONTENDERS[name].like or name
    if "base" not in records or next_rate(owner, records) is not None:
        return None
    return best_rate(rates_tried(owner, records), records)


# ---------------------------------------------------------------------------------------------------- tables


def over_seeds(values: list[float], errors: list[float]) -> tuple[float, float]:
    """Mean and its standard error: the larger of the spread between seeds and of the pictures' error.

    All seeds are scored on pictures from the same noise: more of them do not make the pictures' error smaller.
    """
    n = len(values)
    mean = sum(values) / n
    between = math.sqrt(sum((v - mean) ** 2 for v in values) / max(1, n - 1) / n)
    return mean, max(between, sum(errors) / n)


def seeds_of(name: str, records: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A contender's runs that have been made, by seed."""
    return [records[key(name, seed)] for seed in range(max(LOOKS)) if key(name, seed) in records]


def score_table(records: Mapping[str, Any]) -> str:
    """Every contender's scores over seeds, the base model's first."""
    columns = ("aesthetics", "layout", "held_out", "out_of_range", "diversity")
    rows = [["contender", "seeds", "learning rate", *columns, "UNet rows", "CPU s, scoring too"]]
    for g in evaluate.GUIDANCE_SCALES if "base" in records else ():
        scores = records["base"][f"guidance {g:g}"]
        rows.append([f"base, guidance {g:g}", "", "", *(f"{scores[c][0]:.3f} ± {scores[c][1]:.3f}" for c in columns)])
        rows[-1] += ["0", "0"]
    for name in runs_on(size_in(records)):
        runs = seeds_of(name, records)
        if not runs:
            rows.append([name, "0", "", *["not run"] * len(columns), "", ""])
            continue
        cells = [
            "{:.3f} ± {:.3f}".format(*over_seeds([r[c][0] for r in runs], [r[c][1] for r in runs])) for c in columns
        ]
        spent, cpu = (sum(r[what] for r in runs) / len(runs) for what in ("spent", "cpu_s"))
        rows.append([name, str(len(runs)), f"{runs[0]['learning_rate']:g}", *cells, f"{spent:,.0f}", f"{cpu:.0f}"])
    return markdown(rows)


def curve_of(record: Mapping[str, Any], records: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A run's points by rows spent. Those on the way are of fewer pictures: the base's gap between the two is added."""
    whole, few = records["base"][OWN], records["base"]["marks"]
    *marks, last = record["curve"]
    gap = {score: whole[score][0] - few[score][0] for score in ("aesthetics", "layout")}
    moved = [{**p, **{score: [p[score][0] + gap[score], *p[score][1:]] for score in gap}} for p in marks]
    return [*moved, last]


Point = Callable[[Mapping[str, Any]], Mapping[str, Any] | None]
"""Which scores of a run are compared: at its end, at a quarter of the budget, or the best with the layout kept."""


def at_end(record: Mapping[str, Any]) -> Mapping[str, Any]:
    """The scores that a run ended with."""
    return record


def at_a_quarter(records: Mapping[str, Any]) -> Point:
    """The first point of a run's curve."""
    return lambda record: curve_of(record, records)[0]


def layout_kept(records: Mapping[str, Any]) -> Point:
    """The best point of a run's curve that costs no more of the layout than is allowed."""
    floor = records["base"][OWN]["layout"][0] - LAYOUT_LOSS

    def best(record: Mapping[str, Any]) -> Mapping[str, Any] | None:
        safe = [point for point in curve_of(record, records) if point["layout"][0] >= floor]
        return max(safe, key=lambda point: point["aesthetics"][0], default=None)

    return best


def paired(
    a: str, b: str, records: Mapping[str, Any], score: str = "aesthetics", of_a: Point = at_end, of_b: Point = at_end
) -> list[tuple[float, float]]:
    """a - b and the error of its pictures, of each seed that both have."""
    seeds = [s for s in range(max(LOOKS)) if key(a, s) in records and key(b, s) in records]
    points = [(of_a(records[key(a, s)]), of_b(records[key(b, s)])) for s in seeds]
    return [(x[score][0] - y[score][0], math.hypot(x[score][1], y[score][1])) for x, y in points if x and y]


def difference(*run: Any, **options: Any) -> tuple[float, float] | None:
    """As paired; the mean over seeds and its standard error, None with fewer than two of them."""
    gaps = paired(*run, **options)
    return over_seeds(*map(list, zip(*gaps, strict=True))) if len(gaps) > 1 else None


def rows_to_reach(name: str, level: float, records: Mapping[str, Any]) -> tuple[float, bool] | None:
    """UNet rows after which a contender's mean curve first reaches a level of aesthetics, between its points.

    True beside them: it was there at its first point already, whose rows these are.
    """
    runs = seeds_of(name, records)
    if not runs:
        return None
    base_level = records["base"][OWN]["aesthetics"][0]
    curve = [(0.0, base_level)]
    for points in zip(*(curve_of(r, records) for r in runs), strict=False):
        curve.append(
            tuple(sum(p[w] if w == "spent" else p[w][0] for p in points) / len(points) for w in ("spent", "aesthetics"))
        )  # type: ignore[arg-type]
    if curve[1][1] >= level:
        return curve[1][0], True
    for (x0, y0), (x1, y1) in zip(curve[1:], curve[2:], strict=False):
        if y1 >= level > y0:
            return x0 + (x1 - x0) * (level - y0) / (y1 - y0), False
    return None


def rows_share(a: str, b: str, records: Mapping[str, Any], of_a: Point) -> float | None:
    """UNet rows of a at a point over those of b at its end."""
    spent = [[p["spent"] for r in seeds_of(n, records) if (p := of(r))] for n, of in ((a, of_a), (b, at_end))]
    return statistics.fmean(spent[0]) / statistics.fmean(spent[1]) if all(spent) else None


CLAIMS: dict[str, tuple[str, str] | tuple[str, str, Callable[[Mapping[str, Any]], Point]]] = {
    "SPO is above Diffusion-DPO at equal compute": ("spo", "dpo"),
    "SPO with about a quarter of the compute is above Diffusion-DPO": ("spo", "dpo", at_a_quarter),
    "SPO is above DDPO at equal compute": ("spo", "ddpo"),
    "a random next start is above the winner": ("spo", "winner start"),
    "a random next start is above the loser": ("spo", "loser start"),
    "knowing the timestep helps the judge": ("spo", "blind judge"),
    "PickScore in the judge's place hurts": ("spo", "PickScore"),
    "the highest noise levels harm": ("spo", "all noise levels"),
    "larger steps (inner steps) are better for a strong model": ("mspo", "spo"),
    "random picks do not do it": ("spo", "random picks"),
}

NO_LOSS = "and lose no aesthetics"
QUESTIONS: dict[str, tuple[str, str, str]] = {
    "step-wise GRPO is above GRPO": ("stepgrpo", "grpo", "aesthetics"),
    "step-wise GRPO is above SPO": ("stepgrpo", "spo", "aesthetics"),
    "NFT is above GRPO": ("nft", "grpo", "aesthetics"),
    "scorers by noise level raise layout (unguided)": ("by noise level", "unguided", "layout"),
    NO_LOSS: ("by noise level", "unguided", "aesthetics"),
}
"""Of reinforcement learning, written down before the runs; NFT and AWM draw and are scored without guidance."""


def verdict(gaps: Sequence[tuple[float, float]]) -> str:
    """What the differences of seeds, in their order, say about a claim: the first look that is sure decides."""
    for look, errors_off in LOOKS.items():
        if len(gaps) >= look:
            mean, error = over_seeds(*map(list, zip(*gaps[:look], strict=True)))
            if abs(mean) > errors_off * error:
                return f"{'reproduced' if mean > 0 else 'not reproduced'} ({look} seeds)"
    return "undecided" if len(gaps) >= min(LOOKS) else "not run"


def no_loss(gaps: Sequence[tuple[float, float]]) -> str:
    """Of NO_LOSS: a loss is more than two standard errors and more than LOSS."""
    if len(gaps) < min(LOOKS):
        return "not run"
    mean, error = over_seeds(*map(list, zip(*gaps, strict=True)))
    return "not reproduced" if mean < -max(SIGMAS * error, LOSS) else "reproduced"


def bounds(gaps: Sequence[tuple[float, float]]) -> tuple[float, float, float]:
    """Mean of at least three seeds' differences and its interval by the rule of the looks."""
    mean, error = over_seeds([gap for gap, _ in gaps], [e for _, e in gaps])
    off = LOOKS[max(look for look in LOOKS if look <= len(gaps))]
    return mean, mean - off * error, mean + off * error


def needed(gaps: Sequence[tuple[float, float]]) -> str:
    """Of an undecided claim: the interval of its difference now, and how many seeds would settle it four times of five,
    if the difference and its spread between seeds are those seen."""
    values = [gap for gap, _ in gaps]
    mean, low, high = bounds(gaps)
    pictures = sum(e for _, e in gaps) / len(gaps)
    spread = statistics.stdev(values)
    seeds = math.ceil(((Z_LOOK + Z_POWER) * spread / mean) ** 2) + 2 if mean else math.inf
    seeds = next((look for look in LOOKS if look >= max(seeds, len(gaps) + 1)), seeds)
    how = (
        f"about {seeds:,} seeds" if abs(mean) > (Z_LOOK + Z_POWER) * pictures else f"{seeds:,} seeds and more pictures"
    )
    return f"{low:+.2f} to {high:+.2f}; {how}"


Z_LOOK, Z_POWER = 2.498, 0.842  # normal quantiles of a look (.0125 on both sides together) and of a power of .8


def undecided(records: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Pairs of contenders with an undecided claim that more seeds may settle, in the tables' order."""
    for a, b, point in [(c[0], c[1], c[2:]) for c in CLAIMS.values()]:
        of_a = point[0](records) if point and "base" in records else at_end
        if verdict(gaps := paired(a, b, records, of_a=of_a)) == "undecided" and len(gaps) < max(LOOKS):
            yield a, b
    for question, (a, b, score) in QUESTIONS.items():
        if (
            question != NO_LOSS
            and verdict(gaps := paired(a, b, records, score)) == "undecided"
            and len(gaps) < max(LOOKS)
        ):
            yield a, b


def claims_table(records: Mapping[str, Any]) -> str:
    """The paper's claims, each with its differences and verdict."""
    rows = [["claim of the paper", "difference in aesthetics", "in layout", "in aesthetics, layout kept", "verdict"]]
    kept = layout_kept(records) if "base" in records else at_end
    for claim, (a, b, *point) in CLAIMS.items():
        of_a = point[0](records) if point else at_end
        found, layout = (difference(a, b, records, score, of_a) for score in ("aesthetics", "layout"))
        safe = None if point else difference(a, b, records, of_a=kept, of_b=kept)
        share = rows_share(a, b, records, of_a) if point else None
        of_rows = f" ({share:.0%} of its rows)" if share else ""
        rows.append([claim + of_rows, *map(shown, (found, layout, safe)), said(paired(a, b, records, of_a=of_a))])
    return markdown(rows)


def shown(found: tuple[float, float] | None) -> str:
    """A difference and its standard error."""
    return "" if found is None else f"{found[0]:+.3f} ± {found[1]:.3f}"


def said(gaps: Sequence[tuple[float, float]], judge: Callable[[Any], str] = verdict) -> str:
    """The verdict; of an undecided claim what would settle it."""
    says = judge(gaps)
    return f"{says}: {needed(gaps)}" if says == "undecided" else says


def questions_table(records: Mapping[str, Any]) -> str:
    """What was asked of the reinforcement-learning side, each with its differences and verdict."""
    rows = [["question", "difference in aesthetics", "in layout", "verdict"]]
    for question, (a, b, score) in QUESTIONS.items():
        both = [shown(difference(a, b, records, of)) for of in ("aesthetics", "layout")]
        judge = no_loss if question == NO_LOSS else verdict
        rows.append([question, *both, said(paired(a, b, records, score), judge)])
    return markdown(rows)


def cost_table(records: Mapping[str, Any]) -> str:
    """Compute each method needs for what Diffusion-DPO reaches with the whole budget, and for half of SPO's gain.

    In UNet rows and, by the median tuning run, CPU seconds, to which the preference model's training belongs.
    """
    rows = [["level of aesthetics", *MAIN]]
    judge_s = records.get("judge", {}).get("cpu_s")
    levels = {}

    def cost(name: str, found: tuple[float, bool] | None) -> str:
        if found is None:
            return "not reached"
        reached, at_once = found
        below = "< " * at_once
        if (each := seconds_a_row(name, records)) is None:
            return f"{below}{reached:,.0f}"
        trained_s = reached * each
        more = (f" + {judge_s:,.0f} s" if judge_s else " + the judge's") if CONTENDERS[name].judged else ""
        return f"{below}{reached:,.0f} ({below}{trained_s:,.0f} s{more})"

    if runs := seeds_of("dpo", records):
        levels["what dpo reaches"] = sum(r["aesthetics"][0] for r in runs) / len(runs)
    if (runs := seeds_of("spo", records)) and "base" in records:
        start = records["base"][OWN]["aesthetics"][0]
        levels["half of spo's gain"] = (start + sum(r["aesthetics"][0] for r in runs) / len(runs)) / 2
    for what, level in levels.items():
        rows.append([f"{level:.2f}: {what}", *(cost(name, rows_to_reach(name, level, records)) for name in MAIN)])
    return markdown(rows)


def seconds_a_row(name: str, records: Mapping[str, Any]) -> float | None:
    """CPU seconds of a UNet row by the median run of the grid, which is not scored on the way."""
    runs = rates_tried(name, records).values() if not CONTENDERS[name].like else ()
    return statistics.median(r["cpu_s"] / r["spent"] for r in runs) if runs else None


def plot(records: Mapping[str, Any], path: Path) -> None:
    """Aesthetics against UNet rows spent, a line a contender: mean over seeds, and their range. The main methods also
    against CPU minutes, to which the preference model's training belongs."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(3, 2, figsize=(10, 11), layout="constrained", sharey=True)
    judge_s = records.get("judge", {}).get("cpu_s")
    start = records["base"][OWN]["aesthetics"][0]
    spo = {"spo": MAIN["spo"]} if "spo" in MAIN else {}
    groups = [
        ("methods", MAIN),
        ("methods, by time", MAIN),
        ("reinforcement learning", spo | REINFORCEMENT),
        ("ablations of spo", spo | ABLATIONS),
        ("scorers by noise level", spo | BY_NOISE),
        ("more methods", REST),
    ]
    for number, (axes, (title, group)) in enumerate(zip(panels.flat, groups, strict=True)):
        for name in group:
            runs, scale, before = seeds_of(name, records), 1.0, 0.0
            if number == 1:
                scale = (seconds_a_row(name, records) or math.nan) / 60
                before = (math.nan if judge_s is None else judge_s / 60) if CONTENDERS[name].judged else 0.0
            if not runs or math.isnan(scale + before):
                continue
            points = list(zip(*(curve_of(r, records) for r in runs), strict=False))
            x = [before] + [before + scale * sum(p["spent"] for p in ps) / len(ps) for ps in points]
            values = [[p["aesthetics"][0] for p in ps] for ps in points]
            y = [start] + [sum(v) / len(v) for v in values]
            style = "o--" if name == "spo" and group is not MAIN else "o-"
            (line,) = axes.plot(x, y, style, ms=3, label=f"{name} ({len(runs)})")
            area = (x[1:], list(map(min, values)), list(map(max, values)))
            axes.fill_between(*area, color=line.get_color(), alpha=0.15, lw=0)
        axes.axhline(start, color="#8888", lw=0.8, zorder=0)
        axes.set_title(title, fontsize=10)
        by_rows, by_time = (
            "UNet sample-forwards (a backward counts as two)",
            "CPU minutes, preference model's training first",
        )
        axes.set_xlabel(by_time if number == 1 else by_rows, fontsize=9)
        if len(axes.lines) > 1:
            axes.legend(frameon=False, fontsize=8)
    for axes in panels[:, 0]:
        axes.set_ylabel("true aesthetics of test prompts (0-10)", fontsize=9)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


RULE = (
    f"A verdict is looked for at {', '.join(map(str, LOOKS))} seeds, paired by seed: the difference must exceed "
    f"{', '.join(f'{off:.2f}' for off in LOOKS.values())} standard errors (Student's t, .0125 at each look), so a "
    "claim about no difference gets one in at most 5 % of cases. The rule was written when the first three seeds of "
    "the paper's claims were known, and before any of reinforcement learning's. Undecided ones have their interval by "
    "it, and the seeds that would settle them four times of five if what is seen is true. The last column but one "
    "takes the best point of each run whose layouts are kept, instead of its end."
)


def page(records: Mapping[str, Any], command: str, picture: str | None = None) -> str:
    """The tables as a page of markdown that names the command behind them; picture: the plot, as seen from the page."""
    size = size_in(records)
    names = runs_on(size)
    done, more = (sum(key(name, seed) in records for name in names for seed in s) for s in (SEEDS, MORE_SEEDS))
    parts = [
        f"# The paper's claims on the {'flow ' if size == 'flow' else ''}toy world",
        f"Written by `{command}`. What is measured, and what it shows: docs/toy.md.",
        f"{done} of {len(names) * len(SEEDS)} runs, and {more} of more seeds; {BUDGET:,} UNet rows each, "
        f"{PICTURES} pictures of {len(toy_world.TEST)} prompts. The ± of a mean is the larger of its pictures' error "
        "and the spread over seeds; `held_out` is the toy's PickScore.",
        score_table(records),
        RULE,
        claims_table(records),
        "Reinforcement learning, with the same rule; a loss of aesthetics is one above two standard errors and above "
        f"{LOSS}. NFT and AWM draw, and are scored, without guidance and in 10 steps.",
        questions_table(records),
        "UNet rows, and CPU seconds, that reach a level of aesthetics; + is the training of the preference model.",
        cost_table(records),
    ]
    if picture is not None:
        parts.append(f"![true aesthetics against UNet rows and CPU minutes, for each contender]({picture})")
    return "\n\n".join(parts) + "\n"
