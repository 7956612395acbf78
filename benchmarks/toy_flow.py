"""Methods on the flow toy at equal counted cost: SPO on the published samplers' rows, random picks, and the others.

    python -m benchmarks.toy_flow                        # what is missing of all runs, then the table
    python -m benchmarks.toy_flow --run spo/0            # one run again; prints its record

Each run may spend BUDGET sample-forwards of the transformer (a backward counts as two), as spo_fast.toy.claims. The
learning rate of each is the best of GRID on the tuning prompts with a seed of its own, twice and half beyond the grid's
ends while the best is there; one that costs more than .03 of the layout is not taken. Pictures of a row have
the same noise and prompts as the base model's, so differences are paired; their standard errors are those of a mean of
PICTURES pictures, and of the three seeds' means.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from spo_fast import train
from spo_fast.config.tables import markdown
from spo_fast.data import toy_world
from spo_fast.evaluation.statistics import estimate
from spo_fast.toy import build, evaluate
from spo_fast.toy.claim_tables import BUDGET, LAYOUT_LOSS, NO_LOSS, SIGMAS, TUNING_SEED, over_seeds
from spo_fast.toy.claims import Meter, software

GRID, SEEDS, PICTURES, TUNING_PICTURES = (1.25e-4, 2.5e-4, 5e-4, 1e-3), (0, 1, 2), 1024, 512
ENDS = 4
"""How often the grid may grow."""
BETA = ("--beta", "50")
EARLY = ("--guidance_scale", "1", "--branch_start", "0")
CONTENDERS: dict[str, tuple[str, ...]] = {
    "spo": (),
    "random picks": (),
    "flow_sde": ("--sampler", "flow_sde"),
    "stepgrpo": ("--method", "stepgrpo"),
    # toy/contenders.py: as many updates as others from few prompts
    **{
        name: ("--method", name, "--sample_batch_size", "4", "--train_batch_size", "20")
        for name in ("grpo", "nft", "awm", "ddpo")
    },
    "dpo": ("--method", "dpo", "--sample_batch_size", "64", "--train_batch_size", "16", "--no-cache_latents", *BETA),
    "unguided": EARLY,
    "by noise level": (*EARLY, "--scorer", "spm:1@0-500", "pickscore:1@501-1000"),
}
RATE_OF = {"random picks": "spo", "unguided": "spo", "by noise level": "spo"}
QUESTIONS = {
    "step-wise GRPO is above GRPO": ("stepgrpo", "grpo", "aesthetics"),
    "step-wise GRPO is above SPO": ("stepgrpo", "spo", "aesthetics"),
    "NFT is above GRPO": ("nft", "grpo", "aesthetics"),
    "scorers by noise level raise layout (unguided)": ("by noise level", "unguided", "layout"),
    NO_LOSS: ("by noise level", "unguided", "aesthetics"),
    "SPO is above Diffusion-DPO": ("spo", "dpo", "aesthetics"),
    "SPO is above DDPO": ("spo", "ddpo", "aesthetics"),
}
"""Written down before the runs; NFT and AWM draw and are scored without guidance."""
RECORDS = Path(__file__).parent / "results" / "2026-11-30_toy_flow.jsonl"


@functools.cache
def labelled_pairs() -> Path:
    """Those that the shipped preference model was trained on."""
    path = Path(tempfile.mkdtemp()) / "pairs.parquet"
    build.write_pairs(path, build.PAIRS, build.PAIRS_SEED)
    return path


def run(name: str, seed: int, rate: float) -> dict[str, Any]:
    """Train on the budget; true scores of its pictures, and of the base model's from the same noise."""
    tuning = seed == TUNING_SEED
    prompts, count = (toy_world.TUNE, TUNING_PICTURES) if tuning else (toy_world.TEST, PICTURES)
    wanted = (prompts * (count // len(prompts) + 1))[:count]
    with tempfile.TemporaryDirectory() as directory:
        words = ["--model", "toy-flow", "--seed", str(seed), "--learning_rate", str(rate), "--output_dir", directory]
        words += ["--num_validation_images", "0", "--num_train_epochs", "100000", "--checkpointing_steps", "100000000"]
        if name == "dpo":
            words += ["--pairs", str(labelled_pairs())]
        one = train.build(train.parse([*words, *CONTENDERS[name]]))
        if one.pairs is not None:
            one.pairs.valid_rows = one.pairs.valid_rows[:0]  # looking at held-out pairs is no training
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
        g = one.cfg.sample.guidance_scale  # of nft and awm 1
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
        "guidance": g,
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


def best_rate(name: str, records: dict[str, Any]) -> tuple[float, bool]:
    """The best rate tried or, with True beside it, the one to try next."""
    who = RATE_OF.get(name, name)
    for rate in GRID:
        if f"{who}/tuning/{rate:g}" not in records:
            return rate, True
    tried = {r["learning_rate"]: r for r in records.values() if r["name"] == who and r["seed"] == TUNING_SEED}
    kept = {rate: r for rate, r in tried.items() if r["paired"]["layout"][0] >= -LAYOUT_LOSS} or tried
    best = max(kept, key=lambda rate: kept[rate]["paired"]["aesthetics"][0])
    beyond = {max(tried): 2 * best, min(tried): best / 2}.get(best)
    return (best, False) if beyond is None or len(tried) >= len(GRID) + ENDS else (beyond, True)


def table(records: dict[str, Any]) -> str:
    """A row a contender: gains of each seed, their mean with its standard error over seeds."""
    rows = [["", "learning rate", "aesthetics", "gain", "of each seed", "layout", "pictures"]]
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
        end = f"{sum(r['after']['aesthetics'][0] for r in found) / len(found):.3f}"
        rows.append([name, rate, end, mean, shown, layout, f"{sum(r['paired']['aesthetics'][2] for r in found):,}"])
    return markdown(rows)


def answers(records: dict[str, Any]) -> str:
    """The questions, each with its difference, paired by seed, and verdict."""
    rows = [["question", "difference", "verdict"]]
    for question, (a, b, score) in QUESTIONS.items():
        runs = [(records[f"{a}/{s}"], records[f"{b}/{s}"]) for s in SEEDS if {f"{a}/{s}", f"{b}/{s}"} <= set(records)]
        if len(runs) < 2:
            rows.append([question, "", "not run"])
            continue
        gaps = [x["after"][score][0] - y["after"][score][0] for x, y in runs]
        mean, error = over_seeds(gaps, [math.hypot(x["paired"][score][1], y["paired"][score][1]) for x, y in runs])
        said = "yes" if mean > SIGMAS * error else "no" if mean < -SIGMAS * error else "undecided"
        if question == NO_LOSS:
            said = "no" if said == "no" else "yes"
        rows.append([f"{question}: {score}", f"{mean:+.3f} +- {error:.3f}", said])
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
        rate = float(which[1]) if which[0] == "tuning" else best_rate(name, records)[0]
        print(json.dumps(run(name, seed, rate), indent=1))
        return
    for name in args.contenders:
        while (todo := best_rate(name, read()))[1]:
            record(RATE_OF.get(name, name), TUNING_SEED, todo[0])
        for seed in SEEDS:
            if f"{name}/{seed}" not in read():
                record(name, seed, todo[0])
    print(table(read()))
    print(answers(read()))


def record(name: str, seed: int, rate: float) -> None:
    """One run, and its line in the records."""
    found = run(name, seed, rate)
    with RECORDS.open("a", encoding="utf-8") as file:
        file.write(json.dumps(found) + "\n")
    print(found["run"], found["paired"]["aesthetics"], found["paired"]["layout"], f"{found['cpu_s']} s", flush=True)


if __name__ == "__main__":
    main()
