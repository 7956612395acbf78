"""Does a conflict of layout and aesthetics in the labels cost whole pictures more than steps? The flow toy, by share.

    python -m benchmarks.conflict                        # what is missing of all runs, then the figure and the tables
    python -m benchmarks.conflict --run spo/0.25/1       # one run again; prints its record
    python -m benchmarks.conflict --draw                 # the figure and the tables in docs/toy.md, of the records

The paper's reason for comparing steps: people's labels of whole pictures are about layout too, which often contradicts
looks, while children of one x_t differ in looks alone. So the conflict is varied here. Its share is that of the pairs
whose label contradicts aesthetics because of the layout (`toy_world.conflict_pairs`, labels without noise; of the toy's
own labels it is NATURAL). For each share and seed PAIRS new pairs are drawn. A preference model is trained on them, as
the shipped one was: on clean pictures for CLEAN_EPOCHS, then on x0 estimates of every noise for STEPS steps of 64
pairs, about a CPU minute for every share. It starts from a CLIP that has seen captions and no preference (pairs whose
labels are a coin's), since the shipped PickScore knows other labels. SPO trains with it, and Diffusion-DPO on the same
pairs, each on BUDGET counted forwards, half of the claims'. Each method has a rate of its own for each share, by the
claims' grid and rule on the tuning prompts (with the pairs and the judge of seed 0).

Asked, and how it is judged (written before the runs). Gain: true aesthetics of the claims' pictures above the base's.
1. Does Diffusion-DPO gain less, the more labels conflict? 2. Does SPO? The slope of gain against share, least squares
over the runs of all shares and seeds, with its 95 % interval (Student's t, two degrees of freedom fewer than runs): yes
if all of it is below 0, no if above, else undecided.
3. The paper's: does SPO lose a smaller part of its gain? The same of (SPO's gain over its mean gain at share 0) less
(Diffusion-DPO's over its own), paired by seed: yes if above 0, no if below. 4. Is SPO above Diffusion-DPO at the
largest share? The claims' rule, from three seeds on.

Changed after four runs: at first the claims' budget was spent at the rates that they chose on the toy's own labels. At
shares 0 and .125 (results/conflict_superseded.jsonl, seed 0) SPO gained +.63 and -.10, Diffusion-DPO +2.67 and +1.62;
SPO's pictures had stripes again, though its judges were right about children more often than the shipped one: a rate
that suits one judge is too high for another. Hence the grid; and half of the budget, to pay for it. And after some runs
of the grid: slopes were to be one a seed, which says nothing of fewer than three; now they are of all runs there are.
And after three seeds of all shares, where SPO gained with judges that agree with aesthetics no more than chance does: a
control at the largest share, SPO at the same rate with a coin in the judge's place.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import math
import shutil
import statistics
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import CLIPTokenizerFast  # type: ignore[attr-defined]  # an alias in transformers 5

from benchmarks import mechanism
from benchmarks.records import DOCS, RESULTS, fill
from spo_fast import train
from spo_fast.config.tables import markdown
from spo_fast.data import toy_world
from spo_fast.evaluation.statistics import student
from spo_fast.models.files.toy import FLOW_WEIGHTS
from spo_fast.scorers.clip_files import save_clip
from spo_fast.toy import build, claims
from spo_fast.toy.claim_tables import LOOKS, OWN, TUNING_SEED, chosen_rate, next_rate, over_seeds, said, verdict

SHARES, SEEDS, METHODS = (0.0, 0.125, 0.25, 0.375, 0.5), (0, 1, 2), ("spo", "dpo")
CONTROL = "random picks"  # at the largest share, as many seeds as SPO has there
NATURAL = 0.27  # of 8,192 pairs by toy_world.draw_pairs
PAIRS, CLEAN_EPOCHS, STEPS = 8192, 2, 64
CAPTIONED, CAPTION_EPOCHS = 16_384, 3
CLEAN = ("--noise", "none", "--no-time_conditioned", "--in_batch_negatives", "--learning_rate", "1e-3")
QUIET = ("--validation_steps", "100000", "--num_workers", "1")
BUDGET = claims.BUDGET // 2
RECORDS, FIGURE, PAGE = RESULTS / "conflict.jsonl", RESULTS / "conflict.png", DOCS / "toy.md"
BASE = RESULTS / "toy_flow_claims.jsonl"  # its scores are there


# ---------------------------------------------------------------------------------------------------- runs


def by_coin(n: int, generator: torch.Generator, texts: list[str]) -> toy_world.LabelledPairs:
    """Pictures true to their captions; which of two is preferred says nothing."""
    prompts = toy_world.random_captions(texts, n, generator)
    pixels = torch.stack([toy_world.draw(prompts, generator) for _ in range(2)])
    return toy_world.LabelledPairs(prompts, pixels, torch.randint(2, (n,), generator=generator).float())


def captions_alone(work: Path) -> Path:
    """A CLIP that tells which caption belongs to a picture, and prefers none; made when first asked for."""
    here = work / "captions"
    if not (here / "preference_model").is_dir():
        claims.of_flow(here)
        build.write_pairs(here / "pairs.parquet", CAPTIONED, build.PAIRS_SEED, labelled=by_coin)
        tokenizer = CLIPTokenizerFast.from_pretrained(str(FLOW_WEIGHTS / "tokenizer"))
        untrained = save_clip(build.new_clip(0, len(tokenizer)), here / "untrained")
        flags = ("--init_path", str(untrained), "--num_train_epochs", str(CAPTION_EPOCHS))
        claims.train_judge(here, here, *CLEAN, *QUIET, *flags)
    return here / "preference_model"


def directory(work: Path, share: float, seed: int) -> Path:
    """Of the runs of a share and a seed, with their pairs in it."""
    here = work / f"{share:g}-{seed}"
    if not (here / "pairs.parquet").is_file():
        claims.of_flow(here)
        labelled = functools.partial(toy_world.conflict_pairs, share=share)
        build.write_pairs(here / "pairs.parquet", PAIRS, 7000 + seed, labelled=labelled)
    return here


def judge(work: Path, share: float, seed: int) -> dict[str, Any]:
    """Trains the preference model of a share and a seed; what it agrees with. Of seed 0 also among children."""
    here, start = directory(work, share, seed), captions_alone(work)
    started = time.process_time()
    parts = {"clean": (*CLEAN, "--num_train_epochs", str(CLEAN_EPOCHS)), "spm": ("--max_train_steps", str(STEPS))}
    for part, flags in parts.items():
        shutil.rmtree(here / part, ignore_errors=True)  # of this run made before
        claims.train_judge(here, here / part, "--init_path", str(start), "--seed", str(seed), *QUIET, *flags)
        start = here / part / "preference_model"
    found: dict[str, Any] = {"cpu_s": round(time.process_time() - started, 1)}
    found |= json.loads((here / "spm" / "evaluation.json").read_text())
    if seed == SEEDS[0]:
        judged = ["--spm_path", str(start), "--output_dir", str(here / "watched")]
        run = train.build(train.parse(["--model", "toy-flow", *judged]))
        found["children"] = mechanism.watch(run)
        found["trained_steps"] = [run.cfg.sample.first_branch, run.cfg.sample.last_branch]
    return found


def trained(work: Path, name: str, share: float, seed: int, rate: float) -> dict[str, Any]:
    """A method's run, scored at its end; with the tuning seed on the tuning prompts."""
    of = SEEDS[0] if seed == TUNING_SEED else seed
    here = directory(work, share, of)
    more: dict[str, object] = {}
    if name == "spo":
        if not (here / "spm" / "preference_model").is_dir():
            judge(work, share, of)
        more["spm_path"] = str(here / "spm" / "preference_model")
    return claims.cell(name, seed, rate, here, marks=(), budget=BUDGET, **more)


