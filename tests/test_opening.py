"""The table that a training opens with: on a terminal and elsewhere, true of what is there and of what is left."""

from __future__ import annotations

import io
import re
import statistics
from pathlib import Path
from typing import Any

import pytest
from runs import ITERATIONS, PAIRS, SMALL, built, run_toy

from spo_fast.evaluation.pages.run_record import read_metrics
from spo_fast.models.device import GIB, Device, found_device
from spo_fast.training import opening
from spo_fast.training.monitor.progress import ProgressLine
from spo_fast.training.plan import dry_run
from spo_fast.training.plan.counted import predict
from spo_fast.training.processes import Group


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


ROW = re.compile(r"^([a-z]+(?: [a-z]+)?)  +(\S.*)")


def table(out: str) -> dict[str, str]:
    """The rows of a plain table, whose values go on in indented lines."""
    rows: dict[str, str] = {}
    for line in out.splitlines():
        if found := ROW.match(line):
            name, value = found.groups()
            rows[name] = value
        elif rows and line.startswith(" "):
            rows[name] += f" {line.strip()}"
        elif rows:
            break
    return rows


def test_it_says_what_the_run_does_and_leaves(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = run_toy(tmp_path / "first", num_validation_images=1, num_train_epochs=2)
    out = capsys.readouterr().out
    rows = table(out)
    assert (
        rows["prompts"] == "4 of the built-in list"
        and rows["iterations"] == f"{ITERATIONS} (2 epochs: --num_train_epochs)"
    )
    assert rows["iteration"] == f"{SMALL['sample_batch_size']} prompts, {PAIRS} pairs if every one is kept"
    assert rows["model"].startswith("toy (") and rows["model"].endswith("8x8")
    assert rows["method"] == "spo, scored by spm" and rows["time"].startswith("known after the first iteration")
    assert rows["memory"].startswith("CPU with ") and "--dry_run" in rows["memory"]
    assert rows["writes into"] == str(run)
    named = {re.sub(r" \(.*", "", name) for name in re.split(r", (?![^(]*\))", rows["files"])}
    left = {p.name + "/" * p.is_dir() for p in run.iterdir() if p.name[:1] != "."}
    assert {re.sub(r"-\d+/", "-N/", name) for name in left} == named | {"prompt_cache/"}
    assert out.index("files  ") < out.index("chosen for this device")


def test_it_knows_the_time_of_a_run_that_cost_the_same(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The phases of an iteration, the first left out; of a resumed run what is still to do."""
    run_toy(tmp_path / "first")
    run_toy(tmp_path / "other", num_candidates=3, max_train_steps=1)
    capsys.readouterr()
    records = read_metrics(tmp_path / "first" / "metrics.jsonl")[1:]
    phases = ("rollout_ms", "score_ms", "reference_ms", "backward_ms", "step_ms")
    median = statistics.median(sum(r[p] for p in phases) for r in records) / 1000
    for number, settings in enumerate([{}, {"num_candidates": 4}]):
        run = built(tmp_path / f"run-{number}", **settings)
        opening.announce(run)
        text = table(capsys.readouterr().out)["time"]
        if settings:
            assert text.startswith("known after the first iteration")
        else:
            assert f"{tmp_path / 'first'} took {median:.3g} s an iteration (median of 3)" in text
    again = built(tmp_path / "first", resume_from_checkpoint="latest", max_train_steps=1004, num_train_epochs=502)
    opening.announce(again)
    rows = table(capsys.readouterr().out)
    assert rows["iterations"] == "1,004, 4 of them done (--max_train_steps)"
    assert f"about {opening.duration(1000 * median)} without validations" in rows["time"]


def test_fewer_prompts_than_a_batch_are_told_as_they_are(tmp_path: Path) -> None:
    run = built(tmp_path / "run", max_prompts=3, sample_batch_size=16)
    assert opening.iteration_text(run) == f"3 prompts, {3 * PAIRS // 2} pairs if every one is kept"
    assert f"1 iterations, {3 * PAIRS // 2} pairs" in dry_run.steps_text(run.cfg.with_fields(num_train_epochs=1), 2)[2]


@pytest.mark.parametrize("width", [80, 60])
def test_it_fits_a_terminal(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    stream, path = Terminal(), "/very/long" * 20
    rows = {"model": f"sdxl [bold] ({path})", "files": ", ".join(["pytorch_lora_weights.safetensors"] * 6)}
    opening.show(rows, stream)
    lines = re.sub(r"\x1b\[[0-9;]*m", "", stream.getvalue()).splitlines()
    assert max(map(len, lines)) <= width and lines[0][0] == "╭" and lines[-1][0] == "╰"
    said = "".join(line[10:-1].strip(" │") for line in lines[1:-1])
    assert path in said and "[bold]" in said  # nothing is cut, and nothing read as a style
    plain = io.StringIO()
    opening.show(rows, plain)
    assert [line for line in plain.getvalue().splitlines() if len(line) > opening.WIDTH] == [f"       ({path})"]


def test_memory_is_that_of_the_dry_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    run = built(tmp_path / "run", cuda_graphs=False)
    device = Device("a pretended GPU", "cuda", 10 * GIB)
    assert opening.memory_text(run.cfg, device, run.model.resolved).startswith("a pretended GPU")  # not counted for it
    peak = predict(run.cfg, run.model.resolved).peak
    text = opening.memory_text(run.cfg, device, run.model.resolved)
    assert text.startswith(f"{peak / 2**20:.1f} MiB predicted, ") and text.endswith("; a pretended GPU with 10.0 GiB")
    assert "predicted," not in opening.memory_text(run.cfg, found_device(run.device), run.model.resolved)


@pytest.mark.parametrize(
    "settings", [{}, {"full_finetune": True}, {"model": "toy-flow", "resolution": 16, "num_steps": 8}]
)
def test_the_weights_are_named_as_they_are_written(tmp_path: Path, settings: dict[str, Any]) -> None:
    run = built(tmp_path / "run", **settings)
    written = [path.name + "/" * path.is_dir() for path in run.export(tmp_path / "out")]
    assert opening.files_left(run)[: len(written)] == written
    assert opening.files_left(run)[len(written)] == "report.html"


def test_process_0_alone_ends_a_run_and_says_why(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = built(tmp_path / "run", max_train_minutes=1e-9)
    run.began, run.group = 0.0, Group(rank=1, size=2)
    assert not run.is_out_of_time() and capsys.readouterr().out == ""
    run.group = Group(rank=0, size=2)
    assert run.is_out_of_time() and "max_train_minutes=1e-09 have passed" in capsys.readouterr().out


def test_the_bar_is_there_before_the_first_iteration_and_has_its_eta_after_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    stream, now = io.StringIO(), iter([100.0, 130.0])
    with ProgressLine(total=12, stream=stream, live=True, clock=lambda: next(now), done=2) as progress:
        progress.close()  # draws the last state
        assert "2/12  ETA after the first iteration" in stream.getvalue()
    stream, now = io.StringIO(), iter([100.0, 130.0])
    with ProgressLine(total=12, stream=stream, live=True, clock=lambda: next(now), done=2) as progress:
        progress.update({"iteration": 2})
    assert "3/12  30.00 s/it  ETA 4:30" in stream.getvalue()
