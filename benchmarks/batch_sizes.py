"""Would another batch size change what the claims say? Each method with half of its batch, at equal compute.

    python -m benchmarks.batch_sizes                        # what is missing on the flow toy; the table of docs/toy.md
    python -m benchmarks.batch_sizes --world toy            # the same on the toy
    python -m benchmarks.batch_sizes --run flow/ddpo/0.005  # one run again; prints its record
    python -m benchmarks.batch_sizes --tables               # the tables of the records

The claims tune a learning rate for each method, and no batch: an optimizer step is of 16 states, or of 20 where whole
trajectories are kept. Half of it is twice as many steps, which a method that takes few may want. So each method that
has a rate of its own is trained with half of its train_batch_size on the claims' budget, with the tuning seed and
prompts, at the claims' rate and at those beside it on the ladder, as its square root and its half may be right.

Asked, and how it is judged (written before the runs). Is a method better with half of its batch? Yes if its best of the
three rates that keeps the layout, as the claims choose, is more than two errors above the claims' best, no if it is as
far below, else it makes no difference. The error is of 128 pictures each. Where the answer is yes, seeds 0 to 2 are run
at that rate, and stand in the table beside the claims' own.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from benchmarks.records import DOCS, RESULTS, fill
from spo_fast import train
from spo_fast.config.tables import markdown
from spo_fast.toy import claims
from spo_fast.toy.claim_tables import (
    LADDER,
    SEEDS,
    TUNING_SEED,
    best_rate,
    chosen_rate,
    over_seeds,
    rates_tried,
    runs_on,
    seeds_of,
)
from spo_fast.toy.contenders import CONTENDERS

WORLDS = {"flow": RESULTS / "toy_flow_claims.jsonl", "toy": RESULTS / "toy_claims.jsonl"}
SIZES = {"flow": "flow", "toy": "small"}
RECORDS, PAGE = RESULTS / "batch_sizes.jsonl", DOCS / "toy.md"
ERRORS = 2.0


def known(world: str) -> dict[str, Any]:
    """The claims' records."""
    return claims.current(claims.read(WORLDS[world]))


def methods(world: str) -> list[str]:
    """Those with a rate of their own, which the claims have found."""
    names = [name for name in runs_on(SIZES[world]) if not CONTENDERS[name].like]
    return [name for name in names if chosen_rate(name, known(world)) is not None]


def own_batch(world: str, name: str) -> int:
    """A method's train_batch_size in the claims."""
    settings = CONTENDERS[name].on(SIZES[world]) or {}
    preset = train.parse(["--model", "toy-flow" if world == "flow" else "toy"])
    return int(str(settings.get("train_batch_size", preset.optim.train_batch_size)))


def rates(world: str, name: str) -> list[float]:
    """The claims' and those beside it."""
    rate = chosen_rate(name, known(world))
    assert rate is not None
    at = LADDER.index(rate)
    return list(LADDER[max(0, at - 1) : at + 2])


def key(world: str, name: str, rate: float, seed: int = TUNING_SEED) -> str:
    """A run's name in the records."""
    return f"{world}/{name}/{rate:g}" + ("" if seed == TUNING_SEED else f"/{seed}")


def tuned(world: str, name: str, records: Mapping[str, Any]) -> dict[float, Any]:
    """Runs with half of the batch by their rates."""
    return {rate: records[run] for rate in rates(world, name) if (run := key(world, name, rate)) in records}


def compared(world: str, name: str, records: Mapping[str, Any]) -> tuple[float, float, float, float] | None:
    """The claims' rate, the best with half of the batch, and how far that is above, with its error; None: not run."""
    half, mine = tuned(world, name, records), known(world)
    if len(half) < len(rates(world, name)):
        return None
    whole = rates_tried(name, mine)
    a, b = best_rate(whole, mine), best_rate(half, mine)
    (x, dx, _), (y, dy, _) = whole[a]["aesthetics"], half[b]["aesthetics"]
    return a, b, y - x, math.hypot(dx, dy)


