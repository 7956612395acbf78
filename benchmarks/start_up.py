"""What begins before the first iteration: whole processes, one thread each, in turn; CPU seconds and peak memory.

    python -m benchmarks.start_up --before fc0ef96 --turns 3 --out FILE

A dry run of SDXL whose counts are kept nowhere (cold), and again with those that it kept (warm), beside the cold one of
an earlier revision of this repository; one iteration of a small toy with 200, 2,000 and 100,000 prompts. Ratios are of
processes of the same turn. The revision is checked out beside, and takes this checkout's compiled libraries.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.cpu_iteration import spread
from benchmarks.records import ROOT, Records, table

DRY_RUN = ["-m", "spo_fast.train", "--model", "sdxl", "--dry_run"]
ONE_STEP = [
    "-m",
    "spo_fast.train",
    "--model",
    "toy",
    "--max_train_steps",
    "1",
    "--num_steps",
    "4",
    "--branch_start",
    "2",
]
SMALL = ["--sample_batch_size", "2", "--num_validation_images", "0", "--max_prompts", "none"]
PROMPTS = (200, 2_000, 100_000)


BETWEEN = """
import json, os, subprocess, sys
process = subprocess.Popen(sys.argv[1:], stdout=subprocess.DEVNULL)
_, status, used = os.wait4(process.pid, 0)
print(json.dumps({"cpu_s": used.ru_utime + used.ru_stime, "peak_mib": used.ru_maxrss / 1024}))
sys.exit(os.waitstatus_to_exitcode(status))
"""
"""A small process that starts the one that is measured: Linux counts the peak of who starts one as its own first."""


@contextlib.contextmanager
def checked_out(revision: str) -> Iterator[Path]:
    """A folder with the repository as it was then."""
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder) / "tree"
        subprocess.run(["git", "-C", ROOT, "worktree", "add", "--quiet", "--detach", tree, revision], check=True)
        try:
            (tree / "spo_fast" / "lib").mkdir(exist_ok=True)
            for library in (ROOT / "spo_fast" / "lib").glob("*.so"):
                shutil.copy(library, tree / "spo_fast" / "lib")
            yield tree
        finally:
            subprocess.run(["git", "-C", ROOT, "worktree", "remove", "--force", tree], check=True)


def measured(words: Sequence[str], tree: Path, cache: Path) -> dict[str, float]:
    """CPU seconds and peak MiB of a process with this folder as its cache."""
    one = {"OMP_NUM_THREADS": "1", "XDG_CACHE_HOME": str(cache), "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(tree)}
    between = [sys.executable, "-S", "-c", BETWEEN, sys.executable, *words]
    done = subprocess.run(between, cwd=tree, env={**os.environ, **one}, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(words)} failed in {tree.name}:\n{done.stderr[-2000:]}")
    found: dict[str, float] = json.loads(done.stdout)
    return found


def dry_runs(before: Path) -> dict[str, dict[str, float]]:
    """One of each: the text is not looked at (tests/test_dry_run.py does)."""
    with tempfile.TemporaryDirectory() as old, tempfile.TemporaryDirectory() as new:
        return {
            "dry run before": measured(DRY_RUN, before, Path(old)),
            "dry run cold": measured(DRY_RUN, ROOT, Path(new)),
            "dry run warm": measured(DRY_RUN, ROOT, Path(new)),
        }


def first_steps() -> dict[str, dict[str, float]]:
    """One of each number of prompts."""
    found = {}
    for count in PROMPTS:
        with tempfile.TemporaryDirectory() as folder:
            prompts = Path(folder) / "prompts.txt"
            prompts.write_text("".join(f"a red circle at the top left, number {i}\n" for i in range(count)))
            words = [*ONE_STEP, *SMALL, "--prompts", str(prompts), "--output_dir", str(Path(folder) / "run")]
            found[f"{count:,} prompts"] = measured(words, ROOT, Path(folder) / "cache")
    return found


TO = {name: "dry run before" for name in ("dry run cold", "dry run warm")}
TO |= {f"{count:,} prompts": f"{PROMPTS[0]:,} prompts" for count in PROMPTS[1:]}
"""What a ratio is taken to."""


def run(out: Path, before: str, turns: int) -> list[dict[str, Any]]:
    """A record of each."""
    with checked_out(before) as tree:
        found = [{**dry_runs(tree), **first_steps()} for _ in range(turns)]
    records, written = Records(out, "cpu"), []
    for name in found[0]:
        values: dict[str, Any] = {
            "cpu_s": spread([turn[name]["cpu_s"] for turn in found]),
            "peak_mib": spread([turn[name]["peak_mib"] for turn in found]),
        }
        if name in TO:
            values["ratio_to"] = TO[name]
            values["ratio"] = spread([turn[name]["cpu_s"] / turn[TO[name]]["cpu_s"] for turn in found])
            values["more_mib"] = spread([turn[name]["peak_mib"] - turn[TO[name]]["peak_mib"] for turn in found])
        written.append(records.write(name, turns=turns, before=before, **values))
    return written


def summary(records: Sequence[dict[str, Any]]) -> str:
    """A line each."""
    rows: list[list[Any]] = [["process", "CPU s", "peak MiB", "ratio", "to", "MiB more"]]
    for r in records:
        ratio = "{min:.3f} {median:.3f} {max:.3f}".format(**r["ratio"]) if "ratio" in r else ""
        more = f"{r['more_mib']['median']:+.0f}" if "more_mib" in r else ""
        middle = f"{r['cpu_s']['median']:.2f}", f"{r['peak_mib']['median']:.0f}"
        rows.append([r["name"], *middle, ratio, r.get("ratio_to", ""), more])
    return table(rows)


def main(argv: Sequence[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", required=True, help="a revision of this repository")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--out", type=Path, required=True, help="records")
    args = parser.parse_args(argv)
    print(summary(run(args.out, args.before, args.turns)))


if __name__ == "__main__":
    main()
