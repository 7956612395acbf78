"""The metrics log, its reporters, the progress line, the timer, GPU statistics."""

from __future__ import annotations

import io
import json
import logging
import math
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode

from spo_fast.evaluation.pages.run_record import read_metrics
from spo_fast.training.monitor import gpu
from spo_fast.training.monitor.gpu import gpu_stats
from spo_fast.training.monitor.log import MetricsLog
from spo_fast.training.monitor.progress import ProgressLine, clock_text, progress_text, wrap_fields
from spo_fast.training.monitor.timer import Timer

REPOSITORY = Path(__file__).parents[1]


class FakeClock:
    def __init__(self, now: float = 0.0) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now


def raw_lines(run_dir) -> list[str]:
    return (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()


# ---- metrics.jsonl ----


def test_records_are_flushed_json_lines(tmp_path):
    log = MetricsLog(tmp_path / "run", clock=lambda: 1234.56789)
    returned = log.log(0, {"loss": 0.1, "epoch": 0, "phase": "wärm", "resumed": False, "note": None})
    assert raw_lines(tmp_path / "run") == [  # readable before close
        '{"iteration": 0, "time": 1234.568, "loss": 0.1, "epoch": 0, "phase": "wärm", "resumed": false, "note": null}'
    ]
    assert json.loads(raw_lines(tmp_path / "run")[0]) == returned
    log.close()


def test_numbers_survive_exactly(tmp_path):
    third = torch.tensor(1 / 3)
    values = {
        "third": third,
        "half": torch.tensor([[0.3]], dtype=torch.bfloat16),
        "double": torch.tensor(math.pi, dtype=torch.float64, requires_grad=True),
        "count": torch.tensor(2**40 + 1),
        "byte": torch.tensor(200, dtype=torch.uint8),
        "flag": torch.tensor(True),
        "numpy": np.float32(0.1),
        "plain": 0.1 + 0.2,
    }
    with MetricsLog(tmp_path) as log:
        log.log(7, values)
    (record,) = read_metrics(tmp_path / "metrics.jsonl")
    assert record.pop("iteration") == 7 and record.pop("time") > 0
    assert record == {
        "third": third.item(),
        "half": 0.30078125,
        "double": math.pi,
        "count": 2**40 + 1,
        "byte": 200,
        "flag": True,
        "numpy": float(np.float32(0.1)),
        "plain": 0.30000000000000004,
    }
    assert record["flag"] is True and isinstance(record["count"], int)
    assert list(record) == list(values)  # in the order they were given


def test_nonfinite_values_are_null_and_named(tmp_path):
    with MetricsLog(tmp_path) as log:
        log.log(0, {"loss": torch.tensor(float("nan")), "up": math.inf, "down": torch.tensor(-math.inf), "fine": 1.0})
    line = raw_lines(tmp_path)[0]
    assert "NaN" not in line and "Infinity" not in line  # strict JSON readers take it
    record = json.loads(line)
    assert record["loss"] is record["up"] is record["down"] is None
    assert record["fine"] == 1.0
    assert record["nonfinite"] == {"loss": "nan", "up": "inf", "down": "-inf"}


class CountOps(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.__name__.split(".")[0])
        return func(*args, **(kwargs or {}))


def test_tensors_are_fetched_together(tmp_path):
    """One stack for all, and never an .item() (= _local_scalar_dense) each, which waits for the device."""
    values = {f"metric{i}": torch.tensor(float(i)) for i in range(20)}
    with MetricsLog(tmp_path) as log, CountOps() as ops:
        record = log.log(0, values)
    assert [record[f"metric{i}"] for i in range(20)] == list(range(20))
    assert ops.names.count("stack") == 1
    assert "_local_scalar_dense" not in ops.names


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_tensors_are_fetched_by_one_copy(tmp_path):
    from torch.profiler import ProfilerActivity, profile

    values = {f"metric{i}": torch.tensor(float(i), device="cuda") for i in range(20)} | {"host": torch.tensor(5.0)}
    with MetricsLog(tmp_path) as log, profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as profiler:
        record = log.log(0, values)
    assert [record[f"metric{i}"] for i in range(20)] == list(range(20)) and record["host"] == 5.0
    assert sum("Memcpy DtoH" in event.name for event in profiler.events()) == 1


def test_bad_metrics_are_named(tmp_path):
    with MetricsLog(tmp_path) as log:
        with pytest.raises(ValueError, match=r"metric loss has shape \(3,\)"):
            log.log(0, {"loss": torch.zeros(3)})
        with pytest.raises(ValueError, match="may not be named time"):
            log.log(0, {"time": 3.0})
        with pytest.raises(TypeError, match="metric parts is a list"):
            log.log(0, {"parts": [1, 2]})
    assert raw_lines(tmp_path) == []


# ---- resume ----


def write_records(run_dir, count: int) -> None:
    with MetricsLog(run_dir) as log:
        for i in range(count):
            log.log(i, {"loss": i / 10})


def test_torn_last_line_is_cut_before_appending(tmp_path, caplog):
    write_records(tmp_path, 3)
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(path.read_bytes()[:-9])
    assert [r["iteration"] for r in read_metrics(path)] == [0, 1]  # a reader beside the run leaves it out
    with caplog.at_level(logging.WARNING), MetricsLog(tmp_path) as log:
        log.log(5, {"loss": 0.5})
    assert "torn last line" in caplog.text
    assert [r["iteration"] for r in read_metrics(path)] == [0, 1, 5]


def test_truncate_after_drops_what_will_be_repeated(tmp_path):
    write_records(tmp_path, 6)
    before = raw_lines(tmp_path)
    with MetricsLog(tmp_path) as log:
        assert log.truncate_after(2) == 3
        assert raw_lines(tmp_path) == before[:3]
        log.log(3, {"loss": 9.0})
        assert log.truncate_after(3) == 0
        assert log.truncate_after(-1) == 4  # from the start again
        log.log(0, {"loss": 1.0})
    assert [(r["iteration"], r["loss"]) for r in read_metrics(tmp_path / "metrics.jsonl")] == [(0, 1.0)]
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]  # no temporary file left