def key(what: str, share: float, seed: int, rate: float | None = None) -> str:
    """A run's name in the records."""
    return f"{what}/{share:g}/" + (f"tuning/{rate:g}" if seed == TUNING_SEED else str(seed))


def of_share(share: float, records: Mapping[str, Any]) -> dict[str, Any]:
    """Records of a share as the claims name theirs, with the base's scores."""
    found = {cell.replace(f"/{share:g}/", "/", 1): r for cell, r in records.items() if r["share"] == share}
    return {"base": claims.read(BASE)["base"], **found}


def missing(records: Mapping[str, Any]) -> Iterator[tuple[str, float, int, float | None]]:
    """(judge or method, share, seed, rate) of runs without a record, seed by seed; a share's rates before its runs.
    Then more seeds of the largest share, while it is undecided there which method is above."""
    whole = all(key(what, share, seed) in records for what in METHODS for share in SHARES for seed in SEEDS)
    more = range(len(SEEDS), next_look(records) if whole else 0)
    for seed, share in [*itertools.product(SEEDS, SHARES), *((seed, SHARES[-1]) for seed in more)]:
        known = of_share(share, records)
        wanted: list[tuple[str, float, int, float | None]] = [("judge", share, seed, None)]
        for name in METHODS:
            rate = next_rate(name, known)
            run = (seed, chosen_rate(name, known)) if rate is None else (TUNING_SEED, rate)
            wanted.append((name, share, *run))
        yield from (run for run in wanted if key(*run) not in records)
    rate = chosen_rate("spo", of_share(SHARES[-1], records))
    seeds = range(len(gains("spo", SHARES[-1], records)) if whole else 0)
    yield from ((CONTROL, SHARES[-1], s, rate) for s in seeds if key(CONTROL, SHARES[-1], s) not in records)


