"""Does a conflict of layout and aesthetics in the labels cost whole pictures more than steps? The flow toy, by share.

    python -m benchmarks.conflict                        # what is missing of all runs, then the table and the figure
    python -m benchmarks.conflict --run spo/0.25/1       # one run again; prints its record
    python -m benchmarks.conflict --draw                 # the table and the figure of the records

The paper's reason for comparing steps: people's labels of whole pictures are about layout too, which often contradicts
looks, while children of one x_t differ in looks alone. So the conflict is varied here. Its share is that of the pairs
whose label contradicts aesthetics because of the layout (`toy_world.conflict_pairs`, labels without noise; of the toy's
own labels it is NATURAL). For each share and seed PAIRS new pairs are drawn. A preference model is trained on them, as
the shipped one was: on clean pictures for CLEAN_EPOCHS, then on x0 estimates of every noise for STEPS steps of 64
pairs, about a CPU minute for every share. It starts from a CLIP that has seen captions and no preference (pairs whose
labels are a coin's), since the shipped PickScore knows other labels. SPO trains with it, and Diffusion-DPO on the same
pairs, each on the claims' counted compute, at the rates that the claims' grid chose on the toy's own labels: none is
tuned here. About half an hour of CPU in all.

Asked, and how it is judged (written before the runs). Gain: true aesthetics of the claims' pictures above the base's.
A seed has one slope of gain against share for each method (least squares over the five shares).
1. Does Diffusion-DPO gain less, the more labels conflict? 2. Does SPO? The mean slope of the three seeds, with the 95 %
interval of Student's t (2 degrees of freedom): yes if all of it is below 0, no if above, else undecided.
3. The paper's: does SPO lose a smaller part of its gain? Each slope over its method's mean gain at share 0; SPO's less
Diffusion-DPO's, paired by seed, the same interval: yes if above 0, no if below. 4. Is SPO above Diffusion-DPO at the
largest share? The claims' rule for three seeds.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import statistics
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import CLIPTokenizerFast  # type: ignore[attr-defined]  # an alias in transformers 5

from benchmarks import mechanism
from benchmarks.records import RESULTS
from spo_fast import train
from spo_fast.config.tables import markdown
from spo_fast.data import toy_world
from spo_fast.models.files.toy import FLOW_WEIGHTS
from spo_fast.scorers.clip_files import save_clip
from spo_fast.toy import build, claims
from spo_fast.toy.claim_tables import OWN, chosen_rate, over_seeds, said

SHARES, SEEDS, METHODS = (0.0, 0.125, 0.25, 0.375, 0.5), (0, 1, 2), ("spo", "dpo")
NATURAL = 0.27  # of 8,192 pairs by toy_world.draw_pairs
PAIRS, CLEAN_EPOCHS, STEPS = 8192, 2, 64
CAPTIONED, CAPTION_EPOCHS = 16_384, 3
CLEAN = ("--noise", "none", "--no-time_conditioned", "--in_batch_negatives", "--learning_rate", "1e-3")
QUIET = ("--validation_steps", "100000", "--num_workers", "1")
T_95 = 4.303  # Student's t of three numbers, both sides
RECORDS, FIGURE = RESULTS / "conflict.jsonl", RESULTS / "conflict.png"
RATES = RESULTS / "toy_flow_claims.jsonl"  # their grids, and the base's scores


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


def trained(work: Path, name: str, share: float, seed: int) -> dict[str, Any]:
    """A method's run, scored at its end."""
    here = directory(work, share, seed)
    more: dict[str, object] = {}
    if name == "spo":
        if not (here / "spm" / "preference_model").is_dir():
            judge(work, share, seed)
        more["spm_path"] = str(here / "spm" / "preference_model")
    rate = chosen_rate(name, claims.current(claims.read(RATES)))
    assert rate is not None
    return claims.cell(name, seed, rate, here, marks=(), **more)


def plan() -> Iterator[tuple[str, float, int]]:
    """(judge or method, share, seed) of all runs, whole seeds first."""
    for seed in SEEDS:
        for share in SHARES:
            yield from ((what, share, seed) for what in ("judge", *METHODS))


def key(what: str, share: float, seed: int) -> str:
    """A run's name in the records."""
    return f"{what}/{share:g}/{seed}"


def made(work: Path, what: str, share: float, seed: int) -> dict[str, Any]:
    """The record of a run."""
    found = judge(work, share, seed) if what == "judge" else trained(work, what, share, seed)
    again = f"python -m benchmarks.conflict --run {key(what, share, seed)}"
    return {
        **found,
        "cell": key(what, share, seed),
        "share": share,
        "seed": seed,
        "command": again,
        **claims.software(),
    }


# ---------------------------------------------------------------------------------------------------- what they say


def gains(name: str, share: float, records: Mapping[str, Any], score: str = "aesthetics") -> list[tuple[float, float]]:
    """What the runs of a share added to a score, by seed, and the error of their pictures and the base's."""
    base = claims.read(RATES)["base"][OWN][score]
    runs = [records[key(name, share, seed)][score] for seed in SEEDS if key(name, share, seed) in records]
    return [(run[0] - base[0], math.hypot(run[1], base[1])) for run in runs]