def test_truncate_after_survives_damage_and_a_new_run(tmp_path, caplog):
    with MetricsLog(tmp_path / "new") as log:
        assert log.truncate_after(10) == 0
    write_records(tmp_path, 3)
    path = tmp_path / "metrics.jsonl"
    lines = path.read_bytes().split(b"\n")
    path.write_bytes(b"\n".join([lines[0], b'{"iteration": 1, "lo', b"[]", lines[2], b'{"iteration": 3']))
    with pytest.raises(ValueError, match=r"metrics\.jsonl, line 2: not a record"):
        read_metrics(path)
    with caplog.at_level(logging.WARNING), MetricsLog(tmp_path) as log:
        assert log.truncate_after(2) == 0
    assert "2 damaged lines" in caplog.text
    assert [r["iteration"] for r in read_metrics(path)] == [0, 2]


# ---- reporters ----


def test_unknown_reporter_lists_the_known(tmp_path):
    with pytest.raises(ValueError, match="none, tensorboard, wandb. Did you mean tensorboard"):
        MetricsLog(tmp_path, report_to="tensorbord")


@pytest.mark.parametrize(("name", "module"), [("tensorboard", "torch.utils.tensorboard"), ("wandb", "wandb")])
def test_missing_reporter_names_the_extra(tmp_path, monkeypatch, name, module):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=rf"pip install .spo_fast\[{name}\]"):
        MetricsLog(tmp_path, report_to=name)


def test_tensorboard_gets_finite_numbers_and_purges_on_resume(tmp_path, monkeypatch):
    calls: list[tuple] = []

    class SummaryWriter:
        def __init__(self, log_dir, purge_step):
            calls.append(("open", log_dir, purge_step))

        def add_scalar(self, name, number, step):
            calls.append((name, number, step))

        def close(self):
            calls.append(("close",))

    module = types.SimpleNamespace(SummaryWriter=SummaryWriter)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    with MetricsLog(tmp_path, report_to="tensorboard") as log:
        log.truncate_after(4)
        log.log(5, {"loss": torch.tensor(0.5), "bad": math.nan, "name": "x", "none": None})
    assert calls == [("open", str(tmp_path / "tensorboard"), 5), ("loss", 0.5, 5), ("close",)]