def made(work: Path, what: str, share: float, seed: int, rate: float | None) -> dict[str, Any]:
    """The record of a run."""
    if what == "judge":
        found = judge(work, share, seed)
    else:
        assert rate is not None
        found = trained(work, what, share, seed, rate)
    again = f"python -m benchmarks.conflict --run {key(what, share, seed, rate)}"
    cell = {"cell": key(what, share, seed, rate), "share": share, "seed": seed}
    return {**found, **cell, "command": again, **claims.software()}


# ---------------------------------------------------------------------------------------------------- what they say


def next_look(records: Mapping[str, Any]) -> int:
    """How many seeds question 4 needs next; 0 if it is answered, or gets no more."""
    gaps = at_most(records)
    left = [look for look in LOOKS if look > len(gaps)]
    return left[0] if left and verdict(gaps) == "undecided" else 0


def at_most(records: Mapping[str, Any]) -> list[tuple[float, float]]:
    """SPO's gain less Diffusion-DPO's at the largest share, and its pictures' error, of each seed that both have."""
    both = zip(*(gains(name, SHARES[-1], records) for name in METHODS), strict=False)
    return [(a - b, math.hypot(x, y)) for (a, x), (b, y) in both]


def gains(name: str, share: float, records: Mapping[str, Any], score: str = "aesthetics") -> list[tuple[float, float]]:
    """What the runs of a share added to a score, by seed, and the error of their pictures and the base's."""
    base = claims.read(BASE)["base"][OWN][score]
    made = [key(name, share, seed) for seed in range(max(LOOKS)) if key(name, share, seed) in records]
    runs = [records[run][score] for run in made]
    return [(run[0] - base[0], math.hypot(run[1], base[1])) for run in runs]


def shares_of(records: Mapping[str, Any]) -> list[float]:
    """Those that have runs of both methods."""
    return [share for share in SHARES if all(gains(name, share, records) for name in METHODS)]


def slope(shares: list[float], values: list[list[float]]) -> tuple[float, float]:  # [share][seed]
    """Of values against the share, least squares over all, and half of its 95 % interval."""
    points = [(share, value) for share, of in zip(shares, values, strict=True) for value in of]
    x, y = map(list, zip(*points, strict=True))
    line, mean = statistics.linear_regression(x, y), statistics.fmean(x)
    left = sum((b - line.intercept - line.slope * a) ** 2 for a, b in points)
    error = math.sqrt(left / (len(x) - 2) / sum((a - mean) ** 2 for a in x))
    return line.slope, student(len(x) - 2) * error


