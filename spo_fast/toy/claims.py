"""`python -m spo_fast.toy.claims`: the paper's comparisons on a world whose true scores are known, at equal compute.

Every method and ablation is trained from the same base until it has spent the same number of UNet sample-forwards (a
backward counts as two), and its pictures of the test prompts are scored by the world itself, and by the toy's
PickScore, which trains none of them but the ablation of its name. Learning rates come from one grid, by pictures of
the tuning prompts. One record a run goes to --records as soon as it is done, so the whole can be spread over days: what
has a record is not run again, what has none is shown as not run.

    python -m spo_fast.toy.claims                       # run what is missing, in order of importance, then the tables
    python -m spo_fast.toy.claims --budget_s 1800       # stop starting runs after half an hour
    python -m spo_fast.toy.claims --contenders spo dpo  # of these alone; others can run at the same time beside it
    python -m spo_fast.toy.claims --cell spo/0 --learning_rate 5e-4   # one run, whatever is recorded; prints its record
    python -m spo_fast.toy.claims --tables              # run nothing
    python -m spo_fast.toy.claims --size large --budget_s 3000   # for a GPU: builds a larger toy first
"""

from __future__ import annotations

import functools
import json
import math
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from spo_fast import cli, train, train_spm
from spo_fast.checkpoint import versions, write_atomically
from spo_fast.config import RunError
from spo_fast.preference_report import estimate, markdown
from spo_fast.scorers import load_metric
from spo_fast.toy import build, evaluate, world
from spo_fast.toy.pipeline import SIZES, Size, flags_of, toy_files
from spo_fast.trainer import Run

BUDGET = 24_000  # UNet sample-forwards of a training, a backward counted as two
MARKS = (0.25, 0.5, 0.75)  # of the budget: scored on the way, for the curve
PICTURES, MARK_PICTURES = 512, 128
GRID = (1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3)  # learning rates of every method
TUNING_SEED = 100
SEEDS = (0, 1, 2)
OWN = "guidance 2"  # of the base's scores: the preset's, with which all are trained and scored
LAYOUT_LOSS = 0.03  # a learning rate that costs more of the layout than this is not chosen; nor a point of a curve kept
PAIRS, PAIRS_SEED = build.PAIRS, build.PAIRS_SEED  # those that the shipped preference model was trained on
SIGMAS = 2.0
"""A claim counts as reproduced if the difference over seeds exceeds so many of its standard errors, as not reproduced
if it exceeds them the other way; between, it is undecided."""


@dataclass(frozen=True)
class Contender:
    """How a run differs from the toy's preset."""

    settings: Mapping[str, Any] = field(default_factory=dict)
    like: str = ""
    """Whose learning rate it takes; "": it has its own from the grid."""
    random_picks: bool = False
    judged: bool = True
    """It needs a preference model, whose training belongs to its cost."""

    @property
    def recorded(self) -> dict[str, Any]:
        """The settings as JSON gives them back."""
        return json.loads(json.dumps(dict(self.settings)))


# whole trajectories take many UNet calls a prompt: fewer prompts and smaller steps give as many updates
FEW = {"sample_batch_size": 4}
LABELLED = {"pairs": "{pairs}", "cache_latents": False, "sample_batch_size": 64, "train_batch_size": 16}
MAIN = {
    "spo": Contender(),
    "mspo": Contender({"method": "mspo"}),
    # beta: the best of 5000 (published, for other latents), 500, 50 and 5 on the tuning prompts (benchmarks/LOG.md)
    "dpo": Contender({"method": "dpo", **LABELLED, "beta": 50.0}, judged=False),
    "ddpo": Contender({"method": "ddpo", **FEW, "train_batch_size": 20}),
}
ABLATIONS = {
    "random picks": Contender(like="spo", random_picks=True),
    "winner start": Contender({"next_start": "winner"}, like="spo"),
    "loser start": Contender({"next_start": "loser"}, like="spo"),
    "blind judge": Contender({"spm_path": "{blind}", "spm_time_conditioned": False}, like="spo"),
    "PickScore": Contender({"scorer": ("pickscore",)}, like="spo"),
    "all noise levels": Contender({"branch_start": 0}, like="spo"),
}
REST = {
    "mapo": Contender({"method": "mapo", **LABELLED}, judged=False),
    "d3po": Contender({"method": "d3po", **FEW}),
    "dpok": Contender({"method": "dpok", **FEW, "train_batch_size": 20}, like="ddpo"),
    "dense": Contender({"method": "dense", **FEW}),
    "gradspo": Contender({"method": "gradspo"}),
    "lpo": Contender({"method": "lpo", "lrm_path": "{lrm}"}),
}
CONTENDERS = MAIN | ABLATIONS | REST