def slopes(name: str, records: Mapping[str, Any]) -> list[float]:
    """Gain by share, one of each seed."""
    by_share = [[gain for gain, _ in gains(name, share, records)] for share in SHARES]
    return [statistics.linear_regression(SHARES, of_seed).slope for of_seed in zip(*by_share, strict=True)]


def interval(values: list[float]) -> tuple[float, float, float]:
    """Mean of three seeds and its 95 % interval."""
    mean, off = statistics.fmean(values), T_95 * statistics.stdev(values) / math.sqrt(len(values))
    return mean, mean - off, mean + off


def answers(records: Mapping[str, Any]) -> str:
    """The four questions of the module's head."""
    rows = [["question", "mean of three seeds, 95 % interval", "answer"]]

    def told(question: str, values: list[float], yes_below: bool) -> None:
        mean, low, high = interval(values)
        below, above = ("yes", "no") if yes_below else ("no", "yes")
        says = below if high < 0 else above if low > 0 else "undecided"
        rows.append([question, f"{mean:+.2f} ({low:+.2f} to {high:+.2f})", says])

    found = {name: slopes(name, records) for name in METHODS}
    told("Diffusion-DPO gains less where more labels conflict: points of 10 for a share of 1", found["dpo"], True)
    told("SPO gains less where more labels conflict: points of 10 for a share of 1", found["spo"], True)
    parts = {n: [s / statistics.fmean(g for g, _ in gains(n, 0.0, records)) for s in found[n]] for n in METHODS}
    less = [a - b for a, b in zip(parts["spo"], parts["dpo"], strict=True)]
    told("SPO loses a smaller part of its gain: difference of these slopes over the gain at 0", less, False)
    most = [gains(name, SHARES[-1], records) for name in METHODS]
    gaps = [(a - b, math.hypot(x, y)) for (a, x), (b, y) in zip(*most, strict=True)]
    mean, error = over_seeds(*map(list, zip(*gaps, strict=True)))
    rows.append(
        [f"SPO is above Diffusion-DPO at {SHARES[-1]:g}: points of 10", f"{mean:+.2f} ± {error:.2f}", said(gaps)]
    )
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
    """A row a share: gains of both methods, and how the judge of seed 0 agrees."""
    heads = [f"{name}: {score}" for name in METHODS for score in ("aesthetics", "of each seed", "layout")]
    judged = ["judge agrees with its labels, t = 0", "with aesthetics, children", "whole pictures", "pairs kept by spo"]
    rows = [["share", *heads, *judged]]
    for share in SHARES:
        row = [f"{share:g}"]
        for name in METHODS:
            found, layout = gains(name, share, records), gains(name, share, records, "layout")
            means = [
                over_seeds(*map(list, zip(*of, strict=True))) if of else (math.nan, math.nan) for of in (found, layout)
            ]
            row += [
                f"{means[0][0]:+.2f} ± {means[0][1]:.2f}",
                ", ".join(f"{g:+.2f}" for g, _ in found),
                f"{means[1][0]:+.3f}",
            ]
        judges = [records[key("judge", share, seed)] for seed in SEEDS if key("judge", share, seed) in records]
        runs = [records[key("spo", share, seed)] for seed in SEEDS if key("spo", share, seed) in records]
        right = [r["accuracy"]["trained"]["0"][0] for r in judges]
        row.append(f"{statistics.fmean(right):.2f}" if right else "")
        row += [
            "{:.2f} ± {:.2f}".format(*agreement(judges[0], "aesthetics", w)) if judges else "" for w in (False, True)
        ]
        rows.append([*row, f"{statistics.fmean(r['pairs'] for r in runs):,.0f}" if runs else ""])
    return markdown(rows)


def draw(records: Mapping[str, Any], path: Path) -> None:
    """Gain of aesthetics and of layout against the share of conflicting labels, and the judges' agreement."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (looks, layouts, judged) = pyplot.subplots(1, 3, figsize=(12, 3.6), layout="constrained")
    for axes, score in ((looks, "aesthetics"), (layouts, "layout")):
        for name, label in (("spo", "SPO, judge of the same pairs"), ("dpo", "Diffusion-DPO")):
            found = [gains(name, share, records, score) for share in SHARES]
            means, errors = zip(*(over_seeds(*map(list, zip(*of, strict=True))) for of in found), strict=True)
            (line, *_) = axes.errorbar(SHARES, means, errors, fmt="o-", ms=4, capsize=2, label=label)
            for share, of in zip(SHARES, found, strict=True):
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
    parser.add_argument("--run", help="one run's name, as in spo/0.25/1 or judge/0/2")
    parser.add_argument("--draw", action="store_true", help="run nothing: the figure and the tables of the records")
    parser.add_argument("--work_dir", type=Path, default=Path("runs/conflict"), help="pairs and models on the way")
    args = parser.parse_args()
    if args.run:
        what, share, seed = args.run.split("/")
        print(json.dumps(made(args.work_dir, what, float(share), int(seed)), indent=1))
        return
    for run in () if args.draw else plan():
        if key(*run) not in claims.read(RECORDS):
            found = made(args.work_dir, *run)
            with RECORDS.open("a", encoding="utf-8") as file:
                file.write(json.dumps(found) + "\n")
            print(key(*run), found.get("aesthetics"), f"{found['cpu_s']} s", flush=True)
    records = claims.read(RECORDS)
    draw(records, FIGURE)
    print(table(records), answers(records), sep="\n\n")


if __name__ == "__main__":
    main()
