"""Does it work on the world whose true scores are known? Runs of the toy over several seeds, one record a run.

    python -m benchmarks.toy quality --seeds 0 1 2     # SPO, and random picks in the preference model's place
    python -m benchmarks.toy spm --seeds 0 1 2         # preference models with and without the timestep, and PickScore
    python -m benchmarks.toy picture --run runs/demo   # real pictures, the base's and the trained model's, as one PNG

Records go to benchmarks/results/toy_<what>.jsonl; a run whose record is there is not done again.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.records import RESULTS, software
from spo_fast import train, train_spm
from spo_fast.config.tables import markdown
from spo_fast.data import toy_world
from spo_fast.evaluation.pages.run_record import read_metrics
from spo_fast.toy import build, evaluate
from spo_fast.training.loop import Run

NUM_IMAGES = 1024
SPM_PAIRS, SPM_HELD_OUT = 8192, 1024


def quality(seed: int, random_picks: bool, work_dir: Path) -> dict[str, Any]:
    """Train the toy's preset with a seed; true scores of the base and of what it became on the same noise."""
    name = f"{'random' if random_picks else 'spo'}-{seed}"
    run: Run = train.build(train.parse(["--model", "toy", "--seed", str(seed), "--output_dir", str(work_dir / name)]))
    if random_picks:
        run.scorer = evaluate.TrueScorer(random_seed=seed)
    start = time.process_time()
    run.train()
    cpu_s = time.process_time() - start
    table, numbers = evaluate.report(run, NUM_IMAGES, seed, scales=())
    print(table)
    record = {"run": name, "seed": seed, "picks": "random" if random_picks else "spm", "scores": numbers}
    if not random_picks:
        with run.policy.reference():
            spread = evaluate.candidate_spread(run, toy_world.TEST, 4, seed)
        record |= {f"{what}_spread": spread.spread(what) for what in ("layout", "aesthetics")}
    return {**record, "cpu_s": round(cpu_s, 1), "optimizer_steps": run.state.optimizer_steps, "pairs": run.state.pairs}


def preference_models(seed: int, work_dir: Path) -> dict[str, Any]:
    """Train a conditioned and an un-conditioned model alike; their agreement with the labels beside PickScore's.

    Held out are pairs of the tuning prompts, which none of them, PickScore included, was trained on.
    """
    pairs, held_out = work_dir / f"pairs-{seed}.parquet", work_dir / f"held-out-{seed}.parquet"
    build.write_pairs(pairs, SPM_PAIRS, 5000 + seed)
    build.write_pairs(held_out, SPM_HELD_OUT, 6000 + seed, toy_world.TUNE)

    def command(name: str, *more: str) -> int:
        common = ("--model", "toy", "--pairs", str(pairs), "--seed", str(seed), "--output_dir", str(work_dir / name))
        held = ("--validation_pairs", str(held_out), "--max_validation_pairs", str(SPM_HELD_OUT))
        return train_spm.main([*common, *held, "--validation_steps", "100000", *more])

    blind = work_dir / f"blind-{seed}"
    assert command(blind.name, "--no-time_conditioned") == 0
    aware = work_dir / f"aware-{seed}"
    assert command(aware.name, "--compare_with", f"unconditioned={blind / 'preference_model'}") == 0
    report = json.loads((aware / "evaluation.json").read_text())
    steps = read_metrics(aware / "metrics.jsonl")
    phases = {k: round(statistics.median(r[k] for r in steps), 2) for k in steps[0] if k.endswith("_ms")}
    pairs_used = {"pairs": SPM_PAIRS, "held_out": SPM_HELD_OUT}
    return {"run": f"spm-{seed}", "seed": seed, **pairs_used, **report, "median_step": phases}


def recorded(path: Path, runs: dict[str, Callable[[Path], dict[str, Any]]]) -> list[dict[str, Any]]:
    """The records of these runs, made where they are missing."""
    found = {r["run"]: r for r in map(json.loads, path.read_text().splitlines())} if path.is_file() else {}
    with tempfile.TemporaryDirectory() as work_dir:
        for name, run in runs.items():
            if name not in found:
                found[name] = {**run(Path(work_dir)), **software(), "threads": torch.get_num_threads()}
                path.parent.mkdir(parents=True, exist_ok=True)
                with path.open("a") as file:
                    file.write(json.dumps(found[name]) + "\n")
    return [found[name] for name in runs]


def quality_records(seeds: list[int], path: Path = RESULTS / "toy_quality.jsonl") -> list[dict[str, Any]]:
    runs: dict[str, Callable[[Path], dict[str, Any]]] = {}
    for seed in seeds:
        for random_picks in (False, True):
            name = f"{'random' if random_picks else 'spo'}-{seed}"
            runs[name] = lambda d, seed=seed, random_picks=random_picks: quality(seed, random_picks, d)
    return recorded(path, runs)


def spm_records(seeds: list[int], path: Path = RESULTS / "toy_spm.jsonl") -> list[dict[str, Any]]:
    return recorded(path, {f"spm-{seed}": lambda d, seed=seed: preference_models(seed, d) for seed in seeds})