# ---------------------------------------------------------------------------------------------------- what is counted


class Meter:
    """UNet sample-forwards since it was made: a forward that will have a backward counts thrice."""

    def __init__(self, unet: nn.Module):
        self.spent, self.on = 0, True
        unet.register_forward_pre_hook(self._count)

    def _count(self, _: nn.Module, args: tuple[Any, ...]) -> None:
        if self.on:
            self.spent += len(args[0]) * (3 if torch.is_grad_enabled() else 1)


def scores_of(run: Run, prompts: list[str], count: int) -> dict[str, list[float]]:
    """True scores (mean, standard error, pictures) of the policy's pictures, always from the same noise; held_out: the
    toy's PickScore; diversity: how far two pictures of one prompt are apart, root mean square over pixels."""
    wanted = (prompts * math.ceil(count / len(prompts)))[:count]
    pixels = evaluate.pictures(run, wanted, run.cfg.sample.guidance_scale, seed=0)
    scores = evaluate.true_scores(pixels, wanted) | {"held_out": held_out(run, pixels, wanted)}
    found = {name: list(estimate(value)) for name, value in scores.items()}
    again = len(wanted) - len(prompts)
    apart = (pixels[:again] - pixels[len(prompts) :]).square().mean((1, 2, 3)).sqrt() if again > 0 else torch.zeros(1)
    return {**found, "diversity": list(estimate(apart))}


@torch.no_grad()
def held_out(run: Run, pixels: Tensor, prompts: list[str]) -> Tensor:  # (B, 3, 16, 16) -> (B,)
    paths = {"pickscore": run.cfg.scorer.pickscore_path or toy_files()["pickscore"]}
    judge = load_metric("pickscore", paths, run.model.tokenize, "cpu", torch.float32)
    return judge.score_pixels(pixels, torch.zeros((), dtype=torch.long), judge.encode(prompts))


# ---------------------------------------------------------------------------------------------------- a run


