"""Everything that needs a GPU, in one command that always leaves records.

    python benchmarks/gpu_run.py --out DIR [--only NAME ...] [--budget_s 540] [--size full|tiny] [--device cuda|cpu]
    python benchmarks/gpu_run.py --out DIR --call 1
    python benchmarks/gpu_run.py --out DIR2 --call 2 --done DIR/records.jsonl

Each job (a stage, or one row of a stage) runs in a process of its own under a time limit taken from the budget, the
most valuable first; a job that fails, is stopped or does not fit leaves a record that says so, and the next one runs.
A GPU that is lent for minutes is used in two calls (CALLS); the second begins with what the first did not end.
`python -m benchmarks.gpu_pack` puts together what travels with them, compile caches among it, and `python -m
benchmarks.gpu_rehearsal` runs both on a machine without a GPU.

The processes are forks of this one, which has imported the libraries (seconds a job) and never touched the device.
DIR/records.jsonl grows line by line; what the jobs print is in DIR/log.txt; a short table is printed last.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import multiprocessing
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:  # run as a script, Python puts benchmarks/ there instead
    sys.path.insert(0, str(ROOT))

# these import no package that may be missing
from benchmarks.records import Records, read, software, table  # noqa: E402
from spo_fast.config.command import for_pytorch  # noqa: E402

os.environ.update(for_pytorch(os.environ))  # before it is imported, here or by a job

RESERVE_S = 5.0  # kept of the budget for the table
FAILURES = 5  # of tests, after which the rest is given up

# ---------------------------------------------------------------------------------------------------- stages


@dataclass(frozen=True)
class Context:
    """What a job is told."""

    job: str
    records: Records
    size: str
    device: str
    prompts: int | None
    scratch: Path  # shared by the jobs of one run, removed at its end
    left_s: Callable[[], float]  # until the job is stopped
    valid_shares: tuple[float, ...] = (0.5, 1.0)  # of an iteration's comparisons
    repetitions: int = 5  # of an iteration, after its warm-up


def gpu_test_files() -> list[str]:
    """Of the files that name the mark: to collect all others takes longer than these run."""
    return sorted(str(f.relative_to(ROOT)) for f in (ROOT / "tests").glob("test_*.py") if "mark.gpu" in f.read_text())


def stage_tests(c: Context) -> None:
    """The tests that need a GPU, side by side, given up after a few failures; the summary line is the record."""
    path = ["tests/test_transition.py"] if c.size == "tiny" else gpu_test_files()
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-q", "-p", "no:cacheprovider", *path]
    command += ["--maxfail", str(FAILURES)]
    if importlib.util.find_spec("xdist") is not None and c.size == "full":
        command += ["-n", str(min(8, os.cpu_count() or 1)), "--dist", "worksteal"]
    try:
        done = subprocess.run(
            command, cwd=ROOT, capture_output=True, text=True, timeout=max(c.left_s() - 2, 1), check=False
        )
    except subprocess.TimeoutExpired as stopped:
        print(stopped.stdout)
        raise
    print(done.stdout, done.stderr, sep="\n")
    lines = [line for line in done.stdout.splitlines() if line.strip()]
    summary = lines[-1] if lines else done.stderr.strip()[-200:]
    # 5: nothing was collected, which on a machine without a GPU is as it should be
    sound = done.returncode == 0 or (done.returncode == 5 and c.device == "cpu")
    c.records.write("pytest -m gpu", "ok" if sound else "failed", summary=summary, error=None if sound else summary)


def stage_graph(c: Context) -> None:
    from benchmarks import bench_graph

    bench_graph.run(c.records, c.size, c.device)


OPS = ("transition", "preference_loss", "resize_normalize", "merge_lora", "lora_linear")
BLOCK_OPS = ("ada_norm", "gelu_tanh", "joint_heads")  # of a transformer's blocks
LAYER_OPS = ("group_norm_silu", "geglu", *BLOCK_OPS)  # each in a job of its own
"""benchmarks/bench_<op>.py, each with cases(size, device, modes)."""


def stage_ops(c: Context) -> None:
    bench_ops(c, OPS, ("default",))


def stage_ops_autotuned(c: Context) -> None:
    """Only if asked for: each compilation takes long."""
    bench_ops(c, OPS, ("max-autotune-no-cudagraphs",))


def stage_layer(c: Context) -> None:
    """An op of the networks' layers; c.job is "ops/geglu"."""
    bench_ops(c, c.job.split("/")[1:], ("default",))


