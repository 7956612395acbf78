"""Every measurement is one line of records.jsonl, written at once, with all that is needed to judge it."""

from __future__ import annotations

import datetime
import functools
import importlib.metadata
import json
import os
import platform
import re
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from spo_fast.config.tables import columns

ROOT = Path(__file__).parents[1]
PACKAGES = ("torch", "triton", "diffusers", "transformers", "peft", "bitsandbytes", "xformers")
RESULTS, DOCS = Path(__file__).parent / "results", ROOT / "docs"
UP_TO_HERE = "\n\n<!-- up to here -->"
GPU_FIELDS = {  # ours: nvidia-smi's
    "name": "name",
    "driver": "driver_version",
    "sm_clock_mhz": "clocks.sm",
    "temperature_c": "temperature.gpu",
    "power_w": "power.draw",
}


def quantiles(times_ms: Sequence[float]) -> dict[str, Any]:
    """{"p20_ms", "p50_ms", "p80_ms", "n"} by linear interpolation between the sorted times."""
    ordered = sorted(times_ms)

    def at(q: float) -> float:
        place = q * (len(ordered) - 1)
        low = int(place)
        high = min(low + 1, len(ordered) - 1)
        return ordered[low] + (place - low) * (ordered[high] - ordered[low])

    return {"p20_ms": at(0.2), "p50_ms": at(0.5), "p80_ms": at(0.8), "n": len(ordered)}


def results_path(what: str, device: str) -> Path:
    """results/<date>_<gpu, or cpu>_<what>.jsonl"""
    import torch

    name = torch.cuda.get_device_name() if device == "cuda" else "cpu"
    return RESULTS / f"{datetime.date.today()}_{re.sub('[^a-z0-9]+', '-', name.lower())}_{what}.jsonl"


@functools.cache
def software() -> dict[str, Any]:
    """Commit (with "+" if files are changed) and versions; None for what is not there. Imports none of it."""
    versions: dict[str, Any] = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    return {"commit": commit(), "versions": versions, "machine": platform.machine()}


def commit() -> str | None:
    """Of this checkout, or of the SPO_FAST_COMMIT variable where a copy without .git is measured."""
    revision = _output("git", "-C", str(ROOT), "rev-parse", "HEAD")
    if revision is None:
        return os.environ.get("SPO_FAST_COMMIT")
    changed = _output("git", "-C", str(ROOT), "status", "--porcelain", "--untracked-files=no")
    return revision + ("+" if changed else "")


def gpu_state() -> dict[str, Any]:
    """Name, driver, SM clock, temperature and power of the first visible GPU at this moment; {} if nothing tells them.

    NVML answers in under a millisecond; nvidia-smi, asked where nvidia-ml-py is missing, takes a good deal longer.
    """
    try:
        return _nvml_state()
    except Exception:  # no package, no driver, or a value this card does not report
        return _smi_state()


def _nvml_state() -> dict[str, Any]:
    import pynvml

    pynvml.nvmlInit()
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")[0].strip()
    by_index = visible == "" or visible.isdigit()
    handle = (
        pynvml.nvmlDeviceGetHandleByIndex(int(visible or 0)) if by_index else pynvml.nvmlDeviceGetHandleByUUID(visible)
    )
    return {
        "name": _text(pynvml.nvmlDeviceGetName(handle)),
        "driver": _text(pynvml.nvmlSystemGetDriverVersion()),
        "sm_clock_mhz": pynvml.nvmlDeviceGetClockInfo(handle, pynvml.NVML_CLOCK_SM),
        "temperature_c": pynvml.nvmlDeviceGetTemperature(handle, pynvml.NVML_TEMPERATURE_GPU),
        "power_w": pynvml.nvmlDeviceGetPowerUsage(handle) / 1000,
    }


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value


def _smi_state() -> dict[str, Any]:
    line = _output("nvidia-smi", f"--query-gpu={','.join(GPU_FIELDS.values())}", "--format=csv,noheader,nounits")
    if not line:
        return {}
    return dict(zip(GPU_FIELDS, (value.strip() for value in line.splitlines()[0].split(",")), strict=False))


def _output(*command: str) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def command(words: Sequence[str]) -> str:
    """As it was typed, without the places of Python and its scripts on this machine."""
    python, *rest = words
    first = [Path(rest[0]).name] if rest and os.path.isabs(rest[0]) else ["python", *rest[:1]]
    return shlex.join([*first, *rest[1:]])


class Records:
    """Appends to one file; a line is complete or absent, also if the process dies right after."""

    def __init__(self, path: Path, stage: str, device: str = "cpu", size: str = "full", asks_gpu: bool = True):
        self.path, self.stage, self.device, self.size = Path(path), stage, device, size
        self.asks_gpu = asks_gpu and device == "cuda"  # not before a fork: NVML is a driver, too
        self.path.parent.mkdir(parents=True, exist_ok=True)

    def write(self, name: str, status: str = "ok", **values: Any) -> dict[str, Any]:
        """One record: status ok, failed, skipped or timeout; `error` or `reason` says why it is not ok."""
        record = {
            "stage": self.stage,
            "name": name,
            "status": status,
            **values,
            "time": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            "size": self.size,
            "device": self.device,
            **software(),
            "gpu": gpu_state() if self.asks_gpu else {},
            "command": command(sys.orig_argv),
        }
        line = json.dumps(record, default=str) + "\n"
        with self.path.open("a") as file:
            file.write(line)
            file.flush()
            os.fsync(file.fileno())
        return record

    def failed(self, name: str, error: BaseException, **values: Any) -> None:
        self.write(name, "failed", error=f"{type(error).__name__}: {error}"[:2000], **values)


def read(path: Path) -> list[dict[str, Any]]:
    """All records of a file; [] if there is none. A torn last line is left out."""
    if not Path(path).is_file():
        return []
    records = []
    for line in Path(path).read_text().splitlines():
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return records


def fill(page: Path, text: str, module: str) -> None:
    """Puts a module's tables into a page, between the comment that names its command and UP_TO_HERE."""
    start = f"<!-- python -m benchmarks.{module} -->\n\n"
    before, rest = page.read_text(encoding="utf-8").split(start)
    draft = page.with_suffix(".tmp")
    draft.write_text(before + start + text + UP_TO_HERE + rest.split(UP_TO_HERE, 1)[1], encoding="utf-8")
    os.replace(draft, page)


def table(rows: Sequence[Sequence[Any]]) -> str:
    """Aligned columns, the first row a heading."""
    cells = [[f"{c:.4g}" if isinstance(c, float) else str("" if c is None else c) for c in row] for row in rows]
    return columns(cells)