def test_tensorboard_files_read_back(tmp_path):
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    with MetricsLog(tmp_path, report_to="tensorboard") as log:
        for i in range(3):
            log.log(i, {"loss": i / 4})
    events = reader.EventAccumulator(str(tmp_path / "tensorboard")).Reload().Scalars("loss")
    assert [(e.step, e.value) for e in events] == [(0, 0.0), (1, 0.25), (2, 0.5)]


def a_grid(tmp_path):
    pixels = np.arange(4 * 6 * 3, dtype=np.uint8).reshape(4, 6, 3)
    Image.fromarray(pixels).save(tmp_path / "grid.png")
    return tmp_path / "grid.png", pixels


def test_grids_reach_tensorboard(tmp_path, monkeypatch):
    calls = []

    class SummaryWriter:
        def __init__(self, log_dir, purge_step):
            calls.append(purge_step)

        def add_image(self, *image, dataformats):
            calls.append((*image, dataformats))

        def close(self): ...

    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", types.SimpleNamespace(SummaryWriter=SummaryWriter))
    path, pixels = a_grid(tmp_path)
    with MetricsLog(tmp_path, report_to="tensorboard") as log:
        log.truncate_after(4)
        log.reporter.images(5, "samples", path)
    purged, (name, image, step, layout) = calls
    assert (purged, name, step, layout) == (5, "samples", 5, "HWC")
    assert (image == pixels).all()


def test_grids_reach_wandb(tmp_path, monkeypatch):
    logs = []
    run = types.SimpleNamespace(log=lambda values, step: logs.append((values, step)), finish=lambda: None)
    module = types.SimpleNamespace(init=lambda **settings: run, Image=lambda path: ("image", path))
    monkeypatch.setitem(sys.modules, "wandb", module)
    path, _ = a_grid(tmp_path)
    with MetricsLog(tmp_path, report_to="wandb") as log:
        log.reporter.images(3, "samples", path)
    assert logs == [({"samples": ("image", str(path))}, 3)]


def test_grids_without_a_reporter_go_nowhere(tmp_path):
    path, _ = a_grid(tmp_path)
    with MetricsLog(tmp_path) as log:
        log.reporter.images(3, "samples", path)
    assert (tmp_path / "metrics.jsonl").read_text() == ""


def test_wandb_continues_its_run(tmp_path, monkeypatch):
    inits, logs = [], []

    class Run:
        def log(self, numbers, step):
            logs.append((numbers, step))

        def finish(self):
            logs.append("finish")

    def init(**settings):
        inits.append(settings)
        return Run()

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init))
    for i in range(2):
        with MetricsLog(tmp_path, report_to="wandb", config={"seed": 3}) as log:
            log.log(i, {"loss": 0.5, "bad": math.inf})
    assert logs == [({"loss": 0.5}, 0), "finish", ({"loss": 0.5}, 1), "finish"]
    assert inits[0]["id"] == inits[1]["id"] and inits[0]["resume"] == "allow"
    assert inits[0]["config"] == {"seed": 3} and inits[0]["dir"] == str(tmp_path)


# ---- progress ----

RECORD = {
    "iteration": 119,
    "time": 0.0,
    "epoch": 1,
    "score_mean": 0.21312,
    "valid_share": 0.4271,
    "loss": 0.69314,
    "rollout_ms": 812.4,
    "backward_ms": 12_040.0,
    "unshown": 5,
}


def test_progress_text():
    assert progress_text(RECORD, 120, 4000, iteration_s=1.25) == (
        "120/4000  epoch 1  score 0.2131  valid 43%  loss 0.6931  "
        "rollout 812 ms  backward 12.0 s  1.25 s/it  ETA 1:20:50"
    )
    assert progress_text({"loss": None}, 1, 2, iteration_s=0.25) == "1/2  loss not finite  4.00 it/s  ETA 0:00"
    assert progress_text({"nothing": 1}, 3, 3, iteration_s=0.0) == "3/3"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0:00"), (59.6, "1:00"), (187, "3:07"), (3600, "1:00:00"), (86399, "23:59:59"), (184200, "2d 03:10:00")],
)
def test_clock_text(seconds, text):
    assert clock_text(seconds) == text