def cell(name: str, seed: int, learning_rate: float | None, work: Path) -> dict[str, Any]:
    """Train a contender on the budget and score it; learning_rate=None: the toy preset's own."""
    contender, tuning = CONTENDERS[name], seed == TUNING_SEED
    settings = {k: v.format(**materials(work, v)) if isinstance(v, str) else v for k, v in contender.settings.items()}
    arguments = ["--model", "toy", "--seed", str(seed), "--num_validation_images", "0", "--num_train_epochs", "100000"]
    arguments += ["--checkpointing_steps", "100000000", *toy_flags(work)]
    for flag, value in (settings | ({"learning_rate": learning_rate} if learning_rate else {})).items():
        arguments += [f"--no-{flag}"] if value is False else [f"--{flag}", *map(str, _listed(value))]
    with tempfile.TemporaryDirectory(dir=work) as directory:
        run: Run = train.build(train.parse([*arguments, "--output_dir", directory]))
        if contender.random_picks:
            run.scorer = evaluate.TrueScorer(random_seed=seed)
        meter, curve = Meter(run.policy.unet), []
        wait = [] if tuning else [share * BUDGET for share in MARKS]
        iterate = run.iterate

        def until_spent(iteration: int, timer: Any) -> dict[str, Any] | None:
            record = iterate(iteration, timer)
            if meter.spent >= BUDGET:
                run.total = iteration + 1
            elif wait and meter.spent >= wait[0]:
                wait.pop(0)
                meter.on = False
                curve.append({"spent": meter.spent, **scores_of(run, world.TEST, MARK_PICTURES)})
                meter.on = True
            return record

        accuracy = run.held_out_accuracy

        def uncounted() -> float | None:  # looking at held-out pairs is no training
            meter.on = False
            found = accuracy()
            meter.on = True
            return found

        run.iterate = until_spent  # type: ignore[method-assign]
        run.held_out_accuracy = uncounted  # type: ignore[method-assign]
        started, started_wall = time.process_time(), time.monotonic()
        run.train()
        cpu_s, wall_s = time.process_time() - started, time.monotonic() - started_wall
        if meter.spent < BUDGET:
            raise RunError(f"{name} was stopped before its budget was spent, so it is not recorded.")
        meter.on = False
        prompts, count = (world.TUNE, MARK_PICTURES) if tuning else (world.TEST, PICTURES)
        last = {"spent": meter.spent, **scores_of(run, prompts, count)}
        state = run.state
    return {
        **{"cell": key(name, seed, learning_rate if tuning else None), "name": name, "seed": seed},
        **{"settings": contender.recorded, "learning_rate": run.cfg.optim.learning_rate},
        **{**last, "curve": [*curve, last]},
        **{"iterations": state.iteration, "optimizer_steps": state.optimizer_steps, "pairs": state.pairs},
        **{"cpu_s": round(cpu_s, 1), "wall_s": round(wall_s, 1)},
    }


def _listed(value: Any) -> Iterable[Any]:
    return value if isinstance(value, tuple) else (value,)


def size_of(work: Path) -> Size:
    """Of the toy that runs in this directory train: the one built there (--size large), or the shipped one."""
    record = work / "toy" / "build.json"
    return SIZES[json.loads(record.read_text())["pretraining"]["size"]] if record.is_file() else SIZES["small"]


def toy_flags(work: Path, scorers: bool = True) -> list[str]:
    size = size_of(work)
    return [] if size.name == "small" else [*flags_of(work / "toy", scorers), *build.precision(size)]


def materials(work: Path, text: str) -> dict[str, str]:
    """Paths of what a setting asks for in braces, made when first asked for: pairs, and models trained on them."""
    made: dict[str, str] = {}
    pairs = work / "pairs.parquet"
    if any(f"{{{what}}}" in text for what in ("pairs", "blind", "lrm")):
        if not pairs.is_file():
            build.write_pairs(pairs, PAIRS, PAIRS_SEED, scale=size_of(work).scale)
        made["pairs"] = str(pairs)
    for what, flags in (("blind", ["--no-time_conditioned"]), ("lrm", ["--parameterisation", "latent"])):
        if f"{{{what}}}" in text:
            target = work / what / "preference_model"
            if not target.is_dir():
                out = ["--output_dir", str(work / what), "--resume_from_checkpoint", "latest"]
                toy = ["--model", "toy", *toy_flags(work, scorers=False)]
                if train_spm.main([*toy, "--pairs", str(pairs), *out, *flags]) != 0:
                    raise RuntimeError(f"training {what} failed")
            made[what] = str(target)
    return made


def judge(work: Path) -> dict[str, Any]:
    """What the shipped step-aware preference model costs, trained again on its pairs. It starts from PickScore, whose
    own training is not counted: it is given, as in the paper."""
    pairs = materials(work, "{pairs}")["pairs"]
    with tempfile.TemporaryDirectory(dir=work) as directory:
        started = time.process_time()
        toy = ["--model", "toy", *toy_flags(work, scorers=False)]
        if train_spm.main([*toy, "--pairs", pairs, "--output_dir", directory]) != 0:
            raise RuntimeError("training the judge failed")
        return {"cell": "judge", "pairs": PAIRS, "cpu_s": round(time.process_time() - started, 1)}


# ---------------------------------------------------------------------------------------------------- all runs


