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
    python -m spo_fast.toy.claims --tables              # run nothing; --docs PAGE: the tables go there
    python -m spo_fast.toy.claims --size large --budget_s 3000   # for a GPU: builds a larger toy first
    python -m spo_fast.toy.claims --size flow           # the same on the flow toy
"""

from __future__ import annotations

import functools
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from spo_fast import train, train_spm
from spo_fast.config.command import guarded
from spo_fast.config.errors import RunError
from spo_fast.config.flags import Parser
from spo_fast.data import toy_world
from spo_fast.data.files import versions, write_atomically
from spo_fast.evaluation.statistics import estimate
from spo_fast.models.files.toy import FLOW_WEIGHTS, SIZES, Size, flags_of, toy_files
from spo_fast.scorers.registry import load_metric
from spo_fast.toy import build, evaluate
from spo_fast.toy.claim_tables import (
    BUDGET,
    LOOKS,
    MARK_PICTURES,
    OWN,
    PICTURES,
    TUNING_SEED,
    chosen_rate,
    key,
    missing,
    page,
    plot,
)
from spo_fast.toy.contenders import CONTENDERS
from spo_fast.training.loop import Run

MARKS = (0.25, 0.5, 0.75)  # of the budget: scored on the way, for the curve

# ---------------------------------------------------------------------------------------------------- what is counted


class Meter:
    """A network's sample-forwards since it was made: a forward that will have a backward counts thrice."""

    def __init__(self, network: nn.Module):
        self.spent, self.on, self._seen = 0, True, 0
        network.register_forward_pre_hook(self._count)

    def _count(self, _: nn.Module, args: tuple[Any, ...]) -> None:
        if self.on:
            self.spent += len(args[0]) * (3 if torch.is_grad_enabled() else 1)

    def must_have_grown(self, by: str) -> None:
        """Raises RunError if nothing was spent since the last call."""
        if self.spent == self._seen:
            raise RunError(f"{by} spent nothing that is counted: the run would never end.")
        self._seen = self.spent


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
    """The toy's PickScore of pictures."""
    paths = {"pickscore": run.cfg.scorer.pickscore_path or toy_files()["pickscore"]}
    judge = load_metric("pickscore", paths, run.model.tokenize, "cpu", torch.float32)
    return judge.score_pixels(pixels, torch.zeros((), dtype=torch.long), judge.encode(prompts))


# ---------------------------------------------------------------------------------------------------- a run


def _endless() -> list[str]:
    """Flags of a run that its budget ends, and that is not looked at on the way. On a GPU it replays nothing, which no
    meter would see, and compiles nothing: it ends after minutes, not after its epochs."""
    counted = ["--no-cuda_graphs", "--compile", "off"]
    return [
        *counted,
        "--num_validation_images",
        "0",
        "--num_train_epochs",
        "100000",
        "--checkpointing_steps",
        "100000000",
    ]


def _as_flags(settings: Mapping[str, object]) -> list[str]:
    flags = []
    for name, value in settings.items():
        flags += [f"--no-{name}"] if value is False else [f"--{name}", *map(str, _listed(value))]
    return flags


def cell(
    name: str,
    seed: int,
    learning_rate: float | None,
    work: Path,
    marks: Iterable[float] = MARKS,
    budget: int | None = None,
    **more: object,
) -> dict[str, Any]:
    """Train a contender on the budget (None: the claims') and score it; learning_rate=None: the toy preset's own. more:
    settings beside the contender's, which are not recorded."""
    budget = BUDGET if budget is None else budget
    contender, tuning = CONTENDERS[name], seed == TUNING_SEED
    given = contender.on(size_of(work).name)
    if given is None:
        raise ValueError(f"--cell {name}: this method is refused on a flow model.")
    settings = {k: v.format(**materials(work, v)) if isinstance(v, str) else v for k, v in given.items()}
    settings |= more | ({"learning_rate": learning_rate} if learning_rate else {})
    arguments = [*toy_flags(work), "--seed", str(seed), *_endless(), *_as_flags(settings)]
    with tempfile.TemporaryDirectory(dir=work) as directory:
        run: Run = train.build(train.parse([*arguments, "--output_dir", directory]))
        if contender.random_picks:
            run.scorer = evaluate.TrueScorer(random_seed=seed)
        meter, curve, wait = Meter(run.policy.network), [], [share * budget for share in marks if not tuning]

        def until_spent(iteration: int) -> None:
            meter.must_have_grown(f"Iteration {iteration} of {name}")
            if meter.spent >= budget:
                run.total = iteration + 1
            elif wait and meter.spent >= wait[0]:
                wait.pop(0)
                meter.on = False
                curve.append({"spent": meter.spent, **scores_of(run, toy_world.TEST, MARK_PICTURES)})
                meter.on = True

        if run.pairs is not None:
            run.pairs.valid_rows = run.pairs.valid_rows[:0]  # looking at held-out pairs is no training
        run.after_iteration = until_spent
        started, started_wall = time.process_time(), time.monotonic()
        run.train()
        took = {"cpu_s": time.process_time() - started, "wall_s": time.monotonic() - started_wall}
        if meter.spent < budget:
            raise RunError(f"{name} was stopped before its budget was spent, so it is not recorded.")
        meter.on = False
        prompts, count = (toy_world.TUNE, MARK_PICTURES) if tuning else (toy_world.TEST, PICTURES)
        last = {"spent": meter.spent, **scores_of(run, prompts, count)}
        state = run.state
    return {
        "cell": key(name, seed, learning_rate if tuning else None),
        "name": name,
        "seed": seed,
        "settings": given,
        "learning_rate": run.cfg.optim.learning_rate,
        **last,
        "curve": [*curve, last],
        "iterations": state.iteration,
        "optimizer_steps": state.optimizer_steps,
        "pairs": state.pairs,
        **{name: round(seconds, 1) for name, seconds in took.items()},
    }