def stage_ops_short(c: Context) -> None:
    """Each op at one shape, eager beside the kernels that are written for it: which of the card's two is ahead."""
    bench_ops(c, (*OPS, *LAYER_OPS), ())


def bench_ops(c: Context, names: Sequence[str], modes: tuple[str, ...]) -> None:
    """modes: torch.compile's, as a column each; with none only each op's first case, with gradients if it has any."""
    from benchmarks.timing import Case, time_cases

    cases: list[Case] = []
    for name in names:
        bench = importlib.import_module(f"benchmarks.bench_{name}")
        cases += bench.cases(c.size, c.device, modes if c.device == "cuda" else ())
    if not modes:
        first: dict[str, Case] = {}
        for case in sorted(cases, key=lambda case: "backward" not in case.name):
            first.setdefault(case.name.split()[0], case)
        cases = list(first.values())
    time_cases(cases, c.records, c.device, c.size)


def stage_ceilings(c: Context) -> None:
    from benchmarks import bench_libraries

    bench_libraries.run_ceilings(c.records, c.size, c.device)


def stage_libraries(c: Context) -> None:
    from benchmarks import bench_libraries

    bench_libraries.run(c.records, c.size, c.device)


def stage_iteration(c: Context) -> None:
    """A row of sd15 or sdxl (iteration.py); c.job is "sd15/ours+compile"."""
    from benchmarks import iteration

    kind, row = c.job.split("/", 1)
    technique = iteration.ROWS.get(row, iteration.Technique())
    if c.device == "cpu":
        technique = replace(technique, mixed_precision="no", scorer_dtype="no")
    setup = iteration.Setup(kind, c.size, c.device, c.prompts, technique.mixed_precision, rollouts=row != "truth")
    if row == "truth":
        iteration.truth(setup, c.scratch, c.records)
        return
    iteration.run_row(
        setup=setup,
        row=row,
        technique=technique,
        scratch=c.scratch,
        records=c.records,
        deadline=c.left_s,
        valid_shares=c.valid_shares,
        repetitions=c.repetitions if c.size == "full" else 1,
    )


def stage_hours(c: Context) -> None:
    """What gpu_hours.py needs besides iterations; c.job is "hours/sd15-dpo"."""
    from benchmarks import gpu_hours

    gpu_hours.run(c.job.split("/")[1], c.size, c.device, c.records, c.left_s)


def stage_hours_of_spo(c: Context) -> None:
    """Every pair kept, one iteration of the two rows that gpu_hours.py compares; c.job is "hours/sd15-spo"."""
    kind = c.job.removeprefix("hours/").removesuffix("-spo")
    for row in ("published", "ours+all"):
        stage_iteration(replace(c, job=f"{kind}/{row}", valid_shares=(1.0,), repetitions=1))


def stage_toy_large(c: Context) -> None:
    """The toy at a GPU's size, built and then as many runs of claims.py as the time allows; again with the same --out,
    it goes on. Its records are DIR/toy_large.jsonl. Its pairs need pyarrow."""
    from spo_fast.toy import claims

    if c.size == "tiny":
        c.records.write("toy_large", "skipped", reason="it has one size; the tests run a reduced one")
        return
    path = c.records.path.parent / "toy_large.jsonl"
    # a run that has begun ends: the longest of the toy's are minutes
    arguments = ["--size", "large", "--records", str(path), "--work_dir", str(path.parent / "toy_large")]
    if claims.main([*arguments, "--budget_s", f"{max(c.left_s() - 120, 0):.0f}"]) != 0:
        raise RuntimeError("see the log")
    c.records.write("toy_large", summary=f"{len(claims.read(path))} runs in {path.name}")


@dataclass(frozen=True)
class Job:
    """One process of a stage."""

    run: Callable[[Context], None]
    limit_s: float  # at most
    least_s: float  # with less left of the budget it is not started
    gives: str = ""  # what there is not, if it does not run
    default: bool = True  # else only if --only or a call names it


