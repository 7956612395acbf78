"""Which of the paper's design choices matter on the toys; and of those that do not, a reason, tested.

    python -m benchmarks.design_choices                  # what is missing; the tables of docs/toy.md
    python -m benchmarks.design_choices --run high/0     # one of them again; prints its record
    python -m benchmarks.design_choices --tables         # the tables of the records

The first table is the claims' (their records, their rule and intervals). Three choices were not seen to matter there;
each has a reason that can be wrong, and one experiment on the toy (not the flow) that would show it, written down
before it was run. Intervals are 95 %.

Random next start. Reason: it hardly changes which pictures are compared, as what a child is ahead in is lost on the
way. `start`: rollouts of the base from the same noise that go on from winners, losers and children at random. Asked:
how much more beautiful winners' ends are than losers', paired by prompt. The reason holds if the interval lies within
HARDLY points of 0, a tenth of SPO's gain, and fails if it lies outside. Told beside it: the sum over steps of how far
winners are ahead of their siblings, which is what would be left at the end if nothing were lost.

The highest noise levels. Reason: what is told there is right more often than not (benchmarks/mechanism.py), so it
teaches aesthetics as well. `high/SEED`: SPO on steps before t = 750 alone, on half of the claims' compute. The reason
holds if the interval of three seeds' gains lies above 0, and fails if it lies below; that they teach as much as the
lower ones is not said by it: the gain stands beside SPO's at that half.

Inner steps. Reason: children that part for four steps are further apart, but there is one comparison of two where SPO
has four of four children, so that a rollout tells less in all. `told`: rollouts of the base with 2 and 4 children and 0
and 3 inner steps. Told by a comparison: how much more beautiful its winner is than its loser, 0 if it is not kept.
The reason holds if a comparison of MSPO's tells more than one of SPO's, and all of a prompt's together less, both
intervals apart from 0.

After these were run (the first reason failed, the others were undecided), and before what follows:
A second reason for the random next start: the start changes which pictures are compared, and not what a comparison of
siblings tells. `starts`: rollouts that go on from winners, losers and at random. The reason holds if what all of a
prompt's comparisons tell from winners, and from losers, differs from random starts' by less than a fifth of those',
both intervals within, and fails if one lies outside.
Of the highest noise levels three more seeds, with the interval of the claims' rule for a second look (3.81 standard
errors). Of the inner steps four times as many rollouts (`told again`), their intervals at 97.5 % for the second look.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import mechanism
from benchmarks.records import DOCS, RESULTS, fill
from spo_fast import train
from spo_fast.config.tables import markdown
from spo_fast.evaluation.statistics import estimate
from spo_fast.method.rollout import best_and_worst
from spo_fast.toy import claims
from spo_fast.toy.claim_tables import CLAIMS, OWN, bounds, chosen_rate, curve_of, paired, said, seeds_of
from spo_fast.training.loop import Run

RECORDS, PAGE = RESULTS / "design_choices.jsonl", DOCS / "toy.md"
WORLDS = {"toy": RESULTS / "toy_claims.jsonl", "flow toy": RESULTS / "toy_flow_claims.jsonl"}
CHOICES = {
    "a random next start is above the winner": "random next start",
    "a random next start is above the loser": "random next start",
    "knowing the timestep helps the judge": "timestep conditioning of the judge",
    "PickScore in the judge's place hurts": "a step-aware judge, not PickScore",
    "the highest noise levels harm": "t at most 750",
    "larger steps (inner steps) are better for a strong model": "inner steps",
}
SEEDS, ROUNDS, HARDLY = range(6), 2, 0.16
AGAIN, FIFTH = 4 * ROUNDS, 0.2
Z_95, Z_SECOND = 1.96, 2.241
STARTS = ("winner", "random", "loser")
SETTINGS = [(k, inner) for k in (2, 4) for inner in (3, 0)]  # children, inner steps
MSPO, SPO = (2, 3), (4, 0)

# ---------------------------------------------------------------------------------------------------- experiments


def toy_run(directory: str) -> Run:
    """The toy's preset, untrained."""
    return train.build(train.parse(["--model", "toy", "--output_dir", directory]))


def ahead(three: Tensor) -> Tensor:  # (3, K, B) -> (B,)
    """How much more beautiful the child that the judge prefers is than its siblings on average."""
    judge, _, looks = three
    best = best_and_worst(judge, 0.0)[0][:1]
    return looks.gather(0, best)[0] - looks.mean(0)


def start(_: Path) -> dict[str, Any]:
    """Ends of rollouts that go on from winners, losers and at random."""
    with tempfile.TemporaryDirectory() as directory:
        run = toy_run(directory)
        seen = {s: mechanism.seen(run, run.cfg.with_fields(next_start=s).sample, rounds=ROUNDS) for s in STARTS}
    ends = {s: list(by_t.values())[-1][1:].mean(1) for s, by_t in seen.items()}  # (2, B) of the last step's children
    found: dict[str, Any] = {
        s: {n: list(estimate(v)) for n, v in zip(("layout", "aesthetics"), end, strict=True)} for s, end in ends.items()
    }
    for a, b in (("winner", "loser"), ("winner", "random"), ("loser", "random")):
        found[f"{a} - {b}"] = list(estimate(ends[a][1] - ends[b][1]))
    found["ahead of siblings, summed over steps"] = list(
        estimate(torch.stack([*map(ahead, seen["winner"].values())]).sum(0))
    )
    return found


