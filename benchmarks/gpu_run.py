"""Everything that needs a GPU, in one command that always leaves records.

    python benchmarks/gpu_run.py --out DIR --budget_s 540 [--only NAME ...] [--size full|tiny] [--device cuda|cpu]

Each job (a stage, or one row of a stage) runs in a process of its own under a time limit taken from the budget, the
most valuable first; a job that fails, is stopped or does not fit leaves a record that says so, and the next one runs.
Not everything fits into one budget: `--only tests graph ops ceilings libraries`, `--only sd15`, `--only sdxl` do.
DIR/records.jsonl grows line by line; what the jobs print is in DIR/log.txt; a short table is printed last.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:  # run as a script, Python puts benchmarks/ there instead
    sys.path.insert(0, str(ROOT))

# these import no package that may be missing
from benchmarks.records import Records, read, software, table  # noqa: E402
from spo_fast.config.command import for_pytorch  # noqa: E402

RESERVE_S = 5.0  # kept of the budget for the table

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


def stage_tests(c: Context) -> None:
    """The tests that need a GPU; the summary line is the record."""
    path = ["tests/test_transition.py"] if c.size == "tiny" else []
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-q", "-p", "no:cacheprovider", *path]
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
LAYER_OPS = ("group_norm_silu", "geglu")  # each in a job of its own
"""benchmarks/bench_<op>.py, each with run(records, size, device, modes=)."""


def stage_ops(c: Context) -> None:
    for op in OPS:
        bench_op(c, op, "default")


def stage_ops_autotuned(c: Context) -> None:
    """Only if asked for: each compilation takes long."""
    for op in OPS:
        bench_op(c, op, "max-autotune-no-cudagraphs")


def bench_op(c: Context, op: str, mode: str) -> None:
    import importlib

    bench = importlib.import_module(f"benchmarks.bench_{op}")
    bench.run(c.records, c.size, c.device, modes=(mode,) if c.device == "cuda" else ())


def stage_layer(c: Context) -> None:
    """An op of the networks' layers; c.job is "ops/geglu"."""
    bench_op(c, c.job.split("/")[1], "default")


def stage_ceilings(c: Context) -> None:
    from benchmarks import bench_libraries

    bench_libraries.run_ceilings(c.records, c.size, c.device)


def stage_libraries(c: Context) -> None:
    from benchmarks import bench_libraries

    bench_libraries.run(c.records, c.size, c.device)


def stage_iteration(c: Context) -> None:
    """A row of sd15 or sdxl (iteration.py); c.job is "sd15/ours+compile"."""
    from dataclasses import replace

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
        repetitions=5 if c.size == "full" else 1,
    )


def stage_hours(c: Context) -> None:
    """What gpu_hours.py needs besides iterations; c.job is "hours/sd15-dpo"."""
    from benchmarks import gpu_hours

    gpu_hours.run(c.job.split("/")[1], c.size, c.device, c.records, c.left_s)


def stage_toy_large(c: Context) -> None:
    """The toy at a GPU's size, built and then as many runs of claims.py as the time allows; again with the same --out,
    it goes on. Its records are DIR/toy_large.jsonl."""
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
    default: bool = True  # else only if --only names it


ITERATION_ROWS = (
    ("truth", 90, 30),
    ("published", 120, 40),
    ("modern", 120, 40),
    ("ours", 120, 40),
    ("ours+fuse", 120, 40),
    ("ours+all", 240, 90),
    ("ours+compile", 240, 90),
    ("ours+graphs", 120, 40),
    ("ours+merged", 120, 40),
    ("ours+all+merged", 240, 90),
    ("ours+spm_bf16", 90, 40),
    ("ours+spm_tf32", 90, 40),
    ("ours+bf16", 120, 40),
)


def iteration_jobs(kind: str) -> dict[str, Job]:
    return {f"{kind}/{row}": Job(stage_iteration, limit, least) for row, limit, least in ITERATION_ROWS}


STAGES: dict[str, dict[str, Job]] = {
    "tests": {"tests": Job(stage_tests, 120, 20)},
    "graph": {"graph": Job(stage_graph, 90, 25)},
    "ops": {
        "ops": Job(stage_ops, 180, 40),
        "ops/group_norm_silu": Job(stage_layer, 240, 60),
        "ops/geglu": Job(stage_layer, 120, 40),
    },
    "ceilings": {"ceilings": Job(stage_ceilings, 40, 12)},
    "libraries": {"libraries": Job(stage_libraries, 120, 25)},
    "sd15": iteration_jobs("sd15"),
    "sdxl": iteration_jobs("sdxl"),
    "hours": {
        f"hours/{kind}-{name}": Job(stage_hours, 120, 30)
        for kind in ("sd15", "sdxl")
        for name in ("dpo", "spm", "lrm", "lpo")
    },
    "toy_large": {"toy_large": Job(stage_toy_large, 3600, 300, default=False)},  # with a budget of its own
    "ops_autotuned": {"ops_autotuned": Job(stage_ops_autotuned, 420, 120, default=False)},
}