ITERATION_ROWS = (
    ("truth", 90, 15, "float32's loss and gradients: no row's gate is checked without them"),
    ("published", 120, 25, "the row that all others are compared with"),
    ("modern", 120, 25, "the published loop as one would write it today"),
    ("ours", 120, 25, "this package without its options"),
    ("ours+fuse", 120, 25, "the package's ops inside the networks"),
    ("ours+all", 240, 40, "this package at its fastest"),
    ("ours+compile", 240, 40, "torch.compile's share"),
    ("ours+graphs", 120, 25, "CUDA graphs' share"),
    ("ours+merged", 120, 25, "merged rollouts"),
    ("ours+all+merged", 240, 40, "all options and merged rollouts"),
    ("ours+spm_bf16", 90, 25, "the preference model in bf16"),
    ("ours+spm_tf32", 90, 25, "the preference model in TF32"),
    ("ours+bf16", 120, 25, "bf16 in fp16's place"),
)
HOURS = {
    "dpo": (stage_hours, "Diffusion-DPO's steps"),
    "spo": (stage_hours_of_spo, "SPO's iterations with every pair kept"),
    "spm": (stage_hours, "the preference model's steps"),
    "lrm": (stage_hours, "the latent reward model's steps"),
    "lpo": (stage_hours, "LPO's iterations"),
}


def iteration_jobs(kind: str) -> dict[str, Job]:
    return {
        f"{kind}/{row}": Job(stage_iteration, limit, least, f"{kind}: {gives}")
        for row, limit, least, gives in ITERATION_ROWS
    }


STAGES: dict[str, dict[str, Job]] = {
    "tests": {"tests": Job(stage_tests, 120, 20, "whether the kernels are right on this card")},
    "graph": {"graph": Job(stage_graph, 90, 15, "a captured guided step against an eager one")},
    "ops": {
        "ops": Job(stage_ops, 180, 25, "the op table with torch.compile"),
        "ops/group_norm_silu": Job(stage_layer, 240, 25, "group_norm_silu with torch.compile"),
        "ops/geglu": Job(stage_layer, 120, 20, "geglu with torch.compile"),
        **{f"ops/{op}": Job(stage_layer, 120, 20, f"{op} with torch.compile") for op in BLOCK_OPS},
        "ops/short": Job(stage_ops_short, 60, 10, "each op at one shape: Triton, CUDA C++, eager", default=False),
    },
    "ceilings": {
        "ceilings": Job(stage_ceilings, 40, 5, "copy bandwidth and matrix rate, which ratios are read against")
    },
    "libraries": {"libraries": Job(stage_libraries, 120, 15, "attention kernels and optimizers of other libraries")},
    "sd15": iteration_jobs("sd15"),
    "sdxl": iteration_jobs("sdxl"),
    "hours": {
        f"hours/{kind}-{name}": Job(
            run, 120, 15, f"{kind}: {gives}", default=name != "spo"
        )  # whole rows have both shares
        for kind in ("sd15", "sdxl")
        for name, (run, gives) in HOURS.items()
    },
    "toy_large": {"toy_large": Job(stage_toy_large, 3600, 300, default=False)},  # with a budget of its own
    "ops_autotuned": {"ops_autotuned": Job(stage_ops_autotuned, 420, 120, default=False)},
}


@dataclass(frozen=True)
class Call:
    """Jobs in order of value for a GPU that is there for minutes."""

    jobs: tuple[str, ...]  # what fits by the estimate (LOG.md)
    spare: tuple[str, ...]  # where the GPU's machine is faster than that
    budget_s: float
    repetitions: int


CALLS = {
    1: Call(
        ("tests", "ceilings", *(f"sdxl/{row}" for row in ("truth", "published", "ours+all", "ours")), "ops/short"),
        ("sdxl/modern", "sdxl/ours+fuse"),
        budget_s=420,
        repetitions=3,
    ),
    2: Call(
        (
            *(f"sd15/{row}" for row in ("truth", "published", "ours+all", "ours")),
            *(f"hours/{kind}-{name}" for name in ("dpo", "spm") for kind in ("sdxl", "sd15")),
        ),
        (
            *("sd15/modern", "sdxl/truth", "sdxl/modern", "sdxl/ours+graphs", "sdxl/ours+fuse", "sdxl/ours+compile"),
            *(f"sd15/ours+{row}" for row in ("graphs", "fuse", "compile")),
            *(
                "ops",
                "ops/group_norm_silu",
                "ops/geglu",
                *(f"ops/{op}" for op in BLOCK_OPS),
                "hours/sdxl-lrm",
                "hours/sd15-lrm",
                "hours/sd15-lpo",
            ),
            *("libraries", "graph", "hours/sdxl-spo", "hours/sd15-spo", "hours/sdxl-lpo", "sdxl/ours+spm_bf16"),
        ),
        budget_s=420,
        repetitions=3,
    ),
}
"""A row alone needs `truth` in the same call, and the published row's errors from it or from --done."""