def high(seed: int, work: Path) -> dict[str, Any]:
    """SPO on the steps before t = 750 alone."""
    rate = chosen_rate("spo", claims.current(claims.read(WORLDS["toy"])))
    preset = train.parse(["--model", "toy", "--output_dir", str(work)]).sample
    more = {"branch_start": 0, "branch_end": preset.first_branch}
    return {**claims.cell("spo", seed, rate, work, marks=(), budget=claims.BUDGET // 2, **more), "settings": more}


def told_by(three: Tensor, threshold: float) -> Tensor:  # (3, K, B) -> (B,)
    """How much more beautiful the winner of a comparison is than the loser; 0 if the comparison is not kept."""
    sides, kept = best_and_worst(three[0], threshold)
    best, worst = three[2].gather(0, sides)
    return torch.where(kept, best - worst, 0.0)


def told(_: Path, settings: Sequence[tuple[int, int]] = SETTINGS, rounds: int = ROUNDS) -> dict[str, Any]:
    """What comparisons tell, by children and inner steps; and MSPO's less SPO's, paired by prompt."""
    each, found = {}, {}
    with tempfile.TemporaryDirectory() as directory:
        run = toy_run(directory)
        for k, inner in settings:
            cfg = run.cfg.with_fields(num_candidates=k, num_inner_steps=inner).sample
            by_t = mechanism.seen(run, cfg, rounds=rounds)
            one = each[k, inner] = torch.stack([told_by(three, cfg.threshold) for three in by_t.values()])  # (S, B)
            kept = torch.stack([best_and_worst(three[0], cfg.threshold)[1] for three in by_t.values()]).float()
            found[f"{k} children, {inner} inner steps"] = {
                "comparisons": len(one),
                "kept": float(kept.mean()),
                "by a comparison": list(estimate(one.mean(0))),
                "by a rollout": list(estimate(one.sum(0))),
            }
    mspo, spo = each[MSPO], each[SPO]
    found["mspo - spo"] = {
        "by a comparison": list(estimate(mspo.mean(0) - spo.mean(0))),
        "by a rollout": list(estimate(mspo.sum(0) - spo.sum(0))),
    }
    return found


def starts(_: Path) -> dict[str, Any]:
    """What all of a prompt's comparisons tell, by the child that a rollout goes on from; and less random's, paired."""
    with tempfile.TemporaryDirectory() as directory:
        run = toy_run(directory)
        cfgs = {s: run.cfg.with_fields(next_start=s).sample for s in STARTS}
        seen = {s: mechanism.seen(run, cfg, rounds=ROUNDS) for s, cfg in cfgs.items()}
    each = {s: torch.stack([told_by(three, cfgs[s].threshold) for three in seen[s].values()]).sum(0) for s in STARTS}
    found = {s: list(estimate(one)) for s, one in each.items()}
    return {**found, **{f"{s} - random": list(estimate(each[s] - each["random"])) for s in ("winner", "loser")}}


EXPERIMENTS: dict[str, Callable[[Path], dict[str, Any]]] = {
    "start": start,
    "told": told,
    "starts": starts,
    "told again": lambda work: told(work, (MSPO, SPO), AGAIN),
    **{f"high/{seed}": lambda work, seed=seed: high(seed, work) for seed in SEEDS},
}


def made(name: str, work: Path) -> dict[str, Any]:
    """The record of an experiment."""
    work.mkdir(parents=True, exist_ok=True)
    started = time.process_time()
    found = EXPERIMENTS[name](work)
    cpu_s = round(time.process_time() - started, 1)
    command = f"python -m benchmarks.design_choices --run {name}"
    return {**found, "cell": name, "cpu_s": cpu_s, "command": command, **claims.software()}


# ---------------------------------------------------------------------------------------------------- tables


def choices_table() -> str:
    """Each choice on both worlds: the difference that it makes in aesthetics, its interval, what the claims say."""
    rows = [
        ["the paper's choice", "claim", *(f"{world}: {what}" for world in WORLDS for what in ("difference", "verdict"))]
    ]
    records = {world: claims.current(claims.read(path)) for world, path in WORLDS.items()}
    for claim, choice in CHOICES.items():
        row = [choice, claim]
        for known in records.values():
            gaps = paired(CLAIMS[claim][0], CLAIMS[claim][1], known)
            if len(gaps) < min(claims.LOOKS):
                row += ["", "not run"]
                continue
            mean, low, high_ = bounds(gaps)
            row += [f"{len(gaps)} seeds: {mean:+.2f} ({low:+.2f} to {high_:+.2f})", said(gaps).partition(":")[0]]
        rows.append(row)
    return markdown(rows)


def interval(found: list[float], z: float = Z_95) -> tuple[float, float]:
    """Of a mean of many, (mean, standard error, how many)."""
    return found[0] - z * found[1], found[0] + z * found[1]


def shown(found: list[float], z: float = Z_95) -> str:
    """A mean and its interval."""
    return "{:+.2f} ({:+.2f} to {:+.2f})".format(found[0], *interval(found, z))


def says(holds: bool, fails: bool) -> str:
    """Of a reason."""
    return "holds" if holds else "fails" if fails else "undecided"


def answers(records: Mapping[str, Any]) -> str:
    """A row an experiment: what was found, and whether the reason holds."""
    rows = [["choice", "reason", "found, points of aesthetics", "the reason"]]
    ends = records["start"]
    gap, summed = ends["winner - loser"], ends["ahead of siblings, summed over steps"]
    low, high_ = interval(gap)
    text = f"winners' ends less losers' {shown(gap)}; winners ahead of siblings, all steps {shown(summed)}"
    verdict = says(low > -HARDLY and high_ < HARDLY, low > HARDLY or high_ < -HARDLY)
    rows.append(["random next start", "the start hardly changes which pictures are compared", text, verdict])
    rows.append(["random next start", "siblings tell as much wherever it starts", *starts_answer(records["starts"])])
    rows.append(["t at most 750", "the highest noise levels teach aesthetics as well", *high_answer(records)])
    one, whole = (records["told again"]["mspo - spo"][f"by a {what}"] for what in ("comparison", "rollout"))
    text = f"MSPO less SPO, a comparison {shown(one, Z_SECOND)}; a prompt's rollout {shown(whole, Z_SECOND)}"
    more, less = interval(one, Z_SECOND), interval(whole, Z_SECOND)
    verdict = says(more[0] > 0 and less[1] < 0, more[1] < 0 or less[0] > 0)
    rows.append(["inner steps", "a comparison tells more, all of a rollout less", text, verdict])
    return markdown(rows)


def starts_answer(found: Mapping[str, list[float]]) -> tuple[str, str]:
    """What comparisons tell by the start, and whether it is as much."""
    gaps, most = [found[f"{s} - random"] for s in ("winner", "loser")], FIFTH * found["random"][0]
    text = f"a prompt's rollout at random {shown(found['random'])}; winner less random {shown(gaps[0])}, loser"
    spans = list(map(interval, gaps))
    within = all(low > -most and high_ < most for low, high_ in spans)
    return f"{text} {shown(gaps[1])}", says(within, any(low > most or high_ < -most for low, high_ in spans))


def high_answer(records: Mapping[str, Any]) -> tuple[str, str]:
    """What SPO gains above t = 750 alone, and whether it does."""
    known = claims.current(claims.read(WORLDS["toy"]))
    base = known["base"][OWN]
    runs = [records[f"high/{seed}"] for seed in SEEDS]
    gains = [(r["aesthetics"][0] - base["aesthetics"][0], r["aesthetics"][1]) for r in runs]
    mean, low, high_ = bounds(gains)
    half = [curve_of(r, known)[1]["aesthetics"][0] for r in seeds_of("spo", known)]
    spo = statistics.fmean(half) - base["aesthetics"][0]
    layout = statistics.fmean(r["layout"][0] for r in runs) - base["layout"][0]
    text = f"gain of t > 750 alone, {len(runs)} seeds {mean:+.2f} ({low:+.2f} to {high_:+.2f}); SPO {spo:+.2f}"
    return f"{text}; layout {layout:+.3f}", says(low > 0, high_ < 0)


def told_table(records: Mapping[str, Any]) -> str:
    """What comparisons of the base's children tell, by children and inner steps."""
    rows = [["children, inner steps", "comparisons", "kept", "told by a comparison", "by a prompt's rollout"]]
    for k, inner in SETTINGS:
        found = records["told"][f"{k} children, {inner} inner steps"]
        means = [shown(found[f"by a {what}"]) for what in ("comparison", "rollout")]
        name = {MSPO: " (MSPO)", SPO: " (SPO)"}.get((k, inner), "")
        rows.append([f"{k}, {inner}{name}", str(found["comparisons"]), f"{found['kept']:.2f}", *means])
    return markdown(rows)


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--run", choices=tuple(EXPERIMENTS), help="one experiment again")
    parser.add_argument("--tables", action="store_true", help="run nothing")
    parser.add_argument("--work_dir", type=Path, default=Path("runs/design_choices"))
    args = parser.parse_args()
    if args.run:
        print(json.dumps(made(args.run, args.work_dir), indent=1))
        return
    for name in () if args.tables else EXPERIMENTS:
        if name not in claims.read(RECORDS):
            found = made(name, args.work_dir)
            with RECORDS.open("a", encoding="utf-8") as file:
                file.write(json.dumps(found) + "\n")
            print(name, f"{found['cpu_s']} s", flush=True)
    records = claims.read(RECORDS)
    left = [name for name in EXPERIMENTS if name not in records]
    rest = [f"Not run yet: {', '.join(left)}."] if left else [answers(records), told_table(records)]
    tables = "\n\n".join((choices_table(), *rest))
    fill(PAGE, tables, "design_choices")
    print(tables)


if __name__ == "__main__":
    main()