def test_plain_lines_come_every_n_seconds_and_at_the_end():
    clock, stream = FakeClock(100.0), io.StringIO()
    with ProgressLine(total=40, stream=stream, every_s=32, clock=clock) as progress:
        for i in range(40):
            clock.now += 4.0
            progress.update({"iteration": i, "loss": 0.5})
    lines = stream.getvalue().splitlines()
    # 4 s an iteration: the first, then each that ends at least 32 s (8 iterations) after the last shown, then the last
    assert [line.split("/")[0] for line in lines] == ["1", "9", "17", "25", "33", "40"]
    assert lines[1] == "9/40  loss 0.5000  4.00 s/it  ETA 2:04"
    assert lines[-1] == "40/40  loss 0.5000  4.00 s/it  ETA 0:00"


def test_eta_is_a_median():
    """One slow iteration (compilation, a checkpoint) does not move it; 1 s is what an iteration takes."""
    clock, stream = FakeClock(), io.StringIO()
    progress = ProgressLine(total=1000, stream=stream, every_s=0, clock=clock)
    for i, duration in enumerate([300.0] + [1.0] * 9 + [500.0]):
        clock.now += duration
        progress.update({"iteration": i})
    assert stream.getvalue().splitlines()[-1] == "11/1000  1.00 s/it  ETA 16:29"


def test_resumed_run_counts_its_own_time():
    clock, stream = FakeClock(), io.StringIO()
    progress = ProgressLine(total=100, stream=stream, every_s=0, clock=clock)
    clock.now += 2.0
    progress.update({"iteration": 89})
    assert stream.getvalue() == "90/100  2.00 s/it  ETA 0:20\n"