def chosen(only: Sequence[str]) -> dict[str, Job]:
    """Jobs by name, in order. `only` names stages or single jobs; a row of an iteration brings nothing else along."""
    jobs = {name: job for stage in STAGES.values() for name, job in stage.items()}
    if not only:
        return {name: job for name, job in jobs.items() if job.default}
    unknown = [name for name in only if name not in STAGES and name not in jobs]
    if unknown:
        raise SystemExit(f"--only {unknown[0]}: unknown. Stages: {', '.join(STAGES)}; jobs: {', '.join(jobs)}.")
    return {n: j for s, stage in STAGES.items() for n, j in stage.items() if s in only or n in only}


def planned(args: argparse.Namespace) -> dict[str, Job]:
    """Jobs by name in the order they run in: --only's, or a call's without those that ended before (--done)."""
    if args.call is None:
        return chosen(args.only)
    call = CALLS[args.call]
    ended = {r["name"].removeprefix("job ") for r in read(args.done) if r["status"] == "ok"} if args.done else set()
    before = [name for n in sorted(CALLS) if n < args.call and args.done for name in CALLS[n].jobs]
    left = [name for name in before if name not in ended]
    truths = [name for name in before if name.endswith("/truth") and stage_of(name) in map(stage_of, left)]
    # of what ended only `truth` runs again: its file is of a call
    own = [name for name in (*call.jobs, *call.spare) if name not in ended or name.endswith("/truth")]
    names = list(dict.fromkeys([*truths, *left, *own]))
    kept = set(chosen(args.only)) if args.only else set(names)
    jobs = {name: job for stage in STAGES.values() for name, job in stage.items()}
    return {name: jobs[name] for name in names if name in kept}


# ---------------------------------------------------------------------------------------------------- one job


def stage_of(job: str) -> str:
    return job.split("/", maxsplit=1)[0]


def run_here(args: argparse.Namespace, name: str, job: Job, limit_s: float, scratch: Path) -> None:
    """The child: run one job; an exception becomes a record and exit status 1."""
    started = time.monotonic()
    records = Records(args.out / "records.jsonl", stage_of(name), args.device, args.size)

    def left_s() -> float:
        return limit_s - (time.monotonic() - started)

    context = Context(name, records, args.size, args.device, args.prompts, scratch, left_s)
    if args.call is not None:
        context = replace(context, valid_shares=(0.5,), repetitions=CALLS[args.call].repetitions)
    try:
        job.run(context)
    except BaseException as error:
        traceback.print_exc()
        records.failed(name, error)
        raise SystemExit(1) from None