def quality_table(records: list[dict[str, Any]]) -> str:
    rows = [
        ["run", "aesthetics before", "after", "gain", "layout before", "after", "out of range after", "pairs", "steps"]
    ]
    records = sorted(records, key=lambda r: (r["picks"] != "spm", r["seed"]))
    for r in records:
        scores = r["scores"]
        before, after = (next(v for k, v in scores.items() if k.endswith(f"({w})")) for w in ("before", "after"))
        gain = scores["gain"]["aesthetics"]
        rows.append(
            [
                r["run"],
                *(f"{scores_['aesthetics'][0]:.2f}" for scores_ in (before, after)),
                f"{gain[0]:+.2f} ± {gain[1]:.2f}",
                *(f"{scores_['layout'][0]:.3f}" for scores_ in (before, after)),
                f"{after['out_of_range'][0]:.4f}",
                str(r["pairs"]),
                str(r["optimizer_steps"]),
            ]
        )
    for picks in dict.fromkeys(r["picks"] for r in records):
        alike = [r for r in records if r["picks"] == picks]
        aesthetics, layout = ("{:+.3f} ± {:.3f}".format(*gain_in(score, alike)) for score in ("aesthetics", "layout"))
        rows.append([f"{picks}, {len(alike)} seeds", "", "", aesthetics, "", layout, "", "", ""])
    return markdown(rows)


def spm_table(records: list[dict[str, Any]]) -> str:
    """Agreement with held-out labels: mean and spread over seeds; and what the timestep adds, with a verdict."""
    names = {"trained": "conditioned", "unconditioned": "un-conditioned", "initial": "PickScore"}
    rows = [["t", *names.values(), "conditioned - un-conditioned", "verdict", "conditioned - PickScore"]]
    for t in records[0]["accuracy"]["trained"]:
        cells = [mean_and_spread([r["accuracy"][n][t][0] for r in records]) for n in names]
        gain, error = gain_over("unconditioned", records, t)
        verdict = "better" if gain > 2 * error else "worse" if gain < -2 * error else "undecided"
        over_start = "{:+.3f} ± {:.3f}".format(*gain_over("initial", records, t))
        rows.append([t, *cells, f"{gain:+.3f} ± {error:.3f}", verdict, over_start])
    return markdown(rows)


def gain_over(name: str, records: list[dict[str, Any]], t: str) -> tuple[float, float]:
    """Mean over seeds of the conditioned model's gain in accuracy, paired, and its standard error."""
    return over_seeds([r["gain"][name][t] for r in records])


def gain_in(score: str, records: list[dict[str, Any]]) -> tuple[float, float]:
    """Mean over seeds of what training added to a true score, and its standard error."""
    return over_seeds([r["scores"]["gain"][score] for r in records])


def over_seeds(gains: list[list[float]]) -> tuple[float, float]:
    """Mean of several trainings' (gain, standard error, ...) and its standard error.

    The larger of two: of the pictures or pairs within trainings, and of the spread between trainings.
    """
    n, mean = len(gains), sum(g[0] for g in gains) / len(gains)
    within = math.sqrt(sum(g[1] ** 2 for g in gains)) / n
    between = math.sqrt(sum((g[0] - mean) ** 2 for g in gains) / max(1, n - 1) / n)
    return mean, max(within, between)


def mean_and_spread(values: list[float]) -> str:
    mean = sum(values) / len(values)
    return f"{mean:.3f} ({min(values):.3f}-{max(values):.3f})"


def picture(run_dir: Path, path: Path = RESULTS / "toy.png", side: int = 6, zoom: int = 5) -> Path:
    """Three squares: drawn by the world, by the base model, by the trained model from the same noise."""
    from PIL import Image, ImageDraw

    run = evaluate.load_run(run_dir)
    prompts = toy_world.TEST[: side * side]
    guidance = run.cfg.sample.guidance_scale
    with run.policy.reference():
        base = evaluate.pictures(run, prompts, guidance, seed=0)
    trained = evaluate.pictures(run, prompts, guidance, seed=0)
    real = toy_world.draw(prompts, torch.Generator().manual_seed(0))
    cell, margin, top = toy_world.SIZE * zoom + 2, 16, 24
    width = side * cell
    sheet = Image.new("RGB", (3 * width + 4 * margin, width + top + margin), "white")
    for i, (title, pictures) in enumerate((("real", real), ("base model", base), ("after SPO", trained))):
        left = margin + i * (width + margin)
        ImageDraw.Draw(sheet).text((left, 6), title, fill="black", font_size=14)
        for j, x in enumerate(pictures):
            pixels = ((x / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).contiguous().numpy()
            tile = Image.fromarray(pixels).resize((toy_world.SIZE * zoom,) * 2, Image.Resampling.NEAREST)
            sheet.paste(tile, (left + j % side * cell, top + j // side * cell))
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path)
    return path


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.toy", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("what", choices=("quality", "spm", "picture"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--run", type=Path, default=Path("runs/demo"), help="for picture: a finished toy run")
    args = parser.parse_args()
    if args.what == "quality":
        print(quality_table(quality_records(args.seeds)))
    elif args.what == "picture":
        print(picture(args.run))
    else:
        print(spm_table(spm_records(args.seeds)))


if __name__ == "__main__":
    main()
