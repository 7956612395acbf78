"""SPO on the flow toy at equal counted cost, judged by the other toy's preference model; random picks, and the
published samplers' rows. What its own reaches, and other methods: spo_fast.toy.claims --size flow.

    python -m benchmarks.toy_flow                        # what is missing of all runs, then the table
    python -m benchmarks.toy_flow --run spo/0            # one run again; prints its record

Each run may spend BUDGET sample-forwards of the transformer (a backward counts as two), as spo_fast.toy.claims. The
learning rate of each sampler is the best of GRID on the tuning prompts with a seed of its own. Pictures of a row have
the same noise and prompts as the base model's, so differences are paired; their standard errors are those of a mean of
PICTURES pictures, and of the three seeds' means.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from spo_fast import train
from spo_fast.config.tables import markdown
from spo_fast.data import toy_world
from spo_fast.evaluation.statistics import estimate
from spo_fast.models.files.toy import toy_files
from spo_fast.toy import evaluate
from spo_fast.toy.claim_tables import BUDGET, TUNING_SEED
from spo_fast.toy.claims import Meter, software

GRID, SEEDS, PICTURES, TUNING_PICTURES = (1.25e-4, 2.5e-4, 5e-4, 1e-3), (0, 1, 2), 1024, 512
CONTENDERS: dict[str, tuple[str, ...]] = {
    name: ("--spm_path", str(toy_files()["spm"]), *own)
    for name, own in {"spo": (), "random picks": (), "flow_sde": ("--sampler", "flow_sde")}.items()
}
RATE_OF = {"random picks": "spo"}
RECORDS = Path(__file__).parent / "results" / "2026-11-30_toy_flow.jsonl"


def run(name: str, seed: int, rate: float) -> dict[str, Any]:
    """Train on the budget; true scores of its pictures, and of the base model's from the same noise."""
    tuning = seed == TUNING_SEED
    prompts, count = (toy_world.TUNE, TUNING_PICTURES) if tuning else (toy_world.TEST, PICTURES)
    wanted = (prompts * (count // len(prompts) + 1))[:count]
    with tempfile.TemporaryDirectory() as directory:
        words = ["--model", "toy-flow", "--seed", str(seed), "--learning_rate", str(rate), "--output_dir", directory]
        words += ["--num_validation_images", "0", "--num_train_epochs", "100000", "--checkpointing_steps", "100000000"]
        one = train.build(train.parse([*words, *CONTENDERS[name]]))
        if name == "random picks":
            one.scorer = evaluate.TrueScorer(random_seed=seed)
        meter = Meter(one.policy.network)

        def until_spent(iteration: int) -> None:
            if meter.spent >= BUDGET:
                one.total = iteration + 1

        one.after_iteration = until_spent
        started = time.process_time()
        one.train()
        spent, cpu_s = meter.spent, time.process_time() - started
        g = one.cfg.sample.guidance_scale
        after = evaluate.true_scores(evaluate.pictures(one, wanted, g, seed=0), wanted)
        with one.policy.reference():
            before = evaluate.true_scores(evaluate.pictures(one, wanted, g, seed=0), wanted)
        steps = [one.cfg.sample.first_branch, one.cfg.sample.last_branch, one.cfg.sample.num_steps]
        pairs, iterations = one.state.pairs, one.state.iteration
    scores = ("aesthetics", "layout", "share", "out_of_range")
    return {
        "run": f"{name}/{'tuning/' + format(rate, 'g') if tuning else seed}",
        "name": name,
        "seed": seed,
        "learning_rate": rate,
        "spent": spent,
        "iterations": iterations,
        "pairs": pairs,
        "trained_steps": steps,
        "cpu_s": round(cpu_s, 1),
        "before": {s: list(estimate(before[s])) for s in scores},
        "after": {s: list(estimate(after[s])) for s in scores},
        "paired": {s: list(estimate(after[s] - before[s])) for s in scores},
        **software(),
    }


def read() -> dict[str, Any]:
    """The records by their run's name."""
    lines = RECORDS.read_text(encoding="utf-8").splitlines() if RECORDS.is_file() else []
    return {record["run"]: record for record in map(json.loads, lines)}


def rate_of(name: str, records: dict[str, Any]) -> float:
    """The best of the grid on the tuning prompts."""
    who = RATE_OF.get(name, name)
    return max(GRID, key=lambda rate: records[f"{who}/tuning/{rate:g}"]["paired"]["aesthetics"][0])


def plan() -> list[tuple[str, int, float | None]]:
    """All runs, the grids first."""
    grids = [(name, TUNING_SEED, rate) for name in CONTENDERS if name not in RATE_OF for rate in GRID]
    return [*grids, *((name, seed, None) for seed in SEEDS for name in CONTENDERS)]


def table(records: dict[str, Any]) -> str:
    """A row a contender: gains of each seed, their mean with its standard error over seeds."""
    rows = [["", "learning rate", "aesthetics", "of each seed", "layout", "pictures"]]
    for name in CONTENDERS:
        found = [records[f"{name}/{seed}"] for seed in SEEDS if f"{name}/{seed}" in records]
        if not found:
            continue
        gains, layouts = (torch.tensor([r["paired"][s][0] for r in found]) for s in ("aesthetics", "layout"))
        errors = [r["paired"]["aesthetics"][1] for r in found]
        shown = ", ".join(f"{g:+.3f} +- {e:.3f}" for g, e in zip(gains.tolist(), errors, strict=True))
        spread = f" +- {float(gains.std() / len(found) ** 0.5):.3f}" if len(found) > 1 else ""
        rate = f"{found[0]['learning_rate']:g}"
        mean, layout = f"{float(gains.mean()):+.3f}{spread}", f"{float(layouts.mean()):+.4f}"
        rows.append([name, rate, mean, shown, layout, f"{sum(r['paired']['aesthetics'][2] for r in found):,}"])
    return markdown(rows)


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--run", help="one run's name, as in spo/0 or spo/tuning/0.001")
    parser.add_argument("--contenders", nargs="+", choices=tuple(CONTENDERS), default=tuple(CONTENDERS))
    args = parser.parse_args()
    records = read()
    if args.run:
        name, *which = args.run.split("/")
        seed = TUNING_SEED if which[0] == "tuning" else int(which[0])
        rate = float(which[1]) if which[0] == "tuning" else rate_of(name, records)
        print(json.dumps(run(name, seed, rate), indent=1))
        return
    for name, seed, rate in plan():
        what = f"{name}/{f'tuning/{rate:g}' if rate else seed}"
        if what not in read() and name in args.contenders:
            found = run(name, seed, rate or rate_of(name, read()))
            with RECORDS.open("a", encoding="utf-8") as file:
                file.write(json.dumps(found) + "\n")
            print(what, found["paired"]["aesthetics"], found["paired"]["layout"], f"{found['cpu_s']} s", flush=True)
    print(table(read()))


if __name__ == "__main__":
    main()