def key(name: str, seed: int, learning_rate: float | None = None) -> str:
    return f"{name}/{seed}" if learning_rate is None else f"{name}/tuning/{learning_rate:g}"


def plan() -> list[tuple[str, int, float | None]]:
    """(name, seed, learning rate of the grid) in order of importance; the grid of a group comes before its seeds."""
    runs: list[tuple[str, int, float | None]] = []
    for group in (MAIN, ABLATIONS, REST):
        tuned = [name for name, contender in group.items() if not contender.like]
        runs += [(name, TUNING_SEED, lr) for lr in GRID for name in tuned]
        runs += [(name, seed, None) for seed in SEEDS for name in group]
    return runs


def current(records: Mapping[str, Any]) -> dict[str, Any]:
    """Without runs of other settings than a contender has now, or, of seeds, of a learning rate that is not chosen."""

    def stale(record: Mapping[str, Any]) -> bool:
        if record["cell"] in ONCE or record["seed"] == TUNING_SEED:
            return False
        rate = chosen_rate(record["name"], records)
        return rate is not None and not math.isclose(rate, record["learning_rate"])

    records = {
        cell: record
        for cell, record in records.items()
        if cell in ONCE or record.get("settings", {}) == CONTENDERS[record["name"]].recorded
    }

    return {cell: record for cell, record in records.items() if not stale(record)}


def chosen_rate(name: str, records: Mapping[str, Any]) -> float | None:
    """The grid's best for the aesthetics of tuning prompts, layout kept; None while the grid is not complete."""
    owner = CONTENDERS[name].like or name
    tried = [records.get(key(owner, TUNING_SEED, lr)) for lr in GRID]
    if any(r is None for r in tried) or "base" not in records:
        return None
    floor = records["base"]["tuning"]["layout"][0] - LAYOUT_LOSS
    safe = [r for r in tried if r and r["layout"][0] >= floor] or [r for r in tried if r]
    return max(safe, key=lambda r: r["aesthetics"][0])["learning_rate"]


def base(work: Path) -> dict[str, Any]:
    """The base model's scores at several guidance scales: what guidance alone gives."""
    with tempfile.TemporaryDirectory(dir=work) as directory:
        run = train.build(train.parse(["--model", "toy", *toy_flags(work), "--output_dir", directory]))
        found: dict[str, Any] = {"cell": "base", "tuning": scores_of(run, world.TUNE, MARK_PICTURES)}
        for g in evaluate.GUIDANCE_SCALES:
            run.cfg = run.cfg.with_fields(guidance_scale=g)
            found[f"guidance {g:g}"] = scores_of(run, world.TEST, PICTURES)
            if f"guidance {g:g}" == OWN:
                found["marks"] = scores_of(run, world.TEST, MARK_PICTURES)
    return found


ONCE = {"base": base, "judge": judge}