def answers(records: Mapping[str, Any]) -> str:
    """The four questions of the module's head, by the seeds that all shares have."""
    shares = shares_of(records)
    found = {n: [[gain for gain, _ in gains(n, share, records)] for share in shares] for n in METHODS}
    seeds = min(len(of) for by_share in found.values() for of in by_share)
    found = {name: [of[:seeds] for of in by_share] for name, by_share in found.items()}
    rows = [["question", f"{len(shares)} shares, {seeds} seed{'s' * (seeds > 1)}: slope, 95 % interval", "answer"]]

    def told(question: str, values: list[list[float]], yes_below: bool) -> None:
        mean, off = slope(shares, values)
        below, above = ("yes", "no") if yes_below else ("no", "yes")
        says = below if mean < -off else above if mean > off else "undecided"
        rows.append([question, f"{mean:+.2f} ({mean - off:+.2f} to {mean + off:+.2f})", says])

    told("Diffusion-DPO gains less where more labels conflict: points of 10 for a share of 1", found["dpo"], True)
    told("SPO gains less where more labels conflict: points of 10 for a share of 1", found["spo"], True)
    spo, dpo = ([[gain / statistics.fmean(of[0]) for gain in gains] for gains in of] for of in found.values())
    less = [[a - b for a, b in zip(*both, strict=True)] for both in zip(spo, dpo, strict=True)]
    told("SPO loses a smaller part of its gain at 0: parts of it for a share of 1", less, False)
    if gaps := at_most(records):
        mean, error = over_seeds(*map(list, zip(*gaps, strict=True)))
        last = f"SPO is above Diffusion-DPO at {SHARES[-1]:g}: points of 10, {len(gaps)} seeds"
        rows.append([last, f"{mean:+.2f} ± {error:.2f}", said(gaps).replace("not run", "fewer than three seeds")])
    if control := gains(CONTROL, SHARES[-1], records):
        mean, error = over_seeds(*map(list, zip(*control, strict=True)))
        what = f"a coin in the judge's place at {SHARES[-1]:g}, SPO's rate there: gain, {len(control)} seeds"
        rows.append([what, f"{mean:+.2f} ± {error:.2f}", ", ".join(f"{gain:+.2f}" for gain, _ in control)])
    return markdown(rows)


def agreement(record: Mapping[str, Any], name: str, whole: bool = False) -> tuple[float, float]:
    """How often the judge's best beats its worst in a true score: children, trained steps; or whole pictures."""
    first, last = record["trained_steps"]
    steps = [found for t, found in record["children"].items() if t != mechanism.WHOLE][first:last]
    if whole:
        steps = [record["children"][mechanism.WHOLE]]
    right = [found[name]["right"] for found in steps if found[name]["right"]]
    return statistics.fmean(r[0] for r in right), math.hypot(*(r[1] for r in right)) / len(right)


def table(records: Mapping[str, Any]) -> str:
    """A row a share: both methods' rates and gains, and how the judge of seed 0 agrees."""
    heads = [f"{name}: {what}" for name in METHODS for what in ("rate", "aesthetics", "of each seed", "layout")]
    rows = [["share", *heads, "SPO's judge right: its labels, t = 0", "aesthetics of children", "of whole pictures"]]
    for share in SHARES:
        row = [f"{share:g}"]
        for name in METHODS:
            found, layout = gains(name, share, records), gains(name, share, records, "layout")
            if not found:
                row += ["", "not run", "", ""]
                continue
            rate = records[key(name, share, SEEDS[0])]["learning_rate"]
            looks, kept = (over_seeds(*map(list, zip(*of, strict=True))) for of in (found, layout))
            row += [f"{rate:g}", "{:+.2f} ± {:.2f}".format(*looks), ", ".join(f"{g:+.2f}" for g, _ in found)]
            row.append(f"{kept[0]:+.3f}")
        made = [key("judge", share, seed) for seed in range(max(LOOKS))]
        judges = [records[run] for run in made if run in records]
        row.append(f"{statistics.fmean(r['accuracy']['trained']['0'][0] for r in judges):.2f}" if judges else "")
        for whole in (False, True):
            row.append("{:.2f} ± {:.2f}".format(*agreement(judges[0], "aesthetics", whole)) if judges else "")
        rows.append(row)
    return markdown(rows)


