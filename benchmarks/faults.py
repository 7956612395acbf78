"""python -m benchmarks.faults: faults injected into runs of the toy; what the user sees, and what was lost.

Prints a Markdown table. Lost is told after resuming with the very same command, whose end must be that of a whole run:
nothing before the last whole checkpoint may ever be missing. The full disk is a small tmpfs, where mounting is allowed.
"""

from __future__ import annotations

import contextlib
import errno
import io
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from spo_fast import train
from spo_fast.config import command as config_command
from spo_fast.data import files
from spo_fast.data.prompts import load_prompts
from spo_fast.evaluation.pages.run_record import read_metrics
from spo_fast.method import objectives
from spo_fast.training import checkpoint, loop, run_directory
from spo_fast.training.learner import Learner

ITERATIONS = 4
LINE = shlex.split(
    "--model toy --num_steps 4 --branch_start 2 --num_candidates 2 --sample_batch_size 2 --threshold -1 --resolution 8 "
    "--max_prompts 4 --num_validation_images 0 --train_batch_size 2 --checkpointing_steps 1 --num_train_epochs 2"
)


def captured(line: list[str], work: Callable[[list[str]], int] = train.main) -> tuple[int, list[str]]:
    """Exit status of a command, and what it printed to each stream."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = work(line)
    return status, [out.getvalue().strip(), err.getvalue().strip()]


def told(line: list[str], work: Callable[[list[str]], int] = train.main) -> tuple[int, str]:
    """Exit status of a command and its last line of error, or of output if there is none."""
    status, streams = captured(line, work)
    return status, last_note(streams)


def last_note(streams: list[str]) -> str:
    words = [text for text in streams if text]
    shown = words[-1].splitlines() if words else [""]
    notes = [text for text in shown if text.startswith(("skipped", "stopped", "error", "warning"))]
    return (notes or shown)[-1]


class Faults:
    """A finished run to copy from, and the table."""

    def __init__(self, root: Path) -> None:
        self.root, self.rows, self.printed = root, [], ""
        assert told([*LINE, "--output_dir", str(root / "whole")])[0] == 0

    def copy(self, name: str, checkpoints: int = ITERATIONS) -> Path:
        run = shutil.copytree(self.root / "whole", self.root / name)
        for path in run_directory.checkpoints(run):
            if run_directory.number(path) > checkpoints:
                shutil.rmtree(path)
        return run

    def run(self, run_dir: Path, *more: str) -> tuple[int, str]:
        resume = ["--resume_from_checkpoint", "latest"] if list(run_dir.glob("checkpoint-*")) else []
        status, streams = captured([*LINE, "--output_dir", str(run_dir), *resume, *more])
        self.printed = "\n".join(streams)
        return status, last_note(streams)

    def row(
        self, fault: str, run_dir: Path | None, status: int, seen: str, last: int | None = None, lost: str = "-"
    ) -> None:
        """run_dir: is gone on with afterwards, undisturbed, and must then hold what the whole run holds.

        last: the checkpoint that the run itself must have gone on from, if it has done that already.
        """
        if run_dir is not None:
            printed = self.printed if last else ""
            last = last or max(map(run_directory.number, run_directory.checkpoints(run_dir)), default=0)
            resumed, _ = self.run(run_dir)
            # a run from the start would end alike, having lost everything
            if f"checkpoint-{last} at iteration {last}" not in (printed or self.printed):
                lost = f"ALL: IT DID NOT GO ON FROM CHECKPOINT {last}"
            elif resumed == 0 and self.same(run_dir):
                lost = f"nothing before checkpoint {last}, which it went on from; same end"
            else:
                lost = "THE END DIFFERS"
        self.rows.append(f"| {fault} | {status} | {seen.replace(str(self.root), '...')[:200]} | {lost} |")
        print(self.rows[-1], flush=True)

    def same(self, run_dir: Path) -> bool:
        from safetensors.torch import load_file

        ours, theirs = (
            load_file(r / f"checkpoint-{ITERATIONS}" / "trained.safetensors") for r in (run_dir, self.root / "whole")
        )
        counts = [r["iteration"] for r in read_metrics(run_dir / "metrics.jsonl")]
        return counts == list(range(ITERATIONS)) and all(torch.equal(ours[n], theirs[n]) for n in theirs)

    # ------------------------------------------------------------------------------------------------ the faults

    def damaged(self, fault: str, harm: Callable[[Path], None]) -> None:
        run = self.copy(fault.replace(" ", "-"))
        harm(run / f"checkpoint-{ITERATIONS}" / "trained.safetensors")
        status, seen = self.run(run)
        self.row(f"newest checkpoint: {fault}", run, status, seen, ITERATIONS - 1)

    def disk_full(self) -> None:
        disk = self.root / "disk"
        disk.mkdir()

        def mount(*options: str) -> bool:
            return not subprocess.run(["mount", *options, disk], capture_output=True, check=False).returncode

        if not mount("-t", "tmpfs", "-o", "size=1g", "tmpfs"):
            self.disk_full_simulated()
            return
        try:
            run = self.copy("disk/run", 2)
            last = sum(path.stat().st_size for path in (run / "checkpoint-2").rglob("*"))
            kib = (shutil.disk_usage(disk).used + last // 2) // 1024  # the next checkpoint fits by half
            assert mount("-o", f"remount,size={kib}k")
            status, seen = self.run(run)
            assert mount("-o", "remount,size=1g")  # the user makes room
            self.row(f"disk full (a tmpfs of {kib:,} KiB)", run, status, seen)
        finally:
            subprocess.run(["umount", "-l", disk], check=True)  # the run's lock may still be open

    def disk_full_simulated(self) -> None:
        run = self.copy("full", 2)

        def full(*args: Any) -> None:  # a new error each time: a kept one would hold the run, and its lock
            raise OSError(errno.ENOSPC, "No space left on device")

        with mock.patch.object(checkpoint, "save_file", full):
            status, seen = self.run(run)
        self.row("disk full (simulated: mounting a tmpfs is not allowed here)", run, status, seen)

    def signalled(self) -> None:
        run, whole = self.copy("SIGTERM", 1), Learner.update

        def signals(learner: Any, *args: Any) -> Any:
            os.kill(os.getpid(), signal.SIGTERM)
            return whole(learner, *args)

        with mock.patch.object(Learner, "update", signals):
            status, seen = self.run(run)
        self.row("SIGTERM in an update", run, status, seen)

    def nan_weights(self) -> None:
        run = self.copy("nan", 2)
        broken = torch.full((), float("nan"))
        whole = loop.Run.rollout_weights

        def poison(r: Any, *args: Any) -> Any:
            with torch.no_grad():
                r.policy.masters[0].mul_(broken)
            return whole(r, *args)

        with mock.patch.object(loop.Run, "rollout_weights", poison):
            status, seen = self.run(run, "--max_nonfinite_steps", "1")
        self.row("weights turn NaN", run, status, seen)

    def nan_loss(self) -> None:
        run, whole = self.copy("nan-loss", 2), objectives.predict_states

        def broken(*args: Any) -> Any:
            m = whole(*args)
            return m._replace(cond=m.cond * float("nan"))

        with (
            mock.patch("spo_fast.training.learner.predict_states", broken),
            mock.patch.object(loop, "predict_states", broken),
        ):
            status, seen = self.run(run, "--max_nonfinite_steps", "1")
        self.row("NaN loss", run, status, seen)

    def second_run(self) -> None:
        run = self.copy("second", 2)
        with files.lock(run):
            status, seen = self.run(run)
        self.row("a second run in the directory", run, status, seen)

    def rank_killed(self) -> None:
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port = s.getsockname()[1]
        run = self.root / "rank"
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
        line = [*LINE, "--num_train_epochs", "1000", "--output_dir", str(run)]
        command = [sys.executable, "-m", "spo_fast.train", *line]
        ranks = [
            subprocess.Popen(
                command,
                env={**environment, "MASTER_PORT": str(port), "RANK": str(r)},
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
            )
            for r in range(2)
        ]
        while not (run / "checkpoint-2").is_dir():
            assert ranks[0].poll() is None
        ranks[1].kill()
        seen = ranks[0].communicate(timeout=100)[1].strip()
        found = max(run_directory.checkpoints(run), key=run_directory.number)
        whole = "whole" if run_directory.damage(found) is None else "DAMAGED"
        lost = f"nothing before checkpoint {run_directory.number(found)}, which is {whole}"
        self.row("one of two processes killed", None, ranks[0].returncode, seen, lost=lost)

    def hub(self) -> None:
        gone = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(self.root / "no_hub")}
        line = ["--model", "sdxl", "--output_dir", str(self.root / "hub")]
        command = [sys.executable, "-m", "spo_fast.train", *line]
        done = subprocess.run(command, env={**os.environ, **gone}, capture_output=True, text=True, check=False)
        self.row("hub unreachable", None, done.returncode, " / ".join(done.stderr.strip().splitlines()[:4]))

    def read_only(self) -> None:
        error = PermissionError(errno.EACCES, "Permission denied")
        with mock.patch.object(Path, "mkdir", side_effect=error):
            self.row("directory that cannot be written", None, *told([*LINE, "--output_dir", str(self.root / "ro")]))

    def malformed(self, what: str, contents: st.SearchStrategy[bytes], read: Callable[[Path], Any]) -> None:
        """Files that hypothesis draws; those that can be read after all do not count."""
        path = self.root / what
        errors: list[str] = []

        @settings(max_examples=150, derandomize=True, database=None, deadline=None, phases=[Phase.generate])
        @given(contents)
        def one(content: bytes) -> None:
            path.write_bytes(content)
            status, seen = told([], lambda words: config_command.guarded(lambda: read(path), words))
            if status:
                errors.append(seen)

        one()
        assert len(errors) >= 60
        good = sum(e.startswith("error: ") and "--debug" not in e for e in errors)
        lines = f"{good} one-line errors that name the fault, such as {errors[-1]}"
        self.row(f"{len(errors)} malformed files: {what}", None, 1, " ".join(lines.split()).replace("|", "/"))


def config_of(path: Path) -> None:
    train.parse(["--config", str(path)])


NAMES = st.sampled_from(["rank", "beta", "scorer", "sede", "seed", "method", "eta", "clip"])
VALUES = st.text("[]{}&*!|>%@`'\"-?:#0x1e9 \t\nab", min_size=1, max_size=12) | st.just("!!python/object:os.system x")
CONFIGS = st.builds(lambda name, value: f"model: toy\n{name}: {value}\n".encode(), NAMES, VALUES) | st.binary(
    max_size=40
)
PROMPTS = st.binary(max_size=60) | st.text('[]{}",:captionx0 \n', max_size=40).map(str.encode)


def main() -> None:
    print("| fault | exit status | what is seen | what was lost |\n|---|---|---|---|")
    with tempfile.TemporaryDirectory() as root:
        faults = Faults(Path(root))
        faults.damaged("missing file", Path.unlink)
        faults.damaged("truncated file", lambda p: p.write_bytes(p.read_bytes()[:-9]))
        faults.damaged("bit flip", lambda p: p.write_bytes(p.read_bytes()[:-9] + b"x" + p.read_bytes()[-8:]))
        faults.disk_full()
        faults.signalled()
        faults.second_run()
        faults.nan_loss()
        faults.nan_weights()
        faults.read_only()
        faults.rank_killed()
        faults.hub()
        faults.malformed("config.yaml", CONFIGS, config_of)
        faults.malformed("prompts.json", PROMPTS, load_prompts)
        faults.malformed("prompts.parquet", PROMPTS, load_prompts)


if __name__ == "__main__":
    main()