def software() -> dict[str, Any]:
    """What a number depends on besides its command."""
    here = Path(__file__).parent
    ask = subprocess.run(["git", "-C", str(here), "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    return {"commit": ask.stdout.strip() or None, "versions": versions(), "threads": torch.get_num_threads()}


def read(path: Path) -> dict[str, Any]:
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    return {record["cell"]: record for record in map(json.loads, lines)}


def run_missing(path: Path, work: Path, budget_s: float, contenders: Collection[str] = tuple(CONTENDERS)) -> None:
    """Every run of the contenders without a record, until the time is spent."""
    started = time.monotonic()
    path.parent.mkdir(parents=True, exist_ok=True)

    size = size_of(work).name
    command = "python -m spo_fast.toy.claims" + (f" --size {size}" if size != "small" else "")
    if others := {r.get("size", "small") for r in read(path).values()} - {size}:
        raise ValueError(f"{path} holds runs of the {others.pop()} toy, not of the {size} one. Give another --records.")

    def record(make: Callable[[], dict[str, Any]], name: str, rate: float | None = None) -> None:
        again = f"{command} --cell '{name}'" + (f" --learning_rate {rate:g}" if rate else "")
        found = {**make(), "size": size, "command": again, **software()}
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(found) + "\n")

    for name, once in ONCE.items():
        if name not in read(path):
            record(functools.partial(once, work), name)
    for name, seed, lr in plan():
        records = current(read(path))
        what = key(name, seed, lr)
        if what in records or name not in contenders:
            continue
        if time.monotonic() - started > budget_s:
            return
        rate = chosen_rate(name, records) if lr is None else lr
        if rate is None:
            continue  # its grid is not complete
        print(f"== {what} at {rate:g}", flush=True)
        record(functools.partial(cell, name, seed, rate, work), what, rate if lr is None else None)


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
    return [records[key(name, seed)] for seed in SEEDS if key(name, seed) in records]


def score_table(records: Mapping[str, Any]) -> str:
    columns = ("aesthetics", "layout", "held_out", "out_of_range", "diversity")
    rows = [["contender", "seeds", "learning rate", *columns, "UNet rows", "CPU s, scoring too"]]
    for g in evaluate.GUIDANCE_SCALES if "base" in records else ():
        scores = records["base"][f"guidance {g:g}"]
        rows.append([f"base, guidance {g:g}", "", "", *(f"{scores[c][0]:.3f} ± {scores[c][1]:.3f}" for c in columns)])
        rows[-1] += ["0", "0"]
    for name in CONTENDERS:
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
    return record


def at_a_quarter(records: Mapping[str, Any]) -> Point:
    return lambda record: curve_of(record, records)[0]


def layout_kept(records: Mapping[str, Any]) -> Point:
    floor = records["base"][OWN]["layout"][0] - LAYOUT_LOSS

    def best(record: Mapping[str, Any]) -> Mapping[str, Any] | None:
        safe = [point for point in curve_of(record, records) if point["layout"][0] >= floor]
        return max(safe, key=lambda point: point["aesthetics"][0], default=None)

    return best


def difference(
    a: str, b: str, records: Mapping[str, Any], score: str = "aesthetics", of_a: Point = at_end, of_b: Point = at_end
) -> tuple[float, float] | None:
    """a - b over the seeds that both have, paired by seed; None with fewer than two of them."""
    runs = [(records[key(a, s)], records[key(b, s)]) for s in SEEDS if key(a, s) in records and key(b, s) in records]
    both = [(x, y) for run_a, run_b in runs if (x := of_a(run_a)) is not None and (y := of_b(run_b)) is not None]
    if len(both) < 2:
        return None
    gaps = [x[score][0] - y[score][0] for x, y in both]
    return over_seeds(gaps, [math.hypot(x[score][1], y[score][1]) for x, y in both])


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


def verdict(found: tuple[float, float] | None) -> str:
    if found is None:
        return "not run"
    mean, error = found
    return "reproduced" if mean > SIGMAS * error else "not reproduced" if mean < -SIGMAS * error else "undecided"


def claims_table(records: Mapping[str, Any]) -> str:
    rows = [["claim of the paper", "difference in aesthetics", "in layout", "in aesthetics, layout kept", "verdict"]]
    kept = layout_kept(records) if "base" in records else at_end
    for claim, (a, b, *point) in CLAIMS.items():
        of_a = point[0](records) if point else at_end
        found, layout = (difference(a, b, records, score, of_a) for score in ("aesthetics", "layout"))
        safe = None if point else difference(a, b, records, of_a=kept, of_b=kept)
        if point and (share := rows_share(a, b, records, of_a)):
            claim += f" ({share:.0%} of its rows)"
        cells = ["" if d is None else f"{d[0]:+.3f} ± {d[1]:.3f}" for d in (found, layout, safe)]
        rows.append([claim, *cells, verdict(found)])
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
    runs = [records[cell] for lr in GRID if (cell := key(name, TUNING_SEED, lr)) in records]
    return statistics.median(r["cpu_s"] / r["spent"] for r in runs) if runs else None


def plot(records: Mapping[str, Any], path: Path) -> None:
    """Aesthetics against UNet rows spent, a line a contender: mean over seeds, and their range. The main methods also
    against CPU minutes, to which the preference model's training belongs."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(2, 2, figsize=(10, 7.5), layout="constrained", sharey=True)
    judge_s = records.get("judge", {}).get("cpu_s")
    start = records["base"][OWN]["aesthetics"][0]
    spo = {"spo": MAIN["spo"]} if "spo" in MAIN else {}
    groups = [
        ("methods", MAIN),
        ("methods, by time", MAIN),
        ("ablations of spo", spo | ABLATIONS),
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


def tables(records: Mapping[str, Any]) -> str:
    done = sum(key(*run) in records for run in plan())
    head = f"{done} of {len(plan())} runs; {BUDGET:,} UNet rows each, {PICTURES} pictures of {len(world.TEST)} prompts"
    return "\n\n".join([head, score_table(records), claims_table(records), cost_table(records)])


def main(arguments: list[str] | None = None) -> int:
    return cli.guarded(lambda: claims(arguments), arguments)


def claims(arguments: list[str] | None) -> None:
    parser = cli.Parser("python -m spo_fast.toy.claims", (__doc__ or "").split("\n")[0])
    parser.add_argument("--size", choices=tuple(SIZES), default="small", help="of the toy; large: for a GPU")
    parser.add_argument("--records", type=Path, help="one line a run (default runs/claims[-large]/records.jsonl)")
    parser.add_argument("--work_dir", type=Path, help="pairs and models on the way (default work, beside the records)")
    parser.add_argument("--budget_s", type=float, default=math.inf, help="no run is started later than this")
    all_of_them = tuple(CONTENDERS)
    parser.add_argument("--contenders", nargs="+", choices=all_of_them, default=all_of_them, help="run these alone")
    parser.add_argument("--cell", help="NAME/SEED or NAME/tuning/RATE: only this run, whatever is recorded")
    parser.add_argument("--learning_rate", type=float, help="of --cell (default: the recorded or the grid's best)")
    parser.add_argument("--tables", action="store_true", help="run nothing")
    args = parser.parse_args(arguments)
    size, end = SIZES[args.size], time.monotonic() + args.budget_s
    path = args.records or Path("runs/claims" if args.size == "small" else "runs/claims-large") / "records.jsonl"
    work = args.work_dir or path.parent / "work"
    if not args.tables:
        work.mkdir(parents=True, exist_ok=True)
    if not args.tables and args.size != "small" and size_of(work).name != args.size:
        given = (size, 0, size.steps or build.STEPS, build.PAIRS)  # seed 0
        if not build.build(work / "toy-build", work / "toy", *given, deadline=end):
            print("The budget ended before the toy was built: the same command goes on.")
            return
    if args.cell is not None:
        print(json.dumps(repeated(args.cell, read(path), work, args.learning_rate), indent=1))
        return
    if not args.tables:
        run_missing(path, work, end - time.monotonic(), args.contenders)
    records = current(read(path))
    text = tables(records)
    write_atomically(path.with_suffix(".md"), text + "\n")
    if "base" in records:
        plot(records, path.with_suffix(".png"))
    print(text)


def repeated(what: str, records: Mapping[str, Any], work: Path, rate: float | None = None) -> dict[str, Any]:
    """A run by its name, as recorded runs were made. Raises ValueError for one that there is not."""
    if what in ONCE:
        return ONCE[what](work)
    runs = {key(*run): run for run in plan()}
    if what not in runs:
        raise ValueError(f"--cell {what} is no run. Names: {', '.join(CONTENDERS)}; as in spo/0 or spo/tuning/0.0005.")
    name, seed, lr = runs[what]
    rate = rate or lr or (records.get(what) or {}).get("learning_rate") or chosen_rate(name, records)
    if rate is None:
        raise ValueError(f"--cell {what} needs --learning_rate: --records has no grid of {name}.")
    return cell(name, seed, rate, work)


if __name__ == "__main__":
    sys.exit(main())