def draw(records: Mapping[str, Any], path: Path) -> None:
    """Gain of aesthetics and of layout against the share of conflicting labels, and the judges' agreement."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (looks, layouts, judged) = pyplot.subplots(1, 3, figsize=(12, 3.6), layout="constrained")
    shares = shares_of(records)
    for axes, score in ((looks, "aesthetics"), (layouts, "layout")):
        for name, label in (("spo", "SPO, judge of the same pairs"), ("dpo", "Diffusion-DPO")):
            found = [gains(name, share, records, score) for share in shares]
            means, errors = zip(*(over_seeds(*map(list, zip(*of, strict=True))) for of in found), strict=True)
            (line, *_) = axes.errorbar(shares, means, errors, fmt="o-", ms=4, capsize=2, label=label)
            for share, of in zip(shares, found, strict=True):
                axes.plot([share] * len(of), [gain for gain, _ in of], ".", ms=3, color=line.get_color(), alpha=0.5)
        axes.axhline(0, color="#8888", lw=0.8, zorder=0)
    children = [records[key("judge", share, SEEDS[0])] for share in SHARES]
    for whole, label in ((False, "children of one x_t, trained steps"), (True, "whole pictures of one prompt")):
        found = [agreement(record, "aesthetics", whole) for record in children]
        judged.errorbar(SHARES, *zip(*found, strict=True), fmt="o-", ms=4, capsize=2, label=label)
    judged.axhline(0.5, color="#8888", lw=0.8, zorder=0)
    titles = (
        "gain of true aesthetics, points of 10",
        "gain of layout right",
        "judge's best more beautiful than its worst",
    )
    for axes, title in zip((looks, layouts, judged), titles, strict=True):
        axes.axvline(NATURAL, color="#888", ls=":", lw=0.8, zorder=0)
        axes.set_title(title, fontsize=9)
        axes.set_xlabel("share of labels that contradict aesthetics (dotted: the toy's own)", fontsize=8)
    looks.legend(frameon=False, fontsize=8)
    judged.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--run", help="one run's name, as in spo/0.25/1, spo/0.25/tuning/0.0005 or judge/0/2")
    parser.add_argument("--draw", action="store_true", help="run nothing: the figure and the tables of the records")
    parser.add_argument("--work_dir", type=Path, default=Path("runs/conflict"), help="pairs and models on the way")
    args = parser.parse_args()
    if args.run:
        what, share, *which = args.run.split("/")
        seed, rate = (TUNING_SEED, float(which[1])) if which[0] == "tuning" else (int(which[0]), None)
        if what != "judge":
            rate = rate or chosen_rate("dpo" if what == "dpo" else "spo", of_share(float(share), claims.read(RECORDS)))
        print(json.dumps(made(args.work_dir, what, float(share), seed, rate), indent=1))
        return
    while not args.draw and (run := next(missing(claims.read(RECORDS)), None)):
        found = made(args.work_dir, *run)
        with RECORDS.open("a", encoding="utf-8") as file:
            file.write(json.dumps(found) + "\n")
        print(key(*run), found.get("aesthetics"), f"{found['cpu_s']} s", flush=True)
    records = claims.read(RECORDS)
    if left := list(missing(records)):
        print(f"Not run yet: {len(left)} or more, {key(*left[0])} first.")
    if len(shares_of(records)) < 3:
        return
    draw(records, FIGURE)
    tables = table(records) + "\n\n" + answers(records)
    fill(PAGE, tables, "conflict")
    print(tables)


if __name__ == "__main__":
    main()