def in_child(log: Path, *arguments: Any) -> None:
    """In a process group of its own, all that it and its children print in the log."""
    os.setsid()
    with log.open("a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.stdout, sys.stderr = (os.fdopen(n, "w", buffering=1, closefd=False) for n in (1, 2))
    run_here(*arguments)


def run_child(args: argparse.Namespace, name: str, job: Job, limit_s: float, scratch: Path, records: Records) -> None:
    """The parent's side: a fresh process group, its output in a log, stopped at its limit."""
    started, status = time.monotonic(), "ok"
    values: dict[str, Any] = {}
    path = args.out / "log.txt"
    with path.open("a") as log:
        log.write(f"\n==== {name}\n")
        log.flush()
        start = log.tell()
    sys.stdout.flush()
    fork = multiprocessing.get_context("fork")
    child = fork.Process(target=in_child, args=(path, args, name, job, limit_s, scratch))
    before, compiled = resource.getrusage(resource.RUSAGE_CHILDREN), compiled_files(args.cache)
    child.start()
    child.join(limit_s)
    if child.exitcode is None:
        status, values = "timeout", {"reason": f"stopped after {limit_s:.0f} s"}
    elif child.exitcode != 0:
        status, values = "failed", {"returncode": child.exitcode}
    stop(child)
    if status != "ok":
        values["error"] = tail(path, start)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu_s = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    new = {what: count - compiled[what] for what, count in compiled_files(args.cache).items()}
    records.stage = stage_of(name)
    wall_s = time.monotonic() - started
    records.write(f"job {name}", status, wall_s=wall_s, cpu_s=cpu_s, limit_s=limit_s, compiled=new, **values)


def stop(child: Any) -> None:
    """End the whole group: a job may have started compilers of its own."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(child.pid, signal.SIGKILL)
    child.kill()
    child.join()


def tail(path: Path, start: int, characters: int = 1500) -> str:
    """The end of what lies beyond `start` bytes."""
    return path.read_bytes()[start:].decode(errors="replace")[-characters:]


# ---------------------------------------------------------------------------------------------------- all jobs


LIBRARIES = ("torch._dynamo", "diffusers.models", "transformers", "benchmarks.iteration", "benchmarks.gpu_hours")


def cache_environment(folder: Path) -> dict[str, str]:
    """Where compilers keep what they make; Inductor's graphs beside Triton's binaries, not with copies of them inside,
    which weigh ten times as much."""
    return {
        "TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor"),
        "TRITON_CACHE_DIR": str(folder / "triton"),
        "TORCHINDUCTOR_BUNDLE_TRITON_INTO_FX_GRAPH_CACHE": "0",
    }


def compiled_files(cache: Path | None) -> dict[str, int]:
    """Triton's binaries and Inductor's graphs that are kept."""
    if cache is None:
        return {}
    found = {"kernels": cache.glob("triton/*/*.cubin"), "graphs": cache.glob("inductor/fxgraph/*/*/*")}
    return {what: sum(1 for _ in files) for what, files in found.items()}


def import_libraries(device: str) -> None:
    """Once for all jobs. None may start a thread or use the device: what the driver was asked for dies in a fork.

    Raises RuntimeError if a fork could not use it.
    """
    with contextlib.ExitStack() as answers:
        with contextlib.suppress(ImportError):
            import torch

            # some ask at import, and the driver would answer
            for name in ("is_available", "device_count"):
                answers.enter_context(mock.patch.object(torch.cuda, name, lambda: int(device == "cuda")))
        # peft would import bitsandbytes, which uses the device at once; who times it finds it again
        if "bitsandbytes" not in sys.modules:
            sys.modules["bitsandbytes"] = None  # type: ignore[assignment]
            answers.callback(sys.modules.pop, "bitsandbytes")
        for name in LIBRARIES:
            with contextlib.suppress(ImportError):  # the job that needs it says so
                importlib.import_module(name)
    child = multiprocessing.get_context("fork").Process(target=exit_if_without_device)
    child.start()
    child.join()
    if child.exitcode:
        raise RuntimeError("this process has used the device, so that its forks cannot: run gpu_run.py as a command")


def exit_if_without_device() -> None:
    torch = sys.modules.get("torch")
    raise SystemExit(int(torch is not None and torch.cuda._is_in_bad_fork()))


def run_all(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Every chosen job within the budget; returns the records of this run."""
    started = time.monotonic()
    args.out.mkdir(parents=True, exist_ok=True)
    path, jobs = args.out / "records.jsonl", planned(args)
    before = len(read(path))
    if found := software()["commit"]:
        os.environ["SPO_FAST_COMMIT"] = found  # asked for once
    records = Records(path, "run", args.device, args.size, asks_gpu=False)
    records.write("start", budget_s=args.budget_s, jobs=list(jobs))
    scratch = Path(tempfile.mkdtemp(prefix="spo_fast_benchmarks_"))
    for record in read(args.done) if args.done else []:
        kind, *rest = record["name"].split("/")
        if rest == ["published", "parity"] and record["status"] == "ok":
            (scratch / f"{kind}_published.json").write_text(json.dumps(record))
    if args.cache is not None:
        os.environ.update(cache_environment(args.cache))
    import_libraries(args.device)
    try:
        for name, job in jobs.items():
            left = args.budget_s - RESERVE_S - (time.monotonic() - started)
            least = job.least_s if args.size == "full" else min(job.least_s, 2.0)
            if left < least:
                records.stage = stage_of(name)
                records.write(
                    f"job {name}", "skipped", reason=f"{max(left, 0):.0f} s left of the budget, needs {least:.0f}"
                )
                continue
            try:
                run_child(args, name, job, min(job.limit_s, left), scratch, records)
            except Exception as error:
                records.failed(f"job {name}", error)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return read(path)[before:]


def run_command(out: Path, *argv: str) -> list[dict[str, Any]]:
    """This script's records in a new `out`, for a process that has used a device: its forks could not."""
    subprocess.run([sys.executable, str(Path(__file__).resolve()), "--out", str(out), *argv], check=True)
    return read(out / "records.jsonl")


def order(records: Sequence[dict[str, Any]], jobs: Mapping[str, Job]) -> str:
    """A line a job as they ran, and what is lost with all below it if the call ends before the job does."""
    found = {r["name"].removeprefix("job "): r for r in records if r["name"].startswith("job ")}
    rows: list[list[Any]] = [["#", "job", "status", "s", "until s", "lost if the call ends before"]]
    until = 0.0
    for number, (name, job) in enumerate(jobs.items(), 1):
        seconds = found.get(name, {}).get("wall_s")
        until += seconds or 0.0
        status = found.get(name, {}).get("status", "not reached")
        rows.append([number, name, status, seconds and f"{seconds:.1f}", f"{until:.0f}", job.gives])
    return table(rows)


def summary(records: Sequence[dict[str, Any]]) -> str:
    """A line a record: its median, its ratio to the yardstick of the same name, its error, or why there is none."""
    rows: list[list[Any]] = [["stage", "name", "contender", "p50 ms", "in graph", "ratio", "error", "note"]]
    for r in records:
        if r["stage"] == "run" or (r["name"].startswith("job ") and r["status"] == "ok"):
            continue
        error = r.get("max_error", r.get("gradient_error"))
        rows.append(
            [
                *(r["stage"], r["name"], r.get("contender"), r.get("p50_ms"), r.get("graph_p50_ms")),
                *(ratio(r, records), error, note(r)),
            ]
        )
    return table(rows)


def ratio(record: dict[str, Any], records: Sequence[dict[str, Any]]) -> float | None:
    """Yardstick's time over this one's (in a graph where there is one): eager for an op, the published row for an
    iteration, PyTorch's automatic choice for attention. None where either is missing or did not count."""

    def time_of(r: dict[str, Any]) -> float | None:
        return r.get("graph_p50_ms", r.get("p50_ms"))

    parts = record["name"].split("/")
    for other in records:
        same = other["name"] == record["name"] and other.get("contender") in ("eager", "sdpa automatic")
        published = len(parts) == 3 and other["name"] == f"{parts[0]}/published/{parts[2]}"
        if other["stage"] == record["stage"] and (same or published):
            mine, theirs = time_of(record), time_of(other)
            counts = str(record.get("gate", "passed")) == "passed" and not record.get("dead_batches")
            return theirs / mine if mine and theirs and counts else None
    return None


def note(record: dict[str, Any]) -> str:
    """What one line can hold."""
    parts = [] if record["status"] == "ok" else [record["status"]]
    for field in ("reason", "summary", "error"):
        if text := str(record.get(field) or "").strip():
            parts.append(text.splitlines()[-1][:90])
            break
    if record.get("dead_batches"):
        parts.append(f"does not count, {record['dead_batches']:g} micro-batches skipped their backward")
    if record.get("gate") not in (None, "passed"):
        parts.append(f"does not count, gate {record['gate']}")
    for field, unit in (("tb_per_s", "TB/s"), ("tflop_per_s", "TFLOP/s"), ("peak_allocated_gib", "GiB peak")):
        if record.get(field):
            parts.append(f"{record[field]:.3g} {unit}")
    if record.get("bandwidth_share"):
        parts.append(f"{100 * record['bandwidth_share']:.0f} % of copy")
    if "bitwise_equal_to_eager" in record:
        parts.append("bitwise" if record["bitwise_equal_to_eager"] else "not bitwise")
    return "; ".join(parts)


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of records.jsonl and the logs")
    parser.add_argument("--budget_s", type=float, help="seconds for everything; default 540, a call's its own")
    parser.add_argument("--only", nargs="+", default=(), metavar="NAME", help="stages or jobs, such as ops sd15/ours")
    parser.add_argument("--call", type=int, choices=CALLS, help="the jobs of one of the two calls")
    parser.add_argument("--done", type=Path, metavar="FILE", help="an earlier call's records.jsonl")
    parser.add_argument("--cache", type=Path, metavar="DIR", help="compile caches, such as gpu_pack's")
    parser.add_argument("--size", choices=("full", "tiny"), default="full")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--prompts", type=int, default=None, help="prompts of an iteration; default as published")
    args = parser.parse_args(argv)
    if args.budget_s is None:
        args.budget_s = 540.0 if args.call is None else CALLS[args.call].budget_s
    if args.done is not None and not args.done.is_file():
        parser.error(f"--done {args.done}: no such file; without it a call runs its own jobs alone")
    args.out = args.out.resolve()
    args.cache = args.cache and args.cache.resolve()
    return args


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    found = run_all(args)
    print(summary(found), order(found, planned(args)), sep="\n\n")


if __name__ == "__main__":
    main()
