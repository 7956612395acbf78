"""Runs that are killed, told to stop, or find their checkpoints damaged: what is left, and how they end."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import ITERATIONS, ROOT, Killed, assert_same_end, built, facts, flags, run_toy, start
from safetensors.torch import load_file
from test_distributed import free_port

from spo_fast import evaluate, train
from spo_fast.data import files
from spo_fast.evaluation import evaluate as drawing
from spo_fast.training import batches, checkpoint, learner, loop, run_directory
from spo_fast.training.monitor import log
from spo_fast.training.signals import StopRequest

EIGHT_BIT = {"optimizer": "adamw8bit", "min_8bit_size": 1}
EACH = {"checkpointing_steps": 1}


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run_toy(tmp_path_factory.mktemp("whole") / "run", **EACH)


# --------------------------------------------------------------------------------------------------- killed anywhere

OPERATIONS = (
    *((checkpoint, name) for name in ("save_tensors", "to_disk", "set_aside")),
    *((run_directory, "_sum"), (files, "set_aside")),
    *((os, name) for name in ("fsync", "replace")),
    *((learner.Learner, name) for name in ("step", "update")),
    (log.MetricsLog, "log"),
    (Path, "write_text"),
)


@contextlib.contextmanager
def dies_at(number: int | None) -> Iterator[list[int]]:
    """Killed before operation `number` of those above, or after it by turns; leaves everything as SIGKILL would."""
    count = [0]

    def dying(whole: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            count[0] += 1
            if count[0] == number and number % 2:
                raise Killed
            found = whole(*args, **options)
            if count[0] == number:
                raise Killed
            return found

        return call

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint.shutil, "rmtree", lambda *args, **options: None)  # a killed process tidies nothing up
        for owner, name in OPERATIONS:
            patch.setattr(owner, name, dying(getattr(owner, name)))
        yield count


@pytest.mark.parametrize(("seed", "settings"), [(0, {}), (1, EIGHT_BIT)], ids=["adamw", "adamw8bit"])
def test_killed_five_times_ends_bit_identical(tmp_path: Path, seed: int, settings: dict[str, Any]) -> None:
    """At random operations of one run: in checkpoints, between them, in updates. 10 kills with both optimizers."""
    settings = {**EACH, **settings}
    with dies_at(None) as count:
        whole = run_toy(tmp_path / "whole", **settings)
    per_iteration = count[0] // ITERATIONS
    chance, out, kills = random.Random(seed), tmp_path / "killed", 0
    while kills < 5:
        at = chance.randrange(3, 2 * per_iteration)
        resume = "latest" if list(out.glob("checkpoint-*")) else None
        with dies_at(at), contextlib.suppress(Killed):
            assert train.main(flags(out, resume_from_checkpoint=resume, **settings)) == 0
            break  # it reached its end first
        kills += 1
    assert kills >= 3
    run_toy(out, resume_from_checkpoint="latest", **settings)
    assert_same_end(whole, out)
    state = load_file(out / f"checkpoint-{ITERATIONS}" / "optimizer.safetensors")
    moments = [v for name, v in state.items() if name.split(".")[1] in ("state1", "state2")]
    assert bool(moments) == ("optimizer" in settings) and all(v.dtype == torch.uint8 for v in moments)


def sigkilled(size: int, kills: int, out: Path, chance: random.Random, **settings: Any) -> int:
    """Real processes, SIGKILL after random times, resumed each time until the run ends; how often they were killed."""
    done = 0
    while True:
        resume = "latest" if list(out.glob("checkpoint-*")) else None
        line = flags(out, resume_from_checkpoint=resume, **settings)
        told, ranks = json.dumps([[free_port(), line]]), []
        for r in range(size):
            environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
            environment |= {"RANK": str(r), "WORLD_SIZE": str(size)}
            ranks.append(subprocess.Popen([sys.executable, "tests/ranks.py", told], cwd=ROOT, env=environment))
        metrics, before = out / "metrics.jsonl", time.monotonic()
        seen = metrics.stat().st_mtime_ns if metrics.is_file() else 0
        wait = None
        while all(p.poll() is None for p in ranks):
            if wait is None and metrics.is_file() and metrics.stat().st_mtime_ns != seen:
                wait = time.monotonic() + chance.random() * 3  # somewhere in what follows its start
            if done < kills and wait is not None and time.monotonic() > wait:
                break
            assert time.monotonic() - before < 600
            time.sleep(0.005)
        else:
            assert [p.wait() for p in ranks] == [0] * size
            return done
        victim = chance.randrange(size)
        ranks[victim].kill()
        for p in ranks:
            p.kill()
            p.wait()
        done += 1


@pytest.mark.slow
@pytest.mark.parametrize(
    ("size", "kills", "settings"), [(1, 40, {}), (1, 10, EIGHT_BIT), (2, 10, {})], ids=["one", "adamw8bit", "two"]
)
def test_sigkill_at_random_moments(tmp_path: Path, size: int, kills: int, settings: dict[str, Any]) -> None:
    settings = {**EACH, "max_prompts": 16, "num_train_epochs": kills, "checkpoints_total_limit": 3, **settings}
    threads = torch.get_num_threads()
    chance = random.Random(kills + size)
    done = sigkilled(size, kills, tmp_path / "killed", chance, **settings)
    assert sigkilled(size, 0, tmp_path / "whole", chance, **settings) == 0
    print(f"{done} kills of {size} processes, {len(facts(tmp_path / 'whole'))} iterations")
    assert done >= kills // 2 and torch.get_num_threads() == threads
    assert_same_end(tmp_path / "whole", tmp_path / "killed")


# --------------------------------------------------------------------------------------------------------- damage


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


DAMAGE: dict[str, Callable[[Path], None]] = {
    "missing": Path.unlink,
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:-100]),
    "bit flip": flip,
    "empty": lambda path: path.write_bytes(b""),
}


@pytest.mark.parametrize("file", ["trained.safetensors", "optimizer.safetensors", "state.json", run_directory.SUMS])
@pytest.mark.parametrize("kind", DAMAGE)
def test_latest_is_the_last_whole_one(whole_run: Path, tmp_path: Path, kind: str, file: str, capsys: Any) -> None:
    copy = shutil.copytree(whole_run, tmp_path / "run")
    last = copy / f"checkpoint-{ITERATIONS}"
    DAMAGE[kind](last / file)
    assert run_directory.find(copy, "latest") == copy / f"checkpoint-{ITERATIONS - 1}"
    told = capsys.readouterr().out
    assert f"skipped {last}: it is damaged" in told and told.count("\n") == 1
    with pytest.raises((run_directory.MismatchError, FileNotFoundError)):
        run_directory.find(copy, str(last))


def test_a_checkpoint_knows_what_its_prompts_were_encoded_by(whole_run: Path, tmp_path: Path, capsys: Any) -> None:
    copy = shutil.copytree(whole_run, tmp_path / "run")
    fingerprint = built(tmp_path / "other", **EACH).model.prompt_cache.fingerprint
    for path in copy.glob("checkpoint-*/state.json"):
        record = json.loads(path.read_text())
        assert record["settings"]["prompt_cache"] == fingerprint
        record["settings"]["prompt_cache"] = "another encoder"
        path.write_text(json.dumps(record))
        run_directory.write_sums(path.parent)
    run_toy(copy, resume_from_checkpoint="latest", **EACH)
    assert f"changed since the checkpoint: prompt_cache: another encoder -> {fingerprint}" in capsys.readouterr().out


def test_damaged_checkpoint_costs_only_its_own_iteration(whole_run: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(whole_run, tmp_path / "run")
    flip(copy / f"checkpoint-{ITERATIONS}" / "optimizer.safetensors")
    run_toy(copy, resume_from_checkpoint="latest", **EACH)
    assert_same_end(whole_run, copy)
    assert len(list(copy.glob(f"old-*-checkpoint-{ITERATIONS}"))) == 1  # kept, out of the way


def test_sums_that_name_files_outside_are_damage(whole_run: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(whole_run / "checkpoint-1", tmp_path / "checkpoint-1")
    (copy / run_directory.SUMS).write_text(f"{'0' * 64}  ../../../etc/passwd\n")
    assert "outside" in (run_directory.damage(copy) or "")


# ------------------------------------------------------------------------------------------------------ told to stop


@pytest.mark.parametrize("where", ["inputs", "update"])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_ends_well(
    whole_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any, where: str, number: int
) -> None:
    """In the rollout nothing has changed yet and it is abandoned; an update is finished first."""
    owner: Any = batches if where == "inputs" else learner.Learner
    calls, whole = [0], getattr(owner, where)

    def signals(self: Any, *args: Any) -> Any:
        calls[0] += 1
        if calls[0] == 3:
            os.kill(os.getpid(), number)
        return whole(self, *args)

    out, before = tmp_path / "run", signal.getsignal(number)
    with monkeypatch.context() as patch:
        patch.setattr(owner, where, signals)
        assert train.main(flags(out, **{**EACH, "checkpointing_steps": 100})) == 0
    assert signal.getsignal(number) == before
    done = 2 if where == "inputs" else 3
    assert f"stopped after iteration {done}" in capsys.readouterr().out
    assert [p.name for p in out.glob("checkpoint-*")] == [f"checkpoint-{done}"] and len(facts(out)) == done
    assert not (out / "report.html").exists()  # it is no end
    run_toy(out, resume_from_checkpoint="latest", **EACH)
    assert_same_end(whole_run, out)


def test_a_second_signal_stops_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    def twice(run: Any, iteration: int) -> Any:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(60)

    monkeypatch.setattr(batches, "inputs", twice)
    assert train.main(flags(tmp_path / "run")) == 130
    assert "no checkpoint was written yet" in capsys.readouterr().err


def test_a_stop_that_takes_too_long_is_given_up(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    left = threading.Event()
    status: list[int] = []
    monkeypatch.setattr("os._exit", lambda code: (status.append(code), left.set()))
    with StopRequest(0.01):
        os.kill(os.getpid(), signal.SIGTERM)
        assert left.wait(30)
    assert status == [1] and "--stop_seconds" in capsys.readouterr().err


def test_sigterm_while_loading_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(train, "build", lambda cfg: os.kill(os.getpid(), signal.SIGTERM) or time.sleep(60))
    assert train.main(flags(tmp_path / "run")) == 143
    assert capsys.readouterr().err == "stopped by SIGTERM; training had not begun\n"
    assert signal.getsignal(signal.SIGTERM) == before
    monkeypatch.setattr(drawing, "evaluate", lambda *_: os.kill(os.getpid(), signal.SIGTERM) or time.sleep(60))
    assert evaluate.main(["--model", "toy", "--output_dir", str(tmp_path / "out")]) == 143
    assert capsys.readouterr().err == "stopped by SIGTERM\n"


def test_a_checkpoint_that_cannot_be_removed_ends_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    whole = checkpoint.shutil.rmtree

    def locked(path: Path, *args: Any, **options: Any) -> None:
        if path.name == "checkpoint-1":
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), "state.json")
        whole(path, *args, **options)

    monkeypatch.setattr(checkpoint.shutil, "rmtree", locked)
    out = run_toy(tmp_path / "run", max_train_steps=3, checkpointing_steps=1, checkpoints_total_limit=1)
    assert f"warning: {out / 'checkpoint-1'} cannot be removed (Permission denied)" in capsys.readouterr().out
    assert {p.name for p in out.glob("checkpoint-*")} == {"checkpoint-1", "checkpoint-3"}


@pytest.mark.parametrize("name", ["samples", "metrics.jsonl/x", "config.yaml/x"])
def test_what_stands_in_the_way_is_named(tmp_path: Path, capsys: Any, name: str) -> None:
    """A file in a folder's place, or a folder in a file's: one line, without the number of the system's error."""
    path = tmp_path / "run" / name
    path.parent.mkdir(parents=True)
    path.write_text("")
    settings = {"num_validation_images": 1, "max_train_steps": 1}
    status = train.main(flags(tmp_path / "run", **settings))
    error = capsys.readouterr().err
    if status:  # what an earlier run left may be set aside
        assert "Errno" not in error and "Mend or move what stands there" in error and error.count("\n") == 1
        assert str(tmp_path / "run" / name.split("/", maxsplit=1)[0]) in error
    else:
        assert name.startswith("metrics")