def test_live_line_on_a_terminal(monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    stream = io.StringIO()
    with ProgressLine(total=200, stream=stream, live=True) as progress:
        progress.update(RECORD)
        print("a message meanwhile")  # appears above the line, not through it
    out = stream.getvalue()
    assert "120/200" in out and "━" in out and "a message meanwhile" in out
    assert out.index("a message meanwhile") < out.rindex("120/200")
    assert sys.stdout is not stream


def test_narrow_terminals_break_between_fields():
    assert wrap_fields("12/90  valid 43%  loss 0.6931  ETA 0:05", 20) == "12/90  valid 43%\nloss 0.6931\nETA 0:05"
    assert wrap_fields("12/90  loss 0.6931", 80) == "12/90  loss 0.6931"


def test_logging_goes_above_the_live_line():
    """A handler made before the line holds the old stderr: it is lent the redirected one, and gets its own back."""
    stream, logger = io.StringIO(), logging.getLogger("spo_fast.test_live")
    handler = logging.StreamHandler(sys.stderr)
    logger.addHandler(handler)
    before = handler.stream
    try:
        with ProgressLine(total=200, stream=stream, live=True) as progress:
            progress.update(RECORD)
            logger.warning("a warning meanwhile")
            progress.close()
    finally:
        logger.removeHandler(handler)
    assert "a warning meanwhile" in stream.getvalue()
    assert handler.stream is before


def test_plain_lines_import_no_rich():
    code = (
        "import io, sys\n"
        "from spo_fast.training.monitor.progress import ProgressLine\n"
        "ProgressLine(2, stream=io.StringIO()).update({'iteration': 1})\n"
        "print([m for m in sys.modules if m.split('.')[0] in ('rich', 'wandb', 'tensorboard')])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=REPOSITORY)
    assert result.stdout.strip() == "[]"


# ---- timer ----


def test_timer_accumulates_per_phase_and_resets():
    clock = FakeClock()
    timer = Timer(clock=clock)
    for seconds in (0.5, 0.25):
        with timer("rollout"):
            clock.now += seconds
    with pytest.raises(RuntimeError, match="inside"), timer("backward"):
        clock.now += 0.125
        raise RuntimeError("inside")
    clock.now += 100.0  # between phases: nobody's
    assert timer.read_ms() == {"rollout_ms": 750.0, "backward_ms": 125.0}
    assert timer.read_ms() == {}


def test_timer_takes_an_inner_phase_off_the_outer_one():
    clock = iter([0.0, 1.0, 1.5, 2.0, 2.25, 3.0])
    timer = Timer(clock=lambda: next(clock))
    with timer("rollout"):
        for _ in range(2):
            with timer("score"):
                assert timer.phase == "score"
        assert timer.phase == "rollout"
    assert timer.phase == ""
    assert list(timer.read_ms().items()) == [("rollout_ms", 2250.0), ("score_ms", 750.0)]


def test_timer_knows_the_phase_that_failed():
    timer = Timer()
    with pytest.raises(ValueError), timer("rollout"), timer("score"):
        raise ValueError
    assert timer.phase == "score"
    timer.read_ms()
    assert timer.phase == ""


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_timer_measures_the_gpu_without_waiting():
    timer = Timer("cuda")
    with timer("sleep"):
        torch.cuda._sleep(200_000_000)
    assert not torch.cuda.current_stream().query()  # the phase ended while the GPU still sleeps
    with timer("sleep"):
        pass
    assert timer.read_ms()["sleep_ms"] > 10  # at most 2 GHz or so: 200 M cycles take 100 ms
    assert timer.read_ms() == {}


class FakeEvent:
    """A CUDA event whose time is set when it is recorded."""

    clock = FakeClock()
    synchronized = 0

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing

    def record(self, stream) -> None:
        self.at = self.clock.now

    def synchronize(self) -> None:
        FakeEvent.synchronized += 1

    def elapsed_time(self, end: FakeEvent) -> float:
        return 1000 * (end.at - self.at)


def test_cuda_timer_waits_only_when_read(monkeypatch):
    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: None)
    timer = Timer("cuda")
    for phase, seconds in (("rollout", 0.5), ("backward", 0.125), ("rollout", 0.25)):
        with timer(phase):
            FakeEvent.clock.now += seconds
    assert FakeEvent.synchronized == 0
    assert timer.read_ms() == {"rollout_ms": 750.0, "backward_ms": 125.0}
    assert FakeEvent.synchronized == 3
    assert timer.read_ms() == {}


# ---- NVML ----


def test_gpu_stats_without_a_gpu_or_nvml(monkeypatch):
    gpu._nvml.cache_clear()
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert gpu_stats() == {}
    gpu._nvml.cache_clear()
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert gpu_stats() == {}
    gpu._nvml.cache_clear()


def test_gpu_stats_reads_nvml_by_uuid(monkeypatch):
    class NVMLError(Exception): ...

    def unsupported(handle):
        raise NVMLError("Not Supported")

    def by_uuid(uuid):
        if uuid != "GPU-abc":
            raise NVMLError("Not Found")
        return "handle"

    nvml = types.SimpleNamespace(
        NVMLError=NVMLError,
        nvmlInit=lambda: None,
        nvmlDeviceGetHandleByUUID=by_uuid,
        nvmlDeviceGetUtilizationRates=lambda handle: types.SimpleNamespace(gpu=87),
        nvmlDeviceGetMemoryInfo=lambda handle: types.SimpleNamespace(used=3 * 2**29, total=2**34),
        nvmlDeviceGetPowerUsage=lambda handle: 412_500,
    )
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    uuids = ["abc", "hidden"]
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda i: types.SimpleNamespace(uuid=uuids[i]))
    gpu._nvml.cache_clear()
    assert gpu_stats(0) == {
        "gpu_utilisation_percent": 87.0,
        "gpu_memory_used_gib": 1.5,
        "gpu_memory_total_gib": 16.0,
        "gpu_power_w": 412.5,
    }
    assert gpu_stats(1) == {}
    nvml.nvmlDeviceGetUtilizationRates = unsupported
    assert set(gpu_stats(0)) == {"gpu_memory_used_gib", "gpu_memory_total_gib", "gpu_power_w"}
    gpu._nvml.cache_clear()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_gpu_stats_on_a_gpu():
    pytest.importorskip("pynvml")
    gpu._nvml.cache_clear()
    total = torch.cuda.get_device_properties(0).total_memory / 2**30
    assert gpu_stats()["gpu_memory_total_gib"] == pytest.approx(total, rel=0.05)