def chosen(only: Sequence[str]) -> dict[str, Job]:
    """Jobs by name, in order. `only` names stages or single jobs; a row of an iteration brings nothing else along."""
    jobs = {name: job for stage in STAGES.values() for name, job in stage.items()}
    if not only:
        return {name: job for name, job in jobs.items() if job.default}
    unknown = [name for name in only if name not in STAGES and name not in jobs]
    if unknown:
        raise SystemExit(f"--only {unknown[0]}: unknown. Stages: {', '.join(STAGES)}; jobs: {', '.join(jobs)}.")
    return {n: j for s, stage in STAGES.items() for n, j in stage.items() if s in only or n in only}


# ---------------------------------------------------------------------------------------------------- one job


def stage_of(job: str) -> str:
    return job.split("/", maxsplit=1)[0]


def run_here(args: argparse.Namespace) -> None:
    """The child: run one job; an exception becomes a record and exit status 1."""
    started = time.monotonic()
    records = Records(args.out / "records.jsonl", stage_of(args.job), args.device, args.size)
    job = chosen([args.job])[args.job]

    def left_s() -> float:
        return args.limit_s - (time.monotonic() - started)

    context = Context(args.job, records, args.size, args.device, args.prompts, args.scratch, left_s)
    try:
        job.run(context)
    except BaseException as error:
        traceback.print_exc()
        records.failed(args.job, error)
        raise SystemExit(1) from None


def run_child(args: argparse.Namespace, name: str, limit_s: float, scratch: Path, records: Records) -> None:
    """The parent's side: a fresh process group, its output in a log, stopped at its limit."""
    command = child_command(args, name, limit_s, scratch)
    started, status = time.monotonic(), "ok"
    values: dict[str, Any] = {}
    path = args.out / "log.txt"
    with path.open("a") as log:
        log.write(f"\n==== {name}\n")
        log.flush()
        start = log.tell()
        child = subprocess.Popen(
            command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, start_new_session=True, env=child_environment()
        )
        try:
            code = child.wait(limit_s)
            if code != 0:
                status = "failed"
                values = {"returncode": code, "error": tail(path, start)}
        except subprocess.TimeoutExpired:
            status = "timeout"
            values = {"reason": f"stopped after {limit_s:.0f} s", "error": tail(path, start)}
        finally:
            stop(child)
    records.stage = stage_of(name)
    records.write(f"job {name}", status, wall_s=time.monotonic() - started, limit_s=limit_s, **values)


def child_command(args: argparse.Namespace, name: str, limit_s: float, scratch: Path) -> list[str]:
    command = [sys.executable, str(Path(__file__).resolve()), "--job", name, "--out", str(args.out)]
    command += ["--size", args.size, "--device", args.device, "--scratch", str(scratch), "--limit_s", f"{limit_s:.1f}"]
    return command + ([] if args.prompts is None else ["--prompts", str(args.prompts)])


def child_environment() -> dict[str, str]:
    """Unbuffered, so that a stopped job's log is whole; the checkout's commit, asked for once."""
    found = software()["commit"]
    commit = {"SPO_FAST_COMMIT": found} if found else {}
    return {**os.environ, **for_pytorch(os.environ), "PYTHONUNBUFFERED": "1", **commit}


def stop(child: subprocess.Popen) -> None:
    """End the whole group: a job may have started compilers of its own."""
    try:
        os.killpg(child.pid, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):
        return
    finally:
        child.wait()


def tail(path: Path, start: int, characters: int = 1500) -> str:
    """The end of what lies beyond `start` bytes."""
    return path.read_bytes()[start:].decode(errors="replace")[-characters:]


# ---------------------------------------------------------------------------------------------------- all jobs


def run_all(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Every chosen job within the budget; returns the records of this run."""
    started = time.monotonic()
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / "records.jsonl"
    before = len(read(path))
    records = Records(path, "run", args.device, args.size)
    records.write("start", budget_s=args.budget_s, jobs=list(chosen(args.only)))
    scratch = Path(tempfile.mkdtemp(prefix="spo_fast_benchmarks_"))
    try:
        for name, job in chosen(args.only).items():
            left = args.budget_s - RESERVE_S - (time.monotonic() - started)
            least = job.least_s if args.size == "full" else min(job.least_s, 2.0)
            if left < least:
                records.stage = stage_of(name)
                records.write(
                    f"job {name}", "skipped", reason=f"{max(left, 0):.0f} s left of the budget, needs {least:.0f}"
                )
                continue
            try:
                run_child(args, name, min(job.limit_s, left), scratch, records)
            except Exception as error:
                records.failed(f"job {name}", error)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return read(path)[before:]


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
    parser.add_argument("--budget_s", type=float, default=540, help="seconds for everything")
    parser.add_argument("--only", nargs="+", default=(), metavar="NAME", help="stages or jobs, such as ops sd15/ours")
    parser.add_argument("--size", choices=("full", "tiny"), default="full")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--prompts", type=int, default=None, help="prompts of an iteration; default as published")
    parser.add_argument("--job", help=argparse.SUPPRESS)
    parser.add_argument("--scratch", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--limit_s", type=float, help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    args.out = args.out.resolve()
    if args.job:
        run_here(args)
        return
    print(summary(run_all(args)))


if __name__ == "__main__":
    main()