@pytest.mark.slow
def test_sigterm_of_another_process(tmp_path: Path) -> None:
    out = tmp_path / "run"
    process = start(flags(out, num_train_epochs=10_000))
    while not (out / "metrics.jsonl").is_file() or not facts(out):
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    output, errors = process.communicate(timeout=100)
    assert process.returncode == 0 and errors == "" and "stopped after iteration" in output
    assert run_directory.damage(max(out.glob("checkpoint-*"), key=run_directory.number)) is None


# --------------------------------------------------------------------------------------------------------- soak


@pytest.mark.slow
def test_soak(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Thousands of iterations: memory and open files stay where they were. SOAK_ITERATIONS sets how many."""
    iterations = int(os.environ.get("SOAK_ITERATIONS", "2000"))
    page, seen, whole = os.sysconf("SC_PAGESIZE"), [], loop.Run.iterate

    def measured(self: Any, *args: Any) -> Any:
        record = whole(self, *args)
        resident = int(Path("/proc/self/statm").read_text().split()[1]) * page
        allocated = torch.cuda.memory_allocated() if torch.cuda.is_available() else 0
        seen.append((resident, allocated, len(os.listdir("/proc/self/fd"))))
        return record

    monkeypatch.setattr(loop.Run, "iterate", measured)
    few = {"num_steps": 6, "sample_batch_size": 1, "train_batch_size": 4, "num_candidates": 2, "max_prompts": 50}
    few |= {"num_train_epochs": 10**6, "max_train_steps": iterations, "checkpointing_steps": 500}
    run_toy(tmp_path / "run", **few, checkpoints_total_limit=2)
    settled = torch.tensor(seen[len(seen) // 4 :], dtype=torch.float64)
    n = torch.arange(len(settled), dtype=torch.float64)
    slopes = ((n - n.mean())[:, None] * (settled - settled.mean(0))).sum(0) / (n - n.mean()).square().sum()
    resident, allocated, files = slopes.tolist()
    print(f"{len(seen)} iterations: {resident:.0f} bytes of RSS, {allocated:.1f} of GPU memory, {files:.2g} files each")
    assert abs(resident) < 2048 and abs(allocated) < 64 and settled[:, 2].max() - settled[:, 2].min() <= 2