def _listed(value: object) -> Iterable[object]:
    return value if isinstance(value, list) else (value,)


def size_of(work: Path) -> Size:
    """Of the toy that runs in this directory train: the one built there (--size large), or a shipped one."""
    record = work / "toy" / "build.json"
    return SIZES[json.loads(record.read_text())["pretraining"]["size"]] if record.is_file() else SIZES["small"]


def of_flow(work: Path) -> None:
    """Makes this a directory of runs of the flow toy."""
    (work / "toy").mkdir(parents=True, exist_ok=True)
    shutil.copy(FLOW_WEIGHTS / "build.json", work / "toy")


def toy_flags(work: Path, scorers: bool = True) -> list[str]:
    """The model that a command of this directory uses: a shipped toy, or what was built there."""
    size = size_of(work)
    model = ["--model", "toy-flow" if size.blocks else "toy"]
    return model if size.name in build.SHIPPED else [*model, *flags_of(work / "toy", scorers), *build.precision(size)]


def materials(work: Path, text: str) -> dict[str, str]:
    """Paths of what a setting asks for in braces, made when first asked for: pairs, and models trained on them."""
    made: dict[str, str] = {}
    pairs = work / "pairs.parquet"
    if any(f"{{{what}}}" in text for what in ("pairs", "blind", "lrm")):
        if not pairs.is_file():
            # those that the shipped preference model was trained on
            build.write_pairs(pairs, build.PAIRS, build.PAIRS_SEED, scale=size_of(work).scale)
        made["pairs"] = str(pairs)
    for what, flags in (("blind", ["--no-time_conditioned"]), ("lrm", ["--parameterisation", "latent"])):
        if f"{{{what}}}" in text:
            target = work / what / "preference_model"
            if not target.is_dir():
                train_judge(work, target.parent, "--resume_from_checkpoint", "latest", *flags)
            made[what] = str(target)
    return made


def train_judge(work: Path, out: Path, *flags: str) -> None:
    """A preference model of the pairs, in out/preference_model. Raises RunError if there is none in the end."""
    toy = [*toy_flags(work, scorers=False), "--pairs", str(work / "pairs.parquet")]
    status = train_spm.main([*toy, "--output_dir", str(out), *flags])
    if status != 0 or not (out / "preference_model").is_dir():  # a signal stops a training in good order
        raise RunError("The training of a preference model failed or was stopped, so nothing is recorded of it.")


def judge(work: Path) -> dict[str, Any]:
    """What the shipped step-aware preference model costs, trained again on its pairs. It starts from PickScore, whose
    own training is not counted: it is given, as in the paper."""
    materials(work, "{pairs}")
    with tempfile.TemporaryDirectory(dir=work) as directory:
        started = time.process_time()
        train_judge(work, Path(directory))
        return {"cell": "judge", "pairs": build.PAIRS, "cpu_s": round(time.process_time() - started, 1)}


# ---------------------------------------------------------------------------------------------------- all runs


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
        if cell in ONCE or record.get("settings", {}) == CONTENDERS[record["name"]].on(record.get("size", "small"))
    }

    return {cell: record for cell, record in records.items() if not stale(record)}


def base(work: Path) -> dict[str, Any]:
    """The base model's scores at several guidance scales: what guidance alone gives."""
    with tempfile.TemporaryDirectory(dir=work) as directory:
        run = train.build(train.parse([*toy_flags(work), "--output_dir", directory]))
        found: dict[str, Any] = {"cell": "base", "tuning": scores_of(run, toy_world.TUNE, MARK_PICTURES)}
        for g in evaluate.GUIDANCE_SCALES:
            run.cfg = run.cfg.with_fields(guidance_scale=g)
            found[f"guidance {g:g}"] = scores_of(run, toy_world.TEST, PICTURES)
            if f"guidance {g:g}" == OWN:
                found["marks"] = scores_of(run, toy_world.TEST, MARK_PICTURES)
    return found