def is_better(found: tuple[float, float, float, float] | None) -> bool:
    """Half of the batch is."""
    return found is not None and found[2] > ERRORS * found[3]


def missing(world: str, records: Mapping[str, Any]) -> Iterator[tuple[str, float, int]]:
    """(method, rate, seed) of runs without a record."""
    for name in methods(world):
        yield from ((name, r, TUNING_SEED) for r in rates(world, name) if key(world, name, r) not in records)
        found = compared(world, name, records)
        if found is not None and is_better(found):
            yield from ((name, found[1], s) for s in SEEDS if key(world, name, found[1], s) not in records)


def made(world: str, name: str, rate: float, seed: int, work: Path) -> dict[str, Any]:
    """The record of a run."""
    here = work / world
    here.mkdir(parents=True, exist_ok=True)
    if world == "flow":
        claims.of_flow(here)
    batch = own_batch(world, name) // 2
    found = claims.cell(name, seed, rate, here, marks=(), train_batch_size=batch)
    again = f"python -m benchmarks.batch_sizes --run {key(world, name, rate, seed)}"
    cell = {"cell": key(world, name, rate, seed), "world": world, "train_batch_size": batch, "command": again}
    return {**found, **cell, **claims.software()}


def table(world: str, records: Mapping[str, Any]) -> str:
    """A row a method."""
    heads = ("rate", "steps", "rate, half", "steps, half", "half less whole, tuning", "half is better", "seeds")
    rows = [["method", "batch", *heads]]
    for name in methods(world):
        row, found = [name, str(own_batch(world, name))], compared(world, name, records)
        if found is None:
            rows.append([*row, *["not run"] * len(heads)])
            continue
        whole, rate, gap, error = found
        steps = [rates_tried(name, known(world))[whole], records[key(world, name, rate)]]
        row += [f"{whole:g}", str(steps[0]["optimizer_steps"]), f"{rate:g}", str(steps[1]["optimizer_steps"])]
        answer = "yes" if is_better(found) else "no" if gap < -ERRORS * error else "no difference"
        row += [f"{gap:+.2f} ± {error:.2f}", answer]
        runs = [records[run] for s in SEEDS if (run := key(world, name, rate, s)) in records]
        means = [
            "{:.2f} ± {:.2f}".format(*over_seeds(*map(list, zip(*(r["aesthetics"][:2] for r in of), strict=True))))
            for of in (runs, seeds_of(name, known(world))[: len(SEEDS)])
            if of
        ]
        rows.append([*row, f"{means[0]}; whole {means[-1]}" if runs else ""])
    return markdown(rows)


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--world", choices=tuple(WORLDS), default="flow")
    parser.add_argument("--run", help="one run's name, as in flow/ddpo/0.005, or flow/ddpo/0.005/1 of a seed")
    parser.add_argument("--tables", action="store_true", help="run nothing")
    parser.add_argument("--work_dir", type=Path, default=Path("runs/batch_sizes"))
    args = parser.parse_args()
    if args.run:
        world, name, rate, *seed = args.run.split("/")
        found = made(world, name, float(rate), int(seed[0]) if seed else TUNING_SEED, args.work_dir)
        print(json.dumps(found, indent=1))
        return
    while not args.tables and (run := next(missing(args.world, claims.read(RECORDS)), None)):
        found = made(args.world, *run, args.work_dir)
        with RECORDS.open("a", encoding="utf-8") as file:
            file.write(json.dumps(found) + "\n")
        print(found["cell"], found["aesthetics"], f"{found['cpu_s']} s", flush=True)
    records = claims.read(RECORDS)
    tables = "\n\n".join(
        f"{'The flow toy' if world == 'flow' else 'The toy'}:\n\n{table(world, records)}" for world in WORLDS
    )
    fill(PAGE, tables, "batch_sizes")
    print(tables)


if __name__ == "__main__":
    main()