ONCE = {"base": base, "judge": judge}


def software() -> dict[str, Any]:
    """What a number depends on besides its command."""
    here = Path(__file__).parent
    ask = subprocess.run(["git", "-C", str(here), "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    return {"commit": ask.stdout.strip() or None, "versions": versions(), "threads": torch.get_num_threads()}


def read(path: Path) -> dict[str, Any]:
    """The records by name; of several of one name the last."""
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
        if name not in read(path) and not (name == "judge" and size == "flow"):  # judged by the small toy's
            record(functools.partial(once, work), name)
    while run := next(missing(records := current(read(path)), contenders, size), None):
        if time.monotonic() - started > budget_s:
            return
        name, seed, lr = run
        rate = chosen_rate(name, records) if lr is None else lr
        assert rate is not None
        print(f"== {key(*run)} at {rate:g}", flush=True)
        record(functools.partial(cell, name, seed, rate, work), key(*run), rate if lr is None else None)


# ---------------------------------------------------------------------------------------------------- tables


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns its exit status."""
    return guarded(lambda: claims(arguments), arguments)


def claims(arguments: list[str] | None) -> None:
    """The command: runs what is missing, then writes and prints the tables."""
    parser = Parser("python -m spo_fast.toy.claims", (__doc__ or "").split("\n")[0])
    parser.add_argument("--size", choices=tuple(SIZES), default="small", help="of the toy; large: for a GPU")
    parser.add_argument("--records", type=Path, help="one line a run (default runs/claims[-SIZE]/records.jsonl)")
    parser.add_argument("--work_dir", type=Path, help="pairs and models on the way (default work, beside the records)")
    parser.add_argument("--budget_s", type=float, default=math.inf, help="no run is started later than this")
    all_of_them = tuple(CONTENDERS)
    parser.add_argument("--contenders", nargs="+", choices=all_of_them, default=all_of_them, help="run these alone")
    parser.add_argument("--cell", help="NAME/SEED or NAME/tuning/RATE: only this run, whatever is recorded")
    parser.add_argument("--learning_rate", type=float, help="of --cell (default: the recorded or the grid's best)")
    parser.add_argument("--tables", action="store_true", help="run nothing")
    parser.add_argument("--docs", type=Path, help="the page of the tables (default beside the records, .md)")
    args = parser.parse_args(arguments)
    size, end = SIZES[args.size], time.monotonic() + args.budget_s
    path = args.records or Path("runs/claims" if args.size == "small" else f"runs/claims-{args.size}") / "records.jsonl"
    work = args.work_dir or path.parent / "work"
    if not args.tables:
        build.need_pyarrow("labelled pairs")
        work.mkdir(parents=True, exist_ok=True)
    if not args.tables and args.size == "flow":
        of_flow(work)
    if not args.tables and size_of(work).name != args.size:
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
    if "base" in records:
        plot(records, path.with_suffix(".png"))
    text = page_at(args.docs or path.with_suffix(".md"), path, records)
    print(text, end="")


def page_at(target: Path, path: Path, records: Mapping[str, Any]) -> str:
    """Writes the page of the records at `path`, with the command that writes it again. Returns its text."""
    picture = os.path.relpath(path.with_suffix(".png"), target.parent) if "base" in records else None
    docs = "" if target == path.with_suffix(".md") else f" --docs {target.as_posix()}"
    text = page(records, f"python -m spo_fast.toy.claims --tables --records {path.as_posix()}{docs}", picture)
    write_atomically(target, text)
    return text


def repeated(what: str, records: Mapping[str, Any], work: Path, rate: float | None = None) -> dict[str, Any]:
    """A run by its name, as recorded runs were made. Raises ValueError for one that there is not."""
    if what in ONCE:
        return ONCE[what](work)
    name, _, which = what.partition("/")
    try:
        seed, lr = (TUNING_SEED, float(which.removeprefix("tuning/"))) if "tuning" in which else (int(which), None)
    except ValueError:
        seed, lr = -1, None
    if name not in CONTENDERS or (lr is None and seed not in range(max(LOOKS))):
        raise ValueError(f"--cell {what} is no run. Names: {', '.join(CONTENDERS)}; as in spo/0 or spo/tuning/0.0005.")
    rate = rate or lr or (records.get(what) or {}).get("learning_rate") or chosen_rate(name, records)
    if rate is None:
        raise ValueError(f"--cell {what} needs --learning_rate: --records has no grid of {name}.")
    return cell(name, seed, rate, work)


if __name__ == "__main__":
    sys.exit(main())
